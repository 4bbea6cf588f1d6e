"""Bad clips and locality: what stands in, who counts, and which bytes a rank asks for."""

import errno
import itertools
import os
import shutil
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import torch
from scipy import stats

from pipeline.config import AugmentConfig, DataConfig
from pipeline.data.bad import stand_ins
from pipeline.data.loader import Loader
from pipeline.data.manifest import load_index
from pipeline.data.reader import PASSING, open_local
from pipeline.engine.evaluation import mean_losses
from pipeline.errors import UserError

BATCH = 12


def loader(shards, rank=0, ranks=1, batch=BATCH, waveform=False, augment=None, **data):
    config = DataConfig(shards=str(shards), **{"streams": 4, "window": 8, "workers": 0, "max_bad_share": 1} | data)
    return Loader(config, augment=augment, waveform=waveform, batch_size=batch, seed=1, rank=rank, world_size=ranks)


def taken(own, count, first=0):
    batches = own.batches(first)
    return [next(batches) for _ in range(count)]


@pytest.fixture
def copy(shards, tmp_path):
    out = tmp_path / "copy"
    shutil.copytree(shards, out, ignore=shutil.ignore_patterns("source"))
    return out


@pytest.fixture
def expected(copy):
    """The first batches where all is well."""
    with loader(copy) as own:
        return taken(own, 6)


@contextmanager
def back(away, there, module="reader"):
    """What was moved away is back when the module of pipeline.data waits for it the second time."""
    waits = []

    def sleep(seconds):
        waits.append(seconds)
        if len(waits) == 2:
            away.rename(there)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(f"pipeline.data.{module}.time", SimpleNamespace(monotonic=time.monotonic, sleep=sleep))
        yield
    assert len(waits) == 2


def lose(copy, keep=0, count=0):
    """Deletes training shards: all but `keep`, or `count` of them."""
    tars = sorted(copy.glob("train-*.tar"))
    for tar in tars[keep:] if keep else tars[:count]:
        tar.unlink()


def wipe(copy, count):
    """Overwrites `count` training shards; their sizes stay."""
    for tar in sorted(copy.glob("train-*.tar"))[:count]:
        tar.write_bytes(bytes(tar.stat().st_size))


@pytest.mark.parametrize("part", ["train", "eval"])
def test_most_data_gone_is_no_run(copy, part):
    """Empty tars, missing ones and a FIFO: said at the start, in one line, with the share of the clips."""
    tars = sorted(copy.glob(f"{part}-*.tar"))
    os.truncate(tars[0], 0)
    for tar in tars[1:-1]:
        tar.unlink()
    if len(tars) > 2:
        os.mkfifo(tars[1])
    config = DataConfig(shards=str(copy), workers=0)
    with pytest.raises(UserError) as error:
        Loader(config, part, batch_size=12)
    said = str(error.value)
    assert said.startswith(f"{copy}: {len(tars) - 1} of {len(tars)} tars are not as manifest.json says, with ")
    assert f"{tars[0].name} (0 bytes of " in said
    assert "data.max_bad_share = 0.05 allows less" in said
    other = "eval" if part == "train" else "train"  # that is not read here
    Loader(config, other, batch_size=12).close()


def test_the_share_counts_what_looks_whole_at_the_start(copy):
    wipe(copy, 5)
    with (
        loader(copy, max_bad_share=0.05) as own,
        pytest.raises(
            UserError, match=r"data.max_bad_share = 0.05: \d+ samples of one epoch .* raise data.max_bad_share$"
        ),
    ):
        taken(own, 7)


def test_a_few_bad_clips_of_a_small_set_end_nothing(copy):
    rows = load_index(copy, "train").to_pylist()
    for row in rows[:2] + rows[-1:]:
        with (copy / row["shard"]).open("r+b") as file:
            file.seek(row["fbank_offset"] + 300)
            file.write(b"\x55" * 16)
    with loader(copy, max_bad_share=DataConfig().max_bad_share) as own:
        taken(own, 7)
        assert own.replaced(5) == 3  # batch 5 is the last one of the first epoch
        assert own.replaced(0) < 3


def test_a_shard_that_is_away_for_a_moment_costs_nothing(copy, monkeypatch):
    """Away at the first open, back at the second try; then stale while it is open."""
    with loader(copy) as own:
        expected = taken(own, 6)
    tar = sorted(copy.glob("train-*.tar"))[0]
    away = tar.with_suffix(".away")
    with loader(copy) as own, back(away, tar):
        tar.rename(away)
        found = taken(own, 6)
        assert not own.bad
    assert all(torch.equal(one.row, other.row) for one, other in zip(found, expected, strict=True))
    with loader(copy) as own:
        batches = own.batches(0)
        found = [next(batches) for _ in range(3)]
        tars = [file.fd for file in psutil.Process().open_files() if file.path.startswith(f"{copy}/train-")]
        assert tars
        for descriptor in tars:
            stale = os.open(copy, os.O_RDONLY)  # reading it fails, as of a file that a server forgot
            os.dup2(stale, descriptor)
            os.close(stale)
        monkeypatch.setattr("pipeline.data.reader.PASSING", (*PASSING, errno.EISDIR))
        found += [next(batches) for _ in range(3)]
        assert not own.bad
    assert all(torch.equal(one.row, other.row) for one, other in zip(found, expected, strict=True))


def test_a_lost_shard_is_asked_for_again_after_a_while(copy, monkeypatch):
    tar = sorted(copy.glob("train-*.tar"))[0]
    away = tar.with_suffix(".away")
    with loader(copy) as own:
        epoch = own.clips // BATCH + 1
        monkeypatch.setattr("pipeline.data.reader.WAITS", ())
        monkeypatch.setattr("pipeline.data.reader.RETRY_SECONDS", 0.2)
        tar.rename(away)
        batches = own.batches(0)
        for _ in range(epoch):
            next(batches)
        assert own.replaced(0)
        away.rename(tar)
        time.sleep(0.25)
        for _ in range(3 * epoch):
            next(batches)
        assert not own.replaced(3 * epoch)


def test_a_directory_may_be_called_as_a_web_server_begins(copy, monkeypatch):
    monkeypatch.chdir(copy.parent)
    copy.rename("https-data")
    with loader("https-data", max_bad_share=0) as own:
        assert len(taken(own, 1)) == 1
    lose(copy.with_name("https-data"), count=1)
    with pytest.raises(UserError, match="not there"):
        loader("https-data", max_bad_share=0)


def test_a_directory_that_is_away_is_waited_for_and_costs_no_clip(copy, expected, monkeypatch, caplog):
    away = copy.with_suffix(".away")
    monkeypatch.setattr("pipeline.data.reader.WAITS", ())
    with loader(copy) as own, back(away, copy):
        copy.rename(away)
        found = taken(own, 6)
        assert not own.bad
    assert all(torch.equal(one.row, other.row) for one, other in zip(found, expected, strict=True))
    assert caplog.text.count("No such file or directory; waiting for it") == 1
    monkeypatch.setattr("pipeline.data.reader.OUTAGE_SECONDS", 0.3)
    with loader(copy) as own:
        copy.rename(away)
        with pytest.raises(UserError, match=r"copy: No such file or directory, for 0 s; when it is back") as error:
            taken(own, 1)
        assert error.value.transient
        assert not own.bad


def test_an_index_that_is_away_is_waited_for_and_opened_again(copy, expected, monkeypatch, caplog):
    """As that of a mount that was lost: what was open stays dead when it is back."""
    dead, read = set(), pq.ParquetFile.read_row_group

    def of_a_mount(file, *words, **options):
        if file in dead:
            raise OSError(errno.ENOTCONN, "Error reading bytes from file. Detail: [errno 107] Transport ...")
        return read(file, *words, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", of_a_mount)
    away = copy.with_suffix(".away")
    with loader(copy) as own, back(away, copy, "manifest"):
        dead.update(file._file for file in own._index._files)
        copy.rename(away)
        found = taken(own, 6)
        assert not own.bad
    assert all(torch.equal(one.row, other.row) for one, other in zip(found, expected, strict=True))
    assert caplog.text.count("index.parquet: Transport endpoint is not connected; waiting for it") == 1
    monkeypatch.setattr("pipeline.data.manifest.OUTAGE_SECONDS", 0.3)
    with loader(copy) as own:
        dead.update(file._file for file in own._index._files)
        copy.rename(away)
        with pytest.raises(UserError, match=r"index.parquet: .*, for 0 s; when it is back") as error:
            taken(own, 1)
        assert error.value.transient


def test_a_process_that_may_open_no_more_files_reads_on(copy, expected, monkeypatch, caplog):
    """Closing shards that it has open; no clip is bad for it."""
    most = [3]

    def open_few(directory, name):
        """As a process does that has so many descriptors left."""
        links = (os.readlink(entry) for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink())
        if sum(link.startswith(f"{copy}/train-") for link in links) >= most[0]:
            raise OSError(errno.EMFILE, "Too many open files")
        return open_local(directory, name)

    monkeypatch.setattr("pipeline.data.loader.open_local", open_few)
    with loader(copy) as own:
        found = taken(own, 6)
        assert not own.bad
    assert all(torch.equal(one.row, other.row) for one, other in zip(found, expected, strict=True))
    assert caplog.text.count("from now on 2 shards are kept open, which is slower; raise ulimit -n") == 1
    most[0] = 0
    with loader(copy) as own, pytest.raises(UserError, match=r"Too many open files; raise ulimit -n"):
        taken(own, 1)


def test_a_file_system_that_gives_a_part_of_what_is_asked_is_asked_again(copy, expected, monkeypatch):
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda file, buffers, at: preadv(file, [memoryview(buffers[0])[:5000]], at))
    with loader(copy) as own:
        found = taken(own, 6)
        assert not own.bad
    assert all(torch.equal(one.fbank, other.fbank) for one, other in zip(found, expected, strict=True))


def test_replaced_samples_add_up_from_the_beginning_of_an_epoch(copy):
    with loader(copy) as own:
        own.clips, steps = 500 * BATCH + 1, 20_000
        for step in range(steps):
            own.bad_clips.replace(step, 1 + step % 3)
        counts = [1 + step % 3 for step in range(steps)]
        for step in (0, 3, 499, 500, 501, 7777, steps - 1):
            own_epoch = [other for other in range(step + 1) if own._epoch(other) == own._epoch(step)]
            assert own.replaced(step) == sum(counts[other] for other in own_epoch)
        own.bad_clips.replace(501, 7)  # again from there
        assert own.replaced(501) == sum(counts[other] for other in range(501) if own._epoch(other) == 1) + 7


def test_a_lost_shard_is_made_up_for_by_many_clips_and_no_batch_repeats_one(copy):
    lose(copy, count=2)
    with loader(copy) as own, loader(copy) as planner:
        per_epoch = own.clips // BATCH
        planned, used = [], []
        for step, batch in enumerate(taken(own, per_epoch)):
            rows = planner.draw(step).rows.tolist()
            planned += rows
            used += batch.row.tolist()
            assert len(set(batch.row.tolist())) == BATCH, f"batch {step} holds a clip twice"
        stand_ins = Counter(u for p, u in zip(planned, used, strict=True) if p != u)
        assert sum(stand_ins.values()) == own.replaced(per_epoch - 1) > 8
        assert max(stand_ins.values()) <= 4
        assert len(stand_ins) >= sum(stand_ins.values()) / 2


@pytest.mark.parametrize(("ranks", "workers", "mixup"), [(2, 1, 0), (3, 0, 0), (4, 2, 0), (3, 1, 1)])
def test_stand_ins_and_counts_do_not_depend_on_ranks_or_workers(copy, ranks, workers, mixup):
    """Also those of mixup's other clips, which come out of an order of their own."""
    lose(copy, count=3)
    options = {"augment": AugmentConfig(mixup=1), "sampler": "balanced"} if mixup else {}
    with loader(copy, **options) as own:
        expected = taken(own, 8)
        counts = [own.replaced(step) for step in (0, 7)]
    found, found_counts = [], Counter()
    for rank in range(ranks):
        with loader(copy, rank, ranks, workers=workers, **options) as own:
            found.append(taken(own, 8))
            found_counts.update({step: own.replaced(step) for step in (0, 7)})
    assert [found_counts[step] for step in (0, 7)] == counts
    for step, reference in enumerate(expected):
        pieces = [batches[step] for batches in found]
        order = torch.cat([piece.position for piece in pieces]).argsort()
        assert torch.equal(torch.cat([piece.row for piece in pieces])[order], reference.row)
        assert torch.equal(torch.cat([piece.fbank for piece in pieces])[order], reference.fbank)
        assert torch.equal(torch.cat([piece.targets for piece in pieces])[order], reference.targets)


def test_ranks_cannot_become_uneven_even_where_all_their_clips_are_lost(copy):
    lose(copy, keep=1)
    sizes = []
    for rank in range(3):
        with loader(copy, rank, 3) as own:
            batches = taken(own, 7)
            sizes.append([len(batch) for batch in batches])
            assert all(batch.valid.all() for batch in batches)
            assert own.replaced(5) > own.clips // 3 // 2
    assert sizes == [[BATCH // 3] * 7] * 3


def test_the_limit_is_of_an_epoch_not_of_the_run(copy):
    wipe(copy, 1)
    with loader(copy) as own:
        epochs = 3 * own.clips // BATCH
        taken(own, epochs)
        once = own.replaced(0)
        assert own.replaced(epochs - 1) <= once + BATCH
    with loader(copy, max_bad=once + BATCH) as own:
        taken(own, epochs)
    with (
        loader(copy, max_bad=once - 1) as own,
        pytest.raises(
            UserError, match=rf"data.max_bad = {once - 1}: {once} samples of one epoch .* such as .*train-000000.tar"
        ),
    ):
        taken(own, epochs)


def test_the_limit_counts_all_ranks(copy):
    with loader(copy, max_bad=5) as own:
        own.bad_clips.check(5)
        with pytest.raises(UserError, match=r"data.max_bad = 5: 6 samples of one epoch") as caught:
            own.bad_clips.check(6)
        assert not caught.value.local


def test_no_clip_left_is_an_error_and_not_an_endless_search(copy):
    lose(copy, keep=1)
    sorted(copy.glob("train-*.tar"))[0].unlink()
    with loader(copy) as own, pytest.raises(UserError, match=r"no clip can be read in place of"):
        taken(own, 1)


def test_a_batch_larger_than_an_epoch_is_refused(shards):
    with loader(shards) as own:
        clips = own.clips
    with pytest.raises(UserError, match=rf"train.batch_size = {clips + 1}: an epoch has {clips} clips"):
        loader(shards, batch=clips + 1)
    with loader(shards, batch=clips) as own:
        assert len(set(taken(own, 1)[0].row.tolist())) == clips


@pytest.mark.parametrize("waveform", [False, True])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_and_nodes_read_the_bytes_of_their_own_streams_and_no_others(shards, ranks, waveform, asked):
    """S = 4 streams: what is asked of each shard is what the plan says; shards are shared only at the streams' cuts."""
    rows = load_index(shards).to_pylist()
    members = ["waveform", "fbank"] if waveform else ["fbank"]
    touched = []
    for rank in range(ranks):
        asked.clear()
        with loader(shards, rank, ranks, batch=4, waveform=waveform) as own:
            steps = own.clips // 4
            batches = taken(own, steps)
            planned: Counter[str] = Counter()
            for step, batch in enumerate(batches):
                assert batch.row.tolist() == own.draw(step).rows.tolist()
                for row in batch.row.tolist():
                    planned[rows[row]["shard"]] += sum(rows[row][f"{member}_size"] for member in members)
            assert asked == planned
            touched.append(asked.copy())
            shard_count = sum(shard.split == "train" for shard in own.corpus.members[0].manifest.shards)
    together: Counter[str] = Counter()
    for one in touched:
        together.update(one)
    asked.clear()
    with loader(shards, batch=4, waveform=waveform) as own:
        taken(own, steps)
        assert together == asked  # over all ranks each byte is asked for once
        assert len(asked) == shard_count
    # Four streams are four runs of shards with three cuts between them, in each of which one shard may be cut.
    assert sum(map(len, touched)) <= shard_count + 3
    assert max(map(len, touched)) <= -(-shard_count // ranks) + 4 // ranks
    if ranks == 4:  # two nodes of two ranks
        nodes = [touched[0].keys() | touched[1].keys(), touched[2].keys() | touched[3].keys()]
        assert sum(map(len, nodes)) <= shard_count + 3
        assert max(map(len, nodes)) <= -(-shard_count // 2) + 2


def test_first_stand_ins_are_spread_over_the_next_blocks_of_the_stream():
    """Of 20,000 clips the one that is tried first lies 1 to 16 blocks on, each as often, in the same stream."""
    stride, clips, batch = 64, 64 * 500, 60
    positions = np.arange(20_000)
    first = np.array([next(stand_ins(lambda asked: asked, int(position), stride, clips)) for position in positions])
    assert (first % stride == positions % stride).all()
    blocks = (first - positions) // stride % (clips // stride)
    assert np.bincount(blocks)[0] == 0
    assert len(np.bincount(blocks)) == 17
    assert stats.chisquare(np.bincount(blocks)[1:]).pvalue > 1e-3
    for step in range(0, 300, 7):
        own = slice(step * batch, (step + 1) * batch)
        assert len({*positions[own].tolist(), *first[own].tolist()}) == 2 * batch


def test_a_shard_cut_while_it_is_read_is_noticed_by_readers_that_have_it_open(copy):
    with loader(copy, workers=2, prefetch=1) as own:
        batches = own.batches(0)
        next(batches)
        for tar in copy.glob("train-*.tar"):
            os.truncate(tar, 0)
        with pytest.raises(UserError, match=r"no clip can be read in place of"):
            list(itertools.islice(batches, 30))
        assert any("the tar is cut" in problem for problem in own.bad.values())


@pytest.mark.parametrize(("workers", "part"), [(0, "train"), (2, "train"), (2, "eval")])
def test_raise_ends_with_the_first_bad_clip(copy, workers, part):
    victim = load_index(copy, part).to_pylist()[0]
    with (copy / victim["shard"]).open("r+b") as file:
        file.seek(victim["fbank_offset"] + 300)
        file.write(b"\x55" * 16)
    config = DataConfig(shards=str(copy), workers=workers, on_error="raise")
    with Loader(config, part, waveform=False, batch_size=12, seed=1) as own:
        said = rf"{victim['shard']}: clip {victim['key']}: fbank: its hash differs .*run verify_shards.py"
        with pytest.raises(UserError, match=said) as caught:
            list(itertools.islice(own.batches(), 6))
        assert caught.value.local


def test_held_out_losses_lose_bad_clips_alone_alike_on_any_ranks(copy, monkeypatch):
    """Whole batches, each bad clip replaced and counted; the bound is that of the sum over all ranks."""
    rows = load_index(copy, "train").to_pylist()  # of which there are more
    victims = [0, 1, 2, BATCH + 1]  # of two batches, on both of two ranks
    for row in victims:
        with (copy / rows[row]["shard"]).open("r+b") as file:
            file.seek(rows[row]["fbank_offset"] + 300)
            file.write(b"\x55" * 16)
    seen, sent, answers = [], [], []

    def forward(batch):
        assert batch.valid.all()
        seen.append(dict(zip(batch.position.tolist(), batch.row.tolist(), strict=True)))
        return SimpleNamespace(named={"loss": batch.fbank.double().pow(2).mean()})

    def mean(values, device):
        sent.append({name: float(value) for name, value in values.items()})
        return answers[0] if answers else sent[-1]

    monkeypatch.setattr("pipeline.engine.evaluation.distributed.mean", mean)

    def measure(ranks, **data):
        sent.clear()
        seen.clear()
        monkeypatch.setattr("pipeline.engine.evaluation.distributed.world_size", lambda: ranks)
        for rank in range(ranks):
            config = DataConfig(shards=str(copy), eval_split="train", **{"workers": 0, "max_bad_share": 1} | data)
            with Loader(config, "eval", waveform=False, batch_size=BATCH, rank=rank, world_size=ranks) as own:
                mean_losses(forward, own.batches(full=True), own, torch.device("cpu"))
        placed = {position: row for one in seen for position, row in one.items()}
        return placed, {name: np.mean([one[name] for one in sent]) for name in sent[0]}

    placed, alone = measure(1)
    offset = placed[len(placed) - 1] - len(placed) + 1
    assert len(placed) == len(rows) // BATCH * BATCH >= 3 * BATCH
    assert [p for p, row in sorted(placed.items()) if row != offset + p] == victims
    for step in range(len(placed) // BATCH):
        assert len({placed[step * BATCH + i] for i in range(BATCH)}) == BATCH
    assert alone["bad_clips"] == 4
    for ranks in (2, 3):
        assert measure(ranks)[0] == placed
        assert measure(ranks)[1] == pytest.approx(alone, rel=1e-12)
    answers.append({"bad_clips": 1.0})
    measure(2, max_bad=1)  # no rank ends by what it alone knows
    assert [one["bad_clips"] / 2 for one in sent] == [2, 2]
    answers[0] = alone
    with pytest.raises(UserError, match=r"data.max_bad = 3: 4 samples of one epoch") as caught:
        measure(2, max_bad=3)
    assert not caught.value.local


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_evaluation_with_lost_shards_has_equally_many_batches_on_each_rank(copy, ranks):
    sorted(copy.glob("eval-*.tar"))[0].unlink()
    counts, scored = [], []
    for rank in range(ranks):
        config = DataConfig(shards=str(copy), workers=0, max_bad_share=1)
        with Loader(config, "eval", waveform=False, batch_size=12, rank=rank, world_size=ranks) as own:
            batches = list(own.batches())
            counts.append([len(batch) for batch in batches])
            scored += [row for batch in batches for row in batch.row[batch.valid].tolist()]
            clips = own.clips
    assert counts == [[12 // ranks] * -(-clips // 12)] * ranks
    lost = next(shard.clips for shard in own.corpus.members[0].manifest.shards if shard.split == "eval")
    assert len(scored) == len(set(scored)) == clips - lost
