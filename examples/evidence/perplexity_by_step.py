"""How far does the recipe's own loop get in as many steps, and in as much time?"""

from __future__ import annotations

import math
import statistics
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import _study as study
import torch
from accelerate import Accelerator
from datasets import Dataset
from matplotlib import rc_context
from matplotlib.figure import Figure
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForMaskedLM,
    AutoTokenizer,
    default_data_collator,
    get_scheduler,
    set_seed,
)

from mlmadapt import TrainingConfig, accelerate_train, evaluate_mlm

# The recipe's collator stands with the benchmarks, which measure it, too.
sys.path.append(str(Path(__file__).parents[2] / "tests" / "benchmarks"))
from _recipe import whole_word_masking

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PICTURE = "perplexity_by_step.svg"
POINTS = 5  # at which a run is measured, beside its start


@dataclass
class Course:
    """Weights at some steps of a run, and the seconds of training up to there."""

    steps: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    weights: list[dict[str, torch.Tensor]] = field(default_factory=list)
    perplexities: list[float] = field(default_factory=list)
    own: float = math.nan  # the last perplexity, by the recipe's own evaluation


def main() -> None:
    """Run the recipe, ours for as many steps, and ours for as long, seed by seed."""
    args = study.make_parser(__doc__).parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.data / study.MODEL)
    train, held_out = study.read_documents(args.data / "imdb")
    train, held_out = [*train][: args.train_rows], [*held_out][: args.held_out_rows]
    rows = study.cut(train, tokenizer, rows=args.train_rows)
    recipe_rows = cut_as_recipe(train, tokenizer, rows=args.train_rows)
    if rows["input_ids"] != recipe_rows["input_ids"]:
        sys.exit("The recipe's rows hold other tokens than ours: it would not be the same race.")
    frozen = study.freeze(study.cut(held_out, tokenizer, rows=args.held_out_rows), tokenizer)
    steps = study.count_steps(args, rows)
    study.begin(
        "Perplexity by step, beside the recipe",
        f"""
        The recipe's own loop (chapter 7.3 of the Hugging Face course: its chunks, its whole-word
        collator, AdamW, `outputs.loss`), and `accelerate_train` from the same weights on the same
        rows: for as many steps, and for as long as the recipe took.

        - {study.tell_training(args, rows)}; {study.MASKED:.0%} of words masked. Ours clips
          gradients at 1, as it does by default; the recipe does not.
        - Exact perplexity (`evaluate_mlm`) on one frozen set, {len(frozen):,} rows of IMDb test;
          seconds are those from the loaded model to the end of the step, without evaluation.
        - {study.tell_spread(args)}
        """,
    )
    courses: dict[str, list[Course]] = {
        "recipe": [],
        "ours, equal steps": [],
        "ours, equal time": [],
    }
    for seed in args.seeds:
        recipe = run_recipe(args, recipe_rows, frozen, tokenizer, steps=steps, seed=seed)
        equal = run_ours(args, rows, tokenizer, steps=steps, seed=seed)
        longer = max(round(steps * recipe.seconds[-1] / equal.seconds[-1]), 1)
        longest = run_ours(args, rows, tokenizer, steps=longer, seed=seed)
        for each, course in zip(courses.values(), (recipe, equal, longest), strict=True):
            measure(args, course, frozen, tokenizer)
            each.append(course)

    study.show_table(
        (
            "perplexity after",
            "0 steps",
            *(f"{n / POINTS:.0%} of them" for n in range(1, POINTS + 1)),
        ),
        [
            (name, *map(study.spread, zip(*(course.perplexities for course in each), strict=True)))
            for name, each in courses.items()
        ],
    )
    study.show_table(
        ("whole run", "steps", "seconds", "perplexity", "by the recipe's evaluation"),
        [
            (
                name,
                study.spread([course.steps[-1] for course in each], 0),
                study.spread([course.seconds[-1] for course in each]),
                study.spread([course.perplexities[-1] for course in each], 2),
                study.spread([c.own for c in each], 2) if name == "recipe" else "",
            )
            for name, each in courses.items()
        ],
    )
    draw(args.pictures / PICTURE, courses)
    print(f":::{{container}} picture\n```{{raw}} html\n:file: pictures/{PICTURE}\n```\n:::\n")
    names = ("steps", "seconds", "perplexities", "own")
    study.save(
        args,
        "perplexity_by_step",
        {
            contender: [{name: getattr(course, name) for name in names} for course in each]
            for contender, each in courses.items()
        },
    )


@contextmanager
def watch(model: PreTrainedModel, *, steps: int) -> Iterator[Course]:
    """Copy the weights now and then; the clock stops meanwhile, for either loop the same."""
    course = Course()
    marks = {round(steps * n / POINTS) for n in range(1, POINTS + 1)}
    step, paused, started = 0, 0.0, time.perf_counter()

    def note(*_: object) -> None:
        nonlocal step, paused
        now = time.perf_counter()
        if step in {0, *marks}:
            course.steps.append(step)
            course.seconds.append(now - started - paused if step else 0.0)
            course.weights.append({n: v.detach().clone() for n, v in model.state_dict().items()})
        step += 1
        paused += time.perf_counter() - now

    note()
    handle = register_optimizer_step_post_hook(note)
    try:
        yield course
    finally:
        handle.remove()


def measure(
    args: argparse.Namespace, course: Course, frozen: Dataset, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Measure what was copied."""
    model = AutoModelForMaskedLM.from_pretrained(args.data / study.MODEL)
    for weights in course.weights:
        model.load_state_dict(weights)
        metrics = evaluate_mlm(model, frozen, tokenizer=tokenizer)
        course.perplexities.append(metrics.perplexity)
    course.weights.clear()


def run_ours(
    args: argparse.Namespace,
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    steps: int,
    seed: int,
) -> Course:
    """Train by `accelerate_train`."""
    model = AutoModelForMaskedLM.from_pretrained(args.data / study.MODEL)
    rows, collator = study.fit(rows, tokenizer, "words", seed=seed)
    with tempfile.TemporaryDirectory() as folder, watch(model, steps=steps) as course:
        accelerate_train(
            model,
            rows,
            tokenizer=tokenizer,
            data_collator=collator,
            config=TrainingConfig(
                output_dir=folder,
                max_steps=steps,
                per_device_train_batch_size=study.BATCH,
                seed=seed,
                save_strategy="no",
                disable_tqdm=True,
            ),
        )
    return course


def run_recipe(
    args: argparse.Namespace,
    rows: Dataset,
    frozen: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    steps: int,
    seed: int,
) -> Course:
    """Train and evaluate as the recipe's last section does."""
    set_seed(seed)
    model = AutoModelForMaskedLM.from_pretrained(args.data / study.MODEL)
    with watch(model, steps=steps) as course:
        loader = DataLoader(
            rows,
            shuffle=True,
            batch_size=study.BATCH,
            collate_fn=lambda features: whole_word_masking(features, tokenizer, study.MASKED),
        )
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5)
        accelerator = Accelerator()
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        scheduler = get_scheduler(
            "linear", optimizer=optimizer, num_warmup_steps=0, num_training_steps=steps
        )
        done = 0
        while done < steps:
            model.train()
            for batch in loader:
                loss = model(**batch).loss
                accelerator.backward(loss)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
                done += 1
                if done == steps:
                    break

    frozen = frozen.rename_columns({n: n.removeprefix("masked_") for n in frozen.column_names})
    model.eval()
    losses = []
    for batch in DataLoader(frozen, batch_size=study.BATCH, collate_fn=default_data_collator):
        with torch.no_grad():
            loss = model(**batch).loss
        losses.append(accelerator.gather(loss.repeat(study.BATCH)))
    course.own = math.exp(torch.cat(losses)[: len(frozen)].mean())
    return course


def cut_as_recipe(texts: list[str], tokenizer: PreTrainedTokenizerBase, *, rows: int) -> Dataset:
    """Tokenize and chunk as the recipe does, quadratic sums and all."""

    def tokenize_function(examples: dict[str, Any]) -> dict[str, Any]:
        result = tokenizer(examples["text"], verbose=False)
        result["word_ids"] = [result.word_ids(i) for i in range(len(result["input_ids"]))]
        return result

    def group_texts(examples: dict[str, Any]) -> dict[str, Any]:
        joined = {k: sum(examples[k], []) for k in examples}  # noqa: RUF017 (as it does)
        total = len(joined["input_ids"]) // study.CHUNK * study.CHUNK
        result = {
            k: [t[i : i + study.CHUNK] for i in range(0, total, study.CHUNK)]
            for k, t in joined.items()
        }
        result["labels"] = result["input_ids"].copy()
        return result

    documents = Dataset.from_dict({"text": texts})
    chunks = documents.map(tokenize_function, batched=True, remove_columns="text").map(
        group_texts, batched=True
    )
    return chunks.select(range(min(rows, len(chunks))))


def draw(path: Path, courses: dict[str, list[Course]]) -> None:
    """Draw perplexity by step and by time, in the color of the page it stands on."""
    ink = "#123456"  # a color that nothing else has
    text = {"svg.fonttype": "none", "svg.hashsalt": path.name, "font.family": "sans-serif"}
    lines = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor"), ink)
    with rc_context(text | lines | {"xtick.color": ink, "ytick.color": ink}):
        figure = Figure(figsize=(8, 3.4), layout="constrained")
        plots = figure.subplots(1, 2, sharey=True)
        for axes, measure_of, label in zip(
            plots, ("steps", "seconds"), ("optimizer step", "seconds of training"), strict=True
        ):
            for (name, each), color in zip(
                courses.items(), ("#c2410c", "#3b82f6", "#0d9488"), strict=True
            ):
                for course in each:
                    axes.plot(
                        getattr(course, measure_of),
                        course.perplexities,
                        color=color,
                        alpha=0.35,
                        lw=1,
                    )
                axes.plot(
                    [
                        *map(
                            statistics.mean,
                            zip(*(getattr(c, measure_of) for c in each), strict=True),
                        )
                    ],
                    [*map(statistics.mean, zip(*(c.perplexities for c in each), strict=True))],
                    color=color,
                    marker="o",
                    ms=4,
                    label=name,
                )
            axes.set_xlabel(label)
            axes.grid(color="#888888", alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
        plots[0].set_ylabel("perplexity, held out")
        plots[1].legend(frameon=False)
        figure.savefig(path, transparent=True, metadata={"Date": None, "Creator": None})
    picture = path.read_text(encoding="utf-8").replace(ink, "currentColor")
    path.write_text(picture[picture.index("<svg") :], encoding="utf-8")


if __name__ == "__main__":
    main()
