"""Pictures of what was measured, transparent and in colors that are read on white and on black.

``python _pictures.py FIGURES FILE`` draws the README's from what all benchmarks gave as `--output`.
The same figures make the same file: no date, no random names.
"""

from __future__ import annotations

import json
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy.typing as npt
    from matplotlib.axes import Axes

# Each about 4 to 1 against white, and against the ground of furo's and GitHub's dark pages.
BLUE, ORANGE, GREEN, GRAY = "#2f7be8", "#e0560f", "#0d8f5f", "#7a7a7a"
COLORS = {"ours": BLUE, "mlmadapt": BLUE, "recipe": ORANGE}  # and green is another's
COLORED = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
STYLE = {
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    **dict.fromkeys(COLORED, GRAY),
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "mlmadapt",
}
# A row of the README's picture, and the claims that it shows.
SPEED = {
    "chunking\n1,000 documents": ("recipe / Arrow", "chain / Arrow"),
    "collating\n64 x 128 tokens": (
        "64 x 128: recipe / ours",
        "64 x 128: transformers / ours",
    ),
    "training step\n4.4 M parameters": (
        "4.4 M-parameter BERT, 64 x 128, fp32: recipe / mlmadapt",
        "4.4 M-parameter BERT, 64 x 128, fp32: Trainer / mlmadapt",
    ),
    "training step\nDistilBERT's size": (
        "DistilBERT size, 16 x 128, fp32: recipe / mlmadapt",
        "DistilBERT size, 16 x 128, fp32: Trainer / mlmadapt",
    ),
}
NAMES = {"chain": "itertools.chain, lists", "transformers": "transformers' whole_word_mask"}


def draw_growth(
    file: Path, over: str, panels: dict[str, dict[str, dict[int, npt.NDArray[np.float64]]]]
) -> None:
    """Draw a quantity a panel over the sizes: a line a contender, with its lowest and highest."""
    with drawing(file, width=7.6 if len(panels) > 1 else 5.4, height=3.2) as figure:
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for axis, (quantity, contenders) in zip(axes, panels.items(), strict=True):
            axis.set(xscale="log", yscale="log", title=quantity, xlabel=over)
            sizes = sorted({size for values in contenders.values() for size in values})
            axis.set_xticks(sizes, [f"{size:,}" for size in sizes])
            axis.set_xticks([], minor=True)
            every = np.concatenate([v for values in contenders.values() for v in values.values()])
            decades = np.log10([every.min(), every.max()])
            axis.set_ylim(10 ** np.floor(decades[0]), 10 ** np.ceil(decades[1]))
            axis.yaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
            axis.yaxis.set_minor_formatter("")
            styles: dict[str, Iterator[str]] = {}
            for name, values in contenders.items():
                kind = name.partition(",")[0]
                style = next(styles.setdefault(kind, iter(("-", "--", ":"))))
                spread = [np.quantile(each, [0, 0.5, 1]) for each in values.values()]
                low, median, high = np.transpose(spread)
                color = COLORS.get(kind, GREEN)
                axis.plot([*values], median, style, marker="o", markersize=3, color=color)
                axis.fill_between([*values], low, high, color=color, alpha=0.3, linewidth=0)
            name_lines(axis, [*contenders])


def name_lines(axis: Axes, names: list[str]) -> None:
    """Name the lines at their right ends, each name above the one below it."""
    free: dict[float, float] = {}  # from which height up, by size
    ends = [(line.get_xydata()[-1], name) for line, name in zip(axis.lines, names, strict=True)]
    colors = {name: line.get_color() for line, name in zip(axis.lines, names, strict=True)}
    for end, name in sorted(ends, key=lambda each: each[0][1]):
        _, height = axis.transAxes.inverted().transform(axis.transData.transform(end))
        height = max(height, free.get(end[0], 0))
        free[end[0]] = height + 0.06
        axis.annotate(
            name,
            (end[0], height),
            (6, 0),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            va="center",
            color=colors[name],
        )


def draw_speed(file: Path, claims: dict[str, list[float]]) -> None:
    """Draw how many times as long as ours the recipe and another take, step by step."""
    with drawing(file, width=7.6, height=3.4) as figure:
        axis = figure.subplots()
        for row, names in enumerate(SPEED.values()):
            for name, shift in zip(names, (-0.19, 0.19), strict=True):
                contender = name.rpartition(": ")[2].partition(" / ")[0]
                low, median, high = np.quantile(claims[name], [0, 0.5, 1])
                color = COLORS.get(contender, GREEN)
                place = row + shift
                axis.barh(place, median - 1, 0.34, left=1, color=color, alpha=0.75)
                axis.plot([low, high], [place, place], color=GRAY, linewidth=1)
                label = f"{median:.3g} times: {NAMES.get(contender, contender)}"
                axis.annotate(
                    label,
                    (high, place),
                    (5, 0),
                    textcoords="offset points",
                    va="center",
                    color=color,
                )
        axis.set_yticks(range(len(SPEED)), [*SPEED])
        axis.invert_yaxis()
        axis.set(xscale="log", xlim=(1, None), title="times as long as mlmadapt takes")
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
        axis.tick_params(left=False)


@contextmanager
def drawing(file: Path, *, width: float, height: float) -> Iterator[Figure]:
    """Make a figure, inches wide and high, and save it."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure
        figure.savefig(file, transparent=True, metadata={"Date": None, "Creator": None})


def main(figures: str, file: str) -> None:
    """Draw the README's picture."""
    lines = Path(figures).read_text(encoding="utf-8").splitlines()
    claims = [json.loads(line).get("claims", {}) for line in lines]
    draw_speed(Path(file), {name: values for each in claims for name, values in each.items()})


if __name__ == "__main__":
    main(*sys.argv[1:])
