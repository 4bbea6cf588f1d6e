"""Decoding: seeking, resampling, agreement of the libraries, and decoders that hang or crash."""

import logging
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr

from shard_tools import ffmpeg_codecs, guard
from shard_tools.decode import DecodeError, decode
from shard_tools.guard import DecoderProcess
from tests.shard_tools.corpus import encode, sound

RATE = 16000


def test_a_segment_of_an_hour_is_sought_not_decoded(tmp_path):
    path = tmp_path / "hour.flac"
    with soundfile.SoundFile(path, "w", 8000, 1) as file:
        for minute in range(60):
            file.write(np.full(8000 * 60, minute / 100))
    decoded = decode(str(path), 59 * 60 + 10, None, rate=8000, seconds=10)
    assert decoded.duration == pytest.approx(3600)
    assert decoded.waveform == pytest.approx(np.full(80000, 0.59), abs=1e-4)


@pytest.mark.parametrize("name", ["a.m4a", "a.webm", "a.mp4", "a.mp3", "a.ogg"])
@pytest.mark.parametrize("program", [False, True], ids=["library", "program"])
def test_a_segment_is_that_of_the_original(tmp_path, monkeypatch, name, program):
    """Chirps: where in the file a segment was taken is heard in it, to 25 ms."""
    time_axis = np.arange(60 * 48000) / 48000
    source = 0.3 * np.sin(2 * np.pi * (300 * time_axis + 10 * time_axis**2))
    soundfile.write(tmp_path / "a.wav", source, 48000)
    video = ("-f", "lavfi", "-i", "color=size=64x48:rate=2:duration=60") if name == "a.mp4" else ()
    encode(tmp_path / "a.wav", tmp_path / name, *video)
    if program:
        monkeypatch.setattr(ffmpeg_codecs, "torchcodec", lambda: None)
    decoded = decode(str(tmp_path / name), 41.3, 44.3, rate=RATE, seconds=10)
    assert len(decoded.waveform) == pytest.approx(3 * RATE, abs=2)
    assert decoded.duration == pytest.approx(60, abs=0.1)
    wanted = soxr.resample(source, 48000, RATE, quality="HQ")[round(40.3 * RATE) : round(45.3 * RATE)]
    match = np.correlate(wanted, decoded.waveform[RATE : 2 * RATE])
    assert np.abs(match).argmax() == pytest.approx(2 * RATE, abs=0.025 * RATE)


def test_resampling_does_not_alias(tmp_path):
    """A 9 kHz tone has no place at 16 kHz: nothing of it folds back."""
    high = 0.5 * np.sin(2 * np.pi * 9000 * np.arange(44100) / 44100)
    soundfile.write(tmp_path / "a.wav", high, 44100, subtype="FLOAT")
    folded = decode(str(tmp_path / "a.wav"), 0.0, None, rate=RATE, seconds=1).waveform[2000:-2000]
    assert 20 * np.log10(np.abs(folded).max()) < -90


def test_real_m4a_is_the_original(shared, tmp_path):
    """AAC of a real 44.1 kHz recording stays close to the recording itself."""
    source = next((shared / "data" / "esc50_44k_sample").glob("*.wav"))
    encode(source, tmp_path / "clip.m4a", "-c:a", "aac", "-b:a", "256k")
    clean = decode(str(source), 1.0, 3.0, rate=RATE, seconds=10).waveform
    coded = decode(str(tmp_path / "clip.m4a"), 1.0, 3.0, rate=RATE, seconds=10).waveform
    assert abs(len(clean) - len(coded)) <= 2
    lag = int(np.correlate(coded, clean[2000:22000]).argmax()) - 2000
    assert abs(lag) <= 1100
    assert np.corrcoef(clean[2000:22000], coded[2000 + lag : 22000 + lag])[0, 1] > 0.7


def test_a_segment_outside_and_a_file_that_is_gone_are_reasons(tmp_path):
    soundfile.write(tmp_path / "a.wav", sound(), RATE)
    with pytest.raises(DecodeError, match=r"empty: no samples in the segment from 5 s of a 3 s file"):
        decode(str(tmp_path / "a.wav"), 5.0, None, rate=RATE, seconds=1)
    with pytest.raises(DecodeError, match="vanished"):
        decode(str(tmp_path / "gone.wav"), 0.0, None, rate=RATE, seconds=1)


def test_a_torchcodec_that_does_not_load_is_said_once(tmp_path, monkeypatch, caplog):
    """Its FFmpeg libraries are missing: a real import of a module that raises as it does."""
    package = tmp_path / "torchcodec"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "decoders.py").write_text("raise RuntimeError('Could not load libtorchcodec.\\nlibavutil.so.59')")
    for name in [name for name in sys.modules if name.split(".")[0] == "torchcodec"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(tmp_path))
    soundfile.write(tmp_path / "a.wav", sound(), RATE)
    encode(tmp_path / "a.wav", tmp_path / "a.m4a")
    ffmpeg_codecs._torchcodec.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            decoders = {decode(str(tmp_path / "a.m4a"), 0.0, None, rate=RATE, seconds=3).decoder for _ in range(3)}
    finally:
        ffmpeg_codecs._torchcodec.cache_clear()
    assert decoders == {"ffmpeg"}
    assert [record.message.count("Could not load libtorchcodec") for record in caplog.records] == [1]


def test_without_a_system_ffmpeg_the_packaged_one_serves(tmp_path, monkeypatch):
    soundfile.write(tmp_path / "a.wav", sound(), RATE)
    encode(tmp_path / "a.wav", tmp_path / "a.m4a")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(ffmpeg_codecs, "torchcodec", lambda: None)
    ffmpeg_codecs.ffmpeg_binary.cache_clear()
    try:
        assert "imageio_ffmpeg" in ffmpeg_codecs.ffmpeg_binary()
        assert len(decode(str(tmp_path / "a.m4a"), 0.0, None, rate=RATE, seconds=3).waveform) == 3 * RATE
    finally:
        ffmpeg_codecs.ffmpeg_binary.cache_clear()


@pytest.fixture
def patched(tmp_path, monkeypatch):
    """The decoder process, with a soundfile that does `what` to files named bad.wav; and a good file."""

    def make(what: str, limit: float) -> tuple[DecoderProcess, Path, Path]:
        plugin = tmp_path / "plugin"
        plugin.mkdir()
        (plugin / "sitecustomize.py").write_text(
            "import ctypes, os, time, soundfile\n"
            "real = soundfile.SoundFile.__init__\n"
            "def init(self, file, *words, **options):\n"
            "    if os.readlink(f'/proc/self/fd/{file}').endswith('bad.wav'):\n"
            f"        {what}\n"
            "    real(self, file, *words, **options)\n"
            "soundfile.SoundFile.__init__ = init\n"
        )
        monkeypatch.setenv("PYTHONPATH", f"{plugin}:{os.environ.get('PYTHONPATH', '')}")
        for name in ("good.wav", "bad.wav"):
            soundfile.write(tmp_path / name, sound(), RATE)
        return DecoderProcess(RATE, 3.0, limit), tmp_path / "good.wav", tmp_path / "bad.wav"

    return make


def test_a_hanging_decoder_costs_one_clip(patched):
    """It hangs in C, where no Python signal handler runs."""
    process, good, bad = patched("ctypes.CDLL(None).pause()", 3.0)
    with process:
        clean = process.decode(str(good), 0.0, None).waveform
        begun = time.monotonic()
        with pytest.raises(DecodeError, match="timeout: the decoder took longer than 3 s"):
            process.decode(str(bad), 0.0, None)
        assert time.monotonic() - begun < 60
        assert np.array_equal(process.decode(str(good), 0.0, None).waveform, clean)
        assert np.array_equal(decode(str(good), 0.0, None, rate=RATE, seconds=3.0).waveform, clean)


@pytest.mark.parametrize(
    ("what", "reason"),
    [("os.kill(os.getpid(), 11)", "crashed: the decoder died of SIGSEGV"), ("1 / 0", "ZeroDivisionError")],
)
def test_a_crashing_decoder_costs_one_clip(patched, what, reason):
    process, good, bad = patched(what, 60.0)
    with process:
        with pytest.raises(DecodeError, match=reason):
            process.decode(str(bad), 0.0, None)
        assert len(process.decode(str(good), 0.0, None).waveform) == 3 * RATE


def test_a_decoder_ends_with_its_worker(patched):
    process, good, _ = patched("pass", 60.0)
    process.decode(str(good), 0.0, None)
    child = process._process
    child.stdin.close()  # what the kernel does when the worker is killed
    assert child.wait(60) == 0
    process.close()
    assert guard.TIME_LIMIT > 0
    assert signal.getsignal(signal.SIGALRM) == signal.SIG_DFL  # the alarm that ends an orphan
