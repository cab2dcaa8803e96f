"""The fuzz session runs, and notices each fault in runs that are interrupted or resumed."""

from __future__ import annotations

from typing import Any

import pytest

from tests.fuzz import __main__ as fuzz
from tests.fuzz import checkpoints, runs


def session(part: str, cases: int) -> int:
    """Run some cases of a part."""
    return fuzz.main(["--only", part, "--seed", "7", "--cases", str(cases), "--data", "-"])


@pytest.mark.parametrize(("part", "cases"), [("checkpoints", 4), ("runs", 2)])
def test_a_part_runs_and_counts(part: str, cases: int, capsys: pytest.CaptureFixture[str]) -> None:
    """On what is right, it finds nothing."""
    assert session(part, cases) == 0
    assert f"\n{part}: {cases} cases (" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"at_step": {"4": ["fail"]}}, "exit code 1: ValueError: on purpose"),
        ({"at_step": {"4": ["hang"]}}, "on 1 processes took over 1 s"),
        ({"at_step": {"4": ["nudge"]}}, "another end: "),
    ],
)
def test_a_fault_after_a_damaged_checkpoint_is_found(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, fault: dict[str, Any], message: str
) -> None:
    """An error without a name, a run that never ends, and one that ends elsewhere."""
    monkeypatch.setattr(checkpoints, "PLANTED", fault)
    monkeypatch.setattr(checkpoints, "SECONDS", 1 if "1 s" in message else 120)
    assert session("checkpoints", 6) == 1
    assert message in capsys.readouterr().out


@pytest.mark.parametrize("fault", ["nudge", "kill"])
def test_a_fault_in_an_interrupted_run_is_found(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, fault: str
) -> None:
    """In the last bits of a few weights, too."""
    monkeypatch.setattr(runs, "PLANTED", {"at_step": {str(step): [fault] for step in range(99)}})
    # Whatever the clock does, there are steps left for the fault.
    early = {"at_step": {"0": [["kill", -1]]}}, "kill"
    monkeypatch.setattr(runs, "draw_interruption", lambda *_: early)
    assert session("runs", 1) == 1
    assert "FOUND by runs" in capsys.readouterr().out
