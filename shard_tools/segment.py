"""What all decoders share: opening a file, adding its channels, and the reasons why a file gives nothing.

A `DecodeError` is the file's fault and goes into `failures.jsonl`; a `MachineError` is the machine's, and says nothing
about the file.
"""

import errno
import math
import os
import stat

import numpy as np

SLACK = 0.15  # seconds by which a container's duration and its audio differ (priming, last frame)
HEAD = 512  # bytes that tell a text from audio
POINTER = b"version https://git-lfs.github.com/spec/"  # what Git-LFS leaves in the place of a file
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


def refuse_text(head: bytes) -> None:
    """An error page, a playlist or a script is no audio; that is said instead of a decoder's complaint.

    Args:
        head: First bytes of a file.

    Raises:
        DecodeError: they are text.
    """
    if head.startswith(POINTER):
        raise DecodeError("undecodable: a pointer of Git-LFS, not audio; run 'git lfs pull' where it was cloned")
    if not any(byte < 32 and byte not in b"\t\n\r\f\x1b" for byte in head):
        raise DecodeError(f"undecodable: text, not audio: {head[:40].decode('utf-8', 'replace')!r}")


def broken_promise(handle: int) -> str:
    """How the bytes of a file whose audio has ended say that there was more; empty: they do not.

    An Ogg stream ends with a page that is marked as the last; an mp3 of LAME's or FFmpeg's begins with the
    number of its bytes. Nothing tells a cut ADTS, AMR or headerless mp3 stream from a shorter one.

    Args:
        handle: File descriptor.
    """
    size = os.fstat(handle).st_size
    if os.pread(handle, 4, 0) == b"OggS":
        tail = os.pread(handle, 1 << 16, max(0, size - (1 << 16)))
        page = tail[tail.rfind(b"OggS") :]
        body = 27 + page[26] + sum(page[27 : 27 + page[26]]) if len(page) > 27 else math.inf
        if not page.startswith(b"OggS") or len(page) < body or not page[5] & 4:
            return "the Ogg stream has no last page"
    promised = _mp3_bytes(handle)
    return f"the mp3 header promises {promised} bytes, the file has {size}" if promised > size else ""


def _mp3_bytes(handle: int) -> int:
    """File size by the Xing (Info) header of an mp3's first frame, behind tags of any size; 0: none."""
    start = 0
    while len(tag := os.pread(handle, 10, start)) == 10 and tag.startswith(b"ID3"):
        start += 10 + sum((byte & 127) << shift for byte, shift in zip(tag[6:], (21, 14, 7, 0), strict=True))
    head = os.pread(handle, 200, start)
    if len(head) < 200 or head[0] != 0xFF or head[1] & 0xE0 != 0xE0:
        return 0
    for name in (b"Xing", b"Info"):
        at = head.find(name, 0, 64)
        if at >= 0 and head[at + 7] & 2:
            field = at + 8 + (4 if head[at + 7] & 1 else 0)
            return start + int.from_bytes(head[field : field + 4], "big")
    return 0
