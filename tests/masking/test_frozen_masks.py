"""Masks frozen into rows depend on (seed, row) alone, whatever the collator draws from."""

from __future__ import annotations

import copy
import functools
import random
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
from tokenizers import AddedToken
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    default_data_collator,
)

from mlmadapt import (
    WholeWordMaskingCollator,
    group_texts,
    insert_random_mask,
    tokenize_with_word_ids,
)
from mlmadapt.masking.frozen_masks import collate_seeded, purify, seeded
from mlmadapt.testing import tiny_corpus, tiny_tokenizer
from tests.masking.reference_masking import random_states, reference_key, reference_mask

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from datasets import Dataset

Columns = dict[str, list[list[int]]]
tokenizer = tiny_tokenizer("wordpiece")
seeds = pytest.mark.parametrize("seed", [0, 7])


def course_collator(features: list[dict[str, Any]], *, mask_token_id: int) -> dict[str, Any]:
    """Mask as the Hugging Face course does: in the caller's rows, from NumPy's global generator."""
    for feature in features:
        word_ids = feature.pop("word_ids")
        words = sorted({int(word) for word in word_ids if word is not None and word >= 0})
        chosen = np.random.binomial(1, 0.3, len(words))  # noqa: NPY002
        labels = [-100] * len(word_ids)
        for word in np.array(words, int)[chosen > 0]:
            for i in (i for i, number in enumerate(word_ids) if number == word):
                labels[i] = int(feature["input_ids"][i])
                feature["input_ids"][i] = mask_token_id
        feature["labels"] = labels
    random.random()  # noqa: S311
    return default_data_collator(features)


OURS = WholeWordMaskingCollator(tokenizer, mask_replace_prob=0.8, random_replace_prob=0.1)
COLLATORS: dict[str, Any] = {
    "ours": OURS,
    "tokens": DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.3),
    "tokens, seeded": DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.3, seed=5),
    "tokens, NumPy": DataCollatorForLanguageModeling(
        tokenizer, mlm_probability=0.3, seed=5, return_tensors="np"
    ),
    "course": functools.partial(course_collator, mask_token_id=tokenizer.mask_token_id),
}
collators = pytest.mark.parametrize("name", COLLATORS)


@functools.cache
def examples(chunk_size: int = 16) -> Columns:
    """Return some rows of one length and a shorter one."""
    tokens = tokenize_with_word_ids({"text": tiny_corpus(20)}, tokenizer)
    return dict(group_texts(dict(tokens), chunk_size=chunk_size, remainder="keep", labels=False))


def listed(frozen: Any) -> Columns:
    """Return columns as lists of lists."""
    if isinstance(frozen, pa.Table):
        return frozen.to_pydict()
    return {name: [np.asarray(row).tolist() for row in rows] for name, rows in frozen.items()}


def frozen_by_map(dataset: Dataset, collator: Any, **options: Any) -> Columns:
    """Freeze a dataset."""
    frozen = dataset.map(
        insert_random_mask,
        batched=True,
        fn_kwargs={"data_collator": collator, "prefix": ""},
        remove_columns=dataset.column_names,
        **options,
    )
    return {name: frozen.with_format(None)[name][:] for name in frozen.column_names}


@seeds
def test_ours_is_the_reference(seed: int) -> None:
    """The collator's own seed and epoch play no part; the key is that of (seed, "frozen")."""
    rows = examples()
    frozen = listed(insert_random_mask(rows, OURS, seed=seed))
    for i, (ids, word_ids) in enumerate(zip(rows["input_ids"], rows["word_ids"], strict=True)):
        assert (frozen["masked_input_ids"][i], frozen["masked_labels"][i]) == reference_mask(
            {"input_ids": ids, "word_ids": word_ids},
            tokenizer,
            key=reference_key(seed, "frozen"),
            mask_replace_prob=0.8,
            random_replace_prob=0.1,
        )
    elsewhere = WholeWordMaskingCollator(
        tokenizer, mask_replace_prob=0.8, random_replace_prob=0.1, seed=3, pad_to_multiple_of=64
    )
    elsewhere.set_epoch(2)
    assert listed(insert_random_mask(rows, elsewhere, seed=seed)) == frozen


@seeds
@pytest.mark.parametrize("own_seed", [None, 5])
def test_foreign_collators_draw_from_the_row(seed: int, own_seed: int | None) -> None:
    """Each row gets what the bare collator gives it under the key of (seed, "frozen", tokens)."""
    rows = examples()
    collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.3, seed=own_seed)
    collator([{"input_ids": [5, 6, 7]}])  # a seeded one keeps a generator from then on
    frozen = listed(insert_random_mask(rows, collator, seed=seed, prefix=""))
    bare = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.3)
    for i, tokens in enumerate(rows["input_ids"]):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(reference_key(seed, "frozen", *tokens))
            batch = bare([{name: rows[name][i] for name in rows if name != "word_ids"}])
        assert {name: values[0].tolist() for name, values in batch.items()} == {
            name: column[i] for name, column in frozen.items()
        }


@collators
def test_what_is_frozen(name: str) -> None:
    """The model's columns under the prefix, token_type_ids too, and labels; no word_ids."""
    rows = examples()
    before = copy.deepcopy(rows)
    frozen = insert_random_mask(rows, COLLATORS[name])
    assert rows == before
    names = ["attention_mask", "input_ids", "labels", "token_type_ids"]
    assert sorted(frozen) == [f"masked_{name}" for name in names]
    bare = insert_random_mask(rows, COLLATORS[name], prefix="")
    assert listed(bare) == {n.removeprefix("masked_"): v for n, v in listed(frozen).items()}
    assert listed(bare)["token_type_ids"] == rows["token_type_ids"]
    masked = 0
    for tokens, inputs, labels in zip(
        rows["input_ids"], bare["input_ids"], bare["labels"], strict=True
    ):
        targets = np.asarray(labels) != -100
        masked += targets.sum()
        assert len(inputs) == len(labels) == len(tokens)
        assert (np.asarray(labels)[targets] == np.array(tokens)[targets]).all()
        assert (np.asarray(inputs)[~targets] == np.array(tokens)[~targets]).all()
    assert masked > 20
    assert listed(insert_random_mask(rows, COLLATORS[name], seed=1, prefix="")) != listed(bare)


@collators
def test_map_cannot_change_a_mask(name: str) -> None:
    """Batch sizes, processes, order and formats of `map` give each row the same."""
    dataset = datasets.Dataset.from_dict(examples())
    expected = frozen_by_map(dataset, COLLATORS[name])
    for batch_size in (1, 7, None):
        assert frozen_by_map(dataset, COLLATORS[name], batch_size=batch_size) == expected
    for num_proc in (1, 2):
        assert frozen_by_map(dataset, COLLATORS[name], num_proc=num_proc, batch_size=5) == expected
    for form in ("numpy", "torch", "arrow"):
        assert frozen_by_map(dataset.with_format(form), COLLATORS[name], batch_size=9) == expected
    order = np.random.default_rng(0).permutation(len(dataset))
    shuffled = frozen_by_map(dataset.select(order), COLLATORS[name])
    assert shuffled == {column: [rows[i] for i in order] for column, rows in expected.items()}


@collators
def test_map_serves_each_seed_its_own_rows(name: str, tmp_path: Path) -> None:
    """On disk, where `map` caches: another seed is computed, the same one is not computed again."""
    datasets.Dataset.from_dict(examples()).save_to_disk(tmp_path / "rows")
    dataset = datasets.load_from_disk(tmp_path / "rows")
    files, rows = [], []
    for seed in (0, 1, 0):
        frozen = dataset.map(
            insert_random_mask,
            batched=True,
            fn_kwargs={"data_collator": COLLATORS[name], "seed": seed},
            remove_columns=dataset.column_names,
        )
        files.append(frozen.cache_files[0]["filename"])
        rows.append(frozen["masked_labels"][:])
        # What a collator draws from is moved in between, and must not show in the fingerprint.
        torch.rand(3)
    assert files[0] == files[2] != files[1]
    assert rows[0] == rows[2] != rows[1]


@collators
def test_global_generators_stay_where_they_are(name: str) -> None:
    """Their state before or after has nothing to do with masks, also where a collator fails."""
    expected = listed(insert_random_mask(examples(), COLLATORS[name]))
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)  # noqa: NPY002
    states = random_states()
    assert listed(insert_random_mask(examples(), COLLATORS[name])) == expected
    assert random_states() == states

    def fail(features: list[dict[str, Any]]) -> dict[str, Any]:
        torch.rand(1), random.random(), np.random.rand()  # noqa: NPY002, S311
        raise OSError

    with pytest.raises(OSError):  # noqa: PT011
        insert_random_mask(examples(), fail)
    assert random_states() == states


@collators
@pytest.mark.parametrize("form", [list, np.array, torch.tensor])
def test_every_form_of_rows_is_left_as_it_was(name: str, form: Callable[..., Any]) -> None:
    """Collators that write into their rows, as the course's does, write into copies."""
    rows = {name: [form(row) for row in column] for name, column in examples().items()}
    before = copy.deepcopy(rows)
    frozen = insert_random_mask(rows, COLLATORS[name])
    assert listed(frozen) == listed(insert_random_mask(examples(), COLLATORS[name]))
    assert listed(rows) == listed(before) == examples()


def test_rows_of_one_length_come_as_one_array() -> None:
    """Others as an array of arrays; the rows are the same, by a table and on either side too."""
    rows = examples()
    short = {name: column[:-1] for name, column in rows.items()}
    assert len(rows["input_ids"][-1]) < 16
    several, one = insert_random_mask(rows, OURS), insert_random_mask(short, OURS)
    assert one["masked_labels"].shape == (len(rows["input_ids"]) - 1, 16)
    assert several["masked_labels"].dtype == object
    assert {name: column[:-1] for name, column in listed(several).items()} == listed(one)
    nulls = {**rows, "word_ids": [[None if w < 0 else w for w in row] for row in rows["word_ids"]]}
    assert listed(insert_random_mask(pa.table(nulls), OURS)) == listed(several)
    left = copy.deepcopy(OURS)
    left.tokenizer.padding_side = "left"
    assert listed(insert_random_mask(rows, left)) == listed(several)
    nothing = insert_random_mask({name: [] for name in rows}, OURS)
    assert listed(nothing) == {name: [] for name in several}


def test_word_ids_that_a_collator_returns_are_left_out() -> None:
    """The model has no such input."""
    masked = insert_random_mask(examples(), OURS, prefix="")

    def collate(features: list[dict[str, Any]]) -> dict[str, Any]:
        words = [feature["word_ids"] for feature in features]
        place = examples()["input_ids"].index(features[0]["input_ids"])
        return {**{name: [rows[place]] for name, rows in masked.items()}, "word_ids": words}

    frozen = listed(insert_random_mask(examples(), collate, prefix=""))
    assert frozen == listed(masked)


def test_old_labels_are_not_used() -> None:
    """The recipe's copy of the tokens under labels changes nothing, for any collator that looks."""
    rows = examples()
    for name in ("ours", "tokens, seeded"):
        frozen = insert_random_mask({**rows, "labels": rows["input_ids"]}, COLLATORS[name])
        assert listed(frozen) == listed(insert_random_mask(rows, COLLATORS[name]))


def test_collators_that_cannot_be_frozen() -> None:
    """What the collator returned, and the cure."""
    padding = DataCollatorForLanguageModeling(tokenizer, pad_to_multiple_of=64)
    with pytest.raises(ValueError, match=r"returned 64 'input_ids' for row 0 of 16 .*switch off"):
        insert_random_mask(examples(), padding)
    with pytest.raises(ValueError, match=r"collator function returned \['input_ids'\]; it must"):
        insert_random_mask(examples(), lambda rows: {"input_ids": torch.tensor([[1]])})
    without = {name: rows for name, rows in examples().items() if name != "word_ids"}
    with pytest.raises(ValueError, match=r"row 0 .* has no 'word_ids'.*tokenize_with_word_ids"):
        insert_random_mask(without, OURS)
    for collator in (OURS, padding):
        with pytest.raises(ValueError, match=r"the batch has .*, without 'input_ids'"):
            insert_random_mask({"word_ids": [[0]]}, collator)
    for seed in (0.5, "42", [1]):
        with pytest.raises(TypeError, match=r"seed is .*; it must be a whole number"):
            insert_random_mask(examples(), OURS, seed=seed)  # type: ignore[arg-type]


def numbers() -> tuple[float, ...]:
    """Draw from each global generator."""
    return random.random(), np.random.rand(), np.random.standard_normal(), torch.rand(1).item()  # noqa: NPY002, S311


def test_seeded_blocks_repeat_and_leave_no_trace() -> None:
    """The same draws inside, what would have come anyway outside, nested or failing."""
    with seeded(3):
        first = numbers()
        with seeded(4):
            other = numbers()
        after = numbers()
    with seeded(3):
        assert numbers() == first != other
        assert numbers() == after
    with seeded(2**63 - 1):
        before = numbers()
        following = numbers()
    with seeded(2**63 - 1):
        assert numbers() == before
        with pytest.raises(OSError, match="inside"), seeded(3):  # noqa: PT012
            assert numbers() == first
            raise OSError("inside")
        assert numbers() == following


@pytest.mark.parametrize(
    "collator",
    [
        DataCollatorWithPadding(tokenizer),
        default_data_collator,
        DataCollatorForLanguageModeling(tokenizer, mlm=False),
        DataCollatorForTokenClassification(tokenizer),
    ],
)
@pytest.mark.parametrize("padding", [0, 3])
def test_collators_that_hide_nothing_are_refused(collator: Any, padding: int) -> None:
    """By what comes out of them: each token would be a target that the model sees."""
    rows = {name: examples()[name] for name in ("input_ids", "attention_mask")}
    rows["labels"] = rows["input_ids"]
    fills = {"input_ids": tokenizer.pad_token_id, "attention_mask": 0, "labels": -100}
    padded = {
        name: [[*row, *[fills[name]] * padding] for row in column] for name, column in rows.items()
    }
    with pytest.raises(ValueError, match=r"data_collator .* and hid 0 tokens; use a collator"):
        insert_random_mask(padded, collator)


def label_the_mask(features: list[dict[str, Any]]) -> dict[str, Any]:
    """Hide a token, and return what hides it as the label."""
    ids = [int(token) for token in features[0]["input_ids"]]
    ids[1] = tokenizer.mask_token_id
    return {"input_ids": [ids], "labels": [[-100, ids[1], *[-100] * (len(ids) - 2)]]}


def test_labels_that_are_not_tokens_are_refused() -> None:
    """Those of token classification are classes; others have a mistake in them."""
    rows = {name: examples()[name] for name in ("input_ids", "attention_mask")}
    classes = [[-100, *[1] * (len(row) - 2), -100] for row in rows["input_ids"]]
    for collator in (DataCollatorForTokenClassification(tokenizer), label_the_mask):
        with pytest.raises(ValueError, match=r"[1-9]\d* of them other than the row's own token"):
            insert_random_mask({**rows, "labels": classes}, collator)


def test_a_token_that_is_kept_by_chance_is_no_reason() -> None:
    """A row of one word, all of it a target that the collator keeps as it is."""
    collator = DataCollatorForLanguageModeling(
        tokenizer, mlm_probability=1.0, mask_replace_prob=0.5, random_replace_prob=0.0
    )
    one = {"input_ids": [[9]], "special_tokens_mask": [[0]]}
    seen = {
        insert_random_mask(one, collator, seed=seed)["masked_input_ids"][0].item()
        for seed in range(20)
    }
    assert seen == {9, tokenizer.mask_token_id}


def test_whole_words_of_transformers_need_offsets() -> None:
    """Which rows here do not have: the cure is our own collator."""
    collator = DataCollatorForLanguageModeling(
        tokenizer, whole_word_mask=True, mask_replace_prob=1.0, random_replace_prob=0.0
    )
    with pytest.raises(ValueError, match=r"whole_word_mask=True .* use WholeWordMaskingCollator"):
        insert_random_mask(examples(), collator)


@pytest.mark.parametrize("name", ["ours", "tokens"])
@pytest.mark.parametrize("layout", ["arrow", "pandas"])
def test_a_table_is_frozen_to_a_table(name: str, layout: str) -> None:
    """As a stream asks for it: of a dict, it says that the function returned something else."""
    rows, collator = examples(), COLLATORS[name]
    frozen: Any = insert_random_mask(pa.table(rows), collator)
    assert frozen.to_pydict() == listed(insert_random_mask(rows, collator))
    (batch,) = pa.table(rows).to_batches()
    assert insert_random_mask(batch, collator) == frozen
    stream = datasets.Dataset.from_dict(rows).to_iterable_dataset().with_format(layout)
    mapped = stream.map(
        insert_random_mask,
        batched=True,
        batch_size=3,
        fn_kwargs={"data_collator": collator},
        remove_columns=[*rows],
    )
    assert list(mapped.with_format(None)) == frozen.to_pylist()


RARE = "an uncharacteristically naïve film of electroencephalography and straightforwardness"
TEXTS = [*tiny_corpus(30), *[RARE] * 4, "café"]


def test_two_vocabularies_are_asked_for_the_same_words() -> None:
    """Where words become tokens of their own, the same words are masked, and no others."""
    larger = tiny_tokenizer("wordpiece")
    words = ["uncharacteristically", "electroencephalography", "straightforwardness"]
    larger.add_tokens([AddedToken(word, single_word=True, normalized=True) for word in words])
    masked: list[list[str]] = []
    for known in (tokenizer, larger):
        columns: dict[str, Any] = {**tokenize_with_word_ids({"text": TEXTS}, known)}
        columns["id"] = range(len(TEXTS))
        collator = WholeWordMaskingCollator(known, wwm_probability=0.3)
        frozen = insert_random_mask(columns, collator, key_column="id")
        targets = ([i for i in labels if i != -100] for labels in frozen["masked_labels"])
        masked.append([known.decode(row) for row in targets])
    assert masked[0] == masked[1]
    assert any(word in text for text in masked[1] for word in words)


def test_keys_take_the_place_of_tokens() -> None:
    """A mask depends on seed, key and word, not on batch, order or tokens; strings are keys too."""
    columns: dict[str, Any] = dict(tokenize_with_word_ids({"text": TEXTS}, tokenizer))
    dataset = datasets.Dataset.from_dict(
        {**columns, "id": [f"text {place}" for place in range(len(TEXTS))]}
    )

    def frozen(rows: Dataset, **options: Any) -> list[Any]:
        options = {"batched": True, "remove_columns": rows.column_names, **options}
        seed = options.pop("seed", 3)
        arguments = {"data_collator": OURS, "key_column": "id", "seed": seed}
        mapped = rows.map(insert_random_mask, fn_kwargs=arguments, **options)
        return list(mapped.with_format(None))

    whole = frozen(dataset)
    assert "masked_id" not in whole[0]
    assert frozen(dataset, batch_size=7) == whole
    assert frozen(dataset, seed=4) != whole
    assert frozen(dataset.with_format("arrow"), batch_size=50) == whole
    backwards = dataset.select(range(len(TEXTS) - 1, -1, -1))
    assert frozen(backwards)[::-1] == whole
    by_itself = replace(OURS, key_column="id")
    assert listed(insert_random_mask(dataset[:], by_itself, seed=3)) == {
        name: [row[name] for row in whole] for name in whole[0]
    }
    same = datasets.Dataset.from_dict({**columns, "id": ["one"] * len(TEXTS)})
    assert frozen(same) != whole
    long = {"input_ids": [[9] * 9000] * 3, "word_ids": [[*range(9000)]] * 3}  # three blocks
    made = insert_random_mask({**long, "id": [0, 1, 0]}, OURS, key_column="id")
    labels = np.asarray(made["masked_labels"])
    assert (labels[0] == labels[2]).all()
    assert (labels[0] != labels[1]).any()


def test_keys_that_are_none() -> None:
    """A column that is not there, of values that are no keys, and for others' masks."""
    columns: dict[str, Any] = {"input_ids": [[2, 7, 3]], "word_ids": [[-1, 0, -1]], "id": [0]}
    with pytest.raises(ValueError, match=r"key_column is 'number', the columns are \['input_ids'"):
        insert_random_mask(columns, OURS, key_column="number")
    others = DataCollatorForLanguageModeling(tokenizer)
    with pytest.raises(ValueError, match=r"is DataCollatorForLanguageModeling; only the masks of"):
        insert_random_mask(columns, others, key_column="id")
    with pytest.raises(TypeError):
        insert_random_mask({**columns, "id": [1.5]}, OURS, key_column="id")


class TheirOwn:
    """A collator as people write them, around a tokenizer."""

    def __init__(self, own_tokenizer: Any) -> None:
        self.tokenizer = own_tokenizer

    def __call__(self, rows: list[dict[str, Any]]) -> Any:
        """Pad on the tokenizer's side."""
        batch = self.tokenizer.pad([{"input_ids": row["input_ids"]} for row in rows])
        return {**batch, "labels": batch["input_ids"]}


@pytest.mark.parametrize("make", [DataCollatorForLanguageModeling, TheirOwn])
def test_collators_of_others_pad_on_the_right(make: Any) -> None:
    """Where a run calls them; the caller's collator and tokenizer keep their side."""
    batches = []
    for side in ("right", "left"):
        own = tiny_tokenizer()
        own.padding_side = side
        collator = make(own)
        rows: Any = [{"input_ids": [9] * n} for n in (5, 2)]
        batches.append(collate_seeded(purify(collator), rows, key=1))
        assert collator.tokenizer is own
        assert own.padding_side == side
    right, left = ({n: np.asarray(a).tolist() for n, a in batch.items()} for batch in batches)
    assert left == right
    assert left["attention_mask"][1] == [1, 1, 0, 0, 0]
    assert purify(OURS) is OURS


@pytest.mark.parametrize("prefix", ["", "masked_"])
def test_frozen_rows_pass_transformers_collators(prefix: str) -> None:
    """As they are, where `accelerate_train` calls them; copies of the tokens are masked."""
    rows = examples()
    theirs = COLLATORS["tokens"]
    frozen = insert_random_mask(rows, theirs, prefix=prefix)
    as_rows = [dict(zip(frozen, row, strict=True)) for row in zip(*frozen.values(), strict=True)]
    batch = purify(theirs)(as_rows)
    for row, inputs, labels in zip(as_rows, batch["input_ids"], batch["labels"], strict=True):
        length = len(row[f"{prefix}labels"])
        assert inputs[:length].tolist() == [*row[f"{prefix}input_ids"]]
        assert labels[:length].tolist() == [*row[f"{prefix}labels"]]
    copies = [{"input_ids": ids, "labels": ids} for ids in rows["input_ids"][:4]]
    masked = purify(theirs)(copies)
    assert 0 < (np.asarray(masked["labels"]) != -100).sum() < 4 * 16
