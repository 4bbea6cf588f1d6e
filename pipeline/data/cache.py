"""Shards -> open files: in place from a directory; behind a URL, through a cache that the node's ranks share.

In: numbers of shards. Out: file descriptors. `pipeline.data.ahead` fetches before they are asked for.

One download per node and shard: whoever holds the shard's lock fetches it, whole, to a temporary name;
size and sha256 are compared with the manifest before it gets its own. Readers hold a shared lock on
what they have open, so eviction (least recently opened first) passes over it, and the kernel frees
the locks of a killed process. The cache deletes only what it wrote: names with the suffixes below in a
folder of its own. Cost per shard, not per clip; no daemon, no database.
"""

import errno
import fcntl
import hashlib
import logging
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from pipeline.errors import UserError

log = logging.getLogger(__name__)

FOLDER = "craft-shards"
WHOLE, PART, DAMAGED, LOCK = ".cached", ".part", ".damaged", ".lock"
ATTEMPTS = 7
BACKOFF = 0.25  # seconds before the second attempt, doubled for each further one: 16 s in all
DISK_SHARE = 0.9  # of the disk that may be full where no limit is set
FULL = (errno.ENOSPC, errno.EDQUOT)


class Shard(NamedTuple):
    """What the manifest says of a tar."""

    name: str
    size: int
    sha256: str


class Remote(NamedTuple):
    """Shards behind a URL.

    Attributes:
        url: Of the directory, for fsspec.
        shards: By number.
        cache: Node-local directory.
        limit: Bytes in the cache; 0: until the disk is nine tenths full.
        since: Time of the run's start: a damaged copy from before it is fetched anew.
    """

    url: str
    shards: tuple[Shard, ...]
    cache: str
    limit: int
    since: float


class Source(Protocol):
    """Opens shards by number; the caller closes."""

    def open(self, number: int) -> int:
        """A descriptor to read from.

        Raises:
            OSError: the shard is not there.
            UserError: it cannot be had for now: no wrong bytes and no silent gap, so the run must stop.
        """


class Directory:
    """Shards of a local directory, opened in place."""

    def __init__(self, directory: str, names: tuple[str, ...]) -> None:
        self._paths = [os.path.join(directory, name) for name in names]

    def open(self, number: int) -> int:
        """See `Source`."""
        return os.open(self._paths[number], os.O_RDONLY)


class NoRoomError(Exception):
    """The cache is full of shards in use; fetching ahead can wait."""


class Cache:
    """Shards behind a URL, copied to the node on first use. Safe among threads and processes."""

    def __init__(self, remote: Remote) -> None:
        self._remote = remote
        self._folder = Path(remote.cache).expanduser() / FOLDER
        self._missing: set[int] = set()
        self._warned = False
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with _locked(self._folder / f"evict{LOCK}"):
                pass
        except OSError as error:
            raise UserError(
                f"data.cache = {remote.cache}: {error.strerror}; name a directory on a disk of this node", local=True
            ) from error

    @cached_property
    def _store(self) -> tuple[Any, str]:
        """The file system and the path in it. Imported late: a reader that finds its shards needs no network."""
        import fsspec

        options: dict[str, Any] = {}
        if self._remote.url.startswith("http"):
            import aiohttp  # only http has a limit on the whole transfer, which a large shard exceeds

            options["client_kwargs"] = {"timeout": aiohttp.ClientTimeout(None, sock_connect=30, sock_read=60)}
        files, root = fsspec.core.url_to_fs(self._remote.url, **options)
        return files, str(root).rstrip("/")

    def open(self, number: int, ahead: bool = False) -> int:
        """See `Source`. The descriptor holds the shared lock that keeps the shard in the cache.

        Args:
            number: Of the shard.
            ahead: Not needed yet: raises NoRoomError rather than exceed the limit.
        """
        shard = self._remote.shards[number]
        path = self._folder / f"{shard.sha256[:24]}-{shard.name.replace('/', '_')}{WHOLE}"
        if number in self._missing:
            raise FileNotFoundError(errno.ENOENT, f"not in {self._remote.url}", shard.name)
        while True:
            descriptor = self._opened(path)
            if descriptor is not None:
                return descriptor
            with _locked(path.with_suffix(LOCK)):
                if not path.exists() and not self._is_damaged(path):
                    self._download(number, path, ahead)

    def _is_damaged(self, path: Path) -> bool:
        try:
            return path.with_suffix(DAMAGED).stat().st_mtime >= self._remote.since
        except FileNotFoundError:
            return False

    def _opened(self, path: Path) -> int | None:
        if not path.exists() and self._is_damaged(path):
            path = path.with_suffix(DAMAGED)
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return None
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        if os.fstat(descriptor).st_nlink == 0:  # evicted between the two calls
            os.close(descriptor)
            return None
        if path.suffix == WHOLE:
            with suppress(PermissionError):  # another user's copy
                os.utime(descriptor)
        return descriptor

    def _download(self, number: int, path: Path, ahead: bool) -> None:
        """Fetches a shard to `path`, or to its damaged twin where the source itself is damaged."""
        shard = self._remote.shards[number]
        part = path.with_name(f"{path.name}.{shard.size}{PART}")
        where = f"{self._remote.url}/{shard.name}"
        seen: list[str] = []
        emptied = False
        files, root = self._store
        part.unlink(missing_ok=True)  # of a process that was killed
        for attempt in range(ATTEMPTS):
            if attempt:
                time.sleep(BACKOFF * 2 ** (attempt - 1))
            self._make_room(shard.size, part, ahead)
            try:
                files.get_file(f"{root}/{shard.name}", str(part))
                digest = _sha256(part)
            except FileNotFoundError:
                self._missing.add(number)
                part.unlink(missing_ok=True)
                raise
            except PermissionError as error:
                part.unlink(missing_ok=True)
                raise UserError(f"{where}: {error}; check the credentials", local=True) from error
            except Exception as error:
                part.unlink(missing_ok=True)
                if isinstance(error, OSError) and error.errno in FULL:
                    if emptied:
                        raise UserError(
                            f"{self._folder}: disk full while fetching {shard.name} ({shard.size >> 20} MiB); free "
                            "some, or point data.cache at a larger disk",
                            local=True,
                        ) from error
                    self._evict(None)
                    emptied = True
                    continue
                log.warning("%s: attempt %d of %d: %s", where, attempt + 1, ATTEMPTS, error or type(error).__name__)
                if attempt + 1 == ATTEMPTS:
                    raise UserError(
                        f"{where}: not fetched in {ATTEMPTS} attempts: {error or type(error).__name__}; the run goes "
                        "on from its checkpoint when the same command is given again",
                        local=True,
                    ) from error
                continue
            if (part.stat().st_size, digest) == (shard.size, shard.sha256):
                part.rename(path)
                return
            log.warning("%s: attempt %d of %d: its sha256 differs from the manifest", where, attempt + 1, ATTEMPTS)
            seen.append(digest)
            if seen.count(digest) == 3 or attempt + 1 == ATTEMPTS:
                # The source is damaged: the hash of each clip says which ones are still good.
                part.rename(path.with_suffix(DAMAGED))
                return

    def _make_room(self, size: int, part: Path, ahead: bool) -> None:
        """Evicts until `size` more bytes fit, and reserves them by the name of `part`."""
        with _locked(self._folder / f"evict{LOCK}"):
            over = self._evict(size)
            if over > 0 and ahead:
                raise NoRoomError
            part.touch()
        if over > 0 and not self._warned:
            self._warned = True
            log.warning(
                "%s: the shards in use need more than its limit, by %d MiB; raise data.cache_gb or lower data.streams",
                self._folder, over >> 20,
            )  # fmt: skip

    def _evict(self, size: int | None) -> int:
        """Deletes unused copies, oldest first, until `size` bytes fit (None: all); returns the bytes still lacking."""
        used = written = 0
        copies: list[tuple[float, Path, int]] = []
        for path in self._folder.iterdir():
            with suppress(FileNotFoundError):  # another process renamed or evicted it
                stat = path.stat()
                if path.suffix == PART:
                    if _is_free(Path(path.name.rsplit(WHOLE, 1)[0] + LOCK), self._folder):
                        path.unlink()  # of a process that was killed
                        continue
                    used += int(path.name.split(".")[-2])
                    written += stat.st_size
                elif path.suffix in (WHOLE, DAMAGED):
                    copies.append((stat.st_mtime, path, stat.st_size))
                    used += stat.st_size
                    written += stat.st_size
        over = sys.maxsize if size is None else self._lacking(size, used, used - written)
        for _, path, freed in sorted(copies):
            if over <= 0:
                break
            if _remove(path):
                over -= freed
        return over

    def _lacking(self, size: int, used: int, reserved: int) -> int:
        if self._remote.limit:
            return used + size - self._remote.limit
        disk = shutil.disk_usage(self._folder)
        return int(size + reserved - (disk.free - (1 - DISK_SHARE) * disk.total))


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _is_free(name: Path, folder: Path) -> bool:
    """No living process holds the lock."""
    descriptor = os.open(folder / name, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True


def _remove(path: Path) -> bool:
    """Deletes a copy unless somebody has it open."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def open_source(source: Remote | Directory) -> Source:
    """The opener of a description that was sent to another process."""
    return Cache(source) if isinstance(source, Remote) else source
