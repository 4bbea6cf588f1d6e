"""What stands on the encoder: masked-patch predictors, projection, classifier.

In: tokens [..., D]. Out: patch predictions, projected vectors, or logits.
"""

import torch
from torch import nn

from pipeline.flow import Encoded
from pipeline.precision import full

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
        with torch.autocast(x.device.type, enabled=False):
            bias = None if self.bias is None else full(self.bias)
            return nn.functional.linear(full(x), full(self.weight), bias)


class Classifier(nn.Module):
    """Mean of tokens -> LayerNorm -> Linear, over one or two streams.

    The mean is over patch tokens (SSAST) or over cls and dist (AST), as the network hands them out.

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
        self.norm = nn.LayerNorm(features, eps=HEAD_NORM_EPS)
        self.linear = FullLinear(features, classes)

    def forward(self, encoded: Encoded) -> torch.Tensor:
        """Tokens of the encoded streams -> logits float32 [B, C]."""
        means = stream_means(encoded)
        if self.mode == "mean_logits":
            return torch.stack([self.linear(self.norm(mean)) for mean in means]).mean(dim=0)
        pooled = torch.cat(means, dim=-1) if self.mode == "concat" else torch.stack(means).mean(dim=0)
        logits: torch.Tensor = self.linear(self.norm(pooled))
        return logits


def stream_means(encoded: Encoded) -> list[torch.Tensor]:
    """Mean of each stream's tokens, [B, D] each, the spectrogram's first: what describes a clip."""
    return [tokens.mean(dim=1) for tokens in (*encoded.spec, *encoded.wav)]
