"""A run directory is one run's: what may change in it, and what model.init gives a run that begins."""

import json
import logging
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from pipeline.command_line import Launch
from pipeline.config import FinetuneRecipe, PretrainRecipe
from pipeline.data.corpus import load_corpus
from pipeline.data.manifest import Label
from pipeline.data.spec import DataSpec
from pipeline.distributed import World
from pipeline.errors import UserError, exit_status
from pipeline.export import export_safetensors, open_exported
from pipeline.files import read_json, write_json
from pipeline.methods import PRETRAIN
from pipeline.model.weights import weights_file
from pipeline.recipes import load_recipe
from pipeline.run_directory import check_run, open_run, write_record
from pipeline.runs import initialise
from pipeline.tasks import FinetuneTask
from pipeline.tracking.spool import Spool
from pipeline.train import _loaders, check_held_out, tracked
from tests.ranks import run_ranks

MICRO = ["model.size=micro", "model.stride=16", "train.batch_size=8", "train.steps=6"]
DS = {"bf16": {"enabled": False}, "fp16": {"enabled": False}, "zero_optimization": {"stage": 1}}


def finetuning(run_dir: Path, shards: Path | str, *words: str) -> FinetuneRecipe:
    return load_recipe(FinetuneRecipe, [], [f"run.dir={run_dir}", f"data.shards={shards}", *MICRO, *words])


def spec_of(recipe: FinetuneRecipe) -> DataSpec:
    return DataSpec.of(load_corpus(recipe.data), recipe.data)


def checkpoint(run_dir: Path, step: int, recipe: FinetuneRecipe, seed: int = 0) -> Path:
    """What the trainer leaves of that step, with random weights."""
    folder = run_dir / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    for name in ("config.yaml", "ds.json", "data.json"):
        shutil.copyfile(run_dir / name, folder / name)
    spec = spec_of(recipe)
    torch.manual_seed(seed)
    task = FinetuneTask(recipe, spec.mel_bins, spec.frames, len(spec.labels), spec.single_label)
    save_file(task.state_dict(), folder / "weights.safetensors")
    write_json(folder / "state.json", {"step": step})
    write_json(folder / "complete", {file.name: file.stat().st_size for file in folder.iterdir()})
    (run_dir / "checkpoints" / "latest").write_text(folder.name)
    return folder


def test_held_out_batches_of_another_size_on_these_ranks_are_said(shards, caplog, monkeypatch):
    """The held-out contrast is over the batch: it would be compared with that of other ranks."""
    monkeypatch.setattr(logging.getLogger("pipeline"), "propagate", True)
    for ranks, said in ((2, ""), (4, "eval.batch_size = 10 does not divide by 4 ranks: 8 are taken")):
        words = [f"data.shards={shards}", "train.batch_size=8", "eval.batch_size=10", "data.workers=0"]
        recipe = load_recipe(PretrainRecipe, [], words)
        with _loaders(recipe, PRETRAIN["pswacl"], World(0, ranks)):
            assert said in caplog.text
            assert bool(said) == ("does not divide" in caplog.text)


@pytest.fixture
def run(shards, tmp_path):
    """A finetuning of 6 steps whose checkpoint is of step 6: its directory and its recipe."""
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    recipe = finetuning(run_dir, shards)
    write_record(run_dir, recipe, DS, spec_of(recipe))
    checkpoint(run_dir, 6, recipe)
    return run_dir, recipe


def state_of(run_dir: Path) -> dict[Path, tuple[int, bytes]]:
    files = run_dir.rglob("*")
    return {path: (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"") for path in files}


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("finetune.bottlenecks=32", "finetune.bottlenecks = 64, not 32"),
        ("finetune.head=mean_pool", "finetune.head = concat, not mean_pool"),
        ("model.stride=10", "model.stride = 16, not 10"),
        ("data.mean=0", "data.mean = None, not 0.0"),
        ("optim.lr=0.1", "optim.lr = 5e-05, not 0.1"),
        ("model.init=/other/run", "model.init = , not /other/run"),
        ("checkpoint.average=[1,2]", r"checkpoint.average = \[6, 25\], not \[1, 2\]"),
        ("finetune.folds=all", r"finetune.folds = \[\], not all"),
        ("run.seed=1", "run.seed = 0, not 1"),
        ("data.train_split=[train,eval]", "data.train_split = train, not train,eval"),
    ],
)
def test_another_setting_in_a_trained_directory_is_refused_by_name(run, shards, word, said):
    run_dir, _ = run
    before = state_of(run_dir)
    recipe = finetuning(run_dir, shards, word)
    with pytest.raises(UserError, match=f"run.dir = .* was trained with {said}; repeat that command, or give another"):
        check_run(run_dir, recipe, DS, spec_of(recipe))
    assert state_of(run_dir) == before


def test_a_finished_run_whose_checkpoints_are_gone_is_kept_too(run, shards):
    run_dir, _ = run
    shutil.rmtree(run_dir / "checkpoints")
    recipe = finetuning(run_dir, shards, "optim.lr=0.1")
    assert check_run(run_dir, recipe, DS, spec_of(recipe)) == (0, [])  # nothing was trained: a mistake is mended
    write_json(run_dir / "results.json", {})
    with pytest.raises(UserError, match=r"optim\.lr"):
        check_run(run_dir, recipe, DS, spec_of(recipe))


def test_what_was_overwritten_is_compared_with_the_checkpoint(run, shards):
    """A config.yaml that was edited, or damaged, says nothing of what was trained."""
    run_dir, recipe = run
    (run_dir / "config.yaml").write_text("oops: [")
    assert check_run(run_dir, recipe, DS, spec_of(recipe))[0] == 6
    other = finetuning(run_dir, shards, "optim.lr=0.1")
    write_record(run_dir, other, DS, spec_of(other))
    with pytest.raises(UserError, match=r"optim\.lr = 5e-05, not 0\.1"):
        check_run(run_dir, other, DS, spec_of(other))


def test_the_weights_of_a_run_that_goes_on_are_those_it_goes_on_from(run, shards):
    """A kill between completing a checkpoint and naming it; a newest one that is damaged."""
    run_dir, _ = run
    recipe = finetuning(run_dir, shards, "train.steps=8")
    newest = checkpoint(run_dir, 8, recipe)
    for damaged, named, step in ((False, "step-00000006", 8), (True, "step-00000008", 6)):
        (run_dir / "checkpoints" / "latest").write_text(named)
        if damaged:
            (newest / "weights.safetensors").write_bytes(b"")
        found = check_run(run_dir, recipe, DS, spec_of(recipe))[0]
        write_record(run_dir, recipe, DS, spec_of(recipe), step=found)
        assert found == step
        assert weights_file(run_dir).parent.name == f"step-{step:08d}"


def test_longer_and_elsewhere_is_the_same_run(run, shards, tmp_path):
    run_dir, _ = run
    words = ["train.steps=12", "eval.every=3", "data.workers=0", "log.every=2", "run.name=x", "checkpoint.keep=5",
             "train.micro_batch=2", "model.checkpoint_activations=true"]  # fmt: skip
    recipe = finetuning(run_dir, shards, *words)
    ds = DS | {"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 2}
    step, lines = check_run(run_dir, recipe, ds, spec_of(recipe))
    assert step == 6
    assert sorted(lines) == ["eval.every = 3, no longer 0", "train.steps = 12, no longer 6"]
    shutil.copytree(shards, tmp_path / "moved", ignore=shutil.ignore_patterns("source"))
    moved = finetuning(run_dir, tmp_path / "moved")
    assert check_run(run_dir, moved, DS, spec_of(moved)) == (6, [])


def test_another_precision_and_other_data_are_another_run(run):
    run_dir, recipe = run
    spec = spec_of(recipe)
    with pytest.raises(UserError, match=r"ds\.json's bf16 = None, not \{'enabled': True\}"):
        check_run(run_dir, recipe, DS | {"bf16": {"enabled": True}}, spec)
    with pytest.raises(UserError, match=r"data\.shards digest"):
        check_run(run_dir, recipe, DS, spec.model_copy(update={"digest": "0" * 64}))


def test_another_kind_of_run_is_refused(run, shards):
    run_dir, recipe = run
    pretraining = load_recipe(PretrainRecipe, [], [f"run.dir={run_dir}", f"data.shards={shards}", *MICRO])
    with pytest.raises(UserError, match="holds a finetuning, this is a pretraining"):
        check_run(run_dir, pretraining, DS, spec_of(recipe))


def test_damaged_checkpoints_are_passed_over_but_never_all(run, shards, caplog):
    run_dir, recipe = run
    newest = checkpoint(run_dir, 8, recipe)
    assert check_run(run_dir, finetuning(run_dir, shards, "train.steps=8"), DS, spec_of(recipe))[0] == 8
    size = (newest / "state.json").stat().st_size
    for content in (b"{" * size, b"\xff" * size, b"[" * size, b"\0" * size, b'{"step": 9}'.ljust(size), b"x"):
        (newest / "state.json").write_bytes(content)
        assert check_run(run_dir, recipe, DS, spec_of(recipe))[0] == 6
    assert "state.json is not as it was written" in caplog.text
    (run_dir / "checkpoints" / "step-00000006" / "complete").write_text("[]")
    with pytest.raises(UserError, match="none of its checkpoints is whole"):
        check_run(run_dir, recipe, DS, spec_of(recipe))
    (run_dir / "checkpoints" / "step-00000006" / "complete").write_text("{}")
    (run_dir / "checkpoints" / "step-00000006" / "data.json").write_bytes(b"\xff\0")
    with pytest.raises(UserError, match=r"data\.json: .*damaged"):
        check_run(run_dir, recipe, DS, spec_of(recipe))


def test_a_place_that_cannot_be_a_run_directory_is_refused(shards, tmp_path):
    (tmp_path / "file").write_text("x")
    recipe = finetuning(tmp_path / "file", shards)
    for place in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/run")):
        with pytest.raises(UserError, match=r"run\.dir"):
            check_run(place, recipe, DS, spec_of(recipe))


def test_a_held_out_split_that_was_named_must_be_there(shards, tmp_path):
    for word in ("data.eval_split=eval", "data.eval_split=", "data.fold=1"):
        data = finetuning(tmp_path, shards, word).data
        check_held_out(data, load_corpus(data))
    data = finetuning(tmp_path, shards, "data.eval_split=evla").data
    with pytest.raises(UserError, match=r"data\.eval_split = 'evla' is not in .*, which has .*eval"):
        check_held_out(data, load_corpus(data))


@pytest.mark.parametrize("several", [False, True])
def test_no_password_of_a_store_is_written_down_or_told(shards, tmp_path, monkeypatch, several):
    """config.yaml and the parameters are there for all who read MLflow; tracking.json alone needs the password."""
    monkeypatch.setattr(Spool, "deliver", lambda spool: False)
    uri = "http://anne:hunter2@127.0.0.1:9"
    recipe = finetuning(tmp_path, shards, f"log.uri={uri}", "log.finish_wait=0")
    spec, corpus = spec_of(recipe), load_corpus(recipe.data)
    url = "https://anne:p@hunter2@lab/shards"
    elsewhere = finetuning(tmp_path, f'["{url}","{url}2"]' if several else url, f"log.uri={uri}", "log.finish_wait=0")
    write_record(tmp_path, elsewhere, DS, spec)
    with tracked(Launch(elsewhere, {}), tmp_path, "x", "finetune", World(), corpus):
        pass
    for thread in threading.enumerate():
        if thread.name == "mlflow":
            thread.join()  # or it would try the real way, for minutes, and other tests' deliveries wait for it
    assert read_json(tmp_path / "tracking.json", "")["uri"] == uri
    said = [(tmp_path / name).read_text() for name in ("config.yaml", "tracking.jsonl")]
    assert all("http://***@127.0.0.1:9" in text and "https://***@lab/shards" in text for text in said)
    assert not any("hunter2" in text for text in said)
    check_run(tmp_path, elsewhere, DS, spec)


def test_one_run_at_a_time_trains_in_a_directory(tmp_path, monkeypatch, caplog):
    """Ranks that outlived their launcher, and the same command again."""
    monkeypatch.setattr("pipeline.run_directory.HELD_SECONDS", 1.0)
    monkeypatch.setattr(logging.getLogger("pipeline"), "propagate", True)
    with open_run(tmp_path / "run", World()):
        with (
            pytest.raises(UserError, match="other processes train there; end them, or") as refused,
            open_run(tmp_path / "run", World()),
        ):
            pass
        assert exit_status(refused.value) == 75  # a host that is gone loses its lock in time
        with open_run(tmp_path / "run" / "fold-1", World()):
            pass
    held = "import fcntl, sys, time; f = open(sys.argv[1], 'a'); fcntl.flock(f, 2); print(flush=True); time.sleep(600)"
    lock = tmp_path / "run" / "logs" / "lock"
    with subprocess.Popen([sys.executable, "-c", held, str(lock)], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()

        def sleep(seconds):
            other.kill()
            other.wait()

        monkeypatch.setattr("pipeline.run_directory.HELD_SECONDS", 60.0)
        monkeypatch.setattr("pipeline.run_directory.time", SimpleNamespace(monotonic=time.monotonic, sleep=sleep))
        with open_run(tmp_path / "run", World()):
            assert "waiting for 60 s" in caplog.text


REFUSAL = """
import sys
from pipeline import distributed
from pipeline.errors import UserError, exit_status, run_cli

def main():
    with distributed.session(60, seed=0) as world:
        assert distributed.decide(lambda: 7 + world.rank) == 7
        def check():
            assert world.is_main
            raise UserError("run.dir was trained otherwise", transient=True)
        try:
            distributed.decide(check)
        except UserError as error:
            open(f"{sys.argv[1]}/{world.rank}", "w").write(f"{error}, {exit_status(error)}")

run_cli(main)
"""


def test_all_ranks_end_with_the_refusal_of_rank_0(tmp_path):
    (tmp_path / "program.py").write_text(REFUSAL)
    run_ranks(2, tmp_path / "program.py", tmp_path)
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["run.dir was trained otherwise, 75"] * 2


def renamed(spec: DataSpec) -> DataSpec:
    """The same number of classes, two of them in each other's place."""
    labels = [spec.labels[1], spec.labels[0], *spec.labels[2:]]
    return spec.model_copy(update={"labels": labels})


def begin(source: Path, spec: DataSpec, shards: Path, *words: str) -> tuple[FinetuneTask, dict]:
    """A new finetuning that starts from `source`."""
    recipe = finetuning(source, shards, f"model.init={source}", *words)
    torch.manual_seed(1)
    task = FinetuneTask(recipe, spec.mel_bins, spec.frames, len(spec.labels), spec.single_label)
    return task, initialise(task, recipe, spec)


def classifier(report: dict, what: str) -> bool:
    return any(name.startswith("classifier.") for name in report[what])


def test_a_classifier_is_taken_over_only_for_the_same_labels_in_their_order(run, shards, tmp_path, caplog):
    """Wherever the weights lie: the run, its checkpoint, the file within, an export."""
    run_dir, recipe = run
    spec = spec_of(recipe)
    export_safetensors(open_exported(run_dir), tmp_path / "model.safetensors")
    step = run_dir / "checkpoints" / "step-00000006"
    caplog.set_level("INFO")
    for source in (run_dir, step, step / "weights.safetensors", tmp_path / "model.safetensors"):
        task, report = begin(source, spec, shards)
        assert classifier(report, "loaded"), source
        caplog.clear()
        task, report = begin(source, renamed(spec), shards)
        assert classifier(report, "fresh"), source
        assert not classifier(report, "loaded")
        assert "its label 0 is" in caplog.text
        assert task.state_dict().keys() - set(report["fresh"]) == set(report["loaded"])
        with pytest.raises(UserError, match="init_classifier = keep, but its label 0 is"):
            begin(source, renamed(spec), shards, "model.init_classifier=keep")


def test_settings_that_the_weights_shapes_do_not_show_are_compared(run, shards, tmp_path, caplog):
    run_dir, recipe = run
    spec = spec_of(recipe)
    export_safetensors(open_exported(run_dir), tmp_path / "model.safetensors")
    for source in (run_dir, run_dir / "checkpoints" / "step-00000006", tmp_path / "model.safetensors"):
        caplog.clear()
        begin(source, spec, shards)
        assert "which its weights fit" not in caplog.text, source
        begin(source, spec, shards, "model.activation=gelu", "model.norm=group")
        assert "was trained with model.activation = relu, which its weights fit; this run has gelu" in caplog.text
        assert "was trained with model.norm = unpadded, which its weights fit; this run has group" in caplog.text


def test_a_classifier_of_unknown_labels_is_kept_only_on_the_users_word(run, shards, tmp_path, caplog):
    run_dir, recipe = run
    spec = spec_of(recipe)
    file = tmp_path / "elsewhere" / "weights.safetensors"
    file.parent.mkdir()
    shutil.copyfile(run_dir / "checkpoints" / "step-00000006" / "weights.safetensors", file)
    caplog.set_level("INFO")
    _, report = begin(file, spec, shards)
    assert classifier(report, "fresh")
    assert classifier(report, "dropped")
    assert "nothing says what its labels are; model.init_classifier=keep" in caplog.text
    _, report = begin(file, spec, shards, "model.init_classifier=keep")
    assert classifier(report, "loaded")
    fewer = spec.model_copy(update={"labels": spec.labels[:-1]})
    with pytest.raises(UserError, match="init_classifier = keep"):
        begin(file, fewer, shards, "model.init_classifier=keep")


def test_names_of_a_hugging_face_model_are_compared_too(run, shards, tmp_path):
    run_dir, recipe = run
    spec = spec_of(recipe)
    folder = tmp_path / "hf"
    folder.mkdir()
    shutil.copyfile(run_dir / "checkpoints" / "step-00000006" / "weights.safetensors", folder / "model.safetensors")
    names = {str(number): label.name for number, label in enumerate(spec.labels)}
    write_json(folder / "config.json", {"id2label": dict(sorted(names.items()))})  # "10" before "2"
    assert classifier(begin(folder, spec, shards)[1], "loaded")
    other = [Label(id=label.id, name=f"{label.name}!") for label in spec.labels]
    assert classifier(begin(folder, spec.model_copy(update={"labels": other}), shards)[1], "fresh")
    for content in ("{", '{"id2label": {"a": "b"}}'):
        (folder / "config.json").write_text(content)
        with pytest.raises(UserError, match=r"config\.json"):
            begin(folder, spec, shards)


@pytest.mark.slow
def test_the_launcher_refuses_before_it_writes(run, shards):
    run_dir, _ = run
    before = state_of(run_dir)
    words = [f"run.dir={run_dir}", f"data.shards={shards}", *MICRO]
    for more, said in ((["finetune.bottlenecks=32"], "finetune.bottlenecks = 64, not 32"),
                       (["data.eval_split=evla"], "'evla' is not in"),
                       (["train.steps=3"], "was trained for 6 steps")):  # fmt: skip
        command = ["launchers/finetune.py", "--deepspeed_config", "zero0.json", *words, *more]
        ((status, output),) = run_ranks(1, *command, check=False)
        assert status == 2, output
        assert said in output.splitlines()[-1]
        assert "Traceback" not in output
        now = {path: state for path, state in state_of(run_dir).items() if "logs" not in path.parts}
        assert now == before
    assert json.loads((run_dir / "data.json").read_text())["digest"]
