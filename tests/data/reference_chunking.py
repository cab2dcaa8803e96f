"""Rows of one length, token by token: slow, and plain enough to be believed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


def reference_group_texts(
    columns: Mapping[str, Sequence[Sequence[Any]]],
    *,
    chunk_size: int = 128,
    remainder: str = "drop",
    labels: bool = True,
    documents: bool = False,
) -> dict[str, list[list[Any]]]:
    """Take one token at a time, and begin a row whenever the last one is full."""
    tokens = []
    count = len(next(iter(columns.values())))
    for document in range(count):
        rows = {name: column[document] for name, column in columns.items()}
        tokens += [
            {**dict(zip(rows, values, strict=True)), "document": document}
            for values in zip(*rows.values(), strict=True)
        ]

    chunks: list[list[dict[str, Any]]] = []
    for token in tokens:
        if not chunks or len(chunks[-1]) == chunk_size:
            chunks.append([])
        chunks[-1].append(token)
    if remainder == "drop" and chunks and len(chunks[-1]) < chunk_size:
        chunks.pop()

    result = {name: [[token[name] for token in chunk] for chunk in chunks] for name in columns}
    if "word_ids" in columns:
        result["word_ids"] = [_number_words(chunk) for chunk in chunks]
    if documents:
        result["document_ids"] = [[_rank(token, chunk) for token in chunk] for chunk in chunks]
    if labels and "labels" not in result:
        result["labels"] = [list(row) for row in result["input_ids"]]
    return result


def _rank(token: Mapping[str, Any], chunk: Sequence[Mapping[str, Any]]) -> int:
    return sorted({other["document"] for other in chunk}).index(token["document"])


def _number_words(chunk: Sequence[Mapping[str, Any]]) -> list[int]:
    numbers, number, before = [], -1, None
    for token in chunk:
        word = None if token["word_ids"] in (None, -1) else (token["document"], token["word_ids"])
        number += word is not None and word != before
        numbers.append(-1 if word is None else number)
        before = word
    return numbers
