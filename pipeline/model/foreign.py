"""Other people's weights under our names, and ours under theirs.

In: tensors of an SSAST or AST checkpoint (YuanGongND), of a Hugging Face `ASTModel` or `ASTForAudioClassification`, of
Audio-MAE (facebookresearch), M2D (nttcslab), AudioMosaic (HanxunH), EAT (cwx-worst-one) or SSLAM (ta012). Out: the
same tensors under the names of a task of `pipeline.tasks`.

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

| ours | Audio-MAE, M2D, AudioMosaic (timm's ViT) | EAT, SSLAM (fairseq's data2vec 2.0), M = modality_encoders.IMAGE |
|---|---|---|
| model.special.tokens | cls_token | M.extra_tokens |
| model.special.positions | pos_embed, the first | zeros |
| model.spec_tokens.positions | pos_embed, the others | M.fixed_positional_encoder.positions |
| model.spec_patch.proj | patch_embed.proj | M.local_encoder.proj |
| model.encoder.blocks.N | blocks.N | blocks.N |
| model.encoder.norm | norm, where there is one (else it only normalises) | |
| model.spec_patch.norm | patch_embed.norm | |
| model.encoder.first_norm | norm_pre | M.context_encoder.norm |

Orientation. Our maps, kernels, positions and tokens have frequency before time, as those of SSAST, AST and M2D.
Audio-MAE, AudioMosaic, EAT and SSLAM convolve [B, 1, T, M]: patches of one time stand side by side, so their kernels
and grids are transposed. (Audio-MAE fills its table of sines for a grid of the other orientation; a token finds its own
position by its number, which is what counts here.)

What is another network, and not this one with other numbers, is refused: BEATs.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from pipeline.errors import UserError
from pipeline.files import read_json
from pipeline.model.embed import patch_grid

Tensors = dict[str, torch.Tensor]
HF_PREFIX = "audio_spectrogram_transformer."
WRAPPERS = ("module.", "model.", "net.", "ar.runtime.backbone.")  # the last one: EVAR, which finetunes M2D
EAT_PREFIX = "modality_encoders.IMAGE."
EAT = "EAT or SSLAM"  # a table of 2 minutes of positions, of which any input takes the first
KNOWN = ("model.special.", "model.encoder.blocks.", "v.cls_token", "embeddings.cls_token", HF_PREFIX, EAT_PREFIX,
         "patch_embed.proj.", "post_extract_proj.", "patch_embedding.")  # of each format  # fmt: skip
MEL_BINS, M2D_BINS = 128, 80  # of every published SSAST, AST, Audio-MAE, EAT and SSLAM model; of M2D's
DAMAGED = "the model's directory is damaged"
_BEATS = (
    "of BEATs, whose attention has gated relative positions, whose blocks scale their residuals (DeepNorm) and whose "
    "patches are convolved with their neighbours"
)
REFUSED = {
    "encoder.layers.0.self_attn.relative_attention_bias.weight": _BEATS,
    "encoder.layers.0.self_attn.grep_linear.weight": _BEATS,
}

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
    """Tensors under our names, and whose they are.

    That is "CRAFT", "SSAST", "SSAST or AST" (finetuned), "HF AST", "Audio-MAE", "M2D", "AudioMosaic" or
    "EAT or SSLAM".

    What has no place in any of our models keeps its name, so that a report can list it.

    Args:
        tensors: Content of `file`.
        file: For a config.json beside it, and for errors.
        grid: Patches along frequency and time, where neither the tensors nor a config.json says them.

    Raises:
        UserError: the patch grid of the positions cannot be told, a tensor is missing, or the weights are of a network
            that this is not.
    """
    tensors = _unwrapped(tensors)
    for name, reason in REFUSED.items():
        if name in tensors:
            raise UserError(f"model.init: {file}: {reason}, which this encoder has not: it would be another model")
    try:
        if f"{EAT_PREFIX}local_encoder.proj.weight" in tensors:
            return _from_eat(tensors, file, grid), EAT
        if {"cls_token", "pos_embed", "patch_embed.proj.weight"} <= tensors.keys():
            return _from_vit(tensors, file, grid)
        if "v.cls_token" in tensors:
            return _from_ssast(tensors, file, grid), "SSAST" if "p_input_fdim" in tensors else "SSAST or AST"
        bare = {name.removeprefix(HF_PREFIX): value for name, value in tensors.items()}
        if "embeddings.position_embeddings" in bare:
            return _from_hf(bare, file, grid), "HF AST"
    except KeyError as error:
        raise UserError(
            f"model.init: {file}: lacks {error.args[0]}: a part of a model, or another one than this reads; give whole "
            "weights of SSAST, AST, Audio-MAE, M2D, AudioMosaic, EAT or SSLAM, or of a Hugging Face ASTModel"
        ) from error
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
    out |= _positions(positions, _grid(positions.shape[1] - 2, kernel, grid, file))
    if "mask_embed" in bare:
        out["model.spec_tokens.mask_token"] = bare["mask_embed"].flatten()
    return out


def _from_vit(bare: Tensors, file: Path, grid: tuple[int, int] | None) -> tuple[Tensors, str]:
    """Audio-MAE, AudioMosaic or M2D, which name everything alike and differ in orientation.

    AudioMosaic alone has `norm_pre`. The others are told apart by M2D's `norm_stats`, or by the patches along
    frequency: M2D has 5 of 16 over its 80 mel bins, Audio-MAE 8, or 12 that overlap, over 128.
    """
    positions, kernel = bare["pos_embed"], bare["patch_embed.proj.weight"]
    count, high = positions.shape[1] - 1, M2D_BINS // kernel.shape[-1]
    mosaic = "norm_pre.weight" in bare
    fits = not mosaic and ((grid[0] == high) if grid else count % high == 0)
    if "norm_stats" not in bare and not grid and fits and (count % 8 == 0 or count % 12 == 0):
        raise UserError(
            f"model.init: {file}: {count} positions may be Audio-MAE's (time first) or M2D's (frequency first); set "
            "model.init_grid to its patches along frequency and time"
        )
    m2d = "norm_stats" in bare or fits
    if m2d or mosaic:
        grid = grid or _side_by_side(count, kernel, M2D_BINS if m2d else MEL_BINS)
    out = _blocks(bare, {"norm.": "model.encoder.norm.", "norm_pre.": "model.encoder.first_norm.",
                         "patch_embed.norm.": "model.spec_patch.norm."})  # fmt: skip
    # AudioMosaic's own settings and a finetuned Audio-MAE have no norm of the tokens: their `fc_norm` is of the mean
    # token, and its gains fit no single one. Ours begins as one that only normalises; `fc_norm` is listed as dropped.
    if "model.encoder.norm.weight" not in out:
        width = kernel.shape[0]
        out |= {"model.encoder.norm.weight": torch.ones(width), "model.encoder.norm.bias": torch.zeros(width)}
    return out | _embedded(
        kernel, bare["patch_embed.proj.bias"], bare["cls_token"], positions[0, :1], positions[0, 1:],
        _grid(count, kernel, grid, file), transposed=not m2d,
    ), "M2D" if m2d else "AudioMosaic" if mosaic else "Audio-MAE"  # fmt: skip


def _from_eat(bare: Tensors, file: Path, grid: tuple[int, int] | None) -> Tensors:
    m = EAT_PREFIX
    for name in (f"{m}context_encoder.norm.weight", f"{m}fixed_positional_encoder.positions", f"{m}extra_tokens"):
        if name not in bare:
            raise UserError(f"model.init: {file}: lacks {name}; only EAT's and SSLAM's own settings can be read")
    if any(name.startswith(f"{m}context_encoder.blocks.") for name in bare):
        raise UserError(f"model.init: {file}: has blocks in its context_encoder; EAT and SSLAM have none there")
    kernel, positions = bare[f"{m}local_encoder.proj.weight"], bare[f"{m}fixed_positional_encoder.positions"]
    tokens, count = bare[f"{m}extra_tokens"], positions.shape[1]
    out = _blocks(bare, {f"{m}context_encoder.norm.": "model.encoder.first_norm."})
    return out | _embedded(
        kernel, bare[f"{m}local_encoder.proj.bias"], tokens, torch.zeros_like(tokens[0]), positions[0],
        _grid(count, kernel, grid or _side_by_side(count, kernel, MEL_BINS), file), transposed=True,
    )  # fmt: skip


def _side_by_side(count: int, kernel: torch.Tensor, mel_bins: int) -> tuple[int, int]:
    """The grid of M2D, AudioMosaic, EAT and SSLAM, whose patches never overlap."""
    high = mel_bins // kernel.shape[-2]
    return high, count // high


def _blocks(bare: Tensors, norms: dict[str, str]) -> Tensors:
    """Blocks and norms under our names; what is neither keeps its name, but for what `_embedded` takes."""
    taken = ("cls_token", "pos_embed", "patch_embed.proj.", f"{EAT_PREFIX}extra_tokens",
             f"{EAT_PREFIX}local_encoder.proj.", f"{EAT_PREFIX}fixed_positional_encoder.")  # fmt: skip
    out: Tensors = {}
    for name, value in bare.items():
        theirs = next((prefix for prefix in norms if name.startswith(prefix)), None)
        if theirs is not None:
            out[norms[theirs] + name.removeprefix(theirs)] = value
        elif name.startswith("blocks."):
            out[f"model.encoder.{name}"] = value
        elif not name.startswith(taken):
            out[name] = value
    return out


def _embedded(
    kernel: torch.Tensor, bias: torch.Tensor, tokens: torch.Tensor, special: torch.Tensor, positions: torch.Tensor,
    grid: tuple[int, int], transposed: bool,
) -> Tensors:  # fmt: skip
    """What stands before the blocks.

    Args:
        kernel: Of the patch embedding, [D, 1, P, P].
        bias: [D].
        tokens: [1, k, D], of the class.
        special: [k, D], their positions.
        positions: [N, D], of the patches in their order.
        grid: Patches along frequency and time.
        transposed: Time is the first axis of kernel and grid.
    """
    high, wide = grid
    table = torch.unflatten(positions, 0, (wide, high) if transposed else grid)
    return {
        "model.spec_patch.proj.weight": kernel.mT if transposed else kernel, "model.spec_patch.proj.bias": bias,
        "model.special.tokens": tokens[0], "model.special.positions": special,
        "model.spec_tokens.positions": table.transpose(0, 1) if transposed else table,
    }  # fmt: skip


def _from_hf(bare: Tensors, file: Path, grid: tuple[int, int] | None) -> Tensors:
    rest = dict(bare)
    cls, dist = rest.pop("embeddings.cls_token"), rest.pop("embeddings.distillation_token")
    positions = rest.pop("embeddings.position_embeddings")
    out: Tensors = {}
    depth = 1 + max((int(name.split(".")[2]) for name in rest if name.startswith("encoder.layer.")), default=-1)
    for number in range(depth):
        for kind in ("weight", "bias"):
            names = [f"encoder.layer.{number}.attention.attention.{name}.{kind}" for name in ("query", "key", "value")]
            if kind == "bias":  # without qkv_bias HF stores none: zeros are the same
                rest |= {name: torch.zeros(len(cls.flatten())) for name in names if name not in rest}
            out[f"model.encoder.blocks.{number}.attn.qkv.{kind}"] = torch.cat([rest.pop(name) for name in names])
    for theirs, ours in (*_hf_names(depth), *_HF_HEAD):
        for kind in ("weight", "bias"):
            if f"{theirs}.{kind}" in rest:
                out[f"{ours}.{kind}"] = rest.pop(f"{theirs}.{kind}")
    _add_embeddings(out, cls, dist, positions)
    kernel = out["model.spec_patch.proj.weight"]
    out |= _positions(positions, _grid(positions.shape[1] - 2, kernel, grid or _hf_grid(file), file))
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


def hf_config(file: Path) -> dict[str, Any]:
    """The config.json beside a file of weights; empty where there is none.

    Raises:
        UserError: it is damaged.
    """
    path = file.parent / "config.json"
    content = read_json(path, DAMAGED) if path.is_file() else {}
    if not isinstance(content, dict):
        raise UserError(f"{path}: no table of settings; {DAMAGED}")
    return content


def _hf_grid(file: Path) -> tuple[int, int] | None:
    config = hf_config(file)
    if not config:
        return None
    try:
        high = (config.get("num_mel_bins", 128) - config.get("patch_size", 16)) // config.get("frequency_stride", 10)
        wide = (config.get("max_length", 1024) - config.get("patch_size", 16)) // config.get("time_stride", 10)
    except (TypeError, ZeroDivisionError) as error:
        raise UserError(f"{file.parent / 'config.json'}: patches: {error}; {DAMAGED}") from error
    return high + 1, wide + 1


def _grid(count: int, kernel: torch.Tensor, known: tuple[int, int] | None, file: Path) -> tuple[int, int]:
    """The patch grid (frequency, time) of a flat list of positions over 128 mel bins. It is never guessed.

    Args:
        count: N.
        kernel: Of the patch embedding, [D, 1, height, width].
        known: From `model.init_grid`, or from what lies in or beside the file.
        file: For the error.

    Raises:
        UserError: patches that are not square, another number of positions than the known grid's, or more than one
            grid that would do, such as 600 = 12 x 50 (stride 10) and 8 x 75 (stride 16).
    """
    patch, across = kernel.shape[-2:]
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
