"""train(): resume, step, log, evaluate, save. The one loop of pretraining and finetuning.

In: a `Job`. Out: a trained run directory. The route of a step: launcher main -> `train` ->
`task.forward` (through the DeepSpeed engine) -> the objective.

Cost per step, whatever the number of clips or ranks: the forward and backward passes, DeepSpeed's
collectives, and one small all-reduce at a logged step.
"""

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from pipeline import distributed
from pipeline.config import Recipe
from pipeline.data.loader import Loader
from pipeline.distributed import World
from pipeline.engine import checkpoint
from pipeline.engine.records import Records
from pipeline.engine.schedule import Plateau, learning_rate
from pipeline.engine.setup import Batches, build_engine
from pipeline.errors import UserError
from pipeline.flow import Batch, Losses
from pipeline.tasks import CachedContrast, FinetuneTask, Pooled, PretrainTask
from pipeline.tracking import Tracker

log = logging.getLogger(__name__)

Forward = Callable[[Batch], Losses]


@dataclass(frozen=True)
class Job:
    """Everything a run needs, built by a launcher.

    Attributes:
        recipe: Settings.
        ds: Reconciled DeepSpeed configuration.
        batches: Batch arithmetic.
        task: What DeepSpeed wraps.
        loader: Training clips.
        evaluate: Forward function -> held-out metrics, equal on all ranks; None: nothing is held out.
        metric: The metric that must grow: the plateau rule watches it.
        run_dir: Where the run lives.
        tracker: MLflow.
        identity: What the run may not change on the way, by name: it would be another run.
    """

    recipe: Recipe
    ds: dict[str, Any]
    batches: Batches
    task: PretrainTask | FinetuneTask
    loader: Loader
    evaluate: Callable[[Forward], dict[str, float]] | None
    metric: str
    run_dir: Path
    tracker: Tracker
    identity: dict[str, Any]

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the run."""
        return self.recipe.train.steps or math.ceil(self.recipe.train.epochs * self.loader.clips / self.batches.total)

    def due(self, step: int, clips: float) -> bool:
        """An interval of `clips` training clips ends with step `step` (0-based); 0 never does."""
        seen = step * self.batches.total
        return clips > 0 and (seen + self.batches.total) // clips > seen // clips

    def evaluation_due(self, step: int) -> bool:
        """After step `step` the run is evaluated."""
        config = self.recipe.eval
        intervals = (
            config.every * self.batches.total,
            config.every_clips,
            config.every_epochs * self.loader.clips,
        )
        return step + 1 == self.total_steps or any(self.due(step, interval) for interval in intervals)


@dataclass(slots=True)
class Progress:
    """What a checkpoint must remember besides weights and optimiser; randomness needs no state.

    Attributes:
        step: Finished optimiser steps.
        plateau: State of the learning-rate rule.
        bad_steps: Non-finite steps in a row.
        averaged: Epochs in the averaged weights.
        train_metric: Sum and count of the training metric since the last evaluation.
    """

    step: int = 0
    plateau: Plateau = field(default_factory=Plateau)
    bad_steps: int = 0
    averaged: int = 0
    train_metric: tuple[float, int] = (0.0, 0)


def train(job: Job, world: World) -> None:
    """Runs the job from its newest checkpoint to its last step.

    Raises:
        UserError: the checkpoint is another world size's, or too many steps in a row were not finite.
    """
    engine = build_engine(job.task, job.recipe, job.ds)
    progress, average = _resume(engine, job, world)
    records = Records(job.run_dir, job.tracker, world, progress.step)
    total, epoch_steps = job.total_steps, job.loader.clips / job.batches.total
    log.info("%d steps of %d clips, from step %d", total, job.batches.total, progress.step)
    for batch in records.timed(_until(job.loader.train_batches(progress.step), total - progress.step)):
        step = progress.step
        rate = learning_rate(job.recipe.optim, step, total, step / epoch_steps, progress.plateau)
        for group in engine.optimizer.param_groups:
            group["lr"] = rate
        named = accumulate(engine, job.task, batch, job.batches)
        grad_norm = _update(engine, job, batch, progress)
        progress.step += 1
        records.count(job.batches.total)
        if progress.step % job.recipe.log.every == 0 or progress.step == total:
            values = distributed.mean(named, world.device)
            _watch(progress, values, job.metric)
            records.write(progress.step, total, values | {"lr": rate, "grad_norm": grad_norm})
        evaluated = job.evaluation_due(step)
        if evaluated:
            _evaluate(engine, job, progress, records)
        _average(engine, job, progress, average, world)
        if (job.due(step, job.recipe.checkpoint.every * job.batches.total)) or (
            (not job.recipe.checkpoint.every and evaluated) or progress.step == total
        ):
            _save(engine, job, progress, average, world)


def accumulate(
    engine: Any, task: PretrainTask | FinetuneTask, batch: Batch, batches: Batches
) -> dict[str, torch.Tensor]:
    """Forward and backward of one step: leaves the global batch's gradient in the engine.

    Args:
        engine: DeepSpeed engine around `task`; its optimiser step is still to be taken.
        task: For the contrast over all micro-batches.
        batch: This rank's share of the global batch.
        batches: Batch arithmetic.

    Returns:
        This rank's mean of each named loss; the mean over ranks is the global batch's.
    """
    parts = batch.split(batches.micro)
    cached = _cache_contrast(engine, task, parts)
    sums: dict[str, torch.Tensor] = {}
    for number, (part, contrast) in enumerate(zip(parts, cached, strict=True)):
        if number:
            engine.step()  # closes the micro-batch before this one; no update before the last
        losses: Losses = engine(part) if contrast is None else engine(part, contrast)
        engine.backward(losses.total)
        for name, value in losses.named.items():
            sums[name] = sums.get(name, torch.zeros_like(value)) + value / len(parts)
    return sums


def _update(engine: Any, job: Job, batch: Batch, progress: Progress) -> float:
    """The optimiser step; returns the gradient norm. A gradient that is not finite changes nothing."""
    skipped = engine.skipped_steps
    grad_norm, finite = _whole_gradient_norm(engine)
    if finite:
        engine.step()
    else:  # stage 0 in fp32 has no overflow check: the update would poison the weights
        engine.zero_grad()
        engine.micro_steps += 1
    if grad_norm is None:
        grad_norm = float(engine.get_global_grad_norm() or 0.0)
    bad = not finite or engine.skipped_steps > skipped
    progress.bad_steps = progress.bad_steps + 1 if bad else 0
    if bad:
        _report_bad_step(job, batch, progress)
    return grad_norm


def _cache_contrast(
    engine: Any, task: PretrainTask | FinetuneTask, parts: list[Batch]
) -> list[CachedContrast] | list[None]:
    """GradCache (Gao et al. 2021): the contrast spans all micro-batches of the step.

    A first pass without gradient pools every micro-batch; the loss over the global batch gives the
    gradient at the pooled vectors; the second pass carries it on. Loss and gradients equal those
    of one large batch, for the memory of a micro-batch.
    """
    if len(parts) == 1 or isinstance(task, FinetuneTask) or not task.contrasts_batch:
        return [None] * len(parts)
    with torch.no_grad():
        pooled: list[Pooled] = [engine(part, pooled_only=True) for part in parts]
    whole = Pooled(*(torch.cat(vectors).requires_grad_() for vectors in zip(*pooled, strict=True)))
    loss, accuracy = task.contrast(whole)
    wav, spec = torch.autograd.grad(loss, list(whole))
    count = len(parts)  # the engine divides each micro-batch's gradient by it
    return [
        CachedContrast(loss.detach(), accuracy, wav_part * count, spec_part * count)
        for wav_part, spec_part in zip(wav.chunk(count), spec.chunk(count), strict=True)
    ]


def _whole_gradient_norm(engine: Any) -> tuple[float | None, bool]:
    """(norm, finite) of the averaged gradients at ZeRO 0 in fp32; elsewhere DeepSpeed has both."""
    if engine.zero_optimization_stage() or engine.bfloat16_enabled() or engine.fp16_enabled():
        return None, True
    gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
    norm = float(torch.nn.utils.get_total_norm(gradients))
    return norm, math.isfinite(norm)


def _report_bad_step(job: Job, batch: Batch, progress: Progress) -> None:
    """Counts a non-finite step; all ranks agree on it, so the gather is safe."""
    rows = distributed.gather(batch.row).tolist()
    keys = job.loader.keys(rows)
    log.warning("step %d: gradient not finite, skipped (%d in a row)", progress.step, progress.bad_steps)
    if progress.bad_steps >= job.recipe.train.max_bad_steps:
        file = job.run_dir / "bad_clips.txt"
        if distributed.rank() == 0:
            file.write_text("\n".join(keys) + "\n", encoding="utf-8")
        raise UserError(
            f"train.max_bad_steps = {job.recipe.train.max_bad_steps}: that many steps in a row were not finite, up to "
            f"step {progress.step}; the last one's clips are in {file}; lower optim.lr or set optim.clip"
        )


def _watch(progress: Progress, values: dict[str, float], metric: str) -> None:
    """Keeps the training twin of the watched metric, for runs with nothing held out."""
    value = values.get(metric.removeprefix("eval_"))
    if value is not None:
        progress.train_metric = (progress.train_metric[0] + value, progress.train_metric[1] + 1)


def _evaluate(engine: Any, job: Job, progress: Progress, records: Records) -> None:
    if job.evaluate is None:
        total, count = progress.train_metric
        metrics = {job.metric.replace("eval_", "mean_train_"): total / count} if count else {}
    else:
        engine.eval()
        metrics = job.evaluate(engine)
        engine.train()
    records.write_evaluation(progress.step, metrics)
    watched = metrics.get(job.metric, next(iter(metrics.values()), math.nan))
    if not math.isnan(watched) and progress.step > job.recipe.optim.warmup:
        progress.plateau.observe(watched, job.recipe.optim.patience)
    progress.train_metric = (0.0, 0)


def _average(engine: Any, job: Job, progress: Progress, average: dict[str, torch.Tensor], world: World) -> None:
    """At the end of each epoch in `checkpoint.average`: running mean of the weights, on rank 0."""
    if not job.due(progress.step - 1, job.loader.clips):
        return
    epoch = progress.step * job.batches.total // job.loader.clips
    first, last = job.recipe.checkpoint.average
    if not 1 <= first <= epoch <= last:
        return
    progress.averaged += 1
    for name, weight in checkpoint.full_weights(engine, keep=world.is_main).items():
        mean = average.setdefault(name, torch.zeros_like(weight))
        mean += (weight - mean) / progress.averaged


def _save(engine: Any, job: Job, progress: Progress, average: dict[str, torch.Tensor], world: World) -> None:
    state = asdict(progress) | {"mlflow_run_id": job.tracker.run_id, "identity": job.identity}
    folder = checkpoint.save(engine, job.run_dir, state, average, world, job.recipe.checkpoint.keep)
    log.info("step %d: saved %s", progress.step, folder)


def _resume(engine: Any, job: Job, world: World) -> tuple[Progress, dict[str, torch.Tensor]]:
    state = distributed.broadcast(checkpoint.read_state(job.run_dir) if world.is_main else None)
    if state is None:
        return Progress(), {}
    checkpoint.restore(engine, job.run_dir, state, world)
    plateau = Plateau(**state["plateau"])
    progress = Progress(
        state["step"], plateau, state["bad_steps"], state["averaged"], tuple(state["train_metric"])
    )
    average = checkpoint.read_average(job.run_dir) if world.is_main else {}
    return progress, average


def _until(batches: Iterator[Batch], count: int) -> Iterator[Batch]:
    for _ in range(count):
        yield next(batches)
