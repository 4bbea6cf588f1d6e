"""Records of finished shards -> index.parquet, failures.jsonl and, last, manifest.json; and what reads them again.

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
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import ValidationError

from pipeline.data.fbank import FRAME_MS, HOP_MS, frame_count
from pipeline.data.manifest import FORMAT, INDEX_SCHEMA, VERSION, Manifest, open_checked
from pipeline.data.storage import Location, join, read_bytes, sizes
from pipeline.errors import UserError
from pipeline.files import sha256
from shard_tools.catalogs import Catalog
from shard_tools.names import PRODUCTS
from shard_tools.plan import BuildOptions, SplitPlan
from shard_tools.store import Store
from shard_tools.write import read_record

log = logging.getLogger(__name__)

SWITCH = ".build/.switch"  # no name of a split begins with a dot
ROW_GROUP = 1 << 12  # rows that a loader decodes to get at a shard's
PLAIN = pa.schema([(f.name, f.type.value_type if pa.types.is_dictionary(f.type) else f.type) for f in INDEX_SCHEMA])
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
    before, content["shards"], content["single_label"] = content["shards"], [], True
    with (
        store.temporary(f"{SWITCH}/index.parquet") as index,
        store.temporary(f"{SWITCH}/failures.jsonl") as failures,
    ):
        with failures.open("wb") as lines, IndexWriter(index) as rows:

            def add(table: pa.Table) -> None:
                rows.write(table)
                single = pc.all(pc.equal(pc.list_value_length(table["labels"]), 1)).as_py()
                content["single_label"] &= single is not False  # None: no rows

            for split in dict.fromkeys([*content["splits"], *new]):
                if split in new:
                    content["splits"][split], shards = _add_split(catalog, store, new[split], add, lines)
                    content["options"][split] = new[split].identity
                else:
                    shards = [shard for shard in before if shard["split"] == split]
                    lines.writelines(line for line in failure_lines(store) if json.loads(line)["split"] == split)
                    for table in index_groups(store.location, earlier) if earlier else ():
                        add(table.filter(pc.equal(table["split"], split)))
                content["shards"] += shards
        for name, path in (("index", index), ("failures", failures)):
            with path.open("rb") as file:
                content[name] = {"size": path.stat().st_size, "sha256": sha256(file)}
        store.commit(failures, f"{SWITCH}/failures.jsonl")
        store.commit(index, f"{SWITCH}/index.parquet")
    draft = Manifest.model_validate({**content, "digest": ""})
    manifest = draft.model_copy(update={"digest": draft.computed_digest()})
    store.write(f"{SWITCH}/manifest.json", render(manifest))
    switch(store, manifest, [] if earlier is None else [shard.name for shard in earlier.shards])
    return manifest


def _add_split(
    catalog: Catalog, store: Store, plan: SplitPlan, add: Callable[[pa.Table], None], lines: BinaryIO
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Adds a new split's rows and failures; returns its totals and its shards for the manifest."""
    shards: list[dict[str, Any]] = []
    sums, seconds, silent, classes = np.zeros(3), 0.0, 0, np.zeros(len(catalog.labels), np.int64)
    longer, beyond = 0, 0.0
    for missing in catalog.missing.of(plan.split):
        lines.write(_line(missing.line()))
    for number, (table, facts) in enumerate(_records(store, plan)):
        add(table)
        for failure in facts["failures"]:
            lines.write(_line(failure))
        sums += facts["sums"]
        silent += facts["silent"]
        clips, rest = facts.get("longer", (0, 0.0))  # earlier versions did not count them
        longer, beyond = longer + clips, beyond + rest
        seconds += float(np.sum(table["seconds"].to_numpy(), dtype=np.float64))
        labels = table["labels"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        classes += np.bincount(labels, minlength=len(classes))
        if facts["clips"]:
            kept = {name: facts[name] for name in ("clips", "size", "sha256")}
            shards.append({"name": plan.name(number), "split": plan.split, **kept})
    if longer:
        left = f"{beyond / 3600:.1f} h" if beyond >= 3600 else f"{beyond:.0f} s"
        log.warning("split '%s': %d clips are longer than the %g s that are stored: %s after these are left out; give "
                    "more --seconds, or list segments in a table with start and end (--dataset csv)",
                    plan.split, longer, plan.options.audio.seconds, left)  # fmt: skip
    count, total, square = sums
    mean = total / count if count else 0.0
    totals = {
        "clips": sum(shard["clips"] for shard in shards),
        "listed": catalog.listed(plan.split),
        "shards": len(shards),
        "seconds": seconds,
        "silent": silent,
        "class_clips": classes.tolist(),
        "class_listed": catalog.class_listed(plan.split),
        "fbank_mean": mean,
        "fbank_std": float(np.sqrt(max(square / count - mean**2, 1e-12))) if count else 1.0,
    }
    return totals, shards


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
    counts, replaced = Counter[str](), 0
    for line in map(json.loads, failure_lines(store)):
        if line["split"] in splits and line.get("used"):
            replaced += 1
        elif line["split"] in splits:
            counts[line["reason"].split(":")[0]] += 1
    return counts, replaced


def failure_lines(store: Store) -> Iterator[bytes]:
    """Lines of failures.jsonl, with their ends, one at a time: there are millions where few of the listed files are."""
    yield from io.BytesIO(store.read("failures.jsonl"))


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
        **({} if catalog.labels else {"unlabelled": True}),
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


class IndexWriter:
    """index.parquet in row groups of one size; use it in `with`."""

    def __init__(self, path: Any) -> None:
        self._writer = pq.ParquetWriter(path, INDEX_SCHEMA, compression="zstd")
        self._waiting = PLAIN.empty_table()

    def __enter__(self) -> "IndexWriter":
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is None:
            self._flush(1)
        self._writer.close()

    def write(self, table: pa.Table) -> None:
        """Adds rows."""
        self._waiting = pa.concat_tables([self._waiting, table.cast(PLAIN)])
        self._flush(ROW_GROUP)

    def _flush(self, least: int) -> None:
        while len(self._waiting) >= least:
            # Encoded here: dictionaries of the parts differ with how the rows came.
            group = self._waiting.slice(0, ROW_GROUP).combine_chunks().cast(INDEX_SCHEMA)
            self._writer.write_table(group, row_group_size=ROW_GROUP)
            self._waiting = self._waiting.slice(ROW_GROUP)


def index_groups(location: Location, manifest: Manifest) -> Iterator[pa.Table]:
    """Row groups of the index.parquet that the manifest lists, one at a time, without dictionaries (PLAIN).

    Raises:
        UserError: it is another one, damaged, or no index.
    """
    try:
        with pq.ParquetFile(open_checked(location, "index.parquet", manifest.index)) as file:
            for number in range(file.num_row_groups):
                yield file.read_row_group(number).cast(PLAIN)
    except (OSError, ValueError, pa.ArrowException) as error:  # ValueError: other columns
        raise UserError(f"{join(location, 'index.parquet')}: {error}; build the shards again") from error


def rows_by_shard(location: Location, manifest: Manifest) -> Iterator[tuple[str, pa.Table]]:
    """Rows that follow one another and are of one shard, with its name; all rows, in order.

    Raises:
        UserError: as `index_groups`.
    """
    waiting = PLAIN.empty_table()
    for group in index_groups(location, manifest):
        waiting = pa.concat_tables([waiting, group])
        while len(waiting):
            name = waiting["shard"][0].as_py()
            count = pc.index(pc.equal(waiting["shard"], name), False).as_py()
            if count < 0:
                break  # it may go on in the next row group
            yield name, waiting.slice(0, count)
            waiting = waiting.slice(count)
    if len(waiting):
        yield waiting["shard"][0].as_py(), waiting
