"""Paths that users name, and places that are tried before the work."""

import os
import re
import shlex
import sys
from importlib import import_module
from itertools import pairwise
from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.files import (
    check_name,
    check_output_directory,
    check_output_file,
    check_replaced_directory,
    config_path,
    lock,
    locked,
    new_directory,
    shipped,
    user_path,
    write_json,
    write_text,
)
from tests.ranks import ROOT

TABLE = ROOT / "configs" / "ablation" / "table3.yaml"


@pytest.mark.parametrize("name", ["train", "bal_train", "dev-clean.v2", "0", "_x", "a" * 100])
def test_plain_names_are_taken(name):
    assert check_name(name, "--split") == name


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "a/b", "/a", "a\\b", "-x", ".x", "a\n", "a\0b", "a b", "ä", "a" * 101, "a:b", "a*"]
)
def test_names_that_could_leave_the_directory_are_refused(name):
    with pytest.raises(UserError, match="--split"):
        check_name(name, "--split")


@pytest.mark.parametrize(("module", "words"), [
    ("shard_tools.verify_shards", "''"), ("shard_tools.verify_shards", "x --audio-root ''"),
    ("shard_tools.inspect_shards", "''"), ("shard_tools.inspect_shards", "x --html ''"),
    *(("shard_tools.build_shards", f"--dataset csv --out x {option} ''")
      for option in ("--audio-root", "--segments", "--class-labels", "--label-overrides", "--table", "--ontology")),
    ("pipeline.data.show", "--shards x --batch 0 --png ''"), ("pipeline.data.show", "--shards x --batch 0 --config ''"),
    ("pipeline.tracking.__main__", "sync ''"), ("pipeline.tracking.__main__", "sync . --uri ''"),
    ("pipeline.serving.__main__", "''"), ("pipeline.serving.__main__", "x --out ''"),
    ("pipeline.report.__main__", "x --out ''"), ("pipeline.report.__main__", "x --runs ''"),
    ("launchers.ablate", "x --out ''"), ("launchers.ablate", f"{TABLE} --scale ''"),
    ("launchers.ablate", f"{TABLE} --deepspeed_config ''"), ("launchers.evaluate", "--checkpoint x --shards ''"),
    ("launchers.evaluate", "--checkpoint x --shards x --plots ''"), ("launchers.demo_app", "--checkpoint ''"),
    ("launchers.predict", "--checkpoint x x --embeddings ''"), ("launchers.predict", "--checkpoint '' x"),
    ("launchers.export", "--format hf --checkpoint x --out ''"), ("launchers.plan", "--gpus 1 --gpu-memory 1 --run ''"),
])  # fmt: skip
def test_an_empty_path_is_refused_by_the_name_of_its_option(tmp_path, monkeypatch, module, words):
    """It would be the working directory, or as if the option had not been given."""
    monkeypatch.chdir(tmp_path)
    words = shlex.split(words)
    option = next((word for word, value in pairwise(words) if value == ""), "")
    (tmp_path / "tracking.json").write_text("{}")
    monkeypatch.setattr(sys, "argv", [module, *words])
    with pytest.raises(UserError) as caught:
        import_module(module).main()
    assert option in str(caught.value) if option.startswith("--") else re.search("DIR = ''", str(caught.value))
    assert [path.name for path in tmp_path.iterdir()] == ["tracking.json"]


def test_a_tilde_is_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_path("~/runs", "run.dir") == tmp_path / "runs"
    assert user_path("runs/~x", "run.dir") == Path("runs/~x")
    for text in ("", "a\0b", "~nobody-of-this-name/x"):
        with pytest.raises(UserError, match=r"run\.dir"):
            user_path(text, "run.dir")


def test_output_places_are_tried_and_left_as_they_were(tmp_path):
    (tmp_path / "file").write_text("mine")
    os.mkfifo(tmp_path / "pipe")
    assert check_output_file(tmp_path / "new" / "r.json", "--out") == tmp_path / "new" / "r.json"
    assert check_output_directory(tmp_path / "a" / "b", "--out") == tmp_path / "a" / "b"
    check_output_file(tmp_path / "file", "--out")
    for path in (tmp_path, tmp_path / "pipe", tmp_path / "file" / "r.json"):
        with pytest.raises(UserError, match="--out"):
            check_output_file(path, "--out")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match="--out"):
            check_output_directory(path, "--out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "pipe"]
    assert (tmp_path / "file").read_text() == "mine"


def test_a_small_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    write_text(tmp_path / "a", "old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pipeline.files.os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_json(tmp_path / "a", {"new": 1})
    assert (tmp_path / "a").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_directory_appears_whole_or_not_at_all(tmp_path):
    out = tmp_path / "out"
    (tmp_path / "link").symlink_to(out)
    with new_directory(out) as made:
        (made / "a").write_text("1")
        assert not out.exists()
    with pytest.raises(IsADirectoryError), new_directory(out) as made:
        made.write_text("2")
    assert (out / "a").read_text() == "1"
    with new_directory(tmp_path / "link") as made:
        (made / "b").touch()
    assert [path.name for path in out.iterdir()] == ["b"]
    assert (tmp_path / "link").is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "out"]


def test_a_directory_whose_files_do_not_reach_the_disk_replaces_nothing(tmp_path, monkeypatch):
    """As of a full file server, which takes what is written and says so when it is asked."""
    out, fsync = tmp_path / "out", os.fsync
    with new_directory(out) as made:
        (made / "a").write_text("old")

    def full(descriptor):
        if os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")) == "a":
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    def anew():
        with new_directory(out) as made:
            (made / "within").mkdir()
            (made / "within" / "a").write_text("new")

    monkeypatch.setattr("pipeline.files.os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        anew()
    assert (out / "a").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_only_what_we_made_is_replaced(tmp_path):
    def check(folder: Path, ours: bool) -> None:
        check_replaced_directory(folder, "--out", frozenset({"a", "b"}), lambda place: ours)

    check(tmp_path / "new", False)
    check(tmp_path, False)  # empty
    (tmp_path / "a").touch()
    check(tmp_path, True)
    with pytest.raises(UserError, match="such as a"):
        check(tmp_path, False)
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(UserError, match=r"such as thesis\.txt"):
        check(tmp_path, True)
    for place in (tmp_path / "a", Path("/proc/nowhere"), Path("/proc")):
        with pytest.raises(UserError, match="--out"):
            check(place, True)


def test_a_configuration_goes_by_its_path_or_its_name_in_configs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    demo, table = shipped("pretrain/demo.yaml"), shipped("ablation/table3.yaml")
    assert demo.read_text()
    assert table.is_file()
    for name in ("pretrain/demo", "pretrain/demo.yaml", "configs/pretrain/demo", "configs/pretrain/demo.yaml", demo):
        assert config_path(name, "--config").samefile(demo)
    for name in ("table3", "table3.yaml", "ablation/table3", "configs/ablation/table3.yaml"):
        assert config_path(name, "TABLE.yaml", "ablation").samefile(table)
    for name in ("demo", "gone/demo", "configs", "../configs/pretrain/demo", "x" * 5000):
        assert config_path(name, "--config") == Path(name)
    (tmp_path / "configs" / "pretrain").mkdir(parents=True)
    (tmp_path / "configs" / "pretrain" / "demo.yaml").touch()
    assert config_path("configs/pretrain/demo.yaml", "--config") == Path("configs/pretrain/demo.yaml")
    assert config_path("pretrain/demo", "--config").samefile(demo)


def test_a_lock_ends_with_its_block_whoever_was_forked_inside(tmp_path):
    """A thread delivers to MLflow while the main one forks its readers, which live as long as the training."""
    told, tell = os.pipe()
    with locked(tmp_path / "lock"):
        child = os.fork()
        if not child:
            os.close(tell)
            os.read(told, 1)  # ends with this test
            os._exit(0)
    with (tmp_path / "lock").open("ab") as file:
        free = lock(file.fileno(), wait=False)
    os.close(tell)
    os.waitpid(child, 0)
    assert free
