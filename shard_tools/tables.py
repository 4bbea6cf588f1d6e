"""One reader of the tables that people bring: csv, tsv and lists of lines, with every problem named by file and line.

In: a file or URL, with commas, tabs or semicolons. Out: rows of cells and numbers in their range, or a `UserError`
`FILE:LINE: what; remedy`. UTF-8 (with a byte order mark or without) and UTF-16 with one are read.

Rows stream: memory is that of a line, whatever the length of the file. Remote files and pipes are held as bytes.
"""

import csv
import io
import re
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from operator import itemgetter
from typing import Any, TextIO

from pipeline.data.storage import Location, is_remote, local, read_bytes
from pipeline.errors import UserError
from shard_tools.segment import POINTER

LONGEST_LINE = 1 << 20  # characters; a file without line ends is no table
LONGEST_CELL = csv.field_size_limit()  # 131072 characters
MOST_SECONDS = 1e8  # three years of recording
MOST_INTEGER = 2**31 - 1
DELIMITERS = {",": "commas", "\t": "tabs", ";": "semicolons"}
SEPARATOR = ";"  # of several labels in one cell
MARKS = ",;|\t\n"  # that separate labels in some table or other
NOT_TEXT = {b"\x1f\x8b": "a gzip file", b"PK\x03\x04": "a zip file or a workbook", b"PAR1": "a Parquet file"}
INTEGER = re.compile(r"[+-]?[0-9]+(\.0*)?")
CSV_ERRORS = (
    ("field larger", f"a cell of more than {LONGEST_CELL} characters", "is a closing quotation mark missing"),
    ("unexpected end", "a quotation mark opens here and no other closes it", "close or double it"),
    ("expected after", "text follows a closing quotation mark", "double the quotation marks inside a quoted cell"),
)


class Table:
    """A text file of rows.

    Args:
        path: Of the file.
        content: Its bytes, where they are read already.

    Raises:
        UserError: it cannot be read, or is a directory or device.
    """

    def __init__(self, path: Location, content: bytes | None = None) -> None:
        self.path = path
        self._content = content
        try:
            if content is None and is_remote(path):
                self._content = read_bytes(path)
            elif content is None:
                mode = local(path).stat().st_mode
                if not stat.S_ISREG(mode) and not stat.S_ISFIFO(mode):
                    kind = "a directory" if stat.S_ISDIR(mode) else "no regular file"
                    raise UserError(f"{path}: is {kind}; name a file")
                # A pipe, such as a shell's <(command), can be read once, and some tables are read twice.
                self._content = None if stat.S_ISREG(mode) else local(path).read_bytes()
        except OSError as error:
            raise self._unreadable(error) from error

    def problem(self, line: int, what: str, remedy: str) -> UserError:
        """What is wrong with a line, and what to do."""
        return UserError(f"{self.path}:{line}: {what}; {remedy}")

    def lines(self) -> Iterator[str]:
        """All lines, with their ends.

        Raises:
            UserError: one is not text, or far too long.
        """
        number = 0
        with self._open("strict") as file:
            try:
                for line in iter(partial(file.readline, LONGEST_LINE + 1), ""):
                    number += 1
                    if len(line) > LONGEST_LINE:
                        what = f"a line of more than {LONGEST_LINE} characters"
                        raise self.problem(number, what, "is this a text file with one row a line?")
                    if "\0" in line:
                        raise self.problem(number, "NUL characters, as of UTF-16 without its mark", "save it as UTF-8")
                    yield line
            except UnicodeError as error:
                raise self._undecodable(str(file.encoding)) from error
            except OSError as error:
                raise self._unreadable(error) from error

    def rows(self) -> Iterator[tuple[int, list[str]]]:
        """(line, cells) of a file without a header; blank lines and those that begin with # are left out."""
        lines = ("\n" if line.startswith("#") else line for line in self.lines())
        return self._parse(lines, 0, ",", spaced=True)

    def records(self, needed: Sequence[str], optional: Sequence[str] = ()) -> Iterator[tuple[int, tuple[str, ...]]]:
        """(line, cells of the columns asked for) of a file with a header; of an optional column that is not there, "".

        Raises:
            UserError: no such column, a column twice, a row of another length, no rows.
        """
        lines = self.lines()
        skipped, delimiter, names, spaced = self._header(lines, needed)
        # Cells of absent columns are the last one, an empty one that each row gets.
        pick = itemgetter(*(names.index(name) if name in names else -1 for name in (*needed, *optional)))
        any_rows = False
        for line, row in self._parse(lines, skipped, delimiter, spaced):
            if len(row) != len(names):
                raise self.problem(
                    line,
                    f"{len(row)} cells where the header has {len(names)}",
                    f"complete the row, or put a cell that holds {DELIMITERS[delimiter]} in quotation marks",
                )
            any_rows = True
            row.append("")
            yield line, pick(row)
        if not any_rows:
            raise self.problem(skipped, "a header and no rows", "add rows, or name another file")

    def columns(self, needed: Sequence[str]) -> list[str]:
        """Names of the columns.

        Raises:
            UserError: no such column, or a column twice.
        """
        return self._header(self.lines(), needed)[2]

    def integer(self, line: int, name: str, text: str, least: int = 0, most: int = MOST_INTEGER) -> int:
        """A whole number, also as pandas writes it in a column with gaps, `1.0`.

        Raises:
            UserError: anything else, or out of range.
        """
        words = text.strip()
        value = int(words.partition(".")[0]) if len(words) < 20 and INTEGER.fullmatch(words) else None
        if value is None or not least <= value <= most:
            raise self.problem(line, f"{name} = '{text[:40]}' is no whole number from {least} on", "correct it")
        return value

    def seconds(self, line: int, name: str, text: str) -> float:
        """A time in a recording.

        Raises:
            UserError: no number, not finite, negative, or years.
        """
        try:
            value = float(text)
        except ValueError:
            value = -1.0
        if not 0 <= value <= MOST_SECONDS or "_" in text:
            what = f"{name} = '{text[:40]}' is not a number of seconds from 0 on"
            raise self.problem(line, what, "correct it or leave it empty")
        return value + 0.0  # no negative zero

    def labels(
        self, line: int, text: str, separator: str | None = None, index: Mapping[str, int] | None = None
    ) -> list[str]:
        """The labels that a cell names.

        Args:
            line: Of the cell.
            text: The cell.
            separator: Of several labels; None: `;`, and a label that looks like several is refused.
            index: The vocabulary, by every spelling; a whole cell that it holds is one label. None: not known yet.

        Raises:
            UserError: a label is not in the vocabulary, or it cannot be told whether it is one or several.
        """
        return cell_labels(text, separator, index, partial(self.problem, line))

    def _open(self, errors: str) -> TextIO:
        """The text; the mark at its beginning tells the encoding."""
        try:
            raw = local(self.path).open("rb") if self._content is None else io.BytesIO(self._content)
            head = raw.read(len(POINTER))
            raw.seek(0)
        except OSError as error:
            raise self._unreadable(error) from error
        if head == POINTER:
            raw.close()
            raise self.problem(1, "a pointer of Git-LFS, not the file", "run 'git lfs pull' where it was cloned")
        for magic, kind in NOT_TEXT.items():
            if head.startswith(magic):
                raw.close()
                raise self.problem(1, f"this is {kind}", "save it as a csv in UTF-8")
        encoding = "utf-16" if head[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
        return io.TextIOWrapper(raw, encoding, errors, newline="")

    def _undecodable(self, encoding: str) -> UserError:
        """Reads once more for the line."""
        with self._open("replace") as file:
            pieces = iter(partial(file.readline, LONGEST_LINE), "")
            line = next((n for n, text in enumerate(pieces, 1) if "\ufffd" in text), 1)
        name = encoding.upper().removesuffix("-SIG")
        return self.problem(line, f"not {name}", "save the file as UTF-8 (it may be Windows-1252 or Latin-1)")

    def _unreadable(self, error: OSError) -> UserError:
        return UserError(f"{self.path}: {error.strerror or error}; check the path")

    def _header(self, lines: Iterator[str], needed: Sequence[str]) -> tuple[int, str, list[str], bool]:
        """Line of the header, delimiter, names of the columns, and whether spaces follow the delimiters."""
        line, text = next(((n, words) for n, words in enumerate(lines, 1) if words.strip()), (1, ""))
        wants = f"it needs {','.join(needed)}"
        if not text:
            raise self.problem(line, "the file is empty", wants)
        read: dict[str, list[str]] = {}
        for delimiter in DELIMITERS:
            try:
                (read[delimiter],) = csv.reader([text], delimiter=delimiter, skipinitialspace=True)
            except (csv.Error, ValueError) as error:
                raise self.problem(line, f"the header cannot be read ({error})", wants) from error
        stripped = {delimiter: [cell.strip() for cell in cells] for delimiter, cells in read.items()}
        found = next((d for d, names in stripped.items() if set(needed) <= set(names)), None)
        if found is None:
            names = max(stripped.values(), key=len)
            absent = next(name for name in needed if name not in names)
            has = ", ".join(name[:40] for name in islice(names, 20)) or "none"
            raise self.problem(line, f"no column '{absent}' (has {has})", wants)
        names = stripped[found]
        twice = next((name for number, name in enumerate(names) if name and name in names[:number]), None)
        if twice is not None:
            raise self.problem(line, f"two columns '{twice}'", "keep one of them")
        return line, found, names, f"{found} " in text

    def _parse(
        self, lines: Iterator[str], skipped: int, delimiter: str, spaced: bool
    ) -> Iterator[tuple[int, list[str]]]:
        """(first line, cells) of each row that is not blank."""
        reader = csv.reader(lines, delimiter=delimiter, skipinitialspace=spaced, strict=True)
        first = skipped + 1
        try:
            for row in reader:
                if row and (len(row) > 1 or row[0].strip()):
                    yield first, row
                first = skipped + reader.line_num + 1
        except csv.Error as error:
            for begins, what, remedy in CSV_ERRORS:
                if begins in str(error):
                    raise self.problem(first, what, remedy) from error
            raise self.problem(first, str(error), "correct the line") from error


def cell_labels(
    text: str,
    separator: str | None,
    index: Mapping[Any, int] | None,
    problem: Callable[[str, str], UserError],
    usual: str = SEPARATOR,
) -> list[str]:
    """The labels that a cell of text names.

    Args:
        text: The cell.
        separator: Of several labels, as the user gives it; None: `usual`, and a label that looks like several is
            refused.
        index: The vocabulary, by every spelling; a whole cell that it holds is one label. None: not known yet.
        problem: Makes an error of what is wrong and what to do.
        usual: Separator where the user gives none; "": nothing separates labels.

    Raises:
        UserError: a label is not in the vocabulary, or it cannot be told whether it is one or several.
    """
    sign, whole = separator or usual, text.strip()
    names = [name for part in (text.split(sign) if sign else [text]) if (name := part.strip())]
    if index is not None:
        unknown = next((name for name in names if name not in index), None)
        if whole in index and (unknown is not None or len(names) < 2):
            return [whole]
        if whole in index:
            what = f"'{whole[:80]}' is a label of the vocabulary and so is each of its parts"
            raise problem(what, "give another --label-separator")
        if unknown is not None:
            marks = (mark for mark in MARKS if mark in unknown) if separator is None else ()
            found = next((mark for mark in marks if all(p.strip() in index for p in unknown.split(mark))), None)
            raise problem(
                f"label '{unknown[:80]}' is not in the vocabulary" + ", but each of its parts is" * (found is not None),
                f"give --label-separator {found!r}" if found else "see --class-labels, or correct it",
            )
        return names
    for name in names:
        mark = next((mark for mark in MARKS if mark in name), None)
        if separator is None and mark is not None:
            other = SEPARATOR if mark != SEPARATOR else ","
            raise problem(
                f"label '{name[:80]}' holds {mark!r}",
                f"give --label-separator {mark!r} where it is several labels, '{other}' where it is one name",
            )
        if name[0] + name[-1] in ("[]", "{}", "()", '""', "''"):
            raise problem(
                f"label '{name[:80]}' stands in brackets or quotation marks", "write labels bare, as dog;bark"
            )
    return names
