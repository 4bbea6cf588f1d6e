"""A recipe from YAML files and `key=value` words, and back.

In: files of nested overrides, words of the command line. Out: a checked recipe; its YAML, its flat form, its help.
"""

import difflib
import math
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from pipeline.config import Effect, FinetuneRecipe, PretrainRecipe, Recipe, Section
from pipeline.errors import UserError
from pipeline.files import config_path

RecipeT = TypeVar("RecipeT", bound=Recipe)
LARGEST_YAML = 100_000  # nodes of a document, aliases followed: a recipe has two hundred


def load_recipe(kind: type[RecipeT], files: Sequence[str | Path] = (), words: Sequence[str] = ()) -> RecipeT:
    """Defaults, then each YAML file, then each `key=value`, the later one winning.

    Args:
        kind: `PretrainRecipe` or `FinetuneRecipe`.
        files: YAML files of nested overrides, by their paths or their names in configs/ (`config_path`).
        words: `section.key=value`; the value is read as YAML, that of a text setting as it stands, also empty.

    Raises:
        UserError: a file that is missing or is no mapping, an unknown key, a value of a wrong type.
    """
    merged: dict[str, Any] = {}
    for file in files:
        _merge(merged, _read_sections(config_path(file, "--config")))
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not key:
            raise UserError(f"'{word}' is not key=value; write for instance train.steps=100")
        try:
            value: Any = text if _is_text(kind, key, text) else _read_value(text)
        except ValueError as error:
            raise UserError(f"{key}: '{text:.100}' is not a YAML value ({error}); quote it") from error
        for part in reversed(key.split(".")):
            value = {part: value}
        _merge(merged, value)
    base = kind().model_dump()
    _merge(base, merged)
    try:
        return kind.model_validate(base)
    except ValidationError as error:
        raise UserError(_explain(kind, error)) from error


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML that `load_recipe` reads back to an equal recipe."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)


def flatten(recipe: Recipe) -> dict[str, Any]:
    """`{"train.steps": 100, ...}`, the form of MLflow parameters."""
    return {
        f"{section}.{key}": value
        for section, values in recipe.model_dump(mode="json").items()
        for key, value in values.items()
    }


def effect(key: str) -> Effect:
    """What the setting `section.key` states of itself; see `pipeline.config`."""
    return _EFFECTS[key]


def changes_result(key: str) -> bool:
    """A setting that can change a run's numbers."""
    return effect(key) != "neutral"


def former(recipe: Recipe) -> dict[str, Any]:
    """What runs had before a setting was there, or its default another one, where that changes the run's numbers.

    So such a run's directory, digest in an ablation and finished folds are never taken for those of today's default.
    """
    found = {"model.norm": "group"}
    if recipe.augment.mixup > 0 and recipe.data.sampler == "balanced":
        found["augment.partners"] = "sampler"
    return found


def differences(before: Recipe, now: Recipe) -> dict[str, tuple[Any, Any]]:
    """Settings that differ and can change a run's numbers, `model.init` among them: key -> (before, now).

    A run's initial weights may have moved together with the run: the same place seen from both run directories
    is no difference.
    """
    one, two = flatten(before), flatten(now)
    found = {key: (one[key], two[key]) for key in two if one[key] != two[key] and changes_result(key)}
    inits = [_seen_from(recipe.model.init, recipe.run.dir) for recipe in (before, now)]
    if before.model.init != now.model.init and not inits[0] & inits[1]:
        found["model.init"] = (before.model.init, now.model.init)
    return found


def read_run(run_dir: Path) -> PretrainRecipe | FinetuneRecipe:
    """The settings that a run directory, or one of its checkpoints, was made with; those it lacks are `former`.

    Raises:
        UserError: its config.yaml is missing, damaged, or of a version that has other settings.
    """
    path = run_dir / "config.yaml"
    return recipe_of(read_yaml(path, "give a run directory of pretrain.py or finetune.py"), path)


def recipe_of(content: Any, path: Path) -> PretrainRecipe | FinetuneRecipe:
    """The settings in what a run or an export of one recorded; those it lacks are `former`.

    Args:
        content: Of the record: sections of settings.
        path: Where it was read.

    Raises:
        UserError: it holds the settings of no run, or is damaged, or of a version that has other settings.
    """
    kinds = [kind for kind, section in ((PretrainRecipe, "pretrain"), (FinetuneRecipe, "finetune"))
             if isinstance(content, dict) and section in content]  # fmt: skip
    if len(kinds) != 1:
        raise UserError(f"{path}: holds the settings of no run; give a run directory of pretrain.py or finetune.py")
    try:
        recipe = kinds[0].model_validate(content)
    except ValidationError as error:
        raise UserError(f"{path}: {_explain(kinds[0], error)} (damaged, or written by another version)") from error
    for key, value in former(recipe).items():
        section, _, name = key.partition(".")
        values: Section = getattr(recipe, section)
        if name not in values.model_fields_set:
            recipe = recipe.model_copy(update={section: values.model_copy(update={name: value})})
    return recipe


def finetuned_recipe(run_dir: Path) -> FinetuneRecipe:
    """Settings of a finetuned run.

    Raises:
        UserError: `run_dir` is no finetuned run, or its config.yaml is damaged.
    """
    recipe = read_run(run_dir)
    if not isinstance(recipe, FinetuneRecipe):
        raise UserError(f"{run_dir}: not a finetuned run (its config.yaml has no finetune section); run finetune.py")
    return recipe


def describe(kind: type[Recipe]) -> str:
    """One line for each key with its default and meaning, for `--help`."""
    lines = []
    base = kind()
    for section in kind.model_fields:
        values: Section = getattr(base, section)
        for key, field in type(values).model_fields.items():
            default = yaml.safe_dump(values.model_dump(mode="json")[key], default_flow_style=True).split("\n")[0]
            words = ", ".join(_choices(field.annotation))
            choices = f"   {{{words}}}" if words else ""
            lines.append(f"  {section}.{key} = {default}{choices}\n      {field.description}")
    return "\n".join(lines)


def _choices(annotation: Any) -> list[str]:
    """The words that a setting may be, itself or each of its entries; none where it may be other things."""
    if get_origin(annotation) is Literal:
        return [str(word) for word in get_args(annotation)]
    inner = [part for part in get_args(annotation) if get_origin(part) is Literal]
    return [str(word) for word in get_args(inner[0])] if get_origin(annotation) is tuple and inner else []


def _read_value(text: str) -> Any:
    value = _parse(text)
    if isinstance(value, str):  # YAML 1.1 reads 5e-4 (no dot) as a string; users mean the number
        try:
            return float(value) if value.lower().lstrip("+-")[:1].isdigit() else value
        except ValueError:
            return value
    return value


class _Loader(yaml.SafeLoader):
    """YAML, but a text that PyYAML takes for a number to the base 8 or 60 is none: 012 was ten, and 10:00 six hundred.

    All that is a number here is one to PyYAML, too, so that it writes texts in quotes that look like one.
    """


_Loader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in forms if not tag.endswith((":int", ":float"))]
    for first, forms in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"[-+]?(0|[1-9][0-9_]*|0x[0-9a-fA-F]+)$"),
                              list("-+0123456789"))  # fmt: skip
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(
    r"(([-+]?[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)([eE][-+][0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"
), list("-+.0123456789"))  # fmt: skip


def _parse(text: str) -> Any:
    """One YAML document of bounded size.

    Raises:
        ValueError: it is not YAML, too large once its aliases are followed, nested too deeply, or has a key twice.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        if _expanded(node, {}) > LARGEST_YAML:
            raise ValueError(f"more than {LARGEST_YAML} values, with what its aliases repeat")
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _expanded(node: yaml.Node, known: dict[int, float]) -> float:
    """Nodes below `node`, those behind an alias counted each time; infinite where one holds itself.

    Raises:
        ValueError: a mapping has a key twice, of which PyYAML would keep the last one and say nothing.
    """
    if id(node) not in known:
        known[id(node)] = math.inf
        keys: dict[tuple[str, str], yaml.Node] = {}
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if keys.setdefault((key.tag, str(key.value)), key) is not key:
                raise ValueError(f"line {key.start_mark.line + 1}: '{key.value}' is there twice; join the two")
        below = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else (
            node.value if isinstance(node, yaml.SequenceNode) else [])  # fmt: skip
        known[id(node)] = 1 + sum(_expanded(part, known) for part in below)
    return known[id(node)]


def _is_text(kind: type[RecipeT], key: str, text: str) -> bool:
    """A setting that takes any text: run.name=007 is no number, model.init= is empty; data.shards=[...] is a list."""
    section, _, name = key.partition(".")
    field = kind.model_fields.get(section)
    fields = getattr(field.annotation, "model_fields", {}) if field else {}
    if name not in fields:
        return False
    annotation = fields[name].annotation
    kinds = [get_args(part)[0] if get_origin(part) is Annotated else part for part in get_args(annotation)]
    return annotation is str or (str in kinds and not text.lstrip().startswith("["))


def read_yaml(file: Path, remedy: str) -> Any:
    """Content of a YAML file.

    Raises:
        UserError: it cannot be read (with the remedy), or is not YAML.
    """
    try:
        return _parse(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}; {remedy}") from error
    except ValueError as error:  # an encoding too
        raise UserError(f"{file}: not YAML: {error}") from error


def _read_sections(file: Path) -> dict[str, Any]:
    content = read_yaml(file, "--config takes a YAML file, or the name of one in configs/ such as pretrain/demo")
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{file}: holds {type(content).__name__}, not sections of settings such as 'train:'")
    return content


def _merge(base: dict[str, Any], over: dict[str, Any]) -> None:
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            _merge(base[key], value)
        else:
            base[key] = value


def _explain(kind: type[Recipe], error: ValidationError) -> str:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"][:2])
    field = _field(kind, where)
    if field is None:
        known = [f"{s}.{k}" for s, v in kind().model_dump().items() for k in v]
        ending = [name for name in known if name.split(".")[1] == where.split(".")[-1]]
        near = ending[:1] or difflib.get_close_matches(where, known, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]}?" if near else "; --help lists all keys"
        return f"unknown setting {where:.100} = {first['input']!r:.100}{hint}"
    inner = [f".{part}" if isinstance(part, str) else f"[{part}]" for part in first["loc"][2:] if part != "list"]
    numbered = any(isinstance(part, int) for part in first["loc"])
    below = "".join(inner) if numbered and isinstance(first["loc"][-1], str) else ""  # of a list of sections
    said = first["msg"].removeprefix("Value error, ").replace("a valid tuple", "a list")
    if len(first["loc"]) == 1:  # of a section: several settings do not fit each other
        return f"{where}: {said}"
    text = f"{where}{below} = {first['input']!r:.100}: {said}"
    default = flatten(kind()).get(where)
    lists = [part for part in (field.annotation, *get_args(field.annotation)) if get_origin(part) is tuple]
    sections = any(isinstance(part, type) and issubclass(part, Section) for one in lists for part in get_args(one))
    if below or not lists or sections or first["type"] == "value_error":
        return text
    return f"{text}; write it as {_example(lists[0], default)}"


def _field(kind: type[Recipe], key: str) -> FieldInfo | None:
    """The setting `section.key`, or the section; None: no such."""
    section, _, name = key.partition(".")
    field = kind.model_fields.get(section)
    return getattr(field.annotation, "model_fields", {}).get(name) if field and name else field


def _example(kind: Any, default: Any) -> str:
    """A list that a setting of this type takes, as a user writes it: its default, or something short."""
    parts = default if any(default) else [1, 2] if int in get_args(kind) else [0.5, 0.75]
    return f"[{','.join(map(str, parts))}]"


def _seen_from(init: str, run_dir: str) -> set[str]:
    """The names that say where initial weights lie: as they stand, and relative to the run directory."""
    return {os.path.abspath(init), os.path.relpath(init, run_dir or ".")} if init else {""}


_EFFECTS: dict[str, Effect] = {
    f"{section}.{key}": field.json_schema_extra["effect"]
    for recipe in (PretrainRecipe(), FinetuneRecipe())
    for section, values in recipe
    for key, field in type(values).model_fields.items()
}


if __name__ == "__main__":  # python -m pipeline.recipes: every setting and its default
    sys.stdout.write(describe(PretrainRecipe) + "\n" + describe(FinetuneRecipe) + "\n")
