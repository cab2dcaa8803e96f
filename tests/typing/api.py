"""Every public name as a user would write it, for ``mypy --strict``; never executed."""

from typing import Any, assert_type

import torch
from accelerate import Accelerator
from datasets import Dataset
from matplotlib.figure import Figure
from transformers import (
    DataCollatorForLanguageModeling,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
)

import mlmadapt
from mlmadapt import (
    MaskedLMMetrics,
    MaskedWordMetrics,
    MaskingCallback,
    TrainingConfig,
    TrainingResult,
    WholeWordMaskingCollator,
    accelerate_train,
    evaluate_mlm,
    evaluate_words,
    extend_vocabulary,
    find_domain_words,
    group_texts,
    insert_random_mask,
    isolate_documents,
    masked_lm_loss,
    pack_texts,
    phrases,
    show_masks,
    sparse_prediction,
    tokenize_with_word_ids,
)
from mlmadapt.testing import (
    TOKENIZER_KINDS,
    assert_documents_kept,
    assert_masks_reproducible,
    assert_resumes_exactly,
    assert_same_loss,
    assert_tokens_kept,
    assert_whole_words_masked,
    tiny_corpus,
    tiny_model,
    tiny_rows,
    tiny_tokenizer,
)


def misspell() -> None:
    """A name that is none is an error here; an ignore that nobody needs is one, too."""
    mlmadapt.group_text  # type: ignore[attr-defined]  # noqa: B018
    TrainingConfig(bf16=True)  # type: ignore[call-arg]
    assert_type(mlmadapt.__version__, str)


def prepare(documents: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Tokenize and chunk, by `map` and by hand."""
    units = phrases(["pulp fiction", "film noir"])
    columns = tokenize_with_word_ids(
        {"text": ["a film"]}, tokenizer, text_column="text", word_boundaries=units
    )
    chunks = group_texts(columns, chunk_size=64, remainder="keep", labels=False, documents=True)
    assert_type(chunks["input_ids"][0], Any)
    assert_type(pack_texts(columns, chunk_size=64)["document_ids"][0], Any)
    tokenized = documents.map(
        tokenize_with_word_ids,
        batched=True,
        fn_kwargs={"tokenizer": tokenizer, "word_boundaries": units},
        remove_columns=documents.column_names,
    )
    grouped: Dataset = tokenized.map(group_texts, batched=True, fn_kwargs={"chunk_size": 64})
    return grouped


def extend(
    texts: list[str], tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel
) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """Find words, and add them."""
    found = find_domain_words(
        (text for text in texts),
        tokenizer,
        size=100,
        min_count=5,
        min_length=3,
        letters_only=False,
        general_texts=texts,
        num_proc=2,
    )
    assert_type(found.words, list[str])
    assert_type(found.share, float)
    assert_type([(each.word, each.count) for each in found.found], list[tuple[str, int]])
    assert_type(
        [(each.pieces, each.tokens_saved) for each in found.found], list[tuple[list[str], int]]
    )
    return extend_vocabulary(tokenizer, model, found.words, reuse_unused=True, pad_to_multiple_of=8)


def mask(rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Collate a batch, and freeze masks."""
    collator = WholeWordMaskingCollator(
        tokenizer,
        wwm_probability=0.2,
        mask_replace_prob=0.8,
        random_replace_prob=0.1,
        seed=0,
        pad_to_multiple_of=8,
        return_tensors="pt",
    )
    collator.set_epoch(1)
    collator.set_progress(0.5)
    assert_type(MaskingCallback(collator).data_collator, WholeWordMaskingCollator)
    WholeWordMaskingCollator(tokenizer, wwm_probability={0.0: 0.3, 0.8: 0.15})
    WholeWordMaskingCollator(tokenizer, wwm_probability=lambda done: 0.3 - 0.15 * done)
    batch = collator([{"input_ids": [2, 7, 3], "word_ids": [-1, 0, -1]}])
    assert_type(batch, dict[str, Any])
    assert_type(str(show_masks(batch, tokenizer, features=None)), str)
    examples = {"input_ids": [[2, 7]]}
    frozen: dict[str, Any] = insert_random_mask(examples, collator, seed=1, prefix="")
    frozen.values()
    mapped: Dataset = rows.map(
        insert_random_mask, batched=True, fn_kwargs={"data_collator": collator}
    )
    return mapped


def train(model: PreTrainedModel, rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> str:
    """The recipe's end, with everything that may be passed in."""
    config = TrainingConfig(
        output_dir="adapted",
        learning_rate=2e-5,
        eval_strategy="epoch",
        report_to=["tensorboard"],
        dataset_name="stanfordnlp/imdb",
        fill_mask=["This is a great [MASK]."],
        push_to_hub=True,
        hub_model_id="me/adapted",
        hub_private_repo=True,
    )
    optimizer = torch.optim.AdamW(model.parameters())
    result = accelerate_train(
        model,
        rows,
        {"reviews": rows, "general": [{"input_ids": [2, 4, 3], "labels": [-100, 9, -100]}]},
        tokenizer=tokenizer,
        data_collator=WholeWordMaskingCollator(tokenizer),
        config=config,
        optimizer=optimizer,
        lr_scheduler=torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0),
        accelerator=Accelerator(),
    )
    assert_type(result, TrainingResult)
    assert_type(result.initial, MaskedLMMetrics | None)
    assert_type(result.history, list[dict[str, float]])
    assert_type(result.best.perplexity if result.best else None, float | None)
    assert_type(result.global_step + result.tokens_seen + result.masked_tokens_seen, int)
    assert_type(result.seconds, float)
    assert_type(result.plot(), Figure)
    return result.output_dir


def evaluate(
    model: PreTrainedModel, rows: Dataset, tokenizer: PreTrainedTokenizerBase
) -> tuple[float, float, float, float, int]:
    """Metrics, one by one."""
    metrics = evaluate_mlm(
        model, rows, tokenizer=tokenizer, batch_size=32, accelerator=Accelerator()
    )
    assert_type(metrics, MaskedLMMetrics)
    assert_type(evaluate_words(model, rows, tokenizer=tokenizer), MaskedWordMetrics)
    return (
        metrics.loss,
        metrics.perplexity,
        metrics.accuracy,
        metrics.top5_accuracy,
        metrics.masked_tokens,
    )


def own_loop(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> Trainer:
    """The sparse head as a context and as a handle, the loss by hand and in `Trainer`."""
    with sparse_prediction(model) as handle:
        outputs = model(**batch)
        loss = masked_lm_loss(outputs, batch["labels"], num_items_in_batch=100)
        assert_type(loss, torch.Tensor)
        handle.remove()
    kept = sparse_prediction(model)
    kept.remove()
    with isolate_documents(model) as isolated:
        isolated.remove()
    return Trainer(model=model, compute_loss_func=masked_lm_loss)


def own_training(output_dir: str, resume: bool) -> list[float]:  # noqa: FBT001
    """Train as `assert_resumes_exactly` calls it."""
    return [float(resume), float(len(output_dir))]


def own_tests(rows: Dataset) -> None:
    """The material and the assertions, of rows in lists and in a dataset."""
    assert_type(tiny_corpus(3, seed=1), list[str])
    assert_type(TOKENIZER_KINDS[0], str)
    tokenizer = tiny_tokenizer("byte_bpe")
    model = tiny_model(tokenizer, architecture="roberta", seed=1)
    assert_type(model, PreTrainedModel)
    assert_type(tiny_rows(tokenizer, ["a film"]), list[dict[str, list[int]]])
    collator = WholeWordMaskingCollator(tokenizer, seed=0)
    collator(tiny_rows(tokenizer, 4, seed=1))
    features = [{"input_ids": [2, 7, 3], "word_ids": [None, 0, None]}]
    batch = collator(features)
    assert_whole_words_masked(batch, features, tokenizer=tokenizer)
    assert_masks_reproducible(collator, features, num_workers=1, tokenizer=tokenizer)
    assert_masks_reproducible(DataCollatorForLanguageModeling(tokenizer), features)
    columns = {"input_ids": [[2, 7, 3]]}
    assert_tokens_kept(
        columns, group_texts(columns, chunk_size=2), max_dropped=1, tokenizer=tokenizer
    )
    assert_tokens_kept(rows, features)
    assert_documents_kept(rows, pack_texts(columns), tokenizer=tokenizer)

    def compute_loss(
        model: PreTrainedModel, batch: dict[str, torch.Tensor], num_items_in_batch: int
    ) -> torch.Tensor:
        return masked_lm_loss(model(**batch), batch["labels"], num_items_in_batch)

    assert_same_loss(compute_loss, model, batch, gradients=False, rtol=1e-3, atol=1e-5)
    assert_resumes_exactly(own_training, at_step=3, by="SIGTERM", ignore=["loss"], timeout=60)
