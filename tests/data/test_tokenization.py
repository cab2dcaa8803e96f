"""Documents to tokens that know their word."""

from __future__ import annotations

import copy
import functools
import json
import logging
import pickle
import unicodedata
import warnings
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, pairwise, product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import pyarrow as pa
import pytest
from datasets.fingerprint import Hasher
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders
from tokenizers.models import BPE, Unigram, WordLevel
from tokenizers.pre_tokenizers import ByteLevel, Metaspace, Sequence, Split
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

from mlmadapt import group_texts, phrases, tokenize_with_word_ids
from mlmadapt.data.tokenization import count_bytes, spell_word
from mlmadapt.testing import TOKENIZER_KINDS, tiny_corpus, tiny_tokenizer
from tests.data.reference_tokenization import (
    reference_phrases,
    reference_tokenize,
    special_ids,
    splits_at,
)

if TYPE_CHECKING:
    from collections.abc import Callable

GOLDEN = json.loads(Path(__file__).with_name("golden").joinpath("words.json").read_text("utf-8"))
SENTENCE = "The film doesn't end well; electroencephalography!"
NO_SPLIT = ("byte_bpe_nosplit", "no_pretokenizer")
PIECES = [
    *["film", "unfilmable", "The", "a", "doesn't", "-", ".", "中文", "电影", "ﬁ", "İ", "¨", "ß"],
    *[" ", " ", " ", "  ", "\t", "\n", "\r\n", "\xa0", "\u3000", "\x0c", "\x85", "\u200b"],
    *["é", "e\u0301", "\u0301", "😀", "👩‍👧", "❤\ufe0f", "\x00", "\ufeff", "▁", "Ġ", "##film"],
    *["[MASK]", "<mask>", "[SEP]", "</s>", "[UNK]", "<unk>"],
]
# Surrogates are no text; the others are white space to Python, but not to Unicode.
characters = st.characters(exclude_categories=["Cs"], exclude_characters="\x1c\x1d\x1e\x1f")
words = st.sampled_from(PIECES) | st.text(characters, max_size=3)
documents = st.lists(words, max_size=12).map("".join)
kinds = pytest.mark.parametrize("kind", TOKENIZER_KINDS)
shared = functools.cache(tiny_tokenizer)


@st.composite
def documents_with_spans(draw: st.DrawFn) -> tuple[str, list[tuple[int, int]]]:
    """Draw a document and spans of it anywhere, some with nothing between them."""
    text = draw(documents)
    cuts = sorted(draw(st.sets(st.integers(0, len(text)), max_size=7)))
    return text, [span for span in pairwise(cuts) if draw(st.booleans())]


def tokenize(texts: list[str], tokenizer: Any, **options: Any) -> list[dict[str, list[int]]]:
    """Return a dict of lists for each document."""
    columns = tokenize_with_word_ids({"text": texts}, tokenizer, **options)
    rows = zip(*columns.values(), strict=True) if texts else ()
    return [{n: v.tolist() for n, v in zip(columns, row, strict=True)} for row in rows]


def word_tokens(text: str, tokenizer: Any, **options: Any) -> list[str]:
    """Return a string a word, its tokens joined by "|"; those of no word are left out."""
    (row,) = tokenize([text], tokenizer, **options)
    groups: dict[int, list[str]] = {}
    for token, word in zip(row["input_ids"], row["word_ids"], strict=True):
        groups.setdefault(word, []).append(tokenizer.convert_ids_to_tokens(token))
    return ["|".join(groups[word]) for word in sorted(groups) if word >= 0]


@kinds
@given(texts=st.lists(documents, max_size=4))
def test_batches_are_what_a_slow_reference_makes_of_each_document(
    kind: str, texts: list[str]
) -> None:
    """Ids, masks, types and words are those of one document at a time, in a dict and in a table."""
    tokenizer, batch = shared(kind), {"text": texts, "label": [1] * len(texts)}
    before = copy.deepcopy(batch)
    expected = [reference_tokenize(text, tokenizer) for text in texts]
    assert tokenize(texts, tokenizer) == expected
    columns = tokenize_with_word_ids(batch, tokenizer)
    table = tokenize_with_word_ids(pa.table({"text": pa.array(texts, pa.string())}), tokenizer)
    assert batch == before
    assert type(columns) is dict
    assert type(table) is pa.Table
    table.validate(full=True)
    assert table.to_pylist() == expected
    assert list(columns) == table.column_names == [*tokenizer("a"), "word_ids"]


@kinds
@given(text=documents)
def test_laws_of_words(kind: str, text: str) -> None:
    """All tokens are there, specials and ignored space are -1, words rise and end at spaces."""
    tokenizer = shared(kind)
    (row,) = tokenize([text], tokenizer)
    encoded = tokenizer(text, return_offsets_mapping=True)
    assert row["input_ids"] == encoded["input_ids"]
    row = {name: row[name] for name in ("input_ids", "word_ids")}
    specials = special_ids(tokenizer)
    ignored = {space for space in text if space.isspace() and not splits_at(tokenizer, space)}
    covers, before = [], -1
    for token, word, (start, end) in zip(*row.values(), encoded["offset_mapping"], strict=True):
        covered = text[start:end]
        first = end - len(covered.lstrip())
        covers.append((first, first + len(covered.strip())))
        is_ignored = bool(covered) and ignored.issuperset(covered)
        assert (word == -1) == (token in specials or is_ignored)
        assert word == -1 or word >= before
        before = max(word, before)
    pairs = zip(pairwise(row["word_ids"]), pairwise(covers), strict=True)
    for (one, two), ((begin, end), (start, stop)) in pairs:
        if one == two >= 0 and (begin < end or start < stop):
            assert not any(map(str.isspace, text[end:start]))


def words_with_and_without(text: str, end: str, tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the words of a text alone and before `end`, up to the first token that differs."""
    tokens, words = [], []
    for whole in (text, text + end):
        encoded = tokenizer(whole, return_offsets_mapping=True, verbose=False)
        tokens.append([*zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)])
        (row,) = tokenize([whole], tokenizer)
        numbers: dict[int, int] = {-1: -1}  # a special token in the text leaves a number out
        words.append([numbers.setdefault(word, len(numbers) - 1) for word in row["word_ids"]])
    pairs = enumerate(zip(*tokens, strict=False))
    same = next((i for i, (one, two) in pairs if one != two), len(tokens[0]))
    return words[0][:same], words[1][:same]


@kinds
@given(text=documents, end=st.sampled_from(["\t", "\n", " \n", "\x0b", "\x0c", "\xa0", "\u3000"]))
def test_white_space_at_the_end_changes_no_word_before_it(kind: str, text: str, end: str) -> None:
    """Words are by one rule, whether or not a document holds white space that is ignored."""
    alone, before = words_with_and_without(text, end, shared(kind))
    assert alone == before


@pytest.mark.data
def test_white_space_at_the_end_changes_no_word_of_real_text(data_dir: Path) -> None:
    """ALBERT splits rare words into a lone mark and letters, and ignores only a vertical tab."""
    tokenizer = AutoTokenizer.from_pretrained(data_dir / "tokenizers" / "albert-base")
    path = str(data_dir / "imdb" / "small" / "train.parquet")
    texts = datasets.Dataset.from_parquet(path)["text"][:100]
    mark, marks = tokenizer.convert_tokens_to_ids("▁"), 0
    for text in texts:
        for end in ("\n", "\t", "\x0b"):
            alone, before = words_with_and_without(text, end, tokenizer)
            assert alone == before
            assert len(alone) > len(text) / 10
        (row,) = tokenize([text + "\x0b"], tokenizer)
        for place, token in enumerate(row["input_ids"]):
            if token == mark:
                marks += 1
                assert row["word_ids"][place] == row["word_ids"][place + 1] >= 0
    assert marks > 100


@pytest.mark.parametrize("end", ["", "\n", "\t"])
def test_a_lone_mark_begins_the_word_after_it(end: str) -> None:
    """As with NLLB, which ignores a tab; a mark that stands alone in its own word is a word."""
    vocabulary = {token: i for i, token in enumerate(["<unk>", "▁", "a", "b", "▁a"])}
    backend = Tokenizer(BPE(vocabulary, [("▁", "a")], unk_token="<unk>"))  # noqa: S106
    backend.pre_tokenizer = Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert word_tokens(f"a b{end}", tokenizer) == ["▁a", "▁|b"]
    assert word_tokens(f"a  b{end}", tokenizer) == ["▁a", "▁", "▁|b"]
    assert word_tokens(f"b {end}", tokenizer) == ["▁|b", "▁"]
    assert word_tokens(f"b\ta b{end}", tokenizer) == ["▁|b", "a", "▁|b"]


@kinds
@given(drawn=st.lists(documents_with_spans(), max_size=3))
def test_spans_of_the_user_are_words(
    kind: str, drawn: list[tuple[str, list[tuple[int, int]]]]
) -> None:
    """Spans may cut words, join words, touch, and cover tokens in part, as the slow reference."""
    tokenizer, spans = shared(kind), dict(drawn)
    expected = [reference_tokenize(text, tokenizer, spans[text]) for text in spans]
    assert tokenize([*spans], tokenizer, word_boundaries=spans.__getitem__) == expected


@pytest.mark.parametrize(
    ("kind", "spans", "expected"),
    [
        ("wordpiece", [], ["un|##film|##a|##ble", "film"]),
        ("wordpiece", [(2, 6)], ["un", "##film", "##a|##ble", "film"]),
        ("wordpiece", [(3, 12)], ["un", "##film|##a|##ble|film"]),
        ("wordpiece", [(3, 5), (5, 8)], ["un", "##film|##a|##ble", "film"]),
        ("wordpiece", [(1, 7)], ["un|##film|##a", "##ble", "film"]),
        ("wordpiece", [(0, 1), (1, 2)], ["un", "##film|##a|##ble", "film"]),
        ("unigram_offsets", [(6, 11)], ["▁|u|n|f|ilm", "a|ble", "▁film"]),
        ("unigram_offsets", [(10, 11)], ["▁|u|n|f|ilm|a|ble", "▁film"]),
        ("unigram_offsets", [(9, 14)], ["▁|u|n|f|ilm|a", "ble|▁film"]),
        ("byte_bpe_nosplit", [(6, 14)], ["un|f|ilm", "a|ble|Ġfilm"]),
        ("no_pretokenizer", [(0, 14)], ["▁|u|n|f|ilm|a|ble|▁film"]),
    ],
)
def test_examples_of_spans(kind: str, spans: list[tuple[int, int]], expected: list[str]) -> None:
    """A span takes all tokens it reaches, but not by white space; the others keep their words."""
    text = "unfilmable film"
    assert word_tokens(text, shared(kind), word_boundaries=lambda _: spans) == expected


@pytest.mark.parametrize("kind", ["byte_bpe", "no_pretokenizer"])
def test_spans_stay_in_their_document(kind: str) -> None:
    """Not even a token that covers nothing, at the end of a document, reaches the next one."""
    tokenizer, special_free = tiny_tokenizer(kind), tiny_tokenizer(kind)
    special_free.backend_tokenizer.post_processor = TemplateProcessing(single="$A")
    texts = ["film ", "film", "", "the", "the", " "]
    options = {"word_boundaries": phrases(["film"])}
    for kept in (tokenizer, special_free):
        rows = tokenize(texts, kept, **options)
        assert rows == [*chain(*(tokenize([text], kept, **options) for text in texts))]


@pytest.mark.parametrize("kind", NO_SPLIT)
def test_documents_are_never_one_word(kind: str) -> None:
    """Tokenizers without a word split get words from white space, where their own are one."""
    tokenizer = shared(kind)
    assert {*tokenizer(SENTENCE).word_ids()} == {None, 0}
    (row,) = tokenize([SENTENCE], tokenizer)
    assert {*row["word_ids"]} == {-1, 0, 1, 2, 3, 4, 5}


@kinds
@pytest.mark.parametrize("space", ["\x0c", "\xa0", "\u3000", "\x85", "\t"])
def test_white_space_ends_a_word_on_every_tokenizer(kind: str, space: str) -> None:
    """Also white space at which a tokenizer does not split, whatever is in the other documents."""
    tokenizer = shared(kind)
    before, apart, after = tokenize(["the q", f"the{space}good", "the q"], tokenizer)
    words = [word for word in apart["word_ids"] if word >= 0]
    assert words[0] != words[-1]
    assert before == after == tokenize(["the q"], tokenizer)[0]


@kinds
def test_special_tokens_in_the_text_are_no_words(kind: str) -> None:
    """They are -1 where they are written out, end the word before, and [UNK] stays a word."""
    tokenizer = shared(kind)
    (row,) = tokenize([f"the{tokenizer.mask_token}film q{tokenizer.sep_token}"], tokenizer)
    words = dict.fromkeys(row["word_ids"])
    for token, word in zip(row["input_ids"], row["word_ids"], strict=True):
        is_special = token in special_ids(tokenizer)
        is_space = kind in NO_SPLIT and tokenizer.convert_ids_to_tokens(token) in "▁Ġ"
        assert (word == -1) == (is_special or is_space)
    assert len(words) == 4
    (row,) = tokenize([f"the {tokenizer.unk_token} film"], tokenizer)
    assert row["word_ids"][row["input_ids"].index(tokenizer.unk_token_id)] >= 0


def test_special_tokens_are_split_where_the_tokenizer_says_so() -> None:
    """With `split_special_tokens` they are text, also after pickling, which forgets it."""
    tokenizer = tiny_tokenizer()
    tokenizer.split_special_tokens = True
    twin = pickle.loads(pickle.dumps(tokenizer))  # noqa: S301
    (row,) = tokenize(["the [MASK]"], twin)
    assert tokenizer.mask_token_id not in row["input_ids"]
    assert row["input_ids"] == tokenizer("the [MASK]")["input_ids"]
    assert not twin.backend_tokenizer.encode_special_tokens  # it is left as it was


@kinds
def test_long_documents_stay_whole(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    """100,000 characters are neither cut nor warned of, and have the words of the reference."""
    tokenizer, text = tiny_tokenizer(kind), "\n".join(tiny_corpus(1000))[:100_000]
    assert len(text) == 100_000
    logging.getLogger("transformers").addHandler(caplog.handler)
    try:
        (row,) = tokenize([text], tokenizer)
        assert not caplog.records
        assert len(tokenizer(text)["input_ids"]) > 512
        assert "longer than the specified maximum" in caplog.text  # what was not said
    finally:
        logging.getLogger("transformers").removeHandler(caplog.handler)
    assert row == reference_tokenize(text, tokenizer)


@kinds
def test_baked_in_truncation_and_padding_do_nothing_and_stay(kind: str) -> None:
    """A tokenizer file may hold both; they are lifted for the call alone."""
    tokenizer = tiny_tokenizer(kind)
    texts = ["The film is good. " * 9, "", "a"]
    expected = tokenize(texts, tokenizer)
    tokenizer.backend_tokenizer.enable_truncation(7, stride=2, strategy="only_first")
    tokenizer.backend_tokenizer.enable_padding(direction="left", length=20, pad_to_multiple_of=8)
    before = tokenizer.backend_tokenizer.to_str()
    assert tokenize(texts, tokenizer) == expected
    assert tokenizer.backend_tokenizer.to_str() == before


@kinds
def test_fingerprint_of_the_tokenizer_stays(kind: str) -> None:
    """Also one that has truncated before, as tokenizers keep the setting."""
    tokenizer = tiny_tokenizer(kind)
    tokenizer(SENTENCE, truncation=True, max_length=5, padding="max_length")
    before = Hasher.hash(tokenizer)
    tokenize([SENTENCE], tokenizer)
    assert Hasher.hash(tokenizer) == before


@pytest.mark.parametrize("layout", [None, "arrow", "numpy"])
def test_map_takes_every_format(layout: str | None) -> None:
    """Through `map` the rows are the same, whatever form the dataset hands them over in."""
    tokenizer, texts = shared("wordpiece"), tiny_corpus(20)
    dataset = datasets.Dataset.from_dict({"text": texts, "label": [0] * 20}).with_format(layout)
    mapped = dataset.map(
        tokenize_with_word_ids,
        batched=True,
        batch_size=7,
        fn_kwargs={"tokenizer": tokenizer},
        remove_columns=dataset.column_names,
    )
    assert mapped.with_format(None).to_list() == tokenize(texts, tokenizer)


def test_threads_that_share_a_tokenizer_lose_no_token() -> None:
    """One that truncates and pads is copied, so that no thread changes it under another."""
    tokenizer, texts = tiny_tokenizer("wordpiece"), ["the film is good " * 30] * 50
    tokenizer.backend_tokenizer.enable_truncation(7)
    tokenizer.backend_tokenizer.enable_padding(length=5)
    before = tokenizer.backend_tokenizer.to_str()

    def count(_: int) -> int:
        return sum(len(row["input_ids"]) for row in tokenize(texts, tokenizer))

    with ThreadPoolExecutor(4) as pool:
        assert {*pool.map(count, range(20))} == {50 * 122}
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


def test_frames_and_record_batches_are_tables() -> None:
    """Those that Arrow can read come back as tables, which `map` takes in all formats."""
    table, tokenizer = pa.table({"text": ["the film", "a film"]}), shared("wordpiece")
    expected: Any = tokenize_with_word_ids(table, tokenizer)
    for other in (*table.to_batches(), Frame(table)):
        tokens: Any = tokenize_with_word_ids(other, tokenizer)
        assert tokens == expected
        for rows in (*tokens.to_batches(), Frame(tokens)):
            assert group_texts(rows, chunk_size=4) == group_texts(tokens, chunk_size=4)


@pytest.mark.parametrize(
    ("batch", "options", "error", "message"),
    [
        ({"txt": []}, {}, ValueError, r"text_column is 'text', but the .* \['txt'\]; name the col"),
        (pa.table({"a": ["b"]}), {}, ValueError, r"text_column is 'text', but the .*\['a'\]; name"),
        ({"a": ["b"]}, {"text_column": "c"}, ValueError, r"text_column is 'c', but .*\['a'\]"),
        ({"text": ["a", None]}, {}, TypeError, "row 1 of column 'text' in this batch is None, of "),
        ({"text": ["a", b"b"]}, {}, TypeError, "row 1 .* is b'b', of type bytes; .* must be a str"),
        ({"text": [3.5]}, {}, TypeError, "row 0 .* is 3.5, of type float; .*dataset.filter"),
        (pa.table({"text": ["a", None]}), {}, TypeError, "row 1 .* is None, of type NoneType"),
        ({"text": ["a", None]}, {}, TypeError, r"1 of 2 here are None; .*lambda row: row\['text'"),
        (pa.table({"text": [b"a"]}), {}, TypeError, "row 0 .* is b'a', of type bytes"),
        ({"text": "a film"}, {}, TypeError, "column 'text' is 'a film', not .* map with batched=T"),
        ({"text": None}, {}, TypeError, "column 'text' is None, not .* map with batched=True"),
        ({"text": ["a", "\ud800"]}, {}, ValueError, "row 1 .* not valid Unicode .*clean it with"),
    ],
)
def test_wrong_documents_are_named(
    batch: Any, options: dict[str, str], error: type[Exception], message: str
) -> None:
    """The message has the column, the row, what is there and the cure."""
    with pytest.raises(error, match=message):
        tokenize_with_word_ids(batch, shared("wordpiece"), **options)


def test_slow_tokenizers_are_refused() -> None:
    """They do not know their words."""
    message = "tokenizer is a ByT5Tokenizer, which is not a fast .* AutoTokenizer.from_pretrained"
    with pytest.raises(TypeError, match=message):
        tokenize_with_word_ids({"text": ["a"]}, ByT5Tokenizer())


@pytest.mark.parametrize(
    ("spans", "error", "message"),
    [
        ([(0, 3), (2, 5)], ValueError, r"returned span \(2, 5\) for row 1 .* a text of 8 char"),
        ([(4, 6), (0, 2)], ValueError, r"returned span \(0, 2\) for row 1 .* in order, not over"),
        ([(0, 1), (5, 4)], ValueError, r"returned span \(5, 4\) for row 1"),
        ([(2, 2)], ValueError, r"returned span \(2, 2\) for row 1 .* not be empty"),
        ([(0, 3), (4, 9)], ValueError, r"returned span \(4, 9\) for row 1 .* lie in the text"),
        ([(-1, 3)], ValueError, r"returned span \(-1, 3\) for row 1"),
        ([("the", 0, 3)], TypeError, r"returned \[\('the', 0, 3\)\] for row 1 .* list of \(start"),
        ([(0.0, 3.0)], TypeError, r"returned \[\(0.0, 3.0\)\] for row 1"),
        (None, TypeError, "returned None for row 1"),
    ],
)
def test_wrong_spans_are_named(spans: Any, error: type[Exception], message: str) -> None:
    """The message has the row, the span and what is required of it."""
    texts = ["the film is good", "the film"]
    with pytest.raises(error, match=f"word_boundaries {message}"):
        tokenize(texts, shared("wordpiece"), word_boundaries={texts[0]: [], texts[1]: spans}.get)


@kinds
def test_words_are_the_golden_ones(kind: str) -> None:
    """What `datasets` has cached by the function's name must not go stale unnoticed."""
    assert word_tokens(SENTENCE, shared(kind)) == GOLDEN[kind]


@pytest.mark.data
@pytest.mark.parametrize(
    "name", ["bert-base-uncased", "roberta-base", "albert-base", "bert-base-chinese"]
)
def test_words_of_real_tokenizers_are_the_golden_ones(name: str, data_dir: Path) -> None:
    """One sentence through the tokenizers people use."""
    tokenizer = AutoTokenizer.from_pretrained(data_dir / "tokenizers" / name)
    text = (
        "酒店的房间很干净, 2 nights." if "chinese" in name else "Naïve café-goers don't re-watch."
    )
    assert word_tokens(text, tokenizer) == GOLDEN[name]
    assert tokenize([text], tokenizer) == [reference_tokenize(text, tokenizer)]


@pytest.fixture(scope="module")
def segment(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[tuple[int, int]]]:
    """Return jieba's words as spans."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its syntax and of pkg_resources
        jieba = pytest.importorskip("jieba")
    jieba.setLogLevel(logging.ERROR)
    jieba.dt.tmp_dir = str(tmp_path_factory.mktemp("jieba"))
    return lambda text: [(start, end) for _, start, end in jieba.tokenize(text)]


def test_chinese_words_are_those_of_a_segmenter(segment: Callable[[str], Any]) -> None:
    """Characters of one word are one word, where the tokenizer makes each a word."""
    tokenizer, text = shared("chinese"), "这部电影非常好看。"
    assert word_tokens(text, tokenizer) == [*text]
    expected = ["这部", "电影", "非常", "好看", "。"]
    joined = [
        word.replace("|", "") for word in word_tokens(text, tokenizer, word_boundaries=segment)
    ]
    assert joined == expected


@pytest.mark.data
def test_chinese_reviews_have_the_words_of_a_segmenter(
    segment: Callable[[str], list[tuple[int, int]]], data_dir: Path
) -> None:
    """On real reviews most words are longer than a character, and the reference agrees on all."""
    tokenizer = AutoTokenizer.from_pretrained(data_dir / "tokenizers" / "bert-base-chinese")
    files = [*map(str, (data_dir / "corpora" / "zh_hotel_reviews").glob("*.parquet"))]
    texts = datasets.Dataset.from_parquet(files[:1])["text"][:50]
    rows = tokenize(texts, tokenizer, word_boundaries=segment)
    assert rows == [reference_tokenize(text, tokenizer, segment(text)) for text in texts]
    tokens = sum(len(row["word_ids"]) - 2 for row in rows)
    segmented = sum(max(row["word_ids"]) + 1 for row in rows)
    assert 1.3 < tokens / segmented < 2


@pytest.mark.parametrize(
    ("units", "text", "expected"),
    [
        (["A B", "A B C"], "A B C, A B", ["A B C", "A B"]),
        (["a b c d", "b c"], "a b c e", ["b c"]),
        (["new york"], "NEW \t\n YORK", ["NEW \t\n YORK"]),
        (["STRASSE"], "die Straße", ["Straße"]),
        (["New York"], "New, York; NewYork; New Yorker; anew York", []),
        (["3.5", "e-mail", "C++"], "A 3.5 e-mail in C++.", ["3.5", "e-mail", "C++"]),
        (["电影", "电影院"], "我去电影院看电影。", ["电影院", "电影"]),
        (["cafe", "नमस"], "cafe\u0301 नमस्ते cafe", ["cafe"]),
        (["नमस्ते दुनिया"], "नमस्ते दुनिया!", ["नमस्ते दुनिया"]),
        (["x"], "", []),
        ([], "x", []),
    ],
)
def test_examples_of_phrases(units: list[str], text: str, expected: list[str]) -> None:
    """Longest match, case, runs of white space, punctuation, scripts without spaces, borders."""
    assert [text[start:end] for start, end in phrases(units)(text)] == expected


few_words = st.lists(st.sampled_from(["a", "b", "Ab", "."]), min_size=1, max_size=4)


@given(
    units=st.lists(few_words.map(" ".join), max_size=5),
    text=st.lists(st.sampled_from(["a", "B", "ab", ".", " ", " ", "\n "]), max_size=15).map(
        "".join
    ),
    ignore_case=st.booleans(),
)
def test_phrases_are_what_a_slow_reference_finds(
    units: list[str], text: str, *, ignore_case: bool
) -> None:
    """Trying all phrases at all words finds the same, with and without regard to case."""
    spans = phrases(units, ignore_case=ignore_case)(text)
    assert spans == reference_phrases(text, units, ignore_case=ignore_case)


def test_phrases_are_values() -> None:
    """They can be sent to a worker, and the order of the list is not part of the fingerprint."""
    first = phrases(["New York", "new  york", "a"])
    assert pickle.loads(pickle.dumps(first))("In new york") == [(3, 11)]  # noqa: S301
    assert Hasher.hash(first) == Hasher.hash(phrases({"a", "NEW YORK"}))
    assert Hasher.hash(first) != Hasher.hash(phrases(["a"]))


@pytest.mark.parametrize(
    ("units", "error", "message"),
    [
        (["a", " "], ValueError, "phrase ' ' holds no word; remove it from the list"),
        ([""], ValueError, "phrase '' holds no word"),
        ("New York", TypeError, "units is 'New York'; it must be a list of phrases"),
        (None, TypeError, "units is None; it must be a list of phrases"),
    ],
)
def test_wrong_phrases_are_named(units: Any, error: type[Exception], message: str) -> None:
    """A phrase without a word matches nothing, and a string is no list."""
    with pytest.raises(error, match=message):
        phrases(units)


def test_accents_are_the_same_composed_or_not() -> None:
    """In phrases and in texts; places are those of the text as it is."""
    forms = [unicodedata.normalize(form, "cafe\u0301 noir") for form in ("NFC", "NFD")]
    for unit, other in product(forms, forms):
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


def byte_fallback() -> PreTrainedTokenizerFast:
    """Make a tokenizer as Llama's, which spells what it does not know in bytes."""
    pieces = ["<unk>", "▁", "a", "▁a", *(f"<0x{byte:02X}>" for byte in range(256))]
    backend = Tokenizer(Unigram([(piece, 0.0) for piece in pieces], 0, byte_fallback=True))
    backend.pre_tokenizer = Metaspace()
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")  # noqa: S106


@pytest.mark.parametrize(
    "text", ["a film", "mother-in-law's", "中文 电影", "naïve", "a 😀", "C#", "##a"]
)
@pytest.mark.parametrize("kind", [*TOKENIZER_KINDS, "byte_fallback"])
def test_a_word_is_its_text(kind: str, text: str) -> None:
    """Without white space, and without the tokenizer's marks; its parts have all its bytes."""
    tokenizer = byte_fallback() if kind == "byte_fallback" else shared(kind)
    ids: list[int] = tokenizer(f"a {text}", add_special_tokens=False)["input_ids"]
    expected = "".join(tokenizer.decode(ids).split())
    if tokenizer.unk_token_id in ids or "".join(f"a{text}".split()) != expected:
        return  # what it does not know, or writes otherwise
    assert spell_word(ids, tokenizer) == expected
    assert count_bytes(ids, tokenizer) == len(expected.encode())
    for cut in range(1, len(ids)):  # as the edge of a row does, also inside a character
        parts = [count_bytes(part, tokenizer) for part in (ids[:cut], ids[cut:])]
        assert sum(parts) == len(expected.encode())
        assert min(parts) > 0


def test_marks_and_broken_characters() -> None:
    """A piece of WordPiece alone loses its mark, a sign does not; one byte of four counts one."""
    tokenizer = shared("wordpiece")
    assert spell_word(tokenizer.convert_tokens_to_ids(["##film", "##a"]), tokenizer) == "filma"
    backend = Tokenizer(WordLevel({"[UNK]": 0, "#": 1, "��": 2}, unk_token="[UNK]"))  # noqa: S106
    plain = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert spell_word([1, 1], plain) == "##"
    assert count_bytes([2], plain) == 6
    emoji = shared("byte_bpe")(" 😀", add_special_tokens=False)["input_ids"]
    assert [count_bytes([token], shared("byte_bpe")) for token in emoji[-3:]] == [1, 1, 1]
    assert spell_word([*map(ord, "defg")], ByT5Tokenizer()) == "abcd"  # a slow one tells no mark
