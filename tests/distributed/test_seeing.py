"""A run with a slow rank, under both profilers: the rank is named, the profiles are there, the losses as ever."""

import gzip
import json
import re
import socket
from pathlib import Path

import pytest

from tests.distributed.conftest import MICRO, STEPS, lines, losses
from tests.ranks import run_ranks


@pytest.fixture(scope="module")
def watched(pretraining, tmp_path_factory):
    """The run `pretrained` again, but for what is looked at."""
    run_dir = tmp_path_factory.mktemp("seeing") / "run"
    looks = ["log.profile=[3,4]", "log.profile_flops=6", f"log.stragglers={STEPS // 2}", "log.peak_tflops=0.5"]
    script = Path(__file__).with_name("slow_rank.py")
    run_ranks(2, script, 1, 0.05, *pretraining, f"run.dir={run_dir}", "log.mlflow=false", *looks)
    return run_dir


@pytest.mark.slow
def test_looking_changes_no_loss(watched, pretrained):
    assert losses(watched) == losses(pretrained)


@pytest.mark.slow
def test_the_slow_rank_is_named(watched):
    said = (watched / "logs" / "rank-0.log").read_text()
    found = re.findall(
        rf"slowest of 2 ranks in {STEPS // 2} steps: rank (\d) on (\S+), (\S+) s a step \(median (\S+)\): "
        r"forward (\S+) \((\S+)\), data wait (\S+) \((\S+)\)",
        said,
    )
    assert [(rank, host) for rank, host, *_ in found] == [("1", socket.gethostname())] * 2
    for _, _, total, median, forward, usual, *_ in found:
        # Micro-batches of a step: two, each pooled first and then trained on (GradCache), 50 ms later each time.
        assert float(forward) > 0.2
        assert float(total) > float(median)
        assert float(forward) > float(usual)
    rows = [line for line in lines(watched) if "slowest_rank" in line]
    assert [(row["step"], row["slowest_rank"]) for row in rows] == [(STEPS // 2, 1.0), (STEPS, 1.0)]
    assert all(row["slowest_ratio"] > 1 for row in rows)


@pytest.mark.slow
def test_the_progress_line_and_a_log_for_each_rank(watched):
    said = (watched / "logs" / "rank-0.log").read_text()
    form = rf"step 3/{STEPS}  loss \d+\.\d+  lr \S+  \d+\.\d clips/s  wait \d+ %  eta \d+:\d\d:\d\d"
    assert len(re.findall(form, said)) == 1
    assert (watched / "logs" / "rank-1.log").exists()
    assert "MFU against 0.5 TFLOP/s a rank (float32, given)" in said


@pytest.mark.slow
def test_profiles_of_the_named_steps(watched):
    folder = watched / "profile"
    for rank in (0, 1):
        with gzip.open(folder / f"rank-{rank}.trace.json.gz", "rt") as file:
            names = [event.get("name") for event in json.load(file)["traceEvents"]]
        # Two steps of two micro-batches with two passes each, four blocks, four linear layers a block.
        attention = sum(name == "aten::scaled_dot_product_attention" for name in names)
        assert attention == 2 * 2 * 2 * 4
        assert "aten::addmm" in (folder / f"rank-{rank}.operators.txt").read_text()
    report = (folder / "flops.txt").read_text()
    assert "Profile Summary at step 6:" in report
    assert "Craft" in report
    files = {f"rank-{rank}.{kind}" for rank in (0, 1) for kind in ("trace.json.gz", "operators.txt")}
    assert {path.name for path in folder.iterdir()} == {"flops.txt", *files}


@pytest.mark.slow
def test_where_nothing_is_held_out_the_rate_falls_by_every_step_logged_or_not(shards, tmp_path):
    words = ["--deepspeed_config", "zero0.json", "--config", "pretrain/demo", f"data.shards={shards}", *MICRO,
             "data.eval_split=", "train.steps=24", "eval.every=4", "optim.schedule=plateau", "optim.patience=0",
             "optim.lr=1e-3", "log.mlflow=false"]  # fmt: skip
    found = {}
    for ranks, every in ((1, 1), (1, 4), (2, 2)):
        run_dir = tmp_path / f"{ranks}-{every}"
        run_ranks(ranks, "launchers/pretrain.py", *words, f"log.every={every}", f"run.dir={run_dir}")
        rates = {line["step"]: line["lr"] for line in lines(run_dir) if "lr" in line}
        found[ranks, every] = {step: rate for step, rate in rates.items() if step % 4 == 0}
    assert len(set(found[1, 1].values())) > 1
    assert found[1, 4] == found[1, 1]
    assert found[2, 2] == found[1, 1]
