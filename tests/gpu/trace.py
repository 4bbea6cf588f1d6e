"""Steps of the real loop under the product's profiler (`log.profile`): how often the host waits, how long the GPU does.

In: shards. Out: OUT/trace/ds.trace.json.gz for Perfetto, of three steps with ds.json; lines:

    waits   the host's waits for the GPU a step, between the beginning of `accumulate` and the end of `update`, as
            CUDA's own calls in the trace have them
    where   who asked for them in two further steps: file:line of deepspeed or the product
    idle    gap between a step's last kernel and the next one's first, share of all three steps in which the GPU does
            nothing (both under the profiler), and a step's seconds without it

The rehearsal has no waits: it counts numbers that are read out of tensors, as tests/engine/syncs.py does.
"""

import collections
import shutil
import statistics
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pipeline import distributed
from pipeline.command_line import parse
from pipeline.config import PretrainRecipe
from pipeline.distributed import World
from pipeline.engine import loop
from pipeline.train import pretrain
from tests.gpu.report import Check
from tests.gpu.steps import covered, device_work, events, size_of, span
from tests.ranks import ROOT

FIRST, LAST = 4, 6  # steps that are profiled, from 1
COUNTED = (7, 8)  # steps whose waits are looked up
STEPS = 12  # the last ones without either
LIMIT = 2
HALVES = ("step.accumulate", "step.update")
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")
CALLS = ((torch.cuda, "synchronize"), (torch.cuda.Stream, "synchronize"), (torch.cuda.Event, "synchronize"))


def run(check: Check) -> None:
    folder = check.out.parent / "trace"
    folder.mkdir(exist_ok=True)
    with distributed.session(300, seed=0) as world, check.part("waits"), tempfile.TemporaryDirectory() as run_dir:
        _trace(check, world, Path(run_dir, "run"), folder / "ds.trace.json.gz")


class Watch:
    """Stands around the two halves of the loop's steps: marks them in the trace, and notes who makes the host wait.

    Attributes:
        begun: Clock at the beginning of each step.
        waits: Of the steps `COUNTED`: who asked for them -> how often.
    """

    def __init__(self) -> None:
        self.begun: list[float] = []
        self.waits: collections.Counter[str] = collections.Counter()
        self._listening = ExitStack()

    def first(self, accumulate: Callable[..., Any], *words: Any) -> Any:
        self.begun.append(time.perf_counter())
        step = len(self.begun)
        if step == COUNTED[0]:
            self._listen()
        if step == COUNTED[-1] + 1:
            self.stop()
        with torch.profiler.record_function(HALVES[0]):
            return accumulate(*words)

    def second(self, update: Callable[..., Any], *words: Any) -> Any:
        with torch.profiler.record_function(HALVES[1]):
            return update(*words)

    def stop(self) -> None:
        self._listening.close()

    def _listen(self) -> None:
        """torch warns of reads, copies and the like; calls of `synchronize` it does not."""
        if not torch.cuda.is_available():
            return
        self._listening.enter_context(warnings.catch_warnings())
        warnings.simplefilter("always")
        warnings.showwarning = self._warned  # type: ignore[assignment]
        self._listening.callback(torch.cuda.set_sync_debug_mode, "default")
        torch.cuda.set_sync_debug_mode("warn")
        for owner, name in CALLS:
            function = getattr(owner, name)
            self._listening.callback(setattr, owner, name, function)
            setattr(owner, name, self._noting(function, f"{getattr(owner, '__name__', '')}.{name}"))

    def _warned(self, message: Warning | str, *rest: Any) -> None:
        if "synchronizing" in str(message):
            self.waits[f"read or copy at {_place()}"] += 1

    def _noting(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(*words: Any, **named: Any) -> Any:
            self.waits[f"{name} at {_place()}"] += 1
            return function(*words, **named)

        return call


def _place() -> str:
    """Innermost frames of deepspeed and the product, or of whoever else called."""
    frames = [frame for frame in traceback.extract_stack() if not frame.filename.endswith(__file__)]
    known = [frame for frame in frames if "/deepspeed/runtime/" in frame.filename or
             str(ROOT / "pipeline") in frame.filename]  # fmt: skip
    names = [f"{'/'.join(Path(frame.filename).parts[-2:])}:{frame.lineno}" for frame in (known or frames)[-2:]]
    return " < ".join(reversed(names))


def _trace(check: Check, world: World, run_dir: Path, out: Path) -> None:
    clips = 8 if check.small else 24
    words = ["--deepspeed_config", "ds.json", f"data.shards={check.shards}", f"run.dir={run_dir}", "log.mlflow=false",
             f"model.size={size_of(check)}", f"train.batch_size={clips}", f"train.steps={STEPS}", "log.every=100",
             "log.pictures=0", "log.peak_tflops=null", f"log.profile=[{FIRST},{LAST}]", "eval.clips=8",
             "optim.warmup=2", *(["data.workers=1"] if check.small else [])]  # fmt: skip
    watch, halves = Watch(), (loop.accumulate, loop.update)
    loop.accumulate, loop.update = partial(watch.first, halves[0]), partial(watch.second, halves[1])
    try:
        pretrain(parse(PretrainRecipe, None, words), world)
    finally:
        watch.stop()
        loop.accumulate, loop.update = halves
    shutil.copyfile(run_dir / "profile" / "rank-0.trace.json.gz", out)
    found = events(out)
    steps = _windows(found)
    _waits(check, found, steps)
    if world.device.type == "cuda":
        counted = ", ".join(f"{count / len(COUNTED):g} x {place}" for place, count in watch.waits.most_common())
        check.info("where", counted or "none")
    _idle(check, world, found, steps, watch)


def _windows(found: list[dict[str, Any]]) -> list[tuple[float, float]]:
    """Beginning and end of each profiled step on the host, microseconds."""
    marks = [sorted(span(event) for event in found if event["name"] == half and event.get("cat") == "user_annotation")
             for half in HALVES]  # fmt: skip
    steps = [(begin, end) for (begin, _), (_, end) in zip(*marks, strict=True)]
    if len(steps) != LAST - FIRST + 1:
        raise ValueError(f"{len(steps)} steps in the trace, not {LAST - FIRST + 1}")
    return steps


def _step_of(moment: float, steps: list[tuple[float, float]]) -> int | None:
    return next((number for number, (begin, end) in enumerate(steps) if begin <= moment <= end), None)


def _waits(check: Check, found: list[dict[str, Any]], steps: list[tuple[float, float]]) -> None:
    if check.small:  # of torch's own optimisers the step's number is on the CPU, whatever the device
        inside = [span(event) for event in found if event["name"].startswith("Optimizer.step")]
        waits = [event for event in found if event["name"] == "aten::_local_scalar_dense" and
                 _step_of(event["ts"], inside) is None]  # fmt: skip
    else:
        waits = [event for event in found if event.get("cat") in ("cuda_runtime", "cuda_driver") and
                 event["name"] in WAITS]  # fmt: skip
    counts = [collections.Counter() for _ in steps]
    for event in waits:
        if (step := _step_of(event["ts"], steps)) is not None:
            counts[step][event["name"]] += 1
    worst = max(sum(count.values()) for count in counts)
    words = ", ".join(f"{event} {'/'.join(str(count[event]) for count in counts)}" for event in
                      sorted(set().union(*counts)))  # fmt: skip
    check.test("waits", worst <= LIMIT, f"{worst} a step: {words or 'none'}", f"<= {LIMIT}")


def _idle(
    check: Check, world: World, found: list[dict[str, Any]], steps: list[tuple[float, float]], watch: Watch
) -> None:  # fmt: skip
    """A kernel belongs to the step in which the host launched it."""
    launches = {event["args"]["correlation"]: event["ts"] for event in found
                if event.get("cat") in ("cuda_runtime", "cuda_driver") and "correlation" in event.get("args", {})}
    works: list[list[tuple[float, float]]] = [[] for _ in steps]
    for event in device_work(found, world.device):
        launched = launches.get(event.get("args", {}).get("correlation"), event["ts"])
        if (step := _step_of(launched, steps)) is not None:
            works[step].append(span(event))
    if not all(works):
        raise ValueError("a profiled step without work of the device")
    firsts, lasts = [min(work)[0] for work in works], [max(end for _, end in work) for work in works]
    gaps = [max(0.0, first - last) / 1e3 for last, first in zip(lasts[:-1], firsts[1:], strict=True)]
    idle = 1 - covered(one for work in works for one in work) / (max(lasts) - min(firsts))
    profiled, plain = (statistics.median(watch.begun[number + 1] - watch.begun[number] for number in numbers)
                       for numbers in (range(FIRST, LAST - 1), range(COUNTED[-1] + 1, STEPS - 1)))  # fmt: skip
    check.info("idle", f"gaps {', '.join(f'{gap:.2f}' for gap in gaps)} ms, idle {idle:.1%} of the steps; "
                               f"{1e3 * profiled:.1f} ms a step with the profiler, {1e3 * plain:.1f} ms without")
