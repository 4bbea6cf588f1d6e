"""Weights from one run into another, with an exact report.

In: a run directory, a file of weights or a Hugging Face directory. Out: a filled module and a `LoadReport`.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from pipeline.config import ModelConfig
from pipeline.errors import UserError
from pipeline.files import check_name, read_json
from pipeline.methods import mismatch
from pipeline.model.craft import Craft
from pipeline.model.embed import resize_positions
from pipeline.model.foreign import EAT, translate

AVERAGE = "average.safetensors"
SHARDED = ".index.json"  # Hugging Face's list of the files that a large model is split into
WEIGHTS = ("weights.safetensors", "model.safetensors", "pytorch_model.bin", f"model.safetensors{SHARDED}",
           f"pytorch_model.bin{SHARDED}")  # a run's; Hugging Face's  # fmt: skip
FRONTENDS = set(get_args(ModelConfig.model_fields["frontend"].annotation))  # modules of a network
NORMS: dict[tuple[bool, ...], str] = {  # first and last LayerNorm of an encoder
    (False, True): "model.block=pre model.input_norms=false", (True, False): "model.block=post",
    (True, True): "model.block=pre model.input_norms=true",
}  # fmt: skip
POSITIONS = "_tokens.positions"  # parameters whose shape is a patch grid


@dataclass(slots=True)
class LoadReport:
    """Where each weight of a module came from; names of parameters.

    Attributes:
        origin: Whose weights the source holds.
        loaded: Taken as they are.
        resized: Positions, fitted to another patch grid.
        fresh: Not in the source, or not wanted from it: they keep their initialisation.
        dropped: In the source, without a place in the module, or not wanted.
    """

    origin: str = "CRAFT"

    loaded: list[str] = field(default_factory=list)
    resized: list[str] = field(default_factory=list)
    fresh: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        parts = [f"{self.origin} weights: {len(self.loaded)} loaded"]
        for what in ("resized", "fresh", "dropped"):
            names: list[str] = getattr(self, what)
            if names:
                parts.append(f"{len(names)} {what} ({', '.join(_summary(names))})")
        return ", ".join(parts)


def weights_file(source: str | Path, average: bool = True) -> Path:
    """The weights of a run: its newest complete checkpoint's, or the file itself.

    Args:
        source: Run directory, checkpoint directory, directory of a Hugging Face model, or file.
        average: Take the averaged weights where the checkpoint holds some.

    Raises:
        UserError: nothing there.
    """
    path = Path(source)
    if path.is_file():
        return path
    latest = path / "checkpoints" / "latest"
    if latest.is_file():
        path = path / "checkpoints" / latest.read_text(encoding="utf-8").strip()
    for name in (AVERAGE, *WEIGHTS) if average else WEIGHTS:
        if (path / name).is_file():
            return path / name
    if not path.exists():
        beside = [found.parent.name for found in sorted(path.parent.glob("*/checkpoints"))][:5]
        there = f"; {path.parent} holds the runs {', '.join(beside)}" if beside else ""
        raise UserError(f"{source}: there is no such file or directory{there}")
    raise UserError(
        f"{source}: no complete checkpoint in it; give a run directory with checkpoints/, the directory of a Hugging "
        "Face model, or a .safetensors, .pth or .bin file"
    )


def read_weights(file: Path) -> dict[str, torch.Tensor]:
    """Tensors of a file, on the CPU: `.safetensors`, or a pickle of plain tensors, of which no code is run.

    Of a split Hugging Face model the file is its `.index.json`.

    Raises:
        UserError: it cannot be read.
    """
    if file.name.endswith(SHARDED):
        return _read_sharded(file)
    try:
        content = load_file(file) if file.suffix == ".safetensors" else torch.load(file, "cpu", weights_only=True)
    except UnpicklingError as error:
        raise UserError(f"{file}: {_of_pickle(file, str(error))}") from error
    except (OSError, SafetensorError, RuntimeError, EOFError) as error:
        raise UserError(f"{file}: {error}; give a .safetensors file, or a .pth or .bin of plain tensors") from error
    except Exception as error:  # of a damaged pickle torch raises whatever its bytes lead to
        raise UserError(f"{file}: damaged ({type(error).__name__}: {error}); get it again") from error
    if isinstance(content, dict):  # some save the model beside the optimiser
        kept = (content[key] for key in ("model", "state_dict", "module") if isinstance(content.get(key), dict))
        content = next(kept, content)
    if isinstance(content, dict):  # fairseq keeps the averaged weights in there, under one name
        nested: dict[str, dict[str, Any]] = {name: part for name, part in content.items() if isinstance(part, dict)}
        flat = {f"{name}.{below}": value for name, part in nested.items() for below, value in part.items()}
        content = {name: value for name, value in content.items() if name not in nested} | flat
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise UserError(f"{file}: holds no mapping of names to tensors; give the model's state_dict")
    return content


def _read_sharded(index: Path) -> dict[str, torch.Tensor]:
    content = read_json(index, "the model's directory is damaged")
    places = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise UserError(f"{index}: holds no weight_map; the model's directory is damaged")
    tensors: dict[str, torch.Tensor] = {}
    for name in sorted(set(places.values())):
        tensors |= read_weights(index.with_name(check_name(name, f"{index}: file")))
    if missing := sorted(places.keys() - tensors.keys()):
        raise UserError(f"{index}: {places[missing[0]]} lacks {missing[0]}; the model's directory is damaged")
    return tensors


def _of_pickle(file: Path, error: str) -> str:
    """Why a pickle is not read, and how someone who trusts it makes plain tensors of it."""
    found = re.search(r"GLOBAL ([\w.]+)", error)
    if found is None:
        return f"{error.splitlines()[0]}; give a .safetensors file, or a .pth or .bin of plain tensors"
    return (
        f"holds {found[1]} besides tensors, and unpickling it could run its code; if you trust the file, convert it: "
        f'python -c "import torch; m = torch.load({str(file)!r}, weights_only=False); '
        f"torch.save(m.get('model', m.get('state_dict', m)), {str(file.with_suffix('.plain.pth'))!r})\""
    )


def load_weights(
    module: nn.Module, file: Path, skip: tuple[str, ...] = (), grid: tuple[int, int] | None = None
) -> LoadReport:
    """Copies what fits from `file` into `module`, fitting positions to the module's patch grid.

    Args:
        module: `PretrainTask` or `FinetuneTask`.
        file: Ours, or one of those that `pipeline.model.foreign` knows.
        skip: Prefixes of names that are left as they are.
        grid: Patches of the source along frequency and time, of weights of others that do not say it.

    Raises:
        UserError: a weight has another shape than the module's (another model size), nothing fits, or
            the source embeds none of the representations that the module reads.
    """
    own = module.state_dict()
    source, origin = translate(read_weights(file), file, grid)
    problem = mismatch(_Sides.of(source), _Sides.of(own))
    if problem:
        raise UserError(f"model.init: {file}: {problem}")
    trained, wanted = (FRONTENDS & {name.split(".")[1] for name in names if name.startswith("model.")}
                       for names in (source, own))  # fmt: skip
    if trained and wanted and trained != wanted:
        raise UserError(
            f"model.init: {file}: its waveforms come through model.frontend = {trained.pop()}, not {wanted.pop()}; set "
            "the same, or other weights"
        )
    theirs, ours = (tuple(f"model.encoder.{norm}.weight" in names for norm in ("first_norm", "norm"))
                    for names in (source, own))  # fmt: skip
    if theirs in NORMS and ours in NORMS and theirs != ours:
        raise UserError(f"model.init: {file}: its LayerNorms are those of {NORMS[theirs]}; set that")
    special = "model.special.tokens"
    if special in source and special in own and len(source[special]) != len(own[special]):
        raise UserError(
            f"model.init: {file}: it has {len(source[special])} class tokens, the model {len(own[special])}; set "
            f"model.class_tokens={len(source[special])}"
        )
    model = module.get_submodule("model")
    shorter = model.config.positions if isinstance(model, Craft) else "centre"
    report = LoadReport(origin, dropped=[name for name in source if name not in own or name.startswith(skip)])
    for name, target in own.items():
        if name not in source or name.startswith(skip):
            report.fresh.append(name)
            continue
        value = source[name]
        if origin == EAT and name == "model.spec_tokens.positions" and isinstance(model, Craft):
            value = value[:, : model.streams.frames // model.config.patch]  # side by side, whatever the model's stride
        gridded = name.endswith(".positions") and value.dim() == target.dim() == 3  # a decoder's are, too
        if gridded and value.shape[-1] == target.shape[-1] and value.shape != target.shape:
            if (value.shape[1] == 1) != (target.shape[1] == 1):
                kind = "rotary" if value.shape[1] == 1 else "learned"
                raise UserError(
                    f"model.init: {file}: was trained with {kind} positions of time, this model has model.positions = "
                    f"{shorter}; set the same, or other weights"
                )
            value = resize_positions(value, (target.shape[0], target.shape[1]), shorter)
            report.resized.append(name)
        elif value.shape == target.shape:
            report.loaded.append(name)
        elif name.startswith("classifier."):  # another data set's classes
            report.fresh.append(name)
            continue
        else:
            raise UserError(
                f"model.init: {file}: {name} is {list(value.shape)}, the model's {list(target.shape)}; set model.size "
                "and the model.* keys as in that run's config.yaml"
            )
        target.copy_(value)
    if not report.loaded:
        raise UserError(
            f"model.init: {file}: none of its {len(source)} tensors is this model's; give weights of this project, of "
            "SSAST, AST, Audio-MAE, M2D, AudioMosaic, EAT or SSLAM, or of a Hugging Face ASTModel"
        )
    return report


class _Sides(NamedTuple):
    """Which representations weights embed; both where they are of no known model."""

    spec: bool
    wav: bool

    @staticmethod
    def of(tensors: dict[str, torch.Tensor]) -> "_Sides":
        sides = _Sides(*(f"model.{side}{POSITIONS}" in tensors for side in ("spec", "wav")))
        return sides if any(sides) else _Sides(True, True)


def _summary(names: list[str]) -> list[str]:
    """Prefixes instead of hundreds of names."""
    return sorted({".".join(name.split(".")[:2]) for name in names})
