"""What a catalog of millions costs besides audio: reading it, planning it, and writing index and manifest.

    python -m tests.benchmarks.bench_index [--rows 2000000]

In: nothing; an AudioSet csv of N rows and a listing of files for 85 % of them are generated, and records
as write.py leaves them: 512 rows each, of 16 kinds, linked under all shards' names. Out: seconds of each step and the
peak memory of the process so far, as the builder's driver has it: catalog, plan, plan.parquet (--dry-run), finish.
"""

import argparse
import json
import multiprocessing
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.manifest import INDEX_SCHEMA
from shard_tools.build_shards import parser, read_catalog
from shard_tools.finish import finish
from shard_tools.plan import BuildOptions, SplitPlan, write_plan
from shard_tools.store import Store
from shard_tools.write import AudioOptions, record_name
from tests.benchmarks.bench_build import simulate

KINDS, PER_SHARD = 16, 512


def record(kind: int, split: str) -> bytes:
    """A finished shard's record: rows as the builder's, and 26 failures (5 %)."""
    rng = np.random.default_rng(kind)
    rows = []
    for number in range(PER_SHARD):
        name = "".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz0123456789-_"), 11))
        rows.append({
            "key": f"{name}_{10000 * number}", "split": split, "fold": 0, "shard": f"{split}-{kind:06d}.tar",
            "labels": np.unique(rng.integers(0, 527, rng.integers(1, 5))).tolist(), "seconds": 10.0,
            "source": f"part{number % 40:02d}/Y{name}.m4a", "start": 0.0, "end": 10.0, "trimmed": None,
            **{f"{member}_{what}": int(rng.integers(1 << 40))
               for member in ("waveform", "fbank", "json") for what in ("offset", "size", "xxh3")},
        })  # fmt: skip
    facts = {
        "clips": PER_SHARD, "size": 300_000_000, "sha256": f"{kind:064x}", "sums": [1e6, -5e6, 3e7], "silent": 1,
        "failures": [{"id": f"x{n}", "path": f"{n}.m4a", "reason": "damaged: x", "split": split} for n in range(26)],
        "sources": [[500_000, 1_700_000_000_000_000_000 + n] for n in range(PER_SHARD)],
    }  # fmt: skip
    out = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows, schema=INDEX_SCHEMA.with_metadata({"craft": json.dumps(facts)})), out)
    return out.getvalue().to_pybytes()


def measure(folder: Path, words: list[str]) -> None:
    """The driver's steps in a process of its own."""
    begun = time.perf_counter()

    def lap(name: str) -> None:
        nonlocal begun
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        print(f"| {name} | {time.perf_counter() - begun:.1f} | {peak:.2f} |", flush=True)
        begun = time.perf_counter()

    out = folder / "out"
    args = parser().parse_args([*words, "--out", str(out)])
    out.mkdir()
    lap("imports")
    catalog = read_catalog(args)
    lap(f"catalog of {len(catalog.clips)} clips, {len(catalog.missing)} missing")
    options = BuildOptions(AudioOptions(), PER_SHARD)
    assert catalog.clips.repeat() is None
    plan = SplitPlan(catalog, "train", out, options)
    assert plan.identity
    lap(f"plan of {len(plan)} shards, and its identity")
    list(write_plan(catalog, out, options))
    lap("plan.parquet")
    (out / ".build" / "train").mkdir(parents=True)
    for number in range(len(plan)):
        (out / record_name("train", number)).symlink_to(folder / f"{number % KINDS}.parquet")
    lap("(links to records)")
    manifest = finish(catalog, Store(out), options, [plan], None)
    sizes = ", ".join(f"{name} {(out / name).stat().st_size / 1e6:.1f} MB"
                      for name in ("index.parquet", "failures.jsonl", "manifest.json"))  # fmt: skip
    lap(f"finish: {manifest.splits['train'].clips} rows; {sizes}")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rows", type=int, default=2_000_000)
    args = options.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        words = simulate(folder, args.rows)
        for kind in range(KINDS):
            (folder / f"{kind}.parquet").write_bytes(record(kind, "train"))
        print(f"{args.rows} rows\n| step | seconds | peak GB |\n|---|---|---|", flush=True)
        process = multiprocessing.get_context("spawn").Process(target=measure, args=(folder, words))
        process.start()
        process.join()
        sys.exit(process.exitcode)


if __name__ == "__main__":
    main()
