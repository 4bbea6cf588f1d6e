"""Class-balanced draws against their loop-written twin; no clip twice without replacement."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.balance import UNIT
from pipeline.data.order import Part, TrainOrder, part_weights
from tests.reference import balanced as reference

CLASSES = 4


def table(clips: list[list[int]]) -> SimpleNamespace:
    """Labels of index rows 0, 1, ..."""
    offsets = np.cumsum([0, *map(len, clips)])
    return SimpleNamespace(label_offsets=offsets, label_values=np.array([x for labels in clips for x in labels], int))


def order_of(clips: list[list[int]], draws: int, replacement: bool, seed: int = 0, per_shard: int = 4) -> TrainOrder:
    part = Part.of(np.arange(len(clips)), np.arange(len(clips)) // per_shard, "digest")
    return TrainOrder(part, seed, 4, 8, part_weights(part, table(clips), CLASSES), draws, replacement)


def counts_of(order: TrainOrder, epoch: int) -> np.ndarray:
    rows = order.rows(epoch * len(order) + np.arange(len(order)))
    return np.bincount(rows, minlength=len(order.part))


def skewed(count: int) -> list[list[int]]:
    """Class 0 is common, 3 rare; some clips have two labels, some none."""
    clips = []
    for number in range(count):
        labels = [0] if number % 8 else [1 + number // 8 % 3]
        if number % 10 == 3:
            labels = sorted({*labels, 2})
        clips.append([] if number % 13 == 12 else labels)
    return clips


label_lists = st.lists(st.sets(st.integers(0, CLASSES - 1), max_size=3).map(sorted), min_size=1, max_size=60)


@settings(max_examples=50, deadline=None)
@given(clips=label_lists, first=st.integers(0, 5), step=st.integers(1, 3))
def test_weights_are_the_reference_s_for_any_part(clips, first, step):
    """Also for a part that is every second or third row of the index, as a fold is."""
    rows = np.arange(first, len(clips), step)
    if not len(rows):
        return
    part = Part.of(rows, rows // 7, "k")
    weights = part_weights(part, table(clips), CLASSES)
    found = np.concatenate([weights.of(shard) for shard in range(len(part.starts) - 1)])
    expected = reference.clip_weights([clips[row] for row in rows], CLASSES)
    assert found / UNIT == pytest.approx([float(weight) for weight in expected], rel=1e-9)


@settings(max_examples=40, deadline=None)
@given(clips=label_lists, draws=st.integers(1, 90), seed=st.integers(0, 5))
def test_an_epoch_with_replacement_keeps_to_the_expected_draws(clips, draws, seed):
    """A clip covers some slices whole, one draw each, and at most two in part."""
    expected = np.array(reference.expected_draws(reference.clip_weights(clips, CLASSES), draws), float)
    counts = counts_of(order_of(clips, draws, True, seed), seed)
    assert counts.sum() == draws
    assert (abs(counts - expected) < 2).all()


@settings(max_examples=40, deadline=None)
@given(clips=label_lists.filter(lambda clips: len(clips) > 1), share=st.floats(0.01, 0.99), seed=st.integers(0, 5))
def test_an_epoch_without_replacement_draws_no_clip_twice(clips, share, seed):
    draws = max(1, int(share * (len(clips) - 1)))
    counts = counts_of(order_of(clips, draws, False, seed), seed)
    assert counts.sum() == draws
    assert counts.max() == 1


@pytest.mark.parametrize(("draws", "replacement"), [(100, True), (37, True), (250, True), (40, False), (90, False)])
def test_mean_draws_are_the_reference_s(draws, replacement):
    """Over 800 epochs each clip's mean lies within 5 standard errors of what the twin says."""
    clips, epochs = skewed(100), 800
    weights = reference.clip_weights(clips, CLASSES)
    twin = reference.expected_draws if replacement else reference.inclusion
    expected = np.array(twin(weights, draws), float)
    order = order_of(clips, draws, replacement, per_shard=40)
    by_class = [sum(expected[clip] for clip, labels in enumerate(clips) if c in labels) for c in range(CLASSES)]
    assert order.weights.drawn(draws) == pytest.approx(by_class, rel=1e-6)
    counts = np.array([counts_of(order, epoch) for epoch in range(epochs)])
    error = np.sqrt(np.minimum(expected, 1) / epochs) + 1e-9
    assert (abs(counts.mean(0) - expected) < 5 * error).all()


def test_neighbours_are_drawn_together_as_often_as_others():
    """Equally spaced points on a fixed line would never draw two neighbours; the line changes with each epoch."""
    order = order_of([[0]] * 40, 10, replacement=False, per_shard=40)
    drawn = np.array([counts_of(order, epoch) for epoch in range(1500)], float)
    together = drawn.T @ drawn / len(drawn)
    independent = 10 / 40 * 9 / 39
    assert np.diag(together, 1).mean() == pytest.approx(independent, rel=0.1)
    assert together[np.triu_indices(40, 2)].mean() == pytest.approx(independent, rel=0.05)
