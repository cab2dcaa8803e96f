"""What a run tells while it runs: its history, its trackers and its progress bar.

A tracker is one of Accelerate's, by its name in ``report_to``; it gets what the history gets.
People get a bar and a line per evaluation, so that nobody waits for the end to see that a run goes
wrong.
"""

import logging
import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict

from accelerate import Accelerator
from accelerate.utils import gather_object

from mlmadapt.model.evaluation import MaskedLMMetrics
from mlmadapt.training.config import TrainingConfig
from mlmadapt.training.state import TrainingRun

logger = logging.getLogger(__name__)


@contextmanager
def tracking(accelerator: Accelerator, config: TrainingConfig) -> Iterator[None]:
    """Run the trackers, not before the output folder is ours: some begin with files in it."""
    if config.report_to != "none" and not accelerator.trackers:
        settings = {k: v for k, v in asdict(config).items() if isinstance(v, (int, float, str))}
        accelerator.init_trackers("mlmadapt", config=settings)
    try:
        yield
    finally:
        for tracker in accelerator.trackers if config.report_to != "none" else []:
            tracker.finish()


def log(run: TrainingRun, entry: Mapping[str, float]) -> None:
    """Add an entry to history and trackers."""
    state, steps_per_epoch = run.state, run.plan.steps_per_epoch or math.inf
    epoch = state.epoch + state.epoch_step / steps_per_epoch
    state.history.append({"step": state.step, "epoch": epoch, **entry})
    run.accelerator.log({**entry, "epoch": epoch}, step=state.step)


def log_loss(run: TrainingRun) -> None:
    """Log the mean loss per masked token since the last entry, if there was any."""
    state = run.state
    total, lr = sum(gather_object([state.loss_sum])), float(run.scheduler.get_last_lr()[0])
    loss = {"loss": total / state.loss_tokens} if state.loss_tokens else {}
    log(run, {**loss, "grad_norm": state.grad_norm, "learning_rate": lr})
    state.loss_sum, state.loss_tokens = 0.0, 0


def show_step(run: TrainingRun) -> None:
    """Move the bar by a step, with the mean loss since the last entry of the history.

    Of several processes, the first stands for all: to ask them would take a wait in each step.
    """
    state, lr = run.state, float(run.scheduler.get_last_lr()[0])
    if state.loss_tokens:
        loss = state.loss_sum * run.plan.world / state.loss_tokens
        text = f"loss={loss:.3f}, lr={lr:.1e}, {state.tokens_seen / run.seconds:,.0f} tokens/s"
        run.progress.set_postfix_str(text, refresh=False)
    run.progress.update()
    if state.step == 1:  # and not a tenth of a second later, or after many slow steps
        run.progress.refresh()


def show_metrics(run: TrainingRun, metrics: Mapping[str, MaskedLMMetrics]) -> None:
    """Say on a line what an evaluation found: above the bar or, where there is none, in the log."""
    if run.config.disable_tqdm or not metrics or not run.accelerator.is_main_process:
        return
    figures = "  ".join(
        f"{name.removeprefix('eval_')}: perplexity {figures.perplexity:.1f}, "
        f"right {figures.accuracy:.0%}"
        for name, figures in metrics.items()
    )
    line = f"step {run.state.step} of {run.total_steps}  {figures}"
    if run.progress.disable:
        logger.info(line)
    else:
        run.progress.write(line, file=sys.stderr)  # where the bar is
