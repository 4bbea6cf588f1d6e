"""Any audio file -> mono float32 samples of one segment at one rate.

In: a path and a segment. Out: `Decoded`, or a `DecodeError` whose text is the reason.

libsndfile reads what it reads fast (PCM, FLAC, mp3), seeking to the segment; FFmpeg's libraries through
torchcodec, or an ffmpeg process where that is not installed, read the rest, audio tracks of videos
included (`shard_tools/ffmpeg_codecs.py`). Resampling is always soxr HQ: the resamplers inside torchaudio and
FFmpeg fold tones just above Nyquist back at -9 to -60 dB, soxr HQ at -138 dB.

Milliseconds of CPU for 10 s of 44.1 kHz stereo, libsndfile / torchcodec: WAV 1.0 / 5.8, FLAC 6.0 / 7.5,
mp3 6.4 / 6.8, Vorbis 11.8 / 5.2, Opus 40 / 14; so Ogg goes to torchcodec where it is. An ffmpeg process
takes about 100. Resampling takes 1.2, and adding the channels 0.1.

`decode` works in the calling process; a build decodes in a process of its own (`shard_tools/guard.py`),
so that a decoder that hangs or crashes costs one clip.
"""

import math
import os
import re
from dataclasses import dataclass

import numpy as np
import soundfile
import soxr

from shard_tools import ffmpeg_codecs
from shard_tools.segment import DecodeError, Raw, Segment, check_promise, down_mix, open_file, refuse_text

MIN_RATE, MAX_RATE = 1000, 768000
BLOCK_FRAMES = 1 << 16  # bounds the memory of files with many channels
UNKNOWN_FRAMES = 1 << 48  # libsndfile's count for a stream without one is larger
UNKNOWN_SIZE = 0x7FFFF000  # a WAV written to a pipe has a size above this, or 0
# libsndfile's note on a header that promises more bytes than the file holds: WAV, AIFF, AU, W64.
PROMISE = re.compile(r"(?:data|SSND|Data Size|riff)\s*: (\d+) \(should be (\d+)\)")

__all__ = ["DecodeError", "Decoded", "decode"]


@dataclass(slots=True)
class Decoded:
    """One segment.

    Attributes:
        waveform: float32 [n], mono, at the requested rate, unpadded.
        duration: Seconds of the whole source file; where its header does not say, of what was read.
        sample_rate: Of the source.
        channels: Of the source.
        decoder: "soundfile", "torchcodec" or "ffmpeg".
    """

    waveform: np.ndarray
    duration: float
    sample_rate: int
    channels: int
    decoder: str = ""


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
        trimmed: None: a file that ends before the segment does is the segment itself, read from 0.

    Raises:
        DecodeError: missing, unreadable, empty, truncated, damaged, or not finite.
        UserError: the file needs ffmpeg, and there is none.
    """
    length = seconds if end is None else min(seconds, end - start)
    segment = Segment(path, start, length, trimmed)
    raw = _read(segment)
    if not MIN_RATE <= raw.rate <= MAX_RATE:
        raise DecodeError(f"sample rate: {raw.rate} Hz is outside {MIN_RATE} to {MAX_RATE}")
    if not len(raw.mono):
        whole = f"a {raw.duration:g} s file" if math.isfinite(raw.duration) else "the file"
        raise DecodeError(f"empty: no samples in the segment from {start:g} s of {whole}")
    if len(raw.mono) < round(length * raw.rate) - 1:
        check_promise(path)
    mono = raw.mono
    if raw.rate != rate:
        mono = soxr.resample(mono, raw.rate, rate, quality="HQ")
    mono = mono[: round(seconds * rate)]
    if not len(mono):
        raise DecodeError(f"empty: {len(raw.mono)} samples at {raw.rate} Hz are none at {rate} Hz")
    if not np.isfinite(mono).all():  # a NaN or infinity in any channel is one here
        raise DecodeError("not finite: NaN or infinite samples")
    duration = raw.duration if math.isfinite(raw.duration) else len(raw.mono) / raw.rate
    return Decoded(mono, duration, raw.rate, raw.channels, raw.decoder)


def _read(segment: Segment) -> Raw:
    handle = open_file(segment.path)
    ogg = os.pread(handle, 4, 0) == b"OggS"
    if ogg and ffmpeg_codecs.torchcodec() is not None:
        os.close(handle)
        return ffmpeg_codecs.read(segment)
    try:
        file = _Forward(handle)  # owns the handle, and has closed it when it fails
    except soundfile.LibsndfileError as error:
        refuse_text(segment.path)
        return ffmpeg_codecs.read(segment, error.error_string)
    with file:
        return _read_soundfile(file, segment)


class _Forward(soundfile.SoundFile):  # type: ignore[misc]
    """Read from front to back: no seeking after each read, which fails where a FLAC's length is unknown."""

    def seekable(self) -> bool:
        return False


def _read_soundfile(file: soundfile.SoundFile, segment: Segment) -> Raw:
    rate, frames = file.samplerate, file.frames
    promised = _promised(file)
    duration = promised / rate if promised < UNKNOWN_FRAMES else math.inf
    first = round(segment.begin(duration) * rate)
    wanted = max(0, min(round(segment.length * rate), promised - first))
    try:
        if wanted and first:
            file.seek(min(first, frames))
        mono = _read_mono(file, wanted)
    except soundfile.LibsndfileError as error:
        raise DecodeError(f"damaged: {error}") from error
    if len(mono) < wanted and promised < UNKNOWN_FRAMES:
        raise DecodeError(f"truncated: {len(mono) / rate:.2f} s of {wanted / rate:.2f} s could be decoded")
    return Raw(mono, rate, duration, file.channels, "soundfile")


def _promised(file: soundfile.SoundFile) -> int:
    """Frames that the header promises; a size that was unknown when the header was written promises none."""
    note = PROMISE.search(file.extra_info)
    if note is None:
        return int(file.frames)
    said, held = int(note[1]), int(note[2])
    if not 0 < said < UNKNOWN_SIZE or not held:
        return int(file.frames)
    return int(file.frames * said / held)


def _read_mono(file: soundfile.SoundFile, wanted: int) -> np.ndarray:
    """float32 [at most wanted]; channels are added block by block, in the cache."""
    mono = np.empty(wanted, np.float32)
    if file.channels == 1:
        return np.asarray(file.read(out=mono)) if wanted else mono
    block = np.empty((min(BLOCK_FRAMES, wanted), file.channels), np.float32)
    done = 0
    while done < wanted:
        part = file.read(out=block[: wanted - done])
        if not len(part):
            break
        mono[done : done + len(part)] = down_mix(part)
        done += len(part)
    return mono[:done]
