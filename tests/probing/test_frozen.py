"""Any weights as a frozen encoder: the tokens are those of the model that they come from."""

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import ASTConfig, ASTModel

from pipeline.config import DataConfig, FinetuneRecipe, PretrainRecipe
from pipeline.data.corpus import load_corpus
from pipeline.data.fbank import padded_frames
from pipeline.data.loader import Loader
from pipeline.data.spec import DataSpec
from pipeline.errors import UserError
from pipeline.export import export_safetensors, open_exported
from pipeline.flow import Batch
from pipeline.model.weights import weights_file
from pipeline.probing.frozen import AUDIOSET, open_frozen, pooled
from pipeline.runs import load_finetuned, trained_on
from tests.reference.ssast import Ssast


@pytest.fixture(scope="module")
def spec(shards) -> DataSpec:
    return DataSpec.of(load_corpus(DataConfig(shards=str(shards))), DataConfig(shards=str(shards)))


@pytest.fixture(scope="module")
def batch(shards) -> Batch:
    with Loader(shards, "eval", batch_size=6, device="cpu") as loader:
        return next(iter(loader.batches()))


def fbank_batch(frames: int) -> Batch:
    zero = torch.zeros(2, dtype=torch.int64)
    fbank = torch.randn(2, frames, 128, generator=torch.Generator().manual_seed(4))
    return Batch(zero, zero, zero == 0, None, fbank, torch.zeros(2, 0))


@torch.no_grad()
def test_a_finetuned_run_gives_the_tokens_that_its_classifier_reads(finetuned, spec, batch):
    """With bottlenecks between the streams; and of blocks in the middle those that the next block reads."""
    frozen = open_frozen(str(finetuned), spec)
    task, _ = load_finetuned(finetuned, weights_file(finetuned), torch.device("cpu"))
    read = []
    hook = task.model.encoder.blocks[1].register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    encoded = task.encode(batch)
    hook.remove()
    found = frozen(batch, [1, 4])
    assert list(found) == [("spec", 1), ("wav", 1), ("spec", 4), ("wav", 4)]
    assert torch.equal(found["spec", 4][:, 2:], encoded.spec[0])
    assert torch.equal(found["wav", 4][:, 2:], encoded.wav[0])
    count = found["spec", 1].shape[1]
    first = torch.cat([found["spec", 1], found["wav", 1]])
    assert torch.equal(first, read[0][:, :count])
    assert read[0].shape[1] == count + 64  # the bottlenecks are no features
    assert (frozen.spec.mean, frozen.spec.std) == (-5.0, 4.0)  # as the run had them
    assert not any(parameter.requires_grad for parameter in frozen.parameters())


@torch.no_grad()
def test_a_pretrained_run_its_checkpoint_and_its_export_are_one_encoder(pretrained, spec, batch, tmp_path):
    frozen = open_frozen(str(pretrained), spec)
    export_safetensors(open_exported(pretrained), tmp_path / "alone.safetensors")
    step = pretrained / "checkpoints" / "step-00000001"
    for name in (step / "weights.safetensors", tmp_path / "alone.safetensors"):
        assert open_frozen(str(name), spec).digest == frozen.digest
    assert frozen.streams == ["spec", "wav"]
    assert frozen.source == pretrained
    random = open_frozen(f"random:{pretrained}", spec)
    assert random.digest != frozen.digest
    assert open_frozen(f"random:{pretrained}", spec, seed=1).digest != random.digest
    assert open_frozen(f"random:{pretrained}", spec).digest == random.digest
    assert random(batch, [4])["wav", 4].shape == frozen(batch, [4])["wav", 4].shape
    longer = open_frozen(str(pretrained), spec.model_copy(update={"frames": 2 * spec.frames}))
    assert longer.grids["spec"] == (8, 2 * frozen.grids["spec"][1])


def test_clips_of_the_runs_length_have_the_runs_frames(make_run, spec):
    """Of shards as of files: with other frames positions would be stretched, and the vectors be others."""
    run = str(make_run(FinetuneRecipe, "data.frames=48"))
    frozen = open_frozen(run, spec)
    assert (frozen.spec.frames, frozen.digest) == (48, open_frozen(run).digest)
    shorter = spec.model_copy(update={"samples": 6400, "frames": 48})
    assert open_frozen(str(make_run(FinetuneRecipe)), shorter).spec.frames == 48


def test_an_export_of_before_a_setting_was_there_has_what_runs_had_then(make_run, spec, tmp_path):
    file = tmp_path / "old.safetensors"
    export_safetensors(open_exported(make_run(FinetuneRecipe, "model.norm=group")), file)
    digest = open_frozen(str(file), spec).digest
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    config, tensors = json.loads(metadata["config"]), load_file(file)
    assert config["model"].pop("norm") == "group"
    save_file(tensors, file, metadata | {"config": json.dumps(config)})
    frozen = open_frozen(str(file), spec)
    assert (frozen.model.config.norm, frozen.digest) == ("group", digest)
    save_file(tensors, file, metadata | {"config": json.dumps(config | {"model": {"of_tomorrow": 1}})})
    with pytest.raises(UserError, match=r"old\.safetensors: unknown setting model\.of_tomorrow .*another version"):
        open_frozen(str(file), spec)
    save_file(tensors, file, metadata | {"data": '{"labels": 1}'})
    for read in (lambda: open_frozen(str(file), spec), lambda: trained_on(file, file)):
        with pytest.raises(UserError, match=r"old\.safetensors: .*it is damaged, or of another version"):
            read()


@torch.no_grad()
def test_behind_the_block_where_it_leaves_the_waveform_stays_what_it_was(make_run, spec, batch):
    frozen = open_frozen(str(make_run(PretrainRecipe, "pretrain.method=swapt", "model.wav_depth=2")), spec)
    found = frozen(batch, frozen.layers("all"))
    assert list(found) == [(stream, layer) for layer in (1, 2, 3, 4) for stream in ("spec", "wav")]
    assert torch.equal(found["wav", 3], found["wav", 2])
    assert not torch.equal(found["spec", 3], found["spec", 2])
    torch.testing.assert_close(found["wav", 4], frozen.model.encoder.norm(found["wav", 2]))


@torch.no_grad()
def test_ssast_and_hugging_face_weights_give_their_own_tokens(tmp_path, spec):
    theirs = Ssast(frames=128)
    torch.save(theirs.checkpoint(), tmp_path / "SSAST.pth")
    frozen = open_frozen(str(tmp_path / "SSAST.pth"), spec.model_copy(update={"frames": 128}))
    assert (frozen.streams, frozen.depth, frozen.spec.mean) == (["spec"], 4, AUDIOSET[0])
    theirs = ASTModel(ASTConfig(hidden_size=96, num_hidden_layers=4, num_attention_heads=3, intermediate_size=384,
                                max_length=128, layer_norm_eps=1e-6)).eval()  # fmt: skip
    theirs.save_pretrained(tmp_path / "hf")
    batch = fbank_batch(128)
    frozen = open_frozen(str(tmp_path / "hf"), spec.model_copy(update={"frames": 128}))
    assert frozen.model.config.stride == 10
    expected = theirs(batch.fbank, output_hidden_states=True)
    found = frozen(batch, [2, 4])
    torch.testing.assert_close(found["spec", 4], expected.last_hidden_state, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["spec", 2], expected.hidden_states[2], rtol=1e-4, atol=1e-5)
    alone = open_frozen(str(tmp_path / "hf"))  # of its own length, 1.28 s in frames, and not of 10 s
    assert (alone.spec.samples, alone.spec.frames, alone.grids["spec"]) == (20000, 128, (12, 12))
    assert padded_frames(alone.spec.samples / 16000) == 128


def test_pooling_is_what_it_says():
    tokens = torch.randn(2, 2 + 3 * 4, 5)
    grid = tokens[:, 2:].view(2, 3, 4, 5)  # frequency, time
    expected = torch.stack([torch.cat([grid[:, f, t] for f in range(3)], dim=1) for t in range(4)], dim=1)
    torch.testing.assert_close(pooled(tokens, "time_frequency", (3, 4), over_time=False), expected)
    torch.testing.assert_close(pooled(tokens, "time_frequency", (3, 4)), expected.mean(dim=1))
    torch.testing.assert_close(pooled(tokens, "mean", (3, 4)), grid.mean(dim=(1, 2)))
    torch.testing.assert_close(pooled(tokens, "mean", (3, 4), over_time=False), grid.mean(dim=1))
    torch.testing.assert_close(pooled(tokens, "cls", (3, 4)), tokens[:, :2].mean(dim=1))
    assert torch.equal(pooled(tokens, "tokens", (3, 4)), tokens[:, 2:])


def test_weights_that_cannot_be_frozen_are_one_line(pretrained, spec, tmp_path):
    torch.save(Ssast(grid=(12, 11), stride=10, classes=5, pool="mean").checkpoint(), tmp_path / "AST.pth")
    with pytest.raises(UserError, match=r"AST.pth: 132 positions .* set --grid to the one") as said:
        open_frozen(str(tmp_path / "AST.pth"), spec)
    assert "model.init" not in str(said.value)
    assert open_frozen(str(tmp_path / "AST.pth"), spec, (12, 11)).model.config.stride == 10
    bare = tmp_path / "bare.safetensors"
    tensors = load_file(weights_file(pretrained))
    save_file(tensors, bare)
    shutil.copytree(pretrained, tmp_path / "cut")
    tensors.pop("model.encoder.norm.weight")
    save_file(tensors, weights_file(tmp_path / "cut"))
    for name, said in (
        ("random:huge", "random:huge: neither one of the sizes micro, "),
        (str(bare), r"nothing says its settings; give the run directory"),
        (str(tmp_path / "cut"), r"lacks model\.encoder\.norm\.weight"),
        (str(tmp_path), "no complete checkpoint"),
    ):
        with pytest.raises(UserError, match=said):
            open_frozen(name, spec)
    with pytest.raises(UserError, match="128 mel bins, the shards have 16000 and 64"):
        open_frozen(str(pretrained), spec.model_copy(update={"mel_bins": 64}))
