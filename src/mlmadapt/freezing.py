"""Masks frozen into the rows of an evaluation set, so that every evaluation sees the same ones.

Perplexity under fresh masks moves by whole points from run to run. The recipe masks once, but from the
global generator: its frozen set depends on the batch size of `map`, on what was drawn before, and
a second seed gets the first one's rows out of `map`'s cache. Here a row's mask depends on the seed and the
row.
"""

from collections.abc import Callable, Mapping
from copy import copy
from functools import partial
from typing import Any

import numpy as np

from mlmadapt.masking import WholeWordMaskingCollator
from mlmadapt.seeding import derive_key, seeded

DataCollator = Callable[[list[dict[str, Any]]], Mapping[str, Any]]


def insert_random_mask(
    examples: Mapping[str, Any], data_collator: DataCollator, *, seed: int = 0, prefix: str = "masked_"
) -> dict[str, list[Any]]:
    """Mask a batch of rows once and for all.

    For ``dataset.map(insert_random_mask, batched=True, fn_kwargs={"data_collator": collator},
    remove_columns=dataset.column_names)``; without `remove_columns`, `map` keeps ``word_ids`` beside the
    new columns. `seed` takes the place of the collator's own seed and epoch, and is part of
    `map`'s fingerprint, so that another seed is never served old rows.

    Args:
        examples: A batch of rows: a dict of lists.
        data_collator: `WholeWordMaskingCollator`, or another library's. That one is called row by
            row (about 0.3 ms each) with the global generators seeded from (seed, row), and they are
            restored.
        seed: Seed of the masks.
        prefix: Put before the names of the new columns; ``""`` keeps the names.

    Returns:
        The model's inputs and ``labels``, each a list of arrays of shape ``(sequence,)``.

    Raises:
        ValueError: If the collator returns no ``labels`` or rows of another length, and as the
            collator does.

    Examples:
        >>> from mlmadapt import tokenize_with_word_ids
        >>> from mlmadapt.testing import tiny_tokenizer
        >>> tokenizer = tiny_tokenizer("wordpiece")
        >>> rows = tokenize_with_word_ids({"text": ["a film"]}, tokenizer)
        >>> frozen = insert_random_mask(rows, WholeWordMaskingCollator(tokenizer), prefix="")
        >>> sorted(frozen)
        ['attention_mask', 'input_ids', 'labels', 'token_type_ids']
    """
    names = list(examples)
    rows = [
        dict(zip(names, values, strict=True))
        for values in zip(*(examples[name] for name in names), strict=True)
    ]
    if not rows:
        return {}
    if isinstance(data_collator, WholeWordMaskingCollator):
        frozen = _freeze_at_once(rows, data_collator, seed)
    else:
        frozen = _freeze_row_by_row(rows, data_collator, seed)
    return {prefix + name: column for name, column in frozen.items()}


def purify(data_collator: DataCollator) -> DataCollator:
    """Return a collator without random state of its own, so that `seeded` decides what it draws.

    transformers' collators keep a generator once they have a seed; and they fail on ``word_ids``,
    and on ``labels`` of unequal length, both of which they would not use.
    """
    from transformers import DataCollatorForLanguageModeling  # noqa: PLC0415  # a second to load

    if not isinstance(data_collator, DataCollatorForLanguageModeling):
        return data_collator
    stateless = copy(data_collator)
    stateless.seed = None
    stateless.generator = None
    return partial(_call_without_extras, data_collator=stateless)


def _call_without_extras(rows: list[dict[str, Any]], *, data_collator: DataCollator) -> Any:
    return data_collator(
        [{name: row[name] for name in row if name not in ("labels", "word_ids")} for row in rows]
    )


def _freeze_at_once(
    rows: list[dict[str, Any]], collator: WholeWordMaskingCollator, seed: int
) -> dict[str, list[Any]]:
    lengths = [len(row["input_ids"]) for row in rows]
    batch = collator.collate(rows, key=derive_key(seed, "frozen"))
    if collator.tokenizer.padding_side == "left":
        return {name: [row[-n:] if n else row[:0] for row, n in zip(array, lengths, strict=True)] for name, array in batch.items()}
    return {
        name: [row[:n] for row, n in zip(array, lengths, strict=True)] for name, array in batch.items()
    }


def _freeze_row_by_row(
    rows: list[dict[str, Any]], data_collator: DataCollator, seed: int
) -> dict[str, list[Any]]:
    collate = purify(data_collator)
    frozen: dict[str, list[Any]] = {}
    for index, row in enumerate(rows):
        tokens = [int(token) for token in row["input_ids"]]
        with seeded(derive_key(seed, "frozen", *tokens)):
            # Copies, since some collators (the recipe's) change what they are given.
            batch = collate([{name: copy(value) for name, value in row.items()}])
        if "labels" not in batch:
            message = (
                f"data_collator {type(data_collator).__name__} returned {list(batch)}; it must return "
                "'labels' with -100 where nothing is to be predicted"
            )
            raise ValueError(message)
        for name, array in batch.items():
            if name == "word_ids":
                continue
            values = np.asarray(array)[0]
            if len(values) != len(tokens):
                message = (
                    f"data_collator returned {len(values)} {name!r} for row {index} of {len(tokens)} "
                    "tokens; switch off its padding to a fixed length"
                )
                raise ValueError(message)
            frozen.setdefault(name, []).append(values)
    return frozen
