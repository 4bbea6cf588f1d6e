"""A finished run, opened again: its model, its scores of a set of clips alone or with other runs', initial weights.

In: run directories, weights files. Out: a model in evaluation mode; `Scored`; a task filled from `model.init`, with a
report of every tensor.

The paper's ensemble (Table 1) averages the probabilities of runs that differ in their seed. Averaged weights
make one model of checkpoints on the same path, for the cost of one.
"""

import json
import logging
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from scipy.special import expit, softmax

from pipeline import distributed
from pipeline.config import FinetuneRecipe, Recipe
from pipeline.data.loader import Loader
from pipeline.data.spec import DataSpec
from pipeline.distributed import World
from pipeline.engine.evaluation import Scores, score
from pipeline.engine.room import no_room_to_evaluate
from pipeline.engine.setup import eval_batch_size
from pipeline.errors import UserError
from pipeline.files import read_json
from pipeline.hub import local_model
from pipeline.model.precision import in_precision
from pipeline.model.teacher import Teacher
from pipeline.model.weights import load_weights, read_weights, weights_file
from pipeline.recipes import finetuned_recipe, read_yaml
from pipeline.tasks import FinetuneTask, PretrainTask
from pipeline.tracking import run_of

log = logging.getLogger(__name__)

# Settings of the waveform's way through the network that the shapes of its weights do not show.
UNSEEN = ("activation", "kernel_strides", "norm", "wav_depth")


def load_finetuned(run_dir: Path, file: Path, device: torch.device) -> tuple[FinetuneTask, DataSpec]:
    """The model of a finetuned run, in float32 and evaluation mode.

    Raises:
        UserError: `run_dir` is no finetuned run, or its files are damaged.
    """
    recipe, spec = finetuned_recipe(run_dir), DataSpec.load(run_dir)
    return finetuned_task(recipe, spec, file, f"{run_dir}/config.yaml").to(device), spec


def finetuned_task(recipe: FinetuneRecipe, spec: DataSpec, file: Path, where: str) -> FinetuneTask:
    """The model of settings and weights, on the CPU in evaluation mode.

    Args:
        recipe: Settings.
        spec: Of the data that it was trained on.
        file: All of its weights.
        where: What says the settings, for the message.

    Raises:
        UserError: the weights are those of other settings.
    """
    task = FinetuneTask(recipe, spec.mel_bins, spec.frames, len(spec.labels), spec.single_label)
    report = load_weights(task, file)
    if report.fresh or report.dropped:
        raise UserError(f"{file}: not the weights of {where}: {report}")
    return task.eval()


@dataclass(frozen=True)
class Scored:
    """What a run makes of an evaluation set; equal on all ranks.

    Attributes:
        scores: Of n clips.
        keys: Sample keys [n].
        spec: What the run remembers of its data.
        about: Facts that make the numbers comparable, for `results.json`.
    """

    scores: Scores
    keys: list[str]
    spec: DataSpec
    about: dict[str, Any]


def score_run(
    run_dir: Path, file: Path, recipe: Recipe, world: World, ids: pa.Array | None = None, precision: str = "fp32"
) -> Scored:
    """Scores the evaluation part of `recipe.data` with a finished run's weights; a collective.

    Args:
        run_dir: The run.
        file: Its weights.
        recipe: Names the shards.
        world: Ranks.
        ids: string [i], keys: only these clips, as far as they are there; None: all.
        precision: See `pipeline.model.precision`.

    Raises:
        UserError: the shards' audio format or labels are not those of the run; none of the ids is there; too many bad
            clips; shards that are not rank 0's.
    """
    task, spec = load_finetuned(run_dir, file, world.device)
    task = in_precision(task, precision)
    made = {"mean": spec.mean, "std": spec.std, "frames": spec.frames, "seconds": spec.seconds}
    data = recipe.data.model_copy(update=made)
    size = eval_batch_size(recipe, world)
    with Loader(
        data, "eval", waveform=task.method.wav, fbank=task.method.spec, batch_size=size,
        rank=world.rank, world_size=world.size, device=world.device, ids=ids,
    ) as loader:  # fmt: skip
        corpus = loader.corpus
        distributed.check_same({"shards digest": corpus.digest[:16]}, "give all hosts the same shards")
        found = (corpus.audio.sample_rate, corpus.audio.samples, corpus.fbank.mel_bins)
        if found != (spec.sample_rate, spec.samples, spec.mel_bins):
            raise UserError(
                f"{data.shown}: {found[0]} Hz, {found[1]} samples, {found[2]} mel bins, but {run_dir} was trained on "
                f"{spec.sample_rate} Hz, {spec.samples}, {spec.mel_bins}; rebuild the shards with that format"
            )
        if [label.id for label in corpus.labels] != [label.id for label in spec.labels]:
            raise UserError(f"{data.shown}: its labels are not those that {run_dir} was trained on")
        try:
            scores = score(task, loader.batches())
        except torch.OutOfMemoryError as error:
            raise no_room_to_evaluate(error, size, world) from error
        loader.bad_clips.check(loader.clips - len(scores.rows))
        keys = loader.keys(scores.rows.tolist())
    about: dict[str, Any] = {
        "checkpoint": file.parent.name,
        "weights": file.stem,
        "pool": finetuned_recipe(run_dir).finetune.pool,
        "split": recipe.data.train_split if recipe.data.fold else recipe.data.eval_split,
        "fold": recipe.data.fold,
        "shards_digest": corpus.digest,
        "precision": precision,
    }
    if ids is not None:
        there = loader.clips
        about["ids"] = {"listed": len(ids), "found": there, "evaluated": len(keys), "missing": len(ids) - there}
    return Scored(scores, keys, spec, about)


def score_ensemble(
    runs: Sequence[tuple[Path, Path]], recipe: Recipe, world: World, ids: pa.Array | None = None,
    precision: str = "fp32",
) -> Scored:  # fmt: skip
    """Mean probability of several runs: a softmax of those trained with ce, sigmoids of those with bce.

    Args:
        runs: (run directory, weights file) of each.
        recipe: Names the shards.
        world: Ranks.
        ids: As of `score_run`.
        precision: As of `score_run`.

    Raises:
        UserError: a run has other labels, or was held out other clips.
    """
    _check_labels(runs)
    first = score_run(*runs[0], recipe, world, ids, precision)
    logits, pools = [first.scores.logits], [first.about["pool"]]
    losses = [finetuned_recipe(run_dir).finetune.loss_of(first.spec.single_label) for run_dir, _ in runs]
    for run_dir, file in runs[1:]:
        other = score_run(run_dir, file, recipe, world, ids, precision)
        if other.keys != first.keys:
            raise UserError(f"{run_dir}: scored other clips than {runs[0][0]}; name the same --split for both")
        logits.append(other.scores.logits)
        pools.append(other.about["pool"])
    scores = replace(first.scores, logits=mean_probability(logits, losses))
    pool = ", ".join(dict.fromkeys(pools))
    members = [str(run_dir) for run_dir, _ in runs]
    about = first.about | {"checkpoint": f"{len(runs)} runs", "pool": pool, "ensemble": members}
    return Scored(scores, first.keys, first.spec, about)


def mean_probability(logits: Sequence[np.ndarray], losses: Sequence[str]) -> np.ndarray:
    """What an ensemble says: the mean of its members' probabilities.

    Args:
        logits: [n, C] of each member, of the same clips in the same order.
        losses: Of each member: "ce", a softmax over the classes; "bce", a sigmoid for each.

    Returns:
        float32 [n, C].
    """
    total = np.zeros(logits[0].shape)
    for member, loss in zip(logits, losses, strict=True):
        total += softmax(member.astype(np.float64), axis=1) if loss == "ce" else expit(member.astype(np.float64))
    return (total / len(logits)).astype(np.float32)


def score_averaged_weights(
    runs: Sequence[tuple[Path, Path]], recipe: Recipe, world: World, ids: pa.Array | None = None,
    precision: str = "fp32",
) -> Scored:  # fmt: skip
    """The model whose weights are the mean of several runs' weights.

    Args:
        runs: (run directory, weights file) of each; the first one's configuration builds the model.
        recipe: Names the shards.
        world: Ranks.
        ids: As of `score_run`.
        precision: As of `score_run`.

    Raises:
        UserError: a run has other labels, or the weights are not of one architecture.
    """
    _check_labels(runs)
    mean: dict[str, torch.Tensor] = {}
    for number, (_, file) in enumerate(runs, start=1):
        weights = read_weights(file)
        if mean and {n: t.shape for n, t in weights.items()} != {n: t.shape for n, t in mean.items()}:
            raise UserError(f"{file}: its tensors are not those of {runs[0][1]}; average runs of one model and method")
        for name, tensor in weights.items():
            kept = mean.setdefault(name, torch.zeros_like(tensor, dtype=torch.float64))
            kept += (tensor.double() - kept) / number
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "mean.safetensors"
        save_file({name: tensor.float().contiguous() for name, tensor in mean.items()}, file)
        scored = score_run(runs[0][0], file, recipe, world, ids, precision)
    members = [str(run_dir) for run_dir, _ in runs]
    return replace(scored, about=scored.about | {"checkpoint": f"{len(runs)} runs", "averaged": members})


def _check_labels(runs: Sequence[tuple[Path, Path]]) -> None:
    """Before anything is scored.

    Raises:
        UserError: a run has other labels than the first, or the same in another order.
    """
    specs = [DataSpec.load(run_dir) for run_dir, _ in runs]
    for (run_dir, _), spec in zip(runs, specs, strict=True):
        if (spec.labels, spec.single_label) != (specs[0].labels, specs[0].single_label):
            raise UserError(f"{run_dir}: trained on other labels than {runs[0][0]}; name runs of one task")


def initialise(task: PretrainTask | FinetuneTask, recipe: Recipe, spec: DataSpec) -> dict[str, Any]:
    """Loads `model.init`; returns the content of `init.json`.

    A classifier is taken over only where its labels are known to be those of `spec`, in their order, or
    `model.init_classifier=keep` says so; else it begins afresh.

    Raises:
        UserError: the weights cannot be read or do not fit, the classifier that shall be kept has other labels, or a
            finetuning of other folds has seen those of the fold that this run holds out.
    """
    source = local_model(recipe.model.init)
    file = weights_file(source)
    _check_unseen(file, recipe, spec)
    labels, named, normalisation = trained_on(source, file)
    reason = _difference(labels, [label.name if named else label.id for label in spec.labels])
    if recipe.model.init_classifier == "keep":
        if labels and reason:
            raise UserError(f"model.init_classifier = keep, but {reason} ({file}); leave it at auto")
        reason = ""
    report = load_weights(task, file, ("classifier.",) if reason else (), recipe.model.init_grid)
    log.info("%s: %s", file, report)
    if isinstance(task, PretrainTask) and task.teacher is not None:  # it begins where its student does
        task.teacher = Teacher(task.model, task.teacher.blocks)
    if recipe.model.init_classifier == "keep" and any(name.startswith("classifier.") for name in report.fresh):
        raise UserError(
            f"model.init_classifier = keep, but {file} has none of {len(spec.labels)} classes; leave it at auto"
        )
    if any(name.startswith("classifier.") for name in report.dropped) and reason:
        log.info("its classifier is not taken over, it begins afresh: %s", reason)
    if report.origin != "CRAFT" and any(name.startswith("classifier.") for name in report.loaded):
        log.info("its classifier is taken over; finetune.pool must be what it came with (AST and HF: cls, SSAST: mean)")
    if any(name.startswith(f"model.{recipe.model.frontend}.") for name in report.loaded):
        before, now = _network(source, file), recipe.model.model_dump(mode="json")
        for key in UNSEEN:
            if before.get(key, now[key]) != now[key]:
                log.warning("%s was trained with model.%s = %s, which its weights fit; this run has %s",
                            file, key, before[key], now[key])  # fmt: skip
    inputs = (spec.mean, spec.std)
    if normalisation and any(abs(a - b) >= 0.1 * spec.std for a, b in zip(normalisation, inputs, strict=True)):
        log.info(
            "its inputs were normalised with mean %.4f and std %.4f, this run's are with %.4f and %.4f; "
            "data.mean and data.std set others",
            *normalisation, *inputs,
        )  # fmt: skip
    return {"source": str(file), **asdict(report)}


def _check_unseen(file: Path, recipe: Recipe, spec: DataSpec) -> None:
    """A fold is held out from the weights that a run begins with, too, where they were trained with its labels."""
    home = run_of(str(file.parent))
    if not recipe.data.fold or not all((home / name).is_file() for name in ("config.yaml", "data.json")):
        return
    before = read_yaml(home / "config.yaml", "the run directory is damaged")
    data = before.get("data", {}) if isinstance(before, dict) and "finetune" in before else {}
    fold, splits = data.get("fold", 0), (str(data.get("train_split", "")), recipe.data.train_split)
    same = set.intersection(*(set(names.split(",")) for names in splits))
    if same and fold != recipe.data.fold and DataSpec.load(home).digest == spec.digest:
        held_out = f"held out fold {fold}" if fold else "held out no fold"
        raise UserError(
            f"model.init = {recipe.model.init} was finetuned on these shards and {held_out}: it has learned labels of "
            f"fold {recipe.data.fold}, which this run would be scored on; begin with its pretraining"
        )


def trained_on(source: Path, file: Path) -> tuple[list[str], bool, tuple[float, float] | None]:
    """What weights say of the data that they were trained on.

    From an export's own metadata, the `data.json` of the run that the file belongs to, or Hugging Face's files.

    Returns:
        Labels in the order of the classes (empty: nothing is known); whether they are names, not ids; mean and
        deviation of the inputs (None: nothing is known).
    """
    ours = None
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, "pt") as opened:
                ours = (opened.metadata() or {}).get("data")
        except (OSError, SafetensorError) as error:  # `load_weights` says what is wrong with it
            log.debug("%s: %s", file, error)
    homes = [source] if source.is_dir() else []
    homes += [file.parent, run_of(str(file.parent))]
    spec = DataSpec.parse(ours, file) if ours else next(
        (DataSpec.load(home) for home in homes if (home / "data.json").is_file()), None)  # fmt: skip
    if spec:
        return [label.id for label in spec.labels], False, (spec.mean, spec.std)
    names: dict[str, str] = {}
    normalisation = None
    remedy = "the model's directory is damaged"
    if (config := file.with_name("config.json")).is_file():
        names = read_json(config, remedy).get("id2label") or {}
    if (config := file.with_name("preprocessor_config.json")).is_file():
        content = read_json(config, remedy)
        normalisation = (content["mean"], content["std"]) if "mean" in content and "std" in content else None
    try:
        return [names[key] for key in sorted(names, key=int)], True, normalisation
    except (ValueError, TypeError) as error:
        raise UserError(f"{file.with_name('config.json')}: id2label: {error}; {remedy}") from error


def _network(source: Path, file: Path) -> dict[str, Any]:
    """The section `model` of what a run, or an export of one, recorded of its settings; empty: it is of neither."""
    content: Any = None
    if file.suffix == ".safetensors":
        with safe_open(file, "pt") as opened:
            text = (opened.metadata() or {}).get("config", "null")
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{file}: its settings are damaged ({error}); export the run again") from error
    for home in (source, file.parent, run_of(str(file.parent))):
        if content is None and (home / "config.yaml").is_file():
            content = read_yaml(home / "config.yaml", "the run directory is damaged")
    found = content.get("model") if isinstance(content, dict) else None
    return {"norm": "group"} | found if isinstance(found, dict) else {}  # what runs had before there was a choice


def _difference(labels: list[str], wanted: list[str]) -> str:
    """Why a classifier of these labels is none for the shards, whose are `wanted`; empty: it is."""
    if not labels:
        return "nothing says what its labels are; model.init_classifier=keep if they are those of the shards, in order"
    if len(labels) != len(wanted):
        return f"it has {len(labels)} labels, the shards have {len(wanted)}"
    number = next((i for i, (one, other) in enumerate(zip(labels, wanted, strict=True)) if one != other), None)
    if number is None:
        return ""
    return f"its label {number} is '{labels[number]}', that of the shards is '{wanted[number]}'"
