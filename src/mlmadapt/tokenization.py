"""Documents to tokens that know their word.

Whole-word masking needs to know which tokens belong together. Offsets do not tell (they include the
space before a word on some tokenizers and not on others), and ``##`` is WordPiece's alone. The
tokenizer's own ``word_ids()`` is right on every fast tokenizer that splits text into words first; on
those that do not, and for languages without spaces, words come from the text itself.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain, pairwise
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer
    from transformers import PreTrainedTokenizerBase

Spans = Sequence[tuple[int, int]]
WordBoundaries = Callable[[str], Spans]
Batch = TypeVar("Batch", Mapping[str, Any], pa.Table)


def tokenize_with_word_ids(
    examples: Batch,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    text_column: str = "text",
    word_boundaries: WordBoundaries | None = None,
) -> Batch:
    """Tokenize a batch of documents, whole, and give each token the number of its word.

    For ``dataset.map(tokenize_with_word_ids, batched=True, fn_kwargs={"tokenizer": tokenizer},
    remove_columns=dataset.column_names)``. Nothing is truncated or padded, whatever the tokenizer's
    file has baked in: chunking comes next, and a cut document would lose its end without a word. The
    tokenizer is left as it was, so that a second run hits `map`'s cache.

    Tokenizers that do not split text into words (byte-level ones without a pattern, some
    SentencePiece ones) would make one "word" of each document; there, words are what stands between
    white space in the text. A token that spans two words makes them one, since it cannot be masked
    in part.

    Args:
        examples: A batch with a column of documents: a dict of lists, or a ``pyarrow.Table`` (datasets
            with format "arrow"; about 5 % faster through `map`).
        tokenizer: A fast tokenizer.
        text_column: The column with the documents.
        word_boundaries: Text to a list of ``(start, end)`` character spans, in order and not
            overlapping: the tokens of one span are one word. For languages written without spaces, and
            for units longer than a word (see `phrases`). Text outside all spans keeps its own words.

    Returns:
        The model's inputs by the tokenizer's names (``input_ids``, ``attention_mask``, and
        ``token_type_ids`` where the model has them), and ``word_ids``: an integer a token, rising
        within a document, -1 for a token of no word. A dict with a list of arrays of shape
        ``(sequence,)`` a column, or a table, as the batch was.

    Raises:
        TypeError: If the tokenizer is not a fast one, or a document is not a string.
        ValueError: If the column is missing, or `word_boundaries` returns spans that overlap, run
            backwards or leave the text.

    Examples:
        >>> from mlmadapt.testing import tiny_tokenizer
        >>> tokenizer = tiny_tokenizer("wordpiece")
        >>> tokens = tokenize_with_word_ids({"text": ["the film", "unfilmable"]}, tokenizer)
        >>> [row.tolist() for row in tokens["word_ids"]]
        [[-1, 0, 1, -1], [-1, 0, 0, 0, 0, -1]]
    """
    if not getattr(tokenizer, "is_fast", False):
        message = (
            f"tokenizer is a {type(tokenizer).__name__}, which is not a fast tokenizer and does not know "
            "its words; load one with AutoTokenizer.from_pretrained(...)"
        )
        raise TypeError(message)
    texts = _read_texts(examples, text_column)
    backend: Tokenizer = tokenizer.backend_tokenizer  # type: ignore[attr-defined]
    with _unlimited(backend):
        encodings = backend.encode_batch(texts)

    lengths = np.fromiter(map(len, encodings), np.int64, len(encodings))
    # One flat array a column: lists of lists would cost more than half the tokenizing again.
    columns = {"input_ids": _flat((encoding.ids for encoding in encodings), lengths, np.int32)}
    if "token_type_ids" in tokenizer.model_input_names:
        types = (encoding.type_ids for encoding in encodings)
        columns["token_type_ids"] = _flat(types, lengths, np.int8)
    if "attention_mask" in tokenizer.model_input_names:
        columns["attention_mask"] = np.ones(lengths.sum(), np.int8)

    # Arrow turns None into null in one pass; Python would look at every token.
    words = pa.array([encoding.word_ids for encoding in encodings], pa.list_(pa.int32()))
    word_ids = words.flatten().fill_null(-1).to_numpy(zero_copy_only=False)
    # A special token written out in the text is special all the same, but counts as a word there.
    special = np.isin(columns["input_ids"], list(special_token_ids(tokenizer)))
    word_ids = np.where(special, -1, word_ids).astype(np.int32)
    is_text = word_ids >= 0
    if not _splits_words(backend):
        spans = _place_spans(texts, _whitespace_words)
        nowhere = np.full_like(word_ids, -1)
        word_ids = _words_of_spans(spans, encodings, is_text, outside=nowhere)
    if word_boundaries is not None:
        spans = _place_spans(texts, word_boundaries)
        word_ids = _words_of_spans(spans, encodings, is_text, outside=word_ids)
    columns["word_ids"] = word_ids

    ends = np.cumsum(lengths)
    if isinstance(examples, pa.Table):
        offsets = pa.array(np.concatenate([[0], ends]), pa.int32())
        rows = [pa.ListArray.from_arrays(offsets, pa.array(flat)) for flat in columns.values()]
        return cast("Batch", pa.table(rows, names=list(columns)))
    cuts = list(pairwise([0, *ends.tolist()]))
    return cast(
        "Batch", {name: [flat[a:b] for a, b in cuts] for name, flat in columns.items()}
    )


def phrases(units: Iterable[str], *, ignore_case: bool = True) -> WordBoundaries:
    """Make `word_boundaries` of a list of phrases, so that each is masked as one word.

    For gazetteers, code lists and PMI phrase lists. The longest phrase wins where several begin at
    the same word; phrases match whole words only, across any white space. Looking up takes time by
    the length of the text, not of the list.

    Args:
        units: The phrases, such as ``"New York"``.
        ignore_case: Match ``"new york"`` too.

    Raises:
        ValueError: If a phrase holds no word.

    Source:
        Levine et al., PMI-Masking (ICLR 2021): masking collocations as units.

    Examples:
        >>> boundaries = phrases(["New York", "New York Times"])
        >>> boundaries("The New York Times is read in New  York.")
        [(4, 18), (30, 39)]
    """
    known: dict[str, set[tuple[str, ...]]] = {}
    for unit in units:
        words = tuple(_fold(word, ignore_case=ignore_case) for word in _WORD.findall(unit))
        if not words:
            message = f"phrase {unit!r} holds no word; remove it from the list"
            raise ValueError(message)
        known.setdefault(words[0], set()).add(words)
    longest_first = {
        first: sorted(group, key=lambda words: (-len(words), words))
        for first, group in known.items()
    }
    return partial(_find_phrases, known=longest_first, ignore_case=ignore_case)


def special_token_ids(tokenizer: "PreTrainedTokenizerBase") -> set[int]:
    """Return the ids that are never a word: all special tokens but the unknown token.

    ``[UNK]`` stands for a real word, so it can be masked, unless another role shares its id.

    Examples:
        >>> from mlmadapt.testing import tiny_tokenizer
        >>> tokenizer = tiny_tokenizer("wordpiece")
        >>> ids = special_token_ids(tokenizer)
        >>> tokenizer.mask_token_id in ids, tokenizer.unk_token_id in ids
        (True, False)
    """
    flagged = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    roles = {
        getattr(tokenizer, f"{role}_token_id") for role in ("bos", "eos", "sep", "pad", "cls", "mask")
    }
    return ((flagged | set(tokenizer.all_special_ids)) - {tokenizer.unk_token_id}) | (roles - {None})


# A run of letters and digits, a character of a script without spaces, or a punctuation mark.
_NO_SPACES = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
_WORD = re.compile(rf"[{_NO_SPACES}]|(?:(?![{_NO_SPACES}])\w)+|[^\w\s]")


def _fold(word: str, *, ignore_case: bool) -> str:
    return word.casefold() if ignore_case else word


def _find_phrases(
    text: str, *, known: dict[str, list[tuple[str, ...]]], ignore_case: bool
) -> list[tuple[int, int]]:
    places = [(match.start(), match.end()) for match in _WORD.finditer(text)]
    words = [_fold(text[start:end], ignore_case=ignore_case) for start, end in places]
    spans, position = [], 0
    while position < len(words):
        for phrase in known.get(words[position], ()):
            if tuple(words[position : position + len(phrase)]) == phrase:
                spans.append((places[position][0], places[position + len(phrase) - 1][1]))
                position += len(phrase)
                break
        else:
            position += 1
    return spans


def _whitespace_words(text: str) -> list[tuple[int, int]]:
    return [match.span() for match in re.finditer(r"\S+", text)]


def _read_texts(examples: Mapping[str, Any] | pa.Table, text_column: str) -> list[str]:
    is_table = isinstance(examples, pa.Table)
    names = examples.column_names if is_table else list(examples)
    if text_column not in names:
        message = (
            f"text_column is {text_column!r}, but the columns are {names}; "
            "name the column with the documents"
        )
        raise ValueError(message)
    column = examples[text_column]
    if isinstance(column, str):
        message = f"column {text_column!r} is one string, not a batch; call map with batched=True"
        raise TypeError(message)
    texts = column.to_pylist() if is_table else list(column)
    for row, text in enumerate(texts):
        if not isinstance(text, str):
            message = (
                f"row {row} of column {text_column!r} in this batch is {text!r:.40}, a "
                f"{type(text).__name__}; each document must be a str: convert it, or drop it with "
                "dataset.filter"
            )
            raise TypeError(message)
        try:
            text.encode()
        except UnicodeEncodeError as error:
            message = (
                f"row {row} of column {text_column!r} in this batch is not valid Unicode ({error}); "
                "clean it with text.encode(errors='replace').decode()"
            )
            raise ValueError(message) from None
    return texts


@contextmanager
def _unlimited(backend: "Tokenizer") -> Iterator[None]:
    """Lift truncation and padding, which a tokenizer.json can carry, and put them back."""
    truncation, padding = backend.truncation, backend.padding
    if truncation is not None:
        backend.no_truncation()
    if padding is not None:
        backend.no_padding()
    try:
        yield
    finally:
        if truncation is not None:
            backend.enable_truncation(**truncation)
        if padding is not None:
            backend.enable_padding(**padding)


def _splits_words(backend: "Tokenizer") -> bool:
    text = "one two"
    if backend.normalizer is not None:
        text = backend.normalizer.normalize_str(text)
    pre_tokenizer = backend.pre_tokenizer
    return pre_tokenizer is not None and len(pre_tokenizer.pre_tokenize_str(text)) > 1


def _flat(
    rows: Iterable[list[int]], lengths: npt.NDArray[np.int64], dtype: type[np.signedinteger[Any]]
) -> npt.NDArray[Any]:
    return np.fromiter(chain.from_iterable(rows), dtype, int(lengths.sum()))


@dataclass(frozen=True, slots=True)
class _Spans:
    """Character spans of a batch, laid on one line: each text begins where the last one ended."""

    text_starts: npt.NDArray[np.int64]
    starts: npt.NDArray[np.int64]
    ends: npt.NDArray[np.int64]


def _place_spans(texts: list[str], word_boundaries: WordBoundaries) -> _Spans:
    text_starts = np.cumsum([0, *map(len, texts)])[:-1]
    placed = []
    for row, text in enumerate(texts):
        spans = np.array(word_boundaries(text), np.int64).reshape(-1, 2)
        bounds = np.concatenate([[0], spans.ravel(), [len(text)]])
        wrong = np.flatnonzero(np.diff(bounds) < 0)
        empty = np.flatnonzero(spans[:, 0] >= spans[:, 1])
        if wrong.size or empty.size:
            place = min([*(wrong // 2), *empty], default=0)
            span = tuple(spans[min(int(place), len(spans) - 1)].tolist())
            message = (
                f"word_boundaries returned span {span} for row {row} of this batch, a text of {len(text)} "
                "characters; spans must be in order, not overlap, not be empty, and lie in the text"
            )
            raise ValueError(message)
        placed.append(spans + text_starts[row])
    spans = np.concatenate(placed) if placed else np.empty((0, 2), np.int64)
    return _Spans(text_starts, spans[:, 0], spans[:, 1])


def _words_of_spans(
    spans: _Spans,
    encodings: "list[Encoding]",
    is_text: npt.NDArray[np.bool_],
    *,
    outside: npt.NDArray[np.int32],
) -> npt.NDArray[np.int32]:
    """Number words by the spans that tokens touch; tokens that touch none keep the words `outside`.

    A token is placed by what it covers besides white space at its ends, since the space before a
    word belongs to the token on some tokenizers and to none on others.
    """
    lengths = np.fromiter(map(len, encodings), np.int64, len(encodings))
    document = np.repeat(np.arange(len(encodings)), lengths)
    offsets = np.fromiter(
        chain.from_iterable(chain.from_iterable(encoding.offsets for encoding in encodings)),
        np.int64,
        2 * len(outside),
    ).reshape(-1, 2)
    starts = offsets[:, 0] + spans.text_starts[document]
    # A token made by the normalizer can cover nothing; it stands at a character all the same.
    ends = np.maximum(offsets[:, 1] + spans.text_starts[document], starts + 1)
    first = np.searchsorted(spans.ends, starts, side="right")
    last = np.searchsorted(spans.starts, ends, side="left") - 1
    inside = is_text & (first <= last)

    reached = np.maximum.accumulate(np.where(inside, last, -1))
    reached_before = np.concatenate([[-1], reached[:-1]])
    same_document = np.concatenate([[False], document[1:] == document[:-1]])
    follows = same_document & np.concatenate([[False], (~inside & (outside >= 0))[:-1]])
    same_word = np.concatenate([[False], outside[1:] == outside[:-1]])
    begins = np.where(inside, first > reached_before, (outside >= 0) & ~(follows & same_word))

    numbers = np.cumsum(begins) - 1
    # Each document counts from 0.
    counts = np.bincount(document, weights=begins, minlength=len(encodings)).astype(np.int64)
    numbers -= (np.cumsum(counts) - counts)[document]
    return np.where(inside | (outside >= 0), numbers, -1).astype(np.int32)
