"""Read every byte of a directory of shards again and compare it with its manifest.

In: DIR or URL. Out: one line a problem on stdout; exit status 0 sound, 1 problems, 2 no usable manifest.

Checked: presence, size and sha256 of every file; that the index's members lie end to end and fill their
tar; name and xxh3 of each member; that waveform, fbank and json decode, with the manifest's shapes;
labels against the vocabulary and the index; the fbank of every 16th clip against one computed from the
stored waveform; keys used twice; the manifest's totals. So one flipped bit in any file is found and named.

--repair builds damaged or missing tars again from their sources, replaces a tar only by the very bytes
that the manifest lists, makes a damaged index.parquet anew from the tars, and keeps what can be read of failures.jsonl.
--sources decodes every source again and names the clips that it does not give any more: a finished build that is run
again does not look at its sources.
A tar that the disk cannot read is a damaged one. While a build writes to the directory, --repair is refused; what a
build left half done when it was killed at its end is completed first.
Memory: a row group of the index, and a clip; tars of a store are fetched to local scratch, one a worker.
"""

import argparse
import errno
import json
import os
import sys
import tarfile
from collections.abc import Iterator
from functools import partial
from itertools import chain
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash
from tqdm import tqdm

from pipeline.data.manifest import Manifest, ShardRecord, load_manifest
from pipeline.data.npy import decode
from pipeline.data.storage import Location, is_remote, join, local, location, read_bytes, sizes
from pipeline.errors import UserError, run_cli
from pipeline.files import check_output_directory, sha256
from shard_tools.distribute import each
from shard_tools.finish import damage, render, rows_by_shard, settle
from shard_tools.lock import owner
from shard_tools.repair import compare, repair
from shard_tools.segment import MachineError
from shard_tools.store import Store, local_copies
from shard_tools.write import BLOCK, EXTENSIONS, MEMBERS, AudioOptions, stored_fbank

FBANK_EVERY = 16  # the fbank of every 16th clip is computed again
TOLERANCE = 4e-3  # a float16 step at the fbank's range


def verify(directory: Location, workers: int) -> list[str]:
    """Problems found, one line each; empty: sound.

    Raises:
        UserError: no readable manifest.
    """
    return [line for lines in examine(directory, workers).values() for line in lines]


def examine(directory: Location, workers: int) -> dict[str, list[str]]:
    """Reads everything; returns the problems of each file that has any, and of the `keys`, one line each.

    Raises:
        UserError: no readable manifest.
    """
    manifest = load_manifest(directory)
    found = {name: [f"{name}: {problem}"] for name, problem in damage(directory, manifest).items()}
    if read_bytes(join(directory, "manifest.json")) != render(manifest):
        found["manifest.json"] = ["manifest.json: damaged: its bytes are not those that were written"]
    shards = {shard.name: shard for shard in manifest.shards}
    for name in sorted(sizes(directory).keys() - shards.keys()):
        if name.endswith(".tar"):
            found[name] = [f"{name}: not in the manifest"]
    whole = {name: shard for name, shard in shards.items() if name not in found}
    of_index: dict[str, list[str]] = {}

    def tasks() -> Iterator[tuple[ShardRecord, pa.Table | None]]:
        """Each shard that is there with its rows of the index; fills `of_index`."""
        if "index.parquet" in found:
            yield from ((shard, None) for shard in whole.values())
            return
        keys: list[pa.Array] = []
        rowless = dict(shards)
        for name, rows in rows_by_shard(directory, manifest):
            keys += pc.binary_join_element_wise(rows["split"], rows["key"], "/").chunks
            if rowless.pop(name, None) and name in whole:
                yield whole[name], rows
        if rowless:
            of_index["index.parquet"] = [f"{name}: no rows in the index" for name in rowless]
        counts = pa.chunked_array(keys, pa.string()).value_counts()
        twice = counts.filter(pc.greater(counts.field("counts"), 1)).field("values").to_pylist()
        if twice:  # in the tars too: an index made anew from them would be the same
            of_index["keys"] = [f"index.parquet: key {key} is there twice" for key in twice]

    check = partial(check_shard, directory=directory, manifest=manifest)
    with tqdm(total=len(whole), unit="shard", disable=not sys.stderr.isatty()) as bar:
        for name, problems in each(check, tasks(), min(workers, max(1, len(shards)))):
            if problems:
                found[name] = problems
            bar.update()
    return found | of_index


def check_shard(
    task: tuple[ShardRecord, pa.Table | None], directory: Location, manifest: Manifest
) -> tuple[str, list[str]]:
    """Problems of one tar, and its name; without rows (the index is damaged) its hash alone is checked."""
    record, rows = task
    where = join(directory, record.name)
    for copy in local_copies([where]):
        if isinstance(copy, MachineError):
            raise copy
        if isinstance(copy, OSError):
            return record.name, [f"{record.name}: unreadable: {copy}"]
        # Read, not mapped: a part of a map that the disk cannot read ends the process.
        with open(copy, "rb") as file:
            problems = []
            try:
                if sha256(file) != record.sha256:
                    problems.append(f"{record.name}: damaged: its sha256 is not the manifest's")
                if rows is not None:
                    problems += _check_rows(record, rows.to_pylist(), file, manifest)
            except OSError as error:
                if error.errno != errno.EIO:
                    raise
                problems.append(f"{record.name}: unreadable: {error.strerror}")
    return record.name, problems


def _check_rows(record: ShardRecord, rows: list[dict[str, Any]], file: BinaryIO, manifest: Manifest) -> Iterator[str]:
    end, total = 0, os.fstat(file.fileno()).st_size
    if len(rows) != record.clips:
        yield f"{record.name}: {len(rows)} rows in the index, {record.clips} clips in the manifest"
    for number, row in enumerate(rows):
        payloads, sound = {}, True
        where = f"{record.name}: {row['key']}"
        for member in MEMBERS:
            offset, size = row[f"{member}_offset"], row[f"{member}_size"]
            problem = None
            if offset != end + BLOCK:
                problem = f"{member} is at offset {offset}, not {end + BLOCK} where the one before it ends"
            else:
                file.seek(max(0, min(end, total)))
                header = file.read(BLOCK).split(b"\0", 1)[0].decode("utf-8", "replace")
                payload = payloads[member] = file.read(max(0, min(size, total)))
                if header != f"{row['key']}.{EXTENSIONS[member]}":
                    problem = f"{member} is not at offset {offset}"
                elif xxhash.xxh3_64_intdigest(payload) != row[f"{member}_xxh3"]:
                    problem = f"{member}: damaged: its hash is not the index's"
            if problem:
                sound = False
                yield f"{where}: {problem}"
            end = offset + size + -size % BLOCK
        if sound:
            yield from _check_clip(where, row, payloads, manifest, recompute=number % FBANK_EVERY == 0)
    whole = end + 2 * BLOCK
    whole += -whole % tarfile.RECORDSIZE
    if whole != total:
        yield f"{record.name}: {total} bytes, its clips and the end of the archive make {whole}"


def _check_clip(
    where: str, row: dict[str, Any], payloads: dict[str, bytes], manifest: Manifest, recompute: bool
) -> Iterator[str]:
    arrays = {"waveform": manifest.audio.array, "fbank": manifest.fbank.array}
    decoded = {}
    for member, array in arrays.items():
        try:
            decoded[member] = decode(payloads[member], array)
        except ValueError as error:
            yield f"{where}: {member} cannot be decoded: {error}"
    try:
        about = json.loads(payloads["json"])
    except (ValueError, RecursionError) as error:
        yield f"{where}: json cannot be decoded: {error}"
        return
    labels = about.get("labels") if isinstance(about, dict) else None
    if labels is None or labels != row["labels"]:
        yield f"{where}: labels {labels!s:.200} in the json, {row['labels']} in the index"
    elif any(not 0 <= label < len(manifest.labels) for label in labels):
        yield f"{where}: labels {labels}, the vocabulary has {len(manifest.labels)}"
    elif about.get("label_ids") != [manifest.labels[label].id for label in labels]:
        yield f"{where}: label ids {about.get('label_ids')} are not those of labels {labels}"
    if recompute and len(decoded) == len(arrays):
        audio = AudioOptions(manifest.audio.sample_rate, manifest.audio.seconds, manifest.fbank.mel_bins)
        computed = stored_fbank(decoded["waveform"], audio).astype(np.float32)
        worst = np.abs(computed - decoded["fbank"].astype(np.float32)).max()
        if not worst <= TOLERANCE:  # NaN too
            yield f"{where}: fbank differs by {worst:.4f} from the waveform's"


def main() -> int:
    """Parses, verifies, repairs, compares, reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    where = "directory of shards, or its URL (s3://bucket/prefix, ...)"
    parser.add_argument("directory", type=partial(location, what="DIR"), metavar="DIR|URL",
                        help=where)  # fmt: skip
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: one per core)")
    parser.add_argument("--repair", action="store_true", help="build damaged shards again from --audio-root")
    parser.add_argument("--sources", action="store_true", help="compare with the sources too (as long as the build)")
    parser.add_argument("--audio-root", type=partial(location, what="--audio-root"), metavar="DIR|URL",
                        help="of the sources (default: DIR/source)")  # fmt: skip
    args = parser.parse_args()
    try:
        if not args.repair:
            return _run(args)
        load_manifest(args.directory)  # or a directory of something else would get a lock
        if not is_remote(args.directory):
            check_output_directory(local(args.directory), "--repair")
        with owner(args.directory, shared=False):
            settle(Store(args.directory))
            return _run(args)
    except OSError as error:
        raise UserError(f"{args.directory}: {error}; run it again when it can be read and written") from error


def _run(args: argparse.Namespace) -> int:
    workers = max(1, args.workers)
    found = examine(args.directory, workers)
    for problem in chain(*found.values()):
        sys.stdout.write(f"{problem}\n")
    root = str(args.audio_root or join(args.directory, "source"))
    manifest = load_manifest(args.directory)
    damaged = found.keys() & {shard.name for shard in manifest.shards}
    if (args.sources or (args.repair and damaged)) and not is_remote(root) and not local(root).is_dir():
        raise UserError(f"{root}: no such directory of the sources; give it with --audio-root")
    if args.repair and (damaged or found.keys() & {"index.parquet", "failures.jsonl"}):
        for line in repair(args.directory, found, root, workers):
            sys.stdout.write(f"repair: {line}\n")
        found = examine(args.directory, workers)
        for problem in chain(*found.values()):
            sys.stdout.write(f"still: {problem}\n")
    problems = sum(map(len, found.values()))
    if args.sources:
        unknown = ["sources: not compared, as index.parquet is damaged; --repair makes it anew"]
        for line in unknown if "index.parquet" in found else compare(args.directory, root, workers):
            problems += 1
            sys.stdout.write(f"{line}\n")
    state = f"{problems} problems" if problems else "sound"
    clips = sum(split.clips for split in manifest.splits.values())
    sys.stdout.write(f"{args.directory}: {clips} clips in {len(manifest.shards)} shards: {state}\n")
    return 1 if problems else 0


if __name__ == "__main__":
    run_cli(main)
