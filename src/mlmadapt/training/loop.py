"""The story of a training run: check, prepare, evaluate, train step by step, save; and its step.

The loss of a step is the sum over its masked tokens divided by their number, over all accumulated
batches and all processes. ``outputs.loss`` is a mean per batch, in which a token weighs more the
fewer its batch has; it is never used. Nothing random is remembered: order, masks and dropout come
from (seed, purpose, epoch or step, process), so that a checkpoint is weights, moments and counts.

The host never waits for the device within a step. What the device finds out, the loss and the norm
of the gradient, is read a step later, while the next one runs. So it is the device that leaves out
an update that a gradient would spoil, and all after it; `flush` then tells which step it was.
"""

import logging
import math
from collections.abc import Mapping  # noqa: TC003  # for those who ask for the types
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from mlmadapt._types import Batch, DataCollator, Model, Row, Rows, Stream, Tokenizer
from mlmadapt.data.rows import to_columns
from mlmadapt.data.table import is_frozen
from mlmadapt.masking.frozen_masks import insert_random_mask
from mlmadapt.masking.selection import derive_key
from mlmadapt.model.evaluation import as_log, collate_frozen, evaluate_rows, name_sets
from mlmadapt.model.head import summed_cross_entropy
from mlmadapt.training import checkpoint
from mlmadapt.training.batches import count_tokens, open_rows
from mlmadapt.training.config import TrainingConfig
from mlmadapt.training.distributed import (
    Signals,
    join_group,
    make_accelerator,
    on_main_process,
    split_stream,
    total,
)
from mlmadapt.training.hub import make_repository, push
from mlmadapt.training.model_card import check_sentences, fill_masks, write_model_card
from mlmadapt.training.prepare import check_run, prepare
from mlmadapt.training.result import TrainingResult
from mlmadapt.training.state import PendingStep, TrainingRun, waits_for_metric
from mlmadapt.training.tracking import log, log_loss, show_metrics, show_step, tracking

logger = logging.getLogger(__name__)

# An fp16 scaler skips a step now and then to find its scale; this many in a row are a fault.
_MOST_SKIPS = 20


def accelerate_train(  # noqa: C901, PLR0912  # the whole story on one screen
    model: Model,
    train_dataset: "Rows | Stream",
    eval_dataset: "Rows | Mapping[str, Rows] | None" = None,
    *,
    tokenizer: Tokenizer,
    data_collator: DataCollator,
    config: TrainingConfig | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
    accelerator: Accelerator | None = None,
) -> TrainingResult:
    """Adapt a masked language model to a dataset, in place, and save it.

    The same call runs under ``python``, ``torchrun`` and ``accelerate launch``. The masks of an
    epoch are a function of the seed, the epoch and the row, so batch size, workers and processes
    change the speed and never what is learned from; only dropout depends on them. (With our
    collator; those of transformers draw per batch, so that their masks depend on which rows share a
    batch.)

    SIGTERM and Ctrl-C finish the step, write a checkpoint and leave; with
    ``resume_from_checkpoint=True`` the same call goes on and ends, bit for bit on one machine,
    where it would have ended.

    Args:
        model: A masked language model of transformers, or a PEFT model of one (its adapter is
            saved).
        train_dataset: Rows as `data_collator` wants them, each column of shape ``(sequence,)``; a
            stream (`IterableDataset`) needs ``max_steps``.
        eval_dataset: Rows from `insert_random_mask`, taken as they are, or rows like the training
            ones, which are frozen with `data_collator`; a dict names several sets, and the first is
            the one that `TrainingResult`, the best model and early stopping go by.
        tokenizer: Saved beside the model, and pads evaluation rows.
        data_collator: `WholeWordMaskingCollator`, or another library's.
        config: Settings; `TrainingConfig()` by default.
        optimizer: In place of AdamW with the settings' learning rate and weight decay. Before each
            update of one that is not fused (``fused=True``), the host waits for the device.
        lr_scheduler: In place of the settings' schedule. It must be one of the `optimizer` that is
            passed, and takes a step with each optimizer step.
        accelerator: In place of one made from the settings.

    Returns:
        Metrics before and after, and the history. The output folder holds the model, the tokenizer
        and a model card (``README.md``) of what is known here; ``huggingface_hub.ModelCard.load``
        opens it for the license and all that only you know.

    Raises:
        ValueError: If rows, tokenizer and model do not fit together, a checkpoint is of another
            run, or `push_to_hub` lacks a token.
        TypeError: If an argument is of another kind, such as a dict of splits, or an evaluation set
            has no length.
        OSError: If `output_dir` cannot be used, is in use, or a checkpoint cannot be written or is
            not there; if the hub refuses, before the first step or when all is saved.
        RuntimeError: If a launcher started several processes and each trains alone.
        FloatingPointError: If the loss or the gradient is not finite; raised before the update that
            it would spoil.

    Source:
        Gururangan et al. 2020, arXiv:2004.10964 (adapting to a domain before the task).

    Examples:
        >>> import tempfile
        >>> from mlmadapt import TrainingConfig, WholeWordMaskingCollator
        >>> from mlmadapt.testing import tiny_model, tiny_rows, tiny_tokenizer
        >>> tokenizer = tiny_tokenizer()
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     result = accelerate_train(
        ...         tiny_model(tokenizer),
        ...         tiny_rows(tokenizer, ["a film", "the story"]),
        ...         tokenizer=tokenizer,
        ...         data_collator=WholeWordMaskingCollator(tokenizer),
        ...         config=TrainingConfig(output_dir=folder, max_steps=2, disable_tqdm=True),
        ...     )
        >>> result.global_step, result.masked_tokens_seen
        (2, 4)
    """
    config = TrainingConfig() if config is None else config
    if not isinstance(config, TrainingConfig):
        raise TypeError(
            f"config is a {type(config).__name__}; it must be a TrainingConfig, whose settings are "
            "called as those of TrainingArguments: TrainingConfig(output_dir=...)"
        )
    accelerator = accelerator or make_accelerator(config)
    join_group(accelerator)
    train_dataset, is_split = split_stream(train_dataset, accelerator)
    arguments: dict[str, Any] = {
        "model": model,
        "train_rows": open_rows(train_dataset),
        "eval_sets": name_sets(eval_dataset),
        "tokenizer": tokenizer,
        "data_collator": data_collator,
        "config": config,
        "accelerator": accelerator,
    }
    check_run(**arguments, optimizer=optimizer)
    check_sentences(config.fill_mask or [], tokenizer, model)
    if config.push_to_hub:
        on_main_process(accelerator, partial(make_repository, config))
    with (
        checkpoint.hold_output_dir(accelerator, config),
        Signals() as signals,
        # Dropout is seeded; the caller's generators are put back.
        torch.random.fork_rng([accelerator.device] if accelerator.device.type == "cuda" else []),
        prepare(
            **arguments, is_split=is_split, optimizer=optimizer, lr_scheduler=lr_scheduler
        ) as run,
        # Last of all, since some trackers begin with files in the output directory.
        tracking(accelerator, config),
    ):
        if not resume(run):
            evaluate(run)
        while not run.is_done:
            for batches, ends in run.batches():
                # The parts of a stream go on, with fillers, until all are at their end.
                ends_epoch = all(gather_object([ends])) if run.plan.is_split else ends
                take_step(run, batches, stop_signal=signals.noted)
                logs, evaluates, saves = run.due(ends_epoch=ends_epoch)
                # Read behind the device, unless something is to be told now.
                flush(run, leave=0 if logs or saves or run.state.step == 1 else 1)
                # Several processes agree in the steps that follow.
                stop_signal = run.stop_signal if accelerator.num_processes > 1 else signals.noted
                if stop_signal:
                    flush(run)
                show_step(run)
                if logs:
                    log_loss(run)
                if evaluates:
                    evaluate(run)
                if ends_epoch:
                    run.state.epoch, run.state.epoch_step = run.state.epoch + 1, 0
                if saves or stop_signal:
                    save_checkpoint(run)
                if stop_signal:
                    signals.leave(stop_signal)
                if ends_epoch or run.is_done:
                    break
        files = save(run)
        result = run.result()
    if config.push_to_hub:
        on_main_process(accelerator, partial(push, config, files))
    return result


def resume(run: TrainingRun) -> bool:
    """Go on from a checkpoint, if the settings ask for it and there is one."""
    wanted = run.config.resume_from_checkpoint
    if not wanted:
        return False
    paths = checkpoint.find_wanted(run.folder, wanted)
    chosen = on_main_process(run.accelerator, partial(checkpoint.choose, paths, run.fingerprint))
    if chosen is None:
        logger.warning("%s holds no checkpoint; training starts from the beginning", run.folder)
        return False
    checkpoint.read_run(chosen, run)
    if run.config.load_best_model_at_end:
        on_main_process(run.accelerator, partial(checkpoint.bring_best, chosen, run))
    run.progress.update(run.state.step)
    return True


def evaluate(run: TrainingRun) -> None:
    """Evaluate every set; the first is the one that the result reports."""
    metrics_by_set = {}
    for name, rows in run.eval_sets.items():
        collate = partial(collate_frozen, tokenizer=run.tokenizer)
        if not is_frozen(rows):
            collate = partial(collate_unfrozen, run=run)
        with in_eager_mode(run):
            metrics_by_set[name] = metrics = evaluate_rows(
                run.model,
                rows,
                collate=collate,
                batch_size=run.config.per_device_eval_batch_size,
                forward=run.forward,
                accelerator=run.accelerator,
            )
        log(run, as_log(metrics, name))
        if len(metrics_by_set) == 1:
            run.state.evaluations.append((run.state.step, metrics))
            if run.state.step and waits_for_metric(run.scheduler):
                run.scheduler.step(metrics.loss)  # type: ignore[arg-type]
    show_metrics(run, metrics_by_set)
    if not run.state.step:
        run.state.filled = fill_in(run)


def collate_unfrozen(rows: list[Row], *, run: TrainingRun) -> Batch:
    """Freeze rows on the way into a batch, to the same masks at every evaluation."""
    columns = insert_random_mask(
        to_columns(rows), run.data_collator, seed=run.config.seed, prefix=""
    )
    return collate_frozen(columns, run.tokenizer)


def fill_in(run: TrainingRun) -> dict[str, str]:
    """Have the model fill in the masks of the settings' sentences."""
    sentences = run.config.fill_mask or []
    fill = partial(fill_masks, run.model, sentences, tokenizer=run.tokenizer)
    with in_eager_mode(run):
        return on_main_process(run.accelerator, fill)


def in_eager_mode(run: TrainingRun) -> AbstractContextManager[object]:
    """Leave compiled code aside: rows to evaluate have many shapes, and figures stay the same."""
    is_compiled = run.config.torch_compile
    return torch.compiler.set_stance("force_eager") if is_compiled else nullcontext()


def save_checkpoint(run: TrainingRun) -> None:
    """Write a checkpoint, then remove those that are not to be kept."""
    loss_sums = gather_object([run.state.loss_sum])
    on_main_process(run.accelerator, partial(checkpoint.write_run, run, loss_sums=loss_sums))


def save(run: TrainingRun) -> list[str]:
    """Save the model, the best one where asked, tokenizer and card; return the files' names."""
    if run.saved_step != run.state.step:
        checkpoint.load_best(run)
    files = checkpoint.save_model(run)
    filled = fill_in(run)
    on_main_process(run.accelerator, partial(write_model_card, run, filled=filled))
    return [*files, "README.md", "curves.png"]


def take_step(run: TrainingRun, batches: list[Batch], *, stop_signal: int) -> None:
    """Have the device take one optimizer step, and count it."""
    accelerator, plan, state = run.accelerator, run.plan, run.state
    counts = total(
        accelerator,
        sum(int((batch["labels"] != -100).sum()) for batch in batches),
        sum(count_tokens(batch) for batch in batches),
        stop_signal,
    )
    masked = counts[0]
    # Dropout differs by process, and is the same again after a resume.
    torch.manual_seed(derive_key(run.config.seed, "dropout", state.step, plan.rank))
    # DDP averages over processes, accelerate divides by its accumulation steps: undo both.
    scale = plan.world * accelerator.gradient_accumulation_steps / masked.clamp(min=1)
    losses = []
    for number, batch in enumerate(batches, start=1):
        is_last = number == len(batches)  # which averages gradients over the processes
        with nullcontext() if is_last else accelerator.no_sync(run.wrapped):
            logits, targets = run.forward(run.wrapped, batch, rounded=True)
            loss = summed_cross_entropy(logits, targets)
            losses.append(loss.detach())
            # An infinite loss can have a finite gradient; as NaN, all processes see it.
            accelerator.backward(loss * scale * (1 + losses[-1] * 0))
    norm = accelerator.clip_grad_norm_(
        run.wrapped.parameters(), run.config.max_grad_norm or math.inf
    )
    is_spoiled = ~norm.isfinite()
    for earlier in run.pending:
        is_spoiled |= earlier.is_spoiled
    values, place = torch.stack([*losses, norm]), (state.step, state.epoch, state.epoch_step)
    run.pending.append(PendingStep(*place, values, counts, is_spoiled))
    _update(run, is_spoiled, masked)
    if not waits_for_metric(run.scheduler):
        run.scheduler.step()
    run.model.zero_grad()  # not the optimizer's, which may hold a part of them
    state.step += 1
    state.epoch_step += 1


def _update(run: TrainingRun, is_spoiled: torch.Tensor, masked: torch.Tensor) -> None:
    """Take the optimizer's step, unless a gradient would spoil it or no token is masked."""
    inner: Any = getattr(run.optimizer, "optimizer", run.optimizer)  # below accelerate's
    # A fused one leaves out a step by a flag on the device, as torch's scaler has it do.
    if getattr(inner, "_step_supports_amp_scaling", False) and run.accelerator.scaler is None:
        inner.grad_scale, inner.found_inf = None, (is_spoiled | (masked == 0)).float()
        try:
            run.optimizer.step()
        finally:
            del inner.grad_scale, inner.found_inf
        return
    flush(run)  # for any other, the host has to know
    if masked > 0:
        run.optimizer.step()


def flush(run: TrainingRun, *, leave: int = 0) -> None:
    """Read what the pending steps came to.

    Args:
        run: The run.
        leave: So many of the last steps may go on.

    Raises:
        FloatingPointError: If the loss or the gradient is not finite, on all processes. The weights
            are as they were before that step.
    """
    state, config = run.state, run.config
    while len(run.pending) > leave:
        pending = run.pending.popleft()
        (*losses, state.grad_norm), (masked, tokens, *signals) = pending.read()
        run.stop_signal = max(run.stop_signal, *signals)
        state.loss_sum += sum(losses)
        state.loss_tokens += masked
        state.tokens_seen += tokens
        state.masked_tokens_seen += masked
        state.skips = 0 if math.isfinite(state.grad_norm) else state.skips + 1
        if not masked:
            logger.warning(
                "step %d has no masked token on any process; nothing is updated", pending.step
            )
        if state.skips > (0 if run.accelerator.scaler is None else _MOST_SKIPS):
            raise FloatingPointError(
                f"the gradient of step {pending.step} (epoch {pending.epoch}) is not finite: "
                f"norm {state.grad_norm}, loss of this process {sum(losses)}, training rows "
                f"{run.plan.rows_of_step(pending.epoch, pending.epoch_step)}. The weights are as "
                f"before the step. Lower learning_rate ({config.learning_rate}), or use "
                "mixed_precision='bf16' in place of 'fp16'"
            )
