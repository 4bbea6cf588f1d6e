"""From a command line to a job: what pretrain.py and finetune.py share.

In: `--deepspeed_config`, `--config`, `key=value` words. Out: a resolved recipe and DeepSpeed
configuration, a run directory with `config.yaml`, `ds.json` and `data.json`, logging and tracking.

A run directory is for one run. Before anything is written there, `check_run` compares the command with what is
trained there already; what may differ is what `pipeline.config` says of each setting.
"""

import argparse
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal

from pipeline import distributed
from pipeline.config import DataConfig, Recipe
from pipeline.data.manifest import Manifest
from pipeline.data.spec import DataSpec
from pipeline.distributed import World
from pipeline.engine import checkpoint
from pipeline.engine.setup import numeric_differences, read_deepspeed_config
from pipeline.errors import UserError
from pipeline.files import check_output_directory, read_json, write_json, write_text
from pipeline.recipes import RecipeT, describe, differences, dump_recipe, effect, flatten, load_recipe, read_run
from pipeline.tracking import (
    DatasetNote,
    Tracker,
    check_tracking,
    facts,
    figures,
    open_tracker,
    tracking_uri,
)


@dataclass(frozen=True)
class Launch(Generic[RecipeT]):
    """A parsed command line.

    Attributes:
        recipe: Resolved settings.
        ds: Content of ds.json, not yet reconciled.
        max_restarts: For `faults.supervise`.
        part_of: Run directory of the cross-validation that the run is a fold of.
    """

    recipe: RecipeT
    ds: dict[str, Any]
    max_restarts: int = 0
    part_of: Path | None = None


def parse(kind: type[RecipeT], description: str | None, argv: list[str] | None = None) -> Launch[RecipeT]:
    """Reads the command line; `--print-config` prints the resolved recipe and exits.

    Raises:
        UserError: a file or setting that is wrong.
        SystemExit: after `--help` or `--print-config`.
    """
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"settings (key = default):\n{describe(kind)}",
    )
    parser.add_argument(
        "--deepspeed_config",
        default="ds.json",
        metavar="JSON",
        help="DeepSpeed configuration: a path, or a file of configs/deepspeed/ (default: ds.json)",
    )
    meaning = "is always so; taken because DeepSpeed's own pages write it"
    parser.add_argument("--deepspeed", action="store_true", help=meaning)
    parser.add_argument(
        "--config", action="append", default=[], metavar="YAML", help="overrides; may be repeated (default: none)"
    )
    if "finetune" in kind.model_fields:
        meaning = "put the final model into MLflow's registry, as log.register_as does (default: do not)"
        parser.add_argument("--register", metavar="NAME", help=meaning)
    parser.add_argument(
        "--max-restarts", type=int, default=0, metavar="N", help="after a fault go on from the newest checkpoint, "
        "at most N times (default: 0)",
    )  # fmt: skip
    parser.add_argument("--print-config", action="store_true", help="show all settings and stop (default: off)")
    parser.add_argument("--local_rank", type=int, default=-1, help=argparse.SUPPRESS)  # given by the launcher
    parser.add_argument("settings", nargs="*", metavar="key=value", help="override any setting below (default: none)")
    args = parser.parse_intermixed_args(argv)
    words = [f"log.register_as={args.register}"] if getattr(args, "register", None) else []
    recipe = load_recipe(kind, args.config, [*args.settings, *words])
    if args.print_config:
        sys.stdout.write(dump_recipe(recipe))
        raise SystemExit(0)
    if not recipe.data.shards:
        raise UserError("data.shards is not set; give data.shards=DIR, the --out of shard_tools/build_shards.py")
    if recipe.log.mlflow:
        tracking_uri(recipe.log, Path(recipe.run.dir or "runs/run"))  # refuses one that can never work
    return Launch(recipe, read_deepspeed_config(args.deepspeed_config), max(0, args.max_restarts))


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
            raise UserError(f"run.dir = {run_dir} holds {_kind(before)}, this is {_kind(recipe)}; give another run.dir")
        found = differences(before, recipe)
        lines = [f"{key} = {now}, no longer {was}" for key, (was, now) in found.items() if _may_change(key)]
        fixed = {key: pair for key, pair in found.items() if not _may_change(key)}
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


def check_held_out(data: DataConfig, manifest: Manifest) -> None:
    """Refuses an `eval_split` that was named and is not there; the default may be missing.

    Raises:
        UserError: see above.
    """
    default = DataConfig.model_fields["eval_split"].default
    if not data.fold and data.eval_split not in (default, "") and data.eval_split not in manifest.splits:
        raise UserError(
            f"data.eval_split = '{data.eval_split}' is not in {data.shards}, which has {', '.join(manifest.splits)}; "
            "name one of these, or leave it empty to hold out nothing"
        )


def write_record(
    run_dir: Path, recipe: Recipe, ds: dict[str, Any], spec: DataSpec, init: dict[str, Any] | None = None
) -> None:
    """Writes what the run is: `config.yaml`, `ds.json`, `data.json`, and `init.json` of one that begins. For rank 0.

    Raises:
        UserError: the disk does not take them.
    """
    try:
        write_text(run_dir / "config.yaml", dump_recipe(recipe))
        write_json(run_dir / "ds.json", ds)
        spec.save(run_dir)
        if init:
            write_json(run_dir / "init.json", init)
    except OSError as error:
        raise UserError(f"run.dir = {run_dir}: {error.strerror}: {error.filename}") from error


def _make_logs(run_dir: Path) -> None:
    try:
        (run_dir / "logs").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"run.dir = {run_dir}: {error.strerror}: {error.filename}") from error


@contextmanager
def open_run(run_dir: Path, world: World) -> Iterator[None]:
    """Makes the run directory and keeps the logs while it is open; a collective: rank 0 makes the directory.

    Logs: rank 0 to stderr, every rank to `logs/rank-N.log`. Those of a run around it are silent meanwhile.

    Raises:
        UserError: this rank cannot write there.
    """
    form = logging.Formatter("%(asctime)s %(levelname).1s %(message)s", "%H:%M:%S")
    distributed.decide(lambda: _make_logs(run_dir))
    try:
        (run_dir / "logs").mkdir(parents=True, exist_ok=True)  # on a host that does not share it, or not yet
        handlers: list[logging.Handler] = [logging.FileHandler(run_dir / "logs" / f"rank-{world.rank}.log")]
    except OSError as error:
        raise UserError(
            f"rank {world.rank}: run.dir = {run_dir}: {error.strerror}: {error.filename}; every host must be able to "
            "write there", local=True
        ) from error  # fmt: skip
    if world.is_main:
        handlers.append(logging.StreamHandler())
    root = logging.getLogger("pipeline")
    before = (root.handlers, root.level, root.propagate)
    for handler in handlers:
        handler.setFormatter(form)
    root.handlers, root.propagate = handlers, False
    root.setLevel(logging.INFO)
    try:
        yield
    finally:
        root.handlers, level, root.propagate = before
        root.setLevel(level)
        for handler in handlers:
            handler.close()


@contextmanager
def tracked(
    launch: Launch[RecipeT], run_dir: Path, name: str, kind: str, world: World, manifest: Manifest
) -> Iterator[Tracker]:
    """The run's tracker, with settings, data and host told; at the end the run is finished, failed or killed."""
    recipe = launch.recipe
    tracker = open_tracker(
        recipe.log,
        run_dir,
        name=name,
        rank=world.rank,
        kind=kind,
        parent=recipe.model.init or None,
        part_of=launch.part_of,
        first_of_node=distributed.local_rank() == 0,
    )
    tracker.params(flatten(recipe))
    tracker.tags({"manifest_digest": manifest.digest, "ranks": str(world.size), "device": world.device.type})
    tracker.tags(facts.coverage(manifest) | recipe.log.tags)
    source, counts = str(recipe.data.shards), facts.profile(manifest)
    for context in ("training", "evaluation"):
        tracker.dataset(DatasetNote(manifest.dataset, manifest.digest, source, counts, context))
    for file in ("config.yaml", "ds.json", "data.json"):
        if world.is_main:
            tracker.artifact(run_dir / file)
    status: Literal["FINISHED", "FAILED", "KILLED"] = "FAILED"
    try:
        with world.faults.before_exit(lambda: tracker.finish("FAILED")):
            yield tracker
        status = "FINISHED"
    except Exception as error:
        world.faults.report(error)  # the others learn of it now, not after the tracking's last delivery
        raise
    except (KeyboardInterrupt, SystemExit):
        status = "KILLED"
        raise
    finally:
        if world.is_main and figures.curves(run_dir / "metrics.jsonl", run_dir / "curves.png"):
            tracker.artifact(run_dir / "curves.png")
        tracker.finish(status)


def _may_change(key: str) -> bool:
    """A setting that a run which goes on need not keep."""
    return key != "model.init" and effect(key) == "course"


def _kind(recipe: Recipe) -> str:
    return "a finetuning" if "finetune" in type(recipe).model_fields else "a pretraining"
