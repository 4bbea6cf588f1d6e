"""Front ends of the waveform beside MSAE, against loops; a waveform that leaves the encoder early."""

import math

import pytest
import torch
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode

from pipeline.config import FinetuneRecipe, ModelConfig, PretrainRecipe
from pipeline.engine.plan import Shape, model_flops
from pipeline.errors import UserError
from pipeline.methods import FINETUNE, PRETRAIN
from pipeline.model.encoder import Encoder
from pipeline.model.frontends import FLOOR, KERNEL, STRIDES, SincEmbedding, StridedEmbedding, frontend
from pipeline.model.weights import load_weights
from pipeline.recipes import load_recipe
from pipeline.tasks import FinetuneTask, PretrainTask
from tests.model.test_model import batch

OTHERS = ("strided", "sinc")
MICRO = ["model.size=micro"]


def strided(x: list[float], length: int, module: StridedEmbedding) -> torch.Tensor:
    """A clip's map, position by position."""
    first = module.first
    pad = (KERNEL - STRIDES[0]) // 2
    columns = []
    for start in range(-pad, len(x) - pad, STRIDES[0]):
        samples = [x[i] if 0 <= i < len(x) else 0.0 for i in range(start, start + KERNEL)]
        columns.append(first @ torch.tensor(samples, dtype=first.dtype))
    audio = torch.stack(columns[: -(-length // STRIDES[0])])
    mean, deviation = audio.mean(), (audio.var(correction=0) + 1e-6).sqrt()
    columns = [(column - mean) / deviation * module.norm_weight + module.bias for column in columns]
    for weight, bias, stride in ((module.second, module.second_bias, STRIDES[1]),
                                 (module.third, module.third_bias, STRIDES[2])):  # fmt: skip
        columns = [x * (1 + torch.erf(x / math.sqrt(2))) / 2 for x in columns]  # GELU
        taps = weight.unflatten(1, (stride, -1))
        columns = [bias + sum(taps[:, tap] @ columns[start + tap] for tap in range(stride))
                   for start in range(0, len(columns), stride)]  # fmt: skip
    return torch.stack(columns, dim=1)


def sinc(x: list[float], length: int, module: SincEmbedding) -> torch.Tensor:
    """A clip's map: filters from their definition, energies sample by sample, logarithms, one normalisation."""
    lower, upper = module.bands().double()
    rows = []
    for low, high in zip(lower / 16000, upper / 16000, strict=True):
        both = []
        for turn in (torch.sin, lambda x: -torch.cos(x)):  # the integral of a cosine, and of a sine, over the band
            at_0 = 2 * (high - low) if turn is torch.sin else torch.zeros_like(low)
            taps = [(turn(2 * torch.pi * high * n) - turn(2 * torch.pi * low * n)) / (torch.pi * n) if n else at_0
                    for n in range(-125, 126)]  # fmt: skip
            taps = [tap * (0.54 + 0.46 * math.cos(2 * math.pi * n / 250)) for n, tap in enumerate(taps, start=-125)]
            both.append([sum(taps[n + 125] * x[c + n] for n in range(-125, 126) if 0 <= c + n < len(x)) ** 2
                         for c in range(0, len(x), 40)])  # fmt: skip
        values = [(one + other) / 2 for one, other in zip(*both, strict=True)]
        frames = [sum(values[start : start + 4]) / 4 for start in range(0, len(values), 4)]
        rows.append(torch.stack([torch.log(frame.clamp(min=FLOOR)) for frame in frames]))
    maps = torch.stack(rows)
    audio = maps[:, : -(-length // 160)]
    normalised = (maps - audio.mean()) / (audio.var(correction=0) + 1e-6).sqrt()
    return normalised * module.norm_weight[:, None] + module.bias[:, None]


@pytest.mark.parametrize(("kind", "reference"), [(StridedEmbedding, strided), (SincEmbedding, sinc)])
def test_front_ends_equal_loops_over_samples(kind, reference):
    torch.manual_seed(0)
    module = kind(3, "unpadded").double()
    for name, parameter in module.named_parameters():
        torch.nn.init.normal_(parameter, std=0.1 if name == "edges" else 0.5)
    lengths = [480, 250]
    waveform = 0.3 * torch.randn(2, 480, dtype=torch.float64)
    waveform[1, 250:] = 0
    found = module(waveform, torch.tensor(lengths))
    expected = torch.stack([reference(x.tolist(), n, module) for x, n in zip(waveform, lengths, strict=True)])
    close = {"rtol": 1e-5, "atol": 1e-5} if kind is SincEmbedding else {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(found, expected, **close)
    weights = list(module.parameters())
    gradients = [torch.autograd.grad(out.square().sum(), weights) for out in (found, expected)]
    torch.testing.assert_close(*gradients, **close)


@torch.no_grad()
@pytest.mark.parametrize("kind", OTHERS)
def test_padding_does_not_change_the_map_of_a_sound(kind):
    torch.manual_seed(0)
    sound = 0.1 * torch.randn(1, 16000)
    padded = torch.nn.functional.pad(sound, (0, 144000))
    for norm, same in (("unpadded", True), ("none", True), ("group", False)):
        front = frontend(ModelConfig(frontend=kind, norm=norm))
        alone, whole = front(sound, torch.tensor([16000])), front(padded, torch.tensor([16000]))
        assert whole.shape == (1, 128, 1000)
        assert torch.allclose(whole[..., :100], alone, rtol=1e-4, atol=1e-4) == same
    silent = frontend(ModelConfig(frontend=kind))
    out = silent(torch.zeros(2, 1600), torch.tensor([1600, 1]))
    assert torch.isfinite(out).all()


@torch.no_grad()
def test_sinc_begins_as_mel_bands_that_hear_their_tones():
    front = SincEmbedding(128, "none")
    lower, upper = front.bands()
    assert float(lower[0]) == pytest.approx(30, abs=0.1)
    assert float(upper[-1]) == pytest.approx(8000)
    torch.testing.assert_close(upper[:-2], lower[2:], rtol=1e-4, atol=0.1)
    time = torch.arange(16000) / 16000
    for pitch in (300.0, 1000.0, 4000.0):
        heard = front(torch.sin(2 * torch.pi * pitch * time)[None])[0, :, 20:80].mean(dim=1)
        best = int(heard.argmax())
        assert lower[max(0, best - 1)] <= pitch <= upper[min(127, best + 1)]
        assert float(heard[best]) - float(heard[(best + 64) % 128]) > math.log(1e3)
    front.edges[0] += 20.0  # beyond Nyquist: silent, not wrong
    assert torch.isfinite(front(torch.randn(1, 1600))).all()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", OTHERS)
def test_half_precision_keeps_the_map(kind, dtype):
    """Quiet and loud clips; float16's smallest numbers are larger than a quiet clip's energies."""
    torch.manual_seed(0)
    front = frontend(ModelConfig(frontend=kind))
    for level in (1e-3, 0.9):
        waveform = level * torch.randn(2, 16000).clamp(-1, 1)
        exact = front.float()(waveform, torch.tensor([16000, 9000]))
        found = front.to(dtype)(waveform.to(dtype), torch.tensor([16000, 9000]))
        assert found.dtype == dtype
        assert (found.float() - exact).norm() < 0.05 * exact.norm()


def test_strided_costs_a_quarter_of_msae():
    """Counted; seconds in tests/benchmarks/bench_msae.py."""
    counted = {}
    for kind in ("msae", "strided"):
        with FlopCounterMode(display=False) as counter:
            frontend(ModelConfig(frontend=kind))(torch.randn(1, 16000), torch.tensor([16000])).sum().backward()
        counted[kind] = counter.get_total_flops()
    assert 0 < counted["strided"] <= 0.25 * counted["msae"]


def step(task: torch.nn.Module, clips: int = 3) -> None:
    losses = task(batch(clips))
    losses.total.backward()
    assert torch.isfinite(losses.total)
    assert [name for name, p in task.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("words", [f"model.frontend={kind}" for kind in OTHERS] + ["model.wav_depth=2"])
@pytest.mark.parametrize("method", [*PRETRAIN, *FINETUNE])
def test_every_method_steps_and_uses_all_its_weights(method, words):
    section, kind = ("pretrain", PretrainRecipe) if method in PRETRAIN else ("finetune", FinetuneRecipe)
    recipe = load_recipe(kind, [], [*MICRO, f"{section}.method={method}", *words.split()])
    step(PretrainTask(recipe, 128, 64) if method in PRETRAIN else FinetuneTask(recipe, 128, 64, 5, single_label=True))


@torch.no_grad()
@pytest.mark.parametrize("fusion_layer", [1, 0])
def test_a_stream_that_leaves_early_went_through_the_first_blocks_alone(fusion_layer):
    """By hand: its own blocks, bottlenecks shared as long as both are there, and only carried on afterwards."""
    torch.manual_seed(0)
    encoder = Encoder(12, 4, 3, bottlenecks=3, fusion_layer=fusion_layer, recompute=False, early=2).double()
    streams = [torch.randn(2, 7, 12, dtype=torch.float64) for _ in range(2)]
    spec, wav = streams
    shared = encoder.bottlenecks.tokens.expand(2, -1, -1)
    for layer, block in enumerate(encoder.blocks):
        if layer < fusion_layer:
            spec, wav = block(spec), block(wav)
        elif layer < 2:
            ahead, behind = (block(torch.cat([x, shared], dim=1)) for x in (spec, wav))
            spec, wav, shared = ahead[:, :7], behind[:, :7], (ahead[:, 7:] + behind[:, 7:]) / 2
        else:
            whole = block(torch.cat([spec, shared], dim=1))
            spec, shared = whole[:, :7], whole[:, 7:]
    torch.testing.assert_close(encoder(streams, leaving=1), [encoder.norm(spec), encoder.norm(wav)])
    every = torch.ones(4, 2, 2, 2, dtype=torch.float64)
    torch.testing.assert_close(encoder(streams, every, 1), encoder(streams, leaving=1))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["model.wav_depth=5"], "model.size = micro has 4 blocks"),
        (["model.wav_depth=1"], "leaves before block 1, the first that fuses"),
        (["model.frontend=sinc", "model.channels=[40]"], "sum to 40"),
    ],
)
def test_settings_that_do_not_fit_are_named(words, said):
    with pytest.raises(UserError, match=said):
        FinetuneTask(load_recipe(FinetuneRecipe, [], [*MICRO, *words]), 128, 64, 5, single_label=True)


def test_weights_of_another_front_end_are_refused_and_others_loaded(tmp_path):
    words = [*MICRO, "model.frontend=strided", "model.wav_depth=2"]
    task = PretrainTask(load_recipe(PretrainRecipe, [], words), 128, 64)
    save_file(task.state_dict(), tmp_path / "strided.safetensors")
    for other in ("msae", "sinc"):
        wanted = load_recipe(FinetuneRecipe, [], [*MICRO, f"model.frontend={other}"])
        with pytest.raises(UserError, match=rf"model\.frontend = strided, not {other}"):
            load_weights(FinetuneTask(wanted, 128, 64, 5, False), tmp_path / "strided.safetensors")
    ast = load_recipe(FinetuneRecipe, [], [*MICRO, "finetune.method=ast"])  # reads no waveform
    assert "model.strided.first" in load_weights(
        FinetuneTask(ast, 128, 64, 5, False), tmp_path / "strided.safetensors").dropped  # fmt: skip
    wast = load_recipe(FinetuneRecipe, [], [*words, "finetune.method=wast"])
    report = load_weights(FinetuneTask(wast, 128, 64, 5, False), tmp_path / "strided.safetensors")
    assert {name for name in report.loaded if "strided" in name} == {f"model.strided.{n}" for n in (
        "first", "second", "third", "norm_weight", "bias", "second_bias", "third_bias")}  # fmt: skip
    assert {name.split(".")[3] for name in report.loaded if ".blocks." in name} == {"0", "1"}
    assert any(name.startswith("model.encoder.blocks.3.") for name in report.dropped)


def test_the_plan_counts_front_ends_and_depths():
    def flops(*words: str) -> float:
        return model_flops(load_recipe(PretrainRecipe, [], ["model.size=tiny", *words]), Shape())

    whole = flops()
    spectrogram = flops("pretrain.method=ssast")
    assert flops("model.frontend=strided") < whole < flops("model.frontend=sinc") * 1.1
    blocks = 6 * 12 * 12 * 192**2 * 514 + 12 * 12 * 514**2 * 192
    assert whole - flops("model.wav_depth=3") == pytest.approx(0.75 * blocks, rel=0.02)
    assert flops("model.wav_depth=3", "model.frontend=strided") > spectrogram
