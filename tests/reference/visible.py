"""Token dropping, one clip and one patch at a time: sequences of visible patches, MAE's decoder, and the losses."""

import torch

from tests.reference import mspm, swab


def run(encoder, sequence: list[torch.Tensor]) -> torch.Tensor:
    """All blocks and the last LayerNorm over one clip's tokens."""
    x = torch.stack(sequence)
    for block in encoder.blocks:
        x = swab.block(block, x)
    return swab.layer_norm(encoder.norm, x)


def encode(model, side: str, one_map: torch.Tensor, visible: list[int]) -> torch.Tensor:
    """[M, T] -> tokens of the visible patches [K, D]; cls and dist take part and are cut off."""
    return run(model.encoder, sequence(model, side, one_map, visible))[2:]


def sequence(model, side: str, one_map: torch.Tensor, visible: list[int]) -> list[torch.Tensor]:
    """cls, dist and the visible patches as they come to the encoder."""
    embedding, tokens = getattr(model, f"{side}_patch").proj, getattr(model, f"{side}_tokens")
    pixels = mspm.patches(one_map[None], embedding.weight.shape[-1])[0]
    columns = tokens.positions.shape[1]
    vectors = [model.special.tokens[i] + model.special.positions[i] for i in range(2)]
    for patch in visible:
        position = tokens.positions[patch // columns, patch % columns]
        vectors.append(embedding.weight.flatten(1) @ pixels[patch] + embedding.bias + position)
    return vectors


def decode(decoder, number: int, encoded: torch.Tensor, visible: list[int], masked: list[int]) -> torch.Tensor:
    """MAE's decoder on one clip of stream `number`: visible tokens [V, D] -> the pixels of each masked patch."""
    tokens = decoder.tokens[number]
    columns = tokens.positions.shape[1]
    sequence = []
    for patch in range(len(visible) + len(masked)):
        token = tokens.mask_token
        if patch in visible:
            token = decoder.narrow.weight @ encoded[visible.index(patch)] + decoder.narrow.bias
        sequence.append(token + tokens.positions[patch // columns, patch % columns])
    decoded = run(decoder.blocks, sequence)
    return torch.stack([decoder.pixels.weight @ decoded[patch] + decoder.pixels.bias for patch in masked])


def reconstruction(predicted: torch.Tensor, one_map: torch.Tensor, side: int, masked: list[int]) -> torch.Tensor:
    """Mean square error of one clip's masked patches, each brought to mean 0 and variance 1."""
    pixels = mspm.patches(one_map[None], side)[0]
    errors = []
    for row, patch in zip(predicted, masked, strict=True):
        centred = pixels[patch] - pixels[patch].mean()
        errors.append(((row - centred / torch.sqrt((centred**2).mean() + 1e-6)) ** 2).mean())
    return sum(errors) / len(errors)
