"""MLflow, never in the way of training.

In: parameters, tags, metrics, data sets, files and models of a run. Out: one MLflow run per job, from rank 0.

    tracker.py   what a job calls: an append to a file, then return
    spool.py     those files, how far the server has confirmed them, and their delivery
    store.py     where a run is tracked, and what MLflow would refuse for good, before a run begins
    nodes.py     system metrics of every node
    figures.py   pictures and tables of a run

Numbers of steps are lines of `RUN_DIR/metrics.jsonl`, all else is lines of `RUN_DIR/tracking.jsonl`; a daemon thread
delivers the lines in order. A server that is slow, down or dies in the middle costs training nothing and loses nothing:
what it has not confirmed stays, and `python -m pipeline.tracking sync RUN_DIR` delivers it later. The store is
`log.uri`, else MLFLOW_TRACKING_URI, else SQLite beside the run directory.
"""

from pipeline.tracking.store import check_tracking, tracking_uri
from pipeline.tracking.tracker import Tracker, open_tracker, run_of

__all__ = ["Tracker", "check_tracking", "open_tracker", "run_of", "tracking_uri"]
