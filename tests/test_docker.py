"""Images and what runs them: what can be checked without an engine or a cluster."""

import argparse
import os
import re
import runpy
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import kubernetes_validate
import pytest
import setuptools
import yaml
from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet

from shard_tools import build_shards
from tests import lab
from tests.ranks import ROOT
from tests.system_packages import NAMESPACES, program

DOCKER = ROOT / "docker"
BIN = Path(sys.executable).parent
USER = "10001"
# A root file system whose changes are gone with the process: the real one below, memory above.
STAGE = """
mount -t tmpfs tmpfs "$stage"
mkdir "$stage"/{upper,work,merged}
mount -t overlay overlay -o "lowerdir=/,upperdir=$stage/upper,workdir=$stage/work" "$stage/merged"
mount --bind /dev "$stage/merged/dev"
mount -t proc proc "$stage/merged/proc"
"""
# What a RUN line would download: apt only says what it would install, and pip installs no other package than ours.
DOWNLOADS = """
apt-get() {
  if [[ $1 != update ]]; then command apt-get --simulate "$@"
  elif ! compgen -G "/var/lib/apt/lists/*Packages*"; then command apt-get --quiet=2 update; fi
}
pip() { echo "pip $*"; if [[ $* != *--require-hashes* ]]; then command pip --quiet "$@" --no-deps; fi; }
"""


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's lines as (instruction, words)."""
    text = re.sub(r"^#.*\n", "", (DOCKER / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = re.sub(r"\\\n", " ", text).splitlines()
    return [tuple(line.split(maxsplit=1)) for line in lines if line.strip()]


def documents(name: str) -> list[dict]:
    return list(yaml.safe_load_all((DOCKER / "k8s" / name).read_text()))


@pytest.mark.needs("apt-get", NAMESPACES)
def test_every_run_line_of_the_image_runs(tmp_path):
    """In order, as their users, in a copy of the root file system; only downloads are left out."""
    steps, user, place, path = [], "0", "/", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    chroot = 'chroot --userspec={0}:{0} "$root" env -i PATH={1} HOME=/tmp bash -o pipefail -c "{2}"'
    ignored = (ROOT / ".dockerignore").read_text().split()
    packages = Path(setuptools.__file__).parent
    about = next(packages.parent.glob("setuptools-*.dist-info"))
    env = {"stage": str(tmp_path), "root": str(tmp_path / "merged"), "PATH": os.environ["PATH"],
           "setuptools": f"{packages} {about}"}  # fmt: skip
    for number, (name, words) in enumerate(instructions()):
        if name == "USER":
            user = words.split(":")[0]
        elif name == "WORKDIR":
            place = words
        elif name == "ENV":
            path = words.split()[0].removeprefix("PATH=").replace("$PATH", path)
        elif name == "COPY":
            *files, target = [word for word in words.split() if not word.startswith("--")]
            assert target in (".", "./")
            if files == ["."]:
                files = [path.name for path in ROOT.iterdir() if path.name not in ignored]
            # Other tests' processes write and rename files of __pycache__ meanwhile, which are not copied anyway.
            copied = f'tar --create --exclude=__pycache__ {" ".join(files)} | tar --extract --directory="$root{place}"'
            steps += [copied, f'chown -R {USER}:{USER} "$root{place}"']
        elif name == "RUN":
            env[f"line{number}"] = f"{DOWNLOADS}\ncd {place} && {words}"
            steps.append(chroot.format(user, path, f"$line{number}"))
            if "--require-hashes" in words:  # which would bring setuptools
                steps.append('cp -R $setuptools "$root"/opt/venv/lib/python3*/site-packages')
    steps.append(chroot.format(USER, path, "pip show craft-audio && touch /runs/x /opt/craft/x"))
    command = ["unshare", "--mount", "bash", "-euo", "pipefail", "-c", STAGE + "\n".join(steps)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Inst ibverbs-utils" in done.stdout or "ibverbs-utils is already the newest" in done.stdout
    assert "pip install --require-hashes --requirement requirements.lock" in done.stdout
    assert f"Editable project location: {place}" in done.stdout


def test_the_image_has_the_cuda_of_the_locked_torch_and_an_unprivileged_user():
    words = dict(instructions())
    locked = re.search(r"^cuda-toolkit(?:\[.*\])?==(\d+\.\d+)", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    base = re.fullmatch(r"nvidia/cuda:(\d+\.\d+)\.\d+-base-ubuntu24\.04", words["FROM"])
    assert base[1] == locked[1]
    assert words["USER"] == f"{USER}:{USER}"
    for script in yaml.safe_load(words["CMD"])[1:2] + yaml.safe_load(words["HEALTHCHECK"].split("CMD ")[1])[1:]:
        assert (ROOT / script).is_file()


def test_a_container_is_healthy_without_a_gpu_and_not_with_one_that_does_not_answer(tmp_path, capsys):
    health = runpy.run_path(str(DOCKER / "health.py"))["main"]
    health.__globals__["DEVICES"] = tmp_path
    assert health() == 0
    (tmp_path / "nvidia0").touch()
    if not list(Path("/dev").glob("nvidia[0-9]*")):
        assert health() == 1
        assert capsys.readouterr().err.startswith("error: a GPU does not answer: ")


def test_linters_find_nothing():
    scripts = [path for folder in (".ci", "docker", "launchers", "tests") for path in (ROOT / folder).rglob("*")
               if path.is_file() and re.match(rb"#!.*\b(ba)?sh\b", path.read_bytes()[:80])]  # fmt: skip
    assert {"run", "slurm.sbatch", "slurm_shards.sbatch"} <= {path.name for path in scripts}
    for command in ([BIN / "shellcheck", *scripts], [BIN / "hadolint", DOCKER / "Dockerfile"]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


@pytest.mark.needs("docker-compose")
def test_compose_asks_for_every_secret():
    def config(**env: str) -> subprocess.CompletedProcess[str]:
        command = [program("docker-compose"), "--file", DOCKER / "compose.yaml", "--profile", "gpu", "--profile", "cpu"]
        return subprocess.run([*command, "config", "-q"], env={"PATH": os.environ["PATH"], "HOME": "/nowhere", **env},
                              capture_output=True, text=True, check=False)  # fmt: skip

    done = config(**lab.SECRETS)
    assert done.returncode == 0, done.stderr
    for name in lab.SECRETS:
        assert config(**{other: text for other, text in lab.SECRETS.items() if other != name}).returncode != 0


def test_compose_listens_on_localhost_alone_and_pins_images():
    content = lab.compose(**lab.SECRETS)
    services = content["services"]
    assert services.keys() == {"postgres", "store", "mlflow", "trainer", "trainer-cpu"}
    ports = {name: service["ports"] for name, service in services.items() if "ports" in service}
    assert ports == {"mlflow": ["127.0.0.1:5000:5000"]}
    assert all(re.search(r":v?\d+\.\d+[^:]*$", service["image"]) for service in services.values())
    images = re.findall(r"image: (\S+/)?craft:(\S+)", "".join(path.read_text() for path in DOCKER.rglob("*.yaml")))
    assert {version for _, version in images} == {metadata.version("craft-audio")}
    assert content["networks"]["back"] == {"internal": True}
    for trainer in (services["trainer"], services["trainer-cpu"]):
        assert trainer["networks"] == ["front"]
        assert len(trainer["profiles"]) == 1
    assert "deploy" not in services["trainer-cpu"]


@pytest.mark.parametrize("name", sorted(path.name for path in (DOCKER / "k8s").iterdir()))
def test_manifests_are_what_kubernetes_takes(name):
    for document in documents(name):
        if document["kind"] == "JobSet":
            assert document["apiVersion"] == "jobset.x-k8s.io/v1alpha2"
            # Through the types of its schema and back: a key that it does not know would be lost.
            assert JobsetV1alpha2JobSet.from_dict(document).to_dict() == document
            for job in document["spec"]["replicatedJobs"]:
                nested = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": job["name"]}}
                kubernetes_validate.validate(nested | job["template"], "1.33", strict=True)
        else:
            kubernetes_validate.validate(document, "1.33", strict=True)


def test_the_lab_in_kubernetes_is_that_of_compose():
    services, kinds = lab.compose(**lab.SECRETS)["services"], {}
    for document in documents("lab.yaml"):
        kinds.setdefault(document["kind"], {})[document["metadata"]["name"]] = document
    sets = kinds["StatefulSet"]
    assert sets.keys() == {"postgres", "store", "mlflow"}
    for name, document in sets.items():
        (container,) = document["spec"]["template"]["spec"]["containers"]
        assert container["image"] == services[name]["image"]
        assert container.get("args", [])[-4:] == services[name].get("command", [])[-4:]
        variables = {entry["name"] for entry in container["env"]} - {"HOME", "PGDATA", "POSTGRES_PASSWORD"}
        assert variables == services[name]["environment"].keys() - {"POSTGRES_PASSWORD"}
        secret = [entry for entry in container["env"] if re.search("PASSWORD|SECRET", entry["name"])]
        assert all("secretKeyRef" in entry["valueFrom"] for entry in secret)
    assert kinds["ConfigMap"]["mlflow-auth"]["data"]["auth.ini"] == (DOCKER / "mlflow_auth.ini").read_text()


def test_the_jobs_of_a_build_are_its_slices_and_its_merge(tmp_path):
    options, slices, merge = documents("shards.yaml")
    (tmp_path / "python").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "python").chmod(0o755)
    place = options["data"] | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}

    def words(job: dict, index: int) -> argparse.Namespace:
        (container,) = job["spec"]["template"]["spec"]["containers"]
        command, env = [*container["command"], *container["args"]], place | {"JOB_COMPLETION_INDEX": str(index)}
        script, *said = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout.splitlines()
        assert (ROOT / script).is_file()
        return build_shards.parser().parse_args(said)

    last = slices["spec"]["completions"] - 1
    assert [words(slices, index).slice.number for index in (0, last)] == [1, words(slices, 0).slice.count]
    assert words(merge, 0).merge
    assert words(merge, 0).segments, "AudioSet as files is not read right without"
    claims = {volume["persistentVolumeClaim"]["claimName"] for job in (slices, merge)
              for volume in job["spec"]["template"]["spec"]["volumes"]}  # fmt: skip
    made = {document["metadata"]["name"] for document in documents("volumes.yaml")}
    head, page = (ROOT / "docker/k8s/shards.yaml").read_text(), (ROOT / "docs/multi-node.md").read_text()
    assert all(claim in head.partition("apiVersion")[0] and claim in page for claim in claims - made)


def test_the_words_of_the_training_job_are_those_of_torchrun_and_pretrain():
    (jobset,) = documents("train.yaml")
    job = jobset["spec"]["replicatedJobs"][0]
    spec = job["template"]["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    options = dict(word.removeprefix("--").split("=", 1) for word in container["command"][1:])
    assert int(options["nnodes"]) == spec["parallelism"] == spec["completions"]
    assert options["nproc-per-node"] == container["resources"]["limits"]["nvidia.com/gpu"]
    name = jobset["metadata"]["name"]
    assert options["master-addr"] == f"{name}-{job['name']}-0-0.{name}"
    assert int(options["shutdown-timeout"]) < spec["template"]["spec"]["terminationGracePeriodSeconds"]
    help_text = subprocess.run([BIN / "torchrun", "--help"], capture_output=True, text=True, check=True).stdout
    assert all(f"--{option}" in help_text for option in options)
    for entry in container["env"]:  # without the Secret the pods do not start
        if secret := entry.get("valueFrom", {}).get("secretKeyRef"):
            assert f"Secret {secret['name']}" in (DOCKER / "k8s/train.yaml").read_text().partition("apiVersion")[0]
            page = (ROOT / "docs/multi-node.md").read_text()
            assert 0 < page.find(f"kubectl create secret generic {secret['name']}") < page.find("k8s/train.yaml")
    script, *words = container["args"]
    batch = next(int(word.split("=")[1]) for word in words if word.startswith("train.batch_size="))
    assert batch % (int(options["nnodes"]) * int(options["nproc-per-node"])) == 0
    done = subprocess.run([sys.executable, script, *words, "--print-config"], cwd=ROOT, capture_output=True, text=True,
                          check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
