"""torch.compile of the encoder's blocks: how many graphs, what they compute, what they save.

In: compile.json; in the rehearsal its backend is "aot_eager", which compiles no C++. Out: graphs and breaks of methods
whose blocks see other numbers of clips and tokens, losses against those without compilation, and the ratio of a step's
seconds. Why a graph was compiled again is in output.log.

torch compiles a function anew for each kind of input that it has not met, at most `recompile_limit` times: after that
it runs uncompiled, and says so in a warning alone.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
from torch._dynamo.utils import counters

from pipeline import distributed
from pipeline.distributed import World
from pipeline.engine.step import accumulate
from tests.gpu.environment import median_seconds
from tests.gpu.report import Check
from tests.gpu.trials import HALF, Trial, batch_of, difference, ds_of, recipe_of

METHODS = {
    "pswacl": (),
    "craft_mosaic": ("pretrain/craft_mosaic.yaml",),  # two numbers of visible tokens in one step
    "swab": ("finetune.method=swab", "finetune.mask_time=0.3", "model.drop_path=0.2"),
}


def run(check: Check) -> None:
    torch._logging.set_logs(recompiles=True, graph_breaks=True)
    with distributed.session(300, seed=0) as world:
        for name, words in METHODS.items():
            _part(check, name, lambda name=name, words=words: _count(check, name, words, world))  # type: ignore[misc]
        _part(check, "speed", lambda: _speed(check, world))


def _part(check: Check, name: str, work: Callable[[], None]) -> None:
    torch._dynamo.reset()
    counters.clear()
    with check.part(name):
        work()


def _ds(check: Check, compiled: bool) -> dict[str, Any]:
    """bf16 at ZeRO 2; in the rehearsal float32, which must agree to the last bits."""
    section = {"enabled": compiled} | ({"backend": "aot_eager"} if check.small else {})
    return ds_of("compile.json", compile=section, bf16={"enabled": False} if check.small else HALF["bf16"])


def _count(check: Check, name: str, words: tuple[str, ...], world: World) -> None:
    """Graphs of two rounds of training and evaluating; the second must need no further one."""
    clips = 4 if check.small else 8
    recipe = recipe_of(Path(check.shards), check.size, clips, *words)
    with batch_of(recipe, world) as (loader, batch):
        eager = Trial(recipe, _ds(check, False), world, loader, batch)
        expected, norm = eager.train(3), eager.norm
        eager.end()
        trial = Trial(recipe, _ds(check, True), world, loader, batch)
        blocks = len(trial.task.model.encoder.blocks)
        losses: list[float] = []
        graphs, seconds = [0], []
        for _ in range(2):
            begun = time.perf_counter()
            losses += trial.train(3)
            trial.engine.eval()
            for size in (clips, clips - 1, clips // 2):  # the last batch of an evaluation, and another eval.batch_size
                with torch.no_grad():
                    named = trial.engine(batch[:size]).named
                assert bool(named["loss"].isfinite())
            trial.engine.train()
            seconds.append(time.perf_counter() - begun)
            graphs.append(counters["stats"]["unique_graphs"])
        found = trial.norm
        trial.end()
    breaks = "; ".join(str(reason).splitlines()[0] for reason in counters["graph_break"])
    limit = torch._dynamo.config.recompile_limit
    check.test(f"{name}_graphs", 0 < graphs[1] <= limit,
               f"{graphs[1]} graphs for {blocks} blocks in {seconds[0]:.1f} s", f"1 to {limit}")  # fmt: skip
    check.test(f"{name}_recompiles", graphs[2] == graphs[1], f"{graphs[2] - graphs[1]} in the second round, which took "
               f"{seconds[1]:.2f} s", "0")  # fmt: skip
    check.test(f"{name}_graph_breaks", not counters["graph_break"], breaks or "0", "0")
    first, later = (1e-5, 1e-5) if check.small else (1e-2, 4e-2)  # bf16 rounds each update of a weight
    errors = difference(losses[:1], expected[:1]), difference(losses[:3], expected)
    ours, theirs = (" ".join(f"{loss:.6g}" for loss in some) for some in (losses[:3], expected))
    check.test(f"{name}_losses", errors[0] <= first and errors[1] <= later,
               f"{errors[0]:.2g} at first, {errors[1]:.2g} at most: {ours} and {theirs}, gradient norms {found:.4g} "
               f"after six steps, {norm:.4g} after three",
               f"relative, <= {first:g} before an update, <= {later:g} after")  # fmt: skip


def _speed(check: Check, world: World) -> None:
    """Seconds of a step with and without compilation, of base on a GPU."""
    size, clips = ("micro", 4) if check.small else ("base", 24)
    recipe, seconds = recipe_of(Path(check.shards), size, clips), {}
    with batch_of(recipe, world) as (loader, batch):
        for compiled in (False, True):
            trial = Trial(recipe, _ds(check, compiled), world, loader, batch)
            begun = time.perf_counter()
            trial.train(1)
            first = time.perf_counter() - begun

            def step(trial: Trial = trial) -> None:
                accumulate(trial.engine, trial.task, trial.batch, trial.batches)
                trial.engine.step()

            seconds[compiled] = median_seconds(step, check.device, *((3, 1) if check.small else (10, 3)))
            check.info("compiled_step" if compiled else "eager_step",
                       f"{size}, {clips} clips: {seconds[compiled] * 1e3:.1f} ms, the first {first:.1f} s")  # fmt: skip
            trial.end()
    check.info("step_ratio", f"{seconds[True] / seconds[False]:.3f} of the seconds without compilation")
