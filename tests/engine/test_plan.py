"""The plan against what a step really takes, and its arithmetic."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from launchers import plan as launcher
from pipeline.config import FinetuneRecipe, PretrainRecipe
from pipeline.data.loader import Loader
from pipeline.engine import plan
from pipeline.errors import UserError
from pipeline.methods import FINETUNE, PRETRAIN
from pipeline.recipes import load_recipe
from pipeline.tasks import PretrainTask
from tests.engine.memory import SHAPE
from tests.ranks import ROOT, run_ranks, run_script, start_ranks

# Small blocks through mmap as well, so that freed memory leaves the process at once.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
TOKENS = 2 + SHAPE.frames * SHAPE.mel_bins // 256  # of one representation


@pytest.mark.slow
@pytest.mark.parametrize(("size", "clips", "stage"), [("micro", 24, 0), ("tiny", 8, 2)])
def test_planned_memory_is_what_a_step_takes(tmp_path, size, clips, stage):
    out = tmp_path / "memory.json"
    (rank,) = start_ranks(1, Path(__file__).with_name("memory.py"), size, clips, stage, out, **MALLOC)
    status, said = rank.end()
    assert status == 0, said
    report = json.loads(out.read_text())
    assert report["measured"] == pytest.approx(report["planned"], rel=0.15), report


@pytest.mark.slow
def test_memory_is_flat_in_a_global_batch_of_thousands(tmp_path):
    """GradCache: eight times the batch adds its vectors and logits; without it, every clip adds its activations."""
    out = tmp_path / "memory.json"
    sizes = ("64:64", "256:64", "2048:64", "512:512")
    (rank,) = start_ranks(1, Path(__file__).with_name("batches.py"), out, *sizes, **MALLOC)
    status, said = rank.end()
    assert status == 0, said
    found = json.loads(out.read_text())
    a_clip = (found["512:512"] - found["64:64"]) / (512 - 64)
    assert found["2048:64"] - found["256:64"] < 0.01 * a_clip * (2048 - 256), found


def test_flops_are_those_of_visible_patches():
    """104 tokens of each representation and a decoder of 512; the mosaic's 202 and 258 tokens; four views of 104 each,
    and a teacher.
    """
    shape = plan.Shape()
    flops = {name: plan.model_flops(load_recipe(PretrainRecipe, [ROOT / f"configs/pretrain/{name}.yaml"], []), shape)
             for name in ("pswacl180", "craft_mae", "craft_mosaic", "audio_mosaic", "craft_latent")}  # fmt: skip

    def blocks(tokens: int, width: int, depth: int) -> float:
        return 6 * depth * 12 * width**2 * tokens + 12 * depth * tokens**2 * width

    decoder = 2 * (blocks(512, 512, 4) + 6 * (104 * 768 * 512 + 410 * 512 * 256))
    assert flops["craft_mae"] == pytest.approx(2 * blocks(104, 768, 12) + decoder, rel=0.05)
    decoder = blocks(512, 256, 2) + 6 * (104 * 768 * 256 + 410 * 256 * 768)
    teacher = 2 * blocks(514, 768, 12) / 3  # forward alone
    assert flops["craft_latent"] == pytest.approx(8 * (blocks(104, 768, 12) + decoder) + teacher, rel=0.05)
    assert flops["craft_latent"] < 1.2 * flops["pswacl180"]
    assert flops["craft_mosaic"] == pytest.approx(blocks(202, 768, 12) + blocks(258, 768, 12), rel=0.05)
    assert flops["audio_mosaic"] == pytest.approx(flops["craft_mosaic"], rel=0.05)
    assert flops["craft_mae"] < 0.35 * flops["pswacl180"]
    assert flops["craft_mosaic"] < 0.5 * flops["pswacl180"]


def test_flops_are_those_of_the_transformer():
    """6 FLOPs a weight and token, plus attention; the MSAE and heads are small."""
    recipe = load_recipe(PretrainRecipe, [], ["model.size=base"])
    cost = plan.record(recipe, SHAPE, "bf16")
    tokens, blocks = 2 * TOKENS, 12 * 12 * 768**2
    attention = 12 * 12 * TOKENS * 768 * tokens
    assert cost.flops == pytest.approx(6 * blocks * tokens + attention, rel=0.06)
    assert cost.parameters == pytest.approx(87.8e6, rel=0.01)
    halved = plan.record(load_recipe(PretrainRecipe, [], ["pretrain.method=ssast"]), SHAPE, "bf16")
    assert halved.flops == pytest.approx(cost.flops / 2, rel=0.05)
    assert halved.per_clip == pytest.approx(cost.per_clip / 2, rel=0.2)


def test_large_is_vit_large():
    """24 blocks of 1024: three and a half times base, in weights and in FLOPs."""
    recipe = load_recipe(PretrainRecipe, [], ["model.size=large", "pretrain.method=ssast"])
    with torch.device("meta"):
        task = PretrainTask(recipe, SHAPE.mel_bins, SHAPE.frames)
    blocks = 24 * 12 * 1024**2
    assert sum(p.numel() for p in task.parameters()) == pytest.approx(blocks + 24 * 13 * 1024 + TOKENS * 1024, rel=0.01)
    assert plan.model_flops(recipe, SHAPE) == pytest.approx(6 * blocks * TOKENS + 24 * 12 * TOKENS**2 * 1024, rel=0.02)
    assert task.model.encoder.blocks[0].attn.heads == 16


def test_recomputing_activations_is_seen():
    words = ["model.size=tiny"]
    plain = plan.record(load_recipe(FinetuneRecipe, [], words), SHAPE, "bf16")
    words += ["model.checkpoint_activations=true"]
    less = plan.record(load_recipe(FinetuneRecipe, [], words), SHAPE, "bf16")
    assert less.per_clip < 0.7 * plain.per_clip  # what is left is the MSAE's own backward
    assert less.flops > 1.2 * plain.flops


def test_zero_divides_what_it_says():
    cost = plan.Cost(1000, 10, 1.0, 7.0, 0.0, "bf16")
    whole, states, gradients, all_of_it = (plan.memory(cost, stage, 4, 2) for stage in range(4))
    assert (whole.optimizer, states.optimizer, all_of_it.optimizer) == (12000, 3000, 3000)
    assert (states.gradients, gradients.gradients) == (4000, 1000)
    assert (gradients.weights, all_of_it.weights) == (2000, 500)
    assert whole.activations == 14
    assert plan.traffic(cost, 0, 4, 8, contrast=True) == {"gradients": 6000, "contrast": 0.75 * 8 * 21 * 4}


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "stages", "precision", "words"), [
    (2, "0,1,2", "fp32", ["model.size=micro"]),
    (3, "1,2", "bf16", ["model.size=micro", "pretrain.method=ssast"]),
    (2, "1", "fp16", ["model.size=micro", "pretrain.method=ssast"]),
    (2, "3", "fp32", ["model.size=tiny", "pretrain.method=ssast"]),
])  # fmt: skip
def test_bytes_and_kernels_are_those_of_a_step(tmp_path, ranks, stages, precision, words):
    """Counted on CPU ranks, with and without accumulation, whose contrast takes another forward pass."""
    out, accumulations = tmp_path / "counts.json", "1,2" if ranks == 3 else "1,3"
    run_ranks(ranks, Path(__file__).with_name("counts.py"), out, stages, accumulations, precision, *words)
    cells = json.loads(out.read_text())
    assert len(cells) == 2 * len(stages.split(","))
    for found in cells:
        assert found["sent"] == pytest.approx(found["planned"], rel=1e-4), found
        # Adam in float32 at ZeRO 0 is a loop over tensors on a CPU, and one call of a kernel for many on a GPU.
        assert found["stage"] == 0 or found["kernels"] == pytest.approx(found["planned_kernels"], rel=0.2), found


def test_the_time_of_a_step_is_what_is_not_hidden():
    cost = plan.Cost(1_000_000, 10, 1e9, 7.0, 0.0, "bf16", tensors=10, kernels=970.0, pooled_flops=3e8)
    compute = plan.step_time(cost, 1, 1, 100, 0, 1, rate=1e12, link=1e9)
    assert (compute.compute, compute.exposed) == (0.1, 0)
    assert compute.floor == pytest.approx(3.4e-5 * 1000)
    assert compute.total == 0.1
    assert plan.step_time(cost, 1, 1, 100, 1, 4, rate=1e12, link=1e9).compute == pytest.approx(0.13)  # GradCache
    small = plan.step_time(cost, 1, 100, 100, 0, 1, rate=1e12, link=1e9)
    assert small.total == pytest.approx(small.floor + small.exposed)
    # One bucket holds all gradients: nothing of their reduction is left to hide.
    assert small.exposed == pytest.approx(0.99 * (2 * 4e6 + 2e6) / 1e9)
    again = plan.traffic(cost, 2, 100, 100, 0, accumulation=3)["gradients"]
    assert again == pytest.approx(3 * plan.traffic(cost, 1, 100, 100, 0, accumulation=3)["gradients"])
    hidden = plan.step_time(cost, 2, 2, 600, 0, 3, rate=1e12, link=1e9)
    assert hidden.exposed == pytest.approx(0.5 * (2 * 4e6 + 2e6) / 1e9)


def test_memory_beside_the_model():
    """A context, nccl's buffers, and the float32 copy of a bucket that is reduced."""
    cost = plan.Cost(1000, 10, 1.0, 7.0, 0.0, "bf16")
    assert [plan.memory(cost, 2, ranks, 1).context for ranks in (1, 2)] == [0.6e9, 1.6e9]
    buckets = {stage: plan.memory(cost, stage, 2, 1).buckets for stage in (0, 1, 2)}
    assert buckets == {0: 0, 1: 0, 2: 4 * plan.BUCKET + 4000}
    assert plan.memory(replace(cost, precision="fp32"), 1, 2, 1).buckets == 8 * plan.BUCKET
    assert plan.memory(replace(cost, precision="fp16"), 1, 2, 1).buckets == 4 * plan.BUCKET + 4000


def test_a_teacher_is_planned():
    """Whole on each GPU, beside weights that ZeRO 3 divides."""
    words = ["model.size=micro", "pretrain.method=craft_latent"]
    recipe = load_recipe(PretrainRecipe, [], words)
    cost, task = plan.record(recipe, SHAPE, "bf16"), PretrainTask(recipe, SHAPE.mel_bins, SHAPE.frames)
    network = sum(weight.numel() for weight in task.model.parameters())
    assert (cost.teacher, cost.parameters) == (network, sum(weight.numel() for weight in task.parameters()))
    whole, divided = (plan.memory(cost, stage, 4, 0).weights for stage in (1, 3))
    assert (whole, divided) == (2 * cost.parameters + 6 * network, 2 * cost.parameters / 4 + 6 * network)
    assert plan.traffic(cost, 3, 4, 8, contrast=0)["weights for the teacher"] == 0.75 * 2 * network
    assert plan.model_flops(recipe, SHAPE) == pytest.approx(cost.flops, rel=0.06)


def test_the_report_names_batches_that_divide():
    command = ["launchers/plan.py", "--gpus", "8", "--gpu-memory", "1", "model.size=small", "pretrain.method=ssast"]
    done = run_script(*command)
    assert done.returncode == 0, done.stderr
    assert "use a batch of 176 or 184" in done.stdout
    assert "180 itself runs on 6 or 9 GPUs" in done.stdout
    assert "*" in done.stdout.split("rate")[0].split("fit")[1]  # 1 GB is too little for 22 clips
    for word in ("compute", "link", "ZeRO 2", "traffic", "time", "gain", "shards"):
        assert f"\n{word} " in done.stdout
    ((status, said),) = run_ranks(1, *command, "--nodes", "3", check=False)
    assert status == 2
    assert "Traceback" not in said


@pytest.mark.parametrize(("gpus", "words", "share"), [
    (1, ["train.micro_batch=7"], "1 ranks is 180"),
    (8, ["train.batch_size=176", "train.micro_batch=5"], "8 ranks is 22"),
])  # fmt: skip
def test_micro_batches_that_do_not_divide_are_refused(gpus, words, share):
    with pytest.raises(UserError, match=f"on {share} clips a rank, which is not micro-batch"):
        launcher._batch(load_recipe(PretrainRecipe, [], words), gpus)


def test_a_micro_batch_that_is_given_is_planned(capsys):
    """In bytes of 1000^3, as --gpu-memory and the trainer's messages have them."""
    cost = plan.Cost(1000, 10, 1.0, 1e9, 0.0, "bf16")
    assert [launcher._accumulation(cost, 1, 2, 180, 11.0, wanted) for wanted in (0, 5, 7)] == [15, 18, 15]
    launcher._print_memory(cost, 2, 180, 80.0, 5)
    *_, title, first, _, _ = capsys.readouterr().out.splitlines()
    assert [word for word in title.split() if word.isdecimal()] == ["90", "45", "30", "18", "15", "5", "1"]
    assert first.split()[:3] == ["1", "1.60", "91.60*"]


@pytest.mark.parametrize(("kind", "words", "kilobytes"), [
    (FinetuneRecipe, [], 1.5 * 320),  # every other clip is mixed with another one
    (FinetuneRecipe, ["finetune.method=ast"], 1.5 * 320),  # whose fbank is computed
    (FinetuneRecipe, ["finetune.method=ast", "augment.mixup=0"], 255),
    (PretrainRecipe, ["pretrain.method=ssast", "data.fbank=online"], 320),
    (PretrainRecipe, [], 575),
])  # fmt: skip
def test_a_clip_costs_the_shards_what_the_loader_reads(kind, words, kilobytes):
    recipe = load_recipe(kind, [], words)
    method = FINETUNE[recipe.finetune.method] if kind is FinetuneRecipe else PRETRAIN[recipe.pretrain.method]
    assert launcher._read(recipe, method, plan.Shape()) / 1e3 == pytest.approx(kilobytes, abs=1)


def test_an_epoch_is_as_long_as_the_recipe_says(shards):
    for kind, words in ((PretrainRecipe, []), (FinetuneRecipe, []), (PretrainRecipe, [f"data.shards={shards}"])):
        whole = launcher._data(load_recipe(kind, [], words))[1]
        drawn = launcher._data(load_recipe(kind, [], [*words, "data.sampler=balanced", "data.epoch_clips=50"]))[1]
        assert whole > 50 == drawn
    folded = load_recipe(FinetuneRecipe, [], [f"data.shards={shards}", "data.fold=1"])
    with Loader(folded.data, batch_size=8) as loader:
        assert launcher._data(folded)[1] == loader.clips
    full = load_recipe(FinetuneRecipe, [ROOT / "configs/finetune/audioset_full.yaml"])
    assert launcher._data(full)[1] == 2_000_000  # without shards: AudioSet's unbalanced set, not its balanced one
    assert launcher._data(load_recipe(FinetuneRecipe, [ROOT / "configs/finetune/audioset_balanced.yaml"]))[1] == 20_000


def test_flops_for_the_mfu_count_nothing_twice():
    words = ["model.size=tiny", "pretrain.clean_spectrogram=true"]
    recipe = load_recipe(PretrainRecipe, [], words)
    plain = plan.model_flops(recipe, SHAPE)
    again = load_recipe(PretrainRecipe, [], [*words, "model.checkpoint_activations=true"])
    assert plan.model_flops(again, SHAPE) == plain
    assert plain == pytest.approx(plan.record(recipe, SHAPE, "fp32").flops, rel=0.06)
    finetuned = load_recipe(FinetuneRecipe, [], ["model.size=base", "model.stride=16", "finetune.method=ast"])
    expected = 6 * 12 * 12 * 768**2 * TOKENS + 12 * 12 * TOKENS**2 * 768
    assert plan.model_flops(finetuned, SHAPE) == pytest.approx(expected, rel=0.02)
