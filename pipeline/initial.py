"""What a run starts from: `model.init` into a task, with the report in `init.json`.

In: a task, its recipe and data. Out: filled weights. `init.json` in the run directory names every tensor that
was loaded, resized, initialised afresh or dropped.
"""

import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from pipeline.config import Recipe
from pipeline.data.spec import DataSpec
from pipeline.errors import UserError
from pipeline.files import read_json
from pipeline.model.weights import load_weights, weights_file
from pipeline.tasks import FinetuneTask, PretrainTask
from pipeline.tracking import run_of

log = logging.getLogger(__name__)


def initialise(task: PretrainTask | FinetuneTask, recipe: Recipe, spec: DataSpec) -> dict[str, Any]:
    """Loads `model.init`; returns the content of `init.json`.

    A classifier is taken over only where its labels are known to be those of `spec`, in their order, or
    `model.init_classifier=keep` says so; else it begins afresh.

    Raises:
        UserError: the weights cannot be read or do not fit, or the classifier that shall be kept has other labels.
    """
    source = Path(recipe.model.init)
    file = weights_file(source)
    about = _about(source, file)
    reason = _reason_against(about, spec)
    if recipe.model.init_classifier == "keep":
        if about.labels and reason:
            raise UserError(f"model.init_classifier = keep, but {reason} ({file}); leave it at auto")
        reason = ""
    report = load_weights(task, file, ("classifier.",) if reason else (), recipe.model.init_grid)
    log.info("%s: %s", file, report)
    if recipe.model.init_classifier == "keep" and any(name.startswith("classifier.") for name in report.fresh):
        raise UserError(
            f"model.init_classifier = keep, but {file} has none of {len(spec.labels)} classes; leave it at auto"
        )
    if any(name.startswith("classifier.") for name in report.dropped) and reason:
        log.info("its classifier is not taken over, it begins afresh: %s", reason)
    if report.origin != "CRAFT" and any(name.startswith("classifier.") for name in report.loaded):
        log.info("its classifier is taken over; finetune.pool must be what it came with (AST and HF: cls, SSAST: mean)")
    if about.normalisation and not _near(about.normalisation, (spec.mean, spec.std)):
        log.info(
            "its inputs were normalised with mean %.4f and std %.4f, this run's are with %.4f and %.4f; "
            "data.mean and data.std set others",
            *(*about.normalisation, spec.mean, spec.std),
        )
    return {"source": str(file), **asdict(report)}


@dataclass(frozen=True)
class _About:
    """What weights say of the data that they were trained on.

    Attributes:
        labels: Ids, or names where `named`, in the order of the classes; empty: nothing is known.
        named: `labels` are names.
        normalisation: Mean and deviation of their inputs; None: nothing is known.
    """

    labels: tuple[str, ...] = ()
    named: bool = False
    normalisation: tuple[float, float] | None = None


def _about(source: Path, file: Path) -> _About:
    """From an export's own metadata, the `data.json` of the run that the file belongs to, or Hugging Face's files."""
    ours = _metadata(file).get("data")
    homes = [source] if source.is_dir() else []
    homes += [file.parent, run_of(str(file.parent))]
    spec = DataSpec.model_validate_json(ours) if ours else next(
        (DataSpec.load(home) for home in homes if (home / "data.json").is_file()), None)  # fmt: skip
    if spec:
        return _About(tuple(label.id for label in spec.labels), False, (spec.mean, spec.std))
    names: dict[str, str] = {}
    normalisation = None
    remedy = "the model's directory is damaged"
    if (config := file.with_name("config.json")).is_file():
        names = read_json(config, remedy).get("id2label") or {}
    if (config := file.with_name("preprocessor_config.json")).is_file():
        content = read_json(config, remedy)
        normalisation = (content["mean"], content["std"]) if "mean" in content and "std" in content else None
    try:
        return _About(tuple(names[key] for key in sorted(names, key=int)), True, normalisation)
    except (ValueError, TypeError) as error:
        raise UserError(f"{file.with_name('config.json')}: id2label: {error}; {remedy}") from error


def _metadata(file: Path) -> dict[str, str]:
    """Of a safetensors file."""
    if file.suffix != ".safetensors":
        return {}
    try:
        with safe_open(file, "pt") as opened:
            return opened.metadata() or {}
    except (OSError, SafetensorError):  # `load_weights` says what is wrong with it
        return {}


def _reason_against(about: _About, spec: DataSpec) -> str:
    """Why a classifier of these labels is none for the shards; empty: it is."""
    if not about.labels:
        return "nothing says what its labels are; model.init_classifier=keep if they are those of the shards, in order"
    wanted = tuple(label.name if about.named else label.id for label in spec.labels)
    if about.labels == wanted:
        return ""
    if len(about.labels) != len(wanted):
        return f"it has {len(about.labels)} labels, the shards have {len(wanted)}"
    number = next(i for i, (one, other) in enumerate(zip(about.labels, wanted, strict=True)) if one != other)
    return f"its label {number} is '{about.labels[number]}', that of the shards is '{wanted[number]}'"


def _near(first: tuple[float, float], second: tuple[float, float]) -> bool:
    """Within a tenth of a deviation: no difference to a network."""
    return all(abs(a - b) < 0.1 * second[1] for a, b in zip(first, second, strict=True))
