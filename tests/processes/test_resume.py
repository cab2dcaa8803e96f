"""A killed run ends where an uninterrupted one does, to the bit."""

from __future__ import annotations

import errno
import os
import random
import shutil
import time
from itertools import product
from typing import TYPE_CHECKING, Any

import pytest

from tests.scripts.processes import outcome, start, train
from tests.scripts.tiny_run import logged

if TYPE_CHECKING:
    from pathlib import Path

# Over two epochs; no number of processes divides the rows.
UNEVEN = {"rows": 23, "per_device_train_batch_size": 3}


@pytest.fixture(
    name="on_processes",
    params=product([1, 2, 3], ["no", "bf16"], [0, 1]),
    ids=lambda setting: "{} processes, {}, {} workers".format(*setting),
)
def _on_processes(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Settings of a run on 1 to 3 processes, in both precisions, with and without a worker."""
    world, precision, workers = request.param
    return {
        **UNEVEN,
        "world": world,
        "mixed_precision": precision,
        "dataloader_num_workers": workers,
    }


def killed(step: int, rank: int = -1) -> dict[str, Any]:
    """Have one process, or all, killed before a step."""
    return {"at_step": {str(step): [["kill", rank]]}}


def resume_until_done(folder: Path, *, kills: list[dict[str, Any]], **settings: Any) -> Any:
    """Kill a run, resume it, kill it again, ... and let the last one end."""
    for kill in kills:
        ended = start("train", folder=str(folder), **settings, **kill, resume_from_checkpoint=True)
        assert -9 in [process.code for process in ended], [process.log for process in ended]
    return outcome(folder, **settings, resume_from_checkpoint=True)


def check_every_event(tmp_path: Path, every: int, **settings: Any) -> None:
    """Kill a run before each n-th thing that it does to a file; resumed, it must end the same."""
    whole = outcome(tmp_path / "whole", count_events=True, **settings)
    points = range(0, whole.pop("events"), every)
    assert len(points) >= 10
    unequal = {}
    for point in points:
        folder = tmp_path / f"killed at {point}"
        assert train(folder, at_event=[point, "kill"], **settings).code == -9
        ended = outcome(folder, resume_from_checkpoint=True, **settings)
        if ended != whole:
            unequal[point] = ended
    assert unequal == {}


def test_a_kill_at_any_touch_of_a_file_costs_nothing(tmp_path: Path) -> None:
    """Weights, history and evaluation after a kill -9 at every seventh file event are the same."""
    check_every_event(tmp_path, 7, save_total_limit=1)


@pytest.mark.slow
@pytest.mark.distributed
def test_a_kill_at_every_touch_of_a_file_costs_nothing(
    tmp_path: Path, on_processes: dict[str, Any]
) -> None:
    """The same at each single event, of several processes at every sixth of the first one's."""
    every = 1 if on_processes["world"] == 1 else 6
    check_every_event(tmp_path, every, save_total_limit=1, curves=True, **on_processes)


GRID = {
    "fp32": {},
    "a worker": {"dataloader_num_workers": 1},
    "bf16": {"mixed_precision": "bf16"},
    "accumulation": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3},
    "transformers' collator": {"collator": "transformers"},
    "a schedule and a worker": {"collator": "ours, by schedule", "dataloader_num_workers": 1},
    "a schedule and a stream": {
        "collator": "ours, by schedule",
        "stream": "plain",
        "max_steps": 7,
        "per_device_train_batch_size": 5,
    },
    "gradient checkpointing": {"gradient_checkpointing": True},
    "steps that are read later": {"logging_steps": 100, "save_steps": 3},
    "grouped by length": {"train_sampling_strategy": "group_by_length"},
    "a shuffled stream": {"stream": "shuffled", "max_steps": 7, "per_device_train_batch_size": 5},
    "packed rows": {"packed": True, "rows": 48},
}


@pytest.mark.parametrize("name", GRID)
def test_a_run_killed_between_steps_ends_the_same(tmp_path: Path, name: str) -> None:
    """Killed twice, once before the first checkpoint, whatever the settings; dropout is on."""
    settings = {"rows": 21, **GRID[name]}
    whole = outcome(tmp_path / "whole", **settings)
    kills = [killed(1), killed(5)]
    assert resume_until_done(tmp_path / "killed", kills=kills, **settings) == whole
    assert not whole["randomness_moved"]


@pytest.mark.distributed
@pytest.mark.parametrize("world", [2, 3])
def test_processes_killed_between_steps_end_the_same(tmp_path: Path, world: int) -> None:
    """One of several processes is killed, then all; no process count divides the rows.

    With 3, the first step after a resume would differ in the last bits if DDP had not settled its
    buckets; the DeBERTa has a parameter without gradient, for which DDP would wait in vain.
    """
    architecture = "deberta-v2" if world == 2 else "bert"
    later = {"logging_steps": 100} if world == 2 else {}  # what a step came to is read later
    settings = {**UNEVEN, "world": world, "architecture": architecture, **later}
    whole = outcome(tmp_path / "whole", **settings)
    kills = [killed(3, rank=world - 1), killed(4)]
    assert resume_until_done(tmp_path / "killed", kills=kills, **settings) == whole


@pytest.mark.distributed
@pytest.mark.parametrize("world", [2, 3])
def test_parts_resume_in_the_middle_of_an_epoch(tmp_path: Path, world: int) -> None:
    """To the bit, with dropout, where one part has ended and another has not."""
    settings = {"stream": "shards", "max_steps": 9, "per_device_train_batch_size": 2}
    settings |= {"world": world, "eval_strategy": "epoch"}
    whole = outcome(tmp_path / "whole", **settings)
    evaluated = [entry["step"] for entry in whole["history"] if "eval_loss" in entry]
    assert evaluated == [0, {2: 8, 3: 6}[world], 9]
    kills = [killed(5, rank=world - 1), killed(7)]
    assert resume_until_done(tmp_path / "killed", kills=kills, **settings) == whole


def check_random_plans(tmp_path: Path, count: int, seed: int) -> None:
    """Resume runs of random shapes, killed at random steps."""
    generator = random.Random(seed)  # noqa: S311
    for number in range(count):
        settings = {
            "rows": generator.randint(5, 30),
            "num_train_epochs": generator.choice([1, 1.5, 2, 3]),
            "per_device_train_batch_size": generator.randint(1, 6),
            "gradient_accumulation_steps": generator.randint(1, 3),
            "save_steps": generator.randint(1, 4),
            "eval_strategy": generator.choice(["no", "epoch", "steps"]),
            "eval_steps": generator.randint(1, 4),
            "logging_steps": generator.randint(1, 3),
        }
        whole = outcome(tmp_path / f"{number} whole", **settings)
        steps = sorted(generator.randrange(whole["steps"]) for _ in range(generator.randint(1, 2)))
        kills = [killed(step) for step in steps]
        ended = resume_until_done(tmp_path / f"{number} killed", kills=kills, **settings)
        assert ended == whole, (settings, kills)


def test_runs_of_any_shape_end_the_same(tmp_path: Path) -> None:
    """The stop, the epochs, the batches and what is logged when are drawn."""
    check_random_plans(tmp_path, 3, seed=0)


@pytest.mark.slow
def test_many_runs_of_any_shape_end_the_same(tmp_path: Path) -> None:
    """The same for forty others (``pytest -m slow``)."""
    check_random_plans(tmp_path, 40, seed=1)


@pytest.mark.slow
@pytest.mark.distributed
def test_processes_killed_at_any_step_end_the_same(
    tmp_path: Path, on_processes: dict[str, Any]
) -> None:
    """One process after the other is killed, before each step of a run."""
    whole = outcome(tmp_path / "whole", **on_processes)
    for step in range(whole["steps"]):
        kills = [killed(step, rank=step % on_processes["world"])]
        ended = resume_until_done(tmp_path / f"killed at {step}", kills=kills, **on_processes)
        assert ended == whole, step


@pytest.mark.slow
@pytest.mark.distributed
def test_processes_killed_at_any_moment_end_the_same(
    tmp_path: Path, on_processes: dict[str, Any]
) -> None:
    """Killed from outside by the clock, three times over, wherever they are (``-m slow``).

    The moments differ with the machine, and are in the message of a failure.
    """
    settings = {**on_processes, "save_total_limit": 2}
    whole = outcome(tmp_path / "whole", **settings)
    before = time.monotonic()
    assert outcome(tmp_path / "timed", **settings) == whole
    seconds = time.monotonic() - before
    generator = random.Random(repr(on_processes))  # noqa: S311
    hits = 0
    for number in range(4):
        folder = tmp_path / f"killed {number}"
        moments = [seconds * generator.random() for _ in range(3)]
        for moment in moments:
            ended = start(
                "train",
                folder=str(folder),
                kill_after=moment,
                **settings,
                resume_from_checkpoint=True,
            )
            assert {process.code for process in ended} <= {0, -9}, [
                process.log for process in ended
            ]
            hits += -9 in [process.code for process in ended]
        ended = outcome(folder, **settings, resume_from_checkpoint=True)
        assert ended == whole, moments
    assert hits >= 4


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("architecture", "strategy"), [("deberta-v2", "random"), ("bert", "group_by_length")]
)
def test_another_number_of_processes_goes_on_with_the_same_rows(
    tmp_path: Path, architecture: str, strategy: str
) -> None:
    """2 processes of 2 rows, then 1 of 4: a step has the same rows, and sums differ by 1e-5."""
    one = {"rows": 21, "dropout": False, "architecture": architecture}
    one["train_sampling_strategy"] = strategy
    two = {**one, "world": 2, "per_device_train_batch_size": 2}
    one["per_device_train_batch_size"] = 4
    whole = outcome(tmp_path / "whole", **one)
    start("train", folder=str(tmp_path / "both"), **two, **killed(5))
    both = outcome(tmp_path / "both", **one, resume_from_checkpoint=True)
    assert logged(whole, "loss") == pytest.approx(logged(both, "loss"), abs=1e-5)
    assert both["tokens"] == whole["tokens"]
    # And back again, from one process to two.
    start("train", folder=str(tmp_path / "back"), **one, **killed(5))
    back = outcome(tmp_path / "back", **two, resume_from_checkpoint=True)
    assert back["final"] == pytest.approx(whole["final"], abs=1e-5)


def test_a_finished_run_that_is_resumed_does_nothing(tmp_path: Path) -> None:
    """The same result comes back, and the same model lies there."""
    whole = outcome(tmp_path)
    again = outcome(tmp_path, resume_from_checkpoint=True, at_step={"0": ["kill"], "6": ["kill"]})
    assert again == whole


def test_what_does_not_decide_the_outcome_may_change(tmp_path: Path) -> None:
    """Rows of a step may be cut up otherwise, and be saved, evaluated and read otherwise."""
    settings = {"rows": 20, "per_device_train_batch_size": 4, "dropout": False}
    whole = outcome(tmp_path / "whole", **settings)
    train(tmp_path / "killed", **settings, **killed(7))
    settings |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    settings |= {"per_device_eval_batch_size": 3, "dataloader_num_workers": 1}
    settings |= {"save_steps": 5, "save_total_limit": 1, "resume_from_checkpoint": True}
    ended = outcome(tmp_path / "killed", **settings)
    assert ended["final"] == pytest.approx(whole["final"], abs=1e-6)
    assert ended["tokens"] == whole["tokens"]


def test_a_run_that_passed_over_a_damaged_checkpoint_keeps_what_it_writes(tmp_path: Path) -> None:
    """Killed again before it is as far as the damaged one, it goes on from where it was."""
    whole = outcome(tmp_path)
    (tmp_path / "checkpoint-6" / "state.json").write_bytes(b"")
    settings = {"save_total_limit": 1, "resume_from_checkpoint": True}
    shutil.rmtree(tmp_path / "checkpoint-4")
    assert train(tmp_path, **killed(5), **settings).code == -9
    ended = train(tmp_path, **settings)
    assert "checkpoint-6 is damaged: state.json" in ended.log
    assert ended.result == whole


def test_a_failed_save_costs_no_checkpoint(tmp_path: Path) -> None:
    """A full disk at step 4 leaves step 2 as it was, also where only one is to be kept."""
    ended = train(tmp_path, save_total_limit=1, while_saving={"4": ["disk full"]})
    assert ended.error == (
        f"OSError: [Errno {errno.ENOSPC}] checkpoint-4 could not be written to {str(tmp_path)!r} "
        f"([Errno {errno.ENOSPC}] {os.strerror(errno.ENOSPC)}); checkpoint-2 is intact"
    )
    assert [path.name for path in tmp_path.iterdir() if path.name != ".lock"] == ["checkpoint-2"]
    whole = outcome(tmp_path.with_name("whole"), save_total_limit=1)
    assert outcome(tmp_path, save_total_limit=1, resume_from_checkpoint=True) == whole
