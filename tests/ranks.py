"""Ranks without a launcher, for tests."""

import atexit
import multiprocessing
import os
import runpy
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from multiprocessing.context import BaseContext
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RANK_TIMEOUT = 900


def free_port(row: int = 1) -> int:
    """The first of so many free ports in a row.

    They lie below those that the system gives to connections, which may take one at any time, and above most services'.
    """
    while True:
        first = 20000 + secrets.randbelow(12000)
        with suppress(OSError), ExitStack() as stack:
            for port in range(first, first + row):
                stack.enter_context(socket.create_server(("", port)))
            return first


def can_fork() -> bool:
    """Whether processes may be forks: a GPU's runtime survives none."""
    return not Path("/dev/nvidiactl").exists()


def fork_context() -> BaseContext:
    """Of processes that are forks of one that has imported torch and DeepSpeed; where they may not be, new ones."""
    context = multiprocessing.get_context("forkserver" if can_fork() else "spawn")
    if can_fork():
        context.set_forkserver_preload(["tests.preloaded"])
    return context


class Fork:
    """A fork of one process that has imported torch and DeepSpeed; what `Rank` uses of subprocess.Popen."""

    def __init__(self, words: list[str], env: dict[str, str], output: str, errors: str) -> None:
        self._process = fork_context().Process(target=_become, args=(words, env, output, errors))
        self._process.start()
        assert self._process.pid
        self.pid = self._process.pid
        atexit.register(self.kill)  # before multiprocessing would wait for it

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> None:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("rank", timeout or 0.0)

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()


class Rank:
    """A started rank; its output goes to a file, so that no full pipe can stop it."""

    def __init__(self, command: list[str], env: dict[str, str], forked: bool = False) -> None:
        self.log = tempfile.NamedTemporaryFile("w+")  # noqa: SIM115 - closed with the object
        self.process: Fork | subprocess.Popen[bytes]
        if forked:
            self.process = Fork(command[1:], os.environ | env, self.log.name, self.log.name)
        else:
            self.process = subprocess.Popen(command, cwd=ROOT, env=os.environ | env, stdout=self.log, stderr=self.log)

    def end(self, timeout: float = RANK_TIMEOUT) -> tuple[int, str]:
        """Waits; (exit status, output)."""
        try:
            self.process.wait(timeout)
        finally:
            self.process.kill()
        self.log.seek(0)
        assert self.process.returncode is not None
        return self.process.returncode, self.log.read()


def start_ranks(ranks: int, script: str | Path, *args: object, **env: str) -> list[Rank]:
    """Starts `script` on each rank with the environment that torchrun gives, and no launcher to wait for."""
    command = [sys.executable, str(script), *map(str, args)]
    return [Rank(command, place | env) for place in places(ranks)]


def fork_ranks(ranks: int, script: str | Path, *args: object, **env: str) -> list[Rank]:
    """Starts `script` on each rank as `start_ranks` does, without the imports of torch and DeepSpeed.

    They take a rank longer than most scripts do. The ranks are forks of one process that has imported them.
    """
    return [fork_rank(place | env, script, *args) for place in places(ranks)]


def fork_rank(place: dict[str, str], script: str | Path, *args: object) -> Rank:
    """One of them, started with `place` and words of its own."""
    return Rank([sys.executable, str(script), *map(str, args)], place, forked=can_fork())


def places(ranks: int) -> list[dict[str, str]]:
    """What a launcher says to each rank."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port(4)), "WORLD_SIZE": str(ranks)}
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    place |= {"LOCAL_WORLD_SIZE": str(ranks), "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    return [place | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def run_ranks(
    ranks: int, script: str | Path, *args: object, check: bool = True, timeout: float = RANK_TIMEOUT
) -> list[tuple[int, str]]:
    """Runs `script` on each rank as `fork_ranks` starts it; (exit status, output) of each.

    A failure shows the failing rank's output; whoever has not ended after `timeout` seconds is killed.
    """
    started, end = fork_ranks(ranks, script, *args), time.monotonic() + timeout
    try:
        for rank in started:
            with suppress(subprocess.TimeoutExpired):
                rank.process.wait(max(0.0, end - time.monotonic()))
    finally:
        for rank in started:
            rank.process.kill()
    ended = [rank.end() for rank in started]
    for number, (status, output) in enumerate(ended):
        assert not (check and status), f"rank {number} of {script}: exit {status}\n{output[-8000:]}"
    return ended


def run_script(script: str | Path, *args: object, timeout: float = RANK_TIMEOUT) -> subprocess.CompletedProcess[str]:
    """What `python script *args` does and says, without the imports, as a rank of `fork_ranks`; "-m" names a module.

    Not for what a start itself shows: Ctrl-C, imports, an environment.
    """
    words = [str(script), *map(str, args)]
    if not can_fork():
        return subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=timeout,
                              check=False)  # fmt: skip
    with tempfile.NamedTemporaryFile("r") as output, tempfile.NamedTemporaryFile("r") as errors:
        process = Fork(words, dict(os.environ), output.name, errors.name)
        try:
            process.wait(timeout)
        finally:
            process.kill()
        assert process.returncode is not None
        return subprocess.CompletedProcess(words, process.returncode, output.read(), errors.read())


def _become(words: list[str], env: dict[str, str], output: str, errors: str) -> None:
    """In the fork: what `python *words` does."""
    for stream, name in ((1, output), (2, errors)):
        file = os.open(name, os.O_WRONLY | os.O_APPEND)
        os.dup2(file, stream)
        os.close(file)
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(env)
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        return
    sys.argv = words
    sys.path.insert(0, str(Path(words[0]).parent))
    runpy.run_path(words[0], run_name="__main__")
