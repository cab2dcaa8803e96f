"""Several processes train what one does."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest

from tests.scripts.processes import outcome, start

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.distributed

# (processes, batch, accumulation), each 8 rows a step.
GRID = [(1, 8, 1), (1, 4, 2), (1, 1, 8), (2, 4, 1), (2, 2, 2), (2, 1, 4)]


def logged(run: dict[str, Any], name: str) -> list[float]:
    """Return what was logged under a name."""
    return [entry[name] for entry in run["history"] if name in entry]


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
    assert all(each.error.startswith(message) for each in ended)


def test_the_first_process_tells_of_evaluations(tmp_path: Path) -> None:
    """Once, for all."""
    ended = start("train", folder=str(tmp_path), world=2, disable_tqdm=False, save_strategy="no")
    first, second = (each.log.count("eval: perplexity ") for each in ended)
    assert (first, second) == (3, 0)


def test_processes_do_not_share_dropout(tmp_path: Path) -> None:
    """Each draws its own, or half of the randomness would be lost."""
    ended = start("dropout_of_rank", world=2, folder=str(tmp_path))
    first, second = (each.result for each in ended)
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


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_ten_runs_in_a_row_end_in_time(tmp_path: Path, world: int) -> None:
    """None hangs at exit and all are equal (``pytest -m slow``)."""
    settings = {"world": world, "rows": 23, "per_device_train_batch_size": 3}
    runs = [outcome(tmp_path / str(number), **settings) for number in range(10)]
    assert runs == runs[:1] * 10
