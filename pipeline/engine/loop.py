"""train(): resume, step, log, evaluate, save. The one loop of pretraining and finetuning.

In: a `Job`. Out: a trained run directory. The route of a step: `train` -> `step.accumulate` -> `task.forward`
(through the DeepSpeed engine) -> the objective.

Cost per step, whatever the number of clips or ranks: the forward and backward passes, DeepSpeed's
collectives, one exchange of three numbers beside them (`Agreement`), and at a logged step one small
all-reduce and, where a comparison of the ranks is due, one small gather.
"""

import logging
import math
import signal
from dataclasses import asdict
from typing import Any

import torch

from pipeline import distributed
from pipeline.config import CheckpointConfig
from pipeline.distributed import Agreement, World
from pipeline.engine import checkpoint
from pipeline.engine.checkpoint import Checkpoints
from pipeline.engine.job import Job, Progress
from pipeline.engine.parts import Mean
from pipeline.engine.room import no_room_to_begin, no_room_to_evaluate, no_room_to_train
from pipeline.engine.setup import build_engine, eval_batch_size
from pipeline.engine.step import accumulate, learning_rate, update
from pipeline.engine.telemetry import Telemetry, clips_per_second_at_peak
from pipeline.faults import stop_signals
from pipeline.flow import Batch
from pipeline.tasks import PretrainTask

log = logging.getLogger(__name__)


class _Interrupted(Exception):  # noqa: N818 - a request, no error
    """All ranks agreed to stop."""


def train(job: Job, world: World) -> None:
    """Runs the job from its newest checkpoint to its last step.

    Raises:
        UserError: a checkpoint cannot be read, the last one not written, too many steps in a row were
            not finite, or the device has no room for the weights and optimiser states, or a micro-batch.
        SystemExit: a signal ended the run after a checkpoint; 128 + its number, as shells have it.
    """
    try:
        run = _Run(job, world)
    except torch.OutOfMemoryError as error:
        raise no_room_to_begin(error, job, world) from error
    progress, engine, telemetry, total = run.progress, run.engine, run.telemetry, job.total_steps
    _say_beginning(job, world, progress.step)
    world.faults.at(progress.step, "data")
    with stop_signals() as run.told, world.faults.watch(job.run_dir, job.recipe.run.timeout), telemetry:
        try:
            if progress.evaluate:  # it was interrupted
                run.evaluate()
                run.save()
            world.faults.at(progress.step, "data")
            batches = telemetry.timed(job.loader.batches(progress.step, total))
            batch = next(batches, None)
            while batch is not None:
                step = progress.step
                world.faults.at(step, "step")
                epoch = step / (job.loader.clips / job.batches.total)
                rate = learning_rate(job.recipe.optim, step, total, epoch, progress.plateau)
                for group in engine.optimizer.param_groups:
                    group["lr"] = rate * group.get("scale", 1.0)
                with telemetry.profiled(step + 1, engine):
                    named = accumulate(engine, job.task, batch, job.batches)
                    # While the device works on that, and before the update waits for it.
                    world.faults.at(step, "data")
                    coming = next(batches, None)
                    world.faults.at(step, "step")
                    grad_norm = update(engine, job, batch, progress, named["loss"])
                progress.step, progress.metric = step + 1, None
                run.watch(named)
                if progress.step % job.recipe.log.every == 0 or progress.step == total:
                    run.log(named, rate, grad_norm)
                run.average()
                if job.evaluation_due(step):
                    run.evaluate()
                if job.save_due(step):
                    run.save()
                if progress.step < total:
                    run.agree()
                batch = coming
        except _Interrupted as interrupted:
            run.save()
            run.checkpoints.finish()
            name = signal.Signals(run.signum).name
            log.warning("%s: left after step %d; the same command goes on from there", name, progress.step)
            raise SystemExit(128 + run.signum) from interrupted
        except torch.OutOfMemoryError as error:
            if progress.evaluate:
                raise no_room_to_evaluate(error, eval_batch_size(job.recipe, world), world) from error
            raise no_room_to_train(error, job, world) from error
        job.tracker.metrics(run.checkpoints.finish(), progress.step)


class _Run:
    """A job under way: engine and state, from the newest checkpoint where there is one; every method is a collective.

    Args:
        job: Built parts.
        world: Ranks.
    """

    def __init__(self, job: Job, world: World) -> None:
        state = distributed.decide(lambda: checkpoint.read_state(job.run_dir))
        weights = dict(checkpoint.stored(job.run_dir, state, "weights")) if state else {}
        if state:
            job.task.load_state_dict(weights)
        engine = build_engine(job.task, job.recipe, job.ds)
        scaler = getattr(engine.optimizer, "loss_scaler", None)
        if scaler is not None:
            scaler.raise_error_at_min_scale = False  # `train.max_bad_steps` ends the run
        self.job, self.world, self.engine = job, world, engine
        self.progress = Progress()
        self.mean = Mean(engine)
        if state:
            checkpoint.restore(engine, job.run_dir, state, weights, world)
            self.progress = Progress.of(state)
            if world.is_main:  # of all ranks, whatever their number is now; older checkpoints do not say it
                job.loader.bad_clips.replace(state["step"] - 1, state.get("bad_clips", 0))
            self.mean.restore(checkpoint.stored(job.run_dir, state, "average"))
        at_peak = clips_per_second_at_peak(job.recipe, job.shapes, job.ds, world)
        self.telemetry = Telemetry(job.run_dir, job.tracker, world, job.recipe.log, job.task.model, job.batches.total,
                                   self.progress.step, at_peak)  # fmt: skip
        self.checkpoints = Checkpoints(job.run_dir, job.recipe.checkpoint, world, job.kept_steps)
        self.twin = torch.tensor(self.progress.train_metric, dtype=torch.float64, device=world.device)
        self.told: list[int] = []  # signals that came to this rank
        self.signum = 0  # agreed on
        self._agreement = Agreement()

    def watch(self, named: dict[str, torch.Tensor]) -> None:
        """Where nothing is held out: adds the training twin of the metric to its mean, of each step, logged or not."""
        if self.job.evaluate is not None:
            return
        twin = named.get(self.job.metric.removeprefix("eval_"))
        if twin is None:
            if self.job.recipe.optim.schedule == "plateau" and self.progress.step == 1:
                log.warning("optim.schedule = plateau: nothing is held out, and %s is not known in training: the rate "
                            "stays as it is; hold clips out, or take another schedule", self.job.metric)  # fmt: skip
            return
        value = distributed.mean_on_device(twin)
        finite = value.isfinite()
        self.twin += torch.stack([torch.where(finite, value, 0.0), finite.double()])

    def log(self, named: dict[str, torch.Tensor], rate: float, grad_norm: torch.Tensor | float) -> None:
        """Logs the step that was taken, with what all ranks replaced.

        Raises:
            UserError: more bad clips than `data.max_bad` or `data.max_bad_share` allow.
        """
        job, progress = self.job, self.progress
        values = distributed.mean(named | {"bad_clips": self._replaced()}, self.world.device)
        values |= {"lr": rate, "grad_norm": float(grad_norm), "skipped_steps": progress.skipped}
        if scale := checkpoint.loss_scale(self.engine):
            values["loss_scale"] = scale["cur_scale"]
        self.telemetry.write_step(progress.step, job.total_steps, values)
        job.loader.bad_clips.check(round(values["bad_clips"]))

    def _replaced(self) -> float:
        """Of this rank; its mean over ranks is the number of clips that all have replaced in the epoch so far."""
        return float(self.job.loader.replaced(self.progress.step - 1) * self.world.size)

    def agree(self) -> None:
        """Tells the other ranks of a signal and of finished writing, and learns of theirs at the step before.

        Raises:
            _Interrupted: a rank got a signal; on all ranks at the same step.
        """
        agreed = self._agreement.exchange(next(iter(self.told), 0), *self.checkpoints.flags)
        if agreed is not None:
            signum, *written = agreed
            self.signum = self.signum or signum
            self.job.tracker.metrics(self.checkpoints.settle(written), self.progress.step)
        if self.signum:
            log.warning("%s: saving, then leaving", signal.Signals(self.signum).name)
            raise _Interrupted

    def evaluate(self) -> None:
        """Held-out metrics; a signal interrupts it between two batches, and a resumed run makes up for it.

        Raises:
            _Interrupted: see `agree`.
        """
        job, progress, engine = self.job, self.progress, self.engine
        progress.evaluate = True

        def forward(batch: Batch, **options: Any) -> Any:
            self.agree()
            self.world.faults.at(progress.step, "evaluation")
            return engine(batch, **options)

        if job.evaluate is None:
            total, count = self.twin.tolist()
            self.twin.zero_()
            metrics = {job.metric.replace("eval_", "mean_train_"): total / count} if count else {}
        else:
            engine.eval()
            metrics = job.evaluate(forward, progress.step)
            engine.train()
        self.telemetry.write_evaluation(progress.step, metrics)
        watched = metrics.get(job.metric, next(iter(metrics.values()), math.nan))
        if not math.isnan(watched):
            progress.metric = watched
            if progress.step > job.recipe.optim.warmup:
                progress.plateau.observe(watched, job.recipe.optim.patience, job.recipe.optim.threshold)
        progress.evaluate = False

    def average(self) -> None:
        """Takes the weights into their mean, where it is due: with `checkpoint.ema`, or at the end of an epoch."""
        job, progress, config = self.job, self.progress, self.job.recipe.checkpoint
        if config.ema:
            if share := ema_share(config, progress.step, job.total_steps):
                self.mean.take(lambda mean, weights: mean.lerp_(weights, share))
            return
        epoch = progress.step * job.batches.total // job.loader.clips
        first, last = config.average
        if not job.due(progress.step - 1, job.loader.clips) or not 1 <= first <= epoch <= last:
            return
        progress.averaged += 1
        self.mean.take(lambda mean, weights: mean.add_((weights - mean) / progress.averaged))

    def save(self) -> None:
        """Begins to write a checkpoint."""
        progress = self.progress
        total, count = self.twin.tolist()
        progress.train_metric = total, round(count)
        self.world.faults.at(progress.step, "checkpoint")
        state = asdict(progress) | {
            "position": progress.step * self.job.batches.total,
            "bad_clips": round(distributed.mean({"replaced": self._replaced()}, self.world.device)["replaced"]),
            "mlflow_run_id": self.job.tracker.run_id,
        }
        posted = self._agreement.take()  # before this save: what it says of writing is about another checkpoint
        self.signum = self.signum or (posted[0] if posted else 0)
        self.job.tracker.metrics(self.checkpoints.save(self.engine, state, self.mean.parts), progress.step)


def ema_share(config: CheckpointConfig, step: int, total: int) -> float:
    """Share of the weights after `step` of `total` in their exponential mean; 0: they are not sampled there.

    Sampled every `ema_every` steps, and at the end. The decay d = ema^steps rises with the number n of samples before
    as min(d, (1 + n) / (10 + n)), so that a short run's mean is not that of its first weights.
    """
    if step % config.ema_every and step != total:
        return 0.0
    decay = config.ema ** (step % config.ema_every or config.ema_every)
    before = (step - 1) // config.ema_every
    return 1 - min(decay, (1 + before) / (10 + before))


def _say_beginning(job: Job, world: World, step: int) -> None:
    """What begins, and settings that make little sense in so short a run."""
    device = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "CPU"
    total, warmup = job.total_steps, job.recipe.optim.warmup
    if step == total:
        log.info("%s is done: step %d of %d; a larger train.steps or train.epochs goes on", job.run_dir, step, total)
        return
    log.info("%d steps of %d clips, from step %d, on %d x %s", total, job.batches.total, step, world.size, device)
    if warmup > total / 5:
        log.warning("optim.warmup = %d steps, of a run of %d: %s", warmup, total,
                    "the learning rate never reaches optim.lr" if warmup >= total
                    else "more than a fifth of it is spent below optim.lr")  # fmt: skip
    if job.recipe.optim.schedule == "step" and not job.recipe.optim.milestones:
        log.warning("optim.schedule = step, but optim.milestones is empty: the rate stays as it is; give the epochs "
                    "after which it is cut")  # fmt: skip
    micros = job.batches.accumulation
    if job.ds["zero_optimization"]["stage"] == 2 and micros > 1 and world.size > 1:
        log.warning("zero_optimization.stage = 2 with %d micro-batches a step: gradients are summed over ranks %d "
                    'times a step; stage 1, or "auto", does so once, for up to %.1f GB more on a GPU', micros, micros,
                    4e-9 * sum(weight.numel() for weight in job.task.parameters()) * (1 - 1 / world.size))  # fmt: skip
    if isinstance(job.task, PretrainTask) and job.task.teacher:
        decay = job.task.config.teacher_decay[0]
        if 1 / (1 - decay) > total:
            log.warning("pretrain.teacher_decay = %g averages about %.0f steps, more than the %d of this run: the "
                        "teacher stays close to its first weights", decay, 1 / (1 - decay), total)  # fmt: skip
    ema = job.recipe.checkpoint.ema
    if ema and 1 / (1 - ema) > total:
        log.warning("checkpoint.ema = %g averages about %.0f steps, more than the %d of this run: the average covers "
                    "about its last tenth", ema, 1 / (1 - ema), total)  # fmt: skip
