"""Reader processes: whoever dies or stops, the batches are right and nothing is left behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import xxhash

from pipeline.config import AugmentConfig, DataConfig
from pipeline.data.cache import Directory
from pipeline.data.loader import Needs, Place, build_loader
from pipeline.data.npy import Array
from pipeline.data.reader import FBANK, JOB, RAW_FBANK, RAW_WAVEFORM, WAVEFORM, Access, Reader
from pipeline.data.ring import Ring
from pipeline.errors import UserError
from tests.conftest import ROOT

BATCH = 8


def loader(shards, workers=2, needs=None, augment=None, **data):
    config = DataConfig(shards=str(shards), workers=workers, **data)
    needs = needs or Needs(waveform=True, fbank=True)
    place = Place(0, 1, torch.device("cpu"))
    return build_loader(config, augment, part="train", needs=needs, batch_size=BATCH, seed=3, place=place)


def readers(own):
    return [reader.process for ring in own._feed._rings for reader in ring._helpers]


def gone(pids, seconds=30):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not any(psutil.pid_exists(p) and psutil.Process(p).status() != psutil.STATUS_ZOMBIE for p in pids):
            return True
        time.sleep(0.05)
    return False


def test_killed_readers_are_replaced_and_no_batch_changes(shards, caplog):
    with loader(shards, workers=0) as own:
        batches = own.train_batches(0)
        expected = [next(batches).waveform.clone() for _ in range(12)]
    with loader(shards) as own:
        batches = own.train_batches(0)
        for number, reference in enumerate(expected):
            if number in (1, 6):
                for process in readers(own):
                    process.kill()
            assert torch.equal(next(batches).waveform, reference)
    assert "a reader process ended (status -9)" in caplog.text


def test_readers_that_die_of_the_same_task_end_the_run():
    ring = Ring(access(Directory("/", ())), 100, 1)
    region = ring.take()
    ring.start(region, np.zeros(5, np.uint8))  # no jobs: the reader cannot make sense of it
    with pytest.raises(UserError, match=r"3 reader processes ended .* lower data.workers or data.prefetch"):
        ring.finish(region)
    ring.close()


def access(source):
    return Access(source, Array("<i2", (160,)), Array("<f2", (16, 10)), 1, 0.0, 1.0)


def npy_header(dtype, shape, size, order=False, version=1):
    text = repr({"descr": dtype, "fortran_order": order, "shape": shape}).encode()
    length = size - 10
    return b"\x93NUMPY" + bytes([version, 0]) + length.to_bytes(2, "little") + text.ljust(length - 1) + b"\n"


@pytest.mark.parametrize("kind", [WAVEFORM, FBANK, RAW_WAVEFORM, RAW_FBANK])
@pytest.mark.parametrize(
    "header",
    [
        npy_header(">i2", (160,), 128),
        npy_header("<u2", (160,), 128),
        npy_header("<f2", (10, 16), 128),
        npy_header("<f2", (16, 10), 128, order=True),
        npy_header("<i2", (-160,), 128),
        npy_header("<i2", (160, 1), 128),
        npy_header("|O", (160,), 128),
        npy_header("<i2", (160,), 120)[:110] + b"\n" * 18,
        npy_header("<i2", (160,), 128, version=9),
        npy_header([("a", "<i2")], (160,), 128),
        b"\x93NUMPY\x01\x00\x76\x00" + b"(" * 118,
        b"x" * 128,
    ],
)
def test_a_header_that_says_something_else_is_a_bad_clip(tmp_path, header, kind):
    """Its hash is that of the index: written so."""
    stored = header + bytes(320)
    (tmp_path / "tar").write_bytes(stored)
    jobs = np.zeros(1, JOB)
    jobs["kind"], jobs["size"], jobs["length"], jobs["start"], jobs["room"] = kind, len(stored), 320, 128, 640
    jobs["xxh3"] = xxhash.xxh3_64_intdigest(stored)
    reader, memory = Reader(access(Directory(str(tmp_path), ("tar",)))), np.zeros(1024, np.uint8)
    ((_, problem),) = reader.fill(jobs, memory)
    assert "header" in problem
    reader.close()


@pytest.mark.parametrize("header", [80, 128, 192])
def test_stored_numbers_lie_at_their_place_whatever_the_header_before_them(tmp_path, header):
    """A usual header is read along, into the space before the numbers; a longer one leaves the row before alone."""
    stored = npy_header("<i2", (160,), header) + np.random.default_rng(0).bytes(320)
    (tmp_path / "tar").write_bytes(b"x" * 512 + stored)
    jobs = np.zeros(2, JOB)
    jobs["clip"], jobs["kind"], jobs["offset"] = (0, 1), RAW_WAVEFORM, 512
    jobs["size"], jobs["length"] = header + 320, 320
    jobs["xxh3"], jobs["start"], jobs["room"] = xxhash.xxh3_64_intdigest(stored), (128, 576), 320
    reader, memory = Reader(access(Directory(str(tmp_path), ("tar",)))), np.zeros(1024, np.uint8)
    assert reader.fill(jobs, memory) == []
    for start in (128, 576):
        assert memory[start : start + 320].tobytes() == stored[header:]
    assert not memory[896:].any()
    jobs["size"] = 300
    assert reader.fill(jobs, memory) == [(i, "300 bytes are in the index, its format has 320") for i in (0, 1)]
    reader.close()


def test_an_iterator_that_is_dropped_ends_its_readers_and_the_next_one_starts_anew(shards):
    with loader(shards) as own:
        batches = own.train_batches(0)
        first = next(batches).row
        pids = [process.pid for process in readers(own)]
        assert len(pids) == 2
        del batches
        assert gone(pids)
        assert torch.equal(next(own.train_batches(0)).row, first)
        left = own.train_batches(5)
        next(left)
        pids = [process.pid for process in readers(own)]
    assert gone(pids)  # closing the loader ends them too


def test_an_idle_consumer_stops_the_readers(shards):
    with loader(shards, prefetch=3) as own:
        batches = own.train_batches(0)
        next(batches)
        time.sleep(0.5)
        clip = own.manifest.audio.samples * 2 + own.manifest.fbank.frames * 256 + 2 * 128  # and two .npy headers
        assert sum(own.touched.values()) == (1 + 3) * BATCH * clip  # one batch taken, three in flight


CONSUMER = """
import sys, time, torch
from tests.data.test_ring import loader, readers
own = loader(sys.argv[1])
batches = own.train_batches(0)
next(batches)
print(*[process.pid for process in readers(own)], flush=True)
time.sleep(600)
"""


def test_kill_9_leaves_no_process_and_no_shared_memory(shards):
    before = set(Path("/dev/shm").iterdir())
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", CONSUMER, str(shards)]
    with subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True) as consumer:
        pids = [int(word) for word in consumer.stdout.readline().split()]
        assert len(pids) == 2
        assert all(psutil.pid_exists(pid) for pid in pids)
        consumer.send_signal(signal.SIGKILL)
    assert gone(pids)
    assert {path for path in Path("/dev/shm").iterdir() if path.name.startswith("craft")} <= before


@pytest.mark.parametrize("workers", [0, 2])
def test_memory_is_used_again_only_when_nobody_refers_to_it(shards, workers):
    with loader(shards, workers) as own:
        batches = own.train_batches(0)
        held = [next(batches) for _ in range(6)]
        views = [batch.fbank[2:5].transpose(1, 2) for batch in held[:3]]
        copies = [(batch.waveform.clone(), batch.fbank.clone()) for batch in held]
        kept, lost = held[3:], {batch.waveform.data_ptr() for batch in held[:2]}
        del held
        later = [next(batches) for _ in range(6)]
        addresses = {batch.waveform.data_ptr() for batch in [*kept, *later]}
        assert len(addresses) == 9
        assert not addresses & lost  # their fbanks are in use
        for view, (_, fbank) in zip(views, copies, strict=False):
            assert torch.equal(view, fbank[2:5].transpose(1, 2))
        for batch, (waveform, fbank) in zip(kept, copies[3:], strict=True):
            assert torch.equal(batch.waveform, waveform)
            assert torch.equal(batch.fbank, fbank)
        del views, later, batch, view
        assert len({next(batches).waveform.data_ptr() for _ in range(20)}) < 12
        batches.close()
    assert torch.equal(kept[0].waveform, copies[3][0])  # also when the readers are gone


@pytest.mark.parametrize(
    ("needs", "augment", "fbank", "members"),
    [
        (Needs(False, True), None, "auto", {"fbank"}),  # ssast
        (Needs(True, False), None, "auto", {"waveform"}),
        (Needs(True, True), AugmentConfig(mixup=0.5), "auto", {"waveform", "partner"}),  # swab finetuning
        (Needs(False, True), None, "online", {"waveform"}),
        (Needs(True, True), None, "auto", {"waveform", "fbank"}),
    ],
)
def test_only_what_the_method_needs_is_read(shards, needs, augment, fbank, members):
    with loader(shards, 0, needs, augment, fbank=fbank) as own:
        batch = next(own.train_batches(0))
        assert set(own._feed._layout.used) == members
        sizes = {"waveform": own.manifest.audio.samples * 2, "fbank": own.manifest.fbank.frames * 256}
        asked = sum(own.touched.values()) / BATCH
        once = sum(sizes[m] + 128 for m in members - {"partner"})
        assert once <= asked <= once + ("partner" in members) * (sizes["waveform"] + 128)
    assert (batch.waveform is not None, batch.fbank is not None) == (needs.waveform, needs.fbank)
