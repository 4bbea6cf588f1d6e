"""MLflow with a real server that is down, comes up, and dies: nothing is lost, nothing waits."""

import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from pipeline.config import LogConfig
from pipeline.tracking import NullTracker, open_tracker, tracking_uri
from tests.conftest import ROOT, free_port


@contextmanager
def server(folder: Path, port: int) -> Iterator[None]:
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
               "--backend-store-uri", f"sqlite:///{folder}/server.db",
               "--artifacts-destination", str(folder / "artifacts")]  # fmt: skip
    with (folder / "server.log").open("a") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        try:
            for _ in range(240):
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1)
                    break
                except OSError:
                    assert process.poll() is None, (folder / "server.log").read_text()
                    time.sleep(0.5)
            yield
        finally:
            os.killpg(process.pid, 9)
            process.wait()


def history(uri: str, experiment: str = "craft") -> tuple[str, list[tuple[int, float]]]:
    client = MlflowClient(uri)
    (run,) = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
    return run.info.status, [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "loss")]


def test_other_ranks_and_untracked_runs_do_nothing(tmp_path):
    assert isinstance(open_tracker(LogConfig(), tmp_path, name="x", rank=1, kind="pretrain", parent=None), NullTracker)
    untracked = open_tracker(LogConfig(mlflow=False), tmp_path, name="x", rank=0, kind="pretrain", parent=None)
    untracked.metrics({"loss": 1.0}, 1)
    untracked.finish("FINISHED")
    assert list(tmp_path.iterdir()) == []


def test_where_runs_are_tracked(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert tracking_uri(LogConfig(), tmp_path / "run") == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://lab:5000")
    assert tracking_uri(LogConfig(), tmp_path / "run") == "http://lab:5000"
    assert tracking_uri(LogConfig(uri="http://own:1"), tmp_path / "run") == "http://own:1"


def test_a_resumed_job_goes_on_in_its_run(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "config.yaml").write_text("a: 1\n")
    for first in (1, 4):
        tracker = open_tracker(LogConfig(), run_dir, name="8-PSWaCL", rank=0, kind="pretrain", parent=None)
        tracker.params({"train.steps": first + 2, "data.shards": "x" * 7000})
        tracker.artifact(run_dir / "config.yaml")
        for step in range(first, first + 3):
            tracker.metrics({"loss": step / 2, "broken": float("nan")}, step)
        tracker.finish("FINISHED")
        assert tracker.run_id
    status, values = history(f"sqlite:///{tmp_path}/mlflow.db")
    assert status == "FINISHED"
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    data = client.get_run(tracker.run_id).data
    assert (data.params["train.steps"], data.tags["changed.train.steps"]) == ("3", "6")
    assert values == [(step, step / 2) for step in range(1, 7)]


@pytest.mark.slow
def test_a_server_that_is_down_costs_nothing_and_gets_everything(tmp_path):
    port = free_port()
    uri = f"http://127.0.0.1:{port}"
    config = LogConfig(uri=uri)
    environment = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": "2"}
    old = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    try:
        run_dir = tmp_path / "run"
        run_dir.mkdir()
        tracker = open_tracker(config, run_dir, name="8-PSWaCL", rank=0, kind="pretrain", parent=None)
        for step in range(1, 11):  # the server is not there yet
            tracker.metrics({"loss": float(step)}, step)
        with server(tmp_path, port):
            for step in range(11, 21):
                tracker.metrics({"loss": float(step)}, step)
            wanted = (run_dir / "tracking.jsonl").stat().st_size
            for _ in range(120):
                offset = run_dir / "tracking.offset"
                if offset.exists() and int(offset.read_text()) == wanted:
                    break
                time.sleep(0.5)
            assert history(uri) == ("RUNNING", [(step, float(step)) for step in range(1, 21)])
        for step in range(21, 31):  # it died in the middle
            tracker.metrics({"loss": float(step)}, step)
        tracker.finish("FINISHED")
        with server(tmp_path, port):
            done = subprocess.run([sys.executable, "-m", "pipeline.tracking", "sync", str(run_dir)], cwd=ROOT,
                                  capture_output=True, text=True, check=True)  # fmt: skip
            assert "all delivered" in done.stdout
            assert history(uri) == ("FINISHED", [(step, float(step)) for step in range(1, 31)])
    finally:
        for name, value in old.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
    kinds = [json.loads(line)["kind"] for line in (run_dir / "tracking.jsonl").read_text().splitlines()]
    assert kinds == ["metrics"] * 30 + ["finish"]
