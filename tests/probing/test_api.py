"""`import pipeline as craft`: every example of its docstrings, what its model hears, and training without DeepSpeed."""

import doctest
import importlib
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import torch

import pipeline as craft
from launchers import embed, predict
from pipeline.config import FinetuneRecipe
from pipeline.export import export_safetensors, open_exported
from tests.conftest import ROOT

DOCUMENTED = ("pipeline.api", "pipeline.data.fbank", "pipeline.data.loader")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """dog.wav, of less than a clip; audio/, four recordings; long.wav, of more than two clips."""
    home, rng = tmp_path_factory.mktemp("home"), np.random.default_rng(0)
    (home / "audio").mkdir()
    for name, seconds in (("dog.wav", 0.4), ("long.wav", 1.2), *((f"audio/{i}.wav", 0.5) for i in range(4))):
        soundfile.write(home / name, 0.1 * rng.normal(size=int(16000 * seconds)), 16000)
    return home


def test_every_example_of_the_docstrings_runs(folder, shards, finetuned, monkeypatch):
    monkeypatch.chdir(folder)
    names = {"craft": craft, "torch": torch, "shards": str(shards), "run": str(finetuned)}
    runner, finder = doctest.DocTestRunner(), doctest.DocTestFinder()
    for name in DOCUMENTED:
        examples = [test for test in finder.find(importlib.import_module(name), globs=dict(names)) if test.examples]
        assert examples, name
        for test in examples:
            assert runner.run(test).failed == 0, test.name


def test_the_import_alone_loads_nothing_heavy():
    code = (
        "import sys, pipeline as craft; names = dir(craft); assert {'load', 'Loader', 'fbank', 'task'} <= set(names)\n"
        "heavy = {'torch', 'deepspeed', 'numpy', 'mlflow', 'pydantic'} & sys.modules.keys(); assert not heavy, heavy\n"
        "craft.Loader, craft.task, craft.load, craft.build_shards\n"
        "assert 'torch' in sys.modules and not {'deepspeed', 'mlflow', 'pandas'} & sys.modules.keys()\n"
        "try: craft.lode\nexcept AttributeError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "module 'pipeline' has no attribute 'lode'\n"), done.stderr


def test_predictions_are_those_of_the_command(folder, finetuned, monkeypatch, capsys):
    model = craft.load(finetuned, device="cpu")
    for name in ("dog.wav", "long.wav"):
        words = ["predict.py", "--checkpoint", str(finetuned), str(folder / name), "--format", "csv", "--top", "3"]
        monkeypatch.setattr(sys, "argv", words)
        assert predict.main() == 0
        lines = [line.split(",") for line in capsys.readouterr().out.splitlines()[1:]]
        found = model.predict(folder / name, top=3)
        assert [(label, f"{score:.6f}") for label, score in found] == [(line[2], line[4]) for line in lines]
        samples, rate = soundfile.read(folder / name, dtype="float32")
        for given in (samples, torch.from_numpy(samples), np.stack([samples, samples], axis=1)):
            again = model.predict(given, top=3, sample_rate=rate)
            assert [label for label, _ in again] == [label for label, _ in found]
            assert [score for _, score in again] == pytest.approx([score for _, score in found], abs=1e-5)


def test_vectors_are_the_command_s_and_tokens_their_patches(folder, finetuned, pretrained, monkeypatch, tmp_path):
    import pyarrow.parquet as pq

    for run in (finetuned, pretrained):
        model = craft.load(run, device="cpu")
        words = ["embed.py", "--checkpoint", str(run), str(folder / "long.wav"), "--layers", "all",
                 "--out", str(tmp_path / run.parent.name), "--workers", "0"]  # fmt: skip
        monkeypatch.setattr(sys, "argv", words)
        assert embed.main() == 0
        (file,) = (tmp_path / run.parent.name).glob("*.parquet")
        rows = pq.read_table(file).to_pydict()
        each = np.array(rows["embedding"], np.float32).reshape(-1, 4, 192)  # window, layer
        vectors = model.embed(folder / "long.wav", layer="all")
        assert vectors.numpy() == pytest.approx(each.mean(axis=0), abs=1e-6)
        assert torch.equal(model.embed(folder / "long.wav", layer=2), vectors[1])
        assert torch.equal(model.embed(folder / "long.wav"), vectors[3])
        tokens = [take(folder / "long.wav", layer="2,4")
                  for take in (model.spectrogram_tokens, model.waveform_tokens)]  # fmt: skip
        assert tokens[0].shape == (3, 2, 8, 4, 96)  # windows, layers, patches of frequency and time
        means = torch.cat([some.mean(dim=(0, 2, 3)) for some in tokens], dim=1)
        assert torch.allclose(means, vectors[[1, 3]], atol=1e-5)


def test_an_export_alone_hears_as_its_run_does(folder, finetuned, make_run, tmp_path):
    export_safetensors(open_exported(finetuned), tmp_path / "model.safetensors")
    model = craft.load(tmp_path / "model.safetensors", device="cpu")
    assert model.predict(folder / "dog.wav") == craft.load(finetuned, device="cpu").predict(folder / "dog.wav")
    cls = craft.load(make_run(FinetuneRecipe, "finetune.method=ast", "finetune.pool=cls"), device="cpu")
    assert cls.embed(folder / "dog.wav", pool="cls").shape == (96,)
    with pytest.raises(craft.UserError, match="no wav stream, it has spec"):
        cls.waveform_tokens(folder / "dog.wav")


def test_wrong_calls_say_the_line_that_the_commands_say(folder, finetuned, pretrained, shards, tmp_path):
    model, loader = craft.load(finetuned, device="cpu"), craft.Loader(shards, batch_size=8)
    (folder / "no.wav").write_bytes(b"RIFF nothing")
    for call, said in (
        (lambda: craft.load(tmp_path / "nothing"), "nothing: there is no such file or directory$"),
        (lambda: craft.load(pretrained).predict(folder / "dog.wav"), "has no classifier; load a run of finetune.py"),
        (lambda: model.predict(folder / "gone.wav"), "gone.wav: "),
        (lambda: model.predict(folder / "no.wav"), "no.wav: "),
        (lambda: model.predict(np.zeros((2, 3, 4))), r"samples of shape \(2, 3, 4\)"),
        (lambda: model.predict(np.zeros(9), sample_rate=0), "samples at 0 Hz: give a rate from"),
        (lambda: model.predict(np.ones(2), sample_rate=96000), "too few for one at 16000 Hz"),
        (lambda: model.embed(folder / "dog.wav", pool="time-frequency"), "pool = 'time-frequency': there is no such"),
        (lambda: model.predict(""), "audio = '' names no path"),
        (lambda: craft.load(""), "source = '' names no path"),
        (lambda: model.predict(folder / "dog.wav", top=0), "top = 0 is not positive"),
        (lambda: model.embed(folder / "dog.wav", layer=9), "the encoder has 4 blocks"),
        (lambda: craft.Loader(tmp_path), "manifest.json"),
        (lambda: craft.build_shards(folder / "audio", tmp_path / "x", seconds=0), "--seconds 0 is out of range"),
        (lambda: craft.build_shards(folder / "audio", tmp_path / "x", colour=1), "see --help"),
        (lambda: craft.build_shards(folder / "audio", tmp_path / "x", dry_run=True), "build no whole set"),
        (lambda: craft.task("pretrain/craft_mea", loader), "pretrain/craft_mea: .* give a file of configs/"),
        (lambda: craft.task("finetune", loader, "finetune.methd=ast"), "did you mean finetune.method"),
    ):
        with pytest.raises(craft.UserError, match=said):
            call()
    assert not (tmp_path / "x" / "manifest.json").exists()


TRAINING = """
import sys
import torch
import pipeline as craft

def train(shards, recipe, epochs):
    torch.manual_seed(0)
    with craft.Loader(shards, batch_size=8) as loader:
        task = craft.task(recipe, loader, "model.size=micro", "model.stride=16")
        optimizer = torch.optim.AdamW(task.parameters(), lr=1e-3)
        for epoch in range(epochs):
            for batch in loader:
                losses = task(batch)
                losses.total.backward()
                optimizer.step()
                optimizer.zero_grad()
                if recipe.startswith("pretrain"):
                    craft.update_teacher(task, 0.9)
                print(float(losses.named["loss"]))

for recipe in sys.argv[2:]:
    train(sys.argv[1], recipe, 2)
assert "deepspeed" not in sys.modules
"""


@pytest.mark.parametrize(
    ("samples", "said"),
    [
        (np.zeros((1, 8000), np.float32), "more channels than samples; transpose them"),
        (torch.zeros(2, 8000), "more channels than samples; transpose them"),
        (np.zeros(8000, np.int16), "samples of type int16: .* divide int16 by 32768"),
        (torch.zeros(8000, 2, dtype=torch.int32), "samples of type int32"),
    ],
)
def test_samples_of_another_layout_or_scale_are_refused(finetuned, samples, said):
    model = craft.load(finetuned, device="cpu")
    for hear in (model.predict, model.embed):
        with pytest.raises(craft.UserError, match=said):
            hear(samples)


def test_samples_of_half_precision_are_heard(finetuned):
    model = craft.load(finetuned, device="cpu")
    samples = 0.1 * torch.randn(8000, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert model.predict(samples) == model.predict(samples.float().numpy())


def test_a_plain_loop_trains_without_deepspeed(shards):
    command = [sys.executable, "-c", TRAINING, shards, "pretrain/craft_mae", "finetune/esc50"]
    done = subprocess.run([*map(str, command)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    losses = np.array(done.stdout.split(), float).reshape(2, 17)  # 66 clips: 9 batches an epoch, then 8
    assert (losses[:, 9:].mean(axis=1) < losses[:, :9].mean(axis=1)).all()
