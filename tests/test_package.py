"""The wheel and the source archive: what they need, what is in them, and that the commands run from them."""

import ast
import email
import json
import os
import re
import shutil
import site
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from setuptools import build_meta

import pipeline
from launchers.craft import COMMANDS
from tests.ranks import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOMS = ("pipeline", "shard_tools", "launchers", "configs")
FILES = ("pyproject.toml", "requirements.txt", "README.md", "LICENSE", "MANIFEST.in")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the sources: a build leaves its own files beside them."""
    copy = tmp_path_factory.mktemp("source")
    for room in ROOMS:
        shutil.copytree(ROOT / room, copy / room, ignore=shutil.ignore_patterns("__pycache__"))
    for file in FILES:
        shutil.copyfile(ROOT / file, copy / file)
    (copy / "tests").mkdir()
    shutil.copyfile(__file__, copy / "tests" / "test_package.py")
    return copy


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", out, source]
    subprocess.run([*map(str, command)], check=True)
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """bin/ of a virtual environment that holds the wheel, and reads what it needs from the environment of the tests."""
    home = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(home)], check=True)
    (packages,) = home.glob("lib/python*/site-packages")
    # Directories alone: .pth files in them, as of an editable install of the checkout, are not read.
    (packages / "tested.pth").write_text("\n".join(site.getsitepackages()))
    python = home / "bin" / "python"
    command = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel]
    subprocess.run([*map(str, command)], check=True)
    return home / "bin"


@pytest.fixture
def run(installed, tmp_path):
    """Runs a program of the virtual environment in an empty directory."""

    def program(name: str, *words: object) -> str:
        env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        command = [str(installed / name), *map(str, words)]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return program


def shipped() -> set[str]:
    """Every file of the repository that a user of the commands needs, where the wheel has it."""
    return {
        str(path.relative_to(ROOT)).replace("configs/", "pipeline/configs/", int(room == "configs"))
        for room in ROOMS
        for path in (ROOT / room).rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }


def test_the_wheel_holds_every_module_launcher_and_config(wheel):
    with zipfile.ZipFile(wheel) as file:
        names = {name for name in file.namelist() if ".dist-info/" not in name}
    assert names == shipped()


def test_the_wheel_asks_for_what_the_requirements_list(wheel):
    with zipfile.ZipFile(wheel) as file:
        (name,) = [name for name in file.namelist() if name.endswith(".dist-info/METADATA")]
        about = email.message_from_bytes(file.read(name))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    listed = [line.partition("#")[0].strip() for line in lines if line.partition("#")[0].strip()]
    assert listed == [*project["dependencies"], "-e ."]
    needed = {Requirement(line) for line in about.get_all("Requires-Dist") if "extra ==" not in line}
    assert needed == set(map(Requirement, project["dependencies"]))
    assert about["Version"] == pipeline.__version__
    assert (about["License-Expression"], about["License-File"]) == ("Apache-2.0", "LICENSE")
    assert about.get_payload().startswith("# CRAFT")


def test_the_lock_file_holds_what_the_requirements_ask_for():
    text = (ROOT / "requirements.lock").read_text()
    locked = re.findall(r"^([a-z0-9.-]+)==(\S+) (?:; python_full_version \S+ '\S+' )?\\$", text, re.MULTILINE)
    for line in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]:
        wanted = Requirement(line)
        versions = [version for name, version in locked if name == wanted.name.lower()]
        assert versions, line
        assert all(map(wanted.specifier.contains, versions)), line
    blocks = re.split(r"^(?=\S+==)", text, flags=re.MULTILINE)[1:]
    assert len(blocks) == len(locked)
    assert all(re.search(r"^    --hash=sha256:[0-9a-f]{64}", block, re.MULTILINE) for block in blocks)
    assert not re.search(r"file:|https?:|find-links|index-url|/(opt|work|tmp|root)/", text)


WHERE = """
import importlib.metadata, launchers, pipeline, shard_tools
from pipeline.ablation.grid import Grid
from pipeline.files import config_path, shipped
print(importlib.metadata.version("craft-audio"))
print(launchers.__file__, pipeline.__file__, shard_tools.__file__, shipped(), config_path("table3", "", "ablation"))
print(len(Grid([shipped("ablation/table3.yaml")], "micro", {}).runs))
"""


def test_what_is_imported_comes_from_the_wheel(run, installed):
    version, paths, runs = run("python", "-c", WHERE).splitlines()
    assert version == pipeline.__version__
    assert {Path(path).is_relative_to(installed.parent) for path in paths.split()} == {True}
    assert int(runs) > 6
    assert run("craft", "--version") == f"craft-audio {version}\n"
    by_name = run("craft", "pretrain", "--deepspeed_config", "zero2.json", "--config", "pretrain/craft_mae",
                  "--print-config")  # fmt: skip
    assert "method: craft_mae" in by_name
    assert run("craft", "pretrain", "--config", "configs/pretrain/craft_mae.yaml", "--print-config") == by_name


@pytest.mark.slow
def test_shards_training_and_labels_from_the_wheel_alone(run, tmp_path):
    run("craft", "build", "--dataset", "synth", "--seconds", "0.5", "--limit", "64", "--clips-per-shard", "16",
        "--workers", "1", "--out", "shards")  # fmt: skip
    said = run("craft", "finetune", "--config", "finetune/demo", "data.shards=shards", "run.dir=run", "train.steps=2",
               "log.every=1", "log.mlflow=false", "data.workers=1")  # fmt: skip
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in steps if "loss" in line] == [1, 2], said
    clip = sorted((tmp_path / "shards" / "source" / "audio").glob("*.flac"))[0]
    (line,) = run("craft", "predict", "--checkpoint", "run", clip, "--json", "--top", "2").splitlines()
    assert len(json.loads(line)["labels"]) == 2


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_a_module_with_a_main(name):
    """Without importing it: what heavy imports each does is test_layout's."""
    path = ROOT / (COMMANDS[name][0].replace(".", "/") + ".py")
    functions = {node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}
    assert {"main"} <= functions


def test_a_command_has_the_exit_status_of_its_module(tmp_path):
    for words, status, said in (
        (["predict", "--checkpoint", "gone", "gone.wav"], 1, "gone.wav: no such file\n"),
        (["pretrain", "--config", "gone", "--print-config"], 2, "error: gone: No such file or directory"),
        (["pretrian"], 2, "error: craft has no command 'pretrian'; did you mean pretrain?\n"),
    ):
        command = [sys.executable, "-m", "launchers.craft", *words]
        env = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr[: len(said)]) == (status, said)


def test_the_source_archive_builds_the_same_wheel(source, wheel, tmp_path, monkeypatch):
    monkeypatch.chdir(source)
    archive = tmp_path / build_meta.build_sdist(str(tmp_path))
    shutil.unpack_archive(archive, tmp_path / "unpacked")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    files = {str(path.relative_to(unpacked)) for path in unpacked.rglob("*") if path.is_file()}
    sources = {name.replace("pipeline/configs/", "configs/") for name in shipped()}
    assert sources | set(FILES) - {"requirements.txt"} <= files
    assert not [name for name in files if Path(name).parts[0] == "tests"]
    monkeypatch.chdir(unpacked)
    rebuilt = tmp_path / build_meta.build_wheel(str(tmp_path))
    with zipfile.ZipFile(wheel) as first, zipfile.ZipFile(rebuilt) as second:
        assert sorted(first.namelist()) == sorted(second.namelist())
