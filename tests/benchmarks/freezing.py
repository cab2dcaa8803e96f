"""Measure `insert_random_mask` against the recipe's.

The recipe's function is measured with its whole-word collator, and with transformers' collator of
single tokens, with which the chapter itself freezes; ours with `WholeWordMaskingCollator`, and with
the same collator of single tokens, row by row, so that masks depend on the row alone.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import _measure as measure
import pyarrow as pa
from _recipe import insert_random_mask as recipe_insert_random_mask
from _recipe import whole_word_masking
from datasets import Dataset
from transformers import DataCollatorForLanguageModeling

from mlmadapt import (
    WholeWordMaskingCollator,
    group_texts,
    insert_random_mask,
    tokenize_with_word_ids,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DOCUMENTS = 4000
ROWS = 1000  # what `map` hands over at a time
SIZES = (125, 500, 2000, 8000)


def main() -> None:
    """Measure on one batch of `map`, as lists and as arrays, then on batches of four sizes."""
    arguments = measure.parse_arguments(__doc__, rounds=9)
    material = measure.load_material(arguments, documents=DOCUMENTS)
    tokenizer = material.tokenizer
    report = measure.Report("Freezing", material.description, arguments)

    tokens = tokenize_with_word_ids(pa.table({"text": material.texts}), tokenizer)
    tokens = tokens.select(["input_ids", "attention_mask", "word_ids"])
    rows = group_texts(tokens, chunk_size=128, labels=False)
    assert len(rows) >= SIZES[-1], "the texts are too short"
    contenders = contenders_for(rows.slice(0, ROWS), tokenizer)
    times = measure.take_turns(contenders, rounds=arguments.rounds)
    report.times(f"{ROWS:,} rows of 128", times, count=ROWS, unit="rows")

    sizes = {size: contenders_for(rows.slice(0, size), tokenizer) for size in SIZES}
    growth = measure.take_turns_by_size(sizes, rounds=max(arguments.rounds // 2, 3))
    report.growth("rows per batch", {"ms": measure.milliseconds(growth)})

    ratio = measure.Claim.ratio
    lists_, arrays_ = times["ours, lists"], times["ours, arrays"]
    rates = [
        measure.Claim(
            f"rows per second, {name}", ROWS / each.wall, ROWS / each.cpu, at_least=50_000
        )
        for name, each in (("lists", lists_), ("arrays", arrays_))
    ]
    report.claims(
        "how many",
        [
            *rates,
            ratio("recipe / ours, lists, times as long", times["recipe"], lists_),
            ratio("recipe / ours, arrays, times as long", times["recipe"], arrays_),
        ],
    )
    report.save()


def contenders_for(
    table: pa.Table, tokenizer: PreTrainedTokenizerBase
) -> dict[str, measure.Contender]:
    """Give a batch to each, as it takes it."""
    lists = table.to_pydict()
    arrays = Dataset(table).with_format("numpy")[:]
    no_words = {name: lists[name] for name in ("input_ids", "attention_mask")}

    def copies_for_recipe() -> dict[str, list[list[int | None]]]:
        rows = {name: [row.copy() for row in column] for name, column in lists.items()}
        rows["word_ids"] = [[None if w < 0 else w for w in row] for row in rows["word_ids"]]
        return {**rows, "labels": [row.copy() for row in rows["input_ids"]]}

    ours = WholeWordMaskingCollator(tokenizer)
    theirs = DataCollatorForLanguageModeling(tokenizer)
    first, second = insert_random_mask(lists, ours), insert_random_mask(arrays, ours)
    for name, column in first.items():
        pairs = zip(column, second[name], strict=True)
        assert all((one == other).all() for one, other in pairs), name

    freeze = partial(insert_random_mask, data_collator=ours)
    return {
        "ours, lists": measure.Contender(freeze, lambda: lists),
        "ours, arrays": measure.Contender(freeze, lambda: arrays),
        "ours, single tokens": measure.Contender(
            partial(insert_random_mask, data_collator=theirs), lambda: no_words
        ),
        "recipe": measure.Contender(
            partial(
                recipe_insert_random_mask,
                data_collator=partial(whole_word_masking, tokenizer=tokenizer),
            ),
            copies_for_recipe,
        ),
        "recipe, single tokens": measure.Contender(
            partial(recipe_insert_random_mask, data_collator=theirs), lambda: no_words
        ),
    }


if __name__ == "__main__":
    main()
