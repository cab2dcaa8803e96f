"""Masks made visible, word by word: what a batch hides, what it replaces, what it keeps.

A batch of token ids hides its own mistakes. Shown is the text as the model should restore it, and
at each target what the model sees in its place: ``{true -> seen}``. Colors only repeat what these
marks say, so that a log, a pipe and a reader who cannot tell them apart lose nothing.
"""

import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from html import escape
from itertools import chain, pairwise
from typing import Any

import numpy as np

from mlmadapt._types import Features, Tokenizer
from mlmadapt.data.rows import check_words, join_rows, split_rows, to_columns
from mlmadapt.data.tokenization import continuing_mark, special_token_ids

# For a terminal, and for a page that may be white or black.
_ANSI = {"masked": "30;43", "replaced": "30;45", "kept": "30;46", "special": "2"}
_CSS = {
    "masked": "background:rgba(240,160,0,.4);border-radius:3px;padding:0 3px",
    "replaced": "background:rgba(220,60,160,.35);border-radius:3px;padding:0 3px",
    "kept": "border-bottom:2px solid rgb(0,160,180)",
    "special": "opacity:.55",
}


@dataclass(frozen=True)
class Piece:
    """Neighbouring tokens of one word that are all targets, or none of them.

    Attributes:
        text: What they say, without white space at its ends.
        seen: What the model sees instead, if they are targets.
        fate: ``"masked"``, ``"replaced"`` or ``"kept"`` of targets, else ``"special"`` or ``""``.
        space: What separates it from the piece before: a space, or nothing.
    """

    text: str
    seen: str
    fate: str
    space: str


@dataclass(frozen=True, repr=False)
class MaskView:
    """A batch to look at: print it, or leave it as the last line of a notebook's cell.

    Attributes:
        rows: The words of each row, each a list of pieces: one, unless it is a target in part.
    """

    rows: list[list[list[Piece]]]

    def __str__(self) -> str:
        """Return the text, in color if standard output is a terminal that wants it.

        As is usual, `NO_COLOR` forbids color and `FORCE_COLOR` demands it.
        """
        wanted = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
        wanted |= bool(os.environ.get("FORCE_COLOR"))
        return self.to_text(color=wanted and not os.environ.get("NO_COLOR"))

    __repr__ = __str__

    def to_text(self, *, color: bool) -> str:
        """Return a line per row, and one of counts.

        Args:
            color: Paint targets, with the escape codes of terminals.

        Returns:
            The lines, without one at the end.

        Examples:
            >>> view = MaskView([[[Piece("film", "[MASK]", "masked", "")]]])
            >>> print(view.to_text(color=False))
            0: {film -> [MASK]}
            1 of 1 words: 1 masked, 0 replaced, 0 kept
        """

        def paint(text: str, fate: str) -> str:
            return f"\x1b[{_ANSI[fate]}m{text}\x1b[0m" if color and fate else text

        def show(piece: Piece) -> str:
            text = f"{{{piece.text} -> {piece.seen}}}" if piece.seen else piece.text
            return piece.space + paint(text, piece.fate)

        lines = [f"{number}: {line.strip()}" for number, line in enumerate(self._lines(show))]
        return "\n".join([*lines, self._count(paint)])

    def _repr_html_(self) -> str:
        """Return what a notebook shows: a paragraph per row, in the page's own colors."""

        def paint(text: str, fate: str, title: str = "") -> str:
            return f'<span style="{_CSS[fate]}"{title}>{text}</span>' if fate else text

        def show(piece: Piece) -> str:
            text, seen = escape(piece.text), escape(piece.seen)
            title = f' title="{piece.fate}; the model sees {seen}"' if seen else ""
            if piece.fate == "replaced":
                text = f"<s>{text}</s> {seen}"
            return piece.space + paint(text, piece.fate, title)

        lines = "".join(f'<p dir="auto">{line}</p>' for line in self._lines(show))
        return f'<div style="line-height:1.7">{lines}<p>{self._count(paint)}</p></div>'

    def _lines(self, show: Callable[[Piece], str]) -> Iterator[str]:
        return ("".join(map(show, chain.from_iterable(row))) for row in self.rows)

    def _count(self, paint: Callable[[str, str], str]) -> str:
        words = [word for row in self.rows for word in row if word[0].fate != "special"]
        fates = Counter("part" if len(word) > 1 else word[0].fate for word in words)
        counts = [f"{fates[fate]} {paint(fate, fate)}" for fate in ("masked", "replaced", "kept")]
        counts += [f"{fates['part']} in part"] if fates["part"] else []
        return f"{len(words) - fates['']} of {len(words)} words: {', '.join(counts)}"


def show_masks(
    batch: Mapping[str, Any] | Features, tokenizer: Tokenizer, features: Features | None = None
) -> MaskView:
    """Show what is masked, replaced and kept in a batch, word by word.

    Args:
        batch: What a masking collator returned, of shape ``(batch, sequence)``, as tensors, arrays
            or lists; or frozen rows, with their prefix or without: a list of them, one of them, or
            a slice of their dataset. Padding is left out.
        tokenizer: The tokenizer that made the rows.
        features: The rows that the batch was made of, whose ``word_ids`` say what a word is.
            Without them, tokens without a space between them count as one (of WordPiece, a token
            and the ``##`` pieces after it).

    Returns:
        An object that prints as text, with color in a terminal, and shows itself in a notebook.
        Each target is ``{true -> seen}``, seen being what the model sees. Nothing is printed.

    Raises:
        ValueError: If the batch has no rows, no ``input_ids`` and ``labels`` of one length, or a
            token id outside the vocabulary; if `features` are not its rows, or have no
            ``word_ids``.
        TypeError: If `tokenizer` is none, or one of several rows is not a dict.

    Examples:
        >>> from mlmadapt import WholeWordMaskingCollator
        >>> from mlmadapt.testing import tiny_rows, tiny_tokenizer
        >>> tokenizer = tiny_tokenizer("wordpiece")
        >>> rows = tiny_rows(tokenizer, ["An unfilmable film!"])
        >>> batch = WholeWordMaskingCollator(tokenizer, wwm_probability=0.3, seed=0)(rows)
        >>> show_masks(batch, tokenizer, rows)
        0: [CLS] an {unfilmable -> [MASK] [MASK] [MASK] [MASK]} film! [SEP]
        1 of 4 words: 1 masked, 0 replaced, 0 kept
    """
    if not hasattr(tokenizer, "get_vocab"):
        raise TypeError(f"tokenizer is {tokenizer!r:.60}; pass the tokenizer that made the rows")
    columns = batch if isinstance(batch, Mapping) else to_columns(batch)
    prefix = "masked_" if "masked_labels" in columns else ""
    if missing := {f"{prefix}input_ids", f"{prefix}labels"} - {*columns}:
        raise ValueError(
            f"batch has no {' and no '.join(sorted(missing))}, only {list(columns)}; pass what a "
            "masking collator or insert_random_mask returned"
        )
    rows = _read_rows(columns, prefix)
    known = {*tokenizer.get_vocab().values()}
    for number, row in enumerate(rows):
        pairs = zip(row["input_ids"], row["labels"], strict=True)
        row["true"] = [token if label == -100 else label for token, label in pairs]
        if unknown := {*row["input_ids"], *row["true"]} - known:
            raise ValueError(
                f"row {number} of the batch has token id {min(unknown)}, but the tokenizer has ids "
                f"0 to {max(known)}; pass the tokenizer that made the rows"
            )
    if features is not None:
        feature_columns = to_columns(features)
        check_words(feature_columns)
        unmasked = _read_rows(feature_columns)
        if [row["true"] for row in rows] != [row["input_ids"] for row in unmasked]:
            raise ValueError(
                f"features ({len(unmasked)} rows) have other tokens than batch ({len(rows)} rows); "
                "pass the rows that the batch was made of, in their order"
            )
        for row, feature in zip(rows, unmasked, strict=True):
            row["word_ids"] = feature["word_ids"]
    special = special_token_ids(tokenizer)
    return MaskView([_read_words(row, tokenizer, special) for row in rows])


def _read_rows(columns: Mapping[str, Any], prefix: str = "") -> list[dict[str, list[int]]]:
    """Return rows as plain numbers, without their padding."""
    names = [f"{prefix}{name}" for name in ("input_ids", "labels", "attention_mask")]
    known = {
        name.removeprefix(prefix): columns[name] for name in (*names, "word_ids") if name in columns
    }
    if not len(known["input_ids"]):
        raise ValueError("batch has no rows; pass at least one")
    if not np.ndim(known["input_ids"][0]):  # one row
        known = {name: [values] for name, values in known.items()}
    joined, lengths = join_rows(known)
    is_real = joined.pop("attention_mask", np.ones_like(joined["input_ids"])) != 0
    parts = [split_rows(values, lengths) for values in (is_real, *joined.values())]
    return [
        {name: values[real].tolist() for name, values in zip(joined, row, strict=True)}
        for real, *row in zip(*parts, strict=True)
    ]


def _read_words(
    row: dict[str, list[int]], tokenizer: Tokenizer, special: set[int]
) -> list[list[Piece]]:
    """Return the words of a row in pieces, each with its fate."""
    true, word_ids, mark = row["true"], row.get("word_ids"), continuing_mark(tokenizer)
    is_target = [label != -100 for label in row["labels"]]

    def goes_on(place: int) -> bool:
        before, token = true[place - 1 : place + 1]
        if word_ids is not None:
            return word_ids[place] == word_ids[place - 1] >= 0
        if mark:
            return before not in special and str(tokenizer.decode([token])).startswith(mark)
        # Neighbours like "film" and "." are no word of which a part is a target.
        is_near = place not in turns and special.isdisjoint((before, token))
        return is_near and not _spell([before], [token], tokenizer)[0]

    places = range(len(true))
    turns = {place for place in places[1:] if is_target[place] != is_target[place - 1]}
    starts = {place for place in places if not place or not goes_on(place)}
    words: list[list[Piece]] = []
    before: list[int] = []
    for first, last in pairwise([*sorted(starts | turns), len(true)]):
        tokens, inputs = true[first:last], row["input_ids"][first:last]
        space, text = _spell(before, tokens, tokenizer)
        seen, fate = "", "special" if tokens[0] in special else ""
        if is_target[first]:
            seen = _spell(before, inputs, tokenizer)[1]
            fate = "kept" if inputs == tokens else "replaced"
            fate = "masked" if tokenizer.mask_token_id in inputs else fate
        if first in starts:
            words.append([])
        words[-1].append(Piece(text, seen, fate, space))
        before = tokens
    return words


def _spell(before: list[int], tokens: list[int], tokenizer: Tokenizer) -> tuple[str, str]:
    """Return the space before some tokens, and their text, as they read after others."""
    decode: Any = partial(tokenizer.decode, clean_up_tokenization_spaces=False)
    head, whole = decode(before), decode(before + tokens)
    text = whole.removeprefix(head) if whole.startswith(head) else decode(tokens)
    space = " " if text[:1].isspace() or head[-1:].isspace() else ""
    if not text.strip() or "\ufffd" in text:  # white space, or some bytes of a character
        text = "".join(tokenizer.convert_ids_to_tokens(tokens))
    # A terminal would obey what stands in a text by chance.
    unsafe = r"[\x00-\x1f\x7f-\x9f\u2028\u2029]"
    return space, re.sub(unsafe, lambda match: repr(match[0])[1:-1], text.strip())
