"""What goes wrong is said in time and by name, and never costs a checkpoint."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from filelock import FileLock

from mlmadapt import (
    TrainingConfig,
    WholeWordMaskingCollator,
    accelerate_train,
    tokenize_with_word_ids,
)
from mlmadapt.testing import tiny_corpus, tiny_model, tiny_tokenizer
from mlmadapt.training.checkpoint import find_checkpoints, find_damage, newest_whole
from mlmadapt.training.distributed import Signals
from tests.scripts.processes import outcome, run_script, start, train
from tests.scripts.short_run import rows_of

pytestmark = pytest.mark.usefixtures("no_curves")

SCRIPT = str(Path(__file__).parents[1] / "scripts" / "short_run.py")


def last_step(folder: Path) -> int:
    """Return the step of the newest checkpoint; none may be damaged."""
    assert [list(find_damage(path)) for path in find_checkpoints(folder)] == [
        [] for _ in find_checkpoints(folder)
    ]
    path = newest_whole(folder)
    return 0 if path is None else int(path.name.rpartition("-")[2])


@pytest.mark.parametrize(("name", "code"), [("term", 143), ("interrupt", 130)])
@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.distributed)])
def test_a_signal_lets_the_step_end_and_leaves_a_checkpoint(
    tmp_path: Path, name: str, code: int, world: int
) -> None:
    """One process of several notes it, all leave with the usual code, and the run can go on."""
    settings = {"world": world, "save_strategy": "no", "per_device_train_batch_size": 8 // world}
    whole = outcome(tmp_path / "whole", **settings)
    folder = tmp_path / "left"
    ended = start("train", folder=str(folder), at_step={"2": [[name, world - 1]]}, **settings)
    assert [each.code for each in ended] == [code] * world
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


def test_signals_are_handled_as_before_afterwards() -> None:
    """The caller's handlers come back, and what it ignores is not heard."""
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    with Signals() as signals:
        assert signal.getsignal(signal.SIGTERM) != before[1]
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Signals() as signals:
            os.kill(os.getpid(), signal.SIGINT)
            assert signals.noted == 0
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before[0])


def test_signals_are_left_alone_in_another_thread() -> None:
    """Where Python does not allow handlers, a run does without."""
    failed: list[BaseException] = []

    def work() -> None:
        try:
            with Signals() as signals:
                assert signals.noted == 0
        except BaseException as error:  # noqa: BLE001
            failed.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(10)
    assert not failed


@pytest.mark.parametrize("poison", ["poison gradient", "poison loss"])
def test_what_is_not_finite_stops_before_the_update(tmp_path: Path, poison: str) -> None:
    """NaN in the gradient, and infinity in a loss whose gradient is finite, with step and rows."""
    ended = train(tmp_path, at_step={"3": [poison]})
    assert ended.error.startswith("FloatingPointError: ")
    assert "step 3 (epoch 1)" in ended.error
    assert "training rows 13, 2, 6, 10, 8, 21, 4, 0" in ended.error
    assert last_step(tmp_path) == 2
    assert not (tmp_path / "model.safetensors").exists()


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("poison", "logging_steps"), [("poison gradient", 1), ("poison loss", 1), ("poison loss", 100)]
)
def test_what_is_not_finite_on_one_process_stops_all(
    tmp_path: Path, poison: str, logging_steps: int
) -> None:
    """Both raise at the same step, be it read at once or later, and nobody waits for the other."""
    settings = {"rows": 40, "logging_steps": logging_steps, "save_steps": 5}
    at_step = {"1": [[poison, 1]]}
    ended = start("train", folder=str(tmp_path), world=2, at_step=at_step, **settings)
    assert ["FloatingPointError" in each.error and "step 1 " in each.error for each in ended] == [
        True,
        True,
    ], [each.error for each in ended]
    assert last_step(tmp_path) == 0


@pytest.mark.distributed
def test_a_failed_save_is_raised_by_every_process(tmp_path: Path) -> None:
    """Only the main process writes, and the other one does not wait for it."""
    full = {"4": ["disk full"]}
    ended = start("train", folder=str(tmp_path), world=2, rows=40, while_saving=full)
    expected = "checkpoint-4 could not be written to"
    assert [expected in each.error for each in ended] == [True, True]
    assert "checkpoint-2 is intact" in ended[1].error
    assert last_step(tmp_path) == 2


class Setup:
    """A run in this process that fails before its first step."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = tiny_tokenizer()
        self.model = tiny_model(self.tokenizer)
        columns = tokenize_with_word_ids({"text": tiny_corpus(6)}, self.tokenizer)
        self.rows = rows_of(columns)
        self.folder = folder
        self.eval_rows: Any = None
        self.more: dict[str, Any] = {}

    def train(self, **settings: Any) -> Any:
        """Train for one step."""
        return accelerate_train(
            self.model,
            self.rows,
            self.eval_rows,
            tokenizer=self.tokenizer,
            data_collator=WholeWordMaskingCollator(self.tokenizer),
            config=TrainingConfig(
                output_dir=str(self.folder), max_steps=1, disable_tqdm=True, **settings
            ),
            **self.more,
        )


@pytest.fixture
def setup(tmp_path: Path) -> Setup:
    """A run into a new folder."""
    return Setup(tmp_path / "out")


def test_an_output_dir_that_is_a_file_is_refused(setup: Setup) -> None:
    """Before the first step, as `save_pretrained` would save nothing and say nothing."""
    setup.folder.write_text("dear")
    with pytest.raises(NotADirectoryError, match="which is a file; name a folder"):
        setup.train(overwrite=True)
    assert setup.folder.read_text() == "dear"


def test_an_output_dir_below_a_file_is_refused(setup: Setup) -> None:
    """The same for a folder that cannot be made."""
    setup.folder.write_text("dear")
    setup.folder /= "out"
    with pytest.raises(OSError, match="which cannot be written"):
        setup.train()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_output_dir_that_cannot_be_written_is_refused(setup: Setup) -> None:
    """Before the first step, not at the first checkpoint, hours later."""
    setup.folder.mkdir(mode=0o500)
    with pytest.raises(PermissionError, match="which cannot be written"):
        setup.train()


def test_an_output_dir_with_files_is_refused(setup: Setup) -> None:
    """A second run does not mix its files with those of the first."""
    setup.train()
    before = {path: path.stat().st_mtime_ns for path in setup.folder.rglob("*")}
    with pytest.raises(FileExistsError, match=r"holds files of another run; .* overwrite=True"):
        setup.train()
    after = {path: path.stat().st_mtime_ns for path in setup.folder.rglob("*.safetensors")}
    assert after.items() <= before.items()


def test_overwriting_removes_the_checkpoints_of_the_run_before(setup: Setup) -> None:
    """Or a resume would take up the other run's."""
    setup.train(save_strategy="steps", save_steps=1)
    (setup.folder / "checkpoint-1").rename(setup.folder / "checkpoint-7")
    (setup.folder / "notes.txt").write_text("dear")
    setup.train(overwrite=True)
    assert [path.name for path in find_checkpoints(setup.folder)] == ["checkpoint-1"]
    assert (setup.folder / "notes.txt").exists()


@pytest.mark.parametrize("setting", ["overwrite", "resume_from_checkpoint"])
def test_an_output_dir_in_use_is_refused(setup: Setup, setting: str) -> None:
    """Two runs on one folder would write over each other's checkpoints."""
    setup.folder.mkdir()
    with FileLock(setup.folder / ".lock"), pytest.raises(BlockingIOError, match="another run"):
        setup.train(**{setting: True})


def test_the_folder_of_a_killed_run_is_free(tmp_path: Path) -> None:
    """The lock goes with the process, workers included."""
    assert train(tmp_path, at_step={"1": ["kill"]}, dataloader_num_workers=1).code == -9
    outcome(tmp_path, resume_from_checkpoint=True, dataloader_num_workers=1)


def refuse(setup: Setup, error: type[Exception], match: str, **settings: Any) -> None:
    """Check that a run is refused before it touches the disk or the model."""
    state = {name: values.clone() for name, values in setup.model.state_dict().items()}
    hooks = count_hooks(setup.model)
    with pytest.raises(error, match=match):
        setup.train(**settings)
    assert not setup.folder.exists()
    assert count_hooks(setup.model) == hooks
    now = setup.model.state_dict()
    assert all(torch.equal(values, state[name]) for name, values in now.items())


def count_hooks(model: torch.nn.Module) -> int:
    """Count the hooks of a model and its modules."""
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()
    )


def test_no_training_rows_are_refused(setup: Setup) -> None:
    """Nought steps would be a success that trained nothing."""
    setup.rows = []
    refuse(setup, ValueError, "train_dataset has no rows; group_texts drops")


def test_no_evaluation_rows_are_refused(setup: Setup) -> None:
    """The set is named as the dict names it."""
    setup.eval_rows = {"domain": setup.rows, "general": []}
    refuse(setup, ValueError, "eval_general has no rows; group_texts drops")


def test_a_row_longer_than_the_model_is_refused(setup: Setup) -> None:
    """With both numbers, and the chunk size that fits."""
    setup.rows[3] = {name: [*values] * 200 for name, values in setup.rows[3].items()}
    length = len(setup.rows[3]["input_ids"])
    message = f"row of {length} tokens, the model has positions for 512; .* chunk_size=512"
    refuse(setup, ValueError, message)


def test_a_tokenizer_larger_than_the_model_is_refused(setup: Setup) -> None:
    """With the call that mends it."""
    setup.tokenizer.add_tokens(["neologism", "hapax"])
    refuse(setup, ValueError, r"477 tokens, .* for 475; .*resize_token_embeddings\(477\)")


def test_an_id_past_the_embedding_is_refused(setup: Setup) -> None:
    """Which is an `IndexError` without a name on the CPU, and ends a GPU's context."""
    setup.rows[2]["input_ids"] = [2, 900, 3]
    setup.rows[2] = {name: values[:3] for name, values in setup.rows[2].items()}
    refuse(setup, ValueError, "token id 900, the model's embedding 475")


@pytest.mark.filterwarnings("ignore:.log_with:UserWarning")
def test_a_tracker_that_is_not_installed_is_refused(setup: Setup) -> None:
    """Accelerate goes on without it, and hours later there is no log."""
    refuse(setup, ValueError, r"report_to is 'comet_ml', .* not installed", report_to="comet_ml")


@pytest.mark.parametrize(
    "setting", [{"early_stopping_patience": 1}, {"load_best_model_at_end": True}]
)
def test_what_goes_by_an_evaluation_needs_one(setup: Setup, setting: dict[str, Any]) -> None:
    """There is no best model without an evaluation set."""
    refuse(setup, ValueError, "go by an evaluation, but eval_dataset is None", **setting)


def test_a_launcher_that_starts_loners_is_noticed(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes that both believe to be alone would overwrite each other's files."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    setup.more["accelerator"] = Accelerator()
    refuse(setup, RuntimeError, r"started 2 processes .* set ACCELERATE_USE_CPU=1")


def test_a_launcher_that_starts_one_process_is_noticed(
    setup: Setup, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """``accelerate launch --cpu --num_processes 2`` does."""
    setup.more["accelerator"] = Accelerator()
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with caplog.at_level(logging.WARNING, "mlmadapt"):
        setup.train()
    assert "one process trains alone: 'accelerate launch --cpu' starts one" in caplog.text


def test_a_run_that_fails_leaves_the_model_as_it_was(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No hooks, no frozen parameters, the same mode, whether it fails late or while starting."""
    hooks, training = count_hooks(setup.model), setup.model.training
    forward = setup.model.forward

    class Failing(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            raise ArithmeticError("on purpose")

    def fail(*args: Any) -> None:
        raise ArithmeticError("on purpose")

    for place in ("optimizer", "schedule"):
        setup.more["optimizer"] = Failing(setup.model.parameters(), lr=0.1)
        if place == "schedule":
            monkeypatch.setattr("mlmadapt.training.prepare.make_scheduler", fail)
        # The second time without `overwrite`: what failed before a checkpoint left nothing behind.
        with pytest.raises(ArithmeticError, match="on purpose"):
            setup.train()
        assert count_hooks(setup.model) == hooks
        assert setup.model.training == training
        assert setup.model.forward == forward
        assert all(each.grad is None for each in setup.model.parameters())


@pytest.mark.slow
@pytest.mark.distributed
def test_one_cpu_process_that_torchrun_duplicates_is_refused(tmp_path: Path) -> None:
    """A real torchrun without ACCELERATE_USE_CPU and an accelerator (``pytest -m slow``)."""
    if torch.accelerator.is_available():
        pytest.skip("with an accelerator, torchrun's processes find each other")
    ended = torchrun(tmp_path, f'{{"folder": "{tmp_path}/out"}}', ACCELERATE_USE_CPU="false")
    assert ended.returncode != 0
    assert "RuntimeError: the launcher started 2 processes (WORLD_SIZE)" in ended.stdout
    assert not (tmp_path / "out").exists()


@pytest.mark.distributed
def test_torchrun_hands_on_a_sigterm_and_the_run_goes_on(tmp_path: Path) -> None:
    """As a scheduler sends it: to torchrun, whose processes leave a checkpoint within its 30 s."""
    settings = {"per_device_train_batch_size": 4, "save_strategy": "no"}
    folder = tmp_path / "left"
    arguments = {"folder": str(folder), **settings, "at_step": {"2": [["term parent", 0]]}}
    ended = torchrun(tmp_path, json.dumps(arguments))
    assert ended.returncode != 0
    assert 3 <= last_step(folder) < 6, ended.stdout
    resumed = outcome(folder, world=2, **settings, resume_from_checkpoint=True)
    assert resumed == outcome(tmp_path / "whole", world=2, **settings)


@pytest.mark.parametrize(("number", "code"), [(9, -9), (signal.SIGTERM, -15), (signal.SIGINT, 130)])
def test_a_signal_at_once_ends_a_run_and_not_what_starts_runs(
    tmp_path: Path, number: int, code: int
) -> None:
    """Before it has a group, a log or a handler; the server of these tests goes on."""
    for place in range(3):
        folder = str(tmp_path / str(place))
        ended = start("train", world=2, folder=folder, kill_after=0.0, kill_by=number)
        assert [each.code for each in ended] == [code, code]


@pytest.mark.parametrize("error", ["", "raise ArithmeticError('on purpose')"])
def test_a_process_leaves_its_group_as_python_ends(tmp_path: Path, error: str) -> None:
    """Unless it failed: the others may wait for it then, and leaving could wait for them."""
    script = f"""
import atexit, torch
from mlmadapt.training.distributed import _leave_group_at_exit

atexit.register(lambda: print("still in it:", torch.distributed.is_initialized()))
torch.distributed.init_process_group(
    "gloo", init_method={(tmp_path / "group").as_uri()!r}, rank=0, world_size=1
)
_leave_group_at_exit()
_leave_group_at_exit()
{error}
"""
    ended = run_script([sys.executable, "-c", script], PYTHONPATH=os.pathsep.join(sys.path))
    assert ended.returncode == bool(error), ended.stdout
    assert f"still in it: {bool(error)}" in ended.stdout


@pytest.mark.slow
@pytest.mark.distributed
def test_processes_of_torchrun_end_well(tmp_path: Path) -> None:
    """Twenty times in a row: none aborts or hangs as Python ends (``pytest -m slow``)."""
    for place in range(20):
        settings = {"folder": str(tmp_path / str(place)), "rows": 8, "num_train_epochs": 1}
        ended = torchrun(tmp_path, json.dumps(settings))
        assert ended.returncode == 0, ended.stdout


def torchrun(folder: Path, arguments: str, **options: Any) -> Any:
    """Start two processes as users do."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["--master_port", str(port), SCRIPT, arguments, str(folder / "outcome-")]
    return run_script(command, **{"ACCELERATE_USE_CPU": "1", **options})
