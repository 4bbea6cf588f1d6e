"""Masked reconstructions of held-out clips, at a few steps of pretraining.

In: the evaluation's batches, the forward function. Out: `pictures/step-N.png`, also as artifacts.
"""

import math
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from pipeline.flow import Batch
from pipeline.tracking import figures
from pipeline.tracking.tracker import Tracker

CLIPS = 3


class Pictures:
    """Draws at `count` of a run's evaluations, evenly over its steps; the last one is always among them.

    The forward pass is a collective under ZeRO-3, so all ranks take part; rank 0 draws.

    Args:
        run_dir: Run directory.
        tracker: Of the run.
        count: Pictures of a run; 0: none.
        draws: This rank writes the file.
    """

    def __init__(self, run_dir: Path, tracker: Tracker, count: int, draws: bool) -> None:
        self._folder = run_dir / "pictures"
        self._tracker = tracker
        self._count = count
        self._draws = draws
        self._kept: Batch | None = None
        self._drawn = 0  # parts of the run that have their picture

    def watch(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Passes the evaluation's batches on, and keeps a copy of the first clips (buffers are reused)."""
        for batch in batches:
            if self._kept is None and self._count:
                head = batch[:CLIPS]
                copies: dict[str, Any] = {f.name: getattr(head, f.name) for f in fields(head)}
                copies = {name: None if value is None else value.clone() for name, value in copies.items()}
                self._kept = replace(head, **copies)
            yield batch

    def draw(self, forward: Any, step: int, total: int) -> None:
        """After the evaluation at `step` of `total`: a picture, where one is due."""
        part = math.floor(self._count * step / total)
        if self._kept is None or part <= self._drawn:
            return
        self._drawn = part
        with torch.no_grad():
            rebuilt = forward(self._kept, rebuild=True)
        if not self._draws:
            return
        self._folder.mkdir(exist_ok=True)
        path = self._folder / f"step-{step:08d}.png"
        arrays = [tensor.float().cpu().numpy() for tensor in (rebuilt.target, rebuilt.predicted)]
        masks = rebuilt.mask.cpu().numpy()
        title = f"{rebuilt.of}, step {step}"
        figures.reconstructions(arrays[0], masks, arrays[1], rebuilt.grid, path, title)
        self._tracker.artifact(path, "pictures")
