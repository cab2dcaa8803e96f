"""The fuzz session runs, and notices each fault in what is made of texts."""

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
from tests.fuzz import texts

if TYPE_CHECKING:
    from collections.abc import Callable


def session(cases: int) -> int:
    """Compare some texts, without real tokenizers."""
    return fuzz.main(["--only", "texts", "--seed", "7", "--cases", str(cases), "--data", "-"])


def test_texts_are_compared_and_counted(capsys: pytest.CaptureFixture[str]) -> None:
    """On what is right, nothing is found."""
    assert session(10) == 0
    assert "\ntexts: 10 cases (" in capsys.readouterr().out


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
    ("name", "fault", "message"),
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
    monkeypatch: pytest.MonkeyPatch, capsys: Any, name: str, fault: Callable[..., Any], message: str
) -> None:
    """With the command that repeats its case alone."""
    monkeypatch.setattr(fuzz, "SECONDS", 1 if "1 s" in message else 120)
    monkeypatch.setattr(texts, name, fault)
    assert session(40) == 1
    said = capsys.readouterr().out
    assert message in said
    (command,) = [line for line in said.splitlines() if line.startswith("repeat it: ")]
    arguments = command.partition(" -- ")[2].split()
    assert fuzz.main([*arguments, "--data", "-"]) == 1
    monkeypatch.undo()
    assert fuzz.main([*arguments, "--data", "-"]) == 0
