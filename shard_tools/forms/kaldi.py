"""A Kaldi data directory.

| file in the root | what |
|---|---|
| wav.scp | recording and path; commands (`... |`) are refused |
| text | utterance and its labels, separated by spaces, or as --label-separator says; one without a line is left out |
| segments | if it is there: utterance, recording, start and end in seconds |
"""

import logging
from collections.abc import Iterator

from pipeline.data.storage import entries as files_in
from pipeline.data.storage import join
from shard_tools.catalogs import Catalog, Names
from shard_tools.forms.entries import Asked, Entry, Files, assemble, lines_of
from shard_tools.tables import Table

log = logging.getLogger(__name__)

MARK = "wav.scp"


def read(asked: Asked) -> Catalog:
    """Its catalog.

    Raises:
        UserError: a file is missing or malformed, or no audio is there.
    """
    root, files = asked.root, Files(asked.root)
    scp, text = Table(join(root, MARK)), Table(join(root, "text"))
    called, paths = Names(root, scp.path), dict[str, str]()
    for line, words in lines_of(scp.lines()):
        name, *path = words.split(None, 1)
        if not path or path[0].endswith("|"):
            what = "a command, not a path" if path else "a recording without a path"
            raise scp.problem(line, f"'{words[:80]}' is {what}", "write RECORDING PATH, of audio that is there")
        if paths.setdefault(name, path[0]) != path[0]:
            raise scp.problem(line, f"'{name[:60]}' came before with another path", "keep one of the lines")
    segments: dict[str, tuple[str, float, float]] = {}
    if "segments" in files_in(root):
        cuts = Table(join(root, "segments"))
        for line, words in lines_of(cuts.lines()):
            cells = words.split()
            if len(cells) != 4:
                raise cuts.problem(line, f"{len(cells)} words", "write UTTERANCE RECORDING START END")
            start, end = (cuts.seconds(line, "a time", cell) for cell in cells[2:])
            if segments.setdefault(cells[0], (cells[1], start, end)) != (cells[1], start, end):
                raise cuts.problem(line, f"'{cells[0][:60]}' came before with another segment", "keep one of the lines")

    unnamed = dict.fromkeys(segments or paths)  # utterances, in order; those of `text` are taken out

    def entries() -> Iterator[Entry]:
        for line, words in lines_of(text.lines()):
            name, *rest = words.split(None, 1)
            cell = "".join(rest)
            labels = cell if asked.separator else cell.split()
            recording, start, end = segments.get(name, (name, 0.0, None))
            if recording not in paths:
                what = f"utterance '{name[:60]}' has no recording in {MARK}"
                raise text.problem(line, what, "add it, or delete the line")
            unnamed.pop(name, None)
            where, _ = called.of(paths[recording])
            yield Entry(name, files.at(where), labels, "", line, start=start, end=end, trimmed=False if start else None)

    catalog = assemble("kaldi", asked, entries, None, files.report, text.path)
    if unnamed:
        log.warning("%s: %d utterances are not in it, such as '%s', and are left out; a line with the name alone takes "
                    "one without a label", text.path, len(unnamed), next(iter(unnamed)))  # fmt: skip
    return catalog
