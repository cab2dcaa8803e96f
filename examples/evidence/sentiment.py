"""Does adaptation help the task that comes after it? Sentiment of reviews, from few labels."""

from __future__ import annotations

import itertools
import random
from typing import TYPE_CHECKING

import _study as study
import torch
from torch.nn.functional import binary_cross_entropy_with_logits
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    get_linear_schedule_with_warmup,
    set_seed,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase

TOKENS = 128  # a review
BATCH, LEARNING_RATE = 16, 3e-4  # of fine-tuning; not tuned


def main() -> None:
    """Probe and fine-tune the model before and after, and count what each gets right."""
    parser = study.make_parser(__doc__, seeds=[0, 1, 2, 3, 4], train_rows=100_000)
    parser.add_argument("--labels", type=int, nargs="+", default=[200, 2_000])
    parser.add_argument("--test_reviews", type=int, default=5_000)
    parser.add_argument("--steps", type=int, default=300, help="of fine-tuning")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.data / study.MODEL)
    train, held_out = study.read_documents(args.data / "imdb")
    rows = study.cut(train, tokenizer, rows=args.train_rows)
    test = dict(itertools.islice(held_out.items(), args.test_reviews))
    study.begin(
        "Sentiment from few labels",
        f"""
        Accuracy on IMDb test, with the model before and after adaptation. It is that of a logistic
        regression on the model's mean-pooled last states, which stay as they are, and that of a
        classifier fine-tuned from the model.

        - {study.tell_training(args, rows)}; whole words masked, one run. Labels play no part in it.
        - {len(test):,} reviews of IMDb test, a random choice fixed for all, without those that are
          also in train. Only the first {TOKENS} tokens of a review are read.
        - The regression has a penalty of half the squared weights, on standardized features.
          Fine-tuning takes {args.steps} steps of {BATCH} reviews, learning rate {LEARNING_RATE:g},
          a tenth of them warm-up, then linear to 0: the same before and after, and not tuned.
        - {study.tell_spread(args, "labels drawn, the classifier's head, order, dropout")}
          The difference is taken within a seed.
        """,
    )
    folders = {
        "before": args.data / study.MODEL,
        "after": study.adapt(args, rows, corpus="imdb", seed=0),
    }
    drawn = [random.Random(seed).sample([*train], max(args.labels)) for seed in args.seeds]  # noqa: S311
    pooled = {
        name: pool(folder, {*itertools.chain(*drawn, test)}, tokenizer)
        for name, folder in folders.items()
    }
    figures: dict[str, dict[str, list[float]]] = {}
    for count in args.labels:
        for name, folder in folders.items():
            for seed, texts in zip(args.seeds, drawn, strict=True):
                labeled = {text: train[text] for text in texts[:count]}
                model = fine_tune(folder, labeled, tokenizer, steps=args.steps, seed=seed)
                for way, accuracy in (
                    ("logistic regression", probe(pooled[name], labeled, test)),
                    ("fine-tuned", judge(model, test, tokenizer)),
                ):
                    row = figures.setdefault(f"{way}, {count:,} labels", {})
                    row.setdefault(name, []).append(100 * accuracy)
    study.show_table(
        ("accuracy, %", *folders, "difference"),
        [(way, *map(study.spread, each.values()), differ(**each)) for way, each in figures.items()],
    )
    study.save(args, "sentiment", {"accuracy": figures})


def differ(before: Sequence[float], after: Sequence[float]) -> str:
    """Write what was gained within a seed."""
    return study.spread([b - a for a, b in zip(before, after, strict=True)], sign="+")


def batches(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, size: int = 64
) -> Iterator[tuple[Sequence[str], BatchEncoding]]:
    """Yield some texts at a time, and the model's inputs for them."""
    for start in range(0, len(texts), size):
        some = texts[start : start + size]
        yield (
            some,
            tokenizer(
                some, truncation=True, max_length=TOKENS, padding="longest", return_tensors="pt"
            ),
        )


@torch.inference_mode()
def pool(
    folder: Path, texts: set[str], tokenizer: PreTrainedTokenizerBase
) -> dict[str, torch.Tensor]:
    """Return the mean of an encoder's last states over the tokens of each text, ``(hidden,)``."""
    encoder = AutoModel.from_pretrained(folder).eval()
    pooled = {}
    for some, inputs in batches(sorted(texts, key=len), tokenizer):
        states = encoder(**inputs).last_hidden_state
        weights = inputs["attention_mask"].unsqueeze(-1)
        means = (states * weights).sum(1) / weights.sum(1)
        pooled |= zip(some, means, strict=True)
    return pooled


def probe(pooled: dict[str, torch.Tensor], labeled: dict[str, int], test: dict[str, int]) -> float:
    """Fit a logistic regression and return its accuracy."""
    inputs = torch.stack([pooled[text] for text in labeled]).clone()
    new = torch.stack([pooled[text] for text in test]).clone()
    mean, deviation = inputs.mean(0), inputs.std(0)
    inputs, new = (inputs - mean) / deviation, (new - mean) / deviation
    targets = torch.tensor([*labeled.values()], dtype=torch.float)
    weights = torch.zeros(inputs.shape[1], requires_grad=True)
    bias = torch.zeros((), requires_grad=True)
    optimizer = torch.optim.LBFGS([weights, bias], max_iter=500, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        error = binary_cross_entropy_with_logits(inputs @ weights + bias, targets, reduction="sum")
        total = error + weights.square().sum() / 2
        total.backward()
        return total

    optimizer.step(loss)
    right = (new @ weights + bias > 0) == torch.tensor([*test.values()])
    return right.float().mean().item()


def fine_tune(
    folder: Path,
    labeled: dict[str, int],
    tokenizer: PreTrainedTokenizerBase,
    *,
    steps: int,
    seed: int,
) -> PreTrainedModel:
    """Train a classifier, encoder and all; `seed` decides its head, the order and dropout."""
    set_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    scheduler = get_linear_schedule_with_warmup(optimizer, steps // 10, steps)
    generator = random.Random(seed)  # noqa: S311 (nothing secret)
    epochs = (
        batches(generator.sample([*labeled], len(labeled)), tokenizer, BATCH)
        for _ in itertools.repeat(None)
    )
    for texts, inputs in itertools.islice(itertools.chain.from_iterable(epochs), steps):
        model(**inputs, labels=torch.tensor([labeled[text] for text in texts])).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return model.eval()


@torch.inference_mode()
def judge(
    model: PreTrainedModel, test: dict[str, int], tokenizer: PreTrainedTokenizerBase
) -> float:
    """Return the accuracy of a classifier."""
    right = 0
    for texts, inputs in batches(sorted(test, key=len), tokenizer):
        guesses = model(**inputs).logits.argmax(-1).tolist()
        right += sum(guess == test[text] for guess, text in zip(guesses, texts, strict=True))
    return right / len(test)


if __name__ == "__main__":
    main()
