"""build_loader(): order -> ring of raw batches -> batches on the device.

In: data settings, a part of the data, and this rank's place. Out: `Batch`es, the same clips in the same
global order for any number of ranks and reader processes.

The training process only plans: which bytes go where. Reader processes fill `data.prefetch`
batches ahead of it (`pipeline.data.ring`), out of local files or the node's cache of remote shards
(`pipeline.data.cache`). Nothing grows with the clips of the data set: see `pipeline.data.index` and `order`.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Literal

import numpy as np
import torch

from pipeline.config import AugmentConfig, DataConfig
from pipeline.data.assemble import Assembler, RawBatch, pad_frames
from pipeline.data.augment import changes_waveform, plan_mixup
from pipeline.data.bad import BadClips, Limit, look
from pipeline.data.cache import Directory, Remote, Shard, this_job
from pipeline.data.feed import Feed, Reading
from pipeline.data.index import ShardIndex
from pipeline.data.manifest import load_manifest
from pipeline.data.order import Part, TrainOrder, train_order
from pipeline.data.plan import Layout, Plan, Walk
from pipeline.data.reader import Access, Needs
from pipeline.data.spec import DataSpec
from pipeline.data.storage import is_remote, local
from pipeline.errors import UserError
from pipeline.flow import Batch

__all__ = ["Loader", "Needs", "Place", "build_loader", "pad_frames"]

OPEN_FILES = 384  # of a reader and order: the shards of 64 windows of 2048 clips, 512 a shard; limits are 1024 and up


@dataclass(frozen=True)
class Place:
    """Where a loader's batches go.

    Attributes:
        rank: This rank.
        world_size: R.
        device: Of the batches.
        raw: Stored numbers travel to the device and are converted there; None: unless that is a CPU.
    """

    rank: int
    world_size: int
    device: torch.device
    raw: bool | None = None


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
        part: "train": the training splits without the held-out fold. "eval": that fold, or the eval split.
        needs: What the method reads.
        batch_size: Clips of a global batch; divides by the ranks.
        seed: Of order and augmentation.
        place: This rank.
        limit: Only the first clips of the part; 0: all.

    Raises:
        UserError: no such split or fold, no clip in it, shards that cannot be read, a batch that does not
            divide by the ranks or is larger than an epoch, or a stored fbank under augmentation of the waveform.
    """
    if batch_size % place.world_size:
        raise UserError(f"batch of {batch_size} clips does not divide by {place.world_size} ranks; use a multiple")
    if data.fbank == "stored" and needs.fbank and augment is not None and changes_waveform(augment):
        raise UserError(
            "data.fbank = stored: the stored fbank is not that of a waveform changed by augment.mixup, noise_snr or "
            "roll; use data.fbank=auto"
        )
    if part == "eval":  # sees each clip once, whatever training draws
        data = data.model_copy(update={"sampler": "shuffle", "epoch_clips": 0})
    manifest = load_manifest(data.shards)
    spec = DataSpec.of(manifest, data)
    splits = data.train_splits
    if part == "eval" and not data.fold:
        splits = [data.eval_split]
        if data.eval_split not in manifest.splits:
            raise UserError(
                f"data.eval_split = '{data.eval_split}' is not in {data.shards}, which has "
                f"{', '.join(manifest.splits)}; name one"
            )
    content = _Content.of(data, augment or AugmentConfig(), needs)
    index = ShardIndex(data.shards, manifest, content.members)
    name = f"{manifest.digest}/{','.join(splits)}/{data.fold}/{part}"
    selection = index.part(splits, data.fold, part == "eval", limit, name)
    loader = Loader(index, selection, spec, data, content, _Share(batch_size, seed, place))
    if part == "train" and batch_size > loader.clips:
        raise UserError(
            f"train.batch_size = {batch_size}: an epoch has {loader.clips} clips, so every batch would hold a clip "
            f"twice, and the contrast would push a clip away from itself; use at most {loader.clips}"
        )
    return loader


@dataclass(frozen=True)
class _Share:
    batch_size: int
    seed: int
    place: Place

    @property
    def clips(self) -> int:
        """Clips of a batch on one rank."""
        return self.batch_size // self.place.world_size

    def positions(self, step: int) -> np.ndarray:
        """Rank r of R takes positions k G + r, k G + r + R, ... of batch k."""
        return step * self.batch_size + np.arange(self.place.rank, self.batch_size, self.place.world_size)


@dataclass(frozen=True)
class _Content:
    """What is read, and what becomes of it.

    Attributes:
        augment: Of training clips.
        needs: What the method gets.
        members: What is read for it.
        online: Fbanks are computed from waveforms.
    """

    augment: AugmentConfig
    needs: Needs
    members: Needs
    online: bool

    @staticmethod
    def of(data: DataConfig, augment: AugmentConfig, needs: Needs) -> "_Content":
        changed = changes_waveform(augment)
        online = needs.fbank and (data.fbank == "online" or (data.fbank == "auto" and changed))
        return _Content(augment, needs, Needs(needs.waveform or online, needs.fbank and not online), online)


class Loader:
    """Batches of one part of the data for one rank; a context manager. Made by `build_loader`.

    Attributes:
        clips: Of an epoch, over all ranks: n, or `data.epoch_clips`.
        manifest: Of the shards.
        bad_clips: Bad clips met on this rank.
    """

    def __init__(
        self, index: ShardIndex, part: Part, spec: DataSpec, data: DataConfig, content: _Content, share: _Share
    ) -> None:
        self.manifest = index.manifest
        self._index, self._part, self._spec = index, part, spec
        self._content, self._share = content, share
        self._order = self._others = train_order(part, data, share.seed, index.label_columns, len(spec.labels))
        orders = 1
        if content.augment.mixup > 0 and data.sampler == "balanced" and content.augment.partners == "uniform":
            # SSAST, AST and PSLA draw mixup's other clips uniformly: balanced ones did worse.
            others = replace(part, key=f"{part.key}/partners")
            self._others, orders = TrainOrder(others, share.seed, data.streams, data.window), 2
        self.clips = len(self._order)
        limit = Limit(data.max_bad, data.max_bad_share, self.clips)
        self.bad_clips = BadClips(data.shards, index.name, data.on_error, limit)
        held = index.shards(part.at(part.starts[:-1])).tolist()
        records = [index.manifest.shards[number] for number in held]
        missing = look(data.shards, records, np.diff(part.starts), limit)
        absent = frozenset(number for number, record in zip(held, records, strict=True) if record.name in missing)
        device, raw = share.place.device, share.place.raw
        self._assemble = Assembler(
            index.manifest, spec, content.augment, content.needs, content.online, share.seed, device
        )
        raw = device.type != "cpu" if raw is None else raw
        layout = Layout(index.manifest, content.members, content.augment.mixup > 0, share.clips, spec.frames, raw)
        streams = -(-self._order.streams // share.place.world_size)
        reading = _reading(data, spec, index, streams, orders, absent)
        self._feed = Feed(index, layout, reading, self.bad_clips, device, len(spec.labels))

    @property
    def bad(self) -> dict[str, str]:
        """Bad clips met on this rank: key -> shard and problem."""
        return self.bad_clips.problems

    @property
    def touched(self) -> dict[str, int]:
        """Shard -> bytes of members that this rank asked of it."""
        return {name: int(size) for name, size in zip(self._index.shard_names, self._feed.touched, strict=True) if size}

    def replaced(self, step: int) -> int:
        """Samples that this rank replaced so far in the epoch of batch `step`; they add up over ranks."""
        return self.bad_clips.replaced[self._epoch(step)]

    def keys(self, rows: Sequence[int]) -> list[str]:
        """Sample keys of index rows."""
        return [key for key, _ in self.names(rows)]

    def names(self, rows: Sequence[int]) -> list[tuple[str, str]]:
        """Sample key and shard of index rows."""
        return [self._index.name(row) for row in rows]

    def train_batches(self, start: int) -> Iterator[Batch]:
        """Own clips of global batches start, start + 1, ..., without end.

        Rank r of R takes positions k G + r, k G + r + R, ... of batch k.
        """

        def finish(plan: Plan, raw: RawBatch) -> Batch:
            self.bad_clips.count(self._epoch(plan.step), int((raw.row != plan.rows).sum()))
            return self._assemble(raw, augmented=True)

        return self._feed.batches(self._walk(self.train_plan, self._order.rows, self._order.streams, start), finish)

    def train_plan(self, step: int) -> Plan:
        """What this rank's clips of global batch `step` are, before anything is read."""
        share, augment = self._share, self._content.augment
        position = share.positions(step)
        rows, mixup, partners = self._order.rows(position), None, None
        if augment.mixup > 0:
            mixup = plan_mixup(augment, share.seed, torch.from_numpy(position))
            partners = self._others.partners(position, mixup.draw, rows)
        return Plan(step, position, rows, np.ones(len(position), bool), mixup, partners)

    def eval_batches(self, full: bool = False) -> Iterator[Batch]:
        """Every clip exactly once over all ranks, in index order, equally many batches on each rank.

        The last batch is filled up with the part's first clip, marked not valid; so is what stands in for
        a bad clip, which would else be scored twice. Bad clips are counted here; whether they are too many says
        `bad_clips.check` of their sum over ranks, afterwards.

        Args:
            full: Full batches alone, for losses that are defined on batches: the last clips are left out where they
                fill none, and what stands in for a bad clip is as valid as in training.
        """
        share, count = self._share, len(self._part)

        def rows_of(position: np.ndarray) -> np.ndarray:
            return self._part.at(position % count)

        def plan(step: int) -> Plan:
            position = share.positions(step)
            valid = position < count
            return Plan(step, position, self._part.at(np.where(valid, position, 0)), valid)

        def finish(plan: Plan, raw: RawBatch) -> Batch:
            bad = raw.row != plan.rows
            self.bad_clips.replaced[0] += int((raw.valid & bad).sum())
            raw.valid &= full | ~bad
            return self._assemble(raw, augmented=False)

        self.bad_clips.replaced.clear()
        steps = count // share.batch_size if full else -(-count // share.batch_size)
        return self._feed.batches(self._walk(plan, rows_of, 1, 0, steps), finish) if steps else iter(())

    def close(self) -> None:
        """Stops the readers and closes the shards."""
        self._feed.close()

    def __enter__(self) -> "Loader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _epoch(self, step: int) -> int:
        return step * self._share.batch_size // self.clips

    def _walk(
        self,
        plan: Callable[[int], Plan],
        rows_of: Callable[[np.ndarray], np.ndarray],
        streams: int,
        first: int,
        stop: int = 0,
    ) -> Walk:
        size = self._share.batch_size

        def shards_ahead(step: int) -> np.ndarray:
            planned = plan(step)
            read = [planned.rows]
            if planned.mixup is not None and planned.partners is not None:
                read.append(planned.partners[planned.mixup.mixed])
            return self._index.shards(np.concatenate(read))

        stride = -(-size // streams) * streams
        others_of = rows_of if self._others is self._order else self._others.rows
        return Walk(plan, rows_of, others_of, shards_ahead, size, stride, self.clips, first, stop)


def _reading(
    data: DataConfig, spec: DataSpec, index: ShardIndex, streams: int, orders: int, absent: frozenset[int]
) -> Reading:
    """How a rank with so many streams of each of its orders reads these shards."""
    source: Remote | Directory = Directory(str(local(data.shards)), tuple(index.shard_names))
    open_files = OPEN_FILES * orders
    if is_remote(data.shards):
        records = {record.name: record for record in index.manifest.shards}
        shards = tuple(Shard(name, records[name].size, records[name].sha256) for name in index.shard_names)
        cache = data.cache or os.environ.get("CRAFT_CACHE", "") or "~/.cache/craft"
        source = Remote(data.shards.rstrip("/"), shards, cache, int(data.cache_gb * 1e9), this_job())
        # What is open stays in the cache: the shards of the window that is read and of the next one.
        open_files = min(OPEN_FILES * orders, 2 * streams * orders + 4)
    audio, fbank = index.manifest.audio.array, index.manifest.fbank.array
    access = Access(source, audio, fbank, open_files, spec.mean, spec.std, absent)
    return Reading(access, data.workers, data.prefetch, data.fetch_ahead)
