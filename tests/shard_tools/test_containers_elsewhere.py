"""Clips inside containers, on disk and in a store, by every way to build: the bytes are those of one local process."""

import itertools
import json
import os
import signal
import sys
from pathlib import Path

import boto3
import pytest

from pipeline.data.manifest import load_index, load_manifest
from pipeline.errors import UserError
from shard_tools import store, verify_shards
from shard_tools.build import build, build_slice, merge
from shard_tools.catalogs import Catalog
from shard_tools.plan import Slice
from tests.helpers import digests, options
from tests.ranks import fork_context
from tests.shard_tools.containers import KINDS, pack, recordings
from tests.shard_tools.test_forms import catalog
from tests.shard_tools.test_remote import download
from tests.stores import upload

CLIPS, PER_SHARD = 24, 3
OPTIONS = options(0.1, PER_SHARD)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CRAFT_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def places(s3, tmp_path_factory):
    """By kind, a folder of two containers, its copy in S3, and what one process builds of the folder."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CRAFT_CACHE", str(tmp_path_factory.mktemp("cache")))
        for kind in KINDS:
            root, out = (tmp_path_factory.mktemp(f"{what}-{kind}") for what in ("root", "out"))
            pack(root, kind, recordings(CLIPS))
            build(listed(root), out, OPTIONS, 1, engine="inline")
            found[kind] = str(root), upload(root, f"containers-{kind}"), out
    return found


def listed(root: object) -> Catalog:
    return catalog("--root", root, "--dataset", "unlabelled")


@pytest.mark.slow
def test_ray_workers_read_members(places, tmp_path):
    import ray

    ray.init("local", num_cpus=2, log_to_driver=False)
    try:
        for kind, (*roots, out) in places.items():
            for number, root in enumerate(roots):
                build(listed(root), tmp_path / f"{kind}-{number}", OPTIONS, 100, engine="ray")
                assert digests(tmp_path / f"{kind}-{number}") == digests(out), root
    finally:
        ray.shutdown()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_slices_between_stores(places, tmp_path, kind):
    """Three slices of a source in S3, written to S3, one of them again after a loss; then merged."""
    _, url, out = places[kind]
    made, client, bucket = listed(url), boto3.client("s3"), f"made-{kind}"
    client.create_bucket(Bucket=bucket)
    target = f"s3://{bucket}/shards"
    for number in (3, 1):
        build_slice(made, target, OPTIONS, 1, Slice(number, 3), "inline")
    with pytest.raises(UserError, match=r"of 8 shards are not written yet"):
        merge(made, target, OPTIONS)
    client.delete_object(Bucket=bucket, Key="shards/train-000000.tar")
    for number in (2, 1):
        build_slice(made, target, OPTIONS, 1, Slice(number, 3), "inline")
    merge(made, target, OPTIONS)
    assert download(client, bucket, "shards", tmp_path / "got") == digests(out)


def build_and_die(env: dict[str, str], root: str, out: Path, last: int) -> None:
    """In a process of its own, which the fetch of member number `last` kills."""
    os.environ.update(env)
    fetched, real = itertools.count(1), store.extract

    def extract(*words: object) -> None:
        if next(fetched) == last:
            os.kill(os.getpid(), signal.SIGKILL)
        real(*words)

    store.extract = extract
    build(listed(root), out, OPTIONS, 1, engine="inline")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_build_from_s3_that_was_killed_goes_on(places, tmp_path, kind):
    _, url, whole = places[kind]
    kept = []
    for last in (1, 11, CLIPS):
        out = tmp_path / str(last)
        process = fork_context().Process(target=build_and_die, args=(dict(os.environ), url, out, last))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert not (out / "manifest.json").exists()
        done = {path: path.stat().st_mtime_ns for path in out.glob("*.tar")}
        kept.append(len(done))
        build(listed(url), out, OPTIONS, 1, engine="inline")
        assert digests(out) == digests(whole)
        assert {path: path.stat().st_mtime_ns for path in done} == done
        assert not [path for path in out.iterdir() if path.suffix == ".tmp" or path.name == ".build"]
    assert kept[0] == 0 < kept[1] < kept[2]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_repair_and_comparison_with_sources_in_s3(places, tmp_path, kind, monkeypatch, capsys):
    """A flipped bit and a lost tar are mended from members; then the containers hold other recordings."""
    _, url, whole = places[kind]
    out = tmp_path / "out"
    build(listed(url), out, OPTIONS, 1, engine="inline")
    first, second = (out / shard.name for shard in load_manifest(out).shards[:2])
    content = bytearray(first.read_bytes())
    content[5000] ^= 1
    first.write_bytes(content)
    second.unlink()

    def verify(*words: str) -> list[str]:
        """What it says; the last line ends with its judgement."""
        monkeypatch.setattr(sys, "argv", ["verify_shards.py", str(out), "--workers", "1", "--audio-root", url, *words])
        status, said = verify_shards.main(), capsys.readouterr().out.splitlines()
        assert status == (not said[-1].endswith(": sound"))
        return said

    said = verify("--repair", "--sources")
    for path in (first, second):
        assert f"repair: {path.name}: built again, as it was" in said
    assert said[-1].endswith(": sound")
    assert digests(out) == digests(whole)
    assert verify("--sources")[-1].endswith(": sound")

    other, bucket = recordings(CLIPS), boto3.client("s3")
    other[1] = other[0]
    pack(tmp_path / "changed", kind, other)
    original = {name: Path(places[kind][0], name).read_bytes() for name in (f"a.{kind}", f"b.{kind}")}
    try:
        bucket.upload_file(f"{tmp_path}/changed/a.{kind}", f"containers-{kind}", f"a.{kind}")
        row = next(
            row for row in load_index(out).to_pylist() if row["source"] in (f"a.{kind}::1", f"a.{kind}::audio/1.wav")
        )
        named = f"{row['shard']}: {row['key']}: its source {row['source']} gives another waveform now"
        assert verify("--sources")[0] == named
        bucket.delete_object(Bucket=f"containers-{kind}", Key=f"b.{kind}")
        gone = [line for line in verify("--sources") if "its source gives nothing: vanished" in line]
        assert len(gone) == CLIPS // 2
        (out / row["shard"]).unlink()
        assert any(
            line.startswith(f"repair: {row['shard']}: left as it is: the sources in") for line in verify("--repair")
        )
    finally:
        for name, content in original.items():
            bucket.put_object(Bucket=f"containers-{kind}", Key=name, Body=content)


@pytest.mark.slow
def test_members_in_s3_that_are_no_audio_are_failures_on_every_way(s3, tmp_path):
    wavs = [*recordings(CLIPS)[:-1], b"no audio at all"]
    for kind in ("tar", "zip", "parquet"):
        pack(tmp_path / kind, kind, wavs)
        url = upload(tmp_path / kind, f"broken-{kind}")
        for root, out in ((tmp_path / kind, tmp_path / f"{kind}-1"), (url, tmp_path / f"{kind}-2")):
            build(listed(root), out, OPTIONS, 1, engine="inline")
        assert digests(tmp_path / f"{kind}-1") == digests(tmp_path / f"{kind}-2")
        (line,) = [json.loads(line) for line in (tmp_path / f"{kind}-1" / "failures.jsonl").read_text().splitlines()]
        assert line["reason"].startswith("undecodable: text, not audio")
