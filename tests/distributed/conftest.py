"""Runs that several modules look at; each is launched once."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.ranks import run_ranks

MICRO = ["model.size=micro", "train.batch_size=8", "log.every=1", "log.peak_tflops=null", "optim.warmup=2",
         "data.workers=1"]  # fmt: skip
STEPS = 40
PATIENT = "log.finish_wait=300"  # for MLflow's records, which tests look for


def lines(run_dir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def losses(run_dir: Path) -> list[dict[str, float]]:
    """What must not depend on where a run was stopped."""
    kept = ("step", "loss", "contrast", "grad_norm", "lr")
    return [{key: line[key] for key in kept} for line in lines(run_dir) if "loss" in line]


@pytest.fixture(scope="session")
def pretraining(shards: Path) -> list[str]:
    """Words of one pretraining, but for its directory."""
    return ["--deepspeed_config", "ds.json", f"data.shards={shards}", f"train.steps={STEPS}", "train.micro_batch=2",
            *MICRO]  # fmt: skip


@pytest.fixture(scope="session")
def pretrained(
    deepspeed_run: Callable[..., object], pretraining: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """All steps in one go."""
    run_dir = tmp_path_factory.mktemp("runs") / "pretrain"
    deepspeed_run(2, "launchers/pretrain.py", *pretraining, f"run.dir={run_dir}", "log.peak_tflops=0", PATIENT)
    return run_dir


@pytest.fixture(scope="session")
def finetuned(shards: Path, pretrained: Path) -> Path:
    run_dir = pretrained.parent / "finetune"
    run_ranks(2, "launchers/finetune.py", "--deepspeed_config", "zero3.json", f"data.shards={shards}",
              f"run.dir={run_dir}", f"model.init={pretrained}", "train.epochs=2", "checkpoint.average=[1,2]",
              PATIENT, *MICRO)  # fmt: skip
    return run_dir
