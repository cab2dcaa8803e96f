"""Checks that find before the first step what would otherwise fail hours after it.

A token id past the embedding gives an `IndexError` that does not name it on the CPU, and a device
assert on a GPU.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from threading import Lock
from typing import Any

import numpy as np
import torch
from torch import nn

from mlmadapt._types import DataCollator, Model, Rows, Tokenizer
from mlmadapt.data.table import measure_rows


def check_model(model: Model) -> None:
    """Check that `model` predicts each token at its own place.

    Raises:
        ValueError: If it is a causal model, has no head, or is wrapped for several devices.
    """
    from transformers.models.auto import modeling_auto  # noqa: PLC0415  # a second to load

    bare = unwrap(model)
    names = {ancestor.__name__ for ancestor in type(bare).__mro__}
    causal = names.intersection(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    masked = names.intersection(modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES.values())
    # Some have several for one type of model.
    headless = [np.atleast_1d(each) for each in modeling_auto.MODEL_MAPPING_NAMES.values()]
    reason = None
    if not hasattr(bare, "get_input_embeddings"):
        reason = "is not one of transformers (of one that is wrapped, pass its .module)"
    elif causal and not masked:
        reason = "is a causal language model, which shifts its labels"
    elif not masked and type(bare).__name__ in np.concatenate(headless):
        reason = "has no prediction head, as AutoModel loads it"
    if reason is not None:
        raise ValueError(f"model {type(bare).__name__} {reason}; load one by AutoModelForMaskedLM")


def unwrap(model: Any) -> Any:
    """Return the model of transformers below `torch.compile` and PEFT's adapters."""
    model = getattr(model, "_orig_mod", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def check_collator(data_collator: DataCollator, tokenizer: Tokenizer) -> None:
    """Check that a collator was made with `tokenizer`, if it tells with which.

    Raises:
        ValueError: If it has one with other tokens, whose mask would be any token to the model.
    """
    own: Tokenizer = getattr(data_collator, "tokenizer", tokenizer)
    if own is not tokenizer and own.get_vocab() != tokenizer.get_vocab():
        raise ValueError(
            f"data_collator was made with another tokenizer: {type(own).__name__} of {len(own)} "
            f"tokens, its mask {own.mask_token!r} the id {own.mask_token_id}; tokenizer is "
            f"{type(tokenizer).__name__} of {len(tokenizer)}, its mask {tokenizer.mask_token!r} "
            f"{tokenizer.mask_token_id}. Make the collator with the tokenizer that is passed"
        )


def check_rows(
    name: str,
    dataset: Rows,
    *,
    model: Model,
    tokenizer: Tokenizer,
) -> None:
    """Check that `model` can read every row of `dataset`.

    Raises:
        ValueError: If there are no rows, if the tokenizer or a row has ids past the model's
            embedding, or if a row has more tokens than the model has positions.
        TypeError: If `dataset` is a dict of datasets, or has no length.
    """
    if isinstance(dataset, Mapping) or not hasattr(dataset, "__len__"):
        raise TypeError(
            f"{name} is a {type(dataset).__name__}; it must be one dataset, or a list, whose rows "
            "can be counted; of a dict of datasets, pass one value"
        )
    if not len(dataset):
        raise ValueError(f"{name} has no rows; group_texts drops rows shorter than chunk_size")
    embedding: Any = model.get_input_embeddings()
    embeddings = len(embedding.weight)
    if len(tokenizer) > embeddings:
        raise ValueError(
            f"tokenizer ({type(tokenizer).__name__}) has {len(tokenizer)} tokens, the model "
            f"({type(unwrap(model)).__name__}) embeddings for {embeddings}; load the model's own "
            "tokenizer or, if this is it and tokens were added, call "
            f"model.resize_token_embeddings({len(tokenizer)})"
        )
    longest, highest = measure_rows(name, dataset)
    if highest >= embeddings:
        raise ValueError(
            f"{name} has token id {highest}, the model's embedding {embeddings} rows; tokenize "
            "with the model's own tokenizer"
        )
    positions = position_capacity(model)
    if positions is not None and longest > positions:
        raise ValueError(
            f"{name} has a row of {longest} tokens, the model has positions for {positions}; "
            f"shorten it: group_texts with chunk_size={positions} or less makes such rows"
        )


def position_capacity(model: Model) -> int | None:
    """Return how many tokens the model has positions for, or None if it has no table of positions.

    Some models do not use the whole table. RoBERTa and its relatives count positions from the
    padding id, so that they never use 2 of 514; Nystromformer and YOSO list those that they use in
    a buffer.

    Examples:
        >>> from mlmadapt.testing import tiny_model, tiny_tokenizer
        >>> position_capacity(tiny_model(tiny_tokenizer("byte_bpe"), architecture="roberta"))
        512
    """
    found = position_table(model)
    if found is None:
        return None
    parent, table = found
    padding_idx = getattr(table, "padding_idx", None)
    capacity = len(table.weight) - (0 if padding_idx is None else padding_idx + 1)
    listed = getattr(parent, "position_ids", None)
    return capacity if listed is None else min(capacity, listed.shape[-1])


def position_table(model: Model) -> tuple[Any, Any] | None:
    """Return the table of positions and the module that holds it, or None if there is none."""
    for path, module in model.named_modules():
        parent, _, name = path.rpartition(".")
        if name in ("position_embeddings", "embed_positions") and hasattr(module, "weight"):
            return model.get_submodule(parent), module
    return None


# ---- was model/mode: A model's mode: put back where it was, and code compiled for another one left or forgotten.


_plain = ExitStack()
_inside: list[object] = []
_turn = Lock()


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Switch off dropout and gradients inside the block; each module gets its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, was_training in modes:
            module.training = was_training


@contextmanager
def plain_code() -> Iterator[None]:
    """Leave compiled code aside inside the block, which several threads may be in at once.

    torch has one stance for all threads. Blocks that overlap would put back each other's, and leave
    compiled code aside for good; so the first sets it, and the last one puts it back.
    """
    inside = object()
    with _turn:
        if not _inside:
            _plain.enter_context(torch.compiler.set_stance("force_eager"))
        _inside.append(inside)
    try:
        yield
    finally:
        with _turn:
            _inside.remove(inside)
            if not _inside:
                _plain.close()


def reset_compiled(model: nn.Module) -> None:
    """Forget what was compiled without a model's new hooks, and would go on without them."""
    if any(hasattr(each, "_orig_mod") or each._compiled_call_impl for each in model.modules()):  # noqa: SLF001
        torch.compiler.reset()
