"""Hooks hold in code that is compiled, before or after, and in several threads at once."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import pytest
import torch

from mlmadapt import (
    WholeWordMaskingCollator,
    evaluate_mlm,
    isolate_documents,
    sparse_prediction,
)
from mlmadapt.model.checks import try_model
from mlmadapt.model.forward import masked_forward
from mlmadapt.testing import assert_documents_isolated
from tests.scripts.packed import ALONE, IS_OLD, PACKED, TOKENIZER, build, step
from tests.scripts.short_run import drop_nothing, freeze

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel

COLLATOR = WholeWordMaskingCollator(TOKENIZER, seed=3, pad_to_multiple_of=64)
BATCHES = [COLLATOR(ALONE[at : at + 3]) for at in (0, 3, 6)]

# torch looks at the gradient of every tensor that a graph takes.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


@pytest.fixture(autouse=True)
def _compile_anew() -> Iterator[None]:
    """Nothing that another test compiled is used."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def model() -> PreTrainedModel:
    """A tiny BERT in training mode, whose steps can be compared."""
    return drop_nothing(build("bert")).train()


def assert_same(steps: list[Any], expected: list[Any]) -> None:
    """Losses and gradients of steps are the same, but for rounding."""
    for (loss, gradient), (expected_loss, expected_gradient) in zip(steps, expected, strict=True):
        assert float(loss) == pytest.approx(float(expected_loss), rel=1e-5)
        assert (gradient - expected_gradient).norm() <= 1e-5 * expected_gradient.norm()


@pytest.mark.parametrize("is_hooked_first", [True, False])
def test_a_sparse_head_in_compiled_code(model: PreTrainedModel, *, is_hooked_first: bool) -> None:
    """Compiled before or after, the hooks hold, and the number of masked tokens may vary."""
    expected = [step(model, batch) for batch in BATCHES]
    handle = sparse_prediction(model) if is_hooked_first else nullcontext()
    compiled: Any = torch.compile(model, backend="eager")
    with handle, nullcontext() if is_hooked_first else sparse_prediction(compiled):
        assert_same([step(compiled, batch) for batch in BATCHES], expected)
        assert compiled(**BATCHES[0]).logits.shape[0] == 1


@pytest.mark.parametrize("is_wrapped", [True, False])
def test_what_was_compiled_before_gets_the_hooks(
    model: PreTrainedModel, caplog: pytest.LogCaptureFixture, *, is_wrapped: bool
) -> None:
    """By `torch.compile(model)` or `model.compile()`, and called, with code that has no hooks."""
    batch = BATCHES[0]
    compiled: Any = torch.compile(model, backend="eager") if is_wrapped else model
    if not is_wrapped:
        model.compile(backend="eager")
    expected = step(compiled, batch)
    with torch.no_grad():
        compiled.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    with masked_forward(compiled, batch) as forward:
        assert forward.sparse is not None
        assert "full head" not in caplog.text
        assert_same([step(compiled.train(), batch)], [expected])
        assert compiled(**batch).logits.shape[0] == 1


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("is_labelled", [False, True])
def test_code_that_someone_else_holds_gets_the_hooks(
    model: PreTrainedModel, *, dynamic: bool | None, is_labelled: bool
) -> None:
    """The handle is asked of the bare model; what was compiled around it before follows."""
    compiled: Any = torch.compile(model, backend="eager", dynamic=dynamic)
    alone, packed = BATCHES[0], COLLATOR(PACKED[:2])
    for batch in (alone, BATCHES[1]):
        step(compiled, batch)
    with isolate_documents(model), sparse_prediction(model):
        expected = [step(model, packed), step(model, alone)]
        assert_same([step(compiled, packed), step(compiled, alone)], expected)
        if is_labelled:
            assert compiled(**packed).logits.shape[0] == 1
    if not is_labelled:
        assert compiled(**alone).logits.shape[:2] == alone["labels"].shape


def test_a_trial_runs_no_compiled_code(model: PreTrainedModel) -> None:
    """Rows to try are of other shapes than those to train on, and compiling takes long."""
    graphs: list[torch.fx.GraphModule] = []

    def compile_graph(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph

    model.compile(backend=compile_graph)
    inputs = {"input_ids": BATCHES[0]["input_ids"]}
    try_model(model, inputs)
    assert not graphs
    model(**inputs)
    assert graphs


def test_an_evaluation_of_a_bare_model_leaves_compiled_code(model: PreTrainedModel) -> None:
    """As between two epochs of a loop; of the compiled one, it gives the same figure."""
    graphs: list[torch.fx.GraphModule] = []

    def compile_graph(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph

    compiled: Any = torch.compile(model, backend=compile_graph)
    frozen = freeze(ALONE[:8])
    compiled(**BATCHES[0])
    number = len(graphs)
    metrics = evaluate_mlm(model, frozen, tokenizer=TOKENIZER)
    compiled(**BATCHES[0])
    assert len(graphs) == number
    by_compiled = evaluate_mlm(compiled, frozen, tokenizer=TOKENIZER)
    assert by_compiled.loss == pytest.approx(metrics.loss, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("is_compiled_first", [False, True])
def test_compiled_models_isolate(*, is_compiled_first: bool) -> None:
    """Documents stay apart under `torch.compile`, whichever comes first."""
    model = build("bert")
    if is_compiled_first:
        model.compile()
        model(input_ids=torch.tensor([[7, 8, 9]]))
    with isolate_documents(model):
        if not is_compiled_first:
            model.compile()
        assert_documents_isolated(model, PACKED[-2:], atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["bert", *([] if IS_OLD else ["modernbert"])])
def test_compiled_models_learn_what_others_do(architecture: str) -> None:
    """Compiled, masks are dense; loss and gradient are the same, and few graphs are made."""
    model = drop_nothing(build(architecture)).train()
    packed = [COLLATOR(PACKED[at : at + 2]) for at in (0, 2, 4)]
    batches = [packed[0], COLLATOR(ALONE[:2]), *packed[1:]]
    with isolate_documents(model), sparse_prediction(model):
        expected = [step(model, batch) for batch in batches]
        model.compile(backend="aot_eager")
        torch._dynamo.utils.counters.clear()
        assert_same([step(model, batch) for batch in batches], expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 3


def test_threads_do_not_share_positions(model: PreTrainedModel) -> None:
    """`DataParallel` calls replicas, whose hooks are the same objects, at the same time."""
    batches = [COLLATOR(ALONE[:2]), COLLATOR(ALONE[2:6])]
    expected = [model(**batch).loss.item() for batch in batches]
    both_are_inside = threading.Barrier(2, timeout=120)
    losses = [0.0, 0.0]

    def run(place: int) -> None:
        losses[place] = model(**batches[place]).loss.item()

    model.bert.embeddings.register_forward_hook(lambda *_: (both_are_inside.wait(), None)[1])
    with sparse_prediction(model):
        threads = [threading.Thread(target=run, args=(place,)) for place in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert losses == pytest.approx(expected, rel=1e-6)


def test_threads_attend_to_their_own_documents() -> None:
    """Threads that share a model each keep the documents of their own batch apart."""
    model = build("bert")
    batches = [COLLATOR(PACKED[at : at + 1]) for at in range(len(PACKED))]

    def predict(batch: dict[str, Any]) -> torch.Tensor:
        with torch.no_grad():
            logits: torch.Tensor = model(**batch).logits
        return logits

    with isolate_documents(model), ThreadPoolExecutor(4) as pool:
        expected = [predict(batch) for batch in batches]
        for logits, wanted in zip(pool.map(predict, batches * 3), expected * 3, strict=True):
            assert torch.equal(logits, wanted)
