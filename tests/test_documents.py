"""README and documentation are executed, block by block, as a reader would."""

from __future__ import annotations

import doctest
from pathlib import Path

import pytest
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser

from mlmadapt.testing import tiny_corpus, tiny_model, tiny_tokenizer

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


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


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
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
        "testing-your-project.md",
        "whole-word-masking.md",
    }
