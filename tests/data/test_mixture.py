"""Several sets of shards in one order: each position of a set once, at the rate of its weight, whatever reads them."""

import itertools
import json
import shutil

import numpy as np
import pytest
import yaml

from pipeline.config import AugmentConfig, DataConfig
from pipeline.data.corpus import load_corpus
from pipeline.data.loader import Loader
from pipeline.data.mixture import ROUNDS, MixedOrder
from pipeline.data.order import Part, TrainOrder
from pipeline.errors import UserError
from tests.data.test_equality import AUGMENT, BATCH, global_batches
from tests.helpers import edit_manifest, synth_shards
from tests.ranks import run_script

LANES = 8
COUNT = 9  # of 12 clips, 131 an epoch


@pytest.fixture(scope="module")
def sets(shards, tmp_path_factory):
    """The session's shards, and two smaller sets, of which one shares classes by id or name and the other none."""
    folder = tmp_path_factory.mktemp("sets")
    shutil.copytree(shards, folder / "a")
    for name, clips in (("b", 40), ("c", 56)):
        synth_shards(folder / name, clips=clips)
    edit_manifest(folder / "b", rename)
    edit_manifest(folder / "c", lambda content: content.update(labels=[
        {"id": str(number), "name": str(number)} for number in range(len(content["labels"]))]))  # fmt: skip
    return [folder / name for name in "abc"]


def rename(content):
    """Other ids and, but for the case, the names of the classes; the last one has a name of its own."""
    content["labels"] = [{"id": f"x{n}", "name": label["name"].upper()} for n, label in enumerate(content["labels"])]
    content["labels"][-1]["name"] = "another"


def mixed(lengths, phases, key="k", lanes=LANES, batch=12, clips=0):
    starts = np.cumsum([0, *lengths])
    orders = [
        TrainOrder(Part(np.array([0, length]), None, int(start), f"p{number}"), 3, lanes, 4)
        for number, (length, start) in enumerate(zip(lengths, starts, strict=False))
    ]
    return MixedOrder(orders, phases, key, lanes, batch, clips)


@pytest.mark.parametrize(
    "phases",
    [
        [(0, (1, 1))],
        [(0, (3, 1, 0.001))],
        [(0, (0.7, 0.2, 0.1)), (61, (0, 1, 1)), (300, (1, 0, 0)), (301, (0.1, 0.1, 5))],
        [(0, (0, 0, 1, 2)), (400, (2, 1, 0, 0))],
    ],
)
def test_each_position_of_a_set_comes_once_and_at_the_rate_of_its_weight(phases):
    order = mixed([37] * len(phases[0][1]), phases)
    count = LANES * ROUNDS * 12
    which, own = order.turns.split(np.arange(count))
    edges = [-(-step * 12 // LANES) * LANES for step, _ in phases]
    wanted = np.zeros((len(phases[0][1]),))
    for (_, weights), first, stop in zip(phases, edges, [*edges[1:], count], strict=True):
        found = np.bincount(which[first:stop], minlength=len(weights))
        share = (stop - first) * np.array(weights) / sum(weights)
        blocks = (stop - first) / LANES % ROUNDS == 0 or stop != count
        assert not blocks or np.abs(found - share).max() <= len(weights)  # exact but for a clip a set
        wanted += share
    for number in range(len(wanted)):
        mine = np.sort(own[which == number])
        assert len(np.unique(mine)) == len(mine)
        lane = [mine[mine % LANES == s] // LANES for s in range(LANES)]
        assert all((np.sort(turns) == np.arange(len(turns))).all() for turns in lane)  # none is left out
        lengths = list(map(len, lane))
        whole = (count - edges[-1]) // LANES % ROUNDS == 0  # the last block is: its shuffles are over
        assert max(lengths) - min(lengths) <= (len(phases) + 1 if whole else ROUNDS)


def test_any_positions_in_any_order_are_those_of_a_walk():
    phases = [(0, (5, 2, 1)), (40, (1, 1, 1))]
    walk = mixed([50, 20, 9], phases).rows(np.arange(4000))
    rng = np.random.default_rng(0)
    other = mixed([50, 20, 9], phases)
    for size in (1, 7, 60, 400):
        positions = rng.integers(0, 4000, size)
        assert (other.rows(positions) == walk[positions]).all()
    assert (mixed([50, 20, 9], phases, key="other").rows(np.arange(4000)) != walk).any()
    changed = mixed([50, 20, 9], [*phases, (300, (1, 0, 0))]).rows(np.arange(4000))
    cut = 300 * 12 - LANES * ROUNDS  # a later phase changes nothing before it but the turns of its last 64 rounds
    assert (changed[:cut] == walk[:cut]).all()


def test_a_rare_set_is_spread_over_the_run():
    """One clip in a thousand comes about every thousand positions, not sixty-four at once."""
    which, _ = mixed([500, 500], [(0, (999, 1))], lanes=64).turns.split(np.arange(200_000))
    found = np.flatnonzero(which == 1)
    assert len(found) == pytest.approx(200, abs=2)
    assert np.diff(found).max() < 1000 + 2 * 64 * ROUNDS
    for first in range(0, 196_000, 20_000):
        assert ((found >= first) & (found < first + 20_000)).sum() == pytest.approx(20, abs=5)


def test_a_batch_reads_the_lanes_of_its_rank_in_every_set():
    order = mixed([4000, 4000], [(0, (2, 1))], lanes=8)
    positions = np.arange(8 * 500)
    _, own = order.turns.split(positions)
    assert (own % 8 == positions % 8).all()


def entries(sets, *more):
    words = zip(sets, (3, 2, 1), more or ({},) * 3, strict=True)
    return [{"path": str(path), "weight": weight} | extra for path, weight, extra in words]


def opened(shards, ranks=1, workers=0, cache="", **data):
    config = DataConfig(shards=shards, workers=workers, streams=6, window=5, cache=str(cache), **data)
    return [Loader(config, augment=AUGMENT, batch_size=BATCH, seed=1, rank=r, world_size=ranks) for r in range(ranks)]


def same(one, two):
    return one.keys() == two.keys() and all(
        one[name] == two[name] if name == "key" else one[name].equal(two[name]) for name in one
    )


SCHEDULE = [{"step": 4, "weights": [1, 1, 1]}, {"step": 7, "weights": [0, 0, 1]}]


@pytest.fixture(scope="module")
def expected(sets):
    (own,) = opened(entries(sets), schedule=SCHEDULE)
    found = global_batches([own], 0, COUNT)
    own.close()
    return found


@pytest.mark.parametrize(("ranks", "workers"), [(1, 2), (2, 1), (3, 0), (4, 2)])
def test_ranks_workers_and_resuming_anywhere_change_no_byte(sets, expected, ranks, workers):
    for first in range(COUNT):
        loaders = opened(entries(sets), ranks, workers, schedule=SCHEDULE)
        count = 2 if first else COUNT
        found = global_batches(loaders, first, min(count, COUNT - first))
        assert all(itertools.starmap(same, zip(expected[first:], found, strict=False)))
        for own in loaders:
            own.close()


def test_a_set_behind_a_url_is_read_as_one_on_disk(sets, s3_shards, expected, tmp_path):
    url = [{"path": str(s3_shards), "weight": 3}, *entries(sets)[1:]]
    loaders = opened(url, 2, 2, tmp_path, schedule=SCHEDULE)
    found = global_batches(loaders, 0, 3)
    assert all(before["waveform"].equal(after["waveform"]) for before, after in zip(expected, found, strict=False))
    for own in loaders:
        own.close()


def test_batches_follow_the_weights_and_the_schedule(sets):
    (own,) = opened(entries(sets), schedule=[{"step": 500, "weights": [0, 1, 1]}])
    rows = np.stack([own.draw(step).rows for step in range(1000)])
    begins = np.cumsum([0, *(sum(s.clips for s in m.manifest.shards) for m in own.corpus.members)])
    which = np.searchsorted(begins, rows, side="right") - 1
    assert np.bincount(which[:500].ravel()) / 6000 == pytest.approx([1 / 2, 1 / 3, 1 / 6], abs=0.01)
    assert np.bincount(which[501:].ravel(), minlength=3) / 5988 == pytest.approx([0, 1 / 2, 1 / 2], abs=0.02)
    own.close()


def test_without_weights_each_clip_comes_once_an_epoch_and_temperature_flattens(sets):
    (own,) = opened(entries([*sets], *({"weight": None},) * 3))
    assert own.clips == sum(member.clips for member in own.corpus.members) == len(own._steps._order)
    rows = own._steps._order.rows(np.arange(own.clips * 20))
    counts = np.bincount(rows)
    assert counts[counts > 0] == pytest.approx(20, abs=2)
    own.close()
    (flat,) = opened(entries([*sets], *({"weight": None},) * 3), temperature=1e9)
    which, _ = flat._steps._order.turns.split(np.arange(6000))
    assert np.bincount(which) == pytest.approx(2000, abs=6 * ROUNDS)
    flat.close()


def test_vocabularies_are_joined_by_name_and_numbers_are_not(sets):
    corpus = load_corpus(DataConfig(shards=entries(sets)))
    first, second, third = corpus.members
    classes = len(first.manifest.labels)
    assert first.classes is None
    assert second.classes.tolist() == [*range(classes - 1), classes]
    assert third.classes.tolist() == list(range(classes + 1, 2 * classes + 1))
    assert len({label.id for label in corpus.labels}) == len(corpus.labels) == 2 * classes + 1
    assert f"0 of them joined by id and {classes - 1} by name" in corpus.report[1]
    both = load_corpus(DataConfig(shards=[{"path": str(sets[2])}, {"path": str(sets[2]), "split": "eval"}]))
    assert len(both.labels) == classes  # one set twice: its numbers mean the same


@pytest.mark.parametrize("turned", [False, True])
def test_two_classes_of_a_set_are_never_one(sets, tmp_path, turned):
    """One has the id of a class before, another one its name: the id counts, wherever it stands."""
    before, after = [("/m/0bt9lr", "Dog"), ("/m/04rlf", "Music")], [("x", "Dog"), ("/m/0bt9lr", "Hound")]
    for name, of in (("a", before), ("b", after)):
        shutil.copytree(sets[1], tmp_path / name)
        few = [{"id": id_, "name": said} for id_, said in (of[::-1] if turned and name == "b" else of)]
        edit_manifest(tmp_path / name, lambda content, few=few: content.update(
            labels=few + [{"id": f"{n}", "name": f"{n}"} for n in range(len(content["labels"]) - 2)]))  # fmt: skip
    corpus = load_corpus(DataConfig(shards=[str(tmp_path / "a"), str(tmp_path / "b")]))
    joined = corpus.members[1].classes.tolist()
    assert len(set(joined)) == len(joined)
    assert joined[not turned] == 0
    assert [corpus.labels[n].id for n in joined[:2]][turned] == "x"


def test_targets_are_those_of_the_joined_vocabulary(sets):
    data = DataConfig(shards=entries(sets), workers=0, streams=6, window=5)
    with Loader(data, batch_size=BATCH) as own:
        starts = np.cumsum([0, *(sum(s.clips for s in m.manifest.shards) for m in own.corpus.members)])
        for batch in itertools.islice(own.batches(), 20):
            names = [[own.spec.labels[c].name for c in row.nonzero()[:, 0].tolist()] for row in batch.targets]
            for row, found in zip(batch.row.tolist(), names, strict=True):
                number = int(np.searchsorted(starts, row, side="right") - 1)
                with Loader(str(sets[number]), batch_size=1) as alone:
                    clips = alone._index.clips(np.array([row - starts[number]]))
                    expected = [alone.spec.labels[c].name for c in clips.labels]
                assert sorted(name.casefold() for name in found) == sorted(name.casefold() for name in expected)


def test_held_out_clips_of_all_sets_are_evaluated_and_balanced_sampling_is_within_a_set(sets):
    data = DataConfig(shards=entries(sets, {}, {"eval_split": ""}, {}), workers=0, streams=6, window=5)
    with Loader(data, "eval", batch_size=BATCH) as own:
        rows = np.concatenate([batch.row[batch.valid].numpy() for batch in own.batches()])
        members = own.corpus.members
        assert len(rows) == len(np.unique(rows)) == sum(members[n].manifest.splits["eval"].clips for n in (0, 2))
    mixup = AugmentConfig(mixup=0.5)
    with Loader(data.model_copy(update={"sampler": "balanced"}), augment=mixup, batch_size=BATCH) as own:
        draws = [own.draw(step) for step in range(50)]
        edges = np.cumsum([0, *(sum(s.clips for s in m.manifest.shards) for m in members)])
        for draw in draws:
            sets_of = [np.searchsorted(edges, rows, side="right") for rows in (draw.rows, draw.partners)]
            assert (sets_of[0] == sets_of[1])[draw.mixed].all()


def test_a_set_that_is_listed_for_two_training_splits_is_evaluated_once(sets):
    """As AudioSet's two training sets are, to draw from them by weights."""
    twice = [{"path": str(sets[0]), "weight": 1}, {"path": str(sets[0]), "weight": 2, "split": "train,eval"}]
    for shards, members in ((twice, (0,)), ([*twice, {"path": str(sets[1]), "weight": 1}], (0, 2))):
        data = DataConfig(shards=shards, workers=0)
        with Loader(data, "eval", batch_size=BATCH) as own, Loader(data, batch_size=BATCH) as trained:
            rows = np.concatenate([batch.row[batch.valid].numpy() for batch in own.batches()])
            assert own.clips == len(rows) == sum(own.corpus.members[n].manifest.splits["eval"].clips for n in members)
            assert len({(shard, key) for key, shard in own.names(rows.tolist())}) == len(rows)
            assert own.corpus.digest == trained.corpus.digest


def test_a_damaged_clip_is_replaced_by_one_of_its_own_set(sets, tmp_path):
    copies = []
    for path in sets:
        shutil.copytree(path, tmp_path / path.name)
        copies.append(tmp_path / path.name)
    tar = sorted(copies[1].glob("train-*.tar"))[0]
    content = bytearray(tar.read_bytes())
    content[2000:20000] = bytes(18000)
    tar.write_bytes(content)
    found = []
    for ranks, workers in ((1, 0), (2, 1)):
        loaders = opened(entries(copies), ranks, workers, max_bad_share=1)
        found.append(global_batches(loaders, 0, 12))
        replaced = [own.draw(step).rows for own in loaders for step in range(12)]
        assert sum(len(own.bad) for own in loaders) > 0
        assert all(str(copies[1]) in said for own in loaders for said in own.bad.values())
        if ranks == 1:
            starts = np.cumsum([0, *(sum(s.clips for s in m.manifest.shards) for m in loaders[0].corpus.members)])
            rows = np.concatenate([batch["row"].numpy() for batch in found[0]])
            planned = np.concatenate(replaced)
            assert (rows != planned).any()
            of = [np.searchsorted(starts, one, side="right") for one in (rows, planned)]
            assert (of[0] == of[1]).all()
        for own in loaders:
            own.close()
    assert all(itertools.starmap(same, zip(*found, strict=True)))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: {"shards": [{"path": str(s[0])}, {"path": str(s[1]), "weight": 1}]}, "each set a weight, or none"),
        (lambda s: {"shards": [{"path": str(s[0])}] * 2}, "is there twice; raise its weight"),
        (lambda s: {"shards": []}, "names no set"),
        (lambda s: {"shards": entries(s), "temperature": 2}, "temperature is for sets without weights"),
        (lambda s: {"shards": [*map(str, s)], "temperature": 0.01}, "greater than or equal to 0.05"),  # clips^100
        (lambda s: {"shards": entries(s), "fold": 1}, "no folds in common"),
        (lambda s: {"shards": str(s[0]), "schedule": [{"step": 1, "weights": [1]}]}, "for several sets"),
        (lambda s: {"shards": entries(s), "schedule": [{"step": 1, "weights": [1]}]}, "1 weights for 3 sets"),
        (lambda s: {"shards": entries(s), "schedule": [{"step": 1, "weights": [0, 0, 0]}]}, "all weights are 0"),
        (lambda s: {"shards": entries(s), "schedule": [{"step": 2, "weights": [1, 0, 0]}] * 2}, "steps must rise"),
        (lambda s: {"shards": entries(s), "sampler": "balanced", "replacement": False}, "one set of shards"),
    ],
)
def test_settings_that_do_not_fit_are_refused(sets, change, said):
    with pytest.raises(ValueError, match=said):
        DataConfig(**change(sets))


def test_sets_that_do_not_fit_each_other_are_refused(sets, tmp_path):
    synth_shards(tmp_path / "long", clips=16, seconds=1.0)
    a, b, _ = map(str, sets)
    for shards, batch, said in (
        ([a, str(tmp_path / "long")], 12, "0.5 s at 16000 Hz, 128 mel bins, those of .* 1 s"),
        ([a, {"path": b, "split": "x"}], 12, r"shards\[1\].split = 'x': there is no split"),
        ([a, {"path": b, "eval_split": "x"}], 12, r"shards\[1\].eval_split = 'x' is not"),
        ([{"path": a, "weight": 1}, {"path": b, "weight": 90}], 60, "a batch would hold 59 clips of the .* of .*b, so"),
    ):
        with pytest.raises(UserError, match=said):
            Loader(DataConfig(shards=shards, workers=0), batch_size=batch)


def test_a_batch_of_a_mixture_is_shown_by_the_run_s_settings_or_a_list(sets, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({"data": {"shards": entries(sets), "schedule": SCHEDULE}}))
    shown = [
        run_script("-m", "pipeline.data.show", "--batch", 2, "--batch-size", 6, *words)
        for words in (["--config", str(config)], ["--shards", json.dumps(entries(sets)), "data.schedule="
                                                  + json.dumps(SCHEDULE)], [])
    ]  # fmt: skip
    assert shown[0].stdout == shown[1].stdout != ""
    assert all(str(path) in shown[0].stdout for path in sets[:2])
    assert (shown[2].returncode, "no shards are named" in shown[2].stderr) == (2, True)
