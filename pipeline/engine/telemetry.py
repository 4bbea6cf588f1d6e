"""What a run tells of itself: its numbers, its slowest rank, its use of the hardware, profiles of its steps.

In: named numbers at a step. Out, in the run directory:

    metrics.jsonl                  one JSON object per logged step, on rank 0, of the numbers that are finite; MLflow
                                   gets them from there
    profile/rank-N.trace.json.gz   every rank's trace of the steps `log.profile`, for Perfetto or chrome://tracing
    profile/rank-N.operators.txt   the same, summed by operator, the longest first
    profile/flops.txt              module by module: parameters, MACs and latency of the forward passes of
                                   step `log.profile_flops`, on rank 0

The slowest rank: ranks that train in step all take equally long for a step, the slow one as well: it works while the
others wait inside collectives. So what is compared is what a rank does alone, before the step's first collective:
waiting for data, and the network's forward passes (a third of what the step computes). At ZeRO 3 the ranks wait for
each other inside these too, and only the wait for data tells them apart.

MFU = FLOPs the model needs (`plan.model_flops`) x clips a second / (ranks x FLOP/s of one rank's matmuls at their
best, given or measured); what is computed twice does not count as use.

Cost: at the start half a second for the FLOPs and less than one for the matmuls; a step, two readings of a clock (on a
GPU, two events on its stream) a forward pass; every `log.stragglers` steps one gather of two numbers a rank. Profiles
change no number of the run; the profiled steps take longer.
"""

import logging
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from pipeline import distributed
from pipeline.config import FinetuneRecipe, LogConfig, PretrainRecipe
from pipeline.distributed import World
from pipeline.engine.plan import Shape, model_flops
from pipeline.files import new_file, write_text
from pipeline.flow import Batch
from pipeline.tracking import Tracker

log = logging.getLogger(__name__)

NAME_BYTES = 64  # of a host
SIDES = (1024, 2048, 4096, 8192)  # of the matrices; a larger one only where the last took less than ENOUGH
ENOUGH = 0.02  # seconds of one matmul, against launch and clock
TRIALS = 5
ROWS = 40  # operators in the table


class Telemetry:
    """A run's numbers and clock; a context manager, which writes a trace that the run's end cut short.

    A collective when made.

    Args:
        run_dir: Run directory.
        tracker: Writes the numbers, on rank 0.
        world: Of the ranks that are compared.
        config: What is reported, and how often.
        network: Its forward passes are timed while it trains.
        clips: Of a step.
        step: Step that the run starts from: later lines are those of a lost attempt and are cut off.
        at_peak: Clips a second at the hardware's peak, for the MFU; None: unknown.
    """

    def __init__(
        self, run_dir: Path, tracker: Tracker, world: World, config: LogConfig, network: nn.Module, clips: int,
        step: int, at_peak: float | None,
    ) -> None:  # fmt: skip
        self._run_dir, self._tracker, self._world, self._config = run_dir, tracker, world, config
        self._clips, self._at_peak = clips, at_peak
        self._begun = self._since = (time.perf_counter(), step)
        self._waited = 0.0  # seconds, since then
        self._compared, self._waited_alone = step, 0.0  # the same for the comparison of ranks
        self._passes: list[tuple[Any, Any]] = []  # begin and end of forward passes
        self._entered: Any = None
        self._hosts: list[str] = []
        self._trace: Any = None
        if world.size > 1 and config.stragglers:
            name = socket.gethostname().encode()[:NAME_BYTES].ljust(NAME_BYTES)
            names = distributed.gather(torch.tensor([list(name)], dtype=torch.uint8, device=world.device))
            self._hosts = [bytes(row).decode(errors="replace").strip() for row in names.tolist()]
            network.register_forward_pre_hook(self._enter)
            network.register_forward_hook(self._leave)
        tracker.resume(step)

    def timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Passes batches on, and counts the seconds that the training process waits for them."""
        while True:
            before = time.perf_counter()
            batch = next(batches, None)
            if batch is None:
                return
            seconds = time.perf_counter() - before
            self._waited += seconds
            self._waited_alone += seconds
            yield batch

    @contextmanager
    def profiled(self, step: int, engine: Any) -> Iterator[None]:
        """Around forward, backward and update of step `step`, counted from 1 as in metrics.jsonl."""
        first, last = self._config.profile
        if first <= step <= last and self._trace is None:
            cuda = [ProfilerActivity.CUDA] if self._world.device.type == "cuda" else []
            self._trace = profile(activities=[ProfilerActivity.CPU, *cuda], record_shapes=True)
            self._trace.start()
        counter = None
        if step == self._config.profile_flops and self._world.is_main:
            from deepspeed.profiling.flops_profiler import FlopsProfiler  # imports DeepSpeed

            counter = FlopsProfiler(engine.module, engine)
            counter.start_profile()
        try:
            yield
        finally:
            if counter:
                counter.stop_profile()
                file = self._profile_folder() / "flops.txt"
                with new_file(file) as temporary:
                    counter.print_model_profile(profile_step=step, output_file=str(temporary))
                counter.end_profile()
                log.info("DeepSpeed's FLOPS profile of step %d: %s", step, file)
            if step == last:
                self._write_trace()

    def write_step(self, step: int, total: int, values: Mapping[str, float]) -> None:
        """Logs one step of `total`: losses, rate, throughput since the last logged one, share of waiting; on all ranks.

        Args:
            step: Finished steps.
            total: Of the run.
            values: Named numbers, "loss" and "lr" among them.
        """
        compared = self._compare(step, last=step == total)
        now = time.perf_counter()
        window = max(now - self._since[0], 1e-9)
        row = {
            **values,
            "clips_per_second": self._clips * (step - self._since[1]) / window,
            "data_wait_fraction": min(1.0, self._waited / window),
            **compared,
        }
        if self._at_peak:
            row["mfu"] = row["clips_per_second"] / self._at_peak
        self._tracker.metrics(row, step)
        begun, first = self._begun
        eta = round((now - begun) / max(1, step - first) * (total - step))
        log.info(
            "step %d/%d  loss %.4f  lr %.2e  %.1f clips/s  wait %.0f %%  eta %s",
            step, total, row["loss"], row["lr"], row["clips_per_second"], 100 * row["data_wait_fraction"],
            timedelta(seconds=eta),
        )  # fmt: skip
        self._since, self._waited = (now, step), 0.0

    def write_evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Logs held-out metrics; their time does not count as training."""
        self._tracker.metrics(metrics, step)
        log.info("step %d  %s", step, "  ".join(f"{name} {value:.4f}" for name, value in metrics.items()))
        self._since, self._waited = (time.perf_counter(), step), 0.0

    def __enter__(self) -> "Telemetry":
        return self

    def __exit__(self, *error: object) -> None:
        self._write_trace()

    def _compare(self, step: int, last: bool) -> dict[str, float]:
        """Where it is due after `step`, or at the `last`: which rank keeps the others waiting; a collective.

        Returns:
            `slowest_rank`, and `slowest_ratio`: its time over the median rank's; equal on all ranks.
        """
        steps = step - self._compared
        if not self._hosts or not steps or (steps < self._config.stragglers and not last):
            return {}
        passes, self._passes = self._passes, []
        if self._world.device.type == "cuda":  # which has been waited for: losses were read
            forward = sum(begin.elapsed_time(end) for begin, end in passes) / 1000
        else:
            forward = sum(end - begin for begin, end in passes)
        own = torch.tensor([[forward / steps, self._waited_alone / steps]], dtype=torch.float64)
        ranks = distributed.gather(own.to(self._world.device)).cpu()
        self._compared, self._waited_alone = step, 0.0
        totals = ranks.sum(dim=1)
        slowest, median = int(totals.argmax()), float(totals.median())  # of two: the faster
        usual, wait = ranks.median(dim=0).values.tolist()
        log.info(
            "slowest of %d ranks in %d steps: rank %d on %s, %.3f s a step (median %.3f): forward %.3f (%.3f), "
            "data wait %.3f (%.3f)",
            len(ranks), steps, slowest, self._hosts[slowest], totals[slowest], median, ranks[slowest, 0], usual,
            ranks[slowest, 1], wait,
        )  # fmt: skip
        return {"slowest_rank": float(slowest), "slowest_ratio": float(totals[slowest]) / max(median, 1e-9)}

    def _enter(self, network: nn.Module, inputs: Any) -> None:
        self._entered = self._now() if network.training else None

    def _leave(self, network: nn.Module, inputs: Any, output: Any) -> None:
        if self._entered is not None:
            self._passes.append((self._entered, self._now()))

    def _now(self) -> Any:
        if self._world.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def _profile_folder(self) -> Path:
        folder = self._run_dir / "profile"
        folder.mkdir(exist_ok=True)
        return folder

    def _write_trace(self) -> None:
        trace, self._trace = self._trace, None
        if trace is None:
            return
        trace.stop()
        file = self._profile_folder() / f"rank-{self._world.rank}.trace.json.gz"
        with new_file(file) as temporary:  # its name says that it is to be compressed
            trace.export_chrome_trace(f"{temporary}.gz")
            Path(f"{temporary}.gz").replace(temporary)
        by = "self_device_time_total" if self._world.device.type == "cuda" else "self_cpu_time_total"
        table = trace.key_averages().table(sort_by=by, row_limit=ROWS)
        write_text(file.with_name(f"rank-{self._world.rank}.operators.txt"), table)
        log.info("torch's profile: %s", file)


def clips_per_second_at_peak(
    recipe: PretrainRecipe | FinetuneRecipe, shapes: Sequence[tuple[Shape, float]], ds: dict[str, Any], world: World
) -> float | None:
    """Clips a second of all ranks if they did nothing but the model's FLOPs at their peak; a collective.

    Equal on all ranks: of the measured peaks the mean counts. None with `log.peak_tflops` = null.

    Args:
        recipe: Settings.
        shapes: Of the inputs of each length, and its share of the clips.
        ds: Reconciled DeepSpeed configuration: says the precision.
        world: Ranks.
    """
    given = recipe.log.peak_tflops
    if given is None:
        return None
    half = [dtype for key, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)) if ds[key]["enabled"]]
    dtype = half[0] if half else torch.float32
    peak = given * 1e12 or distributed.mean({"peak": _measure_peak(world.device, dtype)}, world.device)["peak"]
    flops = sum(share * model_flops(recipe, shape) for shape, share in shapes)
    log.info(
        "MFU against %.3g TFLOP/s a rank (%s, %s); %.3g GFLOP a clip",
        peak / 1e12, str(dtype).removeprefix("torch."), "given" if given else "measured", flops / 1e9,
    )  # fmt: skip
    return world.size * peak / flops


def _measure_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of square matmuls on this rank, the best of a few, with the other ranks busy as in training."""
    generator = torch.Generator(device).manual_seed(0)  # leaves the run's own alone
    best = 0.0
    for side in SIDES:
        left, right = torch.randn(2, side, side, dtype=dtype, device=device, generator=generator)
        times = []
        for _ in range(TRIALS + 1):
            _wait(device)
            start = time.perf_counter()
            torch.matmul(left, right)
            _wait(device)
            times.append(time.perf_counter() - start)
        best = max(best, 2 * side**3 / min(times))
        if min(times) > ENOUGH:
            break
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the training needs the room
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
