"""What DeepSpeed wraps: network, heads and losses in one module, Batch -> Losses.

In: a `Batch`. Out: `Losses`. Everything that reads a weight happens inside `forward`: under ZeRO-3 a
weight exists only there.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from pipeline.config import FinetuneRecipe, PretrainRecipe
from pipeline.data.augment import mask_fbank
from pipeline.data.fbank import padded_frames
from pipeline.data.loader import Loader
from pipeline.errors import UserError
from pipeline.flow import Batch, Encoded, Losses, full
from pipeline.methods import FINETUNE, PRETRAIN
from pipeline.model.craft import SIZES, Craft, Streams, initialise_linear
from pipeline.model.embed import patchify
from pipeline.model.heads import Classifier, MaskedPatchHeads, PatchDecoder, ProjectionHead
from pipeline.model.hidden import HiddenPatches
from pipeline.model.masking import Split, gather_patches
from pipeline.model.teacher import Teacher
from pipeline.objectives.classification import classification_loss, positive_weights
from pipeline.objectives.contrastive import nt_xent_loss, swacl_loss, token_loss
from pipeline.objectives.latent import LatentTargets, latent_targets
from pipeline.objectives.masked_patch import masked_patch_loss, normalise_patches


class Pooled(NamedTuple):
    """What is contrasted of a micro-batch: [B, D] each; [B, N, D] with `level` = "token".

    Attributes:
        query: Of the waveforms; of two views of one representation the second.
        key: Of the spectrograms, or the first view.
    """

    query: torch.Tensor
    key: torch.Tensor


class CachedContrast(NamedTuple):
    """The contrast of the whole global batch, computed before the micro-batches run (GradCache).

    Attributes:
        loss: Of all this rank's clips of the step.
        accuracy: Likewise.
        query: d(loss)/d(pooled queries) of this micro-batch [B, D], times the number of micro-batches.
        key: Likewise for the keys.
    """

    loss: torch.Tensor
    accuracy: torch.Tensor
    query: torch.Tensor
    key: torch.Tensor


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
    """Masked patches and contrast, by the row of `methods.PRETRAIN` (Eq. 2, 3, 4; or on visible patches alone).

    Args:
        recipe: Settings.
        mel_bins: M of the shards.
        frames: T.

    Attributes:
        teacher: Of a method that predicts what a teacher makes of a clip; None: there is none.

    Raises:
        UserError: settings that do not fit the method, each other or the patch grid.
    """

    def __init__(self, recipe: PretrainRecipe, mel_bins: int, frames: int) -> None:
        super().__init__()
        self.config = config = recipe.pretrain
        self.method = method = PRETRAIN[config.method]
        self.contrasts_batch = method.contrast and config.level == "clip"
        streams = Streams(
            spec=method.spec,
            wav=method.wav,
            mel_bins=mel_bins,
            frames=frames,
            masked_spec=method.masked_spec and not method.drops,
            masked_wav=(method.masked_wav or (method.contrast and config.mask_waveform)) and not method.drops,
            seed=recipe.run.seed,
        )
        self.model = Craft(recipe.model, streams)
        if method.contrast and config.level == "token" and self.model.grid != self.model.wav_grid:
            raise UserError(
                f"pretrain.level = token pairs patches, but the spectrogram has {self.model.grid} and the waveform "
                f"{self.model.wav_grid}; let model.channels sum to {mel_bins}"
            )
        patch, stride = recipe.model.patch, recipe.model.stride
        if (method.masked_spec or method.masked_wav) and not method.latent and stride != patch:
            raise UserError(
                f"model.stride = {stride}, but pretrain.method = {config.method} predicts patches side by side; set "
                f"model.stride={patch}, and another stride in finetuning"
            )
        if config.negatives == "both" and not self.contrasts_batch:
            raise UserError(
                f"pretrain.negatives = both is of the contrast of clips, which pretrain.method = {config.method} with "
                f"pretrain.level = {config.level} has not; leave it out"
            )
        inputs = [None, *(padded_frames(seconds) for seconds in recipe.data.seconds)]
        self.hidden = HiddenPatches(config, method, recipe.run.seed, [self.model.grids(frames) for frames in inputs])
        size = SIZES[recipe.model.size]
        if config.target_blocks > size.depth:
            raise UserError(
                f"pretrain.target_blocks = {config.target_blocks}, but model.size = {recipe.model.size} has "
                f"{size.depth} blocks; lower it"
            )
        self.teacher = Teacher(self.model, config.target_blocks) if method.latent else None
        if method.latent:
            self.summary = nn.Linear(size.width, size.width)
            initialise_linear(self.summary)
        if method.drops and not method.contrast_only:
            grids = [self.model.grids()[name] for name in self.hidden.views]
            inner = config.decoder_width or max(64, size.width * (1 if method.latent else 2) // 3 // 64 * 64)
            depth = config.decoder_depth or min(2 if method.latent else 4, max(1, size.depth // 3))
            values = size.width if method.latent else recipe.model.patch**2
            self.decoders = nn.ModuleList(
                PatchDecoder(size.width, inner, depth, values, part, recipe.model.checkpoint_activations,
                             recipe.model.positions)
                for part in ([grids] if config.decoder == "shared" else [[grid] for grid in grids])
            )  # fmt: skip
        elif not method.contrast_only:
            self.heads = MaskedPatchHeads(self.model.width, recipe.model.patch**2)
        temperature = config.temperature if config.contrast == "cosine" else None
        # Eq. 4a: (wav, spec) -> (loss, accuracy) of this rank's clips, over the global batch (collective) or by token.
        self.contrast: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]] = partial(
            swacl_loss if self.contrasts_batch else token_loss, temperature=temperature, symmetric=config.symmetric
        )
        if config.negatives == "both":
            self.contrast = partial(nt_xent_loss, temperature=temperature)
        if method.contrast and config.projection == "mlp":
            self.projection = ProjectionHead(self.model.width)

    def forward(
        self, batch: Batch, cached: CachedContrast | None = None, pooled_only: bool = False, rebuild: bool = False,
        tokens: bool = False,
    ) -> Losses | Pooled | Rebuilt | Encoded:  # fmt: skip
        """One micro-batch: sum over masked sides s of w_s (nce_s + r_g mse_s), + w contrast (Eq. 2, 3, 4b).

        Where the encoder takes visible patches alone, w_s mse_s is a side's loss, of normalised patches. w_s is 1 for
        the spectrogram and r_w for the waveform beside it; w is r_cl, or 1 for the contrast alone.

        With a teacher, mse_s is of its targets (`objectives.latent`), a mean over a clip's views, which share one pass
        of it. To these comes r_u times the utterance loss: the mean over streams and views of the square error of what
        a linear layer makes of a view's mean visible token, for the target of the whole clip. That is one for both
        streams: each learns to say what the other one hears, too.

        With `cached`, (pooled * cached gradient).sum() stands for the contrast: its gradient is this micro-batch's part
        of that of the whole batch's contrast (GradCache), whose value is only reported.

        Args:
            batch: With the representations that the method reads.
            cached: The contrast of the step, where it spans several micro-batches.
            pooled_only: Return the representations to be contrasted and no loss.
            rebuild: Return the reconstruction of the masked patches and no loss.
            tokens: Return all patch tokens, nothing masked, and no loss.
        """
        method, grids = self.method, self.model.grids(batch.frames)
        splits = self.hidden.splits(batch.position, grids) if method.drops else {}
        if method.drops:
            spec_masks, wav_masks = ([split.visible for split in splits[name]] for name in ("spec", "wav"))
        else:
            spec_masks, wav_masks = (self.hidden.masks(name, batch.position, grids[name]) for name in ("spec", "wav"))
        clean = [None] if method.contrast and self.config.clean_spectrogram else []
        fbank = _given(batch.fbank) if method.spec else None
        wav_map = None
        if method.wav:
            wav_map = self.model.waveform_map(_given(batch.waveform), batch.length, batch.frames)
        if tokens:
            seen: Encoded = self.model(fbank, wav_map)
            return seen
        latent = self._latent(batch, fbank)
        encoded: Encoded = self.model(
            fbank, wav_map, [*spec_masks, *clean] or [None], wav_masks or [None], batch.position, method.drops
        )
        if pooled_only:
            return self._pool(encoded)
        if rebuild:
            return self._rebuild(encoded, fbank, wav_map, (spec_masks or wav_masks)[0], splits, grids)
        named: dict[str, torch.Tensor] = {}
        total = torch.zeros((), device=batch.position.device)
        sides = []  # what is masked: name, passes, target, masks, weight
        if method.masked_spec:
            target = latent.patches["spec"] if latent else self._target("spec", fbank, wav_map)
            sides.append(("spec", encoded.spec, target, spec_masks, 1.0))
        if method.masked_wav:
            weight = self.config.r_w if method.masked_spec else 1.0
            if latent:
                target = latent.patches["wav"]
            else:
                pixels = patchify(full(_given(wav_map).detach()), self.model.config.patch)
                named["wav_target_variance"] = pixels.var(dim=-1, correction=0).mean()  # 0: the map has collapsed
                target = normalise_patches(pixels)
            sides.append(("wav", encoded.wav, target, wav_masks, weight))
        decoded = self._decode(encoded, splits) if method.drops and sides else {}
        for name, passes, target, masks, weight in sides:
            if method.drops:
                hidden = torch.cat([gather_patches(target, split.masked) for split in splits[name]])
                mse = F.mse_loss(full(decoded[name]), hidden)
                # The share of the variance, which is 1, that is explained; a patch of silence has none and counts as 1.
                named |= {f"{name}_mse": mse.detach(), f"{name}_explained": 1 - mse.detach()}
                total = total + weight * mse
                continue
            predicted, rebuilt = self.heads(*(gather_patches(p, mask) for p, mask in zip(passes, masks, strict=False)))
            targets = [gather_patches(target, mask) for mask in masks]
            loss = masked_patch_loss(predicted, rebuilt, targets[0], self.config.softmax, targets[-1])
            named |= {f"{name}_nce": loss.nce.detach(), f"{name}_mse": loss.mse.detach()}
            named[f"{name}_accuracy"] = loss.accuracy
            total = total + weight * (loss.nce + self.config.r_g * loss.mse)
        if latent:
            utterance = self._utterance_loss(encoded, latent.clip)
            named["utterance_mse"] = utterance.detach()
            for name, variance in latent.variance.items():  # 0: the teacher, or what is predicted of it, has collapsed
                named[f"{name}_target_variance"] = variance
                named[f"{name}_prediction_variance"] = full(decoded[name]).detach().var(dim=1, correction=0).mean()
            total = total + self.config.r_u * utterance
        value = total.detach()
        if method.contrast:
            weight = 1.0 if method.contrast_only else self.config.r_cl
            pooled = self._pool(encoded)
            if cached is None:
                contrast, accuracy = self.contrast(*pooled)
                total, contrast = total + weight * contrast, contrast.detach()
            else:  # only the gradient comes from this micro-batch
                contrast, accuracy = cached.loss, cached.accuracy
                total = total + weight * ((pooled.query * cached.query).sum() + (pooled.key * cached.key).sum())
            value = value + weight * contrast
            named |= {"contrast": contrast, "contrast_accuracy": accuracy}
        return Losses(total, {"loss": value, **named})

    def _decode(self, encoded: Encoded, splits: dict[str, list[Split]]) -> dict[str, torch.Tensor]:
        """The dropped patches of each representation, or what stands for them, out of the visible ones: [B, K, P * P].

        Several views of a clip are rows of the batch: all clips of the first one, and so on.
        """
        views = self.hidden.views
        streams = [torch.cat(getattr(encoded, name)) for name in views]
        parts = [Split(*map(torch.cat, zip(*splits[name], strict=True))) for name in views]
        decoded: list[torch.Tensor] = []
        for decoder in self.decoders:
            own = slice(len(decoded), len(decoded) + len(views) // len(self.decoders))
            decoded += decoder(streams[own], parts[own])
        return dict(zip(views, decoded, strict=True))

    def _latent(self, batch: Batch, fbank: torch.Tensor | None) -> LatentTargets | None:
        """The teacher's targets of whole clips; None: there is no teacher."""
        if self.teacher is None:
            return None
        self.teacher.match(self.model, batch.position.device)
        waveform = batch.waveform if self.method.wav else None
        return latent_targets(self.teacher(fbank, waveform, batch.length, batch.frames))

    def _utterance_loss(self, encoded: Encoded, target: torch.Tensor) -> torch.Tensor:
        """Mean over streams and views of the square error of the clip's target [B, D]."""
        means = torch.stack([full(tokens).mean(dim=1) for tokens in (*encoded.spec, *encoded.wav)])
        said = full(self.summary(means.to(self.model.dtype)))
        return F.mse_loss(said, target.expand_as(said))

    def _target(self, name: str, fbank: torch.Tensor | None, wav_map: torch.Tensor | None) -> torch.Tensor:
        """All patches [B, N, P * P] that are predicted, float32: normalised where they are learned or an MAE's."""
        maps = full(_given(fbank)).transpose(1, 2) if name == "spec" else full(_given(wav_map).detach())
        pixels = patchify(maps, self.model.config.patch)
        return pixels if name == "spec" and not self.method.drops else normalise_patches(pixels)

    def _rebuild(
        self, encoded: Encoded, fbank: torch.Tensor | None, wav_map: torch.Tensor | None, mask: torch.Tensor,
        splits: dict[str, list[Split]], grids: dict[str, tuple[int, int]],
    ) -> Rebuilt:  # fmt: skip
        """Of the spectrogram where it is masked, else of the waveform's map."""
        name = "spec" if self.method.masked_spec else "wav"
        title = {"spec": "spectrogram", "wav": "waveform map"}[name]
        target, grid = self._target(name, fbank, wav_map), grids[name]
        if self.method.drops:
            return Rebuilt(title, target, splits[name][0].masked, self._decode(encoded, splits)[name], grid)
        _, reconstructed = self.heads(gather_patches(getattr(encoded, name)[0], mask))
        return Rebuilt(title, target, mask, reconstructed, grid)

    def _pool(self, encoded: Encoded) -> Pooled:
        """What is contrasted: mean (visible) patch tokens of a clip, or with `level` = "token" the tokens themselves.

        The spectrogram's last pass is the clean one where there is one.
        """
        key = (encoded.spec or encoded.wav)[-1 if self.config.clean_spectrogram else 0]
        views = [full((*encoded.spec, *encoded.wav)[-1]), full(key)]
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
        pos_weight: float32 [C], of `positive_weights`; None: 1.

    Raises:
        UserError: settings that contradict each other.
    """

    def __init__(
        self,
        recipe: FinetuneRecipe,
        mel_bins: int,
        frames: int,
        classes: int,
        single_label: bool,
        pos_weight: torch.Tensor | None = None,
    ) -> None:
        super().__init__()
        config = recipe.finetune
        self.method = method = FINETUNE[config.method]
        self.loss = config.loss_of(single_label)
        of_bce = {key: getattr(config, key) for key in ("gamma_pos", "gamma_neg", "margin", "pos_weight")}
        for key, value in of_bce.items():
            if value and self.loss == "ce":
                raise UserError(f"finetune.{key} = {value}, but the loss is ce; set finetune.loss=bce, or {key}=0")
        if config.mask_freq and config.pool == "rows":
            raise UserError(
                f"finetune.mask_freq = {config.mask_freq} takes rows out that finetune.pool = rows keeps apart; set "
                "mask_freq=0 or another pool"
            )
        self.config, self.pos_weight = config, pos_weight  # no buffer: an engine in bf16 would round it
        streams = Streams(
            spec=method.spec,
            wav=method.wav,
            mel_bins=mel_bins,
            frames=frames,
            bottlenecks=config.bottlenecks if method.fusion else 0,
            fusion_layer=config.fusion_layer,
            pool=config.pool,
            mask_freq=config.mask_freq,
            mask_time=config.mask_time,
            seed=recipe.run.seed,
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
        wav_map = None
        if self.method.wav:
            wav_map = self.model.waveform_map(_given(batch.waveform), batch.length, batch.frames)
        if wav_map is not None and self.training and self.augment.mask_map:
            wav_map = mask_fbank(wav_map.transpose(1, 2), self.augment, self.seed, batch.position).transpose(1, 2)
        encoded: Encoded = self.model(fbank, wav_map, position=batch.position)
        return encoded

    def forward(self, batch: Batch) -> Losses:
        """One micro-batch."""
        logits = self.classifier(self.encode(batch))
        if self.pos_weight is not None:
            self.pos_weight = self.pos_weight.to(logits.device)  # once
        config = self.config
        loss = classification_loss(
            logits, batch.targets, self.loss, smoothing=config.label_smoothing, gamma_pos=config.gamma_pos,
            gamma_neg=config.gamma_neg, margin=config.margin, pos_weight=self.pos_weight,
        )  # fmt: skip
        named = {"loss": loss.detach()}
        if self.loss == "ce":
            hits = logits.detach().argmax(dim=1) == batch.targets.argmax(dim=1)
            named["accuracy"] = hits.float().mean()
        return Losses(loss, named, logits)


def task_of(recipe: PretrainRecipe | FinetuneRecipe, loader: Loader) -> PretrainTask | FinetuneTask:
    """The task of a recipe for a loader's clips, with random weights of torch's generator.

    Raises:
        UserError: settings that contradict each other or the clips.
    """
    spec = loader.spec
    if isinstance(recipe, PretrainRecipe):
        data = recipe.data.model_copy(update={"seconds": spec.seconds})  # where the loader is not the recipe's
        return PretrainTask(recipe.model_copy(update={"data": data}), spec.mel_bins, spec.frames)
    if recipe.finetune.loss == "ce" and not spec.single_label:
        raise UserError(
            "finetune.loss = ce, but there are clips with several labels or none: the first would count several times, "
            "the others not at all; set finetune.loss=bce"
        )
    power, weights = recipe.finetune.pos_weight, None
    if power:
        weights = positive_weights(loader.class_counts()[1], loader.clips, power)
    return FinetuneTask(recipe, spec.mel_bins, spec.frames, len(spec.labels), spec.single_label, weights)


def _given(tensor: torch.Tensor | None) -> torch.Tensor:
    if tensor is None:
        raise ValueError("the batch lacks a representation that the method reads; see Loader")
    return tensor
