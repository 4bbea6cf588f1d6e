"""An engine's whole training state as named float32 tensors, whatever its ranks, ZeRO stage and precision.

In: a DeepSpeed engine. Out: for every parameter its float32 weight and Adam's two moments, whole, on the
host; and the way back into an engine of any other layout.

DeepSpeed's own checkpoint files are tied to the ranks and the ZeRO stage that wrote them: stage 3 needs
the same ranks, a change needs an offline conversion (which stage 0 lacks), and loading unpickles. A
state by parameter name needs no conversion: every layout reads its own part of it, with the same bits.

Cost: each tensor is made whole once (one collective each), so a snapshot moves three times the float32
weights; CRAFT-base: 1 GB, a few optimiser steps' traffic. Host memory: the tensors a rank keeps, 1 / R of
the moments (`shares`) and on rank 0 the weights.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from pipeline import distributed

MOMENTS = ("exp_avg", "exp_avg_sq")
SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def weights(engine: Any, keep: bool) -> dict[str, torch.Tensor]:
    """All parameters in float32 on the host, from any ZeRO stage; a collective.

    Args:
        engine: DeepSpeed engine.
        keep: Return them; other ranks take part and return nothing.
    """
    from deepspeed.utils import safe_get_full_fp32_param  # slow to import, and only trainers need it

    found = {}
    for name, parameter in engine.module.named_parameters():
        full = safe_get_full_fp32_param(parameter)  # None: not partitioned, the parameter is whole
        if keep:
            found[name] = _host(parameter if full is None else full)
    return found


def moments(engine: Any, keep: set[str]) -> dict[str, torch.Tensor]:
    """Adam's moments of the parameters in `keep` as {"exp_avg/NAME": ...}; a collective.

    Empty before the first update.
    """
    from deepspeed.utils import safe_get_full_optimizer_state

    found: dict[str, torch.Tensor] = {}
    if not updates(engine):
        return found
    _link(engine)
    for name, parameter in engine.module.named_parameters():
        for key in MOMENTS:
            full = safe_get_full_optimizer_state(parameter, key)
            if name in keep:
                found[f"{key}/{name}"] = _host(_adam(engine).state[parameter][key] if full is None else full)
    return found


def shares(engine: Any, ranks: int) -> list[set[str]]:
    """Names of the parameters whose moments each rank writes: about equal bytes each."""
    sizes = {name: getattr(p, "ds_numel", p.numel()) for name, p in engine.module.named_parameters()}
    total, done = sum(sizes.values()), 0
    split: list[set[str]] = [set() for _ in range(ranks)]
    for name, size in sizes.items():
        split[min(ranks - 1, done * ranks // total)].add(name)
        done += size
    return split


def updates(engine: Any) -> int:
    """Updates that Adam has made: its bias correction depends on them. Skipped steps do not count."""
    state = _adam(engine).state
    return next((int(state[flat]["step"]) for flat in _flat(engine) if state.get(flat)), 0)


def loss_scale(engine: Any) -> dict[str, float]:
    """State of fp16's dynamic loss scaling; empty in other precisions."""
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    if scaler is None or not getattr(scaler, "dynamic", False):
        return {}
    return {name: getattr(scaler, name) for name in SCALER}


def restore(
    engine: Any,
    weight: Mapping[str, torch.Tensor],
    moment: Iterator[tuple[str, torch.Tensor]],
    done: int,
    scaler: Mapping[str, float],
) -> None:
    """Puts a state into a fresh engine, which was built around a module that already holds `weight`.

    The module alone would do in float32; in bf16 and fp16 it holds rounded weights, and the float32 ones
    go to the optimiser.

    Args:
        engine: DeepSpeed engine, before its first step.
        weight: Parameter name -> float32.
        moment: ("exp_avg/NAME", float32), in any order.
        done: `updates` of the state.
        scaler: `loss_scale` of the state.
    """
    parameters = dict(engine.module.named_parameters())
    for name, parameter in parameters.items():
        _put(parameter, weight[name].to(engine.device), None)
    if done:
        adam = _adam(engine)
        for flat in _flat(engine):
            adam.state[flat] = {"step": torch.tensor(float(done)), **{key: torch.zeros_like(flat) for key in MOMENTS}}
        _link(engine)
        for path, value in moment:
            key, _, name = path.partition("/")
            parameter = parameters[name]
            if parameter in adam.state:
                adam.state[parameter][key].copy_(value)
            else:
                _put(parameter, value.to(engine.device), key)
    for name, number in scaler.items():
        if getattr(engine.optimizer, "loss_scaler", None) is not None:
            setattr(engine.optimizer.loss_scaler, name, number)


def _link(engine: Any) -> None:
    """ZeRO 1, 2 and bf16 map each parameter to its part of the flat moments; all of them must be there.

    DeepSpeed does so once, after the update of the first parameter group: with more of them (optim.layer_decay) the
    others' parameters would have no moments.
    """
    link = getattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state", None)
    if link is not None:
        engine.optimizer._hp_optimizer_states_linked = False
        link()


def _put(parameter: Any, value: torch.Tensor, key: str | None) -> None:
    """Sets a weight's float32 master (`key` None) or moment from the whole tensor; at ZeRO 0 in float32 nothing."""
    import deepspeed.utils as deepspeed

    partitioned = hasattr(parameter, "ds_id")
    if partitioned:
        # ZeRO 3's parts are equally long, the last one padded; DeepSpeed's setter of whole tensors fails there.
        part = parameter.ds_tensor.numel()
        padded = torch.nn.functional.pad(value.flatten(), (0, part * distributed.world_size() - value.numel()))
        value = padded[part * distributed.rank() :][:part]
    if key is None:
        put = deepspeed.safe_set_local_fp32_param if partitioned else deepspeed.safe_set_full_fp32_param
        put(parameter, value)
    else:
        put = deepspeed.safe_set_local_optimizer_state if partitioned else deepspeed.safe_set_full_optimizer_state
        put(parameter, value, key)


def _adam(engine: Any) -> Any:
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def _flat(engine: Any) -> list[torch.Tensor]:
    """The tensors that Adam updates: parameters at ZeRO 0, else this rank's flat float32 parts."""
    if hasattr(engine.optimizer, "fp32_partitioned_groups_flat"):
        return list(engine.optimizer.fp32_partitioned_groups_flat)
    return [flat for group in _adam(engine).param_groups for flat in group["params"]]


def _host(tensor: torch.Tensor) -> torch.Tensor:
    """A float32 copy that training will not overwrite."""
    return tensor.detach().to("cpu", torch.float32, copy=True).contiguous()
