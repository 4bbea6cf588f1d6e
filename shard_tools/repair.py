"""Damaged shards -> whole ones: tars from the sources, the index from the tars; sound ones compared with the sources.

In: what verify_shards.py found. Out: files that are what the manifest lists, or a line that says why not.

A tar is replaced only by the very bytes that the manifest lists. The index can be made from the tars, as
each clip's json holds all that is in its row; where another version of Parquet's writer gives other
bytes for the same rows, the manifest's record of the index is renewed with it.
"""

import hashlib
import json
import os
import tarfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

import pyarrow as pa
import xxhash

from pipeline.data.manifest import INDEX_SCHEMA, FileRecord, Manifest, load_manifest
from pipeline.data.storage import Location, is_remote, join
from pipeline.files import sha256
from pipeline.flow import Clip
from shard_tools.distribute import each
from shard_tools.finish import IndexWriter, failure_lines, render, rows_by_shard
from shard_tools.names import PRODUCTS
from shard_tools.plan import EVENTS
from shard_tools.segment import MachineError
from shard_tools.store import Store, local_copies
from shard_tools.write import BLOCK, EXTENSIONS, MEMBERS, AudioOptions, ShardPlan, shard_number, write_tar


def repair(directory: Location, found: Mapping[str, object], root: str, workers: int) -> Iterator[str]:
    """Repairs what can be repaired; a line for each file.

    Args:
        directory: Of the shards.
        found: Files that are missing or damaged, by name.
        root: Directory or URL of the sources.
        workers: Processes.
    """
    manifest = load_manifest(directory)
    hashes = {shard.name: shard.sha256 for shard in manifest.shards if shard.name in found}
    Store(directory).clean({*PRODUCTS, *hashes})
    if "failures.jsonl" in found:
        yield _repair_failures(directory, manifest)
        manifest = load_manifest(directory)
    if "index.parquet" in found and hashes:
        yield (
            f"index.parquet and {len(hashes)} tars, such as {min(hashes)}, are damaged: one is made from "
            "the other; run build_shards.py with --overwrite"
        )
        return
    if "index.parquet" in found:
        yield _repair_index(directory, manifest)
    if hashes:
        plans = (
            _plan(directory, manifest, name, rows, root)
            for name, rows in rows_by_shard(directory, manifest)
            if name in hashes
        )
        yield from each(partial(repair_shard, hashes=hashes), plans, min(workers, len(hashes)))


def repair_shard(plan: ShardPlan, hashes: dict[str, str]) -> str:
    """Builds one tar again, and puts it in its place if it is the one that the manifest lists."""
    store = Store(plan.out)
    with store.temporary(plan.name) as path:
        try:
            _, facts = write_tar(plan, path)
        except MachineError as error:
            return f"{plan.name}: left as it is: {error}"
        if facts["sha256"] == hashes[plan.name]:
            store.commit(path, plan.name)
            return f"{plan.name}: built again, as it was"
    failures = facts["failures"]
    why = f"{failures[0]['path']}: {failures[0]['reason']}" if failures else "sources or decoders have changed since"
    return f"{plan.name}: left as it is: the sources in {plan.root} do not give the same bytes ({why})"


def compare(directory: Location, root: str, workers: int) -> Iterator[str]:
    """Decodes the sources of sound shards again; a line for each clip that they do not give any more.

    A build takes no stamps of its sources along when it ends: whether files have other times says nothing on
    another disk, and shards outlive their sources. This compares content, and takes as long as the build.

    Args:
        directory: Of the shards.
        root: Directory or URL of the sources.
        workers: Processes.
    """
    manifest = load_manifest(directory)
    shards = {shard.name for shard in manifest.shards}
    tasks = (
        (_plan(directory, manifest, name, rows, root), rows)
        for name, rows in rows_by_shard(directory, manifest)
        if name in shards
    )
    for lines in each(compare_shard, tasks, workers):
        yield from lines


def compare_shard(task: tuple[ShardPlan, pa.Table]) -> list[str]:
    """Clips of one shard whose sources give other waveforms, other facts or none."""
    plan, rows = task
    kept = {row["key"]: row for row in rows.to_pylist()}
    try:
        now, facts = write_tar(plan, os.devnull)
    except MachineError as error:
        return [f"{plan.name}: cannot be compared: {error}"]
    other = [
        f"{plan.name}: {row['key']}: its source {row['source']} gives another {member} now"
        for row in now
        for member in ("waveform", "json")
        if row[f"{member}_xxh3"] != kept[row["key"]][f"{member}_xxh3"]
    ]
    nothing = [f"{one['key']}: its source gives nothing: {one['reason']}" for one in facts["failures"]]
    return other + [f"{plan.name}: {line}" for line in nothing]


def _plan(directory: Location, manifest: Manifest, name: str, rows: pa.Table, root: str) -> ShardPlan:
    """What a tar was made of, by its index rows."""
    audio = AudioOptions(manifest.audio.sample_rate, manifest.audio.seconds, manifest.fbank.mel_bins)
    split = rows["split"][0].as_py()
    events = _events(join(directory, name), rows) if EVENTS in manifest.options.get(split, {}) else {}
    clips = [
        Clip(
            key=row["key"],
            path=row["source"] if is_remote(row["source"]) else join(root, row["source"]),
            start=row["start"],
            end=row["end"],
            labels=tuple(row["labels"]),
            split=row["split"],
            fold=row["fold"],
            id=row["source"],
            trimmed=row["trimmed"],
            events=events.get(row["key"], ()),
        )
        for row in rows.to_pylist()
    ]
    return ShardPlan(split, shard_number(split, name), clips, manifest.labels, root, directory, audio)


def _events(where: str, rows: pa.Table) -> dict[str, tuple[tuple[float, float, int], ...]]:
    """Sound events by key, which the index does not have: out of those of a tar's jsons that are sound."""
    found: dict[str, tuple[tuple[float, float, int], ...]] = {}
    for copy in local_copies([where]):
        if isinstance(copy, OSError):
            return found
        with open(copy, "rb") as file:
            for row in rows.select(["key", "json_offset", "json_size", "json_xxh3"]).to_pylist():
                file.seek(row["json_offset"])
                content = file.read(row["json_size"])
                if xxhash.xxh3_64_intdigest(content) == row["json_xxh3"]:
                    events = json.loads(content).get("events", [])
                    found[row["key"]] = tuple((one["onset"], one["offset"], one["label"]) for one in events)
    return found


def _repair_failures(directory: Location, manifest: Manifest) -> str:
    """Keeps the lines that can be read: nothing but a build knows the others."""
    store, lines = Store(directory), []
    if "failures.jsonl" in store.sizes():
        for line in failure_lines(store):
            with suppress(ValueError, TypeError, KeyError):
                if line.endswith(b"\n") and json.loads(line)["split"] in manifest.splits:
                    lines.append(line)
    content = b"".join(lines)
    record = FileRecord(size=len(content), sha256=hashlib.sha256(content).hexdigest())
    store.write("failures.jsonl", content)
    renewed = manifest.model_copy(update={"failures": record})
    store.write("manifest.json", render(renewed.model_copy(update={"digest": renewed.computed_digest()})))
    return (
        f"failures.jsonl: the {len(lines)} lines that can be read are kept; manifest.json renewed with them, and with "
        "its digest the order of training"
    )


def _repair_index(directory: Location, manifest: Manifest) -> str:
    store = Store(directory)
    with store.temporary("index.parquet") as path:
        with IndexWriter(path) as index:
            names = [shard.name for shard in manifest.shards]
            copies = local_copies(join(directory, name) for name in names)
            for shard, copy in zip(manifest.shards, copies, strict=True):
                if isinstance(copy, OSError):
                    raise copy
                index.write(_rows(copy, shard.name, shard.split))
        with path.open("rb") as file:
            record = FileRecord(size=path.stat().st_size, sha256=sha256(file))
        store.commit(path, "index.parquet")
    if record == manifest.index:
        return "index.parquet: made from the tars, as it was"
    renewed = manifest.model_copy(update={"index": record})
    store.write("manifest.json", render(renewed.model_copy(update={"digest": renewed.computed_digest()})))
    return "index.parquet: made from the tars by another version of Parquet's writer; manifest.json renewed with it"


def _rows(path: str, shard: str, split: str) -> pa.Table:
    """Index rows of a sound tar."""
    rows = []
    with tarfile.open(path, "r:") as tar, open(path, "rb") as file:
        members = iter(tar)
        for first in members:
            row: dict[str, Any] = {"key": first.name.split(".", 1)[0], "split": split, "shard": shard}
            info = first
            for member in MEMBERS:
                info = info if member == MEMBERS[0] else next(members)
                if info.name != f"{row['key']}.{EXTENSIONS[member]}":
                    raise OSError(f"{shard}: {info.name} where {member} of {row['key']} should be")
                file.seek(info.offset + BLOCK)
                payload = file.read(info.size)
                row |= {
                    f"{member}_offset": info.offset + BLOCK,
                    f"{member}_size": info.size,
                    f"{member}_xxh3": xxhash.xxh3_64_intdigest(payload),
                }
            about = json.loads(payload)
            row |= {name: about[name] for name in ("fold", "labels", "seconds", "source", "start")}
            listed = about.get("listed_trimmed", about["trimmed"])  # shards of earlier versions have the second alone
            rows.append(row | {"end": about["listed_end"], "trimmed": listed})
    return pa.Table.from_pylist(rows, schema=INDEX_SCHEMA)
