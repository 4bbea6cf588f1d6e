"""Clips per second of loaders, side by side on the same clips: ours, its peers, and what the memory allows.

    python tests/benchmarks/bench_loader.py [--work DIR] [--clips N] [--mds PYTHON] [--litdata PYTHON] [--readers N ...]

In: nothing; the clips (10 s) are generated. Out: a table on stdout, ratios to the best peer and to the memcpy limit; of
each way the stored megabytes a second, and the CPU microseconds that a clip costs this process and its readers, which
other load on the machine changes least.
Every way delivers batches of 32: waveform float32 [160000], normalised fbank float32 [1024, 128], multi-hot labels.
Each row is a process of its own with one torch thread, the median of three passes over warm files; the start of an
epoch is not counted. The rows "training" also do some milliseconds of small torch calls for each batch, as a process
that trains on a GPU does: their limit is the row without a loader, and they say whether readers disturb the training.
MosaicML streaming and litdata want versions of their own: name the Python of an environment that has one of them and
torch (`python -m venv E && E/bin/pip install torch litdata`); without it the row is left out. This file imports
neither the project nor a peer before it must, so that it runs there.
"""

import argparse
import io
import itertools
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

BATCH, FRAMES, CLASSES, MEAN, STD = 32, 1024, 527, -4.27, 4.57
PASSES, SECONDS = 3, 0.8
ROOT = Path(__file__).resolve().parents[2]


def clips(work: Path) -> Iterator[dict[str, Any]]:
    """The training clips as arrays, out of the tars."""
    for path in sorted((work / "shards").glob("train-*.tar")):
        with tarfile.open(path) as tar:
            members = {m.name: tar.extractfile(m).read() for m in tar.getmembers()}
        for name in members:
            if name.endswith(".json"):
                key = name.removesuffix(".json")
                waveform, fbank = (np.load(io.BytesIO(members[f"{key}.{m}.npy"])) for m in ("waveform", "fbank"))
                yield {"waveform": waveform, "fbank": fbank, "label": int(json.loads(members[name])["labels"][0])}


def to_floats(waveform: Any, fbank: Any, label: Any) -> tuple[Any, Any, Any]:
    """A collated raw batch of a peer -> what the model reads. Once per batch: the fastest for every peer."""
    import torch

    padded = torch.zeros(len(fbank), FRAMES, fbank.shape[2])
    padded[:, : fbank.shape[1]] = fbank
    targets = torch.zeros(len(label), CLASSES)
    targets[torch.arange(len(label)), label] = 1
    return waveform.float() / 32768, (padded - MEAN) / (2 * STD), targets


def epochs(dataset: Any, workers: int, batch_size: int | None = BATCH, make: Any = None) -> Iterator[Iterable[Any]]:
    """Epochs of a torch DataLoader (or the peer's own)."""
    from torch.utils.data import DataLoader

    extra = {"prefetch_factor": 4, "persistent_workers": True} if workers else {}
    loader = (make or DataLoader)(dataset, batch_size=batch_size, num_workers=workers, **extra)
    while True:
        yield (to_floats(b["waveform"], b["fbank"], b["label"]) for b in loader)


def ours(work: Path, workers: int, raw: bool = False, fbank: bool = True) -> Iterator[Iterable[Any]]:
    """This project's loader; raw: what a GPU is given to convert; without fbank: where the GPU computes it."""
    from pipeline.config import DataConfig
    from pipeline.data.loader import Loader

    data = DataConfig(shards=str(work / "shards"), workers=workers, mean=MEAN, std=STD)
    loader = Loader(data, batch_size=BATCH, raw=raw, fbank=fbank)
    if raw:
        loader._assemble = lambda arrays: arrays  # type: ignore[method-assign, assignment]
    while True:
        yield loader.batches()


def training(run: Iterator[Iterable[Any]]) -> Iterator[Iterable[Any]]:
    """Behind each batch, some milliseconds of what a training process does: Python, and many small torch calls."""
    import torch

    layers = [torch.nn.Linear(64, 64) for _ in range(8)]
    net, x = torch.nn.Sequential(*layers), torch.randn(16, 64)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)

    def trained(batches: Iterable[Any]) -> Iterator[Any]:
        for batch in batches:
            for _ in range(8):
                optimizer.zero_grad()
                net(x).square().mean().backward()
                optimizer.step()
            yield batch

    return (trained(batches) for batches in run)


def nothing(work: Path, workers: int) -> Iterator[Iterable[Any]]:
    """No loader at all."""
    while True:
        yield range(1000)


def webdataset(work: Path, workers: int, fast: bool = False) -> Iterator[Iterable[Any]]:
    """webdataset: stock decoding, or a .npy decoder that does not copy."""
    import webdataset as wds

    def array(key: str, data: bytes) -> Any:
        if not key.endswith("npy"):
            return None
        kind, size = (np.int16, 320000) if "waveform" in key else (np.float16, len(data) - 128)
        return np.frombuffer(data, kind, offset=len(data) - size).reshape(-1 if kind is np.int16 else (-1, 128))

    def sample(s: dict[str, Any]) -> dict[str, Any]:
        fields = s["json"] if isinstance(s["json"], dict) else json.loads(s["json"])
        return {"waveform": s["waveform.npy"], "fbank": s["fbank.npy"], "label": int(fields["labels"][0])}

    urls = sorted(map(str, (work / "shards").glob("train-*.tar")))
    data = wds.WebDataset(urls, shardshuffle=len(urls)).shuffle(128)
    return epochs((data.decode(array) if fast else data.decode()).map(sample), workers)


def mds(work: Path, workers: int) -> Iterator[Iterable[Any]]:
    """MosaicML streaming."""
    from streaming import StreamingDataset

    if not (work / "mds" / "index.json").exists():
        from streaming import MDSWriter

        columns = {"waveform": "ndarray:int16", "fbank": "ndarray:float16", "label": "int"}
        with MDSWriter(columns=columns, out=str(work / "mds")) as writer:
            for clip in clips(work):
                writer.write(clip)
    return epochs(StreamingDataset(local=str(work / "mds"), shuffle=True, batch_size=BATCH), workers)


def litdata(work: Path, workers: int) -> Iterator[Iterable[Any]]:
    """litdata."""
    import torch
    from litdata import StreamingDataLoader, StreamingDataset, optimize

    if not (work / "litdata" / "index.json").exists():
        found = [{k: torch.from_numpy(v) if k != "label" else v for k, v in clip.items()} for clip in clips(work)]
        optimize(found.__getitem__, list(range(len(found))), str(work / "litdata"), chunk_bytes="64MB", num_workers=1)
    return epochs(StreamingDataset(str(work / "litdata"), shuffle=True), workers, make=StreamingDataLoader)


def ssast(work: Path, workers: int) -> Iterator[Iterable[Any]]:
    """One audio file per clip, fbank on the fly, as SSAST's dataloader does."""
    import soundfile
    import torch
    import torchaudio

    folder = work / "wav"
    if not folder.exists():
        folder.mkdir()
        for number, clip in enumerate(itertools.islice(clips(work), 512)):
            soundfile.write(folder / f"{number}.wav", clip["waveform"], 16000, "PCM_16")
    paths = sorted(folder.glob("*.wav"))

    class Files(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(paths)

        def __getitem__(self, number: int) -> dict[str, Any]:
            waveform = torch.from_numpy(soundfile.read(paths[number], dtype="float32")[0])[None]
            fbank = torchaudio.compliance.kaldi.fbank(
                waveform - waveform.mean(), htk_compat=True, sample_frequency=16000, use_energy=False,
                window_type="hanning", num_mel_bins=128, dither=0.0, frame_shift=10,
            )  # fmt: skip
            return {"waveform": waveform[0] * 32768, "fbank": fbank, "label": 0}

    return epochs(Files(), workers)


def pread(work: Path, workers: int) -> Iterator[Iterable[Any]]:
    """Limit: the same bytes into one buffer, nothing checked or converted."""
    from pipeline.data.manifest import load_index

    rows = load_index(work / "shards", "train").to_pylist()
    files = {row["shard"]: os.open(work / "shards" / row["shard"], os.O_RDONLY) for row in rows}
    spans = [
        [(files[row["shard"]], row[f"{m}_offset"], row[f"{m}_size"]) for m in ("waveform", "fbank")] for row in rows
    ]
    slots = [[memoryview(bytearray(size)) for _, _, size in spans[0]] for _ in range(BATCH)]
    while True:
        order = np.random.default_rng(0).permutation(len(spans)).tolist()
        yield (
            [os.preadv(*read[:1], [slot], read[1]) for i, s in zip(batch, slots, strict=True)
             for read, slot in zip(spans[i], s, strict=True)]
            for batch in (order[k : k + BATCH] for k in range(0, len(order) - BATCH + 1, BATCH))
        )  # fmt: skip


def memcpy(work: Path, workers: int) -> Iterator[Iterable[Any]]:
    """Limit: the float32 batch copied from one place to another."""
    source, target = (np.ones((BATCH, 160000 + FRAMES * 128), np.float32) for _ in range(2))
    while True:
        yield (np.copyto(target, source) for _ in range(1000))


WAYS: dict[str, Callable[..., Iterator[Iterable[Any]]]] = {
    "memcpy of the float32 batch": memcpy,
    "pread of the stored bytes": pread,
    "ours": ours,
    "ours, raw (for a GPU to convert)": lambda w, n: ours(w, n, raw=True),
    "ours, raw waveform (fbank on a GPU)": lambda w, n: ours(w, n, raw=True, fbank=False),
    "training, no loader": lambda w, n: training(nothing(w, n)),
    "training, ours": lambda w, n: training(ours(w, n)),
    "training, ours, raw": lambda w, n: training(ours(w, n, raw=True)),
    "training, ours, raw waveform": lambda w, n: training(ours(w, n, raw=True, fbank=False)),
    "litdata": litdata,
    "webdataset, fast decoder": lambda w, n: webdataset(w, n, fast=True),
    "webdataset, stock": webdataset,
    "MosaicML streaming": mds,
    "SSAST way (wav files, fbank on the fly)": ssast,
}
LIMITS = {memcpy, pread}
WAVEFORM_BYTES, FBANK_BYTES = 320_128, 255_616  # of a clip in the shards


def cpu_seconds() -> np.ndarray:
    """CPU seconds of this process, and of its readers, so far."""
    import psutil

    own = psutil.Process()
    times = [sum(process.cpu_times()[:2]) for process in (own, *own.children(recursive=True))]
    return np.array([times[0], sum(times[1:])])


def measure(way: str, work: Path, workers: int) -> dict[str, list[float]]:
    """Of each pass, clips a second, and CPU seconds of this process and of its readers for a clip.

    Each epoch's first two batches are not counted.
    """
    found: dict[str, list[float]] = {"rate": [], "own": [], "readers": []}
    run = WAYS[way](work, workers)
    for number in range(PASSES + 1):  # the first one warms up
        seen, spent, cpu = 0, 0.0, np.zeros(2)
        while spent < SECONDS:
            batches = iter(next(run))
            for _ in range(2):
                next(batches)
            cpu -= cpu_seconds()
            before = time.perf_counter()
            for _ in batches:
                seen += BATCH
                if spent + time.perf_counter() - before > SECONDS:
                    break
            spent += time.perf_counter() - before
            cpu += cpu_seconds()
        if number:
            for name, value in zip(found, (seen / spent, *(cpu / seen)), strict=True):
                found[name].append(value)
    return found


def row(way: str, python: str, work: Path, workers: int) -> dict[str, float] | None:
    """The medians of a way, in a process of its own."""
    command = [python, __file__, "--work", str(work), "--one", way, "--workers", str(workers)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"{way}: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
        return None
    return {name: statistics.median(values) for name, values in json.loads(done.stdout.splitlines()[-1]).items()}


def prepare(work: Path, count: int) -> None:
    """Shards with about `count` training clips, made by the real builder."""
    if not (work / "shards" / "manifest.json").exists():
        from tests.helpers import synth_shards

        synth_shards(work / "shards", clips=count * 5 // 4, seconds=10.0, per_shard=64, workers=2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "bench_loader")
    parser.add_argument("--clips", type=int, default=1024)
    parser.add_argument("--mds", help="Python that has mosaicml-streaming and torch")
    parser.add_argument("--litdata", help="Python that has litdata and torch")
    parser.add_argument("--only", nargs="+", default=[""], help="rows whose name contains one of these")
    parser.add_argument("--readers", type=int, nargs="+", default=[0, 2], help="reader processes")
    parser.add_argument("--prepare", action="store_true", help="only make the clips")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--workers", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one, args.work, args.workers)))
        return
    sys.path.insert(0, str(ROOT))
    prepare(args.work, args.clips)
    if args.prepare:
        return
    pythons = {"MosaicML streaming": args.mds, "litdata": args.litdata}
    found: dict[tuple[str, int], dict[str, float] | None] = {}
    for way, function in WAYS.items():
        python = pythons.get(way, sys.executable)
        if python and any(part in way for part in args.only):
            once = function in LIMITS or "no loader" in way
            for workers in (0,) if once else [count for count in args.readers if count or "training" not in way]:
                found[way, workers] = row(way, python, args.work, workers)
    show(found)


def show(found: dict[tuple[str, int], dict[str, float] | None]) -> None:
    """The table, ratios first."""
    rates = {key: values["rate"] for key, values in found.items() if values}
    limit = rates.get(("memcpy of the float32 batch", 0))
    own = ("ours", "training")
    best = max((rate for (way, _), rate in rates.items() if WAYS[way] not in LIMITS and not way.startswith(own)),
               default=None)  # fmt: skip
    print(f"| {'way':40} | workers | x best peer | x memcpy | clips/s | stored MB/s | CPU us a clip |")
    print("|---|---|---|---|---|---|---|")
    for (way, workers), values in found.items():
        if values is None:
            print(f"| {way:40} | {workers} | - | - | failed | - | - |")
            continue
        rate = values["rate"]
        ratios = [f"{rate / base:.2f}" if base else "-" for base in (best, limit)]
        size = WAVEFORM_BYTES + (0 if "raw waveform" in way else FBANK_BYTES)
        read = f"{rate * size / 1e6:,.0f}" if way != "training, no loader" and WAYS[way] is not memcpy else "-"
        cost = " + ".join(f"{1e6 * values[name]:.0f}" for name in ("own", "readers"))
        print(f"| {way:40} | {workers} | {ratios[0]} | {ratios[1]} | {rate:,.0f} | {read} | {cost} |")


if __name__ == "__main__":
    main()
