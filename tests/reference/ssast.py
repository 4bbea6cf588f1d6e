"""An SSAST- or AST-shaped network with the names of its checkpoints, plainly written, with random weights."""

import math

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(2, 3) / math.sqrt(width // self.heads)).softmax(dim=-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(batch, length, width))


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn = _Attention(width, heads)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))


class _Transformer(nn.Module):
    """`v`: timm's distilled DeiT as SSAST and AST use it, with the ImageNet heads that they leave dead."""

    def __init__(self, width: int, depth: int, heads: int, patch: int, stride: int, patches: int) -> None:
        super().__init__()
        self.cls_token, self.dist_token = nn.Parameter(torch.zeros(1, 1, width)), nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, patches + 2, width))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(1, width, patch, stride)})
        self.blocks = nn.ModuleList(_Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head, self.head_dist = nn.Linear(width, 10), nn.Linear(width, 10)

    def forward(self, fbank: torch.Tensor, masked=None, mask_embed=None) -> torch.Tensor:
        x = self.patch_embed["proj"](fbank.unsqueeze(1).transpose(2, 3)).flatten(2).transpose(1, 2)
        if masked is not None:
            for clip, patches in enumerate(masked):
                for patch in patches:
                    x[clip, patch] = mask_embed[0, 0]
        batch = len(x)
        x = torch.cat([self.cls_token.expand(batch, -1, -1), self.dist_token.expand(batch, -1, -1), x], dim=1)
        x = x + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class Ssast(nn.Module):
    """Pretraining: mask token and two heads. Finetuned: `mlp_head` on the mean of patches ("mean") or cls and dist."""

    def __init__(
        self, width=96, depth=4, heads=3, grid=(8, 8), stride=16, classes=0, pool="mean", frames=0, pixels=256
    ) -> None:
        super().__init__()
        self.v = _Transformer(width, depth, heads, 16, stride, grid[0] * grid[1])
        self.pool = pool
        if classes:
            self.mlp_head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, classes))
        else:
            self.cpredlayer = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, pixels))
            self.gpredlayer = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, pixels))
            self.mask_embed = nn.Parameter(torch.zeros(1, 1, width))
            self.p_input_fdim = nn.Parameter(torch.tensor(128), requires_grad=False)
            self.p_input_tdim = nn.Parameter(torch.tensor(frames), requires_grad=False)
        for parameter in self.parameters():
            if parameter.is_floating_point():
                nn.init.normal_(parameter, std=0.1)

    def predict(self, fbank: torch.Tensor, masked: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The two heads on the masked patches: [B, K, pixels] each."""
        tokens = self.v(fbank, masked, self.mask_embed)[:, 2:]
        picked = torch.stack([tokens[clip, patches] for clip, patches in enumerate(masked)])
        return self.cpredlayer(picked), self.gpredlayer(picked)

    def classify(self, fbank: torch.Tensor) -> torch.Tensor:
        tokens = self.v(fbank, None, None)
        pooled = tokens[:, 2:].mean(dim=1) if self.pool == "mean" else (tokens[:, 0] + tokens[:, 1]) / 2
        return self.mlp_head(pooled)

    def checkpoint(self) -> dict[str, torch.Tensor]:
        """As their files have it: from `DataParallel`."""
        return {f"module.{name}": value for name, value in self.state_dict().items()}
