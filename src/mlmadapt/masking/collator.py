"""Whole-word masks that depend on nothing but the example.

A mask is a hash, not a draw: each row's tokens give a key, the key and a word's place in the row
give the numbers that decide about the word. Nothing is remembered between calls, so batch size,
order, padding, workers, processes and an interruption cannot change a mask. All rows of a batch are
hashed at once, laid end to end, in time and memory linear in their tokens. A batch whose rows hold
several documents has an attention mask that a model cannot take for an ordinary one.

The hash is splitmix64's finaliser over a counter (Steele, Lea and Flood, OOPSLA 2014), the scheme
of counter-based generators (Salmon et al., SC 2011).
"""

import logging
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import KW_ONLY, dataclass, fields
from typing import Any, Literal, Self, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from mlmadapt._types import Features, Floats, Hashes, Ints, Rows, Tokenizer
from mlmadapt.data.frozen import are_frozen, join_frozen, starts_as_copy
from mlmadapt.data.rows import (
    JoinedRows,
    check_whole,
    check_words,
    document_bounds,
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
    leave_out,
    list_places,
    split_blocks,
    spread_keys,
    warn_if_collapsed,
)

logger = logging.getLogger(__name__)

_Key: TypeAlias = int | Hashes


@dataclass(eq=False)  # weights may be an array, which has no one truth
class WholeWordMaskingCollator:
    """Collate rows into a batch whose words are masked as a whole.

    The defaults are those of the Hugging Face course: 20 % of words, always the mask token. Every
    row that has a word has at least one target, so that no batch has a NaN loss; rows of few words
    are therefore masked somewhat more often than `wwm_probability` says (at 20 %, one row of 10
    words in 9 gets its target that way, and one of 100 words in 5 billion). A word that holds an
    unknown token cannot be learned, and counts as none.

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
            from a word's text, without white space, to its weight. 0 or more; only ratios within a
            row matter. A word of weight 0 is never a target, unless all words of its row weigh 0.
        seed: A seed of its own, or None to follow ``torch.manual_seed`` and `set_seed`: one number
            per batch is drawn from torch's global generator.
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
    pad_to_multiple_of: int | None = None
    return_tensors: Literal["pt", "np"] = "pt"

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
        mask_id = getattr(self.tokenizer, "mask_token_id", None)
        mask = None if mask_id is None else self.tokenizer.convert_ids_to_tokens(mask_id)
        # A token that the vocabulary lacks has the id of the unknown token.
        if mask is None or mask != self.tokenizer.mask_token:
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
        self._weights = None
        if self.word_weights is not None:
            self._weights = WordWeights(self.word_weights, self.tokenizer, size)
        self._warned: bool = False

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
            ValueError: If there are no rows, they differ in columns, masks are frozen into some of
                them only, a row has no ``word_ids``, a column does not hold one whole number per
                token, a token id is outside the vocabulary, `word_weights` returns no weight, or
                padding is needed and the tokenizer has no padding token.
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
            key = derive_key(self.seed, "mask", int(self._epoch))
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
        self, features: Features | JoinedRows, *, key: int, progress: float = 1.0
    ) -> dict[str, Ints]:
        """Collate rows into arrays whose masks depend on (`key`, tokens of the row) alone.

        Args:
            features: As for the call; or rows that are joined already, as `table_reader` reads
                them.
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
        columns = features if isinstance(features, JoinedRows) else to_columns(features)
        masked, lengths = self.mask(columns, key=key, progress=progress)
        return pad_rows(masked, lengths, self.tokenizer, pad_to_multiple_of=self.pad_to_multiple_of)

    def mask(
        self, columns: Mapping[str, Any] | JoinedRows, *, key: _Key, progress: float = 1.0
    ) -> JoinedRows:
        """Mask rows given as columns, without padding them; frozen ones are left as they are.

        Args:
            columns: Lists of rows by name, as a batch of `map` has them; or joined rows.
            key: As for `collate`; or a key per row, of shape ``(rows,)``, in place of its tokens.
            progress: As for `collate`.

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
            key = check_whole("key", key, least=0, most=2**64 - 1, error=TypeError)
        rate = rate_at(self.wwm_probability, progress)
        if not isinstance(columns, JoinedRows):
            # Without words, rows are frozen or wrong, and each token without a label tells.
            given = {"word_ids": columns.get("input_ids"), **columns}
            starts_whole = starts_as_copy(columns)
            if not starts_whole and are_frozen("the batch", given):
                return join_frozen(columns)
            check_words(columns)
            columns = join_rows({name: columns[name] for name in columns if name != "labels"})
            # To look at all rows takes a tenth of the time, and masks show that it is needed.
            has_masks = starts_whole and (columns.columns["input_ids"] == self._mask_id).any()
            if has_masks and are_frozen("the batch", given):
                return join_frozen(given)
        masked, lengths = dict(columns.columns), columns.lengths
        tokens, words = masked["input_ids"], masked.pop("word_ids")
        self._check_ids(tokens, lengths)
        is_special = self._is_special.take(tokens)
        if "special_tokens_mask" in masked:
            is_special |= masked.pop("special_tokens_mask") != 0
        words = np.where(is_special, -1, words)
        bounds = np.append(0, np.cumsum(lengths))
        if "document_ids" in masked:  # each is masked as if it had a row of its own
            bounds = document_bounds(masked["document_ids"], bounds)
        is_real = masked.setdefault("attention_mask", np.ones_like(tokens)) != 0
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
        blocks = []
        for rows in split_blocks(bounds):
            start, end = bounds[rows.start], bounds[rows.stop]
            block, here = tokens[start:end], bounds[rows.start : rows.stop + 1] - start
            whole = find_words(words[start:end], here)
            self._warned = self._warned or warn_if_collapsed(whole)
            row_keys = hash_rows(block, here, key) if isinstance(key, int) else key[rows]
            keys = spread_keys(row_keys, np.diff(whole.before), step=2)
            whole, keys = leave_out(whole, keys, block == self._unknown_id, here)
            weights = None
            if self._weights is not None:
                weights = self._weights.weigh(block[list_places(whole.first, whole.size)], whole)
            chosen, fate = choose_words(
                whole, keys, row_keys, weights, rate=rate, budget=self.budget
            )
            size = whole.size[chosen]
            targets = list_places(whole.first[chosen], size)
            instead = self._replace(block, targets, np.repeat(fate, size), here, row_keys)
            blocks.append((targets + start, instead))
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


def warn_of_unknown(rows: Rows, tokenizer: Tokenizer) -> None:
    """Tell what share of words the tokenizer does not know, where it is above 1 %.

    Up to 1,000 rows are read, spread over all.
    """
    places = np.linspace(0, len(rows) - 1, min(len(rows), 1000)).astype(int).tolist()
    columns = to_columns([rows[place] for place in places])
    unknown_id: int | None = tokenizer.unk_token_id
    if unknown_id is None or not {"input_ids", "word_ids"} <= columns.keys():
        return
    joined, lengths = join_rows({name: columns[name] for name in ("input_ids", "word_ids")})
    bounds = np.append(0, np.cumsum(lengths))
    words, is_unknown = find_words(joined["word_ids"], bounds), joined["input_ids"] == unknown_id
    known, _ = leave_out(words, np.empty(len(words.first), np.uint64), is_unknown, bounds)
    share = 1 - len(known.first) / max(len(words.first), 1)
    if share > 0.01:
        message = (
            "%.0f %% of the words of train_dataset hold %s, which stands for what the tokenizer "
            "does not know; they are not predicted. Use a tokenizer and model of this language, or "
            "add frequent words by extend_vocabulary"
        )
        logger.warning(message, 100 * share, tokenizer.unk_token)


# Keeps the draws of replacements apart from those of words.
_REPLACEMENT = np.uint64(0x6A09E667F3BCC909)


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(map(repr, choices))}")


class PackedAttentionMask(torch.Tensor):
    """An attention mask that can be moved and read, and that raises where a model computes with it.

    Whatever is still made of whole numbers is the mask moved, cut or joined, or a count. A model
    computes with fractions or flags, so what is made of those raises, wherever it comes from; only
    what comes of a comparison is ordinary flags.

    `isolate_documents` takes it out before the model sees it;
    ``mask.as_subclass(torch.Tensor)`` makes an ordinary one of it.

    Examples:
        >>> mask = torch.ones(1, 4, dtype=torch.int64).as_subclass(PackedAttentionMask)
        >>> mask.to("cpu").sum().item()
        4
        >>> 1.0 - mask
        Traceback (most recent call last):
            ...
        ValueError: rows of the batch hold several documents ('document_ids'), which this model ...
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        """Copy it; torch's own way is not for subclasses."""
        return self.clone()

    @classmethod
    def __torch_function__(
        cls,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Refuse what makes fractions or flags of a mask, and let all else pass.

        Raises:
            ValueError: If a model without `isolate_documents` uses the mask.
        """
        result = super().__torch_function__(func, types, args, kwargs)  # type: ignore[no-untyped-call]
        if not isinstance(result, torch.Tensor) or result.dtype == torch.int64:
            return result
        if func.__name__.strip("_") in ("eq", "ne", "isclose"):
            return result.as_subclass(torch.Tensor)
        raise ValueError(
            "rows of the batch hold several documents ('document_ids'), which this model would let "
            "see each other; call isolate_documents(model) before the loop, or remove the column "
            "'document_ids' if documents are to be joined"
        )
