"""How near the order comes to a true permutation, in the worst case: clips stored class by class.

    python -m tests.benchmarks.bench_shuffle [--clips N] [--batch G]

In: nothing. Out: a table on stdout. Clips lie in shards in the order of a value that runs from 0 to 1 (sorted by
class, by date, by source). Every column is relative to true permutations, so 1.00 is perfect:

- mean: deviation of the batches' mean values. Above 1, the gradient's noise is that much larger than it need be.
- near: how often two clips of a batch come from the same shard.
- next epoch: how often two clips that shared a batch share one again in the next epoch.
- drift: deviation of the mean values of runs of 100 batches. Above 1, the data changes slowly under the model.

`true` is a permutation measured like the others: its distance from 1 is the measure's own noise. `shards+buffer` is
what a WebDataset pipeline does: shards in random order, then a shuffle buffer of so many clips. `built` is the default
order on shards as build_shards.py writes them, which permutes the clips before it deals them to shards.
"""

import argparse
from collections.abc import Callable

import numpy as np

from pipeline.data.order import Part, TrainOrder

PER_SHARD = 512
Epoch = Callable[[int], np.ndarray]


def ours(clips: int, streams: int, window: int) -> Epoch:
    """Clip numbers of an epoch in our order."""
    order = TrainOrder(Part.of(np.arange(clips), np.arange(clips) // PER_SHARD, "bench"), 0, streams, window)
    return lambda epoch: order.rows(epoch * clips + np.arange(clips))


def true(clips: int, seed: int = 0) -> Epoch:
    """A true permutation."""
    return lambda epoch: np.random.default_rng([seed, epoch]).permutation(clips)


def buffered(clips: int, buffer: int) -> Epoch:
    """Shards in random order, walked through a buffer from which a random clip leaves for each that enters."""

    def epoch(number: int) -> np.ndarray:
        rng = np.random.default_rng([7, number])
        shards = rng.permutation(-(-clips // PER_SHARD))
        source = np.concatenate([np.arange(s * PER_SHARD, min(clips, (s + 1) * PER_SHARD)) for s in shards])
        if not buffer:
            return source
        held, out = source[:buffer].copy(), np.empty_like(source)
        choices = rng.integers(0, buffer, len(source))
        for i, clip in enumerate(source[buffer:].tolist()):
            out[i] = held[choices[i]]
            held[choices[i]] = clip
        out[len(source) - buffer :] = rng.permutation(held)
        return out

    return epoch


def scores(epoch: Epoch, value: np.ndarray, batch: int) -> np.ndarray:
    """The four figures, not yet relative; `value` [clips] lies between 0 and 1."""
    count = len(value) // batch
    first, second = (epoch(number)[: count * batch].reshape(count, batch) for number in (0, 1))
    means = value[np.concatenate([first, second])].mean(axis=1)
    runs = means[: len(means) // 100 * 100].reshape(-1, 100).mean(axis=1)
    number = np.repeat(np.arange(count), batch)
    batches = np.full((2, len(value)), -1)  # of each clip, in the two epochs
    batches[0, first.ravel()], batches[1, second.ravel()] = number, number
    seen = (batches >= 0).all(axis=0)
    again = pairs(batches[0, seen] * count + batches[1, seen])
    near = pairs(number * len(value) + first.ravel() // PER_SHARD)
    return np.array([means.std(), near, again, np.sqrt(np.mean((runs - 0.5) ** 2))])


def pairs(group: np.ndarray) -> int:
    """Pairs of the same group."""
    sizes = np.unique(group, return_counts=True)[1]
    return int((sizes * (sizes - 1)).sum())


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=400_000)
    parser.add_argument("--batch", type=int, default=180)
    args = parser.parse_args()
    clips, batch = args.clips, args.batch
    ordered = (np.arange(clips) + 0.5) / clips
    perfect = np.mean([scores(true(clips, seed), ordered, batch) for seed in range(1, 9)], axis=0)
    rows = [("true", true(clips), ordered)]
    rows.append(("ours S=64 window=2048, built", ours(clips, 64, 2048), np.random.default_rng(0).permutation(ordered)))
    settings = ((64, 2048), (64, 512), (64, 8192), (16, 2048), (256, 2048), (1, 2048))
    rows += [(f"ours S={s} window={w}", ours(clips, s, w), ordered) for s, w in settings]
    rows += [(f"shards+buffer {b}", buffered(clips, b), ordered) for b in (0, 1000, 10_000, 131_072)]
    print(f"{clips} clips in shards of {PER_SHARD}, batches of {batch}; 1.00: as true permutations")
    print(f"{'order':28s} {'mean':>7s} {'near':>7s} {'next epoch':>11s} {'drift':>7s}")
    for name, epoch, value in rows:
        mean, near, again, drift = scores(epoch, value, batch) / perfect
        print(f"{name:28s} {mean:7.2f} {near:7.2f} {again:11.2f} {drift:7.2f}")


if __name__ == "__main__":
    main()
