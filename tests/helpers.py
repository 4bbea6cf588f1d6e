"""Small shards for tests, made by the real builder from generated audio."""

import hashlib
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import soundfile

from pipeline.data.manifest import load_manifest
from shard_tools import catalogs
from shard_tools.build import Summary, build
from shard_tools.plan import BuildOptions
from shard_tools.synth import write_synth
from shard_tools.write import AudioOptions


def synth_catalog(source: Path, clips: int = 80, seconds: float = 0.5) -> catalogs.Catalog:
    table = write_synth(source, clips, seconds, 16000, seed=0)
    return catalogs.table(source, table, None, None)


def options(seconds: float = 0.5, per_shard: int = 8) -> BuildOptions:
    return BuildOptions(AudioOptions(seconds=seconds), per_shard)


def synth_shards(out: Path, clips: int = 80, seconds: float = 0.5, per_shard: int = 8, workers: int = 1) -> Summary:
    catalog = synth_catalog(out / "source", clips, seconds)
    return build(catalog, out, options(seconds, per_shard), workers, engine="process" if workers > 1 else "inline")


def shards_of_lengths(folder: Path, clips: dict[float, int], seed: int = 0) -> Path:
    """Shards of 0.8 s of noise that lasts so many seconds; a fifth as many clips of each length to evaluate on."""
    rng, lines = np.random.default_rng(seed), ["path,labels,split"]
    folder.mkdir(parents=True, exist_ok=True)
    for seconds, count in clips.items():
        for number in range(count + count // 5):
            name = f"{round(1000 * seconds)}-{number}.wav"
            soundfile.write(folder / name, rng.normal(0, 0.1, round(seconds * 16000)), 16000)
            lines.append(f"{name},{'ab'[number % 7 == 0]},{'train' if number < count else 'eval'}")
    (folder / "table.csv").write_text("\n".join(lines) + "\n")
    catalog = catalogs.table(folder, folder / "table.csv", None, None)
    build(catalog, folder / "shards", options(0.8, 16), 1, engine="inline")
    return folder / "shards"


def edit_manifest(out: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Changes manifest.json; its digest fits the new content, and its record of the index the index that is there."""
    content = json.loads((out / "manifest.json").read_text())
    if (out / "index.parquet").exists():
        index = (out / "index.parquet").read_bytes()
        content["index"] = {"size": len(index), "sha256": hashlib.sha256(index).hexdigest()}
    change(content)
    del content["digest"]
    words = json.dumps(content, sort_keys=True, separators=(",", ":"))
    content["digest"] = hashlib.sha256(words.encode()).hexdigest()
    (out / "manifest.json").write_text(json.dumps(content))


def write_index(out: Path, table: Any, **options: Any) -> None:
    """Another index, which the manifest lists."""
    pq.write_table(table, out / "index.parquet", **options)
    edit_manifest(out, lambda content: None)


def digests(out: Path) -> dict[str, str]:
    """sha256 of every product of a build."""
    files = sorted(path for path in out.glob("*.*") if path.is_file())
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def damaged_copy(shards: Path, out: Path, bad: int) -> Path:
    """Copies shards, with `bad` clips of the first one damaged, whose tar it returns."""
    shutil.copytree(shards, out)
    tar = out / load_manifest(shards).shards[0].name
    content = bytearray(tar.read_bytes())
    with tarfile.open(tar) as opened:
        members = [member for member in opened.getmembers() if member.name.endswith(".npy")]
    keys = list(dict.fromkeys(member.name.split(".")[0] for member in members))[:bad]
    for member in members:
        if member.name.split(".")[0] in keys:
            content[member.offset_data + 200 : member.offset_data + 204] = b"\1\2\3\4"
    tar.write_bytes(content)
    return tar
