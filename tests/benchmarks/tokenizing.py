"""Measure `tokenize_with_word_ids` through `map` against the tokenizer's bare ``encode_batch``.

The bare call is the floor: it leaves the tokens inside the tokenizer's own objects, which `map`
cannot store. The tokenizer uses every core and what comes after it one, so the ratio rises with the
number of cores; TOKENIZERS_PARALLELISM=false shows it on one. What `map` does once, whatever the
size of the dataset, is to hash the tokenizer; that is measured apart.
"""

from __future__ import annotations

import os
import tempfile
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import _measure as measure
import pyarrow as pa
from datasets import Dataset, load_from_disk
from datasets.fingerprint import Hasher

from mlmadapt import tokenize_with_word_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH_SIZE = 1000  # what `map` takes by default
DOCUMENTS = 4000
SIZES = (125, 500, 2000, 8000)


def main() -> None:
    """Measure through `map`, from a dataset in a file to a dataset in a file."""
    arguments = measure.parse_arguments(__doc__, rounds=7)
    material = measure.load_material(arguments, documents=SIZES[-1])
    texts, tokenizer = material.texts, material.tokenizer
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    report = measure.Report("Tokenizing", material.description, arguments)
    threads = 1 if os.environ.get("TOKENIZERS_PARALLELISM") == "false" else os.cpu_count()
    print(f"The tokenizer runs on {threads} threads.\n")
    with tempfile.TemporaryDirectory() as folder:
        contenders = contenders_for(texts[:DOCUMENTS], tokenizer, folder)
        times = measure.take_turns(contenders, rounds=arguments.rounds)
        sizes = {size: contenders_for(texts[:size], tokenizer, folder) for size in SIZES}
        growth = measure.take_turns_by_size(sizes, rounds=max(arguments.rounds // 2, 3))
    hashing = {"hash": measure.Contender(Hasher.hash, lambda: tokenizer)}
    once = measure.take_turns(hashing, rounds=arguments.rounds)["hash"]
    report.times(
        f"through map, batches of {BATCH_SIZE:,}", times, count=DOCUMENTS, unit="documents"
    )
    report.growth("documents", {"ms": measure.milliseconds(growth)})

    ratio = measure.Claim.ratio
    bare, lists, arrow, recipe = times.values()
    report.claims(
        "how many times as long, or as said",
        [
            ratio("ours, lists / encode_batch", lists, bare, at_most=1.15),
            ratio("ours, Arrow / encode_batch", arrow, bare, at_most=1.15),
            ratio("recipe / encode_batch", recipe, bare),
            ratio("recipe / ours, lists", recipe, lists),
            measure.Claim(
                "ms once per map, to hash the tokenizer", 1e3 * once.wall, 1e3 * once.cpu
            ),
        ],
    )
    report.save()


def contenders_for(
    texts: list[str], tokenizer: PreTrainedTokenizerBase, folder: str
) -> dict[str, measure.Contender]:
    """Put the texts into a file and let all read it but the bare call, which has them in memory."""
    backend = tokenizer.backend_tokenizer
    batches = [texts[start : start + BATCH_SIZE] for start in range(0, len(texts), BATCH_SIZE)]
    Dataset.from_dict({"text": texts}).save_to_disk(f"{folder}/{len(texts)}")
    dataset = load_from_disk(f"{folder}/{len(texts)}")
    file = Path(folder, "rows.arrow")
    fingerprints = map(str, count())

    def encode(batches: list[list[str]]) -> None:
        for batch in batches:
            backend.encode_batch(batch)

    def prepare() -> Dataset:
        file.unlink(missing_ok=True)
        return dataset

    def through_map(function: Any, dataset: Dataset) -> Dataset:
        return dataset.map(
            function,
            batched=True,
            fn_kwargs={"tokenizer": tokenizer},
            remove_columns=["text"],
            load_from_cache_file=False,
            cache_file_name=str(file),
            new_fingerprint=next(fingerprints),
        )

    def through_lists(dataset: Dataset) -> Dataset:
        return through_map(tokenize_with_word_ids, dataset)

    def through_arrow(dataset: Dataset) -> Dataset:
        return through_map(tokenize_with_word_ids, dataset.with_format("arrow"))

    def through_recipe(dataset: Dataset) -> Dataset:
        return through_map(tokenize_as_recipe, dataset)

    check_same(texts, through_arrow(prepare()), tokenizer)
    return {
        "encode_batch alone": measure.Contender(encode, lambda: batches),
        "ours, lists": measure.Contender(through_lists, prepare),
        "ours, Arrow": measure.Contender(through_arrow, prepare),
        "recipe, lists": measure.Contender(through_recipe, prepare),
    }


def tokenize_as_recipe(
    examples: dict[str, list[str]], tokenizer: PreTrainedTokenizerBase
) -> dict[str, list[Any]]:
    """Tokenize as the recipe does, with the tokenizer's word ids."""
    encoding = tokenizer(examples["text"])
    word_ids = [encoding.word_ids(row) for row in range(len(examples["text"]))]
    return {**encoding, "word_ids": word_ids}


def check_same(texts: list[str], dataset: Dataset, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse to measure functions that make different tokens."""
    table = dataset.data.table
    assert set(table.column_names) == {*tokenizer("a"), "word_ids"}
    for start in range(0, len(texts), BATCH_SIZE):
        encodings = tokenizer.backend_tokenizer.encode_batch(texts[start : start + BATCH_SIZE])
        ours = table.slice(start, BATCH_SIZE)["input_ids"].combine_chunks().flatten()
        assert ours.equals(pa.array(chain.from_iterable(e.ids for e in encodings), ours.type))


if __name__ == "__main__":
    main()
