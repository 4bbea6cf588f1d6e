"""What is worth knowing of a run besides its settings: host, code, data.

In: nothing, or a manifest. Out: tags and the description of a data set.
"""

import getpass
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from pipeline.data.manifest import Manifest

ROOT = Path(__file__).resolve().parents[2]


def about_host() -> dict[str, str]:
    """Host, Python, GPUs."""
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "host": platform.node(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "gpus": ", ".join(f"{gpus.count(name)} x {name}" for name in dict.fromkeys(gpus)) or "none",
    }


def about_start() -> dict[str, str]:
    """Who started it and with which program, for the columns "User" and "Source" of MLflow's page."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user may have a number and no name
        user = str(os.getuid())
    return {"mlflow.user": user, "mlflow.source.name": sys.argv[0], "mlflow.source.type": "LOCAL"}


def about_code() -> dict[str, str]:
    """Commit and state of the code; none where it is not a git checkout."""
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
        state = subprocess.run(["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return {}
    return {"mlflow.source.git.commit": commit.stdout.strip(), "git_dirty": str(bool(state.stdout.strip())).lower()}


def coverage(manifest: Manifest) -> dict[str, str]:
    """Share of the listed clips that the shards hold, by split."""
    return {
        f"coverage.{name}": f"{split.clips} of {split.listed} ({split.clips / max(1, split.listed):.1%})"
        for name, split in manifest.splits.items()
    }


def profile(manifest: Manifest) -> dict[str, Any]:
    """Counts for MLflow's data set panel."""
    return {
        "classes": len(manifest.labels),
        "shards": len(manifest.shards),
        "sample_rate": manifest.audio.sample_rate,
        "seconds_per_clip": manifest.audio.seconds,
        **{f"{name}_clips": split.clips for name, split in manifest.splits.items()},
        **{f"{name}_listed": split.listed for name, split in manifest.splits.items()},
    }
