"""A model fitted out for training, and afterwards as it was.

Whatever is done to it registers how it is undone, so that a run that fails half-way through its
beginning gives the model back as well as one that ends.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from torch import nn

from mlmadapt.batches import Batch
from mlmadapt.config import TrainingConfig
from mlmadapt.optimization import check_scheduler, make_optimizer, make_scheduler
from mlmadapt.prediction import SparsePrediction, try_sparse
from mlmadapt.processes import freeze_unused, is_sharded, reshard, settle_buckets

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Trained:
    """The objects that a step changes or needs.

    Attributes:
        model: The caller's, which is evaluated and saved.
        wrapped: The same, in what averages gradients and lowers precision: for training only.
        sparse: The model's handle, or None where its full head runs.
        optimizer: Skips the steps that an fp16 scaler gives up.
        scheduler: Of this optimizer.
        accelerator: Knows device, processes and precision.
    """

    model: "PreTrainedModel"
    wrapped: nn.Module
    sparse: SparsePrediction | None
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    accelerator: Accelerator


@contextmanager
def fit_out(
    model: "PreTrainedModel",
    probe: Batch,
    optimizer: torch.optim.Optimizer | None,
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler | None,
    *,
    config: TrainingConfig,
    accelerator: Accelerator,
    total_steps: int,
    evaluation_sets: int,
) -> Iterator[Trained]:
    """Give a model all that training takes for the time of a ``with`` block.

    Args:
        model: A masked language model on its device.
        probe: A training batch, to see what the model allows.
        optimizer: In place of the settings'.
        lr_scheduler: In place of the settings'.
        config: The settings.
        accelerator: Wraps model and optimizer.
        total_steps: At which the schedule ends.
        evaluation_sets: How many there are, for a schedule that goes by them.

    Raises:
        ValueError: If the schedule would have no effect.
    """
    with ExitStack() as undo:
        was_training, own_forward = model.training, vars(model).get("forward")
        undo.callback(model.train, was_training)
        undo.callback(model.zero_grad)
        if config.gradient_checkpointing:
            # Its name from transformers 5.23 on, and before.
            new = hasattr(model, "activation_checkpointing_enable")
            name = "activation_checkpointing" if new else "gradient_checkpointing"
            getattr(model, f"{name}_enable")({"use_reentrant": False})
            undo.callback(getattr(model, f"{name}_disable"))
        sparse = try_sparse(model, probe)
        if sparse is not None:
            undo.callback(sparse.remove)
        for parameter in freeze_unused(model, probe, sparse, accelerator):
            undo.callback(parameter.requires_grad_, True)  # noqa: FBT003  # torch's signature
        reshard(model)  # the optimizer must hold the shards
        optimizer = optimizer or make_optimizer(model, config)
        scheduler = lr_scheduler or make_scheduler(optimizer, config, total_steps)
        check_scheduler(scheduler, optimizer, config, evaluation_sets=evaluation_sets)
        wrapped: nn.Module = model
        undo.callback(_unwrap, model, own_forward, accelerator)
        if not is_sharded(model):  # by the caller: wrapping it again would undo that
            wrapped, optimizer = accelerator.prepare(model, optimizer)
        wrapped.train()
        settle_buckets(wrapped, probe, sparse, accelerator)
        yield Trained(model, wrapped, sparse, optimizer, scheduler, accelerator)


def _unwrap(model: "PreTrainedModel", own_forward: object, accelerator: Accelerator) -> None:
    accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    # Which takes the model's own decorators off with the wrapper of mixed precision.
    vars(model).pop("forward", None)
    if own_forward is not None:
        vars(model)["forward"] = own_forward
