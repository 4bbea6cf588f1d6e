"""Small shards for tests, made by the real builder from generated audio."""

import hashlib
from pathlib import Path

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


def digests(out: Path) -> dict[str, str]:
    """sha256 of every product of a build."""
    files = sorted(path for path in out.glob("*.*") if path.is_file())
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
