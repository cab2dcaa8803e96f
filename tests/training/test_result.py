"""The curves of a run, as they are drawn."""

from __future__ import annotations

import dataclasses
import io
import math
import sys
from typing import Any

import pytest

from mlmadapt import TrainingResult

HISTORY: list[dict[str, float]] = [
    {"step": 0, "eval_loss": 5.0, "eval_perplexity": 150.0},
    {"step": 2, "loss": 4.5, "learning_rate": 1e-4, "grad_norm": 1.0},
    {"step": 4, "loss": 4.0, "learning_rate": 0.0, "grad_norm": 1.0},
    {"step": 4, "eval_loss": 4.0, "eval_perplexity": 55.0},
]


def result_of(history: list[dict[str, float]]) -> TrainingResult:
    """Make a result with a history."""
    counts = {"global_step": 4, "tokens_seen": 9, "masked_tokens_seen": 2, "seconds": 1.0}
    metrics: dict[str, Any] = dict.fromkeys(("initial", "final", "best"))
    return TrainingResult(**metrics, **counts, history=history, output_dir="out")


def lines(axes: Any) -> dict[str, list[tuple[float, float]]]:
    """Return the points of each line by its name."""
    return {
        line.get_label(): list(zip(line.get_xdata(), line.get_ydata(), strict=True))
        for line in axes.get_lines()
    }


def test_the_curves_are_the_history() -> None:
    """Training loss, perplexity, learning rate, each by step."""
    loss, perplexity, rate = result_of(HISTORY).plot().axes
    assert lines(loss) == {"loss": [(2, 4.5), (4, 4.0)]}
    assert lines(perplexity) == {"eval": [(0, 150.0), (4, 55.0)]}
    assert lines(rate) == {"learning_rate": [(2, 1e-4), (4, 0.0)]}
    assert perplexity.get_legend() is None
    assert rate.get_xlabel() == "optimizer step"


def test_each_evaluation_set_has_a_line_with_its_name() -> None:
    """In one plot, so that forgetting shows beside learning."""
    history = [
        {"step": step, "eval_domain_perplexity": 9.0 - step, "eval_general_perplexity": 9.0 + step}
        for step in (0, 4)
    ]
    (axes,) = result_of(history).plot().axes
    assert lines(axes) == {"domain": [(0, 9.0), (4, 5.0)], "general": [(0, 9.0), (4, 13.0)]}
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["domain", "general"]


@pytest.mark.parametrize(("first", "scale"), [(549.0, "linear"), (551.0, "log")])
def test_a_perplexity_that_falls_far_is_drawn_logarithmically(first: float, scale: str) -> None:
    """A model from scratch begins in the thousands, where the end would be a flat line."""
    history = [{**HISTORY[0], "eval_perplexity": first}, *HISTORY[1:]]
    figure = result_of(history).plot()
    assert [axes.get_yscale() for axes in figure.axes] == ["linear", scale, "linear"]


@pytest.mark.parametrize("history", [[], HISTORY[1:2], [{"step": 0, "eval_perplexity": math.inf}]])
def test_a_short_history_is_drawn_too(history: list[dict[str, float]]) -> None:
    """Nothing, a single point, a perplexity without bound."""
    file = io.BytesIO()
    result_of(history).plot().savefig(file)
    assert file.getvalue().startswith(b"\x89PNG")


def test_pyplot_stays_as_it_was() -> None:
    """No figure is registered, so none is left open, and nothing is shown."""
    pyplot = pytest.importorskip("matplotlib.pyplot")
    before = pyplot.get_fignums()
    figure = result_of(HISTORY).plot()
    assert pyplot.get_fignums() == before
    assert figure is not pyplot.gcf()
    pyplot.close()
    assert dataclasses.asdict(result_of(HISTORY))["history"] == HISTORY


def test_without_matplotlib_the_cure_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is an optional extra."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"plot draws with matplotlib.*'mlmadapt\[plot\]'"):
        result_of(HISTORY).plot()
