"""Measure packed rows beside joined, padded and grouped ones, in data, batches and training steps.

Joined rows are those of `group_texts`, packed ones those of `pack_texts` with `isolate_documents`;
padded ones hold one document each (a longer one is cut into several), in random order or grouped by
length. A training step is that of `accelerate_train`: collating, forward pass with the head on
masked positions, backward pass with the loss in the memory of its logits, and AdamW. (The model's
own loss makes more arrays of that size, and what they cost says more about a machine's memory than
about rows.) The model is a BERT with random weights: time does not depend on them. Steps are drawn
evenly from an epoch, as many as hold about as many real tokens; padding is none of these, and what
counts is how many of them a second are trained on. The head and AdamW cost the same for all kinds
of rows, so the larger the encoder, the more packed rows gain.
"""

from __future__ import annotations

import math
import random
from collections import deque
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import _measure as measure
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM

from mlmadapt import (
    WholeWordMaskingCollator,
    group_texts,
    isolate_documents,
    pack_texts,
    sparse_prediction,
    tokenize_with_word_ids,
)
from mlmadapt.data.chunking import cut_rows
from mlmadapt.model.head import MaskedPositions, masked_logits, summed_cross_entropy
from mlmadapt.testing import tiny_corpus, tiny_tokenizer
from mlmadapt.training.batches import BatchPlan, training_batches

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

    from transformers import PreTrainedTokenizerBase

    from mlmadapt.model.head import SparsePrediction

POSITIONS = 64 * 128  # of a batch whose rows are full
DOCUMENTS = 10_000
BY_MAP = 1000  # documents that `map` hands over by default
MODEL = {
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 1024,
}
TOKENS = 12_000  # real ones, that a contender trains on in a turn
COLUMNS = ["input_ids", "attention_mask", "word_ids"]


@dataclass(frozen=True)
class Corpus:
    """Tokenized documents, and the length of the rows that they are made to."""

    name: str
    documents: pa.Table
    tokenizer: PreTrainedTokenizerBase
    length: int
    goals: dict[str, float]  # how many times as fast the first is as the second, at least

    @property
    def batch_size(self) -> int:
        """Rows per batch, the fewer the longer they are."""
        return POSITIONS // self.length


def main() -> None:
    """Measure rows, then batches, then training steps on each corpus."""
    arguments = measure.parse_arguments(__doc__, rounds=5)
    corpora, description = load_corpora(arguments)
    report = measure.Report("Packing", description, arguments)
    claims = measure_rows(report, corpora[0], arguments.rounds)
    claims += measure_collating(report, corpora[0], arguments.rounds)
    for corpus in corpora:
        claims += measure_steps(report, corpus, arguments.rounds)
    report.claims("packed rows", claims)
    report.save()


def load_corpora(arguments: argparse.Namespace) -> tuple[list[Corpus], str]:
    """Load sentences, reviews and Chinese reviews of a folder, or one file, or make texts up."""
    goals = {"packed / padded": 1.4, "packed / joined": 0.95, "grouped / padded": 1.5}
    if arguments.data is None:
        texts = {
            "sentences": (tiny_corpus(DOCUMENTS), 128, goals),
            "reviews": (measure.synthetic_reviews(4000), 512, {}),
        }
        tokenizers = dict.fromkeys(texts, tiny_tokenizer())
        told = "synthetic sentences and reviews; tokenizer tiny_tokenizer"
    elif Path(arguments.data).is_dir():
        data = Path(arguments.data)
        files: dict[str, tuple[str, int, dict[str, float]]] = {
            "sentences": ("corpora/general_wikisplit", 128, goals),
            "reviews": ("imdb", 512, {}),
            "Chinese reviews": ("corpora/zh_hotel_reviews", 512, {"packed / padded": 2.0}),
        }
        texts = {
            name: (draw_texts(data / folder / "train.parquet"), length, own)
            for name, (folder, length, own) in files.items()
        }
        names = ("bert-base-uncased", "bert-base-uncased", "bert-base-chinese")
        found = [AutoTokenizer.from_pretrained(data / "tokenizers" / name) for name in names]
        tokenizers = dict(zip(files, found, strict=True))
        told = ", ".join(f"{name} of {folder}" for name, (folder, *_) in files.items())
    else:
        path = Path(arguments.data)
        texts = {path.stem: (draw_texts(path), 128, goals)}
        name = arguments.tokenizer
        tokenizer = AutoTokenizer.from_pretrained(name) if name else tiny_tokenizer()
        tokenizers, told = {path.stem: tokenizer}, path.name
    corpora = []
    for name, (documents, length, own) in texts.items():
        tokens = tokenize_with_word_ids(pa.table({"text": documents}), tokenizers[name])
        table = tokens.select(COLUMNS)
        corpora.append(Corpus(name, table, tokenizers[name], length, own))
    return corpora, told


def draw_texts(path: Path) -> list[str]:
    """Draw documents of a file, since corpora are often sorted."""
    texts = measure.read_texts(path)
    random.Random(0).shuffle(texts)  # noqa: S311 (nothing secret)
    return texts[:DOCUMENTS]


def count_tokens(table: pa.Table) -> int:
    """Count the tokens of all rows."""
    return pc.sum(pc.list_value_length(table["input_ids"])).as_py()


def measure_rows(report: measure.Report, corpus: Corpus, rounds: int) -> list[measure.Claim]:
    """Print how full rows are, and how fast they are made; return what is claimed of both."""
    table, total = corpus.documents, count_tokens(corpus.documents)
    batches = [table.slice(at, BY_MAP) for at in range(0, len(table), BY_MAP)]
    rows, claims = [], []
    for length, goal in ((128, 0.97), (512, 0.99)):
        made = {
            "pack_texts, all at once": [pack_texts(table, chunk_size=length)],
            f"pack_texts, {BY_MAP:,} documents at once": [
                pack_texts(batch, chunk_size=length) for batch in batches
            ],
            "one document per row": [one_per_row(table, length)],
        }
        for name, tables in made.items():
            count = sum(map(len, tables))
            rows.append(
                (f"{name}, {length}", f"{count:,}", f"{100 * total / (count * length):.1f} %")
            )
        share = np.array([total / (len(made["pack_texts, all at once"][0]) * length)])
        claims.append(measure.Claim(f"share of full rows of {length}", share, at_least=goal))
    report.table((f"{corpus.name}, rows of", "rows", "full"), rows)

    lists = table.to_pydict()
    times = measure.take_turns(
        {
            f"{function.__name__}, {form}": measure.Contender(
                lambda batch, function=function, options=options: function(batch, **options),
                lambda batch=batch: batch,
            )
            for function, options in ((pack_texts, {}), (group_texts, {"labels": False}))
            for form, batch in (("Arrow", table), ("lists", lists))
        },
        rounds=rounds,
    )
    report.times(f"{len(table):,} {corpus.name} to rows of 128", times, count=total, unit="tokens")
    for name in ("pack_texts, Arrow", "pack_texts, lists"):
        millions = total / times[name].wall / 1e6
        claims.append(measure.Claim(f"{name}: million tokens per second", millions, at_least=1))
    return claims


def one_per_row(table: pa.Table, length: int) -> pa.Table:
    """Cut each document into rows of its own."""
    ends = np.cumsum(pc.list_value_length(table["input_ids"]).to_numpy()).tolist()
    starts = np.concatenate([np.arange(*each, length) for each in pairwise([0, *ends])])
    rows = {}
    for name, column in zip(table.column_names, table.columns, strict=True):
        line = pa.chunked_array([chunk.flatten() for chunk in column.chunks])
        rows[name] = cut_rows(line, starts, like=column)
    return pa.table(rows)


def measure_collating(report: measure.Report, corpus: Corpus, rounds: int) -> list[measure.Claim]:
    """Print how long packed rows take beside joined ones, to become batches.

    From a table as `accelerate_train` reads it, all rows; and from lists, fresh from Arrow, which a
    dataset without a format hands out, 64 rows.
    """
    collator = WholeWordMaskingCollator(corpus.tokenizer, seed=0)
    made = {
        "packed": pack_texts(corpus.documents),
        "joined": group_texts(corpus.documents, labels=False),
    }
    plan = BatchPlan(rows=min(map(len, made.values())), batch_size=corpus.batch_size)
    epochs = {
        name: measure.Contender(
            lambda rows: deque(training_batches(rows, plan, collator, epoch=0), maxlen=0),
            lambda table=table: Dataset(table),
        )
        for name, table in made.items()
    }
    batches = {
        name: measure.Contender(collator, table.slice(0, corpus.batch_size).to_pylist)
        for name, table in made.items()
    }
    claims = []
    for form, contenders, count in (
        ("table", epochs, plan.rows),
        ("lists", batches, corpus.batch_size),
    ):
        times = measure.take_turns(contenders, rounds=5 * rounds)
        title = f"collating {count:,} rows of 128, {corpus.name}, {form}"
        report.times(title, times, count=count, unit="rows")
        title = f"collating, {form}: packed / joined"
        claim = measure.Claim.ratio(title, times["packed"], times["joined"], at_most=1.3)
        claims.append(claim)
    return claims


def measure_steps(report: measure.Report, corpus: Corpus, rounds: int) -> list[measure.Claim]:
    """Print how many real tokens a second are trained on, by the kind of rows."""
    alone = one_per_row(corpus.documents, corpus.length)
    lengths = torch.from_numpy(pc.list_value_length(alone["input_ids"]).to_numpy().astype(np.int64))
    joined = group_texts(corpus.documents, chunk_size=corpus.length, remainder="keep", labels=False)
    kinds: dict[str, tuple[pa.Table, torch.Tensor | None]] = {
        "padded": (alone, None),
        "grouped": (alone, lengths),
        "joined": (joined, None),
        "packed": (pack_texts(corpus.documents, chunk_size=corpus.length), None),
    }
    model = make_model(corpus.tokenizer)
    contenders, tokens, shares = {}, {}, []
    with isolate_documents(model), sparse_prediction(model) as sparse:
        step = make_step(corpus.tokenizer, model, sparse)
        for name, (table, grouped_by) in kinds.items():
            steps, whole = draw_steps(table, grouped_by, corpus.batch_size)
            rows = Dataset(table)
            batches = [[rows[row] for row in batch] for batch in steps]
            tokens[name] = sum(len(row["input_ids"]) for batch in batches for row in batch)
            told = [f"{100 * text_in(table, each):.1f} %" for each in (steps, whole)]
            shares.append((name, f"{len(steps)}", *told))
            contenders[name] = measure.Contender(step, lambda batches=batches: batches)
        times = measure.take_turns(contenders, rounds=rounds)
    title = f"{corpus.name}, {corpus.batch_size} x {corpus.length}"
    report.table((title, "steps per turn", "text in them", "text in an epoch"), shares)
    per_token = {
        name: measure.Times(1000 * each.wall / tokens[name], 1000 * each.cpu / tokens[name])
        for name, each in times.items()
    }
    report.times(f"{title}, 1,000 tokens", per_token, count=1000, unit="tokens")
    return [
        measure.Claim.ratio(
            f"{corpus.name}: {fast} / {slow}",
            per_token[slow],
            per_token[fast],
            at_least=corpus.goals.get(f"{fast} / {slow}", -math.inf),
        )
        for fast, slow in (
            ("packed", "padded"),
            ("packed", "grouped"),
            ("packed", "joined"),
            ("grouped", "padded"),
        )
    ]


def draw_steps(
    table: pa.Table, lengths: torch.Tensor | None, batch_size: int
) -> tuple[list[list[int]], list[list[int]]]:
    """Draw steps evenly from an epoch, to hold the tokens of a turn; return all its steps too."""
    order = BatchPlan(rows=len(table), batch_size=batch_size, lengths=lengths).order(0)
    whole = order[: len(order) // batch_size * batch_size].view(-1, batch_size)
    count = math.ceil(TOKENS / (count_tokens(table) / len(table) * batch_size))
    count = min(count, len(whole))
    places = (torch.arange(count) + 0.5).mul(len(whole) / count).long()
    return whole[places].tolist(), whole.tolist()


def text_in(table: pa.Table, steps: list[list[int]]) -> float:
    """Return the share of batches that is no padding."""
    lengths = pc.list_value_length(table["input_ids"]).to_numpy()
    sizes = [lengths[step] for step in steps]
    return sum(map(sum, sizes)) / sum(len(each) * max(each) for each in sizes)


def make_model(tokenizer: PreTrainedTokenizerBase) -> BertForMaskedLM:
    """Make a model with random weights."""
    torch.manual_seed(0)
    sizes = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    return BertForMaskedLM(BertConfig(**sizes, **MODEL)).train()


def make_step(
    tokenizer: PreTrainedTokenizerBase, model: BertForMaskedLM, sparse: SparsePrediction
) -> Callable[[list[Any]], None]:
    """Make what trains a model on batches of rows."""
    optimizer = torch.optim.AdamW(model.parameters(), 5e-5, fused=True)
    collator = WholeWordMaskingCollator(tokenizer, seed=0)

    def train(batches: list[list[dict[str, Any]]]) -> None:
        for rows in batches:
            batch = collator(rows)
            labels = batch.pop("labels")
            masked = MaskedPositions.of(labels != -100, rounded=True)
            with sparse.at(masked):
                logits = masked_logits(model(**batch), masked)
            loss = summed_cross_entropy(logits, labels.flatten()[masked.indices[: masked.number]])
            (loss / (labels != -100).sum()).backward()
            optimizer.step()
            optimizer.zero_grad()

    return train


if __name__ == "__main__":
    main()
