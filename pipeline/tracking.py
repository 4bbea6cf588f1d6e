"""MLflow, never in the way of training.

In: parameters, tags, metrics and files of a run. Out: one MLflow run per job, from rank 0.

Every call appends a line to `RUN_DIR/tracking.jsonl` and returns; a daemon thread delivers the lines in
order and notes how far it came in `tracking.offset`. A server that is slow, down or dies in the middle
costs training nothing and loses nothing: what it has not confirmed stays in the spool, and

    python -m pipeline.tracking sync RUN_DIR

delivers it later. The store is `log.uri`, else MLFLOW_TRACKING_URI, else SQLite beside the run
directory. Cost per logged step: one buffered append; delivery is batched.
"""

import argparse
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
from typing import Any, Literal, Protocol

from pipeline.config import LogConfig
from pipeline.errors import UserError, run_cli

log = logging.getLogger(__name__)

Status = Literal["FINISHED", "FAILED", "KILLED"]
RETRY_SECONDS = 5.0
FINISH_SECONDS = 30.0  # patience with a slow server at the end of a run
BATCH_LINES = 200


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

    def artifact(self, path: Path) -> None:
        """A file, as it is when it is delivered."""

    def finish(self, status: Status) -> None:
        """Ends the run; waits a bounded time for the delivery."""


class NullTracker:
    """The twin that does nothing: other ranks, and `log.mlflow=false`."""

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

    def artifact(self, path: Path) -> None:
        """Nothing."""

    def finish(self, status: Status) -> None:
        """Nothing."""


class Spool:
    """The append-only file between a run and its server, and the delivery of its lines.

    The run is created by the first delivery; its id is kept in `tracking.json`, so a resumed job and
    a later `sync` go on in the same run. A line is delivered again only if the process died between
    the server's answer and the note of it; MLflow keeps one value per (metric, step, time), and the
    time is the line's own.

    Args:
        run_dir: Run directory.
    """

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.lines = run_dir / "tracking.jsonl"
        self.offset = run_dir / "tracking.offset"
        self.identity = run_dir / "tracking.json"

    def append(self, kind: str, content: Mapping[str, Any]) -> None:
        """Adds one line; flushed to the system, so it survives the death of the process."""
        line = json.dumps({"kind": kind, "time": int(time.time() * 1000), **content}, ensure_ascii=False)
        with self.lines.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def deliver(self) -> bool:
        """Sends a batch of the lines that the server has not confirmed.

        Returns:
            False where nothing is left.

        Raises:
            MlflowException: the server did not take it.
        """
        done = int(self.offset.read_text(encoding="utf-8")) if self.offset.exists() else 0
        with self.lines.open("rb") as file:
            file.seek(done)
            raw = [line for line in (file.readline() for _ in range(BATCH_LINES)) if line.endswith(b"\n")]
        if not raw:
            return False
        self._send([json.loads(line) for line in raw])
        temporary = self.offset.with_suffix(".tmp")
        temporary.write_text(str(done + sum(map(len, raw))), encoding="utf-8")
        temporary.replace(self.offset)
        return True

    def _send(self, lines: list[dict[str, Any]]) -> None:
        # Importing MLflow takes seconds, so it happens in the delivering thread.
        from mlflow.entities import Metric, Param, RunTag
        from mlflow.tracking import MlflowClient

        identity = json.loads(self.identity.read_text(encoding="utf-8"))
        client = MlflowClient(identity["uri"])
        if not identity["run_id"]:
            identity["run_id"] = self._create(client, identity)
            self.identity.write_text(json.dumps(identity), encoding="utf-8")
        run_id = identity["run_id"]
        batch: dict[str, list[Any]] = {"metrics": [], "params": [], "tags": []}
        params: dict[str, str] = {}
        for line in lines:
            if line["kind"] == "metrics":
                batch["metrics"] += [
                    Metric(name, value, line["time"], line["step"]) for name, value in line["values"].items()
                ]
            elif line["kind"] == "params":
                params |= {name: str(value)[:6000] for name, value in line["values"].items()}
            elif line["kind"] == "tags":
                batch["tags"] += [RunTag(name, str(value)) for name, value in line["values"].items()]
            elif line["kind"] == "artifact" and Path(line["path"]).exists():
                client.log_artifact(run_id, line["path"])
        # MLflow's parameters cannot change; a resumed job may, in train.steps for instance: a tag says so.
        known = client.get_run(run_id).data.params if params else {}
        batch["params"] = [Param(name, value) for name, value in params.items() if name not in known]
        batch["tags"] += [RunTag(f"changed.{name}", params[name]) for name in known.keys() & params.keys()
                          if known[name] != params[name]]  # fmt: skip
        while any(batch.values()):  # within the server's limits on one request
            taken = {kind: [items.pop(0) for _ in items[:100]] for kind, items in batch.items()}
            client.log_batch(run_id, metrics=taken["metrics"], params=taken["params"], tags=taken["tags"])
        if lines[-1]["kind"] == "finish":
            client.set_terminated(run_id, lines[-1]["status"], lines[-1]["time"])
        elif any(line["kind"] == "resume" for line in lines):
            client.update_run(run_id, "RUNNING")

    def _create(self, client: Any, identity: dict[str, Any]) -> str:
        experiment = client.get_experiment_by_name(identity["experiment"])
        location = identity["artifacts"] or None
        number = experiment.experiment_id if experiment else client.create_experiment(identity["experiment"], location)
        return str(client.create_run(number, run_name=identity["name"], tags=identity["tags"]).info.run_id)


class SpoolTracker:
    """Appends to the spool, with a daemon thread that delivers."""

    def __init__(self, spool: Spool) -> None:
        self._spool = spool
        self._stop = threading.Event()
        self._fresh = threading.Event()
        self._warned = False
        self._thread = threading.Thread(target=self._run, name="mlflow", daemon=True)
        self._thread.start()

    @property
    def run_id(self) -> str:
        """MLflow's id of the run; empty until the server has given one."""
        return str(json.loads(self._spool.identity.read_text(encoding="utf-8"))["run_id"])

    def params(self, values: Mapping[str, Any]) -> None:
        """Parameters, once."""
        self._append("params", {"values": dict(values)})

    def tags(self, values: Mapping[str, str]) -> None:
        """Tags."""
        self._append("tags", {"values": dict(values)})

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Numbers at a step; values that are not finite are left out, stores differ in taking them."""
        finite = {name: float(value) for name, value in values.items() if math.isfinite(value)}
        self._append("metrics", {"values": finite, "step": step})

    def artifact(self, path: Path) -> None:
        """A file, as it is when it is delivered."""
        self._append("artifact", {"path": str(path.resolve())})

    def finish(self, status: Status) -> None:
        """Ends the run; waits at most 30 s for the delivery and says how to do the rest."""
        self._append("finish", {"status": status})
        self._stop.set()
        self._fresh.set()
        self._thread.join(FINISH_SECONDS)
        if self._thread.is_alive():
            log.warning(
                "the MLflow server is not answering; deliver later with: python -m pipeline.tracking sync %s",
                self._spool.run_dir,
            )

    def _append(self, kind: str, content: Mapping[str, Any]) -> None:
        self._spool.append(kind, content)
        self._fresh.set()

    def _run(self) -> None:
        from mlflow.exceptions import MlflowException

        while True:
            self._fresh.wait()
            self._fresh.clear()
            stopping = self._stop.is_set()
            try:
                while self._spool.deliver():
                    self._warned = False
            except (MlflowException, OSError) as error:
                if not self._warned:
                    log.warning("MLflow: %s; the run goes on, and its records wait in the spool", error)
                self._warned = True
                self._stop.wait(RETRY_SECONDS) if not stopping else time.sleep(1.0)
                self._fresh.set()
                continue
            if stopping:
                return


def open_tracker(
    config: LogConfig, run_dir: Path, *, name: str, rank: int, kind: str, parent: str | None
) -> Tracker:
    """Starts or resumes the tracking of a job.

    Args:
        config: Settings.
        run_dir: Run directory; holds the spool.
        name: Of the run, BatchSize-Pretrain-Finetune.
        rank: Only 0 tracks.
        kind: "pretrain" or "finetune", a tag.
        parent: Run directory that the weights come from; its MLflow run is linked.
    """
    if rank != 0 or not config.mlflow:
        return NullTracker()
    spool = Spool(run_dir)
    resumed = spool.identity.exists()
    if not resumed:
        identity = {
            "uri": tracking_uri(config, run_dir),
            "experiment": config.experiment,
            "artifacts": "" if config.uri or os.environ.get("MLFLOW_TRACKING_URI") else _local_artifacts(run_dir),
            "name": name,
            "run_id": "",
            "tags": _tags(run_dir, kind, parent),
        }
        spool.identity.write_text(json.dumps(identity), encoding="utf-8")
    tracker = SpoolTracker(spool)
    if resumed:
        spool.append("resume", {})
    return tracker


def tracking_uri(config: LogConfig, run_dir: Path) -> str:
    """Where a run is tracked: the setting, the environment, or SQLite beside the run directory."""
    beside = run_dir.resolve().parent / "mlflow.db"
    return config.uri or os.environ.get("MLFLOW_TRACKING_URI", "") or f"sqlite:///{beside}"


def run_of(source: str) -> Path:
    """The run directory that weights come from: `model.init` may name one of its checkpoints."""
    path = Path(source)
    return path.parent.parent if path.parent.name == "checkpoints" else path


def _local_artifacts(run_dir: Path) -> str:
    return (run_dir.resolve().parent / "mlartifacts").as_uri()


def _tags(run_dir: Path, kind: str, parent: str | None) -> dict[str, str]:
    tags = {
        "kind": kind,
        "run_dir": str(run_dir.resolve()),
        "host": platform.node(),
        "python": platform.python_version(),
        **_git(),
    }
    identity = run_of(parent or "") / "tracking.json"
    if parent:
        tags["pretrain_dir"] = str(run_of(parent).resolve())
    if parent and identity.is_file():
        linked = json.loads(identity.read_text(encoding="utf-8"))["run_id"]
        tags |= {"pretrain_run_id": linked, "mlflow.parentRunId": linked} if linked else {}
    return tags


def _git() -> dict[str, str]:
    """Commit and state of the code; none where it is not a git checkout."""
    root = Path(__file__).resolve().parents[1]
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True)
        state = subprocess.run(["git", "status", "--porcelain"], cwd=root, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return {}
    return {"mlflow.source.git.commit": commit.stdout.strip(), "git_dirty": str(bool(state.stdout.strip())).lower()}


def main() -> int:
    """`python -m pipeline.tracking sync RUN_DIR`: delivers what a run's server has not taken yet."""
    from mlflow.exceptions import MlflowException

    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("command", choices=["sync"])
    parser.add_argument("run_dir", type=Path, help="run directory")
    args = parser.parse_args()
    spool = Spool(args.run_dir)
    if not spool.identity.exists():
        raise UserError(f"{args.run_dir}: holds no tracking.json; give the directory of a tracked run")
    try:
        while spool.deliver():
            pass
    except MlflowException as error:
        raise UserError(f"{args.run_dir}: the MLflow server did not take it: {error}; start it and repeat") from error
    sys.stdout.write(f"{args.run_dir}: all delivered\n")
    return 0


if __name__ == "__main__":
    run_cli(main)
