"""build_loader(): order -> reader -> batches on the device.

In: data settings, a part of the data, and this rank's place. Out: `Batch`es, the same clips in the same
global order for any number of ranks and reader threads.

Reader threads fill whole batches ahead of the consumer, straight from disk into (pinned) host arrays;
waveforms and fbanks travel to the device as int16 and float16 and are converted there. Waiting
threads are bounded by `data.prefetch` batches. Reading releases Python's lock, so threads scale like
processes without a copy between them. Nothing grows with the data set but the index columns (about
60 bytes a clip).
"""

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from pipeline.config import AugmentConfig, DataConfig
from pipeline.data.augment import MixupPlan, augment_waveform, changes_waveform, mask_fbank, plan_mixup
from pipeline.data.fbank import fbank as compute_fbank
from pipeline.data.manifest import load_manifest
from pipeline.data.order import Part, train_order
from pipeline.data.reader import Needs, ShardReader
from pipeline.data.spec import DataSpec
from pipeline.errors import UserError
from pipeline.flow import Batch

log = logging.getLogger(__name__)

__all__ = ["Loader", "Needs", "Place", "build_loader"]


@dataclass(frozen=True)
class Place:
    """Where a loader's batches go.

    Attributes:
        rank: This rank.
        world_size: R.
        device: Of the batches.
    """

    rank: int
    world_size: int
    device: torch.device


@dataclass(slots=True)
class _Raw:
    """A batch on the host, as it lies in the shards."""

    position: np.ndarray
    row: np.ndarray
    valid: np.ndarray
    waveform: torch.Tensor | None
    partner: torch.Tensor | None
    weight: np.ndarray
    fbank: torch.Tensor | None
    targets: torch.Tensor


def build_loader(
    data: DataConfig,
    augment: AugmentConfig | None,
    *,
    part: Literal["train", "eval"],
    needs: Needs,
    batch_size: int,
    seed: int,
    place: Place,
    limit: int = 0,
) -> "Loader":
    """Opens shards for one part of a run.

    Args:
        data: Settings.
        augment: Of training clips; None: none.
        part: "train": the training split without the held-out fold. "eval": that fold, or the eval split.
        needs: What the method reads.
        batch_size: Clips of a global batch; divides by the ranks.
        seed: Of order and augmentation.
        place: This rank.
        limit: Only the first clips of the part; 0: all.

    Raises:
        UserError: no such split or fold, no clip in it, shards that cannot be read, a batch that does not
            divide by the ranks, or a stored fbank under augmentation of the waveform.
    """
    if batch_size % place.world_size:
        raise UserError(f"batch of {batch_size} clips does not divide by {place.world_size} ranks; use a multiple")
    if data.fbank == "stored" and needs.fbank and augment is not None and changes_waveform(augment):
        raise UserError(
            "data.fbank = stored: the stored fbank is not that of a waveform changed by augment.mixup, noise or roll; "
            "use data.fbank=auto"
        )
    if part == "eval":  # sees each clip once, whatever training draws
        data = data.model_copy(update={"sampler": "shuffle", "epoch_clips": 0})
    manifest = load_manifest(data.shards)
    spec = DataSpec.of(manifest, data)
    split = data.train_split if part == "train" or data.fold else data.eval_split
    if split not in manifest.splits:
        raise UserError(
            f"data.{part}_split = '{split}' is not in {data.shards}, which has {', '.join(manifest.splits)}; name one"
        )
    reader = ShardReader(data.shards, manifest, data.on_error, data.max_bad)
    chosen = pc.equal(reader.split.cast(pa.string()), split).to_numpy(zero_copy_only=False)
    if data.fold:
        if data.fold not in reader.fold[chosen]:
            raise UserError(f"data.fold = {data.fold}: split '{split}' has folds {sorted(set(reader.fold[chosen]))}")
        chosen &= (reader.fold == data.fold) == (part == "eval")
    rows = np.flatnonzero(chosen)[: limit or None]
    if not len(rows):
        raise UserError(f"{data.shards}: no clip in split '{split}', fold {data.fold}; see its failures.jsonl")
    selection = Part.of(rows, reader.shards[rows], f"{manifest.digest}/{split}/{data.fold}/{part}")
    return Loader(reader, selection, spec, data, augment or AugmentConfig(), needs, _Share(batch_size, seed, place))


@dataclass(frozen=True)
class _Share:
    batch_size: int
    seed: int
    place: Place

    @property
    def clips(self) -> int:
        """Clips of a batch on one rank."""
        return self.batch_size // self.place.world_size


class Loader:
    """Batches of one part of the data for one rank; a context manager. Made by `build_loader`.

    Attributes:
        clips: Of an epoch, over all ranks: n, or `data.epoch_clips`.
        manifest: Of the shards.
    """

    def __init__(
        self,
        reader: ShardReader,
        part: Part,
        spec: DataSpec,
        data: DataConfig,
        augment: AugmentConfig,
        needs: Needs,
        share: _Share,
    ) -> None:
        self.manifest = reader.manifest
        self._reader, self._part, self._spec = reader, part, spec
        self._data, self._augment, self._needs, self._share = data, augment, needs, share
        online = data.fbank == "online" or (data.fbank == "auto" and changes_waveform(augment))
        self._online = online and needs.fbank
        reads_waveform = needs.waveform or self._online or changes_waveform(augment)
        self._read = Needs(reads_waveform, needs.fbank and not self._online)
        self._order = train_order(part, data, share.seed, reader, len(spec.labels))
        self.clips = len(self._order)
        self._pool = ThreadPoolExecutor(data.workers, "reader") if data.workers else None

    @property
    def bad(self) -> dict[str, str]:
        """Bad clips met on this rank: key -> shard and problem."""
        return self._reader.bad

    def keys(self, rows: Sequence[int]) -> list[str]:
        """Sample keys of index rows."""
        return [str(self._reader.keys[row]) for row in rows]

    def train_batches(self, start: int) -> Iterator[Batch]:
        """Own clips of global batches start, start + 1, ..., without end.

        Rank r of R takes positions k G + r, k G + r + R, ... of batch k.
        """

        def load(step: int) -> _Raw:
            place, size = self._share.place, self._share.batch_size
            position = step * size + np.arange(place.rank, size, place.world_size)
            return self._load(position, self._order.rows(position), np.ones(len(position), bool), self._mixup(position))

        def steps() -> Iterator[int]:
            step = start
            while True:
                yield step
                step += 1

        for raw in self._ahead(load, steps()):
            yield self._to_device(raw, augmented=True)

    def eval_batches(self) -> Iterator[Batch]:
        """Every clip exactly once over all ranks, in index order, equally many batches on each rank.

        The last batch is filled up with the part's first clip, marked not valid; so is what stands in for
        a bad clip, which would else be scored twice.
        """
        place, size = self._share.place, self._share.batch_size

        def load(step: int) -> _Raw:
            position = step * size + np.arange(place.rank, size, place.world_size)
            valid = position < len(self._part)
            row = self._part.at(np.where(valid, position, 0))
            raw = self._load(position, row, valid, None)
            raw.valid &= raw.row == row
            return raw

        for raw in self._ahead(load, iter(range(-(-len(self._part) // size)))):
            yield self._to_device(raw, augmented=False)

    def close(self) -> None:
        """Stops the reader threads and closes the shards."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        self._reader.close()

    def __enter__(self) -> "Loader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _ahead(self, load: Callable[[int], _Raw], steps: Iterator[int]) -> Iterator[_Raw]:
        """Loads in order, at most `prefetch` batches before they are asked for."""
        if self._pool is None:
            yield from map(load, steps)
            return
        flight: deque[Future[_Raw]] = deque()
        try:
            while True:
                while len(flight) < self._data.prefetch and (step := next(steps, None)) is not None:
                    flight.append(self._pool.submit(load, step))
                if not flight:
                    return
                yield flight.popleft().result()
        finally:
            for future in flight:
                future.cancel()

    def _mixup(self, position: np.ndarray) -> MixupPlan | None:
        if self._augment.mixup == 0:
            return None
        return plan_mixup(self._augment, self._share.seed, torch.from_numpy(position))

    def _load(self, position: np.ndarray, rows: np.ndarray, valid: np.ndarray, mixup: MixupPlan | None) -> _Raw:
        count, manifest = len(position), self.manifest
        waveform = self._host(self._read.waveform, torch.int16, count, manifest.audio.samples)
        fbank = self._host(self._read.fbank, torch.float16, count, manifest.fbank.frames, manifest.fbank.mel_bins)
        partner = self._host(mixup is not None, torch.int16, count, manifest.audio.samples)
        targets = torch.zeros(count, len(self._spec.labels))
        weight = np.ones(count) if mixup is None else mixup.weight
        actual = rows.copy()
        nothing = np.empty(0)
        for i, row in enumerate(rows.tolist()):
            wave = nothing if waveform is None else waveform[i].numpy()
            actual[i] = self._reader.read(row, self._read, wave, nothing if fbank is None else fbank[i].numpy())
            targets[i, torch.from_numpy(self._reader.labels(actual[i]).astype(np.int64))] = weight[i]
        if mixup is not None and partner is not None:
            others = self._order.partners(position, mixup.draw)
            for i in np.flatnonzero(mixup.mixed).tolist():
                other = self._reader.read(int(others[i]), Needs(True, False), partner[i].numpy(), nothing)
                targets[i, torch.from_numpy(self._reader.labels(other).astype(np.int64))] += 1 - weight[i]
        return _Raw(position, actual, valid, waveform, partner, weight, fbank, targets)

    def _host(self, wanted: bool, dtype: torch.dtype, *shape: int) -> torch.Tensor | None:
        return torch.zeros(shape, dtype=dtype, pin_memory=self._share.place.device.type == "cuda") if wanted else None

    def _to_device(self, raw: _Raw, augmented: bool) -> Batch:
        device, seed = self._share.place.device, self._share.seed
        position, row, valid = (
            torch.from_numpy(array).to(device, non_blocking=True) for array in (raw.position, raw.row, raw.valid)
        )
        waveform, fbank = None, None
        if raw.waveform is not None:
            waveform = raw.waveform.to(device, non_blocking=True).float() / 32768
            if raw.partner is not None:
                weight = torch.from_numpy(raw.weight).to(device, torch.float32)[:, None]
                waveform = weight * waveform + (1 - weight) * raw.partner.to(device, non_blocking=True).float() / 32768
            if augmented:
                waveform = augment_waveform(waveform, self._augment, seed, position, self._spec.sample_rate)
        if self._online and waveform is not None:
            fbank = compute_fbank(waveform, self._spec.sample_rate, self._spec.mel_bins)
        elif raw.fbank is not None:
            fbank = raw.fbank.to(device, non_blocking=True).float()
        if fbank is not None:
            fbank = pad_frames(fbank, self._spec.frames)
            if augmented:
                fbank = mask_fbank(fbank, self._augment, seed, position)
            fbank = (fbank - self._spec.mean) / (2 * self._spec.std)
        targets = raw.targets.to(device, non_blocking=True)
        return Batch(position, row, valid, waveform if self._needs.waveform else None, fbank, targets)


def pad_frames(fbank: torch.Tensor, frames: int) -> torch.Tensor:
    """Zero-pads or cuts raw fbanks [B, t, M] to [B, T, M].

    Zeros come after the log and before normalisation, as in SSAST: they become -mean / (2 std).
    """
    return torch.nn.functional.pad(fbank, (0, 0, 0, frames - fbank.shape[1]))
