"""Who may write where: one build at a time in a local directory, or slices that share no shard.

In: a directory. Out: locks that end with the process, however it ends.

In an object store nothing is locked: files appear whole there, and two builds write the same bytes.
"""

import fcntl
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from pipeline.data import storage
from pipeline.data.storage import Location, is_remote, join
from pipeline.errors import UserError
from shard_tools.plan import Slice

log = logging.getLogger(__name__)

LOCKS = ("lock", "slices.lock")


@contextmanager
def owner(out: Location, shared: bool) -> Iterator[None]:
    """One build, or any number of slices (`shared`), at a time in a local directory.

    Raises:
        UserError: another is at work.
    """
    if is_remote(out):
        yield
        return
    folder = storage.local(join(out, ".build"))
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCKS[0]).open("w") as lock:
        try:
            fcntl.flock(lock, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{out}: another process is building here; wait for it, or stop it") from error
        except OSError as error:
            log.warning("%s: no locks on this file system (%s): do not run two builds here at once", out, error)
        try:
            yield
        finally:
            if not any(path.name not in LOCKS for path in folder.iterdir()) if folder.is_dir() else False:
                for name in LOCKS:
                    (folder / name).unlink(missing_ok=True)
                folder.rmdir()


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
