"""MLflow's own page in a browser: the runs of an ablation ranked, selected, compared, charted."""

import base64

import pytest
from mlflow.tracking import MlflowClient

from tests import browser
from tests.lab import ADMIN, PASSWORD
from tests.mlflow_ui import MlflowUi

pytestmark = [pytest.mark.slow, pytest.mark.needs(*browser.PROGRAMS)]


def test_the_runs_of_an_ablation_compare_in_the_ui(chain, tmp_path, monkeypatch):
    for name, value in chain.lab.env.items():
        monkeypatch.setenv(name, value)
    client = MlflowClient(chain.lab.uri)
    experiment = client.get_experiment_by_name("ablation").experiment_id
    search = "tags.kind = 'finetune' and tags.methods LIKE '%'"  # the table's name is a tag of its runs
    runs = client.search_runs([experiment], search, order_by=["metrics.final_mAP DESC"])
    names = [run.info.run_name for run in runs]
    assert sorted(names) == ["8-PSWaCL-AST", "8-PSWaCL-SWaB"]

    def told(metric: str) -> dict[str, list[tuple[int, float]]]:
        histories = {run.info.run_name: client.get_metric_history(run.info.run_id, metric) for run in runs}
        return {name: [(point.step, point.value) for point in points] for name, points in histories.items()}

    password = base64.b64encode(f"{ADMIN}:{PASSWORD}".encode()).decode()
    with browser.browser(tmp_path / "profile", {"Authorization": f"Basic {password}"}) as page:
        ui = MlflowUi(page, chain.lab.uri)
        assert ui.rank(experiment, search, "final_mAP", len(runs)) == names
        ui.select(run.info.run_id for run in runs)
        page.shoot(tmp_path / "selected.png")
        ui.compare()
        page.shoot(tmp_path / "compared.png")
        text = page.text()
        assert all(name in text for name in names)
        compared = sorted(names, key=text.index)  # the order of the columns
        methods = {"8-PSWaCL-AST": "ast", "8-PSWaCL-SWaB": "swab"}
        assert ui.differing()["finetune.method"] == [methods[name] for name in compared]
        values = {run.info.run_name: run.data.metrics for run in runs}
        for metric in ("final_mAP", "loss"):
            assert ui.compared(metric) == pytest.approx([values[name][metric] for name in compared], abs=6e-4)
        assert ui.chart("eval_mAP") == told("eval_mAP")
        assert ui.rank(experiment, search, "final_mAP", len(runs), charts=True) == names
        metrics = ("loss", "eval_mAP", "grad_norm", "mfu")
        assert ui.charts(metrics, len(runs)) == {metric: told(metric) for metric in metrics}
        page.shoot(tmp_path / "charts.png")
