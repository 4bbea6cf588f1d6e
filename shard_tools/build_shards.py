"""Write an audio data set, labelled or not, into WebDataset tar shards.

In: --root, a directory or URL, or --table, in any of the forms of --dataset; without that option what is there says
which (shard_tools/forms/look.py). Audio inside tars, zips, Parquet and HDF5 files is read in place, never unpacked.
Out: in --out, tars of waveforms, fbanks and labels, index.parquet, manifest.json and failures.jsonl. Same inputs and
options give the same bytes, whatever the workers, engine or slices. Run the same command again to go
on after an interruption. Trouble of the machine, its disks or its network ends the build with nothing recorded;
only what is a file's own is written to failures.jsonl. Exit status: 0 done, 1 more than --max-failures clips
failed, 2 wrong input, 130 interrupted.

On many machines: --distributor ray on a Ray cluster, or as many commands with --slice 1/N to N/N as
there are machines (in a Slurm array: --slice $SLURM_ARRAY_TASK_ID/N), then the same with --merge.
Inputs and --out may be URLs (s3://bucket/prefix, gs://, ...) where fsspec's package for them is installed.
"""

import argparse
import logging
import math
import os
import re
import signal
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from pipeline.data.fbank import FRAME_MS, fft_length
from pipeline.data.storage import Location, is_remote, join, local, location
from pipeline.errors import UserError, run_cli
from pipeline.files import check_name, check_output_directory
from shard_tools import catalogs
from shard_tools.audio_files import split_of_segments
from shard_tools.build import Summary, build, build_slice, merge
from shard_tools.catalogs import Catalog
from shard_tools.distribute import ENGINES
from shard_tools.esc50_archive import SHA256, URL, fetch_esc50
from shard_tools.forms import look
from shard_tools.forms.entries import Asked
from shard_tools.plan import BuildOptions, Slice, write_plan
from shard_tools.write import AudioOptions

log = logging.getLogger(__name__)

EXAMPLES = """examples:
  build_shards.py --root hf://datasets/agkphysics/AudioSet --out shards/audioset
  build_shards.py --root FSD50K --out shards/fsd50k
  build_shards.py --dataset unlabelled --root recordings --out shards/recordings
  build_shards.py --dataset esc50 --audio-root ESC-50 --seconds 5 --out shards/esc50
  build_shards.py --dataset audioset --segments balanced_train_segments.csv \\
      --class-labels class_labels_indices.csv --audio-root wavs --out shards/audioset
  build_shards.py --dataset esc50 --download --seconds 5 --out shards/esc50
  build_shards.py --dataset audioset --segments eval_segments.csv \\
      --class-labels class_labels_indices.csv --audio-root wavs --out shards/audioset
  build_shards.py --dataset audioset --segments unbalanced_train_segments.csv --split unbalanced \\
      --class-labels class_labels_indices.csv --audio-root wavs --out shards/audioset
"""


# Options that only some data sets have, by their names as attributes.
OPTIONS_OF = {
    "audio_list": ("audioset",),
    "segments": ("audioset",),
    "class_labels": ("audioset", "csv", *sorted(look.FORMS.keys() - {"csv", *look.OWN_CLASSES})),
    "label_overrides": ("audioset",),
    "label_separator": ("audioset", "csv", "ast_json", "audiofolder", "kaldi", "nemo", "parquet", "wds"),
    "ontology": ("audioset",),
    "source_rate": ("audioset", "hdf5", "unlabelled"),
    "table": ("csv", "ast_json", "audiofolder", "dcase", "nemo", "unlabelled", "vggsound"),
    "download": ("esc50",),
    "archive_url": ("esc50",),
    "sha256": ("esc50",),
    "accept_any_archive": ("esc50",),
}
# What two options together would mean is not said anywhere: the second would be ignored.
EXCLUDE = (
    ("slice", "merge"), ("slice", "overwrite"), ("merge", "overwrite"), ("dry_run", "merge"), ("dry_run", "slice"),
    ("dry_run", "overwrite"), ("merge", "retry_failures"), ("dry_run", "retry_failures"),
    ("class_labels", "ontology"), ("accept_any_archive", "sha256"),
)  # fmt: skip
SAMPLE_RATES = (1000, 768_000)  # Hz
LONGEST_CLIP = 3600.0  # seconds


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        """Raises UserError."""
        raise UserError(f"{message}; see --help")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    make = Parser(description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = make.add_argument

    def place(option: str, *names: str, **words: Any) -> None:
        add(option, *names, type=partial(location, what=option), **words)

    add("--dataset", default="auto", choices=("auto", "audioset", *look.FORMS, "synth"), metavar="FORM",
        help=f"auto, audioset, {', '.join(look.FORMS)}, or synth, which is generated (default: auto, by what is there)")
    place("--out", required=True, metavar="DIR|URL", help="of the shards")
    place("--audio-root", "--root", metavar="DIR|URL", help="of the audio (default: of --table; synth: OUT/source)")
    place("--audio-list", metavar="TXT", help="audioset: paths below --audio-root, by line (no default)")
    place("--segments", metavar="CSV", help="audioset: an official segments csv (no default)")
    place("--class-labels", metavar="CSV", help="index,mid,display_name (default, csv: the labels of --table)")
    place("--label-overrides", metavar="CSV", help="audioset: id,labels that replace the official ones "
        "(such as PSLA's; no default)")  # fmt: skip
    add("--download", action="store_true", help="esc50: fetch the official archive to --root (default: OUT/source)")
    add("--archive-url", default=URL, metavar="URL", help=f"of --download (default: {URL})")
    add(
        "--sha256", default=SHA256, metavar="HEX", help="that the archive of --download must have (default: none known)"
    )
    add("--accept-any-archive", action="store_true", help="use the archive of --download whatever its sha256 is")
    place("--table", metavar="FILE", help="that lists the clips; csv: columns path,labels[,start,end,split,fold,key] "
        "(default: looked for in --root)")  # fmt: skip
    add("--source-rate", type=int, metavar="HZ", help="hdf5: of waveforms whose file does not say it (no default)")
    add(
        "--label-separator",
        metavar="TEXT",
        help="tables, --label-overrides: between several labels in a cell (default: ; for csv)",
    )
    place("--ontology", metavar="JSON", help="audioset: names of labels without --class-labels (no default)")
    add("--split", metavar="NAME", help="(default: eval for an eval csv, else train; csv: its column; folder: by "
        "Speech Commands' lists, where they are)")  # fmt: skip
    add("--sample-rate", type=int, default=16000, metavar="HZ", help="of the stored waveforms (default: 16000)")
    add("--seconds", type=float, default=10.0, metavar="S", help="clips are cut or zero-padded to this (default: 10)")
    add("--mel-bins", type=int, default=128, metavar="M", help="of the stored fbanks (default: 128)")
    add("--clips-per-shard", type=int, default=512, metavar="N", help="(default: 512, about 300 MB at 10 s)")
    add("--workers", type=int, metavar="N", help="processes (default: one per core; ray: as many as the cluster takes)")
    add("--distributor", choices=ENGINES, default="process", help="what runs the workers (default: process)")
    add("--slice", type=a_slice, metavar="I/N", help="write only every N-th shard, from the I-th on (default: all)")
    add("--merge", action="store_true", help="complete a build whose slices are done")
    add("--dry-run", action="store_true", help="decode nothing: sum up the plan, and write it to OUT/plan.parquet")
    add("--limit", type=int, metavar="N", help="first N clips only; synth: clips to make (default: all; 800)")
    add("--seed", type=int, default=0, metavar="N", help="of the order in the shards, and of synth (default: 0)")
    add("--max-failures", type=int, metavar="N", help="exit with 1 if more clips than this fail (default: no limit)")
    add("--require-coverage", type=float, metavar="SHARE", help="fail where a smaller share of the listed clips is "
        "there, such as 0.95 (no default)")  # fmt: skip
    add("--overwrite", action="store_true", help="build these splits anew; others stay (default: go on with what is "
        "there)")  # fmt: skip
    add("--retry-failures", action="store_true", help="try clips that failed again: only their shards are written anew")
    return make


def a_slice(text: str) -> Slice:
    """I/N.

    Raises:
        ArgumentTypeError: something else.
    """
    found = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text)
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise argparse.ArgumentTypeError(f"'{text}' is not I/N with 1 <= I <= N, such as 3/8")
    return Slice(int(found[1]), int(found[2]))


def read_catalog(args: argparse.Namespace) -> Catalog:
    """The catalog that the command line names.

    Raises:
        UserError: an option that the data set needs is missing.
    """
    if args.dataset == "audioset" and args.segments is None and (packed := look.packed(_asked(args))):
        catalog = look.read(packed, _asked(args))
    elif args.dataset == "audioset":
        segments = _needed(args, "segments")
        catalog = catalogs.audioset(
            _needed(args, "audio_root"),
            segments,
            args.class_labels,
            args.ontology,
            args.split or split_of_segments(segments),
            args.audio_list,
            args.label_overrides,
            args.label_separator,
        )
        if catalog.overrides is not None:
            used, rows = len(catalog.overrides.used), len(catalog.overrides.labels)
            log.info("%s: %d of %d rows applied to the listed clips", args.label_overrides, used, rows)
    elif args.dataset == "esc50":
        root = _download(args) if args.download else _needed(args, "audio_root")
        catalog = catalogs.esc50(root, args.split or "train")
    elif args.dataset in look.FORMS:
        catalog = look.read(args.dataset, _asked(args))
    else:
        from shard_tools.synth import write_synth  # SciPy's filters, which each worker would import at its start

        root = local(args.audio_root or join(args.out, "source"))
        table = write_synth(root, args.limit or 800, args.seconds, args.sample_rate, args.seed)
        catalog = catalogs.table(root, table, None, args.split)
        catalog.dataset = "synth"
    if args.limit is not None:
        catalog.clips.truncate(args.limit)
    if not catalog.clips:
        raise UserError(f"--dataset {args.dataset}: lists no clips; check the paths and --split")
    return catalog


def _asked(args: argparse.Namespace) -> Asked:
    """What a form is asked for.

    Raises:
        UserError: neither a root nor a table is given.
    """
    table, root = args.table, args.audio_root
    if root is None:
        table = table or _needed(args, "table" if args.dataset == "csv" else "audio_root")
        root = str(table).rpartition("/")[0] if is_remote(table) else local(table).parent
    return Asked(root, table, args.class_labels, args.split, args.label_separator, args.source_rate)


def _download(args: argparse.Namespace) -> Path:
    root = args.audio_root or join(args.out, "source")
    if is_remote(root):
        raise UserError(f"--download to {root}: needs a local --root; give one")
    return fetch_esc50(local(root), args.archive_url, args.sha256, args.accept_any_archive)


def main() -> int:
    """Parses, builds, sums up."""
    args, given = parsed(sys.argv[1:])
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    begun = time.perf_counter()
    signal.signal(signal.SIGTERM, _interrupt)  # Slurm's time limit, kill: as Ctrl-C
    try:
        summary, splits = carry_out(args, given)
    except KeyboardInterrupt:
        sys.stderr.write("\ninterrupted; finished shards are kept: run the same command to go on\n")
        return 130
    if summary is None:
        return 0
    failed = _report(summary, args.out, time.perf_counter() - begun)
    clips = {name: (split.clips, split.listed) for name, split in summary.manifest.splits.items()}
    require_coverage(args.require_coverage, {name: clips[name] for name in splits})
    return 1 if args.max_failures is not None and failed > args.max_failures else 0


def parsed(words: Sequence[str]) -> tuple[argparse.Namespace, set[str]]:
    """A command line, checked, and which of its options differ from their defaults.

    Raises:
        UserError: options that do not fit each other.
    """
    line = parser()
    args = line.parse_args(words)
    given = {name for name, value in vars(args).items() if value != line.get_default(name)}
    _check(args, given)
    return args, given


def carry_out(args: argparse.Namespace, given: set[str]) -> tuple[Summary | None, list[str]]:
    """Builds what `parsed` read; what was done (None: no whole build was asked for), and the names of its splits.

    Raises:
        UserError: the inputs are not as the options say, or something could not be written.
    """
    try:
        if args.dataset == "auto":
            args.dataset = "audioset" if args.segments else "esc50" if args.download else look.find(_asked(args))
            _fit(args, given)
        catalog = read_catalog(args)
        # Before hours of decoding, not after.
        require_coverage(args.require_coverage, {name: (len(catalog.clips.rows(name)), catalog.listed(name))
                                                 for name in catalog.splits})  # fmt: skip
        return _run(args, catalog), list(catalog.splits)
    except OSError as error:
        raise UserError(f"--out {args.out}: {error}; free the disk or the path, then run the same command") from error


def require_coverage(share: float | None, clips: dict[str, tuple[int, int]]) -> None:
    """Refuses a split of which too few listed clips are there.

    Args:
        share: The least share of the listed clips; None: any.
        clips: By split, how many there are and how many are listed.

    Raises:
        UserError: one has fewer.
    """
    for name, (there, listed) in clips.items():
        if share is not None and there < share * listed:
            raise UserError(
                f"split '{name}': {there} of {listed} listed clips are there ({there / listed:.1%}), "
                f"--require-coverage {share:g}; add the missing audio or lower it"
            )


def _check(args: argparse.Namespace, given: set[str]) -> None:
    """Refuses options that do not fit, before anything is read or written.

    Args:
        args: The command line; `workers` gets its default here.
        given: Names of the options that differ from their defaults.

    Raises:
        UserError: as said.
    """
    if args.workers is None:
        args.workers = 1 << 16 if args.distributor == "ray" else os.cpu_count() or 1
    for name, least, most in (
        ("sample_rate", *SAMPLE_RATES),
        ("seconds", FRAME_MS / 1000, LONGEST_CLIP),
        ("mel_bins", 4, None),
        ("clips_per_shard", 1, 10**9),
        ("workers", 1, None),
        ("limit", 1, None),
        ("seed", 0, 2**63 - 1),
        ("max_failures", 0, None),
        ("source_rate", *SAMPLE_RATES),
    ):
        value = getattr(args, name)
        if value is not None and not least <= value <= (math.inf if most is None else most):
            beyond = "" if most is None else f" to {most:g}"
            raise UserError(
                f"--{name.replace('_', '-')} {value:g} is out of range; give {least:g}{beyond or ' or more'}"
            )
    bins = fft_length(int(args.sample_rate * FRAME_MS / 1000)) // 2
    if args.mel_bins > bins:
        raise UserError(
            f"--mel-bins {args.mel_bins} is more than the {bins} frequencies of a {FRAME_MS:g} ms frame at "
            f"--sample-rate {args.sample_rate}; give fewer"
        )
    if args.require_coverage is not None and not 0 < args.require_coverage <= 1:
        raise UserError(f"--require-coverage {args.require_coverage:g} is no share of the clips; give one such as 0.95")
    if args.dataset != "auto":
        _fit(args, given)
    for name, other in EXCLUDE:
        if {name, other} <= given:
            raise UserError(f"--{name.replace('_', '-')} does not go with --{other.replace('_', '-')}; leave one out")
    if args.split is not None:
        check_name(args.split, "--split")
    if args.sha256 is not None and not re.fullmatch(r"[0-9a-fA-F]{64}", args.sha256):
        raise UserError(f"--sha256 {args.sha256} is not 64 hexadecimal digits; correct it")
    if args.dataset == "esc50" and not args.download and given & {"archive_url", "sha256", "accept_any_archive"}:
        raise UserError(
            "--archive-url, --sha256 and --accept-any-archive are of --download; give it, or leave them out"
        )
    if args.label_separator is not None and not args.label_separator.strip(" "):
        raise UserError("--label-separator is empty; give the text between two labels, such as ,")
    if args.dataset == "synth" and is_remote(args.out) and args.audio_root is None:
        raise UserError(f"--out {args.out}: generated audio needs a local --audio-root; give one")
    if not is_remote(args.out):
        check_output_directory(args.out, "--out")


def _fit(args: argparse.Namespace, given: set[str]) -> None:
    """Refuses options that a form of data set does not have.

    Raises:
        UserError: there is one.
    """
    for name in sorted(given & OPTIONS_OF.keys()):
        if args.dataset not in OPTIONS_OF[name]:
            *others, last = OPTIONS_OF[name]
            of = f"{', '.join(others)} and {last}" if others else last
            raise UserError(f"--{name.replace('_', '-')} is of --dataset {of}, not {args.dataset}; leave it out")


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def _run(args: argparse.Namespace, catalog: Catalog) -> Summary | None:
    audio = AudioOptions(args.sample_rate, args.seconds, args.mel_bins)
    options = BuildOptions(audio, args.clips_per_shard, args.seed)
    if args.dry_run:
        for line in write_plan(catalog, args.out, options):
            sys.stdout.write(f"{line}\n")
        return None
    if args.merge:
        return merge(catalog, args.out, options)
    if args.slice is None:
        return build(catalog, args.out, options, args.workers, args.overwrite, args.distributor, args.retry_failures)
    count = build_slice(catalog, args.out, options, args.workers, args.slice, args.distributor, args.retry_failures)
    sys.stdout.write(f"slice {args.slice.number}/{args.slice.count}: its {count} shards are written; when all slices "
                     "are, run the same command with --merge instead of --slice\n")  # fmt: skip
    return None


def _report(summary: Summary, out: Location, seconds: float) -> int:
    manifest = summary.manifest
    lines = []
    for name, split in manifest.splits.items():
        share = split.clips / split.listed if split.listed else 0.0
        lines.append(
            f"{name}: {split.clips} of {split.listed} listed clips ({share:.1%}) in {split.shards} shards, "
            f"{split.seconds / 3600:.2f} h, fbank mean {split.fbank_mean:.4f} std {split.fbank_std:.4f}"
        )
        short = [(clips / wanted, manifest.labels[number].name, clips, wanted) for number, (clips, wanted)
                 in enumerate(zip(split.class_clips, split.class_listed, strict=True)) if clips < wanted]  # fmt: skip
        if short:
            worst = ", ".join(f"{label} {clips} of {wanted}" for _, label, clips, wanted in sorted(short)[:3])
            lines.append(f"  {len(short)} classes lack clips, most: {worst} (all: manifest.json, class_clips)")
    lines += [f"  {count} failed: {reason}" for reason, count in summary.failures.most_common()]
    if summary.silent:
        lines.append(f"  {summary.silent} stored clips are digital silence (silent: true in their json)")
    if summary.replaced:
        lines.append(f"  {summary.replaced} clips come from another file than their first, which cannot be decoded: "
                     f"{join(out, 'failures.jsonl')} names both")  # fmt: skip
    failed = summary.failures.total()
    if failed:
        lines.append(f"  each failed clip with its reason: {join(out, 'failures.jsonl')}")
    lines.append(f"{len(manifest.labels)} labels, digest {manifest.digest[:12]}, {seconds:.1f} s -> {out}")
    sys.stdout.write("\n".join(lines) + "\n")
    return failed


def _needed(args: argparse.Namespace, name: str) -> Any:
    value = getattr(args, name)
    if value is None and args.dataset == "auto":
        raise UserError("nothing says what to build; give --root DIR (a data set, or audio), --table FILE or "
                        "--segments CSV")  # fmt: skip
    if value is None:
        raise UserError(f"--dataset {args.dataset} needs --{name.replace('_', '-')}; see --help")
    return value


if __name__ == "__main__":
    run_cli(main)
