"""What predict.py hears: windows of recordings of any length, events in time, bad files among good ones."""

import ast
import csv
import json
import os
import resource
import shutil
import subprocess
import sys
import tracemalloc

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile

from launchers import predict as command
from pipeline.config import FinetuneRecipe
from pipeline.data.manifest import Label
from pipeline.errors import UserError
from pipeline.serving import listen as listening
from pipeline.serving.listen import Heard, audacity, clock, events, find_audio, listen, stretches, whole
from pipeline.serving.scorer import load_scorer
from tests.ranks import ROOT, run_script
from tests.test_export import SAMPLES, SPEC, make_run, snapshot

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
    times, scores = scorer.over_time(samples, hop)  # the page's way
    assert times.tolist() == heard.starts.tolist()
    np.testing.assert_allclose(scores, heard.scores, atol=1e-5)


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
    assert "truncated: its header promises 1.2 s more" in heard.error
    assert heard.seconds == pytest.approx(2.9, abs=0.15)
    assert list(heard.starts[:-1]) == [0.0, 0.75, 1.5]


def test_files_that_hang_or_crash_the_decoder_cost_themselves_alone(scorer, tmp_path, monkeypatch):
    """The second after a piece was heard, which is kept; in C, where no Python handler runs."""
    (tmp_path / "plugin").mkdir()
    (tmp_path / "plugin" / "sitecustomize.py").write_text(
        "import ctypes, os, soundfile\n"
        "real = soundfile.SoundFile.read\n"
        "def read(self, *words, **options):\n"
        "    path = os.readlink(f'/proc/self/fd/{self.name}')\n"
        "    if path.endswith('hang.wav'): ctypes.CDLL(None).pause()\n"
        "    if path.endswith('crash.wav') and self.tell() > 3 * 65536: os.kill(os.getpid(), 11)\n"
        "    return real(self, *words, **options)\n"
        "soundfile.SoundFile.read = read\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}/plugin:{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setattr(listening, "PIECE_SECONDS", 5.0)
    monkeypatch.setattr(listening, "PIECE_LIMIT", 3.0)
    names = ["good.wav", "hang.wav", "crash.wav", "last.wav"]
    files = [(name, str(sound(tmp_path / name, 20.0 if name == "crash.wav" else 1.0))) for name in names]
    good, hang, crash, last = listen(scorer, files, CLIP)
    assert hang.error == "timeout: the decoder took longer than 3 s"
    assert len(hang.starts) == 0
    assert crash.error == "crashed: the decoder died of SIGSEGV"
    assert 5.0 <= crash.seconds < 20.0
    assert (good.error, good.seconds) == (last.error, last.seconds) == ("", 1.0)
    np.testing.assert_allclose(good.scores, last.scores, atol=1e-5)


def test_standard_input_without_an_end_is_one_line(run_main, monkeypatch):
    monkeypatch.setattr(command, "MOST_STDIN", 3 << 20)
    with open("/dev/zero") as endless:
        monkeypatch.setattr(sys, "stdin", endless)
        with pytest.raises(UserError, match="-: standard input has more than 0 GiB; name a file instead"):
            run_main("-")


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


def test_events_of_hours_take_no_more_memory_than_their_scores():
    count = 8000
    found = heard([[0.0, 1.0]] * count, [0.1 * i for i in range(count)], 0.1 * count + 10)
    tracemalloc.start()
    (event,) = events(found, LABELS, 10.0, 0.5)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (event.start, event.end) == pytest.approx((0, 0.1 * (count - 1) + 10))
    assert peak < 10e6


def test_folders_are_all_audio_below(tmp_path):
    """Links to folders are followed, also where they lead in circles; what is skipped is said."""
    top = tmp_path / "a"
    (top / "b" / ".cache").mkdir(parents=True)
    (tmp_path / "elsewhere" / "deep").mkdir(parents=True)
    heard = ["1.FLAC", "2.wav", "b/3.m4a", "b/4.mpg", "b/gone.wav", "link/5.ac3", "link/deep/6.mka"]
    for name in ("1.FLAC", "2.wav", "b/3.m4a", "b/4.mpg", "notes.txt", "b/noending", "b/._3.m4a", "b/.cache/7.wav"):
        (top / name).touch()
    for name in ("5.ac3", "deep/6.mka"):
        (tmp_path / "elsewhere" / name).touch()
    (top / "link").symlink_to(tmp_path / "elsewhere")
    (top / "b" / "up").symlink_to(top)
    (tmp_path / "elsewhere" / "deep" / "round").symlink_to(tmp_path / "elsewhere")
    (top / "b" / "gone.wav").symlink_to("nowhere")  # decoding says what is wrong with it
    names, unread, skipped = find_audio(["-", str(top), "gone.wav", f"file://{top}/notes.txt", str(top / "2.wav"), "-"])
    assert names == ["-", *(str(top / name) for name in heard), str(top / "notes.txt")]
    assert unread == ["gone.wav: no such file"]
    assert skipped == [
        f"skipped 2 without an ending of audio, such as {top}/b/noending; name a file to hear it",
        f"skipped 2 that are hidden, such as {top}/b/._3.m4a; name a file to hear it",
    ]
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no audio file in this folder$"):
        find_audio([str(tmp_path / "empty")])
    (tmp_path / "empty" / "x.txt").touch()
    with pytest.raises(UserError, match=r"no audio file in this folder; skipped 1 .*x\.txt"):
        find_audio([str(tmp_path / "empty")])
    for url in ("http://127.0.0.1:9/a.wav", "s3://bucket/a.wav"):
        with pytest.raises(UserError, match=f"^{url}: a URL"):
            find_audio([url])
    with pytest.raises(UserError, match="names no file"):
        find_audio([""])


def test_a_folder_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "in" / "closed").mkdir(parents=True)
    (tmp_path / "in" / "x.wav").touch()
    (tmp_path / "in" / "closed").chmod(0)
    try:
        code = "import sys; from pipeline.serving.listen import find_audio; print(find_audio(sys.argv[1:]))"
        done = subprocess.run([*unprivileged(), sys.executable, "-c", code, str(tmp_path / "in")], cwd=ROOT,
                              capture_output=True, text=True, check=False)  # fmt: skip
    finally:
        (tmp_path / "in" / "closed").chmod(0o755)
    assert done.returncode == 0, done.stderr
    assert ast.literal_eval(done.stdout) == (
        [f"{tmp_path}/in/x.wav"], [f"{tmp_path}/in/closed: Permission denied"], [])  # fmt: skip


def unprivileged() -> list[str]:
    """Words before a command that must meet permissions although we may be root."""
    if os.geteuid():
        return []
    if shutil.which("setpriv") is None:
        pytest.skip("setpriv (util-linux) is not installed, and root may read everything")
    return ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]


def predict(run_dir, *words: object, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "launchers/predict.py", "--checkpoint", str(run_dir), *map(str, words)]
    return subprocess.run(command, cwd=ROOT, input=stdin, capture_output=True, timeout=300, check=False)


def test_the_command_writes_every_format(run_dir, run_main, tmp_path):
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

    status, said, _ = run_main(tmp_path / "in" / "one.wav", tmp_path / "two.flac", "--top", 2)
    assert status == 0
    lines = said.splitlines()
    assert lines[0] == f"{tmp_path}/in/one.wav  (0:02.0)"
    assert len(lines) == 6
    assert all("#" in line for line in lines[1:3])

    status, _, _ = run_main(tmp_path / "in" / "one.wav", tmp_path / "two.flac", "--format", "audacity", "--out",
                            tmp_path / "tracks", "--threshold", 0.01)  # fmt: skip
    assert status == 0
    assert (tmp_path / "tracks" / "two.flac.txt").is_file()
    start, end, label = (tmp_path / "tracks" / "in" / "one.wav.txt").read_text().splitlines()[0].split("\t")
    assert 0 <= float(start) < float(end)
    assert label.startswith("sound ")


def test_options_out_of_range_are_said(run_dir):
    done = run_script("launchers/predict.py", "--checkpoint", run_dir, "x.wav", "--threshold", 2)
    assert done.returncode == 2
    assert done.stderr == "error: --threshold 2.0 is no probability; give one above 0, at most 1\n"


@pytest.fixture
def run_main(run_dir, monkeypatch, capsys):
    """The command in this process: (exit status, stdout, stderr)."""

    def run(*words: object, checkpoint: object = run_dir) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["predict.py", "--checkpoint", str(checkpoint), *map(str, words)])
        status = command.main()
        told = capsys.readouterr()
        return status, told.out, told.err

    return run


def test_places_are_tried_before_the_model_is_loaded(run_main, tmp_path, monkeypatch):
    one, two = (str(sound(tmp_path / name, 0.5)) for name in ("one.wav", "two.wav"))
    (tmp_path / "one.wav.txt").symlink_to(one)
    (tmp_path / "link.wav").symlink_to(one)
    for words, message in (
        ([one, "--format", "csv", "--out", "/proc/nowhere/l.csv"], "--out /proc/nowhere/l.csv: "),
        ([one, "--embeddings", "/proc/nowhere/v"], "--embeddings /proc/nowhere/v: "),
        ([one, "--format", "csv", "--out", tmp_path], "is a directory"),  # was written to standard output
        ([one, two, "--format", "audacity", "--out", one], "one.wav is no directory"),
        ([one, two, "--format", "audacity", "--out", tmp_path], "one.wav.txt: is one of the recordings"),
        ([one, two, "--format", "audacity"], "give --out FOLDER"),
        ([one, "--out", tmp_path / "link.wav"], "link.wav: is one of the recordings"),
        ([one, "--embeddings", one], "one.wav: is one of the recordings"),
        ([one, "--out", tmp_path / "x", "--embeddings", tmp_path / "x"], "two files would have one name"),
        ([one, "--out", ""], "--out = '' names no path"),
        ([one, "--hop", "nan"], "--hop nan is not positive"),
        ([one, "--hop", "inf"], "--hop inf is not positive"),
        (["http://127.0.0.1:9/a.wav"], "a URL"),
        (["-"], "standard input is closed"),
    ):
        monkeypatch.setattr(sys, "stdin", None)
        before = snapshot(tmp_path)
        with pytest.raises(UserError, match=message):
            run_main(*words, checkpoint=tmp_path / "no-such-run")
        assert snapshot(tmp_path) == before


def test_names_that_are_twice_there_missing_or_not_text(run_main, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    odd = os.fsdecode(b"caf\xe9\n.wav")
    sound(tmp_path / "plain.wav", 0.5).rename(odd)
    status, out, err = run_main(odd, f"./{odd}", "nothere.wav", "--json", "--top", 1, "--out", "~/l.json",
                                "--embeddings", "v.parquet")  # fmt: skip
    assert (status, out) == (1, "")
    assert err == "nothere.wav: no such file\n1 of 2 recordings could not be read\n"
    (line,) = (tmp_path / "l.json").read_text().splitlines()
    assert json.loads(line)["path"] == "caf\\xe9\n.wav"
    assert pq.read_table("v.parquet")["path"].to_pylist() == ["caf\\xe9\n.wav"]
    status, out, err = run_main(odd, "--top", 1)
    assert (status, out.splitlines()[0], err) == (0, "caf\\xe9\\n.wav  (0:00.5)", "")
    assert run_main("nothere.wav", checkpoint="nor-this") == (1, "", "nothere.wav: no such file\n")


def test_a_recording_too_short_for_one_sample_is_not_passed_over(run_main, tmp_path):
    """At 96 kHz two samples are a third of one at the model's rate."""
    sound(tmp_path / "blip.wav", 2 / 96000, 96000)
    sound(tmp_path / "plain.wav", 0.5)
    status, out, err = run_main(tmp_path, "--json", "--top", 1)
    assert (status, out.count("\n")) == (1, 1)
    said = f"{tmp_path}/blip.wav: empty: too few samples for one at 16000 Hz\n"
    assert err == f"{said}1 of 2 recordings could not be read\n"


def test_label_tracks_lie_as_the_recordings_do(run_main, tmp_path, monkeypatch):
    """No two have one name, and none leaves the folder."""
    (tmp_path / "in" / "a").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "in")
    names = ["a/x.wav", "a_x.wav", ".x.wav", "../x.wav", str(tmp_path / "y.wav")]
    for name in names:
        sound(name, 0.5)
    before = snapshot(tmp_path)
    status, _, err = run_main(*names, "--format", "audacity", "--out", "tracks", "--threshold", 0.01)
    assert (status, err) == (0, "")
    new = {name.removeprefix("in/tracks/") for name in snapshot(tmp_path).keys() - before.keys()}
    assert new == {f"{name}.txt" for name in ("in/a/x.wav", "in/a_x.wav", "in/.x.wav", "x.wav", "y.wav")}
    status, _, _ = run_main("a/x.wav", "--format", "audacity", "--out", "tracks", "--threshold", 0.01)
    assert status == 0
    assert (tmp_path / "in" / "tracks" / "x.wav.txt").is_file()


def test_embeddings_are_whole_or_the_earlier_ones(run_main, tmp_path, monkeypatch):
    """A run that is stopped keeps the labels it wrote, and no Parquet that lacks recordings."""
    monkeypatch.setattr(listening, "PIECE_SECONDS", 1.0)  # the memory that the decoder shares is under the limit too
    files = [str(sound(tmp_path / f"{i}.wav", 8.0, seed=i)) for i in range(20)]
    (tmp_path / "bad.wav").write_text("no audio")
    (tmp_path / "out").mkdir()
    vectors, labels = tmp_path / "out" / "v.parquet", tmp_path / "out" / "l.json"
    status, _, _ = run_main(tmp_path / "bad.wav", "--embeddings", vectors)
    assert status == 1
    assert pq.read_table(vectors).num_rows == 0  # not those of an earlier run
    assert pq.read_schema(vectors).field("embedding").type.list_size == 192
    before = vectors.read_bytes()
    monkeypatch.setattr(command, "GROUP", 16)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # as a disk that fills
    try:
        with pytest.raises(UserError, match=r"v\.parquet: .*the work stops there"):
            run_main(*files, "--embeddings", vectors, "--json", "--out", labels)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert vectors.read_bytes() == before
    lines = [json.loads(line) for line in labels.read_text().splitlines()]
    assert 0 < len(lines) < len(files)
    assert [line["path"] for line in lines] == files[: len(lines)]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["l.json", "v.parquet"]


def test_many_recordings_share_a_row_group(scorer, tmp_path, monkeypatch):
    """The writer keeps each group's statistics until the end: a group a recording is 28 GB of a million recordings."""
    monkeypatch.setattr(command, "GROUP", 8)
    vectors = np.arange(20 * 192, dtype=np.float32).reshape(20, 1, 192)
    with command.embeddings_file(tmp_path / "v.parquet", scorer) as write:
        for number, one in enumerate(vectors):
            scores = np.zeros((1, 1), np.float32)
            write(Heard(f"{number}.wav", "", 0.25, np.zeros(1), scores, one))
    table = pq.read_table(tmp_path / "v.parquet")
    assert pq.read_metadata(tmp_path / "v.parquet").num_row_groups == 3
    assert table["path"].to_pylist() == [f"{number}.wav" for number in range(20)]
    assert set(table["end"].to_pylist()) == {0.25}
    assert np.array_equal(np.array(table["embedding"].to_pylist(), np.float32), vectors[:, 0])


def test_a_reader_that_has_seen_enough_ends_the_work(run_dir, tmp_path):
    (tmp_path / "in").mkdir()
    for i in range(60):
        sound(tmp_path / "in" / f"{i}.wav", 0.2)
    words = [sys.executable, "launchers/predict.py", "--checkpoint", str(run_dir), str(tmp_path / "in"), "--json"]
    pipe = subprocess.PIPE
    with subprocess.Popen(words, cwd=ROOT, stdout=pipe, stderr=pipe, pipesize=4096) as process:  # not all fits in there
        assert json.loads(process.stdout.readline())["path"] == f"{tmp_path}/in/0.wav"
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141  # as a shell has it of a program that died of SIGPIPE
