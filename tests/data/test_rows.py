"""Rows of any length, joined, split and laid out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mlmadapt.data.rows import (
    are_frozen,
    document_bounds,
    join_frozen,
    join_rows,
    pad_rows,
    split_rows,
    to_columns,
)
from mlmadapt.testing import tiny_tokenizer

tokenizer = tiny_tokenizer("wordpiece")
rows = st.lists(st.lists(st.integers(0, 400), max_size=9), min_size=1, max_size=8)


@given(rows, st.sampled_from([None, 1, 4, 8]), st.sampled_from(["left", "right"]))
def test_padding_is_that_of_the_tokenizer_on_the_right(
    ids: list[list[int]], multiple: int | None, side: str
) -> None:
    """As `tokenizer.pad` does, whatever its side, and labels and other columns of any length."""
    tokenizer = tiny_tokenizer("wordpiece")
    tokenizer.padding_side = side
    features: list[dict[str, Any]] = [
        {"input_ids": row, "token_type_ids": [1] * len(row)} for row in ids
    ]
    columns = to_columns([{**feature, "labels": feature["input_ids"]} for feature in features])
    batch = pad_rows(*join_rows(columns), tokenizer, pad_to_multiple_of=multiple)
    expected = tokenizer.pad(features, pad_to_multiple_of=multiple, padding_side="right")
    for name in ("input_ids", "token_type_ids", "attention_mask"):
        assert batch[name].tolist() == expected[name]
    labels = np.where(batch["attention_mask"] == 1, batch["input_ids"], -100)
    assert batch["labels"].tolist() == labels.tolist()


@given(rows, st.sampled_from([list, np.array, torch.tensor, tuple]))
def test_joined_rows_can_be_split(ids: list[list[int]], form: Any) -> None:
    """Splitting undoes joining, for any form of rows; empty arrays of floats are no floats."""
    joined, lengths = join_rows({"input_ids": [form(row) for row in ids]})
    assert joined["input_ids"].tolist() == [token for row in ids for token in row]
    assert joined["input_ids"].dtype == np.int64
    assert [row.tolist() for row in split_rows(joined["input_ids"], lengths)] == ids


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([[True, False], [True, True]], [1, 0, 1, 1]),
        ([[255, 256], [0, 1]], [255, 256, 0, 1]),
        ([[0, 1], [-1, 2**40]], [0, 1, -1, 2**40]),
        ([np.array([1, 2], np.uint16), np.array([3, 4], np.int8)], [1, 2, 3, 4]),
        ([[1, 2], np.array([3, 4])], [1, 2, 3, 4]),
    ],
)
def test_whole_numbers_of_every_kind(values: Any, expected: list[int]) -> None:
    """Flags, small and large, negative, and of several types in one column."""
    joined, _ = join_rows({"input_ids": [[5, 6], [7, 8]], "extra": values})
    assert joined["extra"].tolist() == expected
    assert joined["extra"].flags.writeable  # or torch warns of the tensor it makes


@pytest.mark.parametrize("nothing", [None, float("nan")])
@pytest.mark.parametrize("form", [list, np.array, tuple])
def test_word_ids_can_hold_nothing(nothing: float | None, form: Any) -> None:
    """None and NaN are -1, in the first row or in a later one."""
    for words in ([[nothing, 0], [0, 300]], [[0, 300], [nothing, 0]]):
        formed = [form(row) for row in words]
        joined, _ = join_rows({"input_ids": [[5, 6], [7, 8]], "word_ids": formed})
        expected = [-1 if word is nothing else word for row in words for word in row]
        assert joined["word_ids"].tolist() == expected


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([[0.5, 1.0], [1.0, 1.0]], "holds float64"),
        ([[1.0, 1.0], [0.5, 1.0]], "holds float64"),
        ([np.array([0.5, 1]), np.array([1, 2])], "holds float64"),
        (["ab", "cd"], "is not a column of tokens: row 0 is 'ab', of type str"),
        ([["1", "2"], ["3", "4"]], "holds <U1"),
        ([[None, 1], [1, 2]], "holds object"),
        ([[1, 2], [None, 2]], "holds object"),
        ([[[1, 2], [3, 4]], [[5, 6], [7, 8]]], r"holds int64 of shape \(4, 2\)"),
        ([[[1], [3, 4]], [[5, 6], [7, 8]]], "holds something else .*inhomogeneous"),
        ([[1, 2], [[3], [4, 5]]], "holds something else .*inhomogeneous"),
        ([[1, 2], [2**70, 4]], "holds object"),
        (np.zeros((2, 2, 3), int), r"holds int64 of shape \(4, 3\)"),
        ([[1, 2], None], "is not a column of tokens: row 1 is None, of type NoneType"),
        ([1, 2], "is not a column of tokens: row 0 is 1, of type int"),
        (torch.tensor([1, 2]), r"is not a column of tokens: row 0 is tensor\(1\), of type Tensor"),
        ([[1, 2], {"a": 1}], "is not a column of tokens: row 1 is {'a': 1}, of type dict"),
        ([[1, 2]], "has 1 rows, 'input_ids' has 2; all columns must come from the same"),
    ],
)
def test_columns_that_are_not_one_number_a_token(values: Any, message: str) -> None:
    """The column and what it holds."""
    with pytest.raises(ValueError, match=rf"column 'extra' {message}"):
        join_rows({"input_ids": [[5, 6], [7, 8]], "extra": values})


def test_rows_without_tokens() -> None:
    """The missing column or the first row that differs, and what to do."""
    message = "row 1 has 2 'input_ids' but 1 'extra'; all .* together, or remove 'extra'"
    with pytest.raises(ValueError, match=message):
        join_rows({"extra": [[1, 2], [3]], "input_ids": [[5, 6], [7, 8]]})
    with pytest.raises(ValueError, match=r"the batch has \['labels'\], without 'input_ids'; tok"):
        join_rows({"labels": [[1]]})
    with pytest.raises(ValueError, match=r"column 'input_ids' is not .* row 0 is None"):
        join_rows({"input_ids": [None]})


def test_empty_rows_hide_no_document_that_falls() -> None:
    """Empty rows, wherever they stand, are neither an error nor a reason to overlook one."""
    for bounds in ([0, 0, 4], [0, 4, 4], [0, 2, 2, 4]):
        assert document_bounds(np.array([0, 1, 1, 2]), np.array(bounds))[-1] == 4
    with pytest.raises(ValueError, match="row 1 of the batch fall from 1 to 0"):
        document_bounds(np.array([0, 1, 0]), np.array([0, 0, 3]))


@given(st.data(), st.sampled_from([list, np.array, torch.tensor]))
def test_one_frozen_row_tells(data: st.DataObject, kind: Any) -> None:
    """Of lists, arrays and tensors, wherever it stands, by its labels or by its words."""
    names = ("input_ids", "labels", "word_ids", "attention_mask")
    columns: dict[str, Any] = {name: [] for name in names}
    for length in data.draw(st.lists(st.integers(0, 6), min_size=1, max_size=4)):
        tokens = data.draw(st.lists(st.integers(5, 9), min_size=length, max_size=length))
        some = st.tuples(*[st.sampled_from([token, token, token, -100, 4]) for token in tokens])
        columns["input_ids"].append(tokens)
        columns["labels"].append([*data.draw(some | st.just(tokens) | st.just([-100] * length))])
        for name, low in (("word_ids", -1), ("attention_mask", 0)):
            numbers = st.lists(st.integers(low, 1), min_size=length, max_size=length)
            columns[name].append(data.draw(numbers))
    quadruples = [
        quadruple
        for row in zip(*columns.values(), strict=True)
        for quadruple in zip(*row, strict=True)
    ]
    for left_out in ((), ("attention_mask",), ("word_ids",)):
        expected = any(
            label not in (-100, token)
            or (
                label == -100
                and word >= 0
                and "word_ids" not in left_out
                and (real or "attention_mask" in left_out)
            )
            for token, label, word, real in quadruples
        )
        made = {n: [kind(row) for row in rows] for n, rows in columns.items() if n not in left_out}
        assert are_frozen(made) == expected


@pytest.mark.parametrize(
    ("labels", "is_told"),
    [
        ([[7, -100], [9]], True),
        ([[4, 8], [9]], False),
        ([1, 0], False),  # a class
        ([["B", "O"], ["O"]], False),
        ([[7], [9]], False),  # of words, not of tokens
    ],
)
def test_labels_of_something_else_are_no_masks(labels: Any, is_told: bool) -> None:  # noqa: FBT001
    """Classes and words have labels too, and such a column was never looked at."""
    assert are_frozen({"input_ids": [[4, 8], [9]], "labels": labels}) == is_told
    assert are_frozen({"masked_labels": [[7]], "masked_input_ids": [[7]], "labels": labels})


def test_frozen_rows_lose_what_is_not_theirs() -> None:
    """The prefix, columns beside it, and the words, unless these are asked for."""
    columns = {"input_ids": [[7, 8], [9]], "labels": [[7, -100], [9]], "word_ids": [[0, 1], [0]]}
    joined, lengths = join_frozen(columns)
    assert set(joined) == {"input_ids", "labels"}
    assert lengths.tolist() == [2, 1]
    prefixed = {f"masked_{name}": values for name, values in columns.items() if name != "word_ids"}
    kept = join_frozen({**columns, **prefixed}, with_words=True).columns
    assert kept.pop("word_ids").tolist() == [0, 1, 0]
    assert all((kept[name] == joined[name]).all() for name in joined)
