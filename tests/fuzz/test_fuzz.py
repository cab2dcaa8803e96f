"""The fuzz session runs, and notices a fault of each kind that it is there for."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pytest

from mlmadapt import WholeWordMaskingCollator, group_texts, tokenize_with_word_ids
from tests.fuzz import __main__ as fuzz
from tests.fuzz import checkpoints, runs, texts

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def session(part: str, cases: int, *more: str) -> int:
    """Run some cases of a part, without real tokenizers."""
    return fuzz.main(["--only", part, "--seed", "7", "--cases", str(cases), "--data", "-", *more])


@pytest.mark.parametrize(("part", "cases"), [("texts", 10), ("checkpoints", 3), ("runs", 1)])
def test_a_part_runs_and_counts(part: str, cases: int, capsys: pytest.CaptureFixture[str]) -> None:
    """On what is right, it finds nothing."""
    assert session(part, cases) == 0
    assert f"\n{part}: {cases} cases (" in capsys.readouterr().out


def test_a_session_ends_in_time(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever is left to do, by a clock that goes on a second whenever it is read."""
    clock = SimpleNamespace(monotonic=itertools.count().__next__, time=time.time)
    monkeypatch.setattr(fuzz, "time", clock)
    monkeypatch.setitem(fuzz.PARTS, "texts", lambda *_: Counter(rows=2))
    assert fuzz.main(["--minutes", "1", "--only", "texts", "--cases", "99"]) == 0
    assert "\ntexts: 20 cases (40 rows), 0 found" in capsys.readouterr().out


def words_off_by_one(*args: Any, **options: Any) -> Any:
    """The words of the last document begin a token too late."""
    columns: Any = tokenize_with_word_ids(*args, **options)
    is_table = isinstance(columns, pa.Table)
    lists = columns.to_pydict() if is_table else texts.lists_of(columns)
    words = lists["word_ids"][-1]
    words[1:-1] = words[:-2]
    return pa.table(lists, columns.schema) if is_table else lists


def rows_off_by_one(*args: Any, **options: Any) -> Any:
    """The last token of the last row is that of the first."""
    columns: Any = group_texts(*args, **options)
    if columns["input_ids"]:
        columns["input_ids"][-1][-1] = columns["input_ids"][0][0]
    return columns


class OneTargetMore(WholeWordMaskingCollator):
    """The first token of a batch is a target."""

    def __call__(self, features: Any, return_tensors: Any = None) -> dict[str, Any]:
        """Mask, and label one token more."""
        batch = super().__call__(features, return_tensors)
        batch["labels"][0, 0] = batch["input_ids"][0, 0]
        return batch


@pytest.mark.parametrize(
    ("name", "fault", "told"),
    [
        ("tokenize_with_word_ids", words_off_by_one, ", word_ids: found ["),
        ("group_texts", rows_off_by_one, "rows by {'chunk_size'"),
        ("WholeWordMaskingCollator", OneTargetMore, "the batch by {'wwm_prob"),
        ("insert_random_mask", lambda *_, **__: {}, "KeyError: 'masked_input_ids'"),
        ("show_masks", lambda *_: texts.show_masks, "has no attribute 'to_text'"),
        ("tokenize_with_word_ids", lambda *_, **__: time.sleep(60), "not over after 1 s"),
    ],
)
def test_a_fault_in_texts_is_found(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, name: str, fault: Callable[..., Any], told: str
) -> None:
    """With the command that repeats its case alone."""
    monkeypatch.setattr(fuzz, "SECONDS", 1 if "1 s" in told else 120)
    monkeypatch.setattr(texts, name, fault)
    assert session("texts", 40) == 1
    said = capsys.readouterr().out
    assert told in said
    (command,) = [line for line in said.splitlines() if line.startswith("repeat it: ")]
    arguments = command.partition(" -- ")[2].split()
    assert fuzz.main([*arguments, "--data", "-"]) == 1
    monkeypatch.undo()
    assert fuzz.main([*arguments, "--data", "-"]) == 0


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ({"at_step": {"4": ["fail"]}}, "exit code 1: ValueError: on purpose"),
        ({"at_step": {"4": ["hang"]}}, "on 1 processes took over 1 s"),
        ({"at_step": {"4": ["nudge"]}}, "another end: "),
    ],
)
def test_a_fault_after_a_forged_checkpoint_is_found(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, fault: dict[str, Any], told: str
) -> None:
    """An error without a name, a run that never ends, and one that ends elsewhere."""
    monkeypatch.setattr(checkpoints, "FORGERIES", [lambda *_: "manifest.json, as it was"])
    monkeypatch.setattr(checkpoints, "PLANTED", fault)
    monkeypatch.setattr(checkpoints, "SECONDS", 1 if "1 s" in told else 120)
    monkeypatch.setattr(checkpoints, "SIGNED", 0.0)
    assert session("checkpoints", 6) == 1
    assert told in capsys.readouterr().out


def test_what_a_forged_checkpoint_runs_is_found(
    monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """By the file that it makes."""

    def run_it(draw: Any, checkpoint: Path, sentinel: Path) -> str:
        sentinel.touch()
        return "run"

    monkeypatch.setattr(checkpoints, "FORGERIES", [run_it])
    assert session("checkpoints", 1) == 1
    assert "what was planted was run" in capsys.readouterr().out


@pytest.mark.parametrize("fault", ["nudge", "fail", "kill"])
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
