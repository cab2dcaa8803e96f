"""All that knows the inside of a `Dataset` or of a stream of `datasets`.

Rows of a `Dataset` are laid end to end straight from the memory that its table lies in.
``dataset[rows]`` copies the rows into a table of their own, and makes a Python number or a tensor
of each token: 1.5 ms for 64 rows of 128 tokens, four times as long as it takes to mask them. Here a
row is cut out by two offsets, and its tokens are copied once, to where the collator masks them.
Lengths and token ids of all rows are read from the table too, whatever a format makes of the rows.
"""

import reprlib
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np
import pyarrow as pa
from torch.utils.data import IterableDataset

from mlmadapt._types import Ints, Rows
from mlmadapt.data.rows import (
    JoinedRows,
    are_frozen,
    check_tokens,
    common_lengths,
    join_column,
    row_lengths,
    to_columns,
)

if TYPE_CHECKING:
    from datasets import Dataset


def is_dataset(rows: Any) -> "TypeGuard[Dataset]":
    """Tell whether rows are a `Dataset`, without loading `datasets`, which takes half a second.

    Examples:
        >>> is_dataset([{"input_ids": [7, 8]}])
        False
    """
    loaded = sys.modules.get("datasets")
    return loaded is not None and isinstance(rows, loaded.Dataset)


def is_stream(dataset: Any) -> bool:
    """Tell whether rows come one after another; such a dataset of torch may have a length.

    Examples:
        >>> is_stream(iter([{"input_ids": [7, 8]}])), is_stream([{"input_ids": [7, 8]}])
        (True, False)
    """
    is_counted = hasattr(dataset, "__len__") and not isinstance(dataset, IterableDataset)
    return hasattr(dataset, "__iter__") and not is_counted


def as_rows(name: str, dataset: Any) -> Any:
    """Return a dataset as rows that can be counted and looked up, and that are dicts.

    Of a `Dataset` whose format makes tables or frames of its rows, that is taken off.

    Raises:
        TypeError: If it is nothing of that kind; the error calls it `name`.

    Examples:
        >>> as_rows("dataset", [{"input_ids": [7, 8]}])
        [{'input_ids': [7, 8]}]
    """
    if is_dataset(dataset):
        is_plain = dataset.format["type"] not in ("arrow", "pandas", "polars")
        return dataset if is_plain else dataset.with_format(None, columns=dataset.format["columns"])
    try:
        _ = {**dataset[0]} if len(dataset) else {}
    except (TypeError, KeyError, NotImplementedError) as error:
        raise TypeError(
            f"{name} is a {type(dataset).__name__}, {reprlib.repr(dataset):.25}; it must be a "
            "Dataset or a list of dicts: Dataset.from_dict({'text': texts}), .from_pandas or "
            ".from_generator, mapped by tokenize_with_word_ids"
        ) from error
    return dataset


def split_part(stream: Any) -> tuple[int, int] | None:
    """Return which part of a stream of `datasets` this is, and of how many; None for a whole one.

    Examples:
        >>> from datasets import Dataset
        >>> from datasets.distributed import split_dataset_by_node
        >>> stream = Dataset.from_dict({"input_ids": [[7, 8], [9]]}).to_iterable_dataset()
        >>> split_part(stream), split_part(split_dataset_by_node(stream, 1, 2))
        (None, (1, 2))
    """
    part = getattr(stream, "_distributed", None)  # nothing else tells
    return None if part is None else (part.rank, part.world_size)


def dataset_lengths(dataset: Any) -> Ints | None:
    """Return the number of tokens of each row, or None if rows would have to be read for it.

    Examples:
        >>> dataset_lengths([{"input_ids": [7, 8]}, {"input_ids": [9]}])
        array([2, 1])
    """
    if isinstance(dataset, (list, tuple)):
        name = _token_column(dataset[0])
        return row_lengths(name, [row[name] for row in dataset])
    name = _token_column(dataset.column_names) if is_dataset(dataset) else ""
    if not name or name not in dataset.column_names:  # a transform makes it
        return None
    lengths, places = row_lengths(name, dataset.data.column(name)), _row_places(dataset)
    return lengths if places is None else lengths[places]


def measure_rows(name: str, dataset: Rows) -> tuple[int, int]:
    """Return the longest row in tokens and the highest token id of rows.

    Raises:
        ValueError: If they have no ``input_ids``, or those of a row are rows themselves; the error
            calls them `name`.

    Examples:
        >>> measure_rows("eval_dataset", [{"input_ids": [7, 8]}, {"input_ids": [9]}])
        (2, 9)
    """
    import pyarrow.compute as pc  # noqa: PLC0415  # a fifth of what importing this file costs

    row = dataset[0]
    column = _token_column(row)
    if column not in row:
        check_tokens(name, row)
    tokens = row[column]
    if len(tokens) and np.ndim(tokens[0]):
        raise ValueError(
            f"{name} has rows of {column!r} whose shape is not (tokens,), {reprlib.repr(tokens)}; "
            "tokenize without return_tensors"
        )
    # A transform may make the column when a row is read.
    if not is_dataset(dataset) or column not in dataset.column_names:
        rows = [dataset[place][column] for place in range(len(dataset))]
        return max(map(len, rows)), max((int(max(row)) for row in rows if len(row)), default=0)
    table, places = dataset.data.column(column), _row_places(dataset)
    is_used = np.zeros(len(table), bool)  # rows that are left out do not count
    is_used[slice(None) if places is None else places] = True
    longest = highest = start = 0
    for chunk in table.chunks:
        here = is_used[start : start + len(chunk)]
        used = chunk if here.all() else chunk.filter(pa.array(here))
        longest = max(longest, pc.max(pc.list_value_length(used)).as_py() or 0)
        highest = max(highest, pc.max(pc.list_flatten(used)).as_py() or 0)
        start += len(chunk)
    return longest, highest


def is_frozen(dataset: Rows) -> bool:
    """Tell whether one of all rows of a dataset has masks frozen into it, as `are_frozen` does.

    Examples:
        >>> is_frozen([{"input_ids": [4, 8], "labels": [7, -100]}])
        True
        >>> is_frozen([{"input_ids": [7, 8], "labels": [7, 8]}])
        False
    """
    if not is_dataset(dataset) or dataset.format["type"] == "custom":  # which makes its columns
        rows = [dataset[place] for place in range(len(dataset))]
        return bool(rows) and are_frozen(to_columns(rows))
    telling = ("input_ids", "labels", "word_ids", "attention_mask", "masked_labels")
    names, column = [n for n in telling if n in dataset.column_names], dataset.data.column
    # Labels of rows without masks are a copy of the tokens, which Arrow sees at once.
    if not {"labels", "input_ids"} <= {*names} or column("labels") == column("input_ids"):
        return "masked_labels" in names
    table = dataset.with_format("arrow", names)[:]
    return are_frozen({name: table[name].to_numpy() for name in names})


def table_reader(dataset: Any) -> Callable[[Sequence[int]], JoinedRows] | None:
    """Return what reads rows as `join_rows` lays them out, or None if the dataset has to make them.

    It has to if rows come from a transform, or if a column does not hold one whole number per
    token. ``labels`` are left out, since a collator that masks makes its own. The reader raises a
    ValueError if a row's columns are not of one length.

    Examples:
        >>> from datasets import Dataset
        >>> columns = {"input_ids": [[7, 8], [9]], "word_ids": [[0, 1], [0]]}
        >>> read = table_reader(Dataset.from_dict(columns))
        >>> tuple(read([1, 0]))
        ({'input_ids': array([9, 7, 8]), 'word_ids': array([0, 0, 1])}, array([1, 2]))
        >>> table_reader(Dataset.from_dict({"text": ["a film"]})) is None
        True
    """
    # A subclass may make rows of its own, and frozen ones need their labels.
    is_plain = is_dataset(dataset) and type(dataset) is sys.modules["datasets"].Dataset
    if not is_plain or is_frozen(dataset):
        return None
    layout = dataset.format
    shown = dataset.column_names if layout["output_all_columns"] else layout["columns"]
    names = [name for name in dataset.column_names if name in shown and name != "labels"]
    table = dataset.data.table.select(names)
    has_words = layout["type"] != "custom" and {"input_ids", "word_ids"} <= {*names}
    if not has_words or not all(map(_holds_tokens, names, table.columns)):
        return None
    batches = table.to_batches()  # each column of one in one piece, as it lies in memory
    starts = np.cumsum([0, *map(len, batches)])
    tokens = {name: [_open(batch.column(name)) for batch in batches] for name in names}
    groups = _group_by_offsets(batches, names)
    with_none = {name for name in names if {*map(type, tokens[name])} - {np.ndarray}}
    places = _row_places(dataset)

    def read(rows: Sequence[int]) -> JoinedRows:
        wanted = np.asarray(rows) if places is None else places[rows].astype(np.int64)
        batch = np.searchsorted(starts, wanted, side="right") - 1
        inside, pieces = (wanted - starts[batch]).tolist(), batch.tolist()
        joined, lengths = {}, {}
        for alike, offsets in groups:
            within = zip(map(offsets.__getitem__, pieces), inside, strict=True)
            bounds = [(piece[row], piece[row + 1]) for piece, row in within]
            lengths[alike[0]] = np.array([end - start for start, end in bounds], np.int64)
            for name in alike:
                cuts = zip(map(tokens[name].__getitem__, pieces), bounds, strict=True)
                parts = [piece[start:end] for piece, (start, end) in cuts]
                if name in with_none:
                    joined[name] = join_column(name, parts)
                else:
                    joined[name] = np.concatenate(parts, dtype=np.int64)
        return JoinedRows(joined, common_lengths(lengths))

    return read


def _token_column(columns: Any) -> str:
    return "input_ids" if "input_ids" in columns else "masked_input_ids"


def _row_places(dataset: Any) -> Ints | None:
    """Return where the rows lie in the table, or None where they lie in its order.

    What goes through all rows reads the table in its order first: to follow the places that
    `shuffle` and `select` make takes 80 times as long.
    """
    indices = dataset._indices  # noqa: SLF001  # nothing else tells
    return None if indices is None else indices.column(0).to_numpy()


def _holds_tokens(name: str, column: pa.ChunkedArray) -> bool:
    kind = column.type
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    if not is_list or not pa.types.is_integer(kind.value_type) or column.null_count:
        return False
    return name == "word_ids" or not any(chunk.values.null_count for chunk in column.chunks)


def _open(column: Any) -> Any:
    """Return the tokens of all rows, as an array of NumPy unless there is None among them."""
    return column.values if column.values.null_count else column.values.to_numpy()


def _group_by_offsets(
    batches: Sequence[pa.RecordBatch], names: Sequence[str]
) -> list[tuple[list[str], list[memoryview]]]:
    """Group the columns whose rows begin and end at the same places, as those made together do."""
    groups: list[tuple[list[str], list[Any]]] = []
    for name in names:
        offsets = [batch.column(name).offsets.to_numpy() for batch in batches]
        for alike, known in groups:
            if all(map(np.array_equal, offsets, known)):
                alike.append(name)
                break
        else:
            groups.append(([name], offsets))
    return [(alike, [memoryview(piece) for piece in offsets]) for alike, offsets in groups]
