"""Randomness as a function: what is drawn depends on named parts, never on what was drawn before.

A generator's state cannot be shared between workers, ranks and a resumed run; a key can. Every
random choice of this library starts from ``derive_key(seed, purpose, ...)``, so that nothing random
needs to be saved and the caller's global generators are never moved.
"""

import hashlib
import json
import operator
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from threading import RLock
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mlmadapt._types import Hashes, Ints


@lru_cache(typed=True)  # asked for with each batch; typed, so that 1.0 is not taken for 1
def derive_key(*parts: int | str) -> int:
    """Return 63 random-looking bits that depend on `parts` alone.

    Raises:
        TypeError: If a part is neither a whole number (NumPy's count as such) nor a string.

    Examples:
        >>> derive_key(42, "order", 0) == derive_key(np.int64(42), "order", 0)
        True
        >>> derive_key(42, "order", 0) == derive_key(42, "order", 1)
        False
    """
    plain = [part if isinstance(part, str) else operator.index(part) for part in parts]
    digest = hashlib.blake2b(json.dumps(plain).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def check_whole(name: str, value: Any, within: range | None = None) -> int:
    """Return a whole number, of Python or NumPy, as Python's.

    Raises:
        TypeError: If it is not one; a string would be another seed than the number in it.
        ValueError: If it is not in the range.

    Examples:
        >>> check_whole("seed", np.int64(42))
        42
    """
    if not hasattr(value, "__index__"):
        raise TypeError(f"{name} is {value!r}; it must be a whole number")
    number = operator.index(value)
    if within is not None and number not in within:
        raise ValueError(f"{name} is {number}; it must be {within[0]} to {within[-1]}")
    return number


_turn = RLock()
if hasattr(os, "register_at_fork"):  # or a child could wait for a thread that it does not have
    os.register_at_fork(
        before=_turn.acquire, after_in_parent=_turn.release, after_in_child=_turn.release
    )


@contextmanager
def seeded(key: int) -> Iterator[None]:
    """Seed Python's, NumPy's and torch's global generators inside the block; restore them after it.

    For code that draws from global state and cannot be handed a key: other libraries' collators,
    and dropout. Threads take turns, but one that draws outside such a block moves what is drawn
    in it.

    Examples:
        >>> with seeded(7):
        ...     first = random.random()
        >>> with seeded(7):
        ...     first == random.random()
        True
    """
    # Other devices are left alone: collators draw on the CPU.
    with _turn, torch.random.fork_rng(devices=[]):
        python_state = random.getstate()
        # The global generator is what such code draws from.
        numpy_state = np.random.get_state()  # noqa: NPY002
        random.seed(key)
        np.random.seed(key % 2**32)  # noqa: NPY002
        torch.default_generator.manual_seed(key)
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)  # noqa: NPY002


def hash_rows(tokens: Ints, bounds: Ints, key: int) -> Hashes:
    """Return a hash a row, of shape ``(rows,)``, of `key` and the row's tokens in their order.

    Args:
        tokens: The token ids of all rows, one after the other, each below 2**32.
        bounds: Where each row begins, and where the last one ends; shape ``(rows + 1,)``.
        key: Another key gives other hashes.

    Examples:
        >>> first, second, third = hash_rows(np.array([7, 8, 7, 8, 8, 7]), np.arange(0, 7, 2), 1)
        >>> first == second, first == third
        (np.True_, np.False_)
    """
    lengths = np.diff(bounds)
    places = np.arange(len(tokens))
    places -= np.repeat(bounds[:-1], lengths)
    places <<= 32
    places |= tokens
    hashes = _mix(places.view(np.uint64))
    totals = np.zeros(len(lengths), np.uint64)
    filled = np.flatnonzero(lengths)
    totals[filled] = np.add.reduceat(hashes, bounds[filled])
    return _mix(totals ^ np.uint64(key))


def hash_counters(keys: Hashes, counters: Ints | int) -> Hashes:
    """Return 64 random-looking bits for each pair of a key and a counter."""
    bits = np.atleast_1d(counters).astype(np.uint64)
    bits *= _GOLDEN
    return _mix(bits + keys)


def spread_keys(keys: Hashes, counts: Ints, *, step: int) -> Hashes:
    """Return `counts` keys for each key, that count on from it `step` counters at a time.

    Examples:
        >>> key = np.array([7], np.uint64)
        >>> third = spread_keys(key, np.array([3]), step=10)[2:]
        >>> hash_counters(third, 1) == hash_counters(key, 21)
        array([ True])
    """
    before = (np.cumsum(counts) - counts).view(np.uint64)
    stride = np.uint64(step * int(_GOLDEN) % 2**64)
    spread: Hashes = np.repeat(keys - before * stride, counts)
    spread += np.arange(len(spread), dtype=np.uint64) * stride
    return spread


def to_unit(hashes: Hashes) -> npt.NDArray[np.float64]:
    """Return numbers in [0, 1) from the upper 53 bits.

    Examples:
        >>> to_unit(np.array([0, 2**63], np.uint64))
        array([0. , 0.5])
    """
    units: npt.NDArray[np.float64] = (hashes >> np.uint64(11)).astype(np.float64)
    units *= 2.0**-53
    return units


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2**64 divided by the golden ratio, as in splitmix64


def _mix(bits: Hashes) -> Hashes:
    """Finalise as splitmix64 does; multiplication wraps at 2**64, as it should."""
    mixed = bits >> np.uint64(30)
    mixed ^= bits
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(27)
    mixed *= np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return mixed
