"""inspect_shards.py on real shards: its numbers, and a page that needs no network."""

import base64
import io
import json
import os
import re
import resource
import shutil
import subprocess
import sys

import boto3
import numpy as np
import pyarrow as pa
import pytest
import soundfile
from PIL import Image

from pipeline.data.manifest import INDEX_SCHEMA, load_index, load_manifest
from pipeline.data.storage import location
from pipeline.errors import UserError
from shard_tools import catalogs, inspect_shards
from shard_tools.build import build
from shard_tools.inspect_shards import page, parser, report
from shard_tools.survey import find, survey
from tests.helpers import options, write_index
from tests.ranks import run_script
from tests.stores import upload

RATE, SECONDS = 16000, 0.5
FORMULA = r"$\frac$ and $x_"  # which matplotlib would refuse


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """A tone, a clipped tone, silence, half a clip, a text that is no audio, and a file that is not there."""
    folder = tmp_path_factory.mktemp("inspect")
    time = np.arange(round(RATE * SECONDS)) / RATE
    tone = np.sin(2 * np.pi * 440 * time)
    sounds = {"tone": 0.1 * tone, "clipped": np.clip(4 * tone, -1, 1), "silent": 0 * tone, "half": 0.1 * tone[::2]}
    for name, samples in sounds.items():
        soundfile.write(folder / f"{name}.wav", samples, RATE)
    (folder / "text.wav").write_text("no audio")
    rows = [f"{name}.wav,{'<b>&' if name == 'tone' else FORMULA}" for name in [*sounds, "text", "gone"]]
    (folder / "table.csv").write_text("path,labels\n" + "\n".join(rows) + "\n")
    build(
        catalogs.table(folder, folder / "table.csv", None, None),
        folder / "out",
        options(SECONDS, 2),
        1,
        engine="inline",
    )
    return folder / "out"


def inspect(*words: object) -> subprocess.CompletedProcess[str]:
    return run_script("shard_tools/inspect_shards.py", *words)


def embedded(page: str, kind: str) -> list[bytes]:
    return [base64.b64decode(text) for text in re.findall(rf'src="data:{kind};base64,([^"]+)"', page)]


def test_the_numbers_are_those_of_the_clips(shards):
    found = survey(shards, 100, 0, 2)
    rows = load_index(shards)["key"].to_pylist()
    level = dict(zip(rows, found.levels, strict=True))
    assert {name for name, one in level.items() if one.clipped} == {"clipped"}
    assert {name for name, one in level.items() if one.quiet == 1} == {"silent"}
    assert level["tone"].peak == pytest.approx(-20, abs=0.05)
    assert level["tone"].rms == pytest.approx(-23.01, abs=0.05)
    assert found.durations["train"].tolist() == [0] * 25 + [1] + [0] * 23 + [3]
    assert found.padded["train"] == 1
    assert dict(found.failures["train"]) == {"undecodable": 1, "missing": 1}
    assert len(found.sounds) == 2


def test_a_sample_is_a_function_of_its_seed(shards):
    def keys(seed: int) -> list[str]:
        found = survey(shards, 2, seed, 2)
        assert len(found.levels) == 2
        return [sound.row["key"] for sound in found.sounds]

    assert keys(0) == keys(0)
    assert len({tuple(keys(seed)) for seed in range(8)}) > 1


def test_the_page_opens_without_a_network_and_its_sound_is_the_clips(shards, tmp_path):
    done = inspect(shards, "--html", tmp_path / "all.html", "--examples", 10)
    assert done.returncode == 0, done.stderr
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    for said in (
        "split clips listed found shards hours padded digital silence", "train 4 6 66.7% 3 0.00 1 1",
        f"train 2 2 {FORMULA} 3, <b>& 1 <b>& 1, {FORMULA} 3 2 0.88", "missing train 1", "clipped clips 25.0%",
        f"0.45 to 0.5 3 {'#' * 40}", "-30 to -20 2 ########################################",
    ):  # fmt: skip
        assert said in lines, said
    page = (tmp_path / "all.html").read_text(encoding="utf-8")
    assert "http" not in re.sub(r"base64,[^\"]+", "", page)
    references = re.findall(r'(?:src|href|url)\s*[=(]\s*["\']?([^"\')> ]+)', page)
    assert references
    assert all(reference.startswith("data:") for reference in references)
    assert "&lt;b&gt;&amp;" in page
    assert "<b>&" not in page
    pictures = embedded(page, "image/png")
    assert len(pictures) == 3 + 4  # durations, classes, levels; each clip
    for picture in pictures:
        assert len(np.unique(np.asarray(Image.open(io.BytesIO(picture)).convert("L")))) > 20
    manifest = load_manifest(shards)
    stored = {sound.row["key"]: sound.waveform for key in ("tone", "half") for sound in find(shards, manifest, key)}
    heard = [soundfile.read(io.BytesIO(wav), dtype="int16") for wav in embedded(page, "audio/wav")]
    assert len(heard) == 4
    assert {rate for _, rate in heard} == {RATE}
    for waveform in stored.values():
        assert any(np.array_equal(waveform, samples) for samples, _ in heard)


def test_one_clip_and_none(shards, tmp_path):
    done = inspect(shards, "tone", "--html", tmp_path / "one.html")
    assert done.returncode == 0, done.stderr
    assert "labels: <b>&" in done.stdout
    assert '"decoder": ' in (tmp_path / "one.html").read_text().replace("&#34;", '"')
    for name in ("text.wav", "text"):  # the file's, and the clip's key
        with pytest.raises(UserError, match=f"clip '{name}': it is not in the shards: undecodable"):
            find(shards, load_manifest(shards), name)
    with pytest.raises(UserError, match="no such key"):
        find(shards, load_manifest(shards), "nothing")


def test_a_disk_that_fills_leaves_the_page_that_was_there(shards, tmp_path, monkeypatch):
    page = tmp_path / "all.html"
    page.write_text("of before")
    monkeypatch.setattr(inspect_shards, "page", lambda *_: "x" * (1 << 20))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    try:
        with pytest.raises(UserError, match=r"--html .*all\.html: File too large"):
            run_main(monkeypatch, shards, "tone", "--html", page)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["all.html"]
    assert page.read_text() == "of before"
    monkeypatch.setattr(inspect_shards, "find", None)  # a place that cannot be written is refused before the work
    with pytest.raises(UserError, match=r"--html .*: is a directory"):
        run_main(monkeypatch, shards, "tone", "--html", tmp_path)


def run_main(monkeypatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["inspect_shards.py", *map(str, words)])
    return inspect_shards.main()


def test_the_ids_of_splits(shards, tmp_path, monkeypatch, capsys):
    """Sorted, each once; those of every split without --split."""
    rows = [f"tone.wav,x,{split},{key}" for split in ("train", "eval", "more") for key in ("b", "a", split)]
    (shards.parent / "splits.csv").write_text("\n".join(["path,labels,split,key", *rows]))
    catalog = catalogs.table(shards.parent, shards.parent / "splits.csv", None, None)
    build(catalog, tmp_path / "out", options(SECONDS, 2), 1, engine="inline")
    for words, keys in (
        ([], ["a", "b", "eval", "more", "train"]),
        (["--split", "eval"], ["a", "b", "eval"]),
        (["--split", "more,eval"], ["a", "b", "eval", "more"]),
    ):
        assert run_main(monkeypatch, tmp_path / "out", "--ids-out", tmp_path / "new" / "ids.txt", *words) == 0
        assert (tmp_path / "new" / "ids.txt").read_text().splitlines() == keys
        assert capsys.readouterr().out == f"{len(keys)} ids\nwritten to {tmp_path}/new/ids.txt\n"
    for words, said in (
        (["--ids-out", tmp_path / "x", "--split", "evil"], "--split evil is not in .*out, which has train, eval, more"),
        (["--split", "eval"], "--split needs --ids-out"),
        (["a", "--ids-out", tmp_path / "x"], "KEY goes alone"),
        (["--ids-out", tmp_path], "--ids-out .*is a directory"),
    ):
        with pytest.raises(UserError, match=said):
            run_main(monkeypatch, tmp_path / "out", *words)
    assert not (tmp_path / "x").exists()


def test_a_flipped_bit_is_an_error_that_names_the_clip(shards, tmp_path):
    row = load_index(shards).to_pylist()[0]
    tar = shards / row["shard"]
    whole = tar.read_bytes()
    damaged = bytearray(whole)
    damaged[row["waveform_offset"] + 300] ^= 1
    tar.write_bytes(damaged)
    try:
        done = inspect(shards, "--html", tmp_path / "never.html")
    finally:
        tar.write_bytes(whole)
    assert done.returncode == 2
    assert f"waveform of '{row['key']}'" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_url_gives_the_same_numbers(shards):
    local, remote = survey(shards, 3, 1, 2), survey(f"file://{shards}", 3, 1, 2)
    assert local.levels == remote.levels
    assert json.dumps(load_manifest(shards).model_dump()) == json.dumps(remote.manifest.model_dump())
    assert parser().parse_args([f"file://{shards}"]).directory == location(f"file://{shards}", "DIR") == shards


def test_s3_gives_the_same_words_page_and_sound(shards, s3, tmp_path):
    """The report by the command line, and one clip."""
    url, html = upload(shards, "inspected"), tmp_path / "page.html"
    done = inspect(url, "--sample", 3, "--seed", 1, "--examples", 2, "--html", html)
    assert done.returncode == 0, done.stderr
    lines, wanted = report(shards, 3, 1, 2)
    assert done.stdout.replace(url, str(shards)).startswith("\n".join(lines) + "\n")
    assert html.read_text("utf-8").replace(url, str(shards)) == wanted
    assert len(embedded(wanted, "audio/wav")) == 2
    (here,), (there,) = find(shards, load_manifest(shards), "tone"), find(url, load_manifest(url), "tone")
    assert (here.row, here.about) == (there.row, there.about)
    assert np.array_equal(here.waveform, there.waveform)
    manifest = load_manifest(shards)
    assert page("tone", "", [], [there], manifest) == page("tone", "", [], [here], manifest)


def test_a_flipped_bit_in_s3_is_an_error_that_names_the_clip(shards, s3, tmp_path):
    url = upload(shards, "inspected-damaged")
    row = load_index(shards).to_pylist()[0]
    damaged = bytearray((shards / row["shard"]).read_bytes())
    damaged[row["waveform_offset"] + 300] ^= 1
    boto3.client("s3").put_object(Bucket="inspected-damaged", Key=row["shard"], Body=bytes(damaged))
    with pytest.raises(OSError, match=f"{row['shard']}: waveform of '{row['key']}'"):
        survey(url, 100, 0, 2)
    with pytest.raises(UserError, match="no/such/prefix"):
        survey(f"{url}/no/such/prefix", 100, 0, 2)


def test_files_that_are_not_those_of_the_manifest_are_refused(shards, tmp_path):
    """A row that names a tar elsewhere in an index whose hash fits; a changed failures.jsonl; a FIFO as a tar."""
    copy = tmp_path / "copy"
    shutil.copytree(shards, copy)
    rows = load_index(copy).to_pylist()
    rows[0]["shard"] = "../elsewhere.tar"
    write_index(copy, pa.Table.from_pylist(rows, INDEX_SCHEMA))
    with pytest.raises(UserError, match=r"shard: '../elsewhere.tar', which manifest.json does not have"):
        survey(copy, 100, 0, 2)
    with pytest.raises(UserError, match=r"shard: '../elsewhere.tar', which manifest.json does not have"):
        find(copy, load_manifest(copy), rows[0]["key"])
    write_index(copy, load_index(shards))
    (copy / "failures.jsonl").write_bytes((shards / "failures.jsonl").read_bytes().replace(b"missing", b"missinh"))
    with pytest.raises(UserError, match=r"failures\.jsonl: its sha256 is not that of manifest\.json"):
        survey(copy, 100, 0, 2)
    shutil.copy(shards / "failures.jsonl", copy)
    (copy / rows[1]["shard"]).unlink()
    os.mkfifo(copy / rows[1]["shard"])
    with pytest.raises(OSError, match="no regular file"):
        survey(copy, 100, 0, 2)
