"""Any weights as a frozen encoder: the tokens of each block, pooled.

In: a run of pretrain.py or finetune.py, its checkpoint or export; weights of others (`pipeline.model.foreign`); either
of the Hugging Face hub, hf://OWNER/NAME; `random:SIZE` or `random:RUN`, the same network untrained. Out: `Frozen`,
whose forward gives pooled features.

Nothing is masked and nothing is trained. Layer l is the output of block l, from 1; the last one is taken behind the
encoder's LayerNorm, as heads see it. A stream that leaves the encoder early (`model.wav_depth`) stays behind that block
what it was. Positions are fitted to the length of the clips as in finetuning; weights of a run with `data.seconds` hear
each clip at the length that it had there.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from pipeline.command_line import numbers_of
from pipeline.config import FinetuneRecipe, ModelConfig, PretrainRecipe
from pipeline.data.fbank import padded_frames
from pipeline.data.spec import SAMPLE_RATE, DataSpec
from pipeline.engine.evaluation import check_same_weights
from pipeline.errors import UserError
from pipeline.flow import Batch
from pipeline.hub import local_model
from pipeline.methods import FINETUNE, PRETRAIN
from pipeline.model.craft import SIZES, Craft, Streams
from pipeline.model.embed import patch_grid
from pipeline.model.encoder import recorded
from pipeline.model.foreign import MEL_BINS, hf_config, translate
from pipeline.model.heads import row_means
from pipeline.model.precision import in_precision
from pipeline.model.weights import load_weights, read_weights, weights_file
from pipeline.recipes import read_run, recipe_of
from pipeline.runs import trained_on
from pipeline.tracking import run_of

Pool = Literal["time_frequency", "mean", "cls", "tokens"]
RANDOM = "random:"
AUDIOSET = (-4.2677393, 4.5689974)  # mean and deviation of fbanks, of every published SSAST and AST model
SECONDS = 10.0  # of a clip, where weights do not come with a length


class Frozen(nn.Module):
    """An encoder whose weights stay as they are.

    Args:
        model: The network, weights loaded.
        spec: Format and normalisation of its input.
        source: Directory of the run that it comes from; None: none of ours.

    Attributes:
        streams: "spec", "wav" or both, in this order.
        grids: Patches of each along frequency and time, of the longest input.
        depth: Blocks.
        digest: sha256 of weights, architecture, normalisation and precision: features of equal digests are equal.
    """

    def __init__(self, model: Craft, spec: DataSpec, source: Path | None) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.spec, self.source = spec, source
        every = {"spec": (model.streams.spec, model.grid), "wav": (model.streams.wav, model.wav_grid)}
        self.grids = {name: grid for name, (used, grid) in every.items() if used}
        self.streams = list(self.grids)
        self.depth = len(model.encoder.blocks)
        about = [model.config.model_dump(mode="json"), asdict(model.streams), spec.mean, spec.std]
        about += [spec.seconds] if spec.seconds else []
        whole = hashlib.sha256(json.dumps(about).encode())
        for name, tensor in sorted(model.state_dict().items()):
            whole.update(name.encode() + tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes())
        self.digest = whole.hexdigest()

    def at(self, precision: str) -> "Frozen":
        """The encoder itself, which from now on computes in a precision; its digest says so.

        Args:
            precision: See `pipeline.model.precision`.
        """
        in_precision(self.model, precision)
        if precision != "fp32":
            self.digest = hashlib.sha256(f"{self.digest} {precision}".encode()).hexdigest()
        return self

    def size(self, pool: Pool, stream: str) -> tuple[int, ...]:
        """Shape of a clip's features of one layer and stream."""
        rows, columns = self.grids[stream]
        width = self.model.width
        return (rows * columns, width) if pool == "tokens" else (rows * width if pool == "time_frequency" else width,)

    def layers(self, text: str) -> list[int]:
        """Blocks of "all", "last" or "1,2".

        Raises:
            UserError: no such list, or more blocks than there are.
        """
        layers = [self.depth] if text == "last" else numbers_of("--layers", text) or list(range(1, self.depth + 1))
        if layers[-1] > self.depth:
            raise UserError(f"--layers {text}: the encoder has {self.depth} blocks")
        return layers

    def grids_of(self, batch: Batch) -> dict[str, tuple[int, int]]:
        """`grids` of the clips of a batch."""
        return {name: grid for name, grid in self.model.grids(batch.frames).items() if name in self.grids}

    @torch.no_grad()
    def forward(self, batch: Batch, layers: Sequence[int]) -> dict[tuple[str, int], torch.Tensor]:
        """Tokens [B, 2 + N, D] of each (stream, layer): cls, dist (or cls alone), then the patches, frequency-major.

        Raises:
            ValueError: the batch lacks a representation.
        """
        model, found = self.model, {}
        if (model.streams.spec and batch.fbank is None) or (model.streams.wav and batch.waveform is None):
            raise ValueError("the batch lacks a representation that the encoder reads; see Loader")
        wav_map = None
        if model.streams.wav:
            wav_map = model.waveform_map(batch.waveform, batch.length, batch.frames)  # type: ignore[arg-type]
        fbank, grids = batch.fbank if model.streams.spec else None, self.grids_of(batch)
        modules = [model.encoder.last if layer == self.depth else model.encoder.blocks[layer - 1] for layer in layers]
        leaving = model.encoder.blocks[(model.config.wav_depth or self.depth) - 1]  # the waveform's last one
        *taken, left = recorded([*modules, leaving], len(batch), lambda: model(fbank, wav_map))
        for layer, apart in zip(layers, taken, strict=True):
            for stream, tokens in zip(self.streams, [*apart, *left[len(apart) :]], strict=True):
                rows, columns = grids[stream]
                kept = model.config.class_tokens + rows * columns  # behind them stand bottlenecks
                found[stream, layer] = tokens[:, :kept].float()
        return found


def pooled(tokens: torch.Tensor, pool: Pool, grid: tuple[int, int], over_time: bool = True) -> torch.Tensor:
    """Features of tokens [B, 2 + N, D], or [B, 1 + N, D] where there is no dist.

    "mean": of all patches, [B, D]. "cls": of cls and dist, [B, D]. "time_frequency": the frequency patches of each time
    column one after the other, then the mean over time, [B, f D] (Dasheng, M2D): what the mean over frequency throws
    away. "tokens": the patches, [B, N, D].

    Args:
        tokens: cls, dist, then the patches, frequency-major.
        pool: One of these.
        grid: f and t.
        over_time: False: without the mean over time, [B, t, D] or [B, t, f D].
    """
    special = tokens.shape[1] - grid[0] * grid[1]
    patches = tokens[:, special:]
    if pool == "tokens":
        return patches
    if pool == "cls":
        return tokens[:, :special].mean(dim=1)
    if over_time:
        return row_means(patches, grid[0] if pool == "time_frequency" else 1)
    columns = torch.unflatten(patches, 1, grid).transpose(1, 2)  # [B, t, f, D]
    return columns.flatten(2) if pool == "time_frequency" else columns.mean(dim=2)


def open_frozen(
    name: str, data: DataSpec | None = None, grid: tuple[int, int] | None = None, seed: int = 0, average: bool = True
) -> Frozen:
    """Opens weights, on the CPU.

    Args:
        name: See the module.
        data: Format of the clips, and the normalisation where the weights do not come with one; None: their own format,
            10 s of 128 mel bins where they have none.
        grid: Patches of weights of others along frequency and time, where nothing says them.
        seed: Of random weights.
        average: The averaged weights where a checkpoint holds some.

    Raises:
        UserError: nothing there, damaged, or made for another sample rate or number of mel bins.
    """
    fallback = data or DataSpec(
        sample_rate=SAMPLE_RATE, samples=int(SECONDS * SAMPLE_RATE), mel_bins=MEL_BINS, frames=padded_frames(SECONDS),
        mean=AUDIOSET[0], std=AUDIOSET[1], labels=[], single_label=False, digest="",
    )  # fmt: skip
    if name.startswith(RANDOM):
        word = name.removeprefix(RANDOM)
        if word in SIZES:
            config, streams = ModelConfig.model_validate({"size": word}), Streams(spec=True, wav=True)
            return Frozen(_build(config, streams, fallback, seed), fallback, None)
        ours = settings_of(Path(word), Path(word) / "weights")
        if ours is None:
            raise UserError(f"{name}: neither one of the sizes {', '.join(SIZES)} nor a run directory")
        recipe, made, _ = ours
        spec = _spec_for(made, data, word)
        return Frozen(_build(recipe.model, _streams(recipe), spec, seed), spec, None)
    try:
        return _of_weights(local_model(name), fallback, data, grid, seed, average)
    except UserError as error:  # the words of a recipe's settings, which have other names here
        raise UserError(str(error).replace("model.init: ", "").replace("model.init_grid", "--grid")) from error


def weights_of(names: Sequence[str], average: bool) -> list[str]:
    """What `open_frozen` shall open for each name: its file of weights, of all ranks the same one; a collective.

    Raises:
        UserError: nothing there, or a run in training that has a newer checkpoint by now for some ranks.
    """
    found = [name if name.startswith(RANDOM) else str(weights_file(local_model(name), average)) for name in names]
    check_same_weights(list(map(Path, found)))
    return found


def _of_weights(
    source: Path, fallback: DataSpec, data: DataSpec | None, grid: tuple[int, int] | None, seed: int, average: bool
) -> Frozen:
    file = weights_file(source, average)
    if ours := settings_of(source, file):
        recipe, made, origin = ours
        spec, config, streams = _spec_for(made, data, str(source)), recipe.model, _streams(recipe)
    else:
        config, streams, origin = _foreign(file, grid), Streams(spec=True, wav=False), None
        mean, std = trained_on(source, file)[2] or AUDIOSET
        if fallback.mel_bins != MEL_BINS:
            raise UserError(f"{source}: was made for {MEL_BINS} mel bins, the shards have {fallback.mel_bins}")
        spec = fallback.model_copy(update={"mean": mean, "std": std})
        frames = hf_config(file).get("max_length")
        if data is None and isinstance(frames, int):
            spec = spec.model_copy(update={"samples": round(frames / 102.4 * SAMPLE_RATE), "frames": frames})
    model = _build(config, streams, spec, seed)
    report = load_weights(nn.ModuleDict({"model": model}), file, grid=grid)
    if report.fresh:
        raise UserError(f"{file}: lacks {report.fresh[0]}; a frozen encoder needs all of its weights")
    return Frozen(model, spec, origin)


def _build(config: ModelConfig, streams: Streams, spec: DataSpec, seed: int) -> Craft:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fitted = {"mel_bins": spec.mel_bins, "frames": spec.frames}
        return Craft(config, Streams(**asdict(streams) | fitted))


def settings_of(source: Path, file: Path) -> tuple[PretrainRecipe | FinetuneRecipe, DataSpec, Path | None] | None:
    """Settings, data and directory of a run or its checkpoint; of an export without the directory; None: of no run."""
    for home in (source, file.parent, run_of(str(file.parent))):
        if (home / "config.yaml").is_file():
            run = run_of(str(home))
            spec = DataSpec.load(home if (home / "data.json").is_file() else run)
            return read_run(home), spec, None if (home / "config.json").is_file() else run  # an export belongs to none
    if file.suffix != ".safetensors" or not file.is_file():
        return None
    try:
        with safe_open(file, "pt") as opened:
            metadata: dict[str, Any] = opened.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file}: {error}; give a whole .safetensors file") from error
    if not {"config", "data"} <= metadata.keys():
        return None
    try:
        content = json.loads(metadata["config"])
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: its settings are damaged ({error}); export the run again") from error
    return recipe_of(content, file), DataSpec.parse(metadata["data"], file), None


def _streams(recipe: PretrainRecipe | FinetuneRecipe) -> Streams:
    if isinstance(recipe, PretrainRecipe):
        method = PRETRAIN[recipe.pretrain.method]
        return Streams(spec=method.spec, wav=method.wav)
    row, config = FINETUNE[recipe.finetune.method], recipe.finetune
    bottlenecks = config.bottlenecks if row.fusion else 0
    return Streams(spec=row.spec, wav=row.wav, bottlenecks=bottlenecks, fusion_layer=config.fusion_layer)


def _spec_for(made: DataSpec, data: DataSpec | None, name: str) -> DataSpec:
    """Format of the clips with the normalisation of the run, and of clips of its length with its frames."""
    if data is None:
        return made
    if (data.sample_rate, data.mel_bins) != (made.sample_rate, made.mel_bins):
        raise UserError(
            f"{name}: was trained on {made.sample_rate} Hz and {made.mel_bins} mel bins, the shards have "
            f"{data.sample_rate} and {data.mel_bins}; rebuild the shards with that format"
        )
    whole = data.samples / data.sample_rate
    seconds = tuple(length for length in made.seconds if length < whole)
    own = data.samples == made.samples and data.frames == padded_frames(whole)  # clips of its length: its data.frames
    frames = made.frames if own else data.frames
    return data.model_copy(update={"mean": made.mean, "std": made.std, "seconds": seconds, "frames": frames})


def _foreign(file: Path, grid: tuple[int, int] | None) -> ModelConfig:
    """Size, patch, stride, class tokens and kind of blocks of weights of others, by their names and shapes.

    Raises:
        UserError: of no size that we have.
    """
    tensors, origin = translate(read_weights(file), file, grid)
    if origin == "M2D":
        raise UserError(f"{file}: M2D reads other features than Kaldi's fbank; finetune it, where it learns these")
    if origin == "CRAFT":
        raise UserError(f"{file}: nothing says its settings; give the run directory, or an export of export.py")
    kernel, positions = tensors["model.spec_patch.proj.weight"], tensors["model.spec_tokens.positions"]
    depth = len({name.split(".")[3] for name in tensors if name.startswith("model.encoder.blocks.")})
    sizes = [name for name, size in SIZES.items() if (size.width, size.depth) == (len(kernel), depth)]
    if not sizes:
        raise UserError(f"{file}: {depth} blocks of width {len(kernel)}; known are {', '.join(SIZES)}")
    patch = kernel.shape[-1]
    # Of strides that cut equally many rows the largest one: 16, not 15, of the 8 rows over 128 bins.
    strides = [s for s in range(1, patch + 1) if patch_grid(MEL_BINS, MEL_BINS, patch, s)[0] == positions.shape[0]]
    if not strides:
        raise UserError(f"{file}: no stride cuts {MEL_BINS} mel bins into {positions.shape[0]} rows of {patch}")
    return ModelConfig.model_validate({
        "size": sizes[0], "patch": patch, "stride": strides[-1],
        "class_tokens": len(tensors["model.special.tokens"]),
        "block": "pre" if "model.encoder.norm.weight" in tensors else "post",
        "input_norms": "model.spec_patch.norm.weight" in tensors,
    })  # fmt: skip
