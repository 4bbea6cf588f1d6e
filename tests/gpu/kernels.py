"""Every computation on the device against the same one on the CPU.

In: generated numbers and the shards. Out: how many elements have other bits where arithmetic is exact, else how far the
results are apart; and what each backend of attention costs.

Draws, masks and the conversion of stored numbers are integers, or float operations that IEEE 754 rounds alike on every
device. Sums, logarithms and powers are not: limits say how much they may differ.
"""

import copy
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch.nn.attention import SDPBackend, sdpa_kernel

from pipeline.config import AugmentConfig, DataConfig, FinetuneRecipe, PretrainRecipe
from pipeline.data.fbank import EPSILON, PREEMPHASIS, fbank, mel_matrix
from pipeline.data.loader import Loader
from pipeline.flow import Batch, Losses, full
from pipeline.model.masking import cluster_masks, kept_patches, split_patches, ssast_masks
from pipeline.model.pooled_conv import pooled_conv
from pipeline.objectives.classification import positive_weights
from pipeline.objectives.contrastive import nt_xent_loss, swacl_loss, token_loss
from pipeline.objectives.latent import latent_targets
from pipeline.objectives.masked_patch import masked_patch_loss, normalise_patches
from pipeline.recipes import load_recipe
from pipeline.rng import uniform
from pipeline.tasks import FinetuneTask, PretrainTask
from tests.distributed.gradients import METHODS
from tests.gpu.compare import differing, largest, relative, tf32, together
from tests.gpu.environment import median_seconds
from tests.gpu.report import Check

MELS, CLASSES = 128, 5
GRIDS = {"stride 16": (8, 64), "stride 10": (12, 101)}
SIDES = (3, 4, 5)
FBANK_LIMIT = 1e-3
ENCODER_LIMIT = 1e-4
TYPES = (torch.float32, torch.bfloat16, torch.float16)
# Of outputs and of gradients: activations are rounded, so that near zero the ReLU may take them for the other sign.
# Of the outputs, and of the gradients: rounding moves values across the ReLU. On an H200 4e-5, 3e-2 and 1.2e-2.
POOLED_LIMITS = {torch.float32: (1e-5, 1e-4), torch.bfloat16: (1e-2, 5e-2), torch.float16: (2e-3, 2e-2)}
ATTENTION_LIMITS = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
BACKENDS = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH)
# Tokens: cls and dist with all patches at stride 16; two streams' patches; all patches at stride 10; visible ones.
LENGTHS = (514, 1026, 1214, 205)


def run(check: Check) -> None:
    torch.manual_seed(0)
    with tf32(False):
        for part in (draws, masks, batches, fbanks, pooled, objectives, encoders, attention):
            begun = time.monotonic()
            check.attempt(part.__name__, part)
            print(f"{part.__name__}: {time.monotonic() - begun:.1f} s", flush=True)


def draws(check: Check) -> None:
    near = torch.arange(180)
    wrong = total = 0
    for purpose, position, count in (("mask.spec", near, 1025), ("noise.waveform", near[:16], 16000),
                                     ("far", torch.tensor([0, 2**40, 2**62]), 70000)):  # fmt: skip
        expected = uniform(7, purpose, position, count)
        wrong += differing(uniform(7, purpose, position.to(check.device), count), expected)
        total += expected.numel()
    check.test("draws", wrong == 0, f"{wrong} of {total} differ", "0")


def masks(check: Check) -> None:
    position = torch.arange(8 if check.small else 180) * 977 + 2**33
    for title, grid in GRIDS.items():
        count = round(grid[0] * grid[1] * 400 / 512)
        kinds: dict[str, Callable[[torch.Tensor], Sequence[torch.Tensor]]] = {
            "cluster": lambda at, g=grid, k=count: [cluster_masks(3, "mask.spec", at, g, k, SIDES)],
            "ssast": lambda at, g=grid, k=count: [ssast_masks(3, "mask.spec", at, g, k, SIDES)],
            "kept": lambda at, g=grid: [kept_patches(3, at, g, 0.4, 0.4)],
        }  # fmt: skip
        for kind in ("random", "cluster", "time", "frequency"):
            kinds[f"split_{kind}"] = lambda at, g=grid, k=kind: split_patches(3, "drop.spec", at, g, k, 0.6, SIDES)
        for kind, draw in kinds.items():
            check.attempt(f"masks.{kind}", _mask, f"masks.{kind}.{title.replace(' ', '_')}", draw, position)


def _mask(check: Check, name: str, draw: Callable[[torch.Tensor], Sequence[torch.Tensor]],
          position: torch.Tensor) -> None:  # fmt: skip
    expected, found = draw(position), draw(position.to(check.device))
    wrong = sum(differing(one, other) for one, other in zip(found, expected, strict=True))
    check.test(name, wrong == 0, f"{wrong} of {sum(one.numel() for one in expected)} indices differ", "0")


def batches(check: Check) -> None:
    """Stored numbers that the device converts, and what it does to them, against what readers convert for a CPU."""
    forms = {
        "plain": (AugmentConfig(), True),
        "masked": (AugmentConfig(freq_mask=24, time_mask=32, noise=0.1), True),
        "mixed": (AugmentConfig(mixup=0.5, roll=0.1), False),
        "noisy": (AugmentConfig(noise_snr=(10.0, 30.0)), False),
        "online": (AugmentConfig(mixup=0.5), True),
    }
    for form, (augment, with_fbank) in forms.items():
        check.attempt(f"batches.{form}", _batches, form, augment, with_fbank)


def _batches(check: Check, form: str, augment: AugmentConfig, with_fbank: bool) -> None:
    data = DataConfig(shards=str(check.shards), workers=0)
    options = {"augment": augment, "fbank": with_fbank, "batch_size": 16, "seed": 3}
    wrong: dict[str, int] = {}
    apart: dict[str, float] = {}
    with (Loader(data, device=check.device, raw=True, **options) as device,
          Loader(data, device="cpu", raw=False, **options) as host):  # fmt: skip
        for found, expected in zip(device.batches(0, 3), host.batches(0, 3), strict=True):
            for name in ("position", "row", "valid", "waveform", "fbank", "targets", "length"):
                one, other = getattr(found, name), getattr(expected, name)
                if other is None:
                    continue
                if form == "noisy" and name == "waveform":  # a sum of squares, a power of ten
                    apart[name] = max(apart.get(name, 0.0), relative(one, other))
                elif form == "online" and name == "fbank":  # a Fourier transform and a logarithm
                    apart[name] = max(apart.get(name, 0.0), largest(one, other) * 2 * host.spec.std)
                else:
                    wrong[name] = wrong.get(name, 0) + differing(one, other)
    check.test(f"batches.{form}", not any(wrong.values()), f"elements that differ: {wrong}", "0")
    if "waveform" in apart:
        check.below("batches.noisy.waveform", apart["waveform"], 3e-6)
    if "fbank" in apart:
        check.below("batches.online.fbank", apart["fbank"], 1e-2)  # of single values; `fbanks` says how far


def fbanks(check: Check) -> None:
    """Also where the user allows TF32; and a clip's fbank beside one, and beside more than a block of others."""
    samples = 16000 if check.small else 160000
    generator = torch.Generator().manual_seed(1)
    noise = torch.rand(70, samples, generator=generator) * 2 - 1
    with Loader(DataConfig(shards=str(check.shards), workers=0), batch_size=16, fbank=False) as loader:
        clips = next(iter(loader.batches())).waveform
    assert clips is not None
    kinds = {"shards": clips.clone(), "noise": noise, "quiet": noise[:4] * 1e-3, "silence": torch.zeros(2, samples)}
    known = {name: (fbank(wave), _exact_fbank(wave)) for name, wave in kinds.items()}
    for on in (False, True):
        title = f"tf32_{'on' if on else 'off'}"
        with tf32(on):
            apart, good = [], True
            for name, wave in kinds.items():
                found, (host, exact) = fbank(wave.to(check.device)), known[name]
                own, usual = largest(found, exact), largest(host, exact)
                good = good and own <= max(FBANK_LIMIT, 3 * usual)
                apart.append(f"{name} {own:.2g} (CPU {usual:.2g}, apart {largest(found, host):.2g})")
            frames = noise[:2, : samples // 512 * 512].unflatten(-1, (-1, 512))
            spectra = [torch.view_as_real(torch.fft.rfft(one)) for one in (frames.to(check.device), frames)]
            check.below(f"fft.{title}", relative(*spectra), 1e-6)
        check.test(f"fbank.{title}", good, "from float64: " + ", ".join(apart),
                   f"<= {FBANK_LIMIT:g} or 3 x the CPU's")  # fmt: skip
    many, one = fbank(noise.to(check.device)), fbank(noise[:1].to(check.device))
    check.below("fbank.neighbours", largest(many[:1], one), 1e-5)


def _exact_fbank(waveform: torch.Tensor) -> torch.Tensor:
    """float64 throughout: a transform in float32 is up to some 1e-3 off where a band is silent beside a loud tone."""
    x = waveform.double()
    frames = (x - x.mean(dim=-1, keepdim=True)).unfold(-1, 400, 160)
    frames = frames - frames.mean(dim=-1, keepdim=True)
    emphasised = frames - PREEMPHASIS * torch.cat([frames[..., :1], frames[..., :-1]], dim=-1)
    power = torch.fft.rfft(emphasised * torch.hann_window(400, periodic=False, dtype=torch.float64), n=512).abs() ** 2
    return (power @ mel_matrix(MELS, 512, 16000).double()).clamp(min=EPSILON).log()


def pooled(check: Check) -> None:
    """Each scale of MSAE in three types, against float64 of the same rounded inputs."""
    clips, frames = (2, 20) if check.small else (4, 1000)
    for kernel, stride, channels in ((11, 1, 43), (51, 5, 43), (101, 10, 42)):
        generator = torch.Generator().manual_seed(kernel)
        inputs = [0.3 * torch.randn(clips, frames * 160, generator=generator),
                  torch.randn(channels, kernel, generator=generator) / kernel**0.5,
                  1 + 0.2 * torch.rand(channels, generator=generator),
                  0.2 * torch.randn(channels, generator=generator),
                  torch.randn(clips, channels, frames, generator=generator)]  # fmt: skip
        length = torch.full((clips,), frames * 160)
        length[0] = frames * 100
        inputs[0][0, frames * 100 :] = 0.0
        for kind in TYPES:
            rounded = [tensor.to(kind) for tensor in inputs]
            expected = _pooled([tensor.double() for tensor in rounded], length, stride)
            found = _pooled([tensor.to(check.device) for tensor in rounded], length.to(check.device), stride)
            plain = _pooled([tensor.to(check.device) for tensor in rounded], length.to(check.device), stride, _plain)
            apart, usual = ({name: relative(one[name], expected[name]) for name in expected} for one in (found, plain))
            least = POOLED_LIMITS[kind]
            limits = {name: max(least[name != "out"], 1.5 * usual[name]) for name in expected}
            values = ", ".join(f"{name} {apart[name]:.2g} (plain {usual[name]:.2g})" for name in expected)
            name = f"pooled_conv.k{kernel}.{str(kind).removeprefix('torch.')}"
            check.test(name, all(apart[one] <= limits[one] for one in limits), values,
                       f"<= {least[0]:g}, gradients {least[1]:g}, or 1.5 x plain")  # fmt: skip


def _pooled(inputs: list[torch.Tensor], length: torch.Tensor, stride: int,
            chain: Callable[..., torch.Tensor] = pooled_conv) -> dict[str, torch.Tensor]:  # fmt: skip
    waveform, *weights, upstream = inputs
    weights = [weight.detach().clone().requires_grad_() for weight in weights]
    out = chain(waveform, *weights, length, stride=stride, hop=160, eps=1e-6)
    gradients = torch.autograd.grad(out, weights, upstream)
    return {"out": out, **dict(zip(("weight", "gain", "shift"), gradients, strict=True))}


def _plain(waveform: torch.Tensor, weight: torch.Tensor, gain: torch.Tensor, shift: torch.Tensor, length: torch.Tensor,
           *, stride: int, hop: int, eps: float) -> torch.Tensor:  # fmt: skip
    """The operations that `pooled_conv` stands for, one after the other, with statistics in float32."""
    x = F.conv1d(waveform[:, None], weight[:, None], stride=stride, padding=weight.shape[1] // 2)
    wide = full(x)
    real = ((length + stride - 1) // stride)[:, None, None]
    heard, count = torch.arange(x.shape[2], device=x.device) < real, real * len(weight)
    mean = (wide * heard).sum(dim=(1, 2), keepdim=True) / count
    variance = ((wide - mean).square() * heard).sum(dim=(1, 2), keepdim=True) / count
    z = ((wide - mean) * (variance + eps).rsqrt()).to(x.dtype)
    return F.avg_pool1d(F.relu(z * gain[:, None] + shift[:, None]), hop // stride)


def objectives(check: Check) -> None:
    """Values and gradients of the losses alone."""
    generator = torch.Generator().manual_seed(2)
    rows, clips, width = (24, 2, 32) if check.small else (512, 8, 384)
    patches = 40 if check.small else 400
    vectors = [torch.randn(rows, width, generator=generator) for _ in range(2)]
    tokens = [torch.randn(clips, patches, width, generator=generator) for _ in range(2)]
    maps = [0.1 * torch.randn(clips, patches, 256, generator=generator) for _ in range(3)]
    cases: dict[str, tuple[Callable[..., torch.Tensor], list[torch.Tensor]]] = {
        "swacl": (lambda a, b: swacl_loss(a, b, temperature=0.07, symmetric=True)[0], vectors),
        "swacl_raw": (lambda a, b: swacl_loss(a / 8, b / 8, temperature=None, symmetric=False)[0], vectors),
        "nt_xent": (lambda a, b: nt_xent_loss(a, b, temperature=0.1)[0], vectors),
        "token": (lambda a, b: token_loss(a, b, temperature=0.07, symmetric=True)[0], tokens),
        "masked_patch": (lambda a, b, c: _masked(a, b, 10 * c, "paper"), maps),
        "masked_patch_ssast": (lambda a, b, c: _masked(a, b, 10 * c, "ssast"), maps),
        "latent": (_latent, [*tokens, tokens[0].roll(1, 0)]),
    }
    for name, (loss, inputs) in cases.items():
        check.attempt(f"objectives.{name}", _objective, name, loss, inputs)


def _masked(predicted: torch.Tensor, rebuilt: torch.Tensor, target: torch.Tensor, softmax: str) -> torch.Tensor:
    loss = masked_patch_loss(predicted, rebuilt, normalise_patches(target), softmax)
    return loss.nce + 10 * loss.mse


def _latent(first: torch.Tensor, second: torch.Tensor, predicted: torch.Tensor) -> torch.Tensor:
    """Targets out of two blocks of two streams, and the error of a prediction of them."""
    with torch.no_grad():
        targets = latent_targets({"spec": [first, second], "wav": [second, first * 2]})
    loss = F.mse_loss(predicted, targets.patches["spec"]) + F.mse_loss(predicted, targets.patches["wav"])
    return loss + F.mse_loss(predicted.mean(dim=1), targets.clip) + sum(targets.variance.values())


def _objective(check: Check, name: str, loss: Callable[..., torch.Tensor], inputs: list[torch.Tensor]) -> None:
    results = []
    for device in (check.device, torch.device("cpu")):
        given = [tensor.to(device).detach().clone().requires_grad_() for tensor in inputs]
        value = loss(*given)
        value.backward()
        results.append((value.detach()[None], together(one.grad for one in given if one.grad is not None)))
    apart = [relative(found, expected) for found, expected in zip(*results, strict=True)]
    check.test(f"objectives.{name}", all(value <= ENCODER_LIMIT for value in apart),
               f"loss {apart[0]:.2g}, gradients {apart[1]:.2g}", f"<= {ENCODER_LIMIT:g}")  # fmt: skip


class Stepped(NamedTuple):
    """Losses by name, and gradients by parameter."""

    losses: dict[str, float]
    gradients: dict[str, torch.Tensor]


def encoders(check: Check) -> None:
    """Whole forward and backward passes in float32 of every method, front end and kind of position."""
    clips, frames = (3, 96) if check.small else (4, 256)
    batch = _tones(clips, frames)
    # The rehearsal shows that the check works, for which one method of each kind does.
    chosen = ("pswacl+", "craft_latent", "audio_mosaic", "swab+") if check.small else tuple(METHODS)
    for method in chosen:
        check.attempt(f"encoder.{method}", _encoder, method, batch, frames)


def _encoder(check: Check, method: str, batch: Batch, frames: int) -> None:
    words = [*METHODS[method].split(), f"model.size={check.size}"]
    torch.manual_seed(0)
    task: PretrainTask | FinetuneTask
    if "finetune." in METHODS[method]:
        recipe = load_recipe(FinetuneRecipe, [], words)
        power = recipe.finetune.pos_weight
        weights = positive_weights(np.arange(1, CLASSES + 1), 24, power) if power else None
        task = FinetuneTask(recipe, MELS, frames, CLASSES, False, weights)
    else:
        task = PretrainTask(load_recipe(PretrainRecipe, [], words), MELS, frames)
    moved = copy.deepcopy(task).to(check.device)
    found, again = (_step(moved, _moved(batch, check.device)) for _ in range(2))
    expected = _step(task, batch)
    # A share of hits jumps where two numbers are nearly equal; what is explained is 1 - mse, which is there itself.
    losses = {name: abs(found.losses[name] - value) / abs(value) for name, value in expected.losses.items()
              if value and not name.endswith(("accuracy", "_explained"))}  # fmt: skip
    gradients = {name: relative(found.gradients[name], value) for name, value in expected.gradients.items()
                 if value.norm()}  # fmt: skip
    total = relative(together(found.gradients.values()), together(expected.gradients.values()))
    changed = differing(together(again.gradients.values()), together(found.gradients.values()))
    loss, worst = max(losses, key=losses.__getitem__), max(gradients, key=gradients.__getitem__)
    good = (all(value <= ENCODER_LIMIT for value in (*losses.values(), total))
            and found.gradients.keys() == expected.gradients.keys())  # fmt: skip
    values = (f"{loss} {losses[loss]:.2g}, gradients {total:.2g}, worst {worst} {gradients[worst]:.2g}; {changed} "
              "elements change in a second run")  # fmt: skip
    check.test(f"encoder.{method}", good, values, f"<= {ENCODER_LIMIT:g}")


def _step(task: PretrainTask | FinetuneTask, batch: Batch) -> Stepped:
    task.zero_grad(set_to_none=True)
    result = task(batch)
    assert isinstance(result, Losses)
    result.total.backward()
    return Stepped({name: float(value) for name, value in result.named.items()},
                   {name: p.grad.detach().cpu().clone() for name, p in task.named_parameters() if p.grad is not None})


def _tones(clips: int, frames: int) -> Batch:
    """Tones with a little noise: of noise alone a narrow kernel's gradient is a sum of terms that cancel.

    The second clip is half as long as the others.
    """
    generator = torch.Generator().manual_seed(7)
    seconds = torch.arange(frames * 160 - 300) / 16000
    pitch = 100 + 900 * torch.rand(clips, 1, generator=generator)
    waveform = 0.3 * torch.exp(-seconds) * torch.sin(2 * torch.pi * pitch * seconds)
    waveform += 0.01 * torch.randn(waveform.shape, generator=generator)
    length = torch.full((clips,), waveform.shape[1])
    length[1] //= 2
    waveform[1, length[1] :] = 0.0
    spectra = torch.randn(clips, frames, MELS, generator=generator)
    targets = (torch.rand(clips, CLASSES, generator=generator) < 0.5).float()
    position = torch.arange(clips)
    return Batch(position, position, torch.ones(clips, dtype=torch.bool), waveform, spectra, targets, length, frames)


def _moved(batch: Batch, device: torch.device) -> Batch:
    tensors = {name: getattr(batch, name) for name in Batch.__slots__}
    return Batch(**{name: one.to(device) if isinstance(one, torch.Tensor) else one for name, one in tensors.items()})


def attention(check: Check) -> None:
    """Which backends of scaled_dot_product_attention serve our shapes, what the default is, and what each costs."""
    for length in (LENGTHS[-1:] if check.small else LENGTHS):
        for kind in TYPES:
            name = f"attention.{length}.{str(kind).removeprefix('torch.')}"
            check.attempt(name, _attention, name, length, kind)


def _attention(check: Check, name: str, length: int, kind: torch.dtype) -> None:
    clips, heads = (1, 2) if check.small else (8, 12)
    generator = torch.Generator().manual_seed(length)
    # As `pipeline.model.encoder.Attention` makes them: views of one product, and backward runs through them.
    qkv = torch.randn(clips, length, 3 * heads * 64, generator=generator).to(check.device, kind)
    upstream = torch.randn(clips, heads, length, 64, generator=generator).to(check.device, kind)

    def call(given: torch.Tensor, back: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        given = given.detach().requires_grad_()
        out = F.scaled_dot_product_attention(*_heads(given, heads))
        return out.detach(), torch.autograd.grad(out, given, back)[0]

    with sdpa_kernel(SDPBackend.MATH):
        exact = call(qkv.double(), upstream.double())
    said = []
    for backend in BACKENDS:
        label = backend.name.partition("_")[0].lower()
        try:
            with sdpa_kernel(backend):
                errors = [relative(one, other) for one, other in zip(call(qkv, upstream), exact, strict=True)]
                seconds = median_seconds(lambda: call(qkv, upstream), check.device, rounds=1 if check.small else 10)
            said.append(f"{label} {1e3 * seconds:.3g} ms, errors {errors[0]:.1e} and {errors[1]:.1e}")
        except RuntimeError as error:  # it does not serve this type, or is not built in
            said.append(f"{label} none ({str(error).splitlines()[0][:60]})")
    check.info(name, "; ".join(said))
    chosen = SDPBackend(torch._fused_sdp_choice(*_heads(qkv.detach().requires_grad_(), heads)))
    errors = [relative(one, other) for one, other in zip(call(qkv, upstream), exact, strict=True)]
    seconds = median_seconds(lambda: call(qkv, upstream), check.device, rounds=1 if check.small else 10)
    values = f"{chosen.name}, {1e3 * seconds:.3g} ms, errors {errors[0]:.1e} and {errors[1]:.1e}"
    served = check.small or kind == torch.float32 or chosen != SDPBackend.MATH
    check.test(f"{name}.default", served and all(error <= ATTENTION_LIMITS[kind] for error in errors), values,
               f"<= {ATTENTION_LIMITS[kind]:g}" + ("" if kind == torch.float32 else ", not MATH"))  # fmt: skip


def _heads(qkv: torch.Tensor, heads: int) -> list[torch.Tensor]:
    return [part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in qkv.chunk(3, dim=-1)]
