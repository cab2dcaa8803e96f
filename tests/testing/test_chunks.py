"""Assertions about rows: each kind of mistake is found and named, and what is right passes."""

from __future__ import annotations

import copy
import functools
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from mlmadapt import group_texts, pack_texts
from mlmadapt.testing import (
    TOKENIZER_KINDS,
    assert_documents_kept,
    assert_tokens_kept,
    tiny_corpus,
    tiny_rows,
    tiny_tokenizer,
)
from tests.data.reference_chunking import reference_group_texts

TOKENIZER = tiny_tokenizer()
shared = functools.cache(tiny_tokenizer)
kinds = st.sampled_from(TOKENIZER_KINDS)
documents = st.lists(
    st.sampled_from(tiny_corpus(40)) | st.text("aé .'-中电影film\n", max_size=20),
    min_size=1,
    max_size=6,
)


def columns_of(rows: list[dict[str, list[int]]]) -> dict[str, list[list[int]]]:
    """Turn rows into columns."""
    return {name: [row[name] for row in rows] for name in rows[0]}


def without_a_token(columns: dict[str, list[list[int]]], data: st.DataObject) -> Any:
    """Copy columns, but for some token."""
    broken = copy.deepcopy(columns)
    place = data.draw(st.integers(0, len(broken["input_ids"]) - 1))
    spot = data.draw(st.integers(0, len(broken["input_ids"][place]) - 1))
    for column in broken.values():
        del column[place][spot]
    return broken


@given(kind=kinds, texts=documents, size=st.integers(2, 9), data=st.data())
def test_right_rows_pass_and_a_lost_token_is_found(
    kind: str, texts: list[str], size: int, data: st.DataObject
) -> None:
    """Ours and the reference keep everything, in any order if packed; without a token, it fails."""
    examples = columns_of(tiny_rows(shared(kind), texts))
    for chunker in (group_texts, reference_group_texts):
        chunks = chunker(examples, chunk_size=size, remainder="keep")
        assert_tokens_kept(examples, chunks, tokenizer=shared(kind))
    with pytest.raises(AssertionError, match=r"tokens are lost|should follow"):
        assert_tokens_kept(examples, without_a_token(chunks, data))
    packed = pack_texts(examples, chunk_size=4 * size)
    order = data.draw(st.permutations(range(len(packed["input_ids"]))))
    rows = {name: [column[row] for row in order] for name, column in packed.items()}
    assert_documents_kept(examples, rows, tokenizer=shared(kind))
    with pytest.raises(AssertionError, match=r"are a document in no row"):
        assert_documents_kept(examples, without_a_token(rows, data))
    if any(row[-1] for row in rows["document_ids"]):
        joined = [[0] * len(row) for row in rows["document_ids"]]
        with pytest.raises(AssertionError, match=r"are a document in no row"):
            assert_documents_kept(examples, rows | {"document_ids": joined})


def test_documents_and_rows_come_in_any_form() -> None:
    """Tables, datasets, columns and rows, and rows that are padded on either side."""
    examples = tiny_rows(TOKENIZER, 20)
    rows = Dataset.from_list(examples)
    table = pa.table(columns_of(examples))
    assertions: list[Any] = [
        (assert_tokens_kept, group_texts(table, chunk_size=16, remainder="keep")),
        (assert_documents_kept, pack_texts(table, chunk_size=24)),
    ]
    for assert_kept, made in assertions:
        columns = made.to_pydict()
        width = max(map(len, columns["input_ids"]))
        padded = [
            {
                name: np.array([pad(row, width) for row in column])
                for name, column in columns.items()
            }
            for pad in (
                lambda row, width: row + [0] * (width - len(row)),
                lambda row, width: [0] * (width - len(row)) + row,
            )
        ]
        dataset = Dataset.from_dict(columns)
        forms = [made, columns, dataset, dataset.with_format("numpy"), list(dataset), *padded]
        for before in (examples, columns_of(examples), table, rows.with_format("torch")):
            for after in forms:
                assert_kept(before, after, tokenizer=TOKENIZER)


@pytest.fixture(name="examples")
def _examples() -> dict[str, list[list[int]]]:
    """Three documents without special tokens."""
    rows = tiny_rows(TOKENIZER, ["the unfilmable film", "film", "a film"])
    return columns_of([{name: values[1:-1] for name, values in row.items()} for row in rows])


def test_mistakes_of_chunkers_are_named(examples: dict[str, list[list[int]]]) -> None:
    """What is lost, added, moved, joined and cut is told with chunk, position and token."""
    right = group_texts(examples, chunk_size=4, remainder="keep", labels=False)
    assert right["word_ids"] == [[0, 1, 1, 1], [0, 1, 2, 3], [0]]
    film = r"token \d+ \('film'\)"
    mistakes: list[tuple[str, Any]] = [
        (
            rf"the last 1 of 9 tokens are lost, from example 2, position 1, {film} on; max_dro",
            group_texts(examples, chunk_size=4),
        ),
        (
            rf"chunk 1, position 2, {film}, is of one word with the token before .* was the first",
            right | {"word_ids": [[0, 1, 1, 1], [0, 1, 1, 3], [0]]},
        ),
        (
            r"chunk 0, position 3, .* is the first of a word by its word_ids, but example 0, pos",
            right | {"word_ids": [[0, 1, 1, 2], *right["word_ids"][1:]]},
        ),
        (
            r"chunk 1, position 1, .* is of no word by its word_ids, but example 0, position 5,",
            right | {"word_ids": [right["word_ids"][0], [0, -1, 1, 2], [0]]},
        ),
        (
            r"chunk 0, position 0, .* is not example 0, position 0, token .* 'input_ids' should",
            {name: rows[::-1] for name, rows in right.items()},
        ),
        (
            r"chunk 3, position 0, .* on: 1 tokens that no example has",
            {name: [*rows, rows[2]] for name, rows in right.items()},
        ),
        (
            "whose 'token_type_ids' should follow",
            right | {"token_type_ids": [[0] * 4, [0, 0, 1, 0], [0]]},
        ),
    ]
    for message, chunks in mistakes:
        with pytest.raises(AssertionError, match=message):
            assert_tokens_kept(examples, chunks, tokenizer=TOKENIZER)
    assert_tokens_kept(examples, group_texts(examples, chunk_size=4), max_dropped=3)


def test_mistakes_of_packers_are_named(examples: dict[str, list[list[int]]]) -> None:
    """What is lost, split, doubled, in another's place or under its number is told, with where."""
    right = pack_texts(examples, chunk_size=7)
    assert right["document_ids"] == [[0, 0, 0, 0, 0, 0, 1], [0, 0]]
    assert right["word_ids"] == [[0, 1, 1, 1, 1, 2, 3], [0, 1]]
    assert_documents_kept(examples, right)
    film = r"token \d+ \('film'\)"
    mistakes: list[tuple[str, Any]] = [
        (
            rf"example 1, position 0, {film} on: 1 tokens are a document in no row",
            {name: rows[1:] for name, rows in right.items()},
        ),
        (
            "example 2, position 0, token .* on: 2 tokens are a document in",
            right | {"document_ids": [right["document_ids"][0], [0, 1]]},
        ),
        (
            rf"row 0, position 6, {film}, has a lower number than before it",
            right | {"document_ids": [[1, 1, 1, 1, 1, 1, 0], [0, 0]]},
        ),
        (
            rf"row 0, position 6, {film}, is of a word with another document",
            right | {"word_ids": [[0, 1, 1, 1, 1, 2, 2], [0, 1]]},
        ),
        (
            "example 0, position 0, token .* on: 6 tokens",
            right | {"word_ids": [[0, 1, 1, 2, 2, 3, 4], [0, 1]]},
        ),
        (
            "row 1, position 0, token .* on: a document that is in rows more than in examples",
            {name: [*rows, rows[1]] for name, rows in right.items()},
        ),
        ("are a document in no row", right | {"token_type_ids": [[0] * 7, [0, 1]]}),
    ]
    for message, rows in mistakes:
        with pytest.raises(AssertionError, match=message):
            assert_documents_kept(examples, rows, tokenizer=TOKENIZER)
    with pytest.raises(ValueError, match="rows have no 'document_ids', which tell the documents"):
        assert_documents_kept(examples, examples)
