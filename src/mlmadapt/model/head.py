"""The prediction head and its loss, on masked positions only.

A masked language model's vocabulary head is its largest matrix product, and 80 to 85 % of its rows
are thrown away, since only masked positions have a label. Gathering those positions before the head
gives the same loss and the same gradients for less than a fifth of the head's time and memory. The
loss is their summed cross entropy, divided once by their number: over a batch, or over all batches
and processes of a step.
"""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from threading import get_ident
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from mlmadapt._types import Model
from mlmadapt.model.checks import check_model, unwrap

POSITION_MULTIPLE = 32
"""Positions are predicted in multiples of this.

The number of masked tokens differs from step to step. Without rounding, so do the sizes of the
blocks of memory, and glibc's heap keeps more and more between them: after 300 steps of 64 x 128
tokens, a model of 4.4 M parameters held 2.4 GB and rising, in place of a steady 0.9.
"""


def sparse_prediction(model: Model) -> "SparsePrediction":
    """Make `model` compute its vocabulary head on masked positions only, in training with labels.

    The loss and the gradients are those of the full head. The logits of such a forward pass have
    shape ``(1, masked, vocabulary)`` in place of ``(batch, sequence, vocabulary)``; without labels
    or in evaluation mode nothing changes. Works in any loop, `Trainer` included. Where a loop
    leaves the mode alone (Lightning, Fabric), call ``model.train()`` before it: `from_pretrained`
    gives a model in evaluation mode.

    Gradient accumulation in `Trainer` is cured on the way. `Trainer` hands the model
    ``num_items_in_batch``, the masked tokens of all accumulated batches, and adds up the losses;
    most masked language models ignore it and return a mean, so that 4 accumulated batches give 4
    times the loss and gradient. With the hooks, the loss is the sum over the masked tokens divided
    by that number, and 0 for a batch without any (where the mean is NaN).

    Args:
        model: A masked language model of transformers whose head works position by position, bare
            or with adapters (PEFT); before it is wrapped for distribution.

    Returns:
        A handle with `remove`, which is a context manager too.

    Raises:
        ValueError: If the model is not an encoder with a prediction head: an encoder-decoder, a
            causal model (whose labels are shifted), a model whose encoder cannot be told from its
            head, or one that is wrapped for several devices. In a forward pass, if the encoder
            returns another number of positions than there are labels.

    Warns:
        UserWarning: Once, if the model gets labels in evaluation mode while gradients are on.

    Source:
        Liu et al. 2019 (fairseq's masked_lm criterion); transformers#47688.

    Examples:
        >>> from mlmadapt.testing import tiny_model, tiny_tokenizer
        >>> model = tiny_model(tiny_tokenizer()).train()
        >>> ids = torch.tensor([[2, 7, 8, 3]])
        >>> labels = torch.tensor([[-100, 7, -100, -100]])
        >>> with sparse_prediction(model):
        ...     model(input_ids=ids, labels=labels).logits.shape[:2]
        torch.Size([1, 1])
    """
    check_model(model)
    torch.compiler.reset()  # whoever holds code that was compiled without the hooks
    return SparsePrediction(model)


def _check_encoder(model: Model) -> None:
    """Check that a model has an encoder below its head.

    Raises:
        ValueError: If not, or if its labels belong to a decoder.
    """
    bare = unwrap(model)
    reason = None
    if getattr(bare, "base_model", bare) is bare:
        reason = "has no base_model below its head"
    elif bare.config.is_encoder_decoder:
        reason = "is an encoder-decoder, whose labels belong to the decoder"
    if reason is not None:
        raise ValueError(
            f"model {type(bare).__name__} {reason}; sparse_prediction needs an encoder with a "
            "head, as of BERT or ModernBERT: train this one with its full head"
        )


class MaskedPositions(NamedTuple):
    """The masked positions of a batch.

    Attributes:
        shape: ``(batch, sequence)``.
        indices: Indices of the masked positions into batch times sequence, followed by zeros up to
            a multiple of `POSITION_MULTIPLE`.
        number: How many positions are masked.
        num_items: The number of masked tokens to divide the loss by; None leaves it a mean.
    """

    shape: torch.Size
    indices: torch.Tensor
    number: int
    num_items: torch.Tensor | int | None = None

    @classmethod
    def of(
        cls,
        positions: "torch.Tensor | MaskedPositions",
        num_items: torch.Tensor | int | None = None,
        *,
        rounded: bool = False,
    ) -> "MaskedPositions":
        """Find the positions that are True, unless that was done; on a device, the host waits once.

        Args:
            positions: Booleans of shape ``(batch, sequence)``, or what was found of them.
            num_items: The number of masked tokens to divide the loss by.
            rounded: Take others with them, in their order, up to a multiple of `POSITION_MULTIPLE`,
                which are to count for nothing. Else they are added behind, and cut off from the
                logits again: a view, whose backward pass copies all logits' gradients where the
                loss is computed outside of the model.

        Examples:
            >>> positions = torch.arange(40)[None] >= 20
            >>> [MaskedPositions.of(positions, rounded=rounded).number for rounded in (False, True)]
            [20, 32]
        """
        if isinstance(positions, MaskedPositions):
            return positions
        is_taken = positions.flatten()
        if rounded:
            others = (~is_taken).nonzero().squeeze(1)
            added = others[: -int(is_taken.sum()) % POSITION_MULTIPLE]
            is_taken = is_taken.index_fill(0, added, True)  # noqa: FBT003  # torch's signature
        indices = is_taken.nonzero().squeeze(1)
        spare = -len(indices) % POSITION_MULTIPLE
        return cls(positions.shape, nn.functional.pad(indices, (0, spare)), len(indices), num_items)


class SparsePrediction(AbstractContextManager["SparsePrediction"]):
    """The hooks that gather masked positions, and the handle that `sparse_prediction` returns.

    The hooks stay out of `torch.compile`, since only the batch tells how many positions are masked:
    encoder and head become a graph each, and only the head's graph takes varying shapes.
    """

    def __init__(self, model: Model) -> None:
        _check_encoder(model)
        # Per thread, since `DataParallel` calls replicas with the same hooks at the same time.
        self._masked: dict[int, MaskedPositions] = {}
        self._asked: MaskedPositions | None = None
        self._hooks = [
            model.register_forward_pre_hook(self._take_labels, with_kwargs=True),
            # Runs after a failed forward pass too, so that it leaves nothing behind.
            model.register_forward_hook(self._finish, always_call=True),
            unwrap(model).base_model.register_forward_hook(self._gather),
        ]

    def remove(self) -> None:
        """Give the model its full head back.

        Examples:
            >>> from mlmadapt.testing import tiny_model, tiny_tokenizer
            >>> model = tiny_model(tiny_tokenizer()).train()
            >>> handle = sparse_prediction(model)
            >>> handle.remove()
            >>> ids = torch.tensor([[2, 7, 8, 3]])
            >>> model(input_ids=ids, labels=ids).logits.shape[:2]
            torch.Size([1, 4])
        """
        for hook in self._hooks:
            hook.remove()

    def __exit__(self, *exc_info: object) -> None:
        self.remove()

    @contextmanager
    def at(self, positions: torch.Tensor | MaskedPositions) -> Iterator[None]:
        """Predict at `positions` only inside the block, in any mode and without labels.

        Args:
            positions: Booleans of shape ``(batch, sequence)``, or what was found of them.

        Returns:
            A context manager. Inside it, logits have shape ``(1, positions that are True,
            vocabulary)``.

        Examples:
            >>> from mlmadapt.testing import tiny_model, tiny_tokenizer
            >>> model, ids = tiny_model(tiny_tokenizer()), torch.tensor([[2, 7, 8, 3]])
            >>> with sparse_prediction(model) as handle, handle.at(ids == 7):
            ...     model(input_ids=ids).logits.shape[:2]
            torch.Size([1, 1])
        """
        self._asked = MaskedPositions.of(positions)
        try:
            yield
        finally:
            self._asked = None

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _take_labels(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        self._masked.pop(get_ident(), None)
        labels = kwargs.get("labels")
        if labels is None or not model.training:
            if labels is not None and torch.is_grad_enabled():
                warnings.warn(
                    "the model is in evaluation mode, without dropout or sparse_prediction; call "
                    "model.train() before the training loop, and evaluate under torch.no_grad()",
                    stacklevel=2,
                )
            return None
        # The model does not get this: the few that know it would divide by it themselves.
        num_items = kwargs.pop("num_items_in_batch", None)
        masked = self._masked[get_ident()] = MaskedPositions.of(labels != -100, num_items)
        targets = labels.flatten()[masked.indices]
        targets[masked.number :] = -100
        return args, {**kwargs, "labels": targets[None]}

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _gather(self, encoder: nn.Module, args: Any, output: Any) -> Any:  # noqa: ARG002  # torch's signature
        masked = self._asked or self._masked.get(get_ident())
        if masked is None:
            return None
        hidden = output[0]
        if hidden.shape[:2] != masked.shape:
            raise ValueError(
                f"the encoder {type(encoder).__name__} returned hidden states of shape "
                f"{tuple(hidden.shape)} for labels of shape {tuple(masked.shape)}; its head does "
                "not work position by position: train without sparse_prediction"
            )
        # Indexing in brackets takes 5 times as long, most of it backward.
        gathered = hidden.flatten(0, 1).index_select(0, masked.indices.to(hidden.device))[None]
        if isinstance(output, tuple):
            return (gathered, *output[1:])
        return type(output)({**output, next(iter(output)): gathered})

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _finish(self, model: nn.Module, args: Any, output: Any) -> Any:  # noqa: ARG002  # torch's signature
        labeled = self._masked.pop(get_ident(), None)
        masked = self._asked or labeled
        if masked is None or output is None:
            return None
        is_tuple = isinstance(output, tuple)
        values: Any = dict(enumerate(output)) if is_tuple else output
        # Losses, if there are any, come first.
        loss, logits = next(iter(values)), next(name for name in values if values[name].dim())
        if values[logits].dim() == 2:  # of ModernBERT's own sparse head, already without the rest
            values[logits] = values[logits][None]
        elif len(masked.indices) > masked.number:
            # A view; gradients go around it where the model computes its loss itself.
            values[logits] = values[logits][:, : masked.number]
        if labeled is not None and labeled.num_items is not None:
            mean = values[loss] if labeled.number else values[loss].nan_to_num(nan=0.0)
            values[loss] = mean * labeled.number / count_items(labeled.num_items, mean.device)
        return tuple(values.values()) if is_tuple else output


def masked_logits(outputs: Any, positions: torch.Tensor | MaskedPositions) -> torch.Tensor:
    """Return the logits at `positions` in 32 bits, of shape ``(masked, vocabulary)``.

    Args:
        outputs: A model's output, with logits of all positions or, by `SparsePrediction.at`, of
            these only. A tuple has no loss in it.
        positions: Booleans of shape ``(batch, sequence)``, or what was found of them.
    """
    logits: torch.Tensor = outputs["logits"] if isinstance(outputs, Mapping) else outputs[0]
    picked = logits.flatten(0, -2)
    if logits.shape[:-1] == positions.shape:
        masked = MaskedPositions.of(positions)
        picked = picked.index_select(0, masked.indices[: masked.number].to(logits.device))
    return picked.float()


def count_items(num_items: torch.Tensor | int, device: torch.device) -> torch.Tensor:
    """Return a divisor; under `DataParallel`, `Trainer` gives the count once per device."""
    return torch.as_tensor(num_items, device=device).sum().clamp(min=1)


def masked_lm_loss(
    outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
) -> torch.Tensor:
    """Weigh every masked token the same, for ``Trainer(compute_loss_func=masked_lm_loss)``.

    `Trainer` 5.x multiplies loss and gradient by the number of accumulated batches for BERT,
    DistilBERT, RoBERTa and most other masked language models, and averages batches rather than
    tokens. This divides the summed loss by the masked tokens of the whole accumulation window.
    `sparse_prediction` does the same for less; with both, `Trainer` takes this one, since it keeps
    the labels from the model, and the full head is computed.

    Args:
        outputs: The model's output, with logits of shape ``(batch, sequence, vocabulary)``, or of
            the masked positions only, as `sparse_prediction` leaves them.
        labels: Token ids of shape ``(batch, sequence)``, -100 where nothing is to be predicted.
        num_items_in_batch: The number of masked tokens in the window over all processes, as
            `Trainer` counts them; None takes their number in `labels`.

    Returns:
        The loss, a scalar in nats per token; 0 where nothing is masked.

    Raises:
        ValueError: By torch, if there are logits for other positions than there are labels.
        IndexError: By torch, if a label is past the vocabulary.

    Source:
        transformers#47688.

    Examples:
        >>> from transformers.modeling_outputs import MaskedLMOutput
        >>> outputs = MaskedLMOutput(logits=torch.zeros(1, 3, 4))
        >>> masked_lm_loss(outputs, torch.tensor([[-100, 2, -100]]), num_items_in_batch=2)
        tensor(0.6931)
    """
    positions = labels != -100
    logits, targets = masked_logits(outputs, positions), labels[positions]
    summed = nn.functional.cross_entropy(logits, targets, reduction="sum")
    count = len(targets) if num_items_in_batch is None else num_items_in_batch
    return summed / count_items(count, summed.device)


# 16 MB in 32 bits, which stay in the allocator and near the processor; a GPU is busy with them too.
_LOGITS_AT_ONCE = 2**22


def summed_cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sum the negative log-likelihoods in nats; the backward pass **overwrites the logits**.

    Autograd raises an error if the layer that computed the logits needs them again: an ``exp``
    does, a linear layer does not.

    Args:
        logits: Of shape ``(tokens, vocabulary)``, in 32 bits or more.
        labels: Of shape ``(tokens,)``; a position with -100 does not count.

    Examples:
        >>> summed_cross_entropy(torch.zeros(3, 4), torch.tensor([1, -100, 2]))
        tensor(2.7726)
    """
    summed: torch.Tensor = _SummedCrossEntropy.apply(logits, labels)  # type: ignore[no-untyped-call]
    return summed


class _SummedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        is_target = labels != -100
        targets = labels.masked_fill(~is_target, 0)
        ctx.rows = max(1, _LOGITS_AT_ONCE // logits.shape[1])
        # Of no rows, `split` makes one part of none.
        totals = torch.cat([part.logsumexp(1) for part in torch.split(logits, ctx.rows)])
        ctx.save_for_backward(logits, targets, is_target, totals)
        true = logits.gather(1, targets[:, None])[:, 0]
        # Not `torch.where`, which would copy the number to the device, and wait.
        return (totals - true).masked_fill(~is_target, 0.0).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        logits, targets, is_target, totals = ctx.saved_tensors
        weights = gradient * is_target
        columns = (logits, totals[:, None], weights[:, None])
        parts = [torch.split(column, ctx.rows) for column in columns]
        for part, total, weight in zip(*parts, strict=True):
            part.sub_(total).exp_().mul_(weight)
        logits[torch.arange(len(logits), device=logits.device), targets] -= weights
        return logits, None
