"""The numbers of tables, drawn: as text in Markdown or HTML, and as charts; Figure 2.

In: `Collected`. Out: text, which names pictures by relative path, so that the directory can be moved or mailed; PNG
files. Grey is the paper, colour is ours; what was not run is said in the chart.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display on a cluster

from jinja2 import Environment
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pipeline.report.collect import Collected, Result
from pipeline.tracking.figures import save

PAPER, OURS = "#9aa3ad", "#1f6f8b"
CYCLE = ["#1f6f8b", "#e07a3f", "#6a4c93", "#3a8f5c", "#b23a48", "#7f7f2a"]
BEST = "best epoch (number)"  # of cross-validations
DIFFERENCE = "difference [95 %], p"
PER_COLUMN = ["paper", "ours", BEST, "n", "clips", DIFFERENCE]

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ title }}</title><style>
body { font: 15px/1.45 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; color: #1c2430 }
table { border-collapse: collapse; margin: .8em 0; font-variant-numeric: tabular-nums }
th, td { padding: .3em .8em; border-bottom: 1px solid #d7dce2; text-align: right } th { background: #f2f4f7 }
th:first-child, td:first-child { text-align: left } tr.reference td { font-weight: 600 }
tr.other td { color: #77808c } p.caption { color: #48525e; font-size: 14px } img { max-width: 100% }
</style></head><body><h1>{{ title }}</h1>
{% for table in tables %}<h2 id="{{ table.id }}">{{ table.title }}</h2>
<table><thead><tr>{% for cell in table.head %}<th>{{ cell }}</th>{% endfor %}</tr></thead><tbody>
{% for kind, cells in table.rows %}<tr class="{{ kind }}">{% for cell in cells %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</tbody></table>
<p class="caption">{{ table.caption|code }}</p>
<img src="{{ table.picture }}" alt="{{ table.title }}">
{% endfor %}</body></html>
"""

LEGEND = (
    "paper, ours: percent; ours is mean ± standard deviation over seeds (or folds). n: finished of wanted runs; empty "
    "cells were not run, and a seed counts once it has all its folds. clips: evaluated, and their share of those that "
    "the source lists. difference: to the row "
    "'{reference}' in points, paired bootstrap over the evaluation clips."
)


def tables(parts: Sequence[Collected]) -> list[dict[str, Any]]:
    """What both forms draw: of each table id, title, head, rows (style and cells as text), caption and picture."""
    return [_table(part) for part in parts]


def _table(part: Collected) -> dict[str, Any]:
    columns = {column: [name for name in PER_COLUMN if name != BEST or column in part.folded]
               for column in part.table.columns}  # fmt: skip
    rows = []
    for row in part.table.rows:
        cells = [row.name]
        for column, names in columns.items():
            texts = _texts(part.results[row.name, column], row.name == part.reference)
            cells += [texts[name] for name in names]
        rows.append(("reference" if row.name == part.reference else "" if row.run else "other", cells))
    titles = {column: f"{part.titles[column]}: " if len(columns) > 1 else "" for column in columns}
    head = ["system", *(titles[column] + name for column, names in columns.items() for name in names)]
    return {"id": part.name, "title": part.table.title, "head": head, "rows": rows,
            "caption": " ".join([*part.caption, LEGEND.format(reference=part.reference)]),
            "picture": f"{part.name}.png"}  # fmt: skip


def _texts(result: Result, is_reference: bool) -> dict[str, str]:
    """What PER_COLUMN names; empty where there is nothing."""
    texts = dict.fromkeys(PER_COLUMN, "")
    texts["paper"] = "" if result.paper is None else f"{result.paper:.1f}"
    texts["n"] = f"{result.done}/{result.wanted}" if result.wanted else ""
    if result.mean is None:
        return texts
    texts["ours"] = _spread(result.mean, result.spread)
    if result.best is not None:
        texts[BEST] = f"{_spread(result.best, result.best_spread)} ({', '.join(map(str, result.best_epochs))})"
    texts["clips"] = f"{result.clips}{'' if result.coverage is None else f' ({result.coverage:.0%})'}"
    if d := result.difference:
        texts[DIFFERENCE] = f"{100 * d.value:+.1f} [{100 * d.low:+.1f}, {100 * d.high:+.1f}], {d.p:.3f}"
    elif is_reference:
        texts[DIFFERENCE] = "reference"
    return texts


def _spread(mean: float, deviation: float | None) -> str:
    return f"{mean:.1f}" if deviation is None else f"{mean:.1f} ± {deviation:.1f}"


def markdown(title: str, drawn: Sequence[dict[str, Any]]) -> str:
    """The report as GitHub Markdown."""
    lines = [f"# {title}", ""]
    for table in drawn:
        lines += [f"## {table['title']}", "", _line(table["head"])]
        lines.append(_line(["---"] + ["---:"] * (len(table["head"]) - 1)))
        for kind, cells in table["rows"]:
            lines.append(_line([f"**{cell}**" if cell and kind == "reference" else cell for cell in cells]))
        lines += ["", table["caption"], "", f"![{table['title']}]({table['picture']})", ""]
    return "\n".join(lines)


def html(title: str, drawn: Sequence[dict[str, Any]]) -> str:
    """The report as one page beside its pictures."""
    environment = Environment(autoescape=True)
    environment.filters["code"] = lambda text: Markup(re.sub("`([^`]+)`", r"<code>\1</code>", str(escape(text))))
    return environment.from_string(PAGE).render(title=title, tables=drawn)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


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
            state = f" {result.done} of {result.wanted} run" if result.done else " not run"
            axis.text(0, i + 0.19, state, va="center", fontsize=8, color="#a33")
    axis.set_title(part.titles[column], fontsize=10, parse_math=False)
    axis.set_xlabel(metric)
    axis.set_xlim(0, 1.15 * max([v for v in paper if v] + [r.mean for r in ours if r.mean] + [1]))
    axis.spines[["top", "right"]].set_visible(False)


def _figure2(part: Collected) -> Figure:
    """Masked accuracy, MSE, finetuned metric against pretraining steps."""
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    axes: Any = figure.subplots(1, 3)
    drawn: list[list[tuple[float, ...]]] = []
    for number, (name, curve) in enumerate(part.curves.items()):
        colour = CYCLE[number % len(CYCLE)]
        if curve["accuracy"] not in drawn:  # systems of one pretraining share its curves
            drawn.append(curve["accuracy"])
            for axis, points in ((axes[0], curve["accuracy"]), (axes[1], curve["mse"])):
                axis.plot(*_columns(points, 2), "o-", color=colour, label=name.rsplit("-", 1)[0], markersize=3)
        steps, means, spreads = _columns(curve["finetuned"], 3)
        axes[2].errorbar(
            steps, means, spreads, fmt="o-", color=colour, label=name if steps else f"{name} (not run)", markersize=4,
            capsize=3,
        )  # fmt: skip
        paper = part.results[name, part.table.columns[0]].paper
        if paper is not None and steps:
            axes[2].plot(steps[-1], paper, "*", color=colour, markersize=11, markeredgecolor="black")
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


def _columns(points: Sequence[tuple[float, ...]], count: int) -> list[list[float]]:
    return [[point[number] for point in points] for number in range(count)]
