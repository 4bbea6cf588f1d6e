"""Other people's weights under our names, and ours under theirs.

In: tensors of an SSAST or AST checkpoint (YuanGongND), or of a Hugging Face `ASTModel` or
`ASTForAudioClassification`. Out: the same tensors under the names of a task of `pipeline.tasks`.

| ours | SSAST, AST | HF, on disk |
|---|---|---|
| model.special.tokens | v.cls_token, v.dist_token | embeddings.cls_token, .distillation_token |
| model.special.positions, model.spec_tokens.positions | v.pos_embed | embeddings.position_embeddings |
| model.spec_patch.proj | v.patch_embed.proj | embeddings.patch_embeddings.projection |
| model.encoder.blocks.N.attn.qkv | v.blocks.N.attn.qkv | encoder.layer.N.attention.attention.{query,key,value} |
| model.encoder.blocks.N.attn.proj | v.blocks.N.attn.proj | encoder.layer.N.attention.output.dense |
| model.encoder.blocks.N.{norm1,norm2} | the same | encoder.layer.N.layernorm_{before,after} |
| model.encoder.blocks.N.mlp.{fc1,fc2} | the same | encoder.layer.N.{intermediate,output}.dense |
| model.encoder.norm | v.norm | layernorm |
| model.spec_tokens.mask_token | mask_embed | |
| heads.{discriminative,generative}.N | {cpredlayer,gpredlayer}.N | |
| classifier.{norm,linear} | mlp_head.{0,1} | classifier.{layernorm,dense} |
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from pipeline.errors import UserError
from pipeline.model.embed import patch_grid

Tensors = dict[str, torch.Tensor]
HF_PREFIX = "audio_spectrogram_transformer."
WRAPPERS = ("module.", "model.", "net.")
KNOWN = ("model.special.", "model.encoder.blocks.", "v.cls_token", "embeddings.cls_token", HF_PREFIX)  # of each format
MEL_BINS = 128  # of every published SSAST and AST model

_SSAST = (
    (r"v\.(blocks\.\d+\..+|norm\.\w+)", r"model.encoder.\1"),
    (r"v\.patch_embed\.proj\.(\w+)", r"model.spec_patch.proj.\1"),
    (r"cpredlayer\.(\d+\.\w+)", r"heads.discriminative.\1"),
    (r"gpredlayer\.(\d+\.\w+)", r"heads.generative.\1"),
    (r"mlp_head\.0\.(\w+)", r"classifier.norm.\1"),
    (r"mlp_head\.1\.(\w+)", r"classifier.linear.\1"),
)
_HF = (  # (theirs, ours), of a block
    ("attention.output.dense", "attn.proj"),
    ("intermediate.dense", "mlp.fc1"),
    ("output.dense", "mlp.fc2"),
    ("layernorm_before", "norm1"),
    ("layernorm_after", "norm2"),
)
_HF_OUTSIDE = (
    ("embeddings.patch_embeddings.projection", "model.spec_patch.proj"),
    ("layernorm", "model.encoder.norm"),
)
_HF_HEAD = (("classifier.layernorm", "classifier.norm"), ("classifier.dense", "classifier.linear"))


def translate(tensors: Tensors, file: Path, grid: tuple[int, int] | None) -> tuple[Tensors, str]:
    """Tensors under our names, and whose they are: "CRAFT", "SSAST", "SSAST or AST" (finetuned) or "HF AST".

    What has no place in any of our models keeps its name, so that a report can list it.

    Args:
        tensors: Content of `file`.
        file: For a config.json beside it, and for errors.
        grid: Patches along frequency and time, where neither the tensors nor a config.json says them.

    Raises:
        UserError: the patch grid of the positions cannot be told.
    """
    tensors = _unwrapped(tensors)
    if "v.cls_token" in tensors:
        return _from_ssast(tensors, file, grid), "SSAST" if "p_input_fdim" in tensors else "SSAST or AST"
    bare = {name.removeprefix(HF_PREFIX): value for name, value in tensors.items()}
    if "embeddings.position_embeddings" in bare:
        return _from_hf(bare, file, grid), "HF AST"
    return tensors, "CRAFT"


def _unwrapped(tensors: Tensors) -> Tensors:
    """Without the prefixes of what a model was trained in: torch.compile, DataParallel, Lightning, a class around it.

    Where no prefix leads to a known model, the names stay.
    """
    found = {name.replace("_orig_mod.", ""): value for name, value in tensors.items()}
    while not any(name.startswith(KNOWN) for name in found):
        prefix = next((prefix for prefix in WRAPPERS if any(name.startswith(prefix) for name in found)), None)
        if prefix is None:
            return tensors
        found = {name.removeprefix(prefix): value for name, value in found.items()}
    return found


def to_hf(tensors: Tensors, depth: int, classifier: bool) -> Tensors:
    """Our spectrogram side under HF's names on disk, of `ASTModel` or `ASTForAudioClassification`.

    Args:
        tensors: Of a task with a spectrogram side.
        depth: Blocks.
        classifier: With the classifier.
    """
    special, positions = tensors["model.special.positions"], tensors["model.spec_tokens.positions"].flatten(0, 1)
    tokens = tensors["model.special.tokens"]
    modality = tensors.get("model.spec_tokens.modality")
    out = {
        "embeddings.cls_token": tokens[:1, None],
        "embeddings.distillation_token": tokens[1:, None],
        # HF has no modality embedding; it is added to the same tokens as the positions.
        "embeddings.position_embeddings": torch.cat(
            [special, positions if modality is None else positions + modality]
        )[None],
    }
    for theirs, ours in _hf_names(depth):
        for kind in ("weight", "bias"):
            out[f"{theirs}.{kind}"] = tensors[f"{ours}.{kind}"]
    for number in range(depth):
        for kind in ("weight", "bias"):
            parts = tensors[f"model.encoder.blocks.{number}.attn.qkv.{kind}"].chunk(3)
            for name, part in zip(("query", "key", "value"), parts, strict=True):
                out[f"encoder.layer.{number}.attention.attention.{name}.{kind}"] = part
    if classifier:
        out = {HF_PREFIX + name: value for name, value in out.items()}
        for theirs, ours in _HF_HEAD:
            for kind in ("weight", "bias"):
                out[f"{theirs}.{kind}"] = tensors[f"{ours}.{kind}"]
    return {name: value.clone().contiguous() for name, value in out.items()}


def _from_ssast(bare: Tensors, file: Path, grid: tuple[int, int] | None) -> Tensors:
    out: Tensors = {}
    for name, value in bare.items():
        for pattern, ours in _SSAST:
            if re.fullmatch(pattern, name):
                out[re.sub(pattern, ours, name)] = value
                break
        else:
            if name not in ("v.cls_token", "v.dist_token", "v.pos_embed", "mask_embed"):
                out[name] = value
    positions = bare["v.pos_embed"]
    _add_embeddings(out, bare["v.cls_token"], bare["v.dist_token"], positions)
    kernel = out["model.spec_patch.proj.weight"]
    if "p_input_fdim" in bare:  # a pretraining's file says what its input was, cut into patches side by side
        pixels = (int(bare[name]) for name in ("p_input_fdim", "p_input_tdim"))
        high, wide = (size // side for size, side in zip(pixels, kernel.shape[-2:], strict=True))
        grid = grid or (high, wide)
    out |= _positions(positions, _grid(positions, kernel, grid, file))
    if "mask_embed" in bare:
        out["model.spec_tokens.mask_token"] = bare["mask_embed"].flatten()
    return out


def _from_hf(bare: Tensors, file: Path, grid: tuple[int, int] | None) -> Tensors:
    rest = dict(bare)
    cls, dist = rest.pop("embeddings.cls_token"), rest.pop("embeddings.distillation_token")
    positions = rest.pop("embeddings.position_embeddings")
    out: Tensors = {}
    depth = 1 + max(int(name.split(".")[2]) for name in rest if name.startswith("encoder.layer."))
    for number in range(depth):
        for kind in ("weight", "bias"):
            stem = f"encoder.layer.{number}.attention.attention"
            parts = [rest.pop(f"{stem}.{name}.{kind}", None) for name in ("query", "key", "value")]
            width = len(cls.flatten())
            # Without qkv_bias HF stores none: zeros are the same.
            whole = torch.cat([torch.zeros(width) if part is None else part for part in parts])
            out[f"model.encoder.blocks.{number}.attn.qkv.{kind}"] = whole
    for theirs, ours in (*_hf_names(depth), *_HF_HEAD):
        for kind in ("weight", "bias"):
            if f"{theirs}.{kind}" in rest:
                out[f"{ours}.{kind}"] = rest.pop(f"{theirs}.{kind}")
    _add_embeddings(out, cls, dist, positions)
    kernel = out["model.spec_patch.proj.weight"]
    out |= _positions(positions, _grid(positions, kernel, grid or _hf_grid(file), file))
    return out | rest


def _hf_names(depth: int) -> Iterator[tuple[str, str]]:
    yield from _HF_OUTSIDE
    for number in range(depth):
        for theirs, ours in _HF:
            yield f"encoder.layer.{number}.{theirs}", f"model.encoder.blocks.{number}.{ours}"


def _add_embeddings(out: Tensors, cls: torch.Tensor, dist: torch.Tensor, positions: torch.Tensor) -> None:
    out["model.special.tokens"] = torch.stack([cls.flatten(), dist.flatten()])
    out["model.special.positions"] = positions[0, :2]


def _positions(positions: torch.Tensor, grid: tuple[int, int]) -> Tensors:
    return {"model.spec_tokens.positions": torch.unflatten(positions[0, 2:], 0, grid)}


def _hf_grid(file: Path) -> tuple[int, int] | None:
    """From the config.json beside the file."""
    path = file.parent / "config.json"
    if not path.is_file():
        return None
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    high = (config.get("num_mel_bins", 128) - config.get("patch_size", 16)) // config.get("frequency_stride", 10) + 1
    wide = (config.get("max_length", 1024) - config.get("patch_size", 16)) // config.get("time_stride", 10) + 1
    return high, wide


def _grid(
    positions: torch.Tensor, kernel: torch.Tensor, known: tuple[int, int] | None, file: Path
) -> tuple[int, int]:
    """The patch grid (frequency, time) of a flat list of positions over 128 mel bins. It is never guessed.

    Args:
        positions: [1, 2 + N, D].
        kernel: Of the patch embedding, [D, 1, height, width].
        known: From `model.init_grid`, or from what lies in or beside the file.
        file: For the error.

    Raises:
        UserError: patches that are not square, another number of positions than the known grid's, or more than one
            grid that would do, such as 600 = 12 x 50 (stride 10) and 8 x 75 (stride 16).
    """
    count, (patch, across) = positions.shape[1] - 2, kernel.shape[-2:]
    if patch != across:
        raise UserError(
            f"model.init: {file}: patches of {patch} x {across}; only models of square patches can be read"
        )
    if known is not None:
        if known[0] * known[1] != count:
            raise UserError(
                f"model.init: {file}: {count} positions are no grid of {known[0]} x {known[1]}; set model.init_grid to "
                "the model's patches along frequency and time"
            )
        return known
    heights = {patch_grid(MEL_BINS, MEL_BINS, patch, stride)[0] for stride in range(1, patch + 1)}
    found = [(high, count // high) for high in sorted(heights) if count % high == 0]
    if len(found) != 1:
        grids = " or ".join(f"[{high},{wide}]" for high, wide in found) or "no grid"
        raise UserError(
            f"model.init: {file}: {count} positions over {MEL_BINS} mel bins are {grids} (frequency, time); set "
            "model.init_grid to the one that the model was trained with"
        )
    return found[0]
