"""Documents that share a row see themselves alone, at own positions, under own masks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments, set_seed

from mlmadapt import (
    TrainingConfig,
    WholeWordMaskingCollator,
    accelerate_train,
    evaluate_mlm,
    insert_random_mask,
    isolate_documents,
    pack_texts,
    sparse_prediction,
)
from mlmadapt.model import documents as isolation
from mlmadapt.testing import assert_documents_isolated, tiny_model
from tests.scripts.packed import (
    ALONE,
    IS_OLD,
    PACKED,
    TOKENIZER,
    build,
    gradients_of,
    loss_and_gradients,
    tokenize,
)
from tests.scripts.short_run import drop_nothing, rows_of

if TYPE_CHECKING:
    from pathlib import Path


BOTH = ["albert", "bert", "camembert", "distilbert", "electra", "ernie", "roberta", "xlm-roberta"]
EAGER = ["megatron-bert", "mpnet", "rembert", "roformer"]
REFUSED = ["convbert", "deberta", "deberta-v2", "esm", "fnet", "nystromformer", "yoso"]
# These took masks of shapes of their own, and are refused.
LATER = {*EAGER, "esm", "modernbert"} if IS_OLD else set()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", [*BOTH, *EAGER, "modernbert"])
def test_documents_see_themselves_alone(architecture: str, attention: str) -> None:
    """Logits of a document in a packed row are those that it has alone, to 1e-5."""
    if (architecture in EAGER and attention == "sdpa") or architecture in LATER:
        pytest.skip(f"{architecture} has another attention in this version of transformers")
    model = build(architecture, attention)
    with isolate_documents(model):
        assert_documents_isolated(model, PACKED[:4], atol=1e-5)
    with pytest.raises(AssertionError, match=r"row \d, document \d of \d: the logits"):
        assert_documents_isolated(model, PACKED[:4], atol=1e-5)


@pytest.mark.parametrize("architecture", [name for name in REFUSED if name not in LATER])
def test_models_that_mix_documents_are_refused(architecture: str) -> None:
    """A model that cannot keep documents apart is refused by name, and left without hooks."""
    model = tiny_model(TOKENIZER, architecture=architecture)
    message = f"{type(model).__name__}.* does not keep the documents"
    with pytest.raises(ValueError, match=message) as raised:
        isolate_documents(model)
    assert len(str(raised.value)) <= 300
    assert not model._forward_pre_hooks


LEAKS = {
    "of ones and zeros": lambda sees, documents, dtype: sees.to(dtype),
    "of booleans": lambda sees, documents, dtype: sees,
    "of document numbers": lambda sees, documents, dtype: documents + 1,
    "of padding": lambda sees, documents, dtype: (documents >= 0).to(documents.dtype),
    "with three dimensions": lambda sees, documents, dtype: sees[:, 0],
}


@pytest.mark.parametrize("architecture", sorted({"bert", "distilbert", "mpnet", "roberta"} - LATER))
@pytest.mark.parametrize("kind", LEAKS)
def test_masks_that_leak_are_noticed(
    monkeypatch: pytest.MonkeyPatch, architecture: str, kind: str
) -> None:
    """The check at the start notices each mask that looks right and leaks in eager attention."""

    def leak(_: Any, documents: torch.Tensor, dtype: torch.dtype) -> Any:
        sees = documents[:, None, :, None] == documents[:, None, None, :]
        return LEAKS[kind](sees, documents, dtype)

    monkeypatch.setattr(isolation.DocumentIsolation, "_make_masks", leak)
    with pytest.raises(ValueError, match="with attention 'eager' does not keep the documents"):
        isolate_documents(build(architecture, "eager"))


@pytest.mark.skipif(IS_OLD, reason="ModernBERT is refused before transformers 5.23")
@pytest.mark.parametrize(
    "kinds", [None, ("full_attention", "sliding_attention")], ids=["one", "wide"]
)
def test_a_window_that_is_not_kept_is_noticed(monkeypatch: pytest.MonkeyPatch, kinds: Any) -> None:
    """One mask for all layers is left out by ModernBERT; a wide one reaches out of its window.

    The documents of the check are longer than the window, so that it has to hold.
    """
    make = isolation.DocumentIsolation._make_masks

    def widen(*args: Any) -> Any:
        full = make(*args)["full_attention"]
        return dict.fromkeys(kinds, full) if kinds else full

    monkeypatch.setattr(isolation.DocumentIsolation, "_make_masks", widen)
    with pytest.raises(ValueError, match="not those that it has alone" if kinds else "not keep"):
        isolate_documents(build("modernbert"))


@pytest.mark.parametrize("architecture", ["bert", "roberta"])
@pytest.mark.parametrize("wrong", ["none", "shifted"])
def test_positions_that_do_not_begin_anew_are_noticed(
    monkeypatch: pytest.MonkeyPatch, architecture: str, wrong: str
) -> None:
    """The check notices documents at other positions than they have alone."""
    count = isolation._count_positions

    def misplace(documents: torch.Tensor, *others: Any) -> torch.Tensor:
        all_places = torch.arange(documents.shape[1]).expand_as(documents)
        return all_places if wrong == "none" else count(documents, *others) + 1

    monkeypatch.setattr(isolation, "_count_positions", misplace)
    with pytest.raises(ValueError, match="not those that it has alone"):
        isolate_documents(build(architecture))


@pytest.mark.parametrize(
    "architecture", sorted({"albert", "bert", "modernbert", "roberta"} - LATER)
)
def test_loss_and_gradients_are_those_of_single_rows(architecture: str) -> None:
    """Masks, loss and gradients of packed rows equal those of rows of one document each."""
    model = build(architecture)
    with isolate_documents(model):
        loss, gradient = loss_and_gradients(model, PACKED)
        expected_loss, expected = loss_and_gradients(model, ALONE)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert (gradient - expected).norm() <= 1e-4 * expected.norm()


@pytest.mark.parametrize("budget", ["bernoulli", "exact"])
@pytest.mark.parametrize("random", [0.0, 0.3])
def test_masks_of_a_document_know_nothing_of_its_row(budget: Any, random: float) -> None:
    """Packed or alone, in whatever company, a document has the same masks."""
    collator = WholeWordMaskingCollator(
        TOKENIZER, seed=1, budget=budget, mask_replace_prob=0.6, random_replace_prob=random
    )

    def documents(rows: list[dict[str, Any]]) -> list[tuple[list[int], list[int]]]:
        batch = collator(rows, return_tensors="np")
        numbers = batch.get("document_ids", np.where(batch["attention_mask"] == 1, 0, -1))
        return sorted(
            (batch["input_ids"][row][is_its].tolist(), batch["labels"][row][is_its].tolist())
            for row in range(len(rows))
            for is_its in (numbers[row] == number for number in set(numbers[row]) - {-1})
        )

    assert documents(PACKED) == documents(ALONE)
    wider = rows_of(pack_texts(tokenize(24), chunk_size=200))
    assert documents(wider) == documents(ALONE)


def test_both_handles_in_any_order() -> None:
    """With `sparse_prediction` before or after, loss and gradients in training are the same."""
    batch = WholeWordMaskingCollator(TOKENIZER, seed=3)(PACKED)
    gradients = []
    for order in [(isolate_documents,), (isolate_documents, sparse_prediction),
                  (sparse_prediction, isolate_documents)]:  # fmt: skip
        model = build("bert").train()
        handles = [install(model) for install in order]
        torch.manual_seed(0)
        model(**batch).loss.backward()
        gradients.append(gradients_of(model))
        for handle in handles:
            handle.remove()
        with pytest.raises(ValueError, match="call isolate_documents"):
            model(**batch)
    for other in gradients[1:]:
        assert (other - gradients[0]).norm() <= 1e-5 * gradients[0].norm()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_gradient_checkpointing_and_adapters() -> None:
    """Isolation holds below PEFT's adapters, and where activations are computed again."""
    bare = drop_nothing(build("bert"))
    model = get_peft_model(bare, LoraConfig(target_modules=["query"], init_lora_weights=False))
    new = hasattr(bare, "activation_checkpointing_enable")  # from transformers 5.23 on
    name = "activation_checkpointing" if new else "gradient_checkpointing"
    getattr(bare, f"{name}_enable")({"use_reentrant": False})
    model.train()
    with isolate_documents(model):
        packed = loss_and_gradients(model, PACKED)
        alone = loss_and_gradients(model, ALONE)
    assert packed[0] == pytest.approx(alone[0], rel=1e-5)
    assert (packed[1] - alone[1]).norm() <= 1e-4 * alone[1].norm()


def test_collators_of_others_keep_the_documents(tmp_path: Path) -> None:
    """A collator of transformers, which knows no document, trains and freezes packed rows."""
    collator = DataCollatorForLanguageModeling(TOKENIZER, mlm_probability=0.3)
    frozen = insert_random_mask(Dataset.from_list(PACKED)[:], collator)
    assert [list(row) for row in frozen["masked_document_ids"]] == [
        row["document_ids"] for row in PACKED
    ]
    result = accelerate_train(
        build("bert"),
        PACKED,
        rows_of(frozen),
        tokenizer=TOKENIZER,
        data_collator=collator,
        config=TrainingConfig(output_dir=str(tmp_path), max_steps=2, disable_tqdm=True),
    )
    targets = [int((np.asarray(row) != -100).sum()) for row in frozen["masked_labels"]]
    assert result.final.masked_tokens == sum(targets)


def test_evaluation_isolates_by_itself() -> None:
    """Figures of packed frozen rows are those of the documents one per row."""
    collator = WholeWordMaskingCollator(TOKENIZER)
    figures = []
    for rows in (PACKED, ALONE):
        frozen = Dataset.from_list(rows).map(
            insert_random_mask, batched=True, fn_kwargs={"data_collator": collator},
            remove_columns=list(rows[0]),
        )  # fmt: skip
        figures.append(evaluate_mlm(build("roberta"), frozen, tokenizer=TOKENIZER, batch_size=5))
    packed, alone = figures
    assert packed.masked_tokens == alone.masked_tokens
    assert packed.loss == pytest.approx(alone.loss, rel=1e-6)
    assert (packed.accuracy, packed.top5_accuracy) == (alone.accuracy, alone.top5_accuracy)


def test_training_isolates_by_itself(tmp_path: Path) -> None:
    """A step on all documents, packed, takes the weights where a step on single rows takes them."""
    ends = []
    columns = tokenize(24)
    columns["number"] = [[place] * len(row) for place, row in enumerate(columns["input_ids"])]
    for rows in (rows_of(pack_texts(columns, chunk_size=64)), rows_of(columns)):
        model = drop_nothing(build("bert"))
        accelerate_train(
            model,
            rows,
            tokenizer=TOKENIZER,
            data_collator=WholeWordMaskingCollator(TOKENIZER, key_column="number"),
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            config=TrainingConfig(
                output_dir=str(tmp_path), overwrite=True, num_train_epochs=3, disable_tqdm=True,
                save_strategy="no",
            ),
        )  # fmt: skip
        assert not model._forward_pre_hooks
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert (ends[0] - ends[1]).norm() <= 1e-5 * ends[1].norm()


def test_trainer_isolates_with_the_handle(tmp_path: Path) -> None:
    """Under `Trainer`, the loss of packed rows is that of single rows."""
    losses = []
    for rows in (PACKED, ALONE):
        set_seed(0)
        model = drop_nothing(build("bert"))
        arguments = TrainingArguments(
            output_dir=str(tmp_path), per_device_train_batch_size=32, max_steps=2, report_to="none",
            remove_unused_columns=False, logging_steps=1, disable_tqdm=True, save_strategy="no",
            use_cpu=True,
        )  # fmt: skip
        with isolate_documents(model), sparse_prediction(model):
            trainer = Trainer(
                model,
                arguments,
                train_dataset=Dataset.from_list(rows),
                data_collator=WholeWordMaskingCollator(TOKENIZER, seed=0),
            )
            trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize("architecture", [*BOTH, *EAGER, *REFUSED, "modernbert"])
def test_a_model_without_the_handle_says_so(architecture: str) -> None:
    """No architecture with attention takes a packed batch for an ordinary one without a word."""
    if architecture == "fnet":
        pytest.skip("it reads no attention mask, so that nothing of a batch can tell")
    batch = WholeWordMaskingCollator(TOKENIZER, seed=0)(PACKED[:2])
    with pytest.raises(ValueError, match="call isolate_documents"):
        tiny_model(TOKENIZER, architecture=architecture)(**batch)


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        ([[0, 0, 1, 0]], r"document_ids of row 0 of the batch fall from 1 to 0"),
        ([[0, 0, 1]], r"document_ids have shape \(1, 3\), the inputs \(1, 4\)"),
    ],
)
def test_documents_that_make_no_sense_are_refused(documents: list[Any], message: str) -> None:
    """A model with the handle refuses documents that do not rise or do not fit."""
    model = build("bert")
    with isolate_documents(model), pytest.raises(ValueError, match=message):
        model(input_ids=torch.tensor([[7, 8, 9, 7]]), document_ids=torch.tensor(documents))


def test_collators_refuse_documents_that_fall() -> None:
    """Rows whose documents do not rise are refused on the way to the model, by each collator."""
    row = {"input_ids": [7, 8, 9], "word_ids": [0, 1, 2], "document_ids": [0, 1, 0]}
    fine = {**row, "document_ids": [0, 0, 1]}
    message = "document_ids of row 1 of the batch fall from 1 to 0"
    with pytest.raises(ValueError, match=message):
        WholeWordMaskingCollator(TOKENIZER)([fine, row])
    frozen = [{**columns, "labels": [7, 9, -100]} for columns in (fine, row)]
    with pytest.raises(ValueError, match=message):
        evaluate_mlm(build("bert"), frozen, tokenizer=TOKENIZER)
    short = {**row, "document_ids": [0, 1]}
    with pytest.raises(ValueError, match="3 'input_ids' but 2 'document_ids'"):
        WholeWordMaskingCollator(TOKENIZER)([fine, short])


def test_rows_without_documents_are_not_touched() -> None:
    """Nor global random state: the check's documents are drawn from a generator of their own."""
    model, state = build("bert"), torch.get_rng_state()
    ids = torch.tensor([[7, 8, 9, 0]])
    mask = torch.tensor([[1, 1, 1, 0]])
    with torch.no_grad():
        before = model(input_ids=ids, attention_mask=mask).logits
        with isolate_documents(model):
            assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, before)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("what", ["a hole", "a hole at the start", "padding", "padding at the end"])
@pytest.mark.parametrize("architecture", ["bert", "distilbert", "roberta", "xlm-roberta"])
def test_what_is_no_text_has_the_position_that_it_has_alone(architecture: str, what: str) -> None:
    """Places that attention does not see, and padding tokens that are written out, shift nothing.

    RoBERTa and its relatives do not count padding tokens, wherever they stand.
    """
    model = build(architecture)
    ids, documents = torch.arange(7, 19)[None], torch.tensor([[0] * 5 + [1] * 7])
    mask = torch.ones_like(ids)
    if what.startswith("a hole"):
        mask[0, {"a hole": [2, 8, 9], "a hole at the start": [0, 5]}[what]] = 0
    else:
        ids[0, {"padding": [1, 7, 8], "padding at the end": [4, 11]}[what]] = TOKENIZER.pad_token_id
    with torch.no_grad(), isolate_documents(model):
        together = model(input_ids=ids, attention_mask=mask, document_ids=documents).logits[0]
        for document in (0, 1):
            own = documents == document
            inputs = {"input_ids": ids[own][None], "attention_mask": mask[own][None]}
            seen = mask[own] == 1
            alone = model(**inputs).logits[0]
            torch.testing.assert_close(together[own[0]][seen], alone[seen], rtol=0, atol=1e-5)


def test_embeddings_in_place_of_tokens_have_positions() -> None:
    """Of which none is padding; positions begin anew, from where the model's do."""
    model = build("roberta")
    documents = torch.tensor([[0, 0, 1, 1, 1]])
    vectors = torch.rand(1, 5, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), isolate_documents(model):
        together = model(inputs_embeds=vectors, document_ids=documents).logits[:, 2:]
        alone = model(inputs_embeds=vectors[:, 2:]).logits
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


def test_tokens_out_of_the_vocabulary_are_no_difference() -> None:
    """Their logits are -inf in any company."""
    model: Any = build("bert")
    with torch.no_grad():
        model.get_output_embeddings().bias[7:9] = -torch.inf
    ids, documents = torch.tensor([[7, 8, 9, 7]]), torch.tensor([[0, 0, 1, 1]])
    with torch.no_grad(), isolate_documents(model):
        together = model(input_ids=ids, document_ids=documents).logits[:, 2:]
        torch.testing.assert_close(together, model(input_ids=ids[:, 2:]).logits)


@pytest.mark.parametrize("architecture", ["bert", "modernbert"])
def test_attention_that_can_end_the_process_is_refused_untried(architecture: str) -> None:
    """By name, with the cure, and without hooks."""
    model: Any = tiny_model(TOKENIZER, architecture=architecture)
    model.config._attn_implementation = "flex_attention"
    model.forward = None  # not called
    message = r"has attention 'flex_attention', which can .*; load it with attn_implementation='sd"
    with pytest.raises(ValueError, match=message):
        isolate_documents(model)
    assert not model._forward_pre_hooks


@pytest.mark.parametrize("is_padded", [False, True])
def test_an_encoder_that_does_not_take_the_documents_is_told(
    monkeypatch: pytest.MonkeyPatch, *, is_padded: bool
) -> None:
    """As in code that was compiled without its hook; and the next forward pass is as before."""
    model: Any = build("bert")
    ids, documents = torch.tensor([[7, 8, 9, 7]]), torch.tensor([[0, 0, 1, -1 if is_padded else 1]])
    mask = (documents >= 0).long()
    with torch.no_grad(), isolate_documents(model):
        expected = model(input_ids=ids, attention_mask=mask, document_ids=documents).logits
        with monkeypatch.context() as patch:
            patch.setattr(type(model.bert), "__call__", type(model.bert).forward)
            with pytest.raises(ValueError, match=r"BertForMaskedLM ran code .*compiler\.res"):
                model(input_ids=ids, attention_mask=mask, document_ids=documents)
            model(input_ids=ids)
        again = model(input_ids=ids, attention_mask=mask, document_ids=documents).logits
    assert torch.equal(again, expected)
