"""What all tests share: no network, no caches but their own, repeatable Hypothesis, tiny models."""

from __future__ import annotations

import gc
import multiprocessing
import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

from mlmadapt.testing import TOKENIZER_KINDS, tiny_model, tiny_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from tests.scripts.tiny_run import TinyRun

# Read by the Hugging Face libraries when they are imported, which nothing above does.
os.environ["HF_HUB_OFFLINE"] = "1"
# `datasets` recognises a mapped function by its name, not its code: rows in a cache that outlives
# the session may come from code that is gone. Through the environment it holds in subprocesses too.
_DATASETS_CACHE = tempfile.TemporaryDirectory(prefix="mlmadapt-datasets-")
os.environ["HF_DATASETS_CACHE"] = _DATASETS_CACHE.name
# Tiny models gain nothing from a second thread, and on a busy machine threads wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A process of "forkserver" begins with nothing of its parent, as a spawned one does, at the price
# of a fork: the server loads once what takes seconds.
multiprocessing.set_forkserver_preload(["mlmadapt.masking.collator", "transformers.trainer"])

# It changes each process that imports it for good.
collect_ignore = ["scripts/pretend_device.py"]

settings.register_profile(
    "mlmadapt",
    derandomize=True,
    deadline=None,
    max_examples=50,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile("thorough", settings.get_profile("mlmadapt"), max_examples=500)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "mlmadapt"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take longest, or one worker would end with them alone."""
    longest = ("test_example.py", "test_resume.py", "test_documents.py")
    items.sort(key=lambda item: item.path.name not in longest)


def pytest_collection_finish() -> None:
    """Have no test wait while what all of them import is looked through for garbage."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Leave nothing behind."""
    _DATASETS_CACHE.cleanup()


@pytest.fixture
def no_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs write no picture, as without matplotlib: it takes as long as the rest of a tiny run."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)


@pytest.fixture
def run(tmp_path: Path, no_curves: None) -> TinyRun:
    """A run of three steps into a new folder, to be changed."""
    from tests.scripts.tiny_run import TinyRun

    return TinyRun(tmp_path / "out")


@pytest.fixture(params=TOKENIZER_KINDS)
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    """Run the test once with a new tokenizer of every kind."""
    return tiny_tokenizer(request.param)


@pytest.fixture
def wordpiece() -> PreTrainedTokenizerFast:
    """A new BERT-like tokenizer."""
    return tiny_tokenizer("wordpiece")


@pytest.fixture
def bert(wordpiece: PreTrainedTokenizerFast) -> PreTrainedModel:
    """A new tiny BERT for the `wordpiece` tokenizer."""
    return tiny_model(wordpiece)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real corpora, models and tokenizers; without it the test is skipped."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    path = Path(os.environ.get("MLMADAPT_TEST_DATA", beside))
    if not path.is_dir():
        pytest.skip(f"no test data in {path}; set MLMADAPT_TEST_DATA to the folder that holds it")
    return path
