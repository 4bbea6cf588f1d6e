"""Where a run of an ablation is launched: on this machine, or by Slurm.

In: a command for one process, ranks. Out: handles that are polled. Both executors run the launchers as a
user would, so a run started by hand can be taken over and the other way round.
"""

import fcntl
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pipeline.ablation.grid import ROOT
from pipeline.errors import UserError

GRACE_SECONDS = 90.0  # a trainer that is told to stop saves first
QUEUE_SECONDS = 10.0  # between two questions to Slurm's queue


class Handle(Protocol):
    """A launched run."""

    def poll(self) -> int | None:
        """Exit status; None while it runs."""

    def stop(self) -> None:
        """Asks it to save and end; does not wait."""

    def wait(self, seconds: float) -> None:
        """Waits that long for the end, then kills it."""


class Executor(Protocol):
    """Launches runs."""

    def start(self, run_dir: Path, script: str, words: list[str]) -> Handle | None:
        """Starts `launchers/SCRIPT words` in `run_dir`; None where another process holds that directory."""

    def slots(self) -> int:
        """Runs at a time."""


@dataclass
class LocalHandle:
    """A process group on this machine."""

    process: subprocess.Popen[bytes]
    release: Callable[[], None]

    def poll(self) -> int | None:
        """Exit status; None while it runs."""
        status = self.process.poll()
        if status is not None:
            self.release()
        return status

    def stop(self) -> None:
        """SIGTERM to the launcher, which hands it on to its ranks."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)

    def wait(self, seconds: float) -> None:
        """Waits that long for the end, then kills the group."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self.release()


class LocalExecutor:
    """Runs on this machine, `jobs` at a time.

    The GPUs are split evenly between the jobs. A lock on `RUN_DIR/lock`, inherited by the launched
    processes, outlives this process: a run whose ablate.py was killed is never started twice.

    Args:
        jobs: Runs at a time.
        ranks: Of each run; 0: its share of the GPUs, or 1.
        gpus: GPUs of this machine.
        launchers: Directory of pretrain.py and finetune.py.
    """

    def __init__(self, jobs: int, ranks: int, gpus: int, launchers: Path = ROOT / "launchers") -> None:
        self._jobs = jobs
        self._launchers = launchers
        share = gpus // jobs
        if gpus and ranks > share:
            raise UserError(f"--jobs {jobs} leaves {share} of {gpus} GPUs a run, --ranks is {ranks}; lower one of them")
        self._ranks = ranks or max(1, share)
        self._free = [list(range(job * share, job * share + self._ranks)) if gpus else [] for job in range(jobs)]

    def slots(self) -> int:
        """Runs at a time."""
        return self._jobs

    def start(self, run_dir: Path, script: str, words: list[str]) -> Handle | None:
        """Starts `launchers/SCRIPT words` with its output in RUN_DIR/output.log."""
        lock = (run_dir / "lock").open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.close()
            return None
        devices = self._free.pop()
        command = [str(self._launchers / script), *words]
        if self._ranks > 1:
            where = ["--include", f"localhost:{','.join(map(str, devices))}"] if devices else [
                "--num_gpus", str(self._ranks)]  # fmt: skip
            launcher = str(Path(sys.executable).with_name("deepspeed"))
            command = [launcher, *where, "--master_port", str(_free_port()), *command]
        else:
            command.insert(0, sys.executable)
        env = dict(os.environ)
        if devices and self._ranks == 1:
            env["CUDA_VISIBLE_DEVICES"] = str(devices[0])
        if not devices:
            env.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // (self._jobs * self._ranks))))
        with (run_dir / "output.log").open("ab") as output:
            process = subprocess.Popen(
                command, env=env, stdout=output, stderr=output, stdin=subprocess.DEVNULL,
                start_new_session=True, pass_fds=[lock.fileno()],
            )  # fmt: skip

        def release() -> None:
            if not lock.closed:
                lock.close()
                self._free.append(devices)

        return LocalHandle(process, release)


class SlurmRank:
    """What submitit runs in each task of a job: one rank of a launcher. Pre-empted, it is queued again."""

    def __init__(self, run_dir: Path, script: str, words: list[str]) -> None:
        self.run_dir = run_dir.resolve()
        self.command = [sys.executable, str(ROOT / "launchers" / script), *words]

    def __call__(self) -> None:
        """Joins the other tasks' process group by the environment, and trains.

        Raises:
            RuntimeError: the launcher did not exit with 0; its own output says why.
        """
        import submitit

        job = submitit.helpers.TorchDistributedEnvironment().export(overwrite=True, set_cuda_visible_devices=False)
        env = os.environ | {"LOCAL_SIZE": str(job.local_world_size)}
        with (self.run_dir / ("output.log" if job.rank == 0 else f"output-{job.rank}.log")).open("ab") as output:
            process = subprocess.Popen(self.command, env=env, stdout=output, stderr=output)
            signal.signal(signal.SIGTERM, lambda number, frame: process.send_signal(signal.SIGTERM))
            status = process.wait()
        if status:
            raise RuntimeError(f"exit status {status}: {' '.join(self.command)}")

    def checkpoint(self) -> Any:
        """Submitit's hook at pre-emption: the same command again; the launcher goes on by itself."""
        import submitit

        return submitit.helpers.DelayedSubmission(self)


@dataclass
class SlurmHandle:
    """A job of submitit.

    Attributes:
        job: The job.
        asked: When the queue was last asked for it.
    """

    job: Any
    asked: float = 0.0

    def poll(self) -> int | None:
        """0 or 1; None while it is queued or runs."""
        if not self.job.done():
            return 1 if self._gone() else None
        return 0 if all(task.exception() is None for task in self._tasks()) else 1

    def stop(self) -> None:
        """Cancels it; Slurm sends SIGTERM first."""
        self.job.cancel(check=False)

    def wait(self, seconds: float) -> None:
        """Waits that long for it to leave the queue."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.job.watcher.get_state(self.job.job_id, mode="force") in (
            "RUNNING", "PENDING", "COMPLETING",
        ):  # fmt: skip
            time.sleep(1.0)

    def _gone(self) -> bool:
        """Not in the queue any more, and no result: submitit asks sacct, which a cluster without accounting has not."""
        if self.job.state != "UNKNOWN" or time.monotonic() - self.asked < QUEUE_SECONDS:
            return False
        self.asked = time.monotonic()
        queue = ["squeue", "--noheader", "--jobs", str(self.job.job_id)]
        listed = subprocess.run(queue, capture_output=True, text=True, check=False)
        gone = "Invalid job id" in listed.stderr or (listed.returncode == 0 and not listed.stdout.strip())
        return gone and not self.job.done(force_check=True)

    def _tasks(self) -> list[Any]:
        return [self.job.task(number) for number in range(self.job.num_tasks)]


class SlurmExecutor:
    """Jobs through submitit, one task a rank. A job that outlived ablate.py is found again by its id.

    Args:
        out: Directory of the ablation; submitit's files go to its `slurm/`.
        jobs: Jobs in the queue at a time.
        ranks: Tasks of each job, over `nodes`.
        nodes: Of each job.
        options: Further options of sbatch by name, such as partition, time, gpus-per-node.
        cluster: submitit's name: "slurm", or "local" to try it without one.
    """

    def __init__(
        self, out: Path, jobs: int, ranks: int, nodes: int, options: dict[str, str], cluster: str = "slurm"
    ) -> None:
        import submitit

        logging.getLogger("submitit").setLevel(logging.ERROR)  # it warns at each look at a cluster without accounting
        ranks = max(1, ranks)
        if ranks % nodes:
            raise UserError(f"--ranks {ranks} does not divide by --nodes {nodes}; give a multiple")
        self._jobs = jobs
        self._cluster = cluster
        self._folder = out.resolve() / "slurm"
        try:
            self._executor = submitit.AutoExecutor(folder=self._folder, cluster=cluster)
        except RuntimeError as error:
            raise UserError(f"--executor slurm: {error}; run it where sbatch is") from error
        self._executor.update_parameters(
            name="craft", nodes=nodes, tasks_per_node=ranks // nodes, timeout_min=int(options.pop("timeout_min", 1440))
        )
        if cluster == "slurm":
            self._executor.update_parameters(slurm_additional_parameters=options)

    def slots(self) -> int:
        """Jobs in the queue at a time."""
        return self._jobs

    def start(self, run_dir: Path, script: str, words: list[str]) -> Handle | None:
        """Submits it, or finds the job that an earlier ablate.py submitted and that is still there."""
        import submitit

        note = run_dir / "slurm.json"
        if note.exists() and self._cluster == "slurm":
            job: Any = submitit.SlurmJob(self._folder, **json.loads(note.read_text(encoding="utf-8")))
            if not job.done(force_check=True) and (handle := SlurmHandle(job)).poll() is None:
                return handle
        job = self._executor.submit(SlurmRank(run_dir, script, words))
        known = {"job_id": job.job_id, "tasks": list(range(job.num_tasks))}
        note.write_text(json.dumps(known), encoding="utf-8")
        return SlurmHandle(job)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
