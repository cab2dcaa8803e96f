"""Forged checkpoints: each ends in one clear error, or in the checkpoint before it.

A case takes a finished run, forges the checkpoint that a resumed run would take, signs what came of
it, and resumes in a process of its own, which has a hard limit of time.
"""

from __future__ import annotations

import atexit
import functools
import json
import math
import os
import pickle
import re
import shutil
import struct
import tempfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

from tests.scripts.processes import outcome, start
from tests.training.test_checkpoint import Bomb, describe

if TYPE_CHECKING:
    from collections.abc import Callable
    from random import Random

SECONDS = 120
SIGNED = 0.9  # the share of forged checkpoints with a manifest that fits them
ERRORS = [
    r"ValueError: checkpoint-\d+ does not fit this run \(.*\); delete it to resume from an earlier",
    r"ValueError: checkpoint-\d+ is of another run: .*; resume with the same settings",
    r"ValueError: all checkpoints in '.*' are damaged \(.*\); delete them to start again",
    r"FloatingPointError: the gradient of step \d+ \(epoch \d+\) is not finite",
    r"FloatingPointError: after step \d+, .* is not finite",
]
RUNS: list[dict[str, Any]] = [
    {},
    {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2},
    {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "eval_steps": 1},
    {"mixed_precision": "bf16", "lr_scheduler_type": "cosine_with_restarts", "warmup_steps": 2},
]


@functools.cache
def finished(place: int) -> tuple[Path, dict[str, Any]]:
    """A run of 6 steps with its checkpoints of steps 2, 4 and 6, and what it made."""
    folder = tempfile.mkdtemp(prefix="fuzz-checkpoints-")
    atexit.register(shutil.rmtree, folder)
    path = Path(folder, "run")
    return path, outcome(path, **RUNS[place])


def check(draw: Random, data: Path | None) -> Counter[str]:
    """Forge a checkpoint and resume; count what came of it.

    Args:
        draw: Decides everything.
        data: Not used here.

    Raises:
        AssertionError: If something was run, went on for ever, or failed without a clear error.
    """
    place = draw.randrange(len(RUNS))
    original, whole = finished(place)
    with tempfile.TemporaryDirectory() as folder:
        run, sentinel = Path(folder, "run"), Path(folder, "exploded")
        shutil.copytree(original, run)
        if draw.random() < 0.7:  # so that there are steps left to take
            shutil.rmtree(run / "checkpoint-6")
            shutil.rmtree(run / "checkpoint-2")
        checkpoint = max(run.glob("checkpoint-*"))
        forgeries = [draw.choice(FORGERIES) for _ in range(draw.choice([1, 1, 1, 2, 3]))]
        done = [forge(draw, checkpoint, sentinel) for forge in forgeries]
        is_signed = draw.random() < SIGNED
        if is_signed and not any(each.startswith("manifest.json") for each in done):
            sign(checkpoint)
        try:
            found = resume(run, sentinel, whole, RUNS[place], is_signed=is_signed)
            if found == "refused" and draw.random() < 0.2:
                shutil.rmtree(checkpoint)
                resume(run, sentinel, whole, RUNS[place], is_signed=False)
        except Exception as error:
            told = f"{RUNS[place]}, {checkpoint.name}, {'signed' if is_signed else 'not signed'}"
            raise AssertionError(f"{told}, {done}: {type(error).__name__}: {error}") from error
        return Counter({found: 1})


def sign(checkpoint: Path) -> None:
    """Write the manifest that fits the files that are there, as anybody can."""
    files = {path.name: describe(path) for path in checkpoint.iterdir() if path.is_file()}
    files.pop("manifest.json", None)
    (checkpoint / "manifest.json").write_text(json.dumps({"step": 6, "files": files}))


def resume(
    run: Path, sentinel: Path, whole: dict[str, Any], settings: Any, *, is_signed: bool
) -> str:
    """Resume a run; return whether its checkpoint was refused, taken or passed over."""
    arguments = {**settings, "resume_from_checkpoint": True, "folder": str(run)}
    (ended,) = start("train", seconds=SECONDS, **arguments, **PLANTED)
    assert not sentinel.exists(), "what was planted was run"
    if ended.code:
        documented = any(re.match(each, ended.error, re.DOTALL) for each in ERRORS)
        assert documented, f"exit code {ended.code}: {ended.error}\n{ended.log}"
        return "refused"
    if ended.result == whole:
        return "without harm"
    # With its hash it can be anything that makes sense, another loss or learning rate for one.
    assert is_signed, f"another end: {ended.result}, expected {whole}"
    assert ended.result["steps"] == whole["steps"], f"{ended.result['steps']} steps"
    assert math.isfinite(ended.result["final"]), "the final loss is not finite"
    return "taken for another"


PLANTED: dict[str, Any] = {}  # a fault, by a test of this file


# What may stand in a JSON file in place of something else.
JUNK: list[Callable[[Random], Any]] = [
    lambda draw: draw.choice([None, True, False, 0, 1, -1, 2, 0.5, -0.0, 10**30, -(2**63), 1e308]),
    lambda draw: draw.choice([math.nan, math.inf, -math.inf]),
    lambda draw: draw.choice(
        ["", "2", "checkpoint-2", "\x00", "../../etc/passwd", "nan", "é" * 99]
    ),
    lambda draw: draw.choice([[], {}, [[]], [0], {"": 0}, {"tensor": "0"}, {"pairs": []}]),
    lambda draw: draw.choice([{"tensor": 7}, {"pairs": [[1]]}, {"pairs": [[[], 1]]}]),
    lambda draw: functools.reduce(lambda inner, _: [inner], range(draw.choice([90, 900])), 0),
]


def forge_json(draw: Random, checkpoint: Path, sentinel: Path) -> str:
    """Change, remove or add something somewhere in a JSON file."""
    name = draw.choice(["state.json"] * 6 + ["manifest.json", "config.json"])
    try:
        content = json.loads((checkpoint / name).read_text())
    except (OSError, RecursionError, ValueError):  # of a forgery before this one
        return f"{name}, which is none"
    path, holder = [], content
    while isinstance(holder, dict | list) and holder:
        keys = [*holder] if isinstance(holder, dict) else [*range(len(holder))]
        key = draw.choice(keys)
        path.append(key)
        if not isinstance(holder[key], dict | list) or not holder[key] or draw.random() < 0.2:
            break
        holder = holder[key]
    if not path:
        return f"{name}, which is empty"
    kind = draw.choice(["another", "another", "another", "removed", "added", "of a neighbour"])
    made: Any = draw.choice(JUNK)(draw)
    if kind == "removed":
        del holder[key]
    elif kind == "added" and isinstance(holder, list):
        holder.insert(draw.randint(0, len(holder)), made)
    elif kind == "of a neighbour":
        made = holder[key] = holder[draw.choice(keys)]
    else:
        holder["more" if kind == "added" else key] = made
    try:
        (checkpoint / name).write_text(json.dumps(content))
    except RecursionError:
        return f"{name}, not changed"
    return f"{name} {path} {kind} {made!r:.60}"


def forge_tensors(draw: Random, checkpoint: Path, sentinel: Path) -> str:
    """Change, remove or add a tensor."""
    path = checkpoint / draw.choice(["model.safetensors", "optimizer.safetensors"])
    try:
        tensors = load_file(path)
    except Exception:  # noqa: BLE001  # it was forged already
        return f"{path.name}, which is none"
    if not tensors:
        return f"{path.name}, which is empty"
    name = draw.choice(sorted(tensors))
    values = tensors[name]
    floats = values.double().flatten()
    makes: dict[str, Callable[[], torch.Tensor]] = {
        "of another shape": lambda: torch.zeros(draw.choice([(0,), (1,), (2, 3), ()])),
        "of another order": lambda: values.T.contiguous() if values.ndim > 1 else values[None],
        "flat": values.flatten,
        "of another type": lambda: values.to(
            draw.choice([torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool])
        ),
        "with a number that is none": lambda: (
            floats.index_fill(0, torch.tensor(draw.randrange(len(floats))), each)
            .reshape(values.shape)
            .to(values.dtype)
        ),
        "negative": lambda: -values,
        "enormous": lambda: torch.full_like(values, 3e38),
        "of a neighbour": tensors[draw.choice(sorted(tensors))].clone,
    }
    each = draw.choice([math.nan, math.inf, -math.inf])
    kind = draw.choice([*makes, "removed", "added"])
    if kind == "removed":
        del tensors[name]
    elif kind == "added":
        tensors[draw.choice(["more", "0", name + ".more"])] = torch.ones(2)
    else:
        tensors[name] = makes[kind]()
    save_file(tensors, path, metadata={"format": "pt"})
    return f"{path.name} {name} {kind}"


def forge_bytes(draw: Random, checkpoint: Path, sentinel: Path) -> str:
    """Damage a file, or make something else of it."""
    names = sorted(each.name for each in checkpoint.iterdir())
    path = checkpoint / draw.choice(names)
    content = path.read_bytes() if path.is_file() else b"{}"
    place = draw.randint(0, len(content))
    header = b'{"0":' + draw.choice([b"[" * 100_000, b'{"dtype":"F32","shape":[9],"data_offs'])
    makes: dict[str, bytes] = {
        "cut": content[:place],
        "empty": b"",
        "with bytes of chance": content[:place] + draw.randbytes(8) + content[place + 8 :],
        "with more at its end": content + draw.randbytes(9),
        "with a bit flipped": content[:place]
        + bytes(b ^ 1 for b in content[place : place + 1])
        + content[place + 1 :],
        "a pickle": pickle.dumps(Bomb(sentinel)),
        "deep nesting": draw.choice([b"[", b'{"a":']) * 100_000,
        "a header that is too long": struct.pack("<Q", 2 ** draw.choice([20, 40, 63])) + content,
        "a header of another kind": struct.pack("<Q", len(header)) + header + content[8:],
        "a header of two": content[:8] + content[8:].replace(b'"shape":[', b'"shape":[0,', 1),
    }
    kind = draw.choice([*makes, "gone", "a folder", "a link", "a pipe", "a pickle beside it"])
    if kind == "a pickle beside it":
        path = checkpoint / draw.choice(["optimizer.bin", "scheduler.pt", "pytorch_model.bin"])
        path.write_bytes(makes["a pickle"])
        return f"{path.name} added"
    if path.is_dir():
        return f"{path.name}, which is a folder"
    path.unlink()
    if kind in makes:
        path.write_bytes(makes[kind])
    elif kind == "a folder":
        path.mkdir()
    elif kind == "a link":
        path.symlink_to(draw.choice([path.name, "/dev/zero", "/etc/passwd", *names]))
    elif kind == "a pipe":
        os.mkfifo(path)
    return f"{path.name} {kind}"


FORGERIES = [forge_json, forge_json, forge_json, forge_tensors, forge_tensors, forge_bytes]
