"""Remote shards: what comes out is what lies in the store, whatever the network, the disk and other ranks do."""

import errno
import fcntl
import os
import shutil
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch

from pipeline.config import DataConfig
from pipeline.data import cache as cache_module
from pipeline.data.cache import FOLDER, Cache, NoRoomError, Remote, Shard
from pipeline.data.loader import Needs, Place, build_loader
from pipeline.data.manifest import load_manifest
from pipeline.errors import UserError
from tests.stores import FlakyServer

BATCH = 12


def batches(url, count=7, **data):
    """The first batches of one rank, as lists of tensors, and the loader's bad clips."""
    config = DataConfig(shards=str(url), streams=4, window=8, **data)
    place = Place(0, 1, torch.device("cpu"))
    needs = Needs(waveform=True, fbank=True)
    with build_loader(config, None, part="train", needs=needs, batch_size=BATCH, seed=1, place=place) as loader:
        iterator = loader.train_batches(0)
        found = [next(iterator) for _ in range(count)]
        return [(b.row, b.waveform.clone(), b.fbank.clone(), b.targets) for b in found], dict(loader.bad)


def equal(one, other):
    return all(torch.equal(a, b) for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True))


@pytest.fixture
def server(shards):
    served = FlakyServer(shards)
    yield served
    served.close()


def remote(url, directory, cache, limit=0):
    shards = tuple(Shard(s.name, s.size, s.sha256) for s in load_manifest(directory).shards)
    return Remote(url, shards, str(cache), limit, time.time())


def content(descriptor):
    return os.pread(descriptor, os.fstat(descriptor).st_size, 0)


def copies(cache):
    return sorted(p for p in (Path(cache) / FOLDER).iterdir() if p.suffix != ".lock")


@pytest.mark.parametrize("workers", [0, 2])
def test_s3_gives_the_bytes_of_the_local_shards(shards, s3_shards, tmp_path, workers):
    local, _ = batches(shards, workers=0)
    found, bad = batches(s3_shards, workers=workers, cache=str(tmp_path))
    assert equal(found, local)
    assert not bad


def test_a_flaky_server_gives_no_wrong_sample_and_each_shard_is_kept_once(shards, server, tmp_path):
    names = sorted(p.name for p in shards.glob("train-*.tar"))
    faults = {names[0]: ["cut", "busy"], names[1]: ["short"], names[2]: ["flip"], "index.parquet": ["busy"]}
    server.faults = {name: list(kinds) for name, kinds in faults.items()}
    local, _ = batches(shards, workers=0)
    found, bad = batches(server.url, workers=2, cache=str(tmp_path))
    assert equal(found, local)
    assert not bad
    for name in names:
        assert server.gets[name] == 1 + len(faults.get(name, [])), name
    again, _ = batches(server.url, workers=2, cache=str(tmp_path))
    assert equal(again, local)
    assert all(server.gets[name] == 1 + len(faults.get(name, [])) for name in names)  # a second run fetches nothing


def test_what_is_damaged_in_the_store_is_handled_as_on_disk(shards, tmp_path):
    damaged = tmp_path / "damaged"
    shutil.copytree(shards, damaged, ignore=shutil.ignore_patterns("source"))
    tars = sorted(damaged.glob("train-*.tar"))
    tars[0].unlink()
    os.truncate(tars[1], tars[1].stat().st_size // 2)
    with tars[2].open("r+b") as file:
        file.seek(3000)
        file.write(b"\x55" * 64)
    served = FlakyServer(damaged)
    local, local_bad = batches(damaged, workers=0)
    found, bad = batches(served.url, workers=2, cache=str(tmp_path / "cache"))
    served.close()
    assert equal(found, local)
    assert bad.keys() == local_bad.keys()
    assert len(bad) > 8
    assert served.gets[tars[1].name] == 3  # looked at again before it is believed


def _open_all(remote_shards):
    cache = Cache(remote_shards)
    return [len(content(cache.open(number))) for number in range(len(remote_shards.shards))]


def test_the_ranks_of_a_node_share_one_download(shards, server, tmp_path):
    described = remote(server.url, shards, tmp_path)
    with ProcessPoolExecutor(4, mp_context=get_context("spawn")) as pool:
        sizes = list(pool.map(_open_all, [described] * 4))
    assert sizes == [[shard.size for shard in described.shards]] * 4
    assert {server.gets[shard.name] for shard in described.shards} == {1}


def test_the_cache_stays_within_its_limit_and_deletes_nothing_in_use_and_no_original(shards, server, tmp_path):
    originals = {path: path.read_bytes() for path in shards.glob("*.tar")}
    largest = max(len(data) for data in originals.values())
    described = remote(server.url, shards, tmp_path, limit=3 * largest)
    cache = Cache(described)
    foreign = tmp_path / FOLDER / "thesis.tex"
    foreign.write_text("mine")
    held = cache.open(0)
    for number in range(1, len(described.shards)):
        os.close(cache.open(number))
        used = sum(path.stat().st_size for path in copies(tmp_path) if path != foreign)
        assert used <= 3 * largest
    assert content(held) == originals[shards / described.shards[0].name]
    assert any(described.shards[0].name in path.name for path in copies(tmp_path))
    assert server.gets[described.shards[0].name] == 1
    os.close(cache.open(1))
    assert server.gets[described.shards[1].name] == 2  # it had been evicted
    assert foreign.read_text() == "mine"
    assert all(path.read_bytes() == data for path, data in originals.items())


def test_shards_in_use_may_exceed_the_limit_but_fetching_ahead_may_not(shards, server, tmp_path, caplog):
    described = remote(server.url, shards, tmp_path, limit=1)
    cache = Cache(described)
    held = [cache.open(0)]
    with pytest.raises(NoRoomError):
        cache.open(1, ahead=True)
    held.append(cache.open(1))
    assert [content(d) == (shards / s.name).read_bytes() for d, s in zip(held, described.shards, strict=False)] == [
        True,
        True,
    ]
    assert "raise data.cache_gb or lower data.streams" in caplog.text


def test_an_outage_ends_the_run_with_one_clear_error(shards, server, tmp_path, monkeypatch):
    monkeypatch.setattr(cache_module, "BACKOFF", 0.001)
    described = remote(server.url, shards, tmp_path)
    name = described.shards[0].name
    server.faults[name] = ["busy"] * 99
    with pytest.raises(UserError, match=rf"{name}: not fetched in 7 attempts: 503"):
        Cache(described).open(0)
    assert not copies(tmp_path)


def test_a_full_disk_is_emptied_of_old_copies_or_ends_the_run(shards, server, tmp_path, monkeypatch):
    described = remote(server.url, shards, tmp_path)
    cache = Cache(described)
    os.close(cache.open(0))
    store, _ = cache._store
    fetch, full = store.get_file, 1

    def get_file(source, target):
        nonlocal full
        if full:
            full -= 1
            Path(target).write_bytes(b"half of it")
            raise OSError(errno.ENOSPC, "No space left on device", target)
        fetch(source, target)

    monkeypatch.setattr(store, "get_file", get_file)
    assert content(cache.open(1)) == (shards / described.shards[1].name).read_bytes()
    assert not any(described.shards[0].name in path.name for path in copies(tmp_path))  # made room
    full = 99
    with pytest.raises(UserError, match=r"disk full while fetching .*; free some, or point data.cache"):
        cache.open(2)
    assert len(copies(tmp_path)) == 1  # no half shard is left


def test_the_parts_of_a_killed_download_are_swept_and_those_of_a_living_one_count(shards, server, tmp_path):
    described = remote(server.url, shards, tmp_path, limit=10**9)
    cache = Cache(described)
    folder = tmp_path / FOLDER
    for name in ("dead", "living"):
        (folder / f"{name}.tar.cached.900000000.part").write_bytes(b"x")
    with (folder / "living.tar.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        os.close(cache.open(0))
        assert sorted(p.name for p in copies(tmp_path) if p.suffix == ".part") == ["living.tar.cached.900000000.part"]
        with pytest.raises(NoRoomError):
            Cache(described._replace(limit=900_000_000)).open(1, ahead=True)


def test_shards_are_fetched_before_they_are_read(shards, server, tmp_path):
    config = DataConfig(shards=server.url, streams=4, window=8, workers=0, cache=str(tmp_path), fetch_ahead=64)
    needs, place = Needs(waveform=False, fbank=True), Place(0, 1, torch.device("cpu"))
    with build_loader(config, None, part="train", needs=needs, batch_size=2, seed=1, place=place) as loader:
        iterator = loader.train_batches(0)
        next(iterator)
        wanted = {name for name in loader._index.shard_names if name.startswith("train")}
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and sum(p.suffix == ".cached" for p in copies(tmp_path)) < len(wanted):
            time.sleep(0.05)
        assert len(loader.touched) <= 4
        assert sum(p.suffix == ".cached" for p in copies(tmp_path)) == len(wanted)
        iterator.close()
