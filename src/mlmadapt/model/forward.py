"""From a batch on the host to the logits of its masked tokens, without waiting for the device.

A host that asks the device for a value waits for all that it was told to do before. Which positions
are masked, how many, and whether rows are padded is known on the host, where the collator laid the
batch out; it is read there, and copies do not block. What a model allows is tried on a batch
beforehand: its head on masked positions only, and no attention mask where nothing is padded, of
which transformers would ask the device whether it hides anything. What a model does not allow is
tried too: FNet and others see padding, and their figures would depend on who shares a batch.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass

import torch
from torch import nn

from mlmadapt._types import Batch, Model
from mlmadapt.model import checks
from mlmadapt.model.documents import DocumentIsolation
from mlmadapt.model.head import MaskedPositions, SparsePrediction, masked_logits

logger = logging.getLogger(__name__)

# Columns of a batch that are not the model's.
_TARGETS = ("labels", "word_ids")
_PADDING = 8  # tokens by which a row is padded, to see what a model makes of it


@dataclass(frozen=True, kw_only=True)
class MaskedForward:
    """How a model predicts the masked tokens of a batch.

    Attributes:
        device: Where the model is.
        sparse: Its sparse head, or None where its full head runs.
        is_free: Whether it needs no attention mask where nothing is padded.
        is_inert: Whether padding leaves the logits of a row as they are.
    """

    device: torch.device
    sparse: SparsePrediction | None = None
    is_free: bool = False
    is_inert: bool = True

    def __call__(
        self, model: nn.Module, batch: Batch, *, rounded: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return logits in 32 bits, of shape ``(masked, vocabulary)``, and the tokens to predict.

        Args:
            model: The model, or what it is wrapped in.
            batch: On the host, with ``labels`` of shape ``(batch, sequence)``.
            rounded: Predict positions without a target too, up to a `POSITION_MULTIPLE`; -100
                stands for their tokens.
        """
        labels = batch["labels"]
        masked = MaskedPositions.of(labels != -100, rounded=rounded)
        targets = self._copy(labels.flatten()[masked.indices[: masked.number]])
        inputs = {name: batch[name] for name in batch if name not in _TARGETS}
        if self.is_free and "attention_mask" in inputs and bool(inputs["attention_mask"].all()):
            del inputs["attention_mask"]
        inputs = {name: self._copy(values) for name, values in inputs.items()}
        masked = masked._replace(indices=self._copy(masked.indices))
        with self.sparse.at(masked) if self.sparse else nullcontext():
            return masked_logits(model(**inputs), masked), targets

    def touch_gradients(
        self, model: nn.Module, batch: Batch, backward: Callable[[torch.Tensor], None]
    ) -> None:
        """Give each parameter that a training step reaches a gradient of zeros.

        Args:
            model: The model, or what it is wrapped in.
            batch: As it is called with.
            backward: Makes the backward pass of a loss.
        """
        logits, _ = self(model, batch, rounded=True)
        backward(logits.sum() * 0)

    def _copy(self, values: torch.Tensor) -> torch.Tensor:
        if self.device.type == "cuda":  # from other memory a copy blocks, whatever it is told
            values = values.pin_memory()
        return values.to(self.device, non_blocking=True)


@contextmanager
def masked_forward(
    model: Model, probe: Batch, *, is_packed: bool = False
) -> Iterator[MaskedForward]:
    """Set a model up for the time of a ``with`` block, by what it does with a few rows.

    Documents are kept apart, if rows are packed, and masked positions only are predicted, if that
    gives the same. A warning names a model that sees padding.

    Args:
        model: The model, bare or with adapters.
        probe: A batch on the host, with ``labels``.
        is_packed: Whether others than `probe` have ``document_ids``.

    Raises:
        ValueError: If the model does not keep documents apart that it is to, does not predict a
            token at each place, or predicts NaN.
    """
    with ExitStack() as undo:
        if is_packed or "document_ids" in probe:
            undo.enter_context(DocumentIsolation(model))
        inputs, labels = _cut(model, probe)
        # The same places whatever is masked, which may be nothing; not the first, which heads that
        # mix positions look at.
        places = torch.arange(labels.shape[1])
        is_tried = places % 8 == places[:5][-1]
        positions = (is_tried | (places == places[-1])).expand_as(labels)
        full = masked_logits((checks.try_model(model, inputs, labels=labels),), positions)
        sparse = try_sparse(model, inputs, positions, full)
        undo.enter_context(sparse or nullcontext())
        is_inert = _is_inert(model, inputs, positions, full)
        del inputs["attention_mask"]
        is_free = False
        with suppress(ValueError):  # of a model that wants a mask
            is_free = full.equal(masked_logits((checks.try_model(model, inputs),), positions))
        yield MaskedForward(device=model.device, sparse=sparse, is_free=is_free, is_inert=is_inert)


def _cut(model: Model, probe: Batch) -> tuple[Batch, torch.Tensor]:
    """Return a few rows, of which nothing is padding to the model, and their labels."""
    kinds = getattr(model.config.get_text_config(), "layer_types", None) or ()
    # Rows within the window of some layers would not show it.
    window = checks.attention_window(model) if "sliding_attention" in kinds else 0
    copies = 1 + 2 * window // probe["labels"].shape[1]
    width = max(1, (checks.position_capacity(model) or 2**30) - _PADDING)
    rows = {name: probe[name][:4, :width].repeat(1, copies) for name in probe}
    inputs = {name: rows[name] for name in rows if name not in (*_TARGETS, "document_ids")}
    return {**inputs, "attention_mask": torch.ones_like(rows["input_ids"])}, rows["labels"]


def _is_inert(model: Model, inputs: Batch, positions: torch.Tensor, full: torch.Tensor) -> bool:
    """Tell whether the first row has the same logits when it is padded; warn of a model if not."""
    row = {name: inputs[name][:1] for name in inputs}
    padded = {name: nn.functional.pad(row[name], (0, _PADDING)) for name in row}
    pad_id = getattr(model.config.get_text_config(), "pad_token_id", None)
    padded["input_ids"][:, -_PADDING:] = pad_id or 0

    def differs(tried: Batch) -> bool:
        logits = checks.try_model(model, tried)[0, : positions.shape[1]][positions[0]]
        return checks.is_off(logits, full[: len(logits)], checks.rounding(model))

    with suppress(ValueError):  # of a model that takes no padding
        # Of one whose logits differ anyway, at random or with the batch, padding is not the cause.
        if not differs(padded) or differs(row):
            return True
    logger.warning(
        "%s sees padding: rows have other logits where they are padded. It is evaluated on batches "
        "of rows of one length; train it on such too, by group_texts",
        type(model).__name__,
    )
    return False


def try_sparse(
    model: Model, inputs: Batch, positions: torch.Tensor, full: torch.Tensor
) -> SparsePrediction | None:
    """Return the model's sparse head if it gives at `positions` what the full head gives there.

    Otherwise a warning says why, and the full head is used, which is slower and just as exact.
    """
    reason = "its head does not work position by position"
    with ExitStack() as undo:
        try:
            sparse = undo.enter_context(SparsePrediction(model))
            logits = checks.try_model(model, inputs, within=sparse.at(positions))
            gathered = masked_logits((logits,), positions)
            # Wide enough for 16 bits; a head that is not position-wise is off by far more.
            if gathered.shape == full.shape and not checks.is_off(gathered, full, 0.05):
                undo.pop_all()
                return sparse
        except ValueError as error:
            reason = f"{reason}: {error}"
    logger.warning("%s runs with its full head, more slowly: %s", type(model).__name__, reason)
    return None
