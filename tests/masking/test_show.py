"""What `show_masks` shows is what the batch holds, for every tokenizer, terminal and page."""

from __future__ import annotations

import html
import io
import re
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import DataCollatorForLanguageModeling

from mlmadapt import WholeWordMaskingCollator, insert_random_mask, show_masks
from mlmadapt.testing import tiny_corpus, tiny_rows, tiny_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TEXTS = ["The boring film wasn't unfilmable! 🎬 doesn't it?\nNo café.", "Great.", *tiny_corpus(8)]


def batch_of(tokens: list[str], seen: list[str], tokenizer: PreTrainedTokenizerFast) -> Any:
    """Write a batch of one row down: its tokens, and what the model sees; ``*`` marks a target."""
    labels = [
        tokenizer.convert_tokens_to_ids(token) if mark.startswith("*") else -100
        for token, mark in zip(tokens, seen, strict=True)
    ]
    inputs = [tokenizer.convert_tokens_to_ids(token.removeprefix("*")) for token in seen]
    return {"input_ids": [inputs], "labels": [labels]}


FATES = batch_of(
    ["[CLS]", "the", "b", "##or", "##ing", "film", "is", "great", "[SEP]"],
    ["[CLS]", "*[MASK]", "*[MASK]", "*[MASK]", "*[MASK]", "film", "*is", "*film", "[SEP]"],
    tiny_tokenizer(),
)


def test_each_fate_is_told_apart(wordpiece: PreTrainedTokenizerFast) -> None:
    """At a target, the true word and what the model sees; elsewhere the text."""
    assert str(show_masks(FATES, wordpiece)) == (
        "0: [CLS] {the -> [MASK]} {boring -> [MASK] [MASK] [MASK]} film {is -> is} {great -> film} "
        "[SEP]\n4 of 5 words: 2 masked, 1 replaced, 1 kept"
    )


def test_half_a_word_is_said(wordpiece: PreTrainedTokenizerFast) -> None:
    """It is what whole-word masking must not do, so it counts apart and shows in the text."""
    batch = batch_of(["b", "##or", "##ing", "film"], ["b", "*[MASK]", "##ing", "film"], wordpiece)
    assert str(show_masks(batch, wordpiece)) == (
        "0: b{or -> [MASK]}ing film\n1 of 2 words: 0 masked, 0 replaced, 0 kept, 1 in part"
    )


@pytest.mark.parametrize("return_tensors", ["pt", "np"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_words_are_those_of_the_features(
    tokenizer: PreTrainedTokenizerFast, return_tensors: Any, side: str
) -> None:
    """A target is a word of `word_ids`, whole, and the texts are those of the tokens, unpadded."""
    tokenizer.padding_side = side
    rows = tiny_rows(tokenizer, TEXTS)
    collator = WholeWordMaskingCollator(
        tokenizer, wwm_probability=0.5, mask_replace_prob=0.4, random_replace_prob=0.3, seed=3
    )
    batch = collator(rows, return_tensors=return_tensors)
    view = show_masks(batch, tokenizer, rows)
    tokens = np.asarray(batch["attention_mask"]) == 1
    for number, (row, words) in enumerate(zip(rows, view.rows, strict=True)):
        labels = np.asarray(batch["labels"][number])[tokens[number]]
        targets = {word for word, label in zip(row["word_ids"], labels, strict=True) if label >= 0}
        assert [len(word) for word in words] == [1] * len(words)
        assert sum(bool(word[0].seen) for word in words) == len(targets)
        in_words = sum(word[0].fate != "special" for word in words)
        assert in_words >= len(set(row["word_ids"]) - {-1})
        text = "".join(piece.space + piece.text for word in words for piece in word)
        expected = tokenizer.decode(row["input_ids"], clean_up_tokenization_spaces=False)
        assert squeeze(text) == squeeze(expected)


def squeeze(text: str) -> str:
    """Take out white space, and the signs that stand for it."""
    return re.sub(r"[\sĠĊ▁]", "", text)


def test_without_features_tokens_go_on_as_the_tokenizer_says(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    """No word is cut where it was masked as a whole."""
    rows = tiny_rows(tokenizer, ["The boring film was unfilmable"])
    batch = WholeWordMaskingCollator(tokenizer, wwm_probability=1.0)(rows)
    shown = str(show_masks(batch, tokenizer)).splitlines()[0]
    known = {"wordlevel": {"was", "film", "The"}}.get(
        type(tokenizer.backend_tokenizer.model).__name__.lower(), {"boring", "film", "unfilmable"}
    )
    assert known <= {word.strip() for word in re.findall(r"\{(\S+) ->", shown)}
    if type(tokenizer.backend_tokenizer.model).__name__ == "WordPiece":
        assert shown == str(show_masks(batch, tokenizer, rows)).splitlines()[0]


def test_neighbours_are_no_half_word() -> None:
    """A full stop without a space before it is not the rest of a word, nor is a special token."""
    tokenizer = tiny_tokenizer("byte_bpe")
    batch = batch_of(
        ["<s>", "T", "he", ".", "</s>"], ["<s>", "*T", "*<mask>", ".", "</s>"], tokenizer
    )
    assert show_masks(batch, tokenizer).rows[0][-1][0].fate == "special"
    assert str(show_masks(batch, tokenizer)) == (
        "0: <s>{The -> T<mask>}.</s>\n1 of 2 words: 1 masked, 0 replaced, 0 kept"
    )
    tokenizer = tiny_tokenizer("byte_bpe_nosplit")
    (row,) = tiny_rows(tokenizer, ["The\n"])
    words = show_masks({**row, "labels": [-100] * len(row["input_ids"])}, tokenizer).rows[0]
    assert [word[0].fate for word in words] == ["special", "", "", "special"]


def test_the_bytes_of_an_emoji_are_shown_as_tokens() -> None:
    """A part of a character has no text; a whole one has."""
    tokenizer = tiny_tokenizer("byte_bpe")
    (row,) = tiny_rows(tokenizer, ["🎬"])
    tokens = row["input_ids"]
    assert len(tokens) == 6
    labels = [-100, *tokens[1:3], -100, -100, -100]
    part = show_masks({"input_ids": [tokens], "labels": [labels]}, tokenizer, [row])
    assert str(part).startswith("0: <s>{ðŁ -> ðŁ}İ¬</s>\n1 of 1 words")
    labels = [-100, *tokens[1:5], -100]
    whole = show_masks({"input_ids": [tokens], "labels": [labels]}, tokenizer)
    assert str(whole).startswith("0: <s>{🎬 -> 🎬}</s>\n")


@pytest.mark.parametrize("prefix", ["masked_", ""])
@pytest.mark.parametrize("kind", [None, "torch", "numpy"])
def test_frozen_rows_show_as_they_come(
    wordpiece: PreTrainedTokenizerFast, prefix: str, kind: str | None
) -> None:
    """A slice of the dataset, a list of its rows or a single row, whatever prefix and format."""
    rows = tiny_rows(wordpiece, TEXTS)
    collator = WholeWordMaskingCollator(wordpiece)
    dataset = Dataset.from_list(rows)
    frozen = dataset.map(
        insert_random_mask, batched=True, fn_kwargs={"data_collator": collator, "prefix": prefix}
    ).with_format(kind)
    text = str(show_masks(frozen[:], wordpiece))
    assert text.splitlines()[0].count("{") >= 1
    assert str(show_masks(list(frozen), wordpiece, rows)) == text
    assert str(show_masks(frozen[0], wordpiece)).splitlines()[0] == text.splitlines()[0]


def test_batches_of_transformers_show_too(wordpiece: PreTrainedTokenizerFast) -> None:
    """Their collator masks tokens, and the words that it cuts are seen."""
    rows = tiny_rows(wordpiece, TEXTS)
    torch.manual_seed(0)
    plain = [{"input_ids": row["input_ids"]} for row in rows]
    batch = DataCollatorForLanguageModeling(wordpiece, mlm_probability=0.3)(plain)
    counts = str(show_masks(batch, wordpiece, rows)).splitlines()[-1]
    assert re.search(r"[1-9]\d* in part$", counts)


class Screen(io.StringIO):
    """A terminal, or what stands in for one."""

    def __init__(self, *, is_terminal: bool) -> None:
        super().__init__()
        self.isatty = lambda: is_terminal  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("is_terminal", "environment", "is_colored"),
    [
        (True, {}, True),
        (False, {}, False),
        (True, {"NO_COLOR": "1"}, False),
        (True, {"TERM": "dumb"}, False),
        (False, {"FORCE_COLOR": "1"}, True),
        (False, {"FORCE_COLOR": "1", "NO_COLOR": "1"}, False),
    ],
)
def test_color_is_for_terminals(
    wordpiece: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    is_terminal: bool,  # noqa: FBT001
    environment: dict[str, str],
    is_colored: bool,  # noqa: FBT001
) -> None:
    """And nothing is lost without it: what is left of the colored text is the plain one."""
    for name in ("NO_COLOR", "FORCE_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    view = show_masks(FATES, wordpiece)
    monkeypatch.setattr(sys, "stdout", Screen(is_terminal=is_terminal))
    text = str(view)
    assert ("\x1b[" in text) == is_colored
    assert repr(view) == text
    assert re.sub(r"\x1b\[[\d;]*m", "", text) == view.to_text(color=False)


def test_text_cannot_steer_a_terminal_or_a_page() -> None:
    """What stands in a document is shown, not obeyed; separators of lines too."""
    tokenizer = tiny_tokenizer("byte_bpe")
    ids = tokenizer("a\u2028b\u2029c", add_special_tokens=False)["input_ids"]
    one = {"input_ids": ids, "labels": [-100] * len(ids)}
    text = show_masks(one, tokenizer, [{"input_ids": ids, "word_ids": [0] * len(ids)}])
    assert text.to_text(color=False).splitlines()[0] == r"0: a\u2028b\u2029c"
    rows = tiny_rows(tokenizer, ["a\x1b[31mb <script>alert(1)</script> & \"'"])
    batch = WholeWordMaskingCollator(tokenizer, wwm_probability=0.5, seed=1)(rows)
    view = show_masks(batch, tokenizer, rows)
    assert "\x1b" not in view.to_text(color=False)
    assert r"\x1b" in view.to_text(color=False)
    page = view._repr_html_()
    assert "script>" not in re.sub(r"</?(div|p|span|s)\b[^<>]*>", "", page)
    assert set(re.findall(r"</?(\w+)", page)) <= {"div", "p", "span", "s"}
    assert "a\\x1b[31mb<script>" in squeeze(html.unescape(re.sub(r"<[^>]*>", "", page)))


def test_a_page_shows_what_the_text_does(wordpiece: PreTrainedTokenizerFast) -> None:
    """By fill, strike and line, not by color alone; what the model sees is a hover away."""
    page = show_masks(FATES, wordpiece)._repr_html_()
    assert page.count("; the model sees ") == 4
    assert 'title="masked; the model sees [MASK] [MASK] [MASK]">boring</span>' in page
    assert "<s>great</s> film</span>" in page
    assert 'title="kept; the model sees is">is</span>' in page
    assert "color:" not in page.replace("background:", "").replace("border-bottom:", "")


def test_wrong_input_is_told(wordpiece: PreTrainedTokenizerFast) -> None:
    """Rows without masks, features of other rows, features without words, no tokenizer."""
    rows = tiny_rows(wordpiece, TEXTS[:2])
    batch = WholeWordMaskingCollator(wordpiece)(rows)
    with pytest.raises(ValueError, match=r"batch has no labels, only \['input_ids', .* pass what"):
        show_masks(rows, wordpiece)
    with pytest.raises(ValueError, match=r"features \(2 rows\) have other tokens than batch"):
        show_masks(batch, wordpiece, rows[::-1])
    with pytest.raises(ValueError, match=r"features \(1 rows\) have other tokens than batch"):
        show_masks(batch, wordpiece, rows[:1])
    plain = [{"input_ids": row["input_ids"]} for row in rows]
    with pytest.raises(ValueError, match="row 0 of the batch has no 'word_ids', of columns"):
        show_masks(batch, wordpiece, plain)
    with pytest.raises(TypeError, match="tokenizer is None; pass the tokenizer that made the rows"):
        show_masks(ONE, None)  # type: ignore[arg-type]


def test_nothing_is_printed_and_nothing_changed(
    wordpiece: PreTrainedTokenizerFast, capfd: pytest.CaptureFixture[str]
) -> None:
    """The view is the caller's to print, and batch and rows are as before."""
    rows = tiny_rows(wordpiece, TEXTS)
    batch = WholeWordMaskingCollator(wordpiece)(rows)
    before = repr((batch, rows))
    show_masks(batch, wordpiece, rows)
    assert repr((batch, rows)) == before
    assert capfd.readouterr() == ("", "")


ONE = {"input_ids": [[2, 4, 3]], "labels": [[-100, 9, -100]]}


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({**ONE, "labels": [[-100, 9]]}, "row 0 has 3 'input_ids' but 2 'labels'"),
        ({**ONE, "labels": [[-100, float("nan"), 1]]}, "column 'labels' holds float64"),
        ({**ONE, "input_ids": [[2, 10**6, 3]]}, "has token id 1000000, .* ids 0 to "),
        ({**ONE, "labels": [[-100, -5, -100]]}, "has token id -5, .* ids 0 to "),
        ({"input_ids": [], "labels": []}, "batch has no rows"),
        ({"input_ids": np.empty((0, 3)), "labels": np.empty((0, 3))}, "batch has no rows"),
    ],
)
def test_batches_that_cannot_be_shown(
    wordpiece: PreTrainedTokenizerFast, batch: Any, message: str
) -> None:
    """What is wrong, and where."""
    with pytest.raises(ValueError, match=message):
        show_masks(batch, wordpiece)


def test_word_ids_of_nan_are_no_word(wordpiece: PreTrainedTokenizerFast) -> None:
    """As everywhere else."""
    features = [{"input_ids": [2, 9, 3], "word_ids": [np.nan, 0, np.nan]}]
    batch = WholeWordMaskingCollator(wordpiece)(features)
    assert "1 of 1 words" in str(show_masks(batch, wordpiece, features))
