"""A network fed with inputs shorter than its longest, and rotary positions."""

import pytest
import torch
from safetensors.torch import save_file

from pipeline.config import FinetuneRecipe, PretrainRecipe
from pipeline.errors import UserError
from pipeline.flow import Batch
from pipeline.methods import FINETUNE, PRETRAIN
from pipeline.model.encoder import turn, turns
from pipeline.model.teacher import Teacher
from pipeline.model.weights import load_weights
from pipeline.recipes import load_recipe
from pipeline.tasks import FinetuneTask, PretrainTask
from tests.test_methods import CLASSES, FRAMES, MELS, MICRO, WORDS, batch, finetune_task, pretrain_task

SHORT = FRAMES // 2
POSITIONS = ["centre", "interpolated", "rotary"]


def short() -> Batch:
    whole = batch()
    whole.waveform, whole.fbank, whole.frames = whole.waveform[:, : SHORT * 160 - 100], whole.fbank[:, :SHORT], SHORT
    return whole


def as_short(task, words, folder):
    """A network whose longest input is the short one, with the weights of `task`."""
    save_file(task.state_dict(), folder / "w.safetensors")
    if isinstance(task, PretrainTask):
        other = PretrainTask(load_recipe(PretrainRecipe, [], [*MICRO, *words]), MELS, SHORT)
    else:
        other = FinetuneTask(load_recipe(FinetuneRecipe, [], [*WORDS, *words]), MELS, SHORT, CLASSES, True)
    report = load_weights(other, folder / "w.safetensors")
    assert not report.fresh
    assert not report.dropped
    if isinstance(other, PretrainTask) and other.teacher:  # as runs.initialise does
        other.teacher = Teacher(other.model, other.teacher.blocks)
    return other


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("method", FINETUNE)
def test_a_shorter_input_is_that_of_a_network_of_its_length(method, positions, tmp_path):
    words = [f"finetune.method={method}", f"model.positions={positions}", "finetune.pool=rows"]
    task = finetune_task(*words)
    other = as_short(task, words, tmp_path)
    for one in (task, other):
        one.eval()
    with torch.no_grad():
        assert torch.equal(task(short()).logits, other(short()).logits)
        assert not torch.allclose(task(short()).logits, task(batch()).logits)


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("method", PRETRAIN)
def test_a_pretraining_of_shorter_inputs_is_that_of_a_network_of_their_length(method, positions, tmp_path):
    words = [f"pretrain.method={method}", f"model.positions={positions}", "pretrain.mask_patches=200"]
    if PRETRAIN[method].drops:
        words[-1] = "pretrain.drop_ratio=[0.5,0.5]"  # of 4 patches
    task = pretrain_task(*words)
    other = as_short(task, words, tmp_path)
    torch.testing.assert_close(task(short()).total, other(short()).total)


def test_rotary_products_depend_on_distances_alone():
    q, k = torch.randn(2, 1, 1, 1, 32, generator=torch.Generator().manual_seed(0)).unbind()

    def product(first: int, second: int) -> torch.Tensor:
        places = torch.tensor([[first]]), torch.tensor([[second]])
        a, b = (turn(x, turns(place, 32)) for x, place in zip((q, k), places, strict=True))
        return (a * b).sum()

    torch.testing.assert_close(product(3, 10), product(40, 47))
    assert (product(3, 10) - product(3, 11)).abs() > 1e-3
    assert torch.equal(turn(q, turns(torch.tensor([[0]]), 32)), q)
    # Twice, in complex numbers: pair i turns by column * 10000^(-i / 16).
    pairs = torch.complex(q[..., :16], q[..., 16:]) * torch.exp(1j * 5 * 10000.0 ** (-torch.arange(16) / 16))
    turned = turn(q, turns(torch.tensor([[5]]), 32))
    torch.testing.assert_close(torch.complex(turned[..., :16], turned[..., 16:]), pairs)


def test_rotary_tokens_keep_their_columns_when_others_are_dropped():
    """All visible patches in another order: the same tokens in that order."""
    task = pretrain_task("pretrain.method=craft_mosaic", "model.positions=rotary").eval()
    clips = batch()
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0)).expand(len(clips), -1)
    with torch.no_grad():
        wav_map = task.model.waveform_map(clips.waveform)
        whole = task.model(clips.fbank, wav_map)
        shuffled = task.model(clips.fbank, wav_map, [order], [order], clips.position, True)
    for one, other in ((whole.spec[0], shuffled.spec[0]), (whole.wav[0], shuffled.wav[0])):
        torch.testing.assert_close(one[:, order[0]], other)


@pytest.mark.parametrize(("before", "after"), [("rotary", "centre"), ("centre", "rotary")])
def test_positions_of_another_kind_are_refused(before, after, tmp_path):
    task = finetune_task("finetune.method=ast", f"model.positions={before}")
    save_file(task.state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(UserError, match=f"model.positions = {after}"):
        load_weights(finetune_task("finetune.method=ast", f"model.positions={after}"), tmp_path / "w.safetensors")


def test_a_length_too_short_for_what_is_dropped_is_refused():
    with pytest.raises(UserError, match=r"0\.7 of 2 columns are 2"):
        pretrain_task("pretrain.method=craft_mosaic", "pretrain.drop=[time,frequency]", "pretrain.drop_ratio=[0.7,0.4]",
                      "data.seconds=[0.16]")  # fmt: skip
