"""Checkpoints survive kills at any moment and a full disk, and resume in any layout."""

import errno
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pipeline.config import CheckpointConfig
from pipeline.distributed import World
from pipeline.engine.checkpoint import Checkpoints, complete_checkpoints, delete_old, read_state
from pipeline.errors import UserError
from pipeline.files import read_json, write_json, write_text
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


@pytest.fixture
def engine(monkeypatch):
    """One that has a weight and has not been updated."""
    about = {"full_weights": {"weight": torch.ones(3)}, "spread": {}, "full_moments": {}, "updates": 0}
    for name, value in about.items():
        monkeypatch.setattr(f"pipeline.engine.parts.{name}", lambda *_, value=value: value)
    return SimpleNamespace(optimizer=None, module=None, zero_optimization_stage=lambda: 0)


def test_a_damaged_checkpoint_is_made_anew_when_the_run_comes_by_again(engine, tmp_path):
    """A run that ends there would else be left with it, and train to it again and again."""
    weights = tmp_path / "checkpoints" / "step-00000002" / "weights.safetensors"
    for step in (1, 2, 2):
        saver = Checkpoints(tmp_path, CheckpointConfig(), World())
        saver.save(engine, {"step": step, "metric": None}, {})
        saver.finish()
        assert read_state(tmp_path)["step"] == step
        if weights.exists():
            weights.write_bytes(b"")


def test_what_keep_at_has_kept_stays_where_the_run_goes_on_for_longer(engine, tmp_path):
    """Half of 4 steps, then half of 8."""
    config = CheckpointConfig(keep=1, keep_best=0, keep_at=(0.5,))
    for steps, kept in (((2, 3, 4), 2), ((5, 6), 4), ((7, 8), 4)):
        saver = Checkpoints(tmp_path, config, World(), frozenset({kept}))
        for step in steps:
            saver.save(engine, {"step": step, "metric": None}, {})
        saver.finish()
    assert [folder.name for folder in complete_checkpoints(tmp_path)] == [f"step-{step:08d}" for step in (2, 4, 8)]


def test_an_evaluation_that_is_made_up_for_ranks_its_checkpoint(engine, tmp_path):
    """A signal came in the evaluation: the checkpoint was saved without a metric."""
    for state in ({"step": 1, "metric": 0.5}, {"step": 2, "metric": None, "evaluate": True},
                  {"step": 2, "metric": 0.7, "evaluate": False}):  # fmt: skip
        saver = Checkpoints(tmp_path, CheckpointConfig(), World())
        saver.save(engine, state, {})
        saver.finish()
    found = read_state(tmp_path)
    assert (found["metric"], found["evaluate"], found["updates"]) == (0.7, False, 0)
    assert "files" not in read_json(tmp_path / "checkpoints" / "step-00000002" / "state.json", "x")
    assert (tmp_path / "checkpoints" / "best").read_text() == "step-00000002"


def test_a_disk_that_fills_up_with_a_checkpoint_costs_its_best_a_name_and_no_run(engine, tmp_path, monkeypatch):
    def no_room(path, text):
        if path.name == "best":
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write_text(path, text)

    monkeypatch.setattr("pipeline.engine.checkpoint.write_text", no_room)
    saver = Checkpoints(tmp_path, CheckpointConfig(keep=1, keep_best=0), World())
    for step in (1, 2):
        saver.save(engine, {"step": step, "metric": 0.5}, {})
    saver.finish()
    assert [folder.name for folder in complete_checkpoints(tmp_path)] == ["step-00000002"]


def test_a_last_checkpoint_without_a_directory_ends_the_run_with_a_line(tmp_path):
    (tmp_path / "checkpoints").write_text("in its place")
    saver = Checkpoints(tmp_path, CheckpointConfig(), World())
    assert saver.save(None, {"step": 1}, {}) == {}
    with pytest.raises(UserError, match="step-00000001: the last checkpoint could not be written; make room"):
        saver.finish()
