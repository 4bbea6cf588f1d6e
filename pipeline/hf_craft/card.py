"""The model card of an export: README.md with the metadata that the hub shows.

In: a run directory. Out: Markdown. Numbers are what the run's own files hold; what they lack is said to be missing.
"""

import glob
import json
from pathlib import Path
from typing import Any

import yaml

from pipeline.config import FinetuneRecipe, PretrainRecipe
from pipeline.data.spec import DataSpec
from pipeline.errors import UserError
from pipeline.files import read_json, sha256
from pipeline.methods import FINETUNE, PRETRAIN, FinetuneMethod, PretrainMethod
from pipeline.recipes import changes_result, flatten
from pipeline.serving.package import scored_instead
from pipeline.tracking.spool import Feed

DAMAGED = "the run directory is damaged"
CITE = """@misc{craft,
  title  = {{CRAFT}: Cross-Representation Modeling on Audio Waveforms and Spectrograms},
  author = {Anonymous},
  note   = {Under double-blind review},
}"""


def model_card(
    run_dir: Path, file: Path, recipe: PretrainRecipe | FinetuneRecipe, spec: DataSpec, weights: int, curves: bool,
    name: str,
) -> str:  # fmt: skip
    """Writes the card.

    Args:
        run_dir: Of the run; results.json, metrics.jsonl, tracking.jsonl, init.json and what probe.py left beside it are
            read where they are.
        file: The exported weights; scores of others are left out.
        recipe: Its settings.
        spec: Its data.
        weights: Number of the exported weights.
        curves: curves.png lies beside the card.
        name: OWNER/NAME on the hub.

    Raises:
        UserError: one of these files is damaged.
    """
    tuned = isinstance(recipe, FinetuneRecipe)
    method: FinetuneMethod | PretrainMethod
    loss: str
    if isinstance(recipe, FinetuneRecipe):
        method, loss = FINETUNE[recipe.finetune.method], recipe.finetune.loss_of(spec.single_label)
    else:
        method, loss = PRETRAIN[recipe.pretrain.method], ""
    seconds = spec.samples / spec.sample_rate
    results = read_json(run_dir / "results.json", DAMAGED) if tuned and (run_dir / "results.json").is_file() else None
    title = f"CRAFT: {method.label} ({recipe.model.size})"
    try:
        others = "" if results is None else scored_instead(results, file)
        results = None if others else results
        header, finetuned = _metadata(title, spec, tuned, results), _finetuned(results, others) if tuned else []
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(
            f"{run_dir / 'results.json'}: damaged ({error}); write it anew with evaluate.py --out"
        ) from error
    frozen, left_out = _frozen(run_dir, file)
    reads = " and ".join(["spectrogram"] * method.spec + ["waveform"] * method.wav)
    auto = "AutoModelForAudioClassification" if tuned else "AutoModel"
    output = "logits = model(**inputs).logits" if tuned else "tokens = model(**inputs).last_hidden_state"
    kind = "A finetuned classifier" if tuned else "A pretrained encoder"
    classes = f" of {len(spec.labels)} classes" if tuned else ""
    scores = {"": "", "ce": "softmax over the classes", "bce": "a sigmoid for each class"}[loss]
    return "\n".join([
        *header, "", f"# {title}", "",
        f"{kind}{classes} that reads the {reads} of {seconds:g} s of audio at {spec.sample_rate} Hz: "
        f"{method.meaning}; {weights / 1e6:.1f} M weights.", "",
        "## Use", "", "```python", "from transformers import AutoFeatureExtractor, " + auto, "",
        f'extractor = AutoFeatureExtractor.from_pretrained("{name}", trust_remote_code=True)',
        f'model = {auto}.from_pretrained("{name}", trust_remote_code=True).eval()',
        f"inputs = extractor(waveform, sampling_rate={spec.sample_rate})  # float samples in [-1, 1], one channel",
        output, "```", "",
        "The code needs torch, transformers and numpy. With CRAFT installed none of it is run: weights and settings "
        f"are enough for `predict.py`, `evaluate.py`, `embed.py` and `probe.py --checkpoint hf://{name}`, and for "
        f"`finetune.py model.init=hf://{name}`.", *([f"Scores: {scores}."] if scores else []), "",
        "## Data", "", *_data(run_dir, recipe, spec), "",
        "## Recipe", "", *_recipe(run_dir, recipe), "",
        "## Curves", "", "![Losses, rates and metrics over steps](curves.png)" if curves else "Not recorded.", "",
        "## Scores", "", *finetuned, *_table(frozen, left_out), "",
        "## Intended use", "",
        "Research on audio representations" + (", and labels of recordings like those of its data." if tuned else
        "; to be finetuned, or probed, on labelled recordings."), "",
        "## Limits", "",
        f"- Trained on the data above alone: scores of other recordings, microphones and levels are not calibrated.\n"
        f"- What is longer than {seconds:g} s must be cut into windows; what is shorter is padded with zeros.\n"
        "- Not for decisions about people: it was not tested for speakers, languages or places that its data lack.", "",
        "## Licence", "",
        "To be filled in by whoever publishes it, here and as `license` in the header: that of the weights depends on "
        "that of the data. The code in this directory is CRAFT's, under Apache 2.0.", "",
        "## Citation", "", "```bibtex", CITE, "```", "",
    ])  # fmt: skip


def _metadata(title: str, spec: DataSpec, tuned: bool, results: dict[str, Any] | None) -> list[str]:
    task = "audio-classification" if tuned else "feature-extraction"
    content: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": task, "tags": ["audio", "craft"]}
    if results is not None:
        metrics = [{"type": name, "name": name, "value": value} for name, value in _defined(results).items()]
        data = {"type": "audio", "name": f"shards {spec.digest[:16]}", "split": str(results["split"])}
        entry = {"task": {"type": task}, "dataset": data, "metrics": metrics}
        content["model-index"] = [{"name": title, "results": [entry]}]
    header = yaml.safe_dump(content, sort_keys=False).strip()
    return ["---", "# license: fill in, such as cc-by-4.0", header, "---"]


def _data(run_dir: Path, recipe: PretrainRecipe | FinetuneRecipe, spec: DataSpec) -> list[str]:
    tags: dict[str, str] = {}
    for line in Feed(run_dir / "tracking.jsonl").read():
        if line.get("kind") == "tags":
            tags |= line["values"]
    shares = [f"- Split `{name.removeprefix('coverage.')}`: {share} of the clips that its source lists"
              for name, share in tags.items() if name.startswith("coverage.")]  # fmt: skip
    labels = [label.name for label in spec.labels]
    names = ", ".join(labels[:20]) + (", ..." if len(labels) > 20 else "") or "none"
    return [
        f"- Shards with the digest `{spec.digest}`; trained on split `{recipe.data.train_split}`"
        + (f", held-out fold {recipe.data.fold}" if recipe.data.fold else ""),
        *(shares or ["- Coverage (the share of the listed clips that was there): not recorded"]),
        f"- {spec.mel_bins} mel bins, {spec.frames} frames; fbank mean {spec.mean:.4f}, deviation {spec.std:.4f}",
        f"- Classes: {names}",
        "- Name, source and licence of the data: to be filled in by whoever publishes the model",
    ]


def _recipe(run_dir: Path, recipe: PretrainRecipe | FinetuneRecipe) -> list[str]:
    before = "random weights"
    if (run_dir / "init.json").is_file():
        content = read_json(run_dir / "init.json", DAMAGED)
        parts = f"{content.get('origin', 'CRAFT')} weights: {len(content['loaded'])} loaded, "
        before = parts + ", ".join(f"{len(content[key])} {key}" for key in ("resized", "fresh", "dropped"))
    now, default = flatten(recipe), flatten(type(recipe)())
    lines = [f"{key}: {json.dumps(value, ensure_ascii=False)}"
             for key, value in now.items() if changes_result(key) and value != default[key]]  # fmt: skip
    return [f"From {before}. Settings that are not the default; `config.yaml` has all:", "", "```yaml",
            *(lines or ["# all are"]), "```"]  # fmt: skip


def _defined(results: dict[str, Any]) -> dict[str, float]:
    """Metrics that have a value: no class may have had clips of both kinds."""
    return {name: value for name, value in results["metrics"].items() if value is not None}


def _finetuned(results: dict[str, Any] | None, others: str) -> list[str]:
    if results is None:
        return [f"Finetuned: not evaluated{'; the results.json of the run is of ' + others if others else ''}."]
    numbers = ", ".join(f"{name} {value:.4f}" for name, value in _defined(results).items())
    low, high = ((results.get("interval") or {}).get(end) for end in ("low", "high"))
    spread = f" ({results['metric']}: 95 % interval {low:.4f} to {high:.4f})" if low is not None else ""
    return [f"Finetuned, {results['clips']} clips of split `{results['split']}`: {numbers}{spread}."]


def _frozen(run_dir: Path, weights: Path) -> tuple[list[dict[str, Any]], int]:
    """Rows of probe.py's results, which lie beside the run, and the last probe of the training.

    Of probe.py's, those of the weights alone: it may have probed earlier ones, the averaged ones, or the untrained
    network. How many others there are.
    """
    home, found = run_dir.resolve(), []
    for file in sorted(home.parent.glob(f"probe-{glob.escape(home.name)}-{'?' * 8}/probe.json")):
        found += read_json(file, "make it again with probe.py")
    with weights.open("rb") as opened:
        digest = sha256(opened)
    rows = [row for row in found if row.get("weights", digest) == digest]
    others = len(found) - len(rows)
    seen: dict[str, float] = {}
    for line in Feed(run_dir / "metrics.jsonl").read():
        seen |= {name: value for name, value in line.items() if name.startswith("probe_")}
    for name, value in seen.items():
        _, probe, stream = name.split("_", 2)
        rows.append({"probe": probe, "stream": stream, "layer": "last", "metric": "", "value": value, "n": ""})
    return rows, others


def _table(rows: list[dict[str, Any]], others: int) -> list[str]:
    if not rows:
        return ["", f"Frozen encoder: not probed{'; what probe.py left is of other weights' if others else ''}."]
    lines = ["", "Frozen encoder:", "", "| probe | stream | layer | metric | value | clips |",
             "| --- | --- | --- | --- | ---: | ---: |"]  # fmt: skip
    return lines + [f"| {row['probe']} | {row['stream']} | {row['layer']} | {row['metric'] or 'in training'} | "
                    f"{row['value']:.4f} | {row['n']} |" for row in rows]  # fmt: skip
