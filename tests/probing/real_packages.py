"""The adapters in the real X-ARES and MTEB: `real_packages.py RUN_DIR`, run by test_adapters.py where both are there.

Not in the tests' own environment: polars, which MTEB needs, starts threads wherever it is found beside DeepSpeed, and
then `tests.ranks` cannot fork.
"""

import os
import sys

import datasets
import mteb
import numpy as np
import torch
from mteb.abstasks import AbsTaskClassification
from mteb.abstasks.task_metadata import TaskMetadata
from xares.audio_encoder_checker import check_audio_encoder
from xares.utils import attr_from_py_path

from pipeline.adapters.columns import CHECKPOINT
from pipeline.adapters.mteb import model_meta
from tests.probing.test_adapters import WIDTH, noise


def check_xares(run: str) -> None:
    encoder = attr_from_py_path("pipeline/adapters/xares.py", endswith="Encoder")()
    assert check_audio_encoder(encoder)
    assert (encoder.sampling_rate, encoder.output_dim, encoder.hop_size_in_ms) == (16000, WIDTH, 160)
    assert encoder(noise(2, 16000)).shape == (2, 8, WIDTH)


def check_mteb(run: str) -> None:
    """A task of its own abstract class on sounds that a pitch tells apart, through `mteb.evaluate`."""
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

    meta = model_meta(run)
    assert (meta.name, meta.embed_dim, meta.modalities) == ("craft/run", WIDTH, ["audio"])
    model = meta.load_model()
    assert model.mteb_model_meta.revision == meta.revision
    result = mteb.evaluate(model, [Pitch()], cache=None, co2_tracker=False)
    assert result.task_results[0].get_score() > 0.9
    vectors = np.random.default_rng(0).normal(size=(3, 4))
    similar = model.similarity(vectors, vectors)
    assert torch.allclose(similar.diagonal(), torch.ones(3, dtype=similar.dtype))
    assert torch.allclose(model.similarity_pairwise(vectors, vectors[::-1].copy()), similar.flip(1).diagonal())


if __name__ == "__main__":
    os.environ[CHECKPOINT] = sys.argv[1]
    check_xares(sys.argv[1])
    check_mteb(sys.argv[1])
