"""A run by compiled code: the same figures, before and after an interruption."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch._inductor import compile_fx

from mlmadapt.training import loop
from tests.scripts import processes
from tests.scripts.processes import outcome
from tests.scripts.short_run import drop_nothing, make_rows, pack
from tests.scripts.tiny_run import SAVING, TinyRun, equal, weights

if TYPE_CHECKING:
    from pathlib import Path

# Of torch, about its own copies of tensors.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bool]]:
    """A compiler that runs graphs as they are: operations of each, and whether it is trained."""
    graphs: list[tuple[int, bool]] = []

    def compile_graph(graph: torch.fx.GraphModule, inputs: Any, **_: Any) -> Any:
        graphs.append((len(graph.graph.nodes), torch.is_grad_enabled()))
        return graph

    monkeypatch.setattr(compile_fx, "compile_fx", compile_graph)
    torch.compiler.reset()
    return graphs


def make_run(folder: Path, *, packed: bool = False) -> TinyRun:
    """A run of three steps, the last one shorter."""
    run = TinyRun(folder)
    run.rows = pack(make_rows(48), chunk_size=40)[:10] if packed else make_rows(10)
    run.eval_rows = make_rows(6, seed=9)
    return run


@pytest.mark.usefixtures("no_curves")
def test_graphs_of_the_same_operations_train_the_same(
    tmp_path: Path, backend: list[tuple[int, bool]]
) -> None:
    """To the bit, dropout included; and nothing but training is compiled."""
    compiled, plain = make_run(tmp_path / "compiled"), make_run(tmp_path / "plain")
    assert compiled.train(torch_compile=True).history == plain.train().history
    assert equal(weights(compiled.model), weights(plain.model))
    assert compiled.model._compiled_call_impl is None
    assert sum(size for size, _ in backend) > 50
    assert all(is_trained for _, is_trained in backend)
    assert len(backend) <= 8  # of the parts of the model, and not again for each shape


@pytest.mark.usefixtures("no_curves")
def test_packed_rows_train_and_resume_by_compiled_code(
    tmp_path: Path, backend: list[tuple[int, bool]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit after a stop, dropout included; as without, but for other rounding."""
    settings = {"torch_compile": True, **SAVING}
    whole = make_run(tmp_path / "whole", packed=True)
    history = whole.train(**settings).history
    take_step = loop.take_step

    def stop(run: Any, batches: Any, **options: Any) -> None:
        if run.state.step == 2:
            raise KeyboardInterrupt
        take_step(run, batches, **options)

    stopped = make_run(tmp_path / "stopped", packed=True)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "take_step", stop)
        with pytest.raises(KeyboardInterrupt):
            stopped.train(**settings)
    stopped = make_run(tmp_path / "stopped", packed=True)
    assert stopped.train(resume_from_checkpoint=True, **settings).history == history
    assert equal(weights(stopped.model), weights(whole.model))
    assert 0 < len(backend) <= 8
    histories = []
    for is_compiled in (False, True):
        run = make_run(tmp_path / str(is_compiled), packed=True)
        drop_nothing(run.model)
        histories.append(run.train(torch_compile=is_compiled).history)
    assert histories[1] == [pytest.approx(entry, rel=1e-5) for entry in histories[0]]


@pytest.mark.usefixtures("no_curves", "backend")
@pytest.mark.parametrize("dynamic", [None, True])
def test_a_model_that_was_compiled_before_is_isolated(
    tmp_path: Path, *, dynamic: bool | None
) -> None:
    """By the caller, and used, with code that would let documents see each other."""
    histories = []
    for name in ("fresh", "used"):
        run = make_run(tmp_path / name, packed=True)
        drop_nothing(run.model)
        if name == "used":
            compiled: Any = torch.compile(run.model.train(), dynamic=dynamic)
            for count in (4, 5):
                compiled(input_ids=torch.full((count, 8), 7)).logits.sum().backward()
            run.model.zero_grad()
        histories.append(run.train(torch_compile=True).history)
    assert histories[1] == histories[0]


@pytest.mark.usefixtures("no_curves")
def test_what_cannot_be_compiled_is_told_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By an error that names the setting."""

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(compile_fx, "compile_fx", fail)
    torch.compiler.reset()
    with pytest.raises(ValueError, match="torch_compile is True, but the model cannot be compiled"):
        make_run(tmp_path).train(torch_compile=True)


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_compiled_code_killed_between_steps_ends_the_same(
    tmp_path: Path, precision: str, *, packed: bool
) -> None:
    """Dropout included, in a process that compiles anew, in whatever step that one begins."""
    settings = {"rows": 48 if packed else 21, "packed": packed, "mixed_precision": precision}
    settings |= {"torch_compile": True, "seconds": 500}
    whole = outcome(tmp_path / "whole", **settings)
    killed = processes.train(tmp_path / "killed", at_step={"3": ["kill"]}, **settings)
    assert killed.code == -9
    assert outcome(tmp_path / "killed", resume_from_checkpoint=True, **settings) == whole
