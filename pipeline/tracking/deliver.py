"""Lines of a spool -> MLflow.

In: batches of lines, in order. Out: an MLflow run with parameters, tags, metrics, data sets, artifacts
and a model. Every kind of line can be sent twice without harm.

What MLflow refuses for good, such as a name, is set aside in `tracking.refused.jsonl` with the reason, and the
others go on. Where it refuses the run itself (deleted, or its experiment is), all lines wait.
"""

import json
import logging
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from pipeline.tracking.spool import Line, Spool, load_mlflow, locked, sqlite_file

log = logging.getLogger(__name__)

_TURN = threading.RLock()  # a cross-validation and its fold, two threads, would race for the data set they share
REFUSALS = frozenset({"INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_DOES_NOT_EXIST", "RESOURCE_ALREADY_EXISTS",
                      "INVALID_STATE", "NOT_FOUND", "ALREADY_EXISTS", "NOT_IMPLEMENTED"})  # fmt: skip
REQUEST_ITEMS = 100  # of a kind in one request: within every server's limits


class RunRefused(Exception):  # noqa: N818 - the server's word
    """MLflow takes nothing for this run until someone mends that; the text says what."""


class Delivery:
    """Sends the lines of one spool. Makes the run at the first batch.

    Args:
        spool: Of the run.
    """

    def __init__(self, spool: Spool) -> None:
        self._spool = spool
        self._client: Any = None
        self.progress = 0  # answers of the server: a slow one is waited for at the end of the run
        self.transferring = False  # the same, for files on their way

    def send(self, lines: list[Line]) -> None:
        """Sends a batch, and sets aside what is refused for good.

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
            except (MlflowException, ImportError) as error:
                if isinstance(error, MlflowException) and error.error_code not in REFUSALS:
                    raise
                self._check_run(run_id)
                halves = _halves(lines)
                if not halves:
                    self._spool.refuse(lines[0], str(error))
                    name = next(iter(lines[0].get("values", {})), lines[0].get("path", ""))
                    log.warning("MLflow refuses for good: %s %s: %s", lines[0]["kind"], name, first_line(error))
                for half in halves:
                    self.send(half)

    def _send(self, run_id: str, lines: list[Line]) -> None:
        batch: dict[str, list[Any]] = {"metrics": [], "params": [], "tags": []}
        params: dict[str, str] = {}
        for line in lines:
            self._sort(line, batch, params)
        self._add_params(run_id, params, batch)
        while any(batch.values()):
            taken = {kind: [items.pop(0) for _ in items[:REQUEST_ITEMS]] for kind, items in batch.items()}
            self._client.log_batch(run_id, metrics=taken["metrics"], params=taken["params"], tags=taken["tags"])
            self.progress += 1
        self._transfer(run_id, lines)
        if lines[-1]["kind"] == "finish":
            self._client.set_terminated(run_id, lines[-1]["status"], lines[-1]["time"])
        elif any(line["kind"] == "resume" for line in lines):
            self._client.update_run(run_id, "RUNNING")

    def _run(self) -> str:
        """Id of the run, made where there is none yet."""
        from mlflow.tracking import MlflowClient

        identity = self._spool.identity
        if self._client is not None and identity["run_id"]:
            return str(identity["run_id"])
        tags = {} if identity["run_id"] else self._tags(identity)
        with _store_alone(identity["uri"]):
            self._client = self._client or MlflowClient(identity["uri"], registry_uri=identity["uri"])
            if not identity["run_id"]:
                number = self._experiment(identity["experiment"], identity["artifacts"] or None)
                run = self._client.create_run(number, run_name=identity["name"], tags=tags)
                identity["run_id"] = str(run.info.run_id)
                self._spool.identity = identity
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
                f"python -m pipeline.tracking sync {self._spool.run_dir}, or repeat the command with another "
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
            raise RunRefused(f"run {run_id} is not there: {first_line(error)}") from error
        if stage != "active":
            raise RunRefused(
                f"run {run_id} is deleted; restore it (mlflow runs restore --run-id {run_id}) and run python -m "
                f"pipeline.tracking sync {self._spool.run_dir}"
            )

    def _tags(self, identity: dict[str, Any]) -> dict[str, str]:
        """The run's first tags; the pretraining that it starts from has its id by now, if ever.

        A cross-validation's run is made before those of its folds, which name it.
        """
        tags: dict[str, str] = dict(identity["tags"])
        if "part_of" in tags and (whole := Spool(Path(tags["part_of"]))).exists:
            tags["mlflow.parentRunId"] = Delivery(whole)._run()
        parent = Path(tags.get("pretrain_dir", "")) / "tracking.json"
        if "pretrain_dir" in tags and parent.is_file():
            linked = json.loads(parent.read_text(encoding="utf-8"))["run_id"]
            tags = {"pretrain_run_id": linked, "mlflow.parentRunId": linked} | tags if linked else tags
        return tags

    def _sort(self, line: Line, batch: dict[str, list[Any]], params: dict[str, str]) -> None:
        from mlflow.entities import Metric, RunTag

        if line["kind"] == "metrics":
            batch["metrics"] += [Metric(n, v, line["time"], line["step"]) for n, v in line["values"].items()]
        elif line["kind"] == "params":
            params |= {name: str(value)[:6000] for name, value in line["values"].items()}
        elif line["kind"] == "tags":
            batch["tags"] += [RunTag(name, str(value)[:5000]) for name, value in line["values"].items()]

    def _add_params(self, run_id: str, params: dict[str, str], batch: dict[str, list[Any]]) -> None:
        """MLflow's parameters cannot change; a resumed job may, in train.steps for instance: a tag says so."""
        from mlflow.entities import Param, RunTag

        known = self._client.get_run(run_id).data.params if params else {}
        batch["params"] = [Param(name, value) for name, value in params.items() if name not in known]
        batch["tags"] += [RunTag(f"changed.{name}", params[name]) for name in known.keys() & params.keys()
                          if known[name] != params[name]]  # fmt: skip

    def _transfer(self, run_id: str, lines: list[Line]) -> None:
        """Data sets, files and models of a batch; a file that is gone by now is left out."""
        self.transferring = True
        for line in lines:
            if line["kind"] == "dataset":
                self._log_dataset(run_id, line)
            elif line["kind"] == "artifact" and Path(line["path"]).exists():
                self._client.log_artifact(run_id, line["path"], line["folder"] or None)
            elif line["kind"] == "model" and Path(line["path"]).exists():
                self._log_model(run_id, line)
            self.progress += 1
        self.transferring = False

    def _log_dataset(self, run_id: str, line: Line) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        source = json.dumps({"uri": line["source"]})
        profile = json.dumps(line["profile"])
        dataset = Dataset(line["name"], line["digest"][:36], "local", source, profile=profile)
        self._client.log_inputs(run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", line["context"])])])

    def _log_model(self, run_id: str, line: Line) -> None:
        """A saved pyfunc model -> the run's logged model and, with a name, a version in the registry."""
        from mlflow.entities import LoggedModelOutput

        identity = self._spool.identity
        if "model_id" not in identity:
            run = self._client.get_run(run_id)
            made = self._client.create_logged_model(
                run.info.experiment_id, "model", run_id, tags=line["tags"], model_type="audio classifier"
            )
            identity["model_id"] = made.model_id
            self._spool.identity = identity
        model_id = identity["model_id"]
        with tempfile.TemporaryDirectory() as folder:  # the same model, with the ids that the server gave
            copy = Path(shutil.copytree(line["path"], Path(folder) / "model", copy_function=_link))
            file = copy / "MLmodel"
            content = yaml.safe_load(file.read_text(encoding="utf-8")) | {"model_id": model_id, "run_id": run_id}
            file.unlink()
            file.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
            self._client.log_model_artifacts(model_id, str(copy))
        self._client.finalize_logged_model(model_id, "READY")
        if not any(output.model_id == model_id for output in self._client.get_run(run_id).outputs.model_outputs):
            self._client.log_outputs(run_id, [LoggedModelOutput(model_id, line["step"])])
        if line["register"] and line["register"] not in identity.get("registered", []):
            self._register(run_id, model_id, line)
            self._spool.identity = identity | {"registered": [*identity.get("registered", []), line["register"]]}

    def _register(self, run_id: str, model_id: str, line: Line) -> None:
        from mlflow.exceptions import MlflowException

        try:
            self._client.create_registered_model(line["register"])
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        self._client.create_model_version(
            line["register"], self._source(model_id), run_id, tags=line["tags"], description=line["card"],
            model_id=model_id,
        )  # fmt: skip

    def _source(self, model_id: str) -> str:
        """Where the registry finds the model; without a server MLflow would look `models:/` up in another store."""
        if self._spool.identity["uri"].startswith("http"):
            return f"models:/{model_id}"
        return str(self._client.get_logged_model(model_id).artifact_location)


def first_line(error: BaseException) -> str:
    """What an error says, for one line of a log."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__


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
