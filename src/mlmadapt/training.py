"""The story of a training run: check, prepare, evaluate, train epoch by epoch, save.

Three things set this loop apart. The loss of an optimizer step is the sum over its masked tokens
divided by their number, over all accumulated batches and processes; `outputs.loss`, a mean a batch,
is never used. The vocabulary head runs on masked positions only. And nothing random is remembered:
order, masks and dropout come from (seed, purpose, epoch or step, process).
"""

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, tqdm
from torch import nn
from transformers import get_scheduler

from mlmadapt.batches import Batch, BatchPlan, training_batches
from mlmadapt.config import TrainingConfig
from mlmadapt.evaluation import (
    FrozenCollator,
    MaskedLMMetrics,
    as_log,
    evaluate_rows,
    is_frozen,
)
from mlmadapt.freezing import DataCollator
from mlmadapt.prediction import SparsePrediction, masked_logits
from mlmadapt.preflight import check_output_dir, check_rows
from mlmadapt.seeding import derive_key

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["TrainingConfig", "TrainingResult", "accelerate_train"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingResult:
    """What came of a run.

    Attributes:
        initial: Metrics of the first evaluation set before the first step; None without one.
        final: The same after the last step.
        best: The lowest perplexity of that set at any evaluation.
        history: What was logged, in order: ``step``, ``epoch``, and ``loss``, ``learning_rate``,
            ``grad_norm`` or ``eval_loss``, ``eval_perplexity``, ... as `Trainer` names them.
        global_step: Optimizer steps.
        tokens_seen: Tokens trained on, padding not counted, over all processes.
        masked_tokens_seen: Tokens predicted.
        seconds: Wall time of training and evaluation.
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
    train_dataset: "Dataset | Sequence[dict[str, Any]]",
    eval_dataset: "Dataset | Sequence[dict[str, Any]] | Mapping[str, Any] | None" = None,
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

    Args:
        model: A masked language model of transformers.
        train_dataset: Rows as `data_collator` wants them.
        eval_dataset: Rows from `insert_random_mask`, taken as they are, or rows like the training
            ones, which are frozen with `data_collator`; a dict names several sets, and the first is
            the one that `TrainingResult` reports.
        tokenizer: Saved beside the model, and pads evaluation rows.
        data_collator: `WholeWordMaskingCollator`, or another library's.
        config: Settings; `TrainingConfig()` by default.
        optimizer: In place of AdamW with the settings' learning rate and weight decay.
        lr_scheduler: In place of the settings' schedule; stepped once an optimizer step.
        accelerator: In place of one made from the settings.

    Returns:
        Metrics before and after, and the history.

    Raises:
        ValueError: If rows, tokenizer and model do not fit together.
        OSError: If `output_dir` cannot be used; both before the first step.
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
    _on_main_process(
        accelerator, lambda: check_output_dir(config.output_dir, overwrite=config.overwrite)
    )
    eval_sets = _name_sets(eval_dataset)
    check_rows("train_dataset", train_dataset, model=model, tokenizer=tokenizer)
    for name, rows in eval_sets.items():
        check_rows(name, rows, model=model, tokenizer=tokenizer)

    was_training = model.training
    with _own_randomness(accelerator):
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
            run.evaluate()
            while run.step < run.total_steps:
                run.train_epoch()
            run.save()
        finally:
            run.release()
            model.train(was_training)
    return run.result()


class _Run:
    """The objects of a run and what it has counted so far."""

    def __init__(
        self,
        model: "PreTrainedModel",
        train_dataset: "Dataset | Sequence[dict[str, Any]]",
        eval_sets: Mapping[str, Any],
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
        self.plan = BatchPlan(
            rows=len(train_dataset),
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
        self.step = 0
        self.tokens_seen = self.masked_tokens_seen = 0
        self.history: list[dict[str, float]] = []
        self.primary: list[MaskedLMMetrics] = []
        self.started = time.perf_counter()

        probe = next(training_batches(train_dataset, self.plan, data_collator, epoch=0))[0]
        self.bare_model = model.to(accelerator.device)
        self.sparse = _try_sparse(self.bare_model, probe)
        self.frozen = _freeze_unused(self.bare_model, probe, self.sparse, accelerator)
        self.raw_optimizer = optimizer or _make_optimizer(self.bare_model, config)
        self.scheduler = lr_scheduler or get_scheduler(
            config.lr_scheduler_type,
            self.raw_optimizer,
            num_warmup_steps=_warmup_steps(config, self.total_steps),
            num_training_steps=self.total_steps,
        )
        self.model, self.optimizer = accelerator.prepare(self.bare_model, self.raw_optimizer)
        self.model.train()
        _settle_buckets(self.model, probe, self.sparse, accelerator)
        # Sums since the last entry of the history.
        self.loss_sum = torch.zeros((), dtype=torch.float64)
        self.loss_tokens = 0
        self.grad_norm = 0.0
        self.progress = tqdm(total=self.total_steps, desc="training", disable=config.disable_tqdm)

    def train_epoch(self) -> None:
        """Train to the end of the epoch, or to the last step."""
        epoch, start = divmod(self.step, self.plan.steps_per_epoch)
        for batches in training_batches(
            self.train_dataset,
            self.plan,
            self.data_collator,
            epoch=epoch,
            start=start,
            num_workers=self.config.dataloader_num_workers,
        ):
            self.train_step(batches)
            is_last = self.step == self.total_steps
            evaluates = is_last or self._is_due(self.config.eval_strategy, self.config.eval_steps)
            if evaluates or self.step % self.config.logging_steps == 0:
                self.log_loss()
            if evaluates:
                self.evaluate()
            if is_last:
                return

    def train_step(self, batches: list[Batch]) -> None:
        """Take one optimizer step: each masked token of the step, on any process, weighs the same."""
        accelerator = self.accelerator
        batches = [
            {name: values.to(accelerator.device) for name, values in batch.items()} for batch in batches
        ]
        labels = [batch.pop("labels") for batch in batches]
        counts = torch.stack(
            [
                sum((each != -100).sum() for each in labels),
                sum(batch["attention_mask"].sum() for batch in batches if "attention_mask" in batch),
            ]
        )
        masked, tokens = accelerator.reduce(counts, "sum").tolist()
        # Dropout differs by process and is the same again after a resume.
        torch.manual_seed(derive_key(self.config.seed, "dropout", self.step, accelerator.process_index))
        # DDP averages over processes, accelerate divides by its accumulation steps: undo both.
        scale = accelerator.num_processes * accelerator.gradient_accumulation_steps / max(masked, 1)
        loss_sum = torch.zeros((), dtype=torch.float64, device=accelerator.device)
        for place, (batch, targets) in enumerate(zip(batches, labels, strict=True)):
            waits = place < len(batches) - 1
            with accelerator.no_sync(self.model) if waits else nullcontext():
                positions = targets != -100
                logits = masked_logits(self.model, batch, positions, self.sparse)
                loss = nn.functional.cross_entropy(logits, targets[positions], reduction="sum")
                accelerator.backward(loss * scale)
            loss_sum += loss.detach()
        self._update(loss_sum, masked)
        self.loss_sum += loss_sum.cpu()
        self.loss_tokens += int(masked)
        self.tokens_seen += int(tokens)
        self.masked_tokens_seen += int(masked)
        self.step += 1
        self.progress.update()

    def _update(self, loss_sum: torch.Tensor, masked: int) -> None:
        """Clip and step, unless there is nothing to learn from or something is not finite."""
        if not masked:
            logger.warning("step %d has no masked token on any process; nothing is updated", self.step)
            self.optimizer.zero_grad()
            self.scheduler.step()
            return
        max_norm = self.config.max_grad_norm or math.inf
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), max_norm)
        self.grad_norm = float(norm)
        if not math.isfinite(self.grad_norm) and self.accelerator.scaler is None:
            message = (
                f"the gradient norm of step {self.step} is {self.grad_norm} (loss of this process: "
                f"{float(loss_sum)}); weights are as before the step. Lower learning_rate "
                f"({self.config.learning_rate}) or use mixed_precision='bf16' in place of 'fp16'"
            )
            raise FloatingPointError(message)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()

    def log_loss(self) -> None:
        """Add the mean loss a masked token since the last entry to history and trackers."""
        total = self.accelerator.reduce(self.loss_sum.to(self.accelerator.device), "sum").item()
        entry = {
            "loss": total / max(self.loss_tokens, 1),
            "grad_norm": self.grad_norm,
            "learning_rate": self.scheduler.get_last_lr()[0],
        }
        self._log(entry)
        self.progress.set_postfix(loss=f"{entry['loss']:.3f}", lr=f"{entry['learning_rate']:.1e}")
        self.loss_sum.zero_()
        self.loss_tokens = 0

    def evaluate(self) -> None:
        """Evaluate every set; the first is the one that the result reports."""
        for place, (name, rows) in enumerate(self.eval_sets.items()):
            frozen = is_frozen(rows)
            metrics = evaluate_rows(
                self.bare_model,
                rows,
                collate=FrozenCollator(
                    self.tokenizer, None if frozen else self.data_collator, self.config.seed
                ),
                batch_size=self.config.per_device_eval_batch_size,
                sparse=self.sparse,
                accelerator=self.accelerator,
            )
            self._log(as_log(metrics, name))
            if place == 0:
                self.primary.append(metrics)

    def save(self) -> None:
        """Save model and tokenizer into the output folder itself."""
        state = self.accelerator.get_state_dict(self.model)
        folder = Path(self.config.output_dir)
        if self.accelerator.is_main_process:
            self.bare_model.save_pretrained(folder, state_dict=state)
            self.tokenizer.save_pretrained(folder)
            if not (folder / "config.json").is_file():
                message = f"{folder} holds no config.json after saving; the model was not saved"
                raise OSError(message)
        self.accelerator.wait_for_everyone()

    def release(self) -> None:
        """Leave the model as a plain one: no hooks, no wrapper, nothing frozen."""
        self.progress.close()
        self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        if self.sparse is not None:
            self.sparse.remove()
        for parameter in self.frozen:
            parameter.requires_grad_(True)  # noqa: FBT003  # torch's signature
        self.optimizer.zero_grad()

    def result(self) -> TrainingResult:
        """Sum up."""
        primary = self.primary
        return TrainingResult(
            initial=primary[0] if primary else None,
            final=primary[-1] if primary else None,
            best=min(primary, key=lambda metrics: metrics.loss, default=None),
            history=self.history,
            global_step=self.step,
            tokens_seen=self.tokens_seen,
            masked_tokens_seen=self.masked_tokens_seen,
            seconds=time.perf_counter() - self.started,
            output_dir=self.config.output_dir,
        )

    def _is_due(self, strategy: str, every: int) -> bool:
        if strategy == "epoch":
            return self.step % self.plan.steps_per_epoch == 0
        return strategy == "steps" and self.step % every == 0

    def _log(self, entry: Mapping[str, float]) -> None:
        epoch = self.step / self.plan.steps_per_epoch
        self.history.append({"step": self.step, "epoch": epoch, **entry})
        self.accelerator.log({**entry, "epoch": epoch}, step=self.step)


def _make_accelerator(config: TrainingConfig) -> Accelerator:
    return Accelerator(mixed_precision=config.mixed_precision)


def _on_main_process(accelerator: Accelerator, check: Callable[[], None]) -> None:
    """Run a check once; what it raises, every process raises, so that none waits for the others."""
    errors: list[OSError | None] = [None]
    if accelerator.is_main_process:
        try:
            check()
        except OSError as error:
            errors[0] = error
    broadcast_object_list(errors)
    if errors[0] is not None:
        raise errors[0]


def _name_sets(eval_dataset: Any) -> dict[str, Any]:
    if eval_dataset is None:
        return {}
    if isinstance(eval_dataset, Mapping):
        return {f"eval_{name}": rows for name, rows in eval_dataset.items()}
    return {"eval": eval_dataset}


@contextmanager
def _own_randomness(accelerator: Accelerator) -> Iterator[None]:
    """Put torch's global generators back after a run, which seeds them for dropout."""
    device = accelerator.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield


def _try_sparse(model: "PreTrainedModel", probe: Batch) -> SparsePrediction | None:
    """Return the sparse head, if it gives what the full head gives on a few rows."""
    inputs = {name: values[:4].to(model.device) for name, values in probe.items()}
    positions = inputs.pop("labels") != -100
    was_training = model.training
    model.eval()
    sparse = None
    try:
        with torch.no_grad():
            full = masked_logits(model, inputs, positions, None)
            sparse = SparsePrediction(model)
            gathered = masked_logits(model, inputs, positions, sparse)
        if gathered.shape == full.shape and torch.allclose(gathered, full, rtol=1e-2, atol=1e-2):
            return sparse
        reason = "its head does not work position by position"
    except ValueError as error:
        reason = str(error)
    finally:
        model.train(was_training)
    if sparse is not None:
        sparse.remove()
    logger.warning("%s is trained with its full head, more slowly: %s", type(model).__name__, reason)
    return None


def _freeze_unused(
    model: "PreTrainedModel", probe: Batch, sparse: SparsePrediction | None, accelerator: Accelerator
) -> list[nn.Parameter]:
    """Freeze parameters that get no gradient (poolers, mostly), for which DDP would wait in vain."""
    if accelerator.num_processes == 1:
        return []
    _zero_backward(model, probe, sparse, accelerator, backward=torch.Tensor.backward)
    unused = [each for each in model.parameters() if each.requires_grad and each.grad is None]
    for parameter in unused:
        parameter.requires_grad_(False)  # noqa: FBT003  # torch's signature
    model.zero_grad()
    return unused


def _settle_buckets(
    model: nn.Module, probe: Batch, sparse: SparsePrediction | None, accelerator: Accelerator
) -> None:
    """Let DDP rebuild its buckets before the first step.

    It does so after the first backward pass, which changes the order of sums: with three processes
    and more, the first step after a resume would differ in the last bits.
    """
    if accelerator.num_processes > 1:
        for _ in range(2):
            _zero_backward(model, probe, sparse, accelerator, backward=accelerator.backward)
        model.zero_grad()


def _zero_backward(
    model: nn.Module,
    probe: Batch,
    sparse: SparsePrediction | None,
    accelerator: Accelerator,
    *,
    backward: Callable[[torch.Tensor], None],
) -> None:
    inputs = {name: values.to(accelerator.device) for name, values in probe.items()}
    positions = inputs.pop("labels") != -100
    backward(masked_logits(model, inputs, positions, sparse).sum() * 0)


def _make_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    """Return AdamW that decays weight matrices, not biases and norms."""
    parameters = [each for each in model.parameters() if each.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    # One kernel for all parameters, where there is one.
    fused = all(p.device.type in ("cpu", "cuda") for p in parameters)
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=config.learning_rate, fused=fused
    )


def _warmup_steps(config: TrainingConfig, total_steps: int) -> int:
    if config.warmup_steps < 1:
        return math.ceil(config.warmup_steps * total_steps)
    return int(config.warmup_steps)
