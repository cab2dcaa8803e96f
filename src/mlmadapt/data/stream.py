"""Where a stream goes on after an interruption: at its own state, or behind rows passed over.

A stream of datasets goes on from its `state_dict` without a look at the shards that are done, and
without mapping any row of theirs. That is exact for some streams only: a shuffle buffer forgets its
rows, and before datasets 5.2 mapped Parquet files lose some rows and repeat others. So a state is
used where each part of the stream is known to be exact, and where the rows that come are those that
came when the checkpoint was written. Any other stream is read from its start.
"""

import hashlib
import json
import logging
import sys
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any

logger = logging.getLogger(__name__)

# Exact behind each row, alone and one upon another, whole and in parts, in any epoch. What is not
# named is passed over: shuffle buffers, columns side by side, whatever comes later.
_EXACT = """Arrow CyclingMultiSources Filtered Formatted Mapped RandomlyCyclingMultiSources
RebatchedArrow Repeat SelectColumnsIterable Skip Step Take VerticallyConcatenatedMultiSources"""


@dataclass
class StreamPlace:
    """Where a stream is before a step.

    Attributes:
        state: Its `state_dict` before the rows of that step; None if it may not be exact.
        rows: The rows of that step.
        digest: In a place that was stored, what stands for them.
    """

    state: Any = None
    rows: list[Any] = field(default_factory=list)
    digest: str = ""

    def stored(self) -> dict[str, Any]:
        """Return what a checkpoint holds of it."""
        return {} if self.state is None else {"state": self.state, "digest": _digest(self.rows)}


def has_exact_state(dataset: Any) -> bool:
    """Tell whether a stream is known to go on from its `state_dict` with the rows that follow."""
    # What is not loaded, for half a second, made no stream.
    loaded = sys.modules.get("datasets")
    if loaded is None or type(dataset) is not loaded.IterableDataset:
        return False
    if tuple(map(int, loaded.__version__.split(".")[:2])) < (5, 2):
        return False
    parts = [getattr(dataset, "_ex_iterable", None)]  # a state does not tell of a buffer
    for part in parts:
        below = getattr(part, "ex_iterable", None)
        parts += getattr(part, "ex_iterables", [below] if below else [])
        # Of maps of tables, datasets says that they may skip a batch.
        if getattr(getattr(part, "formatting", None), "is_table", False):
            return False
    # A state that the caller has set would be lost.
    is_unset = getattr(dataset, "_starting_state_dict", True) is None
    names = {type(part).__name__.removesuffix("ExamplesIterable") for part in parts}
    return is_unset and names <= {"", *_EXACT.split()}  # a generator has no other name


def go_on(dataset: Any, passed: int, place: StreamPlace, *, count: int) -> Iterator[Any]:
    """Return the rows of a stream that follow those that have `passed`.

    Args:
        dataset: The stream, set to the epoch.
        passed: Rows of finished steps.
        place: Of the step that follows, if it was stored.
        count: Rows of a step.
    """
    if passed and place.state is not None and has_exact_state(dataset):
        try:
            dataset.load_state_dict(place.state)
            rows: Iterator[Any] = iter(dataset)
            following = list(islice(rows, count))
            if _digest(following) == place.digest:
                logger.info("train_dataset goes on behind row %d by its state_dict", passed)
                return chain(following, rows)
        except Exception:  # a state of another stream can fail in any way
            logger.info("train_dataset does not take the state_dict it had", exc_info=True)
        finally:
            dataset.load_state_dict(None)
    if passed:
        logger.info("train_dataset is read from its start, and %d rows are passed over", passed)
    rows = iter(dataset)
    deque(islice(rows, passed), maxlen=0)  # here and now
    return rows


def _digest(rows: list[Any]) -> str:
    # What is neither text nor a number, an array or a tensor may differ in each process. Then all
    # rows are passed over.
    text = json.dumps(
        rows, skipkeys=True, default=lambda each: getattr(each, "tolist", each.__str__)()
    )
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
