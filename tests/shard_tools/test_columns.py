"""Clips and failures in columns are the clips and failures that went in."""

import numpy as np
import pytest

from pipeline.flow import Clip
from shard_tools.columns import Clips, Failure, Failures, digest

COLUMNS = ("key", "path", "id", "start", "end", "labels", "fold", "trimmed")

CLIPS = [
    Clip("a", "/data/x/a.wav", 0.0, None, (1, 5), "train", 3, "a", None),
    Clip("b", "/data/x/\udcff\udcfe odd.wav", 1.25, 11.25, (), "eval", 0, "ü", True),
    Clip("b", "/elsewhere/b.wav", 0.0, 2.0, (7,), "train", 0, "", False),
    Clip("c", "s3://bucket/c.wav", 0.0, None, (0,), "train", 1, "c", True),
]


@pytest.fixture
def clips():
    columns = Clips("/data/x")
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
    whole = digest(clips.table(rows), COLUMNS)
    alone = Clips("/data/x")
    for row in rows.tolist():
        alone.append(clips[row])
    assert digest(alone.table(np.arange(3)), COLUMNS) == whole
    changes = [
        {"key": "z"}, {"path": "/data/x/z"}, {"id": "z"}, {"start": 1.0}, {"end": 9.0}, {"end": 0.0},
        {"labels": (1,)}, {"fold": 4}, {"trimmed": False},
    ]  # fmt: skip
    for change in changes:
        other = Clips("/data/x")
        for clip in (CLIPS[0], CLIPS[2], CLIPS[3]):
            fields = {name: getattr(clip, name) for name in (*COLUMNS, "split")}
            other.append(Clip(**(fields | change if clip.key == "a" else fields)))
        assert digest(other.table(np.arange(3)), COLUMNS) != whole, change


def test_a_clip_costs_about_a_hundred_bytes():
    clips = Clips("/data/audioset")
    for number in range(20000):
        name = f"{number:011d}"
        clips.append(Clip(f"{name}_30000", f"/data/audioset/part01/Y{name}.m4a", 30.0, 40.0, (1, 2), "train", 0, name))
    sizes = [len(bytes(clips.table(np.arange(len(clips)))[name].combine_chunks().buffers()[-1])) for name in ("key",)]
    assert sizes == [17 * 20000]
    assert clips.table(np.arange(len(clips))).nbytes < 150 * len(clips)


def test_failures_are_those_that_went_in():
    rows = [Failure("a", "", "missing: no file", "train"), Failure("b", "x", "missing: no file", "eval")]
    failures = Failures()
    for row in rows:
        failures.append(row)
    assert list(failures) == rows
    assert failures.splits == ["train", "eval"]
    assert failures.rows("eval").tolist() == [1]
