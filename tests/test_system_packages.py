"""`make test` and `make demo` on machines that lack programs: what they install or ask for, what is left out."""

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ranks import ROOT
from tests.system_packages import BUILD, TESTS

# What apt would do: the commands of the packages appear. The names of the tests' table are enough.
APT_GET = """#!/bin/sh
echo "$@" >> {calls}
case "$*" in *install*) for name in {names}; do printf '#!/bin/sh\\n' > {bin}/$name; chmod +x {bin}/$name; done;; esac
"""


@pytest.fixture
def machine(tmp_path):
    """A folder to be the only one in PATH, open to every user."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("env", "sh", "chmod", "true"):
        (folder / name).symlink_to(shutil.which(name))
    for path in (folder, tmp_path, *tmp_path.parents):
        if path.stat().st_uid == os.geteuid():
            path.chmod(path.stat().st_mode | stat.S_IXOTH | stat.S_IROTH)
    return folder


def add(folder: Path, name: str, text: str = "#!/bin/sh\n") -> None:
    (folder / name).write_text(text)
    (folder / name).chmod(0o755)


def check(folder: Path, goal: str, *user: str, **env: str) -> subprocess.CompletedProcess[str]:
    """The check of `make GOAL`, with Python's own .venv out of sight."""
    command = [*user, sys.executable, str(ROOT / "tests" / "system_packages.py"), goal]
    return subprocess.run(command, cwd=ROOT, env={"PATH": str(folder), **env}, capture_output=True, text=True,
                          check=False)  # fmt: skip


def test_without_apt_missing_programs_are_named_and_ci_refuses(machine):
    add(machine, "c++")
    done = check(machine, "test")
    assert done.returncode == 0
    assert done.stderr.count("\n") == 1
    assert "chromium, chromedriver" in done.stderr
    assert "left out by name" in done.stderr
    assert check(machine, "test", CI="true").returncode == 2
    assert check(machine, "demo", CI="true").returncode == 0  # which needs none of them


def test_without_a_compiler_the_demo_says_so(machine):
    done = check(machine, "demo")
    assert done.returncode == 2
    assert done.stderr.startswith("error: a C++ compiler")
    assert done.stderr.endswith("missing: c++ (Debian: g++)\n")
    assert check(machine, "demo", CXX=shutil.which("true")).returncode == 0


def test_without_the_right_to_install_there_is_one_line_to_run(machine, tmp_path):
    user = [shutil.which("setpriv"), "--reuid=65534", "--regid=65534", "--clear-groups"] if os.geteuid() == 0 else []
    add(machine, "c++")
    add(machine, "apt-get", f"#!/bin/sh\ntouch {tmp_path}/called\n")
    done = check(machine, "test", *user)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if "apt-get" in line]
    assert line.strip().startswith("sudo apt-get install --no-install-recommends ")
    words = line.split()[4:]
    assert {"chromium", "chromium-driver", "slurm-client"} <= set(words) <= {*BUILD.values(), *TESTS.values()}
    assert len(set(words)) == len(words)
    assert not (tmp_path / "called").exists()
    assert check(machine, "test", SYSTEM="skip").returncode == 0  # installs nothing, whoever asks
    assert not (tmp_path / "called").exists()


def test_with_the_right_to_install_packages_come_once(machine, tmp_path):
    calls = tmp_path / "calls"
    add(machine, "sudo", '#!/bin/sh\nshift\nexec "$@"\n')  # that asks for no password
    add(machine, "apt-cache")
    add(machine, "apt-get", APT_GET.format(calls=calls, bin=machine, names=" ".join(["c++", *TESTS])))
    done = check(machine, "test", CI="true")
    assert (done.returncode, done.stderr) == (0, "")
    update, install = calls.read_text().splitlines()
    assert update.endswith("update")
    assert {"g++", "chromium", "chromium-driver", "slurm-client", "--no-install-recommends"} <= set(install.split())
    assert check(machine, "test", CI="true").returncode == 0
    assert len(calls.read_text().splitlines()) == 2


def test_an_apt_that_fails_is_told(machine):
    add(machine, "sudo", '#!/bin/sh\nshift\nexec "$@"\n')
    add(machine, "apt-cache")
    add(machine, "apt-get", "#!/bin/sh\necho 'E: no space left'\nexit 100\n")
    done = check(machine, "test")
    assert done.returncode == 2
    assert "E: no space left\n\napt-get ended with 100" in done.stderr


TESTS_OF_A_BARE_MACHINE = """
import pytest

def test_without_a_need(): pass

@pytest.mark.needs("chromium")
def test_with_needs(): raise AssertionError("was run")

def test_that_skips_itself(): pytest.skip("no such device")
"""


def test_a_test_is_left_out_by_name_and_counted_in_the_last_line_and_ci_fails(tmp_path):
    (tmp_path / "test_bare.py").write_text(TESTS_OF_A_BARE_MACHINE)
    command = [sys.executable, "-m", "pytest", "-p", "tests.conftest", "-p", "no:cacheprovider", "-o",
               "markers=needs: programs", "test_bare.py"]  # fmt: skip
    env = {name: value for name, value in os.environ.items() if name != "CI"}
    env |= {"PATH": str(tmp_path), "HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}

    def run(**more: str) -> tuple[int, str]:
        done = subprocess.run(command, cwd=tmp_path, env=env | more, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout

    status, said = run()
    assert status == 0
    assert "LEFT OUT test_bare.py::test_with_needs: needs chromium (Debian: chromium)" in said
    assert "LEFT OUT test_bare.py::test_that_skips_itself: no such device" in said
    assert "1 passed, 2 left out" in said.splitlines()[-1]
    status, said = run(CI="true")
    assert status == 1
    assert "needs chromium (Debian: chromium)" in said
    assert "no such device, and CI leaves no test out" in said
    assert "1 failed, 1 passed, 1 error in" in said.splitlines()[-1]
