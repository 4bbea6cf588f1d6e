"""The loader's promise: the same clips and bytes in each global batch, whatever reads them and wherever it resumes.

Batches 0 to 5 of 12 clips, that is one epoch of 67 clips and the start of the next; every augmentation is on. A run is
resumed by loaders of its own, as in a process that was started again.
"""

import numpy as np
import pytest
import torch

from pipeline.config import AugmentConfig, DataConfig
from pipeline.data.loader import Loader

BATCH, COUNT = 12, 6
NAMES = ("position", "row", "valid", "waveform", "fbank", "targets", "length")
AUGMENT = AugmentConfig(mixup=0.5, freq_mask=24, time_mask=16, noise=0.1, noise_snr=(10, 20), roll=0.05)
PLACES = [(1, 0), (1, 2), (2, 1), (4, 2), (3, 1)]
LOCAL = [*((*place, sampler) for place in PLACES for sampler in ("shuffle", "balanced")),
         (1, 0, "without"), (2, 1, "without"), (1, 2, "splits"), (3, 0, "splits")]  # fmt: skip
# Readers know one place from another, the order does not: readers of one rank, ranks that read, readers of several.
REMOTE = [(1, 2, "splits"), (2, 0, "without"), (2, 1, "balanced"), (4, 2, "shuffle")]
SAMPLERS = {
    "shuffle": {},
    "balanced": {"sampler": "balanced"},
    "without": {"sampler": "balanced", "replacement": False, "epoch_clips": 40},
    "splits": {"train_split": "eval,train"},
}


def open_ranks(shards: object, ranks: int, workers: int, sampler: str, cache: object) -> list[Loader]:
    data = DataConfig(shards=str(shards), workers=workers, streams=6, window=5, cache=str(cache), **SAMPLERS[sampler])
    return [
        Loader(data, augment=AUGMENT, batch_size=BATCH, seed=1, rank=rank, world_size=ranks) for rank in range(ranks)
    ]


def global_batches(loaders: list[Loader], first: int, count: int) -> list[dict[str, object]]:
    """Batches first .. first + count - 1: keys and tensors in global order."""
    walks = [loader.batches(first) for loader in loaders]
    whole = []
    for _ in range(count):
        parts = [next(walk) for walk in walks]
        order = torch.cat([part.position for part in parts]).argsort()
        batch: dict[str, object] = {name: torch.cat([getattr(part, name) for part in parts])[order] for name in NAMES}
        keys = [key for loader, part in zip(loaders, parts, strict=True) for key in loader.keys(part.row.tolist())]
        batch["key"] = [keys[i] for i in order.tolist()]
        whole.append(batch)
    for walk in walks:
        walk.close()
    return whole


@pytest.fixture(scope="module")
def expected(shards, tmp_path_factory):
    """One rank that reads by itself, from the local directory, from the start."""
    out = {}
    for sampler in SAMPLERS:
        loaders = open_ranks(shards, 1, 0, sampler, tmp_path_factory.mktemp("cache"))
        out[sampler] = global_batches(loaders, 0, COUNT)
        loaders[0].close()
    return out


def check(loaders, expected, first, count):
    for batch, reference in zip(global_batches(loaders, first, count), expected[first : first + count], strict=True):
        assert batch["key"] == reference["key"]
        for name in NAMES:
            assert batch[name].dtype == reference[name].dtype
            assert torch.equal(batch[name], reference[name]), name


def test_the_reference_is_an_epoch_of_different_augmented_clips(expected):
    """What the other tests compare with is not trivially equal."""
    keys = [key for batch in expected["shuffle"] for key in batch["key"]]
    epoch = len(set(keys))
    assert BATCH * 4 < epoch < BATCH * COUNT
    assert len(set(keys[:epoch])) == epoch
    positions = np.concatenate([batch["position"] for batch in expected["shuffle"]])
    assert positions.tolist() == list(range(BATCH * COUNT))
    again = {key: i for i, key in enumerate(keys[:epoch])}
    first, second = again[keys[epoch]], epoch
    waves = torch.cat([batch["waveform"] for batch in expected["shuffle"]])
    assert not torch.equal(waves[first], waves[second])  # the same clip, augmented anew
    drawn = [key for batch in expected["without"] for key in batch["key"]]
    assert len(set(drawn[:40])) == 40
    both = [row for batch in expected["splits"] for row in batch["row"].tolist()]
    assert len(set(both)) == BATCH * COUNT > epoch  # of 80 clips in two splits


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    """A node's cache for each sampler: the first one is cold, and what it fetched serves the others."""
    return {sampler: tmp_path_factory.mktemp("cache") for sampler in SAMPLERS}


@pytest.mark.parametrize(
    ("source", "ranks", "workers", "sampler"),
    [*(("shards", *cell) for cell in LOCAL), *(("s3_shards", *cell) for cell in REMOTE)],
)
def test_ranks_workers_and_resuming_anywhere_change_no_byte(
    request, tmp_path, expected, caches, source, ranks, workers, sampler
):
    """From a directory and from a store: whole runs, with a cold cache, and resumes at every batch, with a warm one."""
    place = request.getfixturevalue(source)
    for first in range(COUNT):
        cache = tmp_path if first == 0 and sampler == "shuffle" else caches[sampler]
        loaders = open_ranks(place, ranks, workers, sampler, cache)
        check(loaders, expected[sampler], first, 1 if first else COUNT)
        for loader in loaders:
            loader.close()
