"""What a source is called: `PATH`, or `CONTAINER::MEMBER` for a clip inside a tar, zip, Parquet or HDF5 file.

In: paths and URLs, and names of members. Out: their parts; the files of shards that are no shards. Nothing is opened
here.

A member of a tar or zip goes by its name there, without `./`; a row of a Parquet or HDF5 file by its number, and
`ROW@RATE` where the sample rate was given and the file does not say it. Such a name is all that shards record: where
the bytes are in the container (`Clip.at`) is found again by it.
"""

import re

BETWEEN = "::"
PRODUCTS = ("failures.jsonl", "index.parquet", "manifest.json")  # of a build, in the order in which they are replaced
PLAN = "plan.parquet"  # of --dry-run
CONTAINERS = (".tar", ".zip", ".parquet", ".h5", ".hdf5")
INSIDE = re.compile(rf"(.+?(?:{'|'.join(map(re.escape, CONTAINERS))})){BETWEEN}(.+)", re.IGNORECASE | re.DOTALL)
COMPRESSED = re.compile(r".+\.(?:tar\.[a-z0-9]{1,4}|tgz|tbz2?|txz|7z|rar)", re.IGNORECASE | re.DOTALL)


def split_source(path: str) -> tuple[str, str]:
    """(container, member) of a source; (path, "") of a file of its own."""
    found = INSIDE.fullmatch(path) if BETWEEN in path else None
    return (found[1], found[2]) if found else (path, "")


def plain(name: str) -> str | None:
    """A tar's or zip's member without empty parts and `.`; None: it leads elsewhere, or is no name of a source."""
    words = [word for word in name.split("/") if word not in ("", ".")]
    return None if not words or ".." in words or "://" in name or "\0" in name else "/".join(words)
