"""Assertions about rows, for tests of any library's way to cut documents, or to pack them."""
# ruff: noqa: PLC0415 (numpy is loaded by the functions that need it)

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from mlmadapt.testing.masks import name_token

if TYPE_CHECKING:
    from collections.abc import Collection

    import numpy as np
    import numpy.typing as npt
    from transformers import PreTrainedTokenizerBase

    Columns = dict[str, npt.NDArray[np.int64]]


def assert_tokens_kept(
    examples: Any,
    chunks: Any,
    *,
    max_dropped: int = 0,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> None:
    """Assert that chunking loses, adds and moves no token, and neither joins nor cuts a word.

    ``input_ids`` are compared in order, ``token_type_ids`` too where both have them, and padding
    (by ``attention_mask``) is left out. Where both have ``word_ids``, neighbors in a chunk must
    belong to one word exactly if they did before: the last word of a document and the first of the
    next are two words, though both may have number 0. Only the edge of a chunk may cut a word.

    Args:
        examples: What was chunked: a dict of columns, a list of rows, a `Dataset` or a
            ``pyarrow.Table``.
        chunks: The result, in order, in any of these forms.
        max_dropped: How many tokens may be missing at the end: ``chunk_size - 1`` for a remainder
            that is dropped after one pass over everything.
        tokenizer: Names tokens in messages.

    Raises:
        AssertionError: With chunk, position, token and example of the first fault.
        ValueError: If there are no rows or no ``input_ids``, or a column does not hold one whole
            number per token.
        TypeError: If one of several rows is not a dict.

    Examples:
        >>> documents = {"input_ids": [[5, 6, 7], [8]], "word_ids": [[0, 0, 1], [0]]}
        >>> chunks = {"input_ids": [[5, 6], [7, 8]], "word_ids": [[0, 0], [0, 1]]}
        >>> assert_tokens_kept(documents, chunks)
        >>> assert_tokens_kept(documents, {"input_ids": [[5, 6]]}, max_dropped=1)
        Traceback (most recent call last):
        AssertionError: the last 2 of 4 tokens are lost, from example 0, position 2, token 7 on; \
max_dropped is 1
    """
    __tracebackhide__ = True
    before, after = _join(examples), _join(chunks)
    total, left = len(before["input_ids"]), len(after["input_ids"])
    kept = min(total, left)

    name = partial(_name, tokenizer=tokenizer)
    for column in sorted({"input_ids", "token_type_ids"} & before.keys() & after.keys()):
        differ = before[column][:kept] != after[column][:kept]
        if differ.any():
            place = int(differ.argmax())
            raise AssertionError(
                f"{name('chunk', after, place)}, is not {name('example', before, place)}, whose "
                f"{column!r} should follow; of {total} tokens, {left} came out"
            )
    if left > kept:
        raise AssertionError(
            f"{name('chunk', after, kept)} on: {left - kept} tokens that no example has"
        )
    if total - kept > max_dropped:
        raise AssertionError(
            f"the last {total - kept} of {total} tokens are lost, from "
            f"{name('example', before, kept)} on; max_dropped is {max_dropped}"
        )
    if "word_ids" in before and "word_ids" in after:
        roles = [_roles(columns)[:kept] for columns in (before, after)]
        # A word that is cut by the edge of a chunk begins anew after it.
        roles[0][(after["position"][:kept] == 0) & (roles[0] == 2)] = 1
        differ = roles[0] != roles[1]
        if differ.any():
            place = int(differ.argmax())
            was, is_now = (_ROLES[role[place]] for role in roles)
            raise AssertionError(
                f"{name('chunk', after, place)}, is {is_now} by its word_ids, but "
                f"{name('example', before, place)}, was {was}"
            )


def assert_documents_kept(
    examples: Any, rows: Any, *, tokenizer: PreTrainedTokenizerBase | None = None
) -> None:
    """Assert that packing keeps each document whole, under a number of its own in one row.

    Rows, and documents in a row, may be in any order. A document that is longer than the longest
    row may be cut, and each part is then a document of its row; parts are looked for from the
    longest to the shortest. Compared are tokens, ``token_type_ids`` where both have them, and which
    tokens are one word where both have ``word_ids``. Padding (by ``attention_mask``) is left out.

    Args:
        examples: What was packed: a dict of columns, a list of rows, a `Dataset` or a
            ``pyarrow.Table``.
        rows: The result, in any of these forms, with ``document_ids`` that rise from document to
            document of a row.
        tokenizer: Names tokens in messages.

    Raises:
        AssertionError: With example or row, position and token of the first fault.
        ValueError: If there are no rows, no ``input_ids`` or no ``document_ids``, or a column does
            not hold one whole number per token.
        TypeError: If one of several rows is not a dict.

    Examples:
        >>> documents = {"input_ids": [[5, 6, 7], [8, 9], [4]]}
        >>> rows = {"input_ids": [[5, 6, 7, 4], [8, 9]], "document_ids": [[0, 0, 0, 1], [0, 0]]}
        >>> assert_documents_kept(documents, rows)
        >>> assert_documents_kept(documents, rows | {"document_ids": [[0, 0, 0, 0], [0, 0]]})
        Traceback (most recent call last):
        AssertionError: example 2, position 0, token 4 on: 1 tokens are a document in no \
row
    """
    __tracebackhide__ = True
    import numpy as np

    before, after = _join(examples), _join(rows)
    if "document_ids" not in after:
        raise ValueError("rows have no 'document_ids', which tell the documents of a row apart")
    names = before.keys() & after.keys() & {"token_type_ids", "word_ids"}
    whole, packed = _tokens(before, names), _tokens(after, names)
    name = partial(_name, tokenizer=tokenizer)
    steps = np.diff(after["document_ids"], prepend=0, append=0)
    begins_row = np.diff(after["row"], prepend=-1, append=-1) != 0
    bounds = np.flatnonzero(begins_row | (steps != 0))
    for place in bounds[~begins_row[bounds]]:
        if steps[place] < 0:
            raise AssertionError(f"{name('row', after, place)}, has a lower number than before it")
        if packed[place, -1] == 2:  # `_ROLES`
            raise AssertionError(f"{name('row', after, place)}, is of a word with another document")
    parts = [(start, _part(packed, start, end)) for start, end in pairwise(bounds.tolist())]
    left = Counter(part for _, part in parts)
    sizes = np.unique(np.diff(bounds))[::-1].tolist()
    longest = np.diff(np.flatnonzero(begins_row)).max(initial=0)
    ends = np.flatnonzero(np.diff(before["row"], prepend=-1, append=-1)).tolist()
    # Those that must be whole come first, so that no part of a longer one takes their place.
    for start, end in sorted(pairwise(ends), key=lambda bounds: bounds[1] - bounds[0]):
        place, allowed = start, sizes if end - start > longest else [end - start]
        while place < end:
            fitting = (_part(whole, place, place + size) for size in allowed if size <= end - place)
            part = next((part for part in fitting if left[part]), None)
            if part is None:
                where = name("example", before, place)
                raise AssertionError(f"{where} on: {end - place} tokens are a document in no row")
            left[part] -= 1
            place += len(part) // whole[0].nbytes
    for place, part in parts:
        if left[part]:
            where = name("row", after, place)
            raise AssertionError(f"{where} on: a document that is in rows more than in examples")


def _tokens(columns: Columns, names: Collection[str]) -> npt.NDArray[np.int64]:
    """Return what is compared of each token, its role in a word last."""
    import numpy as np

    words = _roles(columns) if "word_ids" in names else np.zeros_like(columns["row"])
    types = columns["token_type_ids"] if "token_type_ids" in names else np.zeros_like(words)
    return np.stack([columns["input_ids"], types, words], axis=1)


def _part(tokens: npt.NDArray[np.int64], start: int, end: int) -> bytes:
    """Return the same for the same document, where a word that is cut begins anew."""
    part = tokens[start:end].copy()
    part[:1, -1] = part[:1, -1] > 0
    return part.tobytes()


def _name(kind: str, columns: Columns, place: int, tokenizer: Any) -> str:
    token = name_token(columns["input_ids"][place], tokenizer)
    return f"{kind} {columns['row'][place]}, position {columns['position'][place]}, {token}"


_ROLES = ("of no word", "the first of a word", "of one word with the token before it")


def _roles(columns: Columns) -> npt.NDArray[np.int64]:
    """Return which of `_ROLES` each token has."""
    import numpy as np

    words, follows = columns["word_ids"], np.diff(columns["row"]) == 0
    roles = np.ones(len(words), np.int64)
    roles[1:][follows & (words[1:] == words[:-1])] = 2
    roles[words < 0] = 0
    return roles


def _join(data: Any) -> Columns:
    """Lay the rows of each token column end to end, with their numbers and without padding."""
    import numpy as np

    from mlmadapt.data.rows import join_rows, to_columns

    names = data.column_names if hasattr(data, "column_names") else None
    if names is None and not isinstance(data, Mapping):
        data = to_columns(data)
    columns = {}
    for name in ("input_ids", "token_type_ids", "attention_mask", "word_ids", "document_ids"):
        if name in (data if names is None else names):
            rows = data[name]
            columns[name] = rows.to_pylist() if hasattr(rows, "to_pylist") else list(rows)
    joined, lengths = join_rows(columns)
    joined["row"] = np.repeat(np.arange(len(lengths)), lengths)
    joined["position"] = np.arange(len(joined["row"])) - np.repeat(
        np.cumsum(lengths) - lengths, lengths
    )
    is_real = joined.pop("attention_mask", np.ones(len(joined["row"]))) != 0
    return {name: values[is_real] for name, values in joined.items()}
