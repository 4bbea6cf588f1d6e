"""Audio without labels: shards of it pretrain, and what needs labels says so before any work."""

import json
import math
import signal

import pytest

from pipeline.data.manifest import load_manifest
from pipeline.engine.checkpoint import read_state
from tests.distributed.conftest import MICRO, lines, losses
from tests.distributed.test_faults import reached, wait_for
from tests.ranks import fork_ranks, run_ranks

STEPS = 12


@pytest.mark.slow
def test_pretraining_goes_on_as_if_it_had_not_stopped(unlabelled, tmp_path):
    """On 2 ranks, with held-out losses; SIGTERM at one of them, then the same command again."""
    assert load_manifest(unlabelled).unlabelled
    words = [f"data.shards={unlabelled}", f"train.steps={STEPS}", "eval.every=6", "eval.batch_size=8", *MICRO,
             "log.mlflow=false"]  # fmt: skip
    run_ranks(2, "launchers/pretrain.py", *words, f"run.dir={tmp_path}/straight")
    stopped = tmp_path / "stopped"
    ranks = fork_ranks(2, "launchers/pretrain.py", *words, f"run.dir={stopped}")
    wait_for(reached(stopped, 3), ranks, "step 3")
    ranks[1].process.send_signal(signal.SIGTERM)
    ended = [rank.end() for rank in ranks]
    assert [status for status, _ in ended] == [128 + signal.SIGTERM] * 2
    step = read_state(stopped)["step"]
    assert 3 <= step < STEPS
    assert f"SIGTERM: left after step {step}" in ended[0][1]
    assert losses(stopped)[-1]["step"] == step  # nothing was lost
    run_ranks(2, "launchers/pretrain.py", *words, f"run.dir={stopped}")
    assert losses(stopped) == losses(tmp_path / "straight")
    assert [line["step"] for line in losses(stopped)] == list(range(1, STEPS + 1))
    held_out = [[line for line in lines(run) if "eval_loss" in line] for run in (stopped, tmp_path / "straight")]
    assert [line["step"] for line in held_out[0]] == [6, 12]
    assert [line["eval_loss"] for line in held_out[0]] == [line["eval_loss"] for line in held_out[1]]
    assert all(math.isfinite(line["eval_loss"]) for line in held_out[0])
    assert json.loads((stopped / "data.json").read_text())["labels"] == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "word", "said"),
    [
        ("finetune", "train.steps=2", "its clips have no labels"),
        ("finetune", "finetune.folds=all", "its clips have no labels"),
        ("pretrain", "data.sampler=balanced", "data.sampler = balanced: no clip has a label"),
    ],
)
def test_what_needs_labels_is_one_line(unlabelled, tmp_path, script, word, said):
    words = [f"data.shards={unlabelled}", f"run.dir={tmp_path}/run", word, *MICRO]
    ended = run_ranks(2, f"launchers/{script}.py", *words, check=False)
    assert [status for status, _ in ended] == [2, 2], ended[0][1]
    errors = [line for _, output in ended for line in output.splitlines() if line.startswith("error: ")]
    assert errors  # one; a rank that is seconds late says why it ends, too
    assert all(said in line for line in errors)
    if script == "finetune":
        assert all(str(unlabelled) in line and "launchers/pretrain.py" in line for line in errors)
    assert "Traceback" not in ended[0][1] + ended[1][1]
    assert not (tmp_path / "run" / "config.yaml").exists()  # the directory is still nobody's
