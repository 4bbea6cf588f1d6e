"""A run as files that other programs read.

In: a run directory of pretrain.py or finetune.py. Out: one safetensors file, or a Hugging Face directory.

- safetensors: every weight in float32, consolidated from any ZeRO stage; `config` and `data` (JSON) in its
  metadata. `model.init=FILE` reads it back.
- hf: the spectrogram side as `ASTModel`; as `ASTForAudioClassification` where the classifier stands on cls and dist
  of the spectrogram alone (finetune.method=ast, finetune.pool=cls), the only one that HF's class can express.
- onnx: one graph for any batch, from the model's inputs (`fbank` [B, T, M], normalised as in data.json,
  `waveform` [B, L] and `length` int64 [B], its samples before the zero padding; the ones that the method reads) to
  `logits` [B, C] of a finetuned run and `embedding` [B, streams x D], the mean token of each stream.
- onnx-waveform: the same from `waveform` [B, n], float samples in [-1, 1] at 16 kHz, and `length` int64 [B], of which
  so many are audio; longer clips are cut, shorter ones zero-padded. Besides: `probabilities` [B, C].

Each appears whole or not at all.
"""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from pipeline.config import FinetuneRecipe, PretrainRecipe
from pipeline.data.fbank import EPSILON, fbank_filters, pad_frames
from pipeline.data.spec import DataSpec
from pipeline.errors import UserError
from pipeline.files import check_output_file, check_replaced_directory, new_directory, new_file, write_json
from pipeline.model.craft import SIZES
from pipeline.model.encoder import LAYER_NORM_EPS
from pipeline.model.foreign import to_hf
from pipeline.model.heads import stream_means
from pipeline.model.weights import load_weights, weights_file
from pipeline.recipes import read_run
from pipeline.runs import load_finetuned
from pipeline.tasks import FinetuneTask, PretrainTask

EXPORTS = "export"  # directory in the run's
PREPROCESSOR = "preprocessor_config.json"
HF_FILES = frozenset({"config.json", "model.safetensors", PREPROCESSOR})
MADE_BY = "craft_audio"  # key of config.json in a directory that we may replace


@dataclass(frozen=True)
class Exported:
    """A run to be exported.

    Attributes:
        recipe: Its settings.
        spec: Its data.
        task: Its network, in evaluation mode on the CPU.
        run_dir: Its directory.
        file: Its weights.
    """

    recipe: PretrainRecipe | FinetuneRecipe
    spec: DataSpec
    task: PretrainTask | FinetuneTask
    run_dir: Path
    file: Path


def open_exported(run_dir: Path, average: bool = True) -> Exported:
    """Reads a run.

    Args:
        run_dir: Of pretrain.py or finetune.py.
        average: The averaged weights where there are some.

    Raises:
        UserError: no such run, or damaged files.
    """
    recipe = read_run(run_dir)
    file = weights_file(run_dir, average)
    if isinstance(recipe, FinetuneRecipe):
        task, spec = load_finetuned(run_dir, file, torch.device("cpu"))
        return Exported(recipe, spec, task, run_dir, file)
    spec = DataSpec.load(run_dir)
    pretrained = PretrainTask(recipe, spec.mel_bins, spec.frames)
    report = load_weights(pretrained, file)
    if report.fresh or report.dropped:
        raise UserError(f"{file}: not the weights of {run_dir}/config.yaml: {report}")
    return Exported(recipe, spec, pretrained.eval(), run_dir, file)


def check_place(run_dir: Path, out: Path, files: frozenset[str] | None) -> None:
    """Tries the place of an export before the work, and keeps it from what is not an export.

    Args:
        run_dir: The run that is read.
        out: The file or directory to be written.
        files: All that a directory of this format may hold; None: it is a file.

    Raises:
        UserError: it cannot be written, is a part of the run, or is a directory with something else in it.
    """
    place, run = out.resolve(), run_dir.resolve()
    inside = place.is_relative_to(run) and not place.is_relative_to(run / EXPORTS)
    if inside and (place.exists() or place.is_relative_to(run / "checkpoints")):
        raise UserError(f"--out {out}: is a part of the run; name a place outside, or in {run_dir / EXPORTS}")
    if files is None:
        check_output_file(out, "--out")
    else:
        check_replaced_directory(out, "--out", files, is_export)


def is_export(folder: Path) -> bool:
    """Whether one of our exports lies there, so that another may replace it."""
    try:
        return MADE_BY in json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False


def export_safetensors(run: Exported, out: Path) -> str:
    """Writes one file; returns what it holds, for people.

    Raises:
        UserError: it cannot be written.
    """
    tensors = {name: value.float().contiguous() for name, value in run.task.state_dict().items()}
    metadata = {"format": "pt", "config": run.recipe.model_dump_json(), "data": run.spec.model_dump_json()}
    with written(out), new_file(out) as file:
        save_file(tensors, file, metadata)
    return f"{len(tensors)} tensors, {sum(value.numel() for value in tensors.values())} weights"


def export_hf(run: Exported, out: Path) -> str:
    """Writes a directory of `HF_FILES`, in place of one that this made before; returns what they hold.

    The output agrees to 1e-5 with ours, for samples of a clip's length. HF has one LayerNorm epsilon; AST's heads have
    another one than its blocks, which moves logits by a few millionths. Its feature extractor pads short clips behind
    the logarithm with 0, where silence is -16, and fills the last frames from longer ones: only samples that are cut or
    zero-padded to a clip before are heard as the run hears them.

    Raises:
        UserError: the run has no spectrogram side, or `out` holds something else or cannot be written.
    """
    if not run.task.method.spec:
        raise UserError(f"--format hf: {run.task.method.label} has no spectrogram side; HF's AST reads nothing else")
    network = run.recipe.model
    if (network.block, network.class_tokens, network.input_norms) != ("pre", 2, False):
        raise UserError(
            "--format hf: HF's AST has model.block=pre, class_tokens=2 and input_norms=false; use --format hf-craft"
        )
    check_one_length(run, "hf")
    if network.positions == "rotary":
        raise UserError("--format hf: model.positions = rotary, and HF's AST has learned positions; use hf-craft")
    check_replaced_directory(out, "--out", HF_FILES, is_export)
    task, spec, model = run.task, run.spec, run.task.model
    head = isinstance(task, FinetuneTask) and not task.method.wav and model.streams.pool == "cls"
    size, patch = SIZES[model.config.size], model.config.patch
    config: dict[str, Any] = {
        "architectures": ["ASTForAudioClassification" if head else "ASTModel"],
        "model_type": "audio-spectrogram-transformer",
        "hidden_size": size.width, "num_hidden_layers": size.depth, "num_attention_heads": size.heads,
        "intermediate_size": 4 * size.width, "hidden_act": "gelu", "qkv_bias": True,
        "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "layer_norm_eps": LAYER_NORM_EPS,
        "patch_size": patch, "frequency_stride": model.config.stride, "time_stride": model.config.stride,
        "max_length": spec.frames, "num_mel_bins": spec.mel_bins, MADE_BY: True,
    }  # fmt: skip
    if head:
        config["id2label"] = {str(number): label.name for number, label in enumerate(spec.labels)}
        config["label2id"] = {label.name: number for number, label in enumerate(spec.labels)}
        config["problem_type"] = "single_label_classification" if task.loss == "ce" else "multi_label_classification"
    preprocessor = {
        "feature_extractor_type": "ASTFeatureExtractor", "feature_size": 1, "sampling_rate": spec.sample_rate,
        "num_mel_bins": spec.mel_bins, "max_length": spec.frames, "do_normalize": True, "mean": spec.mean,
        "std": spec.std, "padding_side": "right", "padding_value": 0.0, "return_attention_mask": False,
    }  # fmt: skip
    with written(out), new_directory(out) as made:
        save_file(to_hf(task.state_dict(), size.depth, head), made / "model.safetensors", {"format": "pt"})
        for name, content in (("config.json", config), (PREPROCESSOR, preprocessor)):
            write_json(made / name, content)
    left = [] if head or isinstance(task, PretrainTask) else ["classifier (HF pools cls and dist of one spectrogram)"]
    left += ["waveform side"] if task.method.wav else []
    left += ["pretraining heads"] if isinstance(task, PretrainTask) else []
    return (
        f"{config['architectures'][0]}{'; left out: ' + ', '.join(left) if left else ''}; cut or zero-pad recordings "
        f"to {spec.samples} samples before its feature extractor, which pads otherwise than training did"
    )


class _Graph(nn.Module):
    """A run's network as a function of its inputs alone."""

    def __init__(self, task: PretrainTask | FinetuneTask) -> None:
        super().__init__()
        self.task = task

    @property
    def inputs(self) -> list[str]:
        """Their names, in order."""
        method, unpadded = self.task.method, self.task.model.config.norm == "unpadded"
        read = {"fbank": method.spec, "waveform": method.wav, "length": method.wav and unpadded}
        return [name for name, used in read.items() if used]

    @property
    def outputs(self) -> list[str]:
        """Their names, in order."""
        return ["logits", "embedding"] if isinstance(self.task, FinetuneTask) else ["embedding"]

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The inputs -> the outputs, each [B, ...]."""
        given = dict(zip(self.inputs, inputs, strict=True))
        model = self.task.model
        wav_map = model.waveform_map(given["waveform"], given.get("length")) if "waveform" in given else None
        encoded = model(given.get("fbank"), wav_map)
        embedding = torch.cat(stream_means(encoded), dim=1)
        return (self.task.classifier(encoded), embedding) if isinstance(self.task, FinetuneTask) else (embedding,)


class _FromSamples(nn.Module):
    """A run's network as a function of samples at 16 kHz: what the shards do to a clip, its fbank, then `_Graph`."""

    def __init__(self, task: PretrainTask | FinetuneTask, spec: DataSpec) -> None:
        super().__init__()
        self.network, self.spec = _Graph(task), spec
        self.softmax = isinstance(task, FinetuneTask) and task.loss == "ce"
        self.inputs = ["waveform", "length"]
        self.outputs = ["probabilities"] * isinstance(task, FinetuneTask) + self.network.outputs
        spectrum, mel = fbank_filters(spec.sample_rate, spec.mel_bins)
        self.spectrum = nn.Parameter(spectrum, requires_grad=False)
        self.mel = nn.Parameter(mel, requires_grad=False)

    def forward(self, waveform: torch.Tensor, length: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Waveforms [B, n] in [-1, 1], of which int64 `length` [B] samples are audio -> the outputs, each [B, ...]."""
        spec = self.spec
        length = length.clamp(1, spec.samples)
        x = torch.cat([waveform, waveform.new_zeros(waveform.shape[0], spec.samples)], dim=1)[:, : spec.samples]
        inside = (torch.arange(spec.samples) < length[:, None]).to(x.dtype)
        x = (x - (x * inside).sum(dim=1, keepdim=True) / length[:, None]) * inside
        peak = x.abs().amax(dim=1, keepdim=True)  # `int16_levels`: louder than full scale is scaled down to it
        gain = torch.where(peak * 32768 > 32767, 32767 / 32768 / peak.clamp(min=1e-9), torch.ones_like(peak))
        x = torch.round(x * (gain * 32768)).clamp(-32767, 32767) / 32768
        given = {"waveform": x, "length": length}
        if "fbank" in self.network.inputs:
            parts = F.conv1d(x[:, None], self.spectrum, stride=spec.sample_rate // 100)
            parts = torch.unflatten(parts, 1, (2, -1))
            power = parts.square().sum(dim=1).transpose(1, 2)
            features = torch.matmul(power, self.mel).clamp(min=EPSILON).log()
            given["fbank"] = (pad_frames(features, spec.frames) - spec.mean) / (2 * spec.std)
        found: tuple[torch.Tensor, ...] = self.network(*(given[name] for name in self.network.inputs))
        if "probabilities" not in self.outputs:
            return found
        return (found[0].softmax(dim=1) if self.softmax else found[0].sigmoid(), *found)


def export_onnx(run: Exported, out: Path, waveform: bool = False) -> str:
    """Writes one file, weights included; returns its inputs and outputs, for people.

    `config` and `data` (JSON: normalisation, rate, labels) are in its metadata.

    Args:
        run: The run.
        out: The file.
        waveform: Its input are samples; the fbank is in the graph.

    Raises:
        UserError: the packages that write it are not installed, or it cannot be written.
    """
    try:
        import onnx
        import onnxscript  # noqa: F401 - torch's exporter needs it
    except ImportError as error:
        raise UserError(f"--format onnx needs {error.name}; pip install 'craft-audio[onnx]'") from error
    check_one_length(run, "onnx")
    spec = run.spec
    graph = (_FromSamples(run.task, spec) if waveform else _Graph(run.task)).eval()
    inputs = {
        "fbank": torch.zeros(2, spec.frames, spec.mel_bins),
        "waveform": torch.zeros(2, spec.samples),
        "length": torch.full((2,), spec.samples),
    }
    inputs |= {"waveform": torch.zeros(2, spec.samples // 2)} if waveform else {}
    examples = tuple(inputs[name] for name in graph.inputs)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns of packages that are not needed
    batch, samples = torch.export.Dim("batch"), torch.export.Dim("samples")
    shapes = tuple({0: batch} | ({1: samples} if waveform and name == "waveform" else {}) for name in graph.inputs)
    with torch.no_grad():  # raises where the graph would hold for one batch only; torch.onnx.export would not
        program = torch.export.export(graph, examples, dynamic_shapes=shapes if waveform else (shapes,))
    converted = torch.onnx.export(program, input_names=graph.inputs, output_names=graph.outputs, verbose=False)
    assert converted is not None  # without a file name it is returned
    model = converted.model_proto
    onnx.helper.set_model_props(model, {"config": run.recipe.model_dump_json(), "data": spec.model_dump_json()})
    onnx.checker.check_model(model)
    with written(out), new_file(out) as file:
        onnx.save(model, str(file))
    return f"{', '.join(graph.inputs)} -> {', '.join(graph.outputs)}, any batch"


def check_one_length(run: Exported, kind: str) -> None:
    """Refuses a format that cannot hold `data.seconds`.

    Raises:
        UserError: the run has inputs of several lengths.
    """
    if run.spec.seconds:
        raise UserError(
            f"--format {kind}: the run was trained with data.seconds = {list(run.spec.seconds)}, and this format has "
            "inputs of one length; use --format safetensors"
        )


@contextmanager
def written(out: Path) -> Iterator[None]:
    """Makes the directory of a place, and one line of an error while it is written."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(f"{out}: {getattr(error, 'strerror', None) or error}; nothing was written there") from error
