"""Weights from one run into another, with an exact report.

In: a run directory or a `.safetensors` file. Out: a filled module and a `LoadReport`.
"""

import logging
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from pipeline.errors import UserError
from pipeline.model.embed import resize_positions

log = logging.getLogger(__name__)

POSITIONS = "_tokens.positions"  # parameters whose shape is a patch grid


@dataclass(slots=True)
class LoadReport:
    """Where each weight of a module came from; names of parameters.

    Attributes:
        loaded: Taken as they are.
        resized: Positions, fitted to another patch grid.
        fresh: Not in the source: they keep their initialisation.
        dropped: In the source, without a place in the module.
    """

    loaded: list[str] = field(default_factory=list)
    resized: list[str] = field(default_factory=list)
    fresh: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        parts = [f"{len(self.loaded)} loaded"]
        for what in ("resized", "fresh", "dropped"):
            names: list[str] = getattr(self, what)
            if names:
                parts.append(f"{len(names)} {what} ({', '.join(_summary(names))})")
        return ", ".join(parts)


def weights_file(source: str | Path, average: bool = True) -> Path:
    """The weights of a run: its newest complete checkpoint's, or the file itself.

    Args:
        source: Run directory, checkpoint directory or `.safetensors` file.
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
    for name in ("average.safetensors", "weights.safetensors") if average else ("weights.safetensors",):
        if (path / name).is_file():
            return path / name
    raise UserError(f"{source}: no complete checkpoint in it; give a run directory with checkpoints/ or a .safetensors")


def read_weights(file: Path) -> dict[str, torch.Tensor]:
    """Tensors of a `.safetensors` file, on the CPU.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file}: {error}; give a .safetensors file written by this project") from error


def load_weights(module: nn.Module, file: Path) -> LoadReport:
    """Copies what fits from `file` into `module`, fitting positions to the module's patch grid.

    Raises:
        UserError: a weight has another shape than the module's (another model size), or nothing fits.
    """
    source, own = read_weights(file), module.state_dict()
    report = LoadReport(dropped=[name for name in source if name not in own])
    for name, target in own.items():
        if name not in source:
            report.fresh.append(name)
            continue
        value = source[name]
        if name.endswith(POSITIONS) and value.shape[-1] == target.shape[-1] and value.shape != target.shape:
            value = resize_positions(value, (target.shape[0], target.shape[1]))
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
        raise UserError(f"model.init: {file}: none of its {len(source)} tensors is this model's")
    return report


def _summary(names: list[str]) -> list[str]:
    """Prefixes instead of hundreds of names."""
    return sorted({".".join(name.split(".")[:2]) for name in names})
