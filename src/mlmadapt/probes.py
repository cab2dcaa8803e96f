"""Sentences with a mask, and the words that a model fills in: what a perplexity means in words."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mlmadapt.prediction import SparsePrediction, evaluation_mode, masked_logits
from mlmadapt.tokenization import tokenize_with_word_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Row = dict[str, Any]


def read_probes(sentences: Sequence[str], tokenizer: "PreTrainedTokenizerBase") -> list[Row]:
    """Return the model's inputs of each sentence, arrays of shape ``(sequence,)``.

    A mask is ``[MASK]`` or what the tokenizer calls it, so that one list does for all models.

    Raises:
        TypeError: If the sentences are one string.
        ValueError: If a sentence has not one mask.

    Examples:
        >>> from mlmadapt.testing import tiny_tokenizer
        >>> tokenizer = tiny_tokenizer("byte_bpe")
        >>> tokenizer.decode(read_probes(["a [MASK] film"], tokenizer)[0]["input_ids"])
        '<s>a<mask> film</s>'
    """
    if isinstance(sentences, str):
        raise TypeError(f"probes is {sentences!r:.40}; it must be a list: [{sentences!r:.40}]")
    mask = str(tokenizer.mask_token)
    rows = []
    for sentence in sentences:
        columns = tokenize_with_word_ids({"text": [sentence.replace("[MASK]", mask)]}, tokenizer)
        row = {name: column[0] for name, column in columns.items() if name != "word_ids"}
        masks = int((row["input_ids"] == tokenizer.mask_token_id).sum())
        if masks != 1:
            raise ValueError(
                f"probes has {sentence!r} with {masks} masks; each sentence must have one [MASK]"
            )
        rows.append(row)
    return rows


def fill_probes(
    model: "PreTrainedModel",
    sentences: Sequence[str],
    *,
    tokenizer: "PreTrainedTokenizerBase",
    sparse: SparsePrediction | None = None,
) -> dict[str, str]:
    """Return by sentence the five likeliest tokens for its mask, and their probabilities.

    No random state is moved, and the model is left in its mode.

    Examples:
        >>> from mlmadapt.testing import tiny_model, tiny_tokenizer
        >>> tokenizer = tiny_tokenizer()
        >>> fill_probes(tiny_model(tokenizer), ["a [MASK] film"], tokenizer=tokenizer)
        {'a [MASK] film': '...%, ...%, ...%, ...%, ...%'}
    """
    filled = {}
    for sentence, row in zip(sentences, read_probes(sentences, tokenizer), strict=True):
        inputs = {
            name: torch.from_numpy(values.astype(np.int64))[None].to(model.device)
            for name, values in row.items()
        }
        positions = inputs["input_ids"] == tokenizer.mask_token_id
        with evaluation_mode(model):
            chances = masked_logits(model, inputs, positions, sparse).softmax(-1)
        best = chances[0].topk(5)
        filled[sentence] = ", ".join(
            f"{str(tokenizer.decode([token])).strip()} {chance:.1%}"
            for chance, token in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        )
    return filled
