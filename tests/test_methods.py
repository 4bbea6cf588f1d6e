"""Every pretraining x finetuning: built, stepped, saved, loaded with an exact report, stepped again."""

import pytest
import torch
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.config import FinetuneRecipe, PretrainRecipe
from pipeline.errors import UserError
from pipeline.flow import Batch
from pipeline.methods import FINETUNE, PRETRAIN, mismatch
from pipeline.model.weights import load_weights
from pipeline.recipes import load_recipe
from pipeline.tasks import FinetuneTask, PretrainTask

MELS, FRAMES, CLASSES = 32, 64, 5
MICRO = ["model.size=micro", "model.channels=[11,11,10]", "pretrain.clusters=[1,2]"]
WORDS = [word for word in MICRO if not word.startswith("pretrain")]
SENSELESS = {("ssast", "wast"), ("wapt", "ast"), ("audio_mosaic", "wast")}


def batch(clips: int = 4) -> Batch:
    generator = torch.Generator().manual_seed(3)
    position = torch.arange(clips)
    return Batch(
        position,
        position,
        torch.ones(clips, dtype=torch.bool),
        0.1 * torch.randn(clips, FRAMES * 160 - 300, generator=generator),
        torch.randn(clips, FRAMES, MELS, generator=generator),
        torch.eye(CLASSES)[position % CLASSES],
    )


def pretrain_task(*words: str) -> PretrainTask:
    torch.manual_seed(1)
    return PretrainTask(load_recipe(PretrainRecipe, [], [*MICRO, *words]), MELS, FRAMES)


def finetune_task(*words: str) -> FinetuneTask:
    torch.manual_seed(2)
    return FinetuneTask(load_recipe(FinetuneRecipe, [], [*WORDS, *words]), MELS, FRAMES, CLASSES, True)


def step(task: torch.nn.Module) -> None:
    """One optimiser step that every weight takes part in."""
    optimizer = torch.optim.Adam(task.parameters(), lr=1e-3)
    losses = task(batch())
    losses.total.backward()
    assert torch.isfinite(losses.total)
    assert [name for name, p in task.named_parameters() if p.grad is None or not p.grad.any()] == []
    optimizer.step()


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Weights of every pretraining after a step."""
    folder = tmp_path_factory.mktemp("weights")
    for method in PRETRAIN:
        task = pretrain_task(f"pretrain.method={method}")
        step(task)
        save_file(task.state_dict(), folder / f"{method}.safetensors")
    return folder


@pytest.mark.parametrize("finetuning", FINETUNE)
@pytest.mark.parametrize("pretraining", PRETRAIN)
def test_every_cell_loads_with_an_exact_report_and_steps(checkpoints, pretraining, finetuning):
    before, after = PRETRAIN[pretraining], FINETUNE[finetuning]
    file = checkpoints / f"{pretraining}.safetensors"
    task = finetune_task(f"finetune.method={finetuning}")
    if (pretraining, finetuning) in SENSELESS:
        with pytest.raises(UserError, match="alone"):
            load_weights(task, file)
        assert mismatch(before, after)
        return
    assert not mismatch(before, after)
    trained = pretrain_task(f"pretrain.method={pretraining}").state_dict().keys()
    initial = {name: value.clone() for name, value in task.state_dict().items()}
    report = load_weights(task, file)
    sides = {"spec": before.spec and after.spec, "wav": before.wav and after.wav}
    common = {"model.special", "model.encoder.blocks", "model.encoder.norm"}
    common |= {"model.spec_patch"} if sides["spec"] else set()
    common |= {"model.wav_patch", "model.msae"} if sides["wav"] else set()
    loaded = {name for name in initial if name.startswith(tuple(common))}
    resized = {f"model.{side}_tokens.positions" for side in sides if sides[side]}
    assert set(report.loaded) == loaded
    assert set(report.resized) == resized
    assert set(report.fresh) == initial.keys() - loaded - resized
    assert set(report.dropped) == trained - loaded - resized
    assert "classifier.linear.weight" in report.fresh
    assert ("model.encoder.bottlenecks.tokens" in report.fresh) == after.fusion
    changed = {name for name, value in task.state_dict().items() if not torch.equal(value, initial[name])}
    assert changed == loaded | resized, "a weight that is reported fresh was touched, or a loaded one was not"
    step(task)


@pytest.mark.parametrize("finetuning", FINETUNE)
def test_finetuning_from_nothing_and_on_from_a_finetuned_run(finetuning, tmp_path):
    task = finetune_task(f"finetune.method={finetuning}")
    step(task)
    save_file(task.state_dict(), tmp_path / "weights.safetensors")
    again = finetune_task(f"finetune.method={finetuning}")
    report = load_weights(again, tmp_path / "weights.safetensors")
    assert (report.resized, report.fresh, report.dropped) == ([], [], [])
    assert torch.equal(again(batch()).logits, task(batch()).logits)


@pytest.mark.parametrize(
    "words",
    [
        ("pretrain.method=ssast", "pretrain.two_pass=true", "pretrain.ssast_compat=true", "pretrain.softmax=ssast"),
        ("pretrain.method=swapt", "pretrain.two_pass=true", "model.shared_patch=true", "model.modality_embedding=true"),
        ("pretrain.method=swacl", "pretrain.contrast=raw", "pretrain.projection=mlp", "pretrain.symmetric=true"),
        ("pretrain.method=pswacl", "pretrain.level=token", "pretrain.mask_waveform=true", "pretrain.projection=mlp"),
        ("pretrain.method=pswacl", "pretrain.clean_spectrogram=true", "pretrain.two_pass=true"),
        ("pretrain.method=pswacl", "model.kernels=[51]", "model.kernel_strides=[5]", "model.channels=[32]"),
        ("pretrain.method=swapt", "model.channels=[16,16,16]", "model.activation=gelu", "model.norm=none"),
        ("pretrain.method=pswacl", "model.channels=[16,16,16]", "pretrain.mask_waveform=true"),
    ],
)
def test_the_readings_of_the_paper_step(words):
    step(pretrain_task(*words))


@pytest.mark.parametrize(
    "words",
    [
        ("finetune.pool=cls", "finetune.method=ast"),
        ("finetune.pool=cls", "finetune.head=mean_logits"),
        ("finetune.head=mean_pool", "augment.mask_map=true"),
        ("model.channels=[16,16,16]", "finetune.method=swab"),
        ("model.channels=[16,16,16]", "finetune.method=swast", "model.stride=16"),
    ],
)
def test_the_readings_of_finetuning_step(words):
    step(finetune_task(*words))


def test_two_passes_have_different_masks_and_one_pass_shares_them():
    def masks(*words):
        task = pretrain_task("pretrain.method=ssast", *words)
        return task.hidden.masks("spec", torch.arange(6), task.model.grid)

    assert len(masks()) == 1
    first, second = masks("pretrain.two_pass=true")
    assert torch.equal(first, masks()[0])
    assert not torch.equal(first, second)


def test_the_waveform_map_is_masked_in_training_alone():
    words = ("finetune.method=wast", "augment.mask_map=true", "augment.freq_mask=0", "augment.time_mask=500")
    task, plain = finetune_task(*words), finetune_task("finetune.method=wast")
    assert not torch.equal(task(batch()).logits, plain(batch()).logits)
    task.eval()
    assert torch.equal(task(batch()).logits, plain(batch()).logits)


def test_the_variance_of_learned_targets_is_logged():
    """It warns of a collapse: a silent clip has a constant map."""
    task = pretrain_task("pretrain.method=wapt")
    loud = batch()
    silent = batch()
    silent.waveform.zero_()
    variances = [float(task(clips).named["wav_target_variance"]) for clips in (loud, silent)]
    assert variances[0] > 1e-3 > variances[1]


def test_token_contrast_needs_equal_grids():
    with pytest.raises(UserError, match=r"pretrain\.level = token"):
        pretrain_task("model.channels=[16,16,16]", "pretrain.level=token")


@pytest.mark.parametrize("words", ["pretrain.mask_patches=510 pretrain.ssast_compat=true", "pretrain.mask_patches=512"])
def test_masks_that_leave_nothing_are_refused(words):
    with pytest.raises(UserError, match=r"pretrain\.mask_patches = 51[02]: 8 masked patches, but 2 x 4 patches allow"):
        pretrain_task(*words.split())


@pytest.mark.parametrize("method", ["ssast", "swapt", "craft_mae"])
@pytest.mark.parametrize("stride", [10, 20])
def test_patches_that_are_not_side_by_side_have_no_targets(method, stride):
    """Targets are cut side by side: those of another stride would be the pixels of other patches."""
    with pytest.raises(UserError, match=f"stride = {stride}, but .* = {method} predicts .*; set model.stride=16"):
        pretrain_task(f"pretrain.method={method}", f"model.stride={stride}")
    pretrain_task("pretrain.method=craft_latent", "model.stride=10")  # predicts no pixels


def test_weights_of_another_size_or_kind_are_refused(checkpoints, tmp_path):
    with pytest.raises(UserError, match=r"set model\.size"):
        load_weights(finetune_task("model.size=tiny"), checkpoints / "pswacl.safetensors")
    save_file({"conv.weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="none of its 1 tensors"):
        load_weights(finetune_task(), tmp_path / "other.safetensors")
    (tmp_path / "broken.pth").write_bytes(b"\x80\x04 no")
    with pytest.raises(UserError, match=r"broken\.pth"):
        load_weights(finetune_task(), tmp_path / "broken.pth")


class Operations(TorchDispatchMode):
    """Counts the operations that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", PRETRAIN)
def test_no_clip_by_clip_work_in_a_step(method):
    """Masks, network, losses and their gradients call as many operations for 6 clips as for 2."""
    counts = []
    for clips in (2, 6):
        task = pretrain_task(f"pretrain.method={method}", f"pretrain.two_pass={not PRETRAIN[method].drops}")
        few = batch(clips)
        with Operations() as operations:
            task(few).total.backward()
        counts.append(operations.count)
    assert counts[0] == counts[1]
    assert counts[0] > 100
