"""An assertion about interrupted runs: state that is forgotten is found and named.

Runs are forks here, which spares each the imports of a fresh process.
"""

from __future__ import annotations

import functools
import importlib
import multiprocessing
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mlmadapt.testing import assert_resumes_exactly, runs


def loop(
    output_dir: str,
    resume: bool,  # noqa: FBT001
    *,
    saves: str = "weights moments",
    fault: str = "",
) -> Any:
    """Train some numbers in nine steps, with checkpoints that hold what `saves` names."""
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    folder, step, history = Path(output_dir), 0, []
    folder.mkdir(exist_ok=True)
    if resume and (folder / "state").exists():
        state = torch.load(folder / "state", weights_only=True)
        step, history = state["step"], state["history"]
        if "weights" in saves:
            model.load_state_dict(state["weights"])
        if "moments" in saves:
            optimizer.load_state_dict(state["moments"])
    if fault == "ignores SIGTERM":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    elif resume and fault == "fails to resume":
        raise ValueError("on purpose")
    elif fault == "exits":
        raise SystemExit(3)
    while step < 9:
        inputs = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
        loss = model(inputs).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1
        times = ["seconds", "started"] if "started" in saves else ["seconds"]
        history.append({"loss": loss.item()} | dict.fromkeys(times, time.perf_counter()))
        if step % 2 == 0:
            weights, moments = model.state_dict(), optimizer.state_dict()
            state = {"step": step, "history": history, "weights": weights, "moments": moments}
            torch.save(state, folder / "new")
            (folder / "new").rename(folder / "state")
    if fault == "returns an object":
        return {"model": model, "optimizer": optimizer}
    # Of all kinds that are compared; NaN is equal to NaN.
    figures = (np.float32(1), torch.tensor([np.nan]), {"text": "a", "none": None})
    return None if fault == "returns nothing" else (model, {"history": history}, figures)


def sit_still(output_dir: str, resume: bool) -> int:  # noqa: FBT001
    """Train nothing."""
    return 1


@pytest.fixture(autouse=True)
def _forked(monkeypatch: pytest.MonkeyPatch) -> None:
    importlib.import_module("torch._dynamo")  # or each fork would, at its first step
    context = multiprocessing.get_context("fork")
    monkeypatch.setattr(runs.multiprocessing, "get_context", lambda _: context)


def test_runs_that_resume_exactly_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From steps after the first checkpoint on, by both signals, and nothing is left behind."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for at_step in (None, 2, 8):
        assert_resumes_exactly(loop, at_step=at_step)
    assert_resumes_exactly(loop, by="SIGTERM")
    started = functools.partial(loop, saves="weights moments started")
    assert_resumes_exactly(started, ignore=["started"])
    # Where no test before it has, torch makes a folder for code that it may compile.
    assert [path.name for path in tmp_path.iterdir() if "torchinductor" not in path.name] == []
    assert multiprocessing.active_children() == []


INEXACT: dict[str, tuple[dict[str, str], dict[str, Any], str]] = {
    "moments": (
        {"saves": "weights"},
        {},
        r"step 6 of 9 and resumed, .* otherwise: \d+ of 15 values differ, first '\[0\].weight', in",
    ),
    "weights": ({"saves": "moments"}, {}, r"first '\[0\].weight', in 3 of 3 numbers, by \d"),
    "checkpoint": (
        {},
        {"at_step": 1},
        "before step 1 of 9 and resumed, the run took 9 steps: it began again",
    ),
    "times": (
        {"saves": "weights moments started"},
        {},
        r"9 of 24 .* first '\[1\].history\[0\].started', \d+\.\d+ uninter",
    ),
    "SIGTERM": (
        {"fault": "ignores SIGTERM"},
        {"by": "SIGTERM"},
        "train went on to its end after SIGTERM before st",
    ),
}


@pytest.mark.parametrize("name", INEXACT)
def test_runs_that_do_not_are_found(name: str) -> None:
    """Forgotten state is named with the first value that differs; starting again is no pass."""
    settings, options, message = INEXACT[name]
    with pytest.raises(AssertionError, match=message):
        assert_resumes_exactly(functools.partial(loop, **settings), **options)


NO_TEST: dict[str, tuple[Any, dict[str, Any], type[Exception], str]] = {
    "no steps": (sit_still, {}, ValueError, "train took no step of a torch.optim.Optimizer"),
    "too late": (loop, {"at_step": 9}, ValueError, "at_step is 9; train takes steps 0 to 8"),
    "slow": (loop, {"timeout": 0.0}, TimeoutError, "train took over 0.0 s, and was killed"),
    "returns nothing": (loop, {}, ValueError, "train returned nothing to compare"),
    "returns an object": (
        loop,
        {},
        RuntimeError,
        r"(?s)train failed:.*TypeError: train returned a AdamW as 'optimizer'; return models",
    ),
    "fails to resume": (
        loop,
        {"at_step": 1},
        RuntimeError,
        r"(?s)train failed:\nTraceback .*ValueError: on purpose",
    ),
    "exits": (loop, {}, RuntimeError, "process ended with exit code 3 and no result; its standa"),
}


@pytest.mark.parametrize("name", NO_TEST)
def test_what_cannot_be_tested_is_no_failure_of_a_run(name: str) -> None:
    """A mistake in the test is told apart from a run that resumes inexactly."""
    train, options, error, message = NO_TEST[name]
    train = functools.partial(train, fault=name) if train is loop else train
    with pytest.raises(error, match=message):
        assert_resumes_exactly(train, **options)
