"""Remote shards: what comes out is what lies in the store, whatever the network, the disk and other ranks do."""

import contextlib
import errno
import fcntl
import http.server
import os
import re
import shutil
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import Value
from pathlib import Path

import numpy as np
import pytest
import torch
from s3fs import S3FileSystem

from pipeline import files
from pipeline.config import AugmentConfig, DataConfig
from pipeline.data import cache as cache_module
from pipeline.data import storage
from pipeline.data.ahead import Prefetcher
from pipeline.data.cache import FOLDER, Cache, NoRoomError, Remote
from pipeline.data.loader import Loader
from pipeline.data.manifest import load_manifest
from pipeline.errors import UserError
from shard_tools.esc50_archive import fetch_esc50
from tests.ranks import fork_context
from tests.stores import FlakyServer, upload

BATCH = 12


def batches(url, count=7, **data):
    """The first batches of one rank, as lists of tensors, and the loader's bad clips."""
    config = DataConfig(shards=str(url), streams=4, window=8, max_bad_share=1, **data)
    with Loader(config, batch_size=BATCH, seed=1) as loader:
        iterator = loader.batches(0)
        found = [next(iterator) for _ in range(count)]
        return [(b.row, b.waveform.clone(), b.fbank.clone(), b.targets) for b in found], dict(loader.bad)


def equal(one, other):
    return all(torch.equal(a, b) for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True))


@pytest.fixture
def server(shards):
    served = FlakyServer(shards)
    yield served
    served.close()


def remote(url, directory, cache, limit=0, job="a job"):
    shards = load_manifest(directory).shards
    return Remote([url] * len(shards), shards, str(cache), limit, job)


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
    with ProcessPoolExecutor(4, mp_context=fork_context()) as pool:
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


def test_a_store_that_sends_a_byte_now_and_then_is_given_up(shards, server, tmp_path, monkeypatch, caplog):
    """Shards from a web server, an object of S3's client, and ESC-50's archive."""
    monkeypatch.setattr(storage, "PATIENCE", 0.3)
    monkeypatch.setattr(storage, "LEAST_RATE", 1 << 24)
    monkeypatch.setattr(storage, "FIRST_WAIT", 0.01)
    described = remote(server.url, shards, tmp_path)
    server.faults[described.shards[0].name] = ["trickle"]
    assert content(Cache(described).open(0)) == (shards / described.shards[0].name).read_bytes()
    # Whichever of the two limits is met first: that of the blocks, or that of the whole.
    said = r"attempt 1 of 7: (\d+ bytes in \d+ s, which is too slow|no answer, or less than \d+)"
    assert re.search(said, caplog.text)

    (tmp_path / "bucket").mkdir()
    (tmp_path / "bucket" / "index").write_bytes(b"x" * 50_000)
    store = FlakyServer(tmp_path)
    for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY"):
        monkeypatch.setenv(f"AWS_{name}", "test")
    monkeypatch.setenv("AWS_ENDPOINT_URL", store.url)
    monkeypatch.setattr(S3FileSystem, "_cache", {})  # clients of other tests
    with monkeypatch.context() as patch:
        patch.setattr(storage, "PATIENCE", 60.0)
        assert storage.read_bytes("s3://bucket/index") == b"x" * 50_000  # a client's first request takes it seconds
    for url, fault in (("s3://bucket/index", "no answer, or less than 50000 bytes in 0 s"),
                       (f"{store.url}/bucket/index", r"bytes in \d+ s, which is too slow")):  # fmt: skip
        store.faults["bucket/index"] = ["trickle"]
        assert storage.read_bytes(url) == b"x" * 50_000  # the second try
        store.faults["bucket/index"] = ["trickle"] * 5
        with pytest.raises(OSError, match=f"index: .*{fault} .after 5 tries"):
            storage.read_bytes(url)
    store.faults["bucket/index"] = ["trickle"]
    with pytest.raises(UserError, match="which is too slow; try again, or give a copy at hand"):
        fetch_esc50(tmp_path / "root", f"{store.url}/bucket/index", None, True)
    store.close()


def test_a_full_disk_is_emptied_of_old_copies_or_ends_the_run(shards, server, tmp_path, monkeypatch):
    described = remote(server.url, shards, tmp_path)
    cache = Cache(described)
    os.close(cache.open(0))
    store, _ = cache._store(0)
    fetch, full = store.get_file, 1

    def get_file(source, target, callback, timeout):
        nonlocal full
        if full:
            full -= 1
            Path(target).write_bytes(b"half of it")
            raise OSError(errno.ENOSPC, "No space left on device", target)
        fetch(source, target, callback=callback, timeout=timeout)

    monkeypatch.setattr(store, "get_file", get_file)
    assert content(cache.open(1)) == (shards / described.shards[1].name).read_bytes()
    assert not any(described.shards[0].name in path.name for path in copies(tmp_path))  # made room
    full = 99
    with pytest.raises(UserError, match=r"disk full while fetching .*; free some, or point data.cache"):
        cache.open(2)
    assert len(copies(tmp_path)) == 1  # no half shard is left


@pytest.mark.parametrize("what", ["files", "folder"])
def test_a_cache_that_somebody_empties_is_filled_again(shards, server, tmp_path, what):
    """As cleaners of scratch disks do."""
    described = remote(server.url, shards, tmp_path / "cache")
    cache = Cache(described)
    for _ in range(2):
        for number, shard in enumerate(described.shards[:3]):
            assert content(cache.open(number)) == (shards / shard.name).read_bytes()
            if what == "folder":
                shutil.rmtree(tmp_path / "cache")
            else:
                for path in (tmp_path / "cache" / FOLDER).iterdir():
                    path.unlink()


def test_a_shard_that_somebody_deletes_while_it_comes_is_fetched_again(shards, server, tmp_path, monkeypatch):
    described, emptied = remote(server.url, shards, tmp_path), []
    sha256 = cache_module._sha256

    def hashed(path):
        if not emptied:
            emptied.append(path)
            path.unlink()
        return sha256(path)

    monkeypatch.setattr(cache_module, "_sha256", hashed)
    monkeypatch.setattr(cache_module, "BACKOFF", 0.01)
    assert content(Cache(described).open(0)) == (shards / described.shards[0].name).read_bytes()


@pytest.mark.parametrize("where", ["part", "note", "lock"])
def test_what_is_wrong_with_the_cache_makes_no_clip_bad(shards, server, tmp_path, monkeypatch, where):
    data = {"shards": server.url, "cache": str(tmp_path), "streams": 4, "window": 8, "max_bad_share": 1, "workers": 0}
    full = OSError(errno.ENOSPC, "No space left on device")
    opened = os.open

    def no_file(path, flags, *mode, **words):
        if flags & os.O_CREAT and str(path).endswith({"part": ".part", "lock": ".tar.lock"}.get(where, "\0")):
            raise full
        return opened(path, flags, *mode, **words)

    def no_note(*_):
        raise full

    with Loader(DataConfig(**data), batch_size=BATCH, seed=1) as loader:
        monkeypatch.setattr(os, "open", no_file)
        if where == "note":
            monkeypatch.setattr(os, "pwrite", no_note)
        with pytest.raises(UserError, match=r"data.cache = .*: No space left on device, with the copy of tr") as error:
            next(loader.batches())
        assert error.value.transient
        assert not loader.bad


def test_copies_are_evicted_as_nfs_wants_it_and_those_of_others_are_left(shards, server, tmp_path, monkeypatch):
    described = remote(server.url, shards, tmp_path)
    size = described.shards[0].size
    lock, unlink = fcntl.flock, Path.unlink

    def flock(descriptor, kind):
        reads = fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
        if kind & fcntl.LOCK_EX and reads:
            raise OSError(errno.EBADF, "Bad file descriptor")
        lock(descriptor, kind)

    def no_unlink(path, missing_ok=False):
        if path.suffix == ".cached":
            raise PermissionError(errno.EPERM, "Operation not permitted")
        unlink(path, missing_ok)

    monkeypatch.setattr(fcntl, "flock", flock)
    cache = Cache(described._replace(limit=size + size // 2))
    for number in range(3):
        os.close(cache.open(number))
        assert len(copies(tmp_path)) == 1
    monkeypatch.setattr(Path, "unlink", no_unlink)
    os.close(cache.open(3))
    assert len(copies(tmp_path)) == 2


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


@pytest.mark.parametrize("mixup", [0.0, 1.0])
def test_shards_are_fetched_before_they_are_read(shards, server, tmp_path, mixup, asked):
    """Those of mixup's other clips too: of one batch ahead they are more than the clips themselves lie in."""
    ahead = 1 if mixup else 64
    config = DataConfig(shards=server.url, streams=4, window=8, workers=0, cache=str(tmp_path), fetch_ahead=ahead,
                        sampler="balanced" if mixup else "shuffle")  # fmt: skip
    with Loader(config, augment=AugmentConfig(mixup=mixup), waveform=False, batch_size=2, seed=1) as loader:
        iterator = loader.batches(0)
        next(iterator)
        wanted = {shard.name for shard in loader.corpus.members[0].manifest.shards if shard.split == "train"}
        if mixup:
            draws = [loader.draw(step) for step in range(2)]
            rows = [row for draw in draws for part in (draw.rows, draw.partners) for row in part.tolist()]
            wanted = {shard for _, shard in loader.names(rows)}
            assert len(wanted) > len({shard for draw in draws for _, shard in loader.names(draw.rows.tolist())})
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and sum(p.suffix == ".cached" for p in copies(tmp_path)) < len(wanted):
            time.sleep(0.05)
        assert 0 < len(asked) <= 4 < len(wanted)
        assert sum(p.suffix == ".cached" for p in copies(tmp_path)) == len(wanted)
        iterator.close()


def test_fetching_ahead_keeps_up_with_batches_that_are_faster_than_the_store(monkeypatch):
    """The range moves with the newest batch, whatever is being fetched."""
    front = Value("l", -1)

    class Slow:
        def __init__(self, remote):
            pass

        def open(self, number, ahead):
            time.sleep(60)

    def shards_of(step):
        front.value = step
        return np.array([step])

    monkeypatch.setattr("pipeline.data.ahead.Cache", Slow)
    prefetcher = Prefetcher(None, shards_of, 8, 0, None)
    try:
        for step in range(400):
            prefetcher.advance(step)
        deadline = time.monotonic() + 50  # the first download takes longer
        while time.monotonic() < deadline and front.value < 407:
            time.sleep(0.05)
        assert front.value == 407
    finally:
        prefetcher.close()


@pytest.mark.parametrize("hung", [1, 3])
def test_a_process_that_hangs_before_it_fetches_is_replaced_or_done_without(monkeypatch, caplog, hung):
    """Its pipe would fill, and the training process wait for it, thousands of steps later."""
    forks, fork, front = [], os.fork, Value("l", -1)

    def hanging():
        child = fork()
        if child == 0 and len(forks) < hung:
            time.sleep(1000)
        forks.append(child)
        return child

    def shards_of(step):
        front.value = step
        return np.array([], np.int64)

    monkeypatch.setattr(os, "fork", hanging)
    monkeypatch.setattr(files, "BEGIN_SECONDS", 0.2 if hung == 3 else 10.0)  # others begin on a busy machine
    monkeypatch.setattr("pipeline.data.ahead.Cache", lambda remote: None)
    prefetcher = Prefetcher(None, shards_of, 8, 0, None)
    try:
        for step in range(50_000 if hung == 3 else 10):
            prefetcher.advance(step)
        deadline = time.monotonic() + 60
        while hung == 1 and front.value < 17:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert caplog.text.count("a forked process does not begin in ") == hung
        assert ("no process that fetches shards ahead begins: readers fetch them" in caplog.text) == (hung == 3)
        assert len(forks) == min(hung + 1, 3)
    finally:
        prefetcher.close()


DAMAGES = {
    "cut": lambda content: content[: len(content) // 2],
    "zeroed": lambda content: bytes(len(content)),
    "flipped": lambda content: content[:5000] + bytes([content[5000] ^ 1]) + content[5001:],
    "longer": lambda content: content + b"x",
    "empty": lambda content: b"",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_copy_that_a_crash_damaged_is_fetched_anew_by_the_next_job(shards, server, tmp_path, damage):
    described = remote(server.url, shards, tmp_path, job="first")
    name = described.shards[0].name
    os.close(Cache(described).open(0))
    (copy,) = copies(tmp_path)
    copy.write_bytes(DAMAGES[damage](copy.read_bytes()))
    for _ in range(3):
        descriptor = Cache(described._replace(job="second")).open(0)
        assert content(descriptor) == (shards / name).read_bytes()
        os.close(descriptor)
    assert server.gets[name] == 2


def test_a_copy_that_the_disk_cannot_read_any_more_is_fetched_anew(shards, server, tmp_path, monkeypatch):
    """In the middle of a job, which has compared it: no clip is bad for it."""
    expected, _ = batches(shards, workers=0)
    os.close(Cache(remote(server.url, shards, tmp_path)).open(0))
    config = {"workers": 0, "cache": str(tmp_path), "fetch_ahead": 0}
    batches(server.url, **config)
    bad = next(copy for copy in copies(tmp_path) if "train-000001" in copy.name).stat().st_ino
    fetched = server.gets["train-000001.tar"]

    def failing(call):
        def read(descriptor, *words):
            if os.fstat(descriptor).st_ino == bad:
                raise OSError(errno.EIO, "Input/output error")
            return call(descriptor, *words)

        return read

    for name in ("pread", "preadv"):
        monkeypatch.setattr(os, name, failing(getattr(os, name)))
    found, lost = batches(server.url, **config)
    assert not lost
    assert equal(found, expected)
    assert server.gets["train-000001.tar"] == fetched + 1


def test_a_job_reads_a_sound_copy_through_once_whatever_other_jobs_do(shards, server, tmp_path, monkeypatch):
    compared = []
    real = cache_module._is_whole
    monkeypatch.setattr(cache_module, "_is_whole", lambda *words: compared.append(words[1].name) or real(*words))
    described = remote(server.url, shards, tmp_path, job="first")
    os.close(Cache(described).open(0))
    assert not compared  # it was compared when it was fetched
    for job in ("second", "third", "first", "second", "third"):
        os.close(Cache(described._replace(job=job)).open(0))
    assert compared == [described.shards[0].name] * 2
    assert server.gets[described.shards[0].name] == 1


def test_a_lock_file_that_holds_anything_is_no_note(shards, server, tmp_path):
    described = remote(server.url, shards, tmp_path)
    os.close(Cache(described).open(0))
    (copy,) = copies(tmp_path)
    for text in (b"", b"[1", b"{}", b"[" * 5000, b"[1, 2, 3]", b"\xff\x00"):
        copy.with_suffix(".lock").write_bytes(text)
        os.close(Cache(described).open(0))
    assert server.gets[described.shards[0].name] == 1


def test_a_damaged_source_is_believed_once_per_job_though_the_clock_steps_back(shards, tmp_path, monkeypatch):
    damaged = tmp_path / "damaged"
    shutil.copytree(shards, damaged, ignore=shutil.ignore_patterns("source"))
    described = remote("", damaged, tmp_path / "cache")
    name = described.shards[0].name
    (damaged / name).write_bytes(DAMAGES["flipped"]((damaged / name).read_bytes()))
    served = FlakyServer(damaged)
    described = described._replace(urls=[served.url] * len(described.shards))
    monkeypatch.setattr(cache_module, "BACKOFF", 0.001)
    for _ in range(3):
        os.close(Cache(described).open(0))
        for path in copies(tmp_path / "cache"):
            os.utime(path, (0, 0))
    assert served.gets[name] == 3
    os.close(Cache(described._replace(job="next")).open(0))
    assert served.gets[name] == 6  # the next job asks whether it was mended
    served.close()


@pytest.mark.parametrize("kind", ["link", "fifo"])
def test_what_is_no_copy_is_refused_and_not_waited_for(shards, server, tmp_path, kind):
    described = remote(server.url, shards, tmp_path)
    cache = Cache(described)
    os.close(cache.open(0))
    (copy,) = copies(tmp_path)
    copy.unlink()
    if kind == "fifo":
        os.mkfifo(copy)
    else:
        copy.symlink_to("/etc/passwd")
    with pytest.raises(UserError, match=r"\.cached: .*remove it"):
        cache.open(0)


def test_a_body_without_end_is_cut_at_the_size_that_the_manifest_says(shards, tmp_path, monkeypatch):
    monkeypatch.setattr(cache_module, "BACKOFF", 0.001)
    name = load_manifest(shards).shards[0].name
    sent = 0

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            nonlocal sent
            self.send_response(200)
            self.end_headers()
            first = (shards / name).read_bytes() if not self.path.startswith("/other") else b""
            with contextlib.suppress(OSError):
                self.wfile.write(first)
                for _ in range(1 << 12):  # 4 GB: as good as without end
                    self.wfile.write(bytes(1 << 20))
                    sent += 1 << 20

        def log_message(self, *_):
            pass

    endless = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=endless.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{endless.server_port}"
    descriptor = Cache(remote(url, shards, tmp_path)).open(0)
    assert content(descriptor) == (shards / name).read_bytes()
    os.close(descriptor)
    described = remote(f"{url}/other", shards, tmp_path / "other")
    descriptor = Cache(described).open(0)
    assert content(descriptor) == bytes(described.shards[0].size)
    os.close(descriptor)
    with pytest.raises(UserError, match="more bytes, at most 134217728 were expected"):
        load_manifest(f"{url}/other")
    assert sent < 512 << 20
    endless.shutdown()
    endless.server_close()


def test_an_object_that_is_larger_than_the_manifest_says_is_read_to_that_size(shards, s3, tmp_path, monkeypatch):
    monkeypatch.setattr(cache_module, "BACKOFF", 0.001)
    longer = tmp_path / "longer"
    shutil.copytree(shards, longer, ignore=shutil.ignore_patterns("source"))
    described = remote("s3://longer-shards", longer, tmp_path / "cache")
    with (longer / described.shards[0].name).open("ab") as file:
        file.truncate(100 << 20)
    upload(longer, "longer-shards")
    descriptor = Cache(described).open(0)
    assert content(descriptor) == (shards / described.shards[0].name).read_bytes()
    os.close(descriptor)


@contextlib.contextmanager
def without_rights(folder):
    """Nothing can be written in a folder: for root by another user's rights."""
    folder.chmod(0o555)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        folder.chmod(0o755)


def test_a_complete_cache_that_cannot_be_written_is_read(shards, server, request):
    """And where one of its copies is damaged, or missing, it says so."""
    folder = Path(tempfile.mkdtemp(dir="/tmp"))  # pytest's own are closed to other users
    request.addfinalizer(lambda: shutil.rmtree(folder))
    folder.chmod(0o755)
    described = remote(server.url, shards, folder)
    for number in range(len(described.shards)):
        os.close(Cache(described).open(number))
    expected = [(shards / shard.name).read_bytes() for shard in described.shards]
    gets = server.gets.copy()
    with without_rights(folder / FOLDER):
        cache = Cache(described._replace(job="another"))
        for number, wanted in enumerate(expected):
            for _ in range(2):
                descriptor = cache.open(number)
                assert content(descriptor) == wanted
                os.close(descriptor)
    assert server.gets == gets
    name = described.shards[0].name
    copy = next(path for path in copies(folder) if name in path.name)
    copy.write_bytes(DAMAGES["flipped"](copy.read_bytes()))
    with without_rights(folder / FOLDER), pytest.raises(UserError, match="damaged, and cannot be fetched anew"):
        Cache(described).open(0)
    copy.unlink()
    with without_rights(folder / FOLDER), pytest.raises(UserError, match=f"cannot be written, and lacks {name}"):
        Cache(described).open(0)
