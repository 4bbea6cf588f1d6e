"""The shipped recipes are the paper's, number by number, and their schedules do what it says."""

import pytest
import torch

from pipeline.config import FinetuneRecipe, PretrainRecipe
from pipeline.engine.job import Plateau
from pipeline.engine.loop import ema_share
from pipeline.engine.setup import parameter_groups
from pipeline.engine.step import learning_rate
from pipeline.errors import UserError
from pipeline.recipes import load_recipe
from pipeline.tasks import FinetuneTask, PretrainTask
from tests.conftest import ROOT

ORIGINALS = {
    "pswacl180": ("pswacl", 180, 5e-4), "pswacl24": ("pswacl", 24, 1e-4), "ssast24": ("ssast", 24, 1e-4),
    "ssast180": ("ssast", 180, 5e-4), "ssast_original": ("ssast", 24, 1e-4), "swapt180": ("swapt", 180, 5e-4),
    "swacl180": ("swacl", 180, 5e-4), "wapt180": ("wapt", 180, 5e-4), "single_scale": ("pswacl", 180, 5e-4),
}  # fmt: skip


def finetune(name: str, *words: str) -> FinetuneRecipe:
    return load_recipe(FinetuneRecipe, [ROOT / "configs" / "finetune" / f"{name}.yaml"], list(words))


@pytest.mark.parametrize("name", ORIGINALS)
def test_pretraining_is_the_papers(name):
    recipe = load_recipe(PretrainRecipe, [ROOT / "configs" / "pretrain" / f"{name}.yaml"])
    assert (recipe.pretrain.method, recipe.train.batch_size, recipe.optim.lr) == ORIGINALS[name]
    assert (recipe.optim.name, recipe.optim.betas, recipe.optim.weight_decay) == ("adam", (0.95, 0.999), 5e-7)
    assert (recipe.optim.schedule, recipe.optim.patience, recipe.optim.warmup) == ("plateau", 2, 1000)
    assert (recipe.eval.every_clips, recipe.train.epochs, recipe.optim.clip) == (96000, 10, 0)
    assert (recipe.data.mean, recipe.data.std) == (-4.2677393, 4.5689974)
    assert (recipe.pretrain.mask_patches, recipe.pretrain.r_g, recipe.pretrain.r_cl) == (400, 10, 0.01)


@pytest.mark.parametrize(
    ("name", "batch", "epochs", "rates"),
    [
        ("audioset_balanced", 12, 25, {0: 5e-5, 9.9: 5e-5, 10: 2.5e-5, 15: 1.25e-5, 20: 6.25e-6}),
        ("audioset_full", 12, 5, {1.5: 1e-5, 2: 5e-6, 3: 2.5e-6, 4: 1.25e-6}),
        ("esc50", 48, 50, {0: 1e-4, 5.9: 1e-4, 6: 8.5e-5, 7: 7.225e-5, 49: 1e-4 * 0.85**44}),
    ],
)
def test_finetuning_is_the_papers(name, batch, epochs, rates):
    recipe = finetune(name)
    assert (recipe.train.batch_size, recipe.train.epochs, recipe.finetune.method) == (batch, epochs, "swab")
    for epoch, rate in rates.items():
        assert learning_rate(recipe.optim, 10**6, 10**7, epoch, Plateau()) == pytest.approx(rate)


def test_the_rate_of_craft_mae_is_audio_maes():
    """Its `submit_pretrain_audioset2M.sh` has --blr 2e-4; `main_pretrain.py` multiplies it by batch / 256."""
    recipe = load_recipe(PretrainRecipe, [ROOT / "configs" / "pretrain" / "craft_mae.yaml"])
    assert recipe.optim.lr == 2e-4 * recipe.train.batch_size / 256
    assert (recipe.optim.name, recipe.optim.betas, recipe.optim.weight_decay) == ("adamw", (0.9, 0.95), 1e-4)


def test_augmentation_averaging_and_sampling_are_the_papers():
    balanced, full, esc50 = (finetune(name) for name in ("audioset_balanced", "audioset_full", "esc50"))
    for recipe in (balanced, full):
        assert (recipe.augment.mixup, recipe.augment.mixup_alpha) == (0.5, 10)
        assert (recipe.augment.freq_mask, recipe.augment.time_mask) == (48, 192)
    assert (balanced.checkpoint.average, full.checkpoint.average, esc50.checkpoint.average) == ((6, 25), (1, 5), (0, 0))
    assert (balanced.data.sampler, full.data.sampler, esc50.data.sampler) == ("shuffle", "balanced", "shuffle")
    assert (esc50.augment.mixup, esc50.augment.freq_mask, esc50.augment.time_mask) == (0, 24, 96)
    assert (esc50.augment.noise, esc50.augment.noise_snr, esc50.augment.roll) == (0.1, None, 0.1)


def test_layer_decay_gives_every_weight_one_rate():
    recipe = finetune("modern", "model.size=micro")
    task = FinetuneTask(recipe, 128, 64, 5, False)
    groups = parameter_groups(task, recipe.optim)
    scale = {id(p): group["scale"] for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(scale) == len(list(task.parameters()))
    found = {name: scale[id(p)] for name, p in task.named_parameters()}
    assert found["classifier.linear.weight"] == found["model.encoder.bottlenecks.tokens"] == 1
    assert found["model.encoder.blocks.3.attn.qkv.weight"] == pytest.approx(0.75)
    assert found["model.encoder.blocks.0.attn.qkv.weight"] == pytest.approx(0.75**4)
    assert found["model.spec_patch.proj.weight"] == found["model.spec_tokens.positions"] == pytest.approx(0.75**5)


@pytest.mark.parametrize("name", ["craft_mae", "craft_latent", "craft_mosaic", "audio_mosaic", "modern"])
def test_what_is_no_matrix_does_not_decay_in_recipes_of_today(name):
    words = ["model.size=micro", "model.frontend=sinc", "model.modality_embedding=true"]
    recipe = load_recipe(PretrainRecipe, [ROOT / "configs" / "pretrain" / f"{name}.yaml"], words)
    task = PretrainTask(recipe, 128, 64)
    groups = parameter_groups(task, recipe.optim)
    free = {id(p) for group in groups if group.get("weight_decay") == 0 for p in group["params"]}
    assert len(free) < sum(len(group["params"]) for group in groups) == len(list(task.parameters()))
    kinds = {}
    for key, parameter in task.named_parameters():
        kinds.setdefault(id(parameter) in free, set()).add(key.rpartition(".")[2])
    assert kinds[False] == {"weight"}
    assert {"bias", "positions", "tokens", "modality"} <= kinds[True]
    assert id(task.model.spec_patch.proj.weight) not in free
    assert id(task.model.encoder.norm.weight) in free
    everything = parameter_groups(task, recipe.optim.model_copy(update={"decay": "all"}))
    assert [list(group) for group in everything] == [["params", "scale"]]


def test_ema_is_an_exponential_mean_of_sampled_weights():
    """Its decay rises with the updates: a short run's average is not that of its first weights."""

    def averaged(weights: dict[int, float], config, total: int) -> tuple[list[int], float]:
        """The steps that are sampled, and the mean."""
        shares = {step: share for step in weights if (share := ema_share(config, step, total))}
        mean = weights[min(shares)]
        for step, share in shares.items():
            mean += share * (weights[step] - mean)
        return list(shares), mean

    config = finetune("modern", "checkpoint.ema=0.9", "checkpoint.ema_every=2").checkpoint
    sampled, mean = averaged({1: 0.0, 2: 1.0, 3: 0.0, 4: 3.0, 5: 7.0}, config, 5)
    assert sampled == [2, 4, 5]
    second, third = min(0.9**2, 2 / 11), min(0.9, 3 / 12)
    assert mean == pytest.approx((1 * second + 3 * (1 - second)) * third + 7 * (1 - third))

    config = config.model_copy(update={"ema": 0.9998, "ema_every": 32})
    _, mean = averaged({step: float(step) for step in range(1, 1651)}, config, 1650)  # as long as ESC-50's finetuning
    assert mean > 1200  # without the rise 72 % of it are the weights of step 32


def test_two_ways_of_averaging_are_refused():
    with pytest.raises(UserError, match="two ways"):
        finetune("audioset_balanced", "checkpoint.ema=0.9")


def test_the_classifier_has_a_rate_of_its_own():
    recipe = finetune("esc50", "model.size=micro", "optim.head_lr=10")
    task = FinetuneTask(recipe, 128, 64, 5, False)
    groups = parameter_groups(task, recipe.optim)
    assert [group["scale"] for group in groups] == [10, 1]
    assert all("weight_decay" not in group for group in groups)
    assert {id(p) for p in groups[0]["params"]} == {id(p) for p in task.classifier.parameters()}


def test_one_group_without_layer_decay():
    groups = parameter_groups(torch.nn.Linear(2, 2), finetune("esc50").optim)
    assert len(groups) == 1
    assert len(groups[0]["params"]) == 2
