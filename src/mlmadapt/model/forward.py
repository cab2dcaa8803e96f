"""From a batch on the host to the logits of its masked tokens, without waiting for the device.

A host that asks the device for a value waits for all that it was told to do before. Which positions
are masked, how many, and whether rows are padded is known on the host, where the collator laid the
batch out; it is read there, and copies do not block. transformers would ask the device, of each
batch's attention mask, whether it hides anything: so there is none where nothing is padded, and
else one that it takes as it is.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from mlmadapt._types import Batch, Model
from mlmadapt.model.checks import evaluation_mode, plain_code
from mlmadapt.model.document_mask import is_near
from mlmadapt.model.documents import isolate_documents
from mlmadapt.model.head import (
    MaskedPositions,
    SparsePrediction,
    masked_logits,
    round_up,
    try_sparse,
)

# Columns of a batch that are not the model's.
_TARGETS = ("labels", "words", "sizes")
# What transformers calls the reach of attention that is not to all tokens.
_WINDOWS = ("sliding_window", "local_attention", "attention_window")


class Sent(NamedTuple):
    """A batch on the device.

    Attributes:
        inputs: The model's.
        masked: Where to predict.
        targets: The tokens there, of shape ``(masked,)``.
    """

    inputs: dict[str, Any]
    masked: MaskedPositions
    targets: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class Predictor:
    """How a model predicts the masked tokens of a batch.

    Attributes:
        device: Where the model is.
        sparse: Its sparse head, or None where its full head runs.
        is_free: Whether it needs no attention mask where nothing is padded.
        to_square: Makes a mask of shape ``(batch, 1, sequence, sequence)``, or one for each kind of
            layers, of one of shape ``(batch, sequence)``; None if the model does not take it.
    """

    device: torch.device
    sparse: SparsePrediction | None = None
    is_free: bool = False
    to_square: Callable[[torch.Tensor], Any] | None = None

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Return logits in 32 bits, of shape ``(masked, vocabulary)``, and the tokens to predict.

        Args:
            model: The model, or what it is wrapped in.
            batch: On the host, with ``labels`` of shape ``(batch, sequence)``.
        """
        sent = self.send(batch)
        with self.at(sent.masked):
            return masked_logits(model(**sent.inputs), sent.masked), sent.targets

    def at(self, masked: MaskedPositions) -> AbstractContextManager[None]:
        """Predict at these positions only inside the block, if the model has a sparse head."""
        return self.sparse.at(masked) if self.sparse else nullcontext()

    def send(self, batch: Batch, *, rounded: bool = False) -> Sent:
        """Copy a batch to the device.

        Args:
            batch: On the host, with ``labels`` of shape ``(batch, sequence)``.
            rounded: Predict positions without a target too, up to a `POSITION_MULTIPLE`; -100
                stands for their tokens.
        """
        positions = batch["labels"] != -100
        masked = MaskedPositions.of(round_up(positions) if rounded else positions)
        targets = batch["labels"].flatten()[masked.indices[: masked.number]]
        inputs: dict[str, Any] = {
            name: self._copy(values) for name, values in batch.items() if name not in _TARGETS
        }
        if "attention_mask" in batch:
            is_full = bool(batch["attention_mask"].all())
            if is_full and self.is_free:
                del inputs["attention_mask"]
            elif self.to_square and "document_ids" not in batch:
                inputs["attention_mask"] = self.to_square(inputs["attention_mask"])
        masked = masked._replace(indices=self._copy(masked.indices))
        return Sent(inputs, masked, self._copy(targets))

    def touch_gradients(
        self, model: nn.Module, batch: Batch, backward: Callable[[torch.Tensor], None]
    ) -> None:
        """Give each parameter that a training step reaches a gradient of zeros."""
        sent = self.send(batch, rounded=True)
        with self.at(sent.masked):
            logits = masked_logits(model(**sent.inputs), sent.masked)
        backward(logits.sum() * 0)

    def _copy(self, values: torch.Tensor) -> torch.Tensor:
        if self.device.type == "cuda":  # from other memory a copy blocks, whatever it is told
            values = values.pin_memory()
        return values.to(self.device, non_blocking=True)


@contextmanager
def predicting(model: Model, probe: Batch, *, is_packed: bool) -> Iterator[Predictor]:
    """Set a model up for the time of a ``with`` block, by what it does with a batch.

    Documents are kept apart, if rows are packed, and masked positions only are predicted, if that
    works.

    Raises:
        ValueError: As `isolate_documents` and `try_sparse` do.
    """
    with isolate_documents(model) if is_packed else nullcontext():
        sparse = try_sparse(model, probe)
        is_free, to_square = _try_masks(model, probe)
        with sparse or nullcontext():
            yield Predictor(
                device=model.device, sparse=sparse, is_free=is_free, to_square=to_square
            )


def _as_square(mask: torch.Tensor, window: int | None) -> torch.Tensor | dict[str, torch.Tensor]:
    batch, sequence = mask.shape
    square = mask.bool()[:, None, None].expand(batch, 1, sequence, sequence)
    if window is None:
        return square
    near = square & is_near(sequence, window, mask.device)
    return {"full_attention": square, "sliding_attention": near}


def _try_masks(model: Model, probe: Batch) -> tuple[bool, Callable[[torch.Tensor], Any] | None]:
    """Tell whether a model gives the same bits without a full mask, and with which square one."""
    inputs = {name: values[:1].to(model.device) for name, values in probe.items()}
    for name in (*_TARGETS, "document_ids"):
        inputs.pop(name, None)
    config = model.config.get_text_config()
    is_sliding = "sliding_attention" in (getattr(config, "layer_types", None) or ())
    window = getattr(config, "sliding_window", None) if is_sliding else None
    if window is not None:  # which a row within it would not show
        copies = 2 + 2 * window // inputs["input_ids"].shape[1]
        inputs = {name: values.repeat(1, copies) for name, values in inputs.items()}
    full = torch.ones_like(inputs.pop("attention_mask", inputs["input_ids"]))
    cut = full.clone()
    cut[:, -1] = 0

    def is_same(plain: torch.Tensor, other: Any) -> bool:
        try:
            outputs: list[Any] = [model(**inputs, attention_mask=mask) for mask in (plain, other)]
        except Exception:  # noqa: BLE001  # of a model that takes no such mask
            return False
        first, second = (
            (each["logits"] if isinstance(each, Mapping) else each[0]) for each in outputs
        )
        return torch.equal(first, second)

    to_square = partial(_as_square, window=window)
    with evaluation_mode(model), plain_code():
        # Of other kinds of windows, nothing is known.
        settings = config.to_dict()
        is_known = window is not None or all(settings.get(name) is None for name in _WINDOWS)
        takes_square = is_known and is_same(cut, to_square(cut))
        return is_same(full, None), to_square if takes_square else None
