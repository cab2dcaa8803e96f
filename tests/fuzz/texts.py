"""Hostile texts through every family of tokenizers: words, rows and masks as the slow references.

A case draws a tokenizer, some documents and settings, and compares everything on the way from the
documents to a batch with what `reference_tokenize` and its like make of them.
"""

from __future__ import annotations

import functools
import warnings
from collections import Counter
from itertools import chain, pairwise
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mlmadapt import (
    WholeWordMaskingCollator,
    group_texts,
    insert_random_mask,
    show_masks,
    tokenize_with_word_ids,
)
from mlmadapt.testing import TOKENIZER_KINDS, tiny_corpus, tiny_tokenizer
from tests.data.reference_chunking import reference_group_texts
from tests.data.reference_tokenization import reference_tokenize
from tests.masking.reference_masking import reference_collate, reference_key, reference_mask
from tests.scripts.short_run import rows_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from random import Random

PIECES = [
    # Control characters, and what Python, Unicode and terminals each take for the end of a line.
    *["\x00", "\x07", "\x08", "\x1b[31m", "\x1c", "\x1d", "\x1e", "\x1f", "\x7f", "\x85", "\x9f"],
    *["\r\n", "\n\r", "\r", "\n", "\v", "\f", "\u2028", "\u2029", "\t", "\t\t", " \n ", "\n" * 9],
    *[" ", "  ", " " * 40, "\xa0", "\u1680", "\u2007", "\u200a", "\u202f", "\u205f", "\u3000"],
    # Characters without a width, and those that turn the direction of text.
    *["\u200b", "\u200c", "\u200d", "\u2060", "\ufeff", "\xad", "\u202e", "\u202c", "\u2066"],
    # Marks that combine, and letters that change their number when they are normalised.
    *["e\u0301", "é", "\u0301", "Z\u0351\u036b\u0343" * 5, "ﬁ", "ﷺ", "İ", "ŉ", "ß", "ǅ", "Å", "Ω"],
    *["각", "\u1100\u1161\u11a8", "क्षि", "ต้นไม้", "மொ", "ᾳ"],
    *["①", "½", "²", "ℌ", "ｆｉｌｍ", "\u0345"],
    # Emoji of several characters, private use, and characters that are none.
    *["👩‍👧‍👦", "🏴󠁧󠁢󠁥󠁮󠁧󠁿", "🇩🇪", "❤\ufe0f", "👍🏽"],
    *["#\ufe0f\u20e3", "\ue000", "\U0010fffd", "\ufffe", "\ufffd"],
    # Scripts, with and without spaces.
    *["film", "Film", "unfilmable", "electroencephalography", "doesn't", "mother-in-law's"],
    *["这部电影", "中", "映画はとても", "영화", "фильм"],
    *["ταινία", "הסרט", "الفيلم", "ფილმი", "𝔣𝔦𝔩𝔪"],
    # Code, numbers, addresses.
    *["for (;;) {\n\treturn x->y;\n}\n//", "();\n//", "a_b.c(d)[e]", "==>", "1,000.5e-7", "0x1F"],
    *["https://x.y/z?a=b&c=%20#d", "a@b.c", "<br/><b>", "&amp;", "$\\alpha_{i}^2$", "```", "- * -"],
    # What tokenizers put at the beginning of a token.
    *["▁", "▁▁", "Ġ", "Ċ", "##", "##film", "▁film", "Ġfilm", "[MASK", "MASK]", "<unk", "</s"],
]
WORDS = sorted({word for text in tiny_corpus() for word in text.split()})
SPACES = ["", "", "", " ", " ", " ", "  ", "\n", "\t", "\u3000", "\xa0", "\f"]


def check(draw: Random, folder: Path | None) -> Counter[str]:
    """Compare one tokenizer, some documents and settings; count what was compared.

    Args:
        draw: Decides everything.
        folder: Of real tokenizers, as ``save_pretrained`` writes them; None for those in memory.

    Raises:
        AssertionError: If something differs from its reference.
    """
    name, tokenizer = draw_tokenizer(draw, folder)
    texts = [draw_text(draw, tokenizer) for _ in range(draw.randint(1, 5))]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of rows that are dropped, and of words of 32 tokens
            return compare(draw, tokenizer, texts)
    except Exception as error:
        raise AssertionError(f"{name}, {texts!r}: {type(error).__name__}: {error}") from error


def compare(draw: Random, tokenizer: Any, texts: list[str]) -> Counter[str]:
    """Compare all that is made of documents on the way to a batch."""
    if draw.random() < 0.05:
        check_surrogates(texts, tokenizer)
    before = tokenizer.backend_tokenizer.to_str()
    boundaries = draw_boundaries(draw, texts) if draw.random() < 0.5 else {}
    options = {"word_boundaries": boundaries.__getitem__} if boundaries else {}
    columns = lists_of(tokenize_with_word_ids({"text": texts}, tokenizer, **options))
    table: Any = tokenize_with_word_ids(pa.table({"text": texts}), tokenizer, **options)
    same("the table and the lists", table.to_pydict(), columns)
    same("the tokenizer after and before", tokenizer.backend_tokenizer.to_str(), before)
    expected = [reference_tokenize(text, tokenizer, boundaries.get(text)) for text in texts]
    for place in range(len(texts)):
        found = {column: values[place] for column, values in columns.items()}
        same(f"document {place} with {boundaries.get(texts[place])}", found, expected[place])

    settings: Any = {
        "chunk_size": draw.choice([1, 2, 7, 16, 64]),
        "remainder": draw.choice(["drop", "keep"]),
        "labels": draw.random() < 0.5,
    }
    rows = group_texts(columns, **settings)
    same(f"rows by {settings}", rows, reference_group_texts(columns, **settings))
    same(f"rows of a table by {settings}", group_texts(table, **settings).to_pydict(), rows)
    masked = compare_masks(draw, tokenizer, rows) if rows["input_ids"] else 0
    words = sum(len({*row} - {-1}) for row in columns["word_ids"])
    return Counter(texts=len(texts), words=words, rows=len(rows["input_ids"]), targets=masked)


def compare_masks(draw: Random, tokenizer: Any, columns: dict[str, Any]) -> int:
    """Compare a batch of all rows, and the rows with frozen masks."""
    columns = {name: values for name, values in columns.items() if name != "labels"}
    rows = rows_of(columns)
    draw.shuffle(rows)
    size = max(tokenizer.get_vocab().values()) + 1
    shares = [(1.0, 0.0), (0.8, 0.1), (0.0, 1.0), (0.0, 0.0), (draw.random() / 2, 0.3)]
    mask_replace_prob, random_replace_prob = draw.choice(shares)
    choices: Any = {
        "wwm_probability": draw.choice([0, 0.15, 0.2, 0.5, 1.0, draw.random()]),
        "mask_replace_prob": mask_replace_prob,
        "random_replace_prob": random_replace_prob,
        "budget": draw.choice(["bernoulli", "exact"]),
        "word_weights": draw.choice([None, None, weigh, [float(i % 5) for i in range(size)]]),
    }
    seed, epoch = draw.choice([0, 42, -1, 2**70]), draw.choice([0, 1, 2**40])
    collator = WholeWordMaskingCollator(tokenizer, seed=seed, **choices)
    collator.set_epoch(epoch)
    batch = {name: values.tolist() for name, values in collator(rows).items()}
    key = reference_key(seed, "mask", epoch)
    expected = reference_collate(rows, tokenizer, key=key, **choices)
    same(f"the batch by {choices}, seed {seed}, epoch {epoch}", batch, expected)
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    frozen = lists_of(insert_random_mask(columns, collator, seed=seed))
    for place, row in enumerate(rows):
        found = frozen["masked_input_ids"][place], frozen["masked_labels"][place]
        masks = reference_mask(row, tokenizer, key=reference_key(seed, "frozen"), **choices)
        same(f"frozen row {place} by {choices}, seed {seed}", found, masks)
    lines = show_masks(batch, tokenizer, rows).to_text(color=False).splitlines()
    same("the lines that show_masks writes", len(lines), len(rows) + 1)
    return sum(label != -100 for row in batch["labels"] for label in row)


def same(what: str, found: Any, expected: Any) -> None:
    """Assert that two things are equal, and show the smallest parts of them that are not."""
    if found == expected:
        return
    where = what
    while type(found) is type(expected) and isinstance(found, dict | list | tuple):
        parts = found.keys() if isinstance(found, dict) else range(len(found))
        others = expected.keys() if isinstance(expected, dict) else range(len(expected))
        if [*parts] != [*others]:
            break
        if isinstance(found, list) and all(isinstance(value, int) for value in found):
            break
        part = next(name for name in parts if found[name] != expected[name])
        where, found, expected = f"{where}, {part}", found[part], expected[part]
    raise AssertionError(f"{where}: found {found}, expected {expected}")


def lists_of(columns: Any) -> dict[str, list[list[int]]]:
    """Turn columns of arrays into lists."""
    return {name: [[*map(int, row)] for row in rows] for name, rows in columns.items()}


def check_surrogates(texts: list[str], tokenizer: Any) -> None:
    """A text with half a character of UTF-16 is refused, with its row."""
    try:
        tokenize_with_word_ids({"text": [*texts, "film \ud83d film"]}, tokenizer)
    except ValueError as error:
        if f"row {len(texts)} of column 'text'" not in f"{error}" or "Unicode" not in f"{error}":
            raise
    else:
        raise AssertionError("a lone surrogate was taken for text")


def weigh(text: str) -> float:
    """Favour long words, and leave out those with an e."""
    return 0.0 if "e" in text else 1.0 + len(text)


def draw_text(draw: Random, tokenizer: Any) -> str:
    """Draw a document of few pieces or, seldom, of many."""
    pieces: list[Callable[[], str]] = [
        lambda: draw.choice(PIECES),
        lambda: draw.choice(PIECES),
        lambda: draw.choice(WORDS),
        lambda: tokenizer.convert_ids_to_tokens(draw.randrange(len(tokenizer))),
        lambda: draw.choice(tokenizer.all_special_tokens),
        lambda: tokenizer.decode([draw.randrange(len(tokenizer))]),
        lambda: draw_character(draw),
        lambda: "".join(draw_character(draw) for _ in range(draw.randint(2, 6))),
        lambda: draw.choice(["a", "ab", "ß", "中", "👍🏽", "=", "\u0301"]) * draw.randint(2, 90),
    ]
    count = draw.choice([0, 1, 2, 3, 5, 8, 13, 80])
    return "".join(draw.choice(pieces)() + draw.choice(SPACES) for _ in range(count))


def draw_character(draw: Random) -> str:
    """Draw any character but half of one, those of few bytes more often."""
    code = draw.randrange(draw.choice([0x80, 0x800, 0x10000, 0x110000]))
    return "\ufffd" if 0xD800 <= code < 0xE000 else chr(code)


def draw_boundaries(draw: Random, texts: list[str]) -> dict[str, list[tuple[int, int]]]:
    """Draw spans of each text, some with nothing between them."""
    spans = {}
    for text in texts:
        cuts = sorted({draw.randint(0, len(text)) for _ in range(draw.randint(0, 8))})
        spans[text] = [span for span in pairwise(cuts) if draw.random() < 0.7]
    return spans


def draw_tokenizer(draw: Random, folder: Path | None) -> tuple[str, Any]:
    """Draw a tokenizer, and what a user may have done to it."""
    kinds = [*TOKENIZER_KINDS, "drawn", "drawn"]
    if folder is not None:
        kinds += sorted(str(path.parent) for path in folder.rglob("tokenizer.json"))
    kind = draw.choice(kinds)
    if kind == "drawn":
        kind, tokenizer = draw_pipeline(draw)
    else:
        tokenizer = tiny_tokenizer(kind) if kind in TOKENIZER_KINDS else load(kind)
    done = [each for each in CHANGES if draw.random() < 0.15]
    for change in done:
        CHANGES[change](tokenizer)
    return " ".join([kind, *(f"({each})" for each in done)]), tokenizer


def load(folder: str) -> Any:
    """Load a real tokenizer: a new one, to be changed."""
    return AutoTokenizer.from_pretrained(folder)


CHANGES: dict[str, Callable[[Any], object]] = {
    "truncation": lambda tokenizer: tokenizer.backend_tokenizer.enable_truncation(3),
    "padding": lambda tokenizer: tokenizer.backend_tokenizer.enable_padding(length=9),
    "padded left": lambda tokenizer: setattr(tokenizer, "padding_side", "left"),
    "special tokens split": lambda tokenizer: setattr(tokenizer, "split_special_tokens", True),
    "added words": lambda tokenizer: tokenizer.add_tokens(
        ["film", "ab", "好", AddedToken("doesn", single_word=True), AddedToken("this", lstrip=True)]
    ),
    "added special tokens": lambda tokenizer: tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<ent>", AddedToken("=", rstrip=True, special=True)]}
    ),
}

# What pre-tokenizers and normalizers are made of; a pipeline is up to three of each.
SPLITS: list[Callable[[], Any]] = [
    pre_tokenizers.WhitespaceSplit,
    pre_tokenizers.Whitespace,
    pre_tokenizers.BertPreTokenizer,
    pre_tokenizers.UnicodeScripts,
    lambda: pre_tokenizers.Digits(individual_digits=True),
    lambda: pre_tokenizers.CharDelimiterSplit("-"),
    *(
        functools.partial(pre_tokenizers.Punctuation, behavior)
        for behavior in ("isolated", "removed", "merged_with_previous", "contiguous")
    ),
    *(
        functools.partial(pre_tokenizers.Split, Regex(pattern), behavior)
        for pattern in (r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\p{L}+|\s+", r"\s*[\r\n]+", r"\s+(?!\S)")
        for behavior in ("isolated", "merged_with_next")
    ),
]
NORMALIZERS: list[Callable[[], Any]] = [
    normalizers.NFC,
    normalizers.NFKD,
    normalizers.Lowercase,
    normalizers.StripAccents,
    normalizers.Strip,
    normalizers.BertNormalizer,
    lambda: normalizers.Replace(Regex(r"\s{2,}|[\n\r\t]"), " "),
    lambda: normalizers.Replace(Regex(r"\p{Cf}"), ""),
]


@functools.cache
def alphabet() -> dict[str, int]:
    """A vocabulary of bytes, and of some tokens that are longer."""
    return {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}


def draw_pipeline(draw: Random) -> tuple[str, Any]:
    """Make a byte-level tokenizer that normalises and splits in a way that nobody thought of."""
    before = [draw.choice(NORMALIZERS)() for _ in range(draw.choice([0, 0, 1, 2, 3]))]
    splits = [draw.choice(SPLITS)() for _ in range(draw.choice([0, 1, 1, 2, 3]))]
    vocab = dict(alphabet())
    pairs = [pair for word in ("film", "the", "0x") for pair in pairwise(word)]
    pairs += [("Ġ", "f"), ("Ġ", "t"), ("Ċ", "Ċ"), ("Ġ", "Ġ"), (".", "Ġ"), ("m", "Ġ")]
    for token in (*map("".join, pairs), *("[PAD]", "[CLS]", "[SEP]", "[MASK]")):
        vocab.setdefault(token, len(vocab))
    backend = Tokenizer(BPE(vocab, list(dict.fromkeys(pairs))))
    backend.normalizer = normalizers.Sequence(before)
    trims, spaces = draw.random() < 0.5, draw.random() < 0.3
    regex = draw.random() < 0.3
    level = pre_tokenizers.ByteLevel(add_prefix_space=spaces, trim_offsets=trims, use_regex=regex)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, level])
    roles = ("pad", "cls", "sep", "mask")
    tokens = {f"{role}_token": f"[{role.upper()}]" for role in roles}
    names = [type(each).__name__ for each in chain(before, splits)]
    return f"drawn {names}", PreTrainedTokenizerFast(tokenizer_object=backend, **tokens)
