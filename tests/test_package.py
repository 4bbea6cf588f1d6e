"""The wheel and the source archive: what they need, what is in them, and that the commands run from them."""

import email
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from setuptools import build_meta

from tests.ranks import ROOT

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


def shipped() -> set[str]:
    """Every file of the repository that a user of the commands needs."""
    return {
        str(path.relative_to(ROOT))
        for room in ROOMS
        for path in (ROOT / room).rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }


def test_the_wheel_holds_every_module_launcher_and_config(wheel):
    with zipfile.ZipFile(wheel) as file:
        names = {name for name in file.namelist() if ".dist-info/" not in name}
    assert names == shipped()


def test_the_wheel_asks_for_what_the_code_imports(wheel):
    with zipfile.ZipFile(wheel) as file:
        (name,) = [name for name in file.namelist() if name.endswith(".dist-info/METADATA")]
        needed = email.message_from_bytes(file.read(name)).get_all("Requires-Dist")
    plain = {line.split(";")[0].split("<")[0].split(">")[0].strip() for line in needed if "extra ==" not in line}
    assert {"torch", "torchaudio", "deepspeed", "webdataset", "mlflow", "soundfile", "pyarrow", "pydantic"} <= plain


def test_pip_resolves_the_same_from_the_wheel_and_from_the_requirements(source, wheel):
    def asked_for(*words: object) -> set[str]:
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-index", "--no-build-isolation", *words]
        done = subprocess.run([*map(str, command)], cwd=source, capture_output=True, text=True, check=True)
        lines = [line for line in done.stdout.splitlines() if line.startswith("Requirement already satisfied:")]
        return {line.split()[3] for line in lines if "(from craft-audio" in line}

    from_wheel = asked_for(wheel)
    assert {"torch<2.15,>=2.6", "mlflow>=3.1"} <= from_wheel
    assert asked_for("-r", "requirements.txt") == from_wheel


def test_the_commands_run_from_the_wheel_alone(wheel, tmp_path):
    installed, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    with zipfile.ZipFile(wheel) as file:
        file.extractall(installed)
    elsewhere.mkdir()
    command = [sys.executable, "-m", "launchers.pretrain", "--deepspeed_config", "zero2.json", "--print-config"]
    done = subprocess.run(command, cwd=elsewhere, env={"PYTHONPATH": str(installed), "PATH": "/usr/bin:/bin"},
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "pswacl" in done.stdout
    where = "import pipeline.ablation.grid as grid; print(grid.__file__, sorted(p.stem for p in grid.SCALES.glob('*')))"
    done = subprocess.run([sys.executable, "-c", where], cwd=elsewhere, env={"PYTHONPATH": str(installed)},
                          capture_output=True, text=True, check=True)  # fmt: skip
    assert done.stdout.split(maxsplit=1) == [str(installed / "pipeline/ablation/grid.py"), "['micro', 'paper']\n"]


def test_the_source_archive_builds_the_same_wheel(source, wheel, tmp_path, monkeypatch):
    monkeypatch.chdir(source)
    archive = tmp_path / build_meta.build_sdist(str(tmp_path))
    shutil.unpack_archive(archive, tmp_path / "unpacked")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    files = {str(path.relative_to(unpacked)) for path in unpacked.rglob("*") if path.is_file()}
    assert shipped() | set(FILES) - {"requirements.txt"} <= files
    assert not [name for name in files if Path(name).parts[0] == "tests"]
    monkeypatch.chdir(unpacked)
    rebuilt = tmp_path / build_meta.build_wheel(str(tmp_path))
    with zipfile.ZipFile(wheel) as first, zipfile.ZipFile(rebuilt) as second:
        assert sorted(first.namelist()) == sorted(second.namelist())
