"""Evaluate one finetuned run, or several as one, on shards.

    python launchers/evaluate.py --checkpoint RUN_DIR --shards DIR [--split NAME] [--out results.json]
    python launchers/evaluate.py --checkpoint SEED0 SEED1 SEED2 --shards DIR          (ensemble)
    deepspeed --num_gpus 8 launchers/evaluate.py --checkpoint RUN_DIR --shards DIR    (any number of ranks)

In: run directories of finetune.py and shards of the same format and labels. Out: metrics with a 95 %
bootstrap interval on stdout; with --out, the whole table as JSON; with --predictions, every clip's
scores; with --plots, tables and pictures. Each clip is scored exactly once.
"""

import argparse
import logging
import sys
from pathlib import Path
from typing import Any

from pipeline.config import FinetuneRecipe
from pipeline.distributed import session
from pipeline.engine.evaluation import results, write_predictions, write_results
from pipeline.engine.metrics import precision_recall
from pipeline.ensemble import score_averaged_weights, score_ensemble
from pipeline.errors import UserError, run_cli
from pipeline.files import check_output_directory, check_output_file, user_path
from pipeline.jobs import Scored, score_run
from pipeline.model.weights import weights_file
from pipeline.recipes import load_recipe
from pipeline.tracking import figures


def parser() -> argparse.ArgumentParser:
    """The command line."""
    make = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = make.add_argument
    add("--checkpoint", required=True, nargs="+", metavar="RUN_DIR", help="finetuned runs (no default)")
    add("--combine", choices=("scores", "weights"), default="scores",
        help="several runs: average their probabilities or their weights (default: scores)")  # fmt: skip
    add("--shards", required=True, metavar="DIR", help="directory or URL of shards (no default)")
    add("--split", metavar="NAME", help="split to score (default: what the run held out)")
    add("--out", metavar="JSON", help="write results.json here (default: only print)")
    add("--predictions", metavar="PARQUET", help="write each clip's key, labels, scores (default: nowhere)")
    add("--plots", metavar="DIR", help="per-class table, PR curves, confusion matrix (default: nowhere)")
    add("--last", action="store_true", help="the last weights, not the averaged ones (default: off)")
    add("--batch-size", type=int, default=32, metavar="N", help="clips per forward over all ranks (default: 32)")
    add("--workers", type=int, default=2, metavar="N", help="reader processes per rank (default: 2)")
    add("--local_rank", type=int, default=-1, help=argparse.SUPPRESS)  # given by the deepspeed launcher
    return make


def check(args: argparse.Namespace) -> None:
    """Reads the options' paths.

    Raises:
        UserError: one is no path, or two outputs are one file.
    """
    args.checkpoint = [user_path(name, "--checkpoint") for name in args.checkpoint]
    for name in ("out", "predictions", "plots"):
        if getattr(args, name) is not None:
            setattr(args, name, user_path(getattr(args, name), f"--{name}"))
    if args.out and args.predictions and args.out.resolve() == args.predictions.resolve():
        raise UserError(f"--out and --predictions are both {args.out}; name two files")


def check_outputs(args: argparse.Namespace) -> None:
    """Tries the places that will be written, before anything is scored.

    Raises:
        UserError: one cannot be written.
    """
    if args.out:
        check_output_file(args.out, "--out")
    if args.predictions:
        check_output_file(args.predictions, "--predictions")
    if args.plots:
        check_output_directory(args.plots, "--plots")


def show(content: dict[str, Any]) -> None:
    """Prints the metrics."""
    for name, value in content["metrics"].items():
        around = content["interval"] if name == content["metric"] else None
        interval = f"   95 % interval {around['low']:.4f} to {around['high']:.4f}" if around else ""
        sys.stdout.write(f"{name:24s} {value:.4f}{interval}\n")
    fold = f", fold {content['fold']}" if content["fold"] else ""
    sys.stdout.write(
        f"{content['clips']} clips of split '{content['split']}'{fold}; "
        f"{content['classes_without_positives']} classes without a positive clip left out of the mean\n"
    )


def plot(scored: Scored, content: dict[str, Any], folder: Path) -> None:
    """Writes per_class.csv, pr_curves.csv and .png, and of single-label data confusion.csv and .png."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [label.name for label in scored.spec.labels]
    scores = scored.scores
    figures.per_class(content, folder / "per_class.csv")
    figures.precision_recall_curves(precision_recall(scores.logits, scores.targets), names, folder)
    if scored.spec.single_label:
        figures.confusion(scores.targets, scores.logits, names, folder)


def main() -> None:
    """Parses, scores, reports."""
    args = parser().parse_args()
    check(args)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    runs = [(run_dir, weights_file(run_dir, average=not args.last)) for run_dir in args.checkpoint]
    words = [f"data.shards={args.shards}", f"eval.batch_size={args.batch_size}", f"data.workers={args.workers}"]
    if args.split:
        words += [f"data.eval_split={args.split}", "data.fold=0"]
    config = args.checkpoint[0] / "config.yaml"
    if not config.is_file():
        raise UserError(f"--checkpoint {args.checkpoint[0]}: holds no config.yaml; give a run directory of finetune.py")
    recipe = load_recipe(FinetuneRecipe, [config], words)
    with session(recipe.run.timeout, recipe.run.seed) as world:
        if world.is_main:
            check_outputs(args)
        if len(runs) == 1:
            scored = score_run(*runs[0], recipe, world)
        else:
            scored = (score_ensemble if args.combine == "scores" else score_averaged_weights)(runs, recipe, world)
        if not world.is_main:
            return
        content = results(scored.scores, scored.spec.labels, scored.spec.single_label, scored.about)
        show(content)
        if args.predictions:
            args.predictions.parent.mkdir(parents=True, exist_ok=True)
            write_predictions(scored.scores, scored.keys, args.predictions)
        if args.plots:
            plot(scored, content, args.plots)
        if args.out:
            write_results(content, args.out)
            sys.stdout.write(f"written to {args.out}\n")


if __name__ == "__main__":
    run_cli(main)
