"""The shard index in memory: columns of the members that a method reads, and jobs made from them.

In: shards and needs. Out: `ShardIndex`. Memory: about 40 bytes a clip and member; no Python object per clip.
"""

import numpy as np
import pyarrow as pa

from pipeline.data.manifest import Manifest, load_index
from pipeline.data.reader import JOB, Needs
from pipeline.errors import UserError


class ShardIndex:
    """Columns by row of `index.parquet`.

    Args:
        directory: Directory or URL of the shards.
        manifest: Theirs.
        needs: Members whose places are loaded.

    Attributes:
        keys: Sample keys.
        split, fold: As in the index.
        shards: int32 [rows], shard number of each row.
        shard_names: By shard number.
        label_offsets, label_values: Labels of row i: `label_values[label_offsets[i] : label_offsets[i + 1]]`.
    """

    def __init__(self, directory: str, manifest: Manifest, needs: Needs) -> None:
        self.directory = directory
        self.manifest = manifest
        members = [member for member in ("waveform", "fbank") if getattr(needs, member)]
        places = [f"{member}_{what}" for member in members for what in ("offset", "size", "xxh3")]
        table = load_index(directory, columns=["key", "shard", "split", "fold", "labels", *places])
        listed = sum(split.clips for split in manifest.splits.values())
        if len(table) != listed:
            raise UserError(
                f"{directory}/index.parquet: {len(table)} rows, manifest.json counts {listed}: one of another "
                "build; run verify_shards.py"
            )
        self.keys: pa.ChunkedArray = table["key"]
        self.split: pa.ChunkedArray = table["split"]
        self.fold: np.ndarray = table["fold"].to_numpy()
        shard = _one_chunk(table["shard"])
        self.shard_names: list[str] = shard.dictionary.to_pylist()
        self.shards: np.ndarray = shard.indices.to_numpy()
        labels = _one_chunk(table["labels"])
        self.label_offsets, self.label_values = np.asarray(labels.offsets), np.asarray(labels.values)
        self._places = {name: table[name].to_numpy() for name in places}

    def __len__(self) -> int:
        return len(self.shards)

    def labels(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Labels of rows [m]: (which of the rows, label index), one pair for each label."""
        begins, ends = self.label_offsets[rows].astype(np.int64), self.label_offsets[rows + 1].astype(np.int64)
        counts = ends - begins
        which = np.repeat(np.arange(len(rows)), counts)
        where = np.arange(len(which)) + np.repeat(begins - np.cumsum(counts) + counts, counts)
        return which, self.label_values[where]

    def jobs(self, member: str, rows: np.ndarray) -> np.ndarray:
        """Reads of a member ("waveform" or "fbank") of rows [m]: JOB [m] without places in memory."""
        jobs = np.zeros(len(rows), JOB)
        jobs["shard"] = self.shards[rows]
        for what in ("offset", "size", "xxh3"):
            jobs[what] = self._places[f"{member}_{what}"][rows]
        return jobs

    def name(self, row: int) -> tuple[str, str]:
        """Key and shard of a row."""
        return str(self.keys[row]), self.shard_names[self.shards[row]]


def _one_chunk(column: pa.ChunkedArray) -> pa.Array:
    combined = column.combine_chunks()
    return combined.chunk(0) if isinstance(combined, pa.ChunkedArray) else combined
