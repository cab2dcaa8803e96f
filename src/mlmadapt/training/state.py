"""What a run holds: what it was given, what was made of it, and what it has done so far.

All of it is declared here and handed from function to function of the loop, so that nobody has to
look for where a field comes from. Only `TrainState` changes from step to step; it is what a
checkpoint stores beside weights, moments and schedule. Random state is not part of it: see
`masking.selection`.
"""

import inspect
import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from mlmadapt._types import Batch, DataCollator, Model, Rows, Tokenizer
from mlmadapt.model.evaluation import MaskedLMMetrics
from mlmadapt.model.forward import MaskedForward
from mlmadapt.training.batches import BatchPlan, training_batches
from mlmadapt.training.config import TrainingConfig
from mlmadapt.training.result import TrainingResult


@dataclass
class TrainState:
    """The counts of a run.

    Attributes:
        step: Optimizer steps taken.
        epoch: Whole passes over the training rows.
        epoch_step: Steps taken of the pass that is under way.
        tokens_seen: Tokens trained on, padding not counted, over all processes.
        masked_tokens_seen: Tokens predicted.
        seconds: Wall time before the last interruption.
        grad_norm: Norm of the last step's gradient, before clipping.
        skips: Steps in a row that an fp16 scaler has skipped.
        loss_sum: Loss of this process since the last entry of the history, in nats.
        loss_tokens: Masked tokens of all processes since then.
        history: What was logged.
        evaluations: Step and metrics of each evaluation of the first set.
        filled: How the model filled in each sentence of `config.fill_mask` before the first step.
    """

    step: int = 0
    epoch: int = 0
    epoch_step: int = 0
    tokens_seen: int = 0
    masked_tokens_seen: int = 0
    seconds: float = 0.0
    grad_norm: float = 0.0
    skips: int = 0
    loss_sum: float = 0.0
    loss_tokens: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    evaluations: list[tuple[int, MaskedLMMetrics]] = field(default_factory=list)
    filled: dict[str, str] = field(default_factory=dict)

    def best(self, *, since: int = 0) -> tuple[int, MaskedLMMetrics] | None:
        """Return step and metrics of the evaluation with the lowest loss; of equals, the first."""
        evaluations = [(step, metrics) for step, metrics in self.evaluations if step >= since]
        return min(evaluations, key=lambda evaluation: evaluation[1].loss, default=None)


@dataclass
class PendingStep:
    """A step that the device was told to take, until the host has read what came of it.

    Attributes:
        step: Optimizer steps taken before it.
        epoch: Whole passes over the training rows before it.
        epoch_step: Steps of this pass before it.
        values: The loss of each forward pass, in nats, and the norm of the gradient.
        counts: Masked tokens, tokens, and the signal that each process has noted.
        is_spoiled: Whether its gradient, or that of a step before it, is not finite.
        copied: When `values` and `counts` are on the host, if a copy of them is under way.
    """

    step: int
    epoch: int
    epoch_step: int
    values: torch.Tensor
    counts: torch.Tensor
    is_spoiled: torch.Tensor
    copied: torch.cuda.Event | None = None

    def __post_init__(self) -> None:
        if self.values.is_cuda:
            # Asked for later, they would be waited for behind all steps that were launched since.
            self.values = self.values.to("cpu", non_blocking=True)
            self.counts = self.counts.to("cpu", non_blocking=True)
            self.copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self.copied.record()

    def read(self) -> tuple[list[float], list[int]]:
        """Return `values` and `counts`, when the device has got so far."""
        if self.copied is not None:
            self.copied.synchronize()
        return self.values.cpu().tolist(), self.counts.cpu().tolist()


@dataclass(kw_only=True)
class TrainingRun:
    """The objects of a run.

    Attributes:
        config: The settings.
        model: The caller's, which is evaluated and saved.
        tokenizer: The caller's.
        data_collator: The caller's.
        train_rows: The caller's rows, or an `OpenStream` of them.
        eval_sets: Evaluation rows by the name that they have in logs.
        accelerator: Knows device, processes and precision.
        plan: Which rows are trained when.
        total_steps: Optimizer steps to take.
        fingerprint: What decides the outcome, for the checkpoints.
        wrapped: The model in what averages gradients and lowers precision: for training only.
        forward: How the model predicts masked tokens.
        optimizer: Skips the steps that an fp16 scaler gives up.
        scheduler: The schedule of this optimizer.
        progress: The progress bar.
        started: When this process began, in seconds of `time.perf_counter`.
        stop_signal: The signal that any process has noted, as far as `pending` was read.
        pending: Steps whose outcome was not read yet, which `state` counts in `step` and
            `epoch_step` only.
        state: What has been done so far.
    """

    config: TrainingConfig
    model: Model
    tokenizer: Tokenizer
    data_collator: DataCollator
    train_rows: Any
    eval_sets: Mapping[str, Rows]
    accelerator: Accelerator
    plan: BatchPlan
    total_steps: int
    fingerprint: Mapping[str, Any]
    wrapped: nn.Module
    forward: MaskedForward
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    progress: Any
    started: float
    stop_signal: int = 0
    pending: deque[PendingStep] = field(default_factory=deque)
    state: TrainState = field(default_factory=TrainState)

    @property
    def folder(self) -> Path:
        """The output directory."""
        return Path(self.config.output_dir)

    @property
    def seconds(self) -> float:
        """Wall time in seconds, including the time before an interruption."""
        return self.state.seconds + time.perf_counter() - self.started

    @property
    def is_done(self) -> bool:
        """Whether all steps are taken, or further ones would not help."""
        patience, best = self.config.early_stopping_patience, self.state.best()
        is_late = patience is not None and best in self.state.evaluations[:-patience]
        return is_late or self.state.step >= self.total_steps

    @property
    def saved_step(self) -> int:
        """The step whose model is wanted in the end: the best one where asked, else the last."""
        best = self.state.best(since=1) if self.config.load_best_model_at_end else None
        return self.state.step if best is None else best[0]

    def batches(self) -> Iterator[tuple[list[Batch], bool]]:
        """Yield the batches of each step that is left of this epoch, as `training_batches` does."""
        return training_batches(
            self.train_rows,
            self.plan,
            self.data_collator,
            epoch=self.state.epoch,
            start=self.state.epoch_step,
            done=self.state.step,
            total_steps=self.total_steps,
            num_workers=self.config.dataloader_num_workers,
        )

    def due(self, *, ends_epoch: bool) -> tuple[bool, bool, bool]:
        """Tell whether to log, to evaluate and to save after a step."""
        config, step, is_last = self.config, self.state.step, self.state.step == self.total_steps

        def is_due(strategy: str, every: float) -> bool:
            in_time = ends_epoch if strategy == "epoch" else not step % every
            return strategy != "no" and (is_last or in_time)

        share = config.logging_steps
        every = max(int(share if share >= 1 else share * self.total_steps), 1)
        evaluates = is_last or is_due(config.eval_strategy, config.eval_steps)
        saves = is_due(config.save_strategy, config.save_steps)
        return evaluates or is_due("steps", every), evaluates, saves

    def result(self) -> TrainingResult:
        """Sum up."""
        evaluations, best = self.state.evaluations, self.state.best()
        return TrainingResult(
            initial=evaluations[0][1] if evaluations else None,
            final=dict(evaluations).get(self.saved_step),
            best=None if best is None else best[1],
            history=self.state.history,
            global_step=self.state.step,
            tokens_seen=self.state.tokens_seen,
            masked_tokens_seen=self.state.masked_tokens_seen,
            seconds=self.seconds,
            output_dir=self.config.output_dir,
        )


def waits_for_metric(scheduler: torch.optim.lr_scheduler.LRScheduler) -> bool:
    """Tell whether a schedule goes by evaluations (`ReduceLROnPlateau`), not by steps."""
    return "metrics" in inspect.signature(scheduler.step).parameters
