"""Builds a small data set and kills itself at call number N; run by test_restart.py in a process of its own.

Forking from a process that has done nothing but import makes a kill cost a fraction of a second, and no point of
a kill is in an import. It is a number of calls, not a time: seeded, it is the same on every machine.
"""

import errno
import json
import os
import random
import resource
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from pipeline.data.manifest import load_manifest
from pipeline.flow import Clip
from shard_tools import catalogs
from shard_tools.build import build
from shard_tools.columns import Rows
from shard_tools.finish import damage
from tests.helpers import digests, options, synth_catalog
from tests.shard_tools.containers import catalog_of

CLIPS, PER_SHARD, SECONDS = 46, 6, 0.1
FULL_DISK = 3
MEMBERS = 24  # of containers
WRITES = ("write", "writelines", "fsync", "replace", "link", "mkdir", "write_table")  # calls that a full disk refuses


def attempt(
    source: Path, out: Path, split: str | None = None, kill_at: int | None = None, full_at: int | None = None,
    retry: bool = False, counted: bool = False,
) -> tuple[int, int]:
    """Builds in a child; returns 0 and 0, or the negative signal or exit status that ended it.

    Args:
        source: Of the clips.
        out: Of the shards.
        split: Only this one.
        kill_at: Number of the call at which it kills itself.
        full_at: Number of the writing call that finds the disk full.
        retry: Clips that failed are tried again.
        counted: Returns its calls and those that write. Counting makes a build twice as long.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.close(reader)
        calls = writes = 0

        def count(frame, event, arg):
            nonlocal calls, writes
            calls += 1
            if calls == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            if event == "c_call" and arg.__name__ in WRITES:
                writes += 1
                if writes == full_at:
                    raise OSError(errno.ENOSPC, "No space left on device")

        try:
            torch.set_num_threads(1)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            if (source / "table.csv").exists():
                catalog = catalogs.table(source, source / "table.csv", None, split)
            else:
                catalog = catalog_of(source, source.name, MEMBERS)
            if counted or kill_at or full_at:
                sys.setprofile(count)
            build(catalog, out, options(SECONDS, PER_SHARD), 1, engine="inline", retry=retry)
            sys.setprofile(None)
            os.write(writer, f"{calls} {writes}".encode())
        except OSError:
            os._exit(FULL_DISK)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        said = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status == 0:
        return int(said.split()[0]), int(said.split()[1])
    return status if status < 0 else -100 - status, 0


def state(out: Path) -> dict[str, tuple[int, str]]:
    return {name: ((out / name).stat().st_mtime_ns, digest) for name, digest in digests(out).items()}


def finished(out: Path) -> str:
    """What became of splits that were finished: "whole", "switching" to new ones, or how they are damaged."""
    if not (out / "manifest.json").exists():
        return "none"
    if (out / ".build" / ".switch" / "manifest.json").exists():
        return "switching"
    return str(damage(out, load_manifest(out)) or "whole")


def kills(
    folder: Path, source: Path, seed: int, count: int, split: str | None, begin: Callable[[Path], object], name: str,
    full: bool = False, retry: bool = False,
) -> list[dict]:
    """Stops `count` builds, half of them anywhere and half in the last part (index, manifest), and restarts them.

    Args:
        folder: For their directories.
        source: Of the clips.
        seed: Of where they are stopped.
        count: How many.
        split: That they build.
        begin: Makes the directory as it is before.
        name: Of the directories.
        full: Stopped by a full disk, not by SIGKILL.
        retry: They try failures again.
    """
    whole = folder / f"whole-{name}"
    begin(whole)
    calls = attempt(source, whole, split, retry=retry, counted=True)[full]
    rng, found = random.Random(seed), []
    for number in range(count):
        # Not among the last: their number varies by a few hundred with what a read returns.
        last = calls if full else int(calls * 0.99)
        point = rng.randrange(1 if number % 2 else int(calls * 0.85), last)
        out = folder / f"{name}-{number}"
        begin(out)
        died, _ = attempt(source, out, split, **({"full_at": point} if full else {"kill_at": point}), retry=retry)
        kept = finished(out)
        records = {f"{path.parent.name}-{path.stem}.tar" for path in (out / ".build").glob("*/0*.record")}
        done = {name: facts for name, facts in state(out).items() if name in records}
        then = rng.randrange(1, 10**5) if number % 3 == 0 else None
        again, _ = attempt(source, out, split, kill_at=then, retry=retry)
        if again < 0:
            attempt(source, out, split, retry=retry)
        now = state(out)
        found.append({
            "point": point,
            "died": died,
            "finished splits": kept,
            "identical": digests(out) == digests(whole),
            "finished": len(done),
            "untouched": retry or all(now[name] == facts for name, facts in done.items()),
            "leftovers": [str(p) for p in out.rglob("*") if p.suffix == ".tmp" or p.name == ".build"],
        })  # fmt: skip
    return found


def full_disk(folder: Path, source: Path) -> dict:
    """A limit on the size of a file stands for a full disk: a write fails in the middle of a tar."""
    out = folder / "full"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, limits[1]))
    failed, _ = attempt(source, out)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    leftovers = [path.name for path in out.iterdir() if path.suffix == ".tmp"]
    attempt(source, out)
    return {"failed": failed, "leftovers": leftovers, "identical": digests(out) == digests(folder / "whole-fresh")}


def containers(folder: Path) -> dict[str, list[dict]]:
    """Builds from what `pack` wrote below the folder, killed four times each."""
    return {
        source.name: kills(folder / "out", source, 1, 4, None, lambda out: None, source.name)
        for source in sorted((folder / "sources").iterdir())
    }


def main() -> None:
    folder = Path(sys.argv[1])
    if (folder / "sources").exists():
        sys.stdout.write(json.dumps(containers(folder)))
        return
    # Imported here, so that children need not: pandas, by Arrow.
    assert not len(Rows(Clip, "/").take(np.empty(0, np.int64)))
    source = folder / "source"
    synth_catalog(source, CLIPS, SECONDS)
    mended = folder / "mended"
    shutil.copytree(source, mended)
    broken = sorted(mended.rglob("*.flac"))[3]
    content = broken.read_bytes()
    broken.write_text("no audio")
    with_failure = folder / "with-failure"
    attempt(mended, with_failure)
    broken.write_bytes(content)

    def nothing(out: Path) -> None:
        pass

    with_train = folder / "with-train"
    attempt(source, with_train, "train")

    def first(out: Path) -> None:
        shutil.copytree(with_train, out)

    def failed(out: Path) -> None:
        shutil.copytree(with_failure, out)

    found = {
        "fresh": kills(folder, source, 1, 20, None, nothing, "fresh"),
        "second split": kills(folder, source, 2, 8, "eval", first, "second"),
        "full disk in the second split": kills(folder, source, 3, 16, "eval", first, "full-second", full=True),
        "failures tried again": kills(folder, mended, 4, 10, None, failed, "retry", retry=True),
        "full disk": full_disk(folder, source),
    }
    found["retry is as new"] = digests(folder / "whole-retry") == digests(folder / "whole-fresh")
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
