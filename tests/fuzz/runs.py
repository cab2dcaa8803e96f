"""Runs of random settings, interrupted at random: each ends, to the bit, as if left alone.

A case draws settings and lets a run end. Then it starts the same run anew, interrupts it (SIGKILL,
SIGTERM or Ctrl-C before a step, at a touch of a file, while it saves, or by the clock to the whole
process group), resumes it, and so on. The clock is another one at each try, so such a case may need
several.
"""

from __future__ import annotations

import signal
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.scripts.processes import Ended, last_step, outcome, start, torchrun_train

if TYPE_CHECKING:
    from random import Random

# How each signal may end a process: too early or too late, after its handler, or at once.
CODES = {"kill": {0, -9}, "term": {0, 143, -15}, "interrupt": {0, 130, -2}}
NUMBERS = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "interrupt": signal.SIGINT}


def check(draw: Random, data: Path | None) -> Counter[str]:
    """Compare a run that is interrupted with one that is not; count what was done to it.

    Args:
        draw: Decides everything but what the clock does.
        data: Not used here.

    Raises:
        AssertionError: If the two differ, or an interruption ended in another way than it should.
    """
    settings = draw_settings(draw)
    plan: list[str] = []
    try:
        with tempfile.TemporaryDirectory() as folder:
            return compare(draw, settings, Path(folder), plan)
    except Exception as error:
        raise AssertionError(f"{settings}, {plan}: {type(error).__name__}: {error}") from error


def compare(draw: Random, settings: dict[str, Any], folder: Path, plan: list[str]) -> Counter[str]:
    """Let a run end, interrupt the same run some times, and compare."""
    began = time.monotonic()
    whole = outcome(folder / "whole", count_events=True, **settings)
    events, seconds = whole.pop("events"), time.monotonic() - began
    counts: Counter[str] = Counter()
    by_torchrun = settings["world"] == 2 and draw.random() < 0.1
    cut = folder / "cut"
    for _ in range(draw.choice([1, 1, 2, 3])):
        how, name = draw_interruption(draw, whole["steps"], events, seconds)
        if settings["world"] == 2 and how.get("kill_by") == signal.SIGINT:
            # Torch does not hear Ctrl-C while processes look for each other; their launcher does.
            how, name = {**how, "kill_by": signal.SIGTERM}, "term"
        if settings["world"] == 2 and "at_event" in how:  # the first ones come before its handlers
            how, name = {"at_event": [how["at_event"][0], "kill", 0]}, "kill"
        plan.append(f"{how}{' under torchrun' if by_torchrun else ''}")
        before = last_step(cut)
        arguments = {**settings, "folder": str(cut), "resume_from_checkpoint": True}
        if by_torchrun:
            interrupt_torchrun(folder, arguments, how, name)
        else:
            ended = start("train", **arguments, **how)
            check_end(ended, name)
            counts["interruptions"] += any(process.code for process in ended)
            if name == "term" and "at_step" in how and len(ended) == 1 and ended[0].code:
                # The step at which it was told is the last that it takes.
                (step,) = map(int, how["at_step"])
                assert last_step(cut) == max(step + 1, before), f"left at {last_step(cut)}"
    plan.append("resumed")
    made = outcome(cut, **settings, resume_from_checkpoint=True, **PLANTED)
    assert made == whole, f"ended {made}, expected {whole}"
    return counts + Counter(steps=whole["steps"])


PLANTED: dict[str, Any] = {}  # a fault, by a test of this file


def check_end(ended: list[Ended], name: str) -> None:
    """A process ends by its signal, or because another one has gone without a word."""
    codes = {process.code for process in ended}
    gone = codes & {-9, -15, -2}
    fine = codes <= CODES[name] | ({1} if gone and len(ended) > 1 else set())
    assert fine, f"ended by {name} with {codes}:\n" + "\n".join(process.log for process in ended)


def interrupt_torchrun(
    folder: Path, arguments: dict[str, Any], how: dict[str, Any], name: str
) -> None:
    """Interrupt two processes, and by the clock their workers and what launched them, too."""
    del arguments["world"]
    moment = how.pop("kill_after", None)
    how.pop("kill_by", None)
    moment = None if moment is None else 6 + 4 * moment  # imports come first
    ended = torchrun_train(folder, {**arguments, **how}, signal_after=moment, number=NUMBERS[name])
    wrong = "RuntimeError: DataLoader worker" in ended.stdout
    assert not wrong, f"under torchrun by {name}: {ended.stdout}"


def draw_settings(draw: Random) -> dict[str, Any]:
    """Draw a short run."""
    settings: dict[str, Any] = {
        "rows": draw.randint(5, 30),
        "num_train_epochs": draw.choice([1, 1.5, 2]),
        "per_device_train_batch_size": draw.randint(1, 6),
        "gradient_accumulation_steps": draw.choice([1, 1, 2, 3]),
        "save_strategy": draw.choice(["no", "epoch", "steps", "steps"]),
        "save_steps": draw.randint(1, 4),
        "save_total_limit": draw.choice([None, 1, 2]),
        "eval_strategy": draw.choice(["no", "epoch", "steps"]),
        "eval_steps": draw.randint(1, 4),
        "logging_steps": draw.randint(1, 3),
        "max_grad_norm": draw.choice([0, 1.0]),
        "warmup_steps": draw.choice([0, 0.3, 2]),
        "mixed_precision": draw.choice(["no", "no", "bf16"]),
        "dataloader_num_workers": draw.choice([0, 0, 1, 2]),
        "architecture": draw.choice(["bert", "bert", "deberta-v2", "distilbert"]),
        "dropout": draw.random() < 0.8,
        "gradient_checkpointing": draw.random() < 0.1,
        "world": draw.choice([1, 1, 2]),
        "lr_scheduler_type": draw.choice(["linear", "cosine", "cosine_with_restarts"]),
        "collator": draw.choice(["ours", "ours, by schedule", "transformers", None, None]),
        "packed": draw.random() < 0.15,
    }
    if settings["collator"] is None:
        settings["collator"] = {
            "wwm_probability": draw.choice([0.15, 0.5, 1.0]),
            "mask_replace_prob": 0.8,
            "random_replace_prob": draw.choice([0.1, 0.2]),
            "budget": draw.choice(["bernoulli", "exact"]),
            "seed": draw.choice([None, 7]),
        }
    if settings["packed"]:  # DeBERTa cannot keep documents apart
        settings["architecture"] = draw.choice(["bert", "distilbert"])
    if draw.random() < 0.15:
        settings |= {"stream": draw.choice(["plain", "shuffled"]), "dataloader_num_workers": 0}
        settings["max_steps"] = draw.randint(1, 8)
    strategy = settings["eval_strategy"]
    if strategy != "no" and draw.random() < 0.4:
        settings |= {"save_strategy": strategy, "save_steps": settings["eval_steps"]}
        settings["load_best_model_at_end"] = True
        if draw.random() < 0.5:
            settings["learning_rate"] = 0.3  # so that the best is not the last
    if strategy != "no" and draw.random() < 0.2:
        settings |= {"lr_scheduler_type": "reduce_lr_on_plateau", "warmup_steps": 0}
    return settings


def draw_interruption(
    draw: Random, steps: int, events: int, seconds: float
) -> tuple[dict[str, Any], str]:
    """Draw what is done to a run, and by which signal."""
    name = draw.choice(["kill", "kill", "term", "interrupt"])
    kind = draw.choice(["step", "event", "saving", "clock", "clock"])
    if kind == "step":
        rank = draw.choice([-1, 0, 1])
        return {"at_step": {str(draw.randrange(steps)): [[name, rank]]}}, name
    if kind == "event":
        return {"at_event": [draw.randrange(events), name, 0]}, name
    if kind == "saving":
        return {"while_saving": {str(draw.randint(1, steps)): [name]}}, name
    return {"kill_after": seconds * draw.random(), "kill_by": NUMBERS[name]}, name
