"""Packed rows in several processes: workers that hand them over, and runs that share them out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from torch.utils.data import DataLoader

from mlmadapt import WholeWordMaskingCollator
from tests.scripts.packed import PACKED, TOKENIZER, build
from tests.scripts.processes import outcome, start

if TYPE_CHECKING:
    from pathlib import Path


def test_workers_hand_over_packed_batches() -> None:
    """A batch from a worker process still refuses a model that would mix its documents."""
    collator = WholeWordMaskingCollator(TOKENIZER, seed=0)
    loader = DataLoader(PACKED, batch_size=4, num_workers=1, collate_fn=collator, timeout=120)
    with pytest.raises(ValueError, match="call isolate_documents"):
        build("bert")(**next(iter(loader)))


@pytest.mark.distributed
@pytest.mark.parametrize(("world", "precision"), [(1, "no"), (1, "bf16"), (2, "no")])
def test_packed_rows_resume_exactly(tmp_path: Path, world: int, precision: str) -> None:
    """A run on packed rows, with dropout, ends bit for bit the same after a kill in an epoch."""
    settings: dict[str, Any] = {"packed": True, "world": world, "mixed_precision": precision}
    settings |= {"dataloader_num_workers": 1, "per_device_train_batch_size": 3 // world}
    whole = outcome(tmp_path / "whole", **settings)
    ended = start(
        "train", folder=str(tmp_path / "killed"), at_step={"3": [["kill", -1]]}, **settings
    )
    assert ended[0].code == -9
    assert outcome(tmp_path / "killed", resume_from_checkpoint=True, **settings) == whole


@pytest.mark.distributed
def test_packed_rows_on_two_processes(tmp_path: Path) -> None:
    """Two processes learn from packed rows what one does."""
    settings = {"packed": True, "dropout": False}
    one = outcome(tmp_path / "one", per_device_train_batch_size=4, **settings)
    two = outcome(tmp_path / "two", world=2, per_device_train_batch_size=2, **settings)
    assert two["tokens"] == one["tokens"]
    assert two["final"] == pytest.approx(one["final"], rel=1e-5)
