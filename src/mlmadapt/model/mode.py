"""A model's mode: put back where it was, and code compiled for another one left or forgotten."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from threading import Lock

import torch
from torch import nn

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
