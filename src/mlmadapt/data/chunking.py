"""Documents of any length to rows of one length.

Every batch of documents is one long line of tokens, cut every `chunk_size` tokens. On Arrow tables
that is a question of offsets alone: the tokens stay where they are. Word numbers are the one column
that is written anew, since each document counts its words from 0 and a chunk can hold several
documents.
"""

import logging
import warnings
from collections.abc import Iterable, Iterator
from itertools import chain, groupby, pairwise
from operator import itemgetter
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mlmadapt._types import Columns, Ints
from mlmadapt.data.rows import check_whole, column_lengths, join_column, read_batch

logger = logging.getLogger(__name__)
_worth_warning = 0.01  # the share dropped that is worth a warning, or the largest warned about
_MOST_OF_SMALL = 2**31 - 1  # tokens that the offsets of an ordinary list column can count


def group_texts(
    examples: Columns,
    *,
    chunk_size: int = 128,
    remainder: Literal["drop", "keep"] = "drop",
    labels: bool = True,
    documents: bool = False,
) -> Columns:
    """Join a batch of tokenized documents and cut it into rows of `chunk_size` tokens.

    For ``dataset.map(group_texts, batched=True)``. What is left after the last whole chunk is lost
    once per **batch**: with `map`'s 1,000 documents that is 0.03 % of IMDb at 128 tokens per chunk,
    with 10 short documents it can be everything. ``batch_size=None`` makes one pass of the whole
    dataset; ``remainder="keep"`` keeps every token. What is dropped is counted and logged: as a
    warning where it is more than 1 % of a batch, and more than was warned about before. A batch of
    which nothing is left warns.

    Args:
        examples: A batch of token columns: a dict of lists, or a ``pyarrow.Table`` (datasets with
            format "arrow"), of which no token is copied. Frames and record batches that Arrow can
            read are taken as tables.
        chunk_size: Tokens per row.
        remainder: ``"drop"``, or ``"keep"`` for a last, shorter row.
        labels: Add a copy of ``input_ids`` as ``labels``, for collators of other libraries. Those
            here make their own.
        documents: Add ``document_ids``, which count the documents of each row from 0, so that
            `isolate_documents` can keep them apart. One that is cut by the end of a row is a
            document in both; `pack_texts` cuts only those that are longer than a row.

    Returns:
        The same columns as a batch of the same kind, rows of shape ``(chunk_size,)``. ``word_ids``
        count from 0 in each row, and no two words of a row share a number; a word cut by the end of
        a row is a word in both.

    Raises:
        ValueError: If `chunk_size` or `remainder` is out of range, there are no ``input_ids`` to
            copy, there are ``document_ids`` already and `documents` would add them, a column is not
            a column of tokens, or columns differ in length.

    Warns:
        UserWarning: If a batch yields no row.

    Source:
        The recipe's step of this name: the Hugging Face course, chapter 7.3.

    Examples:
        >>> documents = {"input_ids": [[5, 6, 7], [8, 9]], "word_ids": [[0, 0, 1], [0, 1]]}
        >>> rows = group_texts(documents, chunk_size=4, remainder="keep", labels=False)
        >>> rows["input_ids"], rows["word_ids"]
        ([[5, 6, 7, 8], [9]], [[0, 0, 1, 2], [0]])
    """
    chunk_size = check_whole("chunk_size", chunk_size)
    if remainder not in ("drop", "keep"):
        raise ValueError(f"remainder is {remainder!r}; it must be 'drop' or 'keep'")
    columns, is_table = read_batch(examples)
    if labels and "input_ids" not in columns:
        raise ValueError(
            f"labels=True copies 'input_ids', but the columns are {list(columns)}; tokenize first, "
            "or pass labels=False"
        )
    if documents:
        refuse_document_ids(columns)
    lengths = column_lengths(columns)
    total = int(lengths.sum())
    kept = total if remainder == "keep" else total - total % chunk_size
    _say_what_is_lost(len(lengths), total, kept, chunk_size)

    row_starts = np.arange(0, kept, chunk_size)
    document_starts = np.cumsum(lengths) - lengths
    document_starts = document_starts[document_starts < kept]
    result: dict[str, Any] = {}
    for name, column in columns.items():
        line = flatten_column(name, column)[:kept]
        if name == "word_ids":
            line = number_words(line, document_starts, row_starts)
        result[name] = cut_rows(line, row_starts, like=column)
    if documents and columns:
        line = number_words(np.zeros(kept, np.int32), document_starts, row_starts)
        result["document_ids"] = cut_rows(line, row_starts, like=next(iter(columns.values())))
    if labels and "labels" not in result:
        # Rows of a table cannot be changed in place and may be shared; lists must not be.
        rows = result["input_ids"]
        result["labels"] = rows if is_table else [list(row) for row in rows]
    return cast("Columns", pa.table(result) if is_table else result)


def refuse_document_ids(columns: Iterable[str]) -> None:
    """Raise an error if there are ``document_ids`` among the columns of documents.

    Raises:
        ValueError: If there are.
    """
    if "document_ids" in columns:
        raise ValueError(
            "column 'document_ids' is there already; the batch must be documents, not rows of "
            "several, so group or pack the tokenized documents themselves"
        )


def flatten_column(name: str, column: Any) -> Any:
    """Return the values of a token column one after the other.

    A table's are an Arrow array that is not copied, others a list; ``word_ids`` are an array.

    Raises:
        ValueError: If ``word_ids`` are not whole numbers.

    Examples:
        >>> flatten_column("input_ids", [[7, 8], np.array([9])])
        [7, 8, 9]
        >>> flatten_column("word_ids", [[None, 0], [0]])
        array([-1,  0,  0])
    """
    if not isinstance(column, pa.ChunkedArray):
        if name == "word_ids":
            return join_column(name, column)
        # Arrays and tensors, by any library, to the numbers that lists hold.
        as_lists = (row.tolist() if hasattr(row, "tolist") else row for row in column)
        return list(chain.from_iterable(as_lists))
    value_type = column.type.value_type
    line = pa.chunked_array([chunk.flatten() for chunk in column.chunks], value_type)
    if name != "word_ids":
        return line
    if not pa.types.is_integer(value_type):
        return join_column(name, [line.to_numpy()])
    if value_type != pa.int32():  # numbers up to the length of a row do not fit every type
        line = line.cast(pa.int64())
    if line.null_count:  # it would copy
        line = line.fill_null(-1)
    return line.to_numpy()


def number_words(
    word_ids: npt.NDArray[Any], document_starts: Ints, row_starts: Ints
) -> npt.NDArray[Any]:
    """Number the words of each row from 0, a new one where the id changes or a document begins.

    Args:
        word_ids: Of all rows, one after the other; below 0 for a token of no word.
        document_starts: Where documents begin, in tokens.
        row_starts: Where rows begin, rising.

    Examples:
        >>> number_words(np.array([0, 0, 1, -1, 0, 0]), np.array([0, 4]), np.array([0, 2]))
        array([ 0,  0,  0, -1,  1,  1])
    """
    total = len(word_ids)
    begins = np.zeros(total + -total % 8, bool)
    np.not_equal(word_ids[1:], word_ids[:-1], out=begins[1:total])
    begins[document_starts] = True
    begins[row_starts] = True
    is_word = word_ids >= 0
    begins[:total] &= is_word

    # np.cumsum(begins) in half the time: multiplied by 0x0101..., each byte of eight becomes the
    # sum of itself and those before it.
    eights = begins.view("<u8") * np.uint64(0x0101010101010101)
    totals = (eights >> np.uint64(56)).astype(np.int32)
    numbers = np.repeat(np.cumsum(totals, dtype=np.int32) - totals, 8)
    numbers += eights.astype("<u8", copy=False).view(np.uint8)
    numbers = numbers[:total]
    firsts = numbers[row_starts] + ~begins[row_starts]
    numbers -= np.repeat(firsts, np.diff(row_starts, append=total))
    numbers[~is_word] = -1
    return numbers.astype(word_ids.dtype, copy=False)


def cut_rows(line: Any, row_starts: Ints, *, like: Any) -> Any:
    """Cut a line of values into rows, which are a column of the same kind as `like`.

    Examples:
        >>> cut_rows(np.array([7, 8, 9]), np.array([0, 2]), like=[[7, 8, 9]])
        [[7, 8], [9]]
    """
    bounds = np.append(row_starts, len(line))
    if not isinstance(like, pa.ChunkedArray):
        line = line.tolist() if isinstance(line, np.ndarray) else line
        return [line[start:end] for start, end in pairwise(bounds.tolist())]
    if not isinstance(line, pa.ChunkedArray):
        line = pa.chunked_array([line])
    is_large = pa.types.is_large_list(like.type) or len(line) > _MOST_OF_SMALL
    list_type = (pa.large_list if is_large else pa.list_)(line.type)
    return pa.chunked_array([*_lay_rows(line, bounds, list_type)], list_type)


def _lay_rows(line: pa.ChunkedArray, bounds: Ints, list_type: pa.DataType) -> Iterator[pa.Array]:
    """Lay rows over the pieces of a line; only a row that several pieces share is copied."""
    is_large = pa.types.is_large_list(list_type)
    array = pa.LargeListArray if is_large else pa.ListArray
    offset_type = pa.int64() if is_large else pa.int32()
    for row, parts in groupby(_cut_pieces(line, bounds), key=itemgetter(0)):
        arrays = [values for _, values in parts]
        values = arrays[0] if len(arrays) == 1 else pa.concat_arrays(arrays)
        last = np.searchsorted(bounds, bounds[row] + len(values))
        offsets = pa.array(bounds[row : last + 1] - bounds[row], offset_type)
        yield array.from_arrays(offsets, values, type=list_type)


def _cut_pieces(line: pa.ChunkedArray, bounds: Ints) -> Iterator[tuple[int, pa.Array]]:
    """Cut each piece into the end of a row, whole rows and the beginning of one; tell which row."""
    start = 0
    for piece in line.chunks:
        end = start + len(piece)
        head = min(bounds[np.searchsorted(bounds, start)], end)
        tail = max(bounds[np.searchsorted(bounds, end, "right") - 1], head)
        for first, last in pairwise((start, head, tail, end)):
            if first < last:
                row = int(np.searchsorted(bounds, first, "right")) - 1
                yield row, piece[first - start : last - start]
        start = end


def _say_what_is_lost(documents: int, total: int, kept: int, chunk_size: int) -> None:
    cure = "batch_size=None in map makes it one pass, remainder='keep' keeps every token"
    if total and not kept:
        warnings.warn(
            f"group_texts: {documents} documents with {total} tokens in all yield no row of "
            f"{chunk_size} tokens, so all are dropped; {cure}",
            stacklevel=3,
        )
    elif kept < total:
        # The share decides: one pass over a large dataset drops hardly any, and can do no better.
        global _worth_warning  # noqa: PLW0603  # or each batch would warn
        share = 1 - kept / total
        level = logging.WARNING if share > _worth_warning else logging.INFO
        _worth_warning = max(share, _worth_warning)
        lost = f"{total - kept} of {total} tokens ({share:.1%})".replace("%", " %")
        said = "group_texts dropped %s after the last whole chunk of a batch; %s"
        logger.log(level, said, lost, cure)
