"""What a run tells while it runs: its history, its trackers and its progress bar.

A tracker is one of Accelerate's, by its name in ``report_to``; it gets what the history gets.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict

from accelerate import Accelerator
from accelerate.utils import gather_object

from mlmadapt.training.config import TrainingConfig
from mlmadapt.training.run import Run


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


def log(run: Run, entry: Mapping[str, float]) -> None:
    """Add an entry to history and trackers."""
    state, steps_per_epoch = run.state, run.plan.steps_per_epoch or math.inf
    epoch = state.epoch + state.epoch_step / steps_per_epoch
    state.history.append({"step": state.step, "epoch": epoch, **entry})
    run.accelerator.log({**entry, "epoch": epoch}, step=state.step)


def log_loss(run: Run) -> None:
    """Log the mean loss per masked token since the last entry."""
    state = run.state
    loss = sum(gather_object([state.loss_sum])) / max(state.loss_tokens, 1)
    lr = float(run.scheduler.get_last_lr()[0])
    log(run, {"loss": loss, "grad_norm": state.grad_norm, "learning_rate": lr})
    speed = state.tokens_seen / run.seconds
    run.progress.set_postfix_str(f"loss={loss:.3f}, lr={lr:.1e}, {speed:,.0f} tokens/s")
    state.loss_sum, state.loss_tokens = 0.0, 0
