"""Whole-word masking once more, slow and obvious: one row at a time, in Python's own integers."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import random
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from transformers import PreTrainedTokenizerFast

    Row = Mapping[str, Sequence[int]]


def random_states() -> tuple[Any, ...]:
    """Return the states of the three global generators."""
    states = random.getstate(), str(np.random.get_state())  # noqa: NPY002
    return *states, torch.get_rng_state().tolist()


def reference_key(*parts: int | str) -> int:
    """Digest the parts to 63 bits."""
    digest = hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") // 2


def mix(bits: int) -> int:
    """Finalise as splitmix64 does."""
    bits %= 2**64
    bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EB % 2**64
    return bits ^ (bits >> 31)


def draw(key: int, counter: int) -> int:
    """Return the 64 bits of a counter under a key."""
    return mix(key + counter * 0x9E3779B97F4A7C15)


def unit(bits: int) -> float:
    """Return a number in [0, 1)."""
    return (bits >> 11) / 2**53


def special_ids(tokenizer: PreTrainedTokenizerFast) -> set[int]:
    """Return what is never masked: special tokens, not ALBERT's full stop, nor a word unknown."""
    added = tokenizer.added_tokens_decoder
    return {i for i in added if added[i].special} - {tokenizer.unk_token_id}


@functools.lru_cache(maxsize=1)
def ordinary_ids(tokenizer: PreTrainedTokenizerFast, size: int) -> list[int]:
    """Return what a random replacement is drawn from: nothing special, added or unused.

    `size`, the number of tokens, is here for the cache.
    """
    added, unused = tokenizer.added_tokens_decoder, ("[unused", "<unused")
    vocab = tokenizer.get_vocab().items()
    return sorted(i for token, i in vocab if i not in added and not token.startswith(unused))


def words_of(row: Row, special: set[int]) -> list[list[int]]:
    """Return the positions of each word of a row."""
    words: list[list[int]] = []
    previous = None
    for position, (token, word) in enumerate(zip(row["input_ids"], row["word_ids"], strict=True)):
        if word is None or word < 0 or token in special:
            previous = None
            continue
        if word != previous:
            words.append([])
        words[-1].append(position)
        previous = word
    return words


def weigh(
    tokens: list[int],
    tokenizer: PreTrainedTokenizerFast,
    weights: Sequence[float] | Callable[[str], float],
) -> float:
    """Return the weight of a word."""
    if callable(weights):
        text = "".join(tokenizer.decode(tokens).split())
        is_cut = tokenizer.convert_ids_to_tokens(tokens[0]).startswith("##")  # by the row
        return weights(text[2:] if is_cut else text)
    return sum(weights[token] for token in tokens) / len(tokens)


def fill(rate: float, weights: list[float]) -> list[float]:
    """Pour `rate` a word into words that hold 1 each, by weight; what spills is poured again."""
    full: set[int] = set()
    while True:
        rest = [i for i in range(len(weights)) if i not in full]
        weight = sum(weights[i] for i in rest)
        left = rate * len(weights) - len(full)
        levels = [1.0 if i in full else 0.0 for i in range(len(weights))]
        for i in rest if weight else []:
            levels[i] = left * weights[i] / weight
        spilling = {i for i in rest if levels[i] > 1}
        if not spilling:
            return levels
        full |= spilling


def reference_targets(
    key: int, weights: list[float] | None, *, wwm_probability: float, budget: str, places: list[int]
) -> list[int]:
    """Return which of a row's words are targets, under the key of the row and their own places."""
    draws, words = [unit(draw(key, 2 * place)) for place in places], len(places)
    urgencies = list(draws)
    if weights is not None:
        if not any(weights):
            weights = [1.0] * words
        urgencies = [
            -math.log1p(-number) / weight if weight else math.inf
            for number, weight in zip(draws, weights, strict=True)
        ]
    in_order = sorted(range(words), key=urgencies.__getitem__)
    if budget == "exact":
        share = wwm_probability * words
        up = unit(draw(key, -1)) < share % 1
        quota = max(math.floor(share) + up, 1)
        return [word for word in in_order[:quota] if urgencies[word] < math.inf]
    rates = [wwm_probability] * words if weights is None else fill(wwm_probability, weights)
    targets = [word for word in range(words) if draws[word] < rates[word]]
    return targets or in_order[:1]


def reference_mask(
    row: Row,
    tokenizer: PreTrainedTokenizerFast,
    *,
    key: int,
    names: Sequence[int | str] | None = None,
    wwm_probability: float = 0.2,
    mask_replace_prob: float = 1.0,
    random_replace_prob: float = 0.0,
    budget: str = "bernoulli",
    word_weights: Sequence[float] | Callable[[str], float] | None = None,
) -> tuple[list[int], list[int]]:
    """Return the input ids and the labels of one row without padding.

    `names`, as of a row and of a document in it, take the place of its tokens.
    """
    special = special_ids(tokenizer)
    words = words_of(row, special)
    input_ids = [int(token) for token in row["input_ids"]]
    labels = [-100] * len(input_ids)
    if names is None:
        total = sum(mix((place << 32) + token) for place, token in enumerate(input_ids))
        row_key = mix(total % 2**64 ^ key)
    else:
        row_key = key
        for name in names:
            row_key = draw(row_key, reference_key(name) if isinstance(name, str) else name)
    texts = [[input_ids[position] for position in word] for word in words]
    known = [place for place, text in enumerate(texts) if tokenizer.unk_token_id not in text]
    weights = None
    if word_weights is not None:
        weights = [weigh(texts[place], tokenizer, word_weights) for place in known]
    targets = reference_targets(
        row_key, weights, wwm_probability=wwm_probability, budget=budget, places=known
    )
    for word in (known[target] for target in targets):
        fate = unit(draw(row_key, 2 * word + 1))
        for position in words[word]:
            labels[position] = input_ids[position]
            if fate < mask_replace_prob:
                input_ids[position] = tokenizer.mask_token_id
            elif fate < mask_replace_prob + random_replace_prob:
                pool = ordinary_ids(tokenizer, len(tokenizer))
                bits = draw(row_key ^ 0x6A09E667F3BCC909, position)
                input_ids[position] = pool[bits % len(pool)]
    return input_ids, labels


def reference_collate(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerFast, **settings: Any
) -> dict[str, list[list[int]]]:
    """Return a batch padded to its longest row, on the right."""
    width = max(len(row["input_ids"]) for row in rows)
    fills = {"input_ids": tokenizer.pad_token_id, "labels": -100}
    batch: dict[str, list[list[int]]] = {}
    for row in rows:
        columns = {name: list(values) for name, values in row.items() if name != "word_ids"}
        columns["input_ids"], columns["labels"] = reference_mask(row, tokenizer, **settings)
        columns.setdefault("attention_mask", [1] * len(row["input_ids"]))
        for name, values in columns.items():
            padding = [fills.get(name, 0)] * (width - len(values))
            batch.setdefault(name, []).append(values + padding)
    return batch
