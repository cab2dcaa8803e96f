"""A pretend device: tensors that say that they are on one, computed on the CPU, and what it counts.

It tells where the host would wait for a real one, where a copy to it would block, and where tensors
of both are mixed, which a real one refuses. It says nothing about speed. Processes that import this
have it for good, since the name of torch's spare backend cannot be taken back.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from contextlib import suppress
from typing import Any, Self

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from short_run import drop_nothing, make_rows, pack
from torch.utils import backend_registration
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from mlmadapt import TrainingConfig, WholeWordMaskingCollator, accelerate_train
from mlmadapt.testing import tiny_model, tiny_tokenizer

WAITS = {
    "aten::_local_scalar_dense",
    "aten::_unique2",
    "aten::equal",
    "aten::is_nonzero",
    "aten::masked_select",
    "aten::nonzero",
    "aten::repeat_interleave.Tensor",
}
counts: Counter[str] = Counter()

torch.utils.rename_privateuse1_backend("pretend")
backend_registration._setup_privateuseone_for_python_backend()
DEVICE = torch.device("pretend:0")


class Pretend(torch.Tensor):
    """A tensor on the pretend device, around one on the CPU."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls: type[Self], inner: torch.Tensor) -> Self:
        """Wrap a tensor."""
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
        )
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Compute on the CPU, and count."""
        kwargs = dict(kwargs or {})
        tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
        is_source = any(isinstance(each, Pretend) for each in tensors)
        is_target = is_source
        if kwargs.get("device") is not None:
            is_target = torch.device(kwargs["device"]).type == "pretend"
            kwargs["device"] = torch.device("cpu")
        kwargs.pop("pin_memory", None)
        _count(func.name(), tensors, args, kwargs, is_source=is_source, is_target=is_target)
        plain, named = tree_map_only(Pretend, lambda each: each.inner, (args, kwargs))
        made = func(*plain, **named)
        for given, argument in zip(args, func._schema.arguments, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                return given if func._schema.returns else None
        return tree_map(_wrap, made) if is_target else made


def _wrap(value: Any) -> Any:
    is_plain = isinstance(value, torch.Tensor) and not isinstance(value, Pretend)
    return Pretend(value) if is_plain else value


def _count(
    name: str,
    tensors: list[torch.Tensor],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    is_source: bool,
    is_target: bool,
) -> None:
    """Count what an operation would cost."""
    moves, blocks = name == "aten::_to_copy", not kwargs.get("non_blocking")
    if name == "aten::copy_" and tensors[1].dim():
        is_target, is_source = (isinstance(each, Pretend) for each in tensors)
        moves, blocks = True, not any(args[2:])
    if name in WAITS and is_source:
        counts[f"wait: {name}"] += 1
    if name in ("aten::index.Tensor", "aten::index_put_", "aten::_index_put_impl_"):
        is_boolean = any(each is not None and each.dtype is torch.bool for each in args[1])
        counts["wait: index by booleans"] += is_boolean
    if moves and is_source and not is_target:
        counts["wait: copy to the host"] += 1
    if moves and is_target and not is_source:
        counts["copy that blocks" if blocks else "copy"] += 1
    on_host = any(each.dim() and not isinstance(each, Pretend) for each in tensors)
    if is_source and on_host and not moves:
        counts[f"mixed: {name}"] += 1


_library = torch.library.Library("_", "IMPL")
_library.fallback(
    lambda func, *args, **kwargs: Pretend.__torch_dispatch__(func, (Pretend,), args, kwargs),
    "PrivateUse1",
)


class Enough(Exception):  # noqa: N818  # no error
    """Ends a run before it saves a model, which has no memory to save here."""


def waits_of_turns() -> list[Any]:
    """Train a few steps on packed rows; return what each turn of the loop costs."""
    tokenizer, turns = tiny_tokenizer(), []
    model = drop_nothing(tiny_model(tokenizer)).to(DEVICE)
    accelerator = Accelerator()
    for shared in (PartialState._shared_state, AcceleratorState._shared_state):
        shared["device"] = DEVICE
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

    def end_turn(*_: object) -> None:
        turns.append(dict(+counts))
        counts.clear()
        if len(turns) == 6:
            raise Enough

    optimizer.register_step_post_hook(end_turn)
    with tempfile.TemporaryDirectory() as folder, suppress(Enough):
        accelerate_train(
            model,
            pack(make_rows(64), chunk_size=40),
            tokenizer=tokenizer,
            data_collator=WholeWordMaskingCollator(tokenizer, seed=1),
            accelerator=accelerator,
            optimizer=optimizer,
            config=TrainingConfig(
                output_dir=folder,
                max_steps=9,
                per_device_train_batch_size=4,
                gradient_accumulation_steps=2,
                logging_steps=100,
                eval_strategy="no",
                save_strategy="no",
                disable_tqdm=True,
            ),
        )
    return turns
