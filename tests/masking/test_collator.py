"""Whole words, masked as a function of (seed, epoch, row) alone."""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import itertools
import pickle
import random
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import concatenate, find_batch_size, send_to_device
from accelerate.utils.operations import slice_tensors
from datasets import Dataset
from datasets.fingerprint import Hasher
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments

from mlmadapt import (
    WholeWordMaskingCollator,
    evaluate_mlm,
    group_texts,
    insert_random_mask,
    isolate_documents,
    masked_lm_loss,
    pack_texts,
    tokenize_with_word_ids,
)
from mlmadapt.data.packing import PackedAttentionMask
from mlmadapt.data.rows import join_rows, to_columns
from mlmadapt.data.table import table_reader
from mlmadapt.masking.selection import derive_key
from mlmadapt.testing import TOKENIZER_KINDS, tiny_corpus, tiny_model, tiny_tokenizer
from tests.masking.reference_masking import (
    random_states,
    reference_collate,
    reference_key,
    reference_mask,
    special_ids,
    words_of,
)

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

Row = dict[str, list[int]]
Masks = list[tuple[list[int], list[int]]]
kinds = pytest.mark.parametrize("kind", TOKENIZER_KINDS)
shared = functools.cache(tiny_tokenizer)
documents = st.lists(
    st.sampled_from(tiny_corpus(40)) | st.text("aé .'-中电影film\n", max_size=20),
    min_size=1,
    max_size=6,
)


def chunk(tokenizer: PreTrainedTokenizerFast, texts: list[str], chunk_size: int) -> list[Row]:
    """Tokenize documents and cut them into rows, the last one shorter."""
    tokens = tokenize_with_word_ids({"text": texts}, tokenizer)
    columns = group_texts(dict(tokens), chunk_size=chunk_size, remainder="keep", labels=False)
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


@functools.cache
def rows_of(kind: str) -> tuple[Row, ...]:
    """Return 70 rows or so, of 16 to 48 tokens."""
    texts = tiny_corpus(120)
    rows = [chunk(shared(kind), texts[i : i + 40], 16 + i // 3 + 1) for i in range(0, 120, 40)]
    return tuple(itertools.chain.from_iterable(rows))[:70]


def masks(batch: dict[str, Any]) -> Masks:
    """Return what a collator made of each row, without the padding."""
    columns = [np.asarray(batch[name]) for name in ("attention_mask", "input_ids", "labels")]
    return [
        (ids[real > 0].tolist(), labels[real > 0].tolist())
        for real, ids, labels in zip(*columns, strict=True)
    ]


def is_target(batch: dict[str, Any]) -> np.ndarray:
    """Tell where something is to be predicted."""
    return np.asarray(batch["labels"]) != -100


def linear_weights(tokenizer: PreTrainedTokenizerFast) -> list[float]:
    """Return a weight for each token id, 0 for every third."""
    return [float(token % 3) for token in range(len(tokenizer))]


def weight_by_length(text: str) -> float:
    """Favour long words, and leave out those with an e."""
    return 0.0 if "e" in text else 1.0 + len(text)


@kinds
@settings(max_examples=20)
@given(data=st.data())
def test_batches_are_those_of_the_reference(kind: str, data: st.DataObject) -> None:
    """Bit for bit, for every budget, split, weighting, seed and side; rows stay as they were."""
    tokenizer = tiny_tokenizer(kind) if data.draw(st.booleans()) else shared(kind)
    rows = chunk(tokenizer, data.draw(documents), data.draw(st.integers(2, 40)))
    mask_replace_prob, random_replace_prob = data.draw(
        st.sampled_from([(1.0, 0.0), (0.8, 0.1), (0.9, 0.1), (0.0, 1.0), (0.0, 0.0), (0.3, 0.2)])
    )
    weights = [None, linear_weights(tokenizer), weight_by_length]
    choices = {
        "wwm_probability": data.draw(st.sampled_from([0.0, 0.15, 0.2, 0.5, 1.0])),
        "mask_replace_prob": mask_replace_prob,
        "random_replace_prob": random_replace_prob,
        "budget": data.draw(st.sampled_from(["bernoulli", "exact"])),
        "word_weights": data.draw(st.sampled_from(weights)),
    }
    seed, epoch = data.draw(st.integers(-3, 2**70)), data.draw(st.integers(0, 3))
    collator = WholeWordMaskingCollator(tokenizer, seed=seed, **choices)
    collator.set_epoch(epoch)
    side = tokenizer.padding_side
    tokenizer.padding_side = data.draw(st.sampled_from(["left", "right"]))
    try:
        given_rows = copy.deepcopy(rows)
        batch = collator(given_rows)
        expected = reference_collate(
            rows, tokenizer, key=reference_key(seed, "mask", epoch), **choices
        )
    finally:
        tokenizer.padding_side = side
    assert given_rows == rows
    assert {name: values.tolist() for name, values in batch.items()} == expected


@kinds
def test_words_are_whole_and_apart(kind: str) -> None:
    """No word in part, no special token, every row a target, and no two words always together."""
    tokenizer, rows = shared(kind), rows_of(kind)
    special = special_ids(tokenizer)
    words = [
        [
            [i for i, number in enumerate(row["word_ids"]) if number == word]
            for word in {*row["word_ids"]} - {-1}
        ]
        for row in rows
    ]
    for row, row_words in zip(rows, words, strict=True):  # what is unknown is never a target
        unknown = {i for i, t in enumerate(row["input_ids"]) if t == tokenizer.unk_token_id}
        row_words[:] = [word for word in row_words if unknown.isdisjoint(word)]
    chosen_by: dict[tuple[int, int], set[int]] = {}
    for seed in range(40):
        collator = WholeWordMaskingCollator(tokenizer, wwm_probability=0.5, seed=seed)
        for place, (inputs, labels) in enumerate(masks(collator(list(rows)))):
            tokens = rows[place]["input_ids"]
            targets = {i for i, label in enumerate(labels) if label != -100}
            assert targets or not words[place]
            assert all(labels[i] == tokens[i] and tokens[i] not in special for i in targets)
            for i, token in enumerate(tokens):
                assert inputs[i] == (tokenizer.mask_token_id if i in targets else token)
            for number, word in enumerate(words[place]):
                assert len(targets & set(word)) in {0, len(word)}
                chosen_by.setdefault((place, number), set()).update(
                    {seed} if word[0] in targets else ()
                )
    for place, row_words in enumerate(words):
        # 40 seeds tell two words apart but for one pair in a million million.
        assert len({frozenset(chosen_by[place, i]) for i in range(len(row_words))}) == len(
            row_words
        )
    pieces = sum(len(word) > 1 for row_words in words for word in row_words)
    assert pieces > 50 or kind == "wordlevel"


@pytest.mark.parametrize("budget", ["bernoulli", "exact"])
@pytest.mark.parametrize("weights", [None, weight_by_length])
def test_batch_order_and_padding_do_not_matter(budget: Any, weights: Any) -> None:
    """Batches of 1 to 64, shuffles, both sides and multiples give each row what it gets alone."""
    tokenizer, rows = tiny_tokenizer("wordpiece"), rows_of("wordpiece")
    collator = WholeWordMaskingCollator(
        tokenizer,
        mask_replace_prob=0.6,
        random_replace_prob=0.3,
        budget=budget,
        word_weights=weights,
        seed=3,
    )
    alone = [masks(collator([row]))[0] for row in rows]
    shuffler = random.Random(0)  # noqa: S311
    for size in range(1, 65):
        collator.pad_to_multiple_of = [None, 8, 64][size % 3]
        tokenizer.padding_side = ["left", "right"][size % 2]
        order = shuffler.sample(range(len(rows)), size)
        batch = collator([rows[i] for i in order])
        assert masks(batch) == [alone[i] for i in order]
        assert not is_target(batch)[batch["attention_mask"].numpy() == 0].any()
        assert (batch["input_ids"][batch["attention_mask"] == 0] == tokenizer.pad_token_id).all()
        assert batch["input_ids"].shape[1] % (collator.pad_to_multiple_of or 1) == 0


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_that_come_padded_are_masked_as_if_they_were_not(side: str) -> None:
    """An attention_mask of 0 is padding wherever it stands, whatever the word_ids say there."""
    rows = rows_of("wordpiece")
    collator = WholeWordMaskingCollator(
        shared("wordpiece"), mask_replace_prob=0.5, random_replace_prob=0.5, seed=1
    )
    fills = {"input_ids": 0, "word_ids": 4, "token_type_ids": 0, "attention_mask": 0}
    padded = []
    for place, row in enumerate(rows):
        extra = {name: [fill] * (place % 7) for name, fill in fills.items()}
        first, second = (extra, row) if side == "left" else (row, extra)
        padded.append({name: first[name] + second[name] for name in row})
    assert masks(collator(padded)) == masks(collator(list(rows)))


def test_rows_can_be_lists_arrays_or_tensors() -> None:
    """Every form of a row gives the same masks, None and NaN are no word, no form is changed."""
    rows = rows_of("wordpiece")
    collator = WholeWordMaskingCollator(shared("wordpiece"), seed=2)
    expected = masks(collator(list(rows)))
    nones = [{**row, "word_ids": [None if w < 0 else w for w in row["word_ids"]]} for row in rows]
    forms: dict[str, list[dict[str, Any]]] = {
        "lists": [dict(row) for row in rows],
        "None": nones,
        "arrays": [{name: np.array(row[name], np.int32) for name in row} for row in rows],
        "tensors": [{name: torch.tensor(row[name]) for name in row} for row in rows],
        "objects": [
            {name: np.array(row[name], object if name == "word_ids" else int) for name in row}
            for row in nones
        ],
        "tuples": [{name: tuple(row[name]) for name in row} for row in nones],
        "mixed": [
            {**dict(row), "word_ids": np.array(row["word_ids"])} if i % 2 else row
            for i, row in enumerate(nones)
        ],
    }
    data = Dataset.from_list(nones)
    for name in (None, "numpy", "torch"):
        forms[f"datasets {name}"] = list(data.with_format(name))
    for name, form in forms.items():
        before = copy.deepcopy(form)
        assert masks(collator(form)) == expected, name
        for row, old in zip(form, before, strict=True):
            for column in row:
                np.testing.assert_array_equal(row[column], old[column])


def test_tensors_are_torch_or_numpy() -> None:
    """Both kinds hold the same 64-bit integers, by construction or by call."""
    rows = list(rows_of("unigram"))
    torch_batch = WholeWordMaskingCollator(shared("unigram"), seed=0)(rows)
    numpy_batch = WholeWordMaskingCollator(shared("unigram"), seed=0, return_tensors="np")(rows)
    by_call = WholeWordMaskingCollator(shared("unigram"), seed=0)(rows, return_tensors="np")
    assert list(torch_batch) == list(numpy_batch) == list(by_call)
    assert "word_ids" not in torch_batch
    for name, values in torch_batch.items():
        assert values.dtype == torch.int64
        assert isinstance(numpy_batch[name], np.ndarray)
        np.testing.assert_array_equal(values.numpy(), numpy_batch[name])
        np.testing.assert_array_equal(values.numpy(), by_call[name])


def test_columns_of_the_rows() -> None:
    """Model inputs are carried and padded, old labels not used, marked special tokens spared."""
    tokenizer = shared("wordpiece")
    rows = [{**row, "token_type_ids": [1] * len(row["input_ids"])} for row in rows_of("wordpiece")]
    collator = WholeWordMaskingCollator(tokenizer, wwm_probability=1, seed=0)
    batch = collator(rows)
    assert (batch["token_type_ids"] == batch["attention_mask"]).all()
    assert masks(collator([{**row, "labels": row["input_ids"]} for row in rows])) == masks(batch)
    marked = collator(
        [
            {**row, "special_tokens_mask": [1] * 5 + [0] * (len(row["input_ids"]) - 5)}
            for row in rows
        ]
    )
    assert "special_tokens_mask" not in marked
    assert not is_target(marked)[:, :5].any()
    assert (is_target(marked)[:, 5:] == is_target(batch)[:, 5:]).all()
    bare = [{name: row[name] for name in ("input_ids", "word_ids")} for row in rows]
    assert masks(collator(bare)) == masks(batch)


def test_prepared_dataloader_masks_alike() -> None:
    """Accelerate's own DataLoader changes nothing."""
    rows = list(rows_of("wordpiece"))
    collator = WholeWordMaskingCollator(shared("wordpiece"), seed=4)
    loader = Accelerator(cpu=True).prepare(DataLoader(rows, batch_size=9, collate_fn=collator))
    collator.set_epoch(1)
    first = [mask for batch in loader for mask in masks(batch)]
    assert first == masks(collator(rows))
    collator.set_epoch(0)
    assert first != masks(collator(rows))


@pytest.mark.parametrize(
    "clone",
    [copy.copy, copy.deepcopy, lambda collator: pickle.loads(pickle.dumps(collator))],  # noqa: S301
)
def test_copies_mask_alike_and_have_their_own_epoch(clone: Any) -> None:
    """A copy goes on from epoch and progress of the original, and apart from it."""
    rows = list(rows_of("byte_bpe"))
    collator = WholeWordMaskingCollator(
        shared("byte_bpe"),
        wwm_probability={0.0: 0.2, 0.5: 0.4},
        seed=4,
        budget="exact",
        word_weights=weight_by_length,
    )
    first = masks(collator(rows))
    collator.set_epoch(2)
    collator.set_progress(0.5)
    second = masks(collator(rows))
    twin = clone(collator)
    assert masks(twin(rows)) == second != first
    twin.set_epoch(0)
    assert masks(twin(rows)) not in (first, second)
    twin.set_progress(0.0)
    assert masks(twin(rows)) == first
    assert masks(collator(rows)) == second


def test_fingerprint_tells_collators_apart() -> None:
    """`map` tells other settings and epochs from these, and these from these not."""
    tokenizer = shared("wordpiece")
    collator = WholeWordMaskingCollator(tokenizer, seed=0)
    same = Hasher.hash(collator)
    collator(list(rows_of("wordpiece")))
    assert Hasher.hash(collator) == same == Hasher.hash(WholeWordMaskingCollator(tokenizer, seed=0))
    others = [
        WholeWordMaskingCollator(tokenizer, seed=1),
        WholeWordMaskingCollator(tokenizer, seed=0, budget="exact"),
        WholeWordMaskingCollator(tokenizer, seed=0, word_weights=linear_weights(tokenizer)),
        WholeWordMaskingCollator(shared("unigram"), seed=0),
    ]
    assert len({same, *map(Hasher.hash, others)}) == 5


def make_trainer(
    model: Any, rows: Any, folder: Path, *, remove: bool = False, **loader: Any
) -> Trainer:
    """Make a `Trainer` for 3 steps."""
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=3,
        per_device_train_batch_size=2,
        use_cpu=True,
        remove_unused_columns=remove,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        accelerator_config=loader,
    )
    collator = WholeWordMaskingCollator(shared("wordpiece"), seed=0, pad_to_multiple_of=32)
    return Trainer(model, arguments, train_dataset=rows, data_collator=collator)


def test_trainer_takes_it(bert: PreTrainedModel, tmp_path: Path) -> None:
    """`Trainer` trains with remove_unused_columns=False; without, the error names that cure."""
    rows = Dataset.from_list(list(rows_of("wordpiece")))
    assert 3 < make_trainer(bert, rows, tmp_path).train().training_loss < 9
    with pytest.raises(ValueError, match=r"row 0 .*'word_ids'.*remove_unused_columns=False"):
        make_trainer(bert, rows, tmp_path, remove=True).train()


@pytest.mark.parametrize("prefix", ["", "masked_"])
def test_trainer_evaluates_what_was_frozen(
    bert: PreTrainedModel, tmp_path: Path, prefix: str
) -> None:
    """To the figure of `evaluate_mlm`, where batches have equally many targets."""
    tokenizer, rows = shared("wordpiece"), rows_of("wordpiece")
    collator = WholeWordMaskingCollator(tokenizer, mask_replace_prob=0.8, random_replace_prob=0.1)
    dataset = Dataset.from_list(list(rows))
    frozen = dataset.map(
        insert_random_mask,
        batched=True,
        fn_kwargs={"data_collator": collator, "prefix": prefix},
        remove_columns="word_ids" if prefix else None,
    )
    counts = [sum(label != -100 for label in row) for row in frozen[f"{prefix}labels"]]
    often = max(counts, key=counts.count)
    frozen = frozen.select([place for place, count in enumerate(counts) if count == often][:6])
    trainer = make_trainer(bert, list(rows), tmp_path)
    expected = evaluate_mlm(bert, frozen, tokenizer=tokenizer)
    for batch_size in (1, 2, 6):
        trainer.args.per_device_eval_batch_size = batch_size
        loss = trainer.evaluate(frozen)["eval_loss"]
        assert loss == pytest.approx(expected.loss, rel=1e-5)


def test_seed_none_follows_torch_and_a_seed_leaves_it_alone() -> None:
    """`torch.manual_seed` decides where there is no seed; where there is one, no state is moved."""
    rows = list(rows_of("wordpiece"))
    unseeded = WholeWordMaskingCollator(shared("wordpiece"))
    torch.manual_seed(8)
    first, second = masks(unseeded(rows)), masks(unseeded(rows))
    torch.manual_seed(8)
    assert masks(unseeded(rows)) == first != second
    states = random_states()
    for seed in (0, 1):
        WholeWordMaskingCollator(
            shared("wordpiece"), mask_replace_prob=0, random_replace_prob=1, seed=seed
        )(rows)
    assert random_states() == states
    assert masks(unseeded(rows)) != first


def recurring(kind: str) -> dict[str, list[Any]]:
    """Return the columns of twelve texts, of which most are there three or six times."""
    texts = ["the film is good", "a place for the story", "the film is good", "of it and more"] * 3
    columns = tokenize_with_word_ids({"text": texts}, shared(kind))
    return {name: [[*map(int, row)] for row in rows] for name, rows in columns.items()}


def rows_with(columns: dict[str, Any], **extra: Any) -> list[dict[str, Any]]:
    """Turn columns into rows."""
    columns = columns | extra
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


@pytest.mark.parametrize("kind", ["wordpiece", "byte_bpe"])
@pytest.mark.parametrize("names", [[*range(-2, 10)], [f"review {i // 2}" for i in range(12)]])
def test_a_column_takes_the_place_of_tokens(kind: str, names: list[Any]) -> None:
    """As the reference has it: equal rows of two names have two masks."""
    rates: Any = {"wwm_probability": 0.5, "mask_replace_prob": 0.5, "random_replace_prob": 0.3}
    collator = WholeWordMaskingCollator(shared(kind), seed=7, key_column="name", **rates)
    collator.set_epoch(2)
    rows = rows_with(recurring(kind), name=names)
    batch = collator(rows)
    assert "name" not in batch
    key = reference_key(7, "mask", 2)
    assert masks(batch) == [
        reference_mask(row, shared(kind), key=key, names=[row["name"]], **rates) for row in rows
    ]
    assert len(set(map(str, masks(batch)[::4]))) > 1
    if names[0] == -2:
        tensors = [{name: torch.tensor(values) for name, values in row.items()} for row in rows]
        assert masks(collator(tensors[::-1])) == masks(batch)[::-1]


@pytest.mark.parametrize("chunk_size", [12, 40])
def test_a_packed_document_has_the_mask_that_its_number_has_alone(chunk_size: int) -> None:
    """However documents meet in a row, of a list or of a table."""
    columns = recurring("wordpiece")
    numbers = [[place] * len(tokens) for place, tokens in enumerate(columns["input_ids"])]
    rates: Any = {"wwm_probability": 0.5, "key_column": "number"}
    collator = WholeWordMaskingCollator(shared("wordpiece"), seed=3, **rates)
    alone = masks(collator(rows_with(columns, number=range(12))))
    packed = Dataset.from_dict(
        dict(pack_texts(columns | {"number": numbers}, chunk_size=chunk_size))
    )
    read = table_reader(packed)
    assert read is not None
    for rows in (list(packed), read(range(len(packed)))):
        batch = collator.collate(rows, key=derive_key(3, "mask", 0))
        assert "number" not in batch
        for row, ids in enumerate(batch["document_ids"]):
            for document in set(ids.tolist()) - {-1}:
                tokens, labels = (
                    batch[name][row][ids == document].tolist() for name in ("input_ids", "labels")
                )
                number = int(packed[row]["number"][int((ids == document).argmax())])
                assert (tokens, labels) == alone[number]


def test_documents_of_a_row_with_one_name_have_masks_of_their_own() -> None:
    """By the name of the row and their numbers in it, as the reference has it."""
    one = recurring("wordpiece")
    row = {name: rows[0] * 3 for name, rows in one.items()}
    size = len(one["input_ids"][0])
    row["document_ids"] = [0] * size + [1] * size + [4] * size
    collator = WholeWordMaskingCollator(
        shared("wordpiece"), wwm_probability=0.5, seed=3, key_column="name"
    )
    ((tokens, labels),) = masks(collator([row | {"name": 11}]))
    key = reference_key(3, "mask", 0)
    single = {name: rows[0] for name, rows in one.items()}
    expected = [
        reference_mask(
            single, shared("wordpiece"), key=key, names=[11, document], wwm_probability=0.5
        )
        for document in (0, 1, 4)
    ]
    assert (tokens, labels) == tuple(
        list(itertools.chain.from_iterable(parts)) for parts in zip(*expected, strict=True)
    )
    assert len(set(map(str, expected))) > 1


@pytest.mark.parametrize("packed", [False, True])
def test_equal_rows_are_told_once(*, packed: bool, caplog: pytest.LogCaptureFixture) -> None:
    """Rows and packed documents that nothing tells apart; not without words, nor few of many."""
    row: dict[str, Any] = {"input_ids": [2, 7, 3, 2, 7, 3], "word_ids": [-1, 0, -1, -1, 0, -1]}
    row["document_ids"] = [0, 0, 0, 1, 1, 1] if packed else [0] * 6
    others = [{**row, "input_ids": [2, 9 + i, 3, 2, 200 + i, 3]} for i in range(180)]
    batch = [row] if packed else [row, row]
    make = functools.partial(WholeWordMaskingCollator, shared("wordpiece"))
    make(seed=0)([{**row, "word_ids": [-1] * 6}] * 9)
    make(seed=0)([*others, *batch])
    make(seed=0, key_column="name")([{**row, "name": i} for i, row in enumerate(batch)])
    make()(batch)
    assert not caplog.records
    collator = make(seed=0)
    for _ in range(2):
        collator(batch)
    (record,) = caplog.records
    assert "1 of 2 rows or documents of a batch are equal" in record.message
    assert "pass key_column" in record.message


def test_equal_rows_of_a_batch_without_a_seed_have_masks_of_their_own() -> None:
    """Where torch's generator decides, which gives a number for the batch alone."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        batch = WholeWordMaskingCollator(shared("wordpiece"), wwm_probability=0.5)(
            rows_with(recurring("wordpiece"))[::4] * 5
        )
    assert len({str(labels) for _, labels in masks(batch)}) > 3


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        (None, ValueError, r"key_column is 'name', the columns are \['input_ids', .* in Trainer"),
        (1.5, TypeError, "a value of key_column is 1.5; it must be a whole number"),
        (True, TypeError, "a value of key_column is True; it must be a whole number"),
    ],
)
def test_columns_that_name_no_row(name: Any, error: type[Exception], message: str) -> None:
    """One that is not there, also of joined rows, and one of other values."""
    row: dict[str, Any] = {"input_ids": [2, 7, 3], "word_ids": [-1, 0, -1]}
    collator = WholeWordMaskingCollator(shared("wordpiece"), key_column="name")
    with pytest.raises(error, match=message):
        collator([row if name is None else row | {"name": name}])
    if name is None:
        with pytest.raises(error, match=message):
            collator.collate(join_rows(to_columns([row])), key=0)


def test_the_setting_of_others_is_answered_with_ours() -> None:
    """And the signature that people read is that of the settings."""
    with pytest.raises(TypeError, match=r"mlm_probability is 0.15, .* pass wwm_probability"):
        WholeWordMaskingCollator(shared("wordpiece"), mlm_probability=0.15)  # type: ignore[call-arg]
    names = [*inspect.signature(WholeWordMaskingCollator).parameters]
    assert names == [field.name for field in dataclasses.fields(WholeWordMaskingCollator)]


def test_seeds_and_epochs_differ() -> None:
    """Every (seed, epoch) has masks of its own, and NumPy's whole numbers count as Python's."""
    rows, seen = list(rows_of("wordpiece")), set()
    for seed in range(5):
        collator = WholeWordMaskingCollator(shared("wordpiece"), seed=np.int64(seed))
        for epoch in range(5):
            collator.set_epoch(epoch)
            seen.add(str(masks(collator(rows))))
    assert len(seen) == 25
    assert str(masks(WholeWordMaskingCollator(shared("wordpiece"), seed=0)(rows))) in seen


def test_a_run_of_one_number_is_a_word() -> None:
    """A special token ends a word, also where the next document begins with the same number."""
    tokenizer = shared("wordpiece")
    cls, sep = tokenizer.cls_token_id, tokenizer.sep_token_id
    row = {
        "input_ids": [cls, 9, 10, sep, cls, 11, sep, 12, 13],
        "word_ids": [None, 0, 0, None, None, 0, None, 0, 1],
    }
    assert words_of(row, {cls, sep}) == [[1, 2], [5], [7], [8]]
    seen = set()
    for seed in range(200):
        batch = WholeWordMaskingCollator(tokenizer, wwm_probability=0.5, seed=seed)([row])
        targets = is_target(batch)[0]
        assert targets[1] == targets[2]
        assert not targets[[0, 3, 4, 6]].any()
        seen.add(tuple(targets[[1, 5, 7, 8]].tolist()))
    assert len(seen) == 15  # every combination but none
    # Word ids from elsewhere can give the special token a number too.
    row = {"input_ids": [9, sep, 10], "word_ids": [0, 0, 0]}
    seen = set()
    for seed in range(50):
        batch = WholeWordMaskingCollator(tokenizer, wwm_probability=0.5, seed=seed)([row])
        seen.add(tuple(is_target(batch)[0].tolist()))
    assert seen == {(True, False, False), (False, False, True), (True, False, True)}


def test_a_cut_word_is_the_whole_of_what_is_there() -> None:
    """The parts of a word in two chunks are words of their own, each masked as a whole."""
    tokenizer = shared("wordpiece")
    rows = chunk(tokenizer, ["electroencephalography"], 4)
    assert len(rows) > 2
    batch = WholeWordMaskingCollator(tokenizer, seed=0)(rows)
    real = np.array([t not in special_ids(tokenizer) for row in rows for t in row["input_ids"]])
    assert (is_target(batch)[batch["attention_mask"].numpy() > 0] == real).all()


def small_tokenizer(*words: str) -> PreTrainedTokenizerFast:
    """Make a tokenizer of 5 special tokens and some words."""
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    vocabulary = {token: i for i, token in enumerate([*names.values(), *words])}
    model = WordLevel(vocabulary, unk_token="[UNK]")  # noqa: S106
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), **names)


def test_added_words_are_learnt_and_unknown_ones_are_not() -> None:
    """Added tokens can be targets, [UNK] cannot; replacements are ordinary tokens only."""
    tokenizer = small_tokenizer("a", "b", "[unused0]", "<unused_7>", "[unused99]", "c")
    tokenizer.add_tokens(["unfilmable"])
    tokenizer.add_tokens([AddedToken("[ENTITY]", special=True)], special_tokens=True)
    added, entity = tokenizer.convert_tokens_to_ids(["unfilmable", "[ENTITY]"])
    row = {
        "input_ids": [tokenizer.unk_token_id, added, entity, 5] * 500,
        "word_ids": list(range(2000)),
    }
    collator = WholeWordMaskingCollator(
        tokenizer, wwm_probability=1, mask_replace_prob=0, random_replace_prob=1, seed=0
    )
    batch = collator([row])
    assert is_target(batch)[0].tolist() == [False, True, False, True] * 500
    drawn = batch["input_ids"][0][torch.tensor(is_target(batch)[0])]
    assert set(drawn.tolist()) == set(tokenizer.convert_tokens_to_ids(["a", "b", "c"]))


def test_rows_without_words() -> None:
    """A row of special tokens, or of nothing, has no target and harms no other."""
    tokenizer = shared("wordpiece")
    nothing: dict[str, Any] = {"input_ids": [2, 3], "word_ids": [-1, -1]}
    empty: dict[str, Any] = {"input_ids": [], "word_ids": []}
    word = {"input_ids": [9], "word_ids": [0]}
    for budget in ("bernoulli", "exact"):
        for weights in (None, weight_by_length, linear_weights(tokenizer)):
            collator = WholeWordMaskingCollator(
                tokenizer, budget=budget, word_weights=weights, random_replace_prob=0, seed=0
            )
            for rows in ([nothing], [empty], [empty, empty], [empty, word, nothing, empty]):
                targets = is_target(collator(rows))
                assert targets.sum() == rows.count(word)
    array = WholeWordMaskingCollator(tokenizer, seed=0)(
        [{"input_ids": np.array([]), "word_ids": []}, word]
    )
    assert is_target(array).sum() == 1


def test_a_word_that_holds_an_unknown_token_is_no_target() -> None:
    """Not in part, whatever the rate; the words about it have the masks that they had."""
    tokenizer = small_tokenizer(*map(chr, range(97, 123)))
    unknown: int = tokenizer.unk_token_id
    words = [0, 0, 0, 1, 2, 2, 3, 4, 4, 5]
    tokens = [10, unknown, 12, 13, 14, 15, unknown, 16, unknown, 17]
    known = [20 if token == unknown else token for token in tokens]
    rows = [{"input_ids": ids, "word_ids": words} for ids in (tokens, known)]
    for budget, weights in itertools.product(
        ("bernoulli", "exact"), (None, [1.0] * len(tokenizer))
    ):
        options: Any = {"budget": budget, "word_weights": weights}
        every = WholeWordMaskingCollator(tokenizer, wwm_probability=1.0, **options)
        assert np.flatnonzero(is_target(every(rows))[0]).tolist() == [3, 4, 5, 9]
        assert is_target(every(rows))[1].all()
    collator = WholeWordMaskingCollator(tokenizer, wwm_probability=0.5)
    keys = np.array([7, 7], np.uint64)
    for seed in range(20):
        masked, _ = collator.mask(to_columns(rows), key=keys + np.uint64(seed))
        first, second = (masked["labels"] != -100).reshape(2, -1)[:, [3, 4, 5, 9]]
        # All but those of a row that would have no target otherwise.
        assert (first == second).all() or not second.any()


@pytest.mark.parametrize("role", ["eos", "pad", None])
def test_an_unknown_token_of_another_role_or_none_is_no_word(role: str | None) -> None:
    """As GPT-2's tokenizer has it, and byte-level ones without any."""
    tokenizer = small_tokenizer("a", "b")
    tokenizer.unk_token = None if role is None else tokenizer.pad_token
    if role == "eos":
        tokenizer.eos_token = tokenizer.unk_token
    rows = [{"input_ids": [0, 5, 6, 0], "word_ids": [-1, 0, 1, -1]}]
    batch = WholeWordMaskingCollator(tokenizer, wwm_probability=1.0)(rows)
    assert is_target(batch).tolist() == [[False, True, True, False]]


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_rows_of_unknown_words_have_no_target(weight: float) -> None:
    """Nor does a batch of them, whose loss is 0, and whose gradient by the model's own loss is."""
    tokenizer = small_tokenizer("a", "b")
    row = {"input_ids": [2, 1, 1, 3], "word_ids": [-1, 0, 1, -1]}
    collator = WholeWordMaskingCollator(tokenizer, word_weights=lambda _: weight, seed=0)
    batch = collator([row, row])
    assert not is_target(batch).any()
    assert is_target(collator([row, {**row, "input_ids": [2, 5, 1, 3]}])).sum() == 1
    model = tiny_model(tokenizer)
    assert masked_lm_loss(model(**batch), batch["labels"]).item() == 0
    model(**batch).loss.backward()
    assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)


@kinds
@pytest.mark.parametrize("prefix", ["", "masked_"])
@pytest.mark.parametrize("keeps_words", [False, True])
def test_frozen_rows_pass_as_they_are(kind: str, prefix: str, keeps_words: bool) -> None:  # noqa: FBT001
    """With the words that they were masked by or without; in any format; only padded."""
    tokenizer, rows = shared(kind), rows_of(kind)
    options: Any = {"mask_replace_prob": 0.7, "random_replace_prob": 0.1}
    collator = WholeWordMaskingCollator(tokenizer, pad_to_multiple_of=8, **options)
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    frozen = insert_random_mask(columns, collator, prefix=prefix)
    kept = {**(columns if prefix else {"word_ids": columns["word_ids"]}), **frozen}
    dataset = Dataset.from_dict(kept if keeps_words else dict(frozen))
    expected = [
        ([*inputs], [*labels])
        for inputs, labels in zip(
            frozen[prefix + "input_ids"], frozen[prefix + "labels"], strict=True
        )
    ]
    for layout, at_once in ((None, 70), ("torch", 3), ("numpy", 2)):
        made = dataset.with_format(layout)
        found: Masks = []
        for start in range(0, len(made), at_once):
            batch = collator([made[i] for i in range(start, min(start + at_once, len(made)))])
            assert not batch.keys() - {"input_ids", "attention_mask", "labels", "token_type_ids"}
            assert batch["labels"].shape[1] % 8 == 0
            found += masks(batch)
        assert found == expected


def test_copies_of_the_tokens_are_no_masks() -> None:
    """As `group_texts` makes them, at the padding too; a batch of them is masked, or refused."""
    tokenizer = shared("wordpiece")
    collator = WholeWordMaskingCollator(tokenizer, seed=0)
    rows = [{**row, "labels": row["input_ids"]} for row in rows_of("wordpiece")[:6]]
    plain = collator([{n: row[n] for n in row if n != "labels"} for row in rows])
    for layout in (None, "numpy"):
        copies = Dataset.from_list(rows).with_format(layout)
        assert masks(collator([*copies])) == masks(plain)
    padded = [{**row, "labels": [*row["labels"][:-1], -100]} for row in rows]
    padded = [{**row, "attention_mask": [1] * (len(row["labels"]) - 1) + [0]} for row in padded]
    assert masks(collator(padded))[0] == masks(collator([padded[0]]))[0]
    without = [{n: row[n] for n in row if n != "word_ids"} for row in padded]
    with pytest.raises(ValueError, match="row 0 of the batch has no 'word_ids'"):
        collator(without)
    collator.set_epoch(1)
    frozen = [
        {**row, "input_ids": inputs[: len(row["labels"])], "labels": labels[: len(row["labels"])]}
        for row, (inputs, labels) in zip(rows, masks(plain), strict=True)
    ]
    assert masks(collator(frozen)) == masks(plain)
    for nothing in ([], torch.tensor([], dtype=torch.int64)):  # an empty first row is no copy
        empty: dict[str, Any] = dict.fromkeys(frozen[0], nothing)
        assert masks(collator([empty, *frozen]))[1:] == masks(plain)


def random_rows(rows: int, words: int, *, low: int = 5, high: int = 105) -> np.ndarray:
    """Return one-token words, the same at every call, no two rows alike."""
    return np.random.default_rng(0).integers(low, high, (rows, words))


def as_rows(tokens: np.ndarray) -> list[dict[str, Any]]:
    """Make a row of each line, and a word of each token."""
    return [{"input_ids": line, "word_ids": np.arange(len(line))} for line in tokens]


@pytest.mark.parametrize(("words", "rate"), [(100, 0.2), (64, 0.15), (7, 0.3), (3, 0.1), (10, 0.0)])
def test_exact_budget_gives_every_row_its_share(words: int, rate: float) -> None:
    """Floor or ceiling of the share, never none, and right on average within 4.5 deviations."""
    rows = as_rows(random_rows(2000, words))
    collator = WholeWordMaskingCollator(
        shared("wordpiece"), wwm_probability=rate, budget="exact", seed=0
    )
    counts = is_target(collator(rows)).sum(axis=1)
    share = rate * words
    assert set(counts) == {max(int(np.floor(share)), 1), max(int(np.ceil(share)), 1)}
    if share > 1:
        assert abs(counts.mean() - share) <= 4.5 * (share % 1 * (1 - share % 1) / len(rows)) ** 0.5


@pytest.mark.parametrize("budget", ["bernoulli", "exact"])
@pytest.mark.parametrize(
    ("heavy", "rate", "heavy_rate"), [(4.0, 0.2, 20 * 4 / (20 * 4 + 76)), (1000.0, 0.3, 1.0)]
)
def test_heavy_words_are_likelier_at_the_same_overall_rate(
    budget: Any, heavy: float, rate: float, heavy_rate: float
) -> None:
    """Of 100 words 20 take what their weight gives them, up to all of them, and 4 nothing.

    Within 4.5 standard deviations. Under the exact budget words of a row compete, so that the rate
    of heavy ones is only near that.
    """
    tokenizer = shared("wordpiece")
    weights = np.array([heavy] * 40 + [1.0] * 40 + [0.0] * (len(tokenizer) - 80))
    tokens = np.hstack(
        [random_rows(1000, n, low=low, high=low + 30) for n, low in [(20, 5), (76, 45), (4, 90)]]
    )
    for given_weights in (weights, lambda text: weights[tokenizer.convert_tokens_to_ids(text)]):
        collator = WholeWordMaskingCollator(
            tokenizer, wwm_probability=rate, budget=budget, word_weights=given_weights, seed=0
        )
        targets = is_target(collator(as_rows(tokens)))
        assert not targets[:, 96:].any()
        slack = 0.06 if budget == "exact" else 4.5 * (heavy_rate * (1 - heavy_rate) / 20_000) ** 0.5
        assert abs(targets[:, :20].mean() - heavy_rate) <= slack
        if budget == "exact":
            assert (targets.sum(axis=1) == 100 * rate).all()
        else:
            assert abs(targets.mean() - rate) <= 4.5 * (rate * (1 - rate) / 100_000) ** 0.5


def test_words_that_all_weigh_nothing_are_masked_evenly() -> None:
    """A row without a word of weight is as without weights; so are tiny and huge ones alike."""
    tokenizer = shared("wordpiece")
    rows = as_rows(random_rows(200, 20, low=5, high=60))
    rows = [{**row, "word_ids": row["word_ids"] // 2} for row in rows]
    weights = np.zeros(len(tokenizer))
    weights[80] = 1.0
    plain = masks(WholeWordMaskingCollator(tokenizer, seed=0)(rows))
    for weight in (0.0, 5e-324, 1.5e308):  # sums of which are infinite
        weights[5:60] = weight
        weighted = WholeWordMaskingCollator(tokenizer, word_weights=weights, seed=0)
        assert masks(weighted(rows)) == plain


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"wwm_probability": 1.2}, r"wwm_probability is 1.2; .* in \[0, 1\]"),
        ({"mask_replace_prob": -0.1}, r"mask_replace_prob is -0.1; .* in \[0, 1\]"),
        ({"random_replace_prob": float("nan")}, r"random_replace_prob is nan; .* in \[0, 1\]"),
        ({"random_replace_prob": 0.1}, r"mask_replace_prob 1.0 and random_replace_prob 0.1 sum to"),
        ({"budget": "even"}, r"budget is 'even'; it must be one of 'bernoulli', 'exact'"),
        ({"return_tensors": "tf"}, r"return_tensors is 'tf'; it must be one of 'pt', 'np'"),
        ({"pad_to_multiple_of": 0}, r"pad_to_multiple_of is 0; it must be a whole number, 1 or"),
        ({"word_weights": [1.0, 2.0]}, r"word_weights has shape \(2,\); it must be \(\d+,\)"),
        ({"word_weights": "negative"}, r"word_weights is -1.0 for token 3; weights must be finite"),
        ({"word_weights": "nan"}, r"word_weights is nan for token 3; weights must be finite"),
        ({"word_weights": "zero"}, r"word_weights is 0 for all tokens; .* not all 0"),
        ({"wwm_probability": "0.2"}, "wwm_probability is '0.2'; it must be a probability"),
        ({"wwm_probability": None}, "wwm_probability is None; it must be a probability"),
        ({"mask_replace_prob": torch.tensor(0.8)}, "mask_replace_prob is tensor.* a probability"),
        ({"pad_to_multiple_of": "8"}, "pad_to_multiple_of is '8'; it must be a whole number"),
        ({"pad_to_multiple_of": 8.0}, "pad_to_multiple_of is 8.0; it must be a whole number"),
        ({"tokenizer": None}, "tokenizer None has no mask token"),
        ({"word_weights": "heavy"}, "word_weights is 'heavy'; it must be a callable, or an array"),
        ({"word_weights": {"film": 2}}, "word_weights is {'film': 2}; it must be a callable"),
        ({"word_weights": torch.ones(9).bfloat16()}, "word_weights is tensor.* must be a callable"),
    ],
)
def test_arguments_that_are_wrong(arguments: dict[str, Any], message: str) -> None:
    """The argument, the value seen and what is required, before any row is read."""
    size = len(shared("wordpiece"))
    arrays = {name: np.ones(size) for name in ("negative", "nan")} | {"zero": np.zeros(size)}
    arrays["negative"][3], arrays["nan"][3] = -1, np.nan
    if arguments.get("word_weights") in [*arrays]:
        arguments = {"word_weights": arrays[arguments["word_weights"]]}
    with pytest.raises(ValueError, match=message):
        WholeWordMaskingCollator(**{"tokenizer": shared("wordpiece"), **arguments})


@pytest.mark.parametrize("weight", [-1, float("nan"), float("inf"), None, "heavy", [1, 2]])
def test_word_weights_that_return_no_weight(weight: Any) -> None:
    """The word and its weight are in the message."""
    collator = WholeWordMaskingCollator(shared("wordpiece"), word_weights=lambda text: weight)
    with pytest.raises(
        ValueError, match=r"word_weights\('film'\) is .*; a weight must be a finite"
    ):
        collator(chunk(shared("wordpiece"), ["film"], 8))


def test_tokenizers_that_cannot_mask() -> None:
    """No mask token, and nothing to draw replacements from."""
    tokenizer = small_tokenizer("[unused1]")
    with pytest.raises(ValueError, match=r"random_replace_prob is 0.1, .* no token to draw"):
        WholeWordMaskingCollator(tokenizer, mask_replace_prob=0.8, random_replace_prob=0.1)
    WholeWordMaskingCollator(tokenizer)
    tokenizer.mask_token = None
    with pytest.raises(
        ValueError, match=r"tokenizer .* has no mask token; use the tokenizer of a masked"
    ):
        WholeWordMaskingCollator(tokenizer)


good = {"input_ids": [2, 9, 3], "word_ids": [-1, 0, -1]}
bare = {"input_ids": [2, 9, 3]}
far = {"input_ids": [2, 9, 4000], "word_ids": [-1, 0, -1]}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([], r"features is empty"),
        ([bare], r"row 0 .* no 'word_ids', of columns \['input_ids'\]; tokenize .*_columns=False"),
        ([good, {**good, "word_ids": None}], r"row 1 of the batch has no 'word_ids'"),
        ([{"word_ids": [0]}], r"has \['word_ids'\], without 'input_ids'; tokenize the documents"),
        ([good, bare], r"row 1 of the batch has columns \['input_ids'\], row 0 has .* the same"),
        ([good, {**good, "word_ids": [0, 1]}], r"row 1 has 3 'input_ids' but 2 'word_ids'; all"),
        ([{**good, "text": "abc"}], r"'text' is .* 'abc', of type str; .*remove_columns=\['text'"),
        ([{**good, "label": 1}], r"'label' is .* row 0 is 1, of type int; .*\['label'\]"),
        ([{**good, "label": torch.tensor(1)}], r"'label' is .* is tensor\(1\), of type Tensor"),
        ([{**good, "score": [0.1, 0.2, 0.3]}], r"'score' holds float64 .*Remove 'score'"),
        ([{**good, "word_ids": [0, 0.5, 1]}], r"'word_ids' holds float64 "),
        ([good, far], r"row 1 .* has token id 4000, but .* ids 0 to \d+ .*after adding tokens"),
        ([{**good, "input_ids": [2, -9, 3]}], r"row 0 of the batch has token id -9"),
        ([[1, 2]], r"row 0 .* is \[1, 2\], a list; each row must be a dict"),
    ],
)
def test_rows_that_cannot_be_masked(bad: list[Any], message: str) -> None:
    """The row or column, what was seen there, and the cure."""
    with pytest.raises(TypeError if bad == [[1, 2]] else ValueError, match=message):
        WholeWordMaskingCollator(shared("wordpiece"), seed=0)(bad)


def test_padding_needs_a_padding_token() -> None:
    """Rows of one length need none."""
    tokenizer = tiny_tokenizer("wordpiece")
    tokenizer.pad_token = None
    collator = WholeWordMaskingCollator(tokenizer, seed=0)
    assert is_target(collator([good, good])).sum() == 2
    with pytest.raises(
        ValueError, match=r"rows of 1 to 3 tokens need padding to 3, .* set tokenizer.pad_token"
    ):
        collator([good, {"input_ids": [9], "word_ids": [0]}])


def test_documents_collapsed_into_one_word_warn_once() -> None:
    """`word_ids()` of a tokenizer without words: said once, to the caller, with the cure."""
    tokenizer = shared("byte_bpe_nosplit")
    encoding = tokenizer(" ".join(tiny_corpus(20)), add_special_tokens=False)
    size = len(encoding["input_ids"])
    row = {"input_ids": encoding["input_ids"], "word_ids": encoding.word_ids()}
    three = {"input_ids": row["input_ids"], "word_ids": [3 * i // size for i in range(size)]}
    fine = tokenize_with_word_ids({"text": tiny_corpus(20)}, tokenizer)
    for bad in (row, three):
        collator = WholeWordMaskingCollator(tokenizer, seed=0)
        collator([{name: fine[name][0] for name in fine}])
        with pytest.warns(
            UserWarning, match=r"word_ids make [13] word\(s\) .*word_boundaries"
        ) as caught:
            collator([bad])
        assert caught[0].filename == __file__
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            collator([bad])


def test_rows_that_lie_end_to_end_are_collated_as_they_are() -> None:
    """As `table_reader` reads them; they are left as they were."""
    collator = WholeWordMaskingCollator(shared("wordpiece"), seed=0)
    joined = join_rows(to_columns(rows_of("wordpiece")))
    before = copy.deepcopy(joined)
    apart, together = (collator.collate(rows, key=5) for rows in (rows_of("wordpiece"), joined))
    assert together.keys() == apart.keys()
    for name, values in apart.items():
        np.testing.assert_array_equal(together[name], values)
    np.testing.assert_equal(joined, before)


def test_a_mask_token_that_the_vocabulary_lacks() -> None:
    """Its id is that of the unknown token, or none, until it is added; the cure works."""
    without = tiny_tokenizer("wordpiece")
    without.mask_token = "<mask>"  # noqa: S105
    with pytest.raises(ValueError, match=r"no mask token.*add_special_tokens\(\{'mask_token'"):
        WholeWordMaskingCollator(without)
    without.add_special_tokens({"mask_token": "<mask>"})
    batch = WholeWordMaskingCollator(without, seed=0)(list(rows_of("wordpiece")))
    assert (batch["input_ids"] == without.convert_tokens_to_ids("<mask>")).any()


def test_seeds_keys_and_epochs_are_whole_numbers() -> None:
    """Strings would be others than their numbers, as keys and epochs of more than 64 bits."""
    for seed in ("42", 1.0, [1], "x", True):
        with pytest.raises(TypeError, match=r"seed is .*; it must be a whole number"):
            WholeWordMaskingCollator(shared("wordpiece"), seed=seed)  # type: ignore[arg-type]
    collator, rows = WholeWordMaskingCollator(shared("wordpiece"), seed=0), rows_of("wordpiece")
    for key in (1.5, "1"):
        with pytest.raises(TypeError, match=r"key is .*; it must be a whole number"):
            collator.collate(rows, key=key)  # type: ignore[arg-type]
    for key in (-1, 2**64):
        with pytest.raises(ValueError, match=f"key is {key}; .*, 0 to {2**64 - 1}"):
            collator.collate(rows, key=key)
    collator.collate(rows, key=2**64 - 1)
    with pytest.raises(TypeError, match=r"epoch is 1\.0; it must be a whole number"):
        collator.set_epoch(1.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=rf"epoch is {2**64}; .*, {-(2**63)} to {2**63 - 1}"):
        collator.set_epoch(2**64)
    collator.set_epoch(2**63 - 1)
    assert is_target(collator(rows)).any()


def test_masks_of_packed_rows_can_be_moved_and_read() -> None:
    """Whatever loops, loaders and accelerate do to a batch works, and keeps the kind of mask."""
    row = {"input_ids": [9, 10, 11], "word_ids": [0, 1, 2], "document_ids": [0, 0, 1]}
    mask = WholeWordMaskingCollator(shared("wordpiece"), seed=0)([row, row])["attention_mask"]
    plain = mask.as_subclass(torch.Tensor)
    assert (type(mask), type(plain)) == (PackedAttentionMask, torch.Tensor)
    moved = {
        "moved": mask.to("cpu", non_blocking=True),
        "copied": mask.clone(),
        "deeply": copy.deepcopy(mask),
        "shallow": copy.copy(mask),
        "pickled": pickle.loads(pickle.dumps(mask)),  # noqa: S301
        "rows": mask[:1],
        "split": torch.cat([*mask.split(1)]),
        "chunks": torch.cat(mask.chunk(2)),
        "joined": concatenate([{"attention_mask": mask}, {"attention_mask": mask}]),
        "sliced": slice_tensors({"attention_mask": mask}, slice(0, 1)),
        "sent": send_to_device({"attention_mask": mask}, "cpu"),
        "filled": torch.empty_like(mask).copy_(mask).contiguous(),
    }
    for name, other in moved.items():
        tensor = other["attention_mask"] if isinstance(other, dict) else other
        assert type(tensor) is PackedAttentionMask, name
        assert tensor.tolist() == [[1, 1, 1]] * len(tensor), name
    assert type(mask == 1) is type(mask != 1) is torch.Tensor
    assert torch.equal(mask, plain)
    torch.testing.assert_close(mask, mask)
    assert find_batch_size({"attention_mask": mask}) == len(mask) == 2
    assert (mask.shape, mask.device, mask.dtype) == (plain.shape, plain.device, torch.int64)
    assert int(mask.sum()) == mask.numel() == np.asarray(mask).sum() == mask.numpy().sum() == 6
    assert "1, 1" in repr(mask)
    assert "6" in f"{mask.sum()}"


def test_a_model_cannot_compute_with_masks_of_packed_rows() -> None:
    """By none of the ways in which models of transformers turn a mask into one for attention."""
    mask = torch.ones(2, 3, dtype=torch.int64).as_subclass(PackedAttentionMask)
    for compute in (
        lambda: mask.to(torch.bool),
        lambda: mask.to(device="cpu", dtype=torch.bool),
        mask.bool,
        mask.float,
        lambda: mask.type_as(torch.ones(1)),
        lambda: 1.0 - mask,
        lambda: (1 - mask[:, None, None, :]) * -10000.0,
        lambda: mask / 2,
        lambda: mask[:, None, None, :].expand(-1, 1, 3, -1).to(torch.float16),
        lambda: mask.unsqueeze(-1).mul(mask.unsqueeze(-2)).to(torch.uint8),
        lambda: torch.ones(2, 3) * mask,
        mask.all,
        lambda: mask > 0,
        lambda: mask.sum(-1, dtype=torch.int32),
    ):
        with pytest.raises(ValueError, match=r"hold several documents .*call isolate_documents"):
            compute()


@pytest.mark.parametrize("dispatch", [None, True])
def test_trainer_takes_a_stream_of_packed_rows(
    bert: PreTrainedModel, tmp_path: Path, *, dispatch: bool | None
) -> None:
    """The batches of a stream are joined, cut and sent, and then isolated; else it is said."""
    tokens = tokenize_with_word_ids({"text": tiny_corpus(40)}, shared("wordpiece"))
    stream = Dataset.from_dict(pack_texts(tokens, chunk_size=32)).to_iterable_dataset()
    with isolate_documents(bert):
        trainer = make_trainer(bert, stream, tmp_path, dispatch_batches=dispatch)
        assert 3 < trainer.train().training_loss < 9
    with pytest.raises(ValueError, match="call isolate_documents"):
        make_trainer(bert, stream, tmp_path, dispatch_batches=dispatch).train()
