"""Rank program: the gradients of one step on a fixed global batch, in every cell of the invariance matrix.

    gradients.py REFERENCE_DIR OUT.json

One process group serves its cells of the matrix (method x ZeRO stage x accumulation). A single rank writes the
reference, one micro-batch at ZeRO 0, per method; every cell is compared with it, parameter by parameter.
"""

import gc
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from pipeline import distributed
from pipeline.config import FinetuneRecipe, PretrainRecipe, Recipe
from pipeline.distributed import World
from pipeline.engine.setup import build_engine, reconcile
from pipeline.engine.step import accumulate
from pipeline.flow import Batch
from pipeline.model import craft
from pipeline.objectives.classification import positive_weights
from pipeline.recipes import load_recipe
from pipeline.tasks import FinetuneTask, PretrainTask

CLIPS, MELS, FRAMES, CLASSES = 24, 32, 64, 5
STAGES, ACCUMULATIONS = (0, 1, 2, 3), (1, 2, 3)
EVERY_OPTION = "pretrain.symmetric=true pretrain.projection=mlp pretrain.clean_spectrogram=true"
MOSAIC = (
    "pretrain.drop=[time,frequency] pretrain.drop_ratio=[0.6,0.4] pretrain.temperature=0.1 pretrain.projection=mlp "
    "pretrain.negatives=both"
)
METHODS = {
    **{name: f"pretrain.method={name} pretrain.r_cl=1.0" for name in ("ssast", "wapt", "swapt", "swacl", "pswacl")},
    "craft_mae": "pretrain.method=craft_mae pretrain.r_cl=1.0 pretrain.decoder=separate pretrain.drop_ratio=[0.6,0.5]",
    "craft_latent": "pretrain.method=craft_latent pretrain.views=3 pretrain.drop_ratio=[0.6,0.5] pretrain.r_u=0.5 "
    "pretrain.target_blocks=1",
    "craft_mosaic": f"pretrain.method=craft_mosaic {MOSAIC}",
    "audio_mosaic": f"pretrain.method=audio_mosaic {MOSAIC}",
    "pswacl+": f"pretrain.method=pswacl pretrain.r_cl=1.0 {EVERY_OPTION}",
    "pswacl-strided": "pretrain.method=pswacl pretrain.r_cl=1.0 model.frontend=strided model.wav_depth=1 "
    "model.positions=rotary",
    "swapt-sinc": "pretrain.method=swapt model.frontend=sinc model.drop_path=0.5",
    **{name: f"finetune.method={name}" for name in ("ast", "wast", "swast")},
    "swab": "finetune.method=swab finetune.fusion_layer=1 finetune.bottlenecks=4",
    "swab-strided": "finetune.method=swab finetune.fusion_layer=0 finetune.bottlenecks=4 model.frontend=strided "
    "model.wav_depth=1",
    "swab+": "finetune.method=swab finetune.fusion_layer=1 finetune.bottlenecks=4 model.drop_path=0.5 "
    "finetune.mask_time=0.4 finetune.mask_freq=0.4 finetune.label_smoothing=0.1 finetune.gamma_pos=1 "
    "finetune.gamma_neg=2 finetune.margin=0.05 finetune.pos_weight=0.5",
}
# Depth and width multiply the matrix's cost, and tell nothing that two blocks do not.
SMALL = craft.Size(width=32, depth=2, heads=2)
COMMON = f"model.size=micro train.batch_size={CLIPS} model.channels=[11,11,10] model.kernel_strides=[5,5,10]"


def cells(ranks: int) -> Iterator[tuple[str, int, int]]:
    """(method, ZeRO stage, accumulation): with the ranks a third of all, any three of the four in every combination."""
    for number, method in enumerate(METHODS):
        for stage in STAGES:
            yield method, stage, ACCUMULATIONS[(number + ranks.bit_length() + stage) % len(ACCUMULATIONS)]


def share_of(world: World) -> Batch:
    """This rank's clips of the global batch."""
    generator = torch.Generator().manual_seed(7)
    # Pulses, for two gradients that are sums of terms that cancel, whose float32 rounding is near 1e-5: with noise a
    # narrow kernel's, of 120,000 terms; with lone tones that of sinc's bands, most of which hear only leakage.
    time = torch.arange(FRAMES * 160 - 300) / 16000
    pitch = 100 + 900 * torch.rand(CLIPS, 1, generator=generator)
    decay = torch.exp(-3 * torch.rand(CLIPS, 1, generator=generator) * time)
    waveform = 0.3 * decay * (torch.remainder(pitch * time, 1) < pitch / 16000)
    fbank = torch.randn(CLIPS, FRAMES, MELS, generator=generator)
    targets = (torch.rand(CLIPS, CLASSES, generator=generator) < 0.3).float()
    own = torch.arange(world.rank, CLIPS, world.size)
    return Batch(own, own, torch.ones(len(own), dtype=torch.bool), waveform[own], fbank[own], targets[own])


def task_of(recipe: Recipe) -> PretrainTask | FinetuneTask:
    """The same weights each time, of a model smaller than micro. For rank programs: the size stays changed."""
    craft.SIZES["micro"] = SMALL
    torch.manual_seed(0)
    if isinstance(recipe, FinetuneRecipe):
        weights = positive_weights(np.arange(1, CLASSES + 1), CLIPS, recipe.finetune.pos_weight)
        return FinetuneTask(recipe, MELS, FRAMES, CLASSES, False, weights if recipe.finetune.pos_weight else None)
    assert isinstance(recipe, PretrainRecipe)
    return PretrainTask(recipe, MELS, FRAMES)


def gradients(method: str, stage: int, accumulation: int, world: World) -> dict[str, torch.Tensor]:
    """Losses and gradients of one step, the same on all ranks."""
    from deepspeed.utils import safe_get_full_grad  # slow to import, and tests import this module for its lists

    words = f"{METHODS[method]} {COMMON} train.micro_batch={CLIPS // world.size // accumulation}".split()
    recipe = load_recipe(FinetuneRecipe if "finetune." in METHODS[method] else PretrainRecipe, [], words)
    ds, batches = reconcile({"zero_optimization": {"stage": stage}}, recipe, world)
    assert batches.accumulation == accumulation
    task = task_of(recipe)
    engine = build_engine(task, recipe, ds)
    values = distributed.mean(accumulate(engine, task, share_of(world), batches), world.device)
    # What is explained is 1 - mse, which is there itself: near 0 it has the rounding of a far larger number.
    result = {f"loss/{name}": torch.tensor(value, dtype=torch.float64) for name, value in values.items()
              if not name.endswith("_explained")}  # fmt: skip
    for name, parameter in engine.module.named_parameters():
        gradient = parameter.grad if stage == 0 else safe_get_full_grad(parameter)
        result[f"grad/{name}"] = gradient.detach().float().clone().contiguous()
    engine.destroy()
    return result


def compare(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict[str, object]:
    """The largest relative difference of a loss and of a parameter's gradient, and where it is."""
    assert found.keys() == expected.keys()
    worst = {"loss": (0.0, ""), "grad": (0.0, "")}
    for name, value in expected.items():
        kind = name.partition("/")[0]
        zero = value.norm() == 0 and found[name].norm() == 0  # an accuracy of nothing right
        error = 0.0 if zero else float((found[name] - value).norm() / value.norm())
        worst[kind] = max(worst[kind], (error, name))
    silent = [name for name, value in expected.items() if name.startswith("grad/") and value.norm() == 0]
    return {**worst, "parameters": sum(name.startswith("grad/") for name in expected), "without_gradient": silent}


def main() -> None:
    reference, out = Path(sys.argv[1]), Path(sys.argv[2])
    report = {}
    gc.freeze()  # ZeRO-3 collects garbage for each engine; modules are none
    with distributed.session(300, seed=0) as world:
        if world.size == 1:
            for method in METHODS:
                save_file(gradients(method, 0, 1, world), reference / f"{method}.safetensors")
        for method, stage, accumulation in cells(world.size):
            found = gradients(method, stage, accumulation, world)
            expected = load_file(reference / f"{method}.safetensors")
            report[f"{method} zero{stage} x{accumulation}"] = compare(found, expected)
        if world.is_main:
            out.write_text(json.dumps(report, indent=1))
        distributed.barrier()


if __name__ == "__main__":
    main()
    # After a hundred engines a thread of torch's may still run while Python takes the process apart, which
    # aborts it now and then. What counts is written.
    sys.stdout.flush()
    os._exit(0)
