"""Where a run is tracked: MLflow's stores by URI, and what they would refuse for good, refused before a run begins.

In: `log.*`, the environment, a run directory. Out: a URI; or one line that names the setting and what it should be.

A server behind HTTP may be down: its records wait. A database is spoken to without a server, so it must be there.
"""

import os
import posixpath
import re
import socket
import sqlite3
import sys
import threading
from importlib.metadata import entry_points
from pathlib import Path

from pipeline.config import LogConfig
from pipeline.errors import UserError
from pipeline.files import check_output_file

PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}  # of databases
HOST = re.compile(r"[A-Za-z0-9.-]+:\d+/?")
# MLflow's own rules (mlflow.utils.validation), which take seconds to import.
KEY = re.compile(r"[/\w.\- :]{1,250}")
LONGEST_EXPERIMENT, LONGEST_MODEL = 500, 256
REACH_SECONDS = 5.0
_IMPORTING = threading.Lock()


def load_mlflow() -> None:
    """Imports MLflow, which takes seconds: in a thread, never in the way of the first step.

    Its modules import each other in circles: two threads doing so at once see half of them.
    """
    with _IMPORTING:
        import mlflow.pyfunc
        import mlflow.system_metrics.system_metrics_monitor
        import mlflow.tracking  # noqa: F401


def load_deepspeed() -> None:
    """Imports DeepSpeed without MLflow, which one rank of a node at most uses.

    DeepSpeed always imports its autotuner, and that imports MLflow where it is installed: 1.3 s and 120 MB a rank.
    """
    with _IMPORTING:  # a thread that imports MLflow meanwhile would find none
        hidden = "mlflow" not in sys.modules
        if hidden:
            sys.modules["mlflow"] = None  # type: ignore[assignment]  # an import of it fails
        try:
            import deepspeed  # noqa: F401
        finally:
            if hidden:
                del sys.modules["mlflow"]


def tracking_uri(config: LogConfig, run_dir: Path) -> str:
    """Where a run is tracked: the setting, the environment, or SQLite beside the run directory.

    Raises:
        UserError: a URI that can never work.
    """
    uri, what = _named(config)
    if not uri:
        return sqlite_uri(run_dir.resolve().parent / "mlflow.db")
    check_uri(uri, what)
    return uri


def artifact_location(config: LogConfig, run_dir: Path) -> str:
    """Where artifacts go: beside the SQLite file of our own; empty: the server says."""
    return "" if _named(config)[0] else (run_dir.resolve().parent / "mlartifacts").as_uri()


def _named(config: LogConfig) -> tuple[str, str]:
    """The URI that a user named, or "", and where."""
    named = os.environ.get("MLFLOW_TRACKING_URI", "")
    return (named, "MLFLOW_TRACKING_URI") if named and not config.uri else (config.uri, "log.uri")


def sqlite_uri(file: Path) -> str:
    """SQLAlchemy's URL of a SQLite file: `?` and `%` in a name have a meaning in it, and are written otherwise.

    Raises:
        UserError: this SQLAlchemy cannot express the name.
    """
    from sqlalchemy.engine import URL, make_url

    if make_url(uri := f"sqlite:///{file}").database == str(file):
        return uri
    # With the driver's name: of a plain sqlite:/// MLflow makes the parent directory, as it is spelt in the URI.
    uri = URL.create("sqlite+pysqlite", database=str(file)).render_as_string(hide_password=False)
    if make_url(uri).database != str(file):
        raise UserError(f"{file}: its name cannot be written as a SQLite URI; choose another directory, or set log.uri")
    return uri


def sqlite_file(uri: str) -> Path | None:
    """The file of a `sqlite:///` URI; None where it names none."""
    from sqlalchemy.engine import make_url

    url = make_url(uri)
    return None if url.host or url.database in (None, "", ":memory:") else Path(str(url.database))


def without_password(uri: str) -> str:
    """For people and logs: a URI, or a text with some, `***` for each user and password."""
    return re.sub(r"//[^/\s\"]*@", "//***@", uri)


def check_uri(uri: str, what: str) -> None:
    """Refuses what MLflow would refuse each time; a server that is down is not asked.

    Args:
        uri: MLflow tracking URI.
        what: The setting, for the message.

    Raises:
        UserError: no scheme, one that neither MLflow nor a plugin knows, or a database URL that cannot be opened.
    """
    shown = f"{what} = {without_password(uri)}"
    scheme, separator, rest = uri.partition("://")
    if separator and scheme.split("+")[0] in ("sqlite", *PORTS):
        from sqlalchemy.engine import make_url
        from sqlalchemy.exc import SQLAlchemyError

        try:
            url = make_url(uri)
            url.get_dialect().import_dbapi()
        except (SQLAlchemyError, ImportError, ValueError) as error:
            raise UserError(f"{shown}: {error}; install it, or name another driver, DB+DRIVER://") from error
        if scheme == "sqlite" and url.host:
            raise UserError(f"{shown}: a SQLite file has three slashes; write sqlite:///{rest}")
        return
    plugins = {entry.name for entry in entry_points(group="mlflow.tracking_store")}
    if (separator and scheme in ("http", "https") and rest.strip("/")) or uri.split(":")[0] in {"databricks"} | plugins:
        return
    path = uri.removeprefix("file:")
    if HOST.fullmatch(uri):
        raise UserError(f"{shown}: a server's address begins with its protocol; write http://{uri}")
    if os.environ.get("MLFLOW_ALLOW_FILE_STORE", "").lower() in ("true", "1") and "://" not in path:
        return
    raise UserError(
        f"{shown}: neither a server nor a database, and MLflow keeps runs in plain directories no more; write "
        "http://HOST:5000 or sqlite:///PATH/mlflow.db"
    )


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
    uri, what = tracking_uri(config, run_dir), _named(config)[1]
    kind = uri.partition(":")[0].partition("+")[0]  # of postgresql+psycopg2://
    if kind == "sqlite":
        _check_sqlite(uri, what)
    elif kind in PORTS and not (run_dir / "tracking.json").exists():
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
