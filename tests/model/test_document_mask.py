"""A mask that is not made gives what the dense mask gives, forward, backward and compiled."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention as attend

from mlmadapt import WholeWordMaskingCollator, isolate_documents
from mlmadapt.model import document_mask
from mlmadapt.model import documents as isolation
from mlmadapt.model.document_mask import DocumentMask, make_dense, mask_documents
from tests.scripts.packed import (
    ALONE,
    IS_OLD,
    PACKED,
    TOKENIZER,
    build,
    loss_and_gradients,
    step,
)
from tests.scripts.short_run import drop_nothing

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

ARCHITECTURES = ["albert", "bert", "distilbert", "electra", "roberta"]
ARCHITECTURES += [] if IS_OLD else ["modernbert"]
COLLATOR = WholeWordMaskingCollator(TOKENIZER, seed=3, pad_to_multiple_of=64)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Count how often attention goes by groups, and how often a dense mask is asked for."""
    count = dict.fromkeys(("_attend", "_make_dense"), 0)

    def counted(name: str) -> Any:
        original = getattr(DocumentMask, name)

        def call(*args: Any, **options: Any) -> Any:
            count[name] += 1
            return original(*args, **options)

        return call

    for name in count:
        monkeypatch.setattr(DocumentMask, name, counted(name))
    return count


@st.composite
def batches_of_documents(draw: st.DrawFn) -> torch.Tensor:
    """Draw the documents of a few rows; holes and padding may stand anywhere."""
    sequence = draw(st.integers(1, 24))
    rows = []
    for _ in range(draw(st.integers(1, 4))):
        steps = draw(st.lists(st.sampled_from([0, 0, 0, 1]), min_size=sequence, max_size=sequence))
        row = torch.tensor(steps).cumsum(0)
        holes = draw(st.sets(st.integers(0, sequence - 1), max_size=sequence))
        row[list(holes)] = -1
        rows.append(row)
    return torch.stack(rows)


@settings(max_examples=60, deadline=None)
@given(batches_of_documents(), st.sampled_from([None, 0, 1, 3]), st.sampled_from([1, 2]))
def test_groups_attend_as_the_dense_mask(
    documents: torch.Tensor, window: int | None, heads: int
) -> None:
    """Output and gradients of every token of a document are those with the dense mask."""
    shape = (documents.shape[0], heads, documents.shape[1], 4)
    inputs = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0)).double()
    weights = torch.randn(shape, generator=torch.Generator().manual_seed(1)).double()
    weights *= (documents >= 0)[:, None, :, None]  # nobody reads the padding
    results = []
    for make in (mask_documents, make_dense):
        leaf = inputs.clone().requires_grad_()
        mask = make(documents, torch.float64, window)
        output = attend(*leaf, attn_mask=mask) * weights
        output.sum().backward()
        results.append((output.detach(), leaf.grad))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


def test_attention_keeps_its_options() -> None:
    """Dropout and scale reach the attention of each group."""
    inputs = torch.randn(3, 1, 2, 5, 4, generator=torch.Generator().manual_seed(0))
    mask = mask_documents(torch.tensor([[0, 0, 0, 1, 1]]), torch.float32)
    assert not attend(*inputs, attn_mask=mask, dropout_p=1.0).any()
    output = attend(*inputs, attn_mask=mask, scale=0.0)  # everything counts the same
    torch.testing.assert_close(output[:, :, 3], inputs[2][:, :, 3:].mean(2))


def test_padding_sees_something() -> None:
    """Scores that are all masked would be NaN in some versions of torch."""
    is_token = torch.arange(8) < torch.tensor([[6], [8]])
    for window in (None, 0, 2, 9):
        sees = document_mask._sees(is_token, window)
        assert sees is not None
        assert sees.any(-1).all()


def test_padding_is_given_nothing_and_gives_nothing() -> None:
    """Padding has output 0 and no gradient, where the dense mask lets it see itself."""
    documents = torch.tensor([[-1, 0, 0, 1], [0, -1, 1, -1]])
    inputs = torch.randn(3, 2, 1, 4, 4).requires_grad_()
    output = attend(*inputs, attn_mask=mask_documents(documents, torch.float32))
    output.sum().backward()
    assert inputs.grad is not None
    assert not output[:, 0][documents < 0].any()
    assert not inputs.grad[:, :, 0][:, documents < 0].any()
    assert inputs.grad[2, :, 0][documents >= 0].all()


@pytest.mark.parametrize(
    "compute",
    [
        pytest.param(compute, id=name)
        for name, compute in {
            "sum": lambda mask: mask + 1,
            "slice": lambda mask: mask[:, :, :, :2],
            "type": lambda mask: mask.to(torch.bfloat16),
            "device": lambda mask: mask.to("cpu"),
            "list": lambda mask: torch.cat([mask, mask]),
            "comparison": lambda mask: (mask == 0).all(-1),
            "by position": lambda mask: attend(*torch.ones(3, 1, 1, 4, 2), mask),
            "other shape": lambda mask: attend(*torch.ones(3, 2, 1, 4, 2), attn_mask=mask),
            "text": repr,
        }.items()
    ],
)
def test_all_else_computes_with_the_dense_mask(compute: Any) -> None:
    """What is no attention of its shape gets an ordinary tensor."""
    documents = torch.tensor([[0, 0, 1, 1]])
    mask = mask_documents(documents, torch.float32)
    assert isinstance(mask, DocumentMask)
    assert mask.shape == mask.size() == (1, 1, 4, 4)
    assert (mask.dim(), mask.ndim, mask.dtype) == (4, 4, torch.float32)
    result, expected = compute(mask), compute(make_dense(documents, torch.float32, None))
    assert type(result) is type(expected)
    assert str(result) == str(expected)


def test_a_batch_of_padding_has_a_dense_mask() -> None:
    """Without a document there is nothing to group."""
    documents = torch.full((2, 3), -1)
    mask = mask_documents(documents, torch.float32)
    assert type(mask) is torch.Tensor
    assert not mask.any()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sdpa_makes_no_dense_mask(calls: dict[str, int], architecture: str) -> None:
    """Each layer attends by groups, and none asks for the dense mask."""
    model = build(architecture)
    with isolate_documents(model):
        calls.update(dict.fromkeys(calls, 0))
        loss_and_gradients(model, PACKED[:4])
    assert calls == {"_attend": model.config.num_hidden_layers, "_make_dense": 0}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_loss_and_gradients_are_those_of_the_dense_mask(
    monkeypatch: pytest.MonkeyPatch, architecture: str
) -> None:
    """A model learns by groups what it learns with the dense mask, windows included."""
    results = []
    for make in (mask_documents, make_dense):
        monkeypatch.setattr(isolation, "mask_documents", make)
        model = build(architecture)
        with isolate_documents(model):
            results.append(loss_and_gradients(model, PACKED))
    (loss, gradient), (expected_loss, expected) = results
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert (gradient - expected).norm() <= 1e-5 * expected.norm()


def checkpoint_activations(model: PreTrainedModel, *, reentrant: bool) -> None:
    """Let the layers run again in the backward pass."""
    new = hasattr(model, "activation_checkpointing_enable")  # from transformers 5.23 on
    name = "activation_checkpointing" if new else "gradient_checkpointing"
    getattr(model, f"{name}_enable")({"use_reentrant": reentrant})


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES[1:])
def test_layers_that_run_again_attend_by_groups(
    calls: dict[str, int], architecture: str, reentrant: Any
) -> None:
    """With gradient checkpointing, attention and dropout of the backward pass are the same."""
    results = []
    for is_checkpointed in (False, True):
        model = build(architecture).train()
        if is_checkpointed:
            checkpoint_activations(model, reentrant=reentrant)
        with isolate_documents(model):
            calls.update(dict.fromkeys(calls, 0))
            torch.manual_seed(0)
            results.append(loss_and_gradients(model, PACKED))
    assert calls == {"_attend": 2 * model.config.num_hidden_layers, "_make_dense": 0}
    assert results[0][0] == results[1][0]
    assert torch.equal(results[0][1], results[1][1])


def test_batches_with_and_without_documents_take_turns() -> None:
    """In a run of both, ordinary batches give bit for bit what they give without the handle."""
    model = drop_nothing(build("bert")).train()
    ordinary = [COLLATOR(ALONE[at : at + 4]) for at in (0, 4)]
    packed = [COLLATOR(PACKED[at : at + 2]) for at in (0, 2)]
    expected = [step(model, batch) for batch in ordinary]
    with isolate_documents(model):
        alone = [step(model, batch) for batch in packed]
        mixed = [
            step(model, batch) for pair in zip(packed, ordinary, strict=True) for batch in pair
        ]
    for result, wanted in zip(mixed, [alone[0], expected[0], alone[1], expected[1]], strict=True):
        assert torch.equal(result[0], wanted[0])
        assert torch.equal(result[1], wanted[1])


def test_model_and_configuration_stay_as_they_are(tmp_path: Path) -> None:
    """Attention by groups is written into no configuration, with the handle and after it."""
    model = build("bert")
    model.save_pretrained(tmp_path / "before")  # writes the class into the configuration
    before = (json.dumps(model.config.to_dict()), model.config._attn_implementation)
    handle = isolate_documents(model)
    model(**COLLATOR(PACKED[:2]))
    for hooked in (None, handle):
        if hooked is not None:
            hooked.remove()
        assert (json.dumps(model.config.to_dict()), model.config._attn_implementation) == before
        model.save_pretrained(tmp_path / "after")
        saved = [(tmp_path / when / "config.json").read_text() for when in ("before", "after")]
        assert saved[0] == saved[1]


def test_autocast_computes_as_alone() -> None:
    """In bf16, a packed document has the logits that it has in a row of its own, to bf16."""
    model = build("bert")
    with isolate_documents(model), torch.autocast("cpu", torch.bfloat16):
        packed = loss_and_gradients(model, PACKED)
        alone = loss_and_gradients(model, ALONE)
    assert packed[0] == pytest.approx(alone[0], rel=0.01)
    assert (packed[1] - alone[1]).norm() <= 0.03 * alone[1].norm()


def test_long_rows_need_no_mask_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit is that of a mask that is made: sdpa on a CPU makes none, eager attention does."""
    ids = torch.full((2, 16), 7)
    for attention in ("sdpa", "eager"):
        model = build("bert", attention)
        with isolate_documents(model), monkeypatch.context() as limited:
            limited.setattr(document_mask, "MAX_MASK", 1000)
            if attention == "sdpa":
                model(input_ids=ids, document_ids=torch.zeros_like(ids))
            else:
                with pytest.raises(ValueError, match="2 rows of 16 tokens needs an attention mask"):
                    model(input_ids=ids, document_ids=torch.zeros_like(ids))
