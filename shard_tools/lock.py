"""Who may write where: one build at a time in a local directory, or slices that share no shard.

In: a directory. Out: locks that end with the process, however it ends.

In an object store nothing is locked: files appear whole there, and two builds write the same bytes; of two of
different options, one finds the other's plan, and no record of one is taken for the other's (build.py).
"""

import errno
import fcntl
import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pipeline.data import storage
from pipeline.data.storage import Location, is_remote, join
from pipeline.errors import UserError
from shard_tools.plan import Slice

log = logging.getLogger(__name__)

LOCKS = (".lock", ".slices")  # no name of a split begins with a dot


@contextmanager
def owner(out: Location, shared: bool) -> Iterator[None]:
    """One build, or any number of slices (`shared`), at a time in a local directory.

    Raises:
        UserError: another is at work, or `.build` is a link to elsewhere.
        OSError: the directory cannot be written.
    """
    if is_remote(out):
        yield
        return
    folder = storage.local(join(out, ".build"))
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise UserError(f"{folder}: is no directory of a build; move it away")
    lock = _locked(out, folder, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
    try:
        yield
    finally:
        _tidy(folder, lock)
        os.close(lock)


def _locked(out: Location, folder: Path, how: int) -> int:
    """A descriptor of the lock file that is in the directory now: who ended may have removed the one we waited at."""
    path = folder / LOCKS[0]
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            # For both ways: NFS asks for reading of a shared lock, for writing of an exclusive one.
            lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(lock, how | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(lock)
            raise UserError(f"{out}: another process is building here; wait for it, or stop it") from error
        except OSError as error:
            log.warning("%s: no locks on this file system (%s): whether another build runs here cannot be known; do "
                        "not start two", out, error)  # fmt: skip
            return lock
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock), os.stat(path)):
                return lock
        os.close(lock)


def _tidy(folder: Path, lock: int) -> None:
    """Removes a directory that holds nothing but locks, if they are ours alone."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return  # other slices are at work
    except OSError:
        pass
    try:
        if all(path.name in LOCKS for path in folder.iterdir()):
            for name in LOCKS:
                (folder / name).unlink(missing_ok=True)
            folder.rmdir()
    except FileNotFoundError:
        return
    except OSError as error:
        if error.errno != errno.ENOTEMPTY:  # NFS keeps an open file under another name; another began just now
            raise


@contextmanager
def slice_owner(out: Location, part: Slice, numbers: Iterable[int]) -> Iterator[None]:
    """One process at a time for each shard of a slice; called inside `owner`.

    A byte of a file stands for a shard, so two slices that overlap meet even where their N differs.

    Args:
        out: Where the shards go.
        part: For the message.
        numbers: Of its shards, counted through all splits.

    Raises:
        UserError: another process writes one of them.
    """
    if is_remote(out):
        yield
        return
    with storage.local(join(out, f".build/{LOCKS[1]}")).open("ab") as lock:
        for number in numbers:
            try:
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, number)
            except (BlockingIOError, PermissionError) as error:
                raise UserError(
                    f"{out}: --slice {part.number}/{part.count}: another process is writing shards of this slice; wait "
                    "for it, or stop it, and give each machine a slice of its own"
                ) from error
            except OSError as error:
                log.warning("%s: no locks on this file system (%s): do not run one slice twice at once", out, error)
                break
        yield
