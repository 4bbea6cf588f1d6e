"""VGGSound: a csv without a header, and clips named after videos.

| file below the root | what |
|---|---|
| vggsound.csv, or --table | YouTube id, start in seconds, label, `train` or `test` |
| anywhere | ID_SSSSSS.wav, ID_START_END.flac and the like, with a Y before or without: the 10 s from START on |
"""

from collections.abc import Iterator

from pipeline.data.storage import join
from shard_tools.audio_files import plain_times, segment_names
from shard_tools.catalogs import SEGMENT_ID, Catalog, of_several_segments
from shard_tools.forms.entries import Asked, Entry, Files, assemble
from shard_tools.tables import Table

MARK = "vggsound.csv"
SECONDS = 10.0


def read(asked: Asked) -> Catalog:
    """Its catalog.

    Raises:
        UserError: the csv is missing or malformed, or no file is there.
    """
    source, files = Table(asked.table or join(asked.root, MARK)), Files(asked.root, plain_times)

    def rows() -> Iterator[tuple[int, str, float, str, str]]:
        for line, row in source.rows():
            if len(row) != 4:
                raise source.problem(line, f"{len(row)} cells, not id,start,label,split", "get the csv again")
            name, start = row[0], source.seconds(line, "start", row[1])
            if SEGMENT_ID.fullmatch(name) is None:
                raise source.problem(line, f"'{name[:40]}' is no YouTube id", "get the csv again")
            yield line, name, start, row[2].strip(), row[3].strip()

    several = of_several_segments((name, start) for _, name, start, _, _ in rows())

    def entries() -> Iterator[Entry]:
        for line, name, start, label, split in rows():
            found = files.find(segment_names(name, start, start + SECONDS))
            stem, path, at = found[0] if found else ("", "", None)
            video = (plain_times(name), plain_times(f"Y{name}"))
            whole = stem in video
            first = start if whole else 0.0
            others = tuple((path, at) for stem, path, at in found[1:] if (stem in video) == whole)
            guess = False if hash(name) in several else None  # one file cannot be each of several segments
            yield Entry(f"{name}_{int(start):06d}", path, [label], split, line, at, first, first + SECONDS,
                        trimmed=guess if whole else True, others=others)  # fmt: skip

    return assemble("vggsound", asked, entries, None, files.report, source.path)
