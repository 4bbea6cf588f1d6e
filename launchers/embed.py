"""Embeddings from any weights: of shards, or of audio files of any number and length.

    python launchers/embed.py --checkpoint RUN --shards DIR --split eval --out DIR
    python launchers/embed.py --checkpoint RUN --out DIR recordings/ dog.wav --list more.txt --level time
    deepspeed --num_gpus 8 launchers/embed.py --checkpoint RUN --shards s3://... --out DIR       (any number of ranks)

In: a run of pretrain.py or finetune.py, a checkpoint, an export, weights of others (docs/training.md), hf://OWNER/NAME
or random:SIZE; shards, or files, folders (all audio below) and lists of paths. Out: DIR/*.parquet with the columns key,
time, layer, embedding (a list of fixed size): a vector a clip, or with --level time one for each column of patches.

The same command again makes what is missing; any number of ranks gives the same bytes. A file that cannot be read
is said, listed in *.failed.jsonl, and makes the exit status 1; the others are embedded all the same.
"""

import argparse
import hashlib
import json
import logging
import sys
from typing import Any

from pipeline.command_line import grid_of, new_parser, path_of
from pipeline.config import PRECISIONS, DataConfig
from pipeline.errors import UserError, run_cli

# Seconds a collective may take. Who is done waits for those that are not, and a piece of long recordings on a CPU
# takes hours; a rank that ends is noticed at once all the same.
TIMEOUT = 24 * 3600.0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    make = new_parser(__doc__)
    add = make.add_argument
    add("--checkpoint", required=True, metavar="RUN", help="see above (no default)")
    add("audio", nargs="*", metavar="AUDIO", help="audio files and folders")
    add("--list", type=path_of("--list"), metavar="TXT", help="text file of paths, one a line (default: none)")
    add("--shards", metavar="DIR", help="directory or URL of shards, instead of files")
    add("--split", metavar="NAME", help="split of the shards (default: all of them)")
    add("--out", required=True, type=path_of("--out"), metavar="DIR", help="directory to fill (no default)")
    add("--level", choices=("clip", "time"), default="clip", help="a vector a clip, or a column (default: clip)")
    add("--layers", default="last", metavar="all|1,2", help="blocks, from 1, a row each (default: the last)")
    add("--pool", choices=("time_frequency", "mean", "cls"), default="mean",
        help="mean of patches (default), frequency patches side by side, or cls and dist")  # fmt: skip
    add("--stream", choices=("spec", "wav", "both"), help="whose tokens (default: all that the weights read)")
    add("--dtype", choices=("fp32", "fp16"), default="fp32", help="of the numbers (default: fp32)")
    add("--hop", type=float, metavar="S", help="files: seconds between windows (default: a clip)")
    add("--grid", metavar="F,T", help="patches of weights of others, where they do not say it (default: found)")
    add("--last", action="store_true", help="the last weights, not the averaged ones (default: off)")
    add("--workers", type=int, default=2, metavar="N", help="reader processes per rank (default: 2)")
    add("--precision", choices=PRECISIONS, default="fp32", help="of the network's arithmetic (default: fp32)")
    add("--local_rank", type=int, default=-1, help=argparse.SUPPRESS)  # given by the deepspeed launcher
    return make


def check(args: argparse.Namespace) -> None:
    """Checks what contradicts.

    Raises:
        UserError: files and shards, or neither; a hop that is none.
    """
    if bool(args.shards) == bool(args.audio or args.list):
        raise UserError("give --shards DIR, or audio files, folders and --list TXT; one of both")
    if args.hop is not None and not 0 < args.hop < float("inf"):
        raise UserError(f"--hop {args.hop} is not positive and finite; give seconds")
    if "-" in args.audio:
        raise UserError("-: standard input is for one process; write it to a file")


def main() -> int:
    """Parses, embeds, says where."""
    args = parser().parse_args()
    check(args)
    grid = grid_of(args.grid)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    from pipeline import distributed  # torch: not for --help
    from pipeline.data.corpus import load_corpus
    from pipeline.data.manifest import load_manifest
    from pipeline.data.spec import DataSpec
    from pipeline.probing.frozen import open_frozen, weights_of
    from pipeline.serving.embed import Embedder, embed_files, embed_split, open_output, read_list
    from pipeline.serving.listen import find_audio

    spec: DataSpec | None = None
    splits: list[str] = []
    if args.shards:
        manifest = load_manifest(args.shards)
        if args.split and args.split not in manifest.splits:
            raise UserError(f"--split {args.split}: {args.shards} has the splits {', '.join(manifest.splits)}")
        splits = [args.split] if args.split else list(manifest.splits)
        data = DataConfig(shards=args.shards, train_split=splits[0])
        spec = DataSpec.of(load_corpus(data), data)
    with distributed.session(TIMEOUT, 0) as world:
        (file,) = weights_of([args.checkpoint], not args.last)
        frozen = open_frozen(file, spec, grid).to(world.device).at(args.precision)
        streams = [args.stream] if args.stream in ("spec", "wav") else (
            ["spec", "wav"] if args.stream else frozen.streams)  # fmt: skip
        embedder = Embedder(frozen, frozen.layers(args.layers), args.pool, streams, args.level == "clip")
        about: dict[str, Any] = {"digest": frozen.digest, "layers": embedder.layers, "streams": streams,
                                 "pool": args.pool, "level": args.level, "dtype": args.dtype,
                                 "precision": args.precision}  # fmt: skip
        options: dict[str, Any] = {"half": args.dtype == "fp16"}
        if spec is not None:
            about |= {"shards_digest": spec.digest}
            distributed.decide(lambda: open_output(args.out, about))
            files = [file for split in splits
                     for file in embed_split(embedder, args.shards, split, args.out, world, workers=args.workers,
                                             **options)]  # fmt: skip
            failed = 0
        else:
            listed = read_list(args.list) if args.list else []
            names, unread, skipped = distributed.decide(lambda: find_audio([*args.audio, *listed]))
            hop = args.hop or embedder.spec.samples / embedder.spec.sample_rate
            about |= {"files": hashlib.sha256(json.dumps(names).encode()).hexdigest(), "hop": hop}
            distributed.decide(lambda: open_output(args.out, about))
            for line in [*skipped, *unread] if world.is_main else []:
                sys.stderr.write(f"{line}\n")
            files, failed = embed_files(embedder, names, hop, args.out, world, **options)
            failed += len(unread)
        if world.is_main:
            sys.stdout.write(f"{len(files)} files of {embedder.width} numbers a vector in {args.out}\n")
            if failed:
                sys.stderr.write(f"{failed} recordings could not be read, or not all of them\n")
        return 1 if failed else 0


if __name__ == "__main__":
    run_cli(main)
