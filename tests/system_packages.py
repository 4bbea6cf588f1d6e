"""Programs of the system that the demo and the tests run, and the Debian packages they come in.

    python3 tests/system_packages.py demo|test

Installs what is missing with apt, as root or through a sudo that asks for no password. Where apt is there and that
right is not: one line to run, and exit 2. Where no package is to be had, it names what is missing: what compiles and
makes .venv has to be there (else exit 2); tests that need another program are left out by name, and in CI (the
variable CI is set) that too is exit 2. SYSTEM=skip installs nothing. Runs before .venv is made, so on Python's own
library alone.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

VERSION = f"python3.{sys.version_info.minor}" if sys.base_prefix == "/usr" else "python3"
# What is needed -> Debian package. Everything: to make .venv, and DeepSpeed's compiled kernel in it.
BUILD = {"c++": "g++", "Python.h": f"{VERSION}-dev", "venv": f"{VERSION}-venv"}
TESTS = {
    "apt-get": "apt",
    "git": "git",
    "docker-compose": "docker-compose",
    "initdb": "postgresql",
    "pg_ctl": "postgresql",
    "chromium": "chromium",
    "chromedriver": "chromium-driver",
    "ip": "iproute2",
    "ssh": "openssh-client",
    "ssh-keygen": "openssh-client",
    "sshd": "openssh-server",
    "pdsh": "pdsh",
    "munged": "munge",
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "sbatch": "slurm-client",
}
NAMESPACES = "network namespaces"  # no program: a right
OTHER_NAMES = {"chromium": ("chromium-browser", "google-chrome", "google-chrome-stable")}
# Beside PATH: what only root has there; servers that Debian and others put aside; the plugin of docker.
PLACES = {
    "initdb": ("/usr/lib/postgresql/*/bin", "/usr/pgsql-*/bin", "/opt/homebrew/opt/postgresql*/bin"),
    "docker-compose": ("/usr/*/docker/cli-plugins", "/usr/local/*/docker/cli-plugins"),
    "chromium": ("/Applications/Google Chrome.app/Contents/MacOS", "/Applications/Chromium.app/Contents/MacOS"),
}
PLACES["pg_ctl"] = PLACES["initdb"]
SUPERUSER = ("/usr/local/sbin", "/usr/sbin", "/sbin")
PATIENCE = 300  # seconds for another apt that holds the lock


def find(name: str) -> "str | None":
    """Path of a program; of "c++", of what torch compiles with. None: not on this machine."""
    if name == NAMESPACES:
        return _may_make_network_namespaces()
    if name == "Python.h":
        path = os.path.join(sysconfig.get_paths()["include"], name)
        return path if os.path.exists(path) else None
    if name == "venv":
        able = os.access(".venv/bin/python", os.X_OK) or importlib.util.find_spec("ensurepip")
        return sys.executable if able else None
    wanted = (os.environ.get("CXX", "c++"),) if name == "c++" else (name, *OTHER_NAMES.get(name, ()))
    places = os.pathsep.join([os.environ.get("PATH", os.defpath), *SUPERUSER, *_beside(name)])
    return next(filter(None, (shutil.which(word, path=places) for word in wanted)), None)


def program(name: str) -> str:
    """Path of a program that has to be there: tests say so with `@pytest.mark.needs(name)`."""
    path = find(name)
    assert path, reason(name)
    return path


def reason(name: str) -> str:
    """Why a test is skipped: what it needs, and where Debian has it."""
    return f"needs {name} (root's right)" if name == NAMESPACES else f"needs {name} (Debian: {TESTS[name]})"


def _beside(name: str) -> "list[str]":
    """Folders of PLACES that are there, those of newer versions first; then where pg_config says."""
    found = [str(path) for place in PLACES.get(name, ()) for path in Path("/").glob(place.lstrip("/"))]
    found.sort(key=lambda path: [int(number) for number in re.findall("[0-9]+", path)], reverse=True)
    config = shutil.which("pg_config") if PLACES.get(name) == PLACES["initdb"] else None
    told = subprocess.run([config, "--bindir"], capture_output=True, text=True, check=False).stdout if config else ""
    return [*found, *told.splitlines()]


def _may_make_network_namespaces() -> "str | None":
    unshare = shutil.which("unshare")
    if os.geteuid() != 0 or unshare is None:
        return None
    done = subprocess.run([unshare, "--net", "--mount", "true"], capture_output=True, check=False)
    return unshare if done.returncode == 0 else None


def _right() -> "list[str] | None":
    """Words before apt-get that make it root's; None: there is no right to install."""
    if os.geteuid() == 0:
        return []
    sudo = shutil.which("sudo")
    if sudo and subprocess.run([sudo, "-n", "true"], capture_output=True, check=False).returncode == 0:
        return [sudo, "-n"]
    return None


def _apt(right: "list[str]", *words: str) -> "subprocess.CompletedProcess[str]":
    command = [*right, "env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "-qq", f"-oDPkg::Lock::Timeout={PATIENCE}"]
    return subprocess.run([*command, *words], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True, check=False)  # fmt: skip


def install(names: "list[str]", right: "list[str]", packages: "dict[str, str]") -> str:
    """Installs the packages that apt knows; returns what went wrong, or ''."""
    done = _apt(right, "update")
    known = [
        package
        for package in sorted({packages[name] for name in names})
        if subprocess.run(["apt-cache", "show", package], capture_output=True, check=False).returncode == 0
    ]
    if known:
        print(f"installing Debian packages: {' '.join(known)}", flush=True)
        done = _apt(right, "install", "--yes", "--no-install-recommends", *known)
    return f"{done.stdout[-2000:]}\napt-get ended with {done.returncode}" if done.returncode else ""


def main() -> int:
    if sys.version_info < (3, 10):  # noqa: UP036 - whoever has an older one shall read this
        return _refuse(f"{sys.executable} is Python {sys.version.split()[0]}, and 3.10 or newer is needed: "
                       "name one as in make PYTHON=python3.12")  # fmt: skip
    packages = {**BUILD, **(TESTS if sys.argv[1] == "test" else {})}
    missing = [name for name in packages if not find(name)]
    if missing and shutil.which("apt-get") and os.environ.get("SYSTEM") != "skip":
        right = _right()
        if right is None:
            line = " ".join(sorted({packages[name] for name in missing}))
            others = "" if BUILD.keys() & set(missing) else "\nor leave out what needs them: make test SYSTEM=skip"
            return _refuse("Debian packages are missing, and only root may install them; nothing was started. Run\n"
                           f"  sudo apt-get install --no-install-recommends {line}{others}")  # fmt: skip
        wrong = install(missing, right, packages)
        if wrong:
            return _refuse(wrong)
        missing = [name for name in packages if not find(name)]
    to_build = [f"{name} (Debian: {BUILD[name]})" for name in missing if name in BUILD]
    if to_build:
        return _refuse("a C++ compiler (c++, or what CXX names), Python's headers and its module venv are needed; "
                       f"missing: {', '.join(to_build)}")  # fmt: skip
    if missing:
        print(f"missing here: {', '.join(missing)}; tests that need them are left out by name", file=sys.stderr)
    if missing and os.environ.get("CI"):
        return _refuse("CI is set, and CI leaves no test out")
    return 0


def _refuse(why: str) -> int:
    print(f"error: {why}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
