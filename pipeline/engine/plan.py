"""What a run will need, before any GPU is rented: memory, FLOPs, traffic, time.

In: a recipe and a cluster. Out: numbers, worked out by running the real model once without data (fake
tensors: every operation is recorded, none is computed), so that they follow the code.

Memory of a step on one GPU, Psi parameters, R ranks, b clips a micro-batch (bytes; bf16 | fp32):

    weights                   2 | 4 Psi,  at ZeRO 3 over R; a teacher has 6 | 4 of its own, whole
    master weights, moments   12 | 8 Psi (fp32 needs no second copy at ZeRO 0), at ZeRO 1 to 3 over R
    gradients                 4 Psi,      at ZeRO 2 and 3 over R
    activations               b x the slope of the recorded peak, + its offset
    buckets                   ZeRO 1 to 3, but bf16 at ZeRO 1: what gradients are gathered in before they are summed,
                              and the float32 copy that is; reserved whole, which costs a GPU its memory and a CPU
                              nothing
    context                   0.6 GB of CUDA's, and 1 GB of nccl's where there are several ranks: assumed

Time of a step = max(compute, launch floor) + exposed traffic: see `step_time`.
"""

import itertools
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from pipeline.config import FinetuneRecipe, PretrainRecipe
from pipeline.engine.setup import BUCKET
from pipeline.flow import Batch, Losses
from pipeline.tasks import FinetuneTask, PretrainTask

PERSISTENT = 100_000  # elements: ZeRO 3's default for tensors that it leaves whole
ROOM = 0.95  # share of a GPU's memory that a plan may fill: the rest is fragments
LAUNCH = 3.4e-5  # seconds in which a host comes from one kernel to the next: 33 to 36 us beside one H200
CONTEXT, NCCL = 0.6e9, 1e9  # bytes of a GPU that are not the run's
NO_KERNEL = frozenset({
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "_reshape_alias",
    "detach_", "_local_scalar_dense", "lift_fresh", "set_", "resize_", "promote_types",
})  # fmt: skip
PROBES = (4, 12)  # micro-batches that are recorded; memory and FLOPs are linear between and beyond


@dataclass(frozen=True)
class Shape:
    """Audio format of the clips.

    Attributes:
        samples: L.
        mel_bins: M.
        frames: T.
        classes: C.
    """

    samples: int = 160_000
    mel_bins: int = 128
    frames: int = 1024
    classes: int = 527


@dataclass(frozen=True)
class Cost:
    """Of one step of one model.

    Attributes:
        parameters: Psi.
        width: D.
        flops: Of one clip, forward and backward.
        per_clip: Bytes of activations at the peak, per clip of a micro-batch.
        fixed: Bytes at the peak that do not depend on the micro-batch, without weights and gradients.
        precision: "fp32", "bf16" or "fp16".
        teacher: Weights of a teacher, which each GPU has whole.
        small: Parameters in tensors of at most `PERSISTENT`, which ZeRO 3 divides between steps alone.
        tensors: Parameters are so many tensors.
        kernels: That forward and backward of a micro-batch of one clip start.
        clip_kernels: Of each further clip: loops over clips, which only a CPU's code has.
        pooled_flops: Of one clip, in the pass without gradient that a contrast over several micro-batches takes first
            (GradCache); 0: there is none.
        pooled_kernels, pooled_clip_kernels: Of that pass.
    """

    parameters: int
    width: int
    flops: float
    per_clip: float
    fixed: float
    precision: str
    teacher: int = 0
    small: int = 0
    tensors: int = 0
    kernels: float = 0.0
    clip_kernels: float = 0.0
    pooled_flops: float = 0.0
    pooled_kernels: float = 0.0
    pooled_clip_kernels: float = 0.0

    @property
    def half(self) -> bool:
        """Weights and activations are in half precision."""
        return self.precision != "fp32"

    def has_buckets(self, stage: int) -> bool:
        """Whether gradients are reduced in buckets.

        DeepSpeed's optimiser for bf16 at stage 1 reduces the summed gradients where they are, after the backward pass.
        """
        return stage >= 2 or (stage == 1 and self.precision != "bf16")


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU."""

    weights: float
    optimizer: float
    gradients: float
    activations: float
    buckets: float
    context: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.weights + self.optimizer + self.gradients + self.activations + self.buckets + self.context


def record(recipe: PretrainRecipe | FinetuneRecipe, shape: Shape, precision: str) -> Cost:
    """Runs forward and backward at two micro-batches on fake tensors.

    Args:
        recipe: Settings of the model and its objectives.
        shape: Of the clips.
        precision: "fp32", "bf16" or "fp16".
    """
    half = precision != "fp32"
    peaks, flops, kernels, pooled_flops, pooled_kernels = [], [], [], [0], [0, 0]
    task = _task(recipe, shape).to(torch.bfloat16 if half else torch.float32)
    fake = FakeTensorMode()
    networks: list[torch.nn.Module] = [task]
    if isinstance(task, PretrainTask) and task.teacher is not None:
        task.teacher.match(task.model, torch.device("cpu"))
        networks.append(task.teacher.model)
    for module in itertools.chain(*(network.modules() for network in networks)):
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = torch.nn.Parameter(fake.from_tensor(parameter.detach()))
    with fake:
        for clips in PROBES:
            task.zero_grad()
            live = LiveBytes()
            with FlopCounterMode(display=False, custom_mapping=_attention()) as counter, live:
                losses: Losses = task(_batch(clips, shape))
                losses.total.backward()  # type: ignore[no-untyped-call]
            peaks.append(live.peak)
            flops.append(counter.get_total_flops())
            kernels.append(live.kernels)
        if isinstance(task, PretrainTask) and task.contrasts_batch:
            pooled_flops, pooled_kernels = [], []
            for clips in PROBES:
                live = LiveBytes()
                with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=_attention()) as counter, live:
                    task(_batch(clips, shape), pooled_only=True)
                pooled_flops.append(counter.get_total_flops() / clips)
                pooled_kernels.append(live.kernels)
    parameters, *others = (sum(weight.numel() for weight in network.parameters()) for network in networks)
    span = PROBES[1] - PROBES[0]
    slope = (peaks[1] - peaks[0]) / span
    offset = peaks[0] - PROBES[0] * slope - parameters * (2 if half else 4)  # the gradients
    sizes = [weight.numel() for weight in task.parameters()]
    more, pooled_more = ((counts[1] - counts[0]) / span for counts in (kernels, pooled_kernels))
    return Cost(
        parameters, task.model.width, (flops[1] - flops[0]) / span, slope, max(0.0, offset), precision, sum(others),
        small=sum(size for size in sizes if size <= PERSISTENT),
        tensors=len(sizes),
        kernels=kernels[0] - (PROBES[0] - 1) * more,
        clip_kernels=more,
        pooled_flops=pooled_flops[-1],
        pooled_kernels=pooled_kernels[0] - (PROBES[0] - 1) * pooled_more,
        pooled_clip_kernels=pooled_more,
    )  # fmt: skip


def model_flops(recipe: PretrainRecipe | FinetuneRecipe, shape: Shape) -> float:
    """FLOPs of one clip, forward and backward, for the MFU (Chowdhery et al. 2022); no collective, half a second.

    What is computed twice counts once: activations that are recomputed, GradCache's first pass, the
    scores that fused attention makes again in backward. The contrast's O(G D) a clip is left out.
    """
    plain = recipe.model_copy(update={"model": recipe.model.model_copy(update={"checkpoint_activations": False})})
    with torch.device("meta"):  # shapes without numbers: weights take no memory and no random draws
        task = _task(plain, shape)
        batch = _batch(1, shape)
    if isinstance(task, PretrainTask):
        task.contrast = _pooled_sum
    with FlopCounterMode(display=False) as counter:
        losses: Losses = task(batch)
        losses.total.backward()  # type: ignore[no-untyped-call]
    return float(counter.get_total_flops())


def _pooled_sum(wav: torch.Tensor, spec: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    total = wav.sum() + spec.sum()
    return total, total.detach()


def memory(cost: Cost, stage: int, ranks: int, micro: int) -> Memory:
    """Peak of a step; see the module's table."""
    psi, weight = cost.parameters, 2 if cost.half else 4
    masters = 12 if cost.half else 8 if stage == 0 else 12
    buckets = 0
    if cost.has_buckets(stage):  # two where communication overlaps, and the float32 copy that is reduced
        buckets = 2 * BUCKET * weight + (4 * min(BUCKET, psi) if cost.half else 0)
    return Memory(
        weights=psi * weight / (ranks if stage == 3 else 1) + cost.teacher * (6 if cost.half else 4),
        optimizer=psi * masters / (ranks if stage else 1),
        gradients=psi * 4 / (ranks if stage >= 2 else 1),
        activations=cost.per_clip * micro + cost.fixed,
        buckets=buckets,
        context=CONTEXT + (NCCL if ranks > 1 else 0),
    )


def traffic(
    cost: Cost, stage: int, ranks: int, clips: int, contrast: int, accumulation: int = 1
) -> dict[str, float]:
    """Bytes that each GPU sends in one step, by purpose (ring algorithms).

    ZeRO 0 and 1 reduce gradients once a step, 2 and 3 in every micro-batch; 0 to 2 reduce them whole to all ranks, each
    of which keeps its part, 3 scatters them. ZeRO 3 keeps a micro-batch's weights from forward to backward, unless
    GradCache's other pass upsets the order that it has learned: then each pass gathers them.

    Args:
        cost: Of the model.
        stage: Of ZeRO.
        ranks: R.
        clips: G.
        contrast: Its directions, 0 to 2.
        accumulation: Micro-batches of a step.
    """
    share = (ranks - 1) / ranks
    weight = 2 if cost.half else 4
    times = accumulation if stage >= 2 else 1
    sent = {"gradients": times * (1 if stage == 3 else 2) * share * cost.parameters * 4}
    if stage in (1, 2):
        sent["updated weights"] = share * cost.parameters * weight
    if stage == 3:
        passes = 3 * accumulation if contrast and accumulation > 1 else accumulation
        sent["weights"] = share * (passes * (cost.parameters - cost.small) + cost.small) * weight
        if cost.teacher:
            sent["weights for the teacher"] = share * cost.teacher * weight
    if contrast:
        sent["contrast"] = contrast * share * clips * (2 * cost.width + 1) * 4
    return sent


def launches(func: Any) -> bool:
    """Whether an operation starts a kernel on a GPU: views, allocations and questions do not."""
    space, name = func._schema.name.split("::")
    return bool(space != "prim" and not func.is_view and name not in NO_KERNEL)


def kernels(cost: Cost, stage: int, accumulation: int, micro: int = 1) -> float:
    """Kernels that a step starts.

    Beside the task's own, an engine starts about one a tensor to accumulate its gradient in each micro-batch, one more
    where ZeRO 3 gathers it, and two in the update (norm, copies, Adam on flat buffers), or eight where each gradient of
    half precision is copied into a bucket, or ten where fp16 also looks for an overflow. bf16 at ZeRO 1, without
    buckets, takes two more a tensor to add each micro-batch but the first to the sum in float32.

    Args:
        cost: Of the model.
        stage: Of ZeRO.
        accumulation: Micro-batches of a step.
        micro: Clips of one, where the code loops over them: on a CPU. A GPU starts as many as for one.
    """
    passes = cost.kernels + (micro - 1) * cost.clip_kernels + cost.tensors * (2 if stage == 3 else 1)
    if accumulation > 1:
        passes += cost.pooled_kernels + (micro - 1) * cost.pooled_clip_kernels
    copied = cost.half and stage < 3 and cost.has_buckets(stage)
    each = 2 if not copied else 10 if cost.precision == "fp16" else 8
    if stage == 1 and cost.precision == "bf16":
        each += 2 * (accumulation - 1)
    return accumulation * passes + each * cost.tensors


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step on each GPU.

    Attributes:
        compute: Floating point operations.
        floor: The host starts the kernels one after the other, however small they are.
        exposed: Traffic that nothing hides.
    """

    compute: float
    floor: float
    exposed: float

    @property
    def total(self) -> float:
        """max(compute, floor) + exposed."""
        return max(self.compute, self.floor) + self.exposed


def step_time(
    cost: Cost, stage: int, ranks: int, clips: int, contrast: int, accumulation: int, rate: float, link: float
) -> StepTime:
    """What a step takes.

    The reduction of all buckets but the last runs beside the backward passes (two thirds of the computation), and so
    do the weights of ZeRO 3; what does not fit there is exposed, and with it the last bucket, the gathering of updated
    weights, and the contrast, on whose vectors every rank waits. bf16 at ZeRO 1 has no buckets: it reduces all
    gradients after the backward passes.

    Args:
        cost: Of the model.
        stage: Of ZeRO.
        ranks: R.
        clips: G.
        contrast: Its directions.
        accumulation: Micro-batches of a step.
        rate: Floating point operations a second that a GPU sustains.
        link: Bytes a second that a GPU sends over the slowest link of the ring.
    """
    flops = cost.flops + (cost.pooled_flops if contrast and accumulation > 1 else 0)
    compute = clips / ranks * flops / rate
    sent = traffic(cost, stage, ranks, clips, contrast, accumulation)
    last = sent["gradients"] * (min(1.0, BUCKET / cost.parameters) if cost.has_buckets(stage) else 1.0)
    last /= accumulation if stage >= 2 else 1
    hidden = sent["gradients"] - last + sent.get("weights", 0.0)
    waited = sum(sent.values()) - hidden
    floor = LAUNCH * kernels(cost, stage, accumulation)
    beside = max(compute, floor) * 2 / 3
    return StepTime(compute, floor, (waited + max(0.0, hidden - beside * link)) / link)


def clip_bytes(shape: Shape, waveform: bool, fbank: bool) -> int:
    """Bytes of one clip in the shards: int16 samples, float16 fbank."""
    stored_frames = 1 + max(0, shape.samples - 400) // 160
    return (2 * shape.samples if waveform else 0) + (2 * stored_frames * shape.mel_bins if fbank else 0)


def _attention() -> dict[Any, Any]:
    """FLOPs of the attention that a CPU runs; torch counts only GPUs' kernels."""
    aten = torch.ops.aten

    def forward(query: Any, key: Any, value: Any, *rest: Any, **named: Any) -> int:
        return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]

    def backward(grad: Any, query: Any, key: Any, value: Any, *rest: Any, **named: Any) -> int:
        return int(sdpa_backward_flop_count(grad, query, key, value))  # type: ignore[no-untyped-call]

    return {
        aten._scaled_dot_product_flash_attention_for_cpu: forward,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }


def _task(recipe: PretrainRecipe | FinetuneRecipe, shape: Shape) -> PretrainTask | FinetuneTask:
    if isinstance(recipe, PretrainRecipe):
        return PretrainTask(recipe, shape.mel_bins, shape.frames)
    return FinetuneTask(recipe, shape.mel_bins, shape.frames, shape.classes, single_label=False)


def _batch(clips: int, shape: Shape) -> Batch:
    number = torch.zeros(clips, dtype=torch.int64)
    return Batch(
        position=number,
        row=number,
        valid=number == 0,
        waveform=torch.zeros(clips, shape.samples),
        fbank=torch.zeros(clips, shape.frames, shape.mel_bins),
        targets=torch.zeros(clips, shape.classes),
    )


class LiveBytes(TorchDispatchMode):
    """Follows the bytes of all tensors that exist at once.

    Attributes:
        peak: Most bytes so far.
        kernels: Operations so far that start one.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak, self.kernels = 0, 0
        self._now = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.kernels += launches(func)
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._follow(leaf.untyped_storage())
        return out

    def _follow(self, storage: torch.UntypedStorage) -> None:
        identity, size = storage._cdata, storage.nbytes()
        if identity in self._known:
            return
        self._known.add(identity)
        self._now += size
        self.peak = max(self.peak, self._now)
        weakref.finalize(storage, self._forget, identity, size)

    def _forget(self, identity: int, size: int) -> None:
        self._known.discard(identity)
        self._now -= size
