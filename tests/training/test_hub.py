"""A push to the hub: checked before, done after, and a failure that costs nothing.

The hub itself is not reached: its client is replaced where the library calls it.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub
import pytest
from huggingface_hub.utils import filter_repo_objects
from transformers import pipeline

from mlmadapt import (
    TrainingConfig,
    TrainingResult,
    WholeWordMaskingCollator,
    accelerate_train,
)
from mlmadapt.testing import tiny_model, tiny_tokenizer
from tests.scripts.short_run import freeze, make_rows


class Repository(NamedTuple):
    """What the hub answers."""

    repo_id: str


class Hub:
    """Notes what it is asked for, in words that the real client understands."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.error: dict[str, Exception] = {}

    def __call__(self) -> Hub:
        """Stand in for ``HfApi()``."""
        return self

    def create_repo(self, repo_id: str, *, private: bool | None, exist_ok: bool) -> Repository:
        """Make a repository, which is the caller's if no other owner is named."""
        client = inspect.signature(huggingface_hub.HfApi.create_repo)
        client.bind(self, repo_id, private=private, exist_ok=exist_ok)
        assert exist_ok
        self.calls.append(("create", {"repo_id": repo_id, "private": private}))
        if "create" in self.error:
            raise self.error["create"]
        return Repository(repo_id if "/" in repo_id else f"me/{repo_id}")

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


def train(folder: Path, **settings: Any) -> TrainingResult:
    """Train for 4 steps."""
    tokenizer = tiny_tokenizer()
    defaults = {
        "per_device_train_batch_size": 4,
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
        "disable_tqdm": True,
        "push_to_hub": True,
    }
    return accelerate_train(
        tiny_model(tokenizer),
        make_rows(8),
        freeze(make_rows(4)),
        tokenizer=tokenizer,
        data_collator=WholeWordMaskingCollator(tokenizer),
        config=TrainingConfig(output_dir=str(folder), **{**defaults, **settings}),
    )


def test_what_was_saved_is_pushed_and_nothing_else(hub: Hub, tmp_path: Path) -> None:
    """Model, tokenizer, card and curves; no checkpoint, no lock, nothing of the caller's own."""
    folder = tmp_path / "adapted"
    folder.mkdir()
    (folder / "train.log").write_text("mine")
    (folder / "runs").mkdir()
    (folder / "runs" / "README.md").write_text("a tracker's")
    train(folder, overwrite=True, hub_private_repo=True)
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
    assert (folder / "checkpoint-4").exists()


def test_the_name_can_be_chosen(hub: Hub, tmp_path: Path) -> None:
    """Of the repository and its owner."""
    train(tmp_path / "out", hub_model_id="team/film-bert")
    assert [call["repo_id"] for _, call in hub.calls] == ["team/film-bert"] * 3


def test_nobody_is_asked_unless_told_to(hub: Hub, tmp_path: Path) -> None:
    """By default nothing leaves the machine."""
    train(tmp_path / "out", push_to_hub=False)
    assert hub.calls == []


def test_the_token_is_stored_nowhere(hub: Hub, tmp_path: Path) -> None:
    """Neither in the model's folder nor in a checkpoint."""
    train(tmp_path / "out")
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 10
    assert not [path for path in files if b"hf_verysecret" in path.read_bytes()]
    assert "token" not in str(hub.calls).replace("tokenizer", "")


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ("offline", ValueError, "push_to_hub is True, but HF_HUB_OFFLINE is set"),
        ("no token", ValueError, "no token of the hub is stored; run 'hf auth login', or set"),
        ("refused", OSError, r"makes no repository 'out' \(403: not yours\); set hub_model_id"),
    ],
)
def test_what_is_wrong_is_told_before_the_first_step(
    hub: Hub,
    tmp_path: Path,
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
        train(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert "upload" not in dict(hub.calls)


def test_a_name_that_cannot_be_one_is_refused_by_the_hubs_own_client(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a request: HF_HUB_OFFLINE, under which all tests run, would refuse that."""
    monkeypatch.setattr("mlmadapt.training.hub.HfApi", huggingface_hub.HfApi)
    with pytest.raises(
        OSError, match=r"no repository 'my film model!' \(Repo id must use alphanum"
    ):
        train(tmp_path / "out", hub_model_id="my film model!")


def test_a_failed_push_loses_nothing(hub: Hub, tmp_path: Path) -> None:
    """The model is there, the message says where, and the same call with resume pushes it."""
    folder = tmp_path / "out"
    hub.error["upload"] = ConnectionError("gone")
    message = "the model is saved in '.*out', but was not pushed to the hub .gone.; call again with"
    with pytest.raises(OSError, match=message):
        train(folder)
    assert len(pipeline("fill-mask", model=str(folder), device="cpu")("a [MASK]")) == 5
    assert (folder / "README.md").exists()
    hub.error.clear()
    hub.calls.clear()
    result = train(folder, resume_from_checkpoint=True)
    assert result.global_step == 4
    assert [what for what, _ in hub.calls] == ["create", "create", "upload"]


def test_settings_of_the_push_may_change_at_a_resume(hub: Hub, tmp_path: Path) -> None:
    """They do not decide what is trained."""
    folder = tmp_path / "out"
    train(folder, push_to_hub=False)
    state = json.loads((folder / "checkpoint-4" / "state.json").read_text())
    free = {"push_to_hub", "hub_model_id", "fill_mask", "dataset_name"}
    assert not free & {*state["fingerprint"]}
    train(folder, resume_from_checkpoint=True, hub_model_id="me/late", dataset_name="films")
    assert hub.calls[-1][1]["repo_id"] == "me/late"
