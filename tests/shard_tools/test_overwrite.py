"""What --overwrite may remove: shards that a manifest lists or an unfinished build wrote, and nothing else."""

import itertools
import shutil
from contextlib import suppress
from pathlib import Path

import pytest

from pipeline.data.manifest import load_manifest
from pipeline.errors import UserError
from pipeline.flow import Clip
from shard_tools import build as build_module
from shard_tools.build import build
from shard_tools.catalogs import Catalog
from shard_tools.plan import SplitPlan
from shard_tools.sources import members
from shard_tools.store import Store
from shard_tools.verify_shards import verify
from tests.helpers import digests, options
from tests.shard_tools.conftest import PER_SHARD, SECONDS, of, run
from tests.shard_tools.containers import pack, recordings

FOREIGN = "of which no manifest and no unfinished build knows; move it away, or use another --out"


def refused(source, out, name: str, split: str, per_shard: int = PER_SHARD, **words: bool) -> None:
    """It is, by the name of a file, and nothing is changed."""
    before = digests(out)
    with pytest.raises(UserError, match=rf"holds {name}, {FOREIGN}"):
        run(source, out, split, per_shard, **words)
    assert digests(out) == before


def test_a_file_that_only_has_the_name_of_a_shard_stays(audio, whole, tmp_path):
    """Beside no manifest, one without the split, and one in which the split has fewer shards."""
    alone, beside, beyond = (tmp_path / name for name in ("alone", "beside", "beyond"))
    alone.mkdir()
    run(audio, beside, "train")
    shutil.copytree(whole, beyond)
    shards = sum(shard.split == "eval" for shard in load_manifest(whole).shards)
    for out, name, per_shard in ((alone, "eval-000000.tar", PER_SHARD), (beside, "eval-000001.tar", PER_SHARD),
                                 (beyond, f"eval-{shards:06d}.tar", 1)):  # fmt: skip
        (out / name).write_text("mine")
        refused(audio, out, name, "eval", per_shard, overwrite=True)
        assert not (out / ".build").exists()
    run(audio, beyond, "eval", overwrite=True)  # which does not need the name
    assert (beyond / name).read_text() == "mine"


def test_it_stays_in_a_store_too(audio, tmp_path):
    (tmp_path / "eval-000000.tar").write_text("mine")
    with pytest.raises(UserError, match=rf"holds eval-000000\.tar, {FOREIGN}"):
        run(audio, f"local://{tmp_path}", "eval", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["eval-000000.tar"]


def test_it_stays_where_failures_are_tried_again(audio, tmp_path):
    """A finished split lacks the shards of which all clips failed."""
    shutil.copytree(audio, tmp_path / "audio")
    out = tmp_path / "out"
    plan = SplitPlan(of(tmp_path / "audio", "eval"), "eval", out, options(SECONDS, 1))
    Path(plan.shard(1).clips[0].path).write_text("no audio")
    run(tmp_path / "audio", out, "eval", 1)
    (out / "eval-000001.tar").write_text("mine")
    refused(tmp_path / "audio", out, "eval-000001.tar", "eval", 1, retry=True)


def test_shards_of_an_unfinished_build_are_replaced(audio, tmp_path, monkeypatch):
    """Where the plan is damaged, those that have records."""

    def fails(*_):
        raise OSError("no space left on device")

    for damaged in (False, True):
        out = tmp_path / str(damaged)
        with monkeypatch.context() as patch:
            patch.setattr(build_module, "finish", fails)
            with pytest.raises(OSError, match="no space"):
                run(audio, out, "train")
        tars = len(list(out.glob("*.tar")))
        if damaged:
            (out / ".build" / "train" / "plan").write_text("{")
            (out / ".build" / "train" / "000001.record").unlink()
            refused(audio, out, "train-000001.tar", "train", overwrite=True)
            (out / "train-000001.tar").unlink()
        run(audio, out, "train", 12, overwrite=True)
        assert len(list(out.glob("*.tar"))) < tars
        assert verify(out, 1) == []
        assert not (out / ".build").exists()


@pytest.mark.parametrize("splits", [("eval",), ("train", "eval")])
def test_one_that_was_stopped_leaves_no_shard_that_nobody_knows(audio, whole, tmp_path, monkeypatch, splits):
    """At each file that it removes."""
    run(audio, tmp_path / "first", "eval")
    real, stopped = Store.remove, 0
    for last in itertools.count():
        out = tmp_path / str(last)
        shutil.copytree(whole if len(splits) == 2 else tmp_path / "first", out)
        removed = []

        def remove(self, names, removed=removed, last=last):
            for name in names:
                if len(removed) == last:
                    raise OSError("stopped")
                removed.append(name)
                real(self, [name])

        with monkeypatch.context() as patch, suppress(OSError):
            patch.setattr(Store, "remove", remove)
            run(audio, out, "eval", overwrite=True)
            break
        stopped += 1
        run(audio, out, "eval", overwrite=True)
        assert verify(out, 1) == []
        assert set(load_manifest(out).splits) == set(splits)
    assert stopped >= 2


def test_it_removes_no_source_of_its_own(whole, tmp_path):
    """A tar of the user's under a name that the manifest lists; the root leads to it by a link."""
    out, root = tmp_path / "out", tmp_path / "root"
    shutil.copytree(whole, out)
    root.symlink_to(out)
    pack(tmp_path, "tar", recordings(4))
    (tmp_path / "a.tar").replace(out / "train-000000.tar")
    catalog = Catalog("unlabelled", root, load_manifest(out).labels)
    for number, member in enumerate(members([f"{root}/train-000000.tar"])):
        catalog.clips.append(Clip(str(number), member.name, 0.0, None, (0,), "train", at=member.at))
    before = digests(out)
    with pytest.raises(UserError, match=r"--overwrite would remove train-000000\.tar, which holds clips"):
        build(catalog, out, options(SECONDS, PER_SHARD), 1, engine="inline", overwrite=True)
    assert digests(out) == before
