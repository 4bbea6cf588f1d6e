"""Recipes: overrides, round trips, and errors that help."""

import pytest
import yaml

from pipeline.config import FinetuneRecipe, PretrainRecipe
from pipeline.errors import UserError
from pipeline.recipes import describe, dump_recipe, flatten, load_recipe
from tests.conftest import ROOT


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
        (["train.steps=many"], "train.steps = 'many'"),
        (["pretrain.method=clap"], "pretrain.method = 'clap'"),
        (["steps"], "'steps' is not key=value"),
    ],
)
def test_errors_name_key_value_and_remedy(words, said):
    with pytest.raises(UserError) as error:
        load_recipe(PretrainRecipe, [], words)
    assert said in str(error.value)


def test_help_describes_every_key():
    text = describe(FinetuneRecipe)
    assert all(f"{key} = " in text for key in flatten(FinetuneRecipe()))
