"""Paths that a user names, files that appear whole or not at all, locks, hashes, helpers that end with this process.

In: words of a command line or a setting. Out: paths as they were meant; a place that cannot be written is refused
before the work, not after it.
"""

import csv
import ctypes
import errno
import fcntl
import hashlib
import io
import json
import logging
import math
import os
import re
import shutil
import signal
import stat
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from threading import Thread
from typing import IO, TYPE_CHECKING, Any

from pipeline.errors import UserError

if TYPE_CHECKING:
    from multiprocessing.connection import Connection
    from multiprocessing.process import BaseProcess

log = logging.getLogger(__name__)

# Names that become parts of file names: splits, shards. No separator, no leading dot or dash, nothing to escape.
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")
TOO_MANY_OPEN = (errno.EMFILE, errno.ENFILE)  # files of this process, or of all
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # file systems without them
PR_SET_PDEATHSIG = 1
BEGIN_SECONDS = 30.0  # of a fork, which takes milliseconds


def check_name(name: str, what: str) -> str:
    """A name from a command line, a table or a manifest that becomes part of a file's name.

    Args:
        name: The name.
        what: Where it stands, for the message, such as "--split" or "labels.csv:7: split".

    Raises:
        UserError: it could lead out of the directory, or is no plain file name.
    """
    if NAME.fullmatch(name) is None:
        raise UserError(
            f"{what} '{name[:100]}' becomes a file name; use at most 100 of the characters A-Z a-z 0-9 _ . -, "
            "beginning with a letter, a digit or _"
        )
    return name


def user_path(text: str | os.PathLike[str], what: str) -> Path:
    """A local path as a user writes it: `~` and `~name` are home directories.

    Args:
        text: The words.
        what: The option or setting, for the message.

    Raises:
        UserError: it is empty, holds a NUL character, or names the home of nobody.
    """
    words = os.fspath(text)
    if not words or "\0" in words:
        raise UserError(f"{what} = {words!r:.100} names no path; give one")
    try:
        return Path(words).expanduser()
    except RuntimeError as error:
        raise UserError(f"{what} {words}: {error}; write the directory out") from error


def shipped(name: str = "") -> Path:
    """Where a file or folder of configs/ lies: inside `pipeline` of an installed wheel, beside it in a checkout."""
    inside = Path(str(resources.files("pipeline"))) / "configs"
    return (inside if inside.is_dir() else inside.parents[1] / "configs") / name


def config_path(text: str | os.PathLike[str], what: str, folder: str = "", ending: str = ".yaml") -> Path:
    """A configuration as a user names it: a path, or else what configs/ has under that name.

    `configs/pretrain/demo.yaml` and `pretrain/demo` are the same file wherever the project is installed, unless the
    working directory has one of that name, which comes first.

    Args:
        text: The words.
        what: The option, for the message.
        folder: Of configs/, whose files go by their names alone.
        ending: Of names that have none.

    Raises:
        UserError: as `user_path`.
    """
    path = user_path(text, what)
    if os.path.exists(path) or path.is_absolute() or ".." in path.parts:
        return path
    name = Path(*path.parts[path.parts[:1] == ("configs",) :])
    places = [shipped(f"{place}/{name}{'' if name.suffix else ending}") for place in (".", folder or ".")]
    return next((place for place in places if os.path.isfile(place)), path)


def check_output_file(path: Path, what: str) -> Path:
    """Tries a place for a file that will be written later; nothing is left there. Call it before the work.

    Args:
        path: Of the file; its directory need not exist yet.
        what: The option or setting, for the message.

    Raises:
        UserError: it is a directory or a special file, or cannot be written.
    """
    try:
        if path.exists():
            if not path.is_file():
                kind = "a directory" if path.is_dir() else "no regular file"
                raise UserError(f"{what} {path}: is {kind}; name a file")
            with path.open("ab"):
                pass
        _try_directory(path.parent)
    except OSError as error:
        raise UserError(f"{what} {path}: {_reason(error)}; name a place that can be written") from error
    return path


def check_output_directory(path: Path, what: str) -> Path:
    """Tries a place for a directory that will be filled later; nothing is left there. Call it before the work.

    Raises:
        UserError: it is a file, or cannot be made or written.
    """
    try:
        _try_directory(path)
    except OSError as error:
        raise UserError(f"{what} {path}: {_reason(error)}; name a directory that can be written") from error
    return path


def check_replaced_directory(path: Path, what: str, names: frozenset[str], ours: Callable[[Path], bool]) -> Path:
    """Tries a place for a `new_directory`: where nothing is, an empty directory, or one that we made before.

    Args:
        path: Of the directory.
        what: The option or setting, for the message.
        names: All that may be right in a directory that is replaced.
        ours: Tells by its content whether we made a directory.

    Raises:
        UserError: something else is there, or it cannot be written.
    """
    place = path.resolve()
    if os.path.ismount(place):
        raise UserError(f"{what} {path}: is a mount point, which cannot be replaced; name a directory in it")
    check_output_directory(place, what)
    check_output_directory(place.parent, what)  # where it is made, and then renamed
    entries = {entry.name for entry in place.iterdir()} if place.is_dir() else set()
    if entries and not (entries <= names and ours(place)):
        raise UserError(
            f"{what} {path}: holds what this command did not make, such as {min(entries - names or entries)}; move it "
            "away, or name a new or empty directory"
        )
    return path


def open_regular(path: str | os.PathLike[str]) -> int:
    """A descriptor to read a regular file from; a link to one is followed.

    A FIFO that nobody writes to, or a device, would hold a plain `open` up for ever.

    Raises:
        OSError: it is not there, cannot be read, or is no regular file.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
        raise OSError(errno.EINVAL, "a FIFO, device or socket, no regular file", os.fspath(path))
    return descriptor


def write_text(path: Path, text: str) -> None:
    """Writes a small file whole and durably, or not at all; its directory must exist."""
    with new_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A path to write a file to, which gets the name `path` once it is whole and on the disk; else nothing is left."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        sync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """An empty directory to fill, which takes the place of `path` once it is whole and on the disk.

    Else nothing changes: a file server may say that its disk is full only when it is asked. What was at `path` is
    deleted: see `check_replaced_directory`. Its parent must exist.
    """
    path = path.resolve()  # a link to a directory stays a link
    made = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    made.mkdir()
    old = made.with_suffix(".old")
    try:
        yield made
        for inside in (*made.rglob("*"), made):
            if not inside.is_symlink():
                sync(inside)
        if path.exists():
            path.rename(old)
        try:
            made.rename(path)
        except OSError:
            if old.exists():
                old.rename(path)
            raise
    finally:
        shutil.rmtree(made, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
    sync(path.parent)


def write_json(path: Path, content: Any) -> None:
    """Likewise, as JSON, which has no Infinity and no NaN: such numbers become null."""
    write_text(path, json.dumps(_finite(content), indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path, remedy: str) -> Any:
    """Content of a JSON file.

    Raises:
        UserError: it cannot be read, or is not JSON (damaged); with the remedy.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {_reason(error)}; {remedy}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error}); {remedy}") from error


def write_csv(path: Path, rows: Iterable[Iterable[Any]]) -> None:
    """Likewise, as CSV; the first row is the header."""
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    write_text(path, text.getvalue())


def _finite(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def lock(descriptor: int, wait: bool = True) -> bool:
    """Locks an open file until its last descriptor is closed, in this process or in one that inherited it (flock).

    Args:
        descriptor: Of the file.
        wait: Until another process gives it up.

    Returns:
        False: another process has it. Where the file system has no locks, all have it.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
    return True


def unlock(descriptor: int) -> None:
    """Gives up a lock, also for the processes that inherited it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_UN)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process, and one thread of it, at a time; the file is made where it is missing, and stays.

    Unlocked, not only closed: a process that another thread forked inside has the file open as long as it lives.
    """
    with path.open("ab") as file:
        lock(file.fileno())
        try:
            yield
        finally:
            unlock(file.fileno())


def sha256(file: IO[bytes]) -> str:
    """Hash of an open file from where it stands to its end, read in pieces: 64 hex digits."""
    whole = hashlib.sha256()
    while piece := file.read(1 << 22):
        whole.update(piece)
    return whole.hexdigest()
def die_with(parent: int) -> None:
    """The kernel kills this process, a child of `parent`, where that dies: no orphan goes on."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died in between
        os._exit(1)


def obey_alone(parent: int) -> None:
    """Makes this process, a child of `parent`, end with it and by it alone.

    Signals to the process group, or to all processes of a Slurm step, are for the parent, which may still need its
    helpers to finish. Its own SIGTERM ends the child at once.
    """
    die_with(parent)
    if sys.platform != "linux":
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1))

    def end() -> None:
        while signal.sigwaitinfo((signal.SIGTERM,)).si_pid != parent:
            continue
        os._exit(0)

    Thread(target=end, name="end", daemon=True).start()


def has_begun(process: "BaseProcess", connection: "Connection") -> bool:
    """Waits for the first message of a forked child, None; a child that does not send it in time is killed.

    A fork has the locks of its parent as they were at that moment, and no thread that releases those which other
    threads held. CPython 3.11 itself can hang so before the child's first line: a thread of torch's that just came or
    went held the lock of the thread states. Rare, but a run forks at each evaluation.
    """
    try:
        if connection.poll(BEGIN_SECONDS):
            connection.recv()
            return True
    except (EOFError, ConnectionResetError):  # it died: whoever reads on meets the same
        return True
    log.warning("a forked process does not begin in %.0f s and is killed", BEGIN_SECONDS)
    process.kill()
    process.join()
    connection.close()
    return False


def sync(path: Path) -> None:
    """Waits until a file's content, or a directory's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _try_directory(path: Path) -> None:
    """Writes a nameless file into the directory, or into the nearest one above it that exists.

    Raises:
        OSError: it cannot be written, or is no directory.
    """
    folder = path.absolute()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir():
        raise NotADirectoryError(20, f"{folder} is no directory")
    with tempfile.TemporaryFile(dir=folder):
        pass


def _reason(error: OSError) -> str:
    return error.strerror or str(error)
