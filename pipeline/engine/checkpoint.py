"""Checkpoints that are whole or do not count, for any ranks and any ZeRO stage.

In: the engine and the trainer's state. Out: `checkpoints/step-XXXXXXXX/`:

    weights.safetensors             float32 weights, consolidated from any ZeRO stage
    average.safetensors             averaged weights, where there are some
    optimizer-I-of-R.safetensors    Adam's moments, float32, each rank's share of the parameters
    random-I-of-R.safetensors       state of each rank's random generators
    state.json                      step, reader position, learning-rate rule, MLflow run
    config.yaml, ds.json, data.json what the run was
    complete                        sizes of the files above; written last

A directory counts only once `complete` is in it and the sizes agree, so a rank that is killed while
saving leaves the checkpoint before as the newest. Training stands still only while the state is copied
to the host; files are written behind its back, and the ranks agree at a later step that all are on the
disk (`Checkpoints.settle`). A write that fails (full disk) is said, and leaves the old ones alone.

Deleted are all but the newest `checkpoint.keep`, the `keep_best` best by the watched metric, and those
at multiples of `keep_every` steps or the shares `keep_at` of the run. `latest` and `best` name a checkpoint each.
"""

import json
import logging
import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from pipeline import distributed
from pipeline.config import CheckpointConfig
from pipeline.distributed import World
from pipeline.engine import snapshot
from pipeline.engine.writer import Writer
from pipeline.errors import UserError
from pipeline.files import write_json, write_text

log = logging.getLogger(__name__)

COPIED = ("config.yaml", "ds.json", "data.json")


class Checkpoints:
    """Saves the checkpoints of one run; every method but `close` is reached by all ranks alike.

    Args:
        run_dir: Run directory, shared by all hosts.
        config: What is kept.
        world: Ranks.
        kept: Steps whose checkpoints are never deleted.
    """

    def __init__(
        self, run_dir: Path, config: CheckpointConfig, world: World, kept: frozenset[int] = frozenset()
    ) -> None:
        self._kept = kept
        self._root = run_dir / "checkpoints"
        self._run_dir, self._config, self._world = run_dir, config, world
        self._writer = Writer()
        self._pending: Path | None = None
        self._stall = 0.0

    @property
    def flags(self) -> tuple[int, int]:
        """(still writing, failed) of this rank, for the ranks to agree on."""
        return int(self._writer.busy), int(bool(self._writer.error))

    @property
    def pending(self) -> bool:
        """A checkpoint is on its way to the disk."""
        return self._pending is not None

    def save(self, engine: Any, state: dict[str, Any], average: dict[str, torch.Tensor]) -> dict[str, float]:
        """Copies the state of `state["step"]` to the host and begins to write it; a collective.

        Args:
            engine: DeepSpeed engine.
            state: JSON-able state of the trainer; "step" names the checkpoint, "metric" ranks it.
            average: Averaged weights on rank 0; empty: none.

        Returns:
            What `wait` says of the checkpoint before, if it was still being written.
        """
        begun = time.perf_counter()
        before = self.wait()
        world, folder = self._world, self._root / f"step-{state['step']:08d}"
        whole, problem = distributed.decide(lambda: self._open(folder))
        if problem:
            self._say_failed(folder, problem)
        if whole or problem:
            return before
        mine = snapshot.shares(engine, world.size)[world.rank]
        weights = snapshot.weights(engine, keep=world.is_main)
        moments = snapshot.moments(engine, mine)
        files = {_part(folder, "optimizer", world): moments, _part(folder, "random", world): _random_state()}
        if world.is_main:
            files = {folder / "weights.safetensors": weights, **files}
            if average:
                files[folder / "average.safetensors"] = {name: tensor.clone() for name, tensor in average.items()}
            state = state | {
                "updates": snapshot.updates(engine),
                "loss_scale": snapshot.loss_scale(engine),
                "world_size": world.size,
                "zero_stage": int(engine.zero_optimization_stage()),
            }
        self._pending = folder
        self._writer.start(files, (lambda: self._describe(folder, state)) if world.is_main else None)
        self._stall = time.perf_counter() - begun
        return before

    def settle(self, failed: bool) -> dict[str, float]:
        """Closes the pending checkpoint: all ranks have stopped writing, as they agreed.

        Args:
            failed: One of them could not write.

        Returns:
            Seconds that training stood still and that writing took, as metrics.
        """
        folder, self._pending = self._pending, None
        if folder is None:
            return {}
        if failed:
            self._say_failed(folder, self._writer.error or "another rank could not write; see logs/")
        elif self._world.is_main:
            sizes = {file.name: file.stat().st_size for file in sorted(folder.iterdir())}
            write_json(folder / "complete", sizes)
            write_text(self._root / "latest", folder.name)
            log.info("saved %s: training waited %.2f s, writing took %.2f s", folder, self._stall, self._writer.seconds)
            self._retain()
        return {"checkpoint_stall_seconds": self._stall, "checkpoint_write_seconds": self._writer.seconds}

    def wait(self) -> dict[str, float]:
        """Waits for the pending checkpoint and settles it; a collective."""
        if self._pending is None:
            return {}
        self._writer.wait()
        return self.settle(distributed.any_rank(bool(self._writer.error), self._world.device))

    def finish(self) -> dict[str, float]:
        """Waits for the last checkpoint of the run; a collective.

        Raises:
            UserError: it could not be written.
        """
        folder = self._pending
        said = self.wait()
        if not distributed.decide(lambda: folder is None or (folder / "complete").exists()):
            raise UserError(
                f"{folder}: the last checkpoint could not be written; make room and repeat the command: it goes on "
                "from the one before"
            )
        return said

    def _open(self, folder: Path) -> tuple[bool, str]:
        """Makes an empty folder, without the remains of killed attempts. For rank 0.

        A host that has looked for a path on NFS before another one makes it goes on not finding it for a while: the
        other ranks must not look.

        Returns:
            Whether the checkpoint is there already (interrupted in its evaluation and resumed: the state is the
            same), and what went wrong.
        """
        try:
            if (folder / "complete").exists():
                return True, ""
            for other in self._root.glob("step-*"):  # later ones were damaged, or the run had not gone back
                if other.name >= folder.name or not (other / "complete").exists():
                    _remove(other)
            folder.mkdir(parents=True)
            for name in COPIED:
                if (self._run_dir / name).exists():
                    shutil.copyfile(self._run_dir / name, folder / name)
        except OSError as error:
            return False, str(error)
        return False, ""

    def _describe(self, folder: Path, state: dict[str, Any]) -> None:
        write_json(folder / "state.json", state)

    def _say_failed(self, folder: Path, problem: str) -> None:
        if self._world.is_main:
            shutil.rmtree(folder, ignore_errors=True)
            whole = complete_checkpoints(self._run_dir)
            log.warning(
                "%s: not saved: %s; the run goes on, its newest checkpoint is %s",
                folder, problem, whole[-1].name if whole else "none",
            )  # fmt: skip

    def _retain(self) -> None:
        found = {folder: _read(folder) for folder in complete_checkpoints(self._run_dir)}
        whole = [folder for folder, (_, wrong) in found.items() if not wrong]  # a damaged one takes no other's place
        metrics = {folder: found[folder][0].get("metric") for folder in whole}
        ranked = sorted(((metric, folder) for folder, metric in metrics.items() if metric is not None), reverse=True)
        if ranked:
            write_text(self._root / "best", ranked[0][1].name)
        kept = {*whole[-self._config.keep :], *(folder for _, folder in ranked[: self._config.keep_best])}
        every = self._config.keep_every
        for folder in whole:
            step = int(folder.name.removeprefix("step-"))
            if folder not in kept and step not in self._kept and not (every and step % every == 0):
                _remove(folder)


def complete_checkpoints(run_dir: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    return sorted(marker.parent for marker in (run_dir / "checkpoints").glob("step-*/complete"))


def read_state(run_dir: Path) -> dict[str, Any] | None:
    """`state.json` of the newest checkpoint whose files have their sizes; None where there is none."""
    for folder in reversed(complete_checkpoints(run_dir)):
        state, wrong = _read(folder)
        if not wrong:
            return state
        log.warning("%s: %s is not as it was written; going on from the checkpoint before", folder, wrong)
    return None


def _read(folder: Path) -> tuple[dict[str, Any], str]:
    """`state.json` of a checkpoint, and which of its files is not as it was written; empty: none."""
    try:
        sizes = json.loads((folder / "complete").read_text(encoding="utf-8"))
        wrong = next((name for name, size in sizes.items() if not _is_size(folder / name, size)), "")
        state: dict[str, Any] = {} if wrong else json.loads((folder / "state.json").read_text(encoding="utf-8"))
        whole = state.get("step") == int(folder.name.removeprefix("step-"))
    except (OSError, ValueError, AttributeError, RecursionError):
        return {}, "complete or state.json"
    return state, wrong or ("" if whole else "state.json")


def read_weights(run_dir: Path, state: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Float32 weights of the checkpoint that `state` was read from.

    Raises:
        UserError: they cannot be read.
    """
    return _load(_folder(run_dir, state) / "weights.safetensors")


def restore(engine: Any, run_dir: Path, state: dict[str, Any], weights: dict[str, torch.Tensor], world: World) -> None:
    """Puts the checkpoint that `state` was read from into a fresh engine of any ranks and ZeRO stage.

    Args:
        engine: Built around a module that holds `weights`.
        run_dir: Run directory.
        state: `read_state`.
        weights: `read_weights`.
        world: Ranks.

    Raises:
        UserError: a file of it cannot be read.
    """
    moments = stored_moments(run_dir, state)
    snapshot.restore(engine, weights, moments, state["updates"], state["loss_scale"])
    engine.global_steps = state["step"]
    was, now = (state["zero_stage"], state["world_size"]), (int(engine.zero_optimization_stage()), world.size)
    if was != now:
        log.info("checkpoint of ZeRO %d on %d ranks taken over by ZeRO %d on %d", *was, *now)
    if was[1] == world.size:
        _set_random_state(_load(_part(_folder(run_dir, state), "random", world)))


def stored_moments(run_dir: Path, state: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """Adam's moments of that checkpoint one after the other, ("exp_avg/NAME", float32): never all in memory.

    Raises:
        UserError: a file cannot be read.
    """
    for file in sorted(_folder(run_dir, state).glob("optimizer-*.safetensors")):
        try:
            with safe_open(file, "pt") as part:
                for name in part.keys():  # noqa: SIM118 - the file is no mapping
                    yield name, part.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{file}: {error}; delete its directory to go on from the checkpoint before") from error


def read_average(run_dir: Path, state: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Averaged weights of that checkpoint; empty where it has none."""
    file = _folder(run_dir, state) / "average.safetensors"
    return _load(file) if file.is_file() else {}


def _folder(run_dir: Path, state: dict[str, Any]) -> Path:
    return run_dir / "checkpoints" / f"step-{state['step']:08d}"


def _part(folder: Path, what: str, world: World) -> Path:
    return folder / f"{what}-{world.rank + 1:05d}-of-{world.size:05d}.safetensors"


def _load(file: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file}: {error}; delete its directory to go on from the checkpoint before") from error


def _is_size(file: Path, size: int) -> bool:
    return file.is_file() and file.stat().st_size == size


def _remove(folder: Path) -> None:
    """Deletes a checkpoint; it stops counting before its first file goes."""
    (folder / "complete").unlink(missing_ok=True)
    shutil.rmtree(folder)


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
