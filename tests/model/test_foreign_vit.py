"""Audio-MAE, M2D, AudioMosaic, EAT and SSLAM give the tokens of their own code, each in its place; BEATs is refused."""

import pytest
import torch
from safetensors.torch import save_file

from pipeline.config import FinetuneRecipe
from pipeline.errors import UserError
from pipeline.flow import Batch
from pipeline.model.weights import load_weights, read_weights
from pipeline.probing.frozen import open_frozen, pooled
from pipeline.recipes import load_recipe
from pipeline.runs import initialise
from pipeline.tasks import FinetuneTask
from tests.reference.vit import Eat, Vit
from tests.test_export import SPEC

EXACT = {"rtol": 0, "atol": 2e-5}
ONE = ["model.class_tokens=1", "model.stride=16"]


def finetune_task(frames: int, *words: str, mel_bins: int = 128) -> FinetuneTask:
    recipe = load_recipe(FinetuneRecipe, [], ["model.size=micro", "finetune.method=ast", *words])
    return FinetuneTask(recipe, mel_bins, frames, 5, False).eval()


def fbanks(frames: int, mel_bins: int = 128) -> torch.Tensor:
    return torch.randn(2, frames, mel_bins, generator=torch.Generator().manual_seed(4))


def by_frequency(tokens: torch.Tensor, columns: int) -> torch.Tensor:
    """Patches in the order of Audio-MAE and EAT, without the class token, in ours."""
    return torch.unflatten(tokens[:, 1:], 1, (columns, -1)).transpose(1, 2).flatten(1, 2)


@torch.no_grad()
def test_audio_mae_gives_its_own_tokens(tmp_path):
    theirs = Vit((5, 8)).eval()
    torch.save({"model": theirs.state_dict()}, tmp_path / "pretrained.pth")
    task = finetune_task(80, *ONE)
    with pytest.raises(UserError, match=r"40 positions may be Audio-MAE's .* or M2D's .*model\.init_grid"):
        load_weights(task, tmp_path / "pretrained.pth")
    report = load_weights(task, tmp_path / "pretrained.pth", grid=(8, 5))
    assert report.origin == "Audio-MAE"
    assert report.resized == []
    assert [name for name in report.fresh if not name.startswith("classifier.")] == []
    assert {name.split(".")[0] for name in report.dropped} == {
        "mask_token", "decoder_pos_embed", "decoder_embed", "decoder_pred", "decoder_norm", "decoder_blocks"
    }  # fmt: skip
    ours = task.model(fbanks(80), None).spec[0]
    torch.testing.assert_close(ours, by_frequency(theirs(fbanks(80)), 5), **EXACT)


@torch.no_grad()
def test_a_finetuned_audio_mae_keeps_all_but_its_head(tmp_path):
    """Its last norm is of the mean patch: ours begins as one that only normalises."""
    theirs = Vit((64, 8), decoder=False, tuned=True).eval()
    save_file(theirs.state_dict(), tmp_path / "finetuned.safetensors")
    task = finetune_task(1024, *ONE)
    report = load_weights(task, tmp_path / "finetuned.safetensors")
    assert (report.origin, report.resized) == ("Audio-MAE", [])
    assert sorted(report.dropped) == ["fc_norm.bias", "fc_norm.weight", "head.bias", "head.weight"]
    ours = task.model(fbanks(1024), None).spec[0]
    torch.testing.assert_close(
        ours, torch.nn.functional.layer_norm(by_frequency(theirs(fbanks(1024)), 64), (96,), eps=1e-6), **EXACT
    )


@torch.no_grad()
def test_m2d_is_of_the_other_orientation(tmp_path):
    theirs = Vit((5, 38), decoder=False).eval()
    torch.save({f"module.ar.runtime.backbone.{name}": value for name, value in theirs.state_dict().items()} |
               {"module.head.mlp.mlp.0.bias": torch.zeros(5)}, tmp_path / "m2d.pth")  # fmt: skip
    task = finetune_task(608, *ONE, mel_bins=80)
    report = load_weights(task, tmp_path / "m2d.pth")
    assert (report.origin, report.resized, report.dropped) == ("M2D", [], ["head.mlp.mlp.0.bias"])
    fbank = fbanks(608, 80)
    torch.testing.assert_close(task.model(fbank, None).spec[0], theirs(fbank.transpose(1, 2))[:, 1:], **EXACT)
    with pytest.raises(UserError, match="M2D reads other features than Kaldi's fbank"):
        open_frozen(str(tmp_path / "m2d.pth"))


@torch.no_grad()
def test_audio_mosaic_gives_its_own_tokens(tmp_path):
    """Its pretraining has no norm of the tokens, but one of their mean: ours begins as one that only normalises."""
    theirs = Vit((64, 8), decoder=False, mosaic=True).eval()
    torch.save({"model": theirs.state_dict()}, tmp_path / "mosaic.pt")
    with pytest.raises(UserError, match=r"model\.block=pre model\.input_norms=true; set that"):
        load_weights(finetune_task(1024, *ONE), tmp_path / "mosaic.pt")
    task = finetune_task(1024, *ONE, "model.input_norms=true")
    report = load_weights(task, tmp_path / "mosaic.pt")
    assert (report.origin, report.resized) == ("AudioMosaic", [])
    assert [name for name in report.fresh if not name.startswith("classifier.")] == []
    assert sorted(report.dropped) == ["fc_norm.bias", "fc_norm.weight", "projector.bias", "projector.weight"]
    ours = task.model(fbanks(1024), None).spec[0]
    expected = torch.nn.functional.layer_norm(by_frequency(theirs(fbanks(1024)), 64), (96,), eps=1e-6)
    torch.testing.assert_close(ours, expected, **EXACT)
    assert open_frozen(str(tmp_path / "mosaic.pt")).model.config.input_norms


@torch.no_grad()
def test_eat_and_sslam_give_their_own_tokens(tmp_path):
    theirs = Eat((768, 8)).eval()
    torch.save(theirs.checkpoint(), tmp_path / "EAT.pt")
    for words, remedy in ((ONE, r"model\.block=post; set that"), (["model.block=post"], "model.class_tokens=1")):
        with pytest.raises(UserError, match=remedy):
            load_weights(finetune_task(1024, *words, "model.stride=16"), tmp_path / "EAT.pt")
    task = finetune_task(1024, *ONE, "model.block=post")
    report = load_weights(task, tmp_path / "EAT.pt")
    assert (report.origin, report.resized) == ("EAT or SSLAM", [])
    assert [name for name in report.fresh if not name.startswith("classifier.")] == []
    assert {name.split(".")[0] for name in report.dropped} == {"_ema", "modality_encoders"}
    assert [name for name in report.dropped if name[0] != "_"] == [
        f"modality_encoders.IMAGE.decoder.proj.{kind}" for kind in ("weight", "bias")
    ]
    expected = by_frequency(theirs(fbanks(1024)), 64)
    torch.testing.assert_close(task.model(fbanks(1024), None).spec[0], expected, **EXACT)
    frozen = open_frozen(str(tmp_path / "EAT.pt"))  # finds patch, class token and kind of blocks by itself
    none = torch.zeros(2, dtype=torch.int64)
    batch = Batch(none, none, none == 0, torch.zeros(2, 160000), fbanks(1024), torch.zeros(2, 0))
    tokens = frozen(batch, [4])["spec", 4]
    torch.testing.assert_close(pooled(tokens, "mean", (8, 64)), expected.mean(dim=1), **EXACT)
    torch.testing.assert_close(pooled(tokens, "cls", (8, 64)), theirs(fbanks(1024))[:, 0], **EXACT)
    shorter = finetune_task(512, *ONE, "model.block=post", "model.positions=interpolated")
    assert load_weights(shorter, tmp_path / "EAT.pt").resized == []
    torch.testing.assert_close(shorter.model(fbanks(512), None).spec[0], by_frequency(theirs(fbanks(512)), 32), **EXACT)


@torch.no_grad()
@pytest.mark.parametrize("frames", [1024, 512])
def test_overlapping_patches_have_the_positions_of_their_times_in_eat(tmp_path, frames):
    """Its table goes on for 2 minutes, in steps of 16 frames; finetuning's own stride is 10."""
    theirs = Eat((768, 8))
    times = torch.arange(768.0).mul(16).add(7.5)  # middle frame of a column
    theirs.modality_encoders["IMAGE"].fixed_positional_encoder.positions.copy_(
        times[:, None, None].expand(-1, 8, 96).reshape(1, -1, 96)
    )
    torch.save(theirs.checkpoint(), tmp_path / "EAT.pt")
    words = ["model.class_tokens=1", "model.block=post"]
    task = finetune_task(frames, *words)
    assert load_weights(task, tmp_path / "EAT.pt").resized == ["model.spec_tokens.positions"]
    found = task.model.spec_tokens.positions[5, :, 0]
    middle = torch.arange(len(found)).mul(10.0).add(7.5)
    assert (found - middle).abs().max() < 16  # of a patch; bilinear interpolation of the grid as of any other weights
    with pytest.raises(UserError, match=r"model\.positions = rotary"):
        load_weights(finetune_task(frames, *words, "model.positions=rotary", "model.stride=16"), tmp_path / "EAT.pt")


@torch.no_grad()
def test_a_shorter_input_takes_the_middle_of_their_positions(tmp_path):
    """And a finetuning says what it took over."""
    theirs = Vit((64, 8), decoder=False)
    save_file(theirs.state_dict(), tmp_path / "audiomae.safetensors")
    words = [*ONE, "model.size=micro", "finetune.method=swast", f"model.init={tmp_path / 'audiomae.safetensors'}"]
    recipe = load_recipe(FinetuneRecipe, [], words)
    task = FinetuneTask(recipe, 128, SPEC.frames, len(SPEC.labels), False)
    record = initialise(task, recipe, SPEC)
    assert (record["origin"], record["resized"]) == ("Audio-MAE", ["model.spec_tokens.positions"])
    table = torch.unflatten(theirs.pos_embed[0, 1:], 0, (64, 8)).transpose(0, 1)
    assert torch.equal(task.model.spec_tokens.positions, table[:, 30:35])
    assert {name.split(".")[1] for name in record["fresh"]} == {"msae", "wav_patch", "wav_tokens", "norm", "linear"}


@pytest.mark.parametrize(
    ("names", "whose"),
    [
        (["patch_embedding.weight", "post_extract_proj.weight", "encoder.layers.0.self_attn.grep_linear.weight",
          "encoder.layers.0.self_attn.relative_attention_bias.weight"], "BEATs, whose attention has gated relative"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("prefix", ["", "module."])
def test_networks_that_this_is_not_are_refused_with_the_reason(tmp_path, names, whose, prefix):
    torch.save({"model": {prefix + name: torch.zeros(1) for name in names}, "cfg": {"layers": 12}}, tmp_path / "w.pt")
    assert set(read_weights(tmp_path / "w.pt")) == {prefix + name for name in names}
    with pytest.raises(UserError, match=whose):
        load_weights(finetune_task(80), tmp_path / "w.pt")


def test_weights_of_one_kind_of_blocks_are_none_for_the_other(tmp_path):
    """All shapes agree; only a name tells."""
    save_file(finetune_task(80, "model.block=post").state_dict(), tmp_path / "post.safetensors")
    with pytest.raises(UserError, match=r"its LayerNorms are those of model\.block=post; set that"):
        load_weights(finetune_task(80), tmp_path / "post.safetensors")
    with pytest.raises(UserError, match=r"wav_depth = 2 is of model\.block=pre"):
        finetune_task(80, "finetune.method=swab", "model.block=post", "model.wav_depth=2")
