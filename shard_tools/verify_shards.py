"""Reread shards against their manifest: every byte, every offset, every label.

    python shard_tools/verify_shards.py DIR

In: a directory of shards. Out: one line per problem on stdout. Exit status: 0 sound, 1 damaged, 2 no shards.
"""

import argparse
import hashlib
import io
import json
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from pipeline.data.manifest import Manifest, load_index, load_manifest
from pipeline.errors import run_cli
from shard_tools.write import BLOCK, EXTENSIONS, MEMBERS, AudioOptions, stored_fbank

FBANK_EVERY = 16  # the fbank of every 16th clip is computed again
TOLERANCE = 4e-3  # a float16 step at the fbank's range


def verify(directory: Path, workers: int) -> list[str]:
    """Problems found, one line each; empty: sound.

    Raises:
        UserError: no readable manifest.
    """
    manifest = load_manifest(directory)
    problems = list(_check_files(directory, manifest))
    if problems:
        return problems
    rows = load_index(directory).to_pylist()
    by_shard: dict[str, list[dict[str, Any]]] = {}
    seen: set[tuple[str, str]] = set()
    for row in rows:
        if (row["split"], row["key"]) in seen:
            problems.append(f"index.parquet: key {row['key']} of split {row['split']} is there twice")
        seen.add((row["split"], row["key"]))
        by_shard.setdefault(row["shard"], []).append(row)
    for shard in manifest.shards:
        if len(by_shard.get(shard.name, [])) != shard.clips:
            problems.append(f"{shard.name}: {len(by_shard.get(shard.name, []))} rows in the index, {shard.clips} clips")
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        check = partial(check_shard, directory=directory, manifest=manifest)
        for found in pool.map(check, [(s.name, by_shard.get(s.name, [])) for s in manifest.shards]):
            problems += found
    return problems


def check_shard(shard: tuple[str, list[dict[str, Any]]], directory: Path, manifest: Manifest) -> list[str]:
    """Problems of one tar."""
    name, rows = shard
    record = next(record for record in manifest.shards if record.name == name)
    content = (directory / name).read_bytes()
    problems = []
    if hashlib.sha256(content).hexdigest() != record.sha256:
        problems.append(f"{name}: sha256 differs from the manifest's")
    for number, row in enumerate(rows):
        payloads = {}
        for member in MEMBERS:
            offset, size = row[f"{member}_offset"], row[f"{member}_size"]
            payload = payloads[member] = content[offset : offset + size]
            header = content[offset - BLOCK : offset].split(b"\0", 1)[0].decode("utf-8", "replace")
            if header != f"{row['key']}.{EXTENSIONS[member]}":
                problems.append(f"{name}: {row['key']}: {member} is not at offset {offset}")
            elif xxhash.xxh3_64_intdigest(payload) != row[f"{member}_xxh3"]:
                problems.append(f"{name}: {row['key']}: {member} differs from its hash")
        if not problems:
            problems += _check_clip(name, row, payloads, manifest, recompute=number % FBANK_EVERY == 0)
    return problems


def _check_clip(
    name: str, row: dict[str, Any], payloads: dict[str, bytes], manifest: Manifest, recompute: bool
) -> Iterator[str]:
    waveform = np.load(io.BytesIO(payloads["waveform"]), allow_pickle=False)
    fbank = np.load(io.BytesIO(payloads["fbank"]), allow_pickle=False)
    about = json.loads(payloads["json"])
    where = f"{name}: {row['key']}"
    if waveform.shape != (manifest.audio.samples,) or waveform.dtype != np.int16:
        yield f"{where}: waveform is {waveform.dtype} {waveform.shape}"
    if fbank.shape != (manifest.fbank.frames, manifest.fbank.mel_bins) or fbank.dtype != np.float16:
        yield f"{where}: fbank is {fbank.dtype} {fbank.shape}"
    if about["labels"] != row["labels"] or any(not 0 <= label < len(manifest.labels) for label in row["labels"]):
        yield f"{where}: labels {about['labels']} in the json, {row['labels']} in the index"
    if recompute:
        audio = AudioOptions(manifest.audio.sample_rate, manifest.audio.seconds, manifest.fbank.mel_bins)
        error = np.abs(stored_fbank(waveform, audio).astype(np.float32) - fbank.astype(np.float32)).max()
        if not error <= TOLERANCE:
            yield f"{where}: fbank differs by {error:.4f} from the waveform's"


def _check_files(directory: Path, manifest: Manifest) -> Iterator[str]:
    records = {"index.parquet": manifest.index, **{shard.name: shard for shard in manifest.shards}}
    for name, record in records.items():
        path = directory / name
        if not path.is_file():
            yield f"{name}: missing"
        elif path.stat().st_size != record.size:
            yield f"{name}: {path.stat().st_size} bytes, the manifest says {record.size}"
    extra = {path.name for path in directory.glob("*.tar")} - {shard.name for shard in manifest.shards}
    for name in sorted(extra):
        yield f"{name}: not in the manifest"
    index = directory / "index.parquet"
    if index.is_file() and hashlib.sha256(index.read_bytes()).hexdigest() != manifest.index.sha256:
        yield "index.parquet: sha256 differs from the manifest's"


def main() -> int:
    """Parses, verifies, reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, metavar="DIR", help="directory of shards")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: one per core)")
    args = parser.parse_args()
    problems = verify(args.directory, args.workers)
    for problem in problems:
        sys.stdout.write(f"{problem}\n")
    manifest = load_manifest(args.directory)
    state = f"{len(problems)} problems" if problems else "sound"
    clips = sum(split.clips for split in manifest.splits.values())
    sys.stdout.write(f"{args.directory}: {clips} clips in {len(manifest.shards)} shards: {state}\n")
    return 1 if problems else 0


if __name__ == "__main__":
    run_cli(main)
