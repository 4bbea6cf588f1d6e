"""Waveform -> log-mel filterbank (fbank), batched, on any device.

In: waveforms [B, L] in [-1, 1]. Out: fbanks float32 [B, frames, M], natural log.

Kaldi's fbank with SSAST's settings (paper 4.2; SSAST `dataloader.py`): 25 ms window, 10 ms hop,
hanning, pre-emphasis 0.97, DC removal in each frame, 512-point power spectrum, HTK mel scale from
20 Hz to Nyquist, no energy, no dither, edges snipped. 10 s give 998 frames.

The frames are taken in blocks of 500, on a CPU of one clip: the strided frames, their spectrum and power stay in the
cache, which halves the time of a clip against one pass over all frames. A GPU takes blocks of many clips, and the mel
product in float64: TF32, which a user may allow for float32 matmuls, has ten bits of mantissa, and the log of a
power that small errors meet would leave Kaldi's by 1e-3. A clip's result does not depend on its neighbours.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F  # noqa: N812 (the field's name for it)

FRAME_MS = 25.0
HOP_MS = 10.0
PREEMPHASIS = 0.97
LOW_HZ = 20.0
BLOCK_FRAMES = 500
BLOCK_CLIPS = 64  # on a GPU: 64 x 500 spectra are 66 MB
Constants = tuple[torch.Tensor, torch.Tensor]
EPSILON = torch.finfo(torch.float32).eps  # Kaldi's floor under the log: -15.942


def frame_count(samples: int, sample_rate: int) -> int:
    """Frames of a waveform of `samples` samples, edges snipped."""
    window, hop = int(sample_rate * FRAME_MS / 1000), int(sample_rate * HOP_MS / 1000)
    return 0 if samples < window else 1 + (samples - window) // hop


@dataclass(frozen=True)
class Blocks:
    """How the work is cut up.

    Attributes:
        clips: Of a block.
        mel: Type of the mel product.
    """

    clips: int
    mel: torch.dtype

    @staticmethod
    def on(device: torch.device) -> "Blocks":
        """As is best for a device."""
        return Blocks(1, torch.float32) if device.type == "cpu" else Blocks(BLOCK_CLIPS, torch.float64)


@lru_cache(maxsize=32)
def _constants(window: int, mel_bins: int, sample_rate: int, device: torch.device, mel: torch.dtype) -> Constants:
    """Taper float32 [window] and mel filters, once for each device: no copy behind a batch."""
    with torch.inference_mode(False):
        taper = torch.hann_window(window, periodic=False)
        return taper.to(device), mel_matrix(mel_bins, fft_length(window), sample_rate).to(device, mel)


def fft_length(window: int) -> int:
    """Points of the spectrum of a window of so many samples: the next power of two."""
    return 1 << (window - 1).bit_length()


def mel_matrix(mel_bins: int, fft_size: int, sample_rate: int) -> torch.Tensor:
    """Triangular mel filters float32 [fft_size // 2 + 1, mel_bins] (Kaldi, HTK mel scale).

    At 128 bins and 16 kHz bin 3 is empty: its output is the floor, -15.942, as in every
    published SSAST and AST checkpoint's input.
    """

    def mel(hz: torch.Tensor) -> torch.Tensor:
        return 1127.0 * torch.log1p(hz / 700.0)

    low, high = (float(mel(torch.tensor(f, dtype=torch.float64))) for f in (LOW_HZ, sample_rate / 2))
    step = (high - low) / (mel_bins + 1)
    left = low + step * torch.arange(mel_bins, dtype=torch.float64)
    bins = mel(torch.arange(fft_size // 2, dtype=torch.float64) * (sample_rate / fft_size))[:, None]
    up, down = (bins - left) / step, (left + 2 * step - bins) / step
    filters = torch.minimum(up, down).clamp(min=0.0)
    return F.pad(filters, (0, 0, 0, 1)).float()  # Kaldi leaves the Nyquist bin out


def fbank(
    waveform: torch.Tensor, sample_rate: int = 16000, mel_bins: int = 128, blocks: Blocks | None = None
) -> torch.Tensor:
    """Log-mel filterbank of a batch of waveforms.

    >>> craft.fbank(torch.zeros(2, 16000)).shape
    torch.Size([2, 98, 128])

    Args:
        waveform: [B, L] or [L], any float type; computed in float32 or better, also under autocast.
        sample_rate: Hz.
        mel_bins: M.
        blocks: How the work is cut up; None: as is best for the device.

    Returns:
        float32 [B, frames, M] or [frames, M]; within 1e-3 of `torchaudio.compliance.kaldi.fbank`.

    Raises:
        ValueError: the waveform is shorter than one 25 ms window.
    """
    if waveform.dim() == 1:
        return fbank(waveform[None], sample_rate, mel_bins, blocks)[0]
    window, hop = int(sample_rate * FRAME_MS / 1000), int(sample_rate * HOP_MS / 1000)
    if waveform.shape[-1] < window:
        raise ValueError(f"waveform of {waveform.shape[-1]} samples is shorter than a {window}-sample window")
    device = waveform.device
    blocks = blocks or Blocks.on(device)
    taper, filters = _constants(window, mel_bins, sample_rate, device, blocks.mel)
    with torch.autocast(device.type, enabled=False), torch.no_grad():
        x = waveform.float()
        x = x - x.mean(dim=-1, keepdim=True)
        frames = x.unfold(-1, window, hop)  # (B, frames, window), a view
        out = torch.empty(*frames.shape[:2], mel_bins, device=device)
        for clip in range(0, len(x), blocks.clips):
            for start in range(0, frames.shape[1], BLOCK_FRAMES):
                part = slice(clip, clip + blocks.clips), slice(start, start + BLOCK_FRAMES)
                out[part] = _log_mel(frames[part], taper, filters)
    return out


def _log_mel(frames: torch.Tensor, taper: torch.Tensor, filters: torch.Tensor) -> torch.Tensor:
    """Strided frames [b, n, window] -> [b, n, M]."""
    centred = frames - frames.mean(dim=-1, keepdim=True)
    previous = torch.cat([centred[..., :1], centred[..., :-1]], dim=-1)
    spectrum = torch.fft.rfft((centred - PREEMPHASIS * previous) * taper, n=fft_length(len(taper)))
    power = spectrum.real.square() + spectrum.imag.square()
    return torch.matmul(power.to(filters.dtype), filters).clamp(min=EPSILON).log()


def fbank_filters(sample_rate: int, mel_bins: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The linear parts of `fbank` as matrices, for graph formats whose runtimes have no FFT.

    DC removal, pre-emphasis, taper and Fourier transform of a frame are one linear map, folded in float64.

    Returns:
        Cosine and sine parts float32 [2 bins, 1, window], to be convolved with the waveform at the hop's stride: power
        is the sum of their squares; mel filters float32 [bins, M].
    """
    window, points = int(sample_rate * FRAME_MS / 1000), fft_length(int(sample_rate * FRAME_MS / 1000))
    one = torch.eye(window, dtype=torch.float64)
    centre = one - 1 / window
    emphasis = one - PREEMPHASIS * torch.cat([one[:1], one[:-1]])  # the first sample's predecessor is itself
    taper = torch.hann_window(window, periodic=False, dtype=torch.float64)
    frame = taper[:, None] * (emphasis @ centre)  # [window, window]: samples -> what is transformed
    bins = torch.arange(points // 2 + 1, dtype=torch.float64)[:, None]
    phase = 2 * math.pi * bins * torch.arange(window, dtype=torch.float64) / points
    spectrum = torch.cat([phase.cos() @ frame, phase.sin() @ frame])
    return spectrum.float()[:, None], mel_matrix(mel_bins, points, sample_rate)


def padded_frames(seconds: float) -> int:
    """T: frames after zero-padding, the next multiple of 16 of 102.4 frames a second.

    1024 for 10 s and 512 for 5 s, the lengths of SSAST's AudioSet and ESC-50 recipes.
    """
    return 16 * math.ceil(round(seconds * 102.4 / 16, 6))


def pad_frames(fbank: torch.Tensor, frames: int, value: float = 0.0) -> torch.Tensor:
    """Pads fbanks [B, t, M] with `value`, or cuts them, to [B, T, M]."""
    return F.pad(fbank, (0, 0, 0, frames - fbank.shape[1]), value=value)
