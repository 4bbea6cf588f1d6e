"""Decoding in a process of its own: one that hangs or crashes on a file costs that clip and no more.

In: what `decode` or `decode_whole` takes. Out: what they give, a segment or piece
after at most a time limit.

A library call cannot be stopped from within its process, and a segmentation fault in a codec takes the
process with it; FFmpeg's and libsndfile's demuxers see hostile files by the million. So each worker
keeps one decoder process: requests and replies pass through a pipe, as JSON, and samples through shared memory. That
costs about 0.2 ms a clip. After a time-out or crash the next clip
gets a new process (0.2 s).

A process that ends by its own doing (SIGSEGV, SIGABRT ...) or takes too long is the file's fault; one that does not
start, or that SIGKILL ends, as where the kernel is out of memory, is the machine's. So is one that takes too long
because a disk does not answer (an NFS server that starts anew), it was stopped, or others had the processors: it gets
START_LIMIT more.

A decoder whose worker was killed ends by itself: at the end of the pipe, or by its own alarm.
"""

import atexit
import errno
import json
import math
import mmap
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import lru_cache
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np

from pipeline.errors import UserError
from shard_tools.decode import Decoded, DecodeError, MachineError, decode, decode_whole
from shard_tools.segment import reason_of

TIME_LIMIT = 60.0  # seconds for one segment: 500 times what a slow one takes
START_LIMIT = 300.0  # seconds for the decoder's imports, on a busy network disk
GRACE = 5.0
# glibc: arrays up to 32 MiB come from the heap, and up to 64 MiB that are free stay there. Its own limits, which follow
# the largest array freed, give a clip's pages back after each clip: 850 page faults, 1.5 ms.
KEEP_PAGES = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(64 << 20)}
FIELDS = ("duration", "sample_rate", "channels", "decoder", "begin", "cut")  # of `Decoded`, beside its waveform


class DecoderProcess:
    """A process that decodes one segment, or one recording piece by piece, at a time; `close` it, or use it in `with`.

    Args:
        rate: Hz of the waveforms it gives.
        seconds: Longest waveform; of a recording, the length of a piece.
        time_limit: Seconds that a segment or piece may take.

    Raises:
        MachineError: no memory for the waveforms.
    """

    def __init__(self, rate: int, seconds: float, time_limit: float = TIME_LIMIT) -> None:
        self._rate, self._seconds, self._limit = rate, seconds, time_limit
        try:
            self._file, self._errors = _scratch("craft-waveform"), _scratch("craft-errors")
            self._file.truncate(max(mmap.PAGESIZE, round(rate * seconds) * 4))
            self._memory = mmap.mmap(self._file.fileno(), 0)
        except OSError as error:
            raise MachineError(error.errno, f"no memory for a decoder process: {error.strerror}") from error
        self._process: subprocess.Popen[bytes] | None = None

    def decode(self, path: str, start: float, end: float | None, trimmed: bool | None = True) -> Decoded:
        """`shard_tools.decode.decode` under the time limit.

        Raises:
            DecodeError: its own, "timeout" or "crashed".
            MachineError: its own, or the decoder process does not start or was killed.
            UserError: the decoder process ends as it starts.
        """
        self._start()
        waveform, reply = self._ask({"path": _from_anywhere(path), "start": start, "end": end, "trimmed": trimmed})
        return Decoded(waveform, **reply)

    def pieces(self, path: str, problems: list[str]) -> Iterator[np.ndarray]:
        """`shard_tools.decode.decode_whole` under the time limit, each as long as a piece but the last.

        Args:
            path: Source file.
            problems: Gets the recording's, once all is read.

        Raises:
            DecodeError, MachineError, UserError: as `decode`.
        """
        self._start()
        piece, reply = self._ask({"recording": _from_anywhere(path)})
        while "problems" not in reply:
            yield piece
            piece, reply = self._ask({"recording": None})
        problems += reply["problems"]

    def close(self) -> None:
        """Ends the process and frees the memory."""
        self._kill()
        self._memory.close()
        self._file.close()
        self._errors.close()

    def __enter__(self) -> "DecoderProcess":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _start(self) -> None:
        if self._process is not None and self._process.poll() is None:
            return
        self._kill()
        path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), *sys.path]))
        try:
            self._errors.truncate(0)
            self._pipe, theirs = Pipe()
            with theirs:
                handles = (theirs.fileno(), self._file.fileno())
                words = [*map(str, handles), str(self._rate), repr(self._seconds), repr(self._limit)]
                self._process = subprocess.Popen(
                    [sys.executable, "-c", "from shard_tools.guard import serve; serve()", *words],
                    stdin=subprocess.DEVNULL,
                    stdout=self._errors,  # libraries chatter on both (mpg123, FFmpeg)
                    stderr=self._errors,
                    pass_fds=handles,
                    env=KEEP_PAGES | os.environ | {"PYTHONPATH": path},
                    start_new_session=True,  # Ctrl-C is the worker's
                )
        except OSError as error:
            raise MachineError(error.errno, f"the decoder process does not start: {error.strerror}") from error
        try:
            self._receive(START_LIMIT)
        except TimeoutError as error:
            self._kill()
            raise MachineError(errno.ETIMEDOUT, f"the decoder process does not start: {error}") from error
        except EOFError as error:
            raise UserError(f"the decoder process does not start: {error}; check the installation") from error

    def _ask(self, request: dict[str, Any]) -> tuple[np.ndarray, dict[str, Any]]:
        """Samples of the next reply, and the rest of it."""
        begun, used = time.monotonic(), self._standing()[1]
        try:
            with suppress(BrokenPipeError):  # then there is no reply either
                self._pipe.send_bytes(json.dumps(request).encode())
            try:
                reply = self._receive(self._limit)
            except TimeoutError:
                if not self._held_up(used):
                    raise
                reply = self._receive(START_LIMIT)
        except TimeoutError:
            held_up, waited = self._held_up(used), time.monotonic() - begun
            self._kill()
            if held_up:
                what = f"the decoder was held up for {waited:.0f} s: does the disk answer, and is a processor free?"
                raise MachineError(errno.ETIMEDOUT, what) from None
            raise DecodeError(f"timeout: the decoder took longer than {self._limit:g} s") from None
        except EOFError as error:
            raise DecodeError(f"crashed: {error}") from None
        if "error" in reply:
            raise DecodeError(reply["error"])
        if "machine" in reply:
            raise MachineError(*reply["machine"])
        return np.frombuffer(self._memory, np.float32, reply.pop("samples")).copy(), reply

    def _held_up(self, used: float) -> bool:
        """Whether it is not the file that takes long: the process waits for a disk, is stopped, or had no processor.

        Args:
            used: Its CPU seconds when it was asked.
        """
        state, now = self._standing()
        return state in ("D", "T") or (state == "R" and now - used < self._limit / 2)

    def _standing(self) -> tuple[str, float]:
        """The process's state, a letter of Linux's /proc, and its CPU seconds; "" and 0.0: it is not known here."""
        try:
            content = Path(f"/proc/{self._process.pid if self._process else 0}/stat").read_text()
        except OSError:
            return "", 0.0
        fields = content.rpartition(")")[2].split()  # the name before may hold anything
        return fields[0], (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def _receive(self, limit: float) -> dict[str, Any]:
        """Next reply.

        Raises:
            TimeoutError: none within the limit.
            EOFError: the process died, and how.
            MachineError: something killed it.
        """
        try:
            if not self._pipe.poll(limit):
                raise TimeoutError(f"nothing after {limit:g} s")
            content: dict[str, Any] = json.loads(self._pipe.recv_bytes())
            return content
        except (EOFError, ConnectionResetError):
            pass
        status = 0 if self._process is None else self._process.wait(GRACE)
        self._kill()
        if status == -signal.SIGKILL:
            raise MachineError(errno.ENOMEM, "the decoder process was killed (SIGKILL): is the memory short?")
        if status == -signal.SIGALRM:  # its own alarm, which comes after we would have ended it
            raise MachineError(errno.ETIMEDOUT, "this process and its decoder were stopped for minutes")
        how = f"died of {signal.Signals(-status).name}" if status < 0 else f"exited with {status}"
        self._errors.seek(max(0, self._errors.seek(0, os.SEEK_END) - 1000))
        said = self._errors.read().decode("utf-8", "replace").strip().splitlines()  # of it or a library
        raise EOFError(f"the decoder {how}" + (f" ({said[-1]})" if said else ""))

    def _kill(self) -> None:
        """Ends the process and what it started; does not wait for one that the kernel holds (a dead network disk)."""
        process, self._process = self._process, None
        if process is None:
            return
        self._pipe.close()
        try:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(GRACE)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            process.poll()


def _from_anywhere(path: str) -> str:
    """The decoder process stays in the directory that it was started in, which may no longer be ours."""
    return os.path.join(os.getcwd(), path) if not os.path.isabs(path) else path


def _scratch(name: str) -> IO[bytes]:
    """A nameless file in memory, where the system has such: no directory for temporary files can be full or foreign.

    Raises:
        OSError: no memory.
    """
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create(name), "w+b", buffering=0)
    return tempfile.TemporaryFile(buffering=0)  # macOS


def guarded_decode(
    path: str,
    start: float,
    end: float | None,
    *,
    rate: int,
    seconds: float,
    trimmed: bool | None = True,
) -> Decoded:
    """`shard_tools.decode.decode` in the calling process's own decoder process, under the time limit.

    Raises:
        DecodeError: `decode`'s, "timeout" or "crashed": the clip cannot be used.
        MachineError: the machine is at fault: the clip may be tried again.
        UserError: the decoder process ends as it starts.
    """
    return _process(rate, seconds).decode(path, start, end, trimmed)


@lru_cache(maxsize=1)
def _process(rate: int, seconds: float) -> DecoderProcess:
    process = DecoderProcess(rate, seconds)
    atexit.register(process.close)
    return process


def serve() -> None:
    """The decoder process's loop: a request and a reply in JSON, until the other end of the pipe is closed."""
    pipe, rate, seconds, limit = Connection(int(sys.argv[1])), int(sys.argv[3]), float(sys.argv[4]), float(sys.argv[5])
    memory = np.frombuffer(mmap.mmap(int(sys.argv[2]), 0), np.float32)
    problems, pieces = list[str](), iter(list[np.ndarray]())
    reply: dict[str, Any] = {"ready": True}
    while True:
        pipe.send_bytes(json.dumps(reply).encode())
        signal.alarm(0)
        try:
            request = json.loads(pipe.recv_bytes())
        except EOFError:
            return
        signal.alarm(math.ceil(limit + START_LIMIT + GRACE))  # ends an orphan, even in a library's endless loop
        os.ftruncate(2, 0)
        os.lseek(2, 0, os.SEEK_SET)
        try:
            if request.get("recording"):
                problems = []
                pieces = _pieces(decode_whole(request["recording"], rate, problems), round(rate * seconds))
            if "recording" in request:
                waveform, reply = next(pieces, np.zeros(0, np.float32)), {}
                if not len(waveform):
                    reply = {"problems": problems}
            else:
                decoded = decode(rate=rate, seconds=seconds, **request)
                waveform, reply = decoded.waveform, {name: getattr(decoded, name) for name in FIELDS}
            memory[: len(waveform)] = waveform
            reply["samples"] = len(waveform)
        except DecodeError as error:
            reply = {"error": str(error)}
        except OSError as error:
            whose = error if isinstance(error, MachineError) else reason_of("", error)
            machine = isinstance(whose, MachineError)
            reply = {"machine": [error.errno, error.strerror]} if machine else {"error": str(whose)}
        except MemoryError:
            reply = {"error": "out of memory: the header asks for too much"}


def _pieces(parts: Iterable[np.ndarray], samples: int) -> Iterator[np.ndarray]:
    """A recording in pieces of so many samples, but for the last."""
    held: list[np.ndarray] = []
    for part in parts:
        held.append(part)
        if sum(map(len, held)) >= samples:
            whole = np.concatenate(held)
            for first in range(0, len(whole) - samples + 1, samples):
                yield whole[first : first + samples]
            held = [whole[len(whole) // samples * samples :]]
    if sum(map(len, held)):
        yield np.concatenate(held)
