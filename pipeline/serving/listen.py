"""Audio files of any number and length -> what the model hears in them, and when.

In: paths. Out: a `Heard` for each, in order: scores [n, C] and embeddings of n windows, or why it could not be read.
From it labels of the whole recording, or `Event`s.

Windows are a clip long and `hop` seconds apart; the last one ends with the recording (one shorter than a clip
is a single window, zero-padded). A process decodes ahead while the model scores batches, which may span files: a file
may hang or crash it, which costs that recording alone. Memory is bounded whatever the length: recordings are decoded in
pieces, and what is kept of a window is its scores.

Where windows overlap, each stretch between two neighbouring window edges has the mean of the windows that cover it; an
event is a run of stretches whose score reaches the threshold. So its edges are `hop` exact, not a clip.
"""

import os
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import numpy as np

from pipeline.data.manifest import Label
from pipeline.data.spec import DataSpec
from pipeline.data.storage import is_remote, local
from pipeline.errors import UserError
from pipeline.serving.scorer import BATCH, step_of, windows
from shard_tools.decode import DecodeError, MachineError
from shard_tools.guard import TIME_LIMIT, DecoderProcess
from shard_tools.segment import AUDIO_ENDINGS

PIECE_SECONDS = 300.0  # decoded at a time
PIECE_LIMIT = TIME_LIMIT  # seconds that this may take
AHEAD = 4  # pieces that wait decoded, at most
ItemT = TypeVar("ItemT")


class Hears(Protocol):
    """What listens: a `Scorer`, or an `Embedder`, which gives no scores."""

    spec: DataSpec

    def hear(self, waveforms: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Scores [n, C] and embeddings [n, ...] of clips."""
        ...


@dataclass(frozen=True, slots=True)
class Heard:
    """What was heard in one recording.

    Attributes:
        path: As it was named.
        error: Why it could not be read, or what is damaged in it: those places are silence; empty: nothing.
        seconds: Of audio.
        starts: float64 [n], first second of each window.
        scores: float32 [n, C], probabilities.
        embeddings: float32 [n, ...], of a `Scorer` [n, streams x D].
    """

    path: str
    error: str
    seconds: float
    starts: np.ndarray
    scores: np.ndarray
    embeddings: np.ndarray

    def ends(self, window: float) -> np.ndarray:
        """float64 [n], last second of each window."""
        return np.minimum(self.starts + window, self.seconds)


@dataclass(slots=True)
class _Recording:
    """One that is not all scored; the fields are those of `Heard`."""

    path: str
    error: str = ""
    seconds: float = 0.0
    whole: bool = False  # all its windows are known
    starts: list[float] = field(default_factory=list)
    scores: list[np.ndarray] = field(default_factory=list)
    embeddings: list[np.ndarray] = field(default_factory=list)


def find_audio(names: Iterable[str]) -> tuple[list[str], list[str], list[str]]:
    """Files as they are named, folders as the audio files below them, in alphabetical order; each once.

    Links to folders are followed. Below a folder, hidden files and folders, and files without an ending of audio are
    skipped; a file that is named itself is heard whatever its name is.

    Args:
        names: Files, folders, "-".

    Returns:
        Paths; "PATH: why" of names and folders that cannot be read; what was skipped, for people.

    Raises:
        UserError: a URL, an empty name, or a folder that holds no audio.
    """
    found: dict[str, str] = {}  # by absolute path: "a.wav" and "./a.wav" are one
    unread: list[str] = []
    skipped: list[str] = []
    for name in names:
        if is_remote(name) and not os.path.exists(name):
            raise UserError(f"{name}: a URL, and only files are heard; download it, or pipe it in: curl -L URL | ... -")
        path = str(local(name)) if name else ""
        if not path:
            raise UserError("AUDIO = '' names no file; leave it out")
        if os.path.isdir(path):
            below, closed, notes = _below(path)
            if not below and not closed:
                raise UserError("; ".join([f"{name}: no audio file in this folder", *notes]))
            for file in below:
                found.setdefault(os.path.abspath(file), file)
            unread += closed
            skipped += notes
        elif path != "-" and _is_missing(path):
            unread.append(f"{path}: no such file")
        else:
            found.setdefault("-" if path == "-" else os.path.abspath(path), path)
    return list(found.values()), unread, skipped


def _below(folder: str) -> tuple[list[str], list[str], list[str]]:
    """As `find_audio`, of one folder."""
    found: list[str] = []
    other: list[str] = []
    hidden: list[str] = []
    errors: list[OSError] = []
    seen: set[tuple[int, int]] = set()  # folders: links may lead in circles
    for above, folders, files in os.walk(folder, onerror=errors.append, followlinks=True):
        try:
            status = os.stat(above)
        except OSError as error:
            errors.append(error)
            continue
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        hidden += [os.path.join(above, name) for name in folders + files if name.startswith(".")]
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in files:
            if not name.startswith("."):
                is_audio = os.path.splitext(name)[1].lower() in AUDIO_ENDINGS
                (found if is_audio else other).append(os.path.join(above, name))
    notes = []
    for what, left in (("without an ending of audio", other), ("that are hidden", hidden)):
        if left:
            notes.append(f"skipped {len(left)} {what}, such as {min(left)}; name a file to hear it")
    unread = [f"{error.filename}: {error.strerror}" for error in errors]
    return sorted(found, key=lambda path: path.split(os.sep)), unread, notes


def _is_missing(path: str) -> bool:
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        return False  # decoding says why
    return False


def new_decoder(spec: DataSpec) -> DecoderProcess:
    """A process that decodes recordings for `listen`, a piece at a time; it starts at the first one."""
    return DecoderProcess(spec.sample_rate, PIECE_SECONDS, PIECE_LIMIT)


def listen(
    scorer: Hears, files: Iterable[tuple[str, str]], hop: float, decoder: DecoderProcess | None = None
) -> Iterator[Heard]:
    """Hears recordings one after the other.

    Args:
        scorer: The model.
        files: (name for people, path) of each.
        hop: Seconds between windows.
        decoder: Of `new_decoder`, which stays open; None: one of its own.
    """
    recordings: deque[_Recording] = deque()
    queue: deque[tuple[np.ndarray, _Recording]] = deque()

    def score(least: int) -> Iterator[Heard]:
        while len(queue) >= least and queue:
            taken = [queue.popleft() for _ in range(min(BATCH, len(queue)))]
            scored = zip(taken, *scorer.hear([window for window, _ in taken]), strict=True)
            for (_, recording), scores, embedding in scored:
                recording.scores.append(scores)
                recording.embeddings.append(embedding)
        while recordings and recordings[0].whole and len(recordings[0].scores) == len(recordings[0].starts):
            one = recordings.popleft()
            arrays = np.array(one.starts), np.array(one.scores, np.float32), np.array(one.embeddings, np.float32)
            yield Heard(one.path, one.error, one.seconds, *arrays)

    rate = scorer.spec.sample_rate
    with (nullcontext(decoder) if decoder else new_decoder(scorer.spec)) as process, closing(_ahead(
        (name, *piece) for name, path in files for piece in _decoded(process, path, scorer, hop)
    )) as pieces:  # fmt: skip
        for name, windows, end, error in pieces:
            if not recordings or recordings[-1].whole:
                recordings.append(_Recording(name))
            recording = recordings[-1]
            recording.starts += [start / rate for start, _ in windows]
            recording.seconds, recording.whole, recording.error = end / rate, error is not None, error or ""
            queue.extend((samples, recording) for _, samples in windows)
            yield from score(BATCH)
        yield from score(1)


def _decoded(
    decoder: DecoderProcess, path: str, scorer: Hears, hop: float
) -> Iterator[tuple[list[tuple[int, np.ndarray]], int, str | None]]:
    """Of each piece of a recording its windows and its end, as `windows` has them; of the last one what was damaged."""
    problems: list[str] = []

    def pieces() -> Iterator[np.ndarray]:
        # What /dev/stdin is in this process is something else in the decoder's.
        place = os.path.realpath(path) if path.startswith(("/dev/", "/proc/")) else path
        try:
            yield from decoder.pieces(place, problems)
        except (DecodeError, MachineError) as reason:
            problems[:] = [str(reason)]

    for found, end, last in windows(pieces(), scorer.spec.samples, step_of(scorer.spec, hop)):
        if last and not end and not problems:
            problems.append(f"empty: too few samples for one at {scorer.spec.sample_rate} Hz")
        yield found, end, "; ".join(problems) if last else None


def _ahead(items: Iterator[ItemT]) -> Generator[ItemT]:
    """The same items, made by a thread of its own a few steps ahead."""
    end = object()
    with ThreadPoolExecutor(1, thread_name_prefix="decode") as pool:
        coming = deque(pool.submit(next, items, end) for _ in range(AHEAD))
        while (item := coming.popleft().result()) is not end:
            coming.append(pool.submit(next, items, end))
            yield item  # type: ignore[misc]


@dataclass(frozen=True, slots=True)
class Event:
    """A sound from `start` to `end` seconds; `score` is the highest of its stretches."""

    start: float
    end: float
    label: Label
    score: float


def whole(heard: Heard, labels: Sequence[Label], top: int) -> list[tuple[Label, float]]:
    """The best labels of a recording: mean probability over its windows, the highest first."""
    mean = heard.scores.mean(axis=0)
    best = np.argsort(-mean, kind="stable")[:top]
    return [(labels[i], float(mean[i])) for i in best]


def stretches(heard: Heard, window: float) -> tuple[np.ndarray, np.ndarray]:
    """Edges [m + 1] in seconds, and probabilities [m, C] between them: the mean of the windows over each."""
    ends = heard.ends(window)
    edges = np.unique(np.concatenate([heard.starts, ends]).round(6))
    # Both starts and ends ascend, so the windows over a stretch are neighbours.
    first = np.searchsorted(ends, edges[:-1] + 1e-6, side="right")
    last = np.searchsorted(heard.starts, edges[1:] - 1e-6, side="left")
    scores = np.zeros((len(first), heard.scores.shape[1]), np.float32)
    for stretch, (i, j) in enumerate(zip(first.tolist(), last.tolist(), strict=True)):
        if i < j:  # a gap between windows (a hop longer than a clip) is covered by none: nothing was heard there
            scores[stretch] = heard.scores[i:j].mean(axis=0)
    return edges, scores


def events(heard: Heard, labels: Sequence[Label], window: float, threshold: float) -> list[Event]:
    """Runs of stretches whose probability is `threshold` or more, by start, then by score."""
    edges, scores = stretches(heard, window)
    found = []
    for c in np.flatnonzero((scores >= threshold).any(axis=0)).tolist():
        on = np.concatenate([[False], scores[:, c] >= threshold, [False]])
        first, last = (np.flatnonzero(on[1:] & ~on[:-1]), np.flatnonzero(~on[1:] & on[:-1]))
        for i, j in zip(first, last, strict=True):
            found.append(Event(float(edges[i]), float(edges[j]), labels[c], float(scores[i:j, c].max())))
    return sorted(found, key=lambda event: (event.start, -event.score))


def clock(seconds: float) -> str:
    """h:mm:ss.s, without the hours where there are none."""
    tenths = round(seconds * 10)
    minutes, rest = divmod(tenths, 600)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest / 10:04.1f}" if hours else f"{minutes}:{rest / 10:04.1f}"


def bar(score: float, width: int = 30) -> str:
    """A score as a bar."""
    return "#" * round(width * score)


def audacity(found: Sequence[Event]) -> str:
    """A label track: start, end and text, tabs between; File > Import > Labels reads it."""
    rows = ((e.start, e.end, " ".join(e.label.name.split()), e.score) for e in found)  # a tab would end the name
    return "".join(f"{start:.6f}\t{end:.6f}\t{name} {score:.2f}\n" for start, end, name, score in rows)
