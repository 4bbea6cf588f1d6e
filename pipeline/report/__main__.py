"""The paper's tables with its numbers and ours beside them.

    python -m pipeline.report configs/ablation/table3.yaml [MORE.yaml ...] [--runs runs/ablation-paper] --out report/

In: table files and the directory that ablate.py filled. Out: report.md, report.html, a PNG for each table,
numbers.json; the same in MLflow, beside the runs. Cells that were not run are empty.
"""

import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.ablation.campaign import Campaign
from pipeline.ablation.grid import Grid
from pipeline.command_line import new_parser, path_of
from pipeline.config import LogConfig
from pipeline.errors import UserError, run_cli
from pipeline.files import check_output_directory, config_path, read_json, write_json, write_text
from pipeline.report import render
from pipeline.report.collect import Collected
from pipeline.tracking import tracking_uri
from pipeline.tracking.spool import first_line
from pipeline.tracking.store import without_password


def main() -> int:
    """Parses, collects, writes."""
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("tables", nargs="+", type=partial(config_path, what="TABLE.yaml", folder="ablation"), metavar="TABLE.yaml",
        help="files of configs/ablation/")  # fmt: skip
    add("--runs", type=path_of("--runs"), metavar="DIR",
        help="--out of ablate.py (default: the only runs/ablation-*, else -paper)")  # fmt: skip
    add("--out", type=path_of("--out"), default=Path("report"), metavar="DIR",
        help="(default: report/)")  # fmt: skip
    add("--seeds", nargs="+", type=int, default=[], metavar="N",
        help="of the finetunings (default: all that ablate.py ran)")  # fmt: skip
    add("--no-mlflow", action="store_true", help="do not log the report to MLflow (default: log it)")
    args = parser.parse_args()
    check_output_directory(args.out, "--out")
    runs = args.runs or _only_runs()
    if args.runs and not (runs / "ablation.json").exists():
        raise UserError(f"--runs {runs}: no ablation.json in it; give the --out of ablate.py")
    about: dict[str, Any] = {"scale": "paper", "shards": {}, "seeds": []}
    if (runs / "ablation.json").exists():
        about |= read_json(runs / "ablation.json", "repeat the ablate.py command, which writes it anew")
    grid = Grid(args.tables, about["scale"], about["shards"], args.seeds or about["seeds"])
    campaign = Campaign(grid, runs.resolve())
    parts = [Collected(name, campaign) for name in grid.tables]
    files = write(parts, args.out)
    if not args.no_mlflow and any(campaign.state(run) == "done" for run in grid.runs):
        log_to_mlflow(parts, files, runs)
    done = sum(result.done for part in parts for result in part.results.values())
    wanted = sum(result.wanted for part in parts for result in part.results.values())
    sys.stdout.write(f"{done} of {wanted} finetunings of {len(parts)} tables are done -> {args.out / 'report.md'}\n")
    return 0


def write(parts: list[Collected], out: Path) -> list[Path]:
    """Writes the report's files into `out`."""
    out.mkdir(parents=True, exist_ok=True)
    title = parts[0].table.title if len(parts) == 1 else "CRAFT: the paper's numbers and ours"
    drawn = render.tables(parts)
    write_text(out / "report.md", render.markdown(title, drawn))
    write_text(out / "report.html", render.html(title, drawn))
    numbers: dict[str, dict[str, dict[str, Any]]] = {part.name: {} for part in parts}
    for part in parts:
        for (row, column), result in part.results.items():
            numbers[part.name].setdefault(row, {})[column] = asdict(result)
    write_json(out / "numbers.json", numbers)
    pictures = [out / f"{part.name}.png" for part in parts]
    for part, picture in zip(parts, pictures, strict=True):
        render.draw(part, picture)
    return [out / name for name in ("report.md", "report.html", "numbers.json")] + pictures


def log_to_mlflow(parts: list[Collected], files: list[Path], runs: Path) -> None:
    """A run "report" in the experiment of the ablation, with the files and our means as metrics.

    Raises:
        UserError: the server does not take it.
    """
    from mlflow.entities import Metric, RunTag
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient
    from sqlalchemy.exc import SQLAlchemyError

    uri = tracking_uri(LogConfig(), runs / "run")
    try:
        client = MlflowClient(uri)
        experiment = client.get_experiment_by_name("ablation")
        number = experiment.experiment_id if experiment else client.create_experiment("ablation")
        stems = " ".join(part.name for part in parts)
        run_id = client.create_run(number, run_name=f"report {stems}", tags={"kind": "report"}).info.run_id
        metrics = [
            Metric(_metric_name(part.name, *key), result.mean, 0, 0)
            for part in parts
            for key, result in part.results.items()
            if result.mean is not None
        ]
        note = "\n\n".join(f"{table['title']}: {table['caption']}" for table in render.tables(parts))
        client.log_batch(run_id, metrics=metrics, tags=[RunTag("mlflow.note.content", note[:5000])])
        for file in files:
            client.log_artifact(run_id, str(file))
        client.set_terminated(run_id)
    except (MlflowException, SQLAlchemyError, OSError) as error:
        raise UserError(
            f"{without_password(uri)}: {first_line(error)}; the report's files are written; --no-mlflow leaves the "
            "server out"
        ) from error


def _metric_name(table: str, row: str, column: str) -> str:
    """MLflow allows letters, digits and _-. /: in names."""
    safe = "".join(c if c.isalnum() or c in "-." else "_" for c in row).strip("_")
    return f"{table}/{safe}/{column}"


def _only_runs() -> Path:
    found = sorted(path.parent for path in Path("runs").glob("ablation-*/ablation.json"))
    if len(found) > 1 and Path("runs/ablation-paper") not in found:
        raise UserError(f"--runs is not given and there are {', '.join(map(str, found))}; name one")
    return found[0] if len(found) == 1 else Path("runs/ablation-paper")


if __name__ == "__main__":
    run_cli(main)
