"""Sparse prediction gives the full head's loss and gradients, and tokens weigh the same."""

from __future__ import annotations

import copy
import warnings
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AutoModelForMaskedLM,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForPreTraining,
    LukeConfig,
    ModernBertConfig,
    Trainer,
    TrainingArguments,
    default_data_collator,
)
from transformers.modeling_outputs import MaskedLMOutput

from mlmadapt import masked_lm_loss, sparse_prediction
from mlmadapt.model import head
from mlmadapt.model.head import masked_logits, summed_cross_entropy
from mlmadapt.testing import tiny_model, tiny_tokenizer
from tests.scripts.short_run import drop_nothing, rows_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from transformers import PreTrainedModel

Batch = dict[str, torch.Tensor]

ARCHITECTURES = """
    albert bert big_bird camembert convbert data2vec-text deberta deberta-v2 distilbert electra
    ernie esm flaubert fnet ibert layoutlm megatron-bert mobilebert modernbert mpnet mra
    nystromformer rembert roberta roberta-prelayernorm roformer tapas xlm xlm-roberta
    xlm-roberta-xl yoso
""".split()  # noqa: SIM905 (a line each would take the page)


def make_batch(rows: int = 3, *, seed: int = 0, vocabulary: int = 100) -> Batch:
    """Rows of which the last is padded, about a fifth of the tokens masked, never equally many."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(6, vocabulary, (rows, 24), generator=generator)
    attention_mask = torch.ones_like(ids)
    attention_mask[-1, 17:] = 0
    is_masked = (torch.rand(ids.shape, generator=generator) < 0.2) & (attention_mask == 1)
    return {
        "input_ids": ids.where(~is_masked, 4),
        "attention_mask": attention_mask,
        "labels": ids.where(is_masked, -100),
    }


def loss_and_gradients(
    model: nn.Module, batch: Batch, **kwargs: Any
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """One forward and backward pass in training mode, the same dropout in every call."""
    model.train()
    model.zero_grad()
    torch.manual_seed(0)
    outputs = model(**batch, **kwargs)
    loss = outputs[0] if isinstance(outputs, tuple) else outputs.loss
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), gradients


def assert_same(
    model: nn.Module, batch: Batch, sparse_kwargs: dict[str, Any] | None = None
) -> None:
    """Compare the sparse with the full head."""
    loss, gradients = loss_and_gradients(model, batch)
    with sparse_prediction(model):
        sparse_loss, sparse_gradients = loss_and_gradients(model, batch, **(sparse_kwargs or {}))
    torch.testing.assert_close(sparse_loss, loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(sparse_gradients, gradients, rtol=1e-4, atol=1e-6)


def has_hooks(model: PreTrainedModel) -> bool:
    """Tell whether any hook of `sparse_prediction` is left."""
    hooks = [model._forward_pre_hooks, model._forward_hooks, model.base_model._forward_hooks]
    return any(hooks)


@pytest.fixture
def model(bert: PreTrainedModel) -> PreTrainedModel:
    """The tiny BERT in training mode."""
    return bert.train()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_same_loss_and_gradients(architecture: str) -> None:
    """The sparse head changes neither loss nor any gradient, dropout on.

    Nor does the loop's loss, which overwrites the logits: no head needs them to go backward.
    """
    model, batch = tiny_model(tiny_tokenizer(), architecture=architecture), make_batch()
    model(input_ids=batch["input_ids"])  # in which BigBird settles how it attends
    assert_same(model, batch)
    expected = loss_and_gradients(model, batch)
    positions = batch["labels"] != -100
    with sparse_prediction(model):
        assert model(**batch).logits.shape[:2] == (1, positions.sum())
    model.zero_grad()
    torch.manual_seed(0)
    labels = batch.pop("labels")
    with sparse_prediction(model) as sparse, sparse.at(positions):
        logits = masked_logits(model(**batch), positions)
    loss = summed_cross_entropy(logits, labels[positions]) / positions.sum()
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    torch.testing.assert_close((loss.detach(), gradients), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("return_dict", [True, False])
def test_the_head_works_in_few_sizes(model: PreTrainedModel, return_dict: bool) -> None:  # noqa: FBT001
    """Blocks of memory of ever other sizes would stay with the allocator, more in each step.

    What the caller gets, and the loss, have the masked positions only, in a dict and in a tuple.
    """
    sizes = []
    model.get_output_embeddings().register_forward_hook(
        lambda *call: sizes.append(call[1][0].shape[1])
    )
    batch = make_batch(rows=6)
    total = batch["labels"].numel()
    full = model.eval()(input_ids=batch["input_ids"]).logits.flatten(0, 1)
    for masked in (0, 1, 32, 33, total):
        batch["labels"] = torch.where(torch.arange(total) < masked, 7, -100).view(6, -1)
        expected = full[:masked]
        with sparse_prediction(model) as handle:
            with handle.at(batch["labels"] == 7):
                asked = model.eval()(input_ids=batch["input_ids"], return_dict=return_dict)
            model.train()
            outputs = model(
                input_ids=batch["input_ids"], labels=batch["labels"], return_dict=return_dict
            )
        torch.testing.assert_close(asked[0][0], expected)
        assert outputs[1].shape == (1, *expected.shape)
        # What rounds up, the first position, has a label here, and counts once all the same.
        loss = nn.functional.cross_entropy(outputs[1][0], torch.full((masked,), 7))
        torch.testing.assert_close(outputs[0], loss, equal_nan=True)
    assert sizes[1:] == [0, 0, 32, 32, 32, 32, 64, 64, *[-(-total // 32) * 32] * 2]


def test_models_that_cannot_are_refused() -> None:
    """What the hooks cannot hold for is told by name, with its reason and what to do instead."""
    config = BartConfig(vocab_size=100, d_model=16, encoder_layers=1, decoder_layers=1)
    message = "BartFor.* is an encoder-decoder, whose labels.*; sparse_.*: train this one with its"
    with pytest.raises(ValueError, match=message):
        sparse_prediction(BartForConditionalGeneration(config))


def test_hidden_states_of_another_shape_are_told(model: PreTrainedModel) -> None:
    """An encoder that shortens its rows is an error at the first batch, and leaves no state."""
    hook = model.base_model.register_forward_hook(lambda *call: (call[-1][0][:, ::2],))
    handle = sparse_prediction(model)
    with pytest.raises(ValueError, match=r"BertModel returned .*\(3, 12, 32\) .* \(3, 24\)"):
        model(**make_batch())
    hook.remove()
    with torch.no_grad():
        assert model.eval()(**make_batch()).logits.shape[:2] == (3, 24)
    assert not handle._masked


def test_evaluation_and_prediction_are_unchanged(model: PreTrainedModel) -> None:
    """In evaluation mode, and without labels, the model computes what it did."""
    batch = make_batch()
    unlabelled = {name: values for name, values in batch.items() if name != "labels"}
    expected = model.eval()(**batch)
    with sparse_prediction(model):
        with torch.no_grad():
            outputs = model(**batch, num_items_in_batch=3)
        torch.testing.assert_close(outputs.to_tuple(), expected.to_tuple(), rtol=0, atol=0)
        assert model.train()(**unlabelled).logits.shape == expected.logits.shape


def test_a_failed_forward_pass_leaves_no_state(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After an error in the head, the next forward pass is an ordinary one."""

    def fail(hidden: torch.Tensor) -> None:
        raise RuntimeError("out of memory")

    handle = sparse_prediction(model)
    positions = make_batch()["labels"] != -100
    with monkeypatch.context() as patch:
        patch.setattr(model.cls, "forward", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            model(**make_batch())
        assert not handle._masked
        with pytest.raises(RuntimeError, match="out of memory"), handle.at(positions):
            model(input_ids=make_batch()["input_ids"])
    assert model(input_ids=make_batch()["input_ids"]).logits.shape[:2] == (3, 24)


def test_remove_gives_the_full_head_back(model: PreTrainedModel) -> None:
    """By `remove`, twice if need be, and at the end of a with block, through errors too."""
    handle = sparse_prediction(model)
    assert model(**make_batch()).logits.shape[0] == 1
    handle.remove()
    handle.remove()
    assert model(**make_batch()).logits.shape[0] == 3
    with pytest.raises(KeyError), sparse_prediction(model):
        raise KeyError
    assert model(**make_batch()).logits.shape[0] == 3
    assert not has_hooks(model)


@pytest.mark.parametrize("architecture", ["bert", "mpnet"])
def test_tuple_outputs(architecture: str) -> None:
    """With return_dict=False, which MPNet's encoder hears of too, the loss comes first."""
    model = tiny_model(tiny_tokenizer(), architecture=architecture)
    batch = make_batch()
    masked = int((batch["labels"] != -100).sum())
    assert_same(model, batch, {"return_dict": False, "num_items_in_batch": masked})
    model.config.return_dict = False
    assert_same(model, batch)


# Its new name is not known to transformers 5.0.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_gradient_checkpointing(model: PreTrainedModel) -> None:
    """Recomputed layers lie below the hooks."""
    model.gradient_checkpointing_enable()
    assert_same(model, make_batch())


def test_autocast(model: PreTrainedModel) -> None:
    """Under bf16 autocast loss and gradients agree to what 16 bits hold."""
    with torch.autocast("cpu", torch.bfloat16):
        loss, gradients = loss_and_gradients(model, make_batch())
        with sparse_prediction(model):
            sparse_loss, sparse_gradients = loss_and_gradients(model, make_batch())
    torch.testing.assert_close(sparse_loss, loss, rtol=1e-2, atol=0)
    torch.testing.assert_close(sparse_gradients, gradients, rtol=0.1, atol=1e-2)


def test_a_copied_model_keeps_its_own_hooks(model: PreTrainedModel) -> None:
    """Averages of weights are kept in copies, which must not lean on the model they came from."""
    handle = sparse_prediction(model)
    copied = copy.deepcopy(model)
    handle.remove()
    assert copied(**make_batch()).logits.shape[0] == 1
    assert model(**make_batch()).logits.shape[0] == 3


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_adapters_around_the_model(model: PreTrainedModel) -> None:
    """The hooks of a model with adapters go where its calls do, which is around its own hooks."""
    adapted: Any = get_peft_model(model, LoraConfig(target_modules=["query"], lora_dropout=0.1))
    assert_same(adapted, make_batch())
    with sparse_prediction(adapted):
        assert adapted.train()(**make_batch()).logits.shape[0] == 1


def test_auxiliary_losses_stay(bert: PreTrainedModel) -> None:
    """A loss that the model adds to the masked one is neither dropped nor computed otherwise."""
    model = BertForPreTraining(bert.config)
    batch = make_batch() | {"next_sentence_label": torch.tensor([0, 1, 1])}
    assert_same(model, batch)
    assert_same(model, batch, {"num_items_in_batch": int((batch["labels"] != -100).sum())})


@pytest.mark.parametrize("architecture", ["bert", "modernbert"])
@pytest.mark.parametrize("num_items", [50, torch.tensor(50), torch.tensor([[25], [25]])])
def test_num_items_in_batch(architecture: str, num_items: Any) -> None:
    """The loss is the sum over masked tokens by that number, whether the model knows it or not."""
    model = tiny_model(tiny_tokenizer(), architecture=architecture)
    batch = make_batch()
    mean, gradients = loss_and_gradients(model, batch)
    share = (batch["labels"] != -100).sum() / 50
    with sparse_prediction(model):
        loss, sparse_gradients = loss_and_gradients(model, batch, num_items_in_batch=num_items)
    torch.testing.assert_close(loss, mean * share, rtol=1e-6, atol=0)
    expected = {name: gradient * share for name, gradient in gradients.items()}
    torch.testing.assert_close(sparse_gradients, expected, rtol=1e-4, atol=1e-6)


def test_a_batch_without_targets(model: PreTrainedModel) -> None:
    """A mean of nothing is NaN as in the full head, a share of the window is 0; no gradient."""
    batch = make_batch()
    batch["labels"] = torch.full_like(batch["labels"], -100)
    with sparse_prediction(model):
        loss, gradients = loss_and_gradients(model, batch)
        share, share_gradients = loss_and_gradients(model, batch, num_items_in_batch=7)
        nothing, _ = loss_and_gradients(model, batch, num_items_in_batch=0)
    assert loss.isnan()
    assert share == nothing == 0
    for gradient in [*gradients.values(), *share_gradients.values()]:
        assert not gradient.any()
    assert share_gradients.keys() == gradients.keys() != set()


def train(
    model: PreTrainedModel, rows: Batch, folder: Path, accumulation: int, **kwargs: Any
) -> Any:
    """Two steps of `Trainer` on all rows; its log and how many rows the vocabulary head saw."""
    seen = []
    model.get_output_embeddings().register_forward_hook(
        lambda _, args, output: seen.append(args[0].shape[:-1].numel())
    )
    arguments = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=len(rows["labels"]) // accumulation,
        gradient_accumulation_steps=accumulation, max_steps=2, learning_rate=1e-2, logging_steps=1,
        save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True,
        dataloader_pin_memory=False,
    )  # fmt: skip
    options = {"train_dataset": rows_of(rows), "data_collator": default_data_collator}
    trainer = Trainer(model, arguments, **options, **kwargs)
    trainer.train()
    log = [(entry["loss"], entry["grad_norm"]) for entry in trainer.state.log_history[:2]]
    return trainer, log, sum(seen)


@pytest.mark.parametrize("accumulation", [1, 2, 4])
@pytest.mark.parametrize(
    ("architecture", "is_sparse", "with_loss"),
    [
        ("bert", True, False),
        ("modernbert", True, False),
        ("bert", False, True),
        ("bert", True, True),
    ],
)
def test_trainer(
    architecture: str,
    is_sparse: bool,  # noqa: FBT001
    with_loss: bool,  # noqa: FBT001
    accumulation: int,
    tmp_path: Path,
) -> None:
    """`Trainer` logs the exact loss and gradient norm however the same 8 rows are accumulated."""
    model = drop_nothing(tiny_model(tiny_tokenizer(), architecture=architecture))
    rows = make_batch(rows=8)
    expected = []
    reference = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(reference.parameters(), lr=1e-2, weight_decay=0.0)
    for lr in (1e-2, 5e-3):
        loss, _ = loss_and_gradients(reference, rows)
        norm = nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        expected += [(loss.item(), norm.item())]
    if is_sparse:
        sparse_prediction(model)
    kwargs = {"compute_loss_func": masked_lm_loss} if with_loss else {}
    _, log, head_rows = train(model, rows, tmp_path, accumulation, **kwargs)
    for entry, wanted in zip(log, expected, strict=True):
        assert entry == pytest.approx(wanted, rel=1e-4)
    if with_loss or not is_sparse:
        assert head_rows == 2 * rows["labels"].numel()
    else:  # two steps of 39 masked tokens, rounded up to multiples of 32 in each forward pass
        assert (rows["labels"] != -100).sum() == 39
        assert head_rows == 2 * {1: 64, 2: 2 * 32, 4: 4 * 32}[accumulation]


@pytest.mark.parametrize("loss_func", [None, masked_lm_loss])
def test_trainer_evaluation(
    loss_func: Callable[..., torch.Tensor] | None, model: PreTrainedModel, tmp_path: Path
) -> None:
    """The evaluation loss of one batch is its mean over masked tokens."""
    rows = make_batch(rows=8)
    sparse_prediction(model)
    trainer, _, _ = train(model, rows, tmp_path, 1, compute_loss_func=loss_func)
    with torch.no_grad():
        expected = model.eval()(**rows).loss.item()
    logged = trainer.evaluate(eval_dataset=trainer.train_dataset)
    assert logged["eval_loss"] == pytest.approx(expected, rel=1e-5)


def slow_loss(logits: torch.Tensor, labels: torch.Tensor) -> tuple[float, int]:
    """Sum and number of the negative log-likelihoods, a token at a time in 64 bits."""
    terms = [
        -scores.double().log_softmax(0)[label].item()
        for scores, label in zip(logits.flatten(0, -2), labels.flatten().tolist(), strict=True)
        if label != -100
    ]
    return sum(terms), len(terms)


def test_masked_lm_loss() -> None:
    """The sum over masked tokens divided by their number, or by the number that is given."""
    labels = make_batch()["labels"]
    logits = torch.randn(*labels.shape, 100, generator=torch.Generator().manual_seed(0))
    total, count = slow_loss(logits, labels)
    gathered = MaskedLMOutput(logits=logits[labels != -100][None])
    for outputs in (MaskedLMOutput(logits=logits), (logits,), gathered):
        assert masked_lm_loss(outputs, labels).item() == pytest.approx(total / count, rel=1e-6)
        for num_items in (40, torch.tensor(40), torch.tensor([[20], [20]])):
            loss = masked_lm_loss(outputs, labels, num_items_in_batch=num_items)
            assert loss.shape == ()
            assert loss.item() == pytest.approx(total / 40, rel=1e-6)
    half = MaskedLMOutput(logits=logits.bfloat16())
    assert masked_lm_loss(half, labels).dtype == torch.float32


def test_masked_lm_loss_without_targets() -> None:
    """Nothing masked is a loss and a gradient of 0, also when nothing is in the whole window."""
    logits = torch.randn(2, 3, 10, requires_grad=True)
    labels = torch.full((2, 3), -100)
    for num_items in (None, 0, 5, torch.tensor(0)):
        logits.grad = None
        loss = masked_lm_loss(MaskedLMOutput(logits=logits), labels, num_items_in_batch=num_items)
        loss.backward()
        assert loss == 0
        assert logits.grad is not None
        assert not logits.grad.any()


def gradient_in_place(
    logits: torch.Tensor, labels: torch.Tensor, *, ours: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss times 3 and its gradient, of logits that a linear layer gives."""
    leaf = logits.clone().requires_grad_()
    computed = leaf * 1.0
    if ours:
        loss = summed_cross_entropy(computed, labels)
    else:
        loss = nn.functional.cross_entropy(computed, labels, reduction="sum")
    (loss * 3).backward()
    return loss.detach(), leaf.grad


@given(st.integers(0, 40), st.integers(1, 50), st.integers(0, 5), st.integers(1, 300))
def test_the_loss_is_torchs(tokens: int, vocabulary: int, seed: int, at_once: int) -> None:
    """Whatever the sizes, however many logits are taken at once, targets or none."""
    generator = torch.Generator().manual_seed(seed)
    logits = 30 * torch.randn(tokens, vocabulary, generator=generator, dtype=torch.float64)
    labels = torch.randint(vocabulary, (tokens,), generator=generator)
    labels[torch.rand(tokens, generator=generator) < 0.3] = -100
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(head, "_LOGITS_AT_ONCE", at_once)
        result = gradient_in_place(logits, labels, ours=True)
    torch.testing.assert_close(result, gradient_in_place(logits, labels, ours=False))


def test_the_gradient_lies_where_the_logits_lay() -> None:
    """No array of their size is made."""
    logits = torch.randn(5, 7, requires_grad=True) * 1.0
    logits.retain_grad()
    summed_cross_entropy(logits, torch.arange(5)).backward()
    torch.testing.assert_close(logits.detach(), logits.grad)


def test_logits_that_are_needed_again_are_an_error() -> None:
    """Not a wrong gradient: the exponential's own backward pass reads what it returned."""
    logits = torch.randn(5, 7, requires_grad=True).exp()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        summed_cross_entropy(logits, torch.arange(5)).backward()


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_what_is_not_finite_shows(value: float) -> None:
    """In the loss, as torch's, and where nothing is to be predicted not at all."""
    logits = torch.zeros(2, 3)
    logits[0, 1] = value
    for labels in (torch.tensor([1, 2]), torch.tensor([0, 2]), torch.tensor([-100, 2])):
        expected = nn.functional.cross_entropy(logits, labels, reduction="sum")
        loss = summed_cross_entropy(logits, labels)
        assert torch.equal(loss.isfinite(), expected.isfinite())


SIZES: dict[str, Any] = {
    "vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
OWN_SPARSE = ModernBertConfig(**SIZES, cls_token_id=1, sep_token_id=2, sparse_prediction=True)
LUKE = LukeConfig(**SIZES, entity_vocab_size=20, entity_emb_size=16)
BERT = BertConfig(**SIZES)


@pytest.mark.parametrize("is_tuple", [False, True])
@pytest.mark.parametrize("num_items", [None, 5])
@pytest.mark.parametrize("config", [OWN_SPARSE, LUKE, BERT], ids=lambda c: c.model_type)
def test_outputs_of_every_shape(config: Any, num_items: int | None, *, is_tuple: bool) -> None:
    """A sparse head of the model's own, losses of several kinds, tuples: logits as promised."""
    torch.manual_seed(0)
    model = drop_nothing(AutoModelForMaskedLM.from_config(config)).train()
    batch = make_batch()
    labels = batch["labels"]
    full = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    picked = full[labels != -100]
    summed = nn.functional.cross_entropy(picked, labels[labels != -100], reduction="sum")
    with sparse_prediction(model):
        outputs = model(**batch, return_dict=not is_tuple, num_items_in_batch=num_items)
    assert isinstance(outputs, tuple) == is_tuple
    values = list(outputs if is_tuple else outputs.values())
    torch.testing.assert_close(values[0], summed / (num_items or len(picked)))
    (logits,) = (value for value in values if value.dim() > 1)
    torch.testing.assert_close(logits, picked[None], rtol=1e-5, atol=1e-5)


def test_a_loop_that_forgets_to_train_is_told(model: PreTrainedModel) -> None:
    """Once, as under Lightning; evaluation without gradients, and prediction, are not."""
    batch = make_batch()
    sparse_prediction(model.eval())
    with torch.no_grad():
        model(**batch)
    model(input_ids=batch["input_ids"])
    model.train()(**batch)
    model.eval()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("default")
        for _ in range(3):
            model(**batch)
    assert ["call model.train() before" in str(each.message) for each in told] == [True]
