"""A launched recipe -> a `Job`: loaders, task, initial weights, tracking.

In: a parsed command line and the world. Out: a job whose loaders and tracker are closed at the end,
the run marked finished, failed or killed.
"""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pipeline import distributed
from pipeline.config import FinetuneRecipe, PretrainRecipe, Recipe
from pipeline.data.loader import Loader, Needs, Place, build_loader
from pipeline.data.manifest import load_manifest
from pipeline.data.spec import DataSpec
from pipeline.distributed import World
from pipeline.engine.evaluation import (
    evaluate_task,
    metric_name,
    read_predictions,
    results,
    write_predictions,
    write_results,
)
from pipeline.engine.inference import Scores, mean_losses, score
from pipeline.engine.job import Job, total_steps
from pipeline.engine.setup import Batches, reconcile
from pipeline.errors import UserError
from pipeline.initial import initialise
from pipeline.launch import Launch, check_held_out, check_run, open_run, tracked, write_record
from pipeline.methods import FINETUNE, PRETRAIN
from pipeline.model.weights import load_weights, weights_file
from pipeline.recipes import finetuned_recipe, read_run
from pipeline.tasks import FinetuneTask, PretrainTask
from pipeline.tracking import figures, run_of
from pipeline.tracking.pictures import Pictures

log = logging.getLogger(__name__)


@contextmanager
def pretrain_job(launch: Launch[PretrainRecipe], world: World) -> Iterator[Job]:
    """The job of launchers/pretrain.py.

    Raises:
        UserError: settings, ds.json, shards and ranks that do not fit each other.
    """
    recipe = launch.recipe
    method = PRETRAIN[recipe.pretrain.method]
    name = recipe.run.name or f"{recipe.train.batch_size}-{method.label}"
    ds, batches = reconcile(launch.ds, recipe, world)
    run_dir = Path(recipe.run.dir or f"runs/pretrain-{name}")
    needs = Needs(waveform=method.wav, fbank=method.spec)
    with (
        _opened(recipe, ds, run_dir, world) as (spec, step),
        _loaders(recipe, needs, world) as (train_loader, eval_loader),
    ):
        task = PretrainTask(recipe, spec.mel_bins, spec.frames)
        _begin(task, recipe, ds, batches, train_loader, spec, step, run_dir)
        names = ("spec_accuracy", "wav_accuracy", "contrast_accuracy")
        watched = (method.masked_spec, method.masked_wav, method.contrast)
        metric = "eval_" + next(name for name, used in zip(names, watched, strict=True) if used)

        with tracked(launch, run_dir, name, "pretrain", world, train_loader.manifest) as tracker:
            count = recipe.log.pictures if method.masked_spec or method.masked_wav else 0
            pictures = Pictures(run_dir, tracker, count, world.is_main)

            def evaluate(forward: Any) -> dict[str, float]:
                assert eval_loader is not None
                batches = pictures.watch(eval_loader.eval_batches(full=True))
                losses = mean_losses(forward, batches, eval_loader, world.device)
                pictures.draw(forward, forward.global_steps, job.total_steps)
                return {f"eval_{key}": value for key, value in losses.items()}

            held_out = evaluate if eval_loader else None
            job = Job(recipe, ds, batches, task, train_loader, held_out, metric, run_dir, tracker)
            yield job


@contextmanager
def finetune_job(launch: Launch[FinetuneRecipe], world: World) -> Iterator[Job]:
    """The job of launchers/finetune.py.

    Raises:
        UserError: settings, ds.json, shards, initial weights and ranks that do not fit each other.
    """
    recipe = launch.recipe
    method = FINETUNE[recipe.finetune.method]
    name = finetuning_name(recipe)
    ds, batches = reconcile(launch.ds, recipe, world)
    run_dir = Path(recipe.run.dir or f"runs/finetune-{name}")
    needs = Needs(waveform=method.wav, fbank=method.spec)
    with (
        _opened(recipe, ds, run_dir, world) as (spec, step),
        _loaders(recipe, needs, world) as (train_loader, eval_loader),
    ):
        task = FinetuneTask(recipe, spec.mel_bins, spec.frames, len(spec.labels), spec.single_label)
        _begin(task, recipe, ds, batches, train_loader, spec, step, run_dir)
        evaluate = partial(evaluate_task, loader=eval_loader, single_label=spec.single_label) if eval_loader else None
        metric = f"eval_{metric_name(spec.single_label)}"
        with tracked(launch, run_dir, name, "finetune", world, train_loader.manifest) as tracker:
            yield Job(recipe, ds, batches, task, train_loader, evaluate, metric, run_dir, tracker)


def finish_finetuning(job: Job, world: World) -> None:
    """Scores the held-out clips with the final (averaged) weights and writes `results.json`.

    A module of its own, outside the engine, reads the consolidated weights: what is reported is what
    evaluate.py and predict.py will load.
    """
    if job.evaluate is None:
        log.warning("nothing is held out: no results.json; see data.eval_split and data.fold")
        return
    file = distributed.decide(lambda: weights_file(job.run_dir))
    content = evaluate_run(job.run_dir, file, job.recipe, world, job.run_dir / "predictions.parquet")
    if world.is_main:
        write_results(content | {"epochs": _epochs(job)}, job.run_dir / "results.json")
        _describe_results(job, content)
    job.tracker.metrics({f"final_{name}": value for name, value in content["metrics"].items()}, job.total_steps)
    log.info("%s %.4f on %d clips (%s)", content["metric"], content["value"], content["clips"], file.name)


def _epochs(job: Job) -> dict[str, float]:
    """The held-out metric at the end of each evaluated epoch: {"1": 0.5, ...}."""
    found = {}
    for line in (job.run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if job.metric in row and job.due(row["step"] - 1, job.loader.clips):  # with that step an epoch ends
            found[str(row["step"] * job.batches.total // job.loader.clips)] = row[job.metric]
    return found


def _describe_results(job: Job, content: dict[str, Any]) -> None:
    """Tables and pictures of an evaluation: per class, confusion matrix, a sample of the predictions."""
    keys, targets, logits = read_predictions(job.run_dir / "predictions.parquet")
    names = [row["label"] for row in content["per_class"]]
    folder = job.run_dir / "evaluation"
    folder.mkdir(exist_ok=True)
    figures.per_class(content, folder / "per_class.csv")
    figures.prediction_sample(keys, targets, logits, names, folder / "predictions_sample.json")
    files = [folder / "per_class.csv", folder / "predictions_sample.json"]
    if content["metric"] == "accuracy":
        files += figures.confusion(targets, logits, names, folder)
    job.tracker.artifact(job.run_dir / "results.json")
    for file in files:
        job.tracker.artifact(file, "evaluation")


def evaluate_run(
    run_dir: Path, file: Path, recipe: Recipe, world: World, predictions: Path | None = None
) -> dict[str, Any]:
    """Results of a finetuned run's weights `file` on the evaluation part of `recipe.data`.

    Args:
        run_dir: Finetuned run.
        file: Its weights.
        recipe: Names the shards.
        world: Ranks.
        predictions: Write every clip's logits there, on rank 0; None: nowhere.

    Raises:
        UserError: the shards' label vocabulary or audio format is not the run's.
    """
    scored = score_run(run_dir, file, recipe, world)
    if predictions and world.is_main:
        write_predictions(scored.scores, scored.keys, predictions)
    return results(scored.scores, scored.spec.labels, scored.spec.single_label, scored.about)


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


def score_run(run_dir: Path, file: Path, recipe: Recipe, world: World) -> Scored:
    """Scores the evaluation part of `recipe.data`; as `evaluate_run`, without a metric."""
    task, spec = load_finetuned(run_dir, file, world.device)
    size = recipe.eval.batch_size or recipe.train.batch_size
    needs = Needs(waveform=task.method.wav, fbank=task.method.spec)
    data = recipe.data.model_copy(update={"mean": spec.mean, "std": spec.std, "frames": spec.frames})
    with build_loader(
        data, None, part="eval", needs=needs, batch_size=_eval_size(size, world), seed=0, place=_place(world)
    ) as loader:
        manifest = loader.manifest
        found = (manifest.audio.sample_rate, manifest.audio.samples, manifest.fbank.mel_bins)
        if found != (spec.sample_rate, spec.samples, spec.mel_bins):
            raise UserError(
                f"{data.shards}: {found[0]} Hz, {found[1]} samples, {found[2]} mel bins, but {run_dir} was trained on "
                f"{spec.sample_rate} Hz, {spec.samples}, {spec.mel_bins}; rebuild the shards with that format"
            )
        if [label.id for label in manifest.labels] != [label.id for label in spec.labels]:
            raise UserError(f"{data.shards}: its labels are not those that {run_dir} was trained on")
        scores = score(task, loader.eval_batches())
        loader.bad_clips.check(loader.clips - len(scores.rows))
        keys = loader.keys(scores.rows.tolist())
    about = {
        "weights": file.stem,
        "pool": finetuned_recipe(run_dir).finetune.pool,
        "split": recipe.data.train_split if recipe.data.fold else recipe.data.eval_split,
        "fold": recipe.data.fold,
        "shards_digest": manifest.digest,
    }
    return Scored(scores, keys, spec, about)


def load_finetuned(run_dir: Path, file: Path, device: torch.device) -> tuple[FinetuneTask, DataSpec]:
    """The model of a finetuned run, in float32 and evaluation mode.

    Raises:
        UserError: `run_dir` is no finetuned run, or its files are damaged.
    """
    recipe, spec = finetuned_recipe(run_dir), DataSpec.load(run_dir)
    task = FinetuneTask(recipe, spec.mel_bins, spec.frames, len(spec.labels), spec.single_label)
    report = load_weights(task, file)
    if report.fresh or report.dropped:
        raise UserError(f"{file}: not the weights of {run_dir}/config.yaml: {report}")
    return task.to(device).eval(), spec


@contextmanager
def _loaders(recipe: Recipe, needs: Needs, world: World) -> Iterator[tuple[Loader, Loader | None]]:
    """Training loader, and the held-out one where the shards have such clips."""
    with build_loader(
        recipe.data,
        recipe.augment,
        part="train",
        needs=needs,
        batch_size=recipe.train.batch_size,
        seed=recipe.run.seed,
        place=_place(world),
    ) as train_loader:
        if not recipe.data.fold and recipe.data.eval_split not in train_loader.manifest.splits:
            if recipe.data.eval_split:
                log.warning("data.eval_split = '%s' is not in the shards: nothing is held out", recipe.data.eval_split)
            yield train_loader, None
            return
        size = _eval_size(recipe.eval.batch_size or recipe.train.batch_size, world)
        data = recipe.data.model_copy(update=_normalisation(train_loader, recipe))
        with build_loader(
            data,
            None,
            part="eval",
            needs=needs,
            batch_size=size,
            seed=recipe.run.seed,
            place=_place(world),
            limit=recipe.eval.clips,
        ) as eval_loader:
            yield train_loader, eval_loader


@contextmanager
def _opened(recipe: Recipe, ds: dict[str, Any], run_dir: Path, world: World) -> Iterator[tuple[DataSpec, int]]:
    """Opens the run directory, unless another run lives there; gives what its data is and the step it goes on from."""
    manifest = load_manifest(recipe.data.shards)
    spec = DataSpec.of(manifest, recipe.data)
    check_held_out(recipe.data, manifest)
    step, changed = distributed.decide(lambda: check_run(run_dir, recipe, ds, spec))
    with open_run(run_dir, world):
        for line in changed:
            log.info("from step %d on: %s", step, line)
        yield spec, step


def _begin(
    task: PretrainTask | FinetuneTask, recipe: Recipe, ds: dict[str, Any], batches: Batches, loader: Loader,
    spec: DataSpec, step: int, run_dir: Path,
) -> None:  # fmt: skip
    """The last checks, the initial weights, and then the run's record: from here on the directory is this run's.

    Raises:
        UserError: the run would end before the step it goes on from, or `model.init` does not fit.
    """
    log.info("%d training clips, %d classes, T = %d", loader.clips, len(spec.labels), spec.frames)
    if (total := total_steps(recipe, loader.clips, batches)) < step:
        raise UserError(
            f"run.dir = {run_dir} was trained for {step} steps, and train.steps or train.epochs now ends at {total}; "
            "give as many or more, or another run.dir"
        )
    init = initialise(task, recipe, spec) if recipe.model.init and not step else None
    distributed.decide(lambda: write_record(run_dir, recipe, ds, spec, init))


def _normalisation(loader: Loader, recipe: Recipe) -> dict[str, float]:
    spec = DataSpec.of(loader.manifest, recipe.data)
    return {"mean": spec.mean, "std": spec.std}


def _place(world: World) -> Place:
    return Place(world.rank, world.size, world.device)


def _eval_size(size: int, world: World) -> int:
    """Evaluation has no batch to keep to: the next multiple of the ranks will do."""
    return max(1, size // world.size) * world.size


def finetuning_name(recipe: FinetuneRecipe) -> str:
    """Of the run: `run.name`, or BatchSize-Pretrain-Finetune as the paper writes it."""
    return recipe.run.name or f"{_pretraining_name(recipe)}-{FINETUNE[recipe.finetune.method].label}"


def _pretraining_name(recipe: FinetuneRecipe) -> str:
    """BatchSize-Pretrain of the run that `model.init` names."""
    source = run_of(recipe.model.init)
    config = source / "config.yaml"
    if not recipe.model.init or not config.is_file():
        return f"{recipe.train.batch_size}-Scratch" if not recipe.model.init else source.stem
    before = read_run(source)
    if isinstance(before, PretrainRecipe):
        return f"{before.train.batch_size}-{PRETRAIN[before.pretrain.method].label}"
    return source.name
