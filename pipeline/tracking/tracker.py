"""What a job tells about itself, and the thread that passes it on.

In: calls. Out: lines of a spool; each call costs one buffered append.
"""

import logging
import math
import os
import re
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Literal, Protocol

from pipeline.config import LogConfig
from pipeline.errors import UserError
from pipeline.tracking.deliver import Delivery, RunRefused, first_line
from pipeline.tracking.facts import about_code, about_host, about_start
from pipeline.tracking.nodes import NodeMonitor
from pipeline.tracking.spool import Spool, without_password

log = logging.getLogger(__name__)

Status = Literal["FINISHED", "FAILED", "KILLED"]
DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
HOST = re.compile(r"[A-Za-z0-9.-]+:\d+/?")
RETRY_SECONDS = 5.0
GATHER_SECONDS = 5.0  # between deliveries: many steps in one request cost the process a tenth of a request each
FAULT_PATIENCE = 30.0  # seconds for the last delivery of a run that failed
TRANSFER_PATIENCE = 20.0  # times as long may a server stay silent while a file is on its way


@dataclass(frozen=True)
class DatasetNote:
    """A data set for MLflow's panel.

    Attributes:
        name: Of the data set.
        digest: Of the manifest.
        source: Directory or URL of the shards.
        profile: Counts.
        context: "training" or "evaluation".
    """

    name: str
    digest: str
    source: str
    profile: Mapping[str, Any]
    context: str


class Tracker(Protocol):
    """What a job tells about itself."""

    @property
    def run_id(self) -> str:
        """MLflow's id of the run; empty until there is one."""

    def params(self, values: Mapping[str, Any]) -> None:
        """Parameters, once."""

    def tags(self, values: Mapping[str, str]) -> None:
        """Tags."""

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Numbers at a step."""

    def dataset(self, note: DatasetNote) -> None:
        """What the run reads."""

    def artifact(self, path: Path, folder: str = "") -> None:
        """A file, as it is when it is delivered."""

    def model(self, path: Path, step: int, tags: Mapping[str, str], card: str, register: str) -> None:
        """A saved pyfunc model; `register` names it in the registry, empty: it stays the run's."""

    def finish(self, status: Status) -> None:
        """Ends the run; waits a bounded time for the delivery."""


class NullTracker:
    """The twin that does nothing: other ranks, and `log.mlflow=false`.

    Args:
        monitor: Of the node, where this rank is its first.
    """

    def __init__(self, monitor: NodeMonitor | None = None) -> None:
        self._monitor = monitor

    @property
    def run_id(self) -> str:
        """None."""
        return ""

    def params(self, values: Mapping[str, Any]) -> None:
        """Nothing."""

    def tags(self, values: Mapping[str, str]) -> None:
        """Nothing."""

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Nothing."""

    def dataset(self, note: DatasetNote) -> None:
        """Nothing."""

    def artifact(self, path: Path, folder: str = "") -> None:
        """Nothing."""

    def model(self, path: Path, step: int, tags: Mapping[str, str], card: str, register: str) -> None:
        """Nothing."""

    def finish(self, status: Status) -> None:
        """Ends the node's monitor."""
        if self._monitor:
            self._monitor.stop()


class SpoolTracker:
    """Appends to the spool, with a daemon thread that delivers.

    A resumed run may repeat steps of an attempt that was lost after its last checkpoint. They are told
    once: MLflow cannot take a value back, and the repeated one is the same.

    Args:
        spool: Of the run.
        monitor: Of this node.
        patience: Seconds that the end of the run waits for the server since its last answer.
    """

    def __init__(self, spool: Spool, monitor: NodeMonitor | None, patience: float) -> None:
        self._patience = patience
        self._spool = spool
        self._monitor = monitor
        self._uri = str(spool.identity["uri"])
        self._delivery = Delivery(spool)
        self._stop = threading.Event()
        self._fresh = threading.Event()
        self._warned = ""  # what was said last
        self._told: dict[str, int] = {}
        for line in spool.main.read():
            if line["kind"] == "metrics":
                self._told |= {n: line["step"] for n in line["values"] if line["step"] > self._told.get(n, -1)}
        self._thread = threading.Thread(target=self._run, name="mlflow", daemon=True)
        self._thread.start()

    @property
    def run_id(self) -> str:
        """MLflow's id of the run; empty until the server has given one."""
        return str(self._spool.identity["run_id"])

    def params(self, values: Mapping[str, Any]) -> None:
        """Parameters, once."""
        self._append("params", {"values": dict(values)})

    def tags(self, values: Mapping[str, str]) -> None:
        """Tags."""
        self._append("tags", {"values": dict(values)})

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Numbers at a step; values that are not finite are left out, stores differ in taking them."""
        fresh = {
            name: float(value)
            for name, value in values.items()
            if math.isfinite(value) and step > self._told.get(name, -1)
        }
        if fresh:
            self._append("metrics", {"values": fresh, "step": step})

    def dataset(self, note: DatasetNote) -> None:
        """What the run reads."""
        self._append("dataset", vars(note))

    def artifact(self, path: Path, folder: str = "") -> None:
        """A file, as it is when it is delivered."""
        self._append("artifact", {"path": str(path.resolve()), "folder": folder})

    def model(self, path: Path, step: int, tags: Mapping[str, str], card: str, register: str) -> None:
        """A saved pyfunc model; `register` names it in the registry, empty: it stays the run's."""
        content = {"path": str(path.resolve()), "step": step, "tags": dict(tags), "card": card, "register": register}
        self._append("model", content)

    def finish(self, status: Status) -> None:
        """Ends the run; waits a bounded time for the delivery and says how to do the rest.

        After a fault the other ranks wait too: no longer than `FAULT_PATIENCE`.
        """
        if self._monitor:
            self._monitor.stop()
        self._append("finish", {"status": status})
        self._stop.set()
        self._fresh.set()
        progress, answered = -1, time.monotonic()
        limit = answered + FAULT_PATIENCE
        while self._thread.is_alive():
            if progress != self._delivery.progress:
                progress, answered = self._delivery.progress, time.monotonic()
            patience = self._patience * (TRANSFER_PATIENCE if self._delivery.transferring else 1.0)
            if time.monotonic() - answered > patience or (status == "FAILED" and time.monotonic() > limit):
                break
            self._thread.join(0.2)
        if self._spool.refused:
            log.warning("MLflow refused %d records for good: %s", self._spool.refused, self._spool.refused_file)
        if self._spool.waiting:
            left = sum(feed.left for feed in self._spool.feeds())
            reason = self._warned or f"no answer for {time.monotonic() - answered:.0f} s (log.finish_wait)"
            log.warning(
                "MLflow at %s: %s; %d records of this run wait in %s; when that is mended, deliver them: python -m "
                "pipeline.tracking sync %s",
                without_password(self._uri), reason, left, self._spool.main.lines, self._spool.run_dir,
            )  # fmt: skip

    def _append(self, kind: str, content: Mapping[str, Any]) -> None:
        try:
            self._spool.main.append(kind, content)
        except OSError as error:  # a full disk: the run's own files will say so, or it passes
            self._warn(f"{self._spool.main.lines}: {error.strerror}")
        self._fresh.set()

    def _warn(self, text: str) -> None:
        """Says what keeps the records waiting, once."""
        if text != self._warned:
            log.warning("MLflow: %s; the run goes on, and its records wait in the spool", text)
        self._warned = text

    def _run(self) -> None:
        while True:
            self._fresh.wait()
            self._fresh.clear()
            stopping = self._stop.is_set()
            try:
                while self._spool.deliver(self._delivery.send):
                    self._warned = ""
            except Exception as error:  # of whatever kind: the next try may succeed
                log.debug("delivery", exc_info=True)
                self._delivery.transferring = False
                self._warn(first_line(error))
                if stopping and isinstance(error, RunRefused):
                    return
                self._stop.wait(RETRY_SECONDS) if not stopping else time.sleep(1.0)
                self._fresh.set()
                continue
            if stopping:
                return
            self._stop.wait(GATHER_SECONDS)


def open_tracker(
    config: LogConfig,
    run_dir: Path,
    *,
    name: str,
    rank: int,
    kind: str,
    parent: str | None,
    part_of: Path | None = None,
    first_of_node: bool = False,
) -> Tracker:
    """Starts or resumes the tracking of a job.

    Args:
        config: Settings.
        run_dir: Run directory; holds the spool.
        name: Of the run, BatchSize-Pretrain-Finetune.
        rank: Only 0 tracks.
        kind: "pretrain", "finetune" or "cross-validation", a tag.
        parent: Run directory that the weights come from; its MLflow run is linked.
        part_of: Run directory of the cross-validation; its MLflow run becomes the parent instead.
        first_of_node: This rank samples its node.
    """
    if not config.mlflow:
        return NullTracker()
    monitor = NodeMonitor(run_dir, rank == 0, config.system_every) if first_of_node and config.system_every else None
    if rank != 0:
        return NullTracker(monitor)
    spool = Spool(run_dir)
    if not spool.exists:
        home = part_of or run_dir  # folds are in the store of the whole
        source = {"pretrain_dir": str(run_of(parent).resolve())} if parent else {}
        source |= {"part_of": str(part_of.resolve())} if part_of else {}
        spool.identity = {
            "uri": tracking_uri(config, home),
            "experiment": config.experiment,
            "artifacts": _artifacts(config, home),
            "name": name,
            "run_id": "",
            "tags": {"kind": kind, "run_dir": str(run_dir.resolve()), "resumes": "0", **source, **about_start(),
                     **about_host(), **about_code()},
        }  # fmt: skip
        return SpoolTracker(spool, monitor, config.finish_wait)
    identity, uri = spool.identity, tracking_uri(config, part_of or run_dir)
    if not identity["run_id"]:  # no server has it yet: mistakes are mended
        here = {"uri": uri, "experiment": config.experiment, "artifacts": _artifacts(config, part_of or run_dir)}
        spool.identity = identity | here
    elif uri != identity["uri"] and (config.uri or os.environ.get("MLFLOW_TRACKING_URI")):
        log.warning(
            "the run is tracked at %s and stays there, not at %s; where the server moved: python -m pipeline.tracking "
            "sync %s --uri URI", without_password(identity["uri"]), without_password(uri), run_dir,
        )  # fmt: skip
    spool.main.mend()
    resumes = 1 + sum(line["kind"] == "resume" for line in spool.main.read())
    spool.main.append("resume", {})
    tracker = SpoolTracker(spool, monitor, config.finish_wait)
    tracker.tags({"resumes": str(resumes), **about_host(), **about_code()})
    return tracker


def tracking_uri(config: LogConfig, run_dir: Path) -> str:
    """Where a run is tracked: the setting, the environment, or SQLite beside the run directory.

    Raises:
        UserError: a URI that can never work.
    """
    named = config.uri or os.environ.get("MLFLOW_TRACKING_URI", "")
    if named:
        what = "log.uri" if config.uri else "MLFLOW_TRACKING_URI"
        check_uri(named, what)
        return named
    return sqlite_uri(run_dir.resolve().parent / "mlflow.db")


def sqlite_uri(file: Path) -> str:
    """SQLAlchemy's URL of a SQLite file: `?` and `%` in a name have a meaning in it, and are written otherwise.

    Raises:
        UserError: this SQLAlchemy cannot express the name.
    """
    from sqlalchemy.engine import URL, make_url

    if make_url(uri := f"sqlite:///{file}").database == str(file):
        return uri
    # With the driver's name: of a plain sqlite:/// MLflow makes the parent directory, as it is spelt in the URI.
    uri = URL.create("sqlite+pysqlite", database=str(file)).render_as_string(hide_password=False)
    if make_url(uri).database != str(file):
        raise UserError(f"{file}: its name cannot be written as a SQLite URI; choose another directory, or set log.uri")
    return uri


def check_uri(uri: str, what: str) -> None:
    """Refuses what MLflow would refuse each time; a server that is down is not asked.

    Args:
        uri: MLflow tracking URI.
        what: The setting, for the message.

    Raises:
        UserError: no scheme, one that neither MLflow nor a plugin knows, or a database URL that cannot be opened.
    """
    shown = f"{what} = {without_password(uri)}"
    scheme, separator, rest = uri.partition("://")
    if separator and scheme.split("+")[0] in DATABASES:
        from sqlalchemy.engine import make_url
        from sqlalchemy.exc import SQLAlchemyError

        try:
            url = make_url(uri)
            url.get_dialect().import_dbapi()
        except (SQLAlchemyError, ImportError, ValueError) as error:
            raise UserError(f"{shown}: {error}; install it, or name another driver, DB+DRIVER://") from error
        if scheme == "sqlite" and url.host:
            raise UserError(f"{shown}: a SQLite file has three slashes; write sqlite:///{rest}")
        return
    plugins = {entry.name for entry in entry_points(group="mlflow.tracking_store")}
    if (separator and scheme in ("http", "https") and rest.strip("/")) or uri.split(":")[0] in {"databricks"} | plugins:
        return
    path = uri.removeprefix("file:")
    if HOST.fullmatch(uri):
        raise UserError(f"{shown}: a server's address begins with its protocol; write http://{uri}")
    if os.environ.get("MLFLOW_ALLOW_FILE_STORE", "").lower() in ("true", "1") and "://" not in path:
        return
    raise UserError(
        f"{shown}: neither a server nor a database, and MLflow keeps runs in plain directories no more; write "
        "http://HOST:5000 or sqlite:///PATH/mlflow.db"
    )


def run_of(source: str) -> Path:
    """The run directory that weights come from: `model.init` may name one of its checkpoints."""
    path = Path(source)
    return path.parent.parent if path.parent.name == "checkpoints" else path


def _artifacts(config: LogConfig, run_dir: Path) -> str:
    """Where artifacts go: beside the SQLite file of our own; empty: the server says."""
    if config.uri or os.environ.get("MLFLOW_TRACKING_URI"):
        return ""
    return (run_dir.resolve().parent / "mlartifacts").as_uri()
