"""Shards -> files of frozen features, computed once for an encoder.

In: an encoder, shards, layers, a pooling. Out: FOLDER/DIGEST/DATA-POOL-LAYERS/SPLIT-N.safetensors, one for each piece
of `BATCH` x k neighbouring clips: `rows` int64 [n] of the shard index, `targets` uint8 [n, C], and
`STREAM.LAYER` [n, ...], float32; float16 of "tokens", which are a thousand times as many.

A piece is the work of one rank, in batches of a fixed size: the bytes are the same for any ranks, and a command that is
repeated makes those that are missing, and anew those that lack clips which could not be read. Memory: one piece, at
most `PIECE_BYTES` but for a batch. Disk, a clip: streams x layers x 4 f D bytes with "time_frequency" (24 KiB a stream
and layer of base), 4 D with "mean", 2 N D with "tokens" (768 KiB); asked for more than `most_gb`, or than the disk has,
nothing is begun. Time: a forward pass a clip, over R ranks.
"""

import logging
import math
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from pipeline import distributed
from pipeline.config import DataConfig
from pipeline.data.bad import BadClips
from pipeline.data.loader import Loader
from pipeline.data.manifest import Manifest, load_manifest
from pipeline.distributed import World
from pipeline.errors import UserError
from pipeline.files import new_file
from pipeline.flow import Batch
from pipeline.probing.frozen import Frozen, Pool, pooled

log = logging.getLogger(__name__)

BATCH = 32  # clips of a forward pass; another number would round otherwise
PIECE_BYTES = 256 << 20
MOST_BATCHES = 64  # of a piece: 2048 clips
CHUNK_BYTES = 64 << 20  # of features in float32 on the device at a time
CACHE_BYTES = 2 << 30  # of a part that stays there
LACKS = "lacks"  # in the metadata of a piece: how many of its clips could not be read

Tokens = dict[tuple[str, int], torch.Tensor]


def read_pieces(
    frozen: Frozen, data: DataConfig, layers: Sequence[int], batches: int, missing: Sequence[int], world: World
) -> Iterator[tuple[int, Loader, Iterator[tuple[Batch, Tokens]]]]:
    """The share of this rank of the missing pieces of `data.eval_split`: number, loader, its batches with their tokens.

    Args:
        frozen: Encoder, on the rank's device.
        data: See `data_of`.
        layers: From 1.
        batches: Of a piece.
        missing: Numbers of pieces, the same on all ranks.
        world: Ranks.
    """
    share = missing[world.rank :: world.size]
    if not share:
        return
    with Loader(
        data, "eval", waveform=frozen.model.streams.wav, fbank=frozen.model.streams.spec, batch_size=BATCH,
        device=world.device,
    ) as loader:  # fmt: skip
        for piece in share:
            coming = loader.batches(piece * batches, (piece + 1) * batches)
            yield piece, loader, ((batch, frozen(batch, layers)) for batch in coming)


def data_of(frozen: Frozen, shards: str, split: str, workers: int) -> DataConfig:
    """One split, normalised and at the lengths that the encoder wants."""
    spec = frozen.spec
    return DataConfig(
        shards=shards, train_split=split, eval_split=split, mean=spec.mean, std=spec.std, seconds=spec.seconds,
        frames=0 if spec.seconds else spec.frames, workers=workers,
    )  # fmt: skip


def batches_of(frozen: Frozen, data: DataConfig, clips: int) -> int:
    """Batches of a split of so many clips; each length of inputs ends with one of its own."""
    if not data.seconds:
        return -(-clips // BATCH)
    with Loader(data, "eval", waveform=frozen.model.streams.wav, fbank=frozen.model.streams.spec,
                batch_size=BATCH) as loader:  # fmt: skip
        return len(loader)


def check_bad(data: DataConfig, manifest: Manifest, kept: int) -> None:
    """Refuses a split of which too many clips could not be read.

    Raises:
        UserError: more than `data.max_bad` or `data.max_bad_share`.
    """
    clips = manifest.splits[data.eval_split].clips
    BadClips(data, lambda row: (str(row), ""), clips).check(clips - kept)


def compute(
    frozen: Frozen, shards: str, split: str, layers: Sequence[int], pool: Pool, folder: Path, world: World, *,
    workers: int = 2, most_gb: float = 100.0,
) -> list[Path]:  # fmt: skip
    """The files of a split; those that are there already and lack no clip are kept. A collective.

    Args:
        frozen: Encoder.
        shards: Directory or URL.
        split: Of the shards.
        layers: From 1.
        pool: See `frozen.pooled`.
        folder: Of features of all encoders.
        world: Ranks.
        workers: Reader processes.
        most_gb: Of disk, for this split.

    Raises:
        UserError: tokens of clips of several lengths; more features than `most_gb` or than the disk has room for; too
            many bad clips; shards or an encoder that are others than rank 0's.
    """
    if pool == "tokens" and frozen.spec.seconds:
        raise UserError(
            f"--pool tokens: {frozen.source} was trained on inputs of several lengths (data.seconds), whose numbers of "
            "tokens differ; take --probe linear, knn or cgp"
        )
    manifest = load_manifest(shards)
    same = {"shards digest": manifest.digest[:16], "encoder's digest": frozen.digest[:16]}
    distributed.check_same(same, "give all hosts the same shards and runs")
    clip = sum(math.prod(frozen.size(pool, stream)) for stream in frozen.streams) * len(layers)
    clip *= 2 if pool == "tokens" else 4
    batches = min(MOST_BATCHES, max(1, PIECE_BYTES // (BATCH * clip)))
    clips = manifest.splits[split].clips
    home = folder / frozen.digest[:16] / f"{manifest.digest[:16]}-{pool}-{'_'.join(map(str, layers))}"
    data = data_of(frozen, shards, split, workers)
    pieces = -(-batches_of(frozen, data, clips) // batches)
    files = [home / f"{split}-{piece:06d}.safetensors" for piece in range(pieces)]

    def find() -> list[int]:
        missing = [piece for piece, file in enumerate(files) if not file.exists() or _lacks(file)]
        bytes_ = clip * min(clips, BATCH * batches * len(missing))
        try:
            home.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(home).free
        except OSError as error:
            raise UserError(f"--features {home}: {error.strerror}; name a directory that can be written") from error
        if bytes_ > min(most_gb * 1e9, free):
            raise UserError(
                f"--features {home}: {clips} clips of split '{split}' take {bytes_ / 1e9:.1f} GB, {free / 1e9:.1f} are "
                f"free and --most-gb allows {most_gb:g}; take fewer layers, another --pool, or raise it"
            )
        return missing

    missing = distributed.decide(find)
    kind = torch.float16 if pool == "tokens" else torch.float32
    for piece, loader, coming in read_pieces(frozen, data, layers, batches, missing, world):
        parts: dict[str, list[torch.Tensor]] = {}
        for batch, tokens in coming:
            made = {"rows": batch.row, "targets": (batch.targets > 0.5).to(torch.uint8)}
            grids = frozen.grids_of(batch)
            for (stream, layer), sequence in tokens.items():
                made[f"{stream}.{layer}"] = pooled(sequence, pool, grids[stream]).to(kind)
            for name, values in made.items():
                parts.setdefault(name, []).append(values[batch.valid].cpu())
        lacking = loader.replaced(0)
        with new_file(files[piece]) as temporary:
            save_file({name: torch.cat(values).contiguous() for name, values in parts.items()}, temporary,
                      {LACKS: str(lacking)} if lacking else None)  # fmt: skip
        log.info("features %s: piece %d of %d", split, piece + 1, len(files))
    distributed.barrier()
    check_bad(data, manifest, sum(_rows(file) for file in files))
    return files


def _rows(file: Path) -> int:
    with _opened(file) as opened:
        return int(opened.get_slice("rows").get_shape()[0])


def _lacks(file: Path) -> bool:
    """Whether clips of a piece could not be read: the shards may have been mended since."""
    with _opened(file) as opened:
        return LACKS in (opened.metadata() or {})


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, "pt") as opened:
            yield opened
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file}: {error}; delete it, and the same command makes it again") from error


def mapped(files: Sequence[Path]) -> "Features":
    """Files of `compute`, of one or several splits, mapped into memory: what is not in use is not read."""
    pieces = []
    for file in files:
        with safe_open(file, "pt") as opened:  # its tensors are views of the mapped file
            pieces.append({name: opened.get_tensor(name) for name in opened.keys()})  # noqa: SIM118
    return Features(pieces)


class Features:
    """Features of clips.

    Args:
        pieces: What a file of `compute` holds, each.

    Attributes:
        rows: int64 [n].
        targets: uint8 [n, C].
        warned: Whether it was said that some are not finite.
    """

    def __init__(self, pieces: Sequence[dict[str, torch.Tensor]]) -> None:
        self._pieces, self.warned = pieces, False
        self.rows = torch.cat([piece["rows"] for piece in self._pieces]).numpy()
        self.targets = torch.cat([piece["targets"] for piece in self._pieces])
        self._starts = np.concatenate([[0], np.cumsum([len(piece["rows"]) for piece in self._pieces])])

    def take(self, stream: str, layers: Sequence[int], where: np.ndarray) -> torch.Tensor:
        """Features of clips, as they are stored: [m, layers, ...].

        Args:
            stream: "spec", "wav"; "both": their features, or their tokens, one after the other.
            layers: Of those computed.
            where: int [m], places among the n.
        """
        names = ["spec", "wav"] if stream == "both" else [stream]
        order = np.argsort(where, kind="stable")
        found = []
        pieces = np.searchsorted(self._starts, where[order], side="right") - 1
        for piece in np.unique(pieces).tolist():
            inside = torch.from_numpy(where[order][pieces == piece] - self._starts[piece])
            each = [[self._pieces[piece][f"{name}.{layer}"][inside] for name in names] for layer in layers]
            found.append(torch.stack([torch.cat(parts, dim=1) for parts in each], dim=1))
        return torch.cat(found)[torch.from_numpy(np.argsort(order))]


class Part:
    """Some clips' features and targets on a device, again and again in one order, in chunks; small ones stay there.

    Features of a clip that are NaN or infinite are zeros, and said once: a probe would learn NaN from one of them.

    Args:
        features: Mapped files.
        stream: "spec", "wav" or "both".
        layers: Of those computed.
        where: int [n], places of the clips.
        device: Of the chunks.
    """

    def __init__(
        self, features: Features, stream: str, layers: Sequence[int], where: np.ndarray, device: torch.device
    ) -> None:
        self._features, self._stream, self._layers, self._device = features, stream, layers, device
        self.where = where
        self.shape = features.take(stream, layers, where[:1]).shape[1:]
        clip = 4 * math.prod(self.shape)
        self._chunk = max(1, CHUNK_BYTES // clip)
        self._kept: list[tuple[torch.Tensor, torch.Tensor]] | None = [] if clip * len(where) <= CACHE_BYTES else None

    def __len__(self) -> int:
        return len(self.where)

    def rows(self, at: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """float32 [m, layers, ...] and targets float32 [m, C] of clips `at` of this part."""
        where = self.where[at]
        x = self._features.take(self._stream, self._layers, where).to(self._device).float()
        unknown = ~x.flatten(1).sum(dim=1).isfinite()  # as a term of it is not; cheaper than asking each
        if unknown.any():
            x[unknown] = 0.0
            if not self._features.warned:
                self._features.warned = True
                log.warning("features of %s are NaN or infinite for some clips, for which zeros stand: are the weights "
                            "or the precision at fault?", self._stream)  # fmt: skip
        return x, self._features.targets[torch.from_numpy(where)].to(self._device).float()

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        if self._kept:
            yield from self._kept
            return
        for start in range(0, len(self), self._chunk):
            chunk = self.rows(np.arange(start, min(start + self._chunk, len(self))))
            if self._kept is not None:
                self._kept.append(chunk)
            yield chunk
