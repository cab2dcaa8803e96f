"""What the benchmarks share: text to measure on, fair turns, and tables that say where they stand.

Contenders take turns within a round, so that a busy machine slows all of them alike, and a ratio is
taken within its round: the median over the rounds is what counts, the extremes tell how far to
trust it. As in `timeit`, garbage is collected before a turn and not during it.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import platform
import random
import time
import tracemalloc
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

# Before any Hugging Face library is imported, which read them once: nothing here needs the hub.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from transformers import AutoTokenizer

from mlmadapt.testing import tiny_corpus, tiny_tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    import numpy.typing as npt
    from transformers import PreTrainedTokenizerBase

datasets.disable_progress_bars()

# A quantity of contenders by size, a number a round.
Growth: TypeAlias = "dict[str, dict[int, npt.NDArray[np.float64]]]"

_PACKAGES = ("torch", "transformers", "tokenizers", "datasets", "accelerate", "numpy", "pyarrow")


def parse_arguments(doc: str | None, *, rounds: int) -> argparse.Namespace:
    """Parse the options that every benchmark has, since `nox -s bench` gives the same to all."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data",
        type=Path,
        default=os.environ.get("MLMADAPT_TEST_DATA"),
        help="real text: a parquet file with a column 'text', a file of one document per line, or "
        "a folder with imdb/train.parquet and tokenizers/bert-base-uncased (default: the folder "
        "that MLMADAPT_TEST_DATA names, or else synthetic reviews)",
    )
    parser.add_argument(
        "--tokenizer",
        help="folder or name of a fast tokenizer (default: the data folder's, or else a tiny one)",
    )
    parser.add_argument(
        "--rounds", type=int, default=rounds, help="turns of each contender (default: %(default)s)"
    )
    add_outputs(parser)
    return parser.parse_args()


def add_outputs(parser: argparse.ArgumentParser) -> None:
    """Add the options that tell where figures and pictures go."""
    parser.add_argument("--output", type=Path, help="file for the figures, one JSON per line")
    parser.add_argument("--pictures", type=Path, help="folder to draw in, beside the written page")


@dataclass(frozen=True)
class Material:
    """What is measured on."""

    texts: list[str]
    tokenizer: PreTrainedTokenizerBase
    description: str


def load_material(arguments: argparse.Namespace, *, documents: int) -> Material:
    """Load real documents and a tokenizer, or make both up."""
    data, name = arguments.data, arguments.tokenizer
    if data is None:
        texts, source = synthetic_reviews(documents), "synthetic reviews of real words"
    else:
        data = Path(data)
        if data.is_dir():
            name = name or str(data / "tokenizers" / "bert-base-uncased")
            data = data / "imdb" / "train.parquet"
        texts, source = read_texts(data), f"{data.parent.name}/{data.name}"
        # Corpora are often sorted, IMDb by label.
        random.Random(0).shuffle(texts)  # noqa: S311 (nothing secret)
        texts = texts[:documents]
        if len(texts) < documents:
            raise SystemExit(f"--data {data} has {len(texts)} documents; this needs {documents}.")
    tokenizer = AutoTokenizer.from_pretrained(name) if name else tiny_tokenizer()
    words = sum(len(text.split()) for text in texts) / len(texts)
    description = (
        f"{len(texts):,} documents of {source}, {words:.0f} words each; "
        f"tokenizer {Path(name).name if name else 'tiny_tokenizer'}, {len(tokenizer):,} tokens"
    )
    return Material(texts, tokenizer, description)


def read_texts(path: Path) -> list[str]:
    """Read the documents of a parquet file or of a file with one a line."""
    if path.suffix == ".parquet":
        return pq.read_table(path, columns=["text"])["text"].to_pylist()
    return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def synthetic_reviews(count: int) -> list[str]:
    """Join the tiny corpus to documents as long as IMDb's: median 174 words, log-normal."""
    sentences = tiny_corpus(20_000)
    generator = random.Random(0)  # noqa: S311 (nothing secret)
    reviews = []
    for _ in range(count):
        missing = generator.lognormvariate(math.log(174), 0.645)
        review = []
        while missing > 0:
            review.append(generator.choice(sentences))
            missing -= review[-1].count(" ") + 1
        reviews.append(" ".join(review))
    return reviews


@dataclass(frozen=True)
class Contender:
    """A function to time on an input that is made anew, untimed, right before every call."""

    run: Callable[[Any], object]
    prepare: Callable[[], Any]


@dataclass(frozen=True)
class Times:
    """Seconds a call, one number a round."""

    wall: npt.NDArray[np.float64]
    cpu: npt.NDArray[np.float64]


def take_turns(
    contenders: dict[Any, Contender], *, rounds: int, seconds: float = 0.05
) -> dict[Any, Times]:
    """Time the contenders in turns, each repeated within a turn for about `seconds`."""
    repeats = {}
    for name, contender in contenders.items():
        wall, _ = _take_turn(contender, 1)
        if wall < 1:  # a first turn is a slow one
            wall, _ = _take_turn(contender, 1)
        repeats[name] = min(max(math.ceil(seconds / wall), 1), 1000)
    turns: dict[Any, list[tuple[float, float]]] = {name: [] for name in contenders}
    names = list(contenders)
    for round_ in range(rounds):
        shift = round_ % len(names)
        for name in names[shift:] + names[:shift]:
            turns[name].append(_take_turn(contenders[name], repeats[name]))
    return {name: Times(*np.array(times).T) for name, times in turns.items()}


def take_turns_by_size(
    contenders: dict[int, dict[str, Contender]], *, rounds: int
) -> dict[str, dict[int, Times]]:
    """Time the contenders of all sizes in the same rounds, so that sizes can be compared, too."""
    flat = {
        (name, size): each for size, named in contenders.items() for name, each in named.items()
    }
    times = take_turns(flat, rounds=rounds)
    names = dict.fromkeys(name for name, _ in times)
    return {
        name: {size: each for (of, size), each in times.items() if of == name} for name in names
    }


def milliseconds(times: dict[str, dict[int, Times]]) -> Growth:
    """Return the wall time of contenders by size."""
    return {
        name: {size: 1e3 * each.wall for size, each in by_size.items()}
        for name, by_size in times.items()
    }


def peak_megabytes(contenders: dict[int, dict[str, Contender]]) -> Growth:
    """Measure the most that Python, NumPy and Arrow allocate in a call, beyond its input."""
    growth: Growth = {}
    for size, named in contenders.items():
        for name, contender in named.items():
            growth.setdefault(name, {})[size] = np.array([_peak_memory(contender) / 1e6])
    return growth


def _peak_memory(contender: Contender) -> int:
    each = contender.prepare()
    arrow, default = pa.proxy_memory_pool(pa.default_memory_pool()), pa.default_memory_pool()
    tracemalloc.start()
    pa.set_memory_pool(arrow)
    try:
        before, _ = tracemalloc.get_traced_memory()
        contender.run(each)
        return tracemalloc.get_traced_memory()[1] - before + arrow.max_memory()
    finally:
        pa.set_memory_pool(default)
        tracemalloc.stop()


def _take_turn(contender: Contender, repeats: int) -> tuple[float, float]:
    """Return the medians of wall and CPU time, so that a call put off by another process is out."""
    run, clock, cpu_clock = contender.run, time.perf_counter, time.process_time
    calls = []
    gc.collect()
    gc.disable()
    try:
        for _ in range(repeats):
            each = contender.prepare()
            cpu, wall = cpu_clock(), clock()
            run(each)
            calls.append((clock() - wall, cpu_clock() - cpu))
    finally:
        gc.enable()
    wall, cpu = np.median(calls, axis=0)
    return wall, cpu


@dataclass(frozen=True)
class Claim:
    """A figure, one a round, and what its median has to be."""

    name: str
    values: npt.NDArray[np.float64]
    cpu: npt.NDArray[np.float64] | None = None
    at_least: float = -math.inf
    at_most: float = math.inf

    @classmethod
    def ratio(cls, name: str, slow: Times, fast: Times, **bounds: float) -> Claim:
        """Claim how many times as long `slow` takes as `fast` does."""
        return cls(name, slow.wall / fast.wall, slow.cpu / fast.cpu, **bounds)

    def row(self) -> tuple[str, ...]:
        """Return a row for the table of claims."""
        median = float(np.median(self.values))
        spread = f"{_figure(self.values.min())} to {_figure(self.values.max())}"
        cpu = "" if self.cpu is None else _figure(float(np.median(self.cpu)))
        target = verdict = ""
        if self.at_least > -math.inf:
            target = f"at least {self.at_least:,g}"
        elif self.at_most < math.inf:
            target = f"at most {self.at_most:,g}"
        if target:
            # By both clocks: wall time on a busy machine is hard on long calls, kind to short ones.
            medians = [median] if self.cpu is None else [median, float(np.median(self.cpu))]
            met = all(self.at_least <= each <= self.at_most for each in medians)
            verdict = "yes" if met else "**no**"
        return self.name, _figure(median), spread, cpu, target, verdict


class Report:
    """Tables in Markdown on standard output, and the figures behind them in a file."""

    def __init__(self, title: str, description: str, arguments: argparse.Namespace) -> None:
        self.output, self.pictures = arguments.output, arguments.pictures
        self.figures: dict[str, Any] = {
            "benchmark": title,
            "data": description,
            "machine": _machine(),
            "versions": _versions(),
        }
        versions = ", ".join(" ".join(item) for item in self.figures["versions"].items())
        print(f"## {title}\n\n- Data: {description}.\n- Machine: {self.figures['machine']}.")
        print(f"- Versions: {versions}.\n", flush=True)

    def times(self, title: str, times: dict[str, Times], *, count: int, unit: str) -> None:
        """Print a row a contender; `count` is how many `unit` a call handles."""
        rows = []
        for name, each in times.items():
            low, median, high = 1e3 * np.quantile(each.wall, [0.25, 0.5, 0.75])
            spread = f"{_figure(low)} to {_figure(high)}"
            cpu = _figure(1e3 * float(np.median(each.cpu)))
            rows.append((name, _figure(median), spread, cpu, f"{1e3 * count / median:,.0f}"))
        header = (title, "ms, median", "quartiles", "CPU ms", f"{unit} per second")
        self.table(header, rows)
        self.figures.setdefault("seconds", {})[title] = {
            name: {"wall": each.wall.tolist(), "cpu": each.cpu.tolist()}
            for name, each in times.items()
        }

    def claims(self, title: str, claims: Sequence[Claim]) -> None:
        """Print a row a claim."""
        header = (title, "median", "lowest to highest", "by CPU time", "target", "met")
        self.table(header, [claim.row() for claim in claims])
        values = {claim.name: claim.values.tolist() for claim in claims}
        self.figures.setdefault("claims", {}).update(values)

    def growth(self, over: str, panels: dict[str, Growth], *, absent: str = "") -> None:
        """Print a table a quantity and draw them; `absent` tells why a size is left out."""
        for quantity, contenders in panels.items():
            columns = contenders.values()
            rows = [
                (
                    f"{size:,}",
                    *(_spread(column[size]) if size in column else absent for column in columns),
                )
                for size in sorted({size for column in columns for size in column})
            ]
            rows.append(("order of growth", *(f"{_order(column):.2f}" for column in columns)))
            title = f"{quantity}, by {over}"
            self.table((title, *contenders), rows)
            self.figures.setdefault("growth", {})[title] = {
                name: {size: values.tolist() for size, values in column.items()}
                for name, column in contenders.items()
            }
        if self.pictures:
            from _pictures import draw_growth  # what is timed shall not import matplotlib

            file = f"{self.figures['benchmark'].lower()}.svg"
            draw_growth(self.pictures / file, over, panels)
            told = f"{' and '.join(panels)} by {over}, as above, on logarithmic axes"
            print(f"![{told}]({self.pictures.name}/{file})\n", flush=True)

    def table(self, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        """Print a table, its columns as wide as they need to be."""
        lines = [header, *rows]
        widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
        lines.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
        for line in lines:
            first, *others = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
            cells = [first, *(cell.strip().rjust(len(cell)) for cell in others)]
            print(f"| {' | '.join(cells)} |")
        print(flush=True)

    def save(self) -> None:
        """Append the figures to the file."""
        if self.output is not None:
            with self.output.open("a", encoding="utf-8") as file:
                file.write(json.dumps(self.figures) + "\n")


def _figure(value: float) -> str:
    """Write a number with three digits that count."""
    if not value:
        return "0"
    return f"{value:,.{max(2 - math.floor(math.log10(abs(value))), 0)}f}"


def _spread(values: npt.NDArray[np.float64]) -> str:
    """Write a median, and the lowest and the highest if there are several."""
    several = f" ({_figure(values.min())} to {_figure(values.max())})" * (len(values) > 1)
    return _figure(float(np.median(values))) + several


def _order(values: dict[int, npt.NDArray[np.float64]]) -> float:
    """Return which power of the size a cost grows with: 1 is linear, 2 quadratic."""
    first, last = min(values), max(values)
    return math.log(np.median(values[last]) / np.median(values[first]), last / first)


def _machine() -> str:
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
        names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
        model = next(names, model)
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    return f"{model}, {os.cpu_count()} cores{load}, {platform.system()}"


def _versions() -> dict[str, str]:
    versions = {"Python": platform.python_version()}
    for package in ("mlmadapt", *_PACKAGES):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return versions
