"""What several processes need to stay in step, and to leave in good order when asked to.

Collective calls wait for every process, so a process that fails alone leaves the others waiting
until a time-out of half an hour. So what one process checks, all learn. Schedulers send SIGTERM
some seconds before they kill a process, and people press Ctrl-C: either is noted, and acted upon
between two steps, when a checkpoint can be written. A second one acts at once.
"""

import atexit
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, Self, TypeVar

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState, is_initialized
from accelerate.utils import broadcast_object_list, gather_object, parse_flag_from_env
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from mlmadapt.data.table import split_part
from mlmadapt.training.config import TrainingConfig

logger = logging.getLogger(__name__)

Outcome = TypeVar("Outcome")

_SHARDED = (FSDPModule, FullyShardedDataParallel)


def make_accelerator(config: TrainingConfig) -> Accelerator:
    """Make the accelerator that the settings ask for.

    Raises:
        ValueError: If a tracker is not installed, or this process has an accelerator of another
            precision.
    """
    trackers = [name.strip() for name in str(config.report_to).split(",") if name != "none"]
    # Told nothing, it takes the precision of an earlier one in this process.
    precision = config.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if is_initialized() and AcceleratorState().mixed_precision != precision:
        raise ValueError(
            f"mixed_precision is {config.mixed_precision!r}, but this process began with "
            f"{AcceleratorState().mixed_precision!r}, and a process has one; pass that here too, "
            "or train in a new process (restart the notebook)"
        )
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU")
    # Before accelerate keeps it for the process.
    if precision == "fp16" and PartialState(cpu=on_cpu).device.type == "cpu":
        raise ValueError("mixed_precision is 'fp16', which a CPU has not; pass 'bf16' or 'no'")
    accelerator = Accelerator(
        mixed_precision=precision, log_with=trackers or None, project_dir=config.output_dir
    )
    missing = set(trackers) - {getattr(name, "value", name) for name in accelerator.log_with}
    if missing:
        raise ValueError(
            f"report_to is {config.report_to!r}, but {sorted(missing)} is not installed; pip "
            "install it, or leave it out"
        )
    return accelerator


def join_group(accelerator: Accelerator) -> None:
    """Check that all processes that were started know of each other, and leave them in the end.

    Raises:
        RuntimeError: If a launcher started several and each thinks that it is the only one: they
            would overwrite each other's files.
    """
    atexit.register(_leave_group)
    if accelerator.num_processes > 1:
        return
    asked = int(os.environ.get("WORLD_SIZE", "1"))
    if asked > 1:
        raise RuntimeError(
            f"the launcher started {asked} processes (WORLD_SIZE), but each trains alone; on a "
            "machine without an accelerator set ACCELERATE_USE_CPU=1"
        )
    if parse_flag_from_env("ACCELERATE_USE_CPU") and "MASTER_ADDR" in os.environ:
        logger.warning(
            "one process trains alone: 'accelerate launch --cpu' starts one, whatever "
            "--num_processes says; use ACCELERATE_USE_CPU=1 torchrun --nproc_per_node N"
        )


def _leave_group() -> None:
    """Take the process out of its group when Python ends, which nobody else does.

    Threads of gloo that still run then abort the process: on a busy machine, 10 of 25 scripts whose
    two processes end after a collective ended with code -6, and none of 25 with this.
    """
    # After an error the others may wait for this process, and leaving could wait for them.
    if torch.distributed.is_initialized() and not hasattr(sys, "last_value"):
        time.sleep(0.2)  # right after the last collective, leaving can deadlock
        torch.distributed.destroy_process_group()


def check_whole(model: nn.Module, accelerator: Accelerator) -> None:
    """Check that each process has the whole model, as all that follows takes for granted.

    Raises:
        ValueError: If it is sharded, or Accelerate would shard it.
    """
    kinds = [type(module).__name__ for module in model.modules() if isinstance(module, _SHARDED)]
    kinds += [type(weight).__name__ for weight in model.parameters() if isinstance(weight, DTensor)]
    kind = accelerator.distributed_type.value
    if not kind.startswith(("NO", "MULTI_")):
        kinds.append(f"Accelerate's {kind}")
    if kinds:
        raise ValueError(
            f"model is sharded ({kinds[0]}), of which no checkpoint can be resumed here; pass the "
            "model as it was before, under torchrun or accelerate's MULTI_GPU: each process then "
            "holds all of it. gradient_checkpointing and mixed_precision='bf16' save memory"
        )


def on_main_process(accelerator: Accelerator, action: Callable[[], Outcome]) -> Outcome:
    """Do something once; every process returns what came of it, or raises the same error."""
    outcome: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = action()
        except Exception as error:  # noqa: BLE001  # raised below, on all processes
            outcome[1] = error
    if accelerator.num_processes > 1:
        broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]  # type: ignore[no-any-return]


def split_stream(dataset: Any, accelerator: Accelerator) -> tuple[Any, bool]:
    """Give each process a part of a stream that is its own; tell whether it has one.

    A part is what `split_dataset_by_node` has made of the stream, or as many whole shards as the
    other processes get. Other streams stay whole.

    Raises:
        ValueError: If the stream was split for others than these processes, on all of them.
    """
    rank, world = accelerator.process_index, accelerator.num_processes
    if world == 1:
        return dataset, False
    from datasets import IterableDataset, distributed  # noqa: PLC0415  # half a second to load

    if not isinstance(dataset, IterableDataset):
        return dataset, False
    parts = gather_object([split_part(dataset)])
    if parts == [None] * world:
        if dataset.n_shards % world:
            return dataset, False
        return distributed.split_dataset_by_node(dataset, rank, world), True
    if parts != [(number, world) for number in range(world)]:
        raise ValueError(
            f"train_dataset is a stream of which the {world} processes have the parts {parts} "
            "(number, of how many); pass all the whole stream, or give each its own by "
            "split_dataset_by_node(stream, process_index, num_processes)"
        )
    return dataset, True


def total(accelerator: Accelerator, masked: int, tokens: int, stop_signal: int) -> torch.Tensor:
    """Sum the counts over all processes; behind them comes the signal that each has noted."""
    signals = [0] * accelerator.num_processes
    signals[accelerator.process_index] = stop_signal
    counts = torch.tensor([masked, tokens, *signals])
    if accelerator.num_processes == 1:
        return counts
    counts = counts.to(accelerator.device)
    return accelerator.reduce(counts, "sum")  # type: ignore[no-any-return]


_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Signals:
    """Notes SIGTERM and Ctrl-C inside a ``with`` block.

    At the end of the block, or when `leave` is called, the process exits with the usual code: 143
    after SIGTERM, `KeyboardInterrupt` (130) after Ctrl-C. Python handles signals in the main thread
    only; in another thread nothing is noted.

    Examples:
        >>> with Signals() as signals:
        ...     signals.noted
        0
    """

    def __init__(self) -> None:
        self.noted = 0
        self._previous: dict[int, object] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                # An ignored signal stays ignored (a job in the background ignores Ctrl-C), and a
                # handler that was not set from Python could not be put back.
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, error_type: type[BaseException] | None, *rest: object) -> None:
        self._restore()
        if error_type is None:
            self.leave()

    def leave(self, noted: int = 0) -> None:
        """Exit as a signal demands: `noted`, which another process has noted, or else our own."""
        self.noted = noted or self.noted
        if self.noted == signal.SIGTERM:
            raise SystemExit(128 + signal.SIGTERM)
        if self.noted == signal.SIGINT:
            raise KeyboardInterrupt

    def _note(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002  # signal's signature
        if self.noted:
            self._restore()
            self.noted = number
            self.leave()
        self.noted = number

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._previous = {}
