"""The story of a training run: check, prepare, evaluate, train step by step, save.

Three things set this loop apart. The loss of an optimizer step is the sum over its masked tokens
divided by their number, over all accumulated batches and processes; ``outputs.loss``, a mean a batch,
is never used. The vocabulary head runs on masked positions only. And nothing random is remembered:
order, masks and dropout come from (seed, purpose, epoch or step, process), so that a checkpoint is
weights, moments and a few counts.
"""

import logging
import math
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object, tqdm
from filelock import FileLock, Timeout
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from mlmadapt import checkpoints
from mlmadapt.batches import Batch, BatchPlan, training_batches
from mlmadapt.config import TrainingConfig
from mlmadapt.evaluation import FrozenCollator, MaskedLMMetrics, as_log, evaluate_rows, is_frozen
from mlmadapt.freezing import DataCollator
from mlmadapt.identity import check_same_run, describe_run
from mlmadapt.interruption import Interruption
from mlmadapt.optimization import make_optimizer, make_scheduler
from mlmadapt.prediction import SparsePrediction, masked_logits, try_sparse
from mlmadapt.preflight import check_output_dir, check_rows
from mlmadapt.processes import (
    check_launcher,
    freeze_unused,
    is_sharded,
    on_main_process,
    settle_buckets,
    synchronize,
)
from mlmadapt.seeding import derive_key
from mlmadapt.streaming import streaming_batches

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    TrainRows = Dataset | IterableDataset | Sequence[Mapping[str, Any]]
    EvalRows = Dataset | Sequence[Mapping[str, Any]]

__all__ = ["TrainingConfig", "TrainingResult", "accelerate_train"]

logger = logging.getLogger(__name__)

# An fp16 scaler skips a step now and then to find its scale; this many in a row are a fault.
_MOST_SKIPS = 20


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

    The same call runs under ``python``, ``torchrun`` and ``accelerate launch``. The masks of an epoch
    are a function of the seed, the epoch and the row, so batch size, workers and processes change
    the speed and never what is learned from (with our collator; those of transformers draw a batch at
    a time, which makes their masks depend on which rows share a batch).

    SIGTERM and Ctrl-C finish the step, write a checkpoint and leave; with
    ``resume_from_checkpoint=True`` the same call goes on and ends, bit for bit on one machine, where it
    would have ended.

    Args:
        model: A masked language model of transformers, or a PEFT model of one (its adapter is saved).
        train_dataset: Rows as `data_collator` wants them; a stream (`IterableDataset`) needs
            ``max_steps``.
        eval_dataset: Rows from `insert_random_mask`, taken as they are, or rows like the training
            ones, which are frozen with `data_collator`; a dict names several sets, and the first is
            the one that `TrainingResult`, the best model and early stopping go by.
        tokenizer: Saved beside the model, and pads evaluation rows.
        data_collator: `WholeWordMaskingCollator`, or another library's.
        config: Settings; `TrainingConfig()` by default.
        optimizer: In place of AdamW with the settings' learning rate and weight decay.
        lr_scheduler: In place of the settings' schedule; stepped once an optimizer step.
        accelerator: In place of one made from the settings.

    Returns:
        Metrics before and after, and the history.

    Raises:
        ValueError: If rows, tokenizer and model do not fit together, or a checkpoint is of another
            run.
        OSError: If `output_dir` cannot be used, is in use, or a checkpoint cannot be written.
        FloatingPointError: If the loss or the gradient is not finite, before the update it would spoil.

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
    accelerator = accelerator or _make_accelerator(config)
    check_launcher(accelerator)
    eval_sets = _name_sets(eval_dataset)
    _check_inputs(model, train_dataset, eval_sets, tokenizer=tokenizer, config=config)
    was_training = model.training
    with (
        _own_folder(accelerator, config),
        Interruption() as interruption,
        _own_randomness(accelerator),
    ):
        run = _Run(
            model,
            train_dataset,
            eval_sets,
            tokenizer=tokenizer,
            data_collator=data_collator,
            config=config,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            accelerator=accelerator,
        )
        try:
            if not run.resume():
                run.evaluate()
            while not run.is_done:
                for batches, ends_epoch in _tell_last(run.epoch_batches()):
                    run.train_step(batches, stop_signal=interruption.noted)
                    run.end_step(ends_epoch=ends_epoch)
                    if run.stop_signal:
                        interruption.noted = run.stop_signal
                        interruption.leave()
                    if run.is_done:
                        break
            run.save()
            return run.result()
        finally:
            run.release()
            model.train(was_training)


class _Run:
    """The objects of a run, and what it has counted so far."""

    def __init__(
        self,
        model: "PreTrainedModel",
        train_dataset: "TrainRows",
        eval_sets: "Mapping[str, EvalRows]",
        *,
        tokenizer: "PreTrainedTokenizerBase",
        data_collator: DataCollator,
        config: TrainingConfig,
        optimizer: torch.optim.Optimizer | None,
        lr_scheduler: torch.optim.lr_scheduler.LRScheduler | None,
        accelerator: Accelerator,
    ) -> None:
        self.config, self.accelerator = config, accelerator
        self.tokenizer, self.data_collator = tokenizer, data_collator
        self.train_dataset, self.eval_sets = train_dataset, eval_sets
        self.folder = Path(config.output_dir)
        self.is_stream = not hasattr(train_dataset, "__len__")
        self.plan = BatchPlan(
            rows=0 if self.is_stream else len(train_dataset),  # type: ignore[arg-type]
            batch_size=config.per_device_train_batch_size,
            accumulation=config.gradient_accumulation_steps,
            seed=config.seed,
            rank=accelerator.process_index,
            world=accelerator.num_processes,
        )
        self.total_steps = (
            config.max_steps
            if config.max_steps > 0
            else math.ceil(config.num_train_epochs * self.plan.steps_per_epoch)
        )
        self.step = self.epoch = self.epoch_step = 0
        self.tokens_seen = self.masked_tokens_seen = 0
        self.history: list[dict[str, float]] = []
        self.evaluations: list[tuple[int, MaskedLMMetrics]] = []  # of the first set, with their steps
        self.stop_signal = self.skips = 0
        self.seconds_before, self.started = 0.0, time.perf_counter()
        self.loss_sum, self.loss_tokens = 0.0, 0  # since the last entry of the history
        self.grad_norm = 0.0

        probe = next(self.epoch_batches(), None)
        if probe is None:
            message = "train_dataset has no rows; group_texts drops what is shorter than chunk_size"
            raise ValueError(message)
        self.bare_model = model.to(accelerator.device)
        if config.gradient_checkpointing:
            self.bare_model.gradient_checkpointing_enable({"use_reentrant": False})
        self.sparse = try_sparse(self.bare_model, probe[0])
        self.frozen = freeze_unused(self.bare_model, probe[0], self.sparse, accelerator)
        self.raw_optimizer = optimizer or make_optimizer(self.bare_model, config)
        self.scheduler = lr_scheduler or make_scheduler(self.raw_optimizer, config, self.total_steps)
        self.identity = describe_run(
            config,
            model=model,
            tokenizer=tokenizer,
            data_collator=data_collator,
            train_dataset=train_dataset,
            rows_per_step=self.plan.rows_per_step,
        )
        if is_sharded(self.bare_model):  # by the caller: wrapping it again would undo that
            self.model, self.optimizer = self.bare_model, self.raw_optimizer
        else:
            self.model, self.optimizer = accelerator.prepare(self.bare_model, self.raw_optimizer)
        self.model.train()
        settle_buckets(self.model, probe[0], self.sparse, accelerator)
        self.progress = tqdm(total=self.total_steps, desc="training", disable=config.disable_tqdm)

    @property
    def is_done(self) -> bool:
        """Whether all steps are taken, or further ones would not help."""
        patience = self.config.early_stopping_patience
        losses = [metrics.loss for _, metrics in self.evaluations]
        gave_up = patience is not None and len(losses) - 1 - _first_minimum(losses) >= patience
        return self.step >= self.total_steps or gave_up

    def epoch_batches(self) -> Iterator[list[Batch]]:
        """Yield the batches of each step that is left of this epoch."""
        if self.is_stream:
            return streaming_batches(
                self.train_dataset,
                self.plan,
                self.data_collator,
                epoch=self.epoch,
                start=self.epoch_step,
            )
        return training_batches(
            self.train_dataset,  # type: ignore[arg-type]
            self.plan,
            self.data_collator,
            epoch=self.epoch,
            start=self.epoch_step,
            num_workers=self.config.dataloader_num_workers,
        )

    def train_step(self, batches: list[Batch], *, stop_signal: int) -> None:
        """Take one optimizer step: each masked token of the step, on any process, weighs the same."""
        accelerator = self.accelerator
        masked, tokens, self.stop_signal = self._agree(
            sum(int((batch["labels"] != -100).sum()) for batch in batches),
            sum(_count_tokens(batch) for batch in batches),
            stop_signal,
        )
        # Dropout differs by process, and is the same again after a resume.
        torch.manual_seed(derive_key(self.config.seed, "dropout", self.step, accelerator.process_index))
        # DDP averages over processes, accelerate divides by its accumulation steps: undo both.
        scale = accelerator.num_processes * accelerator.gradient_accumulation_steps / max(masked, 1)
        loss_sum = 0.0
        for place, batch in enumerate(batches):
            inputs = {name: values.to(accelerator.device) for name, values in batch.items()}
            labels = inputs.pop("labels")
            positions = labels != -100
            with synchronize(accelerator, self.model, now=place == len(batches) - 1):
                logits = masked_logits(self.model, inputs, positions, self.sparse)
                loss = nn.functional.cross_entropy(logits, labels[positions], reduction="sum")
                accelerator.backward(loss * scale)
            loss_sum += float(loss.detach())
        if masked:
            self._update(loss_sum)
        else:
            logger.warning("step %d has no masked token on any process; nothing is updated", self.step)
        self.scheduler.step()
        self.optimizer.zero_grad()
        self.loss_sum += loss_sum
        self.loss_tokens += masked
        self.tokens_seen += tokens
        self.masked_tokens_seen += masked
        self.step += 1
        self.epoch_step += 1
        self.progress.update()

    def _agree(self, masked: int, tokens: int, stop_signal: int) -> tuple[int, int, int]:
        """Sum the counts over all processes; a signal that one has noted is noted by all."""
        world = self.accelerator.num_processes
        if world == 1:
            return masked, tokens, stop_signal
        counts = torch.tensor([masked, tokens], device=self.accelerator.device)
        signals = torch.zeros(world, dtype=torch.int64, device=self.accelerator.device)
        signals[self.accelerator.process_index] = stop_signal
        summed = self.accelerator.reduce(torch.cat([counts, signals]), "sum").tolist()
        return summed[0], summed[1], max(summed[2:])

    def _update(self, loss_sum: float) -> None:
        """Clip the gradient and step, unless something is not finite."""
        max_norm = self.config.max_grad_norm or math.inf
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), max_norm)
        self.grad_norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
        self.skips = 0 if math.isfinite(self.grad_norm) else self.skips + 1
        if self.skips > (_MOST_SKIPS if self.accelerator.scaler is not None else 0):
            message = (
                f"the gradient of step {self.step} (epoch {self.epoch}) is not finite: norm "
                f"{self.grad_norm}, loss of this process {loss_sum}, training rows "
                f"{self._rows_of_step()}. The weights are as before the step. Lower learning_rate "
                f"({self.config.learning_rate}), or use mixed_precision='bf16' in place of 'fp16'"
            )
            raise FloatingPointError(message)
        self.optimizer.step()

    def _rows_of_step(self) -> str:
        start = self.epoch_step * self.plan.rows_per_step
        if self.is_stream:
            return f"{start} to {start + self.plan.rows_per_step - 1} of the stream"
        rows = self.plan.order(self.epoch)[start : start + self.plan.rows_per_step]
        return ", ".join(map(str, rows[:8])) + (f" and {len(rows) - 8} more" if len(rows) > 8 else "")

    def end_step(self, *, ends_epoch: bool) -> None:
        """Log, evaluate and save what is due after a step."""
        evaluates = self._is_due(self.config.eval_strategy, self.config.eval_steps, ends_epoch)
        saves = self._is_due(self.config.save_strategy, self.config.save_steps, ends_epoch)
        is_last = self.step == self.total_steps
        if self.step % self.config.logging_steps == 0 or evaluates or is_last:
            self.log_loss()
        if evaluates or is_last:
            self.evaluate()
        if ends_epoch:
            self.epoch, self.epoch_step = self.epoch + 1, 0
        if saves or self.stop_signal or (is_last and self.config.save_strategy != "no"):
            self.save_checkpoint()

    def _is_due(self, strategy: str, every: int, ends_epoch: bool) -> bool:  # noqa: FBT001
        return ends_epoch if strategy == "epoch" else strategy == "steps" and self.step % every == 0

    def log_loss(self) -> None:
        """Add the mean loss a masked token since the last entry to history and trackers."""
        entry = {
            "loss": sum(gather_object([self.loss_sum])) / max(self.loss_tokens, 1),
            "grad_norm": self.grad_norm,
            "learning_rate": self.scheduler.get_last_lr()[0],
        }
        self._log(entry)
        seconds = self.seconds_before + time.perf_counter() - self.started
        self.progress.set_postfix(
            loss=f"{entry['loss']:.3f}",
            lr=f"{entry['learning_rate']:.1e}",
            tokens_per_second=f"{self.tokens_seen / seconds:,.0f}",
        )
        self.loss_sum, self.loss_tokens = 0.0, 0

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
                self.evaluations.append((self.step, metrics))

    def _log(self, entry: Mapping[str, float]) -> None:
        in_epoch = 0.0 if self.is_stream else self.epoch_step / self.plan.steps_per_epoch
        epoch = self.epoch + in_epoch
        self.history.append({"step": self.step, "epoch": epoch, **entry})
        self.accelerator.log({**entry, "epoch": epoch}, step=self.step)

    def save_checkpoint(self) -> None:
        """Write all that a resumed run needs; random state is not among it."""
        loss_sums = gather_object([self.loss_sum])
        tensors, optimizer = checkpoints.split_state(self.raw_optimizer.state_dict())
        scaler = self.accelerator.scaler
        texts = {
            "config": self.bare_model.config.to_dict(),
            "state": {
                "identity": self.identity,
                "step": self.step,
                "epoch": self.epoch,
                "epoch_step": self.epoch_step,
                "tokens_seen": self.tokens_seen,
                "masked_tokens_seen": self.masked_tokens_seen,
                "history": self.history,
                "evaluations": [[step, asdict(metrics)] for step, metrics in self.evaluations],
                "loss_sums": loss_sums,
                "loss_tokens": self.loss_tokens,
                "grad_norm": self.grad_norm,
                "seconds": self.seconds_before + time.perf_counter() - self.started,
                "skips": self.skips,
                "optimizer": optimizer,
                "scheduler": self.scheduler.state_dict(),
                "scaler": None if scaler is None else scaler.state_dict(),
            },
        }

        def write() -> None:
            model = _distinct(self.bare_model.state_dict())
            checkpoints.write_checkpoint(
                self.folder, self.step, tensors={"model": model, "optimizer": tensors}, texts=texts
            )
            best = self._best_step() if self.config.load_best_model_at_end else None
            checkpoints.prune(self.folder, keep=self.config.save_total_limit, also=best)

        on_main_process(self.accelerator, write)

    def resume(self) -> bool:
        """Go on from a checkpoint, if the settings ask for it and there is one."""
        wanted = self.config.resume_from_checkpoint
        if not wanted:
            return False
        found: list[Path | None] = [None]

        def find() -> None:
            if wanted is True:
                found[0] = checkpoints.newest_whole(self.folder)
            else:
                found[0] = Path(wanted)
                damage = next(checkpoints.find_damage(found[0]), None)
                if damage is not None:
                    message = f"resume_from_checkpoint is {wanted!r}, which is damaged: {damage}"
                    raise ValueError(message)

        on_main_process(self.accelerator, find)
        if self.accelerator.num_processes > 1:
            broadcast_object_list(found)
        checkpoint = found[0]
        if checkpoint is None:
            logger.warning("%s holds no checkpoint; training starts from the beginning", self.folder)
            return False
        state = checkpoints.read_text(checkpoint, "state")
        check_same_run(state["identity"], self.identity, checkpoint=checkpoint.name)
        self._load_weights(checkpoint)
        tensors = checkpoints.read_tensors(checkpoint, "optimizer")
        self.raw_optimizer.load_state_dict(checkpoints.join_state(tensors, state["optimizer"]))
        self.scheduler.load_state_dict(state["scheduler"])
        if self.accelerator.scaler is not None and state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        for name in ("step", "epoch", "epoch_step", "tokens_seen", "masked_tokens_seen"):
            setattr(self, name, state[name])
        self.history, self.grad_norm = state["history"], state["grad_norm"]
        self.skips, self.loss_tokens = state["skips"], state["loss_tokens"]
        self.evaluations = [(step, MaskedLMMetrics(**each)) for step, each in state["evaluations"]]
        self.seconds_before = state["seconds"]
        # Each process goes on with its own sum; another number of them, with the whole in the first.
        loss_sums = state["loss_sums"]
        if len(loss_sums) != self.plan.world:
            loss_sums = [sum(loss_sums)] + [0.0] * (self.plan.world - 1)
        self.loss_sum = loss_sums[self.plan.rank]
        self.progress.update(self.step)
        return True

    def _load_weights(self, checkpoint: Path) -> None:
        loaded = checkpoints.read_tensors(checkpoint, "model")
        # Tied weights are stored once and are loaded through any of their names.
        missing = set(_distinct(self.bare_model.state_dict())) - set(loaded)
        unknown = self.bare_model.load_state_dict(loaded, strict=False).unexpected_keys
        if missing or unknown:
            message = (
                f"{checkpoint.name} lacks weights {sorted(missing)[:3]} or has others "
                f"{sorted(unknown)[:3]}; it was made from another model"
            )
            raise ValueError(message)

    def _best_step(self) -> int | None:
        """Return the step of the best evaluation of which there is a checkpoint."""
        saved = [each for each in self.evaluations if each[0] > 0]
        return min(saved, key=lambda each: each[1].loss)[0] if saved else None

    def save(self) -> None:
        """Save model and tokenizer into the output folder itself, whole or not at all."""
        best = self._best_step() if self.config.load_best_model_at_end else None
        if best is not None and best != self.step:
            self._load_weights(self.folder / f"checkpoint-{best}")
        state = (
            get_model_state_dict(
                self.bare_model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
            )
            if is_sharded(self.bare_model)
            else None
        )

        def write() -> None:
            building = self.folder / ".model.tmp"
            shutil.rmtree(building, ignore_errors=True)
            self.bare_model.save_pretrained(building, state_dict=state)
            self.tokenizer.save_pretrained(building)
            if not any(building.glob("*.safetensors")):
                message = f"{self.folder} holds no weights after saving; the model was not saved"
                raise OSError(message)
            for path in building.iterdir():
                path.replace(self.folder / path.name)
            building.rmdir()

        on_main_process(self.accelerator, write)

    def release(self) -> None:
        """Leave the model as a plain one: no hooks, no wrapper, nothing frozen."""
        self.progress.close()
        for tracker in self.accelerator.trackers if self.config.report_to != "none" else []:
            tracker.finish()
        self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        if self.sparse is not None:
            self.sparse.remove()
        for parameter in self.frozen:
            parameter.requires_grad_(True)  # noqa: FBT003  # torch's signature
        self.optimizer.zero_grad()
        if self.config.gradient_checkpointing:
            self.bare_model.gradient_checkpointing_disable()

    def result(self) -> TrainingResult:
        """Sum up."""
        metrics = [metrics for _, metrics in self.evaluations]
        return TrainingResult(
            initial=metrics[0] if metrics else None,
            final=metrics[-1] if metrics else None,
            best=min(metrics, key=lambda each: each.loss, default=None),
            history=self.history,
            global_step=self.step,
            tokens_seen=self.tokens_seen,
            masked_tokens_seen=self.masked_tokens_seen,
            seconds=self.seconds_before + time.perf_counter() - self.started,
            output_dir=self.config.output_dir,
        )


def _make_accelerator(config: TrainingConfig) -> Accelerator:
    trackers = [] if config.report_to == "none" else config.report_to.split(",")
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision, log_with=trackers or None, project_dir=config.output_dir
    )
    missing = set(trackers) - {getattr(each, "value", each) for each in accelerator.log_with}
    if missing:
        message = f"report_to is {config.report_to!r}, but {sorted(missing)} is not installed"
        raise ValueError(message)
    if trackers:
        settings = {k: v for k, v in asdict(config).items() if isinstance(v, (int, float, str))}
        accelerator.init_trackers("mlmadapt", config=settings)
    return accelerator


def _name_sets(eval_dataset: Any) -> dict[str, Any]:
    if eval_dataset is None:
        return {}
    if isinstance(eval_dataset, Mapping):
        return {f"eval_{name}": rows for name, rows in eval_dataset.items()}
    return {"eval": eval_dataset}


def _check_inputs(
    model: "PreTrainedModel",
    train_dataset: Any,
    eval_sets: Mapping[str, Any],
    *,
    tokenizer: "PreTrainedTokenizerBase",
    config: TrainingConfig,
) -> None:
    sets = dict(eval_sets)
    if hasattr(train_dataset, "__len__"):
        sets["train_dataset"] = train_dataset
    elif config.max_steps < 1 or config.dataloader_num_workers:
        message = (
            f"train_dataset is a stream without a length, max_steps is {config.max_steps} and "
            f"dataloader_num_workers {config.dataloader_num_workers}; give max_steps, and 0 workers"
        )
        raise ValueError(message)
    for name, rows in sets.items():
        check_rows(name, rows, model=model, tokenizer=tokenizer)
    if (config.early_stopping_patience or config.load_best_model_at_end) and not eval_sets:
        message = (
            "early_stopping_patience and load_best_model_at_end go by an evaluation, but eval_dataset "
            "is None; pass one"
        )
        raise ValueError(message)
    if is_sharded(model) and (config.save_strategy != "no" or config.resume_from_checkpoint):
        message = (
            f"model is sharded by fully_shard and save_strategy is {config.save_strategy!r}; "
            "checkpoints of sharded models are not written here: pass save_strategy='no'"
        )
        raise ValueError(message)


@contextmanager
def _own_folder(accelerator: Accelerator, config: TrainingConfig) -> Iterator[None]:
    """Hold `output_dir` for this run alone."""
    folder = Path(config.output_dir)
    lock = FileLock(folder / ".lock")
    resumes = bool(config.resume_from_checkpoint)

    def take() -> None:
        check_output_dir(folder, overwrite=config.overwrite or resumes)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            message = f"output_dir is {str(folder)!r}, which another run is using; name another folder"
            raise BlockingIOError(message) from None
        checkpoints.clear(folder, checkpoints=config.overwrite and not resumes)

    on_main_process(accelerator, take)
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _own_randomness(accelerator: Accelerator) -> Iterator[None]:
    """Put torch's global generators back after a run, which seeds them for dropout."""
    device = accelerator.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield


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


def _first_minimum(losses: Sequence[float]) -> int:
    return min(range(len(losses)), key=losses.__getitem__, default=0)


def _count_tokens(batch: Batch) -> int:
    return int(batch["attention_mask"].sum() if "attention_mask" in batch else batch["labels"].numel())


def _distinct(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return each tensor once: tied weights have several names, and safetensors takes one."""
    seen: dict[tuple[Any, ...], str] = {}
    for name, values in state.items():
        seen.setdefault((values.data_ptr(), values.shape, values.stride(), values.dtype), name)
    return {name: state[name].detach().cpu().contiguous() for name in seen.values()}
