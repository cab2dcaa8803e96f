"""The story of a training run: check, prepare, evaluate, train step by step, save.

What a step is stands in `steps`, what is done to the model for it in `fitting`. Nothing random is
remembered: order, masks and dropout come from (seed, purpose, epoch or step, process), so that a
checkpoint is weights, moments and a few counts.
"""

import logging
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, tqdm

from mlmadapt import checkpoints
from mlmadapt.batches import Batch, BatchPlan, training_batches
from mlmadapt.card import write_card
from mlmadapt.config import TrainingConfig
from mlmadapt.evaluation import FrozenCollator, as_log, evaluate_rows, is_frozen, name_sets
from mlmadapt.fitting import fit_out
from mlmadapt.folder import own_folder, save_model
from mlmadapt.freezing import DataCollator
from mlmadapt.hub import make_repository, push
from mlmadapt.identity import describe_run
from mlmadapt.interruption import Interruption
from mlmadapt.optimization import waits_for_metric
from mlmadapt.preflight import check_run
from mlmadapt.probes import fill_probes
from mlmadapt.processes import (
    check_launcher,
    leave_group_at_exit,
    make_accelerator,
    on_main_process,
    tracking,
)
from mlmadapt.result import TrainingResult
from mlmadapt.resumption import RunState, load_weights, read_run, write_run
from mlmadapt.steps import take_step
from mlmadapt.streaming import streaming_batches

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    TrainRows: TypeAlias = Dataset | IterableDataset | Sequence[Mapping[str, Any]]
    EvalRows: TypeAlias = Dataset | Sequence[Mapping[str, Any]]

logger = logging.getLogger(__name__)


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
        TypeError: If a dataset is a dict of splits, or an evaluation set has no length.
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
    with (
        own_folder(accelerator, config),
        Interruption() as interruption,
        # Dropout is seeded; the caller's generators are put back.
        torch.random.fork_rng([accelerator.device] if accelerator.device.type == "cuda" else []),
    ):
        run = _Run(model, train_dataset, eval_sets, tokenizer, data_collator, config, accelerator)
        with run.prepared(optimizer, lr_scheduler):
            if not run.resume():
                run.evaluate()
            while not run.is_done:
                run.train_epoch(interruption)
            files = run.save()
            result = run.result()
    if config.push_to_hub:
        on_main_process(accelerator, lambda: push(config, files))
    return result


@dataclass
class _Run:
    """The objects of a run; what it has done so far is in `state`."""

    model: "PreTrainedModel"
    train_dataset: "TrainRows"
    eval_sets: "Mapping[str, EvalRows]"
    tokenizer: "PreTrainedTokenizerBase"
    data_collator: DataCollator
    config: TrainingConfig
    accelerator: Accelerator

    def __post_init__(self) -> None:
        config, accelerator, self.state = self.config, self.accelerator, RunState()
        self.folder = Path(config.output_dir)
        self.is_stream = not hasattr(self.train_dataset, "__len__")
        self.plan = BatchPlan(
            rows=0 if self.is_stream else len(self.train_dataset),
            batch_size=config.per_device_train_batch_size,
            accumulation=config.gradient_accumulation_steps,
            seed=config.seed,
            rank=accelerator.process_index,
            world=accelerator.num_processes,
        )
        self.total_steps = config.max_steps
        if config.max_steps < 1:
            self.total_steps = math.ceil(config.num_train_epochs * self.plan.steps_per_epoch)
        self.started = time.perf_counter()
        self.model.to(accelerator.device)

    @contextmanager
    def prepared(
        self,
        optimizer: torch.optim.Optimizer | None,
        lr_scheduler: torch.optim.lr_scheduler.LRScheduler | None,
    ) -> Iterator[None]:
        """Have all that training takes at hand, and let go of it in the end."""
        config, accelerator = self.config, self.accelerator
        given = {"optimizer": optimizer, "lr_scheduler": lr_scheduler}
        bar = tqdm(total=self.total_steps, desc="training", disable=config.disable_tqdm)
        with tracking(accelerator, config), bar as self.progress:
            probe = next(self.epoch_batches(), None)
            if probe is None:
                raise ValueError(
                    "train_dataset has no rows; group_texts drops what is shorter than chunk_size"
                )
            self.identity = describe_run(
                config,
                model=self.model,
                tokenizer=self.tokenizer,
                data_collator=self.data_collator,
                own={name: type(each).__name__ for name, each in given.items() if each is not None},
                datasets={"train_dataset": self.train_dataset, **self.eval_sets},
                rows_per_step=self.plan.rows_per_step,
            )
            with fit_out(
                self.model,
                probe[0],
                optimizer,
                lr_scheduler,
                config=config,
                accelerator=accelerator,
                total_steps=self.total_steps,
                evaluation_sets=len(self.eval_sets),
            ) as self.trained:
                yield

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

    def train_epoch(self, interruption: Interruption) -> None:
        """Train until the epoch or the run ends, or leave where a signal was noted."""
        for batches, ends_epoch in _tell_last(self.epoch_batches()):
            stop_signal = take_step(
                self.trained,
                batches,
                self.state,
                plan=self.plan,
                config=self.config,
                stop_signal=interruption.noted,
            )
            self.progress.update()
            if self.plan.world == 1:  # several agree within the next step
                stop_signal = interruption.noted
            self.end_step(ends_epoch=ends_epoch, stops=bool(stop_signal))
            if stop_signal:
                interruption.noted = stop_signal
                interruption.leave()
            if self.is_done:
                break

    def end_step(self, *, ends_epoch: bool, stops: bool) -> None:
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
        if saves or stops:
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
                self.model,
                rows,
                collate=FrozenCollator(self.tokenizer, collator, self.config.seed),
                batch_size=self.config.per_device_eval_batch_size,
                sparse=self.trained.sparse,
                accelerator=self.accelerator,
            )
            self._log(as_log(metrics, name))
            if place == 0:
                self.state.evaluations.append((self.state.step, metrics))
                if self.state.step and waits_for_metric(self.trained.scheduler):
                    self.trained.scheduler.step(metrics.loss)  # type: ignore[arg-type]
        if not self.state.step:
            self.state.filled = self.fill_probes()

    def fill_probes(self) -> dict[str, str]:
        """Have the model fill in the masks of the probes, on every process."""
        return fill_probes(
            self.model,
            self.config.probes,
            tokenizer=self.tokenizer,
            sparse=self.trained.sparse,
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
                also=self._best_step(),
                newest=state.step,
            )

        on_main_process(self.accelerator, write)

    def resume(self) -> bool:
        """Go on from a checkpoint, if the settings ask for it and there is one."""
        wanted = self.config.resume_from_checkpoint
        if not wanted:
            return False
        found = on_main_process(self.accelerator, lambda: checkpoints.choose(self.folder, wanted))
        if found is None:
            logger.warning(
                "%s holds no checkpoint; training starts from the beginning", self.folder
            )
            return False
        self.state = read_run(found, self.trained, identity=self.identity)
        self.progress.update(self.state.step)
        return True

    def _best_step(self) -> int | None:
        """Return the step of the best evaluation of the trained model, if that one is wanted."""
        best = self.state.best(since=1) if self.config.load_best_model_at_end else None
        return None if best is None else best[0]

    def save(self) -> list[str]:
        """Save the model, the best one where asked, tokenizer and card; return the files' names."""
        best = self._best_step()
        if best is not None and best != self.state.step:
            load_weights(self.folder / f"checkpoint-{best}", self.model)
        files = save_model(self.folder, self.model, self.tokenizer, self.accelerator)
        filled = self.state.filled, self.fill_probes()
        precision = self.accelerator.mixed_precision

        def write() -> None:
            write_card(
                self.folder,
                self.result(),
                model=self.model,
                config=self.config,
                settings={**self.identity, "mixed_precision": precision},
                step=best or self.state.step,
                filled=filled,
            )

        on_main_process(self.accelerator, write)
        return [*files, "README.md", "curves.png"]

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


def _tell_last(steps: Iterable[list[Batch]]) -> Iterator[tuple[list[Batch], bool]]:
    """Yield each step's batches and whether they are the last."""
    held: list[Batch] = []
    for batches in steps:
        if held:
            yield held, False
        held = batches
    if held:
        yield held, True
