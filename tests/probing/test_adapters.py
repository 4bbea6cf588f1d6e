"""HEAR's API, and the real X-ARES and MTEB in an environment of their own, on a pretrained run."""

import importlib
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.adapters import hear
from pipeline.adapters.columns import CHECKPOINT, Columns
from pipeline.adapters.xares import CraftEncoder
from pipeline.errors import UserError
from pipeline.serving.scorer import batch_of
from tests.conftest import ROOT

WIDTH = 2 * 8 * 96  # streams, rows, D


def noise(clips: int, samples: int, seed: int = 0) -> torch.Tensor:
    return 0.1 * torch.randn(clips, samples, generator=torch.Generator().manual_seed(seed))


def test_hear_gets_a_vector_for_each_column_and_its_centre(pretrained):
    model = hear.load_model(str(pretrained))
    assert isinstance(model, torch.nn.Module)
    assert (model.sample_rate, model.scene_embedding_size, model.timestamp_embedding_size) == (16000, WIDTH, WIDTH)
    audio = noise(3, 16000 + 4000)  # two clips of half a second and a quarter
    vectors, centres = hear.get_timestamp_embeddings(audio, model)
    assert vectors.shape == (*centres.shape, WIDTH) == (3, 10, WIDTH)  # half a second has four columns
    expected = [1000 * (start + column * 0.16 + 0.08) for start, count in ((0, 4), (0.5, 4), (1, 2))
                for column in range(count)]  # fmt: skip
    assert centres[0].tolist() == pytest.approx(expected)
    assert vectors.dtype == torch.float32
    torch.testing.assert_close(hear.get_scene_embeddings(audio, model), vectors.mean(dim=1))
    frozen = model.frozen
    tokens = frozen(batch_of([audio[1, 8000:16000].numpy()], frozen.spec, torch.device("cpu")), [4])
    rows = torch.unflatten(tokens["wav", 4][0, 2:], 0, (8, 4))  # frequency, time
    torch.testing.assert_close(vectors[1, 5, WIDTH // 2 :], rows[:, 1].flatten(), rtol=1e-4, atol=1e-5)
    again, _ = hear.get_timestamp_embeddings(audio[1:2], model)  # whatever else is in the batch
    torch.testing.assert_close(again[0], vectors[1], rtol=1e-4, atol=1e-5)


def test_options_and_the_environment_say_what_is_embedded(pretrained, monkeypatch):
    monkeypatch.delenv(CHECKPOINT, raising=False)
    with pytest.raises(UserError, match=f"no weights are named; set {CHECKPOINT}"):
        hear.load_model()
    monkeypatch.setenv(CHECKPOINT, str(pretrained))
    model = hear.load_model(layers="1,4", pool="mean")
    assert model.scene_embedding_size == 2 * 2 * 96
    assert hear.get_scene_embeddings(noise(1, 100), model).shape == (1, 2 * 2 * 96)
    last = Columns(str(pretrained), pool="mean")(noise(1, 9000))[0]
    both = model(noise(1, 9000))[0]
    assert torch.equal(both[..., 2 * 96 :], last)  # layer after layer


def test_a_column_that_begins_where_the_audio_ends_is_left_out():
    """In float32 5 x 0.16 s is less than 0.8 s: a vector of padding would be the last one, and in the mean."""
    model = hear.load_model("random:micro")
    assert model.hop == pytest.approx(0.16)
    for columns in (1, 5, 9, 10, 15):
        vectors, centres = hear.get_timestamp_embeddings(noise(1, columns * 2560), model)
        assert vectors.shape[1] == centres.shape[1] == columns
        assert hear.get_timestamp_embeddings(noise(1, columns * 2560 + 1), model)[0].shape[1] == columns + 1
    assert centres.dtype == torch.float32


@pytest.fixture
def mteb(monkeypatch):
    """The adapter without MTEB."""
    made = SimpleNamespace(create_empty=lambda values: SimpleNamespace(**values))
    names = {"mteb": {}, "mteb.models": {"ModelMeta": made}, "mteb.models.modality_collators": {"AudioCollator": None},
             "mteb.models.model_meta": {"ScoringFunction": SimpleNamespace(COSINE="cosine")}}  # fmt: skip
    for name, content in names.items():
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
        vars(sys.modules[name]).update(content)
    monkeypatch.delitem(sys.modules, "pipeline.adapters.mteb", raising=False)
    adapter = importlib.import_module("pipeline.adapters.mteb")
    monkeypatch.delitem(sys.modules, "pipeline.adapters.mteb")
    return adapter


def test_what_benchmarks_keep_is_not_taken_for_that_of_other_weights_or_layers(mteb, pretrained):
    """X-ARES keeps features under the name of the encoder's class, MTEB results under name and revision."""
    one, again, other = (CraftEncoder(str(name)) for name in (pretrained, pretrained, f"random:{pretrained}"))
    assert type(one).__name__ == type(again).__name__ != type(other).__name__
    assert all(type(encoder).__name__.endswith("Encoder") and isinstance(encoder, CraftEncoder)
               for encoder in (one, other))  # fmt: skip
    assert one(noise(1, 8000)).shape == (1, 4, WIDTH)
    options = ({}, {"layers": "all"}, {"layers": "1"}, {"layers": "1", "pool": "mean"})
    revisions = [mteb.model_meta(str(pretrained), **some).revision for some in options]
    assert len(set(revisions)) == len(options)
    assert revisions[0] == one.frozen.digest[:16]


def test_similarities_take_no_more_memory_than_vectors_and_results(mteb):
    """A retrieval asks for those of 50,000 documents at once: n m d numbers would be terabytes."""
    sizes = []

    class Watched(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            made = func(*args, **(kwargs or {}))
            sizes.append(made.numel())
            return made

    one, other = noise(30, 64), noise(40, 64, seed=1)
    with Watched():
        found = mteb.CraftAudioEncoder.similarity(None, one.numpy(), other.numpy())
    assert max(sizes) == 40 * 64
    torch.testing.assert_close(found, torch.cosine_similarity(one[:, None], other[None], dim=2))


@pytest.mark.slow
def test_the_real_x_ares_and_mteb_evaluate_a_run(pretrained, tmp_path):
    """Installed into an environment that sees this one's packages: what they need besides is a few dozen megabytes."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    site = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True,
        text=True,
        check=True,
    )
    paths = {sysconfig.get_path(name) for name in ("purelib", "platlib")}
    (Path(site.stdout.strip()) / "tests.pth").write_text("\n".join(sorted(paths)))
    subprocess.run([python, "-m", "pip", "install", "-q", "mteb>=2.8", "xares>=0.1.3"], check=True)
    script = ROOT / "tests" / "probing" / "real_packages.py"
    env = os.environ | {"PYTHONPATH": str(ROOT), "MTEB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    ran = subprocess.run([python, script, pretrained], check=False, cwd=ROOT, env=env, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-4000:]
