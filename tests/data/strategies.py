"""Batches of tokenized documents, as they come in lists and in tables."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
from hypothesis import strategies as st

Columns = dict[str, list[list[Any]]]


@st.composite
def documents(draw: st.DrawFn, *, multiple_of: int = 1, count: int | None = None) -> Columns:
    """Draw documents, some empty, whose ids tell tokens apart, and words with and without None."""
    sizes = st.integers(0, 12 // multiple_of) if count is None else st.just(count)
    lengths = [size * multiple_of for size in draw(st.lists(sizes, max_size=7))]
    ends = np.cumsum([0, *lengths]).tolist()
    word = st.sampled_from([0, 0, 1, 1, -1, None])
    return {
        "input_ids": [[*range(start, end)] for start, end in pairwise(ends)],
        "word_ids": [draw(st.lists(word, min_size=n, max_size=n)) for n in lengths],
        "special_tokens_mask": [[0] * n for n in lengths],
    }


@st.composite
def tables(draw: st.DrawFn) -> tuple[Columns, pa.Table]:
    """Draw documents and a table of them: slices of longer columns, each in chunks of its own."""
    count = draw(st.sampled_from([None, 3]))
    columns = draw(documents(count=count))
    arrays = {}
    for name, rows in columns.items():
        types = [pa.list_, pa.large_list]
        types += [lambda value: pa.list_(value, 3)] if count else []
        value = draw(st.sampled_from([pa.int8(), pa.int32(), pa.int64()]))
        row = [7] * (count or 2)
        padded = pa.array([row, *rows, row, row], draw(st.sampled_from(types))(value))
        array = padded[1 : 1 + len(rows)]
        cuts = draw(st.sets(st.integers(0, len(rows)), max_size=4)) | {0, len(rows)}
        chunks = [array[start:end] for start, end in pairwise(sorted(cuts))]
        arrays[name] = pa.chunked_array(chunks, array.type)
    return columns, pa.table(arrays)
