"""What cannot work is told before the first step; a trial leaves the model as it was."""

from __future__ import annotations

import re
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import datasets
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    BertForSequenceClassification,
    BertModel,
    DataCollatorForLanguageModeling,
    GPT2Config,
    GPT2LMHeadModel,
    PerceiverConfig,
    PerceiverForMaskedLM,
)

from mlmadapt import (
    WholeWordMaskingCollator,
    evaluate_mlm,
    extend_vocabulary,
    isolate_documents,
    sparse_prediction,
)
from mlmadapt.model.checks import (
    attention_window,
    check_collator,
    check_model,
    check_optimizer,
    check_rows,
    check_ties,
    check_tokenizer,
    check_weights,
    position_capacity,
    try_model,
    unwrap,
)
from mlmadapt.testing import tiny_model, tiny_tokenizer
from tests.scripts.packed import IS_OLD
from tests.scripts.tiny_run import TinyRun

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerFast

ROWS = [{"input_ids": [2, 9, 8, 3]}, {"input_ids": [2, 7, 3]}]
LONG = [*ROWS, {"input_ids": [2] * 513}]


def as_indexed(rows: list[dict[str, Any]]) -> datasets.Dataset:
    """A dataset whose table holds rows that its indices leave out."""
    dataset = datasets.Dataset.from_list([{"input_ids": [10**6] * 2000}, *rows])
    return dataset.select(range(len(rows), 0, -1))


@pytest.mark.parametrize("make", [list, datasets.Dataset.from_list, as_indexed])
@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (LONG, r"^train_dataset has a row of 513 tokens, .* positions for 512; .*chunk_size=512"),
        ([*ROWS, {"input_ids": [475]}], r"^train_dataset has token id 475, .* embedding 475 rows;"),
    ],
)
def test_rows_that_do_not_fit(
    bert: PreTrainedModel,
    wordpiece: PreTrainedTokenizerFast,
    rows: list[dict[str, Any]],
    message: str,
    make: Any,
) -> None:
    """A row too long and an id too high, in lists, tables and selections of them."""
    with pytest.raises(ValueError, match=message):
        check_rows("train_dataset", make(rows), model=bert)


@pytest.mark.parametrize("make", [list, datasets.Dataset.from_list, as_indexed])
def test_rows_that_fit(
    bert: PreTrainedModel, wordpiece: PreTrainedTokenizerFast, make: Any
) -> None:
    """The longest row and the highest id that fit do, as do frozen rows, arrays and empty ones."""
    rows = [*ROWS, {"input_ids": [474] * 512}, {"input_ids": []}]
    frozen = [{f"masked_{name}": values for name, values in row.items()} for row in rows]
    for fitting in (make(rows), frozen, datasets.Dataset.from_list(frozen)):
        check_rows("train_dataset", fitting, model=bert)
    tensors = datasets.Dataset.from_list(ROWS).with_format("torch")
    check_rows("train_dataset", tensors, model=bert)
    check_rows("train_dataset", list(tensors), model=bert)


def test_other_mistakes(bert: PreTrainedModel, wordpiece: PreTrainedTokenizerFast) -> None:
    """No rows, no tokens, and a tokenizer that has grown."""
    with pytest.raises(ValueError, match=r"^eval has no rows; group_texts drops"):
        check_rows("eval", [], model=bert)
    for raw in ([{"text": "a film"}], datasets.Dataset.from_list([{"text": "a film"}])):
        with pytest.raises(
            ValueError, match=r"^eval has \['text'\], without 'input_ids'; tokenize"
        ):
            check_rows("eval", raw, model=bert)
    wordpiece.add_tokens(["neuroblastoma"])
    message = r"has 476 tokens, .* for 475; load .* own .* added, call model\..*embeddings\(476\)"
    with pytest.raises(ValueError, match=message):
        check_tokenizer(wordpiece, bert)
    bert.resize_token_embeddings(476)
    check_tokenizer(wordpiece, bert)


class HeadOverNothing(GPT2LMHeadModel):
    """A user's own model, which no mapping of transformers lists."""


class Untabled(BertForMaskedLM):
    """A model that embeds its tokens by something else than a table."""

    def get_input_embeddings(self) -> Any:
        """Return what there is."""
        return self.bert.embeddings.word_embeddings.weight


TINY_PERCEIVER = PerceiverConfig(vocab_size=9, num_latents=4, d_latents=8, d_model=8)


def holder(model: nn.Module) -> nn.Module:
    """Hold a model as its `auto_model`."""
    module = nn.Module()
    module.auto_model = model
    return module


TINY_BERT = BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
TINY_GPT2 = GPT2Config(vocab_size=9, n_embd=16, n_layer=1, n_head=1, bos_token_id=1, eos_token_id=1)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (GPT2LMHeadModel(TINY_GPT2), " GPT2LMHeadModel is a causal language model, which shifts"),
        (HeadOverNothing(TINY_GPT2), " HeadOverNothing is a causal language model, which shifts"),
        (nn.DataParallel(GPT2LMHeadModel(TINY_GPT2)), r".module GPT2LMHeadModel is a causal"),
        (nn.Linear(1, 1), " Linear is not one of transformers"),
        (BertModel(TINY_BERT), " BertModel has no prediction head, as AutoModel loads it"),
        # As a SentenceTransformer holds one.
        (nn.Sequential(holder(BertModel(TINY_BERT))), r"\[0\].auto_model BertModel has no predict"),
        (BertForMaskedLM(TINY_BERT).to("meta"), " BertForMaskedLM is on the device 'meta', where"),
        (PerceiverForMaskedLM(TINY_PERCEIVER), " PerceiverForMaskedLM has no table of token embed"),
        (Untabled(TINY_BERT), " Untabled has no table of token embeddings"),
    ],
)
def test_models_of_another_kind_are_named(model: Any, reason: str) -> None:
    """By their class, with the one that there should be, by whatever takes a model."""
    evaluate = partial(evaluate_mlm, dataset=[], tokenizer=tiny_tokenizer())
    extend = partial(extend_vocabulary, tiny_tokenizer(), words=["scorer"])
    for refuse in (check_model, sparse_prediction, isolate_documents, evaluate, extend):
        with pytest.raises(ValueError, match=f"model{reason}.*; load one by AutoModelForMaskedLM"):
            refuse(model)


def test_a_model_in_a_wrapper_is_found() -> None:
    """The message says by which name it is to be passed; a compiled one may be passed itself."""
    model: Any = BertForMaskedLM(TINY_BERT)
    for wrapped, place in ((nn.DataParallel(model), ".module"), (nn.Sequential(model), "[0]")):
        with pytest.raises(ValueError, match=re.escape(f"; pass model{place}")):
            check_model(wrapped)  # type: ignore[arg-type]
    compiled: Any = torch.compile(model)
    assert unwrap(compiled) is model
    check_model(compiled)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("architecture", "options", "is_apart"),
    [
        ("bert", {}, False),
        ("bert", {"bias": "all"}, False),
        ("bert", {"trainable_token_indices": [7, 9]}, False),
        ("bert", {"modules_to_save": ["transform"]}, False),
        ("eurobert", {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, False),
        ("bert", {"modules_to_save": ["word_embeddings"]}, True),
        ("bert", {"modules_to_save": ["word_embeddings", "decoder"]}, True),
        ("distilbert", {"modules_to_save": ["vocab_projector"]}, True),
        ("distilbert", {"target_modules": ["q_lin", "word_embeddings"]}, True),
        ("modernbert", {"modules_to_save": ["tok_embeddings"]}, True),
        ("roberta", {"trainable_token_indices": {"lm_head.decoder": [7]}}, True),
        # Its configuration tells of a tie that its model does not have.
        ("luke", {"modules_to_save": ["word_embeddings"]}, False),
        ("luke", {"modules_to_save": ["lm_head"]}, False),
    ],
)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_adapters_that_break_a_tie(
    architecture: str,
    options: dict[str, Any],
    *,
    is_apart: bool,
    tied: bool,
    wordpiece: PreTrainedTokenizerFast,
) -> None:
    """Input embeddings and head have to learn the same, if they were the same."""
    if architecture not in CONFIG_MAPPING or ("ensure_weight_tying" in options and not tied):
        pytest.skip("of later versions of transformers, or PEFT warns itself")
    model: Any = tiny_model(wordpiece, architecture=architecture)
    model.config.tie_word_embeddings = tied
    with torch.random.fork_rng(devices=[]):
        model = type(model)(model.config)
    names = {"distilbert": ["q_lin"], "modernbert": ["Wqkv"], "eurobert": ["q_proj"]}
    layers = names.get(architecture, ["query"])
    adapted: Any = get_peft_model(model, LoraConfig(**{"target_modules": layers, **options}))
    message = r"ties its head to its embeddings, but adapters train them apart; .*_indices=\[ids"
    with pytest.raises(ValueError, match=message) if is_apart and tied else nullcontext():
        check_ties(adapted)


@pytest.mark.parametrize("make", [WholeWordMaskingCollator, DataCollatorForLanguageModeling])
def test_a_collator_of_another_tokenizer_is_named(
    wordpiece: PreTrainedTokenizerFast, make: Any
) -> None:
    """With both tokenizers; an equal one, or none, is as good as the same."""
    message = (
        r"data_collator was made with another tokenizer: one of 512 tokens, mask '<mask>', in "
        r"place of 475 tokens, mask '\[MASK\]'; make the collator with the tokenizer that is passed"
    )
    with pytest.raises(ValueError, match=message):
        check_collator(make(tiny_tokenizer("byte_bpe")), wordpiece)
    check_collator(make(tiny_tokenizer()), wordpiece)
    check_collator(lambda rows: {}, wordpiece)
    for kind in (make, None):
        with pytest.raises(TypeError, match=r"data_collator is (<class|None).*; it must be an obj"):
            check_collator(kind, wordpiece)


@pytest.mark.parametrize(
    ("architecture", "capacity"),
    [
        ("albert", 512),
        ("bert", 512),
        ("deberta", 512),
        ("deberta-v2", 512),
        ("distilbert", 512),
        ("electra", 512),
        ("ibert", 512),
        ("modernbert", None),
        ("mpnet", 512),
        ("nystromformer", 514),
        ("roberta", 512),
        ("roformer", 512),
        ("xlm-roberta", 512),
        ("yoso", 514),
    ],
)
def test_capacity_is_what_the_model_takes(architecture: str, capacity: int | None) -> None:
    """A row of that many tokens passes through the model, and one more fails."""
    model = tiny_model(tiny_tokenizer("byte_bpe"), architecture=architecture)
    assert position_capacity(model) == capacity

    def run(length: int) -> None:
        with torch.no_grad():
            model(input_ids=torch.full((1, length), 7))

    run(capacity or 1000)
    if capacity:
        with pytest.raises((IndexError, RuntimeError)):
            run(capacity + 1)


@pytest.mark.parametrize("embeddings", [475, 1475, 1476])
def test_a_tokenizer_of_far_fewer_tokens_is_told(
    bert: PreTrainedModel,
    wordpiece: PreTrainedTokenizerFast,
    caplog: pytest.LogCaptureFixture,
    embeddings: int,
) -> None:
    """A thousand tokens, or a tenth of a large vocabulary, may have been added to round it up."""
    bert.resize_token_embeddings(embeddings, mean_resizing=False)
    check_tokenizer(wordpiece, bert)
    message = f"has 475 tokens, the model (BertForMaskedLM) embeddings for {embeddings}: is it th"
    assert (message in caplog.text) == (embeddings == 1476)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda model: torch.optim.AdamW, ValueError, r"is <class.*AdamW'>, with 0 of the 42 weig"),
        (
            lambda model: torch.optim.AdamW(tiny_model(tiny_tokenizer()).parameters()),
            ValueError,
            r"is AdamW, with 0 of the 42 .* \(extend_vocabulary and get_peft_model ret",
        ),
        (lambda model: torch.optim.LBFGS(model.parameters()), TypeError, "LBFGS, whose step needs"),
        (
            lambda model: [*model.parameters()],
            ValueError,
            r"^optimizer is \[Par[^$]{76}, with 0 of",
        ),
    ],
)
def test_an_optimizer_of_other_weights_is_refused(
    bert: PreTrainedModel, change: Any, error: type[Exception], message: str
) -> None:
    """It would train nothing; a class has no weights, and a closure is never passed."""
    with pytest.raises(error, match=message):
        check_optimizer(change(bert), bert)


def test_an_optimizer_of_some_weights_is_told(
    bert: PreTrainedModel, caplog: pytest.LogCaptureFixture
) -> None:
    """Those that are frozen need not be there, and may be."""
    weights = [*bert.parameters()]
    check_optimizer(torch.optim.SGD(weights[:3]), bert)
    assert "optimizer is SGD, with 3 of the 42 weights of the model" in caplog.text
    caplog.clear()
    weights[0].requires_grad = False
    for held in (weights, weights[1:]):
        check_optimizer(torch.optim.SGD(held), bert)
    assert not caplog.records


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_weight_that_is_not_finite_is_named(bert: PreTrainedModel, value: float) -> None:
    """Though it is frozen, and no batch may use it; -inf takes a token out of the vocabulary."""
    name = "bert.embeddings.position_embeddings.weight"
    weight = bert.get_parameter(name).requires_grad_(requires_grad=False)
    with torch.no_grad():
        bert.cls.predictions.bias[7] = -torch.inf
        check_weights(bert)
        weight[500, 3] = value
    with pytest.raises(ValueError, match=rf"model has NaN or infinity in {name} before any step;"):
        check_weights(bert)


def test_a_frozen_model_is_refused(bert: PreTrainedModel) -> None:
    """One weight is enough."""
    bert.requires_grad_(requires_grad=False)
    message = r"model BertForMaskedLM is frozen, .*; call requires_grad_\(True\), or add an adap"
    with pytest.raises(ValueError, match=message):
        check_weights(bert)
    bert.cls.predictions.bias.requires_grad = True
    check_weights(bert)


def test_a_trial_gives_what_the_model_gives(bert: PreTrainedModel) -> None:
    """In 32 bits, whatever kind its output is of, with labels or without."""
    ids = torch.tensor([[2, 9, 8, 3], [2, 7, 7, 3]])
    with torch.no_grad():
        expected = bert.eval()(input_ids=ids).logits
    assert torch.equal(try_model(bert.train(), {"input_ids": ids}), expected)
    bert.config.return_dict = False
    assert torch.equal(try_model(bert, {"input_ids": ids}), expected)
    assert try_model(bert.bfloat16(), {"input_ids": ids}).dtype == torch.float32


@pytest.mark.parametrize("fails", [False, True])
def test_a_trial_moves_nothing(
    bert: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, *, fails: bool
) -> None:
    """Neither modes of single modules nor gradients, hooks or generators; a long error is cut."""

    def fail(hidden: torch.Tensor) -> None:
        raise RuntimeError("no " * 300)

    if fails:
        monkeypatch.setattr(bert.cls, "forward", fail)
    bert.train()
    bert.bert.embeddings.eval()
    modes = [module.training for module in bert.modules()]
    state = torch.get_rng_state()
    message = (
        r"^.*BertForMaskedLM fails on a batch of \['input_ids'\] \(RuntimeError: [no ]{150}\)$"
    )
    refusal = pytest.raises(ValueError, match=message)
    with refusal if fails else nullcontext():
        try_model(bert, {"input_ids": torch.tensor([[2, 9, 3]])})
    assert [module.training for module in bert.modules()] == modes
    assert all(parameter.grad is None for parameter in bert.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled()


def test_a_trial_tells_what_the_model_does_not_predict(bert: PreTrainedModel) -> None:
    """No logits, logits of another shape, too small a vocabulary, NaN and infinity."""
    ids = torch.tensor([[2, 9, 8, 3]])
    with pytest.raises(
        ValueError, match=r"ForPreTraining does not predict .* have shape None, the"
    ):
        try_model(BertForPreTraining(bert.config), {"input_ids": ids})
    message = (
        r"BertForMaskedLM does not predict .* shape \(1, 4, 475\), the labels \(1, 4\) and .* 475;"
    )
    with pytest.raises(ValueError, match=message):
        try_model(bert, {"input_ids": ids}, labels=torch.tensor([[-100, 475, -100, -100]]))
    with pytest.raises(ValueError, match="ForSequenceClassification does not predict a token"):
        try_model(BertForSequenceClassification(bert.config), {"input_ids": ids})
    for value in (torch.inf, torch.nan):
        with torch.no_grad():
            bert.get_output_embeddings().weight[7, 0] = value
        with pytest.raises(ValueError, match="BertForMaskedLM predicts NaN or infinity: its"):
            try_model(bert, {"input_ids": ids})


def test_want_of_memory_is_no_fault_of_the_model(
    bert: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What finds a batch that fits has to see it."""

    def fail(hidden: torch.Tensor) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(bert.cls, "forward", fail)
    with pytest.raises(torch.OutOfMemoryError):
        try_model(bert, {"input_ids": torch.tensor([[2, 9, 3]])})


SPARSELY: dict[str, Any] = {
    "isolate_documents": lambda model, tokenizer: isolate_documents(model),
    "evaluate_mlm": lambda model, tokenizer: evaluate_mlm(
        model, [{"input_ids": [7, 4], "labels": [-100, 9]}], tokenizer=tokenizer
    ),
    "extend_vocabulary": lambda model, tokenizer: extend_vocabulary(tokenizer, model, ["scorer"]),
}


@pytest.mark.parametrize("name", [*SPARSELY, "accelerate_train"])
def test_attention_that_a_short_batch_switches_off_is_refused(
    wordpiece: PreTrainedTokenizerFast, tmp_path: Path, name: str
) -> None:
    """Before it is; with the attention that the error names, all goes on."""
    model: Any = tiny_model(wordpiece, architecture="big_bird")
    run = TinyRun(tmp_path)
    run.model = model
    call = SPARSELY.get(name, lambda *_: run.train(max_steps=1))
    message = r"BigBirdForMaskedLM has attention_type 'block_sparse', .*attention_type='original_f"
    with pytest.raises(ValueError, match=message) as raised:
        call(model, wordpiece)
    assert len(str(raised.value)) <= 300
    assert model.bert.attention_type == "block_sparse"
    model.bert.set_attention_type("original_full")
    model.config.attention_type = "original_full"
    if not IS_OLD or name != "isolate_documents":
        call(model, wordpiece)


def test_windows_of_layers_that_differ() -> None:
    """The widest counts; of ModernBERT it is half of what it calls local attention."""
    model = tiny_model(tiny_tokenizer(), architecture="modernbert")
    assert attention_window(model) == model.config.local_attention // 2
    assert attention_window(tiny_model(tiny_tokenizer())) == 0

    class Layered:
        is_heterogeneous = True
        per_layer_config = [type("Layer", (), {"sliding_window": n}) for n in (None, 256, 1024)]  # noqa: RUF012

        def get_text_config(self) -> Any:
            return self

    layered: Any = type("Model", (), {"config": Layered()})
    assert attention_window(layered) == 1024
