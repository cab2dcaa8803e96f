"""Phrases that are one word."""

from __future__ import annotations

import pickle
import re
from typing import TYPE_CHECKING, Any

import pytest
from datasets.fingerprint import Hasher
from hypothesis import given
from hypothesis import strategies as st

from mlmadapt import phrases

if TYPE_CHECKING:
    from collections.abc import Sequence


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


@pytest.mark.parametrize(
    ("units", "text", "found"),
    [
        (
            ["New York", "New York Times"],
            "New York Times, New York",
            ["New York Times", "New York"],
        ),
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
def test_examples_of_phrases(units: list[str], text: str, found: list[str]) -> None:
    """Longest match, case, runs of white space, punctuation, scripts without spaces, borders."""
    assert [text[start:end] for start, end in phrases(units)(text)] == found


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
    found = phrases(units, ignore_case=ignore_case)(text)
    assert found == reference_phrases(text, units, ignore_case=ignore_case)


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
    ],
)
def test_wrong_phrases_are_named(units: Any, error: type[Exception], message: str) -> None:
    """A phrase without a word matches nothing, and a string is no list."""
    with pytest.raises(error, match=message):
        phrases(units)
