"""The settings of an exported network, for `transformers.AutoConfig`.

In: config.json. Out: `CraftConfig`.
"""

from typing import Any

from transformers import PretrainedConfig


class CraftConfig(PretrainedConfig):
    """What the network is made of, in the words of the run that it comes from.

    Args:
        network: The run's `model` settings.
        streams: What is read and how the streams meet: spec, wav, mel_bins, frames, bottlenecks, fusion_layer, pool.
        classifier: `rows` of each stream and `mode`; None: there is none.
        kwargs: As of `PretrainedConfig`: id2label, problem_type and others.
    """

    model_type = "craft"

    def __init__(
        self,
        network: dict[str, Any] | None = None,
        streams: dict[str, Any] | None = None,
        classifier: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.network, self.streams, self.classifier = network or {}, streams or {}, classifier
        super().__init__(**kwargs)
