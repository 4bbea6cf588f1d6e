"""The fused finest scale of MSAE against conv1d, group_norm, relu and avg_pool1d; other front ends against MSAE.

    python tests/benchmarks/bench_msae.py [--seconds 10] [--batch 4] [--device cpu]

Prints milliseconds a clip, forward and backward, of every scale both ways and the ratio, alternating in one
run (medians), and the bytes kept for backward. Then the same of each `model.frontend`, with its counted GFLOP,
as shares of MSAE's.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F  # noqa: N812
from torch.utils.flop_counter import FlopCounterMode

from pipeline.config import ModelConfig
from pipeline.data.fbank import padded_frames
from pipeline.model.frontends import frontend
from pipeline.model.pooled_conv import pooled_conv

SCALES = ((11, 1, 43), (51, 5, 43), (101, 10, 42))


def plain(waveform: torch.Tensor, weights: list[torch.Tensor], stride: int) -> torch.Tensor:
    weight, gain, shift = weights
    x = F.conv1d(waveform[:, None], weight[:, None], stride=stride, padding=weight.shape[1] // 2)
    return F.avg_pool1d(F.relu(F.group_norm(x, 1, gain, shift, 1e-6)), 160 // stride)


def fused(waveform: torch.Tensor, weights: list[torch.Tensor], stride: int) -> torch.Tensor:
    return pooled_conv(waveform, *weights, stride=stride, hop=160, eps=1e-6)


def measure(
    ways: dict[str, Callable[[], torch.Tensor]], args: argparse.Namespace
) -> tuple[list[float], list[float]]:
    """Median milliseconds, and MB kept for backward, of a clip."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    kept = {}
    for _ in range(args.rounds + 1):  # the first round warms up
        for name, run in ways.items():
            saved: dict[int, int] = {}

            def keep(tensor: torch.Tensor, saved: dict[int, int] = saved) -> torch.Tensor:
                saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
                return tensor

            if args.device != "cpu":
                torch.cuda.synchronize()
            start = time.process_time() if args.device == "cpu" else time.perf_counter()
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                run().sum().backward()
            if args.device != "cpu":
                torch.cuda.synchronize()
            end = time.process_time() if args.device == "cpu" else time.perf_counter()
            times[name].append(1000 * (end - start) / args.batch)
            kept[name] = sum(saved.values()) / args.batch / 1e6
    return [statistics.median(each[1:]) for each in times.values()], list(kept.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10.0, help="of a clip (default: 10)")
    parser.add_argument("--batch", type=int, default=4, help="clips (default: 4)")
    parser.add_argument("--rounds", type=int, default=7, help="of which the median counts (default: 7)")
    parser.add_argument("--device", default="cpu", help="(default: cpu)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    waveform = torch.randn(args.batch, padded_frames(args.seconds) * 160, device=args.device)
    print("kernel  plain ms  fused ms  ratio  plain MB kept  fused MB kept")
    for kernel, stride, channels in SCALES:
        weights = [torch.randn(channels, kernel), torch.ones(channels), torch.zeros(channels)]
        weights = [weight.to(args.device).requires_grad_() for weight in weights]
        ways = {"plain": partial(plain, waveform, weights, stride), "fused": partial(fused, waveform, weights, stride)}
        (slow, fast), (most, least) = measure(ways, args)
        print(f"{kernel:6d} {slow:9.2f} {fast:9.2f} {slow / fast:6.1f} {most:14.1f} {least:14.1f}")
    print("front end       ms  of MSAE   GFLOP  of MSAE  MB kept")
    length = torch.full((args.batch,), round(args.seconds * 16000), device=args.device)
    fronts = {kind: frontend(ModelConfig(frontend=kind)).to(args.device) for kind in ("msae", "strided", "sinc")}
    steps = {kind: partial(front, waveform, length) for kind, front in fronts.items()}
    times, kept = measure(steps, args)
    flops = []
    for step in steps.values():
        with FlopCounterMode(display=False) as counter:
            step().sum().backward()
        flops.append(counter.get_total_flops() / args.batch / 1e9)
    for kind, time_, flop, size in zip(steps, times, flops, kept, strict=True):
        print(f"{kind:9s} {time_:8.2f} {time_ / times[0]:8.2f} {flop:7.3f} {flop / flops[0]:8.2f} {size:8.1f}")


if __name__ == "__main__":
    main()
