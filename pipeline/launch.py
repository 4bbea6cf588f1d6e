"""From a command line to a job: what pretrain.py and finetune.py share.

In: `--deepspeed_config`, `--config`, `key=value` words. Out: a resolved recipe and DeepSpeed
configuration, a run directory with `config.yaml`, `ds.json` and `data.json`, and logging.
"""

import argparse
import json
import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic

from pipeline.config import RecipeT, describe, dump_recipe, load_recipe
from pipeline.distributed import World
from pipeline.engine.setup import read_deepspeed_config
from pipeline.errors import UserError


@dataclass(frozen=True)
class Launch(Generic[RecipeT]):
    """A parsed command line.

    Attributes:
        recipe: Resolved settings.
        ds: Content of ds.json, not yet reconciled.
        max_restarts: For `pipeline.restart`.
    """

    recipe: RecipeT
    ds: dict[str, Any]
    max_restarts: int = 0


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


def open_run(recipe: RecipeT, ds: dict[str, Any], run_dir: Path, world: World) -> None:
    """Makes the run directory, writes the resolved configuration, and starts the logs.

    Logs: rank 0 to stderr, every rank to `logs/rank-N.log`.
    """
    (run_dir / "logs").mkdir(parents=True, exist_ok=True)
    form = logging.Formatter("%(asctime)s %(levelname).1s %(message)s", "%H:%M:%S")
    handlers: list[logging.Handler] = [logging.FileHandler(run_dir / "logs" / f"rank-{world.rank}.log")]
    if world.is_main:
        handlers.append(logging.StreamHandler())
    root = logging.getLogger("pipeline")
    root.setLevel(logging.INFO)
    root.propagate = False
    for handler in handlers:
        handler.setFormatter(form)
        root.addHandler(handler)
    if world.is_main:
        (run_dir / "config.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
        (run_dir / "ds.json").write_text(json.dumps(ds, indent=1), encoding="utf-8")
