"""Containers made to exhaust memory or to read other files, and what lies in real ones beside the recordings."""

import io
import logging
import os
import tarfile
import zipfile

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import UserError
from shard_tools import sources
from shard_tools.audio_files import walk
from shard_tools.forms import hdf5
from shard_tools.names import split_source
from shard_tools.sources import SourceError, extract, members
from shard_tools.stamps import stamp
from tests.shard_tools.containers import RATE, pack, recordings

WAVS = recordings(4)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CRAFT_CACHE", str(tmp_path / "cache"))


def read(path: str, at: sources.Place = None) -> bytes:
    target = io.BytesIO()
    extract(path, at, target, stamp(path))
    return target.getvalue()


def refused(path, said: str) -> None:
    """By who lists what an HDF5 file has, and where a clip is read."""
    with pytest.raises(UserError, match=said):
        hdf5._holds(str(path))
    with pytest.raises(SourceError, match=said):
        read(f"{path}::0")


@pytest.mark.parametrize("name", ["waveform", "audio_name", "target"])
@pytest.mark.parametrize("how", ["external", "virtual", "link", "soft link"])
def test_an_hdf5_file_gives_nothing_of_other_files(tmp_path, name, how):
    """Neither recordings nor labels."""
    (tmp_path / "secret").write_bytes(b"secret" * 20000)
    with h5py.File(tmp_path / "secret.h5", "w") as file:
        file["x"] = np.ones((2, RATE), "i2")
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.attrs["sample_rate"] = RATE
        if name != "waveform":
            file["waveform"] = np.zeros((2, RATE), "i2")
        if how == "external":
            where = [(str(tmp_path / "secret"), 0, h5py.h5f.UNLIMITED)]
            file.create_dataset(name, (2, RATE), "i2", external=where)
        elif how == "virtual":
            layout = h5py.VirtualLayout((2, RATE), "i2")
            layout[:] = h5py.VirtualSource(str(tmp_path / "secret.h5"), "x", (2, RATE))
            file.create_virtual_dataset(name, layout)
        elif how == "link":
            file[name] = h5py.ExternalLink(str(tmp_path / "secret.h5"), "x")
        else:
            file["group/other"] = h5py.ExternalLink(str(tmp_path / "secret.h5"), "/")
            file[name] = h5py.SoftLink("/group/other/x")
    refused(tmp_path / "a.h5", rf"unreadable: '{name}' is a link, or lies in other files")


@pytest.mark.parametrize("words", [{"shape": (2, 40_000_000_000), "chunks": (1, 1_000_000)},
                                   {"shape": (60_000, 20_000), "chunks": (60_000, 20_000)}])  # fmt: skip
def test_a_row_or_chunk_of_an_hdf5_file_that_would_fill_the_memory_is_refused(tmp_path, words):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.attrs["sample_rate"] = RATE
        file.create_dataset("waveform", dtype="i2", compression="gzip", fillvalue=0, **words)
    assert (tmp_path / "a.h5").stat().st_size < 10_000
    refused(tmp_path / "a.h5", r"unreadable: a row or chunk would be \d{10,} bytes")


def test_compressed_recordings_pass_and_no_memory_is_a_failure(tmp_path, monkeypatch):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.attrs["sample_rate"] = RATE
        file.create_dataset("waveform", data=np.zeros((2, 1_000_000), "i2"), compression="gzip")
    assert len(read(f"{tmp_path}/a.h5::1")) > 2_000_000

    def full(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(sources.soundfile, "write", full)
    with pytest.raises(SourceError, match="damaged: MemoryError"):
        read(f"{tmp_path}/a.h5::1")


def parquet(path, values: list[bytes], picked: list[int], **words: object) -> None:
    column = pa.DictionaryArray.from_arrays(pa.array(picked, pa.int32()), pa.array(values, pa.binary()))
    table = pa.table({"audio": column if "column_encoding" not in words else column.cast(pa.binary())})
    pq.write_table(table, path, compression="zstd", store_schema=False, dictionary_pagesize_limit=1 << 30, **words)


def test_a_value_that_all_rows_of_a_parquet_file_share_is_in_memory_once(tmp_path):
    path = tmp_path / "a.parquet"
    parquet(path, [bytes(1 << 20)], [0] * 1000)
    assert path.stat().st_size < 1000
    before = pa.total_allocated_bytes()
    assert read(f"{path}::999") == bytes(1 << 20)
    assert pa.total_allocated_bytes() - before < 1 << 24


@pytest.mark.parametrize("words", [{}, {"use_dictionary": False, "column_encoding": {"audio": "DELTA_BYTE_ARRAY"}}])
def test_values_that_inflate_without_end_are_a_failure(tmp_path, monkeypatch, words):
    monkeypatch.setattr(sources, "BOMB_BYTES", 1 << 23)
    path = tmp_path / "a.parquet"
    parquet(path, [bytes(1 << 20) + b"a", bytes(1 << 20) + b"b"], [0, 1] * 20, **words)
    with pytest.raises(SourceError, match=r"unreadable: row group 0 would be more than 8388608 bytes in memory"):
        read(f"{path}::0")
    monkeypatch.setattr(sources, "BOMB_BYTES", 1 << 28)
    assert read(f"{path}::1") == bytes(1 << 20) + b"b"


def test_what_follows_the_end_of_a_tar_is_said(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    pack(tmp_path, "tar", WAVS)
    whole = [(tmp_path / f"{name}.tar").read_bytes() for name in "ab"]
    path = tmp_path / "ab.tar"
    for between in (0, 1 << 21):
        path.write_bytes(whole[0] + bytes(between) + whole[1])
        assert len(list(members([str(path)]))) == 2
        left = len(whole[1])
        assert f"{path}: {left} bytes after the end of the archive are not read: several tars in one?" in caplog.text
        caplog.clear()
    path.write_bytes(whole[0] + bytes(1 << 21))
    assert len(list(members([str(path)]))) == 2
    assert not caplog.text


def test_what_macos_adds_to_archives_is_left_out(tmp_path, caplog):
    """As `walk` leaves it out of a folder."""
    names = ("d/a.wav", "d/._a.wav", "__MACOSX/d/._a.wav")
    with tarfile.open(tmp_path / "a.tar", "w") as tar, zipfile.ZipFile(tmp_path / "a.zip", "w") as whole:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = len(WAVS[0])
            tar.addfile(info, io.BytesIO(WAVS[0]))
            whole.writestr(name, WAVS[0])
    for kind in ("tar", "zip"):
        found = members([f"{tmp_path}/a.{kind}"])
        assert [split_source(member.name)[1] for member in found] == ["d/a.wav"]
        assert f"a.{kind}: 2 members are left out, as macOS put them" in caplog.text


def test_a_member_larger_than_a_recording_is_not_called_truncated(tmp_path, monkeypatch):
    pack(tmp_path, "tar", WAVS)
    (member, _) = members([f"{tmp_path}/a.tar"])
    monkeypatch.setattr(sources, "MEMBER_BYTES", 1000)
    with pytest.raises(SourceError, match=rf"unreadable: {len(WAVS[0])} bytes, and a recording in a tar may have 1000"):
        read(member.name, member.at)


@pytest.mark.parametrize("kind", ["tar", "zip", "parquet", "h5"])
def test_a_pipe_under_the_name_of_a_container_is_refused_at_once(tmp_path, kind):
    path = f"{tmp_path}/a.{kind}"
    os.mkfifo(path)
    with pytest.raises((UserError, OSError), match="no regular file"):
        list(members([path])) if kind in ("tar", "zip") else sources.open_container(path)


def test_shards_below_the_root_are_no_sources(tmp_path, caplog):
    """Those of this build before it goes on, or of another one; on a disk and in a store."""
    for name in ("a.wav", "done/index.parquet", "done/manifest.json", "done/failures.jsonl", "done/train-000000.tar",
                 "sub/begun/train-000000.tar", "sub/begun/.build/train/plan", "sub/b.wav", "table/index.parquet",
                 "table/manifest.json", "swift/.build/debug/x", "swift/c.wav"):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    others = ["a.wav", "sub/b.wav", "swift/c.wav", "table/index.parquet", "table/manifest.json"]
    for root in (str(tmp_path), f"local://{tmp_path}"):
        assert [path.removeprefix(f"{root}/") for path in walk(root)] == others
        assert f"{root}: 2 folders of shards are left out, such as {root}/done" in caplog.text
    assert len(list(walk(tmp_path / "done"))) == 4  # who names them means them


def test_a_store_gives_files_in_the_order_of_a_disk(tmp_path):
    """A folder's files before its folders, each by name: shards are cut in that order."""
    for name in ("rec/b.wav", "rec-2/a.wav", "top.wav", "rec/sub/z.wav", "rec/y.wav", "rec-2/c.wav", "rec/sub-2/x.wav",
                 "rec/sub.wav", "a/a/a.wav", "a/b.wav", "B.wav"):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    found = [path.removeprefix(f"{tmp_path}/") for path in walk(tmp_path)]
    assert found[:5] == ["B.wav", "top.wav", "a/b.wav", "a/a/a.wav", "rec/b.wav"]
    assert [path.removeprefix(f"local://{tmp_path}/") for path in walk(f"local://{tmp_path}")] == found
