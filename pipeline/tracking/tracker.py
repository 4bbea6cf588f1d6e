"""What a job tells about itself, and the thread that passes it on.

In: calls. Out: lines of metrics.jsonl and of the spool; each call costs one buffered append.
"""

import getpass
import json
import logging
import math
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pipeline.config import LogConfig
from pipeline.data.corpus import Corpus
from pipeline.tracking.nodes import NodeMonitor
from pipeline.tracking.spool import RunRefused, Spool, first_line
from pipeline.tracking.store import artifact_location, tracking_uri, without_password

log = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parents[2]
Status = Literal["FINISHED", "FAILED", "KILLED"]
RETRY_SECONDS = 5.0
GATHER_SECONDS = 5.0  # between deliveries: many steps in one request cost the process a tenth of a request each
FAULT_PATIENCE = 30.0  # seconds for the last delivery of a run that failed
TRANSFER_PATIENCE = 20.0  # times as long may a server stay silent while a file is on its way


class Tracker:
    """Rank 0 writes `metrics.jsonl` and, where the run is tracked, the spool, which a daemon thread delivers.

    Args:
        run_dir: Run directory; None: nothing is written, as on other ranks.
        monitor: Of this node, where this rank is its first.
        tracked: In MLflow.
        patience: Seconds that the end of the run waits for the server since its last answer.
    """

    def __init__(
        self, run_dir: Path | None = None, monitor: NodeMonitor | None = None, tracked: bool = False,
        patience: float = 0.0,
    ) -> None:  # fmt: skip
        self._files = Spool(run_dir) if run_dir else None
        self._spool = self._files if tracked else None
        self._monitor, self._patience = monitor, patience
        self._stop, self._fresh = threading.Event(), threading.Event()
        self._warned = ""  # what was said last
        self._lost = 0  # lines since the disk took one
        self._told: dict[str, dict[int, float]] = {}  # metric -> step -> value in the spool: a resumed run says it once
        for line in self._spool.main.read() if self._spool else ():
            for n, value in line["values"].items() if line["kind"] == "metrics" else ():
                self._told.setdefault(n, {})[line["step"]] = value
        self._thread = threading.Thread(target=self._run, name="mlflow", daemon=True)
        if self._spool:
            self._thread.start()

    @property
    def run_id(self) -> str:
        """MLflow's id of the run; empty until the server has given one."""
        return str(self._spool.identity["run_id"]) if self._spool else ""

    def resume(self, step: int) -> None:
        """The run goes on from `step`: what metrics.jsonl has of later ones is of a lost attempt, and is cut off."""
        if self._files:
            self._files.metrics.cut(step, {n: max(told) for n, told in self._told.items()} if self._spool else None)

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Numbers of a step, as a line of metrics.jsonl; those that are not finite are left out: JSON has none.

        A line that the disk does not take is lost, and the run goes on: its next checkpoint is worth more.
        """
        if self._files and values:
            finite = {name: value for name, value in values.items() if math.isfinite(value)}
            try:
                self._files.metrics.append({"step": step, **finite})
                self._lost = 0
            except OSError as error:
                if not self._lost:
                    log.warning("%s: %s; the run goes on without its lines from step %d on, until there is room",
                                self._files.metrics.lines, error.strerror, step)  # fmt: skip
                self._lost += 1
            self._fresh.set()

    def summary(self, values: Mapping[str, float], step: int) -> None:
        """Numbers of the whole run, which its results have, where they are new or others; not in metrics.jsonl."""
        fresh = {n: float(value) for n, value in values.items()
                 if math.isfinite(value) and self._told.get(n, {}).get(step) != value}  # fmt: skip
        if fresh:
            self._append("metrics", {"values": fresh, "step": step})

    def params(self, values: Mapping[str, Any]) -> None:
        """Parameters, once; without the passwords of URLs."""
        self._append("params", {"values": json.loads(without_password(json.dumps(values)))})

    def tags(self, values: Mapping[str, str]) -> None:
        """Tags."""
        self._append("tags", {"values": dict(values)})

    def dataset(self, corpus: Corpus, source: str) -> None:
        """What the run reads, for MLflow's panel; and, as tags, which share of the listed clips the shards hold.

        Args:
            corpus: The shards.
            source: Their directory or URL, or those of several sets; a password in it is not told.
        """
        shares = {f"coverage.{name}": f"{split.clips} of {split.listed} ({split.clips / max(1, split.listed):.1%})"
                  for name, split in corpus.splits.items()}  # fmt: skip
        self.tags({"manifest_digest": corpus.digest, **shares})
        profile = {
            "classes": len(corpus.labels),
            "shards": sum(len(member.manifest.shards) for member in corpus.members),
            "sample_rate": corpus.audio.sample_rate,
            "seconds_per_clip": corpus.audio.seconds,
            **{f"{name}_clips": split.clips for name, split in corpus.splits.items()},
            **{f"{name}_listed": split.listed for name, split in corpus.splits.items()},
        }
        name = " + ".join(dict.fromkeys(member.manifest.dataset for member in corpus.members))
        about = {"name": name, "digest": corpus.digest, "source": without_password(source), "profile": profile}
        for context in ("training", "evaluation"):
            self._append("dataset", about | {"context": context})

    def artifact(self, path: Path, folder: str = "") -> None:
        """A file, as it is when it is delivered."""
        self._append("artifact", {"path": self._place(path), "folder": folder})

    def model(self, path: Path, step: int, tags: Mapping[str, str], card: str, register: str) -> None:
        """A saved pyfunc model; `register` names it in the registry, empty: it stays the run's."""
        content = {"path": self._place(path), "step": step, "tags": dict(tags), "card": card, "register": register}
        self._append("model", content)

    def finish(self, status: Status) -> None:
        """Ends the run; waits a bounded time for the delivery and says how to do the rest.

        After a fault the other ranks wait too: no longer than `FAULT_PATIENCE`.
        """
        if self._monitor:
            self._monitor.stop()
        if not (spool := self._spool):
            return
        self._append("finish", {"status": status})
        self._stop.set()
        self._fresh.set()
        progress, answered = -1, time.monotonic()
        limit = answered + FAULT_PATIENCE
        while self._thread.is_alive():
            if progress != spool.progress:
                progress, answered = spool.progress, time.monotonic()
            patience = self._patience * (TRANSFER_PATIENCE if spool.transferring else 1.0)
            if time.monotonic() - answered > patience or (status == "FAILED" and time.monotonic() > limit):
                break
            self._thread.join(0.2)
        if spool.refused:
            log.warning("MLflow refused %d records for good: %s", spool.refused, spool.refused_file)
        if spool.waiting:
            left = sum(feed.left for feed in spool.feeds())
            reason = self._warned or f"no answer for {time.monotonic() - answered:.0f} s (log.finish_wait)"
            log.warning(
                "MLflow at %s: %s; %d records of this run wait in %s; when that is mended, deliver them: python -m "
                "pipeline.tracking sync %s",
                without_password(spool.identity["uri"]), reason, left, spool.run_dir, spool.run_dir,
            )  # fmt: skip

    def _place(self, path: Path) -> str:
        """Of a file or directory: within the run directory, which may be moved before the delivery, else absolute."""
        home = self._files.run_dir.resolve() if self._files else Path()
        place = path.resolve()
        return str(place.relative_to(home) if place.is_relative_to(home) else place)

    def _append(self, kind: str, content: Mapping[str, Any]) -> None:
        if not self._spool:
            return
        try:
            self._spool.main.append({"kind": kind, **content})
        except OSError as error:  # a full disk: the run's own files will say so, or it passes
            log.warning("MLflow: %s: %s; not tracked: %s", self._spool.main.lines, error.strerror, kind)
        self._fresh.set()

    def _warn(self, text: str) -> None:
        """Says what keeps the records waiting, once."""
        if text != self._warned:
            log.warning("MLflow: %s; the run goes on, and its records wait in the spool", text)
        self._warned = text

    def _run(self) -> None:
        """The thread."""
        assert self._spool
        while True:
            self._fresh.wait()
            self._fresh.clear()
            stopping = self._stop.is_set()
            try:
                while self._spool.deliver():
                    self._warned = ""
            except Exception as error:  # of whatever kind: the next try may succeed
                log.debug("delivery", exc_info=True)
                self._spool.transferring = False
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
        rank: Only 0 writes.
        kind: "pretrain", "finetune" or "cross-validation", a tag.
        parent: Run directory that the weights come from; its MLflow run is linked.
        part_of: Run directory of the cross-validation; its MLflow run becomes the parent instead.
        first_of_node: This rank samples its node.
    """
    if not config.mlflow:
        return Tracker(None if rank else run_dir)
    monitor = NodeMonitor(run_dir, rank == 0, config.system_every) if first_of_node and config.system_every else None
    if rank:
        return Tracker(None, monitor)
    spool, home = Spool(run_dir), part_of or run_dir  # folds are in the store of the whole
    uri, about = tracking_uri(config, home), _about_machine()
    here = {"uri": uri, "experiment": config.experiment, "artifacts": artifact_location(config, home)}
    if spool.exists and _is_copy(spool):
        log.info("%s is a copy of %s, which keeps its MLflow run: this one gets its own", run_dir,
                 spool.identity["tags"]["run_dir"])  # fmt: skip
        spool.identity_file.unlink()
    if not spool.exists:
        source = {"pretrain_dir": str(run_of(parent).resolve())} if parent else {}
        source |= {"part_of": str(part_of.resolve())} if part_of else {}
        tags = {"kind": kind, "run_dir": str(run_dir.resolve()), "resumes": "0", **source, **_about_start(), **about}
        for feed in spool.feeds():  # tracking.json was deleted, or a copy: the new MLflow run is told all that is here
            feed.offset.unlink(missing_ok=True)
        spool.given_file.unlink(missing_ok=True)
        spool.identity = here | {"name": name, "run_id": "", "tags": tags}
        if not spool.main.lines.exists():
            return Tracker(run_dir, monitor, True, config.finish_wait)
    identity = spool.identity
    if not identity["run_id"]:  # no server has it yet: mistakes are mended
        spool.identity = identity | here
    elif uri != identity["uri"] and (config.uri or os.environ.get("MLFLOW_TRACKING_URI")):
        log.warning(
            "the run is tracked at %s and stays there, not at %s; where the server moved: python -m pipeline.tracking "
            "sync %s --uri URI", without_password(identity["uri"]), without_password(uri), run_dir,
        )  # fmt: skip
    spool.main.mend()
    resumes = 1 + sum(line["kind"] == "resume" for line in spool.main.read())
    spool.main.append({"kind": "resume"})
    tracker = Tracker(run_dir, monitor, True, config.finish_wait)
    tracker.tags({"resumes": str(resumes), **about})
    return tracker


def _is_copy(spool: Spool) -> bool:
    """Its MLflow run is that of another directory which is still there; both would write into it."""
    identity = spool.identity
    original = Spool(Path(identity["tags"].get("run_dir", spool.run_dir)))
    if not os.access(original.identity_file, os.R_OK) or original.run_dir.samefile(spool.run_dir):
        return False
    return bool(identity["run_id"]) and identity["run_id"] == original.identity["run_id"]


def run_of(source: str) -> Path:
    """The run directory that weights come from: `model.init` may name one of its checkpoints."""
    path = Path(source)
    return path.parent.parent if path.parent.name == "checkpoints" else path


def _about_start() -> dict[str, str]:
    """Who started it and with which program, for the columns "User" and "Source" of MLflow's page."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user may have a number and no name
        user = str(os.getuid())
    return {"mlflow.user": user, "mlflow.source.name": sys.argv[0], "mlflow.source.type": "LOCAL"}


def _about_machine() -> dict[str, str]:
    """Host, Python, GPUs; commit and state of the code, where it is a git checkout."""
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    about = {
        "host": platform.node(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "gpus": ", ".join(f"{gpus.count(name)} x {name}" for name in dict.fromkeys(gpus)) or "none",
    }
    try:
        commit, state = (
            subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain"])
        )
    except (OSError, subprocess.CalledProcessError):
        return about
    return about | {"mlflow.source.git.commit": commit, "git_dirty": str(bool(state)).lower()}
