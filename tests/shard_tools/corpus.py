"""Bad files and odd files, and what must become of each: the table that `test_bad_audio.py` checks.

`KEPT` clips are in the shards and hold the audio that was put in; of all others the table has the beginning of
the reason that `failures.jsonl` must give.
"""

import os
import socket
import struct
import subprocess
from pathlib import Path

import numpy as np
import soundfile

from shard_tools.ffmpeg_codecs import ffmpeg_binary

RATE = 16000
SECONDS = 3.0  # of every file, and of the clip that is asked for
KEPT = "kept"
SHORTER = "kept, shorter"  # nothing in the file tells that there was more
LEVEL = 0.1

# Suffix, options of the encoder, and the fate of the file cut to 10, 50 and 90 %.
# Headerless streams (ADTS) have no end to miss; an index at the end (m4a) is all or nothing.
TRUNCATED = {
    "pcm.wav": ("-c:a pcm_s16le", ["truncated"] * 3),
    "float.wav": ("-c:a pcm_f32le", ["truncated"] * 3),
    "a.aiff": ("", ["truncated"] * 3),
    "a.au": ("", ["truncated"] * 3),
    "a.caf": ("-c:a pcm_s16le", ["truncated"] * 3),
    "a.w64": ("", ["truncated"] * 3),
    "a.flac": ("", ["truncated"] * 3),
    "a.mp3": ("-b:a 64k", ["truncated"] * 3),
    "vorbis.ogg": ("-c:a libvorbis", ["truncated"] * 3),
    "a.opus": ("-c:a libopus", ["truncated"] * 3),
    "a.m4a": ("-c:a aac", ["undecodable"] * 3),
    "faststart.m4a": ("-c:a aac -movflags +faststart", ["undecodable", "", ""]),
    "fragmented.mp4": ("-c:a aac -movflags +frag_keyframe+empty_moov -frag_duration 500000", ["", "", ""]),
    "alac.m4a": ("-c:a alac -movflags +faststart", ["", "", ""]),
    "opus.webm": ("-c:a libopus", ["", "", ""]),
    "vorbis.mkv": ("-c:a libvorbis", ["", "", ""]),
    "a.wma": ("-c:a wmav2", ["", "", ""]),
    "a.aac": ("-c:a aac", [SHORTER, SHORTER, SHORTER]),
    "a.ac3": ("-c:a ac3", [SHORTER, SHORTER, SHORTER]),
}
VIDEO = "-f lavfi -i testsrc=size=64x48:rate=5 -shortest"


def encode(source: Path, target: Path, options: str, before: str = "") -> None:
    command = [ffmpeg_binary(), "-v", "error", "-y", "-i", f"file:{source}", *before.split(), *options.split()]
    subprocess.run([*command, f"file:{target}"], check=True)


def noise(seconds: float = SECONDS, rate: int = RATE, channels: int = 1, seed: int = 0) -> np.ndarray:
    """Low-passed noise: no codec turns it into something else."""
    white = np.random.default_rng(seed).standard_normal(round(seconds * rate) + 64)
    smooth = np.convolve(white, np.hanning(64), "valid")[: round(seconds * rate)]
    return np.repeat((LEVEL * smooth / smooth.std())[:, None], channels, axis=1)
