"""Frozen embeddings of shards, or of any audio files, as Parquet files.

In: a `Frozen` encoder, a split of shards or paths. Out: OUT/NAME-N.parquet, one for each piece of neighbouring clips or
files, with the rows key, time, layer, embedding: by clip, then layer, then time. `key` is the clip's in the shards or
the file's path, `time` the second where the vector begins: of a clip 0; of a file's window or of a column of patches
where that begins in the recording.

A piece is the work of one rank, in batches of a fixed size that depend on nothing outside it: the bytes are the same
for any ranks. It appears whole; the same command makes those that are missing or lack clips of damaged shards. Files
that cannot be read are lines of NAME-N.failed.jsonl. Memory: of shards a batch; of files the vectors of one recording,
and its windows of a batch.
"""

import codecs
import json
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from pipeline import distributed
from pipeline.data.manifest import load_manifest
from pipeline.distributed import World
from pipeline.errors import UserError
from pipeline.files import check_output_directory, new_file, read_json, write_json, write_text
from pipeline.flow import Batch
from pipeline.probing.features import LACKS, MOST_BATCHES, Tokens, batches_of, check_bad, data_of, read_pieces
from pipeline.probing.frozen import Frozen, Pool, pooled
from pipeline.serving.listen import listen
from pipeline.serving.scorer import batch_of, by_length

log = logging.getLogger(__name__)

FILES = 64  # of a piece
FRAME_SECONDS = 0.01
ROUNDING = 1e-5  # seconds, less than a sample: a column that begins where the audio ends is none of it
RECORD = "embed.json"


class Embedder:
    """An encoder that hears clips and gives vectors.

    Args:
        frozen: Encoder, on its device.
        layers: From 1.
        pool: "time_frequency", "mean" or "cls".
        streams: Whose vectors stand one after the other.
        over_time: One vector a clip; False: one a column of patches.

    Attributes:
        spec: Format of a clip.
        width: Numbers of a vector.
        hop: Seconds between the columns; 0: there are none.

    Raises:
        UserError: streams that the encoder has not, or columns that do not exist or do not agree.
    """

    def __init__(
        self, frozen: Frozen, layers: Sequence[int], pool: Pool, streams: Sequence[str], over_time: bool
    ) -> None:
        missing = [stream for stream in streams if stream not in frozen.streams]
        if missing:
            raise UserError(f"the encoder has no {missing[0]} stream, it has {', '.join(frozen.streams)}")
        if not over_time and pool == "cls":
            raise UserError("cls and dist are tokens of the whole clip; for vectors over time take another pooling")
        self.frozen, self.layers, self.pool = frozen, list(layers), pool
        self.streams, self.over_time = list(streams), over_time
        self.spec = frozen.spec
        self.width = sum(frozen.size(pool, stream)[0] for stream in streams)
        self.hop = 0.0 if over_time else frozen.model.config.stride * FRAME_SECONDS

    def vectors(self, batch: Batch, tokens: Tokens) -> torch.Tensor:
        """float32 [n, layers, columns or 1, width] of `Frozen`'s tokens of a batch."""
        found, grids = [], self.frozen.grids_of(batch)
        for layer in self.layers:
            parts = [pooled(tokens[stream, layer], self.pool, grids[stream], self.over_time)
                     for stream in self.streams]  # fmt: skip
            whole = torch.cat(parts, dim=-1)
            found.append(whole[:, None] if self.over_time else whole)
        return torch.stack(found, dim=1)

    def hear(self, waveforms: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Of clips [n] of at most a clip's length, at the spec's rate: no scores, and `vectors`.

        Behind the last column of an input that is shorter than others stand zeros.
        """
        device, found = next(self.frozen.parameters()).device, []
        order, groups = by_length(waveforms, self.spec)
        for samples, some in groups:
            batch = batch_of(some, self.spec, device, samples)
            found.append(self.vectors(batch, self.frozen(batch, self.layers)).cpu().numpy())
        columns = max(part.shape[2] for part in found)
        whole = [np.pad(part, [(0, columns - part.shape[axis] if axis == 2 else 0) for axis in range(part.ndim)])
                 for part in found]  # fmt: skip
        return np.zeros((len(waveforms), 0), np.float32), np.concatenate(whole)[order]


@contextmanager
def _parts(path: Path, embedder: Embedder, half: bool) -> Iterator[tuple[Any, pq.ParquetWriter]]:
    """A function that writes rows, and its file, which appears whole at the end, or not at all."""
    number = pa.float16() if half else pa.float32()
    schema = pa.schema({"key": pa.string(), "time": pa.float32(), "layer": pa.int16(),
                        "embedding": pa.list_(number, embedder.width)})  # fmt: skip
    with new_file(path) as temporary, pq.ParquetWriter(temporary, schema, compression="zstd") as writer:

        def write(keys: Sequence[str], starts: np.ndarray, seconds: np.ndarray, vectors: np.ndarray) -> None:
            """Of clips: key, where they begin, how much of them is audio, vectors [n, layers, columns, width]."""
            n, layers, columns, width = vectors.shape
            offsets = np.arange(columns) * embedder.hop
            kept = (offsets < seconds[:, None] - ROUNDING) | (offsets == 0)  # [n, columns]; behind it is padding
            each = np.broadcast_to(kept[:, None], (n, layers, columns))
            clip, layer, column = np.nonzero(each)
            values = np.ascontiguousarray(vectors[each], np.float16 if half else np.float32).reshape(-1)
            writer.write_table(pa.table([
                pa.array(np.array(keys, object)[clip], pa.string()),
                pa.array((starts[clip] + offsets[column]).astype(np.float32)),
                pa.array(np.array(embedder.layers, np.int16)[layer]),
                pa.FixedSizeListArray.from_arrays(pa.array(values), width),
            ], schema=schema))  # fmt: skip

        yield write, writer


def open_output(out: Path, about: dict[str, Any]) -> None:
    """Takes OUT for these settings; for rank 0.

    Raises:
        UserError: it holds something else, or embeddings of other settings, or cannot be written.
    """
    check_output_directory(out, "--out")
    if (out / RECORD).exists():
        before = read_json(out / RECORD, "name another --out")
        for key in about:
            if before.get(key) != about[key]:
                raise UserError(f"--out {out}: holds embeddings with {key} = {before.get(key)}, not {about[key]}; "
                                "repeat that command, or name another directory")  # fmt: skip
    elif out.exists() and any(out.iterdir()):
        raise UserError(f"--out {out}: is not empty, and not of this command; name a new or empty directory")
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / RECORD, about)
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror}; name a directory that can be written") from error


def embed_split(
    embedder: Embedder, shards: str, split: str, out: Path, world: World, *, half: bool, workers: int
) -> list[Path]:
    """Embeds a split; returns its files. A collective.

    Pieces that lack clips which could not be read are made anew: the shards may have been mended since.

    Raises:
        UserError: too many bad clips, a file that is there is damaged, or shards or an encoder that are not rank 0's.
    """
    manifest = load_manifest(shards)
    same = {"shards digest": manifest.digest[:16], "encoder's digest": embedder.frozen.digest[:16]}
    distributed.check_same(same, "give all hosts the same shards and runs")
    data = data_of(embedder.frozen, shards, split, workers)
    pieces = -(-batches_of(embedder.frozen, data, manifest.splits[split].clips) // MOST_BATCHES)
    files = [out / f"{split}-{piece:06d}.parquet" for piece in range(pieces)]
    missing = distributed.decide(lambda: [piece for piece, file in enumerate(files) if not _is_whole(file)])
    for piece, loader, coming in read_pieces(embedder.frozen, data, embedder.layers, MOST_BATCHES, missing, world):
        with _parts(files[piece], embedder, half) as (write, writer):
            for batch, tokens in coming:
                valid = batch.valid.cpu().numpy()
                rows = batch.row.cpu().numpy()[valid]
                seconds = np.full(len(rows), embedder.spec.samples / embedder.spec.sample_rate)
                if batch.length is not None:
                    seconds = batch.length.cpu().numpy()[valid] / embedder.spec.sample_rate
                vectors = embedder.vectors(batch, tokens)[batch.valid].cpu().numpy()
                write(loader.keys(rows.tolist()), np.zeros(len(rows)), seconds, vectors)
            if lacking := loader.replaced(0):
                writer.add_key_value_metadata({LACKS: str(lacking)})
        log.info("embeddings of %s: piece %d of %d", split, piece + 1, len(files))
    distributed.barrier()
    begins = sum(int((pq.read_table(file, columns=["time"])["time"].to_numpy() == 0).sum()) for file in files)
    check_bad(data, manifest, begins // len(embedder.layers))
    return files


def embed_files(
    embedder: Embedder, names: Sequence[str], hop: float, out: Path, world: World, *, half: bool
) -> tuple[list[Path], int]:
    """Embeds audio files, cut into windows of a clip `hop` seconds apart. A collective.

    Returns:
        The files written, and how many recordings could not be read or are damaged.

    Raises:
        UserError: this rank's encoder is not rank 0's.
    """
    distributed.check_same({"encoder's digest": embedder.frozen.digest[:16]}, "give all hosts the same run")
    pieces = [names[start : start + FILES] for start in range(0, len(names), FILES)]
    files = [out / f"files-{piece:06d}.parquet" for piece in range(len(pieces))]
    missing = distributed.decide(lambda: [piece for piece, file in enumerate(files) if not file.exists()])
    for piece in missing[world.rank :: world.size]:
        failed = []
        with _parts(files[piece], embedder, half) as (write, _):
            for heard in listen(embedder, ((_utf8(name), name) for name in pieces[piece]), hop):
                if heard.error:
                    log.warning("%s: %s", heard.path, heard.error)
                    failed.append(json.dumps({"path": heard.path, "problem": heard.error}) + "\n")
                if len(heard.starts):
                    seconds = heard.ends(embedder.spec.samples / embedder.spec.sample_rate) - heard.starts
                    write([heard.path] * len(seconds), heard.starts, seconds, heard.embeddings)
            _failed(files[piece]).unlink(missing_ok=True)  # of an attempt that was killed, or a piece that was deleted
            if failed:  # before the piece is there, and is never made again
                write_text(_failed(files[piece]), "".join(failed))
        log.info("embeddings: piece %d of %d", piece + 1, len(files))
    distributed.barrier()
    lost = [_failed(file).read_text(encoding="utf-8") for file in files if _failed(file).exists()]
    return files, sum(text.count("\n") for text in lost)


def _is_whole(file: Path) -> bool:
    """Whether a piece of a split is there, with all its clips.

    Raises:
        UserError: it is damaged.
    """
    try:
        return file.exists() and LACKS.encode() not in (pq.read_metadata(file).metadata or {})
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{file}: {error}; delete it, and the same command makes it again") from error


def _utf8(name: str) -> str:
    """A name for JSON and Parquet, which have no place for bytes that are not UTF-8."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _failed(file: Path) -> Path:
    return file.with_suffix(".failed.jsonl")


def read_list(file: Path) -> list[str]:
    """Paths of a text file, one a line; any bytes but NUL and the line's end, as file systems take them.

    Raises:
        UserError: it cannot be read, or is no text.
    """
    try:
        text = os.fsdecode(file.read_bytes().removeprefix(codecs.BOM_UTF8))
    except OSError as error:
        raise UserError(f"--list {file}: {error.strerror}; give a text file of paths, one a line") from error
    if "\0" in text:
        raise UserError(f"--list {file}: has NUL bytes (find -print0, UTF-16); give a text file of paths, one a line")
    return [line for line in text.replace("\r\n", "\n").split("\n") if line.strip()]
