"""Rows of one document, the same documents packed, and what a model makes of either."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
import transformers
from packaging.version import Version
from transformers import AutoModelForMaskedLM

from mlmadapt import WholeWordMaskingCollator, pack_texts, tokenize_with_word_ids
from mlmadapt.testing import tiny_corpus, tiny_model, tiny_tokenizer
from tests.scripts.short_run import rows_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Rows = list[dict[str, Any]]

TOKENIZER = tiny_tokenizer()
# Before transformers 5.23, some architectures took masks of shapes of their own.
IS_OLD = Version(transformers.__version__) < Version("5.23")


def tokenize(count: int, *, seed: int = 0) -> dict[str, Any]:
    """Tokenize documents of unequal lengths, of which none needs more than a row."""
    columns = tokenize_with_word_ids({"text": tiny_corpus(count, seed=seed)}, TOKENIZER)
    return {name: [row[:64] for row in rows] for name, rows in columns.items()}


ALONE = rows_of(tokenize(24))
PACKED = rows_of(pack_texts(tokenize(24), chunk_size=64))


def build(architecture: str, attention: str = "sdpa") -> PreTrainedModel:
    """Build a tiny model with an attention; ModernBERT's reaches 4 tokens to each side."""
    model = tiny_model(TOKENIZER, architecture=architecture)
    config = copy.deepcopy(model.config)
    if architecture == "modernbert":
        changed = {"local_attention": 8, "layer_types": ["full_attention", "sliding_attention"]}
        config = type(config)(**{**config.to_dict(), **changed})
    torch.manual_seed(0)
    built: PreTrainedModel = AutoModelForMaskedLM.from_config(config, attn_implementation=attention)
    return built.eval()


def loss_and_gradients(model: PreTrainedModel, rows: Rows) -> tuple[float, torch.Tensor]:
    """Sum the loss over rows in evaluation mode, and its gradient of all weights in one line."""
    batch = WholeWordMaskingCollator(TOKENIZER, seed=3)(rows)
    batch.setdefault("document_ids", torch.zeros_like(batch["input_ids"]))
    model.zero_grad()
    labels = batch.pop("labels")
    logits = model(**batch).logits
    loss = torch.nn.functional.cross_entropy(
        logits[labels != -100], labels[labels != -100], reduction="sum"
    )
    loss.backward()
    return loss.item(), gradients_of(model)


def gradients_of(model: PreTrainedModel) -> torch.Tensor:
    """Return the gradient of all weights in one line."""
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def step(model: PreTrainedModel, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the loss of a batch and its gradient."""
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), gradients_of(model)
