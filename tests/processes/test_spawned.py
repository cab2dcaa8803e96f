"""Workers of a run that are spawned, not forked, as on Windows and macOS."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from datasets import Dataset

from mlmadapt import WholeWordMaskingCollator
from mlmadapt.testing import tiny_rows, tiny_tokenizer
from mlmadapt.training.batches import BatchPlan, training_batches


@pytest.mark.parametrize("kind", ["list", pytest.param("dataset", marks=pytest.mark.slow)])
def test_spawned_workers_make_the_same_batches(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """What a worker needs can be sent to it."""
    spawn = torch.multiprocessing.get_context("spawn")
    for name in ("Process", "Queue", "Event"):
        monkeypatch.setattr(torch.multiprocessing, name, getattr(spawn, name))
    collator = WholeWordMaskingCollator(tiny_tokenizer())
    rows: Any = tiny_rows(collator.tokenizer)
    plan = BatchPlan(rows=len(rows), batch_size=6)
    made = []
    for workers in (0, 1):
        dataset = Dataset.from_list(rows) if kind == "dataset" else rows
        batches = training_batches(dataset, plan, collator, epoch=0, num_workers=workers)
        made.append([{name: values.tolist() for name, values in b.items()} for (b,), _ in batches])
    assert made[0] == made[1]
