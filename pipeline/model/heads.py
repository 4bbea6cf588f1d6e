"""What stands on the encoder: masked-patch predictors, projection, classifier.

In: tokens [..., D]. Out: patch predictions, projected vectors, or logits.
"""

import torch
from torch import nn

from pipeline.flow import Encoded


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

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, K, D] -> the InfoNCE prediction and the reconstruction, [B, K, pixels] each."""
        return self.discriminative(tokens), self.generative(tokens)


class ProjectionHead(nn.Sequential):
    """SimCLR's projection before the contrast: Linear-ReLU-Linear, D -> D."""

    def __init__(self, width: int) -> None:
        super().__init__(*_mlp(width, width))


def _mlp(width: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, out))


class Classifier(nn.Module):
    """Mean of patch tokens -> LayerNorm -> Linear, over one or two streams.

    Args:
        width: D.
        classes: C.
        streams: 1 or 2.
        mode: With two streams: "concat" their means, "mean_pool" them, or "mean_logits" (MBT).
    """

    def __init__(self, width: int, classes: int, streams: int, mode: str) -> None:
        super().__init__()
        self.mode = mode if streams == 2 else "concat"
        features = width * (streams if self.mode == "concat" else 1)
        self.norm = nn.LayerNorm(features, eps=1e-6)
        self.linear = nn.Linear(features, classes)

    def forward(self, encoded: Encoded) -> torch.Tensor:
        """Tokens of the encoded streams -> logits float32 [B, C]."""
        means = [tokens.mean(dim=1) for tokens in (encoded.spec, encoded.wav) if tokens is not None]
        if self.mode == "mean_logits":
            return torch.stack([self.linear(self.norm(mean)) for mean in means]).float().mean(dim=0)
        pooled = torch.cat(means, dim=-1) if self.mode == "concat" else torch.stack(means).mean(dim=0)
        return self.linear(self.norm(pooled)).float()  # type: ignore[no-any-return]
