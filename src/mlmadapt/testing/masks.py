"""Assertions about masks, for tests of any library's collators.

They look at what a collator returns, never at how it is made. A row is recognized by its own
tokens, which stand in the labels where they no longer stand in the inputs. So any library's batch
will do: padded on either side, of tensors, arrays or lists.
"""
# ruff: noqa: PLC0415 (numpy and torch are loaded by the functions that need them)

from __future__ import annotations

import copy
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    import numpy as np
    import numpy.typing as npt
    from transformers import PreTrainedTokenizerBase

    from mlmadapt._types import Features


def assert_whole_words_masked(
    batch: Mapping[str, Any],
    features: Features,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> None:
    """Assert that each word of a batch is to be predicted as a whole or not at all.

    Besides, labels must be the row's own tokens, all else must be unchanged, special tokens and
    padding must never be targets, and some word must be one. A word is a run of tokens with one
    word id; units of several words pass too. By chance, a collator may mask only whole words of a
    few rows: pass rows with some dozens of words of several tokens.

    Args:
        batch: What a collator made of `features`, in their order: ``input_ids`` and ``labels``
            (-100 where nothing is to be predicted) of shape ``(batch, sequence)``, as tensors,
            arrays or lists.
        features: The rows as the collator got them, with ``input_ids`` and ``word_ids`` (None, NaN
            or -1 for a token that belongs to no word).
        tokenizer: Names tokens and words in messages and tells special tokens. A target word must
            then be hidden behind the mask token as a whole too, or not at all: 80/10/10 by token,
            as in BERT's own code, leaves words half visible. To allow that, leave it out.

    Raises:
        AssertionError: With row, position in the batch, token and word of the first fault.
        ValueError: If `features` are not rows with ``input_ids`` and ``word_ids``.

    Examples:
        >>> features = [{"input_ids": [2, 7, 8, 9, 3], "word_ids": [None, 0, 0, 1, None]}]
        >>> batch = {"input_ids": [[2, 4, 4, 9, 3]], "labels": [[-100, 7, 8, -100, -100]]}
        >>> assert_whole_words_masked(batch, features)
        >>> batch = {"input_ids": [[2, 4, 8, 9, 3]], "labels": [[-100, 7, -100, -100, -100]]}
        >>> assert_whole_words_masked(batch, features)
        Traceback (most recent call last):
        AssertionError: row 0: the word [7, 8] (positions 1 to 2) is masked in part: position 2, \
token 8, is not a target
    """
    __tracebackhide__ = True
    import numpy as np

    from mlmadapt.data.tokenization import special_token_ids

    special = [] if tokenizer is None else list(special_token_ids(tokenizer))
    word_rows = _column_of(features, "word_ids")
    rows = list(_find_rows(batch, features, tokenizer, numbers=range(len(features))))
    for row, words in zip(rows, word_rows, strict=True):
        words[np.isin(row.tokens, special)] = -1
        is_target = row.labels != -100
        for word, group in groupby(range(len(words)), key=words.tolist().__getitem__):
            run = np.array(list(group))
            if not is_target[run].any():
                continue
            spot = run[is_target[run].argmin() if word >= 0 else is_target[run].argmax()]
            where = f"position {row.start + spot}, {name_token(row.tokens[spot], tokenizer)},"
            if word < 0:
                raise AssertionError(
                    f"row {row.number}: {where} belongs to no word, but is a target"
                )
            about = (
                f"row {row.number}: {_name_word(row.tokens[run], tokenizer)} (positions "
                f"{row.start + run[0]} to {row.start + run[-1]})"
            )
            if not is_target[run].all():
                raise AssertionError(f"{about} is masked in part: {where} is not a target")
            is_hidden = row.inputs[run] == getattr(tokenizer, "mask_token_id", None)
            if is_hidden.any() and not is_hidden.all():
                spot = run[is_hidden.argmin()]
                raise AssertionError(
                    f"{about} is hidden in part: position {row.start + spot} of the input is "
                    f"{name_token(row.inputs[spot], tokenizer)}, not the mask token"
                )
    _assert_some_target(rows)


def assert_masks_reproducible(
    collator: Callable[[Any], Mapping[str, Any]],
    features: Features,
    *,
    num_workers: int = 0,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> None:
    """Assert that a mask depends on its row alone, in the epoch that the collator is in.

    The rows are collated together, again with other seeds in all global generators, in reverse
    order, each alone, by a copy of the collator and, if asked for, in worker processes. All must
    give the same inputs and labels, and leave the rows as they were. Global random state is put
    back.

    Args:
        collator: Takes a list of rows and returns a batch as `assert_whole_words_masked` takes it.
            A collator that draws its masks fails, ours without a ``seed`` included.
        features: Rows as `collator` wants them. With a single row, nothing shows whether its mask
            depends on other rows.
        num_workers: Worker processes of a `DataLoader` to collate in too.
        tokenizer: Names tokens in messages.

    Raises:
        AssertionError: With row, position in the row and token of the first difference; if nothing
            is masked, or the collator changes the rows.
        ValueError: If `features` are not rows with ``input_ids``.

    Examples:
        >>> def hide_one(features, place=0):
        ...     inputs = [list(row["input_ids"]) for row in features]
        ...     labels = [[-100] * len(row) for row in inputs]
        ...     for row, target in zip(inputs, labels):
        ...         row[place], target[place] = 4, row[place]
        ...     return {"input_ids": inputs, "labels": labels}
        >>> rows = [{"input_ids": [7, 8]}, {"input_ids": [6, 9]}]
        >>> assert_masks_reproducible(hide_one, rows)
        >>> assert_masks_reproducible(lambda rows: hide_one(rows, place=len(rows) - 1), rows)
        Traceback (most recent call last):
        AssertionError: row 0, position 0, token 7: input 7 and label -100 at first, input 4 and \
label 7 as a batch of its own; a mask must depend on seed, epoch and the row's tokens alone
    """
    __tracebackhide__ = True
    import torch

    from mlmadapt.masking.frozen_masks import seeded

    features = [dict(row) for row in features]

    def collate_by_copy(rows: Any) -> Any:
        return copy.deepcopy(collator)(rows)

    def collate_in_workers(rows: Any) -> Any:
        loader = torch.utils.data.DataLoader
        return next(iter(loader(rows, len(rows), collate_fn=collator, num_workers=num_workers)))

    def collate(by: Callable[[Any], Any], numbers: Sequence[int]) -> list[_FoundRow]:
        __tracebackhide__ = True
        copies = copy.deepcopy([features[number] for number in numbers])
        batch = by(copies)
        for number, row in zip(numbers, copies, strict=True):
            _assert_unchanged(number, features[number], row)
        rows = [features[number] for number in numbers]
        return list(_find_rows(batch, rows, tokenizer, numbers=numbers))

    every = range(len(features))
    ways = [
        ("in a second call", collator, every),
        ("in reverse order", collator, every[::-1]),
        *(("as a batch of its own", collator, [number]) for number in every),
        ("by a copy of the collator", collate_by_copy, every),
        *([("in a worker", collate_in_workers, every)] if num_workers else []),
    ]
    with seeded(0):
        first = collate(collator, every)
    _assert_some_target(first)
    for key, (way, by, numbers) in enumerate(ways, start=1):
        with seeded(key):
            rows = collate(by, numbers)
        for row in rows:
            before = first[row.number]
            differ = (row.inputs != before.inputs) | (row.labels != before.labels)
            if differ.any():
                at = int(differ.argmax())
                raise AssertionError(
                    f"row {row.number}, position {at}, {name_token(row.tokens[at], tokenizer)}: "
                    f"input {before.inputs[at]} and label {before.labels[at]} at first, input "
                    f"{row.inputs[at]} and label {row.labels[at]} {way}; a mask must depend on "
                    "seed, epoch and the row's tokens alone"
                )


def _assert_some_target(rows: Sequence[_FoundRow]) -> None:
    __tracebackhide__ = True
    if not any((row.labels != -100).any() for row in rows):
        raise AssertionError("no token of the batch is a target: nothing is masked")


def _assert_unchanged(number: int, before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    __tracebackhide__ = True
    for name in before.keys() | after.keys():
        # As text, in which NaN is equal to NaN.
        ours, theirs = (repr(_to_array(row.get(name)).tolist()) for row in (before, after))
        if ours != theirs:
            raise AssertionError(f"row {number}: the collator changes {name!r} of its own input")


_CHANGED = "is not a target, but now"


class _FoundRow(NamedTuple):
    """A row as it stands in a batch, padding left out; arrays of shape ``(tokens,)``.

    Attributes:
        number: Number of the row in the features.
        start: Position of its first token in the batch.
        tokens: Its tokens in the features.
        inputs: What stands in their place in the batch.
        labels: -100 where nothing is to be predicted.
    """

    number: int
    start: int
    tokens: npt.NDArray[np.int64]
    inputs: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]


def _find_rows(
    batch: Mapping[str, Any],
    features: Features,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    numbers: Sequence[int],
) -> Iterator[_FoundRow]:
    """Yield each row, and assert that its labels are its tokens and that the rest is unchanged."""
    __tracebackhide__ = True
    import numpy as np

    for name in ("input_ids", "labels"):
        if name not in batch:
            raise AssertionError(f"the batch has no {name!r}, only {list(batch)}")
        if len(batch[name]) != len(numbers):
            raise AssertionError(
                f"the batch has {len(batch[name])} rows of {name!r} for {len(numbers)} features"
            )
    for place, tokens in enumerate(_column_of(features, "input_ids")):
        about = f"row {numbers[place]}"
        inputs, labels = (_to_array(batch[name][place]) for name in ("input_ids", "labels"))
        room, is_target = len(inputs) - len(tokens), labels != -100
        if room < 0 or len(labels) != len(inputs):
            raise AssertionError(
                f"{about} has {len(tokens)} tokens in features, but {len(inputs)} input_ids and "
                f"{len(labels)} labels in the batch"
            )
        # Padding may be on the right or on the left: on the side that leaves less wrong.
        fits = []
        for start in (0, room):
            expected = np.full(len(inputs), -1)
            expected[start : start + len(tokens)] = tokens
            changed = (expected >= 0) & (inputs != expected)
            wrong = np.where(is_target, labels != expected, changed)
            fits.append((int(wrong.sum()), start, wrong, expected))
        _, start, wrong, expected = min(fits, key=lambda fit: fit[:2])
        if wrong.any():
            spot = int(wrong.argmax())
            token = name_token(expected[spot], tokenizer) if expected[spot] >= 0 else "padding"
            has, values = ("has the label", labels) if is_target[spot] else (_CHANGED, inputs)
            now = name_token(values[spot], tokenizer)
            raise AssertionError(f"{about}, position {spot}: {token} {has} {now}")
        window = slice(start, start + len(tokens))
        yield _FoundRow(numbers[place], start, tokens, inputs[window], labels[window])


def _column_of(features: Features, name: str) -> list[npt.NDArray[np.int64]]:
    """Return a token column of the rows as arrays of their own, None and NaN as -1.

    Raises:
        ValueError: If a row lacks it, or does not have one number per token.
    """
    from mlmadapt.data.rows import join_rows, split_rows

    for number, row in enumerate(features):
        for needed in ("input_ids", name):
            if needed not in row:
                raise ValueError(
                    f"row {number} of features has no {needed!r}, only {list(row)}; give the rows "
                    "as a collator gets them, as copies if it takes columns out"
                )
    columns = {needed: [row[needed] for row in features] for needed in ("input_ids", name)}
    joined, lengths = join_rows(columns)
    return [row.copy() for row in split_rows(joined[name], lengths)]


def _to_array(values: Any) -> npt.NDArray[Any]:
    """Return a tensor of any device, an array or a list as an array."""
    import numpy as np

    return np.asarray(values.detach().cpu() if hasattr(values, "detach") else values)


def name_token(token: int, tokenizer: PreTrainedTokenizerBase | None) -> str:
    """Say which token it is."""
    text = "" if tokenizer is None else f" ({tokenizer.convert_ids_to_tokens(int(token))!r})"
    return f"token {token}{text}"


def _name_word(tokens: npt.NDArray[np.int64], tokenizer: PreTrainedTokenizerBase | None) -> str:
    """Say which word it is."""
    if tokenizer is None:
        return f"the word {tokens.tolist()}"
    return f"the word {str(tokenizer.decode(tokens.tolist())).strip()!r}"
