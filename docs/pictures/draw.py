"""Draw what the pages show: ``python docs/pictures/draw.py`` writes the pictures beside this file.

They are made of what the tokenizers and collators return, and a test compares the files with it.
Text takes the page's color and fills are translucent, so that one file is right on light and dark.
"""

from __future__ import annotations

from html import escape
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from transformers import DataCollatorForLanguageModeling

from mlmadapt import WholeWordMaskingCollator, tokenize_with_word_ids
from mlmadapt.testing import tiny_tokenizer

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from transformers import PreTrainedTokenizerFast

FOLDER = Path(__file__).parent
LEFT, HEIGHT, GAP = 96, 26, 6  # pixels
CHARACTER = 7.3  # pixels, of a monospace 12 px
KINDS = {
    "wordpiece": "WordPiece: BERT, DistilBERT",
    "byte_bpe": "Byte-level BPE: RoBERTa",
    "unigram": "Unigram: XLM-R, ALBERT",
    "unigram_offsets": "Unigram, offsets with the space before: DeBERTa-v2",
    "byte_bpe_nosplit": "Byte-level BPE without a split into words: ModernBERT-like",
}


class Lane(NamedTuple):
    """A line of a picture: tokens in the boxes of their words, or a heading over such lines."""

    label: str
    tokens: Sequence[str] = ()
    word_ids: Sequence[int] = ()
    heading: bool = False


def main() -> None:
    """Write every picture."""
    for name, picture in pictures().items():
        (FOLDER / name).write_text(picture, encoding="utf-8")


def pictures() -> dict[str, str]:
    """Return each picture by the name of its file."""
    return {
        "masks.svg": draw(masks("That film was unwatchable."), "One sentence under two masks"),
        "words.svg": draw(
            [lane for kind in KINDS for lane in words(kind, "A well-made film doesn't bore.")],
            "The words of one sentence by five tokenizers",
        ),
    }


def masks(sentence: str) -> Iterator[Lane]:
    """Show a sentence, and what token masking and whole-word masking hide of it."""
    tokenizer = tiny_tokenizer()
    row = tokenize_one(sentence, tokenizer)
    word_ids = row["word_ids"][1:-1]
    by_token = DataCollatorForLanguageModeling(
        tokenizer, mlm_probability=0.2, mask_replace_prob=1.0, random_replace_prob=0.0, seed=124
    )
    by_word = WholeWordMaskingCollator(tokenizer, wwm_probability=0.2, seed=124)
    hidden = by_token([{"input_ids": row["input_ids"]}]), by_word([row])
    for label, ids in [
        ("the sentence", row["input_ids"]),
        ("token masking", hidden[0]["input_ids"][0].tolist()),
        ("whole words", hidden[1]["input_ids"][0].tolist()),
    ]:
        yield Lane(label, tokenizer.convert_ids_to_tokens(ids)[1:-1], word_ids)


def words(kind: str, sentence: str) -> Iterator[Lane]:
    """Show the words that transformers' offsets make of a sentence, and those made here."""
    tokenizer = tiny_tokenizer(kind)
    encoding = tokenizer(sentence, return_offsets_mapping=True, return_special_tokens_mask=True)
    theirs, _ = DataCollatorForLanguageModeling._calc_word_ids_and_prob_mask(  # noqa: SLF001
        np.array([encoding["offset_mapping"]]), np.array([encoding["special_tokens_mask"]])
    )
    tokens = tokenizer.convert_ids_to_tokens(encoding["input_ids"])[1:-1]
    yield Lane(KINDS[kind], heading=True)
    yield Lane("transformers", tokens, theirs[0].tolist()[1:-1])
    yield Lane("mlmadapt", tokens, tokenize_one(sentence, tokenizer)["word_ids"][1:-1])


def tokenize_one(sentence: str, tokenizer: PreTrainedTokenizerFast) -> dict[str, list[int]]:
    """Return the row of a sentence."""
    columns = tokenize_with_word_ids({"text": [sentence]}, tokenizer)
    return {name: rows[0].tolist() for name, rows in columns.items()}


def draw(lanes: Iterable[Lane], title: str) -> str:
    """Return the SVG of lanes below each other."""
    shapes, top, width = [], GAP, 0.0
    for lane in lanes:
        if lane.heading:
            shapes.append(text(0, top + 24, lane.label, 'font-weight="600"'))
            top += 34
            continue
        shapes.append(text(0, top + 17, lane.label, 'opacity="0.75"'))
        shapes += boxes(lane, top)
        words = len(list(groupby(lane.word_ids)))
        width = max(width, LEFT + sum(map(width_of, lane.tokens)) + words * GAP)
        top += HEIGHT + GAP
    return "\n".join(
        [
            f'<svg viewBox="0 0 {width:.0f} {top}" style="max-width: {width * 1.15:.0f}px"',
            f' role="img" aria-label="{escape(title)}"',
            ' fill="currentColor" font-size="12" font-family="system-ui, sans-serif"',
            ' xmlns="http://www.w3.org/2000/svg">',
            *shapes,
            "</svg>\n",
        ]
    )


def boxes(lane: Lane, top: int) -> Iterator[str]:
    """Yield a box for each word with its tokens in it."""
    left = float(LEFT)
    for _, group in groupby(zip(lane.word_ids, lane.tokens, strict=True), key=lambda pair: pair[0]):
        tokens = [token for _, token in group]
        widths = [*map(width_of, tokens)]
        masked = all(token == "[MASK]" for token in tokens)  # noqa: S105  # no password
        color = 'fill="#c2410c" stroke="none"' if masked else BOX
        yield rectangle(left, top, sum(widths), color)
        for place, (token, width) in enumerate(zip(tokens, widths, strict=True)):
            white = 'fill="#fff"'
            if token == "[MASK]" and not masked:  # noqa: S105
                yield rectangle(left + 2, top + 2, width - 4, 'fill="#c2410c"', less=4)
            if place:
                color = "#fff" if masked else "currentColor"
                line = f'y1="{top + 5}" y2="{top + HEIGHT - 5}" stroke="{color}" opacity="0.35"'
                yield f'<line x1="{left:.1f}" x2="{left:.1f}" {line}/>'
            style = f"{MONOSPACE} {white if token == '[MASK]' else ''}"  # noqa: S105
            yield text(left + width / 2, top + 17, token, f'text-anchor="middle" {style}')
            left += width
        left += GAP


def width_of(token: str) -> float:
    """Return the width of a token with its margins."""
    return CHARACTER * len(token) + 9


BOX = 'fill="#3b82f6" fill-opacity="0.14" stroke="#3b82f6" stroke-opacity="0.7"'
MONOSPACE = 'font-family="ui-monospace, DejaVu Sans Mono, monospace"'


def rectangle(left: float, top: int, width: float, style: str, less: int = 0) -> str:
    """Return a box with round corners."""
    place = f'x="{left:.1f}" y="{top}" width="{width:.1f}" height="{HEIGHT - less}"'
    return f'<rect {place} rx="5" {style}/>'


def text(left: float, baseline: int, content: str, style: str) -> str:
    """Return a line of text."""
    return f'<text x="{left:.1f}" y="{baseline}" {style}>{escape(content)}</text>'


if __name__ == "__main__":
    main()
