"""Files of a checkpoint, written while training goes on.

In: host tensors. Out: files that are on the disk (fsync) when `result` says so.

One thread per rank and one checkpoint in flight: the next save first waits for this one. The thread
calls no collective; that all ranks are done is agreed upon by the training loop.
"""

import json
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

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


def write_text(path: Path, text: str) -> None:
    """Replaces `path` atomically and durably."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync(path.parent)


def write_json(path: Path, content: Any) -> None:
    """Likewise, as JSON."""
    write_text(path, json.dumps(content, indent=1))


def sync(path: Path) -> None:
    """Waits until a file or a directory's entries are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
