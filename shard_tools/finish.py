"""Records of finished shards -> index.parquet, failures.jsonl and, last, manifest.json.

In: the plans whose shards are all written, and the manifest of what was there before. Out: a `Manifest`.

The three are written aside first and then take the places of the earlier three, the manifest last (`switch`). Until
the new manifest is written aside nothing of what is there has changed; from then on a kill leaves a switch that the
next build completes (`settle`). So a split that is finished stays so while another one is built, whatever happens.
Done again it gives the same bytes. Rows pass through one row group at a time.
"""

import hashlib
import io
import json
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import ValidationError

from pipeline.data.fbank import FRAME_MS, HOP_MS, frame_count
from pipeline.data.manifest import FORMAT, VERSION, Manifest
from pipeline.data.storage import Location, join, read_bytes, sizes
from shard_tools.catalogs import Catalog
from shard_tools.index import IndexWriter, index_groups
from shard_tools.plan import BuildOptions, SplitPlan
from shard_tools.store import Store, sha256
from shard_tools.write import read_record, shard_name

log = logging.getLogger(__name__)

PRODUCTS = ("failures.jsonl", "index.parquet", "manifest.json")  # in the order in which they are replaced
SWITCH = ".build/.switch"  # no name of a split begins with a dot
READ_AHEAD = 16  # records in flight; from an object store the waiting is what costs


def finish(
    catalog: Catalog, store: Store, options: BuildOptions, plans: Sequence[SplitPlan], earlier: Manifest | None
) -> Manifest:
    """Writes the three files and returns the manifest.

    Args:
        catalog: Of the splits of `plans`.
        store: Of the shards.
        options: Of the build.
        plans: Splits whose shards are all written; one that `earlier` has too takes its place.
        earlier: What stays.
    """
    content = _beginning(catalog, options, earlier)
    new = {plan.split: plan for plan in plans}
    totals = _Totals(plans, len(catalog.labels))
    order = list(dict.fromkeys([*content["splits"], *new]))
    earlier_shards = content["shards"]
    content["shards"] = []
    with (
        store.temporary(f"{SWITCH}/index.parquet") as index,
        store.temporary(f"{SWITCH}/failures.jsonl") as failures,
    ):
        with failures.open("wb") as lines, IndexWriter(index) as rows:
            for split in order:
                if split not in new:
                    lines.writelines(_earlier_failures(store, split))
                    for table in _earlier_rows(store, earlier, split) if earlier else ():
                        rows.write(table)
                        totals.see(table)
                    content["shards"] += [shard for shard in earlier_shards if shard["split"] == split]
                    continue
                plan = new[split]
                for missing in catalog.missing.of(split):
                    lines.write(_line(missing.line()))
                for number, (table, facts) in enumerate(_records(store, plan)):
                    rows.write(table)
                    for failure in facts["failures"]:
                        lines.write(_line(failure))
                    totals.add(plan, number, table, facts)
                content["shards"] += [shard for shard in totals.shards if shard["split"] == split]
        content["single_label"] = totals.single_label
        for name, path in (("index", index), ("failures", failures)):
            with path.open("rb") as file:
                content[name] = {"size": path.stat().st_size, "sha256": sha256(file)}
        store.commit(failures, f"{SWITCH}/failures.jsonl")
        store.commit(index, f"{SWITCH}/index.parquet")
    for plan in plans:
        totals_of_split = totals.split(plan.split, catalog.listed(plan.split))
        content["splits"][plan.split] = totals_of_split | {"class_listed": catalog.class_listed(plan.split)}
        content["options"][plan.split] = plan.identity
    draft = Manifest.model_validate({**content, "digest": ""})
    manifest = draft.model_copy(update={"digest": draft.computed_digest()})
    store.write(f"{SWITCH}/manifest.json", render(manifest))
    switch(store, manifest, [] if earlier is None else [shard.name for shard in earlier.shards])
    return manifest


def switch(store: Store, manifest: Manifest, earlier: Sequence[str]) -> None:
    """Puts what was written aside into its place; done again after a kill it completes it.

    Args:
        store: Of the shards.
        manifest: What will be there.
        earlier: Names of the shards that were there.
    """
    names = {shard.name for shard in manifest.shards}
    for split in manifest.splits:
        for name in sorted(names.intersection(store.sizes(f".build/{split}"))):
            store.move(f".build/{split}/{name}", name)
    store.remove(name for name in earlier if name not in names)
    waiting = store.sizes(SWITCH)
    for name in PRODUCTS:
        if name in waiting:
            store.move(f"{SWITCH}/{name}", name)


def settle(store: Store) -> None:
    """Completes a switch that a kill interrupted; nothing else may be at work in the directory.

    Raises:
        OSError: something could not be written.
    """
    if "manifest.json" not in store.sizes(SWITCH):
        return
    manifest, there = _parse(store, f"{SWITCH}/manifest.json"), None
    if manifest is None:
        log.warning("%s: damaged: not used", join(store.location, f"{SWITCH}/manifest.json"))
    else:
        log.warning("%s: a build was stopped while it replaced index and manifest: completed now", store.location)
        there = _parse(store, "manifest.json") if "manifest.json" in store.sizes() else None
        switch(store, manifest, [] if there is None else [shard.name for shard in there.shards])
        for split in manifest.splits:
            store.remove_tree(f".build/{split}")
    store.remove_tree(SWITCH)


def _parse(store: Store, name: str) -> Manifest | None:
    """A manifest whose index may be elsewhere; None: damaged."""
    try:
        manifest = Manifest.model_validate_json(store.read(name))
    except ValidationError:
        return None
    return manifest if manifest.digest == manifest.computed_digest() else None


def damage(directory: Location, manifest: Manifest) -> dict[str, str]:
    """Files of finished shards that are not what the manifest lists, and how: by one listing and two small hashes.

    The content of the tars is not read; verify_shards.py does that.
    """
    there = sizes(directory)
    small = {"index.parquet": manifest.index, "failures.jsonl": manifest.failures}
    found = {}
    for name, record in {**small, **{shard.name: shard for shard in manifest.shards}}.items():
        if name not in there:
            found[name] = "missing"
        elif there[name] != record.size:
            found[name] = f"{there[name]} bytes, the manifest says {record.size}"
        elif name in small and hashlib.sha256(read_bytes(join(directory, name))).hexdigest() != record.sha256:
            found[name] = "damaged: its sha256 is not the manifest's"
    return found


def render(manifest: Manifest) -> bytes:
    """The bytes of manifest.json."""
    return (json.dumps(manifest.model_dump(mode="json"), indent=1, ensure_ascii=False) + "\n").encode()


def reasons(store: Store, splits: Sequence[str]) -> tuple[Counter[str], int]:
    """From failures.jsonl: some splits' failures by reason (up to the first colon), and clips of their second file."""
    lines = [line for line in map(json.loads, store.read("failures.jsonl").splitlines()) if line["split"] in splits]
    counts = Counter(line["reason"].split(":")[0] for line in lines if not line.get("used"))
    return counts, len(lines) - counts.total()


class _Totals:
    """Sums over the shards of each split."""

    def __init__(self, plans: Sequence[SplitPlan], classes: int) -> None:
        self.shards: list[dict[str, Any]] = []
        self.single_label = True  # as far as was seen
        self._sums = {plan.split: np.zeros(3) for plan in plans}
        self._seconds = {plan.split: 0.0 for plan in plans}
        self._silent = {plan.split: 0 for plan in plans}
        self._classes = {plan.split: np.zeros(classes, np.int64) for plan in plans}

    def add(self, plan: SplitPlan, number: int, table: pa.Table, facts: dict[str, Any]) -> None:
        self._sums[plan.split] += facts["sums"]
        self._silent[plan.split] += facts["silent"]
        self._seconds[plan.split] += float(np.sum(table["seconds"].to_numpy(), dtype=np.float64))
        labels = table["labels"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        counts = self._classes[plan.split]
        counts += np.bincount(labels, minlength=len(counts))
        self.see(table)
        if facts["clips"]:
            shard = {name: facts[name] for name in ("clips", "size", "sha256")}
            self.shards.append({"name": shard_name(plan.split, number), "split": plan.split, **shard})

    def see(self, table: pa.Table) -> None:
        """Rows of a split that stays."""
        self.single_label &= bool(pc.all(pc.equal(pc.list_value_length(table["labels"]), 1)).as_py() in (True, None))

    def split(self, name: str, listed: int) -> dict[str, Any]:
        count, total, square = self._sums[name]
        mean = total / count if count else 0.0
        shards = [shard for shard in self.shards if shard["split"] == name]
        return {
            "clips": sum(shard["clips"] for shard in shards),
            "listed": listed,
            "shards": len(shards),
            "seconds": self._seconds[name],
            "silent": self._silent[name],
            "class_clips": self._classes[name].tolist(),
            "fbank_mean": mean,
            "fbank_std": float(np.sqrt(max(square / count - mean**2, 1e-12))) if count else 1.0,
        }


def _beginning(catalog: Catalog, options: BuildOptions, earlier: Manifest | None) -> dict[str, Any]:
    audio = options.audio
    before = None if earlier is None else earlier.model_dump()
    return {
        "format": FORMAT,
        "version": VERSION,
        "dataset": catalog.dataset,
        "audio": {
            "sample_rate": audio.sample_rate,
            "seconds": audio.seconds,
            "samples": audio.samples,
            "encoding": "int16.npy",
        },
        "fbank": {
            "mel_bins": audio.mel_bins,
            "frames": frame_count(audio.samples, audio.sample_rate),
            "frame_ms": FRAME_MS,
            "hop_ms": HOP_MS,
            "encoding": "float16.npy",
        },
        "labels": [label.model_dump() for label in catalog.labels],
        "splits": before["splits"] if before else {},
        "shards": before["shards"] if before else [],
        "options": before["options"] if before else {},
    }


def _records(store: Store, plan: SplitPlan) -> Iterator[tuple[pa.Table, dict[str, Any]]]:
    """Every shard's record, in order, a few read ahead."""
    with ThreadPoolExecutor(READ_AHEAD) as pool:
        for first in range(0, len(plan), READ_AHEAD):
            numbers = range(first, min(first + READ_AHEAD, len(plan)))
            yield from pool.map(lambda number: read_record(store, plan.split, number), numbers)


def _line(failure: dict[str, Any]) -> bytes:
    """A line of failures.jsonl; a byte of a name that is not UTF-8 becomes JSON's escape of its surrogate."""
    return (json.dumps(failure, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")


def _earlier_failures(store: Store, split: str) -> Iterator[bytes]:
    with io.BytesIO(store.read("failures.jsonl")) as file:
        for line in file:
            if json.loads(line)["split"] == split:
                yield line


def _earlier_rows(store: Store, earlier: Manifest, split: str) -> Iterator[pa.Table]:
    for table in index_groups(store.location, earlier):
        yield table.filter(pc.equal(table["split"], split))
