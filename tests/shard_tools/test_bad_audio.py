"""Bad files: each is handled right or listed with its reason, and the build goes on."""

import json
import subprocess

import numpy as np
import pytest
import soundfile

from pipeline.data.manifest import load_index, load_manifest
from shard_tools import catalogs
from shard_tools.build import BuildOptions, build
from shard_tools.decode import DecodeError, decode, ffmpeg_binary
from shard_tools.verify_shards import verify
from shard_tools.write import AudioOptions

RATE = 16000


def tone(seconds: float, rate: int = RATE, channels: int = 1) -> np.ndarray:
    wave = 0.3 * np.sin(2 * np.pi * 440 * np.arange(round(seconds * rate)) / rate)
    return np.repeat(wave[:, None], channels, axis=1)


def encode(source, target, *options: str) -> None:
    subprocess.run([ffmpeg_binary(), "-v", "error", "-y", "-i", str(source), *options, str(target)], check=True)


def cut(path, share: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Files and what must become of them: None is in the shards, else the beginning of the reason."""
    root = tmp_path_factory.mktemp("corpus") / "sound"
    root.mkdir()
    expected: dict[str, str | None] = {}

    def add(name: str, fate: str | None, samples: np.ndarray | None = None, rate: int = RATE, **options) -> None:
        expected[name] = fate
        if samples is not None:
            soundfile.write(root / name, samples, rate, **options)

    for rate in (8000, 11025, 44100, 48000, 96000, 192000):
        add(f"rate{rate}.wav", None, tone(1.5, rate), rate)
    for channels in (1, 2, 6, 8):
        add(f"channels{channels}.wav", None, tone(1.5, channels=channels))
    for subtype in ("PCM_U8", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW"):
        add(f"{subtype}.wav", None, tone(1.5), subtype=subtype)
    add("short.wav", None, tone(0.1))
    add("silent.wav", None, np.zeros(RATE))
    add("offset.wav", None, tone(1.5) * 0.5 + 0.4)
    add("loud.wav", None, tone(1.5) * 40, subtype="FLOAT")
    add("denormal.wav", None, tone(1.5) * 1e-40, subtype="DOUBLE")
    add("it's \"quoted\" ünïcode, -x.wav", None, tone(1.5))
    add("-leading.dash.and.dots.wav", None, tone(1.5))
    add("vorbis.ogg", None, tone(1.5))
    add("wrong_extension.mp3", None)
    soundfile.write(root / "wrong_extension.mp3", tone(1.5), RATE, format="WAV")
    for name, codec in {"aac.m4a": "aac", "opus.webm": "libopus"}.items():
        expected[name] = None
        encode(root / "rate48000.wav", root / name, "-c:a", codec)
    add("nan.wav", "not finite", np.where(np.arange(RATE) == 77, np.nan, 0.1), subtype="FLOAT")
    add("infinite.wav", "not finite", np.where(np.arange(RATE) == 77, np.inf, 0.1), subtype="FLOAT")
    add("no_samples.wav", "empty", np.zeros((0, 1)))
    add("zero_bytes.wav", "undecodable")
    (root / "zero_bytes.wav").touch()
    add("text.wav", "undecodable")
    (root / "text.wav").write_text("this is no audio\n" * 100)
    for share in (10, 50, 90):
        for kind in ("wav", "flac"):
            name = f"truncated{share}.{kind}"
            held = kind == "flac" and share == 90  # its first second, all that is asked for, is whole
            add(name, None if held else "", tone(1.5) + 0.01 * np.random.default_rng(0).standard_normal((24000, 1)))
            cut(root / name, share / 100)
    return root, expected


def test_every_bad_file_meets_its_fate(corpus, tmp_path):
    root, expected = corpus
    catalog = catalogs.folder(root.parent, "train")
    summary = build(catalog, tmp_path, BuildOptions(AudioOptions(seconds=1.0), 16), workers=1)
    stored = {row.split("-")[0] for row in load_index(tmp_path)["key"].to_pylist()}
    failures = {line["path"].rsplit("/", 1)[1]: line["reason"] for line in map(
        json.loads, (tmp_path / "failures.jsonl").read_text().splitlines())}  # fmt: skip
    for name, fate in expected.items():
        if fate is None:
            assert name not in failures, (name, failures.get(name))
        else:
            assert failures[name].startswith(fate), (name, failures[name])
    assert len(stored) > 0
    assert len(load_index(tmp_path)) + len(failures) == len(catalog.clips) == len(expected)
    assert summary.silent == 2  # silence, and denormals that round to it
    assert load_manifest(tmp_path).splits["train"].listed == len(expected)
    assert verify(tmp_path, workers=1) == []


def test_a_segment_of_an_hour_is_sought_not_decoded(tmp_path):
    path = tmp_path / "hour.flac"
    with soundfile.SoundFile(path, "w", 8000, 1) as file:
        for minute in range(60):
            file.write(np.full(8000 * 60, minute / 100))
    decoded = decode(str(path), 59 * 60 + 10, None, rate=8000, seconds=10)
    assert decoded.duration == pytest.approx(3600)
    assert decoded.waveform == pytest.approx(np.full(80000, 0.59), abs=1e-4)


def test_resampling_does_not_alias():
    """A 9 kHz tone has no place at 16 kHz: soxr HQ leaves nothing of it to fold back."""
    import soxr

    high = np.sin(2 * np.pi * 9000 * np.arange(44100) / 44100).astype(np.float32)
    folded = soxr.resample(high, 44100, 16000, quality="HQ")[2000:-2000]
    assert 20 * np.log10(np.abs(folded).max()) < -90


def test_real_m4a_is_the_original(shared, tmp_path):
    """AAC through ffmpeg of a real 44.1 kHz recording stays close to the recording itself."""
    source = next((shared / "data" / "esc50_44k_sample").glob("*.wav"))
    encode(source, tmp_path / "clip.m4a", "-c:a", "aac", "-b:a", "256k")
    clean = decode(str(source), 1.0, 3.0, rate=RATE, seconds=10).waveform
    coded = decode(str(tmp_path / "clip.m4a"), 1.0, 3.0, rate=RATE, seconds=10).waveform
    assert abs(len(clean) - len(coded)) <= 2
    size = min(len(clean), len(coded))
    lags = range(-1100, 1101)
    lag = max(lags, key=lambda s: float(np.dot(clean[2000:22000], coded[2000 + s : size][:20000])))
    assert abs(lag) <= 1100
    assert np.corrcoef(clean[2000:22000], coded[2000 + lag : 22000 + lag])[0, 1] > 0.7


def test_missing_and_empty_segments_are_reasons(tmp_path):
    soundfile.write(tmp_path / "a.wav", tone(1.0), RATE)
    with pytest.raises(DecodeError, match="empty"):
        decode(str(tmp_path / "a.wav"), 5.0, None, rate=RATE, seconds=1)
    with pytest.raises(DecodeError):
        decode(str(tmp_path / "gone.wav"), 0.0, None, rate=RATE, seconds=1)
