"""A run as a directory for `transformers`, and for CRAFT itself.

In: an opened run. Out, whole or not at all:

    model.safetensors             weights in float32, under the names of a run's
    config.json                   for AutoConfig, AutoModel and AutoModelForAudioClassification; label names
    preprocessor_config.json      for AutoFeatureExtractor
    configuration_craft.py, modeling_craft.py, feature_extraction_craft.py    their code, which needs no CRAFT
    config.yaml, data.json        the run's record, without places: with the weights all that CRAFT reads
    README.md, curves.png         the model card
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from pipeline import __version__
from pipeline.config import FinetuneRecipe, PretrainRecipe
from pipeline.export import MADE_BY, PREPROCESSOR, Exported, check_one_length, is_export, written
from pipeline.files import check_replaced_directory, new_directory, write_json, write_text
from pipeline.hf_craft.bundle import bundle
from pipeline.hf_craft.card import model_card
from pipeline.recipes import dump_recipe, effect
from pipeline.tasks import FinetuneTask
from pipeline.tracking.figures import curves

CODE = {  # file -> what it defines
    "configuration": ["CraftConfig"],
    "modeling": ["CraftModel", "CraftForAudioClassification"],
    "feature_extraction": ["CraftFeatureExtractor"],
}
HF_CRAFT_FILES = frozenset({
    "README.md", "config.json", "config.yaml", "curves.png", "data.json", "model.safetensors", PREPROCESSOR,
    *(f"{name}_craft.py" for name in CODE),
})  # fmt: skip
OF_SEVERAL = ("data.temperature", "data.schedule")  # sets of shards
TRAINING = {"drop_path": 0.0, "checkpoint_activations": False}  # model settings of no use to who has the weights


def export_hf_craft(run: Exported, out: Path, name: str = "") -> str:
    """Writes the directory, in place of one that this made before; returns what it holds, for people.

    The outputs are the run's, to the last bit of float32: the code is the run's.

    Args:
        run: The run.
        out: The directory.
        name: OWNER/NAME under which it will be on the hub, for the card; empty: not known yet.

    Raises:
        UserError: `out` holds something else or cannot be written, a file of the run is damaged, or the run has inputs
            of several lengths.
    """
    check_one_length(run, "hf-craft")
    check_replaced_directory(out, "--out", HF_CRAFT_FILES, is_export)
    tensors = {key: value.float().contiguous() for key, value in run.task.state_dict().items()
               if key.startswith(("model.", "classifier."))}  # fmt: skip
    count = sum(value.numel() for value in tensors.values())
    with written(out), new_directory(out) as made:
        save_file(tensors, made / "model.safetensors", {"format": "pt"})
        write_json(made / "config.json", _config(run))
        write_json(made / PREPROCESSOR, _preprocessor(run))
        for stem, wanted in CODE.items():
            write_text(made / f"{stem}_craft.py", _code(stem, wanted))
        write_text(made / "config.yaml", dump_recipe(_without_places(run.recipe)))
        run.spec.save(made)
        drawn = curves(run.run_dir / "metrics.jsonl", made / "curves.png")
        card = model_card(run.run_dir, run.file, run.recipe, run.spec, count, drawn, name or "OWNER/NAME")
        write_text(made / "README.md", card)
    left = sorted({key.split(".")[0] for key in run.task.state_dict()} - {"model", "classifier"})
    return f"{_architectures(run)[-1]}, {count} weights" + (f"; left out: {', '.join(left)}" if left else "")


def _architectures(run: Exported) -> list[str]:
    return CODE["modeling"][: 1 + isinstance(run.task, FinetuneTask)]


def _config(run: Exported) -> dict[str, Any]:
    task, spec = run.task, run.spec
    network = {key: value for key, value in run.recipe.model.model_dump(mode="json").items()
               if effect(f"model.{key}") == "result" and not key.startswith("init")}  # fmt: skip
    streams = asdict(task.model.streams) | {"mask_freq": 0.0, "mask_time": 0.0}
    config: dict[str, Any] = {
        "architectures": _architectures(run)[-1:], "model_type": "craft", "dtype": "float32", MADE_BY: __version__,
        "auto_map": {"AutoConfig": "configuration_craft.CraftConfig", "AutoModel": "modeling_craft.CraftModel"},
        "network": network | TRAINING, "streams": streams, "classifier": None, "hidden_size": task.model.width,
    }  # fmt: skip
    if isinstance(task, FinetuneTask):
        config["auto_map"]["AutoModelForAudioClassification"] = "modeling_craft.CraftForAudioClassification"
        config["classifier"] = {"rows": list(task.classifier.rows), "mode": task.classifier.mode}
        config["id2label"] = {str(number): label.name for number, label in enumerate(spec.labels)}
        config["label2id"] = {label.name: number for number, label in enumerate(spec.labels)}
        config["problem_type"] = "single_label_classification" if task.loss == "ce" else "multi_label_classification"
    return config


def _preprocessor(run: Exported) -> dict[str, Any]:
    spec, streams = run.spec, run.task.model.streams
    return {
        "feature_extractor_type": "CraftFeatureExtractor",
        "auto_map": {"AutoFeatureExtractor": "feature_extraction_craft.CraftFeatureExtractor"},
        "sampling_rate": spec.sample_rate, "samples": spec.samples, "num_mel_bins": spec.mel_bins,
        "max_length": spec.frames, "mean": spec.mean, "std": spec.std, "spec": streams.spec, "wav": streams.wav,
    }  # fmt: skip


def _code(stem: str, wanted: list[str]) -> str:
    header = (
        f"{', '.join(wanted)} for transformers.\n\nWritten by CRAFT {__version__} from its own modules; needs torch, "
        "transformers and numpy. Apache License 2.0.\n"
    )
    beside = {"pipeline.hf_craft.configuration": "configuration_craft"} if stem == "modeling" else {}
    return bundle(f"pipeline.hf_craft.{stem}", wanted, header, beside)


def _without_places(recipe: PretrainRecipe | FinetuneRecipe) -> PretrainRecipe | FinetuneRecipe:
    """The settings that change numbers; all others, which name places of whoever trained it, as by default.

    So is how several of these places were mixed.
    """
    sections = {}
    for section, values in recipe:
        names = {key: f"{section}.{key}" for key in type(values).model_fields}
        kept = {key for key, name in names.items() if effect(name) != "neutral" and name not in OF_SEVERAL}
        sections[section] = type(values)(**{key: getattr(values, key) for key in kept})
    return recipe.model_copy(update=sections)
