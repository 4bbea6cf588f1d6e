"""Exports give the outputs of the run they come from, in transformers, to 1e-5."""

import resource
import subprocess
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.torch import save_file
from scipy.special import expit, softmax
from transformers import ASTFeatureExtractor, ASTForAudioClassification, ASTModel

from pipeline.config import FinetuneRecipe, PretrainRecipe
from pipeline.data.fbank import fbank, pad_frames, padded_frames
from pipeline.data.manifest import Label
from pipeline.data.spec import DataSpec
from pipeline.errors import UserError
from pipeline.export import HF_FILES, check_place, export_hf, export_onnx, export_safetensors, open_exported
from pipeline.model.heads import stream_means
from pipeline.model.weights import load_weights
from pipeline.recipes import dump_recipe, load_recipe
from pipeline.serving.scorer import load_scorer
from pipeline.tasks import FinetuneTask, PretrainTask
from tests.ranks import run_script

MICRO = ["model.size=micro"]
SAMPLES = 12000
PADDED = (f"; cut or zero-pad recordings to {SAMPLES} samples before its feature extractor, which pads otherwise than "
          "training did")  # fmt: skip
SPEC = DataSpec(
    sample_rate=16000, samples=SAMPLES, mel_bins=128, frames=padded_frames(SAMPLES / 16000), mean=-7.0, std=4.0,
    labels=[Label(id=f"/m/{i}", name=f"sound {i}") for i in range(6)], single_label=False, digest="0",
)  # fmt: skip


def make_run(run_dir, kind, *words):
    """A run directory as the trainer leaves it, of random weights."""
    recipe = load_recipe(kind, [], [*MICRO, *words])
    torch.manual_seed(0)
    if kind is FinetuneRecipe:
        task = FinetuneTask(recipe, SPEC.mel_bins, SPEC.frames, len(SPEC.labels), SPEC.single_label)
    else:
        task = PretrainTask(recipe, SPEC.mel_bins, SPEC.frames)
    for name, parameter in task.named_parameters():
        if "msae" not in name:
            torch.nn.init.normal_(parameter, mean=float("norm" in name and name.endswith("weight")), std=0.05)
    folder = run_dir / "checkpoints" / "step-00000001"
    folder.mkdir(parents=True)
    save_file(task.state_dict(), folder / "weights.safetensors")
    (folder / "complete").touch()
    (run_dir / "checkpoints" / "latest").write_text(folder.name)
    (run_dir / "config.yaml").write_text(dump_recipe(recipe))
    SPEC.save(run_dir)
    return task.eval()


def waveforms() -> torch.Tensor:
    time = torch.arange(SAMPLES) / 16000
    noise = torch.randn(3, SAMPLES, generator=torch.Generator().manual_seed(1))
    return 0.2 * torch.sin(2 * torch.pi * torch.tensor([[200.0], [900.0], [3000.0]]) * time) + 0.02 * noise


def features() -> torch.Tensor:
    return (pad_frames(fbank(waveforms()), SPEC.frames) - SPEC.mean) / (2 * SPEC.std)


@torch.no_grad()
@pytest.mark.parametrize("method", ["pswacl", "craft_mae", "craft_latent", "craft_mosaic"])
def test_safetensors_hold_everything_and_load_back(tmp_path, method):
    word = f"pretrain.method={method}"
    task = make_run(tmp_path / "run", PretrainRecipe, word)
    export_safetensors(open_exported(tmp_path / "run"), tmp_path / "one.safetensors")
    again = PretrainTask(load_recipe(PretrainRecipe, [], [*MICRO, word]), SPEC.mel_bins, SPEC.frames)
    report = load_weights(again, tmp_path / "one.safetensors")
    assert (report.resized, report.fresh, report.dropped) == ([], [], [])
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in task.state_dict().items())


@torch.no_grad()
def test_transformers_classifies_the_same_with_a_cls_head(tmp_path):
    task = make_run(tmp_path / "run", FinetuneRecipe, "finetune.method=ast", "finetune.pool=cls")
    assert export_hf(open_exported(tmp_path / "run"), tmp_path / "hf") == f"ASTForAudioClassification{PADDED}"
    theirs, info = ASTForAudioClassification.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert theirs.config.id2label[3] == "sound 3"
    ours = task.classifier(task.model(features(), None))
    torch.testing.assert_close(theirs.eval()(features()).logits, ours, rtol=0, atol=1e-5)
    extracted = ASTFeatureExtractor.from_pretrained(tmp_path / "hf")(
        list(waveforms().numpy()), sampling_rate=16000, return_tensors="pt"
    )["input_values"]
    torch.testing.assert_close(extracted, features(), rtol=0, atol=1e-2)


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "words", "left"),
    [
        (FinetuneRecipe, (), "classifier (HF pools cls and dist of one spectrogram), waveform side"),
        (PretrainRecipe, ("model.modality_embedding=true",), "waveform side, pretraining heads"),
        (PretrainRecipe, ("pretrain.method=craft_mae",), "waveform side, pretraining heads"),
        (PretrainRecipe, ("pretrain.method=audio_mosaic",), "pretraining heads"),
    ],
)
def test_transformers_encodes_the_same_with_a_backbone(tmp_path, kind, words, left):
    """What is left out is said. Without bottlenecks, as HF's encoder has none."""
    task = make_run(tmp_path / "run", kind, *words)
    assert export_hf(open_exported(tmp_path / "run"), tmp_path / "hf") == f"ASTModel; left out: {left}{PADDED}"
    theirs = ASTModel.from_pretrained(tmp_path / "hf").eval()
    task.model.encoder.bottlenecks = None
    ours = task.model(features(), None).spec[0]
    torch.testing.assert_close(theirs(features()).last_hidden_state[:, 2:], ours, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "word", "outputs"),
    [
        (FinetuneRecipe, "finetune.method=swab", ["logits", "embedding"]),
        (FinetuneRecipe, "finetune.pool=cls", ["logits", "embedding"]),
        (PretrainRecipe, "pretrain.method=wapt", ["embedding"]),
        (FinetuneRecipe, "model.norm=group", ["logits", "embedding"]),
        (FinetuneRecipe, "model.frontend=strided", ["logits", "embedding"]),
        (FinetuneRecipe, "model.frontend=sinc model.wav_depth=2 model.positions=rotary", ["logits", "embedding"]),
        (PretrainRecipe, "pretrain.method=craft_mae", ["embedding"]),
    ],
)
def test_onnxruntime_gives_the_same_for_any_batch(tmp_path, kind, word, outputs):
    task = make_run(tmp_path / "run", kind, *word.split())
    export_onnx(open_exported(tmp_path / "run"), tmp_path / "m.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"))
    assert [output.name for output in session.get_outputs()] == outputs
    assert DataSpec.model_validate_json(session.get_modelmeta().custom_metadata_map["data"]) == SPEC
    names = [given.name for given in session.get_inputs()]
    for batch in (1, 2, 5):
        rows = torch.arange(batch) % 3
        inputs = {"fbank": features(), "waveform": waveforms(), "length": torch.tensor([SAMPLES, 5000, 1])}
        given = {name: inputs[name][rows] for name in names}
        wav_map = task.model.waveform_map(given["waveform"], given.get("length"))
        encoded = task.model(given.get("fbank"), wav_map)
        ours = [torch.cat(stream_means(encoded), dim=1)]
        ours = [task.classifier(encoded), *ours] if kind is FinetuneRecipe else ours
        theirs = session.run(None, {name: tensor.numpy() for name, tensor in given.items()})
        for expected, found in zip(ours, theirs, strict=True):
            torch.testing.assert_close(torch.from_numpy(found), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("words", ["ast", "wast", "wast finetune.loss=bce", "swast", "swab",
                                   "swab model.frontend=sinc model.norm=none"])  # fmt: skip
def test_onnxruntime_hears_samples(tmp_path, words):
    """Raw samples of several lengths as predict.py reads them; no other code of ours than the graph."""
    single = {"single_label": words.startswith("wast")}
    make_run(tmp_path / "run", FinetuneRecipe, *f"finetune.method={words}".split())
    spec = SPEC.model_copy(update=single)
    spec.save(tmp_path / "run")
    export_onnx(open_exported(tmp_path / "run"), tmp_path / "m.onnx", waveform=True)
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"))
    assert [given.name for given in session.get_inputs()] == ["waveform", "length"]
    assert [output.name for output in session.get_outputs()] == ["probabilities", "logits", "embedding"]
    whole = list(waveforms().numpy())
    noise = 0.01 * torch.randn(20000, generator=torch.Generator().manual_seed(2)).numpy()
    clips = [whole[0], whole[1][:5000] + 0.3, 9 * whole[2], noise, 0 * whole[0][:700]]  # an offset, clipping, silence
    scorer = load_scorer(tmp_path / "run")
    for part in (clips, clips[:1], clips[1:2]):
        samples = np.zeros((len(part), max(map(len, part))), np.float32)
        for row, clip in zip(samples, part, strict=True):
            row[: len(clip)] = clip
        lengths = np.array([len(clip) for clip in part])
        found = session.run(None, {"waveform": samples, "length": lengths})
        expected = scorer.hear([clip[: spec.samples] for clip in part])
        np.testing.assert_allclose(found[0], expected[0], rtol=0, atol=2e-5)
        trained = softmax(found[1], axis=1) if words == "wast" else expit(found[1])
        np.testing.assert_allclose(found[0], trained, rtol=0, atol=1e-6)
        np.testing.assert_allclose(found[2], expected[1], rtol=0, atol=1e-4)


def export(*words: object) -> subprocess.CompletedProcess[str]:
    return run_script("launchers/export.py", *words)


def test_an_export_replaces_nothing_but_an_export(tmp_path):
    """And all places are tried before the run is read: here it has no weights."""
    run = tmp_path / "run"
    make_run(run, FinetuneRecipe, "finetune.method=ast")
    theirs = tmp_path / "ast"
    theirs.mkdir()
    for name in HF_FILES:  # somebody's own Hugging Face model has the same three files
        (theirs / name).write_text('{"model_type": "audio-spectrogram-transformer"}')
    (tmp_path / "file").write_text("mine")
    before = snapshot(tmp_path)
    weights = run / "checkpoints" / "step-00000001" / "weights.safetensors"
    for files, places in (
        (HF_FILES, (theirs, tmp_path, run, run / "checkpoints", tmp_path / "file", "/proc/nowhere/hf")),
        (None, (theirs, weights, run / "config.yaml", run / "checkpoints" / "x", "/proc/nowhere/x")),
    ):
        for place in places:
            with pytest.raises(UserError, match=f"--out {place}: "):
                check_place(run, Path(place), files)
    with pytest.raises(UserError, match=f"--out {theirs}: holds what this command did not make"):
        export_hf(open_exported(run), theirs)
    weights.rename(tmp_path / "weights")
    done = export("--checkpoint", run, "--format", "hf", "--out", theirs)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert f"--out {theirs}: holds what this command did not make" in done.stderr
    (tmp_path / "weights").rename(weights)
    assert snapshot(tmp_path) == before
    for out in (run / "export" / "hf", tmp_path / "new" / "hf"):
        for _ in range(2):
            export_hf(open_exported(run), out)
        check_place(run, out, HF_FILES)
        assert {path.name for path in out.iterdir()} == HF_FILES
        assert [path.name for path in out.parent.iterdir()] == ["hf"]


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_export_that_fails_leaves_the_earlier_one(tmp_path):
    make_run(tmp_path / "run", FinetuneRecipe, "finetune.method=ast", "finetune.pool=cls")
    run, file = open_exported(tmp_path / "run"), tmp_path / "m.safetensors"
    for write, out in ((export_safetensors, file), (export_hf, tmp_path / "hf")):
        write(run, out)
        before = snapshot(tmp_path)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))  # as a disk that fills
        try:
            with pytest.raises(UserError, match=str(out)):
                write(run, out)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert snapshot(tmp_path) == before


def test_what_cannot_be_exported_says_why(tmp_path):
    make_run(tmp_path / "run", PretrainRecipe, "pretrain.method=wapt")
    run = open_exported(tmp_path / "run")
    with pytest.raises(UserError, match="no spectrogram side"):
        export_hf(run, tmp_path / "hf")
    done = export("--checkpoint", tmp_path / "run", "--format", "safetensors")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "export" / "model.safetensors").is_file()
    done = export("--checkpoint", tmp_path / "run", "--format", "hf")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
