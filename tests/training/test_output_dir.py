"""A folder that cannot be written, or is another run's, is told of before the first step."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from mlmadapt.training.checkpoint import check_output_dir


def test_output_dir_is_made(tmp_path: Path) -> None:
    """With its parents; the check leaves nothing in it, and an empty one is no other run's."""
    folder = tmp_path / "a" / "b"
    for _ in range(2):
        check_output_dir(folder, overwrite=False)
        assert list(folder.iterdir()) == []


def test_output_dir_of_another_run(tmp_path: Path) -> None:
    """Files of another run are kept from harm unless they are given up."""
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(FileExistsError, match=r"holds files of another run; .* overwrite=True"):
        check_output_dir(tmp_path, overwrite=False)
    check_output_dir(str(tmp_path), overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_output_dir_that_cannot_be(tmp_path: Path) -> None:
    """A file, a folder below a file, and a folder that the system does not let be made."""
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="file', which is a file; name a folder"):
        check_output_dir(tmp_path / "file", overwrite=True)
    with pytest.raises(NotADirectoryError, match=r"cannot be written \(Not a directory\); name a"):
        check_output_dir(tmp_path / "file" / "below", overwrite=True)
    if Path("/proc").is_dir():
        with pytest.raises(OSError, match="output_dir is '/proc/mlmadapt', which cannot be"):
            check_output_dir("/proc/mlmadapt", overwrite=True)


@pytest.mark.parametrize("method", ["write_text", "rename"])
def test_output_dir_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """Writing and renaming are tried (root may do both, so they are made to fail), then undone."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(13, os.strerror(13))

    monkeypatch.setattr(Path, method, refuse)
    with pytest.raises(PermissionError, match=r"cannot be written \(Permission denied\)"):
        check_output_dir(tmp_path, overwrite=False)
    assert list(tmp_path.iterdir()) == []
