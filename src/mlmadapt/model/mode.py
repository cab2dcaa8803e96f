"""A model's mode: put back where it was, and code compiled for another one forgotten."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


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


def reset_compiled(model: nn.Module) -> None:
    """Forget what was compiled without a model's new hooks, and would go on without them."""
    if any(hasattr(each, "_orig_mod") or each._compiled_call_impl for each in model.modules()):  # noqa: SLF001
        torch.compiler.reset()
