"""What is left aside in a block, and put back after it."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch

from mlmadapt.model.checks import plain_code


def is_compiled() -> bool:
    """Tell whether torch compiles what it is asked to."""
    compiled: list[int] = []

    def compile_graph(
        graph: torch.fx.GraphModule, inputs: list[torch.Tensor]
    ) -> torch.fx.GraphModule:
        compiled.append(len(inputs))
        return graph

    torch.compile(lambda each: each + 1, backend=compile_graph)(torch.ones(2))
    return bool(compiled)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_code_is_compiled_again_after_blocks_that_overlap(order: tuple[int, int]) -> None:
    """As those of two threads do, which end in either order; and after an error."""
    blocks = [ExitStack(), ExitStack()]
    for block in blocks:
        block.enter_context(plain_code())
    assert not is_compiled()
    blocks[order[0]].close()
    assert not is_compiled()
    blocks[order[1]].close()
    assert is_compiled()
    with pytest.raises(KeyError), plain_code():
        raise KeyError
    assert is_compiled()
