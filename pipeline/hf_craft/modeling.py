"""The network as `transformers` models, for `AutoModel` and `AutoModelForAudioClassification`.

In: what `CraftFeatureExtractor` makes of waveforms. Out: patch tokens, or logits. Parameters have the names of a run's
weights, and the arithmetic is the run's.
"""

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling, SequenceClassifierOutput

from pipeline.flow import Encoded
from pipeline.hf_craft.configuration import CraftConfig
from pipeline.model.craft import Craft, Streams
from pipeline.model.heads import Classifier, FullLinear, stream_means


class CraftPreTrainedModel(PreTrainedModel):
    """What both models share: the network under the name `model`."""

    config_class = CraftConfig
    base_model_prefix = "craft"  # of no module: both models name their weights alike
    main_input_name = "input_values"

    def __init__(self, config: CraftConfig) -> None:
        super().__init__(config)
        settings: Any = SimpleNamespace(**config.network)
        self.model = Craft(settings, Streams(**config.streams))

    def encode(
        self, input_values: torch.Tensor | None, waveform: torch.Tensor | None, length: torch.Tensor | None
    ) -> Encoded:
        """Tokens of the streams.

        Raises:
            ValueError: an input that the network reads is not given.
        """
        streams = self.model.streams
        for name, read, given in (("input_values", streams.spec, input_values), ("waveform", streams.wav, waveform)):
            if read and given is None:
                raise ValueError(f"this network reads {name}; CraftFeatureExtractor makes it of waveforms")
        wav_map = self.model.waveform_map(waveform, length) if streams.wav and waveform is not None else None
        encoded: Encoded = self.model(input_values if streams.spec else None, wav_map)
        return encoded

    def _init_weights(self, module: torch.nn.Module) -> None:
        """Modules initialise themselves; a classifier of other classes than the weights' once more.

        What transformers hands over in place of a weight of another shape is memory as it was found.
        """
        if isinstance(module, FullLinear):
            module.reset_parameters()


class CraftModel(CraftPreTrainedModel):
    """The encoder alone."""

    _keys_to_ignore_on_load_unexpected = [r"classifier\."]  # noqa: RUF012 - as transformers declares it

    def __init__(self, config: CraftConfig) -> None:
        super().__init__(config)
        self.post_init()

    def forward(
        self,
        input_values: torch.Tensor | None = None,
        waveform: torch.Tensor | None = None,
        length: torch.Tensor | None = None,
        return_dict: bool | None = None,
        **_: Any,
    ) -> BaseModelOutputWithPooling | tuple[torch.Tensor, ...]:
        """Encodes clips.

        Args:
            input_values: [B, T, M], the normalised fbank.
            waveform: [B, L], at 16 kHz, zero-padded.
            length: int64 [B], samples before the padding.
            return_dict: False: a tuple.

        Returns:
            `last_hidden_state` [B, N, D], the patch tokens, the spectrogram's before the waveform's (of a network that
            pools its class tokens, these); `pooler_output` [B, streams x D], the mean token of each stream.
        """
        encoded = self.encode(input_values, waveform, length)
        tokens = torch.cat([*encoded.spec, *encoded.wav], dim=1)
        embedding = torch.cat(stream_means(encoded), dim=1)
        if return_dict is False:
            return tokens, embedding
        return BaseModelOutputWithPooling(last_hidden_state=tokens, pooler_output=embedding)


class CraftForAudioClassification(CraftPreTrainedModel):
    """The encoder with the run's classifier."""

    def __init__(self, config: CraftConfig) -> None:
        super().__init__(config)
        about = config.classifier
        if about is None:
            raise ValueError("these weights have no classifier; load them with AutoModel, or finetune them with CRAFT")
        self.classifier = Classifier(self.model.width, int(config.num_labels or 0), tuple(about["rows"]), about["mode"])
        self.post_init()

    def forward(
        self,
        input_values: torch.Tensor | None = None,
        waveform: torch.Tensor | None = None,
        length: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        return_dict: bool | None = None,
        **_: Any,
    ) -> SequenceClassifierOutput | tuple[torch.Tensor, ...]:
        """Classifies clips.

        Args:
            input_values: See `CraftModel`.
            waveform: Likewise.
            length: Likewise.
            labels: int64 [B], or of several labels a clip float [B, C]; None: no loss.
            return_dict: False: a tuple.

        Returns:
            `logits` float32 [B, C]; `loss`, where there are labels.
        """
        logits = self.classifier(self.encode(input_values, waveform, length))
        loss = None
        if labels is not None and self.config.problem_type == "multi_label_classification":
            loss = F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))
        elif labels is not None:
            loss = F.cross_entropy(logits, labels)
        if return_dict is False:
            return (logits,) if loss is None else (loss, logits)
        return SequenceClassifierOutput(loss=loss, logits=logits)
