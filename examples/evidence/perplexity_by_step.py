"""How far does the recipe's own loop get in as many steps, and in as much time?"""

from __future__ import annotations

import itertools
import math
import statistics
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

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

# The recipe's tokenizing, chunking and masking stand with the benchmarks, which measure them, too.
sys.path.append(str(Path(__file__).parents[2] / "tests" / "benchmarks"))
from _recipe import whole_word_masking
from chunking import group_by_sum
from tokenizing import tokenize_as_recipe

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator, Sequence

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PICTURE = "perplexity_by_step.svg"
POINTS = 5  # at which a run is measured, beside its start
STYLES = (("#c2410c", 4), ("#3b82f6", 1.5), ("#0d9488", 1.5))  # equal curves show, too


class Point(NamedTuple):
    """Where a run is at a step: CPU seconds of training up to there, and the weights."""

    step: int
    seconds: float
    weights: dict[str, torch.Tensor]


class Race(NamedTuple):
    """What both loops start from."""

    args: argparse.Namespace
    tokenizer: PreTrainedTokenizerBase
    frozen: Dataset

    def load(self) -> PreTrainedModel:
        """Load the weights from which all start."""
        return AutoModelForMaskedLM.from_pretrained(self.args.data / study.MODEL)

    def measure(self, points: Sequence[Point]) -> list[dict[str, float]]:
        """Measure the weights of each point."""
        model, figures = self.load(), []
        for step, seconds, weights in points:
            model.load_state_dict(weights)
            exact = evaluate_mlm(model, self.frozen, tokenizer=self.tokenizer).perplexity
            figures.append({"step": step, "seconds": seconds, "perplexity": exact})
        return figures

    def run_ours(self, rows: Dataset, *, steps: int, seed: int) -> list[dict[str, float]]:
        """Train by `accelerate_train`."""
        model = self.load()
        rows, collator = study.fit(rows, self.tokenizer, "words", seed=seed)
        with tempfile.TemporaryDirectory() as folder, watch(model, steps=steps) as points:
            config = TrainingConfig(
                output_dir=folder,
                max_steps=steps,
                per_device_train_batch_size=study.BATCH,
                seed=seed,
                save_strategy="no",
                disable_tqdm=True,
            )
            accelerate_train(
                model, rows, tokenizer=self.tokenizer, data_collator=collator, config=config
            )
        return self.measure(points)

    def run_recipe(self, rows: Dataset, *, steps: int, seed: int) -> list[dict[str, float]]:
        """Train and evaluate as the recipe's last section does."""
        set_seed(seed)
        model = self.load()
        with watch(model, steps=steps) as points:
            loader = DataLoader(
                rows,
                shuffle=True,
                batch_size=study.BATCH,
                collate_fn=lambda rows: whole_word_masking(rows, self.tokenizer, study.MASKED),
            )
            optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5)
            accelerator = Accelerator()
            model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
            scheduler = get_scheduler(
                "linear", optimizer=optimizer, num_warmup_steps=0, num_training_steps=steps
            )
            model.train()
            epochs = itertools.chain.from_iterable(itertools.repeat(loader))
            for batch in itertools.islice(epochs, steps):
                loss = model(**batch).loss
                accelerator.backward(loss)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()

        model.eval()
        names = {name: name.removeprefix("masked_") for name in self.frozen.column_names}
        losses = []
        for batch in DataLoader(
            self.frozen.rename_columns(names),
            batch_size=study.BATCH,
            collate_fn=default_data_collator,
        ):
            with torch.no_grad():
                loss = model(**batch).loss
            losses.append(accelerator.gather(loss.repeat(study.BATCH)))
        own = math.exp(torch.cat(losses)[: len(self.frozen)].mean())
        return [{**point, "own": own} for point in self.measure(points)]


@contextmanager
def watch(model: PreTrainedModel, *, steps: int) -> Iterator[list[Point]]:
    """Copy the weights now and then; the clock stops meanwhile, for either loop the same.

    It is the CPU's, so that what else runs on the machine does not count.
    """
    points: list[Point] = []
    marks = [round(steps * part / POINTS) for part in range(POINTS + 1)]
    step, paused, started = 0, 0.0, time.process_time()

    def note(*_: object) -> None:
        nonlocal step, paused
        now = time.process_time()
        for _ in range(marks.count(step)):
            copy = {name: values.detach().clone() for name, values in model.state_dict().items()}
            points.append(Point(step, now - started - paused, copy))
        step += 1
        paused += time.process_time() - now

    note()
    handle = register_optimizer_step_post_hook(note)
    try:
        yield points
    finally:
        handle.remove()


def main() -> None:
    """Run the recipe, ours for as many steps, and ours for as long, seed by seed."""
    args = study.make_parser(__doc__).parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.data / study.MODEL)
    train, held_out = study.read_documents(args.data / "imdb")
    train, held_out = [*train][: args.train_rows], [*held_out][: args.held_out_rows]
    rows = study.cut(train, tokenizer, rows=args.train_rows)
    recipe_rows = Dataset.from_dict({"text": train}).map(
        tokenize_as_recipe,
        batched=True,
        fn_kwargs={"tokenizer": tokenizer},
        remove_columns="text",
    )
    recipe_rows = recipe_rows.map(group_by_sum, batched=True).select(range(len(rows)))
    if rows["input_ids"][:] != recipe_rows["input_ids"][:]:
        sys.exit("The recipe's rows hold other tokens than ours: they cannot be compared.")
    frozen = study.freeze(study.cut(held_out, tokenizer, rows=args.held_out_rows), tokenizer)
    steps = study.count_steps(args, rows)
    seeds = ", ".join(map(str, args.seeds))
    study.begin(
        "Perplexity by step, beside the recipe",
        f"""
        The recipe's own loop (chapter 7.3 of the Hugging Face course: its chunks, its whole-word
        collator, AdamW, `outputs.loss`), and `accelerate_train` from the same weights on the same
        rows: for as many steps, and for as much CPU time as the recipe took.

        - {study.tell_training(args, rows)}.
        - {study.MASKED:.0%} of words are masked. Ours clips gradients at 1, as it does by default;
          the recipe does not.
        - Exact perplexity (`evaluate_mlm`) on one frozen set, {len(frozen):,} rows of IMDb test.
        - Seconds are CPU time, from the loaded model to the end of the last step, evaluations left
          out.
        - Mean over the seeds {seeds} (order, masks, dropout), with the lowest and the highest.
        """,
    )
    race = Race(args, tokenizer, frozen)
    figures: dict[str, list[list[dict[str, float]]]] = {
        "recipe": [],
        "ours, equal steps": [],
        "ours, equal time": [],
    }
    for seed in args.seeds:
        recipe = race.run_recipe(recipe_rows, steps=steps, seed=seed)
        equal = race.run_ours(rows, steps=steps, seed=seed)
        longer = max(round(steps * recipe[-1]["seconds"] / equal[-1]["seconds"]), 1)
        runs = recipe, equal, race.run_ours(rows, steps=longer, seed=seed)
        for each, run in zip(figures.values(), runs, strict=True):
            each.append(run)

    parts = (f"{part / POINTS:.0%} of steps" for part in range(1, POINTS + 1))
    study.show_table(
        ("perplexity after", "0 steps", *parts),
        [
            (name, *(extent(column(each, "perplexity", at)) for at in range(POINTS + 1)))
            for name, each in figures.items()
        ],
    )
    study.show_table(
        ("at the end", "steps", "CPU seconds", "perplexity", "as the recipe evaluates"),
        [
            (
                name,
                extent(column(each, "step"), 0),
                extent(column(each, "seconds"), 0),
                extent(column(each, "perplexity")),
                extent(column(each, "own")) if name == "recipe" else "",
            )
            for name, each in figures.items()
        ],
    )
    draw(args.pictures / PICTURE, figures)
    print(f":::{{container}} picture\n```{{raw}} html\n:file: pictures/{PICTURE}\n```\n:::\n")
    study.save(args, "perplexity_by_step", {"runs": figures})


def column(runs: Sequence[Sequence[dict[str, float]]], name: str, at: int = -1) -> list[float]:
    """Return a figure of each run at one of its points."""
    return [run[at][name] for run in runs]


def extent(values: Sequence[float], digits: int = 1) -> str:
    """Write the mean over seeds and, where they differ, the lowest and the highest."""
    mean, low, high = (
        f"{value:,.{digits}f}" for value in (statistics.mean(values), min(values), max(values))
    )
    return mean if low == high else f"{mean} ({low} to {high})"


def draw(path: Path, figures: dict[str, list[list[dict[str, float]]]]) -> None:
    """Draw perplexity by step and by time, the mean of the seeds between lowest and highest."""
    ink = "#123456"  # a color that nothing else has
    settings: dict[str, Any] = dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), ink
    )
    with rc_context({**settings, "svg.fonttype": "none", "svg.hashsalt": path.name}):
        figure = Figure(figsize=(8, 3.4), layout="constrained")
        plots = figure.subplots(1, 2, sharey=True)
        for axes, name in zip(plots, ("step", "seconds"), strict=True):
            for (label, runs), (color, width) in zip(figures.items(), STYLES, strict=True):
                places = range(len(runs[0]))
                x, y = (
                    [statistics.mean(column(runs, each, at)) for at in places]
                    for each in (name, "perplexity")
                )
                axes.plot(x, y, label=label, color=color, linewidth=width, marker=".")
                seeds = [column(runs, "perplexity", at) for at in places]
                axes.fill_between(x, [*map(min, seeds)], [*map(max, seeds)], color=color, alpha=0.2)
            axes.set_xlabel({"step": "optimizer step", "seconds": "CPU seconds of training"}[name])
            axes.grid(color="#888888", alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
        plots[0].set_ylabel("perplexity, held out")
        plots[1].legend(frameon=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        names = ("Date", "Creator", "Format", "Type")
        figure.savefig(path, transparent=True, metadata=dict.fromkeys(names))
    # It stands within a page, whose own pictures are none of its business.
    picture = path.read_text(encoding="utf-8").replace(">*{", ">.picture *{")
    path.write_text(picture[picture.index("<svg") :].replace(ink, "currentColor"), encoding="utf-8")


if __name__ == "__main__":
    main()
