"""Randomness as a function of names, and random in every way that training can notice.

Statistics are of at least a million draws, of fixed seeds, so that none is ever flaky. Counts are
compared with what they should be by a chi-square test, whose p-value must lie between 1e-4 and
1 - 1e-4: a generator that is too even is as wrong as one that is not even enough. Of sound
generators one in 5,000 would fail such a test.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlmadapt import WholeWordMaskingCollator
from mlmadapt.masking.selection import derive_key, hash_counters, hash_rows, to_unit
from mlmadapt.testing import tiny_tokenizer
from tests.masking.reference_masking import draw, mix, reference_key, unit

ROWS, WORDS = 4096, 256
RATE = 0.2
parts = st.lists(st.integers() | st.text(max_size=5), max_size=4)


@given(parts, parts)
def test_keys_are_those_of_their_parts(first: list[Any], second: list[Any]) -> None:
    """Other parts, or the same ones parted otherwise, have other keys of 63 bits."""
    assert derive_key(*first) == reference_key(*first)
    assert 0 <= derive_key(*first) < 2**63
    assert (derive_key(*first) == derive_key(*second)) == (first == second)


def test_keys_do_not_change_with_releases() -> None:
    """Frozen sets and resumed runs of another version depend on these numbers."""
    assert derive_key() == 7184008945222730424
    assert derive_key(0, "mask", 0) == 8517935973409142738
    assert derive_key(np.int32(7), "frozen") == derive_key(7, "frozen") != derive_key("7", "frozen")
    derive_key(1, "order")  # keys are remembered, and 1.0 equals 1
    with pytest.raises(TypeError, match="'float' object cannot be interpreted as an integer"):
        derive_key(1.0, "order")  # type: ignore[arg-type]


@given(st.lists(st.lists(st.integers(0, 2**32 - 1), max_size=6), min_size=1, max_size=5), parts)
def test_hashes_are_those_of_plain_integers(rows: list[list[int]], seed: list[Any]) -> None:
    """Of rows, empty ones too, and of counters, negative ones too."""
    key = derive_key(*seed)
    tokens = np.array([token for row in rows for token in row], np.int64)
    bounds = np.append(0, np.cumsum([len(row) for row in rows]))
    hashes = hash_rows(tokens, bounds, key)
    expected = [
        mix(sum(mix((i << 32) + t) for i, t in enumerate(row)) % 2**64 ^ key) for row in rows
    ]
    assert hashes.tolist() == expected
    for counter in (-1, 0, 1, 2**40):
        bits = hash_counters(hashes, np.full(len(rows), counter))
        assert bits.tolist() == [draw(row, counter) for row in expected]
        assert to_unit(bits).tolist() == [unit(draw(row, counter)) for row in expected]


def test_rows_that_differ_have_other_hashes() -> None:
    """In a token, in their order, in a token more; 10,000 rows, none twice."""
    rows = [[a, b, c] for a in range(25) for b in range(20) for c in range(20)]
    rows += [row[:2] for row in rows[::20]] + [[0] * n for n in range(4, 50)]
    bounds = np.append(0, np.cumsum([len(row) for row in rows]))
    tokens = np.array([token for row in rows for token in row])
    assert len(set(hash_rows(tokens, bounds, 0).tolist())) == len(rows)
    assert to_unit(np.array([0, 2**64 - 1], np.uint64)).tolist() == [0, 1 - 2**-53]


def p_value(statistic: float, degrees: int) -> float:
    """Return the chance of a larger chi-square (Wilson and Hilferty 1931; exact for 1 degree).

    At 2 degrees and p = 1e-4 it is 1.5e-4, and nearer with more.
    """
    if degrees == 1:
        return math.erfc(math.sqrt(statistic / 2))
    spread = 2 / (9 * degrees)
    deviation = ((statistic / degrees) ** (1 / 3) - (1 - spread)) / math.sqrt(spread)
    return math.erfc(deviation / math.sqrt(2)) / 2


def assert_as_expected(observed: Any, expected: Any, degrees: int) -> None:
    """Test counts by chi-square."""
    observed, expected = np.asarray(observed, float), np.asarray(expected, float)
    p = p_value(float(((observed - expected) ** 2 / expected).sum()), degrees)
    assert 1e-4 < p < 1 - 1e-4, f"p = {p:.2g}, counts {observed}, expected {expected}"


def assert_independent(first: np.ndarray, second: np.ndarray) -> None:
    """Test by a contingency table that two arrays of small whole numbers are independent."""
    assert first.size >= 500_000, "of two draws each"
    table = np.zeros((first.max() + 1, second.max() + 1))
    np.add.at(table, (first.ravel(), second.ravel()), 1)
    expected = table.sum(1, keepdims=True) * table.sum(0, keepdims=True) / table.sum()
    assert_as_expected(table, expected, (table.shape[0] - 1) * (table.shape[1] - 1))


@functools.cache
def tokens(*, alike: bool = False) -> np.ndarray:
    """Return 2**20 words of a token each: at random, or rows that differ in two places only."""
    if not alike:
        return np.random.default_rng(0).integers(5, 205, (ROWS, WORDS))
    rows = np.full((ROWS, WORDS), 7)
    rows[:, 0], rows[:, 1] = 5 + np.arange(ROWS) // 64, 5 + np.arange(ROWS) % 64
    return rows


def collate(rows: np.ndarray, *, epoch: int = 0, **settings: Any) -> dict[str, np.ndarray]:
    """Mask rows of one-token words."""
    settings = {"wwm_probability": RATE, "seed": 0, **settings}
    collator = WholeWordMaskingCollator(
        tiny_tokenizer("wordpiece"), return_tensors="np", **settings
    )
    collator.set_epoch(epoch)
    return collator([{"input_ids": row, "word_ids": np.arange(len(row))} for row in rows])


@functools.cache
def targets(*, alike: bool = False, **settings: Any) -> np.ndarray:
    """Return 1 where a word is a target, and 0 elsewhere."""
    return (collate(tokens(alike=alike), **settings)["labels"] != -100).astype(int)


def fates(rows: np.ndarray, **settings: Any) -> np.ndarray:
    """Return 0 for a word that is no target, 1 for a masked, 2 for a replaced, 3 for a kept one."""
    batch = collate(rows, mask_replace_prob=0.6, random_replace_prob=0.25, **settings)
    is_masked, is_kept = batch["input_ids"] == 4, batch["input_ids"] == rows
    return np.where(batch["labels"] == -100, 0, np.where(is_masked, 1, np.where(is_kept, 3, 2)))


@pytest.mark.parametrize("rate", [0.05, 0.15, 0.2, 0.5])
@pytest.mark.parametrize("alike", [False, True])
def test_words_are_masked_at_the_rate(rate: float, *, alike: bool) -> None:
    """Targets among a million words; 1e-4 is 3.9 standard deviations."""
    chosen = targets(alike=alike, wwm_probability=rate).sum()
    words = ROWS * WORDS
    assert_as_expected([chosen, words - chosen], [rate * words, (1 - rate) * words], 1)


@pytest.mark.parametrize("alike", [False, True])
def test_places_and_rows_are_alike(*, alike: bool) -> None:
    """Each of 256 places is masked as often as any, and each row, but for what coins vary by."""
    chosen = targets(alike=alike)
    for axis, draws in ((0, ROWS), (1, WORDS)):
        counts = chosen.sum(axis)
        statistic = ((counts - draws * RATE) ** 2).sum() / (draws * RATE * (1 - RATE))
        assert 1e-4 < p_value(statistic, len(counts)) < 1 - 1e-4


@pytest.mark.parametrize("alike", [False, True])
def test_places_are_alike_under_an_exact_budget(*, alike: bool) -> None:
    """Each place is masked as often as any, and each row 51 or 52 times of 256, one in five 52."""
    chosen = targets(alike=alike, budget="exact")
    by_row = chosen.sum(1)
    up = int((by_row == 52).sum())
    assert set(by_row) == {51, 52}
    assert_as_expected([up, ROWS - up], [0.2 * ROWS, 0.8 * ROWS], 1)
    # A row's total is given: a place more is a place less elsewhere, which spreads counts more.
    variance = ROWS * RATE * (1 - RATE) * WORDS / (WORDS - 1)
    statistic = ((chosen.sum(0) - ROWS * chosen.mean()) ** 2).sum() / variance
    assert 1e-4 < p_value(statistic, WORDS - 1) < 1 - 1e-4


@pytest.mark.parametrize("alike", [False, True])
@pytest.mark.parametrize("distance", [1, 2, 64])
def test_neighbours_are_independent(distance: int, *, alike: bool) -> None:
    """A word says nothing of the next one, nor of those after it, in rows however alike."""
    pairs = targets(alike=alike).reshape(ROWS, -1, 2, distance)
    assert_independent(pairs[:, :, 0], pairs[:, :, 1])


@pytest.mark.parametrize("alike", [False, True])
@pytest.mark.parametrize("distance", [1, 64])
def test_rows_are_independent(distance: int, *, alike: bool) -> None:
    """A row says nothing of the next one, nor of one that differs in a single token."""
    pairs = targets(alike=alike).reshape(-1, 2, distance, WORDS)
    assert_independent(pairs[:, 0], pairs[:, 1])


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"epoch": 0}, {"epoch": 1}),
        ({"epoch": 1}, {"epoch": 2}),
        ({"seed": 0}, {"seed": 1}),
        ({"seed": 1}, {"seed": 2**32 + 1}),
        ({"seed": 0, "epoch": 1}, {"seed": 1, "epoch": 0}),
    ],
)
def test_epochs_and_seeds_are_independent(one: dict[str, int], other: dict[str, int]) -> None:
    """What is masked in one epoch, or under one seed, says nothing of another."""
    assert_independent(targets(**one), targets(**other))


@pytest.mark.parametrize(("mask", "replace"), [(0.8, 0.1), (1.0, 0.0), (0.0, 0.0), (0.6, 0.25)])
def test_targets_are_split(mask: float, replace: float) -> None:
    """80/10/10 and other splits, over a million targets."""
    rows = tokens()
    inputs = collate(rows, wwm_probability=1, mask_replace_prob=mask, random_replace_prob=replace)
    inputs = inputs["input_ids"]
    pool = len(tiny_tokenizer("wordpiece")) - 5
    counts = np.array([(inputs == 4).sum(), 0, (inputs == rows).sum()])
    counts[1] = rows.size - counts.sum()  # a replacement can be the token itself
    shares = np.array([mask, replace * (1 - 1 / pool), 1 - mask - replace + replace / pool])
    possible = shares > 1e-12
    assert not counts[~possible].any()
    if possible.sum() > 1:
        assert_as_expected(counts[possible], shares[possible] * rows.size, possible.sum() - 1)


@pytest.mark.parametrize("alike", [False, True])
def test_fates_are_independent(*, alike: bool) -> None:
    """What becomes of a word says nothing of its neighbour, another epoch, or of being chosen."""
    rows = tokens(alike=alike)
    everywhere = fates(rows, wwm_probability=1) - 1
    pairs = everywhere.reshape(ROWS, -1, 2)
    assert_independent(pairs[..., 0], pairs[..., 1])
    assert_independent(everywhere, fates(rows, wwm_probability=1, epoch=1) - 1)
    assert_independent(targets(alike=alike), everywhere)


@pytest.mark.parametrize("alike", [False, True])
def test_replacements_are_uniform_and_independent(*, alike: bool) -> None:
    """Every ordinary token is drawn as often, whatever was drawn before it or stood there."""
    rows = tokens(alike=alike)
    drawn = collate(rows, wwm_probability=1, mask_replace_prob=0, random_replace_prob=1)[
        "input_ids"
    ]
    counts = np.bincount(drawn.ravel(), minlength=len(tiny_tokenizer("wordpiece")))
    assert not counts[:5].any()
    pool = len(counts) - 5
    assert_as_expected(counts[5:], np.full(pool, drawn.size / pool), pool - 1)
    classes = drawn % 8
    pairs = classes.reshape(ROWS, -1, 2)
    assert_independent(pairs[..., 0], pairs[..., 1])
    assert_independent(classes.reshape(-1, 2, WORDS)[:, 0], classes.reshape(-1, 2, WORDS)[:, 1])
    if not alike:
        assert_independent(rows % 8, classes)


@pytest.mark.parametrize("budget", ["bernoulli", "exact"])
def test_a_row_s_only_target_is_any_of_its_words(budget: str) -> None:
    """Rows that the rate leaves without a target get one of their words, each as often as any."""
    rows = tokens().reshape(-1, 8)
    chosen = collate(rows, wwm_probability=0, budget=budget)["labels"] != -100
    assert (chosen.sum(1) == 1).all()
    assert_as_expected(chosen.sum(0), np.full(8, len(rows) / 8), 7)


def test_weights_keep_the_rate_and_their_ratio() -> None:
    """Words of weight 1, 2 and 5, a million in all: 20 % are targets, by the weights' ratio."""
    rows = tokens()
    weights = np.array([1.0, 2.0, 5.0])[np.arange(len(tiny_tokenizer("wordpiece"))) % 3]
    chosen = collate(rows, word_weights=weights)["labels"] != -100
    weight_of_word = weights[rows]
    expected = RATE * WORDS * weight_of_word / weight_of_word.sum(1, keepdims=True)
    assert expected.max() < 1
    observed = np.array([chosen[weight_of_word == weight].sum() for weight in (1, 2, 5)])
    for weight, count in zip((1, 2, 5), observed, strict=True):
        chances = expected[weight_of_word == weight]
        deviation = (count - chances.sum()) / math.sqrt((chances * (1 - chances)).sum())
        assert 1e-4 < math.erfc(abs(deviation) / math.sqrt(2)) < 1 - 1e-4
    assert abs(chosen.mean() - RATE) < 4.5 * math.sqrt(RATE * (1 - RATE) / chosen.size)
