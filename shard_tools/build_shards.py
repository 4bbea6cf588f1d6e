"""Write a labelled audio data set into WebDataset tar shards.

In: AudioSet, ESC-50, a csv, a folder of class folders, or generated audio. Out: in --out, tars of
waveforms, fbanks and labels, index.parquet, manifest.json and failures.jsonl. Same inputs and
options give the same bytes, whatever --workers is. Run the same command again to go on after an
interruption. Exit status: 0 done, 1 more than --max-failures clips failed, 2 wrong input.
"""

import argparse
import logging
import os
import sys
import time
from pathlib import Path

from pipeline.errors import UserError, run_cli
from shard_tools import catalogs
from shard_tools.build import BuildOptions, Summary, build
from shard_tools.catalogs import Catalog
from shard_tools.synth import write_synth
from shard_tools.write import AudioOptions

EXAMPLES = """examples:
  build_shards.py --dataset esc50 --audio-root ESC-50 --seconds 5 --out shards/esc50
  build_shards.py --dataset audioset --segments balanced_train_segments.csv \\
      --class-labels class_labels_indices.csv --audio-root wavs --out shards/audioset
  build_shards.py --dataset audioset --segments eval_segments.csv \\
      --class-labels class_labels_indices.csv --audio-root wavs --out shards/audioset
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    make = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = make.add_argument
    add("--dataset", required=True, choices=("audioset", "esc50", "csv", "folder", "synth"), help="what to read")
    add("--out", required=True, type=Path, metavar="DIR", help="directory of the shards")
    add("--audio-root", type=Path, metavar="DIR", help="of the audio (default: that of --table; synth: OUT/source)")
    add("--audio-list", type=Path, metavar="TXT", help="audioset: paths below --audio-root, one a line (default: walk)")
    add("--segments", type=Path, metavar="CSV", help="audioset: an official segments csv (no default)")
    add("--class-labels", type=Path, metavar="CSV", help="index,mid,display_name (default: the labels of --table)")
    add("--table", type=Path, metavar="CSV", help="columns path,labels[,start,end,split,fold,key] (no default)")
    add("--ontology", type=Path, metavar="JSON", help="audioset: names of labels without --class-labels (no default)")
    add("--split", metavar="NAME", help="(default: eval for an eval csv, else train; csv: its column)")
    add("--sample-rate", type=int, default=16000, metavar="HZ", help="of the stored waveforms (default: 16000)")
    add("--seconds", type=float, default=10.0, metavar="S", help="clips are cut or zero-padded to this (default: 10)")
    add("--mel-bins", type=int, default=128, metavar="M", help="of the stored fbanks (default: 128)")
    add("--clips-per-shard", type=int, default=512, metavar="N", help="(default: 512, about 300 MB at 10 s)")
    add("--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="processes (default: one per core)")
    add("--limit", type=int, metavar="N", help="first N clips only; synth: clips to make (default: all; 800)")
    add("--seed", type=int, default=0, metavar="N", help="of the order in the shards, and of synth (default: 0)")
    add("--max-failures", type=int, metavar="N", help="exit with 1 if more clips than this fail (default: no limit)")
    add("--overwrite", action="store_true", help="throw away what --out holds (default: go on with it)")
    return make


def read_catalog(args: argparse.Namespace) -> Catalog:
    """The catalog that the command line names.

    Raises:
        UserError: an option that the data set needs is missing.
    """
    if args.dataset == "audioset":
        segments = _needed(args, "segments")
        split = args.split or ("eval" if "eval" in segments.name else "train")
        catalog = catalogs.audioset(_needed(args, "audio_root"), segments, args.class_labels, args.ontology, split,
                                    args.audio_list)  # fmt: skip
    elif args.dataset == "esc50":
        catalog = catalogs.esc50(_needed(args, "audio_root"), args.split or "train")
    elif args.dataset == "folder":
        catalog = catalogs.folder(_needed(args, "audio_root"), args.split or "train")
    elif args.dataset == "csv":
        table = _needed(args, "table")
        catalog = catalogs.table(args.audio_root or table.parent, table, args.class_labels, args.split)
    else:
        root = args.audio_root or args.out / "source"
        table = write_synth(root, args.limit or 800, args.seconds, args.sample_rate, args.seed)
        catalog = catalogs.table(root, table, None, args.split)
        catalog.dataset = "synth"
    if args.limit:
        catalog.clips.truncate(args.limit)
    if not catalog.clips and not catalog.missing:
        raise UserError(f"--dataset {args.dataset}: lists no clips; check the paths and --split")
    return catalog


def main() -> int:
    """Parses, builds, sums up."""
    args = parser().parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for name in ("sample_rate", "seconds", "mel_bins", "clips_per_shard", "workers"):
        if getattr(args, name) <= 0:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)} is not positive; give a larger number")
    if args.sample_rate * args.seconds < 0.025 * args.sample_rate:
        raise UserError(f"--seconds {args.seconds} is shorter than one 25 ms frame; give at least 0.025")
    begun = time.perf_counter()
    catalog = read_catalog(args)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        audio = AudioOptions(args.sample_rate, args.seconds, args.mel_bins)
        options = BuildOptions(audio, args.clips_per_shard, args.seed)
        summary = build(catalog, args.out, options, args.workers, args.overwrite)
    except OSError as error:
        raise UserError(f"--out {args.out}: {error}; free the disk or the path, then run the same command") from error
    except KeyboardInterrupt:
        raise UserError("interrupted; finished shards are kept: run the same command to go on") from None
    failed = _report(summary, args.out, time.perf_counter() - begun)
    return 1 if args.max_failures is not None and failed > args.max_failures else 0


def _report(summary: Summary, out: Path, seconds: float) -> int:
    manifest = summary.manifest
    lines = []
    for name, split in manifest.splits.items():
        share = split.clips / split.listed if split.listed else 0.0
        lines.append(
            f"{name}: {split.clips} of {split.listed} listed clips ({share:.1%}) in {split.shards} shards, "
            f"{split.seconds / 3600:.2f} h, fbank mean {split.fbank_mean:.4f} std {split.fbank_std:.4f}"
        )
    lines += [f"  {count} failed: {reason}" for reason, count in summary.failures.most_common()]
    if summary.silent:
        lines.append(f"  {summary.silent} stored clips are digital silence (silent: true in their json)")
    failed = summary.failures.total()
    if failed:
        lines.append(f"  each failed clip with its reason: {out / 'failures.jsonl'}")
    lines.append(f"{len(manifest.labels)} labels, digest {manifest.digest[:12]}, {seconds:.1f} s -> {out}")
    sys.stdout.write("\n".join(lines) + "\n")
    return failed


def _needed(args: argparse.Namespace, name: str) -> Path:
    value: Path | None = getattr(args, name)
    if value is None:
        raise UserError(f"--dataset {args.dataset} needs --{name.replace('_', '-')}; see --help")
    return value


if __name__ == "__main__":
    run_cli(main)
