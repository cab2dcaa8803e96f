"""The host does not wait for the device, counted on a pretended one; and nothing is spoiled."""

from __future__ import annotations

from contextlib import nullcontext
from itertools import count
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers
from packaging.version import Version

from mlmadapt import TrainingConfig, WholeWordMaskingCollator, accelerate_train
from mlmadapt.testing import tiny_model, tiny_tokenizer
from tests.scripts.processes import start
from tests.scripts.short_run import make_rows

if TYPE_CHECKING:
    from pathlib import Path


# Earlier, it makes its masks in a way that the pretended device does not know.
needs_transformers = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"), reason="transformers makes other masks"
)


def on_device(function: str, **arguments: Any) -> Any:
    """Call a function of `pretend_device` in processes of its own; return what the first did."""
    first, *others = start("on_pretend_device", what=function, **arguments)
    for ended in (first, *others):
        assert not ended.code, ended.log
    return first.result


@needs_transformers
@pytest.mark.parametrize("architecture", ["bert", "modernbert"])
@pytest.mark.parametrize("fused", [False, True])
def test_a_turn_of_the_loop_waits_once(*, fused: bool, architecture: str) -> None:
    """With packed rows and accumulation, for what was found in the turn before."""
    turns = on_device("train", fused=fused, architecture=architecture)
    assert len(turns) == 6
    # The first step is read at once, the second a turn later, unless the host has to know.
    assert ("wait: copy to the host" in turns[2]) is not fused
    for turn in turns[3:]:
        assert turn.pop("copy") >= 8
        assert turn == {"wait: copy to the host": 1}


@pytest.mark.distributed
def test_processes_agree_without_their_devices() -> None:
    """Where the parts of a stream end, which is asked in each step."""
    assert on_device("agree", world=2) == [[False, True], {}]


@pytest.mark.distributed
def test_a_step_on_parts_of_a_stream_asks_the_devices_no_more_than_any_other(
    tmp_path: Path,
) -> None:
    """Over the end of an epoch, where one part is longer than the other."""
    settings = {"rows": 30, "max_steps": 7, "per_device_train_batch_size": 4, "world": 2}
    whole, parts = (
        start("count_reductions", folder=str(tmp_path / stream), stream=stream, **settings)[0]
        for stream in ("plain", "shards")
    )
    assert not parts.code, parts.log
    assert parts.result == whole.result >= 7


@pytest.mark.usefixtures("no_curves")
@pytest.mark.parametrize("logging_steps", [1, 100])
@pytest.mark.parametrize("fused", [False, True])
def test_a_spoiled_step_changes_no_weight(
    tmp_path: Path, *, fused: bool, logging_steps: int
) -> None:
    """Nor does the next, whose gradient is finite, and which began before the host knew."""
    tokenizer, weights = tiny_tokenizer(), []
    for steps, is_spoiled in ((2, False), (9, True)):
        model = tiny_model(tokenizer)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=fused)
        passes = count()
        bias = model.get_output_embeddings().bias
        bias.register_hook(lambda grad: grad * (torch.nan if next(passes) == 2 else 1.0))  # noqa: B023
        error = pytest.raises(FloatingPointError, match=r"step 2 \(epoch 0\) is not fin")
        with error if is_spoiled else nullcontext():
            accelerate_train(
                model,
                make_rows(40),
                tokenizer=tokenizer,
                data_collator=WholeWordMaskingCollator(tokenizer),
                optimizer=optimizer,
                config=TrainingConfig(
                    output_dir=str(tmp_path / str(steps)),
                    max_steps=steps,
                    per_device_train_batch_size=4,
                    lr_scheduler_type="constant",
                    logging_steps=logging_steps,
                    disable_tqdm=True,
                ),
            )
        assert next(passes) == (2 if not is_spoiled else 4 if fused and logging_steps > 1 else 3)
        weights.append([each.detach().clone() for each in model.parameters()])
    for expected, found in zip(*weights, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert not hasattr(optimizer, "found_inf")
