"""Several processes train what one does."""

from __future__ import annotations

import math
import os
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.scripts.processes import last_step, outcome, run_script, start, torchrun_train
from tests.scripts.tiny_run import logged

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.distributed

# (processes, batch, accumulation), each 8 rows a step.
GRID = [(1, 8, 1), (1, 1, 8), (2, 4, 1), (2, 1, 4)]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A plain loop of full batches, over 8 rows and over 101."""
    return {rows: start("reference", rows=rows)[0].result for rows in (8, 101)}


@pytest.mark.parametrize("rows", [8, 101])
@pytest.mark.parametrize("cut", GRID, ids=str)
def test_the_loss_is_that_of_full_batches(
    tmp_path: Path, reference: dict[int, Any], cut: tuple[int, int, int], rows: int
) -> None:
    """Loss, gradient norm and perplexity of each step, however its 8 rows are cut up."""
    world, batch, accumulation = cut
    run = outcome(
        tmp_path,
        world=world,
        rows=rows,
        dropout=False,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        save_strategy="no",
        num_train_epochs=2 if rows == 8 else 1,
        weight_decay=0.1,
    )
    expected = reference[rows]
    assert logged(run, "loss") == pytest.approx(expected["losses"], abs=1e-5)
    assert logged(run, "grad_norm") == pytest.approx(expected["norms"], abs=1e-5)
    assert logged(run, "eval_perplexity")[0] == pytest.approx(expected["perplexity"], rel=1e-6)
    assert run["tokens"] == expected["tokens"]
    assert math.isfinite(run["final"])


def test_a_sharded_model_is_refused(tmp_path: Path) -> None:
    """By name and on each process: of its shards, no checkpoint could be resumed."""
    ended = start("train", folder=str(tmp_path), world=2, sharded=True)
    message = "ValueError: model is sharded (FSDPBertForMaskedLM), of which no checkpoint can be"
    assert all(process.error.startswith(message) for process in ended)


def test_the_first_process_tells_of_evaluations(tmp_path: Path) -> None:
    """Once, for all."""
    ended = start("train", folder=str(tmp_path), world=2, disable_tqdm=False, save_strategy="no")
    first, second = (process.log.count("eval: perplexity ") for process in ended)
    assert (first, second) == (3, 0)


def test_processes_do_not_share_dropout(tmp_path: Path) -> None:
    """Each draws its own, or half of the randomness would be lost."""
    ended = start("dropout_of_rank", world=2, folder=str(tmp_path))
    first, second = (process.result for process in ended)
    assert len(first) == len(second) > 0
    assert all(mine != others for mine, others in zip(first, second, strict=True))


def test_only_dropout_depends_on_the_processes(tmp_path: Path) -> None:
    """2 processes of 4 take the steps of 1 of 8; they learn the same without dropout, not with."""
    gaps = {}
    for dropout in (False, True):
        settings = {"dropout": dropout, "save_strategy": "no", "num_train_epochs": 1}
        one = outcome(tmp_path / f"1 {dropout}", **settings)
        two = outcome(tmp_path / f"2 {dropout}", **settings, world=2, per_device_train_batch_size=4)
        assert two["steps"] == one["steps"] == 3
        assert two["tokens"] == one["tokens"]  # the same rows, with the same masks
        pairs = zip(logged(one, "loss"), logged(two, "loss"), strict=True)
        gaps[dropout] = max(abs(first - second) for first, second in pairs)
    assert gaps[False] < 1e-5
    assert 1e-3 < gaps[True] < 0.5


@pytest.mark.parametrize("world", [2, 3])
def test_fewer_rows_than_processes_train_as_on_one(tmp_path: Path, world: int) -> None:
    """A process without a row keeps in step with a filler that weighs nothing."""
    settings = {"rows": 1, "dropout": False, "save_strategy": "no", "num_train_epochs": 3}
    one = outcome(tmp_path / "one", **settings, per_device_train_batch_size=world)
    many = outcome(tmp_path / "many", **settings, per_device_train_batch_size=1, world=world)
    assert logged(many, "loss") == pytest.approx(logged(one, "loss"), abs=1e-5)
    assert many["tokens"] == one["tokens"]


@pytest.mark.parametrize("differ", ["rows", "rows_seed", "seed"])
def test_processes_with_other_rows_or_settings_are_told(tmp_path: Path, differ: str) -> None:
    """They would wait for each other for ever, or train on in silence."""
    for ended in start("train_differently", world=2, folder=str(tmp_path), differ=differ):
        assert ended.error.startswith("ValueError: ")
        assert ended.error.endswith("; give all processes the same rows and settings")
    assert last_step(tmp_path) == 0


def test_processes_bring_the_best_checkpoint_along_together(tmp_path: Path) -> None:
    """One that found the copy of another would go on without it, and wait for ever."""
    settings = {"load_best_model_at_end": True, "learning_rate": 0.5, "save_steps": 1}
    settings |= {"eval_strategy": "steps", "eval_steps": 1, "world": 2, "num_train_epochs": 1}
    whole = outcome(tmp_path / "first", **settings)
    losses = logged(whole, "eval_loss")
    assert losses.index(min(losses[1:])) <= 2, "there is nothing to bring along"
    settings["resume_from_checkpoint"] = str(tmp_path / "first" / "checkpoint-2")
    assert outcome(tmp_path / "second", **settings)["weights"] == whole["weights"]


@pytest.mark.parametrize(
    ("poison", "logging_steps"), [("poison gradient", 1), ("poison loss", 100)]
)
def test_what_is_not_finite_on_one_process_stops_all(
    tmp_path: Path, poison: str, logging_steps: int
) -> None:
    """Both raise at the same step, be it read at once or later, and nobody waits for the other."""
    settings = {"rows": 40, "logging_steps": logging_steps, "save_steps": 5}
    at_step = {"1": [[poison, 1]]}
    for ended in start("train", folder=str(tmp_path), world=2, at_step=at_step, **settings):
        assert ended.error.startswith("FloatingPointError: "), ended.log
        assert "step 1 " in ended.error
    assert last_step(tmp_path) == 0


def test_a_failed_save_is_raised_by_every_process(tmp_path: Path) -> None:
    """Only the main process writes, and the other one does not wait for it."""
    full = {"4": ["disk full"]}
    for ended in start("train", folder=str(tmp_path), world=2, rows=40, while_saving=full):
        assert "checkpoint-4 could not be written to" in ended.error
        assert "checkpoint-2 is intact" in ended.error
    assert last_step(tmp_path) == 2


def test_several_processes_write_one_card(tmp_path: Path) -> None:
    """All ask the model, and the first one writes what one process alone would."""
    settings = {"rows": 16, "dropout": False, "save_strategy": "no"}
    settings["fill_mask"] = ["This is a great [MASK]."]
    outcome(tmp_path / "one", **settings)
    outcome(tmp_path / "two", **settings, world=2, per_device_train_batch_size=4)
    one, two = (
        [
            line
            for line in (tmp_path / name / "README.md").read_text(encoding="utf-8").splitlines()
            if " value: " not in line  # the perplexity, to all digits
        ]
        for name in ("one", "two")
    )
    assert "This is a great" in str(one)
    assert one == two


@pytest.mark.slow
def test_one_cpu_process_that_torchrun_duplicates_is_refused(tmp_path: Path) -> None:
    """A real torchrun without ACCELERATE_USE_CPU and an accelerator (``pytest -m slow``)."""
    if torch.accelerator.is_available():
        pytest.skip("with an accelerator, torchrun's processes find each other")
    ended = torchrun_train(tmp_path, {"folder": f"{tmp_path}/out"}, ACCELERATE_USE_CPU="false")
    assert ended.returncode != 0
    assert "RuntimeError: the launcher started 2 processes (WORLD_SIZE)" in ended.stdout
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("error", ["", "raise ArithmeticError('on purpose')"])
def test_a_process_leaves_its_group_as_python_ends(tmp_path: Path, error: str) -> None:
    """Unless it failed: the others may wait for it then, and leaving could wait for them."""
    script = f"""
import atexit, torch
from accelerate import Accelerator
from mlmadapt.training.distributed import join_group

atexit.register(lambda: print("still in it:", torch.distributed.is_initialized()))
torch.distributed.init_process_group(
    "gloo", init_method={(tmp_path / "group").as_uri()!r}, rank=0, world_size=1
)
for _ in range(2):
    join_group(Accelerator(cpu=True))
{error}
"""
    ended = run_script([sys.executable, "-c", script], PYTHONPATH=os.pathsep.join(sys.path))
    assert ended.returncode == bool(error), ended.stdout
    assert f"still in it: {bool(error)}" in ended.stdout


@pytest.mark.slow
def test_processes_of_torchrun_end_well(tmp_path: Path) -> None:
    """Twenty times in a row: none aborts or hangs as Python ends (``pytest -m slow``)."""
    for place in range(20):
        settings = {"folder": str(tmp_path / str(place)), "rows": 8, "num_train_epochs": 1}
        ended = torchrun_train(tmp_path, settings)
        assert ended.returncode == 0, ended.stdout
