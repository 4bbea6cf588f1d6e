"""Every shipped DeepSpeed configuration trains for real on 2 ranks, and all train alike."""

import json
from pathlib import Path

import pytest

from tests.distributed.configs import cells
from tests.ranks import run_ranks


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    out = tmp_path_factory.mktemp("configs") / "report.json"
    run_ranks(2, Path(__file__).with_name("configs.py"), out)
    return json.loads(out.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("cell", cells(), ids=" ".join)
def test_a_shipped_configuration_trains(report, cell):
    file, kind, words = cell
    found = report[" ".join(cell)]
    if file == "fp16.json":  # DeepSpeed has no fp16 on CPUs
        assert "fp16.enabled = true needs a GPU" in found["refused"]
        return
    losses = found["losses"]
    assert losses[-1] < losses[0]
    if words != "clipped":
        expected = report[f"zero0.json {kind} plain"]["losses"]
        assert losses == pytest.approx(expected, rel=2e-2 if file == "bf16.json" else 1e-4)
