"""What finetuning leaves out of a clip: residual branches, rows and columns of patches. Against loops, clip by clip."""

import pytest
import torch

from pipeline.config import FinetuneRecipe, PretrainRecipe
from pipeline.flow import Batch
from pipeline.model.encoder import Encoder, drop_paths
from pipeline.model.masking import kept_patches
from pipeline.recipes import load_recipe
from pipeline.tasks import FinetuneTask, PretrainTask
from tests.model.test_model import batch
from tests.reference.augment import draw

GRID = (4, 6)
WORDS = ["model.size=micro", "finetune.method=swab", "finetune.bottlenecks=4"]
DROPPING = ["model.drop_path=0.6", "finetune.mask_time=0.4", "finetune.mask_freq=0.3"]


def kept(seed: int, position: int, frequency: float, time: float) -> list[int]:
    axes = []
    for purpose, size, share in (("frequency", GRID[0], frequency), ("time", GRID[1], time)):
        scores = [draw(seed, f"tokens.{purpose}", position, number) for number in range(size)]
        order = sorted(range(size), key=lambda number: scores[number])
        axes.append(sorted(order[: max(1, round((1 - share) * size))]))
    return [f * GRID[1] + t for f in axes[0] for t in axes[1]]


@pytest.mark.parametrize("shares", [(0.2, 0.2), (0.0, 0.5), (0.99, 0.0), (0.0, 0.0)])
def test_kept_patches_are_whole_rows_and_columns(shares):
    position = torch.tensor([3, 0, 17, 2**40])
    found = kept_patches(5, position, GRID, *shares)
    assert found.tolist() == [kept(5, number, *shares) for number in position.tolist()]


@torch.no_grad()
def test_branches_are_dropped_by_clip_and_block():
    """Every block by hand; the share of the last one's dropped branches is the rate."""
    torch.manual_seed(0)
    encoder = Encoder(12, 3, 3, bottlenecks=0, fusion_layer=1, recompute=False).double()
    streams = [torch.randn(2, 5, 12, dtype=torch.float64) for _ in range(2)]
    position = torch.tensor([7, 4])
    paths = drop_paths(0.8, 3, 2, 9, position, torch.float64)
    encoded = encoder(streams, paths)
    for stream, clip in ((0, 0), (0, 1), (1, 0), (1, 1)):
        x = streams[stream][clip : clip + 1]
        for layer, block in enumerate(encoder.blocks):
            rate = 0.8 * layer / 2
            numbers = [(stream * 3 + layer) * 2 + branch for branch in range(2)]
            keep = [float(draw(9, "drop_path", int(position[clip]), n) >= rate) / (1 - rate) for n in numbers]
            x = x + keep[0] * block.attn(block.norm1(x))
            x = x + keep[1] * block.mlp(block.norm2(x))
        torch.testing.assert_close(encoded[stream][clip : clip + 1], encoder.norm(x), rtol=1e-6, atol=1e-6)
    many = drop_paths(0.3, 5, 1, 0, torch.arange(4000), torch.float32)
    shares = (many == 0).float().mean(dim=(1, 2, 3))
    torch.testing.assert_close(shares, torch.linspace(0, 0.3, 5), rtol=0, atol=0.02)
    torch.testing.assert_close(many.mean(dim=(1, 2, 3)), torch.ones(5), rtol=0, atol=0.02)


def task_of(*words: str, seed: int = 0) -> FinetuneTask:
    torch.manual_seed(1)
    return FinetuneTask(load_recipe(FinetuneRecipe, [], [*WORDS, *words, f"run.seed={seed}"]), 128, 64, 5, False)


def part(whole: Batch, rows: list[int]) -> Batch:
    fields = (whole.position, whole.row, whole.valid, whole.waveform, whole.fbank, whole.targets)
    return Batch(*(field[rows] for field in fields))


@torch.no_grad()
def test_a_clip_loses_the_same_in_any_batch_and_nothing_in_evaluation():
    task, whole = task_of(*DROPPING).double(), batch(4)
    logits = task(whole).logits
    for rows in ([2], [3, 1], [0, 1, 2]):
        torch.testing.assert_close(task(part(whole, rows)).logits, logits[rows])
    assert not torch.allclose(task_of(*DROPPING, seed=1).double()(whole).logits, logits)
    assert not torch.allclose(task_of().double()(whole).logits, logits)
    assert torch.equal(task.eval()(whole).logits, task_of().double()(whole).logits)


@torch.no_grad()
@pytest.mark.parametrize("method", ["ast", "wast", "swast"])
def test_masked_tokens_are_as_if_they_were_not_there(method):
    """Means over the tokens that remain, which attend to one another alone."""
    words = [f"finetune.method={method}", "model.stride=16"]
    task, plain, whole = task_of(*words, *DROPPING[1:]), task_of(*words), batch(3)
    seen = []
    task.model.encoder.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    plain.model.encoder.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    logits = task(whole).logits
    plain(whole)
    fewer, all_tokens = seen
    grid = task.model.grid
    chosen = kept_patches(0, whole.position, grid, 0.3, 0.4)
    assert chosen.shape == (3, round(0.7 * grid[0]) * round(0.6 * grid[1]))
    index = torch.cat([torch.tensor([[0, 1]] * 3), chosen + 2], dim=1)
    for less, every in zip(fewer, all_tokens, strict=True):
        assert torch.equal(less, torch.stack([clip[rows] for clip, rows in zip(every, index, strict=True)]))
    tokens = [stream[:, 2:] for stream in plain.model.encoder(fewer)]
    expected = plain.classifier.linear(plain.classifier.norm(torch.cat([x.mean(dim=1) for x in tokens], dim=1)))
    torch.testing.assert_close(logits, expected)


def test_every_weight_learns_where_much_is_left_out():
    task = task_of(*DROPPING)
    task(batch(24)).total.backward()
    assert [name for name, p in task.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_pretraining_drops_branches_too():
    losses = {}
    for rate in (0.0, 0.5):
        torch.manual_seed(0)
        recipe = load_recipe(PretrainRecipe, [], ["model.size=micro", f"model.drop_path={rate}"])
        task = PretrainTask(recipe, 128, 64)
        losses[rate] = [float(task(batch()).total.detach()), float(task.eval()(batch()).total.detach())]
    assert losses[0.0][0] == losses[0.0][1] == losses[0.5][1] != losses[0.5][0]


def test_a_network_without_positions_draws_nothing_silently():
    task = task_of(*DROPPING)
    with pytest.raises(ValueError, match="by the positions"):
        task.model(batch().fbank, None)
