"""The model card tells what happened, to people and to the hub, and nothing of this machine."""

from __future__ import annotations

import getpass
import re
import shutil
import sys
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest
import torch
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from tokenizers import AddedToken
from transformers import AutoModelForMaskedLM, AutoTokenizer

from mlmadapt import WholeWordMaskingCollator, sparse_prediction
from mlmadapt.testing import tiny_model, tiny_tokenizer
from mlmadapt.training.model_card import fill_masks, hub_name
from tests.scripts.short_run import freeze, global_states, make_rows
from tests.scripts.tiny_run import SAVING, TinyRun, equal, weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from mlmadapt import TrainingResult

PROBES = ["This is a great [MASK].", "The film | is *not* <b>[MASK]</b> & a_b _c_ `d`!"]


class Run(TinyRun):
    """A run that learns fast, with a card."""

    def train(self, eval_rows: Any = None, /, **settings: Any) -> TrainingResult:
        """Train, and evaluate on some rows."""
        self.eval_rows = eval_rows
        return super().train(**{"learning_rate": 1e-2, **settings})

    @property
    def card(self) -> Card:
        """What lies in the folder."""
        return Card(self.folder)


class Card:
    """A card as a reader sees it."""

    def __init__(self, folder: Path) -> None:
        self.text = (folder / "README.md").read_text(encoding="utf-8")
        self.data = ModelCard.load(folder / "README.md").data
        self.tables: dict[str, list[list[str]]] = {}
        tokens = MarkdownIt("commonmark").enable("table").parse(self.text.split("---\n", 2)[2])
        heading = ""
        for place, token in enumerate(tokens):
            if token.type == "heading_open":
                heading = shown(tokens[place + 1])
            elif token.type == "tr_open":
                self.tables.setdefault(heading, []).append([])
            elif token.type == "inline" and tokens[place - 1].type in ("th_open", "td_open"):
                self.tables[heading][-1].append(shown(token))

    def settings(self, title: str) -> dict[str, str]:
        """Return a table of two columns."""
        return {row[0]: row[1] for row in self.tables[title]}


def shown(token: Any) -> str:
    """Return the text of a line of Markdown; signs that are left in it are an error."""
    assert {child.type for child in token.children} <= {"text", "text_special"}, token.content
    return "".join(child.content for child in token.children)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run into a new folder."""
    return Run(tmp_path / "out")


def test_the_card_tells_what_the_result_says(run: Run) -> None:
    """Perplexity before and after for each set, by its name, and how it was trained."""
    sets = {"domain": freeze(make_rows(5, seed=1)), "general": freeze(make_rows(7, seed=2))}
    result = run.train(sets, weight_decay=0.25)
    rows = run.card.tables["Evaluation"][1:]
    assert [row[:2] for row in rows] == [
        ["eval_domain", "before"],
        ["eval_domain", "after"],
        ["eval_general", "before"],
        ["eval_general", "after"],
    ]
    assert result.initial is not None
    assert result.final is not None
    for row, metrics in zip(rows, (result.initial, result.final), strict=False):
        assert row[2:] == [
            f"{metrics.perplexity:.2f}",
            f"{metrics.loss:.4f}",
            f"{metrics.accuracy:.1%}",
            f"{metrics.top5_accuracy:.1%}",
            f"{metrics.masked_tokens}",
        ]
    training = run.card.settings("Training")
    assert training["weight_decay"] == "0.25"
    assert training["learning_rate"] == "0.01"
    assert training["mixed_precision"] == "no"
    assert training["train_dataset"].startswith(f"rows {len(run.rows)}, content list ")
    assert training["rows per step (processes x batch x accumulation)"] == "4"
    assert f"{result.global_step} steps, {result.tokens_seen:,} tokens" in run.card.text
    assert run.card.settings("Versions")["torch"] == version("torch")


def test_the_hub_can_read_it(run: Run) -> None:
    """Its own classes load the metadata: what the model is for, and a result for each set."""
    run.model.name_or_path = "distilbert/distilbert-base-uncased"
    result = run.train(freeze(make_rows(5)), dataset_name="stanfordnlp/imdb")
    data = run.card.data
    assert data.base_model == "distilbert/distilbert-base-uncased"
    assert data.datasets == "stanfordnlp/imdb"
    assert (data.library_name, data.pipeline_tag) == ("transformers", "fill-mask")
    (measured,) = data.eval_results
    assert measured.dataset_name == measured.dataset_type == "stanfordnlp/imdb"
    assert measured.metric_type == "perplexity"
    assert result.final is not None
    assert measured.metric_value == result.final.perplexity
    title = "distilbert/distilbert-base-uncased, adapted to stanfordnlp/imdb"
    assert f"\n# {title}\n" in run.card.text


@pytest.mark.parametrize(
    ("named", "sets", "shown"),
    [
        ("film reviews", 1, [("film reviews", "eval")]),
        (None, 1, [("eval", "eval")]),
        # The hub merges results of one dataset; and which set is of the named data, nobody said.
        ("stanfordnlp/imdb", 2, [("eval_a", "eval_a"), ("eval_b", "eval_b")]),
    ],
)
def test_a_result_is_of_the_data_that_was_named(
    run: Run, named: Any, sets: int, shown: Any
) -> None:
    """In words that are no name on the hub, too; what has no name is called as in the history."""
    rows = freeze(make_rows(5))
    run.train(rows if sets == 1 else {"a": rows, "b": rows}, dataset_name=named)
    results = run.card.data.eval_results
    assert [(measured.dataset_name, measured.dataset_type) for measured in results] == shown


@pytest.mark.parametrize(
    ("collator", "expected"),
    [
        (lambda t: WholeWordMaskingCollator(t, wwm_probability=0.3, seed=5), {"seed": "5"}),
        (lambda t: WholeWordMaskingCollator(t, word_weights=len), {"word_weights": "builtin"}),
    ],
)
def test_masking_is_told(run: Run, collator: Any, expected: dict[str, str]) -> None:
    """The collator's settings; of what is no number or text, the kind."""
    run.collator = collator(run.tokenizer)
    run.train()
    masking = run.card.settings("Masking")
    assert next(iter(masking)) == "WholeWordMaskingCollator"
    assert masking["wwm_probability"] == str(run.collator.wwm_probability)
    assert all(masking[name].startswith(value) for name, value in expected.items())
    assert "tokenizer" not in masking


def test_nothing_of_this_machine_is_on_it(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No path, user or token, in the card or in any file that would be pushed with it."""
    monkeypatch.setenv("HF_TOKEN", "hf_verysecret")
    local = tmp_path / "somebody" / "start"
    run.model.save_pretrained(local)
    run.tokenizer.save_pretrained(local)
    run.model = AutoModelForMaskedLM.from_pretrained(local)
    run.tokenizer = AutoTokenizer.from_pretrained(local)
    texts = tmp_path / "somebody" / "notes.txt"
    texts.write_text("private")
    run.train(freeze(make_rows(5)), dataset_name=str(texts), fill_mask=PROBES)
    assert "adapted to notes.txt" in run.card.text
    assert run.card.data.base_model is None
    assert run.card.data.datasets is None
    secrets = ["somebody", "hf_verysecret", str(tmp_path), str(Path.cwd()), str(Path.home())]
    user = getpass.getuser()
    for path in run.folder.iterdir():
        content = path.read_bytes().decode("latin-1")
        assert not [secret for secret in secrets if secret in content], path.name
        if path.name == "README.md":
            assert user not in re.findall(r"\w+", content)


def test_names_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What could be one, and is no folder here."""
    monkeypatch.chdir(tmp_path)
    Path("models").mkdir()
    names = ["distilbert/distilbert-base-uncased", "gpt2"]
    others = ["", "/home/somebody/model", "./model", "a/b/c", "models", r"C:\models\mine"]
    assert [hub_name(name) for name in names + others] == names + [None] * len(others)


def test_masks_are_filled_in_before_and_after(run: Run) -> None:
    """By the model as it came, and as it was saved; Markdown's signs in a sentence stay signs."""
    before = fill_masks(run.model, PROBES, tokenizer=run.tokenizer)
    run.train(fill_mask=PROBES)
    after = fill_masks(
        AutoModelForMaskedLM.from_pretrained(run.folder), PROBES, tokenizer=run.tokenizer
    )
    assert before != after
    assert run.card.tables["Masks filled in"] == [
        ["sentence", "before", "after"],
        *([sentence, before[sentence], after[sentence]] for sentence in PROBES),
    ]


def test_filling_masks_changes_nothing_about_the_training(tmp_path: Path) -> None:
    """Dropout and masks are drawn as without them, so weights are equal to the bit."""
    trained = []
    for name, sentences in (("without", None), ("with", PROBES)):
        run = Run(tmp_path / name)
        run.train(freeze(make_rows(5)), fill_mask=sentences)
        trained.append(weights(run.model))
    assert equal(*trained)


@pytest.mark.parametrize(
    ("sentence", "message"),
    [
        ("No gap.", r"fill_mask has 'No gap\.' with 0 masks; each sentence must have one \[MASK\]"),
        ("[MASK] [MASK]", r"fill_mask has '\[MASK\] \[MASK\]' with 2 masks"),
        (
            "film " * 600 + "[MASK]",
            "fill_mask has a row of 603 tokens, the model has positions for 512; shorten it",
        ),
    ],
)
def test_a_sentence_that_does_not_fit_is_told_before_the_first_step(
    run: Run, sentence: str, message: str
) -> None:
    """And before the output folder is touched; two masks would be filled in as if one were not."""
    with pytest.raises(ValueError, match=message):
        run.train(fill_mask=["a [MASK]", sentence])
    assert not run.folder.exists()


def test_a_resumed_run_has_the_same_card(run: Run) -> None:
    """What was before the first step is what the interrupted run began with, to the letter."""
    rows = freeze(make_rows(5))
    run.train(rows, **SAVING, fill_mask=PROBES)
    whole = run.card
    for step in (2, 3):
        shutil.rmtree(run.folder / f"checkpoint-{step}")
    sentences = [*PROBES, "A late [MASK]"]
    run.model = tiny_model(run.tokenizer)
    run.train(rows, **SAVING, fill_mask=sentences, resume_from_checkpoint=True)
    filled = run.card.tables["Masks filled in"]
    assert filled.pop()[:2] == ["A late [MASK]", "(asked later)"]
    assert filled == whole.tables["Masks filled in"]
    lines = [line for line in run.card.text.splitlines() if "A late" not in line]
    assert lines == whole.text.splitlines()


def test_the_card_of_the_best_model_tells_of_it(run: Run) -> None:
    """Not of the last one, which was not saved."""
    result = run.train(
        freeze(make_rows(5, seed=1)),
        learning_rate=0.3,
        lr_scheduler_type="constant",
        num_train_epochs=8,
        save_strategy="epoch",
        load_best_model_at_end=True,
        fill_mask=PROBES[:1],
    )
    evaluations = [entry for entry in result.history if "eval_loss" in entry]
    best = min(evaluations[1:], key=lambda entry: entry["eval_loss"])
    assert best["step"] < result.global_step
    assert f"Saved is the model of step {best['step']}, which had" in run.card.text
    assert run.card.tables["Evaluation"][2][2] == f"{best['eval_perplexity']:.2f}"
    (words,) = fill_masks(run.model, PROBES[:1], tokenizer=run.tokenizer).values()
    assert run.card.tables["Masks filled in"][1][2] == words


def test_objects_of_the_callers_own_are_named(run: Run) -> None:
    """In place of settings that they have overruled."""
    optimizer = torch.optim.SGD(run.model.parameters(), lr=0.5)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    run.objects = {"optimizer": optimizer, "lr_scheduler": schedule}
    run.train()
    training = run.card.settings("Training")
    assert (training["optimizer"], training["lr_scheduler"]) == ("SGD", "LambdaLR")
    overruled = {"learning_rate", "weight_decay", "lr_scheduler_type", "warmup_steps", "max_steps"}
    assert overruled.isdisjoint(training)
    assert training["num_train_epochs"] == "1"


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:Could not find a config file in:UserWarning")
def test_an_adapter_is_called_one(run: Run) -> None:
    """Its card takes the place of PEFT's, and names the library that loads it."""
    run.model.name_or_path = "google-bert/bert-base-uncased"
    run.adapt()
    run.train(fill_mask=PROBES)
    assert run.card.data.library_name == "peft"
    assert run.card.data.base_model == "google-bert/bert-base-uncased"
    assert "An adapter of `BertForMaskedLM` of " in run.card.text


def test_the_curves_are_there_if_matplotlib_is(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Without it, or where it cannot draw, the card is written all the same."""
    run.train()
    assert "](curves.png)" in run.card.text
    assert (run.folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    without = Run(tmp_path / "without")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    without.train()
    assert "curves" not in without.card.text
    assert not (without.folder / "curves.png").exists()
    assert set(without.card.tables) == {"Masking", "Training", "Versions"}
    assert "curves" not in caplog.text
    broken = Run(tmp_path / "broken")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", Broken())
    broken.train()
    assert "curves" not in broken.card.text
    assert "the model card has no curves: no LaTeX" in caplog.text


class Broken(ModuleType):
    """A matplotlib that is set up to draw text with a program that is not there."""

    def __init__(self) -> None:
        super().__init__("matplotlib.figure")

    def Figure(self, **_: Any) -> None:  # noqa: N802
        """Fail."""
        raise RuntimeError("no LaTeX")


SENTENCES = ["This is a great [MASK].", "[MASK] film", "The story is [MASK] boring, I think!"]


def guess(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, sentence: str) -> str:
    """Fill a mask in the plainest way: the tokenizer's own call, all logits, a sort."""
    encoding = tokenizer(sentence.replace("[MASK]", tokenizer.mask_token), return_tensors="pt")
    (place,) = (encoding["input_ids"][0] == tokenizer.mask_token_id).nonzero()
    with torch.no_grad():
        chances = model(**encoding).logits[0, place[0]].softmax(-1).tolist()
    best = sorted(range(len(chances)), key=lambda token: -chances[token])[:5]
    return ", ".join(f"{tokenizer.decode([i]).strip()} {chances[i]:.1%}" for i in best)


@pytest.mark.parametrize("is_sparse", [False, True])
def test_the_five_likeliest_words(tokenizer: PreTrainedTokenizerFast, *, is_sparse: bool) -> None:
    """As the whole head gives them, whatever the tokenizer calls its mask."""
    model = tiny_model(tokenizer)
    with torch.no_grad():  # random weights find all words about as likely
        model.get_output_embeddings().weight.mul_(50)
    expected = {sentence: guess(model, tokenizer, sentence) for sentence in SENTENCES}
    with sparse_prediction(model) if is_sparse else nullcontext():
        assert fill_masks(model, SENTENCES, tokenizer=tokenizer) == expected
        theirs = [sentence.replace("[MASK]", tokenizer.mask_token) for sentence in SENTENCES]
        filled = fill_masks(model, theirs, tokenizer=tokenizer)
    assert list(filled.values()) == list(expected.values())


@pytest.mark.parametrize("kind", ["byte_bpe", "unigram", "unigram_offsets", "wordpiece"])
@pytest.mark.parametrize("lstrip", [False, True])
def test_a_model_is_asked_as_it_was_trained(kind: str, *, lstrip: bool) -> None:
    """The mask stands in place of a word's token; a space before it is no token of its own."""
    tokenizer = tiny_tokenizer(kind)
    mask = str(tokenizer.mask_token)
    tokenizer.add_special_tokens({"mask_token": AddedToken(mask, lstrip=lstrip)})
    model, asked = tiny_model(tokenizer), []
    model.register_forward_pre_hook(
        lambda _, __, inputs: asked.append(inputs["input_ids"][0].tolist()), with_kwargs=True
    )
    for before, after in (("This story is", "and good"), ("the", ""), ("The", "story")):
        sentence = f"{before} [MASK] {after}".strip()
        fill_masks(model, [sentence], tokenizer=tokenizer)
        trained = tokenizer(sentence.replace("[MASK]", "film"))["input_ids"]
        (film,) = tokenizer(f"{before and 'x '}film", add_special_tokens=False)["input_ids"][-1:]
        place = trained.index(film)
        assert asked.pop() == [*trained[:place], tokenizer.mask_token_id, *trained[place + 1 :]]


def test_asking_moves_nothing(bert: PreTrainedModel, wordpiece: PreTrainedTokenizerFast) -> None:
    """Neither mode nor generators nor the tokenizer's own padding and truncation."""
    wordpiece.backend_tokenizer.enable_padding(length=9)
    wordpiece.backend_tokenizer.enable_truncation(4)
    state, states = wordpiece.backend_tokenizer.to_str(), global_states()
    bert.train()
    first = fill_masks(bert, SENTENCES, tokenizer=wordpiece)
    assert fill_masks(bert, SENTENCES, tokenizer=wordpiece) == first
    assert bert.training
    assert global_states() == states
    assert wordpiece.backend_tokenizer.to_str() == state
