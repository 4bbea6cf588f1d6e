"""What must not differ between the parts of one build: decoder, sources, owner of a shard; and what it tells."""

import json
import logging
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import soundfile

from pipeline.errors import UserError
from shard_tools import build as build_module
from shard_tools import catalogs
from shard_tools.build import build, build_slice, merge
from shard_tools.plan import Slice
from shard_tools.verify_shards import verify
from tests.conftest import ROOT
from tests.helpers import digests, options, synth_catalog

SECONDS = 0.1


@pytest.fixture
def catalog(tmp_path):
    return synth_catalog(tmp_path / "source", 26, SECONDS)


def interrupted(catalog, out, monkeypatch):
    """A build that stops before its index."""

    def fails(*_):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(build_module, "finish", fails)
        with pytest.raises(OSError, match="no space"):
            build(catalog, out, options(SECONDS, 4), 1, engine="inline")


def test_a_build_is_not_gone_on_with_by_another_decoder(catalog, tmp_path, monkeypatch):
    """Another release of FFmpeg may give other samples; nothing of the unfinished build is touched."""
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(build_module, "identity", lambda: "torchcodec")  # what an earlier version decoded with
        interrupted(catalog, out, monkeypatch)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"was begun with the decoder torchcodec, not ffmpeg [\d.]+, .* --overwrite"):
        build(catalog, out, options(SECONDS, 4), 1, engine="inline")
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    build(catalog, out, options(SECONDS, 4), 1, engine="inline", overwrite=True)
    assert verify(out, workers=1) == []


def test_a_source_that_changed_meanwhile_is_read_again(catalog, tmp_path, monkeypatch, caplog):
    out = tmp_path / "out"
    interrupted(catalog, out, monkeypatch)
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    source = next(path for path in sorted(catalog.root.rglob("*.flac")))
    samples, rate = soundfile.read(source)
    soundfile.write(source, samples[::-1], rate)
    status = source.stat()
    os.utime(source, ns=(status.st_atime_ns, status.st_mtime_ns + 10**9))
    with caplog.at_level(logging.WARNING):
        build(catalog, out, options(SECONDS, 4), 1, engine="inline")
    assert "1 shards hold files that have changed since, such as " + str(source) in caplog.text
    build(catalog, tmp_path / "anew", options(SECONDS, 4), 1, engine="inline")
    assert digests(out) == digests(tmp_path / "anew")
    after = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    assert sum(before[name] != after[name] for name in before) == 1


def test_a_merge_refuses_other_sizes_and_tells_other_times(catalog, tmp_path, caplog):
    out = tmp_path / "out"
    for number in (1, 2):
        build_slice(catalog, out, options(SECONDS, 4), 1, Slice(number, 2), "inline")
    source = next(path for path in sorted(catalog.root.rglob("*.flac")))
    content = source.read_bytes()
    source.write_bytes(content + b"more")
    said = f"{source} ({len(content)} bytes then, {len(content) + 4} now); put the files back, or run the slices again"
    with pytest.raises(UserError, match=re.escape(said)):
        merge(catalog, out, options(SECONDS, 4))
    source.write_bytes(content)  # another time of modification
    os.utime(source, ns=(1, 1))
    with caplog.at_level(logging.WARNING):
        merge(catalog, out, options(SECONDS, 4))
    assert f"1 shards hold files that are as long as when they were decoded, of another time, such as {source}:" in (
        caplog.text
    )


def test_a_slice_that_another_process_writes_is_refused(catalog, tmp_path):
    out = tmp_path / "out"
    holder = (
        "import sys, pathlib\n"
        "from shard_tools.lock import owner, slice_owner\n"
        "from shard_tools.plan import Slice\n"
        f"out = pathlib.Path({str(out)!r})\n"
        "with owner(out, shared=True), slice_owner(out, Slice(1, 3), [0, 3]):\n"
        "    print('held', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    with subprocess.Popen([sys.executable, "-c", holder], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          text=True) as other:  # fmt: skip
        assert other.stdout.readline() == "held\n"
        for part in (Slice(1, 3), Slice(2, 2)):  # the same; and one of another N that has shard 3 too
            with pytest.raises(UserError, match=f"--slice {part.number}/{part.count}: another process is writing"):
                build_slice(catalog, out, options(SECONDS, 4), 1, part, "inline")
        assert build_slice(catalog, out, options(SECONDS, 4), 1, Slice(2, 3), "inline") > 0
        other.stdin.close()
    assert build_slice(catalog, out, options(SECONDS, 4), 1, Slice(1, 3), "inline") > 0


def test_a_slices_progress_is_that_of_its_own_clips(catalog, tmp_path, monkeypatch):
    totals = []
    real = build_module.tqdm

    def bar(*, total, initial, **words):
        totals.append((total, initial))
        return real(total=total, initial=initial, **words)

    monkeypatch.setattr(build_module, "tqdm", bar)
    for number in (1, 2):
        build_slice(catalog, tmp_path / "out", options(SECONDS, 4), 1, Slice(number, 2), "inline")
    assert sum(total for total, _ in totals) == len(catalog.clips)
    assert [initial for _, initial in totals] == [0, 0]


def test_names_that_are_not_utf8_stay_what_they_are_when_a_split_joins(tmp_path):
    root = tmp_path / "audio"
    (root / "a").mkdir(parents=True)
    soundfile.write(root / "a" / "fine.wav", np.full(1600, 0.1), 16000)
    name = os.fsdecode(b"caf\xe9 \xff.wav")
    soundfile.write(root / "a" / "x.wav", np.full(1600, 0.1), 16000)
    os.rename(root / "a" / "x.wav", root / "a" / name)
    for split in ("train", "eval", "more"):
        build(catalogs.folder(root, split), tmp_path / "out", options(SECONDS, 4), 1, engine="inline")
    lines = (tmp_path / "out" / "failures.jsonl").read_bytes().splitlines()
    assert len(lines) == 3
    for line, split in zip(lines, ("train", "eval", "more"), strict=True):
        failure = json.loads(line)
        assert failure["split"] == split
        assert os.fsencode(failure["path"]).endswith(b"caf\xe9 \xff.wav")
    assert len({line.replace(b"eval", b"train").replace(b"more", b"train") for line in lines}) == 1
