"""README and documentation are executed, block by block, as a reader would, and say what is so."""

from __future__ import annotations

import doctest
import importlib.util
import re
import tomllib
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser

import mlmadapt
from mlmadapt import TrainingConfig, WholeWordMaskingCollator, accelerate_train, testing
from mlmadapt.testing import tiny_corpus, tiny_model, tiny_tokenizer
from mlmadapt.training import fingerprint
from tests.scripts.processes import start

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    *sorted(ROOT.glob("*.md")),
    *(path for path in sorted((ROOT / "docs").rglob("*.md")) if "_build" not in path.parts),
]
REPOSITORY = (
    r"https://(?:github|raw\.githubusercontent)\.com/mlmadapt/mlmadapt/(?:(?:blob|tree)/)?main/"
)
documents = pytest.mark.parametrize(
    "document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix()
)


@pytest.fixture(name="hub_like_folder")
def _hub_like_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put a tiny model and corpus where the hub names of the documents lead when taken as paths."""
    tokenizer = tiny_tokenizer("wordpiece")
    model = tiny_model(tokenizer, architecture="distilbert")
    for saved in (tokenizer, model):
        saved.save_pretrained(tmp_path / "distilbert" / "distilbert-base-uncased")
    corpus = tmp_path / "stanfordnlp" / "imdb"
    corpus.mkdir(parents=True)
    lines = [" ".join(tiny_corpus(8, seed=seed)) for seed in range(40)]
    (corpus / "train.txt").write_text("\n".join(lines))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def blocks(document: Path) -> list[str]:
    """Return the Python blocks of a document."""
    return re.findall(r"```python\n(.*?)```", document.read_text(encoding="utf-8"), re.DOTALL)


# PEFT asks for it.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@documents
def test_blocks_run_and_print_what_they_say(document: Path, hub_like_folder: Path) -> None:
    """Each Python block of a document runs after those above it, and the tests in it pass."""
    parser = PythonCodeBlockParser(doctest_optionflags=doctest.ELLIPSIS)
    parsed = Sybil(parsers=[parser]).parse(document)
    for example in parsed.examples():
        example.evaluate()
    for name, value in parsed.namespace.items():
        if name.startswith("test_"):
            value(mlmadapt_tokenizer=tiny_tokenizer())


def test_documents_are_read_from_the_tree() -> None:
    """The list of documents is not empty, which would test nothing."""
    assert {path.name for path in DOCUMENTS} >= {
        "README.md",
        "whole-word-masking.md",
        "testing-your-project.md",
    }


@documents
def test_links_and_tests_are_there(document: Path) -> None:
    """Each link into the project leads to a file, in which each test that it names is."""
    text = document.read_text(encoding="utf-8")
    for label, target in re.findall(r"\[([^\]]+)\]\(([^)]+)\)", text):
        inside = re.match(REPOSITORY, target)
        if target.startswith(("https://", "#")) and not inside:
            continue
        place = re.split("[#?]", target)[0]
        path = ROOT / place[inside.end() :] if inside else document.parent / place
        assert path.exists(), f"{label} leads to {target}"
        for name in re.findall(r"\btest_\w+(?!\.py)\b", label):
            assert f"def {name}(" in path.read_text(encoding="utf-8"), f"{name} is not in {target}"


@pytest.mark.parametrize("page", ["several-processes", "resume", "your-own-loop"])
def test_what_dropout_changes_is_said_in_one_place(page: str) -> None:
    """Pages on processes point to it, and none says by itself what holds without dropout only."""
    text = (ROOT / "docs" / "how-to" / f"{page}.md").read_text(encoding="utf-8")
    heading = "## Another number of processes, with and without dropout\n"
    assert heading in (ROOT / "docs" / "reproducibility.md").read_text(encoding="utf-8")
    assert "reproducibility.md#another-number-of-processes-with-and-without-dropout)" in text
    for untrue in ("up to the last bits", "up\nto the last bits", "the same within 1e-5"):
        assert untrue not in text


def test_the_readme_reads_the_same_on_a_package_index() -> None:
    """No link is relative, each is into the repository of the metadata, and it is a short read."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)]+)\)", text):
        assert target.startswith("https://"), target
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for url in project["urls"].values():
        assert url.startswith("https://github.com/mlmadapt/mlmadapt")
    assert 90 <= len(text.splitlines()) <= 150
    glance = text.partition("## The API at a glance")[2].partition("\n## ")[0]
    named = {
        name
        for row in re.findall(r"^\| (`.+?) \|", glance, re.MULTILINE)
        for name in re.findall(r"`([\w.]+)`", row)
    }
    assert named == {*mlmadapt.__all__, "mlmadapt.testing"}


def test_every_file_is_in_the_tour() -> None:
    """The tour of the source names each file by its path, and no document names a missing one."""
    source = Path(mlmadapt.__file__).parent
    files = {path.relative_to(source).as_posix() for path in source.rglob("*.py")}
    rooms = {path.parent.name for path in source.glob("*/__init__.py")}
    pattern = rf"`((?:{'|'.join(sorted(rooms))})/\w+\.py)`"
    named = {
        path.name: set(re.findall(pattern, path.read_text(encoding="utf-8"))) for path in DOCUMENTS
    }
    assert {name for name in files if not Path(name).name.startswith("_")} == named[
        "CONTRIBUTING.md"
    ]
    for names in named.values():
        assert names <= files


def test_the_citation_is_of_this_version() -> None:
    """A release changes the version in both places."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == project["version"]
    assert citation["license"] == project["license"]
    assert citation["repository-code"] == project["urls"]["Homepage"]


def test_every_public_name_is_in_the_reference() -> None:
    """One by one, or as a member of its module."""
    pages = (ROOT / "docs" / "api").glob("*.md")
    page = "".join(path.read_text(encoding="utf-8") for path in pages)
    named = set(re.findall(r"^\.\. auto(?:class|data|function):: (\S+)$", page, re.MULTILINE))
    wholly = re.findall(r"^\.\. automodule:: (\S+)\n   :members:$", page, re.MULTILINE)
    assert wholly in ([], ["mlmadapt.testing"])
    public = {f"mlmadapt.{name}" for name in mlmadapt.__all__}
    if not wholly:
        public |= {f"mlmadapt.testing.{name}" for name in testing.__all__}
    # autodoc needs to be told of data that a module has from another.
    assert public == {name for name in named if name.rpartition(".")[0] not in wholly}


def test_what_may_change_in_a_resumed_run_is_listed() -> None:
    """Every setting is in one column of the table: refused, or free to change."""
    page = (ROOT / "docs" / "how-to" / "resume.md").read_text(encoding="utf-8")
    table = [line.split("|")[1:3] for line in page.splitlines() if line.startswith("| ")]
    settings = {field.name for field in fields(TrainingConfig)}
    rows = table[: next(i for i, row in enumerate(table) if "SIGTERM" in row[0])]
    refused, free = (settings & set(re.findall(r"`(\w+)`", str(cells))) for cells in zip(*rows))  # noqa: B905
    assert free == fingerprint._FREE
    assert refused == settings - free


def test_pictures_are_what_the_script_draws() -> None:
    """No picture is edited by hand, or left behind; those that are measured are on a page."""
    folder = ROOT / "docs" / "pictures"
    spec = importlib.util.spec_from_file_location("draw", folder / "draw.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    committed = {path.name: path.read_text(encoding="utf-8") for path in folder.glob("*.svg")}
    pages = [ROOT / "README.md", ROOT / "docs" / "benchmarks.md", ROOT / "docs" / "evidence.md"]
    text = "".join(page.read_text(encoding="utf-8") for page in pages)
    for name in set(re.findall(r"pictures/(\w+\.svg)", text)):
        del committed[name]
    assert script.pictures() == committed


# 16 rows a step, so that their order is of no account, and no dropout, which goes by it.
STEPS = """
from dataclasses import replace

def losses_of(batch_size, accumulation):
    model = tiny_model(tokenizer)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    settings = {"epochs": 3, "lr": 1e-3, "batch_size": batch_size, "accumulation": accumulation}
    by_place = replace(collator, key_column="place")
    numbered = [{**row, "place": place} for place, row in enumerate(rows[:16])]
    return train(model, numbered, frozen, tokenizer, by_place, **settings)
"""


@pytest.fixture(name="own_loop")
def _own_loop(tmp_path: Path) -> tuple[str, list[float]]:
    """Return the loop of the page, ready to be called, and the losses of `accelerate_train`."""
    loop, setup, _ = blocks(ROOT / "docs" / "how-to" / "your-own-loop.md")
    script = loop + setup + STEPS
    names: dict[str, Any] = {}
    exec(script, names)  # noqa: S102  # what the page says
    model = tiny_model(names["tokenizer"])
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    result = accelerate_train(
        model,
        names["rows"][:16],
        tokenizer=names["tokenizer"],
        data_collator=WholeWordMaskingCollator(names["tokenizer"], seed=42),
        config=TrainingConfig(
            output_dir=str(tmp_path / "ours"),
            per_device_train_batch_size=16,
            learning_rate=1e-3,
            logging_steps=1,
            save_strategy="no",
        ),
    )
    losses = [entry["loss"] for entry in result.history if "loss" in entry]
    assert len(losses) == 3
    return script, losses


@pytest.mark.parametrize("cut", [(16, 1), (8, 2), (5, 4)], ids=str)
def test_the_loop_of_ones_own_is_exact(
    own_loop: tuple[str, list[float]], cut: tuple[int, int]
) -> None:
    """The loop on the page has the losses of `accelerate_train`, however a step is cut up."""
    script, expected = own_loop
    names: dict[str, Any] = {}
    exec(script, names)  # noqa: S102
    assert names["losses_of"](*cut) == pytest.approx(expected, abs=1e-5)


@pytest.mark.distributed
def test_the_loop_of_ones_own_is_exact_on_two_processes(
    own_loop: tuple[str, list[float]],
) -> None:
    """The same, with the rows of a step shared out."""
    script, expected = own_loop
    script += "made = [losses_of(8, 1), losses_of(4, 2), losses_of(2, 4)]"
    for ended in start("execute", world=2, script=script, name="made"):
        assert ended.code == 0, ended.log
        for losses in ended.result:
            assert losses == pytest.approx(expected, abs=1e-5)


@pytest.mark.distributed
def test_the_script_for_several_processes_runs_on_two(hub_like_folder: Path) -> None:
    """Half as many steps as on one, told once."""
    (script,) = blocks(ROOT / "docs" / "how-to" / "several-processes.md")
    script = f"import os; os.chdir({str(hub_like_folder)!r})\n{script}\ndone = True"
    ended = start("execute", world=2, script=script, name="done")
    logs = [process.log for process in ended]
    assert {process.code for process in ended} == {0}, logs
    assert [re.findall(r"(\d+) steps, perplexity \d+", log) for log in logs] == [["4"], []]
