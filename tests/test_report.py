"""The report: its statistics against slow twins, its honesty about what was not run."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from sklearn.metrics import average_precision_score
from sqlalchemy.exc import OperationalError

from launchers.ablate import record
from pipeline.ablation.campaign import Campaign
from pipeline.ablation.grid import Grid
from pipeline.data.manifest import Label
from pipeline.engine.evaluation import (
    Scores,
    all_metrics,
    interval,
    read_predictions,
    results,
    weighted_metric,
    write_predictions,
)
from pipeline.errors import UserError
from pipeline.files import write_json
from pipeline.report import render
from pipeline.report.__main__ import log_to_mlflow, main, write
from pipeline.report.collect import Collected, Predictions, paired_bootstrap
from pipeline.runs import mean_probability
from tests.conftest import ROOT


def predictions(seed: int, skill: float, clips: int = 200, classes: int = 6, rounded: bool = False) -> Predictions:
    rng = np.random.default_rng(7)  # targets are of the data, not of the system
    targets = rng.random((clips, classes)) < 0.2
    targets[:, 0] |= ~targets.any(axis=1)
    noise = np.random.default_rng(seed).normal(size=targets.shape)
    scores = (noise + skill * targets).astype(np.float32)
    return Predictions([f"k{i:04d}" for i in range(clips)], targets, scores.round(1) if rounded else scores)


@pytest.mark.parametrize("rounded", [False, True])  # rounded scores tie
def test_weighted_map_is_scikit_learns_on_the_drawn_clips(rounded):
    run = predictions(1, 1.0, rounded=rounded)
    drawn = np.random.default_rng(0).multinomial(200, np.full(200, 1 / 200), 5).astype(np.float32)
    fast = weighted_metric(run.scores, run.targets, drawn, "mAP")
    for weights, value in zip(drawn, fast, strict=True):
        rows = np.repeat(np.arange(200), weights.astype(int))
        slow = [average_precision_score(t, s) for t, s in zip(run.targets[rows].T, run.scores[rows].T, strict=True)]
        assert value == pytest.approx(np.mean(slow), abs=1e-12)


def test_weighted_accuracy_is_the_mean_over_the_drawn_clips():
    run = predictions(1, 1.0)
    single = Predictions(run.keys, np.eye(6, dtype=bool)[np.arange(200) % 6], run.scores)
    drawn = np.random.default_rng(0).multinomial(200, np.full(200, 1 / 200), 3).astype(np.float32)
    hit = single.scores.argmax(axis=1) == single.targets.argmax(axis=1)
    found = weighted_metric(single.scores, single.targets, drawn, "accuracy")
    assert found == pytest.approx((drawn * hit).sum(axis=1) / 200)
    tied = single.scores.round()  # some clips' best classes tie
    whole = weighted_metric(tied, single.targets, np.ones((1, 200), np.float32), "accuracy")
    assert whole == pytest.approx(all_metrics(tied, single.targets, True)["accuracy"])


def test_the_interval_of_a_share_is_the_binomials():
    hits = np.arange(400) % 4 > 0  # 300 of 400
    scores = np.stack([hits, ~hits], axis=1).astype(np.float32)
    targets = np.tile([1.0, 0.0], (400, 1))
    found = interval(scores, targets, "accuracy")
    spread = 1.96 * (0.75 * 0.25 / 400) ** 0.5
    assert found["low"] == pytest.approx(0.75 - spread, abs=0.01)
    assert found["high"] == pytest.approx(0.75 + spread, abs=0.01)
    assert interval(scores, targets, "accuracy") == found  # the draws are seeded


def test_a_better_system_is_found_and_an_equal_one_is_not():
    good, bad = predictions(1, 2.0), predictions(2, 0.5)
    found = paired_bootstrap([good], [bad], "mAP")
    assert found is not None
    assert found.low > 0
    assert found.p < 0.01
    alike = paired_bootstrap([predictions(3, 1.0)], [predictions(4, 1.0)], "mAP")
    assert alike is not None
    assert alike.low < 0 < alike.high
    assert alike.p > 0.05
    same = paired_bootstrap([good], [good], "mAP")
    assert same is not None
    assert (same.value, same.low, same.high, same.p) == (0.0, 0.0, 0.0, 1.0)
    assert paired_bootstrap([good], [bad], "mAP") == found  # the draws are seeded


def test_draws_without_a_positive_leave_the_difference_as_it_is():
    """One class with 3 positives of 200 clips: one draw in twenty has none."""
    runs = [predictions(seed, skill, classes=1) for seed, skill in ((1, 2.0), (2, 0.5))]
    rare = np.arange(200)[:, None] < 3
    good, bad = (Predictions(run.keys, rare, run.scores + rare * raised)
                 for run, raised in zip(runs, (6, 0), strict=True))  # fmt: skip
    found = paired_bootstrap([good], [bad], "mAP")
    assert found is not None
    assert 0 < found.low <= found.value <= found.high
    back = paired_bootstrap([bad], [good], "mAP")
    assert back is not None
    assert (back.low, back.high, back.p) == (-found.high, -found.low, found.p)


def test_other_clips_or_labels_are_not_paired():
    run = predictions(1, 1.0)
    other_keys = Predictions([f"x{i}" for i in range(200)], run.targets, run.scores)
    assert paired_bootstrap([run], [other_keys], "mAP") is None
    assert paired_bootstrap([run], [Predictions(run.keys, ~run.targets, run.scores)], "mAP") is None


def finish(campaign: Campaign, run, value_seed: int, skill: float, manifest) -> float:
    """What a finished finetuning leaves, from synthetic scores on the real shards' evaluation clips."""
    from pipeline.data.manifest import load_index

    folder = campaign.run_dir(run)
    folder.mkdir(parents=True)
    index = load_index(campaign.shards(run.data), "eval")
    targets = np.zeros((len(index), len(manifest.labels)), np.float32)
    for row, labels in enumerate(index["labels"].to_pylist()):
        targets[row, labels] = 1
    logits = np.random.default_rng(value_seed).normal(size=targets.shape) + skill * targets
    scores = Scores(np.arange(len(index)), logits.astype(np.float32), targets)
    about = {"weights": "weights", "split": "eval", "fold": 0, "shards_digest": manifest.digest}
    content = results(scores, manifest.labels, manifest.single_label, about)
    write_json(folder / "results.json", content)
    write_predictions(scores, index["key"].to_pylist(), folder / "predictions.parquet")
    (folder / "done.json").write_text(json.dumps({"manifest_digest": manifest.digest}))
    return 100 * content["value"]


@pytest.fixture
def campaign(shards, tmp_path):
    tables = [ROOT / "configs/ablation/table5c.yaml", ROOT / "configs/ablation/figure2.yaml"]
    return Campaign(Grid(tables, "micro", {"synth": str(shards)}, seeds=[0, 1]), tmp_path)


def test_a_row_of_a_figure_may_lack_its_first_column(shards, tmp_path):
    rows = [{"name": "both", "paper": {"as_bal": 1.0, "as_full": 2.0}}, {"name": "one", "paper": {"as_full": 3.0}}]
    figure = {"title": "F", "kind": "figure", "columns": ["as_bal", "as_full"], "reference": "both", "rows": rows}
    (tmp_path / "figure.yaml").write_text(yaml.safe_dump(figure))
    part = Collected("figure", Campaign(Grid([tmp_path / "figure.yaml"], "micro", {"synth": str(shards)}), tmp_path))
    assert part.curves["one"] == {"accuracy": [], "mse": [], "finetuned": []}
    render.draw(part, tmp_path / "figure.png")


def test_numbers_spread_differences_and_empty_cells(campaign, shards, tmp_path):
    from pipeline.data.manifest import load_manifest

    manifest = load_manifest(shards)
    cells = {row: runs for (table, row, _), runs in campaign.grid.cells.items() if table == "table5c"}
    for run in campaign.grid.runs[:3]:
        campaign.run_dir(run).mkdir(parents=True)
    best = [finish(campaign, run, seed, 3.0, manifest) for seed, run in enumerate(cells["64"])]
    weak = finish(campaign, cells["4"][0], 9, 0.2, manifest)
    part = Collected("table5c", campaign)
    result = part.results["64", "as_bal"]
    assert (result.paper, result.done, result.wanted) == (33.4, 2, 2)
    assert result.mean == pytest.approx(np.mean(best))
    assert result.spread == pytest.approx(np.std(best, ddof=1))
    assert result.coverage == 1.0
    one = part.results["4", "as_bal"]
    assert (one.mean, one.spread, one.done, one.wanted) == (pytest.approx(weak), None, 1, 2)
    assert one.difference.value * 100 == pytest.approx(weak - np.mean(best))
    assert one.difference.high < 0
    assert part.results["128", "as_bal"].mean is None
    text = render.markdown("T", render.tables([part]))
    assert "| 128 | 32.6 |  | 0/2 |  |  |" in text
    assert f"| 4 | 33.3 | {weak:.1f} | 1/2 |" in text
    assert "data set 'csv' with 13 labels, the paper's is audioset with 527" in text
    assert "train.batch_size 180 as 32" in text
    files = write([part, Collected("figure2", campaign)], tmp_path / "report")
    assert {file.name for file in files} == {"report.md", "report.html", "numbers.json", "table5c.png", "figure2.png"}
    for name in ("table5c.png", "figure2.png"):
        colours = np.unique(np.asarray(Image.open(tmp_path / "report" / name).convert("L")))
        assert len(colours) > 10  # not a blank page
    page = (tmp_path / "report" / "report.html").read_text()
    assert "<td>33.4</td>" in page
    assert "<code>--scale micro</code>" in page


def test_cells_of_other_precisions_are_said_to_not_compare(tmp_path):
    """Of finetunings and of pretrainings alike; what keeps the arithmetic, such as ZeRO's stage, is no difference."""
    campaign = Campaign(Grid([ROOT / "configs/ablation/table3.yaml"], "micro", {}, seeds=[0]), tmp_path)
    runs = [run for run in campaign.grid.runs if run.init]
    for number, run in enumerate(runs):
        leave(campaign.run_dir(run), predictions(number, 1.0), "mAP")
        write_json(campaign.run_dir(run) / "ds.json", {"zero_optimization": {"stage": number % 3}})

    def said() -> list[str]:
        return [note for note in Collected("table3", campaign).caption if "DeepSpeed" in note]

    assert said() == []
    write_json(campaign.run_dir(runs[1]) / "ds.json", {"bf16": {"enabled": True}, "communication_data_type": "fp32"})
    cells = ("AudioSet-bal: its cells' finetunings differ in DeepSpeed's bf16, communication_data_type, so they do not "
             "compare.")  # fmt: skip
    assert said() == [cells]
    for run, precision in zip({run.init for run in runs}, ({"enabled": True}, {"enabled": False}), strict=False):
        campaign.run_dir(run).mkdir(parents=True, exist_ok=True)
        write_json(campaign.run_dir(run) / "ds.json", {"fp16": precision})
    assert said() == [cells, "AudioSet-bal: its cells' pretrainings differ in DeepSpeed's fp16, so they do not "
                      "compare."]  # fmt: skip


def test_without_any_run_the_paper_stands_alone(tmp_path, monkeypatch, capsys):
    def report(*words: object) -> int:
        command = ["report", ROOT / "configs/ablation/table1.yaml", *words]
        monkeypatch.setattr(sys, "argv", [*map(str, command)])
        return main()

    monkeypatch.chdir(tmp_path)  # where no runs are
    assert report("--out", tmp_path / "r") == 0
    assert capsys.readouterr().out.startswith("0 of ")
    text = (tmp_path / "r" / "report.md").read_text()
    assert "| PANN | 27.8 |  |  |" in text
    assert "+4.4" not in text
    assert "at the equal batch of 180 it is 2.0" in text
    for deviation in ("cosine similarity", "no patch is favoured", "one masked pass", "InfoNCE over targets",
                      "GroupNorm and ReLU", "PSLA's enhanced labels", "highest mean on the held-out"):  # fmt: skip
        assert deviation in text, deviation
    with pytest.raises(UserError, match=r"no ablation\.json in it"):
        report("--runs", tmp_path)


def leave(folder: Path, run: Predictions, metric: str, epochs: dict[str, float] | None = None) -> float:
    """What a finished finetuning leaves, of these scores."""
    folder.mkdir(parents=True)
    scores = Scores(np.arange(len(run.keys)), run.scores, run.targets.astype(np.float32))
    labels = [Label(id=str(i), name=str(i)) for i in range(run.scores.shape[1])]
    about = {"weights": "weights", "split": "eval", "fold": 0, "shards_digest": "D"}
    content = results(scores, labels, metric == "accuracy", about)
    write_json(folder / "results.json", content | ({} if epochs is None else {"epochs": epochs}))
    write_predictions(scores, run.keys, folder / "predictions.parquet")
    write_json(folder / "done.json", {"manifest_digest": "D"})
    return 100 * content["value"]


def test_cross_validations_show_the_last_epoch_and_the_best_common_one(tmp_path):
    """One epoch for all folds: the first fold's own best is 1, the second's 3, the best mean at 2."""
    curves = {1: {"1": 0.9, "2": 0.8, "3": 0.1}, 2: {"1": 0.1, "2": 0.6, "3": 0.7}}
    rows = [{"name": name, "paper": {"as_bal": None, "esc50": 90.1}, "finetune": {"optim.lr": rate}}
            for name, rate in (("two seeds", 1e-3), ("before", 2e-3), ("one", 3e-3))]  # fmt: skip
    table = {"title": "T", "columns": ["as_bal", "esc50"], "rows": rows, "seeds": [0, 1]}
    write_json(tmp_path / "table.yaml", table)
    campaign = Campaign(Grid([tmp_path / "table.yaml"], "micro", {}), tmp_path)
    values: dict[str, list[float]] = {}
    for name in ("two seeds", "before", "one"):
        for run in campaign.grid.cells["table", name, "esc50"]:
            seed, fold = run.recipe.run.seed, run.recipe.data.fold
            if name == "one" and seed:
                continue
            curve = {epoch: value - 0.1 * seed for epoch, value in curves[fold].items()}
            epochs = None if name == "before" else curve
            value = leave(campaign.run_dir(run), predictions(10 * seed + fold, 1.0), "accuracy", epochs)
            values.setdefault(name, []).append(value)
    part = Collected("table", campaign)
    both, before, one = (part.results[name, "esc50"] for name in ("two seeds", "before", "one"))
    assert (both.best, both.best_epochs) == (pytest.approx(65), [2, 2])
    assert both.best_spread == pytest.approx(np.std([70, 60], ddof=1))
    assert both.mean == pytest.approx(np.mean(values["two seeds"]))
    assert (one.best, one.best_epochs, one.over) == (pytest.approx(70), [2], "folds")
    assert one.best_spread == pytest.approx(np.std([80, 60], ddof=1))
    assert one.spread == pytest.approx(np.std(values["one"], ddof=1))
    assert (before.best, before.mean) == (None, pytest.approx(np.mean(values["before"])))
    text = render.markdown("T", render.tables([part]))
    head = next(line for line in text.splitlines() if line.startswith("| system"))
    assert "| ESC-50: ours | ESC-50: best epoch (number) | ESC-50: n |" in head
    assert "AudioSet-bal: best" not in head
    assert f"| {both.mean:.1f} ± {both.spread:.1f} | 65.0 ± 7.1 (2, 2) | 4/4 |" in text
    assert "ESC-50: ours is the mean over the folds after the last epoch" in text
    assert "as SSAST's code takes it" in text


def test_a_seed_counts_with_all_its_folds_alone(tmp_path):
    """Folds differ in how hard they are: a seed with some of them would move the mean, the spread and the interval."""
    rows = [{"name": name, "paper": {"esc50": None}, "finetune": {"optim.lr": rate}}
            for name, rate in (("a", 1e-3), ("b", 2e-3), ("c", 3e-3))]  # fmt: skip
    write_json(tmp_path / "table.yaml", {"title": "T", "columns": ["esc50"], "rows": rows, "seeds": [0, 1, 2],
                                        "reference": "b"})  # fmt: skip
    campaign = Campaign(Grid([tmp_path / "table.yaml"], "micro", {}), tmp_path)
    values: dict[tuple[str, int], list[float]] = {}
    for name, left in (("a", {(1, 2), (2, 1)}), ("b", set()), ("c", {(0, 2), (1, 1), (2, 1), (2, 2)})):
        for run in campaign.grid.cells["table", name, "esc50"]:
            seed, fold = run.recipe.run.seed, run.recipe.data.fold
            if (seed, fold) not in left:
                of_fold = predictions(fold, 4.0 if fold == 1 else 0.5)  # a fold's clips, for all seeds and rows
                scores = of_fold.scores + np.random.default_rng(seed).normal(size=of_fold.scores.shape)
                run_of_it = Predictions([f"{fold}-{key}" for key in of_fold.keys], of_fold.targets,
                                        scores.astype(np.float32))  # fmt: skip
                value = leave(campaign.run_dir(run), run_of_it, "mAP", {"1": 0.5})
                values.setdefault((name, seed), []).append(value)
    part = Collected("table", campaign)
    a, b, c = (part.results[name, "esc50"] for name in "abc")
    assert (a.done, a.wanted, a.clips) == (4, 6, 400)
    assert (a.mean, a.over) == (pytest.approx(np.mean(values["a", 0])), "folds")
    assert a.spread == pytest.approx(np.std(values["a", 0], ddof=1))
    assert b.spread == pytest.approx(np.std([np.mean(values["b", seed]) for seed in range(3)], ddof=1))
    assert 100 * a.difference.value == pytest.approx(a.mean - b.mean)
    assert c.difference is None
    assert (c.done, c.mean) == (2, None)  # no seed has both
    assert a.best_epochs == [1]
    assert "a seed counts once it has all its folds" in render.markdown("T", render.tables([part]))


def test_an_ensemble_is_no_reference(tmp_path):
    """Its number is of mean probabilities, which differences of single runs' means are not."""
    rows = [{"name": "one", "paper": {"as_bal": None}},
            {"name": "E", "ensemble": True, "seeds": [0, 1], "paper": {"as_bal": None}}]  # fmt: skip
    table = {"title": "T", "columns": ["as_bal"], "rows": rows}
    for extra in ({}, {"reference": "E"}):
        write_json(tmp_path / "table.yaml", table | extra)
        campaign = Campaign(Grid([tmp_path / "table.yaml"], "micro", {}), tmp_path)
        if not extra:
            assert Collected("table", campaign).reference == "one"
            continue
        with pytest.raises(UserError, match="reference 'E' is an ensemble or not run; name one of one"):
            Collected("table", campaign)


def test_a_report_has_the_seeds_of_all_commands(tmp_path):
    """Those of another table, or fewer, that a later command gave hide no finished run."""
    tables = [ROOT / f"configs/ablation/{name}.yaml" for name in ("table5b", "table5c")]
    (tmp_path / "ablation.json").write_text('{"scale": "micro", "shards": {"synth": "/x"}, "seeds": [4]}')  # of before
    for names, seeds in ((tables[:1], [2, 1]), (tables[1:], []), (tables[:1], [])):
        grid = Grid(names, "micro", {}, seeds)
        write_json(tmp_path / "ablation.json", record(tmp_path, grid, "micro", {}, seeds))
    about = json.loads((tmp_path / "ablation.json").read_text())
    assert about == {"scale": "micro", "shards": {"synth": "/x"}, "seeds": {"table5b": [0, 1, 2, 4], "table5c": [0]}}
    cells = Grid(tables, "micro", {}, about["seeds"]).cells
    assert [len(runs) for (table, _, _), runs in cells.items() if table == "table5b"] == [4, 4]
    assert [len(runs) for (table, _, _), runs in cells.items() if table == "table5c"] == [1] * 4


@pytest.mark.parametrize("metric", ["mAP", "accuracy"])
def test_an_ensemble_s_number_is_the_one_that_evaluate_gives(tmp_path, metric):
    """evaluate.py scores the mean of the members' probabilities; folds of equal size are not mixed with each other."""
    row = {"name": "E", "ensemble": True, "seeds": [0, 1], "paper": {"esc50": None}}
    table = {"title": "T", "columns": ["esc50"], "rows": [row, {"name": "one", "paper": {"esc50": None}}]}
    write_json(tmp_path / "table.yaml", table)
    campaign = Campaign(Grid([tmp_path / "table.yaml"], "micro", {}), tmp_path)
    cells = campaign.grid.cells["table", "E", "esc50"]
    folds = sorted({run.recipe.data.fold for run in cells})
    assert len(folds) == 2
    assert len(cells) == 4
    logits: dict[int, list[np.ndarray]] = {fold: [] for fold in folds}
    for number, run in enumerate(cells):
        fold = run.recipe.data.fold
        noise = np.random.default_rng(number).normal(0, 4, (80, 5)).astype(np.float32)
        targets = np.eye(5, dtype=bool)[(np.arange(80) * (fold + 1)) % 5]
        if metric == "mAP":
            targets[:, 0] = np.arange(80) % 3 == 0
        leave(campaign.run_dir(run), Predictions([f"f{fold}-{i:03d}" for i in range(80)], targets, noise), metric)
        logits[fold].append(noise)
    expected = []
    for fold in folds:
        run_dir = campaign.run_dir(next(r for r in cells if r.recipe.data.fold == fold))
        targets = read_predictions(run_dir / "predictions.parquet")[1].astype(np.float32)
        losses = ["ce" if metric == "accuracy" else "bce"] * len(logits[fold])
        scores = Scores(np.arange(80), mean_probability(logits[fold], losses), targets)
        expected.append(100 * results(scores, [Label(id="", name="")] * 5, metric == "accuracy", {})["value"])
    part = Collected("table", campaign)
    assert part.results["E", "esc50"].mean == pytest.approx(np.mean(expected), abs=1e-9)
    other = campaign.run_dir(cells[0])
    shutil.rmtree(other)
    leave(other, Predictions([f"x{i:03d}" for i in range(80)], targets > 0, noise), metric)
    with pytest.raises(UserError, match="scored other clips"):
        Collected("table", campaign)
    (other / "results.json").write_text("{")
    with pytest.raises(UserError, match=r"results\.json: not JSON"):
        Collected("table", campaign)


def test_a_database_that_is_away_is_one_line_without_its_password(tmp_path, monkeypatch):
    def away(uri):
        raise OperationalError("connection refused", None, Exception())

    monkeypatch.setattr("mlflow.tracking.MlflowClient", away)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@lab:5000")
    with pytest.raises(UserError, match=r"http://\*\*\*@lab:5000: .*--no-mlflow") as refused:
        log_to_mlflow([], [], tmp_path)
    assert "secret" not in str(refused.value)


def test_places_and_damaged_records_are_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "ablation.json").write_text("{")
    table = str(ROOT / "configs/ablation/table1.yaml")
    for words, said in ((["--out", str(tmp_path / "file")], "--out .*file"), (["--out", ""], "--out"),
                        (["--runs", f"{tmp_path}/runs", "--out", f"{tmp_path}/new"], r"ablation\.json")):  # fmt: skip
        monkeypatch.setattr(sys, "argv", ["report", table, *words])
        with pytest.raises(UserError, match=said):
            main()
    assert not (tmp_path / "new").exists()
