"""From a batch to the logits of its masked tokens, by a mask that the device is not asked about."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
from tests.model.test_documents import IS_OLD

from mlmadapt.model import forward as predictors
from mlmadapt.model.checks import evaluation_mode
from mlmadapt.model.document_mask import is_near
from mlmadapt.model.evaluation import FrozenCollator
from mlmadapt.model.forward import predicting
from mlmadapt.model.head import masked_logits
from mlmadapt.testing import tiny_model, tiny_tokenizer
from tests.scripts.short_run import freeze, make_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from mlmadapt._types import Batch

ARCHITECTURES = (
    "albert",
    "bert",
    "deberta-v2",
    "distilbert",
    "electra",
    "modernbert",
    "mpnet",
    "roberta",
)


def make_batch(count: int = 4, *, side: str = "right") -> Batch:
    """Make a padded batch of rows of mixed lengths."""
    tokenizer = tiny_tokenizer()
    tokenizer.padding_side = side
    return FrozenCollator(tokenizer)(freeze(make_rows(count)))


def plain(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """Predict with the batch's own mask."""
    inputs = {name: values for name, values in batch.items() if name != "labels"}
    return masked_logits(model(**inputs), batch["labels"] != -100)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_are_those_of_the_plain_mask(architecture: str, attention: str, side: str) -> None:
    """To the bit, whatever mask is sent; of rows with padding and without."""
    model = tiny_model(tiny_tokenizer(), architecture=architecture)
    if architecture != "deberta-v2":
        model.set_attn_implementation(attention)
    padded = make_batch(side=side)
    full = {name: values[:, 10:20] for name, values in padded.items()}
    full["attention_mask"] = torch.ones_like(full["attention_mask"])
    for batch in (padded, full):
        assert (batch["labels"] != -100).any()
        with predicting(model, padded, is_packed=False) as predictor, evaluation_mode(model):
            found, targets = replace(predictor, sparse=None)(model, batch)
            assert torch.equal(found, plain(model, batch))
            assert torch.equal(targets, batch["labels"][batch["labels"] != -100])


@pytest.mark.skipif(IS_OLD, reason="transformers makes other masks")
def test_the_mask_that_is_sent() -> None:
    """None where nothing is padded; a square where it does the same, which in eager it does not."""
    for attention, shape in (("sdpa", (4, 1)), ("eager", (4,))):
        model = tiny_model(tiny_tokenizer())
        model.set_attn_implementation(attention)
        seen: list[Any] = []
        model.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append(kwargs.get("attention_mask")),  # noqa: B023
            with_kwargs=True,
        )
        batch = make_batch()
        length = batch["input_ids"].shape[1]
        with predicting(model, batch, is_packed=False) as predictor, torch.no_grad():
            predictor(model, batch)
            assert seen[-1].shape == (*shape, *(length for _ in range(len(shape))))
            batch["attention_mask"].fill_(1)
            predictor(model, batch)
            assert seen[-1] is None


def test_a_model_that_wants_a_mask_gets_it() -> None:
    """Where leaving it out, or a square, changes the logits or fails."""

    def refuse(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        mask = kwargs["attention_mask"]
        assert mask.dim() == 2
        return args, {**kwargs, "attention_mask": None}

    model = tiny_model(tiny_tokenizer())
    model.register_forward_pre_hook(refuse, with_kwargs=True)
    with predicting(model, make_batch(), is_packed=False) as predictor:
        assert not predictor.is_free
        assert predictor.to_square is None
        predictor(model, make_batch())


def test_a_window_is_kept_though_the_probe_is_shorter() -> None:
    """On rows within the window a square does the same, and on longer ones it would reach on."""
    model = tiny_model(tiny_tokenizer(), architecture="modernbert")
    batch = make_batch()
    probe = {name: values[:, :20] for name, values in batch.items()}
    assert batch["input_ids"].shape[1] > 64  # its window
    with predicting(model, probe, is_packed=False) as predictor, evaluation_mode(model):
        found, _ = replace(predictor, sparse=None)(model, batch)
        assert torch.equal(found, plain(model, batch))
        if IS_OLD:  # where its layers take no mask of their own
            return
        assert predictor.to_square
        without = partial(predictor.to_square.func, window=None)
        found, _ = replace(predictor, sparse=None, to_square=without)(model, batch)
        assert not torch.equal(found, plain(model, batch))


def test_a_window_of_another_kind_keeps_the_plain_mask() -> None:
    """Of it, rows as short as the first tell nothing."""
    model = tiny_model(tiny_tokenizer())
    model.config.attention_window = 4
    with predicting(model, make_batch(), is_packed=False) as predictor:
        assert predictor.to_square is None


@pytest.mark.skipif(IS_OLD, reason="its layers take no mask of their own")
@pytest.mark.parametrize("off", [-1, 1])
def test_another_window_than_the_model_has_is_noticed(
    monkeypatch: pytest.MonkeyPatch, off: int
) -> None:
    """By a token to each side, though the first row has far fewer; it then keeps the plain mask."""
    monkeypatch.setattr(
        predictors, "is_near", lambda length, window, device: is_near(length, window + off, device)
    )
    model = tiny_model(tiny_tokenizer(), architecture="modernbert")
    probe = {name: values[:, :20] for name, values in make_batch().items()}
    with predicting(model, probe, is_packed=False) as predictor:
        assert predictor.to_square is None
