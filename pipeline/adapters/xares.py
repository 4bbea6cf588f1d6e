"""X-ARES's encoder (https://github.com/jimbozhang/xares): a class that its tools take by the path of this file.

CRAFT_CHECKPOINT=runs/craft python -m xares.run --max-jobs 1 pipeline/adapters/xares.py TASKS
"""

import torch

from pipeline.adapters.columns import Columns


class CraftEncoder(Columns):
    """`Columns` with the attributes that X-ARES asks for; the weights are those that CRAFT_CHECKPOINT names."""

    def __init__(self, checkpoint: str = "") -> None:
        super().__init__(checkpoint)
        # X-ARES keeps what it encoded and trained under the class's name, and takes it for that of any other weights.
        self.__class__ = type(f"Craft{self.frozen.digest[:16]}Encoder", (CraftEncoder,), {})
        self.sampling_rate, self.output_dim = self.sample_rate, self.width
        self.hop_size_in_ms = round(1000 * self.hop)

    def forward(self, audio: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """float32 [B, columns, output_dim] of audio [B, samples]."""
        vectors, _ = super().forward(audio)
        return vectors
