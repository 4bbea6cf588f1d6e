"""The index in memory: read shard by shard, the rows that one read of the whole file would give."""

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline.data import index as module
from pipeline.data.index import ShardIndex
from pipeline.data.manifest import load_index, load_manifest
from pipeline.data.reader import Needs
from pipeline.errors import UserError

BOTH = Needs(waveform=True, fbank=True)


def check(index, whole, rows):
    found = index.find(rows)
    for member in ("waveform", "fbank"):
        jobs = index.jobs(member, found)
        for what in module.WHAT:
            assert jobs[what].tolist() == [whole[row][f"{member}_{what}"] for row in rows]
        assert [index.shard_names[shard] for shard in jobs["shard"]] == [whole[row]["shard"] for row in rows]
    which, labels = index.labels(found)
    pairs = [(i, label) for i, row in enumerate(rows) for label in whole[row]["labels"]]
    assert list(zip(which.tolist(), labels.tolist(), strict=True)) == pairs


@pytest.mark.parametrize("kept", [1, 24, 1 << 19])
def test_any_rows_in_any_order_are_the_file_s(shards, kept):
    """Also with room for a shard or three: they are put out and read again, and a batch touches more than fit."""
    index = ShardIndex(str(shards), load_manifest(shards), BOTH, kept)
    whole = load_index(shards).to_pylist()
    rng = np.random.default_rng(0)
    for size in [*[2] * 60, 40, 3, 80, 1]:
        check(index, whole, rng.integers(0, len(whole), size))
    for row in (0, 79, 40):
        assert index.name(row) == (whole[row]["key"], whole[row]["shard"])


def test_row_groups_that_cut_through_shards(shards, tmp_path):
    (tmp_path / "manifest.json").write_bytes((shards / "manifest.json").read_bytes())
    pq.write_table(load_index(shards), tmp_path / "index.parquet", row_group_size=5)
    whole = load_index(shards).to_pylist()
    check(ShardIndex(str(tmp_path), load_manifest(shards), BOTH), whole, np.arange(len(whole))[::-1])


def test_an_index_in_another_order_is_refused(shards, tmp_path):
    (tmp_path / "manifest.json").write_bytes((shards / "manifest.json").read_bytes())
    table = load_index(shards)
    pq.write_table(table.take(np.arange(len(table))[::-1]), tmp_path / "index.parquet")
    index = ShardIndex(str(tmp_path), load_manifest(shards), BOTH)
    with pytest.raises(UserError, match="one of another build"):
        index.find(np.array([0]))


def test_a_damaged_index_is_one_line(shards, tmp_path):
    (tmp_path / "index.parquet").write_bytes(b"not parquet")
    with pytest.raises(UserError, match=r"index.parquet: .*run verify_shards.py"):
        ShardIndex(str(tmp_path), load_manifest(shards), BOTH)


@pytest.mark.parametrize(
    ("fold", "held_out", "limit"), [(0, False, 0), (0, False, 11), (2, False, 0), (2, True, 0), (2, True, 3)]
)
def test_parts_are_the_rows_of_split_and_fold(shards, fold, held_out, limit):
    index = ShardIndex(str(shards), load_manifest(shards), BOTH)
    for split in ("train",) if fold else ("train", "eval"):
        part = index.part(split, fold, held_out, limit, "name")
        rows = part.at(np.arange(len(part)))
        expected = [
            i for i, row in enumerate(load_index(shards).to_pylist())
            if row["split"] == split and (not fold or (row["fold"] == fold) == held_out)
        ]  # fmt: skip
        assert rows.tolist() == (expected[:limit] if limit else expected)
        for number in range(len(part.starts) - 1):
            assert len(np.unique(index.shards(part.shard(number)))) == 1
