"""The encoder with Eq. 5 as it is printed: two passes a layer, one clip and one head at a time."""

import math

import torch
import torch.nn.functional as F  # noqa: N812


def attention(module, x: torch.Tensor) -> torch.Tensor:
    """Scaled dot-product attention of [n, D], head by head."""
    width = x.shape[1] // module.heads
    q, k, v = (x @ module.qkv.weight.T + module.qkv.bias).chunk(3, dim=1)
    heads = []
    for head in range(module.heads):
        part = slice(head * width, (head + 1) * width)
        weights = torch.softmax(q[:, part] @ k[:, part].T / math.sqrt(width), dim=1)
        heads.append(weights @ v[:, part])
    return torch.cat(heads, dim=1) @ module.proj.weight.T + module.proj.bias


def layer_norm(norm, x: torch.Tensor) -> torch.Tensor:
    centred = x - x.mean(dim=1, keepdim=True)
    return centred / torch.sqrt((centred**2).mean(dim=1, keepdim=True) + 1e-6) * norm.weight + norm.bias


def block(module, x: torch.Tensor) -> torch.Tensor:
    x = x + attention(module.attn, layer_norm(module.norm1, x))
    hidden = F.gelu(layer_norm(module.norm2, x) @ module.mlp.fc1.weight.T + module.mlp.fc1.bias)
    return x + hidden @ module.mlp.fc2.weight.T + module.mlp.fc2.bias


def encode(encoder, spec: torch.Tensor, wav: torch.Tensor, fusion_layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, n, D] and [B, m, D] -> the same; bottlenecks join at `fusion_layer` and are averaged after each layer."""
    out_spec, out_wav = [], []
    for t_spec, t_wav in zip(spec, wav, strict=True):
        shared = None if encoder.bottlenecks is None else encoder.bottlenecks.tokens
        for number, layer in enumerate(encoder.blocks):
            if shared is None or number < fusion_layer:
                t_spec, t_wav = block(layer, t_spec), block(layer, t_wav)  # noqa: PLW2901
                continue
            first = block(layer, torch.cat([t_spec, shared]))  # Eq. 5a
            second = block(layer, torch.cat([t_wav, shared]))  # Eq. 5b
            t_spec, b_spec = first[: len(t_spec)], first[len(t_spec) :]  # noqa: PLW2901
            t_wav, b_wav = second[: len(t_wav)], second[len(t_wav) :]  # noqa: PLW2901
            shared = torch.stack([(b_spec[i] + b_wav[i]) / 2 for i in range(len(b_spec))])  # Eq. 5c
        out_spec.append(layer_norm(encoder.norm, t_spec))
        out_wav.append(layer_norm(encoder.norm, t_wav))
    return torch.stack(out_spec), torch.stack(out_wav)
