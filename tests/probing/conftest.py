"""Run directories with random weights: what pretrain.py and finetune.py leave, without the training."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pipeline.config import FinetuneRecipe, PretrainRecipe
from pipeline.data.corpus import load_corpus
from pipeline.data.spec import DataSpec
from pipeline.recipes import dump_recipe, load_recipe
from pipeline.tasks import FinetuneTask, PretrainTask


@pytest.fixture(scope="session")
def make_run(shards, tmp_path_factory) -> Callable[..., Path]:
    def make(kind: type, *words: str) -> Path:
        run_dir = tmp_path_factory.mktemp("runs") / "run"
        checkpoint = run_dir / "checkpoints" / "step-00000001"
        checkpoint.mkdir(parents=True)
        recipe = load_recipe(kind, [], [f"data.shards={shards}", "model.size=micro", "model.stride=16", *words])
        (run_dir / "config.yaml").write_text(dump_recipe(recipe))
        spec = DataSpec.of(load_corpus(recipe.data), recipe.data).model_copy(update={"mean": -5.0, "std": 4.0})
        spec.save(run_dir)
        torch.manual_seed(3)
        pretrains = kind is PretrainRecipe
        classes = (len(spec.labels), spec.single_label)
        task = PretrainTask(recipe, 128, spec.frames) if pretrains else FinetuneTask(recipe, 128, spec.frames, *classes)
        save_file(task.state_dict(), checkpoint / "weights.safetensors")
        (checkpoint / "complete").touch()
        (run_dir / "checkpoints" / "latest").write_text(checkpoint.name)
        return run_dir

    return make


@pytest.fixture(scope="session")
def pretrained(make_run) -> Path:
    return make_run(PretrainRecipe, "pretrain.method=swapt")


@pytest.fixture(scope="session")
def finetuned(make_run) -> Path:
    return make_run(FinetuneRecipe)
