"""Shapes, sizes and identities of the network."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config import FinetuneRecipe, ModelConfig, PretrainRecipe
from pipeline.errors import UserError
from pipeline.flow import Batch
from pipeline.methods import FINETUNE, PRETRAIN
from pipeline.model.craft import Craft, Streams
from pipeline.model.embed import MultiScaleEmbedding, patch_grid, patchify, resize_positions
from pipeline.model.encoder import Encoder
from pipeline.recipes import load_recipe
from pipeline.tasks import FinetuneTask, PretrainTask
from tests.reference import swab
from tests.reference.msae import embed
from tests.reference.visible import encode

MICRO = ["model.size=micro"]


def batch(clips: int = 3, frames: int = 64, mel_bins: int = 128, classes: int = 5) -> Batch:
    generator = torch.Generator().manual_seed(5)
    position = torch.arange(clips)
    return Batch(
        position,
        position,
        torch.ones(clips, dtype=torch.bool),
        0.1 * torch.randn(clips, frames * 160 - 77, generator=generator),
        torch.randn(clips, frames, mel_bins, generator=generator),
        torch.eye(classes)[position % classes],
    )


def test_grids_of_the_paper():
    assert patch_grid(128, 1024, 16, 16) == (8, 64)
    assert patch_grid(128, 1024, 16, 10) == (12, 101)
    assert patch_grid(128, 512, 16, 10) == (12, 50)


@pytest.mark.parametrize("seconds", [10.24, 5.12])
@pytest.mark.parametrize("scales", [((11, 51, 101), (1, 5, 10)), ((10, 50, 400), (1, 5, 160))])
def test_waveform_map_has_the_spectrograms_frames(seconds, scales):
    samples = round(seconds * 16000)
    msae = MultiScaleEmbedding(*scales, (43, 43, 42), "group", "relu")
    with torch.no_grad():
        assert msae(torch.randn(1, samples)).shape == (1, 128, samples // 160)


def test_a_nonlinearity_keeps_tones_alive():
    """Read literally, Eq. 1 averages every tone away; with ReLU a tone's level survives the pool."""
    tone = torch.sin(2 * torch.pi * 1000 * torch.arange(16000) / 16000)[None]
    levels = {}
    for activation in ("none", "relu"):
        torch.manual_seed(0)
        msae = MultiScaleEmbedding((11,), (1,), (16,), "none", activation)
        with torch.no_grad():
            loud, silent = msae(tone), msae(torch.zeros_like(tone))
        levels[activation] = (loud - silent)[..., 2:-2].abs().mean()
    assert levels["relu"] > 50 * levels["none"]


def test_base_has_the_size_of_ssast():
    """86.8 M without SSAST's two dead ImageNet heads and its prediction heads."""
    model = Craft(ModelConfig(), Streams(spec=True, wav=False))
    parameters = sum(p.numel() for p in model.parameters())
    blocks = 12 * (12 * 768**2 + 13 * 768)
    assert parameters == blocks + 2 * 768 + (257 * 768) + 512 * 768 + 4 * 768


def test_patchify_matches_the_patch_embeddings_order():
    """A convolution that picks one pixel returns that pixel of each unfolded patch."""
    maps = torch.randn(2, 32, 48)
    weight = torch.zeros(1, 1, 16, 16)
    weight[0, 0, 3, 7] = 1.0
    picked = torch.nn.functional.conv2d(maps[:, None], weight, stride=16).flatten(1)
    assert torch.equal(picked, patchify(maps, 16)[:, :, 3 * 16 + 7])


@pytest.mark.parametrize("method", PRETRAIN)
def test_every_pretraining_method_steps_and_uses_all_its_weights(method):
    recipe = load_recipe(PretrainRecipe, [], [*MICRO, f"pretrain.method={method}"])
    task = PretrainTask(recipe, 128, 64)
    losses = task(batch())
    losses.total.backward()
    assert torch.isfinite(losses.total)
    assert "loss" in losses.named
    assert [name for name, p in task.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("head", ["concat", "mean_pool", "mean_logits"])
@pytest.mark.parametrize("method", FINETUNE)
def test_every_finetuning_method_steps_and_uses_all_its_weights(method, head):
    recipe = load_recipe(FinetuneRecipe, [], [*MICRO, f"finetune.method={method}", f"finetune.head={head}"])
    task = FinetuneTask(recipe, 128, 64, 5, single_label=True)
    losses = task(batch())
    losses.total.backward()
    assert losses.logits.shape == (3, 5)
    assert [name for name, p in task.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize(("bottlenecks", "fusion_layer"), [(5, 1), (1, 0), (5, 3), (0, 1)])
@pytest.mark.parametrize("length", [7, 4])
def test_one_stacked_call_equals_eq5_read_literally(bottlenecks, fusion_layer, length):
    """Value and gradients; with streams of equal and of different length."""
    torch.manual_seed(0)
    encoder = Encoder(12, 3, 3, bottlenecks=bottlenecks, fusion_layer=fusion_layer, recompute=False).double()
    spec = torch.randn(2, 7, 12, dtype=torch.float64, requires_grad=True)
    wav = torch.randn(2, length, 12, dtype=torch.float64, requires_grad=True)
    weights = list(encoder.parameters())
    outputs = [encoder([spec, wav]), list(swab.encode(encoder, spec, wav, fusion_layer))]
    torch.testing.assert_close(*outputs, rtol=1e-6, atol=1e-6)
    gradients = [
        torch.autograd.grad(sum((out.sin() * 3).sum() for out in both), [spec, wav, *weights]) for both in outputs
    ]
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("counts", [(3, 3), (3, 5)])
def test_dropped_tokens_are_as_if_they_had_never_been(counts):
    """Value and gradients; streams of one length are one call of each block, others are two."""
    torch.manual_seed(0)
    craft = Craft(
        ModelConfig(size="micro", channels=(11, 11, 10)), Streams(True, True, mel_bins=32, frames=64)
    ).double()
    maps = {"spec": torch.randn(2, 32, 64).double(), "wav": torch.randn(2, 32, 64).double()}
    visible = {side: torch.stack([torch.randperm(8)[:count].sort().values for _ in range(2)])
               for side, count in zip(maps, counts, strict=True)}  # fmt: skip
    calls = []
    hook = craft.encoder.blocks[0].register_forward_hook(lambda *_: calls.append(1))
    fast = craft(maps["spec"].transpose(1, 2), maps["wav"], [visible["spec"]], [visible["wav"]], drop=True)
    hook.remove()
    assert len(calls) == len(set(counts))
    slow = []
    for side, both in maps.items():
        clips = zip(both, visible[side].tolist(), strict=True)
        slow.append(torch.stack([encode(craft, side, one, chosen) for one, chosen in clips]))
    fast = [fast.spec[0], fast.wav[0]]
    torch.testing.assert_close(fast, slow, rtol=1e-6, atol=1e-6)
    weights = [parameter for name, parameter in craft.named_parameters() if not name.startswith("msae")]
    gradients = [torch.autograd.grad(sum((x.sin() * 3).sum() for x in both), weights) for both in (fast, slow)]
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("fused", [False, True])
def test_msae_equals_eq1_sample_by_sample(fused):
    """The first scale as matmuls (fused), or all of them as convolutions, which give the input a gradient."""
    torch.manual_seed(0)
    strides = (20, 40, 80)
    msae = MultiScaleEmbedding((3, 51, 101), strides, (4, 2, 2), "unpadded", "relu").double()
    for parameter in msae.parameters():
        torch.nn.init.normal_(parameter)
    lengths = [480, 175]
    waveform = torch.randn(2, 480, dtype=torch.float64)
    waveform[1, 175:] = 0
    waveform.requires_grad_(not fused)
    assert msae.scales[0].fused
    maps = msae(waveform, torch.tensor(lengths)), embed(waveform, msae, strides, lengths)
    torch.testing.assert_close(*maps, rtol=1e-6, atol=1e-6)
    inputs = list(msae.parameters()) if fused else [waveform, *msae.parameters()]
    gradients = [torch.autograd.grad((out**2).sum(), inputs) for out in maps]
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("word", ["finetune.fusion_layer=4", "finetune.bottlenecks=0"])
def test_fusion_after_the_last_layer_or_without_bottlenecks_is_late_fusion(word):
    words = [*MICRO, "finetune.method=swab", "model.stride=16"]
    torch.manual_seed(0)
    late = FinetuneTask(load_recipe(FinetuneRecipe, [], [*words, word]), 128, 64, 5, True)
    torch.manual_seed(0)
    plain = FinetuneTask(load_recipe(FinetuneRecipe, [], [*words, "finetune.method=swast"]), 128, 64, 5, True)
    assert torch.equal(late(batch()).logits, plain(batch()).logits)


@pytest.fixture(scope="module")
def swab_task() -> FinetuneTask:
    return FinetuneTask(load_recipe(FinetuneRecipe, [], MICRO), 128, 64, 5, False).double()


@given(order=st.permutations(range(3)))
@settings(max_examples=6, deadline=None)
def test_permuting_clips_permutes_logits(swab_task, order):
    whole = batch()
    fields = (whole.position, whole.row, whole.valid, whole.waveform, whole.fbank, whole.targets)
    turned = Batch(*(field[order] for field in fields))
    torch.testing.assert_close(swab_task(turned).logits, swab_task(whole).logits[order])


def test_recomputed_activations_give_the_same_gradients():
    gradients = []
    for flag in ("false", "true"):
        torch.manual_seed(0)
        recipe = load_recipe(PretrainRecipe, [], [*MICRO, f"model.checkpoint_activations={flag}"])
        task = PretrainTask(recipe, 128, 64)
        task(batch()).total.backward()
        gradients.append({name: p.grad for name, p in task.named_parameters()})
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


def test_positions_are_cut_or_stretched():
    positions = torch.arange(8 * 64 * 2.0).view(8, 64, 2)
    assert torch.equal(resize_positions(positions, (8, 50)), positions[:, 7:57])
    # SSAST: int(64 / 2) - int(49 / 2)
    assert torch.equal(resize_positions(positions, (8, 49)), positions[:, 8:57])
    assert resize_positions(positions, (12, 101)).shape == (12, 101, 2)
    assert torch.equal(resize_positions(positions, (8, 64)), positions)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["model.channels=[43,43]"], "kernels"),
        (["model.channels=[40,40,40]"], "sum to 120"),
        (["model.kernel_strides=[1,5,7]"], "7 does not divide 160"),
        (["model.kernel_strides=[0,5,10]"], r"kernel_strides = \[0, 5, 10\]"),
        (["model.kernels=[11,51,-1]"], r"kernels = \[11, 51, -1\]"),
        (["model.channels=[0,64,64]"], r"channels = \[0, 64, 64\]"),
        (["model.frontend=strided", "model.channels=[-128]"], "sum to -128"),
        (["model.patch=200"], "larger than"),
    ],
)
def test_settings_that_do_not_fit_are_named(words, said):
    recipe = load_recipe(PretrainRecipe, [], [*MICRO, *words])
    with pytest.raises(UserError, match=said):
        PretrainTask(recipe, 128, 64)


@torch.no_grad()
def test_new_weights_are_ssast_s():
    """Its code: Conv2d's own initialisation of the patch projection, xavier_normal_ of the mask token [1, 1, D]."""
    torch.manual_seed(0)
    task = PretrainTask(load_recipe(PretrainRecipe, [], ["model.size=tiny"]), 128, 64)
    for patch in (task.model.spec_patch, task.model.wav_patch):
        assert patch.proj.weight.abs().max() <= 1 / 16  # uniform in +- 1 / sqrt(256)
        assert patch.proj.weight.std() == pytest.approx(1 / 16 / 3**0.5, rel=0.02)
        assert patch.proj.bias.any()
    assert task.model.spec_tokens.mask_token.std() == pytest.approx(192**-0.5, rel=0.15)
    assert task.model.encoder.blocks[0].mlp.fc1.weight.std() == pytest.approx(0.02, rel=0.05)


@torch.no_grad()
@pytest.mark.parametrize("method", ["ast", "wast", "swast", "swab"])
def test_rows_keep_a_mean_of_each_frequency_row(method):
    words = [*MICRO, f"finetune.method={method}", "finetune.pool=rows", "model.stride=16"]
    task = FinetuneTask(load_recipe(FinetuneRecipe, [], words), 128, 64, 5, False)
    encoded = task.encode(batch())
    streams = [*encoded.spec, *encoded.wav]
    means = [
        tokens[:, row * 4 : (row + 1) * 4].mean(dim=1) for tokens in streams for row in range(8)
    ]  # 8 x 4 patches, frequency-major
    expected = task.classifier.linear(task.classifier.norm(torch.cat(means, dim=1)))
    torch.testing.assert_close(task.classifier(encoded), expected)
    assert task.classifier.linear.in_features == 8 * 96 * len(streams)


def test_rows_of_different_grids_cannot_be_averaged():
    words = [*MICRO, "finetune.pool=rows", "finetune.head=mean_pool", "model.channels=[32,32,32]", "model.stride=16"]
    with pytest.raises(UserError, match=r"use finetune\.head=concat"):
        FinetuneTask(load_recipe(FinetuneRecipe, [], words), 128, 64, 5, False)


def test_half_precision_logits_do_not_tie():
    task = FinetuneTask(load_recipe(FinetuneRecipe, [], [*MICRO, "model.stride=16"]), 128, 64, 500, False).bfloat16()
    with torch.no_grad():
        logits = task.classifier(task.encode(batch()))
    assert logits.dtype == torch.float32
    assert all(len(row.unique()) > 490 for row in logits)


@torch.no_grad()
@pytest.mark.parametrize("fused", [False, True])
def test_padding_does_not_change_the_map_of_a_sound(fused):
    """A clip of 1 s padded to 10 is, frame by frame, the clip of 1 s."""
    torch.manual_seed(0)
    sound = torch.randn(1, 16000)
    padded = torch.nn.functional.pad(sound, (0, 144000))
    activation = "relu" if fused else "gelu"
    for norm, same in (("unpadded", True), ("group", False)):
        msae = MultiScaleEmbedding((11, 51, 101), (1, 5, 10), (43, 43, 42), norm, activation)
        alone, found = msae(sound, torch.tensor([16000])), msae(padded, torch.tensor([16000]))[..., :100]
        close = torch.allclose(found, alone, rtol=1e-4, atol=1e-4)
        assert close == same
