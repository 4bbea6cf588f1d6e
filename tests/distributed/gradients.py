"""Rank program: gradients and losses of one pretraining step on a fixed global batch, into a file.

deepspeed --num_gpus R gradients.py OUT STAGE MICRO [key=value ...]
"""

import sys

import torch
from deepspeed.utils import safe_get_full_grad
from safetensors.torch import save_file

from pipeline import distributed
from pipeline.config import PretrainRecipe, load_recipe
from pipeline.engine.loop import accumulate
from pipeline.engine.setup import build_engine, reconcile
from pipeline.flow import Batch
from pipeline.tasks import PretrainTask

CLIPS, MELS, FRAMES = 12, 32, 64


def global_batch() -> Batch:
    generator = torch.Generator().manual_seed(7)
    # Tones, not noise: with noise a narrow kernel's gradient is a sum of 120,000 terms that cancel to a
    # thousandth of their size, and its float32 rounding alone is 1e-5.
    time = torch.arange(FRAMES * 160 - 300) / 16000
    pitch = 100 + 900 * torch.rand(CLIPS, 1, generator=generator)
    decay = torch.exp(-3 * torch.rand(CLIPS, 1, generator=generator) * time)
    waveform = 0.3 * decay * torch.sin(2 * torch.pi * pitch * time)
    fbank = torch.randn(CLIPS, FRAMES, MELS, generator=generator)
    position = torch.arange(CLIPS)
    return Batch(position, position, torch.ones(CLIPS, dtype=torch.bool), waveform, fbank, torch.zeros(CLIPS, 1))


def main() -> None:
    out, stage, micro, *words = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]
    words += ["model.size=micro", f"train.batch_size={CLIPS}", f"train.micro_batch={micro}"]
    words += ["model.channels=[11,11,10]", "model.kernel_strides=[5,5,10]", "pretrain.r_cl=1.0"]
    recipe = load_recipe(PretrainRecipe, [], words)
    with distributed.session(120, seed=0) as world:
        ds, batches = reconcile({"zero_optimization": {"stage": int(stage)}}, recipe, world)
        task = PretrainTask(recipe, MELS, FRAMES)
        engine = build_engine(task, recipe, ds)
        whole = global_batch()
        index = torch.arange(world.rank, CLIPS, world.size)
        share = Batch(
            *(None if field is None else field[index] for field in (
                whole.position, whole.row, whole.valid, whole.waveform, whole.fbank, whole.targets))
        )
        named = accumulate(engine, task, share, batches)
        values = distributed.mean(named, world.device)
        result = {f"loss/{name}": torch.tensor(value, dtype=torch.float64) for name, value in values.items()}
        for name, parameter in engine.module.named_parameters():
            gradient = parameter.grad if int(stage) == 0 else safe_get_full_grad(parameter)
            result[f"grad/{name}"] = gradient.detach().float().clone().contiguous()
        if world.is_main:
            save_file(result, out)
        distributed.barrier()


if __name__ == "__main__":
    main()
