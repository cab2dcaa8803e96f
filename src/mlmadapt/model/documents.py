"""Documents that share a row and do not see each other.

A model is used on one document at a time. In a row of several it would attend from one to the other
and see most of them at positions that they never have in use: on single sentences, adapting so ends
at a perplexity 10 % higher. A mask of shape ``(batch, 1, sequence, sequence)`` (on a CPU mostly
without memory, see `document_mask`) and positions that begin anew undo that. Much that looks like
such a mask leaks (a mask of document numbers, 1 and 0 in place of 0 and the lowest number, booleans
in eager attention, positions alone), so each model has to show on a few made-up documents that it
isolates them.
"""

import inspect
from contextlib import AbstractContextManager
from threading import get_ident
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from mlmadapt._types import Model
from mlmadapt.data.rows import document_bounds
from mlmadapt.model import checks
from mlmadapt.model.document_mask import mask_documents


def isolate_documents(model: Model) -> "DocumentIsolation":
    """Let each document of a packed row see itself alone, at the positions that it has alone.

    From then on, batches with ``document_ids`` (rows from `pack_texts`) give each document the
    output, loss and gradient that it has in a row of its own; batches without are not touched.
    `accelerate_train` and `evaluate_mlm` call this themselves; call it in a loop of your own, and
    with `Trainer`. It goes together with `sparse_prediction`, in any order.

    The model shows on a few made-up documents that it isolates them, with its attention ("sdpa" or
    "eager"). Of transformers' architectures, ALBERT, BERT, DistilBERT, ELECTRA, RoBERTa and their
    relatives do, from 5.23 on also ModernBERT and MPNet; DeBERTa does not.

    On a CPU with "sdpa", documents of like length attend together, which changes the last bits of
    their logits with the batch. Elsewhere (on other devices, with "eager", under `torch.compile`)
    an attention mask of ``batch x sequence x sequence`` numbers is made, at most 1 GiB.

    Args:
        model: A masked language model of transformers, bare or with adapters (PEFT); before it is
            wrapped for distribution.

    Returns:
        A handle with `remove`, which is a context manager too.

    Raises:
        ValueError: If the model does not isolate documents, is causal, or is wrapped for several
            devices. In a forward pass, if ``document_ids`` are not of the shape of ``input_ids`` or
            do not rise along a row, if an attention mask is made, and larger than 1 GiB, or if code
            runs that was compiled without this.

    Source:
        Krell et al. 2021, arXiv:2107.02027 (packing without cross-contamination).

    Examples:
        >>> from mlmadapt.testing import tiny_model, tiny_tokenizer
        >>> model = tiny_model(tiny_tokenizer()).eval()
        >>> packed, documents = torch.tensor([[7, 8, 9, 7]]), torch.tensor([[0, 0, 1, 1]])
        >>> with isolate_documents(model), torch.no_grad():
        ...     both = model(input_ids=packed, document_ids=documents).logits
        ...     alone = model(input_ids=packed[:, 2:]).logits
        >>> torch.allclose(both[:, 2:], alone, atol=1e-5)
        True
    """
    checks.check_model(model)
    torch.compiler.reset()  # whoever holds code that was compiled without the hooks
    return DocumentIsolation(model)


class DocumentIsolation(AbstractContextManager["DocumentIsolation"]):
    """The hooks that keep documents apart, and the handle that `isolate_documents` returns.

    Like those of `SparsePrediction`, they stay out of `torch.compile`.
    """

    def __init__(self, model: Model) -> None:
        encoder = checks.unwrap(model).base_model
        self._config = encoder.config
        self._parameters = list(inspect.signature(encoder.forward).parameters)
        self._first_position = checks.first_position(model)
        # Per thread, since `DataParallel` calls replicas with the same hooks at the same time.
        self._documents: dict[int, tuple[torch.Tensor, torch.Tensor, bool]] = {}
        self._hooks = [
            model.register_forward_pre_hook(self._take_documents, with_kwargs=True),
            # Runs after a failed forward pass too, so that it leaves nothing behind.
            model.register_forward_hook(self._finish, always_call=True),
            encoder.register_forward_pre_hook(self._isolate, with_kwargs=True),
        ]
        try:
            _check_isolation(model)
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Let the model see a row as one text again.

        Examples:
            >>> from mlmadapt.testing import tiny_model, tiny_tokenizer
            >>> handle = isolate_documents(tiny_model(tiny_tokenizer()))
            >>> handle.remove()
        """
        for hook in self._hooks:
            hook.remove()

    def __exit__(self, *exc_info: object) -> None:
        self.remove()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _take_documents(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:  # noqa: ARG002  # torch's signature
        self._documents.pop(get_ident(), None)
        if kwargs.get("document_ids") is None:
            return None
        documents = kwargs.pop("document_ids")
        ids = args[0] if args else kwargs.get("input_ids")
        inputs: Any = kwargs["inputs_embeds"] if ids is None else ids
        mask = kwargs.pop("attention_mask", None)
        seen = _read_documents(documents, inputs, mask)
        # Of all that lies there: what attention does not see keeps its position.
        positions = _count_positions(documents, ids, self._first_position)
        self._documents[get_ident()] = (seen, positions, False)
        return args, kwargs

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _isolate(self, encoder: Model, args: Any, kwargs: dict[str, Any]) -> Any:
        if get_ident() not in self._documents:
            return None
        documents, positions, _ = self._documents[get_ident()]
        self._documents[get_ident()] = (documents, positions, True)
        named = {**dict(zip(self._parameters, args, strict=False)), **kwargs}
        device = documents.device.type
        is_mixed = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if is_mixed else encoder.dtype
        named["attention_mask"] = self._make_masks(documents, dtype)
        if "position_ids" in self._parameters:
            named["position_ids"] = positions
        return (), named

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _finish(self, model: nn.Module, args: Any, output: Any) -> None:  # noqa: ARG002  # torch's signature
        *_, is_used = self._documents.pop(get_ident(), (True,))
        if not is_used and output is not None:
            raise ValueError(
                f"model {type(model).__name__} ran code compiled without isolate_documents, which "
                "lets documents see each other; call torch.compiler.reset() after isolate_documents"
            )

    def _make_masks(
        self, documents: torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor | dict[str, torch.Tensor]:
        """Return the attention mask, or one for each kind of layers."""
        full = mask_documents(documents, dtype)
        if set(getattr(self._config, "layer_types", None) or ()) <= {"full_attention"}:
            return full
        near = mask_documents(documents, dtype, self._config.sliding_window)
        return {"full_attention": full, "sliding_attention": near}


def _count_positions(
    documents: torch.Tensor, ids: torch.Tensor | None = None, first: int = 0
) -> torch.Tensor:
    """Count the tokens of each document from `first`.

    RoBERTa and its relatives, which count from behind their padding token's id, do not count that
    token, wherever it stands; its position is its id.

    Examples:
        >>> _count_positions(torch.tensor([[0, 0, 0, 1, 1, -1]]))
        tensor([[0, 1, 2, 0, 1, 0]])
        >>> _count_positions(torch.tensor([[0, 0, 0, 1]]), torch.tensor([[7, 1, 7, 7]]), 2)
        tensor([[2, 1, 3, 2]])
    """
    counts = torch.ones_like(documents) if ids is None else (ids != first - 1).long()
    before = counts.cumsum(1) - counts
    begins = torch.ones_like(documents, dtype=torch.bool)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    places = before - before.masked_fill(~begins, 0).cummax(1).values
    return torch.where(counts == 1, places + first, first - 1)


def _read_documents(
    documents: torch.Tensor, inputs: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """Return the document of each token, -1 for padding, which is a document of its own."""
    if documents.shape != inputs.shape[:2]:
        raise ValueError(
            f"document_ids have shape {tuple(documents.shape)}, the inputs "
            f"{tuple(inputs.shape[:2])}; each token needs the number of its document, as "
            "pack_texts gives it"
        )
    if mask is not None:
        documents = documents.masked_fill(mask.as_subclass(torch.Tensor) == 0, -1)
    # Elsewhere it would wait for the device; collators check it on the host.
    if documents.device.type == "cpu" and not torch.compiler.is_compiling():
        rows, sequence = documents.shape
        document_bounds(documents.numpy().ravel(), np.arange(0, (rows + 1) * sequence, sequence))
    return documents


def _check_isolation(model: Model) -> None:
    """Check that documents have together the logits that they have alone.

    Raises:
        ValueError: If not.
    """
    bare = checks.unwrap(model)
    attention = getattr(bare.config, "_attn_implementation", None)
    if attention == "flex_attention":
        raise ValueError(
            f"model {type(bare).__name__} has attention 'flex_attention', which can abort on masks "
            "of documents; load it with attn_implementation='sdpa'"
        )
    config = bare.config.get_text_config()
    pad_id = getattr(config, "pad_token_id", None) or 0
    # Long enough to reach out of the window of sliding attention; two are padded to each other.
    sizes = [6, 2 * min(checks.attention_window(model), 512) + 7, 8]
    documents = torch.repeat_interleave(torch.arange(3), torch.tensor(sizes))
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(config.vocab_size, (2, sum(sizes)), generator=generator)
    drawn[drawn == pad_id] = (pad_id + 1) % config.vocab_size  # some see it without a mask
    middle = documents == 1
    row, others = drawn[:1], torch.where(middle, drawn[:1], drawn[1:])
    parts = list(torch.split(drawn[0], sizes))
    padded = pad_sequence(parts, batch_first=True, padding_value=pad_id)
    is_token = pad_sequence([torch.ones_like(part) for part in parts], batch_first=True)
    inputs = {"input_ids": padded, "attention_mask": is_token}
    alone = checks.try_model(model, inputs)[is_token == 1]  # what fails would without documents
    reason = "a document's logits are not those that it has alone"
    try:
        together, in_other_company = (
            checks.try_model(model, {"input_ids": tokens, "document_ids": documents[None]})[0]
            for tokens in (row, others)
        )
    except ValueError as error:  # of a model that takes no such mask
        reason = f"{error!s:.110}"
    else:
        if not torch.equal(together[middle], in_other_company[middle]):
            reason = "a document's logits depend on the others in its row"
        elif not checks.is_off(together, alone, checks.rounding(model)):
            return
    cure = "use rows without 'document_ids': padded ones of one document each, or group_texts"
    if attention not in ("eager", "sdpa"):
        cure = "load it with attn_implementation='sdpa' or 'eager'"
    raise ValueError(
        f"model {type(bare).__name__} with attention {attention!r} does not keep the documents of "
        f"packed rows apart: {reason}; {cure}"
    )
