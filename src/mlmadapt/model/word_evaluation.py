"""Exact metrics by word and by byte, which models of different vocabularies can be compared by.

A loss per token is a mean over the pieces of one vocabulary. A vocabulary that needs fewer pieces
for a text has harder ones, so that its perplexity is higher: two such figures say nothing about
each other. A word, or a byte, is the same for both.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from mlmadapt._types import Batch, Ints, Model, Row, Rows, Tokenizer
from mlmadapt.data.rows import join_rows, pad_rows
from mlmadapt.model.evaluation import FrozenCollator, check_frozen, sum_rows
from mlmadapt.model.predictor import predicting

if TYPE_CHECKING:
    from accelerate import Accelerator


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
