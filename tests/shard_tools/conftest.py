"""Two splits of generated audio and their shards, which no test changes."""

import pytest

from shard_tools import catalogs
from shard_tools.build import Summary, build
from shard_tools.catalogs import Catalog
from tests.helpers import options, synth_catalog

SECONDS, CLIPS, PER_SHARD = 0.1, 46, 6


@pytest.fixture(scope="session")
def audio(tmp_path_factory):
    """Of CLIPS clips, splits train and eval."""
    source = tmp_path_factory.mktemp("audio") / "source"
    synth_catalog(source, CLIPS, SECONDS)
    return source


@pytest.fixture(scope="session")
def whole(audio, tmp_path_factory):
    """Both splits, train first."""
    out = tmp_path_factory.mktemp("whole")
    for split in ("train", "eval"):
        run(audio, out, split)
    return out


def of(source, split: str) -> Catalog:
    return catalogs.table(source, source / "table.csv", None, split)


def run(source, out, split: str, per_shard: int = PER_SHARD, **words: bool) -> Summary:
    return build(of(source, split), out, options(SECONDS, per_shard), 1, engine="inline", **words)
