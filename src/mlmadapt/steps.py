"""One optimizer step, whose loss is the sum over its masked tokens divided by their number.

Over all accumulated batches and all processes, that is: ``outputs.loss``, a mean a batch, weighs a
token the more the fewer its batch has, and is never used.
"""

import logging
import math

import torch
from torch.distributed.tensor import DTensor

from mlmadapt.batches import Batch, BatchPlan, count_tokens
from mlmadapt.config import TrainingConfig
from mlmadapt.cross_entropy import summed_cross_entropy
from mlmadapt.fitting import Trained
from mlmadapt.optimization import waits_for_metric
from mlmadapt.prediction import POSITION_MULTIPLE, masked_logits
from mlmadapt.processes import synchronize
from mlmadapt.resumption import RunState
from mlmadapt.seeding import derive_key

logger = logging.getLogger(__name__)

# An fp16 scaler skips a step now and then to find its scale; this many in a row are a fault.
_MOST_SKIPS = 20


def take_step(
    trained: Trained,
    batches: list[Batch],
    state: RunState,
    *,
    plan: BatchPlan,
    config: TrainingConfig,
    stop_signal: int,
) -> int:
    """Take one optimizer step, count it in `state`, and return the signal any process has noted.

    Raises:
        FloatingPointError: If the loss or the gradient is not finite, on all processes and before
            the update.
    """
    accelerator = trained.accelerator
    masked, tokens, stop_signal = _agree(
        sum(int((batch["labels"] != -100).sum()) for batch in batches),
        sum(count_tokens(batch) for batch in batches),
        stop_signal,
        trained,
    )
    # Dropout differs by process, and is the same again after a resume.
    torch.manual_seed(derive_key(config.seed, "dropout", state.step, plan.rank))
    # DDP averages over processes, accelerate divides by its accumulation steps: undo both.
    scale = plan.world * accelerator.gradient_accumulation_steps / max(masked, 1)
    loss_sum = 0.0
    for place, batch in enumerate(batches):
        positions = _round_up(batch["labels"] != -100).to(accelerator.device)
        inputs = {name: values.to(accelerator.device) for name, values in batch.items()}
        labels = inputs.pop("labels")
        with synchronize(accelerator, trained.wrapped, now=place == len(batches) - 1):
            logits = masked_logits(trained.wrapped, inputs, positions, trained.sparse)
            loss = summed_cross_entropy(logits, labels[positions])
            # An infinite loss can have a finite gradient; as NaN, all processes see it.
            finite = torch.where(loss.detach().isfinite(), 1.0, math.nan)
            accelerator.backward(loss * scale * finite)
        loss_sum += float(loss.detach())
    if masked:
        _clip(trained, state, config=config, loss_sum=loss_sum, plan=plan)
        trained.optimizer.step()
    else:
        logger.warning("step %d has no masked token on any process; nothing is updated", state.step)
    if not waits_for_metric(trained.scheduler):
        trained.scheduler.step()
    trained.optimizer.zero_grad()
    state.loss_sum += loss_sum
    state.loss_tokens += masked
    state.tokens_seen += tokens
    state.masked_tokens_seen += masked
    state.step += 1
    state.epoch_step += 1
    return stop_signal


def _round_up(positions: torch.Tensor) -> torch.Tensor:
    """Add positions without a target, which count for nothing, up to a `POSITION_MULTIPLE`.

    The model's handle would add some too, and take them off again: a copy of all logits' gradients.
    """
    filled = positions.flatten().clone()
    others = (~filled).nonzero().squeeze(1)
    filled[others[: -int(filled.sum()) % POSITION_MULTIPLE]] = True
    return filled.view_as(positions)


def _agree(masked: int, tokens: int, stop_signal: int, trained: Trained) -> tuple[int, int, int]:
    """Sum the counts over all processes; a signal that one has noted is noted by all."""
    accelerator = trained.accelerator
    if accelerator.num_processes == 1:
        return masked, tokens, stop_signal
    signals = [0] * accelerator.num_processes
    signals[accelerator.process_index] = stop_signal
    counts = torch.tensor([masked, tokens, *signals], device=accelerator.device)
    masked, tokens, *signals = accelerator.reduce(counts, "sum").tolist()
    return masked, tokens, max(signals)


def _clip(
    trained: Trained, state: RunState, *, config: TrainingConfig, loss_sum: float, plan: BatchPlan
) -> None:
    """Clip the gradient, and refuse one that is not finite."""
    max_norm = config.max_grad_norm or math.inf
    norm = trained.accelerator.clip_grad_norm_(trained.wrapped.parameters(), max_norm)
    state.grad_norm = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    state.skips = 0 if math.isfinite(state.grad_norm) else state.skips + 1
    if state.skips > (0 if trained.accelerator.scaler is None else _MOST_SKIPS):
        raise FloatingPointError(
            f"the gradient of step {state.step} (epoch {state.epoch}) is not finite: norm "
            f"{state.grad_norm}, loss of this process {loss_sum}, training rows "
            f"{plan.rows_of_step(state.epoch, state.epoch_step)}. The weights are as before the "
            f"step. Lower learning_rate ({config.learning_rate}), or use mixed_precision='bf16' in "
            "place of 'fp16'"
        )
