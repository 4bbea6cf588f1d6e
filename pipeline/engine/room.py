"""A device without room for a run, a step or an evaluation: one line with what would fit, in place of a traceback.

In: torch's error, and the run. Out: a `UserError` that names the setting.
"""

import psutil
import torch

from pipeline import distributed
from pipeline.distributed import World
from pipeline.engine import plan
from pipeline.engine.job import Job
from pipeline.errors import UserError

LESS = "bf16, ZeRO 3 (--deepspeed_config zero3.json), its offload (offload3.json)"


def no_room_to_begin(error: torch.OutOfMemoryError, job: Job, world: World) -> UserError:
    """Says what the plan expects a rank to hold before its first clip.

    Args:
        error: Of building the engine or of loading a checkpoint.
        job: Of the run.
        world: Ranks.
    """
    stage = job.ds["zero_optimization"]["stage"]
    states = plan.memory(_cost(job), stage, world.size, 0).total
    return UserError(
        f"weights and optimiser at ZeRO {stage}: {_lack(error, world)}; the plan expects {states / 1e9:.1f} GB a rank "
        f"before the first clip: where the device has that, end what else runs on it, else try {LESS} or more GPUs",
        local=True,
    )


def no_room_to_train(error: torch.OutOfMemoryError, job: Job, world: World) -> UserError:
    """Names the largest micro-batch that the plan expects to fit, below the one that did not.

    Args:
        error: Of a step.
        job: Of the run.
        world: Ranks.
    """
    cost = _cost(job)
    stage, room = job.ds["zero_optimization"]["stage"], plan.ROOM * _memory(world)
    share, micro = job.batches.micro * job.batches.accumulation, job.batches.micro
    smaller = [size for size in range(micro - 1, 0, -1) if share % size == 0]
    fits = next((size for size in smaller if plan.memory(cost, stage, world.size, size).total <= room), 0)
    remedy = (
        f"give train.micro_batch={fits}, the largest that the plan expects to fit; results do not depend on it"
        if fits else
        f"no smaller one is expected to fit; try {LESS}, model.checkpoint_activations=true or more GPUs"
    )  # fmt: skip
    return UserError(f"train.micro_batch = {micro}: {_lack(error, world)}; {remedy}", local=True)


def no_room_to_evaluate(error: torch.OutOfMemoryError, size: int, world: World) -> UserError:
    """Names half of the evaluation's batch.

    Args:
        error: Of an evaluation.
        size: Clips of its steps, over all ranks.
        world: Ranks.
    """
    remedy = f"give eval.batch_size={max(1, size // 2)}" if size > world.size else "take a GPU with more memory"
    return UserError(f"eval.batch_size = {size}: {_lack(error, world)}; {remedy}", local=True)


def _cost(job: Job) -> plan.Cost:
    """Of a step with the run's longest clips."""
    shape = max((shape for shape, _ in job.shapes), key=lambda shape: shape.samples)
    half = [precision for precision in ("bf16", "fp16") if job.ds[precision]["enabled"]]
    with distributed.alone():  # the other ranks wait in a collective
        return plan.record(job.recipe, shape, half[0] if half else "fp32")


def _lack(error: torch.OutOfMemoryError, world: World) -> str:
    name = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "this host"
    return f"{name}, {_memory(world) / 1e9:.1f} GB, has no room for it ({' '.join(str(error).split())[:200]})"


def _memory(world: World) -> int:
    """Bytes of this rank's device."""
    if world.device.type == "cuda":
        return int(torch.cuda.get_device_properties(world.device).total_memory)
    return int(psutil.virtual_memory().total)
