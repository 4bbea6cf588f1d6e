"""What predict.py hears: windows of recordings of any length, events in time, bad files among good ones."""

import csv
import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile

from pipeline.config import FinetuneRecipe
from pipeline.data.manifest import Label
from pipeline.errors import UserError
from pipeline.serving import listen as listening
from pipeline.serving.events import audacity, clock, events, stretches, whole
from pipeline.serving.listen import Heard, find_audio, listen
from pipeline.serving.scorer import load_scorer
from tests.conftest import ROOT
from tests.test_export import SAMPLES, SPEC, make_run

CLIP = SAMPLES / 16000  # 0.75 s
LABELS = [Label(id=f"/m/{name}", name=name) for name in "abc"]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("predict") / "run"
    make_run(folder, FinetuneRecipe, "finetune.method=swab")
    return folder


@pytest.fixture(scope="module")
def scorer(run_dir):
    return load_scorer(run_dir)


def sound(path, seconds: float, rate: int = 16000, seed: int = 0):
    """Tones that change, with noise: no two windows are alike."""
    time = np.arange(round(seconds * rate)) / rate
    noise = np.random.default_rng(seed).normal(size=len(time))
    soundfile.write(path, 0.3 * np.sin(2 * np.pi * 300 * time * (1 + time)) + 0.01 * noise, rate, subtype="PCM_16")
    return path


@pytest.mark.parametrize(
    ("seconds", "hop", "starts"),
    [
        (0.4, CLIP, [0.0]),  # shorter than a clip: padded
        (CLIP, CLIP, [0.0]),
        (2.0, CLIP, [0.0, 0.75, 1.25]),  # the last one ends with the recording
        (2.25, CLIP, [0.0, 0.75, 1.5]),
        (2.0, 0.25, [0.0, 0.25, 0.5, 0.75, 1.0, 1.25]),
        (2.0, 1.0, [0.0, 1.0, 1.25]),
    ],
)
@pytest.mark.parametrize("piece", [300.0, 1.0])
def test_windows_cover_a_recording_to_its_end(scorer, tmp_path, monkeypatch, seconds, hop, starts, piece):
    """And have the scores of the same samples on their own, however the recording is decoded."""
    monkeypatch.setattr(listening, "PIECE_SECONDS", piece)
    path = str(sound(tmp_path / "x.wav", seconds))
    (heard,) = listen(scorer, [("x", path)], hop)
    assert heard.error == ""
    assert heard.seconds == pytest.approx(seconds)
    assert heard.starts == pytest.approx(starts)
    samples = scorer.read(path, seconds)
    alone = [scorer.hear([samples[round(s * 16000) : round(s * 16000) + SAMPLES]]) for s in starts]
    np.testing.assert_allclose(heard.scores, np.concatenate([scores for scores, _ in alone]), atol=1e-5)
    np.testing.assert_allclose(heard.embeddings, np.concatenate([vectors for _, vectors in alone]), atol=1e-4)
    assert heard.embeddings.shape == (len(starts), 2 * 96)


def test_batches_span_files_and_results_keep_their_order(scorer, tmp_path, monkeypatch):
    sizes = []
    hear = scorer.hear
    monkeypatch.setattr(scorer, "hear", lambda windows: sizes.append(len(windows)) or hear(windows))
    files = [(str(i), str(sound(tmp_path / f"{i}.wav", 0.2 + 0.37 * i, 22050, i))) for i in range(12)]
    (tmp_path / "bad.wav").write_text("no audio")
    files.insert(5, ("bad", str(tmp_path / "bad.wav")))
    found = list(listen(scorer, files, 0.5))
    assert [heard.path for heard in found] == [name for name, _ in files]
    assert [heard.path for heard in found if heard.error] == ["bad"]
    assert len(found[5].starts) == 0
    assert sum(sizes) == sum(len(heard.starts) for heard in found)
    assert set(sizes[:-1]) == {listening.BATCH}


def test_a_recording_damaged_far_in_is_heard_up_to_there(scorer, tmp_path, monkeypatch):
    monkeypatch.setattr(listening, "PIECE_SECONDS", 1.0)
    path = sound(tmp_path / "long.flac", 4.0)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 3 // 4])
    (heard,) = listen(scorer, [("long", str(path))], CLIP)
    assert heard.error
    assert list(heard.starts) == [0.0, 0.75]


def heard(scores: list[list[float]], starts: list[float], seconds: float) -> Heard:
    vectors = np.zeros((len(starts), 2), np.float32)
    return Heard("x", "", seconds, np.array(starts), np.array(scores, np.float32), vectors)


def test_events_are_runs_of_stretches_as_exact_as_the_hop():
    """Windows of 2 s each second: a stretch has the mean of the two windows over it."""
    found = heard([[0.9, 0.0, 0.2], [0.9, 0.0, 0.2], [0.1, 0.6, 0.2], [0.1, 0.8, 0.2]], [0, 1, 2, 3], 4.5)
    edges, scores = stretches(found, 2.0)
    assert list(edges) == [0, 1, 2, 3, 4, 4.5]
    assert scores[:, 0] == pytest.approx([0.9, 0.9, 0.5, 0.1, 0.1])
    told = events(found, LABELS, 2.0, 0.5)
    assert [(e.start, e.end, e.label.name, round(e.score, 3)) for e in told] == [(0, 3, "a", 0.9), (3, 4.5, "b", 0.8)]
    assert audacity(told) == "0.000000\t3.000000\ta 0.90\n3.000000\t4.500000\tb 0.80\n"
    again = heard([[0.9, 0, 0], [0, 0, 0], [0.7, 0, 0]], [0, 4, 8], 10)  # a hop longer than a clip: gaps are silent
    assert [(e.start, e.end) for e in events(again, LABELS, 2.0, 0.5)] == [(0, 2), (8, 10)]
    assert whole(found, LABELS, 2) == [(LABELS[0], pytest.approx(0.5)), (LABELS[1], pytest.approx(0.35))]
    assert [clock(s) for s in (0, 59.96, 61.25, 3661)] == ["0:00.0", "1:00.0", "1:01.2", "1:01:01.0"]


def test_folders_are_all_audio_below(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    for name in ("a/2.wav", "a/1.FLAC", "a/b/3.m4a", "a/notes.txt"):
        (tmp_path / name).touch()
    assert find_audio(["-", str(tmp_path / "a"), "gone.wav"]) == [
        "-", *(str(tmp_path / "a" / name) for name in ("1.FLAC", "2.wav", "b/3.m4a")), "gone.wav"]  # fmt: skip
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no audio file in this folder"):
        find_audio([str(tmp_path / "empty")])


def predict(run_dir, *words: object, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "launchers/predict.py", "--checkpoint", str(run_dir), *map(str, words)]
    return subprocess.run(command, cwd=ROOT, input=stdin, capture_output=True, timeout=300, check=False)


def test_the_command_writes_every_format(run_dir, tmp_path):
    """One folder with a bad file, standard input, every output: exit 1, and all the good ones are there."""
    (tmp_path / "in").mkdir()
    sound(tmp_path / "in" / "one.wav", 2.0)
    (tmp_path / "in" / "bad.wav").write_text("no audio")
    content = sound(tmp_path / "two.flac", 1.0, 44100).read_bytes()
    done = predict(run_dir, tmp_path / "in", "-", "--events", "--threshold", 0.01, "--format", "csv", "--out",
                   tmp_path / "out" / "events.csv", "--embeddings", tmp_path / "v.parquet", stdin=content)  # fmt: skip
    assert done.returncode == 1
    first, last = done.stderr.decode().splitlines()
    assert first == f"{tmp_path}/in/bad.wav: undecodable: text, not audio: 'no audio'"
    assert last == "1 of 3 recordings could not be read"
    rows = list(csv.DictReader((tmp_path / "out" / "events.csv").open()))
    assert {row["path"] for row in rows} == {f"{tmp_path}/in/one.wav", "-"}
    assert {row["id"] for row in rows} <= {label.id for label in SPEC.labels}
    assert all(0 <= float(row["start"]) < float(row["end"]) <= 2 for row in rows)
    vectors = pq.read_table(tmp_path / "v.parquet").to_pydict()
    assert vectors["path"] == [f"{tmp_path}/in/one.wav"] * 5 + ["-"] * 2
    assert vectors["start"][:5] == pytest.approx([0, 0.375, 0.75, 1.125, 1.25])
    assert {len(vector) for vector in vectors["embedding"]} == {192}

    done = predict(run_dir, tmp_path / "in" / "one.wav", tmp_path / "two.flac", "--top", 2)
    assert done.returncode == 0
    lines = done.stdout.decode().splitlines()
    assert lines[0] == f"{tmp_path}/in/one.wav  (0:02.0)"
    assert len(lines) == 6
    assert all("#" in line for line in lines[1:3])

    done = predict(run_dir, tmp_path / "in" / "one.wav", tmp_path / "two.flac", "--format", "audacity", "--out",
                   tmp_path / "tracks", "--threshold", 0.01)  # fmt: skip
    assert done.returncode == 0
    tracks = sorted((tmp_path / "tracks").iterdir())
    assert [track.name.split("_")[-1] for track in tracks] == ["one.wav.txt", "two.flac.txt"]
    start, end, label = tracks[0].read_text().splitlines()[0].split("\t")
    assert 0 <= float(start) < float(end)
    assert label.startswith("sound ")


def test_options_out_of_range_are_said(run_dir):
    done = predict(run_dir, "x.wav", "--threshold", 2)
    assert done.returncode == 2
    assert done.stderr.decode() == "error: --threshold 2.0 is no probability; give one above 0, at most 1\n"
