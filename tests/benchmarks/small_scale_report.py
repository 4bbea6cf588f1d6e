"""Tables and the figure of small_scale.py: from the files that its runs have left, whatever is there.

In: its `Evidence`. Out: tables.md and curve.png.
"""

import math
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.files import read_json, write_text
from pipeline.methods import FINETUNE
from pipeline.recipes import read_yaml
from pipeline.tracking import figures
from pipeline.tracking.spool import Feed

if TYPE_CHECKING:
    from tests.benchmarks.small_scale import Evidence

HELD_OUT = 5  # fold
KNOWN = 0.99  # of the training clips: converged
STREAMS = {"spec": "spectrogram", "wav": "waveform", "both": "both"}
DAMAGED = "delete it, and the same command makes it again"
Right = dict[str, list[int]]  # representation -> 1 for each clip, by its row, that is named correctly, else 0


def write_report(evidence: "Evidence") -> None:
    """OUT/tables.md and OUT/curve.png."""
    right = _judged(evidence)
    parts = [_frozen(evidence, right, evidence.folds == HELD_OUT, f"Frozen, fold {HELD_OUT}",
                     "No pretraining saw these clips."),
             _frozen(evidence, right, evidence.folds > 0, "Frozen, all folds",
                     f"Pretraining saw folds other than {HELD_OUT} without labels.")]  # fmt: skip
    parts += [_costs(evidence, right), _labels(evidence)]
    write_text(evidence.out / "tables.md", "\n".join(part for part in parts if part))
    _draw(evidence, right, evidence.out / "curve.png")


def _judged(evidence: "Evidence") -> dict[tuple[str, int], Right]:
    """(method, steps) -> what its probes named correctly."""
    found = {}
    for name in evidence.table.rows:
        for file in sorted(evidence.run_dir(name).glob("probe-*.json")):
            found[name, int(file.stem.removeprefix("probe-"))] = read_json(file, DAMAGED)
    return found


def _untrained(evidence: "Evidence") -> dict[str, np.ndarray]:
    """Representation -> hits of untrained encoders [seeds, clips]."""
    each = [read_json(file, DAMAGED) for file in sorted(evidence.out.glob("untrained-*/probe.json"))]
    return {stream: np.array([one[stream] for one in each]) for stream in STREAMS} if each else {}


def _log_mel(evidence: "Evidence") -> dict[str, np.ndarray]:
    file = evidence.out / "log-mel" / "probe.json"
    content: Right = read_json(file, DAMAGED) if file.exists() else {}
    return {name: np.array(hits) for name, hits in content.items()}


def _frozen(
    evidence: "Evidence", right: dict[tuple[str, int], Right], where: np.ndarray, title: str, note: str
) -> str:
    """Scores on the clips `where`, by steps; behind them how far the last one is from untrained encoders'."""
    untrained, steps = _untrained(evidence), sorted({step for _, step in right})
    lines = [f"## {title}", "", "| method | tokens | 0 | " + " | ".join(f"{step:,}" for step in steps) +
             " | last - untrained |", "|---|---|" + "---:|" * (len(steps) + 2)]  # fmt: skip
    for name, hits in _log_mel(evidence).items():
        lines.append(f"| log-mel | {name} | {100 * hits[where].mean():.1f} |{' |' * len(steps)} |")
    for stream, hits in untrained.items():
        each = 100 * hits[:, where].mean(axis=1)
        spread = f" ± {each.std(ddof=1):.1f}" if len(each) > 1 else ""
        lines.append(f"| untrained | {STREAMS[stream]} | {each.mean():.1f}{spread} |{' |' * len(steps)} |")
    for name in evidence.table.rows:
        for stream, word in STREAMS.items():
            own = {step: np.array(right[name, step][stream]) for step in steps if stream in right.get((name, step), {})}
            if not own:
                continue
            cells = [f"{100 * own[step][where].mean():.1f}" if step in own else "" for step in steps]
            gained = ""
            if untrained:
                differences = 100 * (own[max(own)] - untrained[stream].mean(axis=0))[where]
                error = differences.std(ddof=1) / math.sqrt(len(differences))
                gained = f"{differences.mean():+.1f} ± {error:.1f}"
            lines.append(f"| {name} | {word} | | {' | '.join(cells)} | {gained} |")
    lines += ["", f"Percent of {where.sum()} clips. {note} Linear probe, last block, frequency patches side by side, "
              "mean over time; its weight decay is chosen on a training fold. Untrained: mean and deviation over "
              f"{len(next(iter(untrained.values()), []))} seeds. Last column: paired difference over clips and its "
              "standard error.", ""]  # fmt: skip
    return "\n".join(lines)


def _seconds(evidence: "Evidence") -> dict[str, float]:
    """Method -> CPU seconds a step, where it was measured."""
    files = {name: evidence.out / "cost" / f"{name.lower()}.json" for name in evidence.table.rows}
    return {name: read_json(file, DAMAGED)["step"] for name, file in files.items() if file.exists()}


def _costs(evidence: "Evidence", right: dict[tuple[str, int], Right]) -> str:
    """CPU seconds, and what they bought."""
    seconds, steps = _seconds(evidence), sorted({step for _, step in right})
    if not seconds:
        return ""
    settings = evidence.table.pretrain
    lines = ["## Cost", "", "| method | CPU s per 1,000 clips | " +
             " | ".join(f"{step:,} steps: minutes, score" for step in steps) + " |",
             "|---|---:|" + "---:|" * len(steps)]  # fmt: skip
    for name, each in seconds.items():
        cells = []
        for step in steps:
            hits = right.get((name, step), {})
            best = 100 * np.mean(hits[list(hits)[-1]]) if hits else math.nan
            cells.append(f"{each * step / 60:.0f}, {best:.1f}" if hits else "")
        clips = (settings | evidence.table.rows[name])["train.batch_size"]
        lines.append(f"| {name} | {1000 * each / clips:.1f} | {' | '.join(cells)} |")
    lines += ["", "User and system time of one thread of a CPU, with reading. Score: all folds, tokens of all "
              "representations that the method reads.", ""]  # fmt: skip
    return "\n".join(lines)


def _labels(evidence: "Evidence") -> str:
    """Accuracies of the finetunings by labelled clips a class, and when the training clips were known."""
    folders = sorted((evidence.out / "few").glob("*/results.json"))
    froms = sorted({int(f.parent.name.rsplit("-", 4)[1]) for f in folders if not f.parent.name.startswith("random-")})
    counts = list(evidence.table.epochs)
    lines = [f"## Few labels, fold {HELD_OUT}", "",
             "| finetuned | pretrained | " + " | ".join(f"{n} a class | known" for n in counts) + " |",
             "|---|---|" + "---:|---|" * len(counts)]  # fmt: skip
    for method in evidence.table.finetuned:
        for name, from_step in [("", 0), *((name, step) for name in evidence.table.rows for step in froms)]:
            cells = []
            for count in counts:
                runs = [evidence.few_dir(name, method, count, seed, from_step) for seed in evidence.seeds]
                cells += _cells([run for run in runs if (run / "results.json").exists()])
            if any(cells):
                before = f"{name}, {from_step:,} steps" if name else "nothing"
                lines.append(f"| {FINETUNE[method].label} | {before} | {' | '.join(cells)} |")
    lines += ["", f"Percent of fold {HELD_OUT}; mean ± deviation over seeds of clips, order and new weights (their "
              f"number). Known: epoch in which {KNOWN:.0%} of the training clips are named correctly, the median, or "
              "their share at the end.", ""]  # fmt: skip
    return "\n".join(lines) if folders else ""


def _cells(runs: list[Path]) -> list[str]:
    """Accuracy of some seeds, and when their training clips were known."""
    if not runs:
        return ["", ""]
    scores = [100 * read_json(run / "results.json", DAMAGED)["value"] for run in runs]
    spread = f" ± {statistics.stdev(scores):.1f}" if len(scores) > 1 else ""
    curves = [_training_accuracy(run) for run in runs]
    reached = [next((epoch for epoch, value in enumerate(curve, 1) if value >= KNOWN), math.inf) for curve in curves]
    middle = statistics.median_high(reached)
    known = f"{middle:.0f}" if math.isfinite(middle) else f"no: {100 * statistics.mean(c[-1] for c in curves):.0f} %"
    return [f"{statistics.mean(scores):.1f}{spread} ({len(scores)})", known]


def _training_accuracy(run: Path) -> list[float]:
    """Of each epoch, from the batches' accuracies before their updates."""
    rows = [row["accuracy"] for row in Feed(run / "metrics.jsonl").read() if "accuracy" in row]
    config = read_yaml(run / "config.yaml", DAMAGED)
    epochs = max(1, round(config["train"]["epochs"]))
    return [float(np.mean(part)) for part in np.array_split(rows, epochs) if len(part)]


def _draw(evidence: "Evidence", right: dict[tuple[str, int], Right], path: Path) -> None:
    """Frozen scores of all folds over steps, and over CPU minutes."""
    from matplotlib.figure import Figure

    untrained, seconds = _untrained(evidence), _seconds(evidence)
    figure = Figure(figsize=(11, 7), layout="constrained")
    axes: Any = figure.subplots(2, 3, sharey=True)
    for column, (stream, word) in enumerate(STREAMS.items()):
        for line, axis in enumerate(axes[:, column]):
            for name, hits in _log_mel(evidence).items():
                style = ":" if "linear" in name else "--" if "maximum" in name else "-."
                axis.axhline(100 * hits.mean(), color="black", linewidth=0.8, linestyle=style, label=f"log-mel {name}")
            for number, name in enumerate(evidence.table.rows):
                points = [(step, 100 * np.mean(hits[stream])) for (other, step), hits in right.items()
                          if other == name and stream in hits]  # fmt: skip
                if untrained and points:
                    points.insert(0, (0, 100 * untrained[stream].mean()))
                scale = 1.0 if line == 0 else seconds.get(name, math.nan) / 60
                axis.plot([scale * step for step, _ in points], [value for _, value in points], marker="o",
                          markersize=3, label=name, color=f"C{number}")  # fmt: skip
            axis.set_xlabel("steps of pretraining" if line == 0 else "CPU minutes of pretraining")
            axis.set_title(f"tokens: {word}", fontsize=9)
            axis.grid(alpha=0.25)
            axis.set_xlim(left=0)
        axes[0, column].set_xscale("symlog", linthresh=1000)
        axes[0, column].set_xticks([0, *sorted({step for _, step in right})])
        axes[0, column].xaxis.set_major_formatter("{x:g}")
        axes[0, column].tick_params(axis="x", which="minor", bottom=False)
    for axis in axes[:, 0]:
        axis.set_ylabel("frozen accuracy, %")
    named = axes[0, 0].get_legend_handles_labels()
    figure.legend(*named, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    figures.save(figure, path)
