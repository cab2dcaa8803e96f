"""The studies run end to end on tiny material, and their tables have the rows they should have."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mlmadapt.testing import tiny_corpus, tiny_model, tiny_tokenizer

# Twenty seconds, for scripts that are run by hand and for hours.
pytestmark = pytest.mark.slow

FOLDER = Path(__file__).resolve().parents[1] / "examples" / "evidence"
STUDIES = {
    "forgetting": [],
    "mask_rate": [],
    "perplexity_by_step": [],
    "vocabulary": ["--corpora", "abstracts", "--seeds", 0],
    "short_documents": ["--seeds", 0, "--train_rows", 32],
    "sentiment": ["--labels", 8, 16, "--test_reviews", 10, "--steps", 2],
    "whole_word_or_token": [],
}
UNITS = ("words", "tokens")
# All in one process, at the price of one import of everything.
RUN = """
import contextlib, json, runpy, sys
sys.path.insert(0, sys.argv[1])
for script, output, *options in json.loads(sys.argv[2]):
    sys.argv = [script, *options]
    with open(output, "w", encoding="utf-8") as file, contextlib.redirect_stdout(file):
        runpy.run_path(script, run_name="__main__")
"""


def write_texts(folder: Path, seed: int) -> None:
    """Write both files of a corpus, one text of which is in both."""
    folder.mkdir(parents=True)
    texts = tiny_corpus(600, seed=seed)
    both = " ".join(texts[:6])
    for name, some in (("train", texts[6:400]), ("test", texts[400:])):
        documents = [both, *(" ".join(some[i : i + 6]) for i in range(0, len(some), 6))]
        columns = {"text": documents, "label": [i % 2 for i in range(len(documents))]}
        pq.write_table(pa.table(columns), folder / f"{name}.parquet")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the studies leave behind: a section each, the figures, adapted models, a picture."""
    pytest.importorskip("matplotlib")
    folder = tmp_path_factory.mktemp("evidence")
    tokenizer = tiny_tokenizer()
    for saved in (tokenizer, tiny_model(tokenizer)):
        saved.save_pretrained(folder / "data" / "models" / "bert-tiny-mlm")
    write_texts(folder / "data" / "imdb", seed=0)
    write_texts(folder / "data" / "corpora" / "general_wikisplit", seed=1)
    write_texts(folder / "data" / "corpora" / "biomed_abstracts", seed=2)
    common = ["--data", folder / "data", "--models", folder / "models", "--pictures", folder]
    common += ["--output", folder / "figures.jsonl", "--seeds", 0, 1]
    common += ["--train_rows", 96, "--held_out_rows", 8]
    runs = [
        [*map(str, (FOLDER / f"{name}.py", folder / f"{name}.md", *common, *options))]
        for name, options in STUDIES.items()
    ]
    ended = subprocess.run(
        [sys.executable, "-W", "error", "-c", RUN, str(FOLDER), json.dumps(runs)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    return folder


def read_table(folder: Path, name: str) -> list[list[str]]:
    """Return the cells of the first table of a section, its head first."""
    section = (folder / f"{name}.md").read_text(encoding="utf-8")
    (table, *_) = re.findall(r"(?:^\|.*\n)+", section, re.MULTILINE)
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


@pytest.mark.parametrize(
    ("name", "columns", "rows"),
    [
        (
            "forgetting",
            [f"{name}, {unit} masked" for name in ("reviews", "general") for unit in UNITS],
            ["before", "reviews alone", "with 20% general text"],
        ),
        (
            "mask_rate",
            ["15% masked"],
            ["before", "20 % throughout", "30 %, then 15 % in the last fifth"],
        ),
        (
            "perplexity_by_step",
            ["0 steps", *(f"{percent}% of steps" for percent in (20, 40, 60, 80, 100))],
            ["recipe", "ours, equal steps", "ours, equal time"],
        ),
        (
            "sentiment",
            ["before", "after", "difference"],
            [
                f"{way}, {labels} labels"
                for labels in (8, 16)
                for way in ("logistic regression", "fine-tuned")
            ],
        ),
        ("short_documents", ["sentences", "reviews"], ["before", "joined", "packed", "padded"]),
        (
            "vocabulary",
            [
                *("added words", "other words", "general text", "bits per byte"),
                *("tokens per document", "steps", "CPU seconds"),
            ],
            [
                *("before", "before, new words", "old words"),
                *("new words, same documents", "new words, same steps", "new words, same time"),
            ],
        ),
        (
            "whole_word_or_token",
            ["whole words masked", "single tokens masked"],
            ["before", "adapted, whole words", "adapted, single tokens"],
        ),
    ],
)
def test_a_study(folder: Path, name: str, columns: list[str], rows: list[str]) -> None:
    """Its table has a figure for each, and the file of figures one for each seed."""
    head, _, *lines = read_table(folder, name)
    assert head[1:] == columns
    assert [line[0] for line in lines] == rows
    for line in lines:
        for cell in line[1:]:
            assert re.fullmatch(r"[+-]?[\d,.]+( ± [\d.]+| \([\d.]+ to [\d.]+\))?", cell)
    saved = (folder / "figures.jsonl").read_text(encoding="utf-8").splitlines()
    (figures,) = [line for line in map(json.loads, saved) if line["study"] == name]
    assert figures["seeds"] == ([0] if "--seeds" in STUDIES[name] else [0, 1])


def test_models_are_shared(folder: Path) -> None:
    """A model that several studies need is trained once."""
    kinds = ["imdb-words", "imdb-tokens", "mix-words"]
    kinds += ["imdb-30-then-15-words"]
    expected = {"vocabulary"} | {
        f"{kind}-96-rows-2-steps-seed-{seed}" for kind in kinds for seed in (0, 1)
    }
    expected |= {
        f"{corpus}-{way}-2-steps-0"
        for corpus in ("general_wikisplit", "imdb")
        for way in ("joined", "packed", "padded")
    }
    assert {path.name for path in (folder / "models").iterdir()} == expected


def test_both_loops_are_on_one_clock(folder: Path) -> None:
    """They start from one model, are looked at after the same steps, and learn."""
    saved = map(json.loads, (folder / "figures.jsonl").read_text(encoding="utf-8").splitlines())
    (runs,) = [line["runs"] for line in saved if line["study"] == "perplexity_by_step"]
    for recipe, ours in zip(runs["recipe"], runs["ours, equal steps"], strict=True):
        assert recipe[0]["perplexity"] == ours[0]["perplexity"]
        assert [point["step"] for point in recipe] == [0, 0, 1, 1, 2, 2]
        assert [point["step"] for point in ours] == [0, 0, 1, 1, 2, 2]
        for run in (recipe, ours):
            assert run[-1]["perplexity"] < run[2]["perplexity"] < run[0]["perplexity"]
            assert 0 <= run[0]["seconds"] < run[2]["seconds"] < run[-1]["seconds"]
        # By the recipe's own evaluation, which is right to this extent on rows of one length.
        assert recipe[-1]["own"] == pytest.approx(recipe[-1]["perplexity"], rel=0.01)


def test_the_picture_takes_the_color_of_its_page(folder: Path) -> None:
    """It is one element, with no black in it."""
    picture = (folder / "perplexity_by_step.svg").read_text(encoding="utf-8")
    assert picture.startswith("<svg")
    assert "currentColor" in picture
    assert set(re.findall(r"#[0-9a-f]{6}\b", picture)) == {
        "#c2410c",
        "#3b82f6",
        "#0d9488",
        "#888888",
    }


def test_the_session_runs_every_study() -> None:
    """In an order of its own, so that a new study has to be put in its place."""
    text = (FOLDER.parents[1] / "noxfile.py").read_text(encoding="utf-8")
    lists = re.findall(r"^STUDIES \+?= \[(.*)\]$", text, re.MULTILINE)
    listed = [name for names in lists for name in re.findall(r"\w+", names)]
    scripts = {path.stem for path in FOLDER.glob("[a-z]*.py")}
    assert sorted(listed) == sorted(scripts)
