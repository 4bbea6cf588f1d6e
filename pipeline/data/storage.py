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
from fsspec.exceptions import FSTimeoutError

from pipeline.errors import UserError
from pipeline.files import open_regular, user_path

Location = str | Path
Result = TypeVar("Result")

TRIES = 5
BLOCK = 1 << 22
SILENCE = 60.0  # seconds without a byte from a web server
PATIENCE = 60.0  # seconds that every transfer has
LEAST_RATE = 1 << 16  # bytes a second that it must come to beyond them
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
    words: dict[str, Any] = {"use_listings_cache": False}  # other processes write to the same place
    if str(location).startswith(("http://", "https://")):
        import aiohttp  # its own limit is 5 minutes for the whole transfer, which a large file exceeds

        words["client_kwargs"] = {"timeout": aiohttp.ClientTimeout(None, sock_connect=SILENCE, sock_read=SILENCE)}
    try:
        system, path = fsspec.core.url_to_fs(str(location), **words)
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


def transfer(system: Any, call: str, size: int, *args: Any, **words: Any) -> Any:
    """Calls a method of a file system that moves so many bytes; the one place where a transfer's time is bounded.

    A store or web server that sends a byte now and then would hold it up for ever: clients look at silence alone.

    Args:
        system: fsspec file system.
        call: Name of the method.
        size: Bytes, or more.
        *args: Of the method.
        **words: Likewise.

    Raises:
        OSError: it took longer than `PATIENCE` and `size` at `LEAST_RATE`. Clients that are not asynchronous (hf://)
            have their own limits instead.
        Exception: what the store raises.
    """
    if not system.async_impl:
        return getattr(system, call)(*args, **words)
    seconds = PATIENCE + size / LEAST_RATE
    try:
        return getattr(system, call)(*args, **words, timeout=seconds)
    except FSTimeoutError as error:
        raise OSError(f"no answer, or less than {size} bytes in {seconds:.0f} s") from error


class TransferLimit(Callback):  # type: ignore[misc]
    """Ends a transfer from a web server, which may not say how long a file is.

    It must not go beyond `limit` bytes (None: any), of which at most one block more was written; and bring
    `LEAST_RATE` in every stretch of `PATIENCE`.
    """

    def __init__(self, limit: int | None) -> None:
        super().__init__()
        self._limit, self._bytes = limit, 0
        self._since, self._before = time.monotonic(), 0

    def relative_update(self, inc: int = 1) -> None:
        """So many bytes more came.

        Raises:
            LongerError: too many.
            OSError: too slowly.
        """
        self._bytes += inc
        if self._limit is not None and self._bytes > self._limit:
            raise LongerError("more", self._limit)
        seconds = time.monotonic() - self._since
        if seconds > PATIENCE:
            if self._bytes - self._before < LEAST_RATE * PATIENCE:
                raise OSError(f"{self._bytes - self._before} bytes in {seconds:.0f} s, which is too slow")
            self._since, self._before = time.monotonic(), self._bytes


def fetch(
    system: Any, path: str, target: str | BinaryIO, limit: int | None = None, size: int | None = None
) -> None:
    """Copies a remote file.

    A store knows the size of an object; a web server may send without end.

    Args:
        system: fsspec file system.
        path: Within it.
        target: Local path, or a file to write to.
        limit: Bytes that it may have; None: any number.
        size: Bytes that it has; None: the store is asked.

    Raises:
        LongerError: it is larger. `target` has its first `limit` bytes, from a web server a little more.
        OSError: it comes too slowly.
        Exception: what the store raises.
    """
    if "http" in system.protocol:
        known = size or limit
        if known is None:
            system.get_file(path, target, callback=TransferLimit(None))
        else:
            transfer(system, "get_file", known, path, target, callback=TransferLimit(limit))
        return
    if size is None:
        size = int(transfer(system, "info", 0, path)["size"] or 0)
    if limit is not None and size > limit:
        with open(target, "wb") if isinstance(target, str) else nullcontext(target) as out:
            for start in range(0, limit, BLOCK):
                end = min(start + BLOCK, limit)
                out.write(transfer(system, "cat_file", end - start, path, start=start, end=end))
        raise LongerError(str(size), limit)
    if isinstance(target, str):
        transfer(system, "get_file", size, path, target)
    else:
        target.write(transfer(system, "cat_file", size, path))


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
