"""The settings of a training run, checked once, where they are made."""

import inspect
import json
import math
import re
from contextlib import suppress
from dataclasses import dataclass, field
from difflib import get_close_matches
from os import PathLike
from types import NoneType
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar, get_args, get_origin, get_type_hints

if TYPE_CHECKING:
    _Checkpoint = str | Literal[True] | None
    _Arguments = dict[str, Any] | str | None
    _Names = str | list[str]
else:
    # HfArgumentParser can read nothing else; it gives "true" for True, and JSON for arguments.
    _Checkpoint = _Arguments = str | None
    _Names = str

Settings = TypeVar("Settings")
# What else than a setting does here what a setting of `TrainingArguments` does there.
_OTHERWISE_HERE = {
    "bf16": "mixed_precision='bf16'",
    "fp16": "mixed_precision='fp16'",
    "warmup_ratio": "warmup_steps, of which a value below 1 is a share of all steps",
    "optim": "an optimizer to accelerate_train",
    "remove_unused_columns": "nothing, since the collator gets all columns",
}
_LEAST = {"save_total_limit": 1, "early_stopping_patience": 1, "eval_steps": 1, "save_steps": 1}
_LEAST |= {"per_device_train_batch_size": 1, "per_device_eval_batch_size": 1}
_LEAST |= {"gradient_accumulation_steps": 1, "dataloader_num_workers": 0}


def _with_help(settings: type[Settings]) -> type[Settings]:
    """Give each field what the docstring says of it, which `HfArgumentParser` shows as help."""
    entries = re.findall(
        r"^    (\w+): (.*(?:\n {8}.*)*)", inspect.getdoc(settings) or "", re.MULTILINE
    )
    for name, text in entries:
        plain = " ".join(text.replace("`", "").replace("%", "%%").split())
        if name in vars(settings):
            setattr(settings, name, field(default=vars(settings)[name], metadata={"help": plain}))
    return settings


@dataclass(frozen=True, kw_only=True)
@_with_help
class TrainingConfig:
    """How `accelerate_train` trains.

    Names are those of transformers' `TrainingArguments`. The defaults are the recipe's (batch 64
    per process, lr 5e-5, linear schedule, 3 epochs, evaluation and saving once per epoch), and
    those of `TrainingArguments` where the recipe sets none, but for `logging_steps`.
    `HfArgumentParser` can read it.

    Args:
        output_dir: Directory of the final model.
        overwrite: Train into an `output_dir` that holds another run, and remove its checkpoints.
        resume_from_checkpoint: True for the newest whole checkpoint in `output_dir` (without one,
            the run begins at the start), or the directory of a checkpoint.
        num_train_epochs: Passes over the training rows; a fraction is allowed.
        max_steps: Optimizer steps; above 0 it takes the place of `num_train_epochs`.
        per_device_train_batch_size: Rows per process and forward pass.
        per_device_eval_batch_size: Rows per process and forward pass; no effect on the metrics.
        gradient_accumulation_steps: Forward passes per optimizer step. Tokens weigh the same,
            however the rows of a step are cut up.
        learning_rate: Peak learning rate of AdamW.
        weight_decay: Decay of weight matrices; biases and norms do not decay.
        max_grad_norm: Gradients of a step are clipped to this norm; 0 for no clipping.
        lr_scheduler_type: A name that `transformers.get_scheduler` takes. A schedule that waits for
            a metric gets the loss of the first evaluation set, after each evaluation.
        lr_scheduler_kwargs: Further arguments of that schedule, as a dict or its JSON:
            ``{"min_lr": 1e-6}`` for ``"cosine_with_min_lr"``.
        warmup_steps: Optimizer steps of warm-up; a value below 1 is a share of all steps.
        mixed_precision: ``"no"``, ``"bf16"`` or, on a GPU, ``"fp16"``; None leaves it to
            ``accelerate launch``. All runs of a process have the same.
        train_sampling_strategy: ``"random"``, or ``"group_by_length"`` for rows of mixed lengths,
            padded: those of a step are then alike in length, and steps come in random order. Single
            sentences train 1.5 times as fast. It needs a `Dataset` or a list.
        seed: Decides order, masks (unless the collator has a seed of its own) and dropout.
        eval_strategy: Evaluate each ``"epoch"``, every `eval_steps` ``"steps"``, or only before the
            first step and after the last (``"no"``).
        eval_steps: Optimizer steps between evaluations, with ``eval_strategy="steps"``.
        save_strategy: Write a checkpoint each ``"epoch"``, every `save_steps` ``"steps"``, or only
            when interrupted (``"no"``).
        save_steps: Optimizer steps between checkpoints, with ``save_strategy="steps"``.
        save_total_limit: The number of checkpoints to keep, besides the best one; None keeps all.
        load_best_model_at_end: Save the model of the best evaluation in place of the last, by the
            loss of the first set; needs evaluations and checkpoints at the same steps.
        early_stopping_patience: Stop after this many evaluations without a better one.
        gradient_checkpointing: Compute activations again in the backward pass, which takes less
            memory and about a third more time.
        torch_compile: Train with compiled code: encoder and head become a graph each. It takes a
            minute before the first step, and is for GPUs: on a CPU, a step of DistilBERT's size
            took 1.08 times as long. Evaluation stays as it is.
        logging_steps: Optimizer steps between entries of the history and the trackers, beside those
            at each evaluation; a value below 1 is a share of all steps. The default makes 50
            entries, of a short run as of a long one, where a fixed 500 steps may make none.
        report_to: Trackers by their names in Accelerate: ``"tensorboard"``, ``"trackio"``,
            ``"wandb"``, several in a list or with commas, or ``"none"``.
        dataloader_num_workers: Processes that collate ahead; 0 collates in the training process.
        disable_tqdm: Show no progress bar, and no line per evaluation.
        dataset_name: What the model card calls the training data: its name on the hub, or any
            words. The card shows only the last part of a path.
        fill_mask: Sentences with one ``[MASK]`` each; the model card shows how the model fills them
            in before and after.
        push_to_hub: Upload the model, tokenizer and card when all is saved, with the token of ``hf
            auth login`` or `HF_TOKEN`. The repository is made before the first step.
        hub_model_id: Name of the repository; by default the last part of `output_dir`.
        hub_private_repo: Whether a new repository is private; None takes the hub's default.

    Raises:
        TypeError: If a setting is not one of these; ours is named where it has another name.
        ValueError: If a value is of another type or out of range, or `load_best_model_at_end` lacks
            its checkpoints.

    Source:
        The names and defaults of transformers' documentation of `TrainingArguments`; the recipe's
        of the Hugging Face course, chapter 7.3.

    Examples:
        >>> TrainingConfig(output_dir="adapted", learning_rate=1e-4).lr_scheduler_type
        'linear'
    """

    output_dir: str = "trainer_output"
    overwrite: bool = False
    resume_from_checkpoint: _Checkpoint = None
    num_train_epochs: float = 3.0
    max_steps: int = -1
    per_device_train_batch_size: int = 64
    per_device_eval_batch_size: int = 64
    gradient_accumulation_steps: int = 1
    learning_rate: float = 5e-5
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    lr_scheduler_type: str = "linear"
    lr_scheduler_kwargs: _Arguments = None
    warmup_steps: float = 0
    mixed_precision: Literal["no", "bf16", "fp16"] | None = None
    train_sampling_strategy: Literal["random", "group_by_length"] = "random"
    seed: int = 42
    eval_strategy: Literal["no", "epoch", "steps"] = "epoch"
    eval_steps: int = 500
    save_strategy: Literal["no", "epoch", "steps"] = "epoch"
    save_steps: int = 500
    save_total_limit: int | None = None
    load_best_model_at_end: bool = False
    early_stopping_patience: int | None = None
    gradient_checkpointing: bool = False
    torch_compile: bool = False
    logging_steps: float = 0.02
    report_to: _Names = "none"
    dataloader_num_workers: int = 0
    disable_tqdm: bool = False
    dataset_name: str | None = None
    fill_mask: list[str] | None = None
    push_to_hub: bool = False
    hub_model_id: str | None = None
    hub_private_repo: bool | None = None

    def __new__(cls, **settings: Any) -> Self:
        """Name our setting where another one is passed."""
        names = [*get_type_hints(cls)]
        for name in settings.keys() - {*names}:
            ours = _OTHERWISE_HERE.get(name) or " or ".join(get_close_matches(name, names))
            raise TypeError(
                f"{name} is {settings[name]!r}, but {cls.__name__} has no {name}; pass "
                f"{ours or 'one of ' + ', '.join(names)}"
            )
        return super().__new__(cls)

    def __post_init__(self) -> None:
        if isinstance(self.report_to, list | tuple):
            object.__setattr__(self, "report_to", ",".join(self.report_to) or "none")
        # Not those of `fields`, which HfArgumentParser changes.
        for name, hint in get_type_hints(type(self)).items():
            value = getattr(self, name)
            if isinstance(value, PathLike):
                value = str(value)
                object.__setattr__(self, name, value)
            if name not in ("resume_from_checkpoint", "lr_scheduler_kwargs"):
                text = hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
                self._require(name, _fits(value, hint), f"of type {text}")
        known = isinstance(self.resume_from_checkpoint, str | bool | None)
        self._require("resume_from_checkpoint", known, "True, a directory, or None")
        for name, least in _LEAST.items():
            value = getattr(self, name)
            none = "None, or " if getattr(type(self), name) is None else ""
            self._require(name, value is None or value >= least, f"{none}{least} or more")
        for name in ("learning_rate", "weight_decay", "max_grad_norm", "warmup_steps"):
            self._require(name, 0 <= getattr(self, name) < math.inf, "a finite number, 0 or more")
        self._require("logging_steps", 0 < self.logging_steps < math.inf, "a finite number above 0")
        self._require("num_train_epochs", self.num_train_epochs > 0, "above 0")
        is_count = self.max_steps == -1 or self.max_steps > 0
        self._require("max_steps", is_count, "above 0, or -1 for whole epochs")
        arguments = self.lr_scheduler_kwargs
        if isinstance(arguments, str):
            with suppress(ValueError):
                arguments = json.loads(arguments)
        known = isinstance(arguments, dict | None)
        self._require("lr_scheduler_kwargs", known, "a dict, or JSON of one")
        object.__setattr__(self, "lr_scheduler_kwargs", arguments)
        from transformers import SchedulerType  # noqa: PLC0415  # a second to load

        schedules = [schedule.value for schedule in SchedulerType]
        known = self.lr_scheduler_type in schedules
        self._require("lr_scheduler_type", known, f"one of {schedules}")
        together = self.eval_strategy == self.save_strategy != "no"
        others = self.eval_strategy == "steps" and self.save_steps != self.eval_steps
        if self.load_best_model_at_end and (not together or others):
            raise ValueError(
                "load_best_model_at_end needs a checkpoint at each evaluation, but eval_strategy "
                f"is {self.eval_strategy!r} (eval_steps {self.eval_steps}) and save_strategy "
                f"{self.save_strategy!r} (save_steps {self.save_steps}); make them equal"
            )

    def _require(self, name: str, holds: bool, requirement: str) -> None:  # noqa: FBT001
        if not holds:
            raise ValueError(f"{name} is {getattr(self, name)!r}; it must be {requirement}")


# What people and tools read is the signature of `__init__`, not of `__new__`.
_init = inspect.signature(TrainingConfig.__init__)
TrainingConfig.__signature__ = _init.replace(  # type: ignore[attr-defined]
    parameters=[*_init.parameters.values()][1:]
)


def _fits(value: Any, hint: Any) -> bool:
    """Tell whether a value is of an annotated type; what a list holds is not looked at."""
    choices = get_args(hint)
    if get_origin(hint) is Literal:
        return value in choices
    if NoneType in choices:
        return any(_fits(value, choice) for choice in choices)
    kinds = (int, float) if hint is float else get_origin(hint) or hint
    # Python takes True for a whole number.
    return isinstance(value, kinds) and (hint is bool or not isinstance(value, bool))
