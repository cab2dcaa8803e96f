"""Training by compiled code."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch._dynamo.backends import registry

from mlmadapt import TrainingConfig, WholeWordMaskingCollator, accelerate_train
from mlmadapt.testing import tiny_model, tiny_tokenizer
from mlmadapt.training import loop
from tests.scripts import processes
from tests.scripts.processes import outcome
from tests.scripts.short_run import digest, drop_nothing, freeze, make_rows, pack

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [
    pytest.mark.usefixtures("no_curves"),
    # Of torch, about its own copies of tensors.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]


def train(
    folder: Path, *, packed: bool = False, dropout: bool = True, **settings: Any
) -> tuple[str, list[dict[str, float]], Any]:
    """Train for three steps, the last one shorter; return weights, history and model."""
    tokenizer = tiny_tokenizer()
    model = tiny_model(tokenizer)
    if not dropout:
        drop_nothing(model)
    rows = pack(make_rows(48), chunk_size=40) if packed else make_rows(21)
    result = accelerate_train(
        model,
        rows,
        freeze(make_rows(6, seed=9)),
        tokenizer=tokenizer,
        data_collator=WholeWordMaskingCollator(tokenizer),
        config=TrainingConfig(
            output_dir=str(folder),
            per_device_train_batch_size=8,
            num_train_epochs=1,
            logging_steps=1,
            disable_tqdm=True,
            **{"save_strategy": "no", **settings},
        ),
    )
    return digest(model), result.history, model


def stop_at(step: int, take_step: Any) -> Any:
    """Return what takes steps until one is interrupted."""

    def take(run: Any, batches: Any, **kwargs: Any) -> None:
        if run.state.step == step:
            raise KeyboardInterrupt
        take_step(run, batches, **kwargs)

    return take


def approx_history(history: list[dict[str, float]]) -> list[Any]:
    """What history has to be like, but for rounding: it tells of losses and of norms."""
    return [pytest.approx(each, rel=1e-5) for each in history]


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bool]]:
    """A backend, "counting", that tells each graph's operations and whether it is to be trained."""
    graphs: list[tuple[int, bool]] = []

    def compile_graph(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        if not graphs and os.environ.get("FAIL_TO_COMPILE"):
            raise RuntimeError("no compiler here")
        graphs.append((len(graph.graph.nodes), torch.is_grad_enabled()))
        return graph

    for table in (registry._COMPILER_FNS, registry._BACKENDS):
        monkeypatch.setitem(table, "counting", compile_graph)
    torch.compiler.reset()
    return graphs


def test_graphs_of_the_same_operations_train_the_same(
    tmp_path: Path, backend: list[tuple[int, bool]]
) -> None:
    """To the bit, dropout included; and nothing but training is compiled."""
    settings = {"torch_compile": True, "torch_compile_backend": "counting"}
    *compiled, model = train(tmp_path / "compiled", **settings)
    assert compiled == list(train(tmp_path / "plain")[:2])
    assert model._compiled_call_impl is None
    assert sum(size for size, _ in backend) > 50
    assert all(is_trained for _, is_trained in backend)
    assert len(backend) <= 8  # of the parts of the model, and not again for each shape


def test_packed_rows_train_and_resume_by_compiled_code(
    tmp_path: Path, backend: list[tuple[int, bool]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit after a stop, dropout included; as without, but for other rounding."""
    compiled = {"torch_compile": True, "torch_compile_backend": "counting", "packed": True}
    saving = {"save_strategy": "steps", "save_steps": 1, **compiled}
    whole = train(tmp_path / "whole", **saving)[:2]
    with monkeypatch.context() as patch:
        patch.setattr(loop, "take_step", stop_at(2, loop.take_step))
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "stopped", **saving)
    assert train(tmp_path / "stopped", resume_from_checkpoint=True, **saving)[:2] == whole
    assert 0 < len(backend) <= 8
    plain, other = (
        train(tmp_path / name, dropout=False, **settings)[1]
        for name, settings in (("plain", {"packed": True}), ("compiled", compiled))
    )
    assert other == approx_history(plain)


@pytest.mark.slow
def test_packed_rows_killed_under_inductor_end_the_same(tmp_path: Path) -> None:
    """Dropout included, in a process that compiles anew; without it, as not compiled."""
    packed = {"rows": 48, "packed": True, "seconds": 500}
    compiled = {**packed, "torch_compile": True}
    whole = outcome(tmp_path / "whole", **compiled)
    killed = processes.train(tmp_path / "killed", at_step={"3": ["kill"]}, **compiled)
    assert killed.code == -9
    assert outcome(tmp_path / "killed", resume_from_checkpoint=True, **compiled) == whole
    plain, other = (
        outcome(tmp_path / name, dropout=False, **settings)["history"]
        for name, settings in (("plain", packed), ("compiled", compiled))
    )
    assert other == approx_history(plain)


@pytest.mark.parametrize("name", ["no such", "counting"])
@pytest.mark.usefixtures("backend")
def test_what_cannot_be_compiled_is_told_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A backend that is not there, and one that fails, by an error that names the settings."""
    monkeypatch.setenv("FAIL_TO_COMPILE", "1")
    message = "torch_compile is True, but the model cannot be compiled .*torch_compile_backend"
    with pytest.raises(ValueError, match=re.compile(message, re.DOTALL)):
        train(tmp_path, torch_compile=True, torch_compile_backend=name)
