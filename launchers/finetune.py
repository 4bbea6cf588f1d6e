"""Finetune a pretrained (or random) model on labelled shards, and evaluate it.

    deepspeed launchers/finetune.py --deepspeed_config ds.json data.shards=DIR model.init=RUN_DIR [key=value ...]
                     [--register NAME]
    deepspeed launchers/finetune.py ... finetune.folds=all      (cross-validation: each fold held out in turn)

In: shards and, as model.init, a pretraining run directory. Out: a run directory with checkpoints,
metrics.jsonl, results.json and an MLflow run linked to the pretraining's; of a cross-validation one in
RUN_DIR/fold-K each. Without settings: SWaB on AudioSet as in the paper. The same command again goes on where
the run stopped.
"""

import sys
from typing import Any

from pipeline.command_line import parse
from pipeline.config import FinetuneRecipe
from pipeline.errors import run_cli
from pipeline.faults import supervise


def show(content: dict[str, Any]) -> None:
    """Prints what the folds come to."""
    best = content["common_epoch"]
    lines = [f"{'fold':10s} {content['metric']:>10s}" + (f"   epoch {best['epoch']}" if best else "")]
    rows = {fold: (value, best["folds"][fold] if best else None) for fold, value in content["folds"].items()}
    rows["mean"] = (content["value"], best["value"] if best else None)
    if content["spread"] is not None:
        rows["deviation"] = (content["spread"], best["spread"] if best else None)
    lines += [f"{row:10s} {value:10.4f}" + ("" if at is None else f"   {at:.4f}") for row, (value, at) in rows.items()]
    lines += [f"{content['metric']}: final {content['weights']}, {content['clips']} clips, each held out once"]
    if best:
        lines += [f"epoch {best['epoch']}: best for all folds together, chosen on the held-out clips: optimistic"]
    sys.stdout.write("\n".join(lines) + "\n")


def main() -> None:
    """Parses; one run, or one for each fold."""
    launch = parse(FinetuneRecipe, __doc__)
    supervise(launch.max_restarts)
    from pipeline.cross_validation import cross_validate  # torch: not for --help, and not before the fork
    from pipeline.distributed import session
    from pipeline.train import finetune

    settings = launch.recipe.run
    with session(settings.timeout, settings.seed, settings.deterministic) as world:
        if not launch.recipe.finetune.folds:
            finetune(launch, world)
            return
        content = cross_validate(launch, world)
        if world.is_main:
            show(content)


if __name__ == "__main__":
    run_cli(main)
