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
    PatchEmbedding,
    SpecialTokens,
    TokenSequence,
    patch_grid,
)
from pipeline.model.encoder import Encoder, drop_paths, run_block
from pipeline.model.frontends import frontend
from pipeline.model.masking import kept_patches


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
    "large": Size(1024, 24, 16),
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
        mask_freq: Share of a grid's rows that training leaves out of a clip.
        mask_time: Share of its columns.
        seed: Of what training draws: which branches, rows and columns it leaves out.
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
    mask_freq: float = 0.0
    mask_time: float = 0.0
    seed: int = 0


class Craft(nn.Module):
    """Both representations through one backbone (paper Section 3, Figure 1).

    Args:
        config: Model settings.
        streams: Which representations, and the shape of the data.

    Attributes:
        grid: Patches of the spectrogram along frequency and time; of the longest input.
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
        self.special = SpecialTokens(size.width, config.class_tokens)
        if streams.wav:  # under the name of its kind, so that weights say what they are of
            self.add_module(config.frontend, frontend(config))
        if streams.spec or config.shared_patch:
            self.spec_patch = PatchEmbedding(size.width, config.patch, config.stride, config.input_norms)
        if streams.wav and not config.shared_patch:
            self.wav_patch = PatchEmbedding(size.width, config.patch, config.stride, config.input_norms)
        if streams.spec:
            self.spec_tokens = TokenSequence(
                size.width, self.grid, config.modality_embedding, streams.masked_spec, config.positions
            )
        if streams.wav:
            self.wav_tokens = TokenSequence(
                size.width, self.wav_grid, config.modality_embedding, streams.masked_wav, config.positions
            )
        self.encoder = Encoder(
            size.width,
            size.depth if streams.spec else config.wav_depth or size.depth,
            size.heads,
            bottlenecks=streams.bottlenecks,
            fusion_layer=_fusion_layer(config, streams),
            recompute=config.checkpoint_activations,
            early=config.wav_depth,
            post=config.block == "post",
            first=config.input_norms,
        )
        self.apply(initialise_linear)

    @property
    def width(self) -> int:
        """D."""
        return SIZES[self.config.size].width

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights; inputs are cast to it (bf16 and fp16 engines)."""
        return self.special.tokens.dtype

    def grids(self, frames: int | None = None) -> dict[str, tuple[int, int]]:
        """Patches of "spec" and "wav" along frequency and time, of inputs of T frames; None: the longest."""
        if frames is None:
            return {"spec": self.grid, "wav": self.wav_grid}
        heights, config = {"spec": self.streams.mel_bins, "wav": sum(self.config.channels)}, self.config
        return {name: patch_grid(height, frames, config.patch, config.stride) for name, height in heights.items()}

    def waveform_map(
        self, waveform: torch.Tensor, length: torch.Tensor | None = None, frames: int | None = None
    ) -> torch.Tensor:
        """The front end's map of waveforms cut or zero-padded to T * 160 samples: [B, L] -> [B, channels, T].

        Args:
            waveform: [B, L].
            length: int64 [B], samples of audio before the padding; None: L.
            frames: T; None: that of the longest input.
        """
        samples = (frames or self.streams.frames) * SAMPLES_PER_FRAME
        x = F.pad(waveform, (0, samples - waveform.shape[-1])).to(self.dtype)
        if length is None:
            length = torch.full(waveform.shape[:1], waveform.shape[-1], device=waveform.device)
        module = self.get_submodule(self.config.frontend)
        return run_block(module, x, length, recompute=self.config.checkpoint_activations)

    def forward(
        self,
        fbank: torch.Tensor | None,
        wav_map: torch.Tensor | None,
        spec_masks: Sequence[torch.Tensor | None] = (None,),
        wav_masks: Sequence[torch.Tensor | None] = (None,),
        position: torch.Tensor | None = None,
        drop: bool = False,
    ) -> Encoded:
        """Encodes the given representations in one pass of the encoder.

        Both have one T, of the longest input or less: a shorter one has its own positions (`TokenSequence`).

        Args:
            fbank: [B, T, M], normalised; None: no spectrogram stream.
            wav_map: [B, channels, T] of `waveform_map`; None: no waveform stream.
            spec_masks: One entry for each time that the spectrogram is encoded: int64 [B, K], indices of
                masked patches, or None.
            wav_masks: Likewise for the waveform.
            position: int64 [B], what the draws of training go by; None: there are none.
            drop: The indices are those of visible patches instead, and no others are encoded: K tokens in place of N.
                Streams of one K are one batch.

        Returns:
            Patch tokens [B, N, D], or with `pool` = "cls" the cls and dist tokens [B, 2, D].

        Raises:
            ValueError: there are draws, and no position.
        """
        streams, drop_path = self.streams, self.config.drop_path
        spec_kept = wav_kept = paths = None
        if self.training and (drop_path or streams.mask_freq or streams.mask_time):
            if position is None:
                raise ValueError("drop_path, mask_freq and mask_time draw by the positions of the clips; give them")
            if drop_path:
                passes = len(spec_masks) * (fbank is not None) + len(wav_masks) * (wav_map is not None)
                paths = drop_paths(drop_path, len(self.encoder.blocks), passes, streams.seed, position, self.dtype)
            if streams.mask_freq or streams.mask_time:
                # Equal grids lose the same rows and columns: what is left of a clip has no second account of the rest.
                shares = streams.mask_freq, streams.mask_time
                frames = fbank.shape[1] if fbank is not None else None if wav_map is None else wav_map.shape[2]
                spec_kept, wav_kept = (
                    kept_patches(streams.seed, position, grid, *shares) for grid in self.grids(frames).values()
                )
        special = self.special()
        sequences: list[torch.Tensor] = []
        times: list[torch.Tensor] = []
        rotary = self.config.positions == "rotary"

        def add(tokens: nn.Module, patches: torch.Tensor, masks: Sequence[torch.Tensor | None], rows: int,
                left: torch.Tensor | None) -> None:  # fmt: skip
            for mask in masks:
                hidden, kept = (None, mask) if drop else (mask, left)
                sequences.append(tokens(patches, special, hidden, kept))
                if rotary:
                    times.append(_times(patches, rows, kept, special.shape[0], self.config.stride))

        if fbank is not None:
            patches = self.spec_patch(fbank.to(self.dtype).transpose(1, 2))
            add(self.spec_tokens, patches, spec_masks, self.grid[0], spec_kept)
        passes = len(sequences)
        if wav_map is not None:
            embedding = self.spec_patch if self.config.shared_patch else self.wav_patch
            add(self.wav_tokens, embedding(wav_map), wav_masks, self.wav_grid[0], wav_kept)
        leaving = len(sequences) - passes if self.config.wav_depth and streams.spec else 0
        kept = slice(len(special)) if self.streams.pool == "cls" else slice(len(special), None)
        encoded = [tokens[:, kept] for tokens in self.encoder(sequences, paths, leaving, times if rotary else None)]
        return Encoded(tuple(encoded[:passes]), tuple(encoded[passes:]))


def _times(patches: torch.Tensor, rows: int, kept: torch.Tensor | None, special: int, stride: int) -> torch.Tensor:
    """Where each token begins, in units of 16 frames: float32 [B, special + N]; special ones at 0.

    A unit of time and not of patches: weights serve another stride.
    """
    clips, count = patches.shape[:2]  # `len` would tie an exported graph to B
    columns = count // rows
    if kept is None:
        kept = torch.arange(count, device=patches.device).expand(clips, -1)
    return F.pad((kept % columns) * (stride / 16), (special, 0))


def initialise_linear(module: nn.Module) -> None:
    """Linear: trunc_normal .02, zero bias (ViT). Patch embeddings keep Conv2d's own initialisation, as in SSAST."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _fusion_layer(config: ModelConfig, streams: Streams) -> int:
    return SIZES[config.size].depth // 3 if streams.fusion_layer < 0 else streams.fusion_layer


def _check(config: ModelConfig, streams: Streams) -> None:
    if config.patch > min(streams.mel_bins, streams.frames):
        raise UserError(
            f"model.patch = {config.patch} is larger than the {streams.mel_bins} x {streams.frames} map; shrink it"
        )
    for key in ("wav_depth", "input_norms"):
        if getattr(config, key) and config.block == "post":
            raise UserError(f"model.{key} = {getattr(config, key)} is of model.block=pre; leave one of both out")
    if not streams.wav:
        return
    depth, first = SIZES[config.size].depth, _fusion_layer(config, streams)
    if config.wav_depth > depth:
        raise UserError(f"model.wav_depth = {config.wav_depth}, but model.size = {config.size} has {depth} blocks")
    if streams.bottlenecks and 0 < config.wav_depth <= first < depth:
        raise UserError(
            f"model.wav_depth = {config.wav_depth}: the waveform leaves before block {first}, the first that fuses; "
            f"set finetune.fusion_layer below {config.wav_depth}, or a larger wav_depth"
        )
    if config.frontend == "msae" and not len(config.kernels) == len(config.kernel_strides) == len(config.channels):
        raise UserError(
            f"model.kernels, kernel_strides and channels have {len(config.kernels)}, {len(config.kernel_strides)} and "
            f"{len(config.channels)} entries; give each scale one of each"
        )
    for key in ("kernels", "kernel_strides", "channels") if config.frontend == "msae" else ():
        if min(getattr(config, key), default=1) < 1:
            raise UserError(f"model.{key} = {list(getattr(config, key))}: give each scale 1 or more")
    total = sum(config.channels)
    if total != streams.mel_bins and (total % config.patch or total < 1):
        raise UserError(
            f"model.channels = {list(config.channels)} sum to {total}, neither the {streams.mel_bins} mel bins "
            f"of the shards (one patch grid for both representations) nor a multiple of model.patch = {config.patch}"
        )
    for stride in config.kernel_strides if config.frontend == "msae" else ():
        if SAMPLES_PER_FRAME % stride:
            raise UserError(f"model.kernel_strides: {stride} does not divide 160, the samples of a frame")
