"""Measure ``import mlmadapt``, and what each name brings with it, in fresh interpreters."""

from __future__ import annotations

import json
import subprocess
import sys

import _measure as measure
import numpy as np

HEAVY = ("numpy", "pyarrow", "torch", "transformers", "datasets", "accelerate")
NAMES = ("group_texts", "tokenize_with_word_ids", "WholeWordMaskingCollator", "accelerate_train")
PROGRAM = """
import json, sys, time
before = set(sys.modules)
cpu, wall = time.process_time(), time.perf_counter()
{statement}
wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
loaded = set(sys.modules) - before
print(json.dumps([wall, cpu, len(loaded), [name for name in {heavy} if name in loaded]]))
"""


def main() -> None:
    """Measure the package itself often, and what it leaves to first use a few times."""
    arguments = measure.parse_arguments(__doc__, rounds=15)
    report = measure.Report("Importing", "none needed", arguments)
    package = "import mlmadapt"
    statements = [package, *(f"from mlmadapt import {name}" for name in NAMES)]
    statements += ["import torch", "import transformers"]
    runs: dict[str, list[list]] = {statement: [] for statement in statements}
    for round_ in range(arguments.rounds + 1):
        for statement in statements if round_ < 3 else [package]:
            runs[statement].append(import_once(statement))

    rows = []
    for statement, results in runs.items():
        # The first run reads files that are not in memory yet.
        milliseconds = 1e3 * np.array([wall for wall, *_ in results[1:]])
        *_, modules, heavy = results[-1]
        low, median, high = np.quantile(milliseconds, [0, 0.5, 1])
        spread = f"{low:,.1f} to {high:,.1f}"
        brings = ", ".join(heavy) or "none"
        rows.append((statement, f"{median:,.1f}", spread, f"{modules:,}", brings))
    header = ("in a fresh interpreter", "ms, median", "lowest to highest", "modules", "heavy ones")
    report.table(header, rows)

    wall, cpu = 1e3 * np.array([result[:2] for result in runs[package][1:]]).T
    *_, heavy = runs[package][-1]
    report.claims(
        "how many",
        [
            measure.Claim("ms, import mlmadapt", wall, cpu, at_most=50),
            measure.Claim("heavy modules loaded by it", np.array([len(heavy)]), at_most=0),
        ],
    )
    report.save()


def import_once(statement: str) -> list:
    """Return wall and CPU seconds, the number of modules loaded, and which heavy ones."""
    program = PROGRAM.format(statement=statement, heavy=HEAVY)
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=120)
    return json.loads(done.stdout)


if __name__ == "__main__":
    main()
