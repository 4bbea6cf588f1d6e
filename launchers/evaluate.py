"""Evaluate a finetuned run on shards.

    python launchers/evaluate.py --checkpoint RUN_DIR --shards DIR [--split NAME] [--out results.json]

In: a run directory of finetune.py and shards of the same format and labels. Out: metrics on stdout and,
with --out, the whole table as JSON. Each clip is scored exactly once.
"""

import argparse
import logging
import sys
from pathlib import Path

from pipeline.config import FinetuneRecipe, load_recipe
from pipeline.distributed import session
from pipeline.engine.evaluation import write_results
from pipeline.errors import run_cli
from pipeline.jobs import evaluate_run
from pipeline.model.weights import weights_file


def main() -> None:
    """Parses, scores, reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, type=Path, metavar="RUN_DIR", help="a finetuned run")
    parser.add_argument("--shards", required=True, metavar="DIR", help="directory or URL of shards")
    parser.add_argument("--split", metavar="NAME", help="split to score (default: what the run held out)")
    parser.add_argument("--out", type=Path, metavar="JSON", help="write results.json here (default: only print)")
    parser.add_argument("--last", action="store_true", help="the last weights, not the averaged ones (default: off)")
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="clips per forward (default: 32)")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="reader processes (default: 2)")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    file = weights_file(args.checkpoint, average=not args.last)
    words = [f"data.shards={args.shards}", f"eval.batch_size={args.batch_size}", f"data.workers={args.workers}"]
    if args.split:
        words += [f"data.eval_split={args.split}", "data.fold=0"]
    recipe = load_recipe(FinetuneRecipe, [args.checkpoint / "config.yaml"], words)
    with session(recipe.run.timeout, recipe.run.seed) as world:
        content = evaluate_run(args.checkpoint, file, recipe, world)
        if not world.is_main:
            return
        for name, value in content["metrics"].items():
            sys.stdout.write(f"{name:24s} {value:.4f}\n")
        missing = content["classes_without_positives"]
        sys.stdout.write(
            f"{content['clips']} clips of split '{content['split']}'"
            f"{', fold ' + str(content['fold']) if content['fold'] else ''}; "
            f"{missing} classes without a positive clip left out of the mean\n"
        )
        if args.out:
            write_results(content, args.out)
            sys.stdout.write(f"written to {args.out}\n")


if __name__ == "__main__":
    run_cli(main)
