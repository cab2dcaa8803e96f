"""What broke when masks were tried by hostile hands."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    default_data_collator,
)

from mlmadapt import (
    WholeWordMaskingCollator,
    insert_random_mask,
    show_masks,
    tokenize_with_word_ids,
)
from mlmadapt.data.tokenization import _unlimited
from mlmadapt.masking.selection import seeded
from mlmadapt.testing import tiny_corpus, tiny_tokenizer

tokenizer = tiny_tokenizer("wordpiece")
columns: Any = tokenize_with_word_ids({"text": tiny_corpus(8)}, tokenizer)
rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def draw_slowly(features: list[dict[str, Any]]) -> dict[str, Any]:
    """Mask from the global generators, and give other threads time to move them."""
    ids = [int(token) for token in features[0]["input_ids"]]
    labels = [-100] * len(ids)
    for place in range(1, 3):
        time.sleep(0.001)
        labels[place], ids[place] = ids[place], random.randrange(9)  # noqa: S311
    return {"input_ids": np.array([ids]), "labels": np.array([labels])}


def test_threads_draw_their_own_masks() -> None:
    """What one draws from the global generators, another does not move."""
    once = insert_random_mask(columns, draw_slowly)
    state = random.getstate()
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: insert_random_mask(columns, draw_slowly), range(4)))
    assert random.getstate() == state
    for frozen in results:
        for name, values in once.items():
            assert all(map(np.array_equal, frozen[name], values))


labelled = {
    "input_ids": columns["input_ids"],
    "attention_mask": columns["attention_mask"],
    "labels": columns["input_ids"],
}


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
    fills = {"input_ids": tokenizer.pad_token_id, "attention_mask": 0, "labels": -100}
    padded = {
        name: [[*map(int, row), *[fills[name]] * padding] for row in values]
        for name, values in labelled.items()
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
    classes = [[-100, *[1] * (len(row) - 2), -100] for row in labelled["input_ids"]]
    for collator in (DataCollatorForTokenClassification(tokenizer), label_the_mask):
        with pytest.raises(ValueError, match=r"[1-9]\d* of them other than the row's own token"):
            insert_random_mask({**labelled, "labels": classes}, collator)


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
        insert_random_mask(columns, collator)


def test_a_mask_token_that_the_vocabulary_lacks() -> None:
    """Its id is that of the unknown token, or none, until it is added; the cure works."""
    without = tiny_tokenizer("wordpiece")
    without.mask_token = "<mask>"  # noqa: S105
    with pytest.raises(ValueError, match=r"no mask token.*add_special_tokens\(\{'mask_token'"):
        WholeWordMaskingCollator(without)
    without.add_special_tokens({"mask_token": "<mask>"})
    batch = WholeWordMaskingCollator(without, seed=0)(rows)
    assert (batch["input_ids"] == without.convert_tokens_to_ids("<mask>")).any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"wwm_probability": "0.2"}, "wwm_probability is '0.2'; it must be a probability"),
        ({"wwm_probability": None}, "wwm_probability is None; it must be a probability"),
        ({"mask_replace_prob": torch.tensor(0.8)}, "mask_replace_prob is tensor.* a probability"),
        ({"pad_to_multiple_of": "8"}, "pad_to_multiple_of is '8'; it must be a whole number of"),
        ({"pad_to_multiple_of": 8.0}, "pad_to_multiple_of is 8.0; it must be a whole number of"),
        ({"tokenizer": None}, "tokenizer None has no mask token"),
        ({"word_weights": "heavy"}, "word_weights is 'heavy'; it must be a callable, or an array"),
        ({"word_weights": {"film": 2}}, "word_weights is {'film': 2}; it must be a callable"),
        (
            {"word_weights": torch.ones(len(tokenizer), dtype=torch.bfloat16)},
            "word_weights is tensor.* it must be a callable, or an array",
        ),
    ],
)
def test_arguments_of_other_types(arguments: dict[str, Any], message: str) -> None:
    """The argument, what was seen and what is required."""
    with pytest.raises(ValueError, match=message):
        WholeWordMaskingCollator(**{"tokenizer": tokenizer, **arguments})


@pytest.mark.parametrize("seed", ["42", 1.0, [1], "x"])
def test_seeds_are_whole_numbers(seed: Any) -> None:
    """A string would be another seed than the number that it looks like."""
    message = r"seed is .*; it must be a whole number"
    with pytest.raises(TypeError, match=message):
        WholeWordMaskingCollator(tokenizer, seed=seed)
    with pytest.raises(TypeError, match=message):
        insert_random_mask(columns, WholeWordMaskingCollator(tokenizer), seed=seed)


def test_keys_and_epochs_are_whole_numbers_in_64_bits() -> None:
    """A larger one would be taken for another."""
    collator = WholeWordMaskingCollator(tokenizer, seed=0)
    for key in (1.5, "1"):
        with pytest.raises(TypeError, match=r"key is .*; it must be a whole number"):
            collator.collate(rows, key=key)  # type: ignore[arg-type]
    for key in (-1, 2**64):
        with pytest.raises(ValueError, match=f"key is {key}; it must be 0 to {2**64 - 1}"):
            collator.collate(rows, key=key)
    collator.collate(rows, key=2**64 - 1)
    with pytest.raises(TypeError, match=r"epoch is 1\.0; it must be a whole number"):
        collator.set_epoch(1.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=f"epoch is {2**64}; it must be {-(2**63)} to {2**63 - 1}"):
        collator.set_epoch(2**64)
    collator.set_epoch(2**63 - 1)


def test_weights_near_the_largest_number_weigh_what_they_say() -> None:
    """Sums of them are infinite, and left one word with all the weight."""
    masks = [
        WholeWordMaskingCollator(
            tokenizer, seed=0, wwm_probability=0.5, word_weights=np.full(len(tokenizer), weight)
        )(rows)["labels"].tolist()
        for weight in (1.0, 1.5e308)
    ]
    assert masks[0] == masks[1]


def test_record_batches_are_rows() -> None:
    """Arrow's other kind of batch."""
    table = pa.table({name: [list(row) for row in values] for name, values in columns.items()})
    (batch,) = table.to_batches()
    collator = WholeWordMaskingCollator(tokenizer)
    assert insert_random_mask(batch, collator) == insert_random_mask(table, collator)


def draw_a_mask(features: list[dict[str, Any]]) -> dict[str, Any]:
    """Mask by a collator of another library."""
    return DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.5)(
        [{"input_ids": row["input_ids"]} for row in features]
    )


@pytest.mark.parametrize("collator", [WholeWordMaskingCollator(tokenizer), draw_a_mask])
@pytest.mark.parametrize("layout", ["arrow", "pandas"])
def test_a_table_is_frozen_to_a_table(collator: Any, layout: str) -> None:
    """As a stream asks for it: of a dict, it says that the function returned something else."""
    lists = {name: [list(row) for row in values] for name, values in columns.items()}
    expected = insert_random_mask(columns, collator)
    frozen: Any = insert_random_mask(pa.table(lists), collator)
    assert frozen.to_pydict() == {
        name: [row.tolist() for row in values] for name, values in expected.items()
    }
    stream = Dataset.from_dict(lists).to_iterable_dataset().with_format(layout)
    mapped = stream.map(
        insert_random_mask,
        batched=True,
        batch_size=3,
        fn_kwargs={"data_collator": collator},
        remove_columns=[*lists],
    )
    assert list(mapped.with_format(None)) == frozen.to_pylist()


def start_workers_first(collator: WholeWordMaskingCollator, told: Any) -> None:
    """Train as a process that was handed a collator and sets its epoch too late."""
    loader = DataLoader(rows, collate_fn=collator, num_workers=1, persistent_workers=True)
    list(loader)
    try:
        collator.set_epoch(1)
    except RuntimeError as error:
        told.put(str(error))
    else:
        told.put("")


@pytest.mark.parametrize("context", ["fork", "forkserver"])
def test_workers_that_would_not_see_an_epoch_are_noticed(context: Any) -> None:
    """They hold the epoch of the process that made the collator, and would go on with it."""
    processes = multiprocessing.get_context(context)
    told = processes.Queue()
    collator = WholeWordMaskingCollator(tokenizer, seed=0)
    process = processes.Process(target=start_workers_first, args=(collator, told))
    process.start()
    assert "call set_epoch(0) before they start" in told.get(timeout=180)
    process.join(60)


frozen = {"input_ids": [[2, 4, 3]], "labels": [[-100, 9, -100]]}


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({**frozen, "labels": [[-100, 9]]}, "row 0 has 3 'input_ids' but 2 'labels'"),
        ({**frozen, "labels": [[-100, float("nan"), 1]]}, "column 'labels' holds float64"),
        ({**frozen, "input_ids": [[2, 10**6, 3]]}, "has token id 1000000, .* ids 0 to "),
        ({**frozen, "labels": [[-100, -5, -100]]}, "has token id -5, .* ids 0 to "),
        ({"input_ids": [], "labels": []}, "batch has no rows"),
        ({"input_ids": np.empty((0, 3)), "labels": np.empty((0, 3))}, "batch has no rows"),
    ],
)
def test_batches_that_cannot_be_shown(batch: Any, message: str) -> None:
    """What is wrong, and where."""
    with pytest.raises(ValueError, match=message):
        show_masks(batch, tokenizer)


def test_no_tokenizer_is_told() -> None:
    """As by the collator, which needs one as well."""
    with pytest.raises(TypeError, match="tokenizer is None; pass the tokenizer that made the rows"):
        show_masks(frozen, None)  # type: ignore[arg-type]


def test_word_ids_of_nan_are_no_word() -> None:
    """As everywhere else."""
    features = [{"input_ids": [2, 9, 3], "word_ids": [np.nan, 0, np.nan]}]
    batch = WholeWordMaskingCollator(tokenizer)(features)
    assert "1 of 1 words" in str(show_masks(batch, tokenizer, features))


def test_a_row_is_one_line() -> None:
    """Also where its text holds separators of lines that are not control characters."""
    odd = tiny_tokenizer("byte_bpe")
    ids = odd("a\u2028b\u2029c", add_special_tokens=False)["input_ids"]
    batch = {"input_ids": [ids], "labels": [[-100] * len(ids)]}
    features = [{"input_ids": ids, "word_ids": [0] * len(ids)}]
    text = show_masks(batch, odd, features).to_text(color=False)
    assert len(text.splitlines()) == 2
    assert r"a\u2028b\u2029c" in text


def test_seeded_blocks_do_not_mix() -> None:
    """A thread waits for the block of another to end; one block can hold another."""

    def draw(key: int) -> list[float]:
        with seeded(key):
            numbers = [random.random()]  # noqa: S311
            time.sleep(0.01)
            with seeded(0):
                random.random()  # noqa: S311
            return [*numbers, random.random()]  # noqa: S311

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(draw, range(8))) == [draw(key) for key in range(8)]


backend = tiny_tokenizer("wordpiece").backend_tokenizer
backend.enable_truncation(7)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing is forked here")
@pytest.mark.parametrize(
    "block", [partial(seeded, 0), partial(_unlimited, backend)], ids=["seeded", "unlimited"]
)
def test_a_child_does_not_wait_for_a_thread_that_it_does_not_have(block: Any) -> None:
    """A fork while another thread is in its turn: DataLoader workers are made so."""
    holds, goes_on = threading.Event(), threading.Event()

    def hold() -> None:
        with block():
            holds.set()
            goes_on.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    assert holds.wait(60)
    threading.Timer(0.1, goes_on.set).start()
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(5)  # ends it, if it waits
        whole = backend.truncation is not None  # not as the other thread had it in between
        with block(), block():
            os._exit(0 if whole else 1)
    _, status = os.waitpid(child, 0)
    thread.join(60)
    assert os.waitstatus_to_exitcode(status) == 0
    with block():
        pass
