"""Methods that encode visible patches alone, against their equations written out; and what they refuse."""

from dataclasses import replace

import pytest
import torch

from pipeline.config import PretrainRecipe
from pipeline.errors import UserError
from pipeline.flow import Batch
from pipeline.recipes import load_recipe
from pipeline.tasks import PretrainTask
from tests.reference import masks, swacl, visible
from tests.test_methods import MICRO, batch, pretrain_task

EXACT = {"rtol": 1e-6, "atol": 1e-6}
KINDS = ("random", "cluster", "time", "frequency")


def double(*words: str) -> tuple[PretrainTask, Batch]:
    task, clips = pretrain_task(*words).double(), batch()
    return task, replace(clips, waveform=clips.waveform.double(), fbank=clips.fbank.double())


def equal(fast: torch.Tensor, slow: torch.Tensor, task: PretrainTask) -> None:
    """Value and every gradient; all weights take part."""
    torch.testing.assert_close(fast, slow, **EXACT)
    found, expected = (torch.autograd.grad(loss, list(task.parameters())) for loss in (fast, slow))
    torch.testing.assert_close(found, expected, **EXACT)


@pytest.mark.parametrize("decoder", ["shared", "separate"])
@pytest.mark.parametrize("kinds", [("random", "cluster"), ("time", "frequency"), ("random", "random")])
def test_craft_mae_is_its_equations(kinds, decoder):
    """Sum of both reconstructions and the contrast of pooled visible tokens, clip by clip and patch by patch."""
    words = f"pretrain.drop=[{','.join(kinds)}] pretrain.drop_ratio=[0.6,0.5] pretrain.decoder={decoder}"
    weights = "pretrain.r_w=0.5 pretrain.r_cl=0.3"
    task, clips = double("pretrain.method=craft_mae", *words.split(), *weights.split())
    maps = {"spec": clips.fbank.transpose(1, 2), "wav": task.model.waveform_map(clips.waveform)}
    total, pooled = 0.0, {}
    for number, (side, kind, ratio) in enumerate(zip(maps, kinds, (0.6, 0.5), strict=True)):
        splits = masks.split(0, f"drop.{side}", clips.position.tolist(), (2, 4), kind, ratio, (1, 2))
        own = (task.decoders[0], number) if decoder == "shared" else (task.decoders[number], 0)
        errors, means = [], []
        for one, (seen, hidden) in zip(maps[side], splits, strict=True):
            encoded = visible.encode(task.model, side, one, seen)
            predicted = visible.decode(*own, encoded, seen, hidden)
            errors.append(visible.reconstruction(predicted, one.detach(), 16, hidden))
            means.append(encoded.mean(dim=0))
        total = total + (1.0, 0.5)[number] * sum(errors) / len(errors)
        pooled[side] = torch.stack(means)
    total = total + 0.3 * swacl.contrast(pooled["wav"], pooled["spec"], 0.07)
    losses = task(clips)
    equal(losses.total, total, task)
    torch.testing.assert_close(losses.named["loss"], total.detach(), **EXACT)


@pytest.mark.parametrize("method", ["craft_mosaic", "audio_mosaic"])
def test_mosaics_are_their_equations(method):
    """NT-Xent of two views: spectrogram and waveform, or the spectrogram twice; the same projection for both."""
    drops = "pretrain.drop=[time,frequency] pretrain.drop_ratio=[0.6,0.4]"
    words = f"{drops} pretrain.temperature=0.1 pretrain.projection=mlp pretrain.negatives=both"
    task, clips = double(f"pretrain.method={method}", *words.split())
    spec = clips.fbank.transpose(1, 2)
    second = spec if method == "audio_mosaic" else task.model.waveform_map(clips.waveform)
    sides = [("spec", "drop.spec", spec, "time", 0.6), ("wav", "drop.wav", second, "frequency", 0.4)]
    if method == "audio_mosaic":
        sides[1] = ("spec", "drop.spec.second", second, "frequency", 0.4)
    views = []
    for side, purpose, maps, kind, ratio in sides:
        splits = masks.split(0, purpose, clips.position.tolist(), (2, 4), kind, ratio, (1, 2))
        means = [
            visible.encode(task.model, side, one, seen).mean(dim=0) for one, (seen, _) in zip(maps, splits, strict=True)
        ]
        narrow, wide = task.projection[0], task.projection[2]
        hidden = [torch.relu(narrow.weight @ mean + narrow.bias) for mean in means]
        views.append(torch.stack([wide.weight @ x + wide.bias for x in hidden]))
    equal(task(clips).total, swacl.nt_xent(*views, 0.1), task)


@pytest.mark.parametrize("kind", KINDS)
def test_every_clip_has_equally_many_visible_patches(kind):
    task = pretrain_task("pretrain.method=craft_mae", f"pretrain.drop=[{kind},{kind}]", "pretrain.drop_ratio=[0.5,0.5]")
    encoded = task(batch(), pooled_only=True)
    assert encoded.query.shape == encoded.key.shape == (4, 96)
    splits = task.hidden.splits(batch().position, task.model.grids())
    assert [part.shape for side in splits.values() for split in side for part in split] == [(4, 4)] * 4


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("pretrain.method=craft_mae pretrain.two_pass=true", r"pretrain\.two_pass = True says nothing to .*craft_mae"),
        ("pretrain.method=craft_mae pretrain.mask_waveform=true", r"pretrain\.mask_waveform = True .* visible patches"),
        ("pretrain.method=craft_mae pretrain.level=token", r"pretrain\.level = token says nothing"),
        ("pretrain.method=craft_mae pretrain.mask_patches=300", r"pretrain\.mask_patches = 300 says nothing"),
        ("pretrain.method=craft_mae pretrain.drop=[time,random] pretrain.drop_ratio=[.9,.8]", "0.9 of 4 columns are 4"),
        ("pretrain.drop_ratio=[0.5,0.5]", r"pretrain\.drop_ratio = \(0\.5, 0\.5\) .*pswacl, which encodes every patch"),
        ("pretrain.method=craft_mosaic pretrain.decoder=separate", "craft_mosaic, which has no decoder"),
        (
            "pretrain.method=audio_mosaic pretrain.clean_spectrogram=true",
            r"pretrain\.clean_spectrogram = True says nothing",
        ),
        ("pretrain.method=ssast pretrain.negatives=both", r"pretrain\.negatives = both .*ssast"),
        ("pretrain.level=token pretrain.negatives=both", r"pretrain\.negatives = both .*level = token has not"),
        ("pretrain.decoder=separate", "pswacl, which has no decoder; leave it out"),
        ("pretrain.method=craft_mae pretrain.views=2", r"pretrain\.views = 2 .*craft_mae, which has no teacher"),
        ("pretrain.teacher_decay=[0.9,0.99]", r"teacher_decay = \(0\.9, 0\.99\) .*pswacl, which has no teacher"),
        ("pretrain.method=craft_latent pretrain.target_blocks=5", "target_blocks = 5, but model.size = micro has 4"),
        ("pretrain.method=craft_latent pretrain.r_g=1", r"pretrain\.r_g = 1\.0 says nothing .*visible patches alone"),
    ],
)
def test_settings_that_say_nothing_are_refused(words, said):
    with pytest.raises(UserError, match=said):
        pretrain_task(*words.split())


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("pretrain.drop_ratio=[1.0,0.5]", "less than 1"),
        ("pretrain.drop=[time,diagonal]", "'random', 'cluster', 'time' or 'frequency'"),
        ("pretrain.decoder_width=100", "multiple of 64"),
        ("pretrain.views=0", "greater than or equal to 1"),
        ("pretrain.teacher_decay=[0.9,1]", "less than 1"),
    ],
)
def test_values_that_cannot_be_are_refused(word, said):
    with pytest.raises(UserError, match=said):
        load_recipe(PretrainRecipe, [], [*MICRO, word])


def test_the_decoder_is_light():
    """Of base: four blocks, 512 wide; the pictures show what it rebuilds."""
    task = pretrain_task("pretrain.method=craft_mae", "model.size=base", "pretrain.decoder_depth=0")
    (decoder,) = task.decoders
    assert (len(decoder.blocks.blocks), decoder.narrow.out_features, decoder.blocks.blocks[0].attn.heads) == (4, 512, 8)
    (decoder,) = pretrain_task("pretrain.method=craft_latent", "model.size=base", "pretrain.decoder_depth=0").decoders
    assert (len(decoder.blocks.blocks), decoder.narrow.out_features, decoder.pixels.out_features) == (2, 256, 768)
    tiny = pretrain_task("pretrain.method=craft_mae")
    rebuilt = tiny(batch(), rebuild=True)
    assert rebuilt.predicted.shape == (4, 7, 256)
    assert rebuilt.mask.shape == (4, 7)
