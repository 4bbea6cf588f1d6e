"""`launchers/slurm.sbatch` in a real Slurm: two tasks, pre-empted, queued again, resumed."""

import re
import sys
import time
from pathlib import Path

import pytest

from pipeline.engine.checkpoint import read_state
from tests.conftest import ROOT
from tests.distributed.conftest import STEPS, losses
from tests.slurm import Slurm

PATIENCE = 300.0
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
