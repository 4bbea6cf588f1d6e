"""hf-craft: transformers alone, and CRAFT without the code in it, give the outputs of the run; and the hub between."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import yaml
from safetensors.torch import load_file, save_file

from launchers.probe import weights_hash
from pipeline.config import FinetuneRecipe, PretrainRecipe
from pipeline.data.spec import DataSpec
from pipeline.errors import UserError
from pipeline.export import check_place, open_exported
from pipeline.files import write_json
from pipeline.hf_craft.bundle import bundle
from pipeline.hf_craft.directory import HF_CRAFT_FILES, export_hf_craft
from pipeline.hf_craft.feature_extraction import CraftFeatureExtractor
from pipeline.hf_craft.modeling import CraftForAudioClassification
from pipeline.hub import local_model, new_repository
from pipeline.model.weights import load_weights
from pipeline.probing.frozen import open_frozen
from pipeline.recipes import load_recipe
from pipeline.runs import initialise
from pipeline.serving import package
from pipeline.serving.scorer import batch_of, load_scorer
from pipeline.tasks import FinetuneTask
from tests.ranks import run_script
from tests.stores import model_hub
from tests.test_export import MICRO, SPEC, make_run, waveforms

FINETUNED = [
    "finetune.method=ast", "finetune.method=ast finetune.pool=cls model.block=post model.class_tokens=1",
    "finetune.method=wast model.norm=group model.activation=gelu model.input_norms=true",
    "finetune.method=swast finetune.pool=rows",
    "finetune.method=swab", "model.frontend=strided model.wav_depth=2", "model.frontend=sinc finetune.head=mean_logits",
    "model.channels=[32,32,32] model.shared_patch=true model.modality_embedding=true model.drop_path=0.1",
]  # fmt: skip
PRETRAINED = ["pretrain.method=pswacl", "pretrain.method=craft_mae", "pretrain.method=wapt"]
ALONE = """
import importlib.abc, sys
class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("pipeline", "shard_tools", "launchers", "pydantic"):
            raise ImportError(name + " is not here")
sys.meta_path.insert(0, Blocked())
import numpy, torch
from pathlib import Path
from transformers import AutoFeatureExtractor, AutoModel, AutoModelForAudioClassification, pipeline
clips = [numpy.load(path) for path in sorted(Path("clips").iterdir())]
found = {}
for folder in sorted(Path("exports").iterdir()):
    words = {"trust_remote_code": True}
    inputs = AutoFeatureExtractor.from_pretrained(folder, **words)(clips, sampling_rate=16000)
    tuned = "AutoModelForAudioClassification" in (folder / "config.json").read_text()
    with torch.no_grad():
        for auto in [AutoModel, AutoModelForAudioClassification][: 1 + tuned]:
            model, info = auto.from_pretrained(folder, output_loading_info=True, **words)
            assert not any(info.values()), info
            out = model.eval()(**inputs)
            found[folder.name, auto.__name__] = out.logits if auto is not AutoModel else out.last_hidden_state
            if tuned and auto is AutoModel:
                found[folder.name, "pooled"] = out.pooler_output
    if folder.name == "finetuned-4":
        loss = model(**inputs, labels=torch.zeros(len(clips), 6)).loss
        loss.backward()  # it can be trained further
        assert all(parameter.grad is not None for parameter in model.parameters())
        found["pipeline"] = pipeline("audio-classification", str(folder), **words)(clips[0], top_k=6)
assert not {"pipeline", "shard_tools"} & sys.modules.keys()
torch.save(found, "found.pt")
"""


def clips() -> list[np.ndarray]:
    whole = list(waveforms().numpy())
    return [whole[0], whole[1][:5000] + 0.25, 8 * whole[2]]  # short and not centred; beyond full scale


@torch.no_grad()
def test_transformers_alone_gives_the_same(tmp_path):
    """In a process that can import nothing of ours: every method, front end and kind of block, and encoders."""
    for folder in ("exports", "clips"):
        (tmp_path / folder).mkdir()
    for number, clip in enumerate(clips()):
        np.save(tmp_path / "clips" / f"{number}.npy", clip)
    expected = {}
    batch = batch_of(clips(), SPEC, torch.device("cpu"))
    for kind, name, cases in ((FinetuneRecipe, "finetuned", FINETUNED), (PretrainRecipe, "pretrained", PRETRAINED)):
        for number, words in enumerate(cases):
            run, key = tmp_path / "runs" / f"{name}-{number}", f"{name}-{number}"
            task = make_run(run, kind, *words.split())
            export_hf_craft(open_exported(run), tmp_path / "exports" / key)
            encoded = task.encode(batch) if kind is FinetuneRecipe else task(batch, tokens=True)
            expected[key, "AutoModel"] = torch.cat([*encoded.spec, *encoded.wav], dim=1)
            if kind is FinetuneRecipe:
                expected[key, "AutoModelForAudioClassification"] = task.classifier(encoded)
                expected[key, "pooled"] = torch.cat([x.mean(dim=1) for x in (*encoded.spec, *encoded.wav)], dim=1)
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-I", "-c", ALONE], cwd=tmp_path, env=env, capture_output=True, text=True,
                          check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = torch.load(tmp_path / "found.pt", weights_only=False)
    heard = {entry["label"]: entry["score"] for entry in found.pop("pipeline")}
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=0, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}")
    scores = expected["finetuned-4", "AutoModelForAudioClassification"].sigmoid()[0].tolist()
    assert heard == pytest.approx(dict(zip([label.name for label in SPEC.labels], scores, strict=True)), abs=1e-5)


@torch.no_grad()
def test_a_classifier_of_other_classes_begins_afresh(tmp_path):
    """As transformers says; what it hands over for a weight of another shape is memory as it was found."""
    task = make_run(tmp_path / "run", FinetuneRecipe, "finetune.method=swab")
    export_hf_craft(open_exported(tmp_path / "run"), tmp_path / "export")
    model = CraftForAudioClassification.from_pretrained(
        tmp_path / "export", num_labels=2, ignore_mismatched_sizes=True
    )
    linear, bound = model.classifier.linear, task.classifier.linear.in_features**-0.5
    for weight in (linear.weight, linear.bias):
        assert 0 < weight.abs().max() <= bound
    assert linear.weight.std() == pytest.approx(bound / 3**0.5, rel=0.1)
    own = task.state_dict()
    assert all(torch.equal(value, own[name]) for name, value in model.state_dict().items() if ".linear." not in name)


@torch.no_grad()
def test_an_export_stands_for_the_run(tmp_path):
    """In predict, probes and a finetuning: by weights and settings, whatever code lies there."""
    task = make_run(tmp_path / "run", FinetuneRecipe, "finetune.method=swab", "data.shards=/home/me/shards",
                    "log.uri=https://me:secret@tracking")  # fmt: skip
    folder = tmp_path / "hf-craft"
    export_hf_craft(open_exported(tmp_path / "run"), folder)
    export_hf_craft(open_exported(tmp_path / "run"), folder)  # in place of an earlier one
    check_place(tmp_path / "run", folder, HF_CRAFT_FILES)
    assert {path.name for path in folder.iterdir()} == HF_CRAFT_FILES - {"curves.png"}
    for path in folder.iterdir():
        assert not any(private in path.read_bytes() for private in (b"secret", b"/home/me")), path
    for file in folder.glob("*.py"):
        file.write_text("raise SystemExit('this code is run')")
    scores, _ = load_scorer(folder).hear(clips())
    expected, _ = load_scorer(tmp_path / "run").hear(clips())
    np.testing.assert_array_equal(scores, expected)
    frozen, ours = open_frozen(str(folder)), open_frozen(str(tmp_path / "run"))
    assert (frozen.digest, frozen.source) == (ours.digest, None)
    recipe = load_recipe(FinetuneRecipe, [], [*MICRO, "finetune.method=swab", f"model.init={folder}"])
    fresh = FinetuneTask(recipe, SPEC.mel_bins, SPEC.frames, len(SPEC.labels), SPEC.single_label)
    record = initialise(fresh, recipe, SPEC)
    assert (record["fresh"], record["dropped"]) == ([], [])
    assert all(torch.equal(value, task.state_dict()[name]) for name, value in fresh.state_dict().items())
    make_run(tmp_path / "before", PretrainRecipe)
    export_hf_craft(open_exported(tmp_path / "before"), tmp_path / "encoder")
    report = load_weights(fresh, tmp_path / "encoder" / "model.safetensors")
    assert {name.split(".")[0] for name in report.fresh} == {"classifier", "model"}
    assert [name for name in report.fresh if name.startswith("model.")] == ["model.encoder.bottlenecks.tokens"]


def test_the_card_says_what_the_run_knows_and_what_it_does_not(tmp_path):
    run = tmp_path / "run"
    make_run(run, FinetuneRecipe, "optim.lr=0.003")
    export_hf_craft(open_exported(run), tmp_path / "bare")
    bare = (tmp_path / "bare" / "README.md").read_text()
    make_run(tmp_path / "several", PretrainRecipe, "data.shards=[{path: /home/me/a}, {path: /home/me/b}]",
             "data.temperature=2")  # fmt: skip
    export_hf_craft(open_exported(tmp_path / "several"), tmp_path / "of several")
    assert "/home/me" not in (tmp_path / "of several" / "config.yaml").read_text()
    for missing in ("Coverage (the share of the listed clips that was there): not recorded", "Not recorded.",
                    "Finetuned: not evaluated.", "Frozen encoder: not probed.", "# license: fill in"):  # fmt: skip
        assert missing in bare
    metrics = [{"step": step, "loss": 1 / step, "probe_linear_spec": 0.25 * step} for step in (1, 2)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    tags = {"kind": "tags", "values": {"coverage.train": "90 of 100 (90.0%)", "mlflow.user": "me"}}
    (run / "tracking.jsonl").write_text(json.dumps(tags) + "\n")
    around = {"low": 0.4, "high": 0.6}
    write_json(run / "results.json", {"metric": "mAP", "metrics": {"mAP": 0.5, "AUC": None}, "clips": 40,
                                      "split": "eval", "interval": around})  # fmt: skip
    write_json(run / "init.json", {"source": "/home/me/w", "origin": "EAT or SSLAM", "loaded": ["a"], "resized": [],
                                   "fresh": ["b", "c"], "dropped": []})  # fmt: skip
    (tmp_path / "probe-run-12345678").mkdir()
    write_json(tmp_path / "probe-run-12345678" / "probe.json", [
        {"probe": "attentive", "stream": "both", "layer": 4, "metric": "mAP", "value": 0.125, "n": 40}
    ])  # fmt: skip
    export_hf_craft(open_exported(run), tmp_path / "full", "lab/craft")
    assert (tmp_path / "full" / "curves.png").read_bytes().startswith(b"\x89PNG")
    card = (tmp_path / "full" / "README.md").read_text()
    header = yaml.safe_load(card.split("---")[1])
    assert header["pipeline_tag"] == "audio-classification"
    assert header["model-index"][0]["results"][0]["metrics"] == [{"type": "mAP", "name": "mAP", "value": 0.5}]
    for told in ("Split `train`: 90 of 100 (90.0%)", "optim.lr: 0.003", "![Losses", 'from_pretrained("lab/craft"',
                 "40 clips of split `eval`: mAP 0.5000 (mAP: 95 % interval 0.4000 to 0.6000)", "sound 0, sound 1",
                 "From EAT or SSLAM weights: 1 loaded, 0 resized, 2 fresh",
                 "| attentive | both | 4 | mAP | 0.1250 | 40 |", "| linear | spec | last | in training | 0.5000 |  |",
                 "@misc{craft,"):  # fmt: skip
        assert told in card, told
    assert "/home/me" not in card


def test_a_card_has_no_scores_of_other_weights(tmp_path):
    """`--last` exports others than those that the run's last act scored; evaluate.py --out writes any."""
    run = tmp_path / "run"
    make_run(run, FinetuneRecipe, "finetune.method=ast")
    checkpoint = run / "checkpoints" / "step-00000001"
    weights = load_file(checkpoint / "weights.safetensors")
    save_file({name: 0.5 * value for name, value in weights.items()}, checkpoint / "average.safetensors")
    results = {"metric": "mAP", "metrics": {"mAP": 0.5}, "clips": 40, "split": "eval", "weights": "average"}
    write_json(run / "results.json", results)
    probed = {"stream": "both", "layer": 4, "metric": "mAP", "n": 40}
    rows = [{"probe": name, "value": value, "weights": weights} | probed for name, value, weights in (
        ("linear", 0.25, weights_hash(str(checkpoint / "average.safetensors"))), ("knn", 0.125, "of an earlier step"),
        ("cgp", 0.0625, f"random:{run}"))]  # fmt: skip
    of_another_run = [{"probe": "attentive", "value": 0.75} | probed]
    for name, content in (("probe-run-12345678", rows), ("probe-run-swab-12345678", of_another_run)):
        (tmp_path / name).mkdir()
        write_json(tmp_path / name / "probe.json", content)
    spec = DataSpec.load(run)
    for average, told in ((True, "of split `eval`: mAP 0.5000"), (False, "is of other weights, `average` of step-")):
        export_hf_craft(open_exported(run, average), tmp_path / str(average))
        card = (tmp_path / str(average) / "README.md").read_text()
        assert told in card
        assert ("model-index" in card, "0.5000" in card) == (average, average)
        assert ("| linear | both | 4 | mAP | 0.2500 | 40 |" in card) == average
        assert ("not probed; what probe.py left is of other weights." in card) != average
        assert not any(value in card for value in ("0.1250", "0.0625", "0.7500"))
    assert "mAP 0.5000" in package.model_card(run, spec)
    for changed, said in (
        ({"weights": "weights"}, f"other weights, `weights` of {checkpoint.name}"),
        ({"ensemble": ["a", "b"]}, "ensemble"),
        ({"checkpoint": "step-00000000"}, "other weights, `average` of step-00000000"),  # the run has gone on since
    ):
        write_json(run / "results.json", results | changed)
        assert f"not evaluated; the run's results.json is of {'an ' * ('ensemble' in changed)}{said}" in (
            package.model_card(run, spec)
        )
    write_json(run / "results.json", {"metrics": 1})
    with pytest.raises(UserError, match=r"results\.json: damaged .*evaluate\.py --out"):
        export_hf_craft(open_exported(run), tmp_path / "damaged")


def test_the_extractor_refuses_integers():
    """Their full scale is not known: taken as floats they would be scaled down to it, whatever their level."""
    extractor = CraftFeatureExtractor(samples=12000, max_length=SPEC.frames)
    quiet = 0.01 * waveforms()[0].numpy()
    assert extractor(quiet)["length"].tolist() == [12000]
    for samples in (np.round(quiet * 32768).astype(np.int16), [quiet, np.zeros(100, np.int32)], [1, 2, 3]):
        with pytest.raises(ValueError, match="waveforms of integers"):
            extractor(samples)


def test_a_file_that_cannot_be_one_is_not_written(tmp_path, monkeypatch):
    """Two modules with one name, or a name under another."""
    for name, text in (("a", "from pipeline.b import g\ndef f():\n    return h() + g()\ndef h():\n    return 1\n"),
                       ("b", "def g():\n    return h()\ndef h():\n    return 2\n"),
                       ("c", "from pipeline.b import g as q\ndef f():\n    return q()\n")):  # fmt: skip
        (tmp_path / "pipeline").mkdir(exist_ok=True)
        (tmp_path / "pipeline" / f"{name}.py").write_text(text)
    monkeypatch.setattr("pipeline.hf_craft.bundle.ROOT", tmp_path)
    with pytest.raises(ValueError, match=r"h is defined in pipeline\.\w and in pipeline\.\w"):
        bundle("pipeline.a", ["f"], "", {})
    with pytest.raises(ValueError, match="goes by the name q"):
        bundle("pipeline.c", ["f"], "", {})


def test_the_hub_takes_an_export_and_gives_it_back(tmp_path):
    """Its code stays there: only weights and settings are fetched, and none of the rest is run."""
    make_run(tmp_path / "run", FinetuneRecipe, "finetune.method=swab")
    soundfile.write(tmp_path / "dog.wav", clips()[1], 16000, subtype="PCM_16")
    hub = tmp_path / "hub"
    with model_hub(hub) as leads_there:
        env = leads_there | {"HF_HOME": str(tmp_path / "home"), "CUDA_VISIBLE_DEVICES": ""}

        def run(script: str, *words: object, **more: str) -> subprocess.CompletedProcess[str]:
            with pytest.MonkeyPatch.context() as patch:
                for name, value in (env | more).items():
                    patch.setenv(name, value)
                return run_script(f"launchers/{script}.py", *words)

        words = ("--checkpoint", tmp_path / "run", "--format", "hf-craft", "--push", "lab/craft")
        denied = run("export", *words, HF_TOKEN="wrong")
        assert (denied.returncode, denied.stderr.count("\n")) == (2, 1), denied.stderr
        assert "--push lab/craft: " in denied.stderr
        assert not (tmp_path / "run" / "export").exists()  # before the work
        pushed = run("export", *words)
        assert pushed.returncode == 0, pushed.stderr
        assert "/lab/craft/commit/" in pushed.stdout
        made = tmp_path / "run" / "export" / "hf-craft"
        assert {path.name: path.read_bytes() for path in (hub / "lab" / "craft").iterdir()} == {
            path.name: path.read_bytes() for path in made.iterdir()
        }
        assert 'from_pretrained("lab/craft"' in (made / "README.md").read_text()
        heard = run("predict", "--checkpoint", "hf://lab/craft", tmp_path / "dog.wav", "--json", "--top", 6)
        assert heard.returncode == 0, heard.stderr
        fetched = {path.name for path in (tmp_path / "home").rglob("*") if path.is_symlink()}
        assert fetched == {"config.json", "config.yaml", "data.json", "preprocessor_config.json", "model.safetensors"}
        missing = run("predict", "--checkpoint", "hf://lab/none", tmp_path / "dog.wav")
        assert (missing.returncode, missing.stderr.count("\n")) == (2, 1), missing.stderr
        assert "hf://lab/none: " in missing.stderr
    found = {entry["id"]: entry["score"] for entry in json.loads(heard.stdout)["labels"]}
    samples, _ = soundfile.read(tmp_path / "dog.wav", dtype="float32")
    scores = load_scorer(tmp_path / "run").hear([samples])[0][0].tolist()
    assert found == pytest.approx({label.id: score for label, score in zip(SPEC.labels, scores, strict=True)}, abs=2e-6)


def test_what_names_no_model_on_the_hub(monkeypatch):
    for name in ("hf://craft", "hf://datasets/lab/craft", "hf://"):
        with pytest.raises(UserError, match="names no model; write hf://OWNER/NAME"):
            local_model(name)
    assert local_model("runs/craft") == Path("runs/craft")
    with pytest.raises(UserError, match="--push craft: names no repository"):
        new_repository("craft")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(UserError, match="no token of the hub is known; run `hf auth login`"):
        new_repository("lab/craft")
