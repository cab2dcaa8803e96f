"""Whole-word masks that depend on nothing but the example.

A mask is a hash, not a draw: a row's key and a word's place in the row give the numbers that decide
about the word. The key is made of what tells the row from others: its place in the dataset, a
column of the user's, or else its tokens, which equal rows share. Nothing is remembered between
calls, so batch size, order, padding, workers, processes and an interruption cannot change a mask.
All rows of a batch are hashed at once, laid end to end, in time and memory linear in their tokens.
A batch whose rows hold several documents has an attention mask that a model cannot take for an
ordinary one.

The hash is splitmix64's finaliser over a counter (Steele, Lea and Flood, OOPSLA 2014), the scheme
of counter-based generators (Salmon et al., SC 2011).
"""

import inspect
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import KW_ONLY, dataclass, fields
from typing import Any, Literal, Self, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from mlmadapt._types import Features, Floats, Hashes, Ints, Tokenizer
from mlmadapt.data.packing import PackedAttentionMask
from mlmadapt.data.rows import (
    JoinedRows,
    are_frozen,
    check_whole,
    check_words,
    document_bounds,
    join_frozen,
    join_rows,
    pad_rows,
    to_columns,
)
from mlmadapt.data.tokenization import ordinary_token_ids, special_token_ids
from mlmadapt.masking.rates import RateSchedule, check_probability, rate_at, sample_rates
from mlmadapt.masking.selection import (
    WordWeights,
    choose_words,
    derive_key,
    find_words,
    hash_counters,
    hash_rows,
    key_rows,
    leave_out,
    list_places,
    split_blocks,
    spread_keys,
    warn_if_collapsed,
    warn_if_equal,
)

_Key: TypeAlias = int | Hashes


@dataclass(eq=False)  # weights may be an array, which has no one truth
class WholeWordMaskingCollator:
    """Collate rows into a batch whose words are masked as a whole.

    The defaults are those of the Hugging Face course: 20 % of words, always the mask token. Every
    row that has a word has at least one target, so that no batch has a NaN loss; rows of few words
    are therefore masked somewhat more often than `wwm_probability` says (at 20 %, one row of 10
    words in 9 gets its target that way, and one of 100 words in 5 billion). A word that holds an
    unknown token cannot be learned, and counts as none.

    With a `seed`, a mask depends on (seed, epoch, row) alone, wherever the row comes up. A row is
    its place in the dataset in `accelerate_train`, and its tokens in a loop that knows no places:
    there, equal rows of an epoch have one mask, and a corpus of recurring short texts is learned
    wrongly (a word in 10 % of a template is predicted with 0.13 to 1.00) unless `key_column` tells
    them apart. Call `set_epoch` before each epoch, or every epoch has the masks of epoch 0;
    DataLoader workers see it too, persistent ones included. `Trainer` does not call it (see the
    how-to page); ``seed=None`` needs neither.

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
            from a word's text, without white space, to its weight. 0 or more; only ratios within a
            row matter. A word of weight 0 is never a target, unless all words of its row weigh 0.
        seed: A seed of its own, or None to follow ``torch.manual_seed`` and `set_seed`: one number
            per batch is drawn from torch's global generator.
        key_column: A column that numbers or names the rows, and is not an input of the model. A
            mask then depends on it in place of the row's place or tokens. Rows of several documents
            may have one number per token, the document's, and have the masks that these documents
            have alone. The rows' numbers from 0 on give the masks of `accelerate_train`.
        pad_to_multiple_of: Pad rows to a multiple of this many tokens.
        return_tensors: ``"pt"`` or ``"np"``.

    Raises:
        ValueError: If the tokenizer has no mask token or an argument is out of range.
        TypeError: If the seed is not a whole number.

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
    key_column: str | None = None
    pad_to_multiple_of: int | None = None
    return_tensors: Literal["pt", "np"] = "pt"

    def __new__(cls, *_arguments: Any, **settings: Any) -> Self:
        """Name our setting where that of transformers' collators is passed."""
        if (rate := settings.get("mlm_probability")) is not None:
            raise TypeError(f"mlm_probability is {rate}, of tokens; pass wwm_probability, of words")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        sample_rates(self.wwm_probability)
        for name in ("mask_replace_prob", "random_replace_prob"):
            check_probability(name, getattr(self, name))
        # A hair of tolerance, since 0.9 + 0.1 need not be 1 in binary.
        if self.mask_replace_prob + self.random_replace_prob > 1 + 1e-9:
            raise ValueError(
                f"mask_replace_prob {self.mask_replace_prob} and random_replace_prob "
                f"{self.random_replace_prob} sum to more than 1; what is left of 1 is kept as it is"
            )
        _check_choice("budget", self.budget, ("bernoulli", "exact"))
        _check_choice("return_tensors", self.return_tensors, ("pt", "np"))
        if self.pad_to_multiple_of is not None:
            check_whole("pad_to_multiple_of", self.pad_to_multiple_of)
        if self.seed is not None:
            check_whole("seed", self.seed, least=None, error=TypeError)
        mask = getattr(self.tokenizer, "mask_token", None)
        # One that the vocabulary lacks has the id of the unknown token.
        if mask is None or mask not in self.tokenizer.get_vocab():
            raise ValueError(
                f"tokenizer {self.tokenizer!r:.60} has no mask token; use the tokenizer of a "
                "masked language model, or add one with tokenizer.add_special_tokens("
                "{'mask_token': '[MASK]'}) and model.resize_token_embeddings(len(tokenizer))"
            )
        # On the CPU, whatever the default device is.
        zero = torch.zeros((), dtype=torch.int64, device="cpu")
        self.__setstate__({"_epoch": zero, "_progress": zero.double()})

    def __copy__(self) -> Self:
        """Return a collator that has an epoch of its own, and shares tokenizer and weights."""
        return deepcopy(self, {id(part): part for part in (self.tokenizer, self.word_weights)})

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what `__setstate__` makes, so that equal collators have equal fingerprints."""
        names = [*(field.name for field in fields(self)), "_epoch", "_progress"]
        return {name: getattr(self, name) for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Make the look-up tables, and share epoch and progress with workers.

        A process that is forked or spawned with the collator shares them already.
        """
        self._epoch: torch.Tensor
        self._progress: torch.Tensor
        self.__dict__.update(state)
        self._epoch.share_memory_()
        self._progress.share_memory_()
        size = max(self.tokenizer.get_vocab().values()) + 1
        self._is_special = np.zeros(size, bool)
        self._is_special[list(special_token_ids(self.tokenizer))] = True
        self._pool = np.array(ordinary_token_ids(self.tokenizer), np.int64)
        self._mask_id: int = self.tokenizer.mask_token_id
        unknown = self.tokenizer.unk_token_id
        self._unknown_id: int = -1 if unknown is None else unknown
        if self.random_replace_prob and not self._pool.size:
            raise ValueError(
                f"random_replace_prob is {self.random_replace_prob}, but the tokenizer has no "
                "token to draw that is not special, added or unused; set it to 0"
            )
        source = self.word_weights
        self._weights = None if source is None else WordWeights(source, self.tokenizer, size)
        self._warned_of_length = self._warned_of_equals = False

    def __call__(
        self, features: Features, return_tensors: Literal["pt", "np"] | None = None
    ) -> dict[str, Any]:
        """Collate rows: ``input_ids``, ``attention_mask``, ``labels`` and the other model inputs.

        All have shape ``(batch, sequence)``; ``labels`` is -100 where nothing is to be predicted.
        Rows with masks frozen into them (``labels`` that differ from the tokens, or the prefix
        ``masked_``) are padded and otherwise left as they are, so that `Trainer` evaluates what was
        frozen; other ``labels`` are not used. The rows are not changed.

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
            UserWarning: If the words of a row are 32 tokens long or more on average. The log tells
                once if more than a hundredth of the rows are equal to others and have their masks.

        Examples:
            >>> from mlmadapt.testing import tiny_tokenizer
            >>> collator = WholeWordMaskingCollator(tiny_tokenizer(), wwm_probability=1.0)
            >>> rows = [{"input_ids": [2, 7, 3], "word_ids": [-1, 0, -1]}]
            >>> collator(rows, return_tensors="np")["labels"]
            array([[-100,    7, -100]])
        """
        return_tensors = return_tensors or self.return_tensors
        _check_choice("return_tensors", return_tensors, ("pt", "np"))
        if self.seed is not None:
            key: _Key = derive_key(self.seed, "mask", int(self._epoch))
        else:
            key = int(torch.randint(2**63 - 1, ()))
            if self.key_column is None:
                key = key_rows(key, range(len(features)))
        batch = self.collate(features, key=key, progress=float(self._progress))
        if return_tensors == "np":
            return dict(batch)
        tensors = {name: torch.from_numpy(array) for name, array in batch.items()}
        if "document_ids" in tensors:
            tensors["attention_mask"] = tensors["attention_mask"].as_subclass(PackedAttentionMask)
        return tensors

    def set_epoch(self, epoch: int) -> None:
        """Choose the masks of an epoch, as samplers choose their order.

        It holds in every process that has been forked or spawned with the collator, too.

        Args:
            epoch: A whole number in 64 bits; equal ones give equal masks.

        Raises:
            TypeError: If it is not a whole number.
            ValueError: If it needs more than 64 bits.

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
        check_whole("epoch", epoch, least=-(2**63), most=2**63 - 1, error=TypeError)
        self._epoch.fill_(int(epoch))

    def set_progress(self, progress: float) -> None:
        """Tell a schedule of rates how far the run is; own loops call it before each step.

        DataLoader workers collate ahead: the next ``num_workers * prefetch_factor`` batches (4 with
        2 workers) keep an earlier step's rate. Called once per epoch, before the loop, it is exact.

        Args:
            progress: Share of the run that is done, in [0, 1]: steps taken over all steps.

        Raises:
            ValueError: If it is not a share, or the rate there is none.

        Examples:
            >>> from mlmadapt.testing import tiny_tokenizer
            >>> rates = {0.0: 1.0, 0.5: 0.0}
            >>> collator = WholeWordMaskingCollator(tiny_tokenizer(), wwm_probability=rates, seed=0)
            >>> collator.set_progress(0.5)
            >>> collator([{"input_ids": [2, 7, 8, 9, 3], "word_ids": [-1, 0, 1, 2, -1]}])["labels"]
            tensor([[-100,    7, -100, -100, -100]])
        """
        rate_at(self.wwm_probability, progress)  # wrong ones are told here, not in a worker
        self._progress.fill_(float(progress))

    def collate(
        self, features: Features | JoinedRows, *, key: _Key, progress: float = 1.0
    ) -> dict[str, Ints]:
        """Collate rows into arrays whose masks depend on `key` and the row alone.

        Args:
            features: As for the call; or rows that are joined already, as `table_reader` reads
                them.
            key: In place of seed and epoch; 0 or more, below 2**64. Or a key per row, of shape
                ``(rows,)``, in place of `key_column` or tokens too.
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
        columns = features if isinstance(features, JoinedRows) else to_columns(features)
        masked, lengths = self.mask(columns, key=key, progress=progress)
        return pad_rows(masked, lengths, self.tokenizer, pad_to_multiple_of=self.pad_to_multiple_of)

    def mask(
        self,
        columns: Mapping[str, Any] | JoinedRows,
        *,
        key: _Key,
        progress: float = 1.0,
        key_column: str | None = None,
    ) -> JoinedRows:
        """Mask rows given as columns, without padding them; frozen ones are left as they are.

        Args:
            columns: Lists of rows by name, as a batch of `map` has them; or joined rows.
            key: As for `collate`.
            progress: As for `collate`.
            key_column: In place of the collator's own, for this call.

        Returns:
            Arrays of shape ``(tokens,)``, the rows end to end, and the rows' lengths in tokens.

        Raises:
            ValueError: As the call, if `key` is out of range, and if `key_column` is not there.
            TypeError: If `key`, or a value of `key_column`, is not a whole number; a name can be a
                string, too.

        Examples:
            >>> from mlmadapt.testing import tiny_tokenizer
            >>> columns = {"input_ids": [[2, 7, 3]], "word_ids": [[-1, 0, -1]]}
            >>> masked, lengths = WholeWordMaskingCollator(tiny_tokenizer()).mask(columns, key=0)
            >>> masked["input_ids"], lengths
            (array([2, 4, 3]), array([3]))
        """
        rate = rate_at(self.wwm_probability, progress)
        key_column = key_column or self.key_column
        if not isinstance(columns, JoinedRows) and _has_masks(columns):
            return join_frozen(columns)
        joined, key = _join(columns, key, key_column)
        masked, lengths = dict(joined.columns), joined.lengths
        tokens, words = masked["input_ids"], masked.pop("word_ids")
        self._check_ids(tokens, lengths)
        is_special = self._is_special.take(tokens)
        if "special_tokens_mask" in masked:
            is_special |= masked.pop("special_tokens_mask") != 0
        words = np.where(is_special, -1, words)
        rows = bounds = np.append(0, np.cumsum(lengths))
        if "document_ids" in masked:  # each is masked as if it had a row of its own
            bounds = document_bounds(masked["document_ids"], rows)
        numbers = masked.pop(key_column or "", None)
        if isinstance(key, int):
            if numbers is not None:  # one per token
                key = key_rows(key, numbers.take(bounds[:-1], mode="clip"))
        elif "document_ids" in masked:
            row = rows.searchsorted(bounds[:-1], side="right") - 1
            key = hash_counters(key[row], masked["document_ids"][bounds[:-1]])
        if "attention_mask" not in masked:
            masked["attention_mask"] = np.ones_like(tokens)
        is_real = masked["attention_mask"] != 0
        if is_real.all():
            targets, instead = self._choose_tokens(tokens, words, bounds, key, rate=rate)
        else:  # rows can come padded already; that is left out, so that it plays no part
            real = np.flatnonzero(is_real)
            targets, instead = self._choose_tokens(
                tokens[real], words[real], np.searchsorted(real, bounds), key, rate=rate
            )
            targets = real[targets]
        masked["input_ids"], masked["labels"] = tokens.copy(), np.full_like(tokens, -100)
        masked["input_ids"][targets] = instead
        masked["labels"][targets] = tokens[targets]
        return JoinedRows(masked, lengths)

    def _choose_tokens(
        self, tokens: Ints, words: Ints, bounds: Ints, key: _Key, *, rate: float
    ) -> tuple[Ints, Ints]:
        """Return which tokens are targets, and what stands there instead."""
        blocks, keyed = [], []
        for rows in split_blocks(bounds):
            start, end = bounds[rows.start], bounds[rows.stop]
            block, here = tokens[start:end], bounds[rows.start : rows.stop + 1] - start
            whole = find_words(words[start:end], here)
            self._warned_of_length = self._warned_of_length or warn_if_collapsed(whole)
            row_keys = hash_rows(block, here, key) if isinstance(key, int) else key[rows]
            words_in_row = np.diff(whole.before)
            keys = spread_keys(row_keys, words_in_row, step=2)
            is_unknown = block == self._unknown_id
            if is_unknown.any():
                whole, keys = leave_out(whole, keys, is_unknown, here)
            weights = None if self._weights is None else self._weights.weigh(block, whole)
            chosen, fate = choose_words(
                whole, keys, row_keys, weights, rate=rate, budget=self.budget
            )
            size = whole.size[chosen]
            targets = list_places(whole.first[chosen], size)
            instead = self._replace(block, targets, np.repeat(fate, size), here, row_keys)
            blocks.append((targets + start, instead))
            keyed.append((row_keys, words_in_row))
        if isinstance(key, int) and not self._warned_of_equals:
            self._warned_of_equals = warn_if_equal(keyed)
        targets, instead = map(np.concatenate, zip(*blocks, strict=True))
        return targets, instead

    def _replace(
        self, tokens: Ints, targets: Ints, fate: Floats, bounds: Ints, row_keys: Hashes
    ) -> Ints:
        """Return what stands in place of the targets, by the fate of each."""
        instead = tokens[targets]
        instead[fate < self.mask_replace_prob] = self._mask_id
        is_random = fate >= self.mask_replace_prob
        is_random &= fate < self.mask_replace_prob + self.random_replace_prob
        if is_random.any():
            replaced = targets[is_random]
            row = np.searchsorted(bounds, replaced, side="right") - 1
            draws = hash_counters(row_keys[row] ^ _REPLACEMENT, replaced - bounds[row])
            instead[is_random] = self._pool[draws % np.uint64(len(self._pool))]
        return instead

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


# What people and tools read is the signature of `__init__`, not of `__new__`.
_init = inspect.signature(WholeWordMaskingCollator.__init__)
WholeWordMaskingCollator.__signature__ = _init.replace(  # type: ignore[attr-defined]
    parameters=[*_init.parameters.values()][1:]
)

# Keeps the draws of replacements apart from those of words.
_REPLACEMENT = np.uint64(0x6A09E667F3BCC909)


def _has_masks(columns: Mapping[str, Any]) -> bool:
    """Tell whether rows are frozen, for which all are looked at unless the first one is a copy."""
    if "labels" not in columns:
        return "masked_labels" in columns
    labels, tokens = (next(iter(columns.get(name, ())), ()) for name in ("labels", "input_ids"))
    # An empty row is no copy, since it tells nothing of the others.
    is_copy = np.asarray(labels).size and np.array_equal(labels, tokens)
    # Without words, each token without a label tells.
    given = {"word_ids": columns.get("input_ids", ()), **columns}
    return "masked_labels" in columns or (not is_copy and are_frozen(given))


def _join(
    columns: Mapping[str, Any] | JoinedRows, key: _Key, key_column: str | None
) -> tuple[JoinedRows, _Key]:
    """Lay rows end to end, without the column that names them, which makes a key for each.

    Raises:
        ValueError: If there is no such column.
    """
    if not isinstance(key, np.ndarray):
        key = check_whole("key", key, least=0, most=2**64 - 1, error=TypeError)
    by_name = columns.columns if isinstance(columns, JoinedRows) else columns
    if key_column not in (None, *by_name):
        raise ValueError(
            f"key_column is {key_column!r}, the columns are {list(by_name)}; it must be one of "
            "them, with a number or a string per row, or a number per token; in Trainer, pass "
            "remove_unused_columns=False"
        )
    if isinstance(columns, JoinedRows):
        return columns, key
    check_words(columns)
    left_out = {"labels"}
    if key_column is not None and not np.ndim(next(iter(columns[key_column]), 0)):
        left_out.add(key_column)
        if isinstance(key, int):
            key = key_rows(key, columns[key_column])
    return join_rows({name: columns[name] for name in columns if name not in left_out}), key


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(map(repr, choices))}")
