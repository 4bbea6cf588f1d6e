"""Images: what can be checked without an engine."""

import re
import subprocess
import sys

import pytest
import yaml

from tests.conftest import ROOT
from tests.system_packages import program


@pytest.mark.needs("docker-compose")
def test_compose_is_accepted_and_bound_to_localhost():
    file = ROOT / "docker" / "compose.yaml"
    content = yaml.safe_load(file.read_text())
    assert {"trainer", "mlflow", "postgres", "store"} <= content["services"].keys()
    for service in content["services"].values():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
    subprocess.run([program("docker-compose"), "-f", str(file), "config", "-q"], check=True, cwd=ROOT)


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
