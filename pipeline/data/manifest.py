"""The shard index: what a directory of shards holds, and whether it is what it says.

In: a directory, or an fsspec URL of one, with `manifest.json` and `index.parquet`. Out: a checked `Manifest`
and index columns.

The manifest, not the tar, says what must be there: a tar cut at a member boundary still opens, and a
stock reader returns half its samples without an error.
"""

import hashlib
import json
from collections.abc import Sequence
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline.data.storage import Location, is_remote, join, read_bytes
from pipeline.errors import UserError

FORMAT = "craft-shards"
VERSION = 1

# One row a clip, ordered by (split, shard, position in the shard). Offsets are byte offsets of a
# member's payload in its (uncompressed) tar, so a clip is read in place without walking the tar.
INDEX_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("split", pa.dictionary(pa.int32(), pa.string())),
        ("fold", pa.int16()),  # 0: none
        ("shard", pa.dictionary(pa.int32(), pa.string())),
        ("labels", pa.list_(pa.int32())),
        ("seconds", pa.float32()),  # audio before padding, at most the clip length
        # Where it came from, so that a damaged shard can be built again: path relative to the audio root,
        # the segment as listed (end null: to the end), and whether the file is the segment itself.
        ("source", pa.string()),
        ("start", pa.float64()),
        ("end", pa.float64()),
        ("trimmed", pa.bool_()),
        *((f"{member}_{what}", kind) for member in ("waveform", "fbank", "json")
          for what, kind in (("offset", pa.int64()), ("size", pa.int64()), ("xxh3", pa.uint64()))),
    ]
)


class Record(BaseModel):
    """A part of the manifest; unknown keys are errors, so a newer format is never half understood."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class AudioFormat(Record):
    """Waveform member: int16 [samples] .npy, mono, DC removed, zero-padded."""

    sample_rate: int
    seconds: float
    samples: int
    encoding: str


class FbankFormat(Record):
    """Fbank member: float16 [frames, mel_bins] .npy, unnormalised, not padded to T."""

    mel_bins: int
    frames: int
    frame_ms: float
    hop_ms: float
    encoding: str


class Label(Record):
    """One class: its position in `Manifest.labels` is the index used everywhere."""

    id: str
    name: str


class SplitRecord(Record):
    """Totals of a split.

    `listed` counts the clips that the source named, found or not; `silent` those stored that are digital silence.
    `class_clips` and `class_listed` count the same by class, in the order of `Manifest.labels`: mAP of two copies
    of AudioSet compares only where these do.
    """

    clips: int
    listed: int
    shards: int
    seconds: float
    silent: int
    fbank_mean: float
    fbank_std: float
    class_clips: list[int] = []
    class_listed: list[int] = []


class FileRecord(Record):
    """Size and hash of a file."""

    size: int
    sha256: str


class ShardRecord(FileRecord):
    """One tar."""

    name: str
    split: str
    clips: int


class Manifest(Record):
    """`manifest.json`."""

    format: Literal["craft-shards"]
    version: Literal[1]
    dataset: str
    audio: AudioFormat
    fbank: FbankFormat
    single_label: bool
    labels: list[Label]
    splits: dict[str, SplitRecord]
    shards: list[ShardRecord]
    index: FileRecord
    failures: FileRecord
    options: dict[str, Any]
    digest: str

    def computed_digest(self) -> str:
        """sha256 over everything but the digest itself, shard and index hashes included."""
        content = self.model_dump(mode="json", exclude={"digest"})
        return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def load_manifest(directory: Location) -> Manifest:
    """Reads and checks `manifest.json` of a local or remote directory.

    Raises:
        UserError: no manifest, another format or version, or a digest that does not fit.
    """
    path = join(directory, "manifest.json")
    try:
        content = json.loads(read_bytes(path).decode("utf-8"))
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{path}: {reason}; point data.shards at a finished build_shards.py --out") from error
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); rebuild it with build_shards.py") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path}: format is not '{FORMAT}'; point data.shards at shards of build_shards.py")
    if content.get("version") != VERSION:
        raise UserError(
            f"{path}: format version {content.get('version')}, this release reads {VERSION}; rebuild the shards"
        )
    try:
        manifest = Manifest.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(f"{path}: {where}: {first['msg']}; rebuild the shards") from error
    if manifest.digest != manifest.computed_digest():
        raise UserError(f"{path}: digest does not fit its content (edited or damaged); run verify_shards.py")
    return manifest


def load_index(
    directory: Location, split: str | None = None, folds: Sequence[int] = (), columns: Sequence[str] | None = None
) -> pa.Table:
    """Rows of `index.parquet`, in file order.

    Args:
        directory: Of the shards, local or remote.
        split: Only this split; None: all.
        folds: Only these folds; empty: all.
        columns: Only these columns; None: all.
    """
    wanted = None if columns is None else list(dict.fromkeys([*columns, "split", "fold"]))
    path = join(directory, "index.parquet")
    # Whole, and tried again where the store fails: a plain web server cannot serve the ranges of single columns.
    file = pa.BufferReader(read_bytes(path)) if is_remote(directory) else path
    table = pq.read_table(file, columns=wanted)
    if split is not None:
        table = table.filter(pc.equal(table["split"].cast(pa.string()), split))
    if folds:
        table = table.filter(pc.is_in(table["fold"], pa.array(folds, pa.int16())))
    return table if columns is None else table.select(list(columns))
