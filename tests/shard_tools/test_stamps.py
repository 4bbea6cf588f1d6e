"""Sources in a real S3 server that change between two runs of a build."""

import io
import logging
from datetime import datetime, timedelta, timezone

import boto3
import numpy as np
import pytest
import soundfile

from pipeline.data import storage
from pipeline.errors import UserError
from shard_tools import catalogs, stamps
from shard_tools.build import build, build_slice, merge
from shard_tools.plan import Slice, SplitPlan
from shard_tools.stamps import Change, comparison
from tests.helpers import digests, options

SECONDS, CLIPS, PER_SHARD = 0.1, 12, 2


@pytest.fixture
def audio(s3, tmp_path, monkeypatch):
    """Client, bucket and catalog of 12 WAVs of one length, one with a name that URLs escape; listings of 5 a page."""
    client, bucket = boto3.client("s3"), f"sources-{abs(hash(tmp_path)) % 10**8}"
    client.create_bucket(Bucket=bucket)
    names = [f"{number:02d}.wav" for number in range(CLIPS - 1)] + ["ü 1+1 %20.wav"]
    for number, name in enumerate(names):
        put(client, bucket, f"audio/{name}", 0.01 * number)
    table = "path,labels\n" + "".join(f"{name},tone\n" for name in names)
    client.put_object(Bucket=bucket, Key="audio/table.csv", Body=table.encode())
    system, _ = storage.file_system(f"s3://{bucket}")
    real = system.call_s3
    pages = []

    def call(name, **words):
        if name == "list_objects_v2":
            pages.append(words)
            words["MaxKeys"] = 5
        return real(name, **words)

    monkeypatch.setattr(system, "call_s3", call)
    root = f"s3://{bucket}/audio"
    return client, bucket, catalogs.table(root, f"{root}/table.csv", None, None), pages


def put(client, bucket: str, key: str, level: float) -> None:
    content = io.BytesIO()
    soundfile.write(content, level * np.sin(np.arange(1600) * 0.1), 16000, format="WAV")
    client.put_object(Bucket=bucket, Key=key, Body=content.getvalue())


def deny(*_, **__):
    raise PermissionError("Access Denied")


def first_source(catalog, out) -> str:
    """Of the first shard."""
    plan = SplitPlan(catalog, "train", out, options(SECONDS, PER_SHARD))
    return plan.shard(0).clips[0].path


def times(out) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}


@pytest.mark.parametrize(
    ("least", "denied", "requests"), [(1, False, (1, 9)), (1000, False, (14, 0)), (1, True, (14, 3))]
)
def test_an_object_that_changed_meanwhile_is_read_again(audio, least, denied, requests, tmp_path, monkeypatch, caplog):
    """By a listing, by a request each, and by a request each where the store denies listings.

    After a slice what it has read is compared; before the build 6 files of finished shards, after it the 8 it has read.
    """
    client, bucket, catalog, pages = audio
    out, asked = tmp_path / "out", []
    monkeypatch.setattr(stamps, "LIST_FROM", least)
    build_slice(catalog, out, options(SECONDS, PER_SHARD), 1, Slice(1, 2), "inline")
    before = times(out)
    assert len(before) == 3
    path = first_source(catalog, out)
    put(client, bucket, path.removeprefix(f"s3://{bucket}/"), 0.9)
    real = stamps.stamp
    monkeypatch.setattr(stamps, "stamp", lambda path: (asked.append(path), real(path))[1])
    if denied:
        system, _ = storage.file_system(f"s3://{bucket}")
        monkeypatch.setattr(system, "call_s3", deny)
    with caplog.at_level(logging.WARNING):
        build(catalog, out, options(SECONDS, PER_SHARD), 1, engine="inline")
    assert f"1 shards hold files that have changed since, such as {path} (as long, but written anew)" in caplog.text
    assert (len(asked), len(pages)) == requests
    assert ("cannot be listed (Access Denied)" in caplog.text) == denied
    after = times(out)
    assert [name for name in before if before[name] != after[name]] == ["train-000000.tar"]
    build(catalog, tmp_path / "anew", options(SECONDS, PER_SHARD), 1, engine="inline")
    assert digests(out) == digests(tmp_path / "anew")


def test_a_merge_refuses_an_object_that_changed_since_its_slice(audio, tmp_path):
    client, bucket, catalog, _ = audio
    out, path = tmp_path / "out", first_source(catalog, tmp_path)
    for number in (1, 2):
        build_slice(catalog, out, options(SECONDS, PER_SHARD), 1, Slice(number, 2), "inline")
    before = times(out)
    put(client, bucket, path.removeprefix(f"s3://{bucket}/"), 0.9)
    with pytest.raises(UserError) as caught:
        merge(catalog, out, options(SECONDS, PER_SHARD))
    said = str(caught.value)
    assert f"1 shards hold files that have changed since a slice decoded them, such as {path} (as long" in said
    assert "run the slices again" in said
    assert not (out / "manifest.json").exists()
    build_slice(catalog, out, options(SECONDS, PER_SHARD), 1, Slice(1, 2), "inline")
    merge(catalog, out, options(SECONDS, PER_SHARD))
    assert [name for name, time in times(out).items() if before[name] != time] == ["train-000000.tar"]


def test_a_store_that_does_not_answer_changes_nothing(audio, tmp_path, monkeypatch):
    """Its shards would be written again without the clips that cannot be fetched."""
    _, bucket, catalog, _ = audio
    out = tmp_path / "out"
    build_slice(catalog, out, options(SECONDS, PER_SHARD), 1, Slice(1, 2), "inline")
    before = times(out)
    system, _ = storage.file_system(f"s3://{bucket}")

    def down(*_, **__):
        raise ConnectionResetError("the network went away")

    monkeypatch.setattr(storage, "FIRST_WAIT", 0.001)
    with monkeypatch.context() as patch:
        patch.setattr(system, "info", down)
        with pytest.raises(UserError, match=r"the network went away .* try again when they answer"):
            build(catalog, out, options(SECONDS, PER_SHARD), 1, engine="inline")
        # One object that can never be looked at (a key of the customer's) does not stop what came to terms with it.
        with comparison(catalog.root, 1) as changed:
            assert changed([first_source(catalog, out)], [None]) == []
    assert times(out) == before


def test_a_stamp_is_the_same_wherever_it_is_taken():
    """A date's text depends on the machine's time zone, and what a store tells has many names."""
    now = datetime(2026, 1, 2, 3, 4, 5, tzinfo=timezone.utc)
    there = now.astimezone(timezone(timedelta(hours=5)))
    assert stamps.stamp_of({"size": 3, "created": now}) == stamps.stamp_of({"size": 3, "created": there})
    assert stamps.stamp_of({"size": 3, "LastModified": now, "ETag": '"a"'}) == [3, 'ETag "a"']
    assert stamps.stamp_of({"size": None, "ETag": ""}) == [0, ""]
    assert Change("x", [3, 10], [3, 11]).time_only
    assert not Change("x", [3, "ETag a"], [3, "ETag b"]).time_only
    assert str(Change("x", [3, 10], [4, 10])) == "x (3 bytes then, 4 now)"
    assert str(Change("x", [3, 10], None)) == "x (not there any more)"
    assert str(Change("x", None, [3, 10])) == "x (could not be read then)"
