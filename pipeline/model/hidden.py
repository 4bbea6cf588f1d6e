"""What a pretraining hides of each clip: its settings, checked, and the patches, drawn.

In: the settings, a row of `pipeline.methods`, the patch grids. Out: indices of masked or visible patches for each time
that the encoder takes a representation. All is drawn with `pipeline.rng`: a clip's patches depend on the seed and its
position in the sample stream alone.
"""

from collections.abc import Sequence

import torch

from pipeline.config import PretrainConfig
from pipeline.errors import UserError
from pipeline.methods import PretrainMethod
from pipeline.model.masking import Split, cluster_masks, dropped_count, masked_count, split_patches, ssast_masks

# Settings that say something only where every patch is encoded; where some are dropped; where a decoder predicts those;
# where a teacher says what they are.
OF_MASKS = ("mask_patches", "ssast_compat", "two_pass", "r_g", "level", "mask_waveform", "clean_spectrogram", "softmax")
OF_DROPS = ("drop", "drop_ratio")
OF_DECODERS = ("decoder", "decoder_width", "decoder_depth")
OF_TEACHERS = ("views", "target_blocks", "r_u", "teacher_decay", "teacher_steps")


class HiddenPatches:
    """Masked patches of a method that encodes all, or the two parts of one that encodes the visible ones alone.

    Args:
        config: Settings.
        method: Row of the table.
        seed: The run's.
        grids: Patches along frequency and time, of "spec" and "wav", for each length of input.

    Attributes:
        views: What is encoded where patches are dropped, in the order of `pretrain.drop`: "spec", then "wav", or the
            only one twice where it is contrasted with itself.

    Raises:
        UserError: a setting that says nothing to the method, or hides all patches or none.
    """

    def __init__(
        self, config: PretrainConfig, method: PretrainMethod, seed: int, grids: Sequence[dict[str, tuple[int, int]]]
    ) -> None:
        self.config, self.seed, self.latent = config, seed, method.latent
        # Passes that are masked, and how many masks: InfoNCE and reconstruction may have one each.
        passes = 2 if config.two_pass else 1
        self._masks = {
            "spec": passes if method.masked_spec else 0,
            "wav": passes if method.masked_wav else int(method.contrast and config.mask_waveform),
        }
        views = tuple(name for name in ("spec", "wav") if getattr(method, name))
        self.views = views * 2 if method.contrast and len(views) == 1 else views
        for names, why in _senseless(method):
            for name in names:
                value = getattr(config, name)
                if value != PretrainConfig.model_fields[name].default:
                    raise UserError(
                        f"pretrain.{name} = {value} says nothing to pretrain.method = {config.method}, which {why}; "
                        "leave it out"
                    )
        for each in grids:
            if method.drops:
                self._check_drops(each)
            else:
                self._check_masks(each)

    def masks(self, name: str, position: torch.Tensor, grid: tuple[int, int]) -> list[torch.Tensor]:
        """Masked patches int64 [B, K] of each masked pass.

        Args:
            name: "spec" or "wav".
            position: int64 [B].
            grid: Of the batch.
        """
        draw = ssast_masks if self.config.ssast_compat else cluster_masks
        count = masked_count(self.config.mask_patches, grid)
        purposes = [f"mask.{name}", f"mask.{name}.second"][: self._masks[name]]
        return [draw(self.seed, purpose, position, grid, count, self.config.clusters) for purpose in purposes]

    def splits(self, position: torch.Tensor, grids: dict[str, tuple[int, int]]) -> dict[str, list[Split]]:
        """Visible and dropped patches of each view of "spec" and "wav"; where a teacher hears all, of `views` of each.

        Args:
            position: int64 [B].
            grids: Of the batch.
        """
        found: dict[str, list[Split]] = {"spec": [], "wav": []}
        for name, kind, ratio in zip(self.views, self.config.drop, self.config.drop_ratio, strict=False):
            for _ in range(self.config.views if self.latent else 1):
                number = len(found[name])
                purpose = f"drop.{name}" + {0: "", 1: ".second"}.get(number, f".{number}")
                sides = self.config.clusters
                found[name].append(split_patches(self.seed, purpose, position, grids[name], kind, ratio, sides))
        return found

    def _check_masks(self, grids: dict[str, tuple[int, int]]) -> None:
        """Whether K masked patches leave others; SSAST's generator needs two of them."""
        for name, (height, width) in grids.items():
            most = height * width - (2 if self.config.ssast_compat else 1)
            count = masked_count(self.config.mask_patches, (height, width))
            if self._masks[name] and count > most:
                raise UserError(
                    f"pretrain.mask_patches = {self.config.mask_patches}: {count} masked patches, but {height} x "
                    f"{width} patches allow {most}; lower it"
                )

    def _check_drops(self, grids: dict[str, tuple[int, int]]) -> None:
        """Whether each view keeps something."""
        for name, kind, ratio in zip(self.views, self.config.drop, self.config.drop_ratio, strict=False):
            units, count = dropped_count(kind, ratio, grids[name])
            if count == units:  # one at least is dropped
                what = {"time": "columns", "frequency": "rows"}.get(kind, "patches")
                raise UserError(
                    f"pretrain.drop_ratio = {list(self.config.drop_ratio)}: {ratio} of {units} {what} are {count}; "
                    "choose a share that leaves some"
                )


def _senseless(method: PretrainMethod) -> list[tuple[tuple[str, ...], str]]:
    """Settings that say nothing to a method, and why."""
    found: list[tuple[tuple[str, ...], str]] = [] if method.latent else [(OF_TEACHERS, "has no teacher")]
    found.append((OF_MASKS, "encodes visible patches alone") if method.drops else (OF_DROPS, "encodes every patch"))
    return found if method.drops and not method.contrast_only else [*found, (OF_DECODERS, "has no decoder")]
