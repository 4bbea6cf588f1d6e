"""The last act of a finetuning: its model becomes an artifact and, with a name, a version in the registry.

In: a finished job. Out: `RUN_DIR/model/`, told to the tracker. Goes through the spool like everything else:
a server that is down gets it later.
"""

import logging

from pipeline.distributed import World
from pipeline.engine.job import Job
from pipeline.serving.package import check_place, save_model

log = logging.getLogger(__name__)

MODEL = "model"  # directory in the run's


def check_publishable(job: Job) -> None:
    """Tries the model's place before the training.

    Raises:
        UserError: it cannot be written, or something else lies there.
    """
    if job.recipe.log.model or job.recipe.log.register_as:
        check_place(job.run_dir, job.run_dir / MODEL, "log.model")


def publish(job: Job, world: World) -> None:
    """Saves and announces the model, on rank 0."""
    config = job.recipe.log
    if not world.is_main or not (config.model or config.register_as):
        return
    folder = job.run_dir / MODEL
    card = save_model(job.run_dir, folder)
    tags = {"run_dir": str(job.run_dir.resolve())}
    job.tracker.model(folder, job.total_steps, tags, card, config.register_as)
    log.info("served by: mlflow models serve --env-manager local -m %s", folder)
