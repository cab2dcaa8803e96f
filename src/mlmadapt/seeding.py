"""Randomness as a function: what is drawn depends on named parts, never on what was drawn before.

A generator's state cannot be shared between workers, ranks and a resumed run; a key can. Every random
choice of this library starts from ``derive_key(seed, purpose, ...)``, so that nothing random needs to
be saved and the caller's global generators are never moved.
"""

import hashlib
import json
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import torch


def derive_key(*parts: int | str) -> int:
    """Return 63 random-looking bits that depend on `parts` alone.

    Examples:
        >>> derive_key(42, "order", 0) == derive_key(42, "order", 0)
        True
        >>> derive_key(42, "order", 0) == derive_key(42, "order", 1)
        False
    """
    digest = hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@contextmanager
def seeded(key: int) -> Iterator[None]:
    """Seed Python's, NumPy's and torch's global generators inside the block; restore them after it.

    For code that draws from global state and cannot be handed a key: other libraries' collators, and
    dropout.

    Examples:
        >>> with seeded(7):
        ...     first = random.random()
        >>> with seeded(7):
        ...     first == random.random()
        True
    """
    python_state, numpy_state = random.getstate(), np.random.get_state()
    # Other devices are left alone: collators draw on the CPU.
    with torch.random.fork_rng(devices=[]):
        random.seed(key)
        np.random.seed(key % 2**32)
        torch.default_generator.manual_seed(key)
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


def hash_rows(
    tokens: npt.NDArray[np.int64], is_real: npt.NDArray[np.bool_], key: int
) -> npt.NDArray[np.uint64]:
    """Return a hash a row, of shape ``(batch,)``, of `key` and the row's tokens in their order.

    Padding (where `is_real` is False) does not count, on either side.

    Examples:
        >>> tokens = np.array([[7, 8, 0], [0, 7, 8]])
        >>> first, second = hash_rows(tokens, tokens > 0, key=1)
        >>> first == second
        np.True_
    """
    places = np.cumsum(is_real, axis=1)
    # A sum, since it is the same wherever the padding stands; the place keeps the order in it.
    hashes = hash_counters(_mix(tokens.astype(np.uint64)), places)
    total = np.where(is_real, hashes, np.uint64(0)).sum(axis=1, dtype=np.uint64)
    return _mix(total ^ np.uint64(key))


def hash_counters(
    keys: npt.NDArray[np.uint64], counters: npt.NDArray[np.int64]
) -> npt.NDArray[np.uint64]:
    """Return 64 random-looking bits for each pair of a key and a counter."""
    return _mix(keys + counters.astype(np.uint64) * _GOLDEN)


def to_unit(hashes: npt.NDArray[np.uint64]) -> npt.NDArray[np.float64]:
    """Return numbers in [0, 1) from the upper 53 bits.

    Examples:
        >>> to_unit(np.array([0, 2**63], np.uint64))
        array([0. , 0.5])
    """
    return (hashes >> np.uint64(11)) * 2.0**-53


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2**64 divided by the golden ratio, as in splitmix64


def _mix(bits: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Finalise as splitmix64 does; multiplication wraps at 2**64, as it should."""
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))
