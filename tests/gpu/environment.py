"""What this machine is: versions, cards, their ceilings. In: nothing. Out: figures that the other checks refer to."""

import importlib.metadata
import json
import os
import shutil
import statistics
import time
from collections.abc import Callable

import torch

from tests.gpu.report import Check

PACKAGES = ("torch", "torchaudio", "deepspeed", "numpy", "pyarrow", "pydantic", "triton", "mlflow", "webdataset",
            "submitit", "transformers")  # fmt: skip


def run(check: Check) -> None:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "none"
    check.info("packages", ", ".join(f"{name} {version}" for name, version in found.items()))
    check.info("host", f"{os.cpu_count()} cores, {shutil.disk_usage('/dev/shm').free / 1e9:.0f} GB of /dev/shm")
    matmul, copy = ceilings(check.device, 256 if check.small else 8192)
    check.info("matmul_tflops", ", ".join(f"{name} {value / 1e12:.3g}" for name, value in matmul.items()))
    check.info("copy_tb_per_s", f"{copy / 1e12:.3g}")
    (check.out.parent / "ceilings.json").write_text(json.dumps(matmul | {"copy": copy}))
    if check.small:
        return
    card = torch.cuda.get_device_properties(0)
    nccl = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    check.info("card", f"{torch.cuda.device_count()} x {card.name}, {card.total_memory / 2**30:.1f} GiB, capability "
                       f"{card.major}.{card.minor}, CUDA {torch.version.cuda}, nccl {nccl}")  # fmt: skip
    native = torch.cuda.is_bf16_supported(including_emulation=False)
    check.test("bf16", native == (card.major >= 8), f"native: {native}", "on capability 8 and above")
    check.test("memory_free", torch.cuda.mem_get_info()[0] > 0.9 * card.total_memory,
               f"{torch.cuda.mem_get_info()[0] / 2**30:.1f} GiB", "> 90 %: nobody else is on the card")  # fmt: skip


def ceilings(device: torch.device, side: int) -> tuple[dict[str, float], float]:
    """FLOP/s of a square product in each precision, and bytes/s of a copy, read and written."""
    rates = {}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16), ("float16", torch.float16)):
        left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        rates[name] = 2 * side**3 / median_seconds(lambda a=left, b=right: a @ b, device)  # type: ignore[misc]
    source = torch.randn(side * side, device=device)
    target = torch.empty_like(source)
    return rates, 2 * source.nbytes / median_seconds(lambda: target.copy_(source), device)


def median_seconds(work: Callable[[], object], device: torch.device, rounds: int = 10, warm: int = 3) -> float:
    """Seconds of the device, by its own events; on the CPU by the clock."""
    times = []
    for _ in range(warm + rounds):
        if device.type == "cuda":
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            work()
            last.record()
            last.synchronize()
            times.append(first.elapsed_time(last) / 1e3)
        else:
            begun = time.perf_counter()
            work()
            times.append(time.perf_counter() - begun)
    return statistics.median(times[warm:])
