"""Program: one rank of the check `collectives`, which reads OUT/rank-N.json; KIND OUT and further words:

    session OUT            the collectives of pipeline.distributed, and the gradients of a contrast
    gloo OUT               the same contrast in a plain group of gloo with tensors on the first GPU, which ranks share
    fail OUT RANK          that rank raises while the others wait for it in a collective
    killed OUT RANK SECS   that rank kills itself; the others are watched with run.timeout = SECS

A rank that fails or is killed writes the time to OUT/failed before.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pipeline import distributed
from pipeline.errors import run_cli
from pipeline.objectives.contrastive import Gather, nt_xent_loss, swacl_loss

CLIPS, WIDTH, OUTPUTS = 24, 96, 64  # clips of a rank
STEPS = 5


def main() -> None:
    kind, out, words = sys.argv[1], Path(sys.argv[2]), sys.argv[3:]
    {"session": session, "gloo": gloo, "fail": fail, "killed": killed}[kind](out, *map(int, words))


def session(out: Path) -> None:
    with distributed.session(120, seed=0) as world:
        device, own, size = world.device, world.rank, world.size
        rows = torch.arange(6, device=device).view(3, 2) + 100 * own
        every = torch.cat([torch.arange(6).view(3, 2) + 100 * rank for rank in range(size)])
        truths = {"gather": torch.equal(distributed.gather(rows).cpu(), every)}
        means = distributed.mean({"a": float(own), "b": torch.tensor(2.0 * own, device=device)}, device)
        truths["mean"] = means == {"a": (size - 1) / 2, "b": size - 1.0}
        truths["any_rank"] = (distributed.any_rank(own == size - 1, device), distributed.any_rank(False, device)) == (
            True, False)  # fmt: skip
        truths["broadcast"] = distributed.broadcast([own, "x" * 1000]) == [0, "x" * 1000]
        truths["decide"] = distributed.decide(lambda: distributed.rank() + 7) == 7
        agreement = distributed.Agreement()
        steps = [agreement.exchange(step, own) for step in range(STEPS)]
        truths["agreement"] = [*steps, agreement.take(), agreement.take()] == [
            None, *([step, size - 1] for step in range(STEPS)), None]  # fmt: skip
        began = time.monotonic()
        time.sleep(0.3 * (own == 0))
        distributed.barrier()
        if device.type == "cuda":
            torch.cuda.synchronize()
        waited = time.monotonic() - began
        truths["barrier"] = waited >= 0.25  # for rank 0
        _write(out, own, {"backend": dist.get_backend(), "device": str(device), "truths": truths, "waited": waited,
                          "contrast": contrast(device, own, size, distributed.gather)})  # fmt: skip
        distributed.barrier()


def gloo(out: Path) -> None:
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    own, size = dist.get_rank(), dist.get_world_size()
    said: dict[str, str] = {}
    for name, work in _operations(device, own, size).items():
        try:
            said[name] = "right" if work() else "wrong"
        except RuntimeError as error:  # gloo has it for no CUDA tensors
            said[name] = str(error).splitlines()[0][:80]
    gather: Gather = distributed.gather
    if said["all_gather"] not in ("right", "wrong"):

        def gather(local: torch.Tensor) -> torch.Tensor:
            return distributed.gather(local.cpu()).to(device)

    _write(out, own, {"backend": "gloo", "device": str(device), "operations": said,
                      "contrast": contrast(device, own, size, gather)})  # fmt: skip
    dist.barrier()
    dist.destroy_process_group()


def fail(out: Path, rank: int) -> None:
    with distributed.session(1800, seed=0) as world:
        for step in range(10**9):
            if step == STEPS and world.rank == rank:
                (out / "failed").write_text(str(time.time()))
                raise torch.OutOfMemoryError("no memory\nfor 3 GiB")
            distributed.any_rank(False, world.device)


def killed(out: Path, rank: int, seconds: int) -> None:
    (out / "logs").mkdir(exist_ok=True)
    with distributed.session(1800, seed=0) as world, world.faults.watch(out, seconds):
        for step in range(10**9):
            world.faults.at(step, "step")
            if step == STEPS and world.rank == rank:
                (out / "failed").write_text(str(time.time()))
                os.kill(os.getpid(), signal.SIGKILL)
            distributed.any_rank(False, world.device)


def _operations(device: torch.device, own: int, size: int) -> dict[str, Callable[[], bool]]:
    total = size * (size - 1) / 2

    def all_reduce() -> bool:
        value = torch.full((3,), float(own), device=device)
        dist.all_reduce(value)
        return value.tolist() == [total] * 3

    def all_gather() -> bool:
        return distributed.gather(torch.full((1,), own, device=device)).tolist() == list(range(size))

    def broadcast() -> bool:
        value = torch.full((3,), float(own + 1), device=device)
        dist.broadcast(value, src=0)
        return value.tolist() == [1.0] * 3

    def maximum() -> bool:
        return distributed.any_rank(own == size - 1, device)

    return {"all_reduce": all_reduce, "all_gather": all_gather, "broadcast": broadcast, "maximum": maximum}


def contrast(device: torch.device, own: int, size: int, gather: Gather) -> dict[str, list[float]]:
    """||ours - one process's|| / ||one process's||, of the loss and of the gradient of two shared weights.

    One process takes the clips of all ranks at once, on the same device.
    """
    torch.set_float32_matmul_precision("highest")
    losses: dict[str, Callable[..., tuple[torch.Tensor, torch.Tensor]]] = {
        "swacl": lambda a, b, *to: swacl_loss(a, b, *to, temperature=0.1, symmetric=False),
        "swacl_symmetric": lambda a, b, *to: swacl_loss(a, b, *to, temperature=0.1, symmetric=True),
        "nt_xent": lambda a, b, *to: nt_xent_loss(a, b, *to, temperature=0.1),
    }
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(2, size * CLIPS, WIDTH, generator=generator).to(device)
    inputs[1] += inputs[0]  # views that know of each other
    weights = (torch.randn(2, WIDTH, OUTPUTS, generator=generator) / WIDTH**0.5).to(device)
    part = slice(own * CLIPS, (own + 1) * CLIPS)
    found = {}
    for name, loss in losses.items():
        mine, whole = weights.clone().requires_grad_(), weights.clone().requires_grad_()
        value, _ = loss(*(inputs[:, part] @ mine), gather, own)
        value.backward()
        expected, _ = loss(*(inputs @ whole), lambda local: local.detach(), 0)
        expected.backward()
        assert mine.grad is not None
        assert whole.grad is not None
        average = torch.cat([mine.grad.flatten(), value.detach()[None]])
        dist.all_reduce(average)
        average /= size
        errors = [(average[:-1] - whole.grad.flatten()).norm() / whole.grad.norm(),
                  (average[-1] - expected.detach()).abs() / expected.detach().abs()]  # fmt: skip
        found[name] = [float(error) for error in errors]
    return found


def _write(out: Path, own: int, content: dict[str, Any]) -> None:
    (out / f"rank-{own}.json").write_text(json.dumps(content))


if __name__ == "__main__":
    run_cli(main)
