"""Engines and slices give the same bytes, and a clip that kills its process costs only itself."""

import contextlib
import json
import multiprocessing
import subprocess
import sys
import threading
import time

import psutil
import pytest

from pipeline.errors import UserError
from shard_tools.build import build, build_slice, merge
from shard_tools.distribute import run
from shard_tools.plan import Slice, SplitPlan
from tests.conftest import ROOT
from tests.helpers import digests, options, synth_catalog
from tests.ranks import run_script


@pytest.fixture(scope="module")
def catalog(tmp_path_factory):
    return synth_catalog(tmp_path_factory.mktemp("audio"), 60, 0.2)


@pytest.fixture(scope="module")
def wanted(catalog, tmp_path_factory):
    out = tmp_path_factory.mktemp("inline")
    build(catalog, out, options(0.2), 1, engine="inline")
    return digests(out)


@pytest.mark.slow
def test_processes_give_the_same_bytes(catalog, wanted, tmp_path):
    build(catalog, tmp_path, options(0.2), 2)
    assert digests(tmp_path) == wanted


@pytest.mark.slow
def test_a_worker_that_is_killed_with_nothing_to_do_is_replaced(catalog, wanted, tmp_path):
    plan = SplitPlan(catalog, "train", tmp_path, options(0.2))
    shards = run((plan.shard(number) for number in range(2)), 1)
    assert next(shards).name == "train-000000.tar"
    (worker,) = multiprocessing.active_children()
    worker.kill()
    worker.join()
    time.sleep(0.5)  # until its pool knows
    assert [plan.name for plan in shards] == ["train-000001.tar"]


@pytest.mark.slow
def test_a_ray_cluster_of_two_workers_gives_the_same_bytes(catalog, wanted, tmp_path):
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        cluster.add_node(num_cpus=1)
        ray.init(address=cluster.address, log_to_driver=False)
        assert ray.cluster_resources()["CPU"] == 2
        build(catalog, tmp_path / "out", options(0.2), 100, engine="ray")
        assert digests(tmp_path / "out") == wanted
        (tmp_path / "a file").touch()
        plans = [SplitPlan(catalog, "train", tmp_path / "a file" / "below", options(0.2)).shard(0)]
        with pytest.raises(OSError, match="a file"):
            list(run(plans, 1, "ray"))
    finally:
        ray.shutdown()
        cluster.shutdown()


@pytest.mark.slow
def test_killed_ray_workers_change_nothing(catalog, wanted, tmp_path):
    """Three are killed, one after another, with what they have half written."""
    import ray

    ray.init("local", num_cpus=1, log_to_driver=False)
    out, killed = tmp_path / "out", []
    ended = threading.Event()

    def kill() -> None:
        while not ended.wait(0.02) and len(killed) < 3:
            for process in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    at_work = "_write_alone" in " ".join(process.cmdline()) and list(out.glob("*.tmp"))
                    if at_work and process.pid not in killed:
                        process.kill()
                        killed.append(process.pid)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        build(catalog, out, options(0.2), 100, engine="ray")
    finally:
        ended.set()
        killer.join()
        ray.shutdown()
    assert len(killed) == 3
    assert digests(out) == wanted
    assert not [path for path in out.iterdir() if path.suffix == ".tmp" or path.name == ".build"]


def test_slices_and_merge_give_the_same_bytes(catalog, wanted, tmp_path):
    shards = 0
    for number in (3, 1):
        shards += build_slice(catalog, tmp_path, options(0.2), 1, Slice(number, 3), "inline")
    with pytest.raises(UserError, match=r"3 of 8 shards are not written yet, such as train-000001\.tar"):
        merge(catalog, tmp_path, options(0.2))
    shards += build_slice(catalog, tmp_path, options(0.2), 1, Slice(2, 3), "inline")
    assert shards == 8
    assert not (tmp_path / "manifest.json").exists()
    merge(catalog, tmp_path, options(0.2))
    assert digests(tmp_path) == wanted


@pytest.mark.slow
def test_slices_of_the_command_line(catalog, wanted, tmp_path):
    line = [
        *(sys.executable, "shard_tools/build_shards.py", "--dataset", "csv", "--table", f"{catalog.root}/table.csv"),
        *("--seconds", "0.2", "--clips-per-shard", "8", "--out", str(tmp_path / "out"), "--distributor", "inline"),
    ]

    def command(*words: str) -> subprocess.Popen[str]:
        return subprocess.Popen([*line, *words], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    for running in [command("--slice", f"{number}/2") for number in (1, 2)]:  # at the same time
        said, errors = running.communicate(timeout=600)
        assert running.returncode == 0, errors
        assert "--merge" in said
    merged = run_script(*line[1:], "--merge")
    assert merged.returncode == 0, merged.stderr
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert {shard["name"]: shard["sha256"] for shard in manifest["shards"]}.items() <= wanted.items()
    assert digests(tmp_path / "out")["index.parquet"] == wanted["index.parquet"]


def test_a_slice_that_is_none_is_refused():
    for words in (["--slice", "4/3"], ["--slice", "1/2", "--merge"]):
        done = run_script("shard_tools/build_shards.py", "--dataset", "synth", "--out", "/tmp/never", *words)
        assert done.returncode == 2
        assert "slice" in done.stderr


@pytest.mark.slow
def test_a_clip_that_kills_the_decoder_is_a_failure(catalog, tmp_path, monkeypatch):
    """A segmentation fault in a decoder: real death of real worker processes."""
    plugin = tmp_path / "plugin"
    plugin.mkdir()
    (plugin / "sitecustomize.py").write_text(
        "import os, signal\n"
        "import soundfile\n"
        "real = soundfile.SoundFile.__init__\n"
        "def init(self, file, *words, **options):\n"
        "    if os.readlink(f'/proc/self/fd/{file}').endswith('clip00007.flac'):\n"
        "        os.kill(os.getpid(), signal.SIGSEGV)\n"
        "    real(self, file, *words, **options)\n"
        "soundfile.SoundFile.__init__ = init\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{plugin}:{ROOT}")
    out = tmp_path / "out"
    summary = build(catalog, out, options(0.2), 1)
    assert dict(summary.failures) == {"crashed": 1}
    failures = [json.loads(line) for line in (out / "failures.jsonl").read_text().splitlines()]
    assert [failure["path"].rsplit("/", 1)[1] for failure in failures] == ["clip00007.flac"]
    assert sum(split.clips for split in summary.manifest.splits.values()) == 59
