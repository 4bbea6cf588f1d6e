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

SHORTEST = 0.16  # seconds of input, which are 32 frames: two columns of patches
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
        seconds: Lengths of input below `samples`, ascending; see `lengths`.
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
    seconds: tuple[float, ...] = ()

    @property
    def lengths(self) -> tuple[int, ...]:
        """Samples of the inputs, ascending: a clip has the shortest that holds its audio."""
        return (*(round(seconds * self.sample_rate) for seconds in self.seconds), self.samples)

    def length_of(self, samples: int) -> int:
        """The shortest of the `lengths` that holds so many samples of audio; of longer audio the last one."""
        return next((length for length in self.lengths if samples <= length), self.samples)

    def frames_of(self, samples: int) -> int:
        """T of inputs of one of the `lengths`."""
        return self.frames if samples == self.samples else padded_frames(samples / self.sample_rate)

    @staticmethod
    def of(corpus: Corpus, data: DataConfig) -> "DataSpec":
        """From the shards, where the settings do not say otherwise; of several sets, over all clips alike.

        So the normalisation does not move with the weights.

        Raises:
            UserError: their sample rate is not the model's, or a length of `data.seconds` is not below theirs.
        """
        audio = corpus.audio
        if audio.sample_rate != SAMPLE_RATE:
            raise UserError(
                f"{data.shown}: sample rate {audio.sample_rate} Hz, the model reads {SAMPLE_RATE}; rebuild the shards "
                f"with --sample-rate {SAMPLE_RATE}"
            )
        whole = audio.samples / audio.sample_rate
        if data.seconds and not SHORTEST <= data.seconds[0] <= data.seconds[-1] < whole:
            raise UserError(
                f"data.seconds = {list(data.seconds)}: the clips of {data.shown} have {whole:g} s, a length "
                f"of their own; give shorter ones, from {SHORTEST} s on"
            )
        splits = [member.manifest.splits[name] for member in corpus.members
                  for name in member.train or member.manifest.splits]  # fmt: skip
        # Clips have equally many values: weights are shares of clips. hypot of one number is that number, to the bit.
        shares = [split.clips / max(1, sum(other.clips for other in splits)) for split in splits]
        mean = math.fsum(share * split.fbank_mean for share, split in zip(shares, splits, strict=True))
        deviations = [value for share, split in zip(shares, splits, strict=True)
                      for value in (share**0.5 * split.fbank_std, share**0.5 * (split.fbank_mean - mean))]  # fmt: skip
        return DataSpec(
            sample_rate=audio.sample_rate,
            samples=audio.samples,
            mel_bins=corpus.fbank.mel_bins,
            frames=data.frames or padded_frames(whole),
            mean=mean if data.mean is None else data.mean,
            std=math.hypot(*deviations) if data.std is None else data.std,
            labels=corpus.labels,
            single_label=corpus.single_label,
            digest=corpus.digest,
            seconds=data.seconds,
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
            return DataSpec.parse(path.read_bytes(), path)
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}; --checkpoint takes a run directory of finetune.py") from error

    @staticmethod
    def parse(content: str | bytes, path: Path) -> "DataSpec":
        """Reads what a run or an export of one recorded in a file.

        Raises:
            UserError: it is damaged.
        """
        try:
            return DataSpec.model_validate_json(content)
        except ValidationError as error:
            raise UserError(f"{path}: {error.errors()[0]['msg']}; it is damaged, or of another version") from error
