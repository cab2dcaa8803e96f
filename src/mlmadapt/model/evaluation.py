"""Exact metrics of a masked language model on frozen rows, by token and by word.

Perplexity is the exponential of the mean negative log-likelihood over **masked tokens**. `Trainer`
and the recipe take a mean of batch means, which weighs a token by the number of tokens that share
its batch: on the same 403 short documents `Trainer` gives 224 to 232, depending on the batch size,
where 251.7 is exact. Here sums are carried over all batches and processes and divided once. What is
summed by word and by byte compares models of different vocabularies.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from mlmadapt._types import Batch, Model, Row, Rows, Tokenizer
from mlmadapt.data.rows import join_frozen, pad_rows, to_columns
from mlmadapt.data.table import as_rows, dataset_lengths, is_frozen
from mlmadapt.data.tokenization import count_bytes
from mlmadapt.model.checks import (
    check_model,
    check_rows,
    check_tokenizer,
    evaluation_mode,
    is_compiled,
)
from mlmadapt.model.forward import MaskedForward, masked_forward

if TYPE_CHECKING:
    from accelerate import Accelerator


MAX_LOGITS = 2**27
"""The number of logits computed at once: half a gigabyte in 32 bits."""


@dataclass(frozen=True, slots=True)
class MaskedLMMetrics:
    """What a model gets right on the masked tokens of a set.

    Attributes:
        loss: Mean negative log-likelihood, in nats per masked token.
        perplexity: The exponential of `loss`.
        accuracy: Share of masked tokens that are the model's first guess, in [0, 1].
        top5_accuracy: Share of masked tokens among its first five guesses, in [0, 1].
        masked_tokens: The number of masked tokens, 1 or more.

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
            correct: The number of first guesses that are right.
            top5_correct: The number of tokens that are among the first five guesses.
            masked_tokens: The number of tokens that the sums are over.

        Returns:
            The metrics.

        Raises:
            ValueError: If there are no masked tokens.

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
        perplexity = math.inf if mean > 709 else math.exp(mean)  # a float would overflow
        return cls(
            mean, perplexity, correct / masked_tokens, top5_correct / masked_tokens, masked_tokens
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskedWordMetrics:
    """What a model gets right on the masked words of a set.

    Attributes:
        loss: Negative log-likelihood, in nats per masked word: the sum over its pieces.
        accuracy: Share of masked words all of whose pieces are the first guess, in [0, 1].
        bits_per_byte: Negative log-likelihood, in bits per byte of the masked words' text.
        masked_words: The number of masked words, 1 or more.

    Examples:
        >>> MaskedWordMetrics(loss=2.0, accuracy=0.5, bits_per_byte=0.4, masked_words=10).loss
        2.0
    """

    loss: float
    accuracy: float
    bits_per_byte: float
    masked_words: int


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
    1e-6 of the loss). Among equal logits, the lower token id counts as the earlier guess. Logits
    are computed for masked positions only, and a large batch is split so that they take about half
    a gigabyte at a time. Rows of a `Dataset` or a list are sorted by length, to pad few of them; of
    a model that sees padding (FNet), only rows of one length share a batch.

    Args:
        model: A masked language model; its mode and device are left as they are.
        dataset: Rows from `insert_random_mask`, with its prefix or without (which does where some
            target is masked or replaced), of any lengths; each column has shape ``(sequence,)``.
        tokenizer: Pads the rows.
        batch_size: Rows per process and forward pass.
        accelerator: Shares the rows out among its processes and sums over them.

    Returns:
        The metrics over all masked tokens of all processes, the same on each process.

    Raises:
        ValueError: If there are no rows, if they are not frozen, have no masked token or do not fit
            the model, if the model is causal, has no head over its vocabulary or predicts NaN, or
            if `batch_size` is below 1.
        TypeError: If `dataset` is a dict of datasets, or has no length.

    Examples:
        >>> from mlmadapt.testing import tiny_model, tiny_tokenizer
        >>> tokenizer = tiny_tokenizer()
        >>> rows = [{"input_ids": [2, 4, 3], "labels": [-100, 9, -100]}]
        >>> evaluate_mlm(tiny_model(tokenizer), rows, tokenizer=tokenizer).masked_tokens
        1
    """
    options: Any = {"batch_size": batch_size, "accelerator": accelerator}
    return _divide(*_sum_frozen(model, dataset, tokenizer, _sum_tokens, **options))


def evaluate_words(
    model: Model,
    dataset: Rows,
    *,
    tokenizer: Tokenizer,
    batch_size: int = 64,
    accelerator: "Accelerator | None" = None,
) -> MaskedWordMetrics:
    """Evaluate a model on frozen rows that know their words, exactly, by word and by byte.

    The pieces of a word are predicted independently, given all that is not masked: none sees the
    others. So the loss of a word in several pieces is their sum. To compare two vocabularies, mask
    the same words of the same documents: `insert_random_mask` with a `key_column`.

    Args:
        model: A masked language model; its mode and device are left as they are.
        dataset: Rows as for `evaluate_mlm`, masked by word, and still with the column ``word_ids``
            (which `map` keeps, unless `remove_columns` names it).
        tokenizer: Pads the rows, and gives the text of masked words, whose bytes in UTF-8 are
            counted without white space. That is the text as the tokenizer has it: without the
            accents that it takes away.
        batch_size: Rows per process and forward pass; no effect on the metrics.
        accelerator: Shares the rows out among its processes and sums over them.

    Returns:
        The metrics over all masked words of all processes, the same on each process.

    Raises:
        ValueError: As `evaluate_mlm`; and if the rows have no ``word_ids``, or those of other
            tokens, or a masked token belongs to no word.
        TypeError: As `evaluate_mlm`.

    Examples:
        >>> from mlmadapt.testing import tiny_model, tiny_tokenizer
        >>> tokenizer = tiny_tokenizer()
        >>> row = {"input_ids": [2, 4, 4, 3], "labels": [-100, 9, 8, -100]}
        >>> rows = [{**row, "word_ids": [-1, 0, 0, -1]}]
        >>> evaluate_words(tiny_model(tokenizer), rows, tokenizer=tokenizer).masked_words
        1
    """
    options: Any = {"batch_size": batch_size, "accelerator": accelerator, "with_words": True}
    measure = partial(_sum_words, tokenizer=tokenizer)
    loss, right, size, count = _sum_frozen(model, dataset, tokenizer, measure, **options)
    if not count:
        raise ValueError("dataset has no masked word; freeze masks into it by insert_random_mask")
    return MaskedWordMetrics(
        loss=loss / count,
        accuracy=right / count,
        bits_per_byte=loss / math.log(2) / max(size, 1),
        masked_words=int(count),
    )


def _sum_frozen(
    model: Model,
    dataset: Rows,
    tokenizer: Tokenizer,
    measure: Callable[..., torch.Tensor],
    *,
    batch_size: int,
    with_words: bool = False,
    **options: Any,
) -> list[float]:
    """Check what is evaluated, and sum it as `sum_rows` does, as a few rows show that is best."""
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be 1 or more")
    check_model(model)
    check_tokenizer(tokenizer, model)
    dataset = as_rows("dataset", dataset)
    check_rows("dataset", dataset, model=model)
    if not is_frozen(dataset):
        raise ValueError(
            f"dataset is not frozen: its rows have {list(dataset[0])}, without a label other than "
            "-100 and its token, or the prefix 'masked_'; use dataset.map(insert_random_mask, "
            "batched=True, fn_kwargs={'data_collator': ...}, remove_columns=dataset.column_names)"
        )
    if with_words and "word_ids" not in dataset[0]:
        raise ValueError(
            f"dataset has no 'word_ids', only {list(dataset[0])}; when freezing it, leave that "
            "column out of remove_columns"
        )
    collate = partial(collate_frozen, tokenizer=tokenizer, with_words=with_words)
    options |= {"collate": collate, "measure": measure, "batch_size": batch_size}
    probe = collate([dataset[place] for place in range(min(4, len(dataset)))])
    # What was compiled without the hooks would go on without them.
    if is_compiled(model):
        torch.compiler.reset()
    with masked_forward(model, probe) as forward:
        return sum_rows(model, dataset, forward=forward, **options)


def collate_frozen(rows: Any, tokenizer: Tokenizer, *, with_words: bool = False) -> Batch:
    """Return the model's inputs and ``labels``, of shape ``(batch, sequence)``, of frozen rows.

    Args:
        rows: The rows, or their columns.
        tokenizer: Pads them.
        with_words: Keep ``word_ids``.
    """
    columns = rows if isinstance(rows, Mapping) else to_columns(rows)
    batch = pad_rows(*join_frozen(columns, with_words=with_words), tokenizer)
    return {name: torch.from_numpy(array) for name, array in batch.items()}


def evaluate_rows(model: Model, dataset: Rows, **options: Any) -> MaskedLMMetrics:
    """Evaluate a dataset; the options are those of `sum_rows`."""
    return _divide(*sum_rows(model, dataset, measure=_sum_tokens, **options))


def _divide(loss: float, correct: float, top5_correct: float, count: float) -> MaskedLMMetrics:
    return MaskedLMMetrics.from_sums(
        loss=loss, correct=correct, top5_correct=top5_correct, masked_tokens=int(count)
    )


def sum_rows(
    model: Model,
    dataset: Rows,
    *,
    collate: Callable[[list[Row]], Batch],
    measure: Callable[..., torch.Tensor],
    batch_size: int,
    forward: MaskedForward,
    accelerator: "Accelerator | None" = None,
) -> list[float]:
    """Sum what is measured at the targets of all batches that `collate` makes, of all processes."""
    rank, world = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    device = model.device
    # The longest first: little is padded, and what memory does not hold shows at once.
    lengths = dataset_lengths(dataset)
    # Of unknown lengths, in their order, as if each were longer than the next.
    lengths = np.arange(len(dataset), 0, -1) if lengths is None else lengths
    order = np.argsort(-lengths, kind="stable")
    ends = np.flatnonzero(np.diff(lengths[order]) * (not forward.is_inert)) + 1
    runs = torch.from_numpy(order).tensor_split(ends.tolist())
    batches = [rows for run in runs for rows in torch.split(run, batch_size)][rank::world]
    loader = DataLoader(
        dataset,  # type: ignore[arg-type]
        batch_sampler=[rows.tolist() for rows in batches],
        collate_fn=collate,
        # Without one of its own, each iterator would move torch's global generator.
        generator=torch.Generator(),
    )
    parts = _split(loader, model, is_sparse=forward.sparse is not None)
    filler = collate([dataset[0]])
    filler["labels"].fill_(-100)
    # In 64 bits, so that the order of the batches makes no difference.
    sums = torch.zeros((), dtype=torch.float64)
    with evaluation_mode(model):
        while True:
            part = next(parts, None)
            is_left = part is not None
            # All processes make equally many forward passes, in which they may have to meet.
            if accelerator is not None and world > 1:
                is_left = bool(accelerator.gather(torch.tensor([is_left], device=device)).any())
            if not is_left:
                break
            part = part or filler
            sums = sums + measure(*rank_targets(*forward(model, part)), part)
    if accelerator is not None and world > 1:
        sums = accelerator.reduce(sums.to(device), "sum").cpu()
    return list(sums.tolist())


def _split(batches: Iterable[Batch], model: Model, *, is_sparse: bool) -> Iterator[Batch]:
    """Split batches by rows, so that about `MAX_LOGITS` logits are computed at once."""
    limit = max(1, MAX_LOGITS // model.config.get_text_config().vocab_size)
    for batch in batches:
        labels = batch["labels"].numpy()
        predicted = (labels != -100) if is_sparse else np.ones_like(labels)
        _, sizes = np.unique(predicted.sum(1).cumsum() // limit, return_counts=True)
        columns = [torch.split(values, sizes.tolist()) for values in batch.values()]
        yield from (dict(zip(batch, values, strict=True)) for values in zip(*columns, strict=True))


def rank_targets(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the loss of each target, and how many tokens are guessed before it; on the CPU."""
    true = logits.gather(1, labels[:, None])
    losses = logits.logsumexp(1) - true[:, 0]
    # Among equal logits the lower id comes first, as in argmax and a stable sort. The comparison is
    # not "greater", since nothing is greater than NaN.
    is_lower_id = torch.arange(logits.shape[1], device=logits.device) < labels[:, None]
    guessed_before = (~(logits <= true) | ((logits == true) & is_lower_id)).sum(1)
    # In one copy, the only wait; in 64 bits on the CPU, since not every device has them.
    on_host = torch.stack([losses, guessed_before.to(losses.dtype)]).cpu()
    return on_host[0].double(), on_host[1]


def _sum_tokens(losses: torch.Tensor, guessed_before: torch.Tensor, _: Batch) -> torch.Tensor:
    correct, top5_correct = (guessed_before < 1).sum(), (guessed_before < 5).sum()
    return torch.stack([losses.sum(), correct, top5_correct, torch.tensor(len(losses))])


def _sum_words(
    losses: torch.Tensor, guessed_before: torch.Tensor, batch: Batch, *, tokenizer: Tokenizer
) -> torch.Tensor:
    labels = batch["labels"].numpy()
    row, place = np.nonzero(labels != -100)
    tokens, words = labels[row, place], batch["word_ids"].numpy()[row, place]
    if (words < 0).any():
        text = tokenizer.decode([int(tokens[words < 0][0])])
        raise ValueError(
            f"dataset has a masked token, {text!r}, that belongs to no word; mask it with "
            "WholeWordMaskingCollator, by the word_ids that it has"
        )
    begins = np.flatnonzero(np.diff(row, prepend=-1) | np.diff(words, prepend=-1))
    pieces = np.split(tokens, begins[1:]) if len(tokens) else []
    wrong = np.unique(begins.searchsorted(np.flatnonzero(guessed_before.numpy()), side="right"))
    sizes = sum(count_bytes(piece.tolist(), tokenizer) for piece in pieces)
    sums = [float(losses.sum()), len(pieces) - len(wrong), sizes, len(pieces)]
    return torch.tensor(sums, dtype=torch.float64)


def as_log(metrics: MaskedLMMetrics, name: str) -> Mapping[str, float]:
    """Name metrics as `Trainer` names them in its logs: ``eval_loss``, ``eval_perplexity``, ...

    Examples:
        >>> as_log(MaskedLMMetrics(0.0, 1.0, 1.0, 1.0, 9), "eval")["eval_perplexity"]
        1.0
    """
    return {f"{name}_{metric}": value for metric, value in asdict(metrics).items()}


def name_sets(eval_dataset: Any) -> dict[str, Any]:
    """Name the evaluation sets of a run as `Trainer` does.

    Raises:
        TypeError: If one is not of rows that can be counted.

    Examples:
        >>> list(name_sets({"domain": [], "general": []})), list(name_sets([]))
        (['eval_domain', 'eval_general'], ['eval'])
    """
    sets = {"eval": eval_dataset}
    if eval_dataset is None or isinstance(eval_dataset, Mapping):
        sets = {f"eval_{name}": rows for name, rows in (eval_dataset or {}).items()}
    return {name: as_rows(argument_of(name), rows) for name, rows in sets.items()}


def argument_of(name: str) -> str:
    """Return what a set that is called so in logs is to the caller.

    Examples:
        >>> argument_of("eval"), argument_of("eval_domain"), argument_of("train_dataset")
        ('eval_dataset', "eval_dataset['domain']", 'train_dataset')
    """
    return "eval_dataset" if name == "eval" else re.sub("^eval_(.*)", r"eval_dataset['\1']", name)
