"""The optimizer and the schedule that the settings ask for."""

import inspect
import math
from typing import Any

import torch
from torch import nn
from transformers import get_scheduler

from mlmadapt.config import TrainingConfig


def make_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    """Return AdamW that decays weight matrices and embeddings, not biases and norms."""
    parameters = [each for each in model.parameters() if each.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    # One kernel over all parameters: a fifth of the time of a loop on a CPU.
    fused = all(type(p) is nn.Parameter and p.device.type in ("cpu", "cuda") for p in parameters)
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=config.learning_rate, fused=fused or None
    )


def make_scheduler(
    optimizer: torch.optim.Optimizer, config: TrainingConfig, total_steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """Return the schedule, with its warm-up in steps.

    Raises:
        ValueError: If the schedule needs other arguments than ``lr_scheduler_kwargs``.

    Examples:
        >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        >>> make_scheduler(optimizer, TrainingConfig(warmup_steps=0.5), 4).get_last_lr()
        [0.0]
    """
    warmup = config.warmup_steps
    arguments: Any = config.lr_scheduler_kwargs or {}
    try:
        scheduler: torch.optim.lr_scheduler.LRScheduler = get_scheduler(
            config.lr_scheduler_type,
            optimizer,
            num_warmup_steps=math.ceil(warmup * total_steps) if warmup < 1 else int(warmup),
            num_training_steps=total_steps,
            scheduler_specific_kwargs=arguments,
        )
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"lr_scheduler_kwargs is {config.lr_scheduler_kwargs!r}, which lr_scheduler_type "
            f"{config.lr_scheduler_type!r} does not take: {error}"
        ) from error
    return scheduler


def waits_for_metric(scheduler: torch.optim.lr_scheduler.LRScheduler) -> bool:
    """Tell whether a schedule goes by evaluations (`ReduceLROnPlateau`), not by steps."""
    return "metrics" in inspect.signature(scheduler.step).parameters


def check_scheduler(
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    optimizer: torch.optim.Optimizer,
    config: TrainingConfig,
    *,
    evaluation_sets: int,
) -> None:
    """Check that a schedule, the caller's perhaps, will have an effect.

    Raises:
        ValueError: If it is of another optimizer, or waits for evaluations that do not come.
    """
    if scheduler.optimizer is not optimizer:
        raise ValueError(
            "lr_scheduler sets the learning rate of an optimizer that is not the one passed; pass "
            "that one as optimizer, or leave lr_scheduler out"
        )
    if waits_for_metric(scheduler) and (not evaluation_sets or config.eval_strategy == "no"):
        raise ValueError(
            f"the schedule ({type(scheduler).__name__}) goes by evaluations, but there are none "
            f"(eval_strategy {config.eval_strategy!r}, {evaluation_sets} sets); pass eval_dataset, "
            "or choose another lr_scheduler_type"
        )
