"""What building shards costs: its unavoidable parts alone, the whole, more workers, and the usual way.

    python -m tests.benchmarks.bench_build [--files 64] [--clips 512] [--codec m4a wav]
        [--containers tar zip parquet h5] [--catalog 2000000] [--rows 1700000]

In: nothing; files of 10 s, 44.1 kHz stereo, are generated and encoded, and listed again and again up to a shard of
--clips. Out: tables on stdout, medians of 3 rounds in which all ways take turns. Parts: decode (with down-mix and
resampling), fbank, encode (int16, float16, .npy), write (tar, sha256, xxh3, fsync), each timed over all clips in this
process. Ratio: sum of the parts / whole. The usual way: an ffmpeg subprocess, torchaudio's fbank and tarfile, clip by
clip. All of that on one core (Linux: by affinity, which a worker's decoder process inherits); N workers have N cores.
--containers: the same files (HDF5: their mean as int16) inside a tar, a zip, a Parquet file of row groups of 16 or an
HDF5 file; reading them is one more part.
--catalog N: time and peak memory of --dry-run on N AudioSet rows; --rows N: on N rows of Parquet files.
"""

import argparse
import io
import os
import resource
import statistics
import string
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import h5py
import imageio_ffmpeg
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile
import torch
import torchaudio

from pipeline.data.manifest import Label
from pipeline.flow import Clip
from shard_tools import catalogs
from shard_tools.decode import decode
from shard_tools.distribute import run
from shard_tools.plan import BuildOptions, SplitPlan
from shard_tools.sources import extract
from shard_tools.stamps import stamp
from shard_tools.synth import CLASSES, render
from shard_tools.write import AudioOptions, ShardPlan, TarWriter, encode_waveform, npy, stored_fbank, write_shard
from tests.conftest import ROOT

AUDIO = AudioOptions()
SOURCE_RATE, ROUNDS = 44100, 3
CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def generate(folder: Path, files: int, clips: int, codec: str) -> catalogs.Catalog:
    """Files of 10 s, stereo, each listed as often as it takes to have `clips`."""
    folder.mkdir()
    names = list(CLASSES)
    catalog = catalogs.Catalog("bench", folder, [Label(id=name, name=name) for name in names])
    paths = []
    for number in range(files):
        rng = np.random.default_rng(number)
        sides = [render([names[number % len(names)]], 10.0, SOURCE_RATE, rng) for _ in range(2)]
        path = folder / f"{number:05d}.wav"
        soundfile.write(path, np.stack(sides, axis=1), SOURCE_RATE)
        if codec != "wav":
            wav, path = path, path.with_suffix(f".{codec}")
            subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", wav, path], check=True)
            wav.unlink()
        paths.append(str(path))
    for number in range(clips):
        catalog.clips.append(Clip(f"{number:05d}", paths[number % files], 0.0, None, (number % len(names),), "train"))
    return catalog


def pack(catalog: catalogs.Catalog, folder: Path, kind: str) -> tuple[catalogs.Catalog, list[str]]:
    """The catalog of the same clips in a container, and the files that hold what the container gives."""
    paths = list(dict.fromkeys(clip.path for clip in catalog.clips))
    where, held = folder / f"all.{kind}", [Path(path).read_bytes() for path in paths]
    at: list[tuple[int, int] | None] = [None] * len(paths)
    names = [str(number) for number in range(len(paths))]
    if kind == "tar":
        with where.open("wb") as file:
            tar = TarWriter(file)
            at = [tar.add(f"{number}.wav", [content])[:2] for number, content in enumerate(held)]
            tar.close()
    elif kind == "zip":
        with zipfile.ZipFile(where, "w", zipfile.ZIP_DEFLATED) as archive:
            for number, content in enumerate(held):
                archive.writestr(f"{number}.wav", content)
            at = [(info.header_offset, info.compress_size) for info in archive.infolist()]
    elif kind == "parquet":
        rows = [{"bytes": content, "path": ""} for content in held]
        pq.write_table(pa.table({"audio": rows}), where, row_group_size=16)
        at = [divmod(number, 16) for number in range(len(paths))]
    else:
        sounds = [soundfile.read(path)[0].mean(axis=1) for path in paths]
        paths = [f"{path}.mono.wav" for path in paths]
        for path, sound in zip(paths, sounds, strict=True):
            soundfile.write(path, sound, SOURCE_RATE)
        with h5py.File(where, "w") as file:
            file["waveform"] = np.stack([soundfile.read(path, dtype="int16")[0] for path in paths])
            file.attrs["sample_rate"] = SOURCE_RATE
    names = [f"{number}.wav" if kind in ("tar", "zip") else f"{number}" for number in range(len(paths))]
    packed = catalogs.Catalog("bench", folder, catalog.labels)
    for number, clip in enumerate(catalog.clips):
        own = number % len(paths)
        packed.clips.append(replace(clip, path=f"{where}::{names[own]}", at=at[own]))
    return packed, [paths[number % len(paths)] for number in range(len(catalog.clips))]


def parts(catalog: catalogs.Catalog, out: Path, shard: ShardPlan, files: list[str] | None = None) -> dict[str, float]:
    """Seconds of each unavoidable part, over all clips; `files`: what they are outside their container."""
    times: dict[str, float] = {}
    begun = time.perf_counter()

    def lap(name: str) -> None:
        nonlocal begun
        times[name] = time.perf_counter() - begun
        begun = time.perf_counter()

    if files is not None:
        for clip in shard.clips:
            with tempfile.TemporaryFile() as target:
                extract(clip.path, clip.at, target, stamp(clip.path))
        lap("read")
    paths = files or [clip.path for clip in catalog.clips]
    decoded = [decode(path, 0.0, None, rate=AUDIO.sample_rate, seconds=AUDIO.seconds) for path in paths]
    lap("decode")
    waveforms = [encode_waveform(one, AUDIO.samples)[0] for one in decoded]
    lap("encode")
    fbanks = [stored_fbank(waveform, AUDIO) for waveform in waveforms]
    lap("fbank")
    with (out / "parts.tar").open("wb") as file:
        tar = TarWriter(file)
        for number, (waveform, fbank) in enumerate(zip(waveforms, fbanks, strict=True)):
            tar.add(f"{number:05d}.waveform.npy", npy(waveform))
            tar.add(f"{number:05d}.fbank.npy", npy(fbank))
        tar.close()
        file.flush()
        os.fsync(file.fileno())
    lap("write")
    return times


def usual(clips: list[Clip], out: Path) -> float:
    """Seconds of what most scripts do."""
    begun = time.perf_counter()
    with tarfile.open(out / "usual.tar", "w") as tar:
        for clip in clips:
            command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", clip.path]
            command += ["-ac", "1", "-ar", "16000", "-f", "f32le", "-"]
            raw = subprocess.run(command, check=True, capture_output=True).stdout
            waveform = torch.frombuffer(bytearray(raw), dtype=torch.float32)[None, : AUDIO.samples]
            fbank = torchaudio.compliance.kaldi.fbank(
                waveform - waveform.mean(), htk_compat=True, sample_frequency=16000, use_energy=False,
                window_type="hanning", num_mel_bins=128, dither=0.0, frame_shift=10,
            )  # fmt: skip
            for name, array in (("waveform", (waveform[0] * 32767).short()), ("fbank", fbank.half())):
                payload = io.BytesIO()
                np.save(payload, array.numpy())
                info = tarfile.TarInfo(f"{clip.key}.{name}.npy")
                info.size = payload.tell()
                payload.seek(0)
                tar.addfile(info, payload)
    return time.perf_counter() - begun


def use_cores(count: int) -> None:
    """Keeps this process and what it starts from now on to `count` of its cores."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, CORES[:count])


def speed(codec: str, files: int, clips: int, workers: int, kind: str = "") -> None:
    """One table; `kind`: of the container."""
    use_cores(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        catalog = generate(folder / "audio", files, clips, codec)
        loose = catalog.clips[:files]
        outside = None
        if kind:
            catalog, outside = pack(catalog, folder, kind)
        options = BuildOptions(AUDIO, clips)
        shard = SplitPlan(catalog, "train", folder / "whole", options).shard(0)
        rounds: dict[str, list[float]] = {}
        decode(loose[0].path, 0.0, None, rate=16000, seconds=10)  # libraries load outside the measure
        for _ in range(ROUNDS):
            found = parts(catalog, folder, shard, outside)
            begun = time.perf_counter()
            write_shard(shard)
            found["whole"] = time.perf_counter() - begun
            found["usual way"] = usual(loose, folder) * clips / files
            for key, value in found.items():
                rounds.setdefault(key, []).append(value)
        times = {key: statistics.median(values) for key, values in rounds.items()}
        total = sum(times[key] for key in ("read", "decode", "encode", "fbank", "write") if key in times)
        print(f"\n{codec}{f' in {kind}' * bool(kind)}: {clips} clips of 10 s ({files} files), one worker on one core")
        print("| part | ms a clip | clips/s |\n|---|---|---|")
        for key, value in {**times, "sum of parts": total}.items():
            print(f"| {key} | {1000 * value / clips:.2f} | {clips / value:.1f} |")
        print(f"sum of parts / whole: {total / times['whole']:.3f}; usual way / whole: "
              f"{times['usual way'] / times['whole']:.2f}")  # fmt: skip
        if not kind:
            scale(catalog, folder, clips, workers)


def scale(catalog: catalogs.Catalog, folder: Path, clips: int, workers: int) -> None:
    """Rates of 1 and of `workers` workers, a core each, once all are at work; their start is left out."""
    size = max(1, clips // (4 * workers))
    rates = {}
    for count in (1, workers):
        laps = []
        use_cores(count)
        for number in range(ROUNDS):
            plan = SplitPlan(catalog, "train", folder / f"{count}-{number}", BuildOptions(AUDIO, size))
            ends = [time.perf_counter() for _ in run(map(plan.shard, range(len(plan))), count)]
            laps.append((len(ends) - count) * size / (ends[-1] - ends[count - 1]))
        rates[count] = statistics.median(laps)
        print(f"{count} worker(s) at work: {rates[count]:.1f} clips/s")
    print(f"speed-up of {workers} workers: {rates[workers] / rates[1]:.2f}")


def simulate(folder: Path, rows: int) -> list[str]:
    """An AudioSet csv of `rows` rows and the listing of files for 85 % of them; returns the builder's options."""
    rng = np.random.default_rng(0)
    letters = np.array(list(string.ascii_letters + string.digits + "-_"))
    segments, listing, labels = (folder / name for name in ("segments.csv", "files.txt", "labels.csv"))
    labels.write_text("index,mid,display_name\n" + "".join(f"{i},/m/{i:04d},class {i}\n" for i in range(527)))
    with segments.open("w") as table, listing.open("w") as files:
        for number in range(rows):
            name = "".join(letters[rng.integers(0, 64, 11)])
            start, mids = 10 * int(rng.integers(0, 60)), rng.integers(0, 527, rng.integers(1, 5))
            table.write(f'{name}, {start}.000, {start + 10}.000, "{",".join(f"/m/{mid:04d}" for mid in mids)}"\n')
            if rng.random() < 0.85:
                files.write(f"part{number % 40:02d}/Y{name}.m4a\n")
    return ["--dataset", "audioset", "--segments", str(segments), "--class-labels", str(labels), "--audio-root",
            "/data/audioset", "--audio-list", str(listing), "--split", "train"]  # fmt: skip


def parquet(folder: Path, rows: int) -> list[str]:
    """AudioSet as the hub has it, `rows` rows in 40 files of row groups of 100; returns the builder's options."""
    rng = np.random.default_rng(0)
    (folder / "data" / "unbal_train").mkdir(parents=True)
    for number in range(40):
        first, last = number * rows // 40, (number + 1) * rows // 40
        labels = [[f"/m/{mid:04d}" for mid in rng.integers(0, 527, 2)] for _ in range(first, last)]
        columns = {"video_id": [f"{row:011d}" for row in range(first, last)], "labels": labels, "human_labels": labels,
                   "audio": [{"bytes": b"none", "path": "x.flac"}] * (last - first)}  # fmt: skip
        pq.write_table(pa.table(columns), folder / "data" / "unbal_train" / f"{number:02d}.parquet", row_group_size=100)
    return ["--root", str(folder / "data")]


def catalog_cost(rows: int, make: Callable[[Path, int], list[str]]) -> None:
    """Time and peak memory of --dry-run, in a process of its own."""
    with tempfile.TemporaryDirectory() as name:
        words = make(Path(name), rows)
        script = str(ROOT / "shard_tools" / "build_shards.py")
        line = [sys.executable, script, *words, "--out", f"{name}/out", "--dry-run"]
        begun = time.perf_counter()
        done = subprocess.run(line, check=True, capture_output=True, text=True, cwd=ROOT)
        seconds = time.perf_counter() - begun
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6
        print(f"\n--dry-run of {rows} rows ({make.__name__}): {seconds:.0f} s, peak memory {peak:.2f} GB")
        print(done.stdout.replace(name, "..."), end="")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=64)
    parser.add_argument("--clips", type=int, default=512, help="of a shard")
    parser.add_argument("--codec", nargs="*", default=["m4a", "wav"])
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--containers", nargs="*", default=["tar", "zip", "parquet", "h5"])
    parser.add_argument("--catalog", type=int, metavar="N")
    parser.add_argument("--rows", type=int, metavar="N")
    args = parser.parse_args()
    torch.set_num_threads(1)
    cores = f"{os.cpu_count()} cores, torch {torch.__version__}, torchaudio {torchaudio.__version__}"
    print(f"{cores}, Python {sys.version.split()[0]}")
    if args.catalog:  # first: the peak of children is that of the largest
        catalog_cost(args.catalog, simulate)
    if args.rows:
        catalog_cost(args.rows, parquet)
    for codec in args.codec:
        speed(codec, args.files, args.clips, args.workers)
    for kind in args.containers:
        speed("wav", args.files, args.clips, args.workers, kind)


if __name__ == "__main__":
    main()
