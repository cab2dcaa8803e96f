"""Benchmarks tell what they measured: tables and pictures of figures that are given."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.scripts.processes import run_script

FOLDER = Path(__file__).parent / "benchmarks"
REPORT = """
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
from _measure import Report

linear = {size: np.array([0.9, 1.0, 1.2]) * size for size in (2, 8, 32, 128)}
quadratic = {size: np.array([size**2.0]) for size in (2, 8, 32)}
folder = Path(sys.argv[1])
report = Report("Trying", "none", Namespace(output=folder / "figures.jsonl", pictures=folder))
report.growth("rows", {"ms": {"ours": linear, "recipe": quadratic}}, absent="too long")
report.save()
"""


def test_growth_is_told_and_drawn(tmp_path: Path) -> None:
    """A table has a median and its spread, why a cell is empty, and linear apart from quadratic."""
    command = [sys.executable, "-c", REPORT, str(tmp_path)]
    ended = run_script(command, PYTHONPATH=f"{FOLDER}:{':'.join(sys.path)}")
    assert ended.returncode == 0, ended.stdout
    cells = [[cell.strip() for cell in line.split("|")] for line in ended.stdout.splitlines()]
    rows = {row[1]: row[2:-1] for row in cells if len(row) > 1}
    assert rows["ms, by rows"] == ["ours", "recipe"]
    assert rows["32"] == ["32.0 (28.8 to 38.4)", "1,024"]
    assert rows["128"] == ["128 (115 to 154)", "too long"]
    assert rows["order of growth"] == ["1.00", "2.00"]
    assert f"({tmp_path.name}/trying.svg)" in ended.stdout
    picture = (tmp_path / "trying.svg").read_text(encoding="utf-8")
    assert all(f">{text}<" in picture for text in ("ours", "recipe", "rows", "128", "ms"))
    assert "date" not in picture
    figures = json.loads((tmp_path / "figures.jsonl").read_text(encoding="utf-8"))
    assert figures["growth"]["ms, by rows"]["recipe"] == {"2": [4.0], "8": [64.0], "32": [1024.0]}


@pytest.mark.slow
def test_rows_to_batches_are_measured(tmp_path: Path) -> None:
    """Ours are read as arrays and as lists, and `Trainer`'s beside them, in one turn at least."""
    figures = tmp_path / "figures.jsonl"
    command = [sys.executable, str(FOLDER / "rows.py"), "--rounds=1", f"--output={figures}"]
    ended = run_script(command)
    assert ended.returncode == 0, ended.stdout
    claims = json.loads(figures.read_text(encoding="utf-8"))["claims"]
    assert claims["lists / ours"][0] > 1.2
    assert claims["Trainer / ours"][0] > 1.2


def test_speed_is_drawn_of_the_claims_that_are_made(tmp_path: Path) -> None:
    """The README's picture has a bar a claim, the same from the same figures."""
    names = """
import json, sys
from pathlib import Path
from _pictures import SPEED, main

claims = {name: [1.5, 12.34, 20.0] for names in SPEED.values() for name in names}
Path(sys.argv[1]).write_text(json.dumps({}) + "\\n" + json.dumps({"claims": claims}))
main(sys.argv[1], sys.argv[2])
print(*claims, sep="\\n")
"""
    page = (FOLDER.parents[1] / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    pictures = []
    for name in ("one.svg", "other.svg"):
        command = [sys.executable, "-c", names, str(tmp_path / "figures"), str(tmp_path / name)]
        ended = run_script(command, PYTHONPATH=f"{FOLDER}:{':'.join(sys.path)}")
        assert ended.returncode == 0, ended.stdout
        assert all(f"\n| {claim} " in page for claim in ended.stdout.splitlines())
        pictures.append((tmp_path / name).read_text(encoding="utf-8"))
    assert pictures[0] == pictures[1]
    assert pictures[0].count(">12.3 times: ") == 8


def test_a_turn_on_a_device_needs_no_datasets() -> None:
    """As on machines that lack the library: on tensors made on the spot, packed."""
    turn = {"contender": "mlmadapt, packed", "steps": 1, "model": "distilbert", "batch": 2}
    turn |= {"sequence": 32, "attention": "sdpa", "small": True}
    script = f"""
import sys
sys.modules["datasets"] = None
sys.argv = ["gpu.py", "--turn", {json.dumps(turn)!r}]
import gpu
gpu.main()
"""
    ended = run_script(
        [sys.executable, "-W", "ignore", "-c", script], PYTHONPATH=f"{FOLDER}:{':'.join(sys.path)}"
    )
    assert ended.returncode == 0, ended.stdout
    figures = json.loads(ended.stdout.splitlines()[-1])
    assert figures["speed"] > 0
    assert figures["flops"] > figures["speed"]
