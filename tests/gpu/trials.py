"""Real engines on the checks' clips, any number of them one after the other in a process. For modes, resume, graphs.

In: settings, ds.json, one batch. Out: a `Trial`, which trains on that batch again and again: masks are keyed by the
clips' positions, so that losses of two trials differ by nothing but what is being compared.
"""

import copy
import gc
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from pipeline import distributed
from pipeline.command_line import read_deepspeed_config
from pipeline.config import CheckpointConfig, FinetuneRecipe, PretrainRecipe
from pipeline.data.loader import Loader
from pipeline.distributed import World
from pipeline.engine import checkpoint, parts
from pipeline.engine.checkpoint import Checkpoints
from pipeline.engine.setup import build_engine, reconcile
from pipeline.engine.step import accumulate, update_teacher
from pipeline.flow import Batch
from pipeline.recipes import load_recipe
from pipeline.tasks import PretrainTask, task_of
from tests.gpu.report import Check
from tests.ranks import ROOT, run_ranks

Recipe = PretrainRecipe | FinetuneRecipe
COMMON = ("optim.lr=5e-5", "optim.warmup=0", "log.mlflow=false", "log.pictures=0", "log.peak_tflops=null",
          "data.workers=0")  # fmt: skip
HALF = {precision: {"enabled": True} for precision in ("bf16", "fp16")}


def recipe_of(shards: Path, size: str, clips: int, *words: str) -> Recipe:
    """Words are settings, or a file such as pretrain/ssast180.yaml of configs/, whose model and batch are replaced."""
    files = [ROOT / "configs" / word for word in words if word.endswith(".yaml")]
    kind = FinetuneRecipe if any(word.startswith("finetune") for word in words) else PretrainRecipe
    own = [f"data.shards={shards}", f"model.size={size}", f"train.batch_size={clips}"]
    return load_recipe(kind, files, [*own, *COMMON, *(word for word in words if not word.endswith(".yaml"))])


def ds_of(file: str, stage: int | None = None, **sections: Any) -> dict[str, Any]:
    """A file of configs/deepspeed/ with another stage or other sections."""
    ds = read_deepspeed_config(file)
    zero = ds.get("zero_optimization", {})
    return ds | {"zero_optimization": zero | ({} if stage is None else {"stage": stage})} | sections


@contextmanager
def batch_of(recipe: Recipe, world: World) -> Iterator[tuple[Loader, Batch]]:
    """The loader, and the first training batch with both representations."""
    with Loader(recipe.data, batch_size=recipe.train.batch_size, device=world.device) as loader:
        # A copy: the loader's own memory is for the next batch.
        yield loader, copy.deepcopy(next(loader.batches(0, 1)))


class Trial:
    """A task in an engine.

    Args:
        recipe: Settings; weights are always the same ones.
        ds: Not yet reconciled.
        world: One rank.
        loader: Whose clips they are.
        batch: To train on.
        run_dir: Whose newest checkpoint is the beginning; None: begin afresh.

    Raises:
        UserError: `ds` is refused.
    """

    def __init__(self, recipe: Recipe, ds: dict[str, Any], world: World, loader: Loader, batch: Batch,
                 run_dir: Path | None = None) -> None:  # fmt: skip
        resolved, self.batches = _reconcile(ds, recipe, world)
        distributed.seed_host(0)
        self.world, self.batch, self.task = world, batch, task_of(recipe, loader)
        state = checkpoint.read_state(run_dir) if run_dir else None
        weights = dict(checkpoint.stored(run_dir, state, "weights")) if run_dir and state else {}
        if weights:
            self.task.load_state_dict(weights)
        self.engine = build_engine(self.task, recipe, resolved)
        self.step, self.norm = 0, 0.0
        if run_dir and state:
            checkpoint.restore(self.engine, run_dir, state, weights, world)
            self.step = state["step"]

    def train(self, steps: int, skips: int = 0) -> list[float]:
        """The loss before each update. Steps that fp16 skips are not among them, nor more of these than `skips`."""
        losses: list[float] = []
        last = self.step + steps + skips
        while len(losses) < steps and self.step < last:
            skipped = self.engine.skipped_steps
            named = accumulate(self.engine, self.task, self.batch, self.batches)
            self.engine.step()
            self.step += 1
            if self.engine.skipped_steps == skipped:
                if isinstance(self.task, PretrainTask):
                    update_teacher(self.task, 0.9)
                losses.append(float(named["loss"]))
        self.norm = float(self.engine.get_global_grad_norm() or 0.0)
        return losses

    def state(self) -> dict[str, torch.Tensor]:
        """Weights and moments, float32 on the host."""
        return parts.full_weights(self.engine) | parts.full_moments(self.engine, parts.spread(self.engine))

    def save(self, run_dir: Path) -> None:
        saver = Checkpoints(run_dir, CheckpointConfig(), self.world)
        saver.save(self.engine, {"step": self.step}, {})
        saver.finish()

    def end(self) -> None:
        """Gives the memory back."""
        self.engine.destroy()
        del self.engine, self.task
        gc.collect()
        if self.world.device.type == "cuda":
            torch.cuda.empty_cache()


def _reconcile(ds: dict[str, Any], recipe: Recipe, world: World) -> tuple[dict[str, Any], Any]:
    """As the product does; on the CPU, for the rehearsal, fp16 passes as well, which DeepSpeed and we refuse there."""
    if world.device.type != "cpu" or not ds.get("fp16", {}).get("enabled"):
        return reconcile(ds, recipe, world)
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True
    return reconcile(ds, recipe, replace(world, device=torch.device("meta")))


def difference(found: list[float], expected: list[float]) -> float:
    """The largest relative one; NaN where one of them is not finite, infinite where one is missing or there is none."""
    if len(found) != len(expected) or not found:
        return float("inf")
    errors = torch.tensor([abs(one - other) / abs(other) for one, other in zip(found, expected, strict=True)])
    return float(errors.max())


def different(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    """Names of tensors that are not the same, bit for bit."""
    return sorted(name for name in one.keys() | other.keys()
                  if name not in one or name not in other or not torch.equal(one[name], other[name]))  # fmt: skip


def processes(check: Check, jobs: list[tuple[Path, list[object]]], timeout: float) -> list[tuple[int, str]]:
    """Runs rank programs, six at a time on a GPU; (exit status, output) of each, in order.

    The rehearsal runs one at a time, as a fork, for the sake of the CPU.
    """

    def start(job: tuple[Path, list[object]]) -> tuple[int, str]:
        try:
            ((status, output),) = run_ranks(1, job[0], *job[1], check=False, timeout=timeout)
        except Exception as error:  # noqa: BLE001 - one that hangs is a result, and hides no other
            return -1, f"{type(error).__name__}: {error}"
        print(output, flush=True)
        return status, output

    os.environ["PYTHONSAFEPATH"] = "1"  # modules beside the program, such as trace, are not Python's own
    with ThreadPoolExecutor(1 if check.small else 6) as pool:
        return list(pool.map(start, jobs))


def last_line(output: str) -> str:
    """What a program that failed said at the end."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line]
    return (errors or lines or ["nothing said"])[-1][:300]
