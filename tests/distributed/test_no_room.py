"""A device without room: all ranks end with one line that says what would fit, and the run goes on with that."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pipeline.config import PretrainRecipe
from pipeline.distributed import World
from pipeline.engine import plan, room
from pipeline.engine.checkpoint import complete_checkpoints
from pipeline.engine.plan import Shape
from pipeline.engine.setup import reconcile
from pipeline.recipes import load_recipe
from tests.distributed.conftest import MICRO, lines
from tests.ranks import run_ranks

SCRIPT = Path(__file__).with_name("no_room.py")
TORCH = "has no room for it (CUDA out of memory. Tried to allocate 2.00 GiB.)"


def errors(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith("error: ")]


@pytest.mark.slow
def test_a_step_that_does_not_fit_names_the_micro_batch_that_does(shards, tmp_path):
    words = [f"data.shards={shards}", f"run.dir={tmp_path / 'run'}", "train.steps=12", "checkpoint.every=3",
             "eval.every_epochs=0", "eval.every_clips=0", "log.mlflow=false", *MICRO]  # fmt: skip
    ends = run_ranks(2, SCRIPT, "train", 1, *words, check=False)
    assert [status for status, _ in ends] == [2, 2], ends[1][1][-3000:]
    (line,) = errors(ends[1][1])
    assert line.startswith("error: train.micro_batch = 4: this host, ")
    assert TORCH in line
    assert "give train.micro_batch=2, the largest that the plan expects to fit" in line
    assert "train.micro_batch=2" in errors(ends[0][1])[0]
    kept = complete_checkpoints(tmp_path / "run")
    assert kept
    ((_, said), _) = run_ranks(2, SCRIPT, "train", 1, *words, "train.micro_batch=2")
    assert f"12 steps of 8 clips, from step {int(kept[-1].name[5:])}, on 2 x" in said
    assert [row["step"] for row in lines(tmp_path / "run") if "loss" in row] == list(range(1, 13))


@pytest.mark.slow
def test_an_evaluation_that_does_not_fit_names_its_batch(shards, tmp_path):
    words = [f"data.shards={shards}", f"run.dir={tmp_path / 'run'}", "train.steps=2", "log.mlflow=false", *MICRO]
    ((status, said),) = run_ranks(1, SCRIPT, "eval", 0, *words, check=False)
    assert status == 2, said[-3000:]
    (line,) = errors(said)
    assert line.startswith("error: eval.batch_size = 8: ")
    assert TORCH in line
    assert line.endswith("give eval.batch_size=4")


@pytest.mark.slow
def test_weights_that_do_not_fit_end_in_one_line(shards, tmp_path):
    words = [f"data.shards={shards}", f"run.dir={tmp_path / 'run'}", "train.steps=2", "log.mlflow=false", *MICRO]
    ends = run_ranks(2, SCRIPT, "begin", 1, *words, check=False)
    assert [status for status, _ in ends] == [2, 2], ends[1][1][-3000:]
    (line,) = errors(ends[1][1])
    assert line.startswith("error: weights and optimiser at ZeRO 1: this host, ")
    assert TORCH in line
    assert "GB a rank before the first clip: where the device has that, end what else runs on it, " in line
    assert "else try bf16, ZeRO 3" in line


@pytest.mark.parametrize("ds", [{}, {"zero_optimization": {"stage": 3}, "bf16": {"enabled": True}}])
def test_the_plan_chooses_among_the_micro_batches_that_divide(monkeypatch, ds):
    recipe = load_recipe(PretrainRecipe, [], ["model.size=micro", "train.batch_size=48"])
    world = World(0, 2)
    resolved, batches = reconcile(ds, recipe, world)
    shape = Shape(samples=16_000, mel_bins=128, frames=128)
    job = SimpleNamespace(recipe=recipe, ds=resolved, batches=batches, shapes=[(shape, 1.0)])
    cost = plan.record(recipe, shape, "bf16" if ds else "fp32")

    def recorded(*asked: object) -> plan.Cost:
        assert asked == (recipe, shape, cost.precision)
        return cost

    monkeypatch.setattr(plan, "record", recorded)

    def said(size: float) -> str:
        """Of a device with room for so many bytes."""
        monkeypatch.setattr(room, "_memory", lambda _: int(size / plan.ROOM) + 1)
        return str(room.no_room_to_train(torch.OutOfMemoryError("full"), job, world))

    assert said(1e12).startswith("train.micro_batch = 24: ")
    assert "give train.micro_batch=12, " in said(1e12)  # the next one below what did not fit
    for micro in (8, 1):
        need = plan.memory(cost, resolved["zero_optimization"]["stage"], 2, micro).total
        assert f"give train.micro_batch={micro}, " in said(need)
    assert "no smaller one is expected to fit; try bf16" in said(1e6)
