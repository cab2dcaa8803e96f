"""Whole documents in rows, one after the other: slow, and plain enough to be believed."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


def reference_row_lengths(lengths: Sequence[int], *, chunk_size: int) -> list[int]:
    """Return how long the rows are if each piece goes into the fullest row that has room for it.

    Rows of the same length are interchangeable, so which of them takes a piece changes nothing.
    """
    pieces: list[int] = []
    for length in lengths:
        pieces += [chunk_size] * (length // chunk_size)
        pieces += [length % chunk_size] * (length % chunk_size > 0)
    rows: list[int] = []
    for piece in sorted(pieces, reverse=True):
        fitting = [row for row, length in enumerate(rows) if length + piece <= chunk_size]
        if fitting:
            rows[max(fitting, key=lambda row: rows[row])] += piece
        else:
            rows.append(piece)
    return rows
