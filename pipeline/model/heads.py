"""What stands on the encoder: masked-patch predictors, decoder of dropped patches, projection, classifier.

In: tokens [..., D]. Out: patch predictions, projected vectors, or logits.
"""

from collections.abc import Sequence

import torch
from torch import nn

from pipeline.errors import UserError
from pipeline.flow import Encoded, full, without_autocast
from pipeline.model.craft import initialise_linear
from pipeline.model.embed import TokenSequence
from pipeline.model.encoder import Encoder
from pipeline.model.masking import Split, gather_patches

HEAD_NORM_EPS = 1e-5  # torch's default, which SSAST's and AST's heads have; their blocks have 1e-6


class MaskedPatchHeads(nn.Module):
    """SSAST's two predictors of a masked patch, Linear-ReLU-Linear each, shared by both representations.

    Args:
        width: D.
        pixels: Values of a patch (256).
    """

    def __init__(self, width: int, pixels: int) -> None:
        super().__init__()
        self.discriminative = _mlp(width, pixels)
        self.generative = _mlp(width, pixels)

    def forward(self, tokens: torch.Tensor, second: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, K, D] -> the InfoNCE prediction and the reconstruction, [B, K, pixels] each.

        Args:
            tokens: Encoded masked patches.
            second: Those of a second pass that is reconstructed instead (SSAST's two passes).
        """
        return self.discriminative(tokens), self.generative(tokens if second is None else second)


class PatchDecoder(nn.Module):
    """MAE's light decoder (He et al. 2022): the pixels of dropped patches, or other targets, from the visible ones.

    Visible tokens are narrowed and stand at their places among mask tokens; positions of the decoder's own are added.
    Streams of one patch grid are one batch. A stream has its own positions and mask token; all else is shared.

    Args:
        width: D of the encoder.
        inner: Its own width, a multiple of 64.
        depth: Blocks.
        pixels: Values of a patch, or of another target.
        grids: Patches along frequency and time, of each stream; of the longest input.
        recompute: As in `Encoder`.
        positions: `model.positions`; the decoder's own are learned, whatever the encoder's are.
    """

    def __init__(
        self, width: int, inner: int, depth: int, pixels: int, grids: Sequence[tuple[int, int]], recompute: bool,
        positions: str,
    ) -> None:  # fmt: skip
        super().__init__()
        self.narrow = nn.Linear(width, inner)
        shorter = "centre" if positions == "rotary" else positions
        self.tokens = nn.ModuleList(
            TokenSequence(inner, grid, modality=False, maskable=True, shorter=shorter) for grid in grids
        )
        self.blocks = Encoder(inner, depth, inner // 64, bottlenecks=0, fusion_layer=depth, recompute=recompute)
        self.pixels = nn.Linear(inner, pixels)
        self.apply(initialise_linear)

    def forward(self, streams: Sequence[torch.Tensor], splits: Sequence[Split]) -> list[torch.Tensor]:
        """Visible tokens [B, N - K, D] of each stream -> its masked patches [B, K, pixels]."""
        sequences = []
        for tokens, stream, split in zip(self.tokens, streams, splits, strict=True):
            narrow = self.narrow(stream)
            clips, visible, inner = narrow.shape
            places = split.visible[..., None].expand(-1, -1, inner)
            patches = narrow.new_zeros(clips, visible + split.masked.shape[1], inner).scatter(1, places, narrow)
            sequences.append(tokens(patches, narrow.new_empty(0, inner), split.masked))
        decoded = zip(self.blocks(sequences), splits, strict=True)
        return [self.pixels(gather_patches(tokens, split.masked)) for tokens, split in decoded]


class ProjectionHead(nn.Sequential):
    """SimCLR's projection before the contrast: Linear-ReLU-Linear, D -> D."""

    def __init__(self, width: int) -> None:
        super().__init__(*_mlp(width, width))


def _mlp(width: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, out))


class FullLinear(nn.Linear):
    """A Linear in float32, whatever its weights and input are: bf16 logits tie, and ties move rankings."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., D] -> float32 [..., C]."""
        with without_autocast(x):
            bias = None if self.bias is None else full(self.bias)
            logits: torch.Tensor = nn.functional.linear(full(x), full(self.weight), bias)
        return logits


class Classifier(nn.Module):
    """Mean of tokens -> LayerNorm -> Linear, over one or two streams.

    The mean is over patch tokens (SSAST) or over cls and dist (AST), as the network hands them out; or over time alone:
    the means of the frequency rows, one after the other. A mean over frequency too is close to one direction of the
    token space (the positions'), and a small network cannot tell a low sound from a high one by it.

    Args:
        width: D.
        classes: C.
        rows: For each stream the frequency rows that keep a mean of their own: 1, or those of its patch grid.
        mode: With two streams: "concat" their means, "mean_pool" them, or "mean_logits" (MBT).

    Raises:
        UserError: means of different lengths that are to be averaged.
    """

    def __init__(self, width: int, classes: int, rows: tuple[int, ...], mode: str) -> None:
        super().__init__()
        self.rows = rows
        self.mode = mode if len(rows) == 2 else "concat"
        if self.mode != "concat" and len(set(rows)) > 1:
            raise UserError(
                f"finetune.head = {mode} averages both streams, which have {rows[0]} and {rows[1]} frequency rows "
                "under finetune.pool = rows; use finetune.head=concat"
            )
        features = width * (sum(rows) if self.mode == "concat" else rows[0])
        self.norm = nn.LayerNorm(features, eps=HEAD_NORM_EPS)
        self.linear = FullLinear(features, classes)

    def forward(self, encoded: Encoded) -> torch.Tensor:
        """Tokens of the encoded streams -> logits float32 [B, C]."""
        tokens = (*encoded.spec, *encoded.wav)
        means = [row_means(stream, rows) for stream, rows in zip(tokens, self.rows, strict=True)]
        if self.mode == "mean_logits":
            return torch.stack([self.linear(self.norm(mean)) for mean in means]).mean(dim=0)
        pooled = torch.cat(means, dim=-1) if self.mode == "concat" else torch.stack(means).mean(dim=0)
        logits: torch.Tensor = self.linear(self.norm(pooled))
        return logits


def row_means(tokens: torch.Tensor, rows: int) -> torch.Tensor:
    """Means over time of tokens in frequency-major order: [B, rows x t, D] -> [B, rows x D]."""
    if rows == 1:
        return tokens.mean(dim=1)
    return torch.unflatten(tokens, 1, (rows, -1)).mean(dim=2).flatten(1)


def stream_means(encoded: Encoded) -> list[torch.Tensor]:
    """Mean of each stream's tokens, [B, D] each, the spectrogram's first: what describes a clip."""
    return [tokens.mean(dim=1) for tokens in (*encoded.spec, *encoded.wav)]
