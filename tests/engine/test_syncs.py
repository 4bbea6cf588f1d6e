"""The host waits for the device at most twice a step, where DeepSpeed asks whether the gradient is finite."""

import json
from pathlib import Path

import pytest

from tests.distributed.conftest import MICRO
from tests.ranks import run_ranks


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ds", "words"),
    [
        ("zero0.json", []),
        ("zero1.json", ["pretrain.method=craft_latent"]),
        ("bf16.json", ["train.micro_batch=2"]),
        ("zero2.json", ["optim.clip=1.0"]),
        ("zero3.json", []),
    ],
)
def test_at_most_two_waits_a_step(shards, tmp_path, ds, words):
    words = ["--deepspeed_config", ds, *MICRO, "train.steps=4", "log.mlflow=false", "log.every=100", *words]
    run_ranks(2, Path(__file__).with_name("syncs.py"), shards, tmp_path / "run", tmp_path / "reads", *words)
    for rank in range(2):
        reads = json.loads((tmp_path / f"reads.{rank}").read_text())
        assert len(reads) == 4
        # In the first two ZeRO 3 learns in which order modules come.
        assert max(reads[2:]) <= (2 if ds == "zero2.json" else 1), reads
