"""Tars in which a clip is audio and a JSON of the same name, as WebDataset has them (confit's AudioSet, CLAP, LAION).

| member | what |
|---|---|
| KEY.wav, KEY.flac, ... | the audio; KEY ends at the first dot |
| KEY.json | `label`, `labels`, `tag`, ...: names, mids or numbers, one or a list; `id`, the clip's name |
| KEY.cls | the number of the only label |

A tar's name or folder tells the split. Texts (`text`, `caption`) are no labels. Several clips of one name are those of
several tars: without an `id` a clip goes by its tar and KEY.
"""

import json
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Any

from pipeline.errors import UserError
from shard_tools.audio_files import endings_of, kind, split_name, walk, what_is_there
from shard_tools.catalogs import Catalog
from shard_tools.columns import relative
from shard_tools.forms.entries import Asked, Entry, assemble, names_of, split_of
from shard_tools.forms.records import LABELS
from shard_tools.names import split_source
from shard_tools.sources import Member, members

IDS = ("id", "video_id", "ytid", "youtube_id", "key")
WDS_LABELS = ("label", "labels", *(name for name in LABELS if name not in ("label", "labels")))


def read(asked: Asked) -> Catalog:
    """The catalog of all tars below the root.

    Raises:
        UserError: a tar cannot be read, or its JSON says no labels.
    """
    root = str(asked.root)
    paths = [path for path in walk(asked.root) if path.lower().endswith(".tar")]

    def entries() -> Iterator[Entry]:
        for _, found in groupby(members(paths), lambda member: split_source(member.name)[0]):
            yield from _entries(found, root)

    return assemble("wds", asked, entries, None, lambda: what_is_there(endings_of(walk(asked.root))))


def _entries(found: Iterable[Member], root: str) -> Iterator[Entry]:
    """Clips of one tar."""
    groups: dict[str, list[Member]] = {}
    for member in found:
        folder, slash, name = split_source(member.name)[1].rpartition("/")
        groups.setdefault(f"{folder}{slash}{name.partition('.')[0]}", []).append(member)
    for key, group in groups.items():
        audio = [member for member in group if kind(split_name(member.name)[1]) == 0]
        about = next((member for member in group if member.name.lower().endswith(".json")), None)
        number = next((member for member in group if member.name.lower().endswith(".cls")), None)
        if not audio:
            continue
        where = relative(audio[0].name, root)
        facts: dict[str, Any] = _facts(about) if about is not None else {}
        column = next((name for name in WDS_LABELS if name in facts), None)
        if column is not None:
            labels = names_of(facts[column])
        elif number is not None and (text := (number.text or b"").decode("utf-8", "replace").strip()):
            labels = [int(text) if text.isdecimal() else text]
        else:
            has = f"its JSON has {', '.join(facts)}" if facts else "it has no JSON"
            raise UserError(f"{audio[0].name}: no label ({has}); it needs 'label' or 'tag', or build without labels: "
                            "--dataset unlabelled")  # fmt: skip
        id_ = next((str(facts[name]) for name in IDS if facts.get(name)), f"{where.rpartition(key)[0]}{key}")
        yield Entry(id_, audio[0].name, labels, split_of(split_source(where)[0]), at=audio[0].at)


def _facts(about: Member) -> dict[str, Any]:
    try:
        facts = json.loads(about.text or b"")
        if isinstance(facts, dict):
            return facts
    except (ValueError, RecursionError) as error:
        raise UserError(f"{about.name}: no JSON ({error!s:.80}); make the tar anew") from error
    raise UserError(f"{about.name}: no JSON object; make the tar anew")
