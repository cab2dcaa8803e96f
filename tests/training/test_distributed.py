"""What several processes need to stay in step, as far as one process shows it."""

from __future__ import annotations

import logging
import os
import signal
import threading
from typing import TYPE_CHECKING

import pytest
from accelerate import Accelerator
from datasets import Dataset
from datasets.distributed import split_dataset_by_node

from mlmadapt.training.distributed import Signals, split_stream
from tests.scripts.short_run import stream_shards

if TYPE_CHECKING:
    from tests.scripts.tiny_run import TinyRun


def test_signals_are_handled_as_before_afterwards() -> None:
    """The caller's handlers come back, and what it ignores is not heard."""
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with Signals() as signals:
        assert signal.getsignal(signal.SIGTERM) != before[1]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Signals() as signals:
            os.kill(os.getpid(), signal.SIGINT)
            assert signals.noted == 0
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before[0])


def test_signals_are_left_alone_in_another_thread() -> None:
    """Where Python does not allow handlers, a run does without."""
    failed: list[BaseException] = []

    def work() -> None:
        try:
            with Signals() as signals:
                assert signals.noted == 0
        except BaseException as error:  # noqa: BLE001
            failed.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(10)
    assert not failed


def test_a_launcher_that_starts_loners_is_noticed(
    run: TinyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes that both believe to be alone would overwrite each other's files."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    run.objects["accelerator"] = Accelerator()
    with pytest.raises(RuntimeError, match=r"started 2 processes .* set ACCELERATE_USE_CPU=1"):
        run.train()
    assert not run.folder.exists()


def test_a_launcher_that_starts_one_process_is_noticed(
    run: TinyRun, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """``accelerate launch --cpu --num_processes 2`` does."""
    run.objects["accelerator"] = Accelerator()
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with caplog.at_level(logging.WARNING, "mlmadapt"):
        run.train()
    assert "one process trains alone: 'accelerate launch --cpu' starts one" in caplog.text


def test_one_process_reads_what_it_is_given(run: TinyRun) -> None:
    """Be it a list, a dataset, a stream, or a part of one."""
    stream = stream_shards(run.rows)
    part = split_dataset_by_node(stream, 0, 2)
    for rows in (run.rows, Dataset.from_list(run.rows), stream, part):
        assert split_stream(rows, Accelerator()) == (rows, False)
