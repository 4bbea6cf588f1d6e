"""Cross-validation: one finetuning a fold, each held out in turn, and what they come to together.

In: a launched recipe with `finetune.folds`. Out: RUN_DIR/fold-K, a whole run directory for each fold, and
RUN_DIR/results.json: mean and spread over the folds at the last epoch, and at the epoch whose mean is best,
the same for all folds (the paper's ESC-50 protocol, after SSAST).

    RUN_DIR/fold-3/           as of `data.fold=3`, with the same numbers; in MLflow a child of this run
    RUN_DIR/fold-3/fold.json  the fold is done: it is not run again

The folds run one after the other in the same processes. The same command again goes on: finished folds are
kept, the interrupted one goes on from its newest checkpoint.
"""

import gc
import logging
import math
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import distributed
from pipeline.command_line import Launch
from pipeline.config import FinetuneRecipe
from pipeline.data.corpus import load_corpus
from pipeline.data.manifest import load_index
from pipeline.data.spec import DataSpec
from pipeline.distributed import World
from pipeline.engine.checkpoint import complete_checkpoints
from pipeline.engine.setup import reconcile
from pipeline.errors import UserError
from pipeline.files import check_output_directory, read_json, write_json
from pipeline.recipes import differences, read_run
from pipeline.run_directory import check_ranks, check_run, open_run, write_record
from pipeline.train import finetune, finetuning_name, tracked

log = logging.getLogger(__name__)


def cross_validate(launch: Launch[FinetuneRecipe], world: World) -> dict[str, Any]:
    """Runs the folds that are not done; returns the content of `results.json`, on all ranks.

    Args:
        launch: Command line.
        world: Ranks.

    Raises:
        UserError: settings that do not fit, clips without labels, or a finished fold of other settings.
    """
    recipe, name = launch.recipe, f"{finetuning_name(launch.recipe)}-folds"
    ds, _ = reconcile(launch.ds, recipe, world)
    corpus = load_corpus(recipe.data, labelled=True)
    folds = choose_folds(recipe)
    run_dir = Path(recipe.run.dir or f"runs/finetune-{name}")
    parts = {fold: fold_launch(launch, run_dir, name, fold) for fold in folds}
    spec = DataSpec.of(corpus, recipe.data)
    check_ranks(recipe, ds, spec)
    done = distributed.decide(lambda: _check(launch, ds, spec, run_dir, name, parts))
    with ExitStack() as stack:
        stack.enter_context(open_run(run_dir, world))
        distributed.decide(lambda: write_record(run_dir, recipe, ds, spec))  # as each fold's directory has it
        tracker = stack.enter_context(tracked(launch, run_dir, name, "cross-validation", world, corpus))
        for number, (fold, part) in enumerate(parts.items(), start=1):
            if fold in done:
                log.info("fold %d is done (%d of %d)", fold, number, len(folds))
                continue
            log.info("fold %d (%d of %d): %s", fold, number, len(folds), part.recipe.run.dir)
            distributed.seed_host(recipe.run.seed)  # a fold is the run that it would be alone
            finetune(part, world)
            if world.is_main:  # the fold is done: its result, and the held-out metric of each evaluated epoch
                folder = Path(part.recipe.run.dir)
                result = read_json(folder / "results.json", "delete it to finish that fold again")
                kept = {key: result[key] for key in ("metric", "value", "clips", "weights", "shards_digest", "epochs")}
                write_json(folder / "fold.json", {"fold": fold, **kept})
            gc.collect()  # an engine holds itself in cycles: its memory is the next fold's
        content = distributed.decide(
            lambda: summarise({fold: read_fold(Path(part.recipe.run.dir)) for fold, part in parts.items()})
        )
        content |= {"pool": recipe.finetune.pool, "sampler": recipe.data.sampler}
        if world.is_main:
            write_json(run_dir / "results.json", content)
        tracker.summary({f"final_{content['metric']}": content["value"]}, 0)
        for epoch, value in content["epochs"].items():
            tracker.summary({f"mean_eval_{content['metric']}": value}, int(epoch))
        tracker.artifact(run_dir / "results.json")
    return content


def choose_folds(recipe: FinetuneRecipe) -> list[int]:
    """The folds that `finetune.folds` names.

    Raises:
        UserError: the shards have none, or not that one, or other settings contradict.
    """
    wanted, data = recipe.finetune.folds, recipe.data
    if data.fold:
        raise UserError(f"finetune.folds = {wanted} and data.fold = {data.fold} both say what is held out; give one")
    if recipe.log.register_as:
        raise UserError(
            f"log.register_as = {recipe.log.register_as}: each fold has a model of its own; register one of them "
            "afterwards with python -m pipeline.serving RUN_DIR/fold-K --register NAME"
        )
    if not isinstance(data.shards, str):
        raise UserError(f"finetune.folds = {wanted}: several sets of shards have no folds in common; give one set")
    location = data.shards
    found = [load_index(location, split, columns=["fold"])["fold"].to_pylist() for split in data.train_split.split(",")]
    known = sorted(set().union(*found) - {0})
    if len(known) < 2:
        raise UserError(
            f"finetune.folds = {wanted}: split '{data.train_split}' of {data.shards} has no folds; build them from "
            "ESC-50, or from a table with a column fold"
        )
    if wanted == "all":
        return known
    unknown = sorted(set(wanted) - set(known))
    if unknown or len(set(wanted)) < len(wanted):
        raise UserError(f"finetune.folds = {list(wanted)}: the shards have the folds {known}; name each once, or all")
    return sorted(wanted)


def fold_launch(launch: Launch[FinetuneRecipe], run_dir: Path, name: str, fold: int) -> Launch[FinetuneRecipe]:
    """The command line of one fold's finetuning."""
    recipe = launch.recipe
    run = recipe.run.model_copy(update={"dir": str(run_dir / f"fold-{fold}"), "name": f"{name[:-1]}-{fold}"})
    update = {
        "run": run,
        "data": recipe.data.model_copy(update={"fold": fold}),
        "finetune": recipe.finetune.model_copy(update={"folds": ()}),
    }
    return replace(launch, recipe=recipe.model_copy(update=update), part_of=run_dir)


def read_fold(run_dir: Path) -> dict[str, Any]:
    """`fold.json` of a finished fold."""
    content: dict[str, Any] = read_json(run_dir / "fold.json", "delete it to finish that fold again")
    return content


def summarise(folds: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """Mean and spread over folds, at the end and at the best common epoch.

    The common epoch is chosen by the held-out clips themselves, as SSAST does, so its number is optimistic;
    `value` is not chosen by anything.
    """
    common = sorted(set.intersection(*(set(map(int, part["epochs"])) for part in folds.values())))
    table = {epoch: _numbers([part["epochs"][str(epoch)] for part in folds.values()]) for epoch in common}
    values = _numbers([part["value"] for part in folds.values()])
    defined = [epoch for epoch in common if not np.isnan(table[epoch]).any()]
    best = max(defined, key=lambda epoch: (np.mean(table[epoch]), -epoch), default=0)
    first = next(iter(folds.values()))
    return {
        "metric": first["metric"],
        "value": float(np.mean(values)),
        "spread": _spread(values),
        "weights": first["weights"],
        "clips": sum(part["clips"] for part in folds.values()),
        "folds": {str(fold): part["value"] for fold, part in folds.items()},
        "common_epoch": {
            "epoch": best,
            "value": float(np.mean(table[best])),
            "spread": _spread(table[best]),
            "folds": {str(fold): part["epochs"][str(best)] for fold, part in folds.items()},
        } if best else None,
        "epochs": {str(epoch): float(np.mean(table[epoch])) for epoch in common},
        "shards_digest": first["shards_digest"],
    }  # fmt: skip


def _numbers(values: list[float | None]) -> list[float]:
    """Metrics of JSON, where null is one that is undefined: no clip of the fold had a class."""
    return [math.nan if value is None else value for value in values]


def _spread(values: list[float]) -> float | None:
    """Standard deviation over folds; None of a single one."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def _check(
    launch: Launch[FinetuneRecipe], ds: dict[str, Any], spec: DataSpec, run_dir: Path, name: str,
    parts: dict[int, Launch[FinetuneRecipe]],
) -> list[int]:  # fmt: skip
    """The folds that are done; writes nothing. For rank 0.

    Raises:
        UserError: the directory holds a single run, or folds of other settings or data, or cannot be written.
    """
    finished = read_run(run_dir) if (run_dir / "results.json").exists() else None
    folded = isinstance(finished, FinetuneRecipe) and finished.finetune.folds
    if complete_checkpoints(run_dir) or (finished and not folded):
        raise UserError(f"run.dir = {run_dir} holds a single run, this is a cross-validation; give another run.dir")
    check_output_directory(run_dir, "run.dir")
    found = {int(file.parent.name.removeprefix("fold-")) for file in run_dir.glob("fold-*/config.yaml")
             if file.parent.name.removeprefix("fold-").isdecimal()}  # fmt: skip
    others = {fold: fold_launch(launch, run_dir, name, fold) for fold in found - parts.keys()}  # they would count too
    done = []
    for fold, part in sorted({**parts, **others}.items()):
        folder = Path(part.recipe.run.dir)
        if not (folder / "fold.json").exists():
            check_run(folder, part.recipe, ds, spec)
            continue
        for key, (before, now) in differences(read_run(folder), part.recipe).items():
            raise UserError(
                f"{folder} is done with {key} = {before}, not {now}; folds of different settings do not compare: go on "
                "with that, or give another run.dir"
            )
        if read_fold(folder)["shards_digest"] != spec.digest:
            raise UserError(f"{folder} is done on other shards than {part.recipe.data.shards}; give another run.dir")
        done.append(fold)
    return done
