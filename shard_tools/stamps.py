"""Stamps: what tells that a source has changed since it was decoded.

In: names of sources. Out: their stamps, and which of many sources do not have theirs any more.

Local: size and time of modification. In a store: size, and what its `info` says of the content (S3's ETag, Google's
md5, the Hub's blob id), else of the time; of a web server that sends neither, the size is all there is.

The stamp of a member is that of its container.

A build takes a remote stamp with the fetch, in the fetching threads (store.py). A restart compares those of all
finished shards: from one listing of the audio root (a thousand objects a request, a page at a time from S3, 8 bytes
an object kept) and, for what that does not confirm, or where there are few, by one request each, 64 at a time.
"""

import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import datetime
from typing import Any, NamedTuple

import numpy as np
import xxhash

from pipeline.data.storage import FINAL, Location, attempt, file_system, is_remote, join, transfer
from pipeline.errors import UserError
from shard_tools.names import split_source

log = logging.getLogger(__name__)

Stamp = list[int | str] | None

# Of fsspec's `info` the first that is there: what changes with the content before what may change without it.
TAGS = ("ETag", "md5Hash", "generation", "blob_id", "sha", "etag",
        "mtime", "LastModified", "last_modified", "modified", "updated", "created")  # fmt: skip
REQUESTS = 64  # at a time; waiting is what they cost
LIST_FROM = 1000  # sources from which on a listing is cheaper than a request each


def stamp(path: str) -> Stamp:
    """Size and tag of a source as it is now; None: it is not there, or may not be looked at.

    Raises:
        OSError: its store does not answer.
    """
    path = split_source(path)[0]
    if not is_remote(path):
        try:
            status = os.stat(path)
        except OSError:
            return None  # the decoder says what is wrong
        return [status.st_size, status.st_mtime_ns]
    system, inner = file_system(path)
    try:
        return stamp_of(attempt(lambda: transfer(system, "info", 0, inner), path))
    except FINAL:
        return None  # the fetch says what is wrong


class Change(NamedTuple):
    """A source whose stamp is another now."""

    path: str
    old: Stamp
    new: Stamp

    @property
    def time_only(self) -> bool:
        """A local file of the same size: perhaps the same content, copied to this machine at another time."""
        return bool(self.old and self.new and self.old[0] == self.new[0] and isinstance(self.new[1], int))

    def __str__(self) -> str:
        if self.new is None or self.old is None:
            return f"{self.path} ({'not there any more' if self.old else 'could not be read then'})"
        sizes = f"{self.old[0]} bytes then, {self.new[0]} now"
        return f"{self.path} ({sizes if self.old[0] != self.new[0] else 'as long, but written anew'})"


@contextmanager
def comparison(root: Location, count: int) -> Iterator[Callable[[Sequence[str], Sequence[Stamp]], list[Change]]]:
    """A function, for many threads: those of some sources that do not have their stamps any more.

    It raises UserError where their store does not answer.

    Args:
        root: Of the sources.
        count: How many are going to be compared.
    """
    there = np.empty(0, np.uint64)  # hashes of path and stamp, in order
    if is_remote(root) and count >= LIST_FROM and not str(root).startswith("http"):  # a page is no listing
        try:
            there = np.sort(np.fromiter((_hash(path, now) for path, now in _listing(str(root))), np.uint64))
        except OSError as error:
            log.warning("%s: cannot be listed (%s): a request for each of %d files instead", root, error, count)

    def listed(path: str, old: Stamp) -> bool:
        """Whether the listing has a source as it was."""
        wanted = np.uint64(_hash(split_source(path)[0], old))
        place = int(np.searchsorted(there, wanted))
        return place < len(there) and bool(there[place] == wanted)

    def now(pair: tuple[str, Stamp]) -> Change:
        path, old = pair
        try:
            return Change(path, old, stamp(path))
        except OSError as error:
            if old is None:  # it could not be looked at then either
                return Change(path, old, None)
            raise UserError(f"{error}; files are compared with what was decoded: try again when they answer") from error

    def changed(paths: Sequence[str], stamps: Sequence[Stamp]) -> list[Change]:
        pairs = [pair for pair in zip(paths, stamps, strict=True) if not (len(there) and listed(*pair))]
        found = [now(pair) for pair in pairs if not is_remote(pair[0])]
        # Of the members of one container the first stands for all: a request each would ask the same.
        remote = {(split_source(path)[0], str(old)): (path, old) for path, old in reversed(pairs) if is_remote(path)}
        found += pool.map(now, reversed(remote.values()))
        return [change for change in found if change.old != change.new]

    pool = ThreadPoolExecutor(REQUESTS)
    try:
        yield changed
    finally:
        pool.shutdown(cancel_futures=True)


def stamp_of(info: dict[str, Any]) -> Stamp:
    """Size and tag out of what a store, or the listing of a local directory, tells about a file."""
    if "mtime_ns" in info:
        return [info["size"], info["mtime_ns"]]
    name = next((name for name in TAGS if info.get(name)), "")
    value = info.get(name, "")
    tag = value.timestamp() if isinstance(value, datetime) else value  # a date's text depends on the time zone
    return [int(info.get("size") or 0), f"{name} {tag}".strip()]


def _hash(path: str, now: Stamp) -> int:
    return xxhash.xxh3_64_intdigest(json.dumps([path, now]).encode())


def _listing(root: str) -> Iterator[tuple[str, Stamp]]:
    """Path and stamp of every object below `root`."""
    system, folder = file_system(root)
    if not hasattr(system, "call_s3"):
        found: dict[str, dict[str, Any]] = attempt(lambda: system.find(folder, detail=True), root)
        yield from ((join(root, name[len(folder) :].lstrip("/")), stamp_of(info)) for name, info in found.items())
        return
    bucket, _, prefix = folder.partition("/")
    prefix = f"{prefix}/" if prefix else ""
    words = {"Bucket": bucket, "Prefix": prefix}
    while True:
        page = attempt(lambda: system.call_s3("list_objects_v2", **words), root)
        for entry in page.get("Contents", []):
            yield join(root, entry["Key"][len(prefix) :]), stamp_of({"size": entry["Size"], "ETag": entry["ETag"]})
        if not page.get("IsTruncated"):
            return
        words["ContinuationToken"] = page["NextContinuationToken"]
