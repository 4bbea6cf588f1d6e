"""Any audio file -> mono float32 samples at one rate: one segment, or the whole recording piece by piece.

In: a path. Out: `Decoded` of a segment, or the samples of the whole file, from front to back; or a `DecodeError` whose
text is the reason.

libsndfile reads PCM (WAV, AIFF, AU, W64, CAF) and FLAC, whose samples it finds exactly; FFmpeg's libraries
(`shard_tools/ffmpeg_codecs.py`) read the rest, audio tracks of videos included. What a file begins with decides, so a
file meets the same decoder, and gives the same samples, on every machine. Resampling is always soxr HQ: the resamplers
inside torchaudio and FFmpeg fold tones just above Nyquist back at -9 to -60 dB, soxr HQ at -138 dB.

Second 0 of a file is its first decoded sample, and a length in a header is a hint: where the audio ends is where it is
found to end. So a segment is cut at the file's end, and one that lies past it is a failure.

`decode` works in the calling process; a build decodes in a process of its own (`shard_tools/guard.py`),
so that a decoder that hangs or crashes costs one clip.
"""

import math
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import soundfile
import soxr

from shard_tools.ffmpeg_codecs import FFmpegSource, Gap
from shard_tools.segment import (
    MACHINE_ERRNOS,
    SLACK,
    DecodeError,
    MachineError,
    broken_promise,
    down_mix,
    open_file,
    refuse_text,
)  # fmt: skip

MIN_RATE, MAX_RATE = 1000, 768000
TRIM_SLACK = 0.5  # seconds by which a file that is a segment itself may differ from it in length
HEAD = 512  # bytes that tell a text, and formats, from one another
BLOCK_FRAMES = 1 << 16  # bounds the memory of files with many channels
UNKNOWN_FRAMES = 1 << 48  # libsndfile's count for a stream without one is larger
UNKNOWN_SIZE = 0x7FFFF000  # a WAV written to a pipe has a size above this, or 0
# WAV codecs of libsndfile; not GSM 6.10 (0x0031), in which it cannot seek.
PCM_TAGS = frozenset({0x0001, 0x0002, 0x0003, 0x0006, 0x0007, 0x0011, 0xFFFE})
# libsndfile's note on a header that promises more bytes than the file holds: WAV, AIFF, AU, W64.
PROMISE = re.compile(r"(?:data|SSND|Data Size|riff)\s*: (\d+) \(should be (\d+)\)")

__all__ = ["DecodeError", "Decoded", "MachineError", "decode", "decode_whole"]


@dataclass(slots=True)
class Decoded:
    """One segment.

    Attributes:
        waveform: float32 [n], mono, at the requested rate, unpadded.
        duration: Seconds of the whole source file.
        sample_rate: Of the source.
        channels: Of the source.
        decoder: "soundfile" or "pyav".
        begin: Second of the file at which the waveform begins.
        cut: The file ended before the segment did.
    """

    waveform: np.ndarray
    duration: float
    sample_rate: int
    channels: int
    decoder: str = ""
    begin: float = 0.0
    cut: bool = False


def decode(
    path: str, start: float, end: float | None, *, rate: int, seconds: float, trimmed: bool | None = True
) -> Decoded:
    """Decodes, down-mixes and resamples one segment.

    Args:
        path: Source file.
        start: First second.
        end: Last second; None: the end of the file.
        rate: Wanted sample rate, Hz.
        seconds: At most this much is decoded.
        trimmed: None: a file that ends before the segment does, and is as long as the segment, is the segment itself,
            read from 0. Any other value: it is read from `start`.

    Raises:
        DecodeError: missing, unreadable, empty, outside the file, truncated, damaged, or not finite.
        MachineError: the file cannot be read now.
    """
    length = seconds if end is None else min(seconds, end - start)
    with _opened(path) as (source, handle):
        begin = start
        mono = _segment(source, handle, begin, length)
        whole = source.place / source.rate if source.ended else math.inf
        if trimmed is None and start > 0 and end is not None:
            whole = source.length()
            # The listed segment's length counts, not that of the clip that is cut from it.
            if whole < end - TRIM_SLACK and abs(whole - (end - start)) <= TRIM_SLACK:
                begin = 0.0
                mono = _segment(source, handle, begin, length)
        if not len(mono):
            where = f"the segment from {start:g} s begins after the end of a {whole:.2f} s file"
            raise DecodeError(f"outside: {where}" if source.place else "empty: no samples in the file")
        cut = end is not None and whole < begin + length - SLACK
        duration, own_rate = source.length(), source.rate
    if own_rate != rate:
        mono = soxr.resample(mono, own_rate, rate, quality="HQ")
    mono = mono[: round(seconds * rate)]
    if not len(mono):
        raise DecodeError(f"empty: too few samples at {own_rate} Hz for one at {rate} Hz")
    if not np.isfinite(mono).all():  # a NaN or infinity in any channel is one here
        raise DecodeError("not finite: NaN or infinite samples")
    return Decoded(mono, duration, own_rate, source.channels, source.decoder, begin, cut)


def _segment(source: "FFmpegSource | _LibsndfileSource", handle: int, begin: float, length: float) -> np.ndarray:
    """float32 [n] at the source's rate from a second on.

    Raises:
        DecodeError: damaged or truncated within the segment.
    """

    def bounds() -> tuple[int, int]:  # the rate is that of the first block
        _check_rate(source.rate)
        first = round(begin * source.rate)
        return first, first + round(length * source.rate)

    parts: list[np.ndarray] = []
    for place, block in source.blocks(begin, length):
        first, last = bounds()
        parts.append(block[max(0, first - place) : max(0, last - place)])
        if place + len(block) >= last:
            break
    first, last = bounds()
    for gap in source.gaps:
        if gap.place < last and gap.place + max(1, gap.samples) > first:
            raise DecodeError(f"damaged: {_told(gap, source.rate)}")
    if source.ended and source.place < last - 1:
        lacking = source.missing
        promise = broken_promise(handle)
        if lacking > SLACK:
            there = source.place / source.rate
            raise DecodeError(f"truncated: the header promises {there + lacking:.2f} s, the file has {there:.2f} s")
        if promise:
            raise DecodeError(f"truncated: {promise}")
    return np.concatenate(parts) if parts else np.zeros(0, np.float32)


def decode_whole(path: str, rate: int, problems: list[str]) -> Iterator[np.ndarray]:
    """A file of any length, read once from front to back; damage costs what is damaged.

    Args:
        path: Source file.
        rate: Wanted sample rate, Hz.
        problems: Gets what was found damaged or missing, one plain line each.

    Yields:
        Consecutive samples, float32 [n], mono at the wanted rate. What is lost is silence, so that times stay right.

    Raises:
        DecodeError: nothing can be decoded.
        MachineError: the file cannot be read now.
    """
    with _opened(path, whole=True) as (source, handle):
        due, stream, sound = 0, None, True
        for place, block in source.blocks(0.0):
            _check_rate(source.rate)
            if sound and not np.isfinite(block).all():
                sound = False
                problems.append(f"NaN or infinite samples near {place / source.rate:.1f} s, taken for 0")
            if stream is None and source.rate != rate:
                stream = soxr.ResampleStream(source.rate, rate, 1, dtype="float32", quality="HQ")
            lost = np.zeros(max(0, place - due), np.float32)
            due = place + len(block)
            finite = block if sound else np.nan_to_num(block, nan=0.0, posinf=0.0, neginf=0.0)
            for part in (lost, finite) if len(lost) else (finite,):
                if len(piece := part if stream is None else stream.resample_chunk(part)):
                    yield piece
        if not due:
            raise DecodeError("empty: no samples in the file")
        if stream is not None and len(piece := stream.resample_chunk(np.zeros(0, np.float32), last=True)):
            yield piece
        problems += [f"damaged {_told(gap, source.rate)}" for gap in source.gaps]
        promise = broken_promise(handle)
        if source.missing > SLACK:
            promise = f"its header promises {source.missing:.1f} s more"
        if promise:
            problems.append(f"truncated: {promise}")


def _told(gap: Gap, rate: int) -> str:
    lost = f"{gap.samples / rate:.2f} s lost" if gap.samples else gap.reason
    return f"near {gap.place / rate:.1f} s: {lost}"


def _check_rate(rate: int) -> None:
    if not MIN_RATE <= rate <= MAX_RATE:
        raise DecodeError(f"sample rate: {rate} Hz is outside {MIN_RATE} to {MAX_RATE}")


@contextmanager
def _opened(path: str, whole: bool = False) -> Iterator[tuple["FFmpegSource | _LibsndfileSource", int]]:
    """The decoder of a file, and its descriptor.

    Args:
        path: Of the file.
        whole: All of it is read, damaged places passed over: FFmpeg's FLAC decoder goes on after one, libsndfile's not.
    """
    handle = open_file(path)
    try:
        head = os.pread(handle, HEAD, 0)
        overlay = _wav_overlay(handle, head)
        mine = head.startswith((b"RIFX", b"FORM", b".snd", b"riff", b"caff")) or head[8:12] == b"WAVE"
        if overlay is None and (mine or (head.startswith(b"fLaC") and not whole)):
            try:
                source: FFmpegSource | _LibsndfileSource = _LibsndfileSource(handle)
            except soundfile.LibsndfileError:
                source = FFmpegSource(path, handle)
        else:
            refuse_text(head)
            source = FFmpegSource(path, handle, overlay or ())
        yield source, handle
    finally:
        os.close(handle)


def _wav_overlay(handle: int, head: bytes) -> Sequence[tuple[int, bytes]] | None:
    """What a WAV's sizes should say where they are wrong, or its codec is not libsndfile's; None: read it as it is.

    A recorder that was switched off leaves a size of 0, others half of the true one or what 32 bits hold of it. The
    size is right if the data chunk ends with the file, or another chunk follows: some writers leave out the byte that
    should come between the two where the size is odd.
    """
    if head[:4] not in (b"RIFF", b"RF64", b"BW64") or head[8:12] != b"WAVE":
        return None
    size, at, tag = os.fstat(handle).st_size, 12, 1
    while at + 8 <= size:
        chunk = os.pread(handle, 10, at)
        name, length = chunk[:4], int.from_bytes(chunk[4:8], "little")
        if name == b"data":
            break
        if name == b"fmt ":
            tag = int.from_bytes(chunk[8:10], "little")
        at += 8 + length + length % 2
    else:
        return None
    if tag not in PCM_TAGS:
        return ()
    rest = size - at - 8 - length
    follows = any(_is_chunk(handle, at + 8 + end, size) for end in {length, length + length % 2})
    if head[:4] != b"RIFF" or rest < 8 or follows:
        return None
    consistent = length and abs(int.from_bytes(head[4:8], "little") - length - at) <= 1
    if consistent and rest < length / 10:
        return None  # something else was hung on
    return [(4, b"\xff" * 4), (at + 4, b"\xff" * 4)]


def _is_chunk(handle: int, at: int, size: int) -> bool:
    chunk = os.pread(handle, 8, at)
    name, length = chunk[:4], int.from_bytes(chunk[4:], "little")
    return len(chunk) == 8 and all(32 <= byte < 127 for byte in name) and at + 8 + length <= size + 8


class _File(soundfile.SoundFile):  # type: ignore[misc]
    """Read from front to back: no seeking after each read, which fails where a FLAC's length is unknown."""

    def seekable(self) -> bool:
        return False


class _LibsndfileSource:
    """A file that libsndfile reads; as `FFmpegSource`."""

    decoder = "soundfile"

    def __init__(self, handle: int) -> None:
        self._file = _File(handle, closefd=False)
        if self._file.format == "FLAC":  # one whose first frame has another number, or is damaged, is FFmpeg's
            self._file.seek(0)
            self._file.read(1)
        self.rate, self.channels = int(self._file.samplerate), int(self._file.channels)
        self.place, self.ended, self.gaps = 0, False, list[Gap]()

    @property
    def _promised(self) -> float:
        """Frames that the header promises; a size that was unknown when the header was written promises none."""
        frames, note = self._file.frames, PROMISE.search(self._file.extra_info)
        if note is not None:
            said, held = int(note[1]), int(note[2])
            if 0 < said < UNKNOWN_SIZE and held:
                frames = int(frames * said / held)
        return frames if frames < UNKNOWN_FRAMES else math.inf

    @property
    def missing(self) -> float:
        """Seconds that the header promises beyond those that were read to the end; 0 where it promises none."""
        return max(0.0, self._promised - self.place) / self.rate if math.isfinite(self._promised) else 0.0

    def length(self) -> float:
        """Seconds of the whole file."""
        if not self.ended and self._file.frames >= UNKNOWN_FRAMES:
            for _ in self.blocks(self.place / self.rate):
                pass
        return self.place / self.rate if self.ended else float(self._file.frames / self.rate)

    def blocks(self, start: float, seconds: float = math.inf) -> Iterator[tuple[int, np.ndarray]]:
        """Blocks of so many seconds from one on: place of the first sample, float32 [n], mono.

        Raises:
            DecodeError: damaged.
            MachineError: the file cannot be read now.
        """
        self.place, self.ended = min(round(start * self.rate), int(self._file.frames)), False
        try:
            self._file.seek(self.place)
            last = self.place + (round(seconds * self.rate) if math.isfinite(seconds) else UNKNOWN_FRAMES)
            while wanted := min(BLOCK_FRAMES, last - self.place):
                block = self._file.read(wanted, dtype="float32", always_2d=True)
                if not len(block):
                    break
                self.place += len(block)
                yield self.place - len(block), down_mix(block)
        except soundfile.LibsndfileError as error:
            broken = next((code for code in MACHINE_ERRNOS if os.strerror(code) in error.error_string), None)
            if broken is not None:
                raise MachineError(broken, os.strerror(broken)) from error
            self.gaps.append(Gap(self.place, 0, str(error)))
            wanted = 1
        self.ended = wanted > 0
