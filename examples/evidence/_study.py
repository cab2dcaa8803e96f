"""What the studies share: documents held out, models adapted once, and sections in Markdown.

Held out are whole documents of the test files, those that also stand in the train files left out.
An adapted model is found again in the folder of models by its settings, and an interrupted run goes
on where it was; that rows, masks and settings are the same, `accelerate_train` checks.
"""

from __future__ import annotations

import argparse
import inspect
import json
import logging
import math
import os
import random
import statistics
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Before any Hugging Face library is imported, which read them once: nothing here needs the hub.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import datasets
import pyarrow.parquet as pq
import transformers
from transformers import AutoModelForMaskedLM, AutoTokenizer, DataCollatorForLanguageModeling

from mlmadapt import (
    TrainingConfig,
    WholeWordMaskingCollator,
    accelerate_train,
    evaluate_mlm,
    group_texts,
    insert_random_mask,
    tokenize_with_word_ids,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

datasets.disable_progress_bars()
transformers.utils.logging.disable_progress_bar()
logging.getLogger("mlmadapt.data.chunking").setLevel(
    logging.ERROR
)  # drops less than one row in all

MODEL = Path("models", "bert-tiny-mlm")
BATCH, CHUNK = 64, 128
MASKED = 0.2  # of words, or of tokens, and always replaced by the mask token


def make_parser(doc: str | None, **defaults: Any) -> argparse.ArgumentParser:
    """Make the options that every study has, since `nox -s evidence` gives the same to all."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data",
        type=Path,
        required=True,
        help="folder with imdb/train.parquet, imdb/test.parquet, the same two files in "
        "corpora/general_wikisplit, and a masked language model in models/bert-tiny-mlm",
    )
    parser.add_argument(
        "--models", type=Path, default=Path("build", "evidence"), help="where adapted models lie"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--train_rows", type=int, default=10_000, help="to adapt to")
    parser.add_argument("--held_out_rows", type=int, default=1_000, help="to measure on")
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--output", type=Path, help="file to append the figures to, a JSON a line")
    parser.add_argument(
        "--pictures", type=Path, default=Path("docs", "pictures"), help="where pictures are written"
    )
    parser.set_defaults(**defaults)
    return parser


def read_documents(folder: Path) -> tuple[dict[str, int], dict[str, int]]:
    """Read the distinct texts to learn from and those held out, shuffled, each with its label."""
    parts: list[dict[str, int]] = []
    for name in ("train", "test"):
        columns = pq.read_table(folder / f"{name}.parquet").to_pydict()
        texts = columns["text"]
        rows = list(zip(texts, columns.get("label", [0] * len(texts)), strict=True))
        random.Random(0).shuffle(rows)  # noqa: S311 (nothing secret); IMDb is sorted by label
        parts.append(dict(rows))
    train, test = parts
    return train, {text: label for text, label in test.items() if text not in train}


def tokenize(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Return a row a text, as long as the text is."""
    return datasets.Dataset.from_dict({"text": list(texts)}).map(
        tokenize_with_word_ids,
        batched=True,
        fn_kwargs={"tokenizer": tokenizer},
        remove_columns="text",
    )


def cut(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, *, rows: int) -> Dataset:
    """Return the first rows of the texts end to end."""
    tokens = tokenize(texts, tokenizer).with_format("arrow")
    fitting = {"chunk_size": CHUNK, "labels": False}
    # In batches of 1,000 documents, as the recipe has it.
    chunks = tokens.map(group_texts, batched=True, fn_kwargs=fitting).with_format(None)
    return chunks.select(range(min(rows, len(chunks))))


def freeze(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    masking: str = "words",
    *,
    rate: float = MASKED,
) -> Dataset:
    """Mask rows once; all models are measured on the same masks."""
    rows, collator = fit(rows, tokenizer, masking, seed=0, rate=rate)
    return rows.map(
        insert_random_mask,
        batched=True,
        fn_kwargs={"data_collator": collator},
        remove_columns=rows.column_names,
    )


def fit(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    masking: str,
    *,
    seed: int,
    rate: Any = MASKED,
) -> tuple[Dataset, Callable[[list[dict[str, Any]]], dict[str, Any]]]:
    """Return rows and a collator that masks whole words or single tokens of them."""
    if masking == "words":
        return rows, WholeWordMaskingCollator(tokenizer, wwm_probability=rate, seed=seed)
    collator = DataCollatorForLanguageModeling(
        tokenizer, mlm_probability=rate, mask_replace_prob=1, random_replace_prob=0, seed=seed
    )
    return rows.remove_columns("word_ids"), collator


def adapt(
    args: argparse.Namespace,
    rows: Dataset,
    *,
    corpus: str,
    masking: str = "words",
    rate: Any = MASKED,
    seed: int,
) -> Path:
    """Return the folder of an adapted model, which is trained unless it is there."""
    steps = count_steps(args, rows)
    folder = args.models / f"{corpus}-{masking}-{len(rows)}-rows-{steps}-steps-seed-{seed}"
    tokenizer = AutoTokenizer.from_pretrained(args.data / MODEL)
    rows, collator = fit(rows, tokenizer, masking, seed=seed, rate=rate)
    accelerate_train(
        AutoModelForMaskedLM.from_pretrained(args.data / MODEL),
        rows,
        tokenizer=tokenizer,
        data_collator=collator,
        config=TrainingConfig(
            output_dir=str(folder),
            max_steps=steps,
            per_device_train_batch_size=BATCH,
            seed=seed,
            save_strategy="steps",
            save_steps=100,
            save_total_limit=1,
            resume_from_checkpoint=True if folder.exists() else None,
            disable_tqdm=True,
        ),
    )
    return folder


def count_steps(args: argparse.Namespace, rows: Dataset) -> int:
    """Return the optimizer steps of a run."""
    return math.ceil(args.epochs * len(rows) / BATCH)


def perplexity(folder: Path, frozen: Dataset) -> float:
    """Measure a saved model."""
    model = AutoModelForMaskedLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return evaluate_mlm(model, frozen, tokenizer=tokenizer).perplexity


def begin(title: str, text: str) -> None:
    """Print the head of a section: what was asked, and a list of how it was answered."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    print(f"## {title}\n\n{inspect.cleandoc(text)}")
    print(f"- {os.cpu_count()} CPU cores, {versions}.\n", flush=True)


def tell_training(args: argparse.Namespace, rows: Dataset) -> str:
    """Say how a model is adapted."""
    return (
        f"{len(rows):,} rows of {CHUNK} tokens of IMDb train, {count_steps(args, rows)} steps of "
        f"{BATCH} rows, learning rate 5e-5, linear to 0"
    )


def tell_spread(args: argparse.Namespace, differs: str = "order, masks, dropout") -> str:
    """Say what the figures are."""
    if len(args.seeds) == 1:
        return f"One run, of seed {args.seeds[0]} ({differs})."
    seeds = ", ".join(map(str, args.seeds))
    return f"Mean ± standard deviation over the seeds {seeds} ({differs})."


def show_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table."""
    for line in (header, ["---", *["---:"] * (len(header) - 1)], *rows):
        print(f"| {' | '.join(line)} |")
    print(flush=True)


def spread(values: Sequence[float], digits: int = 1, sign: str = "") -> str:
    """Write mean and standard deviation over seeds."""
    mean = f"{statistics.mean(values):{sign},.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def save(args: argparse.Namespace, study: str, figures: dict[str, Any]) -> None:
    """Append the figures, a value a seed, to the file."""
    if args.output is not None:
        settings = {n: v for n, v in vars(args).items() if not isinstance(v, Path)}
        with args.output.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"study": study, **settings, **figures}) + "\n")
