"""A catalog -> a directory of shards: plan, write what is not there yet, index, manifest last.

In: a `Catalog` and options. Out: tars, `index.parquet`, `failures.jsonl`, `manifest.json`.

The plan is a pure function of the catalog and the options (plan.py) and each shard is a pure function of
its plan (write.py). A finished shard has a record in `.build/`; a build that was killed goes on with
the shards that have none, or whose tar is not what the record says. The same holds for the parts of a
build cut by `Slice`, on any machines, which `merge` completes. Memory is that of the catalog (columns.py).
"""

import io
import json
import logging
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pyarrow.parquet as pq
from tqdm import tqdm

from pipeline.data.manifest import Manifest, load_manifest
from pipeline.data.storage import Location
from pipeline.errors import UserError
from shard_tools.catalogs import Catalog
from shard_tools.distribute import run
from shard_tools.ffmpeg_codecs import available
from shard_tools.finish import finish, reasons
from shard_tools.lock import owner, slice_owner
from shard_tools.plan import BuildOptions, Slice, SplitPlan
from shard_tools.stamps import Change, Sources
from shard_tools.store import Store
from shard_tools.write import record_name, shard_name

log = logging.getLogger(__name__)

RECORD_THREADS = 16  # records are small; from an object store the waiting is what costs


@dataclass(slots=True)
class Summary:
    """What a build did.

    Attributes:
        manifest: Of the whole directory.
        failures: Reasons (up to the first colon) and how many listed clips of the catalog's splits each cost.
    """

    manifest: Manifest
    failures: Counter[str]

    @property
    def silent(self) -> int:
        """Stored clips of all splits that are digital silence."""
        return sum(split.silent for split in self.manifest.splits.values())


@dataclass(slots=True)
class _Work:
    """A checked beginning: what is there, what is to be built.

    Attributes:
        store: Where.
        earlier: Of the splits that are finished.
        plans: Of those that are not.
        mine: Of each plan the shards to be written by us.
        todo: Those of them that are not written yet.
        changed: Of the others, sources that have changed since.
    """

    store: Store
    earlier: Manifest | None
    plans: list[SplitPlan]
    mine: list[list[int]]
    todo: list[list[int]] = field(default_factory=list)
    changed: list[Change] = field(default_factory=list)


def build(
    catalog: Catalog,
    out: Location,
    options: BuildOptions,
    workers: int,
    overwrite: bool = False,
    engine: str = "process",
) -> Summary:
    """Builds all splits of the catalog into `out`, going on where an earlier attempt stopped.

    Splits that `out` already holds stay; a split built before with the same options is not built again, and its sources
    are not looked at: the stamps go with the records, as shards outlive their sources (repair.py: `compare`).

    Raises:
        UserError: `out` holds shards of another format, vocabulary or options, or is being built.
        OSError: something could not be written.
    """
    with owner(out, shared=False):
        if overwrite:
            _erase(Store(out))
        work = _begin(catalog, out, options)
        work.store.clean()
        _look(work)
        _write(work, workers, engine)
        return _finish(catalog, options, work)


def build_slice(
    catalog: Catalog, out: Location, options: BuildOptions, workers: int, part: Slice, engine: str = "process"
) -> int:
    """Writes one slice's shards and no index; returns how many shards the slice has. `merge` completes the build.

    Raises:
        UserError, OSError: as `build`.
    """
    with owner(out, shared=True):
        work = _begin(catalog, out, options)
        first, taken = 0, []
        for place, plan in enumerate(work.plans):
            work.mine[place] = [
                number for number in range(len(plan)) if (first + number) % part.count == part.number - 1
            ]
            taken += [first + number for number in work.mine[place]]
            first += len(plan)
        with slice_owner(out, part, taken):
            _look(work)
            _write(work, workers, engine)
        return len(taken)


def merge(catalog: Catalog, out: Location, options: BuildOptions) -> Summary:
    """Completes a build whose slices are done: index, failures, manifest.

    Raises:
        UserError: shards are still missing, or hold sources that have changed since they were decoded.
    """
    with owner(out, shared=False):
        work = _begin(catalog, out, options)
        _look(work, merging=True)
        if work.changed:
            raise UserError(
                f"{out}: {len(work.changed)} shards hold files that have changed since a slice decoded them, such as "
                f"{work.changed[0]}; put the files back, or run the slices again, which write these shards anew; then "
                "--merge"
            )
        lacking = [shard_name(p.split, n) for p, numbers in zip(work.plans, work.todo, strict=True) for n in numbers]
        if lacking:
            total = sum(len(plan) for plan in work.plans)
            raise UserError(
                f"{out}: {len(lacking)} of {total} shards are not written yet, such as {lacking[0]}; run (again) the "
                "slices that did not end, then --merge"
            )
        work.store.clean()
        return _finish(catalog, options, work)


def _begin(catalog: Catalog, out: Location, options: BuildOptions) -> _Work:
    """Checks that the build fits what is there, and finds the shards that are not."""
    repeat = catalog.clips.repeat()
    if repeat is not None:
        raise UserError(
            f"{repeat[0].path} and {repeat[1].path} get the same key '{repeat[0].key}'; give them a key column"
        )
    store = Store(out)
    earlier = _earlier(catalog, store, options)
    work = _Work(store, earlier, [], [])
    for split in catalog.splits:
        plan = SplitPlan(catalog, split, out, options)
        identity = plan.identity()
        if earlier is not None and split in earlier.splits:
            _compare(store, split, earlier.options.get(split, {}), identity)
            log.info("split '%s' is finished: nothing to do (have files changed? verify_shards.py --sources)", split)
            continue
        name = f".build/{split}/plan.json"
        if "plan.json" in store.sizes(f".build/{split}"):
            begun = json.loads(store.read(name))
            _compare(store, split, begun, identity)
            plan.decoder = _same_decoder(store, split, begun.get("decoder", ""))
        else:
            plan.decoder = available()
            store.write(name, json.dumps(identity | {"decoder": plan.decoder}).encode())
        work.plans.append(plan)
    work.mine = [list(range(len(plan))) for plan in work.plans]
    return work


def _same_decoder(store: Store, split: str, begun: str) -> str:
    """The decoder that the build was begun with: another gives other bytes."""
    here = available()
    begun = begun or here  # an earlier version did not say
    if begun == "torchcodec" and here != begun:
        raise UserError(
            f"{store.location}: split '{split}' was begun with torchcodec, which does not work here; install it "
            "(pip install 'craft-audio[torchcodec]'), or --overwrite"
        )
    if begun != here:
        log.warning("split '%s' was begun with %s and goes on with it, though %s works here; --overwrite begins anew "
                    "with %s", split, begun, here, here)  # fmt: skip
    return begun


def _look(work: _Work, merging: bool = False) -> None:
    """Finds which of our shards are still to be written: no record, a tar of another length, or changed sources.

    Sources are changed where their stamps differ from those when they were decoded (stamps.py). The machine that
    merges may hold copies of other times: there a file of the same size and another time is a warning.
    """
    tars = work.store.sizes()
    for plan, mine in zip(work.plans, work.mine, strict=True):
        records = work.store.sizes(f".build/{plan.split}")
        there = [number for number in mine if f"{number:06d}.parquet" in records]
        count = sum(len(plan.rows(number)) for number in there)
        with Sources(plan.catalog.root, count) as sources, ThreadPoolExecutor(RECORD_THREADS) as pool:
            states = pool.map(partial(_state, work.store, plan, tars, sources), there)
            found = dict(zip(there, states, strict=True))
        changes = {number: change for number, (_, change) in found.items() if change}
        changed = {number: change for number, change in changes.items() if not (merging and change.time_only)}
        touched = [change for number, change in changes.items() if number not in changed]
        whole = {number for number, (sound, _) in found.items() if sound and number not in changed}
        work.todo.append([number for number in mine if number not in whole])
        work.changed += changed.values()
        if changed and not merging:
            log.warning("split '%s': %d shards hold files that have changed since, such as %s: they are written again",
                        plan.split, len(changed), next(iter(changed.values())))  # fmt: skip
        if touched:
            log.warning("split '%s': %d shards hold files that are as long as when they were decoded, of another time, "
                        "such as %s: taken for copies; verify_shards.py --sources finds any of other content",
                        plan.split, len(touched), touched[0].path)  # fmt: skip


def _state(
    store: Store, plan: SplitPlan, tars: dict[str, int], sources: Sources, number: int
) -> tuple[bool, Change | None]:
    """Whether the tar of a shard that has a record is whole, and the worst change of its sources."""
    record = store.read(record_name(plan.split, number))
    facts = json.loads(pq.read_schema(io.BytesIO(record)).metadata[b"craft"])
    if "sources" not in facts or (facts["clips"] and tars.get(shard_name(plan.split, number)) != facts["size"]):
        return False, None
    paths = [plan.catalog.clips[row].path for row in plan.rows(number).tolist()]
    changes = sources.changed(paths, facts["sources"])
    return True, min(changes, key=lambda change: change.time_only, default=None)


def _write(work: _Work, workers: int, engine: str) -> None:
    plans, todo = work.plans, work.todo
    total = sum(len(p.rows(number)) for p, numbers in zip(plans, work.mine, strict=True) for number in numbers)
    left = sum(len(p.rows(number)) for p, numbers in zip(plans, todo, strict=True) for number in numbers)
    shards = (shard for p, numbers in zip(plans, todo, strict=True) for shard in p.shards(numbers))
    count = sum(map(len, todo))
    if not count:
        return
    try:
        with (
            tqdm(total=total, initial=total - left, unit="clip") as bar,
            closing(run(shards, max(1, min(workers, count)), engine)) as done,
        ):
            for shard in done:
                bar.update(len(shard.clips))
    except BaseException:  # Ctrl-C too: its workers are gone, and their half-written shards go after them
        work.store.clean({shard_name(p.split, n) for p, numbers in zip(plans, todo, strict=True) for n in numbers})
        raise


def _finish(catalog: Catalog, options: BuildOptions, work: _Work) -> Summary:
    manifest = work.earlier
    if work.plans or manifest is None:
        manifest = finish(catalog, work.store, options, work.plans, work.earlier)
    work.store.remove_tree(".build")
    return Summary(manifest, reasons(work.store, catalog.splits))


def _earlier(catalog: Catalog, store: Store, options: BuildOptions) -> Manifest | None:
    """The finished shards that are there already, checked to agree with the new ones."""
    if "manifest.json" not in store.sizes():
        return None
    manifest = load_manifest(store.location)
    audio = options.audio
    wanted = {
        "--sample-rate": (manifest.audio.sample_rate, audio.sample_rate),
        "--seconds": (manifest.audio.seconds, audio.seconds),
        "--mel-bins": (manifest.fbank.mel_bins, audio.mel_bins),
        "label vocabulary": (_names(manifest.labels), _names(catalog.labels)),
    }
    for name, (old, new) in wanted.items():
        if old != new:
            raise UserError(
                f"{store.location}: holds shards with {name} {old}, not {new}; use another --out, or --overwrite"
            )
    return manifest


def _compare(store: Store, split: str, old: dict[str, Any], new: dict[str, Any]) -> None:
    for name, value in new.items():
        if old.get(name) != value:
            how = f"{name} = {old.get(name)}, not {value}" if "the clips" not in name else f"other {name}"
            how = f"other {name}" if name in ("source files", "segments", "missing clips") else how
            raise UserError(
                f"{store.location}: split '{split}' was begun with {how}; repeat that command, use another --out, or "
                "--overwrite"
            )


def _erase(store: Store) -> None:
    """Deletes the products of builds, the manifest first: what is left is never taken for whole."""
    names = store.sizes()
    store.remove(name for name in ("manifest.json", "index.parquet", "failures.jsonl") if name in names)
    store.remove(name for name in names if name.endswith(".tar"))
    store.remove_tree(".build")


def _names(labels: Sequence[Any]) -> list[str]:
    return [label.id for label in labels]
