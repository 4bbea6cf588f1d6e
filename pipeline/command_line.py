"""Command lines: what all have in common, and that of pretrain.py and finetune.py.

In: words. Out: a resolved recipe and DeepSpeed configuration. Imports no torch: `--help` answers at once.
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Generic

from pipeline.errors import UserError
from pipeline.files import config_path, shipped, user_path
from pipeline.recipes import RecipeT, describe, dump_recipe, load_recipe


def new_parser(description: str | None, epilog: str | None = None) -> argparse.ArgumentParser:
    """A parser whose `--help` shows the module's docstring as it is written."""
    form = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(description=description, epilog=epilog, formatter_class=form)


def path_of(option: str) -> Callable[[str], Path]:
    """The type of an option that names a local path: see `user_path`."""
    return partial(user_path, what=option)


def numbers_of(option: str, text: str) -> list[int]:
    """Different numbers from 1, of "1,2", ascending; of "all" none.

    Raises:
        UserError: no such list.
    """
    found = [] if text == "all" else [int(word) if word.isdecimal() else 0 for word in text.split(",")]
    if min(found, default=1) < 1 or len(set(found)) < len(found):
        raise UserError(f"{option} {text}: give all, or different numbers from 1, such as 1,2")
    return sorted(found)


def grid_of(text: str | None) -> tuple[int, int] | None:
    """--grid, patches along frequency and time, of "12,101"; None: it was not given.

    Raises:
        UserError: not two positive numbers.
    """
    if text is None:
        return None
    high, _, wide = text.partition(",")
    if not (high.isdecimal() and wide.isdecimal() and int(high) * int(wide)):
        raise UserError(f"--grid {text}: give the patches along frequency and time, such as 12,101")
    return int(high), int(wide)


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
    parser = new_parser(description, f"settings (key = default):\n{describe(kind)}")
    parser.add_argument(
        "--deepspeed_config",
        default="ds.json",
        metavar="JSON",
        help="DeepSpeed configuration: a path, or a file of configs/deepspeed/ (default: ds.json)",
    )
    meaning = "is always so; taken because DeepSpeed's own pages write it"
    parser.add_argument("--deepspeed", action="store_true", help=meaning)
    parser.add_argument(
        "--config", action="append", default=[], metavar="YAML", help="overrides: a path, or a file of "
        "configs/ such as pretrain/demo; may be repeated (default: none)",
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
        from pipeline.tracking import tracking_uri  # not for --print-config

        tracking_uri(recipe.log, Path(recipe.run.dir or "runs/run"))  # refuses one that can never work
    return Launch(recipe, read_deepspeed_config(args.deepspeed_config), max(0, args.max_restarts))


def read_deepspeed_config(name: str) -> dict[str, Any]:
    """Reads a DeepSpeed configuration: a path, or the name of a file in configs/deepspeed/.

    Raises:
        UserError: no such file, not a JSON object, or a key twice, of which DeepSpeed would not see the first.
    """
    path = config_path(name, "--deepspeed_config", "deepspeed", ".json")

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        twice = [key for key in keys if keys.count(key) > 1]
        if twice:
            raise UserError(f"--deepspeed_config {path}: '{twice[0]}' is there twice; join the two")
        return dict(pairs)

    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=once)
    except OSError as error:
        names = ", ".join(sorted(file.name for file in shipped("deepspeed").glob("*.json")))
        raise UserError(f"--deepspeed_config {name}: {error.strerror}; give a path, or one of {names}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"--deepspeed_config {path}: not JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"--deepspeed_config {path}: holds no JSON object")
    return content
