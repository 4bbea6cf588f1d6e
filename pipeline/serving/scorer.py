"""Audio in, label probabilities out: what the served model does.

In: a file, its bytes, or samples. Out: float32 [n, C]. Audio goes the way of the shards: mono, resampled
with soxr, DC removed, rounded to int16, so that a served clip scores as the same clip in the shards.
"""

import tempfile
import threading
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import soxr
import torch

from pipeline.data.fbank import fbank, pad_frames
from pipeline.data.spec import DataSpec
from pipeline.errors import UserError
from pipeline.flow import Batch
from pipeline.model.heads import stream_means
from pipeline.tasks import FinetuneTask
from shard_tools.decode import MAX_RATE, MIN_RATE, Decoded, DecodeError
from shard_tools.guard import guarded_decode
from shard_tools.segment import MachineError, down_mix
from shard_tools.write import encode_waveform

BATCH = 16  # windows of a forward pass
MAX_BYTES = 256 << 20  # of a file that is given as bytes
_DECODING = threading.Lock()  # a server has threads, and one decoder process


class Scorer:
    """A finetuned model that hears audio.

    Args:
        task: The model, in evaluation mode.
        spec: Its audio format and labels.
    """

    def __init__(self, task: FinetuneTask, spec: DataSpec) -> None:
        self.task = task
        self.spec = spec

    @property
    def labels(self) -> list[str]:
        """Names of the C classes."""
        return [label.name for label in self.spec.labels]

    @property
    def seconds(self) -> float:
        """Length of a clip."""
        return self.spec.samples / self.spec.sample_rate

    def read(self, source: str | bytes, seconds: float | None = None) -> np.ndarray:
        """A file's or its bytes' first seconds, mono at the model's rate: float32 [n].

        Decoded in a process of its own, for at most a minute: the file may be anybody's.

        Args:
            source: Path, or the content of an audio file.
            seconds: At most this much; None: a clip.

        Raises:
            UserError: it is neither, is too large, or cannot be decoded.
        """
        if isinstance(source, str) and source and "\0" not in source:
            return self._decode(source, source, seconds or self.seconds)
        if not isinstance(source, bytes):
            raise UserError(f"audio {source!r:.100}: give the path of a file, or the bytes of one")
        if len(source) > MAX_BYTES:
            raise UserError(f"the given bytes: {len(source)}, and at most {MAX_BYTES} are read; cut the recording")
        try:
            with tempfile.NamedTemporaryFile(suffix=".audio") as file:  # decoders read containers by seeking
                file.write(source)
                file.flush()
                return self._decode(file.name, "the given bytes", seconds or self.seconds)
        except OSError as error:
            raise UserError(f"the given bytes: {error.strerror}; they are kept in {tempfile.gettempdir()}") from error

    def probabilities(self, waveforms: list[np.ndarray]) -> np.ndarray:
        """Of each waveform's first clip length: float32 [n, C]; softmax where the loss was ce, else sigmoids."""
        clips = [waveform[: self.spec.samples] for waveform in waveforms]
        parts = [self.hear(clips[i : i + BATCH])[0] for i in range(0, len(clips), BATCH)]
        return np.concatenate(parts) if parts else np.zeros((0, len(self.spec.labels)), np.float32)

    def over_time(self, waveform: np.ndarray, hop: float) -> tuple[np.ndarray, np.ndarray]:
        """Windows of a clip's length, `hop` seconds apart, and one that ends with the recording, as `listen` has them.

        Returns:
            Start seconds [n]; probabilities [n, C].
        """
        found = [one for part, _, _ in windows([waveform], self.spec.samples, step_of(self.spec, hop)) for one in part]
        starts = np.array([start for start, _ in found])
        return starts / self.spec.sample_rate, self.probabilities([window for _, window in found])

    def _decode(self, path: str, name: str, seconds: float) -> np.ndarray:
        try:
            with _DECODING:
                return guarded_decode(path, 0.0, None, rate=self.spec.sample_rate, seconds=seconds).waveform
        except (DecodeError, MachineError) as error:
            raise UserError(f"{name}: {error}") from error

    def hear(self, waveforms: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """One forward pass over clips [n] of at most a clip's length.

        Returns:
            Probabilities [n, C]; embeddings [n, streams x D], the mean token of each stream, the spectrogram's
            first. Both float32.
        """
        order, groups = by_length(waveforms, self.spec)
        found: list[tuple[np.ndarray, np.ndarray]] = []
        for samples, some in groups:
            batch = batch_of(some, self.spec, next(self.task.parameters()).device, samples)
            with torch.no_grad():
                encoded = self.task.encode(batch)
                logits = self.task.classifier(encoded)
                embedding = torch.cat(stream_means(encoded), dim=1)
            scores = logits.softmax(dim=1) if self.task.loss == "ce" else logits.sigmoid()
            found.append((scores.float().cpu().numpy(), embedding.float().cpu().numpy()))
        scores_of, embeddings = (np.concatenate(parts)[order] for parts in zip(*found, strict=True))
        return scores_of, embeddings


def resample(samples: Any, rate: float, to: int) -> np.ndarray:
    """Samples [n] or [n, channels] in [-1, 1] at `rate` Hz -> float32 [m], mono at `to` Hz.

    Raises:
        UserError: nothing in them or too little for one sample at `to`, not finite, numbers of a file of integers, more
            channels than samples, or no rate of audio.
    """
    if not MIN_RATE <= rate <= MAX_RATE:
        raise UserError(f"samples at {rate} Hz: give a rate from {MIN_RATE} to {MAX_RATE}")
    try:
        array = np.asarray(samples, dtype=np.float32)
    except (ValueError, TypeError) as error:
        raise UserError(f"samples: {error}; give finite floats [n] or [n, channels]") from error
    if array.ndim not in (1, 2) or not array.size or not np.isfinite(array).all():
        raise UserError(f"samples of shape {array.shape}: give finite floats [n] or [n, channels]")
    if array.ndim == 2 and array.shape[0] < array.shape[1]:
        raise UserError(f"samples of shape {array.shape}: more channels than samples; transpose them to [n, channels]")
    kind = getattr(samples, "dtype", None)
    if kind is not None and np.issubdtype(kind, np.integer):
        raise UserError(f"samples of type {kind}: give floats in [-1, 1]; divide int16 by 32768, int32 by 2147483648")
    mono = down_mix(array) if array.ndim == 2 else array
    made = mono if rate == to else np.asarray(soxr.resample(mono, rate, to, quality="HQ"), dtype=np.float32)
    if not len(made):
        raise UserError(f"samples of shape {array.shape} at {rate:g} Hz: too few for one at {to} Hz; give more")
    return made


def step_of(spec: DataSpec, hop: float) -> int:
    """Samples between windows that are `hop` seconds apart."""
    return max(1, round(hop * spec.sample_rate))


def by_length(waveforms: list[np.ndarray], spec: DataSpec) -> tuple[np.ndarray, list[tuple[int, list[np.ndarray]]]]:
    """Clips by the length of input that they have.

    Returns:
        Where each clip is found in the groups one behind the other: int64 [n]; samples and clips of each group.
    """
    lengths = np.array([spec.length_of(len(waveform)) for waveform in waveforms])
    groups = [(samples, [waveforms[i] for i in np.flatnonzero(lengths == samples)])
              for samples in np.unique(lengths).tolist()]  # fmt: skip
    return np.argsort(np.argsort(lengths, kind="stable")), groups


def batch_of(waveforms: Sequence[np.ndarray], spec: DataSpec, device: torch.device, samples: int = 0) -> Batch:
    """Waveforms [n] as a batch of clips, zero-padded to `samples` (0: a clip's), as the shards would hold them."""
    samples = samples or spec.samples
    frames = spec.frames_of(samples)
    stored = [encode_waveform(Decoded(w, 0.0, spec.sample_rate, 1), samples)[0] for w in waveforms]
    waveform = torch.from_numpy(np.stack(stored)).to(device).float() / 32768
    features = pad_frames(fbank(waveform, spec.sample_rate, spec.mel_bins), frames)
    # On the device: a GPU would multiply by a number's reciprocal, and be one bit off what a CPU makes.
    divisor = torch.tensor(2 * spec.std, device=device)
    zero = torch.zeros(len(stored), dtype=torch.int64, device=device)
    targets = torch.zeros(len(stored), len(spec.labels), device=device)
    length = torch.tensor([min(len(w), samples) for w in waveforms], device=device)
    return Batch(zero, zero, zero == 0, waveform, (features - spec.mean) / divisor, targets, length, frames)


def windows(
    pieces: Iterable[np.ndarray], window: int, step: int
) -> Iterator[tuple[list[tuple[int, np.ndarray]], int, bool]]:
    """Cuts a recording that comes in pieces into windows; no more is kept of it than the next window needs.

    They are `step` samples apart, and the last one ends with the recording; a recording shorter than a window is one
    short window. With 10 samples, window 4 and step 3: 0-3, 3-6, 6-9; with step 4: 0-3, 4-7, 6-9.

    Args:
        pieces: Samples, float32 [n] each.
        window: Samples of a window.
        step: Samples from one to the next.

    Yields:
        After each piece, and once more at the end: (first sample, window) of those that became whole; samples so far;
        whether it is the end.
    """
    kept, first, start = np.zeros(0, np.float32), 0, 0  # samples from `first` on; the next window's start
    for piece in chain(pieces, [None]):
        kept = kept if piece is None else np.concatenate([kept, piece])
        end = first + len(kept)
        starts = list(range(start, end - window + 1, step))
        start = starts[-1] + step if starts else start
        if piece is None and end and (start == 0 or end > start - step + window):  # the rest
            starts.append(max(0, end - window))
        yield [(at, kept[at - first : at - first + window]) for at in starts], end, piece is None
        cut = min(start, end - window) - first if end > window else 0  # the last window may begin that early
        kept, first = kept[cut:].copy(), first + cut


def load_scorer(run_dir: Path, file: Path | None = None, precision: str = "fp32") -> Scorer:
    """The scorer of a finetuned run, on a GPU where there is one.

    Args:
        run_dir: Directory with config.yaml and data.json.
        file: Weights; None: those of the newest checkpoint.
        precision: See `pipeline.model.precision`.
    """
    from pipeline.model.precision import in_precision
    from pipeline.model.weights import weights_file
    from pipeline.runs import load_finetuned

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    task, spec = load_finetuned(run_dir, file or weights_file(run_dir), device)
    return Scorer(in_precision(task, precision), spec)
