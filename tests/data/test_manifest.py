"""Shards that are not what this release reads are refused in one line."""

import json
import shutil

import pytest

from pipeline.config import DataConfig
from pipeline.data.manifest import load_manifest
from pipeline.data.spec import DataSpec
from pipeline.errors import UserError


@pytest.fixture
def edited(shards, tmp_path):
    def edit(**changes):
        shutil.copy(shards / "manifest.json", tmp_path)
        content = json.loads((tmp_path / "manifest.json").read_text())
        for key, value in changes.items():
            content[key] = content[key] | value if isinstance(value, dict) else value
        (tmp_path / "manifest.json").write_text(json.dumps(content))
        return tmp_path

    return edit


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"version": 2}, "format version 2, this release reads 1"),
        ({"format": "other"}, "format is not 'craft-shards'"),
        ({"surprise": 1}, "surprise"),
        ({"dataset": "edited"}, "digest does not fit"),
    ],
)
def test_other_manifests_are_refused(edited, changes, said):
    with pytest.raises(UserError) as error:
        load_manifest(edited(**changes))
    assert said in str(error.value)
    assert "manifest.json" in str(error.value)


def test_no_manifest_and_no_json(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        load_manifest(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        load_manifest(tmp_path)


def test_another_sample_rate_names_the_remedy(shards):
    manifest = load_manifest(shards)
    other = manifest.model_copy(update={"audio": manifest.audio.model_copy(update={"sample_rate": 22050})})
    with pytest.raises(UserError, match=r"22050 Hz, the model reads 16000; rebuild the shards with --sample-rate"):
        DataSpec.of(other, DataConfig(shards=str(shards)))
