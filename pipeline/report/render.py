"""The numbers of tables as text, and these as Markdown or HTML.

In: `Collected`. Out: text; pictures are named by relative path, so the directory can be moved or mailed.
"""

import re
from collections.abc import Sequence
from typing import Any

from jinja2 import Environment
from markupsafe import Markup, escape

from pipeline.report.collect import Collected, Result

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
    "cells were not run. clips: evaluated, and their share of those that the source lists. difference: to the row "
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
