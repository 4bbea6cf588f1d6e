"""System metrics of every node: CPU, memory, disk, network, GPUs.

In: a run directory that all nodes see. Out: a feed `system/HOST.jsonl` for each node, written by a daemon
thread of its first rank and delivered by rank 0. MLflow's own collectors measure; one that fails is said and
dropped, the others go on. The UI shows the result under "System metrics". Cost: some milliseconds every
`log.system_every` seconds.
"""

import logging
import platform
import threading
from pathlib import Path
from typing import Any

from pipeline.tracking.spool import Feed
from pipeline.tracking.store import load_mlflow

log = logging.getLogger(__name__)


class NodeMonitor:
    """Samples this node until it is stopped.

    Args:
        run_dir: Run directory.
        main: This is rank 0's node: its metrics are `system/NAME`, other nodes' `system/HOST/NAME`.
        every: Seconds between samples.
    """

    def __init__(self, run_dir: Path, main: bool, every: float) -> None:
        (run_dir / "system").mkdir(parents=True, exist_ok=True)
        self._feed = Feed(run_dir / "system" / f"{platform.node()}.jsonl")
        self._feed.mend()
        self._prefix = "system/" if main else f"system/{platform.node()}/"
        self._step = len(self._feed.read())  # a resumed run goes on
        self._every = every
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="node monitor", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends the sampling."""
        self._stop.set()
        self._thread.join(5.0)

    def _run(self) -> None:
        load_mlflow()
        from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
        from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
        from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

        collectors = {}
        for kind in (CPUMonitor, DiskMonitor, NetworkMonitor, *_gpu_monitors()):
            try:
                collectors[kind.__name__] = kind()
            except Exception as error:  # noqa: BLE001 - any of a library or driver that is not there
                log.warning("no system metrics of %s on this node: %s", kind.__name__, error)
        while not self._stop.wait(self._every):
            values: dict[str, float] = {}
            for name, collector in list(collectors.items()):
                try:
                    collector.collect_metrics()
                    values |= collector.aggregate_metrics()
                    collector.clear_metrics()
                except Exception as error:  # noqa: BLE001 - a GPU that fell off the bus, a container's /proc
                    log.warning("no more system metrics of %s on this node: %s", name, error)
                    del collectors[name]
            named = {f"{self._prefix}{name}": float(value) for name, value in values.items()}
            try:
                self._feed.append({"kind": "metrics", "values": named, "step": self._step})
            except OSError as error:
                log.warning("%s: %s; this sample is lost", self._feed.lines, error.strerror)
            self._step += 1


def _gpu_monitors() -> list[Any]:
    import torch

    if not torch.cuda.is_available() or torch.version.hip:
        return []
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor

    return [GPUMonitor]
