"""What goes into a batch and where it lies in a region of the ring.

In: positions and rows. Out: jobs for the readers, raw arrays, targets. Vectorised: no Python loop over clips.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from pipeline.data.augment import MixupPlan
from pipeline.data.index import Found, ShardIndex
from pipeline.data.manifest import Manifest
from pipeline.data.npy import HEADER
from pipeline.data.reader import FBANK, RAW_FBANK, RAW_WAVEFORM, WAVEFORM, Needs
from pipeline.data.ring import Ring

ALIGNED = 64  # bytes


@dataclass(frozen=True)
class Plan:
    """One rank's clips of one batch.

    Attributes:
        step: Number of the batch.
        position: int64 [B], in the sample stream.
        rows: int64 [B], of the index.
        valid: bool [B]; see `Batch`.
        mixup: Who is mixed, and how; None: nobody.
        partners: int64 [B], rows of the other clips; None: no mixup.
    """

    step: int
    position: np.ndarray
    rows: np.ndarray
    valid: np.ndarray
    mixup: MixupPlan | None = None
    partners: np.ndarray | None = None


@dataclass(frozen=True)
class Walk:
    """A run through batches.

    Attributes:
        plan: Batch number -> plan.
        rows_of: Positions [m] -> rows [m]: the order.
        others_of: The same of mixup's other clips.
        shards_ahead: Batch number -> shards that this rank reads for it.
        batch_size: G.
        stride: Between the positions of a clip and of its stand-ins.
        clips: Of an epoch.
        first: First batch.
        stop: Behind the last one; 0: no end.
    """

    plan: Callable[[int], Plan]
    rows_of: Callable[[np.ndarray], np.ndarray]
    others_of: Callable[[np.ndarray], np.ndarray]
    shards_ahead: Callable[[int], np.ndarray]
    batch_size: int
    stride: int
    clips: int
    first: int
    stop: int = 0


class Layout:
    """Where a batch's clips lie in a region: waveforms, mixup's other waveforms, fbanks.

    For a CPU they are float32 [B, L] and normalised float32 [B, T, M], ready for the model. For a GPU they are
    rows of the stored numbers, int16 and float16, half the bytes, each behind its .npy header, which is read along.

    Args:
        manifest: Formats.
        members: What is read.
        mixup: Other waveforms are read too.
        clips: B.
        frames: T, of float32 fbanks.
        raw: Rows of stored numbers.
    """

    PARTS = ("waveform", "partner", "fbank")

    def __init__(self, manifest: Manifest, members: Needs, mixup: bool, clips: int, frames: int, raw: bool) -> None:
        self.clips, self.raw = clips, raw
        used = {"waveform": members.waveform, "partner": mixup, "fbank": members.fbank}
        self.used = tuple(name for name in self.PARTS if used[name])
        audio, fbank = manifest.audio, manifest.fbank
        self._payload = dict.fromkeys(self.PARTS, audio.array.size) | {"fbank": fbank.array.size}
        self._shape: dict[str, tuple[int, ...]] = dict.fromkeys(self.PARTS, (audio.samples,))
        self._shape["fbank"] = frames, fbank.mel_bins
        if raw:
            self._shape = {name: (_aligned(HEADER + size) // 2,) for name, size in self._payload.items()}
        self._row = {name: (2 if raw else 4) * math.prod(shape) for name, shape in self._shape.items()}
        self._start: dict[str, int] = {}
        self.size = 0
        for name in self.used:
            self._start[name] = self.size
            self.size += _aligned(self._row[name] * clips)

    def array(self, ring: Ring, region: int, name: str) -> np.ndarray | None:
        """A part of a region; None: it is not read."""
        if name not in self.used:
            return None
        dtype = np.float32 if not self.raw else np.float16 if name == "fbank" else np.int16
        return ring.array(region, self._start[name], (self.clips, *self._shape[name]), dtype)

    def jobs(self, index: ShardIndex, plan: Plan) -> np.ndarray:
        """All reads of a batch, clip by clip: what one clip needs lies close together in its tar."""
        rows, places = index.find(plan.rows), np.arange(self.clips)
        own = [self._jobs(index, name, rows, places) for name in ("waveform", "fbank") if name in self.used]
        jobs = np.stack(own, axis=1).ravel()
        if plan.mixup is None or plan.partners is None:
            return jobs
        mixed = np.flatnonzero(plan.mixup.mixed)
        return np.concatenate([jobs, self._jobs(index, "partner", index.find(plan.partners[mixed]), mixed)])

    def stand_in(self, index: ShardIndex, partner: bool, row: int, place: int) -> np.ndarray:
        """The reads of one clip, as the clip itself or as the other one of its mixture."""
        names = [name for name in self.used if (name == "partner") == partner]
        found = index.find(np.array([row]))
        return np.concatenate([self._jobs(index, name, found, np.array([place])) for name in names])

    def meaning(self, number: int) -> tuple[bool, int, str]:
        """What a job's number stands for: (mixup's other clip, place in the batch, member)."""
        part, place = divmod(number, self.clips)
        name = self.PARTS[part]
        return name == "partner", place, "waveform" if name == "partner" else name

    def _jobs(self, index: ShardIndex, name: str, rows: Found, places: np.ndarray) -> np.ndarray:
        jobs = index.jobs("waveform" if name == "partner" else name, rows)
        jobs["clip"] = self.PARTS.index(name) * self.clips + places
        fbank = name == "fbank"
        jobs["kind"] = (RAW_FBANK if fbank else RAW_WAVEFORM) if self.raw else (FBANK if fbank else WAVEFORM)
        jobs["length"] = self._payload[name]
        jobs["start"] = self._start[name] + places * self._row[name] + HEADER * self.raw
        jobs["room"] = self._payload[name] if self.raw else self._row[name]
        return jobs


def _aligned(size: int) -> int:
    return -(-size // ALIGNED) * ALIGNED


def lengths(index: ShardIndex, mixup: MixupPlan | None, rows: np.ndarray, partners: np.ndarray | None) -> np.ndarray:
    """Samples of audio before the padding, int64 [B], of the clips that were read; of a mixture the longer one's."""
    found = index.lengths(index.find(rows))
    if mixup is not None and partners is not None:
        mixed = np.flatnonzero(mixup.mixed)
        found[mixed] = np.maximum(found[mixed], index.lengths(index.find(partners[mixed])))
    return found


def targets(
    index: ShardIndex, classes: int, mixup: MixupPlan | None, rows: np.ndarray, partners: np.ndarray | None
) -> np.ndarray:
    """Multi-hot targets float32 [B, C] of the clips that were read; soft where they are mixed."""
    out = np.zeros((len(rows), classes), np.float32)
    weight = np.ones(len(rows)) if mixup is None else mixup.weight
    which, labels = index.labels(index.find(rows))
    out[which, labels] = weight[which]
    if mixup is not None and partners is not None:
        mixed = np.flatnonzero(mixup.mixed)
        which, labels = index.labels(index.find(partners[mixed]))
        out[mixed[which], labels] += (1 - weight[mixed[which]]).astype(np.float32)
    return out
