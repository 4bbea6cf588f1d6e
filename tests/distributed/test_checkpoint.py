"""Checkpoints survive kills at any moment and a full disk, and resume in any layout."""

import json
from pathlib import Path

import pytest

from pipeline.config import CheckpointConfig
from pipeline.distributed import World
from pipeline.engine.checkpoint import Checkpoints, complete_checkpoints, delete_old, read_state
from pipeline.errors import UserError
from pipeline.files import write_json
from tests.distributed.conftest import MICRO
from tests.distributed.crash import KILLS
from tests.distributed.layouts import CHAINS, RANKS
from tests.ranks import run_ranks

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def rounds(tmp_path_factory):
    """What layouts.py reports of 2 -> 1 -> 4 -> 2 ranks."""
    folder = tmp_path_factory.mktemp("layouts")
    reports = []
    for number, ranks in enumerate(RANKS):
        out = folder / f"{number}.json"
        run_ranks(ranks, HERE / "layouts.py", folder, number, out)
        reports.append(json.loads(out.read_text()))
    return reports


@pytest.mark.slow
@pytest.mark.parametrize("name", CHAINS)
def test_resuming_in_the_same_layout_is_bit_exact(rounds, name):
    report = rounds[0][name]
    assert report["restored"]
    assert report["same_losses"]
    assert report["same_end"]


@pytest.mark.slow
@pytest.mark.parametrize("name", CHAINS)
def test_ranks_and_zero_stage_may_change(rounds, name):
    """2 -> 1 -> 4 -> 2 ranks: the state arrives bit for bit, and the losses are those of a straight run."""
    assert all(report[name]["restored"] for report in rounds)
    losses = [loss for report in rounds for loss in report[name]["losses"]]
    tolerance = 2e-2 if "bf16" in name else 1e-4
    assert losses == pytest.approx(rounds[0][name]["straight"], rel=tolerance)


@pytest.mark.slow
def test_kills_and_a_full_disk_leave_a_whole_checkpoint(tmp_path):
    out = tmp_path / "out.json"
    ((_, said),) = run_ranks(1, HERE / "crash.py", tmp_path / "run", out)
    report = json.loads(out.read_text())
    assert len(report["steps"]) == KILLS
    assert report["steps"] == sorted(report["steps"])
    assert report["steps"][-1] > KILLS / 2  # saving went on between the kills
    assert report["partial"] > 0  # and some hit a save in the middle
    assert report["after_full"] == report["steps"][-1]
    assert report["last"] == report["steps"][-1] + 2
    assert "not saved" in said
    assert "the run goes on" in said


@pytest.mark.slow
def test_a_host_that_remembers_what_was_missing_takes_part_in_every_checkpoint(shards, tmp_path):
    """NFS: what one rank makes, the others must not have looked for."""
    run_dir = tmp_path / "lab" / "run"
    words = [f"data.shards={shards}", "train.steps=4", "checkpoint.every=2", "eval.every_epochs=0", "log.mlflow=false"]
    ((_, said), _) = run_ranks(2, HERE / "nfs_host.py", f"run.dir={run_dir}", *words, *MICRO)
    assert "not saved" not in said
    assert "optim.warmup = 2 steps, of a run of 4: more than a fifth" in said
    assert "4 steps of 8 clips, from step 0, on 2 x " in said
    assert [folder.name for folder in complete_checkpoints(run_dir)] == ["step-00000002", "step-00000004"]
    assert (run_dir / "results.json").exists()


@pytest.mark.parametrize("name", ["complete", "state.json"])
@pytest.mark.parametrize("content", ["", "[]", "{", "null"])
def test_an_emptied_file_of_the_newest_checkpoint_is_no_end(tmp_path, name, content):
    for step in (1, 2):
        folder = tmp_path / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        write_json(folder / "state.json", {"step": step, "metric": step / 2})
        write_json(folder / "complete", {"state.json": (folder / "state.json").stat().st_size})
    (tmp_path / "checkpoints" / "step-00000002" / name).write_text(content)
    assert read_state(tmp_path)["step"] == 1
    delete_old(tmp_path, CheckpointConfig(keep=1), frozenset())
    assert read_state(tmp_path)["step"] == 1


def test_a_last_checkpoint_without_a_directory_ends_the_run_with_a_line(tmp_path):
    (tmp_path / "checkpoints").write_text("in its place")
    saver = Checkpoints(tmp_path, CheckpointConfig(), World())
    assert saver.save(None, {"step": 1}, {}) == {}
    with pytest.raises(UserError, match="step-00000001: the last checkpoint could not be written; make room"):
        saver.finish()
