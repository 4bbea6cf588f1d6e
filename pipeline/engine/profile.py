"""Profiles of chosen steps: torch's profiler and DeepSpeed's FLOPS profiler.

In: `log.profile` and `log.profile_flops`. Out, in the run directory:

    profile/rank-N.trace.json.gz   every rank's trace of the steps `log.profile`, for Perfetto or chrome://tracing
    profile/rank-N.operators.txt   the same, summed by operator, the longest first
    profile/flops.txt              module by module: parameters, MACs and latency of the forward passes of
                                   step `log.profile_flops`, on rank 0

Neither changes a number of the run; the profiled steps take longer. What was recorded is written also
where the run ends in between.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from torch.profiler import ProfilerActivity, profile

from pipeline.config import LogConfig
from pipeline.distributed import World

log = logging.getLogger(__name__)

ROWS = 40  # operators in the table


class Profiler:
    """Records the steps that the settings name; a context manager, closed at the end of the run.

    Args:
        run_dir: Run directory.
        engine: DeepSpeed engine.
        world: Ranks.
        config: Settings.
    """

    def __init__(self, run_dir: Path, engine: Any, world: World, config: LogConfig) -> None:
        self._folder = run_dir / "profile"
        self._engine, self._world, self._config = engine, world, config
        self._trace: Any = None

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Around forward, backward and update of step `step`, counted from 1 as in metrics.jsonl."""
        first, last = self._config.profile
        if first <= step <= last and self._trace is None:
            activities = [ProfilerActivity.CPU]
            if self._world.device.type == "cuda":
                activities.append(ProfilerActivity.CUDA)
            self._trace = profile(activities=activities, record_shapes=True)
            self._trace.start()
        counter = self._start_counting() if step == self._config.profile_flops and self._world.is_main else None
        try:
            yield
        finally:
            if counter:
                self._write_flops(counter, step)
            if step == last:
                self._write_trace()

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._write_trace()

    def _start_counting(self) -> Any:
        from deepspeed.profiling.flops_profiler import FlopsProfiler  # imports DeepSpeed

        counter = FlopsProfiler(self._engine.module, self._engine)
        counter.start_profile()
        return counter

    def _write_flops(self, counter: Any, step: int) -> None:
        counter.stop_profile()
        self._folder.mkdir(exist_ok=True)
        counter.print_model_profile(profile_step=step, output_file=str(self._folder / "flops.txt"))
        counter.end_profile()
        log.info("DeepSpeed's FLOPS profile of step %d: %s", step, self._folder / "flops.txt")

    def _write_trace(self) -> None:
        trace, self._trace = self._trace, None
        if trace is None:
            return
        trace.stop()
        self._folder.mkdir(exist_ok=True)
        name = f"rank-{self._world.rank}"
        trace.export_chrome_trace(str(self._folder / f"{name}.trace.json.gz"))
        by = "self_device_time_total" if self._world.device.type == "cuda" else "self_cpu_time_total"
        table = trace.key_averages().table(sort_by=by, row_limit=ROWS)
        (self._folder / f"{name}.operators.txt").write_text(table, encoding="utf-8")
        log.info("torch's profile: %s", self._folder / f"{name}.trace.json.gz")
