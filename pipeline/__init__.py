"""CRAFT: cross-representation pretraining and finetuning on audio waveforms and spectrograms."""

__version__ = "0.1.0"
