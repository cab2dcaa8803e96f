"""What a process makes, others make too, whose sets have another order."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets.fingerprint import Hasher
from packaging.version import Version
from transformers import DataCollatorForLanguageModeling

from mlmadapt import WholeWordMaskingCollator, insert_random_mask
from mlmadapt.testing import TOKENIZER_KINDS, material, tiny_rows, tiny_tokenizer
from tests.scripts.tiny_run import TinyRun

# PEFT asks for it.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)
# Started once for all that they make, since each of them loads everything.
SCRIPT = "from tests.processes.test_same_everywhere import make; print(make())"


def make() -> str:
    """Return digests of tokenizers and masks, and fingerprints of collators and of a run."""
    tokenizer = tiny_tokenizer()
    rows = tiny_rows(tokenizer, 30)
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    collator = WholeWordMaskingCollator(
        tokenizer, mask_replace_prob=0.5, random_replace_prob=0.5, seed=0
    )
    fingerprint = Hasher.hash(collator)
    batch = collator(rows)
    foreign = DataCollatorForLanguageModeling(tokenizer, seed=5)
    frozen = [insert_random_mask(columns, masking) for masking in (collator, foreign)]
    digest = hashlib.sha256(repr([v.tolist() for v in batch.values()]).encode())
    digest.update(repr([[v.tolist() for v in c] for f in frozen for c in f.values()]).encode())
    run = TinyRun(Path())
    run.eval_rows = run.rows[:4]
    run.adapt(target_modules=["key", "query", "value"])
    trained = "".join(map(material._train, TOKENIZER_KINDS))
    made = {
        "tokenizers": hashlib.sha256(trained.encode()).hexdigest(),
        "masks": digest.hexdigest(),
        "collator": fingerprint,
        "collator after its use": Hasher.hash(collator),
        "transformers' collator": Hasher.hash(foreign),
        "run": run.fingerprint(),
    }
    return json.dumps(made)


@pytest.fixture(scope="module")
def made() -> list[dict[str, Any]]:
    """What two other processes made, and this one."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", SCRIPT],
            stdout=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                "PYTHONHASHSEED": seed,
                "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path]),
            },
        )
        for seed in ("1", "2")
    ]
    try:
        printed = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [json.loads(output.splitlines()[-1]) for output in (*printed, make())]


@pytest.mark.parametrize("name", ["tokenizers", "masks", "run"])
def test_processes_make_the_same(made: list[dict[str, Any]], name: str) -> None:
    """Tokenizers, masks, and the fingerprint of a run: its adapters' configuration has sets."""
    assert made[0][name] == made[1][name] == made[2][name]


@pytest.mark.skipif(
    Version(datasets.__version__) < Version("5.2"),
    reason="datasets 4.0 takes a used tokenizer for another one (datasets#7982)",
)
def test_processes_tell_collators_by_the_same_fingerprint(made: list[dict[str, Any]]) -> None:
    """So that `map` finds its cache, after the collator has been used too."""
    for name in ("collator", "transformers' collator"):
        assert made[0][name] == made[1][name] == made[2][name]
    assert all(digests["collator after its use"] == digests["collator"] for digests in made)
