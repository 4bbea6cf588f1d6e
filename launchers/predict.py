r"""Label recordings with a finetuned run.

    python launchers/predict.py --checkpoint RUN_DIR AUDIO [AUDIO ...] [--top 5]
    python launchers/predict.py --checkpoint RUN_DIR meeting.m4a --events [--hop 1] [--threshold 0.5]
    cat dog.mp3 | python launchers/predict.py --checkpoint RUN_DIR - --format json
    python launchers/predict.py --checkpoint RUN_DIR recordings/ --format csv --out labels.csv --embeddings v.parquet

In: a run directory of finetune.py, a directory of `export.py --format hf-craft` or one on the Hugging Face hub,
hf://OWNER/NAME; and audio of any codec, rate and length: files, folders (all audio below), or -
for standard input. Out: the best labels of each recording, the mean over its windows of a clip's length; with
--events, what was heard when. A recording that cannot be read is said on stderr and makes the exit status 1;
the others are labelled all the same. How many files of a folder are skipped, since their endings are not of audio
or they are hidden, is said too.

Labels are written recording by recording: those of a run that was stopped can be used. The file of --embeddings
appears when all is heard. What is not UTF-8 in a name is written as \xNN.
"""

import argparse
import csv
import io
import json
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.command_line import new_parser, path_of
from pipeline.config import PRECISIONS
from pipeline.errors import UserError, run_cli
from pipeline.files import check_output_directory, check_output_file, new_file, write_text
from pipeline.hub import model_of

if TYPE_CHECKING:
    from pipeline.serving.listen import Heard
    from pipeline.serving.scorer import Scorer

FORMATS = ("table", "json", "csv", "audacity")
LABEL_COLUMNS = ["path", "rank", "label", "id", "score"]
EVENT_COLUMNS = ["path", "start", "end", "label", "id", "score"]
MOST_STDIN = 16 << 30  # bytes: a day of 16-bit stereo at 44.1 kHz
PIECE = 1 << 20
GROUP = 2048  # windows of a row group: Parquet keeps some 30 kB of each until the file ends


def parser() -> argparse.ArgumentParser:
    """The command line."""
    make = new_parser(__doc__)
    add = make.add_argument
    add("--checkpoint", required=True, type=model_of("--checkpoint"), metavar="RUN",
        help="a finetuned run, an hf-craft export of one, or hf://OWNER/NAME (no default)")  # fmt: skip
    add("audio", nargs="+", metavar="AUDIO", help="audio files, folders, or - for standard input")
    add("--precision", choices=PRECISIONS, default="fp32", help="of the network's arithmetic (default: fp32)")
    add("--top", type=int, default=5, metavar="K", help="labels of a recording (default: 5)")
    add("--events", action="store_true", help="what was heard when (default: labels of the whole recording)")
    add("--hop", type=float, metavar="S", help="seconds between windows (default: a clip; --events: half of one)")
    add("--threshold", type=float, default=0.5, metavar="P", help="least probability of an event (default: 0.5)")
    add("--format", choices=FORMATS, help="json: an object a line; audacity: a label track, of events (default: table)")
    add("--json", action="store_const", const="json", dest="format", help="short for --format json")
    add("--out", type=path_of("--out"), metavar="PATH",
        help="file to write; audacity with several recordings: a folder (default: standard output)")  # fmt: skip
    add("--embeddings", type=path_of("--embeddings"), metavar="PARQUET",
        help="write each window's path, start, end, vector (default: no)")  # fmt: skip
    return make


def described(args: argparse.Namespace, scorer: "Scorer", heard: "Heard") -> str:
    """What was heard in a recording, as --format says."""
    from pipeline.serving import listen  # torch: not for --help

    title = f"{printable(heard.path)}  ({listen.clock(heard.seconds)})\n"
    about = {"path": heard.path, "seconds": round(heard.seconds, 3)}
    if not args.events:
        best = listen.whole(heard, scorer.spec.labels, args.top)
        if args.format == "json":
            labels = [{"label": label.name, "id": label.id, "score": round(score, 6)} for label, score in best]
            return json.dumps(about | {"labels": labels}, ensure_ascii=False) + "\n"
        if args.format == "csv":
            return table([heard.path, rank, label.name, label.id, f"{score:.6f}"]
                         for rank, (label, score) in enumerate(best, start=1))  # fmt: skip
        return title + "".join(f"  {score:6.3f} {listen.bar(score):30s} {label.name}\n" for label, score in best)
    found = listen.events(heard, scorer.spec.labels, scorer.seconds, args.threshold)
    if args.format == "audacity":
        return listen.audacity(found)
    if args.format == "json":
        rows = [{"start": round(e.start, 3), "end": round(e.end, 3), "label": e.label.name, "id": e.label.id,
                 "score": round(e.score, 6)} for e in found]  # fmt: skip
        return json.dumps(about | {"events": rows}, ensure_ascii=False) + "\n"
    if args.format == "csv":
        return table([heard.path, f"{e.start:.3f}", f"{e.end:.3f}", e.label.name, e.label.id, f"{e.score:.6f}"]
                     for e in found)  # fmt: skip
    lines = [f"  {f'{listen.clock(e.start)} - {listen.clock(e.end)}':21s} {e.score:6.3f} "
             f"{listen.bar(e.score, 20):20s} {e.label.name}\n" for e in found]  # fmt: skip
    return title + "".join(lines or [f"  nothing reaches {args.threshold:g}\n"])


def table(rows: Iterable[Sequence[object]]) -> str:
    """Rows of CSV."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


@contextmanager
def embeddings_file(path: Path, scorer: "Scorer") -> Iterator[Callable[["Heard"], None]]:
    """Writes windows' vectors, many recordings a row group; the file appears whole at the end, or not at all."""
    width = scorer.hear([np.zeros(1, np.float32)])[1].shape[1]
    schema = pa.schema({"path": pa.string(), "start": pa.float64(), "end": pa.float64(),
                        "embedding": pa.list_(pa.float32(), width)})  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    with new_file(path) as temporary, pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
        waiting: list[pa.Table] = []

        def write(heard: "Heard") -> None:
            vectors = pa.FixedSizeListArray.from_arrays(pa.array(heard.embeddings.reshape(-1)), width)
            columns = [[heard.path] * len(vectors), heard.starts, heard.ends(scorer.seconds), vectors]
            waiting.append(pa.table(columns, schema=schema))
            if sum(map(len, waiting)) >= GROUP:
                writer.write_table(pa.concat_tables(waiting))
                waiting.clear()

        yield write
        if waiting:
            writer.write_table(pa.concat_tables(waiting))


def main() -> int:
    """Parses, listens, writes."""
    args = parser().parse_args()
    args.format = args.format or "table"
    args.events = args.events or args.format == "audacity"
    check(args)
    from pipeline.serving.listen import find_audio  # torch: not for --help
    from pipeline.serving.scorer import load_scorer

    names, unread, skipped = find_audio(args.audio)
    if "-" in names and sys.stdin is None:
        raise UserError("-: standard input is closed; pipe a recording into it")
    tracks = check_outputs(args, names)
    for line in [*skipped, *unread]:
        say(line)
    failed, count = len(unread), len(unread) + len(names)
    if names:
        failed += hear(args, load_scorer(args.checkpoint, precision=args.precision), names, tracks)
    if failed and count > 1:
        say(f"{failed} of {count} recordings could not be read")
    return 1 if failed else 0


def hear(args: argparse.Namespace, scorer: "Scorer", names: list[str], tracks: dict[str, Path]) -> int:
    """Writes what is heard in the recordings; returns how many could not be read."""
    from pipeline.serving.listen import listen

    hop = args.hop or scorer.seconds / (2 if args.events else 1)
    failed = 0
    with one_line_of_errors(args), ExitStack() as stack:
        out = sys.stdout
        if args.out and not tracks:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            out = stack.enter_context(args.out.open("w", encoding="utf-8"))
        if args.format == "csv":
            out.write(table([EVENT_COLUMNS if args.events else LABEL_COLUMNS]))
        tracks = {utf8(name): file for name, file in tracks.items()}
        embed = stack.enter_context(embeddings_file(args.embeddings, scorer)) if args.embeddings else None
        for heard in listen(scorer, sources(names, stack), hop):
            if heard.error:
                say(f"{heard.path}: {heard.error}")
                failed += 1
            if not len(heard.starts):
                continue
            if heard.path in tracks:
                tracks[heard.path].parent.mkdir(parents=True, exist_ok=True)
                write_text(tracks[heard.path], described(args, scorer, heard))
            else:
                out.write(described(args, scorer, heard))
                out.flush()
            if embed:
                embed(heard)
    return failed


@contextmanager
def one_line_of_errors(args: argparse.Namespace) -> Iterator[None]:
    """A disk that is full or away ends the work with one line."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        outputs = [str(path) for path in (args.out, args.embeddings) if path] or ["standard output"]
        place = error.filename or " or ".join(outputs)
        raise UserError(f"{place}: {error.strerror or error}; the work stops there") from error


def check(args: argparse.Namespace) -> None:
    """Checks the options' ranges.

    Raises:
        UserError: one is outside.
    """
    if args.hop is not None and not (args.hop > 0 and math.isfinite(args.hop)):
        raise UserError(f"--hop {args.hop} is not positive and finite; give seconds")
    if not 0 < args.threshold <= 1:
        raise UserError(f"--threshold {args.threshold} is no probability; give one above 0, at most 1")
    if args.top < 1:
        raise UserError(f"--top {args.top} is not positive; give 1 or more")


def check_outputs(args: argparse.Namespace, names: list[str]) -> dict[str, Path]:
    """Tries the places that will be written, before the work.

    Returns:
        File of each recording's label track, where they are a file each.

    Raises:
        UserError: a place cannot be written, or is one of the recordings.
    """
    tracks: dict[str, Path] = {}
    several = len(names) > 1
    if args.format == "audacity" and several and args.out is None:
        raise UserError("--format audacity with several recordings is a file each; give --out FOLDER")
    if args.format == "audacity" and args.out and (several or args.out.is_dir()):
        check_output_directory(args.out, "--out")
        tracks = track_files(names, args.out)
    elif args.out:
        check_output_file(args.out, "--out")
    if args.embeddings:
        check_output_file(args.embeddings, "--embeddings")
    outputs = [path for path in (*(tracks.values() or [args.out]), args.embeddings) if path]
    recordings = {os.path.realpath(name) for name in names} if outputs else set()
    for path in outputs:
        if os.path.realpath(path) in recordings:
            raise UserError(f"{path}: is one of the recordings, and would be written over; name another place")
    if len({os.path.realpath(path) for path in outputs}) < len(outputs):
        raise UserError(f"--out {args.out}: two files would have one name there; name another place")
    return tracks


def track_files(names: list[str], folder: Path) -> dict[str, Path]:
    """File of each recording's label track: below `folder` as the recordings below the folder that they share."""
    files = {name: os.path.abspath(name) for name in names if name != "-"}
    shared = os.path.commonpath([os.path.dirname(file) for file in files.values()]) if files else ""
    tracks = {name: folder / f"{os.path.relpath(file, shared)}.txt" for name, file in files.items()}
    return tracks | ({"-": folder / "stdin.txt"} if "-" in names else {})


def sources(names: list[str], stack: ExitStack) -> Iterator[tuple[str, str]]:
    """(name in UTF-8, path) of each; standard input is written to a file first: decoders seek.

    Raises:
        UserError: there is no room for standard input, or it has no end.
    """
    for name in names:
        if name != "-":
            yield utf8(name), name
            continue
        try:
            file = stack.enter_context(tempfile.NamedTemporaryFile(suffix=".audio"))  # noqa: SIM115 - the stack closes
            while piece := sys.stdin.buffer.read(PIECE):
                if file.tell() + len(piece) > MOST_STDIN:
                    raise UserError(f"-: standard input has more than {MOST_STDIN >> 30} GiB; name a file instead")
                file.write(piece)
            file.flush()
        except OSError as error:
            raise UserError(f"-: {error.strerror}; standard input is kept in {tempfile.gettempdir()}") from error
        yield name, file.name


def utf8(name: str) -> str:
    r"""A file's name as text; bytes that are not UTF-8 become \xNN: JSON, CSV and Parquet have no place for them."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def printable(text: str) -> str:
    """A name for people: on one line, and without what would change the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in utf8(text))


def say(line: str) -> None:
    """One line on stderr."""
    sys.stderr.write(f"{printable(line)}\n")


if __name__ == "__main__":
    run_cli(main)
