"""The host does not wait for the device: counted on a pretended one."""

from __future__ import annotations

from typing import Any

import pytest

from tests.scripts.processes import start


def on_device(function: str, **arguments: Any) -> Any:
    """Call a function of `pretend_device` in a process of its own."""
    (ended,) = start("on_pretend_device", what=function, **arguments)
    assert not ended.code, ended.log
    return ended.result


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_a_turn_of_the_loop_waits_once(*, fused: bool, packed: bool) -> None:
    """With padded rows and accumulation, for what was found in the turn before."""
    turns = on_device("train", fused=fused, packed=packed)
    assert len(turns) == 6
    # The first step is told at once, the second a turn later, unless only the host can leave it out.
    assert ("wait: copy to the host" in turns[2]) is not fused
    for turn in turns[3:]:
        assert turn.pop("copy") >= 8
        assert turn == {"wait: copy to the host": 1}


def test_evaluation_waits_once_per_batch() -> None:
    """What it costs to set up, with 1 batch as with 5, left out."""
    one, five = on_device("evaluate")
    assert five.pop("copy") - one.pop("copy") >= 4 * 3
    assert five.pop("wait: copy to the host") - one.pop("wait: copy to the host") == 4
    assert five == one
