"""The other ways to start ranks: torchrun, and an environment without a launcher."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.errors import GRACE_SECONDS
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


def test_an_error_that_all_ranks_meet_is_said_once_and_without_a_launcher_nobody_waits():
    begun = time.monotonic()
    (first, said), (second, silent) = run_ranks(2, "launchers/pretrain.py", "train.stesp=1", check=False)
    assert (first, second) == (2, 2)
    assert said.startswith("error: ")
    assert "error" not in silent
    assert time.monotonic() - begun < GRACE_SECONDS


def test_srun_without_an_address_is_refused():
    srun = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    env = {name: value for name, value in os.environ.items() if name != "MASTER_ADDR"} | srun
    code = "from pipeline.distributed import session\nwith session(60, 0): pass"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert "UserError: srun started 2 tasks, and MASTER_ADDR is not set" in done.stderr
