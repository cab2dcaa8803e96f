"""Adapt a model to film reviews, with a collator and a chunker of this project's own."""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from mlmadapt import TrainingConfig, accelerate_train, masked_lm_loss
from mlmadapt.testing import tiny_model, tiny_rows, tiny_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Row = dict[str, list[int]]


@dataclass
class WholeWords:
    """Mask long words only: what a review is about is seldom said in three letters."""

    tokenizer: PreTrainedTokenizerBase
    share: float = 0.5

    def __call__(self, features: list[Row]) -> dict[str, torch.Tensor]:
        """Collate rows into a padded batch."""
        rows = [self.mask(row) for row in features]
        return self.tokenizer.pad([inputs for inputs, _ in rows], return_tensors="pt") | {
            "labels": torch.nn.utils.rnn.pad_sequence(
                [torch.tensor(labels) for _, labels in rows], batch_first=True, padding_value=-100
            )
        }

    def mask(self, row: Row) -> tuple[Row, list[int]]:
        """Mask a row by itself, the same way each time."""
        ids = [int(token) for token in row["input_ids"]]
        generator = random.Random(zlib.crc32(repr(ids).encode()))  # noqa: S311
        words: dict[int, list[int]] = {}
        for position, word in enumerate(row["word_ids"]):
            if word >= 0:
                words.setdefault(int(word), []).append(position)
        labels = [-100] * len(ids)
        for positions in words.values():
            if len(positions) > 1 and generator.random() < self.share:
                for position in self.pieces(positions):
                    ids[position], labels[position] = self.tokenizer.mask_token_id, ids[position]
        return {"input_ids": ids}, labels

    def pieces(self, positions: list[int]) -> list[int]:
        """Return the positions to mask of a word."""
        return positions


class HalfWords(WholeWords):
    """The same with a mistake: the tests must find it."""

    def pieces(self, positions: list[int]) -> list[int]:
        """Return the first half of a word."""
        return positions[: (len(positions) + 1) // 2]


def cut_reviews(reviews: list[dict[str, Any]], *, chunk_size: int) -> list[dict[str, Any]]:
    """Cut long reviews; unlike `group_texts`, no row holds two of them."""
    return [
        {name: values[start : start + chunk_size] for name, values in review.items()}
        for review in reviews
        for start in range(0, len(review["input_ids"]), chunk_size)
    ]


def compute_loss(model: Any, batch: dict[str, torch.Tensor], num_items_in_batch: int) -> Any:
    """Weigh each masked token of an accumulated step the same."""
    inputs = {name: values for name, values in batch.items() if name != "labels"}
    return masked_lm_loss(model(**inputs), batch["labels"], num_items_in_batch)


def adapt(output_dir: str, resume: bool) -> dict[str, Any]:  # noqa: FBT001 (see the tests)
    """Adapt a model, or go on with it."""
    tokenizer = tiny_tokenizer()
    model = tiny_model(tokenizer, architecture="distilbert")
    result = accelerate_train(
        model,
        tiny_rows(tokenizer, 24),
        tokenizer=tokenizer,
        data_collator=WholeWords(tokenizer),
        config=TrainingConfig(
            output_dir=output_dir,
            resume_from_checkpoint=resume or None,
            per_device_train_batch_size=8,
            num_train_epochs=2,
            save_strategy="steps",
            save_steps=2,
            logging_steps=1,
            disable_tqdm=True,
        ),
    )
    return {"model": model, "history": result.history}
