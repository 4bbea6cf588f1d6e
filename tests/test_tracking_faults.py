"""What MLflow refuses, what can never work, and runs that start together: real stores, no server."""

import json
import logging
import sqlite3
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import ErrorCode
from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
from mlflow.tracking import MlflowClient
from requests import HTTPError

from pipeline.config import LogConfig
from pipeline.errors import UserError
from pipeline.tracking import check_tracking, open_tracker
from pipeline.tracking.__main__ import sync
from pipeline.tracking.nodes import NodeMonitor
from pipeline.tracking.spool import Feed, Spool
from tests.conftest import ROOT, free_port


@pytest.fixture(autouse=True)
def own_store(monkeypatch, caplog):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr("pipeline.tracking.tracker.RETRY_SECONDS", 0.2)
    monkeypatch.setattr(logging.getLogger("pipeline"), "propagate", True)
    caplog.set_level("WARNING")


def start(run_dir, **settings):
    run_dir.mkdir(exist_ok=True)
    config = LogConfig(**{"finish_wait": 300.0, **settings})  # making the database takes a busy machine its time
    return open_tracker(config, run_dir, name="x", rank=0, kind="pretrain", parent=None)


@pytest.mark.slow
def test_a_record_that_is_refused_for_good_is_set_aside_and_the_others_arrive(tmp_path, caplog):
    tracker = start(tmp_path / "run")
    tracker.tags({"who & when": "x", "fine": "y"})
    tracker.metrics({"loss": 1.0, "bad*name": 2.0, "lr": 3.0}, 1)
    model = tmp_path / "model"
    model.mkdir()
    (model / "MLmodel").write_text("flavors: {}\n")
    tracker.model(model, 1, {}, "card", "craft/v1")
    tracker.metrics({"loss": 0.5}, 2)
    tracker.finish("FINISHED")
    run = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db").get_run(tracker.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.tags["fine"] == "y"
    assert run.data.metrics == {"loss": 0.5, "lr": 3.0}
    refused = [json.loads(line) for line in (tmp_path / "run" / "tracking.refused.jsonl").read_text().splitlines()]
    names = [next(iter(line.get("values", [line.get("register")]))) for line in refused]
    assert sorted(names) == ["bad*name", "craft/v1", "who & when"]
    assert all(line["refused"] for line in refused)
    assert "MLflow refused 3 records for good" in caplog.text
    assert not Spool(tmp_path / "run").waiting


@pytest.mark.parametrize("away", [False, True])
def test_an_older_server_or_a_file_that_a_proxy_finds_too_large_does_not_hold_up_the_end(tmp_path, away):
    """A server before MLflow 3 knows no logged models; a proxy that finds no server answers each request so."""
    unknown = MlflowException("Not Found", error_code=ErrorCode.Value("ENDPOINT_NOT_FOUND"))
    ended = []

    class Client:
        def get_run(self, run_id):
            if away:
                raise unknown
            return SimpleNamespace(info=SimpleNamespace(lifecycle_stage="active", experiment_id="1"))

        def log_batch(self, run_id, **items):
            pass

        def create_logged_model(self, *args, **named):
            raise unknown

        def log_artifact(self, run_id, file, folder):
            raise HTTPError("413 Request Entity Too Large", response=SimpleNamespace(status_code=413))

        def set_terminated(self, run_id, status, when):
            ended.append(status)

    spool = Spool(tmp_path)
    spool.identity = {"uri": "http://lab:5000", "run_id": "r"}
    spool._client = Client()
    (tmp_path / "model").mkdir()
    spool.main.append({"kind": "artifact", "path": "model", "folder": ""})
    spool.main.append({"kind": "model", "path": "model", "step": 1, "tags": {}, "card": "", "register": ""})
    spool.main.append({"kind": "finish", "status": "FINISHED"})
    if away:
        with pytest.raises(MlflowException, match="Not Found"):
            spool.deliver()
        assert spool.waiting
        assert not spool.refused
        return
    while spool.deliver():
        pass
    assert ended == ["FINISHED"]
    refused = [json.loads(line) for line in spool.refused_file.read_text().splitlines()]
    assert [(line["kind"], line["refused"].split()[0]) for line in refused] == [("artifact", "413"), ("model", "Not")]
    assert not spool.transferring


@pytest.mark.slow
def test_a_deleted_experiment_or_run_is_named_and_loses_nothing(tmp_path, caplog):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    start(tmp_path / "first").finish("FINISHED")
    client = MlflowClient(uri)
    number = client.get_experiment_by_name("craft").experiment_id
    client.delete_experiment(number)
    tracker = start(tmp_path / "second")
    tracker.metrics({"loss": 1.0}, 1)
    tracker.finish("FINISHED")
    assert f"experiment 'craft' is deleted; restore it (mlflow experiments restore -x {number})" in caplog.messages[-1]
    assert "did not answer" not in caplog.text
    with pytest.raises(UserError, match="is deleted; restore it"):
        sync(Spool(tmp_path / "second"), None)
    client.restore_experiment(number)
    sync(Spool(tmp_path / "second"), None)
    assert client.get_run(tracker.run_id).data.metrics == {"loss": 1.0}
    client.delete_run(tracker.run_id)
    again = start(tmp_path / "second")
    again.metrics({"loss": 0.5}, 2)
    again.finish("FINISHED")
    assert f"run {tracker.run_id} is deleted; restore it" in caplog.messages[-1]
    client.restore_run(tracker.run_id)
    sync(Spool(tmp_path / "second"), None)
    assert client.get_run(tracker.run_id).data.metrics == {"loss": 0.5}
    assert not (tmp_path / "second" / "tracking.refused.jsonl").exists()


@pytest.mark.slow
def test_a_corrected_uri_and_experiment_count_when_the_command_is_repeated(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    down = start(tmp_path / "run", uri=f"http://127.0.0.1:{free_port()}", finish_wait=0.1)
    down.metrics({"loss": 1.0}, 1)
    down.finish("FINISHED")
    assert Spool(tmp_path / "run").waiting
    tracker = start(tmp_path / "run", uri=f"sqlite:///{tmp_path}/deep/good.db", experiment="other")
    tracker.finish("FINISHED")
    client = MlflowClient(f"sqlite:///{tmp_path}/deep/good.db")
    assert client.get_run(tracker.run_id).data.metrics == {"loss": 1.0}
    assert client.get_experiment_by_name("other") is not None
    down._thread.join(600)  # its next try finds nothing to do


@pytest.mark.slow
def test_an_unforeseen_error_leaves_the_thread_alive(tmp_path, caplog, monkeypatch):
    calls = []

    def fail(*args, **named):
        calls.append(args)
        if len(calls) < 3:
            raise TypeError("not foreseen")
        return create(*args, **named)

    create = MlflowClient.create_run
    monkeypatch.setattr(MlflowClient, "create_run", fail)
    tracker = start(tmp_path / "run")
    (tmp_path / "run" / "tracking.offset").write_text("")  # as after a crash of the machine
    with (tmp_path / "run" / "tracking.jsonl").open("ab") as file:
        file.write(b"\0\0\0\n")
    tracker.metrics({"loss": 1.0}, 1)
    tracker.finish("FINISHED")
    run = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db").get_run(tracker.run_id)
    assert (run.info.status, run.data.metrics) == ("FINISHED", {"loss": 1.0})
    assert caplog.text.count("not foreseen") == 1


@pytest.mark.slow
def test_runs_that_start_together_share_a_fresh_database(tmp_path):
    code = """
import sys
from pathlib import Path
from pipeline.config import LogConfig
from pipeline.tracking import open_tracker
from pipeline.tracking.store import load_mlflow
load_mlflow()
run_dir = Path(sys.argv[1])
run_dir.mkdir()
print("ready", flush=True)
sys.stdin.readline()
tracker = open_tracker(LogConfig(finish_wait=300), run_dir, name="x", rank=0, kind="pretrain", parent=None)
tracker.metrics({"loss": 1.0}, 1)
tracker.finish("FINISHED")
assert tracker.run_id
"""
    command = [sys.executable, "-c", code]
    started = [subprocess.Popen([*command, str(tmp_path / f"run{i}")], cwd=ROOT, stdin=subprocess.PIPE,
                                stdout=subprocess.PIPE, text=True) for i in range(3)]  # fmt: skip
    for process in started:
        assert process.stdout.readline() == "ready\n"
    for process in started:
        process.stdin.write("\n")
        process.stdin.close()
    assert [process.wait(600) for process in started] == [0] * 3
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("craft").experiment_id])
    assert [run.info.status for run in runs] == ["FINISHED"] * 3


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"uri": "localhost:5000"}, "write http://localhost:5000"),
        ({"uri": "127.0.0.1:5000"}, "write http://127.0.0.1:5000"),
        ({"uri": "./mlruns"}, "sqlite:///PATH"),
        ({"uri": "sqlite://m.db"}, "three slashes"),
        ({"uri": "sqlite:///:memory:"}, "names no file"),
        ({"uri": "http://"}, "http://HOST"),
        ({"uri": "postgresql+psycopg2://u:secret@127.0.0.1:9/db"}, "refused; start the database"),
        ({"uri": "postgres://h/db"}, "sqlite:///PATH"),
        ({"uri": "mysql+nothing://h/db"}, "nothing"),
        ({"experiment": " "}, "log.experiment"),
        ({"tags": {"who & when": "x"}}, "who & when"),
        ({"tags": {"a//b": "x"}}, "a//b"),
        ({"register_as": "craft/v1"}, "without / and :"),
    ],
)
def test_what_can_never_work_is_refused_at_launch(tmp_path, settings, said):
    with pytest.raises(UserError) as refused:
        check_tracking(LogConfig(**settings), tmp_path / "run")
    assert said in str(refused.value)
    assert "secret" not in str(refused.value)
    assert list(tmp_path.iterdir()) == []
    check_tracking(LogConfig(mlflow=False, **settings), tmp_path / "run")


def test_what_works_is_taken(tmp_path, monkeypatch):
    sqlite3.connect(tmp_path / "mlflow.db").execute("create table t (x)")
    for uri in ("", "http://127.0.0.1:9", "https://lab/mlflow", f"sqlite:///{tmp_path}/new/m.db", "databricks"):
        check_tracking(LogConfig(uri=uri), tmp_path / "run")
    (tmp_path / "mlflow.db").write_text("a diary, and by far longer than the header of a database " * 20)
    with pytest.raises(UserError, match="not a database"):
        check_tracking(LogConfig(), tmp_path / "run")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "lab:5000")
    with pytest.raises(UserError, match="MLFLOW_TRACKING_URI = lab:5000"):
        check_tracking(LogConfig(), tmp_path / "run")


def test_a_collector_that_fails_drops_itself_alone(tmp_path, monkeypatch, caplog):
    def broken(self) -> None:
        raise OSError("no such device")

    class Missing:
        def __init__(self) -> None:
            raise ImportError("no pynvml")

    monkeypatch.setattr(DiskMonitor, "collect_metrics", broken)
    monkeypatch.setattr("pipeline.tracking.nodes._gpu_monitors", lambda: [Missing])
    monitor = NodeMonitor(tmp_path, main=True, every=0.05)
    deadline = time.monotonic() + 300
    told = []
    while len(told) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
        told = [line for file in tmp_path.glob("system/*.jsonl") for line in Feed(file).read()]
    monitor.stop()
    assert len(told) >= 3
    assert all("system/cpu_utilization_percentage" in line["values"] for line in told)
    assert caplog.text.count("DiskMonitor on this node: no such device") == 1
    assert "Missing on this node: no pynvml" in caplog.text
    assert '"nvidia-ml-py>=' in (ROOT / "pyproject.toml").read_text()  # MLflow itself does not ask for it
