"""Checkpoints are whole or not there, and nothing in one is run."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import pickle
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError

from mlmadapt.training import checkpoint as checkpoints
from tests.scripts.processes import outcome, train

if TYPE_CHECKING:
    from collections.abc import Callable

FILES = ["config.json", "manifest.json", "model.safetensors", "optimizer.safetensors", "state.json"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run of 6 steps with its checkpoints of steps 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("finished")
    return folder, outcome(folder)


@pytest.fixture
def run(finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> Path:
    """A copy of that run, to be damaged."""
    return Path(shutil.copytree(finished[0], tmp_path / "run"))


def truncate(path: Path) -> None:
    """Lose the second half."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    """Lose everything but the name."""
    path.write_bytes(b"")


def delete(path: Path) -> None:
    """Lose the name too."""
    path.unlink()


def flip(path: Path) -> None:
    """Flip a bit in the middle: of a digit or letter, where it is text, so that it stays valid."""
    content = bytearray(path.read_bytes())
    place = len(content) // 2
    while path.suffix == ".json" and not chr(content[place]).isdigit():
        place += 1
    content[place] ^= 1
    path.write_bytes(bytes(content))


DAMAGES = [truncate, empty, delete, flip]


def test_every_file_of_a_checkpoint_is_known_here(finished: tuple[Path, dict[str, Any]]) -> None:
    """The matrix below misses no file."""
    assert sorted(path.name for path in (finished[0] / "checkpoint-6").iterdir()) == FILES


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_makes_the_checkpoint_before_it_be_used(
    run: Path, name: str, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever happened to whichever file, the log names it and its checkpoint."""
    damage(run / "checkpoint-6" / name)
    with caplog.at_level(logging.WARNING, "mlmadapt"):
        assert checkpoints.newest_whole(run) == run / "checkpoint-4"
    (record,) = caplog.records
    assert "checkpoint-6 is damaged and passed over" in record.getMessage()
    # A hash that differs in the manifest is found at the file that it is of.
    if not (name == "manifest.json" and damage is flip):
        assert name in record.getMessage()


@pytest.mark.parametrize("name", ["manifest.json", "state.json", "optimizer.safetensors"])
def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(
    finished: tuple[Path, dict[str, Any]], run: Path, name: str
) -> None:
    """It says so and ends where it would have, and the damaged checkpoint is written anew."""
    truncate(run / "checkpoint-6" / name)
    ended = train(run, resume_from_checkpoint=True)
    assert ended.result == finished[1]
    assert "checkpoint-6 is damaged and passed over: " + name in ended.log
    assert checkpoints.newest_whole(run) == run / "checkpoint-6"


def test_all_damaged_is_one_clear_error(run: Path) -> None:
    """A run does not start over by itself where there was something to resume."""
    for step, damage in zip((2, 4, 6), DAMAGES[:3], strict=True):
        damage(run / f"checkpoint-{step}" / "state.json")
    ended = train(run, resume_from_checkpoint=True)
    assert ended.error == (
        f"ValueError: all checkpoints in {str(run)!r} are damaged (checkpoint-6, checkpoint-4, "
        "checkpoint-2); delete them to start again"
    )


def test_a_damaged_checkpoint_that_is_asked_for_is_an_error(run: Path) -> None:
    """Nobody gets another checkpoint than the one named."""
    path = run / "checkpoint-4"
    empty(path / "model.safetensors")
    with pytest.raises(
        ValueError, match=r"checkpoint-4', which is damaged: model\.safetensors has"
    ):
        checkpoints.choose(run, str(path))
    with pytest.raises(FileNotFoundError, match=r"checkpoint-5', which is not there; name a check"):
        checkpoints.choose(run, str(run / "checkpoint-5"))


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.path), "w")


@pytest.mark.parametrize("name", [*FILES, "optimizer.bin", "random_states_0.pkl", "scheduler.pt"])
@pytest.mark.parametrize("is_listed", [False, True])
def test_a_planted_pickle_is_never_run(run: Path, name: str, is_listed: bool) -> None:  # noqa: FBT001
    """In no file, not even with a manifest that fits it; the run refuses or goes on without it."""
    sentinel = run.parent / "exploded"
    pickle.loads(pickle.dumps(Bomb(sentinel))).close()  # noqa: S301
    assert sentinel.exists(), "the bomb works"
    sentinel.unlink()
    checkpoint = run / "checkpoint-6"
    (checkpoint / name).write_bytes(pickle.dumps(Bomb(sentinel)))
    if is_listed:
        sign(checkpoint)
    ended = train(run, resume_from_checkpoint=True)
    assert not sentinel.exists()
    if not is_listed:
        assert "checkpoint-6 is damaged and passed over" in ended.log
        assert ended.code == 0


def describe(path: Path) -> dict[str, Any]:
    """Return what a manifest says of a file."""
    content = path.read_bytes()
    return {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def sign(checkpoint: Path) -> None:
    """Write the manifest that fits what is there, as anybody can."""
    files = {
        path.name: describe(path) for path in checkpoint.iterdir() if path.name != "manifest.json"
    }
    manifest = {"step": 6, "files": files}
    if not (checkpoint / "manifest.json").read_bytes().startswith(b"\x80"):
        (checkpoint / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("name", ["..", "../checkpoint-4/state.json", "sub/state.json", "", "."])
def test_a_name_in_a_manifest_does_not_leave_the_folder(run: Path, name: str) -> None:
    """Even if what it leads to has the size and the hash that are asked for."""
    add_to_manifest(run / "checkpoint-6", name, run / "checkpoint-4" / "state.json")
    (run / "checkpoint-6" / "sub").mkdir()
    shutil.copy(run / "checkpoint-4" / "state.json", run / "checkpoint-6" / "sub")
    assert checkpoints.newest_whole(run) == run / "checkpoint-4"


def test_an_absolute_name_in_a_manifest_is_refused(run: Path) -> None:
    """The same for a path from the root."""
    elsewhere = run / "checkpoint-4" / "state.json"
    add_to_manifest(run / "checkpoint-6", str(elsewhere), elsewhere)
    damage = list(checkpoints.find_damage(run / "checkpoint-6"))
    assert damage == [f"{str(elsewhere)!r} is not a plain file of the checkpoint"]


def add_to_manifest(checkpoint: Path, name: str, like: Path) -> None:
    """List a file as whole."""
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["files"][name] = describe(like)
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("name", FILES)
def test_a_link_is_refused_whatever_it_leads_to(run: Path, name: str) -> None:
    """A file of a checkpoint is a file, also where the link's target has the right content."""
    path = run / "checkpoint-6" / name
    path.rename(run / "moved")
    path.symlink_to(run / "moved")
    damage = next(checkpoints.find_damage(run / "checkpoint-6"))
    assert damage in {
        f"{name} is not a plain file of the checkpoint",
        f"{name!r} is not a plain file of the checkpoint",
    }


def test_a_file_that_is_not_in_the_manifest_is_refused(run: Path) -> None:
    """Nothing is put beside what was written, as other loaders would read it."""
    (run / "checkpoint-6" / "pytorch_model.bin").write_bytes(b"")
    damage = list(checkpoints.find_damage(run / "checkpoint-6"))
    assert damage == ["pytorch_model.bin is not in the manifest"]


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"files": []}',
        '{"files": {"state.json": 3}}',
        '{"files": {"a": {}}}',
        "\x80",
    ],
)
def test_a_manifest_of_another_shape_is_damage(run: Path, content: str) -> None:
    """Whatever JSON, or none, stands there, it is named and nothing else is raised."""
    (run / "checkpoint-6" / "manifest.json").write_bytes(content.encode("latin-1"))
    damage = next(checkpoints.find_damage(run / "checkpoint-6"))
    assert damage.startswith("manifest.json cannot be read (")


def test_a_failed_save_is_an_error_that_names_both_checkpoints(tmp_path: Path) -> None:
    """A full disk at step 4 leaves step 2 as it was, also where only one is to be kept."""
    full = {"4": ["disk full"]}
    ended = train(tmp_path, save_total_limit=1, while_saving=full)
    assert ended.error == (
        f"OSError: [Errno {errno.ENOSPC}] checkpoint-4 could not be written to {str(tmp_path)!r} "
        f"([Errno {errno.ENOSPC}] {os.strerror(errno.ENOSPC)}); checkpoint-2 is intact"
    )
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".lock")] == [
        "checkpoint-2"
    ]
    assert checkpoints.newest_whole(tmp_path) == tmp_path / "checkpoint-2"
    whole = outcome(tmp_path.with_name("whole"), save_total_limit=1)
    assert outcome(tmp_path, save_total_limit=1, resume_from_checkpoint=True) == whole


def test_a_failed_first_save_says_that_there_is_no_other(tmp_path: Path) -> None:
    """An error without a number, as safetensors raises for a full disk, is put as well."""
    message = (
        f"checkpoint-1 could not be written to {str(tmp_path)!r} (I/O error: No space left on "
        "device); there is no earlier checkpoint"
    )
    with pytest.raises(OSError) as caught, checkpoints.whole_checkpoint(tmp_path, 1):  # noqa: PT011
        raise SafetensorError("I/O error: No space left on device")
    assert str(caught.value) == message
    assert list(tmp_path.iterdir()) == []


def write(folder: Path, step: int) -> None:
    """Write a small checkpoint."""
    with checkpoints.whole_checkpoint(folder, step) as building:
        (building / "state.json").write_text(json.dumps({"step": step}))


def steps(folder: Path) -> list[int]:
    """Return which checkpoints there are."""
    return [int(path.name.rpartition("-")[2]) for path in checkpoints.find_checkpoints(folder)]


def test_what_is_written_is_read(tmp_path: Path) -> None:
    """Files come back, and nothing else is left in the folder."""
    write(tmp_path, 3)
    (path,) = tmp_path.iterdir()
    assert list(checkpoints.find_damage(path)) == []
    assert json.loads((path / "state.json").read_text()) == {"step": 3}


def test_a_checkpoint_gets_its_name_when_it_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files and folder are flushed before the rename, the folder above after it.

    A power cut in between would leave the name with empty files, which no kill of a process shows.
    """
    flushed: set[int] = set()
    flush, rename = os.fsync, Path.rename

    def note_flush(descriptor: int) -> None:
        flushed.add(os.fstat(descriptor).st_ino)
        flush(descriptor)

    def check_rename(path: Path, target: Path) -> Path:
        assert flushed >= {each.stat().st_ino for each in [path, *path.iterdir()]}
        flushed.clear()
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", note_flush)
    monkeypatch.setattr(Path, "rename", check_rename)
    write(tmp_path, 3)
    assert flushed == {tmp_path.stat().st_ino}


def test_steps_are_ordered_as_numbers(tmp_path: Path) -> None:
    """Step 10 is newer than 9, and names that only look like it are left alone."""
    for step in (9, 10, 100):
        write(tmp_path, step)
    for name in ("checkpoint-best", "checkpoint-7.bak", "my-checkpoint-8"):
        (tmp_path / name).mkdir()
    assert steps(tmp_path) == [100, 10, 9]


@pytest.mark.parametrize(
    ("keep", "also", "left"),
    [
        (None, None, [4, 3, 2, 1]),
        (2, None, [4, 3]),
        (2, 1, [4, 3, 1]),
        (1, 4, [4]),
        (9, 1, [4, 3, 2, 1]),
    ],
)
def test_the_newest_and_the_best_are_kept(
    tmp_path: Path, keep: int | None, also: int | None, left: list[int]
) -> None:
    """`keep` of them and the best; None keeps all."""
    for step in range(1, 5):
        write(tmp_path, step)
    checkpoints.prune(tmp_path, keep=keep, also=also)
    assert steps(tmp_path) == left


def test_a_later_checkpoint_does_not_push_out_the_one_just_written(tmp_path: Path) -> None:
    """One that was damaged and passed over must not be what is kept."""
    for step in (8, 9, 12):
        write(tmp_path, step)
    empty(tmp_path / "checkpoint-12" / "model.safetensors")
    checkpoints.prune(tmp_path, keep=1, newest=9)
    assert steps(tmp_path) == [12, 9]
    assert checkpoints.newest_whole(tmp_path) == tmp_path / "checkpoint-9"


def test_a_run_that_passed_over_a_damaged_checkpoint_keeps_what_it_writes(run: Path) -> None:
    """Killed again before it is as far as the damaged one, it goes on from where it was."""
    truncate(run / "checkpoint-6" / "state.json")
    shutil.rmtree(run / "checkpoint-4")
    settings = {"save_total_limit": 1, "resume_from_checkpoint": True}
    assert train(run, at_step={"5": ["kill"]}, **settings).code == -9
    assert checkpoints.newest_whole(run) == run / "checkpoint-4"


def test_a_killed_save_and_a_killed_removal_are_cleared_away(tmp_path: Path) -> None:
    """Of what a killed run left half done nothing is taken up, and nothing stays."""
    write(tmp_path, 1)
    for name in (".checkpoint-2.tmp", ".checkpoint-0.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text("{}")
    assert checkpoints.newest_whole(tmp_path) == tmp_path / "checkpoint-1"
    checkpoints.clear(tmp_path, checkpoints=False)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    checkpoints.clear(tmp_path, checkpoints=True)
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_of_others_is_not_cleared_away(tmp_path: Path) -> None:
    """A folder of that name that this library has not written is not removed."""
    (tmp_path / "checkpoint-500").mkdir()
    (tmp_path / "checkpoint-500" / "pytorch_model.bin").write_bytes(b"dear")
    checkpoints.clear(tmp_path, checkpoints=True)
    assert (tmp_path / "checkpoint-500" / "pytorch_model.bin").read_bytes() == b"dear"


LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-(2**60), 2**60)
    | st.floats(allow_nan=False)
    | st.text(max_size=5)
    | st.integers(0, 3).map(torch.arange)
)
KEYS = st.text("ab.1", max_size=3) | st.integers(-1, 20)
STATES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3)
)


@given(STATES)
def test_any_state_comes_back_through_tensors_and_json(state: Any) -> None:
    """What `split_state` takes apart, `join_state` puts together again, with JSON in between."""
    tensors, rest = checkpoints.split_state(state)
    joined = checkpoints.join_state(tensors, json.loads(json.dumps(rest)))
    assert repr(joined) == repr(state)
