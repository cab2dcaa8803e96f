"""Documents of any length to rows of one length."""

from __future__ import annotations

import copy
import json
import logging
import warnings
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlmadapt import group_texts
from mlmadapt.data import chunking
from tests.data.reference_chunking import reference_group_texts
from tests.data.strategies import Columns, documents, tables

GOLDEN = json.loads(Path(__file__).with_name("golden").joinpath("rows.json").read_text("utf-8"))
DOCUMENTS = {"input_ids": [[5, 6, 7], [], [8, 9]], "word_ids": [[0, 0, 1], [], [0, 1]]}
options = st.fixed_dictionaries(
    {
        "chunk_size": st.integers(1, 9),
        "remainder": st.sampled_from(["drop", "keep"]),
        "labels": st.booleans(),
        "documents": st.booleans(),
    }
)


def group(batch: Any, **options: Any) -> Any:
    """Group without a word about what is dropped."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return group_texts(batch, **options)


@given(drawn=tables(), options=options)
def test_rows_are_what_a_slow_reference_makes(
    drawn: tuple[Columns, pa.Table], options: dict[str, Any]
) -> None:
    """The same for lists, arrays and tables of any layout, and the batch is left as it was."""
    columns, table = drawn
    before = copy.deepcopy(columns)
    expected = reference_group_texts(columns, **options)
    rows = group(columns, **options)
    assert rows == expected
    assert columns == before
    grouped = group(table, **options)
    assert type(grouped) is pa.Table
    grouped.validate(full=True)
    assert grouped.to_pydict() == expected
    added = [name for name in ("documents", "labels") if options[name]]
    names = [*columns, *({"documents": "document_ids"}.get(name, name) for name in added)]
    assert [*rows] == grouped.column_names == names
    columns["word_ids"] = [[-1 if w is None else w for w in row] for row in columns["word_ids"]]
    arrays = {name: [np.array(row, int) for row in rows] for name, rows in columns.items()}
    assert json.dumps(group(arrays, **options)) == json.dumps(expected)  # numbers of Python


@given(columns=documents(), options=options)
def test_tokens_are_kept_or_counted(columns: Columns, options: dict[str, Any]) -> None:
    """Rows hold all tokens in order, but for the remainder; words of a row count from 0."""
    tokens = [*chain.from_iterable(columns["input_ids"])]
    rows = group(columns, **options)
    size, full = options["chunk_size"], len(tokens) - len(tokens) % options["chunk_size"]
    kept = full if options["remainder"] == "drop" else len(tokens)
    assert [*chain.from_iterable(rows["input_ids"])] == tokens[:kept]
    assert all(len(row) == size for row in rows["input_ids"][: full // size])
    assert len(rows["input_ids"]) == -(-kept // size)
    for row in rows["word_ids"]:
        numbers = [*dict.fromkeys(number for number in row if number >= 0)]
        assert numbers == [*range(len(numbers))]


@given(columns=documents(multiple_of=4), remainder=st.sampled_from(["drop", "keep"]))
def test_rows_do_not_depend_on_their_batch(columns: Columns, remainder: str) -> None:
    """Documents that fill their rows give the same rows alone as with others."""
    together = group(columns, chunk_size=4, remainder=remainder)
    count = len(columns["input_ids"])
    batches = [{name: [rows[i]] for name, rows in columns.items()} for i in range(count)]
    alone = [group_texts(batch, chunk_size=4, remainder=remainder) for batch in batches]
    for name, rows in together.items():
        assert rows == [*chain.from_iterable(batch[name] for batch in alone)]


@pytest.mark.parametrize(
    ("word_ids", "chunk_size", "expected"),
    [
        ([[0, 0, 1], [0], [0, 0]], 6, [[0, 0, 1, 2, 3, 3]]),  # no special tokens between documents
        ([[-1, 0, -1], [None, 0, None]], 6, [[-1, 0, -1, -1, 1, -1]]),  # one word a document
        ([[0, 0, 0, 1]], 2, [[0, 0], [0, 1]]),  # a word cut by the end of a row
        ([[4, 4, 7], [7, 9]], 5, [[0, 0, 1, 2, 3]]),  # numbers left out, the next document's alike
        ([[0, -1, 0]], 3, [[0, -1, 1]]),  # apart, so two words
    ],
)
def test_examples_of_words(
    word_ids: list[list[int]], chunk_size: int, expected: list[list[int]]
) -> None:
    """No two words of a row share a number."""
    rows = group_texts({"word_ids": word_ids}, chunk_size=chunk_size, labels=False)
    assert rows["word_ids"] == expected


@pytest.mark.parametrize("remainder", ["drop", "keep"])
def test_rows_are_the_golden_ones(remainder: str) -> None:
    """What `datasets` has cached by the function's name must not go stale unnoticed."""
    assert group_texts(GOLDEN["documents"], chunk_size=8, remainder=remainder) == GOLDEN[remainder]


def _stores(column: pa.ChunkedArray) -> list[int]:
    return [chunk.values.buffers()[1].address for chunk in column.chunks]


@pytest.mark.parametrize("list_type", [pa.list_, pa.large_list])
@pytest.mark.parametrize("remainder", ["drop", "keep"])
def test_no_token_of_a_table_is_copied(list_type: Any, remainder: str) -> None:
    """Rows lie over the same memory, also of a slice; but one that two chunks share is copied."""
    lengths = [9, 5, 3, 0, 6, 4]  # without the first: 8 tokens, 6 and 4
    array = pa.array([[*range(n)] for n in lengths], list_type(pa.int32()))
    one = pa.table({"input_ids": array[1:]})
    rows = group_texts(one, chunk_size=4, remainder=remainder)
    assert {*_stores(rows["input_ids"]), *_stores(rows["labels"])} == {*_stores(one["input_ids"])}
    parts = [pa.array(part.to_pylist(), array.type) for part in (array[1:4], array[4:5], array[5:])]
    several = pa.table({"input_ids": pa.chunked_array(parts)})
    rows = group_texts(several, chunk_size=4, remainder=remainder)["input_ids"]
    is_shared = [store in _stores(several["input_ids"]) for store in _stores(rows)]
    assert is_shared == [True, True, False, *[True] * (remainder == "keep")]
    assert [len(chunk) for chunk in rows.chunks] == [2, 1, 1, *[1] * (remainder == "keep")]


@pytest.mark.parametrize("value_type", [pa.int8(), pa.uint8(), pa.int16(), pa.int64(), pa.null()])
def test_words_of_a_row_may_outgrow_their_type(value_type: pa.DataType) -> None:
    """300 one-word documents make a row of 300 words, whatever type holds the numbers of each."""
    word = None if value_type == pa.null() else 0
    table = pa.table({"word_ids": pa.array([[word]] * 300, pa.list_(value_type))})
    rows = group_texts(table, chunk_size=300, labels=False)
    assert rows["word_ids"].to_pylist() == [[-1] * 300 if word is None else [*range(300)]]


def test_documents_of_a_row_count_from_0() -> None:
    """One that the end of a row cuts is a document in both, and an empty one has no number."""
    lengths = [3, 0, 2, 6]
    columns = {"input_ids": [[*range(n)] for n in lengths]}
    for batch in (columns, pa.table(columns)):
        rows = group_texts(batch, chunk_size=4, remainder="keep", documents=True)["document_ids"]
        rows = rows.to_pylist() if isinstance(rows, pa.ChunkedArray) else rows
        assert rows == [[0, 0, 0, 1], [0, 1, 1, 1], [0, 0, 0]]
    assert group_texts({}, labels=False, documents=True) == {}


def test_labels_are_a_copy() -> None:
    """Changing the inputs of a row, as a collator may, leaves its labels; given labels stay."""
    rows = group_texts(DOCUMENTS, chunk_size=2)
    rows["input_ids"][0][0] = 103
    assert rows["labels"] == [[5, 6], [7, 8]]
    labelled = {**DOCUMENTS, "labels": [[-100, 6, 7], [], [-100, 9]]}
    assert group_texts(labelled, chunk_size=2)["labels"] == [[-100, 6], [7, -100]]
    assert "labels" not in group_texts(DOCUMENTS, chunk_size=2, labels=False)


def test_a_batch_that_yields_nothing_warns() -> None:
    """It says what is lost, two cures and the caller's line; an empty batch has nothing to lose."""
    message = (
        "3 documents with 5 tokens in all yield no row of 8 tokens, so all are dropped; "
        "batch_size=None in map makes it one pass, remainder='keep' keeps every token"
    )
    with pytest.warns(UserWarning, match=message) as caught:
        rows = group_texts(DOCUMENTS, chunk_size=8)
    assert caught[0].filename == __file__
    assert rows == {"input_ids": [], "word_ids": [], "labels": []}
    assert group_texts(DOCUMENTS, chunk_size=8, remainder="keep")["input_ids"] == [[5, 6, 7, 8, 9]]
    for nothing in ([], [[]]):
        assert group_texts({"input_ids": nothing}) == {"input_ids": [], "labels": []}
    empty = pa.table({"word_ids": pa.array([], pa.list_(pa.int32()))})
    assert group_texts(empty, labels=False).num_rows == 0


def test_what_is_dropped_is_logged(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a warning where it is a share that counts and more than was told before, each time."""
    monkeypatch.setattr(chunking, "_worth_warning", 0.01)
    levels = []
    with caplog.at_level(logging.INFO, logger="mlmadapt"):
        for tokens, chunk_size in ((5000, 4999), (5, 4), (5, 4), (100, 64), (5000, 4999), (5, 5)):
            caplog.clear()
            group_texts({"input_ids": [[7] * tokens]}, chunk_size=chunk_size)
            levels.append([record.levelname for record in caplog.records])
        # One pass over a large dataset leaves nothing to be done; 36 % of a small one does, also
        # after a smaller loss was told of; and what is said once per batch would be noise.
        assert levels == [["INFO"], ["WARNING"], ["INFO"], ["WARNING"], ["INFO"], []]
        group_texts(DOCUMENTS, chunk_size=3, remainder="keep")
        assert not caplog.records
        group_texts(DOCUMENTS, chunk_size=3)
    (message,) = caplog.messages
    assert message.startswith("group_texts dropped 2 of 5 tokens (40.0 %) after the last whole")
    assert "batch_size=None in map" in message


@pytest.mark.parametrize("layout", [None, "arrow", "numpy", "torch", "pandas"])
@pytest.mark.parametrize("lengths", [[3, 0, 5, 4], [3, 3, 3]])
def test_map_takes_every_format(layout: str | None, lengths: list[int]) -> None:
    """Through `map` the rows are the same, whatever form the dataset hands them over in."""
    columns = {name: [[*range(n)] for n in lengths] for name in ("input_ids", "word_ids")}
    dataset = datasets.Dataset.from_dict(columns).with_format(layout)
    fn_kwargs = {"chunk_size": 4, "remainder": "keep"}
    mapped = dataset.map(group_texts, batched=True, batch_size=None, fn_kwargs=fn_kwargs)
    expected = reference_group_texts(columns, **fn_kwargs)
    assert mapped.with_format(None).to_dict() == expected


UNLABELLED: dict[str, Any] = {"labels": False}


@pytest.mark.parametrize(
    ("batch", "options", "message"),
    [
        (DOCUMENTS, {"chunk_size": 0}, "chunk_size is 0; it must be a whole number, 1 or more"),
        (DOCUMENTS, {"chunk_size": True}, "chunk_size is True; it must be a whole number"),
        (DOCUMENTS, {"chunk_size": "128"}, "chunk_size is '128'; it must be a whole number"),
        (DOCUMENTS, {"chunk_size": 64.0}, "chunk_size is 64.0; it must be a whole number"),
        (DOCUMENTS, {"remainder": "pad"}, "remainder is 'pad'; it must be 'drop' or 'keep'"),
        ({"ids": [[1]]}, {}, r"labels=True copies 'input_ids', .* are \['ids'\]; tokenize first"),
        (pa.table({"ids": [[1]]}), {}, r"labels=True copies 'input_ids', .* are \['ids'\]"),
        ({**DOCUMENTS, "text": ["a"] * 3}, {}, r"'text' is not .*: row 0 is 'a', .*=\['text'\]"),
        (pa.table({"a": ["a"]}), UNLABELLED, r"column 'a' is .* its type is string; .*=\['a'\]"),
        ({**DOCUMENTS, "labels": [0, 1, 0]}, {}, "column 'labels' is .* row 0 is 0, of type int"),
        ({"a": [[1], {"b": 2}, []]}, UNLABELLED, "'a' is .* row 1 is {'b': 2}, of type dict"),
        ({"raw": [[1], b"", []]}, UNLABELLED, "column 'raw' is .* row 1 is b'', of type bytes"),
        (pa.table({"input_ids": [[1]], "y": [3.5]}), {}, "column 'y' is .* its type is double"),
        ({"input_ids": [[1], None]}, {}, "'input_ids' is not .* row 1 is None, of type None"),
        (pa.table({"input_ids": [[1], None]}), {}, "column 'input_ids' is not .* row 1 is None"),
        (
            {**DOCUMENTS, "word_ids": [[0, 0, 1], [], [0]]},
            {},
            "row 2 has 2 'input_ids' but 1 'word",
        ),
        (pa.table({"a": [[1], [2]], "b": [[1], []]}), UNLABELLED, "row 1 has 1 'a' but 0 'b'; all"),
        ({"input_ids": [[1], [2]], "a": [[1]]}, {}, "'a' has 1 rows, 'input_ids' has 2; all"),
        ({**DOCUMENTS, "document_ids": 0}, {"documents": True}, "'document_ids' is there already;"),
    ],
)
def test_wrong_input_is_named(batch: Any, options: dict[str, Any], message: str) -> None:
    """The message has the argument or the column and the row, what is there and the cure."""
    with pytest.raises(ValueError, match=message):
        group_texts(batch, **options)


WORDS = {"input_ids": [[5, 6, 7], [8]]}


@pytest.mark.parametrize("layout", ["numpy", "torch", "pandas", "arrow"])
def test_nothing_in_word_ids_is_nothing_to_map(layout: str) -> None:
    """Whatever a dataset makes of None."""
    columns = {**WORDS, "word_ids": [[None, 0, 1], [0]]}
    dataset = datasets.Dataset.from_dict(columns).with_format(layout)
    rows = dataset.map(group_texts, batched=True, fn_kwargs={"chunk_size": 4})
    assert rows.with_format(None)["word_ids"][:] == [[-1, 0, 1, 2]]


@pytest.mark.parametrize("value_type", [pa.float64(), pa.float32()])
def test_floats_in_word_ids_are_whole_or_refused(value_type: pa.DataType) -> None:
    """Lists and tables alike."""
    whole, broken = [[0.0, None, 1.0], [0.0]], [[0.0, 0.5, 1.0], [0.0]]
    for to_batch in (lambda words: words, lambda words: pa.array(words, pa.list_(value_type))):
        make = pa.table if to_batch(whole) is not whole else dict
        grouped: Any = group_texts(make({**WORDS, "word_ids": to_batch(whole)}), chunk_size=4)
        assert pa.table(grouped)["word_ids"].to_pylist() == [[0, -1, 1, 2]]
        with pytest.raises(ValueError, match=r"'word_ids' holds float.* one whole num"):
            group_texts(make({**WORDS, "word_ids": to_batch(broken)}), chunk_size=4)


def test_a_row_longer_than_all_tokens_costs_no_memory() -> None:
    """Nothing is laid out that no token fills; a size may be computed by NumPy."""
    columns = {**WORDS, "word_ids": [[-1, 0, 1], [0]]}
    rows = group_texts(columns, chunk_size=np.int64(10**12), remainder="keep", labels=False)
    assert rows == {"input_ids": [[5, 6, 7, 8]], "word_ids": [[-1, 0, 1, 2]]}


def test_more_tokens_than_small_offsets_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of columns that are written anew, all are one piece."""
    table = pa.table({**WORDS, "word_ids": [[-1, 0, 1], [0]]})
    small = group_texts(table, chunk_size=2)
    monkeypatch.setattr(chunking, "_MOST_OF_SMALL", 3)
    large = group_texts(table, chunk_size=2)
    assert pa.types.is_large_list(large["word_ids"].type)
    assert large.to_pydict() == small.to_pydict()
