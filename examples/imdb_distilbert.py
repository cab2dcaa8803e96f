"""Adapt DistilBERT to film reviews, or any masked language model to any text.

    python examples/imdb_distilbert.py                      # the recipe, from the hub
    python examples/imdb_distilbert.py --demo               # no download, under three minutes
    python examples/imdb_distilbert.py --model path/to/model --dataset reviews.csv

Also under ``torchrun`` and ``accelerate launch``. Everything but printing is done by functions that
can be imported from mlmadapt.
"""

import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import datasets
import torch
from accelerate import PartialState
from datasets import Dataset, DatasetDict, load_dataset
from transformers import (
    AutoModelForMaskedLM,
    AutoTokenizer,
    BertConfig,
    DataCollatorForLanguageModeling,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    pipeline,
    set_seed,
)
from transformers.utils import logging as transformers_logging

from mlmadapt import (
    MaskedLMMetrics,
    TrainingConfig,
    WholeWordMaskingCollator,
    accelerate_train,
    evaluate_mlm,
    group_texts,
    insert_random_mask,
    sparse_prediction,
    tokenize_with_word_ids,
)


@dataclass
class Arguments:
    """What is adapted to what; the settings of the training come after these."""

    model: str = "distilbert/distilbert-base-uncased"  # a name on the hub or a folder
    dataset: str = (
        "stanfordnlp/imdb"  # a name on the hub, a folder, or a parquet, csv, json or text file
    )
    text_column: str = "text"
    chunk_size: int = 128  # tokens a row
    train_size: int = 10_000  # rows
    test_size: int = 1_000
    masking: Literal["whole-word", "token"] = "whole-word"
    loop: Literal["accelerate", "trainer"] = "accelerate"
    probe: str = "This is a great [MASK]."
    demo: bool = False
    general_steps: int = 600  # --demo: steps on general text before adapting


def main() -> None:
    """Read the options and run the recipe or the demonstration."""
    parser = HfArgumentParser((Arguments, TrainingConfig), description=__doc__)
    parser.set_defaults(output_dir="adapted-model")
    arguments, _ = parser.parse_args_into_dataclasses()
    if arguments.loop == "trainer":  # the recipe's settings for it
        parser.set_defaults(learning_rate=2e-5, weight_decay=0.01)
    if arguments.demo:
        parser.set_defaults(chunk_size=64, learning_rate=2e-3, warmup_steps=0.1, max_steps=300)
        parser.set_defaults(output_dir=tempfile.mkdtemp(prefix="mlmadapt-demo-"), overwrite=True)
        datasets.disable_progress_bars()
    arguments, config = parser.parse_args_into_dataclasses()
    transformers_logging.disable_progress_bar()
    set_seed(config.seed)
    if arguments.demo:
        run_demo(arguments, config)
    else:
        run_recipe(arguments, config)


def run_recipe(arguments: Arguments, config: TrainingConfig) -> None:
    """Load, tokenize, chunk, freeze, train, look."""
    say = PartialState().print
    model, tokenizer, documents = load(arguments)
    head = model.get_output_embeddings().weight.numel()
    say(
        f"\n{arguments.model}: {model.num_parameters() / 1e6:.1f} M parameters, "
        f"{head / 1e6:.1f} M of them in the vocabulary matrix"
    )
    probe = arguments.probe.replace("[MASK]", tokenizer.mask_token)
    say(f"before: {fill_mask(model, tokenizer, probe)}")

    with PartialState().main_process_first():
        # By document, before chunking: chunks of one review must not land on both sides.
        split = documents.train_test_split(test_size=0.1, seed=config.seed)
        chunks = make_chunks(split, tokenizer, arguments.text_column, arguments.chunk_size, say)
        for name, size in (("train", arguments.train_size), ("test", arguments.test_size)):
            chunks[name] = chunks[name].select(range(min(size, len(chunks[name]))))
        collator = make_collator(arguments, tokenizer)
        frozen = freeze(chunks["test"], collator)
    say(f"{len(chunks['train']):,} rows to train on, {len(frozen):,} to evaluate, masks frozen\n")

    train = train_with_accelerate if arguments.loop == "accelerate" else train_with_trainer
    train(model, chunks["train"], frozen, tokenizer, collator, config)
    if PartialState().is_main_process:
        # As anyone would load it later.
        say(f"after:  {fill_mask(config.output_dir, None, probe)}")
        say(
            f"\nThe model is in {config.output_dir}: "
            f'pipeline("fill-mask", model="{config.output_dir}")'
        )


def load(arguments: Arguments) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Dataset]:
    """Load model, tokenizer and documents from the hub or from files."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(arguments.model)
        model = AutoModelForMaskedLM.from_pretrained(arguments.model)
        documents = load_documents(arguments.dataset)
    except OSError as error:  # what the Hugging Face libraries raise for a name they cannot reach
        if all(Path(name).exists() for name in (arguments.model, arguments.dataset)):
            raise
        sys.exit(
            f"{arguments.model!r} and {arguments.dataset!r} are not both files here, and the "
            "Hugging Face hub cannot be reached or does not have them "
            f"({type(error).__name__}): name local ones with --model FOLDER and --dataset FILE, or "
            "run with --demo, which downloads nothing."
        )
    if arguments.text_column not in documents.column_names:
        sys.exit(
            f"{arguments.dataset!r} has the columns {documents.column_names}; name the one with "
            "the text with --text_column."
        )
    return model, tokenizer, documents.select_columns(arguments.text_column)


def load_documents(name: str) -> Dataset:
    """Load a dataset by its name on the hub, a folder, or a file by its ending."""
    kinds = {
        ".parquet": "parquet",
        ".csv": "csv",
        ".json": "json",
        ".jsonl": "json",
        ".txt": "text",
    }
    kind = kinds.get(Path(name).suffix)
    if kind is not None:
        return load_dataset(kind, data_files=name, split="train")
    return load_dataset(name, split="train")


def make_chunks(
    split: DatasetDict,
    tokenizer: PreTrainedTokenizerBase,
    text_column: str,
    chunk_size: int,
    say: Any,
) -> DatasetDict:
    """Tokenize and chunk, and say what became of the tokens."""
    tokens = split.with_format("arrow").map(
        tokenize_with_word_ids,
        batched=True,
        fn_kwargs={"tokenizer": tokenizer, "text_column": text_column},
        remove_columns=split["train"].column_names,
        desc="tokenizing",
    )
    chunks = tokens.map(
        group_texts,
        batched=True,
        batch_size=None,
        fn_kwargs={"chunk_size": chunk_size, "labels": False},
        desc="chunking",
    )
    for name in split:
        total = sum(len(row) for row in tokens[name][:]["input_ids"])
        kept = chunk_size * len(chunks[name])
        say(f"{name}: {len(split[name]):,} documents, {total:,} tokens, {total - kept} dropped")
    return chunks.with_format(None)


def make_collator(arguments: Arguments, tokenizer: PreTrainedTokenizerBase) -> Any:
    """Return ours for whole words and transformers' for tokens, at the recipe's rates."""
    if arguments.masking == "whole-word":
        return WholeWordMaskingCollator(tokenizer, wwm_probability=0.2)
    return DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15)


def freeze(rows: Dataset, collator: Any) -> Dataset:
    """Mask the evaluation rows once."""
    return rows.map(
        insert_random_mask,
        batched=True,
        fn_kwargs={"data_collator": collator},
        remove_columns=rows.column_names,
        desc="freezing masks",
    )


def train_with_accelerate(
    model: PreTrainedModel,
    rows: Dataset,
    frozen: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    collator: Any,
    config: TrainingConfig,
) -> None:
    """Train with the library's loop and print its evaluations."""
    result = accelerate_train(
        model, rows, frozen, tokenizer=tokenizer, data_collator=collator, config=config
    )
    say = PartialState().print
    for entry in result.history:
        if "eval_loss" in entry:
            say(
                f"epoch {entry['epoch']:.1f}: perplexity {entry['eval_perplexity']:6.2f}, true "
                f"token among the first five {entry['eval_top5_accuracy']:.1%}"
            )
    say(f"{result.tokens_seen / result.seconds:,.0f} tokens a second, evaluation included")


def train_with_trainer(
    model: PreTrainedModel,
    rows: Dataset,
    frozen: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    collator: Any,
    config: TrainingConfig,
) -> None:
    """Train with `Trainer`, with an exact perplexity and the head on masked positions only."""

    def report(epoch: float) -> MaskedLMMetrics:
        metrics = evaluate_mlm(model, frozen, tokenizer=tokenizer)
        PartialState().print(f"epoch {epoch:.1f}: perplexity {metrics.perplexity:6.2f}")
        return metrics

    class EachEpoch(TrainerCallback):
        def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if isinstance(collator, WholeWordMaskingCollator):
                collator.set_epoch(int(state.epoch))

        def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            report(state.epoch)

    if not isinstance(collator, WholeWordMaskingCollator):
        rows = rows.remove_columns("word_ids")  # which transformers' collators cannot pad
    on_gpu = torch.cuda.is_available()
    settings = TrainingArguments(
        output_dir=config.output_dir,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        per_device_train_batch_size=config.per_device_train_batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        num_train_epochs=config.num_train_epochs,
        max_steps=config.max_steps,
        warmup_steps=config.warmup_steps,
        bf16=on_gpu and torch.cuda.is_bf16_supported(),
        fp16=on_gpu and not torch.cuda.is_bf16_supported(),
        save_strategy="epoch",
        save_total_limit=1,
        seed=config.seed,
        remove_unused_columns=False,  # word_ids are no input of the model, but of the collator
        disable_tqdm=config.disable_tqdm,
    )
    report(0)
    with sparse_prediction(model):
        trainer = Trainer(
            model,
            settings,
            data_collator=collator,
            train_dataset=rows,
            processing_class=tokenizer,
            callbacks=[EachEpoch()],
        )
        trainer.train()
    trainer.save_model()


def fill_mask(
    model: PreTrainedModel | str, tokenizer: PreTrainedTokenizerBase | None, text: str
) -> str:
    """Return the text and the five likeliest words for its mask."""
    guesses = pipeline("fill-mask", model=model, tokenizer=tokenizer, top_k=5)(text)
    words = ", ".join(f"{guess['token_str'].strip()} {guess['score']:.1%}" for guess in guesses)
    return f"{text}  ->  {words}"


def run_demo(arguments: Arguments, config: TrainingConfig) -> None:
    """Train a small BERT on general text, adapt it to the Python reference, and show the gain."""
    import demo_corpus  # noqa: PLC0415  # beside this file

    say = PartialState().print
    domain = demo_corpus.read_domain()
    general = demo_corpus.read_general(domain)
    say("\n1. Text that every CPython carries")
    for name, texts in (("general: docstrings", general), ("domain: language reference", domain)):
        say(
            f"   {name:<27} {len(texts):4} documents, {sum(len(t.split()) for t in texts):7,} words"
        )
    tokenizer = demo_corpus.train_tokenizer(general, vocab_size=5_000)
    column = arguments.text_column

    def chunk(texts: list[str]) -> DatasetDict:
        split = Dataset.from_dict({column: texts}).train_test_split(0.15, seed=config.seed)
        return make_chunks(
            split, tokenizer, column, arguments.chunk_size, lambda line: say("  ", line)
        )

    say(f"\n2. A BERT of 2 layers of 128, first on general text ({arguments.general_steps} steps)")
    model = AutoModelForMaskedLM.from_config(
        BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=512,
            # Too little is learned in two minutes to need dropout.
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )
    collator = make_collator(arguments, tokenizer)
    general_chunks = chunk(general)
    base = TrainingConfig(
        output_dir=str(Path(config.output_dir, "general")),
        overwrite=True,
        max_steps=arguments.general_steps,
        learning_rate=2e-3,
        warmup_steps=0.1,
        save_strategy="no",
        disable_tqdm=config.disable_tqdm,
    )
    accelerate_train(
        model, general_chunks["train"], tokenizer=tokenizer, data_collator=collator, config=base
    )

    say("\n3. Adapted to the language reference")
    # The same split as the chunks', whose held-out documents give the sentences to look at.
    held_out = Dataset.from_dict({column: domain}).train_test_split(0.15, seed=config.seed)["test"]
    domain_chunks = chunk(domain)
    frozen = {"domain": freeze(domain_chunks["test"], collator)}
    frozen["general"] = freeze(general_chunks["test"], collator)
    questions = ask_about(held_out[column], tokenizer, demo_corpus.split_sentences)
    answers = [look(model, tokenizer, question) for question in questions]
    result = accelerate_train(
        model,
        domain_chunks["train"],
        frozen,
        tokenizer=tokenizer,
        data_collator=collator,
        config=config,
    )

    say("\n4. On documents of the reference that it was not trained on")
    entries = {name: [e for e in result.history if f"eval_{name}_loss" in e] for name in frozen}
    say("                                     before     after")
    for name, label in (("domain", "perplexity, domain"), ("general", "perplexity, general text")):
        before, after = entries[name][0], entries[name][-1]
        key = f"eval_{name}_perplexity"
        say(f"   {label:<32}{before[key]:8.1f}  {after[key]:8.1f}")
    before, after = result.initial, result.final
    say(
        f"   {'true token in the top 5, domain':<32}{before.top5_accuracy:8.1%}  "
        f"{after.top5_accuracy:8.1%}"
    )
    for (text, word), (chance, top) in zip(questions, answers, strict=True):
        new_chance, new_top = look(model, tokenizer, (text, word))
        say(f"\n   {text}")
        say(f"     {word!r}: {chance:.1%} -> {new_chance:.1%}")
        say(f"     before  {', '.join(top)}\n     after   {', '.join(new_top)}")
    say(
        "\nYour own text, one document a line:\n"
        f"   python {os.path.relpath(__file__)} --model MODEL --dataset my_texts.txt"
    )


def ask_about(
    texts: list[str], tokenizer: PreTrainedTokenizerBase, split_sentences: Any
) -> list[tuple[str, str]]:
    """Return five held-out sentences with their longest word masked, one a document, unpicked."""
    questions = []
    for text in sorted(texts):
        for sentence in split_sentences(text):
            words = [word for word in sentence.split() if word.islower() and word.isalpha()]
            known = [word for word in words if len(tokenizer.tokenize(word)) == 1]
            if 8 <= len(sentence.split()) <= 14 and known:
                word = max(known, key=len)
                questions.append((sentence.replace(word, tokenizer.mask_token, 1), word))
                break
    return questions[:: max(len(questions) // 5, 1)][:5]


def look(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, question: tuple[str, str]
) -> tuple[float, list[str]]:
    """Return the probability of the true word and the five likeliest ones."""
    text, word = question
    inputs = tokenizer(text, return_tensors="pt").to(model.device)
    with torch.no_grad():
        logits = model.eval()(**inputs).logits[inputs["input_ids"] == tokenizer.mask_token_id][0]
    chances = logits.softmax(-1)
    top = chances.topk(5).indices.tolist()
    return float(chances[tokenizer.convert_tokens_to_ids(word)]), tokenizer.convert_ids_to_tokens(
        top
    )


if __name__ == "__main__":
    main()
