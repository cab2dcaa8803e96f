"""Masks frozen into the rows of an evaluation set, so that every evaluation sees the same ones.

Perplexity under fresh masks moves by whole points from run to run. The recipe masks once, but from
the global generator: its frozen set depends on the batch size of `map`, on what was drawn before,
and a second seed gets the first one's rows out of `map`'s cache. Here a row's mask depends on the
seed and the row.
"""

import random
import reprlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import copy, deepcopy
from functools import partial
from typing import Any, cast

import numpy as np
import pyarrow as pa
import torch

from mlmadapt._types import Columns, DataCollator
from mlmadapt.data.rows import (
    are_frozen,
    check_tokens,
    check_whole,
    document_bounds,
    join_column,
    join_frozen,
    pad_rows,
    read_batch,
    row_lengths,
    split_rows,
    to_columns,
)
from mlmadapt.masking.collator import WholeWordMaskingCollator
from mlmadapt.masking.selection import derive_key


def insert_random_mask(
    examples: Columns,
    data_collator: DataCollator,
    *,
    seed: int = 0,
    prefix: str = "masked_",
    key_column: str | None = None,
) -> Columns:
    """Mask a batch of rows once and for all.

    For ``dataset.map(insert_random_mask, batched=True, fn_kwargs={"data_collator": collator},
    remove_columns=dataset.column_names)``; without `remove_columns`, `map` keeps ``word_ids``
    beside the new columns. `seed` takes the place of the collator's own seed and epoch, and is part
    of `map`'s fingerprint, so that another seed is never served old rows.

    Args:
        examples: A batch of rows: a dict of lists, or a ``pyarrow.Table`` (datasets with format
            "arrow", which `map` reads and masks twice as fast).
        data_collator: `WholeWordMaskingCollator`, which leaves rows that are frozen already as they
            are, or another library's. That one is called row by row (about 0.4 ms each) with the
            global generators seeded from (seed, row), and they are restored. They are those of the
            whole process: freeze so in one thread at a time.
        seed: Seed of the masks, a whole number.
        prefix: Put before the names of the new columns; ``""`` keeps the names.
        key_column: A column that numbers or names the documents, in place of the collator's own
            `key_column`. A mask then depends on seed, document and the words' places in place of
            tokens: equal rows have masks of their own, and two vocabularies mask the same words of
            the same documents, if their words are the same and rows are whole documents (or packed
            ones, with the document's number at each token).

    Returns:
        The model's inputs and ``labels`` by their new names, rows of shape ``(sequence,)``. A
        column is one array of shape ``(batch, sequence)`` where our collator has masked rows of one
        length, else an array or a list of arrays. Of a table (or of a frame or a record batch that
        Arrow can read), a table, as an `IterableDataset` with format "arrow" needs it.

    Raises:
        ValueError: If there are no ``input_ids``, the collator returns no ``labels`` or rows of
            another length, labels are not the row's tokens, or nothing is hidden; if there is a
            `key_column` and the collator is not ours; and as the collator does.
        TypeError: If `seed` is not a whole number, or a key neither that nor a string; and as the
            collator does.

    Source:
        The recipe's function of this name: the Hugging Face course, chapter 7.3.

    Examples:
        >>> from mlmadapt import tokenize_with_word_ids
        >>> from mlmadapt.testing import tiny_tokenizer
        >>> tokenizer = tiny_tokenizer("wordpiece")
        >>> rows = tokenize_with_word_ids({"text": ["a film"]}, tokenizer)
        >>> frozen = insert_random_mask(rows, WholeWordMaskingCollator(tokenizer), prefix="")
        >>> tokenizer.decode(frozen["input_ids"][0]), frozen["labels"].shape
        ('[CLS] a [MASK] [SEP]', (1, 4))
    """
    check_whole("seed", seed, least=None, error=TypeError)
    batch, is_table = read_batch(examples)
    if is_table:
        batch = {name: column.to_numpy() for name, column in batch.items()}
    if isinstance(data_collator, WholeWordMaskingCollator):
        key = derive_key(seed, "frozen")
        joined, lengths = data_collator.mask(batch, key=key, key_column=key_column)
        frozen: dict[str, Any] = {
            name: split_rows(values, lengths) for name, values in joined.items()
        }
    elif key_column is None:
        frozen = _freeze_row_by_row(batch, data_collator, seed)
    else:
        raise ValueError(
            f"key_column is {key_column!r} and data_collator is {type(data_collator).__name__}; "
            "only the masks of WholeWordMaskingCollator can follow a column"
        )
    named = {prefix + name: rows for name, rows in frozen.items()}
    if is_table:
        return cast("Columns", pa.table({name: list(named[name]) for name in named}))
    return cast("Columns", named)


@contextmanager
def seeded(key: int) -> Iterator[None]:
    """Seed Python's, NumPy's and torch's global generators inside the block; restore them after it.

    For code that draws from global state and cannot be handed a key: other libraries' collators,
    and dropout. The global generators belong to one thread at a time: what another one draws
    meanwhile moves what is drawn in the block.

    Examples:
        >>> with seeded(7):
        ...     first = random.random()
        >>> with seeded(7):
        ...     first == random.random()
        True
    """
    # Other devices are left alone: collators draw on the CPU.
    with torch.random.fork_rng(devices=[]):
        python_state = random.getstate()
        # The global generator is what such code draws from.
        numpy_state = np.random.get_state()  # noqa: NPY002
        random.seed(key)
        np.random.seed(key % 2**32)  # noqa: NPY002
        torch.default_generator.manual_seed(key)
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)  # noqa: NPY002


def collate_seeded(
    data_collator: DataCollator, rows: list[Mapping[str, Any]], *, key: int
) -> dict[str, Any]:
    """Call another library's collator, which draws by `key`, on copies: some change their rows.

    It does not see ``document_ids``, and gets them back padded.

    Raises:
        ValueError: If it returns no ``labels``, or other numbers of tokens than ``document_ids``.
    """
    copies = deepcopy([dict(row) for row in rows])
    documents = [row.pop("document_ids") for row in copies if "document_ids" in row]
    with seeded(key):
        batch = data_collator(copies)
    if "labels" not in batch:
        raise ValueError(
            f"data_collator {type(data_collator).__name__} returned {list(batch)}; it must return "
            "'labels' with -100 where nothing is to be predicted"
        )
    inputs = {name: batch[name] for name in batch if name != "word_ids"}
    if documents:  # laid out as the collator has laid out the tokens
        is_real = np.asarray(inputs.get("attention_mask", np.ones_like(inputs["labels"]))) != 0
        lengths, counts = row_lengths("document_ids", documents), is_real.sum(1)
        if (counts != lengths).any():
            raise ValueError(
                f"data_collator returned rows of {reprlib.repr(counts.tolist())} tokens for "
                f"'document_ids' of {reprlib.repr(lengths.tolist())}; it must keep each token, or "
                "the rows must have no padding"
            )
        joined = join_column("document_ids", documents)
        document_bounds(joined, np.append(0, np.cumsum(lengths)))
        inputs["document_ids"] = np.full(is_real.shape, -1)
        inputs["document_ids"][is_real] = joined
    return inputs


def purify(data_collator: DataCollator) -> DataCollator:
    """Return a collator without random state of its own, so that `seeded` decides what it draws.

    transformers' collators keep a generator once they have a seed; and they fail on ``word_ids``,
    and on ``labels`` of unequal length, both of which they would not use. Whoever's it is, it pads
    on the right, as `pad_rows` does.
    """
    from transformers import DataCollatorForLanguageModeling  # noqa: PLC0415  # a second to load

    pure: Any = data_collator
    pads_left = getattr(getattr(pure, "tokenizer", None), "padding_side", None) == "left"
    if pads_left and not isinstance(pure, WholeWordMaskingCollator):
        pure = copy(pure)
        pure.tokenizer = copy(pure.tokenizer)
        pure.tokenizer.padding_side = "right"
    if not isinstance(pure, DataCollatorForLanguageModeling):
        return pure  # type: ignore[no-any-return]
    stateless: Any = copy(pure)
    stateless.seed = stateless.generator = None
    return partial(_call_without_extras, data_collator=stateless)


def _call_without_extras(rows: list[dict[str, Any]], *, data_collator: Any) -> Any:
    if getattr(data_collator, "whole_word_mask", False) and "offset_mapping" not in rows[0]:
        raise ValueError(
            "data_collator has whole_word_mask=True and needs the column 'offset_mapping'; use "
            "WholeWordMaskingCollator, which needs 'word_ids'"
        )
    columns = to_columns(rows)
    if are_frozen(columns):
        return pad_rows(*join_frozen(columns), data_collator.tokenizer)
    names = rows[0].keys() - {"labels", "word_ids"}
    return data_collator([{name: row[name] for name in row if name in names} for row in rows])


def _freeze_row_by_row(
    examples: Mapping[str, Any], data_collator: DataCollator, seed: int
) -> dict[str, Any]:
    check_tokens("the batch", examples)
    collate = purify(data_collator)
    frozen: dict[str, list[Any]] = {}
    counts = np.zeros(3, int)
    for index, values in enumerate(zip(*(examples[name] for name in examples), strict=True)):
        row = dict(zip(examples, values, strict=True))
        tokens = [int(token) for token in row["input_ids"]]
        batch = collate_seeded(collate, [row], key=derive_key(seed, "frozen", *tokens))
        for name, array in batch.items():
            masked = np.asarray(array)[0]
            if len(masked) != len(tokens):
                raise ValueError(
                    f"data_collator returned {len(masked)} {name!r} for row {index} of "
                    f"{len(tokens)} tokens; switch off its padding to a fixed length"
                )
            frozen.setdefault(name, []).append(masked)
        labels, inputs = frozen["labels"][-1], frozen["input_ids"][-1]
        is_target = labels != -100
        counts += [is_target.sum(), (inputs != tokens).sum(), (labels != tokens)[is_target].sum()]
    targets, hidden, wrong = counts.tolist()
    check_masks(data_collator, targets=targets, hidden=hidden, wrong=wrong)
    return frozen


def check_masks(data_collator: DataCollator, *, targets: int, hidden: int, wrong: int = 0) -> None:
    """Check by what came out of a collator that it masks.

    Raises:
        ValueError: If the model would see what it is to predict, or predict something else.
    """
    # One that masks may by chance keep a few targets as they are, but not many and no other.
    if wrong or (targets > _FEW and not hidden):
        raise ValueError(
            f"data_collator {type(data_collator).__name__} returned {targets} labels in a batch, "
            f"{wrong} of them other than the row's own token, and hid {hidden} tokens; use a "
            "collator that masks, such as WholeWordMaskingCollator"
        )


_FEW = 16
