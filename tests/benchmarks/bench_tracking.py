"""What tracking costs a training step, at one log per step: with stores that are well, slow, hanging and dead.

    python -m tests.benchmarks.bench_tracking [--rounds 2] [--steps 50] [--batch 8]

In: nothing. Out: a table on stdout. A step is forward, backward and Adam of PSWaCL's micro model on 2 s clips, on one
thread. Phases of steps that log 14 numbers each alternate with phases that log nothing, in one process:

- call: time inside `tracker.metrics`, a step; beside it its share of an untracked step.
- delivery: CPU time of the thread that delivers, for each step, and its share of an untracked step's CPU time: the most
  that it can hold the interpreter's lock while training wants it. Other programs on the machine do not blur it.
- step: how much longer a whole step takes than in the untracked phases before and after it: mean over rounds and its
  standard error. `none` against `none` is the measure's own noise.
- waits: records that the store had not taken at the end of the phase.

The store is SQLite in this process (the default), a real server, that server behind a door that holds every piece of
an answer for a second, a door that never answers, and a port where nobody listens.
"""

import argparse
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch

from pipeline.config import LogConfig, PretrainRecipe
from pipeline.flow import Batch
from pipeline.recipes import load_recipe
from pipeline.tasks import PretrainTask
from pipeline.tracking import Tracker, open_tracker
from pipeline.tracking.spool import Spool
from pipeline.tracking.store import load_mlflow
from tests.lab import process
from tests.ranks import free_port

SLOW_SECONDS = 1.0
NUMBERS = ("loss", "infonce", "mse", "spec_accuracy", "spec_mse", "contrast", "contrast_accuracy", "bad_clips", "lr",
           "grad_norm", "skipped_steps", "clips_per_second", "data_wait_fraction", "mfu")  # fmt: skip


def training(batch_size: int, seconds: float = 2.0) -> Callable[[int], None]:
    """A step, as a function of its number."""
    torch.manual_seed(0)
    recipe = load_recipe(PretrainRecipe, [], ["model.size=micro"])
    frames = round(seconds * 100) // 16 * 16
    task = PretrainTask(recipe, 128, frames)
    optimiser = torch.optim.Adam(task.parameters(), lr=1e-4)
    waveform, features = 0.1 * torch.randn(batch_size, frames * 160), torch.randn(batch_size, frames, 128)
    row = torch.arange(batch_size)

    def step(number: int) -> None:
        batch = Batch(row + number * batch_size, row, row >= 0, waveform, features, torch.zeros(batch_size, 2))
        task(batch).total.backward()
        optimiser.step()
        optimiser.zero_grad()

    return step


def phase(step: Callable[[int], None], tracker: Tracker, steps: int) -> tuple[float, list[float]]:
    """Seconds a step, and inside each call of the tracker."""
    calls = []
    begun = time.perf_counter()
    for number in range(1, steps + 1):
        step(number)
        values = dict.fromkeys(NUMBERS, number + 0.5)
        before = time.perf_counter()
        tracker.metrics(values, number)
        calls.append(time.perf_counter() - before)
    return (time.perf_counter() - begun) / steps, calls


def delivery_cpu() -> float:
    """Seconds of CPU of the threads that deliver."""
    threads = {thread.native_id for thread in threading.enumerate() if thread.name == "mlflow"}
    return sum(t.user_time + t.system_time for t in psutil.Process().threads() if t.id in threads)


def tracked_phase(
    step: Callable[[int], None], uri: str, folder: Path, steps: int
) -> tuple[float, list[float], int, float]:
    """A phase with a tracker of its own, which is thrown away with what it has not delivered."""
    folder.mkdir(parents=True)
    config = LogConfig(uri=uri.replace("FOLDER", str(folder.parents[1])), finish_wait=0.0)
    tracker = open_tracker(config, folder, name="bench", rank=0, kind="pretrain", parent=None)
    before = delivery_cpu()
    seconds, calls = phase(step, tracker, steps)
    cpu = (delivery_cpu() - before) / steps
    feed = Spool(folder).metrics
    left = feed.left
    tracker.finish("FINISHED")
    deadline = time.monotonic() + 15  # a store that is well takes the rest before the next phase
    while feed.waiting and "sqlite" in uri and time.monotonic() < deadline:
        time.sleep(0.1)
    whole = folder / "whole"
    whole.write_text(str(feed.lines.stat().st_size))
    whole.replace(feed.offset)  # the thread finds nothing left, and ends
    while any(thread.name == "mlflow" for thread in threading.enumerate()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return seconds, calls, left, cpu


def door(port: int, target: int, delay: float) -> None:
    """Passes a server's answers on, each piece late; a negative delay passes nothing."""

    def copy(source: socket.socket, sink: socket.socket, wait: float) -> None:
        while data := source.recv(1 << 16):
            time.sleep(wait)
            sink.sendall(data)

    def serve(caller: socket.socket) -> None:
        if delay < 0:
            time.sleep(3600)
        server = socket.create_connection(("127.0.0.1", target))
        threading.Thread(target=copy, args=(server, caller, delay), daemon=True).start()
        copy(caller, server, 0.0)

    with socket.create_server(("127.0.0.1", port)) as entrance:
        while True:
            threading.Thread(target=serve, args=(entrance.accept()[0],), daemon=True).start()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2, help="of which the mean counts (default: 2)")
    parser.add_argument("--steps", type=int, default=50, help="of a phase (default: 50)")
    parser.add_argument("--batch", type=int, default=8, help="clips of a step (default: 8)")
    parser.add_argument("--door", nargs=3, type=float, help=argparse.SUPPRESS)  # the process of a door
    args = parser.parse_args()
    if args.door:
        door(int(args.door[0]), int(args.door[1]), args.door[2])
    torch.set_num_threads(1)
    load_mlflow()
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        port, late, never = free_port(), free_port(), free_port()
        server = [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1",
                  "--backend-store-uri", f"sqlite:///{folder}/server.db",
                  "--artifacts-destination", str(folder / "artifacts")]  # fmt: skip
        doors = [[sys.executable, "-m", "tests.benchmarks.bench_tracking", "--door", str(at), str(port), str(delay)]
                 for at, delay in ((late, SLOW_SECONDS), (never, -1.0))]  # fmt: skip
        env = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "PYTHONPATH": os.getcwd()}
        with process(server, folder / "server.log", f"http://127.0.0.1:{port}/health", env):
            opened = [subprocess.Popen(command) for command in doors]
            try:
                stores = {"sqlite": "sqlite:///FOLDER/mlflow.db", "server": f"http://127.0.0.1:{port}",
                          "slow server": f"http://127.0.0.1:{late}", "hanging server": f"http://127.0.0.1:{never}",
                          "dead server": f"http://127.0.0.1:{free_port()}"}  # fmt: skip
                measure(training(args.batch), stores, folder / "runs", args.rounds, args.steps)
            finally:
                for one in opened:
                    one.kill()
                    one.wait()


def measure(step: Callable[[int], None], stores: dict[str, str], folder: Path, rounds: int, steps: int) -> None:
    """Runs the phases and prints the table."""
    phase(step, Tracker(), steps)  # warms up
    slower: dict[str, list[float]] = {"none": [], **{name: [] for name in stores}}
    calls: dict[str, list[float]] = {name: [] for name in slower}
    left: dict[str, list[int]] = {name: [] for name in slower}
    cpu: dict[str, list[float]] = {name: [] for name in slower}
    begun = time.thread_time()
    phase(step, Tracker(), steps)
    usual_cpu = (time.thread_time() - begun) / steps
    for name in ("sqlite", "server"):  # makes the tables
        tracked_phase(step, stores[name], folder / "first" / name, 2)
    plain = [phase(step, Tracker(), steps)[0]]
    for number in range(rounds):
        for name in slower:
            if name == "none":
                seconds, inside = phase(step, Tracker(), steps)
                waits, spent = 0, 0.0
            else:
                run_dir = folder / f"{number}" / name.replace(" ", "-")
                seconds, inside, waits, spent = tracked_phase(step, stores[name], run_dir, steps)
            plain.append(phase(step, Tracker(), steps)[0])
            slower[name].append(seconds / statistics.mean(plain[-2:]) - 1)
            calls[name] += inside
            left[name].append(waits)
            cpu[name].append(spent)
    usual = statistics.median(plain)
    print(f"untracked step {1000 * usual:.1f} ms; {rounds} rounds of {steps} steps, {len(NUMBERS)} numbers each")
    print("store           call us (longest)  share of step   delivery us  share of step   step longer by     waits")
    for name, ratios in slower.items():
        error = statistics.stdev(ratios) / rounds**0.5 if rounds > 1 else float("nan")
        mean = statistics.mean(calls[name])
        print(f"{name:14s} {1e6 * mean:8.0f} ({1e6 * max(calls[name]):6.0f}) {mean / usual:13.3%} "
              f"{1e6 * statistics.mean(cpu[name]):12.0f} {statistics.mean(cpu[name]) / usual_cpu:13.2%} "
              f"{statistics.mean(ratios):9.1%} +- {error:.1%} {statistics.mean(left[name]):8.1f}")  # fmt: skip


if __name__ == "__main__":
    main()
