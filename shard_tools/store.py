"""Where shards are written: a local directory or an object store, with the same promise.

In: bytes, or a file written under a temporary name. Out: a file that appears under its name whole and
durable, or not at all.

Local: temporary name beside the final one, fsync, rename, fsync of the directory. Object stores have no
rename but need none, as an object appears when its upload is complete: the file is written to local
scratch, uploaded (in parts where it is large, each part with the client's own checksum), retried, and
compared with what the store says it holds: size, and content by the store's hash, or read back where its hash is none.
"""

import hashlib
import os
import shutil
import tempfile
import uuid
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from pipeline.data import storage
from pipeline.data.storage import Location, attempt, is_remote, join
from shard_tools.stamps import Stamp, stamp

PART_BYTES = 32 << 20  # of a multipart upload; files of at least two parts are sent in parts
FETCH_THREADS = 4
FETCH_AHEAD = 8  # remote inputs of one worker in local scratch at a time


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

    def write(self, name: str, content: bytes) -> None:
        """Writes a small file."""
        with self.temporary(name) as path:
            path.write_bytes(content)
            self.commit(path, name)

    @contextmanager
    def temporary(self, name: str) -> Iterator[Path]:
        """A local path to write `name` to; what is not committed is removed."""
        if self.remote:
            path = _scratch_file(Path(name).suffix)
        else:
            path = storage.local(join(self.location, f"{name}.{uuid.uuid4().hex[:8]}.tmp"))
            path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)

    def commit(self, path: Path, name: str) -> None:
        """Gives a written temporary file its name.

        Raises:
            OSError: it could not be written, or not uploaded as it is.
        """
        if self.remote:
            attempt(lambda: self._upload(path, name), f"{join(self.location, name)}: upload")
            return
        final = storage.local(join(self.location, name))
        with path.open("rb") as file:
            os.fsync(file.fileno())
        path.replace(final)
        _sync_directory(final.parent)

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
        """Deletes a directory and all in it."""
        where = join(self.location, below)
        if not self.remote:
            shutil.rmtree(storage.local(where), ignore_errors=True)
            return
        system, path = storage.file_system(where)
        if attempt(lambda: system.exists(path), where):
            attempt(lambda: system.rm(path, recursive=True), where)

    def clean(self, names: Collection[str] | None = None) -> None:
        """Removes what killed builds left: temporary files, and parts of uploads that were never completed.

        Args:
            names: Files whose leftovers they are; None: any, for the one process that owns the build.
        """
        clean_scratch()
        if not self.remote:
            for leftover in storage.local(self.location).glob("*.tmp"):
                if names is None or leftover.name.rsplit(".", 2)[0] in names:
                    leftover.unlink(missing_ok=True)
            return
        system, path = storage.file_system(self.location)
        if not hasattr(system, "call_s3"):
            return
        bucket, _, prefix = path.partition("/")
        found = attempt(
            lambda: system.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=f"{prefix}/"), str(self.location)
        )
        for upload in found.get("Uploads", []):
            if names is not None and upload["Key"].removeprefix(f"{prefix}/") not in names:
                continue
            words = {"Bucket": bucket, "Key": upload["Key"], "UploadId": upload["UploadId"]}
            attempt(lambda words=words: system.call_s3("abort_multipart_upload", **words), upload["Key"])  # type: ignore[misc]

    def _upload(self, file: Path, name: str) -> None:
        system, path = storage.file_system(join(self.location, name))
        options = {"chunksize": PART_BYTES} if hasattr(system, "call_s3") else {}
        system.put_file(str(file), path, **options)
        system.invalidate_cache()
        info = system.info(path)
        if info["size"] != file.stat().st_size:
            raise OSError(f"{info['size']} bytes arrived, {file.stat().st_size} were sent")
        if str(info.get("ETag", "")).strip('"') == _etag(file):
            return
        # No hash that says something about the content (encrypted by the store, or another kind of store).
        with system.open(path, "rb") as back, file.open("rb") as sent:
            if sha256(back) != sha256(sent):
                raise OSError("what the store holds differs from what was sent")


def sha256(file: BinaryIO) -> str:
    """Hash of an open file, read in pieces."""
    whole = hashlib.sha256()
    while piece := file.read(1 << 22):
        whole.update(piece)
    return whole.hexdigest()


def clean_scratch() -> None:
    """Removes scratch files of processes that are gone."""
    for path in _scratch().iterdir():
        try:
            os.kill(int(path.name.split("-")[0]), 0)
        except ProcessLookupError:
            path.unlink(missing_ok=True)
        except PermissionError:
            continue  # alive, another user's


def local_copies(paths: Iterable[str]) -> Iterator[str | OSError]:
    """For each path one that can be opened here: itself, or a copy that lives until the next is asked for.

    Remote files are fetched a few ahead, so that decoding does not wait for the network. A file that
    cannot be fetched is its error, in its place.
    """
    return (copy for copy, _ in _copies(paths, stamped=False))


def stamped_copies(paths: Iterable[str]) -> Iterator[tuple[str | OSError, Stamp]]:
    """As `local_copies`, each with the stamp that its source had before it was fetched."""
    return _copies(paths, stamped=True)


def _copies(paths: Iterable[str], stamped: bool) -> Iterator[tuple[str | OSError, Stamp]]:
    queue = iter(paths)
    with ThreadPoolExecutor(FETCH_THREADS) as pool:
        ahead = [pool.submit(_fetch, path, stamped) for path in islice(queue, FETCH_AHEAD)]
        try:
            while ahead:
                copy, now = ahead.pop(0).result()
                yield copy, now
                _drop(copy)
                ahead += [pool.submit(_fetch, path, stamped) for path in islice(queue, 1)]
        finally:
            for future in ahead:
                _drop(future.result()[0])


def _fetch(path: str, stamped: bool) -> tuple[str | OSError, Stamp]:
    if not is_remote(path):
        return path, stamp(path) if stamped else None
    target = _scratch_file(Path(path.rsplit("/", 1)[-1]).suffix)
    now: Stamp = None
    if stamped:
        with suppress(OSError):  # the fetch says what is wrong
            now = stamp(path)  # before the content: of a file that changes in between, a restart sees that it has
    try:
        system, inner = storage.file_system(path)
        attempt(lambda: system.get_file(inner, str(target)), path)
    except OSError as error:
        target.unlink(missing_ok=True)
        return error, now
    return str(target), now


def _drop(copy: str | OSError) -> None:
    if isinstance(copy, str) and Path(copy).parent == _scratch():
        Path(copy).unlink(missing_ok=True)


def _scratch() -> Path:
    folder = Path(tempfile.gettempdir()) / f"craft-scratch-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def _scratch_file(suffix: str) -> Path:
    return _scratch() / f"{os.getpid()}-{uuid.uuid4().hex}{suffix}"


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


def _sync_directory(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
