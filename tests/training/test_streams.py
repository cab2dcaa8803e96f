"""A stream that is split: each process reads its own part, and all end an epoch together."""

from __future__ import annotations

from itertools import count
from typing import TYPE_CHECKING, Any

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset, IterableDataset
from datasets.distributed import split_dataset_by_node
from hypothesis import given
from hypothesis import strategies as st

from mlmadapt import WholeWordMaskingCollator
from mlmadapt.testing import tiny_tokenizer
from mlmadapt.training.batches import BatchPlan, training_batches
from mlmadapt.training.distributed import split_stream
from tests.scripts.processes import outcome, start
from tests.scripts.short_run import stream_shards, yield_rows

if TYPE_CHECKING:
    from pathlib import Path

Steps = list[list[dict[str, Any]]]

COLLATOR = WholeWordMaskingCollator(tiny_tokenizer(), seed=0)


def number_rows(sizes: list[int]) -> list[list[dict[str, list[int]]]]:
    """Make shards of rows that tell themselves apart."""
    numbers = count(30)
    return [
        [{"input_ids": [2, next(numbers), 3], "word_ids": [-1, 0, -1]} for _ in range(size)]
        for size in sizes
    ]


def epoch_of(plan: BatchPlan, part: Any, steps: int, start: int = 0) -> Steps:
    """Take so many steps on one process."""
    batches = training_batches(part, plan, COLLATOR, epoch=0, start=start)
    return [
        [{name: values.tolist() for name, values in batch.items()} for batch in next(batches)[0]]
        for _ in range(steps)
    ]


def trained(batch: dict[str, Any]) -> list[int]:
    """Return the rows of a batch that count."""
    return [row[1] for row in batch["labels"] if row[1] != -100]


@given(
    st.integers(2, 3),
    st.integers(1, 3),
    st.integers(1, 3),
    st.lists(st.integers(1, 9), min_size=3, max_size=3),
    st.integers(0, 9),
)
def test_every_row_of_every_part_counts_once(
    world: int, batch_size: int, accumulation: int, sizes: list[int], start: int
) -> None:
    """In equally many passes everywhere, and the same steps if it is entered at one of them."""
    shards = number_rows(sizes[:world])
    stream = IterableDataset.from_generator(yield_rows, gen_kwargs={"shards": shards})
    per_step = batch_size * accumulation
    longest = max(-(-size // per_step) for size in sizes[:world])
    start = min(start, longest)
    epochs = []
    for rank in range(world):
        plan = BatchPlan(
            rows=0,
            batch_size=batch_size,
            accumulation=accumulation,
            rank=rank,
            world=world,
            is_split=True,
        )
        part = split_dataset_by_node(stream, rank, world)
        ends = [
            ends
            for _, (_, ends) in zip(
                range(longest), training_batches(part, plan, COLLATOR, epoch=0), strict=False
            )
        ]
        assert ends == [per_step * step >= sizes[rank] for step in range(1, longest + 1)]
        epochs.append(epoch_of(plan, part, longest))
        assert epoch_of(plan, part, longest - start, start) == epochs[-1][start:]
    for steps, shard in zip(epochs, shards, strict=True):
        assert {len(step) for step in steps} == {accumulation}
        rows = [row for step in steps for batch in step for row in trained(batch)]
        assert sorted(rows) == [row["input_ids"][1] for row in shard]
        fillers = [batch for step in steps for batch in step if not trained(batch)]
        assert all(len(batch["labels"]) == 1 for batch in fillers)


def test_a_process_reads_its_own_part_only() -> None:
    """Neither the others' rows, nor one more than the step that follows needs."""
    read = []

    def note(shards: list[list[dict[str, Any]]]) -> Any:
        for row in yield_rows(shards):
            read.append(row["input_ids"][1])
            yield row

    shards = number_rows([7, 5])
    stream = IterableDataset.from_generator(note, gen_kwargs={"shards": shards})
    plan = BatchPlan(rows=0, batch_size=2, rank=1, world=2, is_split=True)
    epoch_of(plan, split_dataset_by_node(stream, 1, 2), 1)
    assert read == [row["input_ids"][1] for row in shards[1][:4]]
    read.clear()
    epoch_of(plan, split_dataset_by_node(stream, 1, 2), 6)
    assert read == [row["input_ids"][1] for row in shards[1]]


def test_rows_of_two_parts_are_not_drawn_alike() -> None:
    """Other collators draw by the numbers of a batch's rows, which differ from part to part."""
    shards = number_rows([4, 4])
    stream = IterableDataset.from_generator(yield_rows, gen_kwargs={"shards": shards})
    drawn = []

    def draw(features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        drawn.append(int(torch.randint(2**40, ())))
        ids = torch.tensor([feature["input_ids"] for feature in features])
        return {"input_ids": ids, "labels": ids}

    for rank in range(2):
        plan = BatchPlan(rows=0, batch_size=2, rank=rank, world=2, is_split=True)
        batches = training_batches(split_dataset_by_node(stream, rank, 2), plan, draw, epoch=0)
        for _ in range(2):
            next(batches)
    assert len(set(drawn)) == 4


def test_rows_of_a_step_are_named_by_part() -> None:
    """Since each process counts its own."""
    plan = BatchPlan(rows=0, batch_size=2, accumulation=3, world=4, is_split=True)
    assert plan.rows_of_step(1, 2) == "12 to 17 of each of the 4 parts of the stream"


def test_a_part_without_rows_is_an_error() -> None:
    """At the start of an epoch; later, a part may well be at its end."""
    shards = number_rows([3, 0])
    stream = IterableDataset.from_generator(yield_rows, gen_kwargs={"shards": shards})
    plan = BatchPlan(rows=0, batch_size=2, rank=1, world=2, is_split=True)
    with pytest.raises(ValueError, match="ended before row 0 of epoch 0; it must have rows"):
        epoch_of(plan, split_dataset_by_node(stream, 1, 2), 1)


def test_one_process_reads_what_it_is_given() -> None:
    """Be it a list, a dataset, a stream, or a part of one."""
    rows = number_rows([24])[0]
    stream = stream_shards(rows)
    part = split_dataset_by_node(stream, 0, 2)
    for each in (rows, Dataset.from_list(rows), stream, part):
        assert split_stream(each, Accelerator()) == (each, False)


@pytest.mark.distributed
@pytest.mark.parametrize("world", [2, 3])
def test_an_epoch_has_the_rows_that_one_process_reads(tmp_path: Path, world: int) -> None:
    """Split by us or by the caller, in other steps: as many as the longest part has."""
    settings = {"dropout": False, "save_strategy": "no", "stream": "shards"}
    one = outcome(tmp_path / "one", per_device_train_batch_size=4, max_steps=6, **settings)
    settings |= {"world": world, "per_device_train_batch_size": 2}
    settings["max_steps"] = {2: 8, 3: 6}[world]  # parts of 9 and 15, or of 5, 7 and 12 rows
    ours = outcome(tmp_path / "ours", **settings)
    assert ours["tokens"] == one["tokens"]
    assert outcome(tmp_path / "given", **{**settings, "stream": "parts"}) == ours


@pytest.mark.distributed
def test_another_number_of_parts_is_another_run(tmp_path: Path) -> None:
    """Steps have other rows, and which ones were trained is not known."""
    settings = {"stream": "shards", "max_steps": 4}
    outcome(tmp_path, world=2, per_device_train_batch_size=2, **settings)
    (ended,) = start(
        "train",
        folder=str(tmp_path),
        per_device_train_batch_size=4,
        resume_from_checkpoint=True,
        **settings,
    )
    assert (
        "train_dataset was 'a stream, IterableDataset, in 2 parts', is 'a stream, " in ended.error
    )


@pytest.mark.distributed
@pytest.mark.parametrize("world", [2, 3])
def test_parts_for_others_are_an_error(tmp_path: Path, world: int) -> None:
    """On every process, whichever has the part that would be right."""
    for ended in start("train", folder=str(tmp_path), world=world, stream="one part", max_steps=2):
        assert (
            f"ValueError: train_dataset is a stream of which the {world} processes" in ended.error
        )
        assert "or give each its own by split_dataset_by_node(stream, process_i" in ended.error


@pytest.mark.distributed
def test_a_stream_that_cannot_be_split_is_shared_out(tmp_path: Path) -> None:
    """Three shards on two processes: the steps are those of one process, row for row."""
    settings = {"stream": "plain", "dropout": False, "max_steps": 5, "save_strategy": "no"}
    one = outcome(tmp_path / "one", per_device_train_batch_size=4, **settings)
    two = outcome(tmp_path / "two", per_device_train_batch_size=2, world=2, **settings)
    losses = [[each["loss"] for each in run["history"] if "loss" in each] for run in (one, two)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
