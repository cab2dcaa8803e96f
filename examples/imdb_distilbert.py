"""Adapt a masked language model to a domain: the well-known recipe, DistilBERT to film reviews.

    python examples/imdb_distilbert.py                                 # the recipe, from the hub
    python examples/imdb_distilbert.py --model FOLDER --dataset FILE   # your own model and text
    python examples/imdb_distilbert.py --loop trainer --masking token  # its other loop and masking
    python examples/imdb_distilbert.py --rows packed                   # short documents, each alone
    python examples/imdb_distilbert.py --demo                          # no download, 3 minutes
    accelerate launch examples/imdb_distilbert.py                      # on all devices

The fields of `Arguments` and of `TrainingConfig` are the options.
"""

from __future__ import annotations

import logging
import ssl
import sys
import tempfile
import textwrap
import time
import urllib.error
import urllib.request
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import datasets
import huggingface_hub
import pyarrow.compute as pc
import torch
import transformers
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from datasets import Dataset, load_dataset
from transformers import HfArgumentParser, Trainer, TrainingArguments, pipeline
from transformers.hf_argparser import HfArg

from mlmadapt import (
    MaskingCallback,
    TrainingConfig,
    WholeWordMaskingCollator,
    accelerate_train,
    evaluate_mlm,
    group_texts,
    insert_random_mask,
    isolate_documents,
    masked_lm_loss,
    pack_texts,
    show_masks,
    sparse_prediction,
    tokenize_with_word_ids,
)

if TYPE_CHECKING:
    from transformers import (
        FillMaskPipeline,
        PreTrainedModel,
        PreTrainedTokenizerBase,
    )


@dataclass
class Arguments:
    """What is adapted to what. `TrainingConfig` says how it is trained."""

    model: str = HfArg(
        default="distilbert/distilbert-base-uncased",
        help="The model and tokenizer: a name on the hub, or a folder.",
    )
    dataset: str = HfArg(
        default="stanfordnlp/imdb",
        help="The documents: a name on the hub, a folder, or a parquet, csv, json or txt file "
        "(each line of a txt file is a document).",
    )
    text_column: str = HfArg(default="text", help="The column with the documents.")
    chunk_size: int = HfArg(default=128, help="Tokens per row.")
    rows: Literal["grouped", "packed"] = HfArg(
        default="grouped",
        help="Join all documents and cut them, or lay whole ones side by side, each of which sees "
        "itself alone: for documents shorter than a row.",
    )
    train_size: int = HfArg(default=10_000, help="Rows to train on, at most.")
    test_size: int = HfArg(default=1_000, help="Held-out rows to evaluate on, at most.")
    masking: Literal["whole-word", "token"] = HfArg(
        default="whole-word",
        help="The recipe's 20 %% of words, always masked, or its 15 %% of tokens, 80/10/10.",
    )
    loop: Literal["accelerate", "trainer"] = HfArg(
        default="accelerate", help="Train with accelerate_train, or with transformers' Trainer."
    )
    sentence: str = HfArg(
        default="This is a great [MASK].", help="A sentence to fill in before and after."
    )
    demo: bool = HfArg(
        default=False,
        help="Make a tiny model on the spot and adapt it to Python's documentation, without a "
        "download, in under three minutes.",
    )


def main() -> None:
    """Tell the story from the first fill-mask to the last."""
    args, config = parse_arguments()
    # The first PartialState decides on the device, and does not read this variable by itself.
    PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
    transformers.set_seed(config.seed)
    # No progress bars for short work, and no log of dropped tokens: they are counted below.
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("mlmadapt.data.chunking").setLevel(logging.ERROR)

    if args.demo:
        import demo_corpus  # noqa: PLC0415  # beside this file, which goes without it

        datasets.disable_progress_bars()
        model, tokenizer, documents, general = demo_corpus.starting_point(config, args.chunk_size)
    else:
        # The first process downloads and maps, the others find it all in the cache.
        with PartialState().main_process_first():
            trust_cache_if_hub_is_silent(args.model, args.dataset)
            model, tokenizer = load_model(args.model)
            documents = load_documents(args.dataset, args.text_column)

    title("The model before")
    show_parameters(model)
    show_fill_mask(pipeline("fill-mask", model=model, tokenizer=tokenizer), args.sentence)

    title("The text")
    with PartialState().main_process_first():
        # Split first, then cut: if rows were split at random, half would share a document with the
        # other side.
        share = args.test_size / (args.train_size + args.test_size)
        parts = documents.train_test_split(test_size=share, seed=config.seed)
        train_rows = cut_into_rows("training", parts["train"], args.train_size, tokenizer, args)
        test_rows = cut_into_rows("held out", parts["test"], args.test_size, tokenizer, args)
        collator = make_collator(args.masking, tokenizer, seed=config.seed)
        # These masks do not depend on the seed of the run: all perplexities can be compared.
        frozen = test_rows.map(
            insert_random_mask,
            batched=True,
            fn_kwargs={"data_collator": collator},
            remove_columns=test_rows.column_names,
            desc="freezing masks",
        )
    say("  a held-out row, {as it is -> as the model sees it}:")
    say(textwrap.indent(str(show_masks(frozen[:1], tokenizer)), "  "))
    if args.demo:
        gaps = demo_corpus.choose_gaps(
            parts["test"]["text"][:],
            demo_corpus.find_domain_words(parts["train"]["text"][:], general),
            tokenizer,
        )
        guesses = demo_corpus.fill_gaps(gaps, model, tokenizer)

    title(f"Training: {args.masking} masking, {args.loop} loop")
    if args.loop == "accelerate":
        history = accelerate_train(
            model, train_rows, frozen, tokenizer=tokenizer, data_collator=collator, config=config
        ).history
    else:
        history = train_with_trainer(model, train_rows, frozen, tokenizer, collator, config)
    show_history(history)

    if PartialState().is_main_process:
        title("The model after")
        fill = pipeline("fill-mask", model=config.output_dir)
        show_fill_mask(fill, args.sentence)
        if args.demo:
            demo_corpus.show_gaps(gaps, guesses, demo_corpus.fill_gaps(gaps, fill.model, tokenizer))
        say(f'\n  Yours from now on: pipeline("fill-mask", model="{config.output_dir}")')
        if args.loop == "accelerate":
            say(
                f"  Its card, with curves if matplotlib is installed: {config.output_dir}/README.md"
            )
        if args.demo:
            say("  Next, adapt it to your own text, with one document per line or row:")
            say(f"  python {sys.argv[0]} --dataset FILE --text_column COLUMN --output_dir FOLDER")

    leave_group()


def parse_arguments() -> tuple[Arguments, TrainingConfig]:
    """Read the command line; some defaults depend on --loop and --demo."""
    parser = HfArgumentParser(
        (Arguments, TrainingConfig),
        usage="%(prog)s [options]  (--help describes them)",
        description=__doc__.partition("\n")[0],
    )
    parser.set_defaults(output_dir="adapted-model")
    chosen, _ = parser.parse_known_args()
    if chosen.loop == "trainer":
        parser.set_defaults(learning_rate=2e-5, weight_decay=0.01)  # the recipe's
    if chosen.demo:
        from demo_corpus import DEFAULTS  # noqa: PLC0415  # as in main

        parser.set_defaults(**DEFAULTS, output_dir=tempfile.mkdtemp(prefix="mlmadapt-demo-"))
    try:
        args, config = parser.parse_args_into_dataclasses()
    except ValueError as error:  # TrainingConfig checks its values
        parser.error(str(error))
    for name in ("chunk_size", "train_size", "test_size"):
        if getattr(args, name) < 1:
            parser.error(f"{name} is {getattr(args, name)}; it must be 1 or more")
    if (args.rows, args.masking) == ("packed", "token"):
        parser.error(
            "rows packed takes masking whole-word: transformers' collator keeps no documents"
        )
    folder = Path(config.output_dir)
    known = config.overwrite or config.resume_from_checkpoint
    # A run that failed early leaves a lock and nothing to lose.
    if not known and folder.is_dir() and any(path.name != ".lock" for path in folder.iterdir()):
        parser.error(
            f"output_dir {config.output_dir!r} holds files of another run; name another folder by "
            "--output_dir, go on with --resume_from_checkpoint True, or train over it with "
            "--overwrite"
        )
    # The model card tells this, beside what the run knows about itself.
    sentences = config.fill_mask or [args.sentence]
    name = config.dataset_name or ("Python's documentation" if args.demo else args.dataset)
    return args, replace(config, fill_mask=sentences, dataset_name=name)


def trust_cache_if_hub_is_silent(*sources: str) -> None:
    """Ask the hub once, with little patience: left alone, each file of it is retried for 23 s."""
    if all(Path(source).exists() for source in sources) or huggingface_hub.is_offline_mode():
        return
    try:
        urllib.request.urlopen(huggingface_hub.constants.ENDPOINT, timeout=5).close()  # noqa: S310
    except urllib.error.HTTPError:
        pass  # an answer all the same
    except OSError as error:
        # A certificate that Python does not know is an answer, too.
        if not isinstance(getattr(error, "reason", None), ssl.SSLError):
            huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True


def load_model(source: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load model and tokenizer from a folder or the hub."""
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source)
        return transformers.AutoModelForMaskedLM.from_pretrained(source), tokenizer
    except (OSError, ValueError) as error:
        give_up("model", source, error)


def load_documents(source: str, text_column: str) -> Dataset:
    """Load the documents, each distinct one once, from files or the hub."""
    formats = {"txt": "text", "csv": "csv", "json": "json", "jsonl": "json", "parquet": "parquet"}
    builder = formats.get(Path(source).suffix[1:])
    try:
        if builder is None:
            loaded = load_dataset(source, split="train")
        else:
            loaded = load_dataset(builder, data_files=source, split="train")
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        give_up("dataset", source, error)
    if text_column not in loaded.column_names:
        sys.exit(
            f"text_column is {text_column!r}, but {source!r} has the columns "
            f"{loaded.column_names}: name the one with the documents by --text_column."
        )
    # A document that occurs twice could end up on both sides of the split.
    rows: dict[str, int] = {}
    empty = 0
    for row, text in enumerate(loaded[text_column]):
        if not isinstance(text, str | None):
            sys.exit(
                f"row {row} of {text_column!r} in {source!r} is {text!r:.40}, which is not a text."
            )
        if text and text.strip():
            rows.setdefault(text, row)
        else:
            empty += 1
    if len(rows) < len(loaded):
        say(
            f"  of {len(loaded):,} documents, {empty:,} without a text and "
            f"{len(loaded) - len(rows) - empty:,} that repeat another are left out"
        )
    if len(rows) < 2:
        sys.exit(
            f"dataset {source!r} has {len(rows)} distinct document(s); a split takes 2 or more."
        )
    return loaded.select(rows.values())


def give_up(option: str, source: str, error: Exception) -> NoReturn:
    """End in one sentence."""
    if huggingface_hub.is_offline_mode() and not Path(source).exists():
        sys.exit(
            f"{option} {source!r} is neither a local path nor in the cache, and the Hugging Face "
            "hub cannot be reached: name local files (--model FOLDER --dataset FILE), or run "
            "--demo, which downloads nothing."
        )
    reason = str(error).partition("\n")[0].rstrip(".")
    sys.exit(f"{option} {source!r} cannot be loaded: {reason}.")


def cut_into_rows(
    name: str, documents: Dataset, size: int, tokenizer: PreTrainedTokenizerBase, args: Arguments
) -> Dataset:
    """Tokenize documents, cut them into rows, and account for every token."""
    # In Arrow's format, where chunking moves no token.
    tokens = documents.with_format("arrow").map(
        tokenize_with_word_ids,
        batched=True,
        fn_kwargs={"tokenizer": tokenizer, "text_column": args.text_column},
        remove_columns=documents.column_names,
        desc="tokenizing",
    )
    if args.rows == "packed":
        rows = tokens.map(
            pack_texts,
            batched=True,
            batch_size=None,
            fn_kwargs={"chunk_size": args.chunk_size},
            desc="packing",
        )
    else:
        rows = tokens.map(
            group_texts,
            batched=True,
            fn_kwargs={"chunk_size": args.chunk_size, "labels": False},
            desc="chunking",
        )
    total, kept = (
        pc.sum(pc.list_value_length(each[:]["input_ids"])).as_py() or 0 for each in (tokens, rows)
    )
    rows = rows.with_format(None)
    used = rows.select(range(min(size, len(rows))))
    say(
        f"  {name}: {len(documents):,} documents, {total:,} tokens in, {kept:,} kept, "
        f"{total - kept:,} dropped;\n  {' ' * len(name)}  {len(rows):,} rows of {args.chunk_size}, "
        f"{len(used):,} of them used"
    )
    if not kept:
        sys.exit("That makes no row: take more text or a smaller --chunk_size.")
    return used.remove_columns("word_ids") if args.masking == "token" else used


def make_collator(masking: str, tokenizer: PreTrainedTokenizerBase, *, seed: int) -> Any:
    """Return the recipe's: 20 % of words, always masked; or 15 % of tokens, 80/10/10."""
    if masking == "whole-word":
        return WholeWordMaskingCollator(tokenizer, wwm_probability=0.2, seed=seed)
    return transformers.DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15, seed=seed)


def train_with_trainer(
    model: PreTrainedModel,
    train_rows: Dataset,
    frozen: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    collator: Any,
    config: TrainingConfig,
) -> list[dict[str, float]]:
    """Train with `Trainer`, with loss, masks and evaluation as exact as in `accelerate_train`."""
    known = {option.name for option in fields(TrainingArguments)}
    precision = config.mixed_precision or ("fp16" if torch.cuda.is_available() else "no")
    arguments = TrainingArguments(
        # The names are the same. What is off goes unsaid: saying so of a renamed one warns.
        **{n: v for n, v in asdict(config).items() if n in known and v is not False},
        fp16=precision == "fp16",
        bf16=precision == "bf16",
        eval_on_start=True,
        logging_strategy=config.eval_strategy,
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,  # or the collator never sees the word_ids
    )
    # Trainer gives the labels either to the model, for sparse_prediction, or to a loss function.
    # Without the latter it weighs batches, not tokens, as soon as several make a step.
    several = arguments.gradient_accumulation_steps * max(arguments.world_size, arguments.n_gpu) > 1
    # A collator with a seed has to be told the epoch.
    is_ours = isinstance(collator, WholeWordMaskingCollator)
    callbacks = [MaskingCallback(collator)] if is_ours else []
    trainer = ExactTrainer(
        model,
        arguments,
        data_collator=collator,
        train_dataset=train_rows,
        eval_dataset=frozen,
        processing_class=tokenizer,
        compute_loss_func=masked_lm_loss if several else None,
        callbacks=callbacks,
    )
    is_packed = "document_ids" in train_rows.column_names
    with (
        isolate_documents(model) if is_packed else nullcontext(),
        nullcontext() if several else sparse_prediction(model),
    ):
        trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
    trainer.save_model()
    return trainer.state.log_history


class ExactTrainer(Trainer):
    """Evaluates the same frozen rows token by token: `Trainer` takes a mean of batch means."""

    def evaluate(self, *_args: Any, **_kwargs: Any) -> dict[str, float]:
        """Evaluate, and log as `Trainer` does."""
        metrics = evaluate_mlm(
            self.model,
            self.eval_dataset,
            tokenizer=self.processing_class,
            batch_size=self.args.per_device_eval_batch_size,
            accelerator=self.accelerator,
        )
        logs = {f"eval_{name}": value for name, value in asdict(metrics).items()}
        self.log(logs)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, logs)
        return logs


def say(text: object) -> None:
    """Print once, whatever the number of processes."""
    PartialState().print(text)


def title(text: str) -> None:
    """Begin a section."""
    say(f"\n{text}\n{'-' * len(text)}")


def leave_group() -> None:
    """End as one of several: in the group, or right after a collective, Python may abort."""
    time.sleep(0.2)
    PartialState().destroy_process_group()


def show_parameters(model: PreTrainedModel) -> None:
    """Show the number of parameters, and the share of the vocabulary."""
    total, matrix = model.num_parameters(), model.get_output_embeddings().weight
    say(f"  {type(model).__name__}, {total:,} parameters")
    say(f"  {matrix.numel() / total:.0%} of them the head's matrix over {len(matrix):,} words")


def show_fill_mask(fill: FillMaskPipeline, sentence: str) -> None:
    """Show the five likeliest fillings of a sentence."""
    guesses = fill(sentence.replace("[MASK]", fill.tokenizer.mask_token), top_k=5)
    words = [f"{guess['token_str'].strip()} {guess['score']:.1%}" for guess in guesses]
    say(f"  {sentence}\n    {', '.join(words)}")


def show_history(history: list[dict[str, float]]) -> None:
    """Show what was measured on the held-out rows, and the training loss up to there."""
    say("  on held-out rows   perplexity   right   among five   training loss")
    loss = ""
    for entry in history:
        loss = f"{entry['loss']:.3f}" if "loss" in entry else loss
        if "eval_perplexity" in entry:
            say(
                f"  after {entry['epoch']:5.2f} epochs {entry['eval_perplexity']:12.2f}"
                f"{entry['eval_accuracy']:8.1%}{entry['eval_top5_accuracy']:13.1%}{loss:>16}"
            )


if __name__ == "__main__":
    main()
