"""MLflow, never in the way of training.

In: parameters, tags, metrics, data sets, files and models of a run. Out: one MLflow run per job, from rank 0.

    tracker.py   what a job calls: an append to a file, then return
    spool.py     that file, and how far the server has confirmed it
    deliver.py   its lines, sent to MLflow by a daemon thread or by `sync`
    checks.py    what MLflow would refuse for good, before a run begins
    facts.py     what is worth knowing of host, code and data
    nodes.py     system metrics of every node
    figures.py   pictures and tables of a run

Every call appends a line to `RUN_DIR/tracking.jsonl`; a daemon thread delivers the lines in order. A server
that is slow, down or dies in the middle costs training nothing and loses nothing: what it has not
confirmed stays in the spool, and `python -m pipeline.tracking sync RUN_DIR` delivers it later. The
store is `log.uri`, else MLFLOW_TRACKING_URI, else SQLite beside the run directory.
"""

from pipeline.tracking.checks import check_tracking
from pipeline.tracking.tracker import DatasetNote, NullTracker, Tracker, open_tracker, run_of, tracking_uri

__all__ = ["DatasetNote", "NullTracker", "Tracker", "check_tracking", "open_tracker", "run_of", "tracking_uri"]
