"""The files between a run and its MLflow server, and their delivery.

    metrics.jsonl         the numbers of the run's steps
    tracking.jsonl        all else that it says: parameters, tags, data sets, files, models, its end
    system/HOST.jsonl     system metrics of a node
    *.offset              how far each of them is delivered; beside it a lock
    tracking.json         where the run is tracked and, once the server has made it, its id
    tracking.given.json   the same once more, from then on: a directory that is copied again brings a tracking.json
                          without the id

In: lines, appended by the run. Out: an MLflow run. Every kind of line can be sent twice without harm: MLflow keeps one
value per (metric, step, time), and the time is the line's own. A run and a `sync` of it may deliver at the same time:
a lock lets one batch go out after the other.

What MLflow refuses for good, such as a name, is set aside in `tracking.refused.jsonl` with the reason, and the others
go on. Where it refuses the run itself (deleted, or its experiment is), all lines wait.
"""

import errno
import json
import logging
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import yaml

from pipeline.files import locked, new_file, read_json, write_json, write_text
from pipeline.tracking.store import load_mlflow, sqlite_file, without_password

log = logging.getLogger(__name__)

Line = dict[str, Any]
BATCH_LINES = 200
REQUEST_ITEMS = 100  # of a kind in one request: within every server's limits
REFUSALS = frozenset({"INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_DOES_NOT_EXIST", "RESOURCE_ALREADY_EXISTS",
                      "INVALID_STATE", "NOT_FOUND", "ALREADY_EXISTS", "NOT_IMPLEMENTED"})  # fmt: skip
UNKNOWN = "ENDPOINT_NOT_FOUND"  # a request that an older server does not know; or a proxy whose server is away
TOO_LARGE = 413  # HTTP's answer to a file, most often a proxy's
_TURN = threading.RLock()  # a cross-validation and its fold, two threads, would race for the data set they share


class RunRefused(Exception):  # noqa: N818 - the server's word
    """MLflow takes nothing for this run until someone mends that; the text says what."""


class Feed:
    """JSON lines that one process appends to and one at a time delivers from.

    A line of metrics.jsonl is {"step": N, "time": milliseconds since 1970, NAME: value, ...}; of an earlier version it
    has no time, and its numbers are in tracking.jsonl too.

    Args:
        lines: The file.
    """

    def __init__(self, lines: Path) -> None:
        self.lines = lines
        self.offset = lines.with_suffix(".offset")

    def append(self, content: Mapping[str, Any]) -> None:
        """Adds one line, with its time; handed to the system, so it survives the death of the process.

        Raises:
            OSError: the disk does not take it.
        """
        line = json.dumps({**content, "time": int(time.time() * 1000)}, ensure_ascii=False).encode() + b"\n"
        with self.lines.open("ab+", buffering=0) as file:
            if file.seek(0, os.SEEK_END) and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n":
                line = b"\n" + line  # a full disk cut the last one
            if file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.lines))

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

    def cut(self, step: int, sent: Mapping[str, int] | None) -> None:
        """Removes lines of metrics.jsonl after `step`, which a lost attempt wrote, and broken ones.

        The run writes these steps again, and MLflow cannot take a value back: those that are delivered are not sent
        again, the repeated ones are the same. Does not wait for a batch that is on its way.

        Args:
            step: That the run goes on from.
            sent: Metric -> its last step that was delivered, or will be, in another way; None: it is not tracked.
        """
        if not self.lines.exists():
            return
        noted = sent is not None or self.offset.exists()
        with self._alone() if noted else nullcontext():
            done, before, cuts = self._note()
            lost = [before]
            kept, kept_done, at = [], 0, 0
            with self.lines.open("rb") as file:
                for raw in file:
                    at += len(raw)
                    line = _parse(raw)
                    if line is None or not isinstance(line.get("step"), int):
                        log.warning("%s: dropped a broken line: %.60s", self.lines, raw.decode(errors="replace"))
                    elif line["step"] <= step:
                        kept.append(raw)
                        kept_done += len(raw) if at <= done else 0
                    elif at <= done:
                        lost.append({name: int(line["step"]) for name in line.keys() - {"step", "time"}})
            if noted:  # first: lines that are sent twice do no harm
                self._write_note(kept_done, _latest([sent or {}, *lost]), cuts + 1)
            with new_file(self.lines) as temporary:
                temporary.write_bytes(b"".join(kept))

    @property
    def delivered(self) -> int:
        """Bytes that the server has confirmed; 0 where the note of it is damaged: lines may be sent twice."""
        return self._note()[0]

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

        A line is sent again only if the process died between the server's answer and the note of it.

        Returns:
            False where nothing is left.
        """
        if not self.waiting:
            return False
        with self._alone():
            done, sent, cuts = self._note()
            with self.lines.open("rb") as file:
                file.seek(done)
                raw = [line for line in (file.readline() for _ in range(BATCH_LINES)) if line.endswith(b"\n")]
        if not raw:
            return False
        lines = [line for found in map(_parse, raw) if found is not None and (line := _with_kind(found, sent))]
        if lines:
            send(lines)
        with self._alone():
            now, now_sent, now_cuts = self._note()
            if now_cuts == cuts:
                self._write_note(done + sum(map(len, raw)), sent, cuts)
            else:  # the file is another one by now, which may have the same steps again
                steps = ({name: int(line["step"]) for name in line["values"]}
                         for line in lines if line["kind"] == "metrics")  # fmt: skip
                self._write_note(now, _latest([now_sent, *steps]), now_cuts)
        return True

    def _alone(self) -> AbstractContextManager[None]:
        """One process or thread at a time reads or changes the note, and what it is about: never for long."""
        return locked(self.offset.with_name(f"{self.offset.name}.lock"))

    def _note(self) -> tuple[int, dict[str, int], int]:
        """Bytes that are delivered; metric -> step up to which it is not sent (again); how often lines were cut."""
        try:
            note = json.loads(self.offset.read_text(encoding="utf-8"))
            return (note["bytes"], note["sent"], note["cuts"]) if isinstance(note, dict) else (int(note), {}, 0)
        except (FileNotFoundError, ValueError, TypeError, KeyError):
            return 0, {}, 0

    def _write_note(self, done: int, sent: Mapping[str, int], cuts: int) -> None:
        write_text(self.offset, json.dumps({"bytes": done, "sent": sent, "cuts": cuts}) if cuts else str(done))


def _latest(steps: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Of each metric the last step."""
    latest: dict[str, int] = {}
    for one in steps:
        latest |= {name: max(step, latest.get(name, -1)) for name, step in one.items()}
    return latest


def _parse(line: bytes) -> Line | None:
    """A line of a feed; None where it was left half written."""
    try:
        found = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _with_kind(line: Line, sent: Mapping[str, int]) -> Line | None:
    """A line of tracking.jsonl as it is, one of metrics.jsonl in that form; None where nothing in it is to be sent."""
    if "kind" in line:
        return line
    step, when = line.pop("step", None), line.pop("time", None)
    values = {name: value for name, value in line.items() if step is not None and step > sent.get(name, -1)}
    return {"kind": "metrics", "time": when, "step": step, "values": values} if values and when is not None else None


class Spool:
    """The feeds of a run directory, the identity of its MLflow run, and the way there.

    Args:
        run_dir: Run directory.

    Attributes:
        progress: Answers of the server: a slow one is waited for at the end of the run.
        transferring: Files are on their way.
    """

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.main, self.metrics = Feed(run_dir / "tracking.jsonl"), Feed(run_dir / "metrics.jsonl")
        self.identity_file, self.given_file = run_dir / "tracking.json", run_dir / "tracking.given.json"
        self.refused_file = run_dir / "tracking.refused.jsonl"
        self.progress, self.transferring = 0, False
        self._client: Any = None

    @property
    def exists(self) -> bool:
        """The run is tracked."""
        return self.identity_file.exists()

    @property
    def identity(self) -> dict[str, Any]:
        """Content of `tracking.json`, with what the server gave.

        Raises:
            UserError: it is damaged.
        """
        remedy = "delete it, and the next start makes a new MLflow run"
        content: dict[str, Any] = read_json(self.identity_file, remedy)
        if not content["run_id"] and self.given_file.exists():
            content = read_json(self.given_file, remedy)
        return content

    @identity.setter
    def identity(self, content: dict[str, Any]) -> None:
        write_json(self.identity_file, content)
        if content["run_id"]:
            write_json(self.given_file, content)

    @property
    def refused(self) -> int:
        """Lines that are set aside."""
        return len(self.refused_file.read_bytes().splitlines()) if self.refused_file.exists() else 0

    def feeds(self) -> list[Feed]:
        """The run's own words last: its end comes after its numbers."""
        return [self.metrics, *(Feed(file) for file in sorted(self.run_dir.glob("system/*.jsonl"))), self.main]

    @property
    def waiting(self) -> bool:
        """Lines are not delivered."""
        return any(feed.waiting for feed in self.feeds())

    def deliver(self) -> bool:
        """Sends a batch of each feed, once another process has sent its own; False where nothing is left.

        Raises:
            MlflowException: the server did not take it, and may later.
            RunRefused: see there.
        """
        if not self.waiting:
            return False
        with locked(self.run_dir / "tracking.lock"):  # two at once would send twice
            *others, main = self.feeds()
            more = [feed.deliver(self.send) for feed in others]  # each gets its turn
            return any(more) or main.deliver(self.send)

    def send(self, lines: list[Line]) -> None:
        """Sends a batch, and sets aside what is refused for good; makes the run where there is none yet.

        Raises:
            MlflowException: the server did not take it, and may later.
            RunRefused: see there.
        """
        load_mlflow()  # before any other import of it: see there
        from mlflow.exceptions import MlflowException

        with _TURN:
            run_id = self._run()
            try:
                self._send(run_id, lines)
            except (MlflowException, ImportError, OSError) as error:
                if isinstance(error, MlflowException) and error.error_code not in REFUSALS | {UNKNOWN}:
                    raise
                answer = getattr(error, "response", None)  # to an upload, which raises errors of requests
                if isinstance(error, OSError) and getattr(answer, "status_code", 0) != TOO_LARGE:
                    raise
                self.transferring = False
                self._check_run(run_id)
                halves = _halves(lines)
                if not halves:
                    self._refuse(lines[0], str(error))
                    name = next(iter(lines[0].get("values", {})), lines[0].get("path", ""))
                    log.warning("MLflow refuses for good: %s %s: %s", lines[0]["kind"], name, first_line(error))
                for half in halves:
                    self.send(half)

    def _refuse(self, line: Line, reason: str) -> None:
        """Sets aside a line that the server refuses for good; a line that is there already is not added again."""
        text = json.dumps({**line, "refused": reason}, ensure_ascii=False) + "\n"
        known = self.refused_file.read_text(encoding="utf-8") if self.refused_file.exists() else ""
        if text not in known:
            with self.refused_file.open("a", encoding="utf-8") as file:
                file.write(text)

    def _send(self, run_id: str, lines: list[Line]) -> None:
        from mlflow.entities import Metric, Param, RunTag

        values = {kind: [(line, *item) for line in lines if line["kind"] == kind for item in line["values"].items()]
                  for kind in ("metrics", "params", "tags")}  # fmt: skip
        params = {name: str(value)[:6000] for _, name, value in values["params"]}
        tags = {name: str(value)[:5000] for _, name, value in values["tags"]}
        # MLflow's parameters cannot change; a resumed job may, in train.steps for instance: a tag says so.
        known = self._client.get_run(run_id).data.params if params else {}
        tags |= {f"changed.{name}": params[name] for name in known.keys() & params.keys()
                 if known[name] != params[name]}  # fmt: skip
        batch: dict[str, list[Any]] = {
            "metrics": [Metric(name, value, line["time"], line["step"]) for line, name, value in values["metrics"]],
            "params": [Param(name, value) for name, value in params.items() if name not in known],
            "tags": [RunTag(name, value) for name, value in tags.items()],
        }
        for start in range(0, max(map(len, batch.values())), REQUEST_ITEMS):
            part = {kind: items[start : start + REQUEST_ITEMS] for kind, items in batch.items()}
            self._client.log_batch(run_id, **part)
            self.progress += 1
        self._transfer(run_id, lines)
        if lines[-1]["kind"] == "finish":
            self._client.set_terminated(run_id, lines[-1]["status"], lines[-1]["time"])
        elif any(line["kind"] == "resume" for line in lines):
            self._client.update_run(run_id, "RUNNING")

    def _run(self) -> str:
        """Id of the run, made where there is none yet."""
        from mlflow.tracking import MlflowClient

        identity = self.identity
        if self._client is not None and identity["run_id"]:
            return str(identity["run_id"])
        tags = {} if identity["run_id"] else self._tags(identity)
        with _store_alone(identity["uri"]):
            self._client = self._client or MlflowClient(identity["uri"], registry_uri=identity["uri"])
            if not identity["run_id"]:
                self.identity = identity  # on a full disk each try would make another run and not keep its id
                number = self._experiment(identity["experiment"], identity["artifacts"] or None)
                run = self._client.create_run(number, run_name=identity["name"], tags=tags)
                identity["run_id"] = str(run.info.run_id)
                self.identity = identity
        return str(identity["run_id"])

    def _experiment(self, name: str, location: str | None) -> str:
        """Id of the experiment, made where there is none yet.

        Raises:
            RunRefused: it is deleted.
        """
        from mlflow.exceptions import MlflowException

        experiment = self._client.get_experiment_by_name(name)
        if experiment is None:
            try:
                return str(self._client.create_experiment(name, location))
            except MlflowException as error:  # another run was faster
                experiment = self._client.get_experiment_by_name(name)
                if experiment is None:
                    raise error
        if experiment.lifecycle_stage != "active":
            number = experiment.experiment_id
            raise RunRefused(
                f"experiment '{name}' is deleted; restore it (mlflow experiments restore -x {number}) and run "
                f"python -m pipeline.tracking sync {self.run_dir}, or repeat the command with another "
                "log.experiment"
            )
        return str(experiment.experiment_id)

    def _check_run(self, run_id: str) -> None:
        """Tells a refusal of the run from one of its records.

        Raises:
            RunRefused: the run is not there, or deleted.
            MlflowException: no answer.
        """
        from mlflow.exceptions import MlflowException

        try:
            stage = self._client.get_run(run_id).info.lifecycle_stage
        except MlflowException as error:
            if error.error_code not in REFUSALS:
                raise
            raise RunRefused(
                f"run {run_id} is not there: {first_line(error)}; where the store lost it, delete "
                f"{self.identity_file} and repeat the command, which tells a new run all that is here"
            ) from error
        if stage != "active":
            raise RunRefused(
                f"run {run_id} is deleted; restore it (mlflow runs restore --run-id {run_id}) and run python -m "
                f"pipeline.tracking sync {self.run_dir}"
            )

    def _tags(self, identity: dict[str, Any]) -> dict[str, str]:
        """The run's first tags; the pretraining that it starts from has its id by now, if ever.

        A cross-validation's run is made before those of its folds, whose directories lie in its own.
        """
        tags: dict[str, str] = dict(identity["tags"])
        if "part_of" in tags and (whole := Spool(self.run_dir.resolve().parent)).exists:
            tags["mlflow.parentRunId"] = whole._run()
        if "pretrain_dir" in tags and (parent := Spool(Path(tags["pretrain_dir"]))).exists:
            linked = parent.identity["run_id"]
            tags = {"pretrain_run_id": linked, "mlflow.parentRunId": linked} | tags if linked else tags
        return tags

    def _transfer(self, run_id: str, lines: list[Line]) -> None:
        """Data sets, files and models of a batch; a file that is gone by now is left out."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        self.transferring = True
        for line in lines:
            if line["kind"] == "dataset":
                source, profile = json.dumps({"uri": line["source"]}), json.dumps(line["profile"])
                dataset = Dataset(line["name"], line["digest"][:36], "local", source, profile=profile)
                context = InputTag("mlflow.data.context", line["context"])
                self._client.log_inputs(run_id, [DatasetInput(dataset, [context])])
            elif line["kind"] == "artifact" and (file := self.run_dir / line["path"]).exists():
                self._client.log_artifact(run_id, str(file), line["folder"] or None)
            elif line["kind"] == "model" and (self.run_dir / line["path"]).exists():
                self._log_model(run_id, line)
            self.progress += 1
        self.transferring = False

    def _log_model(self, run_id: str, line: Line) -> None:
        """A saved pyfunc model -> the run's logged model and, with a name, a version in the registry."""
        from mlflow.entities import LoggedModelOutput

        identity = self.identity
        if "model_id" not in identity:
            run = self._client.get_run(run_id)
            made = self._client.create_logged_model(
                run.info.experiment_id, "model", run_id, tags=line["tags"], model_type="audio classifier"
            )
            identity["model_id"] = made.model_id
            self.identity = identity
        model_id = identity["model_id"]
        with tempfile.TemporaryDirectory() as folder:  # the same model, with the ids that the server gave
            copy = Path(shutil.copytree(self.run_dir / line["path"], Path(folder) / "model", copy_function=_link))
            file = copy / "MLmodel"
            content = yaml.safe_load(file.read_text(encoding="utf-8")) | {"model_id": model_id, "run_id": run_id}
            write_text(file, yaml.safe_dump(content, sort_keys=False))  # a new file: that of the run is linked to
            self._client.log_model_artifacts(model_id, str(copy))
        self._client.finalize_logged_model(model_id, "READY")
        if not any(output.model_id == model_id for output in self._client.get_run(run_id).outputs.model_outputs):
            self._client.log_outputs(run_id, [LoggedModelOutput(model_id, line["step"])])
        if line["register"] and line["register"] not in identity.get("registered", []):
            self._register(run_id, model_id, line)
            self.identity = identity | {"registered": [*identity.get("registered", []), line["register"]]}

    def _register(self, run_id: str, model_id: str, line: Line) -> None:
        from mlflow.exceptions import MlflowException

        try:
            self._client.create_registered_model(line["register"])
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        # Without a server MLflow would look models:/ up in another store.
        source = f"models:/{model_id}"
        if not self.identity["uri"].startswith("http"):
            source = str(self._client.get_logged_model(model_id).artifact_location)
        self._client.create_model_version(
            line["register"], source, run_id, tags=line["tags"], description=line["card"], model_id=model_id
        )


def first_line(error: BaseException) -> str:
    """What an error says, for one line of a log; MLflow's own names the server with its password."""
    return without_password(next(iter(str(error).splitlines()), "")) or type(error).__name__


def _halves(lines: list[Line]) -> list[list[Line]]:
    """Two halves of a batch, or of the values of a single line; empty: it cannot be told apart any further."""
    if len(lines) > 1:
        return [lines[: len(lines) // 2], lines[len(lines) // 2 :]]
    items = list(lines[0].get("values", {}).items())
    parts = [items[: len(items) // 2], items[len(items) // 2 :]] if len(items) > 1 else []
    return [[{**lines[0], "values": dict(part)}] for part in parts]


@contextmanager
def _store_alone(uri: str) -> Iterator[None]:
    """MLflow makes and migrates a SQLite database at the first call: two processes at once break it for good."""
    place = sqlite_file(uri) if uri.startswith("sqlite:") else None
    if place is None:
        yield
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    with locked(place.with_name(f"{place.name}.lock")):
        yield


def _link(source: str, target: str) -> None:
    """A link instead of a copy of hundreds of megabytes; a copy where the file system cannot."""
    try:
        Path(target).hardlink_to(source)
    except OSError:
        shutil.copy2(source, target)
