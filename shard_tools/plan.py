"""Which clip goes into which shard: a pure function of the catalog and the options.

In: a `Catalog` and `BuildOptions`. Out: `SplitPlan`, whose shards are made one at a time.

A seeded permutation of a split's clips, cut into shards of equal planned size. It does not depend on
workers, engine, slice or what is there already, so all of them give the same bytes. Memory: one int64 a clip.

Rows of Parquet files are read by row group, and a permutation of clips would read a group for each. There the groups
are permuted, and clips only among so many groups as fill WINDOW shards; a shard has its clips by group. So a group is
read two or three times, and a shard mixes what WINDOW shards hold of groups from anywhere: where groups differ in their
classes, so do shards, which training evens out over its streams (pipeline/data/order.py).
"""

import io
import json
import math
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash

from pipeline.data.storage import Location, join
from pipeline.errors import UserError
from shard_tools.catalogs import Catalog
from shard_tools.columns import digest
from shard_tools.ffmpeg_codecs import identity
from shard_tools.names import BETWEEN, PLAN, split_source
from shard_tools.store import Store
from shard_tools.write import AudioOptions, ShardPlan, shard_name

PLAN_ROWS = 1 << 16  # at a time
EVENTS = "events of the clips"
WINDOW = 2  # shards, whose clips come from the same row groups
PARQUET = rf"(?i)\.parquet{BETWEEN}[0-9]+$"
PROBES = 8  # files that are looked at where one is gone: is it the file, or the disk or store?
PLAN_SCHEMA = pa.schema(
    [
        ("split", pa.string()),
        ("shard", pa.string()),
        ("key", pa.large_binary()),  # names that are not UTF-8 are names
        ("path", pa.large_binary()),
        ("start", pa.float64()),
        ("end", pa.float64()),
        ("labels", pa.large_list(pa.int32())),
        ("fold", pa.int16()),
    ]
)


@dataclass(frozen=True)
class BuildOptions:
    """How the shards are cut.

    Attributes:
        audio: What is stored of a clip.
        clips_per_shard: Planned clips of a shard; those that fail leave it smaller.
        seed: Of the permutation that mixes classes over shards.
    """

    audio: AudioOptions
    clips_per_shard: int = 512
    seed: int = 0


@dataclass(frozen=True)
class Slice:
    """Every `count`-th shard, from the `number`-th on; the parts of 1/N to N/N are the whole.

    Attributes:
        number: From 1 to `count`.
        count: N.
    """

    number: int
    count: int


def write_plan(catalog: Catalog, out: Location, options: BuildOptions) -> Iterator[str]:
    """Writes plan.parquet, which clip goes into which shard, and sums up what a build would do, a line a split.

    Raises:
        UserError: a plan.parquet of another kind is there.
    """
    store, audio = Store(out), options.audio
    if PLAN in store.sizes() and not _is_plan(store):
        raise UserError(f"{join(out, PLAN)}: no build made it; move it away, or use another --out")
    each = audio.samples * 2 + round(audio.seconds * 100) * audio.mel_bins * 2 + 3072
    with store.temporary(PLAN) as path:
        with pq.ParquetWriter(path, PLAN_SCHEMA, compression="zstd") as writer:
            for split in catalog.splits:
                plan = SplitPlan(catalog, split, out, options)
                for first in range(0, len(plan.order), PLAN_ROWS):
                    rows = plan.order[first : first + PLAN_ROWS]
                    numbers = np.arange(first, first + len(rows)) // options.clips_per_shard
                    names = pa.array([plan.name(number) for number in range(numbers[0], numbers[-1] + 1)])
                    columns = [pa.repeat(split, len(rows)), names.take(pa.array(numbers - numbers[0]))]
                    columns += catalog.clips.recorded(rows, PLAN_SCHEMA.names[2:]).columns
                    writer.write_table(pa.table(columns, schema=PLAN_SCHEMA))
                yield (
                    f"{split}: {len(plan.order)} of {catalog.listed(split)} listed clips have a file; {len(plan)} "
                    f"shards, about {len(plan.order) * each / 1e9:.2f} GB"
                )
        store.commit(path, PLAN)
    yield f"which clip goes where: {join(out, PLAN)}"


class SplitPlan:
    """The shards of one split, without a byte of audio read.

    Args:
        catalog: Of all splits.
        split: Name of the split.
        out: Where the shards go.
        options: How they are cut.
    """

    def __init__(self, catalog: Catalog, split: str, out: Location, options: BuildOptions) -> None:
        self.catalog, self.split, self.out, self.options = catalog, split, out, options
        self.staged: Collection[int] = ()  # shards that are written aside: the finished split keeps its own until then
        rows = catalog.clips.rows(split)
        groups = _row_groups(catalog, rows)
        self._grouped = groups is not None
        self.order: np.ndarray = rows[_order(groups, len(rows), options)]
        self.mine = list(range(len(self)))  # shards that this process is to write, and those of them that are not there
        self.todo: list[int] = []

    def __len__(self) -> int:
        return math.ceil(len(self.order) / self.options.clips_per_shard)

    def rows(self, number: int) -> np.ndarray:
        """int64, catalog rows of a shard, in the order of the tar."""
        size = self.options.clips_per_shard
        return self.order[number * size : (number + 1) * size]

    def name(self, number: int) -> str:
        """File name of a shard."""
        return shard_name(self.split, number)

    def shard(self, number: int) -> ShardPlan:
        """What one shard is made of."""
        rows = self.rows(number).tolist()
        clips, listed = self.catalog.clips.at(rows), self.catalog.containers
        held = dict.fromkeys(split_source(clip.path)[0] for clip in clips) if listed else ()
        return ShardPlan(
            split=self.split,
            number=number,
            clips=clips,
            labels=self.catalog.labels,
            root=str(self.catalog.root),
            out=self.out,
            audio=self.options.audio,
            rows=rows,
            probes=self._probes,
            containers={container: listed[container] for container in held if container in listed},
            build=self.digest,
            staged=number in self.staged,
        )

    @cached_property
    def _probes(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(clip.path for clip in self.catalog.clips.at(self.order[:PROBES])))

    @cached_property
    def digest(self) -> str:
        """Of all that decides what the shards hold."""
        content = json.dumps(self.identity | {"decoder": identity()}, sort_keys=True)
        return xxhash.xxh3_128_hexdigest(content.encode())

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What must be equal for a build to be the same build; the names are those an error message uses."""
        catalog, split = self.catalog, self.split
        clips, missing = catalog.clips.rows(split), catalog.missing.rows(split)

        def of(*columns: str) -> str:
            return digest(catalog.clips.recorded(clips, columns))

        # Absent without them, so that the digests of other builds stay what they were.
        better = {} if catalog.overrides is None else {"label overrides": catalog.overrides.record()}
        others = catalog.clips.others(clips)
        further = {"further files of the clips": others} if others else {}
        events = catalog.clips.take(catalog.clips.rows(split), ["events"])["events"]
        if pc.sum(pc.list_value_length(events)).as_py():
            further[EVENTS] = xxhash.xxh3_128_hexdigest(json.dumps(events.to_pylist()).encode())
        if self._grouped:
            further["row groups"] = xxhash.xxh3_128_hexdigest(self.order.tobytes())
        return {
            "dataset": catalog.dataset,
            "clips_per_shard": self.options.clips_per_shard,
            "seed": self.options.seed,
            **asdict(self.options.audio),
            "clips found": len(clips),
            "clips missing": len(missing),
            "keys of the clips": of("key", "id"),
            "source files": of("path"),
            "segments": of("start", "end", "trimmed"),
            **better,
            **further,
            "labels of the clips": of("labels"),
            "folds of the clips": of("fold"),
            "missing clips": digest(catalog.missing.take(missing, ["id", "path"])),
        }


def _order(groups: np.ndarray | None, clips: int, options: BuildOptions) -> np.ndarray:
    """int64, the permutation of a split's clips; see the beginning of this file."""
    rng = np.random.default_rng([options.seed])
    order: np.ndarray = rng.permutation(clips)
    if groups is None:
        return order
    sizes = np.bincount(groups)
    places = np.empty(len(sizes), np.int64)
    places[rng.permutation(len(sizes))] = np.arange(len(sizes))
    began = np.zeros(len(sizes), np.int64)  # clips before each group
    turn = np.argsort(places)
    began[turn] = np.cumsum(sizes[turn]) - sizes[turn]
    window = began[groups] // (WINDOW * options.clips_per_shard)
    order = np.lexsort((rng.permutation(clips), window))
    shard = np.arange(clips) // options.clips_per_shard
    return order[np.lexsort((np.arange(clips), places[groups[order]], shard))]


def _row_groups(catalog: Catalog, rows: np.ndarray) -> np.ndarray | None:
    """int64 [n], a number for each row group, of which any other source is one of its own; None: there are none."""
    table = catalog.clips.take(rows, ["path", "at"])
    path = table["path"].combine_chunks()
    inside = pc.match_substring_regex(path, PARQUET).to_numpy(zero_copy_only=False)
    if not inside.any():
        return None
    files = pc.replace_substring_regex(path, f"{BETWEEN}.*", "").dictionary_encode().indices.to_numpy()
    at = pc.list_element(table["at"], 0).fill_null(-1).to_numpy()
    found = np.where(inside, files.astype(np.int64) << 32 | (at + 1), -1 - np.arange(len(rows)))
    numbers: np.ndarray = np.unique(found, return_inverse=True)[1]
    return numbers


def _is_plan(store: Store) -> bool:
    try:
        return bool(pq.read_schema(io.BytesIO(store.read(PLAN))).equals(PLAN_SCHEMA))
    except pa.ArrowInvalid:
        return False
