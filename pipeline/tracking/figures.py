"""Pictures and tables of a run, for MLflow and the run directory.

In: batches, arrays, `metrics.jsonl`, `results.json`'s content, predictions. Out: PNG, CSV and JSON files, each whole or
not at all. Drawing takes a second or less and happens at evaluations and at the end only, on rank 0.
"""

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pipeline.files import new_file, write_csv, write_json
from pipeline.flow import Batch
from pipeline.tracking.spool import Feed
from pipeline.tracking.tracker import Tracker

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CLIPS = 3  # of a picture of reconstructions
SAMPLES = 25  # clips of the predictions sample
PANELS = (  # of the curves: title, names whose curves it shows
    ("loss", ("loss", "eval_loss")),
    ("masked patches found", ("spec_accuracy", "eval_spec_accuracy", "wav_accuracy", "eval_wav_accuracy")),
    ("reconstruction MSE", ("spec_mse", "eval_spec_mse", "wav_mse", "eval_wav_mse")),
    ("contrast", ("contrast", "eval_contrast")),
    ("held-out metric", ("eval_mAP", "eval_accuracy")),
    *((f"frozen, {probe} probe", tuple(f"eval_probe_{probe}_{stream}" for stream in ("spec", "wav", "both")))
      for probe in ("linear", "knn")),
    ("gradient norm", ("grad_norm",)),
    ("learning rate", ("lr",)),
    ("clips per second", ("clips_per_second",)),
)


class Reconstructions:
    """Pictures of masked and rebuilt held-out clips, at `count` of a pretraining's evaluations.

    Evenly over its steps; the last evaluation is always among them. The forward pass is a collective under ZeRO-3, so
    all ranks take part; rank 0 draws `pictures/step-N.png`, also an artifact.

    Args:
        run_dir: Run directory.
        tracker: Of the run.
        count: Pictures of a run; 0: none.
        draws: This rank writes the file.
    """

    def __init__(self, run_dir: Path, tracker: Tracker, count: int, draws: bool) -> None:
        self._folder = run_dir / "pictures"
        self._tracker, self._count, self._draws = tracker, count, draws
        self._kept: Batch | None = None
        self._drawn = 0  # parts of the run that have their picture

    def keep(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Passes the evaluation's batches on, and keeps a copy of the first clips (buffers are reused)."""
        for batch in batches:
            if self._kept is None and self._count:
                head = batch[:CLIPS]
                values = {field.name: getattr(head, field.name) for field in fields(head)}
                copied: dict[str, Any] = {name: value.clone() for name, value in values.items()
                                          if isinstance(value, torch.Tensor)}  # fmt: skip
                self._kept = replace(head, **copied)
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
        target, predicted = (tensor.float().cpu().numpy() for tensor in (rebuilt.target, rebuilt.predicted))
        title = f"{rebuilt.of}, step {step}"
        try:
            reconstructions(target, rebuilt.mask.cpu().numpy(), predicted, rebuilt.grid, path, title)
        except OSError as error:
            log.warning("%s: %s; the run goes on without it", path, error.strerror)
            return
        self._tracker.artifact(path, "pictures")


def save(figure: "Figure", path: Path, dpi: int = 90) -> None:
    """Writes a PNG, whole or not at all."""
    with new_file(path) as temporary:
        figure.savefig(temporary, dpi=dpi, format="png")


def reconstructions(
    targets: np.ndarray, masks: np.ndarray, predicted: np.ndarray, grid: tuple[int, int], path: Path, title: str
) -> None:
    """For each clip: the spectrogram, what the model saw, what it made of it.

    Args:
        targets: Patches [B, N, P * P], N = grid[0] * grid[1] in frequency-major order.
        masks: int [B, K], masked patches.
        predicted: [B, K, P * P].
        grid: Patches along frequency and time.
        path: PNG.
        title: Of the picture.
    """
    from matplotlib.figure import Figure

    clips = len(targets)
    figure = Figure(figsize=(13, 1.0 + 1.75 * clips), layout="constrained")
    axes: Any = figure.subplots(clips, 3, squeeze=False)
    figure.suptitle(title, fontsize=11)
    for row in range(clips):
        seen, made = targets[row].copy(), targets[row].copy()
        seen[masks[row]] = np.nan
        made[masks[row]] = predicted[row]
        low, high = np.quantile(targets[row], [0.01, 0.99])
        pictures = (("input", targets[row]), (f"{masks.shape[1]} of {len(seen)} patches masked", seen),
                    ("reconstructed", made))  # fmt: skip
        for axis, (name, patches) in zip(axes[row], pictures, strict=True):
            axis.set_facecolor("#c9ced6")
            axis.imshow(_image(patches, grid), origin="lower", aspect="auto", vmin=low, vmax=high, cmap="magma",
                        interpolation="nearest")  # fmt: skip
            axis.set_xticks([])
            axis.set_yticks([])
            if row == 0:
                axis.set_title(name, fontsize=9)
    save(figure, path, dpi=80)


def _image(patches: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """[N, P * P] -> [frequency, time]."""
    side = round(patches.shape[1] ** 0.5)
    blocks = patches.reshape(*grid, side, side)
    return blocks.transpose(0, 2, 1, 3).reshape(grid[0] * side, grid[1] * side)


def curves(metrics: Path, path: Path) -> bool:
    """Losses, rates and metrics over steps from `metrics.jsonl`; False where there is nothing to draw."""
    from matplotlib.figure import Figure

    rows = Feed(metrics).read()
    series = {name: [(row["step"], row[name]) for row in rows if name in row] for _, names in PANELS for name in names}
    panels = [(title, [n for n in names if series[n]]) for title, names in PANELS]
    panels = [(title, names) for title, names in panels if names]
    if not panels:
        return False
    columns = min(4, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(3.6 * columns, 2.7 * lines), layout="constrained")
    axes: Any = figure.subplots(lines, columns, squeeze=False)
    for axis, panel in zip(axes.flat, [*panels, *[None] * (lines * columns - len(panels))], strict=True):
        if panel is None:
            axis.set_axis_off()
            continue
        for name in panel[1]:
            steps, values = zip(*series[name], strict=True)
            style = {"marker": "o", "markersize": 3} if name.startswith("eval_") else {"linewidth": 1.2}
            label = "held-out" if name.startswith("eval_") else "training"
            axis.plot(steps, values, label=name.rsplit("_", 1)[1] if "_probe_" in name else label, **style)
        axis.set_title(panel[0], fontsize=9)
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.25)
        if len(panel[1]) > 1:
            axis.legend(fontsize=7, frameon=False)
    save(figure, path)
    return True


def evaluation(content: dict[str, Any], targets: np.ndarray, logits: np.ndarray, folder: Path) -> list[Path]:
    """`per_class` of results.json as CSV, the best class first; of single-label clips the confusion matrix too."""
    columns = ["label", "id", "positives", "average_precision"]
    rows = sorted(content["per_class"], key=lambda row: -(row["average_precision"] or -1.0))
    write_csv(folder / "per_class.csv", [columns, *([row[name] for name in columns] for row in rows)])
    names = [row["label"] for row in content["per_class"]]
    single = content["metric"] == "accuracy"
    return [folder / "per_class.csv", *(confusion(targets, logits, names, folder) if single else [])]


def confusion(targets: np.ndarray, logits: np.ndarray, names: Sequence[str], folder: Path) -> list[Path]:
    """Confusion matrix of single-label clips [n, C] as CSV and PNG; rows are the truth."""
    from matplotlib.figure import Figure

    counts = np.zeros((len(names), len(names)), dtype=int)
    np.add.at(counts, (targets.argmax(axis=1), logits.argmax(axis=1)), 1)
    table, picture = folder / "confusion.csv", folder / "confusion.png"
    rows = ([name, *row] for name, row in zip(names, counts.tolist(), strict=True))
    write_csv(table, [["truth \\ predicted", *names], *rows])
    side = 3.0 + 0.17 * len(names)
    figure = Figure(figsize=(side, side), layout="constrained")
    axis = figure.subplots()
    shares = counts / np.maximum(1, counts.sum(axis=1, keepdims=True))
    axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axis.set_xticks(range(len(names)), names, rotation=90, fontsize=6, parse_math=False)
    axis.set_yticks(range(len(names)), names, fontsize=6, parse_math=False)
    axis.set_xlabel("predicted")
    axis.set_ylabel("truth")
    save(figure, picture)
    return [table, picture]


def precision_recall_curves(
    curves: Sequence[tuple[np.ndarray, np.ndarray]], names: Sequence[str], folder: Path
) -> list[Path]:
    """Precision over recall of every class with a positive, as CSV (label, recall, precision) and PNG."""
    from matplotlib.figure import Figure

    table, picture = folder / "pr_curves.csv", folder / "pr_curves.png"
    rows = ([name, f"{r:.6g}", f"{p:.6g}"] for name, curve in zip(names, curves, strict=True)
            for r, p in zip(*curve, strict=True))  # fmt: skip
    write_csv(table, [["label", "recall", "precision"], *rows])
    figure = Figure(figsize=(5, 4), layout="constrained")
    axis = figure.subplots()
    shown = [curve for curve in curves if len(curve[0])]
    for recall, precision in shown:
        axis.plot(recall, precision, linewidth=0.7, color="tab:blue", alpha=max(0.08, 1 / (1 + len(shown) / 8)))
    if shown:
        grid = np.linspace(0, 1, 101)
        mean = np.mean([np.interp(grid, recall[::-1], precision[::-1]) for recall, precision in shown], axis=0)
        axis.plot(grid, mean, color="black", label=f"mean of {len(shown)} classes")
        axis.legend(frameon=False)
    axis.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
    save(figure, picture)
    return [table, picture]


def prediction_sample(
    keys: Sequence[str], targets: np.ndarray, logits: np.ndarray, names: Sequence[str], path: Path
) -> None:
    """True and best predicted labels of clips spread over the evaluation set, as JSON."""
    chosen = np.unique(np.linspace(0, len(keys) - 1, SAMPLES).round().astype(int))
    content = [
        {
            "key": keys[i],
            "labels": [names[c] for c in np.flatnonzero(targets[i] > 0.5).tolist()],
            "predicted": {names[c]: round(float(logits[i, c]), 3) for c in np.argsort(-logits[i])[:5].tolist()},
        }
        for i in chosen.tolist()
    ]
    write_json(path, content)
