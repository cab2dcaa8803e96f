"""Training rows that come one after another, from a dataset without a length.

The order is the stream's own. Each process reads the whole stream and takes its share of every
step, so that the rows of a step are the same on any number of processes; to resume, the rows of
finished steps are read and passed over, which is exact for shuffle buffers too (their `state_dict`
loses rows).
"""

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

from mlmadapt.batches import Batch, BatchPlan, epoch_collator
from mlmadapt.freezing import DataCollator


def streaming_batches(
    dataset: Iterable[Mapping[str, Any]],
    plan: BatchPlan,
    data_collator: DataCollator,
    *,
    epoch: int,
    start: int = 0,
) -> Iterator[list[Batch]]:
    """Yield for each optimizer step of one pass over the stream the batches of this process.

    Raises:
        ValueError: If the stream has no rows, or none that a resumed run has not had.
    """
    if hasattr(dataset, "set_epoch"):
        dataset.set_epoch(epoch)
    collate = epoch_collator(data_collator, seed=plan.seed, epoch=epoch)
    rows = enumerate(dataset)
    # Passed over here and now.
    next(islice(rows, start * plan.rows_per_step, start * plan.rows_per_step), None)
    step = list(islice(rows, plan.rows_per_step))
    if not step:
        raise ValueError(
            f"train_dataset, a stream, has no row behind row {start * plan.rows_per_step} of epoch "
            f"{epoch}; it must have rows, and the same ones each time it is read"
        )
    while step:
        yield [
            collate([(index, counts, row) for (index, row), counts in share])
            for share in plan.deal(step)
        ]
        step = list(islice(rows, plan.rows_per_step))
