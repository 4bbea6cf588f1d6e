"""What MLflow would refuse for good, refused before a run begins.

In: `log.*` and where the run is tracked. Out: nothing, or one line that names the setting and what it should be.

A server behind HTTP may be down: its records wait. A database is spoken to without a server, so it must be there.
"""

import os
import posixpath
import re
import socket
import sqlite3
from pathlib import Path

from pipeline.config import LogConfig
from pipeline.errors import UserError
from pipeline.files import check_output_file
from pipeline.tracking.spool import Spool, sqlite_file, without_password
from pipeline.tracking.tracker import tracking_uri

# MLflow's own rules (mlflow.utils.validation), which take seconds to import.
KEY = re.compile(r"[/\w.\- :]{1,250}")
LONGEST_EXPERIMENT, LONGEST_MODEL = 500, 256
PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}  # of databases
REACH_SECONDS = 5.0


def check_tracking(config: LogConfig, run_dir: Path) -> None:
    """Checks names and the store of a tracked run; of one that is resumed not whether its database answers.

    Raises:
        UserError: MLflow would refuse a name, or the store can never work.
    """
    if not config.mlflow:
        return
    if not 0 < len(config.experiment.strip()) <= LONGEST_EXPERIMENT:
        raise UserError(f"log.experiment = '{config.experiment[:50]}': give 1 to {LONGEST_EXPERIMENT} characters")
    for name in config.tags:
        if KEY.fullmatch(name) is None or posixpath.normpath(name) != name or name.startswith(("/", "..")):
            raise UserError(
                f"log.tags: MLflow takes no tag named '{name[:50]}'; use at most 250 letters, digits, and _ - . : / or "
                "spaces"
            )
    model = config.register_as
    if model and (not model.strip() or set("/:") & set(model) or len(model) > LONGEST_MODEL):
        raise UserError(
            f"log.register_as = '{model[:50]}': MLflow's registry takes names of 1 to {LONGEST_MODEL} characters "
            "without / and :"
        )
    uri = tracking_uri(config, run_dir)
    what = "log.uri" if config.uri or not os.environ.get("MLFLOW_TRACKING_URI") else "MLFLOW_TRACKING_URI"
    kind = uri.partition(":")[0].partition("+")[0]  # of postgresql+psycopg2://
    if kind == "sqlite":
        _check_sqlite(uri, what)
    elif kind in PORTS and not Spool(run_dir).exists:
        _check_database(uri, what)


def _check_sqlite(uri: str, what: str) -> None:
    """A file that is no database, or that cannot be written."""
    place = sqlite_file(uri)
    if place is None:
        raise UserError(f"{what} = {uri} names no file; write sqlite:////DIRECTORY/mlflow.db, or sqlite:///mlflow.db")
    if check_output_file(place, what).exists():
        try:
            connection = sqlite3.connect(f"{place.absolute().as_uri()}?mode=ro", uri=True)
            try:
                connection.execute("pragma schema_version")
            finally:
                connection.close()
        except sqlite3.OperationalError:  # busy, or its file system locks nothing: not for us to say
            return
        except sqlite3.DatabaseError as error:
            raise UserError(f"{what} = {uri}: {error}; name another file") from error


def _check_database(uri: str, what: str) -> None:
    """One that a run begins with must listen; a socket in the file system is not tried."""
    from sqlalchemy.engine import make_url

    url = make_url(uri)
    if not url.host or "/" in url.host:
        return
    try:
        socket.create_connection((url.host, url.port or PORTS[url.get_backend_name()]), REACH_SECONDS).close()
    except OSError as error:
        raise UserError(
            f"{what} = {without_password(uri)}: {error.strerror or error}; start the database, correct the address, or "
            "log.mlflow=false"
        ) from error
