"""Rank program: the metrics of an evaluation whose classes are split over ranks.

    metrics.py OUT_DIR

Each rank writes its own to OUT_DIR/RANK.json.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline import distributed
from pipeline.data.manifest import Label
from pipeline.engine.evaluation import Scores, all_metrics, results

CLASSES = 11


def evaluated(device: torch.device | None) -> dict[str, Any]:
    """`results.json` of scores with ties, a class without positives and one without negatives, and its metrics."""
    rng = np.random.default_rng(5)
    logits = rng.normal(size=(120, CLASSES)).astype(np.float32).round(1)
    targets = (rng.random((120, CLASSES)) < 0.1).astype(np.float32)
    targets[:, 3], targets[:, 7] = 0, 1
    scores = Scores(np.arange(120), logits, targets)
    labels = [Label(id=str(number), name=str(number)) for number in range(CLASSES)]
    content = results(scores, labels, False, {}, device)
    return content | {"alone": all_metrics(logits, targets, False, device)}


def main() -> None:
    with distributed.session(300, seed=0) as world:
        (Path(sys.argv[1]) / f"{world.rank}.json").write_text(json.dumps(evaluated(world.device)))


if __name__ == "__main__":
    main()
