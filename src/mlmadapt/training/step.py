"""One optimizer step, whose loss is the sum over its masked tokens divided by their number.

The sum runs over all accumulated batches and all processes. ``outputs.loss`` is a mean per batch,
in which a token weighs more the fewer its batch has; it is never used.

The host never waits for the device within a step. What the device finds out, the loss and the norm
of the gradient, is read a step later, while the next one runs. So it is the device that leaves out
an update that a gradient would spoil, and all after it; `settle` then tells which step it was.
"""

import logging
import math
from contextlib import nullcontext
from typing import Any

import torch

from mlmadapt._types import Batch
from mlmadapt.masking.seeding import derive_key
from mlmadapt.model.loss import summed_cross_entropy
from mlmadapt.model.sparse_head import masked_logits
from mlmadapt.training.batches import count_tokens
from mlmadapt.training.distributed import total
from mlmadapt.training.run import Launched, Run, waits_for_metric

logger = logging.getLogger(__name__)

# An fp16 scaler skips a step now and then to find its scale; this many in a row are a fault.
_MOST_SKIPS = 20


def take_step(run: Run, batches: list[Batch], *, stop_signal: int) -> None:
    """Have the device take one optimizer step, and count it."""
    accelerator, plan, state = run.accelerator, run.plan, run.state
    counts = total(
        accelerator,
        sum(int((batch["labels"] != -100).sum()) for batch in batches),
        sum(count_tokens(batch) for batch in batches),
        stop_signal,
    )
    masked = counts[0]
    # Dropout differs by process, and is the same again after a resume.
    torch.manual_seed(derive_key(run.config.seed, "dropout", state.step, plan.rank))
    # DDP averages over processes, accelerate divides by its accumulation steps: undo both.
    scale = plan.world * accelerator.gradient_accumulation_steps / masked.clamp(min=1)
    losses = []
    for place, batch in enumerate(batches):
        sent = run.predictor.send(batch, rounded=True)
        is_last = place == len(batches) - 1  # which averages gradients over the processes
        with nullcontext() if is_last else accelerator.no_sync(run.wrapped):
            with run.predictor.at(sent.masked):
                logits = masked_logits(run.wrapped(**sent.inputs), sent.masked)
            loss = summed_cross_entropy(logits, sent.targets)
            losses.append(loss.detach())
            # An infinite loss can have a finite gradient; as NaN, all processes see it.
            accelerator.backward(loss * scale * (1 + losses[-1] * 0))
    norm = accelerator.clip_grad_norm_(
        run.wrapped.parameters(), run.config.max_grad_norm or math.inf
    )
    is_spoiled = ~norm.isfinite()
    for earlier in run.launched:
        is_spoiled |= earlier.is_spoiled
    values = torch.stack([*losses, norm])
    run.launched.append(Launched.now(state, values, counts, is_spoiled=is_spoiled))
    _update(run, is_spoiled, masked)
    if not waits_for_metric(run.scheduler):
        run.scheduler.step()
    run.model.zero_grad()  # not the optimizer's, which may hold a part of them
    state.step += 1
    state.epoch_step += 1


def _update(run: Run, is_spoiled: torch.Tensor, masked: torch.Tensor) -> None:
    """Take the optimizer's step, unless a gradient would spoil it or no token is masked."""
    inner: Any = getattr(run.optimizer, "optimizer", run.optimizer)  # below accelerate's
    # A fused one leaves out a step by a flag on the device, as torch's scaler has it do.
    if getattr(inner, "_step_supports_amp_scaling", False) and run.accelerator.scaler is None:
        inner.grad_scale, inner.found_inf = None, (is_spoiled | (masked == 0)).float()
        try:
            run.optimizer.step()
        finally:
            del inner.grad_scale, inner.found_inf
        return
    settle(run)  # for any other, the host has to know
    if masked > 0:
        run.optimizer.step()


def settle(run: Run, *, leave: int = 0) -> None:
    """Read what the launched steps came to.

    Args:
        run: The run.
        leave: So many of the last steps may go on.

    Raises:
        FloatingPointError: If the loss or the gradient is not finite, on all processes. The weights
            are as they were before that step.
    """
    state, config = run.state, run.config
    while len(run.launched) > leave:
        launched = run.launched.popleft()
        (*losses, state.grad_norm), (masked, tokens, *signals) = launched.read()
        run.stop_signal = max(run.stop_signal, *signals)
        state.loss_sum += sum(losses)
        state.loss_tokens += masked
        state.tokens_seen += tokens
        state.masked_tokens_seen += masked
        state.skips = 0 if math.isfinite(state.grad_norm) else state.skips + 1
        if not masked:
            logger.warning(
                "step %d has no masked token on any process; nothing is updated", launched.step
            )
        if state.skips > (0 if run.accelerator.scaler is None else _MOST_SKIPS):
            raise FloatingPointError(
                f"the gradient of step {launched.step} (epoch {launched.epoch}) is not finite: "
                f"norm {state.grad_norm}, loss of this process {sum(losses)}, training rows "
                f"{run.plan.rows_of_step(launched.epoch, launched.epoch_step)}. The weights are as "
                f"before the step. Lower learning_rate ({config.learning_rate}), or use "
                "mixed_precision='bf16' in place of 'fp16'"
            )
