"""Which form a directory, URL or table is of, by what lies there; and its catalog.

In: what the command line asks. Out: the name of one form, or a refusal that names all that are possible.

| evidence | form |
|---|---|
| meta/esc50.csv | esc50 |
| FSD50K.ground_truth/dev.csv | fsd50k |
| metadata/UrbanSound8K.csv | urbansound8k |
| vggsound.csv | vggsound |
| validation_list.txt and testing_list.txt | speech_commands |
| metadata.csv, .tsv or .jsonl with file_name | audiofolder |
| a .json of {"data": [...]} | ast_json |
| JSON lines with audio_filepath | nemo |
| wav.scp | kaldi |
| .tsv with filename and event_label(s) | dcase |
| a csv, tsv or .jsonl with path and labels | csv |
| .h5, .hdf5 | hdf5 |
| .parquet with a column of audio | parquet |
| .tar with .json or .cls beside the audio | wds |
| audio, and AudioSet's tables or folders of their names | none alone: --dataset audioset needs --segments |
| none of these: folders named as splits, with class folders | audiofolder |
| none of these: class folders of audio | folder |
| none of these: audio in one folder | unlabelled |

What could be several is refused. At most LOOK_AROUND files are looked at, beside the tables in the root, and the
beginning of tables and containers.
"""

import logging
import os
import re
from collections.abc import Callable, Iterator

from pipeline.data.storage import is_remote, join, local
from pipeline.errors import UserError
from shard_tools import catalogs
from shard_tools.audio_files import HELD_OUT, SPLIT_NAMES, UNFINISHED, endings_of, kind, split_name, walk, what_is_there
from shard_tools.catalogs import LOOK_AROUND, Catalog
from shard_tools.columns import relative
from shard_tools.forms import (
    ast_json,
    audiofolder,
    dcase,
    fsd50k,
    hdf5,
    kaldi,
    nemo,
    parquet,
    rows,
    unlabelled,
    urbansound8k,
    vggsound,
    wds,
)
from shard_tools.forms.entries import Asked
from shard_tools.forms.records import LABELS, is_json, parquet_source, records_of
from shard_tools.names import COMPRESSED
from shard_tools.sources import members, open_container
from shard_tools.tables import Table

log = logging.getLogger(__name__)

TABLES = (".csv", ".tsv", ".json", ".jsonl", ".txt")
# AudioSet's tables, and the folders that downloads of it have: no classes, and no audio without labels.
AUDIOSET = re.compile(r"(?i)(^|/)((un)?balanced_train|eval)_segments[^/]*(/|\.csv$)|(^|/)class_labels_indices\.csv$")
HEAD_BYTES = 1000  # of a list in JSON
Reader = Callable[[Asked, list[str]], Catalog]


def _folder(asked: Asked, _: list[str]) -> Catalog:
    return catalogs.folder(asked.root, asked.split)


def _csv(asked: Asked, tables: list[str]) -> Catalog:
    table = asked.table or join(asked.root, tables[0])
    if is_json(table) or str(table).lower().endswith(".parquet"):
        return rows.read(asked, table)
    return catalogs.table(asked.root, table, asked.class_labels, asked.split, asked.separator)


FORMS: dict[str, Reader] = {
    "csv": _csv,
    "folder": _folder,
    "speech_commands": _folder,
    "esc50": lambda asked, _: catalogs.esc50(asked.root, asked.split or "train"),
    "fsd50k": lambda asked, _: fsd50k.read(asked),
    "vggsound": lambda asked, _: vggsound.read(asked),
    "urbansound8k": lambda asked, _: urbansound8k.read(asked),
    "audiofolder": lambda asked, _: audiofolder.read(asked),
    "ast_json": ast_json.read,
    "nemo": nemo.read,
    "kaldi": lambda asked, _: kaldi.read(asked),
    "dcase": dcase.read,
    "parquet": lambda asked, _: parquet.read(asked),
    "hdf5": lambda asked, _: hdf5.read(asked),
    "wds": lambda asked, _: wds.read(asked),
    "unlabelled": lambda asked, _: unlabelled.read(asked),
}
OWN_CLASSES = ("folder", "speech_commands", "esc50", "unlabelled")  # a vocabulary would say nothing about them
OF_TABLES = ("csv", "ast_json", "nemo", "dcase")


def read(form: str, asked: Asked) -> Catalog:
    """The catalog of a form that is named.

    Raises:
        UserError: it cannot be read as that.
    """
    tables: list[str] = []
    if form in OF_TABLES and asked.table is None:
        names = _names(asked)
        tables = [name for found, name in _tables(asked, names) if found == form]
        if not tables:
            raise UserError(f"--audio-root {asked.root}: no table of --dataset {form}: {_there(names)}; give --table")
    return FORMS[form](asked, tables)


def find(asked: Asked) -> str:
    """The form, which is said with the evidence.

    Raises:
        UserError: there is no evidence, or for several.
    """
    names = _names(asked) if asked.table is None else []
    found = _of_table(asked) if asked.table is not None else _of_root(asked, names)
    where = asked.table or asked.root
    if len(found) != 1:
        readings = "; ".join(f"--dataset {form} ({why})" for form, why in found.items())
        if found:
            raise UserError(f"{where}: could be read as {readings}; give one of them")
        there = _there(names) if asked.table is None else f"the table has {', '.join(_columns(asked.table)[:20])}"
        raise UserError(f"{where}: no form of data set that is known: {there}; see --help for --dataset")
    ((form, why),) = found.items()
    log.info("%s: read as --dataset %s: %s", where, form, why)
    return form


def packed(asked: Asked) -> str:
    """The form of a data set that lies in containers with its labels; "": it does not.

    Raises:
        UserError: a container cannot be read.
    """
    return next((form for form in _of_root(asked, _names(asked)) if form in ("parquet", "hdf5", "wds")), "")


def _names(asked: Asked) -> list[str]:
    """The first LOOK_AROUND files below the root, and what lies in it beside more audio than that, as tables do."""
    names: list[str] = []
    for path in walk(asked.root):  # a folder's files come before its folders
        name = relative(path, str(asked.root))
        if len(names) < LOOK_AROUND:
            names.append(name)
        elif "/" in name:
            break
        elif kind(split_name(name)[1]) is None:
            names.append(name)
    return names


def _there(names: list[str]) -> str:
    packed = [name for name in names if COMPRESSED.fullmatch(name)]
    left = [name for name in names if name.endswith(UNFINISHED)]
    said = what_is_there(endings_of(iter(names)))
    if packed:
        said += f"; {packed[0]} is compressed as a whole, and nothing in it can be read alone: unpack it to a .tar"
    return said + (f"; {left[0]} is an unfinished download" if left else "")


def _of_table(asked: Asked) -> dict[str, str]:
    """Forms that a table can be, with the evidence."""
    assert asked.table is not None
    name = str(asked.table)
    form = _table_form(asked.table)
    if form:
        return {form: f"its columns are those of {form}"}
    row = _columns(asked.table)
    if len(row) == 4 and row[1].strip().isdecimal() and row[3] in ("train", "test"):
        return {"vggsound": "id, start, label and split without a header"}
    json = is_json(asked.table)
    labelled = "file_name" in row and {*LABELS} & {*row} if json else _has(asked.table, "file_name", LABELS)
    if name.rpartition("/")[2].lower() in audiofolder.MARKS or labelled:
        return {"audiofolder": "file_name and a label"}
    only = len(row) == 1 and not json
    return {"unlabelled": "paths and no labels"} if unlabelled.column_of(Table(asked.table)) or only else {}


def _columns(path: object) -> list[str]:
    """What the first row of a table has: names of columns, or its cells where it has no header."""
    if is_json(str(path)):
        return list(next(iter(records_of(str(path))), (0, {}))[1])
    return next(iter(Table(str(path)).rows()), (0, []))[1]


def _table_form(path: object) -> str:
    """The form of tables that one is of; "": of none of them."""
    where = str(path)
    if where.lower().endswith(".parquet"):
        with parquet_source(where) as source:
            names = set(source.schema.names)
            return "parquet" if source.audio else "csv" if {"path", "labels"} <= names else ""
    if is_json(where):
        try:
            with open_container(where) as file:
                head = file.read(HEAD_BYTES).decode("utf-8", "replace").lstrip("\ufeff \t\r\n")
        except OSError as error:
            raise UserError(f"{where}: {error.strerror or error}; check the path") from error
        if re.match(r'\{\s*"data"\s*:', head):
            return "ast_json"
        row = next(iter(records_of(where)), (0, {}))[1]
        return "nemo" if "audio_filepath" in row else "csv" if {"path", "labels"} <= row.keys() else ""
    if _has(where, "path", ("labels",)):
        return "csv"
    return "dcase" if _has(where, "filename", ("event_labels", "event_label")) else ""


def _has(path: object, one: str, others: tuple[str, ...]) -> bool:
    """Whether a table has a column and one of some others."""
    for other in others:
        try:
            return bool(Table(str(path)).columns((one, other)))
        except UserError:
            continue
    return False


def _tables(asked: Asked, names: list[str]) -> Iterator[tuple[str, str]]:
    """(form, name) of the tables that say which form they are of: in the root, and those of DCASE anywhere."""
    for name in names:
        ending = split_name(name)[1].lower()
        path = join(asked.root, name)
        if ending in TABLES and ("/" not in name or ending == ".tsv"):
            if not is_remote(path) and not os.path.isfile(local(path)):
                continue  # a pipe that nobody writes into would be waited for
            try:
                form = _table_form(path)
            except UserError:
                continue  # no table
            if form and ("/" not in name or form == "dcase"):
                yield form, name


def _of_root(asked: Asked, names: list[str]) -> dict[str, str]:
    """Forms that a directory can be, with the evidence."""
    there = set(names)
    found: dict[str, str] = {}
    for form, mark in (("esc50", "meta/esc50.csv"), ("fsd50k", fsd50k.MARK), ("urbansound8k", urbansound8k.MARK),
                       ("vggsound", vggsound.MARK), ("kaldi", kaldi.MARK)):  # fmt: skip
        if mark in there:
            found[form] = mark
    if there.issuperset(HELD_OUT):
        found["speech_commands"] = " and ".join(HELD_OUT)
    metadata = next((name for name in names if name.rpartition("/")[2].lower() in audiofolder.MARKS), None)
    if metadata is not None:
        found["audiofolder"] = metadata
    if not found:
        tables = list(_tables(asked, names))
        for form, name in tables:
            found.setdefault(form, name)
        several = [name for form, name in tables if form == "csv"]
        if len(several) > 1:
            raise UserError(f"{asked.root}: {len(several)} tables, such as {several[0]} and {several[1]}; give one by "
                            "--table")  # fmt: skip
    if found:
        return found
    endings = {ending.lower() for ending in endings_of(iter(names))}
    if endings & {".h5", ".hdf5"}:
        found["hdf5"] = "HDF5 files"
    first = next((name for name in names if name.lower().endswith(".parquet")), None)
    if first is not None:
        with parquet_source(join(asked.root, first)) as source:
            if source.audio:
                found["parquet"] = f"{first} with a column {source.audio.partition('.')[0]}"
    audio = [name for name in names if kind(split_name(name)[1]) == 0]
    if not audio:
        return found | _of_archives(asked, names)
    marks = list(filter(AUDIOSET.search, names))
    own = {"audioset": f"{marks[0]}; with --segments CSV and --class-labels CSV"} if marks else {}
    return found | own | _of_audio(audio)


def _of_archives(asked: Asked, names: list[str]) -> dict[str, str]:
    """Of tars and zips."""
    archives = [name for name in names if name.lower().endswith((".tar", ".zip"))]
    if not archives:
        return {}
    inside = {split_name(member.name)[1].lower() for member in members([join(asked.root, archives[0])])}
    if archives[0].lower().endswith(".tar") and inside & {".json", ".cls"}:
        return {"wds": f"{archives[0]} with {' and '.join(sorted(inside)[:4])}"}
    if any(kind(ending) == 0 for ending in inside):
        return {"audioset": "with --segments CSV: tars or zips of audio, named after videos",
                "unlabelled": "tars or zips of audio, without labels"}  # fmt: skip
    return {}


def _of_audio(audio: list[str]) -> dict[str, str]:
    """Of audio files, and nothing beside them that says what they are."""
    depths = {name.count("/") for name in audio}
    tops = {name.partition("/")[0] for name in audio if "/" in name}
    if depths == {0}:
        return {"unlabelled": f"{len(audio)} audio files in one folder, and no table"}
    if tops and {top.lower() for top in tops} <= SPLIT_NAMES and min(depths) > 1:
        return {"audiofolder": f"folders of splits ({', '.join(sorted(tops)[:4])}) with class folders"}
    if len(tops) > 1 and depths == {1} and not {top.lower() for top in tops} & SPLIT_NAMES:
        return {"folder": f"{len(tops)} folders of audio, one a class"}
    return {"folder": f"classes {', '.join(sorted(tops)[:3])}", "unlabelled": f"{len(audio)} audio files, no table",
            "audioset": "with --segments CSV, where files are named after videos"}  # fmt: skip
