"""The host does not wait for the device, counted on a pretended one."""

from __future__ import annotations

import pytest
import transformers
from packaging.version import Version

from tests.scripts.processes import start


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"),
    reason="transformers makes masks in a way that the pretended device does not know",
)
def test_a_turn_of_the_loop_waits_for_the_turn_before_it_alone() -> None:
    """With packed rows and accumulation: a step is read behind the device."""
    (ended,) = start("waits_of_turns")
    assert not ended.code, ended.log
    assert len(ended.result) == 6
    for turn in ended.result[3:]:  # the first step is read at once, the second a turn later
        assert turn.pop("copy") >= 8
        assert turn == {"wait: copy to the host": 1}
