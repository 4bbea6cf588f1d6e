"""The paper's claim at the scale of a laptop: random, SSAST, SWaPT and PSWaCL, finetuned with AST and with SWaB.

    python -m tests.benchmarks.small_scale [--esc50 DIR] [--out runs/small_scale] [--seeds 0 1 2]
                                           [--pretrain-steps N] [--epochs N] [--jobs J] [--ranks R]

In: ESC-50 (default: `$CRAFT_SHARED/data/esc50`). Folds 1 to 4 train, without labels and then with them; fold 5
is evaluated. Out: OUT/small_scale.md, a table with mean and spread over the seeds of finetuning beside
the paper's order. Runs through `launchers/ablate.py` with the table and the scale beside this file, one seed after
the other; the same command again goes on, and more seeds, steps or epochs add runs.

With the defaults 3 pretrainings of 3 to 15 minutes and 24 finetunings of 1 to 5 on one core each: about an hour on two.
"""

import argparse
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from scipy.stats import rankdata, spearmanr

from pipeline.ablation.campaign import Campaign
from pipeline.ablation.grid import ROOT, Grid
from pipeline.errors import UserError, run_cli
from pipeline.report.collect import Collected, Result

HERE = Path(__file__).parent
TABLE = HERE / "small_scale_table.yaml"
COLUMN = "esc50"


def write_scale(out: Path, esc50: Path, steps: int, epochs: float) -> Path:
    """OUT/scale.yaml: the scale beside this file, with data and lengths filled in."""
    scale: dict[str, Any] = yaml.safe_load((HERE / "small_scale_scale.yaml").read_text(encoding="utf-8"))
    scale["data"][COLUMN]["build"] = f"--dataset esc50 --audio-root {shlex.quote(str(esc50))} --seconds 5"
    scale["pretrain"]["settings"]["train.steps"] = steps
    scale["tasks"][COLUMN]["settings"]["train.epochs"] = epochs
    path = out / "scale.yaml"
    path.write_text(yaml.safe_dump(scale), encoding="utf-8")
    return path


def summarise(part: Collected, seeds: list[int]) -> str:
    """The table as Markdown, and how far the two orders agree."""
    names = [row.name for row in part.table.rows]
    cells = {name: part.results[name, COLUMN] for name in names}
    ours = _ranks({name: cell.mean for name, cell in cells.items()})
    paper = _ranks({name: cell.paper for name, cell in cells.items()})
    lines = [f"# {part.table.spec.title}", "", "| system | ours | rank | seeds | paper | rank | to the reference |",
             "|---|---:|---:|---:|---:|---:|---:|"]  # fmt: skip
    for name, cell in cells.items():
        known = "" if cell.paper is None else f"{cell.paper:.1f}"
        numbers = [_mean(cell), ours.get(name, ""), f"{cell.done}/{cell.wanted}", known, paper.get(name, "")]
        lines.append(f"| {' | '.join([name, *numbers, _difference(cell)])} |")
    both = [name for name in names if name in ours and name in paper]
    lines += ["", " ".join(part.caption), ""]
    if len(both) > 2:
        rho = spearmanr([cells[n].mean for n in both], [cells[n].paper for n in both]).statistic
        lines.append(f"Rank correlation with the paper over its {len(both)} systems: {rho:+.2f}.")
    lines.append(
        f"Percent of the clips of fold 5; mean ± standard deviation over seeds {seeds} of the finetuning, which share "
        f"one pretraining; chance is 2. To the reference '{part.reference}': points, 95 % interval and p of a paired "
        "bootstrap over clips."
    )
    return "\n".join(lines) + "\n"


def _ranks(values: dict[str, float | None]) -> dict[str, str]:
    known = {name: value for name, value in values.items() if value is not None}
    ranks = rankdata([-value for value in known.values()]) if known else []
    return {name: f"{rank:g}" for name, rank in zip(known, ranks, strict=True)}


def _mean(cell: Result) -> str:
    if cell.mean is None:
        return ""
    return f"{cell.mean:.1f}" + ("" if cell.spread is None else f" ± {cell.spread:.1f}")


def _difference(cell: Result) -> str:
    d = cell.difference
    return f"{100 * d.value:+.1f} [{100 * d.low:+.1f}, {100 * d.high:+.1f}], {d.p:.3f}" if d else ""


def main() -> int:
    """Parses, runs seed after seed, writes the table after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    data = Path(os.environ.get("CRAFT_SHARED", ROOT.parent / "shared")) / "data" / "esc50"
    add("--esc50", type=Path, default=data, metavar="DIR", help="audio/ and meta/ of ESC-50 (default: of CRAFT_SHARED)")
    add("--out", type=Path, default=Path("runs/small_scale"), metavar="DIR", help="(default: runs/small_scale)")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="of the finetuning (default: 0 1 2)")
    add("--pretrain-steps", type=int, default=300, metavar="N", help="of 32 clips (default: 300)")
    add("--epochs", type=float, default=2, metavar="N", help="of finetuning, 1600 clips each (default: 2)")
    add("--jobs", type=int, default=2, metavar="J", help="runs at a time (default: 2)")
    add("--ranks", type=int, default=1, metavar="R", help="of each run (default: 1)")
    args = parser.parse_args()
    if not (args.esc50 / "meta" / "esc50.csv").is_file():
        raise UserError(f"--esc50 {args.esc50}: holds no meta/esc50.csv; give the directory of ESC-50")
    args.out.mkdir(parents=True, exist_ok=True)
    scale = write_scale(args.out, args.esc50.resolve(), args.pretrain_steps, args.epochs)
    for count in range(1, len(args.seeds) + 1):
        seeds = args.seeds[:count]
        command = [sys.executable, ROOT / "launchers" / "ablate.py", TABLE, "--scale", scale, "--out", args.out,
                   "--jobs", str(args.jobs), "--ranks", str(args.ranks), "--seeds", *map(str, seeds)]  # fmt: skip
        status = subprocess.run(command, check=False).returncode
        if status:
            return status
        grid = Grid([TABLE], str(scale), {}, seeds)
        text = summarise(Collected(next(iter(grid.tables)), Campaign(grid, args.out.resolve())), seeds)
        (args.out / "small_scale.md").write_text(text, encoding="utf-8")
        print(text, flush=True)
    return 0


if __name__ == "__main__":
    run_cli(main)
