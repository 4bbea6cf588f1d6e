"""The other ways to start ranks: torchrun, and an environment without a launcher."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.errors import GRACE_SECONDS, LAUNCHERS, UserError, run_cli
from tests.conftest import ROOT
from tests.distributed.conftest import losses
from tests.ranks import free_port, run_ranks


@pytest.mark.slow
def test_torchrun_starts_the_same_run(pretrained, pretraining, tmp_path):
    command = [Path(sys.executable).with_name("torchrun"), "--nproc-per-node=2", f"--master-port={free_port()}",
               "launchers/pretrain.py", *pretraining, f"run.dir={tmp_path}", "log.mlflow=false"]  # fmt: skip
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert losses(tmp_path) == losses(pretrained)


def test_an_error_that_all_ranks_meet_is_said_once():
    (first, said), (second, silent) = run_ranks(2, "launchers/pretrain.py", "train.stesp=1", check=False)
    assert (first, second) == (2, 2)
    assert said.startswith("error: ")
    assert "error" not in silent


@pytest.mark.parametrize(("launcher", "waits"), [("", False), ("CROSS_RANK", True), ("TORCHELASTIC_RUN_ID", True)])
def test_other_ranks_wait_for_rank_0_only_where_a_launcher_would_end_it(monkeypatch, launcher, waits):
    slept = []
    monkeypatch.setattr("pipeline.errors.time.sleep", slept.append)
    for name in LAUNCHERS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "1")
    if launcher:
        monkeypatch.setenv(launcher, "1")
    with pytest.raises(SystemExit) as left:
        run_cli(_bad_input)
    assert left.value.code == 2
    assert slept == ([GRACE_SECONDS] if waits else [])


def _bad_input() -> int:
    raise UserError("train.steps = -1: give a positive number")


def test_srun_without_an_address_is_refused():
    srun = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    env = {name: value for name, value in os.environ.items() if name != "MASTER_ADDR"} | srun
    code = "from pipeline.distributed import session\nwith session(60, 0): pass"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert "UserError: srun started 2 tasks, and MASTER_ADDR is not set" in done.stderr
