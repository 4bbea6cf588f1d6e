"""A parsed command line -> a trained run: what pretrain.py and finetune.py do on each rank.

In: `command_line.Launch` and the world. Out: a run directory with checkpoints, metrics and, of a finetuning, results
and the model to be served; in MLflow a run that is finished, failed or killed.
"""

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pipeline import distributed
from pipeline.command_line import Launch
from pipeline.config import DataConfig, FinetuneRecipe, PretrainRecipe, Recipe
from pipeline.data.corpus import Corpus, load_corpus
from pipeline.data.loader import Loader
from pipeline.data.spec import DataSpec
from pipeline.distributed import World
from pipeline.engine.evaluation import (
    all_metrics,
    mean_losses,
    metric_name,
    read_predictions,
    results,
    score,
    write_predictions,
)
from pipeline.engine.job import Forward, Job
from pipeline.engine.loop import train
from pipeline.engine.setup import eval_batch_size, reconcile
from pipeline.errors import UserError
from pipeline.files import write_json
from pipeline.methods import FINETUNE, PRETRAIN, Reads
from pipeline.model.weights import weights_file
from pipeline.probing.curve import Curve
from pipeline.recipes import RecipeT, flatten, read_run
from pipeline.run_directory import check_ranks, check_run, open_run, write_record
from pipeline.runs import initialise, score_run
from pipeline.serving.package import check_publishable, publish
from pipeline.tasks import FinetuneTask, task_of
from pipeline.tracking import Tracker, figures, open_tracker, run_of
from pipeline.tracking.spool import Feed

log = logging.getLogger(__name__)


def pretrain(launch: Launch[PretrainRecipe], world: World) -> None:
    """Trains as launchers/pretrain.py says.

    Raises:
        UserError: settings, ds.json, shards and ranks that do not fit each other.
    """
    recipe = launch.recipe
    method = PRETRAIN[recipe.pretrain.method]
    name = recipe.run.name or f"{recipe.train.batch_size}-{method.label}"
    found = "explained" if method.drops else "accuracy"
    names = (f"spec_{found}", f"wav_{found}", "contrast_accuracy")
    used = (method.masked_spec, method.masked_wav, method.contrast)
    metric = "eval_" + next(name for name, present in zip(names, used, strict=True) if present)

    distributed.check_same({"eval.probe": recipe.eval.probe}, "give all hosts the same configs")
    curve = _curve(recipe, method, world) if recipe.eval.probe else None
    with _prepared(launch, world, "pretrain", name, method, metric) as (job, held_out):
        count = recipe.log.pictures if (method.masked_spec or method.masked_wav) and not method.latent else 0
        pictures = figures.Reconstructions(job.run_dir, job.tracker, count, world.is_main)

        def evaluate(forward: Forward, step: int) -> dict[str, float]:
            assert held_out is not None
            batches = pictures.keep(held_out.batches(full=True))
            losses = mean_losses(forward, batches, held_out, world.device)
            pictures.draw(forward, step, job.total_steps)
            if curve and losses and curve.due(job, step):  # a probe is never the metric that is watched
                model = job.task.model
                losses |= curve.measure(forward, {"spec": model.grid, "wav": model.wav_grid})
            return {f"eval_{key}": value for key, value in losses.items()}

        train(replace(job, evaluate=evaluate if held_out else None), world)


def _curve(recipe: PretrainRecipe, method: Reads, world: World) -> Curve:
    """The probes of `eval.probe`, checked before anything is written."""
    data, corpus = recipe.data, load_corpus(recipe.data)
    if not data.fold and not corpus.held_out:
        raise UserError("eval.probe is due at evaluations, and nothing is held out; see data.eval_split and data.fold")
    return Curve(recipe, DataSpec.of(corpus, data), method, world)


def finetune(launch: Launch[FinetuneRecipe], world: World) -> None:
    """Trains, evaluates and publishes as launchers/finetune.py says.

    Raises:
        UserError: settings, ds.json, shards, initial weights and ranks that do not fit each other; no labels.
    """
    recipe = launch.recipe
    method = FINETUNE[recipe.finetune.method]
    single = load_corpus(recipe.data, labelled=True).single_label
    metric = f"eval_{metric_name(single)}"

    with _prepared(launch, world, "finetune", finetuning_name(recipe), method, metric) as (job, held_out):

        def evaluate(forward: Forward, step: int) -> dict[str, float]:
            assert held_out is not None
            scores = score(forward, held_out.batches())
            held_out.bad_clips.check(held_out.clips - len(scores.rows))
            metrics = all_metrics(scores.logits, scores.targets, single, world.device)
            return {f"eval_{name}": value for name, value in metrics.items()}

        check_publishable(job)
        train(replace(job, evaluate=evaluate if held_out else None), world)
        if held_out:
            _write_results(job, world)
        else:
            log.warning("nothing is held out: no results.json; see data.eval_split and data.fold")
        publish(job, world)


@contextmanager
def _prepared(
    launch: Launch[Any], world: World, kind: str, name: str, method: Reads, metric: str
) -> Iterator[tuple[Job, Loader | None]]:  # fmt: skip
    """A job without an evaluation, and the loader of the held-out clips; closes loaders, logs and tracking at the end.

    Nothing is written before all is known to fit; from the record on the directory is this run's.

    Args:
        launch: Command line.
        world: Ranks.
        kind: "pretrain" or "finetune".
        name: Of the run.
        method: Which representations are read.
        metric: See `Job`.
    """
    recipe: PretrainRecipe | FinetuneRecipe = launch.recipe
    ds, batches = reconcile(launch.ds, recipe, world)
    run_dir = Path(recipe.run.dir or f"runs/{kind}-{name}")
    corpus = load_corpus(recipe.data)
    spec = DataSpec.of(corpus, recipe.data)
    check_held_out(recipe.data, corpus)
    check_ranks(recipe, ds, spec)
    distributed.decide(lambda: check_run(run_dir, recipe, ds, spec))
    with open_run(run_dir, world), _loaders(recipe, method, world) as (loader, held_out):
        # Again: another run may have gone on there until now.
        step, changed = distributed.decide(lambda: check_run(run_dir, recipe, ds, spec))
        for line in changed:
            log.info("from step %d on: %s", step, line)
        for line in corpus.report:
            log.info("%s", line)
        log.info("%d training clips, %d classes, T = %d", loader.clips, len(spec.labels), spec.frames)
        task = task_of(recipe, loader)
        total = recipe.train.steps or math.ceil(recipe.train.epochs * loader.clips / batches.total)
        if total < step:
            raise UserError(
                f"run.dir = {run_dir} was trained for {step} steps, and train.steps or train.epochs now ends at "
                f"{total}; give as many or more, or another run.dir"
            )
        init = initialise(task, recipe, spec) if recipe.model.init and not step else None
        distributed.decide(lambda: write_record(run_dir, recipe, ds, spec, init, step))
        with tracked(launch, run_dir, name, kind, world, corpus) as tracker:
            yield Job(recipe, ds, batches, task, loader, total, None, metric, run_dir, tracker), held_out


@contextmanager
def _loaders(recipe: Recipe, method: Reads, world: World) -> Iterator[tuple[Loader, Loader | None]]:
    """Training loader, and the held-out one where the shards have such clips."""
    part = partial(
        Loader, recipe.data, waveform=method.wav, fbank=method.spec, seed=recipe.run.seed, rank=world.rank,
        world_size=world.size, device=world.device,
    )  # fmt: skip
    with part(augment=recipe.augment, batch_size=recipe.train.batch_size) as loader:
        if not recipe.data.fold and not loader.corpus.held_out:
            if recipe.data.eval_split:
                log.warning("data.eval_split = '%s' is not in the shards: nothing is held out", recipe.data.eval_split)
            yield loader, None
            return
        size, wanted = eval_batch_size(recipe, world), recipe.eval.batch_size or recipe.train.batch_size
        if size != wanted and isinstance(recipe, PretrainRecipe) and PRETRAIN[recipe.pretrain.method].contrast:
            log.warning("eval.batch_size = %d does not divide by %d ranks: %d are taken; a contrast of other clips is "
                        "another number: take a multiple of the ranks", wanted, world.size, size)  # fmt: skip
        with part(part="eval", batch_size=size, limit=recipe.eval.clips) as held_out:
            yield loader, held_out


def check_held_out(data: DataConfig, corpus: Corpus) -> None:
    """Refuses an `eval_split` that was named and is not there; the default may be missing.

    Raises:
        UserError: see above.
    """
    default = DataConfig.model_fields["eval_split"].default
    if not data.fold and data.eval_split not in (default, "") and not corpus.held_out:
        raise UserError(
            f"data.eval_split = '{data.eval_split}' is not in {data.shown}, which has {', '.join(corpus.splits)}; "
            "name one of these, or leave it empty to hold out nothing"
        )


@contextmanager
def tracked(
    launch: Launch[RecipeT], run_dir: Path, name: str, kind: str, world: World, corpus: Corpus
) -> Iterator[Tracker]:
    """The run's tracker, with settings, data and host told; at the end the run is finished, failed or killed."""
    recipe = launch.recipe
    tracker = open_tracker(
        recipe.log,
        run_dir,
        name=name,
        rank=world.rank,
        kind=kind,
        parent=recipe.model.init or None,
        part_of=launch.part_of,
        first_of_node=distributed.local_rank() == 0,
    )
    tracker.params(flatten(recipe))
    tracker.dataset(corpus, recipe.data.shown)
    tracker.tags({"ranks": str(world.size), "device": world.device.type} | recipe.log.tags)
    for file in ("config.yaml", "ds.json", "data.json"):
        tracker.artifact(run_dir / file)
    status: Literal["FINISHED", "FAILED", "KILLED"] = "FAILED"
    try:
        with world.faults.before_exit(lambda: tracker.finish("FAILED")):
            yield tracker
        status = "FINISHED"
    except Exception as error:
        world.faults.report(error)  # the others learn of it now, not after the tracking's last delivery
        raise
    except (KeyboardInterrupt, SystemExit):
        status = "KILLED"
        raise
    finally:
        try:
            if world.is_main and figures.curves(run_dir / "metrics.jsonl", run_dir / "curves.png"):
                tracker.artifact(run_dir / "curves.png")
        except OSError as error:
            log.warning("%s: %s; there is no picture of the curves", run_dir / "curves.png", error.strerror)
        tracker.finish(status)


def _write_results(job: Job, world: World) -> None:
    """Scores the held-out clips with the final (averaged) weights and writes `results.json`.

    A module of its own, outside the engine, reads the consolidated weights: what is reported is what
    evaluate.py and predict.py will load.
    """
    file = distributed.decide(lambda: weights_file(job.run_dir))
    scored = score_run(job.run_dir, file, job.recipe, world)
    data = job.recipe.data
    sampler = {"sampler": data.sampler, "replacement": data.replacement, "epoch_clips": job.loader.clips}
    about = scored.about | sampler
    content = results(scored.scores, scored.spec.labels, scored.spec.single_label, about, world.device)
    if world.is_main:
        for row, weights in zip(content["per_class"], _class_weights(job), strict=True):
            row.update(weights)
        write_predictions(scored.scores, scored.keys, job.run_dir / "predictions.parquet")
        write_json(job.run_dir / "results.json", content | {"epochs": _epochs(job)})
        _draw_results(job, content)
    job.tracker.summary({f"final_{name}": value for name, value in content["metrics"].items()}, job.total_steps)
    log.info("%s %.4f on %d clips (%s)", content["metric"], content["value"], content["clips"], file.name)


def _class_weights(job: Job) -> list[dict[str, float]]:
    """What each class weighed in training: its clips, their expected draws in an epoch, the weight of its labels."""
    counts, drawn = job.loader.class_counts()
    assert isinstance(job.task, FinetuneTask)
    weights = [1.0] * len(counts) if job.task.pos_weight is None else job.task.pos_weight.tolist()
    rows = zip(counts.tolist(), drawn.tolist(), weights, strict=True)
    return [{"train_clips": count, "train_drawn": draws, "pos_weight": weight} for count, draws, weight in rows]


def _epochs(job: Job) -> dict[str, float]:
    """The held-out metric at the end of each evaluated epoch: {"1": 0.5, ...}."""
    found = {}
    for row in Feed(job.run_dir / "metrics.jsonl").read():
        if job.metric in row and job.due(row["step"] - 1, job.loader.clips):  # with that step an epoch ends
            found[str(row["step"] * job.batches.total // job.loader.clips)] = row[job.metric]
    return found


def _draw_results(job: Job, content: dict[str, Any]) -> None:
    """Tables and pictures of an evaluation: per class, confusion matrix, a sample of the predictions."""
    keys, targets, logits = read_predictions(job.run_dir / "predictions.parquet")
    names = [row["label"] for row in content["per_class"]]
    folder = job.run_dir / "evaluation"
    folder.mkdir(exist_ok=True)
    figures.prediction_sample(keys, targets, logits, names, folder / "predictions_sample.json")
    files = [folder / "predictions_sample.json", *figures.evaluation(content, targets, logits, folder)]
    job.tracker.artifact(job.run_dir / "results.json")
    for file in files:
        job.tracker.artifact(file, "evaluation")


def finetuning_name(recipe: FinetuneRecipe) -> str:
    """`run.name`, or BatchSize-Pretrain-Finetune as the paper writes it; pretrained is what `model.init` names."""
    if recipe.run.name:
        return recipe.run.name
    source = run_of(recipe.model.init)
    if not recipe.model.init:
        before = f"{recipe.train.batch_size}-Scratch"
    elif not (source / "config.yaml").is_file():
        before = source.stem
    elif isinstance(known := read_run(source), PretrainRecipe):
        before = f"{known.train.batch_size}-{PRETRAIN[known.pretrain.method].label}"
    else:
        before = source.name
    return f"{before}-{FINETUNE[recipe.finetune.method].label}"
