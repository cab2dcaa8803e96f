"""The masking of the recipe (chapter 7.3 of the Hugging Face course), to measure against.

With its faults: rows are changed in place, NumPy's global generator is moved, rows have to be of
one length, and word 0 of a document that follows one of a single word is taken for the same word.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import default_data_collator

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedTokenizerBase


def whole_word_masking(
    features: list[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    wwm_probability: float = 0.2,
) -> dict[str, Any]:
    """Mask words of rows of equal length, in place, and stack them."""
    for feature in features:
        # The places of each word, numbered as they come; None is a special token.
        places = defaultdict(list)
        number, current = -1, None
        for place, word_id in enumerate(feature.pop("word_ids")):
            if word_id is None:
                continue
            if word_id != current:
                current = word_id
                number += 1
            places[number].append(place)

        is_chosen = np.random.binomial(1, wwm_probability, (len(places),))  # noqa: NPY002 (as it does)
        input_ids, labels = feature["input_ids"], feature["labels"]
        new_labels = [-100] * len(labels)
        for word in np.where(is_chosen)[0]:
            for place in places[word.item()]:
                new_labels[place] = labels[place]
                input_ids[place] = tokenizer.mask_token_id
        feature["labels"] = new_labels
    return default_data_collator(features)


def insert_random_mask(
    examples: dict[str, list[Any]], data_collator: Callable[[list[dict[str, Any]]], dict[str, Any]]
) -> dict[str, Any]:
    """Mask a batch of `map` by a collator."""
    columns = zip(*examples.values(), strict=True)
    rows = [dict(zip(examples, values, strict=True)) for values in columns]
    return {f"masked_{name}": column.numpy() for name, column in data_collator(rows).items()}
