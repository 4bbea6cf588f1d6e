"""Recipes: overrides, round trips, what each setting states of its effect, and errors that help."""

import hashlib
from pathlib import Path

import pytest
import yaml

from pipeline.ablation.grid import Grid
from pipeline.config import FinetuneRecipe, PretrainRecipe
from pipeline.errors import UserError
from pipeline.recipes import changes_result, describe, differences, dump_recipe, flatten, load_recipe, read_run
from tests.conftest import ROOT

BOMB = "a: &a [1,1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"{name}: &{name} [{','.join([f'*{before}'] * 10)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


def test_defaults_are_the_papers():
    pretrain, finetune = load_recipe(PretrainRecipe), load_recipe(FinetuneRecipe)
    assert (pretrain.train.batch_size, pretrain.optim.lr, pretrain.pretrain.r_cl) == (180, 5e-4, 0.01)
    assert (finetune.train.batch_size, finetune.optim.lr, finetune.train.epochs) == (12, 5e-5, 25)
    assert (finetune.finetune.method, finetune.finetune.bottlenecks, finetune.model.stride) == ("swab", 64, 10)


def test_later_words_win_and_numbers_may_lack_a_dot(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("train: {steps: 5, batch_size: 8}\n")
    recipe = load_recipe(PretrainRecipe, [file], ["train.steps=7", "optim.lr=1e-4", "model.kernels=[51]"])
    assert (recipe.train.steps, recipe.train.batch_size, recipe.optim.lr) == (7, 8, 1e-4)
    assert recipe.model.kernels == (51,)


def test_text_settings_are_taken_as_they_stand():
    recipe = load_recipe(FinetuneRecipe, [], ["model.init=runs/a", "run.name=007", "run.dir=1e5"])
    assert (recipe.run.name, recipe.run.dir) == ("007", "1e5")
    assert load_recipe(FinetuneRecipe, [], ["model.init=runs/a", "model.init="]).model.init == ""


def test_a_dumped_recipe_loads_back_equal(tmp_path):
    recipe = load_recipe(FinetuneRecipe, [], ["train.steps=3", "data.fold=2"])
    file = tmp_path / "config.yaml"
    file.write_text(dump_recipe(recipe))
    assert load_recipe(FinetuneRecipe, [file]) == recipe


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("[pf]*/*.yaml")), ids=lambda path: path.name)
def test_every_shipped_recipe_loads_and_only_overrides(file):
    kind = PretrainRecipe if file.parent.name == "pretrain" else FinetuneRecipe
    changed = load_recipe(kind, [file])
    defaults = flatten(kind())
    for section, values in yaml.safe_load(file.read_text()).items():
        for key in values:
            assert flatten(changed)[f"{section}.{key}"] != defaults[f"{section}.{key}"], f"{key} repeats the default"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train.stesp=3"], "did you mean train.steps?"),
        (["train.lr=1"], "unknown setting train.lr = 1; did you mean optim.lr?"),
        (["train.steps=many"], "train.steps = 'many'"),
        (["pretrain.method=clap"], "pretrain.method = 'clap'"),
        (["steps"], "'steps' is not key=value"),
        (["finetune.folds=1,2"], "finetune.folds = '1,2': Input should be 'all'; write it as [1,2]"),
        (["data.train_split=train,eval,train"], "data.train_split = 'train,eval,train': names a split twice"),
        (["checkpoint.average=6"], "checkpoint.average = 6: Input should be a list; write it as [6,25]"),
        (["model.kernels=51"], "write it as [11,51,101]"),
        (["checkpoint.keep_at=[2]"], "give shares of the run"),
        (["checkpoint.average=[25,6]"], "checkpoint.average = [25, 6]: give the first and the last epoch, counted"),
        (["checkpoint.average=[0,5]"], "checkpoint.average = [0, 5]: give the first and the last epoch, counted"),
        (["optim.betas=[0.9,1]"], "optim.betas = 1: Input should be less than 1; write it as [0.95,0.999]"),
        (["optim.clip=true"], "optim.clip = True: takes neither true nor false (nor yes, no, on, off); give its value"),
        (["augment.mixup=yes"], "augment.mixup = True: takes neither"),  # of all clips
        (["train.steps=on"], "train.steps = True: takes neither"),  # a run of one step
        (["log.profile=[true,2]"], "log.profile = [True, 2]: takes neither"),
        (["optim.lr=nan"], "optim.lr = 'nan': Input should be a finite number"),
        (["optim.lr=.inf"], "optim.lr = inf"),
        (["data.mean=-.inf"], "data.mean = -inf"),
        (["optim.milestones=[1,.nan]"], "finite"),
        (["train.steps=" + "9" * 5000], "train.steps: '999"),
        (["train.steps=\0"], "train.steps"),
        (["run.dir=a\0b"], "run.dir"),
        (["run.dir=~nobody-of-this-name/x"], "run.dir = '~nobody-of-this-name/x'"),
        (["model.kernels=" + "[" * 1500], "nested too deeply"),
        (["model.kernels=&a [*a]"], "aliases"),
        (["run.seed=9999999999999999999999"], "run.seed"),
    ],
)
def test_errors_name_key_value_and_remedy(words, said):
    with pytest.raises(UserError) as error:
        load_recipe(FinetuneRecipe if words[0].startswith(("fine", "check")) else PretrainRecipe, [], words)
    assert said in str(error.value)
    assert len(str(error.value)) < 600


@pytest.mark.parametrize(
    "content", [BOMB.encode(), b"[" * 1500, b"train: {steps: \xff}", b"a: b: c", b"a: &a\n  b: *a\n", b"train: \0"]
)
def test_files_that_are_no_sane_yaml_are_one_line(tmp_path, content):
    file = tmp_path / "x.yaml"
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"x\.yaml: not YAML: "):
        load_recipe(PretrainRecipe, [file])
    with pytest.raises(UserError, match=r"x\.yaml: not YAML: "):
        Grid([file], "micro", {})


@pytest.mark.parametrize("in_file", [False, True])
def test_numbers_are_to_the_base_ten(tmp_path, in_file):
    """Seeds 007, 08 and 010 of a loop in a shell were 7, 8 and 8."""

    def read(key: str, value: str) -> PretrainRecipe:
        section, name = key.split(".")
        (tmp_path / "x.yaml").write_text(f"{section}: {{{name}: {value}}}")
        return load_recipe(PretrainRecipe, [tmp_path / "x.yaml"] if in_file else [],
                           [] if in_file else [f"{key}={value}"])  # fmt: skip

    assert [read("run.seed", word).run.seed for word in ("007", "08", "010", "1_000", "0x10", "0")] == [
        7, 8, 10, 1000, 16, 0]  # fmt: skip
    rates = ("5e-4", "1.0e-3", ".5", "1.0e-03", "010.5")
    assert [read("optim.lr", word).optim.lr for word in rates] == [5e-4, 1e-3, 0.5, 1e-3, 10.5]
    with pytest.raises(UserError, match=r"train\.steps = '?10:00'?"):
        read("train.steps", "10:00")
    for name in ("012", "10:00", "1.0e5", "0x10", "1_0", "007", "1.5", "2026-11-28", "yes", "~"):
        recipe = load_recipe(PretrainRecipe, [], [f"run.name={name}"])
        (tmp_path / "again.yaml").write_text(dump_recipe(recipe))
        assert load_recipe(PretrainRecipe, [tmp_path / "again.yaml"]).run.name == name


@pytest.mark.parametrize("text", ["optim: {lr: 1}\ntrain: {steps: 3}\noptim:\n  warmup: 7\n",
                                  "train:\n  steps: 3\noptim: {clip: 1,\n  clip: 2}\n"])  # fmt: skip
def test_a_key_that_is_there_twice_is_refused(tmp_path, text):
    """PyYAML keeps the last one: the settings of the first section would be lost."""
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(UserError, match=r"x\.yaml: not YAML: line [34]: '(optim|clip)' is there twice; join the two"):
        load_recipe(PretrainRecipe, [tmp_path / "x.yaml"])
    with pytest.raises(UserError, match=r"optim: '\{lr: 1, lr: 2\}' is not a YAML value"):
        load_recipe(PretrainRecipe, [], ["optim={lr: 1, lr: 2}"])


def test_anchors_and_merge_keys_are_yaml(tmp_path):
    file = tmp_path / "x.yaml"
    file.write_text("eval: &often {every: 5}\neval_again: *often\n")
    with pytest.raises(UserError, match="unknown setting eval_again"):
        load_recipe(PretrainRecipe, [file])
    file.write_text("eval: &often {every: 5}\ncheckpoint: {<<: *often, keep: 3}\n")
    assert load_recipe(PretrainRecipe, [file]).checkpoint.every == 5


def test_home_directories_are_expanded_in_every_setting_that_is_a_path(tmp_path, monkeypatch):
    """The settings whose words say directory, path or file; a URL or a name with a ~ within stays as it is."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.yaml").write_text("data: {shards: ~/shards}\n")
    words = ["run.dir=~/runs/x", "model.init=~/pre", "data.cache=~/cache", "eval.probe=~/probe"]
    recipe = load_recipe(FinetuneRecipe, ["~/a.yaml"], words)
    assert [recipe.data.shards, recipe.run.dir, recipe.model.init, recipe.data.cache, recipe.eval.probe] == [
        str(tmp_path / name) for name in ("shards", "runs/x", "pre", "cache", "probe")]  # fmt: skip
    kept = load_recipe(FinetuneRecipe, [], ["data.shards=s3://bucket//~x", "run.dir=runs/~x", "run.name=~"])
    assert (kept.data.shards, kept.run.dir, kept.run.name) == ("s3://bucket//~x", "runs/~x", "~")
    with pytest.raises(UserError, match="--config"):
        load_recipe(FinetuneRecipe, [""])


# What had no effect on a result when the first ablations ran; three settings of the cache were forgotten then.
ONCE_WITHOUT_EFFECT = {
    "run.dir", "run.name", "run.resume", "run.timeout", "data.shards", "data.workers", "data.prefetch",
    "data.on_error", "data.max_bad", "model.init", "model.checkpoint_activations", "train.micro_batch",
    "train.max_bad_steps", "checkpoint.every", "checkpoint.keep", "checkpoint.keep_best",
    "checkpoint.keep_every", "checkpoint.keep_at",
}  # fmt: skip


@pytest.mark.parametrize("kind", [PretrainRecipe, FinetuneRecipe])
def test_every_setting_states_whether_it_changes_results(kind):
    stated = {
        f"{section}.{key}": (field.json_schema_extra or {}).get("effect")
        for section, values in kind()
        for key, field in type(values).model_fields.items()
    }
    assert stated.keys() == flatten(kind()).keys()
    assert set(stated.values()) == {"result", "course", "neutral"}
    neutral = {key for key, effect in stated.items() if effect == "neutral"}
    log = {key for key in stated if key.startswith("log.")}
    later = {"data.max_bad_share", "data.cache", "data.cache_gb", "data.fetch_ahead", "eval.probe", "eval.probe_clips",
             "eval.probe_every"}  # fmt: skip
    assert neutral == ONCE_WITHOUT_EFFECT | log | later
    assert {key for key in stated if not changes_result(key)} == neutral


NAMES = [("paper", 112, "adaef32e8041e5c7"), ("micro", 79, "68c77d7d50dbd838")]


@pytest.mark.parametrize(("scale", "runs", "digest"), NAMES)
def test_finished_ablations_keep_their_names(scale, runs, digest):
    """With other names finished runs would be trained again: a change of theirs must be meant."""
    files = sorted(file for file in (ROOT / "configs/ablation").glob("*.yaml") if file.stem != "beyond")
    folders = [run.folder for run in Grid(files, scale, {}).runs]
    assert len(folders) == runs
    assert hashlib.sha256("\n".join(folders).encode()).hexdigest()[:16] == digest


def test_settings_of_the_cache_are_no_difference_between_runs():
    words = ["data.cache=/nvme", "data.cache_gb=7", "data.fetch_ahead=0", "log.every=3", "data.workers=5"]
    assert differences(FinetuneRecipe(), load_recipe(FinetuneRecipe, [], words)) == {}
    assert differences(FinetuneRecipe(), load_recipe(FinetuneRecipe, [], ["optim.lr=1"])) == {"optim.lr": (5e-5, 1.0)}


def test_initial_weights_that_moved_together_with_the_run_are_the_same(tmp_path, monkeypatch):
    def recipe(run_dir: Path | str, init: Path | str) -> FinetuneRecipe:
        return load_recipe(FinetuneRecipe, [], [f"run.dir={run_dir}", f"model.init={init}"])

    before = recipe(tmp_path / "a" / "fine", tmp_path / "a" / "pre")
    assert differences(before, recipe(tmp_path / "b" / "fine", tmp_path / "b" / "pre")) == {}
    monkeypatch.chdir(tmp_path)
    assert differences(before, recipe("a/fine", "a/pre")) == {}
    other = recipe(tmp_path / "a" / "fine", tmp_path / "a" / "other")
    assert list(differences(before, other)) == ["model.init"]
    assert list(differences(before, recipe(tmp_path / "a" / "fine", ""))) == ["model.init"]


def test_a_config_without_a_setting_has_what_runs_had_before_it(tmp_path):
    """Only where it changed their numbers: other runs go on as they are."""
    for sampler, mixup, partners in (("balanced", 0.5, "sampler"), ("balanced", 0, "uniform"),
                                     ("shuffle", 0.5, "uniform")):  # fmt: skip
        words = [f"data.sampler={sampler}", f"augment.mixup={mixup}"]
        content = load_recipe(FinetuneRecipe, [], words).model_dump(mode="json")
        del content["augment"]["partners"], content["model"]["norm"]
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
        before = read_run(tmp_path)
        assert (before.augment.partners, before.model.norm) == (partners, "group")
        found = differences(before, load_recipe(FinetuneRecipe, [], [*words, "model.norm=group"]))
        assert found == ({} if partners == "uniform" else {"augment.partners": ("sampler", "uniform")})


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("finetune: {dropout: 0.1}\n", "unknown setting finetune.dropout = 0.1.*another version"),
        ("finetune: {bottlenecks: many}\n", "finetune.bottlenecks = 'many'"),
        ("run: {dir: [\n", "not YAML"),
        ("[1, 2]\n", "holds the settings of no run"),
        ("run: {seed: 1}\n", "holds the settings of no run"),
        ("", "holds the settings of no run"),
        (BOMB, "not YAML"),
    ],
)
def test_a_config_of_another_version_or_damaged_is_one_line(tmp_path, content, said):
    (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(UserError, match=r"config\.yaml: ") as error:
        read_run(tmp_path)
    assert error.match(said)
    with pytest.raises(UserError, match="No such file"):
        read_run(tmp_path / "not there")


def test_help_describes_every_key():
    text = describe(FinetuneRecipe)
    assert all(f"{key} = " in text for key in flatten(FinetuneRecipe()))
    for line in ("optim.schedule = plateau   {plateau, step, cosine, constant}\n",
                 "pretrain.drop = [random, random]   {random, cluster, time, frequency}\n"):  # fmt: skip
        assert line in describe(PretrainRecipe)
