"""Audio-MAE, M2D and EAT as their own code has them, plainly written, with random weights under their names."""

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from tests.reference.ssast import _Attention, _Block

WIDTH, DEPTH, HEADS, PATCH = 96, 4, 3, 16


class _PostNorm(nn.Module):
    """data2vec 2.0's block with layer_norm_first = false."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH, eps=1e-6), nn.LayerNorm(WIDTH, eps=1e-6)
        self.attn = _Attention(WIDTH, HEADS)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(WIDTH, 4 * WIDTH), "fc2": nn.Linear(4 * WIDTH, WIDTH)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm1(x + self.attn(x))
        return self.norm2(x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](x))))


def _randomise(module: nn.Module) -> None:
    for name, parameter in module.named_parameters():
        nn.init.normal_(parameter, mean=float("norm" in name and name.endswith("weight")), std=0.1)


class Vit(nn.Module):
    """timm's ViT of one class token, over images [B, 1, first axis, second axis]: Audio-MAE gives [T, M], M2D [M, T].

    Args:
        patches: Along the first axis and the second.
        decoder: With what a pretraining's checkpoint has besides.
        tuned: As Audio-MAE finetunes: no `norm`, but `fc_norm` of the mean patch and `head`.
        mosaic: With the two LayerNorms that AudioMosaic has besides, and its projection; with `fc_norm` of the mean
            token for `norm`, as its configs/AudioMosaic/pretrain.yaml says (use_fc_norm).
    """

    def __init__(
        self, patches: tuple[int, int], decoder: bool = True, tuned: bool = False, mosaic: bool = False
    ) -> None:
        super().__init__()
        torch.manual_seed(5)
        count = patches[0] * patches[1]
        self.cls_token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.pos_embed = nn.Parameter(torch.zeros(1, count + 1, WIDTH))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(1, WIDTH, PATCH, PATCH)})
        self.blocks = nn.ModuleList(_Block(WIDTH, HEADS) for _ in range(DEPTH))
        self.norm = None if tuned or mosaic else nn.LayerNorm(WIDTH, eps=1e-6)
        self.norm_pre = nn.LayerNorm(WIDTH, eps=1e-6) if mosaic else None
        if mosaic:
            self.patch_embed["norm"], self.projector = nn.LayerNorm(WIDTH, eps=1e-6), nn.Linear(WIDTH, 8)
        if tuned or mosaic:
            self.fc_norm = nn.LayerNorm(WIDTH, eps=1e-6)
        if tuned:
            self.head = nn.Linear(WIDTH, 5)
        if decoder:
            self.mask_token = nn.Parameter(torch.zeros(1, 1, 64))
            self.decoder_pos_embed = nn.Parameter(torch.zeros(1, count + 1, 64))
            self.decoder_embed, self.decoder_pred = nn.Linear(WIDTH, 64), nn.Linear(64, PATCH**2)
            self.decoder_norm, self.decoder_blocks = nn.LayerNorm(64), nn.ModuleList([_Block(64, 1)])
        _randomise(self)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """[B, first, second] -> [B, 1 + N, D], patches of one first place side by side."""
        x = self.patch_embed["proj"](images[:, None]).flatten(2).transpose(1, 2)
        x = (self.patch_embed["norm"](x) if self.norm_pre is not None else x) + self.pos_embed[:, 1:]
        cls = self.cls_token + self.pos_embed[:, :1]
        x = torch.cat([cls.expand(len(x), -1, -1), x], dim=1)
        x = x if self.norm_pre is None else self.norm_pre(x)
        for block in self.blocks:
            x = block(x)
        return x if self.norm is None else self.norm(x)


class Eat(nn.Module):
    """fairseq's data2vec 2.0 as EAT and SSLAM set it up: post-norm, no prenet, one extra token without a position."""

    def __init__(self, patches: tuple[int, int]) -> None:
        super().__init__()
        torch.manual_seed(6)
        image = nn.Module()
        image.extra_tokens = nn.Parameter(torch.zeros(1, 1, WIDTH))
        image.local_encoder = nn.ModuleDict({"proj": nn.Conv2d(1, WIDTH, PATCH, PATCH)})
        image.fixed_positional_encoder = nn.Module()
        image.fixed_positional_encoder.positions = nn.Parameter(torch.zeros(1, patches[0] * patches[1], WIDTH))
        image.context_encoder = nn.ModuleDict({"norm": nn.LayerNorm(WIDTH, eps=1e-6)})
        image.decoder = nn.ModuleDict({"proj": nn.Linear(WIDTH, WIDTH)})
        self.modality_encoders = nn.ModuleDict({"IMAGE": image})
        self.blocks = nn.ModuleList(_PostNorm() for _ in range(DEPTH))
        _randomise(self)

    def checkpoint(self) -> dict[str, object]:
        """A pretraining's file: the averaged weights are one entry of the others."""
        weights = {name: value.detach() for name, value in self.state_dict().items()}
        return {"model": {**weights, "_ema": {f"{name}.ema": value for name, value in weights.items() if "decoder" not
                                              in name}}}  # fmt: skip

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """[B, T, M] -> [B, 1 + N, D], patches of one time side by side."""
        image = self.modality_encoders["IMAGE"]
        x = image.local_encoder["proj"](images[:, None]).flatten(2).transpose(1, 2)
        x = x + image.fixed_positional_encoder.positions[:, : x.shape[1]]  # models/base.py: of 768 x 8, the first
        x = torch.cat([image.extra_tokens.expand(len(x), -1, -1), x], dim=1)
        x = image.context_encoder["norm"](x)
        for block in self.blocks:
            x = block(x)
        return x
