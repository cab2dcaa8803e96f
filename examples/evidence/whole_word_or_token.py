"""Does it matter whether whole words or single tokens were masked? By either measure."""

from __future__ import annotations

import _study as study
from transformers import AutoTokenizer

NAMES = {"words": "whole words", "tokens": "single tokens"}


def main() -> None:
    """Adapt with each masking, and measure each on both."""
    args = study.make_parser(__doc__).parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.data / study.MODEL)
    train, held_out = study.read_documents(args.data / "imdb")
    rows = study.cut([*train][: args.train_rows], tokenizer, rows=args.train_rows)
    held_out_rows = study.cut([*held_out][: args.held_out_rows], tokenizer, rows=args.held_out_rows)
    frozen = {masking: study.freeze(held_out_rows, tokenizer, masking) for masking in NAMES}
    study.begin(
        "Whole words or single tokens",
        f"""
        One model learned with whole words masked, and one with single tokens masked. Each is
        measured by both: perplexity on one frozen set with whole words masked, and on one with
        single tokens masked, of the same held-out reviews.

        - {study.tell_training(args, rows)}; the same rows for all.
        - {study.MASKED:.0%} of words or of tokens are masked, always by the mask token, so that
          only the unit differs.
        - Measured on {len(held_out_rows):,} rows of IMDb test.
        - {study.tell_spread(args)}
        """,
    )
    start = args.data / study.MODEL
    folders = {"before": [start]} | {
        f"adapted, {name}": [
            study.adapt(args, rows, corpus="imdb", masking=masking, seed=seed)
            for seed in args.seeds
        ]
        for masking, name in NAMES.items()
    }
    figures = {
        model: {
            NAMES[masking]: [study.perplexity(folder, rows) for folder in each]
            for masking, rows in frozen.items()
        }
        for model, each in folders.items()
    }
    study.show_table(
        ("perplexity", *(f"{name} masked" for name in NAMES.values())),
        [(name, *map(study.spread, by_set.values())) for name, by_set in figures.items()],
    )
    study.save(args, "whole_word_or_token", {"perplexity": figures})


if __name__ == "__main__":
    main()
