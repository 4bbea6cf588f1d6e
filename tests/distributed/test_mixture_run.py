"""Three sets of shards, one of them without labels: a pretraining is killed and goes on elsewhere in the same order."""

import json
import os
import signal

import pytest

from shard_tools.build import build
from shard_tools.forms import look
from shard_tools.forms.entries import Asked
from tests.distributed.conftest import MICRO, losses
from tests.distributed.test_faults import reached, wait_for
from tests.helpers import options, synth_shards
from tests.ranks import fork_ranks, run_ranks

STEPS = 16


@pytest.mark.slow
def test_a_mixture_is_killed_on_two_ranks_and_goes_on_on_one(shards, tmp_path):
    synth_shards(tmp_path / "b", clips=40)
    unlabelled = look.read("unlabelled", Asked(tmp_path / "b" / "source"))
    build(unlabelled, tmp_path / "c", options(0.5, 8), 1, engine="inline")
    sets = [{"path": str(shards), "weight": 2}, {"path": str(tmp_path / "b"), "weight": 1},
            {"path": str(tmp_path / "c"), "weight": 1}]  # fmt: skip
    words = ["--deepspeed_config", "zero0.json", f"data.shards={json.dumps(sets)}", f"train.steps={STEPS}",
             "data.schedule=[{step: 9, weights: [1, 1, 3]}]", *MICRO, "log.mlflow=false",
             "checkpoint.every=1"]  # fmt: skip
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    run_ranks(2, "launchers/pretrain.py", *words, f"run.dir={straight}")
    ranks = fork_ranks(2, "launchers/pretrain.py", *words, f"run.dir={killed}")
    wait_for(reached(killed, 6), ranks, "step 6")
    for rank in ranks:
        os.kill(rank.process.pid, signal.SIGKILL)
        rank.end()
    run_ranks(1, "launchers/pretrain.py", *words, f"run.dir={killed}")
    expected, found = losses(straight), losses(killed)
    assert [line["step"] for line in found] == list(range(1, STEPS + 1))
    assert [line["loss"] for line in found] == pytest.approx([line["loss"] for line in expected], rel=1e-4)
    ((status, said),) = run_ranks(1, "launchers/pretrain.py", *words, f"run.dir={killed}",
                                  f"data.shards={json.dumps(sets[:2])}", "data.schedule=[]", check=False)  # fmt: skip
    assert (status, "data.schedule" in said or "data.shards digest" in said) == (2, True), said[-2000:]
