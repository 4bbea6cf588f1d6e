"""Every check of `python -m tests.gpu`: on the GPUs of this machine, else its rehearsal on the CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.gpu import __main__ as suite
from tests.gpu.report import Check
from tests.ranks import ROOT


def run(*words: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "tests.gpu", *words], check=False, cwd=ROOT, env=os.environ | env,
                          capture_output=True, text=True)  # fmt: skip


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    out = tmp_path_factory.mktemp("gpu")
    return out, run("--out", str(out), **({} if torch.cuda.is_available() else {"DS_ACCELERATOR": "cpu"}))


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("name", suite.CHECKS)
def test_check(name, ended):
    out, process = ended
    report = json.loads((out / "report.json").read_text())
    lines = [line for line in report["results"] if line["check"] == name]
    assert lines, process.stdout + process.stderr
    assert not [line for line in lines if line["status"] == "FAIL"], (out / name / "output.log").read_text()[-5000:]
    assert process.returncode == any(line["status"] == "FAIL" for line in report["results"])


def test_a_machine_without_gpus_is_told_so(tmp_path):
    process = run("--out", str(tmp_path / "out"), CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="")
    assert (process.returncode, process.stderr) == (2, f"error: {suite.MISSING}\n")
    assert not (tmp_path / "out").exists()


def test_a_check_that_breaks_or_hangs_has_failed(tmp_path, monkeypatch, capfd):
    check = Check("environment", tmp_path, tmp_path, True, 1)
    monkeypatch.setattr("tests.gpu.environment.run", lambda _: 1 / 0)
    suite.run(check)
    assert capfd.readouterr().out == "FAIL environment.end ZeroDivisionError: division by zero (no exception)\n"
    monkeypatch.setitem(suite.CHECKS, "environment", 0.01)
    suite.start(Check("", tmp_path, tmp_path, True, 1), "environment")
    assert "FAIL environment.end more than 0.03 s" in capfd.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "environment" / "results.jsonl").open()]
    assert [line["status"] for line in lines] == ["FAIL"]
