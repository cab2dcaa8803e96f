"""Every row once an epoch, in steps that are the same however many processes share them."""

from __future__ import annotations

import copy
import logging
import math
import random
from dataclasses import replace
from itertools import chain, count
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
import pytest
import torch
from datasets.distributed import split_dataset_by_node
from hypothesis import given
from hypothesis import strategies as st
from transformers import DataCollatorForLanguageModeling

from mlmadapt import WholeWordMaskingCollator
from mlmadapt.testing import tiny_rows, tiny_tokenizer
from mlmadapt.training.batches import (
    BatchPlan,
    OpenStream,
    first_batch,
    open_rows,
    training_batches,
)
from tests.masking.reference_masking import reference_key, reference_mask
from tests.scripts.short_run import global_states, yield_rows

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@st.composite
def plans(draw: st.DrawFn) -> BatchPlan:
    """Draw plans of all sizes, with rows in random order or grouped by length."""
    rows = draw(st.integers(1, 40))
    lengths = st.lists(st.integers(1, 9), min_size=rows, max_size=rows).map(torch.tensor)
    return BatchPlan(
        rows=rows,
        batch_size=draw(st.integers(1, 4)),
        accumulation=draw(st.integers(1, 3)),
        world=draw(st.integers(1, 3)),
        seed=draw(st.integers(0, 3)),
        lengths=draw(st.none() | lengths),
    )


PLANS = plans()
TOKENIZER = tiny_tokenizer()


def ranks(plan: BatchPlan, epoch: int = 0) -> list[list[list[list[tuple[int, bool]]]]]:
    """The steps of an epoch on every rank."""
    return [list(replace(plan, rank=rank).steps(epoch)) for rank in range(plan.world)]


@given(PLANS, st.integers(0, 2))
def test_every_row_counts_once_an_epoch(plan: BatchPlan, epoch: int) -> None:
    """Over all ranks, steps and passes, and in no batch are there more rows than fit."""
    batches = [batch for steps in ranks(plan, epoch) for step in steps for batch in step]
    assert sorted(row for batch in batches for row, counts in batch if counts) == [
        *range(plan.rows)
    ]
    assert max(map(len, batches)) <= plan.batch_size
    assert sorted(plan.order(epoch).tolist()) == list(range(plan.rows))


@given(PLANS)
def test_ranks_make_equally_many_passes(plan: BatchPlan) -> None:
    """As few as will hold the rows, with a filler only where there are fewer rows than passes."""
    for step in zip(*ranks(plan), strict=True):
        rows = sum(counts for passes in step for batch in passes for _, counts in batch)
        fewest = math.ceil(rows / (plan.batch_size * plan.world))
        assert {len(passes) for passes in step} == {fewest}
        fillers = [batch for passes in step for batch in passes if not batch[0][1]]
        assert all(len(batch) == 1 for batch in fillers)
        assert len(fillers) == max(0, plan.world * fewest - rows)
        assert all(counts for passes in step for batch in passes for _, counts in batch[1:])


@given(PLANS)
def test_steps_depend_on_their_size_alone(plan: BatchPlan) -> None:
    """One process with one large batch takes the same rows at each step."""

    def step_sets(plan: BatchPlan) -> list[set[int]]:
        return [
            {row for passes in step for batch in passes for row, counts in batch if counts}
            for step in zip(*ranks(plan), strict=True)
        ]

    whole = replace(plan, batch_size=plan.rows_per_step, accumulation=1, world=1)
    assert step_sets(plan) == step_sets(whole)
    assert len(step_sets(plan)) == plan.steps_per_epoch == whole.steps_per_epoch


@given(PLANS, st.integers(0, 40))
def test_starting_late_skips_steps(plan: BatchPlan, start: int) -> None:
    """The steps from `start` on are those of the whole epoch."""
    assert list(plan.steps(1, start=start)) == list(plan.steps(1))[start:]


def test_order_differs_by_epoch_and_seed() -> None:
    """A new order each epoch and for each seed, and the same for the same."""
    plan = BatchPlan(rows=30, batch_size=4)
    plans = [(plan, 0), (plan, 1), (replace(plan, seed=1), 0), (plan, 1)]
    *orders, again = [plan.order(epoch).tolist() for plan, epoch in plans]
    assert len({tuple(order) for order in orders}) == 3
    assert again == orders[1]
    assert orders[0] != list(range(30))


def share_of_text(plan: BatchPlan) -> float:
    """How much of an epoch's batches is text, where each is padded to its longest row."""
    assert plan.lengths is not None
    batches = [batch for steps in ranks(plan) for step in steps for batch in step]
    held = [plan.lengths[[row for row, counts in batch if counts]] for batch in batches]
    padded = sum(len(lengths) * int(lengths.max()) for lengths in held if len(lengths))
    return int(plan.lengths.sum()) / padded


@pytest.mark.parametrize(("batch_size", "accumulation", "world"), [(32, 1, 1), (4, 4, 2)])
def test_grouped_rows_need_little_padding(batch_size: int, accumulation: int, world: int) -> None:
    """However a step is cut up: of mixed lengths, 52 % of random batches of 32 is text."""
    lengths = torch.from_numpy(np.random.default_rng(0).integers(1, 100, 10_000))
    plan = BatchPlan(
        rows=10_000,
        batch_size=batch_size,
        accumulation=accumulation,
        world=world,
        lengths=lengths,
    )
    assert share_of_text(plan) > 0.97
    order = torch.randperm(10_000)
    assert share_of_text(replace(plan, lengths=torch.ones(10_000))) == 1
    random_share = int(lengths.sum()) / sum(
        len(part) * int(lengths[part].max()) for part in order.split(batch_size)
    )
    assert random_share < 0.65


def test_batches_of_a_grouped_step_are_alike_everywhere() -> None:
    """The longest rows of a step are in the first pass of every process."""
    plan = BatchPlan(rows=8, batch_size=2, accumulation=2, world=2, lengths=torch.arange(8))
    dealt = [replace(plan, rank=rank).deal("abcdefgh") for rank in range(2)]
    letters = [["".join(row for row, _ in batch) for batch in passes] for passes in dealt]
    assert letters == [["ac", "eg"], ["bd", "fh"]]


def test_steps_of_grouped_rows_come_in_random_order() -> None:
    """The longest row is in the first step, and the others rise and fall, each epoch otherwise."""
    lengths = torch.arange(400) % 97
    plan = BatchPlan(rows=400, batch_size=8, lengths=lengths)
    orders = [plan.order(epoch) for epoch in range(3)]
    heads = [lengths[order[::8]] for order in orders]
    for order, longest in zip(orders, heads, strict=True):
        assert lengths[order[:8]].max() == 96
        rises = int((longest[2:] > longest[1:-1]).sum())
        assert 10 < rises < 38
    assert len({tuple(order.tolist()) for order in orders}) == 3
    steps = [{frozenset(step.tolist()) for step in order.split(8)} for order in orders]
    assert len(steps[0] & steps[1]) < 10


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    """Nine rows of one length and two shorter ones."""
    long = [row for row in tiny_rows(TOKENIZER, 40) if len(row["input_ids"]) >= 24][:9]
    cut = [{name: values[:24] for name, values in row.items()} for row in long]
    return cut + [{name: row[name][:7] for name in row} for row in cut[:2]]


class InPlaceCollator:
    """Draws from all global generators and changes what it is given, as the course's does."""

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        """Mask one token a row, in place."""
        for feature in features:
            feature.pop("word_ids")
            ids = feature["input_ids"]
            draws = [random.randrange(7), np.random.randint(7), int(torch.randint(7, ()))]  # noqa: NPY002, S311
            place = sum(draws) % 7
            feature["labels"] = [-100] * len(ids)
            feature["labels"][place] = int(ids[place])
            ids[place] = 4
            for name in ("input_ids", "labels"):
                feature[name] = [int(value) for value in feature[name]] + [0] * (24 - len(ids))
        return {
            name: torch.tensor([feature[name] for feature in features])
            for name in ("input_ids", "labels")
        }


COLLATORS: dict[str, Callable[[], Any]] = {
    "ours": lambda: WholeWordMaskingCollator(TOKENIZER),
    "transformers": lambda: DataCollatorForLanguageModeling(TOKENIZER, seed=3),
    "in_place": InPlaceCollator,
}


def flatten(batches: Any) -> list[dict[str, Any]]:
    """All batches of all steps, comparable."""
    return [
        {name: values.tolist() for name, values in batch.items()}
        for step, _ in batches
        for batch in step
    ]


@pytest.mark.parametrize("name", COLLATORS)
def test_batches_are_pure(name: str, rows: list[dict[str, Any]]) -> None:
    """What is drawn depends on seed, epoch and rows; generators, rows and collator are left."""
    plan = BatchPlan(rows=len(rows), batch_size=3, accumulation=2, seed=5)
    collator = COLLATORS[name]()
    tensors = [{name: torch.tensor(values) for name, values in row.items()} for row in rows]
    kept, kept_tensors, state = copy.deepcopy(rows), copy.deepcopy(tensors), global_states()
    first = flatten(training_batches(rows, plan, collator, epoch=1))
    assert global_states() == state
    collator(copy.deepcopy(rows[:2]))
    torch.rand(3)
    state = global_states()
    assert flatten(training_batches(rows, plan, collator, epoch=1)) == first
    assert flatten(training_batches(rows, plan, collator, epoch=1, start=1)) == first[2:]
    assert flatten(training_batches(tensors, plan, collator, epoch=1)) == first
    dataset = datasets.Dataset.from_list(rows)
    for workers in (0, 1):
        batches = training_batches(dataset, plan, collator, epoch=1, num_workers=workers)
        assert flatten(batches) == first
    assert global_states() == state
    assert rows == kept
    for row, kept_row in zip(tensors, kept_tensors, strict=True):
        assert all(torch.equal(row[name], kept_row[name]) for name in kept_row)
        assert row.keys() == kept_row.keys()
    patterns = [[label == -100 for row in batch["labels"] for label in row[:7]] for batch in first]
    assert not patterns[0] == patterns[1] == patterns[2]
    assert flatten(training_batches(rows, plan, collator, epoch=2)) != first
    assert flatten(training_batches(rows, replace(plan, seed=6), collator, epoch=1)) != first


@pytest.mark.parametrize("form", ["list", "dataset", "stream", "key_column"])
@pytest.mark.parametrize("packed", [False, True])
def test_masks_of_ours_are_those_of_places(*, form: str, packed: bool) -> None:
    """Equal rows and documents have masks of their own, which a slow reference makes again.

    On any number of processes; the collator's own seed replaces the run's.
    """
    row: dict[str, Any] = {"input_ids": [2, 7, 8, 9, 10, 3], "word_ids": [-1, 0, 1, 2, 3, -1]}
    if packed:
        row = {name: values * 2 for name, values in row.items()}
        row["document_ids"] = [0] * 6 + [1] * 6
    rows, key = [row] * 7, reference_key(4, "mask", 1)
    expected = []
    for place in range(7):
        parts = [
            reference_mask(
                {"input_ids": row["input_ids"][:6], "word_ids": row["word_ids"][:6]},
                TOKENIZER,
                key=key,
                names=[place, document] if packed else [place],
                wwm_probability=0.5,
            )[1]
            for document in range(1 + packed)
        ]
        expected.append(list(chain.from_iterable(parts)))
    assert len(set(map(tuple, expected))) > 3
    collator = WholeWordMaskingCollator(TOKENIZER, wwm_probability=0.5, seed=4)
    if form == "key_column":
        numbered = [{**row, "place": place} for place, row in enumerate(rows)]
        by_column = replace(collator, key_column="place")
        by_column.set_epoch(1)
        assert by_column(numbered)["labels"].tolist() == expected
        expected, rows, collator = expected[::-1], numbered[::-1], by_column
    source: Any = rows
    if form in ("dataset", "stream"):
        source = datasets.Dataset.from_list(rows)
    cut = {"batch_size": 2, "accumulation": 2, "seed": 5}
    for settings in ({"batch_size": 7}, cut, {**cut, "world": 3}):
        plan = BatchPlan(rows=len(rows), **settings)
        order = plan.order(1).tolist()
        if form == "stream":
            plan, order = replace(plan, rows=0), [*range(7)]
            source = OpenStream(datasets.Dataset.from_list(rows).to_iterable_dataset())
        found = [
            labels
            for rank in range(plan.world)
            for batch in flatten(
                training_batches(source, replace(plan, rank=rank), collator, epoch=1)
            )
            for labels in batch["labels"]
            if set(labels) != {-100}  # of a filler
        ]
        assert sorted(found) == sorted(expected[place] for place in order)
        if plan.accumulation == 1:
            assert found == [expected[place] for place in order]


@pytest.mark.parametrize("name", COLLATORS)
def test_fillers_have_no_targets(name: str, rows: list[dict[str, Any]]) -> None:
    """The process that is left without a row makes its pass with labels that do not count."""
    plan = BatchPlan(rows=5, batch_size=1, world=4, rank=3)
    _, ((filler,), _) = training_batches(rows[:5], plan, COLLATORS[name](), epoch=0)
    assert (filler["labels"] == -100).all()
    assert filler["input_ids"].shape == filler["labels"].shape
    _, ((other,), _) = training_batches(rows[:5], replace(plan, rank=0), COLLATORS[name](), epoch=0)
    assert (other["labels"] != -100).any()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("is_stream", [False, True])
def test_each_step_has_the_rate_of_its_share_of_the_run(
    rows: list[dict[str, Any]], workers: int, *, is_stream: bool
) -> None:
    """However far ahead it is collated, by whom, in how many passes, and after a resume."""
    if is_stream and workers:
        pytest.skip("streams are read by the training process")
    following = WholeWordMaskingCollator(TOKENIZER, wwm_probability=lambda done: 0.9 - 0.8 * done)
    dataset: Any = datasets.Dataset.from_list(rows)
    dataset = dataset.to_iterable_dataset() if is_stream else dataset
    number = 0 if is_stream else len(rows)

    def batches(collator: Any, start: int = 0, **plan: int) -> list[Any]:
        found = training_batches(
            open_rows(dataset),
            BatchPlan(rows=number, **plan),
            collator,
            epoch=1,
            start=start,
            done=4 + start,
            total_steps=10,
            num_workers=workers,
        )
        return [flatten([step]) for step in found]

    whole = batches(following, batch_size=2)
    assert len(whole) == 6
    for step, made in enumerate(whole):
        fixed = WholeWordMaskingCollator(
            TOKENIZER, wwm_probability=0.9 - 0.8 * min(1.0, (4 + step) / 10)
        )
        assert made == batches(fixed, batch_size=2)[step]
    assert batches(following, start=2, batch_size=2) == whole[2:]

    def targets(steps: list[list[dict[str, Any]]]) -> list[list[Any]]:
        rows = [[row for batch in step for row in batch["labels"]] for step in steps]
        return [sorted(row[:7] for row in step if set(row) != {-100}) for step in rows]

    cut = batches(following, batch_size=1, accumulation=2)
    shares = [batches(following, batch_size=1, world=2, rank=rank) for rank in (0, 1)]
    together = [first + second for first, second in zip(*shares, strict=True)]
    assert targets(cut) == targets(together) == targets(whole)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("world", [1, 3])
def test_a_dataset_gives_the_batches_of_its_rows(
    rows: list[dict[str, Any]], tmp_path: Path, workers: int, world: int
) -> None:
    """To the bit, whatever its format is, of whichever parts it was put together, fillers too."""
    collator = WholeWordMaskingCollator(TOKENIZER, random_replace_prob=0.2, mask_replace_prob=0.5)
    plan = BatchPlan(rows=10, batch_size=2, seed=3, world=world, rank=world - 1)
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path)
    dataset = datasets.Dataset.load_from_disk(tmp_path)
    dataset = datasets.concatenate_datasets([dataset, dataset.select([0, 3])]).shuffle(seed=1)
    dataset = dataset.select(range(10))
    expected = flatten(training_batches(list(dataset), plan, collator, epoch=1))
    words = [[None if word < 0 else word for word in row["word_ids"]] for row in dataset]
    without = dataset.remove_columns("word_ids").add_column("word_ids", words)
    labelled = dataset.add_column("labels", dataset["input_ids"])
    formatted = [dataset.with_format(kind) for kind in (None, "torch", "numpy", "arrow")]
    for form in [*formatted, without, labelled, dataset.with_transform(dict)]:
        batches = training_batches(form, plan, collator, epoch=1, num_workers=workers)
        assert flatten(batches) == expected


class Noting(WholeWordMaskingCollator):
    """Notes what it is called with."""

    def collate(self, features: Any, **settings: Any) -> Any:
        """Collate rows."""
        self.seen = features
        return super().collate(features, **settings)


class NoWords(WholeWordMaskingCollator):
    """Has no targets, by a method of its own, which knows rows as they come."""

    def mask(self, columns: Any, *, key: Any, progress: float = 1.0) -> Any:  # type: ignore[override]
        """Mask rows."""
        masked, lengths = super().mask(columns, key=key, progress=progress)
        return {**masked, "labels": masked["labels"] * 0 - 100}, lengths


def test_a_mask_of_a_subclass_is_its_own(rows: list[dict[str, Any]]) -> None:
    """Whether rows come from a list or from a table."""
    plan = BatchPlan(rows=len(rows), batch_size=len(rows))
    for dataset in (rows, datasets.Dataset.from_list(rows)):
        ((batch,), _) = next(training_batches(dataset, plan, NoWords(TOKENIZER), epoch=0))
        assert (batch["labels"] == -100).all()


def test_other_collators_get_rows(rows: list[dict[str, Any]]) -> None:
    """As the dataset makes them: those of other libraries, and those made from ours."""
    plan = BatchPlan(rows=len(rows), batch_size=len(rows))
    dataset = datasets.Dataset.from_list(rows)
    noting = Noting(TOKENIZER)
    next(training_batches(dataset, plan, noting, epoch=0))
    assert sorted(map(repr, noting.seen)) == sorted(map(repr, dataset))
    seen = []

    def collate(features: list[dict[str, Any]]) -> dict[str, Any]:
        seen.extend(copy.deepcopy(features))
        return WholeWordMaskingCollator(TOKENIZER)(features)

    next(training_batches(dataset, plan, collate, epoch=0))
    assert seen == noting.seen


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("a film", "column 'extra' is not a column of tokens: row 0 is 'a film', of type str"),
        ([1], r"row 0 has \d+ 'input_ids' but 1 'extra'; all columns must hold one value per"),
        ([0.5] * 24, "column 'extra' holds float64"),
    ],
)
def test_a_dataset_that_does_not_fit_is_told_as_its_rows_are(
    rows: list[dict[str, Any]], extra: Any, message: str
) -> None:
    """The column, what it holds, and in which row of the batch."""
    plan = BatchPlan(rows=9, batch_size=4)
    wrong = [{**row, "extra": extra} for row in rows[:9]]
    errors = []
    for form in (wrong, datasets.Dataset.from_list(wrong)):
        with pytest.raises(ValueError, match=message) as error:
            next(training_batches(form, plan, WholeWordMaskingCollator(TOKENIZER), epoch=0))
        errors.append(str(error.value))
    assert errors[0] == errors[1]


def test_a_collator_without_labels_is_told(rows: list[dict[str, Any]]) -> None:
    """Nothing could be learned from its batches."""
    plan = BatchPlan(rows=len(rows), batch_size=4)
    with pytest.raises(ValueError, match=r"returned \['input_ids'\]; it must return 'labels'"):
        next(training_batches(rows, plan, lambda batch: {"input_ids": batch}, epoch=0))


# Streams


Steps = list[list[dict[str, Any]]]
COLLATOR = WholeWordMaskingCollator(TOKENIZER, seed=0)


def number_rows(sizes: list[int]) -> list[list[dict[str, list[int]]]]:
    """Make shards of rows that tell themselves apart."""
    numbers = count(30)
    return [
        [{"input_ids": [2, next(numbers), 3], "word_ids": [-1, 0, -1]} for _ in range(size)]
        for size in sizes
    ]


def stream_of(shards: list[list[dict[str, Any]]], read: Any = yield_rows) -> Any:
    """Make a stream of shards."""
    return datasets.IterableDataset.from_generator(read, gen_kwargs={"shards": shards})


def take(plan: BatchPlan, stream: Any, steps: int, start: int = 0) -> Steps:
    """Take so many steps on one process."""
    batches = training_batches(open_rows(stream), plan, COLLATOR, epoch=0, start=start)
    return [flatten([next(batches)]) for _ in range(steps)]


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
    per_step = batch_size * accumulation
    longest = max(-(-size // per_step) for size in sizes[:world])
    start = min(start, longest)
    plan = BatchPlan(
        rows=0, batch_size=batch_size, accumulation=accumulation, world=world, is_split=True
    )
    for rank, shard in enumerate(shards):
        part, here = split_dataset_by_node(stream_of(shards), rank, world), replace(plan, rank=rank)
        batches = training_batches(open_rows(part), here, COLLATOR, epoch=0)
        ends = [next(batches)[1] for _ in range(longest)]
        assert ends == [per_step * step >= sizes[rank] for step in range(1, longest + 1)]
        steps = take(here, part, longest)
        assert take(here, part, longest - start, start) == steps[start:]
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
    plan = BatchPlan(rows=0, batch_size=2, rank=1, world=2, is_split=True)
    part = split_dataset_by_node(stream_of(shards, note), 1, 2)
    take(plan, part, 1)
    assert read == [row["input_ids"][1] for row in shards[1][:4]]
    read.clear()
    take(plan, part, 6)
    assert read == [row["input_ids"][1] for row in shards[1]]


def test_rows_of_two_parts_are_not_drawn_alike() -> None:
    """Other collators draw by the numbers of a batch's rows, which differ from part to part."""
    drawn = []

    def draw(features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        drawn.append(int(torch.randint(2**40, ())))
        ids = torch.tensor([feature["input_ids"] for feature in features])
        return {"input_ids": ids, "labels": ids}

    for rank in range(2):
        plan = BatchPlan(rows=0, batch_size=2, rank=rank, world=2, is_split=True)
        part = split_dataset_by_node(stream_of(number_rows([4, 4])), rank, 2)
        batches = training_batches(open_rows(part), plan, draw, epoch=0)
        for _ in range(2):
            next(batches)
    assert len(set(drawn)) == 4


def test_rows_of_a_step_are_named_by_part() -> None:
    """Since each process counts its own."""
    plan = BatchPlan(rows=0, batch_size=2, accumulation=3, world=4, is_split=True)
    assert plan.rows_of_step(1, 2) == "12 to 17 of each of the 4 parts of the stream"


def test_a_part_without_rows_is_an_error() -> None:
    """At the start of an epoch; later, a part may well be at its end."""
    plan = BatchPlan(rows=0, batch_size=2, rank=1, world=2, is_split=True)
    with pytest.raises(ValueError, match="ended before row 0 of its epoch; it must have rows"):
        take(plan, split_dataset_by_node(stream_of(number_rows([3, 0])), 1, 2), 1)


OVER: dict[str, Callable[[Any], Any]] = {
    "shards": lambda stream: stream,
    "a buffer": lambda stream: stream.shuffle(seed=1, buffer_size=5),
    "batches": lambda stream: stream.map(
        lambda columns: {name: rows * 2 for name, rows in columns.items()},
        batched=True,
        batch_size=4,
    ),
    "a part": lambda stream: split_dataset_by_node(stream, 1, 2),
    "an iterable": lambda stream: type("Rows", (), {"__iter__": lambda _: iter(stream)})(),
}


@pytest.mark.parametrize("over", OVER)
def test_a_stream_goes_on_with_the_rows_that_follow(
    over: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Behind each step of a later epoch: the same rows, with the same numbers, and the end."""
    caplog.set_level(logging.INFO, "mlmadapt")

    def steps(start: int = 0) -> list[Any]:
        stream = open_rows(OVER[over](stream_of(number_rows([5, 2, 8, 3, 6, 4]))))
        batches = training_batches(stream, plan, COLLATORS["transformers"](), epoch=1, start=start)
        made = []
        for batch, ends in batches:
            made.append((flatten([(batch, ends)]), ends))
            if ends:
                return made
        raise AssertionError("the stream has no end")

    is_part = over == "a part"
    plan = BatchPlan(rows=0, batch_size=3, rank=int(is_part), world=1 + is_part, is_split=is_part)
    whole = steps()
    assert "passed over" not in caplog.text
    for start in (1, 2, len(whole) - 1):
        assert steps(start) == whole[start:]
        assert f"read from its start, and {3 * start} rows are passed over" in caplog.text


@pytest.mark.parametrize("collate", [COLLATOR, DataCollatorForLanguageModeling(TOKENIZER), None])
@pytest.mark.parametrize(("rank", "long"), [(0, 12), (1, 13)])
def test_a_row_of_a_stream_that_is_too_long_is_named(collate: Any, rank: int, long: int) -> None:
    """By its number in the stream, on the process that has it, when its step comes; not before."""

    def make(size: int) -> dict[str, list[int]]:
        if collate is None:  # frozen
            return {"masked_input_ids": [7] * size, "masked_labels": [8] + [-100] * (size - 1)}
        return {"input_ids": [7] * size, "word_ids": [*range(size)]}

    rows = [make(9 if place == long else 5) for place in range(20)]
    collate = collate or replace(COLLATOR, pad_to_multiple_of=9)  # padding is not too long
    plan = BatchPlan(rows=0, batch_size=2, world=2, rank=rank, limit=8)
    batches = training_batches(open_rows(iter(rows)), plan, collate, epoch=0)
    assert [len(next(batches)[0]) for _ in range(3)] == [1, 1, 1]
    message = (
        f"^row {long} of train_dataset, a stream, has 9 tokens, the model has positions for 8;"
    )
    with pytest.raises(ValueError, match=message):
        next(batches)
    for free in (replace(plan, limit=9), replace(plan, limit=None)):
        assert len([*training_batches(open_rows(iter(rows)), free, collate, epoch=0)]) == 5


@pytest.mark.parametrize("make", [list, iter])
def test_the_first_batch_has_a_target(make: Any) -> None:
    """The first of the first step, if it has one; else whichever comes first that has."""
    rows = [{"input_ids": [2, 30 + place, 3], "word_ids": [-1, 0, -1]} for place in range(9)]
    plan = BatchPlan(rows=9 if make is list else 0, batch_size=2, accumulation=2)
    (expected, *_), _ = next(training_batches(open_rows(make(rows)), plan, COLLATOR, epoch=0))
    first = first_batch(open_rows(make(rows)), plan, COLLATOR)
    assert flatten([([first], True)]) == flatten([([expected], True)])
    *empty, last = plan.order(0).tolist() if make is list else range(9)
    for place in empty:
        rows[place]["word_ids"] = [-1, -1, -1]
    first = first_batch(open_rows(make(rows)), plan, COLLATOR)
    assert first["labels"].tolist() == [[-100, 30 + last, -100]]
