"""Rows for new words, in every head."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    BertForMaskedLM,
    DebertaV2Config,
    DebertaV2ForMaskedLM,
)

from mlmadapt import (
    TrainingConfig,
    TrainingResult,
    WholeWordMaskingCollator,
    accelerate_train,
    evaluate_mlm,
    extend_vocabulary,
    group_texts,
    insert_random_mask,
    tokenize_with_word_ids,
)
from mlmadapt.testing import tiny_corpus, tiny_model, tiny_tokenizer
from tests.scripts.short_run import rows_of

if TYPE_CHECKING:
    from pathlib import Path

NEW = ["placebo", "unwatchables", "goodness"]
FAMILIES = {
    "bert": "wordpiece",
    "roberta": "byte_bpe",
    "distilbert": "wordpiece",
    "albert": "unigram",
    "electra": "wordpiece",
    "deberta-v2": "unigram_offsets",
    "deberta-v2 (new head)": "unigram_offsets",
    "modernbert": "byte_bpe",
    "mpnet": "wordpiece",
}
families = pytest.mark.parametrize("architecture", FAMILIES)


def make(architecture: str, *, tied: bool = True, dtype: torch.dtype = torch.float32) -> Any:
    """A tokenizer and a model of a family whose biases are not 0, as those of real models are."""
    tokenizer = tiny_tokenizer(FAMILIES[architecture])
    model: Any = tiny_model(tokenizer, architecture=architecture.partition(" ")[0])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        if architecture == "deberta-v2 (new head)":
            model = DebertaV2ForMaskedLM(
                DebertaV2Config(**model.config.to_dict() | {"legacy": False})
            )
        if not tied:
            model.config.tie_word_embeddings = False
            model = AutoModelForMaskedLM.from_config(model.config)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if name.endswith("bias"):
                    weight.normal_()
    return tokenizer, model.to(dtype).eval()


def logits(model: Any, ids: list[int]) -> torch.Tensor:
    """What a model predicts for a text."""
    with torch.no_grad():
        predicted: torch.Tensor = model(input_ids=torch.tensor([ids])).logits
    return predicted


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@families
def test_new_rows_are_means(architecture: str, tied: bool, tmp_path: Path) -> None:  # noqa: FBT001
    """Embeddings, matrix and bias; old words keep their logits; loaded again, it is the same."""
    if "new head" in architecture and Version(transformers.__version__) < Version("5.23"):
        pytest.skip("transformers 5.0 cannot load DeBERTa's newer head by itself")
    tokenizer, model = make(architecture, tied=tied)
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    longer, larger = extend_vocabulary(tokenizer, model, NEW)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(model.state_dict()[name], weights) for name, weights in before.items())
    assert model.config.vocab_size == len(tokenizer) == len(longer) - len(NEW)
    assert larger.config.vocab_size == len(longer) == len(larger.get_input_embeddings().weight)

    ids = tokenizer(f"x {tokenizer.mask_token} film")["input_ids"]
    was, now = logits(model, ids), logits(larger, ids)
    # To the last bits, since a larger matrix product may sum in another order.
    torch.testing.assert_close(now[..., : len(tokenizer)], was)
    start = len(tokenizer("x", add_special_tokens=False)["input_ids"])
    old_rows = model.get_input_embeddings().weight
    for token_id, word in enumerate(NEW, start=len(tokenizer)):
        pieces = tokenizer(f"x {word}", add_special_tokens=False)["input_ids"][start:]
        assert len(pieces) > 1
        row = larger.get_input_embeddings().weight[token_id]
        torch.testing.assert_close(row, old_rows[pieces].mean(0))
        torch.testing.assert_close(now[..., token_id], was[..., pieces].mean(-1))

    larger.save_pretrained(tmp_path)
    longer.save_pretrained(tmp_path)
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path)
    text = longer("a placebo of goodness")["input_ids"]
    assert AutoTokenizer.from_pretrained(tmp_path)("a placebo of goodness")["input_ids"] == text
    assert torch.equal(logits(loaded, text), logits(larger, text))
    assert count_tables(loaded) == count_tables(larger) == count_tables(model)


def count_tables(model: Any) -> int:
    """How many matrices have a row per token: one where the head's is the input embedding's."""
    rows = model.config.vocab_size
    return sum(len(weight) == rows and weight.dim() == 2 for weight in model.parameters())


@families
def test_16_bits(architecture: str) -> None:
    """Weights keep their type, and what is rounded is no reason to refuse them."""
    tokenizer, model = make(architecture, dtype=torch.bfloat16)
    _, larger = extend_vocabulary(tokenizer, model, NEW)
    assert larger.dtype == torch.bfloat16


def test_rows_are_padded_to_a_multiple() -> None:
    """What fills up is the mean of all rows, so that it takes no token's place."""
    tokenizer, model = make("bert")
    longer, larger = extend_vocabulary(tokenizer, model, NEW, pad_to_multiple_of=64)
    assert larger.config.vocab_size == 512 > len(longer)
    ids = tokenizer(f"a {tokenizer.mask_token}")["input_ids"]
    spare, old = logits(larger, ids)[..., len(longer) :], logits(model, ids)
    torch.testing.assert_close(spare, old.mean(-1, keepdim=True).expand_as(spare))
    # Rows that are there already are used first.
    again, same = extend_vocabulary(longer, larger, ["scorers"])
    assert (len(again), same.config.vocab_size) == (len(longer) + 1, 512)


def test_words_of_tokens_out_of_the_vocabulary() -> None:
    """Are out of it, as their pieces are; all others have their logits."""
    tokenizer, model = make("bert")
    pieces = tokenizer("placebo", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        model.get_output_embeddings().bias[pieces[0]] = -torch.inf
    longer, larger = extend_vocabulary(tokenizer, model, NEW)
    last = logits(larger, longer("film")["input_ids"])[0, -1]
    assert last.isinf().nonzero().flatten().tolist() == [pieces[0], len(tokenizer)]


def test_unused_rows_are_reused() -> None:
    """The model does not grow, and the rows of reserved tokens become those of words."""
    tokenizer = tiny_tokenizer("byte_bpe")
    tokenizer.add_tokens([f"[unused{number}]" for number in range(3)])
    model = tiny_model(tokenizer, architecture="roberta")
    longer, larger = extend_vocabulary(tokenizer, model, NEW, reuse_unused=True)
    assert larger.config.vocab_size == len(longer) == len(tokenizer)
    pieces = tokenizer(" goodness", add_special_tokens=False)["input_ids"]
    row = larger.get_input_embeddings().weight[longer.convert_tokens_to_ids("Ġgoodness")]
    torch.testing.assert_close(row, model.get_input_embeddings().weight[pieces].mean(0))


@pytest.mark.usefixtures("no_curves")
@pytest.mark.parametrize("architecture", ["bert", "roberta"])
def test_a_run_with_new_words(architecture: str, tmp_path: Path) -> None:
    """Trained, saved, resumed and evaluated as any other; new words are masked as any other."""
    tokenizer, model = extend_vocabulary(*make(architecture), NEW)
    texts = [f"{text} placebo goodness" for text in tiny_corpus(60)]
    rows = rows_of(group_texts(tokenize_with_word_ids({"text": texts}, tokenizer), chunk_size=32))
    collator = WholeWordMaskingCollator(tokenizer, seed=0)
    labels = collator(rows)["labels"]
    assert (labels >= len(tokenizer) - len(NEW)).any()
    frozen = insert_random_mask(
        {name: [row[name] for row in rows[:8]] for name in rows[0]}, collator
    )
    frozen_rows = rows_of(frozen)
    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "max_steps": 3}

    def train(**more: Any) -> TrainingResult:
        config = TrainingConfig(output_dir=str(tmp_path), **settings, **more)
        options: Any = {"tokenizer": tokenizer, "data_collator": collator, "config": config}
        return accelerate_train(copy.deepcopy(model), rows[8:], frozen_rows, **options)

    result = train()
    resumed = train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.final == result.final
    saved = AutoModelForMaskedLM.from_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    again = evaluate_mlm(saved, frozen_rows, tokenizer=loaded)
    assert result.final is not None
    assert again.loss == pytest.approx(result.final.loss, rel=1e-6)
    assert loaded("a placebo")["input_ids"] == tokenizer("a placebo")["input_ids"]


# Architectures with a second table to read by, a part of the head that lies across, and numbers of
# words beside the configuration's.
SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
SMALL["intermediate_size"] = 48
SIZES: dict[str, dict[str, Any]] = {
    "xlm": {"emb_dim": 32, "n_layers": 1, "n_heads": 2},
    "flaubert": {"emb_dim": 32, "n_layers": 1, "n_heads": 2},
    "mobilebert": {**SMALL, "embedding_size": 16, "intra_bottleneck_size": 32},
    "eurobert": {**SMALL, "num_key_value_heads": 2},
    "neomme": {**SMALL, "num_key_value_heads": 2, "head_dim": 16, "embedding_rank": 16},
}


@pytest.mark.parametrize("architecture", SIZES)
@pytest.mark.parametrize("multiple", [None, 96], ids=["grown", "rows to spare"])
def test_a_new_word_is_read_learned_and_loaded(
    architecture: str, multiple: int | None, tmp_path: Path
) -> None:
    """Whatever has a row per token has one for it, and what is counted is counted with it."""
    if architecture not in CONFIG_MAPPING:
        pytest.skip("of later versions of transformers")
    tokenizer = tiny_tokenizer()
    special = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    config = AutoConfig.for_model(architecture, **special, **SIZES[architecture])
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForMaskedLM.from_config(config).eval()
    if multiple:  # without new rows, those that fill up are found as well
        tokenizer, model = extend_vocabulary(
            tokenizer, model, ["scorer"], pad_to_multiple_of=multiple
        )
    before = copy.deepcopy(model.state_dict())
    longer, larger = extend_vocabulary(tokenizer, model, NEW)
    ids = torch.tensor([longer("a placebo of goodness")["input_ids"]])
    with torch.no_grad():
        output = larger(input_ids=ids, labels=ids)
    expected = torch.nn.functional.cross_entropy(output.logits[0], ids[0])
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    pieces = tokenizer("goodness", add_special_tokens=False)["input_ids"]
    for name, values in larger.state_dict().items():
        for dim, size in enumerate(values.shape):
            if size == larger.config.vocab_size:
                now, was = values.movedim(dim, 0), before[name].movedim(dim, 0)
                assert torch.equal(now[: len(tokenizer)], was[: len(tokenizer)])
                torch.testing.assert_close(now[len(longer) - 1], was[pieces].mean(0))
    larger.save_pretrained(tmp_path)
    loaded = AutoModelForMaskedLM.from_pretrained(
        tmp_path, attn_implementation=larger.config._attn_implementation
    )
    assert torch.equal(logits(loaded, ids[0].tolist()), output.logits)
    assert all(torch.equal(model.state_dict()[name], values) for name, values in before.items())


class Normalized(BertForMaskedLM):
    """A head whose logits depend on the number of tokens."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return logarithms of probabilities."""
        output = super().forward(*args, **kwargs)
        output.logits = output.logits.log_softmax(-1)
        return output


class Forgetful(BertForMaskedLM):
    """A loss that knows the old number of tokens."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.sizes = [config.vocab_size]

    def forward(self, *args: Any, labels: Any = None, **kwargs: Any) -> Any:
        """Compute a loss over the tokens of old."""
        output = super().forward(*args, **kwargs)
        if labels is not None:
            torch.nn.functional.cross_entropy(output.logits.view(-1, *self.sizes), labels.view(-1))
        return output


class Built(BertForMaskedLM):
    """A class that is made of more than its configuration."""

    def __init__(self, config: Any, extra: int) -> None:
        super().__init__(config)
        self.extra = extra


class Padded(BertForMaskedLM):
    """Tables with more rows than the configuration says."""

    def __init__(self, config: Any) -> None:
        padded = copy.deepcopy(config)
        padded.vocab_size += -padded.vocab_size % 5
        super().__init__(padded)


def with_buffer(config: Any) -> Any:
    """A model with something that its configuration knows nothing of."""
    model = BertForMaskedLM(config)
    model.register_buffer("counts", torch.zeros(config.vocab_size))
    return model


@pytest.mark.parametrize(
    ("make_model", "reason"),
    [
        (Normalized, r"its logits are off by .*, as if part of its head was not found"),
        (Forgetful, r"model Forgetful fails on a batch of \['input_ids', 'labels'\]"),
        (lambda config: Built(config, 3), r".*missing .*'extra'"),
        (Padded, r"Error\(s\) in loading .* size mismatch for "),
        (with_buffer, r'Error\(s\) in loading .* Unexpected key\(s\) in state_dict: "counts"'),
        (
            lambda _: tiny_model(tiny_tokenizer(), architecture="ibert"),
            r"Error\(s\) in loading .* size mismatch for ibert.*weight_integer",
        ),
    ],
    ids=["logits", "loss", "built", "padded", "buffer", "own buffer"],
)
def test_models_that_cannot_have_new_rows(make_model: Any, reason: str) -> None:
    """Each is named with one reason, in few words, and left as it was."""
    tokenizer, model = make("bert")
    with torch.random.fork_rng(devices=[]):
        model = make_model(model.config)
    before = copy.deepcopy(model.state_dict())
    name = type(model).__name__
    message = rf"^model {name} cannot be extended: with new rows, {reason}.*; keep its vocabulary"
    with pytest.raises(ValueError, match=message) as caught:
        extend_vocabulary(tokenizer, model, NEW)
    assert len(str(caught.value)) <= 300
    assert all(torch.equal(model.state_dict()[name], values) for name, values in before.items())


def test_models_that_are_not_the_tokenizers() -> None:
    """Fewer rows than tokens, or another padding token; and rows are whole numbers."""
    tokenizer, model = make("bert")
    for size in (0, 1.5, True, "8"):
        with pytest.raises(ValueError, match=f"pad_to_multiple_of is {size!r}; it must be a whole"):
            extend_vocabulary(tokenizer, model, NEW, pad_to_multiple_of=size)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="tokenizer has 512 tokens and padding id 1, the model 4"):
        extend_vocabulary(tiny_tokenizer("byte_bpe"), model, NEW)
    model.config.pad_token_id = 1
    with pytest.raises(ValueError, match=r"padding id 0, the model .* padding id 1; pass the tok"):
        extend_vocabulary(tokenizer, model, NEW)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_models_that_cannot_be_extended() -> None:
    """Adapters, compiled and causal models, shards, several devices."""
    tokenizer, model = make("bert")

    def refuse(model: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            extend_vocabulary(tokenizer, model, NEW)

    refuse(torch.compile(model), "is compiled or has adapters; extend the bare model")
    lora = LoraConfig(target_modules=["query"])
    refuse(get_peft_model(copy.deepcopy(model), lora), "is compiled or has adapters")
    adapted = copy.deepcopy(model)
    adapted.add_adapter(lora)
    refuse(adapted, "is compiled or has adapters")
    config = AutoConfig.for_model("gpt2", n_layer=1, n_head=2, n_embd=8)
    refuse(AutoModelForCausalLM.from_config(config), "is a causal language model")
    on_two = copy.deepcopy(model)
    on_two.bert.pooler = torch.nn.Linear(2, 2, device="meta")
    refuse(on_two, "is on the device 'meta', where weights have no values")
    sharded = copy.deepcopy(model)
    sharded.get_input_embeddings().weight.ds_id = 3
    refuse(sharded, "is sharded; extend it before FSDP or DeepSpeed get it")
