"""What a run leaves behind for its caller."""

from dataclasses import dataclass

from mlmadapt.evaluation import MaskedLMMetrics


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingResult:
    """What came of a run.

    Attributes:
        initial: Metrics of the first evaluation set before the first step; None without one.
        final: The same after the last step.
        best: The lowest loss of that set at any evaluation.
        history: What was logged, in order: ``step``, ``epoch``, and ``loss``, ``learning_rate``,
            ``grad_norm`` or ``eval_loss``, ``eval_perplexity``, ... as `Trainer` names them.
        global_step: Optimizer steps.
        tokens_seen: Tokens trained on, padding not counted, over all processes.
        masked_tokens_seen: Tokens predicted.
        seconds: Wall time of training and evaluation, that before an interruption included.
        output_dir: Where model and tokenizer lie.

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
