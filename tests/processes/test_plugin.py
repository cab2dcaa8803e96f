"""The pytest plugin: what it gives to a test, and what it costs those who ask for nothing."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import mlmadapt

PLUGIN = "mlmadapt._pytest_plugin"
IS_INSTALLED = any(
    entry.value == PLUGIN for entry in importlib.metadata.entry_points(group="pytest11")
)
LOAD = [] if IS_INSTALLED else ["-p", PLUGIN]
FIXTURES = """
import pytest
from mlmadapt.testing import tiny_tokenizer

before = []

def test_defaults_are_wordpiece_and_bert(mlmadapt_tokenizer, mlmadapt_model):
    assert mlmadapt_tokenizer.tokenize("unwatchable")[1].startswith("##")
    assert type(mlmadapt_model).__name__ == "BertForMaskedLM"
    assert mlmadapt_model.config.vocab_size == len(mlmadapt_tokenizer)
    before.extend([mlmadapt_tokenizer, mlmadapt_model])

def test_each_test_has_its_own(mlmadapt_tokenizer, mlmadapt_model):
    assert mlmadapt_tokenizer is not before[0]
    assert mlmadapt_model is not before[1]

@pytest.mark.parametrize("mlmadapt_tokenizer", ["byte_bpe", "chinese"], indirect=True)
@pytest.mark.parametrize("mlmadapt_model", ["distilbert"], indirect=True)
def test_both_can_be_chosen(request, mlmadapt_tokenizer, mlmadapt_model):
    kind = request.node.callspec.params["mlmadapt_tokenizer"]
    assert mlmadapt_tokenizer.get_vocab() == tiny_tokenizer(kind).get_vocab()
    assert type(mlmadapt_model).__name__ == "DistilBertForMaskedLM"
    assert mlmadapt_model.config.vocab_size == len(mlmadapt_tokenizer)
"""


def run(folder: Path, code: str, *arguments: str) -> str:
    """Run Python in a folder of its own and return what it printed."""
    paths = [str(Path(mlmadapt.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
        text=True,
        timeout=300,
    )
    return done.stdout


def test_a_start_loads_the_plugin_alone(tmp_path: Path) -> None:
    """With the plugin, pytest starts with two small modules more, and fixtures load the rest."""
    script = (
        "import sys, pytest\n"
        "class Probe:\n"
        "    def pytest_configure(self):\n"
        "        print('modules', *sys.modules)\n"
        "pytest.main(sys.argv[1:], plugins=[Probe()])\n"
    )

    def modules(*arguments: str) -> set[str]:
        lines = run(tmp_path, script, "-p", "no:cacheprovider", *arguments).splitlines()
        (line,) = [line for line in lines if line.startswith("modules ")]
        return set(line.split())

    assert modules(*LOAD) - modules("-p", "no:mlmadapt") == {"mlmadapt", PLUGIN}


def test_fixtures_fit_each_other_and_can_be_chosen(tmp_path: Path) -> None:
    """A project's tests get a tokenizer and a model for it, their own each time."""
    (tmp_path / "test_fixtures.py").write_text(FIXTURES)
    main = "import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))"
    said = run(tmp_path, main, *LOAD, "-q", "-p", "no:cacheprovider")
    assert "4 passed" in said, said


def test_the_plugin_is_declared() -> None:
    """The entry point leads to the module that is tested here."""
    project = tomllib.loads(Path(__file__).parents[2].joinpath("pyproject.toml").read_text())
    assert project["project"]["entry-points"]["pytest11"] == {"mlmadapt": PLUGIN}
