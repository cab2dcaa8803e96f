"""Assertions about masks: each kind of mistake is found and named, and what is right passes."""

from __future__ import annotations

import copy
import random
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from datasets import Dataset

from mlmadapt import WholeWordMaskingCollator
from mlmadapt.testing import (
    assert_masks_reproducible,
    assert_whole_words_masked,
    tiny_rows,
    tiny_tokenizer,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedTokenizerFast

Row = dict[str, Any]
Batch = dict[str, Any]
TOKENIZER = tiny_tokenizer()
ROWS = tiny_rows(TOKENIZER)


def test_rows_of_every_form_and_family_pass(tokenizer: PreTrainedTokenizerFast) -> None:
    """Tensors, arrays, lists and datasets, padded on either side or not, with 80/10/10 by word."""
    rows = tiny_rows(tokenizer)
    forms: list[Any] = [Dataset.from_list(rows)]
    forms += [
        [{name: form(values) for name, values in row.items()} for row in rows]
        for form in (np.array, torch.tensor)
    ]
    forms.append(
        [
            {**row, "word_ids": [None if word < 0 else word for word in row["word_ids"]]}
            for row in rows
        ]
    )
    settings = {"mask_replace_prob": 0.8, "random_replace_prob": 0.1, "seed": 1}
    collator = WholeWordMaskingCollator(tokenizer, wwm_probability=0.5, **settings)
    for side, features in zip(("left", "right") * 2, forms, strict=True):
        tokenizer.padding_side = side
        arrays = collator(rows, return_tensors="np")
        real = arrays.pop("attention_mask") != 0
        ragged = {
            name: [row[is_real].tolist() for row, is_real in zip(values, real, strict=True)]
            for name, values in arrays.items()
        }
        for batch in (collator(rows), arrays, ragged):
            assert_whole_words_masked(batch, features)
            assert_whole_words_masked(batch, features, tokenizer=tokenizer)


class Masked:
    """A row with all of `unfilmable` masked, and a shorter one, to be broken."""

    def __init__(self) -> None:
        self.features = tiny_rows(TOKENIZER, ["the unfilmable film", "the film"])
        self.whole, short = (row["input_ids"] for row in self.features)
        self.inputs, self.labels = [[*self.whole], short + [0] * 4], [[-100] * 8, [-100] * 8]
        assert self.features[0]["word_ids"] == [-1, 0, 1, 1, 1, 1, 2, -1]
        for spot in range(2, 6):
            self.hide(0, spot)

    @property
    def batch(self) -> Batch:
        """What a collator would return."""
        return {"input_ids": self.inputs, "labels": self.labels}

    def hide(self, row: int, spot: int, label: int | None = None) -> None:
        """Make a target."""
        self.labels[row][spot] = self.inputs[row][spot] if label is None else label
        self.inputs[row][spot] = 4

    def show(self, spot: int, *, is_target: bool) -> None:
        """Show a token of the word."""
        self.inputs[0][spot] = self.whole[spot]
        self.labels[0][spot] = self.whole[spot] if is_target else -100

    def clear(self) -> None:
        """Mask nothing."""
        self.inputs[0], self.labels = self.whole, [[-100] * 8, [-100] * 8]


MISTAKES: dict[str, tuple[Callable[[Masked], object], str]] = {
    "a piece that is no target": (
        lambda masked: masked.show(3, is_target=False),
        r"row 0: the word 'unfilmable' .positions 2 to 5. is masked in part: position 3, token ",
    ),
    "a piece that is seen": (
        lambda masked: masked.show(3, is_target=True),
        r"hidden in part: position 3 of the input is token \d+ \('##film'\), not the mask token",
    ),
    "a special token": (
        lambda masked: masked.hide(0, 7),
        r"row 0: position 7, token 3 \('\[SEP\]'\), belongs to no word, but is a target",
    ),
    "another label": (
        lambda masked: masked.hide(1, 1, label=6),
        r"row 1, position 1: token \d+ \('the'\) has the label token 6 \(",
    ),
    "a token that is hidden without a label": (
        lambda masked: masked.inputs[1].__setitem__(2, 4),
        r"row 1, position 2: token \d+ \('film'\) is not a target, but now token 4",
    ),
    "nothing": (Masked.clear, "no token of the batch is a target: nothing is masked"),
    "a row too few": (
        lambda masked: masked.inputs.pop(),
        "the batch has 1 rows of 'input_ids' for 2 features",
    ),
    "a row that is cut": (
        lambda masked: masked.labels[0].pop(),
        "row 0 has 8 tokens in features, but 8 input_ids and 7 labels in the batch",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_named(name: str) -> None:
    """Each way to break a right batch is told by row, position, token and word."""
    mistake, message = MISTAKES[name]
    masked = Masked()
    assert_whole_words_masked(masked.batch, masked.features, tokenizer=TOKENIZER)
    mistake(masked)
    with pytest.raises(AssertionError, match=message):
        assert_whole_words_masked(masked.batch, masked.features, tokenizer=TOKENIZER)


def test_what_is_no_batch_of_rows_with_words_is_told() -> None:
    """A column that lacks, in the batch or the rows, and no rows at all, which prove nothing."""
    masked = Masked()
    with pytest.raises(AssertionError, match=r"the batch has no 'labels', only \['input_ids'\]"):
        assert_whole_words_masked({"input_ids": masked.inputs}, masked.features)
    with pytest.raises(AssertionError, match="nothing is masked"):
        assert_whole_words_masked({"input_ids": [], "labels": []}, [])
    masked.clear()
    with pytest.raises(AssertionError, match="nothing is masked"):
        assert_masks_reproducible(lambda _: masked.batch, masked.features)
    masked.features[1].pop("word_ids")
    with pytest.raises(ValueError, match=r"row 1 of features has no 'word_ids', only \['input"):
        assert_whole_words_masked(masked.batch, masked.features)


def test_special_tokens_written_in_a_text_are_no_words() -> None:
    """Tokenizers give them word ids; with the tokenizer at hand, they must not be targets."""
    encoded = TOKENIZER("the [SEP] film")
    ids, features = encoded["input_ids"], [{**encoded, "word_ids": encoded.word_ids()}]
    batch = {"input_ids": [[*ids[:2], 4, *ids[3:]]], "labels": [[-100, -100, 3, -100, -100]]}
    assert_whole_words_masked(batch, features)
    message = r"row 0: position 2, token 3 \('\[SEP\]'\), belongs to no"
    with pytest.raises(AssertionError, match=message):
        assert_whole_words_masked(batch, features, tokenizer=TOKENIZER)


def mask_by(spot_of: Callable[..., int]) -> Callable[[list[Row]], Batch]:
    """Make a collator that masks one token a row, for whatever reason."""

    def collate(features: list[Row]) -> Batch:
        inputs = [list(row["input_ids"]) for row in features]
        labels = [[-100] * len(row) for row in inputs]
        for number, row in enumerate(features):
            spot = spot_of(row, number, features) % len(inputs[number])
            labels[number][spot], inputs[number][spot] = inputs[number][spot], 4
        return {"input_ids": inputs, "labels": labels}

    return collate


def keep_by_company(features: list[Row]) -> Batch:
    """Ask for a token that is to be seen, which one depends on the batch: labels alone differ."""
    batch = mask_by(lambda *_: len(features))(features)
    return batch | {"input_ids": [row["input_ids"] for row in features]}


class Forgetful:
    """Masks by what a copy, as a worker gets it, does not have."""

    copies = 0

    def __deepcopy__(self, memo: Any) -> Forgetful:
        """Forget something."""
        copied = Forgetful()
        copied.copies = self.copies + 1
        return copied

    def __call__(self, features: list[Row]) -> Batch:
        """Mask."""
        return mask_by(lambda *_: 1 + self.copies)(features)


def test_seeded_collators_pass(tokenizer: PreTrainedTokenizerFast) -> None:
    """Ours does in each family and epoch and on each side, and leaves random state where it was."""
    features = [
        row | {"word_ids": [np.nan if w < 0 else w for w in row["word_ids"]]}
        for row in tiny_rows(tokenizer)
    ]
    settings = {"random_replace_prob": 0.5, "mask_replace_prob": 0.5, "seed": 0}
    for side in ("left", "right"):
        tokenizer.padding_side = side
        collator = WholeWordMaskingCollator(tokenizer, **settings)
        collator.set_epoch(3)
        states = random.getstate(), torch.get_rng_state(), np.random.get_state()[1].tolist()  # noqa: NPY002
        assert_masks_reproducible(collator, features, tokenizer=tokenizer)
        assert random.getstate() == states[0]
        assert torch.equal(torch.get_rng_state(), states[1])
        assert np.random.get_state()[1].tolist() == states[2]  # noqa: NPY002


def test_workers_can_be_asked() -> None:
    """In a worker ours masks the same; a collator that asks which worker it is does not."""
    assert_masks_reproducible(WholeWordMaskingCollator(TOKENIZER, seed=0), ROWS, num_workers=1)

    def by_worker(*_: Any) -> int:
        return 1 if torch.utils.data.get_worker_info() is None else 2

    assert_masks_reproducible(mask_by(by_worker), ROWS)
    with pytest.raises(AssertionError, match=r"row 0, position 1, .* in a worker; a mask must"):
        assert_masks_reproducible(mask_by(by_worker), ROWS, num_workers=1)


IMPURE: dict[str, tuple[Callable[[], Any], str]] = {
    "follows torch": (lambda: WholeWordMaskingCollator(TOKENIZER), "in a second call"),
    "draws from NumPy": (lambda: mask_by(lambda *_: np.random.randint(8)), "in a second call"),  # noqa: NPY002
    "counts rows": (lambda: mask_by(lambda _, number, __: number), "in reverse order"),
    "looks at the batch": (lambda: mask_by(lambda *args: len(args[2])), "as a batch of its own"),
    "keeps a token": (lambda: keep_by_company, "as a batch of its own"),
    "loses state": (Forgetful, "by a copy of the collator"),
}


@pytest.mark.parametrize("name", IMPURE)
def test_what_depends_on_more_than_the_row_is_found(name: str) -> None:
    """Generators, seeds, counts, company and lost state each make a mask that is not the row's."""
    make, way = IMPURE[name]
    columns = ("input_ids", "word_ids") if name == "follows torch" else ("input_ids",)
    features = [{column: row[column] for column in columns} for row in ROWS]
    found = rf"row \d+, position \d+, token \d+ \('.*'\): input \d+ and label .* {way}; a mask must"
    with pytest.raises(AssertionError, match=found):
        assert_masks_reproducible(make(), features, tokenizer=TOKENIZER)


def test_rows_that_a_collator_changes_are_found() -> None:
    """A column that is taken out, as the recipe does, or a tensor that is masked in place."""

    def take_out(features: list[Row]) -> Batch:
        for row in features:
            row.pop("word_ids")
        return mask_by(lambda *_: 1)(features)

    def write(features: list[Row]) -> Batch:
        batch = mask_by(lambda *_: 1)(features)
        features[2]["input_ids"][1] = 4
        return batch

    features = [{name: torch.tensor(values) for name, values in row.items()} for row in ROWS]
    before = copy.deepcopy(features)
    for number, collator, name in ((0, take_out, "word_ids"), (2, write, "input_ids")):
        message = f"row {number}: the collator changes {name!r} of its own"
        with pytest.raises(AssertionError, match=message):
            assert_masks_reproducible(collator, features)
    assert repr(features) == repr(before)
