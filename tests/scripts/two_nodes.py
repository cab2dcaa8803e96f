"""What two machines with disks of their own see of runs, started by torchrun once on each.

``torchrun --nnodes 2 ... two_nodes.py FOLDER`` works in ``FOLDER/0`` and ``FOLDER/1``, as two
machines do, and writes what came of each run to ``FOLDER/0.json`` and ``FOLDER/1.json``.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from tests.scripts.short_run import digest
from tests.scripts.tiny_run import SAVING, TinyRun


def attempt(folder: Path, **settings: Any) -> str:
    """Train, and return a hash of the weights or the error."""
    run = TinyRun(folder)
    try:
        run.train(**SAVING, **settings)
    except (ValueError, OSError) as error:
        return f"{type(error).__name__}: {error}"
    return digest(run.model)


def main(shared: Path, rank: str) -> None:
    """Train with a folder for each machine, go on with it, and with one for both."""
    sys.modules["matplotlib.figure"] = None  # type: ignore[assignment]
    own = shared / rank
    own.mkdir()
    os.chdir(own)
    logging.basicConfig(filename="log")
    out, told = Path("out"), {"apart": attempt(Path("out"))}
    told["resumed"] = attempt(out, resume_from_checkpoint=True)
    if rank == "1":  # of another run
        shutil.copytree("../0/out/checkpoint-2", "out/checkpoint-2")
        manifest = out / "checkpoint-2" / "manifest.json"
        manifest.write_text(manifest.read_text() + " ")
    told["others"] = attempt(out, resume_from_checkpoint=True)
    if rank == "1":
        shutil.rmtree(out)
        shutil.copytree("../0/out", out)
    told["copied"] = attempt(out, resume_from_checkpoint=True)
    told["together"] = attempt(shared / "both")
    told["together, resumed"] = attempt(shared / "both", resume_from_checkpoint=True)
    told["log"] = Path("log").read_text()
    (shared / f"{rank}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), os.environ["RANK"])
