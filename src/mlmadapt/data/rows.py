"""Rows of any length, joined into one array per column, and laid out as a batch.

``tokenizer.pad`` knows the tokenizer's own columns only (``labels`` and ``word_ids`` crash it), and
builds lists first. Here no token is looked at in Python.
"""

import struct
from collections.abc import Iterable, Mapping
from contextlib import suppress
from itertools import chain, pairwise
from operator import index
from typing import Any, NamedTuple, NoReturn

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mlmadapt._types import Features, Ints, Tokenizer


def read_batch(examples: Any) -> tuple[Mapping[str, Any], bool]:
    """Return the columns of a batch of `map`, and whether it was a table.

    Frames and record batches that Arrow can read are tables.

    Examples:
        >>> columns, is_table = read_batch(pa.record_batch({"input_ids": [[7, 8]]}))
        >>> list(columns), is_table
        (['input_ids'], True)
    """
    if isinstance(examples, Mapping):
        return examples, False
    table = examples if isinstance(examples, pa.Table) else pa.table(examples)
    return dict(zip(table.column_names, table.columns, strict=True)), True


class JoinedRows(NamedTuple):
    """Rows that lie end to end: arrays of shape ``(tokens,)``, and the tokens of each row."""

    columns: dict[str, Ints]
    lengths: Ints


def check_whole(
    name: str,
    value: Any,
    *,
    least: int | None = 1,
    most: int | None = None,
    error: type[Exception] = ValueError,
) -> int:
    """Return a whole number, of Python or NumPy, as Python's.

    Args:
        name: What it is called in the error.
        value: The number.
        least: The smallest that is right, or None.
        most: The largest that is right, or None.
        error: Raised for what is no whole number. A string would be another seed than the number
            in it.

    Raises:
        ValueError: If it is out of range; and, unless `error` says otherwise, if it is not whole.

    Examples:
        >>> check_whole("chunk_size", np.int64(128))
        128
    """
    is_whole = hasattr(value, "__index__") and not isinstance(value, bool)
    if is_whole and (least is None or value >= least) and (most is None or value <= most):
        return index(value)
    limits = "" if least is None else f", {least} " + ("or more" if most is None else f"to {most}")
    kind = ValueError if is_whole else error
    raise kind(f"{name} is {value!r}; it must be a whole number{limits}")


def check_tokens(name: str, columns: Iterable[str]) -> None:
    """Check that there is a column of tokens.

    Raises:
        ValueError: If there are no ``input_ids``.

    Examples:
        >>> check_tokens("the batch", ["input_ids", "word_ids"])
    """
    if "input_ids" not in columns:
        raise ValueError(
            f"{name} has {list(columns)}, without 'input_ids'; tokenize the documents first"
        )


def to_columns(features: Features) -> dict[str, list[Any]]:
    """Turn rows of columns into columns of rows.

    Raises:
        TypeError: If a row is not a dict.
        ValueError: If there are no rows, or they differ in columns.

    Examples:
        >>> to_columns([{"input_ids": [7, 8]}, {"input_ids": [9]}])
        {'input_ids': [[7, 8], [9]]}
    """
    if not len(features):
        raise ValueError("features is empty; a batch needs at least one row")
    for row, feature in enumerate(features):
        if not isinstance(feature, (dict, Mapping)):  # a dict is known at once
            raise TypeError(
                f"row {row} of the batch is {feature!r:.40}, a {type(feature).__name__}; each row "
                "must be a dict of its columns, as a dataset gives it"
            )
        if feature.keys() != (names := features[0].keys()):
            raise ValueError(
                f"row {row} of the batch has columns {list(feature)}, row 0 has {list(names)}; all "
                "rows of a batch must have the same columns"
            )
    return {name: [feature[name] for feature in features] for name in names}


def check_words(columns: Mapping[str, Any]) -> None:
    """Check that rows have words.

    Raises:
        ValueError: If a row has no ``word_ids``.

    Examples:
        >>> check_words({"input_ids": [[7, 8]], "word_ids": [[0, 1]]})
    """
    for row, words in enumerate(columns.get("word_ids", [None])):
        if words is None:
            raise ValueError(
                f"row {row} of the batch has no 'word_ids', of columns {list(columns)}; tokenize "
                "with tokenize_with_word_ids, and pass remove_unused_columns=False to Trainer"
            )


def join_rows(columns: Mapping[str, Any]) -> JoinedRows:
    """Lay the rows of each column one after the other.

    Args:
        columns: Token columns: sequences of lists, arrays or tensors. ``word_ids`` may hold None
            or NaN, which become -1.

    Raises:
        ValueError: If there are no ``input_ids``, or a column does not hold one whole number per
            token.

    Examples:
        >>> columns, lengths = join_rows({"input_ids": [[7, 8], [9]], "word_ids": [[None, 0], [0]]})
        >>> columns, lengths
        ({'input_ids': array([7, 8, 9]), 'word_ids': array([-1,  0,  0])}, array([2, 1]))
    """
    check_tokens("the batch", columns)
    lengths = column_lengths(columns)
    return JoinedRows({name: join_column(name, rows) for name, rows in columns.items()}, lengths)


def column_lengths(columns: Mapping[str, Any]) -> Ints:
    """Return the lengths of rows, in tokens, which must be the same in all columns.

    Raises:
        ValueError: If they are not, or a row is None, a string, a mapping, or one value.

    Examples:
        >>> column_lengths({"input_ids": [[7, 8], [9]]})
        array([2, 1])
    """
    return common_lengths({name: row_lengths(name, columns[name]) for name in columns})


def row_lengths(name: str, rows: Any) -> Ints:
    """Return the number of values in each row of a column.

    Raises:
        ValueError: If a row is None, a string, a mapping, or one value.

    Examples:
        >>> row_lengths("input_ids", [[7, 8], [9]])
        array([2, 1])
    """
    if isinstance(rows, pa.ChunkedArray):
        return _list_lengths(name, rows)
    with suppress(TypeError):  # an array without dimensions claims to have a length
        if all(map(_is_row, {type(row): row for row in rows}.values())):
            return np.fromiter(map(len, rows), np.int64, len(rows))
    row, value = next((row, value) for row, value in enumerate(rows) if not _is_row(value))
    return refuse_column(name, f"row {row} is {value!r:.40}, of type {type(value).__name__}")


def refuse_column(name: str, seen: str) -> NoReturn:
    """Raise the error about a column that does not hold a list of numbers per row.

    Raises:
        ValueError: Always.
    """
    raise ValueError(
        f"column {name!r} is not a column of tokens: {seen}; each row must be a list of numbers. "
        f"Remove the column, for example with remove_columns=[{name!r}] in map"
    )


def common_lengths(lengths: Mapping[str, Ints]) -> Ints:
    """Return the lengths of rows, which must be the same in all columns.

    Raises:
        ValueError: If columns differ in their number of rows, or in the length of a row.

    Examples:
        >>> common_lengths({"input_ids": np.array([2, 1]), "word_ids": np.array([2, 1])})
        array([2, 1])
    """
    if not lengths:
        return np.empty(0, np.int64)
    first = "input_ids" if "input_ids" in lengths else next(iter(lengths))
    expected = lengths[first]
    for name, counts in lengths.items():
        if len(counts) != len(expected):
            raise ValueError(
                f"column {name!r} has {len(counts)} rows, {first!r} has {len(expected)}; all "
                "columns must come from the same documents"
            )
        if (counts != expected).any():
            row = int((counts != expected).argmax())
            raise ValueError(
                f"row {row} has {expected[row]} {first!r} but {counts[row]} {name!r}; all columns "
                f"must hold one value per token: tokenize them together, or remove {name!r}"
            )
    return expected


def document_bounds(document_ids: Ints, bounds: Ints) -> Ints:
    """Return where each document of each row begins, and where the last one ends.

    Args:
        document_ids: The rows end to end; -1 is padding.
        bounds: Where each row begins, and where the last one ends.

    Raises:
        ValueError: If they fall within a row.

    Examples:
        >>> document_bounds(np.array([0, 0, 1, 0, 1]), np.array([0, 3, 5]))
        array([0, 2, 3, 4, 5])
    """
    changes = (document_ids[1:] != document_ids[:-1]).nonzero()[0] + 1
    now, before = document_ids[changes], document_ids[changes - 1]
    falls = changes[(now < before) & (now >= 0)]
    falls = falls[bounds[bounds.searchsorted(falls)] != falls]  # a row begins with any number
    if falls.size:
        row = int(bounds.searchsorted(falls[0])) - 1
        raise ValueError(
            f"document_ids of row {row} of the batch fall from {document_ids[falls[0] - 1]} to "
            f"{document_ids[falls[0]]}; a document is one run of tokens, and each has a higher "
            "number than the one before, as pack_texts numbers them"
        )
    begins = np.zeros(len(document_ids) + 1, bool)
    begins[changes] = begins[bounds] = True
    return begins.nonzero()[0]


def split_rows(joined: npt.NDArray[Any], lengths: Ints) -> npt.NDArray[Any]:
    """Cut a joined column into its rows.

    Rows of one length come as one array of shape ``(rows, sequence)``, others as an array of
    arrays; `datasets` writes them three and five times as fast as a list of arrays.

    Examples:
        >>> list(split_rows(np.array([7, 8, 9]), np.array([2, 1])))
        [array([7, 8]), array([9])]
    """
    if len(lengths) and (lengths == lengths[0]).all():
        return joined.reshape(len(lengths), lengths[0])
    rows = np.empty(len(lengths), object)
    for row, (start, end) in enumerate(pairwise([0, *np.cumsum(lengths).tolist()])):
        rows[row] = joined[start:end]
    return rows


def pad_rows(
    joined: Mapping[str, Ints],
    lengths: Ints,
    tokenizer: Tokenizer,
    *,
    pad_to_multiple_of: int | None = None,
) -> dict[str, Ints]:
    """Lay joined rows out as arrays of shape ``(batch, sequence)``.

    Padding goes to the right, whatever side the tokenizer has: encoders count positions from the
    left, and a row's would depend on the longest one of its batch. The tokenizer's padding token
    goes into ``input_ids``, its padding type into ``token_type_ids``, -100 into ``labels``, -1 into
    ``document_ids``, 0 into all else. An ``attention_mask`` is made where there is none.

    Args:
        joined: Columns as `join_rows` returns them.
        lengths: Tokens of each row.
        tokenizer: Gives the padding token.
        pad_to_multiple_of: Make ``sequence`` a multiple of this, in tokens.

    Raises:
        ValueError: If padding is needed and the tokenizer has no padding token.

    Examples:
        >>> from mlmadapt.testing import tiny_tokenizer
        >>> rows = {"input_ids": np.array([7, 8, 9]), "labels": np.array([7, -100, 9])}
        >>> pad_rows(rows, np.array([2, 1]), tiny_tokenizer())["labels"]
        array([[   7, -100],
               [   9, -100]])
    """
    width = int(lengths.max())
    if pad_to_multiple_of:
        width += -width % pad_to_multiple_of
    if (lengths == width).all():
        batch = {name: values.reshape(len(lengths), width) for name, values in joined.items()}
        batch.setdefault("attention_mask", np.ones((len(lengths), width), np.int64))
        return batch
    if tokenizer.pad_token_id is None:
        raise ValueError(
            f"rows of {lengths.min()} to {lengths.max()} tokens need padding to {width}, but the "
            "tokenizer has no padding token; set tokenizer.pad_token"
        )
    fills = {
        "input_ids": tokenizer.pad_token_id,
        "labels": -100,
        "document_ids": -1,
        "token_type_ids": tokenizer.pad_token_type_id,
    }
    is_filled = np.arange(width) < lengths[:, None]
    batch = {name: np.full(is_filled.shape, fills.get(name, 0), np.int64) for name in joined}
    for name, values in joined.items():
        batch[name][is_filled] = values
    batch.setdefault("attention_mask", is_filled.astype(np.int64))
    return batch


def _list_lengths(name: str, column: pa.ChunkedArray) -> Ints:
    import pyarrow.compute as pc  # noqa: PLC0415  # a fifth of what importing this file costs

    kinds = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    if not any(is_kind(column.type) for is_kind in kinds):
        refuse_column(name, f"its type is {column.type}")
    if column.null_count:
        refuse_column(name, f"row {pc.index(column.is_null(), value=True)} is None")
    return pc.list_value_length(column).to_numpy().astype(np.int64)  # type: ignore[no-any-return]


def _is_row(value: Any) -> bool:
    is_sized = hasattr(value, "__len__") and getattr(value, "ndim", 1) > 0
    return is_sized and not isinstance(value, (str, bytes, Mapping))


def join_column(name: str, rows: Any) -> Ints:
    """Lay the rows of one column one after the other.

    Raises:
        ValueError: If they do not hold one whole number per token.

    Examples:
        >>> join_column("word_ids", [[None, 0], [0]])
        array([-1,  0,  0])
    """
    try:
        values = _concatenate(name, rows)
        if name == "word_ids" and values.dtype.kind in "Of":
            # BatchEncoding.word_ids() says None; arrays and tensors can only say NaN.
            words = np.array(values, np.float64)
            words[np.isnan(words)] = -1
            values = words.astype(np.int64) if (words % 1 == 0).all() else words
        if values.ndim == 1 and (values.dtype.kind in "iub" or not values.size):
            return values.astype(np.int64, copy=False)
        seen = f"{values.dtype} of shape {values.shape}"
    except (RuntimeError, TypeError, ValueError) as error:  # a tensor may have no truth
        seen = f"something else ({error})"
    raise ValueError(
        f"column {name!r} holds {seen}; it must hold one whole number per token. Remove {name!r} "
        "from the dataset if it is not an input of the model"
    )


def _concatenate(name: str, rows: Any) -> npt.NDArray[Any]:
    if not set(map(type, rows)) <= {list}:
        arrays = [*map(np.asarray, filter(len, rows))]  # an empty one may be of floats
        return np.concatenate(arrays or [np.empty(0, np.int64)])
    # An attention mask, which comes with every batch, is mostly nothing but ones.
    if name == "attention_mask" and all(row.count(1) == len(row) for row in rows):
        return np.ones(sum(map(len, rows)), np.int64)
    # NumPy reads lists more slowly (flags three times), and would cut floats down to whole numbers;
    # here nothing but whole numbers gets through.
    with suppress(TypeError, ValueError):
        return np.frombuffer(b"".join(map(bytes, rows)), np.uint8)
    with suppress(struct.error):
        return _pack(rows)
    if name == "word_ids":
        with suppress(struct.error):
            return _pack([[-1 if word is None else word for word in row] for row in rows])
    return np.array(list(chain.from_iterable(rows)))


def _pack(rows: list[list[int]]) -> Ints:
    lengths = set(map(len, rows))
    pack = {length: struct.Struct(f"{length}q").pack for length in lengths}
    # A bytearray, since arrays over bytes cannot be written, which tensors have to be.
    packed = bytearray().join([pack[len(row)](*row) for row in rows])
    return np.frombuffer(packed, np.int64)


def are_frozen(columns: Mapping[str, Any]) -> bool:
    """Tell whether rows have masks frozen into them.

    They have the prefix ``masked_``, a label that differs from its token, or a word without one.
    The labels of `group_texts` are a copy of the tokens, perhaps with -100 at the padding.

    Examples:
        >>> are_frozen({"input_ids": [[7, 8], [4, 8]], "labels": [[7, 8], [7, -100]]})
        True
        >>> are_frozen({"input_ids": [[7, 8]], "labels": [[7, 8]]})
        False
    """
    if "masked_labels" in columns or not {"input_ids", "labels"} <= columns.keys():
        return "masked_labels" in columns
    try:
        tokens, labels = (join_column(name, columns[name]) for name in ("input_ids", "labels"))
    except ValueError:  # they are labels of something else
        return False
    if len(tokens) != len(labels):
        return False
    is_target = labels != -100
    tells = is_target & (labels != tokens)
    if "word_ids" in columns:
        real = join_column("attention_mask", columns.get("attention_mask", columns["input_ids"]))
        tells |= ~is_target & (join_column("word_ids", columns["word_ids"]) >= 0) & (real != 0)
    return bool(tells.any())


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
