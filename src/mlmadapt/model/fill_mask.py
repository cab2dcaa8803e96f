"""Sentences with a mask, and the words that a model fills in: a perplexity made visible."""

from collections.abc import Sequence

import numpy as np
import torch

from mlmadapt._types import Model, Row, Tokenizer
from mlmadapt.data.tokenization import tokenize_with_word_ids
from mlmadapt.model.mode import evaluation_mode
from mlmadapt.model.predictor import Predictor


def read_sentences(sentences: Sequence[str], tokenizer: Tokenizer) -> list[Row]:
    """Return the model's inputs for each sentence, as arrays of shape ``(sequence,)``.

    A mask is ``[MASK]``, or the tokenizer's own name for it, so that one list works for all models.

    Raises:
        TypeError: If `sentences` is one string.
        ValueError: If a sentence has no mask, or several.

    Examples:
        >>> from mlmadapt.testing import tiny_tokenizer
        >>> tokenizer = tiny_tokenizer("byte_bpe")
        >>> tokenizer.decode(read_sentences(["a [MASK] film"], tokenizer)[0]["input_ids"])
        '<s>a<mask> film</s>'
    """
    if isinstance(sentences, str):
        raise TypeError(f"fill_mask is {sentences!r:.40}; it must be a list: [{sentences!r:.40}]")
    mask = str(tokenizer.mask_token)
    rows: list[Row] = []
    for sentence in sentences:
        columns = tokenize_with_word_ids({"text": [sentence.replace("[MASK]", mask)]}, tokenizer)
        row = {name: column[0] for name, column in columns.items() if name != "word_ids"}
        masks = int((row["input_ids"] == tokenizer.mask_token_id).sum())
        if masks != 1:
            raise ValueError(
                f"fill_mask has {sentence!r} with {masks} masks; each sentence must have one [MASK]"
            )
        rows.append(row)
    return rows


def fill_masks(
    model: Model,
    sentences: Sequence[str],
    *,
    tokenizer: Tokenizer,
    predictor: Predictor | None = None,
) -> dict[str, str]:
    """Return for each sentence the five likeliest tokens for its mask, with their probabilities.

    No random state is moved, and the model keeps its mode.

    Examples:
        >>> from mlmadapt.testing import tiny_model, tiny_tokenizer
        >>> tokenizer = tiny_tokenizer()
        >>> fill_masks(tiny_model(tokenizer), ["a [MASK] film"], tokenizer=tokenizer)
        {'a [MASK] film': '...%, ...%, ...%, ...%, ...%'}
    """
    filled, predictor = {}, predictor or Predictor(device=model.device)
    for sentence, row in zip(sentences, read_sentences(sentences, tokenizer), strict=True):
        batch = {name: torch.from_numpy(each.astype(np.int64))[None] for name, each in row.items()}
        is_mask = batch["input_ids"] == tokenizer.mask_token_id
        batch["labels"] = batch["input_ids"].masked_fill(~is_mask, -100)
        with evaluation_mode(model):
            chances = predictor(model, batch)[0].softmax(-1)
        best = chances[0].topk(5)
        filled[sentence] = ", ".join(
            f"{str(tokenizer.decode([token])).strip()} {chance:.1%}"
            for chance, token in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        )
    return filled
