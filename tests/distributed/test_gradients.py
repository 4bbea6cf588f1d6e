"""Loss and every gradient of a fixed global batch are the same for any ranks, micro-batch and ZeRO stage.

A loss comparison alone is blind to a gather without gradient: the loss is right and the gradient 1/R
too small. So gradients are compared, parameter by parameter.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

PROGRAM = Path(__file__).with_name("gradients.py")


@pytest.fixture(scope="module")
def reference(deepspeed_run, tmp_path_factory):
    """Returns a function: words -> gradients of one rank, one micro-batch, ZeRO 0."""
    made = {}

    def get(*words: str) -> dict[str, torch.Tensor]:
        if words not in made:
            out = tmp_path_factory.mktemp("reference") / "gradients.safetensors"
            deepspeed_run(1, PROGRAM, out, 0, 12, *words)
            made[words] = load_file(out)
        return made[words]

    return get


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "stage", "micro", "words"),
    [
        (2, 0, 6, ()),
        (2, 2, 6, ()),
        (2, 1, 2, ()),
        (2, 3, 3, ()),
        (1, 2, 4, ()),
        (2, 2, 3, ("pretrain.symmetric=true", "pretrain.projection=mlp", "pretrain.clean_spectrogram=true")),
    ],
)
def test_gradients_do_not_depend_on_the_split(deepspeed_run, reference, tmp_path, ranks, stage, micro, words):
    out = tmp_path / "gradients.safetensors"
    deepspeed_run(ranks, PROGRAM, out, stage, micro, *words)
    found, expected = load_file(out), reference(*words)
    assert found.keys() == expected.keys()
    assert sum(name.startswith("grad/") for name in found) > 50
    for name, value in expected.items():
        assert value.norm() > 0 or "accuracy" in name, name
        assert (found[name] - value).norm() <= 1e-5 * value.norm(), name
