"""A finetuned model's results: metrics, per-class average precision, `results.json`.

In: a task and its evaluation loader. Out: a dictionary, the same on any number of ranks.
"""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.loader import Loader
from pipeline.data.manifest import Label
from pipeline.engine.bootstrap import interval
from pipeline.engine.inference import Scores, score
from pipeline.engine.metrics import auc, average_precision, evaluate_multilabel, evaluate_single
from pipeline.files import new_file, write_json
from pipeline.flow import Batch, Losses


def metric_name(single_label: bool) -> str:
    """The metric that the paper reports: accuracy of single-label data, else mAP."""
    return "accuracy" if single_label else "mAP"


def summarise(scores: Scores, single_label: bool) -> dict[str, float]:
    """Metrics of scored clips, by name."""
    evaluate = evaluate_single if single_label else evaluate_multilabel
    return evaluate(scores.logits, scores.targets)


def evaluate_task(
    forward: Callable[[Batch], Losses], loader: Loader, single_label: bool
) -> dict[str, float]:
    """Held-out metrics named `eval_...`, for the training loop; a collective."""
    scores = score(forward, loader.eval_batches())
    loader.bad_clips.check(loader.clips - len(scores.rows))
    metrics = summarise(scores, single_label)
    return {f"eval_{name}": value for name, value in metrics.items()}


def results(scores: Scores, labels: list[Label], single_label: bool, about: dict[str, Any]) -> dict[str, Any]:
    """The content of `results.json`.

    Args:
        scores: Of the evaluated clips.
        labels: Vocabulary.
        single_label: Chooses the metric.
        about: Facts that make the number comparable: weights, split, fold, digest of the shards.
    """
    metrics = summarise(scores, single_label)
    ap = average_precision(scores.logits, scores.targets)
    area = auc(scores.logits, scores.targets)
    positives = scores.targets.sum(axis=0).astype(int)
    name = metric_name(single_label)
    return {
        "metric": name,
        "value": metrics[name],
        "interval": asdict(interval(scores.logits, scores.targets, name)),
        "metrics": metrics,
        "clips": len(scores.rows),
        "classes_without_positives": int((positives == 0).sum()),
        **about,
        "per_class": [
            {
                "label": label.name,
                "id": label.id,
                "positives": int(count),
                "average_precision": None if np.isnan(value) else float(value),
                "auc": None if np.isnan(under) else float(under),
            }
            for label, count, value, under in zip(labels, positives, ap, area, strict=True)
        ],
    }


def write_results(content: dict[str, Any], path: Path) -> None:
    """Writes `results.json`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, content)


def read_predictions(path: Path) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Keys [n], targets bool [n, C] and logits float32 [n, C] of `predictions.parquet`."""
    table = pq.read_table(path)
    logits = table["logits"].combine_chunks().flatten().to_numpy(zero_copy_only=False).reshape(len(table), -1)
    targets = np.zeros(logits.shape, dtype=bool)
    for row, labels in enumerate(table["labels"].to_pylist()):
        targets[row, labels] = True
    return table["key"].to_pylist(), targets, logits


def write_predictions(scores: Scores, keys: list[str], path: Path) -> None:
    """Writes `predictions.parquet`: key, labels (indices) and logits [C] of every scored clip, in key order."""
    order = np.argsort(np.array(keys), kind="stable")
    classes = scores.logits.shape[1]
    logits = pa.array(scores.logits[order].astype(np.float32).reshape(-1))
    labels = [np.flatnonzero(row > 0.5).astype(np.int32) for row in scores.targets[order]]
    table = pa.table(
        {
            "key": pa.array([keys[i] for i in order]),
            "labels": pa.array(labels, pa.list_(pa.int32())),
            "logits": pa.FixedSizeListArray.from_arrays(logits, classes),
        }
    )
    with new_file(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")
