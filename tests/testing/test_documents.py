"""An assertion about documents that share a row: a model that mixes them is found, and named."""

from __future__ import annotations

import pytest

from mlmadapt import isolate_documents
from mlmadapt.testing import assert_documents_isolated, tiny_model, tiny_tokenizer

ROWS = [{"input_ids": [7, 8, 9], "document_ids": [0, 0, 0]}]
PACKED = [*ROWS, {"input_ids": [7, 8, 9, 7, 8], "document_ids": [0, 0, 0, 1, 1]}]


def test_documents_that_are_apart_pass_and_mixed_ones_are_named() -> None:
    """By row, document and position; the model's mode stays."""
    model = tiny_model(tiny_tokenizer()).train()
    with isolate_documents(model):
        assert_documents_isolated(model, PACKED)
    assert model.training
    message = r"row 1, document 0 of 2: the logits at its position \d differ by 0.*; at most 1e-05"
    with pytest.raises(AssertionError, match=message):
        assert_documents_isolated(model, PACKED)


def test_rows_of_one_document_prove_nothing() -> None:
    """A model that mixes documents would pass."""
    with pytest.raises(ValueError, match="no row holds several documents; take rows from pack"):
        assert_documents_isolated(tiny_model(tiny_tokenizer()), ROWS)
