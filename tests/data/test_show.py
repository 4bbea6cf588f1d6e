"""`python -m pipeline.data.show`: the same text for any ranks and workers, which are real processes; a picture."""

import hashlib
import json
import subprocess

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from pipeline.config import AugmentConfig, DataConfig
from pipeline.data.loader import Loader
from tests.ranks import run_script
from tests.stores import gcs_server, hub_server

SETTINGS = ["augment.mixup=0.5", "augment.roll=0.05", "augment.noise=0.1", "augment.noise_snr=[10,20]"]
SETTINGS += ["augment.freq_mask=24", "augment.time_mask=9", "data.sampler=balanced", "run.seed=3"]


def show(shards, *words: object, status: int = 0) -> subprocess.CompletedProcess[str]:
    done = run_script("-m", "pipeline.data.show", "--shards", shards, *words)
    assert done.returncode == status, done.stderr
    return done


@pytest.fixture(scope="module")
def alone(shards) -> str:
    return show(shards, "--batch", 4, "--batch-size", 12, "--json", *SETTINGS).stdout


def test_the_text_is_the_same_for_any_ranks_and_workers_and_there_is_a_picture(shards, alone, tmp_path):
    picture = tmp_path / "batch.png"
    place = ("--ranks", 2, "--workers", 1)
    assert show(shards, "--batch", 4, "--batch-size", 12, "--json", "--png", picture, *place, *SETTINGS).stdout == alone
    pixels = imread(picture)
    assert pixels.shape[0] > 500
    assert len(np.unique(pixels.reshape(-1, pixels.shape[2]), axis=0)) > 50  # not a blank page


@pytest.mark.parametrize("store", [gcs_server, hub_server])
def test_other_stores_give_the_same_text(shards, alone, tmp_path, monkeypatch, store):
    """gs:// and hf:// with the real clients, in processes of their own, against servers that speak their protocols."""
    with store(shards) as (url, environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        found = show(url, "--batch", 4, "--batch-size", 12, "--json", f"data.cache={tmp_path}", *SETTINGS)
    assert found.stdout == alone
    assert len(list(tmp_path.rglob("*.cached"))) > 3


def test_it_is_the_batch_that_training_gets(shards, alone):
    content = json.loads(alone)
    data = DataConfig(shards=str(shards), sampler="balanced", workers=0)
    augment = AugmentConfig(mixup=0.5, roll=0.05, noise=0.1, noise_snr=(10, 20), freq_mask=24, time_mask=9)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with Loader(data, augment=augment, batch_size=12, seed=3) as loader:
        batch = next(loader.batches(4))
        assert [clip["key"] for clip in content["clips"]] == loader.keys(batch.row.tolist())
    torch.set_num_threads(threads)
    for name, said in content["tensors"].items():
        array = getattr(batch, name).numpy()
        assert said == {
            "dtype": str(array.dtype), "shape": list(array.shape), "sha256": hashlib.sha256(array.tobytes()).hexdigest()
        }  # fmt: skip
    for i, clip in enumerate(content["clips"]):
        assert clip["position"] == 48 + i
        assert sorted(clip["labels"].values()) == pytest.approx(
            sorted(batch.targets[i][batch.targets[i] > 0].tolist()), abs=1e-6
        )
        first, count = clip["augmentation"]["freq_mask"]
        band = batch.fbank[i, :40, first : first + count]
        assert not band.numel() or band.max() - band.min() < 0.1  # one value, and noise of at most 0.1 on it
    mixed = [clip for clip in content["clips"] if "mixup" in clip["augmentation"]]
    assert 0 < len(mixed) < 12


def test_a_wrong_wish_is_one_line(shards, tmp_path):
    done = show(tmp_path, "--batch", 0, "--batch-size", 6, "--ranks", 2, status=2)
    assert done.stderr.count("\n") == 1
    assert "manifest.json" in done.stderr
    assert "does not divide" in show(shards, "--batch", 0, "--batch-size", 5, "--ranks", 2, status=2).stderr
    assert "train.batch_size" in show(shards, "--batch", 0, "--batch-size", 0, status=2).stderr
