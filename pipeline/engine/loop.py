"""train(): resume, step, log, evaluate, save. The one loop of pretraining and finetuning.

In: a `Job`. Out: a trained run directory. The route of a step: launcher main -> `train` ->
`task.forward` (through the DeepSpeed engine) -> the objective.

Cost per step, whatever the number of clips or ranks: the forward and backward passes, DeepSpeed's
collectives, one exchange of three numbers beside them (`Agreement`), and at a logged step one small
all-reduce and, where a report of stragglers is due, one small gather.
"""

import logging
import math
import signal
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from pipeline import distributed
from pipeline.data.spec import DataSpec
from pipeline.distributed import Agreement, World
from pipeline.engine import checkpoint
from pipeline.engine.checkpoint import Checkpoints
from pipeline.engine.job import Job, Progress
from pipeline.engine.plan import Shape
from pipeline.engine.schedule import learning_rate
from pipeline.engine.setup import Batches, build_engine
from pipeline.engine.telemetry import Telemetry, clips_per_second_at_peak
from pipeline.errors import UserError
from pipeline.faults import stop_signals
from pipeline.flow import Batch, Losses
from pipeline.tasks import CachedContrast, FinetuneTask, Pooled, PretrainTask

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Run:
    """A job under way."""

    job: Job
    world: World
    engine: Any
    progress: Progress
    average: dict[str, torch.Tensor]  # on rank 0
    telemetry: Telemetry
    checkpoints: Checkpoints
    told: list[int]  # signals that came to this rank
    agreement: Agreement = field(default_factory=Agreement)
    signum: int = 0  # agreed on


class _Interrupted(Exception):  # noqa: N818 - a request, no error
    """All ranks agreed to stop."""


def train(job: Job, world: World) -> None:
    """Runs the job from its newest checkpoint to its last step.

    Raises:
        UserError: a checkpoint cannot be read, the last one not written, or too many steps in a row were
            not finite.
        SystemExit: a signal ended the run after a checkpoint; 128 + its number, as shells have it.
    """
    run = _start(job, world)
    world.faults.at(run.progress.step, "data")
    with stop_signals() as run.told, world.faults.watch(job.run_dir, job.recipe.run.timeout), run.telemetry:
        try:
            _steps(run)
        except _Interrupted as interrupted:
            _save(run)
            run.checkpoints.finish()
            log.warning("%s: left after step %d; the same command goes on from there",
                        signal.Signals(run.signum).name, run.progress.step)  # fmt: skip
            raise SystemExit(128 + run.signum) from interrupted
        run.telemetry.write(run.progress.step, run.checkpoints.finish())


def _start(job: Job, world: World) -> _Run:
    """Engine and state, from the newest checkpoint where there is one; a collective."""
    state = distributed.decide(lambda: checkpoint.read_state(job.run_dir))
    weights = dict(checkpoint.stored(job.run_dir, state, "weights")) if state else {}
    if state:
        job.task.load_state_dict(weights)
    engine = build_engine(job.task, job.recipe, job.ds)
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    if scaler is not None:
        scaler.raise_error_at_min_scale = False  # `train.max_bad_steps` ends the run
    progress, average = Progress(), {}
    if state:
        checkpoint.restore(engine, job.run_dir, state, weights, world)
        progress = Progress.of(state)
        average = dict(checkpoint.stored(job.run_dir, state, "average")) if world.is_main else {}
    data = DataSpec.of(job.loader.manifest, job.recipe.data)
    shape = Shape(data.samples, data.mel_bins, data.frames, len(data.labels))
    at_peak = clips_per_second_at_peak(job.recipe, shape, job.ds, world)
    telemetry = Telemetry(job.run_dir, job.tracker, world, job.recipe.log, job.task.model, job.batches.total,
                          progress.step, at_peak)  # fmt: skip
    checkpoints = Checkpoints(job.run_dir, job.recipe.checkpoint, world, job.kept_steps)
    return _Run(job, world, engine, progress, average, telemetry, checkpoints, [])


def _steps(run: _Run) -> None:
    job, progress, telemetry, engine = run.job, run.progress, run.telemetry, run.engine
    total, epoch_steps = job.total_steps, job.loader.clips / job.batches.total
    log.info("%d steps of %d clips, from step %d, on %d x %s", total, job.batches.total, progress.step,
             run.world.size, _device(run.world))  # fmt: skip
    if job.recipe.optim.warmup > total / 5:
        log.warning("optim.warmup = %d steps, of a run of %d: %s", job.recipe.optim.warmup, total,
                    "the learning rate never reaches optim.lr" if job.recipe.optim.warmup >= total
                    else "more than a fifth of it is spent below optim.lr")  # fmt: skip
    ema = job.recipe.checkpoint.ema
    if ema and 1 / (1 - ema) > total:
        log.warning("checkpoint.ema = %g is a mean over some %.0f steps, of a run of %d: its decay does not rise so "
                    "far, and the mean is over about the last tenth of the run", ema, 1 / (1 - ema), total)  # fmt: skip
    if progress.evaluate:
        _evaluate(run)
    run.world.faults.at(progress.step, "data")
    for batch in telemetry.timed(_until(job.loader.train_batches(progress.step), total - progress.step)):
        step = progress.step
        run.world.faults.at(step, "step")
        rate = learning_rate(job.recipe.optim, step, total, step / epoch_steps, progress.plateau)
        for group in engine.optimizer.param_groups:
            group["lr"] = rate * group.get("scale", 1.0)
        with telemetry.profiled(step + 1, engine):
            named = accumulate(engine, job.task, batch, job.batches)
            grad_norm = _update(engine, job, batch, progress, named["loss"])
        progress.step, progress.metric = step + 1, None
        if progress.step % job.recipe.log.every == 0 or progress.step == total:
            bad = float(job.loader.replaced(step) * run.world.size)  # its mean over ranks is their sum
            named["bad_clips"] = torch.tensor(bad, device=run.world.device)
            values = distributed.mean(named, run.world.device)
            _watch(progress, values, job.metric)
            values |= {"lr": rate, "grad_norm": grad_norm, "skipped_steps": progress.skipped}
            telemetry.write_step(progress.step, total, values)
            job.loader.bad_clips.check(round(values["bad_clips"]))
        _average(run)
        if job.evaluation_due(step):
            _evaluate(run)
        if job.save_due(step):
            _save(run)
        if progress.step < total:
            _agree(run)
        run.world.faults.at(progress.step, "data")


def _device(world: World) -> str:
    return torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "CPU"


def _agree(run: _Run) -> None:
    """Tells the other ranks of a signal and of finished writing, and hears theirs of the step before.

    Raises:
        _Interrupted: a rank got a signal; on all ranks at the same step.
    """
    agreed = run.agreement.exchange(next(iter(run.told), 0), *run.checkpoints.flags)
    if agreed is not None:
        signum, *written = agreed
        run.signum = run.signum or signum
        run.telemetry.write(run.progress.step, run.checkpoints.settle(written))
    if run.signum:
        log.warning("%s: saving, then leaving", signal.Signals(run.signum).name)
        raise _Interrupted


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


def _update(engine: Any, job: Job, batch: Batch, progress: Progress, loss: torch.Tensor) -> float:
    """The optimiser step; returns the gradient norm. A gradient that is not finite changes nothing.

    Under fp16 a gradient that overflows while the loss is finite lowers the loss scale: a skipped step, no bad one,
    until the scale cannot fall any further.
    """
    skipped = engine.skipped_steps
    grad_norm, finite = _whole_gradient_norm(engine)
    scale = _scale(engine)
    if finite:
        engine.step()
    else:  # stage 0 in fp32 has no overflow check: the update would poison the weights
        engine.zero_grad()
        engine.micro_steps += 1
    if grad_norm is None:
        grad_norm = float(engine.get_global_grad_norm() or 0.0)
    if finite and engine.skipped_steps == skipped:
        progress.bad_steps = 0
        return grad_norm
    progress.skipped += 1  # all ranks agree on it, so collectives are safe here
    now = _scale(engine)
    if now != scale and not distributed.any_rank(not math.isfinite(float(loss)), batch.row.device):
        log.info("step %d: fp16 gradient too large for loss scale %g, skipped; the scale is now %g",
                 progress.step, scale[0], now[0])  # fmt: skip
        return grad_norm
    progress.bad_steps += 1
    _report_bad_step(job, batch, progress)
    return grad_norm


def _scale(engine: Any) -> tuple[float, ...]:
    """fp16's dynamic loss scale and the overflows that it still tolerates; empty without one."""
    state = checkpoint.loss_scale(engine)
    return (state["cur_scale"], state["cur_hysteresis"]) if state else ()


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
    """Says a non-finite step with its clips; a collective.

    Raises:
        UserError: too many in a row.
    """
    rows = distributed.gather(batch.row).tolist()
    keys = job.loader.keys(rows)
    log.warning("step %d: gradient not finite, skipped (%d in a row)", progress.step, progress.bad_steps)
    if progress.bad_steps >= job.recipe.train.max_bad_steps:
        file = job.run_dir / "bad_clips.txt"
        if distributed.rank() == 0:
            file.write_text("\n".join(keys) + "\n", encoding="utf-8")
        half = job.ds["fp16"]["enabled"]
        remedy = "use bf16, whose range is float32's (--deepspeed_config bf16.json), or " if half else ""
        raise UserError(
            f"train.max_bad_steps = {job.recipe.train.max_bad_steps}: that many steps in a row were not finite, up to "
            f"step {progress.step}; the last one's clips are in {file}; {remedy}lower optim.lr or set optim.clip"
        )


def _watch(progress: Progress, values: dict[str, float], metric: str) -> None:
    """Keeps the training twin of the watched metric, for runs with nothing held out."""
    value = values.get(metric.removeprefix("eval_"))
    if value is not None and math.isfinite(value):
        progress.train_metric = (progress.train_metric[0] + value, progress.train_metric[1] + 1)


class _Interruptible:
    """The engine's forward during an evaluation, which a signal ends between two batches."""

    def __init__(self, run: _Run) -> None:
        self._run = run
        self.global_steps = run.progress.step

    def __call__(self, batch: Batch, **options: Any) -> Any:
        _agree(self._run)
        self._run.world.faults.at(self.global_steps, "evaluation")
        return self._run.engine(batch, **options)


def _evaluate(run: _Run) -> None:
    """Held-out metrics; a signal interrupts it, and a resumed run makes up for it.

    Raises:
        _Interrupted: see `_agree`.
    """
    job, progress, engine = run.job, run.progress, run.engine
    progress.evaluate = True

    if job.evaluate is None:
        total, count = progress.train_metric
        metrics = {job.metric.replace("eval_", "mean_train_"): total / count} if count else {}
    else:
        engine.eval()
        metrics = job.evaluate(_Interruptible(run))
        engine.train()
    run.telemetry.write_evaluation(progress.step, metrics)
    watched = metrics.get(job.metric, next(iter(metrics.values()), math.nan))
    if not math.isnan(watched):
        progress.metric = watched
        if progress.step > job.recipe.optim.warmup:
            progress.plateau.observe(watched, job.recipe.optim.patience, job.recipe.optim.threshold)
    progress.train_metric, progress.evaluate = (0.0, 0), False


def _average(run: _Run) -> None:
    """At the end of each epoch in `checkpoint.average`: running mean of the weights, on rank 0.

    With `checkpoint.ema` an exponential mean instead. Its decay rises with the number n of updates before, as
    min(decay, (1 + n) / (10 + n)), so that a short run's average is not that of its first weights.
    """
    job, progress, config = run.job, run.progress, run.job.recipe.checkpoint
    if config.ema:
        if progress.step % config.ema_every == 0 or progress.step == job.total_steps:
            decay = config.ema ** (progress.step % config.ema_every or config.ema_every)
            before = (progress.step - 1) // config.ema_every
            share = 1 - min(decay, (1 + before) / (10 + before))
            for name, weight in checkpoint.full_weights(run.engine, keep=run.world.is_main).items():
                run.average.setdefault(name, weight).lerp_(weight, share)
        return
    if not job.due(progress.step - 1, job.loader.clips):
        return
    epoch = progress.step * job.batches.total // job.loader.clips
    first, last = job.recipe.checkpoint.average
    if not 1 <= first <= epoch <= last:
        return
    progress.averaged += 1
    for name, weight in checkpoint.full_weights(run.engine, keep=run.world.is_main).items():
        mean = run.average.setdefault(name, torch.zeros_like(weight))
        mean += (weight - mean) / progress.averaged


def _save(run: _Run) -> None:
    job, progress = run.job, run.progress
    run.world.faults.at(progress.step, "checkpoint")
    state = asdict(progress) | {
        "position": progress.step * job.batches.total,
        "mlflow_run_id": job.tracker.run_id,
    }
    posted = run.agreement.take()  # before this save: its word on writing is about another checkpoint
    run.signum = run.signum or (posted[0] if posted else 0)
    run.telemetry.write(progress.step, run.checkpoints.save(run.engine, state, run.average))


def _until(batches: Iterator[Batch], count: int) -> Iterator[Batch]:
    for _ in range(count):
        yield next(batches)
