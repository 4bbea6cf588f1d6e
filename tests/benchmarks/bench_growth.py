"""What a loader costs as the data grows: start-up, memory and time per batch for 1 thousand to 10 million clips.

    python -m tests.benchmarks.bench_growth [--clips 1000 100000 ...] [--dir DIR]

In: nothing; an index of each size is generated as the builder would write it (512 clips a shard, AudioSet-like
labels), all its shards being links to one real shard of short clips. Out: a table on stdout. Each
row is a process of its own, rank 0 of 1 or of 256, G = 256. The memory is what the process grew by. A batch costs a
tenth of a millisecond however small it is: some hundred calls of numpy. So a rank that has one clip of it pays that
for one clip, and the time per clip is large where the time per batch is smallest. The last columns are
`next()` in a process that trains: 2 readers, some milliseconds of small torch calls a batch, and a pause in which a GPU
would compute. Its CPU time is what the loader takes of that process; its wall time has the machine's other load in it.
"""

import argparse
import hashlib
import itertools
import json
import multiprocessing
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.config import DataConfig
from pipeline.data.manifest import INDEX_SCHEMA, Manifest, load_index, load_manifest
from shard_tools.finish import IndexWriter
from tests.helpers import synth_shards

PER_SHARD, CLASSES, BATCH, BATCHES = 512, 527, 256, 40
WAITS, PAUSE = 300, 0.03  # batches whose `next()` is timed beside training, and seconds between two of them
SIZES = (1_000, 100_000, 2_000_000, 10_000_000)


def real_shard(out: Path) -> tuple[Manifest, pa.Table]:
    """One shard of `PER_SHARD` clips of a tenth of a second, and its rows of the index."""
    if not (out / "manifest.json").exists():
        synth_shards(out, clips=PER_SHARD * 4 // 3 + 64, seconds=0.1, per_shard=PER_SHARD)
    manifest = load_manifest(out)
    rows = load_index(out, "train")
    return manifest, rows.slice(0, PER_SHARD)


def generate(out: Path, source: Path, clips: int) -> Path:
    """Index, manifest and links to shards for `clips` clips."""
    if (out / "manifest.json").exists():
        return out
    out.mkdir(parents=True, exist_ok=True)
    manifest, rows = real_shard(source)
    tar = source / rows["shard"][0].as_py()
    rng = np.random.default_rng(0)
    popularity = 1 / np.arange(1, CLASSES + 1)  # a class has from half of the clips down to a thousandth
    edges = np.cumsum(popularity / popularity.sum())
    shards = []
    with IndexWriter(out / "index.parquet") as writer:
        for number in range(-(-clips // PER_SHARD)):
            name, count = f"train-{number:06d}.tar", min(PER_SHARD, clips - number * PER_SHARD)
            (out / name).symlink_to(tar)
            pairs = np.sort(np.searchsorted(edges, rng.random((count, 2))).astype(np.int32), axis=1)
            columns = {field.name: rows[field.name].slice(0, count) for field in INDEX_SCHEMA}
            columns["key"] = pa.array([f"clip{number * PER_SHARD + i:09d}" for i in range(count)])
            columns["split"] = pa.array(["train"] * count).dictionary_encode()
            columns["shard"] = pa.array([name] * count).dictionary_encode()
            columns["labels"] = pa.array(list(pairs), pa.list_(pa.int32()))
            writer.write(pa.table(columns, schema=INDEX_SCHEMA))
            record = {"size": tar.stat().st_size, "sha256": "0" * 64}
            shards.append({"name": name, "split": "train", "clips": count, **record})
    content = manifest.model_dump(mode="json")
    totals = {"clips": clips, "shards": len(shards), "silent": 0, "class_clips": [], "class_listed": []}
    content["splits"] = {"train": content["splits"]["train"] | totals}
    content["labels"] = [{"id": f"/m/{number}", "name": f"class {number}"} for number in range(CLASSES)]
    file = out / "index.parquet"
    with file.open("rb") as opened:
        content["index"] = {"size": file.stat().st_size, "sha256": hashlib.file_digest(opened, "sha256").hexdigest()}
    content |= {"shards": shards, "digest": ""}
    digest = Manifest.model_validate(content).computed_digest()
    (out / "manifest.json").write_text(json.dumps(content | {"digest": digest}), encoding="utf-8")
    return out


def measure(shards: Path, sampler: str, ranks: int, results: Any) -> None:
    """One row, in a fresh process whose imports are done before the clock starts."""
    import torch

    from pipeline.data.loader import Loader

    torch.set_num_threads(1)
    load_index(shards.parent / "source")  # what pyarrow loads and allocates once is not the data's
    data = DataConfig(shards=str(shards), sampler=sampler, workers=0)
    memory, start = _memory(), time.perf_counter()
    loader = Loader(data, fbank=False, batch_size=BATCH, world_size=ranks)
    with loader:
        opened = time.perf_counter()
        batches = loader.batches(loader.clips // BATCH // 2)  # resume in the middle of epoch 0
        next(batches)
        first = time.perf_counter()
        times = []
        for _ in range(BATCHES):
            before = time.perf_counter()
            next(batches)
            times.append(time.perf_counter() - before)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        values = opened - start, first - opened, _memory() - memory, peak - memory, float(np.median(times))
    found = waits(data.model_copy(update={"workers": 2}), ranks)
    results.put((*values, *np.quantile(found, [0.5, 0.95], axis=0).T.ravel().tolist()))


def waits(data: DataConfig, ranks: int) -> list[tuple[float, float]]:
    """CPU and wall seconds of each `next()` of a process that trains between two of them, beside 2 readers."""
    from pipeline.data.loader import Loader
    from tests.benchmarks.bench_loader import training

    found = []
    with Loader(data, fbank=False, batch_size=BATCH, world_size=ranks) as loader:
        batches = loader.batches(loader.clips // BATCH // 2)
        trained = next(training(iter([itertools.repeat(None)])))
        for number in range(WAITS):
            cpu, before = time.thread_time(), time.perf_counter()
            next(batches)
            if number >= 2 * data.prefetch:
                found.append((time.thread_time() - cpu, time.perf_counter() - before))
            next(iter(trained))
            time.sleep(PAUSE)
    return found


def _memory() -> float:
    """Resident megabytes of this process."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize() / 2**20


def main() -> None:
    """Generates, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, nargs="+", default=SIZES, help="sizes of the index")
    parser.add_argument("--dir", type=Path, help="keep the generated data here (default: a temporary directory)")
    args = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as temporary:
        root = args.dir or Path(temporary)
        print("clips      sampler   ranks  start s  first batch s  grown MB  peak MB  ms/batch  us/clip  "
              "next(): CPU ms  p95  wall ms  p95")  # fmt: skip
        for clips in args.clips:
            shards = generate(root / str(clips), root / "source", clips)
            for sampler, ranks in (("shuffle", 1), ("shuffle", 256), ("balanced", 1)):
                results = context.Queue()
                process = context.Process(target=measure, args=(shards, sampler, ranks, results))
                process.start()
                opened, first, grown, peak, batch, *times = results.get()
                process.join()
                print(
                    f"{clips:<10d} {sampler:9s} {ranks:5d}  {opened:7.3f}  {first:13.3f}  {grown:8.1f}  {peak:7.1f}  "
                    f"{1e3 * batch:8.2f}  {1e6 * batch / (BATCH / ranks):7.1f}"
                    f"  {'  '.join(f'{1e3 * value:6.2f}' for value in times)}"
                )
                sys.stdout.flush()


if __name__ == "__main__":
    main()
