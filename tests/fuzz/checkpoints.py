"""Damaged checkpoints: a run goes on from the newest that is whole, or says that there is none.

A case takes a finished run, damages files of its checkpoints as a bad copy or a full disk would,
and resumes in a process of its own, which has a hard limit of time.
"""

from __future__ import annotations

import atexit
import functools
import re
import shutil
import tempfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.scripts.processes import outcome, start

if TYPE_CHECKING:
    from random import Random

SECONDS = 120
RUNS: list[dict[str, Any]] = [
    {},
    {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2},
    {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "eval_steps": 1},
    {"mixed_precision": "bf16", "lr_scheduler_type": "cosine_with_restarts", "warmup_steps": 2},
]
PLANTED: dict[str, Any] = {}  # a fault, by a test of this file


@functools.cache
def finished(place: int) -> tuple[Path, dict[str, Any]]:
    """A run of 6 steps with its checkpoints of steps 2, 4 and 6, and what it made."""
    folder = tempfile.mkdtemp(prefix="fuzz-checkpoints-")
    atexit.register(shutil.rmtree, folder)
    path = Path(folder, "run")
    return path, outcome(path, **RUNS[place])


def check(draw: Random, data: Path | None) -> Counter[str]:
    """Damage some checkpoints and resume; count what came of it.

    Args:
        draw: Decides everything.
        data: Not used here.

    Raises:
        AssertionError: If the run ended elsewhere, went on for ever, or failed without a clear
            error.
    """
    place = draw.randrange(len(RUNS))
    original, whole = finished(place)
    with tempfile.TemporaryDirectory() as folder:
        run = Path(shutil.copytree(original, Path(folder, "run")))
        damaged = draw.sample([2, 4, 6], draw.choice([1, 2, 2, 3]))
        done = [damage(draw, run / f"checkpoint-{step}") for step in damaged]
        try:
            return Counter({resume(run, whole, RUNS[place], is_left=len(damaged) < 3): 1})
        except Exception as error:
            raise AssertionError(
                f"{RUNS[place]}, {done}: {type(error).__name__}: {error}"
            ) from error


def resume(run: Path, whole: dict[str, Any], settings: Any, *, is_left: bool) -> str:
    """Resume a run; return whether a checkpoint was taken, or all were refused."""
    arguments = {**settings, "resume_from_checkpoint": True, "folder": str(run)}
    (ended,) = start("train", seconds=SECONDS, **arguments, **PLANTED)
    if is_left:
        assert not ended.code, f"exit code {ended.code}: {ended.error}\n{ended.log}"
        assert ended.result == whole, f"another end: {ended.result}, expected {whole}"
        return "resumed"
    message = r"ValueError: checkpoint-6 is damaged: .*; checkpoint-2 is damaged: .*; resume with"
    assert re.match(message, ended.error, re.DOTALL), f"{ended.code}: {ended.error}\n{ended.log}"
    return "refused"


def damage(draw: Random, checkpoint: Path) -> str:
    """Damage a file of a checkpoint."""
    path = draw.choice(sorted(checkpoint.iterdir()))
    content = path.read_bytes()
    place = draw.randrange(len(content))
    makes: dict[str, bytes] = {
        "cut": content[:place],
        "empty": b"",
        "with a bit flipped": content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :],
        "with more at its end": content + b"\x00" * draw.randint(1, 9),
        "of zeros": b"\x00" * len(content),
    }
    kind = draw.choice([*makes, "gone"])
    if kind == "gone":
        path.unlink()
    else:
        path.write_bytes(makes[kind])
    return f"{checkpoint.name}/{path.name} {kind} at {place}"
