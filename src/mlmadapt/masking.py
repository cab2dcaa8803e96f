"""Whole-word masks that depend on nothing but the example.

A mask is a hash, not a draw: each row's tokens give a key, the key and a word's place in the row
give the numbers that decide about the word. Nothing is remembered between calls, so batch size,
order, padding, workers, processes and an interruption cannot change a mask. The whole batch is
hashed at once, in time and memory linear in its tokens.

The hash is splitmix64's finaliser over a counter (Steele, Lea and Flood, OOPSLA 2014), the scheme of
counter-based generators (Salmon et al., SC 2011).
"""

import re
import warnings
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, fields
from multiprocessing.context import get_spawning_popen
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from mlmadapt.padding import Features, pad_features
from mlmadapt.seeding import derive_key, hash_counters, hash_rows, to_unit
from mlmadapt.tokenization import special_token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
Hashes = npt.NDArray[np.uint64]
Floats = npt.NDArray[np.float64]


@dataclass(eq=False)  # weights may be an array, which has no one truth
class WholeWordMaskingCollator:
    """Collate rows into a batch whose words are masked as a whole.

    The defaults are those of the Hugging Face course: 20 % of words, always the mask token. Every row
    that has a word has at least one target, so that no batch has a NaN loss; rows of few words are
    therefore masked somewhat more often than `wwm_probability` says (rows of 100 words: never seen,
    rows of one word: always).

    With a `seed`, a mask depends on (seed, epoch, tokens of the row) alone. Call `set_epoch` before
    each epoch, or every epoch has the masks of epoch 0; workers see it too, persistent ones included.
    `Trainer` does not call it (see the how-to page); ``seed=None`` needs no call.

    Args:
        tokenizer: The tokenizer that made the rows; it needs a mask token.
        wwm_probability: Share of words to predict, in [0, 1].
        mask_replace_prob: Share of these words that become the mask token, in [0, 1].
        random_replace_prob: Share of these words that become random tokens, in [0, 1]; never special,
            added or unused tokens. The rest is kept: 0.8 and 0.1 are BERT's 80/10/10, by word.
        budget: ``"bernoulli"`` decides each word by itself; ``"exact"`` gives each row its share of
            words, rounded up or down at random without bias.
        word_weights: Makes some words likelier targets at the same overall rate: a weight for each
            token id, shape ``(vocabulary,)`` (a word has the mean of its tokens), or a callable from
            a word's text to its weight. 0 or more; 1 is nothing special.
        seed: A seed of its own, or None to follow ``torch.manual_seed`` and `set_seed`, one number
            drawn from torch's global generator a batch.
        pad_to_multiple_of: Pad rows to a multiple of this many tokens.
        return_tensors: ``"pt"`` or ``"np"``.

    Raises:
        ValueError: If the tokenizer has no mask token or an argument is out of range; at the call, if
            a row has no ``word_ids`` or a column is not one number a token.

    Source:
        Devlin et al. 2019 (80/10/10); Cui et al. 2019, arXiv:1906.08101 (whole words).

    Examples:
        >>> from mlmadapt import tokenize_with_word_ids
        >>> from mlmadapt.testing import tiny_tokenizer
        >>> tokenizer = tiny_tokenizer("wordpiece")
        >>> tokens = tokenize_with_word_ids({"text": ["an unfilmable film"]}, tokenizer)
        >>> rows = [dict(zip(tokens, row)) for row in zip(*tokens.values())]
        >>> collator = WholeWordMaskingCollator(tokenizer, wwm_probability=0.3, seed=0)
        >>> batch = collator(rows)
        >>> tokenizer.decode(batch["input_ids"][0])
        'TO FILL'
    """

    tokenizer: "PreTrainedTokenizerBase"
    _: KW_ONLY
    wwm_probability: float = 0.2
    mask_replace_prob: float = 1.0
    random_replace_prob: float = 0.0
    budget: Literal["bernoulli", "exact"] = "bernoulli"
    word_weights: npt.ArrayLike | Callable[[str], float] | None = None
    seed: int | None = None
    pad_to_multiple_of: int | None = None
    return_tensors: Literal["pt", "np"] = "pt"

    def __post_init__(self) -> None:
        for name in ("wwm_probability", "mask_replace_prob", "random_replace_prob"):
            if not 0 <= getattr(self, name) <= 1:
                message = f"{name} is {getattr(self, name)!r}; it must be a probability in [0, 1]"
                raise ValueError(message)
        # A hair of tolerance, since 0.9 + 0.1 need not be 1 in binary.
        if self.mask_replace_prob + self.random_replace_prob > 1 + 1e-9:
            message = (
                f"mask_replace_prob {self.mask_replace_prob} and random_replace_prob "
                f"{self.random_replace_prob} sum to more than 1; what is left of 1 is kept as it is"
            )
            raise ValueError(message)
        _check_choice("budget", self.budget, ("bernoulli", "exact"))
        _check_choice("return_tensors", self.return_tensors, ("pt", "np"))
        if self.pad_to_multiple_of is not None and self.pad_to_multiple_of < 1:
            message = f"pad_to_multiple_of is {self.pad_to_multiple_of}; it must be 1 token or more"
            raise ValueError(message)
        if self.tokenizer.mask_token_id is None:
            message = (
                f"tokenizer {type(self.tokenizer).__name__} ({self.tokenizer.name_or_path!r}) has no "
                "mask token; use the tokenizer of a masked language model, or set "
                "tokenizer.mask_token"
            )
            raise ValueError(message)
        self.__setstate__({"_epoch": 0})

    def __call__(
        self, features: Features, return_tensors: Literal["pt", "np"] | None = None
    ) -> dict[str, Any]:
        """Collate rows: ``input_ids``, ``attention_mask``, ``labels`` and the other model inputs.

        All have shape ``(batch, sequence)``; ``labels`` is -100 where nothing is to be predicted. A
        column ``labels`` of the rows is not used, and the rows are not changed.
        """
        if self.seed is None:
            key = int(torch.randint(2**63 - 1, ()))
        else:
            key = derive_key(self.seed, "mask", int(self._epoch))
        batch = self.collate(features, key=key)
        return_tensors = return_tensors or self.return_tensors
        _check_choice("return_tensors", return_tensors, ("pt", "np"))
        if return_tensors == "np":
            return dict(batch)
        return {name: torch.from_numpy(array) for name, array in batch.items()}

    def set_epoch(self, epoch: int) -> None:
        """Choose the masks of an epoch, as samplers choose their order."""
        self._epoch[0] = epoch

    def collate(self, features: Features, *, key: int) -> dict[str, Ints]:
        """Collate rows into arrays whose masks depend on (`key`, tokens of the row) alone."""
        for row, feature in enumerate(features):
            if feature.get("word_ids") is None:
                message = (
                    f"feature {row} has no 'word_ids', only {list(feature)}; tokenize with "
                    "tokenize_with_word_ids, and pass remove_unused_columns=False to Trainer"
                )
                raise ValueError(message)
        batch = pad_features(
            [{name: row[name] for name in row if name != "labels"} for row in features],
            self.tokenizer,
            pad_to_multiple_of=self.pad_to_multiple_of,
        )
        tokens, word_ids = batch["input_ids"], batch.pop("word_ids")
        self._check_ids(tokens)
        is_real = batch["attention_mask"] != 0
        is_text = is_real & (word_ids >= 0) & ~self._is_special[tokens]
        if "special_tokens_mask" in batch:
            is_text &= batch.pop("special_tokens_mask") == 0
        row_keys = hash_rows(tokens, is_real, key)
        chosen, fate, word_of_token = self._choose_words(tokens, word_ids, is_text, row_keys)

        is_target = is_text.copy()
        is_target[is_text] = chosen[word_of_token]
        fates = np.full(tokens.shape, 1.0)
        fates[is_text] = fate[word_of_token]
        is_masked = is_target & (fates < self.mask_replace_prob)
        is_replaced = is_target & ~is_masked
        is_replaced &= fates < self.mask_replace_prob + self.random_replace_prob
        batch["labels"] = np.where(is_target, tokens, -100)
        batch["input_ids"] = np.where(is_masked, self.tokenizer.mask_token_id, tokens)
        if is_replaced.any():
            row, place = np.nonzero(is_replaced)
            draws = hash_counters(row_keys[row] ^ _REPLACEMENT, np.cumsum(is_real, axis=1)[row, place])
            batch["input_ids"][is_replaced] = self._pool[draws % np.uint64(len(self._pool))]
        return batch

    def _choose_words(
        self, tokens: Ints, word_ids: Ints, is_text: Bools, row_keys: Hashes
    ) -> tuple[Bools, Floats, Ints]:
        """Return for each word whether it is a target and its fate in [0, 1), and each token's word."""
        # A word is a run of one number: also where two documents or a chunk's edge meet.
        begins = is_text.copy()
        begins[:, 1:] &= ~(is_text[:, :-1] & (word_ids[:, 1:] == word_ids[:, :-1]))
        word_of_token = np.cumsum(begins[is_text]) - 1
        row_of_word, _ = np.nonzero(begins)
        counts = np.bincount(row_of_word, minlength=len(tokens))
        self._warn_if_collapsed(is_text, counts)
        firsts = np.cumsum(counts) - counts
        place_in_row = np.arange(len(row_of_word)) - firsts[row_of_word]
        keys = row_keys[row_of_word]
        draw = to_unit(hash_counters(keys, 2 * place_in_row))
        fate = to_unit(hash_counters(keys, 2 * place_in_row + 1))
        if self.word_weights is None:
            weights = None
            urgency = draw  # the smaller, the sooner a target
        else:
            weights = self._weigh_words(tokens[is_text], word_of_token, row_of_word, counts)
            # Exponential races: who finishes first is chosen in proportion to its weight.
            with np.errstate(divide="ignore"):
                urgency = -np.log1p(-draw) / weights

        if self.budget == "exact":
            share = self.wwm_probability * counts
            rounding = to_unit(hash_counters(row_keys, np.full(len(tokens), -1)))
            quota = np.maximum(np.floor(share) + (rounding < share % 1), 1)
            order = np.lexsort((urgency, row_of_word))
            rank = np.empty_like(place_in_row)
            rank[order] = place_in_row
            chosen = (rank < quota[row_of_word]) & np.isfinite(urgency)
        elif weights is None:
            chosen = draw < self.wwm_probability
        else:
            chosen = draw < _spread_rate(self.wwm_probability, weights, row_of_word, counts)
        without = (counts > 0) & (np.bincount(row_of_word, chosen, len(tokens)) == 0)
        if without.any():
            soonest = np.full(len(tokens), np.inf)
            soonest[counts > 0] = np.minimum.reduceat(urgency, firsts[counts > 0])
            chosen |= without[row_of_word] & (urgency == soonest[row_of_word])
        return chosen, fate, word_of_token

    def _weigh_words(
        self, tokens: Ints, word_of_token: Ints, row_of_word: Ints, counts: Ints
    ) -> Floats:
        """Return a weight a word; a row whose words all weigh nothing is weighed evenly."""
        if callable(self.word_weights):
            sizes = np.bincount(word_of_token)
            words = np.split(tokens, np.cumsum(sizes)[:-1])
            weights = np.array([self._weight_of(tuple(word.tolist())) for word in words])
        else:
            weights = np.bincount(word_of_token, self._token_weights[tokens])
            weights /= np.bincount(word_of_token)
        is_nothing = np.bincount(row_of_word, weights, len(counts)) == 0
        weights[is_nothing[row_of_word]] = 1
        return weights

    def _weight_of(self, word: tuple[int, ...]) -> float:
        if word not in self._weight_cache:
            text = self.tokenizer.decode(word).strip()
            weight = self.word_weights(text)  # type: ignore[operator, misc]
            if not 0 <= weight < np.inf:
                message = f"word_weights({text!r}) is {weight!r}; a weight must be finite and 0 or more"
                raise ValueError(message)
            self._weight_cache[word] = float(weight)
        return self._weight_cache[word]

    def _check_ids(self, tokens: Ints) -> None:
        size = len(self._is_special)
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < size:
            row = int(np.flatnonzero(((tokens < 0) | (tokens >= size)).any(axis=1))[0])
            message = (
                f"feature {row} has token ids from {tokens[row].min()} to {tokens[row].max()}, but the "
                f"tokenizer had {size} tokens when this collator was made; use the tokenizer that made "
                "the rows, and make the collator after adding tokens"
            )
            raise ValueError(message)

    def _warn_if_collapsed(self, is_text: Bools, counts: Ints) -> None:
        sizes = is_text.sum(axis=1)
        collapsed = np.flatnonzero((counts == 1) & (sizes >= _LONGEST_PLAUSIBLE_WORD))
        if collapsed.size and not self._warned:
            self._warned = True
            row = int(collapsed[0])
            warnings.warn(
                f"feature {row} is one word of {sizes[row]} tokens, which is masked as a whole: its "
                "word_ids come from a tokenizer that does not split words. Tokenize with "
                "tokenize_with_word_ids, and pass word_boundaries for a language without spaces",
                stacklevel=5,
            )

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what `__setstate__` makes, so that equal collators have equal fingerprints."""
        state = {each.name: getattr(self, each.name) for each in fields(self)}
        # Only a worker that is being started can share the epoch; a copy has its own.
        starts_worker = get_spawning_popen() is not None
        return {**state, "_epoch": self._epoch if starts_worker else int(self._epoch)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Make the look-up tables, and the epoch in memory that persistent workers share."""
        self.__dict__.update(state)
        if isinstance(self._epoch, int):
            self._epoch = torch.tensor([self._epoch]).share_memory_()
        size = max(self.tokenizer.get_vocab().values()) + 1
        self._is_special = np.zeros(size, bool)
        self._is_special[list(special_token_ids(self.tokenizer))] = True
        self._pool = _replacement_pool(self.tokenizer)
        if self.random_replace_prob and not self._pool.size:
            message = "random_replace_prob is above 0, but the tokenizer has no ordinary tokens to draw"
            raise ValueError(message)
        self._token_weights = self._read_weights(size)
        self._weight_cache: dict[tuple[int, ...], float] = {}
        self._warned = False

    def _read_weights(self, size: int) -> Floats:
        if self.word_weights is None or callable(self.word_weights):
            return np.empty(0)
        weights = np.asarray(self.word_weights, np.float64)
        if weights.shape != (size,):
            message = (
                f"word_weights has shape {weights.shape}; it must be ({size},), a weight for each "
                "token id of the tokenizer"
            )
            raise ValueError(message)
        wrong = np.flatnonzero(~((weights >= 0) & (weights < np.inf)))
        if wrong.size or not weights.any():
            seen = f"{weights[wrong[0]]} for token {wrong[0]}" if wrong.size else "0 for every token"
            message = f"word_weights is {seen}; weights must be finite, 0 or more, and not all 0"
            raise ValueError(message)
        return weights


# A row of this many tokens in one word is no word but a tokenizer that does not split.
_LONGEST_PLAUSIBLE_WORD = 32
# Keeps the draws of replacements apart from those of words.
_REPLACEMENT = np.uint64(0x6A09E667F3BCC909)


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        message = f"{name} is {value!r}; it must be one of {', '.join(map(repr, choices))}"
        raise ValueError(message)


def _replacement_pool(tokenizer: "PreTrainedTokenizerBase") -> Ints:
    """Return the ids of ordinary tokens: not special, not added, not reserved as unused."""
    left_out = special_token_ids(tokenizer) | set(tokenizer.added_tokens_decoder)
    is_unused = re.compile(r"[\[<]unused_?\d+[\]>]").fullmatch
    return np.array(
        sorted(i for token, i in tokenizer.get_vocab().items() if i not in left_out and not is_unused(token)),
        np.int64,
    )


def _spread_rate(rate: float, weights: Floats, row_of_word: Ints, counts: Ints) -> Floats:
    """Return a probability a word in proportion to its weight, `rate` on average over each row.

    None can pass 1: what a heavy word cannot take goes to the others of its row.
    """
    is_full = np.zeros(len(weights), bool)
    while True:
        rows = len(counts)
        open_weight = np.bincount(row_of_word, weights * ~is_full, rows)
        to_give = rate * counts - np.bincount(row_of_word, is_full, rows)
        scale = np.divide(to_give, open_weight, out=np.zeros(rows), where=open_weight > 0)
        probability = np.where(is_full, 1.0, weights * scale[row_of_word])
        overfull = ~is_full & (probability > 1)
        if not overfull.any():
            return probability
        is_full |= overfull
