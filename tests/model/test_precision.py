"""What --precision does to a network, and that results say it."""

import pytest
import torch

from pipeline.config import FinetuneRecipe
from pipeline.engine import plan
from pipeline.model.precision import in_precision
from pipeline.probing.frozen import open_frozen
from pipeline.recipes import load_recipe
from pipeline.tasks import FinetuneTask
from tests.engine.memory import SHAPE


@pytest.mark.parametrize("method", ["ast", "wast", "swab"])
def test_bf16_is_close_and_float32_comes_out(method):
    recipe = load_recipe(FinetuneRecipe, [], ["model.size=micro", f"finetune.method={method}"])
    torch.manual_seed(0)
    task = FinetuneTask(recipe, SHAPE.mel_bins, SHAPE.frames, SHAPE.classes, single_label=False).eval()
    batch = plan._batch(2, SHAPE)
    batch.waveform, batch.fbank = torch.randn(2, SHAPE.samples) / 10, torch.randn(2, SHAPE.frames, SHAPE.mel_bins)
    with torch.no_grad():
        exact = task(batch).logits
        same = in_precision(task, "fp32")(batch).logits
        rounded = in_precision(task, "bf16")(batch).logits
    assert {weight.dtype for weight in task.parameters()} == {torch.bfloat16}
    assert torch.equal(exact, same)
    assert 0 < (exact - rounded.float()).abs().max() < 0.05 * exact.abs().max()


def test_features_of_another_precision_have_another_digest():
    frozen = open_frozen("random:micro", None)
    digest = frozen.digest
    assert frozen.at("fp32").digest == digest
    assert frozen.at("bf16").digest != digest
    with pytest.raises(ValueError, match="fp64"):
        frozen.at("fp64")
