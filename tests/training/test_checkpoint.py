"""Checkpoints and models are whole or not there, in a folder that one run uses at a time."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from filelock import FileLock
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM

from mlmadapt.testing import tiny_model
from mlmadapt.training import checkpoint as checkpoints
from mlmadapt.training import loop
from tests.scripts.tiny_run import SAVING, TinyRun, equal, logged, weights

if TYPE_CHECKING:
    from collections.abc import Callable

    from mlmadapt import TrainingResult

FILES = ["config.json", "manifest.json", "model.safetensors", "optimizer.pt", "state.json"]
RESUMING = {**SAVING, "resume_from_checkpoint": True}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """A run of 3 steps, each with its checkpoint."""
    run = TinyRun(tmp_path_factory.mktemp("finished"))
    run.train(**SAVING)
    return run


@pytest.fixture
def again(run: TinyRun, finished: TinyRun) -> TinyRun:
    """The same run in a copy of its folder, to be damaged and resumed."""
    shutil.copytree(finished.folder, run.folder)
    return run


def steps(folder: Path) -> list[int]:
    """Return which checkpoints there are."""
    return [int(path.name.rpartition("-")[2]) for path in checkpoints.find_checkpoints(folder)]


def cut(path: Path) -> None:
    """Lose the second half."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    """Lose everything but the name."""
    path.write_bytes(b"")


def flip(path: Path) -> None:
    """Flip a bit of a digit or letter, so that text stays text."""
    content = bytearray(path.read_bytes())
    place = len(content) // 2
    while path.suffix == ".json" and not chr(content[place]).isdigit():
        place += 1
    content[place] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("damage", [cut, empty, Path.unlink, flip])
def test_a_damaged_file_is_found_and_named(
    finished: TinyRun, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    """Whatever happened to whichever file."""
    whole = finished.folder / "checkpoint-3"
    assert sorted(path.name for path in whole.iterdir()) == FILES
    assert checkpoints.find_damage(whole) is None
    for name in FILES:
        copy = Path(shutil.copytree(whole, tmp_path / name))
        damage(copy / name)
        found = checkpoints.find_damage(copy)
        assert found is not None
        # A hash that differs in the manifest is found at the file that it is of.
        assert found.startswith(name) or (name, damage) == ("manifest.json", flip)


@pytest.mark.parametrize("content", ["[]", "{}", '{"files": []}', '{"files": {"a": {}}}', "\x80"])
def test_a_manifest_of_another_shape_is_damage(tmp_path: Path, content: str) -> None:
    """Whatever JSON, or none, stands there, it is named and nothing else is raised."""
    (tmp_path / "manifest.json").write_bytes(content.encode("latin-1"))
    found = checkpoints.find_damage(tmp_path)
    assert found is not None
    assert found.startswith("manifest.json cannot be read (")


def change_state(checkpoint: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change what a checkpoint says of its run, and sign it."""
    path = checkpoint / "state.json"
    state = json.loads(path.read_text())
    change(state)
    path.write_text(json.dumps(state))
    (checkpoint / "manifest.json").unlink()
    checkpoints._write_manifest(checkpoint)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (None, r"is damaged: optimizer.pt has \d+ bytes, \d+ were written"),
        (lambda state: state.update(format=1), "has format 1, and this version of .* reads 2"),
        (lambda state: state.pop("format"), "has format None, and this version of .* reads 2"),
        (lambda state: state["fingerprint"].update(seed=7), "is of another run: seed was 7, is 42"),
    ],
)
def test_a_run_goes_on_from_the_newest_checkpoint_that_it_can(
    finished: TinyRun,
    again: TinyRun,
    caplog: pytest.LogCaptureFixture,
    change: Callable[[dict[str, Any]], object] | None,
    message: str,
) -> None:
    """The log names what is passed over, which is written anew; without another one, the error."""
    newest = again.folder / "checkpoint-3"
    if change is None:
        cut(newest / "optimizer.pt")
    else:
        change_state(newest, change)
    end = "; resume with the same settings, or start anew with overwrite=True"
    with pytest.raises(ValueError, match=f"^checkpoint-3 {message}{end}$"):
        again.train(**{**RESUMING, "resume_from_checkpoint": str(newest)})
    assert steps(again.folder) == [3, 2, 1]
    caplog.clear()
    with caplog.at_level(logging.WARNING, "mlmadapt"):
        again.train(**RESUMING)
    (record,) = caplog.records
    assert re.fullmatch(f"checkpoint-3 {message}; it is passed over", record.getMessage())
    assert equal(weights(again.model), weights(finished.model))
    assert checkpoints.find_damage(newest) is None


def test_all_damaged_is_one_clear_error(again: TinyRun) -> None:
    """A run does not start over by itself where there was something to resume."""
    for step, name in enumerate(("state.json", "model.safetensors", "manifest.json"), 1):
        (again.folder / f"checkpoint-{step}" / name).unlink()
    message = (
        r"^checkpoint-3 is damaged: manifest.json cannot be read .*; checkpoint-2 is damaged: "
        r"model.safetensors is missing; checkpoint-1 is damaged: state.json is missing; resume with"
    )
    with pytest.raises(ValueError, match=message):
        again.train(**RESUMING)
    assert steps(again.folder) == [3, 2, 1]


def test_a_count_that_an_older_checkpoint_lacks_has_its_default(
    finished: TinyRun, again: TinyRun
) -> None:
    """Also a metric; and one that this version does not know is left out."""

    def make_older(state: dict[str, Any]) -> None:
        del state["counts"]["filled"], state["counts"]["skips"]
        state["counts"]["more"] = 1

    again.eval_rows = finished.rows[:4]
    first = again.train(**SAVING, overwrite=True)
    again.model = tiny_model(again.tokenizer)
    change_state(again.folder / "checkpoint-3", make_older)
    result = again.train(**RESUMING)
    assert result.history == first.history
    change_state(
        again.folder / "checkpoint-3",
        lambda state: [metrics.pop("accuracy") for _, metrics in state["counts"]["evaluations"]],
    )
    resumed = again.train(**RESUMING)
    assert resumed.final is not None
    assert first.final is not None
    assert str(resumed.final.accuracy) == "nan"
    assert resumed.final.loss == first.final.loss


def test_a_checkpoint_that_is_not_there_is_said_to_be_so(run: TinyRun) -> None:
    """And what there is in its place."""
    path = run.folder / "checkpoint-9"
    message = r"resume_from_checkpoint is '.*-9', which is not there \("
    with pytest.raises(FileNotFoundError, match=f"{message}nothing is"):
        run.train(resume_from_checkpoint=str(path))
    run.train(**SAVING, overwrite=True, max_steps=6)
    message += "checkpoint-6, checkpoint-5, checkpoint-4 is"
    with pytest.raises(FileNotFoundError, match=message):
        run.train(resume_from_checkpoint=str(path))


def test_what_is_there_to_resume_is_taken(
    again: TinyRun, finished: TinyRun, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The newest, or a named one; from an empty folder the run begins, and it says so."""
    whole = weights(finished.model)
    for checkpoint in (True, str(again.folder / "checkpoint-1")):
        last = (again.folder / "checkpoint-3").stat().st_ino
        again.model = tiny_model(again.tokenizer)
        again.train(**{**RESUMING, "resume_from_checkpoint": checkpoint})
        assert equal(weights(again.model), whole)
        is_written_anew = (again.folder / "checkpoint-3").stat().st_ino != last
        assert is_written_anew == (checkpoint is not True)
    fresh = TinyRun(tmp_path / "fresh")
    with caplog.at_level(logging.WARNING, "mlmadapt"):
        fresh.train(**RESUMING)
    assert f"{fresh.folder} holds no checkpoint; training starts from the beginning" in caplog.text
    assert equal(weights(fresh.model), whole)


def decaying(run: TinyRun) -> None:
    """An optimizer of the caller's with a tensor for its rate, and a schedule of whole numbers."""
    optimizer = torch.optim.AdamW(run.model.parameters(), lr=torch.tensor(1e-3))
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=[2, 3])
    run.objects = {"optimizer": optimizer, "lr_scheduler": schedule}


def test_optimizers_and_schedules_of_the_callers_resume(run: TinyRun) -> None:
    """With their own state, of whatever types."""
    decaying(run)
    whole = run.train(**SAVING)
    assert logged(whole, "learning_rate") == pytest.approx([1e-3, 1e-4, 1e-5])
    for step in (2, 3):
        shutil.rmtree(run.folder / f"checkpoint-{step}")
    run.model = tiny_model(run.tokenizer)
    decaying(run)
    assert run.train(**RESUMING).history == whole.history


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_that_became_infinite_are_not_saved(run: TinyRun, dtype: torch.dtype) -> None:
    """Loss and gradient were finite, the update was not: older checkpoints are left alone."""

    class Explosion(torch.optim.SGD):
        steps = 0

        def step(self, closure: Any = None) -> Any:
            self.steps += 1
            if self.steps == 2:
                with torch.no_grad():
                    self.param_groups[0]["params"][0].fill_(torch.finfo(dtype).max).mul_(1e38)
            return super().step(closure)

    run.objects["optimizer"] = Explosion(run.model.parameters(), lr=0.1)
    with pytest.raises(FloatingPointError, match=r"after step 2, .* is not finite, .* a lower lea"):
        run.train(**SAVING, save_total_limit=1)
    assert steps(run.folder) == [1]


def test_tokens_can_be_out_of_the_vocabulary(run: TinyRun) -> None:
    """A weight of -inf that was there from the beginning is no update that was too large."""
    used = {int(token) for row in run.rows for token in row["input_ids"]}
    with torch.no_grad():
        run.model.get_output_embeddings().bias[[*{*range(300)} - used]] = -torch.inf
    run.train(**SAVING)
    first = weights(run.model)
    shutil.rmtree(run.folder / "checkpoint-3")
    run.train(**RESUMING)
    assert equal(weights(run.model), first)


def train_badly(run: TinyRun, **settings: Any) -> TrainingResult:
    """Train so badly that the last evaluation is not the best."""
    run.eval_rows = run.rows[:4]
    settings = {**SAVING, "learning_rate": 2.0, "load_best_model_at_end": True, **settings}
    return run.train(eval_strategy="steps", eval_steps=1, max_grad_norm=0, **settings)


def test_a_best_checkpoint_that_is_damaged_is_not_saved(
    run: TinyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Damage to it between its step and the end must not become the final model."""
    original = loop.save

    def damage(state: Any) -> Any:
        assert state.saved_step < state.state.step
        flip(run.folder / f"checkpoint-{state.saved_step}" / "model.safetensors")
        return original(state)

    monkeypatch.setattr(loop, "save", damage)
    message = "checkpoint-., the best one, is damaged: model.safetensors is not what was written"
    with pytest.raises(ValueError, match=message):
        train_badly(run)
    assert not (run.folder / "model.safetensors").exists()


@pytest.mark.parametrize("step", [1, 3])
def test_the_best_model_is_found_from_another_output_dir(
    run: TinyRun, tmp_path: Path, step: int
) -> None:
    """A run resumed elsewhere brings the checkpoint along that it may have to load."""
    train_badly(run)
    elsewhere = TinyRun(tmp_path / "elsewhere")
    train_badly(elsewhere, resume_from_checkpoint=str(run.folder / f"checkpoint-{step}"))
    first, second = (load_file(made.folder / "model.safetensors") for made in (run, elsewhere))
    assert all(torch.equal(second[name], first[name]) for name in first)


def write(folder: Path, step: int) -> None:
    """Write a small checkpoint."""
    with checkpoints.whole_folder(folder, f"checkpoint-{step}") as building:
        (building / "state.json").write_text(json.dumps({"step": step}))
        checkpoints._write_manifest(building)


def test_a_checkpoint_gets_its_name_when_it_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files and folder are flushed before the rename, the folder above after it.

    A power cut in between would leave the name with empty files, which no kill of a process shows.
    """
    flushed: set[int] = set()
    flush, rename = os.fsync, Path.replace

    def note_flush(descriptor: int) -> None:
        flushed.add(os.fstat(descriptor).st_ino)
        flush(descriptor)

    def check_rename(path: Path, target: Path) -> Path:
        assert flushed >= {inside.stat().st_ino for inside in [path, *path.iterdir()]}
        flushed.clear()
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", note_flush)
    monkeypatch.setattr(Path, "replace", check_rename)
    write(tmp_path, 3)
    assert flushed == {tmp_path.stat().st_ino}
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]
    assert checkpoints.find_damage(tmp_path / "checkpoint-3") is None


@pytest.mark.parametrize(
    "error", [SafetensorError("I/O error: No space left on device"), RuntimeError("PytorchStream")]
)
def test_a_failed_first_save_says_that_there_is_no_other(tmp_path: Path, error: Exception) -> None:
    """An error without a number, as safetensors and torch raise for a full disk, is put as well."""
    message = (
        rf"checkpoint-1 could not be written to .* \({error}\); there is no earlier checkpoint"
    )
    with (
        pytest.raises(OSError, match=message),
        checkpoints.whole_folder(tmp_path, "checkpoint-1"),
    ):
        raise error
    assert list(tmp_path.iterdir()) == []


def test_steps_are_ordered_as_numbers(tmp_path: Path) -> None:
    """Step 10 is newer than 9, and names that only look like it are left alone."""
    for step in (9, 10, 100):
        write(tmp_path, step)
    for name in ("checkpoint-best", "checkpoint-7.bak", "my-checkpoint-8"):
        (tmp_path / name).mkdir()
    assert steps(tmp_path) == [100, 10, 9]


@pytest.mark.parametrize(
    ("keep", "best", "newest", "left"),
    [
        (None, 4, 4, [4, 3, 2, 1]),
        (2, 4, 4, [4, 3]),
        (2, 1, 4, [4, 3, 1]),
        (1, 4, 4, [4]),
        (9, 1, 4, [4, 3, 2, 1]),
        (1, 3, 3, [4, 3]),  # what comes later is damaged, and does not push out the newest
    ],
)
def test_the_newest_and_the_best_are_kept(
    tmp_path: Path, keep: int | None, best: int, newest: int, left: list[int]
) -> None:
    """`keep` of them and the best; None keeps all."""
    for step in range(1, 5):
        write(tmp_path, step)
    checkpoints.prune(tmp_path, keep=keep, best=best, newest=newest)
    assert steps(tmp_path) == left


def test_what_a_killed_run_left_half_done_is_cleared_away(again: TinyRun) -> None:
    """Nothing of it is taken up, and nothing stays."""
    for name in (".checkpoint-9.tmp", ".checkpoint-0.old"):
        shutil.copytree(again.folder / "checkpoint-1", again.folder / name)
    again.train(**RESUMING)
    assert not list(again.folder.glob(".checkpoint-*"))


def test_overwriting_removes_the_checkpoints_of_the_run_before(again: TinyRun) -> None:
    """Or a resume would take up the other run's; what others have put there stays."""
    (again.folder / "checkpoint-3").rename(again.folder / "checkpoint-7")
    (again.folder / "checkpoint-500").mkdir()
    (again.folder / "checkpoint-500" / "pytorch_model.bin").touch()
    (again.folder / "notes.txt").touch()
    again.train(overwrite=True)
    assert steps(again.folder) == [500]
    assert (again.folder / "notes.txt").exists()


def test_an_output_dir_with_files_is_refused(again: TinyRun) -> None:
    """A second run does not mix its files with those of the first."""
    before = {path: path.stat().st_mtime_ns for path in again.folder.rglob("*.safetensors")}
    with pytest.raises(FileExistsError, match=r"holds files of another run; .* overwrite=True"):
        again.train()
    after = {path: path.stat().st_mtime_ns for path in again.folder.rglob("*.safetensors")}
    assert after == before


def test_an_output_dir_that_cannot_be(run: TinyRun) -> None:
    """A file, which `save_pretrained` would say nothing about, and a folder that cannot be made."""
    folder = run.folder
    folder.write_text("dear")
    with pytest.raises(NotADirectoryError, match="which is a file; name a folder"):
        run.train(overwrite=True)
    assert folder.read_text() == "dear"
    run.folder = folder / "below"
    with pytest.raises(NotADirectoryError, match=r"cannot be written \(Not a directory\); name a"):
        run.train()
    if Path("/proc").is_dir():
        run.folder = Path("/proc/mlmadapt")
        with pytest.raises(OSError, match="output_dir is '/proc/mlmadapt', which cannot be"):
            run.train()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_output_dir_that_cannot_be_written_is_refused(run: TinyRun) -> None:
    """Before the first step, not at the first checkpoint, hours later."""
    run.folder.mkdir(mode=0o500)
    with pytest.raises(PermissionError, match="which cannot be written"):
        run.train()


@pytest.mark.parametrize("setting", ["overwrite", "resume_from_checkpoint"])
def test_an_output_dir_in_use_is_refused(run: TinyRun, setting: str) -> None:
    """Two runs on one folder would write over each other's checkpoints."""
    run.folder.mkdir()
    with FileLock(run.folder / ".lock"), pytest.raises(BlockingIOError, match="another run"):
        run.train(**{setting: True})


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("I/O")])
def test_a_full_disk_at_the_end_leaves_no_rubbish(
    run: TinyRun, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """The error says which checkpoint is whole; the same call saves the model later."""

    def fail(path: Path, **_: Any) -> None:
        (Path(path) / "model.safetensors").write_bytes(b"half")
        raise error

    monkeypatch.setattr(run.model, "save_pretrained", fail)
    with pytest.raises(OSError, match=r"model could not be written to .*; checkpoint-3 is intact"):
        run.train(**SAVING)
    assert not [path for path in run.folder.iterdir() if "tmp" in path.name]
    run.model = tiny_model(run.tokenizer)
    assert run.train(**RESUMING).global_step == 3
    assert (run.folder / "model.safetensors").exists()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_an_adapter_does_not_stay_beside_the_model_of_another_run(run: TinyRun) -> None:
    """`from_pretrained` would load it on top, without a word; nor the other way round."""
    run.adapt()
    run.train()
    assert (run.folder / "adapter_config.json").exists()
    run.model = tiny_model(run.tokenizer)
    run.train(overwrite=True)
    assert not list(run.folder.glob("adapter_*"))
    loaded = AutoModelForMaskedLM.from_pretrained(run.folder)
    assert equal(weights(loaded), weights(run.model))
    run.adapt()
    run.train(overwrite=True)
    assert not (run.folder / "model.safetensors").exists()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_adapters_with_names_are_saved_again_and_again(run: TinyRun) -> None:
    """They lie in folders, which cannot be moved onto one another."""
    for overwrite in (False, True):
        run.model = tiny_model(run.tokenizer)
        run.adapt("films", init_lora_weights=False)
        run.train(overwrite=overwrite)
    loaded = PeftModel.from_pretrained(tiny_model(run.tokenizer), run.folder / "films")
    trained = run.model.state_dict()
    for name, values in loaded.state_dict().items():
        torch.testing.assert_close(values, trained[name.replace(".default", ".films")])


@pytest.mark.parametrize("others", [[], ["checkpoint-3 00000000"], ["checkpoint-2 00000000"]])
@pytest.mark.parametrize("wanted", ["true", "named"])
def test_processes_that_read_another_checkpoint_are_told(
    again: TinyRun, monkeypatch: pytest.MonkeyPatch, others: list[str], wanted: str
) -> None:
    """On machines without a folder that they share, the second has none, or that of another run.

    Whichever of them is the first: nothing of the others is passed over, or to be removed.
    """
    wanted = str(again.folder / "checkpoint-3") if wanted == "named" else wanted
    find = partial(checkpoints.find_wanted, again.folder, wanted)
    assert find()[0] == again.folder / "checkpoint-3"
    for place in (0, 1):
        monkeypatch.setattr(
            checkpoints,
            "gather_object",
            lambda mine, place=place: [others, *mine] if place else [*mine, others],
        )
        message = (
            rf"^process {1 - place} sees other checkpoints \(.* an output_dir that they share;"
        )
        with pytest.raises(ValueError, match=message) as raised:
            find()
        assert "overwrite" not in str(raised.value)
        best: Any = SimpleNamespace(folder=again.folder, saved_step=3)
        with pytest.raises(ValueError, match="sees other checkpoints"):
            checkpoints.load_best(best)


def test_a_folder_that_machines_do_not_share_is_told(
    run: TinyRun, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As soon as it is made, and not when a checkpoint is looked for."""
    monkeypatch.setattr(checkpoints, "gather_object", lambda mine: [*mine, False])
    run.train()
    assert (
        f"output_dir is {str(run.folder)!r}, which not all machines share; name one" in caplog.text
    )
