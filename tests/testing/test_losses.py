"""An assertion about losses: each wrong way to divide, sum or differentiate is found and named."""

from __future__ import annotations

import tempfile
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

from mlmadapt import WholeWordMaskingCollator, masked_lm_loss, sparse_prediction
from mlmadapt.testing import assert_same_loss, tiny_model, tiny_rows, tiny_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Batch = dict[str, Any]


@pytest.fixture(name="batch")
def _batch() -> Batch:
    """Rows with unequal numbers of targets, the last one without."""
    tokenizer = tiny_tokenizer()
    batch = WholeWordMaskingCollator(tokenizer, seed=0)(tiny_rows(tokenizer, 6))
    batch["labels"][-1] = -100
    return batch


def plainly(model: Any, batch: Batch, num_items: int) -> torch.Tensor:
    """Sum over the masked tokens and divide, in the plainest way."""
    logits = model(**{name: batch[name] for name in batch if name != "labels"}).logits
    losses = torch.nn.functional.cross_entropy(logits.mT, batch["labels"], reduction="none")
    return losses.sum() / num_items


@pytest.mark.parametrize("architecture", ["bert", "modernbert", "deberta-v2"])
def test_exact_losses_pass_and_the_model_stays_as_it_was(architecture: str, batch: Batch) -> None:
    """Plain, ours, sparse and through `Trainer`; modes, gradients and random state stay."""
    model = tiny_model(tiny_tokenizer(), architecture=architecture).train()
    model.base_model.eval()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    assert_same_loss(plainly, model, batch)
    assert_same_loss(lambda m, b, n: masked_lm_loss(m(**b), b["labels"], n), model, batch)
    with sparse_prediction(model), tempfile.TemporaryDirectory() as folder:
        assert_same_loss(lambda m, b, n: m(**b, num_items_in_batch=n).loss, model, batch)
        assert torch.equal(torch.get_rng_state(), state)
        trainer = Trainer(model, TrainingArguments(folder, use_cpu=True))
        assert_same_loss(
            lambda m, b, n: trainer.compute_loss(m, b, num_items_in_batch=n), model, batch
        )
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())
    arrays = {name: values.numpy() for name, values in batch.items()}
    assert_same_loss(lambda *args: plainly(*args).item(), model, arrays, gradients=False)


def stop_gradient(model: Any, batch: Batch, num_items: int) -> torch.Tensor:
    """Give the right loss of another gradient."""
    weights = model.bert.embeddings.position_embeddings.weight
    return plainly(model, batch, num_items) + weights.sum() - weights.sum().detach()


INEXACT = {
    "mean of the part": (
        lambda model, batch, _: masked_lm_loss(model(**batch), batch["labels"]),
        r"row 0, \d+ of the step's \d+ masked tokens: the loss is .*, the exact one",
    ),
    "sum": (lambda m, b, n: plainly(m, b, n) * n, "the whole batch, .* the loss is"),
    "all positions": (
        lambda m, b, n: plainly(m, b | {"labels": b["input_ids"]}, n),
        "the whole batch, .* the loss is",
    ),
    "not a number": (
        lambda m, b, n: plainly(m, b, n) / (b["labels"] != -100).any(),
        "row 5, 0 of the step's .* the loss is nan, the exact one 0",
    ),
    "no gradient": (lambda m, b, n: plainly(m, b, n).detach(), "its gradient is off by"),
    "other gradient": (
        stop_gradient,
        "most of all for 'bert.embeddings.position_embeddings.weight'",
    ),
}


@pytest.mark.parametrize("name", INEXACT)
def test_inexact_losses_are_found(name: str, bert: PreTrainedModel, batch: Batch) -> None:
    """Each is told with its row and both figures."""
    compute_loss, message = INEXACT[name]
    with pytest.raises(AssertionError, match=message):
        assert_same_loss(compute_loss, bert, batch)


def test_a_batch_without_targets_is_no_test(bert: PreTrainedModel, batch: Batch) -> None:
    """There is no loss to compare."""
    batch["labels"][:] = -100
    with pytest.raises(ValueError, match="no masked token: all its labels are -100"):
        assert_same_loss(plainly, bert, batch)
