"""The paper's methods as data (Table 2, Appendix A.3), and later ones: what is encoded, masked, contrasted and fused.

In: a method's name. Out: a row that the model and the tasks read. A new method is a new row; no code
asks for a method by name.

Any pretraining, or none (random weights), goes with any finetuning that reads a representation which it
has learned to embed; `mismatch` says why the others do not:

| pretraining | ast | wast | swast | swab |
|---|---|---|---|---|
| none | yes | yes | yes | yes |
| ssast, audio_mosaic (SSAST, AST and HF weights too) | yes | no | waveform side afresh | waveform side afresh |
| wapt | no | yes ("WaPT-AST", Table 8) | spectrogram side afresh | spectrogram side afresh |
| swapt, swacl, pswacl, craft_* | waveform side dropped | spectrogram side dropped | yes | yes |

Of craft_latent these are the student's weights, as in EAT; its teacher's are teacher.safetensors of the checkpoint.
"""

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class PretrainMethod:
    """One way to pretrain.

    Attributes:
        label: The paper's spelling.
        spec: The spectrogram is encoded.
        wav: The waveform is encoded.
        masked_spec: Spectrogram patches are masked and predicted (MSPM, Eq. 2).
        masked_wav: Waveform patches are masked and predicted (Eq. 3).
        contrast: The two representations of a clip are contrasted (SWaCL, Eq. 4a), or two views of the only one.
        meaning: One line for people.
        drops: The encoder takes visible patches alone. Masked ones are rebuilt by a decoder of their own (MAE, He et
            al. 2022), and the contrast is of visible ones.
        latent: What is predicted of masked patches is not in the data: a teacher, the exponential mean of the network
            itself, makes it out of the whole clip (data2vec 2.0, Baevski et al. 2023; EAT, Chen et al. 2024).
    """

    label: str
    spec: bool
    wav: bool
    masked_spec: bool
    masked_wav: bool
    contrast: bool
    meaning: str
    drops: bool = False
    latent: bool = False

    @property
    def contrast_only(self) -> bool:
        """The contrast is the whole loss, with weight 1 (Table 6)."""
        return not (self.masked_spec or self.masked_wav)


@dataclass(frozen=True)
class FinetuneMethod:
    """One way to finetune.

    Attributes:
        label: The paper's spelling.
        spec: The spectrogram is encoded.
        wav: The waveform is encoded.
        fusion: The streams exchange bottleneck tokens (SWaB, Eq. 5).
        meaning: One line for people.
    """

    label: str
    spec: bool
    wav: bool
    fusion: bool
    meaning: str

    @property
    def streams(self) -> int:
        """Number of encoded representations."""
        return int(self.spec) + int(self.wav)


PRETRAIN: dict[str, PretrainMethod] = {
    "ssast": PretrainMethod("SSAST", True, False, True, False, False, "masked spectrogram patches (Eq. 2)"),
    "wapt": PretrainMethod("WaPT", False, True, False, True, False, "masked waveform patches (A.3)"),
    "swapt": PretrainMethod("SWaPT", True, True, True, True, False, "both masked, no contrast (Eq. 3)"),
    "swacl": PretrainMethod("SWaCL", True, True, False, False, True, "contrast only (Table 6)"),
    "pswacl": PretrainMethod("PSWaCL", True, True, True, False, True, "masked spectrogram + contrast (Eq. 4b): CRAFT"),
    "craft_mae": PretrainMethod(
        "CRAFT-MAE", True, True, True, True, True, "both rebuilt from their visible patches + contrast", drops=True
    ),
    "craft_latent": PretrainMethod(
        "CRAFT-Latent", True, True, True, True, False, "what a teacher makes of both", drops=True, latent=True
    ),
    "craft_mosaic": PretrainMethod(
        "CRAFT-Mosaic", True, True, False, False, True, "contrast of visible patches of both", drops=True
    ),
    "audio_mosaic": PretrainMethod(
        "AudioMosaic", True, False, False, False, True, "contrast of two views of the spectrogram", drops=True
    ),
}

FINETUNE: dict[str, FinetuneMethod] = {
    "ast": FinetuneMethod("AST", True, False, False, "spectrogram tokens"),
    "wast": FinetuneMethod("WAST", False, True, False, "waveform tokens"),
    "swast": FinetuneMethod("SWAST", True, True, False, "both, late concatenation (3.2)"),
    "swab": FinetuneMethod("SWaB", True, True, True, "both, fusion bottlenecks (Eq. 5): CRAFT"),
}


class Reads(Protocol):
    """What has a spectrogram side, a waveform side, or both: a row of either table, or a file of weights."""

    @property
    def spec(self) -> bool:
        """The spectrogram is encoded."""
        ...

    @property
    def wav(self) -> bool:
        """The waveform is encoded."""
        ...


def mismatch(trained: Reads, wanted: Reads) -> str:
    """Why weights that were trained on one set of representations do not serve another; empty: they do."""
    if (trained.spec and wanted.spec) or (trained.wav and wanted.wav):
        return ""
    names = ("waveforms", "spectrograms") if trained.wav else ("spectrograms", "waveforms")
    fitting = [key for key, row in FINETUNE.items() if (trained.spec and row.spec) or (trained.wav and row.wav)]
    return (
        f"its weights were trained on {names[0]} alone and this method reads {names[1]} alone: what embeds them would "
        f"be random, under blocks that never saw such tokens; use a method that reads {names[0]} (finetuning: "
        f"{', '.join(fitting)}), or other weights"
    )
