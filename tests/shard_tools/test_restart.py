"""A build that was stopped, however, goes on to the bytes of one that was not."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import psutil
import pytest

from pipeline.errors import UserError
from shard_tools.build import build
from tests.conftest import ROOT
from tests.helpers import digests, options, synth_catalog, synth_shards
from tests.shard_tools import kills


@pytest.mark.slow
def test_stopped_at_54_random_points_it_goes_on_to_the_same_bytes_and_loses_nothing(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "tests.shard_tools.kills", tmp_path],
        cwd=ROOT, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    again, full = found["failures tried again"], found["full disk in the second split"]
    points = found["fresh"] + found["second split"] + again + full
    assert len(points) == 54
    for point in points:
        if point in full:  # or it was the progress bar's write that failed
            assert point["died"] == -100 - kills.FULL_DISK or point["died"] > 0, point
        else:
            assert point["died"] == -signal.SIGKILL, point
        assert point["finished splits"] in (("none",) if point in found["fresh"] else ("whole", "switching")), point
        assert point["identical"], point
        assert point["untouched"], point
        assert not point["leftovers"], point
    assert len({point["finished"] for point in points}) >= 6  # killed at all stages, not in one
    assert found["retry is as new"]
    assert sum(point["finished splits"] == "whole" for point in full + found["second split"] + again) > 20
    assert found["full disk"] == {"failed": -100 - kills.FULL_DISK, "leftovers": [], "identical": True}


@pytest.mark.slow
def test_ctrl_c_and_sigkill_of_a_real_build_leave_no_process_and_no_difference(tmp_path):
    words = ["--dataset", "synth", "--limit", "120", "--seconds", "2", "--clips-per-shard", "4", "--workers", "2"]
    source, out = tmp_path / "source", tmp_path / "out"
    synth_catalog(source, 120, 2.0)
    line = [sys.executable, "shard_tools/build_shards.py", *words, "--audio-root", str(source), "--out", str(out)]

    def stop(number: signal.Signals, after: int) -> tuple[int, str]:
        running = subprocess.Popen(line, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)
        deadline = time.monotonic() + 600
        family = []
        while len(list(out.glob("*.tar"))) < after or len(family) < 3:  # two workers, and what cleans up after them
            assert running.poll() is None, running.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.005)
            family = psutil.Process(running.pid).children(recursive=True)
        if number == signal.SIGINT:
            os.killpg(running.pid, number)  # a terminal's Ctrl-C reaches the workers too
        else:
            running.kill()
        _, said = running.communicate(timeout=300)
        _, alive = psutil.wait_procs(family, timeout=120)
        assert not alive
        assert not (out / "manifest.json").exists()
        return running.returncode, said

    for after in (0, 2):  # at once: the workers are at their imports
        status, said = stop(signal.SIGINT, after)
        assert status == 130
        assert "run the same command to go on" in said
        assert "Traceback" not in said
        assert not list(out.glob("*.tmp"))
    kept = len(list(out.glob("*.tar")))
    status, _ = stop(signal.SIGKILL, after=kept + 2)
    assert status == -signal.SIGKILL
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    reference = tmp_path / "reference"
    catalog = synth_catalog(source, 120, 2.0)
    catalog.dataset = "synth"
    build(catalog, reference, options(2.0, 4), 1, engine="inline")
    assert digests(out) == digests(reference)


def test_a_cut_tar_of_an_unfinished_build_is_written_again(tmp_path, monkeypatch):
    from shard_tools import build as module

    catalog = synth_catalog(tmp_path / "source", 26, 0.1)
    build(catalog, tmp_path / "whole", options(0.1, 4), 1, engine="inline")

    def fails(*_):
        raise OSError("no space left on device")

    out = tmp_path / "out"
    monkeypatch.setattr(module, "finish", fails)
    with pytest.raises(OSError, match="no space"):
        build(catalog, out, options(0.1, 4), 1, engine="inline")
    monkeypatch.undo()
    os.truncate(out / "train-000000.tar", 1000)
    (out / "train-000001.tar").unlink()
    build(catalog, out, options(0.1, 4), 1, engine="inline")
    assert digests(out) == digests(tmp_path / "whole")


def test_changed_options_and_inputs_are_refused_by_name(tmp_path):
    synth_shards(tmp_path, clips=26, seconds=0.1)
    before = digests(tmp_path)
    with pytest.raises(UserError, match="clips_per_shard = 8, not 4"):
        synth_shards(tmp_path, clips=26, seconds=0.1, per_shard=4)
    with pytest.raises(UserError, match=r"--seconds 0\.1, not 0\.25"):
        synth_shards(tmp_path, clips=26, seconds=0.25)
    with pytest.raises(UserError, match="clips found = 26, not 25"):
        synth_shards(tmp_path, clips=25, seconds=0.1)
    catalog = synth_catalog(tmp_path / "source", 26, 0.1)
    first, *others = catalog.clips
    told = {"labels of the clips": {"labels": ()}, "segments": {"start": 1.0}, "folds of the clips": {"fold": 9}}
    for said, change in told.items():
        changed = synth_catalog(tmp_path / "source", 26, 0.1)
        changed.clips.truncate(0)
        for clip in (replace(first, **change), *others):
            changed.clips.append(clip)
        with pytest.raises(UserError, match=f"begun with other {said}"):
            build(changed, tmp_path, options(0.1, 8), 1, engine="inline")
    assert digests(tmp_path) == before
    summary = build(catalog, tmp_path, options(0.1, 8), 1, engine="inline")  # nothing to do, nothing touched
    assert digests(tmp_path) == before
    assert summary.manifest.splits["train"].clips == 26
    build(catalog, tmp_path, options(0.1, 4), 1, overwrite=True, engine="inline")
    assert len(list(tmp_path.glob("*.tar"))) == 7
    assert not (tmp_path / ".build").exists()


def test_two_builds_of_one_directory_do_not_meet(tmp_path):
    from shard_tools.lock import owner

    catalog = synth_catalog(tmp_path / "source", 26, 0.1)
    with owner(tmp_path / "out", shared=True), pytest.raises(UserError, match="another process is building here"):
        build(catalog, tmp_path / "out", options(0.1), 1, engine="inline")
    build(catalog, tmp_path / "out", options(0.1), 1, engine="inline")
    assert not (tmp_path / "out" / ".build").exists()
