"""Small shards for tests, made by the real builder from generated audio."""

from pathlib import Path

from shard_tools import catalogs
from shard_tools.build import BuildOptions, Summary, build
from shard_tools.synth import write_synth
from shard_tools.write import AudioOptions


def synth_shards(out: Path, clips: int = 80, seconds: float = 0.5, per_shard: int = 8, workers: int = 1) -> Summary:
    table = write_synth(out / "source", clips, seconds, 16000, seed=0)
    catalog = catalogs.table(out / "source", table, None, None)
    return build(catalog, out, BuildOptions(AudioOptions(seconds=seconds), per_shard), workers)
