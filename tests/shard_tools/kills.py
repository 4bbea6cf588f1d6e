"""Builds a small data set and kills itself at call number N; run by test_restart.py in a process of its own.

Forking from a process that has done nothing but import makes a kill cost a fraction of a second, and no point of
a kill is in an import. It is a number of calls, not a time: seeded, it is the same on every machine.
"""

import json
import os
import random
import resource
import signal
import sys
from pathlib import Path

import numpy as np
import torch

from shard_tools import catalogs
from shard_tools.build import build
from shard_tools.columns import Clips
from shard_tools.ffmpeg_codecs import available
from tests.helpers import digests, options, synth_catalog

CLIPS, PER_SHARD, SECONDS = 46, 6, 0.1
FULL_DISK = 3


def attempt(source: Path, out: Path, split: str | None = None, kill_at: int | None = None) -> int:
    """Builds in a child; returns its calls, or the negative signal or exit status that ended it."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.close(reader)
        calls = 0

        def count(frame, event, arg):
            nonlocal calls
            calls += 1
            if calls == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

        try:
            torch.set_num_threads(1)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            catalog = catalogs.table(source, source / "table.csv", None, split)
            sys.setprofile(count)
            build(catalog, out, options(SECONDS, PER_SHARD), 1, engine="inline")
            sys.setprofile(None)
            os.write(writer, str(calls).encode())
        except OSError:
            os._exit(FULL_DISK)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        said = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return int(said) if status == 0 else (status if status < 0 else -100 - status)


def state(out: Path) -> dict[str, tuple[int, str]]:
    return {name: ((out / name).stat().st_mtime_ns, digest) for name, digest in digests(out).items()}


def kills(folder: Path, source: Path, seed: int, count: int, split: str | None, before: str | None) -> list[dict]:
    """Kills `count` builds, half of them anywhere and half in the last part (index, manifest), and restarts them."""
    whole = folder / f"whole-{split}"
    if before:
        attempt(source, whole, before)
    calls = attempt(source, whole, split)
    rng, found = random.Random(seed), []
    for number in range(count):
        # Not among the last: their number varies by a few hundred with what a read returns.
        point = rng.randrange(1 if number % 2 else int(calls * 0.85), int(calls * 0.99))
        out = folder / f"{split}-{number}"
        if before:
            attempt(source, out, before)
        died = attempt(source, out, split, kill_at=point)
        records = {f"{path.parent.name}-{path.stem}.tar" for path in (out / ".build").glob("*/0*.record")}
        finished = {name: facts for name, facts in state(out).items() if name in records}
        again = attempt(source, out, split, kill_at=rng.randrange(1, calls) if number % 3 == 0 else None)
        if again < 0:
            attempt(source, out, split)
        now = state(out)
        found.append({
            "point": point,
            "died": died,
            "identical": digests(out) == digests(whole),
            "finished": len(finished),
            "untouched": all(now[name] == facts for name, facts in finished.items()),
            "leftovers": [str(p) for p in out.rglob("*") if p.suffix == ".tmp" or p.name == ".build"],
        })  # fmt: skip
    return found


def full_disk(folder: Path, source: Path) -> dict:
    """A limit on the size of a file stands for a full disk: a write fails in the middle of a tar."""
    out = folder / "full"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, limits[1]))
    failed = attempt(source, out)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    leftovers = [path.name for path in out.iterdir() if path.suffix == ".tmp"]
    attempt(source, out)
    return {"failed": failed, "leftovers": leftovers, "identical": digests(out) == digests(folder / "whole-None")}


def main() -> None:
    folder = Path(sys.argv[1])
    # Imported here, so that children need not: torchcodec; pandas, by Arrow.
    assert available()
    assert not len(Clips("/").table(np.empty(0, np.int64)))
    source = folder / "source"
    synth_catalog(source, CLIPS, SECONDS)
    found = {
        "fresh": kills(folder, source, 1, 20, None, None),
        "second split": kills(folder, source, 2, 8, "eval", "train"),
        "full disk": full_disk(folder, source),
    }
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
