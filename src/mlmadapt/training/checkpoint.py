"""What a run leaves on disk: checkpoints that are whole or not there, and the final model.

A folder is filled under another name, flushed to the disk and only then renamed; older checkpoints
are removed after that. A run that is killed at any moment leaves the previous checkpoint as it was.
A checkpoint lists its files with their hashes, so that one that was damaged later is found, named
and passed over. It holds weights, the state of optimizer and schedule, and the counts of
`TrainState`; random state is not part of it, since nothing random is remembered. Safetensors and
``torch.load(weights_only=True)`` execute no code.
"""

import hashlib
import json
import logging
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_model
from safetensors.torch import save_model as save_weights

from mlmadapt.model.checks import find_not_finite
from mlmadapt.model.evaluation import MaskedLMMetrics
from mlmadapt.training.config import TrainingConfig
from mlmadapt.training.distributed import on_main_process
from mlmadapt.training.fingerprint import OTHER_STREAM, list_differences
from mlmadapt.training.state import TrainingRun, TrainState

logger = logging.getLogger(__name__)

_FORMAT = 2  # of `state.json`; a new count or metric needs no new number
_PREFIX = "checkpoint-"
_MANIFEST = "manifest.json"
_WEIGHTS = "model.safetensors"
_OPTIMIZER = "optimizer.pt"
_STATE = "state.json"


def write_run(run: TrainingRun, *, loss_sums: list[float]) -> None:
    """Write a checkpoint that `read_run` takes up again and ``from_pretrained`` loads.

    Those that are not to be kept are removed then.

    Args:
        run: The run, between two steps.
        loss_sums: The `loss_sum` of each process.

    Raises:
        OSError: As `whole_folder`.
        FloatingPointError: If a weight is not finite; older checkpoints are left alone.
    """
    if name := find_not_finite(run.model):
        raise FloatingPointError(
            f"after step {run.state.step}, {name} is not finite, though loss and gradient were: "
            "the update was too large. Resume from an earlier checkpoint with a lower "
            f"learning_rate than {run.config.learning_rate}"
        )
    state = {
        "format": _FORMAT,
        "fingerprint": run.fingerprint,
        "counts": asdict(replace(run.state, seconds=run.seconds)),
        "loss_sums": loss_sums,
    }
    with whole_folder(run.folder, f"{_PREFIX}{run.state.step}") as folder:
        # The format is what from_pretrained looks for. Tied weights are stored once.
        save_weights(run.model, str(folder / _WEIGHTS), metadata={"format": "pt"})
        states = {name: holder.state_dict() for name, holder in _holders(run).items()}
        torch.save(states, folder / _OPTIMIZER)
        (folder / "config.json").write_text(json.dumps(run.model.config.to_dict(), indent=1))
        (folder / _STATE).write_text(json.dumps(state, indent=1))
        _write_manifest(folder)
    keep = run.config.save_total_limit
    prune(run.folder, keep=keep, best=run.saved_step, newest=run.state.step)


def read_run(checkpoint: Path, run: TrainingRun) -> None:
    """Put the state of a whole checkpoint of this run into it."""
    stored = json.loads((checkpoint / _STATE).read_text())
    load_model(run.model, checkpoint / _WEIGHTS)
    states = torch.load(checkpoint / _OPTIMIZER, map_location="cpu", weights_only=True)
    for name, holder in _holders(run).items():
        holder.load_state_dict(states[name])
    run.state = _read_counts(stored["counts"])
    # Each process goes on with its own sum; if their number differs, the first takes the whole.
    sums, rank = stored["loss_sums"], run.accelerator.process_index
    is_same = len(sums) == run.accelerator.num_processes
    run.state.loss_sum = sums[rank] if is_same else sum(sums) if rank == 0 else 0.0


def _read_counts(counts: Mapping[str, Any]) -> TrainState:
    """Return counts, where those that an older version did not know have their defaults."""
    names = {field.name for field in fields(TrainState)}
    state = TrainState(**{name: value for name, value in counts.items() if name in names})
    known = [field.name for field in fields(MaskedLMMetrics)]
    state.evaluations = [
        (step, MaskedLMMetrics(**{name: metrics.get(name, math.nan) for name in known}))
        for step, metrics in counts["evaluations"]
    ]
    return state


def _holders(run: TrainingRun) -> dict[str, Any]:
    """Return what has a state that is stored, by name; there is no scaler but for fp16."""
    holders: dict[str, Any] = {"optimizer": run.optimizer, "scheduler": run.scheduler}
    scaler = run.accelerator.scaler
    return holders if scaler is None else {**holders, "scaler": scaler}


def load_best(run: TrainingRun) -> None:
    """Give the model the weights of its best checkpoint.

    Raises:
        ValueError: If that is damaged, or not all processes see it; on all of them.
    """
    (best,) = find_wanted(run.folder, str(run.folder / f"{_PREFIX}{run.saved_step}"))
    if damage := on_main_process(run.accelerator, partial(find_damage, best)):
        raise ValueError(f"{best.name}, the best one, is damaged: {damage}; train again")
    load_model(run.model, best / _WEIGHTS)


def bring_best(checkpoint: Path, run: TrainingRun) -> None:
    """Copy the best checkpoint from beside a resumed one into the run's own folder."""
    best = f"{_PREFIX}{run.saved_step}"
    if not (run.folder / best).exists():
        with whole_folder(run.folder, best) as folder:
            shutil.copytree(checkpoint.parent / best, folder, dirs_exist_ok=True)


@contextmanager
def whole_folder(output_dir: Path, name: str, *, unpack: bool = False) -> Iterator[Path]:
    """Hand out a folder to fill, and give it its name when that went well.

    Args:
        output_dir: The folder that it is in.
        name: The name that it gets.
        unpack: Move what is in it into `output_dir` instead.

    Raises:
        OSError: If it cannot be written; nothing of it is left then, and checkpoints are whole.
    """
    building = output_dir / f".{name}.tmp"
    try:
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir()
        yield building
        for path in [*building.rglob("*"), building]:
            _flush(path)
        for source in building.iterdir() if unpack else [building]:
            target = output_dir / (source.name if unpack else name)
            if target.is_dir():  # this step's, which is trained again, or an adapter's
                shutil.rmtree(target)
            source.replace(target)
        _flush(output_dir)
    # Of a full disk, torch makes a RuntimeError.
    except (OSError, RuntimeError, SafetensorError) as error:
        kept = [path.name for path in find_checkpoints(output_dir)]
        rest = f"{kept[0]} is intact" if kept else "there is no earlier checkpoint"
        message = f"{name} could not be written to {str(output_dir)!r} ({error}); {rest}"
        number = getattr(error, "errno", None)
        raise (OSError(message) if number is None else OSError(number, message)) from error
    finally:
        # Gone already when all went well: whatever went wrong, nothing half done is left.
        shutil.rmtree(building, ignore_errors=True)


def _write_manifest(folder: Path) -> None:
    files = {
        path.name: {"size": path.stat().st_size, "sha256": _hash(path)}
        for path in sorted(folder.iterdir())
    }
    (folder / _MANIFEST).write_text(json.dumps({"files": files}, indent=1))


def find_checkpoints(output_dir: Path) -> list[Path]:
    """Return the checkpoints in a folder, newest first, whole or not."""
    is_checkpoint = re.compile(rf"{_PREFIX}[0-9]+").fullmatch
    paths = [path for path in output_dir.glob(f"{_PREFIX}*") if is_checkpoint(path.name)]
    return sorted(paths, key=_step_of, reverse=True)


def find_wanted(output_dir: Path, wanted: str | Literal[True]) -> list[Path]:
    """Return the checkpoints that ``resume_from_checkpoint`` may mean, the best one first.

    Raises:
        ValueError: If processes see others, on all of them: machines may have disks of their own.
    """
    is_named = wanted is not True and wanted.lower() != "true"  # as a command line says it
    paths = [Path(str(wanted))] if is_named else find_checkpoints(output_dir)
    manifests = [path / _MANIFEST for path in paths]
    seen = [f"{path.parent.name} {_hash(path)[:8]}" for path in manifests if path.exists()]
    for rank, others in enumerate(gather_object([seen])):
        if others != seen:
            raise ValueError(
                f"process {rank} sees other checkpoints ({', '.join(others[:2]) or 'none'}) than "
                f"another ({', '.join(seen[:2]) or 'none'}): several machines need an output_dir "
                "that they share; name one, or copy what one machine has to the others"
            )
    return paths


def choose(paths: list[Path], fingerprint: Mapping[str, Any]) -> Path | None:
    """Return the first checkpoint that can be resumed; None if there is none yet.

    That is one which is whole and of this run; a warning names each that is passed over.

    Raises:
        FileNotFoundError: If one is not there.
        ValueError: If there are checkpoints, and none can be resumed.
    """
    newest: dict[str, str] = {}  # by what is wrong with it
    for path in paths:
        if not path.is_dir():
            beside = [other.name for other in find_checkpoints(path.parent)[:3]] or ["nothing"]
            raise FileNotFoundError(
                f"resume_from_checkpoint is {str(path)!r}, which is not there ({', '.join(beside)} "
                "is); name a checkpoint's directory, or pass True for the newest in output_dir"
            )
        problem = _find_problem(path, fingerprint)
        if problem is None:
            return path
        logger.warning("%s %s; it is passed over", path.name, problem)
        newest.setdefault(problem, path.name)
    if newest:
        problems = "; ".join(f"{name} {problem}" for problem, name in newest.items())
        longer = ", or train on from its model in another output_dir" * ("_epochs was" in problems)
        raise ValueError(
            f"{problems}; resume with the same settings, or start anew with overwrite=True{longer}"
        )
    return None


def _find_problem(checkpoint: Path, fingerprint: Mapping[str, Any]) -> str | None:
    """Return why a checkpoint cannot be resumed, or None."""
    if damage := find_damage(checkpoint):
        return f"is damaged: {damage}"
    stored = json.loads((checkpoint / _STATE).read_text())
    if stored.get("format") != _FORMAT:
        return f"has format {stored.get('format')}, and this version of mlmadapt reads {_FORMAT}"
    differences = list_differences(stored["fingerprint"], fingerprint)
    differences.sort(key=lambda difference: difference.endswith(" changed"))  # tells least
    if differences == [OTHER_STREAM]:
        logger.warning("%s is resumed, but %s: is it this stream?", checkpoint.name, OTHER_STREAM)
        return None
    more = f"; {len(differences) - 3} more" if len(differences) > 3 else ""
    return f"is of another run: {'; '.join(differences[:3])}{more}" if differences else None


def find_damage(checkpoint: Path) -> str | None:
    """Return the first file of a checkpoint that is not as it was written, or None."""
    try:
        files = json.loads((checkpoint / _MANIFEST).read_text())["files"]
        expected = {name: (entry["size"], entry["sha256"]) for name, entry in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{_MANIFEST} cannot be read ({type(error).__name__})"
    for name, (size, digest) in expected.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, {size} were written"
        if _hash(path) != digest:
            return f"{name} is not what was written (its hash differs)"
    return None


def prune(output_dir: Path, *, keep: int | None, best: int, newest: int) -> None:
    """Remove all but the `keep` checkpoints up to step `newest`, and the one of step `best`.

    Checkpoints after `newest`, which has just been written, are damaged or will be written again.
    They do not count, and are left alone.
    """
    paths = [path for path in find_checkpoints(output_dir) if _step_of(path) <= newest]
    for path in paths[keep:] if keep is not None else []:
        if _step_of(path) != best:
            # Out of the way first, so that a kill in the middle leaves no half checkpoint.
            rubbish = path.rename(path.with_name(f".{path.name}.old"))
            shutil.rmtree(rubbish, ignore_errors=True)


def save_model(run: TrainingRun) -> list[str]:
    """Save model and tokenizer in the output directory, whole; return their files' names.

    Raises:
        OSError: If they could not be saved; `save_pretrained` alone does not always say so.
    """

    def write() -> list[str]:
        with whole_folder(run.folder, "model", unpack=True) as building:
            run.model.save_pretrained(building)
            run.tokenizer.save_pretrained(building)
            if not any(building.rglob("*.safetensors")):
                raise OSError("no weights were written")
            names = [path.name for path in building.iterdir()]
        # from_pretrained would load the weights of an earlier model beside these.
        for pattern in ("adapter_*", "model*.safetensors*", "pytorch_model*"):
            for path in run.folder.glob(pattern):
                if path.name not in names:
                    path.unlink()
        return names

    return on_main_process(run.accelerator, write)


@contextmanager
def hold_output_dir(accelerator: Accelerator, config: TrainingConfig) -> Iterator[None]:
    """Hold ``output_dir`` for one run; a second one is refused until the first has ended.

    Raises:
        BlockingIOError: If another run holds it.
        NotADirectoryError: If it is a file.
        FileExistsError: If it holds files, and the run neither resumes nor overwrites them.
        OSError: If it cannot be written: of the class that the system's error has.
    """
    folder = Path(config.output_dir)
    lock = FileLock(folder / ".lock")
    resumes, text = bool(config.resume_from_checkpoint), f"output_dir is {str(folder)!r}"

    def take() -> None:
        if folder.is_file():
            raise NotADirectoryError(f"{text}, which is a file; name a folder")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
        except Timeout:
            raise BlockingIOError(f"{text}, which another run is using; name another") from None
        except OSError as error:
            raise type(error)(
                f"{text}, which cannot be written ({error.strerror}); name a folder that can"
            ) from error
        # A run that failed before its first checkpoint leaves its lock, and nothing to lose.
        is_new = all(path.name == ".lock" for path in folder.iterdir())
        if not (is_new or resumes or config.overwrite):
            lock.release()
            raise FileExistsError(
                f"{text}, which holds files of another run; name an empty folder, or pass "
                "overwrite=True"
            )
        for path in folder.glob(f".{_PREFIX}*"):  # what a killed run left half done
            shutil.rmtree(path, ignore_errors=True)
        for path in find_checkpoints(folder) if config.overwrite and not resumes else []:
            if (path / _MANIFEST).exists():
                shutil.rmtree(path)

    on_main_process(accelerator, take)
    try:
        if not all(gather_object([Path(lock.lock_file).exists()])):
            more = "which not all machines share; name one that they do, to resume or load the best"
            logger.warning("%s, %s", text, more)
        yield
    finally:
        lock.release()


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix(_PREFIX))


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
