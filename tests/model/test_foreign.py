"""SSAST, AST and Hugging Face weights give the same outputs here as there, to 1e-5."""

import json
import re
import subprocess
import sys
from argparse import Namespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import ASTConfig, ASTForAudioClassification, ASTModel

from pipeline.config import FinetuneRecipe, PretrainRecipe
from pipeline.errors import UserError
from pipeline.model.foreign import to_hf, translate
from pipeline.model.masking import gather_patches
from pipeline.model.weights import load_weights, read_weights, weights_file
from pipeline.recipes import load_recipe
from pipeline.tasks import FinetuneTask, PretrainTask
from tests.reference.ssast import Ssast

MICRO = ["model.size=micro"]
EXACT = {"rtol": 1e-5, "atol": 1e-5}


def fbanks(frames: int, mel_bins: int = 128) -> torch.Tensor:
    return torch.randn(2, frames, mel_bins, generator=torch.Generator().manual_seed(4))


def pretrain_task(frames: int, *words: str) -> PretrainTask:
    return PretrainTask(load_recipe(PretrainRecipe, [], [*MICRO, *words]), 128, frames)


def finetune_task(frames: int, *words: str, mel_bins: int = 128, classes: int = 5) -> FinetuneTask:
    recipe = load_recipe(FinetuneRecipe, [], [*MICRO, "finetune.method=ast", *words])
    return FinetuneTask(recipe, mel_bins, frames, classes, False).eval()


@torch.no_grad()
def test_a_pretrained_ssast_predicts_the_same_patches(tmp_path):
    theirs = Ssast(frames=128)
    torch.save(theirs.checkpoint(), tmp_path / "SSAST.pth")
    task = pretrain_task(128, "pretrain.method=ssast")
    report = load_weights(task, tmp_path / "SSAST.pth")
    assert report.origin == "SSAST"
    assert (report.resized, report.fresh) == ([], [])
    dead = ["p_input_fdim", "p_input_tdim", *(f"v.{head}.{kind}" for head in ("head", "head_dist") for kind in
                                             ("weight", "bias"))]  # fmt: skip
    assert sorted(report.dropped) == sorted(dead)
    fbank, masked = fbanks(128), torch.tensor([[0, 5, 9], [1, 2, 63]])
    encoded = task.model(fbank, None, [masked]).spec[0]
    found = task.heads(gather_patches(encoded, masked))
    for ours, expected in zip(found, theirs.predict(fbank, masked), strict=True):
        torch.testing.assert_close(ours, expected, **EXACT)


@torch.no_grad()
@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_finetuned_ssast_and_ast_give_the_same_logits(tmp_path, pool):
    theirs = Ssast(grid=(12, 11), stride=10, classes=5, pool=pool)
    torch.save(theirs.checkpoint(), tmp_path / "AST.pth")
    task = finetune_task(116, f"finetune.pool={pool}")
    with pytest.raises(UserError, match=r"\[11,12\] or \[12,11\].*model\.init_grid"):
        load_weights(task, tmp_path / "AST.pth")
    with pytest.raises(UserError, match="132 positions are no grid of 12 x 12"):
        load_weights(task, tmp_path / "AST.pth", grid=(12, 12))
    report = load_weights(task, tmp_path / "AST.pth", grid=(12, 11))
    assert (report.resized, report.fresh) == ([], [])
    fbank = fbanks(116)
    torch.testing.assert_close(task.classifier(task.model(fbank, None)), theirs.classify(fbank), **EXACT)


def test_ssast_starts_the_finetuning_of_both_streams(tmp_path):
    """The original's positions are stretched to the finer grid; the waveform's side is said to be fresh."""
    torch.save(Ssast(frames=128).checkpoint(), tmp_path / "SSAST.pth")
    task = finetune_task(128, "finetune.method=swab")
    report = load_weights(task, tmp_path / "SSAST.pth")
    assert report.resized == ["model.spec_tokens.positions"]
    fresh = {name.split(".")[1] if name.startswith("model") else name.split(".")[0] for name in report.fresh}
    assert fresh == {"msae", "wav_patch", "wav_tokens", "encoder", "classifier"}
    assert [name for name in report.fresh if "encoder" in name] == ["model.encoder.bottlenecks.tokens"]
    assert {name.split(".")[0] for name in report.dropped} == {"heads", "model", "p_input_fdim", "p_input_tdim", "v"}


def hf_config(frames: int, mel_bins: int, stride: int) -> ASTConfig:
    return ASTConfig(
        hidden_size=96, num_hidden_layers=4, num_attention_heads=3, intermediate_size=384, layer_norm_eps=1e-6,
        max_length=frames, num_mel_bins=mel_bins, frequency_stride=stride, time_stride=stride, num_labels=5,
        initializer_range=0.1,
    )  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize(("mel_bins", "stride"), [(128, 10), (64, 16)])
def test_a_hugging_face_model_encodes_and_classifies_the_same(tmp_path, mel_bins, stride):
    theirs = ASTForAudioClassification(hf_config(96, mel_bins, stride)).eval()
    for name, parameter in theirs.named_parameters():
        # Gains near 1: HF has one epsilon where AST has 1e-6 in blocks and 1e-5 in the head, seen at small variances.
        torch.nn.init.normal_(parameter, mean=float("norm" in name and name.endswith("weight")), std=0.1)
    theirs.save_pretrained(tmp_path)
    task = finetune_task(96, "finetune.pool=cls", f"model.stride={stride}", mel_bins=mel_bins)
    report = load_weights(task, weights_file(tmp_path))
    assert report.origin == "HF AST"
    assert (report.resized, report.fresh, report.dropped) == ([], [], [])
    fbank = fbanks(96, mel_bins)
    torch.testing.assert_close(task.classifier(task.model(fbank, None)), theirs(fbank).logits, **EXACT)


@torch.no_grad()
def test_a_hugging_face_backbone_loads_from_a_pickle_too(tmp_path):
    theirs = ASTModel(hf_config(96, 128, 10)).eval()
    theirs.save_pretrained(tmp_path)
    from safetensors.torch import load_file

    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    task = finetune_task(96)
    report = load_weights(task, weights_file(tmp_path))
    assert all(name.startswith("classifier.") for name in report.fresh)
    fbank = fbanks(96)
    torch.testing.assert_close(task.model(fbank, None).spec[0], theirs(fbank).last_hidden_state[:, 2:], **EXACT)


def test_models_of_frames_instead_of_square_patches_are_refused(tmp_path):
    theirs = Ssast(frames=128).checkpoint()
    theirs["module.v.patch_embed.proj.weight"] = torch.zeros(96, 1, 128, 2)
    torch.save(theirs, tmp_path / "frame.pth")
    with pytest.raises(UserError, match="only models of square patches"):
        load_weights(pretrain_task(128, "pretrain.method=ssast"), tmp_path / "frame.pth")


def test_a_waveform_method_cannot_start_from_ssast(tmp_path):
    save_file({k: v for k, v in Ssast(frames=128).checkpoint().items()}, tmp_path / "ssast.safetensors")  # noqa: C416
    with pytest.raises(UserError, match="spectrograms alone"):
        load_weights(finetune_task(128, "finetune.method=wast"), tmp_path / "ssast.safetensors")


@pytest.mark.parametrize("wrapper", ["_orig_mod.", "module.", "model.", "net.", "module.module.", "module._orig_mod."])
@pytest.mark.parametrize("whose", ["CRAFT", "HF AST", "SSAST or AST"])
def test_the_prefixes_of_what_a_model_was_trained_in_are_no_part_of_it(tmp_path, wrapper, whose):
    task = finetune_task(128, "model.size=tiny", mel_bins=32)
    tensors = task.state_dict()
    if whose != "CRAFT":
        tensors = to_hf({name: value for name, value in tensors.items() if "wav" not in name}, 12, True)
    if whose == "SSAST or AST":
        tensors = {
            "v.cls_token": tensors["audio_spectrogram_transformer.embeddings.cls_token"],
            "v.dist_token": tensors["audio_spectrogram_transformer.embeddings.distillation_token"],
            "v.pos_embed": tensors["audio_spectrogram_transformer.embeddings.position_embeddings"],
            "v.patch_embed.proj.weight": task.state_dict()["model.spec_patch.proj.weight"],
            "v.patch_embed.proj.bias": task.state_dict()["model.spec_patch.proj.bias"],
            "v.norm.weight": task.state_dict()["model.encoder.norm.weight"],
            "v.norm.bias": task.state_dict()["model.encoder.norm.bias"],
        }
    plain, wrapped = tmp_path / "plain.safetensors", tmp_path / "wrapped.safetensors"
    save_file({name: value.clone().contiguous() for name, value in tensors.items()}, plain)
    save_file({wrapper + name: value.clone().contiguous() for name, value in tensors.items()}, wrapped)
    grid = (2, 12) if whose != "CRAFT" else None
    names = [translate(read_weights(file), file, grid) for file in (plain, wrapped)]
    assert names[1][1] == whose
    assert names[0][0].keys() == names[1][0].keys()
    assert any(name.startswith("model.encoder.") for name in names[1][0])


def test_a_model_compiled_block_by_block_is_the_same_one(tmp_path):
    task = finetune_task(128, mel_bins=32)
    tensors = {name.replace("attn.", "_orig_mod.attn."): value for name, value in task.state_dict().items()}
    save_file(tensors, tmp_path / "w.safetensors")
    report = load_weights(finetune_task(128, mel_bins=32), tmp_path / "w.safetensors")
    assert not report.fresh
    assert not report.dropped


@pytest.mark.parametrize("whose", ["CRAFT", "HF AST"])
def test_weights_of_a_large_model_are_taken_whole(tmp_path, whose):
    """Shapes alone: 24 blocks of 1024 take no memory on the device meta, nor in a file where all values are one."""
    with torch.device("meta"):
        tasks = [finetune_task(128, "model.size=large", "finetune.pool=cls") for _ in range(2)]
    tensors = tasks[0].state_dict() if whose == "CRAFT" else to_hf(tasks[0].state_dict(), 24, True)
    torch.save({name: torch.zeros(()).expand(value.shape) for name, value in tensors.items()}, tmp_path / "large.bin")
    assert (tmp_path / "large.bin").stat().st_size < 1e6
    report = load_weights(tasks[1], tmp_path / "large.bin", grid=tasks[1].model.grid)
    assert (report.origin, report.resized, report.fresh, report.dropped) == (whose, [], [], [])
    assert "model.encoder.blocks.23.mlp.fc2.weight" in report.loaded
    with pytest.raises(UserError, match=r"set model\.size"):
        load_weights(finetune_task(128, "finetune.pool=cls"), tmp_path / "large.bin", grid=tasks[1].model.grid)


@pytest.mark.parametrize("safe", [True, False])
def test_a_hugging_face_model_in_several_files_is_one(tmp_path, safe):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    model = ASTForAudioClassification(hf_config(128, 32, 16))
    model.save_pretrained(whole)
    model.save_pretrained(parts)
    (parts / "model.safetensors").unlink()
    tensors = list(load_file(whole / "model.safetensors").items())
    ending = "safetensors" if safe else "bin"
    stem = "model" if safe else "pytorch_model"
    places = {}
    for number in (1, 2):
        name = f"{stem}-0000{number}-of-00002.{ending}"
        part = dict(tensors[number - 1 :: 2])
        save_file(part, parts / name) if safe else torch.save(part, parts / name)
        places |= dict.fromkeys(part, name)
    index = parts / f"{stem}.{ending}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    tasks = [finetune_task(128, mel_bins=32) for _ in range(2)]
    for task, folder in zip(tasks, (whole, parts), strict=True):
        load_weights(task, weights_file(folder), grid=(2, 8))
    for one, other in zip(*(task.model.encoder.parameters() for task in tasks), strict=True):
        assert torch.equal(one, other)
    index.write_text(json.dumps({"weight_map": {"x": "../../secret.bin"}}))
    with pytest.raises(UserError, match="becomes a file name"):
        read_weights(weights_file(parts))


def test_a_pickle_with_settings_in_it_says_how_to_convert_it(tmp_path):
    file = tmp_path / "best.pth"
    torch.save({"model": {"weight": torch.ones(2)}, "args": Namespace(lr=0.1)}, file)
    with pytest.raises(UserError, match=r"holds argparse\.Namespace besides tensors") as refused:
        read_weights(file)
    (command,) = re.findall(r'python -c "(.*)"$', str(refused.value))
    subprocess.run([sys.executable, "-c", command], check=True)
    assert torch.equal(read_weights(tmp_path / "best.plain.pth")["weight"], torch.ones(2))


@pytest.mark.parametrize(
    ("names", "lacks"),
    [
        (["embeddings.cls_token", "embeddings.position_embeddings", "encoder.layer.0.output.dense.weight"],
         "embeddings.distillation_token"),  # a ViT for images
        (["v.cls_token", "v.pos_embed"], "v.dist_token"),
        (["cls_token", "pos_embed", "patch_embed.proj.weight"], "patch_embed.proj.bias"),
        (["embeddings.cls_token", "embeddings.distillation_token", "embeddings.position_embeddings",
          "encoder.layer.0.output.dense.weight"], "encoder.layer.0.attention.attention.query.weight"),
    ],
)  # fmt: skip
def test_a_part_of_a_model_says_what_it_lacks(tmp_path, names, lacks):
    tensors = {name: torch.zeros(1, 9, 8) for name in names}
    tensors |= {name: torch.zeros(8, 1, 16, 16) for name in names if name.endswith("proj.weight")}
    save_file(tensors, tmp_path / "part.safetensors")
    with pytest.raises(UserError, match=f"part.safetensors: lacks {lacks}: "):
        load_weights(finetune_task(80), tmp_path / "part.safetensors", grid=(1, 8))


def test_a_damaged_file_is_one_line(tmp_path):
    """Of a pickle in torch's older format, as SSAST's and AST's are; and of the settings beside Hugging Face's."""
    file = tmp_path / "old.pth"
    torch.save({"v.cls_token": torch.zeros(1, 1, 8), "v.pos_embed": torch.zeros(1, 9, 8)}, file,
               _use_new_zipfile_serialization=False)  # fmt: skip
    whole = file.read_bytes()
    for length in (0, 1, len(whole) // 4, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(UserError, match=str(file)):
            read_weights(file)
    ASTModel(hf_config(80, 128, 16)).save_pretrained(tmp_path / "hf")
    for text in ("{", "[1]", '{"num_mel_bins": null}'):
        (tmp_path / "hf" / "config.json").write_text(text)
        with pytest.raises(UserError, match=r"config\.json: .*directory is damaged"):
            load_weights(finetune_task(80), tmp_path / "hf" / "model.safetensors")
