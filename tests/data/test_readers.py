"""Reader processes: whoever dies or stops, the batches are right and nothing is left behind."""

import errno
import mmap
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
import xxhash

from pipeline import files
from pipeline.config import AugmentConfig, DataConfig
from pipeline.data.loader import Loader
from pipeline.data.npy import Array
from pipeline.data.pool import Pool
from pipeline.data.reader import Reader
from pipeline.errors import UserError
from pipeline.files import open_regular
from tests.conftest import ROOT

BATCH = 8


def loader(shards, workers=2, **data):
    return Loader(DataConfig(shards=str(shards), workers=workers, **data), batch_size=BATCH, seed=3)


def readers():
    """Those of this process, which has started nothing else with multiprocessing here."""
    return [psutil.Process(child.pid) for child in multiprocessing.active_children()]


def lives(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def until(happened, seconds=120):
    deadline = time.monotonic() + seconds
    while not happened():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def test_killed_readers_are_replaced_and_no_batch_changes(shards, caplog):
    """Nor by signals that are for the training process; whose random numbers stay as they are."""
    with loader(shards, workers=0) as own:
        batches = own.batches()
        expected = [next(batches).waveform.clone() for _ in range(30)]
    state = torch.get_rng_state()
    with loader(shards) as own:
        batches = own.batches()
        for number, reference in enumerate(expected):
            if number in (1, 12):
                for process in readers()[: 1 if number == 1 else None]:
                    process.kill()
            if number == 22:
                before = readers()
                for process in before:
                    for ignored in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
                        subprocess.run(["kill", f"-{ignored.value}", str(process.pid)], check=True)
            assert torch.equal(next(batches).waveform, reference)
        assert set(readers()) == set(before)
    assert caplog.text.count("a reader process ended (status -9)") == 3
    assert not readers()
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("always", [False, True])
def test_a_fork_that_hangs_before_it_begins_is_replaced(shards, monkeypatch, caplog, always):
    """One hung on a lock that another thread held at that moment, and in the midst of an evaluation the run with it."""
    with loader(shards, workers=0) as own:
        batches = own.batches()
        expected = [next(batches).waveform.clone() for _ in range(30)]  # many more than are read ahead
    forks, parent, fork = [], os.getpid(), os.fork

    def hanging():
        child = fork()
        if child == 0 and (always or len(forks) in (0, 3)):
            time.sleep(1000)
        forks.append(child)
        return child

    monkeypatch.setattr(os, "fork", hanging)
    monkeypatch.setattr(files, "BEGIN_SECONDS", 0.2 if always else 10.0)  # others begin on a busy machine
    with loader(shards) as own:
        batches = own.batches()
        if always:
            with pytest.raises(UserError, match="3 reader processes hung before they began; start the run") as error:
                next(batches)
            assert error.value.transient
            assert len(forks) == 4  # two, and two more in place of the first
        else:
            for number, reference in enumerate(expected):
                if number == 3:
                    readers()[0].kill()
                assert torch.equal(next(batches).waveform, reference)
            assert len(forks) == 5  # two and one for the first, one for the killed one and one for that one
            assert caplog.text.count("a forked process does not begin in 10 s and is killed") == 2
    assert os.getpid() == parent
    assert not readers()


def test_readers_that_die_of_the_same_clips_end_the_run(shards, monkeypatch):
    with loader(shards) as own:
        batches = own.batches(3)
        next(batches)
        monkeypatch.setattr(Reader, "read", lambda *_: os._exit(3))  # of the readers that are started from now on
        for process in readers():
            process.kill()
        with pytest.raises(
            UserError, match=r"3 reader processes ended .* lower data.workers or data.prefetch"
        ) as error:
            list(batches)
        assert error.value.transient
        assert not readers()


@pytest.mark.parametrize("killed", [False, True])
def test_a_reader_that_cannot_be_started_is_one_line(shards, monkeypatch, killed):
    def fork():
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    with loader(shards) as own:
        batches = own.batches()
        if killed:
            next(batches)
            for process in readers():
                process.kill()
        monkeypatch.setattr(os, "fork", fork)
        with pytest.raises(UserError, match=r"started: Cannot allocate memory; lower data.workers") as error:
            list(batches)
        assert error.value.transient
        assert not readers()


def test_an_error_of_a_reader_is_raised_as_it_is(shards, monkeypatch):
    def read(*_):
        raise UserError("the store is away", transient=True)

    monkeypatch.setattr(Reader, "read", read)
    with loader(shards) as own, pytest.raises(UserError, match=r"^the store is away$") as error:
        next(own.batches())
    assert error.value.transient

    def broken(*_):
        raise RuntimeError("a bug")

    monkeypatch.setattr(Reader, "read", broken)
    with loader(shards) as own, pytest.raises(RuntimeError, match="a bug"):
        next(own.batches())


def reader_of(folder):
    arrays = {"waveform": Array("<i2", (160,)), "fbank": Array("<f2", (16, 10))}
    return Reader(lambda *_: open_regular(folder / "tar"), arrays, 0.0, 1.0, 1)


def npy_header(dtype, shape, size, order=False, version=1):
    text = repr({"descr": dtype, "fortran_order": order, "shape": shape}).encode()
    length = size - 10
    return b"\x93NUMPY" + bytes([version, 0]) + length.to_bytes(2, "little") + text.ljust(length - 1) + b"\n"


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("member", ["waveform", "fbank"])
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
def test_a_header_that_says_something_else_is_a_bad_clip(tmp_path, header, member, raw):
    """Its hash is that of the index: written so."""
    stored = header + bytes(320)
    (tmp_path / "tar").write_bytes(stored)
    reader = reader_of(tmp_path)
    out = np.zeros(448, np.uint8) if raw else np.zeros((16, 10) if member == "fbank" else 160, np.float32)
    assert "header" in reader.read(member, 0, (0, len(stored), xxhash.xxh3_64_intdigest(stored)), out)
    reader.close()


@pytest.mark.parametrize("header", [80, 128, 192])
def test_stored_numbers_lie_at_their_place_whatever_the_header_before_them(tmp_path, header):
    """A usual header is read along, into the space before the numbers; a longer one leaves the row before alone."""
    stored = npy_header("<i2", (160,), header) + np.random.default_rng(0).bytes(320)
    (tmp_path / "tar").write_bytes(b"x" * 512 + stored)
    reader, rows = reader_of(tmp_path), np.zeros((2, 448), np.uint8)
    place = (512, len(stored), xxhash.xxh3_64_intdigest(stored))
    for row in rows:
        assert reader.read("waveform", 0, place, row) is None
    for row in rows:
        assert row[128:].tobytes() == stored[header:]
    assert reader.read("waveform", 0, (512, 300, 0), rows[1]) == "300 bytes are in the index, its format has 320"
    reader.close()


def test_an_iterator_that_is_dropped_ends_its_readers_and_the_next_one_starts_anew(shards):
    with loader(shards) as own:
        batches = own.batches()
        first = next(batches).row
        assert len(readers()) == 2
        del batches
        assert not readers()
        assert torch.equal(next(own.batches()).row, first)
        left = own.batches(5)
        next(left)
        assert len(readers()) == 2
    assert not readers()  # closing the loader ends them too


@pytest.mark.parametrize(("workers", "prefetch"), [(2, 3), (3, 1)])
def test_an_idle_consumer_stops_the_readers(shards, tmp_path, workers, prefetch):
    """What they have read is right though the shards are lost: three batches, so that each reader has one."""
    shutil.copytree(shards, tmp_path / "copy", ignore=shutil.ignore_patterns("source"))
    with loader(tmp_path / "copy", workers, prefetch=prefetch, max_bad_share=1) as own:
        batches = own.batches()
        next(batches)
        read, last, idle = 0, -1, False
        while read != last or not idle:  # one that reads runs, or waits for a processor or a disk: it does not sleep
            time.sleep(0.5)
            last, read = read, sum(process.io_counters().read_chars for process in readers())
            idle = all(process.status() == psutil.STATUS_SLEEPING for process in readers())
        for tar in (tmp_path / "copy").glob("train-*.tar"):
            os.truncate(tar, 0)
        for _ in range(3):
            next(batches)
        assert not own.bad
        with pytest.raises(UserError, match="no clip can be read"):
            next(batches)


CONSUMER = """
import sys, time, psutil
from pipeline.data.loader import Loader
batches = iter(Loader(sys.argv[1]))
next(batches)
print(*[process.pid for process in psutil.Process().children()], flush=True)
time.sleep(float(sys.argv[2]))
"""


@pytest.mark.parametrize("seconds", [600, 0])
def test_the_end_of_the_training_process_leaves_no_process_and_no_shared_memory(shards, seconds):
    """By kill -9, at once; and by its own end, with nothing closed."""
    before = set(Path("/dev/shm").iterdir())
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", CONSUMER, str(shards), str(seconds)]
    with subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True) as consumer:
        pids = [int(word) for word in consumer.stdout.readline().split()]
        assert len(pids) == 2
        if seconds:
            consumer.send_signal(signal.SIGKILL)
        else:
            assert consumer.wait(120) == 0
        assert until(lambda: not any(map(lives, pids)))
    # What other processes make there goes again; what was left stays.
    assert until(lambda: {path for path in Path("/dev/shm").iterdir() if path.name.startswith(("craft", "torch"))}
                 <= before)  # fmt: skip


@pytest.mark.parametrize("workers", [0, 2])
def test_memory_is_used_again_only_when_nobody_refers_to_it(shards, workers):
    with loader(shards, workers) as own:
        batches = own.batches(0)
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


class Copy:
    """A GPU's copy of a slot, done when somebody waits for it or sets it so: an event as `Pool` sees one."""

    done = False

    def query(self):
        return self.done

    def synchronize(self):
        self.done = True


def test_a_slot_is_pinned_once_and_filled_again_when_its_copy_is_done(monkeypatch):
    pinned, calls = set(), []
    runtime = SimpleNamespace(
        cudaHostRegister=lambda address, size, flags: calls.append(size) or pinned.add(address) or 0,
        cudaHostUnregister=lambda address: pinned.remove(address) or 0,
    )
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    kind = np.dtype({"names": ["row"], "formats": [("<i8", 4)], "itemsize": mmap.PAGESIZE})
    pool, copies = Pool(kind, pinned=True), []

    def copied():
        slot = pool.take()
        copies.append(Copy())
        pool.copied(pool.release(slot), copies[-1])
        return slot

    assert [copied() for _ in range(5)] == [0, 1, 2, 0, 1]  # three copies under way, the oldest is waited for
    assert [copy.done for copy in copies] == [True, True, False, False, False]
    copies[2].done = True
    assert [copied(), copied()] == [2, 0]
    assert [copy.done for copy in copies] == [True] * 4 + [False] * 3
    assert calls == [mmap.PAGESIZE] * 3
    assert len(pinned) == 3
    pool.close()
    assert all(copy.done for copy in copies)
    assert not pinned


@pytest.mark.parametrize(
    ("needs", "augment", "fbank", "members"),
    [
        ((False, True), None, "auto", {"fbank"}),  # ssast
        ((True, False), None, "auto", {"waveform"}),
        ((True, True), AugmentConfig(mixup=0.5), "auto", {"waveform", "partner"}),  # swab finetuning
        ((False, True), None, "online", {"waveform"}),
        ((True, True), None, "auto", {"waveform", "fbank"}),
    ],
)
def test_only_what_the_method_needs_is_read(shards, asked, needs, augment, fbank, members):
    waveform, wants_fbank = needs
    data = DataConfig(shards=str(shards), workers=0, fbank=fbank)
    with Loader(data, augment=augment, waveform=waveform, fbank=wants_fbank, batch_size=BATCH, seed=3) as own:
        batch = next(own.batches())
        sizes = {"waveform": own.corpus.audio.samples * 2, "fbank": own.corpus.fbank.frames * 256}
        once = sum(sizes[m] + 128 for m in members - {"partner"})
        assert once <= asked.total() / BATCH <= once + ("partner" in members) * (sizes["waveform"] + 128)
    assert (batch.waveform is not None, batch.fbank is not None) == needs
