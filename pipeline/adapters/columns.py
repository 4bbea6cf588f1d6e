"""Recordings of any length -> frozen vectors over time, as benchmarks ask for them.

In: waveforms at 16 kHz. Out: a vector for each column of patches.

A recording is cut into clips of the encoder's length, one after the other; the last one is zero-padded and its columns
behind the audio are left out. Each goes the way of the shards: DC removed, rounded to int16.
"""

import os

import torch
from torch import nn

from pipeline.errors import UserError
from pipeline.probing.features import BATCH
from pipeline.probing.frozen import Pool, open_frozen
from pipeline.serving.embed import ROUNDING, Embedder

CHECKPOINT = "CRAFT_CHECKPOINT"


class Columns(nn.Module):
    """A frozen encoder as a function of waveforms.

    Args:
        checkpoint: See `frozen.open_frozen`; empty: what the environment's CRAFT_CHECKPOINT names.
        layers: "last", "all" or "1,2": the vectors of several stand one after the other.
        pool: "time_frequency" or "mean", over the frequency patches of a column.

    Attributes:
        sample_rate: Hz of the waveforms.
        hop: Seconds between columns.
        width: Numbers of a vector.

    Raises:
        UserError: no checkpoint is named, or it cannot be opened.
    """

    def __init__(self, checkpoint: str = "", layers: str = "last", pool: Pool = "time_frequency") -> None:
        super().__init__()
        checkpoint = checkpoint or os.environ.get(CHECKPOINT, "")
        if not checkpoint:
            raise UserError(f"no weights are named; set {CHECKPOINT} to a run directory or a file of weights")
        self.frozen = open_frozen(checkpoint)
        self._embedder = Embedder(self.frozen, self.frozen.layers(layers), pool, self.frozen.streams, over_time=False)
        self.sample_rate = self.frozen.spec.sample_rate
        self.hop = self._embedder.hop
        self.width = self._embedder.width * len(self._embedder.layers)

    def forward(self, audio: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Vectors over time of waveforms of one length.

        Args:
            audio: [B, samples] in [-1, 1], at least one sample.

        Returns:
            float32 [B, columns, width] on the device of the weights; the seconds in which columns begin, [columns].
        """
        samples = self.frozen.spec.samples
        found, starts = [], []
        for first in range(0, audio.shape[1], samples):
            clips = list(audio[:, first : first + samples].detach().cpu().float().numpy())
            parts = [
                torch.from_numpy(self._embedder.hear(clips[i : i + BATCH])[1]) for i in range(0, len(clips), BATCH)
            ]
            vectors = torch.cat(parts)  # [B, layers, columns, width]
            begin = torch.arange(vectors.shape[2], dtype=torch.float64) * self.hop
            kept = (begin < len(clips[0]) / self.sample_rate - ROUNDING) | (begin == 0)
            found.append(vectors[:, :, kept].transpose(1, 2).flatten(2))
            starts.append((first / self.sample_rate + begin[kept]).float())
        return torch.cat(found, dim=1).to(next(self.frozen.parameters()).device), torch.cat(starts)
