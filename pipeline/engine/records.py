"""What a run tells: `metrics.jsonl`, the progress line, MLflow.

In: named numbers at a step. Out: one JSON object per logged step, on rank 0, of the numbers that are finite; a
resumed run goes on in the same file without a step twice.
"""

import json
import logging
import math
import time
from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path

from pipeline.distributed import World
from pipeline.engine.stragglers import Stragglers
from pipeline.files import write_text
from pipeline.flow import Batch
from pipeline.tracking import Tracker

log = logging.getLogger(__name__)


class Records:
    """Writer of a run's numbers, and its clock.

    Args:
        run_dir: Run directory.
        tracker: MLflow.
        world: Only rank 0 writes.
        step: Step that the run starts from: later lines are those of a lost attempt and are cut off.
        at_peak: Clips a second at the hardware's peak, for the MFU; None: unknown.
        stragglers: Comparison of the ranks.
    """

    def __init__(
        self,
        run_dir: Path,
        tracker: Tracker,
        world: World,
        step: int,
        at_peak: float | None,
        stragglers: Stragglers,
    ) -> None:
        self._path = run_dir / "metrics.jsonl"
        self._tracker = tracker
        self._writes = world.is_main
        self._begun = self._window = time.perf_counter()
        self._waited = 0.0
        self._clips = 0
        self._first = step
        self._at_peak = at_peak
        self._stragglers = stragglers
        if self._writes:
            self._cut(step)

    def timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Passes batches on, and counts the seconds that the training process waits for them."""
        while True:
            before = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            seconds = time.perf_counter() - before
            self._waited += seconds
            self._stragglers.waited(seconds)
            yield batch

    def count(self, clips: int) -> None:
        """Counts trained clips for the throughput."""
        self._clips += clips

    def write(self, step: int, total: int, values: Mapping[str, float]) -> None:
        """Logs one step: losses, rate, throughput since the last logged step, share of waiting; on all ranks."""
        compared = self._stragglers.report(step, last=step == total)
        now = time.perf_counter()
        window = max(now - self._window, 1e-9)
        row = {
            **values,
            "clips_per_second": self._clips / window,
            "data_wait_fraction": min(1.0, self._waited / window),
            **compared,
        }
        if self._at_peak:
            row["mfu"] = row["clips_per_second"] / self._at_peak
        self._append(step, row)
        eta = round((now - self._begun) / max(1, step - self._first) * (total - step))
        log.info(
            "step %d/%d  loss %.4f  lr %.2e  %.1f clips/s  wait %.0f %%  eta %s",
            step, total, row["loss"], row["lr"], row["clips_per_second"], 100 * row["data_wait_fraction"],
            timedelta(seconds=eta),
        )  # fmt: skip
        self._window, self._waited, self._clips = now, 0.0, 0

    def write_evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Logs held-out metrics; their time does not count as training."""
        self._append(step, metrics)
        log.info("step %d  %s", step, "  ".join(f"{name} {value:.4f}" for name, value in metrics.items()))
        self._window, self._waited, self._clips = time.perf_counter(), 0.0, 0

    def write_saving(self, step: int, seconds: Mapping[str, float]) -> None:
        """Logs what a checkpoint cost, at the step at which it was known to be on the disk."""
        self._append(step, seconds)

    def _append(self, step: int, row: Mapping[str, float]) -> None:
        if not self._writes or not row:
            return
        finite = {name: value for name, value in row.items() if math.isfinite(value)}  # JSON has no Infinity, no NaN
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **finite}) + "\n")
        self._tracker.metrics(row, step)

    def _cut(self, step: int) -> None:
        if not self._path.exists():
            return
        kept = []
        for line in self._path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except (ValueError, TypeError, KeyError):  # a line cut short by a kill, and of the lost attempt
                log.warning("%s: dropped a broken line: %.60s", self._path, line)
        write_text(self._path, "".join(kept))
