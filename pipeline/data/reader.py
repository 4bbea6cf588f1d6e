"""Members of clips: read in place out of the tars, checked, and converted where a CPU will use them.

In: a member's shard, offset, size and hash, and the row of a batch for it. Out: the row filled, or what is wrong.

A clip is one or two preads at the index's offsets; the tar is never walked, so a tar that was cut or
overwritten cannot pass as a shorter data set. Each member is checked against its xxh3 while it is in the core's
cache, and its .npy header with the manifest's format. Cost per clip is constant; open files are bounded.

A shard that is away for a moment (a name that a node remembers as missing) is asked for again after a short wait, and
where that does not help every RETRY_SECONDS: its clips are replaced meanwhile, not for good. Where the whole directory
is away (a file server that restarts, a mount that was lost), no clip is at fault: it is waited for, and then the run
ends. So it is where a process may open no more files: shards are closed, and opened again when they are needed.

For a CPU, int16 and float16 become float32 here, in numpy, while they are in the cache: they cross the memory's bus
once as float32, as in a plain copy. numpy converts float16 one number at a time; shifting a whole array's exponents
into place takes a sixth of that.
"""

import errno
import logging
import os
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import xxhash

from pipeline.data.npy import HEADER, Array, header_problem
from pipeline.errors import UserError
from pipeline.files import TOO_MANY_OPEN, open_regular

log = logging.getLogger(__name__)

INT16_SCALE = 1 / 32768  # a power of two: exact
REBIAS = np.float32(2.0**112)  # exponents of float16 count from -15, of float32 from -127
SIGN_AND_REST = np.int32(-0x70002000)  # 0x8fffe000: what is left of a sign-extended float16 shifted by 13 bits
NOT_FINITE = 0xF800  # and above: infinities and NaNs without their sign bit
WAITS = (0.1, 0.4, 1.0)  # seconds before a shard that could be opened a moment ago is given up for a while
HEADERS_KEPT = 16  # spellings of the same header
RETRY_SECONDS = 30.0  # between further tries
PASSING = (errno.ENOENT, errno.ESTALE, errno.EIO, errno.ETIMEDOUT, errno.ENOTCONN)
OUTAGE_SECONDS = 60.0  # that a whole directory may be away
POLL_SECONDS = 0.1


class Reader:
    """Reads members of shards; used by one thread.

    Args:
        open_shard: Number of a shard, and whether the disk could not read what was opened last -> descriptor to read
            it from. Raises OSError where it is not there, or where no more files can be opened.
        arrays: What the members "waveform" and "fbank" are.
        mean, std: Normalisation of fbanks.
        open_files: Shards that are kept open.
        absent: Numbers of shards that were not there at the start: nobody waits for them.
    """

    def __init__(
        self,
        open_shard: Callable[[int, bool], int],
        arrays: dict[str, Array],
        mean: float,
        std: float,
        open_files: int,
        absent: frozenset[int] = frozenset(),
    ) -> None:
        self._open_shard, self._arrays, self._mean, self._std = open_shard, arrays, mean, std
        self._limit = open_files
        self._open: OrderedDict[int, int] = OrderedDict()  # shard -> descriptor, most recently used last
        self._lost: dict[int, tuple[str, float]] = dict.fromkeys(absent, ("not there", 0.0))
        # Of each member the bytes of its numbers, and the headers that were found right.
        self._known: dict[str, tuple[int, set[bytes]]] = {name: (array.size, set()) for name, array in arrays.items()}
        self._scratch = bytearray(0)

    def read(self, member: str, shard: int, place: tuple[int, int, int], out: np.ndarray) -> str | None:
        """Reads, checks and converts one member.

        Args:
            member: "waveform" or "fbank".
            shard: Number of its tar.
            place: Offset, size and xxh3 of the member in it, the .npy header included.
            out: float32 for the numbers: [L] in [-1, 1), or [T, M] normalised. Or uint8 for the stored bytes: those of
                the numbers begin behind the HEADER first ones.

        Returns:
            What is wrong with it; None: nothing. Else `out` may hold anything.

        Raises:
            UserError: the shard cannot be had for now.
        """
        offset, size, xxh3 = place
        payload, headers = self._known[member]
        header = size - payload
        if header < 0:
            return f"{size} bytes are in the index, its format has {payload}"
        raw = out.itemsize == 1
        if raw and header <= HEADER:
            found = out.data[HEADER - header : HEADER + payload]
        else:
            if len(self._scratch) < size:
                self._scratch = bytearray(size)
            found = memoryview(self._scratch)[:size]
        try:
            count = self._pread(shard, found, offset)
        except OSError as error:
            return error.strerror or str(error)
        if count != size:
            return f"{count} of {size} bytes: the tar is cut"
        if xxhash.xxh3_64_intdigest(found) != xxh3:
            return "its hash differs from the index: damaged"
        head = bytes(found[:header])
        if head not in headers:
            problem = header_problem(head, self._arrays[member])
            if problem is not None:
                return problem
            if len(headers) < HEADERS_KEPT:
                headers.add(head)
        if not raw and member == "waveform":
            waveform_floats(np.frombuffer(found, np.int16, offset=header), out)
        elif not raw:
            fbank_floats(np.frombuffer(found, np.float16, offset=header), out.reshape(-1), self._mean, self._std)
        elif header > HEADER:
            out[HEADER : HEADER + payload] = found[header:]
        return None

    def close(self) -> None:
        """Closes the shards."""
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()

    def _pread(self, shard: int, memory: memoryview, offset: int) -> int:
        """Fills memory from a shard; returns how many bytes there were.

        Raises:
            OSError: it is not there, or cannot be read.
            UserError: it cannot be had for now.
        """
        waits: tuple[float, ...] = WAITS
        if self._lost and shard in self._lost:
            problem, until = self._lost[shard]
            if time.monotonic() < until:
                raise OSError(problem)  # a server may take its time to say so
            waits = ()
        tries, unreadable = 0, False
        while True:
            try:
                descriptor, count = self._descriptor(shard, unreadable), 0
                # Some file systems give less than is there; at the file's end they give nothing.
                while count < len(memory) and (more := os.preadv(descriptor, (memory[count:],), offset + count)):
                    count += more
            except OSError as error:
                if shard in self._open:  # a descriptor that went stale stays so
                    unreadable = error.errno == errno.EIO
                    os.close(self._open.pop(shard))
                if error.errno not in PASSING or tries == len(waits):
                    self._lost[shard] = error.strerror or str(error), time.monotonic() + RETRY_SECONDS
                    raise
                time.sleep(waits[tries])
                tries += 1
            else:
                if self._lost:
                    self._lost.pop(shard, None)
                return count

    def _descriptor(self, shard: int, unreadable: bool) -> int:
        if shard in self._open:
            self._open.move_to_end(shard)
        while shard not in self._open:
            try:
                self._open[shard] = self._open_shard(shard, unreadable)
            except OSError as error:
                if error.errno not in TOO_MANY_OPEN:
                    raise
                if not self._open:
                    raise UserError(f"no shard can be opened: {error.strerror}; raise ulimit -n", local=True) from error
                fewer = (len(self._open) + 1) // 2
                if fewer < self._limit:
                    self._limit = fewer
                    log.warning("%s: from now on %d shards are kept open, which is slower; raise ulimit -n",
                                error.strerror, fewer)  # fmt: skip
                while len(self._open) >= self._limit:
                    os.close(self._open.popitem(last=False)[1])
        if len(self._open) > self._limit:
            os.close(self._open.popitem(last=False)[1])
        return self._open[shard]


def open_local(directory: Path, name: str) -> int:
    """A descriptor to read a shard of a local directory from; one that is away as a whole is waited for.

    Raises:
        OSError: the shard is not there, or cannot be opened.
        UserError: nor is the manifest beside it.
    """
    until = time.monotonic() + OUTAGE_SECONDS
    waited = False
    while True:
        try:
            return open_regular(directory / name)
        except OSError as error:
            if error.errno not in PASSING or _opens(directory / "manifest.json"):
                raise
            if time.monotonic() > until:
                raise UserError(
                    f"{directory}: {error.strerror}, for {OUTAGE_SECONDS:.0f} s; when it is back, the run goes on from "
                    "its checkpoint by the same command",
                    local=True,
                    transient=True,
                ) from error
            if not waited:
                log.warning("%s: %s; waiting for it", directory, error.strerror)
            waited = True
        time.sleep(POLL_SECONDS)


def _opens(file: Path) -> bool:
    try:
        os.close(open_regular(file))
    except OSError:
        return False
    return True


def waveform_floats(raw: np.ndarray, out: np.ndarray) -> None:
    """int16 [L] -> float32 [L] in [-1, 1)."""
    np.copyto(out, raw)
    np.multiply(out, np.float32(INT16_SCALE), out=out)


def fbank_floats(raw: np.ndarray, out: np.ndarray, mean: float, std: float) -> None:
    """float16 [n] -> float32 [m], normalised to (x - mean) / (2 std); the rest of a longer row is that of zeros."""
    count = min(len(raw), len(out))
    row = out[:count]
    half_floats(raw[:count], row)
    np.subtract(row, np.float32(mean), out=row)
    np.divide(row, np.float32(2 * std), out=row)
    out[count:] = normalised_zero(mean, std)


def normalised_zero(mean: float, std: float) -> float:
    """What padding and masks of raw zeros become."""
    return float((np.float32(0) - np.float32(mean)) / np.float32(2 * std))


def half_floats(raw: np.ndarray, out: np.ndarray) -> None:
    """float16 [n] -> float32 [n], exactly."""
    if len(raw) and (raw.view(np.uint16) << np.uint16(1)).max() >= NOT_FINITE:
        np.copyto(out, raw)
        return
    bits = out.view(np.int32)
    np.copyto(bits, raw.view(np.int16))
    np.left_shift(bits, 13, out=bits)
    np.bitwise_and(bits, SIGN_AND_REST, out=bits)
    np.multiply(out, REBIAS, out=out)
