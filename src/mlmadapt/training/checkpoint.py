"""Checkpoints that are whole or not there at all.

A checkpoint is written under another name, listed in a manifest with the size and hash of each
file, flushed to the disk and only then renamed; older ones are removed after that. A run that is
killed at any moment leaves the previous checkpoint as it was. It holds weights, the optimizer's
moments, the schedule and the counts of `RunState`; random state is not part of it, since nothing
random is remembered. Nothing is pickled: tensors are safetensors, the rest is JSON, so that a
checkpoint from elsewhere can at worst be refused.
"""

import hashlib
import json
import logging
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file, load_model, save_file
from safetensors.torch import save_model as save_weights
from torch import nn

from mlmadapt._types import Model, Tokenizer
from mlmadapt.model.evaluation import MaskedLMMetrics
from mlmadapt.training.config import TrainingConfig
from mlmadapt.training.distributed import on_main_process
from mlmadapt.training.fingerprint import check_same_run
from mlmadapt.training.state import Run, RunState

logger = logging.getLogger(__name__)

_PREFIX = "checkpoint-"
_MANIFEST = "manifest.json"
_WEIGHTS = "model.safetensors"
_TENSORS = "optimizer.safetensors"
_STATE = "state.json"


def write_run(run: Run, *, told: Mapping[str, list[Any]]) -> None:
    """Write a checkpoint that `read_run` takes up again and ``from_pretrained`` loads.

    Args:
        run: The run, between two steps.
        told: What each process has of its own: `loss_sums`, and `places` in a stream.

    Raises:
        OSError: As `whole_checkpoint`.
        FloatingPointError: If a weight is not finite; older checkpoints are left alone.
    """
    left_out = run.fingerprint.get("weights of -inf", {})
    for name, values in run.model.named_parameters():
        if not is_finite(values, but=left_out.get(name, 0)):
            raise FloatingPointError(
                f"after step {run.state.step}, {name} is not finite, though loss and gradient "
                "were: the update was too large. Resume from an earlier checkpoint with a lower "
                f"learning_rate than {run.config.learning_rate}"
            )
    scaler = run.accelerator.scaler
    tensors, objects = split_state(
        {
            "optimizer": run.optimizer.state_dict(),
            "scheduler": run.scheduler.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
        }
    )
    state = {
        "fingerprint": run.fingerprint,
        "counts": asdict(replace(run.state, seconds=run.seconds)),
        "objects": objects,
        **told,
    }
    with whole_checkpoint(run.folder, run.state.step) as folder:
        # The format is what from_pretrained looks for. Tied weights are stored once.
        save_weights(run.model, str(folder / _WEIGHTS), metadata={"format": "pt"})
        save_file(tensors, folder / _TENSORS)
        (folder / "config.json").write_text(json.dumps(run.model.config.to_dict(), indent=1))
        (folder / _STATE).write_text(json.dumps(state, indent=1))


def read_run(checkpoint: Path, run: Run) -> None:
    """Put a checkpoint's state into a run.

    Raises:
        ValueError: If it is of another run, or makes no sense.
    """
    with _refusing(checkpoint):
        stored = json.loads((checkpoint / _STATE).read_text())
        fingerprint = dict(stored["fingerprint"])
    check_same_run(fingerprint, run.fingerprint, checkpoint=checkpoint.name)
    load_weights(checkpoint, run.model)
    with _refusing(checkpoint):
        objects = join_state(load_file(checkpoint / _TENSORS), stored["objects"])
        own = run.optimizer.state_dict()["param_groups"]
        _check_form(objects["optimizer"]["param_groups"], own, "param_groups")
        _check_form(objects["scheduler"], run.scheduler.state_dict(), "scheduler")
        run.optimizer.load_state_dict(objects["optimizer"])
        _check_moments(run.optimizer)
        run.scheduler.load_state_dict(objects["scheduler"])
        if run.accelerator.scaler is not None and objects["scaler"] is not None:
            run.accelerator.scaler.load_state_dict(objects["scaler"])
        counts = stored["counts"]
        types = {name: type(value) for name, value in asdict(RunState()).items()}
        _require({name: type(value) for name, value in counts.items()} == types, "other counts")
        entries = [*counts["history"], *dict(counts["evaluations"]).values()]
        figures = [value for entry in entries for value in entry.values()]
        _require(all(isinstance(value, int | float) for value in figures), "other figures")
        state = RunState(**counts)
        state.evaluations = [
            (int(step), MaskedLMMetrics(**each)) for step, each in counts["evaluations"]
        ]
        _require(min(state.step, state.epoch, state.epoch_step) >= 0, "a count is below 0")
        end = run.plan.steps_per_epoch or math.inf  # that of a stream is not known
        _require(state.epoch_step < end, f"step {state.epoch_step} of an epoch of {end}")
        # Each process goes on with its own sum; if their number differs, the first takes the whole.
        sums, rank = stored["loss_sums"], run.accelerator.process_index
        same = len(sums) == run.accelerator.num_processes
        state.loss_sum = float(sums[rank] if same else sum(sums) if rank == 0 else 0.0)
        # Checkpoints of before have none. A stream that is not split has one for all processes.
        places = stored.get("places", [{}])
        run.place = replace(run.place, **places[rank % len(places)])
    run.state = state


def load_weights(checkpoint: Path, model: nn.Module) -> None:
    """Load a checkpoint's weights into a model.

    Raises:
        ValueError: If they are damaged, another model's, or not finite.
    """
    with _refusing(checkpoint):
        _require(not (damage := list(find_damage(checkpoint))), "; ".join(damage))
        own = model.state_dict()
        for name, values in load_file(checkpoint / _WEIGHTS).items():
            known = name in own and values.dtype == own[name].dtype
            _require(known, f"{name} is of type {values.dtype}")
            finite = is_finite(values, but=int(own[name].isneginf().sum()))
            _require(finite, f"{name} is not finite")
        load_model(model, checkpoint / _WEIGHTS)


def is_finite(values: torch.Tensor, *, but: int) -> bool:
    """Tell whether all are finite but some -inf, of tokens that are out of the vocabulary."""
    lowest = values.isneginf()
    return bool((values.isfinite() | lowest).all()) and int(lowest.sum()) == but


def _check_form(given: Any, own: Any, name: str) -> None:
    """Check that a stored state can take the place of the one that an object has of its own.

    What is None or empty at first can become anything, and further entries can come.
    """
    kinds = (Mapping, list | tuple, torch.Tensor, str, bool, int | float, object)
    kind = next(kind for kind in kinds if isinstance(own, kind))
    if own is None or (kind in (Mapping, list | tuple) and not own):
        return
    _require(isinstance(given, kind), f"{name} is {given!r:.40}")
    if kind is Mapping:
        _require(own.keys() <= given.keys(), f"{name} lacks {sorted(own.keys() - given.keys())}")
        for key, value in own.items():
            _check_form(given[key], value, f"{name}.{key}")
    elif kind == list | tuple:
        _require(len(given) == len(own), f"{name} has {len(given)} entries, not {len(own)}")
        for place, (one, other) in enumerate(zip(given, own, strict=True)):
            _check_form(one, other, f"{name}.{place}")
    elif kind is torch.Tensor:
        _require(given.shape == own.shape, f"{name} has another shape")


def _check_moments(optimizer: torch.optim.Optimizer) -> None:
    """Check that each parameter has the moments that its like have, of its shape, and no NaN."""
    for group in optimizer.param_groups:
        names: dict[int, set[str]] = {}
        for parameter in group["params"]:
            moments = optimizer.state.get(parameter)
            if moments is None:
                continue  # it never had a gradient
            known = names.setdefault(parameter.ndim, {*moments})
            _require({*moments} == known, f"moments are {sorted(moments)} and {sorted(known)}")
            for name, values in moments.items():
                if name in ("exp_avg", "exp_avg_sq", "momentum_buffer") and values is not None:
                    _require(values.shape == parameter.shape, f"{name} has another shape")
                elif name == "step":
                    _require(float(values) >= 0, f"step is {values}")
                if isinstance(values, torch.Tensor):
                    _require(not values.isnan().any(), f"{name} is NaN")


@contextmanager
def _refusing(checkpoint: Path) -> Iterator[None]:
    """Say of a checkpoint from elsewhere, whatever is wrong with it, which one it is."""
    try:
        yield
    except Exception as error:  # files of someone else can fail in any way
        problem = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(
            f"{checkpoint.name} does not fit this run ({problem}); delete it to resume from an "
            "earlier one"
        ) from error


def _require(holds: bool, problem: str) -> None:  # noqa: FBT001
    if not holds:
        raise ValueError(problem)


def bring(checkpoint: Path, output_dir: Path) -> None:
    """Copy a checkpoint into another output directory, where a resumed run will look for it."""
    if (output_dir / checkpoint.name).exists():
        return
    with whole_checkpoint(output_dir, _step_of(checkpoint)) as folder:
        for path in checkpoint.iterdir():
            if path.name != _MANIFEST:
                shutil.copy(path, folder)


@contextmanager
def whole_checkpoint(output_dir: Path, step: int) -> Iterator[Path]:
    """Hand out a folder to fill, and make it ``checkpoint-<step>`` when that went well.

    Raises:
        OSError: If it cannot be written; nothing of it is left then, and older ones are whole.
    """
    target = output_dir / f"{_PREFIX}{step}"
    building = output_dir / f".{target.name}.tmp"
    try:
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir()
        yield building
        files = {
            path.name: {"size": path.stat().st_size, "sha256": _hash(path)}
            for path in sorted(building.iterdir())
        }
        (building / _MANIFEST).write_text(json.dumps({"step": step, "files": files}, indent=1))
        for path in [*building.iterdir(), building]:
            _flush(path)
        if target.exists():  # of this step and this run, or it would not have got here
            shutil.rmtree(target)
        building.rename(target)
        _flush(output_dir)
    except (OSError, SafetensorError) as error:
        kept = [path.name for path in find_checkpoints(output_dir)]
        message = f"{target.name} could not be written to {str(output_dir)!r} ({error}); " + (
            f"{kept[0]} is intact" if kept else "there is no earlier checkpoint"
        )
        number = getattr(error, "errno", None)  # safetensors raises an error of its own
        raise (OSError(message) if number is None else OSError(number, message)) from error
    finally:
        # Gone already when all went well: whatever went wrong, nothing half done is left.
        shutil.rmtree(building, ignore_errors=True)


def find_checkpoints(output_dir: Path) -> list[Path]:
    """Return the checkpoints in a folder, newest first, whole or not."""
    is_one = re.compile(rf"{_PREFIX}[0-9]+").fullmatch
    found = [path for path in output_dir.glob(f"{_PREFIX}*") if is_one(path.name)]
    return sorted(found, key=_step_of, reverse=True)


def choose(output_dir: Path, wanted: str | Literal[True]) -> Path | None:
    """Return the checkpoint that ``resume_from_checkpoint`` asks for; None if there is none yet.

    Raises:
        FileNotFoundError: If it names a directory that is not there.
        ValueError: If what it names is damaged.
    """
    if wanted is True or wanted.lower() == "true":  # as a command line says it
        return newest_whole(output_dir)
    if not Path(wanted).is_dir():
        found = [path.name for path in find_checkpoints(output_dir)] or ["no checkpoint"]
        raise FileNotFoundError(
            f"resume_from_checkpoint is {wanted!r}, which is not there; name a checkpoint's "
            f"directory, or pass True for the newest in output_dir, which holds {', '.join(found)}"
        )
    damage = next(find_damage(Path(wanted)), None)
    if damage is not None:
        raise ValueError(f"resume_from_checkpoint is {wanted!r}, which is damaged: {damage}")
    return Path(wanted)


def newest_whole(output_dir: Path) -> Path | None:
    """Return the newest checkpoint that is as it was written; name each damaged one in a warning.

    Raises:
        ValueError: If there are checkpoints and all are damaged.
    """
    found = find_checkpoints(output_dir)
    for path in found:
        damage = next(find_damage(path), None)
        if damage is None:
            return path
        logger.warning("%s is damaged and passed over: %s", path.name, damage)
    if found:
        raise ValueError(
            f"all checkpoints in {str(output_dir)!r} are damaged "
            f"({', '.join(path.name for path in found)}); delete them to start again"
        )
    return None


def find_damage(checkpoint: Path) -> Iterator[str]:
    """Yield what is wrong with a checkpoint: each file that is not as the manifest says."""
    manifest = checkpoint / _MANIFEST
    if _is_odd(manifest):  # to read from a pipe could take for ever
        yield f"{_MANIFEST} is not a plain file of the checkpoint"
        return
    try:
        files = json.loads(manifest.read_text())["files"]
        expected = {name: (entry["size"], entry["sha256"]) for name, entry in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        yield f"{_MANIFEST} cannot be read ({error or type(error).__name__})"
        return
    for name in sorted({path.name for path in checkpoint.iterdir()} - {_MANIFEST, *expected}):
        yield f"{name} is not in the manifest"
    for name, (size, digest) in expected.items():
        path = checkpoint / name
        # A manifest from elsewhere must not lead out of the folder.
        if Path(name).name != name or _is_odd(path):
            yield f"{name!r} is not a plain file of the checkpoint"
        elif not path.is_file():
            yield f"{name} is missing"
        elif path.stat().st_size != size:
            yield f"{name} has {path.stat().st_size} bytes, {size} were written"
        elif _hash(path) != digest:
            yield f"{name} is not what was written (its hash differs)"


def prune(
    output_dir: Path, *, keep: int | None, also: int | None = None, newest: int | None = None
) -> None:
    """Remove all but the `keep` checkpoints up to step `newest` and the one of step `also`.

    Checkpoints after `newest`, which has just been written, are damaged or will be written again.
    They do not count, and are left alone.
    """
    if keep is None:
        return
    found = find_checkpoints(output_dir)
    if newest is not None:
        found = [path for path in found if _step_of(path) <= newest]
    for path in found[keep:]:
        if _step_of(path) != also:
            # Out of the way first, so that a kill in the middle leaves no half checkpoint.
            rubbish = path.rename(path.with_name(f".{path.name}.old"))
            shutil.rmtree(rubbish, ignore_errors=True)


def clear(output_dir: Path, *, checkpoints: bool) -> None:
    """Remove what a killed run left half done and, where asked, an earlier run's checkpoints."""
    for path in [*output_dir.glob(f".{_PREFIX}*.tmp"), *output_dir.glob(f".{_PREFIX}*.old")]:
        shutil.rmtree(path, ignore_errors=True)
    for path in find_checkpoints(output_dir) if checkpoints else []:
        if (path / _MANIFEST).exists():
            shutil.rmtree(path)


def split_state(state: Any) -> tuple[dict[str, torch.Tensor], Any]:
    """Take the tensors out of a nested state, for safetensors, and leave what JSON can hold.

    Keys keep their type: JSON alone makes strings of all, and an optimizer's are whole numbers.

    Examples:
        >>> split_state({"step": 3, "moments": {0: torch.zeros(2)}})
        ({'0': tensor([0., 0.])}, {'pairs': [['step', 3], ['moments', {'pairs': [[0, \
{'tensor': '0'}]]}]]})
    """
    tensors: dict[str, torch.Tensor] = {}

    def walk(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            name = str(len(tensors))
            tensors[name] = value.detach().cpu().contiguous()
            return {"tensor": name}
        if isinstance(value, Mapping):
            return {"pairs": [[key, walk(each)] for key, each in value.items()]}
        return [walk(each) for each in value] if isinstance(value, (list, tuple)) else value

    return tensors, walk(state)


def join_state(tensors: Mapping[str, torch.Tensor], rest: Any) -> Any:
    """Undo `split_state`, but for tuples, which are lists.

    Examples:
        >>> join_state(*split_state({"moments": {0: torch.zeros(2)}}))
        {'moments': {0: tensor([0., 0.])}}
    """
    if isinstance(rest, list):
        return [join_state(tensors, each) for each in rest]
    if not isinstance(rest, dict):
        return rest
    if "tensor" in rest:
        return tensors[rest["tensor"]]
    return {key: join_state(tensors, each) for key, each in rest["pairs"]}


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix(_PREFIX))


def _is_odd(path: Path) -> bool:
    """Tell whether there is something else than a file: a link, a folder, a pipe."""
    return path.is_symlink() or (path.exists() and not path.is_file())


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    """Wait until a file or folder is on the disk; a rename before that could outlive it."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# ---- was training/output_dir: The output directory: held by one run at a time, and with a whole model in it at the end.


@contextmanager
def own_output_dir(accelerator: Accelerator, config: TrainingConfig) -> Iterator[Path]:
    """Hold ``output_dir`` for one run; a second one is refused until the first has ended.

    Raises:
        BlockingIOError: If another run holds it.
        OSError: If it cannot be used.
    """
    folder = Path(config.output_dir)
    lock = FileLock(folder / ".lock")
    resumes = bool(config.resume_from_checkpoint)

    def take() -> None:
        check_output_dir(folder, overwrite=config.overwrite or resumes)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise BlockingIOError(
                f"output_dir is {str(folder)!r}, which another run is using; name another folder"
            ) from None
        clear(folder, checkpoints=config.overwrite and not resumes)

    on_main_process(accelerator, take)
    try:
        yield folder
    finally:
        lock.release()


def save_model(
    folder: Path,
    model: Model,
    tokenizer: Tokenizer,
    accelerator: Accelerator,
) -> list[str]:
    """Save model and tokenizer, whole or not at all; return their files' names.

    Raises:
        OSError: If the model could not be saved; `save_pretrained` alone does not always say so.
    """

    def write() -> list[str]:
        building = folder / ".model.tmp"
        shutil.rmtree(building, ignore_errors=True)
        try:
            model.save_pretrained(building)
            tokenizer.save_pretrained(building)
            if not any(building.rglob("*.safetensors")):
                raise OSError("no weights were written")  # noqa: TRY301  # told below
            names = [path.name for path in building.iterdir()]
            for name in names:
                shutil.rmtree(folder / name, ignore_errors=True)  # of an adapter that has a name
                (building / name).replace(folder / name)
            # from_pretrained would load the weights of an earlier model beside these.
            for pattern in ("adapter_*", "model*.safetensors*", "pytorch_model*"):
                for path in folder.glob(pattern):
                    if path.name not in names:
                        path.unlink()
        except (OSError, SafetensorError) as error:
            kept = [path.name for path in find_checkpoints(folder)] or ["no checkpoint"]
            raise OSError(
                f"the model could not be saved in {str(folder)!r} ({error}); {kept[0]} is intact"
            ) from error
        finally:
            shutil.rmtree(building, ignore_errors=True)
        return names

    return on_main_process(accelerator, write)


def check_output_dir(output_dir: str | Path, *, overwrite: bool) -> None:
    """Make the folder and check that files can be written and renamed in it.

    Raises:
        NotADirectoryError: If `output_dir` is a file.
        FileExistsError: If it holds files and `overwrite` is False.
        OSError: If it cannot be written: of the class that the system's error has.
    """
    folder = Path(output_dir)
    if folder.is_file():
        raise NotADirectoryError(
            f"output_dir is {str(output_dir)!r}, which is a file; name a folder"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".probe-") as probe:
            written = Path(probe, "written")
            written.write_text("probe", encoding="utf-8")
            written.rename(Path(probe, "renamed"))
    except OSError as error:
        raise type(error)(
            f"output_dir is {str(output_dir)!r}, which cannot be written ({error.strerror}); name "
            "a folder that can"
        ) from error
    # A run that failed before its first checkpoint leaves its lock, and nothing to lose.
    if not overwrite and any(path.name != ".lock" for path in folder.iterdir()):
        raise FileExistsError(
            f"output_dir is {str(output_dir)!r}, which holds files of another run; name an empty "
            "folder, or pass overwrite=True"
        )
