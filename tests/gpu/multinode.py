"""Several nodes: do their ranks find each other, agree, and how fast do they talk? Some seconds, no data.

    sbatch --nodes=2 launchers/slurm.sbatch -m tests.gpu.multinode --out DIR
    deepspeed --hostfile configs/hostfile --module tests.gpu.multinode --out DIR
    torchrun --nnodes=2 --nproc-per-node=8 ... -m tests.gpu.multinode --out DIR

In: the launcher's environment. Out: on rank 0 lines `PASS|FAIL|INFO multinode.name values (limit)` as of
`python -m tests.gpu`, and DIR/results.jsonl; every rank exits 1 where a result failed.
"""

import argparse
import json
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812

from pipeline import distributed
from pipeline.distributed import World
from pipeline.errors import UserError, run_cli
from pipeline.objectives.contrastive import nt_xent_loss, swacl_loss
from tests.gpu.environment import median_seconds
from tests.gpu.report import Check

WIDTH, CLIPS = 768, 24  # of the contrast's vectors; of a rank
TEMPERATURE = 0.07
LIMIT = 1e-5  # of the contrast's gradients, relative
NAME_BYTES = 160


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory of the results; on rank 0's host")
    parser.add_argument("--local_rank", type=int, default=-1, help=argparse.SUPPRESS)  # given by the launcher
    args = parser.parse_args()
    with distributed.session(300, seed=0) as world:
        if world.size == 1:
            raise UserError("this is one process; start several ranks: see --help")
        small = world.device.type == "cpu"
        check = Check("multinode", args.out, args.out, small, max(1, torch.cuda.device_count()))
        report = _Report(check if world.is_main else None)
        if world.is_main:
            args.out.mkdir(parents=True, exist_ok=True)
            (args.out / "results.jsonl").unlink(missing_ok=True)
        _ranks(report, world)
        _order(report, world)
        _gradients(report, world)
        _bandwidth(report, world)
        _contrast_seconds(report, world)
        failed = distributed.broadcast(report.failed)
    sys.exit(1 if failed else 0)


class _Report:
    """Writes on rank 0, where it has a check; every rank calls it with the same values."""

    def __init__(self, check: Check | None) -> None:
        self._check = check

    def info(self, name: str, values: object) -> None:
        if self._check:
            self._check.info(name, values)

    def test(self, name: str, holds: bool, values: object, limit: str) -> None:
        if self._check:
            self._check.test(name, holds, values, limit)

    @property
    def failed(self) -> bool:
        if self._check is None:
            return False
        lines = [json.loads(line) for line in (self._check.out / "results.jsonl").open()]
        return any(line["status"] == "FAIL" for line in lines)


def _gather_text(text: str, world: World) -> list[str]:
    own = list(text.encode()[:NAME_BYTES].ljust(NAME_BYTES))
    rows = distributed.gather(torch.tensor([own], dtype=torch.uint8, device=world.device))
    return [bytes(row).decode(errors="replace").strip() for row in rows.tolist()]


def _largest(value: float, world: World) -> float:
    """Over the ranks."""
    return float(distributed.gather(torch.tensor([value], dtype=torch.float64, device=world.device)).max())


def _ranks(report: _Report, world: World) -> None:
    """Who is here, and that no two ranks share a GPU."""
    host = socket.gethostname()
    card, identity = "CPU", str(world.rank)
    if world.device.type == "cuda":
        card = torch.cuda.get_device_name(world.device)
        identity = str(getattr(torch.cuda.get_device_properties(world.device), "uuid", world.device.index))
    hosts, cards, identities = (_gather_text(text, world) for text in (host, card, identity))
    for rank, (name, kind) in enumerate(zip(hosts, cards, strict=True)):
        report.info(f"rank_{rank}", f"{name}, {kind}")
    places = set(zip(hosts, identities, strict=True))
    report.test("own_gpu", len(places) == world.size, f"{len(places)} devices on {len(set(hosts))} hosts for "
                                                      f"{world.size} ranks", "one each")  # fmt: skip


def _order(report: _Report, world: World) -> None:
    """`gather` gives rows in the order of ranks, in every type that is gathered; a sum has a part of each rank."""
    wrong = []
    for dtype in (torch.uint8, torch.int64, torch.bfloat16, torch.float32, torch.float64):
        own = torch.full((3, 2), world.rank % 100, dtype=dtype, device=world.device)
        expected = torch.arange(world.size, device=world.device).remainder(100).repeat_interleave(3)
        if not torch.equal(distributed.gather(own).long(), expected[:, None].expand(-1, 2)):
            wrong.append(str(dtype))
    ranks = _gather_text(",".join(wrong), world)
    found = {rank: words for rank, words in enumerate(ranks) if words}
    report.test("gather_order", not found, found or f"{world.size} ranks x 3 rows, 5 types", "rows in order of ranks")
    total = torch.full((1000,), float(world.rank + 1), device=world.device)
    dist.all_reduce(total)
    error = _largest(float((total - world.size * (world.size + 1) / 2).abs().max()), world)
    report.test("sum", error == 0, f"off by {error:g}", "exact")


def _gradients(report: _Report, world: World) -> None:
    """The ranks' contrast against torch's own cross entropy of the whole batch in float64, on each rank."""
    generator = torch.Generator().manual_seed(1)
    total = CLIPS * world.size
    wav, spec = (torch.randn(total, WIDTH, generator=generator, dtype=torch.float64).to(world.device) for _ in range(2))
    # Hardly alike: the gradient of pairs that are found is the difference of nearly equal numbers, all rounding.
    spec = spec + 0.1 * wav
    own = slice(CLIPS * world.rank, CLIPS * (world.rank + 1))
    for name, loss_of, whole in (
        ("swacl", lambda a, b: swacl_loss(a, b, temperature=TEMPERATURE, symmetric=True), _whole_swacl),
        ("nt_xent", lambda a, b: nt_xent_loss(a, b, temperature=TEMPERATURE), _whole_nt_xent),
    ):
        mine = [vectors[own].float().requires_grad_() for vectors in (wav, spec)]
        loss = loss_of(*mine)[0]
        gradients = torch.autograd.grad(loss, mine)
        every = [vectors.clone().requires_grad_() for vectors in (wav, spec)]
        expected = whole(*every)
        references = torch.autograd.grad(expected, every)
        errors = [float((found.double() / world.size - reference[own]).norm() / reference[own].norm())
                  for found, reference in zip(gradients, references, strict=True)]  # fmt: skip
        worst = _largest(max(errors), world)
        mean = distributed.mean({"loss": loss.detach()}, world.device)["loss"]
        off = abs(mean - float(expected.detach())) / float(expected.detach())
        report.test(f"gradients_{name}", max(worst, off) <= LIMIT,
                    f"gradients off by {worst:.2g}, loss by {off:.2g}, {total} clips", f"<= {LIMIT:g}")  # fmt: skip


def _whole_swacl(wav: torch.Tensor, spec: torch.Tensor) -> torch.Tensor:
    logits = F.normalize(wav, dim=1) @ F.normalize(spec, dim=1).T / TEMPERATURE
    own = torch.arange(len(wav), device=wav.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def _whole_nt_xent(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    views = F.normalize(torch.cat([first, second]), dim=1)
    own = torch.eye(len(views), dtype=torch.bool, device=views.device)
    logits = (views @ views.T / TEMPERATURE).masked_fill(own, -torch.inf)
    return F.cross_entropy(logits, torch.arange(len(views), device=views.device).roll(len(first)))


def _bandwidth(report: _Report, world: World) -> None:
    """Bytes a second that a rank sends in a ring: 2 (R - 1) / R of the tensor in an all-reduce's time."""
    sizes = (2**20, 2**23) if world.device.type == "cpu" else (64 * 2**20, 2**30)
    for size in sizes:
        tensor = torch.zeros(size // 4, device=world.device)
        seconds = _largest(_collective_seconds(lambda tensor=tensor: dist.all_reduce(tensor), world), world)
        sent = 2 * (world.size - 1) / world.size * size
        report.info(f"all_reduce_{size / 2**20:.0f}_mib", f"{sent / seconds / 1e9:.2f} GB/s, {1e3 * seconds:.2f} ms")


def _contrast_seconds(report: _Report, world: World) -> None:
    vectors = torch.randn(CLIPS, WIDTH, device=world.device, requires_grad=True)

    def contrast() -> None:
        swacl_loss(vectors, vectors, temperature=TEMPERATURE, symmetric=False)[0].backward()

    for name, work in (("gather", lambda: distributed.gather(vectors)), ("contrast", contrast)):
        seconds = _largest(_collective_seconds(work, world), world)
        report.info(name, f"{1e6 * seconds:.0f} us for {CLIPS} vectors of {WIDTH} a rank")


def _collective_seconds(work: Callable[[], object], world: World) -> float:
    distributed.barrier()
    return median_seconds(work, world.device)


if __name__ == "__main__":
    run_cli(main)
