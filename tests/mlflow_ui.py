"""MLflow's page as a researcher walks through it: rank the runs, select some, compare them, look at a chart."""

from collections.abc import Iterable
from urllib.parse import urlencode

from tests.browser import Page

# Cells of a compared metric stand in columns of their own, at the height of its name.
METRIC_ROW = """
const cell = [...document.querySelectorAll('a[title="Plot chart"]')]
  .find(link => link.textContent === arguments[0])?.parentElement;
if (!cell) return [];
let table = cell;
while (table.querySelectorAll('[role=grid]').length < 2) table = table.parentElement;
return [...table.querySelectorAll('[role=grid] div')]
  .filter(other => other.style.top === cell.style.top && other.style.height === cell.style.height && other !== cell)
  .sort((a, b) => a.getBoundingClientRect().left - b.getBoundingClientRect().left).map(other => other.textContent);
"""
CHARTS = """
return [...document.querySelectorAll('.js-plotly-plot')].flatMap(chart => chart.data)
  .filter(line => line.type === 'scatter' && line.x).map(line => [line.metricKey, line.name, line.x, line.y]);
"""
Lines = dict[str, list[tuple[int, float]]]


class MlflowUi:
    """The page of an MLflow server.

    Args:
        page: A browser.
        address: Of the server.
    """

    def __init__(self, page: Page, address: str) -> None:
        self.page = page
        self.address = address

    def rank(self, experiment: str, search: str, metric: str, expected: int, charts: bool = False) -> list[str]:
        """Opens the runs that a search finds, the best first; returns their names in the order of the list."""
        query = {"searchFilter": search, "orderByKey": f"metrics.`{metric}`", "orderByAsc": "false"}
        query |= {"compareRunsMode": "CHART"} if charts else {}
        self.page.driver.get("about:blank")  # else a change behind the # loads nothing
        self.page.driver.get(f"{self.address}/#/experiments/{experiment}/runs?{urlencode(query)}")
        rows = '[role=row] a[href*="/runs/"]'
        self.page.until(lambda: len(self._names(rows)) == expected, f"{expected} runs of {search}")
        self._close_assistant()
        return self._names(rows)

    def select(self, runs: Iterable[str]) -> None:
        """Ticks runs of the list, by id."""
        for run in runs:
            row = self.page.first(f'[role=row]:has(a[href*="/runs/{run}"])')
            self.page.click(row.find_element("css selector", "input.ag-checkbox-input"))
            self.page.first(f'[role=row].ag-row-selected:has(a[href*="/runs/{run}"])')

    def compare(self) -> None:
        """Opens the comparison of the selected runs."""
        buttons = lambda: [b for b in self.page.all("button") if b.text.strip() == "Compare" and b.is_enabled()]  # noqa: E731
        self.page.click(self.page.until(lambda: next(iter(buttons()), None), "a button that compares"))
        self.page.until(lambda: "compare-runs" in self.page.driver.current_url and self.page.all(".js-plotly-plot"),
                        "the comparison and its plot")  # fmt: skip

    def differing(self) -> dict[str, list[str]]:
        """The comparison's plot of parallel coordinates: settings that differ, each run's value."""
        script = "return document.querySelector('.js-plotly-plot').data[0].dimensions.filter(d => d.ticktext)"
        axes = self.page.driver.execute_script(script)
        return {axis["label"]: [axis["ticktext"][value] for value in axis["values"]] for axis in axes}

    def compared(self, metric: str) -> list[float]:
        """The compared runs' last values of a metric, as printed."""
        found = self.page.until(lambda: self.page.driver.execute_script(METRIC_ROW, metric), f"the values of {metric}")
        return [float(text) for text in found]

    def chart(self, metric: str) -> Lines:
        """Follows the comparison's link to the chart of a metric: each run's line."""
        links = lambda: [a for a in self.page.all('a[title="Plot chart"]') if f"metric=%22{metric}%22" in  # noqa: E731
                         (a.get_attribute("href") or "")]  # fmt: skip
        self.page.click(self.page.until(lambda: next(iter(links()), None), f"the link to the chart of {metric}"))
        return self.page.until(lambda: self.lines().get(metric), f"the chart of {metric}")

    def charts(self, metrics: Iterable[str], runs: int) -> dict[str, Lines]:
        """In the list's chart mode: the charts of some metrics, complete once each shows all runs."""
        wanted = set(metrics)
        self.page.first('input[placeholder="Search metric charts"]').send_keys(f"^({'|'.join(sorted(wanted))})$")

        def complete() -> dict[str, Lines] | None:
            found = self.lines()
            return found if found.keys() == wanted and all(len(lines) == runs for lines in found.values()) else None

        return self.page.until(complete, f"{runs} lines in each chart of {sorted(wanted)}")

    def lines(self) -> dict[str, Lines]:
        """All that is drawn: metric -> run -> (step, value)."""
        found: dict[str, Lines] = {}
        for metric, name, steps, values in self.page.driver.execute_script(CHARTS):
            found.setdefault(metric, {})[name] = list(zip(steps, values, strict=True))
        return found

    def _names(self, rows: str) -> list[str]:
        links = sorted(self.page.all(rows), key=lambda link: link.location["y"])
        return [link.text for link in links if link.text]

    def _close_assistant(self) -> None:
        for button in self.page.all('button[aria-label="Close"]'):
            self.page.click(button)
