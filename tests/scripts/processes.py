"""Runs in processes of their own, at the price of a fork instead of four seconds of imports.

`start` hands a run to a server that has imported everything and has no threads, which forks once a
rank; ranks find each other as they do under torchrun. Every run has a hard time limit.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import functools
import gc
import io
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

SECONDS = 180


@dataclass
class Ended:
    """How a process ended.

    Attributes:
        code: Its exit code; minus the signal that killed it.
        result: What the function returned.
        error: ``"ValueError: ..."`` where it raised.
        log: What it wrote.
    """

    code: int
    result: Any
    error: str
    log: str


def start(
    function: str,
    *,
    world: int = 1,
    seconds: float = SECONDS,
    kill_after: float | None = None,
    kill_by: int = signal.SIGKILL,
    **arguments: Any,
) -> list[Ended]:
    """Call a function of `short_run` in as many processes and return how each ended.

    Those that still run `kill_after` so many seconds get a signal, workers included.

    Raises:
        TimeoutError: If they have not ended in time; they are killed.
        RuntimeError: If the server has ended; the next call starts another.
    """
    server = _server()
    request = {"function": function, "world": world, "seconds": seconds, "arguments": arguments}
    request |= {"kill_after": kill_after, "kill_by": kill_by}
    with contextlib.suppress(BrokenPipeError):
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
    line = server.stdout.readline()
    if not line:
        _server.cache_clear()
        raise RuntimeError(f"the server ended with {server.wait()}; it was asked for {request}")
    answer = json.loads(line)
    if isinstance(answer, str):
        took = f"{function} {arguments} on {world} processes took over {seconds} s"
        raise TimeoutError(f"{took}:\n{answer}")
    return [Ended(**process) for process in answer]


def train(folder: object, **arguments: Any) -> Ended:
    """Train in a process of its own; of several, return how the first ended."""
    return start("train", folder=str(folder), **arguments)[0]


def outcome(folder: object, **arguments: Any) -> dict[str, Any]:
    """Train in processes of their own, all of which must succeed; return what the first made."""
    ended = start("train", folder=str(folder), **arguments)
    assert {process.code for process in ended} == {0}, "\n".join(process.log for process in ended)
    return ended[0].result


def run_script(
    arguments: list[str], *, seconds: float = SECONDS, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a command; it and all that it started are killed when time is up."""
    process = subprocess.Popen(
        arguments,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=seconds)
    finally:
        # Torchrun gives each process a session of its own.
        with contextlib.suppress(psutil.NoSuchProcess):
            first = psutil.Process(process.pid)
            for started in [first, *first.children(recursive=True)]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    started.kill()
    return subprocess.CompletedProcess(arguments, process.returncode, output)


def torchrun(*command: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a script in two processes that are started as users do."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    launcher += ["--master_port", str(port), *map(str, command)]
    return run_script(launcher, **{"ACCELERATE_USE_CPU": "1", **options})


def torchrun_train(folder: Path, arguments: dict[str, Any], **options: Any) -> Any:
    """Train in two processes that are started as users do."""
    script = Path(__file__).with_name("short_run.py")
    return torchrun(script, json.dumps(arguments), folder / "outcome-", **options)


def last_step(folder: Path) -> int:
    """Return the step of the newest checkpoint; none may be damaged."""
    from mlmadapt.training.checkpoint import find_checkpoints, find_damage

    paths = find_checkpoints(folder)
    assert [find_damage(path) for path in paths] == [None] * len(paths)
    return int(paths[0].name.rpartition("-")[2]) if paths else 0


@functools.cache
def _server() -> subprocess.Popen[str]:
    server = subprocess.Popen(
        [sys.executable, __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
    )

    def stop() -> None:
        with contextlib.suppress(BrokenPipeError):
            server.stdin.close()
        try:
            server.wait(SECONDS)
        finally:
            server.kill()
            server.stdout.close()

    atexit.register(stop)
    return server


def _serve() -> None:
    import short_run

    # What is loaded or cached at first use is so before the first fork.
    short_run.freeze(short_run.make_rows(2))
    with tempfile.TemporaryDirectory() as folder:
        short_run.warm_up(folder)
    gc.freeze()  # or each fork would look through, and so copy, all that is here
    for line in sys.stdin:
        request = json.loads(line)
        with tempfile.TemporaryDirectory() as folder:
            answer = _fork(getattr(short_run, request["function"]), request, Path(folder))
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def _fork(function: Any, request: dict[str, Any], folder: Path) -> list[dict[str, Any]] | str:
    """Return what came of each process or, if one was late, what they wrote and where they were."""
    world = request["world"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children: dict[int, int] = {}
    # Until a child is in its run: Python's own code after a fork would lose an interrupt.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    for rank in range(world):
        (folder / f"{rank}.log").touch()
        child = os.fork()
        if child == 0:
            try:
                _work(function, request["arguments"], folder, rank=rank, world=world, port=port)
            finally:  # it must not go on as a second server
                os._exit(1)
        # Here too, or a signal at once would find no group.
        with contextlib.suppress(OSError):
            os.setpgid(child, child)
        children[child] = rank
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    now, kill_after = time.monotonic(), request["kill_after"]
    kill_at = None if kill_after is None else now + kill_after
    codes = _wait(list(children), now + request["seconds"], kill_at, request["kill_by"])
    if codes is None:
        return "\n".join(_read_log(folder, rank) for rank in range(world))
    answers = []
    for child, rank in children.items():
        report = folder / f"{rank}.json"
        answer = json.loads(report.read_text()) if report.exists() else {}
        told = {"code": codes[child], "log": _read_log(folder, rank)}
        answers.append({"result": None, "error": "", **answer, **told})
    return answers


def _read_log(folder: Path, rank: int) -> str:
    # Of a killed process it may end within a character.
    return (folder / f"{rank}.log").read_text(encoding="utf-8", errors="replace")


def _wait(
    children: list[int], deadline: float, kill_at: float | None, kill_by: int
) -> dict[int, int] | None:
    """Return the exit codes, or None if one was late; nothing of them is left running."""
    codes: dict[int, int] = {}
    while len(codes) < len(children) and time.monotonic() < deadline:
        if kill_at is not None and time.monotonic() >= kill_at:
            kill_at = None
            for child in set(children) - set(codes):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child, kill_by)
        for child in set(children) - set(codes):
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:
                codes[child] = os.waitstatus_to_exitcode(status)
                if codes[child] != 0:  # torchrun ends the others too, after some time
                    deadline = min(deadline, time.monotonic() + 60)
        time.sleep(0.005)
    late = set(children) - set(codes)
    for child in late:
        os.kill(child, signal.SIGUSR1)
    time.sleep(0.5 if late else 0)
    for child in children:  # and the workers that a killed one has left
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
    for child in late:
        os.waitpid(child, 0)
    return None if late else codes


def _work(
    function: Any, arguments: dict[str, Any], folder: Path, *, rank: int, world: int, port: int
) -> None:
    with contextlib.suppress(OSError):
        os.setpgid(0, 0)
    # Ignored where the tests run in the background, and then left so by what is tested.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with (folder / f"{rank}.log").open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    # The standard input is the server's; a run has none.
    sys.stdin = io.StringIO()
    sys.stdout = sys.stderr = open(2, "w", buffering=1)  # noqa: SIM115
    faulthandler.register(signal.SIGUSR1, sys.stderr)  # of a process that is late
    logging.basicConfig(stream=sys.stderr, force=True)
    if world > 1:
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
        os.environ |= {name: str(value) for name, value in names.items()}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        os.environ["ACCELERATE_USE_CPU"] = "1"
    answer: dict[str, Any] = {"result": None, "error": ""}
    code = 0
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        answer["result"] = function(**arguments)
    except BaseException as error:  # noqa: BLE001
        traceback.print_exc()
        answer["error"] = f"{type(error).__name__}: {error}"
        code = 130 if isinstance(error, KeyboardInterrupt) else getattr(error, "code", 1)
    # Whole or not at all, whenever a signal comes.
    (folder / f"{rank}.tmp").write_text(json.dumps(answer))
    (folder / f"{rank}.tmp").rename(folder / f"{rank}.json")
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    _serve()
