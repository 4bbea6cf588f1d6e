"""From a command line to a job: what pretrain.py and finetune.py share.

In: `--deepspeed_config`, `--config`, `key=value` words. Out: a resolved recipe and DeepSpeed
configuration, a run directory with `config.yaml` and `ds.json`, logging and tracking.
"""

import argparse
import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal

from pipeline import distributed
from pipeline.data.manifest import Manifest
from pipeline.distributed import World
from pipeline.engine.setup import read_deepspeed_config
from pipeline.errors import UserError
from pipeline.recipes import RecipeT, describe, dump_recipe, flatten, load_recipe
from pipeline.tracking import DatasetNote, Tracker, facts, figures, open_tracker


@dataclass(frozen=True)
class Launch(Generic[RecipeT]):
    """A parsed command line.

    Attributes:
        recipe: Resolved settings.
        ds: Content of ds.json, not yet reconciled.
        max_restarts: For `pipeline.restart`.
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
    return Launch(recipe, read_deepspeed_config(args.deepspeed_config), max(0, args.max_restarts))


@contextmanager
def open_run(recipe: RecipeT, ds: dict[str, Any], run_dir: Path, world: World) -> Iterator[None]:
    """Makes the run directory, writes the resolved configuration, and keeps the logs while it is open.

    Logs: rank 0 to stderr, every rank to `logs/rank-N.log`. Those of a run around it are silent meanwhile.
    """
    (run_dir / "logs").mkdir(parents=True, exist_ok=True)
    form = logging.Formatter("%(asctime)s %(levelname).1s %(message)s", "%H:%M:%S")
    handlers: list[logging.Handler] = [logging.FileHandler(run_dir / "logs" / f"rank-{world.rank}.log")]
    if world.is_main:
        handlers.append(logging.StreamHandler())
    root = logging.getLogger("pipeline")
    before = (root.handlers, root.level, root.propagate)
    for handler in handlers:
        handler.setFormatter(form)
    root.handlers, root.propagate = handlers, False
    root.setLevel(logging.INFO)
    if world.is_main:
        (run_dir / "config.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
        (run_dir / "ds.json").write_text(json.dumps(ds, indent=1), encoding="utf-8")
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
        yield tracker
        status = "FINISHED"
    except (KeyboardInterrupt, SystemExit):
        status = "KILLED"
        raise
    finally:
        if world.is_main and figures.curves(run_dir / "metrics.jsonl", run_dir / "curves.png"):
            tracker.artifact(run_dir / "curves.png")
        tracker.finish(status)
