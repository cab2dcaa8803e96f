"""History, trackers and the progress bar."""

from __future__ import annotations

import logging
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import accelerate.tracking
import pytest
import torch
from accelerate import Accelerator
from packaging.version import Version
from torch import nn

from mlmadapt.training import prepare
from tests.scripts.tiny_run import TinyRun, logged

if TYPE_CHECKING:
    from mlmadapt import TrainingResult


def test_the_history_has_the_names_of_trainer(run: TinyRun) -> None:
    """Losses by `logging_steps`, metrics by epoch, in their order."""
    run.eval_rows = run.rows[:5]
    result = run.train(num_train_epochs=2, logging_steps=2)
    common = {"step", "epoch"}
    loss = {*common, "loss", "grad_norm", "learning_rate"}
    names = ("loss", "perplexity", "accuracy", "top5_accuracy", "masked_tokens")
    metrics = {*common, *(f"eval_{name}" for name in names)}
    assert [set(entry) for entry in result.history] == [
        metrics, loss, loss, metrics, loss, loss, metrics,
    ]  # fmt: skip
    assert logged(result, "step") == [0, 2, 3, 3, 4, 6, 6]
    assert logged(result, "epoch") == pytest.approx([0, 2 / 3, 1, 1, 4 / 3, 2, 2])
    assert logged(result, "eval_perplexity") == [math.exp(x) for x in logged(result, "eval_loss")]


def train_on_two_sets(run: TinyRun, **settings: Any) -> TrainingResult:
    """Evaluate on a set of the domain and a general one."""
    run.eval_rows = {"domain": run.rows[:3], "general": run.rows[3:6]}
    return run.train(**settings)


def test_each_evaluation_prints_a_line_and_the_bar_shows_the_loss_at_once(
    run: TinyRun, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """To where the bar is, so that what a script prints can be piped on."""
    with caplog.at_level(logging.INFO, "mlmadapt"):
        result = train_on_two_sets(run, disable_tqdm=False, logging_steps=100)
    printed = capfd.readouterr()
    assert printed.out == ""
    lines = [line for line in re.split(r"[\r\n]+", printed.err) if line.startswith("step ")]
    assert lines == [
        f"step {step} of 3  "
        + "  ".join(
            f"{name}: perplexity {logged(result, f'eval_{name}_perplexity')[place]:.1f}, "
            f"right {logged(result, f'eval_{name}_accuracy')[place]:.0%}"
            for name in ("domain", "general")
        )
        for place, step in enumerate((0, 3))
    ]
    assert re.search(r" 1/3 \[.* loss=\d\.\d{3}, lr=\S+, [\d,]+ tokens/s\]", printed.err)
    assert "perplexity" not in caplog.text


@pytest.mark.parametrize("silent", [False, True])
def test_without_a_bar_evaluations_go_to_the_log(
    run: TinyRun,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    *,
    silent: bool,
) -> None:
    """Where tqdm is switched off from outside; the setting silences both."""
    bar = prepare.tqdm
    monkeypatch.setattr(prepare, "tqdm", lambda **options: bar(**options | {"disable": True}))
    run.eval_rows = run.rows[:3]
    with caplog.at_level(logging.INFO, "mlmadapt"):
        run.train(disable_tqdm=silent)
    lines = [line for line in caplog.messages if line.startswith("step ")]
    assert [re.sub(r"[\d.]+", "#", line) for line in lines] == (
        [] if silent else ["step # of #  eval: perplexity #, right #%"] * 2
    )
    assert "step" not in capfd.readouterr().err


class Notes(accelerate.tracking.GeneralTracker):
    """Keeps what it is told, in a folder of its own as TensorBoard's has."""

    # ruff: noqa: D102 (of the class that it stands in for)

    name = "notes"
    requires_logging_directory = True
    made: list[Notes] = []  # noqa: RUF012

    def __init__(self, run_name: str, logging_dir: str | Path | None = None, **kwargs: Any) -> None:
        super().__init__()
        self.folder = None if logging_dir is None else Path(logging_dir) / run_name
        self.entries: list[tuple[int | None, dict[str, Any]]] = []
        self.config: dict[str, Any] = {}
        self.finished = False
        self.made.append(self)

    @property
    def tracker(self) -> Notes:
        return self

    def start(self) -> None:
        if self.folder is not None:
            self.folder.mkdir(parents=True)

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.config = values

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        self.entries.append((step, values))

    def finish(self) -> None:
        self.finished = True


@pytest.mark.skipif(
    Version(accelerate.__version__) < Version("1.15"),
    reason="accelerate knows its trackers by an enum there, which takes no stand-in",
)
def test_a_tracker_is_told_what_the_history_says(
    run: TinyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its name in `report_to`; it may put files into the output folder."""
    monkeypatch.setitem(accelerate.tracking.LOGGER_TYPE_TO_CLASS, "notes", Notes)
    run.eval_rows = run.rows[:3]
    result = run.train(report_to="notes")
    tracker = Notes.made[-1]
    assert [{"step": step, **values} for step, values in tracker.entries] == result.history
    assert tracker.config["learning_rate"] == 1e-3
    assert tracker.finished
    assert tracker.folder == run.folder / "mlmadapt"


def test_tensorboard_has_the_curves_of_every_set(run: TinyRun) -> None:
    """Read as its own page reads them, from files in the output folder."""
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="tensorboard"
    )
    result = train_on_two_sets(run, report_to=["tensorboard"])
    events = accumulator.EventAccumulator(str(run.folder / "mlmadapt")).Reload()
    for name in ("loss", "learning_rate", "eval_domain_perplexity", "eval_general_perplexity"):
        values = [event.value for event in events.Scalars(name)]
        assert values == pytest.approx(logged(result, name), rel=1e-6)


def test_a_tracker_of_the_callers_accelerator_is_used(run: TinyRun) -> None:
    """And is left to its owner."""
    tracker = Notes("mine")
    accelerator = run.objects["accelerator"] = Accelerator(log_with=tracker)
    accelerator.init_trackers("mine")
    result = run.train()
    assert [step for step, _ in tracker.entries] == logged(result, "step")
    assert not tracker.finished


def test_a_failed_start_leaves_nothing_of_a_tracker(
    run: TinyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder of TensorBoard's would block the next try."""

    def init_trackers(self: Accelerator, *args: Any, **kwargs: Any) -> None:
        (run.folder / "runs").mkdir()

    monkeypatch.setattr(Accelerator, "init_trackers", init_trackers)
    run.objects["accelerator"] = Accelerator()
    other = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    run.objects["lr_scheduler"] = torch.optim.lr_scheduler.ConstantLR(other)
    with pytest.raises(ValueError, match="lr_scheduler sets the learning rate of an optimizer"):
        run.train(report_to="tensorboard")
    assert not (run.folder / "runs").exists()
    del run.objects["lr_scheduler"]
    run.train(report_to="tensorboard")
    assert (run.folder / "runs").exists()
