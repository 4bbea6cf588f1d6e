"""Files by location: a local path or an fsspec URL (s3://, gs://, hf://, ...).

In: a location and a name below it. Out: bytes, sizes, a file system. All that goes wrong with a remote
store is an `OSError` after some tries, so callers handle one kind of error wherever the file lies.

Object stores have no rename and no directories: an object appears whole or not at all. Credentials
and endpoints are the store's own (for S3 AWS_PROFILE, AWS_ENDPOINT_URL, ...).
"""

import errno
import io
import os
import random
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import fsspec
from fsspec.callbacks import Callback

from pipeline.errors import UserError
from pipeline.files import open_regular, user_path

Location = str | Path
Result = TypeVar("Result")

TRIES = 5
BLOCK = 1 << 22
FIRST_WAIT = 0.5  # seconds; doubled after each try, with jitter so that many nodes do not come back at once


class LongerError(OSError):
    """A file has more bytes than it may have."""

    def __init__(self, size: str, limit: int) -> None:
        super().__init__(errno.EFBIG, f"{size} bytes, at most {limit} were expected")


# Another try changes nothing.
FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, LongerError)


def is_remote(location: Location) -> bool:
    """Whether it is a URL of a store and not a local path."""
    return isinstance(location, str) and "://" in location and not location.startswith("file://")


def local(location: Location) -> Path:
    """The local path of a location that is not remote."""
    return Path(str(location).removeprefix("file://"))


def location(text: str, what: str) -> Location:
    """What a command line names: a path, where `~` is the home directory, or a URL of a store as it is.

    Args:
        text: The words.
        what: The option, for the message.

    Raises:
        UserError: it is empty.
    """
    return text if is_remote(text) else user_path(text.removeprefix("file://"), what)


def join(location: Location, name: str) -> str:
    """`name` below `location`."""
    return f"{str(location).rstrip('/')}/{name}" if is_remote(location) else str(local(location) / name)


def file_system(location: Location) -> tuple[Any, str]:
    """The fsspec file system of a location and the path within it.

    Raises:
        UserError: a protocol that is unknown, or whose package is not installed.
    """
    try:
        # No cached listings: other processes write to the same place.
        system, path = fsspec.core.url_to_fs(str(location), use_listings_cache=False)
    except (ImportError, ValueError) as error:
        raise UserError(f"{location}: {error}; install the store's fsspec package (s3: pip install s3fs)") from error
    return system, str(path)


def attempt(call: Callable[[], Result], what: str, tries: int = TRIES) -> Result:
    """Calls until it works: a store's errors pass, and its libraries raise all kinds of exceptions.

    Raises:
        OSError: every try failed, or the error is one that another try cannot change.
    """
    for number in range(1, tries + 1):
        try:
            return call()
        except FINAL:
            raise
        except Exception as error:
            if number == tries:
                raise OSError(f"{what}: {error} (after {tries} tries)") from error
            time.sleep(FIRST_WAIT * 2 ** (number - 1) * random.uniform(0.5, 1.5))
    raise AssertionError("unreachable")


class _Bound(Callback):  # type: ignore[misc]
    """Ends a transfer that goes beyond `limit` bytes; at most one block more was written."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self._limit = self._left = limit

    def relative_update(self, inc: int = 1) -> None:
        self._left -= inc
        if self._left < 0:
            raise LongerError("more", self._limit)


def fetch(system: Any, path: str, target: str | BinaryIO, limit: int) -> None:
    """Copies a remote file of at most `limit` bytes.

    A store knows the size of an object; a web server may send without end.

    Args:
        system: fsspec file system.
        path: Within it.
        target: Local path, or a file to write to.
        limit: Bytes.

    Raises:
        LongerError: it is larger. `target` has its first `limit` bytes, from a web server a little more.
        Exception: what the store raises.
    """
    if "http" in system.protocol:
        system.get_file(path, target, callback=_Bound(limit))
        return
    size = int(system.info(path)["size"] or 0)
    if size > limit:
        with system.open(path) as source, open(target, "wb") if isinstance(target, str) else nullcontext(target) as out:
            for start in range(0, limit, BLOCK):
                out.write(source.read(min(BLOCK, limit - start)))
        raise LongerError(str(size), limit)
    if isinstance(target, str):
        system.get_file(path, target)
    else:
        target.write(system.cat_file(path))


def read_bytes(location: Location, limit: int | None = None) -> bytes:
    """A whole file.

    Args:
        location: Of the file.
        limit: A larger one is not read.

    Raises:
        OSError: it cannot be read, or is larger.
    """
    if not is_remote(location):
        with os.fdopen(open_regular(local(location)), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if limit is not None and size > limit:
                raise LongerError(str(size), limit)
            return file.read()
    system, path = file_system(location)

    def read() -> bytes:
        if limit is None:
            whole: bytes = system.cat_file(path)
            return whole
        out = io.BytesIO()
        fetch(system, path, out, limit)
        return out.getvalue()

    return attempt(read, str(location))


def entries(location: Location, below: str = "") -> dict[str, dict[str, Any]]:
    """What is known of all files right in a directory, by name; a directory that is not there is empty.

    Of each file `size`, in bytes; of a local one `mtime_ns`, of one in a store all that fsspec's `info` has.
    """
    where = join(location, below) if below else str(location)
    if not is_remote(where):
        folder = local(where)
        if not folder.is_dir():
            return {}
        with os.scandir(folder) as files:
            found = {file.name: file.stat() for file in files if file.is_file()}
        return {name: {"size": status.st_size, "mtime_ns": status.st_mtime_ns} for name, status in found.items()}
    system, path = file_system(where)

    def listing() -> list[dict[str, Any]]:
        try:
            found: list[dict[str, Any]] = system.ls(path, detail=True, refresh=True)
        except FileNotFoundError:
            return []
        return found

    return {e["name"].rsplit("/", 1)[-1]: e for e in attempt(listing, where) if e["type"] == "file"}


def sizes(location: Location, below: str = "") -> dict[str, int]:
    """Sizes in bytes of all files right in a directory, by name; a directory that is not there is empty."""
    return {name: int(entry["size"] or 0) for name, entry in entries(location, below).items()}
