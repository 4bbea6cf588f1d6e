"""What all rooms share: the path to real audio, real DeepSpeed launches, and programs that a machine may lack.

A test says what it starts with `@pytest.mark.needs("chromium", "chromedriver")`, names of `system_packages.py`, and a
fixture with `need(...)`. A test that is skipped, for that reason or another, is left out: named at the end with the
reason, and counted in the last line; in CI it fails.
"""

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import lab, system_packages
from tests.ranks import ROOT, free_port, run_script
from tests.slurm import SLURM_PROGRAMS, Slurm, slurm_cluster

# A shell starts what it puts in the background (a CI runner, nohup) with SIGINT ignored, and children inherit
# that: tests of Ctrl-C need it as it is at a terminal.
signal.signal(signal.SIGINT, signal.default_int_handler)


# For every process that the tests start. Threads of several processes at once would wait for each other's cores; and
# without bytecode each process would compile our sources anew.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

LEFT_OUT = "left out"
# Fixtures that take minutes -> what the modules that use them are called as a group, which one process runs.
GROUPS = {"pretrained": "runs", "slurm": "runs", "chain": "lab"}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Divides the tests among the processes of `--dist loadgroup`: a module, or a group, is the work of one.

    The longest come first, those of seconds fill up at the end. Without several processes the order stays.
    """
    if not hasattr(config, "workerinput"):
        return
    modules: dict[Path, str] = {}
    for item in items:
        used = [GROUPS[name] for name in getattr(item, "fixturenames", ()) if name in GROUPS]
        modules[item.path] = (used or [modules.get(item.path) or str(item.path.relative_to(ROOT))])[0]
    names = {item: modules[item.path] for item in items}
    slow = {names[item] for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (names[item] not in GROUPS.values(), names[item] not in slow, names[item]))
    for item in items:
        item.add_marker(pytest.mark.xdist_group(names[item]))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Refuses versions of pytest and pytest-xdist that do not group tests: each process would make slow fixtures."""
    if session.config.getoption("loadgroup", False) and not all("@" in item.nodeid for item in session.items):
        raise pytest.UsageError("pytest-xdist does not group the tests; install the versions that '.[test]' names")


@pytest.hookimpl(wrapper=True)
def pytest_report_to_serializable() -> Generator[None, Any, Any]:
    """Escapes bytes of names that are not UTF-8: pytest-xdist cannot send such a report, and would end the run."""
    return _utf8((yield))


def _utf8(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, dict):
        return {name: _utf8(inner) for name, inner in value.items()}
    return type(value)(map(_utf8, value)) if isinstance(value, (list, tuple)) else value


def need(*programs: str) -> None:
    missing = [system_packages.reason(name) for name in programs if not system_packages.find(name)]
    if missing:
        pytest.skip("; ".join(missing))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """In CI a test that is skipped, for whatever reason, has failed."""
    report = yield
    if os.environ.get("CI") and report.skipped and isinstance(report.longrepr, tuple):
        reason = report.longrepr[2].removeprefix("Skipped: ")
        report.outcome, report.longrepr = "failed", f"{reason}, and CI leaves no test out"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol() -> Generator[None, Any, Any]:
    """What a test finds is not what the one before left: torch's seed, and the root logger's level, which Ray sets."""
    root = logging.getLogger()
    level = root.level
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)
    try:
        return (yield)
    finally:
        root.setLevel(level)


def pytest_runtest_setup(item: pytest.Item) -> None:
    for mark in item.iter_markers("needs"):
        need(*mark.args)


def pytest_report_teststatus(report: pytest.TestReport) -> tuple[str, str, str] | None:
    if report.skipped and isinstance(report.longrepr, tuple):
        return LEFT_OUT, "n", "LEFT OUT"
    return None


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for report in terminalreporter.stats.get(LEFT_OUT, []):
        name, reason = report.nodeid.split("@")[0], report.longrepr[2].removeprefix("Skipped: ")
        terminalreporter.write_line(f"LEFT OUT {name}: {reason}")


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real audio and metadata; set CRAFT_SHARED where they lie elsewhere."""
    path = Path(os.environ.get("CRAFT_SHARED", ROOT.parent / "shared")).resolve()
    if not (path / "data").is_dir():
        pytest.skip(f"needs real recordings in {path}/data; CRAFT_SHARED names another place")
    return path


@pytest.fixture(scope="session")
def deepspeed_run() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a script with `deepspeed --num_gpus RANKS`, as a user would."""

    def run(ranks: int, script: str | Path, *args: object, check: bool = True) -> subprocess.CompletedProcess[str]:
        command = [
            str(Path(sys.executable).with_name("deepspeed")),
            *("--num_gpus", str(ranks), "--master_port", str(free_port())),
            str(script),
            *map(str, args),
        ]
        env = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=900, check=False)
        if check and done.returncode:
            pytest.fail(f"{' '.join(command)}\nexit {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-8000:]}")
        return done

    return run


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """80 clips of half a second in 10 or more shards, splits train and eval, 13 classes, 5 folds."""
    from tests.helpers import synth_shards  # torch, which half of the tests do without

    out = tmp_path_factory.mktemp("shards")
    synth_shards(out)
    return out


@pytest.fixture(scope="session")
def unlabelled(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What build_shards.py makes of two folders of recordings without labels: 32 clips of train, 16 of eval."""
    folder, out = tmp_path_factory.mktemp("recordings"), tmp_path_factory.mktemp("unlabelled")
    names = sorted((shards / "source" / "audio").glob("*.flac"))
    for split, some in (("train", names[:32]), ("eval", names[32:48])):
        (folder / split).mkdir()
        for name in some:
            (folder / split / name.name).symlink_to(name)
        done = run_script("shard_tools/build_shards.py", "--root", folder / split, "--split", split, "--out", out,
                          "--seconds", 0.5, "--clips-per-shard", 6, "--distributor", "inline")  # fmt: skip
        assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="session")
def s3() -> Iterator[str]:
    """Endpoint of moto's S3 server; the environment points clients and child processes at it."""
    from tests.stores import s3_server  # moto

    with s3_server() as endpoint:
        yield endpoint


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """A cluster of one node; the environment points sbatch and child processes at it."""
    need(*SLURM_PROGRAMS)
    with slurm_cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def chain(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Iterator[lab.Chain]:
    """The lab's servers, and through them a pretraining (interrupted once) with two finetunings by ablate.py."""
    need(*lab.PROGRAMS)
    folder = tmp_path_factory.mktemp("lab")
    with lab.lab_servers(folder) as servers:
        yield lab.run_chain(servers, folder, shards)
