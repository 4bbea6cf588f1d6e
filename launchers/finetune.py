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

from pipeline.config import FinetuneRecipe
from pipeline.cross_validation import cross_validate
from pipeline.distributed import World, session
from pipeline.engine.job import Job
from pipeline.engine.loop import train
from pipeline.errors import run_cli
from pipeline.faults import supervise
from pipeline.jobs import finetune_job, finish_finetuning
from pipeline.launch import Launch, parse
from pipeline.serving.publish import check_publishable, publish


def run(launch: Launch[FinetuneRecipe], world: World) -> Job:
    """Builds, trains, evaluates, publishes the model."""
    with finetune_job(launch, world) as job:
        check_publishable(job)
        train(job, world)
        finish_finetuning(job, world)
        publish(job, world)
    return job


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
    settings = launch.recipe.run
    with session(settings.timeout, settings.seed) as world:
        if not launch.recipe.finetune.folds:
            run(launch, world)
            return
        content = cross_validate(launch, world, run)
        if world.is_main:
            show(content)


if __name__ == "__main__":
    run_cli(main)
