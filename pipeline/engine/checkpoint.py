"""Checkpoints that are whole or do not count, for any ranks, any ZeRO stage and any precision.

In: the engine and the trainer's state. Out: `checkpoints/step-XXXXXXXX/`:

    weights.safetensors             float32 weights, consolidated from any ZeRO stage
    average.safetensors             averaged weights, where there are some
    teacher.safetensors             a teacher's, float32; `model.init` and probe.py read the file, if it is named
    optimizer-I-of-R.safetensors    Adam's moments, float32, each rank's share of the parameters
    random-I-of-R.safetensors       state of each rank's random generators
    state.json                      step, reader position, learning-rate rule, MLflow run
    config.yaml, ds.json, data.json what the run was
    complete                        sizes of the files above; written last

A directory counts only once `complete` is in it and the sizes agree, so a rank that is killed while
saving leaves the checkpoint before as the newest. Training stands still only while the state is copied
to the host (`save`); each rank writes its files in a thread, and once all ranks know that all are on the disk, rank 0
completes the checkpoint (`settle`). A write that fails (full disk) is said, and leaves the old ones alone.

Deleted are all but the newest `checkpoint.keep`, the `keep_best` best by the watched metric, and those
at multiples of `keep_every` steps or the shares `keep_at` of the run. `latest` and `best` name a checkpoint each.

DeepSpeed's own checkpoint files are tied to the ranks and the ZeRO stage that wrote them: stage 3 needs the same
ranks, a change needs an offline conversion (which stage 0 lacks), and loading unpickles. Tensors by parameter name need
no conversion: every layout reads its own part of them, with the same bits. Each is made whole once, many of them in one
collective, so a save moves three times the float32 weights; CRAFT-base: 1 GB, a few optimiser steps' traffic.
"""

import fnmatch
import json
import logging
import random
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from pipeline import distributed
from pipeline.config import CheckpointConfig
from pipeline.distributed import World
from pipeline.engine import parts
from pipeline.engine.parts import Part
from pipeline.errors import UserError
from pipeline.files import sync, write_json, write_text

log = logging.getLogger(__name__)

COPIED = ("config.yaml", "ds.json", "data.json")
SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")  # fp16's dynamic loss scaling


class Checkpoints:
    """Saves the checkpoints of one run, one at a time; every method is a collective.

    Args:
        run_dir: Run directory, shared by all hosts.
        config: What is kept.
        world: Ranks.
        kept: Steps whose checkpoints are never deleted.

    Attributes:
        pending: The checkpoint that is on its way to the disk; None: none is.
    """

    def __init__(
        self, run_dir: Path, config: CheckpointConfig, world: World, kept: frozenset[int] = frozenset()
    ) -> None:
        self._run_dir, self._config, self._world, self._kept = run_dir, config, world, kept
        self._root = run_dir / "checkpoints"
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[float] = Future()  # seconds that this rank's files took
        self._stall = 0.0  # seconds that training stood still
        self._lost: Path | None = None  # the last one, where it could not be written
        self.pending: Path | None = None

    def save(self, engine: Any, state: dict[str, Any], average: Mapping[str, Part]) -> dict[str, float]:
        """Copies the state of `state["step"]` to the host and begins to write it.

        Args:
            engine: DeepSpeed engine.
            state: JSON-able state of the trainer; "step" names the checkpoint, "metric" ranks it.
            average: This rank's parts of averaged weights; empty: there are none.

        Returns:
            What `settle` says of the checkpoint before, if it was still being written.
        """
        begun = time.perf_counter()
        before = self.settle()
        world, folder = self._world, self._root / f"step-{state['step']:08d}"
        there = distributed.decide(lambda: self._take_over(folder, state))
        made = not there and distributed.decide(lambda: self._make(folder))
        self._lost = None if there or made else folder
        if not made:
            return before
        weights = parts.full_weights(engine)
        averaged = parts.put_together(engine, average, dict.fromkeys(average, 0)) if average else {}
        moments = parts.full_moments(engine, parts.spread(engine))
        mine = {_part("optimizer", world.rank, world.size): moments,
                _part("random", world.rank, world.size): _random_state()}  # fmt: skip
        if world.is_main:
            mine = {"weights": weights, **mine}
            if averaged:
                mine["average"] = averaged
            if teacher := getattr(engine.module, "teacher", None):  # the same on all ranks
                mine["teacher"] = {f"model.{name}": parts.host(weight) for name, weight in teacher.weights.items()}
            state = state | {
                "updates": parts.updates(engine),
                "loss_scale": loss_scale(engine),
                "world_size": world.size,
                "zero_stage": int(engine.zero_optimization_stage()),
                "kept": state["step"] in self._kept,
            }
        self.pending = folder
        self._writing = self._thread.submit(_write, folder, mine, state if world.is_main else None)
        self._stall = time.perf_counter() - begun
        return before

    def settle(self, agreed: Sequence[int] | None = None) -> dict[str, float]:
        """Completes the pending checkpoint, once all ranks' files are on the disk.

        Args:
            agreed: The largest `flags` of all ranks: nothing is done as long as one is writing; None: waits for them.

        Returns:
            Seconds that training stood still and that writing took, as metrics; empty: nothing was completed.
        """
        folder = self.pending
        if folder is None:
            return {}
        if agreed is None:
            error = self._writing.exception()
            agreed = 0, int(distributed.any_rank(error is not None, self._world.device))
        writing, failed = agreed
        if writing:
            return {}
        self.pending = None
        if not distributed.decide(lambda: self._complete(folder, bool(failed))):
            self._lost = folder
            return {}
        return {"checkpoint_stall_seconds": self._stall, "checkpoint_write_seconds": self._writing.result()}

    @property
    def flags(self) -> tuple[int, int]:
        """(still writing, failed) of this rank, for the ranks to agree on; not a collective."""
        if self.pending is None or not self._writing.done():
            return int(self.pending is not None), 0
        return 0, int(self._writing.exception() is not None)

    def finish(self) -> dict[str, float]:
        """Waits for the last checkpoint of the run.

        Raises:
            UserError: it could not be written.
        """
        said = self.settle()
        if self._lost:
            raise UserError(
                f"{self._lost}: the last checkpoint could not be written; make room and repeat the command: it goes on "
                "from the one before"
            )
        return said

    def _take_over(self, folder: Path, state: dict[str, Any]) -> bool:
        """Whether the step has a whole checkpoint, which then takes over `state`. For rank 0.

        A signal can come just after a save. Or it came in the evaluation, which the resumed run has made up for: its
        metric ranks the checkpoint.
        """
        before, wrong = _read(folder)
        if wrong:
            return False
        before.pop("files")
        try:
            write_json(folder / "state.json", before | state)
        except OSError as error:
            log.warning("%s: %s; the run goes on", folder, error)
        delete_old(self._run_dir, self._config, self._kept)
        return True

    def _make(self, folder: Path) -> bool:
        """Makes an empty folder, without the remains of killed attempts; False: there is no room. For rank 0.

        A host that has looked for a path on NFS before another one makes it goes on not finding it for a while: the
        other ranks must not look.
        """
        try:
            for other in self._root.glob("step-*"):  # later ones were damaged, or the run had not gone back
                if other.name >= folder.name or not (other / "complete").exists():
                    _remove(other)
            folder.mkdir(parents=True)
            for name in COPIED:
                if (self._run_dir / name).exists():
                    shutil.copyfile(self._run_dir / name, folder / name)
        except OSError as error:
            return self._give_up(folder, error)
        return True

    def _complete(self, folder: Path, failed: bool) -> bool:
        """Makes a checkpoint count, and deletes what is no longer kept; False: it is lost. For rank 0."""
        try:
            if failed:
                raise self._writing.exception() or OSError("another rank could not write; see logs/")
            # By their names, too: on NFS this host may not list yet what others wrote.
            names = {file.name for file in folder.iterdir()} | {
                f"{_part(what, rank, self._world.size)}.safetensors"
                for what in ("optimizer", "random") for rank in range(self._world.size)
            }  # fmt: skip
            write_json(folder / "complete", {name: (folder / name).stat().st_size for name in sorted(names)})
            write_text(self._root / "latest", folder.name)
        except (OSError, SafetensorError) as error:
            return self._give_up(folder, error)
        log.info("saved %s: training waited %.2f s, writing took %.2f s", folder, self._stall, self._writing.result())
        delete_old(self._run_dir, self._config, self._kept)
        return True

    def _give_up(self, folder: Path, error: Exception) -> bool:
        shutil.rmtree(folder, ignore_errors=True)
        newest = [whole.name for whole in complete_checkpoints(self._run_dir)][-1:] or ["none"]
        log.warning("%s: not saved: %s; the run goes on, its newest checkpoint is %s", folder, error, *newest)
        return False


def _write(folder: Path, files: dict[str, dict[str, torch.Tensor]], state: dict[str, Any] | None) -> float:
    """Writes this rank's files, and rank 0's `state.json`, to the disk (fsync); returns the seconds that it took."""
    begun = time.perf_counter()
    try:
        for name, tensors in files.items():
            path = folder / f"{name}.safetensors"
            save_file(tensors, path)
            path.chmod(0o644)  # safetensors' own is for the user alone; others finetune from it
            sync(path)
        if state is not None:
            write_json(folder / "state.json", state)
    except (OSError, SafetensorError) as error:
        log.warning("%s: %s", folder, error)
        raise
    return time.perf_counter() - begun


def delete_old(run_dir: Path, config: CheckpointConfig, kept_steps: frozenset[int]) -> None:
    """Deletes the checkpoints that need not be kept, and names the best one in `best`."""
    found = {folder: _read(folder) for folder in complete_checkpoints(run_dir)}
    whole = [folder for folder, (_, wrong) in found.items() if not wrong]  # a damaged one takes no other's place
    metrics = {folder: found[folder][0].get("metric") for folder in whole}
    ranked = sorted(((metric, folder) for folder, metric in metrics.items() if metric is not None), reverse=True)
    if ranked:
        try:
            write_text(run_dir / "checkpoints" / "best", ranked[0][1].name)
        except OSError as error:  # a full disk, which deleting makes room on
            log.warning("%s: %s; the run goes on", run_dir / "checkpoints" / "best", error)
    kept = {*whole[-config.keep :], *(folder for _, folder in ranked[: config.keep_best])}
    for folder in whole:
        step = int(folder.name.removeprefix("step-"))
        if found[folder][0].get("kept"):  # a run that goes on for longer has its shares at other steps
            continue
        if folder not in kept and step not in kept_steps and not (config.keep_every and step % config.keep_every == 0):
            _remove(folder)


def _remove(folder: Path) -> None:
    """Deletes a checkpoint; it stops counting before its first file goes.

    What cannot be deleted (NFS keeps files that somebody has open; somebody protected it) is said and stays: no reason
    to lose the next one.
    """
    try:
        (folder / "complete").unlink(missing_ok=True)
        shutil.rmtree(folder)
    except OSError as error:
        log.warning("%s: cannot be deleted: %s; the run goes on, delete it yourself", folder, error)


def complete_checkpoints(run_dir: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    return sorted(marker.parent for marker in (run_dir / "checkpoints").glob("step-*/complete"))


def read_state(run_dir: Path) -> dict[str, Any] | None:
    """`state.json` of the newest checkpoint whose files have their sizes, with their names as `files`; None: none."""
    for folder in reversed(complete_checkpoints(run_dir)):
        state, wrong = _read(folder)
        if not wrong:
            return state
        log.warning("%s: %s is not as it was written; going on from the checkpoint before", folder, wrong)
    return None


def _read(folder: Path) -> tuple[dict[str, Any], str]:
    """`state.json` of a checkpoint with the names of its `files`, and which of them is not as it was written."""
    try:
        sizes = json.loads((folder / "complete").read_text(encoding="utf-8"))
        for name, size in sizes.items():
            # state.json, written whole or not at all, grows by a metric that is found later; it is read below.
            if name != "state.json" and (not (folder / name).is_file() or (folder / name).stat().st_size != size):
                return {}, name
        state: dict[str, Any] = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        whole = state.get("step") == int(folder.name.removeprefix("step-"))
        state["files"] = sorted(sizes)
    except (OSError, ValueError, AttributeError, RecursionError):
        return {}, "complete or state.json"
    return state, "" if whole else "state.json"


def stored(run_dir: Path, state: dict[str, Any], files: str) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of the checkpoint that `state` was read from, one after the other: never all in memory.

    Args:
        run_dir: Run directory.
        state: `read_state`.
        files: Names without the ending, such as "weights" or "optimizer-*"; none need be there.

    Raises:
        UserError: a file cannot be read.
    """
    folder = run_dir / "checkpoints" / f"step-{state['step']:08d}"
    # Not those that this host lists: on NFS it may not see new ones yet, and would go on with moments of 0.
    for file in (folder / name for name in fnmatch.filter(state["files"], f"{files}.safetensors")):
        try:
            with safe_open(file, "pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - the file is no mapping
                    yield name, opened.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{file}: {error}; delete its directory to go on from the checkpoint before") from error


def restore(engine: Any, run_dir: Path, state: dict[str, Any], weights: dict[str, torch.Tensor], world: World) -> None:
    """Puts the checkpoint that `state` was read from into a fresh engine of any ranks and ZeRO stage.

    The module alone would do in float32; in bf16 and fp16 it holds rounded weights, and the float32 ones go to the
    optimiser.

    Args:
        engine: Built around a module that holds `weights`; before its first step.
        run_dir: Run directory.
        state: `read_state`.
        weights: Parameter name -> float32.
        world: Ranks.

    Raises:
        UserError: a file of it cannot be read.
    """
    parameters = dict(engine.module.named_parameters())
    for name, parameter in parameters.items():
        parts.put(parameter, weights[name].to(engine.device), None)
    if teacher := getattr(engine.module, "teacher", None):
        for name, value in stored(run_dir, state, "teacher"):
            teacher.weights[name.removeprefix("model.")].copy_(value)
            teacher.put(name.removeprefix("model."))
    if state["updates"]:
        adam, done = parts.adam(engine), float(state["updates"])
        for flat in parts.flat_weights(engine):
            adam.state[flat] = {"step": torch.tensor(done), **{key: torch.zeros_like(flat) for key in parts.MOMENTS}}
        parts.link(engine)
        for path, value in stored(run_dir, state, "optimizer-*"):
            key, _, name = path.partition("/")
            parameter = parameters[name]
            if parameter in adam.state:
                adam.state[parameter][key].copy_(value)
            else:
                parts.put(parameter, value.to(engine.device), key)
    for name, number in state["loss_scale"].items():
        if getattr(engine.optimizer, "loss_scaler", None) is not None:
            setattr(engine.optimizer.loss_scaler, name, number)
    engine.global_steps = state["step"]
    was, now = (state["zero_stage"], state["world_size"]), (int(engine.zero_optimization_stage()), world.size)
    if was != now:
        log.info("checkpoint of ZeRO %d on %d ranks taken over by ZeRO %d on %d", *was, *now)
    if was[1] == world.size:
        _set_random_state(dict(stored(run_dir, state, _part("random", world.rank, world.size))))


def loss_scale(engine: Any) -> dict[str, float]:
    """State of fp16's dynamic loss scaling; empty in other precisions."""
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    return {name: getattr(scaler, name) for name in SCALER} if getattr(scaler, "dynamic", False) else {}


def _part(what: str, rank: int, ranks: int) -> str:
    return f"{what}-{rank + 1:05d}-of-{ranks:05d}"


def _random_state() -> dict[str, torch.Tensor]:
    """States of torch's, numpy's and Python's generators. Masks and augmentation need none of them."""
    _, keys, position, _, _ = np.random.get_state()
    version, words, _ = random.getstate()
    found = {
        "torch": torch.get_rng_state(),
        "numpy": torch.from_numpy(np.r_[np.asarray(keys, np.int64), position]),
        "python": torch.tensor([version, *words], dtype=torch.int64),
    }
    return found | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def _set_random_state(state: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["torch"])
    numbers = state["numpy"].numpy()
    np.random.set_state(("MT19937", numbers[:-1].astype(np.uint32), int(numbers[-1]), 0, 0.0))
    version, *words = state["python"].tolist()
    random.setstate((version, tuple(words), None))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
