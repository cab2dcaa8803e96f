"""Measure the way from rows of a dataset on disk to masked batches, beside that of `Trainer`.

An epoch in random order, in one process: 64 rows of 128 per batch, masked and made to tensors.
"ours, lists" reads the same rows through `Dataset` as lists of Python numbers, which is what a
transform or a list of rows still costs. `Trainer`'s is the DataLoader that it trains from, with
transformers' collator, which masks tokens and not words; it has no ``word_ids`` to read.
"""

from __future__ import annotations

import tempfile
from collections import deque
from typing import TYPE_CHECKING, Any

import _measure as measure
from datasets import Dataset
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

from mlmadapt import WholeWordMaskingCollator, group_texts, tokenize_with_word_ids
from mlmadapt.data.rows import pad_rows
from mlmadapt.data.table import table_reader
from mlmadapt.testing import tiny_model
from mlmadapt.training.batches import BatchPlan, training_batches

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

DOCUMENTS = 2000
BATCH = 64


class AsLists(Dataset):
    """A dataset of a class of its own, which is asked for its rows."""


def main() -> None:
    """Measure an epoch, then the parts of ours."""
    arguments = measure.parse_arguments(__doc__, rounds=15)
    material = measure.load_material(arguments, documents=DOCUMENTS)
    report = measure.Report("Rows to batches", material.description, arguments)
    with tempfile.TemporaryDirectory() as folder:
        rows = write_rows(material, folder)
        tokens = len(rows) * len(rows[0]["input_ids"])
        epochs = {
            "ours": epoch_of(rows, material.tokenizer),
            "ours, lists": epoch_of(AsLists(rows.data), material.tokenizer),
            "Trainer": epoch_of_trainer(rows, material.tokenizer, folder),
        }
        contenders = {name: measure.Contender(use_up, make) for name, make in epochs.items()}
        times = measure.take_turns(contenders, rounds=arguments.rounds)
        report.times(f"an epoch of {len(rows):,} rows", times, count=tokens, unit="tokens")
        parts = measure.take_turns(parts_of(rows, material.tokenizer), rounds=arguments.rounds)
        report.times("its parts, of ours", parts, count=tokens, unit="tokens")
    ours = times["ours"]
    millions = (tokens / ours.wall / 1e6, tokens / ours.cpu / 1e6)
    report.claims(
        "rows to batches",
        [
            measure.Claim("ours: million tokens per second", *millions, at_least=10),
            measure.Claim.ratio("lists / ours", times["ours, lists"], ours, at_least=2.5),
            measure.Claim.ratio("Trainer / ours", times["Trainer"], ours),
        ],
    )
    report.save()


def write_rows(material: measure.Material, folder: str) -> Dataset:
    """Make rows of 128 as the README does, and read them from disk as a run would."""
    documents = Dataset.from_dict({"text": material.texts})
    tokens = documents.map(
        tokenize_with_word_ids,
        batched=True,
        fn_kwargs={"tokenizer": material.tokenizer},
        remove_columns="text",
    )
    rows = tokens.with_format("arrow").map(group_texts, batched=True).with_format(None)
    rows.save_to_disk(f"{folder}/rows")
    return Dataset.load_from_disk(f"{folder}/rows")


def use_up(batches: Iterable[Any]) -> None:
    """Take all batches, and keep none."""
    deque(batches, maxlen=0)


def epoch_of(rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> Callable[[], Iterable[Any]]:
    """Return what begins an epoch of `accelerate_train`'s batches."""
    plan = BatchPlan(rows=len(rows), batch_size=BATCH)
    collator = WholeWordMaskingCollator(tokenizer, seed=0)
    return lambda: training_batches(rows, plan, collator, epoch=0)


def epoch_of_trainer(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, folder: str | Path
) -> Callable[[], Iterable[Any]]:
    """Return what begins an epoch of `Trainer`'s batches."""
    trainer = Trainer(
        tiny_model(tokenizer),
        TrainingArguments(
            str(folder), per_device_train_batch_size=BATCH, report_to="none", use_cpu=True
        ),
        train_dataset=rows.remove_columns(["word_ids", "labels"]),
        data_collator=DataCollatorForLanguageModeling(tokenizer),
    )
    return trainer.get_train_dataloader


def parts_of(rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> dict[str, measure.Contender]:
    """Return what is done one after the other, each for a whole epoch."""
    plan = BatchPlan(rows=len(rows), batch_size=BATCH)
    steps = [step.tolist() for step in plan.order(0).split(BATCH)]
    read = table_reader(rows)
    assert read is not None
    collator = WholeWordMaskingCollator(tokenizer, seed=0)

    def cut(steps: list[list[int]]) -> None:
        use_up(map(read, steps))

    def mask(batches: list[Any]) -> None:
        use_up(collator.mask(each, key=0) for each in batches)

    def masked() -> list[Any]:
        read_ones = map(read, steps)
        return [collator.mask(each, key=0) for each in read_ones]

    def pad(batches: list[Any]) -> None:
        use_up(pad_rows(*each, tokenizer) for each in batches)

    return {
        "rows laid end to end": measure.Contender(cut, lambda: steps),
        "masked": measure.Contender(mask, lambda: [read(each) for each in steps]),
        "laid out as a batch": measure.Contender(pad, masked),
    }


if __name__ == "__main__":
    main()
