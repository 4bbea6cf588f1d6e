"""What a trained model must remember of its data, so that it can hear a file without the shards.

In: the shards and the data settings. Out: `data.json` in the run directory, a checked `DataSpec`.
"""

import math
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline.config import DataConfig
from pipeline.data.corpus import Corpus
from pipeline.data.fbank import padded_frames
from pipeline.data.manifest import Label
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
        digest: Of the shards, as in `Corpus`.
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
    def of(corpus: Corpus, data: DataConfig) -> "DataSpec":
        """From the shards, where the settings do not say otherwise; of several sets, over all clips alike.

        So the normalisation does not move with the weights.

        Raises:
            UserError: their sample rate is not the model's.
        """
        audio = corpus.audio
        if audio.sample_rate != SAMPLE_RATE:
            raise UserError(
                f"{data.shown}: sample rate {audio.sample_rate} Hz, the model reads {SAMPLE_RATE}; rebuild the shards "
                f"with --sample-rate {SAMPLE_RATE}"
            )
        splits = [member.manifest.splits[name] for member in corpus.members for name in member.train]
        # Clips have equally many values: weights are shares of clips. hypot of one number is that number, to the bit.
        shares = [split.clips / max(1, sum(other.clips for other in splits)) for split in splits]
        mean = math.fsum(share * split.fbank_mean for share, split in zip(shares, splits, strict=True))
        deviations = [value for share, split in zip(shares, splits, strict=True)
                      for value in (share**0.5 * split.fbank_std, share**0.5 * (split.fbank_mean - mean))]  # fmt: skip
        return DataSpec(
            sample_rate=audio.sample_rate,
            samples=audio.samples,
            mel_bins=corpus.fbank.mel_bins,
            frames=data.frames or padded_frames(audio.samples / audio.sample_rate),
            mean=mean if data.mean is None else data.mean,
            std=math.hypot(*deviations) if data.std is None else data.std,
            labels=corpus.labels,
            single_label=corpus.single_label,
            digest=corpus.digest,
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
