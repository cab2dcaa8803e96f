from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from film_reviews import WholeWords, adapt, compute_loss, cut_reviews

from mlmadapt.testing import (
    assert_masks_reproducible,
    assert_resumes_exactly,
    assert_same_loss,
    assert_tokens_kept,
    assert_whole_words_masked,
    tiny_rows,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

families = pytest.mark.parametrize(
    "mlmadapt_tokenizer", ["wordpiece", "byte_bpe", "unigram"], indirect=True
)


@families
def test_masks_cover_whole_words(
    mlmadapt_tokenizer: PreTrainedTokenizerFast, collator: WholeWords
) -> None:
    """The batch of a page of reviews has no word that is half masked."""
    reviews = tiny_rows(mlmadapt_tokenizer, 32)
    assert_whole_words_masked(collator(reviews), reviews, tokenizer=mlmadapt_tokenizer)


@families
def test_masks_depend_on_the_review_alone(
    mlmadapt_tokenizer: PreTrainedTokenizerFast, collator: WholeWords
) -> None:
    """Whichever reviews share its batch, a review has the same masks."""
    assert_masks_reproducible(collator, tiny_rows(mlmadapt_tokenizer, 8), num_workers=1)


@families
def test_no_token_is_lost(mlmadapt_tokenizer: PreTrainedTokenizerFast) -> None:
    """Cut reviews hold what the reviews held."""
    reviews = tiny_rows(mlmadapt_tokenizer, 32)
    assert_tokens_kept(reviews, cut_reviews(reviews, chunk_size=16), tokenizer=mlmadapt_tokenizer)


@pytest.mark.parametrize("mlmadapt_model", ["bert", "distilbert"], indirect=True)
def test_the_loss_is_exact(mlmadapt_model: PreTrainedModel, collator: WholeWords) -> None:
    """Under gradient accumulation too."""
    assert_same_loss(compute_loss, mlmadapt_model, collator(tiny_rows(collator.tokenizer, 6)))


def test_a_kill_costs_nothing() -> None:
    """A run that is killed and resumed ends with the same weights and history."""
    assert_resumes_exactly(adapt)
