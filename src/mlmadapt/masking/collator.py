"""Whole-word masks that depend on nothing but the example.

A mask is a hash, not a draw: each row's tokens give a key, the key and a word's place in the row
give the numbers that decide about the word. Nothing is remembered between calls, so batch size,
order, padding, workers, processes and an interruption cannot change a mask. All rows of a batch are
hashed at once, laid end to end, in time and memory linear in their tokens.

The hash is splitmix64's finaliser over a counter (Steele, Lea and Flood, OOPSLA 2014), the scheme
of counter-based generators (Salmon et al., SC 2011).
"""

from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import KW_ONLY, dataclass, fields
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from mlmadapt._types import Features, Hashes, Ints, Tokenizer
from mlmadapt.data.rows import (
    check_count,
    check_words,
    document_bounds,
    join_rows,
    pad_rows,
    to_columns,
)
from mlmadapt.data.tokenization import ordinary_token_ids, special_token_ids
from mlmadapt.masking.rates import Clock, RateSchedule, check_rates, is_share, rate_at
from mlmadapt.masking.selection import (
    WordWeights,
    check_whole,
    choose_words,
    derive_key,
    find_words,
    hash_counters,
    hash_rows,
    list_places,
    split_blocks,
    warn_if_collapsed,
)

_Key: TypeAlias = int | Hashes


@dataclass(eq=False)  # weights may be an array, which has no one truth
class WholeWordMaskingCollator:
    """Collate rows into a batch whose words are masked as a whole.

    The defaults are those of the Hugging Face course: 20 % of words, always the mask token. Every
    row that has a word has at least one target, so that no batch has a NaN loss; rows of few words
    are therefore masked somewhat more often than `wwm_probability` says (at 20 %, one row of 10
    words in 9 gets its target that way, and one of 100 words in 5 billion).

    With a `seed`, a mask depends on (seed, epoch, tokens of the row) alone. Call `set_epoch` before
    each epoch, or every epoch has the masks of epoch 0; DataLoader workers see it too, persistent
    ones included. `Trainer` does not call it (see the how-to page); ``seed=None`` needs no call.

    Args:
        tokenizer: The tokenizer that made the rows; it needs a mask token.
        wwm_probability: Share of words to predict, in [0, 1]; at 0, still one word per row. Or a
            schedule, the rate by the share of the run that is done: a dict of steps (``{0.0: 0.3,
            0.8: 0.15}`` has 15 % from 80 % of the run on) or a callable (``lambda done: 0.3 - 0.15
            * done``; spawned workers must be able to pickle it). A lower rate's targets are among a
            higher one's, but for some rows of one target with both weights and ``"bernoulli"``.
            Frozen sets have the rate of the run's end. `accelerate_train` knows the share; see
            `MaskingCallback` for `Trainer`, `set_progress` for your own loop.
        mask_replace_prob: Share of these words that become the mask token, in [0, 1].
        random_replace_prob: Share of these words that become random tokens, in [0, 1]; never
            special, added or unused tokens. The rest is kept: 0.8 and 0.1 are BERT's 80/10/10, by
            word. A few published vocabularies hold tokens without a meaning that nothing marks
            (``madeupword0000`` of roberta-base), one draw in ten thousand.
        budget: ``"bernoulli"`` decides each word by itself; ``"exact"`` gives each row its share of
            words, rounded up or down at random without bias, and never to 0.
        word_weights: Makes some words likelier targets at the same overall rate: a weight for each
            token id, shape ``(vocabulary,)`` (a word has the mean of its tokens), or a callable
            from a word's text to its weight. 0 or more; only ratios within a row matter. A word of
            weight 0 is never a target, unless all words of its row weigh 0.
        seed: A seed of its own, or None to follow ``torch.manual_seed`` and `set_seed`: one number
            per batch is drawn from torch's global generator.
        pad_to_multiple_of: Pad rows to a multiple of this many tokens.
        return_tensors: ``"pt"`` or ``"np"``.

    Raises:
        ValueError: If the tokenizer has no mask token or an argument is out of range.
        TypeError: If the seed is not a whole number, or `collate` of a subclass takes no progress.

    Source:
        Devlin et al. 2019 (80/10/10); Cui et al. 2019, arXiv:1906.08101 (whole words).

    Examples:
        >>> from mlmadapt.testing import tiny_rows, tiny_tokenizer
        >>> tokenizer = tiny_tokenizer("wordpiece")
        >>> rows = tiny_rows(tokenizer, ["an unfilmable film"])
        >>> collator = WholeWordMaskingCollator(tokenizer, wwm_probability=0.3, seed=0)
        >>> batch = collator(rows)
        >>> tokenizer.decode(batch["input_ids"][0])
        '[CLS] an [MASK] [MASK] [MASK] [MASK] film [SEP]'
    """

    tokenizer: Tokenizer
    _: KW_ONLY
    wwm_probability: RateSchedule = 0.2
    mask_replace_prob: float = 1.0
    random_replace_prob: float = 0.0
    budget: Literal["bernoulli", "exact"] = "bernoulli"
    word_weights: npt.ArrayLike | Callable[[str], float] | None = None
    seed: int | None = None
    pad_to_multiple_of: int | None = None
    return_tensors: Literal["pt", "np"] = "pt"

    def __post_init__(self) -> None:
        check_rates(self.wwm_probability, self.collate)
        for name in ("mask_replace_prob", "random_replace_prob"):
            share = getattr(self, name)
            if not is_share(share):
                raise ValueError(f"{name} is {share!r}; it must be a probability in [0, 1]")
        # A hair of tolerance, since 0.9 + 0.1 need not be 1 in binary.
        if self.mask_replace_prob + self.random_replace_prob > 1 + 1e-9:
            raise ValueError(
                f"mask_replace_prob {self.mask_replace_prob} and random_replace_prob "
                f"{self.random_replace_prob} sum to more than 1; what is left of 1 is kept as it is"
            )
        _check_choice("budget", self.budget, ("bernoulli", "exact"))
        _check_choice("return_tensors", self.return_tensors, ("pt", "np"))
        if self.pad_to_multiple_of is not None:
            check_count("pad_to_multiple_of", self.pad_to_multiple_of)
        if self.seed is not None:
            check_whole("seed", self.seed)
        mask_id = getattr(self.tokenizer, "mask_token_id", None)
        mask = None if mask_id is None else self.tokenizer.convert_ids_to_tokens(mask_id)
        # A token that the vocabulary lacks has the id of the unknown token.
        if mask is None or mask != self.tokenizer.mask_token:
            raise ValueError(
                f"tokenizer {self.tokenizer!r:.60} has no mask token; use the tokenizer of a "
                "masked language model, or add one with tokenizer.add_special_tokens("
                "{'mask_token': '[MASK]'}) and model.resize_token_embeddings(len(tokenizer))"
            )
        self.__setstate__({"_clock": Clock()})

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what `__setstate__` makes, so that equal collators have equal fingerprints."""
        state = {each.name: getattr(self, each.name) for each in fields(self)}
        return {**state, "_clock": copy(self._clock)}  # a copy has its own epoch

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Make the look-up tables."""
        self._clock: Clock
        self.__dict__.update(state)
        size = max(self.tokenizer.get_vocab().values()) + 1
        self._is_special = np.zeros(size, bool)
        self._is_special[list(special_token_ids(self.tokenizer))] = True
        self._pool = np.array(ordinary_token_ids(self.tokenizer), np.int64)
        self._mask_id: int = self.tokenizer.mask_token_id
        if self.random_replace_prob and not self._pool.size:
            raise ValueError(
                f"random_replace_prob is {self.random_replace_prob}, but the tokenizer has no "
                "token to draw that is not special, added or unused; set it to 0"
            )
        self._weights = None
        if self.word_weights is not None:
            self._weights = WordWeights(self.word_weights, self.tokenizer, size)
        self._warned: bool = False

    def __call__(
        self, features: Features, return_tensors: Literal["pt", "np"] | None = None
    ) -> dict[str, Any]:
        """Collate rows: ``input_ids``, ``attention_mask``, ``labels`` and the other model inputs.

        All have shape ``(batch, sequence)``; ``labels`` is -100 where nothing is to be predicted. A
        column ``labels`` of the rows is not used, and the rows are not changed.

        Args:
            features: Rows of columns: lists, arrays or tensors of one whole number per token, and
                ``word_ids``, in which None and -1 both say "no word".
            return_tensors: In place of the collator's own, for this call.

        Returns:
            The batch, of int64 tensors or arrays.

        Raises:
            ValueError: If there are no rows, they differ in columns, a row has no ``word_ids``, a
                column does not hold one whole number per token, a token id is outside the
                vocabulary, `word_weights` returns no weight, or padding is needed and the tokenizer
                has no padding token.
            TypeError: If a row is not a dict.

        Warns:
            UserWarning: If the words of a row are 32 tokens long or more on average.

        Examples:
            >>> from mlmadapt.testing import tiny_tokenizer
            >>> collator = WholeWordMaskingCollator(tiny_tokenizer(), wwm_probability=1.0)
            >>> rows = [{"input_ids": [2, 7, 3], "word_ids": [-1, 0, -1]}]
            >>> collator(rows, return_tensors="np")["labels"]
            array([[-100,    7, -100]])
        """
        return_tensors = return_tensors or self.return_tensors
        _check_choice("return_tensors", return_tensors, ("pt", "np"))
        if self.seed is None:
            key = int(torch.randint(2**63 - 1, ()))
        else:
            key = derive_key(self.seed, "mask", self._clock.epoch)
        told = {} if is_share(self.wwm_probability) else {"progress": self._clock.progress}
        batch = self.collate(features, key=key, **told)
        if return_tensors == "np":
            return dict(batch)
        tensors = {name: torch.from_numpy(array) for name, array in batch.items()}
        if "document_ids" in tensors:
            tensors["attention_mask"] = tensors["attention_mask"].as_subclass(PackedAttentionMask)
        return tensors

    def set_epoch(self, epoch: int) -> None:
        """Choose the masks of an epoch, as samplers choose their order.

        Args:
            epoch: A whole number in 64 bits; equal ones give equal masks.

        Raises:
            TypeError: If it is not a whole number.
            ValueError: If it needs more than 64 bits.
            RuntimeError: If this process was handed the collator by another, and has DataLoader
                workers from before its first call.

        Examples:
            >>> from mlmadapt.testing import tiny_tokenizer
            >>> collator = WholeWordMaskingCollator(tiny_tokenizer(), seed=0)
            >>> row = {"input_ids": [2, 7, 8, 9, 3], "word_ids": [-1, 0, 1, 2, -1]}
            >>> for epoch in (0, 1, 0):
            ...     collator.set_epoch(epoch)
            ...     collator([row])["input_ids"][0].tolist()
            [2, 4, 8, 9, 3]
            [2, 7, 8, 4, 3]
            [2, 4, 8, 9, 3]
        """
        self._clock.set(epoch=check_whole("epoch", epoch, range(-(2**63), 2**63)))

    def set_progress(self, progress: float) -> None:
        """Tell a schedule of rates how far the run is; own loops call it before each step.

        DataLoader workers collate ahead: the next ``num_workers * prefetch_factor`` batches (4 with
        2 workers) keep an earlier step's rate. Called once per epoch, before the loop, it is exact.

        Args:
            progress: Share of the run that is done, in [0, 1]: steps taken over all steps.

        Raises:
            ValueError: If it is not a share, or the rate there is none.
            RuntimeError: As `set_epoch`.

        Examples:
            >>> from mlmadapt.testing import tiny_tokenizer
            >>> rates = {0.0: 1.0, 0.5: 0.0}
            >>> collator = WholeWordMaskingCollator(tiny_tokenizer(), wwm_probability=rates, seed=0)
            >>> collator.set_progress(0.5)
            >>> collator([{"input_ids": [2, 7, 8, 9, 3], "word_ids": [-1, 0, 1, 2, -1]}])["labels"]
            tensor([[-100,    7, -100, -100, -100]])
        """
        rate_at(self.wwm_probability, progress)  # wrong ones are told here, not in a worker
        self._clock.set(progress=progress)

    def collate(self, features: Features, *, key: int, progress: float = 1.0) -> dict[str, Ints]:
        """Collate rows into arrays whose masks depend on (`key`, tokens of the row) alone.

        Args:
            features: As for the call.
            key: In place of seed and epoch; 0 or more, below 2**64.
            progress: Share of the run that is done, in [0, 1], for a schedule of rates.

        Returns:
            Arrays of shape ``(batch, sequence)``, as the call.

        Raises:
            ValueError: As the call, and if `key` is out of range.
            TypeError: As the call, and if `key` is not a whole number.

        Examples:
            >>> from mlmadapt.testing import tiny_tokenizer
            >>> rows = [{"input_ids": [2, 7, 3], "word_ids": [-1, 0, -1]}]
            >>> WholeWordMaskingCollator(tiny_tokenizer()).collate(rows, key=0)["input_ids"]
            array([[2, 4, 3]])
        """
        masked, lengths = self.mask(to_columns(features), key=key, progress=progress)
        return pad_rows(masked, lengths, self.tokenizer, pad_to_multiple_of=self.pad_to_multiple_of)

    def mask(
        self,
        columns: Mapping[str, Any],
        *,
        key: _Key,
        progress: float = 1.0,
        lengths: Ints | None = None,
    ) -> tuple[dict[str, Ints], Ints]:
        """Mask rows given as columns, without padding them.

        Args:
            columns: Lists of rows by name, as a batch of `map` has them.
            key: As for `collate`; or a key per row, of shape ``(rows,)``, in place of its tokens.
            progress: As for `collate`.
            lengths: Tokens of each row, where the columns are arrays with the rows end to end.

        Returns:
            Arrays of shape ``(tokens,)``, the rows end to end, and the rows' lengths in tokens.

        Raises:
            ValueError: As the call, and if `key` is out of range.
            TypeError: If `key` is not a whole number.

        Examples:
            >>> from mlmadapt.testing import tiny_tokenizer
            >>> columns = {"input_ids": [[2, 7, 3]], "word_ids": [[-1, 0, -1]]}
            >>> masked, lengths = WholeWordMaskingCollator(tiny_tokenizer()).mask(columns, key=0)
            >>> masked["input_ids"], lengths
            (array([2, 4, 3]), array([3]))
        """
        if not isinstance(key, np.ndarray):
            key = check_whole("key", key, range(2**64))
        rate = rate_at(self.wwm_probability, progress)
        masked = {name: rows for name, rows in columns.items() if name != "labels"}
        if lengths is None:
            check_words(columns)
            masked, lengths = join_rows(masked)
        elif lengths.sum() != len(masked["input_ids"]):
            raise ValueError(
                f"lengths sum to {lengths.sum()} tokens, but the rows have "
                f"{len(masked['input_ids'])} 'input_ids'; pass them as join_rows returns them"
            )
        tokens, word_ids = masked["input_ids"], masked.pop("word_ids")
        self._check_ids(tokens, lengths)
        is_special = self._is_special.take(tokens)
        if "special_tokens_mask" in masked:
            is_special |= masked.pop("special_tokens_mask") != 0
        if "attention_mask" not in masked:
            masked["attention_mask"] = np.ones_like(tokens)
        is_real = masked["attention_mask"] != 0
        words = np.where(is_special, -1, word_ids)
        bounds = np.zeros(len(lengths) + 1, np.int64)
        np.cumsum(lengths, out=bounds[1:])
        if "document_ids" in masked:  # each is masked as if it had a row of its own
            bounds = document_bounds(masked["document_ids"], bounds)
        labels = np.full_like(tokens, -100)
        if is_real.all():
            inputs = self._mask_blocks(tokens, words, bounds, key, labels, rate=rate)
        else:
            # Rows can come padded already. That is left out, so that it plays no part.
            bounds = np.searchsorted(np.flatnonzero(is_real), bounds)
            inputs, real_labels = tokens.copy(), labels[is_real]
            inputs[is_real] = self._mask_blocks(
                tokens[is_real], words[is_real], bounds, key, real_labels, rate=rate
            )
            labels[is_real] = real_labels
        return {**masked, "input_ids": inputs, "labels": labels}, lengths

    def _mask_blocks(
        self, tokens: Ints, words: Ints, bounds: Ints, key: _Key, labels: Ints, *, rate: float
    ) -> Ints:
        """Return the tokens with masks, and write the targets into `labels`."""
        inputs, done = tokens.copy(), 0
        for rows in split_blocks(bounds):
            block, count = slice(rows[0], rows[-1]), len(rows) - 1
            own_key = key if isinstance(key, int) else key[done : done + count]
            targets, instead = self._choose_tokens(
                tokens[block], words[block], rows - rows[0], own_key, rate=rate
            )
            done += count
            targets += rows[0]
            labels[targets] = tokens[targets]
            inputs[targets] = instead
        return inputs

    def _choose_tokens(
        self, tokens: Ints, words: Ints, bounds: Ints, key: _Key, *, rate: float
    ) -> tuple[Ints, Ints]:
        """Return which tokens of some rows are targets, and what stands there instead."""
        first, size = find_words(words, bounds)
        words_before = np.searchsorted(first, bounds)
        self._warned = self._warned or warn_if_collapsed(size, words_before)
        weights = None
        if self._weights is not None:
            weights = self._weights.weigh(tokens[words >= 0], size, np.diff(words_before))
        row_keys = hash_rows(tokens, bounds, key) if isinstance(key, int) else key
        chosen, fate = choose_words(words_before, row_keys, weights, rate=rate, budget=self.budget)
        size = size[chosen]
        targets = list_places(first[chosen], size)
        fate = np.repeat(fate, size)
        instead = tokens[targets]
        instead[fate < self.mask_replace_prob] = self._mask_id
        is_random = fate >= self.mask_replace_prob
        is_random &= fate < self.mask_replace_prob + self.random_replace_prob
        if is_random.any():
            replaced = targets[is_random]
            row = np.searchsorted(bounds, replaced, side="right") - 1
            draws = hash_counters(row_keys[row] ^ _REPLACEMENT, replaced - bounds[row])
            instead[is_random] = self._pool[draws % np.uint64(len(self._pool))]
        return targets, instead

    def _check_ids(self, tokens: Ints, lengths: Ints) -> None:
        size = len(self._is_special)
        if tokens.view(np.uint64).max(initial=0) >= size:  # negative ids are large ones
            place = np.flatnonzero((tokens < 0) | (tokens >= size))[0]
            row = np.searchsorted(np.cumsum(lengths), place, side="right")
            raise ValueError(
                f"row {row} of the batch has token id {tokens[place]}, but the tokenizer had ids 0 "
                f"to {size - 1} when this collator was made; use the tokenizer that made the rows, "
                "and make the collator after adding tokens"
            )


# Keeps the draws of replacements apart from those of words.
_REPLACEMENT = np.uint64(0x6A09E667F3BCC909)


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(map(repr, choices))}")


# ---- was masking/packed: The attention mask of rows that hold several documents, which no model takes for an ordinary one.


# What keeps the type of a mask, and what gives an ordinary tensor or number.
_MOVING = {
    "__getitem__",
    "clone",
    "contiguous",
    "cpu",
    "cuda",
    "detach",
    "pin_memory",
    "record_stream",
}
_READING = {
    "__array__",
    "__eq__",
    "__format__",
    "__get__",  # an attribute, such as the shape
    "__len__",
    "__ne__",
    "__reduce_ex__",  # to and from worker processes
    "__repr__",
    "as_subclass",
    "dim",
    "equal",
    "is_pinned",
    "numel",
    "numpy",
    "size",
    "sum",
    "tolist",
    "unbind",
}


class PackedAttentionMask(torch.Tensor):
    """An attention mask that can be moved and read, and that raises where a model computes with it.

    `isolate_documents` takes it out before the model sees it;
    ``mask.as_subclass(torch.Tensor)`` makes an ordinary one of it.

    Examples:
        >>> mask = torch.ones(1, 4, dtype=torch.int64).as_subclass(PackedAttentionMask)
        >>> mask.to("cpu").sum()
        tensor(4)
        >>> 1 - mask
        Traceback (most recent call last):
            ...
        ValueError: rows of the batch hold several documents ('document_ids'), which this model ...
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        """Copy it; torch's own way computes with it."""
        return self.clone()

    @classmethod
    def __torch_function__(
        cls,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Let a mask be moved and read, and refuse all else.

        Raises:
            ValueError: If a model without `isolate_documents` uses the mask.
        """
        name = func.__name__
        kwargs = kwargs or {}
        given = (*args, *kwargs.values())
        if name in _MOVING or (
            name == "to" and not any(isinstance(each, torch.dtype) for each in given)
        ):
            return super().__torch_function__(func, types, args, kwargs)  # type: ignore[no-untyped-call]
        if name in _READING:
            with torch._C.DisableTorchFunctionSubclass():  # noqa: SLF001  # as torch's own code does
                return func(*args, **kwargs)
        raise ValueError(
            "rows of the batch hold several documents ('document_ids'), which this model would let "
            "see each other; call isolate_documents(model) before the loop, or remove the column "
            "'document_ids' if documents are to be joined"
        )
