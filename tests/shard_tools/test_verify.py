"""Damage of every kind is found and named, and what can be repaired is."""

import errno
import io
import json
import random
import shutil
import sys
from functools import partial

import boto3
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile

from pipeline.data.manifest import INDEX_SCHEMA, load_index, load_manifest
from pipeline.errors import UserError
from shard_tools import catalogs, verify_shards
from shard_tools.build import build
from shard_tools.finish import render
from shard_tools.lock import owner
from shard_tools.repair import compare, repair
from shard_tools.store import Store
from shard_tools.verify_shards import examine, verify
from tests.helpers import digests, options, synth_catalog
from tests.ranks import run_script
from tests.stores import upload


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """52 clips of 0.2 s in 8 tars, one listed clip missing, its sources in `source`."""
    out = tmp_path_factory.mktemp("whole")
    catalog = synth_catalog(out / "source", 52, 0.2)
    from shard_tools.columns import Failure

    catalog.missing.append(Failure("lost", "", "missing: no such audio file", "train"))
    build(catalog, out, options(0.2), 1, engine="inline")
    return out


@pytest.fixture
def copy(whole, tmp_path):
    out = tmp_path / "copy"
    shutil.copytree(whole, out)
    return out


def flip(path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(bytes(content))


def problems_of(out) -> list[str]:
    try:
        return verify(out, workers=1)
    except UserError as error:  # a manifest that cannot be used
        return [str(error).removeprefix(f"{out}/")]


def edit_manifest(out, **changes) -> None:
    """A manifest whose digest fits its wrong content."""
    manifest = load_manifest(out).model_copy(update=changes)
    (out / "manifest.json").write_bytes(render(manifest.model_copy(update={"digest": manifest.computed_digest()})))


def rewrite_index(out, change) -> None:
    """An index with wrong rows, that the manifest nevertheless lists."""
    import hashlib

    rows = load_index(out).to_pylist()
    change(rows)
    pq.write_table(pa.Table.from_pylist(rows, schema=INDEX_SCHEMA), out / "index.parquet")
    content = (out / "index.parquet").read_bytes()
    index = load_manifest(out).index
    edit_manifest(out, index=index.model_copy(
        update={"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}))  # fmt: skip


def test_sound_shards_have_no_problems(whole):
    assert verify(whole, workers=1) == []


def test_one_flipped_bit_anywhere_is_found_and_named(whole, copy):
    """Random bits of every file; in the manifest also every bit of one of its long numbers."""
    rng = random.Random(0)
    names = ["train-000001.tar", "index.parquet", "failures.jsonl", "manifest.json"]
    for name in names:
        content = (whole / name).read_bytes()
        bits = [rng.randrange(8 * len(content)) for _ in range(12)] + [0, 8 * len(content) - 1]
        if name == "manifest.json":
            place = content.index(b'"fbank_mean"')
            bits += range(8 * place, 8 * (place + 40))
        if name.endswith(".tar"):
            member = load_index(whole).to_pylist()[10]
            bits += [8 * member[f"{part}_offset"] + 77 for part in ("waveform", "fbank", "json")]
        for bit in bits:
            flip(copy / name, bit)
            found = problems_of(copy)
            assert found, (name, bit)
            assert any(problem.startswith(name) for problem in found), (name, bit, found)
            shutil.copy(whole / name, copy / name)
    assert verify(copy, workers=1) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda rows: rows[3].update(key=rows[2]["key"]), "index.parquet: key train/{key} is there twice"),
        (lambda rows: rows[3].update(labels=[0, 1, 2]), "[0, 1, 2] in the index"),
        (lambda rows: rows[3].update(fbank_offset=rows[3]["fbank_offset"] + 512), "where the one before it ends"),
        (lambda rows: rows[3].update(waveform_offset=1 << 40), "waveform is at offset"),
        (lambda rows: rows[3].update(json_xxh3=1), "json: damaged: its hash is not the index's"),
        (lambda rows: rows.pop(3), "7 rows in the index, 8 clips in the manifest"),
        (lambda rows: [rows.pop(0) for _ in range(8)], "train-000000.tar: no rows in the index"),
    ],
)
def test_an_index_that_is_wrong_is_named(copy, change, said):
    key = load_index(copy)["key"][2].as_py()
    rewrite_index(copy, change)
    problems = verify(copy, workers=1)
    assert any(said.format(key=key) in problem for problem in problems), problems


def test_what_is_not_in_the_files_is_named(copy):
    (copy / "train-000000.tar").unlink()
    with (copy / "train-000001.tar").open("ab") as file:
        file.write(b"more")
    (copy / "train-000099.tar").touch()
    (copy / "failures.jsonl").unlink()
    manifest = load_manifest(copy)
    counts = {"class_clips": [], "class_listed": []}
    splits = {name: split.model_copy(update=counts) for name, split in manifest.splits.items()}
    edit_manifest(copy, labels=manifest.labels[:5], splits=splits)
    problems = "\n".join(verify(copy, workers=1))
    for said in ("train-000000.tar: missing", "train-000001.tar: ", "train-000099.tar: not in the manifest",
                 "failures.jsonl: missing", "the vocabulary has 5"):  # fmt: skip
        assert said in problems, problems


def test_an_fbank_that_is_not_the_waveforms_is_named(copy):
    """Written so by a broken builder: all hashes fit."""
    from shard_tools import write

    real = write.stored_fbank
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(write, "stored_fbank", lambda *words: real(*words) + np.float16(0.5))
        build(synth_catalog(copy / "source", 52, 0.2), copy, options(0.2), 1, overwrite=True, engine="inline")
    problems = verify(copy, workers=1)
    assert len(problems) == 7  # the first of each tar's eight
    assert all("fbank differs by 0.5" in problem for problem in problems)


@pytest.mark.slow
def test_repair_of_the_command_line(whole, copy):
    """Two damaged tars and a missing one, by two workers; then the index."""
    flip(copy / "train-000001.tar", 5000)
    (copy / "train-000002.tar").write_bytes(b"")
    (copy / "eval-000000.tar").unlink()
    command = partial(run_script, "shard_tools/verify_shards.py", copy, "--workers")
    done = command(1)
    assert done.returncode == 1, done.stderr
    assert all(name in done.stdout for name in ("train-000001.tar", "train-000002.tar", "eval-000000.tar"))
    done = command(2, "--repair")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("built again, as it was") == 3
    assert digests(copy) == digests(whole)


def test_repair_of_the_index_and_refusals(whole, copy, tmp_path):
    flip(copy / "index.parquet", 12345)
    found = examine(copy, 1)
    assert found.keys() == {"index.parquet"}
    assert list(repair(copy, found, "", 1)) == ["index.parquet: made from the tars, as it was"]
    assert digests(copy) == digests(whole)

    flip(copy / "train-000001.tar", 5000)
    damaged = (copy / "train-000001.tar").read_bytes()
    (said,) = repair(copy, examine(copy, 1), str(tmp_path / "nowhere"), 1)
    assert "left as it is" in said
    assert "nowhere" in said
    (copy / "index.parquet").unlink()
    (said,) = repair(copy, examine(copy, 1), str(copy / "source"), 1)
    assert "one is made from the other" in said
    assert (copy / "train-000001.tar").read_bytes() == damaged


def test_an_index_of_another_writer_renews_the_manifest(whole, copy, monkeypatch):
    real = pq.ParquetWriter

    def other(*words, **options):
        return real(*words, **(options | {"compression": "snappy"}))

    (copy / "index.parquet").unlink()
    monkeypatch.setattr(pq, "ParquetWriter", other)
    (said,) = repair(copy, examine(copy, 1), "", 1)
    assert "manifest.json renewed" in said
    assert verify(copy, workers=1) == []
    assert load_index(copy).equals(load_index(whole))


class Unreadable(io.FileIO):
    """A file of which the disk cannot read a part."""

    def read(self, size=-1):
        if self.tell() > 4096:
            raise OSError(errno.EIO, "Input/output error")
        return super().read(min(size, 8192))


def test_a_tar_that_the_disk_cannot_read_is_named_and_made_again(whole, copy, monkeypatch):
    def opened(path, mode):
        return (Unreadable if str(path) == str(copy / "train-000001.tar") else io.FileIO)(path, mode)

    monkeypatch.setattr(verify_shards, "open", opened, raising=False)
    found = examine(copy, 1)
    assert found == {"train-000001.tar": ["train-000001.tar: unreadable: Input/output error"]}
    inode = (copy / "train-000001.tar").stat().st_ino
    assert list(repair(copy, found, str(copy / "source"), 1)) == ["train-000001.tar: built again, as it was"]
    assert (copy / "train-000001.tar").stat().st_ino != inode
    assert digests(copy) == digests(whole)


def repaired(copy, monkeypatch) -> int:
    """Exit status of the command line."""
    monkeypatch.setattr(sys, "argv", ["verify_shards.py", str(copy), "--repair", "--workers", "1"])
    return verify_shards.main()


def test_nothing_is_repaired_while_a_build_writes(copy, monkeypatch):
    """Its manifest would be replaced by the one from before."""
    flip(copy / "failures.jsonl", 100)
    before = digests(copy)
    for shared in (False, True):
        with owner(copy, shared), pytest.raises(UserError, match="another process is building here"):
            repaired(copy, monkeypatch)
    assert digests(copy) == before
    assert repaired(copy, monkeypatch) == 0
    assert not (copy / ".build").exists()


def test_a_build_that_was_killed_at_its_end_is_completed_before_anything_is_repaired(copy, monkeypatch):
    table = copy / "source" / "more.csv"
    lines = (copy / "source" / "table.csv").read_text().splitlines()
    table.write_text("\n".join(line.replace(",train", ",more").replace(",eval", ",more") for line in lines))
    move = Store.move

    def killed(store, name, target):
        if target == "manifest.json":
            raise KeyboardInterrupt
        move(store, name, target)

    more = catalogs.table(copy / "source", table, None, None)
    with monkeypatch.context() as patch:
        patch.setattr(Store, "move", killed)
        with pytest.raises(KeyboardInterrupt):
            build(more, copy, options(0.2), 1, engine="inline")
    flip(copy / "train-000001.tar", 5000)
    assert repaired(copy, monkeypatch) == 0
    assert list(load_manifest(copy).splits) == ["train", "eval", "more"]


def test_shards_in_s3_are_verified_and_repaired(whole, s3):
    url = upload(whole, "verified")
    assert verify(url, workers=1) == []
    client = boto3.client("s3")
    content = bytearray(client.get_object(Bucket="verified", Key="train-000000.tar")["Body"].read())
    content[7777] ^= 16
    client.put_object(Bucket="verified", Key="train-000000.tar", Body=bytes(content))
    client.delete_object(Bucket="verified", Key="train-000003.tar")
    found = examine(url, 1)
    assert found.keys() == {"train-000000.tar", "train-000003.tar"}
    assert len(list(repair(url, found, str(whole / "source"), 1))) == 2
    assert verify(url, workers=1) == []
    manifest = json.loads(client.get_object(Bucket="verified", Key="manifest.json")["Body"].read())
    assert manifest["digest"] == load_manifest(whole).digest


def test_repair_gives_what_the_build_gave_of_compressed_and_cut_files(tmp_path):
    """Of segments that the file's end cuts, too, and of files taken for the segment itself."""
    root = tmp_path / "source"
    root.mkdir()
    rows = []
    for number in range(4):
        tone = np.sin(np.arange(8000) * (0.1 + 0.02 * number)).astype(np.float32)
        soundfile.write(root / f"{number}.ogg", 0.5 * tone, 16000)
        rows += [f"{number}.ogg,a,0.1,0.3", f"{number}.ogg,b,0.4,0.6"]
    (root / "table.csv").write_text("\n".join(["path,labels,start,end", *rows]))
    out = tmp_path / "out"
    build(catalogs.table(root, root / "table.csv", None, None), out, options(0.2, 4), 1, engine="inline")
    whole = digests(out)
    assert list(compare(out, str(root), 1)) == []
    flip(out / "train-000000.tar", 5000)
    (out / "train-000001.tar").unlink()
    said = list(repair(out, examine(out, 1), str(root), 1))
    assert said == [f"train-00000{number}.tar: built again, as it was" for number in (0, 1)]
    flip(out / "index.parquet", 5000)
    assert list(repair(out, examine(out, 1), str(root), 1)) == ["index.parquet: made from the tars, as it was"]
    assert digests(out) == whole


@pytest.mark.slow
def test_sources_that_have_changed_since_are_named(copy):
    """Each on its own line, by two workers; the shards themselves are sound."""
    rows = load_index(copy).to_pylist()
    changed, gone = rows[3], rows[20]
    source = copy / "source" / changed["source"]
    samples, rate = soundfile.read(source)
    soundfile.write(source, samples[::-1], rate)
    (copy / "source" / gone["source"]).unlink()
    done = run_script("shard_tools/verify_shards.py", copy, "--sources", "--workers", 2)
    assert done.returncode == 1, done.stderr
    first, second, last = done.stdout.splitlines()
    assert first == f"{changed['shard']}: {changed['key']}: its source {changed['source']} gives another waveform now"
    assert second.startswith(f"{gone['shard']}: {gone['key']}: its source gives nothing: vanished")
    assert last.endswith("52 clips in 7 shards: 2 problems")
