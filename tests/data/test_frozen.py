"""Rows with fixed masks are told from others, whatever they are made of, and laid out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mlmadapt.data.frozen import are_frozen, join_frozen

LONG = [*range(7, 17)]


def reference_counts(columns: dict[str, Any]) -> tuple[int, int]:
    """Count the rows that tell that they are frozen, and that they are not, token by token."""
    counts = [0, 0]
    for row in range(len(columns["input_ids"])):
        tokens, labels = columns["input_ids"][row], columns["labels"][row]
        words = columns.get("word_ids", {row: [-1] * len(tokens)})[row]
        real = columns.get("attention_mask", {row: [1] * len(tokens)})[row]
        labels = tokens if labels is None else labels
        tells = [
            word >= 0 and attended > 0 if label == -100 else label != token
            for token, label, word, attended in zip(tokens, labels, words, real, strict=True)
        ]
        counts[0] += any(tells)
        counts[1] += len(tokens) >= 8 and tokens == labels
    return counts[0], counts[1]


@given(st.data(), st.sampled_from([list, np.array, torch.tensor]), st.sets(st.sampled_from("wa")))
def test_rows_tell_as_the_reference_has_it(
    data: st.DataObject, kind: Any, given_: set[str]
) -> None:
    """Rows of lists, arrays and tensors, with words and padding or without, and labels missing."""
    columns: dict[str, Any] = {"input_ids": [], "labels": [], "word_ids": [], "attention_mask": []}
    for length in data.draw(st.lists(st.integers(0, 10), min_size=1, max_size=4)):
        tokens = data.draw(st.lists(st.integers(5, 9), min_size=length, max_size=length))
        some = [st.sampled_from([token, token, token, -100, 4]) for token in tokens]
        none_of_them, copy = st.just([-100] * length), st.just(tokens)
        columns["labels"].append(data.draw(st.one_of(copy, st.tuples(*some), none_of_them)))
        columns["input_ids"].append(tokens)
        for name in ("word_ids", "attention_mask"):
            low = -1 if name == "word_ids" else 0
            column = st.lists(st.integers(low, 1), min_size=length, max_size=length)
            columns[name].append(data.draw(column))
    columns["labels"] = [[*labels] for labels in columns["labels"]]
    left_out = {"word_ids", "attention_mask"} - {
        {"w": "word_ids", "a": "attention_mask"}[g] for g in given_
    }
    columns = {name: columns[name] for name in columns if name not in left_out}
    frozen, unfrozen = reference_counts(columns)
    made = {name: [kind(row) for row in rows] for name, rows in columns.items()}
    if frozen and unfrozen:
        message = f"rows is frozen in part: {frozen} rows have masks .*, {unfrozen} have none .*all"
        with pytest.raises(ValueError, match=message):
            are_frozen("rows", made)
    else:
        assert are_frozen("rows", made) == (frozen > 0)


@pytest.mark.parametrize(
    ("labels", "is_told"),
    [
        ([[7, -100], [9]], True),
        ([[4, 8], [9]], False),
        ([1, 0], False),  # a class
        ([["B", "O"], ["O"]], False),
        ([[7], [9]], False),  # of words, not of tokens
        ([None, None], False),
    ],
)
def test_labels_of_something_else_are_no_masks(labels: Any, is_told: bool) -> None:  # noqa: FBT001
    """Classes and words have labels too, and such a column was never looked at."""
    assert are_frozen("rows", {"input_ids": [[4, 8], [9]], "labels": labels}) == is_told


def test_rows_without_labels_among_frozen_ones_are_counted() -> None:
    """As joined datasets have them, of which one had no labels; at most 300 characters."""
    columns = {"input_ids": [LONG, LONG, [4]], "labels": [None, LONG, [7]]}
    with pytest.raises(ValueError, match=r"^the batch .* part: 1 rows .*, 2 have none") as error:
        are_frozen("the batch", columns)
    assert len(str(error.value)) <= 300
    padded = {"input_ids": [[7, 0]], "labels": [[7, -100]], "word_ids": [[0, 0]]}
    assert are_frozen("the batch", padded)
    assert not are_frozen("the batch", {**padded, "attention_mask": [[1, 0]]})
    assert are_frozen("the batch", {"masked_labels": [[7]], "masked_input_ids": [[7]]})


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
