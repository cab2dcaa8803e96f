"""An assertion about interrupted runs, for tests of any library's training loops.

Each run has a process of its own, as a user's would, which is really killed, before an optimizer
step that a hook of torch counts. The training loop itself is neither known nor patched.
"""
# ruff: noqa: PLC0415 (numpy and torch are loaded by the functions that need them)

from __future__ import annotations

import multiprocessing
import os
import pickle
import shutil
import signal
import tempfile
import traceback
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

_TIMINGS = (
    "seconds",
    *(
        f"{name}_{unit}"
        for name in ("train", "eval")
        for unit in ("runtime", "samples_per_second", "steps_per_second")
    ),
)


def assert_resumes_exactly(
    train: Callable[[str, bool], Any],
    *,
    at_step: int | None = None,
    by: Literal["SIGKILL", "SIGTERM"] = "SIGKILL",
    ignore: Collection[str] = (),
    timeout: float = 600,
) -> None:
    """Assert that a run that is interrupted and resumed ends where an uninterrupted one does.

    `train` runs three times, each in a fresh process (started by spawn, some 5 s of imports): to
    its end; until a signal ends it; and to its end again from what that left in its folder. What it
    returns must be the same to the last bit. A run that starts again from the beginning ends the
    same as well and proves nothing: that is an error too. The folder is a temporary one; nothing
    is left behind.

    Args:
        train: Called as ``train(output_dir, resume)``; trains, goes on from its own checkpoint if
            `resume`, and returns what has to be equal: models, tensors, arrays, numbers and text,
            in lists, dicts and dataclasses. A function of a module that can be imported, or a
            `functools.partial` of one. It must seed itself.
        at_step: The optimizer step, counted from 0, before which the signal comes; two thirds of
            the run by default. There must be a checkpoint by then. Counted is each ``step`` of a
            `torch.optim.Optimizer` in the process itself.
        by: ``"SIGKILL"`` ends the process at once, as a crash or a full memory does; ``"SIGTERM"``
            asks it to, as schedulers do.
        ignore: Keys and fields that need not be equal, besides timings by the names they have in
            `TrainingResult` and transformers' `Trainer`. The latter's ``train_loss`` is one: after
            a resume, it is the mean of the steps since then.
        timeout: Seconds that each run may take before it is killed.

    Raises:
        AssertionError: With the name of what differs, by how much, and both values; if the signal
            does not end a run, or the resumed one begins again.
        ValueError: If `train` is a lambda or a function in a function, takes no optimizer step,
            returns nothing, or `at_step` is not one of its steps.
        RuntimeError: If `train` fails, with its traceback, ends its process, or returns what cannot
            be compared.
        TimeoutError: If a run takes too long.

    Examples:
        Where ``train`` stands in a module of the project::

            def train(output_dir, resume):
                config = TrainingConfig(
                    output_dir=output_dir,
                    resume_from_checkpoint=resume,
                    save_strategy="steps",
                    save_steps=2,
                )
                ...
                result = accelerate_train(model, rows, ..., config=config)
                return {"model": model, "history": result.history}


            def test_a_kill_costs_nothing():
                assert_resumes_exactly(train)

        >>> assert_resumes_exactly(lambda output_dir, resume: None)
        Traceback (most recent call last):
        ValueError: train is '<lambda>', which another process cannot import; it must be a \
function of a module, or a functools.partial of one
    """
    __tracebackhide__ = True
    try:
        pickle.dumps(train)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        name = getattr(train, "__qualname__", repr(train))
        raise ValueError(
            f"train is {name!r}, which another process cannot import; it must be a function of a "
            "module, or a functools.partial of one"
        ) from error
    with tempfile.TemporaryDirectory(prefix="mlmadapt-", ignore_cleanup_errors=True) as folder:
        # Every run in a folder of the same name, so that the name makes no difference.
        start = partial(_run, train, Path(folder), ignore={*_TIMINGS, *ignore}, timeout=timeout)
        whole = start()
        if not whole.steps:
            raise ValueError("train took no step of a torch.optim.Optimizer in its own process")
        if all(value is None for value in whole.outcome.values()):
            raise ValueError("train returned nothing to compare; return the model and its history")
        at_step = whole.steps * 2 // 3 if at_step is None else at_step
        if not 0 <= at_step < whole.steps:
            raise ValueError(f"at_step is {at_step}; train takes steps 0 to {whole.steps - 1}")
        shutil.rmtree(Path(folder, "run"), ignore_errors=True)
        interrupted = start(at_step=at_step, by=by)
        if interrupted.steps >= whole.steps:
            raise AssertionError(f"train went on to its end after {by} before step {at_step}")
        resumed = start(resume=True)
    where = f"interrupted by {by} before step {at_step} of {whole.steps} and resumed"
    if resumed.steps >= whole.steps:
        raise AssertionError(
            f"{where}, the run took {resumed.steps} steps: it began again, which proves nothing; "
            "save a checkpoint before that step, and go on from it if resume"
        )
    pairs = {
        name: [run.outcome.get(name, "nothing") for run in (whole, resumed)]
        for name in whole.outcome | resumed.outcome
    }
    differ = [name for name, pair in pairs.items() if not _same(*pair)]
    if differ:
        raise AssertionError(
            f"{where}, the run ends otherwise: {len(differ)} of {len(pairs)} values differ, first "
            f"{differ[0]!r}, {_difference(*pairs[differ[0]])}"
        )


class _Report(NamedTuple):
    """What a run reports: its optimizer steps, what it returned, by name, and what it raised."""

    steps: int
    outcome: dict[str, Any]
    error: str = ""


def _run(
    train: Callable[[str, bool], Any],
    folder: Path,
    *,
    ignore: Collection[str],
    timeout: float,
    resume: bool = False,
    at_step: int | None = None,
    by: str = "",
) -> _Report:
    """Train in a process of its own, and leave nothing of it behind."""
    file = folder / "report"
    process = multiprocessing.get_context("spawn").Process(
        target=_work,
        args=(train, str(folder / "run"), resume),
        kwargs={"file": file, "ignore": ignore, "at_step": at_step, "by": by},
    )
    process.start()
    try:
        process.join(timeout)
        is_late = process.is_alive()
    finally:
        process.kill()
        with suppress(ProcessLookupError, AttributeError):  # no groups on Windows
            os.killpg(process.pid or 0, signal.SIGKILL)  # workers too
        process.join()
    if is_late:
        raise TimeoutError(f"train took over {timeout} s, and was killed")
    if not file.exists():
        if at_step is not None:  # as it should
            return _Report(at_step, {})
        raise RuntimeError(
            f"train's process ended with exit code {process.exitcode} and no result; its standard "
            "error may say why"
        )
    report: _Report = pickle.loads(file.read_bytes())  # noqa: S301 (written by `_work`)
    file.unlink()
    if report.error:
        raise RuntimeError(f"train failed:\n{report.error}")
    return report


def _work(
    train: Callable[[str, bool], Any],
    output_dir: str,
    resume: bool,  # noqa: FBT001 (as `train` is called)
    *,
    file: Path,
    ignore: Collection[str],
    at_step: int | None,
    by: str,
) -> None:
    """Train and report, unless the signal comes first."""
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    if hasattr(os, "setsid"):
        os.setsid()
    steps = 0

    def count(*_: Any) -> None:
        nonlocal steps
        if steps == at_step:
            os.kill(os.getpid(), getattr(signal, by, signal.SIGTERM))  # Windows has no SIGKILL
        steps += 1

    register_optimizer_step_pre_hook(count)
    try:
        report = _Report(0, dict(_flatten(train(output_dir, resume), "", ignore)))
    except Exception:  # noqa: BLE001 (the parent process raises it)
        report = _Report(0, {}, traceback.format_exc())
    file.write_bytes(pickle.dumps(report._replace(steps=steps)))


def _flatten(value: Any, name: str, ignore: Collection[str]) -> Iterator[tuple[str, Any]]:
    """Yield the numbers, texts and tensors of which a value is made, by name."""
    import numpy as np
    import torch

    if isinstance(value, torch.nn.Module):
        value = value.state_dict()
    elif is_dataclass(value):
        value = {field.name: getattr(value, field.name) for field in fields(value)}
    elif hasattr(value, "_asdict"):
        value = value._asdict()
    elif isinstance(value, (np.ndarray, np.generic)):
        value = torch.tensor(value)
    if isinstance(value, (Mapping, list, tuple)):
        named = value if isinstance(value, Mapping) else dict(enumerate(value))
        for key, each in named.items():
            own = f".{key}" if named is value else f"[{key}]"
            if key not in ignore:
                yield from _flatten(each, (name + own).removeprefix("."), ignore)
    elif isinstance(value, torch.Tensor):
        yield name, value.detach().cpu().clone()
    elif value is None or isinstance(value, (bool, int, float, str)):
        yield name, value
    else:
        raise TypeError(
            f"train returned a {type(value).__name__} as {name or 'its result'!r}; return models, "
            "tensors, arrays, numbers and text, in lists, dicts and dataclasses"
        )


def _same(one: Any, other: Any) -> bool:
    """Tell whether two values are equal to the last bit, and NaN to NaN."""
    import torch

    if not isinstance(one, torch.Tensor) or not isinstance(other, torch.Tensor):
        return repr(one) == repr(other)
    bits = (each.contiguous().flatten().view(torch.uint8) for each in (one, other))
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(*bits)


def _difference(one: Any, other: Any) -> str:
    import torch

    if all(isinstance(each, torch.Tensor) for each in (one, other)) and one.shape == other.shape:
        error = (one.double() - other.double()).abs()
        return (
            f"in {int((one != other).sum())} of {one.numel()} numbers, by {error.max():.3g} at most"
        )
    return f"{one!r} uninterrupted, {other!r} resumed"
