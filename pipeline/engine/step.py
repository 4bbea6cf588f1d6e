"""One optimiser step: its learning rate, forward and backward passes, and the update.

In: an engine, a batch, the settings. Out: the next weights, named losses, the gradient norm. A gradient that is not
finite changes nothing; too many of them in a row end the run.
"""

import itertools
import logging
import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from pipeline import distributed
from pipeline.config import OptimConfig, PretrainConfig
from pipeline.engine.checkpoint import loss_scale
from pipeline.engine.job import Job, Plateau, Progress
from pipeline.engine.setup import Batches
from pipeline.errors import UserError
from pipeline.files import write_text
from pipeline.flow import Batch, Losses
from pipeline.tasks import CachedContrast, FinetuneTask, Pooled, PretrainTask

log = logging.getLogger(__name__)


def learning_rate(optim: OptimConfig, step: int, total_steps: int, epoch: float, plateau: Plateau) -> float:
    """Rate of the optimiser step number `step` (0-based).

    Args:
        optim: Settings.
        step: 0 .. total_steps - 1.
        total_steps: Of the run.
        epoch: Finished epochs at this step, fractional.
        plateau: Its cuts so far.
    """
    if step < optim.warmup:
        return optim.lr * (step + 1) / optim.warmup
    if optim.schedule == "plateau":
        return optim.lr * optim.factor**plateau.cuts
    if optim.schedule == "step":
        return optim.lr * optim.factor ** sum(epoch >= milestone for milestone in optim.milestones)
    if optim.schedule == "cosine":
        progress = (step - optim.warmup) / max(1, total_steps - optim.warmup)
        return optim.lr * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
    return optim.lr


def teacher_decay(config: PretrainConfig, step: int, total_steps: int) -> float:
    """Decay of the teacher's mean after the optimiser step number `step` (0-based): linear, then constant.

    Args:
        config: Settings.
        step: 0 .. total_steps - 1.
        total_steps: Of the run.
    """
    first, last = config.teacher_decay
    return first + (last - first) * min(1.0, step / (config.teacher_steps or total_steps))


def update_teacher(task: PretrainTask, decay: float) -> None:
    """Moves the teacher, if there is one, towards the weights that the student has now: t <- d t + (1 - d) s.

    Block by block, so that ZeRO 3 never has more than one whole: one gather of the weights a step, beside the two of
    each micro-batch. A collective there, and nowhere else. In float32, of weights as forward passes see them: those of
    bf16 are rounded, which a mean over thousands of steps averages out.

    Args:
        task: After a forward pass and the optimiser's step.
        decay: d.
    """
    teacher = task.teacher
    if teacher is None:
        return
    student = dict(task.model.named_parameters())
    for _, group in itertools.groupby(teacher.weights, lambda name: name.split(".")[:3]):
        names = list(group)
        with _whole([student[name] for name in names]), torch.no_grad():
            for name in names:
                mean = teacher.weights[name]
                mean.lerp_(student[name].to(mean.dtype), 1 - decay)
                teacher.put(name)


def _whole(parameters: list[nn.Parameter]) -> AbstractContextManager[None]:
    """Parameters that ZeRO 3 has divided are whole inside; small ones it never divides between two steps."""
    divided = [parameter for parameter in parameters if not getattr(parameter, "ds_persist", True)]
    if not divided:
        return nullcontext()
    from deepspeed import zero  # slow to import, and only trainers need it

    found: AbstractContextManager[None] = zero.GatheredParameters(divided)
    return found


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
    loss, accuracy = task.contrast(*whole)
    query, key = torch.autograd.grad(loss, list(whole))
    count = len(parts)  # the engine divides each micro-batch's gradient by it
    return [
        CachedContrast(loss.detach(), accuracy, query_part * count, key_part * count)
        for query_part, key_part in zip(query.chunk(count), key.chunk(count), strict=True)
    ]


def update(engine: Any, job: Job, batch: Batch, progress: Progress, loss: torch.Tensor) -> torch.Tensor | float:
    """The optimiser step; returns the gradient norm. A gradient that is not finite changes nothing.

    The norm stays on the device. The host waits for it where DeepSpeed asks whether the gradient is finite, at most
    twice a step, and nowhere else.

    Under fp16 a gradient that overflows while the loss is finite lowers the loss scale: a skipped step, no bad one,
    until the scale cannot fall any further.

    Raises:
        UserError: too many bad steps in a row; on all ranks.
    """
    skipped, scale = engine.skipped_steps, loss_scale(engine)
    norm: torch.Tensor | float | None = None
    finite = True
    if not (engine.zero_optimization_stage() or engine.bfloat16_enabled() or engine.fp16_enabled()):
        norm = torch.nn.utils.get_total_norm([p.grad for p in engine.module.parameters() if p.grad is not None])
        finite = bool(norm.isfinite())  # stage 0 in fp32 has no overflow check: the update would poison the weights
    if finite:
        engine.step()
    else:
        engine.zero_grad()
        engine.micro_steps += 1
    if norm is None:
        found = engine.get_global_grad_norm()
        norm = 0.0 if found is None else found
    if finite and engine.skipped_steps == skipped:
        progress.bad_steps = 0
        if isinstance(job.task, PretrainTask):
            config: PretrainConfig = job.task.config
            update_teacher(job.task, teacher_decay(config, progress.step, job.total_steps))
        return norm
    progress.skipped += 1  # all ranks agree on it, so collectives are safe here
    now = loss_scale(engine)
    falls = any(now[key] != scale[key] for key in ("cur_scale", "cur_hysteresis") if key in now)
    if falls and not distributed.any_rank(not math.isfinite(float(loss)), batch.row.device):
        log.info("step %d: fp16 gradient too large for loss scale %g, skipped; the scale is now %g",
                 progress.step, scale["cur_scale"], now["cur_scale"])  # fmt: skip
        return norm
    progress.bad_steps += 1
    keys = job.loader.keys(distributed.gather(batch.row).tolist())
    log.warning("step %d: gradient not finite, skipped (%d in a row)", progress.step, progress.bad_steps)
    if progress.bad_steps >= job.recipe.train.max_bad_steps:
        file = job.run_dir / "bad_clips.txt"
        if distributed.rank() == 0:
            write_text(file, "\n".join(keys) + "\n")
        half = job.ds["fp16"]["enabled"]
        remedy = "use bf16, whose range is float32's (--deepspeed_config bf16.json), or " if half else ""
        raise UserError(
            f"train.max_bad_steps = {job.recipe.train.max_bad_steps}: that many steps in a row were not finite, up to "
            f"step {progress.step}; the last one's clips are in {file}; {remedy}lower optim.lr or set optim.clip"
        )
    return norm
