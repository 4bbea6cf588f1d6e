"""Pretrain CRAFT or another method of the paper on shards.

    deepspeed launchers/pretrain.py --deepspeed_config ds.json data.shards=DIR [--config YAML] [key=value ...]

In: shards of build_shards.py. Out: a run directory with checkpoints, metrics.jsonl and an MLflow run.
Without settings: CRAFT-base (180-PSWaCL) as in the paper. The same command again goes on where the
run stopped.
"""

from pipeline.config import PretrainRecipe
from pipeline.distributed import session
from pipeline.engine.loop import train
from pipeline.errors import run_cli
from pipeline.faults import supervise
from pipeline.jobs import pretrain_job
from pipeline.launch import parse


def main() -> None:
    """Parses, builds, trains."""
    launch = parse(PretrainRecipe, __doc__)
    supervise(launch.max_restarts)
    run = launch.recipe.run
    with session(run.timeout, run.seed) as world, pretrain_job(launch, world) as job:
        train(job, world)


if __name__ == "__main__":
    run_cli(main)
