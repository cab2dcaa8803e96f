"""A training step of this library beside the recipe's own loop and `Trainer`.

Same weights, rows, batch, precision, optimizer and masks (transformers' collator, 15 % of tokens)
for all. Each contender runs in a process of its own, in turns, so that peak memory is its own; a
step is timed from the end of one optimizer step to the end of the next, data loading included, and
the first two are left out. Models have random weights: time does not depend on them.

The recipe and ours take smaller batches, too, in the same rounds, which tells how cost grows. Peak
memory is the most that was taken up to the end of the last step, beyond what was before training: a
model is saved by one of the three only. What the loop itself costs is what is left of a step of
ours without forward pass (the loss included), backward pass, clipping and optimizer: loading,
collating, counting, logging. That is told with our own collator, and beside it with transformers',
which takes most of it. Clipping, which the recipe does not do, is told apart.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from _measure import Claim, Growth, Report, Times, add_outputs, milliseconds

SIZES: dict[str, dict[str, Any]] = {
    "4.4 M-parameter BERT, 64 x 128": {
        "architecture": "bert",
        "batch": 64,
        "settings": {
            "hidden_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 512,
        },
        "smaller": (1, 4, 16),  # in fp32, to see cost grow
        "at_least": 4.0,
    },
    "DistilBERT size, 16 x 128": {
        "architecture": "distilbert",
        "batch": 16,
        "settings": {},
        "at_least": 1.35,
    },
}
CONTENDERS = ("recipe", "Trainer", "mlmadapt")
WHOLE_WORDS = "mlmadapt, whole words"  # with our own collator, to see what the loop itself costs
SKIPPED = 2  # first steps, in which memory is taken


def main() -> None:
    """Run every contender of every size in turns and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", help="not used: rows are random tokens, whose text costs nothing")
    parser.add_argument("--tokenizer", help="not used")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each contender")
    parser.add_argument("--steps", type=int, default=5, help="timed steps a turn")
    parser.add_argument("--precision", nargs="+", default=["no", "bf16"], choices=["no", "bf16"])
    add_outputs(parser)
    parser.add_argument("--turn", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.turn:
        print(json.dumps(take_turn(**arguments.turn)))
        return
    report = Report("Training", "random tokens, 15 % masked, 30,522 in the vocabulary", arguments)
    claims = []
    for size, chosen in SIZES.items():
        for precision in arguments.precision:
            title = f"{size}, {'fp32' if precision == 'no' else precision}"
            smaller = chosen.get("smaller", ()) if precision == "no" else ()
            takes = [(name, chosen["batch"]) for name in (*CONTENDERS, WHOLE_WORDS)]
            takes += [(name, batch) for batch in smaller for name in ("recipe", "mlmadapt")]
            turns = {take: [] for take in takes}
            for _ in range(arguments.rounds):
                for name, batch in takes:
                    turn = {"name": name, "size": size, "batch": batch, "precision": precision}
                    turns[name, batch].append(start_turn({**turn, "steps": arguments.steps}))
            whole = {name: turns[name, chosen["batch"]] for name in CONTENDERS}
            claims += compare(report, title, whole, chosen)
            claims += costs_of_the_loop(
                title, whole["mlmadapt"], turns[WHOLE_WORDS, chosen["batch"]]
            )
            if smaller:
                report_growth(report, size, turns, [*smaller, chosen["batch"]])
    report.claims("training step", claims)
    report.save()


def compare(
    report: Report, title: str, turns: dict[str, list[dict[str, Any]]], size: dict[str, Any]
) -> list[Claim]:
    """Print a row a contender and return what the library claims of this size."""
    times = {name: times_of(each) for name, each in turns.items()}
    report.times(title, times, count=size["batch"] * 128, unit="tokens")
    memory = {name: np.array([turn["memory"] for turn in each]) for name, each in turns.items()}
    ours = times["mlmadapt"]
    claims = []
    for name in ("recipe", "Trainer"):
        claims.append(
            Claim.ratio(f"{title}: {name} / mlmadapt", times[name], ours, at_least=size["at_least"])
        )
        share = memory["mlmadapt"] / memory[name]
        claims.append(Claim(f"{title}: peak memory, mlmadapt / {name}", share, at_most=0.6))
    return claims


def costs_of_the_loop(
    title: str, turns: list[dict[str, Any]], whole_words: list[dict[str, Any]]
) -> list[Claim]:
    """Return what is left of a step beside the model, with transformers' collator and with ours."""
    loop, clipping, own = (
        np.array([np.median(turn[name]) for turn in taken])
        for name, taken in (("loop", turns), ("clipping", turns), ("loop", whole_words))
    )
    return [
        Claim(f"{title}: share of the loop in a step", own, at_most=0.03),
        Claim(f"{title}: share of the loop, transformers' collator", loop),
        Claim(f"{title}: share of clipping in a step", clipping),
    ]


def report_growth(
    report: Report,
    size: str,
    turns: dict[tuple[str, int], list[dict[str, Any]]],
    batches: list[int],
) -> None:
    """Print and draw time and memory of a step over batches of four sizes."""
    times: dict[str, dict[int, Times]] = {}
    memory: Growth = {}
    for name in ("recipe", "mlmadapt"):
        times[name] = {batch: times_of(turns[name, batch]) for batch in batches}
        memory[name] = {
            batch: np.array([1024 * turn["memory"] / 1e6 for turn in turns[name, batch]])
            for batch in batches
        }
    over = f"rows of 128 per batch, {size.partition(',')[0]}, fp32"
    report.growth(over, {"ms": milliseconds(times), "peak MB": memory})


def times_of(turns: list[dict[str, Any]]) -> Times:
    """Return the median step of each turn."""
    wall, cpu = (np.array([np.median(turn[n]) for turn in turns]) for n in ("seconds", "cpu"))
    return Times(wall, cpu)


def start_turn(turn: dict[str, Any]) -> dict[str, Any]:
    """Run a turn in a process of its own."""
    command = [sys.executable, __file__, "--turn", json.dumps(turn)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def take_turn(name: str, size: str, batch: int, precision: str, steps: int) -> dict[str, Any]:
    """Train for some steps and return seconds per step and the memory taken while training."""
    import torch
    from transformers import AutoConfig, AutoModelForMaskedLM, DataCollatorForLanguageModeling

    from mlmadapt import WholeWordMaskingCollator
    from mlmadapt.testing import tiny_tokenizer

    chosen = SIZES[size]
    torch.manual_seed(0)
    config = AutoConfig.for_model(chosen["architecture"], vocab_size=30_522, **chosen["settings"])
    model = AutoModelForMaskedLM.from_config(config)
    tokenizer = tiny_tokenizer()
    ids = torch.randint(1000, 30_522, (batch * (steps + SKIPPED), 128))
    rows = [{"input_ids": row, "attention_mask": [1] * 128} for row in ids.tolist()]
    collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15)
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = read_memory("VmRSS")
    ends: list[tuple[float, float]] = []  # wall and CPU time
    peaks: list[int] = []
    parts: list[dict[str, float]] = []  # of a step of ours only

    def end() -> None:
        peaks.append(read_memory("VmHWM"))
        ends.append((time.perf_counter(), time.process_time()))

    if name == WHOLE_WORDS:
        words = [*range(128)]
        # Tokens that its tokenizer has.
        known = (ids % 400 + 7).tolist()
        rows = [
            {**row, "input_ids": own, "word_ids": words}
            for row, own in zip(rows, known, strict=True)
        ]
        collator = WholeWordMaskingCollator(tokenizer, wwm_probability=0.15)
    runner = {"recipe": run_recipe, "Trainer": run_trainer}.get(name, run_ours)
    with tempfile.TemporaryDirectory() as folder:
        runner(model, rows, collator, tokenizer, batch, precision, folder, end, parts)
    seconds, cpu = np.diff(ends, axis=0)[SKIPPED - 1 :].T.tolist()
    return {
        "seconds": seconds,
        "cpu": cpu,
        "memory": peaks[-1] - before,
        "loop": [
            1 - sum(part.values()) / step
            for part, step in zip(parts[SKIPPED:], seconds, strict=False)
        ],
        "clipping": [
            part["clipping"] / step for part, step in zip(parts[SKIPPED:], seconds, strict=False)
        ],
    }


def read_memory(name: str) -> int:
    """Return a line of the process's status, in kB."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith(name))


def run_recipe(model, rows, collator, tokenizer, batch, precision, folder, end, parts) -> None:  # noqa: ANN001, PLR0917
    """Train as the recipe's last section does."""
    import torch
    from accelerate import Accelerator
    from torch.utils.data import DataLoader
    from transformers import get_scheduler

    loader = DataLoader(rows, shuffle=True, batch_size=batch, collate_fn=collator)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5)
    accelerator = Accelerator(mixed_precision=precision)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    scheduler = get_scheduler(
        "linear", optimizer, num_warmup_steps=0, num_training_steps=len(loader)
    )
    model.train()
    for inputs in loader:
        loss = model(**inputs).loss
        accelerator.backward(loss)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        end()


def run_trainer(model, rows, collator, tokenizer, batch, precision, folder, end, parts) -> None:  # noqa: ANN001, PLR0917
    """Train with `Trainer`."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Clock(TrainerCallback):
        def on_step_end(self, *args: object, **kwargs: object) -> None:
            end()

    settings = TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=batch,
        num_train_epochs=1,
        bf16=precision == "bf16",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    Trainer(
        model, settings, data_collator=collator, train_dataset=rows, callbacks=[Clock()]
    ).train()


def run_ours(model, rows, collator, tokenizer, batch, precision, folder, end, parts) -> None:  # noqa: ANN001, PLR0917
    """Train with `accelerate_train`, its clocks in the model, the tensor and the optimizer."""
    import torch

    from mlmadapt import TrainingConfig, accelerate_train
    from mlmadapt.training.prepare import make_optimizer

    config = TrainingConfig(
        output_dir=folder,
        per_device_train_batch_size=batch,
        num_train_epochs=1,
        mixed_precision=precision,
        save_strategy="no",
        disable_tqdm=True,
    )
    optimizer = make_optimizer(model, config)
    started, part = 0.0, {"core": 0.0, "clipping": 0.0}
    backward, clip = torch.Tensor.backward, torch.nn.utils.clip_grad_norm_

    def start(*_: object) -> None:
        nonlocal started
        started = time.perf_counter()

    def timed_backward(loss: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        backward(loss, *args, **kwargs)
        part["core"] += time.perf_counter() - started

    def timed_clip(*args: Any, **kwargs: Any) -> torch.Tensor:
        start()
        norm = clip(*args, **kwargs)
        part["clipping"] += time.perf_counter() - started
        return norm

    def end_step(*_: object) -> None:
        part["core"] += time.perf_counter() - started
        end()
        parts.append(part.copy())
        part.update(core=0.0, clipping=0.0)

    model.register_forward_pre_hook(start)
    torch.Tensor.backward = timed_backward  # type: ignore[method-assign]
    torch.nn.utils.clip_grad_norm_ = timed_clip
    optimizer.register_step_pre_hook(start)
    optimizer.register_step_post_hook(end_step)
    accelerate_train(
        model, rows, tokenizer=tokenizer, data_collator=collator, config=config, optimizer=optimizer
    )


if __name__ == "__main__":
    main()
