"""What `import pipeline as craft` gives: a model that hears, shards of a folder, the task of a recipe.

In: paths, or samples. Out: labels, tensors, shards. What is wrong is a `UserError` whose text is the line that the
commands print. The doctests start with generated shards `shards` and the finetuned run `run`; their model is `micro`,
96 wide, with 4 blocks, and their clips last half a second.
"""

import os
import warnings
import weakref
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from pipeline.config import FinetuneRecipe, PretrainRecipe
from pipeline.data.loader import Loader
from pipeline.data.spec import DataSpec
from pipeline.errors import UserError
from pipeline.files import config_path, user_path
from pipeline.hub import model_of
from pipeline.model.weights import weights_file
from pipeline.probing.frozen import RANDOM, Frozen, Pool, open_frozen, settings_of
from pipeline.recipes import load_recipe, read_yaml
from pipeline.runs import finetuned_task, initialise
from pipeline.serving.embed import Embedder
from pipeline.serving.listen import Heard, Hears, listen, new_decoder, whole
from pipeline.serving.scorer import BATCH, Scorer, resample, windows
from pipeline.tasks import FinetuneTask, PretrainTask, task_of
from shard_tools.build import Summary
from shard_tools.build_shards import carry_out, parsed
from shard_tools.guard import DecoderProcess

Audio = str | os.PathLike[str] | np.ndarray | torch.Tensor
Option = str | int | float | bool | os.PathLike[str] | None
POOLS = ("mean", "time_frequency", "cls")
KINDS: dict[str, type[PretrainRecipe | FinetuneRecipe]] = {"pretrain": PretrainRecipe, "finetune": FinetuneRecipe}


class Model:
    """Weights that hear recordings; `load` makes it.

    Audio is the path of a file of any codec, rate and length, or samples in [-1, 1]: [n] or [n, channels] at
    `sample_rate` Hz (None: the model's own). What is longer than a clip is heard in windows of a clip's length, one
    behind the other, the last of which ends with the recording; what is shorter is zero-padded.

    A file is decoded in a process of its own, which the model keeps. For very many files take the commands `predict`
    and `embed`, which decode beside the computation.

    Args:
        frozen: The encoder, on its device.
        scorer: The same weights with their classifier; None: they have none.

    Attributes:
        frozen: As given; `frozen(batch, layers)` is the tokens of a `Batch` of a `Loader`.
        spec: Sample rate, clip length, normalisation and labels.
    """

    def __init__(self, frozen: Frozen, scorer: Scorer | None) -> None:
        self.frozen, self._scorer = frozen, scorer
        self.spec: DataSpec = frozen.spec

    @property
    def labels(self) -> list[str]:
        """Names of the C classes; none without a classifier."""
        return self._scorer.labels if self._scorer else []

    def predict(self, audio: Audio, top: int = 5, sample_rate: float | None = None) -> list[tuple[str, float]]:
        """The best `top` labels with their probabilities, the mean over the windows, the highest first.

        >>> labels = craft.load(run).predict("dog.wav", top=2)
        >>> [(type(name).__name__, 0 <= probability <= 1) for name, probability in labels]
        [('str', True), ('str', True)]

        Raises:
            UserError: the weights are no finetuned run's, or the audio cannot be heard.
        """
        if self._scorer is None:
            raise UserError(
                f"{self.frozen.source or 'these weights'}: has no classifier; load a run of finetune.py to predict"
            )
        if top < 1:
            raise UserError(f"top = {top} is not positive; give 1 or more")
        heard = self._hear(self._scorer, audio, sample_rate)
        return [(label.name, score) for label, score in whole(heard, self.spec.labels, top)]

    def embed(
        self, audio: Audio, layer: int | str = "last", pool: Pool = "mean", sample_rate: float | None = None
    ) -> torch.Tensor:
        """One vector of the whole recording: the mean over its windows, the streams one after the other.

        >>> model = craft.load(run)
        >>> model.embed("dog.wav").shape  # spectrogram and waveform, 96 each
        torch.Size([192])
        >>> model.embed("dog.wav", layer="all").shape
        torch.Size([4, 192])

        Args:
            audio: See the class.
            layer: A block, from 1, or "last": float32 [D]. "all" or "1,2": float32 [layers, D].
            pool: "mean" of the patches, "time_frequency" (frequency patches side by side), or "cls".
            sample_rate: Of samples.

        Raises:
            UserError: there is no such layer or pooling, or the audio cannot be heard.
        """
        if pool not in POOLS:
            raise UserError(f"pool = {pool!r}: there is no such pooling; give {', '.join(POOLS)}")
        heard = self._hear(self._embedder(layer, pool, self.frozen.streams), audio, sample_rate)
        return _chosen(torch.from_numpy(heard.embeddings.mean(axis=0)[:, 0]), layer, 0)

    def spectrogram_tokens(
        self, audio: Audio, layer: int | str = "last", sample_rate: float | None = None
    ) -> torch.Tensor:
        """Patch tokens of the spectrogram: float32 [n, f, t, D] of n windows, or [n, layers, f, t, D] as in `embed`.

        >>> craft.load(run).spectrogram_tokens("dog.wav").shape  # 8 patches of frequency, 4 of time
        torch.Size([1, 8, 4, 96])

        Raises:
            UserError: as `embed`, or the weights read no spectrogram.
        """
        return self._tokens("spec", audio, layer, sample_rate)

    def waveform_tokens(
        self, audio: Audio, layer: int | str = "last", sample_rate: float | None = None
    ) -> torch.Tensor:
        """Patch tokens of the waveform's map: float32 [n, f, t, D] of n windows, or [n, layers, f, t, D].

        >>> craft.load(run).waveform_tokens("dog.wav", layer=2).shape
        torch.Size([1, 8, 4, 96])

        Raises:
            UserError: as `embed`, or the weights read no waveform.
        """
        return self._tokens("wav", audio, layer, sample_rate)

    def _tokens(self, stream: str, audio: Audio, layer: int | str, sample_rate: float | None) -> torch.Tensor:
        heard = self._hear(self._embedder(layer, "tokens", [stream]), audio, sample_rate)
        tokens = torch.from_numpy(heard.embeddings[:, :, 0])  # [n, layers, N, D]
        rows = self.frozen.grids[stream][0]
        return _chosen(torch.unflatten(tokens, 2, (rows, tokens.shape[2] // rows)), layer, 1)

    def _embedder(self, layer: int | str, pool: Pool, streams: Sequence[str]) -> Embedder:
        return Embedder(self.frozen, self.frozen.layers(str(layer)), pool, streams, over_time=True)

    def _hear(self, hears: Hears, audio: Audio, sample_rate: float | None) -> Heard:
        size, rate = self.spec.samples, self.spec.sample_rate
        if isinstance(audio, (str, os.PathLike)):
            name = os.fspath(audio)
            (heard,) = listen(hears, [(name, str(user_path(audio, "audio")))], size / rate, self._decoder)
            if not len(heard.starts):
                raise UserError(f"{name}: {heard.error}")
            if heard.error:
                warnings.warn(f"{name}: {heard.error}", stacklevel=3)
            return heard
        if isinstance(audio, torch.Tensor):  # NumPy has no bfloat16
            audio = (audio.float() if audio.is_floating_point() else audio).detach().cpu().numpy()
        waveform = resample(audio, rate if sample_rate is None else sample_rate, rate)
        cut = [window for part, _, _ in windows([waveform], size, size) for window in part]
        heards = [hears.hear([one for _, one in cut[i : i + BATCH]]) for i in range(0, len(cut), BATCH)]
        scores, embeddings = (np.concatenate(parts) for parts in zip(*heards, strict=True))
        starts = np.array([start / rate for start, _ in cut])
        return Heard("samples", "", len(waveform) / rate, starts, scores, embeddings)

    @cached_property
    def _decoder(self) -> DecoderProcess:
        decoder = new_decoder(self.spec)
        weakref.finalize(self, decoder.close)
        return decoder


def load(source: str | os.PathLike[str], device: torch.device | str | None = None, average: bool = True) -> Model:
    """Opens weights: a run or checkpoint of pretrain.py or finetune.py, an export, or weights of others.

    Those of `hf://OWNER/NAME` are fetched from the Hugging Face hub, without the code that lies beside them.

    >>> craft.load(run).labels[:2]
    ['chord', 'falling sweep']

    Args:
        source: Directory or file; see `pipeline.probing.frozen`. `random:SIZE` is an untrained network.
        device: Of the computation; None: a GPU where there is one.
        average: The averaged weights where a checkpoint holds some.

    Raises:
        UserError: nothing there, or damaged.
    """
    name = os.fspath(source)
    name = name if name.startswith(RANDOM) else str(model_of("source")(name))
    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if not name.startswith(RANDOM) and (made := settings_of(Path(name), file := weights_file(name, average))):
        recipe, spec, run = made
        if isinstance(recipe, FinetuneRecipe):
            tuned = finetuned_task(recipe, spec, file, str(run or file)).to(chosen)
            return Model(Frozen(tuned.model, spec, run), Scorer(tuned, spec))
    return Model(open_frozen(name, average=average).to(chosen), None)


def build_shards(
    root: str | os.PathLike[str], out: str | os.PathLike[str], *, workers: int = 1, **options: Option
) -> Summary:
    """What the command `build` does with a data set: a folder of audio, or any of the forms that it knows.

    >>> craft.build_shards("audio", "some", seconds=0.5, dataset="unlabelled").manifest.splits["train"].clips
    4

    Args:
        root: Directory or URL.
        out: Directory or URL of the shards; what an earlier call finished there is kept.
        workers: Processes; 1: this one. More of them import the caller's script anew, as multiprocessing does, so a
            script must call this below `if __name__ == "__main__":`.
        options: Of the command, with _ for -: seconds=5, split="eval", dataset="folder", mel_bins=128, overwrite=True.

    Returns:
        `manifest`: splits, labels and formats; `failures`: reasons, and how many clips each cost.

    Raises:
        UserError: an option that is none, inputs that are not as it says, or a place that cannot be written.
    """
    words = [f"--root={os.fspath(root)}", f"--out={os.fspath(out)}", f"--workers={workers}"]
    words += ["--distributor=inline"] if workers == 1 and "distributor" not in options else []
    for name, value in options.items():
        option = f"--{name.replace('_', '-')}"
        if value is True:
            words.append(option)
        elif value is not None and value is not False:
            words.append(f"{option}={os.fspath(value) if isinstance(value, os.PathLike) else value}")
    summary, _ = carry_out(*parsed(words))
    if summary is None:
        raise UserError("dry_run, slice: build no whole set of shards; use the command craft build")
    return summary


def task(config: str | os.PathLike[str], loader: Loader, *settings: str) -> PretrainTask | FinetuneTask:
    """The network, heads and losses of a recipe, as a module for any training loop: `task(batch).total.backward()`.

    Its forward takes a `Batch` of the loader and returns `Losses`: `total` to call backward on, and `named`, detached
    scalars. Weights are drawn by torch's generator, or are those of the setting model.init. A method with a teacher
    (craft_latent) needs `craft.update_teacher(task, decay)` after each optimiser step.

    >>> loader = craft.Loader(shards, batch_size=8)
    >>> losses = craft.task("pretrain/craft_mae", loader, "model.size=micro")(next(iter(loader)))
    >>> losses.total.shape, sorted(losses.named)[:2]
    (torch.Size([]), ['contrast', 'contrast_accuracy'])

    Args:
        config: "pretrain" or "finetune", their defaults; a file of configs/, such as "pretrain/craft_mae"; or a path:
            a finetuning's where the file has a section `finetune` or lies in a folder of that name.
        loader: Of the clips. Their format and classes are what the task is made for; the recipe's sections `data`,
            `augment`, `train` and `optim` are those of pretrain.py and finetune.py, and not used here.
        settings: key=value, as of pretrain.py.

    Raises:
        UserError: no such file or setting, or settings that contradict each other or the clips.
    """
    name = os.fspath(config)
    files = [] if name in KINDS else [config_path(name, "config")]
    content = [read_yaml(file, "give a file of configs/, such as pretrain/craft_mae") for file in files]
    tunes = name == "finetune" or any(isinstance(part, dict) and "finetune" in part for part in content)
    tunes = tunes or any(file.resolve().parent.name == "finetune" for file in files)
    recipe = load_recipe(KINDS["finetune" if tunes else "pretrain"], files, settings)
    made = task_of(recipe, loader)
    if recipe.model.init:
        initialise(made, recipe, loader.spec)
    return made


def _chosen(found: torch.Tensor, layer: int | str, axis: int) -> torch.Tensor:
    """Without the axis of the layers, where one was named and not a list of them."""
    several = layer == "all" or "," in str(layer)
    return found if several else found.squeeze(axis)
