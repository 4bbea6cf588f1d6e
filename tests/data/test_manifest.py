"""Shards that are not what this release reads are refused in one line."""

import errno
import json
import os
import shutil
from dataclasses import replace

import pytest

from pipeline.config import DataConfig
from pipeline.data import manifest, storage
from pipeline.data.corpus import load_corpus
from pipeline.data.manifest import load_manifest
from pipeline.data.spec import DataSpec
from pipeline.errors import UserError, exit_status
from tests.helpers import edit_manifest
from tests.stores import FlakyServer


@pytest.fixture
def edited(shards, tmp_path):
    def edit(**changes):
        shutil.copy(shards / "manifest.json", tmp_path)
        content = json.loads((tmp_path / "manifest.json").read_text())
        for key, value in changes.items():
            content[key] = content[key] | value if isinstance(value, dict) else value
        (tmp_path / "manifest.json").write_text(json.dumps(content))
        return tmp_path

    return edit


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"version": 2}, "format version 2, this release reads 1"),
        ({"format": "other"}, "format is not 'craft-shards'"),
        ({"surprise": 1}, "surprise"),
        ({"dataset": "edited"}, "digest does not fit"),
    ],
)
def test_other_manifests_are_refused(edited, changes, said):
    with pytest.raises(UserError) as error:
        load_manifest(edited(**changes))
    assert said in str(error.value)
    assert "manifest.json" in str(error.value)


DEEP = "[" * 100_000


def at(content, *path):
    """The part of a manifest at a path of keys."""
    for key in path:
        content = content[key]
    return content


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: at(m, "audio").update(sample_rate=1 << 40), "audio.sample_rate"),
        (lambda m: at(m, "audio").update(samples=10**9, seconds=62500.0), "audio.samples"),
        (lambda m: at(m, "audio").update(samples=1), "1 samples are not 0.5 s at 16000 Hz"),
        (lambda m: at(m, "audio").update(seconds=1e308), "audio.seconds"),
        (lambda m: at(m, "audio").update(seconds=float("inf")), "Infinity is no number"),
        (lambda m: at(m, "audio").update(encoding="pickle"), "audio.encoding"),
        (lambda m: at(m, "fbank").update(mel_bins=10**9), "fbank.mel_bins"),
        (lambda m: at(m, "fbank").update(mel_bins=-1), "fbank.mel_bins"),
        (lambda m: at(m, "fbank").update(frames=47), "fbank.frames: 47, the audio has 48"),
        (lambda m: at(m, "splits", "train").update(fbank_std=0.0), "splits.train.fbank_std"),
        (lambda m: at(m, "splits", "train").update(fbank_std=-1.0), "splits.train.fbank_std"),
        (lambda m: at(m, "splits", "train").update(fbank_mean=float("nan")), "NaN is no number"),
        (lambda m: at(m, "splits", "train").update(clips=10**9), "'train' has 1000000000 clips in"),
        (lambda m: at(m, "splits", "train").update(clips=-1), "splits.train.clips"),
        (lambda m: at(m, "splits", "train").update(silent=10**6), "1000000 silent clips of"),
        (lambda m: at(m, "splits", "train", "class_clips").pop(), "class_clips has 12 counts for 13 labels"),
        (lambda m: at(m, "splits").update({"../up": at(m, "splits", "eval")}), "splits.../up"),
        (lambda m: at(m, "shards", 0).update(name="../train-000000.tar"), "shards.0.name"),
        (lambda m: at(m, "shards", 0).update(name="/etc/train-000000.tar"), "shards.0.name"),
        (lambda m: at(m, "shards", 0).update(name="http://127.0.0.1/x.tar"), "shards.0.name"),
        (lambda m: at(m, "shards", 0).update(name="train.tar\n"), "shards.0.name"),
        (lambda m: at(m, "shards", 0).update(sha256="../../escaped" + "0" * 51), "shards.0.sha256"),
        (lambda m: at(m, "shards", 0).update(size=1 << 60), "shards.0.size"),
        (lambda m: at(m, "shards", 0).update(size=100), "of 100 bytes cannot hold"),
        (lambda m: at(m, "shards", 0).update(clips=10**9), "shards.0.clips"),
        (lambda m: at(m, "shards", 0).update(split="test"), "is of split 'test', which splits does not have"),
        (lambda m: at(m, "shards").append(at(m, "shards", 0)), "train-000000.tar is there 2 times"),
        (lambda m: at(m, "index").update(size=-1), "index.size"),
        (lambda m: at(m, "options").update(x={"a": json.loads("[" * 900 + "]" * 900)}), "options: "),
    ],
)
def test_values_that_cannot_be_are_refused_in_one_line_though_the_digest_fits(shards, tmp_path, change, said):
    shutil.copy(shards / "manifest.json", tmp_path)
    edit_manifest(tmp_path, change)
    with pytest.raises(UserError) as error:
        load_manifest(tmp_path)
    assert said in str(error.value)
    assert "manifest.json" in str(error.value)
    assert len(str(error.value)) < 600


@pytest.mark.parametrize(
    "content", [DEEP, '{"format": ' + DEEP, "[1e999]", "9" * 5000, "\x00", '{"format": "craft-shards", "version": {}}']
)
def test_text_that_is_no_manifest_is_refused(tmp_path, content):
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(UserError, match=r"manifest\.json: "):
        load_manifest(tmp_path)


def test_a_manifest_without_end_is_not_read(tmp_path):
    with (tmp_path / "manifest.json").open("wb") as file:
        file.truncate(1 << 40)  # sparse
    with pytest.raises(UserError, match="at most 134217728 were expected"):
        load_manifest(tmp_path)


@pytest.mark.parametrize("what", ["manifest.json", "index.parquet"])
@pytest.mark.parametrize("code", [errno.ENOTCONN, errno.ESTALE, errno.EACCES, errno.ENOENT])
def test_a_mount_that_is_away_is_a_fault_that_may_pass(shards, monkeypatch, what, code):
    """So `--max-restarts` tries again; what is not there, or not for us, is bad input."""
    index, real = load_manifest(shards).index, manifest.open_regular

    def lost(path):
        raise OSError(code, os.strerror(code), str(path))

    for module in (manifest, storage):
        monkeypatch.setattr(module, "open_regular", lambda path: (lost if str(path).endswith(what) else real)(path))
    read = {"manifest.json": lambda: load_manifest(shards),
            "index.parquet": lambda: manifest.open_checked(shards, "index.parquet", index)}  # fmt: skip
    with pytest.raises(UserError, match=rf"{what}: {os.strerror(code)}; ") as error:
        read[what]()
    assert exit_status(error.value) == (75 if code in (errno.ENOTCONN, errno.ESTALE) else 2)


def test_a_store_out_of_reach_is_a_fault_that_may_pass(shards, monkeypatch):
    monkeypatch.setattr(storage, "FIRST_WAIT", 0.001)
    served = FlakyServer(shards)
    with pytest.raises(UserError, match="not-there") as error:
        load_manifest(f"{served.url}/not-there")
    assert exit_status(error.value) == 2
    served.close()
    with pytest.raises(UserError, match=r"manifest.json: .*tries.; when it can be reached again") as error:
        load_manifest(served.url)
    assert exit_status(error.value) == 75


def test_no_manifest_and_no_json(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        load_manifest(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        load_manifest(tmp_path)


def test_another_sample_rate_names_the_remedy(shards):
    data = DataConfig(shards=str(shards))
    corpus = load_corpus(data)
    (member,) = corpus.members
    audio = member.manifest.audio.model_copy(update={"sample_rate": 22050})
    other = member._replace(manifest=member.manifest.model_copy(update={"audio": audio}))
    with pytest.raises(UserError, match=r"22050 Hz, the model reads 16000; rebuild the shards with --sample-rate"):
        DataSpec.of(replace(corpus, members=[other]), data)
