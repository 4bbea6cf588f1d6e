"""Every form in which people hold audio builds from one command; what could be two things, or nothing, is refused."""

import io
import json
import logging
import shutil
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import boto3
import h5py
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config import DataConfig
from pipeline.data.loader import Loader
from pipeline.data.manifest import load_index, load_manifest
from pipeline.errors import UserError
from shard_tools import build_shards
from shard_tools.build import build
from shard_tools.forms import look
from shard_tools.forms.entries import Asked, split_of
from shard_tools.repair import compare, repair
from shard_tools.verify_shards import examine, verify
from tests.helpers import digests, options
from tests.shard_tools.containers import recordings
from tests.shard_tools.test_build import command
from tests.stores import hub_server

OPTIONS = options(1.5, 4)  # DCASE's events begin before that
(WAV,) = recordings(1)
NEEDS_SEGMENTS = ("hf_old_tars", "zips", "panns")
NEEDS_VOCABULARY = (*NEEDS_SEGMENTS, "wds", "panns_h5")


@pytest.fixture(scope="module")
def layouts(shared, tmp_path_factory):
    """Imitations of all forms, and what a correct reader finds in each."""
    out = tmp_path_factory.mktemp("layouts")
    script = shared / "data" / "layouts" / "make.py"
    subprocess.run([sys.executable, script, out], check=True, capture_output=True)
    lines = (shared / "data/audioset/balanced_train_segments.csv").read_text().splitlines(keepends=True)
    six = [line.split(", ", 3) for line in lines if not line.startswith("#")][:6]
    # Of the recordings' length, 5 s: a shorter file is not taken for a segment of 10 s.
    rows = [f"{name}, {start}, {float(start) + 5}, {labels}" for name, start, _, labels in six]
    (out / "balanced_train_segments.csv").write_text("".join(rows))
    shutil.copy(shared / "data/audioset/class_labels_indices.csv", out)
    return out


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CRAFT_CACHE", str(tmp_path / "cache"))


def catalog(*words: object):
    """As build_shards.py reads it, from its command line."""
    line = build_shards.parser()
    args = line.parse_args([*map(str, words), "--out", "/dev/null/x"])
    if args.dataset == "auto":
        args.dataset = "audioset" if args.segments else look.find(build_shards._asked(args))
    build_shards._fit(args, {name for name, value in vars(args).items() if value != line.get_default(name)})
    return build_shards.read_catalog(args)


def words_for(layouts: Path, name: str) -> list[object]:
    words: list[object] = ["--table" if name.endswith(".csv") else "--root", layouts / name]
    if name in NEEDS_SEGMENTS:
        words += ["--segments", layouts / "balanced_train_segments.csv"]
    if name in NEEDS_VOCABULARY:
        words += ["--class-labels", layouts / "class_labels_indices.csv"]
    return words


NAMES = ["hf_parquet", "hf_old_tars", "wds", "zips", "panns", "panns_h5", "ast_json", "fsd50k", "vggsound",
         "urbansound8k", "speech_commands", "audiofolder_metadata", "audiofolder_classes", "nemo", "kaldi", "dcase",
         "clap", "unlabelled", "unlabelled.csv"]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_layout_builds_with_what_a_correct_reader_finds(layouts, tmp_path, name):
    expected = json.loads((layouts / "EXPECTED.json").read_text())
    assert sorted(expected) == sorted(NAMES)
    wanted = expected[name]
    build(catalog(*words_for(layouts, name)), tmp_path, OPTIONS, 1, engine="inline")
    manifest, rows = load_manifest(tmp_path), load_index(tmp_path).to_pylist()
    assert len(rows) == wanted["clips"]
    assert (tmp_path / "failures.jsonl").read_text() == ""
    splits = Counter(row["split"] for row in rows)
    if isinstance(wanted.get("splits"), dict):
        assert splits == wanted["splits"]
    elif "splits" in wanted:
        assert sorted(splits) == wanted["splits"]
    if "folds" in wanted:
        assert Counter(str(row["fold"]) for row in rows) == wanted["folds"]
    for row in rows:
        assert str(layouts) not in row["source"]
    if "labels_by_clip" in wanted:
        ids = [label.id for label in manifest.labels]
        found = {row["key"].rpartition("_")[0] if name in NEEDS_SEGMENTS else row["key"]:
                 sorted(ids[label] for label in row["labels"]) for row in rows}  # fmt: skip
        assert found == {key: sorted(labels) for key, labels in wanted["labels_by_clip"].items()}
    if "labels" in wanted:
        assert sorted(label.id if name == "kaldi" else label.name.replace(" ", "_") if "_" in str(wanted["labels"])
                      else label.name for label in manifest.labels) == wanted["labels"]  # fmt: skip
        used = {label for row in rows for label in row["labels"]}
        assert len(used) == len(wanted["labels"])
    assert manifest.unlabelled is (True if not manifest.labels else None)
    assert ("unlabelled" in json.loads((tmp_path / "manifest.json").read_text())) is name.startswith("unlabelled")


@pytest.mark.parametrize("name", ["hf_parquet", "wds", "zips"])
def test_a_layout_in_s3_gives_the_same_shards(layouts, tmp_path, s3, name):
    client = boto3.client("s3")
    bucket = f"layout-{name.replace('_', '-')}"
    client.create_bucket(Bucket=bucket)
    for path in sorted((layouts / name).rglob("*")):
        if path.is_file():
            client.upload_file(str(path), bucket, str(path.relative_to(layouts / name)))
    words = words_for(layouts, name)
    build(catalog(*words), tmp_path / "disk", OPTIONS, 1, engine="inline")
    words[1] = f"s3://{bucket}"
    build(catalog(*words), tmp_path / "store", OPTIONS, 1, engine="inline")
    assert digests(tmp_path / "disk") == digests(tmp_path / "store")
    # A restart compares the container's stamp, and finds by name what a repair needs.
    assert list(compare(tmp_path / "store", f"s3://{bucket}", 1)) == []


def test_what_is_found_is_said_in_one_line(layouts, shared, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    forms = {"hf_parquet": "parquet", "wds": "wds", "clap": "wds", "panns_h5": "hdf5", "ast_json": "ast_json",
             "fsd50k": "fsd50k", "vggsound": "vggsound", "urbansound8k": "urbansound8k", "kaldi": "kaldi",
             "speech_commands": "speech_commands", "audiofolder_metadata": "audiofolder", "dcase": "dcase",
             "audiofolder_classes": "audiofolder", "nemo": "nemo", "unlabelled": "unlabelled"}  # fmt: skip
    for name, form in forms.items():
        caplog.clear()
        assert look.find(Asked(layouts / name)) == form
        (said,) = [record.message for record in caplog.records]
        assert said.startswith(f"{layouts / name}: read as --dataset {form}: ")
    assert look.find(Asked(shared / "data" / "esc50")) == "esc50"
    (tmp_path / "0.wav").write_bytes(WAV)
    (tmp_path / "list.tsv").write_text("path\tlabels\n0.wav\tdog\n")
    assert look.find(Asked(tmp_path)) == "csv"
    assert [clip.path for clip in catalog("--root", tmp_path).clips] == [str(tmp_path / "0.wav")]
    for name in ("dog", "cat"):
        (tmp_path / "folders" / name).mkdir(parents=True)
        (tmp_path / "folders" / name / "0.wav").write_bytes(WAV)
    assert look.find(Asked(tmp_path / "folders")) == "folder"
    for table, form in (("nemo/manifest.json", "nemo"), ("ast_json/bal.json", "ast_json"), ("dcase/weak.tsv", "dcase"),
                        ("vggsound/vggsound.csv", "vggsound"), ("unlabelled.csv", "unlabelled"),
                        ("audiofolder_metadata/train/metadata.csv", "audiofolder")):  # fmt: skip
        assert look.find(Asked(layouts, layouts / table)) == form


def test_two_readings_are_refused_and_both_are_named(layouts, tmp_path):
    def refused(root: Path, *words: str) -> None:
        with pytest.raises(UserError) as caught:
            look.find(Asked(root))
        for word in words:
            assert word in str(caught.value)

    for name in ("hf_old_tars", "zips"):
        refused(layouts / name, "--dataset audioset (with --segments CSV", "--dataset unlabelled (tars or zips")
    refused(layouts / "panns", "--dataset folder", "--dataset unlabelled", "--dataset audioset (with --segments")
    shutil.copytree(layouts / "fsd50k", tmp_path / "two")
    (tmp_path / "two" / "metadata.csv").write_text("file_name,label\nx.wav,dog\n")
    refused(tmp_path / "two", "read as --dataset fsd50k (FSD50K.ground_truth/dev.csv)", "--dataset audiofolder")
    shutil.copytree(layouts / "unlabelled", tmp_path / "tables")
    for name in "ab":
        (tmp_path / "tables" / f"{name}.csv").write_text("path,labels\nx.wav,dog\n")
    refused(tmp_path / "tables", "2 tables, such as a.csv and b.csv", "--table")


def test_nothing_found_says_what_is_there(layouts, tmp_path):
    (tmp_path / "x").mkdir()
    with pytest.raises(UserError, match="no form of data set that is known: no files are there"):
        look.find(Asked(tmp_path / "x"))
    for number in range(3):
        (tmp_path / "x" / f"{number}.tar.gz").write_bytes(b"\x1f\x8b")
    (tmp_path / "x" / "a.parquet.incomplete").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"3 \.gz, 1 \.incomplete; 0\.tar\.gz is compressed as a whole.*unpack it.*"
                                        r"a\.parquet\.incomplete is an unfinished download"):  # fmt: skip
        look.find(Asked(tmp_path / "x"))
    with pytest.raises(UserError, match=r"no clips of split 'test'; it has train: files there: 1 \.parquet"):
        catalog("--root", layouts / "hf_parquet", "--split", "test")
    assert catalog("--root", layouts / "fsd50k", "--split", "val").splits == ["val"]
    done = command("--root", tmp_path / "x", "--out", tmp_path / "out")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 2  # what is left out, and why it ends
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_events_are_kept_and_a_clip_has_the_labels_of_all_tables(layouts, tmp_path):
    found = catalog("--root", layouts / "dcase")
    assert [label.name for label in found.labels] == ["Dog", "Speech"]
    assert {clip.labels for clip in found.clips} == {(0, 1)}
    assert {clip.events for clip in found.clips} == {((0.5, 2.0, 1), (1.0, 4.0, 0))}
    build(found, tmp_path, OPTIONS, 1, engine="inline")
    with tarfile.open(tmp_path / "train-000000.tar") as tar:
        about = json.loads(tar.extractfile(next(member for member in tar if member.name.endswith("json"))).read())
    assert about["events"] == [{"onset": 0.5, "offset": 2.0, "label": 1}, {"onset": 1.0, "offset": 4.0, "label": 0}]
    root = str(layouts / "dcase")
    assert list(compare(tmp_path, root, 1)) == []
    whole = (tmp_path / "train-000000.tar").read_bytes()
    (tmp_path / "train-000000.tar").write_bytes(whole[:5000] + b"x" + whole[5001:])
    assert list(repair(tmp_path, examine(tmp_path, 1), root, 1)) == ["train-000000.tar: built again, as it was"]


def wds(path: Path, *clips: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number, about in enumerate(clips):
            for ending, content in (("wav", WAV), ("json", json.dumps(about).encode())):
                info = tarfile.TarInfo(f"{number}.{ending}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def test_labels_are_numbers_names_or_ids(layouts, tmp_path):
    vocabulary = tmp_path / "v.csv"
    vocabulary.write_text("index,mid,display_name\n0,/m/a,Dog\n1,/m/b,Cat\n")
    wds(tmp_path / "r" / "train" / "0.tar", {"label": 1}, {"label": ["Dog", "/m/b"]}, {"tag": "Cat"}, {"labels": []})
    found = catalog("--root", tmp_path / "r", "--class-labels", vocabulary)
    assert [clip.labels for clip in found.clips] == [(1,), (0, 1), (1,), ()]
    with pytest.raises(UserError, match="labels are numbers, and nothing says of which classes; give --class-labels"):
        catalog("--root", tmp_path / "r")
    names = {"info": {"features": {"label": {"names": ["dog", "cat"], "_type": "ClassLabel"}}}}
    rows = pa.table({"audio": [{"bytes": WAV, "path": "a.wav"}] * 2, "label": [1, 0]})
    (tmp_path / "p").mkdir()
    pq.write_table(rows.replace_schema_metadata({"huggingface": json.dumps(names)}),
                   tmp_path / "p" / "test-00000-of-00001.parquet")  # fmt: skip
    hub = catalog("--root", tmp_path / "p")
    assert [label.name for label in hub.labels] == ["cat", "dog"]
    assert [clip.labels for clip in hub.clips] == [(0,), (1,)]
    assert hub.splits == ["test"]
    pq.write_table(rows, tmp_path / "p" / "test-00000-of-00001.parquet")
    with pytest.raises(UserError, match="its labels are numbers, and nothing says of which classes"):
        catalog("--root", tmp_path / "p")
    with pytest.raises(UserError, match=r"target \(6, \d+\) for 6 clips of 2 classes; give the vocabulary"):
        catalog("--root", layouts / "panns_h5", "--class-labels", vocabulary)
    with pytest.raises(UserError, match="give --class-labels CSV"):
        catalog("--root", layouts / "panns_h5")


def test_tables_of_json_lines_and_parquet(tmp_path):
    rows = [{"path": f"{number}.wav", "labels": labels, "split": split, "fold": 1, "start": 0.5}
            for number, labels, split in ((0, ["a", "b"], "train"), (1, "b", "eval"), (2, "a;b", "train"))]  # fmt: skip
    for number in (0, 1):
        (tmp_path / f"{number}.wav").write_bytes(WAV)
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = [row | {"labels": labels} for row, labels in zip(rows, ("a;b", "b", "a;b"), strict=True)]
    pq.write_table(pa.Table.from_pylist(texts), tmp_path / "t.parquet")
    for table in ("t.jsonl", "t.parquet"):
        found = catalog("--table", tmp_path / table)
        assert [(clip.key, clip.labels, clip.split, clip.fold, clip.start) for clip in found.clips] == [
            (found.clips[0].key, (0, 1), "train", 1, 0.5), (found.clips[1].key, (1,), "eval", 1, 0.5)
        ]  # fmt: skip
        assert [failure.id for failure in found.missing] == ["2.wav-0.5"]
    (tmp_path / "t.jsonl").write_text('{"path": "0.wav", "labels": ["a"]}\n{"path"\n')
    with pytest.raises(UserError, match=r"t\.jsonl:2: no JSON"):
        catalog("--table", tmp_path / "t.jsonl", "--dataset", "csv")
    (tmp_path / "t.jsonl").write_text('{"path": "0.wav", "labels": ["a"]}\n{"path": "1.wav"}\n')
    with pytest.raises(UserError, match=r"t\.jsonl:2: no 'labels'"):
        catalog("--table", tmp_path / "t.jsonl", "--dataset", "csv")


def test_bad_input_is_one_line(layouts, tmp_path, caplog):
    def refused(match: str, *words: object) -> None:
        with pytest.raises(UserError, match=match):
            catalog(*words)

    # No column of audio, none of labels.
    (tmp_path / "p").mkdir()
    pq.write_table(pa.table({"x": [1]}), tmp_path / "p" / "a.parquet")
    refused(r"no form of data set that is known: files there: 1 \.parquet", "--root", tmp_path / "p")
    refused(r"a\.parquet: no column of audio \(has x\)", "--root", tmp_path / "p", "--dataset", "parquet")
    pq.write_table(pa.table({"audio": [{"bytes": WAV, "path": "a"}]}), tmp_path / "p" / "a.parquet")
    refused(r"a\.parquet: no column of labels \(has audio\).*--dataset unlabelled", "--root", tmp_path / "p")
    assert len(catalog("--root", tmp_path / "p", "--dataset", "unlabelled").clips) == 1
    # Of several files: one id twice may be two clips, so both are taken; with other labels it is refused.
    wds(tmp_path / "w" / "train-0.tar", {"id": "x", "label": "dog"})
    wds(tmp_path / "w" / "train-1.tar", {"id": "x", "label": "dog"})
    assert [clip.id for clip in catalog("--root", tmp_path / "w").clips] == ["x", "train-1.tar::0.wav"]
    assert "1 clips have the id of another one" in caplog.text
    wds(tmp_path / "w" / "train-1.tar", {"id": "x", "label": "cat"})
    refused(r"train-1\.tar::0\.wav: 'x' came before with another segment, file, fold or other labels", "--root",
            tmp_path / "w")  # fmt: skip
    wds(tmp_path / "w" / "train-1.tar", {"text": "a dog barks"})
    refused(r"0\.wav: no label \(its JSON has text\).*--dataset unlabelled", "--root", tmp_path / "w")
    assert len(catalog("--root", tmp_path / "w", "--dataset", "unlabelled").clips) == 2
    # Lists that are malformed.
    (tmp_path / "scp").mkdir()
    (tmp_path / "scp" / "wav.scp").write_text("a flac -cd a.flac |\n")
    (tmp_path / "scp" / "text").write_text("a x\n")
    refused(r"wav\.scp:1: .* is a command, not a path", "--root", tmp_path / "scp")
    (tmp_path / "n.json").write_text('{"audio_filepath": "a.wav", "text": "hello"}\n')
    refused(r"n\.json:1: no label \(it has audio_filepath, text\)", "--table", tmp_path / "n.json")
    (tmp_path / "a.json").write_text('{"data": [{"labels": "x"}]}')
    refused(r"a\.json: item 1 of data has no 'wav'", "--table", tmp_path / "a.json")
    (tmp_path / "a.json").write_text('{"data": [{"wav": "none.wav", "labels": "x"}]}')
    refused(r"0 of 1 listed clips of split 'train' have a file, such as 'none\.wav'", "--table", tmp_path / "a.json")
    shutil.copytree(layouts / "panns_h5", tmp_path / "h")
    with h5py.File(tmp_path / "h" / "hdf5s/waveforms/balanced_train.h5", "a") as file:
        del file.attrs["sample_rate"]
    vocabulary = ["--class-labels", layouts / "class_labels_indices.csv"]
    refused("does not say its sample rate.*--source-rate", "--root", tmp_path / "h", *vocabulary)
    with h5py.File(tmp_path / "h" / "hdf5s" / "index.h5", "w") as file:  # as PANNs has beside them
        file["audio_name"] = [b"x"]
    found = catalog("--root", tmp_path / "h", *vocabulary, "--source-rate", 16000)
    assert found.clips[3].path.endswith("::3@16000")
    assert "1 HDF5 files without waveforms are left out, such as " in caplog.text


def test_git_lfs_pointers_are_named(layouts, tmp_path):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 99\n"
    shutil.copytree(layouts / "unlabelled", tmp_path / "u")
    first = sorted((tmp_path / "u").iterdir())[0]
    first.write_text(pointer)
    build(catalog("--root", tmp_path / "u"), tmp_path / "out", OPTIONS, 1, engine="inline")
    (line,) = [json.loads(line) for line in (tmp_path / "out" / "failures.jsonl").read_text().splitlines()]
    assert (line["path"], line["reason"]) == (
        first.name, "undecodable: a pointer of Git-LFS, not audio; run 'git lfs pull' where it was cloned"
    )  # fmt: skip
    (tmp_path / "t.csv").write_text(pointer)
    with pytest.raises(UserError, match=r"t\.csv:1: a pointer of Git-LFS, not the file; run 'git lfs pull'"):
        catalog("--dataset", "csv", "--table", tmp_path / "t.csv")
    for kind in ("parquet", "tar", "zip"):
        (tmp_path / kind).mkdir()
        (tmp_path / kind / f"a.{kind}").write_text(pointer)
        with pytest.raises(UserError, match="is a pointer of Git-LFS, not the file; run 'git lfs pull'"):
            look.find(Asked(tmp_path / kind))


@pytest.mark.parametrize(
    ("path", "split"),
    [
        ("data/bal_train/00.parquet", "train"), ("data/unbal_train000.tar", "unbalanced"), ("eval/00.parquet", "eval"),
        ("20k/test/shard-00000.tar", "test"), ("hdf5s/unbalanced_train_part03.h5", "unbalanced"), ("x/shard-0.tar", ""),
        ("train-00000-of-00004.parquet", "train"), ("data/validation-00000-of-00001.parquet", "validation"),
    ],
)  # fmt: skip
def test_the_split_that_a_name_tells(path, split):
    assert split_of(path) == split


def test_the_hub_s_parquet_is_read_in_place(layouts, tmp_path):
    """In a process of its own: the hub's client reads its address when it is imported."""
    with hub_server(layouts / "hf_parquet") as (url, environment), pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        words = ["--seconds", 1.5, "--clips-per-shard", 4, "--workers", 1]
        done = command("--root", url, "--out", tmp_path / "hub", *words)
        assert done.returncode == 0, done.stderr
        assert f"{url}: read as --dataset parquet: data/bal_train/00.parquet with a column audio" in done.stderr
    build(catalog("--root", layouts / "hf_parquet"), tmp_path / "disk", OPTIONS, 1, engine="inline")
    assert digests(tmp_path / "hub") == digests(tmp_path / "disk")


def test_clips_without_labels_are_loaded(layouts, tmp_path):
    build(catalog("--root", layouts / "unlabelled"), tmp_path, OPTIONS, 1, engine="inline")
    data = DataConfig(shards=str(tmp_path), workers=0)
    with Loader(data, batch_size=4) as loader:
        batch = next(loader.batches())
        assert len(set(loader.keys(batch.row.tolist()))) == 4
        assert batch.targets.shape == (4, 0)
        assert batch.waveform.abs().sum() > 0
    assert verify(tmp_path, 1) == []
