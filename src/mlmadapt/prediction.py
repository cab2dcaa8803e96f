"""The prediction head and its loss, on masked positions only.

A masked language model's vocabulary head is its largest matrix product, and 80 to 85 % of its rows
are thrown away: only masked positions have a label. Gathering those positions before the head gives
the same loss and the same gradients for less than a fifth of the head's time and memory.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


def sparse_prediction(model: "PreTrainedModel") -> "SparsePrediction":
    """Make `model` compute its vocabulary head on masked positions only, while training with labels.

    The loss and the gradients are those of the full head. The logits of such a forward pass have
    shape ``(1, masked, vocabulary)`` instead of ``(batch, sequence, vocabulary)``; without labels or
    in evaluation mode nothing changes. Works in any loop, `Trainer` included.

    Args:
        model: A masked language model of transformers whose head works position by position.

    Returns:
        A handle with `remove`, which is a context manager too.

    Raises:
        ValueError: If the model is no encoder with a head on top: encoder-decoders, causal models
            (whose labels are shifted), and models whose encoder cannot be told from their head.

    Source:
        Liu et al. 2019 (fairseq's masked_lm criterion); the hooks were tried on 36 architectures.

    Examples:
        >>> from mlmadapt.testing import tiny_model, tiny_tokenizer
        >>> model = tiny_model(tiny_tokenizer()).train()
        >>> ids = torch.tensor([[2, 7, 8, 3]])
        >>> labels = torch.tensor([[-100, 7, -100, -100]])
        >>> with sparse_prediction(model):
        ...     model(input_ids=ids, labels=labels).logits.shape[:2]
        torch.Size([1, 1])
    """
    return SparsePrediction(model)


class SparsePrediction:
    """The hooks that gather masked positions, and the handle that `sparse_prediction` returns."""

    def __init__(self, model: "PreTrainedModel") -> None:
        _check_architecture(model)
        self._positions: torch.Tensor | None = None
        self._hooks = [
            model.register_forward_pre_hook(self._take_labels, with_kwargs=True),
            # Runs after a failed forward pass too, so that it leaves nothing behind.
            model.register_forward_hook(self._forget, always_call=True),
            model.base_model.register_forward_hook(self._gather),
        ]

    def remove(self) -> None:
        """Give the model its full head back."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.remove()

    @contextmanager
    def at(self, positions: torch.Tensor) -> Iterator[None]:
        """Predict at `positions` (bool, ``(batch, sequence)``) in the next forward pass, in any mode."""
        self._positions = positions
        try:
            yield
        finally:
            self._positions = None

    def _take_labels(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        labels = kwargs.get("labels")
        if labels is None or not model.training:
            return None
        self._positions = labels != -100
        return args, {**kwargs, "labels": labels[self._positions][None]}

    def _gather(self, encoder: nn.Module, args: Any, output: Any) -> Any:  # noqa: ARG002  # torch's signature
        if self._positions is None:
            return None
        hidden = output[0]
        if hidden.shape[:2] != self._positions.shape:
            message = (
                f"the encoder {type(encoder).__name__} returned hidden states of shape "
                f"{tuple(hidden.shape)} for labels of shape {tuple(self._positions.shape)}; its head "
                "does not work position by position: remove() sparse_prediction"
            )
            raise ValueError(message)
        gathered = hidden[self._positions][None]
        if isinstance(output, tuple):
            return (gathered, *output[1:])
        output = type(output)(output)
        output[next(iter(output))] = gathered
        return output

    def _forget(self, model: nn.Module, args: Any, output: Any) -> None:  # noqa: ARG002  # torch's signature
        self._positions = None


def masked_logits(
    model: nn.Module,
    inputs: Mapping[str, torch.Tensor],
    positions: torch.Tensor,
    sparse: SparsePrediction | None,
) -> torch.Tensor:
    """Return the logits at `positions` in 32 bits, of shape ``(masked, vocabulary)``.

    Args:
        model: A masked language model, possibly wrapped for distribution.
        inputs: The model's inputs without labels.
        positions: Bool, of shape ``(batch, sequence)``.
        sparse: The model's handle, or None to compute all logits and pick.
    """
    if sparse is None:
        return model(**inputs).logits[positions].float()
    with sparse.at(positions):
        logits: torch.Tensor = model(**inputs).logits
    return logits.flatten(0, 1).float()


def masked_lm_loss(
    outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
) -> torch.Tensor:
    """Weigh every masked token the same, for ``Trainer(compute_loss_func=masked_lm_loss)``.

    `Trainer` 5.x multiplies loss and gradient by the number of accumulated batches for BERT,
    DistilBERT, RoBERTa and most other masked language models, and averages batches rather than
    tokens. This divides the summed loss by the masked tokens of the whole accumulation window.

    Args:
        outputs: The model's output, with logits of shape ``(batch, sequence, vocabulary)``.
        labels: Token ids of shape ``(batch, sequence)``, -100 where nothing is to be predicted.
        num_items_in_batch: Masked tokens of the window over all processes, as `Trainer` counts them;
            None takes those of `labels`.

    Returns:
        The loss, a scalar in nats a token; 0 where nothing is masked.

    Source:
        transformers#47688.

    Examples:
        >>> from transformers.modeling_outputs import MaskedLMOutput
        >>> outputs = MaskedLMOutput(logits=torch.zeros(1, 3, 4))
        >>> masked_lm_loss(outputs, torch.tensor([[-100, 2, -100]]), num_items_in_batch=2)
        tensor(0.6931)
    """
    logits = outputs["logits"] if isinstance(outputs, Mapping) else outputs[0]
    summed = nn.functional.cross_entropy(
        logits.flatten(0, -2).float(), labels.flatten(), ignore_index=-100, reduction="sum"
    )
    if num_items_in_batch is None:
        num_items_in_batch = (labels != -100).sum()
    count = torch.as_tensor(num_items_in_batch, device=summed.device)
    return summed / count.clamp(min=1)


def _check_architecture(model: "PreTrainedModel") -> None:
    from transformers.models.auto.modeling_auto import (  # noqa: PLC0415  # a second to load
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    name = type(model).__name__
    reason = None
    if getattr(model.config, "is_encoder_decoder", False):
        reason = "is an encoder-decoder, whose labels belong to the decoder"
    elif (
        name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
        and name not in MODEL_FOR_MASKED_LM_MAPPING_NAMES.values()
    ):
        reason = "is a causal language model, which shifts its labels"
    elif model.base_model is model:
        reason = "has no base_model below its head"
    if reason is not None:
        message = (
            f"model {name} {reason}; sparse_prediction needs an encoder with a prediction head, such "
            "as AutoModelForMaskedLM gives for BERT or ModernBERT. Train it with its full head"
        )
        raise ValueError(message)
