"""A recipe from YAML files and `key=value` words, and back.

In: files of nested overrides, words of the command line. Out: a checked recipe; its YAML, its flat form, its help.
"""

import difflib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from pipeline.config import FinetuneRecipe, PretrainRecipe, Recipe, Section
from pipeline.errors import UserError

RecipeT = TypeVar("RecipeT", bound=Recipe)
# Settings that change no result: where, how fast, and what is kept. Those of log.* are of the same kind.
WITHOUT_EFFECT = frozenset({
    "run.dir", "run.name", "run.resume", "run.timeout", "data.shards", "data.workers", "data.prefetch",
    "data.on_error", "data.max_bad", "model.init", "model.checkpoint_activations", "train.micro_batch",
    "train.max_bad_steps", "checkpoint.every", "checkpoint.keep", "checkpoint.keep_best",
    "checkpoint.keep_every", "checkpoint.keep_at",
})  # fmt: skip


def load_recipe(kind: type[RecipeT], files: Sequence[str | Path] = (), words: Sequence[str] = ()) -> RecipeT:
    """Defaults, then each YAML file, then each `key=value`, the later one winning.

    Args:
        kind: `PretrainRecipe` or `FinetuneRecipe`.
        files: YAML files of nested overrides.
        words: `section.key=value`; the value is read as YAML, that of a text setting as it stands, also empty.

    Raises:
        UserError: a file that is missing or is no mapping, an unknown key, a value of a wrong type.
    """
    merged: dict[str, Any] = {}
    for file in files:
        _merge(merged, _read_sections(Path(file)))
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not key:
            raise UserError(f"'{word}' is not key=value; write for instance train.steps=100")
        try:
            value: Any = text if _is_text(kind, key) else _read_value(text)
        except yaml.YAMLError as error:
            raise UserError(f"{key}: '{text}' is not a YAML value; quote it") from error
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


def changes_result(key: str) -> bool:
    """A setting that can change a run's numbers."""
    return key not in WITHOUT_EFFECT and not key.startswith("log.")


def describe(kind: type[Recipe]) -> str:
    """One line for each key with its default and meaning, for `--help`."""
    lines = []
    base = kind()
    for section in kind.model_fields:
        values: Section = getattr(base, section)
        for key, field in type(values).model_fields.items():
            default = yaml.safe_dump(values.model_dump(mode="json")[key], default_flow_style=True).split("\n")[0]
            lines.append(f"  {section}.{key} = {default}\n      {field.description}")
    return "\n".join(lines)


def _read_value(text: str) -> Any:
    value = yaml.safe_load(text)
    if isinstance(value, str):  # YAML 1.1 reads 5e-4 (no dot) as a string; users mean the number
        try:
            return float(value) if value.lower().lstrip("+-")[:1].isdigit() else value
        except ValueError:
            return value
    return value


def _is_text(kind: type[Recipe], key: str) -> bool:
    """A setting that takes any text: run.name=007 is no number, model.init= is empty."""
    section, _, name = key.partition(".")
    field = kind.model_fields.get(section)
    fields = getattr(field.annotation, "model_fields", {}) if field else {}
    return name in fields and fields[name].annotation is str


def read_yaml(file: Path, remedy: str) -> Any:
    """Content of a YAML file.

    Raises:
        UserError: it cannot be read (with the remedy), or is not YAML.
    """
    try:
        return yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}; {remedy}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{file}: not YAML: {error}") from error


def _read_sections(file: Path) -> dict[str, Any]:
    content = read_yaml(file, "--config takes a YAML file such as those in configs/")
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
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] != "extra_forbidden":
        return f"{where} = {first['input']!r}: {first['msg']}"
    known = [f"{s}.{k}" for s, v in kind().model_dump().items() for k in v]
    near = difflib.get_close_matches(where, known, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]}?" if near else "; --help lists all keys"
    return f"unknown setting {where} = {first['input']!r}{hint}"


if __name__ == "__main__":  # python -m pipeline.recipes: every setting and its default
    sys.stdout.write(describe(PretrainRecipe) + "\n" + describe(FinetuneRecipe) + "\n")
