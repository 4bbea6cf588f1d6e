"""The bytes of a clip inside a tar, zip, Parquet or HDF5 file, on disk or behind a URL, never unpacked.

In: the name of a source (names.py) and, where it is known, `Clip.at`. Out: its bytes, in an open file; the members of a
container; or a `SourceError`, whose text is the reason for `failures.jsonl`.

| container | `Clip.at` | read by |
|---|---|---|
| tar | offset and size of the payload | one read; a tar that is compressed as a whole cannot be |
| zip, stored or deflated | offset of the local header, compressed size | one read, inflated up to the size declared |
| Parquet | row group, row in it | the column of the audio, a row group at a time, of which two are kept |
| HDF5 | none: the name has the row | one row of int16 or float32, as a WAV |

Sizes that a container declares are compared with its own before anything is read. Behind a URL all reads are ranges.
The index of a tar takes a pass over its headers, so it is kept in CRAFT_CACHE (default: ~/.cache/craft), by path and
stamp.
Memory: the index of one container; of Parquet two row groups, of at most GROUP_BYTES each; of HDF5 a row, or a chunk.
"""

import hashlib
import io
import json
import logging
import math
import os
import struct
import tarfile
import threading
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import IO, Any, BinaryIO, NamedTuple, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile

from pipeline.data import storage
from pipeline.data.storage import attempt, is_remote
from pipeline.errors import UserError
from pipeline.files import new_file, open_regular
from shard_tools.names import BETWEEN, plain, split_source
from shard_tools.segment import MACHINE_ERRNOS, POINTER, MachineError, reason_of
from shard_tools.stamps import Stamp, stamp

log = logging.getLogger(__name__)

Place = tuple[int, int] | None

PIECE = 1 << 20
AHEAD = 1 << 16  # bytes that a request for a header of a tar behind a URL brings
MEMBER_BYTES = 1 << 32  # of one recording; a WAV has no more
BOMB_BYTES, BOMB_RATIO = 1 << 28, 200  # a member of a zip that inflates so far is no recording
TEXT_BYTES = 1 << 20  # of a text beside a recording in a tar, which is kept with the index
TEXT_ENDINGS = (".json", ".cls", ".txt")
GROUP_BYTES = 1 << 31  # of a row group
GROUPS_KEPT = 2  # reading ahead crosses from one to the next
INDEX_VERSION = 2
INDEX = pa.schema([("name", pa.large_binary()), ("offset", pa.int64()), ("size", pa.int64()), ("text", pa.binary())])
LISTED_AT_ONCE = 16  # containers behind URLs, whose listing is waiting
RATES = ("sample_rate", "sampling_rate", "samplerate", "sr", "fs")  # an HDF5 file's attributes
LOCAL_HEADER = struct.Struct("<4sHHHHHIIIHH")
STORED, DEFLATED = 0, 8
OTHER = "damaged: its container has something else where it was listed; is it being written?"


class SourceError(OSError):
    """A source that gives nothing, by its own fault: the text is the reason, its kind before the colon."""


class Member(NamedTuple):
    """A file in a container.

    Attributes:
        name: Of the source, `CONTAINER::MEMBER`.
        at: Where its bytes are.
        size: Its bytes.
        text: Of a small text in a tar, its content.
    """

    name: str
    at: Place
    size: int
    text: bytes | None = None


def members(containers: Iterable[str]) -> Iterator[Member]:
    """Files of tars and zips, in their order, with what is left out or damaged said by container; no audio is read.

    Raises:
        UserError: a container cannot be read, or is none.
    """
    with ThreadPoolExecutor(LISTED_AT_ONCE) as pool:
        queue = iter(containers)
        while batch := list(islice(queue, LISTED_AT_ONCE)):  # those of a disk too: of a network disk
            for found, problems in pool.map(_listing, batch):
                for problem in problems:
                    log.warning("%s", problem)
                yield from found


def extract(path: str, at: Place, target: IO[bytes], now: Stamp) -> None:
    """Writes the bytes of a member into an open file.

    Args:
        path: Name of the source.
        at: Where its bytes are; None: the container is asked.
        target: The file.
        now: Stamp of the container; None: it is not there.

    Raises:
        SourceError: there is no such member, or it is damaged, or more than it may be.
        MachineError: this machine's trouble, or its network's.
        OSError: what the container's store says.
    """
    container, name = split_source(path)
    kind = container.lower().rpartition(".")[2]
    if now is None:
        raise SourceError("vanished: the file is not there any more")
    try:
        if kind == "parquet":
            target.write(_row_of_parquet(container, tuple(now), name, at))
        elif kind in ("h5", "hdf5"):
            _row_of_hdf5(container, tuple(now), name, target)
        else:
            place = at or _index(container, tuple(now)).get(name)
            if place is None:
                raise SourceError(f"vanished: {container.rpartition('/')[2]} holds no such member")
            with _opened(container, now) as file:
                (_tar_member if kind == "tar" else _zip_member)(file, name, *place, target)
        target.flush()
    except (SourceError, MachineError):
        raise
    except UserError as error:
        raise SourceError(f"damaged: {str(error).removeprefix(f'{container}: ')}") from error
    except OSError as error:
        if is_remote(container):
            raise
        found = reason_of(container, error)
        raise found if isinstance(found, MachineError) else SourceError(str(found)) from error


def open_container(path: str) -> BinaryIO:
    """A container as a file that can be read anywhere.

    Raises:
        UserError: it is a pointer of Git-LFS.
        OSError: it cannot be read, or is no regular file.
    """
    raw = _Remote(path) if is_remote(path) else io.FileIO(path, opener=lambda name, _: open_regular(name))
    file = cast(BinaryIO, io.BufferedReader(raw, AHEAD))
    pointer = file.read(len(POINTER)) == POINTER
    file.seek(0)
    if pointer:
        file.close()
        raise UserError(f"{path}: is a pointer of Git-LFS, not the file; run 'git lfs pull' where it was cloned")
    return file


class ParquetSource:
    """A Parquet file of recordings; use it in `with`.

    Args:
        path: Or URL.

    Attributes:
        file: As pyarrow has it.
        audio: Path of the column with the recordings' bytes; "": there is none.
        size: Bytes of the file.

    Raises:
        UserError: it is no Parquet file, or cut.
        OSError: it cannot be read.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._handle = open_container(path)
        try:
            self.size = self._handle.seek(0, io.SEEK_END)
            self.file = pq.ParquetFile(self._handle)
            self.schema: pa.Schema = self.file.schema_arrow
        except (OSError, ValueError, pa.ArrowException) as error:
            self._handle.close()
            if isinstance(error, OSError) and (error.errno in MACHINE_ERRNOS or is_remote(path)):
                raise
            reason = _first_line(error)
            raise UserError(f"{path}: no Parquet file, or a truncated one ({reason}); get it again") from error
        self.audio = self._audio()

    def __enter__(self) -> "ParquetSource":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()
        self._handle.close()

    def _audio(self) -> str:
        found = []
        for field in self.schema:
            kinds = {f"{field.name}.{inner.name}": inner.type for inner in field.type} \
                if pa.types.is_struct(field.type) else {field.name: field.type}  # fmt: skip
            found += [
                name
                for name, type_ in kinds.items()
                if pa.types.is_binary(type_)
                or pa.types.is_large_binary(type_)
                or (pa.types.is_null(type_) and name.endswith(".bytes"))
            ]
        named = [name for name in found if name.split(".")[0] in ("audio", "wav", "flac", "mp3", "bytes")]
        return next(iter(named or (found if len(found) == 1 else [])), "")


def _listing(container: str) -> tuple[list[Member], list[str]]:
    """Members of a tar or zip, and what is to be said of it."""
    kind = container.lower().rpartition(".")[2]
    listed, problems, unsafe, doubles, forks = dict[str, Member](), list[str](), list[str](), 0, 0
    try:
        found, problems = _tar_index(container) if kind == "tar" else _zip_index(container)
    except OSError as error:
        raise UserError(f"{container}: {error}; check the path, or get the file again") from error
    for raw, at, size, text in found:
        name = plain(raw)
        if name is None:
            unsafe.append(raw)
            continue
        if name.rpartition("/")[2].startswith("._"):
            forks += 1
            continue
        doubles += name in listed
        listed[name] = Member(f"{container}{BETWEEN}{name}", at, size, text)
    if unsafe:
        problems.append(f"{len(unsafe)} members are left out, as their names lead elsewhere, such as {unsafe[0]!r:.80}")
    if forks:
        problems.append(f"{forks} members are left out, as macOS put them beside files of the same name (._NAME)")
    if doubles:
        problems.append(f"{doubles} members have the name of an earlier one, and take its place")
    return list(listed.values()), [f"{container}: {problem}" for problem in problems]


@lru_cache(maxsize=4)
def _index(container: str, _: tuple[int | str, ...]) -> dict[str, Place]:
    """Where the members of a tar or zip are, by name; the second argument is the container's stamp."""
    return {split_source(member.name)[1]: member.at for member in _listing(container)[0]}


Entry = tuple[str, Place, int, bytes | None]


def _tar_index(container: str) -> tuple[list[Entry], list[str]]:
    """Members of a tar and what is wrong with it, from the cache or from its headers."""
    name = container if is_remote(container) else os.path.abspath(container)
    content = json.dumps([INDEX_VERSION, name, stamp(container)])
    folder = Path(os.environ.get("CRAFT_CACHE", "") or "~/.cache/craft").expanduser() / "sources"
    kept = folder / f"{hashlib.blake2b(content.encode(), digest_size=16).hexdigest()}.parquet"
    with suppress(OSError, ValueError, KeyError, pa.ArrowException):
        table = pq.read_table(kept)
        columns = [table[name].to_pylist() for name in INDEX.names]
        rows: list[Entry] = [(name.decode("utf-8", "surrogateescape"), (offset, size), size, text)
                             for name, offset, size, text in zip(*columns, strict=True)]  # fmt: skip
        return rows, list(json.loads(table.schema.metadata[b"problems"]))
    with open_container(container) as file:
        found, problems = _tar_headers(container, file)
    names = [name.encode("utf-8", "surrogateescape") for name, _, _, _ in found]
    places = [at or (0, 0) for _, at, _, _ in found]
    table = pa.Table.from_arrays(
        [pa.array(names, pa.large_binary()), pa.array([at[0] for at in places], pa.int64()),
         pa.array([at[1] for at in places], pa.int64()), pa.array([text for *_, text in found], pa.binary())],
        schema=INDEX.with_metadata({"problems": json.dumps(problems)}),
    )  # fmt: skip
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with new_file(kept) as path:
            pq.write_table(table, path, compression="zstd")
    except OSError as error:
        log.info("%s: the index of %s is not kept: %s", folder, container, error)
    return found, problems


def _tar_headers(container: str, file: BinaryIO) -> tuple[list[Entry], list[str]]:
    """One pass over the headers.

    Raises:
        UserError: it is no tar.
    """
    found: list[Entry] = []
    problems: list[str] = []
    left_out = 0
    whole = file.seek(0, io.SEEK_END)
    file.seek(0)
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            try:
                while (info := tar.next()) is not None:
                    tar.members = []  # type: ignore[attr-defined] # which it would keep
                    if info.isfile() and not info.issparse():
                        text = None
                        if info.name.lower().endswith(TEXT_ENDINGS) and info.size <= TEXT_BYTES:
                            file.seek(info.offset_data)
                            text = file.read(info.size)
                        found.append((info.name, (info.offset_data, info.size), info.size, text))
                    elif not info.isdir():
                        left_out += 1
                file.seek(tar.offset)
                rest = file.read(tarfile.BLOCKSIZE)
                if rest.strip(b"\0"):
                    problems.append(f"damaged: no header at byte {tar.offset}; what comes after it is not read")
                elif not rest:
                    problems.append(f"has no end of archive: perhaps cut after {len(found)} members; get it again")
                elif after := _after_zeros(file):
                    problems.append(f"{after} bytes after the end of the archive are not read: several tars in one? "
                                    "unpack it with 'tar -x -i', and pack one tar")  # fmt: skip
            except tarfile.ReadError:
                last = found[-1][0] if found else "its first header"
                problems.append(f"truncated: it ends within {last} ({whole} bytes); get it again")
    except tarfile.TarError as error:
        raise UserError(f"{container}: no tar ({error}); get it again, or move it away") from error
    if left_out:
        problems.append(f"{left_out} links, devices or sparse files are left out")
    return found, problems


def _after_zeros(file: BinaryIO) -> int:
    """How many bytes are left from the first one on that is not 0."""
    while piece := file.read(PIECE):
        if rest := piece.lstrip(b"\0"):
            place = file.tell()
            return len(rest) + file.seek(0, io.SEEK_END) - place
    return 0


def _zip_index(container: str) -> tuple[list[Entry], list[str]]:
    """Members of a zip.

    Raises:
        UserError: it is none, or cut.
    """
    try:
        with open_container(container) as file, zipfile.ZipFile(file) as whole:
            infos = [info for info in whole.infolist() if not info.is_dir()]
    except (zipfile.BadZipFile, NotImplementedError, ValueError, EOFError, struct.error) as error:
        raise UserError(f"{container}: no zip, or a truncated one ({error}); get it again, or move it away") from error
    bombs = [info for info in infos
             if info.file_size > min(MEMBER_BYTES, max(BOMB_BYTES, BOMB_RATIO * info.compress_size))]  # fmt: skip
    problems = [f"{len(bombs)} members are left out, as they would inflate to {bombs[0].file_size} bytes and the like, "
                f"such as {bombs[0].filename!r:.80}"] if bombs else []  # fmt: skip
    left = {id(info) for info in bombs}
    found: list[Entry] = [(info.filename, (info.header_offset, info.compress_size), info.file_size, None)
                          for info in infos if id(info) not in left]  # fmt: skip
    return found, problems


def _tar_member(file: "_Descriptor | _Remote", name: str, offset: int, size: int, target: IO[bytes]) -> None:
    if size > MEMBER_BYTES:
        raise SourceError(f"unreadable: {size} bytes, and a recording in a tar may have {MEMBER_BYTES}; cut it")
    if offset < tarfile.BLOCKSIZE or size < 0 or offset + size > file.size:
        raise SourceError(f"truncated: its tar ends within it ({size} bytes were to come)")
    block = file.range(offset - tarfile.BLOCKSIZE, tarfile.BLOCKSIZE, size + tarfile.BLOCKSIZE)
    try:
        header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.TarError as error:
        raise SourceError(OTHER) from error
    short = name.isascii() and len(name) < tarfile.LENGTH_NAME - 2  # the header has all of it, with ./ before
    if header.size != size or (short and plain(header.name) != name):
        raise SourceError(OTHER)
    for start in range(0, size, PIECE):
        piece = file.range(offset + start, min(PIECE, size - start), size - start)
        target.write(piece)


def _zip_member(file: "_Descriptor | _Remote", name: str, offset: int, packed: int, target: IO[bytes]) -> None:
    whole = LOCAL_HEADER.size + packed
    if offset < 0 or packed < 0 or offset + whole > file.size:
        raise SourceError(f"truncated: its zip ends within it ({packed} bytes were to come)")
    head = LOCAL_HEADER.unpack(file.range(offset, LOCAL_HEADER.size, min(whole + 1024, file.size - offset)))
    magic, _, flags, method, _, _, crc, _, size, name_bytes, extra_bytes = head
    if magic != b"PK\x03\x04":
        raise SourceError(OTHER)
    called = file.range(offset + LOCAL_HEADER.size, min(name_bytes, file.size - offset - LOCAL_HEADER.size), 0)
    if name.isascii() and plain(called.decode("latin-1")) != name:
        raise SourceError(OTHER)
    if flags & 1:
        raise SourceError("unreadable: it is encrypted; unpack the zip")
    if method not in (STORED, DEFLATED):
        raise SourceError(f"undecodable: packed by method {method} of zips; unpack the zip, or pack it by deflate")
    known = not flags & 8 and size != 0xFFFFFFFF  # 8: size and CRC follow what is packed
    most = min(MEMBER_BYTES, size if known else max(BOMB_BYTES, BOMB_RATIO * packed))
    first = offset + LOCAL_HEADER.size + name_bytes + extra_bytes
    if first + packed > file.size:
        raise SourceError(f"truncated: its zip ends within it ({packed} bytes were to come)")
    inflate, came, sum_ = zlib.decompressobj(-zlib.MAX_WBITS), 0, 0

    def put(piece: bytes) -> None:
        nonlocal came, sum_
        came += len(piece)
        if came > most:
            raise SourceError(f"damaged: it inflates to more than the {most} bytes that it may have")
        sum_ = zlib.crc32(piece, sum_)
        target.write(piece)

    for start in range(0, packed, PIECE):
        piece = file.range(first + start, min(PIECE, packed - start), packed - start)
        try:
            while piece and method == DEFLATED and not inflate.eof:
                put(inflate.decompress(piece, PIECE))
                piece = inflate.unconsumed_tail
        except zlib.error as error:
            raise SourceError(f"damaged: {error}") from error
        if method == STORED:
            put(piece)
    while method == DEFLATED and not inflate.eof and (rest := inflate.decompress(b"", PIECE)):
        put(rest)
    if method == DEFLATED and not inflate.eof:
        raise SourceError("damaged: what is packed ends too early")
    sums = [crc]
    if flags & 8:  # some writers leave out what should follow, and have the CRC in its place all the same
        after = file.range(first + packed, min(8, file.size - first - packed), 0)
        sums.append(int.from_bytes(after.removeprefix(b"PK\x07\x08")[:4], "little"))
    if sum_ not in sums or (known and came != size):
        raise SourceError("damaged: its CRC-32 is not the one in its zip")


_groups: "OrderedDict[tuple[Any, ...], Any]" = OrderedDict()
_loading = threading.Lock()


def _row_of_parquet(container: str, now: tuple[int | str, ...], name: str, at: Place) -> bytes:
    key = (container, *now)
    with _loading:
        if at is None:
            at = _row_group(container, name)
        group = (*key, at[0])
        if group not in _groups:
            while len(_groups) >= GROUPS_KEPT:
                _groups.popitem(last=False)
            _groups[group] = _group(container, at[0])
        _groups.move_to_end(group)
        column = _groups[group]
    if at[1] >= len(column):
        raise SourceError("vanished: its Parquet file has no such row")
    content = column[at[1]][0].as_py()
    content = next(iter(content.values())) if isinstance(content, dict) else content
    if not content:
        raise SourceError("empty: the row holds no bytes of audio")
    return bytes(content)


def _group(container: str, number: int) -> list[pa.Array]:
    """The rows of a row group, each an array of its own.

    A value that comes again and again costs a few bytes in the file, and all of its bytes in each row. So rows are
    read one by one (which takes less time and memory than all at once), and equal ones that follow one another, such
    as segments of one recording, share theirs.
    """
    with ParquetSource(container) as source:
        if not source.audio:
            raise SourceError("vanished: its Parquet file has no column of audio")
        if number >= source.file.num_row_groups:
            raise SourceError("vanished: its Parquet file has no such row group")
        size = source.file.metadata.row_group(number).total_byte_size
        if size > GROUP_BYTES:
            raise SourceError(
                f"unreadable: row group {number} holds {size / 1e9:.1f} GB, and one is read at a time; write the file "
                "anew with row groups of some hundred rows"
            )
        most, rows, came = min(GROUP_BYTES, max(BOMB_BYTES, BOMB_RATIO * source.size)), list[pa.Array](), 0
        try:
            for batch in source.file.iter_batches(1, [number], [source.audio], use_threads=False):
                row = batch.column(0)
                if rows and row.equals(rows[-1]):
                    row = rows[-1]
                else:
                    came += row.get_total_buffer_size()
                if came > most:
                    raise SourceError(
                        f"unreadable: row group {number} would be more than {most} bytes in memory, out of a file of "
                        f"{source.size}; write the file anew with smaller row groups"
                    )
                rows.append(row)
        except (OSError, ValueError, MemoryError, pa.ArrowException) as error:
            trouble = isinstance(error, OSError) and (error.errno in MACHINE_ERRNOS or is_remote(container))
            if trouble or isinstance(error, SourceError):
                raise
            raise SourceError(f"damaged: row group {number}: {_first_line(error)}") from error
        return rows


def _row_group(container: str, name: str) -> tuple[int, int]:
    """Row group and row in it of a row's number."""
    row = int(name) if name.isdecimal() and len(name) < 16 else -1
    with ParquetSource(container) as source:
        for number in range(source.file.num_row_groups if row >= 0 else 0):
            rows = source.file.metadata.row_group(number).num_rows
            if row < rows:
                return number, row
            row -= rows
    raise SourceError("vanished: its Parquet file has no such row")


def waveforms(file: Any) -> Any:
    """The dataset of an HDF5 file that holds a recording a row; None: there is none.

    Raises:
        SourceError: the file takes something from other files, which a stranger's could be any of this machine; or a
            row of its recordings, or a chunk of rows, would be more than it may be.
    """
    import h5py  # see `_hdf5`

    found: list[Any] = []
    for name in file:
        value: Any = file[name] if isinstance(file.get(name, getlink=True), h5py.HardLink) else None
        if value is None or (isinstance(value, h5py.Dataset) and (value.external or value.is_virtual)):
            raise SourceError(f"unreadable: '{name:.40}' is a link, or lies in other files; copy all into one file")
        if getattr(value, "ndim", 0) == 2 and value.dtype.kind + str(value.dtype.itemsize) in ("i2", "f4", "f8"):
            found.append(value)
    named = [value for value in found if value.name.rpartition("/")[2] in ("waveform", "waveforms", "audio")]
    rows = next(iter(named or (found if len(found) == 1 else [])), None)
    if rows is not None:
        size = rows.dtype.itemsize * max(rows.shape[1], math.prod(rows.chunks or ()))
        if size > min(MEMBER_BYTES, max(BOMB_BYTES, BOMB_RATIO * rows.id.get_storage_size())):
            raise SourceError(f"unreadable: a row or chunk would be {size} bytes, more than a recording may have")
    return rows


def rate_of(file: Any) -> int | None:
    """Sample rate, Hz, that the attributes of an HDF5 file or of its recordings say."""
    for place in (file, waveforms(file)):
        for name in RATES if place is not None else ():
            if name in place.attrs:
                return int(place.attrs[name])
    return None


def _row_of_hdf5(container: str, now: tuple[int | str, ...], name: str, target: IO[bytes]) -> None:
    number, _, given = name.partition("@")
    try:
        file = _hdf5(container, now, os.getpid())
        rows = waveforms(file)
        rate = int(given) if given else rate_of(file)
        if rows is None or not number.isdecimal() or int(number) >= len(rows):
            raise SourceError("vanished: its HDF5 file has no such row")
        if rate is None or not 0 < rate < 1 << 24:
            raise SourceError("sample rate: its HDF5 file does not say it; build with --source-rate")
        row = rows[int(number)]
        subtype, kind = ("PCM_16", np.int16) if row.dtype.kind == "i" else ("FLOAT", np.float32)
        wav = io.BytesIO()
        soundfile.write(wav, row.astype(kind), rate, format="WAV", subtype=subtype)
    except (OSError, RuntimeError, KeyError, ValueError, TypeError, MemoryError) as error:  # h5py's kinds of damage
        machine = isinstance(error, OSError) and (error.errno in MACHINE_ERRNOS or is_remote(container))
        if machine or isinstance(error, (SourceError, MachineError)):
            raise
        raise SourceError(f"damaged: {_first_line(error)}") from error
    target.write(wav.getbuffer())


def _first_line(error: BaseException) -> str:
    """Of what a library says, which may be nothing."""
    return next(iter(str(error).splitlines()), type(error).__name__)[:160]


@lru_cache(maxsize=2)
def _hdf5(container: str, _: tuple[int | str, ...], __: int) -> Any:
    """An open HDF5 file, by path, stamp and process."""
    import h5py  # 0.2 s, which builds of anything else need not wait for

    return h5py.File(open_container(container) if is_remote(container) else container, "r")


class _Descriptor:
    """A local container; closed when nobody uses it any more."""

    def __init__(self, path: str) -> None:
        self._number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.size = os.fstat(self._number).st_size

    def __del__(self) -> None:
        with suppress(AttributeError):  # it could not be opened
            os.close(self._number)

    def range(self, offset: int, size: int, _: int) -> bytes:
        """Bytes from an offset on.

        Raises:
            SourceError: the file ends before.
        """
        content = os.pread(self._number, size, offset)
        while len(content) < size:
            more = os.pread(self._number, size - len(content), offset + len(content))
            if not more:
                raise SourceError("truncated: its container ends within it")
            content += more
        return content


@lru_cache(maxsize=16)
def _descriptor(path: str, _: tuple[int, ...]) -> _Descriptor:
    return _Descriptor(path)


@contextmanager
def _opened(container: str, now: Stamp) -> "Iterator[_Descriptor | _Remote]":
    if is_remote(container):
        yield _Remote(container, int(now[0]) if now else None)
        return
    status = os.stat(container)  # a file that takes its place is another one
    yield _descriptor(container, (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns))


class _Remote(io.RawIOBase):
    """A file behind a URL, read by ranges.

    Args:
        url: Of the file.
        size: Its bytes; None: the store is asked.
    """

    def __init__(self, url: str, size: int | None = None) -> None:
        self._url = url
        self._system, self._path = storage.file_system(url)
        if size is None:
            info = attempt(lambda: storage.transfer(self._system, "info", 0, self._path), url)
            size = int(info["size"] or 0)
        self.size, self._place = size, 0
        self._first, self._block = 0, b""

    def range(self, offset: int, size: int, ahead: int) -> bytes:
        """Bytes from an offset on.

        Args:
            offset: Where they begin.
            size: How many.
            ahead: How many more are asked for soon: one request brings them.

        Raises:
            OSError: the store does not give them.
        """
        start = offset - self._first
        if not 0 <= start <= start + size <= len(self._block):
            end = min(self.size, offset + max(size, min(ahead, storage.BLOCK)))
            self._block, self._first, start = attempt(lambda: self._get(offset, end), self._url), offset, 0
        return self._block[start : start + size]

    def _get(self, start: int, end: int) -> bytes:
        content: bytes = storage.transfer(self._system, "cat_file", end - start, self._path, start=start, end=end)
        if len(content) != end - start:
            raise OSError(f"{len(content)} bytes came where {end - start} were asked for: does it give ranges?")
        return content

    def readable(self) -> bool:
        """Always."""
        return True

    def seekable(self) -> bool:
        """Always."""
        return True

    def tell(self) -> int:
        """Where the next byte comes from."""
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Goes to a byte."""
        self._place = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self.size}[whence])
        return self._place

    def readinto(self, buffer: Any) -> int:
        """Fills a buffer, or what of it the file still has."""
        size = max(0, min(len(buffer), self.size - self._place))
        if size:
            buffer[:size] = self.range(self._place, size, AHEAD)
            self._place += size
        return size
