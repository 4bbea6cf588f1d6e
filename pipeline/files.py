"""Paths that a user names, and files that appear whole or not at all.

In: words of a command line or a setting. Out: paths as they were meant; a place that cannot be written is refused
before the work, not after it.
"""

import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any

from pipeline.errors import UserError

# Names that become parts of file names: splits, shards. No separator, no leading dot or dash, nothing to escape.
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")


def check_name(name: str, what: str) -> str:
    """A name from a command line, a table or a manifest that becomes part of a file's name.

    Args:
        name: The name.
        what: Where it stands, for the message, such as "--split" or "labels.csv:7: split".

    Raises:
        UserError: it could lead out of the directory, or is no plain file name.
    """
    if NAME.fullmatch(name) is None:
        raise UserError(
            f"{what} '{name[:100]}' becomes a file name; use at most 100 of the characters A-Z a-z 0-9 _ . -, "
            "beginning with a letter, a digit or _"
        )
    return name


def user_path(text: str | os.PathLike[str], what: str) -> Path:
    """A local path as a user writes it: `~` and `~name` are home directories.

    Args:
        text: The words.
        what: The option or setting, for the message.

    Raises:
        UserError: it is empty, holds a NUL character, or names the home of nobody.
    """
    words = os.fspath(text)
    if not words or "\0" in words:
        raise UserError(f"{what} = {words!r:.100} names no path; give one")
    try:
        return Path(words).expanduser()
    except RuntimeError as error:
        raise UserError(f"{what} {words}: {error}; write the directory out") from error


def check_output_file(path: Path, what: str) -> Path:
    """Tries a place for a file that will be written later; nothing is left there. Call it before the work.

    Args:
        path: Of the file; its directory need not exist yet.
        what: The option or setting, for the message.

    Raises:
        UserError: it is a directory or a special file, or cannot be written.
    """
    try:
        if path.exists():
            if not path.is_file():
                kind = "a directory" if path.is_dir() else "no regular file"
                raise UserError(f"{what} {path}: is {kind}; name a file")
            with path.open("ab"):
                pass
        _try_directory(path.parent)
    except OSError as error:
        raise UserError(f"{what} {path}: {_reason(error)}; name a place that can be written") from error
    return path


def check_output_directory(path: Path, what: str) -> Path:
    """Tries a place for a directory that will be filled later; nothing is left there. Call it before the work.

    Raises:
        UserError: it is a file, or cannot be made or written.
    """
    try:
        _try_directory(path)
    except OSError as error:
        raise UserError(f"{what} {path}: {_reason(error)}; name a directory that can be written") from error
    return path


def write_text(path: Path, text: str) -> None:
    """Writes a small file whole and durably, or not at all; its directory must exist."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def write_json(path: Path, content: Any) -> None:
    """Likewise, as JSON."""
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def sync(path: Path) -> None:
    """Waits until a file's content, or a directory's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _try_directory(path: Path) -> None:
    """Writes a nameless file into the directory, or into the nearest one above it that exists.

    Raises:
        OSError: it cannot be written, or is no directory.
    """
    folder = path.absolute()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir():
        raise NotADirectoryError(20, f"{folder} is no directory")
    with tempfile.TemporaryFile(dir=folder):
        pass


def _reason(error: OSError) -> str:
    return error.strerror or str(error)
