"""An assertion about a loss, for tests of any library's training steps and evaluations."""
# ruff: noqa: PLC0415 (torch is loaded by the functions that need it)

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    import torch


def assert_same_loss(
    compute_loss: Callable[[Any, dict[str, torch.Tensor], int], Any],
    model: torch.nn.Module,
    batch: Mapping[str, Any],
    *,
    gradients: bool = True,
    rtol: float = 1e-4,
    atol: float = 1e-6,
) -> None:
    """Assert that a loss is the exact one, in nats per masked token, however a step is cut up.

    The exact loss of a step is the sum of the negative log-likelihoods of its masked tokens divided
    by their number. The batch is taken as a step, first whole and then a row at a time, as under
    gradient accumulation: each row must give its share, or the sum over the step is not exact. A
    row's own mean is not its share (transformers#47688), and NaN is not the share of a row without
    a target.

    Args:
        compute_loss: Takes (model, part of the batch, number of masked tokens in the whole step),
            as ``Trainer.compute_loss`` does, and returns the share of that part in the step's loss,
            a scalar.
        model: Returns ``logits`` of shape ``(batch, sequence, vocabulary)``. Dropout is off
            meanwhile; parameters, their ``.grad`` and the modes of modules are left as they were.
        batch: The model's inputs and ``labels`` of shape ``(batch, sequence)``, -100 where nothing
            is to be predicted, as tensors, arrays or lists.
        gradients: Compare gradients too; False for an evaluation.
        rtol: Tolerance relative to the loss, and to the norm of its gradient; for 32 bits.
        atol: Absolute tolerance of both.

    Raises:
        AssertionError: With the row, its loss and the exact one, or the worst parameter.
        ValueError: If the batch has no masked token.
        KeyError: If the batch has no ``labels``.

    Source:
        transformers#47688, where row 0 below would be found.

    Examples:
        >>> from mlmadapt import masked_lm_loss
        >>> from mlmadapt.testing import tiny_model, tiny_tokenizer
        >>> model = tiny_model(tiny_tokenizer())
        >>> batch = {"input_ids": [[2, 4, 8], [2, 9, 4]], "labels": [[-100, 7, 8], [-100, -100, 6]]}
        >>> def compute_loss(model, batch, num_items_in_batch):
        ...     return masked_lm_loss(model(**batch), batch["labels"], num_items_in_batch)
        >>> assert_same_loss(compute_loss, model, batch)
        >>> mean = lambda model, batch, _: model(**batch).loss
        >>> assert_same_loss(mean, model, batch)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        AssertionError: row 0, 2 of the step's 3 masked tokens: the loss is 6.1..., the exact one \
4.0...; it must be the sum over these tokens divided by 3
    """
    __tracebackhide__ = True
    import torch

    from mlmadapt.model.checks import evaluation_mode
    from mlmadapt.model.head import masked_logits

    device = next(model.parameters()).device
    step = {name: torch.as_tensor(values).to(device) for name, values in batch.items()}
    count = int((step["labels"] != -100).sum())
    if not count:
        raise ValueError("the batch has no masked token: all its labels are -100")
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    weights = [*trained.values()]

    def exact_loss(model: Any, part: dict[str, torch.Tensor], count: int) -> torch.Tensor:
        labels = part.pop("labels")
        logits = masked_logits(model(**part), labels != -100)
        targets = labels[labels != -100]
        return torch.nn.functional.cross_entropy(logits, targets, reduction="sum") / count

    def measure(loss_of: Any, part: dict[str, torch.Tensor]) -> tuple[float, Iterable[Any]]:
        loss = torch.as_tensor(loss_of(model, dict(part), count))
        if not (gradients and loss.requires_grad):
            return loss.item(), map(torch.zeros_like, weights)
        grads = torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True)
        return loss.item(), grads

    parts = {f"row {row}": slice(row, row + 1) for row in range(len(step["labels"]))}
    with evaluation_mode(model), torch.enable_grad():
        model.training = True  # at the top alone, where hooks and heads look it up
        for name, rows in {"the whole batch": slice(None), **parts}.items():
            part = {column: values[rows] for column, values in step.items()}
            loss, gradient = measure(compute_loss, part)
            exact, expected = measure(exact_loss, part)
            masked = int((part["labels"] != -100).sum())
            about = f"{name}, {masked} of the step's {count} masked tokens"
            if not math.isclose(loss, exact, rel_tol=rtol, abs_tol=atol):
                raise AssertionError(
                    f"{about}: the loss is {loss:.7g}, the exact one {exact:.7g}; it must be the "
                    f"sum over these tokens divided by {count}"
                )
            pairs = [*zip(gradient, expected, strict=True)]
            errors = [float((values - others).norm()) for values, others in pairs]
            norm = math.hypot(*(float(others.norm()) for _, others in pairs))
            if gradients and not math.hypot(*errors) <= rtol * norm + atol:
                worst = [*trained][errors.index(max(errors))]
                raise AssertionError(
                    f"{about}: the loss is exact, its gradient is off by {math.hypot(*errors):.3g} "
                    f"for a norm of {norm:.3g}, most of all for {worst!r}"
                )
