"""Any audio file -> mono float32 samples of one segment at one rate.

In: a path and a segment. Out: `Decoded`, or a `DecodeError` whose text is the reason.

libsndfile reads what it can, seeking to the segment; ffmpeg (the system's binary, or imageio-ffmpeg's)
reads the rest, containers and video files included. Resampling is always soxr HQ: the resamplers
inside torchaudio and ffmpeg fold tones just above Nyquist back at -9 to -60 dB, soxr HQ at -138 dB.
A subprocess costs about ten times a library call, so it is the fall-back and not the rule.
"""

import io
import logging
import re
import shutil
import subprocess
from dataclasses import dataclass
from functools import lru_cache

import ffmpeg
import imageio_ffmpeg
import numpy as np
import soundfile
import soxr

log = logging.getLogger(__name__)

TIME_LIMIT = 60.0  # seconds that a decoder may take for one segment
MIN_RATE, MAX_RATE = 1000, 768000


class DecodeError(Exception):
    """The clip cannot be used; the text is the reason for `failures.jsonl`."""


@dataclass(slots=True)
class Decoded:
    """One segment.

    Attributes:
        waveform: float32 [n], mono, at the requested rate, unpadded.
        duration: Seconds of the whole source file.
        sample_rate: Of the source.
        channels: Of the source.
    """

    waveform: np.ndarray
    duration: float
    sample_rate: int
    channels: int


@dataclass(slots=True)
class _Raw:
    samples: np.ndarray  # float32 [n, channels] at the source's rate
    duration: float
    sample_rate: int


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
        DecodeError: missing, unreadable, empty, truncated, or not finite.
    """
    length = seconds if end is None else min(seconds, end - start)
    try:
        raw = _read_soundfile(path, start, length, trimmed)
    except soundfile.LibsndfileError as error:
        raw = _read_ffmpeg(path, start, length, trimmed, str(error))
    except OSError as error:
        raise DecodeError(f"unreadable: {error.strerror or error}") from error
    if not MIN_RATE <= raw.sample_rate <= MAX_RATE:
        raise DecodeError(f"sample rate {raw.sample_rate} Hz is outside {MIN_RATE} to {MAX_RATE}")
    if not len(raw.samples):
        raise DecodeError(f"empty: no samples in the segment from {start:g} s of a {raw.duration:g} s file")
    if not np.isfinite(raw.samples).all():
        raise DecodeError("not finite: NaN or infinite samples")
    mono = down_mix(raw.samples)
    if raw.sample_rate != rate:
        mono = soxr.resample(mono, raw.sample_rate, rate, quality="HQ")
    return Decoded(np.ascontiguousarray(mono[: round(seconds * rate)]), raw.duration, raw.sample_rate,
                   raw.samples.shape[1])  # fmt: skip


def down_mix(samples: np.ndarray) -> np.ndarray:
    """Mean of the channels, [n, channels] -> [n]; by adding columns, 25 times faster than `mean(1)`."""
    total = samples[:, 0].astype(np.float32, copy=True)
    for channel in range(1, samples.shape[1]):
        total += samples[:, channel]
    return total / np.float32(samples.shape[1]) if samples.shape[1] > 1 else total


def _read_soundfile(path: str, start: float, length: float, trimmed: bool | None) -> _Raw:
    with soundfile.SoundFile(path) as file:
        rate, frames = file.samplerate, file.frames
        if "should be" in file.extra_info:  # libsndfile's note on a header that promises more than the file has
            raise DecodeError("truncated: the header promises more audio than the file holds")
        if trimmed is None and frames < round((start + length - 0.5) * rate):
            start = 0.0
        first = round(start * rate)
        wanted = max(0, min(round(length * rate), frames - first))
        if wanted:
            file.seek(first)
        try:
            samples = file.read(wanted, dtype="float32", always_2d=True)
        except soundfile.LibsndfileError as error:
            raise DecodeError(f"damaged: {error}") from error
        if len(samples) < wanted:
            raise DecodeError(f"truncated: {len(samples) / rate:.2f} s of {wanted / rate:.2f} s could be decoded")
        return _Raw(samples, frames / rate, rate)


@lru_cache(maxsize=1)
def ffmpeg_binary() -> str:
    """The ffmpeg that is used; said once per process."""
    binary = shutil.which("ffmpeg") or imageio_ffmpeg.get_ffmpeg_exe()
    log.info("files that libsndfile cannot read are decoded by %s", binary)
    return binary


def _read_ffmpeg(path: str, start: float, length: float, trimmed: bool | None, first_reason: str) -> _Raw:
    source = f"file:{path}"  # a name with a leading dash or a colon is a name
    binary = ffmpeg_binary()
    duration = _duration(binary, source, first_reason)
    if trimmed is None and duration < start + length - 0.5:
        start = 0.0
    stream = ffmpeg.input(source, ss=start, t=length).audio.output("pipe:", format="wav", acodec="pcm_f32le")
    command = stream.global_args("-nostdin", "-v", "error", "-xerror").compile(cmd=binary)
    out, errors = _run(command)
    reason = errors.strip().splitlines()[-1] if errors.strip() else ""
    if not out:
        raise DecodeError(f"undecodable: {reason or first_reason}")
    if reason:
        raise DecodeError(f"damaged: {reason}")
    samples, rate = _parse_wav(out)
    expected = min(length, duration - start)
    if len(samples) / rate < expected - 0.5:
        raise DecodeError(f"truncated: {len(samples) / rate:.2f} s of {expected:.2f} s could be decoded")
    return _Raw(samples, duration, rate)


def _duration(binary: str, source: str, first_reason: str) -> float:
    _, errors = _run([binary, "-nostdin", "-hide_banner", "-i", source])
    if "Audio:" not in errors:
        lines = errors.strip().splitlines()
        raise DecodeError(f"undecodable: {lines[-1] if lines else first_reason}")
    found = re.search(r"Duration: (\d+):(\d+):(\d+\.\d+)", errors)
    if found is None:
        return 0.0
    hours, minutes, seconds = found.groups()
    return 3600 * int(hours) + 60 * int(minutes) + float(seconds)


def _run(command: list[str]) -> tuple[bytes, str]:
    try:
        done = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, timeout=TIME_LIMIT, check=False)
    except subprocess.TimeoutExpired as error:
        raise DecodeError(f"timeout: the decoder took longer than {TIME_LIMIT:g} s") from error
    return done.stdout, done.stderr.decode("utf-8", "replace")


def _parse_wav(data: bytes) -> tuple[np.ndarray, int]:
    """A WAV written to a pipe: the sizes in its header are unknown to the writer, so `data` runs to the end."""
    view = io.BytesIO(data)
    view.seek(12)
    rate = channels = 0
    while True:
        name, size = view.read(4), int.from_bytes(view.read(4), "little")
        if name == b"fmt ":
            fmt = view.read(size)
            channels, rate = int.from_bytes(fmt[2:4], "little"), int.from_bytes(fmt[4:8], "little")
        elif name == b"data":
            body = data[view.tell() :]
            count = len(body) // (4 * channels) * channels
            return np.frombuffer(body, "<f4", count).reshape(-1, channels), rate
        elif not name:
            raise DecodeError("undecodable: the decoder wrote no audio")
        else:
            view.seek(size, io.SEEK_CUR)
