"""The stations that data passes on its way from a source file to a loss.

    Clip                ->  Batch         ->  Encoded        ->  Losses
    (a source file's        (this rank's      (tokens after      (named scalars
     segment + labels)       micro-batch)      the encoder)       + metrics)

Between the first two lie the shards: a sample is read from its tar straight into its row of a batch.

Shape legend, used by every docstring of the project:

    B clips of a micro-batch      L waveform samples (160000 = 10 s)   T fbank frames (1024)
    M mel bins (128)              N patches (512 = 8 x 64)             D encoder width (768)
    C classes                     F fusion bottleneck tokens (64)      R ranks
    K masked patches (400)        G clips of the global batch (180)

Imports nothing but torch, so every room may import it.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch


@dataclass(frozen=True, slots=True)
class Clip:
    """One labelled segment of a source file, before it is decoded.

    Attributes:
        key: Sample key in the shards: unique within a split, `[A-Za-z0-9_-]` only, never a dot
            (WebDataset splits a member's name at its first dot).
        path: Source file, or `CONTAINER::MEMBER` of a tar, zip, Parquet or HDF5 file.
        start: First second of the segment in the file.
        end: Last second of the segment; None is the end of the file or `start` + clip length.
        labels: Indices into the label vocabulary, ascending.
        split: Name of the split.
        fold: Cross-validation fold, 1-based; 0 where the data set has none.
        id: The data set's own name for the clip (YouTube id, file name), for `failures.jsonl`.
        trimmed: The file is known to be the segment itself, and `start` is 0; False: it is not; None: it is where
            `start` is not 0 and the file, as long as the segment, ends before it (AudioSet, names without a start).
        line: Of the table that lists the clip, for `failures.jsonl`; 0: there is no table.
        at: Where the bytes of a member are in its container (`shard_tools/sources.py`); None: it is found by its name.
        events: Onset and offset in seconds, and label index, of sound events that the data set lists.
        others: The same clip in other files, to be tried in this order where this one cannot be decoded.
    """

    key: str
    path: str
    start: float
    end: float | None
    labels: tuple[int, ...]
    split: str
    fold: int = 0
    id: str = ""
    trimmed: bool | None = None
    line: int = field(default=0, compare=False)
    at: tuple[int, int] | None = field(default=None, compare=False)
    events: tuple[tuple[float, float, int], ...] = ()
    others: tuple["Clip", ...] = ()


@dataclass(slots=True)
class Batch:
    """One rank's clips of one step, or a micro-batch of them. Every tensor is on one device.

    Attributes:
        position: int64 [B], position of each clip in the run's sample stream. Randomness (masks,
            augmentation) is keyed by it, so a clip gets the same draw on any rank.
        row: int64 [B], row of each clip in the shard index.
        valid: bool [B], False where a row only fills up the last batch of an evaluation.
        waveform: float32 [B, L] in [-1, 1), or None.
        fbank: float32 [B, T, M], normalised to (x - mean) / (2 std) and zero-padded to T, or None.
        targets: float32 [B, C], multi-hot; soft after mixup.
        length: int64 [B], samples of audio before the waveform's zero padding; None: there is no padding.
        frames: T; None: the model's own.
    """

    position: torch.Tensor
    row: torch.Tensor
    valid: torch.Tensor
    waveform: torch.Tensor | None
    fbank: torch.Tensor | None
    targets: torch.Tensor
    length: torch.Tensor | None = None
    frames: int | None = None

    def __len__(self) -> int:
        return len(self.position)

    def split(self, size: int) -> list["Batch"]:
        """Cuts the batch into micro-batches of `size` clips (views, no copy)."""
        return [self[i : i + size] for i in range(0, len(self), size)]

    def hand_over(self, stream: "torch.cuda.Stream") -> None:
        """Makes the current stream wait for `stream`, which made the batch, and keeps its memory until it is used."""
        current = torch.cuda.current_stream(stream.device)
        current.wait_stream(stream)
        for tensor in (self.position, self.row, self.valid, self.waveform, self.fbank, self.targets, self.length):
            if tensor is not None:
                tensor.record_stream(current)

    def __getitem__(self, rows: slice) -> "Batch":
        return replace(
            self,
            position=self.position[rows],
            row=self.row[rows],
            valid=self.valid[rows],
            waveform=None if self.waveform is None else self.waveform[rows],
            fbank=None if self.fbank is None else self.fbank[rows],
            targets=self.targets[rows],
            length=None if self.length is None else self.length[rows],
        )


class Encoded(NamedTuple):
    """Patch tokens after the encoder's last LayerNorm; cls, dist and bottlenecks are cut off.

    A tuple, as is `Losses`, because ZeRO-3's hooks look for tensors in tuples and not in dataclasses.
    Each entry is one pass of a representation through the encoder: one in finetuning, up to three
    in pretraining (two masks, one clean); none where the method does not read the representation. Where patches are
    dropped before the encoder, N counts those that stay.

    Attributes:
        spec: [B, N, D] each, of the spectrogram.
        wav: [B, N, D] each, of the waveform (its own N where the MSAE map is not M high).
    """

    spec: tuple[torch.Tensor, ...]
    wav: tuple[torch.Tensor, ...]


class Losses(NamedTuple):
    """What one forward pass of a task returns.

    Attributes:
        total: Scalar float32 to call backward on. The mean of its *gradient* over ranks and
            micro-batches is the gradient of the global batch's loss; its value is not reported.
        named: Detached float32 scalars whose mean over ranks and micro-batches is the global
            value: the loss, its terms, and metrics such as the masked accuracy.
        logits: [B, C] of a classification task.
    """

    total: torch.Tensor
    named: dict[str, torch.Tensor]
    logits: torch.Tensor | None = None


def full(x: torch.Tensor) -> torch.Tensor:
    """`x` in float32, where half precision stops: losses, softmaxes and means; float64, of references, stays.

    Any float type in, float32 of bf16 and fp16 out.
    """
    return x.to(torch.promote_types(x.dtype, torch.float32))


def without_autocast(x: torch.Tensor) -> AbstractContextManager[None]:
    """In it products keep the type of their factors, on the device of `x`; the meta device has no autocast."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()
