"""Where clips and labels come from: ESC-50's archive over HTTP, and csvs of better labels."""

import contextlib
import hashlib
import http.server
import io
import json
import threading
import zipfile

import numpy as np
import pytest
import soundfile

from pipeline.data.manifest import load_index, load_manifest
from pipeline.errors import UserError
from shard_tools import catalogs, esc50_archive
from shard_tools.build import build
from shard_tools.esc50_archive import fetch_esc50
from shard_tools.labels import read_overrides
from tests.helpers import options
from tests.shard_tools.test_build import command


def archive(**more: bytes) -> bytes:
    """A small ESC-50 as its makers pack it, and other members."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as whole:
        rows = ["filename,fold,target,category,esc10,src_file,take"]
        for number in range(4):
            wav = io.BytesIO()
            soundfile.write(wav, np.full(1600, 0.01 * number), 16000, format="WAV")
            whole.writestr(f"ESC-50-master/audio/{number}.wav", wav.getvalue())
            rows.append(f"{number}.wav,{number % 5 + 1},{number % 2},class_{number % 2},True,x,A")
        whole.writestr("ESC-50-master/meta/esc50.csv", "\n".join(rows))
        for name, content in more.items():
            whole.writestr(name, content)
    return out.getvalue()


@contextlib.contextmanager
def server(content: bytes, cut: int = 0):
    """An HTTP server on loopback with one file, of which it leaves `cut` bytes out; yields URL and requests."""
    requests = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            requests.append(self.path)
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) - cut])

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as serving:
        thread = threading.Thread(target=serving.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{serving.server_port}/master.zip", requests
        finally:
            serving.shutdown()
            thread.join()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def test_download_asks_for_the_hash_then_builds_without_fetching_again(tmp_path):
    content = archive()
    with server(content) as (url, requests):
        words = ["--dataset", "esc50", "--download", "--archive-url", url, "--seconds", "0.1", "--workers", "1",
                 "--root", tmp_path / "root", "--out", tmp_path / "out"]  # fmt: skip
        first = command(*words)
        assert first.returncode == 2
        assert f"--sha256 {sha256(content)}" in first.stderr
        assert not (tmp_path / "root" / "esc50").exists()
        done = command(*words, "--sha256", sha256(content))
        assert done.returncode == 0, done.stderr
        assert len(requests) == 1
    assert {path.name for path in (tmp_path / "root").iterdir()} == {"esc50"}
    assert load_manifest(tmp_path / "out").splits["train"].clips == 4
    by_hand = build(catalogs.esc50(tmp_path / "root" / "esc50", "train"), tmp_path / "b", options(0.1, 512), 1,
                    engine="inline")  # fmt: skip
    assert by_hand.manifest.digest == load_manifest(tmp_path / "out").digest


def test_a_wrong_hash_a_cut_transfer_and_other_archives_leave_nothing(tmp_path):
    good, root = archive(), tmp_path / "root"
    with server(good) as (url, _):
        with pytest.raises(UserError, match=f"sha256 {sha256(good)}, not {'0' * 64}; what came was deleted"):
            fetch_esc50(root, url, "0" * 64, unchecked=False)
        assert list(root.iterdir()) == []
    with server(good, cut=100) as (url, _):
        with pytest.raises(UserError, match=f"{len(good) - 100} of {len(good)} bytes came"):
            fetch_esc50(root, url, None, unchecked=True)
        assert list(root.iterdir()) == []
    with pytest.raises(UserError, match=r"127\.0\.0\.1:1/x\.zip: .*refused.*--root"):
        fetch_esc50(root, "http://127.0.0.1:1/x.zip", None, unchecked=True)
    with pytest.raises(UserError, match="no http"):
        fetch_esc50(root, "file:///etc/passwd", None, unchecked=True)
    for name in ("../outside.txt", "/outside.txt", "a/../../outside.txt"):
        bad = archive(**{name: b"x"})
        with server(bad) as (url, _), pytest.raises(UserError, match="leads outside or is a link"):
            fetch_esc50(root, url, sha256(bad), unchecked=False)
        assert [path.name for path in root.iterdir()] == ["esc50-download.zip"]
        assert not list(tmp_path.rglob("outside.txt"))
        (root / "esc50-download.zip").unlink()
    for content, said in ((b"<html>", "not a zip file"), (good[: len(good) // 2], "not a zip file")):
        with server(content) as (url, _), pytest.raises(UserError, match=said):
            fetch_esc50(root, url, None, unchecked=True)
        (root / "esc50-download.zip").unlink()
    with server(good) as (url, requests):
        assert fetch_esc50(root, url, None, unchecked=True) == fetch_esc50(root, url, None, unchecked=True)
        assert len(requests) == 1


def test_nothing_of_the_user_is_replaced_or_deleted(tmp_path):
    root, good = tmp_path / "root", archive()
    (root / "esc50").mkdir(parents=True)
    (root / "esc50" / "thesis.txt").write_text("mine")
    (root / "esc50.zip").write_text("mine too")
    with server(good) as (url, requests):
        with pytest.raises(UserError, match=r"esc50: is there and holds no meta/esc50\.csv; move it away"):
            fetch_esc50(root, url, None, unchecked=True)
        assert requests == []
        (root / "esc50" / "thesis.txt").rename(root / "thesis.txt")
        (root / "esc50-download.zip").write_bytes(b"not fetched now")  # of an earlier run, or whose ever
        with pytest.raises(UserError, match="delete it to fetch it again"):
            fetch_esc50(root, url, "0" * 64, unchecked=False)
        assert (root / "esc50-download.zip").read_bytes() == b"not fetched now"
        (root / "esc50-download.zip").unlink()
        fetch_esc50(root, url, sha256(good), unchecked=False)  # an empty directory gives way
    assert {path.name for path in root.iterdir()} == {"esc50", "esc50.zip", "thesis.txt"}
    assert (root / "esc50.zip").read_text() == "mine too"


def test_an_endless_archive_and_a_place_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    with server(archive()) as (url, requests):
        with pytest.raises(UserError, match=r"--root .*file"):
            fetch_esc50(tmp_path / "file" / "root", url, None, unchecked=True)
        assert requests == []
        monkeypatch.setattr(esc50_archive, "LARGEST", 1000)
        with pytest.raises(UserError, match="gives more than 1000 bytes"):
            fetch_esc50(tmp_path / "root", url, None, unchecked=True)
    assert list((tmp_path / "root").iterdir()) == []


def test_a_damaged_archive_is_one_line(tmp_path):
    good = archive()
    rng = np.random.default_rng(0)
    for number in range(60):
        content = bytearray(good)
        for place in rng.integers(0, len(content), 3):
            content[place] ^= 1 << int(rng.integers(8))
        root = tmp_path / str(number)
        root.mkdir()
        (root / "esc50-download.zip").write_bytes(bytes(content))
        with contextlib.suppress(UserError):
            fetch_esc50(root, "http://127.0.0.1:1/", None, unchecked=True)
        assert {path.name for path in root.iterdir()} <= {"esc50", "esc50-download.zip"}


@pytest.fixture
def audioset(tmp_path):
    """Three segments, one of them without a file."""
    audio = tmp_path / "audio"
    audio.mkdir()
    for name in ("aaaaaaaaaaa", "bbbbbbbbbbb"):
        soundfile.write(audio / f"{name}_0.wav", np.full(1600, 0.1), 16000)
    segments, labels = tmp_path / "segments.csv", tmp_path / "labels.csv"
    segments.write_text("".join(f'{letter * 11}, 0.0, 10.0, "/m/1"\n' for letter in "abc"))
    labels.write_text('index,mid,display_name\n0,/m/1,one\n1,/m/2,"two, too"\n2,/m/3,three\n')
    return audio, segments, labels


def test_better_labels_reach_shards_counts_and_manifest(audioset, tmp_path):
    audio, segments, labels = audioset
    better = tmp_path / "better.csv"
    better.write_text('id,labels\naaaaaaaaaaa,/m/3;/m/1\nccccccccccc_0,"two, too"\nzzzzzzzzzzz,/m/1\n')
    words = ["--dataset", "audioset", "--audio-root", audio, "--segments", segments, "--class-labels", labels,
             "--seconds", "0.1", "--workers", "1", "--out", tmp_path / "out"]  # fmt: skip
    done = command(*words, "--label-overrides", better)
    assert done.returncode == 0, done.stderr
    assert "2 of 3 rows applied" in done.stderr
    manifest = load_manifest(tmp_path / "out")
    rows = {row["key"]: row["labels"] for row in load_index(tmp_path / "out").to_pylist()}
    assert rows == {"aaaaaaaaaaa_0": [0, 2], "bbbbbbbbbbb_0": [0]}
    assert manifest.splits["train"].class_listed == [2, 1, 1]
    record = manifest.options["train"]["label overrides"]
    assert record == {"file": "better.csv", "rows": 3, "rows applied": 2, "xxh3": record["xxh3"]}
    assert len(record["xxh3"]) == 32
    without = command(*words)
    assert without.returncode == 2
    assert "labels of the clips" in without.stderr
    assert json.loads((tmp_path / "out" / "failures.jsonl").read_text())["id"] == "ccccccccccc_0"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("id,labels\na,/m/1\nb,dragon\n", "better.csv:3: label 'dragon' is not in the vocabulary"),
        ("id,labels\na,/m/1\na,/m/2\n", "better.csv:3: 'a' came before"),
        ("id,labels\na,\n", "better.csv:2: 'a' has no labels"),
        ("id,labels\n,/m/1\n", "better.csv:2: '' has no id"),
        ("id,label\na,/m/1\n", "it needs id,labels"),
        ("id,labels\n\xff,/m/1\n", "better.csv:2: not UTF-8; save the file as UTF-8"),
    ],
)
def test_a_bad_row_is_named(audioset, tmp_path, text, said):
    better = tmp_path / "better.csv"
    better.write_bytes(text.encode("latin-1"))
    vocabulary = catalogs.audioset(*audioset, None, "train").labels
    with pytest.raises(UserError) as caught:
        read_overrides(better, vocabulary)
    assert said in str(caught.value)
