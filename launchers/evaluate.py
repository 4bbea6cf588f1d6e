"""Evaluate one finetuned run, or several as one, on shards.

    python launchers/evaluate.py --checkpoint RUN_DIR --shards DIR [--split NAME] [--out results.json]
    python launchers/evaluate.py --checkpoint SEED0 SEED1 SEED2 --shards DIR          (ensemble)
    deepspeed --num_gpus 8 launchers/evaluate.py --checkpoint RUN_DIR --shards DIR    (any number of ranks)
    python launchers/evaluate.py --checkpoint RUN_DIR --shards DIR --ids FILE         (the listed clips alone)

In: run directories of finetune.py and shards of the same format and labels. Out: metrics with a 95 %
bootstrap interval on stdout; with --out, the whole table as JSON; with --predictions, every clip's
scores; with --plots, tables and pictures. Each clip is scored exactly once.
"""

import argparse
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.command_line import new_parser, path_of
from pipeline.config import PRECISIONS, FinetuneRecipe
from pipeline.errors import UserError, run_cli
from pipeline.files import check_output_directory, check_output_file, write_json
from pipeline.hub import model_of
from pipeline.recipes import finetuned_recipe, load_recipe

if TYPE_CHECKING:
    from pipeline.runs import Scored

log = logging.getLogger(__name__)

RECORDS = ("config.yaml", "ds.json", "data.json", "init.json", "fold.json", "done.json", "metrics.jsonl")  # of a run


def parser() -> argparse.ArgumentParser:
    """The command line."""
    make = new_parser(__doc__)
    add = make.add_argument
    add("--checkpoint", required=True, nargs="+", type=model_of("--checkpoint"), metavar="RUN",
        help="finetuned runs, hf-craft exports of such, or hf://OWNER/NAME (no default)")  # fmt: skip
    add("--combine", choices=("scores", "weights"), default="scores",
        help="several runs: average their probabilities or their weights (default: scores)")  # fmt: skip
    add("--shards", required=True, metavar="DIR", help="directory or URL of shards (no default)")
    add("--split", metavar="NAME", help="split to score (default: what the run held out)")
    add("--ids", type=path_of("--ids"), metavar="FILE",
        help="score only these clips of the split: one id (key) a line, as inspect_shards.py --ids-out writes them "
        "(default: all)")  # fmt: skip
    add("--out", type=path_of("--out"), metavar="JSON", help="write results.json here (default: only print)")
    add("--predictions", type=path_of("--predictions"), metavar="PARQUET",
        help="write each clip's key, labels, scores (default: nowhere)")  # fmt: skip
    add("--plots", type=path_of("--plots"), metavar="DIR",
        help="per-class table, PR curves, confusion matrix (default: nowhere)")  # fmt: skip
    add("--last", action="store_true", help="the last weights, not the averaged ones (default: off)")
    add("--batch-size", type=int, default=32, metavar="N", help="clips per forward over all ranks (default: 32)")
    add("--workers", type=int, default=2, metavar="N", help="reader processes per rank (default: 2)")
    add("--precision", choices=PRECISIONS, default="fp32", help="of the network's arithmetic (default: fp32)")
    add("--local_rank", type=int, default=-1, help=argparse.SUPPRESS)  # given by the deepspeed launcher
    return make


def check_places(args: argparse.Namespace) -> None:
    """Tries where the results shall go; nothing is left there.

    Raises:
        UserError: a place that cannot be written, two results for one place, or a file that a run consists of.
    """
    if args.out:
        check_output_file(args.out, "--out")
    if args.predictions:
        check_output_file(args.predictions, "--predictions")
    if args.plots:
        check_output_directory(args.plots, "--plots")
    places = [place.resolve() for place in (args.out, args.predictions, args.plots) if place]
    inputs = [args.ids.resolve()] if args.ids else []
    if len({*places, *inputs}) < len(places) + len(inputs):
        raise UserError("--out, --predictions, --plots, --ids: two name the same place; name others")
    for place in places:
        if place.parent.name.startswith("step-") or (place.name in RECORDS and (place.parent / "config.yaml").exists()):
            raise UserError(f"{place} is what a run consists of; name another file")


def read_ids(path: Path) -> pa.Array:
    """The ids that a text file lists, one a line, each once: string [n]. Those that it repeats are named in the log.

    Raises:
        UserError: it cannot be read, or lists none.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"--ids {path}: {reason}; give a text file (UTF-8) of one id a line") from error
    counts = pa.array([line.strip() for line in lines if line.strip()], pa.string()).value_counts()
    ids, times = counts.flatten()
    if not len(ids):
        raise UserError(f"--ids {path}: lists no id; give one a line")
    twice = ids.filter(pc.greater(times, 1))
    if len(twice):
        some = ", ".join(twice[:5].to_pylist()) + (", ..." if len(twice) > 5 else "")
        log.warning("--ids %s: %d ids are there more than once and count once: %s", path, len(twice), some)
    return ids


def check_held_out(run_dirs: list[Path], recipes: list[FinetuneRecipe]) -> None:
    """Several runs are scored on the clips that the first one held out: the others must have held out the same.

    Raises:
        UserError: one of them held out another fold or split.
    """
    words = [f"fold {recipe.data.fold}" if recipe.data.fold else f"split '{recipe.data.eval_split}'"
             for recipe in recipes]  # fmt: skip
    for run_dir, said in zip(run_dirs, words, strict=True):
        if said != words[0]:
            raise UserError(
                f"{run_dir} held out {said}, {run_dirs[0]} {words[0]}, on which the other one may have been trained; "
                "name runs that held out the same, or a --split that none was trained on"
            )


def check_one_label(scored: "Scored", shards: str, run_dir: Path) -> None:
    """Accuracy is of clips that have exactly one label.

    Raises:
        UserError: the run is of single-label data, and other clips were scored.
    """
    other = np.flatnonzero(scored.scores.targets.sum(axis=1) != 1)
    if scored.spec.single_label and len(other):
        raise UserError(
            f"{shards}: {len(other)} of {len(scored.keys)} clips have no label or several, such as "
            f"{scored.keys[other[0]]}, and {run_dir} was trained on clips of one label each, whose metric is accuracy; "
            "list clips of one label with --ids, or name another --split"
        )


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
    if ids := content.get("ids"):
        missing = f"; {ids['missing']} are missing" if ids["missing"] else ""
        sys.stdout.write(
            f"{ids['file']}: {ids['listed']} ids, {ids['found']} of them in the shards, "
            f"{ids['evaluated']} evaluated{missing}\n"
        )


def plot(scored: "Scored", content: dict[str, Any], folder: Path) -> None:
    """Writes per_class.csv, pr_curves.csv and .png, and of single-label data confusion.csv and .png."""
    from pipeline.engine.evaluation import precision_recall
    from pipeline.tracking import figures

    folder.mkdir(parents=True, exist_ok=True)
    scores, names = scored.scores, [label.name for label in scored.spec.labels]
    figures.evaluation(content, scores.targets, scores.logits, folder)
    figures.precision_recall_curves(precision_recall(scores.logits, scores.targets), names, folder)


def main() -> None:
    """Parses, scores, reports."""
    args = parser().parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if not args.shards:
        raise UserError("--shards '' names no shards; give the --out of shard_tools/build_shards.py, or its URL")
    if args.batch_size < 1 or args.workers < 0:
        raise UserError(f"--batch-size {args.batch_size} --workers {args.workers}: at least 1, and at least 0")
    recipes = [finetuned_recipe(run_dir) for run_dir in args.checkpoint]
    if not args.split:
        check_held_out(args.checkpoint, recipes)
    from pipeline import distributed  # torch: not for --help
    from pipeline.data.manifest import labelled_manifest
    from pipeline.engine.evaluation import check_same_weights, results, write_predictions
    from pipeline.model.weights import weights_file
    from pipeline.runs import score_averaged_weights, score_ensemble, score_run

    runs = [(run_dir, weights_file(run_dir, average=not args.last)) for run_dir in args.checkpoint]
    words = [f"data.shards={args.shards}", "data.schedule=[]", "data.temperature=1",
             f"eval.batch_size={args.batch_size}", f"data.workers={args.workers}"]  # fmt: skip
    if args.split:
        words += [f"data.eval_split={args.split}", "data.fold=0"]
    recipe = load_recipe(FinetuneRecipe, [args.checkpoint[0] / "config.yaml"], words)
    with distributed.session(recipe.run.timeout, recipe.run.seed) as world:
        distributed.decide(lambda: check_places(args))
        check_same_weights([file for _, file in runs])
        labelled_manifest(args.shards)
        ids = distributed.decide(lambda: read_ids(args.ids) if args.ids else None)
        if len(runs) == 1:
            scored = score_run(*runs[0], recipe, world, ids, args.precision)
        else:
            several = score_ensemble if args.combine == "scores" else score_averaged_weights
            scored = several(runs, recipe, world, ids, args.precision)
        check_one_label(scored, args.shards, args.checkpoint[0])
        content = results(
            scored.scores, scored.spec.labels, scored.spec.single_label, scored.about, world.device
        )
        if not world.is_main:
            return
        if args.ids:
            content["ids"] = {"file": str(args.ids)} | content["ids"]
        show(content)
        try:
            if args.predictions:
                args.predictions.parent.mkdir(parents=True, exist_ok=True)
                write_predictions(scored.scores, scored.keys, args.predictions)
            if args.plots:
                plot(scored, content, args.plots)
            if args.out:
                args.out.parent.mkdir(parents=True, exist_ok=True)
                write_json(args.out, content)
                sys.stdout.write(f"written to {args.out}\n")
        except OSError as error:
            raise UserError(f"{error.filename}: {error.strerror}; the metrics above are all that is left") from error


if __name__ == "__main__":
    run_cli(main)
