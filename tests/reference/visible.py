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
    embedding, tokens = getattr(model, f"{side}_patch").proj, getattr(model, f"{side}_tokens")
    pixels = mspm.patches(one_map[None], embedding.weight.shape[-1])[0]
    columns = tokens.positions.shape[1]
    sequence = [model.special.tokens[i] + model.special.positions[i] for i in range(2)]
    for patch in visible:
        position = tokens.positions[patch // columns, patch % columns]
        sequence.append(embedding.weight.flatten(1) @ pixels[patch] + embedding.bias + position)
    return run(model.encoder, sequence)[2:]
