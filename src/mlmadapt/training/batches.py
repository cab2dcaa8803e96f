"""Which rows are trained when: a plan that can be entered at any step without reading a row.

The order of an epoch is a function of (seed, epoch). An optimizer step takes the next rows of it,
as many as all processes hold in all their forward passes, and shares them out; the same rows make
the same step on 1 process or on 8. Every row comes exactly once per epoch: the last step is
shorter, and a process left without a row for a forward pass that others make gets a filler whose
labels are all -100. Rows of mixed lengths can be grouped, so that those of a step are alike: then
the order is a function of the lengths and of the rows per step too.

A stream keeps its own order, in which datasets 5.2 shuffles shards by the epoch. Each process reads
all of it and takes its share of every step; or, where the stream is split, its own part only, with
fillers until all parts are at their end. To resume, the rows of finished steps are read and passed
over, which is exact for shuffle buffers too, and takes as long as reading them.
"""

import logging
import math
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import chain, count, islice, pairwise, tee
from typing import Any, TypeAlias, TypeVar

import torch
from accelerate.utils import gather_object
from torch.utils.data import DataLoader

from mlmadapt._types import Batch, DataCollator, Rows
from mlmadapt.data.rows import JoinedRows
from mlmadapt.data.table import as_rows, dataset_lengths, is_stream, measure_rows, table_reader
from mlmadapt.masking.collator import WholeWordMaskingCollator
from mlmadapt.masking.frozen_masks import collate_seeded, purify
from mlmadapt.masking.selection import derive_key, key_rows
from mlmadapt.training.config import TrainingConfig

logger = logging.getLogger(__name__)

Dealt = TypeVar("Dealt")
# The share of the run done before a row's step, the row's place, and whether it counts; and rows,
# or what `table_reader` reads of them, with one for each.
Pick: TypeAlias = tuple[float, int, bool]
Picked: TypeAlias = tuple[list[Pick], Any]

_PEEKED = 100  # rows of a stream that are looked at before the first step
_SORTED_STEPS = 50  # as transformers has it; 97 % of a batch of single sentences is text


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """The batches of one process.

    Attributes:
        rows: Rows of the training set, 0 for a stream.
        batch_size: Rows per process and forward pass.
        accumulation: Forward passes per optimizer step.
        seed: Decides the order of each epoch.
        rank: This process.
        world: All processes.
        lengths: Tokens of each row, to group rows by; None for rows in random order.
        is_split: Whether each process reads a part of a stream that is its own.
        limit: Tokens that the model has positions for, by which rows of a stream are checked.
    """

    rows: int
    batch_size: int
    accumulation: int = 1
    seed: int = 0
    rank: int = 0
    world: int = 1
    lengths: torch.Tensor | None = field(default=None, repr=False, compare=False)
    is_split: bool = False
    limit: int | None = None

    @property
    def rows_per_step(self) -> int:
        """Rows of an optimizer step over all processes."""
        return self.batch_size * self.accumulation * self.world

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch, the last, shorter one included."""
        return math.ceil(self.rows / self.rows_per_step)

    def order(self, epoch: int) -> torch.Tensor:
        """Return the rows in the order in which `epoch` takes them, over all processes.

        A tensor takes 8 bytes per row where a list takes 36.
        """
        generator = torch.Generator().manual_seed(derive_key(self.seed, "order", epoch))
        order = torch.randperm(self.rows, generator=generator)
        if self.lengths is None:
            return order
        size, whole = self.rows_per_step, self.rows // self.rows_per_step
        # Sorted in 4 parts or more, or the same rows would meet in each epoch.
        parts = torch.split(order, size * max(1, min(whole // 4, _SORTED_STEPS)))
        order = torch.cat([part[(-self.lengths[part]).argsort(stable=True)] for part in parts])
        steps = torch.randperm(whole, generator=generator)
        if whole:  # the step with the longest row first, since it is one that memory may not hold
            longest = self.lengths[order[: whole * size : size]].argmax()
            steps = torch.cat([longest[None], steps[steps != longest]])
        return torch.cat(
            [order[: whole * size].view(whole, size)[steps].ravel(), order[whole * size :]]
        )

    def rows_of_step(self, epoch: int, step: int) -> str:
        """Name the rows of a step over all processes.

        Examples:
            >>> BatchPlan(rows=0, batch_size=2, world=2).rows_of_step(0, 3)
            '12 to 15 of the stream'
        """
        first, end = step * self.rows_per_step, (step + 1) * self.rows_per_step
        if self.is_split:
            first, end = first // self.world, end // self.world
            return f"{first} to {end - 1} of each of the {self.world} parts of the stream"
        if not self.rows:
            return f"{first} to {end - 1} of the stream"
        rows = self.order(epoch)[first:end].tolist()
        more = f" and {len(rows) - 8} more" if len(rows) > 8 else ""
        return ", ".join(map(str, rows[:8])) + more

    def steps(self, epoch: int, *, start: int = 0) -> Iterator[list[list[tuple[int, bool]]]]:
        """Yield the forward passes of each optimizer step: pairs of a row and whether it counts.

        Examples:
            >>> plan = BatchPlan(rows=5, batch_size=2, world=2, rank=1)
            >>> [[len(batch) for batch in step] for step in plan.steps(0)]
            [[2], [1]]
            >>> list(plan.steps(0))[1][0][0][1]
            False
        """
        order = self.order(epoch)
        for step in range(start, self.steps_per_epoch):
            rows = order[step * self.rows_per_step : (step + 1) * self.rows_per_step]
            yield self.deal(rows.tolist())

    def deal(self, rows: Sequence[Dealt]) -> list[list[tuple[Dealt, bool]]]:
        """Share the rows of a step out like cards, so that a short step is short everywhere.

        Grouped rows are dealt to the processes, and each then takes the longest first.

        Examples:
            >>> BatchPlan(rows=5, batch_size=2, accumulation=2).deal("abc")
            [[('a', True), ('c', True)], [('b', True)]]
        """
        passes = math.ceil(len(rows) / (self.batch_size * self.world))
        mine = rows[self.rank :: self.world]
        shares = [mine[place::passes] for place in range(passes)]
        if self.lengths is not None:
            cuts = [len(mine) * place // passes for place in range(passes + 1)]
            shares = [mine[first:end] for first, end in pairwise(cuts)]
        return [[(row, True) for row in share] or [(rows[0], False)] for share in shares]


def lengths_to_group_by(train_dataset: Any, config: TrainingConfig) -> torch.Tensor | None:
    """Return the rows' lengths if they are to be grouped and differ.

    Raises:
        ValueError: If they are to be grouped and their lengths are not known.

    Examples:
        >>> config = TrainingConfig(train_sampling_strategy="group_by_length")
        >>> lengths_to_group_by([{"input_ids": [7, 8]}, {"input_ids": [9]}], config)
        tensor([2, 1])
    """
    if config.train_sampling_strategy == "random":
        return None
    lengths = dataset_lengths(train_dataset)
    if lengths is None:
        raise ValueError(
            f"train_sampling_strategy is {config.train_sampling_strategy!r}, but the lengths of "
            "train_dataset are not known before its rows are read; pass it as a Dataset with "
            "input_ids or a list of rows, or leave it at 'random'"
        )
    return torch.from_numpy(lengths) if (lengths != lengths[0]).any() else None


def training_batches(
    dataset: Any,
    plan: BatchPlan,
    data_collator: DataCollator,
    *,
    epoch: int,
    start: int = 0,
    done: int = 0,
    total_steps: int = 1,
    num_workers: int = 0,
) -> Iterator[tuple[list[Batch], bool]]:
    """Yield this process's batches of each optimizer step, and whether the step ends the epoch.

    Where a stream is split, whether this process's part has ended. Steps of fillers follow without
    end, as many as the longest part may need.

    Masks come from (seed, epoch, row), with the collator's own seed where it has one, and their
    rate from the share of steps that are `done` before theirs, of `total_steps`.

    Raises:
        ValueError: If a stream has no rows, or none that a resumed run has not had, or one with
            more tokens than its limit.
    """
    collator = purify(data_collator)
    collate = partial(_collate, data_collator=collator, seed=plan.seed, epoch=epoch)
    progress = (min(1.0, step / total_steps) for step in count(done))
    if not plan.rows:
        yield from _stream_batches(dataset.read(epoch), plan, collate, progress, start=start)
        return
    # As they are asked for: a list of all rows to come is large. Each batch brings its progress,
    # since workers collate ahead.
    steps, loader_steps = tee(plan.steps(epoch, start=start))
    picks = (
        [(share, *pick) for pick in batch]
        for share, step in zip(progress, loader_steps, strict=False)
        for batch in step
    )
    loader = DataLoader(
        # A subclass may collate rows in a way of its own, as other collators do.
        _IndexedRows(dataset, as_columns=type(collator) is WholeWordMaskingCollator),
        batch_sampler=picks,
        collate_fn=collate,
        num_workers=num_workers,
        worker_init_fn=_ignore_signals,
        # Of its own, or each iterator would move torch's global one.
        generator=torch.Generator(),
    )
    batches = iter(loader)
    for step, shares in enumerate(steps, start + 1):
        yield [next(batches) for _ in shares], step == plan.steps_per_epoch


def _stream_batches(
    stream: Iterator[Any],
    plan: BatchPlan,
    collate: Callable[[Picked], Batch],
    progress: Iterator[float],
    *,
    start: int,
) -> Iterator[tuple[list[Batch], bool]]:
    # Over all parts, each row has a number of its own, since other collators draw by it.
    number, stride = (plan.rank, plan.world) if plan.is_split else (0, 1)
    plan = replace(plan, rank=0, world=1) if plan.is_split else plan
    rows: Iterator[tuple[int, Any]] = zip(count(number, stride), stream, strict=False)
    first, passed = next(rows, None), start * plan.rows_per_step
    if passed:
        logger.info("train_dataset is read from its start, and %d rows are passed over", passed)
    rows = islice(chain([first] if first else [], rows), passed, None)
    step = list(islice(rows, plan.rows_per_step))
    if not (first if plan.is_split else step):
        raise ValueError(
            f"train_dataset, a stream, ended before row {passed} of its epoch; it must have rows, "
            "and yield the same ones each time it is read"
        )
    while step or plan.is_split:
        following = list(islice(rows, plan.rows_per_step))
        share = next(progress)
        passes = plan.deal(step)
        if first is not None and plan.is_split:  # as many as the others make
            passes += [[(first, False)]] * (plan.accumulation - len(passes))
        batches = []
        for dealt in passes:
            picks = [(share, index, counts) for (index, _), counts in dealt]
            batches.append(collate((picks, [row for (_, row), _ in dealt])))
            if plan.limit and batches[-1]["labels"].shape[1] > plan.limit:
                _check_lengths([numbered for numbered, _ in dealt], plan.limit)
        yield batches, not following
        step = following


def _check_lengths(rows: Sequence[tuple[int, Any]], limit: int) -> None:
    """Name the row of a stream that made a batch too wide, unless that is padding."""
    for number, row in rows:
        name = f"row {number} of train_dataset, a stream,"
        if (tokens := measure_rows(name, [row])[0]) > limit:
            raise ValueError(
                f"{name} has {tokens} tokens, the model has positions for {limit}; shorten it, as "
                "group_texts does"
            )


@dataclass
class OpenStream:
    """A stream whose first rows can be looked at without opening it twice.

    Examples:
        >>> stream = OpenStream(iter("abc"))
        >>> stream.peek(2), list(stream.read(epoch=0))
        (['a', 'b'], ['a', 'b', 'c'])
    """

    dataset: Any
    _opened: Iterator[Any] | None = None

    def peek(self, number: int = _PEEKED) -> list[Any]:
        """Return the first rows of the first epoch."""
        rows = self.read(epoch=0)
        first = list(islice(rows, number))
        self._opened = chain(first, rows)
        return first

    def read(self, epoch: int) -> Iterator[Any]:
        """Return the rows of an epoch."""
        if epoch == 0 and self._opened is not None:
            opened, self._opened = self._opened, None
            return opened
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)
        return iter(self.dataset)


def open_rows(dataset: Any) -> Any:
    """Return a dataset as rows that can be counted, or as a stream.

    Raises:
        TypeError: If it is neither.
    """
    return OpenStream(dataset) if is_stream(dataset) else as_rows("train_dataset", dataset)


def first_batch(train_rows: Any, plan: BatchPlan, data_collator: DataCollator) -> Batch:
    """Return the first batch that has a target, to try things by, or at the worst another.

    Raises:
        ValueError: If no process has a target.
    """
    if isinstance(train_rows, OpenStream):
        train_rows = OpenStream(train_rows.peek(max(plan.rows_per_step, _PEEKED)))
    for step, ends in training_batches(train_rows, plan, data_collator, epoch=0):
        batches = [batch for batch in step if (batch["labels"] != -100).any()]
        if batches or ends:
            break
    if not any(gather_object([bool(batches)])):
        raise ValueError(
            "train_dataset has no row with a word, so that nothing is to be predicted; tokenize it "
            "with a tokenizer that knows its text (the unknown token is not a word)"
        )
    return (batches or step)[0]


def _ignore_signals(worker: int) -> None:  # noqa: ARG001  # as DataLoader calls it
    """Leave signals to the main process.

    Ctrl-C, Slurm and Kubernetes send them to the whole process group. Workers that obeyed would be
    gone before the main process has finished its step and written a checkpoint.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def count_tokens(batch: Batch) -> int:
    """Count the tokens of rows that have a target, which a filler does not."""
    trained = (batch["labels"] != -100).any(1, keepdim=True)
    tokens = batch.get("attention_mask", torch.ones_like(batch["labels"]))
    return int((tokens * trained).sum())


class _IndexedRows(torch.utils.data.Dataset[Any]):
    def __init__(self, dataset: Rows, *, as_columns: bool) -> None:
        self.dataset, self.as_columns = dataset, as_columns

    @cached_property  # where it is used: to another process, views would go as copies
    def _read(self) -> Callable[[list[int]], JoinedRows] | None:
        return table_reader(self.dataset) if self.as_columns else None

    def __getitems__(self, picks: list[Pick]) -> Picked:
        indices = [index for _, index, _ in picks]
        if self._read is not None:
            return picks, self._read(indices)
        if hasattr(self.dataset, "__getitems__"):
            return picks, self.dataset.__getitems__(indices)
        return picks, [self.dataset[index] for index in indices]


def _collate(picked: Picked, *, data_collator: DataCollator, seed: int, epoch: int) -> Batch:
    """Collate rows with the masks of an epoch; a filler counts for nothing."""
    picks, rows = picked
    progress, _, counts = picks[0]
    batch: Mapping[str, Any]
    if isinstance(data_collator, WholeWordMaskingCollator):
        own_seed = seed if data_collator.seed is None else data_collator.seed
        key: Any = derive_key(own_seed, "mask", epoch)
        if data_collator.key_column is None:
            key = key_rows(key, [place for _, place, _ in picks])
        batch = data_collator.collate(rows, key=key, progress=progress)
    else:
        key = derive_key(seed, "mask", epoch, *(index for _, index, _ in picks))
        batch = collate_seeded(data_collator, rows, key=key)
    tensors = {name: torch.as_tensor(values) for name, values in batch.items()}
    if not counts:
        tensors["labels"] = torch.full_like(tensors["labels"], -100)
    return tensors
