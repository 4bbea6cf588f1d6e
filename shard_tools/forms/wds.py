"""Tars in which a clip is audio and a JSON of the same name, as WebDataset has them (confit's AudioSet, CLAP, LAION).

| member | what |
|---|---|
| KEY.wav, KEY.flac, ... | the audio; KEY ends at the first dot, or at the last where several clips have one start |
| KEY.json | `label`, `labels`, `tag`, ...: names, mids or numbers, one or a list; `id`, the clip's name; `split` |
| KEY.cls | the number of the only label |

A tar's name or folder tells the split of a clip whose JSON does not. A text of several labels needs --label-separator.
Texts (`text`, `caption`) are no labels. Several clips of one name are those of several tars: without an `id` a clip
goes by its tar and KEY.
"""

import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any

from pipeline.errors import UserError
from shard_tools.audio_files import endings_of, kind, split_name, walk, what_is_there
from shard_tools.catalogs import Catalog
from shard_tools.columns import relative
from shard_tools.forms.entries import Asked, Entry, assemble, names_of, split_of_row
from shard_tools.forms.records import LABELS, label_column
from shard_tools.names import split_source
from shard_tools.sources import Member, members

log = logging.getLogger(__name__)

IDS = ("id", "video_id", "ytid", "youtube_id", "key")
WDS_LABELS = ("label", "labels", *(name for name in LABELS if name not in ("label", "labels")))


def read(asked: Asked) -> Catalog:
    """The catalog of all tars below the root.

    Raises:
        UserError: a tar cannot be read, or its JSON says no labels.
    """
    root = str(asked.root)
    paths = [path for path in walk(asked.root) if path.lower().endswith(".tar")]
    silent: list[str] = []

    def entries() -> Iterator[Entry]:
        silent.clear()  # tars are read twice where the labels are not known
        for _, found in groupby(members(paths), lambda member: split_source(member.name)[0]):
            yield from _entries(found, root, silent)

    catalog = assemble("wds", asked, entries, None, lambda: what_is_there(endings_of(walk(asked.root))))
    if silent:
        log.warning("%s: %d JSON or .cls files have no audio beside them and are left out, such as %s", root,
                    len(silent), silent[0])  # fmt: skip
    return catalog


def _entries(found: Iterable[Member], root: str, silent: list[str]) -> Iterator[Entry]:
    """Clips of one tar; `silent` gets what tells of a clip without audio."""
    groups: dict[str, list[Member]] = {}
    for member in found:
        folder, slash, name = split_source(member.name)[1].rpartition("/")
        groups.setdefault(f"{folder}{slash}{name.partition('.')[0]}", []).append(member)
    for key, group in _clips(groups):
        audio = [member for member in group if kind(split_name(member.name)[1]) == 0]
        abouts = [member for member in group if member.name.lower().endswith(".json")]
        number = next((member for member in group if member.name.lower().endswith(".cls")), None)
        if not audio:
            silent += [one.name for one in (*abouts, number) if one is not None][:1]
            continue
        own = f"{audio[0].name.rpartition('.')[0]}.json"  # of several, such as KEY.json and KEY.meta.json
        about = next((member for member in abouts if member.name == own), abouts[0] if abouts else None)
        where = relative(audio[0].name, root)
        facts: dict[str, Any] = _facts(about) if about is not None else {}
        column = label_column(facts, WDS_LABELS)
        labels: Sequence[str | int]
        if about is not None and column is not None:
            labels = names_of(facts[column], about.name)
        elif number is not None and (text := (number.text or b"").decode("utf-8", "replace").strip()):
            labels = [int(text) if text.isdecimal() else text]
        else:
            has = f"its JSON has {', '.join(facts)}" if facts else "it has no JSON"
            raise UserError(f"{audio[0].name}: no label ({has}); it needs 'label' or 'tag', or build without labels: "
                            "--dataset unlabelled")  # fmt: skip
        id_ = next((str(facts[name]) for name in IDS if facts.get(name)), f"{where.rpartition(key)[0]}{key}")
        yield Entry(id_, audio[0].name, labels, split_of_row(facts, split_source(where)[0]), at=audio[0].at)


def _clips(groups: dict[str, list[Member]]) -> Iterator[tuple[str, list[Member]]]:
    """(key, members) of each clip: 2024.05.01.wav and 2024.05.02.wav are one by their first dot, and two by the last.

    Raises:
        UserError: a clip has several files of audio.
    """
    for key, group in groups.items():
        if sum(kind(split_name(member.name)[1]) == 0 for member in group) < 2:
            yield key, group
            continue
        parts: dict[str, list[Member]] = {}
        for member in group:
            parts.setdefault(split_source(member.name)[1].rpartition(".")[0], []).append(member)
        for stem, part in parts.items():
            audio = [member.name for member in part if kind(split_name(member.name)[1]) == 0]
            if len(audio) > 1:
                raise UserError(f"{audio[0]} and {audio[1]}: two files of audio of one clip; make the tar anew with "
                                "one a clip, or build without labels: --dataset unlabelled")  # fmt: skip
            yield stem, part


def _facts(about: Member) -> dict[str, Any]:
    try:
        facts = json.loads(about.text or b"")
        if isinstance(facts, dict):
            return facts
    except (ValueError, RecursionError) as error:
        raise UserError(f"{about.name}: no JSON ({error!s:.80}); make the tar anew") from error
    raise UserError(f"{about.name}: no JSON object; make the tar anew")
