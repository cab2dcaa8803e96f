"""The collator under test can be chosen, to see the tests find the one with the mistake."""

from __future__ import annotations

from typing import TYPE_CHECKING

import film_reviews
import pytest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add an option of this project's own."""
    parser.addoption("--collator", default="WholeWords", choices=["WholeWords", "HalfWords"])


@pytest.fixture
def collator(
    request: pytest.FixtureRequest, mlmadapt_tokenizer: PreTrainedTokenizerFast
) -> film_reviews.WholeWords:
    """Make the collator for the tokenizer of the test."""
    return getattr(film_reviews, request.config.getoption("collator"))(mlmadapt_tokenizer)
