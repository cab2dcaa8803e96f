"""A training step on a GPU: the recipe's loop, `Trainer` and this library, on tensors made up here.

Needs a CUDA device, and neither data nor `datasets`; without a device it says so and measures
nothing. bf16 throughout. Contenders run in processes of their own, in turns; a turn is timed from
the end of its fifth step to the end of its last, and the device is waited for at these two moments
only. Work is what the model needs, the same for all: every token in the encoder, masked tokens in
the head, forward and backward. Its share of the rate of a large matrix product tells how busy the
device is kept. ``--small`` takes tiny models on whatever device there is, to see that it runs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any
from unittest.mock import patch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import numpy as np
import torch

MODELS: dict[str, dict[str, Any]] = {
    "distilbert": {"vocab_size": 30_522},
    "modernbert": {"vocab_size": 50_368},
}
SMALL = {
    "distilbert": {"dim": 32, "hidden_dim": 64, "n_layers": 1, "n_heads": 2, "vocab_size": 500},
    "modernbert": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": 500,
        "pad_token_id": 0,
    },
}
SHAPES = ((64, 128), (16, 512))
CONTENDERS: dict[str, dict[str, Any]] = {
    "recipe": {},
    "Trainer": {},
    "mlmadapt": {},
    "mlmadapt, full head": {"full_head": True},
    "mlmadapt, torch_compile": {"torch_compile": True},
    "mlmadapt, padded": {"rows": "padded"},
    "mlmadapt, packed": {"rows": "packed"},
    "mlmadapt, torch_compile, padded": {"torch_compile": True, "rows": "padded"},
    "mlmadapt, torch_compile, packed": {"torch_compile": True, "rows": "packed"},
}
SKIPPED = 5  # first steps, in which memory is taken and code compiled
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def main() -> None:
    """Run every contender of every size in turns and print a table for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="turns of each contender")
    parser.add_argument("--steps", type=int, default=40, help="timed steps of a turn")
    parser.add_argument("--small", action="store_true", help="see that it runs")
    parser.add_argument("--turn", type=json.loads, help=argparse.SUPPRESS)
    arguments, _ = parser.parse_known_args()
    if arguments.turn:
        print(json.dumps(take_turn(**arguments.turn)))
        return
    name = torch.cuda.get_device_name() if DEVICE == "cuda" else "No CUDA device"
    print(f"\n## On a GPU\n\n{name}, torch {torch.__version__}.")
    if DEVICE == "cpu" and not arguments.small:
        print("Nothing was measured. The script is `tests/benchmarks/gpu.py`.")
        return
    rate = matrix_product_rate(256 if arguments.small else 8192)
    print(f"A matrix product in bf16 makes {rate / 1e12:.3g} TFLOP/s.")
    attentions = ["sdpa"]
    if DEVICE == "cuda":
        from transformers.utils import is_flash_attn_2_available

        attentions += ["flash_attention_2"] * is_flash_attn_2_available()
    for model in MODELS:
        for batch, sequence in SHAPES:
            for attention in attentions:
                shape = {"model": model, "batch": batch, "sequence": sequence}
                size = {**shape, "attention": attention, "small": arguments.small}
                compare(size, rounds=arguments.rounds, steps=arguments.steps, rate=rate)


def matrix_product_rate(size: int) -> float:
    """Measure floating-point operations per second of a product of two square matrices."""
    factor = torch.randn(size, size, device=DEVICE, dtype=torch.bfloat16)
    for repeats in (3, 20):
        wait()
        began = time.perf_counter()
        for _ in range(repeats):
            factor @ factor
        wait()
    return 2 * size**3 * repeats / (time.perf_counter() - began)


def wait() -> None:
    """Wait for the device."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def compare(size: dict[str, Any], *, rounds: int, steps: int, rate: float) -> None:
    """Print tokens per second, share of the rate and peak memory of each contender."""
    turns: dict[str, list[dict[str, float]]] = {name: [] for name in CONTENDERS}
    failed = {}
    for _ in range(rounds):
        for name in [each for each in CONTENDERS if each not in failed]:
            turn = {"contender": name, "steps": steps, **size}
            command = [sys.executable, __file__, "--turn", json.dumps(turn)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                failed[name] = done.stderr.strip().splitlines()[-1][:90]
            else:
                turns[name].append(json.loads(done.stdout.splitlines()[-1]))
    print(f"\n### {size['model']}, {size['batch']} x {size['sequence']}, {size['attention']}\n")
    print("| | tokens/s | times Trainer | share of the rate | peak memory, GB |")
    print("|:---|---:|---:|---:|---:|")
    for name, taken in turns.items():
        if name in failed:
            print(f"| {name} | failed: {failed[name]} | | | |")
            continue
        speeds = [turn["speed"] for turn in taken]
        ratios = [
            turn["speed"] / other["speed"]
            for turn, other in zip(taken, turns["Trainer"], strict=False)
        ]
        median, low, high = statistics.median(speeds), min(speeds), max(speeds)
        times = f"{statistics.median(ratios):.2f}" if ratios else ""
        share = statistics.median(turn["flops"] for turn in taken) / rate
        memory = max(turn["memory"] for turn in taken)
        print(
            f"| {name} | {median:,.0f} ({low:,.0f} to {high:,.0f}) | {times} | {share:.0%} "
            f"| {memory / 1e9:.2f} |"
        )


def take_turn(  # a turn's description
    *,
    contender: str,
    steps: int,
    model: str,
    batch: int,
    sequence: int,
    attention: str,
    small: bool,
) -> dict[str, float]:
    """Train, and return tokens and operations per second and the most memory taken."""
    from transformers import AutoConfig, AutoModelForMaskedLM

    from mlmadapt.testing import tiny_tokenizer

    torch.manual_seed(0)
    settings = (SMALL if small else MODELS)[model]
    network = AutoModelForMaskedLM.from_config(
        AutoConfig.for_model(model, **settings), attn_implementation=attention
    ).to(DEVICE)
    chosen, tokenizer = CONTENDERS[contender], tiny_tokenizer()
    # Token ids that the tokenizer has; time does not depend on them.
    rows = make_rows(batch * (steps + SKIPPED), sequence, chosen.get("rows", "full"))
    clock = Clock(steps + SKIPPED)
    run = {"recipe": run_recipe, "Trainer": run_trainer}.get(contender, run_ours)
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as folder:
        run(network, rows, tokenizer, batch, folder, clock, chosen)
    tokens = sum(len(row["input_ids"]) for row in rows) / len(rows) * batch
    head = network.get_output_embeddings().weight.numel()
    encoder = sum(each.numel() for each in network.parameters() if each.ndim > 1) - head
    hidden, layers = network.config.hidden_size, network.config.num_hidden_layers
    per_token = 6 * (encoder + 0.15 * head) + 12 * layers * hidden * sequence
    memory = torch.cuda.max_memory_allocated() if DEVICE == "cuda" else 0
    speed = tokens * steps / clock.seconds
    return {"speed": speed, "flops": speed * per_token, "memory": memory}


class Clock:
    """Reads the time at the end of the first steps and of the last, when the device is done."""

    def __init__(self, steps: int) -> None:
        self.left, self.last, self.seconds = steps, steps - SKIPPED, 0.0

    def tick(self, *_: object) -> None:
        """Count a step."""
        self.left -= 1
        if self.left in (self.last, 0):
            wait()
            self.seconds = time.perf_counter() - self.seconds


def make_rows(count: int, sequence: int, kind: str) -> list[dict[str, list[int]]]:
    """Make rows of random tokens, full or of documents of mixed lengths."""
    from mlmadapt import pack_texts

    generator = np.random.default_rng(0)
    if kind == "full":
        lengths = np.full(count, sequence)
    else:
        drawn = generator.lognormal(np.log(sequence / 3), 0.7, count)
        lengths = drawn.astype(int).clip(4, sequence)
    columns: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "word_ids": []}
    for length in lengths:
        columns["input_ids"].append([2, *generator.integers(7, 70, length - 2).tolist(), 3])
        columns["attention_mask"].append([1] * length)
        columns["word_ids"].append([-1, *range(length - 2), -1])
    if kind == "packed":
        repeated = {name: values * 3 for name, values in columns.items()}
        packed = pack_texts(repeated, chunk_size=sequence)
        columns = {name: [np.asarray(row).tolist() for row in packed[name]] for name in packed}
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return rows[:count]


def run_recipe(network, rows, tokenizer, batch, folder, clock, chosen) -> None:  # noqa: ANN001, PLR0917
    """Train as the recipe's last section does."""
    from accelerate import Accelerator
    from torch.utils.data import DataLoader
    from transformers import DataCollatorForLanguageModeling, get_scheduler

    rows = [{name: row[name] for name in ("input_ids", "attention_mask")} for row in rows]
    collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15)
    loader = DataLoader(rows, shuffle=True, batch_size=batch, collate_fn=collator)
    optimizer = torch.optim.AdamW(network.parameters(), lr=5e-5)
    accelerator = Accelerator(mixed_precision="bf16")
    network, optimizer, loader = accelerator.prepare(network, optimizer, loader)
    scheduler = get_scheduler(
        "linear", optimizer, num_warmup_steps=0, num_training_steps=len(loader)
    )
    network.train()
    for inputs in loader:
        accelerator.backward(network(**inputs).loss)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        clock.tick()


def run_trainer(network, rows, tokenizer, batch, folder, clock, chosen) -> None:  # noqa: ANN001, PLR0917
    """Train with `Trainer`."""
    from transformers import (
        DataCollatorForLanguageModeling,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    class Ticking(TrainerCallback):
        def on_step_end(self, *args: object, **kwargs: object) -> None:
            clock.tick()

    settings = TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=batch,
        num_train_epochs=1,
        bf16=True,
        use_cpu=DEVICE == "cpu",
        dataloader_pin_memory=DEVICE == "cuda",
        save_strategy="no",
        disable_tqdm=True,
        report_to=[],
    )
    collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15)
    rows = [{name: row[name] for name in ("input_ids", "attention_mask")} for row in rows]
    Trainer(
        network, settings, data_collator=collator, train_dataset=rows, callbacks=[Ticking()]
    ).train()


def run_ours(network, rows, tokenizer, batch, folder, clock, chosen) -> None:  # noqa: ANN001, PLR0917
    """Train with `accelerate_train` and whole-word masks."""
    from mlmadapt import TrainingConfig, WholeWordMaskingCollator, accelerate_train
    from mlmadapt.model import forward as predictor
    from mlmadapt.training.prepare import make_optimizer

    config = TrainingConfig(
        output_dir=folder,
        per_device_train_batch_size=batch,
        num_train_epochs=1,
        mixed_precision="bf16",
        eval_strategy="no",
        save_strategy="no",
        logging_steps=500,
        disable_tqdm=True,
        torch_compile=chosen.get("torch_compile", False),
    )
    optimizer = make_optimizer(network, config)
    optimizer.register_step_post_hook(clock.tick)
    try_sparse = (lambda *_: None) if chosen.get("full_head") else predictor.try_sparse
    with patch.object(predictor, "try_sparse", try_sparse):
        accelerate_train(
            network,
            rows,
            tokenizer=tokenizer,
            data_collator=WholeWordMaskingCollator(tokenizer, wwm_probability=0.15),
            config=config,
            optimizer=optimizer,
        )


if __name__ == "__main__":
    main()
