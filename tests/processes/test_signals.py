"""SIGTERM and Ctrl-C leave a checkpoint, and the run after them ends as if there had been none."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

import pytest

from tests.scripts.processes import last_step, outcome, start, torchrun_train, train

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(("name", "code"), [("term", 143), ("interrupt", 130)])
@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.distributed)])
def test_a_signal_lets_the_step_end_and_leaves_a_checkpoint(
    tmp_path: Path, name: str, code: int, world: int
) -> None:
    """One process of several notes it, all leave with the usual code, and the run can go on."""
    settings = {"world": world, "save_strategy": "no", "per_device_train_batch_size": 8 // world}
    settings["dataloader_num_workers"] = 2 - world
    whole = outcome(tmp_path / "whole", **settings)
    folder = tmp_path / "left"
    ended = start("train", folder=str(folder), at_step={"2": [[name, world - 1]]}, **settings)
    assert [process.code for process in ended] == [code] * world
    # Several processes hear of it with the counts of the next step.
    assert last_step(folder) == 3 if world == 1 else last_step(folder) in {3, 4}
    assert outcome(folder, resume_from_checkpoint=True, **settings) == whole


@pytest.mark.parametrize(("name", "code"), [("term", 143), ("interrupt", 130)])
def test_a_second_signal_acts_at_once_and_leaves_no_half_checkpoint(
    tmp_path: Path, name: str, code: int
) -> None:
    """Also in the middle of saving: the checkpoint before it is the newest, and the run goes on."""
    whole = outcome(tmp_path / "whole")
    folder = tmp_path / "left"
    ended = train(folder, at_step={"3": [name]}, while_saving={"4": [name]})
    assert ended.code == code
    assert last_step(folder) == 2
    assert outcome(folder, resume_from_checkpoint=True) == whole


def test_a_signal_after_the_last_step_lets_the_run_end(tmp_path: Path) -> None:
    """The model is saved, and the process leaves with the usual code all the same."""
    ended = train(tmp_path, while_saving={"6": ["term"]})
    assert ended.code == 143
    assert (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize(("name", "code"), [("term group", 143), ("interrupt group", 130)])
def test_a_signal_to_the_whole_process_group_leaves_a_checkpoint(
    tmp_path: Path, name: str, code: int
) -> None:
    """As Ctrl-C, Slurm and Kubernetes send it: to a worker that is at work as well."""
    settings = {"rows": 64, "dataloader_num_workers": 1, "save_strategy": "no"}
    ended = train(tmp_path, in_worker=name, **settings)
    assert ended.code == code, ended.log
    assert last_step(tmp_path) == 1


@pytest.mark.distributed
def test_a_signal_to_all_processes_and_their_workers_leaves_a_checkpoint(tmp_path: Path) -> None:
    """Two process groups are told, each of a process and its workers, as a scheduler does it."""
    settings = {"world": 2, "dataloader_num_workers": 1, "save_strategy": "no", "rows": 64}
    settings |= {"per_device_train_batch_size": 2, "num_train_epochs": 1}
    whole = outcome(tmp_path / "whole", **settings)
    ended = start("train", folder=str(tmp_path / "cut"), at_step={"2": ["term group"]}, **settings)
    assert [process.code for process in ended] == [143, 143], [process.log for process in ended]
    assert last_step(tmp_path / "cut") in {3, 4}
    assert outcome(tmp_path / "cut", resume_from_checkpoint=True, **settings) == whole


@pytest.mark.distributed
def test_torchrun_hands_on_a_sigterm_and_the_run_goes_on(tmp_path: Path) -> None:
    """As a scheduler sends it: to torchrun, whose processes leave a checkpoint within its 30 s."""
    settings = {"per_device_train_batch_size": 4, "save_strategy": "no"}
    folder = tmp_path / "left"
    arguments = {"folder": str(folder), **settings, "at_step": {"2": [["term parent", 0]]}}
    ended = torchrun_train(tmp_path, arguments)
    assert ended.returncode != 0
    assert 3 <= last_step(folder) < 6, ended.stdout
    resumed = outcome(folder, world=2, **settings, resume_from_checkpoint=True)
    assert resumed == outcome(tmp_path / "whole", world=2, **settings)


@pytest.mark.parametrize(
    ("number", "code", "world"),
    # Torch does not hear Ctrl-C while processes look for each other.
    [(signal.SIGKILL, -9, 2), (signal.SIGTERM, -15, 2), (signal.SIGINT, 130, 1)],
)
def test_a_signal_at_once_ends_a_run_and_not_what_starts_runs(
    tmp_path: Path, number: int, code: int, world: int
) -> None:
    """Before it has a group, a log or a handler; the server of these tests goes on."""
    ended = start("train", world=world, folder=str(tmp_path), kill_after=0.0, kill_by=number)
    assert [process.code for process in ended] == [code] * world
