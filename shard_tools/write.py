"""Clips -> one tar shard: decode, fbank, encode, write; and the record of what is in it.

In: a `ShardPlan`. Out: `{split}-{number}.tar` and a parquet record beside the unfinished build.

Encodings, measured on 10 s clips: an int16 .npy reads and decodes in 0.24 ms (0.09 as a raw view), FLAC
takes 2.5 ms and saves 45 %, mp3 and opus are lossy and slower still; a float16 .npy fbank takes 0.11 ms
with an error of 4e-3 at most. Any WebDataset reader decodes .npy, and the payload of an uncompressed
tar member can be read in place. So: int16 and float16 .npy, 576 KB a clip, 1.15 TB for 2 M clips.

The fbank is that of the *stored* int16 waveform, so verify_shards.py can recompute it from the shard.
Memory: GROUP clips at a time, whatever the size of the data set. Each station works through the group before
the next one begins, so that its tables and code stay in the core's cache: an eighth faster than clip by clip.
"""

import hashlib
import io
import json
import math
import os
import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import xxhash

from pipeline.data.fbank import fbank
from pipeline.data.manifest import INDEX_SCHEMA, Label
from pipeline.data.npy import Array, header
from pipeline.data.storage import Location, is_remote
from pipeline.errors import UserError
from pipeline.flow import Clip
from shard_tools.columns import Failure, recorded
from shard_tools.decode import TRIM_SLACK, Decoded, DecodeError
from shard_tools.guard import guarded_decode
from shard_tools.names import split_source
from shard_tools.segment import MachineError
from shard_tools.sources import SourceError
from shard_tools.stamps import Stamp, stamp
from shard_tools.store import Store, seal, stamped_copies, unseal

MEMBERS = ("waveform", "fbank", "json")
EXTENSIONS = {"waveform": "waveform.npy", "fbank": "fbank.npy", "json": "json"}
BLOCK = 512
GROUP = 32
ABSENT = ("vanished", "unreadable")  # reasons that a disk or store that is away gives too
PROBES = 32  # other files that are looked at then, at most
ADDRESS = re.compile(r"\b0x[0-9a-fA-F]{4,}")  # in what libraries say; each time another


@dataclass(frozen=True)
class AudioOptions:
    """What is stored of a clip."""

    sample_rate: int = 16000
    seconds: float = 10.0
    mel_bins: int = 128

    @property
    def samples(self) -> int:
        """L."""
        return round(self.sample_rate * self.seconds)


@dataclass(frozen=True)
class ShardPlan:
    """One shard to be written.

    Attributes:
        split: Name of the split.
        number: Of the shard within its split.
        clips: In the order of the tar.
        labels: Vocabulary.
        root: Sources are recorded relative to it.
        out: Where the shards go.
        audio: What is stored.
        rows: Of the clips, in the catalog; empty: not known.
        probes: Files of other shards.
        containers: As in `Catalog`; those of the clips.
        build: What the shards of one build agree in (`SplitPlan.digest`).
        staged: Written aside, in the place of a finished shard that stays until the new index is there.
    """

    split: str
    number: int
    clips: Sequence[Clip]
    labels: Sequence[Label]
    root: str
    out: Location
    audio: AudioOptions
    rows: Sequence[int] = ()
    probes: Sequence[str] = ()
    containers: Mapping[str, Stamp] = field(default_factory=dict)
    build: str = ""
    staged: bool = False

    @property
    def name(self) -> str:
        """File name of the tar."""
        return shard_name(self.split, self.number)

    @property
    def tar(self) -> str:
        """Where the tar is written, below the output directory."""
        return f".build/{self.split}/{self.name}" if self.staged else self.name

    @property
    def record(self) -> str:
        """Name of the finished shard's record; its presence means that the tar is whole."""
        return record_name(self.split, self.number)


def shard_name(split: str, number: int) -> str:
    """File name of a tar."""
    return f"{split}-{number:06d}.tar"


def shard_number(split: str, name: str) -> int:
    """Number of a tar of a split.

    Raises:
        UserError: the name is that of none.
    """
    found = re.fullmatch(rf"{re.escape(split)}-([0-9]{{6,9}})\.tar", name)
    if found is None or shard_name(split, int(found[1])) != name:
        raise UserError(f"manifest.json: '{name[:100]}' is no shard of split '{split}'; get the directory anew")
    return int(found[1])


def record_name(split: str, number: int) -> str:
    """Name of a shard's record, below the output directory."""
    return f".build/{split}/{number:06d}.record"


class TarWriter:
    """A tar of regular files, written front to back: counts and hashes what it writes.

    Python's tarfile copies each payload twice; only its headers are used.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.sha256 = hashlib.sha256()
        self.size = 0

    def add(self, name: str, parts: Sequence[bytes | memoryview]) -> tuple[int, int, int]:
        """Adds a file; returns its payload's offset, size and xxh3."""
        size = sum(len(part) for part in parts)
        info = tarfile.TarInfo(name)
        info.size, info.mode, info.mtime = size, 0o644, 0
        self._write(info.tobuf(tarfile.USTAR_FORMAT, "utf-8", "surrogateescape"))
        offset = self.size
        payload = xxhash.xxh3_64()
        for part in parts:
            payload.update(part)
            self._write(part)
        self._write(bytes(-size % BLOCK))
        return offset, size, payload.intdigest()

    def close(self) -> None:
        """Writes the end of the archive."""
        self._write(bytes(2 * BLOCK))
        self._write(bytes(-self.size % tarfile.RECORDSIZE))

    def _write(self, data: bytes | memoryview) -> None:
        self.sha256.update(data)
        self._file.write(data)
        self.size += len(data)


def write_shard(plan: ShardPlan) -> None:
    """Writes the tar, then its record; done again it gives the same bytes.

    A clip that cannot be decoded is a failure in the record; the shard is that much smaller, so
    that no other shard depends on it.

    Raises:
        OSError: the disk is full or not writable, or the store does not take the shard.
        MachineError: trouble of this machine or its network while sources were read; nothing is recorded.
        UserError: a container is not the one that was listed; nothing is recorded.
    """
    store = Store(plan.out)
    with store.temporary(plan.tar) as path:
        rows, facts = write_tar(plan, path)
        if rows:
            facts["stamp"] = store.commit(path, plan.tar)
        else:
            store.remove([plan.tar])  # of an attempt when its sources could be read
    write_record(store, plan, rows, facts)


def write_record(store: Store, plan: ShardPlan, rows: list[dict[str, Any]], facts: dict[str, Any]) -> None:
    """Writes the record of a finished shard."""
    schema = INDEX_SCHEMA.with_metadata({"craft": json.dumps(facts | {"build": plan.build})})
    record = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), record)
    store.write(plan.record, seal(record.getvalue()))


def read_record(store: Store, split: str, number: int) -> tuple[pa.Table, dict[str, Any]]:
    """Index rows and facts of a finished shard.

    Raises:
        ValueError: the record is damaged.
    """
    table = pq.read_table(io.BytesIO(unseal(store.read(record_name(split, number)))))
    return table.replace_schema_metadata(), json.loads(table.schema.metadata[b"craft"])


def write_tar(plan: ShardPlan, path: str | os.PathLike[str]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Writes the tar of a plan to a local file; returns its index rows and the facts about it.

    Raises:
        OSError: the file cannot be written.
    """
    rows: list[dict[str, Any]] = []
    failures: list[Failure] = []
    sums = np.zeros(3)  # count, sum and sum of squares of the stored fbanks
    silent = longer = 0
    beyond = 0.0
    sources: list[Stamp] = []
    tried: list[tuple[int, int, Stamp]] = []
    with open(path, "wb") as file:
        tar = TarWriter(file)
        decoded = _decode_all(plan, sources, tried, failures)
        while group := list(islice(decoded, GROUP)):
            waveforms = [encode_waveform(one, plan.audio.samples) for _, one in group]
            fbanks = [stored_fbank(waveform, plan.audio) for waveform, _ in waveforms]
            for (clip, one), (waveform, about), stored in zip(group, waveforms, fbanks, strict=True):
                silent += bool(about["silent"])
                sums += moments(stored)
                described = _describe(clip, plan, one, about)
                rest = left_out(described, plan.audio.seconds)
                longer, beyond = longer + (rest > 0), beyond + rest
                text = json.dumps(described, ensure_ascii=False, sort_keys=True).encode("utf-8", "surrogateescape")
                sample = npy(waveform), npy(stored), [text]
                rows.append(_index_row(clip, plan, about["seconds"], _add(tar, clip.key, sample)))
        tar.close()
    return rows, {
        "clips": len(rows),
        "size": tar.size,
        "sha256": tar.sha256.hexdigest(),
        "sums": sums.tolist(),
        "silent": silent,
        "longer": [longer, beyond],
        "failures": [failure.line() for failure in failures],
        "sources": sources,
        "tried": tried,
    }


def encode_waveform(decoded: Decoded, samples: int) -> tuple[np.ndarray, dict[str, Any]]:
    """int16 [samples]: `int16_levels`, zero-padded; and facts about it."""
    levels, gain = int16_levels(decoded.waveform)
    out = np.zeros(samples, np.int16)
    out[: len(levels)] = levels
    return out, {"silent": not out.any(), "gain": gain, "seconds": len(levels) / samples}


def int16_levels(waveform: np.ndarray) -> tuple[np.ndarray, float]:
    """Whole numbers, float32 [n], at most 32767: the samples without their mean, times 32768, rounded; and their gain.

    Audio beyond full scale (float sources) is scaled down to it, and the gain is below 1.
    """
    real = waveform - np.float32(waveform.mean(dtype=np.float64))
    peak = max(float(real.max()), -float(real.min()))
    gain = 32767 / 32768 / peak if peak * 32768 > 32767 else 1.0
    real *= np.float32(gain * 32768)
    np.rint(real, out=real)
    return np.clip(real, -32767, 32767, out=real), gain


def stored_fbank(waveform: np.ndarray, audio: AudioOptions) -> np.ndarray:
    """float16 [frames, mel_bins] of a stored int16 waveform."""
    samples = torch.from_numpy(waveform.astype(np.float32) / 32768)
    return fbank(samples, audio.sample_rate, audio.mel_bins).half().numpy()


def moments(stored: np.ndarray) -> tuple[int, float, float]:
    """Count, sum and sum of squares of a float16 array, added up in float64."""
    values = torch.from_numpy(stored).float().numpy()  # a third of the time of NumPy's conversion; squares fit float32
    total = float(values.sum(dtype=np.float64))
    return values.size, total, float(np.square(values, out=values).sum(dtype=np.float64))


def npy(array: np.ndarray) -> list[bytes | memoryview]:
    """The two parts of a .npy file, header and data (a view of the array); never a pickle."""
    return [header(Array(array.dtype.str, array.shape)), np.ascontiguousarray(array).data.cast("B")]


def _decode_all(
    plan: ShardPlan, sources: list[Stamp], tried: list[tuple[int, int, Stamp]], failures: list[Failure]
) -> Iterator[tuple[Clip, Decoded]]:
    """The clips that can be decoded, one at a time, each from the first of its files that can be.

    Args:
        plan: The clips.
        sources: Gets the stamp of each clip's first file.
        tried: Gets place in the shard, number among `Clip.others` and stamp of each other file that was decoded.
        failures: Gets the clips that cannot be decoded, and those whose first file cannot be.
    """
    copies = stamped_copies((clip.path, clip.at) for clip in plan.clips)
    for place, (clip, first) in enumerate(zip(plan.clips, copies, strict=True)):
        one, failed = clip, list[tuple[Clip, DecodeError]]()
        found, now = _attempt(clip, first, plan)
        sources.append(now)
        for number, other in enumerate(clip.others):
            if isinstance(found, Decoded):
                break
            failed.append((one, found))
            one = other
            for further in stamped_copies([(other.path, other.at)]):
                found, now = _attempt(other, further, plan)
                tried.append((place, number, now))
        if isinstance(found, DecodeError):
            failed.append((one, found))
        if failed:
            row = clip.line or (plan.rows[place] if plan.rows else None)
            failures.append(_failure(failed, plan, row, recorded(one, plan.root) if isinstance(found, Decoded) else ""))
        if isinstance(found, Decoded):
            yield one, found


def _attempt(
    clip: Clip, stamped: tuple[str | OSError, Stamp], plan: ShardPlan, again: bool = False
) -> tuple[Decoded | DecodeError, Stamp]:
    """The clip out of its own file (a copy and its stamp), or why that gives nothing; and the stamp.

    Raises:
        MachineError: trouble of this machine, its disks or its network.
        UserError: the clip's container is not the one that was listed.
    """
    container = split_source(clip.path)[0]
    if stamped[1] is not None and stamped[1] != plan.containers.get(container, stamped[1]):
        raise UserError(
            f"{container}: was written anew since its clips were listed, and may hold others in their places; when it "
            "is at rest, run the same command again"
        )
    try:
        return _decode(clip, stamped[0], plan), stamped[1]
    except DecodeError as error:
        others = dict.fromkeys([*(other.path for other in plan.clips), *plan.probes])
        others.pop(clip.path, None)
        if again or not others or str(error).split(":")[0] not in ABSENT:
            return error, stamped[1]
        # A file that is not there, or not for us, may be one of all whose disk or store is away for a moment.
        try:
            if not any(
                stamp(path) is not None and (is_remote(path) or os.access(split_source(path)[0], os.R_OK))
                for path in list(others)[:PROBES]
            ):
                raise MachineError(f"{clip.path}: {error}; and so are the others: is their disk or store there?")
        except OSError as trouble:
            raise trouble if isinstance(trouble, MachineError) else MachineError(str(trouble)) from error
    for further in stamped_copies([(clip.path, clip.at)]):
        return _attempt(clip, further, plan, again=True)
    raise AssertionError("unreachable")


def _failure(failed: Sequence[tuple[Clip, DecodeError]], plan: ShardPlan, row: int | None, used: str) -> Failure:
    """As it is recorded: without what differs between machines, mount points and attempts.

    Args:
        failed: The clip in each of its files that give nothing, and why.
        plan: Of its shard.
        row: Of the clip in the catalog.
        used: The file that gave it after all; "": none.
    """
    told = []
    for one, error in failed:
        shown = recorded(one, plan.root)
        reason = str(error).replace(one.path, shown)
        if len(plan.root) > 1:
            reason = reason.replace(f"{plan.root.rstrip('/')}/", "")
        told.append(f"{shown}: {ADDRESS.sub('0x', reason)}")
    clip, first = failed[0][0], recorded(failed[0][0], plan.root)
    reason = "; ".join(told).removeprefix(f"{first}: ")  # the kind comes first
    return Failure(clip.id or clip.key, first, reason, clip.split, clip.key, row, clip.start, clip.end, used)


def _decode(clip: Clip, copy: str | OSError, plan: ShardPlan) -> Decoded:
    audio = plan.audio
    if isinstance(copy, MachineError):
        raise copy
    if isinstance(copy, SourceError):
        raise DecodeError(str(copy)) from copy
    if isinstance(copy, OSError):
        gone = isinstance(copy, FileNotFoundError)
        reason = "vanished: the file is not there any more" if gone else "unreadable: its store does not give it to us"
        raise DecodeError(reason) from copy
    try:
        clip.path.encode()
    except UnicodeEncodeError as error:
        raise DecodeError("name: not UTF-8; rename the file") from error  # parquet cannot hold it
    try:
        return guarded_decode(
            copy, clip.start, clip.end, rate=audio.sample_rate, seconds=audio.seconds, trimmed=clip.trimmed,
        )  # fmt: skip
    except DecodeError as error:
        # The name of a scratch copy differs from build to build, and failures.jsonl must not.
        raise DecodeError(str(error).replace(copy, clip.path)) from error


def _add(tar: TarWriter, key: str, sample: Sequence[Sequence[bytes | memoryview]]) -> dict[str, int]:
    """Adds a sample's members; returns payload offsets, sizes and hashes as index columns."""
    columns: dict[str, int] = {}
    for member, parts in zip(MEMBERS, sample, strict=True):
        found = tar.add(f"{key}.{EXTENSIONS[member]}", parts)
        columns |= {f"{member}_{what}": value for what, value in zip(("offset", "size", "xxh3"), found, strict=True)}
    return columns


def left_out(about: dict[str, Any], seconds: float) -> float:
    """Seconds of a clip's segment, or of its file where it has no end, after those that are stored; 0: about none.

    Args:
        about: The clip's json.
        seconds: That are stored of a clip at most.
    """
    listed = math.inf if about["listed_end"] is None else about["listed_end"] - about["start"]
    rest = min(listed, about["original_duration"] - about["read_from"]) - seconds
    return float(rest) if rest > TRIM_SLACK else 0.0


def _describe(clip: Clip, plan: ShardPlan, decoded: Decoded, about: dict[str, Any]) -> dict[str, Any]:
    content: dict[str, Any] = {
        "labels": list(clip.labels),
        "label_ids": [plan.labels[label].id for label in clip.labels],
        "label_names": [plan.labels[label].name for label in clip.labels],
        "source": recorded(clip, plan.root),
        "start": clip.start,
        "end": clip.start + about["seconds"] * plan.audio.seconds,
        "listed_end": clip.end,
        "trimmed": decoded.begin != clip.start if clip.trimmed is None else clip.trimmed,
        "listed_trimmed": clip.trimmed,
        "read_from": decoded.begin,
        "cut_by_file_end": decoded.cut,
        "seconds": about["seconds"] * plan.audio.seconds,
        "original_duration": round(decoded.duration, 6),
        "original_sample_rate": decoded.sample_rate,
        "original_channels": decoded.channels,
        "decoder": decoded.decoder,
        "fold": clip.fold,
        "silent": about["silent"],
        "gain": about["gain"],
    }
    if clip.events:
        content["events"] = [{"onset": onset, "offset": offset, "label": label} for onset, offset, label in clip.events]
    return content


def _index_row(clip: Clip, plan: ShardPlan, share: float, columns: dict[str, int]) -> dict[str, Any]:
    return {
        "key": clip.key,
        "split": clip.split,
        "fold": clip.fold,
        "shard": plan.name,
        "labels": list(clip.labels),
        "seconds": share * plan.audio.seconds,
        "source": recorded(clip, plan.root),
        "start": clip.start,
        "end": clip.end,
        "trimmed": clip.trimmed,
        **columns,
    }
