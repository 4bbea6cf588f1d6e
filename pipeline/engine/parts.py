"""Which part of the float32 weights and of Adam's moments each rank holds, at any ZeRO stage.

In: a DeepSpeed engine. Out: this rank's parts, whole tensors of them on the host, the other way round, and the mean of
the weights over time.

| layout | a rank's part of a flattened parameter |
|---|---|
| ZeRO 0 | all of it |
| ZeRO 1, 2 and bf16's optimiser | what its share of the group's flat weights covers, perhaps nothing |
| ZeRO 3 | the rank-th of R equal parts; the last one is padded |
"""

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch

from pipeline import distributed
from pipeline.engine.setup import BUCKET

MOMENTS = ("exp_avg", "exp_avg_sq")


class Part(NamedTuple):
    """Neighbouring elements of a flattened parameter.

    Attributes:
        start: Of the first one.
        values: float32 [n], perhaps empty.
    """

    start: int
    values: torch.Tensor


class Mean:
    """Mean of the weights over time; each rank has that of its own part, and sends nothing.

    Args:
        engine: DeepSpeed engine.

    Attributes:
        parts: By the parameters' names, where the engine has its weights; empty: nothing was taken so far.
    """

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self.parts: dict[str, Part] = {}

    def take(self, mix: Callable[[torch.Tensor, torch.Tensor], object]) -> None:
        """Takes the weights in as `mix(mean, weights)` does, in place; the first ones are their own mean before."""
        for name, (start, weights) in own_parts(self._engine, spread(self._engine)).items():
            mean = self.parts.setdefault(name, Part(start, weights.clone()))
            mix(mean.values, weights)

    def restore(self, whole: Iterator[tuple[str, torch.Tensor]]) -> None:
        """Takes this rank's part out of whole float32 means."""
        own = own_parts(self._engine, spread(self._engine))
        for name, value in whole:
            start, weights = own[name]
            self.parts[name] = Part(start, value.flatten()[start:][: len(weights)].to(weights.device, copy=True))


def spread(engine: Any) -> dict[str, int]:
    """Parameter name -> a rank, so that each has about as many bytes."""
    size = distributed.world_size()
    sizes = {name: shape.numel() for name, shape in _shapes(engine).items()}
    before = [0, *itertools.accumulate(sizes.values())]
    return {name: min(done * size // before[-1], size - 1) for name, done in zip(sizes, before, strict=False)}


def own_parts(engine: Any, owners: Mapping[str, int], key: str | None = None) -> dict[str, Part]:
    """What this rank holds of each weight, or with `key` of that moment; not copied where that can be avoided.

    Args:
        engine: DeepSpeed engine; with `key` after its first update.
        owners: Parameter name -> the rank that counts as the holder of what all ranks have.
        key: One of `MOMENTS`.
    """
    from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state  # slow to import

    if key:
        link(engine)
    found, rank = {}, distributed.rank()
    for name, parameter in engine.module.named_parameters():
        start = 0
        if hasattr(parameter, "ds_id"):
            part = safe_get_local_optimizer_state(parameter, key) if key else safe_get_local_fp32_param(parameter)
            start = min(rank * part.numel(), parameter.ds_numel)
            values = part.flatten()[: parameter.ds_numel - start]
        elif hasattr(parameter, "_hp_mapping"):
            mapping = parameter._hp_mapping
            start = mapping.lp_fragment_address.start if mapping else 0
            values = mapping.get_hp_fragment(key) if mapping else parameter.new_empty(0)
        else:
            whole = adam(engine).state[parameter][key] if key else parameter
            values = whole.flatten() if owners[name] == rank else parameter.new_empty(0)
        found[name] = Part(start, values.detach().flatten().float())
    return found


def put_together(engine: Any, parts: Mapping[str, Part], owners: Mapping[str, int]) -> dict[str, torch.Tensor]:
    """Whole float32 tensors on the host, each on the rank that is to have it: NAME -> tensor; a collective.

    One sum over ranks for many tensors, up to the gradients' buckets in size. What is added are the bits, as integers,
    to nothing: no rounding, and a negative zero stays one.

    Args:
        engine: DeepSpeed engine.
        parts: Of this rank, of all parameters.
        owners: Parameter name -> the rank that gets it.
    """
    found: dict[str, torch.Tensor] = {}
    shapes = _shapes(engine)
    for owner, names in _buckets(shapes, owners):
        sizes = [shapes[name].numel() for name in names]
        flat = torch.zeros(sum(sizes), dtype=torch.int32, device=engine.device)
        for name, place in zip(names, torch.split(flat, sizes), strict=True):
            start, values = parts[name]
            place[start : start + len(values)] = values.view(torch.int32)
        distributed.add_up(flat, owner)
        if owner == distributed.rank():
            whole = torch.split(flat.cpu().view(torch.float32), sizes)
            found |= {name: piece.view(shapes[name]) for name, piece in zip(names, whole, strict=True)}
    return found


def full_weights(engine: Any) -> dict[str, torch.Tensor]:
    """All parameters in float32 on rank 0's host, nothing on the others; a collective."""
    return _full(engine, dict.fromkeys(_shapes(engine), 0), None)


def full_moments(engine: Any, owners: Mapping[str, int]) -> dict[str, torch.Tensor]:
    """{"exp_avg/NAME": ...} of the parameters whose owner this rank is; a collective. Empty before any update."""
    if not updates(engine):
        return {}
    return {f"{key}/{name}": moment for key in MOMENTS for name, moment in _full(engine, owners, key).items()}


def updates(engine: Any) -> int:
    """Updates that Adam has made: its bias correction depends on them. Skipped steps do not count."""
    state = adam(engine).state
    return next((int(state[flat]["step"]) for flat in flat_weights(engine) if state.get(flat)), 0)


def adam(engine: Any) -> Any:
    """The optimiser that DeepSpeed's has inside."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def flat_weights(engine: Any) -> list[torch.Tensor]:
    """The tensors that Adam updates: parameters at ZeRO 0, else this rank's flat float32 parts."""
    if hasattr(engine.optimizer, "fp32_partitioned_groups_flat"):
        return list(engine.optimizer.fp32_partitioned_groups_flat)
    return [flat for group in adam(engine).param_groups for flat in group["params"]]


def link(engine: Any) -> None:
    """ZeRO 1, 2 and bf16 map each parameter to its part of the flat moments; all of them must be there.

    DeepSpeed does so once, after the update of the first parameter group: with more of them (optim.layer_decay) the
    others' parameters would have no moments.
    """
    link = getattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state", None)
    if link is not None:
        engine.optimizer._hp_optimizer_states_linked = False
        link()


def put(parameter: Any, value: torch.Tensor, key: str | None) -> None:
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


def host(tensor: torch.Tensor) -> torch.Tensor:
    """A float32 copy that training will not overwrite."""
    return tensor.detach().to("cpu", torch.float32, copy=True).contiguous()


def _full(engine: Any, owners: Mapping[str, int], key: str | None) -> dict[str, torch.Tensor]:
    """Whole weights or moments on their owners' hosts; only what is divided is sent."""
    parts = own_parts(engine, owners, key)
    if engine.zero_optimization_stage():
        return put_together(engine, parts, owners)
    mine = (name for name, owner in owners.items() if owner == distributed.rank())
    return {name: host(parts[name].values).view(_shapes(engine)[name]) for name in mine}


def _shapes(engine: Any) -> dict[str, torch.Size]:
    named = engine.module.named_parameters()
    return {name: getattr(parameter, "ds_shape", parameter.shape) for name, parameter in named}


def _buckets(shapes: Mapping[str, torch.Size], owners: Mapping[str, int]) -> Iterator[tuple[int, list[str]]]:
    """(owner, names of neighbouring parameters) of at most `BUCKET` elements, or one larger parameter."""
    names: list[str] = []
    size = 0
    for name, shape in shapes.items():
        if names and (owners[name] != owners[names[0]] or size + shape.numel() > BUCKET):
            yield owners[names[0]], names
            names, size = [], 0
        names.append(name)
        size += shape.numel()
    yield owners[names[0]], names
