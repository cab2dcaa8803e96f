"""Streams on several processes: each reads its own part of one that can be split."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.scripts.processes import outcome, start
from tests.scripts.tiny_run import logged

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("world", [2, 3])
def test_an_epoch_has_the_rows_that_one_process_reads(tmp_path: Path, world: int) -> None:
    """Split by us or by the caller, in other steps: as many as the longest part has."""
    settings = {"dropout": False, "save_strategy": "no", "stream": "shards"}
    one = outcome(tmp_path / "one", per_device_train_batch_size=4, max_steps=6, **settings)
    settings |= {"world": world, "per_device_train_batch_size": 2}
    settings["max_steps"] = {2: 8, 3: 6}[world]  # parts of 9 and 15, or of 5, 7 and 12 rows
    ours = outcome(tmp_path / "ours", **settings)
    assert ours["tokens"][0] == one["tokens"][0]  # masks go by the number of a row in its part
    assert outcome(tmp_path / "parts", **{**settings, "stream": "parts"}) == ours


def test_another_number_of_parts_is_another_run(tmp_path: Path) -> None:
    """Steps have other rows, and which ones were trained is not known."""
    settings = {"stream": "shards", "max_steps": 4, "folder": str(tmp_path)}
    start("train", world=2, per_device_train_batch_size=2, **settings)
    settings |= {"per_device_train_batch_size": 4, "resume_from_checkpoint": True}
    (ended,) = start("train", **settings)
    assert "train_dataset: parts was 2, is None; train_dataset: first rows changed" in ended.error


def test_parts_for_others_are_an_error(tmp_path: Path) -> None:
    """On every process, whichever has the part that would be right."""
    for ended in start("train", folder=str(tmp_path), world=2, stream="one part", max_steps=2):
        assert "ValueError: train_dataset is a stream of which the 2 processes" in ended.error
        assert "or give each its own by split_dataset_by_node(stream, process_i" in ended.error


def test_a_stream_that_cannot_be_split_is_shared_out(tmp_path: Path) -> None:
    """Three shards on two processes: the steps are those of one process, row for row."""
    settings = {"stream": "plain", "dropout": False, "max_steps": 5, "save_strategy": "no"}
    one = outcome(tmp_path / "one", per_device_train_batch_size=4, **settings)
    two = outcome(tmp_path / "two", per_device_train_batch_size=2, world=2, **settings)
    assert logged(one, "loss") == pytest.approx(logged(two, "loss"), abs=1e-5)


@pytest.mark.parametrize(("kind", "rows"), [("parts", 8), ("shuffled", 16)])
def test_a_killed_run_passes_over_the_rows_that_were_trained(
    tmp_path: Path, kind: str, rows: int
) -> None:
    """On each process, to the bit, and it says how many."""
    settings = {"stream": kind, "max_steps": 7, "world": 2, "per_device_train_batch_size": 2}
    whole = outcome(tmp_path / "whole", **settings)
    settings["folder"] = str(tmp_path / "killed")
    killed = start("train", at_step={"5": ["kill"]}, **settings)
    assert [process.code for process in killed] == [-9, -9]
    ended = start("train", resume_from_checkpoint=True, **settings)
    assert ended[0].result == whole
    assert [f"{rows} rows are passed over" in process.log for process in ended] == [True, True]
