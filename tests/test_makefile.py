"""`make clean` removes what `make demo` made, and nothing else."""

import subprocess

from tests.ranks import ROOT


def make(folder, goal: str, *words: str) -> subprocess.CompletedProcess[str]:
    command = ["make", "-f", str(ROOT / "Makefile"), "-o", "install", goal, *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_clean_removes_a_directory_of_the_demo_and_no_other(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    (tmp_path / "link").symlink_to("mine")
    for name in ("mine", "link", ".", "mine/thesis.tex"):
        done = make(tmp_path, "clean", f"DEMO_DIR={name}")
        assert done.returncode == 2
        assert f"error: DEMO_DIR={name}: make demo did not make it" in done.stderr
    for name in ("", "none"):
        assert make(tmp_path, "clean", f"DEMO_DIR={name}").returncode == 0

    for name in ("mine", "a demo", ""):  # in this folder there is nothing that it could build with
        assert make(tmp_path, "demo", f"DEMO_DIR={name}").returncode == 2
    assert make(tmp_path, "clean", "DEMO_DIR=mine").returncode == 2
    assert [path.name for path in (tmp_path / "a demo").iterdir()] == [".made-by-make-demo"]
    assert make(tmp_path, "clean", "DEMO_DIR=a demo").returncode == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "mine"]
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "years of work"
