"""Ranks without a launcher, for tests."""

import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RANK_TIMEOUT = 900


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Rank:
    """A started rank; its output goes to a file, so that no full pipe can stop it."""

    def __init__(self, command: list[str], env: dict[str, str]) -> None:
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the object
        self.process = subprocess.Popen(command, cwd=ROOT, env=os.environ | env, stdout=self.log, stderr=self.log)

    def end(self, timeout: float = RANK_TIMEOUT) -> tuple[int, str]:
        """Waits; (exit status, output)."""
        try:
            self.process.wait(timeout)
        finally:
            self.process.kill()
        self.log.seek(0)
        return self.process.returncode, self.log.read()


def start_ranks(ranks: int, script: str | Path, *args: object, **env: str) -> list[Rank]:
    """Starts `script` on each rank with the environment that torchrun gives, and no launcher to wait for."""
    command = [sys.executable, str(script), *map(str, args)]
    return [Rank(command, place | env) for place in _places(ranks)]


def _places(ranks: int) -> list[dict[str, str]]:
    """What a launcher says to each rank."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks)}
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    place |= {"LOCAL_WORLD_SIZE": str(ranks), "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    return [place | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def run_ranks(
    ranks: int, script: str | Path, *args: object, check: bool = True, timeout: float = RANK_TIMEOUT
) -> list[tuple[int, str]]:
    """Runs `script` on each rank as `start_ranks` does; (exit status, output) of each.

    The ranks are forks of one process that has imported torch and DeepSpeed, which takes a rank longer than most
    scripts do. A failure shows the failing rank's output; whoever has not ended after `timeout` seconds is killed.
    """
    if Path("/dev/nvidiactl").exists():  # a GPU's runtime survives no fork
        end = time.monotonic() + timeout
        ended = [rank.end(max(0.0, end - time.monotonic())) for rank in start_ranks(ranks, script, *args)]
    else:
        ended = _fork([str(script), *map(str, args)], _places(ranks), timeout)
    for rank, (status, output) in enumerate(ended):
        assert not (check and status), f"rank {rank} of {script}: exit {status}\n{output[-8000:]}"
    return ended


def _fork(words: list[str], places: list[dict[str, str]], timeout: float) -> list[tuple[int, str]]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.preloaded"])
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder, place["RANK"]) for place in places]
        started, end = [], time.monotonic() + timeout
        try:
            for place, log in zip(places, logs, strict=True):
                started.append(context.Process(target=_become, args=(words, os.environ | place, log)))
                started[-1].start()
            for process in started:
                process.join(max(0.0, end - time.monotonic()))
        finally:
            for process in started:
                process.kill()
                process.join()
        return [(process.exitcode, log.read_text()) for process, log in zip(started, logs, strict=True)]


def _become(words: list[str], env: dict[str, str], log: Path) -> None:
    """In the fork: what `python *words` does."""
    with log.open("w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(env)
    sys.argv = words
    sys.path.insert(0, str(Path(words[0]).parent))
    runpy.run_path(words[0], run_name="__main__")
