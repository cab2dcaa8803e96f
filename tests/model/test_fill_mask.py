"""Masks filled in: what the model thinks, and nothing moved by asking."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest
import torch

from mlmadapt.model.forward import MaskedForward
from mlmadapt.model.head import SparsePrediction
from mlmadapt.testing import tiny_model, tiny_tokenizer
from mlmadapt.training.model_card import fill_masks, read_sentences
from tests.scripts.short_run import global_states

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

SENTENCES = ["This is a great [MASK].", "[MASK] film", "The story is [MASK] boring, I think!"]


def guess(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, sentence: str) -> str:
    """Fill a mask in the plainest way: the tokenizer's own call, all logits, a sort."""
    encoding = tokenizer(sentence.replace("[MASK]", tokenizer.mask_token), return_tensors="pt")
    (place,) = (encoding["input_ids"][0] == tokenizer.mask_token_id).nonzero()
    with torch.no_grad():
        chances = model(**encoding).logits[0, place[0]].softmax(-1).tolist()
    best = sorted(range(len(chances)), key=lambda token: -chances[token])[:5]
    return ", ".join(f"{tokenizer.decode([i]).strip()} {chances[i]:.1%}" for i in best)


@pytest.mark.parametrize("is_sparse", [False, True])
def test_the_five_likeliest_words(tokenizer: PreTrainedTokenizerFast, *, is_sparse: bool) -> None:
    """As the whole head gives them, whatever the tokenizer calls its mask."""
    model = tiny_model(tokenizer)
    with torch.no_grad():  # random weights find all words about as likely
        model.get_output_embeddings().weight.mul_(50)
    expected = {each: guess(model, tokenizer, each) for each in SENTENCES}
    sparse = SparsePrediction(model) if is_sparse else None
    predictor = MaskedForward(device=model.device, sparse=sparse)
    assert fill_masks(model, SENTENCES, tokenizer=tokenizer, predictor=predictor) == expected
    own = [each.replace("[MASK]", tokenizer.mask_token) for each in SENTENCES]
    filled = fill_masks(model, own, tokenizer=tokenizer, predictor=predictor)
    assert list(filled.values()) == list(expected.values())


def test_asking_moves_nothing(bert: PreTrainedModel, wordpiece: PreTrainedTokenizerFast) -> None:
    """Neither mode nor generators nor the tokenizer's own padding and truncation."""
    wordpiece.backend_tokenizer.enable_padding(length=9)
    wordpiece.backend_tokenizer.enable_truncation(4)
    state = wordpiece.backend_tokenizer.to_str()
    states = global_states()
    bert.train()
    first = fill_masks(bert, SENTENCES, tokenizer=wordpiece)
    assert fill_masks(bert, SENTENCES, tokenizer=wordpiece) == first
    assert bert.training
    assert global_states() == states
    assert wordpiece.backend_tokenizer.to_str() == state


@pytest.mark.parametrize(("sentence", "masks"), [("No gap.", 0), ("[MASK] [MASK]", 2)])
def test_a_sentence_has_one_mask(
    wordpiece: PreTrainedTokenizerFast, sentence: str, masks: int
) -> None:
    """Two would be filled in as if the other were one."""
    message = f"fill_mask has {sentence!r} with {masks} masks; each sentence must have one"
    with pytest.raises(ValueError, match=re.escape(message)):
        read_sentences(["a [MASK]", sentence], wordpiece)


def test_one_string_is_no_list() -> None:
    """It would be read letter by letter."""
    with pytest.raises(TypeError, match=r"fill_mask is 'a \[MASK\]'; it must be a list"):
        read_sentences("a [MASK]", tiny_tokenizer())
