"""MLflow with a real server that is down, comes up, and dies: nothing is lost, nothing waits."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from mlflow.tracking import MlflowClient
from PIL import Image

from pipeline.command_line import parse
from pipeline.config import LogConfig, PretrainRecipe
from pipeline.errors import UserError
from pipeline.tracking import Tracker, figures, open_tracker, tracking_uri
from pipeline.tracking.__main__ import sync
from pipeline.tracking.nodes import NodeMonitor
from pipeline.tracking.spool import BATCH_LINES, Feed, Spool
from pipeline.tracking.store import check_uri, without_password
from tests.ranks import free_port, run_script

PATIENT = {"system_every": 0, "finish_wait": 300}  # a busy machine takes its time to make a database
NOWHERE = LogConfig(uri="http://127.0.0.1:9", system_every=0, finish_wait=0)


@contextmanager
def server(folder: Path, port: int) -> Iterator[None]:
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
               "--backend-store-uri", f"sqlite:///{folder}/server.db",
               "--artifacts-destination", str(folder / "artifacts")]  # fmt: skip
    env = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}  # see tests/lab.py
    with (folder / "server.log").open("a") as log:
        process = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)
        try:
            for _ in range(600):
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=10)
                    break
                except OSError:
                    assert process.poll() is None, (folder / "server.log").read_text()
                    time.sleep(0.5)
            else:
                pytest.fail((folder / "server.log").read_text())
            yield
        finally:
            os.killpg(process.pid, 9)
            process.wait()


def finish(tracker: Tracker, status: str = "FINISHED") -> None:
    """And its thread has ended: it would go on trying, for minutes, while other tests' deliveries wait for it."""
    tracker.finish(status)
    tracker._thread.join(600)
    assert not tracker._thread.is_alive()


def history(uri: str, experiment: str = "craft") -> tuple[str, list[tuple[int, float]]]:
    client = MlflowClient(uri)
    (run,) = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
    return run.info.status, [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "loss")]


def test_other_ranks_write_nothing_and_untracked_runs_their_metrics_alone(tmp_path):
    for config, rank in ((LogConfig(), 1), (LogConfig(mlflow=False), 1), (LogConfig(mlflow=False), 0)):
        assert list(tmp_path.iterdir()) == []
        tracker = open_tracker(config, tmp_path, name="x", rank=rank, kind="pretrain", parent=None)
        tracker.resume(0)
        tracker.tags({"a": "b"})
        tracker.metrics({"loss": 1.0, "broken": float("nan")}, 1)
        tracker.summary({"final_mAP": 1.0}, 1)
        tracker.finish("FINISHED")
        assert tracker.run_id == ""
    tracker.resume(1)
    (file,) = tmp_path.iterdir()
    row = json.loads(file.read_text())
    assert abs(row.pop("time") - 1000 * time.time()) < 60_000
    assert (file.name, row) == ("metrics.jsonl", {"step": 1, "loss": 1.0})


def test_lines_of_a_lost_attempt_are_cut_and_not_sent_again(tmp_path):
    """A resumed run writes steps again that the server has; with lines of an earlier version and one half written."""
    feed, sent = Feed(tmp_path / "metrics.jsonl"), []
    feed.lines.write_text('{"step": 1, "loss": 0.5}\n')  # of an earlier version: sent in another way
    for step in (2, 3, 4):
        feed.append({"step": step, "loss": step / 2})
    assert feed.deliver(sent.extend)
    feed.append({"step": 4, "eval_loss": 9.0})
    with feed.lines.open("a") as file:
        file.write('{"step": 5, "lo')
    feed.cut(2, {"old": 3})
    assert [row["step"] for row in feed.read()] == [1, 2]
    assert not feed.waiting
    for step in (3, 4, 5):
        feed.append({"step": step, "loss": step / 2, "old": 0.0})
        feed.append({"step": step, "eval_loss": 9.0})
    feed.cut(9, {})  # and once more, with nothing lost
    while feed.deliver(sent.extend):
        pass
    assert {line["kind"] for line in sent} == {"metrics"}
    assert all(line["time"] > 1e12 for line in sent)
    assert not feed.waiting
    told = [(line["step"], name, value) for line in sent for name, value in line["values"].items()]
    assert told == [(2, "loss", 1.0), (3, "loss", 1.5), (4, "loss", 2.0), (3, "eval_loss", 9.0), (4, "old", 0.0),
                    (4, "eval_loss", 9.0), (5, "loss", 2.5), (5, "old", 0.0), (5, "eval_loss", 9.0)]  # fmt: skip


def test_where_runs_are_tracked(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert tracking_uri(LogConfig(), tmp_path / "run") == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://lab:5000")
    assert tracking_uri(LogConfig(), tmp_path / "run") == "http://lab:5000"
    assert tracking_uri(LogConfig(uri="http://own:1"), tmp_path / "run") == "http://own:1"


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("localhost:5000", "write http://localhost:5000"),
        ("127.0.0.1:5000/", "write http://127.0.0.1:5000/"),
        ("./mlruns", "sqlite:///PATH/mlflow.db"),
        ("/data/plain.db", "sqlite:///PATH/mlflow.db"),
        ("file:///data/mlruns", "sqlite:///PATH/mlflow.db"),
        ("http://", "http://HOST:5000"),
        ("ftp://server/x", "http://HOST:5000"),
        ("sqlite://m.db", "write sqlite:///m.db"),
        ("postgresql+nodriver://u:p@h/db", "nodriver"),
        ("postgresql+psycopg3://u:p@h/db", "name another driver"),
    ],
)
def test_a_uri_that_can_never_work_is_refused_by_the_launcher(monkeypatch, uri, said):
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE", raising=False)
    with pytest.raises(UserError, match=f"log.uri = {re.escape(without_password(uri))}.*{re.escape(said)}"):
        parse(PretrainRecipe, "", ["data.shards=x", f"log.uri={uri}"])
    assert parse(PretrainRecipe, "", ["data.shards=x", f"log.uri={uri}", "log.mlflow=false"]).recipe.log.uri == uri


@pytest.mark.parametrize(
    "uri", ["http://lab:5000", "https://u:p@lab/mlflow", "sqlite:///m.db", "sqlite:////data/m.db", "databricks",
            "postgresql+psycopg2://u:p@127.0.0.1:9/db", "databricks://profile"]
)  # fmt: skip
def test_a_server_that_may_be_down_is_no_mistake(uri):
    check_uri(uri, "log.uri")


@pytest.mark.parametrize("name", ["a?b#c", "a%20b", "ä &;:@="])
def test_any_directory_has_its_database_in_it(tmp_path, monkeypatch, name):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    run_dir = tmp_path / name / "run"
    run_dir.mkdir(parents=True)
    tracker = open_tracker(LogConfig(**PATIENT), run_dir, name="x", rank=0, kind="pretrain", parent=None)
    tracker.metrics({"loss": 1.0}, 1)
    (run_dir / "file.txt").write_text("x")
    tracker.artifact(run_dir / "file.txt")
    finish(tracker)
    assert (tmp_path / name / "mlflow.db").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == [name]
    assert len(list((tmp_path / name / "mlartifacts").rglob("file.txt"))) == 1
    assert history(tracking_uri(LogConfig(), run_dir)) == ("FINISHED", [(1, 1.0)])


def test_a_wrong_uri_is_mended_by_the_next_command(tmp_path, monkeypatch):
    """As long as no server has the run; afterwards its id is that server's."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    tags = {"kind": "pretrain"}
    left = {"uri": "localhost:5000", "experiment": "craft", "artifacts": "", "name": "x", "run_id": "", "tags": tags}
    Spool(run_dir).identity = left
    for name in ("good.db", "other.db"):
        config = LogConfig(uri=f"sqlite:///{tmp_path}/{name}", **PATIENT)
        finish(open_tracker(config, run_dir, name="x", rank=0, kind="pretrain", parent=None))
    assert (tmp_path / "good.db").is_file()
    assert not (tmp_path / "other.db").exists()


def test_a_resumed_run_does_not_wait_for_a_server_that_hangs(tmp_path):
    """Lines are cut and written again while a batch of them is on its way: it counts, and nothing else is lost."""
    feed, sent = Feed(tmp_path / "metrics.jsonl"), []
    for step in (1, 2, 3):
        feed.append({"step": step, "loss": step / 2})
    hanging, answer = threading.Event(), threading.Event()

    def hang(lines) -> None:
        hanging.set()
        assert answer.wait(60)
        sent.extend(lines)

    with ThreadPoolExecutor(1) as pool:
        delivery = pool.submit(feed.deliver, hang)
        assert hanging.wait(60)
        feed.cut(1, {})
        for step in (2, 3, 4):
            feed.append({"step": step, "loss": step / 2})
        answer.set()
        assert delivery.result()
    while feed.deliver(sent.extend):
        pass
    assert [(line["step"], line["values"]["loss"]) for line in sent] == [(1, 0.5), (2, 1.0), (3, 1.5), (4, 2.0)]
    assert [line["step"] for line in feed.read()] == [1, 2, 3, 4]


def test_a_resumed_job_goes_on_in_its_run(tmp_path, monkeypatch):
    """Two attempts; the first is lost after the checkpoint of step 3, with step 4 told and lines half written."""
    parts = {"train": SimpleNamespace(clips=60, listed=80)}
    audio = SimpleNamespace(sample_rate=16000, seconds=1.0)
    member = SimpleNamespace(manifest=SimpleNamespace(dataset="synth", shards=[]))
    corpus = SimpleNamespace(digest="d" * 64, labels=[1, 2], members=[member], audio=audio, splits=parts)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "config.yaml").write_text("a: 1\n")
    (run_dir / "picture.png").write_bytes(b"png")
    for first, last in ((1, 4), (4, 6)):
        tracker = open_tracker(LogConfig(**PATIENT), run_dir, name="8-PSWaCL", rank=0, kind="pretrain", parent=None)
        tracker.resume(first - 1)
        tracker.params({"train.steps": last, "data.shards": "x" * 7000})
        tracker.artifact(run_dir / "config.yaml")
        tracker.artifact(run_dir / "picture.png", "pictures")
        tracker.dataset(corpus, "/data")
        for step in range(first, last + 1):
            tracker.metrics({"loss": step / 2, "broken": float("nan")}, step)
        tracker.metrics({"eval_loss": last + 0.5}, last)
        tracker.summary({"final": 0.5}, 6)
        finish(tracker)
        assert tracker.run_id
        if first == 1:
            for name in ("tracking.jsonl", "metrics.jsonl"):
                with (run_dir / name).open("a") as file:
                    file.write('{"kind": "metrics", "ti')
    status, values = history(f"sqlite:///{tmp_path}/mlflow.db")
    assert status == "FINISHED"
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    run = client.get_run(tracker.run_id)
    assert (run.data.params["train.steps"], run.data.tags["changed.train.steps"]) == ("4", "6")
    assert (run.data.tags["resumes"], run.data.tags["gpus"]) == ("1", "none")
    assert values == [(step, step / 2) for step in range(1, 7)]
    assert [m.value for m in client.get_metric_history(tracker.run_id, "eval_loss")] == [4.5, 6.5]
    assert [m.value for m in client.get_metric_history(tracker.run_id, "final")] == [0.5]
    (given,) = run.inputs.dataset_inputs
    profile = {"classes": 2, "shards": 0, "sample_rate": 16000, "seconds_per_clip": 1.0, "train_clips": 60,
               "train_listed": 80}  # fmt: skip
    assert (given.dataset.name, json.loads(given.dataset.profile)) == ("synth", profile)
    assert run.data.tags["coverage.train"] == "60 of 80 (75.0%)"
    assert [file.path for file in client.list_artifacts(tracker.run_id)] == ["config.yaml", "pictures"]
    assert not Spool(run_dir).waiting


def test_a_run_and_a_sync_at_the_same_time_deliver_each_line_once(tmp_path):
    lines, sent = 60 * BATCH_LINES, []
    spool = Spool(tmp_path)
    spool.main.lines.write_text("".join(json.dumps({"kind": "metrics", "step": i}) + "\n" for i in range(lines)))

    def deliver() -> None:
        own = Spool(tmp_path)
        own.send = lambda batch: sent.append([line["step"] for line in batch])
        while own.deliver():
            time.sleep(0)  # the other one's turn

    with ThreadPoolExecutor(4) as pool:
        for one in [pool.submit(deliver) for _ in range(4)]:
            one.result()
    assert [step for batch in sent for step in batch] == list(range(lines))
    assert not spool.waiting


def test_files_and_folds_are_found_after_a_run_was_moved(tmp_path, monkeypatch):
    """Runs of a cluster without a way out are delivered from where they are copied to."""
    whole, fold = tmp_path / "cluster" / "cv", tmp_path / "cluster" / "cv" / "fold-1"
    fold.mkdir(parents=True)
    (tmp_path / "elsewhere.json").write_text("{}")
    with monkeypatch.context() as away:
        away.setattr(Spool, "deliver", lambda spool: False)
        for run_dir, part_of in ((whole, None), (fold, whole)):
            (run_dir / "results.json").write_text("{}")
            tracker = open_tracker(NOWHERE, run_dir, name="x", rank=0, kind="x", parent=None, part_of=part_of)
            for file in (run_dir / "results.json", tmp_path / "elsewhere.json"):
                tracker.artifact(file)
            finish(tracker)
    (tmp_path / "cluster").rename(tmp_path / "desk")
    made, files = [], []

    def create_run(number, run_name, tags):
        made.append(tags.get("mlflow.parentRunId"))
        return SimpleNamespace(info=SimpleNamespace(run_id=f"run {len(made)}"))

    experiment = SimpleNamespace(lifecycle_stage="active", experiment_id="1")
    client = SimpleNamespace(
        create_run=create_run, get_experiment_by_name=lambda name: experiment, log_batch=lambda run_id, **part: None,
        log_artifact=lambda run_id, path, folder: files.append(Path(path)), set_terminated=lambda *words: None,
    )  # fmt: skip
    monkeypatch.setattr("mlflow.tracking.MlflowClient", lambda *words, **named: client)
    for run_dir in (tmp_path / "desk" / "cv" / "fold-1", tmp_path / "desk" / "cv"):
        sync(Spool(run_dir), None)
    assert made == [None, "run 1"]
    assert files == [tmp_path / "desk/cv/fold-1/results.json", tmp_path / "elsewhere.json",
                     tmp_path / "desk/cv/results.json", tmp_path / "elsewhere.json"]  # fmt: skip


def test_a_wrong_address_for_sync_is_not_kept(tmp_path, monkeypatch):
    """Nor where it has no such run; the next sync asks the run's own server again."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    spool, own = Spool(tmp_path), "http://127.0.0.1:9"
    spool.identity = {"uri": own, "experiment": "craft", "artifacts": "", "name": "x", "run_id": "7", "tags": {}}
    spool.main.append({"kind": "tags", "values": {"a": "b"}})
    secret = "http://me:secret@127.0.0.1:9"
    with pytest.raises(UserError, match="did not take it") as refused:
        sync(spool, secret)
    assert "secret" not in str(refused.value)
    assert Spool(tmp_path).identity["uri"] == own
    (tmp_path / "tracking.jsonl").unlink()
    sync(Spool(tmp_path), secret)  # nothing waits: it says where the run goes on
    assert Spool(tmp_path).identity["uri"] == secret


def test_a_number_of_the_whole_run_that_changed_is_told_again(tmp_path, monkeypatch):
    """Such as the mean of a cross-validation that got more folds: at the same step."""
    monkeypatch.setattr(Spool, "deliver", lambda spool: False)
    for value in (0.5, 0.5, 0.75):
        tracker = open_tracker(NOWHERE, tmp_path, name="x", rank=0, kind="cross-validation", parent=None)
        tracker.summary({"final_mAP": value}, 0)
        for epoch in (1, 2):
            tracker.summary({"mean_eval_mAP": value / epoch}, epoch)
        finish(tracker)
    told = [(line["step"], *item) for line in Spool(tmp_path).main.read() if line["kind"] == "metrics"
            for item in line["values"].items()]  # fmt: skip
    assert told == [(step, name, value / max(1, step)) for value in (0.5, 0.75)
                    for step, name in ((0, "final_mAP"), (1, "mean_eval_mAP"), (2, "mean_eval_mAP"))]  # fmt: skip


def test_an_untracked_attempt_between_tracked_ones_loses_no_number(tmp_path):
    """log.mlflow=false cuts lines too: how far the others were delivered stays true."""
    feed, sent = Feed(tmp_path / "metrics.jsonl"), []
    for step in range(1, 9):
        feed.append({"step": step, "loss": float(step)})
    assert feed.deliver(sent.extend)
    feed.cut(4, None)
    for step in range(5, 17, 4):
        feed.append({"step": step, "loss": float(step), "note": float(step)})
    while feed.deliver(sent.extend):
        pass
    told = [(line["step"], name) for line in sent for name in line["values"]]
    assert told == [*((step, "loss") for step in range(1, 9)), (5, "note"), (9, "loss"), (9, "note"), (13, "loss"),
                    (13, "note")]  # fmt: skip


def test_a_run_whose_identity_was_deleted_is_told_anew_as_a_whole(tmp_path, monkeypatch):
    """As the refusal of a damaged tracking.json advises."""
    monkeypatch.setattr(Spool, "deliver", lambda spool: False)
    tracker = open_tracker(NOWHERE, tmp_path, name="x", rank=0, kind="pretrain", parent=None)
    tracker.metrics({"loss": 1.0}, 1)
    finish(tracker, "FAILED")
    for feed in Spool(tmp_path).feeds():
        assert not feed.waiting or feed.deliver(lambda lines: None)
    (tmp_path / "tracking.json").unlink()
    finish(open_tracker(NOWHERE, tmp_path, name="x", rank=0, kind="pretrain", parent=None))
    told: list[dict] = []
    for feed in Spool(tmp_path).feeds():
        while feed.deliver(told.extend):
            pass
    assert [line["values"] for line in told if line["kind"] == "metrics"] == [{"loss": 1.0}]
    assert [line["kind"] for line in told if line["kind"] in ("finish", "resume")] == ["finish", "resume", "finish"]


def test_a_run_directory_that_is_copied_again_goes_on_in_its_run(tmp_path, monkeypatch):
    """A cluster without a way out: copied and delivered in the middle of the run, and again at its end."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    cluster, desk, uri = tmp_path / "cluster", tmp_path / "desk", f"sqlite:///{tmp_path}/mlflow.db"
    cluster.mkdir()
    for step in (1, 2):
        with monkeypatch.context() as away:
            away.setattr(Spool, "deliver", lambda spool: False)
            tracker = open_tracker(NOWHERE, cluster, name="x", rank=0, kind="pretrain", parent=None)
            tracker.metrics({"loss": step / 2}, step)
            finish(tracker)
        shutil.copytree(cluster, desk, dirs_exist_ok=True)
        sync(Spool(desk), uri)
    status, values = history(uri)
    assert (status, values) == ("FINISHED", [(1, 0.5), (2, 1.0)])


def test_a_copied_run_directory_gets_a_run_of_its_own(tmp_path, monkeypatch):
    """Copied to train on with other settings, while the first one stays; one that was moved keeps its MLflow run."""
    monkeypatch.setattr(Spool, "deliver", lambda spool: False)

    def attempt(run_dir: Path) -> str:
        finish(open_tracker(NOWHERE, run_dir, name="x", rank=0, kind="pretrain", parent=None))
        return str(Spool(run_dir).identity["run_id"])

    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    attempt(first)
    Spool(first).identity = Spool(first).identity | {"run_id": "r"}
    (tmp_path / "link").symlink_to(first)
    assert attempt(tmp_path / "link") == "r"
    shutil.copytree(first, second)
    assert attempt(second) == ""
    assert Spool(second).identity["tags"]["run_dir"] == str(second)
    assert Spool(second).main.delivered == 0
    assert attempt(first) == "r"
    first.rename(tmp_path / "third")
    assert attempt(tmp_path / "third") == "r"


def test_each_node_s_metrics_reach_the_run(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    other = Feed(run_dir / "system" / "node2.jsonl")  # what another node's first rank writes
    other.lines.parent.mkdir()
    other.append({"kind": "metrics", "values": {"system/node2/cpu_utilization_percentage": 50.0}, "step": 0})
    config = LogConfig(**PATIENT | {"system_every": 0.05})
    tracker = open_tracker(config, run_dir, name="x", rank=0, kind="pretrain", parent=None, first_of_node=True)
    deadline = time.monotonic() + 300
    while len(list(run_dir.glob("system/*.jsonl"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    finish(tracker)
    metrics = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db").get_run(tracker.run_id).data.metrics
    assert metrics["system/node2/cpu_utilization_percentage"] == 50.0
    assert metrics["system/system_memory_usage_megabytes"] > 0


def test_a_monitor_goes_on_where_it_stopped(tmp_path):
    for steps in (1, 2):
        monitor = NodeMonitor(tmp_path, main=False, every=0.05)
        feed = next((Feed(file) for file in tmp_path.glob("system/*.jsonl")), None)
        deadline = time.monotonic() + 300
        while (feed is None or len(feed.read()) < 3 * steps) and time.monotonic() < deadline:
            time.sleep(0.05)
            feed = next((Feed(file) for file in tmp_path.glob("system/*.jsonl")), None)
        monitor.stop()
    assert feed is not None
    told = [line["step"] for line in feed.read()]
    assert len(told) >= 6
    assert told == list(range(len(told)))


def test_pictures_show_what_was_masked_and_made(tmp_path):
    """Patch (0, 0) is at the bottom left; a masked patch takes the prediction and nothing else does."""
    grid, side = (2, 3), 4
    targets = np.arange(6)[None, :, None] * np.ones((1, 6, side * side))
    image = figures._image(targets[0], grid)
    assert image.shape == (8, 12)
    assert (image[0, 0], image[0, -1], image[-1, 0]) == (0, 2, 3)
    figures.reconstructions(targets, np.array([[1, 4]]), np.full((1, 2, 16), 9.0), grid, tmp_path / "p.png", "t")
    assert np.asarray(Image.open(tmp_path / "p.png")).std() > 0


def test_confusion_counts_and_tables(tmp_path):
    targets = np.eye(3)[[0, 0, 1, 2]]
    logits = np.eye(3)[[0, 1, 1, 0]].astype(np.float32)
    table, picture = figures.confusion(targets, logits, ["cat", "dog", "cow"], tmp_path)
    assert table.read_text().splitlines()[1:] == ["cat,1,1,0", "dog,0,1,0", "cow,1,0,0"]
    assert picture.stat().st_size > 1000
    rows = [{"label": "a", "id": "1", "positives": 2, "average_precision": 0.2},
            {"label": "b", "id": "2", "positives": 0, "average_precision": None},
            {"label": "c", "id": "3", "positives": 5, "average_precision": 0.9}]  # fmt: skip
    figures.evaluation({"per_class": rows, "metric": "mAP"}, targets, logits, tmp_path)
    assert [line[0] for line in (tmp_path / "per_class.csv").read_text().splitlines()[1:]] == ["c", "a", "b"]
    assert not figures.curves(tmp_path / "none.jsonl", tmp_path / "curves.png")
    none = [(np.empty(0), np.empty(0))]  # no clip has a label
    assert all(file.exists() for file in figures.precision_recall_curves(none, ["cat"], tmp_path))


def test_curves_show_probes_of_each_representation(tmp_path):
    rows = [{"step": step, "loss": 1.0, "lr": 1.0, "time": 0} for step in (1, 2)]
    (tmp_path / "plain.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows.append({"step": 2, "eval_probe_linear_spec": 0.4, "eval_probe_linear_wav": 0.3, "time": 0})
    (tmp_path / "probed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("plain", "probed"):
        assert figures.curves(tmp_path / f"{name}.jsonl", tmp_path / f"{name}.png")
    plain, probed = (Image.open(tmp_path / f"{name}.png").width for name in ("plain", "probed"))
    assert 2 * probed == 3 * plain  # a panel more


class Gate:
    """A server's door that can be shut: connections are taken and held, as by a server that hangs."""

    def __init__(self, target: int) -> None:
        self.open = threading.Event()
        self._target = target
        self._door = socket.create_server(("127.0.0.1", 0))
        self.port = self._door.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            caller, _ = self._door.accept()
            threading.Thread(target=self._serve, args=(caller,), daemon=True).start()

    def _serve(self, caller: socket.socket) -> None:
        self.open.wait()
        try:
            server = socket.create_connection(("127.0.0.1", self._target))
        except OSError:
            caller.close()
            return
        threading.Thread(target=self._copy, args=(server, caller), daemon=True).start()
        self._copy(caller, server)

    def _copy(self, source: socket.socket, target: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)
        except OSError:
            source.close()
            target.close()


@pytest.mark.slow
def test_a_server_that_is_down_hangs_or_dies_costs_nothing_and_gets_everything(tmp_path, monkeypatch, caplog):
    """Not there at the start, hanging, up, killed in the middle, and back for `sync`."""
    gate = Gate(port := free_port())
    uri = f"http://127.0.0.1:{gate.port}"
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
    monkeypatch.setattr("pipeline.tracking.tracker.RETRY_SECONDS", 0.5)
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    config = LogConfig(uri=uri, finish_wait=3.0)
    tracker = open_tracker(config, run_dir, name="8-PSWaCL", rank=0, kind="pretrain", parent=None)
    for step in range(1, 11):  # taken by a door behind which nobody answers: the calls return all the same
        tracker.metrics({"loss": float(step)}, step)
    assert Spool(run_dir).metrics.delivered == 0
    with server(tmp_path, port):
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "120")  # its first answers are slow
        gate.open.set()
        for step in range(11, 21):
            tracker.metrics({"loss": float(step)}, step)
        deadline = time.monotonic() + 300
        while Spool(run_dir).waiting and time.monotonic() < deadline:
            time.sleep(0.2)
        assert history(uri) == ("RUNNING", [(step, float(step)) for step in range(1, 21)])
    for step in range(21, 31):  # it died in the middle
        tracker.metrics({"loss": float(step)}, step)
    caplog.set_level("WARNING")
    tracker.finish("FINISHED")
    assert Spool(run_dir).waiting
    (said,) = (message for message in caplog.messages if "11 records of this run wait in" in message)
    assert said.endswith(f"python -m pipeline.tracking sync {run_dir}")
    with server(tmp_path, port):
        done = run_script("-m", "pipeline.tracking", "sync", run_dir)
        assert done.returncode == 0, done.stderr
        assert "all delivered" in done.stdout
        tracker._thread.join(600)  # its next try finds nothing to do
        assert history(uri) == ("FINISHED", [(step, float(step)) for step in range(1, 31)])
    assert [json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()] == [
        *range(1, 31)
    ]
    assert [json.loads(line)["kind"] for line in (run_dir / "tracking.jsonl").read_text().splitlines()] == ["finish"]
    nothing = run_script("-m", "pipeline.tracking", "sync", tmp_path)
    assert nothing.returncode == 2
    assert "tracking.json" in nothing.stderr
