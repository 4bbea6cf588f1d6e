"""Speed of training and inference. In: OUT/ceilings.json, else measured here. Out: figures; nothing has a limit.

Training is the base model in bf16 at ZeRO 1, in the product's engine with its optimiser, on clips made of noise. Lines:

    METHOD     of configs/pretrain/METHOD.yaml, at each micro-batch: clips/s, ms a step, MFU of the measured peak, peak
               memory; and the share of the step in which the GPU works
    ratio_*    forward and backward, all ways in every round: seconds of one over those of another; the goals are the
               project's
"""

import functools
import importlib.util
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from pipeline import distributed
from pipeline.config import PretrainRecipe
from pipeline.distributed import World
from pipeline.engine.plan import model_flops
from pipeline.flow import Batch
from pipeline.recipes import load_recipe
from pipeline.tasks import FinetuneTask
from tests.benchmarks import bench_step
from tests.gpu import environment
from tests.gpu.report import Check
from tests.gpu.steps import (
    covered,
    device_work,
    events,
    finetuning,
    peak,
    reset_peak,
    shape_of,
    side_by_side,
    size_of,
    span,
    step_seconds,
    training,
)
from tests.ranks import ROOT

METHODS = ("ssast180", "swapt180", "pswacl180", "craft_mae", "craft_mosaic", "audio_mosaic", "craft_latent")
REHEARSED = ("pswacl180", "craft_latent")
GOALS = {"craft_mae": 0.35, "craft_mosaic": 0.55, "craft_latent": 1.2}  # of the time of PSWaCL
PROFILED = 2  # steps


def run(check: Check) -> None:
    clips = [2, 4] if check.small else [12, 24, 48, 96]
    middle, shape = clips[1], shape_of(check)
    with distributed.session(300, seed=0) as world:
        ceilings = _ceilings(check)
        batch = bench_step.batch_of(clips[-1], shape, world.device)
        milliseconds: dict[str, float] = {}
        for method in REHEARSED if check.small else METHODS:
            with check.part(method):
                milliseconds[method] = _method(check, world, method, batch, clips, ceilings["bfloat16"])
        for method, goal in GOALS.items():
            if method in milliseconds and "pswacl180" in milliseconds:
                ours, paper = milliseconds[method], milliseconds["pswacl180"]
                check.info(f"step_{method}", f"{ours / paper:.2f} of PSWaCL's step at {middle} clips: {ours:.1f} / "
                                             f"{paper:.1f} ms (goal <= {goal})")  # fmt: skip
        with check.part("finetuning"):
            _finetuning(check, world, batch[slice(middle)], ceilings["bfloat16"])
        _ratios(check, batch[slice(middle)])
        with check.part("inference"):
            _inference(check, batch[slice(middle)])


def _ceilings(check: Check) -> dict[str, float]:
    """FLOP/s by precision, of the check `environment` where it has run."""
    file = check.out.parent / "ceilings.json"
    if file.exists():
        found: dict[str, float] = json.loads(file.read_text())
        return found
    return environment.ceilings(check.device, 256 if check.small else 8192)[0]


def _rounds(check: Check) -> dict[str, int]:
    return {"rounds": 1, "warm": 1} if check.small else {"rounds": 5, "warm": 3}


def _method(check: Check, world: World, method: str, batch: Batch, clips: list[int], flop_rate: float) -> float:
    """Milliseconds of a step at the second of the micro-batches; NaN where it did not get there."""
    file = ROOT / "configs" / "pretrain" / f"{method}.yaml"
    recipe = load_recipe(PretrainRecipe, [file], [f"model.size={size_of(check)}", f"train.batch_size={clips[1]}"])
    flops = model_flops(recipe, shape_of(check))
    words, seconds, busy = [], {}, float("nan")
    with training(recipe, shape_of(check), world) as run:
        for count in clips:
            own = batch[slice(count)]
            reset_peak(world.device)
            try:
                seconds[count] = step_seconds(partial(run.step, own), world.device, **_rounds(check))
                words.append(_line(count, seconds[count], flops, flop_rate, peak(world.device)))
                if count == clips[1]:
                    busy = _busy_seconds(partial(run.step, own), world.device, check.out / "busy.json")
            except torch.OutOfMemoryError:
                words.append(f"{count}: out of memory")  # a larger one would be, too
                break
    share = busy / seconds[clips[1]] if clips[1] in seconds else float("nan")
    check.info(method, f"{flops / 1e9:.3g} GFLOP a clip; {'; '.join(words)}; busy {share:.0%} of a step of {clips[1]}")
    return 1e3 * seconds.get(clips[1], float("nan"))


def _line(clips: int, seconds: float, flops: float, flop_rate: float, memory: int) -> str:
    mfu = clips * flops / seconds / flop_rate
    return f"{clips}: {clips / seconds:.0f} clips/s {1e3 * seconds:.1f} ms MFU {mfu:.2f} {memory / 2**30:.1f} GiB"


def _busy_seconds(step: Callable[[], object], device: torch.device, file: Path) -> float:
    """Seconds of a step in which a kernel or a copy runs; the profiler does not lengthen these, as it does the step."""
    kind = ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU
    with profile(activities=[kind]) as trace:
        for _ in range(PROFILED):
            step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    trace.export_chrome_trace(str(file))
    work = device_work(events(file), device)
    file.unlink()
    return covered(map(span, work)) / 1e6 / PROFILED


def _finetuning(check: Check, world: World, batch: Batch, flop_rate: float) -> None:
    recipe, shape, clips = finetuning(check, len(batch)), shape_of(check), len(batch)
    flops = model_flops(recipe, shape)
    reset_peak(world.device)
    with training(recipe, shape, world) as run:
        seconds = step_seconds(partial(run.step, batch), world.device, **_rounds(check))
    check.info("finetuning_swab", f"{flops / 1e9:.3g} GFLOP a clip; "
                                  f"{_line(clips, seconds, flops, flop_rate, peak(world.device))}")  # fmt: skip


def _ratios(check: Check, batch: Batch) -> None:
    """As the rows of tests/benchmarks/bench_step.py, in bf16."""
    step = functools.cache(partial(bench_step.task_step, size_of(check), batch, torch.bfloat16))
    ssast, pswacl = partial(step, "ssast180.yaml"), partial(step, "pswacl180.yaml")
    _ratio(check, "craft", {"ssast": ssast, "pswacl": pswacl})
    _ratio(check, "ssast", {"two_pass": partial(step, "ssast180.yaml", "pretrain.two_pass=true"), "ours": ssast})
    few = batch[slice(max(2, len(batch) // 4))]  # masks and losses clip by clip take their time
    _ratio(check, "ssast_plain", {
        f"SSAST's two passes, plainly written, of {len(few)} clips": partial(bench_step.reference_step, size_of(check),
                                                                             few, torch.bfloat16),
        "ours": partial(bench_step.task_step, size_of(check), few, torch.bfloat16, "ssast180.yaml"),
    }, rounds=1)  # fmt: skip
    _ratio(check, "frontend", {"msae": pswacl, "strided": partial(step, "pswacl180.yaml", "model.frontend=strided")})
    _ratio(check, "beyond", {"pswacl": pswacl, **{f"{name} (goal <= {goal})": partial(step, f"{name}.yaml")
                                                  for name, goal in GOALS.items()}})  # fmt: skip
    if importlib.util.find_spec("transformers") is None:
        check.info("ratio_encoder", "none: transformers is not installed")
        return
    _ratio(check, "encoder", {
        "Hugging Face ASTModel": partial(bench_step.hugging_face_step, size_of(check), batch, torch.bfloat16),
        "ours": partial(bench_step.encoder_step, size_of(check), batch, torch.bfloat16),
    })  # fmt: skip


def _ratio(check: Check, name: str, ways: dict[str, Callable[[], bench_step.Step]], rounds: int = 0) -> None:
    """Seconds of each over those of the first."""
    rounds = rounds or (1 if check.small else 5)
    with check.part(f"ratio_{name}"):
        seconds = side_by_side({way: make() for way, make in ways.items()}, check.device, rounds)
        first = next(iter(seconds.values()))
        words = [f"{way} {value / first:.2f} ({1e3 * value:.1f} ms)" for way, value in seconds.items()]
        check.info(f"ratio_{name}", ", ".join(words))


def _inference(check: Check, batch: Batch) -> None:
    """Forward passes of a finetuned model's network: clips/s, and how far its logits are from those of float32.

    `default` is what torch does without a word: products in float32, convolutions in TF32.
    """
    shape, clips, words = shape_of(check), len(batch), []
    torch.manual_seed(0)
    task = FinetuneTask(finetuning(check, clips), shape.mel_bins, shape.frames, shape.classes, single_label=False)
    task = task.to(check.device).eval()
    first: Any = None
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        for name, products, convolutions in (
            ("fp32", "highest", False), ("default", "highest", True), ("TF32", "high", True), ("bf16", "high", True)
        ):  # fmt: skip
            torch.set_float32_matmul_precision(products)
            torch.backends.cudnn.allow_tf32 = convolutions
            task = task.to(torch.bfloat16 if name == "bf16" else torch.float32)
            with torch.no_grad():
                logits = task(batch).logits.double()
                seconds = step_seconds(partial(task, batch), check.device, **_rounds(check))
            first = logits if first is None else first
            words.append(f"{name} {clips / seconds:.0f} clips/s, off by {float((logits - first).abs().max()):.2g}")
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]
    check.info("inference_swab", f"{'; '.join(words)}; logits' standard deviation {float(first.std()):.2g}")
