"""Images: what can be checked without an engine. `docker compose config` is run where the client has it."""

import os
import re
import shutil
import subprocess
import sys

import pytest
import yaml

from tests.conftest import ROOT


def test_compose_is_accepted_and_bound_to_localhost():
    file = ROOT / "docker" / "compose.yaml"
    content = yaml.safe_load(file.read_text())
    assert {"trainer", "mlflow", "postgres", "store"} <= content["services"].keys()
    for service in content["services"].values():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
    clients = [client for client in (["docker", "compose"], ["docker-compose"]) if answers(client)]
    assert clients or "CI" not in os.environ, "CI has no compose client: .ci/run installs docker-compose"
    for client in clients:
        subprocess.run([*client, "-f", str(file), "config", "-q"], check=True, cwd=ROOT)


def answers(client: list[str]) -> bool:
    if not shutil.which(client[0]):
        return False
    return subprocess.run([*client, "version"], capture_output=True, check=False).returncode == 0


def test_the_image_runs_as_a_user_and_installs_our_requirements():
    text = (ROOT / "docker" / "Dockerfile").read_text()
    lines = text.splitlines()
    users = [line.split()[1] for line in lines if line.startswith("USER ")]
    assert users
    assert users[-1] != "root"
    program = re.search(r'python3 -c "(import tomllib.*?)" ', text).group(1)
    pytest.importorskip("tomllib")  # the image's Python is newer than 3.10
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert {"torch", "deepspeed", "mlflow"} <= {re.split("[<>=]", line)[0] for line in done.stdout.splitlines()}
