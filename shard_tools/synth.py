"""Small labelled audio made from a seed: a data set for trying and testing, with nothing to download.

In: number of clips, seconds, seed. Out: FLAC files and a `table.csv` that the builder reads like anybody's.

Thirteen classes. Some differ in their spectrum (tones, chords, noise colour, sweeps); some have the same
long-term spectrum and differ only in the waveform's time structure or phase: an impulse train against
the same harmonics with random phases, clicks of one polarity against the other, and noise gated
200 or 400 times a second, far inside the fbank's 25 ms window.
"""

import csv
import io
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from scipy.signal import butter, chirp, sosfilt

from pipeline.errors import UserError
from shard_tools.tables import Table

Synthesiser = Callable[[np.random.Generator, np.ndarray, int], Any]


def _tone(low: float, high: float) -> Synthesiser:
    def make(rng: np.random.Generator, time: np.ndarray, rate: int) -> Any:
        return np.sin(2 * np.pi * (rng.uniform(low, high) * time + rng.uniform()))

    return make


def _chord(rng: np.random.Generator, time: np.ndarray, rate: int) -> Any:
    root = rng.uniform(200, 400)
    return np.sum([np.sin(2 * np.pi * (root * ratio * time + rng.uniform())) for ratio in (1, 1.25, 1.5)], axis=0) / 3


def _noise(low: float, high: float) -> Synthesiser:
    def make(rng: np.random.Generator, time: np.ndarray, rate: int) -> Any:
        band = butter(4, [low / (rate / 2), min(0.99, high / (rate / 2))], "bandpass", output="sos")
        return 3 * sosfilt(band, rng.standard_normal(len(time)))

    return make


def _sweep(start: float, stop: float) -> Synthesiser:
    def make(rng: np.random.Generator, time: np.ndarray, rate: int) -> Any:
        period = rng.uniform(0.3, 0.6)
        return chirp(time % period, start, period, stop, "logarithmic", phi=rng.uniform(0, 360))

    return make


def _harmonics(random_phase: bool) -> Synthesiser:
    """A 100 to 140 Hz complex, its harmonics in phase (an impulse train) or at random phases."""

    def make(rng: np.random.Generator, time: np.ndarray, rate: int) -> Any:
        pitch = rng.uniform(100, 140)
        count = int(0.4 * rate / pitch)
        phases = rng.uniform(0, 2 * np.pi, count) if random_phase else np.zeros(count)
        partials = [np.cos(2 * np.pi * pitch * k * time + phases[k - 1]) for k in range(1, count + 1)]
        return np.sum(partials, axis=0) / np.sqrt(count)

    return make


def _clicks(sign: int) -> Synthesiser:
    """Decaying clicks 20 to 30 times a second, of one polarity: the magnitude spectra are equal."""

    def make(rng: np.random.Generator, time: np.ndarray, rate: int) -> Any:
        phase = (time * rng.uniform(20, 30) + rng.uniform()) % 1.0
        return np.asarray(sign * 3 * np.exp(-phase * 25))

    return make


def _gated(low: float, high: float) -> Synthesiser:
    def make(rng: np.random.Generator, time: np.ndarray, rate: int) -> Any:
        gate = (time * rng.uniform(low, high)) % 1.0 < 0.25
        return 1.5 * gate * rng.standard_normal(len(time))

    return make


CLASSES: dict[str, Synthesiser] = {
    "low tone": _tone(150, 300),
    "high tone": _tone(1500, 3000),
    "chord": _chord,
    "low noise": _noise(100, 800),
    "high noise": _noise(3000, 7000),
    "rising sweep": _sweep(300, 4000),
    "falling sweep": _sweep(4000, 300),
    "impulse train": _harmonics(random_phase=False),
    "scrambled train": _harmonics(random_phase=True),
    "positive clicks": _clicks(1),
    "negative clicks": _clicks(-1),
    "noise gated at 200 Hz": _gated(190, 210),
    "noise gated at 400 Hz": _gated(380, 420),
}

EVAL_SHARE = 0.25
FOLDS = 5
LOWEST_RATE = 8000  # Hz: the high noise begins at 3 kHz
COLUMNS = ("path", "labels", "split", "fold")
GENERATED = re.compile(r"audio/clip[0-9]{5,}\.flac,")


def write_synth(out: Path, clips: int, seconds: float, rate: int, seed: int) -> Path:
    """Renders the data set; the same arguments give the same bytes, and files that hold them already stay as they are.

    Every fourth clip is of the split "eval", the others of "train"; folds 1 to 5 run through both. A
    clip holds one class, or (one in three) a mixture of two, at random levels with a noise floor.

    Returns:
        The table: columns path, labels, split, fold.

    Raises:
        UserError: the sample rate is too low for the sounds, or `out` holds a table that is not this function's.
    """
    if rate < LOWEST_RATE:
        raise UserError(f"--sample-rate {rate}: generated audio needs at least {LOWEST_RATE}; give more")
    names = list(CLASSES)
    table = out / "table.csv"
    _refuse_foreign(table)
    (out / "audio").mkdir(parents=True, exist_ok=True)
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(COLUMNS)
    for number in range(clips):
        rng = np.random.default_rng([seed, number])
        chosen = [number % len(names)]
        if rng.uniform() < 1 / 3:
            chosen.append(int((chosen[0] + rng.integers(1, len(names))) % len(names)))
        path = f"audio/clip{number:05d}.flac"
        audio = io.BytesIO()
        soundfile.write(audio, render([names[c] for c in chosen], seconds, rate, rng), rate, format="FLAC")
        write_bytes(out / path, audio.getvalue())
        split = "eval" if (number // len(names)) % round(1 / EVAL_SHARE) == 3 else "train"
        labels = ";".join(names[c] for c in sorted(chosen))
        writer.writerow([path, labels, split, (number // len(names)) % FOLDS + 1])
    write_bytes(table, text.getvalue().encode())
    return table


def _refuse_foreign(table: Path) -> None:
    """Raises UserError where a table is there that was not generated."""
    if not table.exists():
        return
    source = Table(table)
    lines = (line.rstrip("\r\n") for line in source.lines())
    if next(lines, "") != ",".join(COLUMNS) or not all(GENERATED.match(line) for line in lines):
        raise UserError(f"{table}: is there and was not generated; give another --audio-root, or move it away")


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file whole; one of the same content stays, with its time: then a build goes on."""
    if path.is_file() and path.stat().st_size == len(content) and path.read_bytes() == content:
        return
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def render(names: list[str], seconds: float, rate: int, rng: np.random.Generator) -> np.ndarray:
    """One clip, float64 [n] within full scale: the named classes mixed."""
    time = np.arange(round(seconds * rate)) / rate
    mix = 0.003 * rng.standard_normal(len(time))
    for name in names:
        mix = mix + rng.uniform(0.05, 0.2) * CLASSES[name](rng, time, rate)
    return mix / max(1.0, 1.01 * float(np.abs(mix).max()))
