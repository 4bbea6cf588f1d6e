"""Two hosts with a network between them and sshd on each: the launch over a hostfile, a cut link, and what follows."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.engine.checkpoint import read_state
from tests.distributed.conftest import STEPS, losses
from tests.ranks import ROOT
from tests.system_packages import NAMESPACES

PATIENCE = 600.0
# Run on the first host. The launcher's ssh notices a host that is gone; ranks over there compile nothing anew.
SCRIPT = """
printf 'TORCH_EXTENSIONS_DIR=%s\\nOMP_NUM_THREADS=1\\n' "$EXTENSIONS" >> "$DS_ENV_FILE"
export PDSH_SSH_ARGS_APPEND="$PDSH_SSH_ARGS_APPEND -o ServerAliveInterval=5"
launch() { "$DEEPSPEED" --hostfile "$HOSTFILE" --master_addr "$MASTER_ADDR" launchers/pretrain.py "$@"; }
launch "$@" > "$OUT/first.log" 2>&1
echo $? > "$OUT/first.status"
until [ -e "$OUT/mended" ]; do sleep 0.2; done
launch "$@" > "$OUT/second.log" 2>&1
"""


def wait_for(happened, hosts: subprocess.Popen[bytes], out: Path, what: str) -> None:
    start = time.monotonic()
    while not happened():
        log = max(out.glob("*.log"), key=os.path.getmtime, default=None)
        said = log.read_text(errors="replace")[-6000:] if log else ""
        assert hosts.poll() is None, f"ended with {hosts.poll()} before {what}: {said}"
        assert time.monotonic() - start < PATIENCE, f"no {what} in {PATIENCE} s: {said}"
        time.sleep(0.05)


def link(state: str) -> None:
    subprocess.run(["ip", "-n", "node2", "link", "set", "eth0", state], check=True)


@pytest.mark.slow
@pytest.mark.needs("ip", "ssh", "ssh-keygen", "sshd", "pdsh", NAMESPACES)
def test_two_hosts_train_like_one_and_a_cut_link_is_named_and_mended(shared, pretrained, pretraining, tmp_path):
    run_dir, metrics = tmp_path / "run", tmp_path / "run" / "metrics.jsonl"
    words = [*pretraining, f"run.dir={run_dir}", "checkpoint.every=1", "run.timeout=20", "log.mlflow=false"]
    place = {"OUT": str(tmp_path), "DEEPSPEED": str(Path(sys.executable).with_name("deepspeed"))}
    place["EXTENSIONS"] = os.environ.get("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    place["PYTHONPATH"] = str(ROOT)  # the launcher passes it on
    place["TWO_NODES_PLAIN"] = "1"  # each host's own name is a loopback address, as Debian and Ubuntu write it
    command = ["bash", str(shared / "cluster" / "two_nodes.sh"), "sh", "-c", SCRIPT, "sh", *words]
    hosts = subprocess.Popen(command, cwd=ROOT, env=os.environ | place, start_new_session=True)
    try:
        # Seconds into the run: a rank is missed once it has been heard of.
        wait_for(lambda: metrics.exists() and metrics.read_text().count('"lr"') >= 15, hosts, tmp_path, "step 15")
        link("down")
        wait_for((tmp_path / "first.status").exists, hosts, tmp_path, "end of the first launch")
        said = (tmp_path / "first.log").read_text()
        assert (tmp_path / "first.status").read_text().strip() != "0", said[-4000:]
        assert re.search(r"error: rank 0: rank 1 on \S+ \(last at step \d+, \w+\): not heard of for \d+ s", said), said
        assert 1 <= read_state(run_dir)["step"] < STEPS  # a checkpoint's writing may end a step or two later
        link("up")
        (tmp_path / "mended").touch()
        hosts.wait(PATIENCE)
    finally:
        if hosts.poll() is None:
            os.killpg(hosts.pid, signal.SIGTERM)
            hosts.wait()
    assert hosts.returncode == 0, shlex.join(words) + (tmp_path / "second.log").read_text()[-6000:]
    assert losses(run_dir) == losses(pretrained)  # of two ranks on one host, bit for bit
