"""The sample order: every clip once an epoch, a function of position alone, in the rank's own shards."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.order import Part, TrainOrder, balanced_weights


def part(clips: int, per_shard: int = 10) -> Part:
    return Part(np.arange(clips) + 1000, np.arange(clips) // per_shard, "digest/train")


@settings(max_examples=60, deadline=None)
@given(clips=st.integers(1, 200), streams=st.integers(1, 70), window=st.integers(1, 50), seed=st.integers(0, 9))
def test_every_clip_once_an_epoch(clips, streams, window, seed):
    order = TrainOrder(part(clips), seed, streams, window)
    for epoch in (0, 1, 7):
        rows = order.rows(epoch * clips + np.arange(clips))
        assert np.array_equal(np.sort(rows), np.arange(clips) + 1000)


def test_any_question_gives_the_same_answer():
    """A fresh order asked for scattered positions agrees with one that walked there."""
    walked = TrainOrder(part(137), 3, 8, 16).rows(np.arange(500))
    asked = np.random.default_rng(0).permutation(500)
    assert np.array_equal(TrainOrder(part(137), 3, 8, 16).rows(asked), walked[asked])


def test_epochs_seeds_and_data_differ():
    base = TrainOrder(part(100), 0, 8, 16)
    first = base.rows(np.arange(100))
    assert not np.array_equal(first, base.rows(np.arange(100, 200)))
    assert not np.array_equal(first, TrainOrder(part(100), 1, 8, 16).rows(np.arange(100)))
    other = Part(part(100).rows, part(100).shards, "other/train")
    assert not np.array_equal(first, TrainOrder(other, 0, 8, 16).rows(np.arange(100)))


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_rank_touches_only_its_own_shards(ranks):
    """4000 clips in 400 shards, 8 streams: a rank's epoch lies in 1 / R of the shards, plus those at cuts."""
    order = TrainOrder(part(4000), 0, 8, 64)
    shards = part(4000).shards
    for rank in range(ranks):
        rows = order.rows(np.arange(rank, 4000, ranks)) - 1000
        assert len(np.unique(shards[rows])) <= 400 / ranks + 2 * 8 / ranks


def test_balanced_draws_follow_the_weights():
    weights = np.r_[np.full(90, 1.0), np.full(10, 9.0)]
    drawn = TrainOrder(part(100), 0, 4, 32, weights).rows(np.arange(100 * 100)) - 1000
    assert (drawn >= 90).mean() == pytest.approx(0.5, abs=0.03)
    exact = TrainOrder(part(100), 0, 4, 32, weights, replacement=False).rows(np.arange(100)) - 1000
    counts = np.bincount(exact, minlength=100)
    expected = 100 * weights / weights.sum()
    assert ((counts >= np.floor(expected)) & (counts <= np.ceil(expected))).all()


def test_weights_are_asts():
    offsets, labels = np.array([0, 1, 3, 3]), np.array([0, 0, 1])
    weights = balanced_weights(offsets, labels, classes=3)
    a, b = 1000 / 2.01, 1000 / 1.01
    assert weights == pytest.approx([a, a + b, a])


def test_partners_share_the_window_and_are_others():
    order = TrainOrder(part(200), 0, 4, 25)
    positions = np.arange(200)
    partners = order.partners(positions, np.random.default_rng(0).random(200))
    assert (partners != order.rows(positions)).all()
    assert np.array_equal(partners, TrainOrder(part(200), 0, 4, 25).partners(
        positions, np.random.default_rng(0).random(200)))  # fmt: skip


def test_a_partner_is_another_clip_among_weighted_draws_too():
    order = TrainOrder(part(40), 0, 2, 20, np.r_[np.ones(30), np.full(10, 20.0)])
    positions = np.arange(400)
    rows = order.rows(positions)
    assert len(np.unique(rows[:40])) < 40  # draws repeat
    assert (order.partners(positions, np.random.default_rng(0).random(400)) != rows).all()
