"""Rows of features, found again in the batch that a collator made of them.

A row is recognized by its own tokens, which stand in the labels where they no longer stand in the
inputs. So any library's batch will do: padded on either side, of tensors, arrays or lists.
"""
# ruff: noqa: PLC0415 (numpy is loaded by the functions that need it)

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import numpy as np
    import numpy.typing as npt
    from transformers import PreTrainedTokenizerBase

    from mlmadapt._types import Features


class FoundRow(NamedTuple):
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


def find_rows(
    batch: Mapping[str, Any],
    features: Features,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    numbers: Sequence[int],
) -> Iterator[FoundRow]:
    """Yield each row, and assert that its labels are its tokens and that the rest is unchanged.

    Examples:
        >>> batch = {"input_ids": [[0, 7, 4]], "labels": [[-100, -100, 8]]}
        >>> [row] = find_rows(batch, [{"input_ids": [7, 8]}], None, numbers=[0])
        >>> row.start, row.labels.tolist()
        (1, [-100, 8])
    """
    __tracebackhide__ = True
    import numpy as np

    for name in ("input_ids", "labels"):
        if name not in batch:
            raise AssertionError(f"the batch has no {name!r}, only {list(batch)}")
        if len(batch[name]) != len(numbers):
            raise AssertionError(
                f"the batch has {len(batch[name])} rows of {name!r} for {len(numbers)} features"
            )
    for place, tokens in enumerate(column_of(features, "input_ids")):
        about = f"row {numbers[place]}"
        inputs, labels = (to_array(batch[name][place]) for name in ("input_ids", "labels"))
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
            seen = name_token((labels if is_target[spot] else inputs)[spot], tokenizer)
            fault = (
                f"has the label {seen}" if is_target[spot] else f"is not a target, but now {seen}"
            )
            raise AssertionError(f"{about}, position {spot}: {token} {fault}")
        window = slice(start, start + len(tokens))
        yield FoundRow(numbers[place], start, tokens, inputs[window], labels[window])


def column_of(features: Features, name: str) -> list[npt.NDArray[np.int64]]:
    """Return a token column of the rows as arrays of their own, None and NaN as -1.

    Raises:
        ValueError: If a row lacks it, or does not have one number per token.

    Examples:
        >>> column_of([{"input_ids": [7, 8], "word_ids": [None, 0]}], "word_ids")
        [array([-1,  0])]
    """
    from mlmadapt.data.rows import join_rows, split_rows

    for number, row in enumerate(features):
        for needed in ("input_ids", name):
            if needed not in row:
                raise ValueError(
                    f"row {number} of features has no {needed!r}, only {list(row)}; give the rows "
                    "as a collator gets them, as copies if it takes columns out"
                )
    columns = {each: [row[each] for row in features] for each in ("input_ids", name)}
    joined, lengths = join_rows(columns)
    return [row.copy() for row in split_rows(joined[name], lengths)]


def to_array(values: Any) -> npt.NDArray[Any]:
    """Return a tensor of any device, an array or a list as an array.

    Examples:
        >>> to_array([7, 8])
        array([7, 8])
    """
    import numpy as np

    return np.asarray(values.detach().cpu() if hasattr(values, "detach") else values)


def name_token(token: int, tokenizer: PreTrainedTokenizerBase | None) -> str:
    """Say which token it is.

    Examples:
        >>> from mlmadapt.testing import tiny_tokenizer
        >>> name_token(7, None), name_token(7, tiny_tokenizer())
        ('token 7', "token 7 ('&')")
    """
    text = "" if tokenizer is None else f" ({tokenizer.convert_ids_to_tokens(int(token))!r})"
    return f"token {token}{text}"


def name_word(tokens: npt.NDArray[np.int64], tokenizer: PreTrainedTokenizerBase | None) -> str:
    """Say which word it is.

    Examples:
        >>> import numpy as np
        >>> name_word(np.array([7, 8]), None)
        'the word [7, 8]'
    """
    if tokenizer is None:
        return f"the word {tokens.tolist()}"
    return f"the word {str(tokenizer.decode(tokens.tolist())).strip()!r}"
