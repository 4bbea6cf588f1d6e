"""Ranks started without a launcher, by an environment or by srun."""

import os
import subprocess
import sys
import time

from pipeline.errors import GRACE_SECONDS
from tests.conftest import ROOT
from tests.ranks import run_ranks


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
