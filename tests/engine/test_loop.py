"""Steps that are not finite, and what is written of them."""

import errno
import json
import logging
import math
import os
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler
from safetensors.torch import save_file

from pipeline.config import CheckpointConfig, LogConfig, PretrainRecipe, TrainConfig
from pipeline.distributed import World
from pipeline.engine.checkpoint import complete_checkpoints, delete_old, read_state, stored
from pipeline.engine.job import Progress
from pipeline.engine.step import update
from pipeline.engine.telemetry import Telemetry
from pipeline.errors import UserError
from pipeline.files import read_json, write_json
from pipeline.flow import Batch
from pipeline.tracking import Tracker
from pipeline.tracking.spool import Feed

ROWS = torch.arange(2)
BATCH = Batch(ROWS, ROWS, torch.ones(2, dtype=torch.bool), None, None, torch.zeros(2, 3))


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """The scaler asks for its rank when it speaks."""
    monkeypatch.setattr("deepspeed.runtime.fp16.loss_scaler.dist.get_rank", lambda: 0)


class Engine:
    """An fp16 engine whose gradients overflow above a scale, with DeepSpeed's own scaler."""

    def __init__(self, largest: float) -> None:
        scaler = DynamicLossScaler(2.0**32, 1000, min_scale=1.0, delayed_shift=2, consecutive_hysteresis=False)
        scaler.raise_error_at_min_scale = False  # as engine.loop sets it
        self.optimizer = SimpleNamespace(loss_scaler=scaler)
        self.largest, self.skipped_steps = largest, 0

    def zero_optimization_stage(self) -> int:
        return 2

    def step(self) -> None:
        overflow = self.optimizer.loss_scaler.cur_scale > self.largest
        self.skipped_steps += overflow
        self.optimizer.loss_scaler.update_scale(overflow)

    def get_global_grad_norm(self) -> float:
        return math.inf


def job(tmp_path, max_bad_steps: int):
    recipe = PretrainRecipe(train=TrainConfig(max_bad_steps=max_bad_steps))
    loader = SimpleNamespace(keys=lambda rows: [f"clip-{row}" for row in rows])
    return SimpleNamespace(recipe=recipe, loader=loader, run_dir=tmp_path, ds={"fp16": {"enabled": True}}, task=None,
                           total_steps=100)  # fmt: skip


def test_a_loss_scale_that_falls_is_no_bad_step(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("pipeline"), "propagate", True)
    caplog.set_level("INFO")
    engine, progress = Engine(largest=2.0**10), Progress()
    for _ in range(25):
        update(engine, job(tmp_path, 3), BATCH, progress, torch.tensor(1.0))
    assert (progress.skipped, progress.bad_steps) == (23, 0)  # the hysteresis, and from 2^32 to 2^10
    assert "loss scale 2048, skipped; the scale is now 1024" in caplog.text
    assert "not finite" not in caplog.text


@pytest.mark.parametrize(("loss", "steps"), [(1.0, 33 + 3), (math.nan, 3)])
def test_a_scale_that_cannot_fall_or_a_loss_that_is_not_finite_ends_the_run(tmp_path, loss, steps):
    engine, progress = Engine(largest=0.0), Progress()
    for _ in range(steps - 1):
        update(engine, job(tmp_path, 3), BATCH, progress, torch.tensor(loss))
    with pytest.raises(UserError, match=r"train\.max_bad_steps = 3.*use bf16"):
        update(engine, job(tmp_path, 3), BATCH, progress, torch.tensor(loss))
    assert (tmp_path / "bad_clips.txt").read_text() == "clip-0\nclip-1\n"


def strict(text: str):
    def refuse(constant: str) -> None:
        raise ValueError(constant)

    return json.loads(text, parse_constant=refuse)


def test_json_has_no_infinity(tmp_path):
    telemetry = Telemetry(tmp_path, Tracker(tmp_path), World(), LogConfig(), torch.nn.Identity(), 8, 0, None)
    telemetry.write_step(1, 2, {"loss": math.nan, "grad_norm": math.inf, "lr": 0.1})
    row = strict((tmp_path / "metrics.jsonl").read_text())
    assert row["lr"] == 0.1
    assert not {"loss", "grad_norm"} & row.keys()
    write_json(tmp_path / "results.json", {"metrics": {"d_prime": math.inf, "mAP": 1.0}, "per_class": [(math.nan,)]})
    assert strict((tmp_path / "results.json").read_text()) == {
        "metrics": {"d_prime": None, "mAP": 1.0}, "per_class": [[None]]}  # fmt: skip


def test_a_run_without_an_evaluation_so_far_goes_on(tmp_path):
    write_json(tmp_path / "state.json", asdict(Progress(step=3)))
    progress = Progress.of(read_json(tmp_path / "state.json", "x"))
    assert progress == Progress(step=3)


def test_lines_that_a_full_disk_does_not_take_are_lost_and_said_once(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("pipeline"), "propagate", True)
    lines = tmp_path / "metrics.jsonl"
    lines.symlink_to("/dev/full")
    tracker = Tracker(tmp_path)
    for step in (1, 2):
        tracker.metrics({"loss": 1.0}, step)
    assert [record.getMessage() for record in caplog.records] == [
        f"{lines}: No space left on device; the run goes on without its lines from step 1 on, until there is room"]
    lines.unlink()
    lines.write_text('{"step": 1, "lo')  # what there was room for
    tracker.metrics({"loss": 3.0}, 3)
    assert [line["step"] for line in Feed(lines).read()] == [3]
    assert lines.read_text().count("\n") == 2


def test_a_file_of_a_checkpoint_that_a_host_does_not_see_yet_is_no_moment_of_zero(tmp_path):
    """NFS caches the list of a directory; what `complete` names is opened, and missed by name."""
    folder = tmp_path / "checkpoints" / "step-00000004"
    folder.mkdir(parents=True)
    names = [f"optimizer-0000{rank}-of-00002.safetensors" for rank in (1, 2)]
    for name in names:
        save_file({name: torch.ones(1)}, folder / name)
    write_json(folder / "state.json", {"step": 4})
    write_json(folder / "complete", {path.name: path.stat().st_size for path in sorted(folder.iterdir())})
    state = read_state(tmp_path)
    assert [name for name, _ in stored(tmp_path, state, "optimizer-*")] == names
    (folder / names[1]).unlink()
    with pytest.raises(UserError, match=r"optimizer-00002-of-00002\.safetensors: No such file"):
        list(stored(tmp_path, state, "optimizer-*"))


def test_an_old_checkpoint_that_cannot_be_deleted_costs_no_new_one(tmp_path, caplog, monkeypatch):
    """NFS leaves a file behind that somebody has open, and its directory is not empty."""
    monkeypatch.setattr(logging.getLogger("pipeline"), "propagate", True)
    for step in (1, 2, 3):
        folder = tmp_path / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        write_json(folder / "state.json", {"step": step})
        write_json(folder / "complete", {"state.json": (folder / "state.json").stat().st_size})

    def rmtree(folder, **_):
        raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(folder))

    monkeypatch.setattr("pipeline.engine.checkpoint.shutil.rmtree", rmtree)
    delete_old(tmp_path, CheckpointConfig(keep=2, keep_best=0), frozenset())
    assert [folder.name for folder in complete_checkpoints(tmp_path)] == ["step-00000002", "step-00000003"]
    assert "step-00000001: cannot be deleted: [Errno 39] Directory not empty" in caplog.text
