"""The sample order: every clip once an epoch, a function of position alone, in the rank's own shards."""

import hashlib
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config import DataConfig
from pipeline.data.order import Part, TrainOrder, part_weights, train_order
from pipeline.errors import UserError

GOLDEN = ["52142181c77652f5", "ee0feee6c75d827a"]  # sha256 of rows: shuffled, balanced


def part(clips: int, per_shard: int = 10) -> Part:
    return Part.of(np.arange(clips) + 1000, np.arange(clips) // per_shard, "digest/train")


@settings(max_examples=60, deadline=None)
@given(clips=st.integers(1, 200), streams=st.integers(1, 70), window=st.integers(1, 50), seed=st.integers(0, 9))
def test_every_clip_once_an_epoch(clips, streams, window, seed):
    order = TrainOrder(part(clips), seed, streams, window)
    for epoch in (0, 1, 7):
        rows = order.rows(epoch * clips + np.arange(clips))
        assert np.array_equal(np.sort(rows), np.arange(clips) + 1000)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6])
def test_the_last_batch_of_an_epoch_is_filled_up_with_the_next_one_for_any_ranks(ranks):
    """100 clips, batches of 12: batch 8 holds the last 4 clips of epoch 0 and the first 8 of epoch 1."""
    clips, size = 100, 12
    order = TrainOrder(part(clips), 0, 6, 8)
    batches = []
    for step in range(25):
        own = [order.rows(step * size + np.arange(rank, size, ranks)) for rank in range(ranks)]
        assert {len(rows) for rows in own} == {size // ranks}
        batches.append(np.stack(own, axis=1).ravel())
    stream = np.concatenate(batches)
    assert np.array_equal(stream, TrainOrder(part(clips), 0, 6, 8).rows(np.arange(300)))
    assert np.array_equal(batches[8], np.r_[stream[96:100], stream[100:108]])
    for epoch in range(3):
        assert len(np.unique(stream[epoch * clips : (epoch + 1) * clips])) == clips


def test_any_question_gives_the_same_answer():
    """A fresh order asked for scattered positions agrees with one that walked there."""
    walked = TrainOrder(part(137), 3, 8, 16).rows(np.arange(500))
    asked = np.random.default_rng(0).permutation(500)
    assert np.array_equal(TrainOrder(part(137), 3, 8, 16).rows(asked), walked[asked])


def test_an_order_stays_the_same_in_later_releases():
    """A run that goes on with another release of this package or of numpy sees the clips it would have seen."""
    plain = TrainOrder(part(1000), 5, 8, 64).rows(np.arange(2500))
    weights = part_weights(part(1000), labelled(np.arange(2000) % 7), 7)
    balanced = TrainOrder(part(1000), 5, 8, 64, weights).rows(np.arange(2500))
    assert [hashlib.sha256(rows.tobytes()).hexdigest()[:16] for rows in (plain, balanced)] == GOLDEN


@pytest.mark.parametrize("rows", [[0, 5, 2], [1, 0, 2], [7, 8, 0, 1, 2], [4, 5, 6]])
def test_a_part_holds_its_rows_in_any_order_of_its_shards(rows):
    found = Part.of(np.array(rows), np.array(rows) // 3, "key")
    assert found.at(np.arange(len(rows))).tolist() == rows
    assert sorted(TrainOrder(found, 0, 2, 2).rows(np.arange(len(rows))).tolist()) == sorted(rows)


def test_epochs_seeds_and_data_differ():
    base = TrainOrder(part(100), 0, 8, 16)
    first = base.rows(np.arange(100))
    assert not np.array_equal(first, base.rows(np.arange(100, 200)))
    assert not np.array_equal(first, TrainOrder(part(100), 1, 8, 16).rows(np.arange(100)))
    other = Part.of(np.arange(100) + 1000, np.arange(100) // 10, "other/train")
    assert not np.array_equal(first, TrainOrder(other, 0, 8, 16).rows(np.arange(100)))


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_a_rank_touches_only_its_own_shards(ranks):
    """4000 clips in 400 shards, 8 streams of 500: a stream lies in at most 51 shards, and 7 shards at most are cut."""
    order = TrainOrder(part(4000), 0, 8, 64)
    shards = np.arange(4000) // 10
    for epoch in (0, 1):
        touched = []
        for rank in range(ranks):
            rows = order.rows(epoch * 4000 + np.arange(rank, 4000, ranks)) - 1000
            touched.append(len(np.unique(shards[rows])))
        assert max(touched) <= 51 * 8 // ranks
        assert 400 <= sum(touched) <= 407


def test_few_clips_are_one_permutation_and_many_keep_their_streams():
    assert [TrainOrder(part(clips), 0, 64, 100).streams for clips in (5, 99, 250, 3200, 6400, 9999)] == [
        1, 1, 2, 32, 64, 64]  # fmt: skip


def test_windows_of_different_streams_do_not_change_together():
    """Of 8 streams of 500 clips and windows of 100: never more than one begins a window at the same slot."""
    order = TrainOrder(part(4000), 0, 8, 100)
    slots = np.arange(500)
    bounds = [order._bounds(np.full(500, stream), slots) for stream in range(8)]
    begins = [set(first.tolist()) - {0} for _, first, _ in bounds]
    assert {len(starts) for starts in begins} == {4}
    assert len(set.union(*begins)) == 32
    for _, first, stop in bounds:
        assert ((first <= slots) & (slots < stop) & (stop <= 500)).all()
        assert ((stop - first >= 50) & (stop - first <= 150)).all()


def test_neighbours_of_the_index_do_not_stay_neighbours():
    """Each clip's place in the epoch, over 400 epochs of 30 clips in 3 shards, is uniform; so is its successor."""
    places, successors = np.zeros((30, 30)), np.zeros((30, 30))
    order = TrainOrder(part(30), 0, 4, 30)
    for epoch in range(400):
        rows = order.rows(epoch * 30 + np.arange(30)) - 1000
        places[rows, np.arange(30)] += 1
        successors[rows[:-1], rows[1:]] += 1
    expected = 400 / 30
    assert ((places - expected) ** 2 / expected).sum() / 29**2 == pytest.approx(1, abs=0.15)
    off = successors[~np.eye(30, dtype=bool)]
    expected = 400 * 29 / 870
    assert ((off - expected) ** 2 / expected).mean() == pytest.approx(1, abs=0.15)


def labelled(classes: np.ndarray) -> SimpleNamespace:
    """One label for each index row."""
    return SimpleNamespace(label_offsets=np.arange(len(classes) + 1), label_values=classes)


def order_of(clips: int = 100, **data: object) -> TrainOrder:
    classes = np.arange(1000 + clips) % 10 // 9  # every tenth clip is of class 1
    return train_order(part(clips), DataConfig(**data), 0, lambda: labelled(classes), 2)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"epoch_clips": 50}, r"data.epoch_clips = 50: data.sampler=shuffle takes each of the 100 clips once"),
        ({"sampler": "balanced", "replacement": False}, r"data.epoch_clips = 0: without replacement"),
        ({"sampler": "balanced", "replacement": False, "epoch_clips": 100}, r"fewer than the 100 clips"),
    ],
)
def test_epochs_that_cannot_be_are_refused(data, said):
    with pytest.raises(UserError, match=said):
        order_of(**data)


def test_partners_share_the_window_and_are_others():
    order = TrainOrder(part(200), 0, 4, 25)
    positions = np.arange(200)
    draws = np.random.default_rng(0).random(200)
    own = order.rows(positions)
    partners = order.partners(positions, draws, own)
    assert (partners != own).all()
    assert np.array_equal(partners, TrainOrder(part(200), 0, 4, 25).partners(positions, draws, own))


def test_a_partner_is_another_clip_among_weighted_draws_too():
    order = order_of(40, sampler="balanced", streams=2, window=20)
    positions = np.arange(400)
    rows = order.rows(positions)
    assert len(np.unique(rows[:40])) < 40  # draws repeat
    for others in (order, TrainOrder(part(40), 1, 2, 20)):
        assert (others.partners(positions, np.random.default_rng(0).random(400), rows) != rows).all()
