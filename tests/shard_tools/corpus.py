"""Bad files and odd files, and what must become of each: the table that `test_bad_audio.py` checks.

The fate of a file is `KEPT` (it is in the shards and holds the audio that was put in), `SILENT` (in the shards,
as silence), `UNTOLD` (damage that nothing in the file tells: in the shards, perhaps shorter), or else the beginning
of the reason that `failures.jsonl` must give. Truncated and damaged files are made of files that are `KEPT`.
"""

import os
import socket
import struct
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import soundfile
import soxr

SECONDS = 3.0  # of every file, and of the clip that is asked for
KEPT, SILENT, UNTOLD = "kept", "silent", "untold"
ANY = ("truncated", "damaged", "undecodable")


@dataclass(frozen=True)
class Case:
    """A file below the corpus's folder, what must become of it, and the seconds that the shards hold of it."""

    name: str
    fate: str | tuple[str, ...]
    seconds: float = SECONDS


# Name, the encoder's options, and the fate when cut to 10, 50 and 90 %, and with a hole of garbage in the middle.
CODECS: dict[str, tuple[str, list[str | tuple[str, ...]]]] = {
    "pcm.wav": ("-c:a pcm_s16le", ["truncated", "truncated", "truncated", UNTOLD]),
    "float.wav": ("-c:a pcm_f32le", ["truncated", "truncated", "truncated", ("not finite", UNTOLD)]),
    "adpcm.wav": ("-c:a adpcm_ima_wav", ["truncated", "truncated", "truncated", UNTOLD]),
    "a.aiff": ("", ["truncated", "truncated", "truncated", UNTOLD]),
    "a.au": ("", ["truncated", "truncated", "truncated", UNTOLD]),
    "a.caf": ("-c:a pcm_s16le", [ANY, ANY, ANY, UNTOLD]),
    "a.w64": ("", ["truncated", "truncated", "truncated", UNTOLD]),
    "a.flac": ("", [ANY, ANY, ANY, "damaged"]),
    "a.mp3": ("-b:a 64k", ["truncated", "truncated", "truncated", ANY]),
    "vorbis.ogg": ("-c:a libvorbis", [ANY, ANY, ANY, ANY]),
    "a.opus": ("-c:a libopus", [ANY, ANY, ANY, ANY]),
    "end.m4a": ("-c:a aac", ["undecodable", "undecodable", "undecodable", "damaged"]),
    "front.m4a": ("-c:a aac -movflags +faststart", [ANY, ANY, ANY, "damaged"]),
    "fragmented.mp4": ("-c:a aac -movflags +frag_keyframe+empty_moov -frag_duration 5e5", [ANY, ANY, ANY, "damaged"]),
    "alac.m4a": ("-c:a alac -movflags +faststart", [ANY, ANY, ANY, ANY]),
    "opus.webm": ("-c:a libopus", [ANY, ANY, ANY, ANY]),
    "vorbis.mkv": ("-c:a libvorbis", [ANY, ANY, ANY, ANY]),
    "a.wma": ("-c:a wmav2", [ANY, (*ANY, UNTOLD), ANY, ANY]),
    "a.aac": ("-c:a aac", [ANY, ANY, ANY, ANY]),
    "a.ac3": ("-c:a ac3", [UNTOLD, UNTOLD, UNTOLD, ANY]),
    "video.mp4": ("-c:a aac -c:v mpeg4", [ANY, ANY, ANY, ANY]),
}  # fmt: skip
VIDEO = ("-f", "lavfi", "-i", "testsrc=size=64x48:rate=5:duration=3")


def encode(source: Path, target: Path, *options: str) -> None:
    """Runs the ffmpeg program that imageio-ffmpeg brings; `options` stand before the target."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", "-i", f"file:{source}", *options, f"file:{target}"]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)


@lru_cache(maxsize=1)
def _reference() -> np.ndarray:
    """Noise below 2 kHz at 48 kHz: no codec makes anything else of it."""
    white = np.random.default_rng(0).standard_normal(round(SECONDS * 48000) + 63)
    smooth = np.convolve(white, np.hanning(64), "valid")
    return 0.1 * smooth / smooth.std()


def sound(rate: int = 16000, channels: int = 1) -> np.ndarray:
    """The reference, float64 [n, channels], at any rate."""
    mono = _reference() if rate == 48000 else soxr.resample(_reference(), 48000, rate, quality="HQ")
    return np.repeat(mono[:, None], channels, axis=1)


def make_corpus(root: Path) -> list[Case]:
    """Writes all files below `root`."""
    root.mkdir(parents=True)
    (root / "scratch").mkdir()
    made: list[Case] = []
    for maker in (_codecs, _formats, _headers, _contents, _not_audio, _files, _names):
        made += maker(root)
    for file in (root / "scratch").iterdir():
        file.unlink()
    (root / "scratch").rmdir()
    assert len({case.name for case in made}) == len(made)
    return made


def _codecs(root: Path) -> Iterator[Case]:
    source = root / "scratch" / "source.wav"
    soundfile.write(source, sound(48000, 2), 48000)
    for name, (options, fates) in CODECS.items():
        encode(source, root / name, *(VIDEO if "-c:v" in options else ()), *options.split())
        yield Case(name, KEPT)
        content = (root / name).read_bytes()
        for share, fate in zip((10, 50, 90), fates[:3], strict=True):
            (root / f"cut{share}_{name}").write_bytes(content[: len(content) * share // 100])
            yield Case(f"cut{share}_{name}", fate)
        hole = np.random.default_rng(1).bytes(len(content) // 20)
        middle = len(content) // 2
        (root / f"hole_{name}").write_bytes(content[:middle] + hole + content[middle + len(hole) :])
        yield Case(f"hole_{name}", fates[3])
    tracks = ("-map", "0:a", "-map", "0:a", "-c:a", "aac")
    encode(source, root / "two_tracks.mp4", *VIDEO, "-map", "1:v", "-c:v", "mpeg4", *tracks)
    yield Case("two_tracks.mp4", KEPT)
    encode(source, root / "no_sound.mp4", *VIDEO, "-map", "1:v", "-c:v", "mpeg4")
    yield Case("no_sound.mp4", "undecodable")
    encode(source, root / "picture.mp3", *VIDEO, "-map", "1:v", "-frames:v", "1", "-f", "image2", "-c:v", "png")
    yield Case("picture.mp3", "undecodable")


def _formats(root: Path) -> Iterator[Case]:
    for rate in (8000, 11025, 44100, 48000, 96000, 192000):
        soundfile.write(root / f"rate{rate}.wav", sound(rate), rate)
        yield Case(f"rate{rate}.wav", KEPT)
    for channels in range(1, 9):
        soundfile.write(root / f"channels{channels}.wav", sound(channels=channels), 16000)
        yield Case(f"channels{channels}.wav", KEPT)
    for subtype in ("PCM_U8", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW", "ALAW"):
        soundfile.write(root / f"{subtype}.wav", sound(), 16000, subtype=subtype)
        yield Case(f"{subtype}.wav", KEPT)
    for name, subtype in (("pcm24.flac", "PCM_24"), ("pcm8.flac", "PCM_S8")):
        soundfile.write(root / name, sound(), 16000, subtype=subtype)
        yield Case(name, KEPT)
    for name in ("WAV.mp3", "FLAC.wav", "WAV.raw", "WAV", "MP3.wav"):
        soundfile.write(root / name, sound(), 16000, format=name.split(".")[0])
        yield Case(name, KEPT)
    encode(root / "rate48000.wav", root / "m4a.flac", "-c:a", "aac", "-f", "ipod")
    yield Case("m4a.flac", KEPT)


def _headers(root: Path) -> Iterator[Case]:
    """A 44-byte header in front of 16-bit mono, one field of which lies."""
    data = np.rint(sound()[:, 0] * 32768).astype("<i2").tobytes()
    whole = {"riff": 36 + len(data), "kind": 1, "channels": 1, "rate": 16000, "align": 2, "bits": 16, "data": len(data)}

    def write(name: str, **lies: int) -> None:
        head = whole | lies
        form = [head[field] for field in ("kind", "channels", "rate")]
        form += [head["rate"] * head["align"] % 2**32, head["align"], head["bits"]]
        content = struct.pack("<4sI8sIHHIIHH4sI", b"RIFF", head["riff"], b"WAVEfmt ", 16, *form, b"data", head["data"])
        (root / name).write_bytes(content + data)

    for name, fate, lies in (
        ("unclosed.wav", KEPT, {"riff": 0, "data": 0}),
        ("piped.wav", KEPT, {"riff": 0xFFFFFFFF, "data": 0xFFFFFFFF}),
        ("riff_too_long.wav", KEPT, {"riff": len(data) + 5000}),
        ("twice_as_long.wav", KEPT, {"data": 2 * len(data)}),
        ("rate0.wav", ("sample rate", "undecodable"), {"rate": 0}),
        ("rate1.wav", "sample rate", {"rate": 1}),
        ("rate4G.wav", ("sample rate", "undecodable"), {"rate": 0xFFFFFFFF}),
        ("channels0.wav", "undecodable", {"channels": 0}),
        ("channels65535.wav", "undecodable", {"channels": 65535}),
        ("bits0.wav", "undecodable", {"bits": 0, "align": 0}),
        ("codec_unknown.wav", "undecodable", {"kind": 0x7777}),
    ):
        write(name, **lies)
        yield Case(name, fate)
    write("half_as_long.wav", data=len(data) // 2)
    yield Case("half_as_long.wav", KEPT)
    write("double_rate.wav", rate=32000)  # nothing tells
    yield Case("double_rate.wav", UNTOLD, SECONDS / 2)
    soundfile.write(root / "scratch" / "a.flac", sound(), 16000)
    flac = bytearray((root / "scratch" / "a.flac").read_bytes())
    for name, fate, total in (("no_total.flac", KEPT, 0), ("twice_as_long.flac", KEPT, 96000)):
        flac[22:26] = total.to_bytes(4, "big")  # the low bits of STREAMINFO's 36-bit count
        (root / name).write_bytes(bytes(flac))
        yield Case(name, fate)


def _contents(root: Path) -> Iterator[Case]:
    one = sound()
    rows: list[tuple[str, np.ndarray, str, str, float]] = [
        ("silence.wav", 0 * one, "PCM_16", SILENT, SECONDS),
        ("denormals.wav", one * 1e-40, "FLOAT", SILENT, SECONDS),
        ("denormals64.wav", one * 1e-310, "DOUBLE", SILENT, SECONDS),
        ("constant.wav", 0 * one + 0.7, "PCM_16", SILENT, SECONDS),
        ("dc.wav", one + 0.4, "PCM_16", KEPT, SECONDS),
        ("loud.wav", one * 1e4, "FLOAT", KEPT, SECONDS),
        ("deafening.wav", one * 1e36, "FLOAT", KEPT, SECONDS),
        ("quiet.wav", one * 1e-3, "FLOAT", KEPT, SECONDS),
        ("sum_overflows.wav", np.sign(one) * 3e38 + np.zeros((1, 4)), "FLOAT", "not finite", SECONDS),
        ("double_overflows.wav", one * 1e300, "DOUBLE", "not finite", SECONDS),
        ("nan.wav", np.where(np.arange(len(one))[:, None] == 777, np.nan, one), "FLOAT", "not finite", SECONDS),
        ("infinite.wav", np.where(np.arange(len(one))[:, None] == 777, np.inf, one), "FLOAT", "not finite", SECONDS),
        ("short.wav", one[:1600], "PCM_16", KEPT, 0.1),
        ("one_sample.wav", one[:1], "PCM_16", SILENT, 1 / 16000),
        ("no_samples.wav", one[:0], "PCM_16", "empty", 0.0),
        ("no_samples.flac", one[:0], "PCM_16", ("empty", "undecodable"), 0.0),
    ]  # fmt: skip
    for name, samples, subtype, fate, seconds in rows:
        soundfile.write(root / name, samples, 16000, subtype=subtype)
        yield Case(name, fate, seconds)
    antiphase = np.concatenate([one, -one], axis=1)
    soundfile.write(root / "antiphase.wav", antiphase, 16000)
    yield Case("antiphase.wav", SILENT)


def _not_audio(root: Path) -> Iterator[Case]:
    for name, content, fate in (
        ("zero_bytes.wav", b"", "empty"),
        ("zeros.wav", bytes(20000), "undecodable"),
        ("noise.mp3", np.random.default_rng(2).bytes(20000), "undecodable"),
        ("header_only.wav", b"RIFF\x24\0\0\0WAVE", "undecodable"),
        ("text.wav", b"this is no audio\n" * 100, "undecodable: text"),
        ("error_page.m4a", b"<!DOCTYPE html><title>404</title>" * 20, "undecodable: text"),
        ("playlist.wav", b"#EXTM3U\n#EXTINF:3,\npcm.wav\n#EXT-X-ENDLIST\n", "undecodable: text"),
        ("concat.wav", b"ffconcat version 1.0\nfile pcm.wav\n", "undecodable: text"),
        ("archive.ogg", b"PK\x03\x04" + bytes(5000), "undecodable"),
        ("pickle.bin", b"\x80\x04\x95" + bytes(200), "undecodable"),
    ):
        (root / name).write_bytes(content)
        yield Case(name, fate)


def _files(root: Path) -> Iterator[Case]:
    os.mkfifo(root / "pipe.wav")
    yield Case("pipe.wav", "unreadable: not a regular file")
    (root / "dangling.wav").symlink_to(root / "nowhere.wav")
    yield Case("dangling.wav", "vanished")
    (root / "loop.wav").symlink_to(root / "loop.wav")
    yield Case("loop.wav", "unreadable")
    (root / "link.wav").symlink_to(root / "pcm.wav")
    yield Case("link.wav", KEPT)
    with socket.socket(socket.AF_UNIX) as server:
        here = os.open(root, os.O_RDONLY)
        server.bind(f"/proc/self/fd/{here}/socket.wav")
        os.close(here)
    yield Case("socket.wav", "unreadable")
    soundfile.write(root / "forbidden.wav", sound(), 16000)
    (root / "forbidden.wav").chmod(0)
    # Root may read it; the test of `decode` alone asks as another user.
    yield Case("forbidden.wav", KEPT if os.access(root / "forbidden.wav", os.R_OK) else "unreadable: Permission denied")
    soundfile.write(root / "vanishes.wav", sound(), 16000)
    yield Case("vanishes.wav", "vanished")  # the test deletes it after the catalog was read


NAMES = (
    "two words.wav", "it's.wav", 'say "no".wav', "new\nline.wav", "tab\t.wav", "ünïcode ☃.wav", "-leading.wav",
    "--option=x.wav", "many.dots.in.it.wav", "dots...wav", "100%.wav", "back\\slash.wav", "http:x.wav",
    "concat:pcm.wav", "pipe:0.wav", "$(touch x).wav", "a;b|c&.wav", "{braces}.wav", "[glob]*?.wav", "x" * 250 + ".wav",
    "UPPER.WAV", "not\udcffutf8.wav",
)  # fmt: skip


def _names(root: Path) -> Iterator[Case]:
    """Twice each: libsndfile reads one, FFmpeg the other."""
    soundfile.write(root / "scratch" / "plain.wav", sound(), 16000)
    encode(root / "scratch" / "plain.wav", root / "scratch" / "plain.m4a", "-c:a", "aac")
    for name in NAMES:
        (root / name).write_bytes((root / "scratch" / "plain.wav").read_bytes())
        fate = "name: not UTF-8" if "\udcff" in name else KEPT
        yield Case(name, fate)
        other = f"{name[:240]}.m4a"
        (root / other).write_bytes((root / "scratch" / "plain.m4a").read_bytes())
        yield Case(other, fate)
