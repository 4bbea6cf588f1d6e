"""Files of a checkpoint, written while training goes on.

In: host tensors. Out: files that are on the disk (fsync) when `result` says so.

One thread per rank and one checkpoint in flight: the next save first waits for this one. The thread
calls no collective; that all ranks are done is agreed upon by the training loop.
"""

import logging
import time
from collections.abc import Callable
from pathlib import Path
from threading import Thread

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from pipeline.files import sync

log = logging.getLogger(__name__)


class Writer:
    """Writes one set of files at a time in a thread.

    Attributes:
        error: What went wrong with the last set; empty: nothing.
        seconds: That the last set took.
    """

    def __init__(self) -> None:
        self.error = ""
        self.seconds = 0.0
        self._thread: Thread | None = None

    @property
    def busy(self) -> bool:
        """The files are not on the disk yet."""
        return self._thread is not None and self._thread.is_alive()

    def start(self, files: dict[Path, dict[str, torch.Tensor]], then: Callable[[], None] | None = None) -> None:
        """Writes `files`, then calls `then`, in the background."""
        self.wait()
        self.error = ""
        self._thread = Thread(target=self._run, args=(files, then), name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Returns when nothing is being written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _run(self, files: dict[Path, dict[str, torch.Tensor]], then: Callable[[], None] | None) -> None:
        begun = time.perf_counter()
        try:
            for path, tensors in files.items():
                save_file(tensors, path)
                path.chmod(0o644)  # safetensors' own is for the user alone; others finetune from it
                sync(path)
            if then is not None:
                then()
        except (OSError, SafetensorError) as error:
            self.error = str(error)
            log.warning("%s: %s", next(iter(files), ""), error)
        self.seconds = time.perf_counter() - begun
