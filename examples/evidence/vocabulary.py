"""What do words of the domain's own, a token each, save and change?"""

from __future__ import annotations

import math
import os
import statistics
from typing import TYPE_CHECKING, Any, NamedTuple

import _study as study
import numpy as np
import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer

from mlmadapt import (
    TrainingConfig,
    WholeWordMaskingCollator,
    accelerate_train,
    extend_vocabulary,
    find_domain_words,
    group_texts,
    sparse_prediction,
    tokenize_with_word_ids,
)

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from datasets import Dataset

CORPORA = {"abstracts": "corpora/biomed_abstracts", "reviews": "imdb"}
WORDS = 60  # of a row to measure on, the same for both vocabularies
MASKED = 0.15  # of them
COLUMNS = ("added words", "other words", "general text", "bits per byte")
COLUMNS += ("tokens per document", "steps", "CPU seconds")


class Measured(NamedTuple):
    """Nats per masked word, and bits per byte of the masked words of the domain."""

    added: float
    other: float
    general: float
    bits_per_byte: float


def main() -> None:
    """Adapt with the old vocabulary and with an extended one, and measure on the same words."""
    parser = study.make_parser(__doc__, train_rows=4800, held_out_rows=300)
    parser.add_argument("--corpora", nargs="+", default=[*CORPORA], help="to adapt to")
    parser.add_argument("--count_rows", type=int, help="to count words in; as many as are learned")
    args = parser.parse_args()
    args.count_rows = args.count_rows or args.train_rows
    old = AutoTokenizer.from_pretrained(args.data / study.MODEL)
    _, general = study.read_documents(args.data / "corpora" / "general_wikisplit")
    study.begin(
        "Words of the domain",
        f"""
        Nats per masked word and bits per byte of the masked words, for the old vocabulary and for
        one with up to 3,000 words that `find_domain_words` finds in {args.count_rows:,} rows of
        training text (with a count of 10 and four letters at least).

        - Abstracts are biomed_abstracts, reviews are IMDb. {args.train_rows:,} rows of
          {study.CHUNK} tokens are learned from, {study.count_steps(args, range(args.train_rows))}
          steps of {study.BATCH} rows, learning rate 5e-5, linear to 0.
        - "Same documents" learns from the same text, which takes fewer rows and steps; "same steps"
          goes on for as many steps as the old vocabulary took, and "same time" for as long: its
          steps are scaled by the CPU seconds per step of both, since a larger head takes longer.
        - The same {MASKED:.0%} of the words of {args.held_out_rows:,} test documents, and of
          {5 * args.held_out_rows:,} sentences of general text, are masked for all, {WORDS} words in
          a row. A word of several pieces has the sum of their losses: they are predicted
          independently of each other.
        - Words are called added by the extended vocabulary, in the rows of the old one too.
        - {study.tell_spread(args)} Seconds are those of the
          processor in the run itself (user time), on which other work hardly tells.
        """,
    )
    figures = {name: study_corpus(args, name, old, [*general]) for name in args.corpora}
    study.save(args, "vocabulary", {"runs": figures})


def study_corpus(
    args: argparse.Namespace, name: str, old: Any, general: list[str]
) -> dict[str, dict[str, Any]]:
    """Adapt to one corpus in all ways, and print a table."""
    texts, held_out = study.read_documents(args.data / CORPORA[name])
    documents = take(texts, old, args.train_rows)
    found = find_domain_words(take(texts, old, args.count_rows), old, size=3000)
    model = AutoModelForMaskedLM.from_pretrained(args.data / study.MODEL)
    new, larger = extend_vocabulary(old, model, found.words)
    sets = [[*held_out][: args.held_out_rows], general[: 5 * args.held_out_rows]]
    passes = {each: cut(documents, each) for each in (old, new)}
    steps = {each: study.count_steps(args, rows) for each, rows in passes.items()}
    runs: dict[str, tuple[Any, Any, int | None]] = {
        "before": (old, model, 0),
        "before, new words": (new, larger, 0),
        "old words": (old, model, steps[old]),
        "new words, same documents": (new, larger, steps[new]),
        "new words, same steps": (new, larger, steps[old]),
        "new words, same time": (new, larger, None),
    }
    rows: list[tuple[str, ...]] = []
    figures: dict[str, dict[str, Any]] = {}
    done: dict[tuple[Any, int], tuple[list[Measured], list[float]]] = {}
    for run, (tokenizer, start, wanted) in runs.items():
        count = scale(steps[old], figures) if wanted is None else wanted
        if (tokenizer, count) not in done:  # few words more may take no step less
            results, seconds = done[tokenizer, count] = [], []
            for seed in args.seeds if count else args.seeds[:1]:
                trained, took = adapt(args, start, tokenizer, passes[tokenizer], count, seed)
                results.append(measure(trained, tokenizer, old, new, sets))
                seconds.append(took)
        results, seconds = done[tokenizer, count]
        length = float(np.mean([*map(len, tokenizer(sets[0])["input_ids"])]))
        cells = [study.spread(values, 3) for values in zip(*results, strict=True)]
        rows.append((run, *cells, f"{length:.1f}", f"{count:,}", study.spread(seconds)))
        measured = [each._asdict() for each in results]
        figures[run] = {"measured": measured, "seconds": seconds, "steps": count, "tokens": length}
    added = f"{len(found.words):,} words, which save {found.share:.1%} of the tokens, are added"
    print(f"{name.capitalize()}: {added}.\n")
    study.show_table((f"{name}, nats per word", *COLUMNS), rows)
    return figures


def scale(steps: int, figures: dict[str, dict[str, Any]]) -> int:
    """Return the steps with new words that take as long as those with the old ones."""
    old, new = (
        statistics.mean(figures[run]["seconds"]) for run in ("old words", "new words, same steps")
    )
    return max(round(steps * old / new), 1)


def take(texts: dict[str, int], tokenizer: Any, rows: int) -> list[str]:
    """Return the first documents, as many as fill the rows."""
    taken, tokens = [], 0
    for text in texts:
        if tokens >= rows * study.CHUNK:
            break
        taken.append(text)
        tokens += len(tokenizer(text)["input_ids"])
    return taken


def cut(texts: Sequence[str], tokenizer: Any) -> Dataset:
    """Return rows of all documents end to end."""
    tokens = study.tokenize(texts, tokenizer).with_format("arrow")
    fitting = {"chunk_size": study.CHUNK, "labels": False}
    chunks: Dataset = tokens.map(group_texts, batched=True, batch_size=None, fn_kwargs=fitting)
    return chunks.with_format(None)


def adapt(
    args: argparse.Namespace, start: Any, tokenizer: Any, rows: Dataset, steps: int, seed: int
) -> tuple[Any, float]:
    """Train a copy of a model for some steps; return it and the CPU seconds."""
    if not steps:
        return start, 0.0
    folder = args.models / "vocabulary"
    start.save_pretrained(folder)
    began = os.times().user
    accelerate_train(
        AutoModelForMaskedLM.from_pretrained(folder),
        rows,
        tokenizer=tokenizer,
        data_collator=WholeWordMaskingCollator(tokenizer, wwm_probability=study.MASKED, seed=seed),
        config=TrainingConfig(
            output_dir=str(folder / "run"),
            overwrite=True,
            max_steps=steps,
            per_device_train_batch_size=study.BATCH,
            seed=seed,
            save_strategy="no",
            disable_tqdm=True,
        ),
    )
    took = os.times().user - began
    return AutoModelForMaskedLM.from_pretrained(folder / "run"), took


def measure(model: Any, tokenizer: Any, old: Any, new: Any, sets: list[list[str]]) -> Measured:
    """Measure a model on words that are the same whatever the tokenizer."""
    by_set, handle = [], sparse_prediction(model)
    for texts in sets:
        columns = {each: tokenize_with_word_ids({"text": texts}, each) for each in (old, new)}
        parts = []
        generator = np.random.default_rng(0)
        for place in range(len(texts)):
            words = {each: columns[each]["word_ids"][place] for each in (old, new)}
            ids = {each: columns[each]["input_ids"][place] for each in (old, new)}
            count = words[old].max() + 1
            is_masked = generator.random(count) < MASKED
            if words[new].max() + 1 != count:
                continue  # beside a symbol that BERT does not split off, there are more words
            losses = word_losses(
                model, handle, tokenizer, ids[tokenizer], words[tokenizer], is_masked
            )
            is_added = np.bincount(words[new][ids[new] >= len(old)], minlength=count) > 0
            size = word_sizes(ids[old], words[old], old)
            parts.append(np.stack([losses, is_added, size])[:, is_masked])
        by_set.append(np.concatenate(parts, axis=1))
    handle.remove()
    (domain, added, size), (general, *_) = by_set
    bits = domain.sum() / math.log(2) / size.sum()
    means = [domain[added == 1].mean(), domain[added == 0].mean(), general.mean()]
    return Measured(*map(float, [*means, bits]))


def word_sizes(ids: np.ndarray, words: np.ndarray, tokenizer: Any) -> np.ndarray:
    """Return the bytes of each word."""
    tokens = tokenizer.convert_ids_to_tokens(ids.tolist())
    sizes = np.array([len(token.removeprefix("##").encode()) for token in tokens])
    return np.bincount(words[words >= 0], sizes[words >= 0])


def word_losses(
    model: Any,
    handle: Any,
    tokenizer: Any,
    ids: np.ndarray,
    words: np.ndarray,
    is_masked: np.ndarray,
) -> np.ndarray:
    """Return the nats of each masked word of a document, and 0 for the others."""
    rows, targets, owners = [], [], []
    for first in range(0, len(is_masked), WORDS):
        inside = (words >= first) & (words < first + WORDS)
        own, row = words[inside], ids[inside]
        hidden = np.where(is_masked[own], tokenizer.mask_token_id, row)
        rows.append([tokenizer.cls_token_id, *hidden.tolist(), tokenizer.sep_token_id])
        targets += row[is_masked[own]].tolist()
        owners += own[is_masked[own]].tolist()
    batch = tokenizer.pad({"input_ids": rows}, return_tensors="pt")
    positions = batch["input_ids"] == tokenizer.mask_token_id
    losses = np.zeros(len(is_masked))
    if targets:
        with torch.no_grad(), handle.at(positions):
            logits = model(**batch).logits[0].float()
        nats = torch.nn.functional.cross_entropy(logits, torch.tensor(targets), reduction="none")
        np.add.at(losses, owners, nats.double().numpy())
    return losses


if __name__ == "__main__":
    main()
