"""MTEB's audio tasks (https://github.com/embeddings-benchmark/mteb, 2.8 and later): an encoder with its metadata.

import mteb
from pipeline.adapters.mteb import model_meta
mteb.evaluate(model_meta("runs/craft").load_model(), mteb.get_tasks(modalities=["audio"]))
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mteb.models import ModelMeta
from mteb.models.modality_collators import AudioCollator
from mteb.models.model_meta import ScoringFunction
from torch.nn.functional import cosine_similarity, normalize

from pipeline.adapters.columns import Columns


class CraftAudioEncoder:
    """Mean over time of `Columns`; similar is what has a small angle.

    Args:
        model_name: Of the metadata; names nothing here.
        revision: Likewise.
        device: To compute on; None: a GPU where there is one.
        checkpoint: See `Columns`.
        kwargs: Its other arguments.
    """

    mteb_model_meta: Any = None  # set by `ModelMeta.load_model`

    def __init__(
        self, model_name: str, revision: str | None = None, device: str | None = None, checkpoint: str = "",
        **kwargs: Any,
    ) -> None:  # fmt: skip
        self.columns = Columns(checkpoint, **kwargs).to(device or ("cuda" if torch.cuda.is_available() else "cpu"))

    def encode(self, inputs: Any, **about: Any) -> np.ndarray:
        """Of a DataLoader of rows with "audio", resampled by MTEB's own collator: float32 [n, width].

        Args:
            inputs: Batches of MTEB.
            about: Task, split and prompts, which change nothing.
        """
        inputs.collate_fn = AudioCollator(target_sampling_rate=self.columns.sample_rate)
        return np.concatenate([self._encode(batch["audio"]) for batch in inputs])

    def _encode(self, items: Iterable[dict[str, Any]]) -> np.ndarray:
        waveforms = [torch.as_tensor(np.asarray(item["array"], np.float32)) for item in items]
        return np.stack([self.columns(one[None])[0].mean(dim=1)[0].cpu().numpy() for one in waveforms])

    def similarity(self, one: Any, other: Any) -> torch.Tensor:
        """Cosines [n, m] of vectors [n, d] and [m, d]."""
        return normalize(torch.as_tensor(one)) @ normalize(torch.as_tensor(other)).T  # nothing of n m d numbers

    def similarity_pairwise(self, one: Any, other: Any) -> torch.Tensor:
        """Cosines [n] of vectors [n, d] and [n, d]."""
        return cosine_similarity(torch.as_tensor(one), torch.as_tensor(other), dim=1)


def model_meta(checkpoint: str, **kwargs: Any) -> ModelMeta:
    """The metadata that MTEB keeps with results.

    Args:
        checkpoint: See `Columns`.
        kwargs: Its other arguments.
    """
    columns = Columns(checkpoint, **kwargs)
    # MTEB keeps results under name and revision, and takes them for those of any other arguments.
    revision = "-".join([columns.frozen.digest[:16], *(f"{key}={value}" for key, value in sorted(kwargs.items()))])
    return ModelMeta.create_empty({
        "loader": CraftAudioEncoder,
        "loader_kwargs": {"checkpoint": checkpoint, **kwargs},
        "name": f"craft/{Path(checkpoint).name.replace(':', '-')}",
        "revision": revision,
        "n_parameters": sum(parameter.numel() for parameter in columns.parameters()),
        "embed_dim": columns.width,
        "framework": ["PyTorch"],
        "modalities": ["audio"],
        "similarity_fn_name": ScoringFunction.COSINE,
        "use_instructions": False,
    })  # fmt: skip
