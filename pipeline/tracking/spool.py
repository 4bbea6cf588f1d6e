"""The append-only files between a run and its MLflow server.

In: lines. Out: the lines that the server has not confirmed, in order. One feed is the run's own, one more
for each node's system metrics. A feed is JSON lines; `.offset` beside it says how far it is delivered. A run and a
`sync` of it may deliver at the same time: a lock lets one batch go out after the other.
"""

import errno
import fcntl
import json
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.files import read_json, write_json

BATCH_LINES = 200
Line = dict[str, Any]
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # file systems without them
_IMPORTING = threading.Lock()


def load_mlflow() -> None:
    """Imports MLflow, which takes seconds: in a thread, never in the way of the first step.

    Its modules import each other in circles: two threads doing so at once see half of them.
    """
    with _IMPORTING:
        import mlflow.pyfunc
        import mlflow.system_metrics.system_metrics_monitor
        import mlflow.tracking  # noqa: F401


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """One process, and one thread of it, at a time; where the file system has no locks, all."""
    with file.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
        yield


def sqlite_file(uri: str) -> Path | None:
    """The file of a `sqlite:///` URI; None where it names none."""
    from sqlalchemy.engine import make_url

    url = make_url(uri)
    return None if url.host or url.database in (None, "", ":memory:") else Path(str(url.database))


def without_password(uri: str) -> str:
    """For people and logs."""
    return re.sub(r"//[^/@]*@", "//***@", uri)


class Feed:
    """A file that one process appends to and one delivers from.

    Args:
        lines: The file.
    """

    def __init__(self, lines: Path) -> None:
        self.lines = lines
        self.offset = lines.with_suffix(".offset")

    def append(self, kind: str, content: Mapping[str, Any]) -> None:
        """Adds one line; handed to the system, so it survives the death of the process."""
        line = json.dumps({"kind": kind, "time": int(time.time() * 1000), **content}, ensure_ascii=False)
        with self.lines.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def read(self) -> list[Line]:
        """All whole lines; what a crash of the machine left of others is passed over."""
        if not self.lines.exists():
            return []
        with self.lines.open("rb") as file:
            return [found for line in file if (found := _parse(line)) is not None]

    def mend(self) -> None:
        """Cuts off a last line that a kill left half written, so that the next one starts afresh."""
        if not self.lines.exists():
            return
        with self.lines.open("rb+") as file:
            content = file.read()
            file.truncate(content.rfind(b"\n") + 1)

    @property
    def delivered(self) -> int:
        """Bytes that the server has confirmed; 0 where the note of it is damaged: lines may be sent twice."""
        try:
            return int(self.offset.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return 0

    @property
    def left(self) -> int:
        """Lines that are not delivered."""
        if not self.lines.exists():
            return 0
        with self.lines.open("rb") as file:
            file.seek(self.delivered)
            return sum(1 for _ in file)

    @property
    def waiting(self) -> bool:
        """Lines are not delivered."""
        return self.lines.exists() and self.lines.stat().st_size > self.delivered

    def deliver(self, send: Callable[[list[Line]], None]) -> bool:
        """Sends a batch of the lines that were not confirmed.

        A line is sent again only if the process died between the server's answer and the note of it;
        MLflow keeps one value per (metric, step, time), and the time is the line's own.

        Returns:
            False where nothing is left.
        """
        if not self.waiting:
            return False
        done = self.delivered
        with self.lines.open("rb") as file:
            file.seek(done)
            raw = [line for line in (file.readline() for _ in range(BATCH_LINES)) if line.endswith(b"\n")]
        if not raw:
            return False
        lines = [found for line in raw if (found := _parse(line)) is not None]
        if lines:
            send(lines)
        temporary = self.offset.with_suffix(".tmp")
        temporary.write_text(str(done + sum(map(len, raw))), encoding="utf-8")
        temporary.replace(self.offset)
        return True


def _parse(line: bytes) -> Line | None:
    """A line of a feed; None where it was left half written."""
    try:
        found = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


class Spool:
    """The feeds of a run directory, and the identity of its MLflow run.

    `tracking.json` holds where the run is tracked and, once the server has made it, its id; so a resumed
    job and a later `sync` go on in the same run.

    Args:
        run_dir: Run directory.
    """

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.main = Feed(run_dir / "tracking.jsonl")
        self.identity_file = run_dir / "tracking.json"
        self.refused_file = run_dir / "tracking.refused.jsonl"

    @property
    def exists(self) -> bool:
        """The run is tracked."""
        return self.identity_file.exists()

    @property
    def identity(self) -> dict[str, Any]:
        """Content of `tracking.json`.

        Raises:
            UserError: it is damaged.
        """
        content: dict[str, Any] = read_json(self.identity_file, "delete it, and the next start makes a new MLflow run")
        return content

    @identity.setter
    def identity(self, content: dict[str, Any]) -> None:
        write_json(self.identity_file, content)

    def refuse(self, line: Line, reason: str) -> None:
        """Sets aside a line that the server refuses for good; a line that is there already is not added again."""
        text = json.dumps({**line, "refused": reason}, ensure_ascii=False) + "\n"
        known = self.refused_file.read_text(encoding="utf-8") if self.refused_file.exists() else ""
        if text not in known:
            with self.refused_file.open("a", encoding="utf-8") as file:
                file.write(text)

    @property
    def refused(self) -> int:
        """Lines that are set aside."""
        return len(self.refused_file.read_bytes().splitlines()) if self.refused_file.exists() else 0

    def feeds(self) -> list[Feed]:
        """The run's own first: it makes the run."""
        return [self.main, *(Feed(file) for file in sorted(self.run_dir.glob("system/*.jsonl")))]

    @property
    def waiting(self) -> bool:
        """Lines are not delivered."""
        return any(feed.waiting for feed in self.feeds())

    def deliver(self, send: Callable[[list[Line]], None]) -> bool:
        """Sends a batch of each feed, once another process has sent its own; False where nothing is left."""
        if not self.waiting:
            return False
        with locked(self.run_dir / "tracking.lock"):  # two at once would send twice, and write over an offset
            more = [feed.deliver(send) for feed in self.feeds()]  # each gets its turn
        return any(more)
