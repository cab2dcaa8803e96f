"""Exact metrics of a masked language model on frozen rows.

Perplexity is the exponential of the mean negative log-likelihood over **masked tokens**. `Trainer`
and the recipe take a mean of batch means, which weighs a token by the number of tokens that share
its batch: on the same 403 short documents `Trainer` gives 224 to 232, depending on the batch size,
where 251.7 is exact. Here sums are carried over all batches and processes and divided once.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from mlmadapt._types import Batch, DataCollator, Ints, Model, Row, Rows, Tokenizer
from mlmadapt.data.rows import document_bounds, join_rows, pad_rows, to_columns
from mlmadapt.data.table import dataset_lengths
from mlmadapt.masking.frozen_masks import insert_random_mask
from mlmadapt.model.checks import check_model, check_rows, evaluation_mode
from mlmadapt.model.forward import Predictor, predicting

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
    a gigabyte at a time. Rows of a `Dataset` or a list are sorted by length, to pad few of them.

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
    check_frozen(model, dataset, tokenizer=tokenizer, batch_size=batch_size)
    collate = FrozenCollator(tokenizer)
    probe = collate([dataset[row] for row in range(min(4, len(dataset)))])
    with predicting(model, probe, is_packed="document_ids" in probe) as predictor:
        return evaluate_rows(
            model,
            dataset,
            collate=collate,
            batch_size=batch_size,
            predictor=predictor,
            accelerator=accelerator,
        )


def check_frozen(model: Model, dataset: Rows, *, tokenizer: Tokenizer, batch_size: int) -> None:
    """Check that a model can be evaluated on a dataset.

    Raises:
        ValueError: If not.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be 1 or more")
    check_model(model)
    check_rows("dataset", dataset, model=model, tokenizer=tokenizer)
    if not is_frozen(dataset):
        raise ValueError(
            f"dataset is not frozen: its rows have {list(dataset[0])}, without labels that differ "
            "from the tokens or the prefix 'masked_'; mask it with dataset.map(insert_random_mask, "
            "batched=True, fn_kwargs={'data_collator': ...}, remove_columns=dataset.column_names)"
        )


def is_frozen(dataset: Rows) -> bool:
    """Tell whether rows have masks frozen into them.

    Rows of `group_texts` have labels too, but these are a copy of their tokens, perhaps with -100
    at the padding. So rows are frozen if a target differs from the token in its place, or if their
    columns have the prefix ``masked_``. Targets that all kept their token (``mask_replace_prob=0``)
    need that prefix.

    Examples:
        >>> is_frozen([{"input_ids": [4, 8], "labels": [7, -100]}])
        True
        >>> is_frozen([{"input_ids": [7, 8], "labels": [7, 8]}])
        False
    """
    # Several rows, since one may have all its targets left as they are.
    rows = (dataset[row] for row in range(min(8, len(dataset))))
    return any("masked_labels" in row or _is_masked(row) for row in rows)


def _is_masked(row: Row) -> bool:
    labels, tokens = np.asarray(row.get("labels")), np.asarray(row.get("input_ids"))
    return labels.shape == tokens.shape and bool(((labels != -100) & (labels != tokens)).any())


def name_sets(eval_dataset: Any) -> dict[str, Any]:
    """Name the evaluation sets of a run as `Trainer` does.

    Examples:
        >>> list(name_sets({"domain": [], "general": []})), list(name_sets([]))
        (['eval_domain', 'eval_general'], ['eval'])
    """
    if isinstance(eval_dataset, Mapping):
        return {f"eval_{name}": rows for name, rows in eval_dataset.items()}
    return {} if eval_dataset is None else {"eval": eval_dataset}


@dataclass(frozen=True)
class FrozenCollator:
    """Pad frozen rows into a batch of tensors, without their ``masked_`` prefix and ``word_ids``.

    With a `data_collator`, rows are frozen on the way, to the same masks at every call.
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
        joined, lengths = join_rows(frozen)
        if "document_ids" in joined:
            document_bounds(joined["document_ids"], np.append(0, np.cumsum(lengths)))
        batch = pad_rows(joined, lengths, self.tokenizer)
        return {name: torch.from_numpy(array) for name, array in batch.items()}


def evaluate_rows(model: Model, dataset: Rows, **options: Any) -> MaskedLMMetrics:
    """Evaluate a dataset; the options are those of `sum_rows`."""
    loss, correct, top5_correct, count = sum_rows(model, dataset, measure=_sum_metrics, **options)
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
    predictor: Predictor,
    accelerator: "Accelerator | None" = None,
) -> list[float]:
    """Sum what is measured at the targets of all batches that `collate` makes, of all processes."""
    rank, world = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    device = model.device
    # The longest first: little is padded, and what memory does not hold shows at once.
    lengths = dataset_lengths(dataset)
    order = np.arange(len(dataset)) if lengths is None else np.argsort(-lengths, kind="stable")
    batches = torch.split(torch.from_numpy(order), batch_size)[rank::world]
    loader = DataLoader(
        dataset,  # type: ignore[arg-type]
        batch_sampler=[rows.tolist() for rows in batches],
        collate_fn=collate,
        # Without one of its own, each iterator would move torch's global generator.
        generator=torch.Generator(),
    )
    parts = _split(loader, model, is_sparse=predictor.sparse is not None)
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
            sums = sums + measure(*rank_targets(*predictor(model, part)), part)
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


def _sum_metrics(losses: torch.Tensor, guessed_before: torch.Tensor, _: Batch) -> torch.Tensor:
    correct, top5_correct = (guessed_before < 1).sum(), (guessed_before < 5).sum()
    return torch.stack([losses.sum(), correct, top5_correct, torch.tensor(len(losses))])


def rank_targets(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the loss of each target, and how many tokens are guessed before it; on the CPU."""
    true = logits.gather(1, labels[:, None])
    losses = logits.logsumexp(1) - true[:, 0]
    # Among equal logits the lower id comes first, as in argmax and a stable sort. The comparison is
    # not "greater", since nothing is greater than NaN.
    is_lower_id = torch.arange(logits.shape[1], device=logits.device) < labels[:, None]
    guessed_before = (~(logits <= true) | ((logits == true) & is_lower_id)).sum(1)
    # In one copy, the only wait; in 64 bits on the CPU, since not every device has them.
    found = torch.stack([losses, guessed_before.to(losses.dtype)]).cpu()
    return found[0].double(), found[1]


def as_log(metrics: MaskedLMMetrics, name: str) -> Mapping[str, float]:
    """Name metrics as `Trainer` names them in its logs: ``eval_loss``, ``eval_perplexity``, ...

    Examples:
        >>> as_log(MaskedLMMetrics(0.0, 1.0, 1.0, 1.0, 9), "eval")["eval_perplexity"]
        1.0
    """
    return {f"{name}_{metric}": value for metric, value in asdict(metrics).items()}


# ---- was model/word_evaluation: Exact metrics by word and by byte, which models of different vocabularies can be compared by.


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
            counted without white space at its ends. That is the text as the tokenizer has it:
            without the accents that it takes away, and ``[UNK]`` for what it does not know.
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
    check_frozen(model, dataset, tokenizer=tokenizer, batch_size=batch_size)
    if "word_ids" not in dataset[0]:
        raise ValueError(
            f"dataset has no 'word_ids', only {list(dataset[0])}; when freezing it, leave that "
            "column out of remove_columns"
        )
    probe = FrozenCollator(tokenizer)([dataset[row] for row in range(min(4, len(dataset)))])
    with predicting(model, probe, is_packed="document_ids" in probe) as predictor:
        loss, right, size, count = sum_rows(
            model,
            dataset,
            collate=_WordCollator(tokenizer),
            measure=_sum_words,
            batch_size=batch_size,
            predictor=predictor,
            accelerator=accelerator,
        )
    if not count:
        raise ValueError("dataset has no masked word; freeze masks into it by insert_random_mask")
    return MaskedWordMetrics(
        loss=loss / count,
        accuracy=right / count,
        bits_per_byte=loss / math.log(2) / max(size, 1),
        masked_words=int(count),
    )


@dataclass(frozen=True)
class _WordCollator:
    """Pad frozen rows, and tell at each target its word's number, at a word's first its bytes."""

    tokenizer: Tokenizer

    def __call__(self, rows: list[Row]) -> Batch:
        batch = FrozenCollator(self.tokenizer)(rows)
        labels = batch["labels"].numpy()
        row, place = np.nonzero(labels != -100)
        tokens, word_ids = labels[row, place], self._pad_words(rows)[row, place]
        if (word_ids < 0).any():
            text = self.tokenizer.decode([int(tokens[word_ids < 0][0])])
            raise ValueError(
                f"dataset has a masked token, {text!r}, that belongs to no word; mask it with "
                "WholeWordMaskingCollator, by the word_ids that it has"
            )
        begins = np.flatnonzero(np.diff(row, prepend=-1) | np.diff(word_ids, prepend=-1))
        words, sizes = np.zeros_like(labels), np.zeros_like(labels)
        words[row, place] = np.searchsorted(begins, np.arange(len(row)), side="right")
        for word in np.split(np.arange(len(row)), begins[1:]) if len(row) else ():
            text = str(self.tokenizer.decode(tokens[word].tolist())).strip()
            sizes[row[word[0]], place[word[0]]] = len(text.encode())
        return {**batch, "words": torch.from_numpy(words), "sizes": torch.from_numpy(sizes)}

    def _pad_words(self, rows: list[Row]) -> Ints:
        name = "masked_labels" if "masked_labels" in rows[0] else "labels"
        columns = {"input_ids": name, "word_ids": "word_ids"}
        joined, lengths = join_rows(
            {new: [row[old] for row in rows] for new, old in columns.items()}
        )
        joined["labels"] = joined.pop("word_ids")  # padded with a number below 0
        return pad_rows(joined, lengths, self.tokenizer)["labels"]


def _sum_words(losses: torch.Tensor, guessed_before: torch.Tensor, batch: Batch) -> torch.Tensor:
    is_target = batch["labels"] != -100
    numbers, sizes = batch["words"][is_target].numpy(), batch["sizes"][is_target]
    count, wrong = (len(np.unique(each)) for each in (numbers, numbers[guessed_before.numpy() > 0]))
    sums = [float(losses.sum()), count - wrong, int(sizes.sum()), count]
    return torch.tensor(sums, dtype=torch.float64)
