"""What a trained model must remember of its data, so that it can hear a file without the shards.

In: a manifest and the data settings. Out: `data.json` in the run directory, a checked `DataSpec`.
"""

import math
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline.config import DataConfig
from pipeline.data.fbank import padded_frames
from pipeline.data.manifest import Label, Manifest
from pipeline.errors import UserError
from pipeline.files import write_text

SAMPLE_RATE = 16000  # MSAE pools 160 samples, the 10 ms hop of the fbank, to a frame


class DataSpec(BaseModel):
    """Audio format, normalisation and label vocabulary.

    Attributes:
        sample_rate: Hz.
        samples: L.
        mel_bins: M.
        frames: T.
        mean: Of the raw fbank.
        std: Of the raw fbank; the input is (x - mean) / (2 std).
        labels: Vocabulary, C entries.
        single_label: Every clip has exactly one label.
        digest: Of the manifest.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    sample_rate: int
    samples: int
    mel_bins: int
    frames: int
    mean: float
    std: float
    labels: list[Label]
    single_label: bool
    digest: str

    @staticmethod
    def of(manifest: Manifest, data: DataConfig) -> "DataSpec":
        """From the manifest, where the settings do not say otherwise.

        Raises:
            UserError: a training split is not in the shards, or their sample rate is not the model's.
        """
        if manifest.audio.sample_rate != SAMPLE_RATE:
            raise UserError(
                f"{data.shards}: sample rate {manifest.audio.sample_rate} Hz, the model reads {SAMPLE_RATE}; rebuild "
                f"the shards with --sample-rate {SAMPLE_RATE}"
            )
        for name in data.train_splits:
            if name not in manifest.splits:
                raise UserError(
                    f"data.train_split = '{data.train_split}': there is no split '{name}' in {data.shards}, which has "
                    f"{', '.join(manifest.splits)}; name one of these"
                )
        # Clips have equally many values: weights are shares of clips. hypot of one number is that number, to the bit.
        splits = [manifest.splits[name] for name in data.train_splits]
        shares = [split.clips / max(1, sum(other.clips for other in splits)) for split in splits]
        mean = math.fsum(share * split.fbank_mean for share, split in zip(shares, splits, strict=True))
        deviations = [value for share, split in zip(shares, splits, strict=True)
                      for value in (share**0.5 * split.fbank_std, share**0.5 * (split.fbank_mean - mean))]  # fmt: skip
        return DataSpec(
            sample_rate=manifest.audio.sample_rate,
            samples=manifest.audio.samples,
            mel_bins=manifest.fbank.mel_bins,
            frames=data.frames or padded_frames(manifest.audio.samples / manifest.audio.sample_rate),
            mean=mean if data.mean is None else data.mean,
            std=math.hypot(*deviations) if data.std is None else data.std,
            labels=manifest.labels,
            single_label=manifest.single_label,
            digest=manifest.digest,
        )

    def save(self, run_dir: Path) -> None:
        """Writes `data.json`."""
        write_text(run_dir / "data.json", self.model_dump_json(indent=1))

    @staticmethod
    def load(run_dir: Path) -> "DataSpec":
        """Reads `data.json`.

        Raises:
            UserError: it is missing or damaged.
        """
        path = run_dir / "data.json"
        try:
            return DataSpec.model_validate_json(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}; --checkpoint takes a run directory of finetune.py") from error
        except ValidationError as error:
            raise UserError(f"{path}: {error.errors()[0]['msg']}; the run directory is damaged") from error
        except ValueError as error:
            raise UserError(f"{path}: {error}; the run directory is damaged") from error
