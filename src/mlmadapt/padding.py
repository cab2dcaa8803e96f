"""Rows of any length to arrays of one shape, without a token looked at in Python.

``tokenizer.pad`` knows the tokenizer's own columns only (``labels`` and ``word_ids`` crash it), and
builds lists first.
"""

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Features = Sequence[Mapping[str, Any]]


def pad_features(
    features: Features,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    pad_to_multiple_of: int | None = None,
) -> dict[str, npt.NDArray[np.int64]]:
    """Stack the token columns of `features` into arrays of shape ``(batch, sequence)``.

    Padding goes to the tokenizer's side: its padding token into ``input_ids``, -100 into ``labels``,
    -1 into ``word_ids``, 0 into all else. An ``attention_mask`` is made where there is none.

    Args:
        features: Rows of columns: lists, arrays or tensors of one number a token. ``word_ids`` may
            hold None.
        tokenizer: Gives the padding token and side.
        pad_to_multiple_of: Make ``sequence`` a multiple of this, in tokens.

    Raises:
        ValueError: If there are no features, they differ in columns, a column is not one number a
            token, or padding is needed and the tokenizer has no padding token.

    Examples:
        >>> from mlmadapt.testing import tiny_tokenizer
        >>> batch = pad_features([{"input_ids": [7, 8]}, {"input_ids": [9]}], tiny_tokenizer())
        >>> batch["attention_mask"]
        array([[1, 1],
               [1, 0]])
    """
    if not features:
        message = "features is empty; a batch needs at least one row"
        raise ValueError(message)
    names = list(features[0])
    if "input_ids" not in names:
        message = f"feature 0 has no 'input_ids', only {names}; tokenize the documents first"
        raise ValueError(message)
    for row, feature in enumerate(features):
        if feature.keys() != features[0].keys():
            message = (
                f"feature {row} has columns {list(feature)}, feature 0 has {names}; all rows of a "
                "batch must have the same columns"
            )
            raise ValueError(message)
    lengths = np.fromiter((len(feature["input_ids"]) for feature in features), np.int64, len(features))
    width = int(lengths.max())
    if pad_to_multiple_of:
        width += -width % pad_to_multiple_of
    places = np.arange(width)
    if tokenizer.padding_side == "left":
        is_filled = places >= width - lengths[:, None]
    else:
        is_filled = places < lengths[:, None]
    fills = {"labels": -100, "word_ids": -1, "token_type_ids": tokenizer.pad_token_type_id}
    if not is_filled.all():
        if tokenizer.pad_token_id is None:
            message = (
                f"rows have {lengths.min()} to {width} tokens, but the tokenizer has no padding "
                "token; set tokenizer.pad_token"
            )
            raise ValueError(message)
        fills["input_ids"] = tokenizer.pad_token_id

    batch = {}
    for name in names:
        flat = _flatten(name, [feature[name] for feature in features], lengths)
        if is_filled.all():
            batch[name] = flat.reshape(is_filled.shape)
        else:
            batch[name] = np.full(is_filled.shape, fills.get(name, 0), np.int64)
            batch[name][is_filled] = flat
    if "attention_mask" not in batch:
        batch["attention_mask"] = is_filled.astype(np.int64)
    return batch


def _flatten(name: str, rows: list[Any], lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    row_lengths = [len(row) if hasattr(row, "__len__") else None for row in rows]
    for row, length in enumerate(row_lengths):
        if length != lengths[row] or isinstance(rows[row], str):
            seen = "no length" if length is None else f"length {length}"
            message = (
                f"column {name!r} of feature {row} has {seen}, 'input_ids' has {lengths[row]}; each "
                f"column must hold one number a token. Remove {name!r} from the dataset if it is not "
                "an input of the model"
            )
            raise ValueError(message)
    try:
        if all(isinstance(row, list) for row in rows):
            return np.fromiter(chain.from_iterable(rows), np.int64, int(lengths.sum()))
        return np.concatenate([np.asarray(row) for row in rows]).astype(np.int64, casting="same_kind")
    except TypeError as error:
        if name == "word_ids":
            rows = [[-1 if word is None else word for word in row] for row in rows]
            return np.fromiter(chain.from_iterable(rows), np.int64, int(lengths.sum()))
        message = (
            f"column {name!r} does not hold one whole number a token ({error}); remove it from the "
            "dataset if it is not an input of the model"
        )
        raise ValueError(message) from None
