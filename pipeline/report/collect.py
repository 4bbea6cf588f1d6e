"""Finished runs -> the numbers of a table.

In: a table of a `Grid` and the directory of its runs. Out: a `Result` for each cell; what was not run stays empty.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pipeline.ablation.campaign import DAMAGED, Campaign
from pipeline.ablation.grid import Row, Run
from pipeline.config import FinetuneRecipe
from pipeline.cross_validation import summarise
from pipeline.data.manifest import Manifest, load_manifest
from pipeline.engine.evaluation import (
    all_metrics,
    clip_weights,
    draws_for,
    metric_name,
    quantiles,
    read_predictions,
    weighted_metric,
)
from pipeline.engine.setup import numeric_differences
from pipeline.errors import UserError
from pipeline.files import read_json
from pipeline.runs import mean_probability
from pipeline.tracking.spool import Feed

# What the paper evaluates on: name of the data set, classes, listed clips. Anything else is said in the caption.
PAPER_DATA = {"as_bal": ("audioset", 527, 20371), "as_full": ("audioset", 527, 20371), "esc50": ("esc50", 50, 2000)}
PROTOCOL = (
    "ours is the mean over the folds after the last epoch, which nothing chose; best epoch (number): the one epoch, "
    "the same for all folds, with the highest mean on the held-out folds, as SSAST's code takes it, so the same clips "
    "choose and score."
)


class Predictions(NamedTuple):
    """Of one run, what `read_predictions` gives: keys [n], targets bool [n, C], scores float32 [n, C]; in key order."""

    keys: list[str]
    targets: np.ndarray
    scores: np.ndarray


@dataclass(frozen=True)
class Difference:
    """System minus reference, in the metric's unit (0 to 1).

    Attributes:
        value: Difference of the means over runs.
        low: Lower end of its 95 % interval.
        high: Upper end.
        p: Two-sided probability of a difference this far from zero if there were none.
        draws: Of the bootstrap.
    """

    value: float
    low: float
    high: float
    p: float
    draws: int


@dataclass
class Result:
    """A cell.

    Attributes:
        paper: The paper's number in percent; None: it has none.
        wanted: Runs that the cell asks for.
        done: Those that finished. What follows is of the seeds that have all their folds.
        metric: Of `mean`; empty where nothing is done.
        mean: Percent, over seeds (each the mean over its folds); None where none is.
        spread: Standard deviation over seeds, or over folds where there is one seed; None for a single run.
        over: What the spread is over.
        clips: Evaluated clips of a seed, all folds.
        listed: Clips that the source names for the evaluation.
        difference: To the reference row.
        best: As `mean`, at the best common epoch: for each seed the one epoch, the same for all its folds, whose mean
            over the held-out folds is highest. None without folds, or for an ensemble.
        best_spread: As `spread`.
        best_epochs: Those epochs, by seed.
    """

    paper: float | None = None
    wanted: int = 0
    done: int = 0
    metric: str = ""
    mean: float | None = None
    spread: float | None = None
    over: str = ""
    clips: int = 0
    listed: int = 0
    difference: Difference | None = None
    best: float | None = None
    best_spread: float | None = None
    best_epochs: list[int] = field(default_factory=list)

    @property
    def coverage(self) -> float | None:
        """Share of the listed evaluation clips that were scored."""
        return self.clips / self.listed if self.listed and self.mean is not None else None


class Collected:
    """A table's numbers and what must be said beside them.

    Args:
        name: Of the table in the grid.
        campaign: Its runs.

    Attributes:
        name: Likewise.
        table: The file's content.
        reference: Row that the others are compared with.
        results: By (row, column).
        titles: By column.
        folded: Columns of cross-validations.
        caption: Sentences.
        curves: Of a figure, by row: held-out "accuracy" (percent) and "mse" over the steps of the pretraining, and what
            was "finetuned" from it: (step, mean in percent, spread).

    Raises:
        UserError: the reference row is unknown, or an ensemble.
    """

    def __init__(self, name: str, campaign: Campaign) -> None:
        self.name, self.table, self._campaign = name, campaign.grid.tables[name], campaign
        self._results: dict[str, dict[str, Any] | None] = {}  # each file is read once
        self._predictions: dict[str, Predictions] = {}
        grid, columns, tasks = campaign.grid, self.table.columns, campaign.grid.scale.tasks
        runnable = [row for row in self.table.rows if row.run]
        single = [row.name for row in runnable if not row.ensemble]
        self.reference = self.table.reference or (single[-1] if single else "")
        if self.reference not in single:
            raise UserError(
                f"{name}.yaml: reference '{self.reference}' is an ensemble or not run; name one of {', '.join(single)}"
            )
        self.results = {(row.name, column): self._result(row, column) for row in self.table.rows for column in columns}
        for row in runnable:
            for column in columns:
                cells = [grid.cells.get((name, one, column)) for one in (row.name, self.reference)]
                if row.name != self.reference and all(cells) and not row.ensemble:
                    self.results[row.name, column].difference = self._difference(row, column)
        self.curves = {row.name: self._curve(row, columns[0]) for row in runnable if self.table.kind == "figure"}
        self.titles = {column: tasks[column].title for column in columns}
        self.folded = frozenset(column for column in columns if tasks[column].folds != (0,))
        pairs = [f"{key} {old} as {new}" for key, pair in grid.scale.substitute.items() for old, new in pair.items()]
        self.caption = [grid.scale.about if grid.scale.about.endswith(".") else f"{grid.scale.about}."]
        self.caption += [f"The paper's settings are run as: {', '.join(pairs)}."] if pairs else []
        self.caption += [sentence for column in columns for sentence in self._data_notes(column)]
        self.caption += [sentence for column in columns for sentence in self._deepspeed_notes(column)]
        self.caption += [f"{self.titles[column]}: {PROTOCOL}" for column in columns if column in self.folded]
        self.caption += [note for note in (self.table.note, grid.scale.note) if note]

    def _cell(self, row: str, column: str) -> list[Run]:
        return self._campaign.grid.cells.get((self.name, row, column), [])

    def _content(self, run: Run) -> dict[str, Any] | None:
        """`results.json` of a finished run; None where it is not finished."""
        if run.folder not in self._results:
            file = self._campaign.run_dir(run) / "results.json"
            done = self._campaign.state(run) == "done" and file.exists()
            self._results[run.folder] = read_json(file, DAMAGED) if done else None
        return self._results[run.folder]

    def _scores(self, run: Run) -> Predictions:
        """Of a finished run."""
        if run.folder not in self._predictions:
            file = self._campaign.run_dir(run) / "predictions.parquet"
            self._predictions[run.folder] = Predictions(*read_predictions(file))
        return self._predictions[run.folder]

    def _manifest(self, data: str) -> Manifest | None:
        """Of a data set that is there."""
        directory = self._campaign.shards(data)
        return load_manifest(directory) if (Path(directory) / "manifest.json").exists() else None

    def _seeds(self, row: str, column: str, share: float = 1.0) -> list[dict[int, tuple[Run, dict[str, Any]]]]:
        """Of each seed of a cell its finished runs and their results, by fold.

        A seed that still lacks folds is left out: folds differ in how hard they are. So is a run whose metric is
        undefined, as mAP is where no evaluated clip has a label.
        """
        seeds: dict[tuple[int, str], dict[int, tuple[Run, dict[str, Any]]]] = {}
        for run in self._cell(row, column):
            content = self._content(run) if run.share == share else None
            if content and content["value"] is not None:
                seeds.setdefault(_seed(run), {})[run.recipe.data.fold] = run, content
        wanted = len({run.recipe.data.fold for run in self._cell(row, column)})
        return [folds for folds in seeds.values() if len(folds) == wanted]

    def _result(self, row: Row, column: str) -> Result:
        """The numbers of a cell."""
        result = Result(paper=row.paper.get(column))
        runs = [run for run in self._cell(row.name, column) if run.share == 1.0]
        result.wanted = len(runs)
        result.done = sum(self._content(run) is not None for run in runs)
        seeds = self._seeds(row.name, column)
        if not seeds or (row.ensemble and sum(map(len, seeds)) < len(runs)):
            return result
        contents = [{fold: content for fold, (_, content) in folds.items()} for folds in seeds]
        run, content = next(iter(seeds[0].values()))
        result.metric = content["metric"]
        result.clips = sum(content["clips"] for content in contents[0].values())
        result.listed = self._listed(run, content)
        result.over = "seeds" if len(seeds) > 1 else "folds"
        result.mean, result.spread = _over_seeds(_values(seeds))
        if row.ensemble:
            result.mean, result.spread = 100 * self._ensemble(runs, result.metric), None
            return result
        if not all(fold and content.get("epochs") for folds in contents for fold, content in folds.items()):
            return result  # no folds; or runs of a release that did not write down their epochs
        common = [best for folds in contents if (best := summarise(folds)["common_epoch"])]
        if len(common) == len(seeds):
            result.best, result.best_spread = _over_seeds([list(best["folds"].values()) for best in common])
            result.best_epochs = [best["epoch"] for best in common]
        return result

    def _difference(self, row: Row, column: str) -> Difference | None:
        """Against the reference row, over the runs that finished; None where one side has none."""
        sides = [[self._scores(run) for folds in self._seeds(name, column) for run, _ in folds.values()]
                 for name in (row.name, self.reference)]  # fmt: skip
        return paired_bootstrap(sides[0], sides[1], self.results[row.name, column].metric)

    def _curve(self, row: Row, column: str) -> dict[str, list[tuple[float, ...]]]:
        init = next((run.init for run in self._cell(row.name, column)), None)  # a row may have other columns alone
        lines = Feed(self._campaign.run_dir(init) / "metrics.jsonl").read() if init else []
        last = max((line["step"] for line in lines), default=0)
        shares = sorted({run.share for run in self._cell(row.name, column)})
        finetuned = [(share, _over_seeds(_values(seeds))) for share in shares
                     if (seeds := self._seeds(row.name, column, share))]  # fmt: skip
        return {
            "accuracy": [(line["step"], 100 * line["eval_spec_accuracy"]) for line in lines
                         if "eval_spec_accuracy" in line],
            "mse": [(line["step"], line["eval_spec_mse"]) for line in lines if "eval_spec_mse" in line],
            "finetuned": [(round(share * last), mean, spread or 0.0) for share, (mean, spread) in finetuned],
        }  # fmt: skip

    def _data_notes(self, column: str) -> list[str]:
        """Where data, labels or clips are not the paper's, or not the same in all cells."""
        runs = [run for row in self.table.rows for run in self._cell(row.name, column) if self._content(run)]
        if not runs:
            return []
        title = self._campaign.grid.scale.tasks[column].title
        digests = {(self._content(run) or {})["shards_digest"] for run in runs}
        notes = [f"{title}: its cells were evaluated on different shards, so they do not compare."] if len(
            digests) > 1 else []  # fmt: skip
        name, classes, clips = PAPER_DATA.get(column, ("", 0, 0))
        content = self._content(runs[0]) or {}
        manifest = self._manifest(runs[0].data)
        found = manifest.dataset if manifest else "unknown"
        labels = len(content["per_class"])
        if (found, labels) != (name, classes):
            notes.append(f"{title}: data set '{found}' with {labels} labels, the paper's is {name} with {classes}; "
                         "the numbers do not compare with the paper's.")  # fmt: skip
        elif content["clips"] < clips and column != "esc50":
            notes.append(f"{title}: {content['clips']} of the {clips} listed evaluation clips could be had.")
        missing = content["classes_without_positives"]
        if missing:
            notes.append(f"{title}: {missing} classes have no evaluation clip and are left out of the mean.")
        return notes

    def _deepspeed_notes(self, column: str) -> list[str]:
        """Where the cells, or the pretrainings below them, were not all made in the same precision."""
        cells = [run for row in self.table.rows for run in self._cell(row.name, column) if self._content(run)]
        title = self._campaign.grid.scale.tasks[column].title
        notes = []
        for kind, runs in (("finetunings", cells), ("pretrainings", [run.init for run in cells if run.init])):
            files = {self._campaign.run_dir(run) / "ds.json": None for run in runs}
            found = [read_json(file, DAMAGED) for file in files if file.exists()]
            differing = sorted({key for ds in found[1:] for key in numeric_differences(found[0], ds)})
            if differing:
                notes.append(f"{title}: its cells' {kind} differ in DeepSpeed's {', '.join(differing)}, so they do not "
                             "compare.")  # fmt: skip
        return notes

    def _ensemble(self, runs: list[Run], metric: str) -> float:
        """The metric of the runs' mean probabilities: over folds, the mean of each fold's.

        Raises:
            UserError: members of one fold were scored on other clips.
        """
        members: dict[int, list[Run]] = {}
        for run in runs:
            members.setdefault(run.recipe.data.fold, []).append(run)
        single = metric == metric_name(single_label=True)
        values = []
        for folded in members.values():
            predictions = [self._scores(run) for run in folded]
            for run, part in zip(folded, predictions, strict=True):
                if part.keys != predictions[0].keys or not np.array_equal(part.targets, predictions[0].targets):
                    raise UserError(
                        f"{self._campaign.run_dir(run)}: scored other clips than {self._campaign.run_dir(folded[0])}; "
                        "an ensemble needs the same for all its members"
                    )
            losses = [run.recipe.finetune.loss_of(single) for run in folded if isinstance(run.recipe, FinetuneRecipe)]
            scores = mean_probability([part.scores for part in predictions], losses)
            values.append(all_metrics(scores, predictions[0].targets, single)[metric])
        return float(np.mean(values))

    def _listed(self, run: Run, content: dict[str, Any]) -> int:
        manifest = self._manifest(run.data)
        splits = manifest.splits if manifest else {}
        return sum(splits[name].listed for name in content["split"].split(",") if name in splits)


def _values(seeds: list[dict[int, tuple[Run, dict[str, Any]]]]) -> list[list[float]]:
    """Of each seed the metric of its folds."""
    return [[content["value"] for _, content in folds.values()] for folds in seeds]


def _over_seeds(values: list[list[float]]) -> tuple[float, float | None]:
    """Mean and standard deviation in percent, over seeds (each the mean of its folds), else over one seed's folds."""
    means = [float(np.mean(folds)) for folds in values]
    sample = means if len(means) > 1 else values[0]
    return 100 * float(np.mean(means)), 100 * float(np.std(sample, ddof=1)) if len(sample) > 1 else None


def _seed(run: Run) -> tuple[int, str]:
    """Of finetuning and pretraining: runs that differ in their fold alone have it in common."""
    return run.recipe.run.seed, run.init.digest if run.init else ""


def paired_bootstrap(
    system: Sequence[Predictions], reference: Sequence[Predictions], metric: str, seed: int = 0
) -> Difference | None:
    """Compares the means of two systems' runs on the same clips.

    Clips are drawn with replacement, the same draw for both systems, and the metric is taken again. That is the
    uncertainty of the evaluation set; the one of training shows in the spread over seeds. Cost: that of
    `engine.evaluation`'s interval for every run.

    Args:
        system: One entry for each run (seed, fold); runs of one fold share clips.
        reference: Likewise.
        metric: "mAP" or "accuracy".
        seed: Of the draws.

    Returns:
        None where the systems were not scored on the same clips with the same labels: nothing to pair.
    """
    folds = [_folds(system), _folds(reference)]
    if not folds[0] or folds[0].keys() != folds[1].keys():
        return None
    if any(not np.array_equal(folds[0][key][0].targets, folds[1][key][0].targets) for key in folds[0]):
        return None
    size = sum(runs[0].scores.size * len(runs) for side in folds for runs in side.values())
    draws = draws_for(size)
    means = [np.zeros(draws + 1), np.zeros(draws + 1)]
    for number, key in enumerate(sorted(folds[0])):
        clips = len(folds[0][key][0].keys)
        rng = np.random.default_rng([seed, number])
        weights = clip_weights(clips, draws, rng)
        for i, side in enumerate(folds):
            values = [weighted_metric(run.scores, run.targets, weights, metric) for run in side[key]]
            means[i] += np.mean(values, axis=0) / len(folds[0])
    difference = means[0] - means[1]
    sample, drawn_differences = difference[0], difference[1:]
    interval = quantiles(drawn_differences)
    tail = min((drawn_differences <= 0).sum(), (drawn_differences >= 0).sum())
    p = min(1.0, 2 * (tail + 1) / (np.isfinite(drawn_differences).sum() + 1))  # a draw without a positive has no mAP
    return Difference(float(sample), interval["low"], interval["high"], float(p), draws)


def _folds(runs: Sequence[Predictions]) -> dict[str, list[Predictions]]:
    """Runs on the same clips together."""
    folds: dict[str, list[Predictions]] = {}
    for run in runs:
        folds.setdefault("\n".join(run.keys), []).append(run)
    return folds
