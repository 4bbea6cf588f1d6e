"""A rank that fails ends all ranks within a minute, and each says which rank, on which host, and why."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient
from torch.distributed import HashStore

from pipeline.faults import VERDICT, Faults
from pipeline.tracking.__main__ import sync
from pipeline.tracking.spool import Spool
from tests.distributed.conftest import MICRO, lines
from tests.ranks import ROOT, places, run_ranks

SCRIPT = Path(__file__).with_name("failing_rank.py")
PATIENCE = 300.0  # a collective's is half an hour


@pytest.mark.slow
def test_the_trainer_names_the_rank_and_the_reason_and_closes_its_tracking(shards, tmp_path):
    words = [f"data.shards={shards}", f"run.dir={tmp_path / 'run'}", "train.steps=1000", "log.system_every=0",
             f"log.uri=sqlite:///{tmp_path}/mlflow.db", *MICRO]  # fmt: skip
    ends = run_ranks(2, SCRIPT, "pretrain", 1, *words, check=False, timeout=PATIENCE)
    said = [output for _, output in ends]
    assert [status for status, _ in ends] == [70, 70], said[0][-4000:]
    reason = f"rank 1 on {socket.gethostname()}: RuntimeError: no answer of device 3"
    assert f"error: {reason}\n" in said[1]
    assert "Traceback" in said[1]
    assert f"error: rank 0: {reason}; the same command goes on from the newest checkpoint\n" in said[0]
    assert reason in (tmp_path / "run" / "logs" / "rank-1.log").read_text()
    assert len(lines(tmp_path / "run")) >= 5
    sync(Spool(tmp_path / "run"), None)  # what a busy machine had no time for
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("craft").experiment_id])
    assert run.info.status == "FAILED"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "failing", "status", "said"),
    [
        ("device", 0, 70, ["rank 0 on HOST: RuntimeError: no answer of device 3", "rank 1: rank 0 on HOST: Run"]),
        ("input", 1, 2, ["rank 0: rank 1 on HOST: data.max_bad = 3: too many\n", ""]),
        ("own input", 1, 2, ["rank 0: rank 1 on HOST: shard 7 cannot be read\n", "shard 7 cannot be read\n"]),
        ("store", 0, 75, ["the store is out of reach\n", "rank 1: rank 0 on HOST: the store is out of reach"]),
        ("input", -1, 2, ["data.max_bad = 3: too many\n", ""]),
    ],
)
def test_every_kind_of_fault_ends_all_ranks_with_its_status(kind, failing, status, said):
    ends = run_ranks(2, SCRIPT, kind, failing, check=False, timeout=PATIENCE)
    assert [found for found, _ in ends] == [status] * 2, ends
    for (_, output), expected in zip(ends, said, strict=True):
        errors = [line + "\n" for line in output.splitlines() if line.startswith("error: ")]
        assert len(errors) == bool(expected), output
        assert not expected or errors[0].startswith("error: " + expected.replace("HOST", socket.gethostname())), errors


@pytest.mark.slow
def test_a_killed_rank_is_named_and_not_who_meets_the_broken_connection(tmp_path):
    ends = run_ranks(3, SCRIPT, "killed", 1, tmp_path, check=False, timeout=PATIENCE)
    (status, output), (killed, _), (other, _) = ends
    assert (status, killed, other) == (70, -signal.SIGKILL, 70), output
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    place = f"rank 1 on {socket.gethostname()} (last at step 0, data): "
    assert len(errors) == 1, output
    assert place in errors[0]
    assert "dead, stopped or out of reach" in errors[0]


@pytest.mark.slow
def test_a_rank_whose_output_nobody_reads_ends_with_the_others():
    """As on a host that was cut off: the ssh session that read it is gone, and writing to it fails."""
    command = [sys.executable, SCRIPT, "device", "0"]
    ranks = [subprocess.Popen(command, cwd=ROOT, env=os.environ | place, stdout=pipe, stderr=pipe)
             for place, pipe in zip(places(2), (subprocess.DEVNULL, subprocess.PIPE), strict=True)]  # fmt: skip
    ranks[1].stdout.close()
    ranks[1].stderr.close()
    try:
        assert [rank.wait(PATIENCE) for rank in ranks] == [70, 70]
    finally:
        for rank in ranks:
            rank.kill()


def test_a_rank_is_watched_from_the_first_moment(tmp_path):
    """One that is cut off at once is missed by its neighbour, who looks for what has changed since."""
    store = HashStore()
    store.set(VERDICT, "")
    faults = Faults(store, 0, 2)
    faults._closed.set()  # the thread, which says more later on, ends
    faults._thread.join()
    assert json.loads(store.get("place/0"))["count"] < 0
    with faults.watch(tmp_path, 60):
        assert json.loads(store.get("place/0"))["count"] == 0
    assert json.loads(store.get("place/0"))["count"] < 0
