"""Index rows -> samples: read in place out of the tars, checked, bad ones counted and replaced.

In: rows. Out: int16 waveforms and float16 fbanks, written straight into the caller's arrays.

A clip is one or two preads at the index's offsets; the tar is never walked, so a tar that was cut or
overwritten cannot pass as a shorter data set. Each payload is checked against its xxh3 (0.02 ms a
clip). Cost per clip is constant; open files are bounded.
"""

import logging
import os
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import xxhash

from pipeline.data.manifest import Manifest, load_index
from pipeline.errors import UserError

log = logging.getLogger(__name__)

OPEN_FILES = 128


@dataclass(frozen=True)
class Needs:
    """Which members are read at all.

    Attributes:
        waveform: int16 waveforms.
        fbank: float16 fbanks.
    """

    waveform: bool
    fbank: bool


class ShardReader:
    """Reads members of shards; safe to use from several threads.

    Args:
        directory: Of the shards.
        manifest: Theirs.
        on_error: "skip": a bad clip is replaced by the next one of the index; "raise".
        max_bad: More bad clips than this end the run.
    """

    def __init__(self, directory: str | Path, manifest: Manifest, on_error: str, max_bad: int) -> None:
        self.directory = Path(directory)
        self.manifest = manifest
        self.on_error, self.max_bad = on_error, max_bad
        members = [f"{member}_{what}" for member in ("waveform", "fbank") for what in ("offset", "size", "xxh3")]
        table = load_index(directory, columns=["key", "shard", "split", "fold", "labels", *members])
        listed = sum(split.clips for split in manifest.splits.values())
        if len(table) != listed:
            raise UserError(
                f"{self.directory / 'index.parquet'}: {len(table)} rows, manifest.json counts {listed}: one of another "
                "build; run verify_shards.py"
            )
        self.keys = table["key"]
        self.columns = {name: table[name].to_numpy() for name in members}
        shard = table["shard"].combine_chunks()
        shard = shard.chunk(0) if isinstance(shard, pa.ChunkedArray) else shard
        self.shard_names: list[str] = shard.dictionary.to_pylist()
        self.shards: np.ndarray = shard.indices.to_numpy()
        labels = table["labels"].combine_chunks()
        labels = labels.chunk(0) if isinstance(labels, pa.ChunkedArray) else labels
        self.label_offsets, self.label_values = np.asarray(labels.offsets), np.asarray(labels.values)
        self.split, self.fold = table["split"], table["fold"].to_numpy()
        self.bad: dict[str, str] = {}
        self._reported: set[str] = set()
        self._known: set[tuple[int, Needs]] = set()  # bad clips, not to be read again
        self._files: OrderedDict[str, int] = OrderedDict()
        self._lock = threading.Lock()
        self._closing: list[int] = []

    def read(self, row: int, needs: Needs, waveform: np.ndarray, fbank: np.ndarray) -> int:
        """Reads a clip into the given arrays.

        Args:
            row: Index row.
            needs: Members to read.
            waveform: int16 [L], filled if needed.
            fbank: float16 [frames, M], filled if needed.

        Returns:
            The row that was read: `row`, or its replacement where it is bad.

        Raises:
            UserError: bad, and `on_error` is "raise"; or more than `max_bad` bad clips.
        """
        for attempt in range(len(self.keys)):
            candidate = (row + attempt) % len(self.keys)
            if (candidate, needs) in self._known:
                continue  # a cut tar costs one look per clip, not one per clip and replacement
            if attempt and (self.split[candidate] != self.split[row] or self.fold[candidate] != self.fold[row]):
                continue  # a held-out clip never stands in for a training clip
            problem = None
            if needs.waveform:
                problem = self._member("waveform", candidate, waveform)
            if needs.fbank and problem is None:
                problem = self._member("fbank", candidate, fbank)
            if problem is None:
                return candidate
            self._bad(candidate, problem)
            self._known.add((candidate, needs))
        raise UserError(
            f"{self.directory}: no clip of split '{self.split[row]}', fold {self.fold[row]} can be read; run "
            "verify_shards.py",
            local=True,
        )

    def labels(self, row: int) -> np.ndarray:
        """Label indices of a row."""
        return self.label_values[self.label_offsets[row] : self.label_offsets[row + 1]]

    def close(self) -> None:
        """Closes the files."""
        with self._lock:
            for descriptor in [*self._files.values(), *self._closing]:
                os.close(descriptor)
            self._files.clear()
            self._closing.clear()

    def _member(self, member: str, row: int, out: np.ndarray) -> str | None:
        """Reads a payload behind its .npy header into `out`; returns what is wrong with it."""
        offset, size = int(self.columns[f"{member}_offset"][row]), int(self.columns[f"{member}_size"][row])
        header = bytearray(size - out.nbytes)
        try:
            descriptor = self._open(self.shard_names[self.shards[row]])
            count = os.preadv(descriptor, [header, out.data.cast("B")], offset)
        except OSError as error:
            return f"{member}: {error.strerror or error}"
        if count != size:
            return f"{member}: {count} of {size} bytes: the tar is cut"
        digest = xxhash.xxh3_64(header)
        digest.update(out.data.cast("B"))
        if digest.intdigest() != int(self.columns[f"{member}_xxh3"][row]):
            return f"{member}: its hash differs from the index: damaged"
        return None

    def _open(self, name: str) -> int:
        with self._lock:
            descriptor = self._files.get(name)
            if descriptor is None:
                descriptor = self._files[name] = os.open(self.directory / name, os.O_RDONLY)
                if len(self._files) > OPEN_FILES:
                    # Another thread may be reading from it: it is closed one generation later.
                    self._closing.append(self._files.popitem(last=False)[1])
                    if len(self._closing) > OPEN_FILES:
                        os.close(self._closing.pop(0))
            else:
                self._files.move_to_end(name)
            return descriptor

    def _bad(self, row: int, problem: str) -> None:
        key, shard = str(self.keys[row]), self.shard_names[self.shards[row]]
        if self.on_error == "raise":
            raise UserError(f"{self.directory / shard}: clip {key}: {problem}; run verify_shards.py", local=True)
        with self._lock:
            first = shard not in self._reported
            self._reported.add(shard)
            self.bad[key] = f"{shard}: {problem}"
            count = len(self.bad)
        if first:
            log.warning("%s: clip %s: %s; replaced (later ones of this shard are only counted)", shard, key, problem)
        if count > self.max_bad:
            raise UserError(
                f"data.max_bad = {self.max_bad}: {count} bad clips in {self.directory}, such as {key} of {shard}; run "
                "verify_shards.py, or raise data.max_bad",
                local=True,
            )
