"""The loss and the gradient of torch's cross entropy, in the memory of the logits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from mlmadapt.model import head as loss_file
from mlmadapt.model.head import summed_cross_entropy


def loss_and_gradient(
    logits: torch.Tensor, labels: torch.Tensor, *, ours: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss times 3 and its gradient, of logits that a linear layer gives."""
    leaf = logits.clone().requires_grad_()
    given = leaf * 1.0
    if ours:
        loss = summed_cross_entropy(given, labels)
    else:
        loss = functional.cross_entropy(given, labels, reduction="sum")
    (loss * 3).backward()
    return loss.detach(), leaf.grad


@given(st.integers(0, 40), st.integers(1, 50), st.integers(0, 5), st.integers(1, 300))
def test_same_as_torch(tokens: int, vocabulary: int, seed: int, at_once: int) -> None:
    """Whatever the sizes, however many logits are taken at once, targets or none."""
    generator = torch.Generator().manual_seed(seed)
    logits = 30 * torch.randn(tokens, vocabulary, generator=generator, dtype=torch.float64)
    labels = torch.randint(vocabulary, (tokens,), generator=generator)
    labels[torch.rand(tokens, generator=generator) < 0.3] = -100
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss_file, "_LOGITS_AT_ONCE", at_once)
        found = loss_and_gradient(logits, labels, ours=True)
    torch.testing.assert_close(found, loss_and_gradient(logits, labels, ours=False))


def test_the_gradient_lies_where_the_logits_lay() -> None:
    """No array of their size is made."""
    logits = torch.randn(5, 7, requires_grad=True) * 1.0
    logits.retain_grad()
    summed_cross_entropy(logits, torch.arange(5)).backward()
    torch.testing.assert_close(logits.detach(), logits.grad)


def test_logits_that_are_needed_again_are_an_error() -> None:
    """Not a wrong gradient: the exponential's own backward pass reads what it returned."""
    logits = torch.randn(5, 7, requires_grad=True).exp()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        summed_cross_entropy(logits, torch.arange(5)).backward()


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_what_is_not_finite_shows(value: float) -> None:
    """In the loss, as torch's, and where nothing is to be predicted not at all."""
    logits = torch.zeros(2, 3)
    logits[0, 1] = value
    for labels in (torch.tensor([1, 2]), torch.tensor([0, 2]), torch.tensor([-100, 2])):
        expected = functional.cross_entropy(logits, labels, reduction="sum")
        found = summed_cross_entropy(logits, labels)
        assert torch.equal(found.isfinite(), expected.isfinite())
