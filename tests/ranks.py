"""Ranks without a launcher, for tests."""

import os
import socket
import subprocess
import sys
import tempfile
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
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks)}
    place |= {"LOCAL_WORLD_SIZE": str(ranks), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(script), *map(str, args)]
    return [Rank(command, place | {"RANK": str(rank), "LOCAL_RANK": str(rank)} | env) for rank in range(ranks)]


def run_ranks(ranks: int, script: str | Path, *args: object, check: bool = True, **env: str) -> list[tuple[int, str]]:
    """Waits for all: (exit status, output) of each; a failure shows the failing rank's output."""
    ended = [rank.end() for rank in start_ranks(ranks, script, *args, **env)]
    for rank, (status, output) in enumerate(ended):
        assert not (check and status), f"rank {rank} of {script}: exit {status}\n{output[-8000:]}"
    return ended
