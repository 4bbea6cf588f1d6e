"""HEAR's API, and the real X-ARES and MTEB where they are installed, on a pretrained run.

They are no requirements of the tests: polars, which MTEB needs, starts threads wherever it is found beside DeepSpeed,
and then `tests.ranks` cannot fork. `pip install --target DIR mteb xares` and PYTHONPATH=DIR run these tests.
"""

import importlib

import numpy as np
import pytest
import torch

from pipeline.adapters import hear
from pipeline.adapters.columns import CHECKPOINT, Columns
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


def test_xares_finds_the_encoder_and_its_checker_accepts_it(pretrained, monkeypatch):
    pytest.importorskip("xares", reason="needs the package xares")
    from xares.audio_encoder_checker import check_audio_encoder
    from xares.utils import attr_from_py_path

    monkeypatch.setenv(CHECKPOINT, str(pretrained))
    monkeypatch.chdir(ROOT)
    encoder = attr_from_py_path("pipeline/adapters/xares.py", endswith="Encoder")()
    assert check_audio_encoder(encoder)
    assert (encoder.sampling_rate, encoder.output_dim, encoder.hop_size_in_ms) == (16000, WIDTH, 160)
    assert encoder(noise(2, 16000)).shape == (2, 8, WIDTH)


@pytest.mark.slow
def test_mteb_evaluates_a_classification_of_sounds(pretrained, tmp_path, monkeypatch):
    """A task of its own abstract class on sounds that a pitch tells apart, through `mteb.evaluate`."""
    mteb = pytest.importorskip("mteb", reason="needs the package mteb-core")
    datasets = importlib.import_module("datasets")
    from mteb.abstasks import AbsTaskClassification
    from mteb.abstasks.task_metadata import TaskMetadata

    from pipeline.adapters.mteb import model_meta

    def sounds(count: int, seed: int):
        rng, rows = np.random.default_rng(seed), {"audio": [], "label": []}
        for number in range(count):
            seconds = np.arange(int(8000 * rng.uniform(0.3, 0.8))) / 8000  # MTEB resamples
            tone = np.sin(2 * np.pi * (200, 3000)[number % 2] * seconds) + rng.normal(0, 0.3, len(seconds))
            rows["audio"].append({"array": (0.1 * tone).tolist(), "sampling_rate": 8000})
            rows["label"].append(number % 2)
        return datasets.Dataset.from_dict(rows).with_format("numpy")

    class Pitch(AbsTaskClassification):
        metadata = TaskMetadata(
            name="CraftPitch", description="Low or high.", reference=None, type="AudioClassification", category="a2c",
            dataset={"path": "none", "revision": "0"}, eval_splits=["test"], eval_langs=["zxx-Zxxx"], date=None,
            main_score="accuracy", modalities=["audio"], domains=None, task_subtypes=None, license=None,
            annotations_creators=None, dialect=None, sample_creation=None, bibtex_citation=None,
        )  # fmt: skip
        input_column_name, n_experiments, samples_per_label = "audio", 2, 4

        def load_data(self, *args, **kwargs) -> None:
            self.dataset = datasets.DatasetDict(train=sounds(20, 0), test=sounds(12, 1))
            self.data_loaded = True

    meta = model_meta(str(pretrained))
    assert (meta.name, meta.embed_dim, meta.modalities) == ("craft/run", WIDTH, ["audio"])
    model = meta.load_model()
    assert model.mteb_model_meta.revision == meta.revision
    monkeypatch.setenv("MTEB_CACHE", str(tmp_path))
    result = mteb.evaluate(model, [Pitch()], cache=None, co2_tracker=False)
    assert result.task_results[0].get_score() > 0.9
    vectors = np.random.default_rng(0).normal(size=(3, 4))
    similar = model.similarity(vectors, vectors)
    assert torch.allclose(similar.diagonal(), torch.ones(3, dtype=similar.dtype))
    assert torch.allclose(model.similarity_pairwise(vectors, vectors[::-1].copy()), similar.flip(1).diagonal())
