"""Whole weights and moments come in few collectives, and a mean of the weights over time sends nothing."""

import json
from pathlib import Path

import pytest

from tests.ranks import run_ranks


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "out"
    run_ranks(2, Path(__file__).with_name("whole.py"), out)
    return [json.loads(Path(f"{out}.{rank}").read_text()) for rank in range(2)]


@pytest.mark.slow
def test_they_are_deepspeeds_own_bit_for_bit(reports):
    main, other = reports
    assert len(main) == 13
    for cell, found in main.items():
        assert found["equal"], cell
        assert found["restored"], cell
        assert other[cell]["others"] == 0, cell  # nothing is copied to a host that has no use for it
    assert main["0 False False"]["negative_zero"] == "-0.0"


@pytest.mark.slow
def test_many_come_in_one_collective(reports):
    for cell, found in reports[0].items():
        divided = not cell.startswith("0")
        for what in ("weights", "moments", "average"):
            sums = found["used"][what]
            assert set(sums) <= {"reduce_"}, (cell, what)
            assert bool(sums) is (divided or what == "average"), (cell, what)
            assert len(sums) < found["tensors"] / 5, (cell, what)


@pytest.mark.slow
def test_each_rank_averages_its_own_part_and_sends_nothing(reports):
    for cell in reports[0]:
        held = [report[cell]["held"] for report in reports]
        assert sum(held) == reports[0][cell]["whole"], cell
        assert max(held) < 0.6 * sum(held), cell
        assert all(report[cell]["used"]["mean"] == [] for report in reports), cell
