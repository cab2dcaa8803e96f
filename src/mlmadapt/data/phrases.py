"""Phrases that are one word: names, codes, fixed expressions.

Masked a word at a time, the rest of a collocation gives the word away, and the model learns little
from it (Levine et al. 2021).
"""

import re
import unicodedata
from collections.abc import Iterable, Mapping
from functools import cache, partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlmadapt.data.tokenization import WordBoundaries


def phrases(units: Iterable[str], *, ignore_case: bool = True) -> "WordBoundaries":
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
    text: str,
    *,
    known: set[tuple[str, ...]],
    lengths: Mapping[str, list[int]],
    ignore_case: bool,
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
