"""Should short documents be joined, packed side by side, or padded? Perplexity on single ones."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any

import _study as study
from transformers import AutoModelForMaskedLM, AutoTokenizer

from mlmadapt import TrainingConfig, accelerate_train, group_texts, pack_texts

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence
    from pathlib import Path

    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

CORPORA = {
    "sentences": ("corpora", "general_wikisplit"),
    "reviews": ("imdb",),
}
WAYS = {
    "joined": "`group_texts`: end to end, and cut every 128 tokens",
    "packed": "`pack_texts`: whole, side by side, each alone in its attention",
    "padded": "one document per row",
}
ROWS = 16  # of 128 tokens per step, or as many tokens of another kind of row
LEARNING_RATE = 3e-4


def take(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, tokens: int) -> Dataset:
    """Tokenize the first documents, until there are so many tokens."""
    documents = study.tokenize(texts[: tokens // 10], tokenizer)
    count = total = 0
    for ids in documents["input_ids"]:
        if total >= tokens:
            break
        total, count = total + len(ids), count + 1
    return documents.select(range(count))


def lay_out(documents: Dataset, way: str) -> Dataset:
    """Lay documents out in rows of at most 128 tokens, in one of three ways."""
    cut = {"chunk_size": study.CHUNK, "labels": False, "remainder": "keep"}
    if way == "joined":
        return documents.map(group_texts, batched=True, batch_size=None, fn_kwargs=cut)
    if way == "packed":
        fitting = {"chunk_size": study.CHUNK}
        return documents.map(pack_texts, batched=True, batch_size=None, fn_kwargs=fitting)
    return documents.map(group_texts, batched=True, batch_size=1, fn_kwargs=cut)


def fill_of(rows: Dataset, steps: int) -> float:
    """Return how many percent of the batches of an epoch are text, in a random order."""
    lengths = [len(ids) for ids in rows.shuffle(seed=0)["input_ids"]]
    size = math.ceil(len(lengths) / steps)
    batches = [lengths[start : start + size] for start in range(0, len(lengths), size)]
    return 100 * sum(lengths) / sum(len(batch) * max(batch) for batch in batches)


def adapt(args: argparse.Namespace, rows: Dataset, *, folder: Path, steps: int, seed: int) -> float:
    """Train a model on rows in so many steps, and return the CPU seconds that it took."""
    seconds = folder / "cpu_seconds.txt"
    if not seconds.exists():
        tokenizer = AutoTokenizer.from_pretrained(args.data / study.MODEL)
        rows, collator = study.fit(rows, tokenizer, "words", seed=seed)
        began = time.process_time()
        accelerate_train(
            AutoModelForMaskedLM.from_pretrained(args.data / study.MODEL),
            rows,
            tokenizer=tokenizer,
            data_collator=collator,
            config=TrainingConfig(
                output_dir=str(folder),
                overwrite=True,
                max_steps=steps,
                per_device_train_batch_size=math.ceil(len(rows) / steps),
                learning_rate=LEARNING_RATE,
                seed=seed,
                save_strategy="no",
                disable_tqdm=True,
            ),
        )
        seconds.write_text(str(time.process_time() - began), encoding="utf-8")
    return float(seconds.read_text(encoding="utf-8"))


def measure(args: argparse.Namespace, corpus: str) -> dict[str, dict[str, list[float]]]:
    """Return perplexities and seconds of each way over the seeds."""
    tokenizer = AutoTokenizer.from_pretrained(args.data / study.MODEL)
    train, held_out = study.read_documents(args.data.joinpath(*CORPORA[corpus]))
    tokens = args.train_rows * study.CHUNK
    documents = take([*train], tokenizer, tokens=tokens)
    alone = lay_out(study.tokenize([*held_out][: args.held_out_rows], tokenizer), "padded")
    frozen = study.freeze(alone, tokenizer)
    steps = math.ceil(tokens / (ROWS * study.CHUNK))
    figures: dict[str, Any] = {
        "before": {"perplexity": [study.perplexity(args.data / study.MODEL, frozen)]}
    }
    for way in WAYS:
        rows = lay_out(documents, way)
        folders = [
            args.models / f"{CORPORA[corpus][-1]}-{way}-{steps}-steps-{s}" for s in args.seeds
        ]
        seconds = [
            adapt(args, rows, folder=folder, steps=steps, seed=seed)
            for folder, seed in zip(folders, args.seeds, strict=True)
        ]
        perplexities = [study.perplexity(folder, frozen) for folder in folders]
        figures[way] = {
            "perplexity": perplexities,
            "seconds": seconds,
            "fill": [fill_of(rows, steps)],
        }
    return figures


def main() -> None:
    """Adapt to the same documents in three layouts, and measure each on single documents."""
    args = study.make_parser(__doc__, train_rows=4_112).parse_args()
    tokens = args.train_rows * study.CHUNK
    steps = math.ceil(tokens / (ROWS * study.CHUNK))
    study.begin(
        "Short documents: joined, packed or padded",
        f"""
        The same documents in rows of at most {study.CHUNK} tokens, laid out in three ways. Each
        model is measured as it will be used: on single held-out documents.

        - Joined: {WAYS["joined"]}.
        - Packed: {WAYS["packed"]}.
        - Padded: {WAYS["padded"]}.
        - {tokens:,} tokens, {steps} steps, learning rate {LEARNING_RATE}, linear to 0.
        - Whole words masked, {study.MASKED:.0%}. Reviews longer than a row are cut into several.
        - Sentences are of general_wikisplit, and reviews of IMDb.
        - Measured on {args.held_out_rows:,} documents that no model has learned from.
        - {study.tell_spread(args)}
        """,
    )
    figures = {corpus: measure(args, corpus) for corpus in CORPORA}
    study.show_table(
        ("perplexity", *CORPORA),
        [
            (way, *(study.spread(each[way]["perplexity"]) for each in figures.values()))
            for way in ("before", *WAYS)
        ],
    )
    kinds = {"fill": "of a batch is text, %", "seconds": "CPU seconds"}
    study.show_table(
        ("", *(f"{corpus}: {kind}" for corpus in CORPORA for kind in kinds.values())),
        [
            (way, *(study.spread(each[way][kind]) for each in figures.values() for kind in kinds))
            for way in WAYS
        ],
    )
    study.save(args, "short_documents", figures)


if __name__ == "__main__":
    main()
