"""A run made ready, step by step, and the model given back at the end as it was.

`check_run` finds before anything is written what would otherwise fail hours later. `prepare` then
takes its steps in an order that matters; each says why it stands where it stands. Every change to
the model registers its undo, so that a failed start restores the model too.
"""

import io
import logging
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import tqdm
from torch import nn
from transformers import get_scheduler

from mlmadapt._types import Batch, DataCollator, Model, Rows, Tokenizer
from mlmadapt.data.table import as_rows
from mlmadapt.masking.collator import WholeWordMaskingCollator
from mlmadapt.masking.frozen_masks import check_masks
from mlmadapt.masking.selection import warn_of_unknown
from mlmadapt.model import checks
from mlmadapt.model.evaluation import argument_of
from mlmadapt.model.forward import MaskedForward, masked_forward
from mlmadapt.training.batches import BatchPlan, OpenStream, first_batch, lengths_to_group_by
from mlmadapt.training.config import TrainingConfig
from mlmadapt.training.distributed import check_whole
from mlmadapt.training.fingerprint import check_same_everywhere, describe_run
from mlmadapt.training.state import TrainingRun, waits_for_metric

logger = logging.getLogger(__name__)


def check_run(
    *,
    model: Model,
    train_rows: Any,
    eval_sets: Mapping[str, Any],
    tokenizer: Tokenizer,
    data_collator: DataCollator,
    config: TrainingConfig,
    accelerator: Accelerator,
    optimizer: torch.optim.Optimizer | None,
) -> None:
    """Check that rows, model, tokenizer, optimizer and settings fit together.

    Raises:
        ValueError: If they do not.
        TypeError: If one is of another kind.
    """
    precision, device = accelerator.mixed_precision, accelerator.device.type
    if config.mixed_precision not in (None, precision) or (precision, device) == ("fp16", "cpu"):
        raise ValueError(
            f"mixed_precision is {config.mixed_precision!r} and the accelerator's {precision!r} on "
            f"{device!r}; leave it at None or make both equal, on a CPU to 'bf16' or 'no'"
        )
    checks.check_model(model)
    checks.check_collator(data_collator, tokenizer)
    checks.check_tokenizer(tokenizer, model)
    if isinstance(train_rows, OpenStream):
        if config.max_steps < 1 or config.dataloader_num_workers:
            raise ValueError(
                f"train_dataset is a stream, max_steps is {config.max_steps} and dataloader_num_"
                f"workers {config.dataloader_num_workers}; give max_steps, and 0 workers"
            )
        train_rows = as_rows("train_dataset", train_rows.peek())
    for name, rows in {**eval_sets, "train_dataset": train_rows}.items():
        checks.check_rows(argument_of(name), rows, model=model)
    warn_of_unknown(train_rows, tokenizer)
    if (config.early_stopping_patience or config.load_best_model_at_end) and not eval_sets:
        raise ValueError(
            "early_stopping_patience and load_best_model_at_end go by an eval_dataset; pass one"
        )
    check_whole(model, accelerator)
    checks.check_ties(model)
    checks.check_weights(model)
    if optimizer is not None:
        checks.check_optimizer(optimizer, model)


@contextmanager
def prepare(
    *,
    model: Model,
    train_rows: Any,
    is_split: bool,
    eval_sets: Mapping[str, Rows],
    tokenizer: Tokenizer,
    data_collator: DataCollator,
    config: TrainingConfig,
    optimizer: torch.optim.Optimizer | None,
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler | None,
    accelerator: Accelerator,
) -> Iterator[TrainingRun]:
    """Give a run all that it needs for the time of a ``with`` block, and take it back after.

    Arguments are those of `accelerate_train`, checked.

    Raises:
        ValueError: If there are no rows, their lengths are not known though they are to be grouped,
            no row has a target, the collator does not mask, the model cannot be compiled, or the
            schedule would have no effect.
    """
    started = time.perf_counter()
    # Where the model lies before anything is tried, and before an optimizer takes its weights.
    model.to(accelerator.device)
    plan = BatchPlan(
        rows=0 if isinstance(train_rows, OpenStream) else len(train_rows),
        batch_size=config.per_device_train_batch_size,
        accumulation=config.gradient_accumulation_steps,
        seed=config.seed,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        lengths=lengths_to_group_by(train_rows, config),
        is_split=is_split,
        limit=checks.position_capacity(model),
    )
    all_steps = math.ceil(config.num_train_epochs * plan.steps_per_epoch)
    total_steps = config.max_steps if config.max_steps >= 1 else all_steps
    first = first_batch(train_rows, plan, data_collator)
    if not isinstance(data_collator, WholeWordMaskingCollator):
        is_target = first["labels"] != -100
        is_hidden = is_target & (first["labels"] != first["input_ids"])
        check_masks(data_collator, targets=int(is_target.sum()), hidden=int(is_hidden.sum()))
    # Of the caller's model, before hooks and wrappers are part of it.
    passed = {"optimizer": optimizer, "lr_scheduler": lr_scheduler}
    fingerprint = describe_run(
        # The launcher may have chosen the precision.
        replace(config, mixed_precision=accelerator.mixed_precision),
        model=model,
        tokenizer=tokenizer,
        data_collator=data_collator,
        replaced={name: type(made).__name__ for name, made in passed.items() if made is not None},
        datasets={"train_dataset": train_rows, **eval_sets},
        rows_per_step=plan.rows_per_step,
    )
    # Before the first pass in which the processes meet.
    check_same_everywhere({**asdict(config), **fingerprint})
    with ExitStack() as undo:
        undo.enter_context(giving_back(model, accelerator))
        if config.gradient_checkpointing:
            undo.enter_context(gradient_checkpointing(model))
        columns = set(first).union(*(rows[0] for rows in eval_sets.values()))
        is_packed = not columns.isdisjoint({"document_ids", "masked_document_ids"})
        # Hooks go to the model itself, which is evaluated too, not to what wraps it.
        forward = undo.enter_context(masked_forward(model, first, is_packed=is_packed))
        torch.compiler.reset()  # whoever holds code that was compiled without the hooks
        if accelerator.num_processes > 1:
            undo.enter_context(without_unused_weights(model, first, forward))
        # Behind all that decides which weights are trained.
        optimizer = optimizer or make_optimizer(model, config)
        scheduler = lr_scheduler or make_scheduler(optimizer, config, total_steps)
        check_scheduler(scheduler, optimizer, config, evaluation_sets=len(eval_sets))
        wrapped, optimizer = accelerator.prepare(model, optimizer)
        wrapped.train()
        run = TrainingRun(
            config=config,
            model=model,
            tokenizer=tokenizer,
            data_collator=data_collator,
            train_rows=train_rows,
            eval_sets=eval_sets,
            accelerator=accelerator,
            plan=plan,
            total_steps=total_steps,
            fingerprint=fingerprint,
            wrapped=wrapped,
            forward=forward,
            optimizer=optimizer,
            scheduler=scheduler,
            progress=undo.enter_context(
                tqdm(total=total_steps, desc="training", disable=config.disable_tqdm)
            ),
            started=started,
        )
        warm_up(run, first)
        yield run


@contextmanager
def giving_back(model: Model, accelerator: Accelerator) -> Iterator[None]:
    """Give a model back as it was: its mode, its forward pass, and no gradients."""
    was_training, forward = model.training, vars(model).get("forward")
    compiled = model._compiled_call_impl  # noqa: SLF001  # torch has no way back
    # Or the model would live as long as an accelerator of the caller's.
    held = {name: list(getattr(accelerator, name)) for name in ("_models", "_optimizers")}
    try:
        yield
    finally:
        model._compiled_call_impl = compiled  # noqa: SLF001
        accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        # Which takes the model's own decorators off with the wrapper of mixed precision.
        vars(model).pop("forward", None)
        if forward is not None:
            vars(model)["forward"] = forward
        vars(accelerator).update(held)
        model.zero_grad()
        model.train(was_training)


@contextmanager
def gradient_checkpointing(model: Model) -> Iterator[None]:
    """Compute activations again in the backward pass."""
    # Its name from transformers 5.23 on, and before.
    is_new = hasattr(model, "activation_checkpointing_enable")
    name = "activation_checkpointing" if is_new else "gradient_checkpointing"
    getattr(model, f"{name}_enable")({"use_reentrant": False})
    try:
        yield
    finally:
        getattr(model, f"{name}_disable")()


@contextmanager
def without_unused_weights(model: Model, batch: Batch, forward: MaskedForward) -> Iterator[None]:
    """Leave weights out that no step reaches, poolers mostly, whose gradients DDP would wait for.

    Its own search for them takes a reduction and a copy from the device in each step: 8 % of a step
    at 3 M parameters on two CPU processes, 0.4 % at 14 M.
    """
    forward.touch_gradients(model, batch, torch.Tensor.backward)
    unused = [w for w in model.parameters() if w.requires_grad and w.grad is None]
    model.zero_grad()
    for weight in unused:
        weight.requires_grad = False
    try:
        yield
    finally:
        for weight in unused:
            weight.requires_grad = True


def warm_up(run: TrainingRun, batch: Batch) -> None:
    """Make the passes that decide how all others are computed, by the same batch after a resume.

    DDP rebuilds its buckets once, after the first backward pass, which changes the order of sums:
    from three processes on, the first step after a resume would differ in the last bits. Compiled
    code is made for any shape; that of one shape, and then of others, would differ with the batches
    that come first.

    Raises:
        ValueError: If the model cannot be compiled.
    """
    compiles = run.config.torch_compile
    try:
        if compiles:
            run.model.compile(dynamic=True)
        for _ in range(2 if run.plan.world > 1 else int(compiles)):
            run.forward.touch_gradients(run.wrapped, batch, run.accelerator.backward)
    except Exception as error:
        if not compiles:
            raise
        raise ValueError(
            f"torch_compile is True, but the model cannot be compiled ({type(error).__name__}: "
            f"{str(error)[:300]}); leave it at False, or compile the model yourself before the "
            "call, with another backend"
        ) from error
    run.model.zero_grad()


def check_scheduler(
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    optimizer: torch.optim.Optimizer,
    config: TrainingConfig,
    *,
    evaluation_sets: int,
) -> None:
    """Check that a schedule, the caller's perhaps, will have an effect and can be stored.

    Raises:
        ValueError: If it is of another optimizer, waits for evaluations that do not come, or holds
            what a checkpoint cannot.
    """
    if scheduler.optimizer is not optimizer:
        raise ValueError(
            "lr_scheduler sets the learning rate of an optimizer that is not the one passed; pass "
            "that one as optimizer, or leave lr_scheduler out"
        )
    buffer = io.BytesIO()
    try:
        torch.save([optimizer.state_dict(), scheduler.state_dict()], buffer)
        torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
    except Exception as error:  # of whatever cannot be pickled, or holds code
        raise ValueError(
            f"optimizer or lr_scheduler holds what no checkpoint can ({str(error)[:200]}); give it "
            "numbers, strings, lists, dicts and tensors"
        ) from error
    if waits_for_metric(scheduler) and (not evaluation_sets or config.eval_strategy == "no"):
        raise ValueError(
            f"the schedule ({type(scheduler).__name__}) goes by evaluations, but there are none "
            f"(eval_strategy {config.eval_strategy!r}, {evaluation_sets} sets); pass eval_dataset, "
            "or choose another lr_scheduler_type"
        )


def make_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    """Return AdamW that decays weight matrices and embeddings, not biases and norms."""
    parameters = [weight for weight in model.parameters() if weight.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    # One kernel over all parameters: a fifth of the time of a loop on a CPU. And it can leave out a
    # step that would spoil them without asking the host.
    fused = all(p.device.type in ("cpu", "cuda") for p in parameters)
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
        return get_scheduler(  # type: ignore[no-any-return]
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
