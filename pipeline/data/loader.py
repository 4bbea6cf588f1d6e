"""Loader: shards -> batches on the device, the same clips in the same global order for any number of ranks and workers.

In: a directory or URL of shards, what is read of them, and this rank. Out: `Batch`es.

Reader processes (`pipeline.data.workers`) fill a whole batch in a slot of shared memory (`pipeline.data.pool`), and all
that comes through their pipes is a number. An item per clip and fresh memory per batch is what makes torch's
DataLoader slow (tests/benchmarks/bench_loader.py). Nothing grows with the clips of the data set: see
`pipeline.data.index` and `order`.
"""

import functools
import itertools
import os
from collections.abc import Generator, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Literal
from weakref import WeakSet

import numpy as np
import pyarrow as pa
import torch
from torch.utils.data import IterableDataset

from pipeline.config import AugmentConfig, DataConfig
from pipeline.data.ahead import Prefetcher
from pipeline.data.augment import Assembler, changes_waveform
from pipeline.data.bad import BadClips
from pipeline.data.cache import Cache, Remote, this_job
from pipeline.data.corpus import load_corpus
from pipeline.data.index import ShardIndex
from pipeline.data.lengths import EvalLengths, LengthOrder
from pipeline.data.mixture import MixedOrder, shares
from pipeline.data.order import EvalOrder, Part, TrainOrder, part_weights, train_order
from pipeline.data.pool import Arrays, Pool, slot_type
from pipeline.data.reader import Reader, open_local
from pipeline.data.spec import DataSpec
from pipeline.data.steps import Draw, Order, Steps
from pipeline.data.storage import is_remote, local
from pipeline.data.workers import Workers
from pipeline.errors import UserError
from pipeline.flow import Batch

OPEN_FILES = 384  # of a reader and order: the shards of 64 windows of 2048 clips, 512 a shard; limits are 1024 and up


class Loader(IterableDataset[Batch]):
    """Batches of one part of the data for one rank; a context manager.

    `for batch in loader` is one pass: of a training, an epoch from where the last pass ended, whose last batch is
    filled up with the beginning of the next one; of an evaluation, each clip once. `len(loader)` is its number of
    batches. `batches` goes on without end, from any step. Ranks and workers change no batch, so the state is a step.

    >>> with craft.Loader(shards, batch_size=8) as loader:
    ...     shapes = [(batch.waveform.shape, batch.fbank.shape) for batch in loader]
    >>> len(shapes), shapes[0]
    (9, (torch.Size([8, 8000]), torch.Size([8, 64, 128])))

    Args:
        data: Settings, or just the directory or URL of the shards.
        part: "train": the training splits without the held-out fold. "eval": that fold, or the eval split; of several
            sets of shards, one set's behind the other's, and the split of a set that is listed twice once.
        augment: Of training clips; None: none.
        waveform, fbank: Whether batches have them.
        batch_size: Clips of a global batch; divides by the ranks.
        seed: Of order and augmentation.
        rank: This rank.
        world_size: R.
        device: Of the batches. A GPU converts the stored numbers itself, out of pinned memory.
        raw: Stored numbers travel to the device and are converted there; None: unless that is a CPU.
        limit: Only the first clips of the part; 0: all.
        ids: string [i], keys: only those of these clips that are in the part; None: all.

    Attributes:
        clips: Of an epoch, over all ranks: n, or `data.epoch_clips`.
        corpus: The shards.
        spec: Format, normalisation and labels of the batches.
        bad_clips: Bad clips met on this rank.

    Raises:
        UserError: no such split or fold, no clip in it, shards that cannot be read, a batch that does not
            divide by the ranks or is larger than an epoch, or a stored fbank under augmentation of the waveform.
    """

    def __init__(
        self,
        data: DataConfig | str | Path,
        part: Literal["train", "eval"] = "train",
        *,
        augment: AugmentConfig | None = None,
        waveform: bool = True,
        fbank: bool = True,
        batch_size: int = 32,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
        raw: bool | None = None,
        limit: int = 0,
        ids: pa.Array | None = None,
    ) -> None:
        data = data if isinstance(data, DataConfig) else DataConfig(shards=str(data))
        self._data, self._train, self._seed = data, part == "train", seed
        self._augment = augment if augment is not None and self._train else AugmentConfig()
        self._batch_size, self._device = batch_size, torch.device(device)
        changed = changes_waveform(self._augment)
        if batch_size % world_size:
            raise UserError(f"batch of {batch_size} clips does not divide by {world_size} ranks; use a multiple")
        if data.fbank == "stored" and fbank and changed:
            raise UserError(
                "data.fbank = stored: the stored fbank is not that of a waveform changed by augment.mixup, noise_snr "
                "or roll; use data.fbank=auto"
            )
        self.corpus = load_corpus(data, trains=self._train or data.fold > 0)
        self.spec = DataSpec.of(self.corpus, data)
        online = fbank and (data.fbank == "online" or (data.fbank == "auto" and changed))
        read = {"waveform": waveform or online, "fbank": fbank and not online}
        self._index = ShardIndex(self.corpus, [member for member in read if read[member]])
        parts = self._parts(limit, ids)
        order, others = self._orders(parts)
        self.clips, self._order = len(order), order
        if self._train and batch_size > self.clips:
            raise UserError(
                f"train.batch_size = {batch_size}: an epoch has {self.clips} clips, so every batch would hold a clip "
                f"twice, which spoils any contrast of clips; use at most {self.clips}"
            )
        self.bad_clips = BadClips(data, self._index.name, self.clips)
        numbers = [self._index.shards_of(part.at(part.starts[:-1])) for part in parts]
        tars = {n: (self._index.locations[n], self._index.shards[n]) for n in np.concatenate(numbers).tolist()}
        self._absent = self.bad_clips.missing(tars, np.concatenate([np.diff(part.starts) for part in parts]))
        self._remote = None
        if any(is_remote(member.location) for member in self.corpus.members):
            cache = data.cache or os.environ.get("CRAFT_CACHE", "") or "~/.cache/craft"
            most_bytes = int(data.cache_gb * 1e9)
            self._remote = Remote(self._index.locations, self._index.shards, cache, most_bytes, this_job())
        orders = len(parts) * len(self.spec.lengths) * (1 if others is order else 2)
        self._open_files = OPEN_FILES * min(2, orders)
        if self._remote is not None:  # what is open stays in the cache: the shards of a window and of the next one
            streams = -(-order.streams // world_size) * orders
            self._open_files = min(self._open_files, 2 * streams + 4)
        raw = self._device.type != "cpu" if raw is None else raw
        members = (*(member for member in read if read[member]), *(["partner"] if self._augment.mixup > 0 else []))
        kind = slot_type(self.corpus, batch_size // world_size, self.spec.frames, members, raw)
        self._pool = Pool(kind, self._device.type == "cuda")
        self._assemble = Assembler(self.corpus, self.spec, self._augment, waveform, online, seed, self._device)
        self._steps = Steps(
            order, others, self._index, self._pool, members, self._open_reader, self._augment, seed, batch_size, rank,
            world_size,
        )  # fmt: skip
        self._iterators: WeakSet[Generator[Batch]] = WeakSet()
        self._step = 0

    def __len__(self) -> int:
        """Batches of a whole pass; of a training, of the epoch that the next pass is of, or the rest of."""
        epoch = self._epoch(self._step) if self._train else 0
        return self._end(epoch) - self._end(epoch - 1)

    def __iter__(self) -> Iterator[Batch]:
        first = self._step
        stop = self._end(self._epoch(first)) if self._train else None
        for batch in self.batches(first, stop):
            if self._train:
                self._step += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """The state of iteration, for `load_state_dict` of a loader of the same settings on any number of ranks."""
        return {"step": self._step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes on behind the last batch that a loader had given when its `state_dict` was asked for."""
        self._step = state["step"]

    def batches(self, first: int = 0, stop: int | None = None, full: bool = False) -> Iterator[Batch]:
        """Global batches first, first + 1, ...: of batch k this rank's positions k G + rank, k G + rank + R, ....

        An evaluation ends with the last clip, in equally many batches on each rank. The last one is filled up with
        the part's first clip, marked not valid; so is what stands in for a bad clip, which would else be scored twice.
        Its bad clips are counted here; whether they are too many says `bad_clips.check` of their sum over ranks,
        afterwards.

        Args:
            first: First batch.
            stop: Behind the last one; None: a training has no end, an evaluation ends with its part.
            full: Full batches alone, for held-out losses that are defined on batches: the last clips are left out
                where they fill none, and what stands in for a bad clip is as valid as in training.

        Raises:
            UserError: a bad clip under `data.on_error` = "raise", none left to replace it, too many, shards that cannot
                be had, or readers that die one after the other.
        """
        ends = [] if stop is None else [stop]
        if not self._train:
            ends.append(self._order.full if full and isinstance(self._order, EvalLengths) else len(self))
            self.bad_clips.replace(0, 0)
        iterator = self._batches(first, max(first, min(ends)) if ends else None, full)
        self._iterators.add(iterator)
        return iterator

    def draw(self, step: int) -> Draw:
        """What this rank's clips of global batch `step` are, before anything is read."""
        return self._steps.draw(step)

    @property
    def bad(self) -> dict[str, str]:
        """Bad clips met on this rank: key -> shard and problem."""
        return self.bad_clips.problems

    def replaced(self, step: int) -> int:
        """Samples that this rank replaced in the epoch of batch `step` up to that batch; they add up over ranks."""
        first = -(-self._epoch(step) * self.clips // self._batch_size)
        return self.bad_clips.replaced(first, step + 1)

    def keys(self, rows: Sequence[int]) -> list[str]:
        """Sample keys of index rows."""
        return [key for key, _ in self.names(rows)]

    def names(self, rows: Sequence[int]) -> list[tuple[str, str]]:
        """Sample key and shard of index rows."""
        return [self._index.name(row) for row in rows]

    @property
    def length_shares(self) -> dict[int, float]:
        """Share of the batches of a training that have inputs of so many samples."""
        if not isinstance(self._order, LengthOrder):
            return {self.spec.samples: 1.0}
        return dict(zip(self._lengths, self._order.turns.first_shares, strict=True))

    def class_counts(self) -> tuple[np.ndarray, np.ndarray]:
        """Of the part, by class: clips int64 [C], and those that an epoch draws, expected: float64 [C].

        One read of the index's labels and two passes over them, as for a balanced sampler.
        """
        table, classes = self._index.label_columns(), len(self.spec.labels)
        counts, drawn = np.zeros(classes, np.int64), np.zeros(classes)
        for order, draws in self._order.sources():
            own = part_weights(order.part, table, classes)
            counts += own.counts
            balanced = None if isinstance(order, EvalOrder) else order.weights
            drawn += own.counts * (draws / len(order.part)) if balanced is None else balanced.drawn(draws)
        return counts, drawn

    def close(self) -> None:
        """Ends the readers of iterators that were left unfinished, and closes the shards."""
        for iterator in list(self._iterators):
            iterator.close()
        self._pool.close()

    def __enter__(self) -> "Loader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _epoch(self, step: int) -> int:
        return step * self._batch_size // self.clips

    def _end(self, epoch: int) -> int:
        """Batches before the first one that lies in a later epoch alone."""
        if isinstance(self._order, EvalLengths):
            return (epoch + 1) * self._order.batches
        return -(-(epoch + 1) * self.clips // self._batch_size)

    def _parts(self, limit: int, ids: pa.Array | None) -> list[Part]:
        """Of a training, the clips of each set; of an evaluation, those of all sets as one."""
        data, members = self._data, self.corpus.members
        trained = [[(number, split) for split in member.train] for number, member in enumerate(members)]
        if self._train or data.fold:
            digests = [member.manifest.digest for member in members]
        else:
            held_out: dict[tuple[str, str], tuple[int, str]] = {}
            for number, member in enumerate(members):
                if member.held_out:  # a set may be listed once for each of its training splits
                    held_out.setdefault((member.manifest.digest, member.held_out), (number, member.held_out))
            if not held_out:
                raise UserError(
                    f"data.eval_split = '{data.eval_split}' is not in {data.shown}, which has "
                    f"{', '.join(self.corpus.splits)}; build a split of held-out clips (docs/data.md), or name "
                    "one of these (evaluate.py: --split)"
                )
            trained, digests = [[*held_out.values()]], [self.corpus.digest]
        kind = "train" if self._train else "eval"
        names = [f"{digest}/{','.join(split for _, split in splits)}/{data.fold}/{kind}"
                 for digest, splits in zip(digests, trained, strict=True)]  # fmt: skip
        return [self._index.part(splits, data.fold, not self._train, limit, name, ids)
                for splits, name in zip(trained, names, strict=True)]  # fmt: skip

    def _orders(self, parts: list[Part]) -> tuple[Order, Order]:
        """Of the clips, and of those that mixup takes besides."""
        data, seed, lengths = self._data, self._seed, self.spec.lengths
        by_length: list[list[Part | None]] = [list(parts)]
        if len(lengths) > 1:
            by_length = self._index.by_length(parts, lengths)
        if not self._train:
            held_out = EvalLengths([EvalOrder(part) for own in by_length for part in own if part], self._batch_size)
            return held_out, held_out
        each = data if len(parts) == len(lengths) == 1 else data.model_copy(update={"epoch_clips": 0})
        table, classes = functools.cache(self._index.label_columns), len(self.spec.labels)
        counts: list[np.ndarray | None] = [None] * len(parts)
        if data.sampler == "balanced" and len(lengths) > 1:
            counts = [part_weights(part, table(), classes).counts for part in parts]
        orders = [[None if part is None else train_order(part, each, seed, table, classes, count)
                   for part, count in zip(own, counts, strict=True)] for own in by_length]  # fmt: skip
        weights = self._weights(parts, orders)
        order = self._joined(orders, weights)
        if self._augment.mixup > 0 and data.sampler == "balanced" and self._augment.partners == "uniform":
            # SSAST, AST and PSLA draw mixup's other clips uniformly: balanced ones did worse.
            own_order = functools.partial(TrainOrder, seed=seed, streams=data.streams, window=data.window)
            others = [[None if part is None else own_order(replace(part, key=f"{part.key}/partners"))
                       for part in own] for own in by_length]  # fmt: skip
            return order, self._joined(others, weights)
        return order, order

    def _weights(self, parts: list[Part], orders: list[list[TrainOrder | None]]) -> list[list[list[Fraction]]]:
        """Share of the draws of each length of each set, in each phase of `data.schedule`: [phases][lengths][sets].

        A set's weight goes to its lengths in proportion to their clips, or to the weights of a balanced sampler.

        Raises:
            UserError: clips of a length or a set are so few, for their weight, that a batch would hold some twice.
        """
        data, members, lengths = self._data, self.corpus.members, self.spec.lengths
        first = shares(list(map(len, parts)), [member.weight for member in members], data.temperature)
        mass = [[0 if order is None else len(order) if order.weights is None else int(order.weights.sums.sum())
                 for order in own] for own in orders]  # fmt: skip
        totals = [sum(column) for column in zip(*mass, strict=True)]
        found = []
        for step, weights in ((0, first), *((phase.step, phase.weights) for phase in data.schedule)):
            given = [Fraction(weight) for weight in weights]
            found.append([[weight * part / total for weight, part, total in zip(given, own, totals, strict=True)]
                          for own in mass])  # fmt: skip
            for own, joint, samples in zip(orders, found[-1], lengths, strict=True):
                of = f" of {samples / self.spec.sample_rate:g} s" if len(lengths) > 1 else ""
                remedy = "leave that length out of data.seconds, or lower" if of else "lower its weight, or"
                for member, order, weight in zip(members, own, joint, strict=True):
                    drawn = float(self._batch_size * weight / sum(joint)) if order and weight else 0.0
                    if order and drawn > len(order) and (of or len(members) > 1):
                        raise UserError(
                            f"{'data.seconds' if of else 'data.shards'}: from step {step} on a batch{of} would hold "
                            f"{drawn:.0f} clips of the {len(order)}{of} of {member.location}, so clips twice, and a "
                            f"contrast of clips would push one away from itself; {remedy} train.batch_size"
                        )
        return found

    def _joined(self, orders: list[list[TrainOrder | None]], weights: list[list[list[Fraction]]]) -> Order:
        """One order of all sets and lengths."""
        data, several = self._data, len(orders) > 1
        steps, key = [0, *(phase.step for phase in data.schedule)], f"{self.corpus.digest}/{self._seed}"
        found: list[tuple[TrainOrder | MixedOrder, Fraction]] = []
        self._lengths = [samples for own, samples in zip(orders, self.spec.lengths, strict=True) if any(own)]
        for number, (own, samples) in enumerate(zip(orders, self.spec.lengths, strict=True)):
            there = [i for i, order in enumerate(own) if order]
            sets = [order for order in own if order]
            if len(sets) == 1:
                found.append((sets[0], weights[0][number][there[0]]))
            elif sets:
                phases = [(step, [phase[number][i] for i in there]) for step, phase in zip(steps, weights, strict=True)]
                name, clips = (f"{key}/{samples}", 0) if several else (key, data.epoch_clips)
                mixed = MixedOrder(sets, phases, name, data.streams, self._batch_size, clips)
                found.append((mixed, sum(phases[0][1], Fraction(0))))
        if not several:
            return found[0][0]
        made, own_shares = zip(*found, strict=True)
        return LengthOrder(made, own_shares, key, self._batch_size, data.epoch_clips)

    def _open_reader(self) -> Reader:
        cache = None if self._remote is None else Cache(self._remote)

        def open_shard(number: int, unreadable: bool) -> int:
            location = self._index.locations[number]
            if cache is not None and is_remote(location):
                return cache.open(number, doubted=unreadable)
            return open_local(local(location), self._index.shards[number].name)

        arrays = {"waveform": self.corpus.audio.array, "fbank": self.corpus.fbank.array}
        return Reader(open_shard, arrays, self.spec.mean, self.spec.std, self._open_files, self._absent)

    def _remote_shards(self, step: int) -> np.ndarray:
        """Numbers of the shards behind a URL that this rank reads for global batch `step`."""
        numbers = self._steps.shards(step)
        return numbers[[is_remote(self._index.locations[number]) for number in numbers]]

    def _batches(self, first: int, stop: int | None, full: bool) -> Generator[Batch]:
        stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None  # type: ignore[no-untyped-call]
        coming = itertools.count(first) if stop is None else iter(range(first, stop))
        prefetcher = None
        workers = Workers(self._steps, self._pool, self._data.workers)
        ahead = max(self._data.prefetch, self._data.workers) if self._data.workers else 1  # each reader has a batch

        def read_ahead() -> None:
            while len(workers) < ahead:
                step = next(coming, None)
                if step is None:
                    return
                if prefetcher is not None:
                    prefetcher.advance(step)
                workers.start(step)

        try:
            if self._remote is not None:
                prefetcher = Prefetcher(self._remote, self._remote_shards, self._data.fetch_ahead, first, stop)
            for step in itertools.count(first):
                read_ahead()
                if not len(workers):
                    return
                arrays, problems, error = workers.finish()
                for row, problem in problems:
                    self.bad_clips.met(row, problem)
                if error is not None:
                    raise error
                if self._data.workers:
                    read_ahead()  # they work while the batch is trained on
                self._count(step, arrays, full)
                # A stream of its own copies and converts the next batch while the current one is trained on.
                with nullcontext() if stream is None else torch.cuda.stream(stream):
                    batch = self._assemble(arrays)
                if stream is not None:
                    self._pool.copied(arrays, stream.record_event())
                    batch.hand_over(stream)
                del arrays
                yield batch
                del batch  # its memory is the pool's
        finally:
            workers.close()
            if prefetcher is not None:
                prefetcher.close()

    def _count(self, step: int, arrays: Arrays, full: bool) -> None:
        """Counts bad clips; in an evaluation, what stands in for one is not valid unless batches must be full."""
        replaced, valid = arrays["row"] != arrays["planned"], arrays["valid"]
        if self._train:
            if replaced.any():
                self.bad_clips.replace(step, int(replaced.sum()))
                self.bad_clips.check(self.replaced(step), local=True)
            return
        self.bad_clips.replace(0, self.bad_clips.replaced(0, 1) + int((valid & replaced).sum()))
        if not full:
            valid &= ~replaced
