"""The index in memory: read shard by shard, the rows that one read of the whole file would give."""

import os

import numpy as np
import pyarrow as pa
import pytest

from pipeline.config import DataConfig
from pipeline.data.corpus import load_corpus
from pipeline.data.index import ShardIndex
from pipeline.data.manifest import INDEX_SCHEMA, load_index, load_manifest
from pipeline.errors import UserError
from tests.helpers import write_index


def opened(directory, rows_kept=1 << 19):
    return ShardIndex(load_corpus(DataConfig(shards=str(directory))), rows_kept=rows_kept)


def check(index, whole, rows):
    clips = index.clips(rows)
    for number, row in enumerate(rows.tolist()):
        for member in ("waveform", "fbank"):
            place = tuple(whole[row][f"{member}_{what}"] for what in ("offset", "size", "xxh3"))
            assert clips.rows[member][number].item() == place
        assert index.shards[clips.shard[number]].name == whole[row]["shard"]
        assert clips.rows["samples"][number] == round(whole[row]["seconds"] * 16000)
        assert clips.labels[clips.which == number].tolist() == whole[row]["labels"]


@pytest.mark.parametrize("kept", [1, 24, 1 << 19])
def test_any_rows_in_any_order_are_the_file_s(shards, kept):
    """Also with room for a shard or three: they are dropped and read again."""
    index = opened(shards, kept)
    whole = load_index(shards).to_pylist()
    rng = np.random.default_rng(0)
    for size in [*[2] * 60, 40, 3, 80, 1]:
        check(index, whole, rng.integers(0, len(whole), size))
    for row in (0, 79, 40):
        assert index.name(row) == (whole[row]["key"], whole[row]["shard"])


def test_row_groups_that_cut_through_shards(shards, tmp_path):
    (tmp_path / "manifest.json").write_bytes((shards / "manifest.json").read_bytes())
    write_index(tmp_path, load_index(shards), row_group_size=5)
    whole = load_index(shards).to_pylist()
    check(opened(tmp_path), whole, np.arange(len(whole))[::-1])


def test_an_index_in_another_order_is_refused(shards, tmp_path):
    (tmp_path / "manifest.json").write_bytes((shards / "manifest.json").read_bytes())
    table = load_index(shards)
    write_index(tmp_path, table.take(np.arange(len(table))[::-1]))
    index = opened(tmp_path)
    with pytest.raises(UserError, match="one of another build"):
        index.clips(np.array([0]))


def test_a_damaged_index_is_one_line(shards, tmp_path):
    (tmp_path / "manifest.json").write_bytes((shards / "manifest.json").read_bytes())
    (tmp_path / "index.parquet").write_bytes(b"not parquet")
    with pytest.raises(UserError, match=r"index.parquet: .*run verify_shards.py"):
        opened(tmp_path)


@pytest.mark.parametrize(
    ("fold", "held_out", "limit"), [(0, False, 0), (0, False, 11), (2, False, 0), (2, True, 0), (2, True, 3)]
)
def test_parts_are_the_rows_of_split_and_fold(shards, fold, held_out, limit):
    index = opened(shards)
    for splits in (["train"], ["train", "eval"], ["eval", "train"], *([] if fold else [["eval"]])):
        part = index.part([(0, split) for split in splits], fold, held_out, limit, "name")
        rows = part.at(np.arange(len(part)))
        expected = [
            i for split in splits for i, row in enumerate(load_index(shards).to_pylist())
            if row["split"] == split and (not fold or (row["fold"] == fold) == held_out)
        ]  # fmt: skip
        assert rows.tolist() == (expected[:limit] if limit else expected)
        for number in range(len(part.starts) - 1):
            assert len(np.unique(index.shards_of(part.shard(number)))) == 1


def test_the_listed_clips_of_a_part(shards):
    """In the order of the index, whatever that of the list is; ids of other splits and of nothing are left out."""
    index, whole = opened(shards), load_index(shards).to_pylist()
    ids = pa.array([row["key"] for row in whole[::-3]] + ["nothing"])
    for split, fold in (("train", 0), ("eval", 0), ("train", 2)):
        part = index.part([(0, split)], fold, True, 0, "name", ids)
        listed = [i for i in range(len(whole) - 1, -1, -3) if whole[i]["split"] == split]
        assert part.at(np.arange(len(part))).tolist() == sorted(
            i for i in listed if not fold or whole[i]["fold"] == fold
        )
        for number in range(len(part.starts) - 1):
            assert len(np.unique(index.shards_of(part.shard(number)))) == 1
    assert len(index.part([(0, "train")], 0, False, 4, "name", ids)) == 4
    others = pa.array([row["key"] for row in whole if row["split"] == "train"])
    with pytest.raises(
        UserError, match=f"none of the {len(others)} listed ids is in split 'eval', the first .*--ids-out"
    ):
        index.part([(0, "eval")], 0, False, 0, "name", others)


def rewritten(shards, out, change):
    """An index of other rows, whose hash the manifest lists."""
    (out / "manifest.json").write_bytes((shards / "manifest.json").read_bytes())
    rows = load_index(shards).to_pylist()
    change(rows)
    write_index(out, pa.Table.from_pylist(rows, INDEX_SCHEMA))
    return opened(out)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda rows: rows[3].update(labels=[13]), "labels: 13 of 13 classes"),
        (lambda rows: rows[3].update(labels=[-1]), "labels: -1 of 13 classes"),
        (lambda rows: rows[3].update(labels=[1, None]), "labels: empty"),
        (lambda rows: rows[3].update(labels=None), "labels: empty"),
        (lambda rows: rows[3].update(shard="../x.tar"), "shard: '../x.tar', which manifest.json does not have"),
        (lambda rows: rows[3].update(shard=None), "shard: empty"),
        (lambda rows: rows[3].update(split="eval"), "split: eval, its shard train-000000.tar is of train"),
        (lambda rows: rows[3].update(waveform_offset=1 << 40), "waveform_offset: 1099511627776"),
        (lambda rows: rows[3].update(fbank_offset=-512), "fbank_offset: -512"),
        (lambda rows: rows[3].update(fbank_offset=(1 << 63) - 1), "fbank_offset: 9223372036854775807"),
        (lambda rows: rows[3].update(waveform_size=1 << 40), "waveform_size: 1099511627776"),
        (lambda rows: rows[3].update(waveform_size=16000), "waveform_size: 16000"),
        (lambda rows: rows[3].update(fbank_size=-1), "fbank_size: -1"),
        (lambda rows: rows[3].update(fbank_size=None), "fbank_size: empty"),
    ],
)
def test_rows_that_cannot_be_are_one_line(shards, tmp_path, change, said):
    """Their hash is that of the manifest: the index was written so."""
    index = rewritten(shards, tmp_path, change)
    with pytest.raises(UserError) as error:
        index.clips(np.array([0]))
    assert f"{tmp_path}/index.parquet: {said}" in str(error.value)


def test_labels_and_folds_that_cannot_be_are_refused_where_all_are_read(shards, tmp_path):
    index = rewritten(shards, tmp_path, lambda rows: rows[9].update(labels=[99], fold=-1))
    with pytest.raises(UserError, match="labels: 99 of 13 classes"):
        index.label_columns()
    with pytest.raises(UserError, match="fold: -1"):
        index.part([(0, "train")], 2, False, 0, "name")
    with pytest.raises(UserError, match="fold: -1"):
        load_index(tmp_path, columns=["fold"])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda table: table.drop_columns(["labels"]), "labels: a column that is not there"),
        (lambda table: table.set_column(2, "fold", table["fold"].cast(pa.string())), "fold: a column that is string"),
    ],
)
def test_columns_of_other_types_are_refused(shards, tmp_path, change, said):
    (tmp_path / "manifest.json").write_bytes((shards / "manifest.json").read_bytes())
    write_index(tmp_path, change(load_index(shards)))
    with pytest.raises(UserError, match=said):
        opened(tmp_path)


def test_an_index_that_is_no_regular_file_is_refused_and_not_waited_for(shards, tmp_path):
    (tmp_path / "manifest.json").write_bytes((shards / "manifest.json").read_bytes())
    os.mkfifo(tmp_path / "index.parquet")
    with pytest.raises(UserError, match="no regular file"):
        opened(tmp_path)
    (tmp_path / "manifest.json").unlink()
    os.mkfifo(tmp_path / "manifest.json")
    with pytest.raises(UserError, match="no regular file"):
        load_manifest(tmp_path)
