"""fp16: steps that overflow are skipped and counted, the scale is told, and a resumed run has the scaler's state."""

import itertools
import json
from pathlib import Path

import pytest

from pipeline.engine.checkpoint import complete_checkpoints
from tests.distributed.conftest import lines
from tests.distributed.half import SCALER, STAGES, STEPS, STOP
from tests.ranks import run_ranks


@pytest.fixture(scope="module")
def runs(shards, tmp_path_factory):
    folder = tmp_path_factory.mktemp("half")
    run_ranks(2, Path(__file__).with_name("half.py"), shards, folder)
    return folder


def rows(run_dir: Path) -> list[dict[str, float]]:
    """Without the numbers of the machine."""
    names = ("step", "loss", "grad_norm", "lr", "loss_scale", "skipped_steps")
    return [{name: line.get(name) for name in names} for line in lines(run_dir) if "loss" in line]


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_a_scale_that_is_too_high_falls_and_rises(runs, stage):
    found = rows(runs / f"straight-{stage}")
    assert [row["step"] for row in found] == list(range(1, STEPS + 1))
    scales = [2.0 ** SCALER["initial_scale_power"], *(row["loss_scale"] for row in found)]
    skips = [0, *(row["skipped_steps"] for row in found)]
    skipped = [now - before for before, now in itertools.pairwise(skips)]
    assert skipped[:2] == [1, 1]
    assert scales[:3] == [scales[0], scales[0], scales[0] / 2]  # the first overflow costs hysteresis alone
    assert 2 < sum(skipped) < STEPS - 4
    for before, now, skip in zip(scales[1:], scales[2:], skipped[1:], strict=False):
        assert now in ((before / 2, before) if skip else (before, 2 * before))  # one that has risen has its hysteresis
    assert any(now > before for before, now in itertools.pairwise(scales))
    assert all((row["grad_norm"] is None) is bool(skip) for row, skip in zip(found, skipped, strict=True))  # inf
    log = (runs / f"straight-{stage}" / "logs" / "rank-0.log").read_text()
    assert f"fp16 gradient too large for loss scale {scales[1]:g}, skipped; the scale is now {scales[2]:g}" in log
    assert "not finite" not in log


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_a_resumed_run_goes_on_with_the_scalers_state(runs, stage):
    assert rows(runs / f"resumed-{stage}") == rows(runs / f"straight-{stage}")
    states = [json.loads((complete_checkpoints(runs / f"{name}-{stage}")[-1] / "state.json").read_text())
              for name in ("straight", "resumed")]  # fmt: skip
    assert states[0]["loss_scale"] == states[1]["loss_scale"]
    assert states[0]["loss_scale"]["cur_iter"] == STEPS
    first = json.loads((runs / f"resumed-{stage}" / "checkpoints" / f"step-{STOP:08d}" / "state.json").read_text())
    assert first["zero_stage"] == stage
    assert 0 <= first["loss_scale"]["last_overflow_iter"] < first["loss_scale"]["cur_iter"] == STOP
