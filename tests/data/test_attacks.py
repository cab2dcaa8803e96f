"""What broke when the way from documents to rows was tried by hostile hands."""

from __future__ import annotations

import itertools
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from datasets import Dataset
from tokenizers import Regex, Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
from transformers import PreTrainedTokenizerFast

from mlmadapt import group_texts, phrases, tokenize_with_word_ids
from mlmadapt.data import chunking
from mlmadapt.testing import tiny_tokenizer


def test_threads_that_share_a_tokenizer_lose_no_token() -> None:
    """One thread puts truncation back while another is at work."""
    tokenizer = tiny_tokenizer("wordpiece")
    texts = ["the film is good " * 30] * 50
    tokenizer.backend_tokenizer.enable_truncation(7)
    tokenizer.backend_tokenizer.enable_padding(length=5)
    before = tokenizer.backend_tokenizer.to_str()

    def count(_: int) -> int:
        tokens: Any = tokenize_with_word_ids({"text": texts}, tokenizer)["input_ids"]
        return sum(map(len, tokens))

    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(count, range(60))) == {50 * 122}
    assert tokenizer.backend_tokenizer.to_str() == before


def test_white_space_between_marks_is_no_part_of_a_word() -> None:
    """A pattern in the manner of o200k takes line breaks and slashes to the marks before them."""
    alphabet = {letter: place for place, letter in enumerate(sorted(ByteLevel.alphabet()))}
    backend = Tokenizer(BPE(alphabet, []))
    pattern = Regex(r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\p{L}+|\s+")
    split = Split(pattern, "isolated")
    backend.pre_tokenizer = Sequence([split, ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    tokens: Any = tokenize_with_word_ids({"text": ["();\n//"]}, tokenizer)
    assert tokens["word_ids"][0].tolist() == [0, 0, 0, -1, 1, 1]


words = {"input_ids": [[5, 6, 7], [8]]}


@pytest.mark.parametrize(
    "given",
    [
        [np.array([np.nan, 0, 1]), np.array([0])],
        [np.array([None, 0, 1]), np.array([0])],
        [torch.tensor([torch.nan, 0, 1]), torch.tensor([0])],
        [[float("nan"), 0, 1], [0]],
    ],
)
def test_nothing_in_word_ids_is_nothing_in_every_format(given: Any) -> None:
    """NumPy and torch can only say NaN, or hold objects."""
    rows = group_texts({**words, "word_ids": given}, chunk_size=4)
    assert rows["word_ids"] == [[-1, 0, 1, 2]]


@pytest.mark.parametrize("layout", ["numpy", "torch", "pandas", "arrow"])
def test_nothing_in_word_ids_is_nothing_to_map(layout: str) -> None:
    """Whatever a dataset makes of None."""
    dataset = Dataset.from_dict({**words, "word_ids": [[None, 0, 1], [0]]}).with_format(layout)
    rows = dataset.map(group_texts, batched=True, fn_kwargs={"chunk_size": 4})
    assert rows.with_format(None)["word_ids"][:] == [[-1, 0, 1, 2]]


@pytest.mark.parametrize("value_type", [pa.float64(), pa.float32()])
def test_floats_in_word_ids_are_whole_or_refused(value_type: pa.DataType) -> None:
    """Lists and tables alike."""
    for values, number in (([[0.0, None, 1.0], [0.0]], 1), ([[0.0, 0.5, 1.0], [0.0]], None)):
        batch = {**words, "word_ids": values}
        table = pa.table({**words, "word_ids": pa.array(values, pa.list_(value_type))})
        for examples in (batch, table):
            if number is None:
                with pytest.raises(ValueError, match=r"'word_ids' holds float.* one whole num"):
                    group_texts(examples, chunk_size=4)
            else:
                grouped: Any = group_texts(examples, chunk_size=4)
                assert pa.table(grouped)["word_ids"].to_pylist() == [[0, -1, 1, 2]]


def test_a_row_longer_than_all_tokens_costs_no_memory() -> None:
    """Nothing is laid out that no token fills."""
    columns = {**words, "word_ids": [[-1, 0, 1], [0]]}
    rows = group_texts(columns, chunk_size=10**12, remainder="keep", labels=False)
    assert rows == {"input_ids": [[5, 6, 7, 8]], "word_ids": [[-1, 0, 1, 2]]}


def test_whole_numbers_of_numpy_are_whole() -> None:
    """A chunk size that was computed."""
    assert group_texts(dict(words), chunk_size=np.int64(2)) == group_texts(words, chunk_size=2)


def test_more_tokens_than_small_offsets_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of columns that are written anew, all are one piece."""
    table = pa.table({**words, "word_ids": [[-1, 0, 1], [0]]})
    small = group_texts(table, chunk_size=2)
    monkeypatch.setattr(chunking, "_MOST_OF_SMALL", 3)
    large = group_texts(table, chunk_size=2)
    assert pa.types.is_large_list(large["word_ids"].type)
    assert large.to_pydict() == small.to_pydict()


def test_record_batches_are_tables() -> None:
    """Arrow's other kind of batch."""
    texts = pa.record_batch({"text": ["the film", "a film"]})
    tokens: Any = tokenize_with_word_ids(texts, tiny_tokenizer("wordpiece"))  # type: ignore[type-var]
    assert tokens == tokenize_with_word_ids(pa.table(texts), tiny_tokenizer("wordpiece"))
    (batch,) = tokens.to_batches()
    assert group_texts(batch, chunk_size=4) == group_texts(tokens, chunk_size=4)


class Frame:
    """A table of another library, such as polars, that Arrow can read."""

    def __init__(self, table: pa.Table) -> None:
        """Take what it holds."""
        self.table = table

    def __iter__(self) -> Any:
        """Yield columns, as the frames of polars do, and not their names."""
        return iter(self.table.columns)

    def __arrow_c_stream__(self, requested_schema: Any = None) -> Any:
        """Hand it on by Arrow's protocol."""
        return self.table.__arrow_c_stream__(requested_schema)


def test_frames_are_tables() -> None:
    """Those that Arrow can read come back as tables, which `map` takes in all formats."""
    table = pa.table({"text": ["the film", "a film"]})
    tokenizer = tiny_tokenizer("wordpiece")
    tokens: Any = tokenize_with_word_ids(Frame(table), tokenizer)  # type: ignore[type-var]
    assert tokens == tokenize_with_word_ids(table, tokenizer)
    rows: Any = group_texts(Frame(tokens), chunk_size=4)  # type: ignore[type-var]
    assert rows == group_texts(tokens, chunk_size=4)


def test_accents_are_the_same_composed_or_not() -> None:
    """In phrases and in texts; places are those of the text as it is."""
    forms = [unicodedata.normalize(form, "cafe\u0301 noir") for form in ("NFC", "NFD")]
    for unit, other in itertools.product(forms, forms):
        text = f"un {other}"
        assert [text[slice(*span)] for span in phrases([unit])(text)] == [other]
    assert phrases(["cafe"])("cafe\u0301") == []


def test_a_long_phrase_costs_little() -> None:
    """One of 400 words made all texts with its first word slow: all lengths up to it were tried."""

    class Counting(set):  # type: ignore[type-arg]
        asked = 0

        def __contains__(self, phrase: object) -> bool:
            self.asked += 1
            return super().__contains__(phrase)

    find: Any = phrases(["the book", "the " + "very " * 399])
    known = find.keywords["known"] = Counting(find.keywords["known"])
    text = "the film was as good as the book that the film was made of " * 30
    assert len(find(text)) == 30
    assert known.asked <= 2 * text.split().count("the")


def test_no_phrases_are_no_list() -> None:
    """None is said, as a string is."""
    with pytest.raises(TypeError, match="units is None; it must be a list of phrases"):
        phrases(None)  # type: ignore[arg-type]
