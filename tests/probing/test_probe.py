"""launchers/probe.py: features once and the same on any ranks, a table, JSON and a run in MLflow."""

import json
import shutil
import socket
import sys

import numpy as np
import pytest
from mlflow.tracking import MlflowClient
from safetensors.torch import load_file, save_file

from launchers.probe import check_unseen, main, parser, weights_hash
from pipeline.config import FinetuneRecipe, LogConfig
from pipeline.data.manifest import load_index, load_manifest
from pipeline.distributed import World
from pipeline.errors import UserError
from pipeline.export import open_exported
from pipeline.hf_craft.directory import export_hf_craft
from pipeline.model.weights import weights_file
from pipeline.probing import features, probes, protocol
from pipeline.probing.frozen import open_frozen, weights_of
from pipeline.tracking import open_tracker
from tests.conftest import ROOT
from tests.helpers import damaged_copy, synth_shards
from tests.ranks import fork_rank, places, run_ranks

PIECES = ROOT / "tests" / "probing" / "pieces.py"


def content(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*.safetensors")}


@pytest.mark.slow
def test_pieces_are_the_same_on_any_ranks_and_finished_ones_are_kept(pretrained, shards, tmp_path):
    run_ranks(1, PIECES, pretrained, shards, tmp_path / "1", "time_frequency")
    run_ranks(2, PIECES, pretrained, shards, tmp_path / "2", "time_frequency")
    once, twice = content(tmp_path / "1"), content(tmp_path / "2")
    clips = load_manifest(shards).splits["train"].clips
    assert len(once) == -(-clips // 32) > 1
    assert once == twice
    files = sorted((tmp_path / "1").rglob("*.safetensors"))
    first = load_file(files[0])
    assert first["spec.4"].shape == (32, 8 * 96)
    assert sorted(first) == ["rows", "spec.2", "spec.4", "targets", "wav.2", "wav.4"]
    labels = load_index(shards, "train")["labels"].to_pylist()
    assert [np.flatnonzero(row).tolist() for row in first["targets"].numpy()] == [sorted(row) for row in labels[:32]]
    kept = {file: file.stat().st_mtime_ns for file in files[1:]}
    files[0].unlink()
    run_ranks(2, PIECES, pretrained, shards, tmp_path / "1", "time_frequency")
    assert content(tmp_path / "1") == once
    assert {file: file.stat().st_mtime_ns for file in files[1:]} == kept


def probe(tmp_path, monkeypatch, *words: object) -> list[dict]:
    """What one process leaves in --out."""
    out = tmp_path / "out.json"
    monkeypatch.setattr(sys, "argv", ["probe.py", *map(str, words), "--out", str(out), "--workers", "0"])
    main()
    return json.loads(out.read_text())


@pytest.mark.slow
def test_a_pretraining_gets_a_score_for_each_stream_and_a_run_under_it(
    pretrained, shards, tmp_path, monkeypatch, capsys
):
    config = LogConfig(system_every=0.0, finish_wait=300.0)
    parent = open_tracker(config, pretrained, name="p", rank=0, kind="pretrain", parent=None)
    parent.finish("FINISHED")
    rows = probe(tmp_path, monkeypatch, "--checkpoint", pretrained, f"random:{pretrained}", "--shards", shards,
                 "--seeds", 2, "--no-mlflow")  # fmt: skip
    names, streams = (str(pretrained), f"random:{pretrained}"), ("spec", "wav", "both")
    found = [(row["checkpoint"], row["stream"]) for row in rows]
    assert found == [(name, stream) for name in names for stream in streams]
    manifest = load_manifest(shards)
    for row in rows:
        assert (row["metric"], row["probe"], row["pool"], row["layer"]) == ("mAP", "linear", "time_frequency", 4)
        assert row["n"] == manifest.splits["eval"].clips
        assert row["interval"]["low"] < row["value"] < row["interval"]["high"]
        assert row["shards_digest"] == manifest.digest
        assert len(row["digest"]) == 64
        assert row["weights"] == weights_hash(*weights_of([row["checkpoint"]], average=True))
    assert rows[0]["digest"] != rows[3]["digest"]
    said = capsys.readouterr().out.splitlines()
    assert sum(f" mAP {row['value']:.4f} ± {row['spread']:.4f}   95 % interval" in line
               for line, row in zip(said, rows, strict=False)) == 6  # fmt: skip
    assert not list(pretrained.parent.glob("probe-*"))
    again = probe(tmp_path, monkeypatch, "--checkpoint", pretrained, "--shards", shards, "--folds", "1,3", "--layers",
                  "2,4", "--probe", "knn")  # fmt: skip
    found = [(row["stream"], row["layer"]) for row in again]
    assert found == [(stream, layer) for stream in streams for layer in (2, 4)]
    assert [part["name"] for part in again[0]["parts"]] == ["fold 1", "fold 3"]
    folds = load_index(shards, "train", columns=["fold"])["fold"].to_pylist()
    assert again[0]["n"] == folds.count(1) + folds.count(3)
    (folder,) = pretrained.parent.glob("probe-run-*")
    assert json.loads((folder / "probe.json").read_text()) == again
    client = MlflowClient(f"sqlite:///{pretrained.parent}/mlflow.db")
    (experiment,) = client.search_experiments(filter_string="name = 'craft'")
    runs = {run.data.tags["kind"]: run for run in client.search_runs([experiment.experiment_id])}
    assert runs["probe"].data.tags["mlflow.parentRunId"] == runs["pretrain"].info.run_id
    assert runs["probe"].data.tags["manifest_digest"] == manifest.digest
    assert runs["probe"].info.status == "FINISHED"
    last = next(row for row in again if (row["stream"], row["layer"]) == ("wav", 4))
    assert runs["probe"].data.metrics["wav_knn_mAP"] == pytest.approx(last["value"])


@pytest.mark.slow
def test_two_ranks_find_what_one_finds(finetuned, shards, tmp_path):
    for ranks in (1, 2):
        run_ranks(ranks, "launchers/probe.py", "--checkpoint", finetuned, "--shards", shards, "--probe", "cgp",
                  "--out", tmp_path / f"{ranks}.json", "--features", tmp_path / str(ranks), "--no-mlflow")  # fmt: skip
    one, two = (json.loads((tmp_path / f"{ranks}.json").read_text()) for ranks in (1, 2))
    assert one == two
    assert one[0]["layer"] == [1, 2, 3, 4]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["probe", "embed", "evaluate"])
def test_ranks_with_other_shards_or_weights_are_refused(finetuned, make_run, shards, tmp_path, launcher):
    """Of two hosts with builds of their own, half of the clips would be of the one and half of the other."""
    synth_shards(tmp_path / "other", per_shard=16)
    words = {"probe": ["--no-mlflow", "--features", tmp_path / "out"], "embed": ["--out", tmp_path / "out"],
             "evaluate": []}[launcher]  # fmt: skip
    other = [("shards digest", finetuned, tmp_path / "other")]
    if launcher != "evaluate":
        run = make_run(FinetuneRecipe)
        weights = weights_file(run)
        save_file({name: value * 2 for name, value in load_file(weights).items()}, weights)
        other.append(("encoder's digest", run, shards))
    for key, *different in other:
        ranks = [fork_rank(place, f"launchers/{launcher}.py", "--checkpoint", run, "--shards", path, *words)
                 for place, (run, path) in zip(places(2), [(finetuned, shards), different], strict=True)]  # fmt: skip
        ended = [rank.end() for rank in ranks]
        assert [status for status, _ in ended] == [2, 2], ended
        assert f"error: rank 1 on {socket.gethostname()} has {key} = " in ended[1][1]
        assert not list(tmp_path.rglob("*.safetensors")) + list((tmp_path / "out").rglob("*.parquet"))


@pytest.mark.slow
def test_attention_reads_tokens_within_the_disk_that_is_allowed(pretrained, shards, tmp_path, monkeypatch):
    words = ["--checkpoint", pretrained, "--shards", shards, "--probe", "attentive", "--features", tmp_path / "f"]
    with pytest.raises(UserError, match=r"clips of split 'train' take 0\.0 GB, .* --most-gb allows 1e-06"):
        probe(tmp_path, monkeypatch, *words, "--no-mlflow", "--most-gb", "1e-6")
    assert not list(tmp_path.rglob("*.safetensors"))
    monkeypatch.setattr(probes, "FEWEST_STEPS", 40)
    rows = probe(tmp_path, monkeypatch, *words, "--no-mlflow")
    assert [row["pool"] for row in rows] == ["tokens"] * 3
    tokens = load_file(next(iter(sorted((tmp_path / "f").rglob("train-*.safetensors")))))["spec.4"]
    assert str(tokens.dtype) == "torch.float16"
    assert tokens.shape[1:] == (32, 96)


def test_all_features_are_there_before_a_probe_is_trained(pretrained, shards, tmp_path, monkeypatch):
    """Ranks but the first compute features and leave: none waits in a collective for probes that take hours."""
    order = []

    def told(name, of):
        def call(*args, **options):
            order.append(name)
            return of(*args, **options)

        return call

    monkeypatch.setattr(features, "compute", told("compute", features.compute))
    monkeypatch.setattr(protocol, "judge", told("judge", protocol.judge))
    words = ["--checkpoint", pretrained, f"random:{pretrained}", "--shards", shards, "--probe", "knn", "--no-mlflow"]
    rows = probe(tmp_path, monkeypatch, *words, "--pool", "mean", "--features", tmp_path / "f")
    assert order == ["compute"] * 4 + ["judge"] * 6
    assert [row["checkpoint"] for row in rows] == [str(pretrained)] * 3 + [f"random:{pretrained}"] * 3


def test_features_of_mended_shards_have_all_clips(pretrained, shards, tmp_path, monkeypatch):
    """A piece that lacks clips is made again, those that lack none are kept; also where too many were bad."""
    monkeypatch.setattr(features, "MOST_BATCHES", 1)
    monkeypatch.setattr(features, "BATCH", 16)
    frozen = open_frozen(str(pretrained))
    clips = load_manifest(shards).splits["train"].clips

    def made(where, folder):
        return features.compute(frozen, str(where), "train", [4], "mean", tmp_path / folder, World(), workers=0)

    whole = [file.read_bytes() for file in made(shards, "whole")]
    for bad, folder in ((1, "few"), (6, "many")):
        damaged = tmp_path / f"{folder}-shards"
        tar = damaged_copy(shards, damaged, bad)
        if bad == 1:
            assert len(features.mapped(made(damaged, folder)).rows) == clips - bad
        else:
            with pytest.raises(UserError, match="max_bad_share"):
                made(damaged, folder)
        shutil.copy(shards / tar.name, tar)
        kept = {file: file.stat().st_mtime_ns for file in (tmp_path / folder).rglob("train-*[1-9].safetensors")}
        assert len(kept) == len(whole) - 1 > 1
        assert [file.read_bytes() for file in made(damaged, folder)] == whole
        assert {file: file.stat().st_mtime_ns for file in kept} == kept


def test_weights_that_learned_labels_of_the_test_clips_are_refused(pretrained, make_run, shards, tmp_path, monkeypatch):
    """A finetuned encoder has seen them: a probe would find what it was told."""
    digest = load_manifest(shards).digest
    plain, third = make_run(FinetuneRecipe), make_run(FinetuneRecipe, "data.fold=3")
    export_hf_craft(open_exported(third), tmp_path / "hf")
    all_folds, one, held_out = ["--folds", "all"], ["--folds", "1"], ["--folds", "3"]
    swapped = ["--train-split", "eval", "--split", "train"]
    args = parser().parse_args(["--checkpoint", str(plain), "--shards", str(shards), *all_folds])
    check_unseen(args, str(plain), str(weights_file(plain)), "other shards")
    for run, words in ((plain, []), (third, []), (third, held_out), (tmp_path / "hf", held_out),
                       (pretrained, all_folds), (f"random:{plain}", all_folds)):  # fmt: skip
        args = parser().parse_args(["--checkpoint", str(run), "--shards", str(shards), *words])
        (file,) = weights_of([str(run)], average=True)
        check_unseen(args, str(run), file, digest)
    for run, words in ((plain, all_folds), (plain, held_out), (plain, swapped), (third, swapped), (third, one),
                       (third, all_folds), (tmp_path / "hf", one)):  # fmt: skip
        with pytest.raises(UserError, match=r"was finetuned on split 'train' of .* probe its pretraining") as said:
            probe(tmp_path, monkeypatch, "--checkpoint", run, "--shards", shards, *words, "--features",
                  tmp_path / "none")  # fmt: skip
        assert ("give --folds 3" in str(said.value)) == (run != plain and words != swapped)
    assert not (tmp_path / "none").exists()


def test_mistakes_are_one_line_before_anything_is_written(pretrained, shards, tmp_path, monkeypatch):
    for words, said in (
        (["--split", "test"], "--split test: .* has the splits train, eval"),
        (["--train-split", "dev"], "--train-split dev"),
        (["--split", "train"], "--split train is --train-split too: .* would be tested on the clips that train it"),
        (["--layers", "5"], "--layers 5: the encoder has 4 blocks"),
        (["--layers", "0"], "--layers 0: give all, or different numbers"),
        (["--folds", "9"], r"--folds 9: the clips have the folds \[1, 2, 3, 5\]"),
        (["--folds", "one"], "--folds one: give all"),
        (["--grid", "12x101"], "--grid 12x101: give the patches"),
        (["--seeds", "0"], "--seeds 0"),
    ):
        with pytest.raises(UserError, match=said):
            probe(tmp_path / "none", monkeypatch, "--checkpoint", pretrained, "--shards", shards, *words, "--features",
                  tmp_path / "none" / "features")  # fmt: skip
    with pytest.raises(UserError, match="no complete checkpoint"):
        probe(tmp_path, monkeypatch, "--checkpoint", tmp_path, "--shards", shards)
    assert not (tmp_path / "none").exists()
