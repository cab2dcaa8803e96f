"""Rows with masks frozen into them: told from others, and joined as they are.

What is masked once more over its masks, or evaluated without any, gives a figure that looks like
any other. So all rows are asked whether they are frozen.
"""

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import numpy as np

from mlmadapt.data.rows import JoinedRows, document_bounds, join_column, join_rows

# The columns by which rows tell.
TELLING = ("input_ids", "labels", "word_ids", "attention_mask", "masked_labels")


def starts_as_copy(columns: Mapping[str, Any]) -> bool:
    """Tell whether the first row is surely not frozen: it has no labels, or a copy of its tokens.

    Examples:
        >>> starts_as_copy({"input_ids": [[7], [4]], "labels": [[7], [8]], "word_ids": [[0], [0]]})
        True
    """
    if {"input_ids", "labels", "word_ids"} <= columns.keys() and "masked_labels" not in columns:
        return np.array_equal(columns["labels"][0], columns["input_ids"][0])
    return columns.keys().isdisjoint(["labels", "masked_labels"])


def are_frozen(name: str, columns: Mapping[str, Any]) -> bool:
    """Tell whether rows have masks frozen into them.

    A frozen row has the prefix ``masked_``, a label that differs from its token, or a word without
    a label. The labels of `group_texts` are a copy of the tokens, perhaps with -100 at the padding.
    A row whose targets all kept their token tells by its words only; one of less than 8 tokens can
    look like a copy.

    Args:
        name: What the error calls the rows.
        columns: Lists of rows by name; ``labels`` may be None.

    Raises:
        ValueError: If some are frozen and others are not.

    Examples:
        >>> columns = {"input_ids": [[7, 8]], "labels": [[7, -100]]}
        >>> are_frozen("the batch", columns)
        False
        >>> are_frozen("the batch", {**columns, "word_ids": [[0, 1]]})
        True
    """
    if "masked_labels" in columns or not {"input_ids", "labels"} <= columns.keys():
        return "masked_labels" in columns
    labels, tokens = columns["labels"], columns["input_ids"]
    with suppress(RuntimeError, ValueError):  # arrays have no one truth
        if (labels == tokens) is True:
            return False
    try:
        pairs = zip(labels, tokens, strict=True)
        given = [row if label is None else label for label, row in pairs]
        joined, lengths = join_rows({"input_ids": tokens, "labels": given})
        is_none, is_other = joined["labels"] == -100, joined["labels"] != joined["input_ids"]
        others = {n: join_column(n, columns[n]) for n in TELLING[2:4] if n in columns}
        is_word = others.get("word_ids", np.full(len(is_none), -1)) >= 0
        is_word &= others.get("attention_mask", is_word) != 0
    except ValueError:  # they are labels of something else
        return False
    tells = np.where(is_none, is_word, is_other)
    bounds = np.append(0, np.cumsum(lengths))
    told, other = (np.diff(np.append(0, np.cumsum(each))[bounds]) for each in (tells, is_other))
    frozen, unfrozen = int((told > 0).sum()), int(((other == 0) & (lengths >= 8)).sum())
    if frozen and unfrozen:
        raise ValueError(
            f"{name} is frozen in part: {frozen} rows have masks frozen into them, {unfrozen} have "
            "none ('labels' that are a copy of 'input_ids', or missing); freeze all rows by "
            "insert_random_mask, or none"
        )
    return frozen > 0


def join_frozen(columns: Mapping[str, Any], *, with_words: bool = False) -> JoinedRows:
    """Lay frozen rows one after the other as `join_rows` does, without their ``masked_`` prefix.

    Args:
        columns: The columns of the rows, with the prefix, which leaves others out, or without.
        with_words: Keep ``word_ids``.

    Raises:
        ValueError: As `join_rows` and `document_bounds` do.

    Examples:
        >>> columns = {"masked_input_ids": [[4, 8]], "masked_labels": [[7, -100]], "other": ["x"]}
        >>> join_frozen(columns).columns
        {'input_ids': array([4, 8]), 'labels': array([   7, -100])}
    """
    prefix = "masked_" if "masked_labels" in columns else ""
    frozen = {
        name.removeprefix(prefix): rows
        for name, rows in columns.items()
        if (with_words if name == "word_ids" else name.startswith(prefix))
    }
    joined, lengths = join_rows(frozen)
    if "document_ids" in joined:
        document_bounds(joined["document_ids"], np.append(0, np.cumsum(lengths)))
    return JoinedRows(joined, lengths)
