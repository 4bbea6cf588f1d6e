"""Convolution -> GroupNorm -> ReLU -> average pool over a waveform, without its activations in memory.

In: a waveform [B, L], one scale's weights. Out: its pooled map [B, C, T].

The finest scale of MSAE has C x L values a clip before the pool: 27 MB in float32 at 10 s, written and
read again by every operation of the chain, forward and backward. Here blocks of frames stay in the
cache, and nothing but the waveform is kept for backward:

- The normalisation's statistics need no activations. A convolution is linear, so with u_p the k samples
  under position p, S = sum u_p and R = sum u_p u_p^T, the sums of z = W u_p over positions are W S and
  diag(W R W^T): a k x k matrix a clip. They are taken over the n positions of a clip's audio, without its padding.
- With them the normalisation is an affine map, folded into the weights: one matmul a block gives what
  the ReLU takes.
- Backward computes a block again, and needs only A = sum dy_p u_p^T of it: the gradient through the
  statistics is linear in A, S and R.

Against the four operations one after the other: tests/benchmarks/bench_msae.py.
"""

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812

from pipeline.flow import without_autocast

CPU_BLOCK_FRAMES = 32  # activations of a block stay in a core's cache
GPU_BLOCK_BYTES = 1 << 26


class _PooledConv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        waveform: torch.Tensor,
        weight: torch.Tensor,
        gain: torch.Tensor,
        shift: torch.Tensor,
        length: torch.Tensor | None,
        stride: int,
        hop: int,
        eps: float,
    ) -> torch.Tensor:
        windows = _Windows(waveform, weight.shape[1], stride, hop, len(weight))
        wide = torch.promote_types(weight.dtype, torch.float32)
        moments = torch.zeros(len(waveform), weight.shape[1] + 1, weight.shape[1] + 1, dtype=wide, device=weight.device)
        real = real_positions(waveform, length, stride, windows.positions)
        for clips, frames, u in windows.blocks(wide):
            position = torch.arange(frames.start * windows.pool, frames.stop * windows.pool, device=weight.device)
            heard = u * (position < real[clips, None])[:, None]
            moments[clips] += heard @ heard.mT
        count = len(weight) * real.to(wide)  # (B,)
        w = weight.to(wide)
        mean = (moments[:, -1:, :-1] @ w.T).sum(dim=(1, 2)) / count
        square = ((w @ moments[:, :-1, :-1]) * w).sum(dim=(1, 2)) / count
        rstd = (square - mean.square()).clamp(min=0.0).add(eps).rsqrt()
        folded = _fold(w, gain.to(wide), shift.to(wide), mean, rstd).to(weight.dtype)
        out = waveform.new_empty(len(waveform), len(weight), windows.frames, dtype=weight.dtype)
        for clips, frames, u in windows.blocks(weight.dtype):
            out[clips, :, frames] = (folded[clips] @ u).relu_().unflatten(-1, (-1, windows.pool)).mean(dim=-1)
        ctx.save_for_backward(waveform, weight, gain, shift, mean, rstd, moments, count)
        ctx.windows = windows
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of weight, gain and shift, summed over the clips.

        Of one clip, with y = g z_hat + b, z_hat = r (z - m), z = W u, and N = `count` values of z behind m and r:

            dy = dout / pool where y > 0, else 0
            A = sum dy u^T, t = sum dy                       over all positions: `cross`, `total`
            sum dy z_hat = r (sum over k of A * W - m t)     the gradient of g; that of b is t
            dW = r (g A - mean_dz S^T - mean_dz_z Z)         S and Z over the positions that m and r are taken of
            mean_dz = sum g t / N,  mean_dz_z = sum g (sum dy z_hat) / N,  Z = sum z_hat u^T = r (W R - m S^T)
        """
        waveform, weight, gain, shift, mean, rstd, moments, count = ctx.saved_tensors
        windows: _Windows = ctx.windows
        wide = moments.dtype
        w, g = weight.to(wide), gain.to(wide)
        folded = _fold(w, g, shift.to(wide), mean, rstd).to(weight.dtype)
        grad = grads[0] / windows.pool
        outer = torch.zeros(len(waveform), len(weight), weight.shape[1] + 1, dtype=wide, device=weight.device)
        for clips, frames, u in windows.blocks(weight.dtype):
            y = (folded[clips] @ u).unflatten(-1, (-1, windows.pool))
            dy = y.gt_(0).mul_(grad[clips, :, frames, None]).flatten(-2)  # `where` is not vectorised here
            outer[clips] += dy @ u.mT
        cross, total = outer[..., :-1], outer[..., -1]  # sum dy u^T: (B, C, k); sum dy: (B, C)
        aligned = rstd[:, None] * ((cross * w).sum(dim=-1) - mean[:, None] * total)  # sum dy z_hat: (B, C)
        mean_dz = ((total * g).sum(dim=-1) / count)[:, None, None]
        mean_dz_z = ((aligned * g).sum(dim=-1) / count)[:, None, None]
        sums = moments[:, -1:, :-1]
        normalised = rstd[:, None, None] * (w @ moments[:, :-1, :-1] - mean[:, None, None] * sums)  # sum z_hat u^T
        grad_weight = (rstd[:, None, None] * (g[:, None] * cross - mean_dz * sums - mean_dz_z * normalised)).sum(dim=0)
        return (
            None,
            grad_weight.to(weight.dtype),
            aligned.sum(dim=0).to(gain.dtype),
            total.sum(dim=0).to(shift.dtype),
            None,
            None,
            None,
            None,
        )


class _Windows:
    """The samples under each kernel position, block by block of frames, with a row of ones for biases."""

    def __init__(self, waveform: torch.Tensor, kernel: int, stride: int, hop: int, channels: int) -> None:
        self.frames = waveform.shape[1] // hop
        self.pool = hop // stride
        self.positions = self.frames * self.pool
        self.kernel, self.stride = kernel, stride
        self.padded = F.pad(waveform, (kernel // 2, kernel // 2))
        self.on_cpu = waveform.device.type == "cpu"
        clip_frame = self.pool * (channels + kernel) * waveform.element_size() * len(waveform)
        self.block = CPU_BLOCK_FRAMES if self.on_cpu else max(1, GPU_BLOCK_BYTES // clip_frame)

    def blocks(self, dtype: torch.dtype) -> Any:
        """Yields (clips, frames, [b, kernel + 1, positions]) of every block."""
        views = self.padded.unfold(1, self.kernel, self.stride)[:, : self.positions].mT  # (B, kernel, positions)
        for clips in [slice(i, i + 1) for i in range(len(views))] if self.on_cpu else [slice(None)]:
            for start in range(0, self.frames, self.block):
                stop = min(start + self.block, self.frames)
                view = views[clips, :, start * self.pool : stop * self.pool]
                u = torch.ones(len(view), self.kernel + 1, view.shape[2], dtype=dtype, device=view.device)
                u[:, :-1] = view
                yield clips, slice(start, stop), u


def _fold(
    weight: torch.Tensor, gain: torch.Tensor, shift: torch.Tensor, mean: torch.Tensor, rstd: torch.Tensor
) -> torch.Tensor:
    """[B, C, kernel + 1]: convolution, normalisation and bias of each clip as one matrix."""
    scale = rstd[:, None] * gain
    return torch.cat([scale[..., None] * weight, (shift - mean[:, None] * scale)[..., None]], dim=-1)


def real_positions(
    waveform: torch.Tensor, length: torch.Tensor | None, stride: int, positions: int
) -> torch.Tensor:
    """How many of a clip's kernel positions lie on its audio: int64 [B], at least 1.

    Args:
        waveform: [B, L].
        length: int64 [B], samples before the padding; None: there is none.
        stride: Samples between positions.
        positions: Of the whole waveform.
    """
    if length is None:
        return torch.full((len(waveform),), positions, device=waveform.device)
    return length.add(stride - 1).div(stride, rounding_mode="floor").clamp(1, positions)


def pooled_conv(
    waveform: torch.Tensor,
    weight: torch.Tensor,
    gain: torch.Tensor,
    shift: torch.Tensor,
    length: torch.Tensor | None = None,
    *,
    stride: int,
    hop: int,
    eps: float,
) -> torch.Tensor:
    """avg_pool1d(relu(group_norm(conv1d(waveform), 1 group)), hop / stride), with gradients of the weights.

    Args:
        waveform: [B, T * hop]; gets no gradient.
        weight: [C, k], k odd; the convolution pads with k // 2 zeros.
        gain: [C], the normalisation's weight.
        shift: [C], the normalisation's bias.
        length: int64 [B], samples of audio before the zero padding, which the normalisation's statistics leave out;
            None: no padding.
        stride: Of the convolution; divides `hop`.
        hop: Samples of a frame.
        eps: Of the normalisation.

    Returns:
        [B, C, T] in the weights' type, also under autocast; statistics and gradient sums are float32 at least.
    """
    # The variance is a difference of moments: of a band-pass filter under low sounds it would be their rounding.
    with without_autocast(waveform):
        out: torch.Tensor = _PooledConv.apply(waveform, weight, gain, shift, length, stride, hop, eps)
    return out
