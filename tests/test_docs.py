"""README, CONTRIBUTING and docs/: every command is one that the programs take, every link leads somewhere.

A block of commands is run by bash, in which each program is a stub that only writes down how it was called. So what
quotes, loops, variables and patterns come to is what a user's shell makes of them, and a program that is none of
PROGRAMS is an error. Each call is then given to the parser of its own program.
"""

import argparse
import ast
import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from deepspeed.launcher import runner as deepspeed
from torch.distributed import run as torchrun

from launchers.craft import COMMANDS
from pipeline.command_line import parse
from pipeline.config import FinetuneRecipe, PretrainRecipe
from pipeline.errors import UserError
from tests.ranks import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
HEADS = [ROOT / "docker/compose.yaml", ROOT / "docker/Dockerfile", ROOT / "launchers/slurm.sbatch"]  # with examples
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(#[^)\s]*)?\)")
OTHERS = {"cat", "codespell", "git", "mlflow", "mypy", "pip", "pre-commit", "pytest", "ruff"}  # not ours to parse
PROGRAMS = {"craft", "deepspeed", "docker", "kubectl", "make", "python", "sbatch", "srun", "torchrun"} | OTHERS
RECIPES = {"launchers.pretrain": PretrainRecipe, "launchers.finetune": FinetuneRecipe}
STUB = """#!/bin/bash
printf '%s\\0' "$#" "${0##*/}" "$@" >> "$CALLS"
"""


class ParsedError(Exception):
    """The parser has taken the words: the program goes no further."""


def blocks(page: Path, *languages: str) -> list[str]:
    found = BLOCK.findall(page.read_text(encoding="utf-8"))
    return [content for language, content in found if language in languages]


@pytest.fixture
def called(tmp_path):
    """Runs commands in bash; the calls that they make, program first."""
    stubs, calls = tmp_path / "stubs", tmp_path / "calls"
    stubs.mkdir()
    for name in PROGRAMS:
        (stubs / name).write_text(STUB)
        (stubs / name).chmod(0o755)

    def run(commands: str) -> list[list[str]]:
        calls.write_bytes(b"")
        env = {"PATH": str(stubs), "CALLS": str(calls), "SLURM_ARRAY_TASK_ID": "3"}
        done = subprocess.run(["/bin/bash", "-euo", "pipefail", "-c", commands], cwd=ROOT, env=env, capture_output=True,
                              text=True, check=False)  # fmt: skip
        assert done.returncode == 0, f"{done.stderr}\n{commands}"
        words, made = calls.read_text().split("\0")[:-1], []
        while words:
            count = int(words[0]) + 2
            made.append(words[1:count])
            words = words[count:]
        return made

    return run


def stopping(name: str):
    """A method of `ArgumentParser` after which the program ends."""
    original = getattr(argparse.ArgumentParser, name)

    def stop(self, *words, **options):
        original(self, *words, **options)
        raise ParsedError

    return stop


def check_module(name: str, words: list[str], monkeypatch) -> None:
    """`words` are a command line of our program `name`."""
    assert name.partition(".")[0] in ("launchers", "shard_tools", "pipeline", "tests"), name
    if name in RECIPES:
        parse(RECIPES[name], None, words)
        return
    folder = ROOT.joinpath(*name.split("."))
    module = importlib.import_module(f"{name}.__main__" if folder.is_dir() else name)
    with monkeypatch.context() as change:
        change.setattr(sys, "argv", [name, *words])
        for method in ("parse_args", "parse_intermixed_args"):
            change.setattr(argparse.ArgumentParser, method, stopping(method))
        with pytest.raises(ParsedError):
            module.main()


def check_script(words: list[str], monkeypatch) -> None:
    """The first word is a script of ours, or -m and a module."""
    if words[0] in ("-m", "--module"):
        check_module(words[1], words[2:], monkeypatch)
        return
    assert (ROOT / words[0]).is_file(), words[0]
    check_module(words[0].removesuffix(".py").replace("/", "."), words[1:], monkeypatch)


def check_call(call: list[str], monkeypatch) -> None:
    """Gives a call to the parser of its program."""
    program, *words = call
    if program == "python":
        check_script(words, monkeypatch)
    elif program == "craft":
        check_module(COMMANDS[words[0]][0], words[1:], monkeypatch)
    elif program in ("deepspeed", "torchrun"):
        taken = LAUNCHERS[program](words)
        script, rest = LAUNCHED[program]
        check_script([*(["-m"] if taken.module else []), getattr(taken, script), *getattr(taken, rest)], monkeypatch)
    elif program == "sbatch":
        script, *rest = words[next(i for i, word in enumerate(words) if not word.startswith("--")) :]
        assert (ROOT / script).is_file(), script
        check_script(["shard_tools/build_shards.py", *rest] if "shards" in script else rest, monkeypatch)
    elif program == "make":
        goals = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert {word for word in words if "=" not in word} <= set(goals), words
    elif program in ("docker", "kubectl"):
        files = [words[i + 1] for i, word in enumerate(words) if word == "-f"]
        assert files or words[0] in ("create", "run"), words
        assert all((ROOT / file).is_file() for file in files), words
        if "tests.gpu" in words:
            assert any(word.endswith("/tests:/opt/craft/tests:ro") for word in words), "the image has no tests/"
        for inner in {"deepspeed", "python"} & set(words):
            check_call(words[words.index(inner) :], monkeypatch)
    elif program == "srun":
        check_call(words[words.index("python") :], monkeypatch)
    elif program == "pip":
        extras = re.findall(r"\[([\w,]+)\]", " ".join(words))
        known = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
        assert {name for extra in extras for name in extra.split(",")} <= set(known), words


LAUNCHERS = {"deepspeed": deepspeed.parse_args, "torchrun": torchrun.parse_args}
LAUNCHED = {"deepspeed": ("user_script", "user_args"), "torchrun": ("training_script", "training_script_args")}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_command_is_one_that_its_program_takes(page, called, monkeypatch):
    monkeypatch.chdir(ROOT)
    for call in (call for block in blocks(page, "bash", "sh") for call in called(block)):
        try:
            check_call(call, monkeypatch)
        except (SystemExit, UserError) as end:
            if not isinstance(end, SystemExit) or end.code:  # --help and --print-config end well
                pytest.fail(f"{shlex.join(call)}: {end}")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_builds_of_audioset_as_files_name_its_tables(page, called):
    calls = [call for block in blocks(page, "bash", "sh") for call in called(block)]
    for call in (call for call in calls if "/data/audioset" in call):
        assert {"--segments", "--class-labels"} <= set(call), shlex.join(call)


@pytest.mark.parametrize("path", [*PAGES, *HEADS], ids=lambda path: str(path.relative_to(ROOT)))
def test_pretraining_on_audioset_names_the_unbalanced_split(path):
    """What is left out is taken as `train`: a hundredth of the clips."""
    text = re.sub(r"\\\n#?\s*", "", path.read_text(encoding="utf-8"))
    for line in text.splitlines():
        if "launchers/pretrain.py" in line and re.search(r"data\.shards=\S*audioset\b", line):
            assert "data.train_split=unbalanced,train" in line, line
        assert not re.search(r"data\.shards=/data(\s|$)", line), f"{line}: /data holds the sets"


def test_the_page_of_training_lists_every_recipe_and_precision():
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    for kind in ("pretrain", "finetune"):
        table = page.split(f"| file of `configs/{kind}/` |")[1].split("\n\n")[0]
        assert sorted(re.findall(r"^\| `(\S+)` \|", table, re.MULTILINE)) == sorted(
            path.name for path in (ROOT / "configs" / kind).iterdir()
        )
    table = page.split("| file of `configs/deepspeed/` |")[1].split("\n\n")[0]
    for path in (ROOT / "configs" / "deepspeed").iterdir():
        assert f"`{path.name}`" in table, path.name


def test_the_front_page_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", sorted(ROOT.glob("*.md")), ids=lambda page: page.stem)
def test_links_of_the_pages_outside_docs_lead_somewhere(page):
    for target, anchor in LINK.findall(page.read_text(encoding="utf-8")):
        other = ROOT / target if target else page
        assert other.exists(), target
        assert not anchor or anchor[1:] in anchors(other), target + anchor


def test_the_documentation_builds_with_strict_links(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    env = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = {path.parent.name for path in (tmp_path / "site").glob("*/index.html")}
    assert pages == {page.stem for page in PAGES if page.parent.name == "docs"} - {"index"}


def test_the_messages_of_the_troubleshooting_page_are_the_programs_own():
    said = []
    for room in ("pipeline", "shard_tools", "launchers"):
        for path in (ROOT / room).rglob("*.py"):
            tree = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            said += [node.value for node in tree if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    rows = re.findall(r"^\| `([^`]+)` \|", (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8"), re.M)
    assert len(rows) > 20
    for row in rows:
        for part in row.split("…"):
            assert any(part.strip() in text for text in said), row
