"""A table's numbers as Markdown and HTML.

In: `Collected`. Out: text; pictures are named by relative path, so the directory can be moved or mailed.
"""

import re
from collections.abc import Sequence

from jinja2 import Environment
from markupsafe import Markup, escape

from pipeline.ablation.grid import Row
from pipeline.report.collect import Collected, Result

HEAD = ["system"]
BEST = "best epoch (number)"  # of cross-validations
PER_COLUMN = ["paper", "ours", BEST, "n", "clips", "difference [95 %], p"]

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ title }}</title><style>
body { font: 15px/1.45 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; color: #1c2430 }
table { border-collapse: collapse; margin: .8em 0; font-variant-numeric: tabular-nums }
th, td { padding: .3em .8em; border-bottom: 1px solid #d7dce2; text-align: right } th { background: #f2f4f7 }
th:first-child, td:first-child { text-align: left } tr.reference td { font-weight: 600 }
tr.other td { color: #77808c } p.caption { color: #48525e; font-size: 14px } img { max-width: 100% }
</style></head><body><h1>{{ title }}</h1>
{% for part in parts %}<h2 id="{{ part.id }}">{{ part.title }}</h2>
<table><thead><tr>{% for cell in part.head %}<th>{{ cell }}</th>{% endfor %}</tr></thead><tbody>
{% for row in part.rows %}<tr class="{{ row.kind }}">{% for cell in row.cells %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</tbody></table>
<p class="caption">{{ part.caption }}</p>
<img src="{{ part.picture }}" alt="{{ part.title }}">
{% endfor %}</body></html>
"""

LEGEND = (
    "paper, ours: percent; ours is mean ± standard deviation over seeds (or folds). n: finished of wanted runs; empty "
    "cells were not run. clips: evaluated, and their share of those that the source lists. difference: to the row "
    "'{reference}' in points, paired bootstrap over the evaluation clips."
)


def header(part: Collected) -> list[str]:
    """Column names."""
    several = len(part.table.spec.columns) > 1
    return HEAD + [
        f"{part.titles[column]}: {name}" if several else name
        for column in part.table.spec.columns
        for name in PER_COLUMN
        if name != BEST or column in part.folded
    ]


def rows(part: Collected) -> list[list[str]]:
    """Cells as text."""
    table = []
    for row in part.table.rows:
        cells = [row.spec.name]
        for column in part.table.spec.columns:
            texts = cell_texts(part.results[row.spec.name, column], row.spec.name == part.reference)
            named = zip(PER_COLUMN, texts, strict=True)
            cells += [text for name, text in named if name != BEST or column in part.folded]
        table.append(cells)
    return table


def cell_texts(result: Result, is_reference: bool) -> list[str]:
    """What PER_COLUMN names; empty where there is nothing."""
    paper = "" if result.paper is None else f"{result.paper:.1f}"
    n = f"{result.done}/{result.wanted}" if result.wanted else ""
    if result.mean is None:
        return [paper, "", "", n, "", ""]
    best = ""
    if result.best is not None:
        best = f"{_spread(result.best, result.best_spread)} ({', '.join(map(str, result.best_epochs))})"
    share = "" if result.coverage is None else f" ({result.coverage:.0%})"
    difference = "reference" if is_reference else ""
    if result.difference:
        d = result.difference
        difference = f"{100 * d.value:+.1f} [{100 * d.low:+.1f}, {100 * d.high:+.1f}], {d.p:.3f}"
    return [paper, _spread(result.mean, result.spread), best, n, f"{result.clips}{share}", difference]


def _spread(mean: float, deviation: float | None) -> str:
    return f"{mean:.1f}" if deviation is None else f"{mean:.1f} ± {deviation:.1f}"


def caption(part: Collected) -> str:
    """What must be said beside the numbers."""
    return " ".join([*part.caption, LEGEND.format(reference=part.reference)])


def markdown(title: str, parts: Sequence[Collected]) -> str:
    """The report as GitHub Markdown."""
    lines = [f"# {title}", ""]
    for part in parts:
        head = header(part)
        lines += [f"## {part.table.spec.title}", "", _line(head), _line(["---"] + ["---:"] * (len(head) - 1))]
        lines += [_line(_bold(row, part.reference)) for row in rows(part)]
        lines += ["", caption(part), "", f"![{part.table.spec.title}]({part.table.file.stem}.png)", ""]
    return "\n".join(lines)


def html(title: str, parts: Sequence[Collected]) -> str:
    """The report as one page beside its pictures."""
    content = [
        {
            "id": part.table.file.stem,
            "title": part.table.spec.title,
            "head": header(part),
            "rows": [
                {"cells": cells, "kind": _kind(row, part.reference)}
                for row, cells in zip(part.table.rows, rows(part), strict=True)
            ],
            "caption": Markup(re.sub("`([^`]+)`", r"<code>\1</code>", str(escape(caption(part))))),
            "picture": f"{part.table.file.stem}.png",
        }
        for part in parts
    ]
    return Environment(autoescape=True).from_string(PAGE).render(title=title, parts=content)


def _kind(row: Row, reference: str) -> str:
    """Style of a row."""
    if row.spec.name == reference:
        return "reference"
    return "" if row.spec.run else "other"


def _bold(row: list[str], reference: str) -> list[str]:
    return [f"**{cell}**" if cell else "" for cell in row] if row[0] == reference else row


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
