"""The fused finest scale of MSAE against the four operations it stands for, in value and gradient."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from pipeline.model import pooled_conv as module
from pipeline.model.embed import MultiScaleEmbedding
from pipeline.model.pooled_conv import pooled_conv

EPS = 1e-6


def plain(waveform, weight, gain, shift, stride, hop, lengths=None):
    x = F.conv1d(waveform[:, None], weight[:, None], stride=stride, padding=weight.shape[1] // 2)
    if lengths is None:
        return F.avg_pool1d(F.relu(F.group_norm(x, 1, gain, shift, EPS)), hop // stride)
    rows = []
    for clip, length in zip(x, lengths, strict=True):
        audio = clip[:, : max(1, -(-length // stride))]
        z = (clip - audio.mean()) / (audio.var(correction=0) + EPS).sqrt()
        rows.append(z * gain[:, None] + shift[:, None])
    return F.avg_pool1d(F.relu(torch.stack(rows)), hop // stride)


@pytest.mark.parametrize(("kernel", "stride"), [(11, 1), (3, 1), (51, 5), (101, 10)])
@pytest.mark.parametrize("block", [1, 5, 64])  # a block of one frame; one that does not divide T; all frames
@pytest.mark.parametrize("lengths", [None, [12 * 160, 777, 0]])
def test_it_is_the_plain_chain(monkeypatch, kernel, stride, block, lengths):
    monkeypatch.setattr(module, "CPU_BLOCK_FRAMES", block)
    torch.manual_seed(0)
    waveform = 0.5 + torch.randn(3, 12 * 160, dtype=torch.float64)  # with an offset: the mean is not zero
    weights = [torch.randn(7, kernel, dtype=torch.float64), 1 + torch.rand(7, dtype=torch.float64),
               torch.randn(7, dtype=torch.float64)]  # fmt: skip
    weights = [weight.requires_grad_() for weight in weights]
    upstream = torch.randn(3, 7, 12, dtype=torch.float64)
    expected = plain(waveform, *weights, stride, 160, lengths)
    length = None if lengths is None else torch.tensor(lengths)
    found = pooled_conv(waveform, *weights, length, stride=stride, hop=160, eps=EPS)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
    gradients = zip(torch.autograd.grad(found, weights, upstream), torch.autograd.grad(expected, weights, upstream),
                    strict=True)  # fmt: skip
    for ours, theirs in gradients:
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_a_silent_clip_is_finite_and_does_not_touch_its_neighbour():
    msae = MultiScaleEmbedding((11, 51, 101), (1, 5, 10), (43, 43, 42), "unpadded", "relu")
    loud = torch.randn(1, 1600)
    alone = msae(loud)
    both = msae(torch.cat([torch.zeros(1, 1600), loud]))
    torch.testing.assert_close(both[1:], alone)
    both.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in msae.parameters())


def test_half_precision_weights_keep_float32_statistics():
    torch.manual_seed(0)
    waveform = torch.randn(2, 16000)
    weights = [torch.randn(43, 11) / 3, torch.ones(43), torch.zeros(43)]
    exact = pooled_conv(waveform, *weights, stride=1, hop=160, eps=EPS)
    half = [weight.bfloat16() for weight in weights]
    found = pooled_conv(waveform.bfloat16(), *half, stride=1, hop=160, eps=EPS)
    assert found.dtype == torch.bfloat16
    naive = plain(waveform.bfloat16(), *half, 1, 160)
    assert (found.float() - exact).norm() <= 1.5 * (naive.float() - exact).norm()


def test_autocast_keeps_float32_statistics():
    """Of filters that leave a low tone out, whose products with themselves are a hundred times what is left of it."""
    torch.manual_seed(0)
    waveform = 0.5 * torch.sin(2 * torch.pi * 60 * torch.arange(8000) / 16000) + 0.01 * torch.randn(2, 8000)
    kernels = torch.randn(43, 11)
    weights = [(kernels - kernels.mean(dim=1, keepdim=True)).requires_grad_(), torch.ones(43), torch.zeros(43)]
    exact = pooled_conv(waveform, *weights, stride=1, hop=160, eps=EPS)
    with torch.autocast("cpu", torch.bfloat16):
        found = pooled_conv(waveform, *weights, stride=1, hop=160, eps=EPS)
    assert torch.equal(found, exact)
    assert torch.equal(*(torch.autograd.grad(out.square().sum(), weights[0])[0] for out in (found, exact)))
