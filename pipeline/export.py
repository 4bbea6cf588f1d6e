"""A run as files that other programs read.

In: a run directory of pretrain.py or finetune.py. Out: one safetensors file, or a Hugging Face directory.

- safetensors: every weight in float32, consolidated from any ZeRO stage; `config` and `data` (JSON) in its
  metadata. `model.init=FILE` reads it back.
- hf: the spectrogram side as `ASTModel`; as `ASTForAudioClassification` where the classifier stands on cls and dist
  of the spectrogram alone (finetune.method=ast, finetune.pool=cls), the only one that HF's class can express.
- onnx: one graph for any batch, from the model's inputs (`fbank` [B, T, M], normalised as in data.json, and
  `waveform` [B, L], the ones that the method reads) to `logits` [B, C] of a finetuned run and `embedding` [B, streams x
  D], the mean token of each stream.
"""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from pipeline.config import FinetuneRecipe, PretrainRecipe
from pipeline.data.spec import DataSpec
from pipeline.errors import UserError
from pipeline.jobs import load_finetuned, run_config
from pipeline.model.craft import SIZES
from pipeline.model.encoder import LAYER_NORM_EPS
from pipeline.model.foreign import to_hf
from pipeline.model.heads import stream_means
from pipeline.model.weights import load_weights, weights_file
from pipeline.tasks import FinetuneTask, PretrainTask


@dataclass(frozen=True)
class Exported:
    """A run to be exported.

    Attributes:
        recipe: Its settings.
        spec: Its data.
        task: Its network, in evaluation mode on the CPU.
    """

    recipe: PretrainRecipe | FinetuneRecipe
    spec: DataSpec
    task: PretrainTask | FinetuneTask


def open_exported(run_dir: Path, average: bool = True) -> Exported:
    """Reads a run.

    Args:
        run_dir: Of pretrain.py or finetune.py.
        average: The averaged weights where there are some.

    Raises:
        UserError: no such run, or damaged files.
    """
    content = run_config(run_dir)
    file = weights_file(run_dir, average)
    if "finetune" in content:
        task, spec = load_finetuned(run_dir, file, torch.device("cpu"))
        return Exported(FinetuneRecipe.model_validate(content), spec, task)
    recipe, spec = PretrainRecipe.model_validate(content), DataSpec.load(run_dir)
    pretrained = PretrainTask(recipe, spec.mel_bins, spec.frames)
    report = load_weights(pretrained, file)
    if report.fresh or report.dropped:
        raise UserError(f"{file}: not the weights of {run_dir}/config.yaml: {report}")
    return Exported(recipe, spec, pretrained.eval())


def export_safetensors(run: Exported, out: Path) -> str:
    """Writes one file; returns what it holds, for people."""
    tensors = {name: value.float().contiguous() for name, value in run.task.state_dict().items()}
    metadata = {"format": "pt", "config": run.recipe.model_dump_json(), "data": run.spec.model_dump_json()}
    _make_parent(out)
    save_file(tensors, out, metadata)
    return f"{len(tensors)} tensors, {sum(value.numel() for value in tensors.values())} weights"


def export_hf(run: Exported, out: Path) -> str:
    """Writes `config.json`, `model.safetensors` and `preprocessor_config.json`; returns what they hold.

    The output agrees to 1e-5 with ours. HF has one LayerNorm epsilon; AST's heads have another one than its blocks,
    which moves logits by a few millionths.

    Raises:
        UserError: the run has no spectrogram side, or `out` holds something else.
    """
    if not run.task.method.spec:
        raise UserError(f"--format hf: {run.task.method.label} has no spectrogram side; HF's AST reads nothing else")
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: a file, but --format hf writes a directory; name another")
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
        "max_length": spec.frames, "num_mel_bins": spec.mel_bins,
    }  # fmt: skip
    if head:
        config["id2label"] = {str(number): label.name for number, label in enumerate(spec.labels)}
        config["label2id"] = {label.name: number for number, label in enumerate(spec.labels)}
        config["problem_type"] = "single_label_classification" if spec.single_label else "multi_label_classification"
    preprocessor = {
        "feature_extractor_type": "ASTFeatureExtractor", "feature_size": 1, "sampling_rate": spec.sample_rate,
        "num_mel_bins": spec.mel_bins, "max_length": spec.frames, "do_normalize": True, "mean": spec.mean,
        "std": spec.std, "padding_side": "right", "padding_value": 0.0, "return_attention_mask": False,
    }  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    save_file(to_hf(task.state_dict(), size.depth, head), out / "model.safetensors", {"format": "pt"})
    for name, content in (("config.json", config), ("preprocessor_config.json", preprocessor)):
        (out / name).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    left = [] if head or isinstance(task, PretrainTask) else ["classifier (HF pools cls and dist of one spectrogram)"]
    left += ["waveform side"] if task.method.wav else []
    left += ["pretraining heads"] if isinstance(task, PretrainTask) else []
    return f"{config['architectures'][0]}{'; left out: ' + ', '.join(left) if left else ''}"


class _Graph(nn.Module):
    """A run's network as a function of its inputs alone."""

    def __init__(self, task: PretrainTask | FinetuneTask) -> None:
        super().__init__()
        self.task = task

    @property
    def inputs(self) -> list[str]:
        """Their names, in order."""
        method = self.task.method
        return [name for name, read in (("fbank", method.spec), ("waveform", method.wav)) if read]

    @property
    def outputs(self) -> list[str]:
        """Their names, in order."""
        return ["logits", "embedding"] if isinstance(self.task, FinetuneTask) else ["embedding"]

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The inputs -> the outputs, each [B, ...]."""
        given = dict(zip(self.inputs, inputs, strict=True))
        model = self.task.model
        wav_map = model.waveform_map(given["waveform"]) if "waveform" in given else None
        encoded = model(given.get("fbank"), wav_map)
        embedding = torch.cat(stream_means(encoded), dim=1)
        return (self.task.classifier(encoded), embedding) if isinstance(self.task, FinetuneTask) else (embedding,)


def export_onnx(run: Exported, out: Path) -> str:
    """Writes one file, weights included; returns its inputs and outputs, for people.

    `config` and `data` (JSON: normalisation, rate, labels) are in its metadata.

    Raises:
        UserError: the packages that write it are not installed.
    """
    try:
        import onnx
        import onnxscript  # noqa: F401 - torch's exporter needs it
    except ImportError as error:
        raise UserError(f"--format onnx needs {error.name}; pip install 'craft-audio[onnx]'") from error
    graph, spec = _Graph(run.task).eval(), run.spec
    shapes = {"fbank": (2, spec.frames, spec.mel_bins), "waveform": (2, spec.samples)}
    examples = tuple(torch.zeros(shapes[name]) for name in graph.inputs)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns of packages that are not needed
    batch = torch.export.Dim("batch")
    with torch.no_grad():  # raises where the graph would hold for one batch only; torch.onnx.export would not
        program = torch.export.export(graph, examples, dynamic_shapes=(tuple({0: batch} for _ in examples),))
    written = torch.onnx.export(program, input_names=graph.inputs, output_names=graph.outputs, verbose=False)
    assert written is not None  # without a file name it is returned
    model = written.model_proto
    onnx.helper.set_model_props(model, {"config": run.recipe.model_dump_json(), "data": spec.model_dump_json()})
    onnx.checker.check_model(model)
    _make_parent(out)
    onnx.save(model, str(out))
    return f"{', '.join(graph.inputs)} -> {', '.join(graph.outputs)}, any batch"


def _make_parent(out: Path) -> None:
    if out.is_dir():
        raise UserError(f"--out {out}: a directory; give the name of a file")
    out.parent.mkdir(parents=True, exist_ok=True)
