"""Shards: format, bytes, restart, and a stock WebDataset reader."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import webdataset

from pipeline.data.manifest import load_index, load_manifest
from pipeline.errors import UserError
from shard_tools import build_shards, write
from shard_tools.plan import SplitPlan
from shard_tools.verify_shards import verify
from tests.helpers import digests, options, synth_catalog, synth_shards
from tests.ranks import run_script


def command(*words: object) -> subprocess.CompletedProcess[str]:
    return run_script("shard_tools/build_shards.py", *words)


def test_stock_webdataset_reads_the_shards(shards):
    """No code of ours: default decoders, sample by sample."""
    manifest = load_manifest(shards)
    urls = [str(shards / shard.name) for shard in manifest.shards if shard.split == "train"]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
    assert len(samples) == manifest.splits["train"].clips
    for sample in samples:
        assert "." not in sample["__key__"]
        assert sample["waveform.npy"].dtype == np.int16
        assert sample["waveform.npy"].shape == (manifest.audio.samples,)
        assert sample["fbank.npy"].dtype == np.float16
        assert sample["fbank.npy"].shape == (manifest.fbank.frames, 128)
        wanted = {"labels", "source", "start", "end", "original_duration", "original_sample_rate"}
        assert wanted <= sample["json"].keys()
        assert sample["json"]["label_names"] == [manifest.labels[i].name for i in sample["json"]["labels"]]


def test_bytes_do_not_depend_on_workers(shards, tmp_path):
    synth_shards(tmp_path, workers=2)
    assert digests(tmp_path) == digests(shards)


def test_groups_of_clips_do_not_change_the_bytes(tmp_path, monkeypatch):
    """One at a time, or 32 from station to station with one that fails in the middle of the first 32."""
    catalog = synth_catalog(tmp_path / "source", 70, 0.1)
    plan = SplitPlan(catalog, "train", tmp_path, options(0.1, 64)).shard(0)
    bad = plan.clips[16].path
    Path(bad).write_text("no audio")
    found = []
    for group in (1, 32):
        monkeypatch.setattr(write, "GROUP", group)
        rows, facts = write.write_tar(plan, tmp_path / "shard.tar")
        found.append(((tmp_path / "shard.tar").read_bytes(), rows, facts))
    assert found[0] == found[1]
    (failure,) = facts["failures"]
    assert (failure["path"], failure["row"]) == (str(Path(bad).relative_to(tmp_path / "source")), plan.clips[16].line)
    assert [row["key"] for row in rows] == [clip.key for clip in plan.clips if clip.path != bad]
    assert len(rows) > 32


def test_statistics_are_those_of_the_stored_fbanks(shards):
    manifest = load_manifest(shards)
    values = []
    for row in load_index(shards, "train").to_pylist():
        with (shards / row["shard"]).open("rb") as file:
            file.seek(row["fbank_offset"])
            values.append(np.load(file, allow_pickle=False).astype(np.float64))
    assert manifest.splits["train"].fbank_mean == pytest.approx(np.mean(values), abs=1e-9)
    assert manifest.splits["train"].fbank_std == pytest.approx(np.std(values), abs=1e-9)
    assert manifest.single_label is False


@pytest.mark.slow
def test_a_second_split_joins_the_first(tmp_path):
    """Two AudioSet csvs into one directory, with files named in all the ways they come in."""
    audio = tmp_path / "audio" / "deep"
    audio.mkdir(parents=True)
    rng = np.random.default_rng(0)

    def write(name: str, seconds: float = 1.0, rate: int = 16000) -> None:
        soundfile.write(audio / name, 0.1 * rng.standard_normal(round(seconds * rate)), rate)

    write("--4gqARaEJE_0.000.wav")
    write("-0BIyqJj9ZU_30000.flac")
    write("Y-0RWZT-miFs.ogg", seconds=10.0, rate=44100)
    write("abcdefghijk.wav", seconds=5.0)
    header = "# comment\n# comment\n# YTID, start_seconds, end_seconds, positive_labels\n"
    train = tmp_path / "balanced_train_segments.csv"
    train.write_text(
        header
        + '--4gqARaEJE, 0.000, 10.000, "/m/068hy,/m/07q6cd_"\n-0BIyqJj9ZU, 30.000, 40.000, "/m/068hy"\n'
        + 'zzzzzzzzzzz, 30.000, 40.000, "/m/068hy"\n'
    )
    test = tmp_path / "eval_segments.csv"
    test.write_text(header + '-0RWZT-miFs, 420.0, 430.0, "/m/068hy"\nabcdefghijk, 2.0, 3.0, "/m/07q6cd_"\n')
    labels = tmp_path / "class_labels_indices.csv"
    labels.write_text('index,mid,display_name\n0,/m/068hy,"Domestic animals, pets"\n1,/m/07q6cd_,Squeak\n')
    out = tmp_path / "out"
    for csv in (train, test):
        done = command("--dataset", "audioset", "--audio-root", tmp_path / "audio", "--segments", csv,
                       "--class-labels", labels, "--seconds", 1, "--out", out, "--distributor", "inline")  # fmt: skip
        assert done.returncode == 0, done.stderr
    manifest = load_manifest(out)
    assert {name: (s.clips, s.listed) for name, s in manifest.splits.items()} == {"train": (2, 3), "eval": (2, 2)}
    assert [label.name for label in manifest.labels] == ["Domestic animals, pets", "Squeak"]
    by_class = {name: (s.class_clips, s.class_listed) for name, s in manifest.splits.items()}
    assert by_class == {"train": ([2, 1], [3, 1]), "eval": ([1, 1], [1, 1])}
    assert "1 classes lack clips, most: Domestic animals, pets 2 of 3" in done.stdout
    again = ("--dataset", "audioset", "--audio-root", tmp_path / "audio", "--segments", train, "--class-labels", labels,
             "--seconds", 1, "--out", tmp_path / "other", "--distributor", "inline", "--require-coverage")  # fmt: skip
    refused = command(*again, 0.9)
    assert refused.returncode == 2
    assert "split 'train': 2 of 3 listed clips are there (66.7%), --require-coverage 0.9" in refused.stderr
    assert command(*again, 0.6).returncode == 0
    failures = [json.loads(line) for line in (out / "failures.jsonl").read_text().splitlines()]
    assert [failure["id"] for failure in failures] == ["zzzzzzzzzzz_30000"]
    assert set(load_index(out)["key"].to_pylist()) == {
        "--4gqARaEJE_0", "-0BIyqJj9ZU_30000", "-0RWZT-miFs_420000", "abcdefghijk_2000"}  # fmt: skip
    assert verify(out, workers=1) == []


def run_main(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    """The command in this process: what it imports takes seconds."""
    monkeypatch.setattr(sys, "argv", ["build_shards.py", *map(str, words)])
    handler = signal.getsignal(signal.SIGTERM)
    try:
        return build_shards.main()
    finally:
        signal.signal(signal.SIGTERM, handler)


def test_wrong_input_is_one_line_and_status_2(tmp_path):
    (tmp_path / "bad.csv").write_text("path,label\na.wav,dog\n")
    done = command("--dataset", "csv", "--table", tmp_path / "bad.csv", "--out", tmp_path / "out")
    assert done.returncode == 2
    assert done.stderr == f"error: {tmp_path}/bad.csv:1: no column 'labels' (has path, label); it needs path,labels\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--dataset esc50", "--audio-root"),
        ("", "nothing says what to build; give --root DIR"),
        ("--root /no/such", "--audio-root /no/such: No such file"),
        ("--table T --source-rate 8000", "--source-rate is of --dataset audioset, hdf5 and unlabelled, not csv"),
        ("--dataset folder --audio-root /no/such", "/no/such"),
        ("--dataset csv --table T --class-labels V", "label 'dragon' is not in the vocabulary"),
        ("--dataset csv --table T --class-labels V --split ../x", "--split '../x' becomes a file name"),
        ("--dataset csv --table T --label-separator", "--label-separator: expected one argument"),
        ("--dataset csv --table T --label-separator=", "--label-separator is empty"),
        ("--dataset synth --seconds 0", "--seconds 0 is out of range; give 0.025 to 3600"),
        ("--dataset synth --seconds nan", "--seconds nan is out of range"),
        ("--dataset synth --seconds inf", "--seconds inf is out of range"),
        ("--dataset synth --seconds x", "invalid float value: 'x'; see --help"),
        ("--dataset synth --limit 0", "--limit 0 is out of range; give 1 or more"),
        ("--dataset synth --limit -1", "--limit -1 is out of range"),
        ("--dataset synth --seed -1", "--seed -1 is out of range"),
        ("--dataset synth --sample-rate 10", "--sample-rate 10 is out of range"),
        ("--dataset synth --sample-rate 4000 --mel-bins 32", "generated audio needs at least 8000"),
        ("--dataset synth --mel-bins 100000", "--mel-bins 100000 is more than the 256 frequencies"),
        ("--dataset synth --max-failures -1", "--max-failures -1 is out of range"),
        ("--dataset synth --workers 0", "--workers 0 is out of range"),
        ("--dataset synth --clips-per-shard 0", "--clips-per-shard 0 is out of range"),
        ("--dataset synth --require-coverage 95", "--require-coverage 95 is no share of the clips; give one such as"),
        ("--dataset synth --require-coverage 0", "--require-coverage 0 is no share"),
        ("--dataset synth --require-coverage nan", "--require-coverage nan is no share"),
        ("--dataset synth --slice 3/2", "'3/2' is not I/N"),
        ("--dataset synth --slice=1/2 --merge", "--slice does not go with --merge"),
        ("--dataset synth --dry-run --merge", "--dry-run does not go with --merge"),
        ("--dataset synth --download", "--download is of --dataset esc50, not synth"),
        ("--dataset synth --table T", "--table is of --dataset csv, ast_json, audiofolder, dcase, nemo, unlabelled"),
        ("--dataset synth --label-separator ,", "--label-separator is of --dataset audioset, csv, ast_json"),
        ("--dataset esc50 --segments T --root /x", "--segments is of --dataset audioset, not esc50"),
        ("--dataset esc50 --label-overrides T --root /x", "--label-overrides is of --dataset audioset, not esc50"),
        ("--dataset esc50 --accept-any-archive --root /x", "are of --download"),
        ("--dataset csv --table T --ontology V", "--ontology is of --dataset audioset, not csv"),
        ("--dataset csv --table T --audio-list V", "--audio-list is of --dataset audioset, not csv"),
        ("--dataset csv --table T --sha256 0", "--sha256 is of --dataset esc50, not csv"),
        ("--dataset folder --root /x --class-labels V", "--class-labels is of --dataset audioset, csv, "),
        ("--dataset audioset --segments T --class-labels V --ontology V", "--class-labels does not go with --ontology"),
    ],
)
def test_an_option_that_does_not_fit_is_refused_before_anything_is_written(tmp_path, monkeypatch, words, said):
    (tmp_path / "T").write_text("path,labels\na.wav,dragon\n")
    (tmp_path / "V").write_text("index,mid,display_name\n0,/m/1,dog\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        run_main(monkeypatch, *words.split(), "--out", "out")
    assert said in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["T", "V"]


def test_slices_with_spaces_and_outputs_that_are_no_place(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    for words, said in (
        (("--slice", "1 / 2", "--out", tmp_path / "out"), "'1 / 2' is not I/N"),
        (("--out", ""), "--out = '' names no path"),
        (("--out", tmp_path / "file"), "is no directory"),
        (("--out", tmp_path / "out", "--root", ""), "--audio-root = '' names no path"),
    ):
        with pytest.raises(UserError) as caught:
            run_main(monkeypatch, "--dataset", "synth", *words)
        assert said in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_tilde_is_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    words = ("--dataset", "synth", "--limit", "4", "--seconds", "0.1", "--distributor", "inline", "--out=~/sh")
    assert run_main(monkeypatch, *words, "--root", "~/source") == 0
    assert {path.name for path in tmp_path.iterdir()} == {"home"}
    assert load_manifest(tmp_path / "home" / "sh").splits["train"].clips == 4
    before = (tmp_path / "home" / "source" / "audio" / "clip00000.flac").stat().st_mtime_ns
    assert run_main(monkeypatch, *words, "--root", "~/source") == 0  # the sources stay what they were
    assert (tmp_path / "home" / "source" / "audio" / "clip00000.flac").stat().st_mtime_ns == before


def test_generated_audio_replaces_no_table_of_others(tmp_path, monkeypatch):
    (tmp_path / "table.csv").write_text("path,labels\nmine.wav,dog\n")
    with pytest.raises(UserError, match=r"table\.csv: is there and was not generated"):
        run_main(monkeypatch, "--dataset", "synth", "--root", tmp_path, "--out", tmp_path / "out")
    assert (tmp_path / "table.csv").read_text() == "path,labels\nmine.wav,dog\n"
    assert not (tmp_path / "audio").exists()


def test_a_limit_leaves_whole_splits_out(tmp_path, monkeypatch):
    """A split of which only missing clips would be left is none."""
    for number in range(3):
        soundfile.write(tmp_path / f"{number}.wav", np.full(1600, 0.1), 16000)
    rows = "0.wav,a,train\n1.wav,a,train\n2.wav,a,eval\n9.wav,a,eval\n"
    (tmp_path / "t.csv").write_text("path,labels,split\n" + rows)
    words = ("--dataset", "csv", "--table", tmp_path / "t.csv", "--seconds", "0.1", "--distributor", "inline",
             "--out")  # fmt: skip
    assert run_main(monkeypatch, *words, tmp_path / "out", "--limit", "2") == 0
    assert {name: split.clips for name, split in load_manifest(tmp_path / "out").splits.items()} == {"train": 2}
    assert run_main(monkeypatch, *words, tmp_path / "all") == 0
    splits = load_manifest(tmp_path / "all").splits
    assert {name: (split.clips, split.listed) for name, split in splits.items()} == {"train": (2, 2), "eval": (1, 2)}
