"""What a commit must not change: batches, bytes of shards, losses; and what users have on their disks still opens.

Where a change is meant, `python -m tests.invariance --write` writes the new hashes.
"""

import json
from dataclasses import replace

import pytest

from shard_tools.verify_shards import verify
from tests.invariance import measure, training


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    made = measure.measure(tmp_path_factory.mktemp("invariance"))
    kept = json.loads(measure.KEPT.read_text())
    return made, measure.differences(kept, made, measure.machine())


@pytest.mark.slow
@pytest.mark.parametrize("what", ["batch", "shards", "losses", "resumed", "former"])
def test_it_is_what_it_was(found, what):
    made, differences = found
    assert any(name.startswith(what) for name in made)
    assert {name: said for name, said in differences.items() if name.startswith(what)} == {}


@pytest.mark.slow
@pytest.mark.parametrize("name", training.RESUMED)
def test_a_resumed_run_is_the_straight_one(found, name):
    made, _ = found
    assert made[f"resumed {name}"] == made[f"losses {name}"]


def test_what_differs_is_named():
    kept = json.loads(measure.KEPT.read_text())
    made = {name: measure.Entry(**entry) for name, entry in kept["entries"].items()}
    here = kept["machine"]
    assert measure.differences(kept, made, here) == {}
    loss, shards = made["losses swab"], made["shards of whole files"]
    first, _, others = loss.numbers.partition(" ")
    made["losses swab"] = replace(loss, numbers=f"{(float.fromhex(first) * (1 + 1e-6)).hex()} {others}")
    made["shards of whole files"] = replace(shards, exact=shards.exact | {"train-000001.tar": "another"})
    del made["batch 0 shuffled"]
    gone = {"batch 0 shuffled": "is not there any more"}
    changed = {"losses swab": "numbers", "shards of whole files": "train-000001.tar"}
    assert measure.differences(kept, made, here) == gone | changed
    elsewhere = here | {"torch": "another"}
    assert measure.differences(kept, made, elsewhere) == gone
    made["losses swab"] = replace(loss, numbers=f"{(float.fromhex(first) * (1 + 1e-4)).hex()} {others}")
    assert measure.differences(kept, made, elsewhere) == gone | {"losses swab": "numbers"}


def test_shards_of_earlier_code_are_sound():
    assert verify(training.FORMER / "shards", workers=1) == []
