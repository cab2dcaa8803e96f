"""What a run has done so far, and how it is written down and taken up again.

A checkpoint holds weights, the optimizer's moments, the schedule and these counts. Random state is
not among them: see `seeding`.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mlmadapt import checkpoints
from mlmadapt.evaluation import MaskedLMMetrics
from mlmadapt.fitting import Trained
from mlmadapt.identity import check_same_run


@dataclass
class RunState:
    """The counts of a run.

    Attributes:
        step: Optimizer steps taken.
        epoch: Whole passes over the training rows.
        epoch_step: Steps taken of the pass after them.
        tokens_seen: Tokens trained on, padding not counted, over all processes.
        masked_tokens_seen: Tokens predicted.
        seconds: Wall time before the last interruption.
        grad_norm: Of the last step, before clipping.
        skips: Steps in a row that an fp16 scaler has skipped.
        loss_sum: Loss of this process since the last entry of the history, in nats.
        loss_tokens: Masked tokens of all processes since then.
        history: What was logged.
        evaluations: Step and metrics of each evaluation of the first set.
        filled: By sentence, how the probes were filled before the first step.
    """

    step: int = 0
    epoch: int = 0
    epoch_step: int = 0
    tokens_seen: int = 0
    masked_tokens_seen: int = 0
    seconds: float = 0.0
    grad_norm: float = 0.0
    skips: int = 0
    loss_sum: float = 0.0
    loss_tokens: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    evaluations: list[tuple[int, MaskedLMMetrics]] = field(default_factory=list)
    filled: dict[str, str] = field(default_factory=dict)

    def best(self, *, since: int = 0) -> tuple[int, MaskedLMMetrics] | None:
        """Return step and metrics of the evaluation with the lowest loss, the first of equals."""
        evaluations = [each for each in self.evaluations if each[0] >= since]
        return min(evaluations, key=lambda each: each[1].loss, default=None)


def write_run(
    folder: Path,
    trained: Trained,
    state: RunState,
    *,
    identity: Mapping[str, Any],
    loss_sums: list[float],
) -> None:
    """Write a checkpoint that `read_run` takes up again and ``from_pretrained`` loads."""
    moments, optimizer = checkpoints.split_state(trained.optimizer.state_dict())
    scaler = trained.accelerator.scaler
    checkpoints.write_checkpoint(
        folder,
        state.step,
        tensors={"model": distinct(trained.model.state_dict()), "optimizer": moments},
        texts={
            "config": trained.model.config.to_dict(),
            "state": {
                "identity": identity,
                "counts": asdict(state),
                "loss_sums": loss_sums,
                "optimizer": optimizer,
                "scheduler": trained.scheduler.state_dict(),
                "scaler": None if scaler is None else scaler.state_dict(),
            },
        },
    )


def read_run(checkpoint: Path, trained: Trained, *, identity: Mapping[str, Any]) -> RunState:
    """Put a checkpoint's state into the objects of a run and return its counts.

    Raises:
        ValueError: If it is of another run.
    """
    stored = checkpoints.read_text(checkpoint, "state")
    check_same_run(stored["identity"], identity, checkpoint=checkpoint.name)
    load_weights(checkpoint, trained.model)
    moments = checkpoints.read_tensors(checkpoint, "optimizer")
    trained.optimizer.load_state_dict(checkpoints.join_state(moments, stored["optimizer"]))
    trained.scheduler.load_state_dict(stored["scheduler"])
    accelerator = trained.accelerator
    if accelerator.scaler is not None and stored["scaler"] is not None:
        accelerator.scaler.load_state_dict(stored["scaler"])
    state = RunState(**stored["counts"])
    state.evaluations = [(step, MaskedLMMetrics(**each)) for step, each in state.evaluations]  # type: ignore[arg-type]
    # Each process goes on with its own sum; another number of them, with the whole in the first.
    sums = stored["loss_sums"]
    rank, same = accelerator.process_index, len(sums) == accelerator.num_processes
    state.loss_sum = sums[rank] if same else sum(sums) if rank == 0 else 0.0
    return state


def load_weights(checkpoint: Path, model: nn.Module) -> None:
    """Load a checkpoint's weights into a model.

    Raises:
        ValueError: If they are another model's.
    """
    loaded = checkpoints.read_tensors(checkpoint, "model")
    # Tied weights are stored once and are loaded through any of their names.
    missing = sorted(set(distinct(model.state_dict())) - set(loaded))
    unknown = model.load_state_dict(loaded, strict=False).unexpected_keys
    if missing or unknown:
        raise ValueError(
            f"{checkpoint.name} lacks weights {missing[:3]} or has others {unknown[:3]}; it was "
            "made from another model"
        )


def distinct(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return each tensor once: tied weights have several names, and safetensors takes one.

    Examples:
        >>> weight = torch.zeros(2)
        >>> distinct({"embeddings": weight, "head": weight})
        {'embeddings': tensor([0., 0.])}
    """
    seen: dict[tuple[Any, ...], str] = {}
    for name, values in state.items():
        seen.setdefault((values.data_ptr(), values.shape, values.stride(), values.dtype), name)
    return {name: state[name].detach().cpu().contiguous() for name in seen.values()}
