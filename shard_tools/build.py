"""A catalog -> a directory of shards: plan, write what is not there yet, index, manifest last.

In: a `Catalog` and options. Out: tars, `index.parquet`, `failures.jsonl`, `manifest.json`.

The plan is a pure function of the catalog and the options (plan.py) and each shard is a pure function of
its plan (write.py). A finished shard has a record in `.build/`; a build that was killed goes on with
the shards that have none, or whose tar is not what the record says. The same holds for the parts of a
build cut by `Slice`, on any machines, which `merge` completes. Memory is that of the catalog (columns.py).

What is there is looked at first, and refused before anything is written: finished tars by their sizes, those of an
unfinished build by sizes and times too. A bit that flipped in one since is found by verify_shards.py, and by training.
Of other splits nothing changes, and no file that no build made is touched.
"""

import io
import json
import logging
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tqdm import tqdm

from pipeline.data.manifest import Manifest, ShardRecord, load_manifest
from pipeline.data.storage import Location, file_system, is_remote, join, local
from pipeline.errors import UserError
from pipeline.files import check_name, check_output_directory, sha256
from shard_tools.catalogs import Catalog
from shard_tools.columns import TEXT
from shard_tools.distribute import each, run
from shard_tools.ffmpeg_codecs import identity
from shard_tools.finish import SWITCH, damage, failure_lines, finish, reasons, rows_by_shard, settle
from shard_tools.lock import owner, slice_owner
from shard_tools.names import BETWEEN, INSIDE, PRODUCTS
from shard_tools.plan import BuildOptions, Slice, SplitPlan
from shard_tools.stamps import Change, Stamp, comparison, stamp
from shard_tools.store import Store, local_copies, seal, unseal
from shard_tools.write import (
    ShardPlan,
    left_out,
    moments,
    read_record,
    record_name,
    shard_name,
    shard_number,
    write_record,
)

log = logging.getLogger(__name__)

RECORD_THREADS = 16  # records are small; from an object store the waiting is what costs
RECORD = re.compile(r"(\d{6,})\.record")
# A finished shard that stays, its index rows, and its lines of failures.jsonl.
Compared = Callable[[Sequence[str], Sequence[Stamp]], list[Change]]  # `comparison`
Adoption = tuple[ShardPlan, ShardRecord, pa.Table, list[dict[str, Any]]]


@dataclass(slots=True)
class Summary:
    """What a build did.

    Attributes:
        manifest: Of the whole directory.
        failures: Reasons (up to the first colon) and how many listed clips of the catalog's splits each cost.
        replaced: Clips of these splits that come from another file than their first, which cannot be decoded.
    """

    manifest: Manifest
    failures: Counter[str]
    replaced: int

    @property
    def silent(self) -> int:
        """Stored clips of all splits that are digital silence."""
        return sum(split.silent for split in self.manifest.splits.values())


def build(
    catalog: Catalog,
    out: Location,
    options: BuildOptions,
    workers: int,
    overwrite: bool = False,
    engine: str = "process",
    retry: bool = False,
) -> Summary:
    """Builds all splits of the catalog into `out`, going on where an earlier attempt stopped.

    Splits that `out` already holds stay; a split built before with the same options is not built again, and its sources
    are not looked at: the stamps go with the records, as shards outlive their sources (repair.py: `compare`).

    Args:
        catalog: What to build.
        out: Where to.
        options: How.
        workers: Processes.
        overwrite: The catalog's splits are built anew; others stay, and so do files that no build made.
        engine: See `distribute.run`.
        retry: Shards in which clips failed are written again, of finished splits too; those keep their shards until
            the new ones are all there. That reads the split's other shards once.

    Raises:
        UserError: `out` holds shards of another format, vocabulary or options, damaged ones, or files that no build
            made under a name that is needed; or is being built; or no clip of a split could be stored.
        OSError: something could not be written.
    """
    plans = [SplitPlan(catalog, split, out, options) for split in catalog.splits]
    with _held(catalog, out, options, plans, overwrite, retry) as store:
        if overwrite:
            _erase(catalog, store, options, plans)
        earlier, new = _begin(catalog, store, options, plans, retry)
        store.clean({*PRODUCTS, *(plan.name(number) for plan in plans for number in range(len(plan)))})
        if earlier is not None:
            _adopt(store, earlier, new, workers)
        _look(store, new, retry)
        _write(store, new, workers, engine)
        _look_again(store, new)
        return _finish(catalog, options, store, earlier, new)


def build_slice(
    catalog: Catalog,
    out: Location,
    options: BuildOptions,
    workers: int,
    part: Slice,
    engine: str = "process",
    retry: bool = False,
) -> int:
    """Writes one slice's shards and no index; returns how many shards the slice has. `merge` completes the build.

    Raises:
        UserError, OSError: as `build`.
    """
    plans = [SplitPlan(catalog, split, out, options) for split in catalog.splits]
    with _held(catalog, out, options, plans, shared=True) as store:
        _, new = _begin(catalog, store, options, plans, retry=False)
        first, taken = 0, []
        for plan in new:
            plan.mine = [number for number in plan.mine if (first + number) % part.count == part.number - 1]
            taken += [first + number for number in plan.mine]
            first += len(plan)
        with slice_owner(out, part, taken):
            store.clean(_names(new))
            _look(store, new, retry)
            _write(store, new, workers, engine)
            _look_again(store, new)
        for plan in new:  # in an object store another one may have begun in the same moment
            _open(store, plan)
        return len(taken)


def merge(catalog: Catalog, out: Location, options: BuildOptions) -> Summary:
    """Completes a build whose slices are done: index, failures, manifest.

    Raises:
        UserError: shards are still missing, or hold sources that have changed since they were decoded.
    """
    plans = [SplitPlan(catalog, split, out, options) for split in catalog.splits]
    with _held(catalog, out, options, plans) as store:
        earlier, new = _begin(catalog, store, options, plans, retry=False)
        changed = _look(store, new, merging=True)
        if changed:
            raise UserError(
                f"{out}: {len(changed)} shards hold files that have changed since a slice decoded them, such as "
                f"{changed[0]}; put the files back, or run the slices again, which write these shards anew; then "
                "--merge"
            )
        lacking = [plan.name(number) for plan in new for number in plan.todo]
        if lacking:
            total = sum(map(len, new))
            raise UserError(
                f"{out}: {len(lacking)} of {total} shards are not written yet, such as {lacking[0]}; run (again) the "
                "slices that did not end, then --merge"
            )
        store.clean({*PRODUCTS, *_names(new)})
        return _finish(catalog, options, store, earlier, new)


@contextmanager
def _held(
    catalog: Catalog,
    out: Location,
    options: BuildOptions,
    plans: Sequence[SplitPlan],
    overwrite: bool = False,
    retry: bool = False,
    shared: bool = False,
) -> Iterator[Store]:
    """The directory for us alone, or for slices; nothing is written where it can be refused without the lock."""
    repeat = catalog.clips.repeat()
    if repeat is not None:
        raise UserError(
            f"{repeat[0].path} and {repeat[1].path} get the same key '{repeat[0].key}'; give them a key column"
        )
    _refuse_late_events(catalog, options)
    for split in catalog.splits:
        check_name(split, "split")
    for label in catalog.labels:
        try:
            f"{label.id}{label.name}".encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"label {label.name!r}: the name is not UTF-8; rename its folder, or correct the table"
            ) from error
    store = Store(out)
    if not is_remote(out):
        check_output_directory(local(out), "--out")
        for split in catalog.splits:
            if (local(out) / ".build" / split).is_symlink():
                raise UserError(f"{local(out) / '.build' / split}: is a link to elsewhere; move it away")
        if not (local(out) / ".build").exists():  # nobody is at work here
            if overwrite:
                _replaced(catalog, store, options, plans)
            else:
                _compared(catalog, store, options, plans, retry)
    with owner(out, shared):
        if not shared:
            settle(store)
        yield store


def _refuse_late_events(catalog: Catalog, options: BuildOptions) -> None:
    """Raises UserError: a sound event begins after what is stored of its clip, which would have its label."""
    seconds, events = options.audio.seconds, catalog.clips.table["events"]
    onsets = pc.list_element(pc.list_flatten(events), 0)
    late = pc.greater_equal(onsets, seconds)
    if pc.any(late).as_py():
        rows = pc.list_parent_indices(events).filter(late)
        (clip,) = catalog.clips.at([rows[0].as_py()])
        onset, _, label = next(event for event in clip.events if event[0] >= seconds)
        raise UserError(
            f"{clip.path}: event '{catalog.labels[label].name}' begins at {onset:g} s, and of a clip {seconds:g} s are "
            f"stored (so of {pc.count_distinct(rows).as_py()} clips in all): give more --seconds, or list segments, "
            "each with its own labels, in a table with start and end (--dataset csv)"
        )


def _begin(
    catalog: Catalog, store: Store, options: BuildOptions, plans: Sequence[SplitPlan], retry: bool
) -> tuple[Manifest | None, list[SplitPlan]]:
    """Checks that the build fits what is there, and writes down what it is; what is finished, and the rest's plans."""
    earlier, new = _compared(catalog, store, options, plans, retry)
    for plan in new:
        _open(store, plan)
    for split in catalog.splits:
        if all(split != plan.split for plan in new):
            log.info("split '%s' is finished: nothing to do (tars were compared by their sizes; verify_shards.py reads "
                     "them, and with --sources says whether files have changed)", split)  # fmt: skip
    return earlier, new


def _compared(
    catalog: Catalog, store: Store, options: BuildOptions, plans: Sequence[SplitPlan], retry: bool
) -> tuple[Manifest | None, list[SplitPlan]]:
    """What is finished, and the plans of what is not; writes nothing.

    Raises:
        UserError: what is there is of another build, of none, or damaged.
    """
    earlier = _earlier(catalog, store, options)
    new = []
    for plan in plans:
        if earlier is not None and plan.split in earlier.splits:
            _compare(store, plan.split, earlier.options.get(plan.split, {}), plan.identity)
            clips = {shard.name: shard.clips for shard in earlier.shards}
            lacking = [n for n in range(len(plan)) if clips.get(plan.name(n), 0) != len(plan.rows(n))]
            if retry and lacking:
                _refuse_foreign(store, {plan.name(number) for number in lacking} - clips.keys())
                plan.staged, plan.mine = frozenset(lacking), lacking
                new.append(plan)
            continue
        new.append(plan)
        begun = _begun(store, plan.split)
        if begun:
            _compare(store, plan.split, begun["identity"], plan.identity)
        elif begun is None:
            names = {plan.name(number) for number in range(len(plan))} | set(PRODUCTS if earlier is None else ())
            _refuse_foreign(store, names)
    return earlier, new


def _refuse_foreign(store: Store, names: Collection[str]) -> None:
    """Raises UserError: a file that no build made has one of these names, which are needed."""
    foreign = sorted(store.sizes().keys() & names)
    if foreign:
        more, them = (f" and {len(foreign) - 1} more files", "them") if len(foreign) > 1 else ("", "it")
        raise UserError(
            f"{store.location}: holds {foreign[0]}{more}, of which no manifest and no unfinished build knows; move "
            f"{them} away, or use another --out"
        )


def _begun(store: Store, split: str) -> dict[str, Any] | None:
    """What an unfinished build is; None: there is none; empty: the file is damaged, or an earlier version's."""
    names = store.sizes(f".build/{split}")
    if "plan" not in names:
        return {} if "plan.json" in names else None
    try:
        content: dict[str, Any] = json.loads(unseal(store.read(f".build/{split}/plan")))
    except ValueError:
        return {}
    return content


def _unfinished(store: Store, split: str) -> set[str]:
    """Names of the shards that an unfinished build of a split has, or was going to write: no file had them before."""
    begun = _begun(store, split)
    if begun:
        identity = begun["identity"]
        return {shard_name(split, n) for n in range(math.ceil(identity["clips found"] / identity["clips_per_shard"]))}
    records = map(RECORD.fullmatch, store.sizes(f".build/{split}"))
    return {shard_name(split, int(found[1])) for found in records if found}


def _open(store: Store, plan: SplitPlan) -> None:
    """Writes down what the build of a split is, or finds that it is the one that was begun."""
    begun = _begun(store, plan.split)
    if not begun:
        name = f".build/{plan.split}/plan"
        content = seal(json.dumps({"identity": plan.identity, "decoder": identity()}).encode())
        if begun is None:
            store.create(name, content)
        else:
            log.warning("%s: damaged, or of an earlier version: shards that do not fit this command are written again",
                        join(store.location, name))  # fmt: skip
            store.write(name, content)
        begun = _begun(store, plan.split) or {}
    _compare(store, plan.split, begun["identity"], plan.identity)
    if begun["decoder"] != identity():
        raise UserError(
            f"{store.location}: split '{plan.split}' was begun with the decoder {begun['decoder']}, not {identity()}, "
            f"which may give other samples; use another --out, or begin anew with --overwrite"
        )


def _adopt(store: Store, earlier: Manifest, new: Sequence[SplitPlan], workers: int) -> None:
    """Records of the finished shards that stay where others of their split are written again."""
    plans = {plan.split: plan for plan in new if plan.staged}
    if not plans:
        return
    lines = [line for line in map(json.loads, failure_lines(store)) if line.get("used")]
    shards = {shard.name: shard for shard in earlier.shards}

    def tasks() -> Iterator[Adoption]:
        for name, rows in rows_by_shard(store.location, earlier):
            shard = shards.get(name)
            if shard is not None and shard.split in plans:
                number = shard_number(shard.split, name)
                if number not in plans[shard.split].staged:
                    keys = set(rows["key"].to_pylist()) if lines else set()
                    kept = [line for line in lines if line["split"] == shard.split and line["key"] in keys]
                    yield replace(plans[shard.split].shard(number), clips=()), shard, rows, kept

    for problem in filter(None, each(adopt, tasks(), workers)):
        raise UserError(f"{store.location}: {problem}; verify_shards.py --repair mends it")


def adopt(task: Adoption) -> str | None:
    """Writes the record of one finished shard, read from its tar; or says what is wrong with it."""
    plan, shard, rows, failures = task
    where, store = join(plan.out, plan.name), Store(plan.out)
    sums, silent, rests = np.zeros(3), 0, list[float]()
    if plan.record.rpartition("/")[2] in store.sizes(f".build/{plan.split}"):
        with suppress(ValueError):  # of an attempt that was stopped
            if read_record(store, plan.split, plan.number)[1]["build"] == plan.build:
                return None
    for copy in local_copies([where]):
        if isinstance(copy, OSError):
            return f"{plan.name}: unreadable: {copy}"
        with open(copy, "rb") as file:
            if sha256(file) != shard.sha256:
                return f"{plan.name}: damaged: its sha256 is not the manifest's"
            for row in rows.to_pylist():
                file.seek(row["fbank_offset"])
                sums += moments(np.load(io.BytesIO(file.read(row["fbank_size"])), allow_pickle=False))
                file.seek(row["json_offset"])
                about = json.loads(file.read(row["json_size"]))
                silent += bool(about["silent"])
                rests += filter(None, [left_out(about, plan.audio.seconds)])
    facts = {"clips": shard.clips, "size": shard.size, "sha256": shard.sha256, "sums": sums.tolist(), "silent": silent,
             "longer": [len(rests), sum(rests)], "failures": failures, "sources": None,
             "stamp": stamp(where)}  # fmt: skip
    write_record(store, plan, rows.to_pylist(), facts)
    return None


def _look(store: Store, plans: Sequence[SplitPlan], retry: bool = False, merging: bool = False) -> list[Change]:
    """Finds which of our shards are still to be written: no record, another tar than its record's, or changed sources.

    Sources are changed where their stamps differ from those when they were decoded (stamps.py). The machine that
    merges may hold copies of other times: there a file of the same size and another time is a warning.

    Returns:
        The worst change of each shard whose sources have changed.
    """
    tars, all_changed = store.stamps(), []
    for plan in plans:
        aside = store.stamps(f".build/{plan.split}")
        there = [number for number in plan.mine if f"{number:06d}.record" in aside]
        count = sum(len(plan.rows(number)) for number in there)
        with comparison(plan.catalog.root, count) as compared, ThreadPoolExecutor(RECORD_THREADS) as pool:
            states = list(pool.map(partial(_state, store, plan, retry, tars, aside, compared), there))
        whole, changed, touched = set(), [], []
        for number, (sound, change) in zip(there, states, strict=True):
            if change is not None and not (merging and change.time_only):
                changed.append(change)
                continue
            whole |= {number} if sound else set()
            touched += [change] if change is not None else []
        plan.todo = [number for number in plan.mine if number not in whole]
        all_changed += changed
        if changed and not merging:
            log.warning("split '%s': %d shards hold files that have changed since, such as %s: they are written again",
                        plan.split, len(changed), changed[0])  # fmt: skip
        if touched:
            log.warning("split '%s': %d shards hold files that are as long as when they were decoded, of another time, "
                        "such as %s: taken for copies; verify_shards.py --sources finds any of other content",
                        plan.split, len(touched), touched[0].path)  # fmt: skip
    return all_changed


def _state(
    store: Store, plan: SplitPlan, retry: bool, tars: dict[str, Stamp], aside: dict[str, Stamp], compared: Compared,
    number: int,
) -> tuple[bool, Change | None]:  # fmt: skip
    """Whether a shard that has a record is whole and of this build, and the worst change of its sources."""
    try:
        _, facts = read_record(store, plan.split, number)
    except ValueError as error:
        log.warning("%s: %s: its shard is written again", join(store.location, record_name(plan.split, number)), error)
        return False, None
    lacking = facts["clips"] < len(plan.rows(number))
    if facts["build"] != plan.digest or (retry and lacking and not plan.staged):
        return False, None
    if facts["clips"]:
        staged, name = number in plan.staged, plan.name(number)
        now = (aside if staged else tars).get(name)
        where = join(store.location, f".build/{plan.split}/{name}" if staged else name)
        if now is None or now[0] != facts["size"] or (now != facts["stamp"] and _hash(where) != facts["sha256"]):
            return False, None
    return True, _changed(plan, number, facts, compared)


def _hash(where: str) -> str:
    """sha256 of a file that has another time than when it was written."""
    for copy in local_copies([where]):
        if isinstance(copy, OSError):
            raise copy
        with open(copy, "rb") as file:
            return sha256(file)
    raise AssertionError("unreachable")


def _changed(plan: SplitPlan, number: int, facts: dict[str, Any], compared: Compared) -> Change | None:
    """The worst change of a shard's sources since they were decoded."""
    if facts["sources"] is None:  # adopted
        return None
    clips = plan.catalog.clips.at(plan.rows(number))
    paths, stamps = [clip.path for clip in clips], list(facts["sources"])
    for place, other, now in facts.get("tried", []):
        paths.append(clips[place].others[other].path)
        stamps.append(now)
    return min(compared(paths, stamps), key=lambda change: change.time_only, default=None)


def _look_again(store: Store, plans: Sequence[SplitPlan]) -> None:
    """Says which sources changed while they were being decoded: which of the two contents a shard holds is open."""
    for plan in plans:
        count = sum(len(plan.rows(number)) for number in plan.todo)
        with comparison(plan.catalog.root, count) as compared, ThreadPoolExecutor(RECORD_THREADS) as pool:

            def look(number: int, plan: SplitPlan = plan, compared: Compared = compared) -> Change | None:
                return _changed(plan, number, read_record(store, plan.split, number)[1], compared)

            try:
                changes = list(filter(None, pool.map(look, plan.todo)))
            except UserError as error:
                log.warning("split '%s': whether files changed meanwhile is not known: %s", plan.split, error)
                continue
        if changes:
            named = ", ".join(map(str, changes[:3]))
            log.warning("split '%s': files of %d shards changed while they were read, such as %s; what the shards hold "
                        "may be old or new: when the files are at rest, build with --overwrite",
                        plan.split, len(changes), named)  # fmt: skip


def _write(store: Store, plans: Sequence[SplitPlan], workers: int, engine: str) -> None:
    total = sum(len(plan.rows(number)) for plan in plans for number in plan.mine)
    left = sum(len(plan.rows(number)) for plan in plans for number in plan.todo)
    shards = (plan.shard(number) for plan in plans for number in plan.todo)
    count = sum(len(plan.todo) for plan in plans)
    if not count:
        return
    try:
        with (
            tqdm(total=total, initial=total - left, unit="clip") as bar,
            closing(run(shards, max(1, min(workers, count)), engine)) as done,
        ):
            for shard in done:
                bar.update(len(shard.clips))
    finally:  # of workers that were killed; on Ctrl-C, of all
        store.clean({plan.name(number) for plan in plans for number in plan.todo})


def _names(plans: Sequence[SplitPlan]) -> set[str]:
    """Of the tars that this process may write."""
    return {plan.name(number) for plan in plans for number in plan.mine}


def _finish(
    catalog: Catalog, options: BuildOptions, store: Store, earlier: Manifest | None, plans: Sequence[SplitPlan]
) -> Summary:
    there = store.sizes()
    full: list[SplitPlan] = []
    empty: list[SplitPlan] = []
    for plan in plans:
        tars = there | store.sizes(f".build/{plan.split}")
        (full if any(plan.name(number) in tars for number in range(len(plan))) else empty).append(plan)
    if full and store.remote and _earlier(catalog, store, options) != earlier:  # nothing is locked there
        raise UserError(
            f"{store.location}: another build ended here meanwhile; run the same command again, which joins the two"
        )
    manifest = finish(catalog, store, options, full, earlier) if full else earlier
    for split in catalog.splits:
        if all(split != plan.split for plan in empty):
            store.remove_tree(f".build/{split}")
    store.remove_tree(SWITCH)
    if empty or manifest is None:
        raise UserError("; ".join(_why_empty(catalog, store, plan) for plan in empty))
    return Summary(manifest, *reasons(store, catalog.splits))


def _why_empty(catalog: Catalog, store: Store, plan: SplitPlan) -> str:
    """Why nothing of a split is stored."""
    failures = list(catalog.missing.of(plan.split))
    counts = Counter(failure.reason.split(":")[0] for failure in failures)
    example = f"{failures[0].id}: {failures[0].reason}" if failures else ""
    for number in range(len(plan)):
        for failure in read_record(store, plan.split, number)[1]["failures"]:
            counts[failure["reason"].split(":")[0]] += 1
            example = f"{failure['path']}: {failure['reason']}"
    told = ", ".join(f"{count} {kind}" for kind, count in counts.most_common(3))
    return (
        f"{store.location}: split '{plan.split}': none of its {catalog.listed(plan.split)} listed clips could be "
        f"stored ({told}), such as {example}; mend files or paths, then run the same command with --retry-failures"
    )


def _earlier(catalog: Catalog, store: Store, options: BuildOptions) -> Manifest | None:
    """The finished shards that are there already, checked to be whole and to agree with the new ones."""
    if "manifest.json" not in store.sizes():
        return None
    manifest = load_manifest(store.location)
    other = _other_format(catalog, manifest, options)
    if other is not None:
        raise UserError(f"{store.location}: holds shards with {other}; use another --out, or --overwrite")
    _refuse_damage(store, manifest)
    return manifest


def _other_format(catalog: Catalog, manifest: Manifest, options: BuildOptions) -> str | None:
    """What keeps the catalog's shards from lying in one directory with those of a manifest."""
    audio = options.audio
    wanted = {
        "--sample-rate": (manifest.audio.sample_rate, audio.sample_rate),
        "--seconds": (manifest.audio.seconds, audio.seconds),
        "--mel-bins": (manifest.fbank.mel_bins, audio.mel_bins),
        "label vocabulary": ([label.id for label in manifest.labels], [label.id for label in catalog.labels]),
    }
    return next((f"{name} {old}, not {new}" for name, (old, new) in wanted.items() if old != new), None)


def _refuse_damage(store: Store, manifest: Manifest) -> None:
    found = damage(store.location, manifest)
    if found:
        name, how = next(iter(found.items()))
        raise UserError(
            f"{store.location}: {len(found)} files of finished splits are damaged, such as {name}: {how}; mend them "
            f"with verify_shards.py {store.location} --repair --audio-root DIR, or build the splits with --overwrite"
        )


def _compare(store: Store, split: str, old: dict[str, Any], new: dict[str, Any]) -> None:
    for name, value in new.items():
        if old.get(name) != value:
            how = f"{name} = {old.get(name)}, not {value}" if "the clips" not in name else f"other {name}"
            how = f"other {name}" if name in ("source files", "segments", "missing clips") else how
            raise UserError(
                f"{store.location}: split '{split}' was begun with {how}; repeat that command, use another --out, or "
                "--overwrite"
            )


def _replaced(
    catalog: Catalog, store: Store, options: BuildOptions, plans: Sequence[SplitPlan]
) -> tuple[Manifest | None, set[str]]:
    """What of the finished splits stays when the catalog's are built anew (None: none), and which files go.

    A name alone does not make a file ours: others write train-000000.tar too. The manifest does, or `.build`.

    Raises:
        UserError: other splits would be lost, or files that no build made, or the catalog's own sources.
    """
    manifest, stays = None, None
    if "manifest.json" in store.sizes():
        try:
            manifest = load_manifest(store.location)
        except UserError as error:
            raise UserError(
                f"{error}; --overwrite removes only what a manifest lists, and this one cannot be read: use another "
                "--out, or move manifest.json and the files that it listed away"
            ) from error
    names = {name for split in catalog.splits for name in _unfinished(store, split)}
    if manifest is not None:
        names |= {shard.name for shard in manifest.shards if shard.split in catalog.splits}
        stays = _others(catalog, store, options, manifest)
    needed = {plan.name(number) for plan in plans for number in range(len(plan))}
    if stays is None:
        needed |= set(PRODUCTS)
        names |= set(PRODUCTS if manifest is not None or names else ())
    _refuse_foreign(store, needed - names)
    names &= store.sizes().keys()
    _refuse_sources(catalog, store, names)
    return stays, names


def _others(catalog: Catalog, store: Store, options: BuildOptions, manifest: Manifest) -> Manifest | None:
    """The manifest without the catalog's splits; None: it has no others.

    Raises:
        UserError: the others are damaged, or the catalog's shards cannot lie beside theirs.
    """
    mine = set(catalog.splits)
    others = [split for split in manifest.splits if split not in mine]
    if not others:
        return None
    other = _other_format(catalog, manifest, options)
    if other is not None:
        raise UserError(
            f"{store.location}: holds split '{others[0]}', which this command does not build, with {other}; use "
            "another --out"
        )
    stays = {
        "splits": {name: record for name, record in manifest.splits.items() if name not in mine},
        "options": {name: record for name, record in manifest.options.items() if name not in mine},
        "shards": [shard for shard in manifest.shards if shard.split not in mine],
    }
    rest = manifest.model_copy(update=stays)
    _refuse_damage(store, rest)
    return rest


def _refuse_sources(catalog: Catalog, store: Store, names: Collection[str]) -> None:
    """Raises UserError: one of these files holds clips of the catalog."""

    def place(where: str) -> str:
        return file_system(where)[1] if is_remote(where) else os.path.realpath(local(where))

    going = {place(join(store.location, name)): name for name in sorted(names)}
    table = catalog.clips.table
    further = pc.struct_field(pc.list_flatten(table["others"]), "path")
    paths = pa.chunked_array([*table["path"].chunks, *further.chunks], TEXT)
    inside = pc.replace_substring_regex(paths.filter(pc.match_substring(paths, BETWEEN)), rf"(?is)^{INSIDE.pattern}$",
                                        r"\1")  # fmt: skip
    for content in pc.unique(inside).to_pylist():
        container = content.decode("utf-8", "surrogateescape")
        where = container if container.startswith("/") or is_remote(container) else join(catalog.root, container)
        if place(where) in going:
            raise UserError(
                f"{store.location}: --overwrite would remove {going[place(where)]}, which holds clips that are to be "
                "built; use another --out, or move it away"
            )


def _erase(catalog: Catalog, store: Store, options: BuildOptions, plans: Sequence[SplitPlan]) -> None:
    """Removes the catalog's splits; what says that their shards are ours goes last, so a kill leaves none unknown."""
    stays, names = _replaced(catalog, store, options, plans)
    store.remove(sorted(names.difference(PRODUCTS)))
    if stays is not None:
        finish(catalog, store, options, [], stays)
        store.remove_tree(SWITCH)
    store.remove(name for name in PRODUCTS if name in names)
    for split in catalog.splits:
        store.remove_tree(f".build/{split}")
