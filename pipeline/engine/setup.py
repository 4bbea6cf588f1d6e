"""Recipe + ds.json -> a DeepSpeed engine.

In: a task, a recipe and the content of `--deepspeed_config`. Out: the engine and its batch arithmetic.
"""

import json
import logging
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import ValidationError
from torch import nn

from pipeline.config import OptimConfig, Recipe
from pipeline.distributed import World
from pipeline.errors import UserError
from pipeline.tasks import FinetuneTask, PretrainTask
from pipeline.tracking.store import load_deepspeed

# Top-level keys that DeepSpeed reads; it ignores any other silently, a typo such as "zero_optimisation" too.
KNOWN_KEYS = frozenset(
    {
        "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps",
        "gradient_clipping", "steps_per_print", "managed_gradient_accumulation", "dump_state",
        "disable_python_gc", "disable_allgather", "communication_data_type",
        "seq_parallel_communication_data_type", "prescale_gradients", "gradient_predivide_factor",
        "gradient_allreduce_op", "zero_optimization", "comms_logger", "tensorboard",
        "wandb", "csv_monitor", "comet", "fp16", "bf16", "torch_autocast",
        "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "flops_profiler",
        "wall_clock_breakdown", "memory_breakdown", "autotuning", "use_data_before_expert_parallelism",
        "hybrid_engine", "checkpoint", "data_types", "aio", "log_level", "nebula", "datastates",
        "weight_quantization", "compile", "timers",
    }
)

# Elements. Of CRAFT-base four: each but the last is summed beside the rest of the backward pass. DeepSpeed's 5e8 would
# sum them all after it, and reserve 1 to 4 GB.
BUCKET = 25_000_000

# Stage 2 sums the gradients over ranks in each micro-batch and not once a step, and DeepSpeed's optimiser for it reads
# several numbers back from a GPU in every step: on one H200 a step of CRAFT-base took half as long again.
DEFAULT_STAGE = 1

BARE = ("positions", "tokens", "edges")  # of several axes, and no matrices all the same; sinc's edges are frequencies
ALIGNED = 8  # elements: 16 bytes in half precision, 32 in float32

# What else of it changes numbers; batch and clipping are the recipe's, ZeRO, offload and compile keep the arithmetic.
NUMERIC_KEYS = (
    "bf16", "fp16", "torch_autocast", "communication_data_type", "data_types", "prescale_gradients",
    "gradient_predivide_factor", "gradient_allreduce_op", "weight_quantization",
)  # fmt: skip

# Keys whose value is one of some words: another one would end DeepSpeed with a traceback.
WORDS = {"communication_data_type": ("fp32", "bf16", "fp16"), "gradient_allreduce_op": ("mean", "sum")}

# Keys that DeepSpeed knows and a run cannot take, and what to do instead.
REFUSED = {
    "optimizer": "optim.* of the recipe owns it; move it there",
    "scheduler": "optim.* of the recipe owns it; move it there",
    "activation_checkpointing": "model.checkpoint_activations of the recipe owns it; move it there",
    "bfloat16": "its name is bf16; rename it",  # DeepSpeed's older name, which it reads where there is no bf16
    "elasticity": "train.batch_size of the recipe is the batch on any number of ranks; leave it out",
    "compression_training": "DeepSpeed no longer has it; leave it out",
    "data_efficiency": "data.* of the recipe says which clips come when, and DeepSpeed would ignore it; leave it out",
    "dataloader_drop_last": "every batch of the loader is whole, and DeepSpeed would ignore it; leave it out",
    **dict.fromkeys(("tensor_parallel", "expert_parallel", "pipeline"),
                    "ranks share the batch, and ZeRO alone divides the network; leave it out"),
}  # fmt: skip

# DeepSpeed's older names in zero_optimization, and today's.
RENAMED = {"cpu_offload": "offload_optimizer", "cpu_offload_param": "offload_param"}

# What DeepSpeed raises, beside errors of its own, for values that it cannot take; what the device or another rank does
# is a RuntimeError.
REFUSALS = (AssertionError, AttributeError, ImportError, LookupError, NotImplementedError, TypeError, ValueError)


@dataclass(frozen=True)
class Batches:
    """Batch arithmetic: `total` = ranks x `micro` x `accumulation`.

    Attributes:
        total: G, clips of a step over all ranks.
        micro: Clips of one forward on one rank.
        accumulation: Forwards of a step.
    """

    total: int
    micro: int
    accumulation: int


def numeric_differences(before: dict[str, Any], now: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Keys of two reconciled configurations that change a run's numbers and differ: key -> (before, now).

    A section that is off is one that is not there.
    """

    def value(ds: dict[str, Any], key: str) -> Any:
        found = ds.get(key)
        return None if isinstance(found, dict) and found.get("enabled") is False else found

    return {key: pair for key in NUMERIC_KEYS if (pair := (value(before, key), value(now, key)))[0] != pair[1]}


def plan_batches(recipe: Recipe, ds: dict[str, Any], ranks: int) -> Batches:
    """Splits the global batch over ranks and micro-batches.

    Raises:
        UserError: the batch does not divide, or ds.json contradicts the recipe; with the nearest
            numbers that would do.
    """
    total = _agree(ds, "train_batch_size", recipe.train.batch_size, "train.batch_size")
    if total % ranks:
        sizes, near = nearest_batches(total, ranks)
        raise UserError(
            f"train.batch_size = {total} does not divide by {ranks} ranks; use a batch of "
            f"{' or '.join(map(str, sizes))}, or {' or '.join(map(str, near))} ranks"
        )
    share = total // ranks
    wanted = recipe.train.micro_batch or None
    micro = _agree(ds, "train_micro_batch_size_per_gpu", wanted, "train.micro_batch")
    steps = _agree(ds, "gradient_accumulation_steps", None, "")
    if micro is None:
        micro = share if steps is None else share // steps
    if not micro or share % micro or (steps is not None and micro * steps != share):
        raise UserError(
            f"train.batch_size = {total} on {ranks} ranks is {share} clips a rank, which is not micro-batch {micro}"
            f"{'' if steps is None else f' x gradient_accumulation_steps {steps}'}; choose one that divides it"
        )
    return Batches(total, micro, share // micro)


def eval_batch_size(recipe: Recipe, world: World) -> int:
    """Clips of an evaluation's step over all ranks, a multiple of them: evaluation has no batch to keep to."""
    size = recipe.eval.batch_size or recipe.train.batch_size
    return max(1, size // world.size) * world.size


def nearest_batches(total: int, ranks: int) -> tuple[list[int], list[int]]:
    """What would do where `total` clips do not divide by `ranks`: nearest (batches, numbers of ranks)."""
    below = total - total % ranks
    divisors = [d for d in range(1, total + 1) if total % d == 0]
    near = [max(d for d in divisors if d < ranks), *(d for d in divisors if d > ranks)][:2]
    return [size for size in (below, below + ranks) if size], near


def reconcile(ds: dict[str, Any], recipe: Recipe, world: World) -> tuple[dict[str, Any], Batches]:
    """One consistent DeepSpeed configuration out of ds.json and the recipe.

    | ds.json key | rule |
    |---|---|
    | train_batch_size | "auto" or absent: train.batch_size; else equal to it |
    | train_micro_batch_size_per_gpu | "auto" or absent: train.micro_batch, or G / R / accumulation |
    | gradient_accumulation_steps | "auto" or absent: G / R / micro-batch |
    | gradient_clipping | "auto" or absent: optim.clip (0: off; DeepSpeed's own default is 1.0) |
    | zero_optimization.stage | "auto" or absent: 1 (`DEFAULT_STAGE`) |
    | zero_optimization.reduce_bucket_size | absent: 2.5e7 elements, a quarter of CRAFT-base |
    | zero_optimization.overlap_comm | absent: true at ZeRO 1 and 2 without offload; at ZeRO 3 DeepSpeed's is true |
    | zero_optimization.* | "auto": as if it were absent |
    | zero_optimization.compute_grad_norm | false: error: likewise as bf16.check_grad_overflow |
    | zero_optimization.cpu_offload* | error: DeepSpeed's older names of offload_* |
    | zero_optimization.offload_*.device | "nvme": error; "cpu" (optimizer: from stage 1, param: 3) is passed on |
    | bf16.enabled, fp16.enabled | "auto": bf16 on a GPU that computes it itself at ZeRO 1 to 3; fp16 off. Both: error |
    | fp16.enabled | on a CPU: error |
    | bf16, fp16 at ZeRO 0 | error: no float32 gradients there; stage 1 is the same and has them |
    | bf16.check_grad_overflow | false: error: a gradient that is not finite would make all weights NaN |
    | torch_autocast.dtype | "float16": error: its loss scale never falls |
    | communication_data_type | absent: "fp32" under bf16 and fp16, the reductions' precision |
    | data_types.grad_accum_dtype | absent: "fp32" under bf16 and fp16 |
    | activation_checkpointing | error: model.checkpoint_activations owns it |
    | bfloat16 | error: DeepSpeed's older name of bf16 |
    | managed_gradient_accumulation | false: error: each micro-batch would be an update |
    | elasticity, compression_training | error: another batch than the recipe's; gone from DeepSpeed |
    | data_efficiency, dataloader_drop_last | error: of DeepSpeed's own loader, which no clip comes from |
    | tensor_parallel, expert_parallel, pipeline | error: ZeRO alone divides the network |
    | compile.enabled, compile.backend | torch.compile of each encoder block; at ZeRO 3: error |
    | optimizer, scheduler | error: optim.* owns both |
    | timers.throughput | absent: off, since it waits for the GPU twice a step; the trainer has its own |
    | steps_per_print | absent: never; the trainer prints its own line |
    | any other known key | passed on; DeepSpeed checks its value |
    | a value of another type than above | error |
    | any unknown key | error |

    What stays float32 in bf16 and fp16, since half precision would lose it: master weights and Adam's
    moments (an update is a thousandth of a weight), gradients summed over micro-batches and ranks, losses
    and the contrast's softmax (exponentials), the pooled clip vectors, fbank and its normalisation.

    Raises:
        UserError: as the table says.
    """
    unknown = sorted(set(ds) - KNOWN_KEYS - REFUSED.keys())
    if unknown:
        raise UserError(f"ds.json: unknown key '{unknown[0]}' (DeepSpeed would ignore it); correct or remove it")
    for key, remedy in REFUSED.items():
        if key in ds:
            raise UserError(f"ds.json: '{key}' is set there, but {remedy}")
    _check_values(ds)
    batches = plan_batches(recipe, ds, world.size)
    # DeepSpeed would take its own defaults for "auto", and its buckets are twenty times as large.
    given = {key: value for key, value in ds.get("zero_optimization", {}).items() if value != "auto"}
    zero = {"reduce_bucket_size": BUCKET, **given, "stage": given.get("stage", DEFAULT_STAGE)}
    if zero["stage"] in (1, 2) and not zero.get("offload_optimizer"):
        zero.setdefault("overlap_comm", True)
    for part, least in (("offload_optimizer", 1), ("offload_param", 3)):
        device = (zero.get(part) or {}).get("device", "none")
        if device == "nvme":
            raise UserError(f'ds.json: zero_optimization.{part}.device = "nvme" is not supported; use "cpu"')
        if device != "none" and zero["stage"] < least:
            raise UserError(
                f"ds.json: zero_optimization.{part} needs zero_optimization.stage {least} or more: at {zero['stage']} "
                "DeepSpeed would ignore it; raise the stage, or leave it out"
            )
    if ds.get("compile", {}).get("enabled") and zero["stage"] == 3:
        raise UserError("ds.json: compile.enabled needs zero_optimization.stage 0 to 2: ZeRO 3 breaks every graph")
    resolved = {
        **ds,
        "train_batch_size": batches.total,
        "train_micro_batch_size_per_gpu": batches.micro,
        "gradient_accumulation_steps": batches.accumulation,
        "gradient_clipping": float(_agree(ds, "gradient_clipping", recipe.optim.clip, "optim.clip")),
        "zero_optimization": zero,
        **_precision(ds, zero["stage"], world),
        "steps_per_print": ds.get("steps_per_print", 10**9),
        "timers": {"throughput": {"enabled": False}, **ds.get("timers", {})},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    return resolved, batches


def _check_values(ds: dict[str, Any]) -> None:
    """Values that are read here; what DeepSpeed alone reads, it checks itself (`build_engine`).

    Raises:
        UserError: of another type or range; JSON's "8", null and "false" are no 8, nothing and false.
    """

    def check(key: str, value: Any, fits: bool, wanted: str) -> None:
        if not fits:
            raise UserError(f"ds.json: {key} = {json.dumps(value)}: give {wanted}")

    def number(value: Any, *kinds: type) -> bool:
        return isinstance(value, kinds) and not isinstance(value, bool)

    sections = ("zero_optimization", "bf16", "fp16", "torch_autocast", "compile", "data_types", "timers")
    for key in sections:
        check(key, ds.get(key), isinstance(ds.get(key, {}), dict), "a JSON object, or leave it out")
    for key in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
        value = ds.get(key, "auto")
        check(key, value, value == "auto" or (number(value, int) and value > 0), 'a number of 1 or more, or "auto"')
    clip, steps = ds.get("gradient_clipping", "auto"), ds.get("steps_per_print", 1)
    fits = clip == "auto" or (number(clip, int, float) and 0 <= clip < math.inf)
    check("gradient_clipping", clip, fits, 'a number of 0 or more, or "auto"')
    check("steps_per_print", steps, number(steps, int) and steps > 0, "a number of 1 or more")
    zero = ds.get("zero_optimization", {})
    stage = zero.get("stage", "auto")
    check("zero_optimization.stage", stage, stage == "auto" or (number(stage, int) and 0 <= stage <= 3),
          '0, 1, 2, 3 or "auto"')  # fmt: skip
    for key, words in WORDS.items():
        check(key, ds.get(key), str(ds.get(key, words[0])).lower() in words, f"{', '.join(words[:-1])} or {words[-1]}")
    managed = ds.get("managed_gradient_accumulation", True)
    check("managed_gradient_accumulation", managed, managed is True, "true: each micro-batch would be an update else")
    for part in ("offload_optimizer", "offload_param"):
        check(f"zero_optimization.{part}", zero.get(part), isinstance(zero.get(part) or {}, dict), "a JSON object")
    for key, today in RENAMED.items():
        if key in zero:
            raise UserError(
                f'ds.json: zero_optimization.{key} is {today} today; write "{today}": {{"device": "cpu"}} or nothing'
            )
    norm = zero.get("compute_grad_norm", True)
    check("zero_optimization.compute_grad_norm", norm, norm is True or norm == "auto",
          "true: by its norm a gradient that is not finite is known")  # fmt: skip
    for key, name, right, remedy in (
        ("bf16", "check_grad_overflow", (True,), "true: a gradient that is not finite would make all weights NaN"),
        ("torch_autocast", "dtype", ("bfloat16", "bf16"), '"bfloat16"; float16 is for fp16.json, with its loss scale'),
    ):
        value = ds.get(key, {}).get(name, right[0])
        check(f"{key}.{name}", value, value in right or ds[key].get("enabled") is False, remedy)
    for key, words in (("bf16", ("auto",)), ("fp16", ("auto",)), ("compile", ())):
        value = ds.get(key, {}).get("enabled", False)
        wanted = 'true, false or "auto"' if words else "true or false"
        check(f"{key}.enabled", value, isinstance(value, bool) or value in words, wanted)


def parameter_groups(task: nn.Module, optim: OptimConfig) -> list[dict[str, Any]]:
    """One group for each `scale` of the learning rate, and of each of these one of what does not decay.

    Of `optim.layer_decay` (BEiT): with n blocks, block b has scale decay^(n - b), what embeds has
    decay^(n + 1), and the last LayerNorm, bottlenecks and heads have 1. The classifier's is multiplied by
    `optim.head_lr`. Of `optim.decay=matrices` (MAE, timm's groups): vectors do not decay, nor do `BARE`. See
    `_aligned` for the order in a group.
    """
    found = [(re.match(r"model\.encoder\.blocks\.(\d+)\.", name), name, p) for name, p in task.named_parameters()]
    depth = 1 + max((int(block[1]) for block, _, _ in found if block), default=0)
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for block, name, parameter in found:
        embeds = name.startswith("model.encoder.first_norm.") or (
            name.startswith("model.") and not name.startswith("model.encoder.")
        )
        below = depth - int(block[1]) if block else depth + 1 if embeds else 0
        head = optim.head_lr if name.startswith("classifier.") else 1.0
        decays = optim.decay == "all" or (parameter.ndim > 1 and name.rpartition(".")[2] not in BARE)
        groups.setdefault((head * optim.layer_decay**below, decays), []).append(parameter)
    return [
        {"params": _aligned(groups[key]), "scale": key[0]} | ({} if key[1] else {"weight_decay": 0.0})
        for key in sorted(groups, reverse=True)
    ]


def _aligned(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """Those of an odd size last, in their order otherwise.

    DeepSpeed lays a group's weights one behind the other, and the fast kernels of a matrix product read 16 bytes at
    once, from multiples of 16: 43 filters of 11 samples before the matrices would move all of these off them.
    """
    return sorted(parameters, key=lambda parameter: parameter.numel() % ALIGNED != 0)


def build_engine(task: PretrainTask | FinetuneTask, recipe: Recipe, ds: dict[str, Any]) -> Any:
    """`deepspeed.initialize` with an optimiser of ours.

    A config "Adam" would mean AdamW and compile a fused kernel; SSAST's recipe is Adam with L2.

    Raises:
        UserError: DeepSpeed refuses a value of ds.json.
    """
    load_deepspeed()  # takes seconds and prints: not for --help, evaluate.py or predict.py
    import deepspeed
    from deepspeed.runtime.config import DeepSpeedConfigError

    kind = torch.optim.Adam if recipe.optim.name == "adam" else torch.optim.AdamW
    optimizer = kind(
        parameter_groups(task, recipe.optim),
        lr=recipe.optim.lr,
        betas=recipe.optim.betas,
        weight_decay=recipe.optim.weight_decay,
    )
    compiling = {**ds.get("compile", {})}
    if compiling.pop("enabled", False):
        # Block by block: equal blocks share one graph, and the objectives' collectives stay outside.
        backend = compiling.pop("backend", "inductor")
        if backend not in torch.compiler.list_backends(()):
            known = ", ".join(torch.compiler.list_backends())
            raise UserError(f"ds.json: compile.backend = {json.dumps(backend)}: give one of {known}")
        for block in task.model.encoder.blocks:
            block.compile(backend=backend)
    compiling.pop("backend", None)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    _mark_without_waiting()
    try:
        return deepspeed.initialize(model=task, optimizer=optimizer, config={**ds, "compile": compiling})[0]
    except ValidationError as error:  # of a section that DeepSpeed alone reads
        first = error.errors()[0]
        key = ".".join([error.title, *map(str, first["loc"])])
        value = json.dumps(first["input"], default=str)
        raise UserError(f"ds.json: DeepSpeed refuses {key} = {value}: {first['msg']}") from error
    except (DeepSpeedConfigError, *REFUSALS) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise UserError(f"ds.json: DeepSpeed refuses it: {reason}") from error


def _mark_without_waiting() -> None:
    """DeepSpeed's function for a gradient norm that is not finite, with the same result and no wait for the GPU.

    Its own makes a number on the host, copies it to the GPU and reads it back, in every step.
    """
    from deepspeed.runtime import utils
    from deepspeed.runtime.zero import stage3, stage_1_and_2

    for module in (utils, stage_1_and_2, stage3):
        module.mask_nan_or_inf_with_val_inplace = _mark_not_finite


def _mark_not_finite(norm: torch.Tensor, device: Any = None, val: float = -1.0) -> None:
    """Sets `norm`, a scalar, to `val` where it is not finite."""
    norm.copy_(torch.where(norm.isfinite(), norm, val))


def _agree(ds: dict[str, Any], key: str, wanted: Any, name: str) -> Any:
    """The value of `key`: the recipe's where ds.json says "auto" or nothing."""
    value = ds.get(key, "auto")
    if value == "auto":
        return wanted
    if wanted is not None and float(value) != float(wanted):
        raise UserError(
            f'ds.json: {key} = {value}, but {name} = {wanted}; make them equal, or set it to "auto" in ds.json'
        )
    return value


def _precision(ds: dict[str, Any], stage: int, world: World) -> dict[str, Any]:
    """The precision's part of the configuration."""
    sections = {key: {**ds.get(key, {})} for key in ("bf16", "fp16")}
    able = world.device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) and stage > 0
    auto = {"bf16": able and "bf16" in ds and sections["fp16"].get("enabled") is not True, "fp16": False}
    for key, section in sections.items():
        if section.get("enabled", "auto") == "auto":
            section["enabled"] = auto[key]
    half = [key for key, section in sections.items() if section["enabled"]]
    if len(half) == 2:
        raise UserError("ds.json: bf16.enabled and fp16.enabled are both true; choose one")
    if half == ["fp16"] and world.device.type == "cpu":
        raise UserError("ds.json: fp16.enabled = true needs a GPU; on a CPU use bf16 or neither")
    if half and stage == 0:
        raise UserError(
            f"ds.json: {half[0]}.enabled = true at zero_optimization.stage = 0 would sum gradients in {half[0]}; use "
            "stage 1, which sums them in float32"
        )
    if not half:
        return sections
    types = {"grad_accum_dtype": "fp32", **ds.get("data_types", {})}
    return {**sections, "communication_data_type": ds.get("communication_data_type", "fp32"), "data_types": types}
