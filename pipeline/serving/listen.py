"""Audio files of any number and length -> what the model hears in them, window by window.

In: paths. Out: a `Heard` for each, in order: scores [n, C] and embeddings of n windows, or why it could not be read.

Windows are a clip long and `hop` seconds apart; the last one ends with the recording (one shorter than a clip
is a single window, zero-padded). A process decodes ahead while the model scores batches, which may span files: a file
may hang or crash it, which costs that recording alone. Memory is bounded whatever the length: recordings are decoded in
pieces, and what is kept of a window is its scores.
"""

import os
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from pipeline.data.storage import is_remote, local
from pipeline.errors import UserError
from pipeline.serving.scorer import BATCH, Scorer
from shard_tools.decode import DecodeError, MachineError
from shard_tools.guard import TIME_LIMIT, DecoderProcess
from shard_tools.segment import AUDIO_ENDINGS

PIECE_SECONDS = 300.0  # decoded at a time
PIECE_LIMIT = TIME_LIMIT  # seconds that this may take
AHEAD = 4  # pieces that wait decoded, at most
ItemT = TypeVar("ItemT")


@dataclass(frozen=True, slots=True)
class Heard:
    """What was heard in one recording.

    Attributes:
        path: As it was named.
        error: Why it could not be read, or what is damaged in it: those places are silence; empty: nothing.
        seconds: Of audio.
        starts: float64 [n], first second of each window.
        scores: float32 [n, C], probabilities.
        embeddings: float32 [n, streams x D].
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


@dataclass(frozen=True, slots=True)
class _Piece:
    """Windows of a recording that were decoded together; `seconds` are those up to its end."""

    name: str
    starts: list[float]
    windows: list[np.ndarray]
    seconds: float
    first: bool
    last: bool
    error: str = ""


@dataclass(slots=True)
class _Open:
    """A recording that is not all scored."""

    name: str
    error: str = ""
    seconds: float = 0.0
    whole: bool = False
    starts: list[float] = field(default_factory=list)
    scores: list[np.ndarray] = field(default_factory=list)
    embeddings: list[np.ndarray] = field(default_factory=list)

    def take(self, piece: _Piece) -> None:
        self.starts += piece.starts
        self.seconds, self.whole, self.error = piece.seconds, piece.last, piece.error

    @property
    def scored(self) -> bool:
        return self.whole and len(self.scores) == len(self.starts)

    def heard(self) -> Heard:
        starts, scores = np.array(self.starts), np.array(self.scores, np.float32)
        return Heard(self.name, self.error, self.seconds, starts, scores, np.array(self.embeddings, np.float32))


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


def listen(scorer: Scorer, files: Iterable[tuple[str, str]], hop: float) -> Iterator[Heard]:
    """Hears recordings one after the other.

    Args:
        scorer: The model.
        files: (name for people, path) of each.
        hop: Seconds between windows.
    """
    recordings: deque[_Open] = deque()
    queue: deque[tuple[np.ndarray, _Open]] = deque()

    def score(least: int) -> Iterator[Heard]:
        while len(queue) >= least and queue:
            taken = [queue.popleft() for _ in range(min(BATCH, len(queue)))]
            scored = zip(taken, *scorer.hear([window for window, _ in taken]), strict=True)
            for (_, recording), scores, embedding in scored:
                recording.scores.append(scores)
                recording.embeddings.append(embedding)
        while recordings and recordings[0].scored:
            yield recordings.popleft().heard()

    rate, window = scorer.spec.sample_rate, scorer.spec.samples
    with (
        DecoderProcess(rate, PIECE_SECONDS, PIECE_LIMIT) as decoder,
        closing(
            _ahead(piece for name, path in files for piece in _pieces(decoder, name, path, rate, window, hop))
        ) as pieces,
    ):
        for piece in pieces:
            if piece.first:
                recordings.append(_Open(piece.name))
            recordings[-1].take(piece)
            queue.extend((samples, recordings[-1]) for samples in piece.windows)
            yield from score(BATCH)
        yield from score(1)


def _pieces(
    decoder: DecoderProcess, name: str, path: str, rate: int, window: int, hop: float
) -> Iterator[_Piece]:
    """The windows of one recording; the last piece says so, and what was damaged."""
    step = max(1, round(hop * rate))
    problems: list[str] = []
    kept, first, start = np.zeros(0, np.float32), 0, 0  # samples from `first` on; the next window's start
    error, began = "", False
    # What /dev/stdin is in this process is something else in the decoder's.
    fresh = decoder.pieces(os.path.realpath(path) if path.startswith(("/dev/", "/proc/")) else path, problems)
    ended = False
    while not ended:
        try:
            kept = np.concatenate([kept, next(fresh)])
        except StopIteration:
            ended, error = True, "; ".join(problems)
        except (DecodeError, MachineError) as reason:
            ended, error = True, str(reason)
        end = first + len(kept)
        starts = list(range(start, end - window + 1, step))
        start = starts[-1] + step if starts else start
        if ended and end and (start == 0 or end > start - step + window):  # the rest, in a window that ends with it
            starts.append(max(0, end - window))
        windows = [kept[at - first : at - first + window] for at in starts]
        yield _Piece(name, [at / rate for at in starts], windows, end / rate, not began, ended, error)
        began = True
        cut = min(start, end - window) - first if end > window else 0  # the last window may begin that early
        kept, first = kept[cut:].copy(), first + cut


def _ahead(items: Iterator[ItemT]) -> Generator[ItemT]:
    """The same items, made by a thread of its own a few steps ahead."""
    end = object()
    with ThreadPoolExecutor(1, thread_name_prefix="decode") as pool:
        coming = deque(pool.submit(next, items, end) for _ in range(AHEAD))
        while (item := coming.popleft().result()) is not end:
            coming.append(pool.submit(next, items, end))
            yield item  # type: ignore[misc]
