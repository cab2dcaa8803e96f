"""Documents to tokens that know their word.

Whole-word masking needs to know which tokens belong together. Offsets do not tell (they include the
space before a word on some tokenizers and not on others), and ``##`` is WordPiece's alone. The
tokenizer's own ``word_ids()`` is right on every fast tokenizer that splits text into words first;
on those that do not, and for languages without spaces, words come from the text itself. `phrases`
makes words of expressions that are longer than one.
"""

import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from functools import cache, partial
from itertools import chain
from operator import index
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mlmadapt._types import Columns, Ints, Tokenizer
from mlmadapt.data.rows import read_batch, split_rows

if TYPE_CHECKING:
    from tokenizers import Encoding
    from tokenizers import Tokenizer as Backend


Spans = Sequence[tuple[int, int]]
WordBoundaries = Callable[[str], Spans]

# As Unicode has it, and tokenizers: the separators \x1c to \x1f are white space to Python alone.
_WHITE_SPACE = "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000"
_WHITE_SPACE += "".join(map(chr, range(0x2000, 0x200B)))
_TRIMMED = re.compile(r"\S(?:.*\S)?", re.DOTALL)
IS_UNUSED = re.compile(r"[\[<]unused_?\d+[\]>]").fullmatch  # a reserved token


def tokenize_with_word_ids(
    examples: Columns,
    tokenizer: Tokenizer,
    *,
    text_column: str = "text",
    word_boundaries: WordBoundaries | None = None,
) -> Columns:
    """Tokenize a batch of documents, whole, and give each token the number of its word.

    For ``dataset.map(tokenize_with_word_ids, batched=True, fn_kwargs={"tokenizer": tokenizer},
    remove_columns=dataset.column_names)``. Nothing is truncated or padded, whatever the tokenizer's
    file has baked in: chunking comes next, and a cut document would lose its end without a word.
    The tokenizer is left as it was, so that a second run hits `map`'s cache.

    Words are the tokenizer's own. Where it ignores some white space (byte-level tokenizers without
    a pattern ignore all of it, BERT's a form feed), words are split there all the same; otherwise
    a whole document could be one "word". A token that spans two words makes them one, since it
    cannot be masked in part. White space that the tokenizer makes a word of its own stays one, and
    can be a target: on RoBERTa 9 % of the words of Python code, and none of IMDb's.

    Args:
        examples: A batch with a column of documents: a dict of lists, or a ``pyarrow.Table``
            (datasets with format "arrow"; about 5 % faster through `map`). Frames and record
            batches that Arrow can read are taken as tables.
        tokenizer: A fast tokenizer.
        text_column: The column with the documents.
        word_boundaries: Text to a list of ``(start, end)`` character spans, in order and not
            overlapping: the tokens of one span are one word. For languages written without spaces,
            and for units longer than a word (see `phrases`). Text outside all spans keeps its own
            words.

    Returns:
        The model's inputs by the tokenizer's names (``input_ids``, ``attention_mask``, and
        ``token_type_ids`` where the model has them), and ``word_ids``: an integer per token, rising
        within a document, -1 for a token of no word: special tokens, and tokens of nothing but
        white space that the tokenizer ignores. A lone ``▁`` or ``Ġ`` belongs to the word that the
        tokenizer begins with it. The columns come as the batch did: a table, or a dict with an
        array of rows of shape ``(sequence,)`` for each.

    Raises:
        TypeError: If the tokenizer is not a fast one, the column is not a batch, a document is not
            a string, or `word_boundaries` returns something else than spans.
        ValueError: If the column is missing, a document is not valid Unicode, or `word_boundaries`
            returns spans that overlap, are empty, run backwards or leave the text.

    Examples:
        >>> from mlmadapt.testing import tiny_tokenizer
        >>> tokenizer = tiny_tokenizer("wordpiece")
        >>> tokens = tokenize_with_word_ids({"text": ["the film", "unfilmable"]}, tokenizer)
        >>> [row.tolist() for row in tokens["word_ids"]]
        [[-1, 0, 1, -1], [-1, 0, 0, 0, 0, -1]]
    """
    backend = whole_backend(tokenizer)
    documents, is_table = read_batch(examples)
    texts = _read_texts(documents, text_column)
    encodings = backend.encode_batch(texts)
    lengths = np.fromiter(map(len, encodings), np.int64, len(encodings))
    # One flat array a column: lists of lists would cost more than half the tokenizing again.
    columns = {"input_ids": _join((encoding.ids for encoding in encodings), lengths, np.int32)}
    if "token_type_ids" in tokenizer.model_input_names:
        # The template of a single text gives them, whatever the text: mostly 0 throughout.
        types = np.zeros(lengths.sum(), np.int8)
        if encodings and any(max(encodings, key=len).type_ids):
            types = _join((encoding.type_ids for encoding in encodings), lengths, np.int8)
        columns["token_type_ids"] = types
    if "attention_mask" in tokenizer.model_input_names:
        columns["attention_mask"] = np.ones(lengths.sum(), np.int8)

    # Arrow turns None into null in one pass; Python would look at every token.
    words = pa.array([encoding.word_ids for encoding in encodings], pa.list_(pa.int32()))
    word_ids = words.flatten().fill_null(-1).to_numpy(zero_copy_only=False)
    # A special token written out in the text is special all the same, but counts as a word there.
    special = np.isin(columns["input_ids"], list(special_token_ids(tokenizer)))
    word_ids = np.where(special, -1, word_ids).astype(np.int32)
    is_text = word_ids >= 0
    unsplit = _unsplit_white_space(backend)
    rows = [row for row, text in enumerate(texts) if any(map(text.__contains__, unsplit))]
    if rows:
        there = np.repeat(np.isin(np.arange(len(texts)), rows), lengths)
        some, theirs = [texts[row] for row in rows], [encodings[row] for row in rows]
        spans, apart = _place_words(some, unsplit), word_ids[there]
        word_ids[there] = _words_of_spans(spans, some, theirs, is_text[there], apart=apart)
    if word_boundaries is not None:
        spans = _place_spans(texts, word_boundaries)
        word_ids = _words_of_spans(spans, texts, encodings, is_text, outside=word_ids)
    columns["word_ids"] = word_ids
    if is_table:
        offsets = pa.array(np.append(0, np.cumsum(lengths)), pa.int32())
        lists = [pa.ListArray.from_arrays(offsets, pa.array(line)) for line in columns.values()]
        return cast("Columns", pa.table(lists, names=list(columns)))
    return cast("Columns", {name: split_rows(line, lengths) for name, line in columns.items()})


def whole_backend(tokenizer: Tokenizer) -> "Backend":
    """Return the backend of a fast tokenizer: a copy, if its own would truncate or pad.

    A tokenizer's file can carry both, and each call of the tokenizer with either leaves it behind.
    A copy takes a quarter of the time of tokenizing a batch, but leaves the tokenizer as it is.

    Raises:
        TypeError: If the tokenizer is not a fast one.

    Examples:
        >>> from mlmadapt.testing import tiny_tokenizer
        >>> tokenizer = tiny_tokenizer("wordpiece")
        >>> whole_backend(tokenizer) is tokenizer.backend_tokenizer
        True
    """
    if not getattr(tokenizer, "is_fast", False):
        raise TypeError(
            f"tokenizer is a {type(tokenizer).__name__}, which is not a fast tokenizer and does "
            "not know its words; load one with AutoTokenizer.from_pretrained(...)"
        )
    backend: Backend = tokenizer.backend_tokenizer
    # The tokenizer sets this in each call of its own, and one that was pickled has lost it.
    is_lost = backend.encode_special_tokens != tokenizer.split_special_tokens
    if backend.truncation or backend.padding or is_lost:
        backend = deepcopy(backend)
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = tokenizer.split_special_tokens
    return backend


def pre_tokens(backend: "Backend", text: str) -> list[str]:
    """Return what the normalizer and the pre-tokenizer make of a text."""
    if backend.normalizer is not None:
        text = backend.normalizer.normalize_str(text)
    if backend.pre_tokenizer is None:
        return [text]
    return [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(text)]


def special_token_ids(tokenizer: Tokenizer) -> set[int]:
    """Return the ids that are never a word: all special tokens but the unknown token.

    ``[UNK]`` stands for a real word, if never one to predict, unless another role shares its id.

    Examples:
        >>> from mlmadapt.testing import tiny_tokenizer
        >>> tokenizer = tiny_tokenizer("wordpiece")
        >>> ids = special_token_ids(tokenizer)
        >>> tokenizer.mask_token_id in ids, tokenizer.unk_token_id in ids
        (True, False)
    """
    # Not all_special_ids, which takes ALBERT's full stop and hyphen in.
    flagged = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    names = ("bos", "eos", "sep", "pad", "cls", "mask")
    roles = {getattr(tokenizer, f"{name}_token_id") for name in names} - {None}
    return (flagged - {tokenizer.unk_token_id}) | roles


def ordinary_token_ids(tokenizer: Tokenizer) -> list[int]:
    """Return the ids of ordinary tokens, in order: not special, not added, not reserved as unused.

    Examples:
        >>> from mlmadapt.testing import tiny_tokenizer
        >>> ordinary_token_ids(tiny_tokenizer("wordpiece"))[:3]
        [5, 6, 7]
    """
    left_out = special_token_ids(tokenizer) | set(tokenizer.added_tokens_decoder)
    vocab = tokenizer.get_vocab().items()
    return sorted(i for token, i in vocab if i not in left_out and not IS_UNUSED(token))


def spell_word(word: Sequence[int], tokenizer: Tokenizer) -> str:
    """Return the text of a word's tokens, without white space and marks such as ``##``.

    Examples:
        >>> from mlmadapt.testing import tiny_tokenizer
        >>> tokenizer = tiny_tokenizer("wordpiece")
        >>> spell_word(tokenizer("A filmable one").input_ids[1:-1], tokenizer)
        'afilmableone'
    """
    text = "".join(str(tokenizer.decode([*word])).split())
    first, mark = str(tokenizer.convert_ids_to_tokens(word[0])), continuing_mark(tokenizer)
    # Of a word that a row has cut, which begins inside.
    return text.removeprefix(mark) if first.startswith(mark) else text


def continuing_mark(tokenizer: Tokenizer) -> str:
    """Return what a token that goes on with a word begins with, such as ``##``, or nothing.

    Slow tokenizers do not tell.

    Examples:
        >>> from mlmadapt.testing import tiny_tokenizer
        >>> continuing_mark(tiny_tokenizer("wordpiece")), continuing_mark(tiny_tokenizer("unigram"))
        ('##', '')
    """
    model = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    return getattr(model, "continuing_subword_prefix", None) or ""


def count_bytes(word: Sequence[int], tokenizer: Tokenizer) -> int:
    """Count the bytes of a word's text in UTF-8, also where a row has cut a character.

    Examples:
        >>> from mlmadapt.testing import tiny_tokenizer
        >>> tokenizer = tiny_tokenizer("byte_bpe")
        >>> word = tokenizer(" café").input_ids[1:-1]
        >>> count_bytes(word, tokenizer), count_bytes(word[:-1], tokenizer)
        (5, 4)
    """
    text, tokens = spell_word(word, tokenizer), tokenizer.convert_ids_to_tokens([*word])
    if "\ufffd" not in text or "\ufffd" in (spelled := "".join(tokens)):
        return len(text.encode())
    # A byte is a token like <0xE9>, or a character, white space one of those that are left out.
    spelled, number = re.subn("<0x[0-9A-F]{2}>", "x", spelled)
    return len(spelled.replace("▁", "").encode() if number else re.sub("[ĉ-čĠ]", "", spelled))


def _read_texts(columns: Mapping[str, Any], text_column: str) -> list[str]:
    if text_column not in columns:
        seen = f"text_column is {text_column!r}, but the columns are {list(columns)}"
        raise ValueError(f"{seen}; name the column with the documents")
    column = columns[text_column]
    if column is None or isinstance(column, (str, bytes)):
        seen = f"column {text_column!r} is {column!r:.40}, not a batch of documents"
        raise TypeError(f"{seen}; call map with batched=True")
    texts = column.to_pylist() if isinstance(column, pa.ChunkedArray) else list(column)
    where = f"of column {text_column!r} in this batch is"
    for row, text in enumerate(texts):
        try:
            str.encode(text)
        except UnicodeEncodeError as error:
            cure = "clean it with text.encode(errors='replace').decode()"
            raise ValueError(f"row {row} {where} not valid Unicode ({error}); {cure}") from None
        except TypeError:
            cure = "convert it, or drop it with dataset.filter"
            if text is None:
                cure = f"{texts.count(None)} of {len(texts)} here are None; drop them with "
                cure += f"dataset.filter(lambda row: row[{text_column!r}] is not None)"
            seen = f"{text!r:.40}, of type {type(text).__name__}"
            raise TypeError(f"row {row} {where} {seen}; each must be a str: {cure}") from None
    return texts


def _unsplit_white_space(backend: "Backend") -> list[str]:
    """Find the white space at which the tokenizer begins no new word."""
    # Between letters and between marks: some patterns take a line break to the marks before it.
    samples = ("one{}two", ");{}//")
    return [
        space
        for space in _WHITE_SPACE
        if any(len(pre_tokens(backend, sample.format(space))) < 2 for sample in samples)
    ]


def _join(rows: Iterable[Iterable[int]], lengths: Ints, dtype: Any) -> npt.NDArray[Any]:
    return np.fromiter(chain.from_iterable(rows), dtype, int(lengths.sum()))


def _text_starts(texts: list[str]) -> Ints:
    """Lay the texts on one line, with one character between two."""
    return np.cumsum([0, *(len(text) + 1 for text in texts)])[:-1]


def _place_words(texts: list[str], unsplit: list[str]) -> Ints:
    """Return the spans between `unsplit` characters, of shape (spans, 2), the texts on one line."""
    codes = np.frombuffer(unsplit[0].join(texts).encode("utf-32-le"), np.uint32)
    is_word = ~np.isin(codes, [*map(ord, unsplit)])
    return np.flatnonzero(np.diff(is_word, prepend=False, append=False)).reshape(-1, 2)


def _place_spans(texts: list[str], word_boundaries: WordBoundaries) -> Ints:
    """Return the spans of the user, of shape (spans, 2), with the texts on one line."""
    placed: list[list[int]] = []
    for row, (text, text_start) in enumerate(zip(texts, _text_starts(texts).tolist(), strict=True)):
        returned = word_boundaries(text)
        try:
            pairs = [(index(start), index(end)) for start, end in returned]
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"word_boundaries returned {returned!r:.60} for row {row} of this batch; it must "
                "return a list of (start, end) character positions"
            ) from error
        last = 0
        for start, end in pairs:
            if not last <= start < end <= len(text):
                raise ValueError(
                    f"word_boundaries returned span {(start, end)} for row {row} of this batch, a "
                    f"text of {len(text)} characters; spans must be in order, not overlap, not be "
                    "empty, and lie in the text"
                )
            last = end
            # Without white space at the ends, which on some tokenizers is part of the next token.
            if trimmed := _TRIMMED.search(text, start, end):
                placed.append([text_start + place for place in trimmed.span()])
    return np.array(placed, np.int64).reshape(-1, 2)


def _words_of_spans(
    spans: Ints,
    texts: list[str],
    encodings: "list[Encoding]",
    is_text: npt.NDArray[np.bool_],
    *,
    outside: npt.NDArray[np.int32] | None = None,
    apart: npt.NDArray[np.int32] | None = None,
) -> npt.NDArray[np.int32]:
    """Number words by the spans that tokens touch.

    Tokens that touch none keep the words `outside`, or are of no word. Tokens of two words of
    `apart` are apart even in one span.
    """
    lengths = np.fromiter(map(len, encodings), np.int64, len(encodings))
    document = np.repeat(np.arange(len(encodings)), lengths)
    pairs = chain.from_iterable(encoding.offsets for encoding in encodings)
    offsets = _join(pairs, 2 * lengths, np.int64).reshape(-1, 2)
    offsets += _text_starts(texts)[document, np.newaxis]
    starts = offsets[:, 0]
    # A token that is all trimmed away covers nothing; it stands at a character all the same.
    ends = np.maximum(offsets[:, 1], starts + 1)
    first = np.searchsorted(spans[:, 1], starts, side="right")
    last = np.searchsorted(spans[:, 0], ends, side="left") - 1
    inside = is_text & (first <= last)
    is_word = inside

    reached = np.maximum.accumulate(np.where(inside, last, -1))
    begins = first > _before(reached, -1)
    if outside is not None:
        is_word = inside | (outside >= 0)
        leaves = (outside != _before(outside, -1)) | _before(inside, fill=False)
        begins = np.where(inside, begins, leaves)
    if apart is not None:
        begins |= apart != _before(apart, -1)
    begins |= ~_before(is_word, fill=False)
    begins |= document != _before(document, -1)
    begins &= is_word
    # Each document counts from 0.
    counts = np.bincount(document, begins, len(encodings)).astype(np.int64)
    numbers = np.cumsum(begins) - 1 - (np.cumsum(counts) - counts)[document]
    return np.where(is_word, numbers, -1).astype(np.int32)


def _before(values: npt.NDArray[Any], fill: int) -> npt.NDArray[Any]:
    """Shift by one token: what stands before each."""
    shifted = np.empty_like(values)
    shifted[:1], shifted[1:] = fill, values[:-1]
    return shifted


def phrases(units: Iterable[str], *, ignore_case: bool = True) -> WordBoundaries:
    """Make `word_boundaries` of a list of phrases, so that each is masked as one word.

    For gazetteers, code lists and PMI phrase lists. The longest phrase wins where several begin at
    the same word; phrases match whole words only, across any white space, and whether accents are
    composed or not. Looking up takes time by the length of the text, not of the list.

    Args:
        units: The phrases, such as ``"New York"``.
        ignore_case: Match ``"new york"`` too.

    Returns:
        A callable from a text to the ``(start, end)`` character spans of its phrases, in order; it
        can be pickled, for `map`'s processes and fingerprint.

    Raises:
        TypeError: If `units` is a string or not iterable, or holds something that is not a string.
        ValueError: If a phrase holds no word.

    Source:
        Levine et al. 2021, arXiv:2010.01825 (PMI-Masking: collocations masked as units).

    Examples:
        >>> boundaries = phrases(["New York", "New York Times"])
        >>> boundaries("The New York Times is read in New  York.")
        [(4, 18), (30, 39)]
    """
    if isinstance(units, str) or not isinstance(units, Iterable):
        raise TypeError(
            f"units is {units!r:.40}; it must be a list of phrases, such as ['New York']"
        )
    known = set()
    for unit in units:
        _, words = _split(unit, ignore_case=ignore_case)
        if not words:
            raise ValueError(f"phrase {unit!r} holds no word; remove it from the list")
        known.add(tuple(words))
    lengths: dict[str, list[int]] = {}
    for first, length in sorted({(phrase[0], len(phrase)) for phrase in known}, reverse=True):
        lengths.setdefault(first, []).append(length)
    return partial(_find_phrases, known=known, lengths=lengths, ignore_case=ignore_case)


@cache
def _word() -> re.Pattern[str]:
    """Match a run of letters, a character of a script without spaces, or a punctuation mark."""
    no_spaces = (
        "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
        "\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
    )
    # Combining marks and joiners, which are no letters to `re`, end no word.
    characters = map(chr, range(0x300, 0x20000))
    joined = "".join(c for c in characters if unicodedata.category(c)[0] == "M") + "\u200c\u200d"
    return re.compile(rf"(?:(?![{no_spaces}])[\w{joined}])+|(?:[{no_spaces}]|[^\w\s])[{joined}]*")


def _split(text: str, *, ignore_case: bool) -> tuple[list[tuple[int, int]], list[str]]:
    """Return where words are in a text, and the words as they are compared."""
    places = [match.span() for match in _word().finditer(text)]
    words = [text[start:end] for start, end in places]
    if ignore_case:
        words = [word.casefold() for word in words]
    return places, [unicodedata.normalize("NFC", word) for word in words]


def _find_phrases(
    text: str, *, known: set[tuple[str, ...]], lengths: Mapping[str, list[int]], ignore_case: bool
) -> list[tuple[int, int]]:
    places, words = _split(text, ignore_case=ignore_case)
    spans, position = [], 0
    while position < len(words):
        for length in lengths.get(words[position], ()):
            end = min(position + length, len(words))
            if tuple(words[position:end]) in known:
                spans.append((places[position][0], places[end - 1][1]))
                position = end
                break
        else:
            position += 1
    return spans
