"""What hostile hands tried on a run, and what went wrong without a word: each is told or mended."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForMaskedLM

from mlmadapt import TrainingConfig, WholeWordMaskingCollator, accelerate_train
from mlmadapt.testing import tiny_model, tiny_tokenizer
from mlmadapt.training import loop
from mlmadapt.training.checkpoint import find_checkpoints, find_damage
from tests.scripts.processes import SECONDS, outcome, start
from tests.scripts.short_run import freeze, make_rows

if TYPE_CHECKING:
    from collections.abc import Callable

    from mlmadapt import TrainingResult

SETTINGS = {
    "num_train_epochs": 1,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "save_strategy": "steps",
    "save_steps": 1,
    "disable_tqdm": True,
}


def train(folder: Path, model: Any = None, /, **options: Any) -> TrainingResult:
    """Train for 3 steps."""
    tokenizer = tiny_tokenizer()
    objects = {name: options.pop(name) for name in ("optimizer", "lr_scheduler") if name in options}
    return accelerate_train(
        model or tiny_model(tokenizer),
        make_rows(12),
        freeze(make_rows(4, seed=9)),
        tokenizer=tokenizer,
        data_collator=WholeWordMaskingCollator(tokenizer),
        config=TrainingConfig(output_dir=str(folder), **{**SETTINGS, **options}),
        **objects,
    )


def test_gradients_outside_of_the_optimizer_do_not_pile_up(tmp_path: Path) -> None:
    """An optimizer of the head alone: the norm is that of each step, as if all were in it."""
    norms = []
    for lr_of_the_rest in (None, 0.0):
        model = tiny_model(tiny_tokenizer())
        head = list(model.cls.parameters())
        rest = [each for each in model.bert.parameters() if all(each is not one for one in head)]
        groups = [{"params": head}]
        if lr_of_the_rest is not None:
            groups.append({"params": rest, "lr": lr_of_the_rest})
        optimizer = torch.optim.SGD(groups, lr=1e-3)
        result = train(tmp_path / str(lr_of_the_rest), model, optimizer=optimizer)
        norms.append([entry["grad_norm"] for entry in result.history if "grad_norm" in entry])
    assert norms[0] == norms[1]


def test_a_schedule_with_milestones_decays_after_a_resume_too(tmp_path: Path) -> None:
    """Its milestones are whole numbers, of which JSON alone makes strings."""

    def run(folder: Path, **options: Any) -> list[float]:
        model = tiny_model(tiny_tokenizer())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=[2, 3])
        options = {"optimizer": optimizer, "lr_scheduler": scheduler, **options}
        result = train(folder, model, **options)
        return [entry["learning_rate"] for entry in result.history if "learning_rate" in entry]

    whole = run(tmp_path / "whole")
    assert whole == pytest.approx([0.1, 0.01, 0.001])
    for step in (2, 3):
        shutil.rmtree(tmp_path / "whole" / f"checkpoint-{step}")
    assert run(tmp_path / "whole", resume_from_checkpoint=True) == whole


@pytest.mark.parametrize(
    "held", [{1, 2}, np.float32(0.1), object()], ids=["set", "float32", "object"]
)
def test_what_no_checkpoint_can_hold_is_found_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held: Any
) -> None:
    """Not hours later, at the first checkpoint."""
    monkeypatch.setattr(loop, "take_step", lambda *_, **__: pytest.fail("a step was taken"))
    model = tiny_model(tiny_tokenizer())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.param_groups[0]["held"] = held
    with pytest.raises(ValueError, match=r"holds what no checkpoint can \(Object of type"):
        train(tmp_path, model, optimizer=optimizer)


def test_a_learning_rate_that_is_a_tensor_is_stored(tmp_path: Path) -> None:
    """As `torch.compile` of an optimizer wants it."""
    whole = []
    for resume in (None, True):
        model = tiny_model(tiny_tokenizer())
        optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(1e-3))
        result = train(tmp_path, model, optimizer=optimizer, resume_from_checkpoint=resume)
        whole.append([entry.get("loss") for entry in result.history])
        shutil.rmtree(tmp_path / "checkpoint-3")
    assert whole[0] == whole[1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_that_became_infinite_are_not_saved(tmp_path: Path, dtype: torch.dtype) -> None:
    """Loss and gradient were finite, the update was not: older checkpoints are left alone."""

    class Explosion(torch.optim.SGD):
        steps = 0

        def step(self, closure: Any = None) -> Any:
            self.steps += 1
            if self.steps == 2:
                with torch.no_grad():
                    self.param_groups[0]["params"][0].fill_(torch.finfo(dtype).max).mul_(1e38)
            return super().step(closure)

    model = tiny_model(tiny_tokenizer())
    with pytest.raises(FloatingPointError, match=r"after step 2, .* is not finite, .* a lower lea"):
        train(tmp_path, model, optimizer=Explosion(model.parameters(), lr=0.1), save_total_limit=1)
    assert [path.name for path in find_checkpoints(tmp_path)] == ["checkpoint-1"]


# Checkpoints that verify, and make no sense.


def sign(checkpoint: Path) -> None:
    """Write a manifest that says that all is as it should be."""
    files = {
        path.name: {
            "size": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path in checkpoint.iterdir()
        if path.name != "manifest.json"
    }
    manifest = {"step": int(checkpoint.name.rpartition("-")[2]), "files": files}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


def in_state(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Change what is in a checkpoint's JSON."""

    def forge(checkpoint: Path) -> None:
        state = json.loads((checkpoint / "state.json").read_text())
        change(state)
        (checkpoint / "state.json").write_text(json.dumps(state))

    return forge


def in_objects(part: str, key: str, value: Any, *, name: str = "") -> Callable[[Path], None]:
    """Change the first entry of a name in the optimizer or the schedule, or give it another."""

    def change(node: Any) -> bool:
        pairs = node.get("pairs", []) if isinstance(node, dict) else []
        for pair in pairs:
            if pair[0] == key:
                pair[:] = [name or key, value]
                return True
        return any(change(each) for each in (node if isinstance(node, list) else chain(*pairs)))

    def change_part(state: dict[str, Any]) -> None:
        objects = dict(state["objects"]["pairs"])
        assert change(objects[part])

    return in_state(change_part)


def in_tensors(name: str, change: Callable[[dict[str, torch.Tensor]], Any]) -> Any:
    """Change a checkpoint's tensors."""

    def forge(checkpoint: Path) -> None:
        tensors = load_file(checkpoint / name)
        change(tensors)
        save_file(tensors, checkpoint / name, metadata={"format": "pt"})

    return forge


def first(tensors: dict[str, torch.Tensor], *, largest: bool = True) -> str:
    """Return the name of a tensor to forge."""
    return max(tensors, key=lambda name: tensors[name].numel() * (1 if largest else -1))


FORGED = {
    "no JSON": lambda path: (path / "state.json").write_text("{"),
    "deep nesting": lambda path: (path / "state.json").write_text("[" * 100_000),
    "a list": lambda path: (path / "state.json").write_text("[]"),
    "no fingerprint": in_state(lambda state: state.pop("fingerprint")),
    "a fingerprint of another kind": in_state(lambda state: state.update(fingerprint=7)),
    "no counts": in_state(lambda state: state.pop("counts")),
    "a step of another kind": in_state(lambda state: state["counts"].update(step="2")),
    "tokens of another kind": in_state(lambda state: state["counts"].update(tokens_seen="7")),
    "a history of another kind": in_state(lambda state: state["counts"].update(history=[7])),
    "a loss that is no number": in_state(
        lambda state: state["counts"]["evaluations"][0][1].update(loss="low")
    ),
    "a step below 0": in_state(lambda state: state["counts"].update(step=-2)),
    "an epoch step without an end": in_state(lambda s: s["counts"].update(epoch_step=10**9)),
    "an unknown count": in_state(lambda state: state["counts"].update(more=1)),
    "evaluations of another kind": in_state(lambda s: s["counts"].update(evaluations=[[1, 2]])),
    "no sums": in_state(lambda state: state.update(loss_sums=None)),
    "no objects": in_state(lambda state: state.pop("objects")),
    "an optimizer without groups": in_state(
        lambda state: state["objects"]["pairs"][0].__setitem__(1, {"pairs": []})
    ),
    "no places": in_state(lambda state: state.update(places=[])),
    "a place of another kind": in_state(lambda state: state.update(places=[{"row": 3}])),
    "no scheduler": in_state(lambda state: state["objects"]["pairs"].pop(1)),
    "a learning rate of another kind": in_objects("optimizer", "lr", "fast"),
    "a group without its betas": in_objects("optimizer", "betas", [0.9]),
    "a step of many numbers": in_tensors(
        "optimizer.safetensors",
        lambda tensors: tensors.update({first(tensors, largest=False): torch.zeros(6)}),
    ),
    "a step below zero": in_tensors(
        "optimizer.safetensors", lambda tensors: tensors[first(tensors, largest=False)].fill_(-1)
    ),
    "a moment that is missing": in_objects("optimizer", "exp_avg", None, name="more"),
    "moments that are not numbers": in_tensors(
        "optimizer.safetensors", lambda tensors: tensors[first(tensors)].fill_(torch.nan)
    ),
    "a schedule of another kind": in_objects("scheduler", "last_epoch", "2"),
    "a schedule without its rates": in_objects("scheduler", "base_lrs", []),
    "a schedule that lacks something": in_objects("scheduler", "_step_count", 2, name="more"),
    "tensors that are pickles": lambda path: torch.save({}, path / "optimizer.safetensors"),
    "weights that are pickles": lambda path: torch.save({}, path / "model.safetensors"),
    "no moments": in_tensors("optimizer.safetensors", lambda tensors: tensors.clear()),
    "moments of another shape": in_tensors(
        "optimizer.safetensors",
        lambda tensors: tensors.update({first(tensors): torch.zeros(1, 1)}),
    ),
    "weights of another shape": in_tensors(
        "model.safetensors", lambda tensors: tensors.update({first(tensors): torch.zeros(2, 2)})
    ),
    "weights of another type": in_tensors(
        "model.safetensors",
        lambda tensors: tensors.update({first(tensors): tensors[first(tensors)].half()}),
    ),
    "weights that are not numbers": in_tensors(
        "model.safetensors", lambda tensors: tensors[first(tensors)].fill_(torch.nan)
    ),
    "a weight too few": in_tensors("model.safetensors", lambda t: t.pop(first(t, largest=False))),
    "a weight too many": in_tensors("model.safetensors", lambda t: t.update(more=torch.zeros(1))),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 3 steps, each with its checkpoint."""
    folder = tmp_path_factory.mktemp("finished")
    train(folder)
    return folder


@pytest.mark.parametrize("forgery", FORGED)
def test_a_forged_checkpoint_is_named(finished: Path, tmp_path: Path, forgery: str) -> None:
    """It passes for whole; what is in it does not."""
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    FORGED[forgery](folder / "checkpoint-2")
    sign(folder / "checkpoint-2")
    shutil.rmtree(folder / "checkpoint-3")
    model = tiny_model(tiny_tokenizer())
    with pytest.raises(ValueError, match=r"^checkpoint-2 does not fit this run \(.*; delete it to"):
        train(folder, model, resume_from_checkpoint=True)
    shutil.rmtree(folder / "checkpoint-2")
    train(folder, resume_from_checkpoint=True)


def test_a_manifest_of_deep_nesting_is_damage(finished: Path, tmp_path: Path) -> None:
    """As any that cannot be read: the checkpoint before it is taken."""
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    (folder / "checkpoint-3" / "manifest.json").write_text("[" * 100_000)
    assert train(folder, resume_from_checkpoint=True).global_step == 3


@pytest.mark.parametrize("name", ["manifest.json", "state.json"])
def test_a_pipe_in_place_of_a_file_is_damage(finished: Path, name: str, tmp_path: Path) -> None:
    """To read from it would take for ever."""
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    path = folder / "checkpoint-3" / name
    path.unlink()
    os.mkfifo(path)
    # Or a test that fails would never end.
    writer = threading.Thread(target=path.write_text, args=("{}",))
    writer.start()
    damage = next(find_damage(folder / "checkpoint-3"))
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # for a writer that nobody heard
    writer.join(SECONDS)
    os.close(reader)
    assert damage.strip("'").startswith(name)
    assert damage.endswith("is not a plain file of the checkpoint")


def best_is_not_last(folder: Path, **options: Any) -> TrainingResult:
    """Train so badly that the last evaluation is not the best."""
    options = {"learning_rate": 0.5, "load_best_model_at_end": True, **options}
    return train(folder, eval_strategy="steps", eval_steps=1, max_grad_norm=0, **options)


def test_the_best_checkpoint_is_loaded_by_its_hash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Damage to it between its step and the end must not become the final model."""
    original = loop.save

    def damage(run: Any) -> Any:
        assert run.saved_step < run.state.step
        path = tmp_path / f"checkpoint-{run.saved_step}" / "model.safetensors"
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        return original(run)

    monkeypatch.setattr(loop, "save", damage)
    with pytest.raises(
        ValueError, match=r"checkpoint-. does not fit .*model.safetensors is not wh"
    ):
        best_is_not_last(tmp_path)
    assert not (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize("step", [1, 2, 3])
def test_the_best_model_is_found_from_another_output_dir(tmp_path: Path, step: int) -> None:
    """A run resumed elsewhere brings the checkpoint along that it may have to load."""
    first = tmp_path / "first"
    best_is_not_last(first)
    second = tmp_path / "second"
    best_is_not_last(second, resume_from_checkpoint=str(first / f"checkpoint-{step}"))
    expected, found = (load_file(each / "model.safetensors") for each in (first, second))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def adapter(**options: Any) -> Any:
    """A tiny model with an adapter."""
    config = LoraConfig(target_modules=["query"], r=2, init_lora_weights=False)
    return get_peft_model(tiny_model(tiny_tokenizer()), config, **options)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_an_adapter_does_not_stay_beside_the_model_of_another_run(tmp_path: Path) -> None:
    """`from_pretrained` would load it on top, without a word."""
    train(tmp_path, adapter())
    assert (tmp_path / "adapter_config.json").exists()
    model = tiny_model(tiny_tokenizer())
    train(tmp_path, model, overwrite=True)
    assert not list(tmp_path.glob("adapter_*"))
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(loaded[name], values) for name, values in model.state_dict().items())
    train(tmp_path, adapter(), overwrite=True)
    assert not (tmp_path / "model.safetensors").exists()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_adapters_with_names_are_saved_again_and_again(tmp_path: Path) -> None:
    """They lie in folders, which cannot be moved onto one another."""
    for overwrite in (False, True):
        model = adapter(adapter_name="films")
        train(tmp_path, model, overwrite=overwrite)
    loaded = PeftModel.from_pretrained(tiny_model(tiny_tokenizer()), tmp_path / "films")
    trained = model.state_dict()
    for name, values in loaded.state_dict().items():
        torch.testing.assert_close(values, trained[name.replace(".default", ".films")])


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("I/O")])
def test_a_full_disk_at_the_end_leaves_no_rubbish(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """The error says which checkpoint is whole; the same call saves the model later."""
    model = tiny_model(tiny_tokenizer())

    def fail(path: Path, **kwargs: Any) -> None:
        Path(path).mkdir()
        (Path(path) / "model.safetensors").write_bytes(b"half")
        raise error

    monkeypatch.setattr(model, "save_pretrained", fail)
    with pytest.raises(OSError, match=r"model could not be saved in .*; checkpoint-3 is intact"):
        train(tmp_path, model)
    assert not [path for path in tmp_path.iterdir() if "tmp" in path.name]
    assert train(tmp_path, resume_from_checkpoint=True).global_step == 3
    assert (tmp_path / "model.safetensors").exists()


# Several processes.


@pytest.mark.distributed
@pytest.mark.parametrize("differ", ["rows", "rows_seed", "per_device_train_batch_size", "seed"])
def test_processes_with_other_rows_or_settings_are_told(tmp_path: Path, differ: str) -> None:
    """They would wait for each other for ever, or train on in silence."""
    ended = start("train_differently", world=2, folder=str(tmp_path), differ=differ)
    for each in ended:
        assert each.error.startswith("ValueError: ")
        assert each.error.endswith("; give all processes the same rows and settings")
    assert not find_checkpoints(tmp_path)


@pytest.mark.distributed
def test_processes_bring_the_best_checkpoint_along_together(tmp_path: Path) -> None:
    """One that found the copy of another would go on without it, and wait for ever."""
    settings = {"load_best_model_at_end": True, "learning_rate": 0.5, "save_steps": 1}
    settings |= {"eval_strategy": "steps", "eval_steps": 1, "world": 2, "num_train_epochs": 1}
    whole = outcome(tmp_path / "first", **settings)
    best = min(
        (entry for entry in whole["history"] if entry["step"] and "eval_loss" in entry),
        key=lambda entry: entry["eval_loss"],
    )["step"]
    settings["resume_from_checkpoint"] = str(tmp_path / "first" / "checkpoint-2")
    assert best <= 2, "there is nothing to bring along"
    second = tmp_path / "second"
    ended = start(
        "train_late", folder=str(second), wait_for=str(second / f"checkpoint-{best}"), **settings
    )
    assert [each.code for each in ended] == [0, 0], "\n".join(each.log for each in ended)
    assert ended[0].result["weights"] == whole["weights"]


WORKERS = """
import signal, sys
from torch.utils.data import get_worker_info
from mlmadapt import TrainingConfig, WholeWordMaskingCollator, accelerate_train
from mlmadapt.testing import tiny_model, tiny_tokenizer
from tests.scripts.short_run import make_rows

# Ignored where the tests run in the background, and then left so.
signal.signal(signal.SIGINT, signal.default_int_handler)

class Rows(list):
    is_held = True

    def __getitem__(self, index):
        if self.is_held and get_worker_info() is not None:
            self.is_held = False
            print("held", flush=True)
            open(sys.argv[2], "rb", buffering=0).read(1)
        return super().__getitem__(index)

tokenizer = tiny_tokenizer()
accelerate_train(
    tiny_model(tokenizer), Rows(make_rows(64)), tokenizer=tokenizer,
    data_collator=WholeWordMaskingCollator(tokenizer),
    config=TrainingConfig(output_dir=sys.argv[1], num_train_epochs=1, save_strategy="no",
        per_device_train_batch_size=4, dataloader_num_workers=1, disable_tqdm=True),
)
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, -2)])
def test_a_signal_to_the_whole_process_group_leaves_a_checkpoint(
    tmp_path: Path, number: int, code: int
) -> None:
    """As Ctrl-C, Slurm and Kubernetes send it: to a worker that is at work as well."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])
    os.mkfifo(tmp_path / "pipe")
    pipe = os.open(tmp_path / "pipe", os.O_RDWR)
    command = [sys.executable, "-c", WORKERS, str(tmp_path / "out"), str(tmp_path / "pipe")]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, start_new_session=True, env=environment
    ) as process:
        try:
            assert process.stdout.readline() == "held\n"
            os.killpg(process.pid, number)
            os.write(pipe, b".")
            process.wait(SECONDS)
        finally:
            os.close(pipe)
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == code
    assert [path.name for path in find_checkpoints(tmp_path / "out")] == ["checkpoint-1"]


@pytest.mark.distributed
def test_a_signal_to_all_processes_and_their_workers_leaves_a_checkpoint(tmp_path: Path) -> None:
    """Two process groups are told, each of a process and its workers, as a scheduler does it."""
    settings = {"world": 2, "dataloader_num_workers": 1, "save_strategy": "no", "rows": 64}
    settings |= {"per_device_train_batch_size": 2, "num_train_epochs": 1}
    whole = outcome(tmp_path / "whole", **settings)
    ended = start("train", folder=str(tmp_path / "cut"), at_step={"2": ["term group"]}, **settings)
    assert [each.code for each in ended] == [143, 143], "\n".join(each.log for each in ended)
    # Several processes hear of it with the counts of the next step.
    (found,) = find_checkpoints(tmp_path / "cut")
    assert found.name in {"checkpoint-3", "checkpoint-4"}
    assert outcome(tmp_path / "cut", resume_from_checkpoint=True, **settings) == whole


def test_the_run_after_a_signal_ends_as_if_there_had_been_none(tmp_path: Path) -> None:
    """With workers, too."""
    settings = {"dataloader_num_workers": 1, "save_strategy": "no"}
    whole = outcome(tmp_path / "whole", **settings)
    (ended,) = start("train", folder=str(tmp_path / "cut"), at_step={"2": ["term"]}, **settings)
    assert ended.code == 143
    assert outcome(tmp_path / "cut", resume_from_checkpoint=True, **settings) == whole
