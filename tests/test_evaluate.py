"""Evaluation of finetuned runs: each clip once on any number of ranks, ensembles, tables and pictures."""

import csv
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from scipy.special import expit, softmax
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

from launchers.evaluate import check_places, main, parser, read_ids
from pipeline import distributed
from pipeline.config import FinetuneRecipe, PretrainRecipe
from pipeline.data.corpus import load_corpus
from pipeline.data.manifest import load_index, load_manifest
from pipeline.data.spec import DataSpec
from pipeline.distributed import World
from pipeline.engine.evaluation import check_same_weights, read_predictions
from pipeline.errors import UserError
from pipeline.model.weights import weights_file
from pipeline.recipes import dump_recipe, load_recipe
from pipeline.report.collect import Predictions
from pipeline.runs import mean_probability, score_averaged_weights, score_ensemble
from pipeline.tasks import FinetuneTask
from tests.ranks import run_ranks


def read(path) -> Predictions:
    return Predictions(*read_predictions(path))


@pytest.fixture(scope="module")
def runs(shards, tmp_path_factory):
    """Two run directories with random weights of different seeds: what finetune.py leaves, without the training."""
    made = []
    for seed in range(2):
        run_dir = tmp_path_factory.mktemp("runs") / f"seed{seed}"
        checkpoint = run_dir / "checkpoints" / "step-00000001"
        checkpoint.mkdir(parents=True)
        recipe = load_recipe(FinetuneRecipe, [], [f"data.shards={shards}", "model.size=micro", "model.stride=16"])
        (run_dir / "config.yaml").write_text(dump_recipe(recipe))
        spec = DataSpec.of(load_corpus(recipe.data), recipe.data)
        spec.save(run_dir)
        torch.manual_seed(seed)
        task = FinetuneTask(recipe, spec.mel_bins, spec.frames, len(spec.labels), spec.single_label)
        save_file(task.state_dict(), checkpoint / "weights.safetensors")
        (checkpoint / "complete").touch()
        (run_dir / "checkpoints" / "latest").write_text(checkpoint.name)
        made.append(run_dir)
    return made


def evaluate(*words: object) -> str:
    """What evaluate.py prints."""
    ((_, said),) = run_ranks(1, "launchers/evaluate.py", *words)
    return said


@pytest.fixture(scope="module")
def single(runs, shards, tmp_path_factory):
    """(results, predictions, folder of plots) of the first run on one rank."""
    out = tmp_path_factory.mktemp("single")
    said = evaluate("--checkpoint", runs[0], "--shards", shards, "--out", out / "results.json", "--predictions",
                    out / "predictions.parquet", "--plots", out / "plots", "--workers", 0)  # fmt: skip
    assert "95 % interval" in said
    return json.loads((out / "results.json").read_text()), read(out / "predictions.parquet"), out / "plots"


@pytest.mark.slow
def test_every_number_is_scikit_learns_on_the_written_predictions(single, shards):
    content, found, plots = single
    assert len(set(found.keys)) == content["clips"] == load_manifest(str(shards)).splits["eval"].clips
    known = found.targets.any(axis=0)
    ap = [average_precision_score(t, s) for t, s in zip(found.targets.T[known], found.scores.T[known], strict=True)]
    area = [roc_auc_score(t, s) for t, s in zip(found.targets.T[known], found.scores.T[known], strict=True)]
    assert content["value"] == content["metrics"]["mAP"] == pytest.approx(np.mean(ap), abs=1e-6)
    assert content["metrics"]["mAUC"] == pytest.approx(np.mean(area), abs=1e-6)
    rows = [row for row in content["per_class"] if row["positives"]]
    assert [row["average_precision"] for row in rows] == pytest.approx(ap, abs=1e-6)
    assert [row["auc"] for row in rows] == pytest.approx(area, abs=1e-6)
    assert content["classes_without_positives"] == (~known).sum()
    assert content["interval"]["low"] < content["interval"]["high"]
    with (plots / "pr_curves.csv").open() as file:
        curve = [row for row in csv.DictReader(file) if row["label"] == rows[0]["label"]]
    first = np.flatnonzero(known)[0]
    precision, recall, _ = precision_recall_curve(found.targets[:, first], found.scores[:, first])
    assert [float(row["precision"]) for row in curve] == pytest.approx(precision, abs=1e-5)
    assert [float(row["recall"]) for row in curve] == pytest.approx(recall, abs=1e-5)
    assert Image.open(plots / "pr_curves.png").size[0] > 200


@pytest.mark.slow
def test_two_ranks_score_what_one_scores(runs, shards, single, tmp_path):
    run_ranks(2, "launchers/evaluate.py", "--checkpoint", runs[0], "--shards", shards, "--batch-size", 6,
              "--predictions", tmp_path / "p.parquet", "--out", tmp_path / "r.json")  # fmt: skip
    found = read(tmp_path / "p.parquet")
    assert found.keys == single[1].keys
    np.testing.assert_array_equal(found.targets, single[1].targets)
    np.testing.assert_allclose(found.scores, single[1].scores, rtol=1e-4, atol=1e-5)  # another batch, another GEMM
    assert json.loads((tmp_path / "r.json").read_text())["value"] == pytest.approx(single[0]["value"], abs=1e-6)


def listed(shards, folder) -> tuple[list[str], list[str]]:
    """Some keys of split eval, and the lines of a file that lists them beside others, one of them twice."""
    keys = load_index(shards, "eval")["key"].to_pylist()
    some = sorted(keys[1::2])
    other = load_index(shards, "train")["key"][0].as_py()
    every = [*some, other, "nothing"]
    (folder / "ids.txt").write_text("\r\n".join([*every[::-1], "", f" {some[0]} "]), "utf-8-sig")
    return some, every


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_the_listed_clips_alone_are_scored(runs, shards, single, tmp_path, ranks):
    """Their logits are those of the whole split; the metrics are those of these clips; counts are said."""
    some, every = listed(shards, tmp_path)
    said = run_ranks(ranks, "launchers/evaluate.py", "--checkpoint", runs[0], "--shards", shards, "--batch-size", 6,
                     "--ids", tmp_path / "ids.txt", "--out", tmp_path / "r.json", "--workers", 1,
                     "--predictions", tmp_path / "p.parquet")[0][1]  # fmt: skip
    counts = {"listed": len(every), "found": len(some), "evaluated": len(some), "missing": 2}
    content = json.loads((tmp_path / "r.json").read_text())
    assert content["ids"] == {"file": str(tmp_path / "ids.txt")} | counts
    assert content["clips"] == len(some)
    assert f"ids.txt: {len(every)} ids, {len(some)} of them in the shards, {len(some)} evaluated; 2 are missing" in said
    assert said.count(f"1 ids are there more than once and count once: {some[0]}") == 1
    found = read(tmp_path / "p.parquet")
    assert found.keys == some
    which = [single[1].keys.index(key) for key in some]
    np.testing.assert_allclose(found.scores, single[1].scores[which], rtol=1e-4, atol=1e-5)
    known = found.targets.any(axis=0)
    ap = [average_precision_score(t, s) for t, s in zip(found.targets.T[known], found.scores.T[known], strict=True)]
    assert content["value"] == pytest.approx(np.mean(ap), abs=1e-6)


def test_the_members_of_an_ensemble_score_the_listed_clips(runs, shards, tmp_path):
    some, every = listed(shards, tmp_path)
    ids = read_ids(tmp_path / "ids.txt")
    assert sorted(ids.to_pylist()) == sorted(every)
    members = [(run, weights_file(run)) for run in runs]
    recipe = load_recipe(FinetuneRecipe, [], [f"data.shards={shards}", "data.workers=0"])
    for combine in (score_ensemble, score_averaged_weights):
        scored = combine(members, recipe, World(), ids)
        assert sorted(scored.keys) == some
        assert scored.about["ids"]["missing"] == 2


def test_lists_of_nothing_are_one_line(runs, shards, tmp_path, monkeypatch):
    path = tmp_path / "ids.txt"
    command = ["evaluate.py", "--checkpoint", runs[0], "--shards", shards, "--workers", 0, "--ids", path]
    for content, more, said in (
        (None, [], "--ids .*ids.txt: No such file or directory; give a text file"),
        (b"\xff\xfea\0", [], "--ids .*ids.txt: 'utf-8' codec can't decode"),
        (b" \n\n", [], "--ids .*ids.txt: lists no id"),
        (b"nothing\nof it\n", [], f"{shards}: none of the 2 listed ids is in split 'eval', the first .* 'nothing'"),
        (b"nothing", ["--out", path], "two name the same place"),
    ):
        if content is not None:
            path.write_bytes(content)
        monkeypatch.setattr(sys, "argv", [*map(str, [*command, *more])])
        with pytest.raises(UserError, match=said):
            main()
    assert path.read_bytes() == b"nothing"


@pytest.mark.slow
def test_an_ensemble_averages_probabilities_and_a_mean_model_averages_weights(runs, shards, single, tmp_path):
    for combine in ("scores", "weights"):
        evaluate("--checkpoint", *runs, "--shards", shards, "--combine", combine, "--workers", 0,
                 "--predictions", tmp_path / combine, "--out", tmp_path / f"{combine}.json")  # fmt: skip
    evaluate("--checkpoint", runs[1], "--shards", shards, "--workers", 0, "--predictions", tmp_path / "b")
    mean = (expit(single[1].scores) + expit(read(tmp_path / "b").scores)) / 2
    np.testing.assert_allclose(read(tmp_path / "scores").scores, mean, atol=1e-6)
    assert json.loads((tmp_path / "scores.json").read_text())["ensemble"] == [str(run) for run in runs]
    halves = [load_file(run / "checkpoints" / "step-00000001" / "weights.safetensors") for run in runs]
    merged = tmp_path / "merged.safetensors"
    save_file({name: (halves[0][name] + halves[1][name]) / 2 for name in halves[0]}, merged)
    folder = runs[0] / "checkpoints" / "step-00000001"
    original = folder / "weights.safetensors"
    kept = original.read_bytes()
    try:
        original.write_bytes(merged.read_bytes())
        evaluate("--checkpoint", runs[0], "--shards", shards, "--workers", 0, "--predictions", tmp_path / "m")
    finally:
        original.write_bytes(kept)
    np.testing.assert_allclose(
        read(tmp_path / "weights").scores, read(tmp_path / "m").scores, atol=1e-5
    )
    assert pq.read_table(tmp_path / "weights").num_rows == single[0]["clips"]


def test_results_name_how_the_model_pools(runs, shards, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(runs[1], other)
    recipe = load_recipe(FinetuneRecipe, [other / "config.yaml"], ["finetune.pool=cls"])
    (other / "config.yaml").write_text(dump_recipe(recipe))
    members = [(run, weights_file(run)) for run in (runs[0], other)]
    recipe = load_recipe(FinetuneRecipe, [], [f"data.shards={shards}", "data.workers=0"])
    assert score_averaged_weights(members[1:], recipe, World()).about["pool"] == "cls"
    assert score_ensemble(members, recipe, World()).about["pool"] == "mean, cls"


def test_a_directory_that_is_no_run_is_one_line(shards, tmp_path):
    command = ["launchers/evaluate.py", "--checkpoint", tmp_path, "--shards", shards]
    ((status, said),) = run_ranks(1, *command, check=False)
    assert status == 2
    assert str(tmp_path) in said
    assert "Traceback" not in said


def test_places_are_tried_before_anything_is_scored(runs, shards, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    for words, message in (
        (["--out", "/proc/nowhere/r.json"], "--out /proc/nowhere/r.json: "),
        (["--out", tmp_path], "is a directory"),
        (["--predictions", tmp_path], "--predictions .*is a directory"),
        (["--plots", tmp_path / "file"], "--plots .*file is no directory"),
        (["--out", tmp_path / "x", "--predictions", tmp_path / "x"], "same place"),
        (["--out", ""], "--out = '' names no path"),
    ):
        command = ["evaluate.py", "--checkpoint", runs[0], "--shards", shards, "--workers", 0, *words]
        monkeypatch.setattr(sys, "argv", [*map(str, command)])
        with pytest.raises(UserError, match=message):
            main()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.fixture
def words(runs, shards):
    return ["--checkpoint", str(runs[0]), "--shards", str(shards)]


def test_what_a_run_consists_of_is_no_place_for_results(words, runs, tmp_path):
    step = runs[0] / "checkpoints" / "step-00000001"
    for option, place in (("--out", runs[0] / "config.yaml"), ("--predictions", runs[1] / "data.json"),
                          ("--out", step / "weights.safetensors")):  # fmt: skip
        with pytest.raises(UserError, match=f"{place} is what a run consists of"):
            check_places(parser().parse_args([*words, option, str(place)]))
    (tmp_path / "config.yaml").touch()
    (tmp_path / "again.json").touch()
    for place in (runs[0] / "results.json", tmp_path / "again.json", tmp_path / "new" / "r.json"):
        check_places(parser().parse_args([*words, "--out", str(place)]))
    assert not (tmp_path / "new").exists()


def test_home_directories_are_expanded(words, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    args = parser().parse_args([*words, "--out=~/r.json", "--predictions=~/p", "--plots=~/plots"])
    assert (args.out, args.predictions, args.plots) == (tmp_path / "r.json", tmp_path / "p", tmp_path / "plots")
    with pytest.raises(UserError, match="--out"):
        parser().parse_args([*words, "--out", ""])


def test_runs_that_cannot_be_evaluated_are_one_line(runs, shards, tmp_path, monkeypatch):
    pretrained, unknown, other = (tmp_path / name for name in ("pretrained", "unknown", "other"))
    for folder in (pretrained, unknown, other):
        shutil.copytree(runs[0], folder)
    recipe = load_recipe(PretrainRecipe, [], [f"data.shards={shards}", "model.size=micro"])
    (pretrained / "config.yaml").write_text(dump_recipe(recipe))
    config = (unknown / "config.yaml").read_text()
    (unknown / "config.yaml").write_text(config.replace("finetune:", "finetune:\n  dropout: 0.1"))
    for run_dirs, more, said in (
        ([pretrained], [], "not a finetuned run"),
        ([runs[0], pretrained], [], "not a finetuned run"),
        ([unknown], [], r"config\.yaml: unknown setting finetune\.dropout"),
        ([runs[0]], ["--batch-size", "0"], "--batch-size 0"),
        ([tmp_path], [], str(tmp_path)),
    ):
        command = ["evaluate.py", "--checkpoint", *map(str, run_dirs), "--shards", str(shards), *more]
        monkeypatch.setattr(sys, "argv", command)
        with pytest.raises(UserError, match=said):
            main()
    labels = json.loads((other / "data.json").read_text())
    labels["labels"][0], labels["labels"][1] = labels["labels"][1], labels["labels"][0]
    (other / "data.json").write_text(json.dumps(labels))
    pair = [(run_dir, weights_file(run_dir)) for run_dir in (runs[0], other)]
    for combine in (score_ensemble, score_averaged_weights):  # averaged, the classes of one would be another's
        with pytest.raises(UserError, match="trained on other labels"):
            combine(pair, load_recipe(FinetuneRecipe, [runs[0] / "config.yaml"]), World())


def test_ranks_that_found_different_checkpoints_are_told(runs, monkeypatch):
    """A run in training has a newer one for ranks that start later, whose clips would have scores of other weights."""
    files = [weights_file(runs[0]), Path("random:base")]
    check_same_weights(files)
    first = "step-00000000/weights.safetensors, random:base"
    monkeypatch.setattr(distributed, "broadcast", lambda values: values | {"weights": first})
    with pytest.raises(UserError, match=r"has weights = step-00000001/.*, rank 0 has step-00000000/.* name one of"):
        check_same_weights(files)


def changed(run, where, recipe_words=(), **data):
    """A copy of a run with other settings, or another data.json."""
    shutil.copytree(run, where)
    recipe = load_recipe(FinetuneRecipe, [where / "config.yaml"], list(recipe_words))
    (where / "config.yaml").write_text(dump_recipe(recipe))
    content = json.loads((where / "data.json").read_text())
    (where / "data.json").write_text(json.dumps(content | data))
    return where


def test_runs_that_held_out_different_clips_are_no_ensemble(runs, shards, tmp_path, monkeypatch):
    """The second one was trained on the fold that the first one held out; likewise with another split."""
    first = changed(runs[0], tmp_path / "first", ["data.fold=1"])
    folds = changed(runs[1], tmp_path / "folds", ["data.fold=2"])
    split = changed(runs[1], tmp_path / "split", ["data.eval_split=train"])
    out = tmp_path / "r.json"
    command = ["evaluate.py", "--shards", shards, "--workers", 0, "--out", out, "--checkpoint"]
    for run_dirs, said in (
        ([first, folds], f"{folds} held out fold 2, {first} fold 1"),
        ([first, runs[1]], f"{runs[1]} held out split 'eval', {first} fold 1"),
        ([runs[0], split], f"{split} held out split 'train', {runs[0]} split 'eval'"),
    ):
        for combine in ("scores", "weights"):
            monkeypatch.setattr(sys, "argv", [*map(str, [*command, *run_dirs, "--combine", combine])])
            with pytest.raises(UserError, match=said):
                main()
    assert not out.exists()
    monkeypatch.setattr(sys, "argv", [*map(str, [*command, first, folds, "--split", "eval"])])
    main()
    assert json.loads(out.read_text())["split"] == "eval"


def test_accuracy_is_of_clips_with_one_label(runs, shards, tmp_path, monkeypatch):
    """A run of single-label data, and shards of the same labels whose clips have several of them."""
    run = changed(runs[0], tmp_path / "run", single_label=True)
    index = load_index(shards, "eval", columns=["key", "labels"])
    labels = dict(zip(index["key"].to_pylist(), index["labels"].to_pylist(), strict=True))
    one = [key for key, own in labels.items() if len(own) == 1]
    assert 0 < len(one) < len(labels)
    out = tmp_path / "r.json"
    command = ["evaluate.py", "--checkpoint", run, "--shards", shards, "--workers", 0, "--out", out]
    monkeypatch.setattr(sys, "argv", [*map(str, command)])
    with pytest.raises(UserError, match=f"{len(labels) - len(one)} of {len(labels)} clips have no label or several"):
        main()
    assert not out.exists()
    (tmp_path / "ids.txt").write_text("\n".join(one))
    monkeypatch.setattr(sys, "argv", [*map(str, [*command, "--ids", tmp_path / "ids.txt"])])
    main()
    content = json.loads(out.read_text())
    assert (content["metric"], content["clips"]) == ("accuracy", len(one))


def test_shards_without_labels_are_one_line(runs, unlabelled, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--checkpoint", str(runs[0]), "--shards", str(unlabelled)])
    with pytest.raises(UserError, match=f"{unlabelled}: its clips have no labels .*pretrain"):
        main()


def test_an_ensemble_averages_what_each_loss_trained():
    logits = [np.random.default_rng(seed).normal(0, 4, (50, 5)).astype(np.float32) for seed in range(3)]
    single = np.mean([softmax(part.astype(np.float64), axis=1) for part in logits], axis=0)
    several = np.mean([expit(part) for part in logits], axis=0)
    np.testing.assert_allclose(mean_probability(logits, ["ce"] * 3), single, atol=1e-7)
    np.testing.assert_allclose(mean_probability(logits, ["bce"] * 3), several, atol=1e-6)
    assert (single.argmax(1) != several.argmax(1)).any()
    both = (softmax(logits[0].astype(np.float64), axis=1) + expit(logits[1])) / 2
    np.testing.assert_allclose(mean_probability(logits[:2], ["ce", "bce"]), both, atol=1e-6)
