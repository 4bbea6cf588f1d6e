"""Runs over inputs of three lengths: ranks change no loss, and a file is heard as the evaluation heard its clip."""

import numpy as np
import pytest
import torch
from scipy.special import softmax

from pipeline.engine.evaluation import read_predictions
from pipeline.model.weights import weights_file
from pipeline.runs import load_finetuned
from pipeline.serving.scorer import Scorer
from tests.distributed.conftest import MICRO, losses
from tests.helpers import shards_of_lengths
from tests.ranks import run_ranks

WORDS = ["data.seconds=[0.2, 0.4]", "model.positions=rotary", "log.mlflow=false", *MICRO]


@pytest.mark.slow
def test_ranks_change_no_loss_and_a_file_is_heard_as_its_clip(tmp_path):
    shards = shards_of_lengths(tmp_path / "audio", {0.15: 20, 0.4: 20, 0.6: 10})
    words = ["--deepspeed_config", "zero3.json", f"data.shards={shards}", *WORDS]
    for ranks, micro in ((1, 8), (2, 2)):
        run_ranks(ranks, "launchers/pretrain.py", *words, "train.steps=8", f"train.micro_batch={micro}",
                  f"run.dir={tmp_path}/{ranks}")  # fmt: skip
    one, two = losses(tmp_path / "1"), losses(tmp_path / "2")
    assert len(one) == 8
    assert [line["loss"] for line in two] == pytest.approx([line["loss"] for line in one], rel=1e-4)

    run = tmp_path / "finetuned"
    run_ranks(2, "launchers/finetune.py", *words, f"model.init={tmp_path}/2", "finetune.method=swab", "train.epochs=1",
              "checkpoint.average=[0,0]", f"run.dir={run}")  # fmt: skip
    keys, _, logits = read_predictions(run / "predictions.parquet")
    task, spec = load_finetuned(run, weights_file(run), torch.device("cpu"))
    assert spec.seconds == (0.2, 0.4)
    scorer = Scorer(task, spec)
    heard = scorer.probabilities([scorer.read(str(tmp_path / "audio" / f"{key}.wav")) for key in keys])
    assert np.abs(heard - softmax(logits, axis=1)).max() < 1e-4
