"""Where in a file a segment is: containers x (whole, cut, late, headerless, joined) x (start, middle, last second).

The signal is noise that never repeats, so where a stretch of it lies is heard in it, to a sample.
"""

import math
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr

from shard_tools.decode import DecodeError, decode, decode_whole
from tests.shard_tools.corpus import encode

RATE = 16000
EXACT = 0.025  # seconds


def noise(seconds: float, rate: int, seed: int = 0) -> np.ndarray:
    """Below 2 kHz, which every codec keeps; float32 [n]."""
    white = np.random.default_rng(seed).standard_normal(math.ceil(seconds * 4000) + 8).astype(np.float32)
    return 0.1 * soxr.resample(white, 4000, rate, quality="HQ")[: round(seconds * rate)]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> tuple[Path, np.ndarray]:
    """Ten seconds at 44.1 kHz, and the same at 16 kHz."""
    path = tmp_path_factory.mktemp("times") / "source.wav"
    samples = noise(10, 44100)
    soundfile.write(path, samples, 44100)
    return path, soxr.resample(samples, 44100, RATE, quality="HQ")


def heard_at(waveform: np.ndarray, wanted: np.ndarray, rate: int = RATE) -> float:
    """Second of `wanted` at which the middle of a waveform is, less that middle: where the waveform begins."""
    middle = len(waveform) // 2
    part = waveform[max(0, middle - 4000) : middle + 4000]
    size = 1 << (len(wanted) + len(part)).bit_length()
    match = np.fft.irfft(np.fft.rfft(wanted, size) * np.conj(np.fft.rfft(part, size)))[: len(wanted)]
    at = int(match.argmax())
    assert match[at] > 0.5 * np.dot(part, part), "this is nowhere in the source"
    return (at - max(0, middle - 4000)) / rate


VIDEO = ("-f", "lavfi", "-i", "testsrc=size=64x48:rate=25:duration=10", "-map", "0:a", "-map", "1:v")
# Name of the file: options of the encoder.
FILES: dict[str, tuple[str, ...]] = {
    "a.wav": (), "a.flac": (), "a.aiff": (), "a.w64": (), "a.caf": ("-c:a", "pcm_s16le"), "a.au": (),
    "a.mp3": ("-b:a", "64k"), "vbr.mp3": ("-q:a", "9"), "bare.mp3": ("-q:a", "9", "-write_xing", "0"),
    "a.mp2": ("-b:a", "64k"), "a.ogg": ("-c:a", "libvorbis"), "a.opus": ("-c:a", "libopus"),
    "flac.ogg": ("-c:a", "flac"), "a.m4a": ("-c:a", "aac"), "fast.m4a": ("-c:a", "aac", "-movflags", "+faststart"),
    "fragmented.mp4": ("-c:a", "aac", "-movflags", "+frag_keyframe+empty_moov", "-frag_duration", "5e5"),
    "a.aac": ("-c:a", "aac"), "a.ac3": ("-c:a", "ac3"), "a.eac3": ("-c:a", "eac3"), "a.wma": ("-c:a", "wmav2"),
    "opus.webm": ("-c:a", "libopus"), "vorbis.webm": ("-c:a", "libvorbis"), "aac.mkv": ("-c:a", "aac"),
    "a.mka": ("-c:a", "libmp3lame"), "a.ts": ("-c:a", "mp2"), "aac.ts": ("-c:a", "aac"), "alac.m4a": ("-c:a", "alac"),
    "a.mov": ("-c:a", "pcm_s16be"), "a.3gp": ("-c:a", "aac", "-ar", "22050"), "a.wv": (), "a.tta": (),
    "video.mp4": (*VIDEO, "-c:a", "aac", "-c:v", "mpeg4"), "video.mpg": (*VIDEO, "-c:a", "mp2", "-c:v", "mpeg1video"),
    "video.ts": (*VIDEO, "-c:a", "aac", "-c:v", "mpeg2video"), "video.avi": (*VIDEO, "-c:a", "mp3", "-c:v", "mpeg4"),
    "video.flv": (*VIDEO, "-c:a", "aac", "-c:v", "flv"), "video.webm": (*VIDEO, "-c:a", "libopus", "-c:v", "libvpx"),
}  # fmt: skip
COPIED = [name for name in FILES if name not in ("a.tta", "a.wv", "a.au", "a.aiff", "a.w64")]
JOINED = ["a.wav", "a.mp3", "vbr.mp3", "bare.mp3", "a.mp2", "a.ogg", "a.opus", "a.aac", "a.ac3", "a.eac3", "a.ts"]
# The codec's delay that no header declares is sound of the file: 1105 samples of mp3, 1024 of AAC. WMA's decoder leaves
# out its first frame.
DELAY = 0.055


@pytest.fixture(scope="module")
def made(source):
    """Files of `FILES`, each made once."""
    folder = source[0].parent

    def make(name: str) -> Path:
        if not (folder / name).exists():
            encode(source[0], folder / name, *FILES[name])
        return folder / name

    return make


def whole(path: Path) -> np.ndarray:
    """All of a file, read from front to back: what the places of segments are counted in."""
    problems: list[str] = []
    waveform = np.concatenate(list(decode_whole(str(path), RATE, problems)))
    assert problems == []
    return waveform


def check_segments(path: Path, everything: np.ndarray, rate: int = RATE) -> None:
    """Start, middle and last second are where they are in the whole file; what lies past its end is a reason."""
    length = len(everything) / rate
    for start in (0.0, 0.37 * length, length - 1):
        decoded = decode(str(path), start, start + 1, rate=rate, seconds=10, trimmed=False)
        assert len(decoded.waveform) == pytest.approx(rate, abs=0.02 * rate)
        around = everything[max(0, round((start - 1) * rate)) : round((start + 2) * rate)]
        found = heard_at(decoded.waveform, around, rate) + max(0.0, start - 1)
        assert found == pytest.approx(start, abs=EXACT), (path.name, start)
        assert decoded.duration == pytest.approx(length, abs=0.065)  # a header counts the last frame whole
        assert not decoded.cut
    cut = decode(str(path), length - 0.6, length + 2, rate=rate, seconds=10, trimmed=False)
    assert cut.cut
    assert len(cut.waveform) == pytest.approx(0.6 * rate, abs=EXACT * rate)
    with pytest.raises(DecodeError, match="outside: the segment from"):
        decode(str(path), length + 3, length + 4, rate=rate, seconds=10, trimmed=False)


@pytest.mark.parametrize("name", FILES)
def test_whole_files(made, source, name):
    everything = whole(made(name))
    assert len(everything) / RATE == pytest.approx(10, abs=DELAY)
    assert abs(heard_at(everything, source[1])) < DELAY
    check_segments(made(name), everything)


@pytest.mark.parametrize("name", COPIED)
def test_files_cut_with_their_time_stamps(made, source, tmp_path, name):
    """From second 3 on, packets and time stamps copied: second 0 is the first sample that is there."""
    path = tmp_path / name
    encode(made(name), path, "-ss", "3", "-c", "copy", "-copyts", "-avoid_negative_ts", "disabled")
    everything = whole(path)
    assert 1.5 < heard_at(everything, source[1]) < 4.1  # a page of Ogg holds a second; the clock of ts begins at 1.4 s
    check_segments(path, everything)


@pytest.mark.parametrize("name", ["a.ts", "aac.mkv", "a.m4a", "opus.webm", "video.mp4", "video.ts", "a.ogg"])
def test_streams_that_begin_late(made, source, tmp_path, name):
    """Their first time stamp is at 77 s."""
    path = tmp_path / name
    encode(made(name), path, "-c", "copy", "-output_ts_offset", "77")
    everything = whole(path)
    assert abs(heard_at(everything, source[1])) < DELAY
    assert len(everything) / RATE == pytest.approx(10, abs=DELAY)
    check_segments(path, everything)


@pytest.mark.parametrize("name", JOINED)
def test_files_joined_with_cat(made, source, tmp_path, name):
    path = tmp_path / name
    content = made(name).read_bytes()
    path.write_bytes(content + content)
    everything = whole(path)
    if name != "a.wav":  # whose header says where it ends
        assert len(everything) / RATE == pytest.approx(20, abs=2 * DELAY)
        assert heard_at(everything[10 * RATE + RATE : 18 * RATE], source[1]) == pytest.approx(1, abs=2 * DELAY)
    check_segments(path, everything)


@pytest.mark.parametrize("size", ["half", "twice", "nothing", "unknown", "both"])
def test_a_wav_whose_size_is_wrong(source, tmp_path, size):
    """The audio ends where the file does, or where another chunk begins."""
    path = tmp_path / "a.wav"
    content = bytearray(source[0].read_bytes())
    at = content.index(b"data") + 4
    held = len(content) - at - 4
    said = {"half": held // 2, "twice": 2 * held, "nothing": 0, "unknown": 0xFFFFFFFF, "both": held // 2}[size]
    content[at : at + 4] = said.to_bytes(4, "little")
    if size == "both":
        content[4:8] = (said + at - 4).to_bytes(4, "little")
    path.write_bytes(bytes(content))
    problems: list[str] = []
    everything = np.concatenate(list(decode_whole(str(path), RATE, problems)))
    assert problems == (["truncated: its header promises 10.0 s more"] if size == "twice" else [])
    assert len(everything) == pytest.approx(10 * RATE, abs=2)
    for start in (0.0, 4.2, 9.0):
        decoded = decode(str(path), start, start + 1, rate=RATE, seconds=10, trimmed=False)
        assert heard_at(decoded.waveform, source[1]) == pytest.approx(start, abs=0.001)
        assert decoded.duration == pytest.approx(10, abs=0.001)


def test_chunks_and_tags_behind_the_data_are_no_audio(source, tmp_path):
    for number, tail in enumerate([b"LIST\4\0\0\0INFO", b"\0" * 3000, b"TAG" + b"x" * 125, b"id3 \2\0\0\0ab"]):
        path = tmp_path / f"{number}.wav"
        path.write_bytes(source[0].read_bytes() + tail)
        assert len(whole(path)) == pytest.approx(10 * RATE, abs=2)


@pytest.mark.parametrize(("name", "options"), [
    ("a.mp3", ("-q:a", "9", "-write_xing", "0")), ("a.m4a", ("-c:a", "aac")), ("a.opus", ("-c:a", "libopus")),
    ("a.webm", ("-c:a", "libopus")), ("a.ts", ("-c:a", "mp2")),
])  # fmt: skip
def test_what_is_skipped_is_counted_as_if_decoded(source, tmp_path, monkeypatch, name, options):
    """A segment after skipped or sought packets has the samples that decoding everything from the front gives."""
    soundfile.write(tmp_path / "a.wav", np.tile(noise(10, 44100), 3), 44100)
    encode(tmp_path / "a.wav", tmp_path / name, *options)
    skipped = decode(str(tmp_path / name), 25.5, 26.5, rate=RATE, seconds=10, trimmed=False).waveform
    monkeypatch.setattr("shard_tools.ffmpeg_codecs.STEADY", 1 << 30)
    decoded = decode(str(tmp_path / name), 25.5, 26.5, rate=RATE, seconds=10, trimmed=False).waveform
    np.testing.assert_allclose(skipped, decoded, atol=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("hours", [1, 8])
def test_hours_of_streams(tmp_path, hours):
    """A minute of mp3 and of AAC again and again, as streams without headers; and the AAC in three containers."""
    rate, minutes = 16000, 60 * hours
    soundfile.write(tmp_path / "minute.wav", noise(60, rate), rate)
    encode(tmp_path / "minute.wav", tmp_path / "minute.aac", "-c:a", "aac", "-b:a", "32k")
    encode(tmp_path / "minute.wav", tmp_path / "minute.mp3", "-q:a", "9", "-write_xing", "0", "-id3v2_version", "0")
    for name in ("a.aac", "a.m4a", "a.mkv", "a.ts", "a.mp3") if hours == 1 else ("a.aac", "a.m4a", "a.mp3"):
        path = tmp_path / name
        if name in ("a.aac", "a.mp3"):
            minute = whole(tmp_path / f"minute{path.suffix}")
            content = (tmp_path / f"minute{path.suffix}").read_bytes()
            with path.open("wb") as file:
                for _ in range(minutes):
                    file.write(content)
        else:
            encode(tmp_path / "a.aac", path, "-c", "copy")
        period = len(minute) / rate
        for number, start in ((0, 12.3), (minutes // 2, 12.3), (minutes - 1, period - 1))[2 * (hours > 1) :]:
            at = number * period + start
            decoded = decode(str(path), at, at + 1, rate=rate, seconds=10, trimmed=False)
            assert heard_at(decoded.waveform, minute) == pytest.approx(start, abs=EXACT), (name, number)
            assert decoded.duration == pytest.approx(minutes * period, abs=0.065)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "options"), [
    ("a.flac", ()), ("a.opus", ("-c:a", "libopus", "-b:a", "16k", "-compression_level", "0")),
    ("a.ogg", ("-c:a", "libvorbis")), ("a.m4a", ("-c:a", "aac", "-aac_coder", "fast", "-b:a", "16k")),
])  # fmt: skip
def test_an_hour(tmp_path, name, options):
    """Each minute is turned by its own number of samples."""
    rate = 8000
    minute = noise(60, rate)
    everything = np.concatenate([np.roll(minute, 7919 * number) for number in range(60)])
    soundfile.write(tmp_path / "a.wav", everything, rate)
    encode(tmp_path / "a.wav", tmp_path / name, *options)
    for start in (0.0, 1812.3, 3599.0):
        decoded = decode(str(tmp_path / name), start, start + 1, rate=rate, seconds=10, trimmed=False)
        begin = max(0, round((start - 1) * rate))
        found = heard_at(decoded.waveform, everything[begin : begin + 3 * rate], rate) + begin / rate
        assert found == pytest.approx(start, abs=EXACT)
        assert decoded.duration == pytest.approx(3600, abs=EXACT)
