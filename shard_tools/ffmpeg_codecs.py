"""What libsndfile does not read (AAC, Opus, video files): FFmpeg's libraries, or its program.

In: a `Segment`. Out: `Raw`, or a `DecodeError`.

torchcodec calls FFmpeg's shared libraries and is ten times as fast as a process for each clip; it is optional,
and where it is missing or cannot load them, the ffmpeg program (the system's, or imageio-ffmpeg's) does
all the work, which is said once. Where torchcodec meets trouble in a file, the program has the last
word, so a file fails for the same reason on every machine. Both seek to the segment.
"""

import importlib
import logging
import math
import re
import shutil
import subprocess
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import ffmpeg
import imageio_ffmpeg
import numpy as np

from pipeline.errors import UserError
from shard_tools.segment import SLACK, DecodeError, Raw, Segment, down_mix

log = logging.getLogger(__name__)

TIME_LIMIT = 60.0  # seconds that a decoder may take for one segment
PREROLL = 1.0  # seconds decoded before the segment and dropped: Opus, AAC and mp3 need their past
SOURCE = "source"
WAV_HEADER = 200  # bytes, at most, of ffmpeg's WAV without audio
NO_DURATION = "Estimating duration from bitrate"  # FFmpeg's guess, no promise of the file's


_loading: list[Callable[[str], None]] = [lambda what: None]


def when_loading(tell: Callable[[str], None]) -> None:
    """`tell` is called with a name before a slow import and with "" after it."""
    _loading[0] = tell


_wanted = [""]


def use(decoder: str) -> None:
    """Fixes what this process decodes with: "torchcodec" or "ffmpeg"; "": the best there is."""
    _wanted[0] = decoder


def available() -> str:
    """Returns "torchcodec" where it works here, else "ffmpeg", with a warning."""
    return "ffmpeg" if _torchcodec() is None else "torchcodec"


def torchcodec() -> Any | None:
    """The `AudioDecoder` class of torchcodec; None: the ffmpeg program is used.

    Raises:
        UserError: torchcodec must be used and does not work here.
    """
    if _wanted[0] == "ffmpeg":
        return None
    decoder = _torchcodec()
    if decoder is None and _wanted[0] == "torchcodec":
        raise UserError(
            "torchcodec does not work on this machine, and the build was begun with it; install it here too "
            "(pip install 'craft-audio[torchcodec]'), or begin anew with --overwrite on a machine without it"
        )
    return decoder


@lru_cache(maxsize=1)
def _torchcodec() -> Any | None:
    """The class, if it works here; that it does not is said once."""
    _loading[0]("torchcodec")
    try:
        # Imports torch: only where a file needs it.
        decoder = importlib.import_module("torchcodec.decoders").AudioDecoder
        importlib.import_module("torch").set_num_threads(1)
    except ImportError:
        decoder, reason = None, "torchcodec is not installed (pip install 'craft-audio[torchcodec]')"
    except (OSError, RuntimeError) as error:
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        decoder, reason = None, f"torchcodec cannot load FFmpeg's libraries ({first.strip()})"
    _loading[0]("")
    if decoder is None:
        log.warning("%s: an ffmpeg process decodes what libsndfile cannot, ten times slower", reason)
    return decoder


@lru_cache(maxsize=1)
def ffmpeg_binary() -> str:
    """The ffmpeg program that is used.

    Raises:
        UserError: there is none.
    """
    try:
        return shutil.which("ffmpeg") or str(imageio_ffmpeg.get_ffmpeg_exe())
    except RuntimeError as error:
        raise UserError("no ffmpeg program; install the system's ffmpeg, or pip install imageio-ffmpeg") from error


def read(segment: Segment, first_reason: str = "") -> Raw:
    """Reads a segment of the file's first audio track.

    Args:
        segment: Of any file that FFmpeg knows.
        first_reason: Why libsndfile did not.

    Raises:
        DecodeError: FFmpeg's reason.
        UserError: no ffmpeg program.
    """
    decoder = torchcodec()
    raw = None if decoder is None else _read_torchcodec(decoder, segment)
    return raw or _read_ffmpeg(segment, first_reason)


def _read_torchcodec(decoder: Any, segment: Segment) -> Raw | None:
    """None: the ffmpeg program shall decide."""
    try:
        source = f"file:{segment.path}"
        source.encode()  # torchcodec takes UTF-8 names only
        opened = decoder(source)
        about = opened.metadata
        duration = about.duration_seconds
        if duration is None:
            return None
        begin = segment.begin(duration)
        expected = min(segment.length, duration - begin)
        if expected <= 0:
            return None
        got = opened.get_samples_played_in_range(begin, begin + segment.length)
    except (RuntimeError, ValueError, UnicodeEncodeError):
        return None
    samples, rate = got.data.numpy().T, int(got.sample_rate)
    if len(samples) / rate < (expected - SLACK if _holds_duration(segment.path) else segment.length):
        return None
    return Raw(down_mix(samples), rate, duration, samples.shape[1], "torchcodec")


def _holds_duration(path: str) -> bool:
    """A container; streams without one (ADTS, AC-3) end where they are cut, and only the program complains."""
    with open(path, "rb") as file:
        head = file.read(8)
    return head[4:] == b"ftyp" or head.startswith((b"OggS", b"\x1a\x45\xdf\xa3", b"RIFF", b"\x30\x26\xb2\x75"))


def _read_ffmpeg(segment: Segment, first_reason: str) -> Raw:
    raw, duration = _run_ffmpeg(segment, segment.start, first_reason)
    begin = segment.begin(duration)
    if begin != segment.start:  # the file turned out to be the segment itself
        raw, duration = _run_ffmpeg(segment, begin, first_reason)
    expected = min(segment.length, duration - begin) if math.isfinite(duration) else 0.0
    if len(raw.mono) / raw.rate < expected - SLACK:
        raise DecodeError(f"truncated: {len(raw.mono) / raw.rate:.2f} s of {expected:.2f} s could be decoded")
    return raw


def _run_ffmpeg(segment: Segment, begin: float, first_reason: str) -> tuple[Raw, float]:
    """Decodes from `begin` with one process; also the duration that the file's header has, or infinity."""
    preroll = min(PREROLL, begin)
    seek = {"ss": begin - preroll} if begin > preroll else {}
    source = ffmpeg.input(SOURCE, t=segment.length + preroll, protocol_whitelist="file", **seek)
    stream = source["a:0"].output("pipe:", format="wav", acodec="pcm_f32le")
    stream = stream.global_args("-nostdin", "-hide_banner", "-v", "level+info", "-nostats", "-xerror")
    # The name goes in afterwards: ffmpeg-python takes UTF-8 names only. `file:` keeps a leading dash or a
    # colon a part of the name; and nothing but files is opened, whatever a container names.
    name = f"file:{segment.path}"
    status, out, said = _run([name if word == SOURCE else word for word in stream.compile(cmd=ffmpeg_binary())])
    complaints = [line for line in said.splitlines() if "[error]" in line or "[fatal]" in line]
    if complaints or status or not out:
        reason = re.sub(r"\[(error|fatal|[\w,]+ @ 0x[0-9a-f]+)\] ?", "", complaints[0]) if complaints else ""
        reason = reason.replace(name, "").strip(" :") or (f"ffmpeg exited with {status}" if out else first_reason)
        raise DecodeError(f"{'damaged' if len(out) > WAV_HEADER else 'undecodable'}: {reason}")
    samples, rate = parse_wav(out)
    duration = _duration(said)
    mono = down_mix(samples)[round(preroll * rate) :]
    return Raw(mono, rate, duration, samples.shape[1], "ffmpeg"), duration


def _duration(said: str) -> float:
    found = re.search(r"Duration: (\d+):(\d+):(\d+\.\d+)", said)
    if found is None or NO_DURATION in said:
        return math.inf
    hours, minutes, seconds = found.groups()
    return 3600 * int(hours) + 60 * int(minutes) + float(seconds)


def _run(command: list[str]) -> tuple[int, bytes, str]:
    try:
        done = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, timeout=TIME_LIMIT, check=False)
    except subprocess.TimeoutExpired as error:
        raise DecodeError(f"timeout: the decoder took longer than {TIME_LIMIT:g} s") from error
    return done.returncode, done.stdout, done.stderr.decode("utf-8", "replace")


def parse_wav(data: bytes) -> tuple[np.ndarray, int]:
    """float32 [n, channels] and the rate of a WAV written to a pipe: its sizes are unknown, `data` runs to the end."""
    at, rate, channels = 12, 0, 0
    while at + 8 <= len(data):
        name, size = data[at : at + 4], int.from_bytes(data[at + 4 : at + 8], "little")
        at += 8
        if name == b"fmt ":
            channels = int.from_bytes(data[at + 2 : at + 4], "little")
            rate = int.from_bytes(data[at + 4 : at + 8], "little")
        elif name == b"data":
            count = (len(data) - at) // (4 * channels) * channels
            return np.frombuffer(data, "<f4", count, at).reshape(-1, channels), rate
        at += size
    raise DecodeError("undecodable: the decoder wrote no audio")
