"""Peak memory of a training step against the plan's (`pipeline.engine.plan.memory`), of tensors on the GPU.

In: nothing. Out: a line for each method, ZeRO stage and precision, with both micro-batches: gigabytes planned and
measured; what torch reserved beside that, and what the card lacks then (with CUDA's own context).

The rehearsal counts the bytes of all tensors on the CPU instead, of a micro model, under a loose limit.
"""

import itertools
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial

import torch

from pipeline import distributed
from pipeline.config import FinetuneRecipe, PretrainRecipe
from pipeline.distributed import World
from pipeline.engine import plan
from pipeline.engine.plan import Cost, LiveBytes
from pipeline.recipes import load_recipe
from tests.benchmarks.bench_step import batch_of
from tests.gpu.report import Check
from tests.gpu.steps import finetuning, shape_of, size_of, training
from tests.ranks import ROOT

STAGES = (1, 2)
PRECISIONS = ("bf16", "fp32")
REHEARSED = (("pswacl", 2, "bf16"), ("craft_mae", 1, "fp32"), ("finetuning", 1, "fp32"))
LIMIT, LOOSE = 0.15, 0.5  # of what is measured; on the GPU and in the rehearsal


def run(check: Check) -> None:
    micro_batches = [2] if check.small else [12, 48]
    recipes = _recipes(check, micro_batches[0])
    # A record takes some seconds of the CPU; meanwhile the GPU works. No forks of a process that uses one.
    with ProcessPoolExecutor(len(recipes) * 2, multiprocessing.get_context("spawn")) as pool:
        costs: dict[tuple[str, str], Callable[[], Cost]] = {}
        for name, recipe in recipes.items():
            for precision in PRECISIONS:
                record = partial(plan.record, recipe, shape_of(check), precision)
                costs[name, precision] = record if check.small else pool.submit(record).result
        cells = itertools.product(recipes, STAGES, PRECISIONS)
        with distributed.session(300, seed=0) as world:
            for name, stage, precision in cells:
                if check.small and (name, stage, precision) not in REHEARSED:
                    continue
                with check.part(f"{name}_zero{stage}_{precision}"):
                    measured = _measure(check, world, recipes[name], stage, precision, micro_batches)
                    _compare(check, f"{name}_zero{stage}_{precision}", costs[name, precision](), stage, measured)


def _recipes(check: Check, clips: int) -> dict[str, PretrainRecipe | FinetuneRecipe]:
    words = [f"model.size={size_of(check)}", f"train.batch_size={clips}"]
    folder = ROOT / "configs" / "pretrain"
    return {"pswacl": load_recipe(PretrainRecipe, [folder / "pswacl180.yaml"], words),
            "craft_mae": load_recipe(PretrainRecipe, [folder / "craft_mae.yaml"], words),
            "finetuning": finetuning(check, clips)}  # fmt: skip


def _measure(
    check: Check, world: World, recipe: PretrainRecipe | FinetuneRecipe, stage: int, precision: str, sizes: list[int]
) -> dict[int, tuple[float, float, float] | None]:
    """Micro-batch -> bytes at most of tensors, reserved, and missing on the card; None: more than the card has."""
    shape, device = shape_of(check), world.device
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    found: dict[int, tuple[float, float, float] | None] = {}
    live = LiveBytes() if device.type == "cpu" else None
    with live or nullcontext(), training(recipe, shape, world, stage, precision == "bf16") as run:
        for clips in sizes:
            batch = batch_of(clips, shape, device)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            elif live:
                live.peak = 0
            try:
                for _ in range(2):  # the first one makes the moments
                    run.step(batch)
            except torch.OutOfMemoryError:
                found[clips] = None
                break
            if live:
                found[clips] = float(live.peak), 0.0, 0.0
                continue
            torch.cuda.synchronize(device)
            left, total = torch.cuda.mem_get_info(device)
            found[clips] = (float(torch.cuda.max_memory_allocated(device) - before),
                            float(torch.cuda.max_memory_reserved(device)), float(total - left))  # fmt: skip
    return found


def _compare(
    check: Check, title: str, cost: Cost, stage: int, measured: dict[int, tuple[float, float, float] | None]
) -> None:  # fmt: skip
    limit = LOOSE if check.small else LIMIT
    words, holds = [], True
    for clips, numbers in measured.items():
        planned = plan.memory(cost, stage, 1, clips)
        parts = ", ".join(f"{name} {value / 1e9:.2f}" for name, value in asdict(planned).items())
        if numbers is None:  # agrees with the plan where that is as large as the card
            room = float(torch.cuda.get_device_properties(0).total_memory)
            holds &= planned.total > (1 - limit) * room
            words.append(f"{clips}: planned {planned.total / 1e9:.2f} GB, more than the card's {room / 1e9:.2f}")
            continue
        tensors, reserved, used = numbers
        own = planned.total - planned.context  # of torch's tensors
        holds &= abs(own / tensors - 1) <= limit
        words.append(f"{clips}: planned {own / 1e9:.2f} GB / measured {tensors / 1e9:.2f} = {own / tensors:.2f}, "
                     f"reserved {reserved / 1e9:.2f}, used {used / 1e9:.2f} ({parts})")  # fmt: skip
    check.test(title, holds, "; ".join(words), f"within {limit:.0%}")
