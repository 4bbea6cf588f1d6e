"""Bad clips and locality: what stands in, who counts, and which bytes a rank asks for."""

import shutil
from collections import Counter

import pytest
import torch

from pipeline.config import DataConfig
from pipeline.data.loader import Needs, Place, build_loader
from pipeline.errors import UserError

BATCH = 12


def loader(shards, rank=0, ranks=1, batch=BATCH, **data):
    config = DataConfig(shards=str(shards), **{"streams": 4, "window": 8, "workers": 0} | data)
    needs, place = Needs(waveform=False, fbank=True), Place(rank, ranks, torch.device("cpu"))
    return build_loader(config, None, part="train", needs=needs, batch_size=batch, seed=1, place=place)


def taken(own, count, first=0):
    batches = own.train_batches(first)
    return [next(batches) for _ in range(count)]


@pytest.fixture
def copy(shards, tmp_path):
    out = tmp_path / "copy"
    shutil.copytree(shards, out, ignore=shutil.ignore_patterns("source"))
    return out


def lose(copy, keep=0, count=0):
    """Deletes training shards: all but `keep`, or `count` of them."""
    tars = sorted(copy.glob("train-*.tar"))
    for tar in tars[keep:] if keep else tars[:count]:
        tar.unlink()


def test_a_lost_shard_is_made_up_for_by_many_clips_and_no_batch_repeats_one(copy):
    lose(copy, count=2)
    with loader(copy) as own, loader(copy) as planner:
        per_epoch = own.clips // BATCH
        planned, used = [], []
        for step, batch in enumerate(taken(own, per_epoch)):
            rows = planner._order.rows(batch.position.numpy()).tolist()
            planned += rows
            used += batch.row.tolist()
            assert len(set(batch.row.tolist())) == BATCH, f"batch {step} holds a clip twice"
        stand_ins = Counter(u for p, u in zip(planned, used, strict=True) if p != u)
        assert sum(stand_ins.values()) == own.replaced(0) > 8
        assert max(stand_ins.values()) <= 4
        assert len(stand_ins) >= sum(stand_ins.values()) / 2


@pytest.mark.parametrize(("ranks", "workers"), [(2, 1), (3, 0), (4, 2)])
def test_stand_ins_and_counts_do_not_depend_on_ranks_or_workers(copy, ranks, workers):
    lose(copy, count=3)
    with loader(copy) as own:
        expected = taken(own, 8)
        counts = [own.replaced(step) for step in (0, 7)]
    found, found_counts = [], Counter()
    for rank in range(ranks):
        with loader(copy, rank, ranks, workers=workers) as own:
            found.append(taken(own, 8))
            found_counts.update({step: own.replaced(step) for step in (0, 7)})
    assert [found_counts[step] for step in (0, 7)] == counts
    for step, reference in enumerate(expected):
        pieces = [batches[step] for batches in found]
        order = torch.cat([piece.position for piece in pieces]).argsort()
        assert torch.equal(torch.cat([piece.row for piece in pieces])[order], reference.row)
        assert torch.equal(torch.cat([piece.fbank for piece in pieces])[order], reference.fbank)


def test_ranks_cannot_become_uneven_even_where_all_their_clips_are_lost(copy):
    lose(copy, keep=1)
    sizes = []
    for rank in range(3):
        with loader(copy, rank, 3) as own:
            batches = taken(own, 7)
            sizes.append([len(batch) for batch in batches])
            assert all(batch.valid.all() for batch in batches)
            assert own.replaced(0) > own.clips // 3 // 2
    assert sizes == [[BATCH // 3] * 7] * 3


def test_the_limit_is_of_an_epoch_not_of_the_run(copy):
    lose(copy, count=1)
    with loader(copy) as own:
        epochs = 3 * own.clips // BATCH
        taken(own, epochs)
        once = own.replaced(0)
        assert own.replaced(epochs - 1) <= once + BATCH
    with loader(copy, max_bad=once + BATCH) as own:
        taken(own, epochs)
    with loader(copy, max_bad=once - 1) as own, pytest.raises(
        UserError, match=rf"data.max_bad = {once - 1}: {once} samples of one epoch .* such as .*train-000000.tar"
    ):
        taken(own, epochs)


def test_the_limit_counts_all_ranks(copy):
    with loader(copy, max_bad=5) as own:
        own.bad_clips.check(5)
        with pytest.raises(UserError, match=r"data.max_bad = 5: 6 samples of one epoch") as caught:
            own.bad_clips.check(6)
        assert not caught.value.local


def test_no_clip_left_is_an_error_and_not_an_endless_search(copy):
    lose(copy, keep=1)
    sorted(copy.glob("train-*.tar"))[0].unlink()
    with loader(copy) as own, pytest.raises(UserError, match=r"no clip can be read in place of"):
        taken(own, 1)


def test_a_batch_larger_than_an_epoch_is_refused(shards):
    with loader(shards) as own:
        clips = own.clips
    with pytest.raises(UserError, match=rf"train.batch_size = {clips + 1}: an epoch has {clips} clips"):
        loader(shards, batch=clips + 1)
    with loader(shards, batch=clips) as own:
        assert len(set(taken(own, 1)[0].row.tolist())) == clips


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_rank_reads_its_own_bytes_of_its_own_shards(shards, ranks):
    """Streams of one window: S = 4; a rank's shards are those of its S / R streams, and those at their cuts."""
    with loader(shards, batch=4) as own:
        steps = own.clips // 4
        clip = own.manifest.fbank.frames * own.manifest.fbank.mel_bins * 2 + 128
        assert own._order.streams == 4
    touched = []
    for rank in range(ranks):
        with loader(shards, rank, ranks, batch=4) as own:
            taken(own, steps)
            touched.append(own.touched)
            assert sum(own.touched.values()) == steps * 4 // ranks * clip
            shard_count = len([shard for shard in own.manifest.shards if shard.split == "train"])
    per_rank = [len(shards) for shards in touched]
    assert max(per_rank) <= shard_count / ranks + 2 * (ranks > 1) + 4 // ranks * (ranks > 1)
    if ranks == 4:  # two nodes of two ranks: a node touches about half of the shards, and each but those at cuts once
        nodes = [touched[0].keys() | touched[1].keys(), touched[2].keys() | touched[3].keys()]
        assert sum(map(len, nodes)) <= shard_count + 6
