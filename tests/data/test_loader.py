"""Batches: the same clips and bytes for any ranks, threads and restarts; bad clips replaced and counted."""

import io
import os
import shutil

import numpy as np
import pyarrow as pa
import pytest
import soundfile
import torch
import yaml
from pydantic import ValidationError

from pipeline.config import AugmentConfig, DataConfig
from pipeline.data.fbank import fbank, pad_frames
from pipeline.data.loader import Loader
from pipeline.data.manifest import INDEX_SCHEMA, load_index, load_manifest
from pipeline.data.reader import fbank_floats, half_floats
from pipeline.errors import UserError
from shard_tools import catalogs
from shard_tools.build import build
from tests.helpers import edit_manifest, options, synth_shards, write_index
from tests.reference.augment import mix

BATCH = 12


def loader(shards, rank=0, ranks=1, part="train", augment=None, waveform=True, raw=None, **data):
    config = DataConfig(shards=str(shards), streams=6, window=5, **{"max_bad_share": 1} | data)
    return Loader(config, part, augment=augment, waveform=waveform, batch_size=BATCH, seed=1, rank=rank,
                  world_size=ranks, raw=raw)  # fmt: skip


def global_batches(shards, ranks, first, count, **options):
    """Batches first .. first + count - 1, their rows brought into global order."""
    parts = []
    for rank in range(ranks):
        with loader(shards, rank, ranks, **options) as own:
            batches = own.batches(first)
            parts.append([next(batches) for _ in range(count)])
    whole = []
    for pieces in zip(*parts, strict=True):
        order = torch.cat([piece.position for piece in pieces]).argsort()
        whole.append(
            {name: torch.cat([getattr(piece, name) for piece in pieces])[order]
             for name in ("position", "row", "waveform", "fbank", "targets")}
        )  # fmt: skip
    return whole


AUGMENT = AugmentConfig(mixup=0.5, freq_mask=24, time_mask=16, noise=0.1, roll=0.05)


def test_readers_draw_for_themselves(shards, monkeypatch):
    """Nothing of the order is asked for in the training process: `next()` waits for no window, whatever its size."""
    with loader(shards, workers=2) as quiet:
        batches = quiet.batches()
        first = next(batches)

        def never(*_):
            raise AssertionError("a draw in the training process")

        monkeypatch.setattr(quiet._steps, "draw", never)
        monkeypatch.setattr(quiet._order, "rows", never)
        later = [next(batches).row for _ in range(6)]
    with loader(shards, workers=0) as own:
        again = own.batches()
        assert torch.equal(next(again).row, first.row)
        assert all(torch.equal(next(again).row, row) for row in later)



@pytest.mark.parametrize("augment", [None, AugmentConfig(freq_mask=24, time_mask=16), AUGMENT])
@pytest.mark.parametrize(("ranks", "workers"), [(1, 2), (3, 0)])
def test_numbers_converted_by_readers_are_those_converted_on_the_device(shards, ranks, workers, augment):
    """Every value, of whole batches: what a GPU does with stored numbers, and the readers' way for a CPU."""
    options = {"augment": augment, "workers": workers, "sampler": "balanced"}
    expected = global_batches(shards, 1, 5, 7, raw=True, **options | {"workers": 0})
    for raw in (False, True):
        found = global_batches(shards, ranks, 5, 7, raw=raw, **options)
        for batch, reference in zip(found, expected, strict=True):
            for name, tensor in reference.items():
                assert batch[name].dtype == tensor.dtype
                assert torch.equal(batch[name], tensor), name


def test_every_float16_is_converted_exactly():
    every = np.arange(65536, dtype=np.uint16).view(np.float16)
    for numbers in (every, every[np.isfinite(every)]):
        found = np.empty(len(numbers), np.float32)
        half_floats(numbers, found)
        assert np.array_equal(found.view(np.int32), numbers.astype(np.float32).view(np.int32))


@pytest.mark.parametrize("frames", [3, 5, 7])
def test_fbanks_are_padded_or_cut_with_what_zeros_become(frames):
    stored = np.arange(-10, 10, dtype=np.float16).reshape(5, 4)
    found = np.full((frames, 4), np.nan, np.float32)
    fbank_floats(stored.ravel(), found.reshape(-1), -4.27, 4.57)
    raw = pad_frames(torch.from_numpy(stored).float()[None], frames)[0]
    assert torch.equal(torch.from_numpy(found), (raw - -4.27) / (2 * 4.57))


def test_values_are_those_of_the_shards(shards):
    with loader(shards) as own:
        batch = next(own.batches(0))
        spec = own.spec
        raw = fbank(batch.waveform) if batch.waveform is not None else None
    assert raw is not None
    padded = torch.nn.functional.pad(raw, (0, 0, 0, spec.frames - raw.shape[1]))
    expected = (padded - spec.mean) / (2 * spec.std)
    assert (batch.fbank - expected).abs().max() < 4e-3 / spec.std
    assert batch.waveform.abs().max() < 1
    index = load_index(shards, columns=["labels"])
    for row, target in zip(batch.row.tolist(), batch.targets, strict=True):
        assert target.nonzero()[:, 0].tolist() == index["labels"][row].as_py()


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_evaluation_sees_each_clip_once(shards, ranks):
    rows, counts = [], set()
    for rank in range(ranks):
        with loader(shards, rank, ranks, part="eval") as own:
            batches = list(own.batches())
            total = own.clips
        counts.add(len(batches))
        rows += [row for batch in batches for row in batch.row[batch.valid].tolist()]
    assert len(counts) == 1  # equally many batches: no rank waits for ever in a collective
    assert len(rows) == len(set(rows)) == total


def test_a_loader_needs_only_shards_and_goes_on_from_its_state(shards):
    """A pass is an epoch; the state, which is taken at any batch, holds for any number of ranks."""
    with Loader(str(shards)) as own:
        assert len(own) == 3  # of 67 clips
        first = [batch.row for batch in own]
        assert own.state_dict() == {"step": 3}
        keys = torch.cat(first).tolist()
        assert len(set(keys)) == own.clips == 67
        assert len(own) == 2  # clips 96 to 133 and 26 of the next epoch
        second = [batch.row for batch in own]
        assert [len(first), len(second)] == [3, 2]
        assert keys[67:] + torch.cat(second).tolist()[:38] != keys[:67]
    with Loader(shards, rank=1, world_size=2) as other:
        other.load_state_dict({"step": 2})
        batches = iter(other)
        assert torch.equal(next(batches).row, first[2][1::2])
        state = other.state_dict()
        batches.close()
        other.load_state_dict(state)
        assert torch.equal(next(iter(other)).row, second[0][1::2])
    with Loader(shards, "eval", batch_size=8) as held:
        assert len(held) == len(list(held)) == len(list(held)) == 2


def test_a_held_out_fold_is_never_trained_on(shards):
    with loader(shards, fold=2) as train, loader(shards, part="eval", fold=2) as held:
        seen = {row for _, batch in zip(range(20), train.batches(0), strict=False) for row in batch.row.tolist()}
        kept = {row for batch in held.batches() for row in batch.row.tolist()}
    folds = load_index(shards, columns=["fold"])["fold"].to_numpy()
    assert set(folds[list(seen)].tolist()) == {1, 3, 5}  # fold 4 of so few clips is all in the eval split
    assert set(folds[list(kept)].tolist()) == {2}


def test_several_splits_are_one(shards, tmp_path):
    """Their names in any spelling, their clips once an epoch each, their folds, statistics and missing tars."""
    words = ["train_split: [eval, train]", "train_split: eval,train", "train_split: '[eval, train]'"]
    assert {DataConfig(**yaml.safe_load(word)).train_split for word in words} == {"eval,train"}
    with pytest.raises(ValidationError, match="names a split twice"):
        DataConfig(train_split="train,eval,train")
    with pytest.raises(UserError, match=r"'train,nope': there is no split 'nope' in .*, which has train, eval"):
        loader(shards, train_split="train,nope")
    with loader(shards, train_split="eval,train") as own:
        batches = [batch for _, batch in zip(range(7), own.batches(0), strict=False)]
        spec, rows = own.spec, [row for batch in batches for row in batch.row.tolist()][: own.clips]
    assert sorted(rows) == list(range(80)) == list(range(own.clips))
    stored = np.concatenate([np.load(io.BytesIO(member)).ravel().astype(float) for member in members(shards, "fbank")])
    assert (spec.mean, spec.std) == pytest.approx((stored.mean(), stored.std()), rel=1e-6)
    with loader(shards, train_split="eval,train", fold=4) as train, \
            loader(shards, train_split="eval,train", fold=4, part="eval") as held:  # fmt: skip
        assert train.clips + held.clips == 80
        assert held.clips == len(load_index(shards, folds=[4])) > 0  # of this fold the train split has none
    shutil.copytree(shards, tmp_path / "copy", ignore=shutil.ignore_patterns("source"))
    tars = load_manifest(shards).shards
    lost = next(shard for shard in tars if shard.split == "eval")
    (tmp_path / "copy" / lost.name).unlink()
    with pytest.raises(UserError, match=f"1 of {len(tars)} tars .* with {lost.clips / 80:.0%} of the "):
        loader(tmp_path / "copy", train_split="eval,train", max_bad_share=0)


def members(shards, name):
    """Every clip's member as it is stored."""
    for row in load_index(shards).to_pylist():
        with (shards / row["shard"]).open("rb") as tar:
            tar.seek(row[f"{name}_offset"])
            yield tar.read(row[f"{name}_size"])


@pytest.fixture
def damaged(shards, tmp_path):
    """A copy in which one clip's waveform has a flipped bit and the last shard is cut in half."""
    copy = tmp_path / "damaged"
    shutil.copytree(shards, copy, ignore=shutil.ignore_patterns("source"))
    rows = load_index(copy).to_pylist()
    victim = next(row for row in rows if row["split"] == "train")
    with (copy / victim["shard"]).open("r+b") as file:
        file.seek(victim["waveform_offset"] + 500)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 1]))
    last = sorted(copy.glob("train-*.tar"))[-1]
    with last.open("r+b") as file:
        file.truncate(last.stat().st_size // 2)
    return copy, victim["key"]


def test_bad_clips_are_replaced_alike_on_any_rank_and_counted(damaged):
    copy, key = damaged
    one = global_batches(copy, 1, 0, 6)
    two = global_batches(copy, 2, 0, 6)
    assert all(torch.equal(a["row"], b["row"]) for a, b in zip(one, two, strict=True))
    with loader(copy) as own:
        for _, batch in zip(range(6), own.batches(0), strict=False):
            assert len(batch) == BATCH
        assert "its hash differs" in own.bad[key]
        assert any("the tar is cut" in problem for problem in own.bad.values())


def test_raise_names_clip_and_shard(damaged):
    copy, _ = damaged
    with loader(copy, on_error="raise") as own, pytest.raises(UserError, match=r"train-0000\d\d.tar: clip"):
        for _ in zip(range(6), own.batches(0), strict=False):
            pass


def test_too_many_bad_clips_end_the_run(damaged):
    copy, _ = damaged
    record = [shard for shard in load_manifest(copy).shards if shard.split == "train"][-1]
    os.truncate(copy / record.name, record.size)  # zeros: nothing to see at the start
    with loader(copy, max_bad=1) as own, pytest.raises(UserError, match=r"data.max_bad = 1"):
        for _ in zip(range(6), own.batches(0), strict=False):
            pass


def stored(shards, row: dict) -> list[float]:
    """A clip's waveform as numpy reads it out of its tar."""
    with (shards / row["shard"]).open("rb") as tar:
        tar.seek(row["waveform_offset"])
        return (np.load(io.BytesIO(tar.read(row["waveform_size"]))) / 32768).tolist()


@pytest.mark.parametrize("raw", [False, True])
def test_mixup_is_the_twin_s_on_waveforms_and_labels(shards, raw):
    index = load_index(shards).to_pylist()
    mixed = 0
    with loader(shards, augment=AugmentConfig(mixup=0.5), raw=raw, workers=0) as own:
        for step, batch in zip(range(3), own.batches(0), strict=False):
            draw = own.draw(step)
            for i, row in enumerate(draw.rows.tolist()):
                weight = float(draw.weight[i])
                other = int(draw.partners[i]) if draw.mixed[i] else row
                mixed += other != row
                wave = mix(stored(shards, index[row]), stored(shards, index[other]), weight)
                assert batch.waveform[i].tolist() == pytest.approx(wave, abs=1e-6)
                one, two = ([float(label in index[r]["labels"]) for label in range(13)] for r in (row, other))
                assert batch.targets[i].tolist() == pytest.approx(mix(one, two, weight), abs=1e-6)
    assert 9 < mixed < 27


def partners_of(shards, ranks, steps, **options):
    """Rows of own and other clips of batches 0 .. steps - 1, in global order."""
    own, others = np.empty((2, steps, BATCH), np.int64)
    for rank in range(ranks):
        with loader(shards, rank, ranks, workers=0, **options) as one:
            for step in range(steps):
                draw = one.draw(step)
                own[step, rank::ranks], others[step, rank::ranks] = draw.rows, draw.partners
    return own.ravel(), others.ravel()


def test_other_clips_of_mixup_are_uniform_under_balanced_sampling(tmp_path):
    """Of 96 clips 84 are of class a, and as many of the partners, but half of the drawn: as in SSAST, AST and PSLA."""
    rows = ["path,labels"]
    for number in range(96):
        noise = np.random.default_rng(number).uniform(-0.5, 0.5, 800)
        soundfile.write(tmp_path / f"{number}.wav", noise, 16000)
        rows.append(f"{number}.wav,{'ba'[number % 8 > 0]}")
    (tmp_path / "t.csv").write_text("\n".join(rows))
    out = tmp_path / "shards"
    build(catalogs.table(tmp_path, tmp_path / "t.csv", None, None), out, options(0.05, 8), 1, engine="inline")
    common = np.array([labels == [0] for labels in load_index(out)["labels"].to_pylist()])
    assert common.sum() == 84
    for data in ({}, {"replacement": False, "epoch_clips": 24}):
        augment = AugmentConfig(mixup=0.5)
        own, others = partners_of(out, 1, 400, augment=augment, sampler="balanced", **data)
        assert common[own].mean() == pytest.approx(0.5, abs=0.05)
        assert common[others].mean() == pytest.approx(84 / 96, abs=0.02)
        expected = 4800 / 96
        assert (abs(np.bincount(others, minlength=96) - expected) < 5 * expected**0.5).all()
        assert (own != others).all()
        again = partners_of(out, 3, 400, augment=augment, sampler="balanced", **data)
        assert [rows.tolist() for rows in again] == [own.tolist(), others.tolist()]
        drawn = AugmentConfig(mixup=0.5, partners="sampler")
        assert common[partners_of(out, 1, 400, augment=drawn, sampler="balanced", **data)[1]].mean() < 0.8


def test_only_what_is_needed_is_read(shards):
    with loader(shards, waveform=False) as own:
        batch = next(own.batches(0))
    assert batch.waveform is None
    assert batch.fbank is not None


@pytest.mark.parametrize(
    ("data", "said"), [({"train_split": "nope"}, "nope"), ({"fold": 9}, "data.fold = 9"), ({"eval_split": "x"}, "'x'")]
)
def test_wrong_parts_are_named(shards, data, said):
    with pytest.raises(UserError, match=said):
        loader(shards, part="train" if "train_split" in data else "eval", **data)


def test_a_missing_shard_larger_than_any_search_is_replaced(tmp_path):
    synth_shards(tmp_path, clips=160, seconds=0.1, per_shard=80)
    sorted(tmp_path.glob("train-*.tar"))[0].unlink()
    with loader(tmp_path) as own:
        for _, batch in zip(range(20), own.batches(0), strict=False):
            assert len(batch) == BATCH
        lost = next(shard for shard in own.corpus.members[0].manifest.shards if shard.split == "train").clips
        assert len(own.bad) == lost > 64


def test_a_bad_clip_is_not_scored_twice(damaged, shards):
    copy, _ = damaged
    victim = load_index(copy, "eval").to_pylist()[0]
    with (copy / victim["shard"]).open("r+b") as file:
        file.seek(victim["waveform_offset"] + 300)
        file.write(b"\x55" * 16)
    with loader(copy, part="eval") as own:
        rows = [row for batch in own.batches() for row in batch.row[batch.valid].tolist()]
        assert len(rows) == len(set(rows)) == own.clips - 1
        assert victim["key"] in own.bad


def test_an_index_of_another_build_is_refused(damaged):
    copy, _ = damaged
    write_index(copy, load_index(copy).slice(0, 20))
    with pytest.raises(UserError, match=r"index.parquet: 20 rows, manifest.json counts"):
        loader(copy)


def test_what_would_give_wrong_batches_is_refused(shards):
    with pytest.raises(UserError, match="divide by 5 ranks"):
        loader(shards, ranks=5)
    with pytest.raises(UserError, match=r"data.fbank = stored"):
        loader(shards, augment=AUGMENT, fbank="stored")


def test_the_batch_knows_where_the_audio_ends(tmp_path):
    """The waveform's embedding is normalised over the audio; of a mixture that is the longer clip's."""
    seconds = [0.5, 0.3, 0.125, 0.05]
    rows = ["path,labels"]
    for number in range(16):
        noise = np.random.default_rng(number).uniform(-0.5, 0.5, round(seconds[number % 4] * 16000))
        soundfile.write(tmp_path / f"{number}.wav", noise, 16000)
        rows.append(f"{number}.wav,{'ab'[number % 2]}")
    (tmp_path / "t.csv").write_text("\n".join(rows))
    catalog = catalogs.table(tmp_path, tmp_path / "t.csv", None, None)
    build(catalog, tmp_path / "shards", options(0.5, 4), 1, engine="inline")
    for mixup in (0.0, 1.0):
        with loader(tmp_path / "shards", augment=AugmentConfig(mixup=mixup)) as found:
            batch, draw = next(found.batches(0)), found.draw(0)
            keys, partners = found.keys(batch.row.tolist()), found.keys(draw.partners.tolist())
        for i, (own, other) in enumerate(zip(keys, partners, strict=True)):
            samples = max(round(seconds[int(key) % 4] * 16000) for key in (own, other))
            assert int(batch.length[i]) == samples
            assert batch.waveform[i, :samples].any()
            assert not batch.waveform[i, samples:].any()
    assert len(batch.length.unique()) > 1


@pytest.mark.parametrize("raw", [False, True])
def test_a_clip_is_not_mixed_with_itself(shards, raw):
    """One clip only: its partner can only be itself. Labels and samples stay what they are, to the bit."""
    config = DataConfig(shards=str(shards), workers=0)
    found = []
    for mixup in (1.0, 0.0):
        augment = AugmentConfig(mixup=mixup, roll=1e-9)
        with Loader(config, augment=augment, batch_size=1, seed=1, raw=raw, limit=1) as own:
            batches = own.batches(0)
            found.append([next(batches) for _ in range(20)])
            draws = [own.draw(step) for step in range(20)]
    assert all(draw.rows.tolist() == [0] for draw in draws)
    for mixed, plain in zip(*found, strict=True):
        for name in ("waveform", "fbank", "targets"):
            assert torch.equal(getattr(mixed, name), getattr(plain, name)), name


@pytest.mark.parametrize("vocabulary", [True, False])
def test_balanced_sampling_without_labels_is_one_line(shards, tmp_path, vocabulary):
    """No clip to train on has a label: with labels in the other split, and with none at all."""
    copy = tmp_path / "copy"
    shutil.copytree(shards, copy, ignore=shutil.ignore_patterns("source"))
    rows = load_index(copy).to_pylist()
    for row in rows:
        if not vocabulary or row["split"] == "train":
            row["labels"] = []
    write_index(copy, pa.Table.from_pylist(rows, INDEX_SCHEMA))
    if not vocabulary:
        empty = {"class_clips": [], "class_listed": []}
        edit_manifest(copy, lambda content: content.update(
            labels=[], splits={name: split | empty for name, split in content["splits"].items()}))  # fmt: skip
    with pytest.raises(UserError, match=r"data.sampler = balanced: .* set data.sampler=shuffle"):
        loader(copy, sampler="balanced", workers=0)
    loader(copy, workers=0).close()


def test_a_split_of_its_own_is_evaluated_without_a_training_split(shards):
    data = DataConfig(shards=str(shards), train_split="unbalanced", workers=0)
    with Loader(data, "eval", batch_size=BATCH) as own, loader(shards, part="eval") as usual:
        assert own.clips == usual.clips
    for words in ({"part": "train"}, {"part": "eval", "fold": 1}):
        with pytest.raises(UserError, match=r"data\.train_split = 'unbalanced': there is no split"):
            loader(shards, **words, train_split="unbalanced")
