"""A run that is killed goes on as if nothing had been, and checkpoints pass from one ZeRO stage to another.

    resume.py run SHARDS SIZE RUN_DIR MODE KILL    the rank program: a pretraining, killed in step KILL (-1: never)
    resume.py stages SHARDS SIZE FOLDER            the rank program: checkpoints through ZeRO 2, 3 and 1

On a GPU the order of additions, and with it the last bits of a loss, may change from run to run: equal bits are asked
of MODE "deterministic", of "default" the difference is reported.
"""

import json
import os
import shutil
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

import torch

from pipeline import distributed
from pipeline.command_line import Launch, read_deepspeed_config
from pipeline.config import PretrainRecipe
from pipeline.distributed import World
from pipeline.engine import checkpoint, loop
from pipeline.tracking.spool import Feed
from pipeline.train import pretrain
from tests.gpu.report import Check
from tests.gpu.trials import HALF, Trial, batch_of, difference, different, ds_of, last_line, processes, recipe_of

TOTAL, EVERY, KILL = 10, 2, 6  # the checkpoint of step 4, two before, is whole by then
CHAIN = (2, 3, 1)
SCALE_POWER = 8  # the scale at the start, low enough for no step to be skipped; it doubles every second step
SECTIONS: dict[str, dict[str, Any]] = {
    "fp32": {"bf16": {"enabled": False}},
    "bf16": {"bf16": HALF["bf16"]},
    "fp16": {"fp16": {**HALF["fp16"], "loss_scale": 0, "initial_scale_power": SCALE_POWER, "loss_scale_window": 2}},
}
TOLERANCES = {"fp32": 1e-5, "bf16": 2e-2, "fp16": 2e-2}


def train(shards: Path, size: str, run_dir: Path, mode: str, kill: int) -> None:
    """A run of pretrain.py, which SIGKILL ends in step `kill`, its gradient computed and not applied."""
    words = [f"run.dir={run_dir}", "train.micro_batch=4", f"train.steps={TOTAL}", f"checkpoint.every={EVERY}",
             "log.every=1", "eval.clips=8", "optim.lr=1e-4",
             f"run.deterministic={str(mode == 'deterministic').lower()}"]  # fmt: skip
    recipe = recipe_of(shards, size, 8, *words)
    assert isinstance(recipe, PretrainRecipe)
    update = loop.update

    def fall(engine: Any, job: Any, batch: Any, progress: Any, loss: Any) -> Any:
        if progress.step == kill:
            os.kill(os.getpid(), signal.SIGKILL)
        return update(engine, job, batch, progress, loss)

    loop.update = fall  # type: ignore[attr-defined]
    with distributed.session(300, recipe.run.seed, recipe.run.deterministic) as world:
        pretrain(Launch(recipe, read_deepspeed_config("ds.json")), world)


def pass_on(shards: Path, size: str, folder: Path, precision: str, world: World) -> dict[str, Any]:
    """One precision's chain: three steps, a checkpoint, two more in the next stage, and so on."""
    recipe = recipe_of(shards, size, 4 if world.device.type == "cuda" else 2)  # fp16 is slow on a CPU
    with batch_of(recipe, world) as (loader, batch):
        straight = Trial(recipe, ds_of("ds.json", CHAIN[0], **SECTIONS[precision]), world, loader, batch)
        expected = straight.train(3 + 2 * (len(CHAIN) - 1))
        straight.end()
        losses: list[float] = []
        report: dict[str, Any] = {"stages": []}
        for stage in CHAIN:
            begun = Trial(recipe, ds_of("ds.json", stage, **SECTIONS[precision]), world, loader, batch,
                          folder if losses else None)  # fmt: skip
            if losses:
                state = checkpoint.read_state(folder)
                assert state is not None
                stored = _tensors(folder, state)
                scales = state["loss_scale"], checkpoint.loss_scale(begun.engine)
                report["stages"].append({"stage": stage, "tensors": len(stored), "scales": scales,
                                         "different": different(begun.state(), stored)})  # fmt: skip
            losses += begun.train(2 if losses else 3)
            begun.save(folder)
            begun.end()
    return report | {"losses": losses, "expected": expected, "error": difference(losses, expected)}


def main() -> None:
    kind, shards, size, folder, *rest = sys.argv[1:]
    if kind == "run":
        train(Path(shards), size, Path(folder), rest[0], int(rest[1]))
        return
    with distributed.session(300, seed=0) as world:
        for precision in SECTIONS:
            try:
                found = pass_on(Path(shards), size, Path(folder, precision), precision, world)
            except Exception as error:  # noqa: BLE001 - is a result, and hides no other
                traceback.print_exc()
                found = {"failed": f"{type(error).__name__}: {error}"[:300]}
            Path(folder, f"{precision}.json").write_text(json.dumps(found))


def run(check: Check) -> None:
    modes = ("deterministic",) if check.small else ("default", "deterministic")  # a CPU always is

    def job(mode: str, name: str, kill: int = -1) -> tuple[Path, list[object]]:
        return Path(__file__), ["run", check.shards, check.size, check.out / f"{mode}-{name}", mode, kill]

    for old in (path for path in check.out.iterdir() if path.is_dir()):
        shutil.rmtree(old)
    for file in check.out.glob("*.json"):
        file.unlink()
    stages: tuple[Path, list[object]] = Path(__file__), ["stages", check.shards, check.size, check.out]
    first = [stages, *(job(mode, "straight") for mode in modes), *(job(mode, "killed", KILL) for mode in modes)]
    ended = processes(check, first, 200)
    before = [_step(check.out / f"{mode}-killed") for mode in modes]
    resumed = processes(check, [job(mode, "killed") for mode in modes], 200)
    for number, mode in enumerate(modes):
        found = ended[1 + number], ended[1 + len(modes) + number], resumed[number]
        _judge_runs(check, mode, found, before[number])
    if ended[0][0]:
        check.test("stages_process", False, f"exit {ended[0][0]}: {last_line(ended[0][1])}", "exit 0")
    for precision in SECTIONS:
        _judge_stages(check, precision)


def _step(run_dir: Path) -> int:
    return int((checkpoint.read_state(run_dir) or {"step": 0})["step"])


def _judge_runs(check: Check, mode: str, ended: tuple[tuple[int, str], ...], begun: int) -> None:
    """The straight run, the killed one and its resumption, from step `begun` on."""
    exits = [status for status, _ in ended]
    if not _exits(check, mode, exits, [output for _, output in ended]):
        return
    check.test(f"{mode}_from_a_checkpoint", 0 < begun < KILL, f"killed in step {KILL + 1}, went on from {begun}",
               f"0 < step < {KILL}")  # fmt: skip
    one, other = check.out / f"{mode}-straight", check.out / f"{mode}-killed"
    losses = [{row["step"]: row["loss"] for row in Feed(folder / "metrics.jsonl").read() if "loss" in row}
              for folder in (one, other)]  # fmt: skip
    rows = [list(found.values()) for found in losses]
    tensors = [_tensors(folder, checkpoint.read_state(folder) or {}) for folder in (one, other)]
    names = different(*tensors)
    error = difference(rows[1], rows[0])
    values = (f"{error:.2g} relative in {len(rows[0])} losses, {len(names)} of {len(tensors[0])} tensors differ"
              f"{' such as ' + names[0] if names else ''}; losses {rows[0][0]:.9g} ... {rows[0][-1]:.9g} and "
              f"{rows[1][-1]:.9g}")  # fmt: skip
    if mode == "default" and not check.small:
        check.info(mode, values)
    else:
        same = losses[0] == losses[1] and len(rows[0]) == TOTAL and not names
        check.test(mode, same, values, f"the same bits in {TOTAL} losses, weights and moments")


def _exits(check: Check, mode: str, exits: list[int], outputs: list[str]) -> bool:
    """The three processes of a mode ended as they should."""
    wanted = [0, -signal.SIGKILL, 0]
    wrong = [last_line(output) for status, should, output in zip(exits, wanted, outputs, strict=True)
             if status != should]  # fmt: skip
    check.test(f"{mode}_exits", not wrong, " ".join(map(str, exits)) + (f": {wrong[0]}" if wrong else ""),
               "straight 0, killed -9, resumed 0")  # fmt: skip
    return not wrong


def _tensors(run_dir: Path, state: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Weights and moments of the checkpoint that `state` was read from."""
    return {name: tensor for files in ("weights", "optimizer-*")
            for name, tensor in checkpoint.stored(run_dir, state, files)}  # fmt: skip


def _judge_stages(check: Check, precision: str) -> None:
    file = check.out / f"{precision}.json"
    found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"failed": "its process ended before"}
    if "failed" in found:
        check.test(f"stages_{precision}", False, found["failed"], "no exception")
        return
    for stage in found["stages"]:
        names, scales = stage["different"], stage["scales"]
        check.test(f"{precision}_to_zero{stage['stage']}", stage["tensors"] > 0 and not names,
                   f"{len(names)} of {stage['tensors']} tensors differ{' such as ' + names[0] if names else ''}",
                   "weights and moments as stored, bit for bit")  # fmt: skip
        if precision == "fp16":
            check.test(f"scaler_at_zero{stage['stage']}", scales[0] == scales[1] and
                       scales[0].get("cur_scale", 0) > 2**SCALE_POWER,
                       f"stored {scales[0]}, restored {scales[1]}", "the same, risen since the start")  # fmt: skip
    check.test(f"{precision}_losses", found["error"] <= TOLERANCES[precision],
               f"{found['error']:.2g} relative: {' '.join(f'{loss:.6g}' for loss in found['losses'])} and "
               f"{' '.join(f'{loss:.6g}' for loss in found['expected'])}",
               f"<= {TOLERANCES[precision]:g} of a run at ZeRO {CHAIN[0]} alone")  # fmt: skip


if __name__ == "__main__":
    main()
