"""Tables of the paper -> the distinct runs that fill them.

In: table files (`configs/ablation/*.yaml`) and a scale (`configs/ablation/scale/*.yaml`). Out: `Table`s
whose cells name `Run`s; a run that several cells need is one object.

A run's identity is the hash of every setting that differs from its default and can change a result,
of its data set's name and, for finetuning, of the pretraining it starts from. Paths, logging, workers and
micro-batches do not count: they change no number. A later release's new settings do not count either
as long as they stay at their defaults; one whose default has changed counts at its new one.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.config import FinetuneRecipe, PretrainRecipe, Recipe, UserPath
from pipeline.errors import UserError
from pipeline.files import shipped, user_path
from pipeline.methods import FINETUNE, PRETRAIN
from pipeline.recipes import changes_result, flatten, former, load_recipe, read_yaml

ROOT = Path(__file__).resolve().parents[2]
STRICT = ConfigDict(extra="forbid", frozen=True)  # an unknown key of a file is an error
ModelT = TypeVar("ModelT", bound=BaseModel)
RecipeT = TypeVar("RecipeT", PretrainRecipe, FinetuneRecipe)


class Row(BaseModel, **STRICT):
    """One system of a table."""

    name: str
    recipe: str = Field("", description="of the pretraining, in configs/pretrain/; empty: the table's")
    both: dict[str, Any] = Field({}, description="settings of pretraining and finetuning")
    pretrain: dict[str, Any] = Field({}, description="settings of the pretraining")
    scratch: bool = Field(False, description="no pretraining: finetuned from random weights")
    finetune: dict[str, Any] = Field({}, description="settings of the finetuning")
    paper: dict[str, float | None] = Field({}, description="column -> the paper's number in percent, or null")
    run: bool = Field(True, description="false: shown only, somebody else's system")
    ensemble: bool = Field(False, description="mean of the runs' probabilities instead of the mean of their metrics")
    seeds: tuple[int, ...] = Field((), description="of the finetuning; empty: the table's")


class Table(BaseModel, **STRICT):
    """A file of configs/ablation/."""

    title: str
    kind: Literal["table", "figure"] = "table"
    columns: tuple[str, ...] = Field(description="tasks of the scale file")
    rows: tuple[Row, ...]
    recipe: str = Field("", description="of the rows' pretrainings, in configs/pretrain/; empty: the defaults")
    reference: str = Field("", description="row that the others are compared with; empty: the last one that is run")
    seeds: tuple[int, ...] = Field((0,), description="of the finetuning")
    pretrain_seeds: tuple[int, ...] = Field((0,), description="of the pretraining")
    shares: tuple[float, ...] = Field((1.0,), description="finetune from checkpoints at these shares")
    note: str = Field("", description="a sentence for the caption")


class DataSet(BaseModel, **STRICT):
    """Shards by name."""

    shards: UserPath = Field(description="directory; OUT stands for --out")
    build: str = Field("", description="options of build_shards.py that make them where they are missing")


class Task(BaseModel, **STRICT):
    """What a column stands for: data, recipe files, folds."""

    title: str
    data: str
    config: tuple[str, ...] = ()
    settings: dict[str, Any] = {}
    folds: tuple[int, ...] = (0,)


class Scale(BaseModel, **STRICT):
    """A file of configs/ablation/scale/."""

    about: str = Field(description="a sentence for captions: which data, how small")
    data: dict[str, DataSet]
    pretrain: Task
    tasks: dict[str, Task]
    note: str = Field("", description="sentences for the caption of every table")
    substitute: dict[str, dict[Any, Any]] = Field({}, description="setting -> {the paper's value: this scale's}")


@dataclass(eq=False)
class Run:
    """One launch of pretrain.py or finetune.py.

    Attributes:
        kind: Which of the two.
        name: BatchSize-Pretrain[-Finetune], as the paper writes it.
        digest: Of everything that decides its result, 10 hex digits.
        recipe: Resolved settings, without directories.
        data: Name of its data set.
        task: Column that it belongs to; empty for pretraining.
        init: Pretraining that it starts from; None: random weights.
        share: Of that pretraining, where its checkpoint is taken.
        used_by: Table -> its rows, for tags.
    """

    kind: Literal["pretrain", "finetune"]
    name: str
    digest: str
    recipe: Recipe
    data: str
    task: str = ""
    init: "Run | None" = None
    share: float = 1.0
    used_by: dict[str, list[str]] = field(default_factory=dict)

    @property
    def folder(self) -> str:
        """Name of its run directory."""
        return "-".join(filter(None, (self.name, self.task, self.digest)))

    @property
    def about(self) -> str:
        """What distinguishes it from runs of the same name, for people."""
        parts = [f"seed {self.recipe.run.seed}"]
        parts += [f"fold {self.recipe.data.fold}"] if self.recipe.data.fold else []
        parts += [f"{self.share:.0%} of pretraining"] if self.share != 1.0 else []
        return ", ".join(filter(None, (self.task, *parts)))


class Grid:
    """Tables over shared runs.

    Args:
        files: Table files.
        scale: Name in configs/ablation/scale/, or a path.
        shards: Data set name -> directory, over the scale's.
        seeds: Of the finetunings, over the tables'; or of each table, by its name.

    Attributes:
        scale: Data, tasks and sizes.
        tables: By the name of the file, without its ending.
        cells: (table, row, column) -> its finetunings; nothing of rows that are only shown.
        runs: Each distinct one once: pretrainings, then finetunings, in order of appearance.

    Raises:
        UserError: a file that cannot be read, a key, column or setting that is unknown.
    """

    def __init__(
        self, files: Sequence[Path], scale: str, shards: dict[str, str],
        seeds: Sequence[int] | Mapping[str, Sequence[int]] = (),
    ) -> None:  # fmt: skip
        named = scale and not scale.endswith(".yaml")
        path = shipped(f"ablation/scale/{scale}.yaml") if named else user_path(scale, "--scale")
        self.scale = _read(Scale, path)
        for name in shards:
            if name not in self.scale.data:
                known = ", ".join(self.scale.data)
                raise UserError(f"--shards {name}=...: {path} knows the data sets {known}; name one of them")
        data = {n: DataSet(shards=shards[n]) if n in shards else d for n, d in self.scale.data.items()}
        self.scale = self.scale.model_copy(update={"data": data})
        self.tables: dict[str, Table] = {}
        for file in files:
            if file.stem in self.tables:
                raise UserError(f"{file}: two tables are named {file.stem}; give each once, or rename a file")
            self.tables[file.stem] = _read(Table, file)
        self.cells: dict[tuple[str, str, str], list[Run]] = {}
        self._distinct: dict[str, Run] = {}
        for file in files:
            self._fill(file, tuple(seeds.get(file.stem, ()) if isinstance(seeds, Mapping) else seeds))
        self.runs = sorted(self._distinct.values(), key=lambda run: run.kind != "pretrain")  # stable

    def _fill(self, file: Path, seeds: tuple[int, ...]) -> None:
        """The runs of a table's cells."""
        table = self.tables[file.stem]
        names = [row.name for row in table.rows]
        for row in table.rows:
            if names.count(row.name) > 1:
                raise UserError(f"{file}: two rows are named '{row.name}'; give each its own name")
            if row.run and not row.paper:
                raise UserError(
                    f"{file}: row '{row.name}' is run in no column; name its columns under paper, with null where the "
                    "paper has no number, or set run: false"
                )
            unknown = set(row.paper) - set(table.columns)
            if unknown:
                raise UserError(f"{file}: row '{row.name}': {unknown.pop()} is not a column; those are {table.columns}")
        for column in table.columns:
            if column not in self.scale.tasks:
                known = ", ".join(self.scale.tasks)
                raise UserError(f"{file}: column '{column}' is no task of the scale, which has {known}")
        for row in (row for row in table.rows if row.run):
            for column in (column for column in table.columns if column in row.paper):
                runs = list(dict.fromkeys(self._cell(table, row, column, seeds)))  # a seed given twice is one run
                self.cells[file.stem, row.name, column] = runs
                for used in filter(None, [*runs, *(run.init for run in runs)]):
                    names = used.used_by.setdefault(file.stem, [])
                    names += [row.name] if row.name not in names else []

    def _cell(self, table: Table, row: Row, column: str, seeds: tuple[int, ...]) -> Iterable[Run]:
        task = self.scale.tasks[column]
        for pretrain_seed in table.pretrain_seeds[: 1 if row.scratch else None]:
            pretraining = None if row.scratch else self._pretraining(table, row, pretrain_seed)
            before = pretraining.name if pretraining else "Scratch"
            for share in (1.0,) if row.scratch else table.shares:
                for seed in row.seeds or seeds or table.seeds:
                    for fold in task.folds:
                        extra = {**row.both, **row.finetune, "run.seed": seed, "data.fold": fold}
                        recipe = self._recipe(FinetuneRecipe, task, extra)
                        label = FINETUNE[recipe.finetune.method].label
                        yield self._once("finetune", f"{before}-{label}", recipe, task.data, column,
                                         pretraining, share)  # fmt: skip

    def _pretraining(self, table: Table, row: Row, seed: int) -> Run:
        task, name = self.scale.pretrain, row.recipe or table.recipe
        if name:
            task = task.model_copy(update={"config": (f"configs/pretrain/{name}.yaml", *task.config)})
        recipe = self._recipe(PretrainRecipe, task, {**row.both, **row.pretrain, "run.seed": seed})
        name = f"{recipe.train.batch_size}-{PRETRAIN[recipe.pretrain.method].label}"
        return self._once("pretrain", name, recipe, task.data)

    def _recipe(self, kind: type[RecipeT], task: Task, extra: dict[str, Any]) -> RecipeT:
        files = [shipped(file.removeprefix("configs/")) for file in task.config]
        words = [f"{key}={_text(value)}" for key, value in {**task.settings, **extra}.items()]
        values = flatten(load_recipe(kind, files, words))
        for key, table in self.scale.substitute.items():
            if key in values and values[key] in table:
                words.append(f"{key}={_text(table[values[key]])}")
        return load_recipe(kind, files, words)

    def _once(
        self, kind: Literal["pretrain", "finetune"], name: str, recipe: Recipe, data: str, task: str = "",
        init: Run | None = None, share: float = 1.0,
    ) -> Run:  # fmt: skip
        base = flatten(type(recipe)()) | former(recipe)
        content = {
            "kind": kind,
            "data": data,
            "init": init.digest if init else "",
            "share": share,
            "settings": {k: v for k, v in flatten(recipe).items() if v != base[k] and changes_result(k)},
        }
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:10]
        run = Run(kind, name, digest, recipe, data, task, init, share)
        return self._distinct.setdefault(f"{digest}-{task}", run)


def _text(value: Any) -> str:
    """A value as `key=value` takes it: text as it stands, the rest as YAML."""
    return value if isinstance(value, str) else json.dumps(value)


def _read(kind: type[ModelT], path: Path) -> ModelT:
    content = read_yaml(path, "tables lie in configs/ablation/, scales in its scale/")
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(f"{path}: {where}: {first['msg']} ({str(first['input'])[:60]})") from error
