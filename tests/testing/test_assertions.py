"""Assertions for other projects: what is broken is found and named, what is right passes."""
# ruff: noqa: D102, D103 (a mistake is told by the name of its function)

from __future__ import annotations

import ast
import copy
import functools
import multiprocessing
import random
import signal
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

from mlmadapt import (
    WholeWordMaskingCollator,
    group_texts,
    masked_lm_loss,
    pack_texts,
    sparse_prediction,
    tokenize_with_word_ids,
)
from mlmadapt.testing import (
    TOKENIZER_KINDS,
    assert_documents_kept,
    assert_masks_reproducible,
    assert_resumes_exactly,
    assert_same_loss,
    assert_tokens_kept,
    assert_whole_words_masked,
    runs,
    tiny_corpus,
    tiny_model,
    tiny_tokenizer,
)
from tests.data.reference_chunking import reference_group_texts

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from transformers import PreTrainedModel, PreTrainedTokenizerFast

Row = dict[str, Any]
Batch = dict[str, Any]
kinds = st.sampled_from(TOKENIZER_KINDS)
documents = st.lists(
    st.sampled_from(tiny_corpus(40)) | st.text("aé .'-中电影film\n", max_size=20),
    min_size=1,
    max_size=6,
)
shared = functools.cache(tiny_tokenizer)


def rows_of(columns: Mapping[str, Any]) -> list[Row]:
    """Turn columns into rows of lists."""
    return [
        {name: np.asarray(values).tolist() for name, values in zip(columns, row, strict=True)}
        for row in zip(*columns.values(), strict=True)
    ]


def tokenize(tokenizer: PreTrainedTokenizerFast, texts: list[str] | None = None) -> list[Row]:
    """Make rows of unequal lengths, some with rare words."""
    return rows_of(tokenize_with_word_ids({"text": texts or tiny_corpus(12)}, tokenizer))


# Whole words


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("form", ["pt", "np", "lists", "ragged"])
def test_batches_of_every_form_and_family_pass(
    tokenizer: PreTrainedTokenizerFast, side: str, form: str
) -> None:
    """Tensors, arrays, lists, padded on either side or not at all, with 80/10/10 by word."""
    tokenizer.padding_side = side
    features = tokenize(tokenizer)
    settings = {"mask_replace_prob": 0.8, "random_replace_prob": 0.1, "seed": 1}
    collator = WholeWordMaskingCollator(tokenizer, wwm_probability=0.5, **settings)
    batch: Batch = collator(features, return_tensors="pt" if form == "pt" else "np")
    if form == "lists":
        batch = {name: values.tolist() for name, values in batch.items()}
    elif form == "ragged":
        keep = batch["attention_mask"] != 0
        batch = {
            name: [row[real].tolist() for row, real in zip(values, keep, strict=True)]
            for name, values in batch.items()
        }
    assert_whole_words_masked(batch, features)
    assert_whole_words_masked(batch, features, tokenizer=tokenizer)
    batch.pop("attention_mask")
    assert_whole_words_masked(batch, features, tokenizer=tokenizer)


def test_features_of_every_form_pass(wordpiece: PreTrainedTokenizerFast) -> None:
    """Word ids with None as the tokenizer gives them, and columns of arrays and of tensors."""
    features = [dict(wordpiece(text)) for text in tiny_corpus(12)]
    for row, text in zip(features, tiny_corpus(12), strict=True):
        row["word_ids"] = wordpiece(text).word_ids()
    batch = WholeWordMaskingCollator(wordpiece, seed=1)(features)
    assert_whole_words_masked(batch, features, tokenizer=wordpiece)
    plain = tokenize(wordpiece)
    for form in (np.array, torch.tensor):
        features = [{name: form(values) for name, values in row.items()} for row in plain]
        assert_whole_words_masked(batch, features, tokenizer=wordpiece)
    assert_whole_words_masked(batch, Dataset.from_list(plain), tokenizer=wordpiece)


@given(kind=kinds, texts=documents)
def test_no_right_batch_is_refused(kind: str, texts: list[str]) -> None:
    """Whatever the tokenizer and the text, what our collator makes passes."""
    features = tokenize(shared(kind), texts)
    if not any(word >= 0 for row in features for word in row["word_ids"]):
        return
    batch = WholeWordMaskingCollator(shared(kind), seed=3)(features)
    assert_whole_words_masked(batch, features, tokenizer=shared(kind))


@pytest.mark.parametrize("kind", ["wordpiece", "byte_bpe"])
def test_whole_words_of_transformers_pass(kind: str) -> None:
    """Their words are ours and the punctuation beside them: more than one, and whole."""
    tokenizer = tiny_tokenizer(kind)
    collator = DataCollatorForLanguageModeling(
        tokenizer,
        whole_word_mask=True,
        mlm_probability=0.3,
        mask_replace_prob=1,
        random_replace_prob=0,
        seed=0,
    )
    texts = [text for text in tiny_corpus(60) if len(text) > 150][:8]
    encoded = tokenizer(texts, truncation=True, max_length=32, return_offsets_mapping=True)
    features = rows_of(encoded)
    batch = collator([dict(row) for row in features])
    for number, row in enumerate(features):
        row["word_ids"] = encoded.word_ids(number)
    assert_whole_words_masked(batch, features, tokenizer=tokenizer)


def test_single_tokens_of_transformers_do_not(wordpiece: PreTrainedTokenizerFast) -> None:
    """Token masking leaves words in halves, which is what it is for."""
    features = tokenize(wordpiece)
    collator = DataCollatorForLanguageModeling(wordpiece, mlm_probability=0.3, seed=0)
    batch = collator([{"input_ids": row["input_ids"]} for row in features])
    with pytest.raises(AssertionError, match=r"row \d: the word '\w+' .* is masked in part"):
        assert_whole_words_masked(batch, features, tokenizer=wordpiece)


@given(kind=kinds, texts=documents, data=st.data())
def test_one_token_too_few_is_found(kind: str, texts: list[str], data: st.DataObject) -> None:
    """A word of which any one token is no target, or is to be seen, is found and named."""
    tokenizer = shared(kind)
    features = tokenize(tokenizer, texts)
    words = [
        (number, word)
        for number, row in enumerate(features)
        for word in sorted(set(row["word_ids"]) - {-1})
        if row["word_ids"].count(word) > 1
    ]
    if not words:
        return
    number, word = data.draw(st.sampled_from(words))
    batch = WholeWordMaskingCollator(tokenizer, wwm_probability=1, seed=0)(features)
    spots = [at for at, each in enumerate(features[number]["word_ids"]) if each == word]
    spot = data.draw(st.sampled_from(spots))
    token = features[number]["input_ids"][spot]
    batch["input_ids"][number, spot] = token
    about = rf"row {number}: the word .* \(positions {spots[0]} to {spots[-1]}\) is "
    with pytest.raises(
        AssertionError, match=about + rf"hidden in part: position {spot} .* {token}"
    ):
        assert_whole_words_masked(batch, features, tokenizer=tokenizer)
    assert_whole_words_masked(batch, features)  # all of it is a target
    batch["labels"][number, spot] = -100
    with pytest.raises(
        AssertionError, match=about + rf"masked in part: position {spot}, .*{token}"
    ):
        assert_whole_words_masked(batch, features)


class BrokenBatch:
    """One row of which ``the unfilmable film`` is known, and a shorter one, masked and broken."""

    def __init__(self) -> None:
        self.tokenizer = tiny_tokenizer()
        self.features = tokenize(self.tokenizer, ["the unfilmable film", "the film"])
        ids = [row["input_ids"] for row in self.features]
        self.hidden = self.tokenizer.mask_token_id
        assert self.features[0]["word_ids"] == [-1, 0, 1, 1, 1, 1, 2, -1]
        self.batch = {
            "input_ids": [list(ids[0]), ids[1] + [0] * 4],
            "labels": [[-100] * 8, [-100] * 8],
            "attention_mask": [[1] * 8, [1] * 4 + [0] * 4],
        }
        for spot in range(2, 6):
            self.hide(0, spot)

    def hide(self, row: int, spot: int, label: int | None = None) -> None:
        """Make a target."""
        inputs, labels = self.batch["input_ids"][row], self.batch["labels"][row]
        labels[spot] = inputs[spot] if label is None else label
        inputs[spot] = self.hidden


def mask_special(broken: BrokenBatch) -> None:
    broken.hide(0, 7)


def mask_padding(broken: BrokenBatch) -> None:
    broken.hide(1, 5)


def show_a_piece(broken: BrokenBatch) -> None:
    broken.batch["input_ids"][0][3] = broken.features[0]["input_ids"][3]


def forget_a_piece(broken: BrokenBatch) -> None:
    show_a_piece(broken)
    broken.batch["labels"][0][3] = -100


def label_wrongly(broken: BrokenBatch) -> None:
    broken.hide(1, 1, label=6)


def shift_labels(broken: BrokenBatch) -> None:
    broken.batch["labels"][0].insert(0, broken.batch["labels"][0].pop())


def hide_without_label(broken: BrokenBatch) -> None:
    broken.batch["input_ids"][1][2] = broken.hidden


def mask_nothing(broken: BrokenBatch) -> None:
    broken.batch["input_ids"][0] = broken.features[0]["input_ids"]
    broken.batch["labels"] = [[-100] * 8, [-100] * 8]


def swap_rows(broken: BrokenBatch) -> None:
    for rows in broken.batch.values():
        rows.reverse()


def lose_a_row(broken: BrokenBatch) -> None:
    broken.batch = {name: rows[:1] for name, rows in broken.batch.items()}


def truncate(broken: BrokenBatch) -> None:
    broken.batch = {name: [row[:6] for row in rows] for name, rows in broken.batch.items()}


def cut_labels(broken: BrokenBatch) -> None:
    broken.batch["labels"] = [row[:6] for row in broken.batch["labels"]]


def lose_labels(broken: BrokenBatch) -> None:
    del broken.batch["labels"]


MISTAKES: dict[Callable[[BrokenBatch], None], str] = {
    forget_a_piece: r"row 0: the word 'unfilmable' \(positions 2 to 5\) is masked in part: "
    r"position 3, token \d+ \('##film'\), is not a target",
    show_a_piece: r"row 0: the word 'unfilmable' \(positions 2 to 5\) is hidden in part: "
    r"position 3 of the input is token \d+ \('##film'\), not the mask token",
    mask_special: r"row 0: position 7, token 3 \('\[SEP\]'\), belongs to no word, but is a target",
    mask_padding: r"row 1, position 5: padding has the label token 0 \('\[PAD\]'\)",
    label_wrongly: r"row 1, position 1: token \d+ \('the'\) has the label token 6 \(",
    shift_labels: r"row 0, position 2: token \d+ \('un'\) is not a target, but now token 4 "
    r"\('\[MASK",
    hide_without_label: r"row 1, position 2: token \d+ \('film'\) is not a target, but now token 4",
    mask_nothing: "no token of the batch is a target: nothing is masked",
    swap_rows: r"row 0 has 8 tokens|row 0, position \d: token",
    lose_a_row: "the batch has 1 rows of 'input_ids' for 2 features",
    truncate: "row 0 has 8 tokens in features, but 6 input_ids and 6 labels in the batch",
    cut_labels: "row 0 has 8 tokens in features, but 8 input_ids and 6 labels in the batch",
    lose_labels: r"the batch has no 'labels', only \['input_ids', 'attention_mask'\]",
}


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__)
def test_mistakes_are_named(mistake: Callable[[BrokenBatch], None]) -> None:
    """Each way to break a right batch is told by row, position, token and word."""
    broken = BrokenBatch()
    assert_whole_words_masked(broken.batch, broken.features, tokenizer=broken.tokenizer)
    mistake(broken)
    with pytest.raises(AssertionError, match=MISTAKES[mistake]):
        assert_whole_words_masked(broken.batch, broken.features, tokenizer=broken.tokenizer)


def test_special_tokens_written_in_a_text_are_no_words(wordpiece: PreTrainedTokenizerFast) -> None:
    """Tokenizers give them word ids; with the tokenizer at hand, they must not be targets."""
    encoded = wordpiece("the [SEP] film")
    features = [{"input_ids": encoded["input_ids"], "word_ids": encoded.word_ids()}]
    assert features[0]["word_ids"] == [None, 0, 1, 2, None]
    batch = {"input_ids": [list(encoded["input_ids"])], "labels": [[-100, -100, 3, -100, -100]]}
    batch["input_ids"][0][2] = wordpiece.mask_token_id
    assert_whole_words_masked(batch, features)
    with pytest.raises(
        AssertionError, match=r"row 0: position 2, token 3 \('\[SEP\]'\), belongs to no"
    ):
        assert_whole_words_masked(batch, features, tokenizer=wordpiece)


def test_no_rows_prove_nothing() -> None:
    """A batch of no rows has no mask that could be wrong."""
    with pytest.raises(AssertionError, match="nothing is masked"):
        assert_whole_words_masked({"input_ids": [], "labels": []}, [])


def test_positions_are_those_of_the_batch() -> None:
    """With padding on the left, a position counts it."""
    broken = BrokenBatch()
    for name, rows in broken.batch.items():
        broken.batch[name] = [rows[0], rows[1][4:] + rows[1][:4]]
    broken.hide(1, 4)
    with pytest.raises(AssertionError, match=r"row 1: position 4, token 2, belongs to no word"):
        assert_whole_words_masked(broken.batch, broken.features)


def test_features_without_words_are_refused(wordpiece: PreTrainedTokenizerFast) -> None:
    """What the caller forgot is no failure of the collator, and the row is named."""
    features = tokenize(wordpiece)
    batch = WholeWordMaskingCollator(wordpiece, seed=0)(features)
    features[1].pop("word_ids")
    with pytest.raises(
        ValueError, match=r"row 1 of features has no 'word_ids', only \['input_ids'"
    ):
        assert_whole_words_masked(batch, features)


# Reproducible masks


def ours(**settings: Any) -> WholeWordMaskingCollator:
    """Make a collator that is right."""
    return WholeWordMaskingCollator(tiny_tokenizer(), wwm_probability=0.4, seed=0, **settings)


def mask_by(spot_of: Callable[[Row, int, list[Row]], int]) -> Callable[[list[Row]], Batch]:
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


class Counting:
    """Masks the next token with each call."""

    calls = 0

    def __call__(self, features: list[Row]) -> Batch:
        self.calls += 1
        return mask_by(lambda *_: self.calls)(features)


class Forgetful:
    """Masks by what a copy, as a worker gets it, does not have."""

    def __init__(self) -> None:
        self.spot = 2

    def __getstate__(self) -> dict[str, Any]:
        return {"spot": 3}

    def __call__(self, features: list[Row]) -> Batch:
        return mask_by(lambda *_: self.spot)(features)


def test_seeded_collators_pass(tokenizer: PreTrainedTokenizerFast) -> None:
    """Ours does in each family and epoch and on each side, and leaves random state where it was."""
    features = tokenize(tokenizer)
    features = [
        row | {"word_ids": [np.nan if w < 0 else w for w in row["word_ids"]]} for row in features
    ]
    for side in ("left", "right"):
        tokenizer.padding_side = side
        collator = WholeWordMaskingCollator(
            tokenizer, seed=0, random_replace_prob=0.5, mask_replace_prob=0.5
        )
        collator.set_epoch(3)
        states = random.getstate(), torch.get_rng_state(), np.random.get_state()[1].tolist()  # noqa: NPY002
        assert_masks_reproducible(collator, features, tokenizer=tokenizer)
        assert random.getstate() == states[0]
        assert torch.equal(torch.get_rng_state(), states[1])
        assert np.random.get_state()[1].tolist() == states[2]  # noqa: NPY002


def test_workers_can_be_asked() -> None:
    """In a worker ours masks the same; a collator that asks which worker it is does not."""
    features = tokenize(tiny_tokenizer())
    assert_masks_reproducible(ours(), features, num_workers=1)

    def by_worker(*_: Any) -> int:
        return 1 if torch.utils.data.get_worker_info() is None else 2

    assert_masks_reproducible(mask_by(by_worker), features)
    with pytest.raises(AssertionError, match=r"row 0, position 1, .* in a worker; a mask must"):
        assert_masks_reproducible(mask_by(by_worker), features, num_workers=1)


IMPURE: dict[str, tuple[Callable[[], Any], str]] = {
    "follows torch": (
        lambda: WholeWordMaskingCollator(tiny_tokenizer(), wwm_probability=0.4),
        "in a second call",
    ),
    "draws as transformers": (
        lambda: DataCollatorForLanguageModeling(tiny_tokenizer(), mlm_probability=0.4, seed=0),
        "in a second call",
    ),
    "draws from NumPy": (lambda: mask_by(lambda *_: np.random.randint(8)), "in a second call"),  # noqa: NPY002
    "looks at torch's seed": (lambda: mask_by(lambda *_: torch.initial_seed()), "second call"),
    "counts calls": (Counting, "in a second call"),
    "counts rows": (lambda: mask_by(lambda _, number, __: number), "in reverse order"),
    "looks at the batch": (lambda: mask_by(lambda *args: len(args[2])), "as a batch of its own"),
    "looks at the longest": (
        lambda: mask_by(lambda _, __, rows: max(len(row["input_ids"]) for row in rows)),
        "as a batch of its own",
    ),
    "keeps a token": (lambda: keep_by_company, "as a batch of its own"),
    "loses state": (Forgetful, "by a copy of the collator"),
}


@pytest.mark.parametrize("name", IMPURE)
def test_what_depends_on_more_than_the_row_is_found(name: str) -> None:
    """Generators, seeds, counts, company and lost state each make a mask that is not the row's."""
    make, way = IMPURE[name]
    features = [{"input_ids": row["input_ids"]} for row in tokenize(tiny_tokenizer())]
    if name == "follows torch":
        features = tokenize(tiny_tokenizer())
    found = rf"row \d+, position \d+, token \d+ \('.*'\): input \d+ and label .* {way}; a mask must"
    with pytest.raises(AssertionError, match=found):
        assert_masks_reproducible(make(), features, tokenizer=tiny_tokenizer())


def test_rows_that_a_collator_changes_are_found() -> None:
    """A column that is taken out, as the recipe does, or a tensor that is masked in place."""

    def take_out(features: list[Row]) -> Batch:
        for row in features:
            row.pop("word_ids")
        return ours_without_words(features)

    def write(features: list[Row]) -> Batch:
        batch = ours_without_words(features)
        features[2]["input_ids"][1] = 4
        return batch

    ours_without_words = mask_by(lambda *_: 1)
    features = [
        {name: torch.tensor(values) for name, values in row.items()}
        for row in tokenize(tiny_tokenizer())
    ]
    before = copy.deepcopy(features)
    with pytest.raises(AssertionError, match="row 0: the collator changes 'word_ids' of its own"):
        assert_masks_reproducible(take_out, features)
    with pytest.raises(AssertionError, match="row 2: the collator changes 'input_ids' of its own"):
        assert_masks_reproducible(write, features)
    for row, old in zip(features, before, strict=True):
        assert row.keys() == old.keys()
        assert all(torch.equal(row[name], old[name]) for name in row)


def test_a_collator_without_targets_is_not_called_reproducible() -> None:
    """The same nothing each time proves nothing."""
    features = tokenize(tiny_tokenizer())
    ids = [row["input_ids"] for row in features]
    batch = {"input_ids": ids, "labels": [[-100] * len(row) for row in ids]}
    with pytest.raises(AssertionError, match="nothing is masked"):
        assert_masks_reproducible(lambda _: batch, features)


# Chunks


@given(
    kind=kinds,
    texts=documents,
    chunk_size=st.integers(1, 9),
    data=st.data(),
)
def test_right_chunks_pass_and_a_lost_token_is_found(
    kind: str, texts: list[str], chunk_size: int, data: st.DataObject
) -> None:
    """Ours and the reference keep everything; without any one token, or two swapped, it fails."""
    tokens = tokenize_with_word_ids({"text": texts}, shared(kind))
    examples = {name: [row.tolist() for row in rows] for name, rows in tokens.items()}
    for chunker in (group_texts, reference_group_texts):
        chunks = chunker(examples, chunk_size=chunk_size, remainder="keep")
        assert_tokens_kept(examples, chunks, tokenizer=shared(kind))
    broken = copy.deepcopy(chunks)
    place = data.draw(st.integers(0, len(broken["input_ids"]) - 1))
    spot = data.draw(st.integers(0, len(broken["input_ids"][place]) - 1))
    for column in broken.values():
        del column[place][spot]
    with pytest.raises(AssertionError, match=r"tokens are lost|should follow"):
        assert_tokens_kept(examples, broken)


def test_documents_and_chunks_come_in_any_form() -> None:
    """Tables, datasets, columns and rows, and rows that are padded."""
    tokenizer = tiny_tokenizer()
    examples = tokenize_with_word_ids({"text": tiny_corpus(20)}, tokenizer)
    table = pa.table({name: [row.tolist() for row in rows] for name, rows in examples.items()})
    rows = Dataset.from_dict(table.to_pydict())
    mapped = rows.map(group_texts, batched=True, batch_size=None, fn_kwargs={"remainder": "keep"})
    chunked = group_texts(table, chunk_size=16, remainder="keep")
    padded = tokenizer.pad({"input_ids": chunked["input_ids"].to_pylist()}, return_tensors="np")
    for before in (examples, table, rows, rows.with_format("torch"), list(rows)):
        for after in (chunked, mapped, mapped.with_format("numpy"), list(mapped), padded):
            assert_tokens_kept(before, after)


def recipe(examples: dict[str, list[list[int]]], size: int) -> dict[str, list[list[int]]]:
    """Chunk as the recipe does: word ids as they are, the remainder dropped."""
    joined = {name: sum(rows, []) for name, rows in examples.items()}  # noqa: RUF017 (the recipe)
    total = len(joined["input_ids"]) // size * size
    return {
        name: [flat[at : at + size] for at in range(0, total, size)]
        for name, flat in joined.items()
    }


def test_mistakes_of_chunkers_are_named() -> None:
    """What is lost, added, moved, joined and cut is told with chunk, position and token."""
    tokenizer = tiny_tokenizer()
    tokens = tokenize_with_word_ids({"text": ["the unfilmable film", "film", "a film"]}, tokenizer)
    examples = {name: [row.tolist()[1:-1] for row in rows] for name, rows in tokens.items()}
    right = group_texts(examples, chunk_size=4, remainder="keep", labels=False)
    assert right["word_ids"] == [[0, 1, 1, 1], [0, 1, 2, 3], [0]]

    def found(message: str, chunks: Any, **options: Any) -> None:
        with pytest.raises(AssertionError, match=message):
            assert_tokens_kept(examples, chunks, tokenizer=tokenizer, **options)

    lost = r"the last 1 of 9 tokens are lost, from example 2, position 1, token \d+ \('film'\) on; "
    found(lost + "max_dropped is 0", group_texts(examples, chunk_size=4))
    joined = r"chunk 1, position 2, token \d+ \('film'\), is of one word with the token before it "
    found(r"the last 1 of 9", recipe(examples, 4))
    one_word = copy.deepcopy(examples)
    one_word["word_ids"][0] = [0, 1, 1, 1, 1, 0]
    found(
        joined + r"by its word_ids, but example 1, position 0, .* was the first of a word",
        recipe(one_word, 4),
        max_dropped=3,
    )
    found(
        r"chunk 0, position 3, .* is the first of a word by its word_ids, but example 0, pos",
        right | {"word_ids": [[0, 1, 1, 2], *right["word_ids"][1:]]},
    )
    found(
        r"chunk 1, position 1, .* is of no word by its word_ids, but example 0, position 5,",
        right | {"word_ids": [right["word_ids"][0], [0, -1, 1, 2], [0]]},
    )
    found(
        r"chunk 0, position 0, .* is not example 0, position 0, token .* 'input_ids' should follow",
        {name: rows[::-1] for name, rows in right.items()},
    )
    found(
        r"chunk 3, position 0, .* on: 1 tokens that no example has",
        {name: [*rows, rows[2]] for name, rows in right.items()},
    )
    types = [[0] * 4, [0, 0, 1, 0], [0]]
    found("whose 'token_type_ids' should follow", right | {"token_type_ids": types})
    found("the last 9 of 9 tokens are lost", {"input_ids": []})
    # By batches, as map goes by default, remainders are lost in the middle.
    halves = [
        {name: rows[part] for name, rows in examples.items()} for part in (slice(2), slice(2, 3))
    ]
    parts = [group_texts(half, chunk_size=2, labels=False) for half in halves]
    batched = {name: [row for part in parts for row in part[name]] for name in examples}
    found(r"chunk 3, position 0, .* is not example 1, position 0", batched, max_dropped=1)


@given(kind=kinds, texts=documents, chunk_size=st.integers(2, 40), data=st.data())
def test_packed_documents_pass_and_a_lost_token_is_found(
    kind: str, texts: list[str], chunk_size: int, data: st.DataObject
) -> None:
    """Ours keeps all of them, in any order; without any one token, or two in one, it fails."""
    tokens = tokenize_with_word_ids({"text": texts}, shared(kind))
    examples = {name: [row.tolist() for row in rows] for name, rows in tokens.items()}
    packed = pack_texts(examples, chunk_size=chunk_size)
    order = data.draw(st.permutations(range(len(packed["input_ids"]))))
    rows = {name: [column[row] for row in order] for name, column in packed.items()}
    assert_documents_kept(examples, rows, tokenizer=shared(kind))
    place = data.draw(st.integers(0, len(order) - 1))
    spot = data.draw(st.integers(0, len(rows["input_ids"][place]) - 1))
    broken = copy.deepcopy(rows)
    for column in broken.values():
        del column[place][spot]
    with pytest.raises(AssertionError, match=r"are a document in no row"):
        assert_documents_kept(examples, broken)
    if rows["document_ids"][place][-1]:
        rows["document_ids"][place] = [0] * len(rows["document_ids"][place])
        with pytest.raises(AssertionError, match=r"are a document in no row"):
            assert_documents_kept(examples, rows)


def test_packed_rows_come_in_any_form() -> None:
    """Tables, datasets, columns and rows, and rows that are padded on either side."""
    tokenizer = tiny_tokenizer()
    examples = tokenize_with_word_ids({"text": tiny_corpus(20)}, tokenizer)
    table = pa.table({name: [row.tolist() for row in rows] for name, rows in examples.items()})
    rows = Dataset.from_dict(table.to_pydict())
    packed = pack_texts(table, chunk_size=24)
    mapped = rows.map(pack_texts, batched=True, batch_size=None)
    forms: list[Any] = [packed, packed.to_pydict(), mapped, list(mapped.with_format("torch"))]
    width = max(map(len, packed["input_ids"].to_pylist()))
    for fill in (lambda row, pad: row + pad, lambda row, pad: pad + row):
        padded = {
            name: [fill(row, [0] * (width - len(row))) for row in column]
            for name, column in packed.to_pydict().items()
        }
        forms.append({name: np.array(column) for name, column in padded.items()})
    for before in (examples, table, rows, list(rows)):
        for after in forms:
            assert_documents_kept(before, after, tokenizer=tokenizer)


def test_mistakes_of_packers_are_named() -> None:
    """What is lost, split, doubled, in another's place or under its number is told, with where."""
    tokenizer = tiny_tokenizer()
    tokens = tokenize_with_word_ids({"text": ["the unfilmable film", "film", "a film"]}, tokenizer)
    examples = {name: [row.tolist()[1:-1] for row in rows] for name, rows in tokens.items()}
    right = pack_texts(examples, chunk_size=7)
    assert right["document_ids"] == [[0, 0, 0, 0, 0, 0, 1], [0, 0]]
    assert right["word_ids"] == [[0, 1, 1, 1, 1, 2, 3], [0, 1]]
    assert_documents_kept(examples, right)

    def found(message: str, rows: Any) -> None:
        with pytest.raises(AssertionError, match=message):
            assert_documents_kept(examples, rows, tokenizer=tokenizer)

    film = r"example 1, position 0, token \d+ \('film'\) on: 1 tokens are a"
    found(film + " document in no row", {name: rows[1:] for name, rows in right.items()})
    found(film, right | {"document_ids": [[0] * 7, [0, 0]]})
    found(
        r"example 2, position 0, token .* on: 2 tokens are a document in",
        right | {"document_ids": [right["document_ids"][0], [0, 1]]},
    )
    found(
        "are a document in no row",
        group_texts(examples, chunk_size=4, remainder="keep", documents=True, labels=False),
    )
    found(
        r"row 0, position 6, token \d+ \('film'\), has a lower number than before it",
        right | {"document_ids": [[1, 1, 1, 1, 1, 1, 0], [0, 0]]},
    )
    found(
        r"row 0, position 2, .*, has a lower number",
        right | {"document_ids": [[0, 1, 0, 0, 0, 0, 1], [0, 0]]},
    )
    found(
        r"row 0, position 6, token \d+ \('film'\), is of a word with another document",
        right | {"word_ids": [[0, 1, 1, 1, 1, 2, 2], [0, 1]]},
    )
    found(
        r"example 0, position 0, token .* on: 6 tokens",
        right | {"word_ids": [[0, 1, 1, 2, 2, 3, 4], [0, 1]]},
    )
    found(
        r"example 2, position 0, .* on: 2 tokens",
        right | {"input_ids": [right["input_ids"][0], right["input_ids"][1][::-1]]},
    )
    found(
        r"row 1, position 0, token .* on: a document that is in rows more than in examples",
        {name: [*rows, rows[1]] for name, rows in right.items()},
    )
    types = [[0] * 7, [0, 1]]
    found("are a document in no row", right | {"token_type_ids": types})
    with pytest.raises(ValueError, match="rows have no 'document_ids', which tell the documents"):
        assert_documents_kept(examples, examples)


# Losses


@pytest.fixture(name="batch")
def _batch(wordpiece: PreTrainedTokenizerFast) -> Batch:
    """Rows with unequal numbers of targets, the last one without."""
    batch = WholeWordMaskingCollator(wordpiece, seed=0)(tokenize(wordpiece)[:6])
    batch["labels"][-1] = -100
    return batch


def plainly(model: Any, batch: Batch, num_items: int) -> torch.Tensor:
    """Sum over the masked tokens and divide, in the plainest way."""
    labels = batch["labels"]
    logits = model(**{name: batch[name] for name in batch if name != "labels"}).logits
    losses = torch.nn.functional.cross_entropy(logits.mT, labels, reduction="none")
    return losses.sum() / num_items


@pytest.mark.parametrize("architecture", ["bert", "modernbert", "deberta-v2"])
def test_exact_losses_pass_and_the_model_stays_as_it_was(architecture: str, batch: Batch) -> None:
    """Plain, ours, sparse and through `Trainer`; modes, gradients and random state stay."""
    model = tiny_model(tiny_tokenizer(), architecture=architecture).train()
    model.base_model.eval()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    for compute_loss in (
        plainly,
        lambda model, batch, n: masked_lm_loss(model(**batch), batch["labels"], n),
    ):
        assert_same_loss(compute_loss, model, batch)
    with sparse_prediction(model), tempfile.TemporaryDirectory() as folder:
        assert_same_loss(lambda m, b, n: m(**b, num_items_in_batch=n).loss, model, batch)
        assert torch.equal(torch.get_rng_state(), state)
        trainer = Trainer(model, TrainingArguments(folder, use_cpu=True))
        assert_same_loss(
            lambda m, b, n: trainer.compute_loss(m, b, num_items_in_batch=n), model, batch
        )
    assert [module.training for module in model.modules()] == modes
    assert all(each.grad is None for each in model.parameters())
    arrays = {name: values.numpy() for name, values in batch.items()}
    assert_same_loss(plainly, model, arrays)
    assert_same_loss(lambda *args: plainly(*args).item(), model, arrays, gradients=False)


def stop_gradient(model: Any, batch: Batch, num_items: int) -> torch.Tensor:
    """Give the right loss of another gradient."""
    weights = model.bert.embeddings.position_embeddings.weight
    return plainly(model, batch, num_items) + weights.sum() - weights.sum().detach()


def shift(model: Any, batch: Batch, num_items: int) -> torch.Tensor:
    """Predict the next token."""
    return plainly(model, batch | {"labels": batch["labels"].roll(-1, 1)}, num_items)


def mean_where_there_is_one(model: Any, batch: Batch, _: int) -> torch.Tensor:
    """Average over the part, as most models do, without NaN."""
    return masked_lm_loss(model(**batch), batch["labels"])


def mean_of_rows(model: Any, batch: Batch, num_items: int) -> torch.Tensor:
    """Weigh rows the same, whatever is masked in them."""
    counts = (batch["labels"] != -100).sum(1)
    rows = [{name: each[i : i + 1] for name, each in batch.items()} for i in range(len(counts))]
    losses = [
        plainly(model, row, int(count)) for row, count in zip(rows, counts, strict=True) if count
    ]
    return sum(losses, torch.zeros(())) / len(counts)


INEXACT = {
    "mean of the part": (mean_where_there_is_one, r"row 0, \d+ of the step's \d+ masked tokens: "),
    "model's own": (lambda model, batch, _: model(**batch).loss, r"row 0, .* the exact one"),
    "mean of means": (mean_of_rows, "the whole batch, .* the loss is .*, the exact one"),
    "sum": (lambda m, b, n: plainly(m, b, n) * n, "the whole batch, .* the loss is"),
    "all positions": (
        lambda m, b, n: plainly(m, b | {"labels": b["input_ids"]}, n),
        "the whole batch, .* the loss is",
    ),
    "shifted": (shift, "the whole batch, .* the loss is"),
    "not a number": (
        lambda m, b, n: plainly(m, b, n) if (b["labels"] != -100).any() else torch.tensor(np.nan),
        "row 5, 0 of the step's .* the loss is nan, the exact one 0",
    ),
    "no gradient": (lambda m, b, n: plainly(m, b, n).detach(), "its gradient is off by"),
    "other gradient": (
        stop_gradient,
        "most of all for 'bert.embeddings.position_embeddings.weight'",
    ),
}


@pytest.mark.parametrize("name", INEXACT)
def test_inexact_losses_are_found(name: str, bert: PreTrainedModel, batch: Batch) -> None:
    """Each wrong way to divide, sum or differentiate is told with its row and both figures."""
    compute_loss, message = INEXACT[name]
    with pytest.raises(AssertionError, match=message):
        assert_same_loss(compute_loss, bert, batch)


def test_a_batch_without_targets_is_no_test(bert: PreTrainedModel, batch: Batch) -> None:
    """There is no loss to compare."""
    batch["labels"][:] = -100
    with pytest.raises(ValueError, match="no masked token: all its labels are -100"):
        assert_same_loss(plainly, bert, batch)


# Interrupted runs


def loop(
    output_dir: str,
    resume: bool,  # noqa: FBT001
    *,
    saves: str = "weights moments",
    fault: str = "",
) -> Any:
    """Train some numbers in nine steps, with checkpoints that hold what `saves` names."""
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    folder, step, history = Path(output_dir), 0, []
    folder.mkdir(exist_ok=True)
    if resume and (folder / "state").exists():
        state = torch.load(folder / "state", weights_only=True)
        step, history = state["step"], state["history"]
        if "weights" in saves:
            model.load_state_dict(state["weights"])
        if "moments" in saves:
            optimizer.load_state_dict(state["moments"])
    if fault == "ignores SIGTERM":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    elif resume and fault == "fails to resume":
        raise ValueError("on purpose")
    elif fault == "exits":
        raise SystemExit(3)
    while step < 9:
        inputs = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
        loss = model(inputs).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1
        times = ["seconds", "started"] if "started" in saves else ["seconds"]
        history.append({"loss": loss.item()} | dict.fromkeys(times, time.perf_counter()))
        if step % 2 == 0:
            weights, moments = model.state_dict(), optimizer.state_dict()
            state = {"step": step, "history": history, "weights": weights, "moments": moments}
            torch.save(state, folder / "new")
            (folder / "new").rename(folder / "state")
    if fault == "returns an object":
        return {"model": model, "optimizer": optimizer}
    return None if fault == "returns nothing" else (model, {"history": history})


def sit_still(output_dir: str, resume: bool) -> int:  # noqa: FBT001
    """Train nothing."""
    return 1


@pytest.fixture(name="forked")
def _forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare each run the imports of a fresh process."""
    context = multiprocessing.get_context("fork")
    monkeypatch.setattr(runs.multiprocessing, "get_context", lambda _: context)


@pytest.mark.usefixtures("forked")
def test_runs_that_resume_exactly_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From each step after the first checkpoint on, and nothing is left behind."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for at_step in (None, 2, 3, 8):
        assert_resumes_exactly(loop, at_step=at_step)
    assert_resumes_exactly(loop, by="SIGTERM")
    started = functools.partial(loop, saves="weights moments started")
    assert_resumes_exactly(started, ignore=["started"])
    assert list(tmp_path.iterdir()) == []
    assert multiprocessing.active_children() == []


UNLIKE: dict[str, tuple[str, dict[str, Any], str]] = {
    "moments": (
        "weights",
        {},
        r"step 6 of 9 and resumed, .* otherwise: \d+ of 11 values differ, first '\[0\].weight', in",
    ),
    "weights": ("moments", {}, r"first '\[0\].weight', in 3 of 3 numbers"),
    "checkpoint": (
        "weights moments",
        {"at_step": 1},
        "before step 1 of 9 and resumed, the run took 9 steps: it began again",
    ),
    "times": (
        "weights moments started",
        {},
        r"9 of 20 .* first '\[1\].history\[0\].started', \d+\.\d+ uninter",
    ),
}


@pytest.mark.usefixtures("forked")
def test_a_run_that_does_not_stop_when_asked_is_found() -> None:
    """SIGTERM must end a run before its end."""
    train = functools.partial(loop, fault="ignores SIGTERM")
    with pytest.raises(AssertionError, match="train went on to its end after SIGTERM before st"):
        assert_resumes_exactly(train, by="SIGTERM")


@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize("name", UNLIKE)
def test_runs_that_do_not_are_found(name: str) -> None:
    """Forgotten state is named with the first value that differs; starting again is no pass."""
    saves, options, message = UNLIKE[name]
    with pytest.raises(AssertionError, match=message):
        assert_resumes_exactly(functools.partial(loop, saves=saves), **options)


NO_TEST: dict[str, tuple[Any, dict[str, Any], type[Exception], str]] = {
    "lambda": (lambda _, __: 1, {}, ValueError, "train is '<lambda>', which another process"),
    "no steps": (sit_still, {}, ValueError, "train took no step of a torch.optim.Optimizer"),
    "too late": (loop, {"at_step": 9}, ValueError, "at_step is 9; train takes steps 0 to 8"),
    "nothing": (
        functools.partial(loop, fault="returns nothing"),
        {},
        ValueError,
        "train returned nothing to compare",
    ),
    "an object": (
        functools.partial(loop, fault="returns an object"),
        {},
        RuntimeError,
        r"(?s)train failed:.*TypeError: train returned a AdamW as 'optimizer'; return models",
    ),
    "failure": (
        functools.partial(loop, fault="fails to resume"),
        {"at_step": 1},
        RuntimeError,
        r"(?s)train failed:\nTraceback .*ValueError: on purpose",
    ),
    "exit": (
        functools.partial(loop, fault="exits"),
        {},
        RuntimeError,
        "process ended with exit code 3 and no result; its standard error may say why",
    ),
    "slow": (loop, {"timeout": 0.0}, TimeoutError, "train took over 0.0 s, and was killed"),
}


@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize("name", NO_TEST)
def test_what_cannot_be_tested_is_no_failure_of_a_run(name: str) -> None:
    """A mistake in the test is told apart from a run that resumes inexactly."""
    train, options, error, message = NO_TEST[name]
    with pytest.raises(error, match=message):
        assert_resumes_exactly(train, **options)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (1.0, 1.0, True),
        (1.0, 1, False),
        (float("nan"), float("nan"), True),
        (0.1 + 0.2, 0.3, False),
        (torch.tensor([1.0, float("nan")]), torch.tensor([1.0, float("nan")]), True),
        (torch.tensor(0.0), torch.tensor(-0.0), False),
        (torch.tensor(1.0), torch.tensor([1.0]), False),
        (torch.ones(2), torch.ones(2, dtype=torch.float64), False),
        (torch.zeros(2), torch.zeros(2, dtype=torch.int32), False),
        (torch.ones(2, dtype=torch.bfloat16), torch.ones(2, dtype=torch.bfloat16), True),
        (torch.tensor([True]), torch.tensor([False]), False),
        (torch.zeros(0), torch.zeros(0), True),
        (torch.ones(2), "nothing", False),
    ],
)
def test_equal_means_to_the_bit(one: Any, other: Any, same: bool) -> None:  # noqa: FBT001
    """NaN is NaN, 0 is not -0, and a type is part of a value."""
    assert runs._same(one, other) == same
    assert same or runs._difference(one, other)


def test_values_are_found_wherever_they_are() -> None:
    """Models, dataclasses, named tuples, arrays and lists come apart by name."""
    model = torch.nn.Linear(1, 1)
    output = torch.return_types.max((torch.tensor([1]), torch.tensor([0])))
    value = {
        "model": model,
        "rows": [np.float32(1), {"seconds": 1}],
        "max": tuple(output),
        "no": None,
    }
    assert list(dict(runs._flatten(value, "", runs._TIMINGS))) == [
        "model.weight",
        "model.bias",
        "rows[0]",
        "max[0]",
        "max[1]",
        "no",
    ]


@pytest.mark.slow
def test_our_own_training_passes_in_fresh_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three processes started by spawn, as in the `downstream` session (``pytest -m slow``)."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "downstream"))
    import film_reviews

    assert_resumes_exactly(film_reviews.adapt)


def test_assertions_stand_where_the_test_calls_them() -> None:
    """A failure shows the line of the test: every function that can raise one hides itself."""
    hidden = []
    for path in sorted(Path(runs.__file__).parent.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and "raise AssertionError" in ast.unparse(node):
                assert "__tracebackhide__ = True" in map(ast.unparse, node.body), node.name
                hidden.append(node.name)
    assert len(hidden) >= 5
