"""What a run holds: when it logs, evaluates, saves and stops."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from mlmadapt import TrainingConfig
from tests.scripts.tiny_run import logged

if TYPE_CHECKING:
    from tests.scripts.tiny_run import TinyRun


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"max_steps": 5}, 5),
        ({"max_steps": 2, "num_train_epochs": 7}, 2),
        ({"num_train_epochs": 1.5}, 5),
        ({"num_train_epochs": 0.1}, 1),
        ({"num_train_epochs": 2, "per_device_train_batch_size": 5}, 6),
    ],
)
def test_steps_are_counted(run: TinyRun, settings: dict[str, Any], steps: int) -> None:
    """Whole epochs, parts of one, or steps; the last one of an epoch may be shorter."""
    result = run.train(**settings)
    assert result.global_step == steps
    assert logged(result, "step")[-1] == steps
    if settings == {"num_train_epochs": 2, "per_device_train_batch_size": 5}:
        assert result.tokens_seen == 2 * sum(len(row["input_ids"]) for row in run.rows)


@pytest.mark.parametrize(
    ("every", "steps"), [(0.02, [*range(1, 61)]), (0.1, [*range(6, 61, 6)]), (25, [25, 50, 60])]
)
def test_a_run_of_any_length_has_entries(run: TinyRun, every: float, steps: list[int]) -> None:
    """A share of all steps, which is the default, or a number of them; and the last."""
    assert TrainingConfig().logging_steps == 0.02
    run.rows = [{"input_ids": [2, 7, 3], "word_ids": [-1, 0, -1]}]
    result = run.train(max_steps=60, logging_steps=every, eval_strategy="no")
    assert [entry["step"] for entry in result.history if "loss" in entry] == steps


def test_early_stopping_waits_for_so_many_evaluations_without_a_better_one(run: TinyRun) -> None:
    """A rate that only does harm ends after `patience` of them."""
    run.eval_rows = run.rows[:5]
    result = run.train(learning_rate=3.0, num_train_epochs=20, early_stopping_patience=2)
    losses = logged(result, "eval_loss")
    assert len(losses) < 21
    assert losses.index(min(losses)) == len(losses) - 3
    assert result.best is not None
    assert result.best.loss == min(losses)
