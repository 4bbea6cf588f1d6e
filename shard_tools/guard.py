"""Decoding in a process of its own: one that hangs or crashes on a file costs that clip and no more.

In: what `decode` takes, or the path of a recording. Out: what `decode` or a `Recording` gives, a segment or piece
after at most a time limit.

A library call cannot be stopped from within its process, and a segmentation fault in a codec takes the
process with it; FFmpeg's and libsndfile's demuxers see hostile files by the million. So each worker
keeps one decoder process: requests go down its stdin, replies come up its stdout, one JSON line each, and
samples pass through shared memory. That costs about 0.2 ms a clip. After a time-out or crash the next clip
gets a new process (0.2 s).

A process that ends by its own doing (SIGSEGV, SIGABRT ...) or takes too long is the file's fault; one that does not
start, or that SIGKILL ends, as where the kernel is out of memory, is the machine's.

A decoder whose worker was killed ends by itself: at the end of its stdin, or by its own alarm.
"""

import atexit
import errno
import json
import math
import mmap
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import lru_cache
from types import TracebackType
from typing import IO, Any

import numpy as np

from pipeline.errors import UserError
from shard_tools.decode import Decoded, DecodeError, MachineError, Recording, decode
from shard_tools.segment import reason_of

TIME_LIMIT = 60.0  # seconds for one segment: 500 times what a slow one takes
START_LIMIT = 300.0  # seconds for the decoder's imports, on a busy network disk
GRACE = 5.0
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
        self._unread = b""

    def decode(self, path: str, start: float, end: float | None, trimmed: bool | None = True) -> Decoded:
        """`shard_tools.decode.decode` under the time limit.

        Raises:
            DecodeError: its own, "timeout" or "crashed".
            MachineError: its own, or the decoder process does not start or was killed.
            UserError: the decoder process ends as it starts.
        """
        self._start()
        waveform, reply = self._ask({"path": path, "start": start, "end": end, "trimmed": trimmed})
        return Decoded(waveform, **reply)

    def pieces(self, path: str, problems: list[str]) -> Iterator[np.ndarray]:
        """`shard_tools.decode.Recording.pieces` under the time limit, each as long as a piece but the last.

        Args:
            path: Source file.
            problems: Gets the recording's, once all is read.

        Raises:
            DecodeError, MachineError, UserError: as `decode`.
        """
        self._start()
        piece, reply = self._ask({"recording": path})
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
        handle = self._file.fileno()
        words = [str(handle), str(self._rate), repr(self._seconds), repr(self._limit)]
        path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), *sys.path]))
        try:
            self._errors.truncate(0)
            self._process = subprocess.Popen(
                [sys.executable, "-c", "from shard_tools.guard import serve; serve()", *words],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                bufsize=0,
                stderr=self._errors,
                pass_fds=(handle,),
                env=os.environ | {"PYTHONPATH": path},
                start_new_session=True,  # Ctrl-C is the worker's
            )
        except OSError as error:
            raise MachineError(error.errno, f"the decoder process does not start: {error.strerror}") from error
        self._unread = b""
        try:
            self._receive(START_LIMIT)
        except TimeoutError as error:
            self._kill()
            raise MachineError(errno.ETIMEDOUT, f"the decoder process does not start: {error}") from error
        except EOFError as error:
            raise UserError(f"the decoder process does not start: {error}; check the installation") from error

    def _ask(self, request: dict[str, Any]) -> tuple[np.ndarray, dict[str, Any]]:
        """Samples of the next reply, and the rest of it."""
        try:
            self._send(request)
            reply = self._receive(self._limit)
        except TimeoutError:
            self._kill()
            raise DecodeError(f"timeout: the decoder took longer than {self._limit:g} s") from None
        except EOFError as error:
            raise DecodeError(f"crashed: {error}") from None
        if "error" in reply:
            raise DecodeError(reply["error"])
        if "machine" in reply:
            raise MachineError(*reply["machine"])
        return np.frombuffer(self._memory, np.float32, reply.pop("samples")).copy(), reply

    def _send(self, request: dict[str, Any]) -> None:
        try:
            _pipe(self._process, "stdin").write(json.dumps(request).encode() + b"\n")
        except BrokenPipeError as error:
            raise EOFError(self._death()) from error

    def _receive(self, limit: float) -> dict[str, Any]:
        """Next reply.

        Raises:
            TimeoutError: none within the limit.
            EOFError: the process died, and how.
        """
        handle = _pipe(self._process, "stdout").fileno()
        deadline = time.monotonic() + limit
        while b"\n" not in self._unread:
            ready, _, _ = select.select([handle], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError(f"nothing after {limit:g} s")
            got = os.read(handle, 1 << 16)
            if not got:
                raise EOFError(self._death())
            self._unread += got
        line, _, self._unread = self._unread.partition(b"\n")
        content: dict[str, Any] = json.loads(line)
        return content

    def _death(self) -> str:
        """How the process ended, with the last line that it or a library wrote.

        Raises:
            MachineError: something killed it.
        """
        process = self._process
        status = 0 if process is None else process.wait(GRACE)
        self._kill()
        if status == -signal.SIGKILL:
            raise MachineError(errno.ENOMEM, "the decoder process was killed (SIGKILL): is the memory short?")
        how = f"died of {signal.Signals(-status).name}" if status < 0 else f"exited with {status}"
        self._errors.seek(max(0, self._errors.seek(0, os.SEEK_END) - 1000))
        said = self._errors.read().decode("utf-8", "replace").strip().splitlines()
        return f"the decoder {how}" + (f" ({said[-1]})" if said else "")

    def _kill(self) -> None:
        """Ends the process and what it started; does not wait for one that the kernel holds (a dead network disk)."""
        process, self._process = self._process, None
        if process is None:
            return
        for name in ("stdin", "stdout"):
            _pipe(process, name).close()
        try:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(GRACE)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            process.poll()


def _scratch(name: str) -> IO[bytes]:
    """A nameless file in memory, where the system has such: no directory for temporary files can be full or foreign.

    Raises:
        OSError: no memory.
    """
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create(name), "w+b", buffering=0)
    return tempfile.TemporaryFile(buffering=0)  # macOS


def _pipe(process: "subprocess.Popen[bytes] | None", name: str) -> IO[bytes]:
    pipe: IO[bytes] | None = getattr(process, name, None)
    if pipe is None:
        raise EOFError("the decoder process is not running")
    return pipe


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
    """The decoder process's loop: a JSON request a line, a JSON reply a line, until stdin ends."""
    handle, rate, seconds, limit = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), float(sys.argv[4])
    memory = np.frombuffer(mmap.mmap(handle, 0), np.float32)
    replies = os.fdopen(os.dup(1), "wb", buffering=0)
    _reply(replies, {"ready": True})
    os.dup2(2, 1)  # libraries chatter on both (mpg123, FFmpeg); the replies have their own descriptor
    recording, pieces = Recording("", rate), iter(list[np.ndarray]())
    for line in sys.stdin.buffer:
        signal.alarm(math.ceil(limit + START_LIMIT + GRACE))  # ends an orphan, even in a library's endless loop
        os.ftruncate(2, 0)
        os.lseek(2, 0, os.SEEK_SET)
        request = json.loads(line)
        reply: dict[str, Any]
        try:
            if request.get("recording"):
                recording = Recording(request["recording"], rate)
                pieces = _pieces(recording, round(rate * seconds))
            if "recording" in request:
                waveform, reply = next(pieces, np.zeros(0, np.float32)), {}
                if not len(waveform):
                    reply = {"problems": recording.problems}
            else:
                decoded = decode(rate=rate, seconds=seconds, **request)
                waveform, reply = decoded.waveform, {name: getattr(decoded, name) for name in FIELDS}
            memory[: len(waveform)] = waveform
            reply["samples"] = len(waveform)
        except DecodeError as error:
            reply = {"error": str(error)}
        except MachineError as error:
            reply = {"machine": [error.errno, error.strerror]}
        except OSError as error:
            reason = reason_of("", error)
            machine = isinstance(reason, MachineError)
            reply = {"machine": [error.errno, error.strerror]} if machine else {"error": str(reason)}
        except MemoryError:
            reply = {"error": "out of memory: the header asks for too much"}
        signal.alarm(0)
        _reply(replies, reply)


def _pieces(recording: Recording, samples: int) -> Iterator[np.ndarray]:
    """A recording in pieces of so many samples, but for the last."""
    held: list[np.ndarray] = []
    for part in recording.pieces():
        held.append(part)
        if sum(map(len, held)) >= samples:
            whole = np.concatenate(held)
            for first in range(0, len(whole) - samples + 1, samples):
                yield whole[first : first + samples]
            held = [whole[len(whole) // samples * samples :]]
    if sum(map(len, held)):
        yield np.concatenate(held)


def _reply(replies: Any, content: dict[str, Any]) -> None:
    replies.write(json.dumps(content).encode() + b"\n")
