"""The batch scripts in a real Slurm: two tasks, pre-empted, queued again, resumed; an array of slices and its merge."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.engine.checkpoint import read_state
from tests.conftest import ROOT
from tests.distributed.conftest import STEPS, losses
from tests.ranks import run_script
from tests.slurm import Slurm

PATIENCE = 600.0
SBATCH = ["sbatch", "--parsable", "--ntasks-per-node=2", "--cpus-per-task=2", "--gpus-per-node=2", "--time=30",
          f"--chdir={ROOT}"]  # fmt: skip


def wait_for(happened, slurm: Slurm, output: Path, what: str) -> None:
    end = time.monotonic() + PATIENCE
    while not happened():
        said = output.read_text()[-4000:] if output.exists() else ""
        assert time.monotonic() < end, f"no {what} in {PATIENCE} s\n{said}\n{slurm.logs()}"
        time.sleep(0.05)


@pytest.mark.slow
def test_a_job_that_is_preempted_saves_is_queued_again_and_ends_as_if_it_had_not_been(
    slurm, pretrained, pretraining, tmp_path, monkeypatch
):
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:/usr/bin:/bin")
    output, run_dir = tmp_path / "job.log", tmp_path / "run"
    job = slurm.run(*SBATCH, f"--output={output}", "launchers/slurm.sbatch", "launchers/pretrain.py", *pretraining,
                    f"run.dir={run_dir}", "log.mlflow=false", "checkpoint.every=1")  # fmt: skip
    metrics = run_dir / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.read_text().count("lr") >= 1, slurm, output, "step 1")
    urgent = slurm.run("sbatch", "--parsable", "--partition=urgent", "--cpus-per-task=4", "--wrap=sleep 1",
                       f"--output={tmp_path}/urgent.log")  # fmt: skip
    wait_for(lambda: slurm.field(urgent, "JobState") == "COMPLETED", slurm, output, "urgent job")
    assert slurm.field(job, "Restarts") == "1"
    (stopped,) = map(int, re.findall(r"SIGUSR1: left after step (\d+)", output.read_text()))
    assert 1 <= stopped == read_state(run_dir)["step"] < STEPS
    assert losses(run_dir)[-1]["step"] == stopped  # nothing was lost
    slurm.run("scontrol", "update", f"JobId={job}", "StartTime=now")  # Slurm lets a requeued job wait a while
    wait_for(lambda: slurm.field(job, "JobState") not in ("PENDING", "RUNNING", "COMPLETING"), slurm, output, "its end")
    assert (slurm.field(job, "JobState"), slurm.field(job, "ExitCode")) == ("COMPLETED", "0:0"), output.read_text()
    assert f"{STEPS} steps of 8 clips, from step {stopped}" in output.read_text()
    assert losses(run_dir) == losses(pretrained)  # the deepspeed launcher's


BUILD = ["--dataset", "synth", "--seconds", "0.25", "--limit", "24", "--clips-per-shard", "4", "--out"]


@pytest.mark.slow
def test_an_array_of_slices_and_the_job_after_it_build_what_one_process_builds(slurm, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:/usr/bin:/bin")
    alone, out, logs = tmp_path / "alone", tmp_path / "out", f"--output={tmp_path}/%A_%a.log"
    assert run_script("shard_tools/build_shards.py", *BUILD, alone).returncode == 0
    job = ["sbatch", "--parsable", "--cpus-per-task=1", f"--chdir={ROOT}", logs]
    slices = slurm.run(*job, "--array=1-3", "launchers/slurm_shards.sbatch", *BUILD, out)
    merge = slurm.run(*job, f"--dependency=afterok:{slices}", "--kill-on-invalid-dep=yes",
                      "launchers/slurm_shards.sbatch", *BUILD, out)  # fmt: skip
    log = tmp_path / f"{slices}_1.log"
    wait_for(lambda: slurm.field(merge, "JobState") not in ("PENDING", "RUNNING", "COMPLETING"), slurm, log, "its end")
    assert slurm.field(merge, "JobState") == "COMPLETED", log.read_text()
    assert "slice 1/3" in log.read_text()
    names = sorted(path.name for path in alone.glob("*.*"))
    assert len(names) > 6
    assert names == sorted(path.name for path in out.glob("*.*"))
    assert all((alone / name).read_bytes() == (out / name).read_bytes() for name in names)


def test_part_of_an_array_must_say_of_how_many_slices_it_is(tmp_path):
    place = os.environ | {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_MAX": "3", "SLURM_ARRAY_TASK_COUNT": "1",
                          "SLURM_CPUS_PER_TASK": "1", "PATH": f"{tmp_path}:{os.environ['PATH']}"}  # fmt: skip
    (tmp_path / "python").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "python").chmod(0o755)

    def run(**env: str) -> subprocess.CompletedProcess[str]:
        command = ["bash", "launchers/slurm_shards.sbatch", "--out", "x"]
        return subprocess.run(command, cwd=ROOT, env=place | env, capture_output=True, text=True, check=False)

    refused = run()
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "SLICES=N" in refused.stderr
    assert run(SLICES="16").stdout == "shard_tools/build_shards.py --workers 1 --out x --slice 3/16\n"
