"""What a build must not lose, change or take for whole: files of others, finished splits, damaged parts."""

import contextlib
import io
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import tracemalloc
from pathlib import Path

import numpy as np
import psutil
import pytest
import soundfile

from pipeline.data.manifest import load_index, load_manifest
from pipeline.errors import UserError
from shard_tools import build as build_module
from shard_tools import catalogs, distribute, store
from shard_tools.build import build, build_slice, merge
from shard_tools.columns import Failure
from shard_tools.finish import damage, reasons, render
from shard_tools.lock import owner
from shard_tools.plan import BuildOptions, Slice, SplitPlan
from shard_tools.repair import repair
from shard_tools.store import Store
from shard_tools.verify_shards import examine, verify
from shard_tools.write import AudioOptions
from tests.conftest import ROOT
from tests.helpers import digests, options
from tests.shard_tools.conftest import PER_SHARD, SECONDS, of, run


def times(out) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}


def interrupted(source, out, monkeypatch, split="train") -> None:
    """A build that stops before its index."""

    def fails(*_):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(build_module, "finish", fails)
        with pytest.raises(OSError, match="no space"):
            run(source, out, split)


def broken(source: Path, copy: Path, number: int = 3) -> Path:
    """A copy of the audio with one file that is none; returns that file."""
    shutil.copytree(source, copy)
    file = sorted(copy.rglob("*.flac"))[number]
    file.write_text("no audio")
    return file


def test_files_that_no_build_made_are_not_touched(audio, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    mine = ["thesis.tmp", "thesis.0123abcd.tmp", "other-000000.tar", "train-000000.tar.tmp", "eval-000000.tar",
            "train-000000.tar.craft-0123456.tmp"]  # fmt: skip
    for name in mine:
        (out / name).write_text("mine")
    (out / "train-000000.tar.craft-01234567.tmp").write_text("of a killed build")
    (out / "index.parquet.89abcdef.tmp").write_text("of a killed build of an earlier version")
    run(audio, out, "train")
    run(audio, out, "train", overwrite=True)
    assert not list(out.glob("train-000000.tar.craft-01234567.tmp"))
    assert not (out / "index.parquet.89abcdef.tmp").exists()
    assert all((out / name).read_text() == "mine" for name in mine)
    before = digests(out)
    with pytest.raises(UserError, match=r"holds eval-000000\.tar, of which no manifest and no unfinished build knows"):
        run(audio, out, "eval")
    assert digests(out) == before
    assert not (out / ".build").exists()


def test_a_foreign_index_is_refused(audio, tmp_path):
    (tmp_path / "index.parquet").write_text("mine")
    with pytest.raises(UserError, match=r"holds index\.parquet, of which no manifest"):
        run(audio, tmp_path, "train")
    assert [path.name for path in tmp_path.iterdir()] == ["index.parquet"]


def test_overwrite_replaces_its_own_splits_only(audio, whole, tmp_path):
    out, alone = tmp_path / "out", tmp_path / "alone"
    shutil.copytree(whole, out)
    run(audio, alone, "train")
    before = times(out)
    stays = {name for name in before if name.startswith("train")}
    other = BuildOptions(options(SECONDS).audio, PER_SHARD, seed=5)
    build(of(audio, "eval"), out, other, 1, engine="inline", overwrite=True)
    assert {name: time for name, time in times(out).items() if name in stays} == {name: before[name] for name in stays}
    assert verify(out, 1) == []
    manifest = load_manifest(out)
    assert manifest.options["eval"]["seed"] == 5
    assert manifest.splits["train"] == load_manifest(alone).splits["train"]
    # What is left is as if the other had never been there.
    catalog, how = of(audio, "eval"), options(SECONDS, PER_SHARD)
    build_module._erase(catalog, Store(out), how, [SplitPlan(catalog, "eval", out, how)])
    shutil.rmtree(out / ".build", ignore_errors=True)
    assert digests(out) == digests(alone)


def test_overwrite_refuses_what_would_lose_other_splits(audio, whole, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    before = digests(out)
    with pytest.raises(UserError, match=r"holds split 'train', which this command does not build, with --seconds"):
        build(of(audio, "eval"), out, options(0.2), 1, engine="inline", overwrite=True)
    (out / "manifest.json").write_text("{")
    with pytest.raises(UserError, match=r"manifest\.json: not JSON.*; --overwrite removes only what a manifest lists"):
        run(audio, out, "eval", overwrite=True)
    (out / "manifest.json").write_bytes((whole / "manifest.json").read_bytes())
    assert digests(out) == before
    (out / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"holds eval-000000\.tar and \d more files, of which no manifest"):
        run(audio, out, "eval", overwrite=True)
    (out / "manifest.json").write_bytes((whole / "manifest.json").read_bytes())
    assert digests(out) == before


@pytest.mark.parametrize("name", ["train-000001.tar", "eval-000000.tar", "index.parquet", "failures.jsonl"])
def test_a_finished_build_says_that_it_is_damaged(audio, whole, tmp_path, name):
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    content = (out / name).read_bytes()
    damages = {"missing": None, "bytes, the manifest says": content + b"x"}
    if name == "index.parquet":
        damages["damaged: its sha256"] = bytes([content[0] ^ 1]) + content[1:]
    for said, damaged in damages.items():
        (out / name).unlink()
        if damaged is not None:
            (out / name).write_bytes(damaged)
        for split in ("train", "eval"):
            with pytest.raises(UserError, match=rf"1 files of finished splits are damaged, such as {name}: .*{said}"):
                run(audio, out, split)
        assert not (out / ".build").exists()
        (out / name).write_bytes(content)
    assert run(audio, out, "train").manifest == load_manifest(whole)


def test_counting_many_failures_takes_the_memory_of_their_file(tmp_path):
    """Of AudioSet's two million segments somebody may have a hundredth; it took five times the file."""
    line = Failure("x" * 11, "", "missing: no such file below --audio-root", "train", "x" * 11, 7, 30.0, 40.0).line()
    content = [json.dumps(line | {"row": row}) for row in range(20_000)]
    content[5] = json.dumps(line | {"used": "x.wav"})
    content[6] = json.dumps(line | {"split": "eval"})
    (tmp_path / "failures.jsonl").write_text("\n".join(content) + "\n")
    tracemalloc.start()
    counts, replaced = reasons(Store(tmp_path), ["train"])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (counts, replaced) == ({"missing": 19_998}, 1)
    assert peak < 1.5 * (tmp_path / "failures.jsonl").stat().st_size


def test_lost_failures_are_kept_as_far_as_they_can_be_read(audio, tmp_path):
    out = tmp_path / "out"
    file = broken(audio, tmp_path / "audio")
    run(tmp_path / "audio", out, "train")
    wanted = digests(out)
    line = (out / "failures.jsonl").read_bytes()
    (out / "failures.jsonl").write_bytes(line + b'{"half')
    (said,) = repair(out, examine(out, 1), "", 1)
    assert said.startswith("failures.jsonl: the 1 lines that can be read are kept")
    assert digests(out) == wanted
    (out / "failures.jsonl").unlink()
    list(repair(out, examine(out, 1), "", 1))
    assert verify(out, 1) == []
    assert file.exists()


@pytest.mark.parametrize("damage_", [lambda c: b"", lambda c: c[: len(c) // 2], lambda c: c[:50] + b"~" + c[51:]])
@pytest.mark.parametrize("name", [".build/train/plan", ".build/train/000002.record", "train-000002.tar"])
def test_a_damaged_part_of_an_unfinished_build_is_made_again(audio, whole, tmp_path, monkeypatch, name, damage_):
    out = tmp_path / "out"
    interrupted(audio, out, monkeypatch)
    (out / name).write_bytes(damage_((out / name).read_bytes()))
    before = times(out)
    run(audio, out, "train")
    assert {tar: digest for tar, digest in digests(out).items() if tar[-4:] == ".tar"} == {
        tar: digest for tar, digest in digests(whole).items() if tar.startswith("train-")
    }
    again = {tar for tar, time in times(out).items() if before[tar] != time}
    assert again == (set() if name.endswith("plan") else {"train-000002.tar"})


def test_a_split_that_was_begun_stays_begun_when_another_is_finished(audio, whole, tmp_path, monkeypatch):
    out = tmp_path / "out"
    interrupted(audio, out, monkeypatch, "eval")
    before = times(out)
    run(audio, out, "train")
    run(audio, out, "eval")
    assert {name: time for name, time in times(out).items() if name in before} == before
    assert digests(out) == digests(whole)


def test_what_is_recorded_of_failures_does_not_tell_where_the_data_lies(audio, tmp_path):
    """The digest of the manifest covers it, and seeds the order of training."""
    for place in ("here", "another/mount point"):
        folder = tmp_path / place
        folder.mkdir(parents=True)
        file = broken(audio, folder / "audio")
        (folder / "audio" / "audio" / "gone.flac").unlink(missing_ok=True)
        run(folder / "audio", folder / "out", "train")
    first, second = (digests(tmp_path / place / "out") for place in ("here", "another/mount point"))
    assert first == second
    (failure,) = map(json.loads, (tmp_path / "here" / "out" / "failures.jsonl").read_text().splitlines())
    assert failure["path"] == str(file.relative_to(folder / "audio"))
    assert failure["reason"].startswith("undecodable: text")
    clip = next(clip for clip in of(folder / "audio", "train").clips if clip.path == str(file))
    assert (failure["key"], failure["split"], failure["start"], failure["end"]) == (
        clip.key, "train", clip.start, clip.end,
    )  # fmt: skip
    assert str(tmp_path) not in json.dumps(failure)


def test_a_disk_that_is_away_is_no_failure_of_its_files(audio, whole, tmp_path, monkeypatch):
    """Unmounted after the catalog was read: nothing is recorded, and the same command goes on."""
    monkeypatch.setattr(distribute, "WAITS", (0.0,))
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(audio, source)
    catalog = of(source, "train")
    source.rename(tmp_path / "unmounted")
    with pytest.raises(UserError, match="and so are the others: is their disk or store there"):
        build(catalog, out, options(SECONDS, PER_SHARD), 1, engine="inline")
    assert not list(out.glob("*.tar"))
    (tmp_path / "unmounted").rename(source)
    build(catalog, out, options(SECONDS, PER_SHARD), 1, engine="inline")
    run(source, out, "eval")
    assert digests(out) == digests(whole)


def test_decoders_that_are_killed_are_no_failures_of_clips(audio, whole, tmp_path, monkeypatch):
    """As by the kernel, where memory is short: the clip's file is sound."""
    monkeypatch.setattr(distribute, "WAITS", (0.0,) * 5)
    out, killed = tmp_path / "out", []
    here, ended = psutil.Process(), threading.Event()

    def kill() -> None:
        while not ended.wait(0.01) and len(killed) < 2:
            for process in here.children():
                with contextlib.suppress(psutil.Error):
                    if "guard" in " ".join(process.cmdline()) and process.pid not in killed:
                        process.kill()
                        killed.append(process.pid)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        for split in ("train", "eval"):
            run(audio, out, split)
    finally:
        ended.set()
        killer.join()
    assert killed
    assert digests(out) == digests(whole)


def test_a_split_of_which_nothing_is_stored_is_an_error(audio, tmp_path):
    out = tmp_path / "out"
    run(audio, out, "train")
    before = digests(out)
    source = tmp_path / "source"
    shutil.copytree(audio, source)
    contents = {clip.path: Path(clip.path).read_bytes() for clip in of(source, "eval").clips}
    for path in contents:
        Path(path).write_text("no audio")
    said = rf"split 'eval': none of its {len(contents)} listed clips could be stored \({len(contents)} undecodable\)"
    for words in ({}, {"retry": True}):
        with pytest.raises(UserError, match=said):
            run(source, out, "eval", **words)
        assert digests(out) == before
    for path, content in contents.items():
        Path(path).write_bytes(content)
    run(source, out, "eval")
    assert load_manifest(out).splits["eval"].clips == len(contents)


def test_failures_are_tried_again_and_nothing_else(audio, whole, tmp_path, monkeypatch):
    source, out = tmp_path / "source", tmp_path / "out"
    file = broken(audio, source)
    for split in ("train", "eval"):
        run(source, out, split)
    with_failure, before = digests(out), times(out)
    assert run(source, out, "train", retry=True).failures == {"undecodable": 1}  # still none
    assert digests(out) == with_failure
    file.write_bytes((audio / file.relative_to(source)).read_bytes())
    run(source, out, "train")
    assert digests(out) == with_failure
    interrupted_retry(source, out, monkeypatch)
    assert digests(out) == with_failure  # the finished split stays what it was until all is there
    run(source, out, "train", retry=True)
    assert digests(out) == digests(whole)
    assert len([name for name, time in times(out).items() if before[name] != time]) == 1
    assert not (out / ".build").exists()
    assert not run(source, out, "train", retry=True).failures


def interrupted_retry(source, out, monkeypatch) -> None:
    def fails(*_):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(build_module, "finish", fails)
        with pytest.raises(OSError, match="no space"):
            run(source, out, "train", retry=True)


def test_failures_of_an_unfinished_build_are_tried_again(audio, whole, tmp_path, monkeypatch):
    source, out = tmp_path / "source", tmp_path / "out"
    file = broken(audio, source)
    interrupted(source, out, monkeypatch)
    status = file.stat()
    content = (audio / file.relative_to(source)).read_bytes()
    file.write_bytes(content)
    real = build_module._changed
    with monkeypatch.context() as patch:  # as where a store gave an error for a while: its stamp says nothing
        patch.setattr(build_module, "_changed", lambda *words: None)
        run(source, out, "train", retry=True)
    assert real is build_module._changed
    run(source, out, "eval")
    assert digests(out) == digests(whole)
    assert status.st_size != len(content)


def test_sources_that_change_while_they_are_read_are_named(audio, tmp_path, monkeypatch, caplog):
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(audio, source)
    file = next(Path(clip.path) for clip in of(source, "train").clips)
    real = build_module.run

    def during(shards, *words):
        yield from real(shards, *words)
        os.utime(file, ns=(1, 1))

    monkeypatch.setattr(build_module, "run", during)
    with caplog.at_level(logging.WARNING):
        run(source, out, "train")
    assert f"files of 1 shards changed while they were read, such as {file} (as long, but written anew)" in caplog.text


def test_a_slice_of_other_options_is_refused(audio, tmp_path):
    out = tmp_path / "out"
    build_slice(of(audio, "train"), out, options(SECONDS, PER_SHARD), 1, Slice(1, 2), "inline")
    before = times(out)
    other = BuildOptions(options(SECONDS).audio, PER_SHARD, seed=1)
    with pytest.raises(UserError, match="was begun with seed = 0, not 1"):
        build_slice(of(audio, "train"), out, other, 1, Slice(2, 2), "inline")
    assert times(out) == before


def test_of_two_that_create_a_file_at_once_one_does(tmp_path):
    ready = threading.Barrier(8)

    def create(number: int) -> None:
        ready.wait()
        Store(tmp_path).create("plan", str(number).encode() * 1000)

    threads = [threading.Thread(target=create, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    content = (tmp_path / "plan").read_bytes()
    assert len(set(content)) == 1
    Store(tmp_path).create("plan", b"later")
    assert (tmp_path / "plan").read_bytes() == content
    assert [path.name for path in tmp_path.iterdir()] == ["plan"]


def test_records_of_another_build_are_not_taken(audio, whole, tmp_path):
    """In an object store two slices of other options may begin in the same moment."""
    out = tmp_path / "out"
    other = BuildOptions(options(SECONDS).audio, PER_SHARD, seed=1)
    build_slice(of(audio, "train"), out, other, 1, Slice(1, 2), "inline")
    (out / ".build" / "train" / "plan").unlink()
    Store(out).create(".build/train/plan", b"")  # damaged: taken for ours
    build_slice(of(audio, "train"), out, options(SECONDS, PER_SHARD), 1, Slice(2, 2), "inline")
    with pytest.raises(UserError, match=r"of \d shards are not written yet, such as train-000000\.tar"):
        merge(of(audio, "train"), out, options(SECONDS, PER_SHARD))
    run(audio, out, "train")
    run(audio, out, "eval")
    assert digests(out) == digests(whole)


HOLDER = """
import pathlib, sys
from shard_tools.lock import owner
with owner(pathlib.Path(sys.argv[1]), shared=sys.argv[2] == "slice"):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("held", ["slice", "build"])
def test_builds_and_slices_refuse_each_other_at_once(audio, tmp_path, held):
    """Also after another slice came and went, which must not take the lock away with it."""
    out = tmp_path / "out"
    line = [sys.executable, "-c", HOLDER, str(out), held]
    catalog, how = of(audio, "train"), options(SECONDS, PER_SHARD)
    with subprocess.Popen(line, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        if held == "slice":
            with owner(out, shared=True):
                pass
        for start in (
            lambda: build(catalog, out, how, 1, engine="inline"),
            lambda: merge(catalog, out, how),
            lambda: build(catalog, out, how, 1, engine="inline", overwrite=True),
            *([lambda: build_slice(catalog, out, how, 1, Slice(1, 2), "inline")] if held == "build" else []),
        ):
            with pytest.raises(UserError, match="another process is building here"):
                start()
        assert [path.name for path in out.rglob("*")] == [".build", ".lock"]
        other.stdin.close()
    build(catalog, out, how, 1, engine="inline")
    assert not (out / ".build").exists()


@pytest.mark.parametrize("split", ["lock", "slices.lock", "plan"])
def test_splits_may_be_called_as_files_of_a_build(audio, tmp_path, split):
    catalog = catalogs.folder(audio, split)
    catalog.clips.truncate(4)
    build_slice(catalog, tmp_path / "out", options(SECONDS, 2), 1, Slice(1, 1), "inline")
    merge(catalog, tmp_path / "out", options(SECONDS, 2))
    assert verify(tmp_path / "out", 1) == []


def test_links_to_elsewhere_are_not_followed(audio, tmp_path, monkeypatch):
    elsewhere, out = tmp_path / "elsewhere", tmp_path / "out"
    (elsewhere / "train").mkdir(parents=True)
    (elsewhere / "train" / "thesis.txt").write_text("mine")
    out.mkdir()
    (out / ".build").symlink_to(elsewhere)
    with pytest.raises(UserError, match=r"\.build: is no directory of a build"):
        run(audio, out, "train")
    (out / ".build").unlink()
    (out / ".build").mkdir()
    (out / ".build" / "train").symlink_to(elsewhere / "train")
    with pytest.raises(UserError, match=r"\.build/train: is a link"):
        run(audio, out, "train")
    Store(out).remove_tree(".build/train")
    assert (elsewhere / "train" / "thesis.txt").read_text() == "mine"
    assert not (out / ".build" / "train").is_symlink()


def test_nothing_is_written_where_the_catalog_or_the_place_is_refused(audio, tmp_path):
    out = tmp_path / "new" / "out"
    twice = of(audio, "train")
    twice.clips.append(twice.clips[0])
    with pytest.raises(UserError, match="get the same key"):
        build(twice, out, options(SECONDS), 1, engine="inline", overwrite=True)
    (tmp_path / "root" / os.fsdecode(b"caf\xe9")).mkdir(parents=True)
    shutil.copy(twice.clips[0].path, tmp_path / "root" / os.fsdecode(b"caf\xe9") / "a.flac")
    with pytest.raises(UserError, match="the name is not UTF-8"):
        build(catalogs.folder(tmp_path / "root", "train"), out, options(SECONDS), 1, engine="inline")
    with pytest.raises(UserError, match="becomes a file name"):
        build(catalogs.folder(audio, "../escaped"), out, options(SECONDS), 1, engine="inline")
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match=r"--out .*: .* directory"):
            run(audio, place, "train")


def test_a_read_only_place_is_refused_at_once(audio, tmp_path):
    """By the command line, as a user without the rights of root."""
    place = tmp_path / "read only"
    place.mkdir()
    place.chmod(0o555)
    line = [sys.executable, "shard_tools/build_shards.py", "--dataset", "csv", "--table", str(audio / "table.csv"),
            "--seconds", "0.1", "--out", str(place / "shards")]  # fmt: skip
    drop = ["setpriv", "--bounding-set=-dac_override,-dac_read_search,-fowner"] if os.getuid() == 0 else []
    done = subprocess.run([*drop, *line], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"error: --out {place / 'shards'}: Permission denied")


def test_scratch_has_no_name_and_goes_with_its_process(tmp_path):
    code = (
        "import sys\n"
        "from shard_tools.store import Store\n"
        "with Store('s3://bucket').temporary('a.tar') as path:\n"
        "    path.write_bytes(b'content')\n"
        "    print(path, flush=True)\n"
        "    sys.stdin.read()\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          text=True, env=os.environ | {"TMPDIR": str(tmp_path)}) as killed:  # fmt: skip
        path = Path(killed.stdout.readline().strip())
        assert path.read_bytes() == b"content"  # as a decoder process opens it
        assert not list(tmp_path.iterdir())
        killed.kill()
    assert not list(tmp_path.iterdir())
    assert not path.exists()


def test_a_place_for_scratch_that_is_none_is_trouble_of_the_machine(tmp_path, monkeypatch):
    from shard_tools.segment import MachineError

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    (copy,) = store.local_copies(["s3://bucket/a.wav"])
    assert isinstance(copy, MachineError)
    assert "set TMPDIR to a directory of yours with room" in str(copy)


def test_names_in_a_strangers_manifest_lead_nowhere(whole, tmp_path):
    out = tmp_path / "in" / "out"
    shutil.copytree(whole, out)
    manifest = load_manifest(out)
    for name in ("../up-000000.tar", "/tmp/up-000000.tar", "train-1.tar", "train-000000.tar.tar"):
        shards = [shard.model_copy(update={"name": name}) if number == 0 else shard
                  for number, shard in enumerate(manifest.shards)]  # fmt: skip
        wrong = manifest.model_copy(update={"shards": shards})
        (out / "manifest.json").write_bytes(render(wrong.model_copy(update={"digest": wrong.computed_digest()})))
        with contextlib.suppress(UserError):  # one line; a name that stays inside may be a problem of many
            assert examine(out, 1)
            assert "built again" not in "".join(repair(out, examine(out, 1), str(tmp_path), 1))
            assert "/" not in name
    assert [path.name for path in out.parent.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("listed", "source", "root"), [("../a.wav", "../a.wav", "home/root"), ("DISK/a.wav", "a.wav", "disk")]
)
def test_repair_finds_sources_beside_a_root_that_is_a_link(tmp_path, listed, source, root):
    """Where the table's path leads to; those that it names by absolute paths in the folder that is given."""
    (tmp_path / "disk" / "root").mkdir(parents=True)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "root").symlink_to(tmp_path / "disk" / "root")
    soundfile.write(tmp_path / "disk" / "a.wav", np.full(1600, 0.1), 16000)
    table = tmp_path / "home" / "root" / "table.csv"
    table.write_text(f"path,labels\n{listed.replace('DISK', str(tmp_path / 'disk'))},x\n")
    catalog = catalogs.table(tmp_path / "home" / "root", table, None, "train")
    out = tmp_path / "out"
    build(catalog, out, options(SECONDS), 1, engine="inline")
    assert load_index(out)["source"].to_pylist() == [source]
    (out / "train-000000.tar").unlink()
    (said,) = repair(out, examine(out, 1), str(tmp_path / root), 1)
    assert said == "train-000000.tar: built again, as it was"
    assert not damage(out, load_manifest(out))


def test_where_a_clip_s_first_file_cannot_be_decoded_the_next_is_taken(tmp_path, caplog):
    """Said in failures.jsonl; cut as that file needs it; the same in any build, and mended from the same file."""
    audio, out, again = tmp_path / "audio", tmp_path / "out", tmp_path / "again"
    audio.mkdir()
    ids = ["aaaaaaaaaaa", "bbbbbbbbbbb", "ccccccccccc", "ddddddddddd"]
    for number, ytid in enumerate(ids[:3], 1):
        steps = np.repeat(np.linspace(-0.4, 0.4, 5), 16000) * (1 + number / 10)
        soundfile.write(audio / f"{ytid}.wav", steps, 16000)  # whole videos
    (audio / "aaaaaaaaaaa_1.flac").write_bytes(b"fLaC" + bytes(range(256)) * 8)
    (audio / "bbbbbbbbbbb_1.mp3").write_text("<html>not found</html>")
    (audio / "bbbbbbbbbbb.wav").write_bytes(b"RIFF" + bytes(500))
    soundfile.write(audio / "ddddddddddd.wav", np.full(80000, 0.1), 16000)
    (tmp_path / "labels.csv").write_text("index,mid,display_name\n0,/m/1,dog\n")
    (tmp_path / "t.csv").write_text("".join(f'{ytid}, 1.0, 3.0, "/m/1"\n' for ytid in ids))

    def catalog():
        return catalogs.audioset(audio, tmp_path / "t.csv", tmp_path / "labels.csv", None, "train")

    words = BuildOptions(AudioOptions(seconds=2.0), 2), 1
    summary = build(catalog(), out, *words, engine="inline")
    assert (summary.replaced, summary.failures.total()) == (1, 1)
    lines = {line["key"]: line for line in map(json.loads, (out / "failures.jsonl").read_text().splitlines())}
    first, none = lines.pop("aaaaaaaaaaa_1000"), lines.pop("bbbbbbbbbbb_1000")
    assert not lines
    assert (first["path"], first["used"]) == ("aaaaaaaaaaa_1.flac", "aaaaaaaaaaa.wav")
    assert first["reason"].partition(":")[0] in ("undecodable", "damaged")
    assert none["path"] == "bbbbbbbbbbb_1.mp3"
    assert none["reason"].startswith("undecodable: text")
    assert "; bbbbbbbbbbb.wav: " in none["reason"]
    assert "used" not in none
    rows = {row["key"]: row for row in load_index(out).to_pylist()}
    assert rows.keys() == {f"{ytid}_1000" for ytid in ids if ytid[0] != "b"}
    row = rows["aaaaaaaaaaa_1000"]
    assert (row["source"], row["start"], row["end"]) == ("aaaaaaaaaaa.wav", 1.0, 3.0)
    with (out / row["shard"]).open("rb") as tar:
        tar.seek(row["waveform_offset"])
        stored = np.load(io.BytesIO(tar.read(row["waveform_size"]))) / 32768
    assert stored[[100, -100]] == pytest.approx([-0.11, 0.11], abs=1e-3)  # seconds 1 to 3, without their mean
    assert not verify(out, 1)

    before = digests(out)
    (out / row["shard"]).unlink()
    assert "as it was" in "".join(repair(out, examine(out, 1), str(audio), 1))
    assert digests(out) == before
    (audio / "bbbbbbbbbbb_1.mp3").unlink()
    (audio / "bbbbbbbbbbb.wav").unlink()
    soundfile.write(audio / "bbbbbbbbbbb_1.mp3", np.full(32000, 0.1), 16000, format="WAV")
    build(catalog(), again, *words, engine="inline")
    assert len((again / "failures.jsonl").read_text().splitlines()) == 1

    # What was taken in place of the first counts as a source: a build that goes on sees that it changed.
    part = tmp_path / "part"
    build_slice(catalog(), part, *words, Slice(1, 1), "inline")
    soundfile.write(audio / "aaaaaaaaaaa.wav", np.full(90000, 0.2), 16000)
    caplog.clear()
    build_slice(catalog(), part, *words, Slice(1, 1), "inline")
    assert f"1 shards hold files that have changed since, such as {audio}/aaaaaaaaaaa.wav" in caplog.text


def test_a_retry_keeps_what_is_said_of_first_files(tmp_path):
    audio, out, fresh = tmp_path / "audio", tmp_path / "out", tmp_path / "fresh"
    (audio / "audio").mkdir(parents=True)
    (audio / "meta").mkdir()
    names = [f"1-{number}-A-{number}" for number in range(6)]
    rows = "".join(f"{name}.wav,1,{number},c{number}\n" for number, name in enumerate(names))
    (audio / "meta" / "esc50.csv").write_text("filename,fold,target,category\n" + rows)
    for name in names:
        soundfile.write(audio / "audio" / f"{name}.wav", np.full(1600, 0.1), 16000)
    (audio / "audio" / f"{names[0]}.flac").write_text("no audio")
    good = (audio / "audio" / f"{names[5]}.wav").read_bytes()
    (audio / "audio" / f"{names[5]}.wav").write_text("no audio")

    def build_esc50(place, **words):
        return build(catalogs.esc50(audio, "train"), place, options(0.1, 1), 1, engine="inline", **words)

    assert (build_esc50(out).replaced, len(load_index(out))) == (1, 5)
    (audio / "audio" / f"{names[5]}.wav").write_bytes(good)
    assert build_esc50(out, retry=True).replaced == 1
    build_esc50(fresh)
    assert digests(out) == digests(fresh)
    assert len(load_index(out)) == 6


def test_a_bit_that_flips_in_a_finished_tar_is_found_by_verify_and_the_build_says_what_it_compared(
    audio, whole, tmp_path, caplog
):
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    tar = sorted(out.glob("train-*.tar"))[0]
    times, content = tar.stat(), bytearray(tar.read_bytes())
    content[len(content) // 2] ^= 1
    tar.write_bytes(content)
    os.utime(tar, ns=(times.st_atime_ns, times.st_mtime_ns))
    caplog.set_level(logging.INFO)
    run(audio, out, "train")
    assert "nothing to do (tars were compared by their sizes; verify_shards.py reads them" in caplog.text
    assert any(line.startswith(f"{tar.name}: damaged: its sha256") for line in verify(out, 1))
