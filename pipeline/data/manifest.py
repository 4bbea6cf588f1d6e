"""The shard index: what a directory of shards holds, and whether it is what it says.

In: a directory, or an fsspec URL of one, with `manifest.json` and `index.parquet`. Out: a checked `Manifest`
and index columns.

The manifest, not the tar, says what must be there: a tar cut at a member boundary still opens, and a
stock reader returns half its samples without an error. Every other file is compared with the manifest when it
is opened: one changed bit of the index is another label. Shards may come from strangers: every name, size and number is
bounded by the format and the sizes of the files before anything is allocated, joined to a path or used as an index.
"""

import hashlib
import io
import json
import logging
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, BinaryIO, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from pipeline.data.npy import MAX_HEADER, Array
from pipeline.data.reader import OUTAGE_SECONDS, PASSING, POLL_SECONDS
from pipeline.data.storage import FINAL, Location, is_remote, join, local, read_bytes
from pipeline.errors import UserError
from pipeline.files import NAME, open_regular

log = logging.getLogger(__name__)

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
        *(
            (f"{member}_{what}", kind)
            for member in ("waveform", "fbank", "json")
            for what, kind in (("offset", pa.int64()), ("size", pa.int64()), ("xxh3", pa.uint64()))
        ),
    ]
)


# No shards of this release come near these; what goes beyond takes memory without end, or is no manifest.
MANIFEST_BYTES = 1 << 27  # half a million shards
CLIP_SAMPLES = 1 << 26  # 70 minutes at 16 kHz
SHARD_CLIPS = 1 << 20
FILE_BYTES = 1 << 44
JSON_BYTES = 1 << 24  # of a clip
HEADER = 512  # bytes before each member of a tar

Count = Annotated[int, Field(ge=0, le=1 << 40)]
SplitName = Annotated[str, Field(pattern=f"^{NAME.pattern}$")]

NULLABLE = ("end", "trimmed")


class Record(BaseModel):
    """A part of the manifest; unknown keys are errors, so a newer format is never half understood."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class AudioFormat(Record):
    """Waveform member: int16 [samples] .npy, mono, DC removed, zero-padded."""

    sample_rate: int = Field(ge=1, le=1_000_000)
    seconds: float = Field(gt=0, le=CLIP_SAMPLES)
    samples: int = Field(ge=1, le=CLIP_SAMPLES)
    encoding: Literal["int16.npy"]

    @model_validator(mode="after")
    def _length(self) -> "AudioFormat":
        if self.samples != round(self.sample_rate * self.seconds):
            raise ValueError(f"{self.samples} samples are not {self.seconds} s at {self.sample_rate} Hz")
        return self

    @property
    def array(self) -> Array:
        """The member."""
        return Array("<i2", (self.samples,))


class FbankFormat(Record):
    """Fbank member: float16 [frames, mel_bins] .npy, unnormalised, not padded to T."""

    mel_bins: int = Field(ge=1, le=4096)
    frames: int = Field(ge=0, le=CLIP_SAMPLES)
    frame_ms: float = Field(gt=0, le=1000)
    hop_ms: float = Field(gt=0, le=1000)
    encoding: Literal["float16.npy"]

    @property
    def array(self) -> Array:
        """The member."""
        return Array("<f2", (self.frames, self.mel_bins))


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

    clips: Count
    listed: Count
    shards: Count
    seconds: float = Field(ge=0)
    silent: Count
    fbank_mean: float = Field(ge=-1e4, le=1e4)  # logarithms of powers: -16 to 20
    fbank_std: float = Field(ge=1e-7, le=1e4)
    class_clips: list[Count] = []
    class_listed: list[Count] = []


class FileRecord(Record):
    """Size and hash of a file."""

    size: int = Field(ge=0, le=FILE_BYTES)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class ShardRecord(FileRecord):
    """One tar."""

    name: str = Field(pattern=rf"^{NAME.pattern}\.tar$", max_length=120)
    split: SplitName
    clips: int = Field(ge=1, le=SHARD_CLIPS)


class Manifest(Record):
    """`manifest.json`; `unlabelled` is there where the clips have no labels, and the vocabulary no classes."""

    format: Literal["craft-shards"]
    version: Literal[1]
    dataset: str
    audio: AudioFormat
    fbank: FbankFormat
    single_label: bool
    unlabelled: Literal[True] | None = None
    labels: list[Label]
    splits: dict[SplitName, SplitRecord]
    shards: list[ShardRecord]
    index: FileRecord
    failures: FileRecord
    options: dict[str, Any]
    digest: str

    @model_validator(mode="after")
    def _agrees(self) -> "Manifest":
        audio, fbank = self.audio, self.fbank
        window, hop = (int(audio.sample_rate * ms / 1000) for ms in (fbank.frame_ms, fbank.hop_ms))
        frames = 0 if audio.samples < window else 1 + (audio.samples - window) // max(1, hop)
        if fbank.frames != frames:
            raise ValueError(f"fbank.frames: {fbank.frames}, the audio has {frames}")
        names = Counter(shard.name for shard in self.shards)
        name, count = next(iter(names.most_common(1)), ("", 0))
        if count > 1:
            raise ValueError(f"shards: {name} is there {count} times")
        found = {name: [0, 0] for name in self.splits}
        least = audio.array.size + fbank.array.size + 4 * HEADER  # the json takes at least one block
        for shard in self.shards:
            if shard.split not in found:
                raise ValueError(f"shards: {shard.name} is of split '{shard.split}', which splits does not have")
            if shard.size < shard.clips * least:
                raise ValueError(f"shards: {shard.name} of {shard.size} bytes cannot hold {shard.clips} clips")
            found[shard.split][0] += shard.clips
            found[shard.split][1] += 1
        for name, split in self.splits.items():
            if [split.clips, split.shards] != found[name]:
                raise ValueError(
                    f"splits: '{name}' has {split.clips} clips in {split.shards} shards, its shards add up to "
                    f"{found[name][0]} in {found[name][1]}"
                )
            if split.silent > split.clips:
                raise ValueError(f"splits: '{name}' has {split.silent} silent clips of {split.clips}")
            for what, counts in (("class_clips", split.class_clips), ("class_listed", split.class_listed)):
                if counts and len(counts) != len(self.labels):
                    raise ValueError(f"splits: '{name}': {what} has {len(counts)} counts for {len(self.labels)} labels")
        return self

    @model_serializer(mode="wrap")
    def _without_none(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        content: dict[str, Any] = dump(self)
        if content.get("unlabelled") is None:  # as in manifests from before there was such a field
            content.pop("unlabelled", None)
        return content

    def computed_digest(self) -> str:
        """sha256 over everything but the digest itself, shard and index hashes included."""
        content = self.model_dump(mode="json", exclude={"digest"})
        return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def load_manifest(directory: Location) -> Manifest:
    """Reads and checks `manifest.json` of a local or remote directory.

    Raises:
        UserError: no manifest, another format or version, values that cannot be, or a digest that does not fit; or its
            store or mount is out of reach for now.
    """
    path = join(directory, "manifest.json")
    try:
        content = json.loads(read_bytes(path, MANIFEST_BYTES).decode("utf-8"), parse_constant=_no_number)
    except OSError as error:
        raise _unread(path, error, "name the --out of a finished build_shards.py") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error}); rebuild it with build_shards.py") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path}: format is not '{FORMAT}'; name shards of build_shards.py")
    if content.get("version") != VERSION:
        raise UserError(
            f"{path}: format version {content.get('version')!r:.40}, this release reads {VERSION}; rebuild the shards"
        )
    try:
        manifest = Manifest.model_validate(content)
        digest = manifest.computed_digest()
    except ValidationError as error:
        first = error.errors()[0]
        where = "".join(f"{part}: " for part in [".".join(map(str, first["loc"]))[:100]] if part)
        raise UserError(f"{path}: {where}{first['msg']:.300}; rebuild the shards") from error
    except (ValueError, RecursionError) as error:  # options nested without end, or text that is none
        raise UserError(f"{path}: options: {error!s:.200}; rebuild the shards") from error
    if manifest.digest != digest:
        raise UserError(f"{path}: digest does not fit its content (edited or damaged); run verify_shards.py")
    return manifest


def labelled_manifest(directory: Location) -> Manifest:
    """The manifest of shards whose classes are learned or scored.

    Raises:
        UserError: as `load_manifest`, or the clips have no labels.
    """
    manifest = load_manifest(directory)
    if manifest.unlabelled:
        raise UserError(
            f"{directory}: its clips have no labels (manifest.json: unlabelled), which finetuning and evaluation need; "
            "build them with labels (build_shards.py --table, --class-labels, ...: docs/data.md), or "
            "pretrain on these (launchers/pretrain.py)"
        )
    return manifest


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no number")


def open_checked(directory: Location, name: str, record: FileRecord) -> BinaryIO:
    """Opens a file beside the manifest, size and sha256 compared first; what is read is what was compared.

    Costs one read: 0.05 s for the 58 MB of 2 million clips' index in the page cache. One behind a URL is in memory.

    Raises:
        UserError: it is not there, or not the one that the manifest lists; or out of reach for now.
    """
    path = join(directory, name)
    remedy = "damaged, or of another build; run verify_shards.py"
    file: BinaryIO
    try:
        if is_remote(directory):
            file = io.BytesIO(read_bytes(path, record.size))
            size = file.getbuffer().nbytes
        else:
            file = os.fdopen(open_regular(local(path)), "rb")
            size = os.fstat(file.fileno()).st_size
        if size != record.size:
            file.close()
            raise UserError(f"{path}: {size} bytes, manifest.json says {record.size}: {remedy}")
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
        if digest.hexdigest() != record.sha256:
            file.close()
            raise UserError(f"{path}: its sha256 is not that of manifest.json: {remedy}")
        file.seek(0)
    except OSError as error:
        raise _unread(path, error, "run verify_shards.py") from error
    return file


def _unread(path: str, error: OSError, remedy: str) -> UserError:
    """Of a file that cannot be read: where a store or a mount is out of reach, nothing is wrong with what it holds."""
    reason = error.strerror or error
    refused = getattr(error.__cause__, "status", 0) in (401, 403)  # by a web server
    if isinstance(error, FINAL) or refused or not (is_remote(path) or error.errno in PASSING):
        return UserError(f"{path}: {reason}; {remedy}")
    return UserError(
        f"{path}: {reason}; when it can be reached again, the same command goes on", local=True, transient=True
    )


class IndexFile:
    """`index.parquet`, where it is the one that the manifest lists.

    Args:
        directory: Of the shards, local or remote.
        manifest: Theirs.

    Attributes:
        sizes: Rows of each row group.

    Raises:
        UserError: it is another one, damaged, or not an index.
    """

    def __init__(self, directory: Location, manifest: Manifest) -> None:
        self._directory, self._manifest, self._path = directory, manifest, join(directory, "index.parquet")
        self._classes, self._seconds = len(manifest.labels), manifest.audio.seconds
        self._arrays = {"waveform": manifest.audio.array, "fbank": manifest.fbank.array}
        self._shards = {shard.name: shard for shard in manifest.shards}
        self._open()
        with self._readable():
            types = {field.name: _plain(field.type) for field in self._file.schema_arrow}
            groups = range(self._file.num_row_groups)
            self.sizes = [self._file.metadata.row_group(number).num_rows for number in groups]
        for field in INDEX_SCHEMA:
            if types.get(field.name) != _plain(field.type):
                raise self._error(field.name, f"a column that is {types.get(field.name, 'not there')}")
        clips = sum(shard.clips for shard in manifest.shards)
        if sum(self.sizes) != clips:
            raise UserError(
                f"{self._path}: {sum(self.sizes)} rows, manifest.json counts {clips}: one of another build; run "
                "verify_shards.py"
            )

    def _open(self) -> None:
        file = open_checked(self._directory, "index.parquet", self._manifest.index)
        with self._readable():
            # Arrow's own files read at an offset: those of Python have one, which forked readers would share.
            source = file if is_remote(self._directory) else pa.OSFile(f"/dev/fd/{file.fileno()}")
            self._file = pq.ParquetFile(source)

    def read(self, columns: Sequence[str] | None = None, group: int | None = None) -> pa.Table:
        """Rows as they are, for `check`; a file server or mount that is away is waited for, as for a tar.

        Args:
            columns: Names; None: all.
            group: Number of a row group; None: all.

        Raises:
            UserError: they cannot be decoded, or cannot be had for now.
        """
        names = None if columns is None else list(columns)
        until, waited = time.monotonic() + OUTAGE_SECONDS, False
        while True:
            try:
                if waited:
                    self._open()  # a file that went stale stays so
                with self._readable():
                    if group is None:
                        return self._file.read(names)
                    return self._file.read_row_group(group, names, use_threads=False)
            except UserError as error:
                cause = error.__cause__
                if not isinstance(cause, OSError) or cause.errno not in PASSING:
                    raise
                said = f"{self._path}: {os.strerror(cause.errno)}"
                if time.monotonic() > until:
                    raise UserError(
                        f"{said}, for {OUTAGE_SECONDS:.0f} s; when it is back, the same command goes on",
                        local=True,
                        transient=True,
                    ) from cause
                if not waited:
                    log.warning("%s; waiting for it", said)
                waited = True
            time.sleep(POLL_SECONDS)

    @contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, pa.ArrowException) as error:  # ValueError: text that is not UTF-8
            raise UserError(f"{self._path}: {error}; rebuild the shards") from error

    def check(self, rows: pa.Table) -> pa.Table:
        """Compares rows with the manifest: a hash that fits says who wrote a row, not that it can be.

        Vectorised. The columns that are there are checked; split and places of members need column "shard".

        Raises:
            UserError: a value that cannot be: empty, out of range, or none of this manifest's.
        """
        with self._readable():
            self._check(rows)
        return rows

    def _check(self, rows: pa.Table) -> None:
        for name in rows.column_names:
            if name not in NULLABLE and rows[name].null_count:
                raise self._error(name, "empty")
            if name in ("key", "source"):
                rows[name].validate(full=True)
        there = set(rows.column_names)
        if "labels" in there:
            self._labels(pc.list_flatten(rows["labels"]))
        for name, low, high in (("fold", 0, 1 << 15), ("start", 0, 1e9), ("seconds", 0, self._seconds * 1.001)):
            if name in there:
                values = rows[name].to_numpy()
                self._refuse(name, ~((values >= low) & (values <= high)), values)  # NaN too
        if "shard" in there:
            self._places(rows)

    def _labels(self, values: pa.ChunkedArray) -> None:
        if values.null_count:
            raise self._error("labels", "empty")
        labels = values.to_numpy()
        self._refuse("labels", (labels < 0) | (labels >= self._classes), labels, f"of {self._classes} classes")

    def _places(self, rows: pa.Table) -> None:
        shards = rows["shard"].combine_chunks()
        shards = shards if pa.types.is_dictionary(shards.type) else shards.dictionary_encode()
        codes = shards.indices.to_numpy()
        used, inverse = np.unique(codes, return_inverse=True)
        names = shards.dictionary.take(pa.array(used)).to_pylist()
        unknown = [name for name in names if name not in self._shards]
        if unknown:
            raise self._error("shard", f"{unknown[0]!r:.100}, which manifest.json does not have")
        tar = np.array([self._shards[name].size for name in names], np.int64)[inverse]
        if "split" in rows.column_names:
            splits = pa.array([self._shards[name].split for name in names], pa.string()).take(pa.array(inverse))
            equal = pc.equal(rows["split"].cast(pa.string()), splits)
            if not pc.all(equal).as_py():
                row = pc.index(equal, False).as_py()
                raise self._error("split", f"{rows['split'][row]}, its shard {names[inverse[row]]} is of {splits[row]}")
        for member in ("waveform", "fbank", "json"):
            if f"{member}_offset" not in rows.column_names:
                continue
            offset, size = (rows[f"{member}_{what}"].to_numpy() for what in ("offset", "size"))
            array = self._arrays.get(member)
            low, high = (1, JSON_BYTES) if array is None else (array.size + 1, array.size + MAX_HEADER)
            self._refuse(f"{member}_size", (size < low) | (size > high), size)
            self._refuse(f"{member}_offset", (offset < HEADER) | (offset > tar - size), offset)

    def _refuse(self, name: str, wrong: np.ndarray, values: np.ndarray, what: str = "") -> None:
        if wrong.any():
            raise self._error(name, f"{values[wrong.argmax()]} {what}")

    def _error(self, name: str, said: str) -> UserError:
        return UserError(f"{self._path}: {name}: {said.strip()} cannot be; rebuild the shards with build_shards.py")


def _plain(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def load_index(
    directory: Location, split: str | None = None, folds: Sequence[int] = (), columns: Sequence[str] | None = None
) -> pa.Table:
    """Rows of `index.parquet`, checked, in file order.

    Args:
        directory: Of the shards, local or remote.
        split: Only this split; None: all.
        folds: Only these folds; empty: all.
        columns: Only these columns; None: all.

    Raises:
        UserError: no manifest, or an index that is not the one it lists.
    """
    manifest = load_manifest(directory)
    wanted = None if columns is None else list(dict.fromkeys([*columns, "split", "fold", "shard"]))
    index = IndexFile(directory, manifest)
    table = index.check(index.read(wanted))
    if split is not None:
        table = table.filter(pc.equal(table["split"].cast(pa.string()), split))
    if folds:
        table = table.filter(pc.is_in(table["fold"], pa.array(folds, pa.int16())))
    return table if columns is None else table.select(list(columns))
