"""What the checks that measure share: steps of the product's task in its engine, on clips made of noise, and clocks.

In: a recipe and a world. Out: a `Training`; seconds, bytes, and what a trace says of the device.
"""

import gzip
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.command_line import read_deepspeed_config
from pipeline.config import FinetuneRecipe, PretrainRecipe
from pipeline.distributed import World
from pipeline.engine.plan import Shape
from pipeline.engine.setup import Batches, build_engine, reconcile
from pipeline.engine.step import accumulate, update_teacher
from pipeline.flow import Batch
from pipeline.recipes import load_recipe
from pipeline.tasks import FinetuneTask, PretrainTask
from tests.engine.memory import resident
from tests.gpu.report import Check

DEVICE_WORK = ("kernel", "gpu_memcpy", "gpu_memset")  # categories of events in a trace
TEACHER_DECAY = 0.999


def shape_of(check: Check) -> Shape:
    """10 s of AudioSet; in the rehearsal 1.3 s."""
    return Shape(20_480, 128, 128, 20) if check.small else Shape()


def size_of(check: Check) -> str:
    return "micro" if check.small else "base"


@dataclass(frozen=True)
class Training:
    """A task in its engine; `step` takes a batch of any size."""

    task: PretrainTask | FinetuneTask
    engine: Any

    def step(self, batch: Batch) -> None:
        accumulate(self.engine, self.task, batch, Batches(len(batch), len(batch), 1))
        self.engine.step()
        if isinstance(self.task, PretrainTask):
            update_teacher(self.task, TEACHER_DECAY)


@contextmanager
def training(
    recipe: PretrainRecipe | FinetuneRecipe, shape: Shape, world: World, stage: int = 1, half: bool = True
) -> Iterator[Training]:
    """As `pipeline.engine.loop` builds it, of configs/deepspeed/ds.json at another ZeRO stage, in bf16 or float32."""
    ds = read_deepspeed_config("ds.json")
    ds |= {"bf16": {"enabled": half}, "zero_optimization": {**ds["zero_optimization"], "stage": stage}}
    ds, _ = reconcile(ds, recipe, world)
    task: PretrainTask | FinetuneTask
    if isinstance(recipe, PretrainRecipe):
        task = PretrainTask(recipe, shape.mel_bins, shape.frames)
    else:
        task = FinetuneTask(recipe, shape.mel_bins, shape.frames, shape.classes, single_label=False)
    engine = build_engine(task, recipe, ds)
    try:
        yield Training(task, engine)
    finally:
        engine.destroy()


def finetuning(check: Check, clips: int) -> FinetuneRecipe:
    """SWaB."""
    return load_recipe(FinetuneRecipe, [], [f"model.size={size_of(check)}", f"train.batch_size={clips}"])


def step_seconds(step: Callable[[], object], device: torch.device, rounds: int = 5, warm: int = 3) -> float:
    """Median time from the end of a step to the end of the next; the host runs ahead as far as the step lets it.

    Args:
        step: Is called `warm` + `rounds` times.
        device: That computes it.
        rounds: Steps that count.
        warm: Steps before, at least one.
    """
    marks: list[Any] = []
    for _ in range(warm + rounds):
        step()
        if device.type == "cuda":
            marks.append(torch.cuda.Event(enable_timing=True))
            marks[-1].record()
        else:
            marks.append(time.perf_counter())
    marks = marks[warm - 1 :]
    if device.type == "cuda":
        marks[-1].synchronize()
        return statistics.median(a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(marks))
    return statistics.median(b - a for a, b in itertools.pairwise(marks))


def side_by_side(ways: dict[str, Callable[[], object]], device: torch.device, rounds: int) -> dict[str, float]:
    """Median seconds of each way; all of them in every round, the first of which warms up."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(1 + rounds):
        for name, step in ways.items():
            wait(device)
            begun = time.perf_counter()
            step()
            wait(device)
            times[name].append(time.perf_counter() - begun)
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak(device: torch.device) -> int:
    """Bytes at most since `reset_peak`: of tensors on the GPU; of this process on the CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resident("VmHWM")


def events(file: Path) -> list[dict[str, Any]]:
    """Events with a duration of a trace in Chrome's format; `ts` and `dur` are microseconds."""
    content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    found = json.loads(content.decode(errors="replace"))["traceEvents"]
    return [event for event in found if event.get("ph") == "X" and "dur" in event]


def device_work(found: list[dict[str, Any]], device: torch.device) -> list[dict[str, Any]]:
    """Kernels, copies and fills; of a CPU its operators."""
    wanted = DEVICE_WORK if device.type == "cuda" else ("cpu_op",)
    return [event for event in found if event.get("cat") in wanted]


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Length of the union of (begin, end)."""
    total, last = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, last))
        last = max(last, end)
    return total


def span(event: dict[str, Any]) -> tuple[float, float]:
    """Begin and end, microseconds."""
    return event["ts"], event["ts"] + event["dur"]
