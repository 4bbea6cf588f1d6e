"""Cross-validation: which folds, what they come to, and a run that is killed between them."""

import itertools
import json
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from mlflow.tracking import MlflowClient
from safetensors.torch import load_file, save_file

from pipeline.command_line import Launch
from pipeline.config import FinetuneRecipe, PretrainRecipe
from pipeline.cross_validation import choose_folds, cross_validate, fold_launch, summarise
from pipeline.data.corpus import load_corpus
from pipeline.data.loader import Loader
from pipeline.data.spec import DataSpec
from pipeline.distributed import World
from pipeline.engine.evaluation import read_predictions
from pipeline.engine.setup import reconcile
from pipeline.errors import UserError
from pipeline.export import export_safetensors, open_exported
from pipeline.files import write_json, write_text
from pipeline.recipes import load_recipe
from pipeline.run_directory import write_record
from pipeline.runs import initialise
from pipeline.tasks import task_of
from tests.conftest import ROOT
from tests.ranks import Rank, fork_ranks, run_ranks

WORDS = ["model.size=micro", "train.batch_size=8", "train.epochs=2", "log.every=1", "log.peak_tflops=null",
         "optim.warmup=2", "data.workers=1", "checkpoint.average=[0,0]", "log.model=false",
         "log.finish_wait=300"]  # fmt: skip


def fold(value: float | None, *epochs: float | None) -> dict:
    curve = {str(number): each for number, each in enumerate(epochs, start=1)}
    return {"metric": "accuracy", "value": value, "clips": 10, "weights": "weights", "shards_digest": "D",
            "epochs": curve}  # fmt: skip


def test_the_best_epoch_is_the_same_for_all_folds():
    content = summarise({1: fold(0.5, 0.9, 0.2, 0.5), 2: fold(0.7, 0.1, 0.7, 0.7), 3: fold(0.6, 0.2, 0.8, 0.6)})
    assert content["value"] == pytest.approx(0.6)
    assert content["spread"] == pytest.approx(0.1)
    assert content["clips"] == 30
    best = content["common_epoch"]
    assert best["epoch"] == 3  # each fold's own best would be 1, 2, 2
    assert best["value"] == pytest.approx(np.mean([0.5, 0.7, 0.6]))
    assert best["folds"] == {"1": 0.5, "2": 0.7, "3": 0.6}
    assert content["epochs"] == pytest.approx({"1": 0.4, "2": 1.7 / 3, "3": 0.6})
    tied = summarise({1: fold(0.5, 0.5, 0.5), 2: fold(0.5, 0.5, 0.5, 0.9)})
    assert (tied["common_epoch"]["epoch"], list(tied["epochs"])) == (1, ["1", "2"])  # the earlier; what all have
    assert summarise({4: fold(0.5)})["common_epoch"] is None


def test_a_fold_without_any_label_has_an_undefined_metric():
    """results.json has null for it, at the end and at each epoch."""
    content = summarise({1: fold(None, None, None), 2: fold(0.5, 0.4, 0.5)})
    assert np.isnan(content["value"])
    assert np.isnan(list(content["epochs"].values())).all()
    assert content["common_epoch"] is None
    content = summarise({1: fold(0.5, None, 0.5), 2: fold(0.5, 0.9, 0.5)})
    assert (content["common_epoch"]["epoch"], content["common_epoch"]["value"]) == (2, 0.5)


def test_folds_that_are_not_there_or_contradict_are_said(shards, tmp_path):
    def chosen(*words: str) -> list[int]:
        return choose_folds(load_recipe(FinetuneRecipe, [], [f"data.shards={shards}", *words]))

    assert chosen("finetune.folds=all") == [1, 2, 3, 5]
    assert chosen("finetune.folds=[3,2]") == [2, 3]
    assert chosen("finetune.folds=all", "data.train_split=[train,eval]") == [1, 2, 3, 4, 5]
    with pytest.raises(UserError, match=r"\[2, 9\]: the shards have the folds \[1, 2, 3, 5\]"):
        chosen("finetune.folds=[2,9]")
    with pytest.raises(UserError, match=r"data\.fold = 3"):
        chosen("finetune.folds=all", "data.fold=3")
    with pytest.raises(UserError, match=r"pipeline\.serving"):
        chosen("finetune.folds=all", "log.register_as=sounds")
    with pytest.raises(UserError, match=r"split 'eval' .* has no folds"):
        chosen("finetune.folds=all", "data.train_split=eval")


def test_weights_that_learned_labels_of_the_held_out_fold_are_refused(shards, tmp_path):
    words = [f"data.shards={shards}", *WORDS[:2]]
    with Loader(load_recipe(FinetuneRecipe, [], words).data, batch_size=8) as loader:
        for kind, name in ((FinetuneRecipe, "finetuned"), (PretrainRecipe, "pretrained")):
            recipe = load_recipe(kind, [], [*words, "data.fold=2"])
            run_dir = tmp_path / name
            (run_dir / "checkpoints" / "step-00000001").mkdir(parents=True)
            write_text(run_dir / "checkpoints" / "latest", "step-00000001")
            write_record(run_dir, recipe, {}, loader.spec)
            weights = {name: value.contiguous() for name, value in task_of(recipe, loader).state_dict().items()}
            save_file(weights, run_dir / "checkpoints" / "step-00000001" / "weights.safetensors")

        def begin(name: str, fold: int) -> None:
            recipe = load_recipe(FinetuneRecipe, [], [*words, f"model.init={tmp_path / name}", f"data.fold={fold}"])
            initialise(task_of(recipe, loader), recipe, loader.spec)

        for fold, name in ((2, "finetuned"), (0, "finetuned"), (3, "pretrained")):
            begin(name, fold)
        for name in ("finetuned", "finetuned/checkpoints/step-00000001"):
            with pytest.raises(UserError, match="held out fold 2: it has learned labels of fold 3, "):
                begin(name, 3)


def test_a_directory_of_other_folds_or_of_a_single_run_is_refused_before_anything_is_written(
    shards, tmp_path, monkeypatch
):
    """Also where the fold of other settings is none that the command names."""
    run_dir = tmp_path / "cv"

    def command(*words: str) -> Launch[FinetuneRecipe]:
        words = (f"run.dir={run_dir}", f"data.shards={shards}", "finetune.folds=[1,2]", "log.mlflow=false", *words)
        return Launch(load_recipe(FinetuneRecipe, [], list(words)), {})

    monkeypatch.setattr("pipeline.cross_validation.finetune", lambda part, world: pytest.fail("a fold was begun"))

    def refused(launch: Launch[FinetuneRecipe], said: str) -> None:
        with pytest.raises(UserError, match=said):
            cross_validate(launch, World())

    launch = command()
    ds, _ = reconcile({}, launch.recipe, World())
    spec = DataSpec.of(load_corpus(launch.recipe.data), launch.recipe.data)
    folder = run_dir / "fold-3"
    folder.mkdir(parents=True)
    write_record(folder, fold_launch(launch, run_dir, "x-folds", 3).recipe, ds, spec)
    write_json(folder / "fold.json", {"shards_digest": spec.digest})
    refused(command("optim.lr=0.5"), r"fold-3 is done with optim\.lr = 5e-05, not 0\.5")
    refused(command("train.epochs=3"), r"fold-3 is done with train\.epochs")
    write_json(folder / "fold.json", {"shards_digest": "0"})
    refused(launch, "fold-3 is done on other shards")
    (folder / "fold.json").write_text("{")
    refused(launch, r"fold\.json: not JSON")
    (folder / "fold.json").unlink()
    write_json(folder / "results.json", {})
    refused(command("optim.lr=0.5"), r"fold-3 was trained with optim\.lr")
    write_record(run_dir, command("finetune.folds=[]").recipe, ds, spec)
    write_json(run_dir / "results.json", {})
    refused(launch, "holds a single run, this is a cross-validation")
    assert not (run_dir / "logs").exists()


@pytest.fixture(scope="module")
def crossed(shards, tmp_path_factory):
    """Folds 1 and 2 on 2 ranks, killed within fold 2 and started again: directory, outputs, traces of fold 1."""
    folder = tmp_path_factory.mktemp("folds")
    run_dir = folder / "runs" / "cv"
    words = [f"data.shards={shards}", *WORDS]
    command = ["launchers/finetune.py", f"run.dir={run_dir}", "finetune.folds=[1,2]", *words]
    first = fork_ranks(2, *command)
    wait_for(run_dir / "fold-2" / "checkpoints" / "latest", first[0])
    for rank in first:
        rank.process.kill()
    assert [rank.end()[0] for rank in first] == [-signal.SIGKILL] * 2
    kept = {path: path.stat().st_mtime_ns for path in (run_dir / "fold-1").rglob("*")}
    assert not (run_dir / "results.json").exists()
    ((_, said), _) = run_ranks(2, *command)
    return run_dir, said, kept, words


def wait_for(path: Path, rank: Rank) -> None:
    end = time.monotonic() + 300
    while not path.exists():
        assert rank.process.poll() is None, f"ended with {rank.end()}, {path} is not there"
        assert time.monotonic() < end, f"{path} does not come"
        time.sleep(0.02)


@pytest.mark.slow
def test_a_finished_fold_is_kept_and_the_interrupted_one_goes_on(crossed):
    run_dir, said, kept, _ = crossed
    assert {path: path.stat().st_mtime_ns for path in (run_dir / "fold-1").rglob("*")} == kept
    assert "Traceback" not in said, said
    assert "fold 1 is done (1 of 2)" in said
    assert ", from step 0" not in said
    content = json.loads((run_dir / "results.json").read_text())
    parts = [json.loads((run_dir / f"fold-{k}" / "results.json").read_text()) for k in (1, 2)]
    assert [part["fold"] for part in parts] == [1, 2]
    assert content["folds"] == {str(part["fold"]): part["value"] for part in parts}
    assert content["value"] == pytest.approx(np.mean([part["value"] for part in parts]))
    assert content["clips"] == sum(part["clips"] for part in parts)
    assert set(content["epochs"]) == {"1", "2"}
    for number, part in enumerate(parts, start=1):  # what the report reads of a fold that is a run of its own
        assert part["epochs"] == json.loads((run_dir / f"fold-{number}" / "fold.json").read_text())["epochs"]
        assert part["epochs"]["2"] == pytest.approx(part["value"], abs=1e-5)
    assert {result["pool"] for result in (content, *parts)} == {"mean"}
    assert f"mean       {content['value']:10.4f}" in said
    logged = (run_dir / "fold-2" / "logs" / "rank-1.log").read_text()
    for line in set(logged.splitlines()):  # a fold's handlers end with it: no line twice
        assert logged.splitlines().count(line) == 1, line


@pytest.mark.slow
def test_mlflow_holds_the_folds_under_the_whole(crossed):
    run_dir, *_ = crossed
    client = MlflowClient(f"sqlite:///{run_dir.parent}/mlflow.db")
    (experiment,) = client.search_experiments(filter_string="name = 'craft'")
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert set(runs) == {"8-Scratch-SWaB-folds", "8-Scratch-SWaB-fold-1", "8-Scratch-SWaB-fold-2"}
    whole = runs["8-Scratch-SWaB-folds"]
    assert {run.info.status for name, run in runs.items() if name != "8-Scratch-SWaB-fold-1"} == {"FINISHED"}
    assert whole.data.tags["kind"] == "cross-validation"
    for number in (1, 2):
        part = runs[f"8-Scratch-SWaB-fold-{number}"]
        assert part.data.tags["mlflow.parentRunId"] == whole.info.run_id
        assert part.data.params["data.fold"] == str(number)
    assert whole.data.metrics["final_mAP"] == json.loads((run_dir / "results.json").read_text())["value"]


@pytest.mark.slow
def test_a_finished_fold_of_other_settings_is_refused(crossed):
    run_dir, _, _, words = crossed
    words = [f"run.dir={run_dir}", "finetune.folds=[1,2]", *words, "optim.lr=0.5"]
    ((status, said),) = run_ranks(1, "launchers/finetune.py", *words, check=False)
    assert status == 2, said
    assert "fold-1 is done with optim.lr = 5e-05, not 0.5" in said


@pytest.fixture(scope="module")
def alone(shards, crossed, tmp_path_factory):
    """Runs of distributed/runs.py: fold 2 alone, the modern recipe straight and resumed, each ZeRO stage."""
    words = crossed[3]
    folder = tmp_path_factory.mktemp("alone")
    script = ROOT / "tests" / "distributed" / "runs.py"
    run_ranks(2, script, shards, folder, *words, "data.fold=2")
    return folder


@pytest.mark.slow
def test_a_fold_has_the_numbers_of_that_fold_alone(crossed, alone):
    """Though it came second in its process, was killed, and went on as the first of another one.

    To rounding: kernels add in another order where memory is aligned otherwise.
    """
    keys, targets, logits = read_predictions(alone / "alone" / "predictions.parquet")
    other_keys, other_targets, other_logits = read_predictions(crossed[0] / "fold-2" / "predictions.parquet")
    assert (keys, targets.tolist()) == (other_keys, other_targets.tolist())
    np.testing.assert_allclose(logits, other_logits, rtol=0, atol=1e-5)


def weights_at(run_dir, step, name="weights"):
    return load_file(run_dir / "checkpoints" / f"step-{step:08d}" / f"{name}.safetensors")


@pytest.mark.slow
def test_an_average_over_more_steps_than_the_run_has_is_said(alone):
    said = (alone / "straight" / "logs" / "rank-0.log").read_text()
    assert "checkpoint.ema = 0.9 averages about 10 steps, more than the 6 of this run" in said
    assert "checkpoint.ema" not in (alone / "alone" / "logs" / "rank-0.log").read_text()


@pytest.mark.slow
def test_the_modern_recipe_resumes_bit_for_bit(alone):
    files = sorted(file.name for file in (alone / "straight/checkpoints/step-00000006").glob("*.safetensors"))
    assert [name.split("-")[0] for name in files] == [
        "average.safetensors", "optimizer", "optimizer", "random", "random", "weights.safetensors"]  # fmt: skip
    for name in files:
        straight, resumed = (alone / run / "checkpoints/step-00000006" / name for run in ("straight", "resumed"))
        assert straight.read_bytes() == resumed.read_bytes(), name


@pytest.mark.slow
def test_results_say_what_each_class_weighed(alone):
    content = json.loads((alone / "straight" / "results.json").read_text())
    assert (content["sampler"], content["replacement"]) == ("balanced", True)
    rows, draws = content["per_class"], content["epoch_clips"]
    counts, drawn = ([row[name] for row in rows] for name in ("train_clips", "train_drawn"))
    assert 1 < max(drawn) / min(drawn) < max(counts) / min(counts)  # clips of several labels leave it short of balanced
    assert max(drawn) < draws
    for row in rows:
        assert row["pos_weight"] == pytest.approx((draws / row["train_drawn"] - 1) ** 0.5)


@pytest.mark.slow
def test_the_average_and_the_rates_of_layers_are_what_the_recipe_says(alone):
    run_dir = alone / "straight"
    mean = weights_at(run_dir, 2)
    for step, decay in ((4, 2 / 11), (6, 3 / 12)):  # that of the second and third update; it never rises to 0.9 ** 2
        now = weights_at(run_dir, step)
        mean = {name: decay * mean[name] + (1 - decay) * now[name] for name in mean}
    stored = weights_at(run_dir, 6, "average")
    assert stored.keys() == mean.keys()
    for name in mean:
        torch.testing.assert_close(stored[name], mean[name], rtol=1e-6, atol=1e-7)
    # Adam's updates are as large as its rate: those of neighbouring blocks differ by the layer decay, 0.75.
    before, after = weights_at(run_dir, 1), weights_at(run_dir, 2)
    names = sorted(name for name in before if name.endswith("mlp.fc1.weight"))
    moved = [(after[name] - before[name]).square().mean().sqrt().item() for name in names]
    assert len(moved) == 4
    for lower, upper in itertools.pairwise(moved):
        assert lower / upper == pytest.approx(0.75, abs=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_each_zero_stage_exports_what_it_trained(alone, tmp_path, stage):
    """Stage 0 has its weights in one piece; the files of the others, gathered from 2 ranks, must be the same."""
    run_dir = alone / f"zero-{stage}"
    assert json.loads((run_dir / "checkpoints/step-00000003/state.json").read_text())["zero_stage"] == stage
    export_safetensors(open_exported(run_dir), tmp_path / "model.safetensors")
    exported, expected = load_file(tmp_path / "model.safetensors"), weights_at(alone / "zero-0", 3)
    assert exported.keys() == expected.keys()
    for name, tensor in exported.items():
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-6)
    scores = [read_predictions(alone / f"zero-{n}" / "predictions.parquet")[2] for n in (0, stage)]
    np.testing.assert_allclose(scores[1], scores[0], rtol=0, atol=1e-5)
