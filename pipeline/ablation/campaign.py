"""Runs the runs of a grid: each once, whatever happens in between.

In: a `Grid`, a directory, an executor. Out: finished run directories, each with a `done.json`.

    OUT/180-PSWaCL-DIGEST/            a pretraining: recipe.yaml, output.log, what the launcher leaves
    OUT/180-PSWaCL-SWaB-as_bal-.../   a finetuning
    OUT/ablation.json                 scale and shards, for the report

`done.json` is written when a run's launcher has ended with 0. Without it the same command is given
again, and the launcher goes on from its newest checkpoint; so a crash at any moment loses nothing.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import yaml

from pipeline.ablation.executors import Executor
from pipeline.ablation.grid import Grid, Run
from pipeline.command_line import read_deepspeed_config
from pipeline.data.manifest import labelled_manifest, load_manifest
from pipeline.engine.checkpoint import complete_checkpoints
from pipeline.engine.setup import numeric_differences, plan_batches
from pipeline.errors import UserError, exit_status
from pipeline.files import read_json, write_json, write_text

POLL_SECONDS = 0.5
DAMAGED = "that run is damaged; delete its directory to run it again"
# Of the runs' lines in MLflow's charts; its own choice gives neighbours the same one.
COLOURS = ("#1f6f8b", "#e07a3f", "#6a4c93", "#3a8f5c", "#b23a48", "#c9a227", "#2b59c3", "#d1495b", "#00798c", "#8d5524",
           "#7a9e1f", "#c74bb0")  # fmt: skip
State = Literal["done", "failed", "begun", "to do"]
Outcome = dict[Literal["done", "failed", "blocked"], list[str]]


class Campaign:
    """The state of a grid's runs in a directory, and the way to finish them.

    Args:
        grid: Tables and runs.
        out: Directory of the run directories.
    """

    def __init__(self, grid: Grid, out: Path) -> None:
        self.grid, self.out = grid, out

    def run_dir(self, run: Run) -> Path:
        """Of a run."""
        return self.out / run.folder

    def state(self, run: Run) -> State:
        """From the files that the run left."""
        folder = self.run_dir(run)
        if (folder / "done.json").exists():
            return "done"
        if (folder / "failed.json").exists():
            return "failed"
        return "begun" if complete_checkpoints(folder) else "to do"

    def shards(self, name: str) -> str:
        """Directory of a data set."""
        place = self.grid.scale.data[name].shards
        return f"{self.out}{place.removeprefix('OUT')}" if place == "OUT" or place.startswith("OUT/") else place

    def check_data(self) -> None:
        """A finished run must be of the data that the others will see; what finetunings see must have labels.

        Raises:
            UserError: it was made from other shards, clips have no labels, or a finetuning would hold out nothing.
        """
        finetunings = [run for run in self.grid.runs if run.kind == "finetune"]
        splits = {name: labelled_manifest(self.shards(name)).splits for name in {run.data for run in finetunings}}
        for run in finetunings:
            data = run.recipe.data
            if not data.fold and data.eval_split not in splits[run.data]:
                raise UserError(
                    f"{self.shards(run.data)} has no split '{data.eval_split}' to evaluate {run.task} on; it has "
                    f"{', '.join(splits[run.data])}: name one as data.eval_split in the scale's settings of that task"
                )
        digests = {name: load_manifest(self.shards(name)).digest for name in {run.data for run in self.grid.runs}}
        for run in self.grid.runs:
            file = self.run_dir(run) / "done.json"
            if file.exists():
                was = read_json(file, DAMAGED)["manifest_digest"]
                if was != digests[run.data]:
                    raise UserError(
                        f"{file}: its shards had the digest {was[:12]}, those of {self.shards(run.data)} have "
                        f"{digests[run.data][:12]}; give another --out, or delete that run"
                    )

    def check_deepspeed(self, ds: str) -> None:
        """A finished run must be of the precision that the others will have.

        Compared is what was given. What "auto" became depends on the machine of a run; the report compares that.

        Args:
            ds: DeepSpeed configuration.

        Raises:
            UserError: a section that changes numbers was another one.
        """
        now = read_deepspeed_config(ds)
        for run in self.grid.runs:
            file = self.run_dir(run) / "done.json"
            was = read_json(file, DAMAGED).get("deepspeed", now) if file.exists() else now  # earlier releases: unknown
            for key, pair in numeric_differences(_settled(was), _settled(now)).items():
                before, given = (json.dumps(value) if value else "none" for value in pair)
                raise UserError(
                    f"{file}: its DeepSpeed configuration gave {key} = {before}, --deepspeed_config {ds} gives "
                    f"{given}; give the former one or another --out, or delete that run"
                )

    def check_batches(self, ds: str, ranks: int) -> None:
        """Before the first run, as some would be refused when their turn comes, days later.

        Args:
            ds: DeepSpeed configuration.
            ranks: Of each run.

        Raises:
            UserError: the batch of a run that is not done does not divide by the ranks, or `ds` contradicts it.
        """
        content = read_deepspeed_config(ds)
        for run in self.grid.runs:
            if self.state(run) != "done":
                try:
                    plan_batches(run.recipe, content, ranks)
                except UserError as error:
                    raise UserError(f"{run.kind} {run.folder}: {error}; --ranks is of all runs") from error

    def execute(self, executor: Executor, ds: str, retries: int, say: Callable[[str], None]) -> Outcome:
        """Runs what is not done; a finetuning starts when its pretraining is done.

        Args:
            executor: Where.
            ds: DeepSpeed configuration.
            retries: Times a failed run is tried again.
            say: Receives a line for each event.

        Returns:
            What became of the runs: folder names.

        Raises:
            KeyboardInterrupt: after the running ones were told to save and end.
        """
        content = read_deepspeed_config(ds)
        todo = [run for run in self.grid.runs if self.state(run) != "done"]
        outcome: Outcome = {"done": [], "failed": [], "blocked": []}
        outcome["done"] += [run.folder for run in self.grid.runs if run not in todo]
        attempts: dict[str, int] = {}
        running: dict[Run, float] = {}  # since when
        total = len(self.grid.runs)
        try:
            while todo or running:
                self._start(todo, running, executor, ds, outcome, say)
                for run, begun in list(running.items()):
                    status = executor.poll(self.run_dir(run))
                    if status is None:
                        continue
                    del running[run]
                    seconds = time.monotonic() - begun
                    if status == 0:
                        say(f"[{len(outcome['done']) + 1}/{total}] done    {self._finish(run, seconds, content)}")
                        outcome["done"].append(run.folder)
                        continue
                    attempts[run.folder] = attempts.get(run.folder, 0) + 1
                    # Exit status 2 is an error of the settings or the data: the next try would meet it too.
                    again = attempts[run.folder] <= retries and status != 2
                    say(f"failed  {run.folder} (exit {status}), {'once more' if again else 'given up'}\n"
                        f"{self._last_words(run)}")  # fmt: skip
                    if again:
                        todo.insert(0, run)
                    else:
                        self._fail(run, {"status": status, "output": str(self.run_dir(run) / "output.log")}, outcome)
                time.sleep(POLL_SECONDS if running or todo else 0)
        except KeyboardInterrupt:
            say(f"interrupted: {len(running)} runs are told to save and end")
            executor.stop(map(self.run_dir, running))
            raise
        return outcome

    def _start(
        self, todo: list[Run], running: dict[Run, float], executor: Executor, ds: str,
        outcome: Outcome, say: Callable[[str], None],
    ) -> None:  # fmt: skip
        """Fills the free slots: finetunings first, so that results come early."""
        for run in [r for r in todo if r.init and r.init.folder in outcome["failed"]]:
            todo.remove(run)
            outcome["blocked"].append(run.folder)
        ready = [r for r in todo if r.init is None or r.init.folder in outcome["done"]]
        for run in sorted(ready, key=lambda r: r.kind == "pretrain"):
            if len(running) >= executor.jobs:
                return
            try:
                words = self._prepare(run, ds)
            except UserError as error:  # of this run: the others, which may be under way for days, go on
                say(f"failed  {run.folder}: {error}")
                todo.remove(run)
                self._fail(run, {"status": exit_status(error), "output": str(error)}, outcome)
                continue
            if not executor.start(self.run_dir(run), f"{run.kind}.py", words):
                continue  # a process of an earlier ablate.py still trains it: look again later
            (self.run_dir(run) / "failed.json").unlink(missing_ok=True)
            todo.remove(run)
            running[run] = time.monotonic()
            say(f"started {run.folder} ({run.about})")

    def _fail(self, run: Run, note: dict[str, Any], outcome: Outcome) -> None:
        """Notes that a run is given up."""
        write_json(self.run_dir(run) / "failed.json", note)
        outcome["failed"].append(run.folder)

    def _prepare(self, run: Run, ds: str) -> list[str]:
        """Writes the run's recipe.yaml; returns the launcher's arguments."""
        folder = self.run_dir(run)
        folder.mkdir(parents=True, exist_ok=True)
        content = run.recipe.model_dump(mode="json")
        content["run"]["dir"] = str(folder)
        content["data"]["shards"] = self.shards(run.data)
        colour = COLOURS[self.grid.runs.index(run) % len(COLOURS)]
        tables = {table: ", ".join(rows) for table, rows in run.used_by.items()}
        content["log"]["tags"] = tables | {"mlflow.runColor": colour}
        if run.init:
            content["model"]["init"] = str(self._initial(run, run.init))
        content["log"]["experiment"] = "ablation"
        write_text(folder / "recipe.yaml", yaml.safe_dump(content, sort_keys=False))
        return ["--deepspeed_config", ds, "--config", str(folder / "recipe.yaml")]

    def _initial(self, run: Run, init: Run) -> Path:
        """The pretraining's directory, or the kept checkpoint nearest to the wanted share of its steps.

        Raises:
            UserError: none was kept near it.
        """
        folder = self.run_dir(init)
        if run.share == 1.0:
            return folder
        steps = {int(path.name.removeprefix("step-")): path for path in complete_checkpoints(folder)}
        if not steps:
            raise UserError(f"{folder}: its checkpoints are gone; delete that run to train it anew")
        wanted = run.share * max(steps)
        nearest = min(steps, key=lambda step: abs(step - wanted))
        if abs(nearest - wanted) > 0.05 * max(steps):
            raise UserError(
                f"{folder}: no checkpoint near step {wanted:.0f}, kept are {sorted(steps)}; the scale "
                f"file's pretraining needs checkpoint.keep_at with {run.share:g}; delete that run to train it anew"
            )
        return steps[nearest]

    def _finish(self, run: Run, seconds: float, ds: dict[str, Any]) -> str:
        """Writes `done.json`; returns a line for people."""
        folder = self.run_dir(run)
        note: dict[str, Any] = {
            "digest": run.digest,
            "manifest_digest": read_json(folder / "data.json", DAMAGED)["digest"],
            "deepspeed": ds,
            "seconds": round(seconds, 1),
        }
        said = f"{run.folder} ({run.about}) in {seconds:.0f} s"
        results = folder / "results.json"
        if run.kind == "finetune" and results.exists():
            content = read_json(results, DAMAGED)
            note |= {"metric": content["metric"], "value": content["value"]}
            value = "undefined" if content["value"] is None else f"{content['value']:.4f}"
            said += f", {content['metric']} {value}"
        write_json(folder / "done.json", note)
        return said

    def _last_words(self, run: Run) -> str:
        """The last lines of a run's output, indented."""
        file = self.run_dir(run) / "output.log"
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()[-8:] if file.exists() else []
        return "\n".join(f"    {line[:200]}" for line in [*lines, f"whole output: {file}"])


def _settled(ds: dict[str, Any]) -> dict[str, Any]:
    """A DeepSpeed configuration without a bf16 section that is off on any machine: "auto" at ZeRO 0."""
    zero, bf16 = ds.get("zero_optimization"), ds.get("bf16")
    automatic = isinstance(bf16, dict) and bf16.get("enabled", "auto") == "auto"
    return {**ds, "bf16": None} if automatic and isinstance(zero, dict) and zero.get("stage") == 0 else ds
