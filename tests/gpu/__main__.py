"""Everything that a CPU cannot prove of this product, checked on a machine with GPUs; meant to take ten minutes.

    python -m tests.gpu --out DIR [--only CHECK ...] [--gpus N] [--jobs N]

Each check is a module of tests/gpu with a `run(check)`, and runs in a process of its own under a limit of its own.
Out: a line `PASS|FAIL|INFO check.name values (limit)` for each result; DIR/report.json with all of them, versions and
seconds; DIR/CHECK/output.log; a trace in DIR/trace. Exit 1 where a check failed, also one that broke or ran too long.

It needs torch, DeepSpeed, pydantic, pyarrow, soundfile, soxr and av; neither MLflow nor WebDataset, submitit or an
ffmpeg program. Without a GPU it stops with exit 2, unless DS_ACCELERATOR=cpu asks for the rehearsal: the same checks,
small, on the CPU, which says that they work and nothing about GPUs.

Checks of correctness run --jobs at a time, then those that measure, one by one.
"""

import argparse
import importlib
import json
import os
import platform
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from pipeline.errors import UserError, run_cli
from tests.gpu.report import Check, line_of
from tests.helpers import synth_shards
from tests.ranks import ROOT, Fork, can_fork

# Check -> seconds it may take on a GPU.
PROVING = {"environment": 60, "kernels": 180, "loader": 180, "collectives": 240, "modes": 420, "resume": 420,
           "graphs": 300}  # fmt: skip
MEASURING = {"speed": 420, "memory": 240, "trace": 180, "evaluation": 240}
CHECKS = PROVING | MEASURING
MISSING = "torch finds no GPU here; set DS_ACCELERATOR=cpu to rehearse the checks on the CPU"


def main() -> None:
    args = _arguments()
    small = os.environ.get("DS_ACCELERATOR") == "cpu"
    if not small and not torch.cuda.is_available():
        raise UserError(MISSING)
    check = Check(args.check or "", args.out / args.check if args.check else args.out, args.out / "shards", small,
                  args.gpus)  # fmt: skip
    if args.check:
        sys.exit(run(check))
    args.out.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    if not (check.shards / "manifest.json").exists():
        synth_shards(check.shards, 80, 1.0, 16) if small else synth_shards(check.shards, 240, 10.0, 48, workers=4)
    chosen = args.only or list(CHECKS)
    with ThreadPoolExecutor(args.jobs) as pool:
        seconds = dict(pool.map(lambda name: (name, start(check, name)), [n for n in PROVING if n in chosen]))
    seconds |= {name: start(check, name) for name in MEASURING if name in chosen}
    lines = [json.loads(line) for name in chosen for line in (args.out / name / "results.jsonl").open()]
    failed = [line for line in lines if line["status"] == "FAIL"]
    report = {"machine": platform.node(), "python": platform.python_version(), "torch": torch.__version__,
              "device": "cpu" if small else torch.cuda.get_device_name(), "gpus": 0 if small else args.gpus,
              "seconds": seconds | {"all": round(time.monotonic() - begun, 1)}, "results": lines}  # fmt: skip
    (args.out / "report.json").write_text(json.dumps(report, indent=1))
    for line in failed:
        print(line_of(line))
    counts = {status: sum(line["status"] == status for line in lines) for status in ("PASS", "FAIL", "INFO")}
    print(", ".join(f"{count} {status}" for status, count in counts.items()), f"in {report['seconds']['all']} s")
    sys.exit(1 if failed else 0)


def start(check: Check, name: str) -> float:
    """Runs one check in a process; returns its seconds."""
    folder = check.out / name
    folder.mkdir(exist_ok=True)
    results = folder / "results.jsonl"
    results.unlink(missing_ok=True)
    limit = CHECKS[name] * (3 if check.small else 1)
    words = ["-m", "tests.gpu", "--out", str(check.out), "--check", name, "--gpus", str(check.gpus)]
    begun = time.monotonic()
    with (folder / "output.log").open("w") as log:
        process: Fork | subprocess.Popen[bytes]
        if check.small and can_fork():
            process = Fork(words, dict(os.environ), log.name, log.name)
        else:
            process = subprocess.Popen([sys.executable, *words], cwd=ROOT, stdout=log, stderr=log,
                                       start_new_session=True)  # fmt: skip
        try:
            process.wait(limit)
            reason = f"exit {process.returncode}; see {log.name}" if process.returncode else ""
        except subprocess.TimeoutExpired:
            reason = f"more than {limit} s; see {log.name}"
            process.kill() if isinstance(process, Fork) else os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if results.exists():
        print("".join(line_of(json.loads(line)) + "\n" for line in results.open()), end="")
    if reason:
        Check(name, folder, check.shards, check.small, check.gpus).test("end", False, reason, "exit 0")
    seconds = round(time.monotonic() - begun, 1)
    print(f"     {name} took {seconds} s", flush=True)
    return seconds


def run(check: Check) -> int:
    """In the process of a check."""
    with check.part("end"):
        importlib.import_module(f"tests.gpu.{check.name}").run(check)
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=lambda text: Path(text).resolve(), required=True, help="directory of the report")
    parser.add_argument("--only", nargs="+", choices=list(CHECKS), metavar="CHECK", help=", ".join(CHECKS))
    gpus = max(1, torch.cuda.device_count())
    parser.add_argument("--gpus", type=int, default=gpus, help="(default: all of the host)")
    parser.add_argument("--jobs", type=int, default=1, help="checks of correctness at a time (default: 1)")
    parser.add_argument("--check", choices=list(CHECKS), help=argparse.SUPPRESS)  # the process of one
    return parser.parse_args()


if __name__ == "__main__":
    run_cli(main)
