"""The sets of shards of a run: one, or several that are read as one.

In: `data.shards`. Out: a `Corpus`: what each set holds, which of its splits are used, and one vocabulary for all.

Vocabularies are joined: two classes of different sets are one where both have the same AudioSet id (/m/..., /t/...),
or, if one has none, the same name (case, "_" and "-" aside). A class whose only name is a number is
never joined: two data sets that count their classes from 0 mean different things. `Corpus.report` says what
was joined. Cost: that of the manifests.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from pipeline.config import DataConfig
from pipeline.data.manifest import (
    AudioFormat,
    FbankFormat,
    Label,
    Manifest,
    SplitRecord,
    labelled_manifest,
    load_manifest,
)
from pipeline.errors import UserError

MID = re.compile(r"/[a-z]/[0-9a-z_]+")


class Member(NamedTuple):
    """One set of shards.

    Attributes:
        location: Directory or URL.
        manifest: Its manifest.
        train: Splits to train on, in order.
        held_out: Split to evaluate on; "": none.
        weight: Share of the draws, where the settings name one.
        classes: int32, its classes' numbers in the joined vocabulary; None: the same.
    """

    location: str
    manifest: Manifest
    train: list[str]
    held_out: str
    weight: float | None
    classes: np.ndarray | None

    @property
    def clips(self) -> int:
        """To train on."""
        return sum(self.manifest.splits[name].clips for name in self.train)


@dataclass(frozen=True, eq=False)
class Corpus:
    """All sets of a run.

    Attributes:
        members: In the order of the settings.
        labels: Joined vocabulary, C classes.
        digest: Of the manifest; of several, of theirs, the splits and the weights.
        report: Of several, a line for each: clips, classes, and those that it has in common with the ones before.
    """

    members: Sequence[Member]
    labels: list[Label]
    digest: str
    report: list[str]

    @property
    def audio(self) -> AudioFormat:
        """Of all sets."""
        return self.members[0].manifest.audio

    @property
    def fbank(self) -> FbankFormat:
        """Of all sets."""
        return self.members[0].manifest.fbank

    @property
    def single_label(self) -> bool:
        """Every clip has exactly one label."""
        return all(member.manifest.single_label for member in self.members)

    @property
    def held_out(self) -> bool:
        """A split to evaluate on is there."""
        return any(member.held_out for member in self.members)

    @property
    def splits(self) -> dict[str, SplitRecord]:
        """Splits of all sets: by name; of several sets by number and name, "1/train"."""
        several = len(self.members) > 1
        return {f"{number}/{name}" if several else name: split
                for number, member in enumerate(self.members, 1) for name, split in member.manifest.splits.items()
                }  # fmt: skip


def load_corpus(data: DataConfig, labelled: bool = False, trains: bool = True) -> Corpus:
    """Reads the manifests that `data.shards` names.

    Args:
        data: Settings.
        labelled: Clips without labels are refused: their classes are learned or scored.
        trains: Training splits must be there. Not for an evaluation of a split of its own.

    Raises:
        UserError: no manifest, a split that is not there, sets of different formats, or no labels.
    """
    found: list[Member] = []
    labels: list[Label] = []
    report: list[str] = []
    for number, one in enumerate(data.sets):
        manifest = labelled_manifest(one.path) if labelled else load_manifest(one.path)
        train = (one.split or data.train_split).split(",")
        for name in train:
            if trains and name not in manifest.splits:
                key = f"data.shards[{number}].split = '{one.split}'" if one.split else (
                    f"data.train_split = '{data.train_split}'")  # fmt: skip
                raise UserError(
                    f"{key}: there is no split '{name}' in {one.path}, which has {', '.join(manifest.splits)}; name "
                    "one of these"
                )
        held_out = data.eval_split if one.eval_split is None else one.eval_split
        if held_out not in manifest.splits:
            if one.eval_split:
                raise UserError(
                    f"data.shards[{number}].eval_split = '{held_out}' is not in {one.path}, which has "
                    f"{', '.join(manifest.splits)}; name one, or '' for none"
                )
            held_out = ""
        if found and (manifest.audio, manifest.fbank) != (found[0].manifest.audio, found[0].manifest.fbank):
            formats = [
                f"{other.audio.seconds:g} s at {other.audio.sample_rate} Hz, {other.fbank.mel_bins} mel bins"
                for other in (found[0].manifest, manifest)
            ]
            raise UserError(
                f"data.shards: clips of {found[0].location} are {formats[0]}, those of {one.path} {formats[1]}; a "
                "batch has one format: build one of them again, with the --seconds and --sample-rate of the other"
            )
        twin = next((other for other in found if other.manifest.digest == manifest.digest), None)
        if twin is None:
            classes, said = _join(labels, manifest, one.path)
        else:
            classes, said = np.arange(len(manifest.labels)) if twin.classes is None else twin.classes, ", the same set"
        same = np.array_equal(classes, np.arange(len(classes)))
        train = [name for name in train if name in manifest.splits]
        member = Member(one.path, manifest, train, held_out, one.weight, None if same else classes)
        found.append(member)
        report.append(f"{one.path} ({','.join(train)}): {member.clips} clips, {len(manifest.labels)} classes{said}")
    if len(found) == 1:
        return Corpus(found, labels, found[0].manifest.digest, [])
    about = [[m.manifest.digest, m.train, m.held_out, m.weight] for m in found]
    return Corpus(found, labels, hashlib.sha256(json.dumps(about).encode()).hexdigest(), report)


def _join(labels: list[Label], manifest: Manifest, path: str) -> tuple[np.ndarray, str]:
    """Adds a set's classes to the vocabulary; their numbers in it, and in words what was joined.

    A first set's classes stay as they are. Two classes of one set are never joined with the same one.
    """
    ids = {label.id: number for number, label in enumerate(labels) if MID.fullmatch(label.id)}
    names: dict[str, int] = {}
    for place, label in enumerate(labels):
        names.setdefault(_plain(label.name), place)
    first = not labels
    taken = {ids[label.id] for label in manifest.labels if label.id in ids}  # an id says more than a name
    classes: list[int] = []
    by_id = by_name = 0
    known = {label.id for label in labels}
    for label in manifest.labels:
        number: int | None = None if first else ids.get(label.id)
        by_id += number is not None
        if number is None and not first and not _plain(label.name).isdigit():
            number = names.get(_plain(label.name))
            if number is not None and (
                number in taken or (MID.fullmatch(label.id) and MID.fullmatch(labels[number].id))
            ):
                number = None
            by_name += number is not None
        if number is None:
            number = len(labels)
            labels.append(label if label.id not in known else Label(id=f"{path}:{label.id}", name=label.name))
        taken.add(number)
        classes.append(number)
    said = "" if first else f", {by_id} of them joined by id and {by_name} by name with those before"
    return np.array(classes, np.int32), said


def _plain(name: str) -> str:
    return " ".join(re.split(r"[\s_-]+", name.casefold().strip()))
