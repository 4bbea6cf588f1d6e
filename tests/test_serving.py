"""A pretrain-finetune chain through a lab's servers, and its model served: registry, HTTP."""

import base64
import json
import os
import re
import subprocess
import sys
import urllib.request
from importlib.metadata import packages_distributions
from pathlib import Path
from types import SimpleNamespace

import mlflow
import numpy as np
import pandas as pd
import pytest
import soundfile
from mlflow.tracking import MlflowClient

from pipeline.config import FinetuneRecipe
from pipeline.data.manifest import load_index
from pipeline.engine.evaluation import read_predictions
from pipeline.errors import UserError
from pipeline.recipes import load_recipe
from pipeline.serving.__main__ import check_register
from pipeline.serving.listen import listen
from pipeline.serving.package import PACKAGE, REQUIREMENTS, check_place, check_publishable, save_model
from pipeline.serving.pyfunc_model import CraftModel
from pipeline.serving.scorer import MAX_BYTES, load_scorer, resample
from pipeline.tracking.spool import Spool
from tests import lab
from tests.ranks import ROOT, free_port, run_script
from tests.test_export import make_run, snapshot

FINETUNED = "8-PSWaCL-SWaB-as_bal"


@pytest.fixture
def client(chain, monkeypatch) -> MlflowClient:
    for name, value in chain.lab.env.items():
        monkeypatch.setenv(name, value)
    return MlflowClient(chain.lab.uri, registry_uri=chain.lab.uri)


@pytest.fixture(scope="module")
def clip(shards) -> str:
    """An evaluation clip's source file and key."""
    return str(sorted((shards / "source" / "audio").glob("*.flac"))[40])


@pytest.mark.slow
def test_the_chain_is_in_the_lab_s_database_and_store(chain, client):
    assert chain.interrupted == 130
    runs = [identity.parent for identity in chain.out.glob("*/tracking.json")]
    synced = run_script("-m", "pipeline.tracking", "sync", *runs)  # a busy server may not have had all when they ended
    assert synced.returncode == 0, synced.stderr
    experiment = client.get_experiment_by_name("ablation").experiment_id
    runs = {run.info.run_name: run for run in client.search_runs([experiment])}
    assert runs.keys() == {"8-PSWaCL", "8-PSWaCL-AST", "8-PSWaCL-SWaB"}
    assert {name: run.info.status for name, run in runs.items()} == dict.fromkeys(runs, "FINISHED")
    pretrained = runs["8-PSWaCL"]
    assert pretrained.data.tags["resumes"] == "1"
    assert pretrained.data.tags["methods"] == "PSWaCL-AST, PSWaCL-SWaB"
    steps = [metric.step for metric in client.get_metric_history(pretrained.info.run_id, "loss")]
    assert steps == list(range(1, 61))  # interrupted and resumed: no step twice, none missing
    assert (chain.run_dir("8-PSWaCL") / "checkpoints/step-00000018/complete").exists()  # checkpoint.keep_at: 0.3
    for run, name in ((pretrained, "8-PSWaCL"), (runs["8-PSWaCL-SWaB"], FINETUNED)):
        rows = [json.loads(line) for line in (chain.run_dir(name) / "metrics.jsonl").read_text().splitlines()]
        last = {key: value for row in rows for key, value in row.items() if key not in ("step", "time")}
        assert {key: run.data.metrics.get(key) for key in last} == last
        assert run.data.tags["mlflow.source.name"].endswith(f"{run.data.tags['kind']}.py")
    assert pretrained.data.metrics["system/system_memory_usage_megabytes"] > 0
    finetuned = runs["8-PSWaCL-SWaB"]
    assert finetuned.data.tags["mlflow.parentRunId"] == pretrained.info.run_id
    results = json.loads((chain.run_dir(FINETUNED) / "results.json").read_text())
    assert finetuned.data.metrics["final_mAP"] == pytest.approx(results["value"])
    artifacts = {file.path for file in client.list_artifacts(finetuned.info.run_id)}
    assert {"config.yaml", "ds.json", "data.json", "results.json", "curves.png", "evaluation"} <= artifacts
    pictures = [file.path for file in client.list_artifacts(pretrained.info.run_id, "pictures")]
    assert 2 <= len(pictures) <= 4
    assert "pictures/step-00000060.png" in pictures
    store = lab.client(chain.lab.s3)
    keys = [entry["Key"] for entry in store.list_objects_v2(Bucket="mlflow")["Contents"]]
    assert any(key.endswith("weights.safetensors") for key in keys)
    assert not any(key.endswith((".pkl", ".pickle")) for key in keys)


@pytest.mark.slow
def test_the_report_is_in_mlflow(chain, client, tmp_path):
    done = run_script("-m", "pipeline.report", chain.table, "--runs", chain.out, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    experiment = client.get_experiment_by_name("ablation").experiment_id
    (run,) = client.search_runs([experiment], "tags.kind = 'report'")
    assert {file.path for file in client.list_artifacts(run.info.run_id)} == {
        "report.md", "report.html", "numbers.json", "methods.png"}  # fmt: skip
    results = json.loads((chain.run_dir(FINETUNED) / "results.json").read_text())
    assert run.data.metrics["methods/PSWaCL-SWaB/as_bal"] == pytest.approx(100 * results["value"])
    client.delete_run(run.info.run_id)


@pytest.mark.slow
def test_the_scorer_hears_a_clip_as_the_evaluation_did(chain, shards, tmp_path):
    run_dir = chain.run_dir(FINETUNED)
    scorer = load_scorer(run_dir)
    keys, _, logits = read_predictions(run_dir / "predictions.parquet")
    assert keys == sorted(load_index(shards, "eval")["key"].to_pylist())
    path = next(p for p in (shards / "source" / "audio").glob("*.flac") if p.stem in keys[0])
    samples, rate = soundfile.read(path, dtype="float32")
    expected = 1 / (1 + np.exp(-logits[0]))
    for waveform in (scorer.read(str(path)), scorer.read(path.read_bytes()), resample(samples, rate, 16000)):
        assert scorer.probabilities([waveform])[0] == pytest.approx(expected, abs=2e-3)
    starts, scores = scorer.over_time(np.tile(samples, 4), 0.25)
    assert len(starts) == len(scores) == 7
    assert scores[0] == pytest.approx(scores[4], abs=1e-6)
    recording = str(tmp_path / "recording.wav")
    soundfile.write(recording, np.tile(samples, 4)[:-1000], rate, subtype="FLOAT")
    (heard,) = listen(scorer, [("recording", recording)], 0.25)  # predict.py's way
    starts, scores = scorer.over_time(scorer.read(recording, 10), 0.25)
    assert heard.starts.tolist() == starts.tolist()
    assert len(starts) == 7
    assert heard.scores == pytest.approx(scores, abs=1e-6)


@pytest.mark.slow
def test_the_registered_model_answers_over_http(chain, client, clip, tmp_path):
    version = client.get_model_version("craft", "1")
    assert version.description.startswith("# swab (micro), 13 classes")
    saved = chain.run_dir(FINETUNED) / "model"
    model = mlflow.pyfunc.load_model(str(saved))
    assert model.metadata.signature.inputs.input_names() == ["path", "audio", "samples", "rate"]
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", str(saved), "--env-manager", "local", "-p",
               str(port), "-h", "127.0.0.1"]  # fmt: skip
    samples, rate = soundfile.read(clip, dtype="float32")
    rows = [{"path": clip}, {"audio": base64.b64encode(open(clip, "rb").read()).decode()},  # noqa: SIM115
            {"samples": samples.tolist(), "rate": float(rate)}]  # fmt: skip

    def post(rows: list[dict], **more: object) -> list[dict]:
        body = json.dumps({"dataframe_records": rows, **more}).encode()
        request = urllib.request.Request(f"{address}/invocations", body, {"Content-Type": "application/json"})
        return json.load(urllib.request.urlopen(request, timeout=120))["predictions"]

    with lab.process(command, tmp_path / "serve.log", f"{address}/ping"):
        answers = [post([row], params={"top": 3})[0] for row in rows]
        with pytest.raises(urllib.error.HTTPError) as refused:
            post([{"path": "/no/such.wav"}])
    assert "/no/such.wav" in refused.value.read().decode()
    local = load_scorer(chain.run_dir(FINETUNED))
    scores = local.probabilities([local.read(clip)])[0]
    best = np.argsort(-scores, kind="stable")[:3]
    for answer in answers:
        assert answer["labels"] == [local.labels[i] for i in best]
        assert answer["scores"] == pytest.approx(scores[best].tolist(), abs=1e-5)


def test_a_package_replaces_nothing_but_a_package(tmp_path):
    """Neither the run, nor what is above it, nor anybody's files; an interrupted one leaves nothing."""
    run = tmp_path / "all" / "run"
    make_run(run, FinetuneRecipe, "finetune.method=ast")
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "thesis.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    before = snapshot(tmp_path)
    places = [run, tmp_path / "all", tmp_path / "models", run / "checkpoints", tmp_path / "file", "/proc/nowhere/x"]
    for place in places:
        with pytest.raises(UserError, match=f"^--out {place}: "):
            check_place(run, Path(place), "--out")
        with pytest.raises(UserError, match=f"^model {place}: "):
            save_model(run, Path(place))
    done = run_script("-m", "pipeline.serving", run, "--out", tmp_path / "models")
    assert done.returncode == 2
    assert done.stderr == (
        f"error: --out {tmp_path}/models: holds what this command did not make, such as thesis.txt; move it away, or "
        "name a new or empty directory\n"
    )
    for name, reason in (("craft", "was not tracked"), ("a/b", "is no name"), ("", "is no name")):
        with pytest.raises(UserError, match=reason):
            check_register(name, Spool(run))
    assert snapshot(tmp_path) == before


def test_a_package_of_ours_is_replaced_as_a_whole(tmp_path):
    run, out = tmp_path / "run", tmp_path / "new" / "model"
    make_run(run, FinetuneRecipe, "finetune.method=ast")
    for _ in range(2):
        save_model(run, out)
        assert {path.name for path in out.iterdir()} <= PACKAGE
        assert [path.name for path in out.parent.iterdir()] == ["model"]
    (run / "results.json").write_text('{"metrics": {"mAP": 0.5, "AUC": null}, "clips": 3, "split": "eval"}')
    save_model(run, out)
    assert "mAP 0.5000 on 3 clips" in (out / "README.md").read_text()
    (run / "results.json").write_text('{"metrics": 1}')
    before = snapshot(out)
    with pytest.raises(UserError, match=r"results\.json: damaged"):
        save_model(run, out)
    assert snapshot(out) == before
    (out / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"such as notes\.txt"):
        check_place(run, out, "--out")
    (run / "model").mkdir()
    (run / "model" / "notes.txt").write_text("mine")
    job = SimpleNamespace(run_dir=run, recipe=load_recipe(FinetuneRecipe))
    with pytest.raises(UserError, match=r"^log\.model .*such as notes\.txt"):  # before the training
        check_publishable(job)
    job.recipe = load_recipe(FinetuneRecipe, [], ["log.model=false"])
    check_publishable(job)


def test_a_model_that_strangers_ask(tmp_path):
    """What is no audio, too much, or of a wrong type is an answer, and costs neither memory nor the server."""
    run = tmp_path / "run"
    make_run(run, FinetuneRecipe, "finetune.method=ast")
    (tmp_path / "secret.wav").write_text("password=hunter2\n")
    os.mkfifo(tmp_path / "pipe.wav")
    model = CraftModel()
    model.scorer = scorer = load_scorer(run)
    tone = np.sin(np.arange(40000) / 20).astype(np.float32)
    path = str(tmp_path / "tone.wav")
    soundfile.write(path, tone, 16000, subtype="FLOAT")

    def ask(*rows: dict[str, object], **params: object) -> list[list[float]]:
        return model.predict(None, pd.DataFrame(list(rows), dtype=object), params)["scores"].tolist()

    expected = scorer.probabilities([tone[: scorer.spec.samples]])[0]
    content = Path(path).read_bytes()
    given = [{"path": path}, {"audio": content}, {"samples": tone.tolist()}, {"samples": tone, "rate": 16000.0}]
    for row in given:  # longer than a clip: its first seconds are heard
        (scores,) = ask(row, top=6)
        assert scores == pytest.approx(sorted(expected, reverse=True), abs=1e-5)
    assert len(ask(*given * 10)) == 40
    assert ask() == []
    for row, message in (
        ({"path": str(tmp_path / "secret.wav")}, "secret.wav: undecodable$"),  # not what the file holds
        ({"path": str(tmp_path / "pipe.wav")}, "pipe.wav: unreadable$"),
        ({"path": "/dev/zero"}, "zero: unreadable$"),
        ({"path": "a\0b"}, "give the path of a file"),
        ({"path": 5}, "path is text"),
        ({"audio": "text"}, "audio the bytes of a file"),
        ({"audio": b""}, "empty"),
        ({"audio": b"#EXTM3U\n/etc/passwd\n"}, "undecodable"),
        ({"audio": bytes(MAX_BYTES + 1)}, "at most"),
        ({"samples": [0.1], "rate": 1e-9}, "give a rate"),
        ({"samples": [0.1], "rate": float("inf")}, "give a rate"),
        ({"samples": [0.1], "rate": "fast"}, "its rate in Hz"),
        ({"samples": [0.1, float("nan")]}, "give finite floats"),
        ({"samples": [[0.1], [0.1, 0.2]]}, "give finite floats"),
        ({"samples": ["loud"]}, "give finite floats"),
        ({"samples": []}, "give finite floats"),
        ({}, "a row fills none"),
        ({"path": path, "audio": content}, "fill one"),
    ):
        with pytest.raises(ValueError, match=message) as refused:
            ask(row)
        assert "hunter2" not in str(refused.value)
    for top in (0, -1, 2.5, "all"):
        with pytest.raises(ValueError, match="params: top"):
            ask(given[0], top=top)


def test_a_package_names_all_that_it_imports(tmp_path):
    """Its environment is made of `REQUIREMENTS` alone."""
    run = tmp_path / "run"
    make_run(run, FinetuneRecipe, "finetune.method=swab")
    code = "import sys; from pathlib import Path; import pipeline.serving.pyfunc_model as model; " \
        "model.load_scorer(Path(sys.argv[1])); print(*{name.partition('.')[0] for name in sys.modules})"  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code, str(run)], cwd=ROOT, capture_output=True, text=True, check=True)
    sources = [file.read_text() for room in ("pipeline", "shard_tools") for file in (ROOT / room).rglob("*.py")]
    written = {name for text in sources for name in re.findall(r"^\s*(?:import|from) (\w+)", text, re.MULTILINE)}
    used = set(done.stdout.split()) & written - sys.stdlib_module_names - {"pipeline", "shard_tools"}
    assert {"torch", "numpy", "mlflow"} <= used
    owners = packages_distributions()  # MLflow comes in several parts
    assert [name for name in used if not {part.lower() for part in owners[name]} & set(REQUIREMENTS)] == []
