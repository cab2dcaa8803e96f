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
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

_UNITS = ("runtime", "samples_per_second", "steps_per_second")
_TIMINGS = {"seconds", *(f"{part}_{unit}" for part in ("train", "eval") for unit in _UNITS)}


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
        steps, whole = start()
        if not steps:
            raise ValueError("train took no step of a torch.optim.Optimizer in its own process")
        if all(value is None for value in whole.values()):
            raise ValueError("train returned nothing to compare; return the model and its history")
        at_step = steps * 2 // 3 if at_step is None else at_step
        if not 0 <= at_step < steps:
            raise ValueError(f"at_step is {at_step}; train takes steps 0 to {steps - 1}")
        shutil.rmtree(Path(folder, "run"), ignore_errors=True)
        if start(at_step=at_step, by=by)[0] >= steps:
            raise AssertionError(f"train went on to its end after {by} before step {at_step}")
        taken, resumed = start(resume=True)
    where = f"interrupted by {by} before step {at_step} of {steps} and resumed"
    if taken >= steps:
        raise AssertionError(
            f"{where}, the run took {taken} steps: it began again, which proves nothing; save a "
            "checkpoint before that step, and go on from it if resume"
        )
    names = [*(whole | resumed)]
    pairs = [(whole.get(name, "nothing"), resumed.get(name, "nothing")) for name in names]
    differences = [_difference(*pair) for pair in pairs]
    if any(differences):
        first, difference = next(each for each in zip(names, differences, strict=True) if each[1])
        raise AssertionError(
            f"{where}, the run ends otherwise: {sum(map(bool, differences))} of {len(names)} "
            f"values differ, first {first!r}, {difference}"
        )


def _run(
    train: Callable[[str, bool], Any],
    folder: Path,
    *,
    ignore: Collection[str],
    timeout: float,
    resume: bool = False,
    at_step: int | None = None,
    by: str = "",
) -> tuple[int, dict[str, Any]]:
    """Train in a process of its own, and leave nothing of it behind.

    Returns:
        How many optimizer steps were taken, and what `train` returned, by name.
    """
    report = folder / "report"
    process = multiprocessing.get_context("spawn").Process(
        target=_work, args=(train, folder, resume, ignore, at_step, by)
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
    if not report.exists():
        if at_step is not None:  # as it should
            return at_step, {}
        raise RuntimeError(
            f"train's process ended with exit code {process.exitcode} and no result; its standard "
            "error may say why"
        )
    steps, outcome, error = pickle.loads(report.read_bytes())  # noqa: S301 (written by `_work`)
    report.unlink()
    if error:
        raise RuntimeError(f"train failed:\n{error}")
    return steps, outcome


def _work(  # noqa: PLR0917 (what another process is started with has no names)
    train: Callable[[str, bool], Any],
    folder: Path,
    resume: bool,  # noqa: FBT001
    ignore: Collection[str],
    at_step: int | None,
    by: str,
) -> None:
    """Train and report, unless the signal comes first."""
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    if hasattr(os, "setsid"):
        os.setsid()
    steps, outcome, error = 0, {}, ""

    def count(*_: Any) -> None:
        nonlocal steps
        if steps == at_step:
            os.kill(os.getpid(), getattr(signal, by, signal.SIGTERM))  # Windows has no SIGKILL
        steps += 1

    register_optimizer_step_pre_hook(count)
    try:
        outcome = dict(_flatten(train(str(folder / "run"), resume), "", ignore))
    except Exception:  # noqa: BLE001 (the parent process raises it)
        error = traceback.format_exc()
    (folder / "report").write_bytes(pickle.dumps((steps, outcome, error)))


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
        for key, part in value.items() if isinstance(value, Mapping) else enumerate(value):
            place = f".{key}" if isinstance(value, Mapping) else f"[{key}]"
            if key not in ignore:
                yield from _flatten(part, (name + place).removeprefix("."), ignore)
    elif isinstance(value, torch.Tensor):
        yield name, value.detach().cpu().clone()
    elif value is None or isinstance(value, (bool, int, float, str)):
        yield name, value
    else:
        raise TypeError(
            f"train returned a {type(value).__name__} as {name or 'its result'!r}; return models, "
            "tensors, arrays, numbers and text, in lists, dicts and dataclasses"
        )


def _difference(one: Any, other: Any) -> str:
    """Say how values differ; nothing if they are equal to the last bit, and NaN to NaN."""
    import torch

    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        if one.shape == other.shape and one.dtype == other.dtype:
            bits = (values.contiguous().flatten().view(torch.uint8) for values in (one, other))
            if torch.equal(*bits):
                return ""
            count, error = int((one != other).sum()), (one.double() - other.double()).abs().max()
            return f"in {count} of {one.numel()} numbers, by {error:.3g} at most"
    elif repr(one) == repr(other):
        return ""
    return f"{one!r} uninterrupted, {other!r} resumed"
