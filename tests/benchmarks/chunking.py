"""Measure `group_texts` against the recipe's and against one with `itertools.chain`.

The recipe joins lists by ``sum(lists, [])``, which copies what it has so far for every document;
the training scripts of transformers use `itertools.chain`. Both leave word ids as they are; ours
numbers them anew, which is included in its time.
"""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import _measure as measure
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, load_from_disk

from mlmadapt import group_texts, tokenize_with_word_ids

if TYPE_CHECKING:
    from collections.abc import Callable

BATCH_SIZE = 1000  # what `map` takes by default
MAPPED_DOCUMENTS = 10_000
SIZES = (125, 500, 2000, 8000)
LARGEST_FOR_RECIPE = 2000  # a minute for 8,000
COLUMNS = ["input_ids", "attention_mask", "word_ids"]
CHUNK_SIZE = 128


def main() -> None:
    """Measure on one batch, through `map`, then on batches of four sizes."""
    arguments = measure.parse_arguments(__doc__, rounds=9)
    material = measure.load_material(arguments, documents=MAPPED_DOCUMENTS)
    report = measure.Report("Chunking", material.description, arguments)

    tokens = tokenize_with_word_ids(pa.table({"text": material.texts}), material.tokenizer)
    tokens = tokens.select(COLUMNS)
    table = tokens.slice(0, BATCH_SIZE)
    check_same(with_nulls(table).to_pydict(), table)
    times = measure.take_turns(contenders_for(table), rounds=arguments.rounds)
    report.times("one batch", times, count=BATCH_SIZE, unit="documents")

    with tempfile.TemporaryDirectory() as folder:
        files = Files(folder)
        ours = files.write("ours", tokens)
        theirs = files.write("theirs", with_nulls(tokens))
        contenders = {
            "ours, Arrow": measure.Contender(
                files.map(group_texts), files.before(ours.with_format("arrow"))
            ),
            "ours, lists": measure.Contender(files.map(group_texts), files.before(ours)),
            "chain, lists": measure.Contender(files.map(group_by_chain), files.before(theirs)),
        }
        mapped = measure.take_turns(contenders, rounds=max(arguments.rounds // 2, 3))
    title = f"through map, batches of {BATCH_SIZE:,}"
    report.times(title, mapped, count=len(material.texts), unit="documents")

    sizes = {size: contenders_for(tokens.slice(0, size)) for size in SIZES}
    growth = measure.take_turns_by_size(sizes, rounds=max(arguments.rounds // 2, 3))
    report.growth(
        "documents per batch",
        {"ms": measure.milliseconds(growth), "peak MB": measure.peak_megabytes(sizes)},
        absent="left out: a minute",
    )
    print("Peak memory is what Python, NumPy and Arrow allocate beyond the batch.\n")

    ratio = measure.Claim.ratio
    arrow, lists_, chain, recipe = times.values()
    mapped_arrow, mapped_lists, mapped_chain = mapped.values()
    report.claims(
        "how many times as long",
        [
            ratio("recipe / Arrow", recipe, arrow, at_least=300),
            ratio("chain / Arrow", chain, arrow, at_least=12),
            ratio("recipe / our lists", recipe, lists_, at_least=10),
            ratio("chain / our lists", chain, lists_),
            ratio("through map: chain / Arrow", mapped_chain, mapped_arrow, at_least=15),
            ratio("through map: chain / our lists", mapped_chain, mapped_lists),
        ],
    )
    report.save()


def contenders_for(table: pa.Table) -> dict[str, measure.Contender]:
    """Give a batch to each, as it takes it."""
    lists = with_nulls(table).to_pydict()
    contenders = {
        "ours, Arrow": measure.Contender(group_texts, lambda: table),
        "ours, lists": measure.Contender(group_texts, lambda: lists),
        "chain, lists": measure.Contender(group_by_chain, lambda: lists),
    }
    if len(table) <= LARGEST_FOR_RECIPE:
        contenders["recipe, lists"] = measure.Contender(group_by_sum, lambda: lists)
    return contenders


def with_nulls(table: pa.Table) -> pa.Table:
    """Turn the word id -1 into null, which is the recipe's None."""
    word_ids = table["word_ids"].combine_chunks()
    numbers = word_ids.values
    numbers = pc.if_else(pc.less(numbers, 0), pa.scalar(None, numbers.type), numbers)
    rows = pa.ListArray.from_arrays(word_ids.offsets, numbers)
    return table.set_column(table.column_names.index("word_ids"), "word_ids", rows)


def group_by_sum(examples: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Cut into chunks as the recipe does."""
    return cut({name: sum(column, []) for name, column in examples.items()})  # noqa: RUF017


def group_by_chain(examples: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Cut into the same chunks, joined as the training scripts of transformers join."""
    return cut({name: list(itertools.chain(*column)) for name, column in examples.items()})


def cut(joined: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Cut long lists into chunks, leave the remainder out, and copy the labels."""
    kept = len(joined["input_ids"]) // CHUNK_SIZE * CHUNK_SIZE
    chunks = {
        name: [column[start : start + CHUNK_SIZE] for start in range(0, kept, CHUNK_SIZE)]
        for name, column in joined.items()
    }
    return {**chunks, "labels": chunks["input_ids"].copy()}


def check_same(lists: dict[str, list[Any]], table: pa.Table) -> None:
    """Refuse to measure functions that make different chunks."""
    recipe = group_by_sum(lists)
    assert recipe == group_by_chain(lists)
    for ours in (group_texts(lists), group_texts(table).to_pydict()):
        assert set(ours) == set(recipe)
        for name in ("input_ids", "attention_mask", "labels"):
            assert ours[name] == recipe[name], name
        # Numbers differ, words do not: special tokens keep the documents apart.
        assert list(map(runs, ours["word_ids"])) == list(map(runs, recipe["word_ids"]))


def runs(word_ids: list[int | None]) -> list[tuple[bool, int]]:
    """Return the words of a row as (is a word, number of its tokens)."""
    return [
        (word not in (None, -1), len(list(group))) for word, group in itertools.groupby(word_ids)
    ]


class Files:
    """Datasets in files, as users have them: `map` keeps one from memory in memory."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def write(self, name: str, table: pa.Table) -> Dataset:
        """Write a dataset and map it into memory from there."""
        Dataset(table).save_to_disk(self.folder / name)
        return load_from_disk(self.folder / name)

    def map(self, function: Callable[..., Any]) -> Callable[[Dataset], None]:
        """Return what maps a dataset without a cache to hit."""

        def run(dataset: Dataset) -> None:
            file = str(self.folder / "rows.arrow")
            dataset.map(function, batched=True, load_from_cache_file=False, cache_file_name=file)

        return run

    def before(self, dataset: Dataset) -> Callable[[], Dataset]:
        """Return what removes the file of the turn before and hands out the dataset."""

        def prepare() -> Dataset:
            (self.folder / "rows.arrow").unlink(missing_ok=True)
            return dataset

        return prepare


if __name__ == "__main__":
    main()
