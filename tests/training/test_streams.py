"""Streams: each process reads its own part of one that is split; a resumed one goes on exactly."""

from __future__ import annotations

import json
import logging
from itertools import count
from typing import TYPE_CHECKING, Any

import datasets
import pytest
import torch
from accelerate import Accelerator
from datasets import (
    Dataset,
    Features,
    IterableDataset,
    List,
    Value,
    concatenate_datasets,
    interleave_datasets,
)
from datasets.distributed import split_dataset_by_node
from hypothesis import given
from hypothesis import strategies as st

from mlmadapt import WholeWordMaskingCollator
from mlmadapt.data.stream import StreamPlace
from mlmadapt.testing import tiny_tokenizer
from mlmadapt.training.batches import BatchPlan, training_batches
from mlmadapt.training.distributed import split_stream
from tests.scripts.processes import outcome, start
from tests.scripts.short_run import stream_shards, yield_rows
from tests.training.test_attacks import in_state, sign
from tests.training.test_resume import killed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
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


IS_EXACT = tuple(map(int, datasets.__version__.split(".")[:2])) >= (5, 2)
SIZES = [5, 2, 8, 3, 6, 4]


FEATURES = Features({name: List(Value("int64")) for name in ("input_ids", "word_ids")})


def from_generator() -> IterableDataset:
    """Make a stream of shards of unequal length."""
    return IterableDataset.from_generator(yield_rows, gen_kwargs={"shards": number_rows(SIZES)})


def from_arrow(first: int = 0) -> IterableDataset:
    """Make a stream of tables, whose state tells of batches of rows."""
    rows = Dataset.from_list(number_rows([first, 28])[1], features=FEATURES)
    return rows.to_iterable_dataset(num_shards=6)


def twice(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Make two rows of each, as chunks of a document."""
    return {name: [row for row in rows for _ in range(2)] for name, rows in batch.items()}


def joined(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Make one row of each two, and none of the last."""
    return {
        name: [one + other for one, other in zip(rows[::2], rows[1::2], strict=False)]
        for name, rows in batch.items()
    }


def numbered(row: dict[str, Any], index: int) -> dict[str, Any]:
    """Put its number into a row."""
    return {"input_ids": [*row["input_ids"], 30 + index], "word_ids": [*row["word_ids"], 1]}


def is_kept(row: dict[str, Any]) -> bool:
    """Leave out every third row."""
    return bool(row["input_ids"][1] % 3)


OVER: dict[str, Callable[[IterableDataset], IterableDataset]] = {
    "nothing": lambda stream: stream,
    "map": lambda stream: stream.map(numbered, with_indices=True),
    "batches": lambda stream: stream.map(twice, batched=True, batch_size=4),
    "batches of all": lambda stream: stream.map(twice, batched=True, batch_size=None),
    "batches of batches": lambda stream: stream.map(twice, batched=True, batch_size=3).map(
        joined, batched=True, batch_size=4
    ),
    "filter": lambda stream: stream.filter(is_kept),
    "filter and batches": lambda stream: stream.filter(is_kept).map(
        twice, batched=True, batch_size=4
    ),
    "columns": lambda stream: stream.select_columns(["input_ids", "word_ids"]),
    "take": lambda stream: stream.map(twice, batched=True, batch_size=4).take(20),
    "skip": lambda stream: stream.skip(4).map(twice, batched=True, batch_size=4).skip(3),
    "repeat": lambda stream: stream.repeat(2),
    "torch": lambda stream: stream.with_format("torch"),
    "one after another": lambda stream: concatenate_datasets([stream, from_arrow(40)]),
    "in turn": lambda stream: interleave_datasets(
        [stream, from_arrow(40)], stopping_strategy="all_exhausted"
    ),
    "by chance": lambda stream: interleave_datasets(
        [stream.map(twice, batched=True, batch_size=4), from_arrow(40)],
        probabilities=[0.6, 0.4],
        seed=3,
    ),
}
NOT_EXACT: dict[str, Callable[[IterableDataset], IterableDataset]] = {
    "a buffer": lambda stream: stream.shuffle(seed=1, buffer_size=5),
    "a map over a buffer": lambda stream: stream.shuffle(seed=1, buffer_size=5).map(
        twice, batched=True, batch_size=4
    ),
    "a buffer in a source": lambda stream: concatenate_datasets(
        [from_arrow(40), stream.shuffle(seed=1, buffer_size=5)]
    ),
    "a table": lambda stream: (
        stream.with_format("arrow")
        .map(lambda table: table, batched=True, batch_size=4)
        .with_format(None)
    ),
}


def draw(features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Collate as others do: by random numbers, which depend on the numbers of the rows."""
    ids = [[int(each) for each in feature["input_ids"]] for feature in features]
    widest = max(map(len, ids))
    ids = [each + [0] * (widest - len(each)) for each in ids]
    return {"input_ids": torch.tensor(ids), "labels": torch.randint(2**40, (len(ids), widest))}


def steps_with_places(
    stream: Any, plan: BatchPlan, *, epoch: int, start: int = 0, stored: str | None = None
) -> Iterator[tuple[Any, str]]:
    """Yield each step until the stream's end, and what a checkpoint after it would hold."""
    place = StreamPlace(**json.loads(stored or "{}"))
    batches = training_batches(stream, plan, draw, epoch=epoch, start=start, place=place)
    for step, ends in batches:
        made = [{name: values.tolist() for name, values in batch.items()} for batch in step]
        yield (made, ends), json.dumps(place.stored())
        if ends:
            return


def check_every_resume(
    make: Callable[[], Any], plan: BatchPlan, *, epoch: int, at_state: bool, log: Any
) -> None:
    """Enter an epoch behind each of its steps, and again a step later."""
    whole = list(steps_with_places(make(), plan, epoch=epoch))
    assert len(whole) >= 2
    expected = [step for step, _ in whole]
    for done, (_, stored) in enumerate(whole[:-1], 1):
        log.clear()
        resumed = list(steps_with_places(make(), plan, epoch=epoch, start=done, stored=stored))
        assert [step for step, _ in resumed] == expected[done:]
        assert ("by its state_dict" in log.text) == at_state
        for step, (_, again) in enumerate(resumed[:2], done + 1):
            if step < len(whole):
                twice_resumed = steps_with_places(
                    make(), plan, epoch=epoch, start=step, stored=again
                )
                assert [step for step, _ in twice_resumed] == expected[step:]


PLANS = {
    "whole": BatchPlan(rows=0, batch_size=2, accumulation=2),
    "a part of the shards": BatchPlan(rows=0, batch_size=2, rank=1, world=2, is_split=True),
    "each fourth row": BatchPlan(rows=0, batch_size=1, rank=1, world=4, is_split=True),
}


def make_kind(source: Callable[[], Any], over: Callable[[Any], Any], plan: BatchPlan) -> Any:
    """Make a stream, or a part of it."""
    stream = over(source())
    return split_dataset_by_node(stream, plan.rank, plan.world) if plan.is_split else stream


@pytest.mark.parametrize("over", [*OVER, *NOT_EXACT])
def test_a_stream_goes_on_with_the_rows_that_follow(over: str, caplog: Any) -> None:
    """Behind each step of a later epoch: the same rows, with the same numbers, and the end."""
    caplog.set_level(logging.INFO, "mlmadapt")
    plan = PLANS["a part of the shards"]
    check_every_resume(
        lambda: make_kind(from_generator, {**OVER, **NOT_EXACT}[over], plan),
        plan,
        epoch=1,
        at_state=IS_EXACT and over in OVER,
        log=caplog,
    )


@pytest.mark.slow
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("source", [from_generator, from_arrow])
@pytest.mark.parametrize("over", [*OVER, *NOT_EXACT])
def test_every_stream_goes_on_with_the_rows_that_follow(
    over: str, source: Callable[[], Any], plan: str, caplog: Any
) -> None:
    """Whole or in parts, of rows or of tables, in the first epoch too."""
    caplog.set_level(logging.INFO, "mlmadapt")
    for epoch in (0, 1):
        check_every_resume(
            lambda: make_kind(source, {**OVER, **NOT_EXACT}[over], PLANS[plan]),
            PLANS[plan],
            epoch=epoch,
            at_state=IS_EXACT and over in OVER,
            log=caplog,
        )


def enter(stream: Any, plan: BatchPlan, start: int, stored: str | None) -> list[Any]:
    """Return the steps of the first epoch from one on."""
    steps = steps_with_places(stream, plan, epoch=0, start=start, stored=stored)
    return [step for step, _ in steps]


@pytest.mark.skipif(not IS_EXACT, reason="all rows are passed over")
@pytest.mark.parametrize("world", [1, 2])
def test_rows_of_finished_shards_are_not_read_again(world: int) -> None:
    """Of the shard that is under way they are; and one for fillers, where there may be any."""
    read: list[int] = []
    mapped: list[int] = []

    def note(shards: list[list[dict[str, Any]]]) -> Any:
        for row in yield_rows(shards):
            read.append(row["input_ids"][1])
            yield row

    def map_row(row: dict[str, Any]) -> dict[str, Any]:
        mapped.append(row["input_ids"][1])
        return row

    shards = number_rows([8, 8, 8, 8])
    stream = IterableDataset.from_generator(note, gen_kwargs={"shards": shards}).map(map_row)
    plan = BatchPlan(rows=0, batch_size=2, world=world, is_split=world == 2)
    if world == 2:  # the first and the third shard, in steps of 2 of its rows; else in steps of 2
        stream = split_dataset_by_node(stream, 0, 2)
    whole = list(steps_with_places(stream, plan, epoch=0))
    own = list(mapped)
    assert read == own
    done = 5 if world == 2 else 9
    read.clear()
    mapped.clear()
    assert enter(stream, plan, done, whole[done - 1][1]) == [step for step, _ in whole[done:]]
    filler = own[:1] if world == 2 else []
    shard = 8 * (2 * done // 8)
    assert read == filler + own[shard:]
    assert mapped == filler + own[2 * done :]


class Keeping:
    """A stream of somebody else's, with a state of its own that nobody knows to be exact."""

    def __iter__(self) -> Any:
        yield from number_rows([12])[0]

    def state_dict(self) -> Any:
        """Fail."""
        raise AssertionError("asked for")

    load_state_dict = state_dict


def test_streams_of_other_kinds_are_passed_over(caplog: Any) -> None:
    """Also those that have a `state_dict`, and a subclass of the known one."""

    class Own(IterableDataset):
        def __iter__(self) -> Any:
            yield from list(super().__iter__())

    caplog.set_level(logging.INFO, "mlmadapt")
    plan = BatchPlan(rows=0, batch_size=3)
    for stream in (Keeping(), number_rows([12])[0].__iter__, Own(from_generator()._ex_iterable)):
        make = stream if callable(stream) else lambda stream=stream: stream
        check_every_resume(make, plan, epoch=0, at_state=False, log=caplog)
        assert {stored for _, stored in steps_with_places(make(), plan, epoch=0)} == {"{}"}


@pytest.mark.parametrize("forged", [7, [], {}, {"epoch": 0}, {"epoch": 0, "examples_iterable": 3}])
@pytest.mark.parametrize("digest", ["", None])
def test_a_state_that_does_not_fit_is_passed_over(
    forged: Any, digest: str | None, caplog: Any
) -> None:
    """Whatever it is, the rows are those that follow."""
    caplog.set_level(logging.INFO, "mlmadapt")
    plan = BatchPlan(rows=0, batch_size=3)
    whole = list(steps_with_places(from_generator(), plan, epoch=0))
    stored = json.loads(whole[2][1]) or {"digest": ""}
    stored = json.dumps({"state": forged, "digest": stored["digest"] if digest is None else digest})
    stream = from_generator()
    assert enter(stream, plan, 3, stored) == [step for step, _ in whole[3:]]
    assert "read from its start, and 9 rows are passed over" in caplog.text
    assert list(stream) == list(from_generator())


def test_a_state_of_another_stream_is_passed_over(caplog: Any) -> None:
    """Of other shards, maps or order."""
    caplog.set_level(logging.INFO, "mlmadapt")
    plan = BatchPlan(rows=0, batch_size=3)
    others = [
        from_generator().map(twice, batched=True, batch_size=2),
        IterableDataset.from_generator(yield_rows, gen_kwargs={"shards": number_rows([2, 26])}),
        from_arrow(2),
        from_generator().shuffle(seed=1, buffer_size=4),
    ]
    whole = list(steps_with_places(from_generator(), plan, epoch=0))
    for other in others:
        stored = list(steps_with_places(other, plan, epoch=0))[2][1]
        assert enter(from_generator(), plan, 3, stored) == [step for step, _ in whole[3:]]


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("world", "kind"),
    [(1, "plain"), (1, "shuffled"), (2, "plain"), (2, "shards"), (2, "parts"), (2, "shuffled")],
)
@pytest.mark.parametrize("is_new", [True, False])
def test_a_killed_run_goes_on_at_its_state(
    tmp_path: Path,
    world: int,
    kind: str,
    is_new: bool,  # noqa: FBT001
) -> None:
    """On each process, to the bit; a checkpoint of before is passed over, and buffers are."""
    settings = {"stream": kind, "max_steps": 7, "world": world, "per_device_train_batch_size": 2}
    whole = outcome(tmp_path / "whole", **settings)
    folder = tmp_path / "killed"
    assert -9 in [each.code for each in start("train", folder=str(folder), **settings, **killed(5))]
    if not is_new:
        in_state(lambda state: state.pop("places"))(folder / "checkpoint-4")
        sign(folder / "checkpoint-4")
    ended = start("train", folder=str(folder), resume_from_checkpoint=True, **settings)
    assert ended[0].result == whole
    at_state = IS_EXACT and is_new and kind != "shuffled"
    how = "goes on behind row {} by its state_dict" if at_state else "{} rows are passed over"
    rows = 8 if world == 1 or kind in ("shards", "parts") else 16
    assert [how.format(rows) in each.log for each in ended] == [True] * world


def test_a_stream_keeps_the_state_that_its_caller_gave_it(caplog: Any) -> None:
    """None, mostly: after a resumed run, it is read from its start; and that of the caller's."""
    caplog.set_level(logging.INFO, "mlmadapt")
    plan = BatchPlan(rows=0, batch_size=3)
    stream = from_generator()
    _, (_, stored), *_ = steps_with_places(stream, plan, epoch=0)
    resumed = enter(stream, plan, 2, stored)
    assert ("by its state_dict" in caplog.text) == IS_EXACT
    assert list(stream) == list(from_generator())
    rows = iter(stream)
    for _ in range(6):
        next(rows)
    stream.load_state_dict(stream.state_dict())
    behind = list(steps_with_places(stream, plan, epoch=0))
    assert [step for step, _ in behind] != resumed  # the rows, with other numbers
    assert enter(stream, plan, 2, behind[1][1]) == [step for step, _ in behind[2:]]
    assert behind[1][1] == "{}"
    assert list(stream) == list(from_generator())[6:]
