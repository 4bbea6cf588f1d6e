"""The CRAFT network: embeddings, token sequences and the shared encoder.

In: fbank [B, T, M] and/or waveform [B, L], optional masks. Out: `Encoded` patch tokens.

Scale: the cost of a clip is fixed by (size, stride, streams) alone. No parameter stands directly on a
module that calls others: ZeRO-3 gathers a module's own weights around its forward, and outputs
that are dataclasses hide tensors from its hooks.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from pipeline.config import ModelConfig
from pipeline.errors import UserError
from pipeline.flow import Encoded
from pipeline.model.embed import (
    SAMPLES_PER_FRAME,
    MultiScaleEmbedding,
    PatchEmbedding,
    SpecialTokens,
    TokenSequence,
    patch_grid,
)
from pipeline.model.encoder import Encoder, run_block


@dataclass(frozen=True)
class Size:
    """Width D, depth and heads of a backbone."""

    width: int
    depth: int
    heads: int


SIZES: dict[str, Size] = {
    "micro": Size(96, 4, 3),  # for laptops and tests
    "tiny": Size(192, 12, 3),
    "small": Size(384, 12, 6),
    "base": Size(768, 12, 12),
}


@dataclass(frozen=True)
class Streams:
    """What a network reads and how its streams meet; from a row of `pipeline.methods` and the data.

    Attributes:
        spec: The spectrogram is encoded.
        wav: The waveform is encoded.
        mel_bins: M.
        frames: T.
        masked_spec: Spectrogram patches may be masked.
        masked_wav: Waveform patches may be masked.
        bottlenecks: F; 0: no fusion.
        fusion_layer: First fusing block; -1: a third of the depth.
        pool: The tokens that are returned: "mean", the patches, or "cls", cls and dist.
    """

    spec: bool
    wav: bool
    masked_spec: bool = False
    masked_wav: bool = False
    mel_bins: int = 128
    frames: int = 1024
    bottlenecks: int = 0
    fusion_layer: int = -1
    pool: str = "mean"


class Craft(nn.Module):
    """Both representations through one backbone (paper Section 3, Figure 1).

    Args:
        config: Model settings.
        streams: Which representations, and the shape of the data.

    Attributes:
        grid: Patches of the spectrogram along frequency and time.
        wav_grid: Patches of the MSAE map along channels and time; `grid` where it has M channels.

    Raises:
        UserError: MSAE settings that do not fit each other or the mel bins; a patch larger than the map.
    """

    def __init__(self, config: ModelConfig, streams: Streams) -> None:
        super().__init__()
        _check(config, streams)
        size = SIZES[config.size]
        self.config = config
        self.streams = streams
        self.grid = patch_grid(streams.mel_bins, streams.frames, config.patch, config.stride)
        self.wav_grid = patch_grid(sum(config.channels), streams.frames, config.patch, config.stride)
        self.special = SpecialTokens(size.width)
        if streams.wav:
            self.msae = MultiScaleEmbedding(
                config.kernels, config.kernel_strides, config.channels, config.norm, config.activation
            )
        if streams.spec or config.shared_patch:
            self.spec_patch = PatchEmbedding(size.width, config.patch, config.stride)
        if streams.wav and not config.shared_patch:
            self.wav_patch = PatchEmbedding(size.width, config.patch, config.stride)
        if streams.spec:
            self.spec_tokens = TokenSequence(size.width, self.grid, config.modality_embedding, streams.masked_spec)
        if streams.wav:
            self.wav_tokens = TokenSequence(size.width, self.wav_grid, config.modality_embedding, streams.masked_wav)
        self.encoder = Encoder(
            size.width,
            size.depth,
            size.heads,
            bottlenecks=streams.bottlenecks,
            fusion_layer=size.depth // 3 if streams.fusion_layer < 0 else streams.fusion_layer,
            recompute=config.checkpoint_activations,
        )
        self.apply(initialise_linear)

    @property
    def width(self) -> int:
        """D."""
        return SIZES[self.config.size].width

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights; inputs are cast to it (bf16 and fp16 engines)."""
        return self.encoder.norm.weight.dtype

    def waveform_map(self, waveform: torch.Tensor, length: torch.Tensor | None = None) -> torch.Tensor:
        """MSAE of waveforms cut or zero-padded to T * 160 samples: [B, L] -> [B, channels, T].

        Args:
            waveform: [B, L].
            length: int64 [B], samples of audio before the padding; None: L.
        """
        samples = self.streams.frames * SAMPLES_PER_FRAME
        x = F.pad(waveform, (0, samples - waveform.shape[-1])).to(self.dtype)
        if length is None:
            length = torch.full((len(waveform),), waveform.shape[-1], device=waveform.device)
        return run_block(self.msae, x, length, recompute=self.config.checkpoint_activations)

    def forward(
        self,
        fbank: torch.Tensor | None,
        wav_map: torch.Tensor | None,
        spec_masks: Sequence[torch.Tensor | None] = (None,),
        wav_masks: Sequence[torch.Tensor | None] = (None,),
        drop: bool = False,
    ) -> Encoded:
        """Encodes the given representations in one pass of the encoder.

        Args:
            fbank: [B, T, M], normalised; None: no spectrogram stream.
            wav_map: [B, channels, T] of `waveform_map`; None: no waveform stream.
            spec_masks: One entry for each time that the spectrogram is encoded: int64 [B, K], indices of
                masked patches, or None.
            wav_masks: Likewise for the waveform.
            drop: The indices are those of visible patches instead, and no others are encoded: K tokens in place of N.
                Streams of one K are one batch.

        Returns:
            Patch tokens [B, N, D], or with `pool` = "cls" the cls and dist tokens [B, 2, D].
        """
        special = self.special()
        sequences = []
        if fbank is not None:
            patches = self.spec_patch(fbank.to(self.dtype).transpose(1, 2))
            sequences += [self.spec_tokens(patches, special, mask, drop) for mask in spec_masks]
        passes = len(sequences)
        if wav_map is not None:
            embedding = self.spec_patch if self.config.shared_patch else self.wav_patch
            patches = embedding(wav_map)
            sequences += [self.wav_tokens(patches, special, mask, drop) for mask in wav_masks]
        kept = slice(len(special)) if self.streams.pool == "cls" else slice(len(special), None)
        encoded = [tokens[:, kept] for tokens in self.encoder(sequences)]
        return Encoded(tuple(encoded[:passes]), tuple(encoded[passes:]))


def initialise_linear(module: nn.Module) -> None:
    """Linear: trunc_normal .02, zero bias (ViT). Patch embeddings keep Conv2d's own initialisation, as in SSAST."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _check(config: ModelConfig, streams: Streams) -> None:
    if config.patch > min(streams.mel_bins, streams.frames):
        raise UserError(
            f"model.patch = {config.patch} is larger than the {streams.mel_bins} x {streams.frames} map; shrink it"
        )
    if not streams.wav:
        return
    if not len(config.kernels) == len(config.kernel_strides) == len(config.channels):
        raise UserError(
            f"model.kernels, kernel_strides and channels have {len(config.kernels)}, {len(config.kernel_strides)} and "
            f"{len(config.channels)} entries; give each scale one of each"
        )
    total = sum(config.channels)
    if total != streams.mel_bins and (total % config.patch or not total):
        raise UserError(
            f"model.channels = {list(config.channels)} sum to {total}, neither the {streams.mel_bins} mel bins "
            f"of the shards (one patch grid for both representations) nor a multiple of model.patch = {config.patch}"
        )
    for stride in config.kernel_strides:
        if SAMPLES_PER_FRAME % stride:
            raise UserError(f"model.kernel_strides: {stride} does not divide 160, the samples of a frame")
