"""What DeepSpeed wraps: network, heads and losses in one module, Batch -> Losses.

In: a `Batch`. Out: `Losses`. Everything that reads a weight happens inside `forward`: under ZeRO-3 a
weight exists only there.
"""

from typing import NamedTuple

import torch
from torch import nn

from pipeline import distributed
from pipeline.config import FinetuneRecipe, PretrainRecipe
from pipeline.flow import Batch, Encoded, Losses
from pipeline.methods import FINETUNE, PRETRAIN
from pipeline.model.craft import Craft, Streams
from pipeline.model.embed import patchify
from pipeline.model.heads import Classifier, MaskedPatchHeads, ProjectionHead
from pipeline.model.masking import cluster_masks, masked_count
from pipeline.objectives.classification import classification_loss
from pipeline.objectives.contrastive import swacl_loss
from pipeline.objectives.masked_patch import gather_patches, masked_patch_loss, normalise_patches


class Pooled(NamedTuple):
    """Clip representations of a micro-batch before the contrast: [B, D] each."""

    wav: torch.Tensor
    spec: torch.Tensor


class CachedContrast(NamedTuple):
    """The contrast of the whole global batch, computed before the micro-batches run (GradCache).

    Attributes:
        loss: Of all this rank's clips of the step.
        accuracy: Likewise.
        wav: d(loss)/d(pooled waveforms) of this micro-batch [B, D], times the number of micro-batches.
        spec: Likewise for the spectrograms.
    """

    loss: torch.Tensor
    accuracy: torch.Tensor
    wav: torch.Tensor
    spec: torch.Tensor


class PretrainTask(nn.Module):
    """Masked patches and contrast, by the row of `methods.PRETRAIN` (Eq. 2, 3, 4).

    Args:
        recipe: Settings.
        mel_bins: M of the shards.
        frames: T.
    """

    def __init__(self, recipe: PretrainRecipe, mel_bins: int, frames: int) -> None:
        super().__init__()
        self.config = config = recipe.pretrain
        self.method = method = PRETRAIN[config.method]
        self.seed = recipe.run.seed
        self.masks_wav = method.masked_wav or (method.contrast and config.mask_waveform)
        streams = Streams(
            spec=method.spec,
            wav=method.wav,
            mel_bins=mel_bins,
            frames=frames,
            masked_spec=method.masked_spec,
            masked_wav=self.masks_wav,
        )
        self.model = Craft(recipe.model, streams)
        self.masked = masked_count(config.mask_patches, self.model.grid)
        if method.masked_spec or method.masked_wav:
            self.heads = MaskedPatchHeads(self.model.width, recipe.model.patch**2)
        if method.contrast and config.projection == "mlp":
            self.projection = ProjectionHead(self.model.width)

    def forward(
        self, batch: Batch, cached: CachedContrast | None = None, pooled_only: bool = False
    ) -> Losses | Pooled:
        """One micro-batch.

        Args:
            batch: With the representations that the method reads.
            cached: The contrast of the step, where it spans several micro-batches.
            pooled_only: Return the representations to be contrasted and no loss.
        """
        spec_mask = self._mask("mask.spec", batch.position) if self.method.masked_spec else None
        wav_mask = self._mask("mask.wav", batch.position) if self.masks_wav else None
        fbank = _given(batch.fbank) if self.method.spec else None
        wav_map = self.model.waveform_map(_given(batch.waveform)) if self.method.wav else None
        clean = self.method.contrast and self.method.masked_spec and self.config.clean_spectrogram
        encoded: Encoded = self.model(fbank, wav_map, spec_mask, wav_mask, clean)
        if pooled_only:
            return self._pool(encoded)
        named: dict[str, torch.Tensor] = {}
        total = torch.zeros((), device=batch.position.device)
        if self.method.masked_spec:
            target = patchify(_given(fbank).float().transpose(1, 2), self.model.config.patch)
            total = total + self._masked_patches("spec", _given(encoded.spec), target, _given(spec_mask), named)
        if self.method.masked_wav:
            target = normalise_patches(patchify(_given(wav_map).detach().float(), self.model.config.patch))
            weight = self.config.r_w if self.method.masked_spec else 1.0
            masked = self._masked_patches("wav", _given(encoded.wav), target, _given(wav_mask), named)
            total = total + weight * masked
        value = total.detach()
        if self.method.contrast:
            weight = 1.0 if self.method.contrast_only else self.config.r_cl
            surrogate, loss, accuracy = self._contrast(self._pool(encoded), cached)
            total = total + weight * surrogate
            value = value + weight * loss.detach()
            named |= {"contrast": loss.detach(), "contrast_accuracy": accuracy}
        return Losses(total, {"loss": value, **named})

    def contrast(self, pooled: Pooled) -> tuple[torch.Tensor, torch.Tensor]:
        """Eq. 4a over the global batch: (loss, accuracy) of this rank's clips; a collective."""
        temperature = self.config.temperature if self.config.contrast == "cosine" else None
        return swacl_loss(
            pooled.wav,
            pooled.spec,
            distributed.gather,
            distributed.rank(),
            temperature=temperature,
            symmetric=self.config.symmetric,
        )

    def _mask(self, purpose: str, position: torch.Tensor) -> torch.Tensor:
        return cluster_masks(self.seed, purpose, position, self.model.grid, self.masked, self.config.clusters)

    def _masked_patches(
        self, name: str, tokens: torch.Tensor, target: torch.Tensor, mask: torch.Tensor, named: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        predicted, reconstructed = self.heads(gather_patches(tokens, mask))
        loss = masked_patch_loss(predicted, reconstructed, gather_patches(target, mask), self.config.softmax)
        named |= {
            f"{name}_nce": loss.nce.detach(),
            f"{name}_mse": loss.mse.detach(),
            f"{name}_accuracy": loss.accuracy,
        }
        return loss.nce + self.config.r_g * loss.mse

    def _pool(self, encoded: Encoded) -> Pooled:
        spec = encoded.spec if encoded.clean is None else encoded.clean
        means = [_given(tokens).float().mean(dim=1) for tokens in (encoded.wav, spec)]
        if self.config.projection == "mlp":
            means = [self.projection(mean.to(self.model.dtype)).float() for mean in means]
        return Pooled(*means)

    def _contrast(
        self, pooled: Pooled, cached: CachedContrast | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if cached is None:
            loss, accuracy = self.contrast(pooled)
            return loss, loss, accuracy
        surrogate = (pooled.wav * cached.wav).sum() + (pooled.spec * cached.spec).sum()
        return surrogate, cached.loss, cached.accuracy


class FinetuneTask(nn.Module):
    """Classification by the row of `methods.FINETUNE` (Section 3.4, Eq. 5).

    Args:
        recipe: Settings.
        mel_bins: M of the shards.
        frames: T.
        classes: C.
        single_label: Every clip has exactly one label.
    """

    def __init__(self, recipe: FinetuneRecipe, mel_bins: int, frames: int, classes: int, single_label: bool) -> None:
        super().__init__()
        config = recipe.finetune
        self.method = method = FINETUNE[config.method]
        self.loss = ("ce" if single_label else "bce") if config.loss == "auto" else config.loss
        streams = Streams(
            spec=method.spec,
            wav=method.wav,
            mel_bins=mel_bins,
            frames=frames,
            bottlenecks=config.bottlenecks if method.fusion else 0,
            fusion_layer=config.fusion_layer,
        )
        self.model = Craft(recipe.model, streams)
        self.classifier = Classifier(self.model.width, classes, method.streams, config.head)

    def forward(self, batch: Batch) -> Losses:
        """One micro-batch."""
        fbank = _given(batch.fbank) if self.method.spec else None
        wav_map = self.model.waveform_map(_given(batch.waveform)) if self.method.wav else None
        logits = self.classifier(self.model(fbank, wav_map))
        loss = classification_loss(logits, batch.targets, self.loss)
        named = {"loss": loss.detach()}
        if self.loss == "ce":
            hits = logits.detach().argmax(dim=1) == batch.targets.argmax(dim=1)
            named["accuracy"] = hits.float().mean()
        return Losses(loss, named, logits)


def _given(tensor: torch.Tensor | None) -> torch.Tensor:
    if tensor is None:
        raise ValueError("the batch lacks a representation that the method reads; see loader.Needs")
    return tensor
