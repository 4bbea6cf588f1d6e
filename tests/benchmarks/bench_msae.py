"""The fused finest scale of MSAE against conv1d, group_norm, relu and avg_pool1d one after the other.

    python tests/benchmarks/bench_msae.py [--seconds 10] [--batch 4] [--device cpu]

Prints milliseconds a clip, forward and backward, of every scale both ways and the ratio, alternating in one
run (medians), and the bytes kept for backward.
"""

import argparse
import statistics
import time

import torch
import torch.nn.functional as F  # noqa: N812

from pipeline.data.fbank import padded_frames
from pipeline.model.pooled_conv import pooled_conv

SCALES = ((11, 1, 43), (51, 5, 43), (101, 10, 42))


def plain(waveform: torch.Tensor, weights: list[torch.Tensor], stride: int) -> torch.Tensor:
    weight, gain, shift = weights
    x = F.conv1d(waveform[:, None], weight[:, None], stride=stride, padding=weight.shape[1] // 2)
    return F.avg_pool1d(F.relu(F.group_norm(x, 1, gain, shift, 1e-6)), 160 // stride)


def fused(waveform: torch.Tensor, weights: list[torch.Tensor], stride: int) -> torch.Tensor:
    return pooled_conv(waveform, *weights, stride=stride, hop=160, eps=1e-6)


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
        times: dict[str, list[float]] = {"plain": [], "fused": []}
        kept = {}
        for _ in range(args.rounds + 1):  # the first round warms up
            for name, run in (("plain", plain), ("fused", fused)):
                saved: dict[int, int] = {}

                def keep(tensor: torch.Tensor, saved: dict[int, int] = saved) -> torch.Tensor:
                    saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
                    return tensor

                if args.device != "cpu":
                    torch.cuda.synchronize()
                start = time.perf_counter()
                with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                    run(waveform, weights, stride).sum().backward()
                if args.device != "cpu":
                    torch.cuda.synchronize()
                times[name].append(1000 * (time.perf_counter() - start) / args.batch)
                kept[name] = sum(saved.values()) / args.batch / 1e6
        slow, fast = (statistics.median(times[name][1:]) for name in ("plain", "fused"))
        print(f"{kernel:6d} {slow:9.2f} {fast:9.2f} {slow / fast:6.1f} {kept['plain']:14.1f} {kept['fused']:14.1f}")


if __name__ == "__main__":
    main()
