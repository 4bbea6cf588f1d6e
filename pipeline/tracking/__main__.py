"""Deliver what a run's MLflow server has not taken yet.

    python -m pipeline.tracking sync RUN_DIR [RUN_DIR ...] [--uri URI]

In: directories of tracked runs. Out: complete MLflow runs.
"""

import argparse
import sys
from functools import partial

from pipeline.errors import UserError, run_cli
from pipeline.files import user_path
from pipeline.tracking.spool import RunRefused, Spool, first_line
from pipeline.tracking.store import check_uri, load_mlflow


def main() -> int:
    """Parses, delivers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["sync"])
    parser.add_argument("run_dirs", type=partial(user_path, what="RUN_DIR"), nargs="+", metavar="RUN_DIR",
                        help="directory of a tracked run")  # fmt: skip
    parser.add_argument("--uri", help="the server, where it moved since (default: the run's own)")
    args = parser.parse_args()
    for run_dir in args.run_dirs:
        sync(Spool(run_dir), args.uri)
        sys.stdout.write(f"{run_dir}: all delivered\n")
    return 0


def sync(spool: Spool, uri: str | None) -> None:
    """Delivers everything that waits.

    Raises:
        UserError: not a tracked run, or the server did not take it.
    """
    if not spool.exists:
        raise UserError(f"{spool.run_dir}: holds no tracking.json; give the directory of a tracked run")
    if uri is not None:
        check_uri(uri, "--uri")
    load_mlflow()
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    before = spool.identity
    if uri is not None:
        place = {} if before["run_id"] else {"artifacts": ""}  # that server says where
        spool.identity = before | {"uri": uri} | place
    try:
        while spool.deliver():
            pass
    except BaseException as error:
        if not spool.progress and spool.identity["run_id"] == before["run_id"]:
            spool.identity = before  # --uri may be wrong, and the run's own must not be lost
        if isinstance(error, RunRefused):
            raise UserError(f"{spool.run_dir}: MLflow refuses the run: {error}") from error
        if isinstance(error, (MlflowException, SQLAlchemyError, OSError)):
            raise UserError(
                f"{spool.run_dir}: the MLflow server did not take it: {first_line(error)}; start it and repeat"
            ) from error
        raise
    if spool.refused:
        sys.stderr.write(f"MLflow refused {spool.refused} records for good: {spool.refused_file}\n")


if __name__ == "__main__":
    run_cli(main)
