"""Inputs of several lengths: a batch has one, each clip its own, and all else is as with one length."""

import itertools
from fractions import Fraction

import numpy as np
import pytest
import torch

from pipeline.config import AugmentConfig, DataConfig
from pipeline.data.lengths import EvalLengths, LengthOrder
from pipeline.data.loader import Loader
from pipeline.data.order import EvalOrder, Part, TrainOrder
from pipeline.errors import UserError
from tests.data.test_equality import AUGMENT, global_batches
from tests.helpers import shards_of_lengths

BATCH = 12
SECONDS = (0.2, 0.4)  # and 0.8, the shards'
LENGTHS = [3200, 6400, 12800]
CLIPS = {0.15: 40, 0.2: 11, 0.31: 50, 0.8: 30}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Shards of 131 clips of training and 26 to evaluate on, of four lengths."""
    return shards_of_lengths(tmp_path_factory.mktemp("lengths"), CLIPS)


def ranks(shards, count=1, workers=0, augment=AUGMENT, **data):
    config = DataConfig(shards=str(shards), workers=workers, seconds=SECONDS, streams=6, window=5, **data)
    return [Loader(config, augment=augment, batch_size=BATCH, seed=1, rank=rank, world_size=count)
            for rank in range(count)]  # fmt: skip


@pytest.mark.parametrize("parts", [(7, 14, 21), (5, 0, 7)])
def test_each_position_of_a_length_comes_once_and_batches_are_of_one(parts):
    shares = [Fraction(part, 7) for part in parts]
    orders = [TrainOrder(Part(np.array([0, n]), None, first, f"p{first}"), 3, 4, 4)
              for n, first in ((40, 0), (41, 40), (60, 81))]  # fmt: skip
    order = LengthOrder(orders, shares, "key", 8)
    rows = order.rows(np.arange(64 * 8 * 3)).reshape(-1, 8)
    of = np.searchsorted([40, 81], rows, side="right")
    assert (of == of[:, :1]).all()
    counts = np.bincount(of[:, 0], minlength=3) / len(of)
    assert np.abs(counts - np.array([float(share / sum(shares)) for share in shares])).max() <= 3 / len(of)
    for number, inner in enumerate(orders):
        own = rows[of[:, 0] == number].reshape(-1)
        assert (own == inner.rows(np.arange(len(own)))).all()


def test_every_clip_has_its_own_length_and_comes_once_an_epoch_of_it(mixed):
    [loader] = ranks(mixed, augment=AugmentConfig())
    with loader:
        assert loader.spec.lengths == tuple(LENGTHS)
        assert loader.length_shares == {n: c / 131 for n, c in zip(LENGTHS, (51, 50, 30), strict=True)}
        seen = {n: [] for n in LENGTHS}
        for batch in itertools.islice(loader.batches(), 66):
            samples = batch.waveform.shape[1]
            shortest = [min(n for n in LENGTHS if n >= length) for length in batch.length.tolist()]
            assert shortest == [samples] * BATCH
            assert batch.frames == batch.fbank.shape[1] == {3200: 32, 6400: 48, 12800: 96}[samples]
            seen[samples] += batch.row.tolist()
        for rows, count in zip(seen.values(), (51, 50, 30), strict=True):
            assert len(set(rows[:count])) == count


def test_the_stored_fbank_of_a_shorter_input_is_that_of_the_shorter_waveform(mixed):
    [stored], [online] = (ranks(mixed, augment=AugmentConfig(), fbank=kind) for kind in ("stored", "online"))
    raw = Loader(DataConfig(shards=str(mixed), workers=0, seconds=SECONDS, streams=6, window=5), raw=True,
                 batch_size=BATCH, seed=1)  # fmt: skip
    with stored, online, raw:
        walks = zip(stored.batches(), online.batches(), raw.batches(), strict=False)
        for one, other, on_device in itertools.islice(walks, 12):
            assert torch.equal(one.waveform, on_device.waveform)
            assert torch.equal(one.fbank, on_device.fbank)
            assert (one.fbank - other.fbank).abs().max() < 2e-3  # float16
            padding = one.fbank[:, 1 + (one.waveform.shape[1] - 400) // 160 :]
            assert padding.numel()
            assert torch.equal(padding, other.fbank[:, -padding.shape[1] :])


@pytest.mark.parametrize("data", [{}, {"sampler": "balanced"}], ids=["shuffle", "balanced"])
def test_ranks_workers_and_resuming_change_no_byte(mixed, data):
    wanted = None
    for count, workers in ((1, 0), (2, 1), (3, 2)):
        loaders = ranks(mixed, count, workers, **data)
        found = global_batches(loaders, 0, 5)
        resumed = global_batches(loaders, 3, 2)
        for loader in loaders:
            loader.close()
        wanted = wanted or found
        for batch, reference in zip([*found, *resumed], [*wanted, *wanted[3:]], strict=True):
            assert batch["key"] == reference["key"]
            assert torch.equal(batch["waveform"], reference["waveform"])
            assert torch.equal(batch["fbank"], reference["fbank"])
            assert torch.equal(batch["targets"], reference["targets"])


def test_a_balanced_sampler_weighs_by_the_classes_of_all_lengths(mixed):
    one = Loader(DataConfig(shards=str(mixed), sampler="balanced", workers=0), batch_size=BATCH)
    [several] = ranks(mixed, augment=AugmentConfig(), sampler="balanced")
    with one, several:
        for found, wanted in zip(several.class_counts(), one.class_counts(), strict=True):
            assert np.allclose(found, wanted)


def test_sets_keep_their_weights_over_all_lengths(mixed, tmp_path):
    other = shards_of_lengths(tmp_path, {0.2: 100, 0.8: 60}, seed=1)
    sets = [{"path": str(mixed), "weight": 3}, {"path": str(other), "weight": 1}]
    config = DataConfig(shards=sets, workers=0, seconds=SECONDS, streams=6, window=5)
    with Loader(config, batch_size=BATCH) as loader:
        batches = [loader.draw(step).rows for step in range(640)]
        of, rows = np.concatenate(batches), np.arange(len(loader._index))
        lengths = np.searchsorted(LENGTHS, loader._index.clips(rows).rows["samples"])
        assert all(len(set(lengths[batch].tolist())) == 1 for batch in batches)
        assert np.mean(of < 157) == pytest.approx(0.75, abs=0.01)
        shares = np.bincount(lengths[of], minlength=3) / len(of)
        wanted = [0.75 * 51 / 131 + 0.25 * 100 / 160, 0.75 * 50 / 131, 0.75 * 30 / 131 + 0.25 * 60 / 160]
        assert shares == pytest.approx(wanted, abs=0.01)


@pytest.mark.parametrize(("sampler", "sets"), [("shuffle", 1), ("shuffle", 2), ("balanced", 1)])
def test_a_length_of_sets_without_weight_alone_never_comes(mixed, tmp_path, sampler, sets):
    """They may be there for their held-out clips."""
    long = shards_of_lengths(tmp_path / "a", {0.31: 24, 0.8: 24}, 1)
    shards = [{"path": str(long), "weight": 1}, {"path": str(mixed), "weight": 0},
              {"path": str(mixed), "weight": 0, "split": "train,eval"}][: 1 + sets]  # fmt: skip
    clips = 48 + 131 + (157 if sets == 2 else 0)
    data = DataConfig(shards=shards, workers=0, seconds=SECONDS, streams=6, window=5, sampler=sampler)
    with Loader(data, augment=AUGMENT, batch_size=BATCH, seed=1) as loader:
        assert loader.length_shares == {LENGTHS[0]: 0.0, LENGTHS[1]: 0.5, LENGTHS[2]: 0.5}
        assert loader.clips == clips
        rows = np.concatenate([batch.row.numpy() for batch in itertools.islice(loader.batches(), 20)])
        assert rows.max() < len(loader._index) - 157 * sets  # of the first set alone
        counts, drawn = loader.class_counts()
        assert counts.sum() == clips
        assert drawn.sum() == pytest.approx(clips)
    with Loader(data, "eval", batch_size=BATCH) as loader:
        assert loader.clips == 8 + 26


def test_an_evaluation_scores_each_clip_once_and_full_batches_come_first(mixed):
    config = DataConfig(shards=str(mixed), workers=0, seconds=SECONDS)
    found = {}
    for count in (1, 2):
        rows = []
        for rank in range(count):
            with Loader(config, "eval", batch_size=4, rank=rank, world_size=count) as loader:
                assert len(loader) == 3 + 3 + 2  # of 10, 10 and 6 clips
                batches = list(loader.batches())
                assert [bool(batch.valid.all()) for batch in batches][:5] == [True] * 5
                assert len(list(loader.batches(full=True))) == 2 + 2 + 1
                for batch in batches:
                    rows += batch.row[batch.valid].tolist()
                    assert len({loader.spec.length_of(n) for n in batch.length.tolist()}) == 1
        found[count] = sorted(rows)
    assert len(set(found[1])) == len(found[1]) == 26
    assert found[1] == found[2]


@pytest.mark.parametrize("rows", [None, np.arange(5, 15, dtype=np.int32)])
@pytest.mark.parametrize(("batch", "fill"), [(4, 2), (5, 0), (16, 6)])
def test_an_evaluation_of_one_length_is_in_the_order_of_the_index(rows, batch, fill):
    order = EvalLengths([EvalOrder(Part(np.array([0, 10]), rows, 5, "p"))], batch)
    filled, valid = order.filled(np.arange(10 + fill))
    assert order.rows(filled).tolist() == [*range(5, 15), *[5] * fill]
    assert valid.tolist() == [True] * 10 + [False] * fill


@pytest.mark.parametrize(
    ("data", "batch", "said"),
    [
        ({"seconds": [0.2, 0.8]}, 4, "data.seconds = .0.2, 0.8.: the clips of .* have 0.8 s, a length of their own"),
        ({"seconds": [0.01]}, 4, "from 0.16 s on"),
        ({"seconds": [0.2, 0.4]}, 40, "batch of 0.8 s would hold 40 clips of the 30 of 0.8 s .* leave that length out"),
    ],
)
def test_lengths_that_cannot_be(mixed, data, batch, said):
    with pytest.raises(UserError, match=said):
        Loader(DataConfig(shards=str(mixed), **data), batch_size=batch)


@pytest.mark.parametrize(
    "data", [{"seconds": [2, 1]}, {"seconds": [1], "frames": 512}, {"seconds": [1], "replacement": False}]
)
def test_settings_that_contradict_each_other(data):
    with pytest.raises(ValueError, match="seconds"):
        DataConfig(shards="x", **data)
