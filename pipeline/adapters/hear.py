"""HEAR 2021's common API (https://hearbenchmark.com/hear-api.html): a module that its tools import by name.

    python -m heareval.embeddings.runner pipeline.adapters.hear --model runs/craft --embeddings-dir embeddings/craft
    hear-validator pipeline.adapters.hear --model runs/craft

`--model-options` takes the other arguments of `load_model` as JSON. Its tools keep embeddings under the module's name
and these options: each checkpoint needs an `--embeddings-dir` of its own, or it gets the scores of the one before.
"""

import torch

from pipeline.adapters.columns import Columns
from pipeline.probing.frozen import Pool


class HearModel(Columns):
    """`Columns` with the attributes that HEAR asks for."""

    def __init__(self, checkpoint: str, layers: str, pool: Pool) -> None:
        super().__init__(checkpoint, layers, pool)
        self.scene_embedding_size = self.timestamp_embedding_size = self.width


def load_model(model_file_path: str = "", layers: str = "last", pool: Pool = "time_frequency") -> HearModel:
    """The model; its `sample_rate` is that of the audio.

    Args:
        model_file_path: Weights: see `frozen.open_frozen`; empty: CRAFT_CHECKPOINT.
        layers: See `Columns`.
        pool: See `Columns`.
    """
    return HearModel(model_file_path, layers, pool)


def get_timestamp_embeddings(audio: torch.Tensor, model: HearModel) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings float32 [n, t, d] and the centres of their columns in milliseconds [n, t], of audio [n, samples]."""
    vectors, starts = model(audio)
    centres = (starts + model.hop / 2) * 1000
    return vectors, centres.to(vectors.device).expand(len(vectors), -1)


def get_scene_embeddings(audio: torch.Tensor, model: HearModel) -> torch.Tensor:
    """The mean over time, float32 [n, d], of audio [n, samples]."""
    vectors: torch.Tensor = model(audio)[0]
    return vectors.mean(dim=1)
