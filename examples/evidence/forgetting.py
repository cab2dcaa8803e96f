"""How much of general language is forgotten, and what does a fifth of general text save?"""

from __future__ import annotations

import _study as study
from datasets import interleave_datasets
from transformers import AutoTokenizer

SHARE = 0.2  # of general text in the mix


def main() -> None:
    """Adapt to reviews alone and to the mix, and measure on reviews and on general text."""
    args = study.make_parser(__doc__).parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.data / study.MODEL)
    reviews, new_reviews = study.read_documents(args.data / "imdb")
    general, new_general = study.read_documents(args.data / "corpora" / "general_wikisplit")
    alone = study.cut([*reviews][: args.train_rows], tokenizer, rows=args.train_rows)
    general_rows = study.cut(general, tokenizer, rows=args.train_rows)
    mix = interleave_datasets(
        [alone, general_rows],
        probabilities=[1 - SHARE, SHARE],
        seed=0,
        stopping_strategy="all_exhausted",
    ).select(range(len(alone)))
    size = args.held_out_rows
    held_out = {
        "reviews": study.cut([*new_reviews][:size], tokenizer, rows=size),
        "general": study.tokenize(new_general, tokenizer),
    }
    frozen = {
        f"{name}, {masking} masked": study.freeze(rows, tokenizer, masking)
        for name, rows in held_out.items()
        for masking in ("words", "tokens")
    }
    study.begin(
        "What is forgotten",
        f"""
        Perplexity on reviews and on general text, after adapting to reviews alone, and to as many
        rows of which {SHARE:.0%} are general text, mixed in by `datasets.interleave_datasets`.

        - {study.tell_training(args, alone)}.
        - In the mix, {SHARE:.0%} of the rows are from general_wikisplit/train, which the model has
          also been trained on before. Whole words are masked in both.
        - Measured on {len(held_out["reviews"]):,} rows of IMDb test, and on the sentences of
          general_wikisplit/test, {len(held_out["general"]):,} rows as long as they are, which no
          model has learned from.
        - Measured with both masks, since the task changes with the text: to have learned with whole
          words masked lowers perplexity on any text masked so, and may hide what was forgotten.
        - {study.tell_spread(args)}
        """,
    )
    folders = {
        "before": [args.data / study.MODEL],
        "reviews alone": [
            study.adapt(args, alone, corpus="imdb", seed=seed) for seed in args.seeds
        ],
        f"with {SHARE:.0%} general text": [
            study.adapt(args, mix, corpus="mix", seed=seed) for seed in args.seeds
        ],
    }
    figures = {
        model: {
            name: [study.perplexity(folder, rows) for folder in each]
            for name, rows in frozen.items()
        }
        for model, each in folders.items()
    }
    study.show_table(
        ("perplexity", *frozen),
        [(name, *map(study.spread, by_set.values())) for name, by_set in figures.items()],
    )
    study.save(args, "forgetting", {"perplexity": figures})


if __name__ == "__main__":
    main()
