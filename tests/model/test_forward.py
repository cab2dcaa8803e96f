"""From a batch to the logits of its masked tokens, by what the model was seen to allow."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import BartConfig, BartForConditionalGeneration

from mlmadapt.model.checks import evaluation_mode
from mlmadapt.model.evaluation import collate_frozen
from mlmadapt.model.forward import MaskedForward, masked_forward
from mlmadapt.model.head import masked_logits
from mlmadapt.testing import tiny_model, tiny_tokenizer
from tests.scripts.short_run import freeze, global_states, make_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from mlmadapt._types import Batch

ARCHITECTURES = ["albert", "bert", "deberta-v2", "distilbert"]
ARCHITECTURES += ["electra", "modernbert", "mpnet", "roberta"]


def make_batch(count: int = 4, *, is_full: bool = False) -> Batch:
    """Make a padded batch of rows of mixed lengths, or 10 tokens of each, none of them padding."""
    tokenizer = tiny_tokenizer()
    rows = freeze(make_rows(count))
    if is_full:
        rows = [{name: row[name][2:12] for name in row} for row in rows]
    return collate_frozen(rows, tokenizer)


def masks_sent(model: PreTrainedModel) -> list[Any]:
    """Record the attention masks that a model is called with from now on."""
    masks: list[Any] = []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: masks.append(kwargs.get("attention_mask")), with_kwargs=True
    )
    return masks


def hooks_of(model: PreTrainedModel) -> list[Any]:
    """The hooks that are left on a model and its encoder."""
    parts = [model, model.base_model]
    return [hook for part in parts for hook in (*part._forward_hooks, *part._forward_pre_hooks)]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_are_those_of_the_plain_mask(architecture: str, attention: str) -> None:
    """To the bit, with padding and without, where none is sent; and the sparse head is used."""
    model = tiny_model(tiny_tokenizer(), architecture=architecture)
    if architecture != "deberta-v2":
        model.set_attn_implementation(attention)
    padded, full = make_batch(), make_batch(is_full=True)
    masks = masks_sent(model)
    with masked_forward(model, padded) as forward, evaluation_mode(model):
        assert forward.sparse is not None
        for batch in (padded, full):
            inputs = {name: values for name, values in batch.items() if name != "labels"}
            expected = masked_logits(model(**inputs), batch["labels"] != -100)
            logits, targets = replace(forward, sparse=None)(model, batch)
            assert torch.equal(logits, expected)
            assert torch.equal(targets, batch["labels"][batch["labels"] != -100])
            assert (masks[-1] is None) is (batch is full)


@pytest.mark.parametrize("is_packed", [False, True])
def test_what_a_model_allows_does_not_depend_on_what_is_masked(*, is_packed: bool) -> None:
    """With nothing masked, or with the documents of packed rows, the answer is the same."""
    batch = make_batch()
    batch["labels"].fill_(-100)
    if is_packed:
        batch["document_ids"] = batch["attention_mask"] - 1
    model = tiny_model(tiny_tokenizer(), architecture="roberta")
    with masked_forward(model, batch) as forward:
        assert forward.is_free
        assert forward.sparse is not None


def test_a_model_that_wants_a_mask_gets_it() -> None:
    """Where leaving it out fails, or changes the logits."""

    def need(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "attention_mask": kwargs["attention_mask"].bool()}

    def change(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if kwargs.get("attention_mask") is None:
            return args, {**kwargs, "input_ids": kwargs["input_ids"].flip(1)}
        return None

    for hook in (need, change):
        model = tiny_model(tiny_tokenizer())
        model.register_forward_pre_hook(hook, with_kwargs=True)
        with masked_forward(model, make_batch()) as forward:
            assert not forward.is_free
            forward(model, make_batch(is_full=True))


def test_rounding_counts_for_nothing() -> None:
    """Positions are predicted in multiples of 32, and those without a target have none."""
    model, batch = tiny_model(tiny_tokenizer()).eval(), make_batch()
    with masked_forward(model, batch) as forward:
        logits, targets = forward(model, batch)
        rounded, all_targets = forward(model, batch, rounded=True)
    assert len(rounded) == len(all_targets) == 32 * -(-len(logits) // 32) > len(logits)
    assert torch.equal(all_targets[all_targets != -100], targets)
    torch.testing.assert_close(rounded[all_targets != -100], logits)


def test_gradients_are_touched() -> None:
    """All that a step reaches have one of zeros, others none; the pooler is one of these."""
    model, batch = tiny_model(tiny_tokenizer()).train(), make_batch()
    with masked_forward(model, batch) as forward:
        forward.touch_gradients(model, batch, torch.Tensor.backward)
        touched = {name for name, p in model.named_parameters() if p.grad is not None}
        assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)
        model.zero_grad()
        model(**batch).loss.backward()
    assert touched == {name for name, p in model.named_parameters() if p.grad is not None} != set()


@pytest.mark.parametrize("taken_out", [0, 3])
def test_a_head_that_mixes_positions_is_told_and_left_full(
    bert: PreTrainedModel,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    taken_out: int,
) -> None:
    """A sparse head is kept; with tokens that are out of the vocabulary, too."""
    with torch.no_grad():
        bert.get_output_embeddings().bias[:taken_out] = -torch.inf
    bert.train()
    states = global_states()
    with masked_forward(bert, make_batch()) as forward:
        assert forward.sparse is not None
    assert not caplog.records

    head = bert.cls.forward
    for mix in (lambda hidden: hidden.mean(1), lambda hidden: hidden[:, 0]):
        mixing = lambda hidden, mix=mix: head(hidden + mix(hidden)[:, None])  # noqa: E731
        monkeypatch.setattr(bert.cls, "forward", mixing)
        with caplog.at_level(logging.WARNING), masked_forward(bert, make_batch()) as forward:
            assert forward.sparse is None
            assert not hooks_of(bert)
        assert "BertForMaskedLM runs with its full head, more slowly: its head" in caplog.text

    # Whatever the head needs of the other positions, such as the attention mask.
    caplog.clear()
    sequence = make_batch()["labels"].shape[1]
    needs_all = lambda hidden: head(hidden * torch.ones(4, sequence, 1))  # noqa: E731
    monkeypatch.setattr(bert.cls, "forward", needs_all)
    with masked_forward(bert, make_batch()) as forward:
        assert forward.sparse is None
    assert "by position: model BertForMaskedLM fails on" in caplog.text
    assert "(RuntimeError: The size of tensor a" in caplog.text
    assert not hooks_of(bert)
    assert bert.training
    assert global_states() == states


def test_an_encoder_decoder_runs_with_its_full_head(caplog: pytest.LogCaptureFixture) -> None:
    """And says so once."""
    config = BartConfig(vocab_size=475, d_model=16, encoder_layers=1, decoder_layers=1)
    with masked_forward(BartForConditionalGeneration(config), make_batch()) as forward:
        assert forward.sparse is None
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "is an encoder-decoder, whose labels" in caplog.text


def test_an_error_of_the_model_is_not_one_of_its_head(
    bert: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that fails with all positions is named, and left without hooks."""

    def fail(hidden: torch.Tensor) -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(bert.cls, "forward", fail)
    message = r"model BertForMaskedLM fails on a batch of .*\(RuntimeError: no such kernel\)"
    with pytest.raises(ValueError, match=message), masked_forward(bert, make_batch()):
        pass
    assert not hooks_of(bert)


@pytest.mark.parametrize("width", [3, 509, 512])
@pytest.mark.parametrize("architecture", ["bert", "roberta", "fnet"])
def test_padding_is_tried_within_the_model_s_positions(
    caplog: pytest.LogCaptureFixture, architecture: str, width: int
) -> None:
    """Rows that leave no room for padding are cut for the trial, which then tells the same."""
    model = tiny_model(tiny_tokenizer("byte_bpe"), architecture=architecture)
    ids = torch.arange(width)[None] % 400 + 5
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    with masked_forward(model, batch) as forward:
        assert forward.is_inert == (architecture != "fnet")
    assert ("FNetForMaskedLM sees padding: rows have" in caplog.text) == (architecture == "fnet")


@pytest.mark.parametrize("noise", ["random", "by the batch"])
def test_other_differences_are_not_taken_for_padding(
    bert: PreTrainedModel, caplog: pytest.LogCaptureFixture, noise: str
) -> None:
    """Of logits that are random, or differ with the number of rows, nothing is said."""
    add = {"random": torch.rand_like, "by the batch": lambda logits: logits * len(logits)}[noise]
    bert.cls.register_forward_hook(lambda _, args, logits: logits + add(logits))
    with masked_forward(bert, make_batch()) as forward:
        assert forward.is_inert
    assert "padding" not in caplog.text


def test_without_trials_all_is_sent(bert: PreTrainedModel) -> None:
    """What is made without `masked_forward` takes nothing for granted."""
    masks = masks_sent(bert)
    MaskedForward(device=bert.device)(bert, make_batch(is_full=True))
    assert masks[0] is not None
