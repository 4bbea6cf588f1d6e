"""Clips and failures in columns are the clips and failures that went in."""

import numpy as np
import pytest

from pipeline.flow import Clip
from shard_tools.columns import BATCH, Failure, Rows, digest

COLUMNS = ("key", "path", "id", "start", "end", "labels", "fold", "trimmed")

CLIPS = [
    Clip("a", "/data/x/a.wav", 0.0, None, (1, 5), "train", 3, "a", None),
    Clip("b", "/data/x/\udcff\udcfe odd.wav", 1.25, 11.25, (), "eval", 0, "ü", True),
    Clip("b", "/elsewhere/b.wav", 0.0, 2.0, (7,), "train", 0, "", False),
    Clip("c", "s3://bucket/c.wav", 0.0, None, (0,), "train", 1, "c", True, others=(
        Clip("c", "/data/x/\udcff/c.wav", 2.0, 4.0, (0,), "train", 1, "c", None),
        Clip("c", "/elsewhere/c.wav", 0.0, None, (0,), "train", 1, "c", False),
    )),
]  # fmt: skip


@pytest.fixture
def clips():
    columns = Rows(Clip, "/data/x")
    for clip in CLIPS:
        columns.append(clip)
    return columns


def test_rows_are_the_clips_that_went_in(clips):
    assert list(clips) == CLIPS
    assert clips[1:3] == CLIPS[1:3]
    assert clips[-1] == CLIPS[-1]
    assert clips.splits == ["train", "eval"]
    assert clips.rows("train").tolist() == [0, 2, 3]
    assert clips.repeat() is None
    assert list(clips.of("eval")) == CLIPS[1:2]
    paths = clips.recorded(np.arange(4), ["path"])["path"].to_pylist()
    assert paths == [b"a.wav", b"\xff\xfe odd.wav", b"", b"c"]  # outside: the id
    clips.truncate(2)
    assert list(clips) == CLIPS[:2]
    clips.append(CLIPS[3])
    assert list(clips) == [*CLIPS[:2], CLIPS[3]]


def test_a_repeated_key_is_found(clips):
    clips.append(Clip("a", "/data/x/other.wav", 0.0, None, (), "train"))
    first, second = clips.repeat()
    assert (first.path, second.path) == ("/data/x/a.wav", "/data/x/other.wav")


def test_digest_sees_every_column_and_only_the_rows(clips):
    rows = clips.rows("train")
    whole = digest(clips.recorded(rows, COLUMNS))
    alone = Rows(Clip, "/data/x")
    for row in rows.tolist():
        alone.append(clips[row])
    assert digest(alone.recorded(np.arange(3), COLUMNS)) == whole
    changes = [
        {"key": "z"}, {"path": "/data/x/z"}, {"id": "z"}, {"start": 1.0}, {"end": 9.0}, {"end": 0.0},
        {"labels": (1,)}, {"fold": 4}, {"trimmed": False},
    ]  # fmt: skip
    for change in changes:
        other = Rows(Clip, "/data/x")
        for clip in (CLIPS[0], CLIPS[2], CLIPS[3]):
            fields = {name: getattr(clip, name) for name in (*COLUMNS, "split")}
            other.append(Clip(**(fields | change if clip.key == "a" else fields)))
        assert digest(other.recorded(np.arange(3), COLUMNS)) != whole, change


def test_many_rows_are_those_that_went_in_and_come_out_in_any_order():
    clips = Rows(Clip, "/data")
    count = 2 * BATCH + 3
    for number in range(count):
        clips.append(
            Clip(f"{number}", f"/data/{number}.wav", 0.0, None, (number % 7,), f"split{number % 3}", line=number)
        )
    order = np.random.default_rng(0).permutation(count)
    assert [clip.line for clip in clips.at(order)] == order.tolist()
    assert [clip.path for clip in clips.at([BATCH, 0])] == [f"/data/{BATCH}.wav", "/data/0.wav"]
    assert clips.splits == ["split0", "split1", "split2"]
    assert clips.rows("split1").tolist() == list(range(1, count, 3))
    assert clips.label_counts("split0", 8).tolist() == [*np.bincount(np.arange(0, count, 3) % 7), 0]
    clips.append(Clip("5", "/data/again.wav", 0.0, None, (), "split2"))
    assert [clip.path for clip in clips.repeat()] == ["/data/5.wav", "/data/again.wav"]


def test_a_clip_costs_about_a_hundred_bytes():
    clips = Rows(Clip, "/data/audioset")
    for number in range(20000):
        name = f"{number:011d}"
        clips.append(Clip(f"{name}_30000", f"/data/audioset/part01/Y{name}.m4a", 30.0, 40.0, (1, 2), "train", 0, name))
    assert clips.table["key"].chunk(0).buffers()[-1].size == 17 * 20000
    assert clips.table.nbytes < 150 * len(clips)


def test_failures_are_those_that_went_in():
    rows = [Failure("a", "", "missing: no file", "train"), Failure("b", "x", "missing: no file", "eval")]
    failures = Rows(Failure)
    assert (list(failures), failures.splits, len(failures.take(failures.rows("train")))) == ([], [], 0)
    for row in rows:
        failures.append(row)
    assert list(failures) == rows
    assert failures.splits == ["train", "eval"]
    assert failures.rows("eval").tolist() == [1]
