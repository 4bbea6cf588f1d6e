"""Run the ablations of the paper: every distinct run once, in any number of sittings.

    python launchers/ablate.py configs/ablation/table3.yaml [MORE.yaml ...] [--scale micro] [--dry-run] [--jobs N]

In: table files; shards. Out: in --out, one run directory for each distinct pretraining and finetuning;
`python -m pipeline.report` makes the tables of them. The same command again goes on: finished runs are
kept, failed ones tried again, interrupted ones resumed. Exit status: 0 all done, 1 some failed, 130 interrupted.
"""

import argparse
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.ablation.executors import Executor, LocalExecutor, SlurmExecutor
from pipeline.ablation.grid import ROOT, Grid
from pipeline.command_line import new_parser, path_of, read_deepspeed_config
from pipeline.config import LogConfig
from pipeline.errors import UserError, run_cli
from pipeline.files import check_output_directory, config_path, lock, read_json, user_path, write_json
from pipeline.tracking import check_tracking, tracking_uri
from pipeline.tracking.spool import first_line
from pipeline.tracking.store import without_password

if TYPE_CHECKING:
    from pipeline.ablation.campaign import Campaign, Outcome


def parser() -> argparse.ArgumentParser:
    """The command line."""
    make = new_parser(__doc__)
    add = make.add_argument
    add("tables", nargs="+", type=partial(config_path, what="TABLE.yaml", folder="ablation"), metavar="TABLE.yaml",
        help="files of configs/ablation/")  # fmt: skip
    add("--out", type=path_of("--out"), metavar="DIR",
        help="of the run directories (default: runs/ablation-SCALE)")  # fmt: skip
    add("--scale", default="paper", metavar="NAME", help="configs/ablation/scale/NAME.yaml, or a file (default: paper)")
    add("--shards", action="append", default=[], metavar="NAME=DIR", help="a data set of the scale (default: its own)")
    add("--seeds", nargs="+", type=int, default=[], metavar="N", help="of the finetunings (default: the table's)")
    add("--dry-run", action="store_true", help="print one line a run and stop (default: off)")
    add("--jobs", type=int, default=1, metavar="N", help="runs at a time (default: 1)")
    add("--ranks", type=int, default=0, metavar="R", help="of each run (default: its share of the GPUs, else 1)")
    add("--executor", choices=("local", "slurm"), default="local", help="who runs them (default: local)")
    add("--nodes", type=int, default=1, metavar="N", help="slurm: nodes of each run (default: 1)")
    add("--slurm", action="append", default=[], metavar="KEY=VALUE",
        help="slurm: an option of sbatch, such as partition=gpu (default: a GPU a rank, cpus-per-task=8)")  # fmt: skip
    add("--retries", type=int, default=1, metavar="N", help="times a failed run is tried again (default: 1)")
    add("--deepspeed_config", default="ds.json", metavar="JSON", help="as in pretrain.py (default: ds.json)")
    return make


def main() -> int:
    """Parses, plans, runs."""
    args = parser().parse_args()
    for name, least in (("jobs", 1), ("nodes", 1), ("ranks", 0), ("retries", 0)):
        if getattr(args, name) < least:
            raise UserError(f"--{name} {getattr(args, name)}: give {least} or more")
    out = args.out or Path("runs") / f"ablation-{Path(args.scale).stem}"
    out = out.resolve()  # recipes name it, and launchers may run elsewhere
    if args.scale.endswith(".yaml"):
        args.scale = str(user_path(args.scale, "--scale").resolve())
    from pipeline.ablation.campaign import Campaign  # torch: not for --help

    grid = Grid(args.tables, args.scale, _pairs(args.shards, "--shards"), args.seeds)
    campaign = Campaign(grid, out)
    if args.dry_run:
        _print_plan(campaign)
        return 0
    read_deepspeed_config(args.deepspeed_config)
    check_output_directory(out, "--out")
    check_scale(out, args.scale)
    check_tracking(LogConfig(), out / "run")
    executor = _executor(args, out)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does
    with _alone(out):
        try:
            campaign.check_deepspeed(args.deepspeed_config)
            campaign.check_batches(args.deepspeed_config, executor.ranks)
            _build_shards(campaign)
            campaign.check_data()
            shards = _pairs(args.shards, "--shards")
            write_json(out / "ablation.json", record(out, grid, args.scale, shards, args.seeds))
            _make_store(out)
            outcome = campaign.execute(executor, args.deepspeed_config, args.retries, _say)
        except KeyboardInterrupt:
            _say("the same command goes on from here")
            return 130
    return _sum_up(outcome, args.tables, out)


def record(out: Path, grid: Grid, scale: str, shards: dict[str, str], seeds: list[int]) -> dict[str, Any]:
    """What `ablation.json` says for the report: of each table the seeds of all commands so far; no run is left out.

    Raises:
        UserError: the one that is there is damaged.
    """
    file = out / "ablation.json"
    before = read_json(file, "delete it, and repeat the command") if file.exists() else {"shards": {}, "seeds": {}}
    known = before["seeds"]
    if isinstance(known, list):  # of an earlier release, for whichever tables
        known = dict.fromkeys(grid.tables, known)
    now = {name: sorted({*(seeds or table.seeds), *known.get(name, ())}) for name, table in grid.tables.items()}
    return {"scale": scale, "shards": before["shards"] | shards, "seeds": known | now}


def check_scale(out: Path, scale: str) -> None:
    """An ablation keeps its scale: the report finds its runs by it.

    Raises:
        UserError: the directory is that of another one.
    """
    if not (out / "ablation.json").exists():
        return
    was = read_json(out / "ablation.json", "delete it, and repeat the command with the scale that it had")["scale"]
    if Path(was).name != Path(scale).name:
        raise UserError(f"--out {out} holds an ablation of scale {was}, not {scale}; give another --out")


def _executor(args: argparse.Namespace, out: Path) -> Executor:
    if args.executor == "slurm":
        return SlurmExecutor(out, args.jobs, args.ranks, args.nodes, _pairs(args.slurm, "--slurm"))
    import torch  # slow to import, and only the local executor has to know the GPUs

    return LocalExecutor(args.jobs, args.ranks, torch.cuda.device_count())


def _print_plan(campaign: "Campaign") -> None:
    """One line for each run: kind, name, what distinguishes it, state, tables."""
    for run in campaign.grid.runs:
        used = " ".join(run.used_by)
        print(f"{run.kind:8s}  {run.name:20s}  {run.digest}  {run.about:44s}  {campaign.state(run):6s}  {used}")


def _build_shards(campaign: "Campaign") -> None:
    """Makes generated data sets where they are missing.

    Raises:
        UserError: their build failed.
    """
    for name in sorted({run.data for run in campaign.grid.runs}):
        folder = Path(campaign.shards(name))
        options = campaign.grid.scale.data[name].build
        if options and not (folder / "manifest.json").exists():
            _say(f"building {folder}")
            script = ROOT / "shard_tools" / "build_shards.py"
            done = subprocess.run([sys.executable, script, *shlex.split(options), "--out", folder], check=False)
            if done.returncode:
                raise UserError(
                    f"data.{name}.build of the scale: build_shards.py {options} --out {folder} ended with status "
                    f"{done.returncode}; its own words are above; mend that and repeat the command"
                )


def _make_store(out: Path) -> None:
    """The default SQLite store, made before several runs at once would make it.

    Raises:
        UserError: MLflow does not take the one that is there, such as one of another version's.
    """
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient
    from sqlalchemy.exc import SQLAlchemyError

    uri = tracking_uri(LogConfig(), out / "run")
    if not uri.startswith("sqlite"):
        return
    try:
        client = MlflowClient(uri)
        if client.get_experiment_by_name("ablation") is None:
            client.create_experiment("ablation", (out.resolve() / "mlartifacts").as_uri())
    except (MlflowException, SQLAlchemyError) as error:
        raise UserError(f"{uri}: {first_line(error)}; mend that, or name another store: MLFLOW_TRACKING_URI") from error


def _sum_up(outcome: "Outcome", tables: list[Path], out: Path) -> int:
    _say(f"{len(outcome['done'])} done, {len(outcome['failed'])} failed, {len(outcome['blocked'])} not begun")
    for folder in outcome["failed"]:
        _say(f"  failed: {out / folder / 'output.log'}")
    for folder in outcome["blocked"]:
        _say(f"  not begun, its pretraining failed: {folder}")
    uri = tracking_uri(LogConfig(), out / "run")
    shown = without_password(uri)
    page = shown if uri.startswith("http") else f"mlflow ui --backend-store-uri {shlex.quote(shown)}"
    _say(f"compare: {page} (experiment ablation; sort by the final metric, tick runs, Compare)")
    _say(f"report: python -m pipeline.report {' '.join(map(str, tables))} --runs {out} --out report/")
    return 1 if outcome["failed"] else 0


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Two campaigns in one directory would race for the same runs.

    Raises:
        UserError: another one is there.
    """
    out.mkdir(parents=True, exist_ok=True)
    with (out / "ablate.lock").open("ab") as file:
        if not lock(file.fileno(), wait=False):
            raise UserError(f"{out}: another ablate.py works there; wait for it or give another --out")
        yield


def _pairs(words: list[str], option: str) -> dict[str, str]:
    for word in words:
        if "=" not in word:
            raise UserError(f"{option} {word} is not NAME=VALUE; see --help")
    return dict(word.split("=", 1) for word in words)


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    run_cli(main)
