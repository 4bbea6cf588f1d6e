"""Parquet files with the audio inside, as the Hugging Face hub has them (agkphysics/AudioSet since 2025, and others).

| column | what |
|---|---|
| audio {bytes, path}, or one of bytes | a whole file of audio a row |
| video_id, id, key, filename, ... | the clip's name where each has its own; else the file's name and the row's number |
| labels, label, tags, ... | mids, names, numbers or classes of the hub's; a list, or a text with --label-separator |
| human_labels | names of the mids in `labels`, in their order |
| split, fold | if they are there |

Where a row has no split, its file's name or folder tells it: data/bal_train/00.parquet, train-00000-of-00004.parquet.
Only these columns are read, and of the audio nothing.
"""

import json
import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.data.manifest import Label
from pipeline.errors import UserError
from shard_tools.audio_files import endings_of, walk, what_is_there
from shard_tools.catalogs import Catalog
from shard_tools.columns import relative
from shard_tools.forms.entries import Asked, Entry, assemble, names_of, split_of
from shard_tools.forms.records import BATCH, LABELS, parquet_source
from shard_tools.names import BETWEEN
from shard_tools.sources import ParquetSource
from shard_tools.tables import cell_labels

log = logging.getLogger(__name__)

IDS = ("video_id", "ytid", "youtube_id", "id", "key", "clip_id", "segment_id", "file_name", "filename", "fname",
       "slice_file_name")  # fmt: skip


def read(asked: Asked, labelled: bool = True) -> Catalog:
    """The catalog of all Parquet files below the root.

    Raises:
        UserError: there is none, or one has no audio or, where labels are asked for, none of those.
    """
    root = str(asked.root)
    paths = [path for path in walk(asked.root) if path.lower().endswith(".parquet")]
    names: dict[str, str] = {}
    numbered, dataset = False, "parquet"
    for path in paths:
        with parquet_source(path) as source:
            columns = source.schema.names
            if not source.audio:
                raise UserError(f"{path}: no column of audio (has {', '.join(columns[:20])}); it needs audio {{bytes, "
                                "path}")  # fmt: skip
            column = _labels(source)
            if labelled and not column:
                raise UserError(f"{path}: no column of labels (has {', '.join(columns[:20])}); it needs one of "
                                f"{', '.join(LABELS[:4])}, or build without: --dataset unlabelled")  # fmt: skip
            if "video_id" in columns and "labels" in columns:
                dataset = "audioset"
            if labelled:
                _check_kind(source, path, column)
            if labelled and asked.class_labels is None:
                numbered |= _collect(source, path, column, names, asked.separator)
    if labelled and numbered and not names:
        raise UserError(f"{paths[0]}: its labels are numbers, and nothing says of which classes; give --class-labels")
    labels = [Label(id=name, name=names[name] or name) for name in sorted(names)] if names or not labelled else None

    def entries() -> Iterator[Entry]:
        for path in paths:
            split = split_of(relative(path, root))
            with parquet_source(path) as source:
                yield from _entries(source, path, relative(path, root), split, labelled)

    def there() -> str:
        return what_is_there(endings_of(walk(asked.root)))

    return assemble(dataset, asked, entries, labels, there)


def _labels(source: ParquetSource) -> str:
    return next((name for name in LABELS if name in source.schema.names), "")


def _classes(source: ParquetSource, column: str) -> list[str]:
    """Names of the hub's ClassLabel in a column; empty: it is none."""
    try:
        info = json.loads((source.schema.metadata or {}).get(b"huggingface", b"{}"))
        feature = info["info"]["features"][column]
        feature = feature[0] if isinstance(feature, list) else feature.get("feature", feature)
        return list(map(str, feature["names"]))
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        return []


def _is_list(kind: pa.DataType) -> bool:
    return any(is_kind(kind) for is_kind in (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list))


def _is_text(kind: pa.DataType) -> bool:
    inner = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(pa.types.is_string(inner) or pa.types.is_large_string(inner))


def _check_kind(source: ParquetSource, path: str, column: str) -> None:
    kind = source.schema.field(column).type
    inner = kind.value_type if _is_list(kind) else kind
    inner = inner.value_type if pa.types.is_dictionary(inner) else inner
    fits = (pa.types.is_string, pa.types.is_large_string, pa.types.is_integer, pa.types.is_null)
    if not any(is_kind(inner) for is_kind in fits):
        raise UserError(f"{path}: column '{column}' holds {kind!s:.80}, not names or numbers of classes; make it "
                        "texts, integers or lists of them, or build without labels: --dataset unlabelled")  # fmt: skip


def _collect(source: ParquetSource, path: str, column: str, names: dict[str, str], separator: str | None) -> bool:
    """Adds the classes of a file, with their names; whether they are numbers without names."""

    def problem(what: str, remedy: str) -> UserError:
        return UserError(f"{path}: column '{column}': {what}; {remedy}")

    classes = _classes(source, column)
    if classes:
        names |= {name: "" for name in classes if name not in names}
        return False
    listed = _is_list(source.schema.field(column).type)
    spoken = listed and column == "labels" and "human_labels" in source.schema.names \
        and _is_list(source.schema.field("human_labels").type)  # fmt: skip
    wanted = [column] + (["human_labels"] if spoken else [])
    for batch in source.file.iter_batches(BATCH, columns=wanted, use_threads=False):
        ids = batch.column(column)
        flat = pc.list_flatten(ids) if listed else ids
        if pa.types.is_integer(flat.type):
            return True
        for cell in pc.unique(flat).to_pylist():
            one = (cell or "").strip()
            for name in [one] if listed and one else cell_labels(one, separator, None, problem, ""):
                names.setdefault(name, "")
        if spoken:
            words = batch.column("human_labels")
            same = pc.fill_null(pc.equal(pc.list_value_length(ids), pc.list_value_length(words)), False)
            pairs = zip(*(pc.list_flatten(one.filter(same)).to_pylist() for one in (ids, words)), strict=True)
            for name, word in dict(pairs).items():
                if name and name.strip() and not names[name.strip()]:
                    names[name.strip()] = str(word or "")
    return False


def _entries(source: ParquetSource, path: str, inside: str, split: str, labelled: bool) -> Iterator[Entry]:
    there = source.schema.names
    id_ = next((name for name in IDS if name in there and pa.types.is_string(source.schema.field(name).type)), "")
    metadata = source.file.metadata
    if id_ and pc.count_distinct(source.file.read([id_], use_threads=False)[id_]).as_py() < metadata.num_rows:
        log.warning("%s: several rows have the same '%s', so clips go by the rows' numbers", path, id_)
        id_ = ""
    column = _labels(source) if labelled else ""
    classes = _classes(source, column)
    fold = "fold" if "fold" in there and pa.types.is_integer(source.schema.field("fold").type) else ""
    own = "split" if "split" in there and _is_text(source.schema.field("split").type) else ""
    wanted = [name for name in (id_, column, fold, own) if name]
    sizes = [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]
    first = np.cumsum([0, *sizes])
    row, group = 0, 0
    if not wanted:
        batches: Iterator[list[Any]] = iter([[{}] * int(first[-1])])
    else:
        batches = (batch.to_pylist() for batch in source.file.iter_batches(BATCH, columns=wanted, use_threads=False))
    for rows in batches:
        for cells in rows:
            while row >= first[group + 1]:
                group += 1
            picked = names_of(cells[column], f"{path}{BETWEEN}{row}") if column else []
            if classes and not isinstance(picked, str):
                picked = [classes[label] if isinstance(label, int) and 0 <= label < len(classes) else label
                          for label in picked]  # fmt: skip
            yield Entry(cells.get(id_) or f"{inside}{BETWEEN}{row}", f"{path}{BETWEEN}{row}", picked,
                        (cells.get(own) or "").strip() or split, at=(group, int(row - first[group])),
                        fold=cells.get(fold))  # fmt: skip
            row += 1
