"""Other processes make what this one makes, and see what this one is told."""

from __future__ import annotations

import copy
import functools
import os
import pickle
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
import pytest
from torch.utils.data import DataLoader

from mlmadapt import WholeWordMaskingCollator, find_domain_words
from mlmadapt.data import vocabulary
from mlmadapt.testing import tiny_corpus, tiny_rows, tiny_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

TOKENIZER = tiny_tokenizer()
ROWS = tiny_rows(TOKENIZER, 70)


def linear(done: float) -> float:
    """Fall from 60 to 10 %."""
    return 0.6 - 0.5 * done


def masks(batch: dict[str, Any]) -> list[tuple[list[int], list[int]]]:
    """Return what a collator made of each row, without the padding."""
    columns = [np.asarray(batch[name]) for name in ("attention_mask", "input_ids", "labels")]
    return [
        (ids[real > 0].tolist(), labels[real > 0].tolist())
        for real, ids, labels in zip(*columns, strict=True)
    ]


@pytest.mark.parametrize(
    ("workers", "context", "persistent"),
    [
        (0, None, False),
        (2, "fork", False),
        (1, "fork", True),
        (2, "fork", True),
        (1, "spawn", True),
        (2, "forkserver", True),
    ],
)
def test_workers_mask_alike_and_see_every_epoch(
    workers: int, context: Any, *, persistent: bool
) -> None:
    """However a DataLoader works, an epoch has the masks that one process makes."""
    collator = WholeWordMaskingCollator(
        TOKENIZER,
        wwm_probability=linear,
        mask_replace_prob=0.8,
        random_replace_prob=0.1,
        seed=11,
    )
    loader = DataLoader(
        ROWS,
        batch_size=9,
        collate_fn=collator,
        num_workers=workers,
        multiprocessing_context=context,
        persistent_workers=persistent,
    )
    seen = []
    for epoch in range(3):
        collator.set_epoch(epoch)
        collator.set_progress(epoch / 2)
        seen.append([mask for batch in loader for mask in masks(batch)])
        assert seen[-1] == masks(collator(ROWS))
    assert len({str(epoch) for epoch in seen}) == 3


@pytest.mark.parametrize(
    "clone",
    [copy.copy, copy.deepcopy, lambda collator: pickle.loads(pickle.dumps(collator))],  # noqa: S301
    ids=["copy", "deepcopy", "pickle"],
)
def test_workers_of_a_copy_see_what_the_copy_is_told(clone: Any) -> None:
    """And not what the original is told."""
    collator = WholeWordMaskingCollator(TOKENIZER, seed=11)
    twin = clone(collator)
    loader = DataLoader(ROWS, batch_size=9, collate_fn=twin, num_workers=1, persistent_workers=True)
    for epoch in (0, 3):
        twin.set_epoch(epoch)
        collator.set_epoch(7)
        assert [mask for batch in loader for mask in masks(batch)] == masks(twin(ROWS))
    assert masks(twin(ROWS)) != masks(collator(ROWS))


@pytest.mark.parametrize("kind", ["wordpiece", "byte_bpe", "unigram"])
def test_several_processes_count_the_same(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a stream too, in more parts than are waited for; a wrong text has its own number."""
    monkeypatch.setattr(vocabulary, "_PART", 7)
    find = functools.partial(
        find_domain_words, tokenizer=tiny_tokenizer(kind), min_count=2, min_length=1
    )
    once = find(tiny_corpus(60), general_texts=tiny_corpus(20))
    assert once.found
    assert find(iter(tiny_corpus(60)), general_texts=tiny_corpus(20), num_proc=2) == once
    with pytest.raises(TypeError, match="document 9 of texts is 3, of type int; each document"):
        find([*tiny_corpus(9), 3], num_proc=2)


PIPELINE = """
import sys
from datasets import disable_progress_bars, load_from_disk
from mlmadapt import group_texts, phrases, tokenize_with_word_ids
from mlmadapt.testing import tiny_tokenizer

disable_progress_bars()
dataset = load_from_disk(sys.argv[1])
options = {
    "tokenizer": tiny_tokenizer("byte_bpe_nosplit"),
    "word_boundaries": phrases({"the", *(f"the {word}" for word in "film end movie cast".split())}),
}
for _ in range(2):
    tokens = dataset.map(
        tokenize_with_word_ids, batched=True, fn_kwargs=options, remove_columns=["text"]
    )
    rows = tokens.map(group_texts, batched=True, fn_kwargs={"chunk_size": 8})
    print([file["filename"] for file in tokens.cache_files + rows.cache_files])
"""


def test_second_run_hits_the_cache(tmp_path: Path) -> None:
    """A call leaves the tokenizer's fingerprint as it was, and every process has the same ones."""
    datasets.Dataset.from_dict({"text": tiny_corpus(20)}).save_to_disk(tmp_path)
    printed, files = set(), []
    for hash_seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", PIPELINE, str(tmp_path)],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            check=True,
            capture_output=True,
            text=True,
            timeout=300,
        )
        printed |= {*done.stdout.splitlines()}
        files.append({path: path.stat().st_mtime_ns for path in tmp_path.glob("cache-*")})
    assert len(printed) == 1
    assert printed.pop().count("cache-") == len(files[0]) == 2
    assert files[0] == files[1]
