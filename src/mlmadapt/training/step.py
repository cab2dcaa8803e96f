"""One optimizer step, whose loss is the sum over its masked tokens divided by their number.

The sum runs over all accumulated batches and all processes. ``outputs.loss`` is a mean per batch,
in which a token weighs more the fewer its batch has; it is never used.
"""

import logging
import math

import torch
from torch.distributed.tensor import DTensor

from mlmadapt._types import Batch
from mlmadapt.masking.seeding import derive_key
from mlmadapt.model.loss import summed_cross_entropy
from mlmadapt.model.sparse_head import masked_logits, predict_at, round_up
from mlmadapt.training.batches import count_tokens
from mlmadapt.training.distributed import agree, synchronize
from mlmadapt.training.run import Run, waits_for_metric

logger = logging.getLogger(__name__)

# An fp16 scaler skips a step now and then to find its scale; this many in a row are a fault.
_MOST_SKIPS = 20


def take_step(run: Run, batches: list[Batch], *, stop_signal: int) -> int:
    """Take one optimizer step, count it, and return the signal that any process has noted.

    Raises:
        FloatingPointError: If the loss or the gradient is not finite, on all processes and before
            the update.
    """
    accelerator, plan, state = run.accelerator, run.plan, run.state
    masked, tokens, stop_signal = agree(
        accelerator,
        sum(int((batch["labels"] != -100).sum()) for batch in batches),
        sum(count_tokens(batch) for batch in batches),
        stop_signal,
    )
    # Dropout differs by process, and is the same again after a resume.
    torch.manual_seed(derive_key(run.config.seed, "dropout", state.step, plan.rank))
    # DDP averages over processes, accelerate divides by its accumulation steps: undo both.
    scale = plan.world * accelerator.gradient_accumulation_steps / max(masked, 1)
    loss_sum = 0.0
    for place, batch in enumerate(batches):
        positions = round_up(batch["labels"] != -100).to(accelerator.device)
        inputs = {name: values.to(accelerator.device) for name, values in batch.items()}
        labels = inputs.pop("labels")
        with synchronize(accelerator, run.wrapped, now=place == len(batches) - 1):
            with predict_at(run.sparse, positions):
                logits = masked_logits(run.wrapped(**inputs), positions)
            loss = summed_cross_entropy(logits, labels[positions])
            # An infinite loss can have a finite gradient; as NaN, all processes see it.
            finite = torch.where(loss.detach().isfinite(), 1.0, math.nan)
            accelerator.backward(loss * scale * finite)
        loss_sum += float(loss.detach())
    if masked:
        _clip(run, loss_sum)
        run.optimizer.step()
    else:
        logger.warning("step %d has no masked token on any process; nothing is updated", state.step)
    if not waits_for_metric(run.scheduler):
        run.scheduler.step()
    run.model.zero_grad()  # not the optimizer's, which may hold a part of them
    state.loss_sum += loss_sum
    state.loss_tokens += masked
    state.tokens_seen += tokens
    state.masked_tokens_seen += masked
    state.step += 1
    state.epoch_step += 1
    return stop_signal


def _clip(run: Run, loss_sum: float) -> None:
    """Clip the gradient, and refuse one that is not finite."""
    accelerator, state, config = run.accelerator, run.state, run.config
    max_norm = config.max_grad_norm or math.inf
    norm = accelerator.clip_grad_norm_(run.wrapped.parameters(), max_norm)
    state.grad_norm = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    state.skips = 0 if math.isfinite(state.grad_norm) else state.skips + 1
    if state.skips > (0 if accelerator.scaler is None else _MOST_SKIPS):
        raise FloatingPointError(
            f"the gradient of step {state.step} (epoch {state.epoch}) is not finite: norm "
            f"{state.grad_norm}, loss of this process {loss_sum}, training rows "
            f"{run.plan.rows_of_step(state.epoch, state.epoch_step)}. The weights are as before "
            f"the step. Lower learning_rate ({config.learning_rate}), or use mixed_precision="
            "'bf16' in place of 'fp16'"
        )
