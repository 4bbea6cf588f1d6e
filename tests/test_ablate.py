"""Ablations: the distinct runs of the tables, and running them whatever happens."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from mlflow.exceptions import MlflowException

from launchers.ablate import _make_store, main
from pipeline.ablation import campaign, executors
from pipeline.ablation.campaign import Campaign
from pipeline.ablation.executors import LocalExecutor, SlurmExecutor
from pipeline.ablation.grid import Grid
from pipeline.errors import UserError
from pipeline.recipes import flatten
from tests.conftest import ROOT
from tests.ranks import run_script

BEYOND = ROOT / "configs" / "ablation" / "beyond.yaml"
TABLES = sorted(set((ROOT / "configs" / "ablation").glob("*.yaml")) - {BEYOND})  # the paper's

# A launcher that does what the real ones do to a run directory, without the training in between.
LAUNCHER = """
import json, pathlib, sys, time, yaml
recipe = yaml.safe_load(open(sys.argv[sys.argv.index("--config") + 1]))
run, plan = pathlib.Path(recipe["run"]["dir"]), json.loads(open(PLAN).read())
with (run / "starts").open("a") as file:
    file.write("x")
for word, action in plan.items():
    if word in run.name:
        number = len((run / "starts").read_text())
        if action == "fail" or (action == "fail once" and number == 1):
            sys.exit("this one fails")
        if action == "bad settings":
            sys.exit(2)
        if action == "slow":
            time.sleep(60)
folder = run / "checkpoints" / "step-00000040"
folder.mkdir(parents=True, exist_ok=True)
(folder / "complete").touch()
init = recipe["model"]["init"]
assert not init or (pathlib.Path(init) / "done.json").exists(), "begun before its pretraining was done"
(run / "data.json").write_text(json.dumps({"digest": "D"}))
if "finetune" in recipe:
    (run / "results.json").write_text(json.dumps({"metric": "mAP", "value": 0.25}))
"""


def ablate(*words: object) -> subprocess.CompletedProcess[str]:
    return run_script("launchers/ablate.py", *words)


@pytest.fixture
def world(tmp_path):
    """Table 3 at micro scale, a launcher that obeys `plan`, and what is said."""

    class World:
        plan = tmp_path / "plan.json"
        campaign = Campaign(Grid([ROOT / "configs/ablation/table3.yaml"], "micro", {}), tmp_path / "out")

        def __init__(self) -> None:
            self.said: list[str] = []

        def run(self, plan: dict[str, str], jobs: int = 2, retries: int = 1):
            self.plan.write_text(json.dumps(plan))
            executor = LocalExecutor(jobs, 1, 0, tmp_path)
            return self.campaign.execute(executor, "ds.json", retries, self.said.append)

        def pretraining(self, name: str) -> str:
            """Folder of the only pretraining of that name."""
            (folder,) = (run.folder for run in self.campaign.grid.runs if run.kind == "pretrain" and name in run.name)
            return folder

        def starts(self) -> dict[str, int]:
            return {file.parent.name: len(file.read_text()) for file in (tmp_path / "out").glob("*/starts")}

    for script in ("pretrain.py", "finetune.py"):
        (tmp_path / script).write_text(LAUNCHER.replace("PLAN", repr(str(World.plan))))
    return World()


@pytest.mark.parametrize("scale", ["paper", "micro"])
def test_fifteen_pretrainings_serve_all_tables(scale):
    """The paper's twelve, and three with Eq. 4a's dot products beside the weights of its Appendix A.1."""
    grid = Grid(TABLES, scale, {})
    pretrainings = [run for run in grid.runs if run.kind == "pretrain"]
    assert len(TABLES) == 12
    assert len(pretrainings) == len({run.digest for run in pretrainings}) == 15
    assert grid.runs[:15] == pretrainings
    assert len({run.folder for run in grid.runs}) == len(grid.runs)
    for run in grid.runs[15:]:
        assert run.init in pretrainings
    craft = grid.cells["table1", "CRAFT", "esc50"]
    assert [run.recipe.data.fold for run in craft] == ([1, 2, 3, 4, 5] if scale == "paper" else [1, 2])


@pytest.mark.parametrize("scale", ["paper", "micro"])
def test_methods_beyond_the_paper_stand_beside_its_own(scale):
    """PSWaCL's pretraining serves that table too; rows at its batch differ from it in what pretrains alone."""
    beyond = [run for run in Grid([BEYOND], scale, {}).runs if run.kind == "pretrain"]
    paper = {run.digest: run for run in Grid(TABLES, scale, {}).runs if run.kind == "pretrain"}
    assert len(beyond) == 9
    assert [run.recipe.pretrain.method for run in beyond if run.digest in paper] == ["pswacl"]
    craft = flatten(beyond[0].recipe)
    for run in beyond:
        other = {key for key, value in flatten(run.recipe).items() if value != craft[key]}
        own = run.name.endswith(("CRAFT-MAE", "CRAFT-Latent", "Mosaic")) and run.recipe.optim.name == "adamw"
        assert own or all(key.startswith("pretrain.") for key in other)


def test_dry_run_prints_a_line_for_each_distinct_run():
    done = ablate(*TABLES, "--dry-run")
    assert done.returncode == 0, done.stderr
    kinds = [line.split()[0] for line in done.stdout.splitlines()]
    assert kinds == ["pretrain"] * 15 + ["finetune"] * (len(kinds) - 15)
    one = Grid([ROOT / "configs/ablation/table5c.yaml"], "paper", {}).runs
    assert [run.kind for run in one] == ["pretrain"] + ["finetune"] * 4


def test_paper_numbers_are_the_specification_s():
    grid = Grid(TABLES, "paper", {})
    numbers = {(name, row.name): row.paper for name, table in grid.tables.items() for row in table.rows}
    assert numbers["table1", "CRAFT"] == {"as_bal": 33.4, "as_full": 43.0, "esc50": 90.1}
    assert numbers["table4", "24-PSWaCL-SWaB"] == {"as_bal": 13.9}
    assert [row.paper["as_bal"] for row in grid.tables["table5d"].rows] == [33.1, 33.4, 32.8, 33.0]
    batch = {r.name: (r.recipe.train.batch_size, r.recipe.optim.lr) for r in grid.runs if r.name == "24-SSAST"}
    assert batch == {"24-SSAST": (24, 1e-4)}
    assert {r.recipe.data.train_split for r in grid.runs if r.kind == "pretrain"} == {"unbalanced,train"}


def test_a_row_from_scratch_has_no_pretraining_and_one_share(tmp_path):
    row = {"name": "random", "scratch": True, "finetune": {"finetune.method": "ast"}, "paper": {"as_bal": None}}
    table = {"title": "T", "columns": ["as_bal"], "shares": [0.5, 1.0], "pretrain_seeds": [0, 1], "rows": [row]}
    (tmp_path / "table.yaml").write_text(yaml.safe_dump(table))
    grid = Grid([tmp_path / "table.yaml"], "micro", {}, [3, 4])
    assert [(run.name, run.init, run.share, run.recipe.run.seed) for run in grid.runs] == [
        ("Scratch-AST", None, 1.0, 3), ("Scratch-AST", None, 1.0, 4)]  # fmt: skip
    assert Campaign(grid, tmp_path).state(grid.runs[0]) == "to do"


def test_what_changes_no_number_changes_no_run_and_the_rest_does(tmp_path):
    scale = yaml.safe_load((ROOT / "configs/ablation/scale/micro.yaml").read_text())
    table = ROOT / "configs/ablation/table5b.yaml"

    def digests(**settings) -> list[str]:
        pretrain = {**scale["pretrain"], "settings": {**scale["pretrain"]["settings"], **settings}}
        file = tmp_path / "scale.yaml"
        file.write_text(yaml.safe_dump({**scale, "pretrain": pretrain}))
        return [run.digest for run in Grid([table], str(file), {"synth": str(tmp_path)}).runs]

    base = digests()
    assert len(set(base)) == 4
    assert digests(**{"data.workers": 7, "log.every": 3, "checkpoint.keep_at": [0.5], "train.micro_batch": 2}) == base
    for setting in ({"optim.lr": 2e-3}, {"pretrain.r_g": 5.0}, {"train.steps": 41}):
        assert not set(digests(**setting)) & set(base), setting  # the finetunings change with their pretraining


def test_a_new_setting_counts_where_runs_before_had_another_value(tmp_path):
    """Mixup's other clips were balanced ones under data.sampler=balanced, where today's default is another."""

    def digests(**settings) -> list[str]:
        row = {"name": "random", "scratch": True, "finetune": settings, "paper": {"as_bal": None, "as_full": None}}
        table = {"title": "T", "columns": ["as_bal", "as_full"], "rows": [row]}
        (tmp_path / "table.yaml").write_text(yaml.safe_dump(table))
        return [run.digest for run in Grid([tmp_path / "table.yaml"], "micro", {}, [0]).runs]

    assert digests() == ["8ae4250f27", "039416bd76"]
    assert digests(**{"augment.mixup": 0.5}) == ["7461c6e078", "946c5d3df0"]
    assert digests(**{"augment.mixup": 0.5, "augment.partners": "sampler"})[1] == "88aa06c185"  # as it was


def test_finished_runs_stay_failed_ones_are_tried_again(world):
    swapt = world.pretraining("-SWaPT")
    outcome = world.run({"SSAST-AST": "fail once", swapt: "bad settings", "SWaPT-SWAST": "slow"})
    starts = world.starts()
    assert outcome["failed"] == [swapt]
    assert starts[swapt] == 1  # exit status 2: the settings are wrong, the next try would meet it too
    assert len(outcome["blocked"]) == 3
    assert {count for name, count in starts.items() if "SSAST-AST" in name} == {2}
    assert sum("once more" in line for line in world.said) == 1
    assert any("this one fails" in line for line in world.said)
    assert world.campaign.state(next(r for r in world.campaign.grid.runs if r.folder == swapt)) == "failed"
    before = world.starts()
    again = world.run({})
    assert again["failed"] == again["blocked"] == []
    assert len(again["done"]) == 10
    after = world.starts()
    assert {name: after[name] - before.get(name, 0) for name in after if after[name] != before.get(name, 0)} == {
        name: 1 for name in after if "SWaPT" in name
    }
    assert world.run({})["done"]
    assert world.starts() == after


def test_a_run_that_cannot_begin_does_not_end_the_others(world, monkeypatch):
    initial = Campaign._initial

    def refuse(campaign, run, init):
        if "SWAST" in run.name:
            raise UserError("no checkpoint near step 20")
        return initial(campaign, run, init)

    monkeypatch.setattr(Campaign, "_initial", refuse)
    outcome = world.run({})
    (failed,) = outcome["failed"]
    assert "SWAST" in failed
    assert (len(outcome["done"]), outcome["blocked"]) == (9, [])
    assert f"failed  {failed}: no checkpoint near step 20" in world.said
    monkeypatch.undo()
    assert len(world.run({})["done"]) == 10


def test_a_store_that_mlflow_does_not_take_is_one_line(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)

    def refuse(uri):
        raise MlflowException("Detected out-of-date database schema\nTake a backup")

    monkeypatch.setattr("mlflow.tracking.MlflowClient", refuse)
    with pytest.raises(UserError, match=r"mlflow\.db: Detected out-of-date .*; mend that, or name another"):
        _make_store(tmp_path)


def test_a_run_whose_ablate_was_killed_is_not_started_twice(world, monkeypatch):
    grid = world.campaign.grid
    run = grid.runs[0]
    folder = world.campaign.run_dir(run)
    folder.mkdir(parents=True)
    held = "import fcntl, sys, time; f = open(sys.argv[1], 'w'); fcntl.flock(f, 2); print(flush=True); time.sleep(600)"
    orphan = subprocess.Popen([sys.executable, "-c", held, str(folder / "lock")], stdout=subprocess.PIPE)
    try:
        assert orphan.stdout is not None
        orphan.stdout.readline()
        looks = []

        def sleep(seconds: float) -> None:
            looks.append(any(line.startswith(f"started {run.folder}") for line in world.said))
            if len(looks) == 3:
                orphan.kill()
                orphan.wait()
            time.sleep(seconds)

        monkeypatch.setattr(campaign, "time", SimpleNamespace(sleep=sleep, monotonic=time.monotonic))
        outcome = world.run({})
        assert looks[:3] == [False] * 3
        assert len(outcome["done"]) == 10
        assert world.starts()[run.folder] == 1
    finally:
        orphan.kill()
        orphan.wait()


def test_interrupting_stops_the_running_ones(world, monkeypatch):
    """Ctrl-C, raised where the main thread waits: a signal could come in a callback, whose exceptions Python drops."""

    def sleep(seconds: float) -> None:
        if len(world.starts()) == 2:
            raise KeyboardInterrupt
        time.sleep(seconds)

    with monkeypatch.context() as patch:
        patch.setattr(campaign, "time", SimpleNamespace(sleep=sleep, monotonic=time.monotonic))
        with pytest.raises(KeyboardInterrupt):
            world.run({world.pretraining("-SWaPT"): "slow", world.pretraining("-SSAST"): "slow"})
    assert not list(world.campaign.out.glob("*/checkpoints"))  # they were not waited for
    assert "interrupted: 2 runs" in world.said[-1]
    assert len(world.run({})["done"]) == 10


def test_other_data_is_refused(world, shards):
    grid = Grid([ROOT / "configs/ablation/table3.yaml"], "micro", {"synth": str(shards)})
    campaign = Campaign(grid, world.campaign.out)
    campaign.check_data()
    world.run({})
    with pytest.raises(UserError, match="give another --out"):
        campaign.check_data()


def test_another_precision_than_that_of_finished_runs_is_refused(world):
    for ds in ("ds.json", "bf16.json"):
        world.campaign.check_deepspeed(ds)
    world.run({"SWaPT-SWAST": "fail"})  # with ds.json: bf16 where the GPU has it
    for ds, said in (("bf16.json", r'bf16 = {"enabled": "auto"}, .*bf16\.json gives {"enabled": true}; give'),
                     ("fp16.json", r"bf16 = .*fp16\.json gives none"),
                     ("zero0.json", r"bf16 = .*zero0\.json gives none")):  # fmt: skip
        with pytest.raises(UserError, match=said):
            world.campaign.check_deepspeed(ds)
    for ds in ("ds.json", "zero3.json", "compile.json"):
        world.campaign.check_deepspeed(ds)
    for file in world.campaign.out.glob("*/done.json"):  # of an earlier release
        file.write_text(json.dumps({key: value for key, value in json.loads(file.read_text()).items()
                                    if key != "deepspeed"}))  # fmt: skip
    world.campaign.check_deepspeed("bf16.json")


def test_ranks_that_a_batch_does_not_divide_by_are_refused_before_the_first_run(tmp_path):
    """CRAFT-MAE's 512 clips were trained on 8 ranks to the end, and the finetuning's 12 were refused then."""
    campaign = Campaign(Grid([ROOT / "configs/ablation/beyond.yaml"], "paper", {}), tmp_path)
    for ranks in (1, 2, 4):
        campaign.check_batches("ds.json", ranks)
    with pytest.raises(UserError, match=r"train\.batch_size = \d+ does not divide by 8 ranks; .*; --ranks is of all"):
        campaign.check_batches("ds.json", 8)
    done = run_script("launchers/ablate.py", "beyond.yaml", "--out", tmp_path / "out", "--ranks", 8)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
    assert "does not divide by 8 ranks" in done.stderr


def test_data_without_a_held_out_split_is_refused_before_a_run_begins(world, shards, tmp_path):
    """Its finetunings would train for days and leave no result."""
    scale = yaml.safe_load((ROOT / "configs/ablation/scale/micro.yaml").read_text())
    scale["tasks"]["as_bal"]["settings"]["data.eval_split"] = "dev"
    for fold in (0, 1):
        scale["tasks"]["as_bal"]["folds"] = [fold]
        (tmp_path / "scale.yaml").write_text(yaml.safe_dump(scale))
        grid = Grid([ROOT / "configs/ablation/table3.yaml"], str(tmp_path / "scale.yaml"), {"synth": str(shards)})
        with nullcontext() if fold else pytest.raises(UserError, match=f"{shards} has no split 'dev'"):
            Campaign(grid, world.campaign.out).check_data()


def test_data_without_labels_is_refused_before_a_run_begins(world, unlabelled):
    grid = Grid([ROOT / "configs/ablation/table3.yaml"], "micro", {"synth": str(unlabelled)})
    with pytest.raises(UserError, match=f"{unlabelled}: its clips have no labels"):
        Campaign(grid, world.campaign.out).check_data()


def test_a_time_limit_that_is_none_is_refused(tmp_path):
    with pytest.raises(UserError, match="--slurm timeout-min=1:30: give a whole number of minutes"):
        SlurmExecutor(tmp_path, 1, 1, 1, {"timeout-min": "1:30"}, cluster="local")


@pytest.mark.slow
def test_submitit_runs_a_job_and_reports_its_failure(tmp_path):
    """submitit's own local cluster: the same objects, files and environment as with sbatch."""
    executor = SlurmExecutor(tmp_path, 1, 1, 1, {}, cluster="local")
    assert executor.start(tmp_path, "pretrain.py", ["data.shards=/no/such", f"run.dir={tmp_path}/run"])
    deadline = time.monotonic() + 300
    while (status := executor.poll(tmp_path)) is None and time.monotonic() < deadline:
        time.sleep(0.5)
    assert status == 1
    assert "/no/such" in (tmp_path / "output.log").read_text()


# A task of a job, with submitit's handler of its signal, and a launcher that saves.
PREEMPTED = """
import pathlib, signal, sys
from pipeline.ablation.executors import SlurmRank
TRAINER = '''
import pathlib, signal, sys, time
def save(number, frame):
    time.sleep(0.5)
    pathlib.Path("saved").touch()
    sys.exit(128 + number)
signal.signal(signal.SIGTERM, save)
pathlib.Path("begun").touch()
time.sleep(600)
'''
def queue_again(number, frame):
    pathlib.Path("queued" if pathlib.Path("saved").exists() else "lost").touch()
    sys.exit(3)
signal.signal(signal.SIGUSR2, queue_again)
rank = SlurmRank(pathlib.Path("."), "pretrain.py", [])
rank.command = [sys.executable, "-c", TRAINER]
rank()
"""


@pytest.mark.parametrize("whole_step", [False, True])
def test_a_preempted_job_saves_before_it_is_queued_again(tmp_path, whole_step):
    """Slurm signals the tasks, or with some of its plugins all processes of a step."""
    task = {"SUBMITIT_EXECUTOR": "local", "SUBMITIT_LOCAL_JOB_ID": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", PREEMPTED], cwd=tmp_path, env=os.environ | task,
                               start_new_session=True)  # fmt: skip
    end = time.monotonic() + 300
    while not (tmp_path / "begun").exists():
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.05)
    (os.killpg if whole_step else os.kill)(process.pid, signal.SIGUSR2)
    assert process.wait(300) == 3
    assert (tmp_path / "queued").exists()


@pytest.mark.slow
def test_what_sbatch_refuses_is_said_with_the_option_that_changes_it(slurm, tmp_path):
    executor = SlurmExecutor(tmp_path, 1, 2, 1, {"gres": "tpu:1"})
    with pytest.raises(UserError, match=r"sbatch: error: .*gres.*; change the job with --slurm KEY=VALUE, such as"):
        executor.start(tmp_path, "pretrain.py", [])


@pytest.mark.slow
def test_slurm_runs_a_table_and_a_killed_ablate_finds_its_job_again(slurm, shards, tmp_path):
    """A pretraining and the finetuning that starts from it, two tasks each, queued one after the other."""
    scale = yaml.safe_load((ROOT / "configs/ablation/scale/micro.yaml").read_text())
    scale["pretrain"]["settings"] |= {"train.steps": 4, "train.batch_size": 8, "eval.clips": 8, "log.pictures": 0}
    scale["tasks"]["as_bal"]["settings"] |= {"train.epochs": 1, "eval.every_epochs": 1}
    row = {"name": "ours", "paper": {"as_bal": 31.6}}
    table = {"title": "T", "columns": ["as_bal"], "rows": [row]}
    for name, content in (("scale", scale), ("table", table)):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(content))
    words = [sys.executable, "launchers/ablate.py", tmp_path / "table.yaml", "--scale", tmp_path / "scale.yaml",
             "--shards", f"synth={shards}", "--out", tmp_path / "out", "--executor", "slurm", "--ranks", "2",
             "--slurm", "time=30", "--slurm", "cpus-per-task=2", "--retries", "0"]  # fmt: skip
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as first:
        deadline = time.monotonic() + 300
        while not (notes := list((tmp_path / "out").glob("*/slurm.json"))) and time.monotonic() < deadline:
            time.sleep(0.2)
        first.kill()
    assert notes, slurm.logs()
    job = json.loads(notes[0].read_text())["job_id"]
    assert slurm.field(job, "JobState") in ("PENDING", "RUNNING"), slurm.logs()
    assert slurm.field(job, "TresPerNode").endswith("gpu:2")  # a rank's each
    try:
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    except subprocess.TimeoutExpired as late:
        queue = subprocess.run(["squeue", "--long"], capture_output=True, text=True, check=False).stdout
        pytest.fail(f"{late.stdout!r}{late.stderr!r}\n{queue}\n{slurm.logs()}", pytrace=False)
    assert done.returncode == 0, f"{done.stdout}{done.stderr}{slurm.logs()}"
    assert "2 done, 0 failed" in done.stdout
    submitted = {file.name.split("_")[0] for file in (tmp_path / "out" / "slurm").glob("*_submitted.pkl")}
    assert len(submitted) == 2
    assert job in submitted
    runs = {file.parent for file in (tmp_path / "out").glob("*/done.json")}
    assert len(runs) == 2
    assert all((run / "logs" / "rank-1.log").exists() for run in runs)
    (results,) = (tmp_path / "out").glob("*/results.json")
    assert 0 < json.loads(results.read_text())["value"] <= 1


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("title: T\ncolumns: [mars]\nrows: []\n", "'mars' is no task"),
        ("title: T\ncolumns: [as_bal]\nrowz: []\n", "rows"),
        ("title: T\ncolumns: [as_bal]\nrows: [{name: a, paper: {as_bal: 1}, both: {model.sise: x}}]\n", "model.sise"),
        ("title: [\n", "not YAML"),
        ("title: T\ncolumns: [as_bal]\nrows: [{name: a, paper: {as_bal: 1}}, {name: a, paper: {as_bal: 2}}]\n",
         "table.yaml: two rows are named 'a'"),
        ("title: T\ncolumns: [as_bal]\nrows: [{name: a}]\n", "row 'a' is run in no column; .*null"),
    ],
)
def test_wrong_tables_are_one_line(tmp_path, content, said):
    file = tmp_path / "table.yaml"
    file.write_text(content)
    with pytest.raises(UserError, match=said):
        Grid([file], "micro", {})


def test_tables_of_one_name_are_refused_and_a_seed_given_twice_is_one_run(tmp_path):
    table = ROOT / "configs/ablation/table5b.yaml"
    (tmp_path / table.name).write_text(table.read_text())
    with pytest.raises(UserError, match="two tables are named table5b"):
        Grid([table, tmp_path / table.name], "micro", {})
    cells = Grid([table], "micro", {}, [1, 1, 2]).cells
    assert [run.recipe.run.seed for run in cells["table5b", "Multi-scale", "as_bal"]] == [1, 2]


def test_options_that_cannot_be_are_one_line(tmp_path):
    table = ROOT / "configs/ablation/table5b.yaml"
    with pytest.raises(UserError, match=r"huge\.yaml"):
        Grid([table], "huge", {})
    with pytest.raises(UserError, match="moon"):
        Grid([table], "micro", {"moon": "/x"})
    done = ablate(table, "--dry-run", "--out", tmp_path, "--jobs", "0")
    assert done.returncode == 2
    assert "--jobs 0" in done.stderr
    assert done.stderr.count("\n") == 1


def test_an_ablation_checks_before_it_writes(tmp_path, monkeypatch):
    """A place, a scale, a DeepSpeed configuration or shards that will not do: one line, and nothing is made."""
    table = ROOT / "configs/ablation/table5b.yaml"
    (tmp_path / "file").write_text("x")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "ablation.json").write_text('{"scale": "paper", "shards": {}, "seeds": []}')
    none = ["--shards", f"synth={tmp_path}/none"]
    for words, said in (
        (["--out", tmp_path / "file"], "--out"),
        (["--out", tmp_path / "file" / "below"], "--out"),
        (["--out", ""], "--out"),
        (["--out", tmp_path / "new", "--deepspeed_config", tmp_path / "no.json"], r"no\.json"),
        (["--out", tmp_path / "old"], "holds an ablation of scale paper, not micro"),
        (["--out", tmp_path / "other", *none], r"none/manifest\.json"),
    ):
        monkeypatch.setattr(sys, "argv", ["ablate.py", str(table), "--scale", "micro", *map(str, words)])
        with pytest.raises(UserError, match=said):
            main()
    monkeypatch.setattr(sys, "argv", ["ablate.py", str(table), "--scale", "micro", "--out", f"{tmp_path}/new"])
    (tmp_path / "plain.db").write_text("x" * 4096)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/plain.db")
    monkeypatch.setattr("launchers.ablate._build_shards", lambda campaign: pytest.fail("begun"))
    with pytest.raises(UserError, match=r"MLFLOW_TRACKING_URI = .*not a database"):
        main()
    assert not (tmp_path / "new").exists()
    assert not list(tmp_path.glob("other/*.json"))
    assert "paper" in (tmp_path / "old" / "ablation.json").read_text()


def test_shards_that_cannot_be_built_are_one_line(tmp_path, monkeypatch):
    scale = yaml.safe_load((ROOT / "configs/ablation/scale/micro.yaml").read_text())
    scale["data"]["synth"]["build"] = "--dataset synth --clips-per-shard 0"
    (tmp_path / "scale.yaml").write_text(yaml.safe_dump(scale))
    words = ["ablate.py", ROOT / "configs/ablation/table5b.yaml", "--scale", tmp_path / "scale.yaml", "--out", tmp_path]
    monkeypatch.setattr(sys, "argv", [str(word) for word in words])
    with pytest.raises(UserError, match=r"data\.synth\.build .*--clips-per-shard 0 .* ended with status 2"):
        main()


def test_only_a_leading_out_stands_for_the_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    for place, meant in (("/data/OUTPUT/esc", "/data/OUTPUT/esc"), ("OUT/esc", f"{tmp_path}/esc"), ("OUTER", "OUTER"),
                         ("s3://b/OUT/x", "s3://b/OUT/x"), ("~/OUT", "/home/me/OUT")):  # fmt: skip
        campaign = Campaign(Grid([ROOT / "configs/ablation/table5b.yaml"], "micro", {"synth": place}), tmp_path)
        assert campaign.shards("synth") == meant


def test_gpus_are_split_between_the_jobs(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    executor = LocalExecutor(2, 0, 8)
    assert (executor.ranks, executor._free) == (4, [list("0123"), list("4567")])
    for jobs, ranks, gpus in ((4, 3, 8), (4, 0, 2)):
        with pytest.raises(UserError, match=f"--jobs 4 leaves {gpus // 4} of {gpus} GPUs a run"):
            LocalExecutor(jobs, ranks, gpus)
    assert LocalExecutor(4, 0, 0)._free == [[]] * 4


def test_runs_get_only_the_gpus_that_are_visible(tmp_path, monkeypatch):
    """Several ranks: deepspeed is told the machine's numbers, and gets no variable that would renumber its GPUs."""
    started: list[tuple[list[str], dict[str, str]]] = []

    def popen(command, env, **rest):
        started.append((command, env))

    monkeypatch.setattr(executors, "subprocess", SimpleNamespace(Popen=popen, DEVNULL=subprocess.DEVNULL))

    def start(visible: str, jobs: int, ranks: int, gpus: int) -> list[tuple[list[str], dict[str, str]]]:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        executor = LocalExecutor(jobs, ranks, gpus, tmp_path)
        started.clear()
        for job in range(jobs):
            (tmp_path / f"{visible}-{job}").mkdir()
            assert executor.start(tmp_path / f"{visible}-{job}", "pretrain.py", [])
        return started

    assert [env["CUDA_VISIBLE_DEVICES"] for _, env in start("4,5", 2, 0, 2)] == ["5", "4"]
    assert [env["CUDA_VISIBLE_DEVICES"] for _, env in start("GPU-a, GPU-b", 2, 1, 2)] == ["GPU-b", "GPU-a"]
    pairs = start("2,3,6,7", 2, 0, 4)
    assert [command[1:3] for command, _ in pairs] == [["--include", f"localhost:{two}"] for two in ("6,7", "2,3")]
    assert not any("CUDA_VISIBLE_DEVICES" in env for _, env in pairs)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-a,MIG-b")
    with pytest.raises(UserError, match=r"CUDA_VISIBLE_DEVICES=MIG-a,MIG-b: .*--ranks 1"):
        LocalExecutor(1, 2, 2)


@pytest.mark.parametrize("scale", ["paper", "micro"])
def test_figure_2_finds_its_checkpoints_at_every_scale(scale):
    """Any table's pretraining keeps them, so the figure may come later; they change no run's identity."""
    runs = Grid(TABLES, scale, {}).runs
    shares = {run.share for run in runs if run.init}
    assert shares == {0.25, 0.5, 0.75, 1.0}
    for run in runs:
        assert run.init is None or run.share == 1.0 or run.share in run.init.recipe.checkpoint.keep_at
    figure = ablate(ROOT / "configs/ablation/figure2.yaml", "--scale", scale, "--dry-run")
    assert [line.split()[0] for line in figure.stdout.splitlines()] == ["pretrain"] * 3 + ["finetune"] * 16
    assert figure.stdout.count("75% of pretraining") == 4


def test_a_share_of_pretraining_is_a_kept_checkpoint(tmp_path):
    grid = Grid([ROOT / "configs/ablation/figure2.yaml"], "micro", {})
    campaign = Campaign(grid, tmp_path)
    run = next(run for run in grid.runs if run.share == 0.5)
    for step in (10, 20, 30, 40):
        folder = campaign.run_dir(run.init) / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        (folder / "complete").touch()
    assert campaign._initial(run, run.init).name == "step-00000020"
    Path(campaign.run_dir(run.init) / "checkpoints/step-00000020/complete").unlink()
    with pytest.raises(UserError, match="no checkpoint near step 20"):
        campaign._initial(run, run.init)
    shutil.rmtree(campaign.run_dir(run.init) / "checkpoints")
    with pytest.raises(UserError, match="its checkpoints are gone"):
        campaign._initial(run, run.init)
