"""Clips inside tars, zips, Parquet and HDF5 files: read in place, built as files are, and bad ones named."""

import io
import json
import logging
import os
import random
import signal
import struct
import subprocess
import sys
import tarfile
import zipfile
from contextlib import suppress
from pathlib import Path
from unittest.mock import Mock

import boto3
import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.data import storage
from pipeline.data.manifest import load_index
from pipeline.errors import UserError
from shard_tools import sources, stamps
from shard_tools.build import build, build_slice, merge
from shard_tools.forms import hdf5, look
from shard_tools.forms.entries import Asked
from shard_tools.forms.records import parquet_source
from shard_tools.names import plain, split_source
from shard_tools.plan import Slice, SplitPlan
from shard_tools.repair import compare, repair
from shard_tools.segment import MachineError
from shard_tools.sources import SourceError, extract, members
from shard_tools.stamps import stamp
from shard_tools.store import stamped_copies
from shard_tools.verify_shards import examine, verify
from tests.conftest import ROOT
from tests.helpers import digests, options
from tests.shard_tools import kills
from tests.shard_tools.containers import KINDS, catalog_of, pack, recordings

OPTIONS = options(0.1, 4)
WAVS = recordings()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CRAFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def read(path: str, at: sources.Place = None) -> bytes:
    target = io.BytesIO()
    extract(path, at, target, stamp(path))
    return target.getvalue()


@pytest.mark.parametrize("kind", KINDS)
def test_members_are_read_where_they_lie_and_found_by_name_alone(tmp_path, kind):
    pack(tmp_path, kind, WAVS)
    for wav, clip in zip(WAVS, catalog_of(tmp_path, kind).clips, strict=True):
        assert read(clip.path, clip.at) == read(clip.path) == wav
        assert split_source(clip.path)[0].endswith(f".{kind}")


@pytest.mark.parametrize("kind", KINDS)
def test_shards_are_the_same_by_workers_slices_and_places_or_names(tmp_path, kind):
    root = tmp_path / "root"
    pack(root, kind, WAVS)
    catalog = catalog_of(root, kind)
    assert build(catalog, tmp_path / "one", OPTIONS, 1, engine="inline").manifest.splits["train"].clips == 12
    build(catalog_of(root, kind, known=kind == "parquet"), tmp_path / "two", OPTIONS, 2)
    for number in (1, 2):
        build_slice(catalog, tmp_path / "three", OPTIONS, 1, Slice(number, 2), engine="inline")
    merge(catalog, tmp_path / "three", OPTIONS)
    assert digests(tmp_path / "one") == digests(tmp_path / "two") == digests(tmp_path / "three")
    assert {source.partition("::")[0] for source in load_index(tmp_path / "one")["source"].to_pylist()} == {
        f"a.{kind}", f"b.{kind}"
    }  # fmt: skip
    # Shards know a source by its name: another copy of the container gives the same bytes.
    assert list(compare(tmp_path / "one", str(root), 1)) == []
    whole = (tmp_path / "one" / "train-000001.tar").read_bytes()
    (tmp_path / "one" / "train-000001.tar").write_bytes(whole[:5000] + b"x" + whole[5001:])
    found = examine(tmp_path / "one", 1)
    assert list(found) == ["train-000001.tar"]
    assert list(repair(tmp_path / "one", found, str(root), 1)) == ["train-000001.tar: built again, as it was"]
    assert verify(tmp_path / "one", 1) == []


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_container_holds_anew_is_built_anew(tmp_path, kind):
    root, out = tmp_path / "root", tmp_path / "out"
    pack(root, kind, WAVS)
    build_slice(catalog_of(root, kind), out, OPTIONS, 1, Slice(1, 1), engine="inline")
    untouched = digests(out)
    build_slice(catalog_of(root, kind), out, OPTIONS, 1, Slice(1, 1), engine="inline")
    assert digests(out) == untouched
    pack(root, kind, WAVS[::-1])
    build(catalog_of(root, kind), out, OPTIONS, 1, engine="inline")
    build(catalog_of(root, kind), tmp_path / "new", OPTIONS, 1, engine="inline")
    assert digests(out) == digests(tmp_path / "new") != untouched


@pytest.mark.parametrize("kind", ["parquet", "h5"])
def test_a_container_that_changes_after_it_was_listed_gives_no_clip_under_anothers_label(tmp_path, kind):
    """Its rows are known by their numbers: those of the new file got the names and labels of the old one's."""
    root, out = tmp_path / "root", tmp_path / "out"
    root.mkdir()
    (tmp_path / "c.csv").write_text("index,mid,display_name\n0,/m/a,a\n1,/m/b,b\n")

    def write(order: list[int]) -> None:
        (root / f"train.{kind}").unlink(missing_ok=True)  # h5py does not write over a file that is open
        if kind == "parquet":
            rows = [{"bytes": WAVS[number], "path": None} for number in order]
            names = [("/m/a", "/m/b")[number] for number in order]
            pq.write_table(pa.table({"audio": rows, "label": names, "id": names}), root / "train.parquet")
            return
        with h5py.File(root / "train.h5", "w") as file:
            file["waveform"] = np.stack([np.full(1600, 1000 * number, np.int16) for number in order])
            file["target"], file.attrs["sample_rate"] = np.eye(2, dtype=bool)[order], 16000

    write([0, 1])
    listed = look.read({"h5": "hdf5"}.get(kind, kind), Asked(root, class_labels=tmp_path / "c.csv"))
    written = listed.containers[f"{root}/train.{kind}"][1]
    write([1, 0])
    os.utime(root / f"train.{kind}", ns=(0, written + 10**9))  # clocks of file systems are coarse
    with pytest.raises(UserError, match=rf"train\.{kind}: was written anew since its clips were listed"):
        build(listed, out, OPTIONS, 1, engine="inline")
    assert not list(out.glob("*.tar"))
    write([0, 1])
    os.utime(root / f"train.{kind}", ns=(0, written))
    build(listed, out, OPTIONS, 1, engine="inline")
    assert verify(out, 1) == []


def test_parquet_is_read_by_few_row_groups_and_its_clips_are_mixed(tmp_path):
    """20 shards of 50 clips out of 100 groups of 10: a permutation of clips would read about 40 groups a shard."""
    pack(tmp_path, "parquet", WAVS)
    catalog = catalog_of(tmp_path, "parquet", 0)
    clip = catalog_of(tmp_path, "parquet").clips[0]
    for row in range(1000):
        path = f"{tmp_path}/a.parquet::{row}"
        catalog.clips.append(type(clip)(f"{row}", path, 0.0, None, (0,), "train", at=(row // 10, row % 10)))
    plan = SplitPlan(catalog, "train", tmp_path / "out", options(0.1, 50))
    assert sorted(plan.order.tolist()) == list(range(1000))
    groups = [plan.rows(number) // 10 for number in range(len(plan))]
    reads = [int((np.diff(shard) != 0).sum()) + 1 for shard in groups]
    assert reads == [len(set(shard.tolist())) for shard in groups]  # each once, one after the other
    assert max(reads) <= 20
    assert sum(reads) <= 2.5 * 100
    assert min(len(set(shard.tolist())) for shard in groups) >= 8  # and from many
    assert np.abs(np.diff([np.median(shard) for shard in groups])).max() > 20
    assert plan.identity["row groups"] != SplitPlan(catalog, "train", tmp_path, options(0.1, 60)).identity["row groups"]


def test_only_the_rows_that_a_shard_needs_are_in_memory(tmp_path, monkeypatch):
    pack(tmp_path, "parquet", WAVS)
    loaded = []
    group = sources._group
    monkeypatch.setattr(sources, "_group", lambda *words: loaded.append(words) or group(*words))
    build(catalog_of(tmp_path, "parquet"), tmp_path / "out", OPTIONS, 1, engine="inline")
    assert len(loaded) <= 3 * 2.5 * 2  # 3 shards, 6 groups
    assert len(sources._groups) <= sources.GROUPS_KEPT


def test_the_index_of_a_tar_is_made_once_and_kept(tmp_path, cache, monkeypatch):
    pack(tmp_path, "tar", WAVS)
    first = list(members([f"{tmp_path}/a.tar"]))
    monkeypatch.setattr(sources, "_tar_headers", None)
    assert list(members([f"{tmp_path}/a.tar"])) == first
    (kept,) = (cache / "sources").iterdir()
    monkeypatch.undo()
    monkeypatch.setenv("CRAFT_CACHE", str(cache))
    kept.write_bytes(b"damaged")
    assert list(members([f"{tmp_path}/a.tar"])) == first
    pack(tmp_path, "tar", WAVS[:6])
    assert len(list(members([f"{tmp_path}/a.tar"]))) == 3
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("CRAFT_CACHE", str(blocked / "below"))
    assert len(list(members([f"{tmp_path}/a.tar"]))) == 3


def test_names_and_members_of_odd_tars(tmp_path, caplog):
    long, unicode = "d/" * 80 + "x.wav", "ü/☃.wav"
    path = tmp_path / "odd.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for name in (long, unicode, "./a//./b.wav", "../out.wav", "same.wav", "same.wav"):
            info = tarfile.TarInfo(name)
            info.size = len(name)
            tar.addfile(info, io.BytesIO(name.encode()[: info.size]))
        link = tarfile.TarInfo("link.wav")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    found = list(members([str(path)]))
    assert [split_source(member.name)[1] for member in found] == [long, unicode, "a/b.wav", "same.wav"]
    assert read(found[0].name) == long.encode()
    for said in ("1 links, devices or sparse files", "their names lead elsewhere, such as '../out.wav'",
                 "1 members have the name of an earlier one"):  # fmt: skip
        assert said in caplog.text
    assert plain("/x/./y") == "x/y"
    assert plain("s3://x") is plain("x/../y") is plain("./") is None
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo(long)
        tar.addfile(info)
    assert [split_source(member.name)[1] for member in members([str(path)])] == [long]


def local_header(content: bytes, member: str, **fields: int) -> bytes:
    """A zip with other values in the local header of a member; they stand as in `sources.LOCAL_HEADER`."""
    place = content.index(member.encode()) - 30
    names = ["magic", "version", "flags", "method", "time", "date", "crc", "packed", "size", "name", "extra"]
    values = list(struct.unpack("<4sHHHHHIIIHH", content[place : place + 30]))
    for field, value in fields.items():
        values[names.index(field)] = value
    return content[:place] + struct.pack("<4sHHHHHIIIHH", *values) + content[place + 30 :]


def test_a_zip_bomb_is_named_and_never_inflated(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(sources, "BOMB_BYTES", 1 << 20)
    path = tmp_path / "b.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as whole:
        whole.writestr("bomb.wav", bytes(1 << 24))
        whole.writestr("silence.wav", bytes(1 << 19))
    (silence,) = members([str(path)])
    assert "1 members are left out, as they would inflate to 16777216 bytes" in caplog.text
    assert read(silence.name, silence.at) == bytes(1 << 19)
    # One whose headers say less than it holds, or nothing.
    content = path.read_bytes()
    for fields in ({"size": 1000}, {"flags": 8, "size": 0}):
        path.write_bytes(local_header(content, "bomb.wav", **fields))
        with zipfile.ZipFile(path) as whole:
            info = whole.getinfo("bomb.wav")
        target = io.BytesIO()
        with pytest.raises(SourceError, match=r"damaged: it inflates to more than the \d+ bytes"):
            extract(f"{path}::bomb.wav", (info.header_offset, info.compress_size), target, stamp(str(path)))
        assert target.tell() <= 1 << 22


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_a_container_that_was_written_anew_gives_no_other_clip(tmp_path, kind):
    """A clip's place was listed before; what lies there now is not it."""
    pack(tmp_path, kind, WAVS)
    clips = list(catalog_of(tmp_path, kind).clips)
    pack(tmp_path, kind, [WAVS[0] + bytes(700), *WAVS[:0:-1]])
    read(clips[0].path)
    with pytest.raises(SourceError, match="damaged: its container has something else where it was listed"):
        read(clips[1].path, clips[1].at)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"magic": b"XXXX"}, "damaged: its container has something else"),
        ({"flags": 1}, "unreadable: it is encrypted"),
        ({"method": 93}, "undecodable: packed by method 93"),
        ({"crc": 1}, "damaged: its CRC-32"),
        ({"name": 60000}, "damaged: its container has something else"),
        ({"extra": 60000}, "truncated: its zip ends within it"),
        ({"method": 8}, "damaged: "),
    ],
)
def test_members_of_a_zip_that_lie(tmp_path, fields, said):
    pack(tmp_path, "zip", WAVS)
    path = tmp_path / "a.zip"
    first = next(iter(members([str(path)])))
    path.write_bytes(local_header(path.read_bytes(), "audio/0.wav", **fields))
    with pytest.raises(SourceError, match=said):
        read(first.name, first.at)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_damaged_member_of_a_zip_that_was_streamed_is_told(tmp_path, method):
    """Its CRC follows the member, as macOS writes it, and was not looked at."""
    stream, path, wav = io.BytesIO(), tmp_path / "a.zip", bytes(np.random.default_rng(0).integers(0, 99, 9000))
    stream.tell = stream.seek = Mock(side_effect=OSError)  # as a pipe's
    with zipfile.ZipFile(stream, "w", method) as whole:
        whole.writestr("0.wav", wav)
        assert whole.getinfo("0.wav").flag_bits & 8
    path.write_bytes(stream.getvalue())
    assert read(f"{path}::0.wav") == wav
    flipped = bytearray(stream.getvalue())
    flipped[4000] ^= 1
    path.write_bytes(flipped)
    with pytest.raises(SourceError, match="damaged: its CRC-32 is not the one in its zip"):
        read(f"{path}::0.wav")


def test_truncated_containers(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    for kind in KINDS:
        pack(tmp_path, kind, WAVS)
    for kind in ("zip", "parquet"):
        path = tmp_path / f"a.{kind}"
        path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"a\.zip: no zip, or a truncated one .*; get it again"):
        list(members([f"{tmp_path}/a.zip"]))
    with pytest.raises(UserError, match=r"a\.parquet: no Parquet file, or a truncated one .*; get it again"):
        sources.ParquetSource(f"{tmp_path}/a.parquet")
    with pytest.raises(SourceError, match="damaged: no Parquet file"):
        read(f"{tmp_path}/a.parquet::0", (0, 0))
    tar = tmp_path / "a.tar"
    whole = tar.read_bytes()
    found = list(members([str(tar)]))
    assert not caplog.text
    # Within a member; the clips before it are whole, and it is an entry of failures.jsonl.
    tar.write_bytes(whole[: found[3].at[0] + 100])
    cut = list(members([str(tar)]))
    assert [member.at for member in cut] == [member.at for member in found[:4]]
    assert "a.tar: truncated: it ends within ./audio/3.wav" in caplog.text
    catalog = catalog_of(tmp_path, "tar")
    build(catalog, tmp_path / "out", OPTIONS, 1, engine="inline")
    (line,) = [json.loads(line) for line in (tmp_path / "out" / "failures.jsonl").read_text().splitlines()]
    assert line["path"] == "a.tar::audio/3.wav"
    assert line["reason"].startswith("truncated: its tar ends within it")
    caplog.clear()
    tar.write_bytes(whole[: found[3].at[0] - 512])  # between two members
    assert len(list(members([str(tar)]))) == 3
    assert "has no end of archive: perhaps cut after 3 members" in caplog.text
    caplog.clear()
    middle = found[3].at[0] - 512
    tar.write_bytes(whole[:middle] + b"garbage" * 100 + whole[middle + 700 :])
    assert len(list(members([str(tar)]))) == 3
    assert f"damaged: no header at byte {middle}" in caplog.text
    tar.write_bytes(b"no tar at all" * 100)
    with pytest.raises(UserError, match=r"a\.tar: no tar"):
        list(members([str(tar)]))


def test_pointers_and_what_is_not_there(tmp_path):
    for kind in KINDS:
        pointer = tmp_path / f"p.{kind}"
        pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 99\n")
    for kind in ("tar", "zip"):
        with pytest.raises(UserError, match="is a pointer of Git-LFS, not the file; run 'git lfs pull'"):
            list(members([f"{tmp_path}/p.{kind}"]))
    with pytest.raises(UserError, match="pointer of Git-LFS"):
        sources.ParquetSource(f"{tmp_path}/p.parquet")
    for kind in KINDS:
        pack(tmp_path, kind, WAVS)
        with pytest.raises(SourceError, match="vanished"):
            read(f"{tmp_path}/none.{kind}::0", (0, 0))
        with pytest.raises(SourceError, match=r"vanished: (its|a)"):
            read(f"{tmp_path}/a.{kind}::77")
    rows = pa.table({"audio": [{"bytes": None, "path": "x.wav"}]})
    pq.write_table(rows, tmp_path / "null.parquet")
    with pytest.raises(SourceError, match="empty: the row holds no bytes"):
        read(f"{tmp_path}/null.parquet::0")
    pq.write_table(pa.table({"audio": ["x.wav"]}), tmp_path / "none.parquet")
    with pytest.raises(SourceError, match="no column of audio"):
        read(f"{tmp_path}/none.parquet::0")


def test_members_that_are_no_audio_are_failures(tmp_path):
    wavs = [*WAVS[:5], b"no audio at all", *WAVS[6:]]
    for kind in ("tar", "zip", "parquet"):
        root, out = tmp_path / kind, tmp_path / f"{kind}-out"
        pack(root, kind, wavs)
        build(catalog_of(root, kind), out, OPTIONS, 1, engine="inline")
        (line,) = [json.loads(line) for line in (out / "failures.jsonl").read_text().splitlines()]
        assert line["reason"].startswith("undecodable: text, not audio: 'no audio")
        assert line["path"] == {"parquet": "a.parquet::5"}.get(kind, f"a.{kind}::audio/5.wav")
        assert str(Path("/proc")) not in line["reason"]


@pytest.mark.slow
def test_killed_builds_go_on_to_the_same_bytes(tmp_path, cache):
    for kind in KINDS:
        pack(tmp_path / "sources" / kind, kind, recordings(kills.MEMBERS))
    done = subprocess.run(
        [sys.executable, "-m", "tests.shard_tools.kills", tmp_path],
        cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert sorted(found) == sorted(KINDS)
    for kind, points in found.items():
        for point in points:
            assert point["died"] == -signal.SIGKILL, (kind, point)
            assert point["identical"], (kind, point)
            assert point["untouched"], (kind, point)
            assert not point["leftovers"], (kind, point)
        assert len({point["finished"] for point in points}) > 1, kind


def test_whatever_is_changed_in_a_container_is_one_line_or_a_failure(tmp_path, caplog):
    rng = random.Random(0)
    for kind in KINDS:
        pack(tmp_path, kind, WAVS[:4])
        whole = (tmp_path / f"a.{kind}").read_bytes()
        said: list[str] = []
        for number in range(60):
            content = bytearray(whole)
            # Half of the places where a container says what is in it: at its end, or in the tar's headers.
            places = [rng.choice((rng.randrange(len(content)), -1 - rng.randrange(700))) for _ in range(3)]
            for place in places:
                content[place] = rng.randrange(256)
            path = tmp_path / f"{number}.{kind}"
            path.write_bytes(content if number % 3 else content[: rng.randrange(len(content))])
            try:
                if kind in ("tar", "zip"):
                    found = [(member.name, member.at) for member in members([str(path)])]
                else:
                    with (parquet_source if kind == "parquet" else hdf5.opened)(str(path)) as file:
                        found = [(f"{path}::{row}", None) for row in range(2)]
                        sources.rate_of(file) if kind == "h5" else file.audio
            except UserError as error:
                said.append(str(error))
                continue
            for name, at in found:
                with suppress(SourceError):
                    read(name, at)
            path.unlink()
        assert said, kind
        assert "\n" not in "".join(said)
    caplog.clear()


def test_a_store_that_does_not_answer_is_no_fault_of_a_clip(tmp_path, monkeypatch, s3):
    """Neither where it is asked for the container, nor where it is asked for the bytes."""

    def away(*_: object, **__: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(storage, "FIRST_WAIT", 0.001)
    bucket = boto3.client("s3")
    bucket.create_bucket(Bucket="away")
    for kind in KINDS:
        pack(tmp_path, kind, WAVS)
        bucket.upload_file(f"{tmp_path}/a.{kind}", "away", f"a.{kind}")
        clip = catalog_of(tmp_path, kind).clips[0]
        source = clip.path.replace(str(tmp_path), "s3://away")
        for copy, now in stamped_copies([(source, clip.at)]):
            assert Path(copy).read_bytes() == WAVS[0]
            assert now[0] == (tmp_path / f"a.{kind}").stat().st_size
        with monkeypatch.context() as patch:
            patch.setattr(stamps, "transfer", away)
            ((copy, _),) = stamped_copies([(source, clip.at)])
            assert isinstance(copy, MachineError), kind
        with monkeypatch.context() as patch:  # the container answers, its bytes do not come
            sources._groups.clear()
            sources._hdf5.cache_clear()
            patch.setattr(storage, "transfer", away)
            ((copy, _),) = stamped_copies([(source, clip.at)])
            assert isinstance(copy, MachineError), kind


@pytest.mark.parametrize("kind", KINDS)
def test_a_container_in_a_store_that_changed_between_slices_is_told(tmp_path, s3, kind):
    """By a merge, and by the next run of its slice, which reads it anew."""
    bucket, out, url = boto3.client("s3"), tmp_path / "out", f"s3://changed-{kind}"
    bucket.create_bucket(Bucket=f"changed-{kind}")

    def put(wavs: list[bytes], names: str) -> None:
        pack(tmp_path, kind, wavs)
        for name in names:
            bucket.upload_file(f"{tmp_path}/{name}.{kind}", f"changed-{kind}", f"{name}.{kind}")

    put(WAVS, "ab")
    catalog = catalog_of(url, kind)
    build_slice(catalog, out, OPTIONS, 1, Slice(1, 2), engine="inline")
    put(WAVS[5::-1] + WAVS[6:], "a")
    build_slice(catalog, out, OPTIONS, 1, Slice(2, 2), engine="inline")
    with pytest.raises(UserError, match=rf"hold files that have changed .* such as {url}/a\.{kind}::"):
        merge(catalog, out, OPTIONS)
    build_slice(catalog, out, OPTIONS, 1, Slice(1, 2), engine="inline")
    merge(catalog, out, OPTIONS)
    build(catalog, tmp_path / "anew", OPTIONS, 1, engine="inline")
    assert digests(out) == digests(tmp_path / "anew")
