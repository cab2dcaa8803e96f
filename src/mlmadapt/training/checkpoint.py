"""Checkpoints that are whole or not there at all.

A checkpoint is written under another name, listed in a manifest with the size and hash of each
file, flushed to the disk and only then renamed; older ones are removed after that. A run killed at
any moment leaves the previous checkpoint as it was. Nothing is pickled: tensors are safetensors,
the rest is JSON, so that a checkpoint from elsewhere can at worst be refused.
"""

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from mlmadapt.model.evaluation import MaskedLMMetrics
from mlmadapt.training.fingerprint import check_same_run
from mlmadapt.training.run import Run, RunState

logger = logging.getLogger(__name__)

_PREFIX = "checkpoint-"
_MANIFEST = "manifest.json"


def write_run(run: Run, *, loss_sums: list[float]) -> None:
    """Write a checkpoint that `read_run` takes up again and ``from_pretrained`` loads."""
    moments, optimizer = split_state(run.optimizer.state_dict())
    scaler = run.accelerator.scaler
    write_checkpoint(
        run.folder,
        run.state.step,
        tensors={"model": distinct(run.model.state_dict()), "optimizer": moments},
        texts={
            "config": run.model.config.to_dict(),
            "state": {
                "fingerprint": run.fingerprint,
                "counts": asdict(replace(run.state, seconds=run.seconds)),
                "loss_sums": loss_sums,
                "optimizer": optimizer,
                "scheduler": run.scheduler.state_dict(),
                "scaler": None if scaler is None else scaler.state_dict(),
            },
        },
    )


def read_run(checkpoint: Path, run: Run) -> None:
    """Put a checkpoint's state into a run.

    Raises:
        ValueError: If it is of another run.
    """
    stored = read_text(checkpoint, "state")
    check_same_run(stored["fingerprint"], run.fingerprint, checkpoint=checkpoint.name)
    load_weights(checkpoint, run.model)
    moments = read_tensors(checkpoint, "optimizer")
    run.optimizer.load_state_dict(join_state(moments, stored["optimizer"]))
    run.scheduler.load_state_dict(stored["scheduler"])
    accelerator = run.accelerator
    if accelerator.scaler is not None and stored["scaler"] is not None:
        accelerator.scaler.load_state_dict(stored["scaler"])
    state = RunState(**stored["counts"])
    state.evaluations = [(step, MaskedLMMetrics(**each)) for step, each in state.evaluations]  # type: ignore[arg-type]
    # Each process goes on with its own sum; another number of them, with the whole in the first.
    sums = stored["loss_sums"]
    rank, same = accelerator.process_index, len(sums) == accelerator.num_processes
    state.loss_sum = sums[rank] if same else sum(sums) if rank == 0 else 0.0
    run.state = state


def load_weights(checkpoint: Path, model: nn.Module) -> None:
    """Load a checkpoint's weights into a model.

    Raises:
        ValueError: If they are another model's.
    """
    loaded = read_tensors(checkpoint, "model")
    # Tied weights are stored once and are loaded through any of their names.
    missing = sorted(set(distinct(model.state_dict())) - set(loaded))
    unknown = model.load_state_dict(loaded, strict=False).unexpected_keys
    if missing or unknown:
        raise ValueError(
            f"{checkpoint.name} lacks weights {missing[:3]} or has others {unknown[:3]}; it was "
            "made from another model"
        )


def distinct(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return each tensor once: tied weights have several names, and safetensors takes one.

    Examples:
        >>> weight = torch.zeros(2)
        >>> distinct({"embeddings": weight, "head": weight})
        {'embeddings': tensor([0., 0.])}
    """
    seen: dict[tuple[Any, ...], str] = {}
    for name, values in state.items():
        seen.setdefault((values.data_ptr(), values.shape, values.stride(), values.dtype), name)
    return {name: state[name].detach().cpu().contiguous() for name in seen.values()}


def write_checkpoint(
    output_dir: Path,
    step: int,
    *,
    tensors: Mapping[str, Mapping[str, torch.Tensor]],
    texts: Mapping[str, Any],
) -> Path:
    """Write ``checkpoint-<step>`` with a safetensors file and a JSON file for each entry.

    Raises:
        OSError: If it cannot be written; nothing of it is left then, and older ones are whole.
    """
    target = output_dir / f"{_PREFIX}{step}"
    building = output_dir / f".{target.name}.tmp"
    try:
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir()
        for name, entries in tensors.items():
            metadata = {"format": "pt"}  # what from_pretrained looks for
            save_file(dict(entries), building / f"{name}.safetensors", metadata=metadata)
        for name, text in texts.items():
            (building / f"{name}.json").write_text(json.dumps(text, indent=1))
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
    return target


def find_checkpoints(output_dir: Path) -> list[Path]:
    """Return the checkpoints in a folder, newest first, whole or not."""
    found = [
        path
        for path in output_dir.glob(f"{_PREFIX}*")
        if re.fullmatch(rf"{_PREFIX}[0-9]+", path.name)
    ]
    return sorted(found, key=_step_of, reverse=True)


def choose(output_dir: Path, wanted: str | Literal[True]) -> Path | None:
    """Return the checkpoint that ``resume_from_checkpoint`` asks for; None if there is none yet."""
    if wanted is True or wanted.lower() == "true":  # as a command line says it
        return newest_whole(output_dir)
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
    if manifest.is_symlink():
        yield f"{_MANIFEST} is not a plain file of the checkpoint"
        return
    try:
        files = json.loads(manifest.read_text())["files"]
        expected = {name: (entry["size"], entry["sha256"]) for name, entry in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        yield f"{_MANIFEST} cannot be read ({error or type(error).__name__})"
        return
    for name in sorted({path.name for path in checkpoint.iterdir()} - {_MANIFEST, *expected}):
        yield f"{name} is not in the manifest"
    for name, (size, digest) in expected.items():
        path = checkpoint / name
        # A manifest from elsewhere must not lead out of the folder.
        if Path(name).name != name or path.is_symlink():
            yield f"{name!r} is not a plain file of the checkpoint"
        elif not path.is_file():
            yield f"{name} is missing"
        elif path.stat().st_size != size:
            yield f"{name} has {path.stat().st_size} bytes, {size} were written"
        elif _hash(path) != digest:
            yield f"{name} is not what was written (its hash differs)"


def read_tensors(checkpoint: Path, name: str) -> dict[str, torch.Tensor]:
    """Read the tensors of an entry."""
    return load_file(checkpoint / f"{name}.safetensors")


def read_text(checkpoint: Path, name: str) -> Any:
    """Read the JSON of an entry."""
    return json.loads((checkpoint / f"{name}.json").read_text())


def prune(
    output_dir: Path, *, keep: int | None, also: int | None = None, newest: int | None = None
) -> None:
    """Remove all but the `keep` checkpoints up to step `newest` and the one of step `also`.

    Later ones than `newest`, which has just been written, are damaged or of a time that is trained
    again. They neither count nor are removed: their steps will be written anew.
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

    Examples:
        >>> split_state({"step": 3, "moments": {0: torch.zeros(2)}})
        ({'moments.0': tensor([0., 0.])}, {'step': 3, 'moments': {'0': None}})
    """
    tensors: dict[str, torch.Tensor] = {}

    def walk(value: Any, path: tuple[str, ...]) -> Any:
        if isinstance(value, torch.Tensor):
            tensors[".".join(path)] = value.detach().cpu().contiguous()
            return None
        if isinstance(value, Mapping):
            return {str(key): walk(each, (*path, str(key))) for key, each in value.items()}
        if isinstance(value, (list, tuple)):
            return [walk(each, (*path, str(place))) for place, each in enumerate(value)]
        return value

    return tensors, walk(state, ())


def join_state(tensors: Mapping[str, torch.Tensor], rest: Any) -> Any:
    """Undo `split_state`, but for tuples, which are lists, and keys, which are whole numbers again.

    Examples:
        >>> join_state(*split_state({"moments": {0: torch.zeros(2)}}))
        {'moments': {0: tensor([0., 0.])}}
    """

    def walk(value: Any, path: tuple[str, ...]) -> Any:
        if (name := ".".join(path)) in tensors:
            return tensors[name]
        if isinstance(value, dict):
            return {
                int(key) if key.isdigit() else key: walk(each, (*path, key))
                for key, each in value.items()
            }
        if isinstance(value, list):
            return [walk(each, (*path, str(place))) for place, each in enumerate(value)]
        return value

    return walk(rest, ())


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
