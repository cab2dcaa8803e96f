"""A push to the hub: checked before, done after, and a failure that costs nothing.

The hub itself is not reached: its client is replaced where the library calls it.
"""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import huggingface_hub
import pytest
from huggingface_hub.utils import filter_repo_objects
from transformers import pipeline

from tests.scripts.tiny_run import SAVING, TinyRun

if TYPE_CHECKING:
    from mlmadapt import TrainingResult


class Hub:
    """Notes what it is asked for, in words that the real client understands."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.error: dict[str, Exception] = {}

    def __call__(self) -> Hub:
        """Stand in for ``HfApi()``."""
        return self

    def create_repo(self, repo_id: str, *, private: bool | None, exist_ok: bool) -> Any:
        """Make a repository, which is the caller's if no other owner is named."""
        client = inspect.signature(huggingface_hub.HfApi.create_repo)
        client.bind(self, repo_id, private=private, exist_ok=exist_ok)
        assert exist_ok
        self.calls.append(("create", {"repo_id": repo_id, "private": private}))
        if "create" in self.error:
            raise self.error["create"]
        return SimpleNamespace(repo_id=repo_id if "/" in repo_id else f"me/{repo_id}")

    def upload_folder(self, *, folder_path: str, allow_patterns: list[str], **rest: Any) -> None:
        """Note the files that would be uploaded."""
        client = inspect.signature(huggingface_hub.HfApi.upload_folder)
        client.bind(self, folder_path=folder_path, allow_patterns=allow_patterns, **rest)
        every = [
            path.relative_to(folder_path).as_posix()
            for path in Path(folder_path).rglob("*")
            if path.is_file()
        ]
        files = sorted(filter_repo_objects(every, allow_patterns=allow_patterns))
        self.calls.append(("upload", {"files": files, **rest}))
        if "upload" in self.error:
            raise self.error["upload"]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    """A hub that answers, and a user who has logged in."""
    hub = Hub()
    monkeypatch.setattr("mlmadapt.training.hub.HfApi", hub)
    monkeypatch.setattr("mlmadapt.training.hub.is_offline_mode", lambda: False)
    monkeypatch.setenv("HF_TOKEN", "hf_verysecret")
    return hub


class Run(TinyRun):
    """A run that is pushed."""

    def train(self, **settings: Any) -> TrainingResult:
        """Train."""
        return super().train(**{**SAVING, "push_to_hub": True, **settings})


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run into a new folder."""
    return Run(tmp_path / "adapted")


def test_what_was_saved_is_pushed_and_nothing_else(hub: Hub, run: Run) -> None:
    """Model, tokenizer, card and curves; no checkpoint, no lock, nothing of the caller's own."""
    folder = run.folder
    folder.mkdir()
    (folder / "train.log").write_text("mine")
    (folder / "runs").mkdir()
    (folder / "runs" / "README.md").write_text("a tracker's")
    run.train(overwrite=True, hub_private_repo=True)
    (_, early), (_, late), (what, upload) = hub.calls
    assert early == late == {"repo_id": "adapted", "private": True}
    assert what == "upload"
    assert upload["repo_id"] == "me/adapted"
    assert upload["files"] == [
        "README.md",
        "config.json",
        "curves.png",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert (folder / "checkpoint-3").exists()


def test_the_name_can_be_chosen_and_the_token_is_stored_nowhere(hub: Hub, run: Run) -> None:
    """Of the repository and its owner; neither the model's folder nor a checkpoint has a secret."""
    run.train(hub_model_id="team/film-bert")
    assert [call["repo_id"] for _, call in hub.calls] == ["team/film-bert"] * 3
    files = [path for path in run.folder.rglob("*") if path.is_file()]
    assert len(files) > 10
    assert not [path for path in files if b"hf_verysecret" in path.read_bytes()]
    assert "token" not in str(hub.calls).replace("tokenizer", "")


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ("offline", ValueError, "push_to_hub is True, but HF_HUB_OFFLINE is set"),
        ("no token", ValueError, "no token of the hub is stored; run 'hf auth login', or set"),
        ("refused", OSError, "403: not yours"),
    ],
)
def test_what_is_wrong_is_told_before_the_first_step(
    hub: Hub,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    *,
    wrong: str,
    error: type[Exception],
    message: str,
) -> None:
    """And before a file is written, or the checkpoints of the run before are removed."""
    if wrong == "offline":
        monkeypatch.setattr("mlmadapt.training.hub.is_offline_mode", lambda: True)
    elif wrong == "no token":
        monkeypatch.setattr("mlmadapt.training.hub.get_token", lambda: None)
    else:
        hub.error["create"] = OSError("403: not yours")
    with pytest.raises(error, match=message):
        run.train()
    assert not run.folder.exists()
    assert "upload" not in dict(hub.calls)


def test_a_name_that_cannot_be_one_is_refused_by_the_hubs_own_client(
    hub: Hub, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a request: HF_HUB_OFFLINE, under which all tests run, would refuse that."""
    monkeypatch.setattr("mlmadapt.training.hub.HfApi", huggingface_hub.HfApi)
    with pytest.raises(ValueError, match=r"Repo id must use alphanum.* 'my film model!'"):
        run.train(hub_model_id="my film model!")
    assert not run.folder.exists()


def test_a_failed_push_loses_nothing(hub: Hub, run: Run) -> None:
    """The model is there, a note says where, and the same call with resume pushes it."""
    hub.error["upload"] = ConnectionError("gone")
    with pytest.raises(ConnectionError, match="gone") as caught:
        run.train()
    (note,) = caught.value.__notes__
    assert re.match(r"The model is saved in '.*adapted'\. Call again with resume_from_check", note)
    assert len(pipeline("fill-mask", model=str(run.folder), device="cpu")("a [MASK]")) == 5
    assert (run.folder / "README.md").exists()
    hub.error.clear()
    hub.calls.clear()
    assert run.train(resume_from_checkpoint=True).global_step == 3
    assert [what for what, _ in hub.calls] == ["create", "create", "upload"]


def test_settings_of_the_push_may_change_at_a_resume(hub: Hub, run: Run) -> None:
    """They do not decide what is trained; by default nothing leaves the machine."""
    run.train(push_to_hub=False)
    assert hub.calls == []
    state = json.loads((run.folder / "checkpoint-3" / "state.json").read_text())
    free = {"push_to_hub", "hub_model_id", "fill_mask", "dataset_name"}
    assert not free & {*state["fingerprint"]}
    run.train(resume_from_checkpoint=True, hub_model_id="me/late", dataset_name="films")
    assert hub.calls[-1][1]["repo_id"] == "me/late"
