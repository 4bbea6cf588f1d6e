"""What a run will need, before any GPU is rented: memory, FLOPs, traffic, time.

In: a recipe and a cluster. Out: numbers, worked out by running the real model once without data (fake
tensors: every operation is recorded, none is computed), so that they follow the code.

Memory of a step on one GPU, Psi parameters, R ranks, b clips a micro-batch (bytes; bf16 | fp32):

    weights                   2 | 4 Psi,  at ZeRO 3 over R; a teacher has 6 | 4 of its own, whole
    master weights, moments   12 | 8 Psi (fp32 needs no second copy at ZeRO 0), at ZeRO 1 to 3 over R
    gradients                 4 Psi,      at ZeRO 2 and 3 over R
    activations               b x the slope of the recorded peak, + its offset
    buckets                   ZeRO 1 to 3: what gradients are gathered in before they are summed; reserved whole,
                              which costs a GPU its memory and a CPU nothing
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
        half: Weights and activations are in half precision.
        teacher: Weights of a teacher, which each GPU has whole.
    """

    parameters: int
    width: int
    flops: float
    per_clip: float
    fixed: float
    half: bool
    teacher: int = 0


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU."""

    weights: float
    optimizer: float
    gradients: float
    activations: float
    buckets: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.weights + self.optimizer + self.gradients + self.activations + self.buckets


def record(recipe: PretrainRecipe | FinetuneRecipe, shape: Shape, half: bool) -> Cost:
    """Runs forward and backward at two micro-batches on fake tensors.

    Args:
        recipe: Settings of the model and its objectives.
        shape: Of the clips.
        half: bf16 or fp16, else float32.
    """
    peaks, flops = [], []
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
    parameters, *others = (sum(weight.numel() for weight in network.parameters()) for network in networks)
    span = PROBES[1] - PROBES[0]
    slope = (peaks[1] - peaks[0]) / span
    offset = peaks[0] - PROBES[0] * slope - parameters * (2 if half else 4)  # the gradients
    return Cost(parameters, task.model.width, (flops[1] - flops[0]) / span, slope, max(0.0, offset), half,
                sum(others))  # fmt: skip


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
    buckets = 0 if stage == 0 else 2 * BUCKET * weight  # two of them where communication overlaps
    return Memory(
        weights=psi * weight / (ranks if stage == 3 else 1) + cost.teacher * (6 if cost.half else 4),
        optimizer=psi * masters / (ranks if stage else 1),
        gradients=psi * 4 / (ranks if stage >= 2 else 1),
        activations=cost.per_clip * micro + cost.fixed,
        buckets=buckets,
    )


def traffic(cost: Cost, stage: int, ranks: int, clips: int, contrast: int) -> dict[str, float]:
    """Bytes that each GPU sends in one step, by purpose (ring algorithms); `contrast`: its directions, 0 to 2."""
    share = (ranks - 1) / ranks
    weight = 2 if cost.half else 4
    sent = {"gradients": (2 if stage < 2 else 1) * share * cost.parameters * 4}
    if stage in (1, 2):
        sent["updated weights"] = share * cost.parameters * weight
    if stage == 3:
        sent["weights, forward and backward"] = 2 * share * cost.parameters * weight
        if cost.teacher:
            sent["weights for the teacher"] = share * cost.teacher * weight
    if contrast:
        sent["contrast"] = contrast * share * clips * (2 * cost.width + 1) * 4
    return sent


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
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._now = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
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
