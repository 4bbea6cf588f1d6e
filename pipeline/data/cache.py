"""Shards behind a URL -> open files, through a cache that the node's ranks share.

In: numbers of shards. Out: file descriptors. `pipeline.data.ahead` fetches before they are asked for.

One download per node and shard: whoever holds the shard's lock fetches it, whole, to a temporary name;
size and sha256 are compared with the manifest before it gets its own. They are compared again when a job first opens
a copy: a node that lost its power may have kept the name and not the bytes. That is noted in the lock file, so it costs
each job of a node one reading of each shard. A damaged copy is fetched anew, and so is one that the disk cannot read
any more while it is in use.

Readers hold a shared lock on what they have open, so eviction (least recently opened first) passes over it, and the
kernel frees the locks of a killed process. The cache deletes only what it wrote: names with the suffixes below in a
folder of its own. What somebody else deletes there is fetched anew. No clip is bad for what is wrong with the cache
(disk, permissions, locks): that ends the run. A cache that cannot be written, but has the shards, is read as it is;
there is no note, so each process compares. Cost per shard, not per clip; no daemon, no database.
"""

import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import stat
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.data.manifest import ShardRecord
from pipeline.data.storage import LongerError, fetch, file_system
from pipeline.errors import UserError
from pipeline.files import TOO_MANY_OPEN, sync, unlock

log = logging.getLogger(__name__)

FOLDER = "craft-shards"
WHOLE, PART, DAMAGED, LOCK = ".cached", ".part", ".damaged", ".lock"
ATTEMPTS = 7
BACKOFF = 0.25  # seconds before the second attempt, doubled for each further one: 16 s in all
DISK_SHARE = 0.9  # of the disk that may be full where no limit is set
FULL = (errno.ENOSPC, errno.EDQUOT)
READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)
JOBS_NOTED = 16
FETCHED = re.compile(rf".+{re.escape(WHOLE)}\.(\d{{1,15}}){re.escape(PART)}")  # its final size is in the name


class Remote(NamedTuple):
    """Shards behind a URL.

    Attributes:
        urls: Of the directory of each shard, for fsspec.
        shards: By number.
        cache: Node-local directory.
        limit: Bytes in the cache; 0: until the disk is nine tenths full.
        job: What this run's processes on the node have in common: `this_job`.
    """

    urls: Sequence[str]
    shards: Sequence[ShardRecord]
    cache: str
    limit: int
    job: str


class NoRoomError(Exception):
    """The cache is full of shards in use; fetching ahead can wait."""


class Cache:
    """Shards behind a URL, copied to the node on first use. Safe among threads and processes."""

    def __init__(self, remote: Remote) -> None:
        self._remote = remote
        self._stores: dict[str, tuple[Any, str]] = {}
        self._folder = Path(remote.cache).expanduser() / FOLDER
        self._warned = self._read_only = False
        self._compared: set[int] = set()  # by this process, of a cache that cannot be written
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with _locked(self._folder / f"evict{LOCK}"):
                pass
        except OSError as error:
            self._read_only = error.errno in READ_ONLY and self._folder.is_dir()
            if self._read_only:
                return
            raise UserError(
                f"data.cache = {remote.cache}: {error.strerror}; name a directory on a disk of this node", local=True
            ) from error

    def _store(self, number: int) -> tuple[Any, str]:
        """The file system of a shard, and its directory there."""
        url = self._remote.urls[number]
        if url not in self._stores:
            files, root = file_system(url)
            self._stores[url] = files, root.rstrip("/")
        return self._stores[url]

    def open(self, number: int, ahead: bool = False, doubted: bool = False) -> int:
        """A descriptor to read a shard from; it holds the shared lock that keeps the shard in the cache.

        Args:
            number: Of the shard.
            ahead: Not needed yet: raises NoRoomError rather than exceed the limit.
            doubted: The copy could not be read: it is compared, though this job has done so.

        Raises:
            OSError: the store does not have the shard; or no more files can be opened (`TOO_MANY_OPEN`).
            UserError: it cannot be had for now: no wrong bytes and no silent gap, so the run must stop.
        """
        shard = self._remote.shards[number]
        path = self._folder / f"{shard.sha256[:24]}-{shard.name}{WHOLE}"
        there = True
        try:
            if self._read_only:
                return self._open_as_it_is(number, path, doubted)
            while there:
                descriptor = None if doubted else self._open_noted(shard, path)
                if descriptor is not None:
                    return descriptor
                self._folder.mkdir(parents=True, exist_ok=True)
                with _locked(path.with_suffix(LOCK)) as lock:
                    there = self._provide(number, path, lock, ahead, doubted)
                doubted = False
        except OSError as error:
            if error.errno in TOO_MANY_OPEN:
                raise
            raise UserError(
                f"data.cache = {self._remote.cache}: {error.strerror or error}, with the copy of {shard.name}; mend "
                "that, or name a directory on another disk of this node",
                local=True,
                transient=True,
            ) from error
        raise FileNotFoundError(f"{self._remote.urls[number].rstrip('/')}/{shard.name} is not there")

    def _open_noted(self, shard: ShardRecord, path: Path) -> int | None:
        """The copy, or its damaged twin where the source is damaged; None: there is none, or nobody compared it yet."""
        try:
            with open(path.with_suffix(LOCK), "rb", opener=_no_link) as file:
                note = _Note.of(file.read(1 << 16))
        except FileNotFoundError:
            return None
        damaged = self._remote.job in note.damaged and not path.exists()
        descriptor = _open_copy(path.with_suffix(DAMAGED) if damaged else path)
        if descriptor is None:
            return None
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        about = os.fstat(descriptor)
        evicted = about.st_nlink == 0  # between the two calls
        if evicted or not (damaged or note.holds(about, shard, self._remote.job)):
            os.close(descriptor)
            return None
        if not damaged:
            with suppress(PermissionError):  # another user's copy
                os.utime(descriptor)
        return descriptor

    def _open_as_it_is(self, number: int, path: Path, doubted: bool) -> int:
        """A copy of a cache that cannot be written."""
        shard = self._remote.shards[number]
        descriptor = _open_copy(path)
        if descriptor is None:
            raise UserError(
                f"{self._folder}: cannot be written, and lacks {shard.name}; point data.cache at another directory, or "
                "fill this one",
                local=True,
            )
        if doubted or number not in self._compared:
            if not _is_whole(descriptor, shard):
                os.close(descriptor)
                raise UserError(
                    f"{path}: damaged, and cannot be fetched anew where nothing can be written; point data.cache at "
                    "another directory",
                    local=True,
                )
            self._compared.add(number)
        return descriptor

    def _provide(self, number: int, path: Path, lock: int, ahead: bool, doubted: bool) -> bool:
        """Compares the copy, or fetches one; under its lock. Returns whether there is one."""
        shard, job = self._remote.shards[number], self._remote.job
        note = _Note.of(os.pread(lock, 1 << 16, 0))
        descriptor = _open_copy(path)
        if descriptor is not None:
            about = os.fstat(descriptor)
            known = not doubted and note.holds(about, shard, job)  # another process was faster
            whole = known or _is_whole(descriptor, shard)
            os.close(descriptor)
            if known:
                return True
            if whole:
                jobs = note.jobs if note.inode == about.st_ino else []
                _Note(about.st_ino, [*jobs, job], note.damaged).write(lock)
                return True
            log.warning("%s: the copy in the cache is damaged; it is fetched anew", path)
            path.unlink(missing_ok=True)
        if job in note.damaged and path.with_suffix(DAMAGED).exists():
            return True
        inode = self._download(number, path, ahead)
        if inode is None:
            return False
        note = _Note(inode, [job], []) if inode else _Note(0, [], [*note.damaged, job])
        note.write(lock)
        return True

    def _download(self, number: int, path: Path, ahead: bool) -> int | None:
        """Fetches a shard to `path`, or to its damaged twin where the source itself is damaged.

        Returns:
            Its inode; 0: it is damaged; None: the store does not have it.
        """
        shard = self._remote.shards[number]
        part = path.with_name(f"{path.name}.{shard.size}{PART}")
        where = f"{self._remote.urls[number].rstrip('/')}/{shard.name}"
        seen: list[str] = []
        emptied = False
        files, root = self._store(number)
        for attempt in range(ATTEMPTS):
            if attempt:
                time.sleep(BACKOFF * 2 ** (attempt - 1))
            part.unlink(missing_ok=True)  # of a process that was killed, or of the last attempt
            self._make_room(shard.size, part, ahead)
            try:
                try:
                    fetch(files, f"{root}/{shard.name}", str(part), shard.size)
                except LongerError:
                    os.truncate(part, shard.size)
                digest = _sha256(part)
            except PermissionError as error:
                part.unlink(missing_ok=True)
                raise UserError(f"{where}: {error}; check the credentials", local=True) from error
            except Exception as error:
                if isinstance(error, FileNotFoundError) and part.exists():  # else somebody deleted the part
                    part.unlink(missing_ok=True)
                    return None
                part.unlink(missing_ok=True)
                if isinstance(error, OSError) and error.errno in FULL:
                    if emptied:
                        raise UserError(
                            f"{self._folder}: disk full while fetching {shard.name} ({shard.size >> 20} MiB); free "
                            "some, or point data.cache at a larger disk",
                            local=True,
                            transient=True,
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
                        transient=True,
                    ) from error
                continue
            if (part.stat().st_size, digest) == (shard.size, shard.sha256):
                sync(part)
                inode = part.stat().st_ino
                part.rename(path)
                return inode
            log.warning("%s: attempt %d of %d: its sha256 differs from the manifest", where, attempt + 1, ATTEMPTS)
            seen.append(digest)
            if seen.count(digest) == 3 or attempt + 1 == ATTEMPTS:
                # The source is damaged: the hash of each clip says which ones are still good.
                part.rename(path.with_suffix(DAMAGED))
                break
        return 0

    def _make_room(self, size: int, part: Path, ahead: bool) -> None:
        """Evicts until `size` more bytes fit, and reserves them by the name of `part`."""
        with _locked(self._folder / f"evict{LOCK}"):
            over = self._evict(size)
            if over > 0 and ahead:
                raise NoRoomError
            os.close(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
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
                about = path.lstat()
                if not stat.S_ISREG(about.st_mode):
                    continue
                if fetched := FETCHED.fullmatch(path.name):
                    if _is_free(Path(path.name.rsplit(WHOLE, 1)[0] + LOCK), self._folder):
                        path.unlink()  # of a process that was killed
                        continue
                    used += int(fetched[1])
                    written += about.st_size
                elif path.suffix in (WHOLE, DAMAGED):
                    copies.append((about.st_mtime, path, about.st_size))
                    used += about.st_size
                    written += about.st_size
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


class _Note(NamedTuple):
    """What is known of a copy; kept in its lock file.

    Attributes:
        inode: Of the copy that was compared.
        jobs: That compared it, or fetched it, newest last.
        damaged: Jobs that found the source itself damaged.
    """

    inode: int
    jobs: list[str]
    damaged: list[str]

    @staticmethod
    def of(text: bytes) -> "_Note":
        """Of a lock file's content; one that was written by halves says nothing."""
        try:
            inode, jobs, damaged = json.loads(text)
            return _Note(int(inode), list(map(str, jobs)), list(map(str, damaged)))
        except (ValueError, TypeError, RecursionError):
            return _Note(0, [], [])

    def holds(self, about: os.stat_result, shard: ShardRecord, job: str) -> bool:
        """Whether this copy was compared in this job."""
        return about.st_ino == self.inode and about.st_size == shard.size and job in self.jobs

    def write(self, lock: int) -> None:
        """Into the lock file, which must be held."""
        text = json.dumps([self.inode, self.jobs[-JOBS_NOTED:], self.damaged[-JOBS_NOTED:]])
        os.ftruncate(lock, 0)
        os.pwrite(lock, text.encode(), 0)


def this_job() -> str:
    """A name that the processes of one job on this node share: of their launcher, or of the only one.

    Not a time: clocks step back. Where there is no /proc each process is a job.
    """
    launched = "LOCAL_RANK" in os.environ or "SLURM_PROCID" in os.environ
    process = os.getppid() if launched else os.getpid()
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        about = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
        begun = about.rsplit(")", 1)[1].split()[19]  # in ticks since the boot; the name before may hold anything
    except OSError:
        return uuid.uuid4().hex
    return hashlib.sha256(f"{boot}/{process}/{begun}".encode()).hexdigest()[:16]


def _no_link(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)


def _open_copy(path: Path) -> int | None:
    """A descriptor of a copy; None: it is not there.

    Raises:
        UserError: something else has its name.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENXIO):  # a link, a socket
            raise
        raise UserError(f"{path}: {error.strerror}: no file of the cache; remove it", local=True) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UserError(f"{path}: no regular file, so none of the cache; remove it", local=True)
    return descriptor


def _is_whole(descriptor: int, shard: ShardRecord) -> bool:
    """Whether size and sha256 are the manifest's."""
    if os.fstat(descriptor).st_size != shard.size:
        return False
    digest, offset = hashlib.sha256(), 0
    try:
        while block := os.pread(descriptor, 1 << 20, offset):
            digest.update(block)
            offset += len(block)
    except OSError:  # the disk cannot read it any more
        return False
    return digest.hexdigest() == shard.sha256


@contextmanager
def _locked(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        unlock(descriptor)
        os.close(descriptor)


def _is_free(name: Path, folder: Path) -> bool:
    """No living process holds the lock."""
    descriptor = os.open(folder / name, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        unlock(descriptor)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True


def _remove(path: Path) -> bool:
    """Deletes a copy unless somebody has it open, or it may not be deleted by this user."""
    try:
        # NFS gives an exclusive lock only on what is open for writing.
        descriptor = os.open(path, os.O_RDWR if os.access(path, os.W_OK) else os.O_RDONLY)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)
    except (BlockingIOError, PermissionError):
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
