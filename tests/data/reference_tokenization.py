"""Words of a document, token by token: slow, and plain enough to be believed."""

from __future__ import annotations

import functools
import re
from itertools import accumulate
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedTokenizerBase


def reference_tokenize(
    text: str, tokenizer: PreTrainedTokenizerBase, spans: Sequence[tuple[int, int]] | None = None
) -> dict[str, list[int]]:
    """Return what the tokenizer returns for one document, and the words as they are defined."""
    encoded = tokenizer(text, return_offsets_mapping=True, verbose=False)
    special = special_ids(tokenizer)
    offsets = encoded.pop("offset_mapping")
    words = [
        None if token in special else word
        for token, word in zip(encoded["input_ids"], encoded.word_ids(), strict=True)
    ]
    is_text = [word is not None for word in words]
    ignored = [is_space(c) and not splits_at(tokenizer, c) for c in text]
    if any(ignored):
        # A word is the tokenizer's own, as far as the next white space that the tokenizer ignores.
        before = [*accumulate(ignored, initial=0)]
        keys: list[tuple[set[int], int | None] | None] = []
        for (start, end), word in zip(offsets, words, strict=True):
            places = range(start, max(end, start + 1))
            seen = {before[i] for i in places if i < len(text) and not ignored[i]}
            keys.append((seen, word) if seen and word is not None else None)
        words = _number(keys)
    if spans is not None:
        touched = _touched(text, offsets, spans, is_text)
        keys = [
            (touches, None) if touches else None if word is None else (set(), word)
            for touches, word in zip(touched, words, strict=True)
        ]
        words = _number(keys)
    return {**encoded, "word_ids": [-1 if word is None else word for word in words]}


def special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the tokens that are no text, so not ALBERT's full stop, nor a word unknown."""
    added = tokenizer.added_tokens_decoder
    return {i for i in added if added[i].special} - {tokenizer.unk_token_id}


def is_space(character: str) -> bool:
    """Tell white space as Unicode does; four separators are white space to Python alone."""
    return character.isspace() and character not in "\x1c\x1d\x1e\x1f"


@functools.cache
def splits_at(tokenizer: PreTrainedTokenizerBase, space: str) -> bool:
    """Tell whether the tokenizer begins a new word at white space, between letters and marks."""
    texts = f"one{space}two", f");{space}//"
    return all(len({*tokenizer(text).word_ids()} - {None}) > 1 for text in texts)


def _touched(
    text: str,
    offsets: Sequence[tuple[int, int]],
    spans: Sequence[tuple[int, int]],
    is_text: Sequence[bool],
) -> list[set[int]]:
    """Return for each token the spans it shares a character with, but for spaces at their ends."""
    span_of = {}
    for k, (start, end) in enumerate(spans):
        places = [*range(start, end)]
        while places and text[places[0]].isspace():
            places.pop(0)
        while places and text[places[-1]].isspace():
            places.pop()
        span_of |= dict.fromkeys(places, k)
    return [
        {span_of[place] for place in range(start, max(end, start + 1)) if place in span_of}
        if is_real
        else set()
        for (start, end), is_real in zip(offsets, is_text, strict=True)
    ]


def _number(keys: Sequence[tuple[set[int], int | None] | None]) -> list[int | None]:
    """Count words: neighbours are one if they share a span or, touching none, their old word."""
    numbers: list[int | None] = []
    number, before = -1, None
    for key in keys:
        if key is not None:
            same = before is not None and key[1] == before[1]
            same = same and (bool(key[0] & before[0]) or not (key[0] or before[0]))
            number += not same
        numbers.append(None if key is None else number)
        before = key
    return numbers


def reference_phrases(
    text: str, units: Sequence[str], *, ignore_case: bool = True
) -> list[tuple[int, int]]:
    """Find phrases of ASCII words by trying every phrase at every word, the longest first."""
    words = re.compile(r"\w+|[^\w\s]", re.ASCII)
    patterns = []
    for unit in sorted(units, key=lambda unit: -len(words.findall(unit))):
        parts = [rf"\b{part}\b" if part.isalnum() else rf"\{part}" for part in words.findall(unit)]
        flags = re.ASCII | (re.IGNORECASE if ignore_case else 0)
        patterns.append(re.compile(r"\s*".join(parts), flags))
    spans, position = [], 0
    while position < len(text):
        for pattern in patterns:
            match = pattern.match(text, position)
            if match:
                spans.append(match.span())
                position = match.end()
                break
        else:
            position += 1
    return spans
