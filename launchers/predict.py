"""Label recordings with a finetuned run.

    python launchers/predict.py --checkpoint RUN_DIR AUDIO [AUDIO ...] [--top 5]
    python launchers/predict.py --checkpoint RUN_DIR meeting.m4a --events [--hop 1] [--threshold 0.5]
    cat dog.mp3 | python launchers/predict.py --checkpoint RUN_DIR - --format json
    python launchers/predict.py --checkpoint RUN_DIR recordings/ --format csv --out labels.csv --embeddings v.parquet

In: a run directory of finetune.py and audio of any codec, rate and length: files, folders (all audio below), or -
for standard input. Out: the best labels of each recording, the mean over its windows of a clip's length; with
--events, what was heard when. A recording that cannot be read is said on stderr and makes the exit status 1;
the others are labelled all the same.
"""

import argparse
import csv
import io
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import UserError, run_cli
from pipeline.serving import events
from pipeline.serving.listen import Heard, find_audio, listen
from pipeline.serving.scorer import Scorer, load_scorer

FORMATS = ("table", "json", "csv", "audacity")
LABEL_COLUMNS = ["path", "rank", "label", "id", "score"]
EVENT_COLUMNS = ["path", "start", "end", "label", "id", "score"]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    make = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = make.add_argument
    add("--checkpoint", required=True, type=Path, metavar="RUN_DIR", help="a finetuned run (no default)")
    add("audio", nargs="+", metavar="AUDIO", help="audio files, folders, or - for standard input")
    add("--top", type=int, default=5, metavar="K", help="labels of a recording (default: 5)")
    add("--events", action="store_true", help="what was heard when (default: labels of the whole recording)")
    add("--hop", type=float, metavar="S", help="seconds between windows (default: a clip; --events: half of one)")
    add("--threshold", type=float, default=0.5, metavar="P", help="least probability of an event (default: 0.5)")
    add("--format", choices=FORMATS, help="json: an object a line; audacity: a label track, of events (default: table)")
    add("--json", action="store_const", const="json", dest="format", help="short for --format json")
    add("--out", type=Path, metavar="PATH", help="file to write; audacity with several recordings: a folder "
        "(default: standard output)")  # fmt: skip
    add("--embeddings", type=Path, metavar="PARQUET", help="write each window's path, start, end, vector (default: no)")
    return make


class Writer:
    """Writes what was heard, in one of the formats.

    Args:
        args: Command line.
        scorer: Knows labels and clip length.
        out: Where to.
    """

    def __init__(self, args: argparse.Namespace, scorer: Scorer, out: TextIO) -> None:
        self.args, self.scorer, self.out = args, scorer, out
        if args.format == "csv":
            self._row(EVENT_COLUMNS if args.events else LABEL_COLUMNS)

    def write(self, heard: Heard) -> None:
        """One recording."""
        labels = self.scorer.spec.labels
        if self.args.events:
            self._events(heard, events.events(heard, labels, self.scorer.seconds, self.args.threshold))
        else:
            self._labels(heard, events.whole(heard, labels, self.args.top))
        self.out.flush()

    def _labels(self, heard: Heard, best: list[tuple[events.Label, float]]) -> None:
        if self.args.format == "json":
            found = [{"label": label.name, "id": label.id, "score": round(score, 6)} for label, score in best]
            self._json({"path": heard.path, "seconds": round(heard.seconds, 3), "labels": found})
        elif self.args.format == "csv":
            for rank, (label, score) in enumerate(best, start=1):
                self._row([heard.path, rank, label.name, label.id, f"{score:.6f}"])
        else:
            self.out.write(f"{heard.path}  ({events.clock(heard.seconds)})\n")
            for label, score in best:
                self.out.write(f"  {score:6.3f} {events.bar(score):30s} {label.name}\n")

    def _events(self, heard: Heard, found: list[events.Event]) -> None:
        if self.args.format == "json":
            rows = [{"start": round(e.start, 3), "end": round(e.end, 3), "label": e.label.name, "id": e.label.id,
                     "score": round(e.score, 6)} for e in found]  # fmt: skip
            self._json({"path": heard.path, "seconds": round(heard.seconds, 3), "events": rows})
        elif self.args.format == "csv":
            for e in found:
                self._row([heard.path, f"{e.start:.3f}", f"{e.end:.3f}", e.label.name, e.label.id, f"{e.score:.6f}"])
        elif self.args.format == "audacity":
            self._track(heard.path, events.audacity(found))
        else:
            self.out.write(f"{heard.path}  ({events.clock(heard.seconds)})\n")
            for e in found:
                when = f"{events.clock(e.start)} - {events.clock(e.end)}"
                self.out.write(f"  {when:21s} {e.score:6.3f} {events.bar(e.score, 20):20s} {e.label.name}\n")
            if not found:
                self.out.write(f"  nothing reaches {self.args.threshold:g}\n")

    def _track(self, path: str, text: str) -> None:
        if self.args.out is None or not self.args.out.is_dir():
            self.out.write(text)
            return
        name = "stdin" if path == "-" else path.lstrip("./").replace("/", "_")  # a/x.wav and b/x.wav are two tracks
        (self.args.out / f"{name}.txt").write_text(text, encoding="utf-8")

    def _json(self, content: dict[str, object]) -> None:
        self.out.write(json.dumps(content, ensure_ascii=False) + "\n")

    def _row(self, values: list[object]) -> None:
        line = io.StringIO()
        csv.writer(line, lineterminator="\n").writerow(values)
        self.out.write(line.getvalue())


class Embeddings:
    """Writes windows' vectors, a row group a recording.

    Args:
        path: Parquet file.
        window: Seconds of a window.
    """

    def __init__(self, path: Path, window: float) -> None:
        self._path, self._window = path, window
        self._writer: pq.ParquetWriter | None = None

    def write(self, heard: Heard) -> None:
        """One recording."""
        count, width = heard.embeddings.shape
        vectors = pa.FixedSizeListArray.from_arrays(pa.array(heard.embeddings.reshape(-1)), width)
        table = pa.table({"path": [heard.path] * count, "start": heard.starts, "end": heard.ends(self._window),
                          "embedding": vectors})  # fmt: skip
        if self._writer is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._writer = pq.ParquetWriter(self._path, table.schema, compression="zstd")
        self._writer.write_table(table)

    def close(self) -> None:
        """Completes the file."""
        if self._writer is not None:
            self._writer.close()


def main() -> int:
    """Parses, listens, writes."""
    args = parser().parse_args()
    args.format = args.format or "table"
    args.events = args.events or args.format == "audacity"
    check(args)
    names = find_audio(args.audio)
    if args.format == "audacity" and len(names) > 1:
        if args.out is None:
            raise UserError("--format audacity with several recordings is a file each; give --out FOLDER")
        args.out.mkdir(parents=True, exist_ok=True)
    scorer = load_scorer(args.checkpoint)
    hop = args.hop or scorer.seconds / (2 if args.events else 1)
    failed = 0
    with ExitStack() as stack:
        out = sys.stdout
        if args.out is not None and not args.out.is_dir():
            args.out.parent.mkdir(parents=True, exist_ok=True)
            out = stack.enter_context(args.out.open("w", encoding="utf-8"))
        writer, embeddings = Writer(args, scorer, out), None
        if args.embeddings:
            embeddings = Embeddings(args.embeddings, scorer.seconds)
            stack.callback(embeddings.close)
        for heard in listen(scorer, sources(names, stack), hop):
            if heard.error:
                sys.stderr.write(f"{heard.path}: {heard.error}\n")
                failed += 1
            if not len(heard.starts):
                continue
            writer.write(heard)
            if embeddings:
                embeddings.write(heard)
    if failed and len(names) > 1:
        sys.stderr.write(f"{failed} of {len(names)} recordings could not be read\n")
    return 1 if failed else 0


def check(args: argparse.Namespace) -> None:
    """Checks the options' ranges.

    Raises:
        UserError: one is outside.
    """
    if args.hop is not None and args.hop <= 0:
        raise UserError(f"--hop {args.hop} is not positive; give seconds")
    if not 0 < args.threshold <= 1:
        raise UserError(f"--threshold {args.threshold} is no probability; give one above 0, at most 1")
    if args.top < 1:
        raise UserError(f"--top {args.top} is not positive; give 1 or more")


def sources(names: list[str], stack: ExitStack) -> Iterator[tuple[str, str]]:
    """(name, path) of each; standard input is written to a file first: decoders seek."""
    for name in names:
        if name != "-":
            yield name, name
            continue
        file = stack.enter_context(tempfile.NamedTemporaryFile(suffix=".audio"))  # noqa: SIM115 - the stack closes it
        shutil.copyfileobj(sys.stdin.buffer, file)
        file.flush()
        yield name, file.name


if __name__ == "__main__":
    run_cli(main)
