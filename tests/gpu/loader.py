"""The loader onto the device: batches stay whole whatever runs late, and cost the device no time.

In: the shards. Out: hashes of batches that a late stream reads against those of a loader onto the CPU; rates of the
copy, what of it a computing consumer notices, and clips a second of the loader alone.

A slot of pinned memory that is filled again too early shows where the copies run late; device memory that is given away
too early, or is read before it is there, shows where the consumer runs late. Both are made late here by a kernel that
waits.
"""

import itertools
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import xxhash

from pipeline.config import AugmentConfig, DataConfig
from pipeline.data.loader import Loader
from pipeline.data.pool import Arrays
from pipeline.flow import Batch
from tests.gpu.environment import median_seconds
from tests.gpu.report import Check

CLIPS = 16
TENSORS = ("position", "row", "valid", "waveform", "fbank", "targets", "length")
# Cycles of a GPU's clock, some 1.7 a ns, by which copies and reads are late, in turn: now the one waits, now the other.
COPY_CYCLES, READ_CYCLES = (0, 1_000_000, 16_000_000, 0), (12_000_000, 0, 0, 1_000_000)
LONG = 400_000_000
BEHIND = 6  # batches that the host is ahead of the consumer
CONSUMER_SECONDS = 0.02


def run(check: Check) -> None:
    batches, mixed = (40, 10) if check.small else (500, 100)
    check.attempt("late", late, "late", AugmentConfig(), True, batches)
    check.attempt("late_mixed", late, "late_mixed", AugmentConfig(mixup=0.5, roll=0.1), False, mixed)
    check.attempt("copy", copy)
    check.attempt("hidden", hidden)
    check.attempt("rates", rates)


def late(check: Check, name: str, augment: AugmentConfig, fbank: bool, count: int) -> None:
    """Every tensor of `count` batches."""
    begun = time.perf_counter()
    data = DataConfig(shards=str(check.shards), workers=2 if check.small else 4)
    options = {"augment": augment, "fbank": fbank, "batch_size": CLIPS, "seed": 5}
    with Loader(data, device="cpu", raw=False, **options) as loader:
        expected = [_hashes(batch) for batch in loader.batches(0, count)]
    with Loader(data, device=check.device, raw=True, **options) as loader:
        found = list(_read_late(loader, count, check.device))
        slots = len(loader._pool._memory)
    wrong = {tensor: [step for step, (one, other) in enumerate(zip(found, expected, strict=True))
                      if one[tensor] != other[tensor]] for tensor in expected[0]}  # fmt: skip
    values = ", ".join(f"{tensor} {len(steps)}" + (f" (first {steps[:3]})" if steps else "")
                       for tensor, steps in wrong.items())  # fmt: skip
    check.test(name, not any(wrong.values()),
               f"of {count} batches in {slots} slots differ: {values}; {time.perf_counter() - begun:.1f} s", "0")


def _hashes(batch: Batch) -> dict[str, int]:
    found = {name: getattr(batch, name) for name in TENSORS}
    return {name: xxhash.xxh3_64_intdigest(tensor.cpu().contiguous().numpy().data)
            for name, tensor in found.items() if tensor is not None}  # fmt: skip


def _read_late(loader: Loader, count: int, device: torch.device) -> Iterator[dict[str, int]]:
    """Hashes of batches whose copies start late, and which a stream reads late that the host runs ahead of.

    On a CPU, which has no streams, just hashes.
    """
    if device.type == "cpu":
        yield from map(_hashes, loader.batches(0, count))
        return
    assemble, copies, reads = loader._assemble, itertools.cycle(COPY_CYCLES), itertools.cycle(READ_CYCLES)

    def delayed(arrays: Arrays) -> Batch:
        torch.cuda._sleep(next(copies))  # type: ignore[no-untyped-call]
        return assemble(arrays)

    loader._assemble = delayed  # type: ignore[assignment]
    consumer, kept = torch.cuda.Stream(device), deque[tuple[torch.cuda.Event, Batch]]()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(consumer):
        for batch in loader.batches(0, count):
            torch.cuda._sleep(next(reads))  # type: ignore[no-untyped-call]
            tensors = {name: getattr(batch, name) for name in TENSORS}
            copied = {name: None if one is None else one.clone() for name, one in tensors.items()}
            kept.append((consumer.record_event(), Batch(**copied, frames=batch.frames)))
            del batch, tensors  # nobody but the late stream needs their memory from here on
            if len(kept) > BEHIND:
                yield _settled(kept)
        while kept:
            yield _settled(kept)


def _settled(kept: "deque[tuple[torch.cuda.Event, Batch]]") -> dict[str, int]:
    event, batch = kept.popleft()
    event.synchronize()
    with torch.cuda.stream(torch.cuda.default_stream()):  # behind nothing that is still late
        return _hashes(batch)


def copy(check: Check) -> None:
    """Out of the loader's memory as fast as out of memory that torch pinned, and without the host waiting."""
    data = DataConfig(shards=str(check.shards), workers=0)
    with Loader(data, batch_size=16 if check.small else 128, fbank=False, device=check.device, raw=True) as loader:
        slot = loader._pool.take()
        source = torch.from_numpy(loader._pool.arrays(slot)["waveform"])
        source.fill_(1)
        plain = torch.empty(source.shape, dtype=source.dtype, pin_memory=not check.small).fill_(1)
        target = torch.empty(source.shape, dtype=source.dtype, device=check.device)
        rates = {name: source.nbytes / 1e9 / median_seconds(lambda m=memory: target.copy_(m, non_blocking=True),
                                                            check.device)
                 for name, memory in (("loader", source), ("pinned", plain))}  # fmt: skip
        values = ", ".join(f"{name} {rate:.3g} GB/s" for name, rate in rates.items())
        if check.small:
            check.info("copy", f"{values}, {source.nbytes / 1e6:.3g} MB")
        else:
            check.test("copy", rates["loader"] >= 0.9 * rates["pinned"], f"{values}, {source.nbytes / 1e6:.3g} MB; "
                       f"is_pinned {source.is_pinned()}", "loader >= 0.9 pinned")  # fmt: skip
            torch.cuda.synchronize()
            torch.cuda._sleep(LONG)  # type: ignore[no-untyped-call]
            begun = time.perf_counter()
            target.copy_(source, non_blocking=True)
            returned = time.perf_counter() - begun
            torch.cuda.synchronize()
            done = time.perf_counter() - begun
            check.test("copy_returns", returned < done / 4, f"host after {1e3 * returned:.3g} ms, device after "
                       f"{1e3 * done:.3g} ms", "host < device / 4")  # fmt: skip
        loader._pool.release(slot)
        del source


def hidden(check: Check) -> None:
    """A consumer that computes, with batches and without; how long the device stands still for a batch."""
    device, count, clips = check.device, 20 if check.small else 60, 16 if check.small else 32
    side = 128 if check.small else 8192
    square = torch.randn(side, side, device=device, dtype=torch.float32 if check.small else torch.bfloat16)
    product = torch.empty_like(square)
    times = max(1, round((0.002 if check.small else CONSUMER_SECONDS)
                         / median_seconds(lambda: torch.mm(square, square, out=product), device)))  # fmt: skip

    def consume() -> None:
        for _ in range(times):
            torch.mm(square, square, out=product)

    _wait(device)
    begun = time.perf_counter()
    for _ in range(count):
        consume()
    _wait(device)
    alone = time.perf_counter() - begun
    data = DataConfig(shards=str(check.shards), workers=1 if check.small else 4)
    with Loader(data, batch_size=clips, device=device, raw=True) as loader:
        first = data.workers + data.prefetch
        batches = loader.batches()
        for _ in itertools.islice(batches, first):
            pass
        _wait(device)
        begun = time.perf_counter()
        for _ in itertools.islice(batches, count):
            _wait(device)
        load = time.perf_counter() - begun
        host, stalls = 0.0, []
        _wait(device)
        start = time.perf_counter()
        for _ in range(count):
            with _stall(device, stalls):
                asked = time.perf_counter()
                batch = next(batches)
                host += time.perf_counter() - asked
            consume()
            del batch
        _wait(device)
        both = time.perf_counter() - start
    stalled = sum(one.elapsed_time(other) / 1e3 for one, other in stalls) if stalls else host
    values = (f"a batch of {clips}: consumer {1e3 * alone / count:.3g} ms, loader {1e3 * load / count:.3g} ms, both "
              f"{1e3 * both / count:.3g} ms: {100 * (1 - max(0.0, both - alone) / load):.0f} % hidden; data wait: host "
              f"{1e3 * host / count:.3g} ms, device {1e3 * stalled / count:.3g} ms")  # fmt: skip
    if check.small:
        check.info("hidden", values)
    else:
        check.test("hidden", both <= 1.05 * alone and stalled <= 0.05 * alone, values,
                   "both <= 1.05 consumer, device wait <= 0.05")  # fmt: skip


@contextmanager
def _stall(device: torch.device, found: list[tuple[torch.cuda.Event, torch.cuda.Event]]) -> Iterator[None]:
    """Events of the current stream before and behind what is inside."""
    if device.type == "cpu":
        yield
        return
    before, behind = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before.record()
    yield
    behind.record()
    found.append((before, behind))


def rates(check: Check) -> None:
    """Clips a second of the loader alone."""
    seconds, clips = (0.2, 16) if check.small else (2.0, 32)
    for workers in (1, 2) if check.small else (2, 4, 8):
        found = {form: _rate(check, DataConfig(shards=str(check.shards), workers=workers, fbank=form), clips, seconds)
                 for form in ("online", "stored")}  # fmt: skip
        check.info(f"rate.workers_{workers}", f"waveform, fbank on the device {found['online']:,.0f} clips/s; both "
                                              f"stored {found['stored']:,.0f} clips/s")  # fmt: skip


def _rate(check: Check, data: DataConfig, clips: int, seconds: float) -> float:
    with Loader(data, batch_size=clips, device=check.device, raw=True) as loader:
        batches = loader.batches()
        for _ in itertools.islice(batches, 2 * data.workers):  # until all readers have begun
            pass
        _wait(check.device)
        begun, seen = time.perf_counter(), 0
        for _ in batches:
            seen += clips
            if time.perf_counter() - begun > seconds:
                break
        _wait(check.device)
        return seen / (time.perf_counter() - begun)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
