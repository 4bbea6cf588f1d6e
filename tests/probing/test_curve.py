"""eval.probe: the same numbers on any ranks, in metrics.jsonl and MLflow, and nothing of the training changes."""

import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from mlflow.tracking import MlflowClient

from pipeline.command_line import Launch
from pipeline.config import DataConfig, PretrainRecipe
from pipeline.data.corpus import load_corpus
from pipeline.data.loader import Loader
from pipeline.data.spec import DataSpec
from pipeline.distributed import World
from pipeline.errors import UserError
from pipeline.flow import Encoded
from pipeline.methods import PRETRAIN
from pipeline.model.heads import row_means
from pipeline.probing.curve import Curve
from pipeline.recipes import load_recipe
from pipeline.tasks import PretrainTask
from pipeline.tracking.spool import Feed
from pipeline.train import pretrain
from tests.conftest import ROOT
from tests.helpers import edit_manifest, synth_shards, write_index
from tests.ranks import run_ranks

NAMES = [f"probe_{probe}_{stream}" for probe in ("knn", "linear") for stream in ("spec", "wav", "both")]


@pytest.fixture(scope="module")
def longer(tmp_path_factory):
    """Clips that are longer than those of the run, in more than one batch of each split."""
    out = tmp_path_factory.mktemp("longer")
    synth_shards(out, clips=170, seconds=0.7)
    return out


@pytest.mark.slow
def test_ranks_agree_and_change_nothing(shards, longer, tmp_path):
    script = ROOT / "tests" / "probing" / "curve_on_ranks.py"
    found = {}
    for ranks in (1, 2, 3):  # of three one has no batch of its own of the evaluation
        run_ranks(ranks, script, shards, longer, tmp_path / str(ranks))
        each = [json.loads((tmp_path / f"{ranks}-{rank}").read_text()) for rank in range(ranks)]
        assert all(one == each[0] for one in each)
        found[ranks] = each[0]
    assert found[1] == found[2] == found[3]
    assert sorted(found[1]) == sorted(NAMES)
    assert all(0 < value < 1 for value in found[1].values())


def curve_of(shards, probe, *words: str) -> tuple[Curve, PretrainTask]:
    words = (f"data.shards={shards}", f"eval.probe={probe}", "model.size=micro", "data.workers=0", *words)
    recipe = load_recipe(PretrainRecipe, [], words)
    spec = DataSpec.of(load_corpus(recipe.data), recipe.data)
    task = PretrainTask(recipe, spec.mel_bins, spec.frames).eval()
    return Curve(recipe, spec, PRETRAIN[recipe.pretrain.method], World()), task


def test_what_is_probed_are_the_tokens_of_unmasked_clips(shards):
    curve, task = curve_of(shards, shards)
    grids = {"spec": task.model.grid, "wav": task.model.wav_grid}
    made = curve._encode(task, grids, "eval")
    with Loader(DataConfig(shards=str(shards), workers=0), "eval", batch_size=32) as loader, torch.no_grad():
        batch = next(iter(loader.batches()))
        encoded = task.model(batch.fbank, task.model.waveform_map(batch.waveform, batch.length))
        assert isinstance(task(batch, tokens=True), Encoded)
    for stream in ("spec", "wav"):
        expected = row_means(getattr(encoded, stream)[0], 8)[batch.valid]
        assert torch.equal(made[f"{stream}.1"], expected)
    assert np.array_equal(made["rows"], batch.row[batch.valid])
    single, task = curve_of(shards, shards, "pretrain.method=ssast", "eval.probe_clips=20")
    assert list(single.measure(task, grids)) == ["probe_knn_spec", "probe_linear_spec"]


def test_shards_without_an_evaluation_split_are_probed_by_their_last_fold(shards, longer, tmp_path, monkeypatch):
    def one_split(content) -> None:
        del content["splits"]["eval"]
        content["shards"] = [shard for shard in content["shards"] if shard["split"] == "train"]

    alone = tmp_path / "alone"
    shutil.copytree(longer, alone)
    table = pq.read_table(alone / "index.parquet")
    edit_manifest(alone, one_split)
    write_index(alone, table.filter(np.array(table["split"].to_pylist()) == "train"))
    curve, task = curve_of(shards, alone)
    found = curve.measure(task, {"spec": task.model.grid, "wav": task.model.wav_grid})
    assert sorted(found) == sorted(NAMES)


def test_shards_that_cannot_be_probed_are_one_line_before_anything_is_written(shards, tmp_path):
    def refused(said: str, *words: str) -> None:
        recipe = load_recipe(PretrainRecipe, [], [f"data.shards={shards}", f"run.dir={tmp_path / 'run'}", *words])
        with pytest.raises(UserError, match=said):
            pretrain(Launch(recipe, {}), World())

    refused("nothing is held out", f"eval.probe={shards}", "data.eval_split=")
    refused(r"none/manifest\.json: No such file", f"eval.probe={tmp_path / 'none'}")

    def unlabelled(content) -> None:
        content["labels"] = []
        for split in content["splits"].values():
            split["class_clips"], split["class_listed"] = [], []

    other = tmp_path / "other"
    synth_shards(other, clips=12)
    edit_manifest(other, unlabelled)
    refused(r"labels and a split 'train' are needed; it has 0 labels", f"eval.probe={other}")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 3])
def test_a_pretraining_logs_its_curve_and_trains_as_without(shards, longer, tmp_path, stage):
    words = [f"data.shards={shards}", "model.size=micro", "train.batch_size=8", "train.steps=6", "eval.every=2",
             "eval.every_clips=0", "log.every=1", "log.peak_tflops=null", "optim.warmup=2", "data.workers=1",
             "log.pictures=0", "log.system_every=0", "--deepspeed_config", f"zero{stage}.json"]  # fmt: skip
    runs = tmp_path / "runs"
    run_ranks(2, "launchers/pretrain.py", *words, f"run.dir={runs / 'without'}", "log.mlflow=false")
    run_ranks(2, "launchers/pretrain.py", *words, f"run.dir={runs / 'with'}", f"eval.probe={longer}",
              "eval.probe_every=2", "log.finish_wait=300")  # fmt: skip
    rows = {name: Feed(runs / name / "metrics.jsonl").read() for name in ("without", "with")}
    losses = {name: [(row["step"], row["loss"]) for row in found if "loss" in row] for name, found in rows.items()}
    assert losses["with"] == losses["without"]
    probed = {row["step"]: row for row in rows["with"] if "eval_probe_linear_both" in row}
    assert sorted(probed) == [4, 6]  # every second evaluation, and the last one
    assert {key for key in probed[6] if "probe" in key} == {f"eval_{name}" for name in NAMES}
    assert not any("eval_probe_linear_both" in row for row in rows["without"])
    client = MlflowClient(f"sqlite:///{runs}/mlflow.db")
    (experiment,) = client.search_experiments(filter_string="name = 'craft'")
    found = [run.data.metrics for run in client.search_runs([experiment.experiment_id])]
    logged = [metrics["eval_probe_linear_both"] for metrics in found if "eval_probe_linear_both" in metrics]
    assert logged == [pytest.approx(probed[6]["eval_probe_linear_both"])]
