"""The story of a training run: check, prepare, evaluate, train step by step, save.

Three things set this loop apart. The loss of an optimizer step is the sum over its masked tokens
divided by their number, over all accumulated batches and processes; ``outputs.loss``, a mean a
batch, is never used. The vocabulary head runs on masked positions only. And nothing random is
remembered: order, masks and dropout come from (seed, purpose, epoch or step, process), so that a
checkpoint is weights, moments and a few counts.
"""

import logging
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object, tqdm
from torch import nn
from torch.distributed.tensor import DTensor

from mlmadapt import checkpoints
from mlmadapt.batches import Batch, BatchPlan, count_tokens, training_batches
from mlmadapt.card import write_card
from mlmadapt.config import TrainingConfig
from mlmadapt.evaluation import FrozenCollator, as_log, evaluate_rows, is_frozen, name_sets
from mlmadapt.folder import own_folder, save_model
from mlmadapt.freezing import DataCollator
from mlmadapt.hub import make_repository, push
from mlmadapt.identity import describe_run
from mlmadapt.interruption import Interruption
from mlmadapt.optimization import (
    check_scheduler,
    make_optimizer,
    make_scheduler,
    waits_for_metric,
)
from mlmadapt.prediction import SparsePrediction, masked_logits, try_sparse
from mlmadapt.preflight import check_run
from mlmadapt.probes import fill_probes
from mlmadapt.processes import (
    check_launcher,
    freeze_unused,
    is_sharded,
    leave_group_at_exit,
    make_accelerator,
    on_main_process,
    reshard,
    settle_buckets,
    start_trackers,
    synchronize,
)
from mlmadapt.result import TrainingResult
from mlmadapt.resumption import RunState, Trained, load_weights, read_run, write_run
from mlmadapt.seeding import derive_key, own_randomness
from mlmadapt.streaming import streaming_batches

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    TrainRows: TypeAlias = Dataset | IterableDataset | Sequence[Mapping[str, Any]]
    EvalRows: TypeAlias = Dataset | Sequence[Mapping[str, Any]]

logger = logging.getLogger(__name__)

# An fp16 scaler skips a step now and then to find its scale; this many in a row are a fault.
_MOST_SKIPS = 20


def accelerate_train(
    model: "PreTrainedModel",
    train_dataset: "TrainRows",
    eval_dataset: "EvalRows | Mapping[str, EvalRows] | None" = None,
    *,
    tokenizer: "PreTrainedTokenizerBase",
    data_collator: DataCollator,
    config: TrainingConfig | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
    accelerator: Accelerator | None = None,
) -> TrainingResult:
    """Adapt a masked language model to a dataset, in place, and save it.

    The same call runs under ``python``, ``torchrun`` and ``accelerate launch``. The masks of an
    epoch are a function of the seed, the epoch and the row, so batch size, workers and processes
    change the speed and never what is learned from (with our collator; those of transformers draw a
    batch at a time, which makes their masks depend on which rows share a batch).

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
        optimizer: In place of AdamW with the settings' learning rate and weight decay.
        lr_scheduler: In place of the settings' schedule, of the `optimizer` that is passed;
            stepped once an optimizer step.
        accelerator: In place of one made from the settings.

    Returns:
        Metrics before and after, and the history. The output folder holds the model, the tokenizer
        and a model card (``README.md``) of what is known here; ``huggingface_hub.ModelCard.load``
        opens it for the license and all that only you know.

    Raises:
        ValueError: If rows, tokenizer and model do not fit together, a checkpoint is of another
            run, or `push_to_hub` lacks a token.
        TypeError: If a dataset is a dict of splits.
        OSError: If `output_dir` cannot be used, is in use, or a checkpoint cannot be written; if
            the hub refuses, before the first step or when all is saved.
        RuntimeError: If a launcher started several processes and each trains alone.
        FloatingPointError: If the loss or the gradient is not finite, before the update it would
            spoil.

    Source:
        Gururangan et al. 2020, arXiv:2004.10964 (adapting to a domain before the task).

    Examples:
        >>> import tempfile
        >>> from mlmadapt import TrainingConfig, WholeWordMaskingCollator, tokenize_with_word_ids
        >>> from mlmadapt.testing import tiny_model, tiny_tokenizer
        >>> tokenizer = tiny_tokenizer()
        >>> columns = tokenize_with_word_ids({"text": ["a film", "the story"]}, tokenizer)
        >>> rows = [dict(zip(columns, row)) for row in zip(*columns.values())]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     result = accelerate_train(
        ...         tiny_model(tokenizer),
        ...         rows,
        ...         tokenizer=tokenizer,
        ...         data_collator=WholeWordMaskingCollator(tokenizer),
        ...         config=TrainingConfig(output_dir=folder, max_steps=2, disable_tqdm=True),
        ...     )
        >>> result.global_step, result.masked_tokens_seen
        (2, 4)
    """
    config = config or TrainingConfig()
    accelerator = accelerator or make_accelerator(config)
    check_launcher(accelerator)
    leave_group_at_exit()
    eval_sets = name_sets(eval_dataset)
    check_run(model, train_dataset, eval_sets, tokenizer=tokenizer, config=config)
    if config.push_to_hub:
        on_main_process(accelerator, lambda: make_repository(config))
    was_training = model.training
    with (
        own_folder(accelerator, config),
        Interruption() as interruption,
        own_randomness(accelerator.device),
    ):
        run = _Run(
            model,
            train_dataset,
            eval_sets,
            tokenizer=tokenizer,
            data_collator=data_collator,
            config=config,
            accelerator=accelerator,
        )
        try:
            run.prepare(optimizer, lr_scheduler)
            if not run.resume():
                run.evaluate()
            while not run.is_done:
                for batches, ends_epoch in _tell_last(run.epoch_batches()):
                    run.train_step(batches, stop_signal=interruption.noted)
                    if accelerator.num_processes == 1:  # several agree within the next step
                        run.stop_signal = interruption.noted
                    run.end_step(ends_epoch=ends_epoch)
                    if run.stop_signal:
                        interruption.noted = run.stop_signal
                        interruption.leave()
                    if run.is_done:
                        break
            files = run.save()
            result = run.result()
        finally:
            run.release()
            model.train(was_training)
    if config.push_to_hub:
        on_main_process(accelerator, lambda: push(config, files))
    return result


class _Run:
    """The objects of a run; what it has done so far is in `state`."""

    def __init__(
        self,
        model: "PreTrainedModel",
        train_dataset: "TrainRows",
        eval_sets: "Mapping[str, EvalRows]",
        *,
        tokenizer: "PreTrainedTokenizerBase",
        data_collator: DataCollator,
        config: TrainingConfig,
        accelerator: Accelerator,
    ) -> None:
        self.config, self.accelerator, self.state = config, accelerator, RunState()
        self.tokenizer, self.data_collator = tokenizer, data_collator
        self.train_dataset, self.eval_sets = train_dataset, eval_sets
        self.folder = Path(config.output_dir)
        self.is_stream = not hasattr(train_dataset, "__len__")
        self.plan = BatchPlan(
            rows=0 if self.is_stream else len(train_dataset),
            batch_size=config.per_device_train_batch_size,
            accumulation=config.gradient_accumulation_steps,
            seed=config.seed,
            rank=accelerator.process_index,
            world=accelerator.num_processes,
        )
        self.total_steps = config.max_steps
        if config.max_steps < 1:
            self.total_steps = math.ceil(config.num_train_epochs * self.plan.steps_per_epoch)
        self.stop_signal = 0
        self.started = time.perf_counter()

        self.bare_model = self.model = model.to(accelerator.device)
        self.own_forward = vars(model).get("forward")
        self.sparse: SparsePrediction | None = None
        self.frozen: list[nn.Parameter] = []
        self.progress = tqdm(total=self.total_steps, desc="training", disable=config.disable_tqdm)

    def prepare(
        self,
        optimizer: torch.optim.Optimizer | None,
        lr_scheduler: torch.optim.lr_scheduler.LRScheduler | None,
    ) -> None:
        """Fit the model out for training; `release` undoes it, however far this has come."""
        config, accelerator = self.config, self.accelerator
        given = {"optimizer": optimizer, "lr_scheduler": lr_scheduler}
        own = {name: type(each).__name__ for name, each in given.items() if each is not None}
        start_trackers(accelerator, config)
        probe = next(self.epoch_batches(), None)
        if probe is None:
            raise ValueError(
                "train_dataset has no rows; group_texts drops what is shorter than chunk_size"
            )
        if config.gradient_checkpointing:
            enable = getattr(  # its name from transformers 5.23 on, and before
                self.bare_model,
                "activation_checkpointing_enable",
                self.bare_model.gradient_checkpointing_enable,
            )
            enable({"use_reentrant": False})
        self.sparse = try_sparse(self.bare_model, probe[0])
        self.frozen = freeze_unused(self.bare_model, probe[0], self.sparse, accelerator)
        reshard(self.bare_model)  # the optimizer must hold the shards
        optimizer = optimizer or make_optimizer(self.bare_model, config)
        scheduler = lr_scheduler or make_scheduler(optimizer, config, self.total_steps)
        self.waits_for_metric = waits_for_metric(scheduler)
        check_scheduler(scheduler, optimizer, config, evaluation_sets=len(self.eval_sets))
        self.trained = Trained(self.bare_model, optimizer, scheduler, accelerator.scaler)
        self.identity = describe_run(
            config,
            model=self.bare_model,
            tokenizer=self.tokenizer,
            data_collator=self.data_collator,
            own=own,
            datasets={"train_dataset": self.train_dataset, **self.eval_sets},
            rows_per_step=self.plan.rows_per_step,
        )
        self.optimizer = optimizer
        if not is_sharded(self.bare_model):  # by the caller: wrapping it again would undo that
            self.model, self.optimizer = accelerator.prepare(self.bare_model, optimizer)
        self.model.train()
        settle_buckets(self.model, probe[0], self.sparse, accelerator)

    @property
    def seconds(self) -> float:
        """Wall time, that before an interruption included."""
        return self.state.seconds + time.perf_counter() - self.started

    @property
    def is_done(self) -> bool:
        """Whether all steps are taken, or further ones would not help."""
        patience, best = self.config.early_stopping_patience, self.state.best()
        if self.state.step >= self.total_steps or patience is None or best is None:
            return self.state.step >= self.total_steps
        evaluations = self.state.evaluations
        return len(evaluations) - 1 - evaluations.index(best) >= patience

    def epoch_batches(self) -> Iterator[list[Batch]]:
        """Yield the batches of each step that is left of this epoch."""
        entry = {"epoch": self.state.epoch, "start": self.state.epoch_step}
        if self.is_stream:
            return streaming_batches(self.train_dataset, self.plan, self.data_collator, **entry)
        entry["num_workers"] = self.config.dataloader_num_workers
        return training_batches(self.train_dataset, self.plan, self.data_collator, **entry)

    def train_step(self, batches: list[Batch], *, stop_signal: int) -> None:
        """Take one optimizer step, in which each masked token weighs the same on any process."""
        accelerator, state = self.accelerator, self.state
        masked, tokens, self.stop_signal = self._agree(
            sum(int((batch["labels"] != -100).sum()) for batch in batches),
            sum(count_tokens(batch) for batch in batches),
            stop_signal,
        )
        # Dropout differs by process, and is the same again after a resume.
        torch.manual_seed(derive_key(self.config.seed, "dropout", state.step, self.plan.rank))
        # DDP averages over processes, accelerate divides by its accumulation steps: undo both.
        scale = self.plan.world * accelerator.gradient_accumulation_steps / max(masked, 1)
        loss_sum = 0.0
        for place, batch in enumerate(batches):
            inputs = {name: values.to(accelerator.device) for name, values in batch.items()}
            labels = inputs.pop("labels")
            positions = labels != -100
            with synchronize(accelerator, self.model, now=place == len(batches) - 1):
                logits = masked_logits(self.model, inputs, positions, self.sparse)
                loss = nn.functional.cross_entropy(logits, labels[positions], reduction="sum")
                # An infinite loss can have a finite gradient; as NaN, all processes see it.
                finite = torch.where(loss.detach().isfinite(), 1.0, math.nan)
                accelerator.backward(loss * scale * finite)
            loss_sum += float(loss.detach())
        if masked:
            self._update(loss_sum)
        else:
            logger.warning(
                "step %d has no masked token on any process; nothing is updated", state.step
            )
        if not self.waits_for_metric:
            self.trained.scheduler.step()
        self.optimizer.zero_grad()
        state.loss_sum += loss_sum
        state.loss_tokens += masked
        state.tokens_seen += tokens
        state.masked_tokens_seen += masked
        state.step += 1
        state.epoch_step += 1
        self.progress.update()

    def _agree(self, masked: int, tokens: int, stop_signal: int) -> tuple[int, int, int]:
        """Sum the counts over all processes; a signal that one has noted is noted by all."""
        if self.plan.world == 1:
            return masked, tokens, stop_signal
        signals = [0] * self.plan.world
        signals[self.plan.rank] = stop_signal
        counts = torch.tensor([masked, tokens, *signals], device=self.accelerator.device)
        masked, tokens, *signals = self.accelerator.reduce(counts, "sum").tolist()
        return masked, tokens, max(signals)

    def _update(self, loss_sum: float) -> None:
        """Clip the gradient and step, unless something is not finite."""
        max_norm = self.config.max_grad_norm or math.inf
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), max_norm)
        self.state.grad_norm = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        self.state.skips = 0 if math.isfinite(self.state.grad_norm) else self.state.skips + 1
        if self.state.skips > (0 if self.trained.scaler is None else _MOST_SKIPS):
            raise FloatingPointError(
                f"the gradient of step {self.state.step} (epoch {self.state.epoch}) is not finite: "
                f"norm {self.state.grad_norm}, loss of this process {loss_sum}, training rows "
                f"{self._rows_of_step()}. The weights are as before the step. Lower learning_rate "
                f"({self.config.learning_rate}), or use mixed_precision='bf16' in place of 'fp16'"
            )
        self.optimizer.step()

    def _rows_of_step(self) -> str:
        start = self.state.epoch_step * self.plan.rows_per_step
        if self.is_stream:
            return f"{start} to {start + self.plan.rows_per_step - 1} of the stream"
        rows = self.plan.order(self.state.epoch)[start : start + self.plan.rows_per_step]
        return ", ".join(map(str, rows[:8])) + (
            f" and {len(rows) - 8} more" if len(rows) > 8 else ""
        )

    def end_step(self, *, ends_epoch: bool) -> None:
        """Log, evaluate and save what is due after a step."""
        config, is_last = self.config, self.state.step == self.total_steps

        def is_due(strategy: str, every: int) -> bool:
            return ends_epoch if strategy == "epoch" else not self.state.step % every

        evaluates = is_last or (
            config.eval_strategy != "no" and is_due(config.eval_strategy, config.eval_steps)
        )
        saves = config.save_strategy != "no" and (
            is_last or is_due(config.save_strategy, config.save_steps)
        )
        if evaluates or is_due("steps", config.logging_steps):
            self.log_loss()
        if evaluates:
            self.evaluate()
        if ends_epoch:
            self.state.epoch, self.state.epoch_step = self.state.epoch + 1, 0
        if saves or self.stop_signal:
            self.save_checkpoint()

    def log_loss(self) -> None:
        """Add the mean loss a masked token since the last entry to history and trackers."""
        loss = sum(gather_object([self.state.loss_sum])) / max(self.state.loss_tokens, 1)
        lr = float(self.trained.scheduler.get_last_lr()[0])
        self._log({"loss": loss, "grad_norm": self.state.grad_norm, "learning_rate": lr})
        speed = self.state.tokens_seen / self.seconds
        self.progress.set_postfix_str(f"loss={loss:.3f}, lr={lr:.1e}, {speed:,.0f} tokens/s")
        self.state.loss_sum, self.state.loss_tokens = 0.0, 0

    def evaluate(self) -> None:
        """Evaluate every set; the first is the one that the result reports."""
        for place, (name, rows) in enumerate(self.eval_sets.items()):
            collator = None if is_frozen(rows) else self.data_collator
            metrics = evaluate_rows(
                self.bare_model,
                rows,
                collate=FrozenCollator(self.tokenizer, collator, self.config.seed),
                batch_size=self.config.per_device_eval_batch_size,
                sparse=self.sparse,
                accelerator=self.accelerator,
            )
            self._log(as_log(metrics, name))
            if place == 0:
                self.state.evaluations.append((self.state.step, metrics))
                if self.waits_for_metric and self.state.step:
                    self.trained.scheduler.step(metrics.loss)  # type: ignore[arg-type]
        if not self.state.step:
            self.state.filled = self.fill_probes()

    def fill_probes(self) -> dict[str, str]:
        """Have the model fill in the masks of the probes, on every process."""
        return fill_probes(
            self.bare_model, self.config.probes, tokenizer=self.tokenizer, sparse=self.sparse
        )

    def _log(self, entry: Mapping[str, float]) -> None:
        steps_per_epoch = math.inf if self.is_stream else self.plan.steps_per_epoch
        epoch = self.state.epoch + self.state.epoch_step / steps_per_epoch
        self.state.history.append({"step": self.state.step, "epoch": epoch, **entry})
        self.accelerator.log({**entry, "epoch": epoch}, step=self.state.step)

    def save_checkpoint(self) -> None:
        """Write a checkpoint, then remove those that are not to be kept."""
        loss_sums = gather_object([self.state.loss_sum])
        state = replace(self.state, seconds=self.seconds)

        def write() -> None:
            write_run(self.folder, self.trained, state, identity=self.identity, loss_sums=loss_sums)
            checkpoints.prune(
                self.folder,
                keep=self.config.save_total_limit,
                also=self._best_checkpoint(),
                newest=state.step,
            )

        on_main_process(self.accelerator, write)

    def resume(self) -> bool:
        """Go on from a checkpoint, if the settings ask for it and there is one."""
        wanted = self.config.resume_from_checkpoint
        if not wanted:
            return False
        found: list[Path | None] = [None]

        def find() -> None:
            found[0] = checkpoints.choose(self.folder, wanted)

        on_main_process(self.accelerator, find)
        if self.plan.world > 1:
            broadcast_object_list(found)
        if found[0] is None:
            logger.warning(
                "%s holds no checkpoint; training starts from the beginning", self.folder
            )
            return False
        self.state = read_run(
            found[0],
            self.trained,
            identity=self.identity,
            rank=self.plan.rank,
            world=self.plan.world,
        )
        self.progress.update(self.state.step)
        return True

    def _best_checkpoint(self) -> int | None:
        """Return the step of the best evaluation after step 0, if the best model is wanted."""
        if not self.config.load_best_model_at_end:
            return None
        later = RunState(evaluations=[each for each in self.state.evaluations if each[0] > 0])
        best = later.best()
        return None if best is None else best[0]

    def save(self) -> list[str]:
        """Save the model, the best one where asked, tokenizer and card; return the files' names."""
        best = self._best_checkpoint()
        if best is not None and best != self.state.step:
            load_weights(self.folder / f"checkpoint-{best}", self.bare_model)
        files = save_model(self.folder, self.bare_model, self.tokenizer, self.accelerator)
        filled = self.state.filled, self.fill_probes()
        precision = self.accelerator.mixed_precision

        def write() -> None:
            write_card(
                self.folder,
                self.result(),
                model=self.bare_model,
                config=self.config,
                settings={**self.identity, "mixed_precision": precision},
                step=best or self.state.step,
                filled=filled,
            )

        on_main_process(self.accelerator, write)
        return [*files, "README.md", "curves.png"]

    def release(self) -> None:
        """Leave the model as a plain one: no hooks, no wrapper, nothing frozen."""
        self.progress.close()
        for tracker in self.accelerator.trackers if self.config.report_to != "none" else []:
            tracker.finish()
        self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        # Which takes the model's own decorators off with the wrapper of mixed precision.
        vars(self.bare_model).pop("forward", None)
        if self.own_forward is not None:
            self.bare_model.forward = self.own_forward
        if self.sparse is not None:
            self.sparse.remove()
        for parameter in self.frozen:
            parameter.requires_grad_(True)  # noqa: FBT003  # torch's signature
        self.bare_model.zero_grad()
        if self.config.gradient_checkpointing:
            disable = getattr(
                self.bare_model,
                "activation_checkpointing_disable",
                self.bare_model.gradient_checkpointing_disable,
            )
            disable()

    def result(self) -> TrainingResult:
        """Sum up."""
        metrics = [metrics for _, metrics in self.state.evaluations]
        best = self.state.best()
        return TrainingResult(
            initial=metrics[0] if metrics else None,
            final=metrics[-1] if metrics else None,
            best=None if best is None else best[1],
            history=self.state.history,
            global_step=self.state.step,
            tokens_seen=self.state.tokens_seen,
            masked_tokens_seen=self.state.masked_tokens_seen,
            seconds=self.seconds,
            output_dir=self.config.output_dir,
        )


def _tell_last(items: Iterable[Any]) -> Iterator[tuple[Any, bool]]:
    """Yield each item and whether it is the last."""
    iterator = iter(items)
    for item in iterator:
        held = item
        break
    else:
        return
    for item in iterator:
        yield held, False
        held = item
    yield held, True
