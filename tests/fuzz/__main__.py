"""Attack the library for some minutes, with cases that nobody has thought of.

``nox -s fuzz -- --minutes 30`` runs its parts in turn. A case is drawn from its number alone, so
that what was found comes again with ``--only PART --seed NUMBER --cases 1``. Runs of random shapes
that are killed at random are among the slow tests of resuming.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import time
import traceback
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

os.environ["HF_HUB_OFFLINE"] = "1"

from tests.fuzz import texts

PARTS = {"texts": texts.check}
SECONDS = 600  # of one case


def main(arguments: list[str] | None = None) -> int:
    """Run cases until the time is up; return how a process should end.

    A part ends with its first finding, which would come again and again, and the others go on.
    """
    beside = Path(__file__).resolve().parents[2] / ".." / "shared" / "data"
    data = Path(os.environ.get("MLMADAPT_TEST_DATA", beside))
    parser = argparse.ArgumentParser(prog="nox -s fuzz --", description=main.__doc__)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--seed", type=int, help="the first case; the clock's, if not given")
    parser.add_argument("--cases", type=int, help="of each part, at most")
    parser.add_argument("--only", choices=PARTS, action="append", help="a part, or several")
    parser.add_argument("--data", type=Path, default=data, help="folder of real tokenizers")
    options = parser.parse_args(arguments)
    seed = int(time.time()) if options.seed is None else options.seed
    folder = options.data if options.data.is_dir() else None
    end = time.monotonic() + 60 * options.minutes
    spent = dict.fromkeys(options.only or PARTS, 0.0)
    cases: Counter[str] = Counter()
    counts: dict[str, Counter[str]] = {part: Counter() for part in spent}
    findings: dict[str, str] = {}
    print(f"cases from {seed} on")
    while time.monotonic() < end and (open_parts := [p for p in spent if p not in findings]):
        part = min(open_parts, key=spent.__getitem__)
        if options.cases is not None and cases[part] >= options.cases:
            if all(cases[p] >= options.cases for p in open_parts):
                break
            spent[part] = float("inf")
            continue
        number, start = seed + cases[part], time.monotonic()
        try:
            with limited(SECONDS):
                draw = random.Random(f"{part} {number}")  # noqa: S311  # nothing secret
                counts[part] += PARTS[part](draw, folder)
        except Exception as error:  # noqa: BLE001  # whatever it is, it was not expected
            known = isinstance(error, AssertionError)
            findings[part] = str(error) if known else traceback.format_exc()
            repeat = f"nox -s fuzz -- --only {part} --seed {number} --cases 1"
            print(f"FOUND by {part}: {findings[part]}\nrepeat it: {repeat}", flush=True)
        cases[part] += 1
        spent[part] += time.monotonic() - start
    for part, counted in counts.items():
        figures = ", ".join(f"{count:,} {name}" for name, count in sorted(counted.items()))
        print(f"{part}: {cases[part]:,} cases ({figures}), {int(part in findings)} found")
    return 1 if findings else 0


@contextmanager
def limited(seconds: int) -> Iterator[None]:
    """Raise in a block that takes too long."""

    def ring(number: int, frame: Any) -> None:
        raise TimeoutError(f"not over after {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


if __name__ == "__main__":
    sys.exit(main())
