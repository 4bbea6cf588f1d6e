"""The launchers as a user runs them: 2 ranks, real shards, results, errors."""

import json
import math
import re

import numpy as np
import onnxruntime
import pytest
import yaml

from pipeline.config import FinetuneRecipe
from pipeline.data.loader import Loader
from pipeline.engine.checkpoint import complete_checkpoints
from pipeline.engine.evaluation import read_predictions
from pipeline.recipes import load_recipe
from tests.distributed.conftest import STEPS, lines
from tests.ranks import run_ranks, run_script


def refusal(script: str, *words: object) -> str:
    """What a launcher says that ends with status 2."""
    ((status, said),) = run_ranks(1, script, *words, check=False)
    assert status == 2, said
    assert "Traceback" not in said
    return said


@pytest.mark.slow
def test_a_run_directory_holds_what_it_should(pretrained):
    config = yaml.safe_load((pretrained / "config.yaml").read_text())
    assert config["pretrain"]["method"] == "pswacl"
    assert json.loads((pretrained / "ds.json").read_text())["gradient_accumulation_steps"] == 2
    assert len(complete_checkpoints(pretrained)) == 1
    trained = [line for line in lines(pretrained) if "loss" in line]
    assert [line["step"] for line in trained] == list(range(1, STEPS + 1))
    wanted = {"loss", "spec_nce", "spec_mse", "spec_accuracy", "contrast", "lr", "clips_per_second",
              "data_wait_fraction", "grad_norm", "mfu"}  # fmt: skip
    for line in trained:
        assert wanted <= line.keys()
        assert all(math.isfinite(line[name]) for name in wanted)
        assert line["grad_norm"] > 0
        total = line["spec_nce"] + 10 * line["spec_mse"] + 0.01 * line["contrast"]
        assert line["loss"] == pytest.approx(total, rel=1e-5)
        assert line["mfu"] > 0
        at_peak = line["clips_per_second"] / line["mfu"]  # clips/s that would be an MFU of 1
        assert at_peak == pytest.approx(trained[0]["clips_per_second"] / trained[0]["mfu"])
    said = (pretrained / "logs" / "rank-0.log").read_text()
    assert re.search(r"MFU against \S+ TFLOP/s a rank \(float32, measured\); \S+ GFLOP a clip", said)


@pytest.mark.slow
def test_another_run_or_a_fresh_start_is_refused_before_anything_is_written(pretrained, pretraining):
    before = {path: path.stat().st_mtime_ns for path in pretrained.rglob("*")}
    cases = (("model.size=tiny", "model.size = micro, not tiny"), ("run.resume=never", "run.resume = never"))
    for word, said in cases:
        assert said in refusal("launchers/pretrain.py", *pretraining, f"run.dir={pretrained}", word)
    assert {path: path.stat().st_mtime_ns for path in pretrained.rglob("*")} == before


@pytest.mark.slow
def test_finetuning_writes_results_that_evaluate_reproduces(finetuned, shards, tmp_path):
    results = json.loads((finetuned / "results.json").read_text())
    assert results["metric"] == "mAP"
    assert results["weights"] == "average"
    assert len(results["per_class"]) == 13
    assert results["sampler"] == "shuffle"
    assert all(row["train_drawn"] == row["train_clips"] > 0 and row["pos_weight"] == 1 for row in results["per_class"])
    assert results["metrics"].keys() == {"mAP", "mAUC", "d_prime"}
    out = tmp_path / "again.json"
    done = run_script("launchers/evaluate.py", "--checkpoint", finetuned, "--shards", shards, "--out", out)
    assert done.returncode == 0, done.stderr
    assert json.loads(out.read_text())["value"] == pytest.approx(results["value"], abs=1e-6)
    other = refusal("launchers/evaluate.py", "--checkpoint", finetuned, "--shards", shards, "--split", "nope")
    assert "'nope'" in other


@pytest.mark.slow
def test_predict_labels_files_and_names_those_it_cannot_read(finetuned, shards, tmp_path):
    audio = sorted((shards / "source" / "audio").glob("*.flac"))[:2]
    (tmp_path / "text.wav").write_text("no audio")
    done = run_script("launchers/predict.py", "--checkpoint", finetuned, audio[0], tmp_path / "text.wav", audio[1],
                      "--top", 3, "--json")  # fmt: skip
    assert done.returncode == 1
    assert "text.wav: undecodable" in done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["path"] for row in found] == [str(path) for path in audio]
    for row in found:
        scores = [label["score"] for label in row["labels"]]
        assert len(scores) == 3
        assert scores == sorted(scores, reverse=True)


@pytest.mark.slow
def test_a_zero3_run_as_onnx_scores_the_held_out_clips_the_same(finetuned, shards):
    """From the launcher's checkpoint through export.py into onnxruntime, on what the trainer scored."""
    done = run_script("launchers/export.py", "--checkpoint", finetuned, "--format", "onnx")
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("fbank, waveform, length -> logits, embedding, any batch\n")
    session = onnxruntime.InferenceSession(str(finetuned / "export" / "model.onnx"))
    keys, _, expected = read_predictions(finetuned / "predictions.parquet")
    data = load_recipe(FinetuneRecipe, [finetuned / "config.yaml"], ["data.workers=0"]).data
    with Loader(data, "eval", batch_size=7) as loader:
        for batch in loader.batches():
            given = {name: getattr(batch, name).numpy() for name in ("fbank", "waveform", "length")}
            (logits,) = session.run(["logits"], given)
            rows = [keys.index(key) for key in loader.keys(batch.row[batch.valid].tolist())]
            # test_export.py has the graph within 1e-5; here the trainer's own sums add their rounding.
            np.testing.assert_allclose(logits[batch.valid.numpy()], expected[rows], rtol=0, atol=5e-5)


@pytest.mark.slow
def test_mlflow_holds_both_runs_linked(pretrained, finetuned):
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{pretrained.parent}/mlflow.db")
    experiment = client.get_experiment_by_name("craft")
    runs = {run.data.tags["kind"]: run for run in client.search_runs([experiment.experiment_id])}
    assert runs.keys() == {"pretrain", "finetune"}
    assert runs["pretrain"].info.run_name == "8-PSWaCL"
    assert runs["finetune"].info.run_name == "8-PSWaCL-SWaB"
    assert runs["finetune"].data.tags["pretrain_run_id"] == runs["pretrain"].info.run_id
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    history = client.get_metric_history(runs["pretrain"].info.run_id, "loss")
    trained = [line for line in lines(pretrained) if "loss" in line]
    assert [(metric.step, metric.value) for metric in history] == [(line["step"], line["loss"]) for line in trained]
    assert runs["finetune"].data.metrics["final_mAP"] == json.loads((finetuned / "results.json").read_text())["value"]
    artifacts = {file.path for file in client.list_artifacts(runs["finetune"].info.run_id)}
    assert {"config.yaml", "ds.json", "data.json", "results.json"} <= artifacts


@pytest.mark.slow
def test_a_batch_that_does_not_divide_is_one_clear_line(deepspeed_run, shards):
    done = deepspeed_run(2, "launchers/pretrain.py", f"data.shards={shards}", "train.batch_size=7", check=False)
    assert done.returncode == 2
    said = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert said == ["error: train.batch_size = 7 does not divide by 2 ranks; use a batch of 6 or 8, or 1 or 7 ranks"]


@pytest.mark.parametrize("script", ["pretrain", "finetune"])
def test_print_config_and_help(script):
    printed = run_script(f"launchers/{script}.py", "--print-config", "train.steps=3")
    assert yaml.safe_load(printed.stdout)["train"]["steps"] == 3
    helped = run_script(f"launchers/{script}.py", "--help")
    assert helped.returncode == 0
    assert "train.batch_size = " in helped.stdout


def test_missing_shards_and_unknown_keys_are_one_line():
    cases = ((["train.stesp=1"], "train.steps"), ([], "data.shards"), (["data.shards=/no/such"], "/no/such"))
    for words, said in cases:
        assert said in refusal("launchers/pretrain.py", *words).splitlines()[-1]
