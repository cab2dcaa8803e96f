"""Exact metrics of a masked language model on frozen rows.

Perplexity is the exponential of the mean negative log-likelihood over **masked tokens**. Means of
batch means, as `Trainer` and the recipe take them, weigh tokens by how many share their batch: on
the same 403 short documents `Trainer` gives 224 to 232 by batch size where 251.7 is exact. Here
sums are carried over all batches and processes and divided once.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from mlmadapt._types import Batch, DataCollator, Model, Row, Rows, Tokenizer
from mlmadapt.data.rows import join_rows, pad_rows, to_columns
from mlmadapt.masking.freezing import insert_random_mask
from mlmadapt.model.checks import check_rows
from mlmadapt.model.sparse_head import (
    SparsePrediction,
    evaluation_mode,
    masked_logits,
    predict_at,
    try_sparse,
)

if TYPE_CHECKING:
    from accelerate import Accelerator

Collate = Callable[[list[Row]], Batch]

MAX_LOGITS = 2**27
"""Logits computed at once: half a gigabyte in 32 bits."""


@dataclass(frozen=True, slots=True)
class MaskedLMMetrics:
    """What a model gets right on the masked tokens of a set.

    Attributes:
        loss: Mean negative log-likelihood, in nats a masked token.
        perplexity: The exponential of `loss`.
        accuracy: Share of masked tokens that are the model's first guess, in [0, 1].
        top5_accuracy: Share of masked tokens among its first five guesses, in [0, 1].
        masked_tokens: How many tokens that is over, 1 or more.

    Examples:
        >>> metrics = MaskedLMMetrics.from_sums(
        ...     loss=20.0, correct=4, top5_correct=6, masked_tokens=10
        ... )
        >>> metrics.loss, metrics.perplexity, metrics.accuracy
        (2.0, 7.38905609893065, 0.4)
    """

    loss: float
    perplexity: float
    accuracy: float
    top5_accuracy: float
    masked_tokens: int

    @classmethod
    def from_sums(
        cls, *, loss: float, correct: float, top5_correct: float, masked_tokens: int
    ) -> "MaskedLMMetrics":
        """Divide sums over masked tokens by their number.

        Args:
            loss: Sum of the negative log-likelihoods, in nats.
            correct: How many first guesses are right.
            top5_correct: How many tokens are among the first five guesses.
            masked_tokens: How many tokens the sums are over.

        Returns:
            The metrics.

        Raises:
            ValueError: If there are none.

        Examples:
            >>> sums = {"loss": 3.0, "correct": 1, "top5_correct": 2, "masked_tokens": 2}
            >>> MaskedLMMetrics.from_sums(**sums).loss
            1.5
        """
        if not masked_tokens:
            raise ValueError(
                "the evaluation set has no masked token (labels other than -100); freeze masks "
                "into it with insert_random_mask"
            )
        mean = loss / masked_tokens
        perplexity = math.inf if mean > 709 else math.exp(mean)  # what a float can hold
        return cls(
            mean, perplexity, correct / masked_tokens, top5_correct / masked_tokens, masked_tokens
        )


def evaluate_mlm(
    model: Model,
    dataset: Rows,
    *,
    tokenizer: Tokenizer,
    batch_size: int = 64,
    accelerator: "Accelerator | None" = None,
) -> MaskedLMMetrics:
    """Evaluate a model on rows with frozen masks, exactly.

    The batch size changes the speed and never the figures (beyond the last bits of 32-bit logits:
    1e-6 of the loss). Of equal logits, the lower token id counts as the earlier guess. Only logits
    of masked positions are computed, and of a large batch only so many rows' at a time as come to
    about half a gigabyte.

    Args:
        model: A masked language model; its mode and device are left as they are.
        dataset: Rows from `insert_random_mask`, with its prefix or without, of any lengths; each
            column of shape ``(sequence,)``.
        tokenizer: Pads the rows.
        batch_size: Rows a process and forward pass.
        accelerator: Shares the rows out over its processes and sums over them.

    Returns:
        The figures over all masked tokens of all processes, the same on each.

    Raises:
        ValueError: If there are no rows, they are not frozen, nothing in them is masked, they do
            not fit the model, or `batch_size` is below 1.
        TypeError: If `dataset` is a dict of datasets, or has no length.

    Examples:
        >>> from mlmadapt.testing import tiny_model, tiny_tokenizer
        >>> tokenizer = tiny_tokenizer()
        >>> rows = [{"input_ids": [2, 4, 3], "labels": [-100, 9, -100]}]
        >>> evaluate_mlm(tiny_model(tokenizer), rows, tokenizer=tokenizer).masked_tokens
        1
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be 1 or more")
    check_rows("dataset", dataset, model=model, tokenizer=tokenizer)
    if not is_frozen(dataset):
        raise ValueError(
            f"dataset is not frozen: its rows have {list(dataset[0])}, without labels that differ "
            "from the tokens; mask it with dataset.map(insert_random_mask, batched=True, "
            "fn_kwargs={'data_collator': ...}, remove_columns=dataset.column_names)"
        )
    collate = FrozenCollator(tokenizer)
    sparse = try_sparse(model, collate([dataset[row] for row in range(min(4, len(dataset)))]))
    with sparse or nullcontext():
        return evaluate_rows(
            model,
            dataset,
            collate=collate,
            batch_size=batch_size,
            sparse=sparse,
            accelerator=accelerator,
        )


def is_frozen(dataset: Rows) -> bool:
    """Tell whether rows have masks frozen into them.

    Rows of `group_texts` have labels too, but a copy of their tokens.

    Examples:
        >>> is_frozen([{"input_ids": [4, 8], "labels": [7, -100]}])
        True
        >>> is_frozen([{"input_ids": [7, 8], "labels": [7, 8]}])
        False
    """
    # Several, since all tokens of a very short row may be masked, and each kept as it is.
    rows = (dataset[row] for row in range(min(8, len(dataset))))
    return any("masked_labels" in row or _is_masked(row) for row in rows)


def _is_masked(row: Row) -> bool:
    labels, tokens = np.asarray(row.get("labels")), np.asarray(row.get("input_ids"))
    return labels.shape == tokens.shape and bool((labels != tokens).any())


def name_sets(eval_dataset: Any) -> dict[str, Any]:
    """Name the sets of a run as `Trainer` does.

    Examples:
        >>> list(name_sets({"domain": [], "general": []})), list(name_sets([]))
        (['eval_domain', 'eval_general'], ['eval'])
    """
    if eval_dataset is None:
        return {}
    if isinstance(eval_dataset, Mapping):
        return {f"eval_{name}": rows for name, rows in eval_dataset.items()}
    return {"eval": eval_dataset}


@dataclass(frozen=True)
class FrozenCollator:
    """Pad frozen rows into a batch of tensors; their ``masked_`` prefix and ``word_ids`` go.

    Rows that are not frozen yet are frozen with `data_collator` and `seed`, to the same masks at
    every call.
    """

    tokenizer: Tokenizer
    data_collator: DataCollator | None = None
    seed: int = 0

    def __call__(self, rows: list[Row]) -> dict[str, torch.Tensor]:
        """Return the model's inputs and ``labels``, of shape ``(batch, sequence)``."""
        columns: Mapping[str, Any] = to_columns(rows)
        if self.data_collator is not None:
            columns = insert_random_mask(columns, self.data_collator, seed=self.seed, prefix="")
        prefix = "masked_" if "masked_labels" in columns else ""
        frozen = {
            name.removeprefix(prefix): values
            for name, values in columns.items()
            if name.startswith(prefix) and name != "word_ids"
        }
        batch = pad_rows(*join_rows(frozen), self.tokenizer)
        return {name: torch.from_numpy(array) for name, array in batch.items()}


def evaluate_rows(
    model: Model,
    dataset: Rows,
    *,
    collate: Collate,
    batch_size: int,
    sparse: SparsePrediction | None,
    accelerator: "Accelerator | None" = None,
) -> MaskedLMMetrics:
    """Sum over the batches that `collate` makes of a dataset, and over the processes."""
    rank, world = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    device = model.device
    limit = max(1, MAX_LOGITS // model.config.get_text_config().vocab_size)
    loader = DataLoader(
        dataset,  # type: ignore[arg-type]
        batch_sampler=list(_shares(len(dataset), batch_size, rank, world)),
        collate_fn=collate,
        # Of its own, or each iterator would move torch's global one.
        generator=torch.Generator(),
    )
    # In 64 bits, so that the order of the batches does not show.
    sums = torch.zeros(4, dtype=torch.float64)
    with evaluation_mode(model):
        for place, batch in enumerate(loader):
            if (place * world + rank) * batch_size >= len(dataset):
                batch["labels"][:] = -100  # another process's row, to keep in step
            parts = _split(batch, limit, is_sparse=sparse is not None)
            if accelerator is not None and world > 1:
                most = int(accelerator.gather(torch.tensor([len(parts)], device=device)).max())
                filler = {name: values[:1] for name, values in batch.items()}
                filler["labels"] = torch.full_like(filler["labels"], -100)
                parts += [filler] * (most - len(parts))
            for part in parts:
                inputs = {name: values.to(device) for name, values in part.items()}
                labels = inputs.pop("labels")
                positions = labels != -100
                with predict_at(sparse, positions):
                    logits = masked_logits(model(**inputs), positions)
                sums += _sum_metrics(logits, labels[positions])
    if accelerator is not None and world > 1:
        sums = accelerator.reduce(sums.to(device), "sum").cpu()
    loss, correct, top5_correct, count = sums.tolist()
    return MaskedLMMetrics.from_sums(
        loss=loss, correct=correct, top5_correct=top5_correct, masked_tokens=int(count)
    )


def _shares(rows: int, batch_size: int, rank: int, world: int) -> Iterator[list[int]]:
    """Yield this process's batches; all get equally many, since forward passes may meet."""
    for start in range(0, rows, batch_size * world):
        share = range(start + rank * batch_size, min(start + (rank + 1) * batch_size, rows))
        yield list(share) or [0]


def _split(batch: Batch, limit: int, *, is_sparse: bool) -> list[Batch]:
    """Split a batch by rows, so that at most `limit` positions and a row get logits at once."""
    labels = batch["labels"].numpy()
    predicted = (labels != -100) if is_sparse else np.ones_like(labels)
    _, sizes = np.unique(predicted.sum(1).cumsum() // limit, return_counts=True)
    columns = [torch.split(values, sizes.tolist()) for values in batch.values()]
    return [dict(zip(batch, values, strict=True)) for values in zip(*columns, strict=True)]


def _sum_metrics(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    true = logits.gather(1, labels[:, None])
    losses = logits.logsumexp(1) - true[:, 0]
    # As argmax and a stable sort have it: of equal logits the lower id comes first. Not "greater",
    # since nothing is greater than NaN.
    is_lower_id = torch.arange(logits.shape[1], device=logits.device) < labels[:, None]
    guessed_before = (~(logits <= true) | ((logits == true) & is_lower_id)).sum(1)
    correct, top5_correct = (guessed_before < 1).sum(), (guessed_before < 5).sum()
    # On the CPU, since not every device has 64 bits.
    sums = [losses.cpu().double().sum(), correct.cpu(), top5_correct.cpu()]
    return torch.stack([*sums, torch.tensor(len(labels))])


def as_log(metrics: MaskedLMMetrics, name: str) -> Mapping[str, float]:
    """Name the metrics as `Trainer` names them in its logs: ``eval_loss``, ``eval_perplexity``, ...

    Examples:
        >>> as_log(MaskedLMMetrics(0.0, 1.0, 1.0, 1.0, 9), "eval")["eval_perplexity"]
        1.0
    """
    return {f"{name}_{metric}": value for metric, value in asdict(metrics).items()}
