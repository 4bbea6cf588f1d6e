"""Make a served model of a finished finetuning, or put it into the registry.

    python -m pipeline.serving RUN_DIR [--register NAME] [--out DIR]

In: a run directory of finetune.py. Out: an MLflow model in RUN_DIR/model; with --register a version in the
registry of the run's MLflow server. `mlflow models serve --env-manager local -m RUN_DIR/model` serves it.
"""

import argparse
import sys
from pathlib import Path

from pipeline.errors import UserError, run_cli
from pipeline.serving.package import save_model
from pipeline.tracking.__main__ import sync
from pipeline.tracking.spool import Spool


def main() -> None:
    """Parses, saves, registers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="a finetuned run")
    parser.add_argument("--register", default="", metavar="NAME", help="in the registry (default: only save)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="(default: RUN_DIR/model)")
    args = parser.parse_args()
    out = args.out or args.run_dir / "model"
    card = save_model(args.run_dir, out)
    sys.stdout.write(f"{out}\n")
    if not args.register:
        return
    spool = Spool(args.run_dir)
    if not spool.exists:
        raise UserError(f"{args.run_dir}: was not tracked (log.mlflow=false), so no registry has its run")
    spool.main.append("model", {"path": str(out.resolve()), "step": 0, "tags": {}, "card": card,
                                "register": args.register})  # fmt: skip
    sync(spool, None)
    sys.stdout.write(f"registered as {args.register} at {spool.identity['uri']}\n")


if __name__ == "__main__":
    run_cli(main)
