"""HDF5 files with the waveforms inside, as PANNs packs AudioSet.

| dataset | what |
|---|---|
| waveform | int16 or float32 [clips, samples] |
| audio_name | YYTID.wav, a clip; without it the rows' numbers are its name |
| target | bool, or 0 and 1, [clips, classes]: the classes of --class-labels, in their order |

The sample rate is the attribute `sample_rate` (or `sr`, `fs`), else --source-rate. A file's name tells the split:
balanced_train.h5, unbalanced_train_part00.h5, eval.h5.
"""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import numpy as np

from pipeline.data.storage import is_remote
from pipeline.errors import UserError
from shard_tools.audio_files import endings_of, walk, what_is_there
from shard_tools.catalogs import Catalog
from shard_tools.columns import relative
from shard_tools.forms.entries import Asked, Entry, assemble, split_of
from shard_tools.labels import read_vocabulary
from shard_tools.names import BETWEEN
from shard_tools.sources import SourceError, open_container, rate_of, waveforms

log = logging.getLogger(__name__)

NAMES = ("audio_name", "filename", "file_name", "name", "id")
TARGETS = ("target", "targets", "labels", "label")
ROWS = 1 << 14  # at a time
YOUTUBE = re.compile(r"Y(.{11})\.wav", re.DOTALL)


def read(asked: Asked, labelled: bool = True) -> Catalog:
    """The catalog of all HDF5 files below the root.

    Raises:
        UserError: one has no waveforms or sample rate, or its classes are not those of the vocabulary.
    """
    root = str(asked.root)
    paths = [path for path in walk(asked.root) if path.lower().endswith((".h5", ".hdf5"))]
    held = [path for path in paths if _holds(path)]
    if held and len(held) < len(paths):
        other = next(path for path in paths if path not in held)
        log.warning("%s: %d HDF5 files without waveforms are left out, such as %s", root, len(paths) - len(held), other)
    paths = held or paths
    if labelled and asked.class_labels is None:
        raise UserError(f"{paths[0] if paths else root}: holds its labels as columns of numbers; give --class-labels "
                        "CSV (index,mid,display_name), or build without: --dataset unlabelled")  # fmt: skip
    classes = len(read_vocabulary(asked.class_labels)) if labelled and asked.class_labels is not None else None

    def entries() -> Iterator[Entry]:
        for path in paths:
            with opened(path) as file:
                yield from _entries(path, relative(path, root), file, asked.source_rate, classes)

    def there() -> str:
        return what_is_there(endings_of(walk(asked.root)))

    return assemble("hdf5", asked, entries, None if labelled else [], there)


def _holds(path: str) -> bool:
    with opened(path) as file:
        return waveforms(file) is not None


@contextmanager
def opened(path: str) -> Iterator[Any]:
    """An HDF5 file.

    Raises:
        UserError: it is none, cut, or takes something from other files.
    """
    import h5py  # see sources.py

    try:
        handle = open_container(path)
        with handle, h5py.File(handle if is_remote(path) else path, "r") as file:
            yield file
    except SourceError as error:
        raise UserError(f"{path}: {error}") from error
    except (OSError, RuntimeError, KeyError, ValueError, TypeError, MemoryError) as error:  # h5py's kinds of damage
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: no HDF5 file, or a truncated one ({reason:.120}); get it again") from error


def _entries(path: str, inside: str, file: Any, given: int | None, classes: int | None) -> Iterator[Entry]:
    rows = waveforms(file)
    if rows is None:
        has = ", ".join(islice(file, 20))
        raise UserError(f"{path}: no dataset of waveforms [clips, samples] (has {has}); it needs 'waveform'")
    rate = rate_of(file)
    if rate is None and given is None:
        raise UserError(f"{path}: does not say its sample rate (attribute 'sample_rate'); give --source-rate HZ")
    names = next((file[name] for name in NAMES if name in file and len(file[name]) == len(rows)), None)
    target = next((file[name] for name in TARGETS if name in file and getattr(file[name], "ndim", 0) == 2), None)
    if classes is not None and (target is None or target.shape != (len(rows), classes)):
        what = f"target {target.shape}" if target is not None else "no target"
        raise UserError(f"{path}: {what} for {len(rows)} clips of {classes} classes; give the vocabulary that it was "
                        "packed with, or build without labels: --dataset unlabelled")  # fmt: skip
    for first in range(0, len(rows), ROWS):
        last = min(first + ROWS, len(rows))
        called = names[first:last] if names is not None else [b""] * (last - first)
        truth = np.zeros((last - first, 0)) if classes is None or target is None else np.asarray(target[first:last])
        soft = np.argwhere((truth != 0) & (truth != 1))
        if len(soft):
            row, column = soft[0]
            raise UserError(f"{path}: target of clip {first + row} is {truth[row, column]} for class {column}, neither "
                            "0 nor 1; write 0 or 1, such as target > 0.5")  # fmt: skip
        for row, name, one in zip(range(first, last), called, truth, strict=True):
            text = name.decode("utf-8", "surrogateescape") if isinstance(name, bytes) else str(name)
            youtube = YOUTUBE.fullmatch(text)
            member = f"{row}" if rate is not None else f"{row}@{given}"
            yield Entry(youtube[1] if youtube else text or f"{inside}{BETWEEN}{row}", f"{path}{BETWEEN}{member}",
                        np.flatnonzero(one).tolist(), split_of(inside))  # fmt: skip
