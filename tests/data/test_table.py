"""Rows cut out of a table, beside the same rows as the dataset makes them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from datasets.distributed import split_dataset_by_node
from hypothesis import given
from hypothesis import strategies as st

from mlmadapt.data.rows import join_rows
from mlmadapt.data.table import (
    as_rows,
    dataset_lengths,
    is_dataset,
    is_frozen,
    is_stream,
    measure_rows,
    split_part,
    table_reader,
)
from mlmadapt.testing import tiny_tokenizer
from tests.data.strategies import tables
from tests.scripts.tiny_run import CountedStream

if TYPE_CHECKING:
    from pathlib import Path

    from tests.data.strategies import Columns

ROWS = {"input_ids": [[7, 8], [9], [5, 6, 4]], "word_ids": [[0, 1], [0], [-1, None, 2]]}


def read_lists(dataset: Any, rows: list[int]) -> dict[str, list[list[int]]] | None:
    """Read rows, and cut them apart again."""
    read = table_reader(dataset)
    if read is None:
        return None
    joined, lengths = read(rows)
    return {
        name: [row.tolist() for row in np.split(values, np.cumsum(lengths)[:-1])]
        for name, values in joined.items()
    }


@given(tables(), st.data())
def test_rows_are_those_of_the_dataset(
    drawn: tuple[Columns, pa.Table], data: st.DataObject
) -> None:
    """In any order and number, of slices and chunks of any types, empty ones too."""
    _, table = drawn
    dataset = datasets.Dataset(table)
    if any(pa.types.is_fixed_size_list(column.type) for column in table.columns):
        assert table_reader(dataset) is None
    elif len(dataset):
        rows = data.draw(st.lists(st.integers(0, len(dataset) - 1), min_size=1, max_size=9))
        expected, lengths = join_rows({name: dataset[rows][name] for name in table.column_names})
        read = table_reader(dataset)
        assert read is not None
        joined, counts = read(rows)
        assert counts.tolist() == lengths.tolist()
        assert joined.keys() == expected.keys()
        for name, values in expected.items():
            assert joined[name].dtype == values.dtype == np.int64
            assert joined[name].tolist() == values.tolist()


@pytest.mark.parametrize("kind", [None, "torch", "numpy", "arrow"])
def test_rows_are_found_where_a_dataset_was_shuffled(kind: str | None, tmp_path: Path) -> None:
    """From disk and in several parts, shuffled, selected in one piece or not, in any format."""
    datasets.Dataset.from_dict(ROWS).save_to_disk(tmp_path)
    part = datasets.Dataset.load_from_disk(tmp_path)
    whole = datasets.concatenate_datasets([part, part.select([2, 0]), part])
    views = [whole, whole.shuffle(seed=1), whole.select(range(2, 6)), whole.select([5, 5, 0, 1])]
    views += [views[1].select([3, 1]), views[1].shard(2, 1), whole.select(range(4, 0, -1))]
    for view in views:
        rows = list(range(len(view)))
        expected = {
            name: [[-1 if value is None else value for value in row] for row in view[:][name]]
            for name in ROWS
        }
        assert read_lists(view.with_format(kind), rows) == expected


def test_only_columns_that_are_shown_are_read() -> None:
    """As `with_format(columns=...)` says; labels are never among them."""
    more = dict.fromkeys(("labels", "extra"), ROWS["input_ids"])
    dataset = datasets.Dataset.from_dict({**ROWS, **more})
    shown = dataset.with_format("torch", columns=["word_ids", "input_ids"])
    every = dataset.with_format("torch", columns=["input_ids"], output_all_columns=True)
    for view, names in ((dataset, [*ROWS, "extra"]), (shown, [*ROWS]), (every, [*ROWS, "extra"])):
        read = table_reader(view)
        assert read is not None
        assert [*read([0])[0]] == names
    assert table_reader(dataset.with_format("torch", columns=["input_ids"])) is None


class Own(datasets.Dataset):
    """A dataset that makes its rows in a way of its own."""


@pytest.mark.parametrize(
    "column",
    [
        ["a", "b", "c"],
        [1, 2, 3],
        [["a"], ["b"], ["c"]],
        [[0.5], [1.0], [1.5]],
        [[True], [False], [True]],
        [[[1]], [[2]], [[3]]],
        [[1], None, [3]],
        [[1], [None], [3]],
    ],
)
def test_other_columns_are_left_to_the_dataset(column: list[Any]) -> None:
    """Whatever a column holds, its rows or an error come from where they always did."""
    assert table_reader(datasets.Dataset.from_dict({**ROWS, "extra": column})) is None


def test_rows_that_are_made_are_left_to_the_dataset() -> None:
    """By a transform, a class or a list; the table does not tell them."""
    dataset = datasets.Dataset.from_dict(ROWS)
    assert table_reader(dataset) is not None
    assert table_reader(dataset.with_transform(dict)) is None
    assert table_reader(Own(dataset.data)) is None
    assert table_reader(list(dataset)) is None
    for name in ROWS:
        assert table_reader(dataset.remove_columns(name)) is None


def test_what_is_read_is_no_part_of_the_table() -> None:
    """A table may lie in a file and be read-only; what is made of its rows can be written to."""
    dataset = datasets.Dataset.from_dict(ROWS)
    read = table_reader(dataset)
    assert read is not None
    joined, _ = read([2, 0])
    for name in ROWS:
        joined[name] += 1
    assert read_lists(dataset, [2, 0]) == {
        "input_ids": [[5, 6, 4], [7, 8]],
        "word_ids": [[-1, -1, 2], [0, 1]],
    }


def test_columns_may_lie_in_memory_in_different_ways() -> None:
    """A column that was added later has other chunks and offsets; rows are the same."""
    more = [[1, 2], [3], [4, 5, 6]]
    table = pa.table(ROWS)
    table = pa.concat_tables([table.slice(0, 1), pa.table(table.slice(1).to_pydict())])
    late = pa.chunked_array([pa.array([[0], *more])[1:3], pa.array(more)[2:]])
    dataset = datasets.Dataset(table.append_column("extra", late))
    assert read_lists(dataset, [2, 0, 1]) == {
        "input_ids": [[5, 6, 4], [7, 8], [9]],
        "word_ids": [[-1, -1, 2], [0, 1], [0]],
        "extra": [[4, 5, 6], [1, 2], [3]],
    }


def test_a_row_has_one_length() -> None:
    """As rows that come as lists; the row is counted within the batch."""
    extra = [[1, 2], [3], [4, 5]]
    read = table_reader(datasets.Dataset.from_dict({**ROWS, "extra": extra}))
    assert read is not None
    assert read([1, 0])[1].tolist() == [1, 2]
    with pytest.raises(ValueError, match=r"row 1 has 3 'input_ids' but 2 'extra'; all columns"):
        read([0, 2])


def test_names_of_datasets_that_are_read_are_there() -> None:
    """What is no public part of `datasets`; without it, rows would be taken for others."""
    dataset = datasets.Dataset.from_dict(ROWS)
    assert dataset._indices is None
    assert dataset.select([2, 0])._indices.column(0).to_pylist() == [2, 0]
    assert isinstance(dataset.data.table, pa.Table)
    assert dataset.data.column("input_ids").to_pylist() == ROWS["input_ids"]
    stream = dataset.to_iterable_dataset()
    assert stream._distributed is None
    part = split_dataset_by_node(stream, 1, 2)._distributed
    assert (part.rank, part.world_size) == split_part(split_dataset_by_node(stream, 1, 2)) == (1, 2)
    assert split_part(stream) is split_part(iter([])) is None


@pytest.mark.parametrize("kind", [None, "torch", "numpy"])
def test_lengths_and_ids_are_those_of_the_rows(kind: str | None) -> None:
    """Shuffled and selected; rows that are left out do not count, nor does what a format makes."""
    whole = datasets.Dataset.from_dict({"input_ids": [[7, 8], [90], [], [5, 6, 4]]})
    for view in (whole, whole.shuffle(seed=1), whole.select([3, 0]), whole.select([1, 1, 2])):
        ids = view["input_ids"][:]
        shown = view.with_format(kind)
        lengths = dataset_lengths(shown)
        assert lengths is not None
        assert lengths.tolist() == [*map(len, ids)]
        expected = max(map(len, ids)), max(token for row in ids for token in row)
        assert measure_rows("rows", shown) == measure_rows("rows", list(view)) == expected
    frozen = whole.rename_column("input_ids", "masked_input_ids")
    assert measure_rows("rows", frozen) == (3, 90)
    made = datasets.Dataset.from_dict({"text": ["a"]}).with_transform(
        lambda rows: {"input_ids": [[1, 2] for _ in rows["text"]]}
    )
    assert (dataset_lengths(made), measure_rows("rows", made)) == (None, (2, 2))
    assert dataset_lengths(iter(ids)) is None
    assert is_dataset(made)
    assert not is_dataset(list(whole))
    with pytest.raises(ValueError, match=r"eval has \['text'\], without 'input_ids'; tokenize the"):
        measure_rows("eval", datasets.Dataset.from_dict({"text": ["a"]}))


LISTED = [{"input_ids": [7, 8]}, {"input_ids": [9]}]


@pytest.mark.parametrize("kind", ["arrow", "pandas", "polars", "numpy", "torch", None])
def test_rows_are_dicts_whatever_their_format(kind: str | None) -> None:
    """Of the columns that the format shows; others than tables and frames are left alone."""
    if kind == "polars":
        pytest.importorskip("polars")
    whole = datasets.Dataset.from_list([{**row, "text": "a"} for row in LISTED])
    shown = whole.with_format(kind, columns=["input_ids"])
    rows = as_rows("dataset", shown)
    assert [
        {name: list(row[name]) for name in row} for row in map(rows.__getitem__, (0, 1))
    ] == LISTED
    assert (rows is shown) == (kind in ("numpy", "torch", None))


@pytest.mark.parametrize(
    ("dataset", "kind"),
    [
        (None, "NoneType, None"),
        (lambda: iter(LISTED), "function, <function"),
        (torch.utils.data.DataLoader(LISTED), "DataLoader, <torch"),  # type: ignore[arg-type]
        (pd.DataFrame(LISTED), "DataFrame, "),
        (datasets.DatasetDict({"train": datasets.Dataset.from_list(LISTED)}), "DatasetDict, "),
        (datasets.Dataset.from_list(LISTED).to_iterable_dataset(), "IterableDataset, "),
        (CountedStream(LISTED), "CountedStream, "),
        (["a film " * 999] * 10**4, r"list, \['a film a fil"),
        ([[7, 8], [9]], r"list, \[\[7, 8\], \[9\]\]"),
        ("imdb", "str, 'imdb'"),
        (np.zeros((2, 3), int), "ndarray, "),
        (tiny_tokenizer()(["a film", "story"]), "BatchEncoding, "),
    ],
)
def test_what_is_no_dataset_is_named(dataset: Any, kind: str) -> None:
    """With its class, what it holds, and what makes a dataset of it, in 200 characters."""
    message = f"train_dataset is a {kind}.*; it must be a Dataset or a list of dicts: D"
    with pytest.raises(TypeError, match=f"(?s){message}") as raised:
        as_rows("train_dataset", dataset)
    assert len(str(raised.value)) <= (200 if isinstance(dataset, list) else 220)


def test_what_comes_one_after_another_is_a_stream() -> None:
    """What can be looked up is none, even if it can be iterated, nor is a function."""
    listed = datasets.Dataset.from_list(LISTED)
    for stream in (
        iter(LISTED),
        CountedStream(LISTED),
        listed.to_iterable_dataset(),
        (row for row in LISTED),
    ):
        assert is_stream(stream)
    for other in (LISTED, listed, pd.DataFrame(LISTED), None, lambda: iter(LISTED), {"a": LISTED}):
        assert not is_stream(other)


@pytest.mark.parametrize("column", ["input_ids", "masked_input_ids"])
@pytest.mark.parametrize("nest", [list, torch.tensor, np.array])
def test_rows_of_rows_are_refused(column: str, nest: Any) -> None:
    """As a tokenizer returns them that is told to return tensors of one text."""
    rows = [{column: nest([[7, 8]])}, {column: nest([[9]])}]
    message = rf"eval has rows of '{column}' whose shape is not \(tokens,\), .*7, 8\]\]"
    with pytest.raises(ValueError, match=message):
        measure_rows("eval", rows)


LONG = [*range(7, 17)]
EMPTY = {"input_ids": [2, 3], "labels": [-100, -100]}
COPY = {"input_ids": LONG, "labels": LONG}
FROZEN = {"input_ids": [4, *LONG[1:]], "labels": [7, *[-100] * 9]}
KEPT = {"input_ids": [2, 9, 3], "labels": [-100, 9, -100]}


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([EMPTY] * 20 + [FROZEN], True),
        ([FROZEN] + [EMPTY] * 20, True),
        ([KEPT] * 20 + [FROZEN], True),
        ([KEPT] * 20, False),  # are told by the prefix
        ([EMPTY] * 20, False),
        ([{**KEPT, "word_ids": [0, 1, 2]}] * 20, True),
        ([{f"masked_{name}": KEPT[name] for name in KEPT}], True),
        ([COPY] * 20, False),
        ([{"input_ids": LONG}] * 20, False),
        ([{"input_ids": LONG, "labels": 1}] * 20, False),
        ([COPY] * 20 + [FROZEN], True),
    ],
)
@pytest.mark.parametrize("kind", ["list", None, "torch", "numpy", "arrow", "transform"])
def test_all_rows_are_asked_whether_they_are_frozen(rows: Any, expected: Any, kind: Any) -> None:
    """Those at the end too, as lists and in any format."""
    dataset: Any = rows
    if kind != "list":
        dataset = datasets.Dataset.from_list(rows)
        backwards = dataset.select(range(len(rows))[::-1])
        dataset = (
            backwards.with_transform(dict) if kind == "transform" else backwards.with_format(kind)
        )
    assert is_frozen(dataset) == expected


def test_rows_that_are_left_out_are_not_asked() -> None:
    """Whether a dataset is frozen is what its own rows say; a reader leaves frozen ones alone."""
    whole = datasets.Dataset.from_list(
        [{**row, "word_ids": row["input_ids"]} for row in (COPY, FROZEN)]
    )
    assert [is_frozen(whole.select([row])) for row in (0, 1)] == [False, True]
    assert [table_reader(whole.select([row])) is None for row in (0, 1)] == [False, True]
    prefixed = whole.add_column("masked_labels", [[1], [2]])
    assert table_reader(prefixed) is None
