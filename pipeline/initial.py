"""What a run starts from: `model.init` into a task, with the report in `init.json`.

In: a task, its recipe and data. Out: filled weights. `init.json` in the run directory names every tensor that
was loaded, resized, initialised afresh or dropped.
"""

import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.config import Recipe
from pipeline.data.spec import DataSpec
from pipeline.distributed import World
from pipeline.engine import checkpoint
from pipeline.model.weights import load_weights, weights_file
from pipeline.tasks import FinetuneTask, PretrainTask

log = logging.getLogger(__name__)


def initialise(
    task: PretrainTask | FinetuneTask, recipe: Recipe, spec: DataSpec, run_dir: Path, world: World
) -> None:
    """Loads `model.init`, unless a checkpoint of the run will overwrite it anyhow.

    A classifier is taken over only from a run with the same labels in the same order, or from weights
    of others, which do not say what their labels are.

    Raises:
        UserError: the weights cannot be read or do not fit.
    """
    if not recipe.model.init or checkpoint.complete_checkpoints(run_dir):
        return
    source = Path(recipe.model.init)
    file = weights_file(source)
    before = _data(source)
    other_labels = "labels" in before and [label["id"] for label in before["labels"]] != [x.id for x in spec.labels]
    report = load_weights(task, file, skip=("classifier.",) if other_labels else ())
    log.info("%s: %s", file, report)
    if report.origin != "CRAFT" and any(name.startswith("classifier.") for name in report.loaded):
        log.info(
            "its classifier is taken over: its %d labels must be those of the shards, in their order, and "
            "finetune.pool what it was trained with (AST and HF: cls, SSAST: mean)",
            len(spec.labels),
        )
    if "mean" in before and not _near((before["mean"], before["std"]), (spec.mean, spec.std)):
        log.info(
            "its inputs were normalised with mean %.4f and std %.4f, this run's are with %.4f and %.4f; "
            "data.mean and data.std set others",
            *(before["mean"], before["std"], spec.mean, spec.std),
        )
    if world.is_main:
        content = {"source": str(file), **asdict(report)}
        (run_dir / "init.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _data(source: Path) -> dict[str, Any]:
    """What the source says of its data: our `data.json`, or Hugging Face's `preprocessor_config.json`."""
    for name in ("data.json", "preprocessor_config.json"):
        if (source / name).is_file():
            content: dict[str, Any] = json.loads((source / name).read_text(encoding="utf-8"))
            return content
    return {}


def _near(first: tuple[float, float], second: tuple[float, float]) -> bool:
    """Within a tenth of a deviation: no difference to a network."""
    return all(abs(a - b) < 0.1 * second[1] for a, b in zip(first, second, strict=True))
