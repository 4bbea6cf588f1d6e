"""The audio files below a directory, on disk or in a store, and what names of files and folders say.

In: a root, or a list of paths below it. Out: paths, one after the other; `AudioFiles`, which finds them by their names.

A file's ending says whether it can be a clip's audio: those of audio come first, unknown ones after, and those of
pictures, tables, texts and unfinished downloads never. Cost: one pass over the tree; about 0.3 KB of memory a file.
"""

import glob
import logging
import os
import re
import stat
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache

from pipeline.data.storage import Location, attempt, file_system, is_remote, join, transfer
from pipeline.errors import UserError
from shard_tools.names import BETWEEN, PLAN, PRODUCTS, split_source
from shard_tools.segment import AUDIO_ENDINGS
from shard_tools.sources import Place, members
from shard_tools.tables import Table

log = logging.getLogger(__name__)

YOUTUBE_ID = 11  # characters
TIMES = re.compile(r"(.*?)((?:_[0-9]+(?:\.[0-9]*)?){1,2})", re.DOTALL)  # one or two times at the end of a name

SPLIT_NAMES = frozenset({
    "train", "training", "valid", "validation", "val", "dev", "devel", "development", "test", "testing", "eval",
    "evaluation", "traindata", "testdata", "train_set", "test_set", "trainset", "testset", "trainval", "heldout",
})  # fmt: skip
HELD_OUT = {"validation_list.txt": "validation", "testing_list.txt": "test"}  # Speech Commands' lists and their splits
UNFINISHED = (".incomplete", ".part", ".partial", ".crdownload", ".aria2")  # downloads
UNFINISHED_SAID = "unfinished downloads are left out"
BUILT_SAID = "folders of shards are left out"
PLANS_SAID = "plans of --dry-run are left out"
BEGUN = re.compile(r"(.+)/\.build/[^/]+/plan", re.DOTALL)  # of an unfinished build
ARCHIVES = (".tar", ".zip")
FOLD_NAME = re.compile(r"(fold|split)[ _-]?[0-9]+", re.IGNORECASE)

# Endings of what lies beside audio and is none, in lower case.
OTHER_ENDINGS = frozenset({
    # texts and tables
    ".txt", ".csv", ".tsv", ".json", ".jsonl", ".xml", ".html", ".htm", ".md", ".rst", ".yaml", ".yml", ".toml", ".ini",
    ".cfg", ".log", ".pdf", ".doc", ".docx", ".xls", ".xlsx", ".ods", ".odt", ".rtf", ".bib", ".tex", ".description",
    ".info", ".nfo", ".url", ".srt", ".vtt", ".ass", ".lrc", ".ttml", ".cue", ".m3u", ".m3u8", ".pls", ".mpd",
    # pictures
    ".jpg", ".jpeg", ".png", ".gif", ".webp", ".bmp", ".svg", ".tif", ".tiff", ".ico", ".heic", ".avif",
    # arrays, models, databases
    ".npy", ".npz", ".pt", ".pth", ".ckpt", ".safetensors", ".pkl", ".pickle", ".joblib", ".h5", ".hdf5", ".mat",
    ".parquet", ".arrow", ".feather", ".orc", ".avro", ".lmdb", ".mdb", ".db", ".sqlite", ".onnx", ".tfrecord",
    # annotations and projects of sound
    ".lab", ".jams", ".textgrid", ".eaf", ".trs", ".rttm", ".stm", ".ctm", ".scp", ".mid", ".midi", ".musicxml", ".aup",
    ".aup3", ".als", ".sfk", ".pek", ".reapeaks", ".asd",
    # archives
    ".tar", ".gz", ".tgz", ".zip", ".bz2", ".xz", ".7z", ".rar", ".zst", ".lz4",
    # unfinished downloads and scratch
    ".part", ".partial", ".filepart", ".tmp", ".temp", ".crdownload", ".opdownload", ".download", ".incomplete",
    ".ytdl", ".aria2", ".lock", ".bak", ".swp",
    # programs and checksums
    ".py", ".pyc", ".ipynb", ".sh", ".bat", ".exe", ".dll", ".js", ".md5", ".sha1", ".sha256", ".sha512", ".torrent",
})  # fmt: skip


def kind(ending: str) -> int | None:
    """0: an ending of audio; 1: an unknown one, or none; None: one of something else."""
    ending = ending.lower()
    return 0 if ending in AUDIO_ENDINGS else None if ending in OTHER_ENDINGS else 1


def split_name(path: str) -> tuple[str, str]:
    """Stem and ending (with its dot) of a path's last part."""
    name = path.rpartition("/")[2]
    if BETWEEN in name:
        name = split_source(path)[1] or name
    stem, dot, ending = name.rpartition(".")
    return (stem, dot + ending) if stem else (name, "")


class AudioFiles:
    """Audio files by name without ending, however their accents are written (`composed`).

    Args:
        paths: Of all files that there are.
        normal: Makes one name of several spellings.
    """

    def __init__(self, paths: Iterable[str], normal: Callable[[str], str] = str) -> None:
        self.endings: Counter[str] = Counter()  # of all files that there are
        self.several = 0  # names asked for that have several files
        self.example: tuple[str, str] = ("", "")  # the file taken, and another
        self._files: dict[str, str] = {}
        self._more: dict[str, list[str]] = {}  # all files of the names that have several
        for path in paths:
            stem, ending = split_name(path)
            self.endings[ending] += 1
            if ending not in AUDIO_ENDINGS and kind(ending) is None:
                continue
            name = normal(composed(stem))
            first = self._files.setdefault(name, path)
            if first != path:
                self._more.setdefault(name, [first]).append(path)

    def find(self, names: Iterable[str]) -> list[tuple[str, str]]:
        """The names that have a file, with it, in the order in which the files are to be tried.

        An empty file does not come first where there is another. Of several files of a name those with an ending of
        audio come first, then the alphabet decides.
        """
        found = [(name, self._files[name]) for name in dict.fromkeys(map(composed, names)) if name in self._files]
        if not found or (len(found) == 1 and found[0][0] not in self._more):
            return found
        choices = [(name, path) for name, _ in found for path in self._choices(name)]
        chosen = next((choice for choice in choices if _size(choice[1])), choices[0])
        choices = [chosen, *(choice for choice in choices if choice != chosen)]
        self.several += 1
        if not self.example[0]:
            self.example = (chosen[1], choices[1][1])
        return choices

    def report(self) -> None:
        """Says how many of the names asked for have several files, and which were taken."""
        if self.several:
            log.warning(
                "%d clips have several files, such as %s (taken) and %s: an empty one is not taken, then an ending of "
                "audio goes before others, then the alphabet decides; where one cannot be decoded, the next is taken",
                self.several, *self.example,
            )  # fmt: skip

    def _choices(self, name: str) -> list[str]:
        files = set(self._more.get(name, [self._files[name]]))
        return sorted(files, key=lambda path: (kind(split_name(path)[1]), path))


def composed(name: str) -> str:
    """A name with each accented letter as one sign: some systems write it as two, and tables come from others."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def endings_of(paths: Iterable[str]) -> Counter[str]:
    """How many of some files have each ending."""
    return Counter(split_name(path)[1] for path in paths)


def what_is_there(endings: Counter[str]) -> str:
    """Counts of files by ending, in words."""
    ordered = sorted(endings.items(), key=lambda item: (-item[1], item[0]))
    parts = [f"{count} {ending or 'without an ending'}" for ending, count in ordered[:4]]
    rest = sum(count for _, count in ordered[4:])
    return f"files there: {', '.join(parts)}{f', {rest} others' if rest else ''}" if parts else "no files are there"


def listed(root: Location, listing: Location) -> Iterator[str]:
    """Paths of a list of paths below `root`, one a line.

    Raises:
        UserError: it cannot be read, or is no text.
    """
    place = joiner(root)
    for line in Table(listing).lines():
        if name := line.rstrip("\r\n").removeprefix("./"):
            yield place(name)


def joiner(root: Location) -> Callable[[str], str]:
    """`join` of one location and any name but "", at a tenth of its cost where the name needs no change."""
    prefix, plain = join(root, "x")[:-1], is_remote(root)

    def place(name: str) -> str:
        if plain or not (name[0] in "./" or name[-1] == "/" or "//" in name or "/." in name):
            return prefix + name
        return join(root, name)

    return place


def audio_paths(paths: Iterable[str], places: dict[str, Place]) -> Iterator[str]:
    """All files, and where none of them has an ending of audio, the members of their tars and zips.

    Args:
        paths: Of all files that there are.
        places: Gets where the members' bytes are.

    Raises:
        UserError: a tar or zip cannot be read.
    """
    archives, plain_files = [], 0
    for path in paths:
        if path.lower().endswith(ARCHIVES):
            archives.append(path)
        plain_files += kind(split_name(path)[1]) == 0
        yield path
    if plain_files and archives:
        log.warning("%d tars and zips, such as %s, are not looked into, as %d audio files lie beside them",
                    len(archives), archives[0], plain_files)  # fmt: skip
        return
    for member in members(archives):
        places[member.name] = member.at
        yield member.name


def walk(root: Location) -> Iterator[str]:
    """Paths of all files below `root` but hidden ones and shards: by name, a folder's files before its folders.

    Shards are what a build made there, such as the one that goes on: its index would be taken for a table of audio. So
    would the plan of a dry run.
    Links to folders are followed, each folder is read once. What is left out is said when the last path was taken.

    Raises:
        UserError: `root` is no directory that can be read.
    """
    if is_remote(root):
        yield from _walk_store(root)
        return
    try:
        os.scandir(root).close()
    except OSError as error:
        raise UserError(f"--audio-root {root}: {error.strerror}; give the directory that holds the audio") from error
    hidden: list[str] = []
    again: list[str] = []
    built: list[str] = []
    plans: list[str] = []
    unfinished: list[str] = []
    unreadable: list[OSError] = []
    # Links to a folder that holds the root lead back to it.
    seen = {_identity(parent) for parent in _parents(os.path.realpath(root))}
    tops = [os.fspath(root)]
    for top in tops:  # grows: what links lead to comes after what lies here
        for folder, directories, names in os.walk(top, onerror=unreadable.append):
            identity = _identity(folder)
            if identity in seen:
                again.append(folder)
                directories.clear()
                continue
            seen.add(identity)
            begun = glob.iglob(os.path.join(glob.escape(folder), ".build", "*", "plan"))
            if folder != os.fspath(root) and (set(PRODUCTS) <= set(names) or (".build" in directories and any(begun))):
                built.append(folder)
                directories.clear()
                continue
            hidden += [os.path.join(folder, name) for name in directories if name.startswith(".")]
            directories[:] = sorted(name for name in directories if not name.startswith("."))
            tops += [link for name in directories if os.path.islink(link := os.path.join(folder, name))]
            unfinished += [os.path.join(folder, name) for name in names if name.endswith(UNFINISHED)]
            for name in sorted(names):
                if name == PLAN:
                    plans.append(os.path.join(folder, name))
                elif not name.startswith("."):
                    yield os.path.join(folder, name)
                elif kind(split_name(name)[1]) == 0:
                    hidden.append(os.path.join(folder, name))
    _say(root, "hidden folders and audio files are left out", hidden)
    _say(root, UNFINISHED_SAID, unfinished)
    _say(root, BUILT_SAID, built)
    _say(root, PLANS_SAID, plans)
    _say(root, "folders are reached again by links, and read once", again)
    closed = [f"{error.filename} ({error.strerror})" for error in unreadable]
    _say(root, "folders cannot be read, and what they hold is left out", closed)


def segment_names(ytid: str, start: float, end: float) -> list[str]:
    """Names that a segment's file may have, as `plain_times` writes them; those without times hold the whole video."""
    times = _times(start, end)
    names = [ytid + time for time in times] + [f"Y{ytid}{time}" for time in times]
    # An id may itself end as a time does.
    return [plain_times(name) for name in names] if ytid[-1].isdigit() and "_" in ytid else names


@lru_cache(maxsize=1 << 12)
def _times(start: float, end: float) -> list[str]:
    """Ends of a segment's names: in seconds, in milliseconds, none."""
    times = []
    for scale in (1, 1000):
        first, last = _plain(f"{start * scale:.3f}"), _plain(f"{end * scale:.3f}")
        times += [f"_{first}", f"_{first}_{last}"]
    return [*times, ""]


def plain_times(stem: str) -> str:
    """A file's name without the zeros that times at its end may have: x_000030, x_30.0 and x_30.000 are x_30."""
    if not stem[-1:].isdigit() or "_" not in stem:
        return stem
    bare = len(stem) == YOUTUBE_ID or (len(stem) == YOUTUBE_ID + 1 and stem[0] == "Y")
    found = None if bare and "." not in stem else TIMES.fullmatch(stem)
    return stem if found is None else found[1] + "".join(f"_{_plain(time)}" for time in found[2].split("_")[1:])


def split_of_segments(segments: Location) -> str:
    """The split that a segments csv's name tells: `eval` where a whole word of it says so, else `train`.

    Raises:
        UserError: the name says several, or another.
    """
    words = set(re.split(r"[^a-z]+", str(segments).rsplit("/", 1)[-1].lower()))
    known = {"eval": {"eval", "evaluation"}, "train": {"train", "training"}}
    said = [name for name, spelled in known.items() if words & spelled]
    other = sorted(words & (SPLIT_NAMES - {"eval", "evaluation", "train", "training"}))
    if len(said) > 1 or (other and not said):
        names = ", ".join(said + other)
        raise UserError(f"--segments {segments}: its name does not tell the split ({names}); give --split")
    if not said:
        log.warning("%s: its name tells no split; taken as train (--split NAME for another)", segments)
    return said[0] if said else "train"


def refuse_split_folders(root: Location, classes: Sequence[str], inner: Sequence[str]) -> None:
    """Looks for class folders that are splits or folds: as classes they would be nonsense.

    Args:
        root: The directory.
        classes: Folders in it.
        inner: Folders in those.

    Raises:
        UserError: there are some. `train` alone, beside other classes, is the vehicle.
    """
    for names, where in ((classes, ""), (inner, " in the class folders")):
        splits = [name for name in names if name.lower() in SPLIT_NAMES]
        folds = [name for name in names if FOLD_NAME.fullmatch(name)]
        only = len(names) == 1 and not where
        if len(splits) > 1 or (splits and (only or (not where and splits[0].lower() != "train"))):
            remedy = "write a table with the columns path,labels,split (--dataset csv)"
            if not where:
                remedy = f"give --audio-root {join(root, splits[0])} --split {splits[0].lower()}, and each in turn " \
                         f"with the same --out; or {remedy}"  # fmt: skip
            raise UserError(f"--audio-root {root}: folders{where} are named {', '.join(splits[:4])}, which are splits "
                            f"and no classes; {remedy}")  # fmt: skip
        if len(folds) > 1 or (folds and only):
            raise UserError(f"--audio-root {root}: folders{where} are named {', '.join(folds[:4])}, which are folds "
                            "and no classes; write a table with the columns path,labels,fold")  # fmt: skip


def _walk_store(root: Location) -> Iterator[str]:
    system, path = file_system(root)
    try:
        found: list[str] = attempt(lambda: system.find(path), str(root))
    except OSError as error:
        raise UserError(f"--audio-root {root}: {error}; give the directory that holds the audio") from error
    hidden: list[str] = []
    plans: list[str] = []
    below = sorted((name[len(path) :].lstrip("/") for name in found), key=_disk_order)
    there = Counter(folder for folder, _, name in (inside.rpartition("/") for inside in below) if name in PRODUCTS)
    built = {folder for folder, count in there.items() if folder and count == len(PRODUCTS)}
    built |= {begun[1] for begun in map(BEGUN.fullmatch, below) if begun}
    for inside in below:
        if any(inside.startswith(f"{folder}/") for folder in built):
            continue
        if "/." in f"/{inside}":
            hidden += [join(root, inside)] if kind(split_name(inside)[1]) == 0 else []
        elif inside.rpartition("/")[2] == PLAN:
            plans.append(join(root, inside))
        elif inside and not inside.endswith("/"):  # some stores hold an empty object for a directory
            yield join(root, inside)
    _say(root, "hidden audio files are left out", hidden)
    _say(root, BUILT_SAID, [join(root, folder) for folder in sorted(built)])
    _say(root, PLANS_SAID, plans)
    _say(root, UNFINISHED_SAID, [join(root, name[len(path) :].lstrip("/")) for name in found
                                 if name.endswith(UNFINISHED)])  # fmt: skip


def _disk_order(name: str) -> str:
    """Sorts paths as `walk` finds them on a disk, where a folder's files come before its folders.

    NUL, which no name has, ends each part.
    """
    folder, _, file = f"/{name}".rpartition("/")
    return folder.replace("/", "\0\1") + "\0\0" + file


def _say(root: Location, what: str, paths: list[str]) -> None:
    if paths:
        log.warning("%s: %d %s, such as %s", root, len(paths), what, paths[0])


def _parents(path: str) -> Iterator[str]:
    while (parent := os.path.dirname(path)) != path:
        yield parent
        path = parent


def _identity(folder: str) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _size(path: str) -> int:
    """Bytes of a file; 0: it is not there, or no file."""
    try:
        if is_remote(path):
            system, name = file_system(path)
            return int(attempt(lambda: transfer(system, "info", 0, name), path)["size"] or 0)
        status = os.stat(path)
    except FileNotFoundError:
        return 0
    except OSError as error:
        if is_remote(path):
            raise UserError(f"{path}: {error}; try again") from error
        return 0
    return status.st_size if stat.S_ISREG(status.st_mode) else 0


def _plain(time: str) -> str:
    whole, _, part = time.partition(".")
    part = part.rstrip("0")
    return (whole.lstrip("0") or "0") + (f".{part}" if part else "")
