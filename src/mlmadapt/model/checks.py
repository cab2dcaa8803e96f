"""Do rows, tokenizer and model fit together? Asked before what would fail hours later.

A token id past the embedding gives an `IndexError` that does not name it on the CPU, and a device
assert on a GPU. What a model does with a batch is not looked up by its class but tried, always by
one forward pass of `try_model`, which leaves the model as it was and names it where it fails.
"""

import logging
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import nn

from mlmadapt._types import DataCollator, Model, Rows, Tokenizer
from mlmadapt.data.table import measure_rows

logger = logging.getLogger(__name__)


def check_model(model: Model, called: str = "model") -> None:
    """Check that `model`, or what is `called` so, predicts each token at its own place.

    Raises:
        ValueError: If it is causal, is wrapped, or has no head, token embeddings or weights.
    """
    import transformers  # noqa: PLC0415  # a second to load

    bare = unwrap(model)
    config: Any = type(getattr(bare, "config", None))
    base: Any = transformers.MODEL_MAPPING.get(config, ())  # some types have several
    causal: Any = transformers.MODEL_FOR_CAUSAL_LM_MAPPING.get(config, ())
    masked: Any = transformers.MODEL_FOR_MASKED_LM_MAPPING.get(config, ())
    if not hasattr(bare, "get_input_embeddings"):
        reason = "is not one of transformers"
        for path, part in getattr(bare, "named_modules", dict)():
            if hasattr(part, "get_input_embeddings"):
                inner = called + re.sub(r"\.(\d+)\b", r"[\1]", f".{path}")
                check_model(part, inner)
                raise ValueError(f"{called} is a {type(bare).__name__}; pass {inner}")
    elif any(weight.is_meta for weight in bare.parameters()):
        reason = "is on the device 'meta', where weights have no values"
    elif not hasattr(bare.get_input_embeddings(), "weight"):
        reason = "has no table of token embeddings"
    elif isinstance(bare, causal) and not isinstance(bare, masked):
        reason = "is a causal language model, which shifts its labels"
    elif type(bare) in np.atleast_1d(base):
        reason = "has no prediction head, as AutoModel loads it"
    else:
        return
    raise ValueError(f"{called} {type(bare).__name__} {reason}; load one by AutoModelForMaskedLM")


def check_ties(model: Model) -> None:
    """Check that adapters do not train the input embeddings apart from a head that is tied to them.

    A new word would be read as it was learned, and predicted as if it were not.

    Raises:
        ValueError: If they do.
    """
    bare = unwrap(model)
    both = [bare.get_input_embeddings(), bare.get_output_embeddings() or nn.Module()]
    # Without biases, which are the head's alone. What was tied shares its frozen matrix still.
    inputs, outputs = ({weight for weight in part.parameters() if weight.ndim > 1} for part in both)
    is_tied = inputs & outputs
    is_apart = is_tied and any(weight.requires_grad for weight in inputs ^ outputs)
    if hasattr(model, "peft_config") and is_apart:
        raise ValueError(
            f"model {type(bare).__name__} ties its head to its embeddings, but adapters train them "
            "apart; give LoraConfig trainable_token_indices=[ids of new words], not modules_to_save"
        )


def check_collator(data_collator: DataCollator, tokenizer: Tokenizer) -> None:
    """Check that a collator was made with `tokenizer`, if it tells with which.

    Raises:
        TypeError: If it is a class, or nothing that can be called.
        ValueError: If it has one with other tokens, whose mask would be any token to the model.
    """
    if isinstance(data_collator, type) or not callable(data_collator):
        raise TypeError(
            f"data_collator is {data_collator!r:.80}; it must be an object or a function that "
            "collates, such as WholeWordMaskingCollator(tokenizer)"
        )
    other: Tokenizer = getattr(data_collator, "tokenizer", tokenizer)
    if other is not tokenizer and other.get_vocab() != tokenizer.get_vocab():
        made_with, passed = (
            f"{len(known)} tokens, mask {known.mask_token!r}" for known in (other, tokenizer)
        )
        raise ValueError(
            f"data_collator was made with another tokenizer: one of {made_with}, in place "
            f"of {passed}; make the collator with the tokenizer that is passed"
        )


def check_tokenizer(tokenizer: Tokenizer, model: Model) -> None:
    """Check that `model` has embeddings for all tokens, and tell if it has far more of them.

    Raises:
        ValueError: If it has not.
    """
    embedding: Any = model.get_input_embeddings()
    tokens, embeddings = len(tokenizer), len(embedding.weight)
    text = (
        f"tokenizer ({type(tokenizer).__name__}) has {tokens} tokens, the model "
        f"({type(unwrap(model)).__name__}) embeddings for {embeddings}"
    )
    if tokens > embeddings:
        raise ValueError(
            f"{text}; load the model's own tokenizer or, if this is it and tokens were added, call "
            f"model.resize_token_embeddings({tokens})"
        )
    if embeddings > max(1.1 * tokens, tokens + 1000):  # more than is added to reach a round number
        logger.warning("%s: is it this model's own?", text)


def check_rows(name: str, dataset: Rows, *, model: Model) -> None:
    """Check that `model` can read every row of `dataset`.

    Raises:
        ValueError: If there are no rows, if a row has ids past the model's embedding, or more
            tokens than the model has positions.
    """
    if not len(dataset):
        raise ValueError(f"{name} has no rows; group_texts drops rows shorter than chunk_size")
    embedding: Any = model.get_input_embeddings()
    embeddings = len(embedding.weight)
    longest, highest = measure_rows(name, dataset)
    if highest >= embeddings:
        raise ValueError(
            f"{name} has token id {highest}, the model's embedding {embeddings} rows; tokenize "
            "with the model's own tokenizer"
        )
    positions = position_capacity(model) or longest
    if longest > positions:
        raise ValueError(
            f"{name} has a row of {longest} tokens, the model has positions for {positions}; "
            f"shorten it: group_texts with chunk_size={positions} or less makes such rows"
        )


def check_weights(model: nn.Module) -> None:
    """Check that the weights can be trained, and are of a type that small updates do not vanish in.

    transformers loads the type that a model was stored in. On one run of 32 bits from perplexity
    239 to 170, weights in bfloat16 came to 217, and those in float16 to infinity.

    Raises:
        ValueError: If some are in float16 or not finite, or all are frozen or, without adapters,
            quantised.
    """
    is_quantised = getattr(model, "is_quantized", False) and not hasattr(model, "peft_config")
    types = {weight.dtype for weight in model.parameters() if weight.requires_grad}
    if is_quantised or not types:
        seen = "quantised" if is_quantised else "frozen"
        cure = "drop quantization_config" if is_quantised else "call requires_grad_(True)"
        raise ValueError(
            f"model {type(model).__name__} is {seen}, and such weights cannot be trained; {cure}, "
            "or add an adapter by peft.get_peft_model"
        )
    cure = "call model.float() before training, and set mixed_precision for speed"
    if torch.float16 in types:
        raise ValueError(f"model has weights in float16, in which training overflows; {cure}")
    if torch.bfloat16 in types:
        logger.warning("model has weights in bfloat16, in which most updates are lost; %s", cure)
    if name := find_not_finite(model):
        raise ValueError(f"model has NaN or infinity in {name} before any step; load another")


def check_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Check that a caller's optimizer moves weights of the model, and tell if not all of them.

    Raises:
        TypeError: If it needs a closure.
        ValueError: If it has no weight of the model that is to be trained, as a class has none.
    """
    name = str(optimizer).partition(" (")[0][:80]
    if isinstance(optimizer, torch.optim.LBFGS):
        raise TypeError(f"optimizer is {name}, whose step needs a closure; pass another, as AdamW")
    groups = getattr(optimizer, "param_groups", ())
    trained = {weight for weight in model.parameters() if weight.requires_grad}
    held = {weight for group in groups for weight in group["params"]} & trained
    text = (
        f"optimizer is {name}, with {len(held)} of the {len(trained)} weights of the model that "
        "are to be trained; make an object of those of the model that is passed "
        "(extend_vocabulary and get_peft_model return another)"
    )
    if not held:
        raise ValueError(text)
    if held != trained:
        logger.warning("%s", text)


def find_not_finite(model: nn.Module) -> str | None:
    """Return the first parameter with NaN or infinity; -inf takes a token out of the vocabulary.

    All are looked at before the only wait for the device.
    """
    weights = dict(model.named_parameters())
    are_finite = torch.stack([(values < math.inf).all() for values in weights.values()]).cpu()
    return next((name for name, is_so in zip(weights, are_finite, strict=True) if not is_so), None)


def position_capacity(model: Model) -> int | None:
    """Return how many tokens the model has positions for, or None if it has no table of positions.

    Some models do not use the whole table. RoBERTa and its relatives count positions from the
    padding id, so that they never use 2 of 514; Nystromformer and YOSO use no more than their
    configuration says.

    Examples:
        >>> from mlmadapt.testing import tiny_model, tiny_tokenizer
        >>> position_capacity(tiny_model(tiny_tokenizer("byte_bpe"), architecture="roberta"))
        512
    """
    table = position_table(model)
    if table is None:
        return None
    rows = len(table.weight)
    stated: int = getattr(model.config.get_text_config(), "max_position_embeddings", rows)
    return min(stated, rows) - first_position(model)


def first_position(model: Model) -> int:
    """Return the row of a model's table of positions that is its first token's."""
    padding_idx = getattr(position_table(model), "padding_idx", None)  # RoBERTa's: behind it
    return 0 if padding_idx is None else padding_idx + 1


def position_table(model: Model) -> Any:
    """Return the table of positions, or None if there is none."""
    for path, module in model.named_modules():
        name = path.rpartition(".")[2]
        if name in ("position_embeddings", "embed_positions") and hasattr(module, "weight"):
            return module
    return None


def attention_window(model: Model) -> int:
    """Return how many tokens to each side a layer sees that does not see all, 0 if there is none.

    Examples:
        >>> from mlmadapt.testing import tiny_model, tiny_tokenizer
        >>> attention_window(tiny_model(tiny_tokenizer(), architecture="modernbert"))
        64
    """
    config: Any = model.config.get_text_config()
    layers = config.per_layer_config if getattr(config, "is_heterogeneous", False) else [config]
    # Before transformers 5.23, ModernBERT told of both sides together.
    sides = [getattr(layer, "local_attention", 0) // 2 for layer in layers]
    pairs = zip(layers, sides, strict=True)
    return max(getattr(layer, "sliding_window", side) or 0 for layer, side in pairs)


def rounding(model: Model) -> float:
    """Return how far logits may be off, as a share of them, for no other reason than rounding."""
    is_exact = torch.get_float32_matmul_precision() == "highest"
    return 1e-4 if is_exact and model.dtype == torch.float32 else 0.05


def is_off(logits: torch.Tensor, expected: torch.Tensor, share: float) -> bool:
    """Tell whether logits differ by more than a share of them."""
    # One of -inf, of a token that is out of the vocabulary, differs from no other.
    logits, expected = (each.nan_to_num(neginf=0.0) for each in (logits, expected))
    return bool((logits - expected).norm() > share * expected.norm())


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


def try_model(
    model: Model,
    inputs: Mapping[str, torch.Tensor],
    *,
    labels: torch.Tensor | None = None,
    within: AbstractContextManager[None] | None = None,
) -> torch.Tensor:
    """Return the logits of one forward pass, in 32 bits, to see what a model does with `inputs`.

    It is in evaluation mode meanwhile, and runs without compiled code; its modes, gradients and
    hooks are left as they are.

    Args:
        model: A masked language model, in whatever mode.
        inputs: What it is called with, on any device.
        labels: What it is to predict, of shape ``(batch, sequence)``, if not the ``input_ids``.
        within: What the pass is made in, such as ``sparse.at(positions)``; logits may then have
            another shape.

    Raises:
        ValueError: If the model fails, whatever its own error is, does not predict a token at each
            place, predicts NaN, or would not be as before: BigBird's ``block_sparse``, which its
            first short batch switches off for good.

    Examples:
        >>> from mlmadapt.testing import tiny_model, tiny_tokenizer
        >>> model = tiny_model(tiny_tokenizer())
        >>> tuple(try_model(model, {"input_ids": torch.tensor([[2, 7, 3]])}).shape)
        (1, 3, 475)
    """
    name = type(unwrap(model)).__name__
    if getattr(model.config, "attention_type", None) == "block_sparse":
        raise ValueError(
            f"model {name} has attention_type 'block_sparse', which a short batch switches off for "
            "good, so that what follows depends on it; load it with attention_type='original_full'"
        )
    moved = {name: values.to(model.device) for name, values in inputs.items()}
    plain_code = torch.compiler.set_stance("force_eager")
    with plain_code, evaluation_mode(model), within or nullcontext():
        try:
            output: Any = model(**moved)
        except torch.OutOfMemoryError:  # no fault of the model
            raise
        except Exception as error:
            raise ValueError(
                f"model {name} fails on a batch of {list(inputs)} ({type(error).__name__}: "
                f"{error!s:.150})"
            ) from error
    logits: Any = output.get("logits") if isinstance(output, Mapping) else output[0]
    shape = None if logits is None else tuple(logits.shape)
    labels = inputs["input_ids"] if labels is None else labels
    is_whole = shape and shape[:-1] == labels.shape and shape[-1] > labels.max()
    if shape is None or not (is_whole or within):
        raise ValueError(
            f"model {name} does not predict a token at each place: its logits have shape {shape}, "
            f"the labels {tuple(labels.shape)} and ids up to {labels.max()}; load it by "
            "AutoModelForMaskedLM"
        )
    if not (logits < torch.inf).all():  # or NaN; -inf takes a token out of the vocabulary
        raise ValueError(
            f"model {name} predicts NaN or infinity: its weights are not finite, or too large for "
            "16 bits; load them anew, in 32 bits"
        )
    predicted: torch.Tensor = logits.float()
    return predicted


def unwrap(model: Any) -> Any:
    """Return the model of transformers below `torch.compile` and PEFT's adapters."""
    model = getattr(model, "_orig_mod", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def is_compiled(model: nn.Module) -> bool:
    """Tell whether some of a model is compiled, in place or around a module.

    Examples:
        >>> linear = nn.Linear(1, 1)
        >>> is_compiled(linear), is_compiled(torch.compile(linear))
        (False, True)
    """
    # torch has no public names for it.
    return any(hasattr(part, "_orig_mod") or part._compiled_call_impl for part in model.modules())  # noqa: SLF001
