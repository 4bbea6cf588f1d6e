"""How much of the hardware a run uses: the MFU, against a peak that is given or measured.

In: settings and the throughput. Out: a share. MFU = FLOPs the model needs (`plan.model_flops`) x clips a
second / (ranks x FLOP/s of one rank's matmuls at their best); what is computed twice does not count as use.

Cost: at the start half a second for the FLOPs and less than one for the matmuls; nothing in the steps.
"""

import logging
import time
from typing import Any

import torch

from pipeline import distributed
from pipeline.config import FinetuneRecipe, PretrainRecipe
from pipeline.distributed import World
from pipeline.engine.plan import Shape, model_flops

log = logging.getLogger(__name__)

SIDES = (1024, 2048, 4096, 8192)  # of the matrices; a larger one only where the last took less than ENOUGH
ENOUGH = 0.02  # seconds of one matmul, against launch and clock
TRIALS = 5


def precision(ds: dict[str, Any]) -> torch.dtype:
    """In what the run multiplies matrices, by its reconciled ds.json."""
    if ds["bf16"]["enabled"]:
        return torch.bfloat16
    return torch.float16 if ds["fp16"]["enabled"] else torch.float32


def measure_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of square matmuls on this rank, the best of a few, with the other ranks busy as in training."""
    generator = torch.Generator(device).manual_seed(0)  # leaves the run's own alone
    best = 0.0
    for side in SIDES:
        left, right = torch.randn(2, side, side, dtype=dtype, device=device, generator=generator)
        shortest = min(_seconds(left, right) for _ in range(TRIALS + 1))
        best = max(best, 2 * side**3 / shortest)
        if shortest > ENOUGH:
            break
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the training needs the room
    return best


def _seconds(left: torch.Tensor, right: torch.Tensor) -> float:
    _wait(left.device)
    start = time.perf_counter()
    torch.matmul(left, right)
    _wait(left.device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def clips_per_second_at_peak(
    recipe: PretrainRecipe | FinetuneRecipe, shape: Shape, ds: dict[str, Any], world: World
) -> float | None:
    """Clips a second of all ranks if they did nothing but the model's FLOPs at their peak; a collective.

    Equal on all ranks: of the measured peaks the mean counts. None with `log.peak_tflops` = null.
    """
    given = recipe.log.peak_tflops
    if given is None:
        return None
    dtype = precision(ds)
    peak = given * 1e12 or distributed.mean({"peak": measure_peak(world.device, dtype)}, world.device)["peak"]
    flops = model_flops(recipe, shape)
    log.info(
        "MFU against %.3g TFLOP/s a rank (%s, %s); %.3g GFLOP a clip",
        peak / 1e12, str(dtype).removeprefix("torch."), "given" if given else "measured", flops / 1e9,
    )  # fmt: skip
    return world.size * peak / flops
