"""Shards written to and built from a real S3 server are those of the local disk."""

import hashlib
import io
import json
import os
import tempfile
from pathlib import Path

import boto3
import numpy as np
import pytest
import soundfile

from pipeline.data import storage
from pipeline.data.manifest import load_index, load_manifest
from pipeline.errors import UserError
from shard_tools import build as build_module
from shard_tools import catalogs, distribute, store
from shard_tools.build import build, build_slice, merge
from shard_tools.plan import Slice
from shard_tools.store import Store
from tests.helpers import digests, options, synth_catalog
from tests.stores import upload


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(storage, "FIRST_WAIT", 0.01)


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """Catalog on disk, and the bytes of its local build."""
    folder = tmp_path_factory.mktemp("local")
    catalog = synth_catalog(folder / "source", 60, 0.2)
    build(catalog, folder / "out", options(0.2), 1, engine="inline")
    return catalog, digests(folder / "out")


@pytest.fixture
def bucket(s3, request):
    client = boto3.client("s3")
    name = f"bucket{abs(hash(request.node.name)) % 10**8}"
    client.create_bucket(Bucket=name)
    return client, name


def download(client, bucket: str, prefix: str, folder: Path) -> dict[str, str]:
    folder.mkdir()
    for entry in client.list_objects_v2(Bucket=bucket, Prefix=f"{prefix}/").get("Contents", []):
        name = entry["Key"].removeprefix(f"{prefix}/")
        assert "/" not in name, name  # nothing but the products is left
        client.download_file(bucket, entry["Key"], str(folder / name))
    return digests(folder)


@pytest.mark.slow
def test_a_build_into_s3_gives_the_same_bytes(local, bucket, tmp_path, monkeypatch):
    """Two real worker processes; then the audio, too, from the store."""
    catalog, wanted = local
    client, name = bucket
    summary = build(catalog, f"s3://{name}/from/disk", options(0.2), 2)
    assert download(client, name, "from/disk", tmp_path / "1") == wanted
    assert load_manifest(f"s3://{name}/from/disk") == summary.manifest
    assert len(load_index(f"s3://{name}/from/disk", "train")) == summary.manifest.splits["train"].clips

    for path in Path(str(catalog.root)).rglob("*.*"):
        client.upload_file(str(path), name, f"audio/{path.relative_to(str(catalog.root))}")
    root = f"s3://{name}/audio"
    remote = catalogs.table(root, f"{root}/table.csv", None, None)
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    build(remote, f"s3://{name}/from/s3", options(0.2), 1, engine="inline")
    assert download(client, name, "from/s3", tmp_path / "2") == wanted
    assert not list((tmp_path / "scratch").iterdir())
    kinds = {file: client.head_object(Bucket=name, Key=f"from/s3/{file}")["ContentType"] for file in wanted}
    assert (kinds["manifest.json"], kinds["train-000000.tar"]) == ("application/json", "application/x-tar")


def test_slices_into_s3_and_an_object_that_vanished(local, bucket, tmp_path):
    catalog, wanted = local
    client, name = bucket
    out = f"s3://{name}/sliced"
    build_slice(catalog, out, options(0.2), 1, Slice(1, 2), "inline")
    client.delete_object(Bucket=name, Key="sliced/train-000000.tar")
    build_slice(catalog, out, options(0.2), 1, Slice(2, 2), "inline")
    with pytest.raises(UserError, match=r"1 of 8 shards are not written yet, such as train-000000\.tar"):
        merge(catalog, out, options(0.2))
    build_slice(catalog, out, options(0.2), 1, Slice(1, 2), "inline")
    started = client.create_multipart_upload(Bucket=name, Key="sliced/train-000000.tar")  # a killed upload
    other = client.create_multipart_upload(Bucket=name, Key="slicedelsewhere/train-000000.tar")
    assert started["UploadId"] != other["UploadId"]
    merge(catalog, out, options(0.2))
    assert download(client, name, "sliced", tmp_path / "1") == wanted
    left = client.list_multipart_uploads(Bucket=name).get("Uploads", [])
    assert [upload["Key"] for upload in left] == ["slicedelsewhere/train-000000.tar"]


def test_large_files_go_in_parts_and_are_checked(bucket, tmp_path, monkeypatch):
    client, name = bucket
    monkeypatch.setattr(store, "PART_BYTES", 5 << 20)
    content = os.urandom((11 << 20) + 7)
    target = Store(f"s3://{name}/big")
    target.write("file.tar", content)
    head = client.head_object(Bucket=name, Key="big/file.tar")
    assert head["ETag"].strip('"').endswith("-3")
    assert client.get_object(Bucket=name, Key="big/file.tar")["Body"].read() == content
    # A store whose hash is none (encryption with the customer's key): read back and compared.
    monkeypatch.setattr(store, "_etag", lambda file: "none")
    target.write("file.tar", content[::-1])
    assert target.read("file.tar") == content[::-1]


def test_an_upload_that_fails_or_lies_is_tried_again(bucket, monkeypatch):
    _, name = bucket
    target, calls = Store(f"s3://{name}/flaky"), []
    system, _ = storage.file_system(f"s3://{name}")
    real = system.put_file

    def flaky(file, path, **options):
        calls.append(path)
        if len(calls) == 1:
            raise ConnectionResetError("the network went away")
        real(file, path, **options)
        if len(calls) == 2:
            system.pipe_file(path, bytes(len(b"the content")))  # as long, but not the same

    monkeypatch.setattr(system, "put_file", flaky)
    target.write("file", b"the content")
    assert len(calls) == 3
    assert target.read("file") == b"the content"

    def never(file, path, **options):
        raise ConnectionResetError("the network went away")

    monkeypatch.setattr(system, "put_file", never)
    with pytest.raises(OSError, match=r"flaky/other: upload: the network went away \(after 5 tries\)"):
        target.write("other", b"x")
    assert target.sizes() == {"file": 11}


@pytest.fixture
def audio(bucket):
    """Client, bucket and catalog of 12 WAVs in a store."""
    client, name = bucket
    names = [f"{number:02d}.wav" for number in range(12)]
    for number, file in enumerate(names):
        content = io.BytesIO()
        soundfile.write(content, 0.1 * np.sin(np.arange(3200) * (0.1 + 0.01 * number)), 16000, format="WAV")
        client.put_object(Bucket=name, Key=f"audio/{file}", Body=content.getvalue())
    table = "path,labels\n" + "".join(f"{file},tone\n" for file in names)
    client.put_object(Bucket=name, Key="audio/table.csv", Body=table.encode())
    root = f"s3://{name}/audio"
    return client, name, catalogs.table(root, f"{root}/table.csv", None, None)


def failures_of(out) -> list[dict]:
    return [json.loads(line) for line in (out / "failures.jsonl").read_text().splitlines()]


def test_an_object_that_is_gone_or_private_is_a_failure_of_its_own(audio, tmp_path, monkeypatch):
    """The others can be read, so the store is there."""
    client, name, catalog = audio
    client.delete_object(Bucket=name, Key="audio/03.wav")
    system, _ = storage.file_system(catalog.root)
    real = system.get_file

    def get_file(path, target, timeout):
        if path.endswith("05.wav"):
            raise PermissionError("Access Denied (request 1234-abcd)")
        real(path, target, timeout=timeout)

    monkeypatch.setattr(system, "get_file", get_file)
    build(catalog, tmp_path / "out", options(0.2, 4), 1, engine="inline")
    found = {failure["path"]: failure for failure in failures_of(tmp_path / "out")}
    assert {path: failure["reason"] for path, failure in found.items()} == {
        "03.wav": "vanished: the file is not there any more",
        "05.wav": "unreadable: its store does not give it to us",
    }
    assert (found["05.wav"]["key"], found["05.wav"]["start"], found["05.wav"]["end"]) == ("05", 0.0, None)


@pytest.mark.parametrize("error", [PermissionError("ExpiredToken"), ConnectionResetError("the network went away")])
def test_credentials_or_a_network_that_go_away_are_no_failures_of_clips(audio, tmp_path, monkeypatch, error):
    """For a while: the shard is tried again. For longer: one line, nothing recorded, and the same command goes on."""
    _, _, catalog = audio
    build(catalog, tmp_path / "whole", options(0.2, 4), 1, engine="inline")
    system, _ = storage.file_system(catalog.root)
    real, asked = {name: getattr(system, name) for name in ("get_file", "info")}, []
    away = range(0)

    def through(call):
        def ask(*words, **options):
            asked.append(call)
            if len(asked) in away:
                raise error
            return real[call](*words, **options)

        return ask

    for call in real:
        monkeypatch.setattr(system, call, through(call))
    monkeypatch.setattr(distribute, "WAITS", (0.0, 0.0))
    monkeypatch.setattr(storage, "FIRST_WAIT", 0.0)
    away = range(9, 40)
    build(catalog, tmp_path / "a while", options(0.2, 4), 1, engine="inline")
    assert len(asked) > 40
    assert digests(tmp_path / "a while") == digests(tmp_path / "whole")
    away = range(len(asked) + 20, len(asked) + 100_000)
    with pytest.raises(UserError, match=r"train-00000\d\.tar: .* trouble of this machine, its disks or its network"):
        build(catalog, tmp_path / "longer", options(0.2, 4), 1, engine="inline")
    assert not (tmp_path / "longer" / "manifest.json").exists()
    away = range(0)
    build(catalog, tmp_path / "longer", options(0.2, 4), 1, engine="inline")
    assert digests(tmp_path / "longer") == digests(tmp_path / "whole")


def test_splits_in_a_store_join_are_tried_again_and_replaced_as_on_a_disk(bucket, tmp_path):
    """At the root of a bucket. What is moved into place there is copied; nothing is left over."""
    client, name = bucket
    source, out = tmp_path / "source", f"s3://{name}"
    synth_catalog(source, 46, 0.1)

    def both(where, split: str, **words):
        for one in (where, out):
            build(catalogs.table(source, source / "table.csv", None, split), one, options(0.1, 6), 1,
                  engine="inline", **words)  # fmt: skip

    def there() -> dict[str, str]:
        keys = [entry["Key"] for entry in client.list_objects_v2(Bucket=name)["Contents"]]
        return {key: hashlib.sha256(client.get_object(Bucket=name, Key=key)["Body"].read()).hexdigest() for key in keys}

    file = next(Path(clip.path) for clip in catalogs.table(source, source / "table.csv", None, "train").clips)
    content = file.read_bytes()
    file.write_text("no audio")
    disk = tmp_path / "disk"
    both(disk, "train")
    both(disk, "eval")
    file.write_bytes(content)
    for key in ("train-000000.tar", "elsewhere/train-000000.tar", "train-000000.tar.mine"):
        client.create_multipart_upload(Bucket=name, Key=key)
    assert there() == digests(disk)
    both(disk, "train", retry=True)
    assert there() == digests(disk)
    left = client.list_multipart_uploads(Bucket=name)["Uploads"]
    assert sorted(upload["Key"] for upload in left) == ["elsewhere/train-000000.tar", "train-000000.tar.mine"]
    client.put_object(Bucket=name, Key="thesis.tar", Body=b"mine")
    (disk / "thesis.tar").write_bytes(b"mine")
    both(disk, "train", overwrite=True)
    assert there() == digests(disk)


def test_of_two_builds_that_end_at_once_in_a_store_neither_is_lost(bucket, tmp_path, monkeypatch):
    _, name = bucket
    source, out = tmp_path / "source", f"s3://{name}/two"
    synth_catalog(source, 46, 0.1)
    catalog = {split: catalogs.table(source, source / "table.csv", None, split) for split in ("train", "eval")}
    real = build_module.run

    def meanwhile(*words):
        yield from real(*words)
        monkeypatch.setattr(build_module, "run", real)
        build(catalog["eval"], out, options(0.1, 6), 1, engine="inline")

    monkeypatch.setattr(build_module, "run", meanwhile)
    with pytest.raises(UserError, match="another build ended here meanwhile; run the same command again"):
        build(catalog["train"], out, options(0.1, 6), 1, engine="inline")
    build(catalog["train"], out, options(0.1, 6), 1, engine="inline")
    assert set(load_manifest(out).splits) == {"train", "eval"}


def test_a_switch_that_was_cut_in_a_store_is_completed(bucket, tmp_path, monkeypatch):
    """The finished split's index is another one then; nothing of it is lost, and the next build makes it whole."""
    client, name = bucket
    source, out = tmp_path / "source", f"s3://{name}/cut"
    synth_catalog(source, 46, 0.1)
    for split in ("train", "eval"):
        build(catalogs.table(source, source / "table.csv", None, split), tmp_path / "disk", options(0.1, 6), 1,
              engine="inline")  # fmt: skip
    build(catalogs.table(source, source / "table.csv", None, "train"), out, options(0.1, 6), 1, engine="inline")
    real, moved = Store.move, []

    def move(self, file, target):
        moved.append(target)
        if target == "manifest.json":
            raise OSError("the network went away")
        real(self, file, target)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "move", move)
        with pytest.raises(OSError, match="network"):
            build(catalogs.table(source, source / "table.csv", None, "eval"), out, options(0.1, 6), 1, engine="inline")
    assert moved == ["failures.jsonl", "index.parquet", "manifest.json"]
    build(catalogs.table(source, source / "table.csv", None, "train"), out, options(0.1, 6), 1, engine="inline")
    assert download(client, name, "cut", tmp_path / "1") == digests(tmp_path / "disk")


def test_a_store_that_is_not_there_is_one_line(s3):
    with pytest.raises(UserError, match=r"nosuchbucket/shards/manifest\.json"):
        load_manifest("s3://nosuchbucket/shards")
    with pytest.raises(UserError, match=r"nonsense://x/manifest\.json"):
        load_manifest("nonsense://x")


def test_uploaded_shards_are_found_whole(local, s3, tmp_path):
    """Built on disk, copied by any tool: the same manifest, and nothing to do for the builder."""
    catalog, _ = local
    build(catalog, tmp_path / "out", options(0.2), 1, engine="inline")
    url = upload(tmp_path / "out", "copied")
    assert load_manifest(url) == load_manifest(tmp_path / "out")
    summary = build(catalog, url, options(0.2), 1, engine="inline")
    assert summary.manifest == load_manifest(tmp_path / "out")
