"""The shared transformer: both representations in one call, with fusion bottlenecks.

In: sequences [B, n, D], one a stream. Out: the same after all blocks and the last LayerNorm.

Streams of one length are stacked along the batch axis, so each block is one large matmul for both, and
Eq. 5's two passes cost one kernel launch instead of two.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch.utils.checkpoint import checkpoint

from pipeline.flow import full
from pipeline.rng import uniform

LAYER_NORM_EPS = 1e-6


class Attention(nn.Module):
    """Multi-head self-attention (SDPA); parameter names as in ViT checkpoints."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor, turned: torch.Tensor | None = None) -> torch.Tensor:
        """[B, n, D] -> [B, n, D]; `turned` [B, 2, n, D / heads / 2] of `turns`: rotary positions; None: none."""
        # Three views and no permuted one of all: backward then copies once into the gradient, not twice.
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        if turned is not None:
            q, k = turn(q, turned), turn(k, turned)
        out: torch.Tensor = self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return out


def turns(times: torch.Tensor, width: int) -> torch.Tensor:
    """Cosines and sines of rotary positions (Su et al. 2021), base 10,000: [B, n] -> float32 [B, 2, n, w / 2].

    Args:
        times: Of each token; one at 0, such as cls, is not turned.
        width: w, of a head.
    """
    rates = 10000.0 ** (-torch.arange(0, width, 2, device=times.device, dtype=torch.float32) / width)
    angles = times[..., None] * rates
    return torch.stack([angles.cos(), angles.sin()], dim=1)


def turn(x: torch.Tensor, turned: torch.Tensor) -> torch.Tensor:
    """Queries or keys [B, heads, n, w], the pairs (i, i + w / 2) turned: a product of two depends on their distance."""
    cos, sin = full(turned)[:, None].unbind(dim=2)
    first, second = full(x).chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


class Mlp(nn.Module):
    """Linear - GELU - Linear with a hidden width of 4 D."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., D] -> [..., D]."""
        out: torch.Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.mlp = Mlp(width)

    def forward(
        self, x: torch.Tensor, paths: torch.Tensor | None = None, turned: torch.Tensor | None = None
    ) -> torch.Tensor:
        """[B, n, D] -> [B, n, D].

        Args:
            x: Tokens.
            paths: [B, 2], factors of each clip's attention and MLP; None: 1.
            turned: As of `Attention`.
        """
        if paths is None:
            x = x + self.attn(self.norm1(x), turned)
            out: torch.Tensor = x + self.mlp(self.norm2(x))
        else:
            first, second = paths[..., None, None].unbind(dim=1)
            x = x + first * self.attn(self.norm1(x), turned)
            out = x + second * self.mlp(self.norm2(x))
        return out


class PostNormBlock(Block):
    """Post-norm transformer block: x = norm1(x + attn(x)), then norm2(x + mlp(x)), as in EAT (Chen et al. 2024)."""

    def forward(
        self, x: torch.Tensor, paths: torch.Tensor | None = None, turned: torch.Tensor | None = None
    ) -> torch.Tensor:
        """As of `Block`."""
        first, second = (1.0, 1.0) if paths is None else paths[..., None, None].unbind(dim=1)
        x = self.norm1(x + first * self.attn(x, turned))
        out: torch.Tensor = self.norm2(x + second * self.mlp(x))
        return out


class Bottlenecks(nn.Module):
    """The F fusion tokens of SWaB: N(0, .02), no position (Nagrani et al. 2021)."""

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.count = count  # under ZeRO-3 the tokens have no shape here
        self.tokens = nn.Parameter(torch.empty(count, width))
        nn.init.trunc_normal_(self.tokens, std=0.02)

    def forward(self, batch: int) -> torch.Tensor:
        """B -> [B, F, D]."""
        return self.tokens.expand(batch, -1, -1)


class Encoder(nn.Module):
    """ViT blocks over one or more streams.

    Args:
        width: D.
        depth: Blocks.
        heads: Attention heads.
        bottlenecks: F; 0: the streams never meet.
        fusion_layer: First block that fuses, 0-based; `depth` or more: none does.
        early: Blocks of streams that leave early.
        recompute: Recompute each block in backward instead of keeping its activations.
        post: Post-norm blocks behind a first LayerNorm, in place of pre-norm ones before a last one.
        first: A first LayerNorm in any case.
    """

    def __init__(
        self,
        width: int,
        depth: int,
        heads: int,
        *,
        bottlenecks: int,
        fusion_layer: int,
        recompute: bool,
        early: int = 0,
        post: bool = False,
        first: bool = False,
    ) -> None:
        super().__init__()
        kind = PostNormBlock if post else Block
        self.blocks = nn.ModuleList(kind(width, heads) for _ in range(depth))
        # Two names: weights say which they are of.
        self.first_norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS) if post or first else None
        self.norm = None if post else nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        fuses = bottlenecks > 0 and fusion_layer < depth
        self.bottlenecks = Bottlenecks(bottlenecks, width) if fuses else None
        self.fusion_layer, self.early, self.head_width = fusion_layer, early, width // heads
        self.recompute = recompute

    @property
    def last(self) -> nn.Module:
        """The module whose outputs are the encoder's."""
        return self.blocks[-1] if self.norm is None else self.norm

    def forward(
        self,
        streams: Sequence[torch.Tensor],
        paths: torch.Tensor | None = None,
        leaving: int = 0,
        times: Sequence[torch.Tensor] | None = None,
    ) -> list[torch.Tensor]:
        """Encodes.

        Args:
            streams: [B, n, D] each; n may differ between streams, at the price of one call more a block.
            paths: [depth, streams, B, 2] of `drop_paths`; None: no branch is dropped.
            leaving: So many streams, the last ones, leave after `early` blocks; from there on the others alone share
                the bottlenecks, which keep what they took from them.
            times: [B, n] each: rotary positions of the tokens; those of bottlenecks are 0. None: no such ones.

        Returns:
            [B, n, D] each; bottleneck tokens are left out.
        """
        staying, going = _groups(streams[: len(streams) - leaving]), _groups(streams[len(streams) - leaving :])
        stacks, counts = [torch.cat(group) for group in staying + going], [len(group) for group in staying + going]
        if self.first_norm is not None:
            stacks = [self.first_norm(x) for x in stacks]
        lengths, left = [x.shape[1] for x in stacks], stacks[:0]
        turned: list[torch.Tensor | None] = [None] * len(stacks)
        if times is not None:  # the groups are neighbours, as the streams are
            extra = 0 if self.bottlenecks is None else self.bottlenecks.count
            parts = iter(times)
            groups = [torch.cat([next(parts) for _ in range(count)]) for count in counts]
            turned = [turns(F.pad(group, (0, extra)), self.head_width) for group in groups]
        for layer, block in enumerate(self.blocks):
            if leaving and layer == self.early:
                stacks, left = stacks[: len(staying)], stacks[len(staying) :]
            if not stacks:
                break
            here = counts[: len(stacks)]
            if self.bottlenecks is not None and layer == self.fusion_layer:
                stacks = [torch.cat([x, self.bottlenecks(x.shape[0])], dim=1) for x in stacks]
            factors: list[torch.Tensor | None] = [None] * len(stacks)
            if paths is not None:
                factors = [part.flatten(0, 1) for part in torch.split(paths[layer, : sum(here)], here)]
            given = zip(stacks, factors, turned[: len(stacks)], strict=True)
            stacks = [
                run_block(block, x, part, None if all_ is None else all_[:, :, : x.shape[1]], recompute=self.recompute)
                for x, part, all_ in given
            ]
            if self.bottlenecks is not None and layer >= self.fusion_layer:
                stacks = _share_bottlenecks(stacks, lengths[: len(stacks)], here)
        encoded = [x[:, :length] for x, length in zip([*stacks, *left], lengths, strict=True)]
        encoded = encoded if self.norm is None else [self.norm(x) for x in encoded]
        return [stream for x, count in zip(encoded, counts, strict=True) for stream in _apart(x, count)]


def drop_paths(
    rate: float, depth: int, streams: int, seed: int, position: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Stochastic depth (Huang et al. 2016): which residual branches of which clips are left out.

    Block l of n leaves out each branch of a clip with probability rate * l / (n - 1), and divides what it keeps by the
    rest. The draws are a function of seed, position, stream and block: the same on any rank, in any micro-batch, and in
    both passes of GradCache.

    Args:
        rate: Of the last block.
        depth: n.
        streams: Sequences of a clip, each with draws of its own.
        seed: The run's seed.
        position: int64 [B].
        dtype: Of the result.

    Returns:
        Factors [depth, streams, B, 2], of attention and MLP.
    """
    draws = uniform(seed, "drop_path", position, streams * depth * 2).view(-1, streams, depth, 2)
    rates = torch.linspace(0.0, rate, depth, device=position.device)[:, None]
    return ((draws >= rates) / (1 - rates)).to(dtype).permute(2, 1, 0, 3)


def run_block(block: nn.Module, *inputs: torch.Tensor | None, recompute: bool) -> torch.Tensor:
    """`block(*inputs)`; with `recompute` its activations are thrown away and made again in backward."""
    if recompute and torch.is_grad_enabled():
        # The re-entrant kind breaks ZeRO-2/3 when a block runs twice in one backward.
        out: torch.Tensor = checkpoint(block, *inputs, use_reentrant=False)
    else:
        out = block(*inputs)
    return out


def recorded(modules: Sequence[nn.Module], clips: int, run: Callable[[], Any]) -> list[list[torch.Tensor]]:
    """What modules of an encoder give while `run` runs: of each the streams that come to it, [B, n, D] each, in order.

    Args:
        modules: Blocks, or the last LayerNorm.
        clips: B; streams of one length come stacked along the batch axis.
        run: Calls the encoder once.
    """
    taken: list[list[torch.Tensor]] = [[] for _ in modules]
    hooks = [
        module.register_forward_hook(lambda _module, _inputs, out, kept=kept: kept.append(out))
        for module, kept in zip(modules, taken, strict=True)
    ]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return [[part for out in outputs for part in _apart(out, len(out) // clips)] for outputs in taken]


def _groups(streams: Sequence[torch.Tensor]) -> list[list[torch.Tensor]]:
    """Neighbouring streams of one length, which go through a block on top of each other."""
    groups: list[list[torch.Tensor]] = []
    for stream in streams:
        if groups and groups[-1][0].shape[1] == stream.shape[1]:
            groups[-1].append(stream)
        else:
            groups.append([stream])
    return groups


def _apart(x: torch.Tensor, count: int) -> tuple[torch.Tensor, ...]:
    """[count B, n, D] -> count of [B, n, D]. Not `chunk`, which ties an exported graph to one B."""
    return x.view(count, -1, *x.shape[1:]).unbind()


def _share_bottlenecks(stacks: list[torch.Tensor], lengths: list[int], counts: list[int]) -> list[torch.Tensor]:
    """Eq. 5c: each bottleneck becomes the mean of its copies in the streams."""
    copies: list[torch.Tensor] = []
    for x, length, count in zip(stacks, lengths, counts, strict=True):
        copies += _apart(x[:, length:], count)
    mean = torch.stack(copies).mean(dim=0)
    return [
        torch.cat([x[:, :length], mean.repeat(count, 1, 1)], dim=1)
        for x, length, count in zip(stacks, lengths, counts, strict=True)
    ]
