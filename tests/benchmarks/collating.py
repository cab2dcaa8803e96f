"""Measure `WholeWordMaskingCollator` against the recipe's and transformers' whole-word collators.

All get lists, fresh from Arrow, as a dataset without a format hands them out, and make tensors.
Rows that lie about for longer are read slower, by all alike: their numbers are strewn over memory.
The recipe's rows have word ids with None and labels; transformers' have offsets, and the mask of
special tokens, without which it is slower.
"""

from __future__ import annotations

import warnings
from itertools import chain
from typing import TYPE_CHECKING, Any

import _measure as measure
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from _recipe import whole_word_masking
from transformers import DataCollatorForLanguageModeling

from mlmadapt import WholeWordMaskingCollator, group_texts, tokenize_with_word_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Rows = list[dict[str, list[Any]]]

DOCUMENTS = 2000
LENGTHS = (512, 2048, 8192, 32768)
# Its memory grows with the square of the length: 16 GB and more for 4 rows of 32,768.
LONGEST_FOR_TRANSFORMERS = 8192


def main() -> None:
    """Measure at the recipe's size, then 4 rows of four lengths."""
    arguments = measure.parse_arguments(__doc__, rounds=9)
    material = measure.load_material(arguments, documents=DOCUMENTS)
    report = measure.Report("Collating", material.description, arguments)
    data = Corpus(material.texts, material.tokenizer)

    times = measure.take_turns(data.contenders(rows=64, length=128), rounds=arguments.rounds)
    report.times("64 rows of 128", times, count=64, unit="rows")
    contenders = data.contenders(rows=4, length=8192)
    long = measure.take_turns(contenders, rounds=max(arguments.rounds // 2, 3))
    report.times("4 rows of 8,192", long, count=4, unit="rows")

    lengths = {length: data.contenders(rows=4, length=length) for length in LENGTHS}
    growth = measure.take_turns_by_size(lengths, rounds=arguments.rounds)
    report.growth(
        "tokens per row, 4 rows",
        {"ms": measure.milliseconds(growth), "peak MB": measure.peak_megabytes(lengths)},
        absent="left out: 16 GB",
    )
    print("Peak memory is that of Python and NumPy; tensors that torch makes come on top.\n")

    ratio = measure.Claim.ratio
    ours, ours_none, recipe, transformers = times.values()
    long_ours, _, long_recipe, long_transformers = long.values()
    shortest, *_, longest = growth["ours"].values()
    tokens = LENGTHS[-1] / LENGTHS[0]
    report.claims(
        "how many times as long",
        [
            ratio("64 x 128: recipe / ours", recipe, ours, at_least=12),
            ratio("64 x 128: transformers / ours", transformers, ours, at_least=20),
            ratio("64 x 128: ours, None / ours", ours_none, ours),
            ratio("4 x 8,192: recipe / ours", long_recipe, long_ours, at_least=12),
            ratio("4 x 8,192: transformers / ours", long_transformers, long_ours, at_least=200),
            # Linear: as many times as long as there are more tokens, and a tenth for the caches.
            ratio(f"ours, {tokens:g} times the tokens", longest, shortest, at_most=1.1 * tokens),
        ],
    )
    report.save()


class Corpus:
    """One long line of tokens for each kind of row, cut to rows of any length."""

    def __init__(self, texts: list[str], tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        tokens = tokenize_with_word_ids(pa.table({"text": texts}), tokenizer)
        self.ours = tokens.select(["input_ids", "attention_mask", "word_ids"])
        encoding = tokenizer(texts, return_offsets_mapping=True, return_special_tokens_mask=True)
        names = ("input_ids", "attention_mask", "offset_mapping", "special_tokens_mask")
        self.theirs = pa.table({name: list(chain.from_iterable(encoding[name])) for name in names})
        ours = chain.from_iterable(self.ours["input_ids"].to_pylist())
        assert self.theirs["input_ids"].to_pylist() == list(ours)

    def contenders(self, *, rows: int, length: int) -> dict[str, measure.Contender]:
        """Make the rows that each collator is given."""
        ours = group_texts(self.ours, chunk_size=length, labels=False).slice(0, rows)
        assert len(ours) == rows, f"the texts are too short for {rows} rows of {length} tokens"
        words = ours["word_ids"].combine_chunks()
        flat = words.flatten()
        flat = pc.if_else(pc.less(flat, 0), None, flat)
        words = pa.ListArray.from_arrays(pa.array(range(0, len(flat) + 1, length)), flat)
        with_none = ours.set_column(ours.column_names.index("word_ids"), "word_ids", words)
        for_recipe = with_none.append_column("labels", with_none["input_ids"])
        offsets = pa.array(range(0, rows * length + 1, length), pa.int32())
        theirs = pa.table(
            {
                name: pa.ListArray.from_arrays(offsets, column.combine_chunks())
                for name, column in zip(self.theirs.column_names, self.theirs.columns, strict=True)
            }
        )

        collator = WholeWordMaskingCollator(self.tokenizer, seed=0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # says that it does no 80/10/10
            transformers = DataCollatorForLanguageModeling(
                self.tokenizer, whole_word_mask=True, mlm_probability=0.2
            )
        contenders = {
            "ours": measure.Contender(collator, ours.to_pylist),
            "ours, None": measure.Contender(collator, with_none.to_pylist),
            "recipe": measure.Contender(
                lambda features: whole_word_masking(features, self.tokenizer), for_recipe.to_pylist
            ),
        }
        if length <= LONGEST_FOR_TRANSFORMERS:
            contenders["transformers"] = measure.Contender(transformers, theirs.to_pylist)
        if length <= LENGTHS[0]:
            self.check(ours.to_pylist(), contenders)
        return contenders

    def check(self, rows: Rows, contenders: dict[str, measure.Contender]) -> None:
        """Refuse to measure collators that lose a token or mask another share."""
        tokens = np.array([row["input_ids"] for row in rows])
        for name, contender in contenders.items():
            batch = contender.run(contender.prepare())
            masked, labels = batch["input_ids"].numpy(), batch["labels"].numpy()
            is_target = labels != -100
            assert (np.where(is_target, labels, masked) == tokens).all(), name
            assert (masked[is_target] == self.tokenizer.mask_token_id).all(), name
            assert 0.1 < is_target.mean() < 0.3, (name, is_target.mean())


if __name__ == "__main__":
    main()
