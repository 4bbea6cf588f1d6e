"""A lab's servers without containers: PostgreSQL, an S3 store, an MLflow server with passwords.

The same parts as docker/compose.yaml: the system's PostgreSQL, moto's S3 server, and MLflow with that file's command,
environment and users. Each is a process on a free port of localhost, ended with its context.
"""

import os
import pwd
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import yaml

from tests.ranks import free_port
from tests.system_packages import program

ROOT = Path(__file__).resolve().parents[1]

PROGRAMS = ("initdb", "pg_ctl")
ADMIN, PASSWORD = "admin", "a-long-password"
SECRETS = {"POSTGRES_PASSWORD": "none-is-asked", "S3_SECRET_KEY": "craft-secret", "MLFLOW_PASSWORD": PASSWORD,
           "MLFLOW_SECRET_KEY": "a-key-of-the-tests"}  # fmt: skip
S3_KEYS = {"AWS_ACCESS_KEY_ID": "craft", "AWS_SECRET_ACCESS_KEY": "craft-secret", "AWS_DEFAULT_REGION": "us-east-1"}


TABLE = """
title: "Finetuning methods (mAP)"
columns: [as_bal]
reference: PSWaCL-SWaB
rows:
  - {name: PSWaCL-AST, finetune: {finetune.method: ast}, paper: {as_bal: 31.3}}
  - {name: PSWaCL-SWaB, finetune: {log.register_as: craft}, paper: {as_bal: 33.4}}
"""
SCALE = """
about: "Half a second of generated audio"
data: {synth: {shards: SHARDS}}
pretrain:
  title: pretraining
  data: synth
  settings: {model.size: micro, train.batch_size: 8, train.steps: 60, optim.warmup: 5, eval.every: 20,
             eval.every_clips: 0, eval.clips: 16, log.every: 1, log.system_every: 1, data.workers: 1,
             checkpoint.keep_at: [0.3]}
tasks:
  as_bal:
    title: AudioSet-bal
    data: synth
    settings: {model.size: micro, model.stride: 16, train.batch_size: 8, train.epochs: 2, log.every: 1,
               augment.freq_mask: 16, augment.time_mask: 8, checkpoint.average: [1, 2], data.workers: 1}
"""


@dataclass
class Lab:
    """Where the servers are.

    Attributes:
        uri: Of MLflow.
        s3: Of the store, bucket "mlflow".
        database: Of PostgreSQL, for SQLAlchemy.
        env: What a client needs.
    """

    uri: str
    s3: str
    database: str

    @property
    def env(self) -> dict[str, str]:
        return {
            "MLFLOW_TRACKING_URI": self.uri,
            "MLFLOW_TRACKING_USERNAME": ADMIN,
            "MLFLOW_TRACKING_PASSWORD": PASSWORD,
        }

    @property
    def page(self) -> str:
        """The UI's address for a browser, with the password in it."""
        return self.uri.replace("http://", f"http://{ADMIN}:{PASSWORD}@")


@contextmanager
def process(command: list[str], log: Path, ready: str = "", env: dict[str, str] | None = None) -> Iterator[None]:
    """A server process; `ready` is an address that answers once it serves (a 401 is an answer)."""
    with log.open("a") as output:
        server = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True,
                                  cwd=log.parent, env=os.environ | (env or {}))  # fmt: skip
        try:
            for _ in range(1500):
                assert server.poll() is None, f"{command[:4]} ended: {log.read_text()[-3000:]}"
                try:
                    urllib.request.urlopen(ready, timeout=10)
                    break
                except urllib.error.HTTPError:
                    break
                except OSError:
                    time.sleep(0.2)
            else:
                raise AssertionError(f"{command[:4]} does not answer: {log.read_text()[-3000:]}")
            yield
        finally:
            if server.poll() is None:
                os.killpg(server.pid, 15)
            try:
                server.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(server.pid, 9)
                server.wait()


@contextmanager
def postgres() -> Iterator[str]:
    """PostgreSQL with an empty database; as root it runs as the user postgres, or nobody: it refuses to be root's."""
    initdb, pg_ctl = map(program, PROGRAMS)
    folder = Path(tempfile.mkdtemp(prefix="craft-postgres-", dir="/tmp"))
    user = []
    if os.geteuid() == 0:
        names = {account.pw_name: account for account in pwd.getpwall()}
        account = names.get("postgres") or names["nobody"]
        os.chown(folder, account.pw_uid, account.pw_gid)
        user = ["runuser", "-u", account.pw_name, "--"]
    port = free_port()
    ctl = [*user, pg_ctl, "-D", str(folder / "data"), "-w", "-t", "120"]
    try:
        subprocess.run([*user, initdb, "-D", folder / "data", "-A", "trust", "-U", "mlflow", "-N"],
                       check=True, capture_output=True, cwd=folder)  # fmt: skip
        options = f"-p {port} -k {folder} -c listen_addresses=127.0.0.1 -c fsync=off"
        subprocess.run([*ctl, "-l", folder / "log", "-o", options, "start"], check=True, stdout=subprocess.DEVNULL,
                       cwd=folder)  # fmt: skip
        try:
            yield f"postgresql+psycopg2://mlflow@127.0.0.1:{port}/postgres"
        finally:
            subprocess.run([*ctl, "-m", "immediate", "stop"], check=True, capture_output=True, cwd=folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def s3(folder: Path) -> Iterator[str]:
    """moto's S3 server with a bucket "mlflow"."""
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    binary = str(Path(sys.executable).with_name("moto_server"))
    with process([binary, "-H", "127.0.0.1", "-p", str(port)], folder / "s3.log", address):
        client(address).create_bucket(Bucket="mlflow")
        yield address


def client(address: str):
    keys = S3_KEYS
    return boto3.client("s3", endpoint_url=address, region_name=keys["AWS_DEFAULT_REGION"],
                        aws_access_key_id=keys["AWS_ACCESS_KEY_ID"],
                        aws_secret_access_key=keys["AWS_SECRET_ACCESS_KEY"])  # fmt: skip


def compose(**secrets: str) -> dict[str, Any]:
    """docker/compose.yaml, its variables filled in; a KeyError names one that has no default and is not given."""
    text = (ROOT / "docker" / "compose.yaml").read_text()
    filled = re.sub(r"\$\{(\w+):-([^}]*)\}", lambda found: secrets.get(found[1], found[2]), text)
    return yaml.safe_load(re.sub(r"\$\{(\w+):\?[^}]+\}", lambda found: secrets[found[1]], filled))


@contextmanager
def lab_servers(folder: Path) -> Iterator[Lab]:
    """All three."""
    with postgres() as database, s3(folder) as store:
        auth = folder / "auth.ini"
        auth.write_text((ROOT / "docker" / "mlflow_auth.ini").read_text().replace("/auth/", f"{folder}/"))
        port = free_port()
        uri = f"http://127.0.0.1:{port}"
        service = compose(**SECRETS)["services"]["mlflow"]
        here = {"--host=0.0.0.0": "--host=127.0.0.1", "--port=5000": f"--port={port}"}
        command = [sys.executable, "-m", *(here.get(word, word) for word in service["command"]), "--workers=1"]
        env = service["environment"] | {
            "MLFLOW_BACKEND_STORE_URI": database,
            "MLFLOW_S3_ENDPOINT_URL": store,
            "MLFLOW_AUTH_CONFIG_PATH": str(auth),
            "PYTHONPATH": str(ROOT),
        }
        with process(command, folder / "mlflow.log", f"{uri}/health", env):
            yield Lab(uri, store, database)


@dataclass
class Chain:
    """Runs that went through the lab.

    Attributes:
        lab: The servers.
        out: Directory of the runs.
        table: Their table file.
        interrupted: Exit status of the first ablate.py, which was told to stop.
        said: What the second one printed.
    """

    lab: Lab
    out: Path
    table: Path
    interrupted: int
    said: str

    def run_dir(self, name: str) -> Path:
        """The only run directory whose name begins so."""
        (found,) = [path for path in self.out.iterdir() if path.name.rsplit("-", 1)[0] == name]
        return found


def run_chain(servers: Lab, folder: Path, shards: Path) -> Chain:
    """ablate.py, interrupted in the pretraining, then once more to the end."""
    table, scale, out = folder / "methods.yaml", folder / "scale.yaml", folder / "runs"
    table.write_text(TABLE)
    scale.write_text(SCALE.replace("SHARDS", str(shards)))
    command = [sys.executable, str(ROOT / "launchers" / "ablate.py"), str(table), "--scale", str(scale), "--out",
               str(out)]  # fmt: skip
    env = os.environ | servers.env
    first = subprocess.Popen(command, env=env, cwd=folder, stdout=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and first.poll() is None:
        if any(len(file.read_bytes().splitlines()) > 25 for file in out.glob("*/metrics.jsonl")):
            break
        time.sleep(0.02)
    first.send_signal(signal.SIGINT)
    interrupted = first.wait(300)
    done = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, timeout=600, check=False)
    logs = "".join(file.read_text()[-2000:] for file in out.glob("*/output.log"))
    assert done.returncode == 0, done.stdout + done.stderr + logs
    return Chain(servers, out, table, interrupted, done.stdout)
