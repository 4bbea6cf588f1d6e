"""What frozen features are worth: a probe on the tokens of any weights, nothing of them trained.

    python launchers/probe.py --checkpoint RUN [RUN ...] --shards DIR --folds all --probe linear
    python launchers/probe.py --checkpoint RUN random:base SSAST.pth --shards DIR --split eval --probe cgp --layers all
    deepspeed --num_gpus 8 launchers/probe.py --checkpoint RUN --shards DIR --probe attentive    (any number of ranks)

In: runs of pretrain.py or finetune.py, checkpoints, exports, weights of others (docs/training.md), hf://OWNER/NAME,
random:SIZE or random:RUN (the same network untrained); labelled shards. Out: a table of mAP or accuracy with 95 %
bootstrap intervals, for the tokens of the spectrogram, of the waveform and of both; with --out as JSON; in MLflow a run
under the pretraining. A probe's setting is chosen on a part of the training clips, never on those that test it, and
weights that were finetuned on the labels of these are refused.

Features of all checkpoints are computed first, once, the work divided among the ranks, and kept in --features; then
rank 0 trains the probes. The same command again goes on where it was stopped.
"""

import argparse
import hashlib
import json
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.command_line import grid_of, new_parser, numbers_of, path_of
from pipeline.config import PRECISIONS, DataConfig, FinetuneRecipe, LogConfig
from pipeline.errors import UserError, run_cli
from pipeline.files import check_output_file, sha256, write_json

if TYPE_CHECKING:
    import torch

    from pipeline.distributed import World
    from pipeline.probing.frozen import Frozen, Pool

PROBES = ("linear", "attentive", "cgp", "knn")
# Seconds a collective may take. Who is done waits for those that are not, and a piece of a large model's features on a
# CPU takes an hour; a rank that ends is noticed at once all the same.
TIMEOUT = 24 * 3600.0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    make = new_parser(__doc__)
    add = make.add_argument
    add("--checkpoint", required=True, nargs="+", metavar="RUN", help="see above (no default)")
    add("--shards", required=True, metavar="DIR", help="directory or URL of labelled shards (no default)")
    add("--train-split", default="train", metavar="NAME", help="split to train on (default: train)")
    add("--split", default="eval", metavar="NAME", help="split to test on, without --folds (default: eval)")
    add("--folds", metavar="all|1,2", help="folds of the training split, each held out in turn (default: --split)")
    add("--seeds", type=int, default=1, metavar="N", help="without --folds: mean over N seeds (default: 1)")
    add("--probe", choices=PROBES, default="linear", help="kind of probe (default: linear)")
    add("--layers", metavar="all|1,2", help="blocks, from 1, a row each; cgp: its sum (default: the last, cgp: all)")
    add("--pool", choices=("time_frequency", "mean", "cls"), default="time_frequency",
        help="time_frequency: frequency patches side by side, mean over time (default); mean: of patches; cls: of cls "
        "and dist; attentive takes the tokens")  # fmt: skip
    add("--out", type=path_of("--out"), metavar="JSON", help="write the results here (default: only print)")
    add("--features", type=path_of("--features"), metavar="DIR",
        help="where features are kept (default: features/ beside the run, else runs/features)")  # fmt: skip
    add("--most-gb", type=float, default=100.0, metavar="GB", help="of features, for a split (default: 100)")
    add("--grid", metavar="F,T", help="patches of weights of others, where they do not say it (default: found)")
    add("--last", action="store_true", help="the last weights, not the averaged ones (default: off)")
    add("--no-mlflow", action="store_true", help="track nothing (default: off)")
    add("--workers", type=int, default=2, metavar="N", help="reader processes per rank (default: 2)")
    add("--precision", choices=PRECISIONS, default="fp32", help="of the network's arithmetic (default: fp32)")
    add("--local_rank", type=int, default=-1, help=argparse.SUPPRESS)  # given by the deepspeed launcher
    return make


def layers_named(args: argparse.Namespace) -> str:
    """Value of --layers; of the last block where it is not given, of all for cgp."""
    return args.layers or ("all" if args.probe == "cgp" else "last")


def pool_named(args: argparse.Namespace) -> "Pool":
    """Value of --pool; of the attentive probe the tokens."""
    pool: Pool = "tokens" if args.probe == "attentive" else args.pool
    return pool


def check_unseen(args: argparse.Namespace, name: str, file: str, digest: str) -> None:
    """A probe is tested on clips whose labels the weights have not learned.

    Args:
        args: Command line.
        name: Of --checkpoint.
        file: Its weights, as of `frozen.weights_of`.
        digest: Of the shards.

    Raises:
        UserError: the weights are of a finetuning on these shards that had such clips among its own.
    """
    from pipeline.probing.frozen import RANDOM, settings_of

    ours = None if file.startswith(RANDOM) else settings_of(Path(file), Path(file))
    if not ours or not isinstance(ours[0], FinetuneRecipe) or ours[1].digest != digest:
        return
    data = ours[0].data
    split = args.train_split if args.folds else args.split
    unseen = data.fold and args.folds and numbers_of("--folds", args.folds) == [data.fold]
    if split in data.train_split.split(",") and not unseen:
        other = f", or give --folds {data.fold}, which it held out" if data.fold and args.folds else ""
        raise UserError(
            f"--checkpoint {name}: was finetuned on split '{split}' of {args.shards}, whose labels a probe would be "
            f"tested on; probe its pretraining{other}"
        )


def weights_hash(file: str) -> str:
    """sha256 of a file of weights; of random ones their name."""
    from pipeline.probing.frozen import RANDOM

    if file.startswith(RANDOM):
        return file
    with Path(file).open("rb") as opened:
        return sha256(opened)


def compute_features(args: argparse.Namespace, frozen: "Frozen", world: "World") -> list[list[Path]]:
    """Files of one checkpoint's features, of the split to train on and without --folds of --split; a collective."""
    from pipeline.probing.features import compute

    layers = frozen.layers(layers_named(args))
    folder = args.features or (frozen.source.parent if frozen.source else Path("runs")) / "features"
    splits = [args.train_split] if args.folds else [args.train_split, args.split]
    return [compute(frozen, args.shards, split, layers, pool_named(args), folder, world, workers=args.workers,
                    most_gb=args.most_gb) for split in splits]  # fmt: skip


def probe(
    args: argparse.Namespace, name: str, frozen: "Frozen", weights: str, files: list[list[Path]],
    device: "torch.device",
) -> list[dict[str, Any]]:  # fmt: skip
    """Results of one checkpoint, a row for each stream and layer."""
    from pipeline.data.manifest import load_index, load_manifest
    from pipeline.probing.features import mapped
    from pipeline.probing.protocol import by_folds, by_seeds, judge

    layers = frozen.layers(layers_named(args))
    manifest = load_manifest(args.shards)
    features = mapped([file for of_split in files for file in of_split])
    if args.folds:
        folds = load_index(args.shards, columns=["fold"])["fold"].to_numpy()[features.rows]
        divisions = by_folds(folds, numbers_of("--folds", args.folds), 0)
    else:
        train = len(mapped(files[0]).rows)
        divisions = by_seeds(np.arange(train), np.arange(train, len(features.rows)), range(args.seeds))
    found = []
    streams = [*frozen.streams, *(["both"] if len(frozen.streams) > 1 else [])]
    for stream in streams:
        for chosen in [layers] if args.probe == "cgp" else [[layer] for layer in layers]:
            result = judge(features, divisions, args.probe, stream, chosen, manifest.single_label, device)
            about = {"checkpoint": name, "weights": weights, "digest": frozen.digest, "precision": args.precision,
                     "probe": args.probe, "pool": pool_named(args), "stream": stream,
                     "layer": chosen if args.probe == "cgp" else chosen[0]}  # fmt: skip
            split = {"split": args.train_split, "folds": args.folds} if args.folds else {"split": args.split}
            found.append(about | result | split | {"shards_digest": manifest.digest})
            show(found[-1])
    return found


def show(row: dict[str, Any]) -> None:
    """One line of the table."""
    layer = "-".join(map(str, (row["layer"][0], row["layer"][-1]))) if row["probe"] == "cgp" else row["layer"]
    spread = "" if row["spread"] is None else f" ± {row['spread']:.4f}"
    around = row["interval"]
    sys.stdout.write(
        f"{row['checkpoint'][-40:]:40s} {row['probe']:9s} {row['stream']:4s} {layer!s:>5s}  {row['metric']} "
        f"{row['value']:.4f}{spread}   95 % interval {around['low']:.4f} to {around['high']:.4f}   n {row['n']}\n"
    )
    sys.stdout.flush()


def track(args: argparse.Namespace, frozen: "Frozen", rows: list[dict[str, Any]]) -> None:
    """probe.json and an MLflow run, beside the run that the weights come from; for rank 0."""
    from pipeline.data.corpus import load_corpus
    from pipeline.tracking import open_tracker

    options = {name: getattr(args, name) for name in ("shards", "train_split", "split", "folds", "seeds", "probe",
                                                      "layers", "pool", "precision")}  # fmt: skip
    digest = hashlib.sha256(json.dumps([frozen.digest, options]).encode()).hexdigest()[:8]
    home = frozen.source.parent if frozen.source else Path("runs")
    name = frozen.source.name if frozen.source else Path(rows[0]["checkpoint"]).name.replace(":", "-")
    folder = home / f"probe-{name}-{digest}"
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "probe.json", rows)
    parent = str(frozen.source) if frozen.source else None
    tracker = open_tracker(LogConfig(), folder, name=f"{name}-{args.probe}", rank=0, kind="probe", parent=parent)
    tracker.params(options | {"checkpoint": rows[0]["checkpoint"], "digest": frozen.digest})
    data = DataConfig(shards=args.shards, train_split=args.train_split)
    tracker.dataset(load_corpus(data), data.shown)
    for row in rows:
        around = row["interval"]
        stem = f"{row['stream']}_{args.probe}_{row['metric']}"
        values = {stem: row["value"], f"{stem}_low": around["low"], f"{stem}_high": around["high"]}
        tracker.summary(values, 0 if args.probe == "cgp" else row["layer"])
    tracker.artifact(folder / "probe.json")
    tracker.finish("FINISHED")


def main() -> None:
    """Parses, computes features, trains probes, reports."""
    args = parser().parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if not args.shards:
        raise UserError("--shards '' names no shards; give the --out of shard_tools/build_shards.py, or its URL")
    if args.seeds < 1 or args.workers < 0 or not args.most_gb > 0:
        raise UserError(f"--seeds {args.seeds} --workers {args.workers} --most-gb {args.most_gb}: at least 1, at least "
                        "0, more than 0")  # fmt: skip
    for option, text in (("--folds", args.folds), ("--layers", args.layers)):
        if text:
            numbers_of(option, text)
    grid = grid_of(args.grid)
    from pipeline import distributed  # torch: not for --help
    from pipeline.data.corpus import load_corpus
    from pipeline.data.manifest import load_index, load_manifest
    from pipeline.data.spec import DataSpec
    from pipeline.probing.frozen import open_frozen, weights_of
    from pipeline.probing.protocol import by_folds

    manifest = load_manifest(args.shards)
    for option, split in (("--train-split", args.train_split), *([] if args.folds else [("--split", args.split)])):
        if split not in manifest.splits:
            raise UserError(f"{option} {split}: {args.shards} has the splits {', '.join(manifest.splits)}; name one")
    if not args.folds and args.split == args.train_split:
        raise UserError(f"--split {args.split} is --train-split too: a probe would be tested on the clips that train "
                        "it; name another split, or give --folds all")  # fmt: skip
    if not manifest.labels:
        raise UserError(f"{args.shards}: has no labels; a probe needs some")
    if args.folds:  # before the features, which may take hours
        folds = load_index(args.shards, args.train_split, columns=["fold"])["fold"].to_numpy()
        by_folds(folds, numbers_of("--folds", args.folds), 0)
    data = DataConfig(shards=args.shards, train_split=args.train_split)
    spec = DataSpec.of(load_corpus(data), data)
    with distributed.session(TIMEOUT, 0) as world:
        if args.out:
            distributed.decide(lambda: check_output_file(args.out, "--out"))
        named = weights_of(args.checkpoint, not args.last)
        for name, file in zip(args.checkpoint, named, strict=True):
            check_unseen(args, name, file, manifest.digest)
        opened = [open_frozen(file, spec, grid).at(args.precision) for file in named]
        for frozen in opened:
            frozen.layers(layers_named(args))
        weights = [weights_hash(file) if world.is_main else "" for file in named]
        files = [compute_features(args, frozen.to(world.device), world) for frozen in opened]
        if not world.is_main:  # no collective from here on: it would wait for the probes, for longer than one may take
            return
        found: list[dict[str, Any]] = []
        for name, frozen, of, own in zip(args.checkpoint, opened, weights, files, strict=True):
            rows = probe(args, name, frozen, of, own, world.device)
            if not args.no_mlflow:
                track(args, frozen, rows)
            found += rows
        if args.out:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            write_json(args.out, found)
            sys.stdout.write(f"written to {args.out}\n")


if __name__ == "__main__":
    run_cli(main)
