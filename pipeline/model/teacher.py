"""The teacher of latent prediction: a second network whose weights are the exponential mean of the student's.

In: the inputs of a micro-batch. Out: what the last blocks make of all its patches, without gradient.

Each rank has the whole teacher, in float32, outside of what DeepSpeed wraps. It has no gradients or moments for ZeRO to
divide, so all that dividing it could save is 4 bytes a weight (base: .35 GB, large: 1.2); as parameters of the wrapped
module it would be rounded by bf16, whose steps a decay of .9998 never reaches, and be gathered anew in each forward at
ZeRO 3. The student's weights, which it follows, have the same bits on all ranks, and so has the teacher without any
exchange. `engine.step` updates it, `engine.checkpoint` keeps it.
"""

import copy

import torch

from pipeline.flow import full
from pipeline.model.craft import Craft
from pipeline.model.encoder import recorded


class Teacher:
    """A copy of a student, in evaluation mode; no module, so that no optimiser, engine or state of the student has it.

    Args:
        student: With its first weights, whole.
        blocks: So many of the last ones are heard; 0: all. Of a stream that leaves the encoder early, its own last.

    Attributes:
        model: What computes, in the student's precision.
        weights: float32 by name; those of `model` where that is float32 too.
    """

    def __init__(self, student: Craft, blocks: int) -> None:
        self.model = copy.deepcopy(student).eval().requires_grad_(False)
        self.blocks = blocks
        self.weights = {name: full(weight.detach()) for name, weight in self.model.named_parameters()}

    @torch.no_grad()
    def __call__(
        self,
        fbank: torch.Tensor | None,
        waveform: torch.Tensor | None,
        length: torch.Tensor | None,
        frames: int | None = None,
    ) -> dict[str, list[torch.Tensor]]:
        """Outputs of the blocks that are heard, of all patches: [B, N, D] each, of "spec", "wav" or both.

        Args:
            fbank: [B, T, M], normalised; None: no spectrogram stream.
            waveform: [B, L]; None: no waveform stream.
            length: int64 [B], samples of audio before the waveform's padding; None: L.
            frames: T; None: that of the longest input.
        """
        model = self.model
        given = {"spec": fbank, "wav": waveform}
        names = [name for name, one in given.items() if one is not None]
        clips = next(len(one) for one in given.values() if one is not None)
        wav_map = None if waveform is None else model.waveform_map(waveform, length, frames)
        heard: dict[str, list[torch.Tensor]] = {name: [] for name in names}
        for streams in recorded(list(model.encoder.blocks), clips, lambda: model(fbank, wav_map)):
            for name, tokens in zip(names, streams, strict=False):  # the waveform may have left
                heard[name].append(tokens[:, len(model.special.tokens) :])
        return {name: outputs[-self.blocks :] for name, outputs in heard.items()}

    def match(self, student: Craft, device: torch.device) -> None:
        """Moves to the device and the precision of the student; after the first call nothing."""
        if (self.model.dtype, next(self.model.parameters()).device) == (student.dtype, device):
            return
        wide = torch.promote_types(student.dtype, torch.float32)
        self.model.to(device=device, dtype=student.dtype)
        for name, weight in self.model.named_parameters():
            self.weights[name] = self.weights[name].to(device, wide)
            weight.data = self.weights[name].to(student.dtype)  # the same tensor where that is wide

    @torch.no_grad()
    def put(self, name: str) -> None:
        """Takes a changed tensor of `weights` over into `model`."""
        weight = self.model.get_parameter(name)
        if weight.dtype != self.weights[name].dtype:
            weight.copy_(self.weights[name])
