"""What ranks say to each other: collectives, the contrast over ranks, and how all end where one fails or is killed.

In: nothing. Out: nccl with one rank, and with all of the host's GPUs where there are several; gloo with tensors on one
GPU that two ranks share; seconds from a fault to the end of the last rank, and what the ranks say of it.

Ranks run `tests.gpu.collective_rank`.
"""

import json
import time
from pathlib import Path
from typing import Any

from tests.gpu.report import Check
from tests.ranks import Rank, fork_ranks

ON_CPU = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
CONTRAST_LIMIT = 1e-5
START_SECONDS, END_SECONDS = 120.0, 60.0
FAULT_STATUS = 70


def run(check: Check) -> None:
    own = ON_CPU if check.small else {}
    backend = "gloo" if check.small else "nccl"
    check.attempt(f"{backend}_1", session, f"{backend}_1", 1, own)
    check.attempt("shared_gpu", shared, own)
    # The words go through a store beside the group: on the CPU, too, they must end the ranks.
    check.attempt("exception_cpu", exception, "exception_cpu", 2, ON_CPU)
    check.attempt("killed_cpu", killed, "killed_cpu", 2, ON_CPU)
    if check.gpus >= 2 and not check.small:
        check.attempt("nccl_all", session, "nccl_all", check.gpus, {})
        check.attempt("exception_nccl", exception, "exception_nccl", check.gpus, {})
        check.attempt("killed_nccl", killed, "killed_nccl", check.gpus, {})
    elif check.small:
        check.attempt("gloo_2", session, "gloo_2", 2, own)


def session(check: Check, name: str, ranks: int, env: dict[str, str]) -> None:
    """The collectives of `pipeline.distributed`, and the contrast."""
    for number, said in enumerate(_together(check, name, ranks, env, "session")):
        title = f"{name}.rank_{number}"
        wrong = [truth for truth, holds in said["truths"].items() if not holds]
        check.test(title, not wrong, f"{said['backend']} on {said['device']}: {', '.join(said['truths'])}; wrong: "
                   f"{', '.join(wrong) or 'none'}; barrier {said['waited']:.2f} s", "all right")  # fmt: skip
        if number == 0:
            _contrast(check, name, said)


def shared(check: Check, env: dict[str, str]) -> None:
    """Two ranks of one GPU, which nccl refuses: gloo moves the tensors over the host."""
    said = _together(check, "shared_gpu", 2, env, "gloo")
    operations = {name: [one["operations"][name] for one in said] for name in said[0]["operations"]}
    check.test("shared_gpu.operations", all("wrong" not in words for words in operations.values()),
               f"gloo on {said[0]['device']}: {operations}", "none is wrong")  # fmt: skip
    _contrast(check, "shared_gpu", said[0])


def _contrast(check: Check, name: str, said: dict[str, Any]) -> None:
    values = "; ".join(f"{loss}: gradients {gradients:.2g}, loss {value:.2g}"
                       for loss, (gradients, value) in said["contrast"].items())  # fmt: skip
    good = all(error <= CONTRAST_LIMIT for errors in said["contrast"].values() for error in errors)
    check.test(f"{name}.contrast", good, f"from one process's: {values}", f"<= {CONTRAST_LIMIT:g}")


def _together(check: Check, name: str, ranks: int, env: dict[str, str], kind: str) -> list[dict[str, Any]]:
    """What each rank wrote; raises RuntimeError with the end of the first failing rank's output."""
    out = _folder(check, name)
    started = fork_ranks(ranks, "-m", "tests.gpu.collective_rank", kind, out, **env)
    try:
        for number, rank in enumerate(started):
            status, output = rank.end(START_SECONDS)
            (out / f"rank-{number}.log").write_text(output)
            if status:
                raise RuntimeError(f"rank {number} ended with {status}: {output[-250:]}")
    finally:
        for rank in started:
            rank.process.kill()
    return [json.loads((out / f"rank-{number}.json").read_text()) for number in range(ranks)]


def exception(check: Check, name: str, ranks: int, env: dict[str, str]) -> None:
    """The last rank raises while the others wait for it."""
    failing = ranks - 1
    seconds, ends = _until_all_ended(check, name, ranks, env, "fail", failing)
    reason = f"rank {failing} on "
    told = [number for number, (_, output) in enumerate(ends)
            if any(reason in line and "OutOfMemoryError: no memory for 3 GiB" in line
                   for line in output.splitlines() if line.startswith("error: "))]  # fmt: skip
    statuses = [status for status, _ in ends]
    check.test(name, seconds <= END_SECONDS and len(told) == ranks and statuses == [FAULT_STATUS] * ranks,
               f"all ended {seconds:.1f} s after the fault, statuses {statuses}, ranks that name it {told}",
               f"<= {END_SECONDS:g} s, {FAULT_STATUS}, all")  # fmt: skip


def killed(check: Check, name: str, ranks: int, env: dict[str, str]) -> None:
    """The last rank is gone without a word; what watches the ranks names it after two thirds of run.timeout."""
    failing, timeout = ranks - 1, 9 if check.small or env is ON_CPU else 45
    seconds, ends = _until_all_ended(check, name, ranks, env, "killed", failing, timeout)
    statuses = [status for status, _ in ends]
    lines = [line for _, output in ends for line in output.splitlines() if line.startswith("error: ")]
    named = any(f"rank {failing} on " in line for line in lines)
    check.test(name, seconds <= END_SECONDS and named and 0 not in statuses,
               f"all ended {seconds:.1f} s after the kill, statuses {statuses}, said: {' | '.join(lines)[:300]}",
               f"<= {END_SECONDS:g} s, named")  # fmt: skip


def _until_all_ended(check: Check, name: str, ranks: int, env: dict[str, str], kind: str, *words: int) -> tuple[
        float, list[tuple[int, str]]]:  # fmt: skip
    """Seconds between the fault and the end of the last rank, and each rank's status and output."""
    out = _folder(check, name)
    started = fork_ranks(ranks, "-m", "tests.gpu.collective_rank", kind, out, *words, **env)
    try:
        _wait_until(started, START_SECONDS)
        ended = time.time()
    finally:
        for rank in started:
            rank.process.kill()
    ends = [rank.end() for rank in started]
    for number, (_, output) in enumerate(ends):
        (out / f"rank-{number}.log").write_text(output)
    if not (out / "failed").exists():
        raise RuntimeError(f"no rank came as far as its fault: {ends[0][1][-250:]}")
    return ended - float((out / "failed").read_text()), ends


def _wait_until(ranks: list[Rank], seconds: float) -> None:
    """Until all have ended, or this long."""
    end = time.monotonic() + seconds
    while any(rank.process.poll() is None for rank in ranks) and time.monotonic() < end:
        time.sleep(0.05)


def _folder(check: Check, name: str) -> Path:
    folder = check.out / name
    folder.mkdir(exist_ok=True)
    for file in folder.iterdir():
        if file.is_file():
            file.unlink()
    return folder
