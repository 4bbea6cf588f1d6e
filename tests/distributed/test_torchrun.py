"""The other ways to start ranks: torchrun, and an environment without a launcher."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from threading import Thread

import pytest
from torch._C._distributed_c10d import TCPStore

from pipeline import distributed
from pipeline.errors import GRACE_SECONDS, LAUNCHERS, UserError, run_cli
from tests.conftest import ROOT
from tests.distributed.conftest import losses
from tests.helpers import synth_shards
from tests.ranks import fork_rank, free_port, places, run_ranks, start_ranks

RESTARTING = Path(__file__).with_name("restarting_rank.py")


@pytest.mark.slow
def test_torchrun_starts_the_same_run(pretrained, pretraining, tmp_path):
    command = [Path(sys.executable).with_name("torchrun"), "--nproc-per-node=2", f"--master-port={free_port()}",
               "launchers/pretrain.py", *pretraining, f"run.dir={tmp_path}", "log.mlflow=false"]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert losses(tmp_path) == losses(pretrained)


def test_an_error_that_all_ranks_meet_is_said_once():
    ranks = start_ranks(2, "launchers/pretrain.py", "train.stesp=1")
    (first, said), (second, silent) = (rank.end() for rank in ranks)
    assert (first, second) == (2, 2)
    assert said.startswith("error: ")
    assert "error" not in silent


@pytest.fixture(scope="module")
def other_build(tmp_path_factory) -> Path:
    """Of the same clips, with other shards."""
    out = tmp_path_factory.mktemp("shards")
    synth_shards(out, per_shard=16)
    return out


@pytest.mark.parametrize("other", ["lr", "build", "zero"])
def test_ranks_of_hosts_with_other_settings_or_shards_are_refused(pretraining, other_build, tmp_path, other):
    words = [*pretraining, f"run.dir={tmp_path / 'run'}", "log.mlflow=false", "data.workers=0"]
    different = {"lr": ["optim.lr=1e-3"], "build": [f"data.shards={other_build}"],
                 "zero": ["--deepspeed_config", "zero3.json"]}[other]  # fmt: skip
    ranks = [fork_rank(place, "launchers/pretrain.py", *words, *(different if place["RANK"] == "1" else []))
             for place in places(2)]  # fmt: skip
    ended = [rank.end() for rank in ranks]
    key = {"lr": "optim.lr = 0.001, rank 0 has ", "build": "data.shards digest = ",
           "zero": "ds.json's zero_optimization = {"}[other]  # fmt: skip
    assert [status for status, _ in ended] == [2, 2], ended
    assert f"error: rank 1 on {socket.gethostname()} has {key}" in ended[1][1]
    assert "give all hosts the same code, configs and shards" in ended[0][1]
    assert not (tmp_path / "run").exists()


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


@pytest.mark.slow
def test_a_fault_that_may_pass_restarts_under_torchrun(tmp_path):
    """Without waiting for a collective, whose patience is half an hour."""
    command = [Path(sys.executable).with_name("torchrun"), "--nproc-per-node=2", f"--master-port={free_port()}",
               RESTARTING, tmp_path / "marker", "memory"]  # fmt: skip
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "restart 1 of 2" in done.stderr
    assert sorted(done.stdout.splitlines()) == ["rank 0 is done", "rank 1 is done"]


@pytest.mark.slow
@pytest.mark.parametrize(("error", "status"), [("store", 0), ("input", 2)])
def test_a_store_out_of_reach_restarts_and_bad_input_does_not(tmp_path, error, status):
    ended = run_ranks(2, RESTARTING, tmp_path / "marker", error, check=False)
    assert [found for found, _ in ended] == [status] * 2, ended
    for rank, (_, said) in enumerate(ended):
        assert (f"rank {rank} is done\n" in said) == (status == 0), said
        assert ("restart 1 of 2" in said) == (status == 0), said


@contextmanager
def others_at(by: str, port: int) -> Iterator[Callable[[], None]]:
    """Somebody else listens at a port, until what it yields is called, or to the end."""
    if by == "store of another run":
        store = TCPStore("127.0.0.1", port, None, True, timedelta(seconds=60), wait_for_workers=False)
        store.set(distributed.RUN, "port 1, attempt 0, 2 ranks")
        yield lambda: None
        return
    with socket.create_server(("", port)) as server:
        if by == "closing server":  # else the kernel answers, and nothing ever reads
            Thread(target=hang_up, args=[server], daemon=True).start()
        yield lambda: server.shutdown(socket.SHUT_RDWR)


def hang_up(server: socket.socket) -> None:
    """On each that calls, until it is shut down itself."""
    with suppress(OSError), server:
        while True:
            server.accept()[0].close()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("by", "attempt"),
    [("silent server", 2), ("closing server", 2), ("closing server", 1), ("store of another run", 2)],
)
def test_ranks_that_find_the_port_of_a_restart_taken_stay_together(tmp_path, by, attempt):
    """For as long as they wait for each other; or for less, as they meet there once it is free."""
    seconds = 10 if attempt == 2 else 300
    port = free_port(3)
    with others_at(by, port + 1) as leave:
        ranks = [fork_rank(place | {"MASTER_PORT": str(port)}, RESTARTING, tmp_path / "marker", "memory", seconds)
                 for place in places(2)]  # fmt: skip
        said = f"port {port + 1} of this host is taken"
        while said not in Path(ranks[0].log.name).read_text() and ranks[0].process.poll() is None:
            time.sleep(0.2)
        if attempt == 1:
            leave()
        ended = [rank.end() for rank in ranks]
    assert said in ended[0][1]
    for rank, (status, said) in enumerate(ended):
        assert status == 0, said
        assert f"rank {rank} is done\n" in said
        assert f"restart {attempt} of 2" in said
        assert f"restart {attempt + 1} of 2" not in said


def test_a_port_that_is_taken_is_one_line():
    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]
        place = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        code = "from pipeline import distributed, errors\n"
        code += "def main():\n    with distributed.session(60, 0): pass\nerrors.run_cli(main)"
        env = os.environ | place
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True,
                              check=False)  # fmt: skip
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(said) == 1, done.stderr
    assert said[0].startswith(f"error: port {port} of this host is taken")
    assert "--master_port" in said[0]
    assert "Traceback" not in done.stderr
    assert done.returncode == 75


def test_the_demo_takes_a_free_port():
    done = subprocess.run(["make", "-n", "demo"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.count("deepspeed --num_gpus 2 --master_port $(python -c ") == 2, done.stdout


def test_a_rank_that_does_not_come_is_not_waited_for_as_long_as_a_collective():
    place = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    code = "from pipeline import distributed, errors\ndistributed.JOIN_SECONDS = 2.0\n"
    code += "def main():\n    with distributed.session(1800, 0): pass\nerrors.run_cli(main)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ | place,
                          capture_output=True, text=True,
                          timeout=600, check=False)  # fmt: skip
    assert done.returncode == 75
    assert "not all of the 2 ranks have come in 2 s" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("sign", "value"),
    [("device", ""), ("SLURM_JOB_GPUS", "0"), ("SLURM_STEP_GPUS", "0,1"), ("SLURM_GPUS_ON_NODE", "10")],
)
@pytest.mark.parametrize("visible", [None, "", "NoDevFiles"])
def test_a_host_with_gpus_that_torch_cannot_use_is_no_cpu_job(monkeypatch, tmp_path, sign, value, visible):
    for name in ("DS_ACCELERATOR", "CUDA_VISIBLE_DEVICES", "SLURM_JOB_GPUS", "SLURM_STEP_GPUS", "SLURM_GPUS_ON_NODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(distributed, "DEVICES", tmp_path)
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "0")
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    distributed._refuse_lost_gpus()
    if sign == "device":
        (tmp_path / "nvidia0").touch()
        if visible == "":  # a user asks for the CPU; in a Slurm job with GPUs it is a step that was given none
            distributed._refuse_lost_gpus()
            return
    else:
        monkeypatch.setenv(sign, value)
    with pytest.raises(UserError, match=r"torch cannot use them: .*DS_ACCELERATOR=cpu"):
        distributed._refuse_lost_gpus()
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    distributed._refuse_lost_gpus()


def alone(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Python code in a process of which no launcher has said that it is a rank."""
    names = ("RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_STEP_NUM_TASKS")
    kept = {name: value for name, value in os.environ.items() if name not in names}
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=kept | env, capture_output=True, text=True,
                          check=False)  # fmt: skip


def test_srun_without_an_address_is_refused():
    srun = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    done = alone("from pipeline.distributed import session\nwith session(60, 0): pass", **srun)
    assert "UserError: srun started 2 tasks, and MASTER_ADDR is not set" in done.stderr


def test_a_world_of_one_leaves_no_word_for_programs_that_are_started_later():
    """Else tasks that a script submits after its own session would all take themselves for rank 0."""
    code = (
        "import os\nfrom pipeline.distributed import session\n"
        "names = ('MASTER_ADDR', 'MASTER_PORT', 'RANK', 'WORLD_SIZE', 'LOCAL_RANK')\n"
        "for _ in range(2):\n"
        "    with session(60, 0) as world:\n"
        "        assert world.size == 1 and all(name in os.environ for name in names)\n"
        "    assert not any(name in os.environ for name in names)\n"
    )
    ran = alone(code)
    assert ran.returncode == 0, ran.stderr[-2000:]


def test_groups_that_are_made_later_wait_as_long_as_the_first():
    """DeepSpeed makes its own for the gradients: with nccl it ended a run after ten minutes, whatever its timeout."""
    code = (
        "import torch, torch.distributed as dist\nfrom pipeline.distributed import session\n"
        "with session(5000, 0):\n"
        "    own = dist.new_group()._get_backend(torch.device('cpu')).options._timeout\n"
        "    nccl = dist.distributed_c10d._get_default_timeout('nccl')\n"
        "    print(*(round(found.total_seconds()) for found in (own, nccl)))\n"
    )
    ran = alone(code)
    assert ran.stdout == "5060 5060\n", ran.stderr[-2000:]


@pytest.mark.parametrize(("tasks", "port"), [(None, "None"), ("1", "None"), ("2", "29500")])
def test_a_process_alone_in_a_batch_script_of_slurm_needs_no_port(tasks, port):
    """It has a SLURM_PROCID: with --max-restarts the second of two on a host waited minutes for the first's port."""
    step = {"SLURM_STEP_NUM_TASKS": tasks} if tasks else {}
    code = "import os\nfrom pipeline.faults import supervise\nsupervise(1)\nprint(os.environ.get('MASTER_PORT'))"
    ran = alone(code, SLURM_PROCID="0", **step)
    assert (ran.returncode, ran.stdout) == (0, f"{port}\n"), ran.stderr[-2000:]
