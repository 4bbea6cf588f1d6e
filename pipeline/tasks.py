"""What DeepSpeed wraps: network, heads and losses in one module, Batch -> Losses.

In: a `Batch`. Out: `Losses`. Everything that reads a weight happens inside `forward`: under ZeRO-3 a
weight exists only there.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import nn

from pipeline.config import FinetuneRecipe, PretrainRecipe
from pipeline.data.augment import mask_fbank
from pipeline.errors import UserError
from pipeline.flow import Batch, Encoded, Losses, full
from pipeline.methods import FINETUNE, PRETRAIN
from pipeline.model.craft import Craft, Streams
from pipeline.model.embed import patchify
from pipeline.model.heads import Classifier, MaskedPatchHeads, ProjectionHead
from pipeline.model.masking import cluster_masks, masked_count, ssast_masks
from pipeline.objectives.classification import classification_loss
from pipeline.objectives.contrastive import swacl_loss, token_loss
from pipeline.objectives.masked_patch import gather_patches, masked_patch_loss, normalise_patches


class Pooled(NamedTuple):
    """Representations of a micro-batch before the contrast: [B, D] each; [B, N, D] with `level` = "token"."""

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


class Rebuilt(NamedTuple):
    """Masked patches and what the model makes of them, for pictures.

    Attributes:
        of: "spectrogram" or "waveform map".
        target: All patches [B, N, P * P], as the reconstruction loss sees them.
        mask: int64 [B, K], which are masked.
        predicted: [B, K, P * P].
        grid: Patches along frequency and time; N is their product.
    """

    of: str
    target: torch.Tensor
    mask: torch.Tensor
    predicted: torch.Tensor
    grid: tuple[int, int]


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
        self.contrasts_batch = method.contrast and config.level == "clip"
        streams = Streams(
            spec=method.spec,
            wav=method.wav,
            mel_bins=mel_bins,
            frames=frames,
            masked_spec=method.masked_spec,
            masked_wav=self.masks_wav,
        )
        self.model = Craft(recipe.model, streams)
        if method.contrast and config.level == "token" and self.model.grid != self.model.wav_grid:
            raise UserError(
                f"pretrain.level = token pairs patches, but the spectrogram has {self.model.grid} and the waveform "
                f"{self.model.wav_grid}; let model.channels sum to {mel_bins}"
            )
        self._check_masks(mel_bins, frames)
        if method.masked_spec or method.masked_wav:
            self.heads = MaskedPatchHeads(self.model.width, recipe.model.patch**2)
        temperature = config.temperature if config.contrast == "cosine" else None
        # Eq. 4a: (wav, spec) -> (loss, accuracy) of this rank's clips, over the global batch (collective) or by token.
        self.contrast: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]] = partial(
            swacl_loss if self.contrasts_batch else token_loss, temperature=temperature, symmetric=config.symmetric
        )
        if method.contrast and config.projection == "mlp":
            self.projection = ProjectionHead(self.model.width)

    def forward(
        self, batch: Batch, cached: CachedContrast | None = None, pooled_only: bool = False, rebuild: bool = False,
        tokens: bool = False,
    ) -> Losses | Pooled | Rebuilt | Encoded:  # fmt: skip
        """One micro-batch: sum over masked sides s of w_s (nce_s + r_g mse_s), + w contrast (Eq. 2, 3, 4b).

        w_s is 1 for the spectrogram and r_w for the waveform beside it; w is r_cl, or 1 for the contrast alone. With
        `cached`, (pooled * cached gradient).sum() stands for the contrast: its gradient is this micro-batch's part of
        that of the whole batch's contrast (GradCache), whose value is only reported.

        Args:
            batch: With the representations that the method reads.
            cached: The contrast of the step, where it spans several micro-batches.
            pooled_only: Return the representations to be contrasted and no loss.
            rebuild: Return the reconstruction of the masked patches and no loss.
            tokens: Return all patch tokens, nothing masked, and no loss.
        """
        method = self.method
        spec_masks = self._masks("spec", batch.position) if method.masked_spec else []
        wav_masks = self._masks("wav", batch.position) if self.masks_wav else []
        clean = [None] if method.contrast and self.config.clean_spectrogram else []
        fbank = _given(batch.fbank) if method.spec else None
        wav_map = self.model.waveform_map(_given(batch.waveform), batch.length) if method.wav else None
        if tokens:
            seen: Encoded = self.model(fbank, wav_map)
            return seen
        encoded: Encoded = self.model(fbank, wav_map, [*spec_masks, *clean] or [None], wav_masks or [None])
        if pooled_only:
            return self._pool(encoded)
        if rebuild:
            return self._rebuild(encoded, fbank, wav_map, (spec_masks or wav_masks)[0])
        named: dict[str, torch.Tensor] = {}
        total = torch.zeros((), device=batch.position.device)
        sides = []  # what is masked: name, passes, target, masks, weight
        if method.masked_spec:
            target = patchify(full(_given(fbank)).transpose(1, 2), self.model.config.patch)
            sides.append(("spec", encoded.spec, target, spec_masks, 1.0))
        if method.masked_wav:
            pixels = patchify(full(_given(wav_map).detach()), self.model.config.patch)
            named["wav_target_variance"] = pixels.var(dim=-1, correction=0).mean()  # 0: the map has collapsed
            weight = self.config.r_w if method.masked_spec else 1.0
            sides.append(("wav", encoded.wav, normalise_patches(pixels), wav_masks, weight))
        for name, passes, target, masks, weight in sides:
            predicted, rebuilt = self.heads(*(gather_patches(p, mask) for p, mask in zip(passes, masks, strict=False)))
            targets = [gather_patches(target, mask) for mask in masks]
            loss = masked_patch_loss(predicted, rebuilt, targets[0], self.config.softmax, targets[-1])
            named |= {f"{name}_nce": loss.nce.detach(), f"{name}_mse": loss.mse.detach()}
            named[f"{name}_accuracy"] = loss.accuracy
            total = total + weight * (loss.nce + self.config.r_g * loss.mse)
        value = total.detach()
        if method.contrast:
            weight = 1.0 if method.contrast_only else self.config.r_cl
            pooled = self._pool(encoded)
            if cached is None:
                contrast, accuracy = self.contrast(*pooled)
                total, contrast = total + weight * contrast, contrast.detach()
            else:  # only the gradient comes from this micro-batch
                contrast, accuracy = cached.loss, cached.accuracy
                total = total + weight * ((pooled.wav * cached.wav).sum() + (pooled.spec * cached.spec).sum())
            value = value + weight * contrast
            named |= {"contrast": contrast, "contrast_accuracy": accuracy}
        return Losses(total, {"loss": value, **named})

    def _check_masks(self, mel_bins: int, frames: int) -> None:
        """Whether K masked patches leave others; SSAST's generator needs two of them."""
        used = {"spec": self.method.masked_spec, "wav": self.masks_wav}
        for name, grid in self._grids().items():
            most = grid[0] * grid[1] - (2 if self.config.ssast_compat else 0)
            count = masked_count(self.config.mask_patches, grid)
            if used[name] and count > most:
                raise UserError(
                    f"pretrain.mask_patches = {self.config.mask_patches}: {count} masked patches, but {mel_bins} "
                    f"mel bins and {frames} frames allow {most}; lower it"
                )

    def _grids(self) -> dict[str, tuple[int, int]]:
        return {"spec": self.model.grid, "wav": self.model.wav_grid}

    def _masks(self, name: str, position: torch.Tensor) -> list[torch.Tensor]:
        """Masked patches int64 [B, K] of each masked pass."""
        draw = ssast_masks if self.config.ssast_compat else cluster_masks
        grid = self._grids()[name]
        count = masked_count(self.config.mask_patches, grid)
        masked = self.method.masked_spec if name == "spec" else self.method.masked_wav
        purposes = [f"mask.{name}", f"mask.{name}.second"] if masked and self.config.two_pass else [f"mask.{name}"]
        return [draw(self.seed, purpose, position, grid, count, self.config.clusters) for purpose in purposes]

    def _rebuild(
        self, encoded: Encoded, fbank: torch.Tensor | None, wav_map: torch.Tensor | None, mask: torch.Tensor
    ) -> Rebuilt:
        """Of the spectrogram where it is masked, else of the waveform's map."""
        patch = self.model.config.patch
        if self.method.masked_spec:
            target = patchify(full(_given(fbank)).transpose(1, 2), patch)
            name, passes, grid = "spectrogram", encoded.spec, self.model.grid
        else:
            target = normalise_patches(patchify(full(_given(wav_map)), patch))
            name, passes, grid = "waveform map", encoded.wav, self.model.wav_grid
        _, reconstructed = self.heads(gather_patches(passes[0], mask))
        return Rebuilt(name, target, mask, reconstructed, grid)

    def _pool(self, encoded: Encoded) -> Pooled:
        """What is contrasted: mean patch tokens of a clip, or with `level` = "token" the tokens themselves.

        The spectrogram's last pass is the clean one where there is one.
        """
        views = [full(encoded.wav[0]), full(encoded.spec[-1 if self.config.clean_spectrogram else 0])]
        if self.contrasts_batch:
            views = [tokens.mean(dim=1) for tokens in views]
        if self.config.projection == "mlp":
            views = [full(self.projection(view.to(self.model.dtype))) for view in views]
        return Pooled(*views)


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
            pool=config.pool,
        )
        self.seed = recipe.run.seed
        self.augment = recipe.augment
        self.model = Craft(recipe.model, streams)
        grids = [grid for grid, used in ((self.model.grid, method.spec), (self.model.wav_grid, method.wav)) if used]
        rows = tuple(grid[0] if config.pool == "rows" else 1 for grid in grids)
        self.classifier = Classifier(self.model.width, classes, rows, config.head)

    def encode(self, batch: Batch) -> Encoded:
        """Tokens of the streams that the method reads."""
        fbank = _given(batch.fbank) if self.method.spec else None
        wav_map = self.model.waveform_map(_given(batch.waveform), batch.length) if self.method.wav else None
        if wav_map is not None and self.training and self.augment.mask_map:
            wav_map = mask_fbank(wav_map.transpose(1, 2), self.augment, self.seed, batch.position).transpose(1, 2)
        encoded: Encoded = self.model(fbank, wav_map)
        return encoded

    def forward(self, batch: Batch) -> Losses:
        """One micro-batch."""
        logits = self.classifier(self.encode(batch))
        loss = classification_loss(logits, batch.targets, self.loss)
        named = {"loss": loss.detach()}
        if self.loss == "ce":
            hits = logits.detach().argmax(dim=1) == batch.targets.argmax(dim=1)
            named["accuracy"] = hits.float().mean()
        return Losses(loss, named, logits)


def _given(tensor: torch.Tensor | None) -> torch.Tensor:
    if tensor is None:
        raise ValueError("the batch lacks a representation that the method reads; see Loader")
    return tensor
