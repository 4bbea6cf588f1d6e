"""A run directory is for one run: what may differ when a command goes on there, its record and its logs.

In: a resolved recipe, a reconciled DeepSpeed configuration, the data's format. Out: a run directory with `config.yaml`,
`ds.json`, `data.json` and `logs/`, or a refusal before anything is written. What may differ is what `pipeline.config`
says of each setting; between ranks, less.
"""

import logging
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from pipeline import distributed
from pipeline.config import FinetuneRecipe, Recipe
from pipeline.data.spec import DataSpec
from pipeline.distributed import World
from pipeline.engine import checkpoint
from pipeline.engine.setup import numeric_differences
from pipeline.errors import UserError
from pipeline.files import check_output_directory, lock, read_json, unlock, write_json, write_text
from pipeline.recipes import changes_result, differences, dump_recipe, effect, flatten, read_run
from pipeline.tracking import check_tracking
from pipeline.tracking.store import without_password

log = logging.getLogger(__name__)

HELD_SECONDS = 100.0  # longer than an NFS server keeps the locks of a host that is gone, most often 90


def check_ranks(recipe: Recipe, ds: dict[str, Any], spec: DataSpec) -> None:
    """Refuses ranks of different runs; a collective.

    A launcher starts one command everywhere, but where a host's code, recipe, ds.json or shards are others, each rank
    would train on with a rate, or with clips and labels, of its own, or wait in a collective that others do not reach.
    Where a host has its data, and how it reads that, are its own affair.

    Args:
        recipe: Resolved settings.
        ds: Reconciled DeepSpeed configuration.
        spec: Of this rank's shards.

    Raises:
        UserError: this rank's are not rank 0's.
    """
    own = {key: value for key, value in flatten(recipe).items() if changes_result(key) or not key.startswith("data.")}
    own |= {f"ds.json's {key}": value for key, value in ds.items()}
    own["data.shards digest"] = spec.digest[:16]
    shown = {key: without_password(str(value)) for key, value in own.items()}
    distributed.check_same(shown, "give all hosts the same code, configs and shards")


def check_run(run_dir: Path, recipe: Recipe, ds: dict[str, Any], spec: DataSpec) -> tuple[int, list[str]]:
    """Refuses a run directory that holds another run or cannot be written; writes nothing. For rank 0.

    Another run: its newest checkpoint, or its results, were made with another value of a setting whose effect is
    "result", from other weights, on other data, or in another precision. Without either, nothing is lost.

    Args:
        run_dir: Run directory; need not exist.
        recipe: Resolved settings.
        ds: Reconciled DeepSpeed configuration.
        spec: What the run will remember of its data.

    Returns:
        Step of the checkpoint that the run goes on from (0: none), and a line for each setting of effect "course"
        that is another one from there on.

    Raises:
        UserError: see above; or a checkpoint is there, and `run.resume` is "never" or none is whole.
    """
    saved, state = checkpoint.complete_checkpoints(run_dir), checkpoint.read_state(run_dir)
    lines = []
    if saved and recipe.run.resume == "never":
        raise UserError(f"run.resume = never, but {run_dir} holds a checkpoint; give another run.dir")
    if saved and state is None:
        raise UserError(
            f"{run_dir}: none of its checkpoints is whole; delete {run_dir / 'checkpoints'} to train from the start, "
            "or give another run.dir"
        )
    if saved or (run_dir / "results.json").exists():
        made = run_dir / "checkpoints" / f"step-{state['step']:08d}" if state else run_dir
        made = made if (made / "config.yaml").exists() else run_dir
        before = read_run(made)
        if type(before) is not type(recipe):
            names = ["a finetuning" if isinstance(one, FinetuneRecipe) else "a pretraining" for one in (before, recipe)]
            raise UserError(f"run.dir = {run_dir} holds {names[0]}, this is {names[1]}; give another run.dir")
        found = differences(before, recipe)
        free = {key for key in found if key != "model.init" and effect(key) == "course"}
        lines = [f"{key} = {now}, no longer {was}" for key, (was, now) in found.items() if key in free]
        fixed = {key: pair for key, pair in found.items() if key not in free}
        if (made / "ds.json").exists():
            was = read_json(made / "ds.json", "the run directory is damaged; give another run.dir")
            fixed |= {f"ds.json's {key}": pair for key, pair in numeric_differences(was, ds).items()}
        if (made / "data.json").exists():
            digest = DataSpec.load(made).digest
            fixed |= {"data.shards digest": (digest[:16], spec.digest[:16])} if digest != spec.digest else {}
        for key, (was, now) in fixed.items():
            raise UserError(
                f"run.dir = {run_dir} was trained with {key} = {was}, not {now}; repeat that command, or give another "
                "run.dir"
            )
    check_output_directory(run_dir, "run.dir")
    check_tracking(recipe.log, run_dir)
    return state["step"] if state else 0, lines


def write_record(
    run_dir: Path, recipe: Recipe, ds: dict[str, Any], spec: DataSpec, init: dict[str, Any] | None = None, step: int = 0
) -> None:
    """Writes what the run is: `config.yaml`, `ds.json`, `data.json`, and `init.json` of one that begins. For rank 0.

    Without the passwords of URLs (`log.uri`, `data.shards`): all users of MLflow's server read `config.yaml` there, and
    served models have it.

    Of one that goes on from `step` it names that checkpoint as `latest`, too: one that was killed may have completed it
    and not named it, or a later one, which `latest` names, may be damaged. The weights of a run are those of `latest`.

    Raises:
        UserError: the disk does not take them.
    """
    try:
        write_text(run_dir / "config.yaml", without_password(dump_recipe(recipe)))
        write_json(run_dir / "ds.json", ds)
        spec.save(run_dir)
        if init:
            write_json(run_dir / "init.json", init)
        if step:
            write_text(run_dir / "checkpoints" / "latest", f"step-{step:08d}")
    except OSError as error:
        raise UserError(f"run.dir = {run_dir}: {error.strerror}: {error.filename}") from error


@contextmanager
def open_run(run_dir: Path, world: World) -> Iterator[None]:
    """Makes the run directory, holds it and keeps the logs while it is open; a collective: rank 0 makes and holds it.

    Logs: rank 0 to stderr, every rank to `logs/rank-N.log`. Those of a run around it are silent meanwhile.

    Raises:
        UserError: this rank cannot write there, or other processes train there.
    """
    with ExitStack() as stack:
        distributed.decide(lambda: stack.enter_context(_held(run_dir)))
        stack.enter_context(_logged(run_dir, world))
        yield


@contextmanager
def _held(run_dir: Path) -> Iterator[None]:
    """One run at a time: two would write the same checkpoints and double each line of metrics.jsonl.

    Ranks that outlive their launcher may still be there when the same command is given again. Where a host is gone, its
    lock may stay for as long as an NFS server waits for it.

    Raises:
        UserError: the directory cannot be made, or another run keeps it for HELD_SECONDS.
    """
    path, end, said = run_dir / "logs" / "lock", time.monotonic() + HELD_SECONDS, False
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("ab")
    except OSError as error:
        raise UserError(f"run.dir = {run_dir}: {error.strerror}: {error.filename}") from error
    with file:
        while not lock(file.fileno(), wait=False):
            if time.monotonic() > end:
                raise UserError(
                    f"run.dir = {run_dir}: other processes train there; end them, or give another run.dir. Where their "
                    f"host is gone, delete {path}", transient=True
                )  # fmt: skip
            if not said:
                log.warning("run.dir = %s: other processes train there; waiting for %.0f s", run_dir, HELD_SECONDS)
            said = True
            time.sleep(1.0)
        try:
            yield
        finally:
            unlock(file.fileno())  # of readers, too, which inherited it


@contextmanager
def _logged(run_dir: Path, world: World) -> Iterator[None]:
    """The logs of `open_run`."""
    logs = run_dir / "logs"
    try:
        logs.mkdir(parents=True, exist_ok=True)  # on a host that does not share it, or not yet
        file = logging.FileHandler(logs / f"rank-{world.rank}.log", encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise UserError(
            f"rank {world.rank}: run.dir = {run_dir}: {error.strerror}: {error.filename}; every host must be able to "
            "write there", local=True
        ) from error  # fmt: skip
    handlers: list[logging.Handler] = [file, *([logging.StreamHandler()] if world.is_main else [])]
    root = logging.getLogger("pipeline")
    before = (root.handlers, root.level, root.propagate)
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname).1s %(message)s", "%H:%M:%S"))
    root.handlers, root.propagate = handlers, False
    root.setLevel(logging.INFO)
    try:
        yield
    finally:
        root.handlers, level, root.propagate = before
        root.setLevel(level)
        for handler in handlers:
            handler.close()
