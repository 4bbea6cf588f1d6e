"""A training step against its alternatives, side by side in one run.

    python tests/benchmarks/bench_step.py [--precision bf16] [--size small] [--clips 2] [--rows ssast craft]

Each row times forward and backward of two or three ways of doing the same work, one after the other in
every round, and prints the ratio of their medians first. With one thread seconds are those of the CPU, so that
what else runs on the machine counts little; with more they are those of the clock. Rows:

    ssast     our step (one masked pass feeds both heads) against two passes with two masks, ours
              (`pretrain.two_pass`) and as SSAST's code has them: a plain network, masks and losses clip by clip
    craft     PSWaCL against the spectrogram alone, and against two separate calls of the encoder
    frontend  PSWaCL with MSAE against lighter ways of the waveform: other front ends, a third of the blocks
    beyond    PSWaCL against the methods that encode visible patches alone, as their files in configs/pretrain/ have
              them, with counted FLOPs; and the share of the masked autoencoder's step that drops and puts back patches
    encoder   our network against Hugging Face's ASTModel, of equal size, on equal tokens
    matmul    share of the CRAFT step in matrix products, by torch's profiler, and its MFU
    objectives  masks and losses of 8 and of 64 clips: microseconds a clip, and operations called
    loop      a run of launchers/pretrain.py on generated shards: MFU and share of waiting for data

Peak memory is what the first step adds to the process, as the kernel counts it (Linux). Memory that was freed stays in
the process, so that steps that are timed get no pages from the kernel: on a GPU there is no such cost, and on a CPU
it was a third of a step of the masked autoencoder.
"""

import argparse
import ctypes
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.config import PretrainRecipe
from pipeline.engine.plan import Shape, model_flops
from pipeline.flow import Batch
from pipeline.model.craft import SIZES, Craft, Streams
from pipeline.model.embed import patchify
from pipeline.model.masking import cluster_masks, gather_patches
from pipeline.objectives.masked_patch import masked_patch_loss
from pipeline.recipes import load_recipe
from pipeline.tasks import PretrainTask
from tests.engine.memory import resident
from tests.helpers import synth_shards
from tests.ranks import ROOT
from tests.reference.masks import ssast as ssast_mask
from tests.reference.ssast import Ssast

SHAPE = Shape()
MASKED, GRID, SIDES = 400, (8, 64), (3, 4, 5)
BEYOND = ("pswacl180.yaml", "craft_mae.yaml", "craft_mosaic.yaml", "audio_mosaic.yaml", "craft_latent.yaml")
MOVES = ("gather", "scatter", "scatter_add_", "sort", "topk", "new_zeros", "where")  # of patches and their indices
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of mallopt
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "convolution", "linear", "scaled_dot_product")
Step = Callable[[], Any]


def batch_of(clips: int, shape: Shape = SHAPE, device: torch.device | str = "cpu") -> Batch:
    generator = torch.Generator().manual_seed(0)
    position = torch.arange(clips, device=device)
    waveform = 0.1 * torch.randn(clips, shape.samples, generator=generator)
    fbank = torch.randn(clips, shape.frames, shape.mel_bins, generator=generator)
    targets = torch.zeros(clips, shape.classes, device=device)
    return Batch(position, position, position >= 0, waveform.to(device), fbank.to(device), targets)


def grid_of(batch: Batch) -> tuple[int, int]:
    """Patches of 16 along frequency and time."""
    _, frames, mel_bins = batch.fbank.shape
    return mel_bins // 16, frames // 16


def recipe_of(size: str, *words: str) -> PretrainRecipe:
    """Words are settings, or files of configs/pretrain/."""
    files = [ROOT / "configs" / "pretrain" / word for word in words if word.endswith(".yaml")]
    settings = [word for word in words if not word.endswith(".yaml")]
    return load_recipe(PretrainRecipe, files, [f"model.size={size}", *settings])


def task_step(size: str, batch: Batch, dtype: torch.dtype, *words: str) -> Step:
    """On the device of the batch, as the other steps."""
    _, frames, mel_bins = batch.fbank.shape
    task = PretrainTask(recipe_of(size, *words), mel_bins, frames).to(batch.fbank.device, dtype)

    def step() -> None:
        task.zero_grad(set_to_none=True)
        task(batch).total.backward()

    return step


def separate_step(size: str, batch: Batch, dtype: torch.dtype) -> Step:
    """PSWaCL with one call of the encoder for each representation."""
    _, frames, mel_bins = batch.fbank.shape
    task = PretrainTask(recipe_of(size), mel_bins, frames).to(batch.fbank.device, dtype)
    together = task.model.encoder.forward
    task.model.encoder.forward = lambda streams, *_: [together([stream])[0] for stream in streams]  # type: ignore[method-assign]

    def step() -> None:
        task.zero_grad(set_to_none=True)
        task(batch).total.backward()

    return step


def reference_step(size: str, batch: Batch, dtype: torch.dtype) -> Step:
    """SSAST's formulation: a pass and a mask for each objective, masks and losses clip by clip."""
    shape, grid = SIZES[size], grid_of(batch)
    masked = MASKED * grid[0] * grid[1] // (GRID[0] * GRID[1])
    network = Ssast(shape.width, shape.depth, shape.heads, grid).to(batch.fbank.device, dtype)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.02) if parameter.is_floating_point() else None

    def masks(purpose: str) -> torch.Tensor:
        return torch.tensor(ssast_mask(0, purpose, batch.position.tolist(), grid, masked, SIDES, 8))

    def step() -> None:
        network.zero_grad(set_to_none=True)
        target = patchify(batch.fbank.transpose(1, 2), 16)
        first, second = masks("first"), masks("second")
        predicted, _ = network.predict(batch.fbank.to(dtype), first)
        nce = torch.zeros(())
        for clip, chosen in zip(range(len(batch)), first, strict=True):
            scores = predicted[clip].float() @ target[clip, chosen].T
            nce = nce - torch.diagonal(F.log_softmax(scores, dim=0)).mean()
        _, rebuilt = network.predict(batch.fbank.to(dtype), second)
        mse = torch.zeros(())
        for clip, chosen in zip(range(len(batch)), second, strict=True):
            mse = mse + (rebuilt[clip].float() - target[clip, chosen]).square().mean()
        ((nce + 10 * mse) / len(batch)).backward()

    return step


def encoder_step(size: str, batch: Batch, dtype: torch.dtype) -> Step:
    _, frames, mel_bins = batch.fbank.shape
    streams = Streams(spec=True, wav=False, mel_bins=mel_bins, frames=frames)
    network = Craft(recipe_of(size).model, streams).to(batch.fbank.device, dtype)
    fbank = batch.fbank.to(dtype)

    def step() -> None:
        network.zero_grad(set_to_none=True)
        network(fbank, None).spec[0].float().mean().backward()

    return step


def hugging_face_step(size: str, batch: Batch, dtype: torch.dtype) -> Step:
    from transformers import ASTConfig, ASTModel

    shape, grid = SIZES[size], grid_of(batch)
    config = ASTConfig(
        hidden_size=shape.width, num_hidden_layers=shape.depth, num_attention_heads=shape.heads,
        intermediate_size=4 * shape.width, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        frequency_stride=16, time_stride=16, max_length=16 * grid[1], num_mel_bins=16 * grid[0],
    )  # fmt: skip
    network = ASTModel(config).train().to(batch.fbank.device, dtype)
    fbank = batch.fbank.to(dtype)

    def step() -> None:
        network.zero_grad(set_to_none=True)
        out = network(fbank).last_hidden_state
        assert out.shape[1] == 2 + grid[0] * grid[1]
        out[:, 2:].float().mean().backward()

    return step


def clock() -> float:
    """Seconds: see the module."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def matmul_peak(dtype: torch.dtype) -> float:
    """FLOP/s of the best square matmul of a few."""
    best = 0.0
    for side in (1024, 1024, 1024, 2048, 2048):
        left, right = torch.randn(2, side, side).to(dtype)
        start = clock()
        torch.matmul(left, right)
        best = max(best, 2 * side**3 / (clock() - start))
    return best


def compare(title: str, ways: dict[str, Callable[[], Step]], rounds: int) -> None:
    """Times all ways in every round; the ratio is to the first of them."""
    steps, times, peaks = {name: make() for name, make in ways.items()}, {name: [] for name in ways}, {}
    for number in range(rounds + 1):  # the first round warms up
        for name, step in steps.items():
            if number:
                start = clock()
                step()
                times[name].append(clock() - start)
                continue
            ctypes.CDLL("libc.so.6").malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
            before = resident("VmRSS")
            step()
            peaks[name] = (resident("VmHWM") - before) / 1e6
    ours = statistics.median(times[next(iter(ways))])
    for name, values in times.items():
        value = statistics.median(values)
        print(f"{title:10s} {value / ours:6.2f}  {value:8.3f} s  {peaks[name]:7.0f} MB  {name}", flush=True)


def products(size: str, clips: int, dtype: torch.dtype, rounds: int) -> None:
    """Share of the step in matrix products; MFU against matmuls of the same precision and threads."""
    batch = batch_of(clips)
    step = task_step(size, batch, dtype)
    step()
    before, times = matmul_peak(dtype), []
    for _ in range(rounds):
        start = clock()
        step()
        times.append(clock() - start)
    peak = max(before, matmul_peak(dtype))
    flops = model_flops(recipe_of(size), SHAPE) * clips
    print(f"MFU        {flops / statistics.median(times) / peak:6.2f}  of {peak / 1e9:.0f} GFLOP/s ({dtype})")
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        step()
    rows = sorted(trace.key_averages(), key=lambda row: row.self_cpu_time_total, reverse=True)
    total = sum(row.self_cpu_time_total for row in rows)
    outside = [row for row in rows if not any(product in row.key for product in PRODUCTS)]
    share = sum(row.self_cpu_time_total for row in outside) / total
    parts = ", ".join(f"{row.key} {row.self_cpu_time_total / total:.1%}" for row in outside[:8])
    print(f"outside    {share:6.2f}  of the step is outside matrix products: {parts}", flush=True)


def moves(size: str, batch: Batch, dtype: torch.dtype) -> None:
    """Share of a step of craft_mae in moving patches; the rest of `where` and `new_zeros` is in it too."""
    step = task_step(size, batch, dtype, "craft_mae.yaml")
    step()
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        step()
    rows = trace.key_averages()
    total = sum(row.self_cpu_time_total for row in rows)
    found = {row.key: row.self_cpu_time_total / total for row in rows if row.key.removeprefix("aten::") in MOVES}
    parts = ", ".join(f"{name} {share:.2%}" for name, share in found.items())
    print(f"beyond     {sum(found.values()):6.3f}  of a step of craft_mae moves patches: {parts}", flush=True)


class Operations(TorchDispatchMode):
    """Counts what is called."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def objectives(rounds: int) -> None:
    for clips in (8, 64):
        position = torch.arange(clips)
        target = torch.randn(clips, GRID[0] * GRID[1], 256)
        predicted, rebuilt = (torch.randn(clips, MASKED, 256, requires_grad=True) for _ in range(2))

        def step(position: Any = position, target: Any = target, c: Any = predicted, r: Any = rebuilt) -> None:
            mask = cluster_masks(0, "mask.spec", position, GRID, MASKED, SIDES)
            loss = masked_patch_loss(c, r, gather_patches(target, mask))
            (loss.nce + 10 * loss.mse).backward()

        times = []
        for _ in range(rounds + 1):
            start = clock()
            step()
            times.append(clock() - start)
        with Operations() as operations:
            step()
        each = 1e6 * statistics.median(times[1:]) / clips
        print(f"objectives {each:6.0f} us a clip, {operations.count} operations: masks and losses of {clips} clips")


def loop(size: str, clips: int, steps: int, precision: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        shards, run = Path(folder, "shards"), Path(folder, "run")
        synth_shards(shards, 60, seconds=10.0)
        ds = "bf16.json" if precision == "bf16" else "ds.json"
        words = [f"data.shards={shards}", f"run.dir={run}", f"model.size={size}", f"train.batch_size={clips}",
                 f"train.steps={steps}", "log.every=1", "log.mlflow=false",
                 "eval.clips=2", "log.pictures=0"]  # fmt: skip
        command = [sys.executable, "launchers/pretrain.py", "--deepspeed_config", ds, *words]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if "mfu" in line][1:]
    for name in ("data_wait_fraction", "mfu"):
        print(f"loop       {statistics.median(line[name] for line in trained):6.3f}  {name} of {len(trained)} steps")


def main() -> None:
    rows = ("ssast", "craft", "frontend", "beyond", "encoder", "matmul", "objectives", "loop")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="(default: fp32)")
    parser.add_argument("--size", choices=list(SIZES), default="small", help="of the model (default: small)")
    parser.add_argument("--clips", type=int, default=2, help="of a step (default: 2)")
    parser.add_argument("--rounds", type=int, default=5, help="of which the median counts (default: 5)")
    parser.add_argument("--threads", type=int, default=2, help="of torch (default: 2)")
    parser.add_argument("--rows", nargs="+", choices=rows, default=list(rows), help="(default: all)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    libc = ctypes.CDLL("libc.so.6")
    libc.mallopt(M_MMAP_MAX, 0)
    libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    size, batch = args.size, batch_of(args.clips)
    print(f"{size}, {args.precision}, {args.clips} clips of 10 s, {args.threads} threads; ratios to the first of a row")
    ssast = "pretrain.method=ssast"
    if "ssast" in args.rows:
        compare("ssast", {
            "ours": lambda: task_step(size, batch, dtype, ssast),
            "ours, two passes": lambda: task_step(size, batch, dtype, ssast, "pretrain.two_pass=true"),
            "SSAST's two passes, plain": lambda: reference_step(size, batch, dtype),
        }, args.rounds)  # fmt: skip
    if "craft" in args.rows:
        compare("craft", {
            "spectrogram only": lambda: task_step(size, batch, dtype, ssast),
            "PSWaCL, one encoder call": lambda: task_step(size, batch, dtype),
            "PSWaCL, two encoder calls": lambda: separate_step(size, batch, dtype),
        }, args.rounds)  # fmt: skip
    if "frontend" in args.rows:
        depth = SIZES[size].depth // 3
        compare("frontend", {
            "MSAE": lambda: task_step(size, batch, dtype),
            "strided": lambda: task_step(size, batch, dtype, "model.frontend=strided"),
            "sinc": lambda: task_step(size, batch, dtype, "model.frontend=sinc"),
            f"strided, {depth} blocks": lambda: task_step(
                size, batch, dtype, "model.frontend=strided", f"model.wav_depth={depth}"),
        }, args.rounds)  # fmt: skip
    if "beyond" in args.rows:
        ways = {}
        paper = model_flops(recipe_of(size, BEYOND[0]), SHAPE)
        for file in BEYOND:
            share = model_flops(recipe_of(size, file), SHAPE) / paper
            ways[f"{file}, {share:.2f} of the FLOPs"] = partial(task_step, size, batch, dtype, file)
        compare("beyond", ways, args.rounds)
        moves(size, batch, dtype)
    if "encoder" in args.rows:
        compare("encoder", {
            "ours": lambda: encoder_step(size, batch, dtype),
            "Hugging Face ASTModel": lambda: hugging_face_step(size, batch, dtype),
        }, args.rounds)  # fmt: skip
    if "matmul" in args.rows:
        products(size, args.clips, dtype, args.rounds)
    if "objectives" in args.rows:
        objectives(args.rounds)
    if "loop" in args.rows:
        loop(size, args.clips, 8, args.precision)


if __name__ == "__main__":
    main()
