"""Finetune a pretrained (or random) model on labelled shards, and evaluate it.

    deepspeed launchers/finetune.py --deepspeed_config ds.json data.shards=DIR model.init=RUN_DIR [key=value ...]

                     [--register NAME]

In: shards and, as model.init, a pretraining run directory. Out: a run directory with checkpoints,
metrics.jsonl, results.json and an MLflow run linked to the pretraining's. Without settings: SWaB on
AudioSet as in the paper. The same command again goes on where the run stopped.
"""

from pipeline.config import FinetuneRecipe
from pipeline.distributed import session
from pipeline.engine.loop import train
from pipeline.errors import run_cli
from pipeline.jobs import finetune_job, finish_finetuning
from pipeline.launch import parse
from pipeline.restart import supervise
from pipeline.serving.publish import publish


def main() -> None:
    """Parses, builds, trains, evaluates, publishes the model."""
    launch = parse(FinetuneRecipe, __doc__)
    supervise(launch.max_restarts)
    run = launch.recipe.run
    with session(run.timeout, run.seed) as world, finetune_job(launch, world) as job:
        train(job, world)
        finish_finetuning(job, world)
        publish(job, world)


if __name__ == "__main__":
    run_cli(main)
