"""Every precision, ZeRO stage, offload and compilation trains alike; every method takes a step.

    modes.py SHARDS SIZE CLIPS OUT SMALL GROUP     the rank program: the cells of one group, one after the other

Out: losses of each cell against float32 at ZeRO 0, skipped steps, peak memory, and where weights begin: kernels read
matrices in vectors of 16 bytes, and a slower one takes those that begin elsewhere.
"""

import json
import math
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pipeline import distributed
from pipeline.data.loader import Loader
from pipeline.distributed import World
from pipeline.errors import UserError
from pipeline.flow import Batch
from tests.gpu.report import Check
from tests.gpu.trials import HALF, Trial, batch_of, difference, ds_of, last_line, processes, recipe_of

STEPS, REHEARSED, MOST_SKIPPED = 6, 3, 8
# Of losses, relative. bf16 weights move only once several updates of a thousandth of their size have come together.
TOLERANCES = {"fp32": 1e-5, "bf16": 4e-2, "fp16": 2e-2, "offload": 4e-2, "compile": 4e-2}
GROUPS = (*TOLERANCES, "methods")
METHODS = {
    **{name: (f"pretrain/{name}.yaml",) for name in ("ssast180", "swapt180", "pswacl180", "craft_mae", "craft_mosaic",
                                                     "audio_mosaic", "craft_latent")},
    **{name: (f"finetune.method={name}",) for name in ("ast", "wast", "swast", "swab")},
}  # fmt: skip
# The rehearsal shows that the check works, for which a method of each kind and two stages do.
REHEARSED_METHODS = ("pswacl180", "craft_latent", "swab")
REHEARSED_STAGES = {"fp32": (0, 3), "bf16": (0, 2), "fp16": (0, 2)}


def cells(group: str, small: bool) -> dict[str, tuple[tuple[str, ...], dict[str, Any]]]:
    """Name -> (words, ds.json)."""
    if group == "methods":
        names = REHEARSED_METHODS if small else METHODS
        return {name: (METHODS[name], ds_of("zero1.json", bf16=HALF["bf16"])) for name in names}
    if group == "compile":  # the rehearsal compiles no C++
        backend = {"backend": "aot_eager"} if small else {}
        return {"compile": ((), ds_of("compile.json", bf16=HALF["bf16"], compile={"enabled": True, **backend}))}
    if group == "offload":
        return {name: ((), ds_of(f"{name}.json", bf16=HALF["bf16"])) for name in ("offload", "offload3")}
    section = {} if group == "fp32" else {group: HALF[group]}
    file = "fp16.json" if group == "fp16" else "ds.json"
    stages = REHEARSED_STAGES[group] if small else range(4)
    return {f"{group}_zero{stage}": ((), ds_of(file, stage, **({"bf16": {"enabled": False}} | section)))
            for stage in stages}  # fmt: skip


class Places:
    """Counts weights by where they begin as a module reads them: ZeRO 3 gathers them for it."""

    def __init__(self, task: torch.nn.Module) -> None:
        self.seen: dict[str, tuple[bool, bool]] = {}  # name -> (a matrix of whole vectors, begins elsewhere)
        self._hooks = [module.register_forward_pre_hook(self._look(name)) for name, module in task.named_modules()]

    def _look(self, module: str) -> Callable[[torch.nn.Module, Any], None]:
        def look(found: torch.nn.Module, _: Any) -> None:
            for name, parameter in found.named_parameters(recurse=False):
                matrix = parameter.dim() >= 2 and parameter.numel() % 8 == 0
                self.seen[f"{module}.{name}"] = matrix, parameter.data_ptr() % 16 != 0

        return look

    def end(self) -> dict[str, int]:
        for hook in self._hooks:
            hook.remove()
        return {
            "weights": len(self.seen),
            "misaligned": sum(elsewhere for _, elsewhere in self.seen.values()),
            "misaligned_matrices": sum(matrix and elsewhere for matrix, elsewhere in self.seen.values()),
        }


def measure(words: tuple[str, ...], ds: dict[str, Any], args: tuple[Path, str, int], world: World, loader: Loader,
            batch: Batch, steps: int) -> dict[str, Any]:  # fmt: skip
    """One cell; what it was refused for or what broke is its result."""
    cuda = world.device.type == "cuda"
    begun, before = time.perf_counter(), torch.cuda.memory_allocated() if cuda else 0
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    try:
        trial = Trial(recipe_of(*args, *words), ds, world, loader, batch)
    except UserError as error:
        return {"refused": str(error)}
    places = None if ds.get("compile", {}).get("enabled") else Places(trial.task)  # hooks would break the graph
    losses = trial.train(1)
    found: dict[str, Any] = {} if places is None else places.end()
    losses += trial.train(steps - len(losses), MOST_SKIPPED)
    found |= {"losses": losses, "skipped": int(trial.engine.skipped_steps), "norm": trial.norm}
    trial.end()
    found["gib"] = (torch.cuda.max_memory_allocated() - before) / 2**30 if cuda else 0.0
    return found | {"seconds": time.perf_counter() - begun}


def main() -> None:
    shards, size, clips, out, small, group = sys.argv[1:]
    args = Path(shards), size, int(clips)
    with distributed.session(300, seed=0) as world, batch_of(recipe_of(*args), world) as (loader, batch):
        for name, (words, ds) in cells(group, small == "True").items():
            try:
                steps = 1 if group == "methods" else REHEARSED if small == "True" else STEPS
                found = measure(words, ds, args, world, loader, batch, steps)
            except Exception as error:  # noqa: BLE001 - is a result, and hides no other
                traceback.print_exc()
                found = {"error": f"{type(error).__name__}: {error}"[:300]}
            Path(out, f"{name}.json").write_text(json.dumps(found))


def run(check: Check) -> None:
    for old in check.out.glob("*.json"):
        old.unlink()
    clips = 4 if check.small else 8
    jobs: list[tuple[Path, list[object]]] = [
        (Path(__file__), [check.shards, check.size, clips, check.out, check.small, group]) for group in GROUPS
    ]
    ended = processes(check, jobs, 360)
    found: dict[str, dict[str, Any]] = {}
    for group, (status, output) in zip(GROUPS, ended, strict=True):
        if status:
            check.test(f"{group}_process", False, f"exit {status}: {last_line(output)}", "exit 0")
        for name in cells(group, check.small):
            file = check.out / f"{name}.json"
            found[name] = json.loads(file.read_text()) if file.exists() else {"error": "its process ended before"}
    expected = found["fp32_zero0"].get("losses", [])
    for group, tolerance in TOLERANCES.items():
        for name in cells(group, check.small):
            _judge(check, name, found[name], expected, tolerance)
    for name in cells("methods", check.small):
        cell = found[name]
        losses = cell.get("losses", [])
        holds = len(losses) == 1 and math.isfinite(losses[0]) and 0 < cell["norm"] < math.inf
        check.test(f"method_{name}", holds, _said(cell), "a finite loss and gradient, no step skipped")
    done = {name: cell for name, cell in found.items() if "gib" in cell}
    check.info("memory_gib", ", ".join(f"{name} {cell['gib']:.3f}" for name, cell in done.items()))
    check.info("seconds", ", ".join(f"{name} {cell['seconds']:.1f}" for name, cell in done.items()))
    placed = {name: cell for name, cell in done.items() if "weights" in cell}
    check.info("misaligned", ", ".join(f"{name} {cell['misaligned']} of {cell['weights']}"
                                       for name, cell in placed.items()))  # fmt: skip
    matrices = {name: cell["misaligned_matrices"] for name, cell in placed.items() if cell["misaligned_matrices"]}
    values = ", ".join(f"{name} {count}" for name, count in matrices.items()) or f"0 in {len(placed)} layouts"
    check.test("misaligned_matrices", bool(placed) and not matrices, values, "0")


def _judge(check: Check, name: str, cell: dict[str, Any], expected: list[float], tolerance: float) -> None:
    """One cell against float32 at ZeRO 0, which itself must learn."""
    if name in ("bf16_zero0", "fp16_zero0"):
        check.test(name, "stage 1" in cell.get("refused", ""), _said(cell), "refused: use stage 1")
        return
    losses = cell.get("losses", [])
    if name == "fp32_zero0":
        whole = len(losses) == (REHEARSED if check.small else STEPS)
        falls = whole and all(map(math.isfinite, losses)) and losses[-1] < losses[0]
        check.test(name, falls, _said(cell), "falling")
        return
    error = difference(losses, expected)
    most = MOST_SKIPPED if name.startswith("fp16") else 0
    learns = error < math.inf and losses[0] - losses[-1] >= 0.5 * (expected[0] - expected[-1])
    holds = error <= tolerance and learns and cell["skipped"] <= most
    check.test(name, holds, f"{error:.2g} relative, {_said(cell)}",
               f"<= {tolerance:g} of fp32_zero0, half its fall or more, at most {most} skipped")  # fmt: skip


def _said(cell: dict[str, Any]) -> str:
    if "losses" not in cell:
        return ", ".join(f"{key}: {value}" for key, value in cell.items())
    losses = " ".join(f"{loss:.6g}" for loss in cell["losses"])
    return f"losses {losses}, {cell['skipped']} skipped, norm {cell['norm']:.3g}"


if __name__ == "__main__":
    main()
