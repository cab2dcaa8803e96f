"""Does it pay to mask more at first and less at the end, as recent recipes do?"""

from __future__ import annotations

import _study as study
from transformers import AutoTokenizer

RATES = {
    "20 % throughout": ("imdb", study.MASKED),
    "30 %, then 15 % in the last fifth": ("imdb-30-then-15", {0.0: 0.3, 0.8: 0.15}),
}
MEASURED = 0.15


def main() -> None:
    """Adapt with each schedule, and measure all on one frozen set."""
    args = study.make_parser(__doc__).parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.data / study.MODEL)
    train, held_out = study.read_documents(args.data / "imdb")
    rows = study.cut([*train][: args.train_rows], tokenizer, rows=args.train_rows)
    held_out_rows = study.cut([*held_out][: args.held_out_rows], tokenizer, rows=args.held_out_rows)
    frozen = study.freeze(held_out_rows, tokenizer, rate=MEASURED)
    study.begin(
        "Rates that follow the run",
        f"""
        One model learned with a fifth of the words masked throughout, and one with 30 % masked
        until 80 % of the steps are done and 15 % from then on, as BioClinical ModernBERT had it for
        its decay.

        - {study.tell_training(args, rows)}; the same rows for all, and words masked as a whole.
        - Measured on one frozen set with {MEASURED:.0%} of the words masked, {len(held_out_rows):,}
          rows of IMDb test.
        - {study.tell_spread(args)}
        """,
    )
    figures = {"before": [study.perplexity(args.data / study.MODEL, frozen)]} | {
        name: [
            study.perplexity(study.adapt(args, rows, corpus=corpus, rate=rate, seed=seed), frozen)
            for seed in args.seeds
        ]
        for name, (corpus, rate) in RATES.items()
    }
    study.show_table(
        ("perplexity", f"{MEASURED:.0%} masked"),
        [(name, study.spread(values)) for name, values in figures.items()],
    )
    study.save(args, "mask_rate", {"perplexity": figures})


if __name__ == "__main__":
    main()
