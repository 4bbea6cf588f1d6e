"""Make a served model of a finished finetuning, or put it into the registry.

    python -m pipeline.serving RUN_DIR [--register NAME] [--out DIR]

In: a run directory of finetune.py. Out: an MLflow model in RUN_DIR/model; with --register a version in the
registry of the run's MLflow server. `mlflow models serve --env-manager local -m RUN_DIR/model` serves it.
The directory is new, empty, or a model that this command made before, which is replaced.
"""

import sys

from pipeline.command_line import new_parser, path_of
from pipeline.errors import UserError, run_cli
from pipeline.serving.package import MODEL, check_place, save_model
from pipeline.tracking.__main__ import sync
from pipeline.tracking.spool import Spool


def main() -> None:
    """Parses, saves, registers."""
    parser = new_parser(__doc__)
    parser.add_argument("run_dir", type=path_of("RUN_DIR"), metavar="RUN_DIR", help="a finetuned run")
    parser.add_argument("--register", metavar="NAME", help="in the registry (default: only save)")
    parser.add_argument("--out", type=path_of("--out"), metavar="DIR", help="(default: RUN_DIR/model)")
    args = parser.parse_args()
    run_dir, out = args.run_dir, args.out or args.run_dir / MODEL
    check_place(run_dir, out, "--out")
    spool = Spool(run_dir)
    if args.register is not None:
        check_register(args.register, spool)
    card = save_model(run_dir, out)
    sys.stdout.write(f"{out}\n")
    if args.register is None:
        return
    model = {"path": str(out.resolve()), "step": 0, "tags": {}, "card": card, "register": args.register}
    spool.main.append({"kind": "model", **model})
    sync(spool, None)
    sys.stdout.write(f"registered as {args.register} at {spool.identity['uri']}\n")


def check_register(name: str, spool: Spool) -> None:
    """Makes sure that the registry can take the model, before it is made.

    Raises:
        UserError: the run was not tracked, or MLflow takes no such name: the line would wait in the spool for ever.
    """
    if name.strip(" .") == "" or "/" in name or ":" in name:
        raise UserError(f"--register '{name}': is no name for MLflow's registry (no / and : in it); give another")
    if not spool.exists:
        raise UserError(f"{spool.run_dir}: was not tracked (log.mlflow=false), so no registry has its run")


if __name__ == "__main__":
    run_cli(main)
