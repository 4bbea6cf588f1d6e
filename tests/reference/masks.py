"""Mask generators with loops over clips, squares and patches, fed with the same random numbers."""

import torch

from pipeline.rng import uniform


def clusters(seed, purpose, position, grid, count, sides) -> list[list[int]]:
    """Unbiased: squares that wrap around, the best-scored first, the last one broken at random."""
    height, width = grid
    total = height * width
    masks = []
    for row in uniform(seed, purpose, torch.tensor(position), 2 * total + 1).double().tolist():
        score, tie, side = row[:total], row[total : 2 * total], sides[int(row[-1] * len(sides))]
        best = [0.0] * total
        for corner in range(total):
            f, t = divmod(corner, width)
            for i in range(min(side, height)):
                for j in range(min(side, width)):
                    # The square's corner is at its lower left: it covers patches before it, around the border.
                    patch = ((f - i) % height) * width + (t - j) % width
                    best[patch] = max(best[patch], score[corner])
        ranked = sorted(range(total), key=lambda patch: (best[patch], tie[patch]), reverse=True)
        masks.append(sorted(ranked[:count]))
    return masks


def ssast(seed, purpose, position, grid, count, sides, throws) -> list[list[int]]:
    """SSAST's published procedure: throw squares until too many patches are masked, keep the first."""
    width, total = grid[1], grid[0] * grid[1]
    masks = []
    for row in uniform(seed, purpose, torch.tensor(position), throws * total + 1).tolist():
        side = sides[int(row[-1] * len(sides))]
        masked: set[int] = set()
        numbers = iter(row)
        while len(masked) <= count:
            start = int(next(numbers) * total)
            for i in range(side):
                for j in range(side):
                    patch = start + width * i + j
                    if 0 < patch < total:
                        masked.add(patch)
        masks.append(sorted(masked)[:count])
    return masks


def split(seed, purpose, position, grid, kind, ratio, sides) -> list[tuple[list[int], list[int]]]:
    """Visible and dropped patches of each clip: the units with the largest draws go."""
    height, width = grid
    total = height * width
    units = {"time": width, "frequency": height}.get(kind, total)
    count = units - int(units * (1 - ratio) + 1e-9)  # AudioMosaic: len_keep = int(F * (1 - mask_ratio))
    splits = []
    for clip, row in zip(position, uniform(seed, purpose, torch.tensor(position), units).tolist(), strict=True):
        dropped = set(sorted(range(units), key=lambda unit: (row[unit], unit), reverse=True)[:count])
        if kind == "cluster":
            dropped = set(clusters(seed, purpose, [clip], grid, count, sides)[0])
        visible, masked = [], []
        for patch in range(total):
            f, t = divmod(patch, width)
            unit = {"time": t, "frequency": f}.get(kind, patch)
            (masked if unit in dropped else visible).append(patch)
        splits.append((visible, masked))
    return splits
