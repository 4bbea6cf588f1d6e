"""ESC-50's official archive -> a directory with `audio/` and `meta/`.

In: a URL, and the sha256 that the archive must have. Out: the unpacked directory, whole or not there at all.

The archive is fetched under another name, compared with its length and hash, and only then unpacked, beside
the place where it appears with one rename. Its makers publish no sha256, and this project has not fetched
it, so none is built in: what came is hashed, the hash is said, and the caller confirms it.
"""

import errno
import http.client
import logging
import os
import shutil
import stat
import struct
import tempfile
import urllib.request
import zipfile
import zlib
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from pipeline.data.storage import SILENCE, LongerError, TransferLimit
from pipeline.errors import UserError
from pipeline.files import check_output_directory, new_file
from pipeline.files import sha256 as digest

log = logging.getLogger(__name__)

URL = "https://github.com/karolpiczak/ESC-50/archive/master.zip"
SHA256: str | None = None  # of the archive at URL; None: not known
ARCHIVE = "esc50-download.zip"  # its name here; none that a user's own copy would have
PIECE = 1 << 20
LARGEST = 8 << 30  # bytes unpacked; ESC-50 has under 1 GB


def fetch_esc50(root: Path, url: str, sha256: str | None, unchecked: bool) -> Path:
    """The directory that holds `meta/esc50.csv`, fetched and unpacked below `root` if it is not there.

    Args:
        root: Gets `esc50/`; an archive that was not confirmed stays beside it, and is not fetched again.
        url: Of the archive.
        sha256: That it must have; None: see `unchecked`.
        unchecked: Take it whatever its hash is.

    Raises:
        UserError: it cannot be fetched, is cut, is not the archive, has another hash or none to compare with; or
            `root` cannot be written, or holds another `esc50`.
    """
    target = root / "esc50"
    if (target / "meta" / "esc50.csv").is_file():
        log.info("%s is there: nothing is fetched", target)
        return target
    if os.path.lexists(target) and not (target.is_dir() and not any(target.iterdir())):
        raise UserError(f"{target}: is there and holds no meta/esc50.csv; move it away, or give another --root")
    check_output_directory(root, "--root")
    archive = root / ARCHIVE
    try:
        root.mkdir(parents=True, exist_ok=True)
        fetched = not archive.exists()
        if fetched:
            _fetch(url, archive)
        with archive.open("rb") as file:
            found = digest(file)
        log.info("%s: sha256 %s", archive, found)
        if sha256 is not None and found != sha256.lower():
            if not fetched:
                raise UserError(
                    f"{archive}: sha256 {found}, not {sha256}; delete it to fetch it again, or correct --sha256"
                )
            archive.unlink()
            raise UserError(
                f"{url}: sha256 {found}, not {sha256}; what came was deleted: try again, or correct --sha256"
            )
        if sha256 is None and not unchecked:
            raise UserError(
                f"{archive}: sha256 {found}, and none to compare it with; compare it with a source you trust, then "
                f"give --sha256 {found}, or --accept-any-archive"
            )
        _unpack(archive, target)
        archive.unlink()
    except OSError as error:
        raise UserError(f"{root}: {error}; free the disk or the path, then run the same command") from error
    return target


def _fetch(url: str, archive: Path) -> None:
    if not url.startswith(("http://", "https://")):
        raise UserError(f"--archive-url {url}: is no http(s) URL; a copy at hand goes to --root")
    with new_file(archive) as partial:
        with partial.open("wb") as file:
            try:
                promised = _download(url, file)
            except (http.client.HTTPException, ValueError, OSError) as error:
                if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                    raise
                raise UserError(f"{url}: {error}; try again, or give a copy at hand with --root") from error
        got = partial.stat().st_size
        if promised is not None and str(got) != promised.strip():
            raise UserError(f"{url}: {got} of {promised} bytes came; run the same command to try again")


def _download(url: str, file: BinaryIO) -> str | None:
    """Writes what a URL gives; returns the length that the server promised, if it did."""
    limit = TransferLimit(LARGEST)
    with urllib.request.urlopen(url, timeout=SILENCE) as reply:  # knows the proxies of this machine
        while piece := reply.read1(PIECE):
            try:
                limit.relative_update(len(piece))
            except LongerError as error:
                raise UserError(
                    f"{url}: gives more than {LARGEST} bytes, far more than ESC-50 has; correct --archive-url"
                ) from error
            file.write(piece)
        promised: str | None = reply.headers.get("Content-Length")
    return promised


def _unpack(archive: Path, target: Path) -> None:
    """Into a directory beside `target`, which becomes it when all of it is there."""
    partial = Path(tempfile.mkdtemp(prefix=f"{target.name}.", suffix=".tmp", dir=target.parent))
    try:
        with zipfile.ZipFile(archive) as whole:
            _check(archive, whole.infolist())
            whole.extractall(partial)  # compares each member with its crc32
        table = next(iter(sorted(partial.glob("*/meta/esc50.csv"))), None)
        if table is None:
            raise UserError(f"{archive}: holds no meta/esc50.csv; delete it, and give the URL of ESC-50's archive")
        table.parent.parent.replace(target)  # an empty directory gives way, another one does not
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, ValueError, struct.error) as error:
        raise UserError(f"{archive}: {error}; delete it and fetch it again") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _check(archive: Path, members: list[zipfile.ZipInfo]) -> None:
    """Refuses what no honest archive holds, before a byte is written."""
    for member in members:
        path = PurePosixPath(member.filename.replace("\\", "/"))
        kind = stat.S_IFMT(member.external_attr >> 16)
        if path.is_absolute() or ".." in path.parts or kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise UserError(
                f"{archive}: member '{member.filename}' leads outside or is a link; do not use this archive"
            )
    size = sum(member.file_size for member in members)
    if size > LARGEST:
        raise UserError(f"{archive}: unpacks to {size} bytes, far more than ESC-50; do not use this archive")
