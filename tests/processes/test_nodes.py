"""Two machines, each with a launcher and a working directory of its own."""

from __future__ import annotations

import json
import os
import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.scripts.processes import run_script

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """What came of the runs on both."""
    folder = tmp_path_factory.mktemp("nodes")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    root = Path(__file__).parents[2]
    path = os.pathsep.join([str(root), *sys.path])

    def launch(rank: int) -> str:
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2"]
        command += ["--node_rank", str(rank), "--nproc_per_node", "1"]
        command += ["--master_addr", "127.0.0.1", "--master_port", str(port)]
        command += [str(root / "tests" / "scripts" / "two_nodes.py"), str(folder)]
        environment = {"ACCELERATE_USE_CPU": "1", "PYTHONPATH": path}
        return run_script(command, seconds=120, **environment).stdout

    with ThreadPoolExecutor() as pool:
        outputs = [*pool.map(launch, range(2))]
    reports = [folder / f"{rank}.json" for rank in range(2)]
    assert all(report.exists() for report in reports), "\n".join(outputs)
    return [json.loads(report.read_text()) for report in reports]


def test_machines_without_a_shared_folder_are_told(nodes: list[dict[str, str]]) -> None:
    """They train, and the log says before the first step what will not work."""
    first, second = nodes
    assert first["apart"] == second["apart"] == first["together"]
    message = "output_dir is 'out', which not all machines share; name one that they do"
    assert message in first["log"]
    assert message in second["log"]


@pytest.mark.parametrize("case", ["resumed", "others"])
def test_machines_with_other_checkpoints_are_refused(
    nodes: list[dict[str, str]], case: str
) -> None:
    """One has none, or one of another run; neither begins anew, or is told to."""
    for rank, told in enumerate(nodes):
        message = f"ValueError: process {1 - rank} sees other checkpoints ("
        assert told[case].startswith(message)
        assert told[case].count("checkpoint-2") == (2 if case == "others" else 1)
        assert "several machines need an output_dir that they share" in told[case]
        assert "overwrite" not in told[case]


def test_machines_with_the_same_checkpoints_go_on(nodes: list[dict[str, str]]) -> None:
    """In a folder that they share, or in copies of it."""
    first, second = nodes
    for case in ("copied", "together", "together, resumed"):
        assert first[case] == second[case] == first["apart"]
