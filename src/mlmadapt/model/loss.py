"""Cross entropy in the memory of its logits.

Torch's cross entropy makes three more arrays of that size, one after the other. At 64 x 128 tokens
each has 150 MB, which the allocator takes from the system anew in every step. Here the gradient
takes the place of the logits, a few rows at a time. On a CPU, head and loss then need three
quarters of the time.
"""

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from mlmadapt.model.sparse_head import count_items, masked_logits


def masked_lm_loss(
    outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
) -> torch.Tensor:
    """Weigh every masked token the same, for ``Trainer(compute_loss_func=masked_lm_loss)``.

    `Trainer` 5.x multiplies loss and gradient by the number of accumulated batches for BERT,
    DistilBERT, RoBERTa and most other masked language models, and averages batches rather than
    tokens. This divides the summed loss by the masked tokens of the whole accumulation window.
    `sparse_prediction` does the same for less; with both, `Trainer` takes this one, since it keeps
    the labels from the model, and the full head is computed.

    Args:
        outputs: The model's output, with logits of shape ``(batch, sequence, vocabulary)``, or of
            the masked positions only, as `sparse_prediction` leaves them.
        labels: Token ids of shape ``(batch, sequence)``, -100 where nothing is to be predicted.
        num_items_in_batch: The number of masked tokens in the window over all processes, as
            `Trainer` counts them; None takes their number in `labels`.

    Returns:
        The loss, a scalar in nats per token; 0 where nothing is masked.

    Raises:
        ValueError: By torch, if there are logits for other positions than there are labels.
        IndexError: By torch, if a label is past the vocabulary.

    Source:
        transformers#47688.

    Examples:
        >>> from transformers.modeling_outputs import MaskedLMOutput
        >>> outputs = MaskedLMOutput(logits=torch.zeros(1, 3, 4))
        >>> masked_lm_loss(outputs, torch.tensor([[-100, 2, -100]]), num_items_in_batch=2)
        tensor(0.6931)
    """
    positions = labels != -100
    logits, targets = masked_logits(outputs, positions), labels[positions]
    summed = nn.functional.cross_entropy(logits, targets, reduction="sum")
    count = len(targets) if num_items_in_batch is None else num_items_in_batch
    return summed / count_items(count, summed.device)


# 16 MB in 32 bits, which stay in the allocator and near the processor; a GPU is busy with them too.
_LOGITS_AT_ONCE = 2**22


def summed_cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sum the negative log-likelihoods in nats; the backward pass **overwrites the logits**.

    Autograd raises an error if the layer that computed the logits needs them again: an ``exp``
    does, a linear layer does not.

    Args:
        logits: Of shape ``(tokens, vocabulary)``, in 32 bits or more.
        labels: Of shape ``(tokens,)``; a position with -100 does not count.

    Examples:
        >>> summed_cross_entropy(torch.zeros(3, 4), torch.tensor([1, -100, 2]))
        tensor(2.7726)
    """
    summed: torch.Tensor = _SummedCrossEntropy.apply(logits, labels)  # type: ignore[no-untyped-call]
    return summed


class _SummedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        is_target = labels != -100
        targets = labels.masked_fill(~is_target, 0)
        ctx.rows = max(1, _LOGITS_AT_ONCE // logits.shape[1])
        # Of no rows, `split` makes one part of none.
        totals = torch.cat([part.logsumexp(1) for part in torch.split(logits, ctx.rows)])
        ctx.save_for_backward(logits, targets, is_target, totals)
        true = logits.gather(1, targets[:, None])[:, 0]
        # Not `torch.where`, which would copy the number to the device, and wait.
        return (totals - true).masked_fill(~is_target, 0.0).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        logits, targets, is_target, totals = ctx.saved_tensors
        weights = gradient * is_target
        columns = (logits, totals[:, None], weights[:, None])
        parts = [torch.split(column, ctx.rows) for column in columns]
        for part, total, weight in zip(*parts, strict=True):
            part.sub_(total).exp_().mul_(weight)
        logits[torch.arange(len(logits), device=logits.device), targets] -= weights
        return logits, None
