"""Where shards are written: a local directory or an object store, with the same promise.

In: bytes, or a file written under a temporary name. Out: a file that appears under its name whole and
durable, or not at all.

Local: temporary name beside the final one, fsync, rename, fsync of the directory. Object stores have no
rename but need none, as an object appears when its upload is complete: the file is written to local
scratch, uploaded (in parts where it is large, each part with the client's own checksum), retried, and
compared with what the store says it holds: size, and content by the store's hash, or read back where its hash is none.

Scratch files have no name (Linux): none is left by a process that is gone, and nobody else can open one.
"""

import hashlib
import logging
import mimetypes
import os
import re
import shutil
import tempfile
import uuid
from collections import deque
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO, Any

import xxhash

from pipeline.data import storage
from pipeline.data.storage import FINAL, Location, attempt, is_remote, join
from pipeline.files import sha256, sync
from shard_tools.names import split_source
from shard_tools.segment import MachineError
from shard_tools.sources import Place, SourceError, extract
from shard_tools.stamps import Stamp, stamp, stamp_of

log = logging.getLogger(__name__)

PART_BYTES = 32 << 20  # of a multipart upload; files of at least two parts are sent in parts
FETCH_THREADS = 4
FETCH_AHEAD = 8  # remote inputs of one worker in local scratch at a time
LOCAL_AHEAD = 2  # members of local containers: more leave the core's cache before they are decoded, 0.2 ms each
TEMPORARY = re.compile(r"(.+)\.(?:craft-)?[0-9a-f]{8}\.tmp")  # of the file it becomes; earlier versions lack the word
BUSY = (408, 425, 429)  # HTTP: try again; every other status from 400 to 499 is an answer about the one file


class Store:
    """Files below one location, written whole or not at all.

    Args:
        location: Directory or fsspec URL.
    """

    def __init__(self, location: Location) -> None:
        self.location = location
        self.remote = is_remote(location)

    def read(self, name: str) -> bytes:
        """A whole file."""
        return storage.read_bytes(join(self.location, name))

    def sizes(self, below: str = "") -> dict[str, int]:
        """Sizes of the files in a directory, by name."""
        return storage.sizes(self.location, below)

    def stamps(self, below: str = "") -> dict[str, Stamp]:
        """Stamps (stamps.py) of the files in a directory, by name."""
        return {name: stamp_of(entry) for name, entry in storage.entries(self.location, below).items()}

    def write(self, name: str, content: bytes) -> None:
        """Writes a small file."""
        with self.temporary(name) as path:
            path.write_bytes(content)
            self.commit(path, name)

    def create(self, name: str, content: bytes) -> None:
        """Writes a small file where there is none: of two processes that do so at once, one does.

        Object stores cannot promise it: there a second one may replace the first.
        """
        if self.remote:
            if name.rpartition("/")[2] not in self.sizes(name.rpartition("/")[0]):
                self.write(name, content)
            return
        final = storage.local(join(self.location, name))
        with self.temporary(name) as path, suppress(FileExistsError):
            path.write_bytes(content)
            sync(path)
            try:
                final.hardlink_to(path)
            except FileExistsError:
                raise
            except OSError:  # no links on this file system; a file that a crash cuts is found by its checksum
                with final.open("xb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
            sync(final.parent)

    @contextmanager
    def temporary(self, name: str) -> Iterator[Path]:
        """A local path to write `name` to; what is not committed is removed."""
        if self.remote:
            with scratch_file() as file:
                yield Path(_place(file))
            return
        path = storage.local(join(self.location, f"{name}.craft-{uuid.uuid4().hex[:8]}.tmp"))
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)

    def commit(self, path: Path, name: str) -> Stamp:
        """Gives a written temporary file its name; returns the stamp it has there.

        Raises:
            OSError: it could not be written, or not uploaded as it is.
        """
        if self.remote:
            return attempt(lambda: self._upload(path, name), f"{join(self.location, name)}: upload")
        final = storage.local(join(self.location, name))
        sync(path)
        path.replace(final)
        sync(final.parent)
        return stamp(str(final))

    def move(self, name: str, target: str) -> None:
        """Gives a whole file another name, replacing what has it.

        Raises:
            OSError: it could not be.
        """
        if self.remote:
            for copy in local_copies([join(self.location, name)]):
                if isinstance(copy, OSError):
                    raise copy
                self.commit(Path(copy), target)
            self.remove([name])
            return
        final = storage.local(join(self.location, target))
        storage.local(join(self.location, name)).replace(final)
        sync(final.parent)

    def remove(self, names: Iterable[str]) -> None:
        """Deletes files; those that are not there are no error."""
        for name in names:
            where = join(self.location, name)
            if not self.remote:
                storage.local(where).unlink(missing_ok=True)
                continue
            system, path = storage.file_system(where)
            if attempt(lambda path=path, system=system: system.exists(path), where):  # type: ignore[misc]
                attempt(lambda path=path, system=system: system.rm_file(path), where)  # type: ignore[misc]

    def remove_tree(self, below: str) -> None:
        """Deletes a directory and all in it; of a link, the link."""
        where = join(self.location, below)
        if not self.remote:
            folder = storage.local(where)
            if folder.is_symlink():
                folder.unlink()
            elif folder.is_dir():
                shutil.rmtree(folder)
            return
        system, path = storage.file_system(where)
        if attempt(lambda: system.exists(path), where):
            attempt(lambda: system.rm(path, recursive=True), where)

    def clean(self, names: Collection[str]) -> None:
        """Removes what killed builds left: temporary files, and parts of uploads that were never completed.

        Args:
            names: Files whose leftovers they are; those of any others may be a user's.
        """
        if not self.remote:
            folder = storage.local(self.location)
            for path in folder.iterdir() if folder.is_dir() else ():
                found = TEMPORARY.fullmatch(path.name)
                if found and found[1] in names and (path.is_symlink() or not path.is_dir()):
                    path.unlink(missing_ok=True)
            return
        system, inside = storage.file_system(self.location)
        if not hasattr(system, "call_s3"):
            return
        bucket, _, below = inside.partition("/")
        prefix = f"{below}/" if below else ""
        words = {"Bucket": bucket, "Prefix": prefix}
        while True:
            try:
                page = attempt(partial(system.call_s3, "list_multipart_uploads", **words), str(self.location))
            except PermissionError as error:
                log.warning("%s: uploads that were not completed cannot be listed (%s)", self.location, error)
                return
            for upload in page.get("Uploads", []):
                if upload["Key"].removeprefix(prefix) in names:
                    one = {"Bucket": bucket, "Key": upload["Key"], "UploadId": upload["UploadId"]}
                    attempt(partial(system.call_s3, "abort_multipart_upload", **one), upload["Key"])
            if not page.get("IsTruncated") or not page.get("NextKeyMarker"):
                return
            words |= {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}

    def _upload(self, file: Path, name: str) -> Stamp:
        system, path = storage.file_system(join(self.location, name))
        kind = mimetypes.guess_type(name)[0] or "binary/octet-stream"  # which the client takes from a file's name
        options = {"chunksize": PART_BYTES, "ContentType": kind} if hasattr(system, "call_s3") else {}
        size = file.stat().st_size
        storage.transfer(system, "put_file", size, str(file), path, **options)
        system.invalidate_cache()
        info = storage.transfer(system, "info", 0, path)
        if info["size"] != size:
            raise OSError(f"{info['size']} bytes arrived, {size} were sent")
        if str(info.get("ETag", "")).strip('"') == _etag(file):
            return stamp_of(info)
        # No hash that says something about the content (encrypted by the store, or another kind of store).
        with scratch_file() as came, file.open("rb") as sent:
            storage.fetch(system, path, _place(came), size=size)
            if sha256(came) != sha256(sent):
                raise OSError("what the store holds differs from what was sent")
        return stamp_of(info)


def seal(content: bytes) -> bytes:
    """A small file that an unfinished build goes by, its checksum in the first line."""
    return xxhash.xxh3_128_hexdigest(content).encode() + b"\n" + content


def unseal(content: bytes) -> bytes:
    """What was sealed.

    Raises:
        ValueError: it is empty, cut or changed, or of an earlier version.
    """
    head, _, content = content.partition(b"\n")
    if head != xxhash.xxh3_128_hexdigest(content).encode():
        raise ValueError("damaged: its checksum does not fit")
    return content


def local_copies(paths: Iterable[str]) -> Iterator[str | OSError]:
    """For each path one that can be opened here: itself, or a copy that lives until the next is asked for.

    Remote files are fetched a few ahead, so that decoding does not wait for the network. What cannot
    be fetched is its error, in its place: a `MachineError` where its store, the network or the scratch disk is at
    fault, another where the store says that this file is not there, or not for us.
    """
    return (copy for copy, _ in stamped_copies((path, None) for path in paths))


def stamped_copies(sources: Iterable[tuple[str, Place]]) -> Iterator[tuple[str | OSError, Stamp]]:
    """As `local_copies`, each with the stamp that it had before it was fetched.

    A container behind a URL is asked for its stamp once: one that changes meanwhile keeps the old one, so that a
    restart sees it.

    Args:
        sources: Name, and where a member's bytes are.
    """
    sources, stamps = list(sources), dict[str, Stamp]()
    queue, count = iter(sources), FETCH_AHEAD if any(is_remote(path) for path, _ in sources) else LOCAL_AHEAD
    with ThreadPoolExecutor(FETCH_THREADS) as pool:
        ahead = deque(pool.submit(_fetch, *source, stamps) for source in islice(queue, count))
        try:
            while ahead:
                copy, now = ahead.popleft().result()
                if isinstance(copy, (str, OSError)):
                    yield copy, now
                else:
                    with copy:
                        yield _place(copy), now
                ahead.extend(pool.submit(_fetch, *source, stamps) for source in islice(queue, 1))
        finally:
            for future in ahead:
                copy = future.result()[0]
                if not isinstance(copy, (str, OSError)):
                    copy.close()


def _fetch(path: str, at: Place, stamps: dict[str, Stamp]) -> tuple[str | OSError | IO[bytes], Stamp]:
    container, member = split_source(path)
    if not is_remote(path) and not member:
        return path, stamp(path)
    now: Stamp = None
    try:
        target = scratch_file()
    except MachineError as error:
        return error, None
    if member and container in stamps:
        now = stamps[container]
    else:
        try:
            now = stamp(path)  # before the content: of a file that changes in between, a restart sees that it has
            if is_remote(container):
                stamps[container] = now
        except OSError as error:
            if member:  # without it nobody knows whether the container is there; of a file the fetch says what is wrong
                target.close()
                return MachineError(str(error)), None
    try:
        if member:
            extract(path, at, target, now)
            return target, now
        system, inner = storage.file_system(path)
        size = int(now[0]) if now else None
        attempt(lambda: storage.fetch(system, inner, _place(target), size=size), path)
    except (SourceError, MachineError) as error:
        target.close()
        return error, now
    except OSError as error:
        target.close()
        status = getattr(error.__cause__, "status", 0)
        if isinstance(error, FINAL) or (400 <= status < 500 and status not in BUSY):
            return error, now
        return MachineError(str(error)), now
    return target, now


def scratch_file() -> IO[bytes]:
    """A file in TMPDIR that ends with this process, however that ends: it has no name there, but see `_place`.

    Raises:
        MachineError: TMPDIR is full, or cannot be written.
    """
    try:  # without /proc a file can only be opened again by a name
        return tempfile.TemporaryFile() if Path("/proc/self/fd").is_dir() else tempfile.NamedTemporaryFile()
    except OSError as error:
        raise MachineError(f"no scratch file: {error}; set TMPDIR to a directory of yours with room") from error


def _place(file: IO[bytes]) -> str:
    """A path by which this process and others of this user can open a scratch file."""
    return file.name if isinstance(file.name, str) else f"/proc/{os.getpid()}/fd/{file.fileno()}"


def _etag(file: Path) -> str:
    """S3's ETag of the file as it was sent: its md5, or that of its parts' md5s."""
    size = file.stat().st_size
    with file.open("rb") as content:
        if size < 2 * PART_BYTES:
            return hashlib.md5(content.read(), usedforsecurity=False).hexdigest()
        parts: list[Any] = []
        while chunk := content.read(PART_BYTES):
            parts.append(hashlib.md5(chunk, usedforsecurity=False).digest())
    return f"{hashlib.md5(b''.join(parts), usedforsecurity=False).hexdigest()}-{len(parts)}"
