"""What decoders take and give: a segment of a file goes in, its mono samples or a reason come out."""

import errno
import math
import os
import stat
from dataclasses import dataclass

import numpy as np

TRIM_SLACK = 0.5  # seconds that a file may lack and still be taken for the whole recording of a segment
SLACK = 0.15  # seconds by which a container's duration and its audio differ (priming, last frame)
HEAD = 512  # bytes that tell a text from audio
# Endings that audio, and video with sound, goes by, in lower case. What a file holds decides its decoding: these decide
# which files a folder's audio are, and which of several files that differ in their ending is the audio.
AUDIO_ENDINGS = frozenset({
    ".wav", ".wave", ".flac", ".mp3", ".ogg", ".oga", ".opus", ".spx", ".m4a", ".m4b", ".m4r", ".aac", ".adts", ".alac",
    ".mp4", ".m4v", ".mov", ".qt", ".3gp", ".3gpp", ".3g2", ".webm", ".weba", ".mkv", ".mka", ".ogv", ".ogx",
    ".aif", ".aiff", ".aifc", ".au", ".snd", ".caf", ".w64", ".rf64", ".bwf", ".wve", ".sph", ".nist", ".voc", ".sf",
    ".mp2", ".mp1", ".mpa", ".mpg", ".mpeg", ".mpe", ".ts", ".m2ts", ".mts", ".vob", ".avi", ".flv", ".f4v", ".f4a",
    ".wma", ".wmv", ".asf", ".ac3", ".eac3", ".ec3", ".dts", ".dtshd", ".thd", ".mlp", ".amr", ".awb", ".ape", ".wv",
    ".tta", ".tak", ".mpc", ".ra", ".rm", ".rmvb", ".gsm", ".8svx", ".iff", ".pvf", ".paf", ".ircam", ".avr", ".dsf",
    ".dff", ".shn",
})  # fmt: skip


class DecodeError(Exception):
    """The clip cannot be used; the text is the reason for `failures.jsonl`, its kind before the colon."""


class MachineError(OSError):
    """Trouble of this machine, not of the file: a disk or its memory, not the recording; the shard is tried again."""


# What the kernel says where the machine, its disk or its network is at fault; the rest is the file's.
MACHINE_ERRNOS = frozenset({
    errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOSPC, errno.EDQUOT, errno.EAGAIN,
    errno.EINTR, errno.ENODEV, errno.ETIMEDOUT, errno.ENOTCONN, errno.EHOSTDOWN, errno.EHOSTUNREACH,
    errno.ENETDOWN, errno.ENETUNREACH, errno.ECONNREFUSED, errno.ECONNRESET, errno.ECONNABORTED, errno.EREMOTEIO,
})  # fmt: skip


def reason_of(path: str, error: OSError) -> DecodeError | MachineError:
    """Whose fault it is that a file cannot be read.

    Args:
        path: Of the file.
        error: Of `open`, `read` or their like.

    Returns:
        A `MachineError` where the machine is at fault, else a `DecodeError`.
    """
    if error.errno in MACHINE_ERRNOS:
        return MachineError(error.errno, error.strerror, path)
    gone = error.errno in (errno.ENOENT, errno.ENOTDIR)
    return DecodeError("vanished: the file is not there any more" if gone else f"unreadable: {error.strerror or error}")


@dataclass(frozen=True, slots=True)
class Segment:
    """What is asked for.

    Attributes:
        path: Source file.
        start: First second.
        length: Seconds.
        trimmed: None: a file that ends before the segment does is the segment itself, read from 0.
    """

    path: str
    start: float
    length: float
    trimmed: bool | None = True

    def begin(self, duration: float) -> float:
        """First second to read of a file of `duration` seconds."""
        return 0.0 if self.trimmed is None and duration < self.start + self.length - TRIM_SLACK else self.start


@dataclass(frozen=True, slots=True)
class Raw:
    """What a library decoded.

    Attributes:
        mono: float32 [n], mean of the channels, at the source's rate.
        rate: Hz.
        duration: Seconds of the whole file as its header has it; infinite: it does not say.
        channels: Of the source.
        decoder: Which library it was.
    """

    mono: np.ndarray
    rate: int
    duration: float
    channels: int
    decoder: str


def down_mix(samples: np.ndarray) -> np.ndarray:
    """Mean of the channels, float32 [n, channels] -> [n]; by adding columns, 25 times faster than `mean(1)`."""
    total: np.ndarray = samples[:, 0].copy()
    with np.errstate(over="ignore", invalid="ignore"):  # `decode` looks for what is not finite
        for channel in range(1, samples.shape[1]):
            total += samples[:, channel]
    if samples.shape[1] > 1:
        total *= np.float32(1 / samples.shape[1])
    return total


def open_file(path: str) -> int:
    """A file descriptor, so that neither a name's ending nor a named pipe decides anything.

    Raises:
        DecodeError: gone, unreadable, not a file, or empty.
        MachineError: the machine, its disk or its network is at fault.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise reason_of(path, error) from error
    status = os.fstat(handle)
    if not stat.S_ISREG(status.st_mode):
        os.close(handle)
        raise DecodeError("unreadable: not a regular file")
    if not status.st_size:
        os.close(handle)
        raise DecodeError("empty: the file has no bytes")
    return handle


def refuse_text(path: str) -> None:
    """Keeps FFmpeg from texts: an error page is no audio, and a playlist would open other files or hosts.

    Raises:
        DecodeError: the file begins with text.
    """
    with open(path, "rb") as file:
        head = file.read(HEAD)
    if not any(byte < 32 and byte not in b"\t\n\r\f\x1b" for byte in head):
        raise DecodeError(f"undecodable: text, not audio: {head[:40].decode('utf-8', 'replace')!r}")


def check_promise(path: str) -> None:
    """Audio ran out before the segment was full: looks whether the file itself says that there was more.

    An Ogg stream ends with a page that is marked as the last; an mp3 of LAME's or FFmpeg's begins with the
    number of its bytes. Nothing tells a cut ADTS, AMR or headerless mp3 stream from a shorter one.

    Raises:
        DecodeError: it does.
    """
    with open(path, "rb") as file:
        head = file.read(1 << 16)
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - (1 << 16)))
        tail = file.read()
    if head.startswith(b"OggS"):
        page = tail[tail.rfind(b"OggS") :]
        body = 27 + page[26] + sum(page[27 : 27 + page[26]]) if len(page) > 27 else math.inf
        if not page.startswith(b"OggS") or len(page) < body or not page[5] & 4:
            raise DecodeError("truncated: the Ogg stream has no last page")
    promised = _mp3_bytes(head)
    if promised > size:
        raise DecodeError(f"truncated: the mp3 header promises {promised} bytes, the file has {size}")


def _mp3_bytes(head: bytes) -> int:
    """File size by the Xing (Info) header of an mp3's first frame; 0: none."""
    start = 0
    if head.startswith(b"ID3"):
        start = 10 + sum((byte & 127) << shift for byte, shift in zip(head[6:10], (21, 14, 7, 0), strict=True))
    if len(head) < start + 200 or head[start] != 0xFF or head[start + 1] & 0xE0 != 0xE0:
        return 0
    for name in (b"Xing", b"Info"):
        tag = head.find(name, start, start + 64)
        if tag >= 0 and head[tag + 7] & 2:
            field = tag + 8 + (4 if head[tag + 7] & 1 else 0)
            return start + int.from_bytes(head[field : field + 4], "big")
    return 0
