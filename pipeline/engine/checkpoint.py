"""Checkpoints that are whole or do not count.

In: the engine and the trainer's state. Out: `checkpoints/step-XXXXXXXX/` with DeepSpeed's files,
`weights.safetensors` (fp32, consolidated from any ZeRO stage), `state.json` and, last, `complete`.

DeepSpeed's own `latest` may name a checkpoint that a killed rank left half written; here a directory
counts only once `complete` is in it, and `latest` is replaced by a rename after that.
"""

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from pipeline import distributed
from pipeline.distributed import World
from pipeline.errors import UserError

log = logging.getLogger(__name__)


def full_weights(engine: Any, keep: bool) -> dict[str, torch.Tensor]:
    """All parameters in float32 on the host, from any ZeRO stage; a collective.

    One parameter at a time is whole on a device, so the peak is that of the largest one.

    Args:
        engine: DeepSpeed engine.
        keep: Return them (rank 0); other ranks take part and return nothing.
    """
    from deepspeed.utils import safe_get_full_fp32_param  # slow to import, and only trainers need it

    weights = {}
    for name, parameter in engine.module.named_parameters():
        full = safe_get_full_fp32_param(parameter)  # None: not partitioned, the parameter is whole
        if keep:
            weights[name] = (parameter if full is None else full).detach().float().cpu().clone().contiguous()
    return weights


def save(
    engine: Any, run_dir: Path, state: dict[str, Any], average: dict[str, torch.Tensor], world: World, keep: int
) -> Path:
    """Writes the checkpoint of `state["step"]`; a collective.

    Args:
        engine: DeepSpeed engine.
        run_dir: Run directory.
        state: JSON-able state of the trainer; "step" names the checkpoint.
        average: Averaged weights on rank 0; empty: none.
        world: Ranks.
        keep: Newest checkpoints to keep.
    """
    root = run_dir / "checkpoints"
    folder = root / f"step-{state['step']:08d}"
    if world.is_main:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    distributed.barrier()
    engine.save_checkpoint(str(root), tag=folder.name, client_state={}, save_latest=False)
    weights = full_weights(engine, keep=world.is_main)
    if world.is_main:
        save_file(weights, folder / "weights.safetensors")
        if average:
            save_file(average, folder / "average.safetensors")
        layout = {"world_size": world.size, "zero_stage": engine.zero_optimization_stage()}
        _write(folder / "state.json", json.dumps({**state, **layout}, indent=1))
    distributed.barrier()  # every rank's files are written
    if world.is_main:
        _write(folder / "complete", "")
        _write(root / "latest", folder.name)
        for old in complete_checkpoints(run_dir)[:-keep]:
            shutil.rmtree(old)
    distributed.barrier()
    return folder


def complete_checkpoints(run_dir: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    return sorted(marker.parent for marker in (run_dir / "checkpoints").glob("step-*/complete"))


def read_state(run_dir: Path) -> dict[str, Any] | None:
    """`state.json` of the newest whole checkpoint; None where there is none."""
    found = complete_checkpoints(run_dir)
    if not found:
        return None
    state: dict[str, Any] = json.loads((found[-1] / "state.json").read_text(encoding="utf-8"))
    return state


def refuse_other_run(run_dir: Path, identity: dict[str, Any], resume: str) -> None:
    """Checks, before anything is written, that a checkpoint in `run_dir` is of this very run.

    Raises:
        UserError: it is another run's, or `run.resume` is "never".
    """
    state = read_state(run_dir)
    if state is None:
        return
    if resume == "never":
        raise UserError(f"run.resume = never, but {run_dir} holds a checkpoint; give another run.dir")
    for key, value in identity.items():
        if state["identity"][key] != value:
            raise UserError(
                f"{run_dir} holds a run with {key} = {state['identity'][key]}, not {value}; go on with that, or give "
                "another run.dir"
            )


def restore(engine: Any, run_dir: Path, state: dict[str, Any], world: World) -> None:
    """Loads weights and optimiser of the checkpoint that `state` was read from; a collective.

    Raises:
        UserError: it was written by another number of ranks or ZeRO stage, or cannot be loaded.
    """
    stage = engine.zero_optimization_stage()
    was = (state["zero_stage"], state["world_size"])
    if was != (stage, world.size) and not (stage == 0 and was[0] == 0):
        raise UserError(
            f"{run_dir}: its checkpoint was written at ZeRO {was[0]} by {was[1]} ranks, this run is ZeRO {stage} on "
            f"{world.size}; go on with those, or start a new run.dir with model.init={run_dir}"
        )
    tag = f"step-{state['step']:08d}"
    loaded, _ = engine.load_checkpoint(str(run_dir / "checkpoints"), tag=tag)
    if loaded is None:
        raise UserError(f"{run_dir}: checkpoint {tag} cannot be loaded; delete it to go on from the one before")


def read_average(run_dir: Path) -> dict[str, torch.Tensor]:
    """Averaged weights of the newest whole checkpoint; empty where it has none."""
    file = complete_checkpoints(run_dir)[-1] / "average.safetensors"
    return load_file(file) if file.is_file() else {}


def _write(path: Path, text: str) -> None:
    """Replaces `path` atomically and durably."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
