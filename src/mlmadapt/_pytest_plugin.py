"""Fixtures for the tests of every project that has mlmadapt installed.

pytest loads this file at its start, whether or not a test asks for a fixture. So this file imports
nothing that is not loaded already; a fixture loads what it needs when a test asks for it.
"""
# ruff: noqa: PLC0415

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


@pytest.fixture
def mlmadapt_tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    """Make a tiny tokenizer, WordPiece unless parametrized indirectly with another kind.

    It is new for each test, yours to change; only its training is shared::

        @pytest.mark.parametrize("mlmadapt_tokenizer", ["byte_bpe"], indirect=True)
        def test_films(mlmadapt_tokenizer):
            assert mlmadapt_tokenizer.mask_token == "<mask>"

    Returns:
        The tokenizer, as `mlmadapt.testing.tiny_tokenizer` makes it.

    Raises:
        ValueError: If the parameter is not a kind of tokenizer.
    """
    from mlmadapt.testing import tiny_tokenizer

    return tiny_tokenizer(getattr(request, "param", "wordpiece"))


@pytest.fixture
def mlmadapt_model(
    request: pytest.FixtureRequest, mlmadapt_tokenizer: PreTrainedTokenizerFast
) -> PreTrainedModel:
    """Make a tiny model for `mlmadapt_tokenizer`, BERT unless parametrized indirectly.

    It is new for each test, yours to train, and has the same weights each time::

        @pytest.mark.parametrize("mlmadapt_model", ["distilbert"], indirect=True)
        def test_predictions(mlmadapt_model, mlmadapt_tokenizer):
            inputs = mlmadapt_tokenizer("a [MASK] film", return_tensors="pt")
            assert mlmadapt_model(**inputs).logits.shape[-1] == len(mlmadapt_tokenizer)

    Returns:
        The model, as `mlmadapt.testing.tiny_model` makes it.

    Raises:
        ValueError: If the parameter is not an architecture with a masked-language-model head.
    """
    from mlmadapt.testing import tiny_model

    return tiny_model(mlmadapt_tokenizer, architecture=getattr(request, "param", "bert"))
