"""Pretrain CRAFT, another method of the paper or a later one on shards.

    deepspeed launchers/pretrain.py --deepspeed_config ds.json data.shards=DIR [--config YAML] [key=value ...]

In: shards of build_shards.py. Out: a run directory with checkpoints, metrics.jsonl and an MLflow run.
Without settings: CRAFT-base (180-PSWaCL) as in the paper. The same command again goes on where the
run stopped.
"""

from pipeline.command_line import parse
from pipeline.config import PretrainRecipe
from pipeline.errors import run_cli
from pipeline.faults import supervise


def main() -> None:
    """Parses, trains."""
    launch = parse(PretrainRecipe, __doc__)
    supervise(launch.max_restarts)
    from pipeline.distributed import session  # torch: not for --help, and not before the fork
    from pipeline.train import pretrain

    run = launch.recipe.run
    with session(run.timeout, run.seed, run.deterministic) as world:
        pretrain(launch, world)


if __name__ == "__main__":
    run_cli(main)
