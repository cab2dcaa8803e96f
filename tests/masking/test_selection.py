"""Randomness as a function of names."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mlmadapt.masking.selection import derive_key, hash_counters, hash_rows, seeded, to_unit
from tests.masking.reference_masking import draw, mix, reference_key, unit

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
    with pytest.raises(TypeError, match="float"):
        derive_key(0.5)  # type: ignore[arg-type]


def numbers() -> tuple[float, ...]:
    """Draw from each global generator."""
    return random.random(), np.random.rand(), np.random.standard_normal(), torch.rand(1).item()  # noqa: NPY002, S311


def test_seeded_blocks_repeat_and_leave_no_trace() -> None:
    """The same draws inside, what would have come anyway outside, nested or failing."""
    with seeded(3):
        first = numbers()
        with seeded(4):
            other = numbers()
        after = numbers()
    with seeded(3):
        assert numbers() == first != other
        assert numbers() == after
    with seeded(2**63 - 1):
        before = numbers()
        following = numbers()
    with seeded(2**63 - 1):
        assert numbers() == before
        with pytest.raises(OSError, match="inside"), seeded(3):  # noqa: PT012
            assert numbers() == first
            raise OSError("inside")
        assert numbers() == following


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


def test_a_float_is_refused_after_its_whole_number_was_taken() -> None:
    """Keys are remembered, and 1.0 equals 1."""
    derive_key(1, "order")
    with pytest.raises(TypeError, match="'float' object cannot be interpreted as an integer"):
        derive_key(1.0, "order")  # type: ignore[arg-type]
