"""Which patches are masked or dropped: squares, single patches, columns, rows; exact count, no position favoured.

In: positions of the clips in the sample stream. Out: K patch indices for each, and those of the patches that stay.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812

from pipeline.rng import uniform

GRAIN = 2**24  # draws lie on a grid of 1 / GRAIN
THROWS = 8  # x N throws: enough to cover any patch but with probability e^-16


def cluster_masks(
    seed: int, purpose: str, position: torch.Tensor, grid: tuple[int, int], count: int, sides: tuple[int, ...]
) -> torch.Tensor:
    """Masks `count` of the grid's patches per clip, in square clusters of one random side per clip.

    Every grid point is the corner of a cluster and gets a random score; a patch takes the best score
    of the clusters that cover it, and the `count` best patches are masked, ties within a cluster
    broken at random. Clusters wrap around the borders, so every patch is covered by equally many
    and is masked with probability count / N exactly (SSAST's loop never masks the first patch, and
    its rows' rates run from .41 to .89). No per-clip Python: cost is flat in B.

    Args:
        seed: The run's seed.
        purpose: Names the draw, so that spectrogram and waveform get different masks.
        position: int64 [B].
        grid: Patches along frequency and time.
        count: K, masked patches per clip.
        sides: Cluster sides to draw from (SSAST: 3, 4, 5).

    Returns:
        int64 [B, K] on the device of `position`, ascending in each row.

    Raises:
        ValueError: `count` is not between 1 and N.
    """
    height, width = grid
    total = height * width
    _check(count, total)
    draws = uniform(seed, purpose, position, 2 * total + 1)
    scores = draws[:, :total].view(-1, 1, height, width)
    choice = (draws[:, -1] * len(sides)).long()
    best = scores.new_zeros(len(position), total)
    for index, side in enumerate(sides):
        extent = (min(side, height), min(side, width))
        wrapped = F.pad(scores, (0, extent[1] - 1, 0, extent[0] - 1), mode="circular")
        pooled = F.max_pool2d(wrapped, extent, stride=1).flatten(1)
        best = torch.where((choice == index)[:, None], pooled, best)
    # Score and tie-break make one exact integer.
    ranked = (best * GRAIN).long() * GRAIN + (draws[:, total:-1] * GRAIN).long()
    return ranked.topk(count, dim=1).indices.sort(dim=1).values


def ssast_masks(
    seed: int, purpose: str, position: torch.Tensor, grid: tuple[int, int], count: int, sides: tuple[int, ...]
) -> torch.Tensor:
    """The masks of SSAST's code, biases included, without its loop over clips and clusters.

    Its generator throws squares at random patches until more than `count` patches are covered, and
    keeps the `count` with the smallest indices. A square that leaves the grid on the right goes on in
    the next row, one that leaves it at the bottom is cut, and patch 0 is never covered. Here each patch
    learns the number of the first throw that covers it; the throw that ends the loop is the
    (count + 1)-th smallest of these.

    Arguments, result and errors are those of `cluster_masks`; `count` must leave two patches over.
    """
    total = grid[0] * grid[1]
    _check(count, total - 2)
    throws = THROWS * total
    draws = uniform(seed, purpose, position, throws + 1)
    starts = (draws[:, :throws] * total).long()
    number = torch.arange(throws, device=position.device).expand_as(starts)
    first = torch.full((len(position), total), throws, device=position.device)
    first = first.scatter_reduce(1, starts, number, "amin")  # of throws that start at this patch
    choice = (draws[:, -1] * len(sides)).long()
    covered = torch.full_like(first, throws)
    for index, side in enumerate(sides):
        offsets = {grid[1] * row + column for row in range(side) for column in range(side)}
        padded = F.pad(first, (max(offsets), 0), value=throws)
        reach = [padded[:, max(offsets) - offset : max(offsets) - offset + total] for offset in sorted(offsets)]
        covered = torch.where((choice == index)[:, None], torch.stack(reach).amin(dim=0), covered)
    covered[:, 0] = throws + 1
    last = covered.sort(dim=1).values[:, count : count + 1]  # kthvalue has no deterministic kernel on a GPU
    ranked = (covered > last) * total + torch.arange(total, device=position.device)
    return ranked.topk(count, dim=1, largest=False).indices.sort(dim=1).values


def kept_patches(
    seed: int, position: torch.Tensor, grid: tuple[int, int], frequency: float, time: float
) -> torch.Tensor:
    """The patches that are left of each clip where whole rows and columns of its grid are taken out.

    Args:
        seed: The run's seed.
        position: int64 [B].
        grid: Patches along frequency and time.
        frequency: Share of the rows that are taken out; one stays at least.
        time: Likewise of the columns.

    Returns:
        int64 [B, K], ascending, equally many of each clip; frequency-major as the grid is.
    """
    kept = []
    for purpose, size, share in (("frequency", grid[0], frequency), ("time", grid[1], time)):
        order = uniform(seed, f"tokens.{purpose}", position, size).argsort(dim=1, stable=True)
        kept.append(order[:, : max(1, round((1 - share) * size))].sort(dim=1).values)
    return (kept[0][:, :, None] * grid[1] + kept[1][:, None, :]).flatten(1)


class Split(NamedTuple):
    """The patches of each clip in two parts, equally many in every clip, ascending: int64 [B, N - K] and [B, K].

    Attributes:
        visible: What the encoder takes.
        masked: What is dropped before it.
    """

    visible: torch.Tensor
    masked: torch.Tensor


def split_patches(
    seed: int,
    purpose: str,
    position: torch.Tensor,
    grid: tuple[int, int],
    kind: str,
    ratio: float,
    sides: tuple[int, ...],
) -> Split:
    """Drops a share of each clip's patches: of single ones, squares, time columns or frequency rows.

    All that can be dropped is equally likely to be. No per-clip Python, no padding, no device sync.

    Args:
        seed: The run's seed.
        purpose: Names the draw.
        position: int64 [B].
        grid: Patches along frequency and time.
        kind: "random" (He et al. 2022), "cluster" (`cluster_masks`), "time" or "frequency": whole columns or rows
            (AudioMosaic, arXiv 2605.14231).
        ratio: Of patches, columns or rows; see `dropped_count`.
        sides: Of the clusters.

    Raises:
        ValueError: nothing is dropped, or nothing stays.
    """
    height, width = grid
    units, count = dropped_count(kind, ratio, grid)
    _check(count, units - 1)
    if kind == "cluster":
        chosen = cluster_masks(seed, purpose, position, grid, count, sides)
    else:  # distinct integers, so that equal draws rank alike on every device
        draws = (uniform(seed, purpose, position, units) * GRAIN).long() * units
        chosen = (draws + torch.arange(units, device=position.device)).topk(count, dim=1).indices
    hidden = torch.zeros(len(position), units, dtype=torch.bool, device=position.device).scatter_(1, chosen, True)
    if kind == "time":
        hidden = hidden[:, None].expand(-1, height, -1).flatten(1)
    elif kind == "frequency":
        hidden = hidden[:, :, None].expand(-1, -1, width).flatten(1)
    order = hidden.byte().argsort(dim=1, stable=True)
    masked = count * (height * width // units)
    return Split(order[:, :-masked], order[:, -masked:])


def dropped_count(kind: str, ratio: float, grid: tuple[int, int]) -> tuple[int, int]:
    """What `split_patches` counts in, and how many it drops: patches, time columns or frequency rows.

    What is kept is rounded down, as in MAE and AudioMosaic: of 8 rows, of which 40 % are dropped, 4.
    """
    units = {"time": grid[1], "frequency": grid[0]}.get(kind, grid[0] * grid[1])
    return units, units - math.floor(units * (1 - ratio) + 1e-9)  # 10 (1 - .8) is 1.9999999999999996


def gather_patches(tokens: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """The chosen rows of each clip: [B, N, P], int64 [B, K] -> [B, K, P], without a device sync."""
    return tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[-1]))


def _check(count: int, most: int) -> None:
    if not 1 <= count <= most:
        raise ValueError(f"{count} masked patches, but 1 to {most} are possible")


def masked_count(requested: int, grid: tuple[int, int], nominal: int = 512) -> int:
    """K for this grid: `requested` of 512 patches, in proportion where the grid is smaller."""
    total = grid[0] * grid[1]
    return requested if total >= nominal else max(1, round(requested * total / nominal))
