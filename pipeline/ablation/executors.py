"""Where a run of an ablation is launched: on this machine, or by Slurm.

In: a run directory, a launcher's name and words. Out: exit statuses, which are polled. Both executors run the launchers
as a user would, so a run started by hand can be taken over and the other way round.

On this machine it is not submitit's local executor: that one does not find a job again whose submitter was killed, does
not tell exit statuses apart, and at Ctrl-C kills within a second a trainer that has yet to save.
"""

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO

from pipeline.ablation.grid import ROOT
from pipeline.errors import UserError
from pipeline.files import lock, write_json

GRACE_SECONDS = 90.0  # a trainer that is told to stop saves first
CPUS = "8"  # a rank's in Slurm: its own and those of its readers
SAVE_SECONDS = 180  # for a step, an evaluation's batch and a checkpoint before a job's time is over
QUEUE_SECONDS = 10.0  # between two questions to Slurm's queue


class LocalExecutor:
    """Runs on this machine, `jobs` at a time.

    The GPUs are split evenly between the jobs. A lock on `RUN_DIR/lock`, inherited by the launched
    processes, outlives this process: a run whose ablate.py was killed is never started twice.

    Args:
        jobs: Runs at a time.
        ranks: Of each run; 0: its share of the GPUs, or 1.
        gpus: GPUs that torch sees: those of CUDA_VISIBLE_DEVICES, or without it of this machine.
        launchers: Directory of pretrain.py and finetune.py.

    Attributes:
        jobs: Runs at a time.
        ranks: Of each run.

    Raises:
        UserError: too few GPUs; or they have names that deepspeed does not take.
    """

    def __init__(self, jobs: int, ranks: int, gpus: int, launchers: Path = ROOT / "launchers") -> None:
        share = gpus // jobs
        self.jobs, self.ranks, self._launchers = jobs, ranks or max(1, share), launchers
        if gpus and self.ranks > share:
            raise UserError(
                f"--jobs {jobs} leaves {share} of {gpus} GPUs a run, which has {self.ranks} ranks; lower --jobs or "
                "--ranks"
            )
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = [name.strip() for name in visible.split(",")] if visible else [str(number) for number in range(gpus)]
        if self.ranks > 1 and not all(name.isdecimal() for name in names[:gpus]):
            raise UserError(
                f"CUDA_VISIBLE_DEVICES={visible}: deepspeed takes GPUs by number alone; name them so, or give --ranks 1"
            )
        self._free = [names[:gpus][job * share : job * share + self.ranks] for job in range(jobs)]
        self._running: dict[Path, tuple[subprocess.Popen[bytes], BinaryIO, list[str]]] = {}

    def start(self, run_dir: Path, script: str, words: list[str]) -> bool:
        """Starts `launchers/SCRIPT words`, output in RUN_DIR/output.log; False: another process holds the directory."""
        held = (run_dir / "lock").open("wb")
        if not lock(held.fileno(), wait=False):
            held.close()
            return False
        devices = self._free.pop()
        command = [str(self._launchers / script), *words]
        if self.ranks > 1:
            where = ["--include", f"localhost:{','.join(devices)}"] if devices else [
                "--num_gpus", str(self.ranks)]  # fmt: skip
            launcher = str(Path(sys.executable).with_name("deepspeed"))
            command = [launcher, *where, "--master_port", str(_free_port()), *command]
        else:
            command.insert(0, sys.executable)
        env = dict(os.environ)
        if devices and self.ranks > 1:
            env.pop("CUDA_VISIBLE_DEVICES", None)  # --include numbers the machine's GPUs, not those of the variable
        elif devices:
            env["CUDA_VISIBLE_DEVICES"] = devices[0]
        else:
            env.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // (self.jobs * self.ranks))))
        with (run_dir / "output.log").open("ab") as output:
            process = subprocess.Popen(
                command, env=env, stdout=output, stderr=output, stdin=subprocess.DEVNULL,
                start_new_session=True, pass_fds=[held.fileno()],
            )  # fmt: skip
        self._running[run_dir] = process, held, devices
        return True

    def poll(self, run_dir: Path) -> int | None:
        """Exit status; None while it runs."""
        process, held, devices = self._running[run_dir]
        status = process.poll()
        if status is not None:
            del self._running[run_dir]
            held.close()
            self._free.append(devices)
        return status

    def stop(self, run_dirs: Iterable[Path]) -> None:
        """Tells runs to save and end: SIGTERM to their launchers, which hand it on to the ranks; in the end SIGKILL."""
        processes = {run_dir: self._running[run_dir][0] for run_dir in run_dirs}
        for process in processes.values():
            process.terminate()
        for run_dir, process in processes.items():
            try:
                process.wait(GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            self.poll(run_dir)


class SlurmRank:
    """What submitit runs in each task of a job: one rank of a launcher.

    Pre-empted, or at the end of its time, the launcher saves and leaves, and then the job is queued again.
    """

    def __init__(self, run_dir: Path, script: str, words: list[str]) -> None:
        self.run_dir = run_dir.resolve()
        self.command = [sys.executable, str(ROOT / "launchers" / script), *words]

    def __call__(self) -> None:
        """Joins the other tasks' process group by the environment, and trains.

        Submitit's signal would otherwise end this process at once, or with some of Slurm's plugins the launcher, which
        does not know it: nothing since its last checkpoint would be saved.

        Raises:
            RuntimeError: the launcher did not exit with 0; its own output says why.
        """
        import submitit

        job = submitit.helpers.TorchDistributedEnvironment().export(overwrite=True, set_cuda_visible_devices=False)
        env = os.environ | {"LOCAL_SIZE": str(job.local_world_size)}
        preempted = submitit.JobEnvironment._usr_sig()
        told: list[int] = []

        def stop(number: int, frame: FrameType | None) -> None:
            told.append(number)
            process.send_signal(signal.SIGTERM)

        queue_again: Any = signal.signal(preempted, signal.SIG_IGN)  # which the launcher inherits
        with (self.run_dir / ("output.log" if job.rank == 0 else f"output-{job.rank}.log")).open("ab") as output:
            process = subprocess.Popen(self.command, env=env, stdout=output, stderr=output)
            for number in (preempted, signal.SIGTERM):
                signal.signal(number, stop)
            status = process.wait()
        if status and preempted in told:
            queue_again(preempted, None)  # in the task of rank 0 this is the end; the others wait for Slurm to end them
            end = time.monotonic() + GRACE_SECONDS
            while signal.SIGTERM not in told and time.monotonic() < end:
                time.sleep(1.0)
            sys.exit(status)  # no error, which submitit would keep as this task's result
        if status:
            raise RuntimeError(f"exit status {status}: {' '.join(self.command)}")

    def checkpoint(self) -> Any:
        """Submitit's hook at pre-emption: the same command again; the launcher goes on by itself."""
        import submitit

        return submitit.helpers.DelayedSubmission(self)


class SlurmExecutor:
    """Jobs through submitit, one task a rank. A job that outlived ablate.py is found again by its id.

    Args:
        out: Directory of the ablation; submitit's files go to its `slurm/`.
        jobs: Jobs in the queue at a time.
        ranks: Tasks of each job, over `nodes`.
        nodes: Of each job.
        options: Further options of sbatch by name, such as partition and time. Without an option for them a job asks
            for as many GPUs per node as it has ranks there ("gpus-per-node": "0": for none), and for CPUS per task.
        cluster: submitit's name: "slurm", or "local" to try it without one.

    Attributes:
        jobs: Jobs in the queue at a time.
        ranks: Of each run.
    """

    def __init__(
        self, out: Path, jobs: int, ranks: int, nodes: int, options: dict[str, str], cluster: str = "slurm"
    ) -> None:
        import submitit

        logging.getLogger("submitit").setLevel(logging.ERROR)  # it warns at each look at a cluster without accounting
        ranks = max(1, ranks)
        if ranks % nodes:
            raise UserError(f"--ranks {ranks} does not divide by --nodes {nodes}; give a multiple")
        self.jobs, self.ranks = jobs, ranks
        self._running: dict[Path, Any] = {}
        self._asked: dict[Path, float] = {}  # when the queue was last asked for a run
        self._cluster = cluster
        self._folder = out.resolve() / "slurm"
        try:
            self._executor = submitit.AutoExecutor(folder=self._folder, cluster=cluster)
        except RuntimeError as error:
            raise UserError(f"--executor slurm: {error}; run it where sbatch is") from error
        options = {name.replace("_", "-"): value for name, value in options.items()}
        minutes = options.pop("timeout-min", "1440")
        if not minutes.isdecimal() or not int(minutes):
            raise UserError(f"--slurm timeout-min={minutes}: give a whole number of minutes")
        self._executor.update_parameters(
            name="craft", nodes=nodes, tasks_per_node=ranks // nodes, timeout_min=int(minutes)
        )
        if cluster == "slurm":
            self._executor.update_parameters(slurm_signal_delay_s=SAVE_SECONDS)
            if not options.keys() & {"gpus", "gpus-per-node", "gpus-per-task", "gres", "tres-per-task"}:
                options["gpus-per-node"] = str(ranks // nodes)
            cpus = options.setdefault("cpus-per-task", CPUS)
            self._executor.update_parameters(
                slurm_additional_parameters=options,
                slurm_srun_args=[f"--cpus-per-task={cpus}"],  # since 22.05 srun does not take it from sbatch
            )

    def start(self, run_dir: Path, script: str, words: list[str]) -> bool:
        """Submits it, or finds the job that an earlier ablate.py submitted and that is still there.

        Raises:
            UserError: sbatch refuses the job.
        """
        import submitit

        note = run_dir / "slurm.json"
        if note.exists() and self._cluster == "slurm":
            job: Any = submitit.SlurmJob(self._folder, **json.loads(note.read_text(encoding="utf-8")))
            self._running[run_dir] = job
            if not job.done(force_check=True) and self.poll(run_dir) is None:
                return True
        try:
            job = self._executor.submit(SlurmRank(run_dir, script, words))
        except submitit.core.utils.FailedJobError as error:
            raise UserError(
                f"--executor slurm: {' '.join(str(error).split())}; change the job with --slurm KEY=VALUE, such as "
                "gpus-per-node=0 where there are no GPUs, or cpus-per-task=4"
            ) from error
        write_json(note, {"job_id": job.job_id, "tasks": list(range(job.num_tasks))})
        self._running[run_dir] = job
        return True

    def poll(self, run_dir: Path) -> int | None:
        """0 or 1; None while it is queued or runs."""
        job = self._running[run_dir]
        if not job.done():
            return 1 if self._gone(run_dir, job) else None
        return 0 if all(job.task(number).exception() is None for number in range(job.num_tasks)) else 1

    def stop(self, run_dirs: Iterable[Path]) -> None:
        """Cancels the jobs: Slurm sends SIGTERM first, and they save; waits a bounded time until they are gone."""
        jobs = [self._running[run_dir] for run_dir in run_dirs]
        for job in jobs:
            job.cancel(check=False)
        for job in jobs:
            end = time.monotonic() + GRACE_SECONDS
            while time.monotonic() < end and job.watcher.get_state(job.job_id, mode="force") in (
                "RUNNING", "PENDING", "COMPLETING",
            ):  # fmt: skip
                time.sleep(1.0)

    def _gone(self, run_dir: Path, job: Any) -> bool:
        """Not in the queue any more, and no result: submitit asks sacct, which a cluster without accounting has not."""
        if job.state != "UNKNOWN" or time.monotonic() - self._asked.get(run_dir, -QUEUE_SECONDS) < QUEUE_SECONDS:
            return False
        self._asked[run_dir] = time.monotonic()
        queue = ["squeue", "--noheader", "--jobs", str(job.job_id)]
        listed = subprocess.run(queue, capture_output=True, text=True, check=False)
        gone = "Invalid job id" in listed.stderr or (listed.returncode == 0 and not listed.stdout.strip())
        return gone and not job.done(force_check=True)


Executor = LocalExecutor | SlurmExecutor


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
