"""Signals, kills, a rank that hangs, shards that vanish: the run goes on, or says why it cannot."""

import os
import re
import signal
import socket
import subprocess
import time

import psutil
import pytest

from pipeline.config import DataConfig, RunConfig
from pipeline.data.loader import Loader
from pipeline.data.manifest import load_index
from pipeline.engine.checkpoint import complete_checkpoints, read_state
from pipeline.files import read_json, write_json
from tests.distributed.conftest import MICRO, STEPS, lines, losses
from tests.ranks import fork_ranks, run_ranks

PATIENCE = 600.0


def wait_for(happened, ranks, what: str) -> None:
    end = time.monotonic() + PATIENCE
    while not happened():
        ended = [rank.process.poll() for rank in ranks]
        assert None in ended, f"ended with {ended} before {what}: {ranks[0].end()[1][-4000:]}"
        assert time.monotonic() < end, f"no {what} in {PATIENCE} s"
        time.sleep(0.01)


def reached(run_dir, step: int):
    return lambda: (run_dir / "metrics.jsonl").exists() and (run_dir / "metrics.jsonl").read_text().count("lr") >= step


def worker(rank) -> int:
    """Process that trains, under its supervisor."""
    return psutil.Process(rank.process.pid).children()[0].pid


@pytest.mark.slow
def test_kills_and_a_hanging_rank_leave_the_losses_of_a_straight_run(pretrained, pretraining, tmp_path):
    """In one launch that restarts itself: a kill of each rank, and one that hangs. SIGTERM: test_unlabelled.py."""
    words = [*pretraining, f"run.dir={tmp_path}", "checkpoint.every=1", "run.timeout=25", "log.mlflow=false"]
    ranks = fork_ranks(2, "launchers/pretrain.py", "--max-restarts", 8, *words)
    for step, rank in ((4, 0), (8, 1)):
        wait_for(reached(tmp_path, step), ranks, f"step {step}")
        os.kill(worker(ranks[rank]), signal.SIGKILL)
        # The metrics of lost steps are cut off when the run goes on; until then they would count.
        wait_for(lambda: losses(tmp_path)[-1]["step"] <= read_state(tmp_path)["step"] + 1, ranks, "restart")
    # Seconds after the restart: a rank is missed once it has been heard of.
    wait_for(reached(tmp_path, 20), ranks, "the last step before the hang")
    hanging = worker(ranks[1])
    log = tmp_path / "logs" / "rank-0.log"
    before = log.read_text().count("not heard of")
    os.kill(hanging, signal.SIGSTOP)
    wait_for(lambda: log.read_text().count("not heard of") > before, ranks, "verdict")
    os.kill(hanging, signal.SIGCONT)
    ended = [rank.end() for rank in ranks]
    assert [status for status, _ in ended] == [0, 0], ended[0][1][-4000:]
    named = re.findall(r"rank 1 on (\S+) \(last at step (\d+), \w+\): not heard of for", ended[0][1])
    assert named  # a busy machine may have taken a slow start for a hang before
    assert named[-1][0] == socket.gethostname()
    # Notes are posted every few seconds; the last one is at least that of the restart after the second kill.
    assert 6 <= int(named[-1][1]) <= STEPS
    assert "restart 3 of 8" in ended[0][1] + ended[1][1]
    assert losses(tmp_path) == losses(pretrained)
    assert len(complete_checkpoints(tmp_path)) <= 3  # the last two and the best


@pytest.mark.slow
def test_ctrl_c_and_the_signals_of_schedulers_save_within_the_grace_time(pretraining, tmp_path):
    """Three runs side by side; all processes of a run hear the signal, its readers too, as in a Slurm step."""
    grace = 60.0
    dirs = {number: tmp_path / number.name for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    words = [*pretraining, "train.steps=100000", "log.mlflow=false"]
    started = {n: fork_ranks(1, "launchers/pretrain.py", *words, f"run.dir={dirs[n]}")[0] for n in dirs}
    for number, rank in started.items():
        wait_for(reached(dirs[number], 2), [rank], "step 2")
        readers = psutil.Process(rank.process.pid).children(recursive=True)
        assert readers
        for process in (*readers, rank.process):
            process.send_signal(number)
    for number, rank in started.items():
        status, said = rank.end(grace)
        assert status == 128 + number, said[-4000:]
        step = read_state(dirs[number])["step"]
        assert f"{number.name}: left after step {step}" in said
        assert losses(dirs[number])[-1]["step"] == step  # nothing was lost
        assert "Traceback" not in said


def damage(directory, shard_count: int) -> None:
    """Overwrites the members of every clip of the first training shards."""
    for row in load_index(directory, "train").to_pylist():
        if int(row["shard"].removeprefix("train-").removesuffix(".tar")) < shard_count:
            with (directory / row["shard"]).open("r+b") as tar:
                for member in ("waveform", "fbank"):
                    tar.seek(row[f"{member}_offset"] + 200)
                    tar.write(b"damaged")


def replaced(directory, rank: int, ranks: int, steps: int) -> list[int]:
    """What a rank replaces up to each of the first steps."""
    data = DataConfig(shards=str(directory), workers=0, max_bad_share=1)
    with Loader(data, batch_size=8, seed=RunConfig().seed, rank=rank, world_size=ranks) as loader:
        return [loader.replaced(step) for step, _ in zip(range(steps), loader.batches(0), strict=False)]


@pytest.mark.slow
def test_bad_clips_are_counted_over_all_ranks_and_too_many_end_the_run(shards, tmp_path):
    """The limit is one that no rank reaches alone."""
    copy = tmp_path / "shards"
    subprocess.run(["cp", "-r", str(shards), str(copy)], check=True)
    damage(copy, 2)
    total, *own = (replaced(copy, rank, ranks, 8) for rank, ranks in ((0, 1), (0, 2), (1, 2)))
    assert total == [sum(pair) for pair in zip(*own, strict=True)]
    limit = max(own[0][-1], own[1][-1])
    last = next(step for step, count in enumerate(total) if count > limit)
    words = [f"data.shards={copy}", f"run.dir={tmp_path / 'run'}", "train.steps=20", "log.mlflow=false", *MICRO]
    words += [f"data.max_bad={limit}", "data.max_bad_share=1"]
    ended = run_ranks(2, "launchers/pretrain.py", *words, check=False)
    assert [status for status, _ in ended] == [2, 2], ended[0][1][-4000:]
    assert [line["bad_clips"] for line in lines(tmp_path / "run")] == total[: last + 1]
    said = ended[0][1]
    assert f"error: data.max_bad = {limit}: {total[last]} samples of one epoch could not be read from {copy}" in said
    named = r"such as [\w-]+ \(train-00000[01]\.tar: (waveform|fbank): its hash differs.*; run verify_shards\.py"
    assert re.search(named, said), said[-2000:]
    assert "Traceback" not in said


@pytest.mark.slow
def test_a_run_that_goes_on_knows_its_bad_clips_its_newest_checkpoint_and_what_it_had_not_evaluated(shards, tmp_path):
    """One that was stopped in an evaluation, and one that was killed between completing a checkpoint and naming it."""
    copy, run_dir = tmp_path / "shards", tmp_path / "run"
    subprocess.run(["cp", "-r", str(shards), str(copy)], check=True)
    damage(copy, 2)
    total = replaced(copy, 0, 1, 6)
    words = [f"data.shards={copy}", f"run.dir={run_dir}", "log.mlflow=false", "data.max_bad_share=1", "eval.every=2",
             "checkpoint.keep=3", *MICRO]  # fmt: skip
    run_ranks(1, "launchers/pretrain.py", *words, "train.steps=4")
    file = run_dir / "checkpoints" / "step-00000004" / "state.json"
    state = read_json(file, "x")
    assert (state["bad_clips"], state["evaluate"]) == (total[3], False)
    assert state["bad_clips"] > 0
    before = read_json(file.parents[1] / "step-00000002" / "state.json", "x")["plateau"]
    write_json(file, state | {"metric": None, "evaluate": True, "plateau": before})
    (run_dir / "checkpoints" / "latest").write_text("step-00000002")
    run_ranks(1, "launchers/pretrain.py", *words, "train.steps=4")
    assert read_json(file, "x") == state
    assert (run_dir / "checkpoints" / "latest").read_text() == "step-00000004"
    run_ranks(2, "launchers/pretrain.py", *words, "train.steps=6")
    assert [line["bad_clips"] for line in lines(run_dir) if "lr" in line] == total
    assert [line["step"] for line in lines(run_dir) if "eval_loss" in line] == [2, 4, 4, 6]


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "ranks"), [("zero0.json", 1), ("zero2.json", 2)])
def test_steps_that_are_not_finite_change_nothing_and_end_the_run(shards, tmp_path, stage, ranks):
    """A rate of 1e30 makes the second step's gradient NaN; three such steps in a row are too many."""
    ended = run_ranks(ranks, "launchers/pretrain.py", "--deepspeed_config", stage, f"data.shards={shards}",
                      f"run.dir={tmp_path}", "train.steps=20", "train.max_bad_steps=3", "log.mlflow=false", *MICRO,
                      "optim.lr=1e30", "optim.warmup=0", check=False)  # fmt: skip
    assert [status for status, _ in ended] == [2] * ranks
    assert "train.max_bad_steps = 3" in ended[0][1]
    assert lines(tmp_path)[-1]["skipped_steps"] == 2
    keys = (tmp_path / "bad_clips.txt").read_text().split()
    assert len(keys) == 8
    assert all(key.startswith("audio_clip") for key in keys)
