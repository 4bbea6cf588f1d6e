"""The house: imports point down, and the top level holds what it should."""

import ast
import graphlib
import subprocess
import sys

import pytest

from tests.conftest import ROOT

FLOORS = [
    {"errors", "faults", "files", "flow", "rng", "methods", "config", "recipes", "distributed", "hub"},
    {"data", "model", "objectives"},
    {"tasks"},
    {"engine", "tracking"},
    {"command_line", "run_directory", "runs", "probing"},
    {"serving", "export"},
    {"train", "adapters", "hf_craft", "api"},
    {"ablation", "cross_validation"},
    {"report"},
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def imported_rooms(path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name.split(".")[1] for name in names if name.startswith("pipeline.")} & FLOOR.keys()


@pytest.mark.parametrize("path", sorted((ROOT / "pipeline").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path):
    room = path.relative_to(ROOT / "pipeline").parts[0].removesuffix(".py")
    if room == "__init__":
        return
    for other in imported_rooms(path) - {room}:
        same_floor_is_fine = FLOOR[room] in (0, 3, 4)
        assert FLOOR[other] < FLOOR[room] or (same_floor_is_fine and FLOOR[other] == FLOOR[room]), f"{room} -> {other}"


ROOMS = ("pipeline", "shard_tools", "launchers")


def imported_modules(path, modules: set[str]) -> set[str]:
    """Modules of ours that are imported with this one: not inside a function, nor for types alone."""
    found, below = set(), [ast.parse(path.read_text(encoding="utf-8"))]
    while below:
        node = below.pop()
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        for_types = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        if not isinstance(node, (ast.FunctionDef, ast.Lambda)) and not for_types:
            below += ast.iter_child_nodes(node)
    return found & modules


def test_no_module_imports_itself_through_others():
    files = {}
    for path in (path for room in ROOMS for path in (ROOT / room).rglob("*.py")):
        files[".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")] = path
    imports = {name: imported_modules(path, files.keys()) - {name} for name, path in files.items()}
    order = graphlib.TopologicalSorter(imports)
    order.prepare()  # CycleError names the circle


LIGHT = """
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    assert not end.code, end.code
heavy = {"torch", "mlflow", "sklearn", "deepspeed", "pandas", "matplotlib"} & sys.modules.keys()
assert not heavy, heavy
"""


@pytest.mark.parametrize("path", sorted((ROOT / "launchers").glob("*.py")), ids=lambda path: path.stem)
def test_help_and_settings_are_said_without_torch(path):
    if path.stem == "__init__":
        return
    for word in ("--help", "--print-config") if path.stem in ("pretrain", "finetune") else ("--help",):
        done = subprocess.run([sys.executable, "-c", LIGHT, path, word], cwd=ROOT, capture_output=True, text=True,
                              check=False)  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert len(done.stdout) > 300


def test_training_needs_no_scikit_learn():
    code = "import sys, pipeline.cross_validation; assert not {'sklearn', 'mlflow'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_shard_tools_need_no_deepspeed_and_their_workers_no_signal_processing():
    code = "import sys, shard_tools.build_shards; assert not {'deepspeed', 'scipy.signal'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_a_process_group_does_not_import_the_compiler():
    code = "import sys\nfrom pipeline.distributed import session\nwith session(60, 0): pass\n"
    code += "assert 'torch._dynamo' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_a_rank_has_no_mlflow_before_it_tracks():
    code = "import sys\nfrom pipeline.engine.setup import load_deepspeed\nload_deepspeed()\n"
    code += "assert 'deepspeed.autotuning' in sys.modules and not {'mlflow', 'pandas'} & sys.modules.keys()\n"
    code += "from pipeline.tracking.store import load_mlflow\nload_mlflow()\nload_deepspeed()\nimport mlflow.pyfunc"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_only_distributed_calls_a_collective():
    callers = {
        path.name
        for path in (ROOT / "pipeline").rglob("*.py")
        if "torch.distributed" in path.read_text(encoding="utf-8")
    }
    assert callers == {"distributed.py"}


@pytest.mark.needs("git")
def test_top_level_holds_what_it_should():
    command = ["git", "-c", "safe.directory=*", "ls-files"]  # whoever owns the checkout
    tracked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    top = {line.split("/")[0] for line in tracked.splitlines()}
    allowed = {"README.md", "requirements.txt", "requirements.lock", "pipeline", "shard_tools", "launchers", "configs",
               "docker", "tests", "docs", "mkdocs.yml", "pyproject.toml", "MANIFEST.in", "Makefile", "LICENSE",
               "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "CITATION.cff"}  # fmt: skip
    assert {name for name in top if not name.startswith(".")} <= allowed


def test_the_documentation_lists_every_file_once():
    tree = (ROOT / "docs" / "files.md").read_text(encoding="utf-8").split("```text")[1].split("```")[0]
    listed, top = [], ""
    for line in tree.strip().splitlines():
        name = line.split()[0]
        if not line.startswith(" "):
            top = name
        elif name.endswith(".py"):
            listed.append(top + name)
    rooms = ("launchers", "shard_tools", "pipeline")
    files = [path for room in rooms for path in (ROOT / room).rglob("*.py") if path.name != "__init__.py"]
    assert sorted(listed) == sorted(str(path.relative_to(ROOT)) for path in files)
