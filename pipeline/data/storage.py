"""Files by location: a local path or an fsspec URL (s3://, gs://, hf://, ...).

In: a location and a name below it. Out: bytes, sizes, a file system. All that goes wrong with a remote
store is an `OSError` after some tries, so callers handle one kind of error wherever the file lies.

Object stores have no rename and no directories: an object appears whole or not at all. Credentials
and endpoints are the store's own (for S3 AWS_PROFILE, AWS_ENDPOINT_URL, ...).
"""

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import fsspec

from pipeline.errors import UserError

Location = str | Path
Result = TypeVar("Result")

TRIES = 5
FIRST_WAIT = 0.5  # seconds; doubled after each try, with jitter so that many nodes do not come back at once
FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)  # another try changes nothing


def is_remote(location: Location) -> bool:
    """Whether it is a URL of a store and not a local path."""
    return isinstance(location, str) and "://" in location and not location.startswith("file://")


def local(location: Location) -> Path:
    """The local path of a location that is not remote."""
    return Path(str(location).removeprefix("file://"))


def location(text: str) -> Location:
    """What a command line names: a path, or a URL of a store as it is."""
    return text if is_remote(text) else local(text)


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


def read_bytes(location: Location) -> bytes:
    """A whole file.

    Raises:
        OSError: it cannot be read.
    """
    if not is_remote(location):
        return local(location).read_bytes()
    system, path = file_system(location)
    content: bytes = attempt(lambda: system.cat_file(path), str(location))
    return content


def sizes(location: Location, below: str = "") -> dict[str, int]:
    """Sizes in bytes of all files right in a directory, by name; a directory that is not there is empty."""
    where = join(location, below) if below else str(location)
    if not is_remote(where):
        folder = local(where)
        return {p.name: p.stat().st_size for p in folder.iterdir() if p.is_file()} if folder.is_dir() else {}
    system, path = file_system(where)

    def listing() -> list[dict[str, Any]]:
        try:
            found: list[dict[str, Any]] = system.ls(path, detail=True, refresh=True)
        except FileNotFoundError:
            return []
        return found

    entries = attempt(listing, where)
    return {e["name"].rsplit("/", 1)[-1]: int(e["size"] or 0) for e in entries if e["type"] == "file"}
