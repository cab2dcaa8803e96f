"""Which words are targets: found in the rows, weighed, and chosen by hash at a rate or in a budget.

What is chosen depends on named parts (a seed, an epoch, a row), never on what was drawn before. A
domain's own words are few among its words. If all words were masked evenly, most of a budget would
go to words that the model knows already; weights move it to others, at the same overall rate.
"""

import hashlib
import json
import logging
import operator
import warnings
from collections.abc import Callable
from functools import cache, lru_cache, partial
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from mlmadapt._types import Floats, Hashes, Ints, Rows, Tokenizer
from mlmadapt.data.rows import check_whole, join_rows, to_columns
from mlmadapt.data.tokenization import spell_word

logger = logging.getLogger(__name__)

# This many tokens per word, over a whole row, come from a tokenizer that does not split words.
_TOO_LONG = 32


class Words(NamedTuple):
    """The words of rows that lie end to end: the first token and the size of each.

    `before` counts the words before each row, and at its end all words.
    """

    first: Ints
    size: Ints
    before: Ints


def find_words(words: Ints, bounds: Ints) -> Words:
    """Return the words of rows: runs of one number, 0 or more.

    Examples:
        >>> find_words(np.array([-1, 0, 0, 1, 1]), np.array([0, 4, 5]))
        Words(first=array([1, 3, 4]), size=array([2, 1, 1]), before=array([0, 2, 3]))
    """
    is_word = words >= 0
    begins = np.ones(len(words) + 1, bool)
    np.not_equal(words[1:], words[:-1], out=begins[1:-1])
    begins[bounds] = True
    first = np.flatnonzero(begins[:-1] & is_word)
    size = np.flatnonzero(begins[1:] & is_word) - first + 1
    return Words(first, size, np.searchsorted(first, bounds))


def leave_out(
    words: Words, keys: Hashes, is_unknown: npt.NDArray[np.bool_], bounds: Ints
) -> tuple[Words, Hashes]:
    """Return words without those that hold an unknown token; the others keep their keys.

    So vocabularies that differ in what they know mask the same of what both know.

    Examples:
        >>> words = Words(np.array([1, 3]), np.array([2, 1]), np.array([0, 2]))
        >>> is_unknown = np.array([False, False, True, False])
        >>> leave_out(words, np.array([7, 8], np.uint64), is_unknown, np.array([0, 4]))
        (Words(first=array([3]), size=array([1]), before=array([0, 1])), array([8], dtype=uint64))
    """
    before = np.append(0, np.cumsum(is_unknown))
    is_known = before[words.first] == before[words.first + words.size]
    first = words.first[is_known]
    return Words(first, words.size[is_known], np.searchsorted(first, bounds)), keys[is_known]


def warn_if_collapsed(words: Words) -> bool:
    """Warn of a row whose words have 32 tokens or more on average; tell whether there is one.

    On average, since a single word can be as long as it likes.
    """
    if words.size.max(initial=0) < _TOO_LONG:
        return False
    counts = np.diff(words.before)
    tokens = np.diff(np.append(0, np.cumsum(words.size))[words.before])
    collapsed = np.flatnonzero(tokens >= _TOO_LONG * np.maximum(counts, 1))
    for row in collapsed[:1]:
        warnings.warn(
            f"word_ids make {counts[row]} word(s) of the {tokens[row]} tokens of a row, each "
            "masked as a whole: they come from a tokenizer that does not split words. Tokenize "
            "with tokenize_with_word_ids, and pass word_boundaries for a language without spaces",
            stacklevel=6,
        )
    return bool(collapsed.size)


def warn_if_equal(keyed: list[tuple[Hashes, Ints]]) -> bool:
    """Tell whether more than a hundredth of rows are equal to others, by keys and numbers of words.

    By the log, since it is no fault of the caller's where few rows recur.
    """
    if len(keyed) == 1 and len(set(keyed[0][0].tolist())) == len(keyed[0][0]):  # nearly always
        return False
    row_keys = np.concatenate([keys[words > 0] for keys, words in keyed])
    repeated = len(row_keys) - len(set(row_keys.tolist()))
    if repeated <= len(row_keys) / 100:
        return False
    logger.warning(
        "%d of %d rows or documents of a batch are equal to others and have their masks, so "
        "that what recurs is learned, or measured, by one mask; pass key_column, a column that "
        "numbers the rows",
        repeated,
        len(row_keys),
    )
    return True


def warn_of_unknown(rows: Rows, tokenizer: Tokenizer) -> None:
    """Tell what share of words the tokenizer does not know, where it is above 1 %.

    Up to 1,000 rows are read, spread over all.
    """
    places = np.linspace(0, len(rows) - 1, min(len(rows), 1000)).astype(int).tolist()
    columns = to_columns([rows[place] for place in places])
    if tokenizer.unk_token_id is None or not {"input_ids", "word_ids"} <= columns.keys():
        return
    joined, lengths = join_rows({name: columns[name] for name in ("input_ids", "word_ids")})
    bounds = np.append(0, np.cumsum(lengths))
    words = find_words(joined["word_ids"], bounds)
    is_unknown = joined["input_ids"] == tokenizer.unk_token_id
    known, _ = leave_out(words, words.first.view(np.uint64), is_unknown, bounds)
    share = 1 - len(known.first) / max(len(words.first), 1)
    if share > 0.01:
        logger.warning(
            "%.0f %% of the words of train_dataset hold %s, which stands for what the tokenizer "
            "does not know; they are not predicted. Use a tokenizer and model of this language, or "
            "add frequent words by extend_vocabulary",
            *(100 * share, tokenizer.unk_token),
        )


def list_places(first: Ints, size: Ints) -> Ints:
    """Return the places in runs that begin at `first`.

    Examples:
        >>> list_places(np.array([5, 9]), np.array([3, 1]))
        array([5, 6, 7, 9])
    """
    places: Ints = np.arange(size.sum()) + np.repeat(first - np.cumsum(size) + size, size)
    return places


def split_blocks(bounds: Ints) -> list[slice]:
    """Share rows out over blocks whose arrays stay in the processor's cache.

    One block of all takes half again as long, most of it for fresh memory.

    Examples:
        >>> split_blocks(np.array([0, 5000, 9000, 12000]))
        [slice(0, 2, None), slice(2, 3, None)]
    """
    cuts = np.flatnonzero(np.diff(bounds[:-1] // 8192)) + 1
    return [slice(*block) for block in pairwise([0, *cuts.tolist(), len(bounds) - 1])]


def choose_words(
    words: Words,
    keys: Hashes,
    row_keys: Hashes,
    weights: Floats | None,
    *,
    rate: float,
    budget: str,
) -> tuple[Ints, Floats]:
    """Return the words that are targets, by a key each, and the fate in [0, 1) of each."""
    words_in_row = np.diff(words.before)
    urgency = draw = to_unit(hash_counters(keys, 0))
    if weights is not None:
        # An exponential race: who comes first is chosen in proportion to its weight.
        with np.errstate(divide="ignore", invalid="ignore"):
            urgency = -np.log1p(-draw) / weights

    if budget == "exact":
        share = rate * words_in_row
        rounding = to_unit(hash_counters(row_keys, -1))
        quota = np.maximum(np.floor(share) + (rounding < share % 1), 1)
        # A word of weight 0 has an infinite urgency, and is not there to fill a quota.
        is_chosen = _rank(urgency, words_in_row) < np.repeat(quota, words_in_row)
        is_chosen &= np.isfinite(urgency)
    elif weights is None:
        is_chosen = draw < rate
    else:
        is_chosen = draw < spread_rate(rate, weights, words_in_row)
    chosen = np.flatnonzero(is_chosen)
    has_none = (np.diff(np.searchsorted(chosen, words.before)) == 0) & (words_in_row > 0)
    without = np.flatnonzero(has_none)
    if without.size:
        size = words_in_row[without]
        places = list_places(words.before[without], size)
        chosen = np.sort(np.append(chosen, places[_rank(urgency[places], size) == 0]))
    return chosen, to_unit(hash_counters(keys[chosen], 1))


class WordWeights:
    """The weights of words, from an array by token id or a callable by text.

    Args:
        source: An array of shape ``(size,)``; a word has the mean of its tokens. Or a callable from
            text to weight, called once a word and remembered.
        tokenizer: Turns the tokens of a word into its text.
        size: How many token ids there are.

    Raises:
        ValueError: If there is no array of numbers, it is of another shape, or a weight is negative
            or not finite.
    """

    def __init__(self, source: Any, tokenizer: Tokenizer, size: int) -> None:
        self._of_tokens = None if callable(source) else _read(source, size)
        self._of_word = cache(partial(_weigh_text, tokenizer=tokenizer, weight_of_text=source))

    def weigh(self, tokens: Ints, words: Words) -> Floats:
        """Return a weight a word, the heaviest of each row 1; words that all weigh 0 weigh 1.

        Args:
            tokens: The tokens of all rows, one after the other.
            words: How they make words.
        """
        size, words_in_row = words.size, np.diff(words.before)
        if not size.size:
            return np.empty(0)
        tokens = tokens[list_places(words.first, size)]
        if self._of_tokens is not None:
            word_of_token = np.repeat(np.arange(len(size)), size)
            weights = np.bincount(word_of_token, self._of_tokens[tokens]) / size
        else:
            pieces = np.split(tokens, np.cumsum(size)[:-1])
            weights = np.array([self._of_word(tuple(piece.tolist())) for piece in pieces])
        has_words = words_in_row > 0
        heaviest = np.maximum.reduceat(weights, words.before[:-1][has_words])
        heaviest = np.repeat(heaviest, words_in_row[has_words])
        scaled: Floats = np.ones_like(weights)
        np.divide(weights, heaviest, out=scaled, where=heaviest > 0)
        return scaled


def _weigh_text(
    word: tuple[int, ...], tokenizer: Tokenizer, weight_of_text: Callable[[str], float]
) -> float:
    text = spell_word(word, tokenizer)
    returned: Any = weight_of_text(text)
    try:
        weight = float(returned)
    except (TypeError, ValueError):
        weight = np.nan
    if not 0 <= weight < np.inf:
        seen = f"word_weights({text!r}) is {returned!r}"
        raise ValueError(f"{seen}; a weight must be a finite number, 0 or more")
    return weight


def spread_rate(rate: float, weights: Floats, words_in_row: Ints) -> Floats:
    """Return a probability a word in proportion to its weight, `rate` on average over each row.

    None can pass 1: what a heavy word cannot take goes to the others of its row.

    Examples:
        >>> spread_rate(0.5, np.array([1.0, 0.5, 0.5, 0.0]), np.array([4]))
        array([1. , 0.5, 0.5, 0. ])
    """
    rows = len(words_in_row)
    row_of_word = np.repeat(np.arange(rows), words_in_row)
    is_full = np.zeros(len(weights), bool)
    while True:
        open_weight = np.bincount(row_of_word, weights * ~is_full, rows)
        to_give = rate * words_in_row - np.bincount(row_of_word, is_full, rows)
        scale = np.divide(to_give, open_weight, out=np.zeros(rows), where=open_weight > 0)
        probability = np.where(is_full, 1.0, weights * scale[row_of_word])
        overfull = ~is_full & (probability > 1)
        if not overfull.any():
            return probability
        is_full |= overfull


def _rank(urgency: Floats, words_in_row: Ints) -> Ints:
    """Return the place of each word in its row when the row is sorted by urgency."""
    rows = len(words_in_row)
    row_of_word = np.repeat(np.arange(rows, dtype=np.min_scalar_type(rows)), words_in_row)
    # As lexsort((urgency, row_of_word)) does in six times the time: NumPy has a radix sort, for
    # small integers.
    order = np.argsort(urgency)
    order = order[np.argsort(row_of_word[order], kind="stable")]
    rank = np.empty(len(urgency), np.int64)
    before = np.repeat(np.cumsum(words_in_row) - words_in_row, words_in_row)
    rank[order] = np.arange(len(urgency)) - before
    return rank


def _read(source: npt.ArrayLike, size: int) -> Floats:
    try:
        weights = np.asarray(source, np.float64)
    except (TypeError, ValueError):  # NumPy has no bfloat16
        reason = "it must be a callable, or an array that NumPy can read"
        raise ValueError(f"word_weights is {source!r:.40}; {reason}") from None
    if weights.shape != (size,):
        seen = f"word_weights has shape {weights.shape}"
        raise ValueError(f"{seen}; it must be ({size},), a weight for each token id")
    wrong = np.flatnonzero(~((weights >= 0) & (weights < np.inf)))
    if wrong.size or not weights.any():
        seen = f"{weights[wrong[0]]} for token {wrong[0]}" if wrong.size else "0 for all tokens"
        raise ValueError(f"word_weights is {seen}; weights must be finite, 0 or more, not all 0")
    # The sum over a word's tokens must be finite too.
    return weights * 2.0**-64 if weights.max() > 2.0**900 else weights


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


def key_rows(key: int, names: Any) -> Hashes:
    """Return a key a row, of shape ``(rows,)``, of `key` and a number or a string that names it.

    Raises:
        TypeError: If a name is neither a whole number nor a string.

    Examples:
        >>> by_number = key_rows(7, [3, 4])
        >>> by_number[1] == key_rows(7, range(5))[4], by_number[0] == key_rows(7, ["3"])[0]
        (np.True_, np.False_)
    """
    numbers = np.asarray(names)
    if numbers.dtype.kind not in "iu":
        whole = partial(check_whole, "a value of key_column", least=None, error=TypeError)
        parts = [derive_key(name) if isinstance(name, str) else whole(name) for name in names]
        numbers = np.array(parts, np.int64)
    return hash_counters(np.array([key], np.uint64), numbers)


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
