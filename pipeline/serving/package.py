"""A finetuned run -> a directory that `mlflow models serve` serves.

In: a run directory. Out: RUN_DIR/model or another directory, an MLflow model: our code, `weights.safetensors`,
config.yaml, data.json, signature, input example, pinned requirements, and a model card.
"""

import json
import logging
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from pipeline.data.spec import DataSpec
from pipeline.errors import UserError
from pipeline.files import check_replaced_directory, new_directory
from pipeline.model.weights import weights_file
from pipeline.recipes import finetuned_recipe

if TYPE_CHECKING:  # a served model trains nothing
    from pipeline.distributed import World
    from pipeline.engine.job import Job

log = logging.getLogger(__name__)

MODEL = "model"  # directory in the run's
ROOT = Path(__file__).resolve().parents[2]
CODE = Path(__file__).with_name("pyfunc_model.py")
# What MLflow and this module write into a package: nothing else may be in a directory that is replaced.
PACKAGE = frozenset({
    "MLmodel", "README.md", "artifacts", "code", "conda.yaml", "input_example.json", "python_env.yaml", CODE.name,
    "requirements.txt", "serving_input_example.json",
})  # fmt: skip
REQUIREMENTS = (
    "mlflow", "torch", "numpy", "pandas", "scipy", "pyarrow", "fsspec", "pydantic", "pyyaml",
    "safetensors", "soundfile", "soxr", "av", "xxhash", "tqdm", "matplotlib", "psutil",
)  # fmt: skip
DEFAULT_TOP = 5


def check_place(run_dir: Path, out: Path, what: str) -> None:
    """Makes sure that a package may be written to `out`. Call it before the work.

    It may where nothing is, in an empty directory, and in place of a package that `save_model` made.

    Args:
        run_dir: The run whose package it will be.
        out: The directory.
        what: The option, for the message.

    Raises:
        UserError: something else is there, or the place cannot be written.
    """
    place, run = out.resolve(), run_dir.resolve()
    if place == run or place in run.parents:
        where = "is the run itself" if place == run else "holds the run"
        raise UserError(f"{what} {out}: {where}, and a package takes the whole directory; name a new one")
    check_replaced_directory(out, what, PACKAGE, _is_package)


def _is_package(folder: Path) -> bool:
    """Whether `save_model` made what lies there: its MLmodel names our code and the data set that it was trained on."""
    try:
        content = yaml.safe_load((folder / "MLmodel").read_text(encoding="utf-8"))
        code = content["flavors"]["python_function"]["model_code_path"]
        return Path(code).name == CODE.name and {"labels", "manifest_digest"} <= content["metadata"].keys()
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError, AttributeError):
        return False


def save_model(run_dir: Path, out: Path) -> str:
    """Writes the model of a finetuned run to `out`, whole or not at all, in place of an earlier package.

    Returns:
        The model card, Markdown.

    Raises:
        UserError: no finetuned run, or something else lies at `out` (`check_place`), or it cannot be written.
    """
    from pipeline.tracking.store import load_mlflow

    check_place(run_dir, out, "model")
    spec = DataSpec.load(run_dir)
    weights = weights_file(run_dir)
    card = model_card(run_dir, spec)
    load_mlflow()
    import mlflow.pyfunc

    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with new_directory(out) as made, tempfile.TemporaryDirectory() as folder:
            copies = {name: Path(folder) / name for name in ("weights.safetensors", "config.yaml", "data.json")}
            sources = (weights, run_dir / "config.yaml", run_dir / "data.json")
            for source, copy in zip(sources, copies.values(), strict=True):
                shutil.copyfile(source, copy)
            mlflow.pyfunc.save_model(
                path=str(made),
                python_model=str(CODE),
                artifacts={name.split(".")[0]: str(path) for name, path in copies.items()},
                code_paths=[str(ROOT / "pipeline"), str(ROOT / "shard_tools")],
                signature=_signature(),
                input_example=_example(spec),
                pip_requirements=[f"{name}=={version(name).split('+')[0]}" for name in REQUIREMENTS],
                metadata={"labels": len(spec.labels), "manifest_digest": spec.digest},
            )
            for cache in made.rglob("__pycache__"):
                shutil.rmtree(cache)
            (made / "README.md").write_text(card, encoding="utf-8")
    except OSError as error:
        raise UserError(f"model {out}: {error.strerror or error}; nothing was changed there") from error
    return card


def check_publishable(job: "Job") -> None:
    """Tries the model's place before the training.

    Raises:
        UserError: it cannot be written, or something else lies there.
    """
    if job.recipe.log.model or job.recipe.log.register_as:
        check_place(job.run_dir, job.run_dir / MODEL, "log.model")


def publish(job: "Job", world: "World") -> None:
    """The last act of a finetuning, on rank 0: its model becomes an artifact and, with a name, one in the registry.

    Through the spool, like everything else: a server that is down gets it later.
    """
    config = job.recipe.log
    if not world.is_main or not (config.model or config.register_as):
        return
    folder = job.run_dir / MODEL
    card = save_model(job.run_dir, folder)
    tags = {"run_dir": str(job.run_dir.resolve())}
    job.tracker.model(folder, job.total_steps, tags, card, config.register_as)
    log.info("served by: mlflow models serve --env-manager local -m %s", folder)


def model_card(run_dir: Path, spec: DataSpec) -> str:
    """What a user of the model must know, from the run's own files.

    Raises:
        UserError: no finetuned run, or its results.json is damaged.
    """
    recipe = finetuned_recipe(run_dir)
    results_file = run_dir / "results.json"
    evaluation = "not evaluated"
    if results_file.exists():
        try:
            results = json.loads(results_file.read_text(encoding="utf-8"))
            numbers = ", ".join(f"{name} {value:.4f}" for name, value in results["metrics"].items()
                                if value is not None)  # undefined: no class had clips of both kinds
            evaluation = f"{numbers} on {results['clips']} clips of split `{results['split']}`"
            if others := scored_instead(results, weights_file(run_dir)):
                evaluation = f"not evaluated; the run's results.json is of {others}"
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{results_file}: damaged ({error}); write it anew with evaluate.py --out") from error
    names = ", ".join(label.name for label in spec.labels[:20]) + (", ..." if len(spec.labels) > 20 else "")
    softmax = recipe.finetune.loss_of(spec.single_label) == "ce"
    return f"""# {recipe.finetune.method} ({recipe.model.size}), {len(spec.labels)} classes

Labels of {spec.samples / spec.sample_rate:g} s of audio: fill one column of a row, `path` (a file that the
server sees), `audio` (the bytes of a file, base64 in JSON) or `samples` (floats in [-1, 1], with `rate` in Hz).
Any codec and rate; the first {spec.samples / spec.sample_rate:g} s are heard. `params: {{"top": {DEFAULT_TOP}}}`
chooses how many labels come back.

- Scores: {"softmax over the classes" if softmax else "a sigmoid for each class"}.
- Evaluation: {evaluation}.
- Training data: `{recipe.data.shown}`, manifest {spec.digest[:16]}, split `{recipe.data.train_split}`,
  held-out fold {recipe.data.fold or "none"}.
- Pretrained from: `{recipe.model.init or "nothing (random weights)"}`.
- Classes: {names}.
- Limits: trained on that data alone; scores of other recordings, microphones and levels are not calibrated.
"""


def scored_instead(results: dict[str, Any], file: Path) -> str:
    """Of what the scores of a results.json are, where they are not of the weights in `file`; empty: of these.

    `evaluate.py --out` writes one of several runs, and of other weights of a checkpoint, too; and a run that goes on
    after its end has a newer checkpoint before it has scores of it.
    """
    if "ensemble" in results:
        return "an ensemble"
    scored = results.get("checkpoint", file.parent.name), results.get("weights", file.stem)
    return "" if scored == (file.parent.name, file.stem) else f"other weights, `{scored[1]}` of {scored[0]}"


def _signature() -> Any:
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
    from mlflow.types.schema import Array

    inputs = Schema([
        ColSpec(DataType.string, "path", required=False),
        ColSpec(DataType.binary, "audio", required=False),
        ColSpec(Array(DataType.double), "samples", required=False),
        ColSpec(DataType.double, "rate", required=False),
    ])  # fmt: skip
    outputs = Schema([ColSpec(Array(DataType.string), "labels"), ColSpec(Array(DataType.double), "scores")])
    return ModelSignature(inputs, outputs, ParamSchema([ParamSpec("top", DataType.long, DEFAULT_TOP)]))


def _example(spec: DataSpec) -> Any:
    """A tenth of a second of a 440 Hz tone: small in MLmodel's neighbour, and enough to answer."""
    import numpy as np
    import pandas as pd

    time = np.arange(spec.sample_rate // 10) / spec.sample_rate
    tone = (0.1 * np.sin(2 * np.pi * 440 * time)).round(4)
    return pd.DataFrame({"samples": [tone.tolist()], "rate": [float(spec.sample_rate)]})
