"""What a run returns to its caller."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mlmadapt.model.evaluation import MaskedLMMetrics

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingResult:
    """What came of a run.

    Attributes:
        initial: Metrics of the first evaluation set before the first step; None without one.
        final: The same of the model that is saved: after the last step or, with
            ``load_best_model_at_end``, at the evaluation whose model was loaded.
        best: The same at the evaluation with the lowest loss, the one before the first step
            included.
        history: What was logged, in order: ``step``, ``epoch``, and ``loss``, ``learning_rate``,
            ``grad_norm`` or ``eval_loss``, ``eval_perplexity``, ... as `Trainer` names them.
        global_step: Optimizer steps taken.
        tokens_seen: Tokens trained on, padding not counted, over all processes.
        masked_tokens_seen: Tokens predicted, over all processes.
        seconds: Wall time of training and evaluation in seconds, including the time before an
            interruption.
        output_dir: The directory of the model and the tokenizer.

    Examples:
        >>> result = TrainingResult(
        ...     initial=None,
        ...     final=None,
        ...     best=None,
        ...     history=[{"step": 1, "epoch": 1.0, "loss": 4.5}],
        ...     global_step=1,
        ...     tokens_seen=8192,
        ...     masked_tokens_seen=1638,
        ...     seconds=0.5,
        ...     output_dir="adapted",
        ... )
        >>> [entry["loss"] for entry in result.history if "loss" in entry]
        [4.5]
    """

    initial: MaskedLMMetrics | None
    final: MaskedLMMetrics | None
    best: MaskedLMMetrics | None
    history: list[dict[str, float]]
    global_step: int
    tokens_seen: int
    masked_tokens_seen: int
    seconds: float
    output_dir: str

    def plot(self) -> "Figure":
        r"""Draw the curves of a run by step: training loss, perplexities, learning rate.

        A perplexity that falls to less than a tenth is drawn on a logarithmic scale. The figure
        is not registered with pyplot: save it with ``savefig``, or make it the last line of a
        notebook's cell after ``%matplotlib inline``.

        Returns:
            A figure with one plot below the other. Perplexity has a line for each evaluation set;
            what was not measured has no plot.

        Raises:
            ImportError: If matplotlib is not installed.

        Examples:
            >>> result = TrainingResult(
            ...     initial=None,
            ...     final=None,
            ...     best=None,
            ...     history=[{"step": 1, "loss": 4.5}, {"step": 2, "learning_rate": 0.0}],
            ...     global_step=2,
            ...     tokens_seen=16384,
            ...     masked_tokens_seen=3276,
            ...     seconds=1.0,
            ...     output_dir="adapted",
            ... )
            >>> [axes.get_ylabel() for axes in result.plot().axes]
            ['training loss\n(nats per masked token)', 'learning rate']
        """
        try:
            from matplotlib.figure import Figure  # noqa: PLC0415  # an optional extra
        except ImportError as error:
            raise ImportError(
                "plot draws with matplotlib, which is not installed; pip install 'mlmadapt[plot]'"
            ) from error
        names = dict.fromkeys(name for entry in self.history for name in entry)
        panels = {
            "training loss\n(nats per masked token)": ["loss"],
            "perplexity": [name for name in names if name.endswith("_perplexity")],
            "learning rate": ["learning_rate"],
        }
        panels = {title: lines for title, lines in panels.items() if names.keys() & {*lines}}
        height = max(len(panels), 1)
        figure = Figure(figsize=(7, 2.4 * height), layout="constrained")
        plots = figure.subplots(height, sharex=True, squeeze=False)[:, 0]
        for axes, (title, lines) in zip(plots, panels.items(), strict=False):
            axes.ticklabel_format(axis="y", scilimits=(-3, 5))
            for line in lines:
                points = [(entry["step"], entry[line]) for entry in self.history if line in entry]
                name = line.removesuffix("_perplexity").removeprefix("eval_")
                axes.plot(*zip(*points, strict=True), marker=".", label=name)
                values = [value for _, value in points]
                if title == "perplexity" and max(values) > 10 * min(values):
                    axes.set_yscale("log")
            axes.set_ylabel(title)
            axes.grid(alpha=0.3)
            if len(lines) > 1:
                axes.legend()
        plots[-1].set_xlabel("optimizer step")
        return figure
