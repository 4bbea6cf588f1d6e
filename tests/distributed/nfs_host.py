"""Program: launchers/finetune.py, where rank 1 is on another host of an NFS that remembers what is missing.

    nfs_host.py words of finetune.py ...

A path that was looked for before it was made stays missing (lookupcache=all, the default of Linux), until the host
itself makes it. What no Python code opens (safetensors' files) shows at the `chmod` after it.
"""

import builtins
import errno
import io
import os
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

from launchers.finetune import main
from pipeline.errors import run_cli

missing: set[str] = set()


def remembering(call: Callable[..., Any], makes: bool = False) -> Callable[..., Any]:
    def looked(path: Any, *args: Any, **named: Any) -> Any:
        if not isinstance(path, (str, os.PathLike)) or not os.path.abspath(path).startswith(root):
            return call(path, *args, **named)
        place = os.path.abspath(path)
        parts = [place, *map(str, Path(place).parents)]
        if missing.intersection(parts[1:] if makes else parts):
            raise FileNotFoundError(errno.ENOENT, "remembered as missing", place)
        try:
            return call(path, *args, **named)
        except FileNotFoundError:
            # The component of the path that the kernel did not find.
            missing.add(next(part for part, above in pairwise(parts) if exists(above)))
            raise
        finally:
            if makes:
                missing.discard(place)

    return looked


def exists(path: str) -> bool:
    try:
        stat(path)
    except OSError:
        return False
    return True


stat = os.stat
if __name__ == "__main__":
    root = next(word.removeprefix("run.dir=") for word in sys.argv if word.startswith("run.dir="))
    if os.environ["RANK"] == "1":
        for name in ("stat", "lstat", "scandir", "listdir", "open", "chmod", "unlink", "rename", "replace"):
            setattr(os, name, remembering(getattr(os, name)))
        os.mkdir = remembering(os.mkdir, makes=True)
        io.open = builtins.open = remembering(io.open)
    run_cli(main)
