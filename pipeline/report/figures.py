"""Pictures of the report: a chart for each table, and Figure 2.

In: `Collected`. Out: PNG files. Grey is the paper, colour is ours; what was not run is said in the chart.
"""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display on a cluster

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pipeline.report.collect import Collected
from pipeline.tracking.figures import save

PAPER, OURS = "#9aa3ad", "#1f6f8b"
CYCLE = ["#1f6f8b", "#e07a3f", "#6a4c93", "#3a8f5c", "#b23a48", "#7f7f2a"]


def draw(part: Collected, path: Path) -> None:
    """Writes the chart of a table, or Figure 2."""
    figure = _figure2(part) if part.table.kind == "figure" else _bars(part)
    save(figure, path, dpi=110)


def _bars(part: Collected) -> Figure:
    columns = part.table.columns
    names = [row.name for row in part.table.rows]
    height = 1.2 + 0.42 * len(names)
    figure = Figure(figsize=(3.0 + 3.6 * len(columns), height), layout="constrained")
    axes: Any = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
    for axis, column in zip(axes, columns, strict=True):
        _bars_of(axis, part, column, names)
    axes[0].set_yticks(range(len(names)), names, parse_math=False)
    axes[0].invert_yaxis()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper right", ncols=2, frameon=False)
    return figure


def _bars_of(axis: Axes, part: Collected, column: str, names: list[str]) -> None:
    metric = "percent"
    paper = [part.results[name, column].paper for name in names]
    axis.barh([i - 0.19 for i in range(len(names))], [v or 0 for v in paper], 0.36, color=PAPER, label="paper")
    ours = [part.results[name, column] for name in names]
    axis.barh(
        [i + 0.19 for i in range(len(names))], [r.mean or 0 for r in ours], 0.36, color=OURS, label="ours",
        xerr=[r.spread or 0 for r in ours], ecolor="#14323d", error_kw={"elinewidth": 1.2},
    )  # fmt: skip
    for i, (number, result) in enumerate(zip(paper, ours, strict=True)):
        if number is not None:
            axis.text(number, i - 0.19, f" {number:.1f}", va="center", fontsize=8, color="#59626c")
        if result.mean is not None:
            metric = f"{result.metric}, percent"
            axis.text(result.mean + (result.spread or 0), i + 0.19, f" {result.mean:.1f}", va="center", fontsize=8)
        elif result.wanted:
            axis.text(0, i + 0.19, " not run", va="center", fontsize=8, color="#a33")
    axis.set_title(part.titles[column], fontsize=10, parse_math=False)
    axis.set_xlabel(metric)
    axis.set_xlim(0, 1.15 * max([v for v in paper if v] + [r.mean for r in ours if r.mean] + [1]))
    axis.spines[["top", "right"]].set_visible(False)


def _figure2(part: Collected) -> Figure:
    """Masked accuracy, MSE, finetuned metric against pretraining steps."""
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    axes: Any = figure.subplots(1, 3)
    drawn: set[tuple[tuple[int, float], ...]] = set()
    for number, curve in enumerate(part.curves):
        colour = CYCLE[number % len(CYCLE)]
        pretraining = curve.name.rsplit("-", 1)[0]
        if tuple(curve.accuracy) not in drawn:  # systems of one pretraining share its curves
            drawn.add(tuple(curve.accuracy))
            for axis, points in ((axes[0], curve.accuracy), (axes[1], curve.mse)):
                axis.plot(*_columns(points), "o-", color=colour, label=pretraining, markersize=3)
        steps = [point[0] for point in curve.finetuned]
        axes[2].errorbar(
            steps, [p[1] for p in curve.finetuned], [p[2] for p in curve.finetuned], fmt="o-", color=colour,
            label=curve.name if steps else f"{curve.name} (not run)", markersize=4, capsize=3,
        )  # fmt: skip
        if curve.paper is not None and steps:
            axes[2].plot(steps[-1], curve.paper, "*", color=colour, markersize=11, markeredgecolor="black")
    metric = next((r.metric for r in part.results.values() if r.metric), "mAP")
    titles = ("masked patches found, held-out, percent", "reconstruction MSE, held-out", f"finetuned {metric}, percent")
    for axis, title in zip(axes, titles, strict=True):
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("pretraining steps")
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
        if axis.get_legend_handles_labels()[0]:
            for text in axis.legend(fontsize=8, frameon=False).get_texts():
                text.set_parse_math(False)  # names of runs are text, no formulas
    return figure


def _columns(points: list[tuple[int, float]]) -> tuple[list[int], list[float]]:
    return [x for x, _ in points], [y for _, y in points]
