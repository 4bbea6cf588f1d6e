"""run.deterministic: how torch is set; on a CPU the numbers are the same with and without it."""

import json
from pathlib import Path

import pytest

from tests.distributed.conftest import MICRO, losses
from tests.ranks import run_ranks


@pytest.mark.slow
def test_it_sets_torch_changes_no_number_on_a_cpu_and_may_be_switched(shards, tmp_path):
    program = Path(__file__).with_name("deterministic.py")

    def train(name: str, *words: str) -> tuple[list[object], str]:
        out = tmp_path / "settings.json"
        common = [f"data.shards={shards}", f"run.dir={tmp_path / name}", "checkpoint.every=2", "log.mlflow=false"]
        ((_, said),) = run_ranks(1, program, out, *MICRO, *common, *words)
        return json.loads(out.read_text()), said

    assert train("off", "train.steps=4")[0] == [False, False, False, None, False]
    assert train("on", "train.steps=2", "run.deterministic=true")[0] == [True, False, True, ":4096:8", False]
    settings, said = train("on", "train.steps=4")
    assert settings[0] is False
    assert "from step 2 on: run.deterministic = False, no longer True" in said
    assert losses(tmp_path / "on") == losses(tmp_path / "off")
    assert "deterministic: false" in (tmp_path / "on" / "config.yaml").read_text()
    assert "deterministic: true" in (tmp_path / "on" / "checkpoints" / "step-00000002" / "config.yaml").read_text()
