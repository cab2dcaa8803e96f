"""The example that prepares a corpus shard by shard, on one machine and on Ray."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import load_dataset

from mlmadapt import group_texts, tokenize_with_word_ids
from mlmadapt.testing import tiny_corpus, tiny_tokenizer
from tests.scripts.processes import run_script

SCRIPT = Path(__file__).parents[1] / "examples" / "shards.py"


@pytest.fixture(name="command")
def _command(tmp_path: Path) -> list[str]:
    """Make a tokenizer and three shards of documents; return the command that prepares them."""
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    command = [str(SCRIPT), "--tokenizer", str(tmp_path / "tokenizer"), "--chunk_size", "32"]
    for number in range(3):
        path = tmp_path / f"{number}.parquet"
        texts = tiny_corpus(30, seed=number)
        pq.write_table(pa.table({"text": texts, "label": [number] * 30}), path)
        command.append(str(path))
    return [*command, "--output_dir", str(tmp_path / "rows")]


def check_rows(folder: Path) -> None:
    """Check that each file has the rows that lists of its documents give."""
    made = sorted((folder / "rows").iterdir())
    assert [path.name for path in made] == ["0.parquet", "1.parquet", "2.parquet"]
    for path in made:
        texts = pq.read_table(folder / path.name)["text"].to_pylist()
        tokens = tokenize_with_word_ids({"text": texts}, tiny_tokenizer())
        expected = group_texts(tokens, chunk_size=32, labels=False)
        assert pq.read_table(path).to_pydict() == expected


def test_a_shard_in_is_a_shard_out(
    command: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Each file has the rows of its own documents; one that is there is not made again."""
    spec = importlib.util.spec_from_file_location("shards", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    monkeypatch.setattr(sys, "argv", command)
    script.main()
    check_rows(tmp_path)

    kept, lost = tmp_path / "rows" / "0.parquet", tmp_path / "rows" / "1.parquet"
    before = kept.stat().st_mtime_ns
    lost.unlink()
    script.main()
    check_rows(tmp_path)
    assert kept.stat().st_mtime_ns == before
    first, second = capsys.readouterr().out.splitlines()
    assert first == second
    assert first.endswith(" rows in 3 shards")

    files = str(tmp_path / "rows" / "*.parquet")
    rows = load_dataset("parquet", data_files=files, split="train", streaming=True)
    assert set(next(iter(rows))) == {"input_ids", "token_type_ids", "attention_mask", "word_ids"}


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="`nox -s ray` has Ray")
def test_ray_makes_the_same_shards(command: list[str], tmp_path: Path) -> None:
    """Ray Data as the engine: several workers, and the same files."""
    environment = {"RAY_USAGE_STATS_ENABLED": "0"}
    ended = run_script([sys.executable, *command, "--ray"], seconds=600, **environment)
    assert ended.returncode == 0, ended.stdout
    check_rows(tmp_path)
