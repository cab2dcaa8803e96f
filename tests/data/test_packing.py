"""Documents of any length to rows that several of them fill, each whole."""

from __future__ import annotations

import copy
import json
import logging
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest
from datasets.fingerprint import Hasher
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from mlmadapt import group_texts, pack_texts, tokenize_with_word_ids
from tests.data.reference_packing import reference_row_lengths
from tests.data.strategies import Columns, documents, tables

GOLDEN = json.loads(Path(__file__).with_name("golden").joinpath("rows.json").read_text("utf-8"))
DOCUMENTS = {"input_ids": [[5, 6, 7], [], [8, 9], [4]], "word_ids": [[0, 0, 1], [], [0, 1], [0]]}
sizes = st.integers(2, 14)


def pieces(columns: Columns, row: int) -> list[dict[str, list[Any]]]:
    """Return the documents of a row, each with its part of every column."""
    tokens = [
        dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)
    ][row]
    places = range(len(tokens["input_ids"]))
    runs = [[*run] for _, run in groupby(places, lambda place: tokens["document_ids"][place])]
    return [{name: [values[at] for at in run] for name, values in tokens.items()} for run in runs]


def words(numbers: list[int | None]) -> list[int]:
    """Number words from 0, one for each run of the same number."""
    runs = [[*run] for _, run in groupby(numbers)]
    count, result = -1, []
    for run in runs:
        count += run[0] not in (None, -1)
        result += [-1 if run[0] in (None, -1) else count] * len(run)
    return result


@given(drawn=tables(), chunk_size=sizes)
def test_rows_are_the_same_of_lists_and_tables(
    drawn: tuple[Columns, pa.Table], chunk_size: int
) -> None:
    """Of any layout, of arrays too, a second time as well; and the batch is left as it was."""
    columns, table = drawn
    before = copy.deepcopy(columns)
    rows = pack_texts(columns, chunk_size=chunk_size)
    assert columns == before
    packed = pack_texts(table, chunk_size=chunk_size)
    assert type(packed) is pa.Table
    packed.validate(full=True)
    assert packed.to_pydict() == rows == pack_texts(columns, chunk_size=chunk_size)
    assert [*rows] == packed.column_names == [*columns, "document_ids"]
    columns["word_ids"] = [[-1 if w is None else w for w in row] for row in columns["word_ids"]]
    arrays = {name: [np.array(row, int) for row in rows] for name, rows in columns.items()}
    assert json.dumps(pack_texts(arrays, chunk_size=chunk_size)) == json.dumps(rows)


@given(columns=documents(), chunk_size=sizes)
def test_documents_are_whole_and_no_token_is_lost(columns: Columns, chunk_size: int) -> None:
    """Each is in one row and in order, or in whole rows and a piece of what is left."""
    rows = pack_texts(columns, chunk_size=chunk_size)
    assert all(0 < len(row) <= chunk_size for row in rows["input_ids"])
    by_first: dict[int, dict[str, list[Any]]] = {}
    for row, ids in enumerate(rows["document_ids"]):
        in_row = pieces(rows, row)
        assert ids == [
            *chain(*([number] * len(piece["input_ids"]) for number, piece in enumerate(in_row)))
        ]
        by_first |= {piece["input_ids"][0]: piece for piece in in_row}
    tokens = 0
    for document, ids in enumerate(columns["input_ids"]):
        for start in range(0, len(ids), chunk_size):
            # Tokens are numbered through, so the first of a piece tells where it is from.
            piece = by_first.pop(ids[start])
            part = slice(start, start + chunk_size)
            assert piece["input_ids"] == ids[part]
            assert words(piece["word_ids"]) == words(columns["word_ids"][document][part])
            tokens += len(piece["input_ids"])
    assert not by_first
    assert tokens == sum(map(len, columns["input_ids"]))


@given(columns=documents(), chunk_size=sizes)
def test_no_two_words_of_a_row_share_a_number(columns: Columns, chunk_size: int) -> None:
    """They count from 0 through all documents of the row."""
    rows = pack_texts(columns, chunk_size=chunk_size)
    for row, numbers in enumerate(rows["word_ids"]):
        parts = [words(piece["word_ids"]) for piece in pieces(rows, row)]
        counts = np.cumsum([0, *(max(part, default=-1) + 1 for part in parts)])
        expected = [
            [-1 if word < 0 else word + int(before) for word in part]
            for part, before in zip(parts, counts[:-1], strict=True)
        ]
        assert numbers == [*chain(*expected)]


@given(lengths=st.lists(st.integers(0, 40), max_size=60), chunk_size=st.integers(2, 20))
def test_rows_are_as_full_as_those_of_a_slow_reference(lengths: list[int], chunk_size: int) -> None:
    """Best fit, the longest first, as the textbook has it, makes rows of the same lengths."""
    rows = pack_texts({"input_ids": [[0] * n for n in lengths]}, chunk_size=chunk_size)
    expected = reference_row_lengths(lengths, chunk_size=chunk_size)
    assert sorted(map(len, rows["input_ids"])) == sorted(expected)


@given(columns=documents(), chunk_size=sizes)
def test_rows_are_in_the_order_of_the_documents(columns: Columns, chunk_size: int) -> None:
    """So are the documents in a row: what is first in the batch is first in the rows."""
    rows = pack_texts(columns, chunk_size=chunk_size)["input_ids"]
    assert rows == sorted(rows)
    assert all(row == sorted(row) for row in rows)


@given(columns=documents())
def test_a_row_with_room_for_all_is_the_one_that_grouping_makes(columns: Columns) -> None:
    """Then nothing is to be chosen, whatever the room is."""
    options: Any = {"remainder": "keep", "labels": False, "documents": True}
    for chunk_size in (100, 10**12):
        expected = group_texts(columns, chunk_size=chunk_size, **options)
        assert pack_texts(columns, chunk_size=chunk_size) == expected


def test_rows_are_the_golden_ones() -> None:
    """What `datasets` has cached by the function's name must not go stale unnoticed."""
    assert pack_texts(GOLDEN["documents"], chunk_size=8) == GOLDEN["packed"]


def test_a_batch_without_tokens_has_no_rows() -> None:
    """Neither do lists or a table of empty documents, nor none at all."""
    for nothing in ([], [[]]):
        none = {"input_ids": [], "document_ids": []}
        assert pack_texts({"input_ids": nothing}) == none
        table = pa.table({"input_ids": pa.array(nothing, pa.list_(pa.int32()))})
        assert pack_texts(table).to_pydict() == none


def test_columns_keep_their_types() -> None:
    """Large lists stay large, small numbers small; the added one is as small as it may be."""
    table = pa.table(
        {
            "input_ids": pa.array([[7, 8], [9]], pa.large_list(pa.uint16())),
            "weights": pa.array([[0.5, 0.25], [1.0]], pa.list_(pa.float32())),
            "pieces": [["a", "b"], ["c"]],
        }
    )
    rows = pack_texts(table, chunk_size=4)
    assert rows.select(table.column_names).schema == table.schema
    assert rows.schema.field("document_ids").type == pa.large_list(pa.int32())
    assert rows["pieces"].to_pylist() == [["a", "b", "c"]]
    assert pack_texts(table.select(["weights", "input_ids"])).schema.names[-1] == "document_ids"


def test_how_full_rows_are_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """And how many documents are empty, which are not in them."""
    with caplog.at_level(logging.INFO, logger="mlmadapt"):
        pack_texts(DOCUMENTS, chunk_size=4)
        pack_texts({"input_ids": [[7, 8]]}, chunk_size=2)
    first, second = (record.getMessage() for record in caplog.records)
    assert first == (
        "pack_texts laid 3 documents with 6 tokens into 2 rows of 4 tokens, which are 75.0 % full; "
        "1 empty documents are in none"
    )
    assert second.endswith("1 rows of 2 tokens, which are 100.0 % full")


@pytest.mark.parametrize("layout", [None, "arrow", "numpy", "torch", "pandas"])
@pytest.mark.parametrize("lengths", [[3, 0, 5, 4], [3, 3, 3]])
def test_map_takes_every_format(layout: str | None, lengths: list[int]) -> None:
    """Through `map` the rows are the same, whatever form the dataset hands them over in."""
    columns = {name: [[*range(n)] for n in lengths] for name in ("input_ids", "word_ids")}
    dataset = datasets.Dataset.from_dict(columns).with_format(layout)
    fn_kwargs = {"chunk_size": 6}
    mapped = dataset.map(pack_texts, batched=True, batch_size=None, fn_kwargs=fn_kwargs)
    assert mapped.with_format(None).to_dict() == pack_texts(columns, **fn_kwargs)


def test_the_function_is_known_by_its_name() -> None:
    """`datasets` finds rows in its cache by where the function is from, so that must not change."""
    assert (pack_texts.__module__, pack_texts.__name__) == ("mlmadapt.data.packing", "pack_texts")
    assert Hasher.hash(pack_texts) == Hasher.hash(pack_texts)


@pytest.mark.data
@pytest.mark.parametrize(("chunk_size", "least"), [(128, 0.97), (512, 0.99)])
def test_rows_of_real_sentences_are_full(chunk_size: int, least: float, data_dir: Path) -> None:
    """Packed over everything; 61 % of a padded batch is text."""
    tokenizer = AutoTokenizer.from_pretrained(data_dir / "tokenizers" / "bert-base-uncased")
    path = str(data_dir / "corpora" / "general_wikisplit" / "test.parquet")
    texts = datasets.Dataset.from_parquet(path)["text"][:]
    rows = pack_texts(tokenize_with_word_ids({"text": texts}, tokenizer), chunk_size=chunk_size)
    lengths = [*map(len, rows["input_ids"])]
    assert least < np.mean(lengths) / chunk_size <= 1


@pytest.mark.parametrize(
    ("batch", "chunk_size", "message"),
    [
        (DOCUMENTS, 0, "chunk_size is 0; it must be a whole number, 2 or more"),
        (DOCUMENTS, 1, "chunk_size is 1; it must be a whole number, 2 or more"),
        (DOCUMENTS, "128", "chunk_size is '128'; it must be a whole number"),
        ({"ids": [[1]]}, 4, r"the batch has \['ids'\], without 'input_ids'; tokenize the doc"),
        (pa.table({"text": ["a"]}), 4, r"the batch has \['text'\], without 'input_ids'"),
        ({"input_ids": [], "document_ids": []}, 4, "'document_ids' is there already; the batch "),
        (pa.table({"input_ids": [[1], None]}), 4, "column 'input_ids' is not .* row 1 is None"),
        ({"input_ids": [[1], [2]], "a": [[1]]}, 4, "column 'a' has 1 rows, 'input_ids' has 2; all"),
        ({"input_ids": [[1]], "word_ids": [[0.5]]}, 4, "'word_ids' holds float64 .* one whole num"),
    ],
)
def test_wrong_input_is_named(batch: Any, chunk_size: Any, message: str) -> None:
    """The message has the argument or the column and the row, what is there and the cure."""
    with pytest.raises(ValueError, match=message):
        pack_texts(batch, chunk_size=chunk_size)
