"""The lists of AST, SSAST and Audio-MAE.

| file | what |
|---|---|
| --table, or every .json in the root | {"data": [{"wav": path, "labels": "mid,mid"}, ...]}; its name tells the split |

Paths are absolute, or relative to the root. Without --class-labels the classes are the mids that occur. Lists of one
split whose names differ only by a number are folds, which overlap, and are refused.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

from pipeline.data.storage import Location, join, read_bytes
from pipeline.errors import UserError
from shard_tools.catalogs import Catalog, Names
from shard_tools.forms.entries import Asked, Entry, Files, assemble, names_of, split_of, split_of_row


def read(asked: Asked, tables: list[str] | None = None) -> Catalog:
    """Their catalog.

    Raises:
        UserError: a list is malformed, or no file is there.
    """
    paths: list[Location] = [asked.table] if asked.table else [join(asked.root, name) for name in tables or []]
    files = Files(asked.root)
    alike: dict[tuple[str, str], Location] = {}
    for path in paths:
        name = str(path).rpartition("/")[2]
        other = alike.setdefault((split_of(name), re.sub("[0-9]+", "0", name)), path)
        if other is not path:
            raise UserError(f"{other} and {path} are lists of one split, whose names differ by a number: folds, which "
                            "overlap; give one by --table and an --out of its own, or write a csv of "
                            "path,labels,fold")  # fmt: skip

    def entries() -> Iterator[Entry]:
        for path in paths:
            called = Names(asked.root, path)
            for number, row in enumerate(rows(path), 1):
                if not isinstance(row, dict) or not isinstance(row.get("wav"), str) or not row["wav"]:
                    raise UserError(f"{path}: item {number} of data has no 'wav'; write {{\"wav\": PATH, \"labels\": "
                                    '"MID,MID"}')  # fmt: skip
                where, name = called.of(row["wav"])
                labels = names_of(row.get("labels"), f"{path}: item {number}")
                yield Entry(name, files.at(where), labels, split_of_row(row, str(path).rpartition("/")[2]), number,
                            table=path)  # fmt: skip

    return assemble("ast_json", asked, entries, None, files.report, paths[0] if paths else asked.root, ",")


def rows(path: Location) -> list[Any]:
    """The items of a list.

    Raises:
        UserError: it is none.
    """
    try:
        content = json.loads(read_bytes(path))
        found = content["data"]
        if not isinstance(found, list):
            raise TypeError("'data' is no list")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or f"{type(error).__name__} {error}"
        raise UserError(f'{path}: {reason:.160}; give a list {{"data": [{{"wav": ..., "labels": ...}}]}}') from error
    return found
